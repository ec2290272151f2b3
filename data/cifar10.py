#!/usr/bin/env python3
"""Builds the CIFAR-10 data set: 60000 photographs of 32x32 pixels in ten classes, for patch size 2.

    data/cifar10.safetensors             the shard that train_srdit reads
    data/cifar10_teacher.safetensors     the frozen encoder behind its `feats` and `cls`
    data/cifar10_judge.safetensors       another frozen network, which scores pictures

The pictures come from the public archive cifar-10-python.tar.gz (--source FILE). Networks, training and files
are those of fashion_mnist.py with other numbers. Nothing is committed: the first run needs --train.

So far this script has only run on the miniature archive that --self-test makes, never on the real one.

What it refuses to become: a second copy of fashion_mnist.py. Here is the archive's layout and no more.
"""

import hashlib
import io
import os
import pickle
import struct
import sys
import tarfile
import tempfile
import types
import zlib

import fashion_mnist as fm
import numpy as np

ARCHIVE_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
BATCHES = ["data_batch_%d" % i for i in range(1, 6)] + ["test_batch"]      # the last is the test split
PER_BATCH = 10000

NETWORKS = (
    fm.Network("teacher", "cls", True, ((4, 2, 1, 48), (3, 1, 1, 64), (3, 1, 1, 64)), 16, 2009, 8),
    fm.Network("judge", "features", False, ((5, 2, 2, 48), (3, 2, 1, 80), (3, 1, 1, 80), (3, 2, 1, 80)), 64,
               10, 14),
)
ABOUT = {
    "split": "The five training batches, then the test batch, each in its own order.",
    "provenance": "CIFAR-10, A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009. "
                  "Added: feats and cls, by cifar10_teacher.safetensors.",
    "license": "as the archive: none stated",
}


def cifar(per_batch, epochs=None):
    """The data set's numbers, for batches of that many pictures; epochs: other than the networks' own."""
    networks = tuple(net._replace(epochs=epochs or net.epochs) for net in NETWORKS)
    return fm.DataSet("cifar10", 32, 3, 2, 8, 5 * per_batch, 2, networks, {})


# ------------------------------------------------------------------------------------------------------------
# the archive: six pickles that Python 2 wrote, each a dict with b"data" [n,3072] U8, a picture's row being
# its red, green and blue plane, and b"labels", a list of n numbers

def empty_array(kind, shape, code):
    """What numpy.core.multiarray._reconstruct does; the pickle's next step fills the array in."""
    return kind(shape, code)


class BatchUnpickler(pickle.Unpickler):
    """Reads arrays and nothing else: a pickle may otherwise call any function there is."""
    ALLOWED = {("numpy.core.multiarray", "_reconstruct"): empty_array, ("numpy", "ndarray"): np.ndarray,
               ("numpy", "dtype"): np.dtype}

    def find_class(self, module, name):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError("it asks for %s.%s, which no batch needs" % (module, name))
        return self.ALLOWED[module, name]


def read_batch(content, where, per_batch):
    """(pictures [n,3,32,32] U8, labels [n] U8) of one pickle"""
    try:
        batch = BatchUnpickler(io.BytesIO(content), encoding="bytes").load()
        pictures, labels = batch[b"data"], np.array(batch[b"labels"])
        fits = (pictures.dtype == np.uint8 and pictures.shape == (per_batch, 3072) and
                labels.shape == (per_batch,) and labels.dtype.kind == "i" and
                labels.min() >= 0 and labels.max() < fm.CLASSES)
    except Exception as error:      # a damaged pickle can raise anything
        raise ValueError("%s: not a batch of CIFAR-10 (%s: %s)" % (where, type(error).__name__, error))
    if not fits:
        raise ValueError("%s: not %d pictures of 3072 bytes with labels 0 .. 9" % (where, per_batch))
    return pictures.reshape(-1, 3, 32, 32), labels.astype(np.uint8)


def load_cifar(path, per_batch=PER_BATCH, sha256=ARCHIVE_SHA256):
    """(pictures [N,3,32,32], labels [N]) of the archive at path, the training batches first"""
    try:
        with open(path, "rb") as f:
            content = f.read()
    except FileNotFoundError:
        raise ValueError("%s: not there; --source FILE says where cifar-10-python.tar.gz lies" % path)
    if sha256 and hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError("%s: not the public cifar-10-python.tar.gz (%d bytes, another sha256); fetch it "
                         "again" % (path, len(content)))
    parts = []
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as tar:
            for name in BATCHES:
                with tar.extractfile("cifar-10-batches-py/" + name) as f:
                    parts.append(read_batch(f.read(), "%s: %s" % (path, name), per_batch))
    except (tarfile.TarError, EOFError, KeyError, zlib.error, AttributeError) as error:
        raise ValueError("%s: not a whole archive of CIFAR-10 (%s)" % (path, error))
    return tuple(np.concatenate(part) for part in zip(*parts))


# ------------------------------------------------------------------------------------------------------------
# a test of all this on a miniature archive

def python2_pickle(pictures, labels):
    """What Python 2's cPickle, protocol 2, writes for a batch: its strings know no encoding."""
    short = lambda s: b"U" + bytes([len(s)]) + s
    number = lambda n: b"J" + struct.pack("<i", n)
    raw = pictures.tobytes()
    dtype = (b"cnumpy\ndtype\n" + short(b"u1") + number(0) + number(1) + b"\x87R(" + number(3) + short(b"|") +
             b"NNN" + number(-1) + number(-1) + number(0) + b"tb")
    array = (b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + number(0) + b"\x85" + short(b"b") +
             b"\x87R(" + number(1) + number(len(pictures)) + number(3072) + b"\x86" + dtype + b"\x89T" +
             struct.pack("<i", len(raw)) + raw + b"tb")
    return (b"\x80\x02}(" + short(b"batch_label") + short(b"a miniature") +
            short(b"labels") + b"](" + b"".join(map(number, labels)) + b"e" + short(b"data") + array + b"u.")


def write_archive(path, batches):
    """batches: {name: pickle}"""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in batches.items():
            member = tarfile.TarInfo("cifar-10-batches-py/" + name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def self_test():
    """Builds everything from a miniature archive, twice, then tries what can go wrong. Returns the status."""
    n, rng, failures = 16, np.random.RandomState(1), 0

    def check(what, good, said=""):
        nonlocal failures
        failures += not good
        print("%-68s %s%s" % (what, "ok" if good else "FAILED", ": " + said if said else ""), flush=True)

    def refused(what, words, work):
        try:
            work()
            check(what, False, "nothing was said")
        except ValueError as error:
            check(what, words in str(error), "" if words in str(error) else str(error))

    with tempfile.TemporaryDirectory() as folder:
        path, data = os.path.join(folder, "mini.tar.gz"), cifar(n, epochs=1)
        pictures = rng.randint(0, 256, (6 * n, 3072)).astype(np.uint8)
        labels = rng.randint(0, 10, 6 * n).astype(np.uint8)
        batches = {name: python2_pickle(pictures[i * n:(i + 1) * n], labels[i * n:(i + 1) * n])
                   for i, name in enumerate(BATCHES)}
        load = lambda source: load_cifar(source, n, None)
        write_archive(path, batches)
        raw, read = load(path)
        check("pictures and labels come back", np.array_equal(raw.reshape(-1, 3072), pictures) and
              np.array_equal(read, labels) and raw.shape == (6 * n, 3, 32, 32))

        args = types.SimpleNamespace(source=path, folder=folder, train="both", check=False)
        check("networks and shard are built", fm.build(data, load, ABOUT, args) == 0)
        tensors, metadata = fm.digits.read_safetensors(os.path.join(folder, "cifar10.safetensors"))
        check("the shard holds them", np.array_equal(tensors["latents"], raw) and
              np.array_equal(tensors["labels"], labels) and metadata["train_samples"] == "%d" % (5 * n))
        check("and 257 tokens of features each", tensors["feats"].shape == (6 * n, 257, 16) and
              tensors["cls"].shape == (6 * n, 16) and bool(np.isfinite(tensors["cls"]).all()))
        args.check = True
        check("made again, they are the same bytes", fm.build(data, load, ABOUT, args) == 0)
        args.train = None
        check("and so is the shard with the networks read", fm.build(data, load, ABOUT, args) == 0)
        check("nothing half-written is left", not [f for f in os.listdir(folder) if f.endswith(".part")])

        refused("a missing archive is refused", "--source", lambda: load(path + ".no"))
        refused("another sha256 is refused", "sha256", lambda: load_cifar(path, n))
        refused("another number of pictures is refused", "not 15 pictures",
                lambda: load_cifar(path, 15, None))
        with open(path, "rb") as f:
            whole = f.read()
        for part in (10, len(whole) // 2):
            with open(path, "wb") as f:
                f.write(whole[:part])
            refused("an archive cut after %d bytes is refused" % part, "not a whole archive",
                    lambda: load(path))
        write_archive(path, {name: batches[name] for name in BATCHES[:-1]})
        refused("a missing batch is refused", "test_batch", lambda: load(path))
        write_archive(path, {**batches, "data_batch_2": b"cos\nsystem\n(S'touch evil'\ntR."})
        refused("a pickle that calls a program is refused", "os.system", lambda: load(path))
        write_archive(path, {**batches, "data_batch_3": batches["data_batch_3"][:-1000]})
        refused("a pickle cut short is refused", "data_batch_3", lambda: load(path))
        write_archive(path, {**batches, "test_batch": python2_pickle(pictures[:n], [10] * n)})
        refused("a label of 10 is refused", "labels 0 .. 9", lambda: load(path))
    print("%s" % ("all passed" if not failures else "%d FAILED" % failures))
    return 1 if failures else 0


def main():
    parser = fm.parse_arguments(
        __doc__.split("\n\n")[0],
        "examples:\n"
        "  python3 data/cifar10.py --train --source cifar-10-python.tar.gz    the first time\n"
        "  python3 data/cifar10.py --self-test    on a miniature archive of its own\n",
        "cifar-10-python.tar.gz", ("FILE", "the public archive [%(default)s]"))
    parser.add_argument("--self-test", action="store_true", help="test the script on a miniature archive")
    args = parser.parse_args()
    return self_test() if args.self_test else fm.build(cifar(PER_BATCH), load_cifar, ABOUT, args)


if __name__ == "__main__":
    fm.run("cifar10.py", main)
