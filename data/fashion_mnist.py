#!/usr/bin/env python3
"""Builds the Fashion-MNIST data set: 70000 pictures of clothes, 28x28 pixels, and what a small encoder sees.

    data/fashion_mnist.safetensors           the shard that train_srdit reads (not committed: 150 MB)
    data/fashion_mnist_teacher.safetensors   the frozen encoder behind its `feats` and `cls`
    data/fashion_mnist_judge.safetensors     another frozen network, which scores pictures

The pictures come from the four public IDX files (Debian: apt-get install dataset-fashion-mnist). Both
networks are committed, so building the shard only runs the teacher over the pictures; --train makes both
networks again. Teacher and judge differ in architecture and in seed: whoever trains towards the one is
scored by the other. data/README.md gives their layers and their file format.

As in digits.py every byte can be made again anywhere: both factors of a matrix product are first rounded to a
grid so coarse that all partial sums are exact, so that no order of additions can matter; all else is
+ - * / sqrt. Needs numpy and nothing else. cifar10.py is this file with other numbers.

What it refuses to become: a framework. Two small networks, one loss, one optimizer, each in full.
"""

import argparse
import ctypes
import gzip
import hashlib
import os
import sys
import time
import zlib
from collections import namedtuple

import digits               # says what to install where numpy is missing
import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
CLASSES = 10
SCALE, OFFSET = 1 / 127.5, -1.0     # model input = raw * SCALE + OFFSET: 0 .. 255 becomes -1 .. 1
BATCH = 64
PEAK_LR = 2e-3
SMOOTHING = 0.1             # label smoothing: a token need not grow for ever to name its class
REDRAW = 2.0                # weight of redrawing the picture; naming its class has 1
MARGIN = 2                  # a patch token redraws its patch and this many pixels around it

# What differs between data sets. size: height and width; thumb: side of the small picture that a vector
# redraws; shift: pixels by which pictures are moved in training; sha256: of the files that are published
DataSet = namedtuple("DataSet", "name size channels patch thumb train shift networks sha256")

# A network is convolutions with ReLU, `convs` = (kernel, stride, padding, channels out) in turn, then linear
# maps. `vector` names the one to a vector of Z numbers for the whole picture: from the means over nine
# overlapping regions of the last map if `patches`, else from the whole of the last map. `patches`: another
# linear map, "patch", gives Z numbers for each pixel of the last map. The other linear maps, `vector`_logits,
# `vector`_redraw and so on, only serve training.
Network = namedtuple("Network", "role vector patches convs z seed epochs")

NETWORKS = (
    Network("teacher", "cls", True, ((4, 2, 1, 32), (4, 2, 1, 80), (3, 1, 1, 80)), 24, 2017, 8),
    Network("judge", "features", False, ((5, 2, 2, 32), (3, 2, 1, 64), (3, 1, 1, 64), (3, 2, 1, 64)), 64, 28,
            22),
)
FASHION = DataSet("fashion_mnist", 28, 1, 4, 14, 60000, 2, NETWORKS, {
    "fashion_mnist_teacher.safetensors": "609a89a92a752c0f52b12e8a067e9c4175181ef14bd80a8c4cbe27e36f1ae4d2",
    "fashion_mnist_judge.safetensors": "cce3542feb3f955cf21842f670f36669532ebcfe5f53b6242905d4e1afa55e1b",
    "fashion_mnist.safetensors": "2c416317282a8acb7f8d1db2da486e5ef95b3af0c44906ead853f6903a167084"})

IDX_FILES = (               # name, size, sha256 of the unpacked file
    ("train-images-idx3-ubyte", 47040016, "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"),
    ("train-labels-idx1-ubyte", 60008, "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"),
    ("t10k-images-idx3-ubyte", 7840016, "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"),
    ("t10k-labels-idx1-ubyte", 10008, "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
)


# ------------------------------------------------------------------------------------------------------------
# exact arithmetic: a product of two numbers of 19 bits has 38, and 2^15 of them add up within a double's 53

BITS, LONGEST = 19, 1 << 15


def grid(x):
    return digits.on_grid(x, BITS)


def product(a, b):
    """a @ b of factors that lie on their grids: the same bits in any order."""
    assert a.shape[-1] <= LONGEST
    return a @ b


def column_sums(x):
    """[n,m] on its grid -> [m]"""
    return product(np.ones((1, len(x))), x)[0]


# ------------------------------------------------------------------------------------------------------------
# layers; maps are channels last, [B,H,W,C]

def side_out(n, kernel, stride, padding):
    return (n + 2 * padding - kernel) // stride + 1


def columns(x, kernel, stride, padding):
    """[B,H,W,C] -> [B*h*w, kernel*kernel*C]: what each output pixel sees, ordered (row, column, channel)."""
    B, H, W, C = x.shape
    padded = np.zeros((B, H + 2 * padding, W + 2 * padding, C))
    padded[:, padding:padding + H, padding:padding + W] = x
    h, w = side_out(H, kernel, stride, padding), side_out(W, kernel, stride, padding)
    b, r, c, one = padded.strides
    windows = np.lib.stride_tricks.as_strided(padded, (B, h, w, kernel, kernel, C),
                                              (b, r * stride, c * stride, r, c, one), writeable=False)
    return windows.reshape(B * h * w, kernel * kernel * C)


def columns_backward(dcols, shape, kernel, stride, padding):
    """The gradient of columns(): every pixel sums up what was passed back to each place that saw it."""
    B, H, W, C = shape
    h, w = side_out(H, kernel, stride, padding), side_out(W, kernel, stride, padding)
    dcols = dcols.reshape(B, h, w, kernel, kernel, C)
    dpadded = np.zeros((B, H + 2 * padding, W + 2 * padding, C))
    for i in range(kernel):
        for j in range(kernel):
            dpadded[:, i:i + stride * h:stride, j:j + stride * w:stride] += dcols[:, :, :, i, j]
    return dpadded[:, padding:padding + H, padding:padding + W]


def regions(n):
    """[9, n*n] of 0 and 1: three bands of rows by three of columns, which overlap a little."""
    length = (n + 2) // 3
    band = np.zeros((3, n))
    for i, start in enumerate((0, (n - length) // 2, n - length)):
        band[i, start:start + length] = 1
    return (band[:, None, :, None] * band[None, :, None, :]).reshape(9, n * n), length * length


def shrunk(x, thumb):
    """[B,S,S,C] -> [B, thumb*thumb*C]: the mean of each block of pixels, added in a fixed order."""
    f = x.shape[1] // thumb
    rows = sum(x[:, i::f] for i in range(f)) / f
    return (sum(rows[:, :, i::f] for i in range(f)) / f).reshape(len(x), -1)


def linear(x, w, name):
    """x [n,in] on its grid"""
    return product(x, grid(w[name + ".weight"])) + w[name + ".bias"]


# ------------------------------------------------------------------------------------------------------------
# the networks

def initial_weights(net, data, rng):
    """He's uniform start; weights are [in, out], a convolution's rows ordered (row, column, channel)."""
    shapes, side, c = {}, data.size, data.channels
    for i, (k, s, p, out) in enumerate(net.convs):
        shapes["conv%d" % (i + 1)] = (k * k * c, out)
        side, c = side_out(side, k, s, p), out
    shapes[net.vector] = ((9 if net.patches else side * side) * c, net.z)
    shapes[net.vector + "_logits"] = (net.z, CLASSES)
    shapes[net.vector + "_redraw"] = (net.z, data.thumb ** 2 * data.channels)
    if net.patches:
        shapes["patch"] = (c, net.z)
        shapes["patch_logits"] = (net.z, CLASSES)
        shapes["patch_redraw"] = (net.z, (data.patch + 2 * MARGIN) ** 2 * data.channels)
    w = {}
    for name, (n_in, n_out) in shapes.items():
        bound = np.sqrt((6.0 if name.startswith("conv") else 3.0) / n_in)
        w[name + ".weight"] = (rng.random_sample((n_in, n_out)) * 2 - 1) * bound
        w[name + ".bias"] = np.zeros(n_out)
    return w


def encode(x, net, w):
    """Pictures [B,S,S,C] in [-1, 1] -> (vectors [B,Z], patches [B*P,Z] or None, what backward() needs)."""
    kept, h = [], grid(x)
    for i, (k, s, p, out) in enumerate(net.convs):
        cols, side = columns(h, k, s, p), side_out(h.shape[1], k, s, p)
        kept.append((cols, h))
        h = grid(np.maximum(linear(cols, w, "conv%d" % (i + 1)), 0)).reshape(len(x), side, side, out)
    maps = h.reshape(len(x), side * side, out)
    if not net.patches:
        return linear(maps.reshape(len(x), -1), w, net.vector), None, (kept, h, maps.reshape(len(x), -1))
    masks, pixels = regions(side)
    pooled = grid((product(masks, maps) / pixels).reshape(len(x), -1))
    return linear(pooled, w, net.vector), linear(maps.reshape(-1, out), w, "patch"), (kept, h, pooled)


def linear_backward(dout, x, w, name, grads):
    """Fills in the gradients of linear() and returns that of x; x lies on its grid."""
    dout = grid(dout)
    grads[name + ".weight"], grads[name + ".bias"] = product(x.T, dout), column_sums(dout)
    return product(dout, grid(w[name + ".weight"]).T)


def heads(tokens, labels, target, w, name, grads):
    """Each token names its class (cross-entropy) and redraws `target` (squared error), both linearly.

    Naming alone would let all pictures of a class fall onto one point; redrawing keeps what each looks like.
    Fills in the heads' gradients and returns that of the tokens [n,Z]."""
    n, tokens = len(tokens), grid(tokens)
    logits = linear(tokens, w, name + "_logits")
    e = digits.exp_negative(logits - logits.max(1, keepdims=True))
    p = e / product(grid(e), np.ones((CLASSES, 1)))
    p = p - SMOOTHING / CLASSES
    p[np.arange(n), labels] -= 1 - SMOOTHING
    error = linear(tokens, w, name + "_redraw") - target
    return (linear_backward(p / n, tokens, w, name + "_logits", grads) +
            linear_backward(error * (2 * REDRAW / error.size), tokens, w, name + "_redraw", grads))


def gradients(x, labels, net, data, w):
    """Gradients of the loss over one batch, by the layers of encode() in reverse."""
    B, grads = len(x), {}
    vectors, patches, (kept, h, read) = encode(x, net, w)
    dvectors = heads(vectors, labels, shrunk(x, data.thumb), w, net.vector, grads)
    dh = linear_backward(dvectors, read, w, net.vector, grads)
    if net.patches:
        side, C = h.shape[1], h.shape[3]
        around = columns(x, data.patch + 2 * MARGIN, data.patch, MARGIN)
        dpatches = heads(patches, np.repeat(labels, side * side), around, w, "patch", grads)
        masks, pixels = regions(side)
        dh = product(masks.T, grid(dh).reshape(B, 9, C)) / pixels
        dh = dh.reshape(-1, C) + linear_backward(dpatches, h.reshape(-1, C), w, "patch", grads)
    for i in reversed(range(len(net.convs))):
        cols, before = kept[i]
        dh = (dh.reshape(h.shape) * (h > 0)).reshape(-1, h.shape[3])
        dcols = linear_backward(dh, cols, w, "conv%d" % (i + 1), grads)
        if i:       # nobody asks for the picture's gradient
            dh, h = columns_backward(dcols, before.shape, *net.convs[i][:3]), before
    return grads


# ------------------------------------------------------------------------------------------------------------
# training

def model_input(raw):
    """U8 [B,C,S,S] -> [B,S,S,C] in [-1, 1], as the trainer sees it but channels last"""
    return raw.transpose(0, 2, 3, 1) * SCALE + OFFSET


def augmented(raw, shift, rng):
    """Each picture moved by whole pixels, -shift .. shift, its edge repeated; every other one mirrored."""
    S = raw.shape[2]
    padded = np.pad(raw, ((0, 0), (0, 0), (shift, shift), (shift, shift)), mode="edge")
    moves, mirrored = rng.randint(0, 2 * shift + 1, (len(raw), 2)), rng.randint(0, 2, len(raw))
    out = np.empty_like(raw)
    for b, (i, j) in enumerate(moves):
        out[b] = padded[b, :, i:i + S, j:j + S][:, :, ::-1 if mirrored[b] else 1]
    return out


def train_network(net, data, raw, labels):
    """Adam on the training split, learning rate up for half an epoch, then down in a straight line to 0."""
    rng = np.random.RandomState(net.seed)   # numpy promises that RandomState's streams never change
    w = initial_weights(net, data, rng)
    m, v = ({k: np.zeros_like(x) for k, x in w.items()} for _ in range(2))
    per_epoch = max(1, data.train // BATCH)
    steps, b1t, b2t, start = net.epochs * per_epoch, 1.0, 1.0, time.time()
    for step in range(steps):
        if step % per_epoch == 0:
            order = rng.permutation(data.train)
        batch = order[step % per_epoch * BATCH:][:BATCH]
        grads = gradients(model_input(augmented(raw[batch], data.shift, rng)), labels[batch], net, data, w)
        lr = PEAK_LR * min(2 * (step + 1) / per_epoch, 1.0) * (steps - step) / steps
        b1t, b2t = b1t * 0.9, b2t * 0.99
        for k in w:
            m[k] = m[k] * 0.9 + grads[k] * 0.1
            v[k] = v[k] * 0.99 + grads[k] * grads[k] * 0.01
            w[k] = w[k] - lr * (m[k] / (1 - b1t)) / (np.sqrt(v[k] / (1 - b2t)) + 1e-8)
        if (step + 1) % per_epoch == 0:
            share = accuracy(raw[data.train:], labels[data.train:], net, w)
            print("%s: epoch %2d of %d | test accuracy %.2f %% | %.0f s" % (
                net.role, (step + 1) // per_epoch, net.epochs, 100 * share, time.time() - start), flush=True)
    return w


def encode_all(raw, net, w):
    """(vectors [B,Z], patches [B*P,Z] or None) of any number of pictures, one batch after the other."""
    for i in range(0, len(raw), BATCH):
        yield encode(model_input(raw[i:i + BATCH]), net, w)[:2]


def accuracy(raw, labels, net, w):
    """Share of the pictures whose class the network's own logits name."""
    logits = [linear(grid(vectors), w, net.vector + "_logits") for vectors, _ in encode_all(raw, net, w)]
    return float(np.mean(np.concatenate(logits).argmax(1) == labels))


def freeze(w, net, raw):
    """The last, frozen layer, folded into the linear maps before it: x' = (x - mean) C^(-1/4) / dev.

    As in digits.py: the spectrum flattened half way, each dimension of mean 0 and deviation 1, measured on
    the training split `raw`. The linear maps that read x are changed so that they see what they saw."""
    names = [net.vector] + ["patch"] * net.patches
    n, total, square = [0] * 2, [0] * 2, [0] * 2
    for outputs in encode_all(raw, net, w):
        for i in range(len(names)):
            x = grid(outputs[i])
            n[i], total[i], square[i] = n[i] + len(x), total[i] + column_sums(x), square[i] + product(x.T, x)
    for i, name in enumerate(names):
        mean = total[i] / n[i]
        covariance = square[i] / n[i] - mean.reshape(-1, 1) * mean
        quarter, inverse = digits.square_root(digits.square_root(covariance)[0])
        dev = np.sqrt(np.diag(digits.matmul(digits.matmul(inverse, covariance), inverse)))
        for reader in (name + "_logits", name + "_redraw"):
            weight, bias = reader + ".weight", reader + ".bias"
            w[bias] = w[bias] + digits.matmul(mean.reshape(1, -1), w[weight])[0]
            w[weight] = digits.matmul(quarter, w[weight]) * dev.reshape(-1, 1)
        w[name + ".weight"] = digits.matmul(w[name + ".weight"], inverse) / dev
        w[name + ".bias"] = digits.matmul((w[name + ".bias"] - mean).reshape(1, -1), inverse)[0] / dev
    return {k: x.astype(np.float32) for k, x in w.items()}


# ------------------------------------------------------------------------------------------------------------
# files

def network_path(folder, data, net):
    return os.path.join(folder, "%s_%s.safetensors" % (data.name, net.role))


def build_network(net, data, raw, labels):
    """The bytes of a network's file, trained from nothing."""
    w = freeze(train_network(net, data, raw, labels), net, raw[:data.train])
    exact = {k: x.astype(np.float64) for k, x in w.items()}
    metadata = {"format": "srdit-%s-1" % net.role, "name": data.name, "size": "%d" % data.size,
                "channels": "%d" % data.channels, "classes": "%d" % CLASSES,
                "convolutions": "%d" % len(net.convs)}
    for i, conv in enumerate(net.convs):
        for key, value in zip(("kernel", "stride", "padding"), conv):
            metadata["conv%d.%s" % (i + 1, key)] = "%d" % value
    metadata["test_accuracy"] = "%.4f" % accuracy(raw[data.train:], labels[data.train:], net, exact)
    metadata["what"] = ("A small frozen network, trained by data/%s.py on the training split alone; "
                        "data/README.md describes its layers." % data.name)
    metadata["license"] = "MIT"
    return digits.to_safetensors(w, metadata)


def parse_network(content, path, net, data):
    """({name: double array}, metadata); ValueError when the file does not hold that network."""
    try:
        tensors, metadata = digits.parse_safetensors(content, path)
    except (KeyError, TypeError) as error:
        raise ValueError("%s: not a safetensors file (its header lacks %s)" % (path, error))
    wanted = initial_weights(net, data, np.random.RandomState(0))
    for name in sorted(wanted.keys() | tensors.keys()):
        have, want = (list(t[name].shape) if name in t else "missing" for t in (tensors, wanted))
        if have != want:
            raise ValueError("%s: tensor %s is %s here and %s in the %s of %s.py (--train makes it again)"
                             % (path, name, have, want, net.role, data.name))
    return {k: x.astype(np.float64) for k, x in tensors.items()}, metadata


def build_shard(data, raw, labels, net, w, about):
    """The bytes of the shard; about: the metadata's split, provenance and license."""
    N, P = len(raw), (data.size // data.patch) ** 2
    cls, feats, at = np.empty((N, net.z), np.float32), np.empty((N, P + 1, net.z), np.int8), 0
    for vectors, patches in encode_all(raw, net, w):
        B = len(vectors)
        cls[at:at + B] = np.rint(vectors * 4096) / 4096
        feats[at:at + B, :1] = digits.to_int8(vectors).reshape(B, 1, net.z)
        feats[at:at + B, 1:] = digits.to_int8(patches).reshape(B, P, net.z)
        at += B
    return digits.to_safetensors(
        {"cls": cls, "latents": raw, "labels": labels, "feats": feats},
        {"format": "srdit-data-1", "name": data.name, "classes": "%d" % CLASSES, "latent_scale": repr(SCALE),
         "latent_offset": repr(OFFSET), "decoder": "pixels", "train_samples": "%d" % data.train, **about})


def write_file(path, content):
    """All of it under its name, or nothing."""
    try:
        with open(path + ".part", "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + ".part", path)
    except OSError as error:
        raise ValueError("%s: cannot be written (%s)" % (path, error.strerror))
    finally:
        if os.path.exists(path + ".part"):
            os.remove(path + ".part")


def read_idx(folder, name, size, sha256):
    """The numbers of an IDX file, packed or not, as U8 [N] or [N,28,28]."""
    path = os.path.join(folder, name)
    packed = not os.path.exists(path)
    if packed:
        path += ".gz"
    try:
        with (gzip.open if packed else open)(path, "rb") as f:
            content = f.read(size + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError("%s: neither %s nor %s.gz is there; on Debian: apt-get install "
                         "dataset-fashion-mnist; elsewhere --source DIR" % (folder, name, name))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError("%s: cut short or damaged (%s); fetch it again" % (path, error))
    if len(content) != size:
        raise ValueError("%s: %s bytes%s, where Fashion-MNIST has %d; fetch it again" % (
            path, "more than %d" % size if len(content) > size else len(content), " unpacked" * packed, size))
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError("%s: not Fashion-MNIST's (the sha256 of its content differs from the one in %s)"
                         % (path, os.path.basename(__file__)))
    dims = [int.from_bytes(content[4 + 4 * i:8 + 4 * i], "big") for i in range(content[3])]
    return np.frombuffer(content, np.uint8, -1, 4 + 4 * len(dims)).reshape(dims)


def load_fashion(folder):
    """(pictures [70000,1,28,28], labels [70000]), the 60000 for training first, in the files' order."""
    images, labels, test_images, test_labels = (read_idx(folder, *file) for file in IDX_FILES)
    return np.concatenate([images, test_images])[:, None], np.concatenate([labels, test_labels])


# ------------------------------------------------------------------------------------------------------------
# the program

def build(data, load, about, args):
    """Makes what args ask for; returns the exit status."""
    raw, labels = load(args.source)
    different = False

    def put(path, content):
        nonlocal different
        digest, known = hashlib.sha256(content).hexdigest(), data.sha256.get(os.path.basename(path))
        if args.check:
            with open(path, "rb") as f:
                same = f.read() == content
            verdict = "as built" if same else "DIFFERS from what was built"
            different |= not same
        else:
            write_file(path, content)
            verdict = "written"
        if known and digest != known:
            verdict += ", but DIFFERS from the published one, sha256 %s" % known[:16]
            different = True
        print("%s: %s, %d bytes, sha256 %s"
              % (os.path.relpath(path), verdict, len(content), digest), flush=True)

    for net in data.networks:
        path = network_path(args.folder, data, net)
        if args.train in (net.role, "both"):
            content = build_network(net, data, raw, labels)
            put(path, content)
        else:
            try:
                with open(path, "rb") as f:
                    content = f.read()
            except FileNotFoundError:
                raise ValueError("%s: not there; --train makes it" % path)
            known = data.sha256.get(os.path.basename(path))
            if known and hashlib.sha256(content).hexdigest() != known:
                raise ValueError("%s: not the published one (its sha256 differs from the one in this "
                                 "script); git checkout brings it back, --train makes it again" % path)
        w, metadata = parse_network(content, path, net, data)
        print("%s: test accuracy %s" % (net.role, metadata["test_accuracy"]), flush=True)
        if net.patches:
            teacher = net, w
    put(os.path.join(args.folder, data.name + ".safetensors"),
        build_shard(data, raw, labels, *teacher, about))
    return 1 if different else 0


def parse_arguments(description, epilog, source, source_help):
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter,
                                     description=description, epilog=epilog)
    parser.add_argument("--source", default=source, metavar=source_help[0], help=source_help[1])
    parser.add_argument("--train", nargs="?", const="both", choices=("teacher", "judge", "both"),
                        help="train the networks anew, or one of them, instead of reading their files")
    parser.add_argument("--check", action="store_true",
                        help="write nothing; exit with 1 when a file differs from what would be written")
    parser.add_argument("--folder", default=HERE, metavar="DIR", help="where networks and shard lie [data/]")
    return parser


def keep_memory():
    """Asks glibc to keep freed arrays: fetching the same pages anew takes a fifth of the time."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return              # another C library: only slower
    mallopt(-3, 1 << 25)    # M_MMAP_THRESHOLD, at its largest
    mallopt(-1, (1 << 31) - 1)      # M_TRIM_THRESHOLD


def run(script, work):
    """Calls work() and turns what users and disks do wrong into one sentence."""
    keep_memory()
    try:
        sys.exit(work())
    except (OSError, ValueError) as error:
        sys.exit("%s: %s" % (script, error))
    except KeyboardInterrupt:
        sys.exit("%s: interrupted; nothing half-written is left" % script)


def main():
    args = parse_arguments(
        __doc__.split("\n\n")[0],
        "examples:\n"
        "  python3 data/fashion_mnist.py                  build the shard with the networks that are there\n"
        "  python3 data/fashion_mnist.py --check          build in memory: is that what the file holds?\n"
        "  python3 data/fashion_mnist.py --train          train both networks anew first\n"
        "  python3 data/fashion_mnist.py --check --train  the same for all three files\n",
        "/usr/share/datasets/fashion-mnist",
        ("DIR", "folder of the four IDX files, packed or not [%(default)s]")).parse_args()
    return build(FASHION, load_fashion, {
        "split": "The 60000 training pictures, then the 10000 test pictures, both in their files' order.",
        "provenance": "Fashion-MNIST, H. Xiao, K. Rasul and R. Vollgraf, Zalando SE, 2017, arXiv 1708.07747. "
                      "Added: feats and cls, by data/fashion_mnist_teacher.safetensors.",
        "license": "MIT (copyright 2017 Zalando SE)"}, args)


if __name__ == "__main__":
    run("fashion_mnist.py", main)
