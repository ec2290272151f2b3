"""The frozen networks of the ImageNet road, in PyTorch: the INVAE's encoder, DINOv2 and the FID Inception,
each a function of its published weights, and what is done to pictures before they see them.

  load(path, needs)       weights in their public layout, .pt, .pth or .safetensors -> {name: float tensor}
  invae(w, x)             pictures -> mean and logarithm of the variance of their latents
  dino(w, x, positions)   pictures -> tokens, CLS first
  inception(w, x)         pictures -> pooled and spatial features

A network is a function of a dictionary, so that widths and depths are those of the file: the tests run small
files through the same lines. What it refuses to become: a zoo. data/imagenet.py and dev/evaluate.py use it.
"""
import hashlib, math, os, sys

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import convert

MEAN, DEV = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)        # of ImageNet's pixels, as DINOv2 was trained
WRAPPED = ("ema", "model", "state_dict", "vae")

# ---------------------------------------------------------------------------------------------------- files

def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        for block in iter(lambda: f.read(1 << 22), b""):
            digest.update(block)
    return digest.hexdigest()

def load(path, needs, what, device="cpu"):
    """The weights in a file; `needs` names tensors without which it is no `what`. ValueError says what is
    wrong."""
    if not os.path.isfile(path):
        raise ValueError("%s: no such file; it should hold the weights of %s" % (path, what))
    try:
        state = convert.read_safetensors(path)[1] if path.endswith(".safetensors") else convert.load_pt(path)
    except SystemExit as stop:
        raise ValueError(str(stop.code).replace("error: ", "", 1))
    for key in WRAPPED:
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    w = {}
    for name, x in (state.items() if isinstance(state, dict) else ()):
        if isinstance(x, torch.Tensor):
            w[name[7:] if name.startswith("module.") else name] = x.detach()
    for name in needs:
        if name not in w:
            raise ValueError("%s: it has no tensor %s: these are not the weights of %s" % (path, name, what))
    return {name: (x.float() if x.is_floating_point() else x).to(device) for name, x in w.items()}

def guarded(path, what, network, *arguments):
    """network(*arguments), where a tensor that is missing or has another shape is one sentence."""
    try:
        return network(*arguments)
    except KeyError as error:
        raise ValueError("%s: it has no tensor %s: not the weights of %s, or not whole" % (path, error, what))
    except RuntimeError as error:
        if "CUDA" in str(error) or "memory" in str(error):
            raise
        raise ValueError("%s: its shapes do not fit %s: %s" % (path, what, str(error).splitlines()[0]))

# ------------------------------------------------------------------------------- pictures before networks

def center_crop(picture, size):
    """PIL picture -> U8 [size,size,3], as ADM cuts ImageNet (arXiv 2105.05233): halved by boxes while twice
    too large, the rest of the way by Pillow's bicubic, which antialiases, and the middle taken."""
    picture = picture.convert("RGB")
    while min(picture.size) >= 2 * size:
        picture = picture.resize(tuple(x // 2 for x in picture.size), Image.BOX)
    scale = size / min(picture.size)
    picture = picture.resize(tuple(round(x * scale) for x in picture.size), Image.BICUBIC)
    pixels = np.asarray(picture)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return np.ascontiguousarray(pixels[top:top + size, left:left + size])

def channels_first(pixels, device):
    """U8 [B,H,W,3] -> float [B,3,H,W] on the device, still 0 ... 255"""
    return torch.from_numpy(np.array(pixels)).to(device).permute(0, 3, 1, 2).float()

def normalized(x):
    mean, dev = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (MEAN, DEV))
    return (x / 255 - mean) / dev

def dino_input(pixels, side, device):
    """For the alignment features, as REPA does it: normalised first, then bicubic WITHOUT antialiasing to
    14 side x 14 side. pixels: U8 [B,H,W,3]."""
    return F.interpolate(normalized(channels_first(pixels, device)), (14 * side, 14 * side), mode="bicubic",
                         align_corners=False)

def dino_score_input(pixels):
    """For FD-DINOv2 and KDD, as dgm-eval does it: Pillow's bicubic, WITH antialiasing, on bytes, to 224 x
    224. U8 [H,W,3] -> U8 [224,224,3]."""
    return np.asarray(Image.fromarray(pixels).resize((224, 224), Image.BICUBIC))

def tensorflow_matrix(size, out):
    """[out,size]: bilinear as TensorFlow 1 places it: output i looks at i size / out, no half pixel, no
    antialias"""
    at = torch.arange(out, dtype=torch.float32) * (size / out)
    low = at.floor().long().clamp(max=size - 1)
    high, part = (low + 1).clamp(max=size - 1), at - low
    matrix = torch.zeros(out, size)
    matrix[torch.arange(out), low] += 1 - part
    matrix[torch.arange(out), high] += part
    return matrix

def inception_input(pixels, device):
    """U8 [B,H,W,3] -> [B,3,299,299], the graph's own resizing, then (x - 128) / 128"""
    x = channels_first(pixels, device)
    rows, columns = (tensorflow_matrix(n, 299).to(device) for n in x.shape[2:])
    return (rows @ x @ columns.t() - 128) / 128

# ---------------------------------------------------------------------------------------- the INVAE's encoder

def convolution(w, name, x, stride=1, padding=None):
    weight = w[name + ".weight"]
    padding = tuple(k // 2 for k in weight.shape[2:]) if padding is None else padding
    return F.conv2d(x, weight, w.get(name + ".bias"), stride, padding)

def group_norm(w, name, x, groups=32):
    return F.group_norm(x, groups, w[name + ".weight"], w[name + ".bias"], 1e-6)

def residual(w, name, x):                               # [B,Cin,h,w] -> [B,Cout,h,w]
    h = convolution(w, name + ".conv1", F.silu(group_norm(w, name + ".norm1", x)))
    h = convolution(w, name + ".conv2", F.silu(group_norm(w, name + ".norm2", h)))
    shortcut = name + ".nin_shortcut"
    return (convolution(w, shortcut, x) if shortcut + ".weight" in w else x) + h

def attention(w, name, x):                              # one head over the places of the map
    h = group_norm(w, name + ".norm", x)
    q, k, v = (convolution(w, "%s.%s" % (name, part), h).flatten(2) for part in "qkv")        # [B,C,hw]
    a = torch.softmax(q.transpose(1, 2) @ k * x.shape[1] ** -0.5, dim=-1)       # [B,query,key]
    return x + convolution(w, name + ".proj_out", (v @ a.transpose(1, 2)).view_as(x))

INVAE = ("encoder.conv_in.weight", "encoder.conv_out.weight", "quant_conv.weight")

def invae(w, x):
    """[B,3,16h,16w] in -1 ... 1 -> (mean, log variance), each [B,z,h,w]; the latents before their scale. It
    is the mirror of sample.c's decoder; a downsampling pads below and to the right only."""
    h, level = convolution(w, "encoder.conv_in", x), 0
    while "encoder.down.%d.block.0.conv1.weight" % level in w:
        name, block = "encoder.down.%d" % level, 0
        while "%s.block.%d.conv1.weight" % (name, block) in w:
            h = residual(w, "%s.block.%d" % (name, block), h)
            if "%s.attn.%d.q.weight" % (name, block) in w:
                h = attention(w, "%s.attn.%d" % (name, block), h)
            block += 1
        if name + ".downsample.conv.weight" in w:
            h = convolution(w, name + ".downsample.conv", F.pad(h, (0, 1, 0, 1)), 2, 0)
        level += 1
    h = residual(w, "encoder.mid.block_1", h)
    h = residual(w, "encoder.mid.block_2", attention(w, "encoder.mid.attn_1", h))
    h = convolution(w, "encoder.conv_out", F.silu(group_norm(w, "encoder.norm_out", h)))
    mean, logvar = convolution(w, "quant_conv", h).chunk(2, 1)
    return mean, logvar.clamp(-30, 20)

# ------------------------------------------------------------------------------------------------- DINOv2

DINO = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.ls1.gamma", "norm.weight")

def dino_positions(w, side, antialias=True):
    """pos_embed [1,1+n*n,D] brought to side x side patches. antialias: as REPA does it (timm); without: as
    DINOv2's own code, which asks for 0.1 of a patch more, does it (and so dgm-eval)."""
    cls, grid = w["pos_embed"][:, :1], w["pos_embed"][:, 1:]
    n = math.isqrt(grid.shape[1])
    if n == side:
        return w["pos_embed"]
    grid = grid.reshape(1, n, n, -1).permute(0, 3, 1, 2)
    if antialias:
        grid = F.interpolate(grid, (side, side), mode="bicubic", align_corners=False, antialias=True)
    else:
        grid = F.interpolate(grid, scale_factor=((side + 0.1) / n,) * 2, mode="bicubic", align_corners=False)
    return torch.cat([cls, grid.permute(0, 2, 3, 1).flatten(1, 2)], 1)

def dino(w, x, positions):
    """[B,3,14 side,14 side] normalised -> tokens [B,1+side*side,D] after the last norm, CLS first. Heads are
    64 wide, as in every published size."""
    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"], 1e-6)
    def linear(name, x):
        return F.linear(x, w[name + ".weight"], w[name + ".bias"])
    x = F.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"],
                 w["patch_embed.proj.weight"].shape[2:]).flatten(2).transpose(1, 2)
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], 1) + positions
    B, T, D = x.shape
    i = 0
    while "blocks.%d.norm1.weight" % i in w:
        name = "blocks.%d" % i
        qkv = linear(name + ".attn.qkv", norm(name + ".norm1", x))
        q, k, v = qkv.view(B, T, 3, -1, 64).permute(2, 0, 3, 1, 4)
        a = torch.softmax(q * 64 ** -0.5 @ k.transpose(-1, -2), -1) @ v                     # [B,H,T,64]
        x = x + w[name + ".ls1.gamma"] * linear(name + ".attn.proj", a.transpose(1, 2).reshape(B, T, -1))
        h = F.gelu(linear(name + ".mlp.fc1", norm(name + ".norm2", x)))
        x = x + w[name + ".ls2.gamma"] * linear(name + ".mlp.fc2", h)
        i += 1
    return norm("norm", x)

# ---------------------------------------------------------------------------------------- the FID Inception

INCEPTION = ("Conv2d_1a_3x3.conv.weight", "Mixed_7c.branch_pool.conv.weight", "fc.weight")

def inception(w, x):
    """[B,3,299,299] in -1 ... 1 -> (pool [B,2048], spatial [B,7*17*17]). The network of the 2015 TensorFlow
    graph under the names that its PyTorch files have. Pooled is "pool_3:0"; spatial are the first seven
    channels of "mixed_6/conv:0", channels last, as ADM's evaluator takes them for sFID. Three things differ
    from torchvision's Inception: average pools do not count the border, the last block pools by maximum, and
    there are 1008 classes."""
    def conv(name, x, stride=1, padding=None):          # convolution, batch norm, ReLU
        x = convolution(w, name + ".conv", x, stride, padding)
        return F.relu(F.batch_norm(x, w[name + ".bn.running_mean"], w[name + ".bn.running_var"],
                                   w[name + ".bn.weight"], w[name + ".bn.bias"], False, 0, 1e-3))
    def chain(name, parts, x):                          # one convolution after the other
        for part in parts.split():
            x = conv("%s.%s" % (name, part), x)
        return x
    def average(x):
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    def block_a(name, x):                               # 35 x 35
        return torch.cat([chain(name, "branch1x1", x), chain(name, "branch5x5_1 branch5x5_2", x),
                          chain(name, "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3", x),
                          chain(name, "branch_pool", average(x))], 1)
    def block_c(name, x):                               # 17 x 17
        double = " ".join("branch7x7dbl_%d" % i for i in range(1, 6))
        return torch.cat([chain(name, "branch1x1", x), chain(name, "branch7x7_1 branch7x7_2 branch7x7_3", x),
                          chain(name, double, x), chain(name, "branch_pool", average(x))], 1)
    def block_e(name, x, pool):                         # 8 x 8
        a = chain(name, "branch3x3_1", x)
        b = chain(name, "branch3x3dbl_1 branch3x3dbl_2", x)
        return torch.cat([chain(name, "branch1x1", x), chain(name, "branch3x3_2a", a),
                          chain(name, "branch3x3_2b", a), chain(name, "branch3x3dbl_3a", b),
                          chain(name, "branch3x3dbl_3b", b), chain(name, "branch_pool", pool(x))], 1)
    x = conv("Conv2d_1a_3x3", x, 2, 0)
    x = conv("Conv2d_2b_3x3", conv("Conv2d_2a_3x3", x, 1, 0))
    x = conv("Conv2d_4a_3x3", conv("Conv2d_3b_1x1", F.max_pool2d(x, 3, 2)), 1, 0)
    x = F.max_pool2d(x, 3, 2)
    for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = block_a(name, x)
    x = torch.cat([conv("Mixed_6a.branch3x3", x, 2, 0),
                   conv("Mixed_6a.branch3x3dbl_3",
                        chain("Mixed_6a", "branch3x3dbl_1 branch3x3dbl_2", x), 2, 0),
                   F.max_pool2d(x, 3, 2)], 1)
    x = block_c("Mixed_6c", block_c("Mixed_6b", x))
    spatial = conv("Mixed_6d.branch1x1", x)[:, :7].permute(0, 2, 3, 1).flatten(1)
    x = block_c("Mixed_6e", block_c("Mixed_6d", x))
    three = " ".join("branch7x7x3_%d" % i for i in range(1, 4))
    x = torch.cat([conv("Mixed_7a.branch3x3_2", chain("Mixed_7a", "branch3x3_1", x), 2, 0),
                   conv("Mixed_7a.branch7x7x3_4", chain("Mixed_7a", three, x), 2, 0),
                   F.max_pool2d(x, 3, 2)], 1)
    x = block_e("Mixed_7b", x, average)
    x = block_e("Mixed_7c", x, lambda x: F.max_pool2d(x, 3, 1, 1))
    return x.mean((2, 3)), spatial

def device_of(name):
    """The torch device of that name, without one a GPU if there is one; ValueError where it cannot be used"""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        why = str(error).split("\n")[0].strip(".")
        raise ValueError("--device %s: torch cannot use it (%s)" % (name, why))
    return name
