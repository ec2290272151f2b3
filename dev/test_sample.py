#!/usr/bin/env python3
"""Tests of ./sample from the outside: what it writes, opened by other people's tools, and what it says to
bad input.

  python3 dev/test_sample.py              needs ./sample, ./train_srdit and numpy; uses pngcheck, unzip and cc
  python3 dev/test_sample.py --sample ./sample_cu --train ./train_srdit_cu
  python3 dev/test_sample.py --gpu ./sample_emu     only: ./sample_cu, here by emulation, against ./sample

It trains its own model for a few steps; nothing outside a temporary folder is touched. The exit status tells.
"""
import argparse, base64, json, os, pty, re, select, shutil, signal, struct, subprocess, sys, tempfile, time
import zipfile, zlib
import numpy as np

signal.signal(signal.SIGINT, signal.default_int_handler)   # a shell's background job would ignore it, and so its children

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--sample", default=os.path.join(ROOT, "sample"))
parser.add_argument("--train", default=os.path.join(ROOT, "train_srdit"))
parser.add_argument("--gpu", help="compare this program's pictures with ./sample's, and test nothing else")
parser.add_argument("--bf16", action="store_true", help="--gpu computes in bf16")
options = parser.parse_args()
SAMPLE, TRAIN = os.path.abspath(options.sample), os.path.abspath(options.train)
os.environ.pop("OMP_NUM_THREADS", None)
# an error message ends the program where it stands
os.environ.setdefault("ASAN_OPTIONS", "detect_leaks=0")
# more threads than cores would wait for one another at full speed
os.environ["OMP_WAIT_POLICY"] = "passive"
TINY = ["--steps", 20, "--lr", 0.02, "--depth", 5, "--hidden-size", 32, "--num-heads", 2, "--projector-dim",
        16, "--sample-steps", 1]
failed, passed = [], 0

def check(what, good, detail=""):
    global passed
    if good:
        passed += 1
    else:
        failed.append(what)
        print("FAIL %s %s" % (what, str(detail)[-600:]))

def run(*words, program=None, **more):
    return subprocess.run([program or SAMPLE] + [str(w) for w in words], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE,
                          universal_newlines=True, **more)

def good(*words):
    r = run(*words)
    check("runs: %s" % " ".join(map(str, words)), r.returncode == 0, r.stderr)
    return r.stdout

def bad(what, pattern, *words):
    """One sentence on stderr that matches, a non-zero exit, and no new file."""
    before = set(os.listdir("."))
    r = run(*words)
    new = set(os.listdir(".")) - before
    check(what, r.returncode not in (0, -11, -6) and re.search(pattern, r.stderr) and
          r.stderr.startswith("error: ") and
          r.stderr.count("\n") == 1 and not new, (r.returncode, r.stderr, new))

def read_bytes(path):
    with open(path, "rb") as f:
        return f.read()

# ----------------------------------------------------------------------------------------- file formats

def read_safe(path):
    data = read_bytes(path)
    n = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + n])
    kinds = {"F32": "<f4", "F64": "<f8", "I32": "<i4", "U8": "u1", "I64": "<i8"}
    meta = header.pop("__metadata__")
    return meta, {k: np.frombuffer(data[8 + n:][slice(*h["data_offsets"])],
                                   kinds[h["dtype"]]).reshape(h["shape"])
                  for k, h in header.items()}

def write_safe(path, meta, tensors):
    header, offset = {"__metadata__": meta}, 0
    for k, x in tensors.items():
        header[k] = {"dtype": {"f4": "F32", "f8": "F64"}[x.dtype.str[1:]], "shape": list(x.shape),
                     "data_offsets": [offset, offset + x.nbytes]}
        offset += x.nbytes
    text = json.dumps(header).encode()
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + b"".join(x.tobytes() for x in tensors.values()))

def read_png(path):
    """Pixels [height,width,channels] and the text chunks, every checksum checked."""
    data, at, text, packed = read_bytes(path), 8, {}, b""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    while at < len(data):
        n, kind = struct.unpack(">I", data[at:at + 4])[0], data[at + 4:at + 8]
        body = data[at + 8:at + 8 + n]
        assert struct.unpack(">I", data[at + 8 + n:at + 12 + n])[0] == zlib.crc32(kind + body)
        at += 12 + n
        if kind == b"IHDR":
            width, height, depth, color = struct.unpack(">IIBB", body[:10])
        if kind == b"tEXt":
            key, value = body.split(b"\0")
            text[key.decode()] = value.decode()
        if kind == b"IDAT":
            packed += body
    channels = {0: 1, 2: 3}[color]
    raw = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(height, 1 + width * channels)
    assert set(raw[:, 0]) <= {0, 2} and depth == 8
    rows, above = [], np.zeros(width * channels, np.uint8)
    for row in raw:
        above = row[1:] + (above if row[0] == 2 else 0)
        rows.append(above.astype(np.uint8))
    return np.array(rows).reshape(height, width, channels), text

def read_npz(path):
    with zipfile.ZipFile(path) as z:
        assert z.testzip() is None and z.namelist() == ["arr_0.npy"]
        assert z.infolist()[0].compress_type == zipfile.ZIP_STORED
    return np.load(path)["arr_0"]

def in_terminal(words, **environment):
    """What the program writes to a terminal."""
    env = {k: v for k, v in os.environ.items() if k not in ("TMUX", "KITTY_WINDOW_ID", "TERM_PROGRAM",
                                                            "LC_TERMINAL")}
    pid, fd = pty.fork()
    if pid == 0:
        os.execve(SAMPLE, [SAMPLE] + [str(w) for w in words], dict(env, TERM="xterm", **environment))
    out = b""
    while True:
        try:
            piece = os.read(fd, 65536) if select.select([fd], [], [], 60)[0] else b""
        except OSError:
            break
        if not piece:
            break
        out += piece
    check("runs in a terminal: %s" % " ".join(map(str, words)), os.waitpid(pid, 0)[1] == 0, out)
    os.close(fd)
    return out.replace(b"\r\n", b"\n")

# ------------------------------------------------------------------------------------------------ tests

def test_pictures(C):
    out = good(C, "--num", 23, "--steps", 6, "--out", "g.png", "--npz", "g.npz", "--latents", "g.safetensors",
               "--separate", "sep/arate",
               "--seed", 77, "--columns", 5, "--scale", 3)
    x, (meta, latents) = read_npz("g.npz"), read_safe("g.safetensors")
    check("npz is uint8 N x H x W x 3", x.dtype == np.uint8 and x.shape == (23, 8, 8, 3))
    check("grey has three equal channels", (x[..., :1] == x).all())
    # truncates
    want = np.clip(np.float64(255) * (latents["latents"].astype("f8") + 1) / 2, 0, 255).astype(np.uint8)
    check("pixels are the latents, truncated", (want[:, 0] != x[..., 0]).mean() < 1e-3 and
          abs(want[:, 0].astype(int) - x[..., 0]).max() <= 1)
    check("labels are balanced", list(latents["labels"]) == [i % 10 for i in range(23)])
    check("latents say what space they are in", meta["space"] == "model" and
          meta["latent_scale"] == "0.125" and meta["latent_offset"] == "-1")
    g, text = read_png("g.png")
    gap = 2
    cells = [g[gap + i // 5 * (24 + gap):, gap + i % 5 * (24 + gap):][:24, :24, 0] for i in range(23)]
    check("the grid shows the same pixels, enlarged",
          all((c == np.kron(p[..., 0], np.ones((3, 3)))).all() for c, p in zip(cells, x)))
    check("the grid's size", g.shape == (gap + 5 * (24 + gap), gap + 5 * (24 + gap), 1))
    settings = ("seed", "steps", "sampler", "cfg", "cls_cfg", "guidance_low", "guidance_high", "path_drop",
                "classes", "num", "weights",
                "checkpoint", "decoder")
    check("the PNG stores seed and settings", all(k in text for k in settings) and text["seed"] == "77", text)
    check("the terminal has the seed", "seed 77" in out)
    files = sorted(os.listdir("sep/arate"))
    check("one PNG each", files == ["%06d.png" % i for i in range(23)])
    one, text = read_png("sep/arate/000012.png")
    check("which knows its class and place", (one[2::3, 2::3, 0] == x[12, ..., 0]).all() and
          text["class"] == "2" and text["index"] == "12")
    if shutil.which("pngcheck"):
        check("pngcheck", run("-q", "g.png", "sep/arate/000000.png", program="pngcheck").returncode == 0)
    else:
        print("note: no pngcheck here")
    if shutil.which("unzip"):
        check("unzip -t", run("-t", "g.npz", program="unzip").returncode == 0)
    good(C, "--num", 4, "--steps", 1)
    check("pictures.png beside the checkpoint is the default",
          os.path.exists(os.path.join(os.path.dirname(C), "pictures.png")))
    good(C, "--num", 9, "--steps", 2, "--classes", "1,4,7-9", "--latents", "c.safetensors")
    check("a list of classes", list(read_safe("c.safetensors")[1]["labels"]) == [1, 4, 7, 8, 9, 1, 4, 7, 8])
    good(C, "--num", 3, "--steps", 2, "--class", "none", "--latents", "n.safetensors")
    check("no class", list(read_safe("n.safetensors")[1]["labels"]) == [10] * 3)
    good(C, "--num", 400, "--steps", 1, "--random-classes", "--latents", "r.safetensors")
    check("random classes", set(read_safe("r.safetensors")[1]["labels"]) == set(range(10)))

def test_same_bits(C):
    for name, words in (("em", ["--cfg", 1.5, "--cls-cfg", 2, "--guidance-high", 0.8]),
                        ("heun", ["--sampler", "heun", "--random-classes"]),
                        ("euler", ["--sampler", "euler", "--cfg", 2, "--no-path-drop", "--raw"])):
        seen = set()
        for batch in (1, 7, 64):
            for threads in (1, 2, 3):
                good(C, "--num", 20, "--steps", 4, "--batch", batch, "--threads", threads, "--npz", "b.npz",
                     "--latents", "b.safetensors",
                     "--out", "b.png", *words)
                seen.add(read_bytes("b.npz") + read_bytes("b.safetensors") + read_bytes("b.png"))
        check("%s: the same bits for every batch and number of threads" % name, len(seen) == 1)
    pictures = {}
    for name, words in (("em", []), ("euler", ["--sampler", "euler"]), ("heun", ["--sampler", "heun"]),
                        ("ab2", ["--sampler", "ab2"]),
                        ("cfg", ["--cfg", 3]),
                        ("cls", ["--cfg", 3, "--cls-cfg", 3]), ("whole", ["--cfg", 3, "--no-path-drop"]),
                        ("seed", ["--seed", 2]),
                        ("raw", ["--raw"]), ("late", ["--cfg", 3, "--guidance-high", 0.5]),
                        ("steps", ["--steps", 5])):
        steps = [] if "--steps" in words else ["--steps", 4]
        good(C, "--num", 5, "--latents", "d.safetensors", *steps, *words)
        pictures[name] = read_safe("d.safetensors")[1]["latents"].tobytes()
    check("every option changes the pictures", len(set(pictures.values())) == len(pictures))

def test_resume(C):
    words = [C, "--num", 2000, "--steps", 4, "--batch", 32, "--npz", "k.npz"]
    good(*words)
    whole = read_bytes("k.npz")
    os.remove("k.npz")
    stops = 0
    for stop in (300, 700, 1200):                       # pictures
        p = subprocess.Popen([SAMPLE] + list(map(str, words)), stdout=subprocess.DEVNULL)
        while p.poll() is None and (not os.path.exists("k.npz.srdit.part") or
                                    os.path.getsize("k.npz.srdit.part") < 192 * stop):
            time.sleep(0.002)
        p.send_signal(signal.SIGKILL)
        p.wait()
        stops += os.path.exists("k.npz.srdit.part")
        check("nothing has the final name after kill -9", not os.path.exists("k.npz"))
    check("kill -9 left a part", stops > 0)
    os.truncate("k.npz.srdit.part", os.path.getsize("k.npz.srdit.part") - 100)          # half a picture
    bad("other settings are refused", "other settings: seed: 1 there, seed: 2 now", *words, "--seed", 2)
    bad("another number is refused", "other settings", *(words[:2] + [1999] + words[3:]))
    bad("other weights are refused", "other settings", *words, "--raw")
    bad("what cannot go on does not erase it", "interrupted run left", *words, "--show")
    holder = subprocess.Popen([SAMPLE] + [str(w) for w in words], stdout=subprocess.DEVNULL)
    time.sleep(0.3)
    if holder.poll() is None:
        bad("two runs at once are refused", "another program is writing", *words)
        holder.send_signal(signal.SIGINT)
        check("Ctrl-C ends with 130", holder.wait() == 130 and os.path.exists("k.npz.srdit.part"))
    out = good(*words)
    check("it goes on", "already" in out)
    check("resumed bytes are the same", read_bytes("k.npz") == whole and not os.path.exists("k.npz.srdit.part"))
    at = struct.unpack("<I", whole[-6:-2])[0]             # of the directory: all pictures stand before it
    for end, crc in ((at, whole[14:18]), (at + 10, whole[14:18]), (len(whole), whole[14:18])):
        with open("k.npz.srdit.part", "wb") as f:        # killed while it was ended
            f.write(whole[:14] + crc + whole[18:end])
        out = good(*words)
        check("all pictures are there already", "first 2000 pictures already" in out)
        check("and the end is written anew", read_bytes("k.npz") == whole)
    with open("other.npz.srdit.part", "wb") as f:
        f.write(b"my precious file" * 40)
    bad("a stranger's .part is refused", "not a part", C, "--num", 3, "--steps", 1, "--npz", "other.npz")
    check("and untouched", read_bytes("other.npz.srdit.part") == b"my precious file" * 40)
    os.remove("other.npz.srdit.part")

def test_zip64():
    if not shutil.which("cc"):
        print("note: no cc here, zip64 is not tested")
        return
    with open("wide.c", "w") as f:
        f.write('#include "%s/dev/lib/npz.h"\n'
                'int main(void) { static Npz z; uint8_t p[12]; npz_wide_from = 100;\n'
                '  npz_open(&z, "wide.npz", 5, 2, 2, "seed: 1\\n");\n'
                '  for (int i = 0; i < 5; i++) { memset(p, i, 12); npz_put(&z, p, 1, 3); }\n'
                '  npz_close(&z); return 0; }\n' % ROOT)
    r = run("-std=gnu11", "-O1", "wide.c", "-o", "wide", "-lm", program="cc")
    check("zip64 program builds", r.returncode == 0, r.stderr)
    check("zip64 program runs", run(program="./wide").returncode == 0)
    x = read_npz("wide.npz")
    check("zip64 opens", x.shape == (5, 2, 2, 3) and (x[:, 0, 0, 0] == range(5)).all())
    if shutil.which("unzip"):
        check("unzip -t of zip64", run("-t", "wide.npz", program="unzip").returncode == 0)

def test_two_at_once(C):
    for flag, name in (("--latents", "two.safetensors"), ("--out", "two.png"), ("--separate", "two")):
        first = subprocess.Popen([SAMPLE, C, "--num", "300", "--steps", "400", flag, name],
                                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not os.path.exists(name + ".srdit.part") and not os.path.exists(name):
            time.sleep(0.01)
        time.sleep(0.05)
        bad("two at once: %s" % flag, "another program is writing", C, "--num", 3, "--steps", 1, flag, name)
        first.send_signal(signal.SIGINT)
        check("the first goes on until Ctrl-C", first.wait() == 130)
        check("and leaves no part", not os.path.exists(name + ".srdit.part"))
    if os.path.exists("/dev/full"):
        with open("/dev/full", "w") as full:
            for words in ([C, "--num", "1", "--steps", "1", "--show"], ["--help"]):
                r = subprocess.run([SAMPLE] + words, stdout=full, stderr=subprocess.PIPE, text=True)
                check("standard output that is full: %s" % words[-1],
                      r.returncode == 1 and "No space left" in r.stderr)
    os.symlink("nothing", "dangling.png")
    bad("a link to nothing", "link to nothing", C, "--num", 1, "--steps", 1, "--out", "dangling.png")
    os.symlink("pointed.png", "link.png")
    open("pointed.png", "w").close()
    good(C, "--num", 1, "--steps", 1, "--out", "link.png")
    check("a link stays one", os.path.islink("link.png") and read_bytes("pointed.png")[1:4] == b"PNG")

def test_full_disk(C):
    for flag, name in (("--out", "full.png"), ("--npz", "full.npz"), ("--latents", "full.safetensors")):
        os.symlink("/dev/full", name + ".srdit.part")
        r = run(C, "--num", 200, "--steps", 1, flag, name)
        check("a full disk: %s" % flag, r.returncode == 1 and "No space left" in r.stderr and
              r.stderr.count("\n") == 1 and
              not os.path.exists(name), (r.returncode, r.stderr))
        if os.path.lexists(name + ".srdit.part"):
            os.remove(name + ".srdit.part")

def test_hostile(C):
    whole, (meta, t) = read_bytes(C), read_safe(C)
    n = struct.unpack("<Q", whole[:8])[0]
    for size in (0, 3, 8, 100, 8 + n - 1, 8 + n, 8 + n + 1000, len(whole) - 1):
        with open("h.safetensors", "wb") as f:
            f.write(whole[:size])
        bad("truncated to %d bytes" % size, "h.safetensors", "h.safetensors")
    name = "ema.blocks.3.mlp.fc1.weight"
    for value in (np.nan, np.inf):
        x = t[name].copy()
        x[1, 2] = value
        write_safe("h.safetensors", meta, dict(t, **{name: x}))
        bad("%s in the weights" % value, "blocks.3.mlp.fc1.weight holds a number that is not finite",
            "h.safetensors")
    good("h.safetensors", "--raw", "--num", 1, "--steps", 1)                   # which does not read the EMA
    write_safe("h.safetensors", meta, dict(t, **{name: np.ascontiguousarray(t[name].T)}))
    bad("a transposed tensor", "shape", "h.safetensors")
    write_safe("h.safetensors", meta, {k: x for k, x in t.items() if k != name})
    bad("a missing tensor", "missing", "h.safetensors")
    for key, value, pattern in (("depth", "9", "missing"), ("hidden_size", "40", "shape"),
                                ("format", "x", "not a checkpoint"), ("depth", "1e9", "depth"),
                                ("num_heads", "0", "num_heads"), ("num_heads", "3", "multiple"),
                                ("patch_size", "3", "divide"), ("depth", "nan", "depth"),
                                ("latent_scale", "0", "latent_scale"),
                                ("latent_scale", "abc", "latent_scale"), ("decoder", "vqgan", "vqgan"),
                                ("mlp_ratio", "0.011", "shape|hidden"),
                                ("input_size", "4096", "memory|shape|allocated")):
        if key == "input_size":
            # no tensor depends on it: it is a larger picture
            continue
        write_safe("h.safetensors", dict(meta, **{key: value}), t)
        bad("%s %s" % (key, value), pattern, "h.safetensors")
    big = {k: x * np.float32(1e30) for k, x in t.items()}
    write_safe("h.safetensors", meta, big)
    bad("weights that overflow", "finite", "h.safetensors", "--num", 2, "--steps", 2)
    os.remove("h.safetensors")

def test_bad_input(C):
    os.mkdir("folder")
    open("file", "w").close()
    for words, pattern in (
            (["nothing.safetensors"], "cannot be opened"),
            (["folder"], "not a file"), ([C, C], "are given; one is enough"),
            ([C, "--class", "10"], "no class 10; there are 0 to 9"), ([C, "--class", "-1"], "list"),
            ([C, "--class", "x"], "list"),
            ([C, "--class", "1,2"], "more than one"), ([C, "--classes", "3-12"], "no class 12"),
            ([C, "--classes", "5-2"], "backwards"),
            ([C, "--classes", "1,,2"], "list"), ([C, "--classes", "1,"], "list"),
            ([C, "--classes", ""], "list"),
            ([C, "--classes", "99999999999999999999"], "no class"),
            ([C, "--classes", "1", "--random-classes"], "exclude"),
            ([C, "--sampler", "ddim"], "no such sampler; there are em, euler, heun and ab2"),
            ([C, "--latents", C], "own input"), ([C, "--npz", C], "own input"),
            ([C, "--steps", "0"], "--steps"),
            ([C, "--steps", "2.5"], "whole"), ([C, "--steps", "ten"], "not a number"),
            ([C, "--num", "-3"], "--num is -3"), ([C, "--num", "1.5"], "--num is 1.5"),
            ([C, "--num"], "needs a value"), ([C, "--cfg", "nan"], "--cfg"), ([C, "--cfg", "-1"], "--cfg"),
            ([C, "--seed", "-1"], "--seed"),
            ([C, "--cfg", "2", "--guidance-low", "0.9", "--guidance-high", "0.1"], "above"),
            ([C, "--num", "1", "--npz", "w", "--scale", "3"], "for PNGs and the terminal"),
            ([C, "--cfg", "0.5"], "--cfg is 0.5"), ([C, "--cls-cfg", "3"], "without guidance"),
            ([C, "--guidance-low", "0.1"], "without guidance"),
            ([C, "--no-path-drop"], "without guidance"), ([C, "--steps", "0x4"], "not a number"),
            ([C, "--out", "--show"], "--out needs a value"),
            ([C, "--num", "1", "--out", "x.png", "--latents", "x.png"], "a file each"),
            ([C, "--num", "1", "--npz", "./x.npz", "--latents", "x.npz"], "a file each"),
            ([C, "--guidance-high", "2"], "guidance-high"),
            ([C, "--batch", "-1"], "--batch"), ([C, "--threads", "99999"], "--threads"),
            ([C, "--scale", "-1"], "--scale"),
            ([C, "--stepps", "3"], "did you mean --steps"), ([C, "--clases", "3"], "did you mean --class"),
            ([C, "-x"], "unknown argument -x"),
            ([C, "--decoder", "file"], "pixels"), ([C, "--out", "nowhere/x.png"], "no folder nowhere"),
            ([C, "--out", "file/x.png"], "no folder"),
            ([C, "--out", "folder"], "not a file"), ([C, "--out", "x.jpg"], "end in .png"),
            ([C, "--out", ""], "empty"),
            ([C, "--out", "/dev/full"], "not a file"), ([C, "--npz", "nowhere/x.npz"], "no folder"),
            ([C, "--latents", "nowhere/x"], "no folder"),
            ([C, "--separate", "file"], "file"), ([C, "--separate", "file/sub"], "file"),
            ([C, "--num", "9999999", "--out", "x.png"], "too many")):
        bad("bad input: %s" % " ".join(["./sample"] + ["CKPT" if w == C else w for w in words]), pattern,
            *words)
    for flag in ("--out", "--npz", "--latents"):
        with open("letter.png", "w") as f:
            f.write("dear diary")
        bad("a file of another kind: %s" % flag, "of another kind", C, "--num", 1, flag, "letter.png")
        check("is untouched", read_bytes("letter.png") == b"dear diary")
    os.remove("letter.png")
    if os.geteuid():
        os.mkdir("locked", 0o500)
        bad("a folder that is not ours", "cannot be written", C, "--out", "locked/x.png")

def latent_checkpoint(C):
    """l.safetensors, a checkpoint of 4-channel latents, and invae.safetensors, the decoder of a reference file,
    whose metadata and tensors are returned."""
    ref_meta, ref = read_safe(os.path.join(ROOT, "dev", "ref", "invae_16x.safetensors"))
    d = {k[len("param."):]: x for k, x in ref.items() if k.startswith("param.")}
    keep = {k: ref_meta[k] for k in ("num_groups", "norm_eps", "latent_scale", "z_channels", "ch_mult", "ch",
                                     "num_res_blocks", "attn_levels")}
    write_safe("invae.safetensors", keep, d)
    meta, t = read_safe(C)
    t = dict(t)
    for prefix in ("model.", "ema."):
        t[prefix + "x_embedder.proj.weight"] = np.repeat(t[prefix + "x_embedder.proj.weight"], 4, 1)
        t[prefix + "final_layer.linear.weight"] = np.repeat(t[prefix + "final_layer.linear.weight"], 4, 0)
        t[prefix + "final_layer.linear.bias"] = np.repeat(t[prefix + "final_layer.linear.bias"], 4, 0)
    t = {k: x for k, x in t.items() if not k.startswith("adam")}
    meta = dict(meta, in_channels="4", decoder="invae", latent_scale="0.3099", latent_offset="0")
    write_safe("l.safetensors", meta, t)
    return keep, d

def test_decoder(C):
    keep, d = latent_checkpoint(C)
    L, D = "l.safetensors", "invae.safetensors"
    seen = set()
    for batch, threads in ((1, 1), (3, 2), (2, 3)):
        good(L, "--decoder", D, "--num", 3, "--steps", 2, "--batch", batch, "--threads", threads, "--npz",
             "i.npz", "--out", "i.png")
        seen.add(read_bytes("i.npz") + read_bytes("i.png"))
    x, (g, text) = read_npz("i.npz"), read_png("i.png")
    check("decoded pictures have the same bits for every batch and number of threads", len(seen) == 1)
    check("8 x 8 latents become 128 x 128 pictures", x.shape == (3, 128, 128, 3) and g.shape[2] == 3 and
          text["decoder"].startswith("invae"))
    check("which are pictures", x.std() > 5)
    good(L, "--num", 2, "--steps", 2, "--latents", "u.safetensors")            # needs no decoder
    bad("no decoder", "--decoder FILE", L)
    bad("no such decoder", "cannot be opened", L, "--decoder", "nothing")
    bad("a checkpoint as decoder", "not a decoder", L, "--decoder", C)
    k = "decoder.mid.attn_1.k.weight"
    for what, changed, tensors, pattern in (
            ("another latent scale", {"latent_scale": "0.18215"}, d, "do not belong together"),
            ("groups that do not divide", {"num_groups": "3"}, d, "multiple"),
            ("metadata that lie about ch_mult", {"ch_mult": "1,1,2,2,8"}, d, "metadata"),
            ("metadata that lie about blocks", {"num_res_blocks": "5"}, d, "metadata"),
            ("metadata that lie about attention", {"attn_levels": "3"}, d, "metadata"),
            ("a short ch_mult", {"ch_mult": "1,1"}, d, "metadata"),
            ("a missing tensor", {}, {k: v for k, v in d.items() if k != "decoder.up.2.block.1.norm2.bias"},
             "missing"),
            ("a wrong shape", {}, dict(d, **{k: d[k][:, :3].copy()}), "shape"),
            ("NaN", {}, dict(d, **{"decoder.conv_out.bias": d["decoder.conv_out.bias"] * np.nan}),
             "not finite"),
            ("other channels", {"z_channels": "3"},
             dict(d, **{"post_quant_conv.weight": np.zeros((3, 3, 1, 1)), "post_quant_conv.bias": np.zeros(3),
             "decoder.conv_in.weight": np.zeros((16, 3, 3, 3))}), "decodes 3 channels")):
        write_safe("w.safetensors", dict(keep, **changed), tensors)
        bad("decoder with %s" % what, pattern, L, "--decoder", "w.safetensors")
    with open("w.safetensors", "wb") as f:
        f.write(read_bytes(D)[:-9])
    bad("a truncated decoder", "w.safetensors", L, "--decoder", "w.safetensors")
    out = in_terminal([L, "--decoder", D, "--num", 1, "--steps", 3, "--show", "--show-steps", "--out",
                       "x.png"])
    check("latents are shown on the way", out.count("step 1/3".encode()) >= 1 and "\u2580".encode() in out)

def test_terminal(C):
    words = [C, "--num", 4, "--steps", 3, "--out", "t.png", "--npz", "t.npz", "--columns", 4, "--scale", 2]
    x = {}
    out = in_terminal(words + ["--show"])
    check("half blocks", out.count("\u2580".encode()) == 5 * (4 * 9 + 1), out.count("\u2580".encode()))
    check("the time left, on a terminal only", b"left" in out and " left" not in run(*words).stderr)
    out = in_terminal(words + ["--show"], KITTY_WINDOW_ID="1")
    pieces = re.findall(rb"\x1b_G([^;]*);([^\x1b]*)\x1b\\", out)
    keys = dict(p.split(b"=") for p in pieces[0][0].split(b","))
    w, h = int(keys[b"s"]), int(keys[b"v"])
    kitty = np.frombuffer(base64.b64decode(b"".join(p[1] for p in pieces)), np.uint8)
    check("Kitty", keys[b"f"] == b"24" and kitty.size == w * h * 3 and
          all(len(p[1]) <= 4096 for p in pieces) and
          [p[0].split(b",")[-1] for p in pieces] == [b"m=1"] * (len(pieces) - 1) + [b"m=0"])
    out = in_terminal(words + ["--show"], TERM_PROGRAM="iTerm.app")
    at = re.search(rb"\x1b\]1337;File=inline=1;size=(\d+):([^\a]*)\a", out)
    bmp = base64.b64decode(at.group(2))
    size, _, offset, _, bw, bh, _, bits = struct.unpack("<2xIIIIiiHH", bmp[:30])
    pixels = np.frombuffer(bmp[54:], np.uint8).reshape(-bh, -1)[:, :bw * 3].reshape(-bh, bw, 3)
    check("iTerm2", int(at.group(1)) == len(bmp) == size and offset == 54 and bits == 24 and
          (bw, -bh) == (w, h) and
          (pixels[..., ::-1] == kitty.reshape(h, w, 3)).all())
    out = in_terminal(words + ["--show-steps"])
    check("steps are drawn over one another", all(b"step %d/3" % i in out for i in (1, 2, 3)) and
          out.count(b"\x1b[6A") == 2)

def test_help():
    r = run("--help")
    with open(os.path.join(ROOT, "sample.c")) as f:
        names = re.findall(r'SAMPLE_OPTION\("([a-z_]+)"', f.read())
    flags = ["--" + name.replace("_", "-") for name in names]
    check("--help names every flag", r.returncode == 0 and len(flags) > 20 and
          all("  %s " % f in r.stdout for f in flags))
    bad("no checkpoint and no run", "which checkpoint")
    os.makedirs("out", exist_ok=True)
    shutil.copy("tiny/checkpoint.safetensors", "out/checkpoint.safetensors")
    check("without a path, the newest run's", "out/checkpoint.safetensors is the newest" in
          good("--num", 1, "--steps", 1, "--out", "newest.png") and os.path.exists("newest.png"))
    lines = [line.split() for line in r.stdout.splitlines() if "out/checkpoint.safetensors" in line]
    check("--help has examples", len(lines) >= 3)
    for line in lines:
        if "5000" not in line:
            good(*line[1:])
    check("that write what they say", os.path.exists("3_and_7.png"))

def test_gpu(C):
    """What --gpu draws and decodes against ./sample: latents to rounding, bytes to a step; then the promises that
    it makes by itself: any batch, going on after a kill."""
    latent_checkpoint(C)
    gpu = os.path.join(ROOT, options.gpu) if not os.path.isabs(options.gpu) else options.gpu
    few = ["--num", 5, "--steps", 4, "--seed", 3]
    most = 0.05 if options.bf16 else 1e-4
    def against(what, *words):
        for program, name in ((SAMPLE, "c"), (gpu, "g")):
            r = run(*words, "--latents", name + ".safetensors", program=program)
            check("%s: %s runs" % (what, name), r.returncode == 0, r.stderr)
        (_, c), (_, g) = read_safe("c.safetensors"), read_safe("g.safetensors")
        off = np.linalg.norm(c["latents"] - g["latents"]) / np.linalg.norm(c["latents"])
        check("%s: latents %.1e off" % (what, off), off <= most and np.array_equal(c["labels"], g["labels"]))
        print("     %-34s %.1e" % (what, off))
    against("euler-maruyama", C, *few)
    against("guided", C, *few, "--cfg", 3, "--batch", 2)
    against("guided, cls, whole network", C, *few, "--cfg", 3, "--cls-cfg", 2, "--no-path-drop")
    against("guided in an interval", C, *few, "--cfg", 3, "--guidance-low", 0.3, "--guidance-high", 0.8)
    against("euler", C, *few, "--sampler", "euler", "--class", "none")
    against("heun, guided, random classes", C, *few, "--sampler", "heun", "--cfg", 2, "--random-classes")
    L = ["l.safetensors", "--decoder", "invae.safetensors", "--num", 3, "--steps", 3, "--cfg", 2]
    for program, name, batch in ((SAMPLE, "c", 3), (gpu, "g", 3), (gpu, "one", 1), (gpu, "two", 2)):
        r = run(*L, "--batch", batch, "--npz", name + ".npz", "--out", name + ".png", program=program)
        check("decoding: %s runs" % name, r.returncode == 0, r.stderr)
    c, g = read_npz("c.npz").astype(int), read_npz("g.npz").astype(int)
    off = np.abs(c - g)
    print("     decoded bytes: %.5f differ, by %d at most" % ((off > 0).mean(), off.max()))
    check("decoded bytes", off.max() <= (16 if options.bf16 else 1) and off.mean() <= (1 if options.bf16 else 1e-3),
          (off.max(), off.mean()))
    check("they are pictures", c.std() > 5 and g.shape == (3, 128, 128, 3))
    check("the same for every batch", read_bytes("one.npz") == read_bytes("two.npz") == read_bytes("g.npz"))
    # ended in the middle of the second picture: the same command goes on from what is whole
    p = subprocess.Popen([gpu] + [str(w) for w in L + ["--batch", 1, "--npz", "k.npz"]], stdout=subprocess.DEVNULL)
    part = "k.npz.srdit.part"
    size = 128 * 128 * 3
    while p.poll() is None and not (os.path.exists(part) and os.path.getsize(part) > size):
        time.sleep(0.002)
    p.kill()
    check("killed in time", p.wait() == -9)
    with open(part, "ab") as f:
        f.write(b"torn")
    out = run(*L, "--batch", 2, "--npz", "k.npz", program=gpu)
    check("goes on", out.returncode == 0 and "pictures already" in out.stdout, out.stdout + out.stderr)
    check("as if it had not been killed", read_bytes("k.npz") == read_bytes("g.npz"))
    r = run(*L, "--npz", "x.npz", "--batch", 1, "--seed", 4, "--out", "n/x.png", program=gpu)
    check("a missing folder is one sentence", r.returncode and r.stderr.count("\n") == 1, r.stderr)

def main():
    for program in (SAMPLE, TRAIN):
        if not os.path.exists(program):
            sys.exit("error: %s is missing; run make first" % program)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        r = run("--data", os.path.join(ROOT, "data", "digits.safetensors"), "--out", "tiny", *TINY,
                program=TRAIN)
        if r.returncode:
            sys.exit("error: training failed: " + r.stderr)
        C = "tiny/checkpoint.safetensors"
        for test in (test_gpu,) if options.gpu else (test_help, test_pictures, test_same_bits, test_resume, test_two_at_once, test_full_disk, test_hostile,
                     test_bad_input, test_decoder,
                     test_terminal):
            start = time.time()
            test(C) if test is not test_help else test()
            print("%-16s %.1f s" % (test.__name__[5:], time.time() - start))
            sys.stdout.flush()
        if not options.gpu:
            test_zip64()
        os.chdir(ROOT)
    print("%d checks passed, %d failed" % (passed, len(failed)))
    sys.exit(1 if failed else 0)

if __name__ == "__main__":
    main()
