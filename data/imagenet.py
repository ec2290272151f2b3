#!/usr/bin/env python3
"""Makes the data shards of ImageNet: latents, labels, DINOv2's features (data/README.md has the format).

  python3 data/imagenet.py --source ILSVRC/train --vae e2e-invae-400k.pt --dino dinov2_vitb14_pretrain.pth \\
      --out shards/                             from class folders of pictures; needs Pillow and PyTorch
  python3 data/imagenet.py --source dataset/ --dino dinov2_vitb14_pretrain.pth --out shards/
                                                from the reference's images/, vae-in/ and dataset.json
  python3 data/imagenet.py ... --check          every shard's SHA-256 against index.json
  python3 data/imagenet.py ... --self-check     statistics of the latents; a few samples are encoded again

The same command goes on where it was stopped, whatever stopped it, and the shards come out the same. Samples
lie in the order of their sorted names. What it refuses to become: an augmenting loader; a picture is cut
once.
"""
import argparse, collections, concurrent.futures, contextlib, ctypes, fcntl, hashlib, itertools, json
import multiprocessing, os
from concurrent.futures.process import BrokenProcessPool
import re, signal, struct, sys, time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(os.path.dirname(HERE), "dev"))
try:
    import numpy as np
    import torch
    from PIL import Image
    import networks
except ImportError as error:
    sys.exit("error: %s; on Debian: apt-get install python3-torch python3-pil, then /usr/bin/python3 %s" %
             (error, sys.argv[0]))

FORMAT = "srdit-imagenet-1"
SCALE = 0.3099              # published beside the INVAE: latents times this have deviation about 1
WIDTHS = {"dinov2-s": 384, "dinov2-b": 768}
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
BYTES = {"F32": 4, "I32": 4, "BF16": 2, "I8": 1}

# ------------------------------------------------------------------------------------------ what there is

# A sample: its picture, its latents (None: to be encoded) and its label, paths relative to the source
Sample = collections.namedtuple("Sample", "picture latents label")

def files_under(folder, endings):
    """Paths of the files below a folder, relative to it, sorted as the reference sorts them."""
    found = []
    for root, _, names in os.walk(folder, followlinks=True):
        found += [os.path.relpath(os.path.join(root, n), folder).replace(os.sep, "/") for n in names
                  if n.lower().endswith(endings)]
    return sorted(found)

def class_folders(source, classes):
    """Samples of a folder of class folders: labels count the folders in the order of their names, as
    ImageNet's synsets are counted."""
    folders = sorted(e.name for e in os.scandir(source) if e.is_dir())
    if len(folders) != classes:
        raise ValueError("%s: %d class folders where %d are expected; --classes says how many there are (a "
                         "folder that holds images/ and vae-in/ is read as the reference's layout)"
                         % (source, len(folders), classes))
    pictures = files_under(source, PICTURES)
    loose = next((p for p in pictures if "/" not in p), None)
    if loose:
        raise ValueError("%s: a picture outside of the class folders" % os.path.join(source, loose))
    label = {name: k for k, name in enumerate(folders)}
    samples = [Sample(p, None, label[p.split("/")[0]]) for p in pictures]
    for k in set(range(classes)) - {s.label for s in samples}:
        raise ValueError("%s: a class folder without a picture" % os.path.join(source, folders[k]))
    return samples

def read_labels(path, names):
    """{name: label} of a dataset.json, which must speak of exactly these names, once each."""
    try:
        with open(path, "rb") as f:
            pairs = json.load(f)["labels"]
        labels = dict(pairs)
        if not pairs or any(type(k) is not str or type(y) is not int or y < 0 for k, y in pairs):
            raise TypeError
    except FileNotFoundError:
        raise ValueError("%s: not there; it holds the labels" % path)
    except (KeyError, TypeError, ValueError):
        raise ValueError('%s: not a label file: {"labels": [[name, whole number], ...]} is expected' % path)
    if len(labels) != len(pairs):
        raise ValueError("%s: it names a file twice" % path)
    known = set(names)
    for missing, text in ((next((n for n in names if n not in labels), None), "has no label for"),
                          (next((n for n in labels if n not in known), None),
                           "labels a file that is not there,")):
        if missing is not None:
            raise ValueError("%s: it %s %s" % (path, text, missing))
    return labels

def number_of(name):
    """The number that a file of the reference's layout has: img00000012.png, img-latents-00000012.npy"""
    at = re.search(r"(?:^|/)img(?:-latents-)?(\d+)\.\w+$", name)
    return int(at.group(1)) if at else None

def reference_layout(source, classes):
    """Samples of images/ and vae-in/. Pairs belong together by place and by number, and labels agree where
    both folders have them."""
    pictures = files_under(os.path.join(source, "images"), PICTURES)
    latents = files_under(os.path.join(source, "vae-in"), (".npy",))
    if len(pictures) != len(latents):
        raise ValueError("%s: %d pictures in images/ and %d latents in vae-in/" %
                         (source, len(pictures), len(latents)))
    for p, x in zip(pictures, latents):
        if number_of(p) is None or number_of(p) != number_of(x):
            raise ValueError("%s: images/%s stands beside vae-in/%s, which is not of the same number" %
                             (source, p, x))
    labels = read_labels(os.path.join(source, "vae-in", "dataset.json"), latents)
    theirs = os.path.join(source, "images", "dataset.json")
    theirs = read_labels(theirs, pictures) if os.path.exists(theirs) else {}
    samples = []
    for p, x in zip(pictures, latents):
        if labels[x] >= classes or theirs.get(p, labels[x]) != labels[x]:
            raise ValueError("%s: the label of %s is %d, but %s" % (
                os.path.join(source, "vae-in", "dataset.json"), x, labels[x],
                "there are %d classes (--classes)" %
                classes if labels[x] >= classes else "that of images/%s is %d" % (p, theirs[p])))
        samples.append(Sample("images/" + p, "vae-in/" + x, labels[x]))
    return samples

def find_samples(source, classes):
    if not os.path.isdir(source):
        raise ValueError("%s: no such folder" % source)
    both = [os.path.isdir(os.path.join(source, name)) for name in ("images", "vae-in")]
    samples = (reference_layout if all(both) else class_folders)(source, classes)
    if not samples:
        raise ValueError("%s: no picture in it" % source)
    return samples

# ---------------------------------------------------------------------------------------- the readers

def begin_reader(parent):
    """A reader process does not outlive the program, however that ends, and leaves Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)          # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)

def read_picture(path, size, cut):
    """U8 [size,size,3]. Grey and CMYK pictures, of which ImageNet has some, become RGB as the reference's
    do."""
    try:
        with Image.open(path) as picture:
            picture.load()
            if cut:
                return networks.center_crop(picture, size)
            pixels = np.asarray(picture.convert("RGB"))
    except Exception as error:          # Pillow raises whatever its decoders do
        raise ValueError("%s: not a picture that can be opened (%s); put a whole one in its place, and the "
                         "same command goes on" %
                         (path, str(error).splitlines()[0] if str(error) else type(error).__name__))
    if pixels.shape != (size, size, 3):
        raise ValueError("%s: %d x %d pixels where --size says %d x %d" % (
            path, pixels.shape[1], pixels.shape[0], size, size))
    return pixels

def read_latents(path, shape):
    try:
        x = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError("%s: latents that cannot be read (%s)" % (path, str(error).splitlines()[0]))
    if x.shape not in (shape, (1,) + shape) or x.dtype != np.float32 or not np.isfinite(x).all():
        raise ValueError("%s: %s %s where finite float32 [1,%s] is expected" % (
            path, x.dtype, list(x.shape), ",".join(map(str, shape))))
    return x.reshape(shape)

def posterior_noise(seed, index, shape):
    """The normals that draw sample `index`'s latents: numpy promises RandomState's streams never to
    change."""
    return np.random.RandomState([seed, index]).standard_normal(shape).astype(np.float32)

def read_batch(source, samples, first, shape, size, seed):
    """(pixels U8 [B,S,S,3], x F32 [B,C,s,s]): x are the latents, or where they are to be encoded their
    noise."""
    pixels = np.stack([read_picture(os.path.join(source, s.picture), size, s.latents is None)
                       for s in samples])
    x = np.stack([posterior_noise(seed, first + i, shape) if s.latents is None else
                  read_latents(os.path.join(source, s.latents), shape) for i, s in enumerate(samples)])
    return pixels, x

def batches(pool, ahead, source, samples, ranges, *more):
    """Batches in order, `ahead` of them being read meanwhile, so that memory stays bounded."""
    waiting, ranges = collections.deque(), iter(ranges)
    try:
        while True:
            for begin, end in itertools.islice(ranges, ahead - len(waiting)):
                waiting.append((begin, end, pool.submit(read_batch, source, samples[begin:end],
                                                        begin, *more)))
            if not waiting:
                return
            begin, end, future = waiting.popleft()
            yield (begin, end) + future.result()
    finally:
        for _, _, future in waiting:
            future.cancel()

# ------------------------------------------------------------------------------------------ the networks

class Encoder:
    """The frozen networks, from their files, on the device that there is."""
    def __init__(self, args, encode):
        self.device = networks.device_of(args.device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = False
        self.vae = self.dino = None
        self.vae_path, self.dino_path, self.side = args.vae, args.dino, args.size // 16 // args.patch
        if encode:
            if not args.vae:
                raise ValueError("--vae FILE is needed: the INVAE's weights, which encode the pictures")
            self.vae = networks.load(args.vae, networks.INVAE, "the INVAE", self.device)
        if args.dino:
            self.dino = networks.load(args.dino, networks.DINO, "DINOv2", self.device)
            if "register_tokens" in self.dino:
                raise ValueError("%s: a DINOv2 with registers; the features are those of the one without" %
                                 args.dino)
            if self.width != WIDTHS[args.encoder]:
                raise ValueError("%s: %d wide, but %s is %d wide" % (args.dino, self.width, args.encoder,
                                                                     WIDTHS[args.encoder]))
            self.positions = networks.dino_positions(self.dino, self.side)

    @property
    def channels(self):
        return self.vae["quant_conv.weight"].shape[0] // 2 if self.vae else 32

    @property
    def width(self):
        return self.dino["cls_token"].shape[-1] if self.dino else 0

    @torch.no_grad()
    def __call__(self, pixels, x):
        """U8 [B,S,S,3] and noise or latents -> latents F32 [B,C,s,s], tokens F32 [B,T,Z] or None, on the
        device"""
        latents, tokens = torch.from_numpy(x).to(self.device), None
        if self.vae:
            mean, logvar = networks.guarded(self.vae_path, "the INVAE", networks.invae, self.vae,
                                            networks.channels_first(pixels, self.device) / 127.5 - 1)
            if mean.shape != latents.shape:
                raise ValueError("%s: it makes latents %s where %s are expected" % (
                    self.vae_path, list(mean.shape[1:]), list(latents.shape[1:])))
            latents = mean + torch.exp(logvar / 2) * latents
        if self.dino:
            tokens = networks.guarded(self.dino_path, "DINOv2", networks.dino, self.dino,
                                      networks.dino_input(pixels, self.side, self.device), self.positions)
        return latents, tokens

def directions(tokens):
    """[..., Z] -> int8 of the same direction: the largest magnitude of each token becomes 127"""
    top = tokens.abs().amax(-1, keepdim=True)
    return torch.round(tokens * (127 / torch.where(top == 0, torch.ones_like(top), top))).to(torch.int8)

def stored(latents, tokens, labels, feats):
    """What a shard stores of a batch: {tensor: bytes}"""
    out = {"labels": np.array(labels, "<i4").tobytes(),
           "latents": latents.to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes()}
    if tokens is not None:
        out["cls"] = tokens[:, 0].cpu().numpy().astype("<f4").tobytes()
        if feats:
            out["feats"] = directions(tokens).cpu().numpy().tobytes()
    return out

# ---------------------------------------------------------------------------------------------- the shards

@contextlib.contextmanager
def naming(path):
    """What the system refuses inside is said of this file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno), path)

def write_whole(path, text):
    """A small file, all of it under its name or nothing."""
    with naming(path):
        with open(path + ".part", "w") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + ".part", path)
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)

class Shards:
    """A folder of shards and its index.json. A shard grows as NAME.part; NAME.part.done says how many of its
    samples are on the disk; index.json knows its hash before it gets its name."""

    def __init__(self, folder, settings, samples):
        self.folder, self.settings, self.total = folder, settings, samples
        self.per = max(1, settings["shard_bytes"] // sum(width for _, _, _, width in self.tensors()))
        self.count = -(-samples // self.per)
        self.path = os.path.join(folder, "index.json")
        self.index = {"format": FORMAT, "settings": settings, "samples": samples, "shards": []}
        if not os.path.exists(self.path):
            return
        try:
            with open(self.path) as f:
                there = json.load(f)
            if there["format"] != FORMAT or not isinstance(there["shards"], list):
                raise ValueError
            for key in sorted(set(settings) | set(there["settings"])):
                a, b = there["settings"].get(key), settings.get(key)
                if a != b:
                    raise SettingsDiffer("%s: the shards there were made with %s = %s, and now it is %s; the "
                                         "same settings go on with them, another --out begins anew" %
                                         (self.path, key, a, b))
            for entry in there["shards"]:
                k = entry["first"] // self.per
                if entry["file"] != self.name(k) or (entry["first"], entry["samples"]) != self.range(k)[::2]:
                    raise ValueError
        except SettingsDiffer:
            raise
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError("%s: not an index of shards that this program wrote" % self.path)
        self.index = there

    def name(self, k):
        return "imagenet-%05d-of-%05d.safetensors" % (k, self.count)

    def range(self, k):
        """First sample, the one after the last, their number"""
        first = k * self.per
        end = min(first + self.per, self.total)
        return first, end, end - first

    def tensors(self):
        """(name, type, shape of a sample, bytes of a sample), widest type first"""
        s = self.settings
        side, tokens = s["size"] // 16, (s["size"] // 16 // s["patch"]) ** 2 + 1
        tensors = [("cls", "F32", [s["width"]])] if s["width"] else []
        tensors += [("labels", "I32", []), ("latents", "BF16", [s["channels"], side, side])]
        tensors += [("feats", "I8", [tokens, s["width"]])] if s["feats"] else []
        return [t + (BYTES[t[1]] * int(np.prod(t[2], dtype=int)),) for t in tensors]

    def layout(self, k):
        """The header's bytes, {tensor: (where it begins, bytes of a sample)}, the file's size"""
        n = self.range(k)[2]
        header, at, places = {"__metadata__": self.metadata(k)}, 0, {}
        for name, kind, shape, width in self.tensors():
            header[name] = {"dtype": kind, "shape": [n] + shape, "data_offsets": [at, at + n * width]}
            places[name] = at, width
            at += n * width
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        begin = 8 + len(text)
        return (struct.pack("<Q", len(text)) + text, {m: (begin + a, w) for m, (a, w) in places.items()},
                begin + at)

    def metadata(self, k):
        s = self.settings
        return {"format": "srdit-data-1", "name": s["name"], "classes": "%d" % s["classes"],
                "decoder": "invae",
                "latent_scale": repr(SCALE), "latent_offset": "0", "shard": "%d of %d" % (k, self.count),
                "samples": s["samples_sha256"][:16],
                "provenance": "ImageNet (ILSVRC 2012), cut to %d x %d, by data/imagenet.py; latents by the "
                              "INVAE, sha256 %s; feats and cls by %s, sha256 %s." % (s["size"], s["size"],
                              (s["vae"] or "that of the given latents")[:16], s["encoder"],
                              (s["dino"] or "none")[:16]),
                "license": "ImageNet's terms of access: non-commercial research and education"}

    def verify(self, whole):
        """Each finished shard is what it was: its size and its header, and where `whole` every byte."""
        for entry in self.index["shards"]:
            k, path = entry["first"] // self.per, os.path.join(self.folder, entry["file"])
            if not os.path.exists(path) and os.path.exists(path + ".part"):
                if networks.sha256_of(path + ".part") == entry["sha256"]:   # stopped before it got its name
                    os.replace(path + ".part", path)
                    self.forget(path)
            header, _, size = self.layout(k)
            try:
                with open(path, "rb") as f:
                    begin, there = f.read(len(header)), os.fstat(f.fileno()).st_size
            except FileNotFoundError:
                raise ValueError("%s: listed in index.json, but not there; put it back, or --redo makes it "
                                 "again" % path)
            if there != size or size != entry["bytes"]:
                raise ValueError("%s: %d bytes where index.json says %d: cut short or replaced; put it back, "
                                 "or --redo makes it again" % (path, there, entry["bytes"]))
            if begin != header or whole and networks.sha256_of(path) != entry["sha256"]:
                raise ValueError("%s: not the shard that index.json lists there: swapped with another or "
                                 "damaged; put it back, or --redo makes it again" % path)

    def entry(self, k):
        return next(e for e in self.index["shards"] if e["file"] == self.name(k))

    def forget(self, path):
        if os.path.exists(path + ".part.done"):
            os.remove(path + ".part.done")

    def begin(self, k):
        """Opens the shard's part. Returns how many of its samples are there."""
        self.k, path = k, os.path.join(self.folder, self.name(k))
        header, self.places, size = self.layout(k)
        self.part, self.done = path + ".part", 0
        try:
            with open(self.part + ".done") as f:
                self.done = int(f.read())
            with open(self.part, "rb") as f:
                fits = f.read(len(header)) == header and os.fstat(f.fileno()).st_size == size
            if not fits or not 0 <= self.done <= self.range(k)[2]:
                self.done = 0
        except (FileNotFoundError, ValueError):
            self.done = 0
        if not self.done:
            self.forget(path)
        with naming(self.part):
            self.fd = os.open(self.part, os.O_RDWR | os.O_CREAT, 0o644)
            os.ftruncate(self.fd, size)
            os.posix_fallocate(self.fd, 0, size)        # a full disk is told now, not in an hour
        self.put(header, 0)
        return self.done

    def put(self, data, at):
        view = memoryview(data)
        with naming(self.part):
            while view:
                n = os.pwrite(self.fd, view, at)
                view, at = view[n:], at + n

    def write(self, first, tensors, keep):
        """A batch's bytes, samples from `first` of the shard on; keep: note on the disk that they are
        there"""
        for name, data in tensors.items():
            at, width = self.places[name]
            self.put(data, at + first * width)
        self.done = first + len(tensors["labels"]) // 4
        if keep:
            with naming(self.part):
                os.fdatasync(self.fd)
            write_whole(self.part + ".done", "%d" % self.done)

    def finish(self):
        with naming(self.part):
            os.fsync(self.fd)
            os.close(self.fd)
        write_whole(self.part + ".done", "%d" % self.done)
        path, (first, _, n) = self.part[:-len(".part")], self.range(self.k)
        entry = {"file": self.name(self.k), "first": first, "samples": n, "bytes": os.path.getsize(self.part),
                 "sha256": networks.sha256_of(self.part)}
        self.index["shards"] = [e for e in self.index["shards"] if e["file"] != entry["file"]] + [entry]
        self.index["shards"].sort(key=lambda e: e["first"])
        write_whole(self.path, json.dumps(self.index, indent=1) + "\n")
        os.replace(self.part, path)
        self.forget(path)

class SettingsDiffer(ValueError):
    pass

# ---------------------------------------------------------------------------------------------- the program

def clock(seconds):
    return "%d:%02d:%02d" % (seconds // 3600, seconds // 60 % 60, seconds % 60)

class Progress:
    """One line on stderr: on a terminal rewritten each second, elsewhere a line a minute."""
    def __init__(self, total, done):
        self.total, self.at, self.begun, self.start, self.shown = total, done, done, time.time(), 0
        self.bar = sys.stderr.isatty()

    def to(self, done, text):
        now = time.time()
        if now - self.shown < (1 if self.bar else 60) and done < self.total:
            return
        self.shown, rate = now, (done - self.begun) / max(now - self.start, 1e-9)
        left = clock((self.total - done) / rate) if rate else "?"
        ticks = "#" * (30 * done // self.total)
        sys.stderr.write("%s[%-30s] %d of %d | %.1f img/s | left %s | %s%s" % (
            "\r" if self.bar else "", ticks, done, self.total, rate, left, text,
            "\n" if not self.bar or done == self.total else "   "))
        sys.stderr.flush()

def settings_of(args, samples, encoder):
    listing = hashlib.sha256()
    for s in samples:
        listing.update(("%s\t%s\t%d\n" % s).encode())
    return {"name": "imagenet-%d" % args.size, "size": args.size, "patch": args.patch,
            "classes": args.classes,
            "channels": encoder.channels, "width": encoder.width,
            "feats": bool(encoder.dino) and not args.no_feats,
            "encoder": args.encoder if args.dino else "nothing",
            "vae": networks.sha256_of(args.vae) if encoder.vae else None,
            "dino": networks.sha256_of(args.dino) if args.dino else None, "seed": args.seed,
            "batch": args.batch,
            "arithmetic": "tf32" if encoder.device.startswith("cuda") else "float",
            "samples_sha256": listing.hexdigest(), "shard_bytes": int(args.shard_gb * 1e9)}

def build(args, samples, encoder, shards, pool):
    finished = {e["file"] for e in shards.index["shards"]}
    todo = [k for k in range(shards.count) if shards.name(k) not in finished]
    shape = (encoder.channels, args.size // 16, args.size // 16)
    progress = None
    for k in todo:
        first, end, _ = shards.range(k)
        at = shards.begin(k)
        if not progress:
            progress = Progress(len(samples), sum(e["samples"] for e in shards.index["shards"]) + at)
        kept = time.time()
        ranges = [(b, min(b + args.batch, end)) for b in range(first + at, end, args.batch)]
        for b, e, pixels, x in batches(pool, 2 * args.workers, args.source, samples, ranges, shape, args.size,
                                       args.seed):
            latents, tokens = encoder(pixels, x)
            keep = time.time() - kept > args.keep_every
            shards.write(b - first, stored(latents, tokens, [s.label for s in samples[b:e]],
                                           shards.settings["feats"]), keep)
            kept = time.time() if keep else kept
            progress.at += e - b
            progress.to(progress.at, shards.name(k))
        shards.finish()
        print("{file}: {samples} samples, {bytes} bytes, sha256 {sha256}".format(**shards.entry(k)),
              flush=True)
    print("%s: %d shards, %d samples, %.1f GB" % (shards.path, shards.count, shards.total,
                                                  sum(e["bytes"] for e in shards.index["shards"]) / 1e9))

def tensor_of(shards, k, name):
    """A tensor of a finished shard, mapped: bfloat16 as its bits"""
    at, width = shards.layout(k)[1][name]
    kind = {"cls": "<f4", "labels": "<i4", "latents": "<u2", "feats": "i1"}[name]
    n = shards.range(k)[2]
    return np.memmap(os.path.join(shards.folder, shards.name(k)), kind, "r", at,
                     (n, width // np.dtype(kind).itemsize))

def floats(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)

def self_check(args, samples, encoder, shards):
    """Mean and deviation of each latent channel over at most 4096 samples a shard, and some samples encoded
    again: what bfloat16 and int8 lost, and whether these weights made these shards."""
    if not shards.index["shards"]:
        raise ValueError("%s: no shard is finished yet" % shards.path)
    C, side = shards.settings["channels"], args.size // 16
    n, total, square = 0, np.zeros(C), np.zeros(C)
    whole = [e["first"] // shards.per for e in shards.index["shards"]]
    for k in whole:
        bits = tensor_of(shards, k, "latents")[:: max(1, shards.range(k)[2] // 4096)]
        for i in range(0, len(bits), 256):
            x = floats(bits[i:i + 256]).astype(np.float64).reshape(-1, C, side * side)
            n, total = n + x.shape[0] * x.shape[2], total + x.sum((0, 2))
            square += (x * x).sum((0, 2))
    mean, dev = total / n, np.sqrt(np.maximum(square / n - (total / n) ** 2, 0))
    print("channel      mean    deviation   deviation x %g (1 is aimed at)" % SCALE)
    for c in range(C):
        print("%7d  %8.4f  %11.4f  %12.4f" % (c, mean[c], dev[c], dev[c] * SCALE))
    rms = float(np.sqrt(np.mean(square / n)))
    print("all: root mean square %.4f, so a scale of %.4f would bring it to 1; published: %g" % (
        rms, 1 / rms if rms else float("inf"), SCALE))
    first, few = shards.range(whole[0])[0], min(args.batch, shards.range(whole[0])[2])
    pixels, x = read_batch(args.source, samples[first:first + few], first, (C, side, side), args.size,
                           args.seed)
    latents, tokens = encoder(pixels, x)
    again = latents.cpu().numpy().reshape(few, -1)
    there = floats(tensor_of(shards, whole[0], "latents")[:few])
    far = float(np.abs(again - there).max() / np.abs(again).max())
    print("%d samples encoded again: latents differ by %.1e of the largest (rounding to bfloat16 is "
          "3.9e-03)" % (few, far))
    if not far <= 2.0 ** -7:
        raise ValueError("%s: its latents are not those that these weights make of these pictures" %
                         shards.name(whole[0]))
    if not shards.settings["feats"]:
        return
    made = tensor_of(shards, whole[0], "feats")[:few].reshape(tokens.shape).astype(np.float64)
    want = tokens.cpu().numpy().astype(np.float64)
    lengths = np.linalg.norm(made, axis=-1) * np.linalg.norm(want, axis=-1)
    cosine = (made * want).sum(-1) / np.maximum(lengths, 1e-30)
    print("features: 1 - cosine between int8 and float %.1e on average, %.1e at worst" % (
        1 - cosine.mean(), 1 - cosine.min()))
    if not cosine.min() >= 0.99:
        raise ValueError("%s: its features are not those that these weights make of these pictures" %
                         shards.name(whole[0]))

def cost(samples, shards, args, encoder):
    size = sum(shards.layout(k)[2] for k in range(shards.count))
    print("%d samples in %d shards, %.3f GB; latents %d x %d x %d, %s" % (
        len(samples), shards.count, size / 1e9, encoder.channels, args.size // 16, args.size // 16,
        "features %d x %d and CLS" % (encoder.side ** 2 + 1, encoder.width) if shards.settings["feats"] else
        "CLS of %d" % encoder.width if encoder.width else "nothing else"), flush=True)
    return size

def parse_arguments(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--source", required=True, metavar="DIR", help="class folders, or images/ and vae-in/")
    p.add_argument("--out", required=True, metavar="DIR", help="where shards and index.json go")
    p.add_argument("--vae", metavar="FILE", help="the INVAE's weights (not needed where there are latents)")
    p.add_argument("--vae-sha256", metavar="HEX", help="refuse other weights than these")
    p.add_argument("--dino", metavar="FILE", help="DINOv2's weights, .pth or timm's .safetensors")
    p.add_argument("--encoder", choices=sorted(WIDTHS), help="which one they are [dinov2-b]")
    p.add_argument("--no-feats", action="store_true", help="leave out the patch features (CLS stays)")
    p.add_argument("--no-cls", action="store_true", help="no DINOv2 at all: train with --no-align --no-cls")
    p.add_argument("--size", type=int, default=256, help="side of the pictures: 256 or 512 [%(default)s]")
    p.add_argument("--patch", type=int, default=1,
                   help="the model's patch size: one feature a patch [%(default)s]")
    p.add_argument("--classes", type=int, default=1000, help="[%(default)s]")
    p.add_argument("--shard-gb", type=float, default=5, help="GB a shard, about [%(default)s]")
    p.add_argument("--batch", type=int, default=64, help="pictures at a time [%(default)s]")
    p.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1),
                   help="reader processes [%(default)s]")
    p.add_argument("--keep-every", type=float, default=20, metavar="S",
                   help="seconds between two notes of how far "
                   "a shard is [%(default)s]")
    p.add_argument("--seed", type=int, default=0, help="of the posterior's samples [%(default)s]")
    p.add_argument("--device", help="cuda, cuda:1, cpu [a GPU if there is one]")
    p.add_argument("--check", action="store_true", help="read every shard and compare its SHA-256")
    p.add_argument("--self-check", action="store_true", help="statistics, and some samples encoded again")
    p.add_argument("--redo", metavar="FILE", help="forget this finished shard, and make it again")
    args = p.parse_args(argv)
    for name, good in (("size", args.size > 0 and args.size % (16 * max(args.patch, 1)) == 0),
                       ("patch", args.patch > 0),
                       ("classes", args.classes > 0), ("batch", args.batch > 0),
                       ("workers", args.workers > 0),
                       ("seed", 0 <= args.seed < 2 ** 32), ("shard-gb", args.shard_gb > 0)):
        if not good:
            raise ValueError("--%s: %s is not usable%s" % (
                name, getattr(args, name.replace("-", "_")),
                " (a multiple of 16 times the patch)" * (name == "size")))
    if bool(args.dino) == args.no_cls:
        raise ValueError("--dino FILE is needed, DINOv2's weights" if not args.dino else
                         "--no-cls leaves DINOv2 out, so --dino makes no sense")
    for flag, given in (("--encoder", args.encoder), ("--no-feats", args.no_feats)):
        if args.no_cls and given:
            raise ValueError("--no-cls leaves DINOv2 out, so %s makes no sense" % flag)
    args.encoder = args.encoder or "dinov2-b"
    if args.check and args.self_check:
        raise ValueError("--check and --self-check exclude each other")
    if (args.check or args.redo) and not os.path.isdir(args.out):
        raise ValueError("--out %s: there is no such folder of shards" % args.out)
    if os.path.exists(args.out) and not os.path.isdir(args.out):
        raise ValueError("--out %s: it is a file, and a folder is wanted" % args.out)
    for path in (args.vae, args.dino):
        if path and not os.path.isfile(path):
            raise ValueError("%s: no such file" % path)
    if args.vae_sha256 and not re.fullmatch("[0-9a-fA-F]{64}", args.vae_sha256):
        raise ValueError("--vae-sha256 %s: a SHA-256 has 64 hexadecimal digits" % args.vae_sha256)
    return args

def sitting(args, samples, pool):
    """What one start of the program does, once the folder is there"""
    lock = os.open(args.out, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError("%s: another data/imagenet.py is at work there" % args.out)
    encoder = Encoder(args, samples[0].latents is None)
    settings = settings_of(args, samples, encoder)
    if args.vae_sha256 and args.vae_sha256.lower() != settings["vae"]:
        raise ValueError("%s: its sha256 is %s, not the one of --vae-sha256" % (args.vae, settings["vae"]))
    shards = Shards(args.out, settings, len(samples))
    if args.redo:
        name = os.path.basename(args.redo)
        if name not in [e["file"] for e in shards.index["shards"]]:
            raise ValueError("%s: index.json lists no such shard" % args.redo)
        shards.index["shards"] = [e for e in shards.index["shards"] if e["file"] != name]
        write_whole(shards.path, json.dumps(shards.index, indent=1) + "\n")
    shards.verify(args.check)
    cost(samples, shards, args, encoder)
    if args.check:
        print("%d of %d shards are finished, and each has the SHA-256 that index.json says" % (
            len(shards.index["shards"]), shards.count))
    elif args.self_check:
        self_check(args, samples, encoder, shards)
    else:
        build(args, samples, encoder, shards, pool)

def work(argv):
    args = parse_arguments(argv)
    samples = find_samples(args.source, args.classes)
    # The readers are forked before CUDA begins, and before the lock is taken, which they would hold on to
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(args.workers, context, begin_reader, (os.getpid(),)) as pool:
        list(pool.map(abs, range(args.workers)))
        begun = os.path.isdir(args.out)
        with naming(args.out):
            os.makedirs(args.out, exist_ok=True)
        try:
            sitting(args, samples, pool)
        except ValueError:
            with contextlib.suppress(OSError):          # a refusal leaves no empty folder
                if not begun:
                    os.rmdir(args.out)
            raise

def main(argv=None):
    try:
        work(argv)
    except (ValueError, BrokenProcessPool) as error:
        sys.exit("error: %s" % error)
    except OSError as error:
        sys.exit("error: %s: %s; what is finished is kept, and the same command goes on" % (
            error.filename or "a shard cannot be written", error.strerror))
    except KeyboardInterrupt:
        sys.exit("error: stopped; what is finished is kept, and the same command goes on")

if __name__ == "__main__":
    main()
