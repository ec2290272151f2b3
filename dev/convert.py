#!/usr/bin/env python3
"""Carries weights between this project and PyTorch, in both directions, bit for bit.

  python3 dev/convert.py from-pt 0400000.pt out/b1.safetensors       the reference implementation's checkpoint
                                              (model, ema, opt, args, steps), or a state_dict
  python3 dev/convert.py decoder e2e-invae-400k.pt out/invae.safetensors         what ./sample --decoder reads
  python3 dev/convert.py to-pt out/checkpoint.safetensors out/ema.pt      a state_dict for load_state_dict
  python3 dev/convert.py selftest                                    all of it, on small random models

Then  ./sample out/b1.safetensors --decoder out/invae.safetensors --class 207  makes pictures, and
./train_srdit --resume out/b1.safetensors --data ...  goes on training, AdamW's moments included.

A .pt file holds a pickle, which can run any program when it is read. PyTorch's own safe reading
(weights_only) refuses the Namespace that the reference stores, or in older releases cannot be told to let it
pass (and Debian's torch 1.13 ignores the pickle_module that it is given), so the file is read here, by an
unpickler that knows tensors and Namespace and nothing else. What it refuses to become: a reader of every
framework's files.
"""
import argparse, collections, json, math, os, pickle, re, struct, sys, zipfile

try:
    import numpy as np
    import torch
except ImportError as error:
    sys.exit("convert.py: %s; on Debian: apt-get install python3-torch, then /usr/bin/python3 %s" %
             (error, sys.argv[0]))

HERE = os.path.dirname(os.path.abspath(__file__))
FIXED = ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin")     # tables, not trained
PRESETS = {(12, 384): ("S", 6), (12, 768): ("B", 12), (24, 1024): ("L", 16), (28, 1152): ("XL", 16)}
# Names that the reference's args may have, and ours: (theirs, ours)
ARGS = (("learning_rate", "lr"), ("adam_beta1", "beta1"), ("adam_beta2", "beta2"), ("adam_epsilon", "eps"),
        ("adam_weight_decay", "weight_decay"), ("max_grad_norm", "max_grad_norm"),
        ("proj_coeff", "align_coeff"),
        ("cfm_coeff", "cfm_coeff"), ("cls", "cls_coeff"), ("cfg_prob", "class_dropout_prob"),
        ("path_drop_prob", "path_drop_prob"), ("max_train_steps", "steps"), ("batch_size", "batch"))

def fail(text):
    sys.exit("error: " + text)

# ------------------------------------------------------------------------------------------------ safetensors

ST = {torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16",
      torch.int64: "I64"}
NUMPY = {"F32": "<f4", "F64": "<f8", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U8": "u1"}

def write_safetensors(path, meta, tensors):
    """Writes beside the name and renames, so that a crash leaves no half file."""
    header, offset = {"__metadata__": {k: str(v) for k, v in meta.items()}}, 0
    for name, x in tensors.items():
        end = offset + x.numel() * x.element_size()
        header[name] = {"dtype": ST[x.dtype], "shape": list(x.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path + ".part", "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for x in tensors.values():
            x = x.detach().cpu().contiguous()
            x = x.view(torch.int16) if x.dtype == torch.bfloat16 else x     # numpy has no bfloat16
            f.write(x.numpy().tobytes())
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".part", path)

def read_safetensors(path):
    with open(path, "rb") as f:
        start = f.read(8)
        n = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= n <= 100000000 or n > os.path.getsize(path) - 8:
            fail("%s is not a safetensors file" % path)
        try:
            header = json.loads(f.read(n))
        except ValueError:
            fail("%s is not a safetensors file" % path)
        data, out = f.read(), collections.OrderedDict()
    try:
        meta = header.pop("__metadata__", {})
        for name, h in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            raw = data[slice(*h["data_offsets"])]
            if h["dtype"] == "BF16":
                x = torch.from_numpy(np.frombuffer(raw, "<i2").copy()).view(torch.bfloat16)
            elif h["dtype"] in NUMPY:
                x = torch.from_numpy(np.frombuffer(raw, NUMPY[h["dtype"]]).copy())
            else:
                fail("%s: tensor %s: dtype %s is not known here" % (path, name, h["dtype"]))
            out[name] = x.reshape(h["shape"])
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):
        fail("%s: its header is not that of a whole safetensors file" % path)
    return meta, out

# ------------------------------------------------------------------------ reading a .pt without running it

STORAGES = {"FloatStorage": ("<f4", torch.float32), "DoubleStorage": ("<f8", torch.float64),
            "HalfStorage": ("<f2", torch.float16), "BFloat16Storage": ("<i2", torch.bfloat16),
            "LongStorage": ("<i8", torch.int64), "IntStorage": ("<i4", torch.int32),
            "ShortStorage": ("<i2", torch.int16),
            "CharStorage": ("i1", torch.int8), "ByteStorage": ("u1", torch.uint8),
            "BoolStorage": ("?", torch.bool)}

def tensor_of(storage, offset, size, stride, *_):       # stands for torch._utils._rebuild_tensor_v2
    return storage.as_strided(size, stride, offset).clone()

class Unpickler(pickle.Unpickler):
    """Knows how tensors are put together, and Namespace; whatever else a pickle asks for is refused."""
    ALLOWED = {("collections", "OrderedDict"): collections.OrderedDict,
               ("argparse", "Namespace"): argparse.Namespace,
               ("torch", "Size"): torch.Size, ("torch._utils", "_rebuild_tensor_v2"): tensor_of,
               ("torch._utils", "_rebuild_parameter"): lambda data, *_: data}

    def __init__(self, structure, numbers):             # numbers(key) gives a storage's bytes
        super().__init__(structure, encoding="utf-8")
        self.numbers, self.storages = numbers, {}

    def find_class(self, module, name):
        if module == "torch" and name in STORAGES:
            return name
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError("it asks for %s.%s, which is no part of weights" % (module, name))
        return self.ALLOWED[module, name]

    def persistent_load(self, reference):               # ("storage", type, key, device, elements)
        what, kind, key = reference[:3]
        if what != "storage" or kind not in STORAGES:
            raise pickle.UnpicklingError("it refers to %s %s" % (what, kind))
        if key not in self.storages:
            numpy, dtype = STORAGES[kind]
            array = torch.from_numpy(np.frombuffer(self.numbers(key, reference), numpy).copy())
            self.storages[key] = array.view(dtype) if dtype == torch.bfloat16 else array
        return self.storages[key]

MAGIC = 0x1950a86a20f9469cfc6c          # what files from before PyTorch 1.6 begin with

def load_old(path):
    """A .pt file from before PyTorch 1.6: five pickles (a magic number, a version, the machine, the
    structure, the storages' keys), then each storage, its length first. The structure is read twice, since it
    stands before the numbers that its tensors are cut from: first with zeros, to learn each storage's type,
    then in earnest."""
    with open(path, "rb") as f:
        def plain():                    # a pickle of numbers, text, lists: nothing in it refers to anything
            return Unpickler(f, None).load()
        if f.read(2) != b"\x80\x02":
            raise zipfile.BadZipFile
        f.seek(0)
        if plain() != MAGIC:
            raise zipfile.BadZipFile
        if plain() != 1001 or not plain().get("little_endian"):
            fail("%s: its version is not known here, or a big-endian machine wrote it" % path)
        at, widths, contents = f.tell(), {}, {}
        def zeros(key, reference):
            if len(reference) > 5 and reference[5] is not None:
                raise pickle.UnpicklingError("its storages are views, which old files seldom are")
            widths[key] = np.dtype(STORAGES[reference[1]][0]).itemsize
            if not 0 <= reference[4] * widths[key] <= os.path.getsize(path):
                raise pickle.UnpicklingError("a storage is longer than the file")
            return bytes(reference[4] * widths[key])
        Unpickler(f, zeros).load()
        for key in plain():
            length = struct.unpack("<q", f.read(8))[0]
            contents[key] = f.read(length * widths[key]) if length >= 0 else b""
            if length < 0 or len(contents[key]) != length * widths[key]:
                fail("%s is truncated: it ends inside a storage" % path)
        f.seek(at)
        return Unpickler(f, lambda key, _: contents[key]).load()

def load_pt(path):
    """A .pt file since PyTorch 1.6: a zip archive of data.pkl, the structure, and data/0 ..., the numbers. An
    older one, as the FID Inception's: see load_old."""
    try:
        if os.path.isfile(path) and not zipfile.is_zipfile(path):
            return load_old(path)
        with zipfile.ZipFile(path) as archive:
            folder = [n for n in archive.namelist() if n.endswith("data.pkl")][0][:-len("data.pkl")]
            order = folder + "byteorder"
            if order in archive.namelist() and archive.read(order) != b"little":
                fail("%s was written on a big-endian machine" % path)
            return Unpickler(archive.open(folder + "data.pkl"),
                             lambda key, _: archive.read(folder + "data/" + key)).load()
    except zipfile.BadZipFile:
        fail("%s is not a PyTorch file, or a truncated one" % path)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError,
            TypeError, AttributeError, UnicodeDecodeError, struct.error) as error:
        fail("%s cannot be read: %s" % (path,
                                        str(error).splitlines()[0] if str(error) else type(error).__name__))

def clean(state, path):
    """The tensors of a state_dict, without the prefixes that wrappers put before names."""
    out = collections.OrderedDict()
    for name, x in state.items():
        while name.startswith(("module.", "_orig_mod.")):
            name = name.split(".", 1)[1]
        if not isinstance(x, torch.Tensor):
            fail("%s: %s is not a tensor: not an SR-DiT checkpoint" % (path, name))
        out[name] = x
    return out

# ---------------------------------------------------------------------------------- what the shapes say

def config_of(state, args, options, path):
    """Our metadata from the tensors' shapes; what no shape tells comes from args, flags or the paper."""
    def shape(name):
        if name not in state:
            fail("%s: tensor %s is missing: not an SR-DiT checkpoint" % (path, name))
        return tuple(state[name].shape)
    D, C, p, _ = shape("x_embedder.proj.weight")
    depth = 1 + max((int(m.group(1)) for m in (re.match(r"blocks\.(\d+)\.", n) for n in state) if m),
                    default=-1)
    on = lambda name: int(name in state)
    c = collections.OrderedDict(depth=depth, hidden_size=D, patch_size=p, in_channels=C)
    if on("blocks.0.attn.q_norm.weight"):
        c["num_heads"] = D // shape("blocks.0.attn.q_norm.weight")[0]
    elif on("feat_rope.freqs_cos"):
        c["num_heads"] = D // shape("feat_rope.freqs_cos")[1]
    elif (depth, D) in PRESETS:
        c["num_heads"] = PRESETS[depth, D][1]
    else:
        fail("%s: no tensor tells the number of heads" % path)
    cls = on("cls_projectors2.weight")
    patches = shape("pos_embed")[1] - cls if on("pos_embed") else shape("feat_rope.freqs_cos")[0]
    side = math.isqrt(patches)
    c["input_size"] = side * p
    c["num_classes"] = shape("y_embedder.embedding_table.weight")[0] - 1
    if cls:
        c["z_dim"] = shape("cls_projectors2.weight")[1]
    if on("projectors.0.0.weight"):
        c["projector_dim"], c["z_dim"] = shape("projectors.0.0.weight")[0], shape("projectors.0.4.weight")[0]
    c["num_f"], c["num_h"] = options.num_f, options.num_h
    c["mlp_ratio"] = repr(shape("blocks.0.mlp.fc1.weight")[0] / D)
    c["cls"], c["align"] = cls, on("projectors.0.0.weight")
    c["qk_norm"] = on("blocks.0.attn.q_norm.weight")
    c["value_residual"] = on("blocks.1.attn.v1_lambda") if depth > 1 else 1
    c["rope"] = on("feat_rope.freqs_cos")
    c["steps"], c["batch"], c["accum"], c["seed"] = 400000, 256, 1, 1
    for theirs, ours in ARGS:
        value = getattr(args, theirs, None)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            c[ours] = repr(value)
    size, heads = PRESETS.get((depth, D), ("", 0))
    c["model"] = "%s/%d" % (size, p) if heads == c["num_heads"] else "custom"
    kind = options.decoder or ("invae" if C == 32 else "pixels")
    scale = options.latent_scale or ("0.3099" if kind == "invae" else "1")
    c["decoder"], c["latent_scale"], c["latent_offset"] = kind, scale, "0"
    if options.data_name:
        c["data"] = options.data_name
    return c

def sincos(D, side, cls):
    """pos_embed [1,T,D] as the trainer makes it: [sin, cos] of the column, then of the row."""
    w = 10000.0 ** (-np.arange(D // 4) / (D / 4))
    half = np.concatenate([np.sin(np.arange(side)[:, None] * w), np.cos(np.arange(side)[:, None] * w)], 1)
    r, c = np.divmod(np.arange(side * side), side)
    table = np.concatenate([np.zeros((cls, D)), np.concatenate([half[c], half[r]], 1)])
    return torch.from_numpy(table[None].astype("f4"))

def rope(Dh, side):
    j = np.arange(Dh // 2) // 2
    w = 10000.0 ** (-2.0 * j / (Dh // 2))
    r, c = np.divmod(np.arange(side * side), side)
    angle = np.concatenate([r[:, None] * w, c[:, None] * w], 1)
    return torch.from_numpy(np.cos(angle).astype("f4")), torch.from_numpy(np.sin(angle).astype("f4"))

# ----------------------------------------------------------------------------------------- the commands

def from_pt(options):
    """The reference's checkpoint -> ours. A bare state_dict becomes an export: weights to sample from."""
    whole = load_pt(options.input)
    if not isinstance(whole, dict):
        fail("%s holds no dictionary" % options.input)
    bare = "ema" not in whole
    model = clean(whole.get("model", whole) if bare else whole["model"], options.input)
    config = config_of(model, whole.get("args"), options, options.input)
    if bare:
        meta = dict(config, format="srdit-export-1", step=0)
        write_safetensors(options.output, meta, {n: x.float() for n, x in model.items()})
        print("%s: %d tensors, of one set of weights" % (options.output, len(model)))
        return
    ema, step = clean(whole["ema"], options.input), int(whole.get("steps", 0))
    names = [n for n in model if n not in FIXED]
    moments = {"adam.m.": {}, "adam.v.": {}}
    opt = whole.get("opt")
    if opt:
        # AdamW numbers parameters in the order of model.parameters(): that of the state_dict without buffers
        count = sum(len(g["params"]) for g in opt["param_groups"])
        order = [n for n in model if not n.startswith("feat_rope.")]
        # pos_embed is counted where it is a frozen parameter
        order = order if len(order) == count else names
        if len(order) != count:
            fail("%s: AdamW knows %d parameters, but the model has %d" % (options.input, count, len(names)))
        for i, name in enumerate(order):
            state = opt["state"].get(i)
            if state is None or name in FIXED:
                continue
            for prefix, key in (("adam.m.", "exp_avg"), ("adam.v.", "exp_avg_sq")):
                if state[key].shape != model[name].shape:
                    fail("%s: AdamW's %s of %s has another shape" % (options.input, key, name))
                moments[prefix][name] = state[key]
    tensors = collections.OrderedDict()
    for prefix, source in (("model.", model), ("ema.", ema), ("adam.m.", moments["adam.m."]),
                           ("adam.v.", moments["adam.v."])):
        for name in names:
            if prefix == "ema." and (name not in ema or ema[name].shape != model[name].shape):
                fail("%s: the moving average of %s is missing or has another shape" % (options.input, name))
            tensors[prefix + name] = source.get(name, torch.zeros_like(model[name])).float()
    for name in FIXED:                   # the trainer makes its own; these are for the way back
        if name in ema:
            tensors["ema." + name], tensors["model." + name] = ema[name].float(), model[name].float()
    write_safetensors(options.output, dict(config, format="srdit-checkpoint-1", step=step), tensors)
    print("%s: %s, step %d, %d trained parameters, moments of %d tensors" % (
        options.output, config["model"], step, sum(model[n].numel() for n in names), len(moments["adam.m."])))

def to_pt(options):
    """Our checkpoint or --export file -> a state_dict, or with --full what the reference's sampler reads."""
    meta, tensors = read_safetensors(options.input)
    kind = meta.get("format")
    if kind not in ("srdit-checkpoint-1", "srdit-export-1"):
        fail("%s: its format is not srdit-checkpoint-1 or srdit-export-1" % options.input)
    if kind == "srdit-export-1" and (options.raw or options.full):
        fail("%s: an export holds only the moving average" % options.input)
    def state(prefix):
        out = collections.OrderedDict((n[len(prefix):], x) for n, x in tensors.items()
                                      if n.startswith(prefix) and not (prefix == "" and
                                                                       n.startswith("adam.")))
        def number(key):
            try:
                value = float(meta[key])
                if value != int(value) or value < 1:
                    raise ValueError
            except (KeyError, ValueError, OverflowError):
                fail("%s: its metadata say %s is %s, which is no size" %
                     (options.input, key, meta.get(key, "missing")))
            return int(value)
        side = number("input_size") // number("patch_size")
        D, Dh = number("hidden_size"), number("hidden_size") // number("num_heads")
        if "pos_embed" not in out:
            out["pos_embed"] = sincos(D, side, number("cls") if "cls" in meta else 1)
        if "feat_rope.freqs_cos" not in out:
            out["feat_rope.freqs_cos"], out["feat_rope.freqs_sin"] = rope(Dh, side)
        return out
    result = state("" if kind == "srdit-export-1" else "model." if options.raw else "ema.")
    if options.full:
        try:
            step = int(meta.get("step", "0"))
        except ValueError:
            fail("%s: its metadata say step is %s, which is no number of steps" % (options.input, meta["step"]))
        result = {"model": state("model."), "ema": state("ema."), "steps": step,
                  "args": argparse.Namespace(**meta)}
    try:
        os.makedirs(os.path.dirname(os.path.abspath(options.output)), exist_ok=True)
        torch.save(result, options.output + ".part")
        os.replace(options.output + ".part", options.output)
    except (OSError, RuntimeError) as error:            # torch.save says RuntimeError for a missing folder
        if os.path.exists(options.output + ".part"):
            os.remove(options.output + ".part")
        fail("%s: cannot be written: %s" % (options.output, str(error).splitlines()[0]))
    print("%s: %s of step %s" % (options.output, "model, ema, steps, args" if options.full else
                                 "the weights" if options.raw else "the moving average", meta.get("step",
                                                                                                  "?")))

def decoder(options):
    """A state_dict of the INVAE, wrapped or not -> decoder.* and post_quant_conv.* in safetensors."""
    state = load_pt(options.input)
    for key in ("ema", "model", "state_dict", "vae"):
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    found = collections.OrderedDict()
    for name, x in (state.items() if isinstance(state, dict) else ()):
        at = re.search(r"(?:^|\.)((?:decoder|post_quant_conv)\..*)$", name)
        if at and isinstance(x, torch.Tensor):
            found[at.group(1)] = x.float()
    if "post_quant_conv.weight" not in found or "decoder.conv_in.weight" not in found:
        fail("%s: it has no post_quant_conv and decoder.conv_in: not a decoder of this kind" % options.input)
    meta = {"format": "srdit-decoder-1", "latent_scale": options.latent_scale or "0.3099",
            "num_groups": options.num_groups, "norm_eps": "1e-06"}
    write_safetensors(options.output, meta, found)
    print("%s: %d tensors, %d parameters" %
          (options.output, len(found), sum(x.numel() for x in found.values())))

# ---------------------------------------------------------------------------------------- the self test

def same(a, b):
    a, b = a.detach(), b.detach()
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()

def selftest(options):
    import contextlib, io, subprocess, tempfile
    sys.path.insert(0, HERE)
    import reference
    failed = []
    def check(what, good):
        print("%-4s %s" % ("ok" if good else "FAIL", what))
        failed.extend([] if good else [what])
    def run(*words):                                            # this program, in this process
        out = io.StringIO()
        try:
            with contextlib.redirect_stdout(out):
                main(list(words))
        except SystemExit as stop:
            return str(stop.code or "")
        return ""

    with tempfile.TemporaryDirectory() as folder:
        at = lambda name: os.path.join(folder, name)
        torch.manual_seed(1)
        cfg = reference.Config(depth=5, hidden_size=32, num_heads=4, patch_size=2, in_channels=1,
                               input_size=8, num_classes=10,
                               z_dim=12, projector_dim=24, num_f=2, num_h=2, dtype="float32")
        models = [reference.SRDiT(cfg) for _ in range(2)]
        for m in models:
            for p in m.parameters():
                torch.nn.init.normal_(p)
            # the reference keeps pos_embed as a frozen parameter, so that AdamW counts it
            table = m.pos_embed
            del m.pos_embed
            m.pos_embed = torch.nn.Parameter(table, requires_grad=False)
        m, ema = models
        opt = torch.optim.AdamW(m.parameters(), lr=1e-4)
        for k, p in enumerate(p for p in m.parameters() if p.requires_grad):
            p.grad = torch.randn_like(p)
        opt.step()
        args = argparse.Namespace(model="SiT-tiny", learning_rate=3e-4, adam_beta1=0.9, batch_size=8,
                                  cls=0.03, extra=[1, "a"])
        whole = {"model": collections.OrderedDict(("module." + n, x) for n, x in m.state_dict().items()),
                 "ema": ema.state_dict(), "opt": opt.state_dict(), "args": args, "steps": 7}
        torch.save(whole, at("ref.pt"))

        check("from-pt runs", run("from-pt", at("ref.pt"), at("ours.safetensors"), "--decoder",
                                  "pixels") == "")
        meta, ours = read_safetensors(at("ours.safetensors"))
        check("sizes come from the shapes",
              [meta[k] for k in ("depth", "hidden_size", "num_heads", "patch_size", "input_size",
              "num_classes", "z_dim", "projector_dim", "step", "lr", "batch")] ==
              ["5", "32", "4", "2", "8", "10", "12", "24", "7", "0.0003", "8"])
        trained = dict(m.named_parameters())
        trained.pop("pos_embed")
        check("weights and moving average bit for bit", all(same(ours["model." + n], trained[n]) and
              same(ours["ema." + n], ema.state_dict()[n]) for n in trained))
        check("AdamW's moments bit for bit", all(same(ours["adam.m." + n], opt.state[p]["exp_avg"]) and
              same(ours["adam.v." + n], opt.state[p]["exp_avg_sq"]) for n, p in trained.items()))

        check("to-pt runs", run("to-pt", at("ours.safetensors"), at("ema.pt")) == "" and
              run("to-pt", at("ours.safetensors"), at("raw.pt"), "--raw") == "" and
              run("to-pt", at("ours.safetensors"), at("full.pt"), "--full") == "")
        back, fresh = load_pt(at("ema.pt")), reference.SRDiT(cfg)
        fresh.load_state_dict(back, strict=True)
        check("the way back loads strictly and is bit for bit", set(back) == set(ema.state_dict()) and
              all(same(x, back[n]) for n, x in ema.state_dict().items()) and
              all(same(x, load_pt(at("raw.pt"))[n]) for n, x in m.state_dict().items()))
        full = load_pt(at("full.pt"))
        check("--full has ema, steps and args", full["steps"] == 7 and full["args"].depth == "5" and
              len(full["ema"]) == len(back))
        for n in FIXED:                  # a checkpoint that our trainer wrote has no tables: they are made
            ours.pop("ema." + n), ours.pop("model." + n)
        write_safetensors(at("trained.safetensors"), meta, ours)
        run("to-pt", at("trained.safetensors"), at("made.pt"))
        made = load_pt(at("made.pt"))
        check("tables that a checkpoint lacks are made", set(made) == set(back) and
              all((made[n] - back[n]).abs().max() < 1e-6 for n in FIXED))
        torch.save(ema.state_dict(), at("bare.pt"))
        meta.pop("input_size")
        write_safetensors(at("sizeless.safetensors"), meta, {k: x for k, x in ours.items()})
        for words, pattern in ((("to-pt", at("nothing"), at("x.pt")), "No such file"),
                               (("to-pt", at("sizeless.safetensors"), at("x.pt")), "input_size is missing"),
                               (("to-pt", at("trained.safetensors"), at("ref.pt/x.pt")), "ref.pt"),
                               (("from-pt", at("ref.pt"), at("ref.pt/x.safetensors")), "ref.pt")):
            said = run(*words)
            check("%s %s: one sentence" % (words[0], pattern), pattern in said and said.count("\n") <= 1)
        check("a bare state_dict becomes an export", run("from-pt", at("bare.pt"), at("bare.safetensors"),
                                                         "--decoder", "pixels") == "" and
              run("to-pt", at("bare.safetensors"), at("bare2.pt")) == "" and
              all(same(x, load_pt(at("bare2.pt"))[n]) for n, x in ema.state_dict().items()))

        d = torch.nn.Module()
        d.post_quant_conv = torch.nn.Conv2d(4, 4, 1)
        d.decoder = reference.Decoder(4, (1, 2), 1, 4, 3, 2, 1e-6, (1,))
        d.encoder = torch.nn.Linear(2, 2)
        torch.save({"state_dict": d.state_dict(), "args": argparse.Namespace(a=1)}, at("vae.pt"))
        check("decoder runs", run("decoder", at("vae.pt"), at("vae.safetensors"), "--num-groups", "2") == "")
        kept = read_safetensors(at("vae.safetensors"))[1]
        check("decoder bit for bit, without the encoder",
              set(kept) == {n for n in d.state_dict() if not n.startswith("encoder")} and
              all(same(x, d.state_dict()[n]) for n, x in kept.items()))

        class Evil:
            def __reduce__(self):
                return os.mkdir, (at("pwned"),)
        torch.save({"model": {}, "ema": Evil()}, at("evil.pt"))
        refused = run("from-pt", at("evil.pt"), at("evil.safetensors"))
        check("a .pt that runs a program is refused", "no part of weights" in refused and
              not os.path.exists(at("pwned")))
        mixed = {"a": torch.randn(5, 7).t()[1:4, ::2], "b": torch.randn(3).bfloat16(), "c": torch.arange(5),
                 "d": torch.randn(2).half(),
                 "e": torch.nn.Parameter(torch.randn(2, 2)), "f": torch.tensor(True)}
        torch.save(mixed, at("mixed.pt"))
        same_as_torch = load_pt(at("mixed.pt"))
        check("views and types as torch.load reads them",
              all(torch.equal(same_as_torch[n], x) and same_as_torch[n].dtype == x.dtype
                                                              for n, x in mixed.items()))
        torch.save(mixed, at("old.pt"), _use_new_zipfile_serialization=False)
        old = load_pt(at("old.pt"))
        check("a file from before PyTorch 1.6 likewise", set(old) == set(mixed) and
              all(torch.equal(old[n], x) and old[n].dtype == x.dtype for n, x in mixed.items()))
        torch.save({"model": {}, "ema": Evil()}, at("evil.pt"), _use_new_zipfile_serialization=False)
        check("and it runs no program", "no part of weights" in run("from-pt", at("evil.pt"), at("x")) and
              not os.path.exists(at("pwned")))
        for cut in (1, 100, 400):
            with open(at("short.pt"), "wb") as f:
                f.write(open(at("old.pt"), "rb").read()[:-cut])
            said = run("from-pt", at("short.pt"), at("x"))
            check("nor reads one that lacks its last %d bytes" % cut,
                  ("truncated" in said or "cannot be read" in said) and said.count("\n") <= 1)
        with open(at("short.pt"), "wb") as f:
            f.write(open(at("ref.pt"), "rb").read()[:2000])
        check("a truncated .pt is one sentence",
              run("from-pt", at("short.pt"), at("x")).startswith("error: "))
        check("another network is one sentence", "not an SR-DiT" in run("from-pt", at("vae.pt"), at("x")) and
              "not a decoder" in run("decoder", at("ref.pt"), at("x")))

        sample = os.path.join(os.path.dirname(HERE), "sample")
        if os.path.exists(sample):
            few = ["--num", "2", "--steps", "2", "--out", at("few.png")]
            results = [subprocess.run([sample, at(name)] + few,
                                      stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
                       for name in ("ours.safetensors", "bare.safetensors")]
            check("./sample draws from both", all(r.returncode == 0 for r in results))
    print("%d failed" % len(failed) if failed else "all passed, torch %s" % torch.__version__)
    sys.exit(1 if failed else 0)

def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, function, text in (("from-pt", from_pt, "the reference's .pt to our checkpoint"),
                                 ("to-pt", to_pt, "our checkpoint or --export file to a .pt"),
                                 ("decoder", decoder, "the INVAE's .pt to what ./sample --decoder reads"),
                                 ("selftest", selftest, "check every direction on small random models")):
        p = commands.add_parser(name, help=text, description=function.__doc__ or text)
        p.set_defaults(function=function)
        if name == "selftest":
            continue
        p.add_argument("input")
        p.add_argument("output")
        if name == "from-pt":
            p.add_argument("--num-f", type=int, default=2,
                           help="dense encoder blocks, which no shape tells [2]")
            p.add_argument("--num-h", type=int, default=2, help="dense decoder blocks [2]")
            p.add_argument("--decoder", choices=("invae", "pixels"),
                           help="what the latents are [invae if 32 channels]")
            p.add_argument("--data-name", help="the data shards' name, checked when training goes on")
        if name in ("from-pt", "decoder"):
            p.add_argument("--latent-scale",
                           help="latents were multiplied by this [0.3099 for invae, else 1]")
        if name == "decoder":
            p.add_argument("--num-groups", default="32", help="groups of every GroupNorm [32]")
        if name == "to-pt":
            p.add_argument("--raw", action="store_true", help="the weights instead of their moving average")
            p.add_argument("--full", action="store_true",
                           help="model, ema, steps and args (no opt), as the reference's files")
    options = parser.parse_args(argv)
    if not options.command:
        parser.error("a command is needed: from-pt, to-pt, decoder or selftest (--help has examples)")
    try:
        options.function(options)
    except OSError as error:
        fail("%s: %s" % (error.filename, error.strerror))

if __name__ == "__main__":
    main()
