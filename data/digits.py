#!/usr/bin/env python3
"""Builds the bundled data set: 1797 handwritten digits of 8x8 pixels and what a small encoder sees.

    data/digits.safetensors          the shard that train_srdit reads (the format: data/README.md)
    data/digits_encoder.safetensors  the encoder behind its `feats` and `cls`: what DINOv2 is to ImageNet

Both are committed, so nobody needs this script to train. It is here so that every byte of them can be made
again, anywhere. It needs numpy and, for the pictures, scikit-learn's load_digits; nothing else.

Training is chaotic: one bit of difference in one sum means different weights an epoch later, and a BLAS adds
in an order that depends on the library, the processor and the number of threads. So matmul() below first
rounds both factors to a grid so coarse that every partial sum fits into a double's 53 bits. Nothing is
rounded while adding, then, and no order can matter. All else is + - * / sqrt, which IEEE 754 defines to the
last bit; no libm is asked.

What it refuses to become: a framework. It is one network, one loss, one optimizer and one file format, each
in full.
"""

import argparse
import hashlib
import json
import os
import sys
import time

try:
    import numpy as np
except ImportError:
    sys.exit("%s: %s has no numpy; on Debian: apt-get install python3-numpy (digits.py without --check also "
             "python3-sklearn), then /usr/bin/python3 %s" %
             (os.path.basename(sys.argv[0]), sys.executable, sys.argv[0]))

HERE = os.path.dirname(os.path.abspath(__file__))
SHARD = os.path.join(HERE, "digits.safetensors")
ENCODER = os.path.join(HERE, "digits_encoder.safetensors")

SEED = 1797
CLASSES = 10
HELD_OUT_PER_CLASS = 36             # 360 of 1797, the same number of each digit
SCALE, OFFSET = 0.125, -1.0         # model input = raw * SCALE + OFFSET: 0 .. 16 becomes -1 .. 1

WIDTH = 48                          # channels of the three convolutions
Z = 32                              # width of the features and of the CLS vector
EPOCHS, BATCH, PEAK_LR = 40, 32, 4e-3
SMOOTHING = 0.1                     # label smoothing: tokens need not grow for ever to name their digit
REDRAW = {"cls_head": 5.0, "patch_head": 2.0}   # weight of redrawing the picture; naming the digit has 1


# ------------------------------------------------------------------------------------------------------------
# safetensors: 8 bytes little-endian header length, the header in JSON, the data without holes

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
          "U8": "u1"}


def to_safetensors(tensors, metadata):
    """The file's bytes. Tensors lie in the order given: put the widest type first and all are aligned."""
    header, blobs, at = {"__metadata__": metadata}, [], 0
    for name, array in tensors.items():
        dtype = next(d for d, code in DTYPES.items() if np.dtype(code) == array.dtype)
        blob = np.ascontiguousarray(array).tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [at, at + len(blob)]}
        blobs.append(blob)
        at += len(blob)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text] + blobs)


def read_safetensors(path):
    """(tensors, metadata) of a file; ValueError says what is wrong with it."""
    with open(path, "rb") as f:
        return parse_safetensors(f.read(), path)


def parse_safetensors(data, path):
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise ValueError("%s: not a safetensors file (its header would be %d bytes long)" % (path, length))
    try:
        header = dict(json.loads(data[8:8 + length]))
    except (TypeError, ValueError):
        raise ValueError("%s: not a safetensors file (its header is no JSON object)" % path)
    metadata, tensors = header.pop("__metadata__", {}), {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        if entry["dtype"] not in DTYPES:
            raise ValueError("%s: tensor %s is %s, which is not read here" % (path, name, entry["dtype"]))
        dtype = np.dtype(DTYPES[entry["dtype"]])
        count = 1
        for n in entry["shape"]:
            count *= n
        if not 0 <= begin <= end <= len(data) - 8 - length or end - begin != count * dtype.itemsize:
            raise ValueError("%s: tensor %s does not lie inside the file" % (path, name))
        tensors[name] = np.frombuffer(data, dtype, count, 8 + length + begin).reshape(entry["shape"])
    return tensors, metadata


# ------------------------------------------------------------------------------------------------------------
# exact arithmetic

def on_grid(x, bits):
    """x rounded to whole multiples of 2^(e - bits), where its largest magnitude is below 2^e."""
    top = np.abs(x).max()
    if top == 0:
        return x
    step = np.ldexp(1.0, np.frexp(top)[1] - bits)
    return np.rint(x / step) * step


def matmul(a, b):
    """a @ b of doubles, the same bits in any order: a sum of n products of 2*bits bits each fits into 53."""
    bits = (53 - (a.shape[1] - 1).bit_length()) // 2
    return on_grid(a, bits) @ on_grid(b, bits)


def column_sums(x):
    return matmul(np.ones((1, x.shape[0])), x)[0]


def exp_negative(x):
    """e^x for x <= 0 out of + * / alone (libms differ): Taylor's series of x/256, squared eight times."""
    y = np.maximum(x, -40.0) / 256
    e = 1 + y * (1 + y / 2 * (1 + y / 3 * (1 + y / 4 * (1 + y / 5 * (1 + y / 6)))))
    for _ in range(8):
        e = e * e
    return e


def square_root(c):
    """(c^1/2, c^-1/2), c symmetric and positive, by the coupled Newton iteration (LAPACKs differ, too)."""
    eye, scale = np.eye(len(c)), np.sqrt(column_sums(np.diag(c).reshape(-1, 1))[0])
    y, z = c / (scale * scale), eye
    for _ in range(40):
        step = (3 * eye - matmul(z, y)) / 2
        y, z = matmul(y, step), matmul(step, z)
    return y * scale, z / scale


# ------------------------------------------------------------------------------------------------------------
# the network: three 3x3 convolutions, then one linear map to a feature per pixel and one to the CLS vector

def neighbours(x, size=3):
    """[B,8,8,C] -> [B*64, size*size*C]: what lies around each pixel, zeros outside of the picture."""
    B, H, W, C = x.shape
    r = size // 2
    padded = np.zeros((B, H + 2 * r, W + 2 * r, C))
    padded[:, r:r + H, r:r + W] = x
    parts = [padded[:, i:i + H, j:j + W] for i in range(size) for j in range(size)]
    return np.concatenate(parts, axis=3).reshape(B * H * W, size * size * C)


def quarters(h):
    """[B,8,8,C] -> [B, 4*C]: the mean over each quarter of the picture, added pairwise: a fixed order."""
    for _ in range(2):
        h = (h[:, 0::2] + h[:, 1::2]) / 2
        h = (h[:, :, 0::2] + h[:, :, 1::2]) / 2
    return h.reshape(h.shape[0], -1)


def initial_weights(rng):
    """He's uniform start; weights are [in, out], a convolution's rows ordered (row, column, channel)."""
    shapes = {"conv1": (9, WIDTH), "conv2": (9 * WIDTH, WIDTH), "conv3": (9 * WIDTH, WIDTH),
              "patch": (WIDTH, Z), "cls": (4 * WIDTH, Z),
              "patch_head": (Z, CLASSES + 25), "cls_head": (Z, CLASSES + 64)}
    w = {}
    for name, (n_in, n_out) in shapes.items():
        bound = np.sqrt((6.0 if name.startswith("conv") else 3.0) / n_in)
        w[name + ".weight"] = (rng.random_sample((n_in, n_out)) * 2 - 1) * bound
        w[name + ".bias"] = np.zeros(n_out)
    return w


def linear(x, w, name):
    return matmul(x, w[name + ".weight"]) + w[name + ".bias"]


def encode(x, w):
    """Pictures [B,8,8,1] in [-1, 1] -> (CLS [B,Z], patches [B*64,Z], everything that backward() needs)."""
    B, kept = x.shape[0], []
    h = x
    for name in ("conv1", "conv2", "conv3"):
        cols = neighbours(h)
        h = np.maximum(linear(cols, w, name), 0).reshape(B, 8, 8, WIDTH)
        kept.append((name, cols, h))
    pooled = quarters(h)
    return linear(pooled, w, "cls"), linear(h.reshape(B * 64, WIDTH), w, "patch"), (kept, pooled)


def encode_all(x, w):
    """(CLS [N,Z], patches [N*64,Z]) of any number of pictures, in batches that fit into a cache."""
    parts = [encode(x[i:i + 64], w)[:2] for i in range(0, len(x), 64)]
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def head_loss(tokens, labels, target, w, name, grads):
    """Each token names its digit (cross-entropy) and redraws `target` (squared error), both linearly.

    Naming alone would let all pictures of a digit fall onto one point; redrawing keeps how it was written.
    Fills in the head's gradients and returns that of the tokens."""
    n, m = target.shape
    out = linear(tokens, w, name)
    logits = out[:, :CLASSES]
    e = exp_negative(logits - logits.max(1, keepdims=True))
    p = e / matmul(e, np.ones((CLASSES, 1)))
    p = p - SMOOTHING / CLASSES
    p[np.arange(n), labels] -= 1 - SMOOTHING
    dout = np.concatenate([p / n, (out[:, CLASSES:] - target) * (2 * REDRAW[name] / (n * m))], axis=1)
    grads[name + ".weight"] = matmul(tokens.T, dout)
    grads[name + ".bias"] = column_sums(dout)
    return matmul(dout, w[name + ".weight"].T)


def gradients(x, labels, w):
    """Gradients of the loss over one batch, by the layers of encode() in reverse."""
    B, grads = x.shape[0], {}
    cls, patches, (kept, pooled) = encode(x, w)
    dcls = head_loss(cls, labels, x.reshape(B, 64), w, "cls_head", grads)
    dpatches = head_loss(patches, np.repeat(labels, 64), neighbours(x, 5), w, "patch_head", grads)
    h = kept[-1][2].reshape(B * 64, WIDTH)
    for name, inp, dout in (("cls", pooled, dcls), ("patch", h, dpatches)):
        grads[name + ".weight"], grads[name + ".bias"] = matmul(inp.T, dout), column_sums(dout)
    dpooled = matmul(dcls, w["cls.weight"].T).reshape(B, 2, 2, WIDTH) / 16
    dh = matmul(dpatches, w["patch.weight"].T).reshape(B, 8, 8, WIDTH)
    dh = dh + dpooled.repeat(4, axis=1).repeat(4, axis=2)
    for name, cols, h in reversed(kept):
        dh = (dh * (h > 0)).reshape(B * 64, WIDTH)
        grads[name + ".weight"], grads[name + ".bias"] = matmul(cols.T, dh), column_sums(dh)
        if name != "conv1":
            # what a convolution passes back is a convolution with the kernel turned by 180 degrees
            turned = w[name + ".weight"].reshape(9, WIDTH, WIDTH)[::-1].transpose(0, 2, 1)
            dh = matmul(neighbours(dh.reshape(B, 8, 8, WIDTH)), turned.reshape(9 * WIDTH, WIDTH))
            dh = dh.reshape(B, 8, 8, WIDTH)
    return grads


# ------------------------------------------------------------------------------------------------------------
# training

def moved(x, axis, amount):
    """Pictures moved along an axis by a fraction of a pixel, |amount| <= 1; white paper moves in."""
    before, after = np.full_like(x, -1.0), np.full_like(x, -1.0)
    if axis == 1:
        before[:, 1:], after[:, :-1] = x[:, :-1], x[:, 1:]
    else:
        before[:, :, 1:], after[:, :, :-1] = x[:, :, :-1], x[:, :, 1:]
    a = np.abs(amount)
    return x * (1 - a) + np.where(amount > 0, before, after) * a


def augmented(x, rng):
    """Moved by up to a pixel, slanted, and with a little noise: the ways in which a writer's hand varies."""
    B = x.shape[0]
    uniform = lambda *shape: rng.random_sample(shape) * 2 - 1
    rows = (np.arange(8) - 3.5).reshape(1, 8, 1, 1) / 3.5
    sideways = uniform(B, 1, 1, 1) * 0.6 + uniform(B, 1, 1, 1) * rows * 0.4
    x = moved(x, 2, np.broadcast_to(sideways, x.shape))
    x = moved(x, 1, np.broadcast_to(uniform(B, 1, 1, 1) * 0.6, x.shape))
    return x + uniform(*x.shape) * 0.1


def train_encoder(pictures, labels, train, verbose=True):
    """Adam on the training split, learning rate up for one epoch, then down in a straight line to zero."""
    rng = np.random.RandomState(SEED + 1)   # numpy promises that RandomState's streams never change
    w = initial_weights(rng)
    m = {k: np.zeros_like(v) for k, v in w.items()}
    v = {k: np.zeros_like(x) for k, x in w.items()}
    per_epoch = train // BATCH
    steps, b1t, b2t, start = EPOCHS * per_epoch, 1.0, 1.0, time.time()
    for step in range(steps):
        if step % per_epoch == 0:
            order = rng.permutation(train)
        batch = order[step % per_epoch * BATCH:][:BATCH]
        grads = gradients(augmented(pictures[batch], rng), labels[batch], w)
        lr = PEAK_LR * min((step + 1) / per_epoch, 1.0) * (steps - step) / steps
        b1t, b2t = b1t * 0.9, b2t * 0.99
        for k in w:
            m[k] = m[k] * 0.9 + grads[k] * 0.1
            v[k] = v[k] * 0.99 + grads[k] * grads[k] * 0.01
            w[k] = w[k] - lr * (m[k] / (1 - b1t)) / (np.sqrt(v[k] / (1 - b2t)) + 1e-8)
        if verbose and (step + 1) % (10 * per_epoch) == 0:
            print("epoch %2d of %d | held-out accuracy %.2f %% | %.0f s" % (
                (step + 1) // per_epoch, EPOCHS, 100 * accuracy(pictures[train:], labels[train:], w),
                time.time() - start), flush=True)
    return w


def accuracy(pictures, labels, w):
    return float(np.mean(classify(pictures, w) == labels))


def classify(pictures, w):
    """The digit that the encoder's own head sees in each picture [N,8,8,1] in [-1, 1]."""
    return linear(encode_all(pictures, w)[0], w, "cls_head")[:, :CLASSES].argmax(1)


def freeze(w, pictures, train):
    """The last, frozen layer, folded into the linear maps before it: x' = (x - mean) C^(-1/4) / dev.

    Subtracting the mean lets cosines tell tokens apart. C is x's covariance; its power -1/4 lies half way
    between keeping the spectrum (a few class directions outshine how the digit was written) and whitening it
    (the faintest direction is as loud as the class). dev brings each dimension to deviation 1. All are
    measured on the training split."""
    cls, patches = encode_all(pictures[:train], w)
    for name, x in (("cls", cls), ("patch", patches)):
        n, head = x.shape[0], name + "_head"
        mean = column_sums(x) / n
        x = x - mean
        quarter, inverse = square_root(square_root(matmul(x.T, x) / n)[0])
        x = matmul(x, inverse)
        dev = np.sqrt(column_sums(x * x) / n)
        # head(x) = head'(x'): the heads go on seeing what they saw
        w[head + ".bias"] = w[head + ".bias"] + matmul(mean.reshape(1, Z), w[head + ".weight"])[0]
        w[head + ".weight"] = matmul(quarter, w[head + ".weight"]) * dev.reshape(Z, 1)
        w[name + ".weight"] = matmul(w[name + ".weight"], inverse) / dev
        w[name + ".bias"] = matmul((w[name + ".bias"] - mean).reshape(1, Z), inverse)[0] / dev
    return {k: x.astype(np.float32) for k, x in w.items()}


# ------------------------------------------------------------------------------------------------------------
# the data set

def load_split():
    """(raw [1797,8,8] of 0 .. 16, labels, size of the training split): training first, both shuffled."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        sys.exit("digits.py: %s has no scikit-learn, which the pictures come with; on Debian: apt-get "
                 "install python3-sklearn, then /usr/bin/python3 %s" % (sys.executable, sys.argv[0]))
    digits = load_digits()
    raw, labels = digits.images.astype(np.uint8), digits.target.astype(np.uint8)
    rng = np.random.RandomState(SEED)
    parts = [rng.permutation(np.flatnonzero(labels == c)) for c in range(CLASSES)]
    train = rng.permutation(np.concatenate([p[HELD_OUT_PER_CLASS:] for p in parts]))
    held_out = rng.permutation(np.concatenate([p[:HELD_OUT_PER_CLASS] for p in parts]))
    order = np.concatenate([train, held_out])
    return raw[order], labels[order], len(train)


def to_int8(x):
    """[..., Z] -> int8 of the same direction: the largest magnitude of each vector becomes 127."""
    top = np.abs(x).max(-1, keepdims=True)
    return np.rint(x * (127 / np.where(top == 0, 1, top))).astype(np.int8)


def model_input(raw):
    return raw.astype(np.float64).reshape(-1, 8, 8, 1) * SCALE + OFFSET


def build_encoder(raw, labels, train, verbose=True):
    """The bytes of digits_encoder.safetensors."""
    pictures = model_input(raw)
    w = freeze(train_encoder(pictures, labels, train, verbose), pictures, train)
    exact = {k: x.astype(np.float64) for k, x in w.items()}
    return to_safetensors(w, {
        "format": "digits-encoder-1",
        "what": "A small frozen encoder of 8x8 digits, trained by data/digits.py on the training split of "
                "digits.safetensors. x = raw/8 - 1; conv1, conv2, conv3 are 3x3 convolutions (zero padding, "
                "ReLU, channels last); patch is a linear map of each pixel's channels, cls one of their "
                "means over the four quarters; cls_head and patch_head, linear maps of these, name the digit "
                "(outputs 0-9) and redraw the picture or the pixel's 5x5 neighbourhood (the rest). Weights "
                "are [in, out]; a convolution's inputs are ordered (row, column, channel), the quarters "
                "likewise.",
        "held_out_accuracy": "%.4f" % accuracy(pictures[train:], labels[train:], exact),
        "train_accuracy": "%.4f" % accuracy(pictures[:train], labels[:train], exact),
        "license": "CC BY 4.0",
    })


def build_shard(raw, labels, train, w):
    """The bytes of digits.safetensors."""
    N = len(raw)
    cls, patches = encode_all(model_input(raw), {k: x.astype(np.float64) for k, x in w.items()})
    feats = np.concatenate([cls.reshape(N, 1, Z), patches.reshape(N, 64, Z)], axis=1)
    return to_safetensors({
        "cls": (np.rint(cls * 4096) / 4096).astype(np.float32),
        "latents": raw.reshape(N, 1, 8, 8),
        "labels": labels,
        "feats": to_int8(feats),
    }, {
        "format": "srdit-data-1",
        "name": "digits",
        "classes": "%d" % CLASSES,
        "latent_scale": "0.125",
        "latent_offset": "-1",
        "decoder": "pixels",
        "train_samples": "%d" % train,
        "split": "The first %d samples are for training; the last %d are held out, %d of each digit. Both "
                 "are shuffled (numpy RandomState(%d) in data/digits.py). The source does not say who wrote "
                 "what, so the same hands may be on both sides."
                 % (train, N - train, HELD_OUT_PER_CLASS, SEED),
        "provenance": "Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine "
                      "Learning Repository, 1998, doi:10.24432/C50P49: its test set, as scikit-learn's "
                      "load_digits has it. Changed: the order of samples; feats and cls added "
                      "(data/digits_encoder.safetensors).",
        "license": "CC BY 4.0",
    })


def main():
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__.split("\n\n")[0],
        epilog="examples:\n"
               "  python3 data/digits.py                    build the shard with the encoder that is there\n"
               "  python3 data/digits.py --train-encoder    train the encoder anew first (2 minutes)\n"
               "  python3 data/digits.py --check            build in memory: is that what the file holds?\n"
               "  python3 data/digits.py --check --train-encoder    the same for both files\n")
    parser.add_argument("--train-encoder", action="store_true",
                        help="train the encoder anew instead of reading its file")
    parser.add_argument("--check", action="store_true",
                        help="write nothing; exit with 1 when the files differ from what would be written")
    args = parser.parse_args()

    raw, labels, train = load_split()
    made = {}
    try:
        if args.train_encoder or not (args.check or os.path.exists(ENCODER)):
            made[ENCODER] = build_encoder(raw, labels, train)
            w, metadata = parse_safetensors(made[ENCODER], ENCODER)
        else:
            w, metadata = read_safetensors(ENCODER)
        made[SHARD] = build_shard(raw, labels, train, w)
        different = 0
        for path, data in made.items():
            if args.check:
                with open(path, "rb") as f:
                    same = f.read() == data
                different += not same
                verdict = "as built" if same else "DIFFERS from what was built"
            else:
                with open(path + ".tmp", "wb") as f:
                    f.write(data)
                os.replace(path + ".tmp", path)
                verdict = "written"
            print("%s: %s, %d bytes, sha256 %s" % (os.path.relpath(path), verdict, len(data),
                                                   hashlib.sha256(data).hexdigest()[:16]))
        print("encoder: held-out accuracy %s" % metadata["held_out_accuracy"])
    except (OSError, ValueError) as error:
        sys.exit("digits.py: %s" % error)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
