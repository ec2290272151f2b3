#!/usr/bin/env python3
"""Every technique of the paper off, one at a time, or every later part on: what is each worth at this size?

  ablations.py                   goes on where the last sitting stopped; Ctrl-C loses the run it is in
  ablations.py --minutes 30      stops before a run that begins later than that
  ablations.py --report          the table of the runs that are there
  ablations.py --track fashion-steps --steps 700 --seeds 5 --csv fashion.csv -- --batch 128
  ablations.py --beyond --track practice-fashion --tune 0.002 0.004 0.008    the later parts on, one at a time

Each run is one of a track (its rules fix the data, the judge and the samples drawn), with the seeds 1 ...
N; the words after -- go to every run. Results are rows of a CSV, appended run by run, seed by seed over all
techniques, so that any number of sittings gives a table; their logs stay beside it. The table gives the
mean score, its deviation between seeds, and the mean difference to all on with the same seed, also in
standard errors, s / sqrt(n); beside it, what the paper's author logged at ImageNet-256 (B/1, 400K steps,
one seed, FID): there techniques were ADDED one after the other, so that the two columns answer different
questions. With --beyond, what --recipe srdit13 switches on is added to the paper's recipe, part by part and
all together. --tune gives every side the same trials first: one run at each learning rate (Muon's being ten
times as high), with a seed of its own, and the best rate is that of the seeds 1 ... N. The same command
twice at once shares the runs out. Needs ./train_srdit (make).
"""

import argparse, csv, fcntl, math, os, subprocess, sys, time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import verify
from verify import need

# The flag's name, the author's FID without and with it (results.txt of SwayStar123/REG), and a remark
TECHNIQUES = {
    "routing": (10.558, 4.583, "SPRINT as a whole"),
    "path-drop": (None, None, "within SPRINT"),
    "align": (None, None, "in all of its runs"),
    "cls": (None, None, "in all of its runs"),
    "rope": (4.562, 4.093, ""),
    "qk-norm": (4.093, 4.019, ""),
    "value-residual": (4.019, 3.645, ""),
    "cfm": (3.645, 3.615, "250 sampling steps with it; not said without"),
    "time-shift": (3.615, 3.559, "at 256 x 256; the small presets' shift is 1, so that it is off anyway"),
    "label-dropout": (None, None, "in all of its runs"),
    "ema": (None, None, "in all of its runs")
}
# What --beyond switches on: the flags, the author's FID without and with it, and a remark
BEYOND = {
    "muon": (["--optimizer", "muon"], 3.491, 3.397, ""),
    "align-depths": (["--align-depths", "2,4"], 3.491, 3.289, ""),
    "immiscible": (["--immiscible", "8"], 3.139, 3.111, "on Muon, depths and widths"),
    "mlp-widths": (["--mlp-widths", "2,6"], 3.135, 3.139, "on Muon and depths"),
    "srdit13": (["--recipe", "srdit13"], 3.491, 3.111, "all of them")
}
MUONS, TUNING_SEED = ("muon", "srdit13"), 1000
FIELDS = ["technique", "seed", "track", "steps", "sources_sha256", "words", "clock_seconds"
          ] + verify.SCORE_KEYS


def read_rows(path):
    if not os.path.exists(path):
        return []
    with open(path, newline="", encoding="utf-8") as f:
        reader = csv.DictReader(f)
        need(reader.fieldnames == FIELDS, path, "not a table of ablations: its columns are others")
        rows = list(reader)
    for i, row in enumerate(rows, 2):
        need(None not in row.values() and None not in row, path,
             "line %d is not whole; delete it, and its run is made again" % i)
        for key in verify.SCORE_KEYS + ["clock_seconds"]:
            value = verify.number(row[key], path, "%s of line %d" % (key, i))
            need(math.isfinite(value), path, "%s of line %d is not finite" % (key, i))
    return rows


def append(path, row):
    with open(path, "a", newline="", encoding="utf-8") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        writer = csv.DictWriter(f, FIELDS)
        if f.seek(0, os.SEEK_END) == 0:
            writer.writeheader()
        writer.writerow(row)
        f.flush()
        os.fsync(f.fileno())


def clear(folder):
    """Removes what a run that was interrupted left, which no track can go on with; nothing else"""
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        need(name.startswith(("checkpoint.safetensors", "samples.png", "log.csv", "loss.png", "track.log.")),
             folder, "it holds %s, which is not of a run; name other --logs" % name)
        os.remove(os.path.join(folder, name))


def rate_of(rows, name):
    """The learning rate, as its text, at which this side's trial was best by the track's metric, of which less is
    better; "" where there were no trials"""
    trials = [(float(row[verify.rule_of(row["track"])["metric"]]), row["technique"].split(" lr ")[1]) for row in rows
              if row["technique"].startswith(name + " lr ")]
    return min(trials)[1] if trials else ""


def report(rows, metric, beyond):
    """The table"""
    groups, sides, all_on = {}, TECHNIQUES, "all on"
    if beyond:
        sides, all_on = {name: side[1:] for name, side in BEYOND.items()}, "paper"
    for row in rows:
        groups.setdefault(row["technique"], {})[row["seed"]] = float(row[metric])
    need(all_on in groups, "the table", 'it has no run of "%s" yet' % all_on)
    first, whole = rows[0], groups[all_on]
    print("%s on track %s, %s steps%s; sources %s\n" %
          (metric, first["track"], first["steps"], first["words"] and
           ", " + first["words"], first["sources_sha256"][:16]))
    print("| %s | n | %s | difference | in standard errors | author's FID without, with it | |" %
          ("on" if beyond else "off", metric))
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in [all_on] + list(sides):
        x, rate = groups.get(name, {}), rate_of(rows, name)
        without, with_, why = sides.get(name, (None, None, ""))
        author = "%.3f, %.3f (%+.3f)" % (without, with_, without - with_) if without else ""
        score = ("%.4g ± %.2g" %
                 (verify.mean_of(list(x.values())), verify.deviation_of(list(x.values()))) if x else "")
        pairs, mean, errors = [x[seed] - whole[seed] for seed in x if seed in whole], "", ""
        if name != all_on and pairs:
            mean = "%+.4g" % verify.mean_of(pairs)
            error = verify.deviation_of(pairs) / math.sqrt(len(pairs))
            errors = "%+.1f" % (verify.mean_of(pairs) / error) if error > 0 else ""
        print("| %s%s | %d | %s | %s | %s | %s | %s |" %
              (name, rate and ", lr " + rate, len(x), score, mean, errors, author, why))


def main(argv):
    argv, extra = (argv[:argv.index("--")], argv[argv.index("--") + 1:]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--track", default="digits")
    parser.add_argument("--steps", type=int, help="where the track leaves them free")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(TECHNIQUES) + list(BEYOND))
    parser.add_argument("--beyond", action="store_true", help="the later parts on, not the paper's off")
    parser.add_argument("--tune", nargs="+", default=[], metavar="LR", help="learning rates tried on each side")
    parser.add_argument("--csv", default="ablations.csv")
    parser.add_argument("--logs", help="folder of the runs [beside the CSV, its name without .csv]")
    parser.add_argument("--train", default=os.path.join(verify.ROOT, "train_srdit"))
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--metric", default="frechet", choices=verify.SCORE_KEYS)
    options = parser.parse_args(argv)
    rules = verify.rule_of(options.track)
    need(options.seeds > 0, "--seeds", "%d runs of each are too few" % options.seeds)
    rows = read_rows(options.csv)
    if options.report:
        need(rows, options.csv, "it has no runs yet")
        return report(rows, options.metric, options.beyond)

    all_on, sides = ("paper", BEYOND) if options.beyond else ("all on", TECHNIQUES)
    for name in options.only or []:
        need(name in sides, "--only", "%s is %s" % (name, "off with --no-%s, without --beyond" % name
                                                    if options.beyond else "one of --beyond"))
    program, words = os.path.abspath(options.train), list(extra)
    need(os.path.exists(program), program, "it is not there; make builds it")
    if options.steps:
        need("steps" not in rules, "--steps",
             "the track %s fixes them at %s" % (options.track, rules.get("steps")))
        words += ["--steps", str(options.steps)]
    sources, text = verify.program_sources(program), " ".join(words)
    for row in rows:
        for key, mine in (("track", options.track), ("sources_sha256", sources), ("words", text)):
            need(
                row[key] == mine, options.csv,
                "its runs are of %s %s, and these would be of %s; name another --csv" %
                (key, row[key] or '""', mine or '""'))
    folder = os.path.abspath(options.logs or os.path.splitext(options.csv)[0] + ".runs")
    began = time.monotonic()

    def side_flags(name, rate):
        flags = (BEYOND[name][0] if name in BEYOND else ["--no-" + name]) if name != all_on else []
        muon = ["--muon-lr", "%g" % (10 * float(rate))] if rate and name in MUONS else []
        return flags + (["--lr", rate] if rate else []) + muon

    names = [all_on] + (options.only or list(sides))
    there = {row["technique"] for row in rows}
    for name in names:
        late = [rate for rate in options.tune if name in there and "%s lr %s" % (name, rate) not in there]
        need(not late, "--tune", "%s has runs already, at a rate chosen without a trial of %s; name another --csv" %
             (name, " ".join(late)))
    runs = [(name + " lr " + rate, TUNING_SEED, name, rate) for rate in options.tune for name in names]
    runs += [(name, seed, name, None) for seed in range(1, options.seeds + 1) for name in names]
    for title, seed, name, rate in runs:
        if time.monotonic() - began > 60 * options.minutes:
            print("%g minutes are over; the same command goes on" % options.minutes)
            break
        out = os.path.join(folder, "%s-%d" % (title.replace(" ", "-"), seed))
        log = os.path.join(out, "track.log")
        os.makedirs(folder, exist_ok=True)
        lock = open(out + ".lock", "w")   # until the next run or the end
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue                      # another sitting makes it
        known = read_rows(options.csv)
        trials = {row["technique"] for row in known if row["technique"].startswith(name + " lr ")}
        if (title, str(seed)) in {(row["technique"], row["seed"]) for row in known}:
            continue
        if rate is None and len(trials) < len(options.tune):
            print("%s, seed %d: its trials are not all there yet; the same command goes on" % (name, seed))
            continue
        if not os.path.exists(log):  # else its row was not written any more
            rate = rate_of(known, name) if rate is None else rate
            command = [program, "--track", options.track, "--seed", str(seed), "--out", out] + words
            clear(out)
            off = " off" if name != all_on and not options.beyond else ""
            print("%s%s, seed %d" % (title, off, seed), flush=True)
            made = subprocess.run(command + side_flags(name, rate), cwd=verify.ROOT, stdout=subprocess.DEVNULL)
            need(made.returncode == 0, out, "the run ended with status %d" % made.returncode)
        run = verify.Log(log)
        need((run.sources_sha, run.seed) == (sources, str(seed)), log, "it is of another program or seed")
        row = {
            "technique": title,
            "seed": seed,
            "track": options.track,
            "steps": run.settings["steps"],
            "sources_sha256": sources,
            "words": text,
            "clock_seconds": run.run["clock_seconds"]
        }
        row.update({key: "%.17g" % run.number(run.scores, key) for key in verify.SCORE_KEYS})
        append(options.csv, row)
    rows = read_rows(options.csv)
    if all_on in {row["technique"] for row in rows}:
        report(rows, options.metric, options.beyond)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except verify.Refusal as refusal:
        sys.exit("error: %s" % refusal)
    except KeyboardInterrupt:
        sys.exit("\nerror: interrupted; the same command goes on")
