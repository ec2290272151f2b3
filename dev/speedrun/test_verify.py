#!/usr/bin/env python3
"""Tests of verify.py: a sound entry passes, and for each rule a log that breaks it is refused, with a
   sentence that says so. A broken log is an honest one, edited and given a new SHA-256, as a cheat would do
   it.

  test_verify.py               needs ./train_srdit and ./sample (make), for some practice runs
  test_verify.py --rerun       builds a log's sources and runs them as well (a minute)
  test_verify.py --mutants     takes each check of a log or an entry away in turn, and sees whether these
                               tests notice (some minutes)

Nothing outside a temporary folder is touched. The exit status tells.
"""

import argparse, contextlib, copy, gzip, hashlib, io, json, math, os, re, shutil, subprocess, sys, tempfile
import zlib

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path.insert(0, HERE)
import ablations
import targets
import verify

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--train", default=os.path.join(ROOT, "train_srdit"))
parser.add_argument("--rerun", action="store_true")
parser.add_argument("--mutants", action="store_true")
options = parser.parse_args()
TRAIN = os.path.abspath(options.train)
TINY = "--depth 3 --num-f 1 --num-h 1 --hidden-size 16 --num-heads 2 --projector-dim 8 --batch 8".split()
BASE = ["--base", ""]  # the sources are those of this folder, committed or not
failed, passed = [], 0


def check(what, good, detail=""):
    global passed
    if good:
        passed += 1
    else:
        failed.append(what)
        print("FAIL %s: %s" % (what, str(detail)[-500:]))


def call(*words):
    """(the refusal's sentence or "", what was printed)"""
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            verify.main([str(w) for w in words])
        return "", out.getvalue()
    except verify.Refusal as refusal:
        return str(refusal), out.getvalue()


def refused(what, words, *say):
    sentence = call(*words)[0]
    check(what, sentence and all(s in sentence for s in say) and "\n" not in sentence, sentence or
          "it was accepted")


def signed(data):
    return data + hashlib.sha256(data).hexdigest().encode() + b"\n"


def edited(log, old, new, count=1):
    """The log with a text replaced, in its head or its sources, and with all sizes and hashes made good"""
    data = log[:log.rindex(b"sha256 ") + 7]
    head, _, rest = data.partition(b"\n[sources]\n")
    text = rest.partition(b"\n")[2][:-len(b"\n[end]\nsha256 ")]
    if old in head:
        head = head.replace(old, new, count)
    else:
        assert old in text, old
        at = text.index(old)
        header = re.compile(rb"==== (\S+) (\d+)\n")
        start = text.rindex(b"==== ", 0, at + 5)
        while not header.match(text, start):
            start = text.rindex(b"==== ", 0, start)
        name, size = header.match(text, start).groups()
        text = text.replace(old, new, 1)
        if start < at:  # within a file, whose size is in its header
            text = text.replace(b"==== %s %s\n" % (name, size),
                                b"==== %s %d\n" % (name, int(size) + len(new) - len(old)), 1)
    sources = b"%d %s\n" % (len(text), hashlib.sha256(text).hexdigest().encode())
    return signed(head + b"\n[sources]\n" + sources + text + b"\n[end]\nsha256 ")


def line(log, key):
    """The line of a log's head that begins with a key"""
    return re.search(rb"^%s .*$" % key.encode(), log, re.M).group()


def test_statistics():
    # P(T <= t) of tables: Student 1908 and after; and the symmetric halves
    for t, freedom, p in ((6.314, 1, 0.95), (2.920, 2, 0.95), (1.833, 9, 0.95), (2.821, 9, 0.99),
                          (3.250, 9, 0.995), (1.660, 100, 0.95)):
        check("t %g of %d" % (t, freedom), abs(verify.t_cdf(t, freedom) - p) < 1e-4, verify.t_cdf(t, freedom))
    for t in (0.1, 1, 3, 30):
        check("t of 1 is Cauchy's", abs(verify.t_cdf(t, 1) - (0.5 + math.atan(t) / math.pi)) < 1e-14)
        check("t of 2 has a formula",
              abs(verify.t_cdf(t, 2) - (0.5 + t / (2 * math.sqrt(2 + t * t)))) < 1e-14)
        check("t is symmetric", abs(verify.t_cdf(t, 7) + verify.t_cdf(-t, 7) - 1) < 1e-15)
        n, h, v = 20000, t / 20000, 7  # Simpson's rule over the density
        f = [(1 + (i * h)**2 / v)**(-(v + 1) / 2) for i in range(n + 1)]
        area = h / 3 * (f[0] + f[-1] + 4 * math.fsum(f[1:-1:2]) + 2 * math.fsum(f[2:-1:2]))
        area *= math.exp(math.lgamma((v + 1) / 2) - math.lgamma(v / 2)) / math.sqrt(v * math.pi)
        check("t against its integral",
              abs(verify.t_cdf(t, v) - 0.5 - area) < 1e-12,
              verify.t_cdf(t, v) - 0.5 - area)
    try:
        import scipy.stats

        for t in (-40, -3, -0.5, 0, 0.01, 2, 9):
            for v in (1, 2, 3, 9, 30, 400):
                check("t against scipy", abs(verify.t_cdf(t, v) - scipy.stats.t.cdf(t, v)) < 1e-12)
        x = [3.1, 3.3, 3.2, 3.05]
        check(
            "the test against scipy",
            abs(verify.below(x, 3.28)[0] - scipy.stats.ttest_1samp(x, 3.28, alternative="less").pvalue)
            < 1e-12)
    except ImportError:
        print(
            "scipy is not here: the t distribution was checked against tables, formulas and its integral only"
        )
    check("z", abs(verify.below([3.35], 3.49, 0.06)[0] - 0.0098153) < 1e-6, verify.below([3.35], 3.49, 0.06))
    check("one run shows nothing without a sigma", verify.below([1.0], 2.0)[0] == 1)
    check("equal scores below", verify.below([1.0, 1.0], 2.0)[0] == 0)
    check("equal scores at the target", verify.below([2.0, 2.0], 2.0)[0] == 1)
    check("nan is not below", not verify.below([math.nan, 1.0], 2.0)[0] < 1)


def test_entry(logs, work):
    """logs: the paths of the three runs of an entry"""
    sentence, said = call(*BASE, *logs)
    check("a sound entry", sentence == "" and "not fixed yet" in said and "3 runs" in said, sentence or said)
    data = []
    for path in logs:
        with open(path, "rb") as f:
            data.append(f.read())
    packed = os.path.join(work, "packed.log.gz")
    with gzip.open(packed, "wb") as f:
        f.write(data[0])
    sentence, said = call(*BASE, "--one", packed)
    check("one packed log", sentence == "" and "a sound run" in said, sentence)

    bad = os.path.join(work, "bad.log")

    def broken(what, content, *say, one=True, others=()):
        with open(bad, "wb") as f:
            f.write(content)
        refused(what, BASE + (["--one", bad] if one else [bad] + list(others)), bad, *say)

    def edit(what, key, new, *say):
        old = line(data[0], key)
        broken(what, edited(data[0], b"\n" + old + b"\n", b"\n" + new + b"\n"), *say)

    # The chain of hashes
    a = data[0]
    broken("cut in the middle", a[:len(a) // 2], "cut short")
    broken("cut at the end", a[:-1], "cut short")
    broken("something after the end", a + b"x", "cut short")
    broken("empty", b"", "not a log")
    broken("another file", b"hello\n" * 99, "not a log")
    frechet = line(a, "frechet")
    broken("a score edited", a.replace(frechet, frechet[:-1] + (b"1" if frechet[-1:] != b"1" else b"2"), 1),
           "edited")
    broken("a step removed", a.replace(re.search(rb"\n10,.*", a).group(), b"", 1), "edited")
    broken("a byte of the sources edited", a.replace(b"forward", b"forwarD", 1), "edited")
    refused("no such file", BASE + ["--one", os.path.join(work, "none.log")], "cannot be read")
    refused("a packed file cut short", BASE + ["--one", cut_gzip(packed, work)], "cannot be read")
    size = re.search(rb"\n\[sources\]\n(\d+) ", a)
    wrong = a[:size.start(1)] + b"%d" % (int(size.group(1)) - 1) + a[size.end(1):]
    broken("sources of another length", signed(wrong[:wrong.rindex(b"sha256 ") + 7]), "not as long")
    wrong = a.replace(b"static double now_seconds", b"static double now_secondS", 1)
    broken("sources changed under their hash", signed(wrong[:wrong.rindex(b"sha256 ") + 7]),
           "SHA-256 of its sources")
    broken("a file that would leave the folder", edited(a, b"==== Makefile ", b"==== ../akefil "),
           "of the name ../")
    broken("a line said twice", edited(a, b"\nload ", b"\ntrack practice\nload "), "twice")
    broken("a line missing", edited(a, b"\n" + line(a, "boot"), b""), "[run]")

    broken("no sources", signed(a.replace(b"\n[sources]\n", b"\n[source]\n")[:a.rindex(b"sha256 ") + 6]),
           "no sources")
    broken(
        "sources of nothing",
        signed(a[:a.index(b"\n[sources]\n")] + b"\n[sources]\n0 " + hashlib.sha256(b"").hexdigest().encode() +
               b"\n\n[end]\nsha256 "), "no sources")
    broken("sources that are not files", edited(a, b"==== Makefile ", b"=+== Makefile "), "taken apart")
    last = re.findall(rb"\n==== (\S+) \d+\n", a)[-1]
    broken("a source cut short", edited(a, b"==== %s " % last, b"==== %s 9" % last), "cut short")
    broken("a part of another name", edited(a, b"\n[inputs]\n", b"\n[input]\n"), "its parts are")
    broken("inputs of another name", edited(a, b"\njudge ", b"\njury "), "not a data shard and a judge")
    broken("columns of another name", edited(a, b"step,loss", b"step,loss2"), "columns")
    broken("a setting that is not there", edited(a, b"\n" + line(a, "batch"), b""), "does not say batch")

    # Inputs, sources, rules
    broken("a file that the sources lack", edited(a, b"==== dev/lib/score.h ", b"==== dev/lib/skore.h "),
           "lack")
    edit("another shard", "data", line(a, "data")[:-1] + b"0", "not the file")
    edit("another judge", "judge", b"judge data/mine.safetensors " + b" ".join(line(a, "judge").split()[2:]),
         "judge")
    edit("a track that there is not", "track", b"track sprint", "no track sprint")
    edit("a closed track", "track", b"track imagenet-256", "not run by this program")
    for name, old in (("track.h", b"static int track_end("), ("score.h", b"mean over random directions"),
                      ("scoring.h", b"GAUSS_ROWS = 2000"), ("random.h", b"0xD2511F53u"),
                      ("shards.h", b"FNV-1a of n bytes"), ("safetensors.h", b"2^-112 of it")):
        broken("%s changed" % name, edited(a, old, old + b"  "), name, "no entry changes")
    broken("the sampler changed", edited(a, b"1 + (0.04 - 1) * i", b"1 + (0.03 - 1) * i"), "the sampler")
    broken("a rule changed", edited(a, b'{"practice", "pictures", "40"}', b'{"practice", "pictures", "20"}'),
           "rule pictures")
    broken("a rule of all tracks changed", edited(a, b'{"*", "log_every", "10"}',
                                                  b'{"*", "log_every", "20"}'), "rule log_every")
    broken("a setting more allowed", edited(a, b'"lr beta1 beta2 ', b'"lr beta1 pictures beta2 '), "rule recipe")
    sentence, said = call(*BASE, "--one", save(work, edited(a, b'"lr beta1 beta2 ', b'"lr beta2 ')))
    check("a setting that was allowed later is no change of rules", sentence == "", sentence)
    sentence, said = call(*BASE, "--one", save(work, edited(a, b"// Optimizer\n", b"// Optimizer, ours\n")))
    check("an entry's change is named", sentence == "" and "changed" in said and "train_srdit.c" in said,
          sentence + said)
    sentence, said = call(
        *BASE, "--one",
        save(work, edited(a, b'"practice", "target", "not fixed yet"', b'"practice", "target", "5.0"')))
    check("a target that was fixed later is no change of rules", sentence == "", sentence)

    # The command and the settings
    edit("a flag that the track fixes", "command", line(a, "command") + b" --steps 12", "--steps")
    edit("a setting that is not the command's", "command", line(a, "command") + b" --lr 0.5", "--lr 0.5")
    edit("a technique that is not the command's", "command", line(a, "command") + b" --no-rope", "--no-rope")
    edit("a flag with =", "command", line(a, "command") + b" --data=x", "--data")
    edit("more steps", "steps", b"steps 13", "its steps is 13")
    edit("fewer pictures", "pictures", b"pictures 20", "pictures")
    edit("another sampler", "sampler", b"sampler heun", "sampler")
    edit("another sampler length", "sample_steps", b"sample_steps 50", "sample_steps")
    edit("another model", "model", b"model B/1", "model")

    # The lines of the steps, the clock, the caps
    ten = re.search(rb"\n(10,.*)", a).group(1)
    cells = ten.split(b",")

    def row(what, new, *say):
        broken(what, edited(a, b"\n" + ten + b"\n", b"\n" + b",".join(new) + b"\n"), *say)

    broken("a line of the steps left out", edited(a, b"\n" + ten, b""), "whole run of 12")
    row("a step twice", [b"1"] + cells[1:], "do not rise")
    row("a step that is not one of them", [b"9"] + cells[1:], "whole run of 12")
    row("a loss that is lower", cells[:1] + [b"0.5"] + cells[2:], "not the sum of its parts")
    row("a part that is nan", cells[:2] + [b"nan"] + cells[3:], "not finite")
    row("a part that is a word", cells[:2] + [b"good"] + cells[3:], "not a number")
    row("a line cut short", cells[:4], "cut short")
    row("a norm below zero", cells[:6] + [b"-1"] + cells[7:], "negative")
    row("milliseconds that are not those of the rate", cells[:8] + [b"1"] + cells[9:], "milliseconds")
    edit("a clock faster than its steps", "clock_seconds", b"clock_seconds 0.01", "together")
    edit("a clock longer than the program", "clock_seconds", b"clock_seconds 1e6", "not within")
    edit("a clock that is nan", "clock_seconds", b"clock_seconds nan", "not a finite")
    edit("a clock at zero", "clock_seconds", b"clock_seconds 0", "clock")
    edit("more processors than threads", "processor_seconds", b"processor_seconds 1000", "processor time")
    edit("fewer samples seen", "samples_seen", b"samples_seen 95", "samples seen")
    edit("too many parameters", "parameters", b"parameters 600001", "parameters")
    edit("too much memory", "peak_bytes", b"peak_bytes 2000000001", "memory")
    edit("a score that is nan", "frechet", b"frechet nan", "not a finite")
    edit("a score that is inf", "kernel", b"kernel inf", "not a finite")
    edit("copied pictures", "copies", b"copies 0.021", "nearly copies")
    edit("a start that is no time", "started", b"started yesterday", "not a time")
    broken("a score left out", edited(a, b"\n" + line(a, "recall"), b""), "[scores]")

    # All runs of an entry
    refused("a run missing", BASE + logs[:2], "1 of 3 runs are missing")
    refused("two logs of one seed", BASE + logs + logs[:1], "two runs of one seed")
    others = logs[1:]
    seed = line(a, "seed")[5:]
    edit("a seed that is not the command's", "seed", b"seed 7", "does not have --seed 7")
    chosen = edited(edited(a, b" --seed " + seed, b" --seed 7"), b"\nseed " + seed, b"\nseed 7")
    broken("a chosen seed", chosen, "not one of those", one=False, others=others)
    broken("other settings", edited(a, b"\nlr 0.002\n", b"\nlr 0.003\n"), "lr", one=False, others=others)
    broken("other sources", edited(a, b"// Optimizer\n", b"// Optimizer \n"), "other sources", one=False,
           others=others)
    broken("another compiler", edited(a, line(a, "compiler"), b"compiler icc"), "compiler", one=False,
           others=others)
    broken("another command", edited(a, line(a, "command"),
                                     line(a, "command") + b" --accum 1"), "command", one=False, others=others)
    drawn = os.path.join(work, "drawn.json")
    with open(drawn, "w") as f:
        json.dump({"seeds": [1, 2, 3]}, f)
    refused("seeds that are not those drawn", BASE + ["--drawn", drawn] + logs, "drawn for the rerun")
    with open(drawn, "w") as f:
        f.write("{")
    refused("a list of seeds that is none", BASE + ["--drawn", drawn] + logs, "not a list")
    refused("a baseline where there is none", BASE + logs + ["--baseline"] + logs, "--baseline")
    refused("no log", BASE, "which logs")
    refused("a revision that there is not", ["--base", "no-such-revision"] + logs, "no such revision")
    wordless = edited(edited(a, b" --seed " + seed, b""), b"\nseed " + seed, b"\nseed x")
    broken("a seed that is a word", wordless, "not a whole number")
    other = edited(edited(a, b"--track practice ", b"--track practice-ratio "), b"\ntrack practice\n",
                   b"\ntrack practice-ratio\n")
    with open(bad, "wb") as f:
        f.write(other)
    refused("a run of another track", BASE + others + [bad], "its track is practice-ratio")
    return data


def save(work, data):
    path = os.path.join(work, "changed.log")
    with open(path, "wb") as f:
        f.write(data)
    return path


def cut_gzip(path, work):
    with open(path, "rb") as f:
        data = f.read()
    cut = os.path.join(work, "cut.log.gz")
    with open(cut, "wb") as f:
        f.write(data[:len(data) // 2])
    return cut


def test_interleaving(path):
    """Six runs at 10, 20, ... seconds: A B A B A B"""

    def made(at, **more):
        log = copy.copy(verify.Log(path))
        log.run = dict(log.run, started="2026-11-25T10:00:%02d.000Z" % at, clock_seconds="5", **more)
        log.path = "at %d" % at
        return log

    def sentence(a, b):
        try:
            verify.check_interleaved(a, b)
            return ""
        except verify.Refusal as refusal:
            return str(refusal)

    a, b = [made(t) for t in (0, 20, 40)], [made(t) for t in (10, 30, 50)]
    check("A B A B A B", sentence(a, b) == "", sentence(a, b))
    check("A A A B B B", "right after" in sentence([made(t) for t in (0, 10, 20)],
                                                   [made(t) for t in (30, 40, 50)]))
    check("fewer of the baseline", "2 runs of the baseline for 3" in sentence(a, b[:2]))
    check("two at once", "before" in sentence(a, [made(t) for t in (4, 30, 50)]))
    check("another sitting", "boot" in sentence(a, b[:2] + [made(50, boot="x")]))
    check("another machine", "processor" in sentence(a, b[:2] + [made(50, processor="x")]))


def test_ratio_logs(logs, baseline, work):
    with open(logs[0], "rb") as f:
        data = f.read()
    baseline = sorted(baseline, key=lambda path: verify.Log(path).began())
    with open(baseline[0], "rb") as f:
        other = f.read()
    one_thread = save(work, edited(data, line(data, "threads"), b"threads 1"))
    refused("one thread on a track of two", BASE + ["--one", one_thread], "it ran on 1 threads")
    faster = save(work, edited(other, line(other, "started"), b"started 2099-01-01T00:00:00.000Z"))
    refused("a baseline of another day", BASE + logs + ["--baseline", faster] + baseline[1:], "right after")


def test_ratio(work):
    """An entry and the baseline in turn, a record of it, and the record against its logs"""
    folder, here = os.path.join(work, "ratio"), verify.HERE
    made = subprocess.run([
        sys.executable,
        os.path.join(here, "verify.py"), *BASE, "--run", folder, "--against", TRAIN, "--", TRAIN, "--track",
        "practice-ratio", *TINY
    ], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
    check("a ratio", made.returncode == 0 and "of the baseline's time" in made.stdout, made.stdout)
    logs, baseline = (sorted(
        os.path.join(folder, d, "track.log") for d in os.listdir(folder) if d.startswith(k))
                      for k in ("entry", "baseline"))
    test_ratio_logs(logs, baseline, work)
    refused_target("two runs are too few for a target", baseline, "at least 10")
    least, targets.LEAST, out = targets.LEAST, 2, io.StringIO()
    with contextlib.redirect_stdout(out):
        targets.main(BASE + baseline)
    targets.LEAST = least
    check("a target of two runs, were that enough", "target" in out.getvalue() and "sigma" in out.getvalue())
    refused("a ratio without a baseline", BASE + logs, "--baseline")
    sentence, said = call(*(BASE + baseline))
    check("the baseline by itself", sentence == "" and "ratio      1.0000 +- 0.0000" in said, sentence or said)
    refused("a baseline with settings of its own", BASE + baseline + ["--baseline"] + logs, "of its own")
    refused("a program without a baseline",
            BASE + ["--run", folder, "--", TRAIN, "--track", "practice-ratio"] + TINY, "--against")
    refused("a chosen seed for --run",
            BASE + ["--run", folder, "--", TRAIN, "--track", "practice", "--seed", "1"], "verify.py gives it")
    try:
        verify.HERE = os.path.join(work, "here")
        os.makedirs(verify.HERE)
        shutil.copy(os.path.join(here, "tracks.h"), verify.HERE)
        words = (BASE + logs + ["--baseline"] + baseline +
                 ["--record", "A name", "--authors", "A, B", "--what", "less"])
        sentence, said = call(*words)
        check("a record", sentence == "" and "written" in said, sentence)
        refused("a record twice", words, "such a record already")
        sentence, said = call("--check-records")
        check("the record follows from its logs", sentence == "" and "1 with logs" in said, sentence)
        path = [
            os.path.join(d, f) for d, _, names in os.walk(verify.HERE) for f in names if f == "record.json"
        ][0]
        with open(path) as f:
            r = json.load(f)
        for key, value in (("metric", [1.0, 1.0]), ("ratio", 0.1), ("seconds", [1.0, 1.0]), ("samples", 1)):
            with open(path, "w") as f:
                json.dump(dict(r, **{key: value}), f)
            refused("a record with another %s" % key, ["--check-records"], "its %s does not follow" % key)
        with open(path, "w") as f:
            json.dump(r, f)
        this = os.path.join(os.path.dirname(path), "this")
        os.remove(os.path.join(this, os.listdir(this)[0]))
        refused("a record that lost a log", ["--check-records"], "1 of 2 runs are missing")
    finally:
        verify.HERE = here
    return logs, baseline


def test_boards(work):

    def record(date, ratio, error=0.001, **more):
        return dict(
            dict(rank="ratio", status="entry", reached=True, ratio=ratio, ratio_error=error, mean=1.0,
                 deviation=0.1, n=10, name=date, date=date, authors=["A"], what="w", seconds_mean=1.0,
                 samples=1), **more)

    rows = [
        record("2026-01-01", 1.0),
        record("2026-01-02", 0.9),
        record("2026-01-03", 0.8985),
        record("2026-01-04", 0.5, reached=False),
        record("2026-01-05", 0.5, status="skeptical"),
        record("2026-01-06", 0.8),
        record("2026-01-07", 0.1, status="log only"),
        record("2026-01-08", 0.4, reached=None)
    ]
    got = [place for _, place in verify.places(rows[::-1])]
    check("a tie, a miss, a skeptical result and a log only have no place",
          got == ["1", "2", "–", "–", "–", "3", "–", "–"], got)
    check(
        "who verified it", "by B" in verify.row_of(record("d", 1, verified_by="B"), "1") and
        "self-verified" in verify.row_of(record("d", 1), "1"))
    folder, readme = os.path.join(work, "records"), os.path.join(work, "README.md")
    os.makedirs(os.path.join(folder, "fashion-cpu", "x"))
    with open(os.path.join(folder, "fashion-cpu", "x", "record.json"), "w") as f:
        json.dump(rows[0], f)
    with open(readme, "w") as f:
        f.write("before\n%s\n%s\nafter\n" % verify.MARKS)
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            verify.write_boards(True, readme, folder)
            check("boards that are not up to date", False, "accepted")
        except verify.Refusal as refusal:
            check("boards that are not up to date", "not those of the records" in str(refusal), refusal)
        verify.write_boards(False, readme, folder)
        verify.write_boards(True, readme, folder)
    with open(readme) as f:
        text = f.read()
    check(
        "boards are written",
        text.startswith("before\n") and text.endswith("after\n") and "2026-01-01" in text and
        "No entry yet." in text, text)
    with open(os.path.join(folder, "fashion-cpu", "x", "record.json"), "w") as f:
        f.write('{"rank": "ratio"}')
    try:
        verify.boards(folder)
        check("a record that is none", False, "accepted")
    except verify.Refusal as refusal:
        check("a record that is none", "not a record" in str(refusal), refusal)


def test_targets(logs, work):
    """Fixing a target: from ten scores at least, to a value that the baseline itself passes"""
    scores = [10.0, 10.4, 9.7, 10.1, 10.2, 9.9, 9.8, 10.3, 10.0, 9.6]
    target, sigma = targets.target_of(scores)
    check("the baseline passes its own target", verify.below(scores, target)[0] < 0.01, target)
    check("the target is no looser than it must be", target < 10.4 and
          not verify.below(scores, target * 0.985)[0] < 0.01, target)
    check("sigma", abs(sigma - verify.deviation_of(scores)) < 1e-3, sigma)
    table = os.path.join(work, "tracks.h")
    shutil.copy(os.path.join(HERE, "tracks.h"), table)
    targets.write("practice-ratio", target, sigma, table)
    with open(table) as f:
        rules = verify.rules_of(f.read())
    check("the table has them",
          float(rules["practice-ratio"]["target"]) == target and rules["practice"]["target"] == "not fixed yet",
          rules["practice-ratio"])
    check("it is read as numbers", verify.target_of(rules["practice-ratio"]) == (target, sigma))
    try:
        targets.write("practice-ratio", 1, 1, table)
        check("a target is not moved", False, "it was")
    except verify.Refusal as refusal:
        check("a target is not moved", "fixed already" in str(refusal), refusal)
    refused_target("a target from settings of its own", logs, "own settings")


def refused_target(what, logs, say):
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            targets.main(BASE + logs)
        check(what, False, "accepted")
    except verify.Refusal as refusal:
        check(what, say in str(refusal), refusal)


def test_ablations(work):
    """Two sittings make one table, and a table of something else is refused"""
    table = os.path.join(work, "ablations.csv")

    def call_ablations(*words):
        out = io.StringIO()
        try:
            with contextlib.redirect_stdout(out):
                ablations.main(["--track", "practice", "--csv", table, "--train", TRAIN] + list(words))
            return "", out.getvalue()
        except verify.Refusal as refusal:
            return str(refusal), out.getvalue()

    for seeds in "12":
        sentence, said = call_ablations("--seeds", seeds, "--only", "rope", "--", *TINY)
        check("ablations, sitting " + seeds, sentence == "" and "| rope | %s |" % seeds in said, sentence or
              said)
    check("the second sitting made its own runs only", "seed 1" not in said and said.count("seed 2") == 2,
          said)
    with open(table) as f:
        rows = f.read().split("\n")
    check("four rows", len(rows) == 6 and rows[-1] == "", rows)
    sentence, said = call_ablations("--report")
    check("the report", sentence == "" and "4.562, 4.093 (+0.469)" in said, sentence or said)
    check("other settings", "name another --csv" in call_ablations("--seeds", "2", "--only", "rope")[0])
    check("steps that the track fixes", "fixes them" in call_ablations("--steps", "9")[0])
    with open(table, "w") as f:
        f.write("\n".join(rows[:4]) + "\n" + rows[4][:40])
    check("a row that is cut", "line 5 is not whole" in call_ablations("--report")[0],
          call_ablations("--report")[0])
    os.remove(table)
    beyond = ("--beyond", "--tune", "0.002", "0.05", "--seeds", "1", "--only", "muon")
    sentence, said = call_ablations("--minutes", "0", *beyond, "--", *TINY)
    check("no minute left: no run", sentence == "" and not os.path.exists(table), sentence or said)
    sentence, said = call_ablations(*beyond, "--", *TINY)
    check("later parts: four trials, two runs", sentence == "" and said.count("seed 1000") == 4 and
          said.count("seed 1\n") == 2 and "| muon, lr 0.05 | 1 |" in said, sentence or said)
    with open(os.path.join(work, "ablations.runs", "muon-1", "track.log"), encoding="utf-8") as f:
        command = f.read().split("\ncommand ")[1].split("\n")[0]
    check("Muon's rate is ten times as high", "--lr 0.05 --muon-lr 0.5" in command, command)
    check("a part that is of the other table", "without --beyond" in
          call_ablations("--beyond", "--only", "rope", "--", *TINY)[0])
    with open(table, "w") as f:
        f.write("x,y\n")
    check("another table", "columns" in call_ablations("--report")[0])


def test_rescore(logs, work):
    """The repository's ./sample makes of the checkpoint what the log says, and not what another log says"""
    if not os.path.exists(os.path.join(ROOT, "sample")):
        failed.append("rescore")
        return print("FAIL rescore: ./sample is not there; make builds it")
    sentence, said = call(*BASE, "--one", "--rescore", logs[0])
    check("a score that comes out again", sentence == "" and "scored anew" in said, sentence)
    folder = os.path.join(work, "moved")
    os.makedirs(folder)
    shutil.copy(logs[0], folder)
    moved = os.path.join(folder, "track.log")
    refused("no checkpoint beside the log", BASE + ["--one", "--rescore", moved], "it is not there")
    with open(logs[0], "rb") as f:
        data = f.read()
    score = b"frechet %.17g" % (0.95 * float(line(data, "frechet").split()[1]))
    with open(moved, "wb") as f:
        f.write(edited(data, line(data, "frechet"), score))
    shutil.copy(os.path.join(os.path.dirname(logs[0]), "checkpoint.safetensors"), folder)
    refused("a score that its checkpoint does not have", BASE + ["--one", "--rescore", moved],
            "scored anew, has")


def test_program(work):
    """What the trainer refuses, and that an interrupted run leaves no log"""

    def said(*words):
        done = subprocess.run([TRAIN] + list(words), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              universal_newlines=True)
        return done.returncode, done.stderr

    out = os.path.join(work, "refused")
    for what, words, say in (("a flag that the track fixes", ["--track", "practice", "--steps", "3"],
                              "--steps"), ("--data", ["--track", "practice", "--data", "x"],
                                           "--data"), ("--data=", ["--track=practice", "--data=x"], "--data"),
                             ("--resume", ["--track", "practice", "--resume", "x"],
                              "--resume"), ("--overwrite", ["--track", "practice",
                                                            "--overwrite"], "--overwrite"),
                             ("sizes on a track of one size", ["--track", "fashion-steps", "--depth",
                                                               "3"], "--depth"),
                             ("threads on a track of two", ["--track", "fashion-cpu", "--threads", "1"],
                              "--threads"), ("no step, or first no data", ["--track", "fashion-steps", "--steps", "0"],
                              "at least one step" if os.path.exists(os.path.join(
                                  ROOT, "data/fashion_mnist.safetensors")) else "says how it is made"),
                             ("a track that there is not", ["--track", "sprint"],
                              "there are practice"), ("a closed track", ["--track", "imagenet-256"], "ADM"),
                             ("too large a model", ["--track", "practice", "--hidden-size",
                                                    "256"], "parameters")):
        status, sentence = said(*words, "--out", out)
        check("the trainer refuses " + what, status == 1 and say in sentence and sentence.count("\n") == 1,
              sentence)
    check("nothing is left of what was refused", not os.path.exists(os.path.join(out, "track.log")))
    there = os.path.join(work, "elsewhere")
    os.makedirs(os.path.join(there, "data"))
    shutil.copy(os.path.join(ROOT, "data/digits.safetensors"), os.path.join(there, "data"))
    for what, say in (("no judge", "digits_encoder.safetensors: cannot be read"), ("an edited judge",
                                                                                   "SHA-256")):
        if what == "an edited judge":
            with open(os.path.join(there, "data/digits_encoder.safetensors"), "wb") as f:
                f.write(b"x")
        done = subprocess.run([TRAIN, "--track", "practice"], cwd=there, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, universal_newlines=True)
        check(what, done.returncode == 1 and say in done.stderr and done.stderr.count("\n") == 1, done.stderr)
        check(what + ": nothing is begun", not os.path.exists(os.path.join(there, "out")))
    seen = []
    for k, words in enumerate((["--track",
                                "practice"], ["--steps", "12", "--log-every", "10", "--sample-steps", "4"])):
        run = os.path.join(work, "same-%d" % k)
        subprocess.run([TRAIN] + words + TINY + ["--seed", "5", "--out", run], cwd=ROOT,
                       stdout=subprocess.DEVNULL)
        with open(os.path.join(run, "log.csv")) as f, open(os.path.join(run, "samples.png"), "rb") as g:
            seen.append(([text.split(",")[:8] for text in f], g.read()))
    check("a run of a track has the bits of any other", seen[0] == seen[1])
    with open(os.path.join(work, "same-0", "loss.png"), "rb") as f:
        png = f.read()
    at, pixels = 8, b""
    while at < len(png):  # chunks: length, type, data, check
        size = int.from_bytes(png[at:at + 4], "big")
        chunk, crc = png[at + 4:at + 8 + size], png[at + 8 + size:at + 12 + size]
        check("loss.png, chunk %s" % chunk[:4].decode(), zlib.crc32(chunk).to_bytes(4, "big") == crc)
        pixels += zlib.decompress(chunk[4:]) if chunk[:4] == b"IDAT" else b""
        at += 12 + size
    check("loss.png is 480 x 240", len(pixels) == 240 * (3 * 480 + 1), len(pixels))
    run = subprocess.Popen([TRAIN, "--track", "digits", "--out", out], cwd=ROOT,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    for text in run.stdout:
        if text.split()[:1] == ["1/300"]:
            run.terminate()
            break
    text, sentence = run.communicate()
    check("an interrupted run does not count", run.returncode == 130 and "does not count" in sentence,
          sentence)
    check("an interrupted run leaves no track.log", not os.path.exists(os.path.join(out, "track.log")))


def mutants(logs, ratio_logs, work):
    """Each call of need() in what checks logs and entries, left out"""
    global failed, passed
    real, whole, alive = verify.need, (failed, passed), []
    with open(verify.__file__, encoding="utf-8") as f:
        lines = f.read().split("\n")
    first = next(i for i, text in enumerate(lines) if text.startswith("class Log"))
    last = next(i for i, text in enumerate(lines) if text.startswith("def result_of"))
    places = [i + 1 for i in range(first, last) if re.match(r" +need\(", lines[i])]
    for place in places:
        failed, passed = [], 0
        # a call of several lines is at its first one
        verify.need = lambda *a: None if sys._getframe(1).f_lineno == place else real(*a)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                test_entry(logs, work)
                test_interleaving(logs[0])
                test_ratio_logs(*ratio_logs, work)
        except Exception as error:  # noqa: the mutant fell over, which is noticed too
            failed.append(repr(error))
        if not failed:
            alive.append("verify.py:%d: %s" % (place, lines[place - 1].strip()))
    verify.need, (failed, passed) = real, whole
    print("\n".join(["%d mutants, %d live" % (len(places), len(alive))] + alive))
    check("mutants", not alive, "%d of %d live" % (len(alive), len(places)))


def main():
    work = tempfile.mkdtemp(prefix="srdit-verify-")
    try:
        test_statistics()
        folder = os.path.join(work, "my runs")  # with a space
        made = subprocess.run([
            sys.executable,
            os.path.join(HERE, "verify.py"), *BASE, "--run", folder, "--", TRAIN, "--track", "practice", *TINY
        ], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
        check("three practice runs", made.returncode == 0, made.stdout)
        if made.returncode == 0:
            logs = sorted(os.path.join(folder, d, "track.log") for d in os.listdir(folder))
            test_entry(logs, work)
            test_interleaving(logs[0])
            test_targets(logs, work)
            if options.rerun:
                sentence, said = call(*BASE, "--rerun", logs[0], "--run", os.path.join(work, "again"),
                                      "--runs", 2)
                check("a rerun with fresh seeds", sentence == "" and "2 runs" in said, sentence or said)
                sentence, said = call(*BASE, "--rerun", logs[0], "--run", os.path.join(work, "again"),
                                      "--runs", 2)
                check("a rerun goes on", sentence == "" and "run 1 of" not in said, sentence or said)
            test_rescore(logs, work)
            ratio_logs = test_ratio(work)
            if options.mutants and not failed:
                mutants(logs, ratio_logs, work)
        test_boards(work)
        test_ablations(work)
        test_program(work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print("%d passed, %d failed" % (passed, len(failed)))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
