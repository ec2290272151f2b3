#!/usr/bin/env python3
"""Muon's polynomial, drawn and tabled: how far five Newton-Schulz steps bring singular values to 1.

  python3 dev/muon.py             the table of dev/README.md: what comes of matrices of known condition
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
    if parser.parse_args().picture:
        picture(os.path.join(os.path.dirname(os.path.abspath(__file__)), "pictures", "muon.png"))
    else:
        table()

if __name__ == "__main__":
    main()
