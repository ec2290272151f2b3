#!/usr/bin/env python3
"""What if a call to the operating system fails, the program is killed, or two run at once? Nothing that was
whole may be lost.

  python3 dev/test_faults.py             the short list: needs ./train_srdit, ./sample, cc, nothing else
  python3 dev/test_faults.py --all       every call of every run
  python3 dev/test_faults.py --only npz  what has this in its name; --list shows all names

A run is first left undisturbed, with its calls counted (dev/faults.c); then it is done again and again, and
each time one call fails, or the program is killed at it. After each of these:
  it ended with one sentence and a status that is not 0, or with all that was asked for and 0;
  each file has its old bytes or the new ones of the undisturbed run, and a disk that is full or bad leaves no
  .part behind but that of --npz, which goes on;
  the run is begun again (a training from its checkpoint), and gives the bytes of the undisturbed one.
Then what no single call can show: two programs at once, closed descriptors, full disks, limits, truncated
data, links, and files in the way. The exit status tells.
"""
import argparse, concurrent.futures, errno, os, resource, shutil, signal, struct, subprocess, sys, tempfile
import time, zipfile

signal.signal(signal.SIGINT, signal.default_int_handler)   # a shell's background job would ignore it, and so its children

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--sample", default=os.path.join(ROOT, "sample"))
parser.add_argument("--train", default=os.path.join(ROOT, "train_srdit"))
parser.add_argument("--all", action="store_true", help="every call, every error; some minutes")
parser.add_argument("--quick", action="store_true", help="the short list, which is the default")
parser.add_argument("--only", default="", help="only tests with this in their name")
parser.add_argument("--list", action="store_true", help="the names of the tests")
parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
parser.add_argument("--verbose", action="store_true", help="what each failed case left behind")
options = parser.parse_args()
SAMPLE, TRAIN = os.path.abspath(options.sample), os.path.abspath(options.train)
ENV = dict(os.environ, OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive", LC_ALL="C")   # the sums of one thread
TINY = ("--depth 3 --num-f 1 --num-h 1 --hidden-size 16 --num-heads 2 --projector-dim 8 --batch 4 "
        "--steps 6").split()
OFTEN = "--sample-steps 1 --save-every 2 --log-every 1".split()
CK = "run/checkpoint.safetensors"
LIMIT = 60   # seconds, for a run that takes a tenth of one

work = tempfile.mkdtemp(prefix="srdit-faults-")
SHIM = os.path.join(work, "faults.so")
passed, failed = 0, []

def check(what, good, detail=""):
    global passed
    if good:
        passed += 1
        return True
    failed.append(what)
    print("FAIL %s: %s" % (what, " ".join(str(detail).split())[-400:]), flush=True)
    return False

def read_bytes(path):
    with open(path, "rb") as f:
        return f.read()

def write_bytes(path, data):
    with open(path, "wb") as f:
        f.write(data)

def tree(folder):
    """The bytes of every file below folder, by name; not the data."""
    files = {}
    for at, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(at, name)
            if os.path.exists(path):
                files[os.path.relpath(path, folder)] = read_bytes(path)
    files.pop("calls", None)
    return {k: v for k, v in files.items() if not k.startswith("kept")}

def fresh(template=None):
    """A folder to run in, with the files of the template, and the data."""
    folder = tempfile.mkdtemp(dir=work)
    if template:
        shutil.copytree(template, folder, dirs_exist_ok=True, symlinks=True)
    if not os.path.lexists(os.path.join(folder, "data")):
        os.symlink(os.path.join(ROOT, "data"), os.path.join(folder, "data"))
    return folder

class Result:
    def __init__(self, status, out, err):
        self.status, self.out, self.err = status, out, err
    def sentence(self):   # one, and nothing else
        return self.err.startswith("error: ") and self.err.count("\n") == 1 and self.err.endswith("\n")
    def refused(self):
        return self.status > 0 and self.sentence()
    def __str__(self):
        return "status %s, stderr %r" % (self.status, self.err)

def start(folder, words, env=None, **more):
    program, words = (TRAIN, words[1:]) if words[0] == "train" else (SAMPLE, words[1:])
    more.setdefault("stdout", subprocess.PIPE)
    return subprocess.Popen([program] + [str(w) for w in words], cwd=folder, env=dict(ENV, **(env or {})),
                            stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, universal_newlines=True, **more)

def finish(p, seconds=LIMIT):
    try:
        out, err = p.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        p.kill()
        out, err = p.communicate()
        return Result("still running after %d s" % seconds, out, err)
    return Result(p.returncode, out or "", err)

def run(folder, words, env=None, **more):
    return finish(start(folder, words, env, **more))

def faulty(at=None, do=None):
    env = {"LD_PRELOAD": SHIM, "FAULTS_LOG": "calls"}
    if at:
        env.update(FAULTS_AT=str(at), FAULTS_DO=str(do))
    return env

def calls_of(folder):
    path = os.path.join(folder, "calls")
    return [tuple(line.rstrip("\n").split(" ", 1)) for line in open(path)] if os.path.exists(path) else []

# ------------------------------------------------------------------------------- what a file may look like

def log_rows(data):
    """The rows of log.csv without the last two columns, which are times; a line without its end is no row."""
    return [row.rsplit(b",", 2)[0] for row in data.split(b"\n")[:-1]]

def same(name, a, b):
    return log_rows(a) == log_rows(b) if os.path.basename(name) == "log.csv" else a == b

def is_begun(name, data, whole):
    """A log that is appended to: a beginning of the whole one"""
    rows = log_rows(data)
    return os.path.basename(name) == "log.csv" and rows == log_rows(whole)[:len(rows)]

def npz_sound(path):
    with zipfile.ZipFile(path) as z:
        if z.testzip() is not None or z.namelist() != ["arr_0.npy"]:
            return False
        data = z.read("arr_0.npy")
    return data[:8] == b"\x93NUMPY\x01\0" and (len(data) - 10 - struct.unpack("<H", data[8:10])[0]) % 192 == 0

# ------------------------------------------------------------------------------------------ single faults

# What a call may fail with; the short list takes the first.
ERRORS = {"open": ["EMFILE", "EIO"], "create": ["ENOSPC", "EMFILE"], "write": ["ENOSPC", "EIO", "EINTR"],
          "fsync": ["EIO", "ENOSPC"], "close": ["EIO", "EINTR"], "rename": ["EIO", "ENOSPC"],
          "mmap": ["ENOMEM"], "fstat": ["EIO"], "stat": ["EIO"], "ftruncate": ["EIO", "EINTR"],
          "flock": ["EINTR"], "unlink": ["EIO"], "mkdir": ["ENOSPC"], "read": ["EIO"], "fdopen": ["ENOMEM"],
          "realpath": ["EIO"], "malloc": ["ENOMEM"]}

# After these a .part of ours may stay, which the next run takes over and ends.
LEAVES = ("unlink", "malloc", "fdopen", "fstat", "ftruncate")

class Case:
    """words: the command; again: that which goes on after a fault in a folder, or None: the same."""
    def __init__(self, name, words, template=None, again=None):
        self.name, self.words, self.template, self.again = name, words, template, again

    def undisturbed(self):
        folder = fresh(self.template)
        self.before = tree(folder)
        os.mkdir(os.path.join(folder, "kept"))
        r = run(folder, self.words, dict(faulty(), FAULTS_KEEP=os.path.join(folder, "kept")))
        self.calls, self.after, self.versions = calls_of(folder), tree(folder), {}
        for name in sorted(os.listdir(os.path.join(folder, "kept")), key=lambda n: int(n.split(".")[0])):
            data = read_bytes(os.path.join(folder, "kept", name))
            self.versions.setdefault(name.split(".", 1)[1], []).append(data)
        check("%s: undisturbed" % self.name, r.status == 0 and not r.err and not self.parts(self.after), r)
        self.check_order()
        shutil.rmtree(folder)

    @staticmethod
    def parts(files):
        return [name for name in files if ".part" in name]

    def check_order(self):
        """A file that gets its name is on the disk already: fsync after the last write, before rename."""
        last = {}
        for call, name in self.calls:
            if call == "rename":
                check("%s: %s is flushed to disk before it gets its name" % (self.name, name),
                      last.get(name) == "fsync", last)
            elif call in ("write", "fsync"):
                last[name] = call

    def places(self):
        """(number of the call, what is to happen there)"""
        chosen, malloc = [], 0
        # (a kill at a call that changes nothing is one at the call before)
        mallocs = sum(call == "malloc" for call, _ in self.calls)
        stride = max(1, mallocs // (150 if options.all else 6))
        for i, (call, name) in enumerate(self.calls):
            n = i + 1
            if call == "malloc":
                malloc += 1
                if malloc % stride == 0:
                    chosen.append((n, "ENOMEM"))
                continue
            errors = ERRORS[call]
            inside = call == "write" and 0 < i < len(self.calls) - 1 and \
                self.calls[i - 1] == self.calls[i + 1] == (call, name)   # one of a row of writes
            changes = call in ("create", "write", "fsync", "close", "rename", "ftruncate", "unlink", "mkdir")
            if options.all:
                chosen += [(n, e) for e in errors] + [(n, "kill")] * changes
                chosen += [(n, "torn")] * (call == "write")
            elif not inside:
                chosen += [(n, errors[0])] + [(n, "torn" if call == "write" else "kill")] * changes
            elif i % 23 == 0:
                chosen.append((n, "ENOSPC"))
        if options.all:
            return chosen
        # what happens at every checkpoint: its first time and its last
        kinds = [self.calls[n - 1] + (what,) if self.calls[n - 1][0] != "malloc" else n for n, what in chosen]
        last = {kind: i for i, kind in enumerate(kinds)}
        return [c for i, c in enumerate(chosen) if kinds.index(kinds[i]) == i or last[kinds[i]] == i]

    def fault(self, n, what):
        call, name = self.calls[n - 1]
        title = "%s: call %d, %s%s %s" % (self.name, n, call, " of " + name if name else "", what)
        folder = fresh(self.template)
        killed = what in ("kill", "torn")
        r = run(folder, self.words, faulty(n, what if killed else getattr(errno, what)))
        files, good = tree(folder), True
        hit = calls_of(folder)[n - 1:n]
        if hit != [(call, name)]:
            return check(title, False, "another call was hit: %s" % hit)
        if killed:
            good &= check(title + ": is killed", r.status == -signal.SIGKILL, r)
        elif r.status == 0:
            good &= check(title + ": ends with 0 and all files", not r.err and
                          set(files) - set(self.parts(files)) == set(self.after) and
                          all(same(f, files[f], self.after[f]) for f in self.after), r)
        else:
            good &= check(title + ": one sentence", r.refused(), r)
            reason = "memory" if what == "ENOMEM" else os.strerror(getattr(errno, what))
            if "untouched" in r.err:
                f = r.err.split(": ")[1]
                old = [self.before.get(f)] + self.versions[os.path.basename(f)][:-1]
                good &= check(title + ": %s is untouched, as it says" % f, files.get(f) in old or
                              self.name == "overwrite" and f not in files, r)
            good &= check(title + ": says why", reason in r.err or call == "stat", r)
        for f in files:
            if f in self.parts(files):
                good &= check(title + ": leaves no %s" % f, killed or call in LEAVES or ".npz" in f, r)
                continue
            done = sum(c == "rename" and os.path.basename(p).startswith(os.path.basename(f))
                       for c, p in self.calls[:n - 1])   # which version must be there, at least
            versions = ([self.before[f]] if f in self.before else [None]) + \
                self.versions.get(os.path.basename(f), [])
            good &= check(title + ": %s is old or new" % f, any(files[f] == v for v in versions[done:]) or
                          is_begun(f, files[f], self.after.get(f, b"")), "%d bytes" % len(files[f]))
        for f in self.before:   # --overwrite takes the old run's picture and log away before its checkpoint
            replaced = self.name == "overwrite" and f in ("run/samples.png", "run/loss.png", "run/log.csv")
            done = f.startswith("x.npz.") and files.get("x.npz") == self.after["x.npz"]
            good &= check(title + ": %s is still there" % f, f in files or replaced or done, sorted(files))
        # the log of one run never stands beside the checkpoint of another
        if "run/log.csv" in self.before and CK in self.before and "run/log.csv" in files:
            old = self.before["run/log.csv"]
            mixed = log_rows(files["run/log.csv"])[:len(log_rows(old))] != log_rows(old) and \
                files.get(CK) == self.before[CK]
            good &= check(title + ": one run's log beside another's checkpoint", not mixed)
        if good:
            words = self.again(files) if self.again else self.words
            trained = words[0] == "train" and files.get(CK) == self.after[CK]
            again = run(folder, words)
            files = tree(folder)
            if trained:   # only the last picture was missing, and --resume has no step to go
                files = {f: files[f] for f in files if not f.startswith("run/samples.png.")}
                files["run/samples.png"] = self.after["run/samples.png"]
            good &= check(title + ": begun again", again.status == 0 and not again.err, again)
            if self.name == "overwrite":   # its first checkpoint comes before its first row
                log = files.get("run/log.csv", b"").split(b"\n")
                if len(log) > 1 and log[1][:2] == b"2,":
                    first = self.after["run/log.csv"].split(b"\n")[1:2]
                    files["run/log.csv"] = b"\n".join(log[:1] + first + log[1:])
                    files["run/loss.png"] = self.after["run/loss.png"]              # drawn without that row
            differ = [f for f in set(files) | set(self.after) if f not in files or f not in self.after or
                      not same(f, files[f], self.after[f])]
            good &= check(title + ": begun again, the same files", not differ, differ)
            if name.startswith("x.npz.") and call in ("fsync", "rename"):   # all pictures were there
                good &= check(title + ": begun again, no picture is drawn again", r.status == 0 or
                              "has the first 20 pictures" in again.out, again.out)
        if not good and options.verbose:
            print("    files: %s" % {k: len(v) for k, v in files.items()})
        shutil.rmtree(folder)
        return good

    def test(self):
        self.undisturbed()
        places = self.places()
        with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
            good = sum(pool.map(lambda p: self.fault(*p), places))
        print("%-22s %d calls, %d faults, %d of them without harm" % (self.name, len(self.calls), len(places),
                                                                      good), flush=True)

DRAW = ["sample", CK, "--num", "20", "--batch", "8", "--steps", "2"]
NEW = ["train"] + TINY + OFTEN + ["--out", "run"]
RESUME = ["train", "--resume", CK] + OFTEN

def go_on(files, more=()):
    """How a training that was broken off goes on"""
    return RESUME + list(more) if CK in files else NEW + ["--overwrite"]

def trained(*words):
    folder = fresh()
    r = run(folder, NEW + list(words))
    if r.status:
        sys.exit("error: no model to test with: %s" % r)
    return folder

def single_faults():
    run6, other = trained(), trained("--seed", "2")
    exported = fresh(run6)
    write_bytes(os.path.join(exported, "e.safetensors"), b"an older srdit-export-1")
    drawn = fresh(run6)
    for name in ("x.png", "x.safetensors", "x.npz"):
        write_bytes(os.path.join(drawn, name), b"older \x89PNG arr_0.npy SR-DiT in C")
    partly = fresh(run6)      # an .npz that was killed in its second batch
    run(partly, DRAW + ["--npz", "x.npz"], faulty())
    writes = [i + 1 for i, (c, p) in enumerate(calls_of(partly)) if c == "write" and p.startswith("x.npz")]
    os.remove(os.path.join(partly, "x.npz"))
    os.remove(os.path.join(partly, "calls"))
    run(partly, DRAW + ["--npz", "x.npz"], faulty(writes[2], "torn"))
    os.remove(os.path.join(partly, "calls"))

    def overwritten(files):   # --overwrite goes on as a new run as long as the old one is there
        new = files.get(CK) not in (None, read_bytes(os.path.join(other, CK)))
        return RESUME if new else NEW + ["--overwrite"]
    cases = [Case("train", NEW, None, go_on),
             Case("overwrite", NEW + ["--overwrite"], other, overwritten),
             Case("resume", RESUME + ["--steps", "10"], run6, lambda files: RESUME + ["--steps", "10"]),
             Case("export", RESUME + ["--export", "e.safetensors"], exported),
             Case("sample --out", DRAW + ["--out", "x.png"], drawn),
             Case("sample --latents", DRAW + ["--latents", "x.safetensors"], drawn),
             Case("sample --npz", DRAW + ["--npz", "x.npz"], drawn),
             Case("sample --npz, going on", DRAW + ["--npz", "x.npz"], partly),
             Case("sample --separate", DRAW[:3] + ["3"] + DRAW[4:] + ["--separate", "each"], run6)]
    for case in cases:
        yield case.name, case.test
    yield from others(run6)

# ------------------------------------------------------------------------------- what no single call shows

OUTPUTS = (["--out", "x.png"], ["--latents", "x.safetensors"], ["--npz", "x.npz"])

def reference(template, words):
    folder = fresh(template)
    r = run(folder, words, faulty())
    if r.status:
        sys.exit("error: no run to compare with: %s" % r)
    return calls_of(folder), tree(folder)

def stopped(p):
    """Waits until the program has stopped itself, or has ended."""
    pid, status = os.waitpid(p.pid, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        return True
    p.returncode = os.waitstatus_to_exitcode(status)
    return False

def while_sampling(calls, output):
    """A call between the last preparation of the file and the first picture that is written to it"""
    of_it = [(i + 1, c) for i, (c, p) in enumerate(calls) if p.startswith(output)]
    ready = [n for n, c in of_it if c == "ftruncate"][0]
    return (ready + next(n for n, c in of_it if n > ready and c == "write")) // 2

def two_at_once(template, name, words, output):
    """The first is stopped somewhere; the second must say so and end. Then the first ends as if alone."""
    calls, after = reference(template, words)
    part = [i + 1 for i, (c, p) in enumerate(calls)
            if p.startswith(output) and c in ("write", "fsync", "rename")]
    half = part[0] if output == CK else while_sampling(calls, output)
    places = {"half way": half, "at its first write": part[0], "at its last write": part[-3],
              "at fsync": part[-2], "at rename": part[-1]}
    for where, n in places.items():
        folder = fresh(template)
        first = start(folder, words, faulty(n, "stop"))
        title = "two %s, the first stopped %s (call %d)" % (name, where, n)
        if not check(title + ": stops", stopped(first)):
            continue
        second = run(folder, words)
        check(title + ": the second says so", second.refused() and "another" in second.err, second)
        first.send_signal(signal.SIGCONT)
        r = finish(first)
        check(title + ": the first ends well", r.status == 0 and not r.err, r)
        files = tree(folder)
        check(title + ": the file is whole", same(output, files.get(output, b""), after[output]), len(files))
        check(title + ": no .part is left", not Case.parts(files), Case.parts(files))
        shutil.rmtree(folder)

def late_second(template, words, output):
    """The second has opened the .part, and is stopped before it locks or changes it; meanwhile the first
    gives it its name. What has the name must stay whole."""
    calls, after = reference(template, words)
    places, opened = [], False
    for i, (call, path) in enumerate(calls):
        if path.startswith(output) and path.endswith(".part"):
            if call == "write":
                break
            if opened and call != "stat":
                places.append(i + 1)
            opened |= call in ("open", "create")
    for n in places:
        folder = fresh(template)
        title = "%s, a second stopped at %s (call %d) while the first ends" % (output, calls[n - 1][0], n)
        second = start(folder, words, faulty(n, "stop"))
        if not check(title + ": stops", stopped(second)):
            continue
        run(folder, words)
        second.send_signal(signal.SIGCONT)
        r = finish(second)
        check(title + ": no harm", r.status == 0 or r.refused(), r)
        files = tree(folder)
        if output not in files:   # the first was refused, and so was the second
            run(folder, words)
            files = tree(folder)
        check(title + ": the file is whole", files.get(output) == after[output], len(files.get(output, b"")))
        shutil.rmtree(folder)

def overtaken(run6, words):
    """A --resume has read its checkpoint, and is stopped before it locks the folder; meanwhile another goes
    on from it. The old state must not be gone on from."""
    calls, after = reference(run6, words)
    for n in (calls.index(("open", "run")) + 1, calls.index(("flock", "run")) + 1):
        folder, title = fresh(run6), "--resume, overtaken at call %d, %s" % (n, calls[n - 1][0])
        second = start(folder, words, faulty(n, "stop"))
        if not check(title + ": stops", stopped(second)):
            continue
        first = run(folder, words)
        second.send_signal(signal.SIGCONT)
        r, files = finish(second), tree(folder)
        check(title + ": the first ends well", first.status == 0 and not first.err, first)
        check(title + ": the second says so", r.refused() and "another run" in r.err, r)
        check(title + ": the checkpoint and the log are whole",
              all(same(f, files.get(f, b""), after[f]) for f in after), sorted(files))
        shutil.rmtree(folder)

def others(run6):
    for flag, output in OUTPUTS:
        yield "two %s" % flag, lambda f=flag, o=output: (two_at_once(run6, f, DRAW + [f, o], o),
                                                         late_second(run6, DRAW + [f, o], o))
    resume = RESUME + ["--steps", "10"]
    yield "two --resume", lambda: (two_at_once(run6, "--resume", resume, CK), overtaken(run6, resume))
    yield "closed descriptors", lambda: closed_descriptors(run6)
    yield "/dev/full", lambda: dev_full(run6)
    yield "ulimit -f", lambda: size_limit(run6)
    yield "truncated data", truncated_data
    yield "links", lambda: links(run6)
    yield "files in the way", lambda: in_the_way(run6)
    yield "hostile sizes", hostile_sizes
    yield "signals", lambda: signals(run6)

def closed_descriptors(run6):
    """No descriptor 0, 1, 2: what is printed must not land in a file that gets their number."""
    everything = DRAW + [w for output in OUTPUTS for w in output]
    for words, template in ((NEW, None), (RESUME + ["--steps", "10", "--export", "e.safetensors"], run6),
                            (everything, run6)) + tuple((DRAW + o, run6) for o in OUTPUTS):
        _, after = reference(template, words)
        for closed in ("<&- >&- 2>&-", "<&-", ">&-", "2>&-", "<&- 2>&-"):
            folder = fresh(template)
            program = TRAIN if words[0] == "train" else SAMPLE
            r = subprocess.run(["sh", "-c", 'exec "$0" "$@" ' + closed, program] + words[1:], cwd=folder,
                               env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=LIMIT)
            files = tree(folder)
            title = "%s %s" % (" ".join(words[:1] + words[-2:]), closed)
            check(title + ": no signal", 0 <= r.returncode < 128, r.returncode)
            check(title + ": no text in any file", set(files) == set(after) and
                  all(same(f, files[f], after[f]) for f in files) and
                  not any(b"the CPU" in d or b"img/s" in d or b"error: " in d or b"pictures," in d
                          for f, d in files.items() if f not in after or f.endswith(".csv")),
                  [f for f in files if f not in after or not same(f, files[f], after[f])])
            shutil.rmtree(folder)

def dev_full(run6):
    for words in (DRAW + ["--show"], DRAW + ["--show-steps"], DRAW + ["--out", "x.png"],
                  DRAW + ["--npz", "x.npz"], ["sample", "--help"], ["train", "--help"],
                  NEW[:-2] + ["--out", "other"]):
        folder = fresh(run6)
        with open("/dev/full", "w") as full:
            r = run(folder, words, stdout=full)
        check("%s > /dev/full" % " ".join(words[:1] + words[-2:]),
              r.refused() and os.strerror(errno.ENOSPC) in r.err, r)
        shutil.rmtree(folder)

def limited(folder, words, size):
    return run(folder, words, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))

def size_limit(run6):
    """Files may not grow beyond a size: a sentence, not a signal; what was there stays."""
    export = RESUME + ["--export", "e.safetensors"]
    for words, output, size, template in ((NEW, CK, 65536, None),
                                          (RESUME + ["--steps", "10"], CK, 65536, run6),
                                          (export, "e.safetensors", 4096, run6)) + \
            tuple((DRAW + o, o[1], 1024, run6) for o in OUTPUTS):
        folder = fresh(template)
        before, (_, after) = tree(folder), reference(template, words)
        r = limited(folder, words, size)
        files, title = tree(folder), "ulimit -f, %s" % " ".join(words[:1] + words[-2:])
        check(title + ": a sentence", r.refused() and os.strerror(errno.EFBIG) in r.err, r)
        check(title + ": the old file", files.get(output) == before.get(output), output)
        check(title + ": no .part", not Case.parts(files) or output == "x.npz", Case.parts(files))
        r = run(folder, go_on(files, words[len(RESUME):]) if words[0] == "train" else words)
        files = tree(folder)
        check(title + ": begun again", r.status == 0 and not r.err, r)
        check(title + ": begun again, whole", files.get(output) == after[output], output)
        shutil.rmtree(folder)

def truncated_data():
    """A shard that shrinks while it is trained on"""
    folder = fresh()
    shutil.copy(os.path.join(ROOT, "data", "digits.safetensors"), os.path.join(folder, "d.safetensors"))
    words = NEW + ["--data", "d.safetensors"]
    run(folder, words, faulty())
    saves = [i + 1 for i, c in enumerate(calls_of(folder)) if c[0] == "rename" and c[1].startswith(CK)]
    shutil.rmtree(os.path.join(folder, "run"))
    for n, size in ((saves[1], 5000), (saves[1], 0), (saves[0], 100000)):
        p = start(folder, words, faulty(n, "stop"))
        if not check("truncated data: stops", stopped(p)):
            continue
        os.truncate(os.path.join(folder, "d.safetensors"), size)
        p.send_signal(signal.SIGCONT)
        r = finish(p)
        title = "data truncated to %d bytes while training" % size
        r.err = r.err.lstrip("\n")   # it is said from a signal handler, which begins a new line
        check(title + ": a sentence with its name", r.refused() and "d.safetensors" in r.err, r)
        check(title + ": the checkpoint is whole", os.path.exists(os.path.join(folder, CK)), size)
        shutil.copy(os.path.join(ROOT, "data", "digits.safetensors"), os.path.join(folder, "d.safetensors"))
        r = run(folder, RESUME + ["--data", "d.safetensors"])
        check(title + ": the run goes on", r.status == 0, r)
        shutil.rmtree(os.path.join(folder, "run"))
        os.remove(os.path.join(folder, "calls"))
    shutil.rmtree(folder)

def links(run6):
    """A checkpoint, a picture that is a link elsewhere: it stays a link, to the new file, or is refused."""
    resume = RESUME + ["--steps", "10"]
    for words, name in ((resume, CK),) + tuple((DRAW + o, o[1]) for o in OUTPUTS):
        for kind in ("relative", "absolute", "dangling"):
            if kind == "dangling" and name == CK:
                continue
            folder = fresh(run6)
            _, after = reference(run6, words)
            os.mkdir(os.path.join(folder, "far"))
            link, target = os.path.join(folder, name), os.path.join(folder, "far", os.path.basename(name))
            if name == CK:
                os.rename(link, target)
            elif kind != "dangling":
                write_bytes(target, b"older \x89PNG arr_0.npy SR-DiT in C srdit-export-1")
            old = read_bytes(target) if os.path.exists(target) else None
            os.symlink(target if kind == "absolute" else os.path.relpath(target, os.path.dirname(link)), link)
            r = run(folder, words)
            now = read_bytes(target) if os.path.exists(target) else None
            check("%s link %s" % (kind, name), os.path.islink(link) and
                  (r.status == 0 and now == after[name] or r.refused() and now == old),
                  "%s; %s" % (r, "a link" if os.path.islink(link) else "no longer a link"))
            parts = Case.parts(tree(folder))
            check("%s link %s: no .part" % (kind, name), not parts, parts)
            shutil.rmtree(folder)

def in_the_way(run6):
    """Where the file under construction would be there is a folder, a link, or rubbish; and X.part,
    which is not ours, stays."""
    for words, name in ((NEW, CK), (RESUME + ["--steps", "10"], CK),
                        (RESUME + ["--export", "e.safetensors"], "e.safetensors")) + \
            tuple((DRAW + o, o[1]) for o in OUTPUTS):
        template = None if words is NEW else run6
        calls, after = reference(template, words)
        ours = next(p for c, p in calls if c == "rename" and p.startswith(name))
        for what in ("folder", "link", "rubbish", "letter"):
            folder, letter = fresh(template), b"Dear diary, " * 2000
            os.makedirs(os.path.join(folder, "run"), exist_ok=True)
            part = os.path.join(folder, ours)
            title = "%s, there is a %s" % (ours if what != "letter" else name + ".part", what)
            diary = os.path.join(folder, name + ".part" if what == "letter" else "diary")
            if what == "folder":
                os.mkdir(part)
                diary = os.path.join(part, "diary")
            if what == "link":
                os.symlink(diary, part)
            if what == "rubbish":
                write_bytes(part, letter)
            write_bytes(diary, letter)
            r = run(folder, words)
            check(title + ": nothing is destroyed", os.path.exists(diary) and read_bytes(diary) == letter, r)
            made = os.path.exists(os.path.join(folder, name)) and \
                read_bytes(os.path.join(folder, name)) == after[name]
            check(title + ": done, or refused", made and r.status == 0 or
                  r.refused() and what != "letter" and (what != "rubbish" or name == "x.npz"), r)
            if r.status:   # not after hours of work
                long = ["1000000" if before == "--steps" else w for before, w in zip([""] + words, words)]
                r = run(folder, long)
                check(title + ": refused before the work begins", r.refused() and "img/s" not in r.out, r)
            shutil.rmtree(folder)

def hostile_sizes():
    """A file of some hundred bytes that says it is a giant model: refused at once, in little memory"""
    sane = {"depth": 3, "num_f": 1, "num_h": 1, "hidden_size": 16, "num_heads": 2, "projector_dim": 8,
            "patch_size": 1, "in_channels": 1, "input_size": 8, "num_classes": 10, "z_dim": 32,
            "mlp_ratio": 4, "step": 1, "steps": 2, "batch": 4, "seed": 1}
    for change in ({"hidden_size": 60000, "num_heads": 15000}, {"depth": 64}, {"num_heads": 60000},
                   {"projector_dim": 65536}, {"input_size": 4096}, {"batch": 1000000}, {"z_dim": 65536},
                   {"num_classes": 10000000}, {"mlp_ratio": 64}, {"in_channels": 65536},
                   {"hidden_size": 60000, "depth": 64, "num_heads": 1, "mlp_ratio": 64, "input_size": 200}):
        for form in ("checkpoint", "export"):
            meta = dict(sane, format="srdit-%s-1" % form, **change)
            header = ('{"__metadata__":{%s}}' % ",".join('"%s":"%s"' % m for m in meta.items())).encode()
            folder = fresh()
            write_bytes(os.path.join(folder, "c.safetensors"), struct.pack("<Q", len(header)) + header)
            for words in (["train", "--resume", "c.safetensors", "--out", "new"],
                          ["sample", "c.safetensors", "--out", "x.png"],
                          ["sample", "c.safetensors", "--latents", "x.safetensors"]):
                begin = resource.getrusage(resource.RUSAGE_CHILDREN)
                r = run(folder, words, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS,
                                                                             (1 << 28, 1 << 28)))
                end = resource.getrusage(resource.RUSAGE_CHILDREN)
                title = "%s of a %s with %s" % (words[0], form, change)
                check(title + ": refused, not for want of memory", r.refused() and "memory" not in r.err and
                      "c.safetensors" in r.err, r)
                seconds = end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime
                check(title + ": at once", seconds < 1, "%.2f s" % seconds)
            shutil.rmtree(folder)

def signals(run6):
    """Ctrl-C and SIGTERM in the middle: status 130, and the same command goes on."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        for words, output in [(DRAW + o, o[1]) for o in OUTPUTS]:
            calls, after = reference(run6, words)
            folder = fresh(run6)
            p = start(folder, words, faulty(while_sampling(calls, output), "stop"))
            if not check("%s: stops" % name, stopped(p)):
                continue
            p.send_signal(getattr(signal, name))
            p.send_signal(signal.SIGCONT)
            r = finish(p)
            files = tree(folder)
            title = "%s, %s" % (name, words[-2])
            check(title + ": 130, and said", r.status == 130 and output not in files and
                  r.err.startswith("interrupted") and r.err.count("\n") == 1, r)
            check(title + ": no .part", not Case.parts(files) or output == "x.npz", Case.parts(files))
            r = run(folder, words)
            check(title + ": begun again", r.status == 0 and tree(folder).get(output) == after[output], r)
            shutil.rmtree(folder)

# ------------------------------------------------------------------------------------------------- the list

def build():
    cc = os.environ.get("CC", "cc").split()
    r = subprocess.run(cc + ["-std=gnu11", "-O1", "-Wall", "-Wextra", "-shared", "-fPIC",
                             os.path.join(ROOT, "dev", "faults.c"), "-o", SHIM, "-ldl"])
    if r.returncode:
        sys.exit("error: dev/faults.c does not compile")
    for program in (TRAIN, SAMPLE):
        if not os.access(program, os.X_OK):
            sys.exit("error: %s is not there; make builds it" % program)
        names = subprocess.run(["nm", "-D", "--undefined-only", program], stdout=subprocess.PIPE,
                               universal_newlines=True).stdout.split()
        names = {n.split("@")[0] for n in names}
        unknown = names & {"creat", "open64", "fopen64", "freopen", "writev", "pwrite", "pwrite64", "dprintf",
                           "tmpfile", "mkstemp", "mkostemp", "renameat", "renameat2", "link", "symlink",
                           "copy_file_range", "sendfile", "mmap64", "ftruncate64", "statx", "aligned_alloc"}
        if not check("every call of %s is one that dev/faults.c sees" % os.path.basename(program),
                     "open" in names and not unknown, unknown):
            sys.exit(1)

def main():
    begin = time.time()
    build()
    for name, test in single_faults():
        if options.list:
            print(name)
        elif options.only in name:
            before, then = passed + len(failed), time.time()
            test()
            print("%-22s %d checks, %.1f s" % (name, passed + len(failed) - before, time.time() - then),
                  flush=True)
    if options.list:
        return 0
    if not passed:
        sys.exit("error: no test has \"%s\" in its name (--list shows all)" % options.only)
    print("%d checks passed, %d failed, %.0f s" % (passed, len(failed), time.time() - begin))
    return bool(failed)

try:
    status = main()
finally:
    shutil.rmtree(work, ignore_errors=True)
sys.exit(status)
