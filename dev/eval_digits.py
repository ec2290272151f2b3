#!/usr/bin/env python3
"""Scores sampled digits: is each the digit that was asked for, and are they new and varied?

Two judges saw only the training split of data/digits.safetensors: a support vector machine on the pixels,
which shares nothing with the model and decides, and the classifier of the frozen encoder that the model was
aligned with, as a second opinion. Held-out digits show what real ones reach, so the score is a ratio: share
of samples judged to be the digit asked for / held-out accuracy.

Being right is not enough: copies of training digits are right, and so is one perfect picture per digit. So
two distances are held against those of the held-out digits, which are neither copies nor all alike. They do
not change the exit status: what is too near depends on how long was trained, so read them.

A file is a safetensors file with `latents` [N,1,8,8] (U8, F16, F32 or F64) and `labels` [N] (any integers).
Metadata `space` = `model`: values are model inputs, and raw = (value - latent_offset) / latent_scale, by the
metadata or else the digits' own -1 and 0.125. Otherwise values are raw: 0 (paper) .. 16 (ink).
"""

import argparse
import os
import sys

sys.dont_write_bytecode = True      # importing data/digits.py must not litter data/
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "data"))
import digits                       # noqa: E402  (it also says what to install when numpy is missing)
import numpy as np                  # noqa: E402

MIN_JUDGE = 0.97                    # a judge worse than this on real digits has no say


def distances(a, b):
    """Euclidean distances [len(a), len(b)] between pictures [*,64] in raw units."""
    squares = (a * a).sum(1)[:, None] + (b * b).sum(1)[None] - 2 * (a @ b.T)
    return np.sqrt(np.maximum(squares, 0))


def spread(x, labels):
    """Mean distance between two pictures of the same digit, averaged over digits; NaN where none comes twice.

    Unlike a nearest neighbour's distance, a mean over pairs does not depend on how many there are."""
    means = []
    for c in range(digits.CLASSES):
        own = x[labels == c]
        if len(own) > 1:
            means.append(distances(own, own).sum() / (len(own) * (len(own) - 1)))
    return np.mean(means) if means else np.nan


def read_samples(path):
    """(raw pictures [N,64] in doubles, not clipped, labels [N]) of a file; ValueError says what is wrong."""
    tensors, metadata = digits.read_safetensors(path)
    for name in ("latents", "labels"):
        if name not in tensors:
            raise ValueError("%s: there is no tensor %s" % (path, name))
    x, labels = tensors["latents"].astype(np.float64), tensors["labels"].astype(np.int64)
    if x.ndim != 4 or x.shape[1:] != (1, 8, 8) or labels.shape != x.shape[:1] or not len(x):
        raise ValueError("%s: latents are %s and labels %s; expected [N,1,8,8] and [N] with N > 0"
                         % (path, list(x.shape), list(labels.shape)))
    if not np.isfinite(x).all():
        raise ValueError("%s: %d values of latents are not finite" % (path, (~np.isfinite(x)).sum()))
    if labels.min() < 0 or labels.max() >= digits.CLASSES:
        raise ValueError("%s: labels reach from %d to %d; only samples that were asked to be 0 .. 9 can be "
                         "scored" % (path, labels.min(), labels.max()))
    if metadata.get("space") == "model":
        offset = float(metadata.get("latent_offset", digits.OFFSET))
        x = (x - offset) / float(metadata.get("latent_scale", digits.SCALE))
    elif x.max() < 4:
        raise ValueError("%s: no value reaches 4, so these are hardly raw values of 0 .. 16; if they are "
                         "model inputs, the metadata must say space = model" % path)
    return x.reshape(-1, 64), labels


def score(path, real, labels, train, judges, require):
    """Prints the report on one file. True when it reaches the ratio required."""
    x, asked = read_samples(path)
    outside = np.mean((x < 0) | (x > 16))
    x = np.clip(x, 0, 16)
    n, nearest = len(x), distances(x, real[:train]).min(1)
    copies = int((nearest == 0).sum())                  # no held-out digit is one
    if copies:
        raise ValueError("%s: %d of its %d pictures are training digits, to the last bit; only samples can be "
                         "scored" % (path, copies, n))
    print("%s: %d samples, %.1f %% of their pixels clipped to 0 .. 16" % (path, n, 100 * outside))
    print("  judge            held-out   samples             ratio")
    ratios = []
    for name, held_out, judge in judges:
        right = judge(x) == asked
        share = right.mean()
        ratios.append((share / held_out, right))
        print("  %-15s  %6.2f %%   %6.2f %% +- %4.2f   %7.3f" % (
            name, 100 * held_out, 100 * share, 100 * np.sqrt(share * (1 - share) / n), share / held_out))
    ratio, right = ratios[0]
    present = [c for c in range(digits.CLASSES) if (asked == c).any()]
    print("  digit            " + "".join("%6d" % c for c in present))
    print("  samples of it    " + "".join("%6d" % (asked == c).sum() for c in present))
    print("  right, %         " + "".join("%6.1f" % (100 * right[asked == c].mean()) for c in present))

    nearest_real = distances(real[train:], real[:train]).min(1)
    close = np.quantile(nearest_real, 0.01)
    between_real, between = spread(real[train:], labels[train:]), spread(x, asked)
    print("  distance (raw)                                     held-out   samples   ratio")
    for what, a, b in (("to the nearest training digit, median", np.median(nearest_real), np.median(nearest)),
                       ("between two of the same digit, mean", between_real, between)):
        print("  %-48s  %9.2f %9.2f  %6.2f" % (what, a, b, b / a))
    print("  nearer to a training digit than %.2f              %8.1f %% %7.1f %%   (many: memorised)" % (
        close, 100 * np.mean(nearest_real < close), 100 * np.mean(nearest < close)))
    good = bool(ratio >= require)
    print("  %s: ratio %.3f by the %s, %.3f required"
          % ("passed" if good else "FAILED", ratio, judges[0][0], require))
    return good


def main():
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__,
        epilog="examples:\n"
               "  python3 dev/eval_digits.py samples.safetensors\n"
               "  python3 dev/eval_digits.py --require 0.9 early.safetensors late.safetensors\n\n"
               "exit status: 0 when every file reaches the ratio, 1 when one does not, 2 when one cannot be\n"
               "scored")
    parser.add_argument("files", nargs="+", metavar="FILE", help="samples to score")
    parser.add_argument("--require", type=float, default=0.97, metavar="R",
                        help="ratio that every file must reach (default 0.97)")
    args = parser.parse_args()
    try:
        from sklearn.svm import SVC
    except ImportError:
        sys.exit("eval_digits.py: %s has no scikit-learn; on Debian: apt-get install python3-sklearn, then "
                 "/usr/bin/python3 %s" % (sys.executable, sys.argv[0]))

    try:
        tensors, metadata = digits.read_safetensors(digits.SHARD)
        weights = {k: v.astype(np.float64) for k, v in digits.read_safetensors(digits.ENCODER)[0].items()}
        real = tensors["latents"].reshape(-1, 64).astype(np.float64)
        labels = tensors["labels"].astype(np.int64)
        train = int(metadata["train_samples"])
        svm = SVC(kernel="rbf", gamma=0.001, C=10).fit(real[:train], labels[:train])
        judges = []
        for name, judge in (("pixel SVM", svm.predict),
                            ("encoder's head", lambda x: digits.classify(digits.model_input(x), weights))):
            judges.append((name, float(np.mean(judge(real[train:]) == labels[train:])), judge))
            if not judges[-1][1] >= MIN_JUDGE:
                raise ValueError("the %s is right on only %.2f %% of the held-out digits" % (
                    name, 100 * judges[-1][1]))
        results = [score(path, real, labels, train, judges, args.require) for path in args.files]
    except (OSError, ValueError, KeyError) as error:
        print("eval_digits.py: %s" % error, file=sys.stderr)
        return 2
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
