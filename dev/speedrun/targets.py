#!/usr/bin/env python3
"""Fixes a track's target: runs the unchanged trainer, or reads runs of it; writes tracks.h.

  targets.py --run DIR -- ./train_srdit --track NAME      makes the runs that DIR does not hold yet
  targets.py LOG...                                       reads them; --write changes tracks.h

The target is the lowest value that the baseline's own runs pass at p < 0.01, rounded up to three digits;
sigma the deviation between seeds. From at least 10 runs of unchanged sources, and only where none is fixed:
a target that has been raced for does not move.
"""

import math, os, re, sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import verify
from verify import need

LEAST = 10


def target_of(scores):
    """(target, sigma) of the baseline's scores"""
    n, m, sd = len(scores), verify.mean_of(scores), verify.deviation_of(scores)
    need(m > 0, "the baseline", "its mean score, %g, is not above 0: no target is made of that" % m)
    low, high = m, m + 100 * sd + 1e-9 * m  # where the t-test's p falls to the significance
    for _ in range(200):
        middle = (low + high) / 2
        passes = verify.below(scores, middle)[0] < verify.SIGNIFICANCE
        low, high = (low, middle) if passes else (middle, high)
    unit = 10.0**(math.floor(math.log10(high)) - 2)
    target = float("%.3g" % (math.ceil(high / unit) * unit))
    return target, float("%.3g" % sd)


def write(track, target, sigma, path=os.path.join(verify.HERE, "tracks.h")):
    with open(path, encoding="utf-8") as f:
        text = f.read()
    rules = verify.rules_of(text)[track]
    need(verify.target_of(rules) == (None, None), path, "the target of %s is fixed already" % track)
    for rule, value in (("target", target), ("sigma", sigma)):
        text, count = re.subn(r'\{"%s", "%s", "[^"]*"\}' % (re.escape(track), rule),
                              '{"%s", "%s", "%.10g"}' % (track, rule, value), text)
        need(count == 1, path, "it has no line for %s of %s" % (rule, track))
    with open(path + ".part", "w", encoding="utf-8") as f:
        f.write(text)
    os.replace(path + ".part", path)


def main(argv):
    if not argv or "--help" in argv:
        print(__doc__.strip())
        return
    argv, program = (argv[:argv.index("--")], argv[argv.index("--") + 1:]) if "--" in argv else (argv, [])
    argv, base, fix, folder, paths = list(argv), "HEAD", False, None, []
    while argv:
        word = argv.pop(0)
        if word in ("--base", "--run"):
            need(argv, word, "it needs a value")
            base, folder = (argv.pop(0), folder) if word == "--base" else (base, argv.pop(0))
        elif word == "--write":
            fix = True
        else:
            need(not word.startswith("--"), word, "there is no such flag (--help)")
            paths.append(word)
    if folder:
        need("--track" in program, "--run", "what follows -- must be PROGRAM --track NAME")
        rules = verify.rule_of(program[program.index("--track") + 1])
        words = [w for w in program[1:]]
        at = words.index("--track")
        track = words[at + 1]
        del words[at:at + 2]
        command = [os.path.abspath(program[0])] + program[1:]
        seeds = verify.seeds_of(track, verify.program_sources(command[0]), " ".join(words),
                                int(rules["runs"]))
        paths = verify.make_runs(folder, ["target"], [seeds], [command])[0]
    need(paths, "targets.py", "which logs?")
    logs = [verify.Log(p) for p in paths]
    for log in logs:
        changed = verify.check_log(log, base)
        need(
            not changed, log.path,
            "its sources differ from %s in %s, and a target is measured on unchanged ones" %
            (base or "this folder", ", ".join(changed)))
    need(not logs[0].words(), logs[0].path, "its command has %s, and a target is measured with the trainer's "
         "own settings" % logs[0].words())
    rules = verify.check_entry(logs)
    need(
        len(logs) >= LEAST, logs[0].path,
        "%d runs are too few for a target; it takes at least %d" % (len(logs), LEAST))
    scores = [log.number(log.scores, rules["metric"]) for log in logs]
    target, sigma = target_of(scores)
    print("%s: %s %.5g, deviation %.3g in %d runs of %s steps: target %g, sigma %g" %
          (logs[0].track, rules["metric"], verify.mean_of(scores), verify.deviation_of(scores), len(logs),
           logs[0].settings["steps"], target, sigma))
    if fix:
        write(logs[0].track, target, sigma)
        print("tracks.h: written")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except verify.Refusal as refusal:
        sys.exit("error: %s" % refusal)
