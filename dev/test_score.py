#!/usr/bin/env python3
"""Tests of dev/lib/score.h: every score against numpy and scipy, against closed forms, for any number of
threads, and on bad input; the judge against its layers in numpy.

  /usr/bin/python3 dev/test_score.py              needs cc, numpy and scipy (Debian: python3-scipy)
  /usr/bin/python3 dev/test_score.py --mutants    breaks score.h in many ways; the tests must notice each
  /usr/bin/python3 dev/test_score.py --mutants kernel    only those with "kernel" in their names

The programs are built in a temporary folder, by CC if it is set: CC="gcc -fsanitize=address,undefined" finds
wild pointers. The exit status tells.
"""
import argparse, json, math, os, re, shutil, subprocess, sys, tempfile
try:
    import numpy as np
    import scipy.linalg, scipy.spatial.distance
except ImportError as error:
    sys.exit("test_score.py: %s (%s); on Debian: apt-get install python3-scipy, then /usr/bin/python3 %s"
             % (sys.executable, error, sys.argv[0]))

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.dont_write_bytecode = True      # importing data/digits.py must not litter data/
sys.path.insert(0, os.path.join(ROOT, "data"))
import digits                       # noqa: E402

EXACT = 1e-9        # relative, for results in double of well-conditioned input
CLOSED = 1e-12      # where the exact result is known
os.environ["OMP_WAIT_POLICY"] = "passive"
os.environ.pop("OMP_NUM_THREADS", None)
passed, failed, used = 0, [], {}


def check(what, good, detail=""):
    global passed
    if good:
        passed += 1
    else:
        failed.append(what)
        if options.mutants is None:
            print("FAIL %s %s" % (what, str(detail)[-400:]))


def close(what, got, want, tol, scale=None):
    """|got - want| <= tol * scale, scale being the largest magnitude wanted; keeps the largest share used"""
    got, want = np.asarray(got, float), np.asarray(want, float)
    if got.shape != want.shape:
        return check(what, False, "%s where %s is expected" % (got.shape, want.shape))
    scale = np.abs(want).max() if scale is None else scale
    error = np.abs(got - want).max() / (scale if scale else 1)
    if error > used.get(tol, (-1, ""))[0]:
        used[tol] = error, what
    check(what, error <= tol, "got %s, want %s, off by %.2g, allowed %.2g" % (
        got.ravel()[:3], want.ravel()[:3], error, tol))


# ------------------------------------------------------------------------------------------------------------
# running the program

def build(name, *flags, source=os.path.join(ROOT, "dev", "score_check.c")):
    compiler = os.environ.get("CC", "cc").split()
    r = subprocess.run([*compiler, "-std=gnu11", "-fno-math-errno", "-Wall", "-Wextra", "-Werror", *flags,
                        source, "-o", name, "-lm"], stderr=subprocess.PIPE, universal_newlines=True)
    if r.returncode:
        sys.exit("test_score.py: %s does not build: %s" % (name, r.stderr[-2000:]))
    return os.path.abspath(name)


def call(*words, program=None, threads=2):
    return subprocess.run([program or PROGRAM] + [str(w) for w in words], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, universal_newlines=True,
                          env=dict(os.environ, OMP_NUM_THREADS=str(threads)))


def numbers(text):
    """'name value' and 'name.index value' lines as a dictionary of numbers and arrays"""
    out = {}
    for line in text.splitlines():
        key, value = line.split()
        name, _, index = key.partition(".")
        if index:
            out.setdefault(name, []).append(float(value))
        else:
            out[name] = float(value)
    return {k: np.array(v) if isinstance(v, list) else v for k, v in out.items()}


def write(path, tensors, metadata={}):
    order = sorted(tensors, key=lambda k: -np.asarray(tensors[k]).dtype.itemsize)
    with open(path, "wb") as f:
        f.write(digits.to_safetensors({k: np.asarray(tensors[k]) for k in order}, metadata))


def scores(_few=False, **sets):
    write("sets.safetensors", sets, {"few": "1"} if _few else {})
    r = call("scores", "sets.safetensors")
    if r.returncode:
        check("scores of %s" % {k: np.shape(v) for k, v in sets.items()}, False, r.stderr)
        return {}
    return numbers(r.stdout)


def bad(what, pattern, *words):
    """One sentence on stderr that matches, and a non-zero exit"""
    r = call(*words)
    check(what, r.returncode == 1 and re.search(pattern, r.stderr) and r.stderr.startswith("error: ") and
          r.stderr.count("\n") == 1, (r.returncode, r.stderr, r.stdout[-100:]))


# ------------------------------------------------------------------------------------------------------------
# the definitions, in numpy and scipy

def frechet_by_sqrtm(a, b):
    s1, s2 = np.atleast_2d(np.cov(a.T)), np.atleast_2d(np.cov(b.T))
    shift = a.mean(0) - b.mean(0)
    return shift @ shift + np.trace(s1 + s2) - 2 * np.trace(scipy.linalg.sqrtm(s1 @ s2).real)


def frechet_by_data(a, b):
    """tr (S1 S2)^(1/2) is the sum of the singular values of A B^T for centred data A, B: no root of a matrix,
    so that it holds to the last digits for fewer rows than columns, too."""
    x, y, shift = a - a.mean(0), b - b.mean(0), a.mean(0) - b.mean(0)
    n, m = len(a) - 1, len(b) - 1
    cross = scipy.linalg.svdvals(x @ y.T).sum() / math.sqrt(n * m)
    return shift @ shift + (x * x).sum() / n + (y * y).sum() / m - 2 * cross


def kernel(a, b):
    return (a @ b.T / a.shape[1] + 1) ** 3


def kernel_distance(a, b):
    n, m = len(a), len(b)
    aa, bb = kernel(a, a), kernel(b, b)
    return ((aa.sum() - np.trace(aa)) / (n * (n - 1)) + (bb.sum() - np.trace(bb)) / (m * (m - 1)) -
            2 * kernel(a, b).mean())


def precision_recall(made, real, k=3):
    def inside(x, y):
        radius = np.sort(scipy.spatial.distance.cdist(y, y), 1)[:, k]      # place 0 is the row itself
        return (scipy.spatial.distance.cdist(x, y) <= radius).any(1).mean()
    return inside(made, real), inside(real, made)


def sliced(a, b, theta):
    both = math.lcm(len(a), len(b)) if hasattr(math, "lcm") else len(a) * len(b) // math.gcd(len(a), len(b))
    x = np.repeat(np.sort(a @ theta.T, 0), both // len(a), 0)
    y = np.repeat(np.sort(b @ theta.T, 0), both // len(b), 0)
    return ((x - y) ** 2).mean()


def philox_directions(count, d, seed):
    """random.h's Philox4x32-10 and Box-Muller, over arrays"""
    block = np.arange((d + 3) // 4, dtype=np.uint64)
    c = [np.broadcast_to(block, (count, len(block))), np.broadcast_to(
        np.arange(count, dtype=np.uint64)[:, None], (count, len(block))), np.uint64(0), np.uint64(0)]
    low, k = np.uint64(0xffffffff), [seed & 0xffffffff, seed >> 32]
    for _ in range(10):
        p, q = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [q >> np.uint64(32) ^ c[1] ^ np.uint64(k[0]), q & low,
             p >> np.uint64(32) ^ c[3] ^ np.uint64(k[1]), p & low]
        k = [(k[0] + 0x9E3779B9) & 0xffffffff, (k[1] + 0xBB67AE85) & 0xffffffff]
    z = []
    for u, v in ((c[0], c[1]), (c[2], c[3])):
        r = np.sqrt(-2 * np.log(((u >> np.uint64(8)) + np.uint64(1)).astype(float) / 2 ** 24))
        angle = 2 * np.pi * (v >> np.uint64(8)).astype(float) / 2 ** 24
        z += [r * np.cos(angle), r * np.sin(angle)]
    z = np.stack(z, 2).reshape(count, -1)[:, :d]
    return z / np.sqrt((z * z).sum(1, keepdims=True))


def whitened(rng, n, d):
    """n rows with mean 0 and covariance 1, exactly"""
    x = rng.standard_normal((n, d))
    x -= x.mean(0)
    q, _ = np.linalg.qr(x)
    q -= q.mean(0)
    return q * math.sqrt(n - 1)


# ------------------------------------------------------------------------------------------------------------
# tests

def compare(what, a, b):
    """All scores of two sets against their definitions"""
    few = min(len(a), len(b)) < 4
    s = scores(_few=few, made=a, real=b)
    if not s:
        return s
    d, traces = a.shape[1], a.var(0).sum() + b.var(0).sum()
    close(what + ": mean", s["mean"], a.mean(0), CLOSED, np.abs(a).max())
    close(what + ": covariance", s["cov"].reshape(d, d), np.atleast_2d(np.cov(a.T)), CLOSED)
    close(what + ": Frechet distance, by the data", s["frechet"], frechet_by_data(a, b), EXACT)
    if min(len(a), len(b)) > 2 * d:    # sqrtm of singular matrices is good to 1e-7 only
        close(what + ": Frechet distance, by sqrtm", s["frechet"], frechet_by_sqrtm(a, b), EXACT)
    close(what + ": kernel distance", s["kernel"], kernel_distance(a, b), CLOSED, kernel(b, b).mean())
    theta = s["theta"].reshape(-1, d)
    close(what + ": directions", theta, philox_directions(len(theta), d, 1234), 1e-6)
    close(what + ": directions have length 1", (theta * theta).sum(1), np.ones(len(theta)), CLOSED)
    close(what + ": sliced distance", s["sliced"], sliced(a, b, theta), CLOSED)
    if not few:
        want = precision_recall(a, b)
        check(what + ": precision", s["precision"] == want[0], (s["precision"], want))
        check(what + ": recall", s["recall"] == want[1], (s["recall"], want))
    return s


def test_against_scipy():
    rng = np.random.default_rng(1)
    for n, m, d in ((300, 200, 16), (1000, 777, 50), (65, 64, 7), (129, 400, 1), (100, 4, 3), (300, 300, 64),
                    (1100, 1060, 512)):
        mix = rng.standard_normal((d, d)) / math.sqrt(d)
        a = rng.standard_normal((n, d)) * np.linspace(1, 0.3, d)
        b = rng.standard_normal((m, d)) @ mix + 0.3 * rng.standard_normal(d)
        compare("%d and %d of %d" % (n, m, d), a, b)
    a, b = rng.standard_normal((500, 20)), rng.standard_normal((400, 20)) * 1.05 + 0.02
    compare("near sets", a, b)
    compare("far from 0", a + 30, b + 30)
    compare("graded", a * 10.0 ** -np.arange(0, 5, 0.25), b * 10.0 ** -np.arange(0, 5, 0.25))
    for scale in (1e-90, 1e45):        # squares of covariances leave the range of a double
        got = scores(made=a * scale, real=b * scale)
        if got:
            close("Frechet distance scaled by %g" % scale, got["frechet"] / scale / scale,
                  frechet_by_data(a, b), EXACT)


def test_few_rows():
    rng = np.random.default_rng(2)
    for n, m, d in ((2, 2, 5), (2, 2, 1), (3, 2, 40), (20, 30, 64), (30, 200, 64), (64, 64, 64),
                    (33, 31, 512)):
        compare("rank: %d and %d of %d" % (n, m, d), rng.standard_normal((n, d)),
                rng.standard_normal((m, d)) + 0.1)
    a, b = rng.standard_normal((100, 4)), rng.standard_normal((80, 4)) + 0.2
    up = np.linalg.qr(rng.standard_normal((30, 4)))[0].T       # four dimensions, turned into thirty
    s, flat = scores(made=a @ up, real=b @ up), scores(made=a, real=b)
    close("turned into more dimensions: Frechet distance", s["frechet"], flat["frechet"], EXACT)
    check("turned: precision and recall",
          (s["precision"], s["recall"]) == (flat["precision"], flat["recall"]))
    other = np.linalg.qr(rng.standard_normal((60, 60)))[0]
    a, b = a @ other[:4], b @ other[30:34]                      # orthogonal subspaces: no cross term
    close("orthogonal subspaces", scores(made=a, real=b)["frechet"],
          ((a.mean(0) - b.mean(0)) ** 2).sum() + a.var(0, ddof=1).sum() + b.var(0, ddof=1).sum(), CLOSED)
    s = scores(made=np.ones((5, 3)), real=np.zeros((6, 3)))     # no covariance at all
    check("constant sets", s["frechet"] == 3 and s["kernel"] == 7 and s["precision"] == s["recall"] == 0, s)


def test_closed_forms():
    rng = np.random.default_rng(3)
    for n, d in ((300, 8), (1000, 96)):
        a, b = whitened(rng, n, d), whitened(rng, n + 50, d)
        q = np.linalg.qr(rng.standard_normal((d, d)))[0]
        s1, s2, shift = rng.uniform(0.1, 3, d), rng.uniform(0.1, 3, d), rng.standard_normal(d)
        got = scores(made=a * s1 @ q, real=b * s2 @ q + shift)
        close("two Gaussians, %d" % d, got["frechet"], shift @ shift + ((s1 - s2) ** 2).sum(), CLOSED)
        got = scores(made=a, real=a + shift)
        theta = got["theta"].reshape(-1, d)
        close("a shift: Frechet distance, %d" % d, got["frechet"], shift @ shift, CLOSED, shift @ shift + d)
        close("a shift: sliced distance, %d" % d, got["sliced"], ((theta @ shift) ** 2).mean(), CLOSED)
    for n, d in ((50, 3), (500, 64), (40, 64), (2, 9)):
        a = rng.standard_normal((n, d)) + 5
        got = scores(_few=n < 4, made=a, real=a)
        close("identical sets: Frechet distance, %d of %d" % (n, d), got["frechet"], 0, 1e-13, a.var(0).sum())
        check("identical sets: sliced distance", got["sliced"] == 0, got["sliced"])
        close("identical sets: kernel distance", got["kernel"], kernel_distance(a, a), CLOSED,
              kernel(a, a).mean())
        if n >= 4:
            check("identical sets: precision and recall", got["precision"] == got["recall"] == 1)
            got = scores(made=a, real=a[rng.permutation(n)])
            check("another order: precision and recall", got["precision"] == got["recall"] == 1)
            close("another order: Frechet distance", got["frechet"], 0, 1e-13, a.var(0).sum())
    a, b = rng.standard_normal((200, 10)), rng.standard_normal((200, 10)) + 100
    got = scores(made=a, real=b)
    check("disjoint sets: precision and recall", got["precision"] == got["recall"] == 0)
    # by hand: k(0,1) = 1, k(2,3) = 343, k(0,2) + k(0,3) + k(1,2) + k(1,3) = 1 + 1 + 27 + 64
    got = scores(_few=True, made=np.array([[0.], [1.]]), real=np.array([[2.], [3.]]))
    check("by hand: kernel distance", got["kernel"] == 297.5, got["kernel"])
    check("by hand: sliced distance", got["sliced"] == 4, got["sliced"])
    check("by hand: Frechet distance", abs(got["frechet"] - 4) < 1e-14, got["frechet"])
    # by hand, k = 3: the balls of 0, 1, 2, 3 and 10 reach 3, 2, 2, 3 and 9 far; those of -4, 8 ... are tight
    line = np.array([[0.], [1], [2], [3], [10]])
    got = scores(made=np.array([[-2.9], [-3.1], [6], [6.1], [0.9]]), real=line)
    check("by hand: precision", got["precision"] == 0.8, got["precision"])     # all but -3.1
    # the balls of 0 ... 4 reach 3, 2, 2, 2 and 3 far, and their rims belong to them
    got = scores(made=np.array([[-3.], [-4], [7], [8]]), real=np.array([[0.], [1], [2], [3], [4]]))
    check("by hand: rims", got["precision"] == 0.5, got["precision"])
    # four equal pictures have balls of no size, and the ball of 3 reaches 97 far: 0, 1, 2, 3, 10 lie in it
    got = scores(made=line, real=np.array([[100.], [100], [100], [100], [3]]))
    check("by hand: balls of no size", got["precision"] == 1 and got["recall"] == 0.2, got)
    x = rng.standard_normal((1, 7)).repeat(6, 0)
    got = scores(made=np.concatenate([x, x + 1]), real=x)
    check("equal pictures lie in each other's balls", got["precision"] == 0.5 and got["recall"] == 1, got)


def test_memorisation():
    rng = np.random.default_rng(4)
    train, held, made = (rng.standard_normal((n, 48)) for n in (700, 301, 400))
    made[:30] = train[:30]                                      # copies
    made[30:60] = train[30:60] + 1e-7 * rng.standard_normal((30, 48))
    for offset in (0, 1000):                        # far from 0, where |x|^2 - 2xy + |y|^2 cancels
        a, b, c = made + offset, held + offset, train + offset
        s = scores(made_pixels=a, held_pixels=b, train_pixels=c)
        want = scipy.spatial.distance.cdist(a, c).min(1)
        other = scipy.spatial.distance.cdist(b, c).min(1)
        close("nearest, offset %d" % offset, s["nearest"], want, CLOSED)
        close("nearest in parts, offset %d" % offset, s["nearest_in_parts"], want, CLOSED)
        check("copies are at 0", (s["nearest"][:30] == 0).all() and (s["nearest_in_parts"][:30] == 0).all())
        close("near copies, each by itself", s["nearest"][30:60] / want[30:60], np.ones(30), 1e-9)
        close("ratio of medians", s["ratio"], np.median(want) / np.median(other), CLOSED)
        check("share nearer than the first percentile",
              s["nearer"] == (want < np.quantile(other, 0.01)).mean(), s["nearer"])
    spots = 10 * rng.standard_normal((8, 12)).repeat(4, 1)      # each with distances that float cannot tell apart
    far = rng.standard_normal((8, 40, 12)).repeat(4, 2)
    far *= (5 + 1e-9 * np.arange(40)[:, None]) / np.linalg.norm(far, axis=2, keepdims=True)
    s = scores(made_pixels=spots, held_pixels=held, train_pixels=(spots[:, None] + far).reshape(-1, 48))
    close("nearest of nearly equal distances", s["nearest"], np.full(8, 5.), CLOSED)
    for size in (1e-30, 1e30):                                  # beyond what float holds
        s = scores(made_pixels=made * size, held_pixels=held * size, train_pixels=train * size)
        want = scipy.spatial.distance.cdist(made, train).min(1)
        close("nearest of numbers times %g" % size, s["nearest"][30:] / size, want[30:], 1e-9)
    x = np.round(rng.standard_normal((64, 30)))                 # many equal distances
    s = scores(made_pixels=x, held_pixels=x[:1] + 7, train_pixels=x[:5])
    close("nearest of whole numbers", s["nearest"], scipy.spatial.distance.cdist(x, x[:5]).min(1), CLOSED)


def test_accuracy():
    rng = np.random.default_rng(5)
    logits, wanted = rng.standard_normal((333, 10)), rng.integers(0, 10, 333).astype(np.int32)
    check("label accuracy",
          scores(logits=logits, wanted=wanted)["accuracy"] == (logits.argmax(1) == wanted).mean())
    equal = np.zeros((4, 3))
    check("of equal logits the first counts",
          scores(logits=equal, wanted=np.array([0, 0, 1, 2], np.int32))["accuracy"] == 0.5)


def test_threads():
    rng = np.random.default_rng(6)
    write("sets.safetensors", dict(
        made=rng.standard_normal((1000, 51)), real=rng.standard_normal((777, 51)),
        made_pixels=rng.standard_normal((300, 99)), held_pixels=rng.standard_normal((131, 99)),
        train_pixels=rng.standard_normal((517, 99)), logits=rng.standard_normal((50, 10)),
        wanted=np.arange(50, dtype=np.int32) % 10))
    seen = {call("scores", "sets.safetensors", threads=t).stdout for t in (1, 2, 3, 7)}
    check("the same bits for 1, 2, 3 and 7 threads", len(seen) == 1 and len(seen.pop()) > 1000)
    words = ["judge", digits.ENCODER, digits.SHARD, 100]
    seen = {call(*words, threads=t).stdout for t in (1, 2, 3, 7)}
    check("the judge: the same bits for 1, 2, 3 and 7 threads", len(seen) == 1 and len(seen.pop()) > 1000)
    # `real` is float in one program and double in the other, and no score may know
    for words in (["scores", "sets.safetensors"], words):
        check("%s: the same bits where real is double" % words[0],
              call(*words).stdout == call(*words, program=DOUBLE).stdout)
        other, mine = numbers(call(*words, program=PLAIN).stdout), numbers(call(*words).stdout)
        for name in mine:              # other vectors, no FMA, no OpenMP: other roundings
            if isinstance(mine[name], float) or name in ("cov", "features", "logits", "nearest"):
                close("plain build: %s" % name, other.get(name, np.nan), mine[name], EXACT,
                      {"kernel": 1}.get(name))


def plain_judge(x, w, convs, quarters=False, vector="features", head="features_logits"):
    """The judge's layers, pictures [B,S,S,C] -> (features, logits)"""
    for i, (kernel, stride, padding) in enumerate(convs):
        x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
        side = (x.shape[1] - kernel) // stride + 1
        W, out = w["conv%d.weight" % (i + 1)].reshape(kernel, kernel, x.shape[3], -1), 0
        for r in range(kernel):
            for c in range(kernel):
                seen = x[:, r:r + stride * side:stride, c:c + stride * side:stride]
                out = out + seen[:, :side, :side] @ W[r, c]
        x = np.maximum(out + w["conv%d.bias" % (i + 1)], 0)
    if quarters:
        h = x.shape[1] // 2
        x = np.stack([x[:, i * h:i * h + h, j * h:j * h + h].mean((1, 2)) for i in (0, 1) for j in (0, 1)], 1)
    features = x.reshape(len(x), -1) @ w[vector + ".weight"] + w[vector + ".bias"]
    return features, features @ w[head + ".weight"] + w[head + ".bias"]


def shard_of(pictures, classes=10):
    """A shard of pictures [B,C,S,S] as they are"""
    write("shard.safetensors", {"latents": pictures, "labels": np.zeros(len(pictures), np.int32)},
          {"format": "srdit-data-1", "name": "test", "classes": "%d" % classes})


def judged(what, path, shard, n, want):
    r = call("judge", path, shard, n)
    if r.returncode:
        return check(what, False, r.stderr)
    got = numbers(r.stdout)
    for name, x in zip(("features", "logits"), want):
        close("%s: %s" % (what, name), got[name].reshape(len(x), -1), x, CLOSED)
    return got["logits"].reshape(len(want[1]), -1)


def random_judge(rng, size, channels, convs, widths, z=9, classes=4):
    w, side, c = {}, size, channels
    for i, ((kernel, stride, padding), out) in enumerate(zip(convs, widths)):
        w["conv%d" % (i + 1)] = (kernel * kernel * c, out)
        side, c = (side + 2 * padding - kernel) // stride + 1, out
    w.update(features=(side * side * c, z), features_logits=(z, classes), features_redraw=(z, 7))
    w = {k + end: (rng.standard_normal(s[1:] if end == ".bias" else s) / math.sqrt(s[0])).astype(np.float32)
         for k, s in w.items() for end in (".weight", ".bias")}
    meta = {"format": "srdit-judge-1", "name": "test", "size": "%d" % size, "channels": "%d" % channels,
            "classes": "%d" % classes, "convolutions": "%d" % len(convs)}
    for i, conv in enumerate(convs):
        for k, v in zip(("kernel", "stride", "padding"), conv):
            meta["conv%d.%s" % (i + 1, k)] = "%d" % v
    return w, meta


def doubles(w):
    return {k: v.astype(float) for k, v in w.items()}


def test_judge():
    w, meta = digits.read_safetensors(digits.ENCODER)
    tensors, about = digits.read_safetensors(digits.SHARD)
    x, train = digits.model_input(tensors["latents"]), int(about["train_samples"])
    features, logits = plain_judge(x, doubles(w), ((3, 1, 1),) * 3, True, "cls", "cls_head")
    logits = judged("digits", digits.ENCODER, digits.SHARD, 0, (features, logits[:, :10]))
    if logits is not None:
        right = logits.argmax(1) == tensors["labels"]
        check("held-out digits are read as digits.py says",
              "%.4f" % right[train:].mean() == meta["held_out_accuracy"], right[train:].mean())
        close("its features are the shard's CLS vectors", features, tensors["cls"], 1e-4)   # rounded to 2^-12
    rng = np.random.default_rng(7)
    for size, channels, convs, widths in (
            (28, 1, ((5, 2, 2), (3, 2, 1), (3, 1, 1), (3, 2, 1)), (32, 64, 64, 64)),
            (32, 3, ((4, 2, 1), (4, 4, 0), (1, 1, 0)), (17, 33, 5)),
            (9, 2, ((3, 2, 0), (7, 1, 3)), (3, 20)), (6, 3, (), ()), (5, 1, ((5, 1, 4), (9, 3, 0)), (4, 16))):
        w, meta = random_judge(rng, size, channels, convs, widths)
        write("judge.safetensors", w, meta)
        x = rng.uniform(-1, 1, (37, channels, size, size)).astype(np.float32)
        shard_of(x)
        judged("a judge of %d pixels, %s" % (size, convs), "judge.safetensors", "shard.safetensors", 0,
               plain_judge(x.astype(float).transpose(0, 2, 3, 1), doubles(w), convs))
    for path in ("fashion_mnist_judge", "cifar10_judge"):
        path = os.path.join(ROOT, "data", path + ".safetensors")
        if not os.path.exists(path):
            if options.mutants is None:
                print("note: %s is not there and not tested" % os.path.relpath(path, ROOT))
            continue
        w, meta = digits.read_safetensors(path)
        convs = [tuple(int(meta["conv%d.%s" % (i + 1, k)]) for k in ("kernel", "stride", "padding"))
                 for i in range(int(meta["convolutions"]))]
        size = int(meta["size"])
        x = rng.uniform(-1, 1, (64, int(meta["channels"]), size, size)).astype(np.float32)
        shard_of(x)
        judged(os.path.basename(path), path, "shard.safetensors", 0,
               plain_judge(x.astype(float).transpose(0, 2, 3, 1), doubles(w), convs))
    # what is wrong with a judge is said
    w, meta = random_judge(rng, 8, 1, ((3, 1, 1), (3, 2, 1)), (6, 5))
    shard_of(rng.uniform(-1, 1, (3, 1, 8, 8)).astype(np.float32))

    def broken(what, pattern, w=w, **change):
        write("judge.safetensors", w, {k: v for k, v in dict(meta, **change).items() if v is not None})
        bad("judge: " + what, pattern, "judge", "judge.safetensors", "shard.safetensors")

    broken("another format", "srdit-teacher-1, and a judge's is", format="srdit-teacher-1")
    broken("no format", "not given", format=None)
    broken("no size", "size is 0", size=None)
    broken("another size", "features.weight: not the weights", size="12")
    broken("another number of channels", "conv1.weight: not the weights", channels="2")
    broken("too many convolutions", "conv3.kernel is -1", convolutions="3")
    broken("far too many convolutions", "convolutions is 9", convolutions="9")
    broken("no stride", "conv2.stride is 0", **{"conv2.stride": "0"})
    broken("a negative padding", "conv2.padding is -1", **{"conv2.padding": "-1"})
    broken("a large kernel", "kernel of 64 does not fit into 10", **{"conv1.kernel": "64"})
    broken("too many classes", "features_logits.weight: 4 outputs where 7", classes="7")
    broken("a missing tensor", "tensor conv2.bias is missing",
           {k: x for k, x in w.items() if k != "conv2.bias"})
    broken("a bias of another length", "conv2.bias: 4 outputs where 5",
           dict(w, **{"conv2.bias": w["conv2.bias"][:4]}))
    broken("a bias that is a matrix", "conv2.bias: not a layer's bias",
           dict(w, **{"conv2.bias": w["conv2.bias"].reshape(1, 5)}))
    broken("whole numbers", "conv2.bias: not a layer's bias",
           dict(w, **{"conv2.bias": np.zeros(5, np.int32)}))
    broken("NaN in the weights", "tensor conv1.weight holds a number that is not finite",
           dict(w, **{"conv1.weight": np.full_like(w["conv1.weight"], np.nan)}))
    write("judge.safetensors", w, meta)
    shard_of(np.full((3, 1, 8, 8), np.nan, np.float32))
    bad("judge: NaN in a picture", "picture 0 holds a number that is not finite", "judge",
        "judge.safetensors", "shard.safetensors")
    shard_of(np.zeros((3, 1, 9, 9), np.float32))
    bad("judge: pictures of another size", "no pictures for", "judge", "judge.safetensors",
        "shard.safetensors")


def test_pictures():
    """The whole way, from a file of samples to a table, on noisy training digits"""
    rng = np.random.default_rng(9)
    t, about = digits.read_safetensors(digits.SHARD)
    train, w = int(about["train_samples"]), doubles(digits.read_safetensors(digits.ENCODER)[0])
    pick = rng.permutation(train)[:200]
    x = (t["latents"][pick] / 8 - 1 + 0.2 * rng.standard_normal((200, 1, 8, 8))).astype(np.float32)
    write("samples.safetensors", {"latents": x, "labels": t["labels"][pick].astype(np.int32)},
          {"space": "model"})
    words = ["pictures", digits.ENCODER, digits.SHARD, "samples.safetensors"]
    r = call(*words)
    check("scores of samples", r.returncode == 0, r.stderr)
    rows = {line.split()[0]: line.split()[1:4] for line in r.stdout.splitlines()[2:]}
    real = digits.model_input(t["latents"])
    held, known, made = real[train:], real[:train], np.clip(x.astype(float).transpose(0, 2, 3, 1), -1, 1)
    judge = lambda x: plain_judge(x, w, ((3, 1, 1),) * 3, True, "cls", "cls_head")
    theta, (b, _) = philox_directions(256, 32, 1), judge(held)
    flat = lambda x: x.reshape(-1, 64)
    other = scipy.spatial.distance.cdist(flat(held), flat(known)).min(1)
    for column, (pictures, labels) in enumerate(((made, t["labels"][pick]), (known[:200], t["labels"][:200]))):
        a, logits = judge(pictures)
        precision, recall = precision_recall(a, b)
        near = scipy.spatial.distance.cdist(flat(pictures), flat(known)).min(1)
        want = {"frechet": frechet_by_data(a, b), "kernel": kernel_distance(a, b),
                "sliced": sliced(a, b, theta), "precision": precision, "recall": recall,
                "right": (logits[:, :10].argmax(1) == labels).mean(),
                "newness": np.median(near) / np.median(other),
                "copies": (near < np.quantile(other, 0.01)).mean()}
        check("the table's rows", list(rows) == list(want), r.stdout)
        for name, number in want.items():
            close("in the table: %s" % name, float(rows[name][column]), number, 1, 0.51e-5)
    # the Gaussian's column is of drawn pictures: near a Gaussian with the same mean and covariance
    rng2 = np.random.default_rng(5)
    drawn = rng2.multivariate_normal(flat(known).mean(0), np.cov(flat(known).T), 200).clip(-1, 1)
    a, _ = judge(drawn.reshape(-1, 8, 8, 1))
    ratio = float(rows["frechet"][2]) / frechet_by_data(a, b)
    check("the Gaussian's distance is that of a Gaussian", 0.7 < ratio < 1.4, ratio)
    write("samples.safetensors", {"latents": np.where(x > 1, np.nan, x), "labels": np.zeros(200, np.int32)})
    bad("NaN in a sample", "picture [0-9]+ holds a number that is not finite", *words)
    write("samples.safetensors", {"latents": x[:, :, :7, :7].copy(), "labels": np.zeros(200, np.int32)})
    bad("samples of another size", r"no latents \[N,1,8,8\]", *words)


def test_bad_input():
    rng = np.random.default_rng(8)

    def refused(what, pattern, **sets):
        write("sets.safetensors", sets)
        bad(what, pattern, "scores", "sets.safetensors")

    good = rng.standard_normal((20, 6))
    for value in (np.nan, np.inf, -np.inf):
        x = good.copy()
        x[7, 2] = value
        refused("%s in the samples" % value, "made: number 2 of picture 7 is", made=x, real=good)
        refused("%s in the real pictures" % value, "real: number 2 of picture 7 is", made=good,
                real=x)
        refused("%s in pixels" % value, "train_pixels: number 2 of picture 7", made_pixels=good,
                held_pixels=good + 1, train_pixels=x)
        refused("%s in logits" % value, "logits: number 2 of picture 7", logits=x,
                wanted=np.zeros(20, np.int32))
    refused("one sample", "made: 1 pictures, and this score needs at least 2", made=good[:1], real=good)
    refused("one real picture", "real: 1 pictures, and this score needs at least 2", made=good, real=good[:1])
    refused("three samples", "made: 3 pictures, and this score needs at least 4", made=good[:3], real=good)
    refused("no samples", "made: 0 pictures", made=good[:0], real=good)
    refused("other features", "made have 6 numbers a picture and real 5", made=good, real=good[:, :5])
    refused("no features", "rows of no numbers", made=good[:, :0], real=good[:, :0])
    refused("huge features", "number 0 of picture 0 is .*e.200", made=good * 1e200, real=good)
    refused("held-out pictures that were trained on", "half of the held-out pictures are training pictures",
            made_pixels=good, held_pixels=good, train_pixels=good)
    refused("a class that there is not", "picture 4 was asked to show class 6, and the judge knows 0 to 5",
            logits=good, wanted=np.array([0, 1, 2, 3, 6] * 4, np.int32))
    bad("no mode", "usage", "score")


def test_alone():
    """The header by itself, in both languages and with both compilers, without a warning"""
    for compiler, flags, name in (("gcc", "-std=gnu11", "alone.c"), ("g++", "-std=c++17", "alone.cpp"),
                                  ("clang", "-std=gnu11", "alone.c"), ("clang++", "-std=c++17", "alone.cpp")):
        if not shutil.which(compiler):
            print("note: no %s here" % compiler)
            continue
        with open(name, "w") as f:
            f.write('#include "score.h"\n#include "score.h"\nint main(void) { return 0; }\n')
        for openmp in (["-fopenmp"], ["-Wno-unknown-pragmas"]):
            if openmp == ["-fopenmp"] and compiler.startswith("clang"):
                continue               # Debian's clang has no omp.h of its own
            r = subprocess.run([compiler, flags, *openmp, "-Wall", "-Wextra", "-Werror", "-fsyntax-only",
                                "-I", os.path.join(ROOT, "dev", "lib"), name], stderr=subprocess.PIPE,
                               universal_newlines=True)
            check("%s %s compiles score.h alone" % (compiler, openmp[0]), r.returncode == 0, r.stderr)


TESTS = (test_closed_forms, test_memorisation, test_accuracy, test_against_scipy, test_few_rows, test_judge,
         test_pictures, test_bad_input, test_threads)

# What the tests must notice: a line of score.h and what it becomes
MUTANTS = (
    ("kernel: k(x,x) counted too, not divided out", "aa / (m * (m - 1))", "aa / (m * m)"),
    ("kernel: the other set biased", "bb / (n * (n - 1))", "bb / (n * n)"),
    ("kernel: the diagonal summed", "i0 + i + 1 > p * DNR ? i0 + i + 1 - p * DNR : 0",
     "i0 + i > p * DNR ? i0 + i - p * DNR : 0"),
    ("kernel: wrong sign", "- 2 * ab / (m * n)", "+ 2 * ab / (m * n)"),
    ("kernel: square", "row += k * k * k", "row += k * k"),
    ("kernel: no division by d", "/ (double)d + 1;", "+ 1;"),
    ("Frechet: wrong sign of the cross term", "(traces - 2 * cross)", "(traces + 2 * cross)"),
    ("Frechet: cross term once", "(traces - 2 * cross)", "(traces - cross)"),
    ("Frechet: no means", "return means + (", "return ("),
    ("Frechet: covariance by n", "/ (double)(n - 1)", "/ (double)n"),
    ("Frechet: rounding kept as rank", "top * (double)d * DBL_EPSILON ?", "0 ?"),
    ("Frechet: eigenvalues, not their roots", "sqrt(scale / lambda[i])", "(scale / lambda[i])"),
    ("Jacobi: one sweep", "sweep < 100", "sweep < 1"),
    ("Jacobi: too early an end", "4 * DBL_EPSILON * sqrt", "1e-4 * sqrt"),
    ("Jacobi: a row never plays", "game < even / 2", "game < even / 2 - 1"),
    ("Jacobi: turned the wrong way", "cosine * x - sine * y", "cosine * x + sine * y"),
    ("precision: the picture itself is a neighbour", "mine[k - 1]) || p * DNR + j == tile->first + i",
     "mine[k - 1])"),
    ("precision: k - 1", "near[(i + 1) * (size_t)k - 1]", "near[(i + 1) * (size_t)k - 2]"),
    ("precision: open balls", "<= radius[p * DNR + j]", "< radius[p * DNR + j]"),
    ("precision and recall exchanged", "*(s ? recall : precision)", "*(s ? precision : recall)"),
    ("distances: cancellation kept", "< 1e-5 * squares", "< 0 * squares"),
    ("distances: cross term once", "squares - 2 * *distance", "squares - *distance"),
    ("distances: columns past the end", "size_min(o->rows.n - p * DNR, count * DNR)", "count * DNR"),
    ("nearest: squared", "fmin(best[i], sqrt(least))", "fmin(best[i], least)"),
    ("nearest: the last part wins", "fmin(best[i], sqrt(least))", "sqrt(least)"),
    ("nearest: no scale", "largest > 0 ? 1 / largest : 1;", "1;"),
    ("nearest: no slack", "x_square[i] - 2 * slack;", "x_square[i];"),
    ("nearest: |y|^2 twice", "own + y_square[j] -", "own + 2 * y_square[j] -"),
    ("nearest: sums, not their halves", "sum * scale / sqrt((double)COARSE)", "sum * scale"),
    ("nearest: only the guess", "> limit) continue;", "> -1) continue;"),
    ("memorisation: upside down", "score_quantile(made, n, 0.5) / usual",
     "usual / score_quantile(made, n, 0.5)"),
    ("memorisation: the 10th percentile", "score_quantile(held_out, m, 0.01)",
     "score_quantile(held_out, m, 0.1)"),
    ("memorisation: farther", "made[i] < limit", "made[i] > limit"),
    ("quantile: no interpolation", "* (place - low);", "* 0;"),
    ("sliced: first power", "(a[i] - b[j]) * (a[i] - b[j]) *", "fabs(a[i] - b[j]) *"),
    ("sliced: unsorted", "qsort(one, a.n, sizeof(double), by_size), ", ""),
    ("sliced: directions not of length 1", "/ sqrt(square)", ""),
    ("sliced: another seed", "fill_normal(z, d, seed,", "fill_normal(z, d, seed + 1,"),
    ("sliced: steps of one length", "* (double)(end - u)", ""),
    ("accuracy: the last of equal logits", "> logits[i * classes + most]", ">= logits[i * classes + most]"),
    ("judge: no ReLU", "l->relu && sum < 0", "0"),
    ("judge: ReLU everywhere", "l->relu && sum < 0", "sum < 0"),
    ("judge: no bias", "+ l->bias[j]", ""),
    ("judge: stride 1", "/ l->side_out * l->stride", "/ l->side_out"),
    ("judge: padding holds the last picture's numbers", "memset(seen, 0,", "if (r0 < 64) memset(seen, 0,"),
    ("judge: quarters not divided", "/ (double)(half * half)", ""),
    ("judge: quarters exchanged", "/ half * 2 + p % side / half", "/ half + p % side / half * 2"),
    ("judge: NaN pictures pass", 'if (!(fabs((double)pictures[i]) < INFINITY))', "if (0)"),
    ("NaN passes", "if (!(fabs(r.x[i]) <= 1e50))", "if (fabs(r.x[i]) > 1e50)"),
    ("threads: sums in another order", "sum += part[t];",
     "sum += part[(t + (size_t)omp_get_max_threads()) % tiles];"),
)


FIRST = {"judge": test_judge, "nearest": test_memorisation, "NaN": test_bad_input, "threads": test_threads,
         "sliced": test_against_scipy, "Frechet": test_few_rows}      # the test that is most likely to notice


def run_tests(first=None, stop=False):
    """All tests, `first` first; with stop, only until the first failure"""
    for test in sorted(TESTS, key=lambda test: test != first):
        try:
            test()
        except (KeyError, ValueError, IndexError) as error:
            check(test.__name__, False, "%s: %s" % (type(error).__name__, error))
        if stop and failed:
            break


def mutants():
    global PROGRAM, DOUBLE, PLAIN
    source = os.path.join(ROOT, "dev")
    os.makedirs("mutant/lib")
    shutil.copy(os.path.join(source, "score_check.c"), "mutant")
    for name in os.listdir(os.path.join(source, "lib")):
        shutil.copy(os.path.join(source, "lib", name), "mutant/lib")
    with open(os.path.join(source, "lib", "score.h")) as f:
        text = f.read()
    alive, chosen = 0, [m for m in MUTANTS if options.mutants in m[0]]
    for name, old, new in chosen:
        if text.count(old) < 1:
            print("STALE    %s: score.h has no such line" % name)
            alive += 1
            continue
        with open("mutant/lib/score.h", "w") as f:
            f.write(text.replace(old, new))
        flags = ["-O2", "-march=native", "-fopenmp", "-Wno-error", "-w"]
        PROGRAM = DOUBLE = PLAIN = build("mutant/check", *flags, source="mutant/score_check.c")
        failed.clear()
        run_tests(FIRST.get(name.split(":")[0]), stop=True)
        print("%s %s%s" % ("noticed " if failed else "ALIVE   ", name, ": " + failed[0] if failed else ""),
              flush=True)
        alive += not failed
    print("%d of %d mutants noticed" % (len(chosen) - alive, len(chosen)))
    return alive


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--mutants", nargs="?", const="", metavar="WORD",
                    help="break score.h; the tests must notice (only mutants with WORD in their names)")
parser.add_argument("--keep", metavar="DIR", help="work in this folder and leave it")
options = parser.parse_args()
folder = options.keep or tempfile.mkdtemp()
os.makedirs(folder, exist_ok=True)
os.chdir(folder)
try:
    if options.mutants is not None:
        sys.exit(1 if mutants() else 0)
    PROGRAM = build("score_check", "-O3", "-march=native", "-fopenmp")
    DOUBLE = build("score_check_double", "-O3", "-march=native", "-fopenmp", "-DUSE_DOUBLE")
    PLAIN = build("score_check_plain", "-O1", "-Wno-unknown-pragmas", "-ffp-contract=off")
    test_alone()
    run_tests()
    for tol, (error, what) in sorted(used.items()):
        print("tolerance %g: %.2g used (%s)" % (tol, error, what))
    print("%d checks passed, %d failed" % (passed, len(failed)))
    sys.exit(1 if failed else 0)
finally:
    os.chdir(ROOT)
    if not options.keep:
        shutil.rmtree(folder, ignore_errors=True)
