#!/usr/bin/env python3
"""Checks the evidence of a race's entry and keeps the boards. README.md beside this file has the rules.

  verify.py LOG...       an entry: one track.log of each of its runs (plain or .gz). Recomputes all that can
                         be, prints the row for the board; status 1 with a sentence for the first broken rule
  verify.py --one LOG... each log for itself, without asking whether all runs of an entry are there
  verify.py --run DIR [--against PROGRAM] -- PROGRAM --track NAME [settings]
                         makes the entry's runs, those that DIR does not hold yet: its seeds follow from its
                         sources and settings, so that nobody chooses them. --against: the baseline's runs
                         between them, A B A B
  verify.py --rerun LOG [--against LOG] [--runs N] --run DIR
                         builds the sources out of a log in a temporary folder and runs them with seeds that
                         the operating system draws now. This runs code out of the log.
  verify.py --boards     the boards in the README from records/*/*/record.json; --check-boards: are they up to
                         date? --check-records: does each record still follow from its logs?

With LOG...: --baseline LOG... the baseline's runs, for tracks that are ranked by a ratio; --drawn FILE the
seeds of a rerun; --base REVISION what the sources are compared with [HEAD; "": the files of this folder];
--rescore draws from each checkpoint beside its log and scores it anew with this repository's ./sample;
--record NAME --authors A,B --what TEXT [--verified-by WHO] [--skeptical] writes records/TRACK/DATE_NAME/
with the logs and record.json. Nothing beyond Python 3 is needed.
"""

import argparse, datetime, glob, gzip, hashlib, json, math, os, re, secrets, subprocess, sys, tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
FORMAT = "srdit-track-1"
SIGNIFICANCE = 0.01
RUN_KEYS = (
    "track command seed started boot processor processors device accelerator threads load compiler flags "
    "state_before_training clock_seconds process_seconds processor_seconds samples_seen parameters "
    "planned_bytes peak_bytes").split()
STEP_KEYS = "step,loss,denoise,cls,align,cfm,grad_norm,lr,ms_per_step,images_per_s"
SCORE_KEYS = "frechet kernel sliced precision recall right newness copies".split()
# What decides what a score or a second means is not an entry's to change.
PROTECTED = ("dev/speedrun/track.h dev/speedrun/sha256.h dev/speedrun/sources.c dev/lib/score.h "
             "dev/lib/scoring.h dev/lib/shards.h dev/lib/safetensors.h dev/lib/random.h").split()
SAMPLER = ("\n// Sampler: ", "\n// A run: ")  # of train_srdit.c, likewise
WIDER = ("may_set", "recipe", "sizes", "always")  # what an entry may set: more may be allowed later
UNFIXED = ("not fixed yet", "not measured yet")


class Refusal(Exception):
    """One sentence: the file and what is wrong with it"""


def need(good, path, sentence):
    if not good:
        raise Refusal("%s: %s" % (path, sentence))


# -----------------------------------------------------------------------------------------------------------
# Statistics


def incomplete_beta(a, b, x):
    """The regularized incomplete beta function, by its continued fraction (Lentz's method)"""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # there the fraction of the mirror image converges faster
        return 1 - incomplete_beta(b, a, 1 - x)
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    tiny, f, c, d = 1e-300, 1.0, 1.0, 0.0
    for i in range(1000):
        m = i // 2
        if i == 0:
            term = 1.0
        elif i % 2 == 0:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1 / (1 + term * d or tiny)
        c = 1 + term / c or tiny
        f *= c * d
        if abs(1 - c * d) < 1e-15:
            break
    return front * (f - 1) / a


def t_cdf(t, freedom):
    """P(T <= t) for Student's T"""
    tail = incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t)) / 2
    return tail if t < 0 else 1 - tail


def mean_of(x):
    return math.fsum(x) / len(x)


def deviation_of(x):
    """Of a sample; 0 of a single one"""
    m = mean_of(x)
    return math.sqrt(math.fsum((v - m)**2 for v in x) / (len(x) - 1)) if len(x) > 1 else 0.0


def below(scores, target, sigma=None):
    """p of the one-sided test that the true mean is below the target: z where the deviation between seeds is
    known, else t. (p, name of the test)"""
    n, m = len(scores), mean_of(scores)
    if sigma:
        return math.erfc((target - m) * math.sqrt(n) / sigma / math.sqrt(2)) / 2, "z"
    sd = deviation_of(scores)
    if n < 2:
        return 1.0, "t"
    if sd == 0:
        return float(not m < target), "t"
    return t_cdf((m - target) / (sd / math.sqrt(n)), n - 1), "t"


# -----------------------------------------------------------------------------------------------------------
# The rules: tracks.h


def rules_of(text):
    """{track: {rule: value}} of the C table"""
    rules = {}
    for track, rule, value in re.findall(r'(?m)^\s*\{"([^"]+)",\s*"(\w+)",\s*((?:"[^"]*"\s*)+)\}', text):
        rules.setdefault(track, {})[rule] = "".join(re.findall(r'"([^"]*)"', value))
    return rules


def tracks():
    with open(os.path.join(HERE, "tracks.h"), encoding="utf-8") as f:
        return rules_of(f.read())


def rule_of(track, path="the command line"):
    rules = tracks()
    need(track != "*" and "rank" in rules.get(track, {}), path,
         "there is no track %s in tracks.h; there are %s" % (track, " ".join(t for t in rules if t != "*")))
    return rules[track]


def allowed(rules):
    """The settings that the command line of a track may give"""
    shared, names = tracks()["*"], []
    for word in rules.get("may_set", "").split():
        names += shared[word].split() if word in ("recipe", "sizes") else [word]
    return set(names + shared["always"].split())


def number(value, path, what):
    try:
        return float(value)
    except ValueError:
        raise Refusal('%s: %s is "%s", which is not a number' % (path, what, value))


def same_setting(a, b):
    """Of two texts: the same word, number, or numbers with commas between them"""
    try:
        return [float(x) for x in a.split(",")] == [float(x) for x in b.split(",")]
    except ValueError:
        return a == b


def target_of(rules):
    """(target, sigma), None where not fixed"""
    return tuple(None if rules.get(k, UNFIXED[0]) in UNFIXED else float(rules[k])
                 for k in ("target", "sigma"))


# -----------------------------------------------------------------------------------------------------------
# One log


class Log:
    """run, settings, scores: {key: text}; inputs {what: (path, bytes, sha)}; steps: rows of numbers; sources:
    {path: bytes}, in order; sources_sha"""

    def __init__(self, path):
        self.path = path
        try:
            with (gzip.open if path.endswith(".gz") else open)(path, "rb") as f:
                data = f.read()
        except (OSError, EOFError) as error:
            raise Refusal("%s: cannot be read: %s" % (path, getattr(error, "strerror", None) or error))
        need(data.startswith(FORMAT.encode() + b"\n"), path,
             "not a log of a track: it does not begin with " + FORMAT)
        end = re.search(rb"\n\[end\]\nsha256 ([0-9a-f]{64})\n\Z", data)
        need(end, path, "it was cut short: it does not end in its own SHA-256")
        need(
            hashlib.sha256(data[:end.start(1)]).hexdigest().encode() == end.group(1), path,
            "it was edited: its SHA-256 is not the one it ends in")
        head, mark, rest = data[:end.start()].partition(b"\n[sources]\n")
        need(mark, path, "it has no sources")
        line, _, text = rest.partition(b"\n")
        words = line.split()
        need(
            len(words) == 2 and words[0].isdigit() and int(words[0]) == len(text), path,
            "its sources are not as long as it says")
        self.sources_sha = hashlib.sha256(text).hexdigest()
        need(words[1].decode("ascii", "replace") == self.sources_sha, path,
             "the SHA-256 of its sources is not the one it says")
        self.sources = self.read_sources(text)
        self.read_head(head.decode("utf-8", "replace"))

    def read_sources(self, text):
        files, at = {}, 0
        while at < len(text):
            head = re.compile(rb"==== (\S+) (\d+)\n").match(text, at)
            need(head, self.path, "its sources cannot be taken apart at byte %d" % at)
            name, size = head.group(1).decode("ascii", "replace"), int(head.group(2))
            need(name not in files and not name.startswith("/") and ".." not in name.split("/"), self.path,
                 "its sources hold a file of the name %s" % name)
            at = head.end() + size
            need(at <= len(text), self.path, "its source %s is cut short" % name)
            files[name] = text[head.end():at]
        need(files, self.path, "it has no sources")
        return files

    def read_head(self, head):
        parts = dict(re.findall(r"\n\[(\w+)\]\n(.*?)(?=\n\n\[|\n?\Z)", head, re.S))
        need(
            list(parts) == ["run", "inputs", "settings", "steps", "scores"], self.path,
            "its parts are %s, not run, inputs, settings, steps, scores" % ", ".join(parts))
        self.run, self.settings, self.scores = (self.pairs(parts[k]) for k in ("run", "settings", "scores"))
        need(list(self.run) == RUN_KEYS, self.path, "its part [run] does not have the lines it should have")
        need(
            list(self.scores) == SCORE_KEYS, self.path,
            "its part [scores] does not have the lines it should have")
        self.inputs = {k: tuple(v.rsplit(" ", 2)) for k, v in self.pairs(parts["inputs"]).items()}
        need(
            list(self.inputs) == ["data", "judge"] and all(len(v) == 3 for v in self.inputs.values()),
            self.path, "its inputs are not a data shard and a judge")
        lines = parts["steps"].split("\n")
        need(lines[0] == STEP_KEYS, self.path, "its part [steps] does not have the columns it should have")
        self.steps = [[number(v, self.path, "a number of the steps") for v in row.split(",")]
                      for row in lines[1:]]
        need(self.steps and all(len(row) == 10 for row in self.steps), self.path,
             "a line of its steps is cut short")
        self.track, self.seed = self.run["track"], self.run["seed"]

    def pairs(self, text):
        found = {}
        for line in text.split("\n"):
            key, _, value = line.partition(" ")
            need(key not in found, self.path, "it says %s twice" % key)
            found[key] = value
        return found

    def number(self, part, key):
        need(key in part, self.path, "it does not say %s" % key)
        value = number(part[key], self.path, key)
        need(math.isfinite(value), self.path, "its %s is not a finite number: the run failed" % key)
        return value

    def words(self):
        """The settings of the command line, without what differs from run to run"""
        words, kept = self.run["command"].split(" ")[1:], []
        while words:
            flag, equals, _ = words[0].partition("=")
            if flag in ("--track", "--seed", "--out", "--threads"):
                words = words[1 if equals else 2:]
            else:
                kept.append(words.pop(0))
        return " ".join(kept)

    def began(self):
        try:
            return datetime.datetime.strptime(self.run["started"], "%Y-%m-%dT%H:%M:%S.%fZ").timestamp()
        except ValueError:
            raise Refusal('%s: it started at "%s", which is not a time' % (self.path, self.run["started"]))


def seeds_of(track, sources_sha, words, count):
    """An entry's seeds follow from what it is, so that nobody chooses them."""
    texts = ["%s %s %s %d" % (track, sources_sha, words, i) for i in range(count)]
    return [int(hashlib.sha256(t.encode()).hexdigest()[:12], 16) for t in texts]


def tree_file(base, name):
    """The bytes of a file in a revision of the repository, or in the folder where there is no git; None"""
    shown = (subprocess.run(["git", "-C", ROOT, "show", "%s:%s" % (base, name)], stdout=subprocess.PIPE,
                            stderr=subprocess.DEVNULL) if base else None)
    if shown and shown.returncode == 0:
        return shown.stdout
    if (base and subprocess.run(["git", "-C", ROOT, "rev-parse", base], stdout=subprocess.DEVNULL,
                                stderr=subprocess.DEVNULL).returncode == 0):
        return None
    try:
        with open(os.path.join(ROOT, name), "rb") as f:
            return f.read()
    except OSError:
        return None


def commit_of(base):
    """A revision's full name, so that a record means the same tomorrow; "" stays"""
    shown = (subprocess.run(["git", "-C", ROOT, "rev-parse", "--verify", base + "^{commit}"],
                            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) if base else None)
    need(not shown or shown.returncode == 0, base, "git knows no such revision")
    return shown.stdout.decode().strip() if shown else ""


def sampler_of(text):
    text = text.decode("utf-8", "replace") if text else ""
    begin = text.find(SAMPLER[0])
    end = text.find(SAMPLER[1], begin)
    return text[begin:end] if 0 <= begin < end else None


def check_sources(log, base):
    """What an entry may not change is as in the base; returns the files that it did change"""
    for name in PROTECTED:
        need(name in log.sources, log.path, "its sources lack %s" % name)
        need(
            log.sources[name] == tree_file(base, name), log.path,
            "its %s is not that of %s; no entry changes how a run is drawn, scored or told" %
            (name, base or "here"))
    need(
        sampler_of(log.sources.get("train_srdit.c")) == sampler_of(tree_file(base,
                                                                             "train_srdit.c")), log.path,
        "the sampler of its train_srdit.c is not that of %s; no entry changes it" % (base or "here"))
    ours, theirs = tracks(), rules_of(
        log.sources.get("dev/speedrun/tracks.h", b"").decode("utf-8", "replace"))
    for track in ("*", log.track):
        drop = ("target", "sigma", "closed")  # fixed after the first runs
        a, b = ({k: v for k, v in r.get(track, {}).items() if k not in drop} for r in (ours, theirs))
        for rule in sorted(set(a) | set(b)):
            now, then = a.get(rule), b.get(rule)
            grown = rule in WIDER and now and then and set(then.split()) <= set(now.split())
            need(now == then or grown, log.path,
                 'its rule %s is "%s", and the track\'s is "%s"' % (rule, then, now))
    return sorted(k for k, v in log.sources.items() if v != tree_file(base, k))


def check_log(log, base):
    """Raises a Refusal for the first rule that a run breaks; returns the files that differ from the base."""
    path, rules = log.path, rule_of(log.track, log.path)
    need("closed" not in rules, path, "the track %s is not run by this program" % log.track)
    for what in ("data", "judge"):
        name, _, sha = log.inputs[what]
        need(name == rules[what] and sha == rules[what + "_sha256"], path,
             "its %s, %s, is not the file that the track is run on" % (what, name))
    changed = check_sources(log, base)

    may = {"--" + n.replace("_", "-")
           for n in allowed(rules)} | {"--no-" + n.replace("_", "-")
                                       for n in allowed(rules)}
    words = log.run["command"].replace("=", " ").split(" ")[1:]
    for word in words:
        need(not word.startswith("--") or word in may, path,
             "its command has %s, which the track fixes" % word)
    for flag, said in (("--track", log.track), ("--seed", log.seed)):
        need(flag not in words or words[words.index(flag) + 1:][:1] == [said], path,
             "its command does not have %s %s" % (flag, said))
    for flag, value in zip(words, words[1:] + [""]):  # a setting is what the command says, if it says it
        name, off = flag[2:].replace("-", "_"), flag.startswith("--no-")
        said = "0" if off else value
        key = name[3:] if off else name
        if flag.startswith("--") and key in log.settings and key != "model":
            need(
                same_setting(said, log.settings[key]) or (key, said) == ("accum", "0"),
                path, "its %s is %s, and its command says %s %s" % (key, log.settings[key], flag, value))
    need(log.seed.isdigit(), path, 'its seed is "%s", which is not a whole number' % log.seed)
    for key in ("model", "steps", "pictures", "sampler", "sample_steps"):
        need(key not in rules or log.settings.get(key) == rules[key], path,
             "its %s is %s, and the track's is %s" % (key, log.settings.get(key), rules.get(key)))
    steps, batch = int(log.number(log.settings, "steps")), int(log.number(log.settings, "batch"))
    check_steps(log, steps, batch, int(tracks()["*"]["log_every"]))

    clock, whole = log.number(log.run, "clock_seconds"), log.number(log.run, "process_seconds")
    busy, threads = log.number(log.run, "processor_seconds"), int(log.number(log.run, "threads"))
    need(0 < clock <= whole, path, "its clock, %g s, is not within the program's time, %g s" % (clock, whole))
    need(busy <= 1.05 * threads * whole + 1, path,
         "it took %g s of processor time, more than %d threads have in %g s" % (busy, threads, whole))
    need("threads" not in rules or threads == int(rules["threads"]), path,
         "it ran on %d threads, and the track on %s" % (threads, rules.get("threads")))
    need(
        log.number(log.run, "samples_seen") == steps * batch, path,
        "its samples seen are not steps times batch")
    need(
        log.number(log.run, "parameters") <= float(rules["parameters"]), path,
        "its model has %s parameters, and the track allows %s" % (log.run["parameters"], rules["parameters"]))
    need(
        log.number(log.run, "peak_bytes") <= 1e6 * float(rules["memory_mb"]), path,
        "it took %s bytes of memory, and the track allows %s MB" %
        (log.run["peak_bytes"], rules["memory_mb"]))
    for key in SCORE_KEYS:
        log.number(log.scores, key)
    need(
        log.number(log.scores, "copies") <= float(rules["copies"]), path,
        "%s of its pictures are nearly copies of training pictures, and the track allows %s" %
        (log.scores["copies"], rules["copies"]))
    log.began()
    return changed


def check_steps(log, steps, batch, log_every):
    """The lines: each that there should be, in order, finite, and agreeing with one another and the clock"""
    path, c = log.path, {
        k: log.number(log.settings, k)
        for k in "cls_coeff align_coeff cfm_coeff cls align cfm".split()
    }
    at = [row[0] for row in log.steps]
    need(all(a < b for a, b in zip(at, at[1:])), path, "its steps do not rise from line to line")
    want = sorted({1, steps} | set(range(log_every, steps + 1, log_every)))
    need(at == want, path, "the lines of its steps are not those of a whole run of %d steps" % steps)
    seconds = 0.0
    for before, row in zip([0] + at, log.steps):
        need(all(math.isfinite(v) for v in row), path,
             "step %d: a number is not finite: the run failed" % row[0])
        _, loss, denoise, cls, align, cfm, norm, _, ms, rate = row
        total = (denoise + c["cls"] * c["cls_coeff"] * cls + c["align"] * c["align_coeff"] * align +
                 c["cfm"] * c["cfm_coeff"] * cfm)
        need(
            abs(total - loss) <= 1e-6 * (1 + abs(loss)), path,
            "step %d: the loss is not the sum of its parts" % row[0])
        need(ms > 0 and abs(rate * ms - 1000 * batch) <= 1e-3 * 1000 * batch, path,
             "step %d: the samples a second are not those of its milliseconds" % row[0])
        need(norm >= 0, path, "step %d: the gradient's norm is negative" % row[0])
        seconds += (row[0] - before) * ms / 1000
    clock = log.number(log.run, "clock_seconds")
    need(seconds <= 1.002 * clock + 0.001, path,
         "its steps took %g s together, and its clock says %g s" % (seconds, clock))


# -----------------------------------------------------------------------------------------------------------
# An entry: all its runs


def check_entry(logs, drawn=None):
    """All runs of one thing, with the seeds that it had to have: those that follow from it, or a rerun's"""
    first = logs[0]
    rules = rule_of(first.track, first.path)
    seen = {}
    for log in logs:
        need(log.track == first.track, log.path,
             "its track is %s, that of %s is %s" % (log.track, first.path, first.track))
        need(log.sources_sha == first.sources_sha, log.path,
             "it was built from other sources than %s" % first.path)
        for key in sorted(set(log.settings) | set(first.settings)):
            need(
                log.settings.get(key) == first.settings.get(key), log.path, "its %s is %s, that of %s is %s" %
                (key, log.settings.get(key), first.path, first.settings.get(key)))
        for key in ("compiler", "flags", "device"):
            need(log.run[key] == first.run[key], log.path, "its %s is not that of %s" % (key, first.path))
        need(log.words() == first.words(), log.path, "its command is not that of %s" % first.path)
        need(log.seed not in seen, log.path,
             "its seed is %s, and so is that of %s: two runs of one seed" % (log.seed, seen.get(log.seed)))
        seen[log.seed] = log.path
    want = drawn or seeds_of(first.track, first.sources_sha, first.words(), int(rules["runs"]))
    where = "drawn for the rerun" if drawn else "of this entry, which follow from its sources and settings"
    for log in logs:
        need(int(log.seed) in want, log.path, "its seed, %s, is not one of those %s" % (log.seed, where))
    missing = [s for s in want if str(s) not in seen]
    need(
        not missing, first.path, "%d of %d runs are missing, with the seeds %s; all runs of an entry count" %
        (len(missing), len(want), " ".join(map(str, missing))))
    return rules


def check_interleaved(logs, baseline):
    """A B A B on one machine in one sitting, one run at a time"""
    need(
        len(logs) == len(baseline), baseline[0].path,
        "there are %d runs of the baseline for %d of the entry" % (len(baseline), len(logs)))
    order = sorted([(log.began(), 0, log) for log in logs] + [(log.began(), 1, log) for log in baseline],
                   key=lambda item: item[0])
    for (began, who, log), (after, other, following) in zip(order, order[1:]):
        need(who != other, following.path,
             "it came right after %s, and not between two runs of the other program" % log.path)
        need(after >= began + log.number(log.run, "clock_seconds"), following.path,
             "it began before %s had ended" % log.path)
        for key in ("boot", "processor", "threads", "device"):
            need(log.run[key] == following.run[key], following.path,
                 "its %s is not that of %s: not the same machine in the same sitting" % (key, log.path))


def result_of(logs, rules, baseline, changed, base):
    """What record.json says of an entry, but for who and why"""
    metric = rules["metric"]
    scores = [log.number(log.scores, metric) for log in logs]
    seconds = [log.number(log.run, "clock_seconds") for log in logs]
    target, sigma = target_of(rules)
    first, r = logs[0], {}
    r.update(track=first.track, status="entry", rank=rules["rank"], n=len(logs),
             seeds=[int(x.seed) for x in logs], metric_name=metric, metric=scores, mean=mean_of(scores),
             deviation=deviation_of(scores), target=target, sigma=sigma, p=None, test=None, reached=None,
             seconds=seconds, seconds_mean=mean_of(seconds), seconds_deviation=deviation_of(seconds),
             steps=int(first.settings["steps"]), batch=int(first.settings["batch"]),
             samples=int(first.run["samples_seen"]), parameters=int(first.run["parameters"]),
             peak_bytes=max(int(float(x.run["peak_bytes"])) for x in logs), command=first.words(),
             hardware="%s, %s threads" % (first.run["processor"], first.run["threads"]),
             compiler=first.run["compiler"], flags=first.run["flags"], sources_sha256=first.sources_sha,
             input_sha256={
                 k: v[2]
                 for k, v in first.inputs.items()
             }, base=base, changed=changed)
    for key in SCORE_KEYS:
        r[key + "_mean"] = mean_of([x.number(x.scores, key) for x in logs])
    if target is not None:
        p, r["test"] = below(scores, target, sigma)
        r["p"], r["reached"] = p, p < SIGNIFICANCE
    if baseline:
        other = [log.number(log.run, "clock_seconds") for log in baseline]
        ratio = mean_of(seconds) / mean_of(other)
        r["baseline_seconds"], r["ratio"] = other, ratio
        # of a quotient of two means with independent errors
        r["ratio_error"] = ratio * math.sqrt(
            sum((deviation_of(x) / mean_of(x))**2 / len(x) for x in (seconds, other)))
    elif rules["rank"] == "ratio":  # the baseline itself
        r["ratio"], r["ratio_error"] = 1.0, 0.0
    return r


def verified(logs, baseline, drawn, base):
    """All that there is to check of an entry; returns what record.json says of it"""
    changed = [check_log(log, base) for log in logs + baseline]
    rules = check_entry(logs, drawn)
    need(rules["rank"] == "ratio" or not baseline, "--baseline", "only a track ranked by a ratio has one")
    need(rules["rank"] != "ratio" or baseline or not (changed[0] or logs[0].words()), "--baseline",
         "a track ranked by a ratio needs the baseline's logs, but for the row of the baseline itself")
    if baseline:
        check_entry(baseline, drawn)
        need(baseline[0].track == logs[0].track, baseline[0].path,
             "it is of another track than %s" % logs[0].path)
        need(not changed[-1] and not baseline[0].words(), baseline[0].path,
             "it is not a baseline: it has settings or changes of its own")
        check_interleaved(logs, baseline)
    return dict(result_of(logs, rules, baseline, changed[0], commit_of(base)), drawn=drawn)


def check_records(folder=None):
    """What each record says of its runs must follow from the logs beside it; who and why stand as they are,
    and so does what its target was then"""
    paths = sorted(glob.glob(os.path.join(folder or os.path.join(HERE, "records"), "*", "*", "record.json")))
    logged, later = 0, ("target", "sigma", "p", "test", "reached", "status")
    for path in paths:
        with open(path, encoding="utf-8") as f:
            r = json.load(f)
        if r["status"] == "log only":
            continue
        logs, baseline = ([Log(p) for p in sorted(glob.glob(os.path.join(os.path.dirname(path), sub, "*")))]
                          for sub in ("this", "baseline"))
        need(logs, path, "its logs are not beside it, in this/")
        order = {str(seed): i for i, seed in enumerate(r["seeds"])}
        logs.sort(key=lambda log: order.get(log.seed, -1))
        baseline.sort(key=Log.began)
        for key, value in verified(logs, baseline, r.get("drawn"), r["base"]).items():
            need(
                key in later or r.get(key) == value or
                key == "baseline_seconds" and sorted(r.get(key, [])) == sorted(value), path,
                "its %s does not follow from its logs" % key)
        logged += 1
    print("%d records, %d with logs, which they follow from" % (len(paths), logged))


def print_result(r):
    print("track      %s, %d runs" % (r["track"], r["n"]))
    print("score      %s %.5g, deviation %.3g between seeds" % (r["metric_name"], r["mean"], r["deviation"]))
    if r["target"] is None:
        print("target     not fixed yet, so that nothing can be won; the scores stand")
    else:
        print("target     %g: %s, p = %.2g (one-sided %s-test, %g is asked for)" %
              (r["target"], "reached" if r["reached"] else "not shown to be reached", r["p"], r["test"],
               SIGNIFICANCE))
    print("clock      %.2f s, deviation %.2f; %d samples seen" %
          (r["seconds_mean"], r["seconds_deviation"], r["samples"]))
    if "ratio" in r:
        print("ratio      %.4f +- %.4f of the baseline's time" % (r["ratio"], r["ratio_error"]))
    print("sources    %s, %s" %
          (r["sources_sha256"][:16],
           ("changed from %s: %s" %
            (r["base"][:12], ", ".join(r["changed"])) if r["changed"] else "those of %s" %
            (r["base"][:12] or "this folder"))))
    print("row        " + row_of(r, "-"))


def write_record(r, logs, baseline, options):
    date = datetime.date.today().isoformat()
    name = re.sub(r"\W+", "-", options.record).strip("-") or "entry"
    folder = os.path.join(HERE, "records", r["track"], "%s_%s" % (date, name))
    need(not os.path.exists(folder), folder, "there is such a record already; give this one another name")
    r = dict(r, name=options.record, authors=[a.strip() for a in options.authors.split(",") if a.strip()],
             date=date, what=options.what, verified_by=options.verified_by)
    if options.skeptical:
        r["status"] = "skeptical"
    for sub, group in (("this", logs), ("baseline", baseline)):
        for log in group:
            os.makedirs(os.path.join(folder, sub), exist_ok=True)
            with open(log.path, "rb") as f:
                data = f.read()
            data = gzip.decompress(data) if log.path.endswith(".gz") else data
            with open(os.path.join(folder, sub, log.seed + ".log.gz"), "wb") as f:
                f.write(gzip.compress(data, 9, mtime=0))
    path = os.path.join(folder, "record.json")
    with open(path + ".part", "w", encoding="utf-8") as f:
        json.dump(r, f, indent=1)
        f.write("\n")
    os.replace(path + ".part", path)
    print("%s: written; --boards puts it on the board" % os.path.relpath(path))


# -----------------------------------------------------------------------------------------------------------
# Making runs


def program_sources(program):
    shown = subprocess.run([program, "--track", "sources"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           cwd=ROOT)
    need(shown.returncode == 0, program,
         "it does not print its sources: %s" % shown.stderr.decode("utf-8", "replace").strip())
    return hashlib.sha256(shown.stdout).hexdigest()


def make_runs(folder, who, seeds, words_of):
    """Runs each program with each of its seeds, turn by turn, but for the runs that are there. words_of: the
    command of each program; returns the logs of each"""
    paths = [[] for _ in who]
    for i in range(len(seeds[0])):
        for k, name in enumerate(who):
            out = os.path.join(folder, "%s-%d" % (name, seeds[k][i]))
            paths[k].append(os.path.join(out, "track.log"))
            if os.path.exists(paths[k][-1]):
                continue
            need(
                not os.path.exists(out), out,
                "a run began here and left no log: it failed, or was interrupted; "
                "tell of it with the entry, delete the folder, and the same command makes it again")
            print("%s, run %d of %d" % (name, i + 1, len(seeds[k])), flush=True)
            done = subprocess.run(words_of[k] +
                                  ["--seed", str(seeds[k][i]), "--out",
                                   os.path.abspath(out)], cwd=ROOT)
            need(
                done.returncode == 0, out,
                "the run ended with status %d and does not count; a run that failed is told "
                "of with the entry, and not left out" % done.returncode)
    return paths


def run_entry(options, words):
    words = words[1:] if words[:1] == ["--"] else words
    need(
        len(words) >= 3 and "--track" in words[:-1], "--run",
        "what follows -- must be PROGRAM --track NAME [settings]")
    for flag in ("--seed", "--out"):
        need(flag not in words, flag, "verify.py gives it")
    program = os.path.abspath(words[0])
    track = words[words.index("--track") + 1]
    rules = rule_of(track)
    need(rules["rank"] == "ratio" or not options.against, "--against", "only a track ranked by a ratio has one")
    need(rules["rank"] != "ratio" or options.against or words[1:] == ["--track", track],
         "--against", "a track ranked by a ratio needs the baseline's program, but for the baseline itself")
    os.makedirs(options.run, exist_ok=True)
    programs = [[program] + words[1:]
                ] + ([[os.path.abspath(options.against), "--track", track]] if options.against else [])
    seeds = []
    for command in programs:
        kept = list(command[1:])
        for flag in ("--track", "--threads"):
            if flag in kept:
                at = kept.index(flag)
                del kept[at:at + 2]
        seeds.append(seeds_of(track, program_sources(command[0]), " ".join(kept), int(rules["runs"])))
    paths = make_runs(options.run, ["entry", "baseline"][:len(programs)], seeds, programs)
    return [Log(p) for p in paths[0]], [Log(p) for p in paths[1]] if options.against else []


def build(log, folder):
    """The trainer that a log's sources make, in a folder of its own with this repository's data"""
    for name, text in log.sources.items():
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as f:
            f.write(text)
    os.symlink(os.path.join(ROOT, "data"), os.path.join(folder, "data"))
    target = "train_srdit" if log.run["device"] == "CPU" else "train_srdit_cu"
    made = subprocess.run(["make", "-s", target], cwd=folder, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    need(made.returncode == 0, log.path,
         "its sources cannot be built: %s" % made.stdout.decode("utf-8", "replace").strip()[-300:])
    program = os.path.join(folder, target)
    need(
        program_sources(program) == log.sources_sha, log.path,
        "what its sources make says that it was made of others")
    return program


def rerun(options):
    """Fresh seeds for the program in a log; returns logs, the baseline's logs, the seeds drawn"""
    need(options.run, "--rerun", "it needs --run DIR, a folder for the new runs")
    programs, commands, who = ([options.rerun] + ([options.against] if options.against else []), [],
                               ["entry", "baseline"])
    logs = [Log(p) for p in programs]
    for log in logs:
        check_log(log, options.base)
        need(log.track == logs[0].track, log.path, "it is of another track than %s" % logs[0].path)
    rules = rule_of(logs[0].track)
    need(rules["rank"] == "ratio" or not options.against, "--against", "only a track ranked by a ratio has one")
    need(rules["rank"] != "ratio" or options.against or not logs[0].words(), "--against",
         "a track ranked by a ratio needs a log of the baseline, but for the baseline itself")
    count = options.runs or int(rules["runs"])
    os.makedirs(options.run, exist_ok=True)
    drawn_path = os.path.join(options.run, "drawn.json")
    if os.path.exists(drawn_path):  # a sitting that was interrupted goes on with its seeds
        drawn = read_drawn(drawn_path)
    else:
        drawn = [secrets.randbelow(1 << 48) for _ in range(count)]
        with open(drawn_path, "w", encoding="utf-8") as f:
            json.dump({"track": logs[0].track, "sources_sha256": logs[0].sources_sha, "seeds": drawn}, f)
    need(
        len(drawn) == count, drawn_path, "it holds %d seeds, and %d runs are asked for" % (len(drawn), count))
    with tempfile.TemporaryDirectory(prefix="srdit-rerun-") as folder:
        for k, log in enumerate(logs):
            program = build(log, os.path.join(folder, who[k]))
            commands.append([program, "--track", log.track] + log.words().split())
        paths = make_runs(options.run, who[:len(logs)], [drawn] * len(logs), commands)
    made = [[Log(p) for p in group] for group in paths]
    for group, log in zip(made, logs):
        need(group[0].sources_sha == log.sources_sha, group[0].path,
             "it is of other sources than %s" % log.path)
    return made[0], made[1] if options.against else [], drawn


def rescore(log, sample=None):
    """The checkpoint beside a log, drawn from and scored anew by this repository's ./sample, which knows
    nothing of the entry's code: the log's score must come out, but for rounding"""
    sample, rules = sample or os.path.join(ROOT, "sample"), rule_of(log.track, log.path)
    checkpoint = os.path.join(os.path.dirname(os.path.abspath(log.path)), "checkpoint.safetensors")
    need(os.path.exists(sample), sample, "it is not there; make builds it")
    need(os.path.exists(checkpoint), checkpoint, "it is not there, so that nothing can be scored anew")
    done = subprocess.run([
        sample, checkpoint, "--num", rules["pictures"], "--sampler", rules["sampler"], "--steps",
        rules["sample_steps"], "--seed", log.seed, "--score", rules["data"], "--judge", rules["judge"]
    ], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    need(done.returncode == 0, checkpoint,
         "it cannot be scored anew: %s" % done.stderr.decode("utf-8", "replace").strip()[-300:])
    found = re.search(r"^%s +(\S+)" % rules["metric"], done.stdout.decode("utf-8", "replace"), re.M)
    need(found, sample, "it printed no score %s" % rules["metric"])
    ours, theirs = number(found.group(1), sample, "the score"), log.number(log.scores, rules["metric"])
    need(
        abs(ours - theirs) <= 0.01 * abs(ours) + 1e-5, log.path,
        "its %s is %g, and its checkpoint, scored anew, has %g" % (rules["metric"], theirs, ours))
    print("%s: %s %.5f, scored anew %.5f" % (log.path, rules["metric"], theirs, ours))


def read_drawn(path):
    try:
        with open(path, encoding="utf-8") as f:
            seeds = json.load(f)["seeds"]
        return [int(s) for s in seeds]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refusal("%s: not a list of drawn seeds: %s" % (path, error))


# -----------------------------------------------------------------------------------------------------------
# Boards

MARKS = ("<!-- boards: written by dev/speedrun/verify.py --boards -->", "<!-- boards end -->")
WORDS = {
    "samples": "samples seen",
    "ratio": "time / baseline's",
    "H100-hours": "H100-hours",
    "none": "seconds"
}


def value_of(r):
    """What a track is ranked by, and its standard error"""
    if r["rank"] == "samples":
        return r["samples"], 0.0
    if r["rank"] == "ratio":
        return r["ratio"], r["ratio_error"]
    if r["rank"] == "H100-hours":
        return r.get("h100_hours"), 0.0
    return r["seconds_mean"], 0.0


def row_of(r, place):
    value = value_of(r)[0]
    shown = "-" if value is None else "%.4g" % value if r["rank"] != "samples" else "%d" % value
    score = "%.4g" % r["mean"] + (" ± %.2g (n = %d)" % (r["deviation"], r["n"]) if r["n"] > 1 else "")
    seen = {"log only": "log only", "skeptical": "skeptical result"}.get(r["status"])
    seen = seen or ("by " + r["verified_by"] if r.get("verified_by") else "self-verified")
    link = "[%s](%s)" % (r["name"], r["link"]) if r.get("link") else r.get("name", "-")
    link += " (%s)" % r["class"] if r.get("class") else ""
    return "| %s | %s | %s | %s: %s | %s | %s | %s |" % (place, shown, score, link, r.get(
        "what", "-"), r.get("date", "-"), ", ".join(r.get("authors", ["-"])), seen)


def places(records):
    """The rows of one board in order of time. A record takes the holder's place only where it is lower by
    more than two standard errors of the difference: ties keep the holder. A log only or a result that
    was not shown to reach the target has no place."""
    held, count, rows = {}, {}, []  # by the track's classes, if it has any
    for r in sorted(records, key=lambda r: (r.get("date", ""), r.get("name", ""))):
        (value, error), kind = value_of(r), r.get("class")
        counts = r["status"] == "entry" and r.get("reached") and r["rank"] != "none" and value is not None
        best = held.get(kind)
        if counts and (best is None or value < best[0] - 2 * math.hypot(error, best[1])):
            held[kind], count[kind] = (value, error), count.get(kind, 0) + 1
            rows.append((r, str(count[kind])))
        else:
            rows.append((r, "–"))
    return rows


def boards(folder=None):
    folder, parts = folder or os.path.join(HERE, "records"), []
    for track, rules in tracks().items():
        if track.startswith(("*", "practice")):
            continue
        records = []
        for path in sorted(glob.glob(os.path.join(folder, track, "*", "record.json"))):
            try:
                with open(path, encoding="utf-8") as f:
                    records.append(json.load(f))
                places(records[-1:]), row_of(records[-1], "")
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise Refusal("%s: not a record: %r" % (path, error))
        target = rules["target"]
        parts.append("**`%s`**: %s, target %s\n" %
                     (track, rules["metric"], target if target in UNFIXED else "at most " + target))
        if not records:
            parts.append("No entry yet.\n")
            continue
        parts.append(
            "| # | %s | score | what | date | who | seen |\n| --- | --- | --- | --- | --- | --- | --- |" %
            WORDS[rules["rank"]])
        parts.append("\n".join(row_of(r, place) for r, place in places(records)))
        parts.append("")
    return "\n".join(parts)


def write_boards(check, readme=None, folder=None):
    readme = readme or os.path.join(ROOT, "README.md")
    with open(readme, encoding="utf-8") as f:
        text = f.read()
    before, mark, rest = text.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    need(mark and end, readme, "it has no place for boards, between %s and %s" % MARKS)
    fresh = before + MARKS[0] + "\n" + boards(folder) + MARKS[1] + after
    if check:
        need(fresh == text, readme, "its boards are not those of the records; verify.py --boards writes them")
    elif fresh != text:
        with open(readme + ".part", "w", encoding="utf-8") as f:
            f.write(fresh)
        os.replace(readme + ".part", readme)
    print("the boards are up to date")


# -----------------------------------------------------------------------------------------------------------


def main(argv):
    at = argv.index("--") if "--" in argv else len(argv)
    argv, program = argv[:at], argv[at + 1:]
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="*", metavar="LOG")
    parser.add_argument("--baseline", nargs="+", default=[], metavar="LOG")
    for flag in ("drawn", "run", "rerun", "against", "record"):
        parser.add_argument("--" + flag)
    parser.add_argument("--base", default="HEAD")
    parser.add_argument("--runs", type=int)
    for flag in ("authors", "what", "verified-by"):
        parser.add_argument("--" + flag, default="")
    for flag in ("one", "rescore", "skeptical", "boards", "check-boards", "check-records"):
        parser.add_argument("--" + flag, action="store_true")
    options = parser.parse_args(argv)
    if options.boards or options.check_boards:
        return write_boards(options.check_boards)
    if options.check_records:
        return check_records()
    need(not (options.one and options.record), "--record",
         "an entry is all of its runs; --one looks at single logs")
    if options.one:
        for path in options.logs:
            log = Log(path)
            changed = check_log(log, options.base)
            print("%s: a sound run of track %s, seed %s, %s %s%s" %
                  (path, log.track, log.seed, rule_of(log.track)["metric"], log.scores[rule_of(
                      log.track)["metric"]], "; changed from %s: %s" %
                   (options.base, ", ".join(changed)) if changed else ""))
            if options.rescore:
                rescore(log)
        return need(options.logs, "--one", "which logs?")
    drawn = read_drawn(options.drawn) if options.drawn else None
    if options.rerun:
        logs, baseline, drawn = rerun(options)
    elif options.run:
        logs, baseline = run_entry(options, program)
    else:
        need(options.logs, "verify.py", "which logs? (--help says what it does)")
        logs, baseline = [Log(p) for p in options.logs], [Log(p) for p in options.baseline]
    result = verified(logs, baseline, drawn, options.base)
    for log in logs if options.rescore else []:
        rescore(log)
    print_result(result)
    if options.record:
        write_record(result, logs, baseline, options)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Refusal as refusal:
        sys.exit("error: %s" % refusal)
    except OSError as error:    # a program that is not there, a folder that cannot be written to
        sys.exit("error: %s: %s" % (error.filename, error.strerror))
