#!/usr/bin/env python3
"""Tests of the ImageNet road, from generated pictures to a score: data/imagenet.py, the trainer on the CPU
and by emulation, ./sample with the decoder, dev/evaluate.py. The networks are small ones of the published
layout with random weights, so every line runs but no number means anything.

  /usr/bin/python3 dev/test_imagenet.py         needs ./train_srdit, ./sample, torch, Pillow, scipy, sklearn
  /usr/bin/python3 dev/test_imagenet.py --emulated ./train_srdit_emu        the GPU trainer too, on the CPU

Nothing outside a temporary folder is touched. The exit status tells.
"""
import argparse, errno, io, json, math, os, re, resource, shutil, signal, struct, subprocess, sys, tempfile
import time
import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [os.path.join(ROOT, "dev"), os.path.join(ROOT, "data")]
import torch
from PIL import Image
import convert, digits, evaluate, imagenet, networks, reference

torch.set_num_threads(1)        # so that a fork of this process may compute
SIZE, CLASSES, COUNT = 64, 3, 12
failed, passed = [], 0

def check(what, good, detail=""):
    global passed
    if good:
        passed += 1
    else:
        failed.append(what)
        print("FAIL %s %s" % (what, str(detail)[-800:]), flush=True)

def close(what, got, want, tolerance):
    far = float(np.max(np.abs(np.asarray(got) - np.asarray(want))) / max(1e-300, np.max(np.abs(want))))
    check("%s: off by %.1e of %.0e" % (what, far, tolerance), far <= tolerance)

# ------------------------------------------------------------------------------------ networks of any size

def random_weights(shapes, seed):
    """{name: float tensor}: convolutions and linear maps keep the size of what goes through"""
    torch.manual_seed(seed)
    w = {}
    for name, shape in shapes.items():
        if name.endswith(("running_var", "gamma")):
            w[name] = torch.rand(shape) + 0.5
        elif len(shape) > 1 and not name.endswith(("token", "embed")):
            w[name] = torch.randn(shape) * math.prod(shape[1:]) ** -0.5
        else:
            w[name] = torch.randn(shape) * 0.1 + (1.0 if "norm" in name and name.endswith("weight") or
                                                  name.endswith("bn.weight") else 0)
    return w

def affine(shapes, name, *shape):
    shapes[name + ".weight"], shapes[name + ".bias"] = shape, (shape[0],)

def invae_shapes(ch, z, mult=(1, 1, 2, 2, 4), blocks=2):
    """The encoder's half of the published file"""
    s = {}
    def res(name, a, b):
        for k, (c, d) in enumerate(((a, b), (b, b)), 1):
            affine(s, "%s.norm%d" % (name, k), c)
            affine(s, "%s.conv%d" % (name, k), d, c, 3, 3)
        if a != b:
            affine(s, name + ".nin_shortcut", b, a, 1, 1)
    def attn(name, c):
        affine(s, name + ".norm", c)
        for part in ("q", "k", "v", "proj_out"):
            affine(s, "%s.%s" % (name, part), c, c, 1, 1)
    affine(s, "encoder.conv_in", ch, 3, 3, 3)
    width = ch
    for i, m in enumerate(mult):
        for j in range(blocks):
            res("encoder.down.%d.block.%d" % (i, j), width, ch * m)
            width = ch * m
            if i == len(mult) - 1:
                attn("encoder.down.%d.attn.%d" % (i, j), width)
        if i < len(mult) - 1:
            affine(s, "encoder.down.%d.downsample.conv" % i, width, width, 3, 3)
    res("encoder.mid.block_1", width, width)
    attn("encoder.mid.attn_1", width)
    res("encoder.mid.block_2", width, width)
    affine(s, "encoder.norm_out", width)
    affine(s, "encoder.conv_out", 2 * z, width, 3, 3)
    affine(s, "quant_conv", 2 * z, 2 * z, 1, 1)
    return s

def dino_shapes(D, depth, grid=37):
    s = {"cls_token": (1, 1, D), "pos_embed": (1, 1 + grid * grid, D), "mask_token": (1, D)}
    affine(s, "patch_embed.proj", D, 3, 14, 14)
    for i in range(depth):
        name = "blocks.%d" % i
        for part, shape in (("norm1", (D,)), ("attn.qkv", (3 * D, D)), ("attn.proj", (D, D)), ("norm2", (D,)),
                            ("mlp.fc1", (4 * D, D)), ("mlp.fc2", (D, 4 * D))):
            affine(s, "%s.%s" % (name, part), *shape)
        s[name + ".ls1.gamma"] = s[name + ".ls2.gamma"] = (D,)
    affine(s, "norm", D)
    return s

def inception_shapes(part=1):
    """Every width divided by `part`"""
    s = {}
    def conv(name, a, b, kernel=1):
        kernel = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        s[name + ".conv.weight"] = (b // part, 3 if a == 3 else a // part) + kernel
        for k in ("weight", "bias", "running_mean", "running_var"):
            s["%s.bn.%s" % (name, k)] = (b // part,)
    def block(name, a, *branches):      # (branch, its input or "" for the block's, output, kernel)
        width = {"": a}
        for branch, source, b, kernel in branches:
            conv("%s.%s" % (name, branch), width[source], b, kernel)
            width[branch] = b
    for name, a, b, k in (("1a_3x3", 3, 32, 3), ("2a_3x3", 32, 32, 3), ("2b_3x3", 32, 64, 3),
                          ("3b_1x1", 64, 80, 1),
                          ("4a_3x3", 80, 192, 3)):
        conv("Conv2d_" + name, a, b, k)
    for name, a, pool in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):
        block("Mixed_" + name, a, ("branch1x1", "", 64, 1), ("branch5x5_1", "", 48, 1),
              ("branch5x5_2", "branch5x5_1", 64, 5), ("branch3x3dbl_1", "", 64, 1),
              ("branch3x3dbl_2", "branch3x3dbl_1", 96, 3), ("branch3x3dbl_3", "branch3x3dbl_2", 96, 3),
              ("branch_pool", "", pool, 1))
    block("Mixed_6a", 288, ("branch3x3", "", 384, 3), ("branch3x3dbl_1", "", 64, 1),
          ("branch3x3dbl_2", "branch3x3dbl_1", 96, 3), ("branch3x3dbl_3", "branch3x3dbl_2", 96, 3))
    for name, c in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
        wide, tall = (1, 7), (7, 1)
        block("Mixed_" + name, 768, ("branch1x1", "", 192, 1), ("branch7x7_1", "", c, 1),
              ("branch7x7_2", "branch7x7_1", c, wide), ("branch7x7_3", "branch7x7_2", 192, tall),
              ("branch7x7dbl_1", "", c, 1), ("branch7x7dbl_2", "branch7x7dbl_1", c, tall),
              ("branch7x7dbl_3", "branch7x7dbl_2", c, wide), ("branch7x7dbl_4", "branch7x7dbl_3", c, tall),
              ("branch7x7dbl_5", "branch7x7dbl_4", 192, wide), ("branch_pool", "", 192, 1))
    block("Mixed_7a", 768, ("branch3x3_1", "", 192, 1), ("branch3x3_2", "branch3x3_1", 320, 3),
          ("branch7x7x3_1", "", 192, 1), ("branch7x7x3_2", "branch7x7x3_1", 192, (1, 7)),
          ("branch7x7x3_3", "branch7x7x3_2", 192, (7, 1)), ("branch7x7x3_4", "branch7x7x3_3", 192, 3))
    for name, a in (("7b", 1280), ("7c", 2048)):
        block("Mixed_" + name, a, ("branch1x1", "", 320, 1), ("branch3x3_1", "", 384, 1),
              ("branch3x3_2a", "branch3x3_1", 384, (1, 3)), ("branch3x3_2b", "branch3x3_1", 384, (3, 1)),
              ("branch3x3dbl_1", "", 448, 1), ("branch3x3dbl_2", "branch3x3dbl_1", 384, 3),
              ("branch3x3dbl_3a", "branch3x3dbl_2", 384, (1, 3)),
              ("branch3x3dbl_3b", "branch3x3dbl_2", 384, (3, 1)),
              ("branch_pool", "", 192, 1))
    affine(s, "fc", 1008, 2048 // part)
    return s

# ------------------------------------------------------------------------------------------- running things

class Ran:
    def __init__(self, status, out, err):
        self.status, self.out, self.err = status, out, err
    def __str__(self):
        return "%s %s %s" % (self.status, self.out[-300:], self.err[-500:])

def forked(main, words, before=None, limits=()):
    """main(words) in a fork of this process: its status, negative for a signal, and what it said"""
    out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            for which, value in limits:
                resource.setrlimit(which, (value, value))
            if before:
                before()
            main([str(w) for w in words])
            status = 0
        except SystemExit as stop:
            if isinstance(stop.code, str):
                sys.stderr.write(stop.code + "\n")
            status = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            import traceback
            traceback.print_exc()
        try:
            sys.stdout.flush(), sys.stderr.flush()
        finally:
            os._exit(status)
    status = os.waitpid(pid, 0)[1]
    texts = []
    for f in (out, err):
        f.seek(0)
        texts.append(f.read().decode())
        f.close()
    return Ran(-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status), *texts)

def told(what, r, pattern):
    """Refused with one sentence that matches"""
    lines = [x for x in r.err.splitlines() if " img/s " not in x and not x.endswith(" left")]
    check(what, r.status == 1 and len(lines) == 1 and lines[0].startswith("error: ") and
          re.search(pattern, lines[0]), r)

def program(*words):
    r = subprocess.run([str(w) for w in words], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                       universal_newlines=True)
    check("runs: %s" % " ".join(map(str, words)), r.returncode == 0, r.stderr[-500:])
    return r.stdout

def tree(folder):
    found = {}
    for root, _, names in os.walk(folder):
        for n in names:
            with open(os.path.join(root, n), "rb") as f:
                found[os.path.relpath(os.path.join(root, n), folder)] = f.read()
    return found

# -------------------------------------------------------------------------------------------- the pictures

def make_pictures(folder):
    """A dozen pictures of three classes, of many shapes: one grey, one CMYK, one with transparency, one
    palette"""
    rng, where = np.random.RandomState(7), []
    shapes = [(64, 64), (70, 130), (200, 150), (129, 128), (64, 300), (333, 250), (90, 90), (128, 128),
              (65, 64),
              (100, 140), (140, 100), (257, 259)]
    for i, (h, w) in enumerate(shapes):
        y, x = np.mgrid[0:h, 0:w] / 20
        waves = np.stack([np.sin(x * rng.rand() * 3 + y * rng.rand() * 3 + rng.rand() * 6)
                          for _ in range(3)], 2)
        picture = Image.fromarray(np.uint8(128 + 80 * waves + 20 * rng.rand(h, w, 3)))
        ending = ".JPEG" if i % 2 else ".png"
        picture = picture.convert({1: "CMYK", 2: "L", 4: "RGBA", 6: "P"}.get(i, "RGB"))
        path = os.path.join(folder, "n0%d" % (1440764 + i // 4), "picture_%d%s" % (i, ending))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        picture.save(path)
        where.append(path)
    return where

def make_reference_layout(folder, source, w):
    """What the reference's preprocessing writes of them: cut PNGs, float32 latents, dataset.json twice"""
    samples = imagenet.find_samples(source, CLASSES)
    lists = {"images": [], "vae-in": []}
    for i, s in enumerate(samples):
        pixels = imagenet.read_picture(os.path.join(source, s.picture), SIZE, True)
        with torch.no_grad():
            mean, logvar = networks.invae(w, networks.channels_first(pixels[None], "cpu") / 127.5 - 1)
        noise = imagenet.posterior_noise(0, i, mean.shape[1:])
        latents = (mean + torch.exp(logvar / 2) * torch.from_numpy(noise)).numpy()
        for part, name in (("images", "%05d/img%08d.png"), ("vae-in", "%05d/img-latents-%08d.npy")):
            name = name % (i // 1000, i)
            path = os.path.join(folder, part, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            Image.fromarray(pixels).save(path) if part == "images" else np.save(path, latents)
            lists[part].append([name, s.label])
    for part, labels in lists.items():
        with open(os.path.join(folder, part, "dataset.json"), "w") as f:
            json.dump({"labels": labels}, f)

# ------------------------------------------------------------------------------------------------ the tests

def metrics():
    """Against scipy, scikit-learn and closed forms"""
    import scipy.linalg
    from sklearn.metrics.pairwise import polynomial_kernel
    from sklearn.neighbors import NearestNeighbors
    rng = np.random.RandomState(0)
    x, y = rng.randn(700, 40) @ rng.randn(40, 40), 0.5 + rng.randn(900, 40) @ rng.randn(40, 40)
    mean, cov = evaluate.moments(x, 256)
    close("mean", mean, x.mean(0), 1e-12)
    close("covariance", cov, np.cov(x, rowvar=False), 1e-12)
    mean2, cov2 = evaluate.moments(y)
    root = scipy.linalg.sqrtm(cov @ cov2).real
    want = ((mean - mean2) ** 2).sum() + np.trace(cov + cov2 - 2 * root)
    close("Frechet against scipy's sqrtm", evaluate.frechet(mean, cov, mean2, cov2), want, 1e-8)
    a, b = np.diag([4.0, 9.0, 0.0]), np.diag([1.0, 16.0, 25.0])         # tr = (2-1)^2 + (3-4)^2 + 5^2
    q = np.linalg.qr(rng.randn(3, 3))[0]
    close("Frechet of two Gaussians in closed form, one of them flat",
          evaluate.frechet(np.zeros(3), q @ a @ q.T, np.ones(3), q @ b @ q.T), 3 + 1 + 1 + 25, 1e-8)
    check("Frechet of a set to itself", abs(evaluate.frechet(mean, cov, mean, cov)) <= 1e-8 * np.trace(cov))

    n = 300
    got = evaluate.kernel_distance(x[:n], y[:n])[0]
    rngk, found = np.random.RandomState(evaluate.SUBSET_SEED), []
    for _ in range(evaluate.SUBSETS):
        u, v = (z[:n][np.sort(rngk.choice(n, n, replace=False))] for z in (x, y))
        k = [polynomial_kernel(*pair, degree=3, coef0=1) for pair in ((u, u), (v, v), (u, v))]
        off = [(m.sum() - np.trace(m)) / (n * (n - 1)) for m in k[:2]]
        found.append(sum(off) - 2 * k[2].mean())
    close("KDD against scikit-learn's kernel", got, np.mean(found), 1e-8)
    u = np.array([[0.0, 0.0], [2.0, 0.0]])        # by hand: same (1 + ... ) - 2 cross
    check("KDD by hand", abs(evaluate.kernel_distance(u, u)[0] - (1 + 1 - 2 * (1 + 1 + 1 + 27) / 4)) <= 1e-12)

    def inside(a, b):
        r = NearestNeighbors(n_neighbors=4, algorithm="brute").fit(b).kneighbors(b)[0][:, 3]
        d = np.sqrt(((a[:, None] - b[None]) ** 2).sum(2))
        return (d <= r[None]).any(1).mean()
    x3, y3 = x[:, :3], y[:, :3]
    check("precision and recall against scikit-learn's neighbours",
          evaluate.precision_recall(x3, y3, block=128) == (inside(y3, x3), inside(x3, y3)) and
          0 < inside(x3, y3) < 1, (evaluate.precision_recall(x3, y3), inside(y3, x3), inside(x3, y3)))

    weight = rng.randn(50, 40)
    p = np.exp(x @ weight.T - (x @ weight.T).max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    import scipy.stats
    want = np.mean([np.exp(np.mean([scipy.stats.entropy(row, p[i:i + 500].mean(0)) for row in p[i:i + 500]]))
                    for i in (0, 500)])
    close("Inception Score against scipy's entropy", evaluate.inception_score(x, weight, 500, 64), want, 1e-8)
    many, few = rng.randn(10000, 4), rng.randn(7, 4)
    halves = [evaluate.inception_score(many[i:i + 5000], few, 10000) for i in (0, 5000)]
    got = evaluate.inception_score(many, few)
    check("splits are of 5000", abs(got - np.mean(halves)) <= 1e-12 < abs(halves[0] - halves[1]), got)
    got = evaluate.inception_score(1e4 * np.eye(7), np.eye(7))
    check("of a class each: their number", abs(got - 7) <= 1e-9, got)

    class Rows:                                 # two batches; one number of the first is not finite
        path, count = "rows", 4
        def batches(self, n):
            return iter([np.zeros((2, 3), np.float32), np.ones((2, 3), np.float32)])
    def network(batch):
        return [np.where(batch == 0, np.float32(np.inf), batch)]
    with tempfile.TemporaryDirectory() as folder:
        features = evaluate.Features.__new__(evaluate.Features)
        features.args = argparse.Namespace(batch=2)
        try:
            features.compute(Rows(), [os.path.join(folder, "x.npy")], network)
            said = "nothing"
        except ValueError as error:
            said = str(error)
        check("features of every row have to be finite", "rows: features that are not finite" in said and
              not os.path.exists(os.path.join(folder, "x.npy")), said)

def preprocessing():
    """Golden pictures: Pillow's and TensorFlow's resampling against their definitions, written out here"""
    rng = np.random.RandomState(3)
    def bicubic(size, out, a):          # [out,size]: antialiased, as wide as the scale; Pillow's a is -0.5
        m, scale = np.zeros((out, size)), max(size / out, 1)
        for i in range(out):
            at = (i + 0.5) * size / out
            for j in range(max(0, int(at - 2 * scale + 0.5)), min(size, int(at + 2 * scale + 0.5))):
                t = abs((j + 0.5 - at) / scale)
                m[i, j] = (a + 2) * t ** 3 - (a + 3) * t ** 2 + 1 if t < 1 else \
                    a * (t ** 3 - 5 * t ** 2 + 8 * t - 4) if t < 2 else 0
        return m / m.sum(1, keepdims=True)
    def plain(size, out, a):            # not antialiased, borders repeated; torch's a is -0.75
        m = np.zeros((out, size))
        for i in range(out):
            at = (i + 0.5) * size / out - 0.5
            for j in range(math.floor(at) - 1, math.floor(at) + 3):
                t = abs(j - at)
                m[i, min(max(j, 0), size - 1)] += (a + 2) * t ** 3 - (a + 3) * t ** 2 + 1 if t <= 1 else \
                    a * (t ** 3 - 5 * t ** 2 + 8 * t - 4)
        return m
    picture = rng.randint(0, 256, (90, 120, 3)).astype(np.uint8)
    def pillow(columns, rows, pixels):  # Pillow resizes rows of pixels first, and stores bytes between
        pixels = np.floor(np.einsum("lk,jkc->jlc", columns, pixels / 1.0).clip(0, 255) + 0.5)
        return np.floor(np.einsum("ij,jlc->ilc", rows, pixels).clip(0, 255) + 0.5)
    want = pillow(bicubic(120, 85, -0.5), bicubic(90, 64, -0.5), picture)
    got = networks.center_crop(Image.fromarray(picture), 64)
    check("the crop: Pillow's antialiased bicubic, the middle of it",
          got.shape == (64, 64, 3) and np.abs(got - want[:, 10:74]).max() <= 1,
          np.abs(got - want[:, 10:74]).max())
    big = rng.randint(0, 256, (256, 256, 3)).astype(np.uint8)
    half = lambda n: np.repeat(np.eye(n // 2), 2, 1) / 2
    box = lambda p: pillow(half(len(p)), half(len(p)), p)
    check("the crop: halved by boxes while twice too large",
          np.array_equal(networks.center_crop(Image.fromarray(big), 64), box(box(big))))
    x = networks.dino_input(big[None], 4, "cpu").numpy()[0]
    normal = ((big / 255 - networks.MEAN) / networks.DEV).transpose(2, 0, 1)
    m = plain(256, 56, -0.75)
    off = np.abs(x - m @ normal @ m.T).max()    # float places the pixels to 1e-5 of one
    check("features' input: normalised, then bicubic without antialiasing", off <= 1e-4, off)
    m = bicubic(256, 224, -0.5)
    got = networks.dino_score_input(big)
    check("scores' input: antialiased on bytes",
          np.abs(got - pillow(m, m, big)).max() <= 1 and got.dtype == np.uint8)
    got, scale = networks.inception_input(big[None], "cpu").numpy()[0], 256 / 299
    for i, j in ((0, 0), (1, 7), (150, 298), (298, 298), (77, 200)):
        y, x = i * scale, j * scale
        r, c = int(y), int(x)
        r1, c1, fy, fx = min(r + 1, 255), min(c + 1, 255), y - r, x - c
        want = (big[r, c] * (1 - fy) * (1 - fx) + big[r1, c] * fy * (1 - fx) + big[r, c1] * (1 - fy) * fx +
                big[r1, c1] * fy * fx - 128) / 128
        check("Inception's input at %d, %d: TensorFlow 1's bilinear" % (i, j),
              np.abs(got[:, i, j] - want).max() <= 1e-4)
    pixels = reference.to_pixels(torch.tensor([0.9999, -2.0, 0.5]).view(1, 3, 1, 1))
    check("pictures by truncation", pixels.flatten().tolist() == [254, 0, 191])

def shards_of(folder):
    names = sorted(n for n in os.listdir(folder) if n.endswith(".safetensors"))
    return [os.path.join(folder, n) for n in names]

def chain(at, options):
    """Both layouts -> shards -> training -> sampling -> scores"""
    make_pictures(at("train"))
    vae = random_weights(invae_shapes(32, 32), 1)
    decoder = torch.nn.Module()
    torch.manual_seed(2)
    decoder.post_quant_conv = torch.nn.Conv2d(32, 32, 1)
    decoder.decoder = reference.Decoder(32, (1, 1, 2, 2, 4), 2, 32, 3, 32, 1e-6, (4,))
    torch.save({**vae, **decoder.state_dict()}, at("vae.pt"))
    torch.save(random_weights(dino_shapes(384, 2), 3), at("dino.pth"))
    torch.save(random_weights(inception_shapes(16), 4), at("inception.pth"),
               _use_new_zipfile_serialization=False)
    make_reference_layout(at("dataset"), at("train"), vae)
    one = 384 * 4 + 4 + 32 * 4 * 4 * 2 + 17 * 384
    common = ["--classes", CLASSES, "--size", SIZE, "--dino", at("dino.pth"), "--encoder", "dinov2-s",
              "--batch", 4,
              "--workers", 2, "--keep-every", 0, "--shard-gb", (6 * one + 100) / 1e9]
    ours = ["--source", at("train"), "--vae", at("vae.pt")] + common
    theirs = ["--source", at("dataset")] + common

    r = forked(imagenet.main, ours + ["--out", at("ours")])
    check("shards of class folders", r.status == 0 and "2 shards, 12 samples" in r.out, r)
    r = forked(imagenet.main, theirs + ["--out", at("theirs")])
    check("shards of the reference's layout", r.status == 0 and len(shards_of(at("theirs"))) == 2, r)
    whole = tree(at("ours"))
    sets = [[digits_of(p) for p in shards_of(at(f))] for f in ("ours", "theirs")]
    for (t1, m1), (t2, m2) in zip(*sets):
        check("both layouts give the same labels and features", all(np.array_equal(t1[n], t2[n]) for n in
              ("labels", "feats", "cls")) and m1["decoder"] == "invae" and m1["latent_scale"] == "0.3099")
        # one picture at a time there, four at a time here: the sums round differently
        a, b = (imagenet.floats(t["latents"]) for t in (t1, t2))
        check("and the same latents", np.abs(a - b).max() <= 2.0 ** -7 * np.abs(a).max(), np.abs(a - b).max())
    t = {n: np.concatenate([s[0][n] for s in sets[0]]) for n in sets[0][0][0]}
    check("labels in the order of the class folders", t["labels"].tolist() == sorted(t["labels"].tolist()) and
          t["labels"].tolist().count(1) == 4)
    # features, written out again without the program's own path
    w = networks.load(at("dino.pth"), networks.DINO, "DINOv2")
    samples = imagenet.find_samples(at("train"), CLASSES)
    pixels = np.stack([networks.center_crop(Image.open(os.path.join(at("train"), s.picture)), SIZE)
                       for s in samples])
    with torch.no_grad():
        tokens = networks.dino(w, networks.dino_input(pixels, 4, "cpu"),
                               networks.dino_positions(w, 4)).numpy()
    close("CLS in float", t["cls"], tokens[:, 0], 1e-5)
    off = np.abs(t["feats"].astype(int) - digits.to_int8(tokens.astype(np.float64)).astype(int)).max()
    check("features as digits.py's int8", off <= 1 and np.abs(t["feats"]).max(-1).min() == 127, off)
    mean = networks.invae(vae, networks.channels_first(pixels, "cpu") / 127.5 - 1)
    x = imagenet.floats(t["latents"]).reshape(COUNT, 32, 4, 4)
    z = (x - mean[0].detach().numpy()) / np.exp(mean[1].detach().numpy() / 2)
    check("latents are one sample of the posterior", abs(z.mean()) <= 0.05 and abs(z.std() - 1) <= 0.05,
          (z.mean(), z.std()))

    r = forked(imagenet.main, ours + ["--out", at("ours"), "--check"])
    check("--check", r.status == 0 and "2 of 2 shards are finished" in r.out, r)
    r = forked(imagenet.main, ours + ["--out", at("ours"), "--self-check"])
    lost = re.search(r"int8 and float (\S+) on average", r.out)
    check("--self-check", r.status == 0 and "0.3099" in r.out and lost and float(lost.group(1)) <= 1e-3, r)
    r = forked(imagenet.main, ours + ["--out", at("ours")])
    check("made again: nothing is touched", r.status == 0 and tree(at("ours")) == whole, r)

    for flags, names in ((["--no-feats"], ["cls", "labels", "latents"]),
                         (["--no-cls"], ["labels", "latents"])):
        words = list(ours)
        if flags == ["--no-cls"]:
            for flag in ("--dino", "--encoder"):
                del words[words.index(flag):words.index(flag) + 2]
        r = forked(imagenet.main, words + flags + ["--out", at("less"), "--shard-gb", 1])
        less = digits_of(shards_of(at("less"))[0])[0] if r.status == 0 else {}
        check("%s leaves out what it says" % flags[0], sorted(less) == names and
              np.array_equal(less["latents"], t["latents"]), r)
        program(options.train, "--data", *shards_of(at("less")), "--no-align", *flags[:flags == ["--no-cls"]],
                "--steps", 1, "--batch", 4, "--depth", 3, "--num-f", 1, "--num-h", 1, "--hidden-size", 32,
                "--num-heads", 2, "--sample-steps", 1, "--out", at("less/run"))
        shutil.rmtree(at("less"))
    data = shards_of(at("ours"))
    tiny = ["--steps", 3, "--batch", 4, "--depth", 3, "--num-f", 1, "--num-h", 1, "--hidden-size", 32,
            "--num-heads", 2,
            "--projector-dim", 16, "--sample-steps", 2, "--log-every", 1]
    said = program(options.train, "--data", *data, *tiny, "--out", at("run"))
    check("the trainer takes both shards", "12 samples in 2 files" in said and "3/3" in said, said)
    if options.emulated:
        emulated = program(options.emulated, "--data", *data, *tiny, "--out", at("emulated"))
        losses = [[float(v) for v in re.findall(r"^ *\d/3 +(\S+)", s, re.M)] for s in (said, emulated)]
        check("and so does the GPU's, emulated, with the same losses",
              len(losses[0]) == 3 == len(losses[1]) and
              np.abs(np.subtract(*losses)).max() <= 1e-3, losses)
    r = forked(convert.main, ["decoder", at("vae.pt"), at("decoder.safetensors")])
    check("convert.py takes the decoder from the same file", r.status == 0, r)
    r = forked(convert.main, ["decoder", at("vae.pt"), at("new/folder/decoder.safetensors")])
    check("and makes the folder for it", r.status == 0 and
          os.path.isfile(at("new/folder/decoder.safetensors")), r)
    program(options.sample, at("run/checkpoint.safetensors"), "--decoder", at("decoder.safetensors"),
            "--num", 9,
            "--steps", 2, "--npz", at("samples.npz"))
    with np.load(at("samples.npz")) as f:
        check("pictures", f["arr_0"].shape == (9, SIZE, SIZE, 3) and f["arr_0"].dtype == np.uint8)
        pictures = f["arr_0"]
    evaluation(at, pixels, pictures)
    return ours, theirs, whole

def digits_of(path):
    """({tensor: array}, metadata) of a shard, BF16 as its bits"""
    with open(path, "rb") as f:
        data = f.read()
    n = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + n])
    meta = header.pop("__metadata__")
    kinds = {"F32": "<f4", "I32": "<i4", "BF16": "<u2", "I8": "i1"}
    return {k: np.frombuffer(data[8 + n:][slice(*h["data_offsets"])], kinds[h["dtype"]]).reshape(h["shape"])
            for k, h in header.items()}, meta

def evaluation(at, real, made):
    """dev/evaluate.py from end to end: .npz and folder, both forms of reference, the cache, what is wrong"""
    np.savez(at("ref.npz"), arr_0=real)
    os.makedirs(at("png"))
    for i, p in enumerate(made):
        Image.fromarray(p).save(at("png/%06d.png" % i))
    dino = random_weights(dino_shapes(128, 1), 5)
    torch.save(dino, at("dino_l.pth"))
    words = ["--ref", at("ref.npz"), "--inception", at("inception.pth"), "--dino", at("dino_l.pth"),
             "--cache",
             at("cache"), "--batch", 5]
    r = forked(evaluate.main, [at("samples.npz")] + words + ["--out", at("result.json")])
    check("scores", r.status == 0 and "not the published ones" in r.out, r)
    with open(at("result.json")) as f:
        result = json.load(f)
    # the same by another road: whole arrays, singular values
    w = networks.load(at("inception.pth"), networks.INCEPTION, "Inception")
    with torch.no_grad():
        f1, f2 = ([y.numpy().astype(float) for y in networks.inception(w, networks.inception_input(x, "cpu"))]
                  for x in (made, real))
    for i, name in enumerate(("fid", "sfid")):
        a, b = f1[i], f2[i]
        c1, c2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
        # of N pictures the rest of the spectrum is noise: nuclear norm of the centred features' product
        u, v = ((z - z.mean(0)) / math.sqrt(len(z) - 1) for z in (a, b))
        want = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c1) + np.trace(c2) - \
            2 * np.linalg.svd(u @ v.T, compute_uv=False).sum()
        close(name.upper(), result[name], want, 1e-4)
    check("the result says which files it is of", result["sha256"][at("inception.pth")] ==
          networks.sha256_of(at("inception.pth")) and len(result["sha256"]) == 4 and result["pictures"] == 9)
    for name in ("inception_score", "precision", "recall", "fd_dinov2", "kdd"):
        check("%s is there and finite" % name, math.isfinite(result[name]))
    cached = tree(at("cache"))
    again = forked(evaluate.main, [at("samples.npz")] + words)
    check("a second call uses the features and says the same", again.status == 0 and again.out == r.out and
          tree(at("cache")) == cached and "left" not in again.err, again)
    r2 = forked(evaluate.main, [at("png")] + words)
    numbers = lambda text: re.findall(r"^(\S.*?) +(-?\d+\.\d+)$", text, re.M)
    check("a folder of the same pictures scores the same", r2.status == 0 and
          numbers(r.out) == numbers(r2.out) and
          len(numbers(r.out)) == 7, r2)
    stats = [evaluate.moments(x) for x in f2]
    np.savez(at("stats.npz"), mu=stats[0][0], sigma=stats[0][1], mu_s=stats[1][0], sigma_s=stats[1][1])
    r3 = forked(evaluate.main, [at("samples.npz"), "--ref", at("stats.npz"), "--inception",
                                at("inception.pth"),
                                "--cache", at("cache")])
    both = dict(numbers(r3.out)), dict(numbers(r.out))
    check("a reference of statistics alone", r3.status == 0 and "precision" not in both[0] and
          all(abs(float(both[0][n]) - float(both[1][n])) <= 1e-4 * float(both[1][n])
              for n in ("FID", "sFID")), r3)
    with open(at("short.npz"), "wb") as f, open(at("samples.npz"), "rb") as g:
        f.write(g.read()[:30000])
    np.savez(at("odd.npz"), arr_0=np.zeros((2, 8, 8, 3)))
    np.savez(at("few.npz"), arr_0=made[:3])
    os.makedirs(at("broken"))
    for name in "abcd":
        with open(at("broken/%s.png" % name), "wb") as f:
            f.write(b"no picture")
    for name, pattern in (("short.npz", "short.npz: no .npz with an arr_0"), ("odd.npz", r"float64 .* uint8"),
                          ("few.npz", "few.npz: 3 pictures; .* more than 3"),
                          ("broken", "a.png: not a picture"),
                          ("nothing.npz", "no such file"), ("train", "picture 1 is .* and those before")):
        told("evaluate %s" % name, forked(evaluate.main, [at(name)] + words), pattern)
    told("evaluate with another network's weights",
         forked(evaluate.main, [at("samples.npz"), "--ref", at("ref.npz"),
         "--inception", at("dino.pth"), "--cache", at("cache")]), "dino.pth: it has no tensor Conv2d_1a_3x3")
    torch.save({n: x for n, x in random_weights(inception_shapes(16), 4).items() if "Mixed_6c" not in n},
               at("holes.pth"))
    told("evaluate with a hole in the weights",
         forked(evaluate.main, [at("samples.npz"), "--ref", at("ref.npz"),
         "--inception", at("holes.pth"), "--cache", at("cache")]), "holes.pth: it has no tensor 'Mixed_6c")
    r = forked(evaluate.main, [at("samples.npz"), "--ref", at("ref.npz"), "--inception", at("inception.pth"),
                               "--cache", at("cache2")], limits=[(resource.RLIMIT_FSIZE, 1000)])
    told("evaluate on a full disk", r, "File too large")

def bad_input(at, ours, theirs, whole):
    """One sentence that names the file, and what is made is kept and used"""
    def source(name, change, words, pattern):
        shutil.copytree(at(name), at("bad"), symlinks=True)
        change(at("bad"))
        words = [at("bad") if w == at(name) else w for w in words]
        told("%s: %s" % (name, pattern), forked(imagenet.main, words + ["--out", at("bad_out")]), pattern)
        shutil.rmtree(at("bad")), shutil.rmtree(at("bad_out"), ignore_errors=True)
    def put(name, data):
        def change(folder):
            with open(os.path.join(folder, name), "wb") as f:
                f.write(data)
        return change
    png = "images/00000/img%08d.png"
    npy = "vae-in/00000/img-latents-%08d.npy"
    array = lambda name, x: lambda folder: np.save(os.path.join(folder, name), x)
    good = os.path.join(at("train"), "n01440764/picture_0.png")
    with open(good, "rb") as f:
        data = f.read()
    source("train", put("n01440764/picture_0.png", data[:len(data) // 2]), ours,
           "picture_0.png: not a picture")
    source("train", put("n01440765/empty.jpg", b""), ours, "empty.jpg: not a picture")
    source("train", put("loose.png", data), ours, "loose.png: a picture outside")
    source("train", lambda f: os.makedirs(os.path.join(f, "n9")), ours, "4 class folders where 3")
    source("dataset", lambda f: os.remove(os.path.join(f, png % 3)), theirs,
           "11 pictures in images/ and 12 latents")
    def renamed(folder):
        os.rename(os.path.join(folder, png % 3), os.path.join(folder, png % 99))
    source("dataset", renamed, theirs, "img00000004.png stands beside .*00000003.npy")
    source("dataset", array(npy % 2, np.zeros((1, 32, 8, 8), "f4")), theirs,
           "00000002.npy: float32 .1, 32, 8, 8. where")
    source("dataset", array(npy % 2, np.full((1, 32, 4, 4), np.nan, "f4")), theirs, "00000002.npy: .* finite")
    source("dataset", put(npy % 1, b"\x93NUMPY"), theirs, "00000001.npy: latents that cannot be read")
    small = io.BytesIO()
    Image.new("RGB", (32, 32)).save(small, "PNG")
    source("dataset", put(png % 1, small.getvalue()), theirs, "img00000001.png: 32 x 32 pixels where")
    for text, pattern in (("{", "not a label file"), ('{"labels": null}', "not a label file"),
                          ('{"labels": [["a", "x"]]}', "not a label file"),
                          ('{"labels": [["00000/img-latents-00000000.npy", 0]]}', "has no label for")):
        source("dataset", put("vae-in/dataset.json", text.encode()), theirs, "dataset.json: .*" + pattern)
    def labels(change):
        def act(folder):
            path = os.path.join(folder, "vae-in/dataset.json")
            with open(path) as f:
                pairs = json.load(f)["labels"]
            change(pairs)
            with open(path, "w") as f:
                json.dump({"labels": pairs}, f)
        return act
    source("dataset", labels(lambda p: p[2].__setitem__(1, 3)), theirs,
           "label of .*00000002.npy is 3, but there are 3")
    source("dataset", labels(lambda p: p[2].__setitem__(1, 2)), theirs,
           "00000002.npy is 2, but that of images")
    source("dataset", labels(lambda p: p.append(["x.npy", 1])), theirs,
           "labels a file that is not there, x.npy")
    source("dataset", labels(lambda p: p.append(p[0])), theirs, "names a file twice")
    source("dataset", lambda f: os.remove(os.path.join(f, "vae-in/dataset.json")), theirs,
           "dataset.json: not there")

    def with_words(what, pattern, *words, drop=()):
        base = list(ours)
        for flag in drop:
            i = base.index(flag)
            del base[i:i + 2]
        told(what, forked(imagenet.main, base + ["--out", at("bad_out")] + list(words)), pattern)
    for words, pattern in (([os.path.join(ROOT, "data/imagenet.py"), "--source", at("x"), "--out", at("y"),
                             "--no-cls"], "x: no such folder"),         # as programs of their own
                           ([os.path.join(ROOT, "dev/evaluate.py"), at("x"), "--ref", at("y")],
                            "no such file")):
        r = subprocess.run([sys.executable] + words, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           universal_newlines=True)
        told("%s alone" % words[0], Ran(r.returncode, r.stdout, r.stderr), pattern)
    with_words("no VAE", "--vae FILE is needed", drop=["--vae"])
    with_words("no DINO", "--dino FILE is needed", drop=["--dino"])
    with_words("another network as VAE", "dino.pth: it has no tensor encoder", "--vae", at("dino.pth"))
    with_words("another width", "384 wide, but dinov2-b is 768", "--encoder", "dinov2-b")
    with_words("an encoder without DINOv2", "so --encoder makes no sense", "--no-cls", drop=["--dino"])
    with_words("no features without DINOv2", "so --no-feats makes no sense", "--no-cls", "--no-feats",
               drop=["--dino", "--encoder"])
    check("a refusal leaves no empty folder", not os.path.exists(at("bad_out")))
    with_words("another hash", "vae.pt: its sha256 is", "--vae-sha256", "0" * 64)
    with_words("an odd size", "--size: 60 is not usable", "--size", 60)
    with_words("no source", "no such folder", "--source", at("nowhere"))

    # settings and networks that differ from those of the shards that are there
    def finished():
        shutil.rmtree(at("copy"), ignore_errors=True)
        shutil.copytree(at("ours"), at("copy"))
        return sorted(n for n in whole if n.endswith(".safetensors"))
    first, second = finished()
    again = ours + ["--out", at("copy")]
    other = random_weights(invae_shapes(32, 32), 11)
    torch.save(other, at("other.pt"))
    words = [at("other.pt") if w == at("vae.pt") else w for w in again]
    told("another VAE between sittings", forked(imagenet.main, words), "index.json: .* vae = ")
    told("another seed", forked(imagenet.main, again + ["--seed", 1]),
         "index.json: .* seed = 0, and now it is 1")
    os.rename(at("train/n01440764/picture_0.png"), at("train/n01440764/a.png"))
    told("another list of pictures", forked(imagenet.main, again), "index.json: .* samples_sha256")
    os.rename(at("train/n01440764/a.png"), at("train/n01440764/picture_0.png"))
    check("nothing was touched", tree(at("copy")) == whole)

    # shards that are not what index.json says
    with open(at("copy/" + second), "r+b") as f:
        f.truncate(len(whole[second]) - 1)
    told("a shard cut short", forked(imagenet.main, again), second + ": .* cut short or replaced")
    finished()
    os.rename(at("copy/" + first), at("copy/x"))
    shutil.copy(at("copy/" + second), at("copy/" + first))
    told("a shard in another's place", forked(imagenet.main, again), first + ": .*swapped")
    finished()
    with open(at("copy/" + second), "r+b") as f:
        f.seek(len(whole[second]) - 100)
        f.write(b"\x55" * 3)
    told("a damaged byte, by --check", forked(imagenet.main, again + ["--check"]), second + ": .*damaged")
    r = forked(imagenet.main, again + ["--redo", second])
    check("--redo makes it again, the same", r.status == 0 and tree(at("copy")) == whole, r)
    os.remove(at("copy/" + first))
    told("a shard that is gone", forked(imagenet.main, again),
         first + ": listed in index.json, but not there")
    r = forked(imagenet.main, again + ["--redo", first])
    check("and made again by --redo", r.status == 0 and tree(at("copy")) == whole, r)
    with open(at("copy/index.json"), "w") as f:
        f.write("[]")
    told("an odd index", forked(imagenet.main, again), "index.json: not an index")

def interrupted(at, ours, whole):
    """Killed at every call that changes the disk, and refused by it: the same shards in the end"""
    names = ("open", "ftruncate", "posix_fallocate", "pwrite", "fdatasync", "fsync", "replace", "remove")
    def at_call(n, act):
        """Before the n-th of these calls of the program, act"""
        def before():
            left, parent = [n], os.getpid()
            def wrapped(call):
                def run(*a, **k):
                    if os.getpid() == parent:           # not in a reader
                        left[0] -= 1
                        if left[0] == 0:
                            act()
                    return call(*a, **k)
                return run
            for name in names:
                setattr(os, name, wrapped(getattr(os, name)))
        return before
    def kill():
        os.kill(os.getpid(), signal.SIGKILL)
    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    words, n, same, kept = ours + ["--out", at("killed")], 1, 0, 0
    while True:
        shutil.rmtree(at("killed"), ignore_errors=True)
        r = forked(imagenet.main, words, at_call(n, kill))
        if r.status == 0:
            break
        check("killed at call %d" % n, r.status == -signal.SIGKILL, r)
        there = {k for k in tree(at("killed")) if k.endswith(".safetensors")}
        times = {k: os.stat(at("killed/" + k)).st_mtime_ns for k in there}
        r = forked(imagenet.main, words)
        good = r.status == 0 and tree(at("killed")) == whole
        kept += all(os.stat(at("killed/" + k)).st_mtime_ns == t for k, t in times.items())
        same += good
        if not good:
            check("after a kill at call %d: the same shards" % n, False, (r, sorted(tree(at("killed")))))
        n += 1 + (n > 8) + 3 * (n > 30)
        if len(failed) > 5:
            return
    print("killed at %d places among %d calls, and gone on with" % (same, n), flush=True)
    check("finished shards are kept whenever it is killed", kept == same > 15, (kept, same))
    for n in (3, 4, 7, 12, 18, 25):
        shutil.rmtree(at("killed"), ignore_errors=True)
        r = forked(imagenet.main, words, at_call(n, full))
        told("a full disk at call %d" % n, r, "No space left .*; what is finished is kept")
        r = forked(imagenet.main, words)
        check("and the same command goes on", r.status == 0 and tree(at("killed")) == whole, r)
    shutil.rmtree(at("killed"), ignore_errors=True)
    size = max(map(len, whole.values())) - 1000         # the larger shard does not fit
    told("a size limit", forked(imagenet.main, words, limits=[(resource.RLIMIT_FSIZE, size)]),
         r"imagenet-0000\d.*: File too large")
    r = forked(imagenet.main, words)
    check("and without it", r.status == 0 and tree(at("killed")) == whole, r)
    # a picture that breaks in the second shard: the first is kept
    shutil.rmtree(at("killed"), ignore_errors=True)
    broken = at("train/n01440766/picture_9.JPEG")
    os.rename(broken, at("aside"))
    with open(broken, "wb") as f:
        f.write(b"\xff\xd8 nothing")
    told("a broken picture late", forked(imagenet.main, words), "picture_9.JPEG: not a picture")
    check("keeps what was finished before it",
          len([k for k in tree(at("killed")) if k.endswith(".safetensors")]) == 1)
    os.replace(at("aside"), broken)
    r = forked(imagenet.main, words)
    check("and goes on when it is whole", r.status == 0 and tree(at("killed")) == whole, r)
    # two at once
    pid = os.fork()
    if pid == 0:
        import fcntl
        fcntl.flock(os.open(at("killed"), os.O_RDONLY), fcntl.LOCK_EX)
        time.sleep(60)
        os._exit(0)
    time.sleep(0.3)
    told("two at once", forked(imagenet.main, words), "another data/imagenet.py is at work there")
    os.kill(pid, signal.SIGKILL), os.waitpid(pid, 0)

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", default=os.path.join(ROOT, "train_srdit"))
    parser.add_argument("--sample", default=os.path.join(ROOT, "sample"))
    parser.add_argument("--emulated", help="the GPU trainer by emulation, ./train_srdit_emu")
    options = parser.parse_args()
    for program in (options.train, options.sample):
        if not os.access(program, os.X_OK):
            sys.exit("error: %s: build it first (make)" % program)
    with tempfile.TemporaryDirectory() as folder:
        at = lambda name: os.path.join(folder, name)
        start = time.time()
        for test in (metrics, preprocessing):
            test()
        made = chain(at, options)
        print("chain %.0f s" % (time.time() - start), flush=True)
        bad_input(at, *made)
        print("bad input %.0f s" % (time.time() - start), flush=True)
        interrupted(at, made[0], made[2])
    print("%.0f s\n%d passed, %d failed" % (time.time() - start, passed, len(failed)))
    sys.exit(1 if failed else 0)

if __name__ == "__main__":
    main()
