#!/usr/bin/env python3
"""How fast train_srdit.c is on this CPU: its matrix product against OpenBLAS, its exp and GELU against
libm, its whole training step against the same step in PyTorch (dev/reference.py's model).

Everything runs in this one process and takes turns, so that a busy machine is as busy for both sides; the
best of all turns counts for each side, since noise only ever adds time. The result is markdown, with date and
machine.

  /usr/bin/python3 dev/bench_cpu.py                 some minutes, two threads
  /usr/bin/python3 dev/bench_cpu.py --quick         half a minute: fewer turns, no S/1 step
  /usr/bin/python3 dev/bench_cpu.py --only matmul,versions,functions,nano,s1
  /usr/bin/python3 dev/bench_cpu.py --save          also put the result into dev/README.md

Needs a C compiler ($CC, or cc), numpy, OpenBLAS (Debian: libopenblas0-openmp) and for the steps PyTorch
(Debian: python3-torch). OPENBLAS_CORETYPE and OPENBLAS_L2_SIZE, which can slow OpenBLAS down, are taken
out of the environment first.
"""
import argparse, ctypes, math, os, subprocess, sys, textwrap, time

STEPS = 5                                       # of training in a turn
PARTS = ("matmul", "versions", "functions", "nano", "s1")
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--quick", action="store_true", help="fewer turns")
parser.add_argument("--only", default="", help="of " + ", ".join(PARTS))
parser.add_argument("--threads", type=int, default=2, help="for all sides [2]")
parser.add_argument("--wait", choices=("default", "passive", "active"), default="default",
                    help="OMP_WAIT_POLICY for all sides: waiting threads sleep (passive) or spin (active); "
                    "the default, libgomp's own, spins for a while and then sleeps")
parser.add_argument("--save", action="store_true", help="put the result into dev/README.md")
args = parser.parse_args()
parts = args.only.split(",") if args.only else [p for p in PARTS if not (args.quick and p == "s1")]
if set(parts) - set(PARTS):
    sys.exit(f"--only: there is no {', '.join(set(parts) - set(PARTS))}; there are {', '.join(PARTS)}")
# before the libraries are loaded, which read these once
for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.pop(name, None)
os.environ.update(OMP_NUM_THREADS=str(args.threads), OMP_DYNAMIC="false")
os.environ.pop("OMP_WAIT_POLICY", None)
if args.wait != "default":
    os.environ["OMP_WAIT_POLICY"] = args.wait
try:
    import numpy as np
except ImportError as e:
    sys.exit(f"{e}: apt install python3-numpy and run this with /usr/bin/python3")

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
lines = []                                      # of markdown

def say(text=""):
    if not text.startswith("|"):
        end = "\n" * text.endswith("\n")
        text = textwrap.fill(text, 110, break_long_words=False) + end
    print(text, flush=True)
    lines.append(text)

def table(*head):
    say("| " + " | ".join(head) + " |")
    say("| --- |" + " ---: |" * (len(head) - 1))

def row(*cells):
    say("| " + " | ".join(cells) + " |")

def progress(text):                             # not part of the result
    print(text, file=sys.stderr, flush=True)

def build():
    out = os.path.join(ROOT, "build", "bench_cpu.so")
    os.makedirs(os.path.dirname(out), exist_ok=True)
    command = [os.environ.get("CC", "cc"), "-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math",
               "-fopenmp", "-shared", "-fPIC", os.path.join(HERE, "bench_cpu.c"), "-o", out, "-lm"]
    if subprocess.run(command).returncode:
        sys.exit("the C part could not be built: " + " ".join(command))
    lib, p, i = ctypes.CDLL(out), ctypes.c_void_p, ctypes.c_int
    lib.bench_matmul.argtypes = [i, i, p, p, p] + [i] * 6
    lib.bench_sgemm.argtypes = [p, i, p, p, p] + [i] * 6
    lib.bench_function.argtypes = [i, i, p, p, i]
    lib.bench_create.restype, lib.bench_create.argtypes = p, [ctypes.c_char_p, i]
    lib.bench_setting.restype, lib.bench_setting.argtypes = ctypes.c_double, [p, ctypes.c_char_p]
    lib.bench_parameter.restype = ctypes.c_char_p
    lib.bench_parameter.argtypes = [p, i, ctypes.POINTER(p), ctypes.POINTER(ctypes.c_size_t)]
    lib.bench_input.restype, lib.bench_input.argtypes = p, [p, ctypes.c_char_p]
    lib.bench_step.restype, lib.bench_step.argtypes = ctypes.c_double, [p, i]
    lib.bench_start.argtypes = lib.bench_destroy.argtypes = [p]
    lib.bench_compiler.restype = ctypes.c_char_p
    return lib

def load_openblas():
    for name in ("libopenblas.so.0", "libopenblas.so"):
        try:
            blas = ctypes.CDLL(name)
            break
        except OSError:
            continue
    else:
        sys.exit("OpenBLAS is not here: apt install libopenblas0-openmp")
    blas.openblas_get_config.restype = blas.openblas_get_corename.restype = ctypes.c_char_p
    config = " ".join(blas.openblas_get_config().decode().split()[:2])
    kind = {0: "without threads", 1: "pthreads", 2: "OpenMP"}[blas.openblas_get_parallel()]
    return blas, f"{config}, kernels for {blas.openblas_get_corename().decode()}, {kind}"

def processor():
    with open("/proc/cpuinfo") as f:
        info = dict(line.split(":", 1) for line in f if ":" in line)
    model, flags = info.get("model name\t", " ?").strip(), info.get("flags\t\t", "").split()
    best = next((f for f in ("avx512f", "avx2", "avx") if f in flags), "no AVX")
    return f"{model} ({best}, {os.cpu_count()} cores)"

def seconds(f):
    start = time.perf_counter()
    f()
    return time.perf_counter() - start

def take_turns(sides, budget, least=3, times=None):
    """Adds to `times` those of each side; the sides run one after another until the budget is spent."""
    times, end, first = times or [[] for _ in sides], time.perf_counter() + budget, True
    while first or len(times[0]) < least or time.perf_counter() < end:
        first = False
        for f, t in zip(sides, times):
            t.append(seconds(f))
    return times

def in_passes(cases, budget, least=3):
    """Times of all cases (each a list of sides), in several passes over all of them, so that a busy stretch
    of the machine falls on a part of each case and not on the whole of one."""
    passes = 2 if args.quick else 6
    times = [None] * len(cases)
    for _ in range(passes):
        for i, sides in enumerate(cases):
            times[i] = take_turns(sides, budget / passes, least=1, times=times[i])
    return [take_turns(sides, 0, least, t) if len(t[0]) < least else t for sides, t in zip(cases, times)]

def best_and_median(times):
    return [min(t) for t in times], [sorted(t)[len(t) // 2] for t in times]

def geometric_mean(xs):
    return math.exp(sum(map(math.log, xs)) / len(xs))

# ------------------------------------------------------------------------------------- the matrix product

# rows, and each linear layer's inputs and outputs: those of a block, the fusion, the alignment projector
def layers(D, M, Z, with_projector=True):
    out = [("qkv", D, 3 * D), ("proj", D, D), ("fc1", D, 4 * D), ("fc2", 4 * D, D)]
    return out + ([("fusion", 2 * D, D), ("p0", D, M), ("p2", M, M), ("p4", M, Z)] if with_projector else [])

MODELS = [("nano", "batch 64", 4160, layers(64, 128, 32)),
          ("nano, sparse", "batch 64", 1024, layers(64, 0, 0, with_projector=False)),
          ("S/1", "batch 4", 1028, layers(384, 2048, 768)), ("B/1", "batch 1", 257, layers(768, 2048, 768))]
PRODUCTS = ("output", "input gradient", "weight gradient")

def shape(product, rows, I, O):                 # M, N, K, ta, tb, add of linear_forward and _backward
    return {"output": (rows, O, I, 0, 1, 0), "input gradient": (rows, I, O, 0, 0, 0),
            "weight gradient": (O, I, rows, 1, 0, 1)}[product]

def matrices(*shapes):
    """C, A and B large enough for the products of all these shapes."""
    rs = np.random.RandomState(1)
    return [rs.standard_normal(max(s[i] * s[k] for s in shapes)).astype(np.float32)
            for i, k in ((0, 1), (0, 2), (2, 1))]

def bench_matmul(lib, blas, blas_name):
    sgemm = ctypes.cast(blas.cblas_sgemm, ctypes.c_void_p)
    products = [(model, f"{model} {name} {rows} x {I} x {O}", product, shape(product, rows, I, O))
                for model, _, rows, sizes in MODELS for name, I, O in sizes for product in PRODUCTS]
    C, A, B = matrices(*(dims for *_, dims in products))
    c, a, b = (x.ctypes.data for x in (C, A, B))

    def sides(name, product, dims):
        M, N, K = dims[:3]
        flop, got, want = 2.0 * M * N * K, np.zeros(M * N, np.float32), np.zeros(M * N, np.float32)
        lib.bench_matmul(4, 1, got.ctypes.data, a, b, *dims)
        lib.bench_sgemm(sgemm, 1, want.ctypes.data, a, b, *dims)
        if not abs(got - want).max() <= 1e-5 * math.sqrt(K) * abs(want).max():
            sys.exit(f"{name} {product}: ours and OpenBLAS disagree")
        times = max(1, round(2e-3 * 1e11 / flop))                   # some 2 ms a turn
        return flop * times, [lambda: lib.bench_matmul(4, times, c, a, b, *dims),
                              lambda: lib.bench_sgemm(sgemm, times, c, a, b, *dims)]

    flops, cases = zip(*(sides(name, product, dims) for _, name, product, dims in products))
    rates = [[1e-9 * flop / t for t in best_and_median(times)[0]]
             for flop, times in zip(flops, in_passes(cases, 0.15 if args.quick else 0.6, least=5))]
    say(f"Matrix product, float, {args.threads} threads, against {blas_name}; GFLOP/s of ours / OpenBLAS / "
        "ours as a share of OpenBLAS:\n")
    table("layer (rows x inputs x outputs)", *PRODUCTS)
    for i in range(0, len(products), 3):
        row(products[i][1], *(f"{x:.0f} / {y:.0f} / {100 * x / y:.0f} %" for x, y in rates[i:i + 3]))
    say()
    table("geometric mean of ours / OpenBLAS", *PRODUCTS, "all")
    for model, batch, *_ in MODELS:
        own = [(product, x / y) for (m, _, product, _), (x, y) in zip(products, rates) if m == model]
        means = [geometric_mean([r for p, r in own if p == product]) for product in PRODUCTS]
        row(f"{model}, {batch}", *(f"{100 * x:.0f} %" for x in means + [geometric_mean([r for _, r in own])]))
    say()

def bench_versions(lib):
    products = [(f"{model} {sizes[2][0]} {product}", shape(product, rows, *sizes[2][1:]))
                for model, _, rows, sizes in MODELS if "sparse" not in model for product in PRODUCTS]
    C, A, B = matrices(*(dims for _, dims in products))
    c, a, b = (x.ctypes.data for x in (C, A, B))
    run = lambda version, dims: lambda: lib.bench_matmul(version, 1, c, a, b, *dims)
    fast = in_passes([[run(v, dims) for v in (2, 3, 4)] for _, dims in products], 0.2 if args.quick else 1.0)
    slow = [take_turns([run(1, dims)], 0, least=1 if args.quick else 2) for _, dims in products]
    say(f"The versions of dev/matmul_versions.c, GFLOP/s, {args.threads} threads:\n")
    table("product", "1 naive", "2 loops turned", "3 register tile", "4 train_srdit.c")
    for (name, (M, N, K, *_)), one, others in zip(products, slow, fast):
        row(name, *(f"{2e-9 * M * N * K / t:.1f}" for t in best_and_median(one + others)[0]))
    say()

# ------------------------------------------------------------------------------------------- the functions

def bench_functions(lib):
    n, times = 4096, 100                        # in the first cache
    x = (4 * np.random.RandomState(1).standard_normal(n)).astype(np.float32)
    out = np.empty_like(x)
    run = lambda which, k: lib.bench_function(which, k, out.ctypes.data, x.ctypes.data, n)
    say("Functions on one core, 10^9 elements a second:\n")
    table("function", "ours", "libm", "ratio")
    for i, name in enumerate(("exp", "GELU (tanh form)")):
        (ours, theirs), _ = best_and_median(take_turns(
            [lambda: run(i, times), lambda: run(i + 2, times // 10)], 0.3 if args.quick else 1.5, least=10))
        ours, theirs = 1e-9 * n * times / ours, 1e-9 * n * (times // 10) / theirs
        row(name, f"{ours:.2f}", f"{theirs:.3f}", f"{ours / theirs:.0f} x")
    say()

# -------------------------------------------------------------------------------------------- a whole step

class Ours:
    def __init__(self, lib, model, batch):
        self.lib, self.step_count = lib, 0
        self.at = lib.bench_create(model.encode(), batch)

    def setting(self, name):
        x = self.lib.bench_setting(self.at, name.encode())
        return int(x) if x == int(x) else x

    def parameters(self):                       # name -> an array over its memory
        out, data, size = {}, ctypes.c_void_p(), ctypes.c_size_t()
        while True:
            name = self.lib.bench_parameter(self.at, len(out), ctypes.byref(data), ctypes.byref(size))
            if not name:
                return out
            floats = ctypes.cast(data, ctypes.POINTER(ctypes.c_float))
            out[name.decode()] = np.ctypeslib.as_array(floats, (size.value,))

    def put_input(self, name, x):
        x = np.ascontiguousarray(x)
        ctypes.memmove(self.lib.bench_input(self.at, name.encode()), x.ctypes.data, x.nbytes)

    def step(self):
        self.step_count += 1
        return self.lib.bench_step(self.at, self.step_count)

class Theirs:
    """dev/reference.py's model and loss, clip_grad_norm_, AdamW and the EMA in their fast (foreach) forms."""
    def __init__(self, torch, reference, config):
        self.torch, self.reference, self.cfg = torch, reference, config
        torch.manual_seed(1)
        self.model = reference.SRDiT(config).train()
        self.model.init_weights()
        self.weights = list(self.model.parameters())
        self.ema = [p.detach().clone() for p in self.weights]
        self.adam = torch.optim.AdamW(self.weights, config.lr, (config.beta1, config.beta2), config.eps,
                                      config.weight_decay, foreach=True)

    def step(self):
        torch = self.torch
        self.adam.zero_grad(set_to_none=True)
        loss = self.reference.training_loss(self.model, self.inputs)["total"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, self.cfg.max_grad_norm)
        self.adam.step()
        with torch.no_grad():
            torch._foreach_mul_(self.ema, self.cfg.ema_decay)
            torch._foreach_add_(self.ema, self.weights, alpha=1 - self.cfg.ema_decay)
        return loss.item()

def bench_step(lib, name, batch, budget):
    """The best and the median milliseconds a step, each of ours and PyTorch's, and its version."""
    try:
        import torch
    except ImportError as e:
        sys.exit(f"{e}: apt install python3-torch and run this with /usr/bin/python3")
    sys.path.insert(0, HERE)
    import reference
    torch.set_num_threads(args.threads)
    ours = Ours(lib, name, batch)
    settings = {f.name: ours.setting(f.name) for f in reference.fields(reference.Config)
                if f.name not in ("steps", "dtype", "switch_off")}
    cfg = reference.Config(**settings, dtype="float32")
    theirs, params = Theirs(torch, reference, cfg), ours.parameters()
    for key, x in theirs.model.state_dict().items():
        params[key][:] = x.numpy().ravel()
    lib.bench_start(ours.at)
    rs, B = np.random.RandomState(1), batch
    latent = B, cfg.in_channels, cfg.input_size, cfg.input_size
    d = dict(x=rs.uniform(-1, 1, latent), noise=rs.standard_normal(latent), t=rs.random_sample(B),
             cls=rs.standard_normal((B, cfg.z_dim)), noise_cls=rs.standard_normal((B, cfg.z_dim)),
             feats=rs.standard_normal((B, cfg.T, cfg.z_dim)))
    d = {key: x.astype(np.float32) for key, x in d.items()}
    d["y"] = rs.randint(0, cfg.num_classes, B)
    d["ids_keep"] = np.stack([np.sort(rs.permutation(cfg.T)[:cfg.Tk]) for _ in range(B)])
    theirs.inputs = {key: torch.from_numpy(x) for key, x in d.items()}
    theirs.inputs.update(drop=torch.zeros(B, dtype=torch.uint8), path_drop=torch.zeros(1, dtype=torch.uint8))
    d["t"] = cfg.shift_time(torch.from_numpy(d["t"])).numpy()       # theirs shifts it in the step
    d["v_before"] = d["noise"][-1] - d["x"][-1]
    for key, x in d.items():
        ours.put_input(key, x.astype(np.int32) if x.dtype == np.int64 else x)
    for i in range(3):                          # also warms up; the same losses show that it is the same step
        a, b = ours.step(), theirs.step()
        if not abs(a - b) <= 2e-3 * abs(b):
            sys.exit(f"{name}, step {i + 1}: our loss is {a}, PyTorch's {b}")
    progress(f"{name}: the loss of step 3 is {a:.6f}, PyTorch's {b:.6f}")
    def turn(step):                             # steps in a row, as in training: each finds its own data in
        return lambda: [step() for _ in range(STEPS)]                           # the cache
    best, median = best_and_median(take_turns([turn(ours.step), turn(theirs.step)], budget))
    lib.bench_destroy(ours.at)
    return [1000 * t / STEPS for t in best], [1000 * t / STEPS for t in median], torch.__version__

def bench_steps(lib):
    cases = [("nano", "nano", 64, 10 if args.quick else 40), ("s1", "S/1", 4, 40)]
    results = [(model, batch, bench_step(lib, model, batch, budget))
               for part, model, batch, budget in cases if part in parts]
    if not results:
        return
    say(f"A training step (forward, backward, clipping, AdamW, EMA; inputs ready, float, {args.threads} "
        f"threads) against PyTorch {results[0][2][2]} with the same BLAS; milliseconds, best / median of the "
        f"turns of {STEPS} steps:\n")
    table("model", "ours", "PyTorch", "PyTorch / ours")
    for name, batch, (best, median, _) in results:
        row(f"{name}, batch {batch}", *(f"{a:.1f} / {b:.1f}" for a, b in zip(best, median)),
            f"{best[1] / best[0]:.2f} / {median[1] / median[0]:.2f}")
    say()

def save():
    path, begin, end = os.path.join(HERE, "README.md"), "<!-- bench_cpu begins -->", "<!-- bench_cpu ends -->"
    with open(path) as f:
        text = f.read()
    if begin not in text or end not in text:
        sys.exit(f"{path}: the marks {begin} and {end} are missing")
    before, after = text.split(begin)[0], text.split(end)[1]
    with open(path, "w") as f:
        f.write(before + begin + "\n" + "\n".join(lines).rstrip() + "\n" + end + after)
    progress(f"{path}: saved")

def main():
    lib = build()
    blas, blas_name = load_openblas()
    load = os.getloadavg()[0]
    say(f"{time.strftime('%Y-%m-%d')}, {processor()}, {lib.bench_compiler().decode()}, vectors of "
        f"{lib.bench_vector_bytes()} bytes, {args.threads} threads, OMP_WAIT_POLICY {args.wait}; load of the "
        f"machine at the start: {load:.1f}{'; --quick' if args.quick else ''}.\n")
    if "matmul" in parts:
        bench_matmul(lib, blas, blas_name)
    if "versions" in parts:
        bench_versions(lib)
    if "functions" in parts:
        bench_functions(lib)
    bench_steps(lib)
    if args.save:
        save()

if __name__ == "__main__":
    main()
