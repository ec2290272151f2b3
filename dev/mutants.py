#!/usr/bin/env python3
"""Can the tests fail? Each mutant below is train_srdit.c, or a header of dev/lib, with one line made wrong.
It is built in a temporary folder and must be caught: by the reference files, or else by the whole test
program.

  python3 dev/mutants.py                 all; some minutes
  python3 dev/mutants.py --only RoPE     those with this text in their name
  python3 dev/mutants.py --whole         the whole test program for each: which tests catch it, all of them
  python3 dev/mutants.py --check         only whether each can still be made; a second

A mutant names the function, the text there and what takes its place. Text that is not there exactly once is
an error: the code has moved on, and the mutant must follow. Ends with status 1 if one survives. Needs gcc or
clang ($CC) and no packages.
"""
import argparse, glob, os, re, shutil, subprocess, sys, tempfile, time

MUTANTS = [   # name, function, text, replacement
    # layers, forward
    ("RMSNorm: another eps", "norm_modulate_forward", "rms_scale(xn, D, NORM_EPS)",
     "rms_scale(xn, D, (real)1e-5)"),
    ("QK-norm: eps of the other norms", "qk_norm_forward", "QK_EPS", "NORM_EPS"),
    ("QK-norm: k normed with q's weight", "qk_norm_forward", "h < H ? wq : wk", "wq"),
    ("v residual: lambda at the wrong v", "value_residual_forward",
     "lambda * first[i] + (1 - lambda) * vn[i]", "lambda * vn[i] + (1 - lambda) * first[i]"),
    ("v residual: v1 of the wrong token", "value_residual_forward", "token_of(ids, row / Tb, row % Tb, Tb)",
     "row % Tb"),
    ("RoPE: sparse tokens at their new places", "token_of", "ids ? (size_t)ids[b * Tb + t] : t", "t"),
    ("RoPE: CLS counted as a patch", "rope_turn", "cosines + (token - (size_t)cls)",
     "cosines + (token - (size_t)(cls && token > 1))"),
    ("softmax: scale of the whole width", "attention_forward", "sqrt((double)Dh)", "sqrt((double)D)"),
    ("GELU: 0.0447", None, "((real)0.044715)", "((real)0.0447)"),
    ("SiLU: sign", "silu_forward", "fast_exp(-in[i])", "fast_exp(in[i])"),
    ("adaLN: no 1 +", "norm_modulate_forward", "(1 + sc[i])", "sc[i]"),
    ("time features: 127", "time_features", "/ PAIRS)", "/ (PAIRS - 1))"),
    ("patches: rows and columns exchanged", "patchify", "i / p % p, column", "i % p, column"),
    ("unpatchify: channels first", "unpatchify_place", "channel = i % C", "channel = i / (p * p)"),
    ("product: the groups' columns mixed up", "matmul_tiled", "C + (long)lo * N + j0", "C + (long)lo * N"),
    ("product: blocks of k not added", "matmul_tiled", "add || q", "add"),
    ("product: A not turned", "matmul_tiled", "a = pa, si = kc, sk = 1", "a = pa, si = 1, sk = kc"),
    ("softmax: the row's pads count", "softmax_forward", "? 0 : -INFINITY", "? 0 : 0"),
    # layers, backward
    ("linear: bias gradient overwritten", "column_sums", "*(vec *)(sums + o) += part",
     "*(vec *)(sums + o) = part"),
    ("linear: weight gradient overwritten", "linear_backward", "O, I, N, 1, 0, 1)", "O, I, N, 1, 0, 0)"),
    ("RMSNorm backward: no mean term", "norm_modulate_backward", "- xn[i] * rn * mean", ""),
    ("RMSNorm backward: dscale of x, not x^", "norm_modulate_backward", "dsc[i] += d[i] * normed",
     "dsc[i] += d[i] * xn[i]"),
    ("CLS norm backward: no mean term", "rmsnorm_backward", "- xn[i] * r[n] * (sum / D)", ""),
    ("gate backward: gate left out", "gate_backward", "dyn[i] = d[i] * g[i]", "dyn[i] = d[i]"),
    ("GELU slope: 3 left out", "gelu_forward", "1 + 3 * x2", "1 + x2"),
    ("SiLU backward: sign", "silu_backward", "s * (1 - s)", "s * (1 + s)"),
    ("RoPE backward: turned on, not back", "rope_backward", "rope_turn(dx, -1", "rope_turn(dx, 1"),
    ("QK-norm backward: no mean term", "qk_norm_backward", "- x[i] * rh * mean", ""),
    ("v residual backward: no (1 - lambda)", "value_residual_backward", "(1 - lambda) * d[i]", "d[i]"),
    ("v residual backward: no lambda for v1", "value_residual_backward", "+= lambda * d[i]", "+= d[i]"),
    ("v residual backward: dlambda without v", "value_residual_backward", "first[i] - vn[i]", "first[i]"),
    ("v residual backward: dv1 lost at block 0", "block_backward", "c->value_residual && i == 0",
     "c->value_residual && i < 0"),
    ("softmax backward: no scale", "softmax_backward", "(scale * *(const vec *)(p + i))",
     "*(const vec *)(p + i)"),
    ("softmax backward: no sum", "softmax_backward", "(*d - sum)", "*d"),
    ("adaLN backward: condition overwritten", "block_backward", "B, D, 6 * D,\n                    1)",
     "B, D, 6 * D,\n                    0)"),
    # the network
    ("align: reads the embedding", "align_forward", "a->block[i].out", "a->embed"),
    ("path drop: g read at evaluation", "network_forward", "if (path_drop) g = NULL;",
     "if (path_drop && ids) g = NULL;"),
    ("path drop: what is aligned in g is not run", "end_of_g", "end = imax(end, align_depth(c, k));", ";"),
    ("path drop: g's alignment lost", "network_backward", "end > c->num_f ? B * Tb : kept", "kept"),
    ("align: sparse features of the wrong tokens", "align_loss", "token_of(ids, 0, t, Tb)", "t"),
    ("align: depths not averaged", "align_loss", "cosine * weight", "cosine"),
    ("align: gradient of depths not averaged", "align_loss", "(Tb * depths) * z_norm", "(Tb) * z_norm"),
    ("align: the decoder's depth without gradient", "network_backward",
     "align_backward(a->dx, dw, a, w, i, c, N);", ";"),
    ("MLP widths: all as the first", "hidden_of", "* block / imax(1, c->depth - 1)", "* 0"),
    ("mask: gradient from kept rows too", "network_backward",
     "memset(dG + (i / Tb * T + (size_t)ids[i]) * 2 * D, 0, sizeof(real) * D);", ";"),
    ("mask: kept rows' gradient lost, drop", "network_backward", "path_drop ? 0 : B * Tb", "B * Tb"),
    ("routing backward: g's part of dE lost", "network_backward", "a->d_kept[i * D + j];",
     "0 * a->d_kept[i * D + j];"),
    ("align backward: dE overwritten", "projector_backward", "D, M, 1);", "D, M, 0);"),
    ("labels backward: dropped ones forgotten", "condition_backward", "dw->label[(size_t)y[b] * D",
     "dw->label[(size_t)(y[b] % c->num_classes) * D"),
    # the loss
    ("flow: t and 1 - t exchanged", "forward_backward", "(1 - t) * batch->x[i] + t * batch->noise[i]",
     "t * batch->x[i] + (1 - t) * batch->noise[i]"),
    ("contrastive: the sample itself", "loss_and_gradients",
     "b ? v - latent :", "b ? v :"),
    ("contrastive: gradient's sign", "velocity_loss", "- cfm * 2 * d_before", "+ cfm * 2 * d_before"),
    ("CLS loss: no coefficient in gradient", "cls_loss", "coeff * 2 * d", "2 * d"),
    ("cosine: loss's sign", "align_loss", "align -= cosine", "align += cosine"),
    ("cosine: gradient's sign", "align_loss", "k = -coeff", "k = coeff"),
    ("cosine: gradient not at right angles", "align_loss", "- cosine * z[i] / z_norm", ""),
    # times and places
    ("time shift: formula", "shift_time", "(s - 1.0) * u", "(s + 1.0) * u"),
    ("time shift: not clamped", "shift_time", "t < 0 ? 0 : t > 1 ? 1 : t", "t"),
    ("positions: CLS has one", "position_of", "patch < 0 ? 0 :", "patch < -1 ? 0 :"),
    ("positions: row and column exchanged", "position_of", "k < D / 2 ? patch", "k >= D / 2 ? patch"),
    ("RoPE table: row and column exchanged", "rope_angle", "k < half ? patch", "k >= half ? patch"),
    ("kept tokens: rounded, not truncated", "kept_of", "- c->drop_ratio))", "- c->drop_ratio) + 0.5)"),
    # the optimizer
    ("clip: also scales up", "update", "clip < 1 ? clip : 1", "clip"),
    ("clip: never", "update", "clip < 1 ? clip : 1", "1"),
    ("clip: norm without 1e-6", "update", "norm + 1e-6", "norm"),
    ("Adam: first bias correction", "adamw_of", "(1 - pow(c->beta1, step))", "1"),
    ("Adam: second bias correction", "adamw_of", "sqrt(1 - pow(c->beta2, step))", "1"),
    ("Adam: eps inside the root", "adamw_update", "(real)sqrt(v) * root + eps", "(real)sqrt(v + eps) * root"),
    ("Adam: decay not decoupled", "adamw_update", "g = model->grads[i] * scale,",
     "g = model->grads[i] * scale + (1 - decay) * model->params[i],"),
    ("Adam: no weight decay", "adamw_of", "1 - c->lr * c->weight_decay", "1"),
    ("EMA: of the parameters before", "adamw_update", "one_e * p;",
     "one_e * (p + rate * m / ((real)sqrt(v) * root + eps));"),
    ("Muon: another coefficient", None, "4.7750, 2.0315};", "4.7750, 2.1315};"),
    ("Muon: no Nesterov", "muon_matrix", "G[i] = mu * buffer[i] + one_mu * g;", "G[i] = buffer[i];"),
    ("Muon: momentum not weighted", "muon_matrix", "buffer[i] = mu * buffer[i] + one_mu * g;",
     "buffer[i] = mu * buffer[i] + g;"),
    ("Muon: not turned back", "muon_matrix", "transpose(G, (long)cols, X, (long)rows, (int)cols, (int)rows)",
     "memcpy(G, X, sizeof(real) * count)"),
    ("Muon: no factor of the shape", "muon_matrix", "sqrt(fmax(1, fans))", "1"),
    ("Muon: q, k and v as one", "params_table", "OF_MUON_QKV", "OF_MUON"),
    ("Muon: no weight decay", "muon_matrix", "c->muon_lr * c->muon_weight_decay", "0"),
    ("Muon: EMA of the parameters before", "muon_matrix", "one_e * p[i];",
     "one_e * (p[i] + rate * G[i]);"),
    ("Muon: Gram form, Q the wrong way", "newton_schulz", "memcpy(Q, begins ? P : T,", "memcpy(Q, P,"),
    ("Muon: Gram form, R by P once", "newton_schulz", "matmul(R, T, P, NULL, m, m, m, 0, 0, 0);",
     "memcpy(R, T, sizeof(real) * m * m);"),
    ("immiscible: the farthest", "draw_noise", "far < least", "-far < least"),
    ("immiscible: not the neighbour's", "batch_load", "draw_noise(batch->noise_before, batch->v_before, c, seed",
     "fill_normal(batch->noise_before, latent, seed, STREAM_NOISE"),
    # the sampler
    ("sampler: last time 0.05", "sampling_times", "(0.04 - 1)", "(0.05 - 1)"),
    ("sampler: half the noise's variance", "euler_maruyama_step", "sqrt(2 * t)", "sqrt(t)"),
    ("sampler: score without x", "euler_maruyama_step", "(1 - t) * v[i] + x[i]", "(1 - t) * v[i]"),
    ("guidance: not in its interval", "guided_velocity", "t >= s->low && t <= s->high", "1"),
    ("guidance: path not dropped", "guided_velocity", "s->use_ema, s->path_drop", "s->use_ema, 0"),
    ("guidance: CLS guided like the image", "guided_velocity", "s->cls_cfg * (", "s->cfg * ("),
    # runs
    ("checkpoint: Muon's momentum not loaded", "checkpoint_block", "if (!s) continue;",
     "if (!s || (t->muon_parts && !strncmp(prefix, \"adam\", 4))) continue;"),
    ("checkpoint: second moments not loaded", "checkpoint_load", "k < 4", "k < 3"),
    ("random numbers: nine rounds", "philox", "round < 10", "round < 9"),
    ("data order: an epoch repeats samples", "permuted", "right = left ^ f", "right = left & f"),
    ("routing: one token is never kept", "draw_kept", "sample) <= last", "sample) <= last && i"),
]

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
FLAGS = ["-std=gnu11", "-O1", "-march=native", "-fno-math-errno", "-fopenmp", "-w"]

def read_sources():
    """path -> text of the files that mutants may be made of"""
    paths = ["train_srdit.c"] + sorted(glob.glob("dev/lib/*.h", root_dir=ROOT))
    return {path: open(os.path.join(ROOT, path)).read() for path in paths}

def mutate(sources, function, text, replacement):
    """Which file is changed, its text with the replacement, or what is wrong."""
    places = []                                # file, where to look for the text
    for path, source in sources.items():
        if not function:
            places += [(path, 0, len(source))] if text in source else []
        for found in re.finditer(rf"^(?:[A-Za-z_].*[ *])?{function}\([^;]*?\) \{{.*", source, re.M) if function else ():
            first = found.group()
            one_line = first.count("{") == first.count("}")
            places.append((path, found.start(), found.end() if one_line else source.index("\n}\n", found.start())))
    if len(places) != 1:
        return None, None, f"the function {function} is there {len(places)} times"
    path, start, end = places[0]
    source = sources[path]
    count = source.count(text, start, end)
    if count != 1:
        return None, None, f"\"{text}\" is there {count} times in {function or path}"
    at = source.index(text, start, end)
    return path, source[:at] + replacement + source[at + len(text):], ""

def run(command, folder, seconds):
    try:
        return subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True, errors="replace", timeout=seconds, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired as e:
        return subprocess.CompletedProcess(command, 124, (e.stdout or b"").decode(errors="replace") +
                                           f"\nno end after {seconds} s")

def compile_here(cc, folder):
    for command in ([cc, *FLAGS, "-DUSE_DOUBLE", "-c", "test_srdit.c", "-o", "double.o"],
                    [cc, *FLAGS, "-c", "test_srdit.c", "-o", "float.o"],
                    [cc, "float.o", "double.o", "-o", "test_srdit", "-fopenmp", "-lm"]):
        done = run(command, folder, 600)
        if done.returncode:
            return done.stdout
    return ""

def verdict(done):
    """What a run of the tests says: the first failed line and how many failed; None if all passed."""
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    if failed:
        worst = re.search(r"worst (\S+ at \S+)", failed[0])
        name = failed[0][5:33].strip() if not failed[0].startswith("FAIL replay") else failed[0].split()[2]
        return f"{name}{': ' + worst.group(1) if worst else ''}" + (
            f", and {len(failed) - 1} more" if len(failed) > 1 else "")
    if done.returncode:
        last = (done.stdout.strip().splitlines() or ["no output"])[-1]
        return f"status {done.returncode}: {last[:80]}"
    return None

def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--only", default="", help="mutants with this text in their name")
    parser.add_argument("--whole", action="store_true", help="the whole test program for each")
    parser.add_argument("--check", action="store_true", help="only whether each can still be made")
    parser.add_argument("--cc", default=os.environ.get("CC", "cc"))
    args = parser.parse_args()
    chosen = [m for m in MUTANTS if args.only.lower() in m[0].lower()]
    if not chosen:
        sys.exit(f"no mutant has {args.only!r} in its name")
    sources = read_sources()
    if args.check:
        errors = [f"{name}: {error}" for name, *how in chosen for error in [mutate(sources, *how)[2]] if error]
        print("\n".join(errors + [f"{len(chosen) - len(errors)} of {len(chosen)} mutants can be made"]))
        sys.exit(1 if errors else 0)
    files = sorted(glob.glob(os.path.join(ROOT, "dev", "ref", "*.safetensors")))
    begin, bad, rows = time.time(), 0, []
    with tempfile.TemporaryDirectory(prefix="srdit-mutants-") as folder:
        for path in glob.glob(os.path.join(ROOT, "*.[ch]")):
            shutil.copy(path, folder)
        os.symlink(os.path.join(ROOT, "data"), os.path.join(folder, "data"))
        os.mkdir(os.path.join(folder, "dev"))
        os.symlink(os.path.join(ROOT, "dev", "ref"), os.path.join(folder, "dev", "ref"))
        for name in ("lib", "speedrun"):
            shutil.copytree(os.path.join(ROOT, "dev", name), os.path.join(folder, "dev", name))
        for name, function, text, replacement in [("(nothing changed)", None, "", None)] + chosen:
            path, mutant, error = "train_srdit.c", sources["train_srdit.c"], ""
            if replacement is not None:
                path, mutant, error = mutate(sources, function, text, replacement)
            if error:
                caught, how = False, "NOT MADE: " + error
            else:
                with open(os.path.join(folder, path), "w") as f:
                    f.write(mutant)
                error = compile_here(args.cc, folder)
                with open(os.path.join(folder, path), "w") as f:      # whole again for the next one
                    f.write(sources[path])
                how = "NOT BUILT: " + error.strip().splitlines()[0] if error else None
                if not error and not args.whole:
                    how = verdict(run(["./test_srdit", *files], folder, 300))
                if not error and how is None and replacement is not None:
                    how = verdict(run(["./test_srdit"], folder, 1800))
                    how = how and "whole test: " + how
                caught = how is not None and not error
                how = how or "SURVIVED"
            if replacement is None:             # the tests must pass without a mutant
                if caught or error:
                    sys.exit("without a mutant: %s" % how)
                how = "passes, as it must"
            else:
                bad += not caught
            rows.append((name, how))
            print(f"{name:42s} {how}", flush=True)
    print(f"\n{time.time() - begin:.0f} s\n{len(chosen) - bad} of {len(chosen)} mutants caught")
    sys.exit(1 if bad else 0)

if __name__ == "__main__":
    main()
