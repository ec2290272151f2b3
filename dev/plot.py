#!/usr/bin/env python3
"""Draws trainings: loss, its parts and the gradient's norm, against samples seen and against time.

  python3 dev/plot.py out out-2                        folders of runs, or their log.csv
  python3 dev/plot.py runs/*/track.log --out race.png  runs of the race, with their scores as points
  python3 dev/plot.py out --rows loss norm             only these rows

A run is one colour. Rows: loss denoise cls align cfm norm score; each is drawn if a log has it. It needs
matplotlib; every run has a loss.png without it.
"""
import argparse, os, sys

COLUMNS = "step,loss,denoise,cls,align,cfm,grad_norm,lr,ms_per_step,images_per_s"
ROWS = "loss denoise cls align cfm norm score".split()
WHAT = {"loss": "loss, the sum", "denoise": "denoising", "cls": "CLS token", "align": "alignment (- cosine)",
        "cfm": "contrastive (- distance)", "norm": "gradient's norm"}


def fail(sentence):
    sys.exit("error: " + sentence)


def read_log(path, metric):
    """{row: values}, with samples and seconds so far; a track.log's score, or None; the name to show"""
    if os.path.isdir(path):
        path = os.path.join(path, "log.csv")
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            text = f.read()
    except OSError as error:
        fail("%s: cannot be read: %s" % (path, error.strerror))
    score, race = None, text.startswith("srdit-track-")
    if race:
        text = text.partition("\n[sources]\n")[0]
        found = [v for k, _, v in (s.partition(" ") for s in text.split("\n")) if k == metric]
        if not found:
            fail("%s: it has no score %s" % (path, metric))
        score = float(found[0])
        text = text.partition("\n[steps]\n")[2].partition("\n\n")[0]
    lines = text.strip().split("\n")
    if lines[0] != COLUMNS:
        fail("%s: not a log of a training: its first line is not %s" % (path, COLUMNS))
    keys, before, samples, seconds = ROWS[:6] + ["samples", "seconds"], 0, 0.0, 0.0
    run = {k: [] for k in keys}
    for i, line in enumerate(lines[1:], 2):
        try:
            step, loss, denoise, cls, align, cfm, norm, _, ms, rate = map(float, line.split(","))
        except ValueError:
            fail("%s: line %d is not one of the log: %s" % (path, i, line[:60]))
        samples += (step - before) * round(rate * ms / 1000)
        seconds += (step - before) * ms / 1000
        before = step
        for key, value in zip(keys, (loss, denoise, cls, align, cfm, norm, samples, seconds)):
            run[key].append(value)
    if not run["loss"]:
        fail("%s: it has no line yet" % path)
    return run, score, os.path.dirname(path) or path


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+", metavar="LOG")
    parser.add_argument("--out", default="curves.png")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--metric", default="frechet")
    options = parser.parse_args()
    try:
        import matplotlib
    except ImportError:
        fail("matplotlib is not here (Debian: apt-get install python3-matplotlib); a run's loss.png is "
             "drawn without")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    if any(os.path.realpath(options.out) == os.path.realpath(p) for p in options.logs):
        fail("--out %s would replace its own input" % options.out)
    runs = [read_log(path, options.metric) for path in options.logs]
    rows = [r for r in options.rows if r != "score" or any(score is not None for _, score, _ in runs)]
    if not rows:
        fail("none of these logs has a score; a track.log has")
    figure, axes = plt.subplots(len(rows), 2, squeeze=False, sharex="col", figsize=(11, 2.2 * len(rows)))
    for row, pair in zip(rows, axes):
        for axis, across in zip(pair, ("samples", "seconds")):
            for i, (run, score, name) in enumerate(runs):
                if row == "score" and score is not None:
                    axis.plot(run[across][-1], score, "o", color="C%d" % (i % 10))
                elif row != "score":
                    axis.plot(run[across], run[row], color="C%d" % (i % 10), linewidth=1, label=name)
            axis.grid(alpha=0.3)
        pair[0].set_ylabel(WHAT.get(row, options.metric))
        if row == "norm":
            pair[0].set_yscale("log"), pair[1].set_yscale("log")
    axes[-1][0].set_xlabel("samples seen")
    axes[-1][1].set_xlabel("seconds of steps")
    if axes[0][0].lines and len(runs) <= 20:
        axes[0][1].legend(fontsize="small")
    figure.tight_layout()
    try:
        figure.savefig(options.out, dpi=100)
    except (OSError, ValueError) as error:
        fail("%s: cannot be written: %s" % (options.out, error))
    print("%s: %d run%s" % (options.out, len(runs), "s" if len(runs) > 1 else ""))


if __name__ == "__main__":
    main()
