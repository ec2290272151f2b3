#!/usr/bin/env python3
"""Would the tests notice a bug? Breaks a CUDA file in one place at a time and runs a test on each mutant.

In every __global__ and __device__ function of FILE, one at a time:
  barrier   a `__syncthreads();` or `__syncwarp();` is removed
  guard     a comparison in an `if (... < n)` becomes true, in an `if (... >= n)` false
  mask      a full mask 0xffffffff of a shuffle or vote becomes 0x0000ffff
and of train_srdit.cu, on the host's side too:
  planted   one of PLANTED, below
The mutants are built by the project's Makefile in a copy of the working tree, and run on the CPU (see
dev/cuda_on_cpu): in the thread orders fwd, rev and rand, and under address and thread sanitizer. A test that
ends with another status than 0, or does not end, has caught the mutant.

  dev/mutants_cuda.py dev/cuda_on_cpu/selftest.cu 'build/emu-{mode}/selftest no-bugs' \\
      --make 'build/emu-{mode}/selftest'
  dev/mutants_cuda.py train_srdit.cu ./test_srdit_emu --make test_srdit_emu --modes fwd,rev --jobs 2

{mode} stands for the MODE of the build: plain, asan or tsan.
"""
import argparse, os, re, shutil, subprocess, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor
from queue import Queue

MODES = {"fwd": ("plain", {"CUDA_CPU_ORDER": "fwd"}), "rev": ("plain", {"CUDA_CPU_ORDER": "rev"}),
         "rand": ("plain", {"CUDA_CPU_ORDER": "rand", "CUDA_CPU_SEED": "1"}), "asan": ("asan", {}),
         "tsan": ("tsan", {})}

# Of alignment at several depths: --kinds planted with the test './test_srdit_emu aligned'
PLANTED = [
    ("the features of the first tokens", "a.ids[n]) * a.Z", "n % a.n) * a.Z"),
    ("all depths weigh as one", "(double)T / (n * depths)", "(double)T / n"),
    ("the first depth's gradient for all", "size_t row = (size_t)(align_row(c, k, B) -",
     "size_t row = (size_t)(align_row(c, 0, B) -"),
    ("path drop: E gets no gradient of g's", "rows = B * n;\n            rows_kernel",
     "rows = 0;\n            rows_kernel"),
    ("path drop: a run over its end", "int aligned = end_of_g(c, 1, 1);", "int aligned = c->num_f;"),
]

def closing(text, at, pair="()"):
    """Where the bracket that opens at `at` closes."""
    depth = 0
    for i in range(at, len(text)):
        depth += (text[i] == pair[0]) - (text[i] == pair[1])
        if depth == 0:
            return i
    return len(text)

def device_code(text):
    """The ranges of the bodies of device functions."""
    for m in re.finditer(r"__(?:global|device)__", text):
        brace, end = text.find("{", m.end()), text.find(";", m.end())
        if brace >= 0 and (end < 0 or brace < end):     # a definition; not a declaration or a variable
            yield brace, closing(text, brace, "{}")

def only_code(text):
    """The same length and lines; comments, strings and directives blank, so that nothing in them counts."""
    blank = lambda m: re.sub(r"[^\n]", " ", m.group(0))
    return re.sub(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|(?m:^[ \t]*#[^\n]*)", blank, text, flags=re.S)

def mutants(text, file):
    """[(line, kind, what, mutated text)], in the order of the file."""
    code, found = only_code(text), {}
    comparison = re.compile(r"[^<>=!?{}]* (<|>=) [\w.>()-]+\s*")
    def add(kind, start, end, by):
        found[start, end] = (text[:start].count("\n") + 1, kind, " ".join(text[start:end].split()),
                             text[:start] + by + text[end:])
    for begin, end in device_code(code):
        for m in re.compile(r"__sync(?:threads|warp)\(\s*\);").finditer(code, begin, end):
            add("barrier", m.start(), m.end(), ";")
        for m in re.compile(r"_sync\(\s*(0xffffffffu?)\b", re.I).finditer(code, begin, end):
            add("mask", m.start(1), m.end(1), "0x0000ffffu")
        for m in re.compile(r"\bif \(").finditer(code, begin, end):
            condition = m.end(), closing(code, m.end() - 1)
            at = condition[0]
            for part in re.split(r"(&&|\|\|)", code[condition[0]:condition[1]]):
                if comparison.fullmatch(part) and part.count("(") == part.count(")"):
                    start = at + len(part) - len(part.lstrip())
                    add("guard", start, at + len(part.rstrip()), "true" if " < " in part else "false")
                at += len(part)
    for what, old, new in PLANTED if file.endswith("train_srdit.cu") else []:
        if text.count(old) != 1:
            sys.exit(f"{file}: the place of \"{what}\" is there {text.count(old)} times")
        at = text.index(old)
        found[at, at + len(old)] = text[:at].count("\n") + 1, "planted", what, text.replace(old, new)
    return [found[key] for key in sorted(found)]

def copy_tree(to):
    files = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard", "-z"])
    for name in filter(None, files.decode().split("\0")):
        if os.path.isfile(name):
            os.makedirs(os.path.join(to, os.path.dirname(name)), exist_ok=True)
            shutil.copy2(name, os.path.join(to, name))

class Bench:
    """One copy of the tree, where mutants are built and run one after another."""
    def __init__(self, args, folder):
        self.args, self.folder, self.limit = args, folder, {}
        copy_tree(folder)

    def sh(self, command, mode, env={}, limit=None):
        command = command.replace("{mode}", mode)
        return subprocess.run(command, shell=True, cwd=self.folder, env=dict(os.environ, MODE=mode, **env),
                              timeout=limit, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def build(self, mode):
        return self.sh(f"make -s MODE={mode} {self.args.make}", mode)

    def run(self, name):
        """True if the test fails or hangs."""
        mode, env = MODES[name]
        start = time.time()
        try:
            failed = self.sh(f"exec {self.args.test}", mode, env, self.limit.get(name)).returncode != 0
        except subprocess.TimeoutExpired:
            return True
        self.limit.setdefault(name, 30 + 10 * (time.time() - start))
        return failed

    def judge(self, text):
        """{mode: caught?}; None for a build that failed."""
        with open(os.path.join(self.folder, self.args.file), "w") as f:
            f.write(text)
        caught, built = {}, {}
        for name in self.args.modes:
            mode = MODES[name][0]
            if mode not in built:
                built[mode] = self.build(mode).returncode == 0
            caught[name] = self.run(name) if built[mode] else None
            if self.args.first and caught[name]:
                break
        return caught

def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("test", metavar="COMMAND", help="the test; status 0: passed")
    parser.add_argument("--make", required=True, metavar="TARGET", help="what to make before the test")
    parser.add_argument("--modes", default=",".join(MODES), help="of fwd, rev, rand, asan, tsan [all]")
    parser.add_argument("--kinds", default="barrier,guard,mask,planted",
                        help="of barrier, guard, mask, planted [all]")
    parser.add_argument("--lines", default="1-1000000000", metavar="FROM-TO", help="only mutants there")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time, in a tree each [1]")
    parser.add_argument("--first", action="store_true", help="a mutant that one mode has caught is done")
    parser.add_argument("--list", action="store_true", help="only list the mutants")
    args = parser.parse_args()
    args.modes, (low, high) = args.modes.split(","), [int(x) for x in args.lines.split("-")]
    if set(args.modes) - set(MODES):
        parser.error("--modes can have " + ", ".join(MODES))
    os.chdir(subprocess.run(["git", "rev-parse", "--show-toplevel"], capture_output=True, text=True,
                            check=True).stdout.strip())
    with open(args.file) as f:
        original = f.read()
    todo = [m for m in mutants(original, args.file) if m[1] in args.kinds.split(",") and low <= m[0] <= high]
    if args.list:
        for line, kind, what, _ in todo:
            print(f"{args.file}:{line}: {kind}: {what}")
        return
    print(f"{len(todo)} mutants of {args.file}; x: caught, .: not, -: did not compile, blank: not tried\n")
    print(f"{'line':>5}  {'kind':8} {'what':44} " + " ".join(f"{m:>4}" for m in args.modes), flush=True)

    with tempfile.TemporaryDirectory(prefix="mutants-") as top:
        free, benches = Queue(), []
        for i in range(args.jobs):
            bench = Bench(args, os.path.join(top, str(i)))
            for name in args.modes:
                build = bench.build(MODES[name][0])
                if build.returncode != 0:
                    sys.exit(f"the file as it is cannot be built:\n{build.stdout.decode()}")
                if bench.run(name):
                    sys.exit(f"the test fails on the file as it is, in mode {name}")
            free.put(bench)
            benches.append(bench)
        def work(mutant):
            bench = free.get()
            try:
                return mutant, bench.judge(mutant[3])
            finally:
                free.put(bench)
        totals, survivors = {}, []
        with ThreadPoolExecutor(args.jobs) as pool:
            for (line, kind, what, _), caught in pool.map(work, todo):
                signs = ["x" if caught[m] else "-" if caught[m] is None else "." if m in caught else ""
                         for m in args.modes if m in caught] + [""] * (len(args.modes) - len(caught))
                print(f"{line:5}  {kind:8} {what[:44]:44} " + " ".join(f"{s:>4}" for s in signs), flush=True)
                total = totals.setdefault(kind, dict.fromkeys(args.modes + ["any", "all"], 0))
                total["all"] += 1
                total["any"] += any(caught.values())
                for m in caught:
                    total[m] += bool(caught[m])
                if not any(caught.values()):
                    survivors.append(f"{args.file}:{line}: {kind}: {what}")
    print(f"\n{'caught by':15} " + " ".join(f"{m:>6}" for m in args.modes) + "    any of mutants")
    for kind, total in totals.items():
        by_mode = " ".join(f"{total[m]:6}" for m in args.modes)
        print(f"{kind:15} {by_mode} {total['any']:6} {total['all']:10}")
    if survivors:
        print("\nnot caught (a bug that no test looks for, or no bug):")
        print("\n".join("  " + s for s in survivors))

if __name__ == "__main__":
    main()
