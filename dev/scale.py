#!/usr/bin/env python3
"""A training step of SR-DiT-B/1 on several H100s, by arithmetic: there is no code for several GPUs yet.

    python3 dev/scale.py                             1, 8, 64, 512 GPUs at batch 256 and 2048
    python3 dev/scale.py --grad-bits 16 --best       bf16 gradients; every kernel near its roofline
    python3 dev/scale.py --set nvlink_gbs=400        another assumption; --list shows them all
    python3 dev/scale.py --calibrate out/log.csv     the one-GPU step as measured by the trainer
    python3 dev/scale.py --self-test                 closed forms; exits 1 if one fails

Kernels run one after the other: a product takes whole waves of tiles on the multiprocessors, or the time of
its bytes; the others the time of their bytes. A second stream works off the collectives in the order in which
they were asked for; while it is busy, kernels are slower by `tax`. A step: each bucket's share is updated, in
the forward's order, and gathered; a part of the forward waits for its bucket; a part of the backward hands
its own to the reduce-scatter; the gradient's norm needs them all, so steps do not overlap. Needs no packages.
"""
import argparse, csv, math, re, sys

# name: (expected, with --best, unit, where it comes from). No row was measured on this program; the model of
# one GPU missed a published step and a published product of others by -7 and +8 %.
ASSUMED = {
    "sms":        (132, 132, "processors", "multiprocessors of an H100 SXM, data sheet"),
    "tflops":     (740, 790, "TFLOP/s", "main loop of a product; cuBLAS reached 798 at 8192^3 on an H100"),
    "tile_us":    (2.0, 1.0, "us a wave", "guess: begin and end of a tile that nothing hides"),
    "hbm_gbs":    (2600, 2850, "GB/s", "memory, of kernels; a copy reached 3000 on an H100"),
    "attn_fwd":   (330, 450, "TFLOP/s", "attention forward; published kernels, 512 tokens: 282 to 340"),
    "attn_bwd":   (230, 330, "TFLOP/s", "attention backward; the same: 198 to 272"),
    "gap_us":     (1.5, 0.7, "us a kernel", "guess: idle between kernels of a CUDA graph, at any batch"),
    "mix":        (0.35, 0.10, "share", "guess: not hidden of the shorter of work and bytes; products 0.3 x"),
    "micro":      (1024, 1024, "samples", "most at once in 80 GB: 69 MB each by the memory plan"),
    "node":       (8, 8, "GPUs", "joined by NVLink; more are joined by InfiniBand"),
    "nvlink_gbs": (340, 340, "GB/s a GPU", "bus rate of a ring; 450 on paper, some 370 published"),
    "ib_gbs":     (42, 42, "GB/s a GPU", "guess: one 400 Gbit/s port a GPU is 50 on paper"),
    "nvlink_us":  (1.5, 1.5, "us a hop", "guess; a ring: GPUs of a node - 1 hops"),
    "ib_us":      (5, 5, "us a hop", "guess"),
    "ib_ring":    (0, 0, "0 or 1", "between nodes: 0 halving, log2(nodes) hops; 1 a ring, nodes - 1"),
    "pipe":       (0, 0, "0 or 1", "a collective's way inside and between nodes: 0 in turn, 1 at once"),
    "call_us":    (8, 8, "us a call", "guess: a collective's launch and synchronising"),
    "tax":        (0.06, 0.06, "share", "guess: kernels slower while a collective runs beside them"),
    "batches":    (0, 0, "0 or 1", "1: weights of f, g, h, adaLN in batches, as now: late buckets"),
}
T, S, D, H, F, PJ, Z, CIN, NBLK, NCLS = 257, 64, 768, 12, 3072, 2048, 768, 32, 12, 1000   # B/1
SAMPLES = 400000 * 256   # a whole training
# Tiles of a product and the share of the main loop's rate that they reach (guesses)
TILES = [(128, 256, 1), (192, 128, .97), (128, 128, .9), (64, 256, .85), (64, 128, .75), (64, 64, .55)]
TILES += [(n, m, e) for m, n, e in TILES if m != n]
MLP = (("qkv", 3 * D, D), ("proj", D, D), ("fc1", F, D), ("fc2", D, F))   # a block's layers: outputs, inputs
BLOCK, ADALN = sum(n * k + n for _, n, k in MLP) + 2 * (D // H) + 1, 6 * D * D + 6 * D   # block 0: no lambda

def die(text):
    print("scale.py: " + text, file=sys.stderr)
    sys.exit(2)

# One GPU
class Kernels:
    """Seconds of one kernel, by the assumptions `a`."""
    def __init__(self, a):
        self.a, self.gap, self.hbm = a, a["gap_us"] * 1e-6, a["hbm_gbs"] * 1e9
    def product(self, m, n, k, extra=0, out=2, split=False, count=1):
        """[m,k] x [k,n], `count` in one batch; extra: further bytes; split: k may be cut, and added up."""
        a, best = self.a, math.inf
        for tm, tn, share in TILES:
            tiles = count * math.ceil(m / tm) * math.ceil(n / tn)
            for cut in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32) if split else (1,):
                if cut > 1 and k / cut < 256: break
                wave = 2 * tm * tn * k / cut / (a["tflops"] * 1e12 / a["sms"] * share) + a["tile_us"] * 1e-6
                added = 4 * cut * m * n * count / self.hbm + 2e-6 if cut > 1 else 0
                best = min(best, math.ceil(tiles * cut / a["sms"]) * wave + added)
        bytes_ = (count * (2 * (m * k + n * k) + out * m * n) + extra) / self.hbm
        return max(best, bytes_) + 0.3 * a["mix"] * bytes_ + self.gap
    def weights(self, n, k, m, count=1):   # the gradient of [n,k] over m rows, alone or `count` in a batch
        return min(count * self.product(n, k, m, 0, 4, True), self.product(n, k, m, 0, 4, False, count))
    def bytes(self, count, kernels=1):
        return count / self.hbm + kernels * self.gap
    def attention(self, b, t, rate, flops, bytes_):
        pad = 272 * 264 / 257**2 if t == T else 1
        work, move = flops * b * t * t * D * pad / (rate * 1e12), b * t * bytes_ / self.hbm
        return max(work, move) + self.a["mix"] * min(work, move) + self.gap

def parts_of(b, k, batches):
    """The step at b samples without the optimizer: {part: [forward s, backward s, parameters]}."""
    md, ms, parts = b * T, b * S, {}
    for i in range(NBLK):
        first, count, t = (0, 2, T) if i < 2 else (2, 8, S) if i < 10 else (10, 2, T)   # f, g or h
        m = b * t
        fwd = sum(k.product(m, o, n, 2 * m * F * (l == "fc1")) for l, o, n in MLP)
        bwd = sum(k.product(m, n, o, 2 * m * F * (l == "fc2")) for l, o, n in MLP)
        # Two norms with modulation, gate and the stream [M,D] in fp32; q/k-norm is attention's
        fwd += 2 * k.bytes(m * (12 * D + 4)) + k.attention(b, t, k.a["attn_fwd"], 4, 10 * D + 4 * H)
        bwd += 2 * k.bytes(m * (18 * D + 4)) + k.attention(b, t, k.a["attn_bwd"], 10, 20 * D + 4 * H)
        if not batches:
            bwd += sum(k.weights(o, n, m) for _, o, n in MLP)
            fwd += k.product(b, 6 * D, D, 0, 4)
            bwd += k.product(b, D, 6 * D, 0, 4, True) + k.weights(6 * D, D, b)
        elif i == first:                          # its group's last in the backward: weights in batches
            bwd += sum(k.weights(o, n, m, count) for _, o, n in MLP)
        params = (BLOCK + ADALN) if not batches else BLOCK * count * (i == first)
        parts[f"block{i}"] = [fwd, bwd, params]
    parts["block0"][1] += k.bytes(3 * md * D * 2 + 8 * ms * D * 2)   # the values' gradients added up
    layers = ((PJ, D), (PJ, PJ), (Z, PJ))
    parts["projector"] = [
        sum(k.product(md, o, n) for o, n in layers) + k.bytes(2 * md * PJ * 4, 2) + k.bytes(md * D * 2),
        sum(k.product(md, n, o) + k.weights(o, n, md) for o, n in layers) + k.bytes(2 * md * PJ * 6, 2)
        + k.bytes(md * Z * 8) + k.bytes(md * D * 4 + ms * D * 4), sum(o * n + o for o, n in layers)]
    both = k.product(md, D, D) + k.product(ms, D, D)
    weights = k.weights(D, D, md) + k.weights(D, D, ms) + k.bytes(4 * ms * D + 2 * md * D)
    parts["fusion"] = [both, both + weights, 2 * D * D + D]
    patch, final = b * (T - 1) * CIN, D * CIN + CIN + D * Z + Z + (0 if batches else 2 * D * D + 2 * D)
    parts["final"] = [k.bytes(md * 12 * D) + k.bytes(b * (T - 1) * (D * 2 + CIN * 12)),
                      k.bytes(b * (T - 1) * (D * 4 + CIN * 4)) + k.bytes(md * 12 * D), final]
    small = 3 * (256 * D + 2 * D * D) * 4         # time, label and CLS embedders
    parts["input"] = [k.bytes(patch * 8 + md * D * 4) + k.bytes(small / 3, 5),
                      k.bytes(md * D * 4 + patch * 2) + k.bytes(small * 2 / 3, 5),
                      256 * D + D + D * D + D + (NCLS + 1) * D + CIN * D + D + Z * D + 2 * D + D]
    if batches:                                   # adaLN of all blocks and the final layer: one product each
        na = NBLK * 6 * D + 2 * D
        parts["input"][0] += k.product(b, na, D, 0, 4)
        parts["input"][1] += k.product(b, D, na, 0, 4, True) + k.weights(na, D, b)
        parts["input"][2] += NBLK * ADALN + 2 * D * D + 2 * D
    return parts

FORWARD = ["input", *(f"block{i}" for i in range(10)), "fusion", "block10", "block11", "final", "projector"]
BACKWARD = ["projector", *FORWARD[-2::-1]]   # the losses stand between them

# Several GPUs
def ring_bytes(size, gpus, node):
    """Bytes that a GPU sends in a reduce-scatter of `size`: first inside the node, then between nodes."""
    g, n = min(gpus, node), max(1, gpus // node)
    return size * (g - 1) / g, size / g * (n - 1) / n

def collective(size, gpus, a):
    """Seconds of a reduce-scatter or all-gather."""
    if not size: return 0.0
    g, n = min(gpus, a["node"]), max(1, gpus // a["node"])
    hops = n - 1 if a["ib_ring"] else math.ceil(math.log2(n))
    us = a["call_us"] + (g - 1) * a["nvlink_us"] + hops * a["ib_us"]
    inside, outside = ring_bytes(size / 1e9, gpus, a["node"])
    ways = inside / a["nvlink_gbs"], outside / a["ib_gbs"]
    return (max(ways) if a["pipe"] else sum(ways)) + us * 1e-6

def schedule(work, tax, overlap=True):
    """Seconds of a list of (seconds of kernels, what they wait for, what they ask for at their end, its
    seconds). What the second stream has to do was asked for before: it is busy until `busy`."""
    now, busy, done = 0.0, 0.0, {}
    for seconds, needs, asks, comm in work:
        now = max(now, done.get(needs, 0.0))
        slow = max(0, min(seconds, (busy - now) / (1 + tax)))   # of them, until the second stream rests
        now += seconds + tax * slow
        if asks is not None:
            busy = max(busy, now) + comm
            done[asks] = busy
            if not overlap: now = busy
    return max(now, busy)

def step(batch, gpus, a, o, scale=1.0):
    """A step: its seconds, those of kernels alone, of the optimizer, of collectives; samples a GPU."""
    local, k = batch // gpus, Kernels(a)
    micros = math.ceil(local / a["micro"])        # and one GPU has no reason to give up its batches
    parts = parts_of(math.ceil(local / micros), k, a["batches"] or gpus == 1)
    share, work, optimizer = 1 if o.ddp else gpus, [], 0.0
    for name in FORWARD:                          # AdamW, EMA, rounding: 38 bytes a parameter
        params = parts[name][2]
        update = scale * k.bytes(38 * params / share, gpus > 1 and params > 0)
        optimizer += update
        asks = (("weights", name), collective(2 * params, gpus, a)) if share > 1 and params else (None, 0)
        work.append((update, None) + asks)
    for i in range(micros):
        work += [(scale * parts[name][0], ("weights", name), None, 0) for name in FORWARD]
        for name in BACKWARD:
            params = parts[name][2] if i == micros - 1 else 0
            comm = collective(o.grad_bits / 8 * params, gpus, a) * (2 if o.ddp else 1)
            asks = (("gradient", name), comm) if gpus > 1 and params else (None, 0)
            work.append((scale * parts[name][1], None) + asks)
    norm = scale * k.bytes(4 * sum(v[2] for v in parts.values()) / share, 2)
    scalar = 2 * collective(4, gpus, a) if share > 1 else 0.0
    seconds = schedule(work, a["tax"], not o.no_overlap) + norm + scalar
    return {"step": seconds, "kernels": sum(w[0] for w in work) + norm, "optimizer": optimizer + norm,
            "links": sum(w[3] for w in work) + scalar, "local": local, "micros": micros}

def measured(path, a, o):
    """The factor by which a log.csv of the trainer on one GPU exceeds the model; a sentence about it."""
    try:
        with open(path, newline="", encoding="utf-8") as f:
            rows = list(csv.DictReader(f))
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        die(f"{path}: cannot be read: {getattr(e, 'strerror', None) or e}")
    if not rows: die(f"{path}: no line of a training; it must be a log.csv of the trainer")
    ms, batches = [], set()
    for i, row in enumerate(rows, 2):
        try:
            t, rate = float(row["ms_per_step"]), float(row["images_per_s"])
            if not (0 < t < math.inf and 0 < rate < math.inf): raise ValueError
        except (KeyError, TypeError, ValueError):
            die(f"{path}: line {i}: ms_per_step and images_per_s must be numbers above 0, as in a log.csv")
        ms, batches = ms + [t], batches | {round(t * rate / 1000)}
    if len(batches) > 1 or 0 in batches: die(f"{path}: its lines are of batches {sorted(batches)}, not one")
    batch, t = batches.pop(), sorted(ms)[len(ms) // 2]
    model = 1e3 * step(batch, 1, a, o)["step"]
    return t / model, (f"Calibrated: {path}: {t:.4g} ms at batch {batch} (median of {len(ms)} lines), by the "
                       f"model {model:.2f}: kernels x {t / model:.3f}, if it is of B/1 on one GPU")

def table(a, o):
    scale, note = measured(o.calibrate, a, o) if o.calibrate else (1.0, "")
    print(f"SR-DiT-B/1, arithmetic, {'best' if o.best else 'expected'}; "
          f"{'all-reduce, whole optimizer' if o.ddp else 'ZeRO-1'}, gradients of {o.grad_bits} bits"
          f"{', no overlap' * o.no_overlap}; H100-hours for {SAMPLES / 1e6:.1f} M samples")
    print(*["Set: " + ", ".join(o.set)] * bool(o.set), *[note] * bool(note), "", sep="\n")
    print("| batch | GPUs | a GPU | kernels ms | of them optimizer | links ms | not hidden | step ms |"
          " efficiency | with infinite links | H100-hours |\n|" + " ---: |" * 11)
    for batch in o.batch:
        one = step(batch, 1, a, o, scale)["step"]
        for gpus in o.gpus:
            if batch % gpus:
                print(f"| {batch} | {gpus} | cannot be shared out evenly |" + " |" * 8)
                continue
            r = step(batch, gpus, a, o, scale)
            t, local = r["step"], f"{r['local']}" + (f" in {r['micros']}" if r["micros"] > 1 else "")
            print(f"| {batch} | {gpus} | {local} | {1e3 * r['kernels']:.2f} | {1e3 * r['optimizer']:.2f} | "
                  f"{1e3 * r['links']:.2f} | {1e3 * (t - r['kernels']):.2f} | {1e3 * t:.2f} | "
                  f"{100 * one / t / gpus:.0f} % | {100 * one / r['kernels'] / gpus:.0f} % | "
                  f"{gpus * t * SAMPLES / batch / 3600:.1f} |")

def self_test():
    a, results = {name: row[0] for name, row in ASSUMED.items()}, []
    check = lambda name, good: results.append(("ok      " if good else "FAILED  ") + name)
    near = lambda x, y: abs(x - y) <= 1e-9 * max(abs(x), abs(y))
    for batches in (0, 1):
        parts = parts_of(32, Kernels(a), batches)
        check(f"batches {batches}: 140,037,675 parameters and one lambda, each part in its place",
              sum(v[2] for v in parts.values()) == 140037676
              and sorted(FORWARD) == sorted(BACKWARD) == sorted(parts)
              and all(parts[f"block{i}"][2] for i in (0, 2, 10)))   # their groups' last in the backward
    free = dict(a, nvlink_gbs=math.inf, ib_gbs=math.inf, nvlink_us=0, ib_us=0, call_us=0)
    ways = [argparse.Namespace(ddp=d, grad_bits=g, no_overlap=False) for d, g in ((0, 32), (0, 16), (1, 32))]
    sizes = ((256, 8), (256, 64), (2048, 8), (2048, 64), (2048, 512))
    for o, b, n in ((o, *size) for o in ways for size in sizes):
        r, f, one = step(b, n, a, o), step(b, n, free, o), step(b, 1, a, o)
        s = step(b, n, a, argparse.Namespace(**dict(vars(o), no_overlap=True)))
        name = f"{n} GPUs, batch {b}, {'all-reduce' if o.ddp else 'ZeRO-1'}, {o.grad_bits} bits: "
        check(name + "one GPU needs no links", one["links"] == 0 and near(one["step"], one["kernels"]))
        check(name + "free links leave the kernels of the local batch",
              near(f["step"], f["kernels"]) and near(f["kernels"], r["kernels"]) and r["local"] * n == b)
        check(name + "without overlap the sum of parts", near(s["step"], s["kernels"] + s["links"]))
        check(name + "with it less, yet above either", max(r["kernels"], r["links"]) < r["step"] < s["step"])
        for link in ("nvlink_gbs", "ib_gbs"):
            times = [step(b, n, dict(a, **{link: x}), o)["step"] for x in (5, 20, 42, 340, 1000, 1e9)]
            check(f"{name}a faster {link} is never slower", times == sorted(times, reverse=True)
                  and (times[0] > times[-1] or (link == "ib_gbs" and n == 8)))
        z, z1 = step(b, n, dict(free, gap_us=0, nvlink_gbs=1, ib_gbs=1), o), step(b, 1, dict(a, gap_us=0), o)
        sent = o.grad_bits / 8 * (1 + o.ddp) * 140037676 + (1 - o.ddp) * (2 * 140037676 + 8)
        check(name + "rings send (N-1)/N of the buffers", near(z["links"], sent * (n - 1) / n / 1e9))
        check(name + "slow links cannot hide the projector", z["step"] > z["links"] + z["optimizer"])
        check(name + "the optimizer's share", near(z["optimizer"] * (1 if o.ddp else n), z1["optimizer"]))
    # 2 s of kernels, a collective of 3; beside it 4 s of kernels, slower by half for 3 s, which do 2 s of it
    for t, tax, *rest in ((7, .5, (4, None, None, 0)), (6, .5, (1, "x", None, 0)), (7, 0, (1, None, "y", 2))):
        check(f"a schedule of {t} s by hand", near(schedule([(2, None, "x", 3), *rest], tax), t))
    print(*results, f"{sum(r[0] == 'F' for r in results)} of {len(results)} failed", sep="\n")
    return any(r[0] == "F" for r in results)

def numbers(text):
    if not re.fullmatch(r"[1-9]\d{0,6}(,[1-9]\d{0,6})*", text):
        die(f"{text}: whole numbers above 0 are needed, at most 9999999, as 1,8,64")
    return [int(x) for x in text.split(",")]

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--gpus", default="1,8,64,512", metavar="N,...")
    p.add_argument("--batch", default="256,2048", metavar="B,...")
    p.add_argument("--grad-bits", type=int, choices=(16, 32), default=32, help="of what travels [32]")
    p.add_argument("--ddp", action="store_true", help="all-reduce, the whole optimizer: no ZeRO-1")
    p.add_argument("--no-overlap", action="store_true", help="kernels wait for every collective")
    p.add_argument("--best", action="store_true", help="kernels near their roofline: the second values")
    p.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="another assumption")
    p.add_argument("--calibrate", metavar="LOG", help="a log.csv of B/1 on one GPU: scales the one-GPU step")
    p.add_argument("--list", action="store_true", help="the assumptions: expected, best, unit, where from")
    p.add_argument("--self-test", action="store_true")
    o = p.parse_args()
    o.gpus, o.batch = numbers(o.gpus), numbers(o.batch)
    a = {name: row[o.best] for name, row in ASSUMED.items()}
    for text in o.set:
        name, _, value = text.partition("=")
        if name not in a: die(f"--set {text}: no assumption has this name; --list shows them")
        try:
            a[name] = float(value)
        except ValueError:
            die(f"--set {text}: a number must stand behind the =, as {name}={ASSUMED[name][0]}")
        unit, v = ASSUMED[name][2], a[name]
        whole = unit in ("processors", "samples", "GPUs")
        if not (v in (0, 1) if unit == "0 or 1" else v >= 1 and v % 1 == 0 if whole
                else v > 0 if "/s" in unit else 0 <= v < math.inf):
            die(f"--set {text}: {value} cannot be a value in {unit}")
        if whole: a[name] = int(v)
    for n in o.gpus:
        if n > a["node"] and n % a["node"]: die(f"--gpus {n}: above {a['node']}, whole nodes are needed")
    if o.self_test: return self_test()
    if not o.list: return table(a, o)
    for name, row in ASSUMED.items(): print(f"{name:11}{row[0]:7g}{row[1]:7g}  {row[2]:11} {row[3]}")

if __name__ == "__main__":
    sys.exit(main())
