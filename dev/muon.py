#!/usr/bin/env python3
"""Muon's polynomial, drawn and tabled: how far five Newton-Schulz steps bring singular values to 1.

  python3 dev/muon.py             the table of dev/README.md: what comes of matrices of known condition
  python3 dev/muon.py --bf16      the one of the Gram form in bf16: how often X and R have to be made anew
  python3 dev/muon.py --flop      FLOP of a step of B/1
  python3 dev/muon.py --picture   draws dev/pictures/muon.png: a singular value after 1 to 5 steps

The picture needs matplotlib, both need numpy. The coefficients are those of train_srdit.c (newton_schulz),
and, to compare, Polar Express's five (arXiv 2505.16932), with its margin of 1.02 on the norm.
"""
import argparse, os, sys
try:
    import numpy as np
except ImportError as e:
    sys.exit(f"error: {e}: pip install numpy, or apt install python3-numpy and run this with /usr/bin/python3")

CLASSIC = [(3.4445, -4.7750, 2.0315)] * 5
POLAR = [(8.156554524902461, -22.48329292557795, 15.878769915207462),
         (4.042929935166739, -2.808917465908714, 0.5000178451051316),
         (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
         (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
         (2.3465413258596377, -1.7097828382687081, 0.42323551169305323)]

def plain(x, poly):                             # x [m,n], m <= n
    for a, b, c in poly:
        r = x @ x.T
        x = a * x + (b * r + c * r @ r) @ x
    return x

def gram(x, poly):                              # the same by way of the small r alone
    r, q = x @ x.T, np.eye(len(x), dtype=x.dtype)
    for a, b, c in poly:
        p = a * np.eye(len(x), dtype=x.dtype) + b * r + c * r @ r
        q, r = p @ q, p @ r @ p
    return q @ x

def matrix(rng, condition, m=192, n=768):       # singular values from 1 to 1/condition, evenly in their logs
    u, v = (np.linalg.qr(rng.standard_normal((k, m)))[0] for k in (m, n))
    return u * condition ** -np.linspace(0, 1, m) @ v.T

def table():
    rng = np.random.default_rng(1)
    print("| condition | classic, double | classic, float | the same, Gram form | Polar Express, double |")
    print("| --- | --- | --- | --- | --- |")
    for condition in (1, 10, 100, 1e3, 1e4, 1e6):
        x, cells = matrix(rng, condition), []
        for form, poly, dtype, margin in ((plain, CLASSIC, "f8", 1), (plain, CLASSIC, "f4", 1),
                                          (gram, CLASSIC, "f4", 1), (plain, POLAR, "f8", 1.02)):
            y = form((x / (margin * np.linalg.norm(x))).astype(dtype), poly).astype("f8")
            s = np.linalg.svd(y, compute_uv=False)
            cells.append(f"{s.min():.3f} {np.median(s):.3f} {s.max():.3f}")
        print(f"| {condition:g} | " + " | ".join(cells) + " |", flush=True)

def bf16(x):                                    # rounded to 8 bits of mantissa, to even
    u = x.astype("f4").view("u4")
    return ((u + 0x7fff + (u >> 16 & 1)) & 0xffff0000).astype("u4").view("f4")

def product(x, y):                              # as the tensor cores': sums in float, the result stored
    return bf16(x @ y)

def in_bf16(x, poly, anew):                     # the Gram form, X and R made anew before the steps `anew`
    x, q, one = bf16(x), None, np.eye(len(x), dtype="f4")
    for k, (a, b, c) in enumerate(poly):
        if k in anew:
            x = x if q is None else product(q, x)
            r, q = product(x, x.T), None
        p = bf16(a * one + b * r + c * product(r, r))
        q = p if q is None else product(p, q)
        r = product(product(p, r), p)
    return product(q, x)

# Where X and R are made anew, steps counted from 1: always (the plain form), at the start, and so on
ANEW = {"plain": range(5), "1": (0,), "1, 3": (0, 2), "1, 4": (0, 3), "1, 2, 4": (0, 1, 3),
        "1, 3, 4": (0, 2, 3)}

def table_bf16():
    rng, m, n = np.random.default_rng(1), 192, 768
    matrices = {"Gaussian": rng.standard_normal((m, n)),
                "8 directions, noise": rng.standard_normal((m, 8)) @ rng.standard_normal((8, n))
                                       + 0.3 * rng.standard_normal((m, n)),
                "a third of the rows x 100": rng.standard_normal((m, n))
                                             * np.where(np.arange(m) < m // 3, 100, 1)[:, None]}
    matrices.update({f"condition {c:g}": matrix(rng, c) for c in (10, 100, 1e3, 1e4, 1e6)})
    print("| matrix | " + " | ".join(ANEW) + " |\n| --- |" + " ---: |" * len(ANEW))
    for name, x in matrices.items():
        x = bf16(x / np.linalg.norm(x))
        want = plain(x.astype("f8"), CLASSIC)
        off = [np.linalg.norm(in_bf16(x, CLASSIC, anew) - want) / np.linalg.norm(want)
               for anew in ANEW.values()]
        print(f"| {name} | " + " | ".join(f"{e:.3f}" for e in off) + " |", flush=True)

def flop(m, n, anew=None):                      # of the plain form, or of Gram's where that is shorter
    m, n = min(m, n), max(m, n)
    if anew is None or 2 * n <= 3 * m:
        return 5 * (4 * m * m * n + 2 * m ** 3)
    times = len(anew)                           # R and Q X each time; P Q and P R P within; R R
    return times * 4 * m * m * n + (5 - times) * 6 * m ** 3 + 10 * m ** 3

def table_flop():
    D, M, K, W, X = 768, 2048, 1001, 256, 32    # of B/1, on latents of 32 channels
    split = [(D, D)] * 12 * 4 + [(4 * D, D)] * 12 * 2 + [(D, 2 * D)]
    every = [(3 * D, D), (D, D), (4 * D, D), (D, 4 * D), (6 * D, D)] * 12 + [(D, 2 * D), (2 * D, D)]
    every += [(M, D), (M, M), (D, M), (D, X), (X, D), (D, D), (D, D), (D, D), (D, W), (K, D), (1, D)]
    print("| TFLOP a step | split | srdit13 |\n| --- | ---: | ---: |")
    for name, anew in (("plain", None), ("Gram form, float", (0,)), ("Gram form, bf16", (0, 2, 3))):
        sums = [sum(flop(*shape, anew) for shape in shapes) / 1e12 for shapes in (split, every)]
        print(f"| {name} | " + " | ".join(f"{x:.2f}, {100 * x / 20.9:.1f} %" for x in sums) + " |")

def picture(path):
    try:
        import matplotlib
    except ImportError as e:
        sys.exit(f"error: {e}: pip install matplotlib, or apt install python3-matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    s = y = np.logspace(-3.5, 0, 1000)
    fig, axes = plt.subplots(figsize=(6, 3.4), dpi=80)
    axes.axhline(1, color="0.8", linewidth=1)
    for k, (a, b, c) in enumerate(CLASSIC):
        y = a * y + b * y ** 3 + c * y ** 5
        axes.semilogx(s, y, label=f"{k + 1} step" + "s" * (k > 0), color=plt.cm.viridis(k / 5))
    axes.set(xlabel="singular value before", ylabel="after", ylim=(0, 1.3))
    axes.legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(path)
    print(f"{path}  {os.path.getsize(path):,} bytes")

def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--picture", action="store_true", help="draw dev/pictures/muon.png")
    parser.add_argument("--bf16", action="store_true", help="the table of the Gram form in bf16")
    parser.add_argument("--flop", action="store_true", help="the table of FLOP")
    args = parser.parse_args()
    if args.bf16:
        table_bf16()
    elif args.flop:
        table_flop()
    elif args.picture:
        picture(os.path.join(os.path.dirname(os.path.abspath(__file__)), "pictures", "muon.png"))
    else:
        table()

if __name__ == "__main__":
    main()
