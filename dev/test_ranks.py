#!/usr/bin/env python3
"""Several ranks against one process, by emulation: the same training, whatever the number of ranks, and what
happens where a rank is missing, dies or differs.

  python3 dev/test_ranks.py              needs ./train_srdit_emu and ./train_srdit_emu_bf16 (make test_ranks
                                         makes them), cc, numpy
  python3 dev/test_ranks.py --only kill  what has this in its name; --list shows all names

Ranks are started as torchrun starts them, by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, each on
one thread and one emulated GPU; NCCL is dev/cuda_on_cpu/nccl_cpu.cpp. The model is as small as it can be with
every part in it. Two runs agree if no number of their checkpoints (weights, moving average, both moments)
differs by more than 1e-5 of its tensor's largest: float's sums in another order. The exit status tells.
"""
import argparse, json, os, random, resource, shutil, signal, socket, subprocess, sys, tempfile, time
import numpy as np

signal.signal(signal.SIGINT, signal.default_int_handler)   # a shell's background job would ignore it, and so its children

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--train", default=os.path.join(ROOT, "train_srdit_emu"))
parser.add_argument("--only", default="", help="only tests with this in their name")
parser.add_argument("--list", action="store_true", help="the names of the tests")
options = parser.parse_args()
TRAIN = os.path.abspath(options.train)
BF16 = TRAIN + "_bf16"
work = tempfile.mkdtemp(prefix="srdit-ranks-")
CHECK = os.path.join(work, "ranks_check")
TOLERANCE, LIMIT, PATIENCE = 1e-5, 150, 4   # seconds: of a run at most; that a rank waits for the others
passed, failed, tests = 0, [], []

def check(what, good, detail=""):
    global passed
    if good:
        passed += 1
        return True
    failed.append(what)
    print("FAIL %s: %s" % (what, " ".join(str(detail).split())[-600:]), flush=True)
    return False

def test(f):
    tests.append(f)
    return f

# ------------------------------------------------------------------------------------------------------------
# Starting ranks

def free_port():
    """Of two neighbours that are free: torchrun's, and where the ranks meet"""
    while True:
        port = random.randrange(20000, 30000)
        sockets = [socket.socket() for _ in range(2)]
        try:
            for i, s in enumerate(sockets):
                s.bind(("", port + i))
            return port
        except OSError:
            pass
        finally:
            for s in sockets:
                s.close()

def last_of_each(words):
    """A command line of which a later flag replaces the same one before"""
    flags, at = {"": []}, ""
    for word in words:
        if word.startswith("--"):
            at, flags[word] = word, []
        else:
            flags[at].append(word)
    return [w for flag, values in flags.items() for w in [flag] + values if w]

class Ranks:
    """size processes of one training. args, env: of all; own[rank]: (args, env) of one, None: it does not come"""
    def __init__(self, size, args, own={}, env={}, program=None, port=None):
        base = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "OMPI", "PMI", "NCCL", "CUDA_CPU"))}
        base.update(OMP_NUM_THREADS="1", LC_ALL="C", CUDA_CPU_DEVICES=str(size), RANKS_DEADLINE=str(PATIENCE),
                    WORLD_SIZE=str(size), MASTER_ADDR="localhost", MASTER_PORT=str(port or free_port()))
        base.update(env)
        self.processes, self.begin = [], time.time()
        for rank in range(size):
            if own.get(rank, 0) is None:
                continue
            more, also = own.get(rank, ([], {}))
            self.processes.append(subprocess.Popen(
                [program or TRAIN] + last_of_each(args + more), cwd=work, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, text=True,
                env={**base, "RANK": str(rank), "LOCAL_RANK": str(rank), **also}))
    def wait(self):
        """[(status, stdout, stderr)]; what does not end is killed and has status None"""
        results = []
        for p in self.processes:
            try:
                out, err = p.communicate(timeout=max(1, self.begin + LIMIT - time.time()))
                results.append((p.returncode, out, err))
            except subprocess.TimeoutExpired:
                p.kill()
                out, err = p.communicate()
                results.append((None, out, err))
        self.seconds = time.time() - self.begin
        return results

# ------------------------------------------------------------------------------------------------------------
# A data set of 24 samples of 2 classes and a model of 17 tokens

def make_data(name, seed=1, decoder="invae"):
    sys.path.insert(0, os.path.join(ROOT, "data"))
    import digits
    rng, n, tokens, z = np.random.default_rng(seed), 24, 17, 8
    tensors = {"cls": rng.standard_normal((n, z)).astype(np.float32),
               "latents": rng.integers(0, 17, (n, 1, 4, 4)).astype(np.uint8),
               "labels": (np.arange(n) % 2).astype(np.uint8),
               "feats": rng.integers(-127, 128, (n, tokens, z)).astype(np.int8)}
    with open(os.path.join(work, name), "wb") as f:
        f.write(digits.to_safetensors(tensors, {
            "format": "srdit-data-1", "name": "tiny", "classes": "2", "latent_scale": "0.125", "latent_offset": "-1",
            "decoder": decoder, "train_samples": str(n)}))

TINY = ("--data tiny.safetensors --depth 4 --num-f 1 --num-h 1 --hidden-size 16 --num-heads 2 --projector-dim 12 "
        "--sample-steps 1 --log-every 1 --threads 1 --lr 0.002 --ema-decay 0.5 --batch 12 "
        "--path-drop-prob 0.3 --eps 1e-3").split()   # with 1e-8 a step is the sign of gradients that are all rounding

def checkpoint(folder):
    with open(os.path.join(work, folder, "checkpoint.safetensors"), "rb") as f:
        data = f.read()
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + n])
    header.pop("__metadata__")
    return {k: np.frombuffer(data[8 + n + v["data_offsets"][0]:8 + n + v["data_offsets"][1]], np.float32)
            for k, v in header.items()}

def distance(a, b, prefix=""):
    """The largest difference, in parts of its tensor's largest number, and where"""
    a, b = checkpoint(a), checkpoint(b)
    if a.keys() != b.keys():
        return float("inf"), "other tensors"
    far = ((float(np.abs(a[k] - b[k]).max() / max(np.abs(a[k]).max(), 1e-30)), k)
           for k in a if a[k].size and k.startswith(prefix))
    return max((d if d == d else float("inf"), k) for d, k in far)   # max() would pass over a NaN

def same_bits(a, b):
    a, b = checkpoint(a), checkpoint(b)
    return a.keys() == b.keys() and all(a[k].tobytes() == b[k].tobytes() for k in a)

def losses(folder):
    """log.csv without its times"""
    with open(os.path.join(work, folder, "log.csv")) as f:
        return np.array([[float(x) for x in line.split(",")[:8]] for line in f.readlines()[1:]])

def train(size, out, args, **more):
    ranks = Ranks(size, TINY + ["--out", out] + args, **more)
    results = ranks.wait()
    good = all(r[0] == 0 for r in results) and len(results) == size
    check("%s: %d ranks end well" % (out, size), good, [(r[0], r[2]) for r in results])
    quiet = all(not r[1] for r in results[1:])
    check("%s: only rank 0 prints" % out, quiet, [r[1] for r in results[1:]])
    return good

def agree(a, b, tolerance=TOLERANCE, of_losses=TOLERANCE):
    far, where = distance(a, b)
    check("%s and %s agree" % (a, b), far <= tolerance, "%s: %.3g" % (where, far))
    x, y = losses(a), losses(b)
    far = np.abs(x - y).max() / np.abs(x).max() if x.shape == y.shape else np.inf
    check("%s and %s: the same losses and norms" % (a, b), far <= of_losses, far)

def fresh(out):
    shutil.rmtree(os.path.join(work, out), ignore_errors=True)

def one(out, args, **more):
    """The run of one process that others are compared with; made once"""
    if not os.path.exists(os.path.join(work, out)):
        train(1, out, args, **more)
    return out

def all_end(what, ranks, says, dead=(), within=30):
    """Every rank that lives ends by itself, not with 0, with one sentence that has `says` in it."""
    results = ranks.wait()
    for i, (status, out, err) in enumerate(results):
        if i in dead:
            continue
        lines = [l for l in err.splitlines() if l.startswith("error:")]
        check("%s: process %d ends with one sentence" % (what, i),
              status not in (0, None) and status > 0 and len(lines) == 1 and says in lines[0], (status, err, out[-200:]))
    check("%s: within %d s" % (what, within), ranks.seconds < within, ranks.seconds)

# ------------------------------------------------------------------------------------------------------------
# The tests

@test
def who():
    """Rank, size and meeting place from what three starters leave"""
    def asked(**env):
        r = subprocess.run([CHECK, "who"], env=env, capture_output=True, text=True)
        return r.stdout.strip() or r.stderr.strip()
    slurm = dict(SLURM_STEP_NUM_TASKS="8", SLURM_PROCID="3", SLURM_LOCALID="1")
    mpi = dict(OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_RANK="1", OMPI_COMM_WORLD_LOCAL_RANK="1")
    torch = dict(WORLD_SIZE="4", RANK="2", LOCAL_RANK="1", MASTER_ADDR="a.b", MASTER_PORT="2000")
    for got, want in (
            (asked(**torch), "2 4 1 a.b 2000"),
            (asked(**slurm, SLURM_STEP_NODELIST="gpu[07-09,11],a1", MASTER_PORT="3000"), "3 8 1 gpu07 3000"),
            (asked(**slurm, SLURM_STEP_NODELIST="n1,n2", MASTER_PORT="3000"), "3 8 1 n1 3000"),
            (asked(**mpi, OMPI_COMM_WORLD_LOCAL_SIZE="2", MASTER_PORT="3000"), "1 2 1 127.0.0.1 3000"),
            (asked(**mpi, OMPI_COMM_WORLD_LOCAL_SIZE="1", MASTER_ADDR="x", MASTER_PORT="3000"), "1 2 1 x 3000"),
            (asked(SLURM_NTASKS="8", SLURM_PROCID="0"), "0 1 0  0")):
        check("who: " + want, got == want, got)
    for got, word in ((asked(**mpi, OMPI_COMM_WORLD_LOCAL_SIZE="1"), "MASTER_ADDR"),
                      (asked(**dict(torch, RANK="4")), "RANK"), (asked(**dict(torch, RANK="x")), "RANK"),
                      (asked(**dict(torch, WORLD_SIZE="0")), "WORLD_SIZE"),
                      (asked(**dict(torch, MASTER_PORT="99999")), "MASTER_PORT")):
        check("who: a wrong %s" % word, got.startswith("error:") and word in got, got)

@test
def roll_call():
    """The processes alone, without a training (dev/ranks_check.c)"""
    for size in 2, 3, 8:
        results = Ranks(size, ["end"], program=CHECK).wait()
        check("%d meet and part" % size, all(r[0] == 0 for r in results), results)
    for who in 0, 2:
        all_end("rank %d dies" % who, Ranks(3, [], {r: (["die" if r == who else "wait"], {}) for r in range(3)},
                                            program=CHECK), "no luck", within=10)
        all_end("rank %d is killed" % who,
                Ranks(3, [], {r: (["kill" if r == who else "wait"], {}) for r in range(3)}, program=CHECK),
                "rank %d on" % who, dead=[who], within=10)
        all_end("rank %d does not come" % who, Ranks(3, ["wait"], {who: None}, program=CHECK),
                "rank %d has not" % who, within=15)
    ranks = Ranks(3, [], {r: (["hang" if r == 1 else "wait"], {}) for r in range(3)}, program=CHECK)
    for p in ranks.processes[::2]:
        p.wait(timeout=30)
    ranks.processes[1].kill()
    all_end("rank 1 hangs", ranks, "rank 1 on", dead=[1], within=15)
    ranks = Ranks(3, ["count"], program=CHECK)
    time.sleep(1)
    for _ in range(2):   # by the terminal, and by torchrun
        ranks.processes[2].send_signal(signal.SIGINT)
        time.sleep(0.002)
    results = ranks.wait()
    counts = {r[2].split(":")[-1] for r in results}
    check("one is interrupted: all stop at the same step", all(r[0] == 0 for r in results) and len(counts) == 1,
          results)
    port = free_port()
    with socket.socket() as other:   # what an earlier run left, or another program
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("", port + 1))
        other.listen()
        all_end("the port is taken", Ranks(2, ["end"], program=CHECK, port=port), "port", within=25)
    all_end("two say they are rank 1", Ranks(3, ["wait"], {2: (["wait"], {"RANK": "1"})}, program=CHECK),
            "two processes", within=15)
    all_end("another size", Ranks(2, ["wait"], {1: (["wait"], {"WORLD_SIZE": "3"})}, program=CHECK), "one of",
            within=15)

@test
def same_training():
    """1, 2, 3 and 4 ranks, update by update; twice the same bits"""
    for size in 2, 3, 4:
        for steps in (1, 4) if size == 4 else (4,):
            out = "ranks%d-%d" % (size, steps)
            if train(size, out, ["--steps", str(steps)]):
                agree(one("one-%d" % steps, ["--steps", str(steps)]), out)
    train(3, "again", ["--steps", "4"])
    check("twice 3 ranks: the same bits", same_bits("ranks3-4", "again"))

@test
def parts():
    """A share in parts, and what is switched off"""
    for name, args in (("accum", ["--accum", "3"]), ("no-align", ["--no-align"]),
                       ("no-cls", ["--no-cls", "--no-value-residual"]), ("no-h", ["--num-h", "0"]),
                       ("depths", ["--align-depths", "1,2,4"]), ("depth-of-g", ["--align-depths", "2"]),
                       ("immiscible", ["--immiscible", "4", "--mlp-widths", "4,8"]), ("late", [])):
        out = one("one-" + name, args + ["--steps", "3"])
        if train(2, "two-" + name, args + ["--steps", "3"],
                 env={"CUDA_CPU_ASYNC": "1"} if name == "late" else {}):
            agree(out, "two-" + name)

    # without a decoder the last bucket begins within the projector, which 3 does not divide
    if train(3, "three-no-h", ["--num-h", "0", "--steps", "3"], env={"CUDA_CPU_ASYNC": "1"}):
        agree("one-no-h", "three-no-h")

def gone_on(begun, folder, size, args, **more):
    """A copy of a run, gone on with by `size` ranks"""
    shutil.copytree(os.path.join(work, begun), os.path.join(work, folder))
    results = Ranks(size, TINY + ["--resume", folder + "/checkpoint.safetensors"] + args, **more).wait()
    return check("%s, gone on with by %d" % (begun, size), all(r[0] == 0 for r in results), results)

@test
def muon():
    """Matrices that have an owner each; saved by 3 ranks, gone on with by 2, by 1, and by 4 with late streams"""
    muon = ["--optimizer", "muon"]
    out = one("one-muon", muon + ["--steps", "3"])
    if train(3, "three-muon", muon + ["--steps", "2"]):
        for size in 2, 1, 4:
            more = {"env": {"CUDA_CPU_ASYNC": "1"}} if size == 4 else {}
            if gone_on("three-muon", "muon%d" % size, size, ["--steps", "3"], **more):
                agree(out, "muon%d" % size)
    more = muon + ["--muon", "srdit13", "--num-h", "0", "--align-depths", "1,2", "--mlp-widths", "4,8"]
    if train(2, "all-muon", more + ["--steps", "3"]):
        # adaLN's gradient of 12 samples has rank 12 of 16: in the other directions there is rounding alone, which the
        # polynomial multiplies by up to 485
        agree(one("one-all-muon", more + ["--steps", "3"]), "all-muon", 5e-4, 5e-4)

@test
def dealt_out():
    """Moments and average are: what one rank keeps of them is smaller by the number of ranks, however they step"""
    for optimizer in "adamw", "muon":
        gigabytes = {}
        for size in 1, 4:
            ranks = Ranks(size, TINY + ["--hidden-size", "256", "--batch", "4", "--steps", "1", "--optimizer", optimizer,
                                        "--out", "dealt-%s-%d" % (optimizer, size)])
            words = ranks.wait()[0][1].split("gradients, moments, average ")
            gigabytes[size] = float(words[1].split()[0]) if len(words) == 2 else 0
        # of float32 weights, gradients, two moments and the average 2 of 5 stay whole
        share = gigabytes[4] / gigabytes[1] if gigabytes[1] else 9
        check("%s: 4 ranks keep (2 + 3 / 4) / 5 each" % optimizer, abs(share - 2.75 / 5) < 0.06, gigabytes)

@test
def bf16():
    """Products in bf16: rounded weights go round, and a rank knows those in float of its own pieces only. The
    emulator makes all others NaN. Large steps, so that weights of the step before would be noticed; pictures
    after the second, so that the average has been in the weights' place. A sum in another order may round a
    number the other way; Muon multiplies that by up to 485, and a step of before would be off by 0.15"""
    muon = ["--optimizer", "muon", "--muon-lr", "0.05"]
    for name, args, may in (("adamw", [], 1e-4), ("muon", muon, 2e-2), ("no-h", ["--num-h", "0"], 1e-4),
                            ("all-muon", muon + ["--muon", "srdit13", "--eps", "1e-3"], 2e-2)):
        args = ["--data", "drawn.safetensors"] + args + ["--lr", "0.02", "--sample-every", "2", "--steps", "3"]
        out = one("one16-" + name, args, program=BF16)
        for size in (2, 3) if name == "adamw" else (3,):
            folder = "ranks16-%s-%d" % (name, size)
            if train(size, folder, args, program=BF16):
                agree(out, folder, may, may)
        if name in ("adamw", "muon") and train(3, "begun16-" + name, args[:-2] + ["--steps", "2"], program=BF16) and \
                gone_on("begun16-" + name, "resumed16-" + name, 2, args, program=BF16):
            agree(out, "resumed16-" + name, may, may)

@test
def reduced():
    """Gradients that are added up in bf16: near those in float, and twice the same bits"""
    for name, args in (("adamw", []), ("muon", ["--optimizer", "muon"])):
        args = args + ["--steps", "2"]   # at the first only the last layer has gradients
        out = one("one-reduced-" + name, args)
        for again in "", "-again":
            train(3, "reduced-%s%s" % (name, again), args + ["--reduce-bf16"])
        check("%s: twice the same bits" % name, same_bits("reduced-" + name, "reduced-%s-again" % name))
        for moment in ("adam.m.", "muon.")[:1 + (name == "muon")]:
            far, where = distance(out, "reduced-" + name, moment)
            check("%s, %s: rounded, and no more" % (name, moment), 1e-4 < far < 5e-2, "%s: %.3g" % (where, far))
    status, _, err = Ranks(1, TINY + ["--out", "refused", "--reduce-bf16"]).wait()[0]
    check("--reduce-bf16 alone is refused", status == 1 and "several GPUs" in err, err)

@test
def resume():
    """Saved by 4 ranks, gone on with by 1, 2 and 3"""
    out = one("one-4", ["--steps", "4"])
    if not train(4, "four", ["--steps", "2"]):
        return
    for size in 1, 2, 3:
        if gone_on("four", "resumed%d" % size, size, ["--steps", "4"]):
            agree(out, "resumed%d" % size)

@test
def killed():
    """A rank is killed at a random time; the last checkpoint is whole, and is gone on with"""
    for victim in 0, 1:
        out = "killed%d" % victim
        ranks = Ranks(2, TINY + ["--out", out, "--steps", "100000", "--save-every", "1"])
        path = os.path.join(work, out, "checkpoint.safetensors")
        end = time.time() + 60
        while not os.path.exists(path) and time.time() < end and ranks.processes[0].poll() is None:
            time.sleep(0.1)
        time.sleep(random.uniform(0, 2))
        ranks.processes[victim].kill()
        killed = time.time()
        all_end("rank %d killed" % victim, ranks, "rank %d on" % victim, dead=[victim], within=100)
        check("rank %d killed: within 30 s of it" % victim, time.time() - killed < 30, time.time() - killed)
        at = int(losses(out)[-1][0]) if os.path.exists(path) else 0
        results = Ranks(1, TINY + ["--resume", out + "/checkpoint.safetensors", "--steps", str(at + 2)]).wait()
        check("rank %d killed: the checkpoint is whole" % victim, results[0][0] == 0, results)

@test
def interrupted():
    """Ctrl-C on one rank: all end after the same step, with a checkpoint"""
    for who in 0, 1:
        out = "interrupted%d" % who
        ranks = Ranks(2, TINY + ["--out", out, "--steps", "100000"])
        while not os.path.exists(os.path.join(work, out, "log.csv")) and time.time() < ranks.begin + 60:
            time.sleep(0.1)
        ranks.processes[who].send_signal(signal.SIGINT)
        results = ranks.wait()
        check("rank %d interrupted" % who, all(r[0] == 130 for r in results), results)
        check("rank %d interrupted: a checkpoint" % who, os.path.exists(os.path.join(work, out, "checkpoint.safetensors")))

@test
def refused():
    """Each of these ends every rank with one sentence, and nothing is written"""
    for what, own, args, env, says in (
            ("other flags", {1: (["--lr", "0.003"], {})}, [], {}, "other flags"),
            ("another seed", {1: (["--seed", "9"], {})}, [], {}, "other flags"),
            ("other data", {1: (["--data", "other.safetensors"], {})}, [], {}, "--data"),
            ("no data", {1: (["--data", "none.safetensors"], {})}, [], {}, "none.safetensors"),
            ("a batch that does not divide", {}, ["--batch", "13"], {}, "--batch"),
            ("a batch that does not divide into parts", {}, ["--accum", "4"], {}, "--accum"),
            ("fewer GPUs than ranks", {}, [], {"CUDA_CPU_DEVICES": "1"}, "GPU"),
            ("no NCCL", {}, [], {"NCCL_LIBRARY": "/nowhere/libnccl.so.2"}, "NCCL"),
            ("a library that is not NCCL", {}, [], {"NCCL_LIBRARY": "libm.so.6"}, "NCCL"),
            ("a run of the race", {}, ["--track", "digits"], {}, "--track")):
        base = [] if "--track" in args else TINY + ["--steps", "2"]
        all_end(what, Ranks(2, base + ["--out", "refused"] + args, own, env), says)
        check(what + ": nothing is written", not os.path.exists(os.path.join(work, "refused/checkpoint.safetensors")))
        fresh("refused")

@test
def not_finite():
    """A step that goes wrong ends all, and nothing of it is saved"""
    for program, args in (None, []), (BF16, ["--accum", "2"]):
        ranks = Ranks(2, TINY + ["--out", "wild", "--steps", "50", "--lr", "1e6"] + args, program=program)
        all_end("not finite", ranks, "finite", within=LIMIT)
        fresh("wild")

if options.list:
    print("\n".join(t.__name__ for t in tests))
    sys.exit(0)
begin = time.time()
try:
    make_data("tiny.safetensors")
    make_data("other.safetensors", 2)
    make_data("drawn.safetensors", decoder="pixels")
    subprocess.run(["cc", "-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", os.path.join(ROOT, "dev/ranks_check.c"),
                    "-o", CHECK, "-pthread"], check=True)
    for t in tests:
        if options.only in t.__name__:
            start = time.time()
            t()
            print("%-16s %4.0f s" % (t.__name__, time.time() - start), flush=True)
finally:
    shutil.rmtree(work, ignore_errors=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print("%d checks of several ranks passed, %d failed, %.0f s, of a processor %.0f" % (
    passed, len(failed), time.time() - begin, used.ru_utime + used.ru_stime))
sys.exit(1 if failed or not passed else 0)
