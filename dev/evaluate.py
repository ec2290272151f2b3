#!/usr/bin/env python3
"""Scores pictures against a reference batch: FID, sFID, Inception Score, precision and recall as ADM's
evaluator defines them, FD-DINOv2 and KDD as dgm-eval does.

  python3 dev/evaluate.py samples.npz --ref VIRTUAL_imagenet256_labeled.npz \\
      --inception pt_inception-2015-12-05-6726825d.pth
  python3 dev/evaluate.py samples.npz --ref ... --inception ... \\
      --dino dinov2_vitl14_pretrain.pth --dino-ref pictures/

Pictures are an .npz with arr_0, uint8 [N,H,W,3] (./sample --npz), or a folder of them. The reference's mu,
sigma, mu_s, sigma_s are used where it has them, and its arr_0 for precision, recall and, without --dino-ref,
DINOv2. Features stay in --cache under the hash of pictures and weights, so that a second call, or one with
other metrics, is quick. Results go to stdout, and with --out FILE as JSON, with the hash of every file that
they depend on. What it refuses to become: a judge of its own; every number has a published definition, and
where ours differs the text says so.
"""
import argparse, hashlib, json, os, sys, time, zipfile

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
try:
    import numpy as np
    import torch
    from PIL import Image
    import networks
except ImportError as error:
    sys.exit("error: %s; on Debian: apt-get install python3-torch python3-pil, then /usr/bin/python3 %s" %
             (error, sys.argv[0]))

PUBLISHED = "6726825d"          # how the SHA-256 of the public Inception's file begins, as its name says
NEIGHBOURS = 3                  # of precision and recall
SUBSETS, SUBSET, SUBSET_SEED = 100, 1000, 13579         # of KDD

# ----------------------------------------------------------------------------------------------- the metrics

def moments(x, block=8192):
    """Features [N,D] -> mean [D] and covariance [D,D] in double, divided by N - 1, in two passes of blocks"""
    n = len(x)
    mean = sum(x[i:i + block].astype(np.float64).sum(0) for i in range(0, n, block)) / n
    covariance = np.zeros((x.shape[1], x.shape[1]))
    for i in range(0, n, block):
        centred = x[i:i + block].astype(np.float64) - mean
        covariance += centred.T @ centred
    return mean, covariance / max(n - 1, 1)

def frechet(mean1, cov1, mean2, cov2):
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)). The root's trace is that of (A C2 A)^(1/2), A = C1^(1/2),
    whose eigenvalues are those of C1 C2: both eigenproblems are symmetric, and nothing becomes complex."""
    values, vectors = np.linalg.eigh(cov1)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    inner = root @ cov2 @ root
    values = np.linalg.eigvalsh((inner + inner.T) / 2)
    d = mean1 - mean2
    return float(d @ d + np.trace(cov1) + np.trace(cov2) - 2 * np.sqrt(np.maximum(values, 0)).sum())

def inception_score(pool, weight, split=5000, block=2048):
    """exp of the mean KL between a picture's classes and their mean, over splits. weight: fc.weight [1008,D];
    the bias is left out, as ADM's evaluator leaves it out."""
    scores = []
    for i in range(0, len(pool), split):
        part = np.concatenate([log_softmax(pool[j:min(j + block, i + split, len(pool))] @ weight.T)
                               for j in range(i, min(i + split, len(pool)), block)])
        p = np.exp(part)
        mean = p.mean(0)
        logarithm = np.log(np.where(mean > 0, mean, 1))
        scores.append(np.exp((p * (part - logarithm)).sum(1).mean()))
    return float(np.mean(scores))

def log_softmax(x):
    x = x.astype(np.float64) - x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))

def distances(a, b):
    """Squared distances [n,m], double"""
    a, b = a.double(), b.double()
    return ((a * a).sum(1)[:, None] + (b * b).sum(1)[None] - 2 * a @ b.t()).clamp(min=0)

def tensors(x, begin, end, device):
    return torch.from_numpy(np.array(x[begin:end])).to(device)

def radii(x, device, block=2048):
    """Squared distance of each feature to its third neighbour, itself not counted"""
    out, n = [], len(x)
    for i in range(0, n, block):
        rows, best = tensors(x, i, i + block, device), None
        for j in range(0, n, block):
            d = distances(rows, tensors(x, j, j + block, device))
            best = d if best is None else torch.cat([best, d], 1)
            best = best.topk(min(NEIGHBOURS + 1, best.shape[1]), 1, largest=False)[0]
        out.append(best[:, NEIGHBOURS])
    return torch.cat(out)

def precision_recall(reference, samples, device="cpu", block=2048):
    """Share of the samples inside the reference's spheres, and of the reference inside the samples' (arXiv
    1904.06991). ADM computes the distances in half precision where they fit, we in double."""
    r1, r2 = radii(reference, device), radii(samples, device)
    in1, in2 = (torch.zeros(len(x), dtype=torch.bool, device=device) for x in (reference, samples))
    for i in range(0, len(reference), block):
        rows = tensors(reference, i, i + block, device)
        for j in range(0, len(samples), block):
            d = distances(rows, tensors(samples, j, j + block, device))
            in1[i:i + block] |= (d <= r2[None, j:j + block]).any(1)
            in2[j:j + block] |= (d <= r1[i:i + block, None]).any(0)
    return float(in2.double().mean()), float(in1.double().mean())

def kernel_distance(x, y):
    """Squared maximum mean discrepancy, unbiased, of (<x,y> / D + 1)^3 -> mean and deviation over 100 random
    subsets of 1000. x, y: features [n,D]."""
    rng, n = np.random.RandomState(SUBSET_SEED), min(SUBSET, len(x), len(y))
    if n < 2:
        raise ValueError("KDD needs at least 2 pictures on each side")
    found = []
    for _ in range(SUBSETS):
        a, b = (z[np.sort(rng.choice(len(z), n, replace=False))].astype(np.float64) for z in (x, y))
        aa, bb, ab = ((u @ v.T / x.shape[1] + 1) ** 3 for u, v in ((a, a), (b, b), (a, b)))
        same = (aa.sum() - np.trace(aa) + bb.sum() - np.trace(bb)) / (n * (n - 1))
        found.append(same - 2 * ab.mean())
    return float(np.mean(found)), float(np.std(found))

# ---------------------------------------------------------------------------------------------- the pictures

class Pictures:
    """N pictures of one size, read in order in bounded memory, from an .npz or a folder."""
    def __init__(self, path):
        self.path, self.files = path, None
        if os.path.isdir(path):
            self.files = sorted(os.path.join(root, n) for root, _, names in os.walk(path) for n in names
                                if n.lower().endswith((".png", ".jpg", ".jpeg", ".webp", ".bmp")))
            if not self.files:
                raise ValueError("%s: no picture in it" % path)
            self.count = len(self.files)
            return
        try:
            with zipfile.ZipFile(path) as z, z.open("arr_0.npy") as f:
                self.shape, order, self.dtype = header_of(f)
        except (zipfile.BadZipFile, KeyError, ValueError, EOFError) as error:
            raise ValueError("%s: no .npz with an arr_0 (%s); an unfinished one goes on with the command "
                             "that began it"
                             % (path, str(error).splitlines()[0]))
        if len(self.shape) != 4 or self.shape[3] != 3 or self.dtype != np.uint8 or order or not self.shape[0]:
            raise ValueError("%s: arr_0 is %s %s where uint8 [N,H,W,3] is expected" %
                             (path, self.dtype, self.shape))
        self.count = self.shape[0]

    def digest(self):
        """SHA-256 of the content: of the .npz, or of all files and their names"""
        if not self.files:
            return networks.sha256_of(self.path)
        total = hashlib.sha256()
        for f in self.files:
            total.update(("%s\t%s\n" % (os.path.relpath(f, self.path), networks.sha256_of(f))).encode())
        return total.hexdigest()

    def __iter__(self):
        """U8 [H,W,3], one after the other"""
        if self.files:
            for f in self.files:
                try:
                    with Image.open(f) as picture:
                        yield np.asarray(picture.convert("RGB"))
                except Exception as error:      # Pillow raises whatever its decoders do
                    raise ValueError("%s: not a picture that can be opened (%s)" % (f, type(error).__name__))
            return
        with zipfile.ZipFile(self.path) as z, z.open("arr_0.npy") as f:
            header_of(f)
            size = int(np.prod(self.shape[1:]))
            for i in range(self.count):
                try:
                    data = f.read(size)
                except (zipfile.BadZipFile, EOFError, OSError):
                    data = b""
                if len(data) != size:
                    raise ValueError("%s: cut short or damaged at picture %d of %d" %
                                     (self.path, i, self.count))
                yield np.frombuffer(data, np.uint8).reshape(self.shape[1:])

    def batches(self, size):
        batch = []
        for i, picture in enumerate(self):
            if batch and picture.shape != batch[0].shape:
                raise ValueError("%s: picture %d is %d x %d, and those before are %d x %d" % (
                    self.path, i, *picture.shape[1::-1], *batch[0].shape[1::-1]))
            batch.append(picture)
            if len(batch) == size or i + 1 == self.count:
                yield np.stack(batch)
                batch = batch[:0]

def header_of(f):
    """(shape, Fortran order, dtype) of an .npy"""
    version = np.lib.format.read_magic(f)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(f)

# ----------------------------------------------------------------------------------------------- the features

class Features:
    """Features of pictures by frozen networks, computed once: in --cache, a file each, mapped."""
    def __init__(self, args):
        self.args, self.device = args, networks.device_of(args.device)
        self.used = {}          # path -> SHA-256 of everything that the result depends on
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        os.makedirs(args.cache, exist_ok=True)

    def digest(self, path, pictures=None):
        if path not in self.used:
            self.used[path] = pictures.digest() if pictures else networks.sha256_of(path)
        return self.used[path]

    def of(self, path, weights, names, make):
        """Arrays [N,D] of the pictures at `path`, one for each name. make() -> a function from U8 [B,H,W,3]
        to as many arrays [B,D]."""
        pictures = Pictures(path)
        if not os.path.isfile(weights):
            raise ValueError("%s: no such file; it should hold a network's weights" % weights)
        key = "%s-%s" % (self.digest(path, pictures)[:20], self.digest(weights)[:20])
        files = [os.path.join(self.args.cache, "%s-%s.npy" % (key, name)) for name in names]
        if not all(os.path.exists(f) for f in files):
            self.compute(pictures, files, make())
        try:
            out = [np.load(f, mmap_mode="r") for f in files]
        except ValueError as error:
            raise ValueError("%s: damaged features (%s); delete them" % (files[0], error))
        if any(len(x) != pictures.count for x in out):
            raise ValueError("%s: not the features of %d pictures; delete it" % (files[0], pictures.count))
        return out

    def compute(self, pictures, files, network):
        start, at, out, parts = time.time(), 0, None, [f + ".part" for f in files]
        for batch in pictures.batches(self.args.batch):
            made = network(batch)
            if out is None:
                out = [np.lib.format.open_memmap(p, "w+", np.float32, (pictures.count, x.shape[1]))
                       for p, x in zip(parts, made)]
            if not all(np.isfinite(y).all() for y in made):
                raise ValueError("%s: features that are not finite; are these the weights?" % pictures.path)
            for x, y in zip(out, made):
                x[at:at + len(batch)] = y
            at += len(batch)
            left = (pictures.count - at) * (time.time() - start) / at
            sys.stderr.write("%s%s: %d of %d, %d:%02d left%s" % (
                "\r" if sys.stderr.isatty() else "", pictures.path, at, pictures.count, left // 60, left % 60,
                "\n" if at == pictures.count or not sys.stderr.isatty() else "   "))
        for x, part, f in zip(out, parts, files):
            x.flush()
            os.replace(part, f)

    def inception(self, path):
        """Pooled [N,2048] and spatial [N,2023]"""
        def make():
            w = networks.load(self.args.inception, networks.INCEPTION, "the FID Inception", self.device)
            def network(pixels):
                with torch.no_grad():
                    made = networks.guarded(self.args.inception, "the FID Inception", networks.inception, w,
                                            networks.inception_input(pixels, self.device))
                return [x.cpu().numpy() for x in made]
            return network
        return self.of(path, self.args.inception, ("pool", "spatial"), make)

    def dino(self, path):
        """DINOv2's CLS tokens [N,1024]"""
        def make():
            w = networks.load(self.args.dino, networks.DINO, "DINOv2", self.device)
            positions = networks.dino_positions(w, 16, antialias=False)
            def network(pixels):
                x = np.stack([networks.dino_score_input(p) for p in pixels])
                with torch.no_grad():
                    x = networks.normalized(networks.channels_first(x, self.device))
                    return [networks.guarded(self.args.dino, "DINOv2", networks.dino, w, x,
                                             positions)[:, 0].cpu().numpy()]
            return network
        return self.of(path, self.args.dino, ("dino",), make)[0]

# ------------------------------------------------------------------------------------------------ the program

def statistics(path, names, width):
    """The reference's own mean and covariance under these names, or None where it has none"""
    if os.path.isdir(path):
        return None
    with np.load(path, allow_pickle=False) as z:
        if names[0] not in z.files:
            return None
        try:
            mean, covariance = (z[n].astype(np.float64) for n in names)
        except (KeyError, ValueError) as error:
            raise ValueError("%s: it has %s, but not %s as numbers (%s)" % (path, names[0], names[1], error))
    if mean.shape != (width,) or covariance.shape != (width, width):
        raise ValueError("%s: its statistics are %s and %s where features are %d wide" % (
            path, mean.shape, covariance.shape, width))
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError("%s: its %s or %s holds numbers that are not finite" % ((path,) + names))
    return mean, covariance

def has_pictures(path):
    if os.path.isdir(path):
        return True
    try:
        with zipfile.ZipFile(path) as z:
            return "arr_0.npy" in z.namelist()
    except zipfile.BadZipFile:
        raise ValueError("%s: not an .npz" % path)

def evaluate(args):
    features, result = Features(args), {}
    samples = Pictures(args.samples)
    result["pictures"] = samples.count
    if args.inception:
        digest = networks.sha256_of(args.inception) if os.path.isfile(args.inception) else ""
        result["inception_is_published"] = digest.startswith(PUBLISHED)
        has = has_pictures(args.ref)
        for p in [samples, Pictures(args.ref)] if has else []:
            if p.count <= NEIGHBOURS:
                raise ValueError("%s: %d pictures; precision and recall need more than %d" % (
                    p.path, p.count, NEIGHBOURS))
        pool, spatial = features.inception(args.samples)
        features.digest(args.ref, Pictures(args.ref) if has and os.path.isdir(args.ref) else None)
        reference = features.inception(args.ref) if has else [None, None]
        for name, x, y, keys in (("fid", pool, reference[0], ("mu", "sigma")),
                                 ("sfid", spatial, reference[1], ("mu_s", "sigma_s"))):
            there = statistics(args.ref, keys, x.shape[1])
            if there is None and y is None:
                raise ValueError("%s: it has neither %s nor arr_0" % (args.ref, keys[0]))
            result[name] = frechet(*moments(x), *(there or moments(y)))
            result[name + "_reference"] = "its own statistics" if there else "%d pictures" % len(y)
        fc = networks.load(args.inception, networks.INCEPTION, "the FID Inception")["fc.weight"].numpy()
        result["inception_score"] = inception_score(pool, fc)
        if has:
            result["precision"], result["recall"] = precision_recall(reference[0], pool, features.device)
    if args.dino:
        ref = args.dino_ref or args.ref
        if not has_pictures(ref):
            raise ValueError("%s: it has no arr_0, and DINOv2 needs pictures: --dino-ref" % ref)
        for q in (samples, Pictures(ref)):
            if q.count < 2:
                raise ValueError("%s: %d picture; the distances need at least 2" % (q.path, q.count))
        x, y = features.dino(args.samples), features.dino(ref)
        result["fd_dinov2"] = frechet(*moments(x), *moments(y))
        result["kdd"], result["kdd_deviation"] = kernel_distance(y, x)
        result["dino_reference"] = "%d pictures" % len(y)
    result.update(sha256=features.used, torch=torch.__version__, numpy=np.__version__, device=features.device)
    return result

def show(result):
    for key, name in (("fid", "FID"), ("sfid", "sFID"), ("inception_score", "Inception Score"),
                      ("precision", "precision"), ("recall", "recall"), ("fd_dinov2", "FD-DINOv2"),
                      ("kdd", "KDD")):
        if key in result:
            print("%-16s %.6f" % (name, result[key] + 0.0 if abs(result[key]) > 5e-7 else 0))
    if not result.get("inception_is_published", True):
        print("warning: these Inception weights are not the published ones (their SHA-256 does not begin "
              "with %s): no number of Inception's can be compared with anyone's" % PUBLISHED)
    if result["pictures"] != 50000:
        print("warning: %d pictures; published numbers are of 50000, and the distances shrink as pictures "
              "grow" %
              result["pictures"])
    for path, digest in sorted(result["sha256"].items()):
        print("sha256 %s  %s" % (digest, path))

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("samples", help="an .npz with arr_0, or a folder of pictures")
    p.add_argument("--ref", required=True, metavar="FILE", help="ADM's reference batch, .npz; or a folder")
    p.add_argument("--inception", metavar="FILE", help="the FID Inception's weights")
    p.add_argument("--dino", metavar="FILE",
                   help="DINOv2's weights, for FD-DINOv2 and KDD (published: size L)")
    p.add_argument("--dino-ref", metavar="PATH", help="pictures that these two compare with [--ref]")
    p.add_argument("--cache", default="out/features", metavar="DIR",
                   help="where features are kept [%(default)s]")
    p.add_argument("--batch", type=int, default=64, help="pictures at a time [%(default)s]")
    p.add_argument("--device", help="cuda, cuda:1, cpu [a GPU if there is one]")
    p.add_argument("--out", metavar="FILE", help="the result, as JSON")
    args = p.parse_args(argv)
    try:
        for path in (args.samples, args.ref, args.dino_ref):
            if path and not os.path.exists(path):
                raise ValueError("%s: no such file" % path)
        if not (args.inception or args.dino):
            raise ValueError("--inception FILE or --dino FILE is needed")
        if args.dino_ref and not args.dino:
            raise ValueError("--dino-ref is for --dino FILE")
        if args.batch < 1:
            raise ValueError("--batch %d: at least 1" % args.batch)
        if args.out and os.path.isdir(args.out):
            raise ValueError("--out %s: it is a folder" % args.out)
        if args.out:
            open(args.out + ".part", "w").close()   # before hours of work
        result = evaluate(args)
        if args.out:
            with open(args.out + ".part", "w") as f:
                json.dump(result, f, indent=1, sort_keys=True)
            os.replace(args.out + ".part", args.out)
    except (ValueError, zipfile.BadZipFile) as error:
        sys.exit("error: %s" % error)
    except OSError as error:
        sys.exit("error: %s: %s" % (error.filename or args.cache, error.strerror or error))
    show(result)

if __name__ == "__main__":
    main()
