#!/usr/bin/env python3
"""SR-DiT in PyTorch: the plain twin of train_srdit.c, and the writer of its reference files.

Read it beside the C file: same letters, same tensor names (those of the public state_dict), no speed. A
reference file is one training step with every draw recorded, some evaluation and some sampling; this program
writes such files and never trains on data. It needs torch (1.13 or newer) and the numpy that torch brings.
Every random number comes from numpy's frozen MT19937, one stream a tensor: the same seed, the same file.

  python3 dev/reference.py write        write dev/ref/*.safetensors again
  python3 dev/reference.py check        compare dev/ref with a fresh computation, and check the twin itself
  python3 dev/reference.py case --out /tmp/a.safetensors --seed 7 --depth 6 --hidden_size 32 --off rope,cfm
  python3 dev/reference.py decoder --out /tmp/d.safetensors --seed 7 --ch 16 --height 3
  python3 dev/reference.py random --count 20 --seed 1 --out /tmp/cases

The cases in dev/ref (float64 unless named f32; f+g+h are the blocks of encoder, sparse middle and decoder):

  case           f+g+h  D  H  C  S  p  B   T  Tk   what it is for
  base           2+1+2  8  2  4  4  1  3  17   4   the defaults; clip bites; CLS guided with its own scale
  path_drop      2+1+2  8  2  3  4  2  2   5   1   path drop, weight decay; path-drop guidance; t clamped
  batch1         1+1+1  8  1  2  8  4  1   5   2   roll is the identity, r 0.5, 3 steps, all stored; N = 1
  wide           1+1+1 24  3  8  4  2  4   5   1   no clip; guided in an interval, CLS not guided
  deep_h         1+1+3  8  2  1  3  1  3  10   5   3x3 grid, r 0.5, K = 2, other coefficients; unguided
  shift_up       1+1+1 12  1  8  4  2  5   5   2   Dh = 12, s > 1; path-drop guidance in an interval
  off_cls        1+1+1  8  2  4  4  1  2  16   4   no CLS token anywhere
  off_attention  1+1+1  8  2  4  4  1  2  17   4   off: qk_norm, rope, value_residual, align
  off_training   1+1+1  8  1  4  4  2  3   5   5   no routing, path_drop, cfm, time_shift, dropped labels, ema
  base_f32       2+1+1  8  2  4  4  1  2  17   4   the defaults in float32
  muon           1+1+1  8  2  4  4  1  2  17   4   Muon, split: 5 steps, weight decay
  srdit13        1+2+1  8  1  2  4  2  2   5   1   Muon for all: 5 path-drop steps, aligned at depths 1, 2; noise
                                                   the nearest of 8
  depths         1+2+1  8  2  4  4  1  2  17   4   alignment at depths 1, 3 and 4; MLPs of 13 to 192
  invae_16x      the decoder with 5 levels: latent 2x3 -> image 32x48, attention on level 4
  invae_2x       the decoder with 2 levels: latent 5x3 -> image 10x6, attention on level 1, batch 2
"""
import argparse, inspect, json, math, os, struct, sys, zlib
from dataclasses import asdict, dataclass, fields
try:
    import numpy as np, torch, torch.nn as nn, torch.nn.functional as F
except ImportError as e:
    sys.exit(f"{e}: pip install torch numpy, or apt install python3-torch and run this with /usr/bin/python3")

SWITCHES = ("routing", "path_drop", "align", "cls", "cfm", "qk_norm", "rope", "value_residual", "time_shift",
            "label_dropout", "ema")
LATER = ("optimizer", "muon_lr", "muon_momentum", "muon_weight_decay", "align_depths", "mlp_widths",
         "immiscible")                          # after the paper
QK_NORM_EPS = 2.0 ** -23                        # float32's machine epsilon, in every precision
DTYPES = {"float32": torch.float32, "float64": torch.float64}

@dataclass
class Config:
    depth: int = 5                              # L = Lf + Lg + Lh
    hidden_size: int = 16                       # D
    num_heads: int = 2                          # H
    patch_size: int = 1                         # p
    in_channels: int = 4                        # C
    input_size: int = 4                         # S
    num_classes: int = 10                       # K
    z_dim: int = 12                             # Z
    projector_dim: int = 20                     # M
    num_f: int = 2                              # Lf
    num_h: int = 2                              # Lh
    drop_ratio: float = 0.75                    # r
    mlp_ratio: float = 4.0
    class_dropout_prob: float = 0.1
    cls_coeff: float = 0.03
    proj_coeff: float = 0.5
    cfm_coeff: float = 0.05
    time_shift: int = 1                         # a switch too
    shift_base: float = 4096.0
    lr: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    ema_decay: float = 0.9999
    steps: int = 1
    dtype: str = "float64"
    switch_off: str = ""                        # the techniques that are off, of SWITCHES, comma-separated
    # after the paper; files leave them out where they are at their defaults
    optimizer: str = "adamw"                    # or muon_split, muon_srdit13
    muon_lr: float = 1e-3
    muon_momentum: float = 0.95
    muon_weight_decay: float = 0.0
    align_depths: str = ""                      # counted from 1, comma-separated; none: Lf alone
    mlp_widths: str = ""                        # hidden widths of all blocks, comma-separated
    immiscible: int = 1                         # noise is the nearest to its latent of so many candidates

    def hidden(self, i):                        # width of block i's MLP
        if not self.mlp_widths:
            return int(self.hidden_size * self.mlp_ratio)
        return int(self.mlp_widths.split(",")[i])

    def on(self, switch):
        return switch not in self.switch_off.split(",")

    def __post_init__(self):
        unknown = set(filter(None, self.switch_off.split(","))) - set(SWITCHES)
        if unknown:
            sys.exit(f"no such switch: {', '.join(unknown)}; there are: {', '.join(SWITCHES)}")
        if self.hidden_size % (4 * self.num_heads) or self.input_size % self.patch_size:
            sys.exit("hidden_size must be a multiple of 4*num_heads, and input_size one of patch_size")
        if self.optimizer not in ("adamw", "muon_split", "muon_srdit13"):
            sys.exit(f"no such optimizer: {self.optimizer}; there are adamw, muon_split and muon_srdit13")
        if self.mlp_widths and len(self.mlp_widths.split(",")) != self.depth:
            sys.exit("mlp_widths are the hidden widths of all blocks")
        if self.num_f < 1 or self.num_h < 0 or self.num_f + self.num_h > self.depth:
            sys.exit("num_f must be at least 1, and num_f + num_h at most depth")
        self.time_shift = int(self.time_shift and self.on("time_shift"))
        self.G = self.input_size // self.patch_size
        self.P = self.G ** 2
        self.T = self.P + (1 if self.on("cls") else 0)
        self.Tk = max(1, int(self.T * (1.0 - self.drop_ratio))) if self.on("routing") else self.T
        self.depths = [int(x) for x in self.align_depths.split(",") if x] or [self.num_f]

    def shift_time(self, t):                    # s < 1, for small latents, moves t towards data
        s = math.sqrt(self.in_channels * self.input_size ** 2 / self.shift_base)
        return (s * t / (1 + (s - 1) * t)).clamp(0, 1) if self.time_shift else t

# -------------------------------------------------------------------------------------------------- the model

def rms_norm(x, eps=1e-6):
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps)

class RMSNorm(nn.Module):
    def __init__(self, dim, eps, **kw):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim, **kw)), eps

    def forward(self, x):
        return rms_norm(x, self.eps) * self.weight

def modulate(x, shift, scale):                  # x [B,T,D]; shift, scale [B,D]
    return rms_norm(x) * (1 + scale[:, None]) + shift[:, None]

def rope_table(G, Dh, dtype):
    """cos and sin [P,Dh]: first Dh/2 entries turn with the row, last with the column, in adjacent pairs."""
    w = 10000.0 ** (-2 * torch.arange(Dh // 4, dtype=dtype) / (Dh // 2))                # w_j [Dh/4]
    angle = (torch.arange(G, dtype=dtype)[:, None] * w).repeat_interleave(2, dim=1)     # [G,Dh/2]
    r, c = torch.arange(G).repeat_interleave(G), torch.arange(G).repeat(G)
    angle = torch.cat([angle[r], angle[c]], dim=1)
    return angle.cos(), angle.sin()

def apply_rope(x, rope):                        # x [B,H,T,Dh]; rope: cos and sin, [1 or B,T,Dh] each
    cos, sin = rope[0][:, None], rope[1][:, None]
    turned = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)             # (a,b) -> (-b,a)
    return x * cos + turned * sin

def sincos_pos_embed(G, D, with_cls):
    """[1,T,D]: first half of D: the column, last half: the row. Float32 values, whatever the precision."""
    w = 10000.0 ** (-torch.arange(D // 4, dtype=torch.float64) / (D / 4))
    angle = torch.arange(G, dtype=torch.float64)[:, None] * w                           # [G,D/4]
    half = torch.cat([angle.sin(), angle.cos()], dim=1)                                 # [G,D/2]
    r, c = torch.arange(G).repeat_interleave(G), torch.arange(G).repeat(G)
    table = torch.cat([half[c], half[r]], dim=1).float()                                # [P,D]
    return torch.cat([torch.zeros(int(with_cls), D), table])[None]

class Attention(nn.Module):
    def __init__(self, cfg, first, **kw):
        super().__init__()
        self.cfg, D, Dh = cfg, cfg.hidden_size, cfg.hidden_size // cfg.num_heads
        self.qkv = nn.Linear(D, 3 * D, **kw)
        if cfg.on("qk_norm"):
            self.q_norm, self.k_norm = RMSNorm(Dh, QK_NORM_EPS, **kw), RMSNorm(Dh, QK_NORM_EPS, **kw)
        mixes = cfg.on("value_residual") and not first
        self.v1_lambda = nn.Parameter(torch.tensor(0.5, **kw)) if mixes else None
        self.proj = nn.Linear(D, D, **kw)

    def forward(self, x, rope, v1):             # x [B,T,D]; v1 [B,H,T,Dh], None in block 0
        (B, T, D), H = x.shape, self.cfg.num_heads
        q, k, v = raw = self.qkv(x).view(B, T, 3, H, D // H).permute(2, 0, 3, 1, 4)     # 3 x [B,H,T,Dh]
        if self.cfg.on("qk_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        if self.v1_lambda is not None:
            v = self.v1_lambda * v1 + (1 - self.v1_lambda) * v
        if self.cfg.on("rope"):
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        a = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(D // H), dim=-1) @ v
        return self.proj(a.transpose(1, 2).reshape(B, T, D)), raw[2]

class Mlp(nn.Module):
    def __init__(self, D, hidden, **kw):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(D, hidden, **kw), nn.Linear(hidden, D, **kw)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))

class Block(nn.Module):
    def __init__(self, cfg, i, **kw):
        super().__init__()
        D = cfg.hidden_size
        self.attn, self.mlp = Attention(cfg, i == 0, **kw), Mlp(D, cfg.hidden(i), **kw)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D, **kw))

    def forward(self, x, c, rope, v1=None):     # x [B,T,D], c [B,D]
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        a, raw_v = self.attn(modulate(x, shift1, scale1), rope, v1)
        x = x + gate1[:, None] * a
        x = x + gate2[:, None] * self.mlp(modulate(x, shift2, scale2))
        return x, raw_v

class FinalLayer(nn.Module):
    def __init__(self, cfg, **kw):
        super().__init__()
        D, self.cfg = cfg.hidden_size, cfg
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D, **kw))
        self.linear = nn.Linear(D, cfg.patch_size ** 2 * cfg.in_channels, **kw)
        if cfg.on("cls"):
            self.linear_cls = nn.Linear(D, cfg.z_dim, **kw)

    def forward(self, x, c):                    # x [B,T,D] -> velocity of the latent [B,C,S,S], of CLS [B,Z]
        G, p, C, S = self.cfg.G, self.cfg.patch_size, self.cfg.in_channels, self.cfg.input_size
        y = modulate(x, *self.adaLN_modulation(c).chunk(2, dim=-1))
        v_cls = self.linear_cls(y[:, 0]) if self.cfg.on("cls") else None
        v = self.linear(y[:, -self.cfg.P:]).view(-1, G, G, p, p, C)     # G, G: which patch; p, p: where in it
        return v.permute(0, 5, 1, 3, 2, 4).reshape(-1, C, S, S), v_cls

def holder(**modules):                          # a module that only lends its children a prefix
    m = nn.Module()
    for name, child in modules.items():
        m.add_module(name, child)
    return m

class SRDiT(nn.Module):
    def __init__(self, cfg, device="cpu"):
        super().__init__()
        kw = dict(dtype=DTYPES[cfg.dtype], device=device)
        D, C, p, Z, M = cfg.hidden_size, cfg.in_channels, cfg.patch_size, cfg.z_dim, cfg.projector_dim
        self.cfg = cfg
        self.x_embedder = holder(proj=nn.Conv2d(C, D, p, stride=p, **kw))
        if cfg.on("cls"):
            self.cls_projectors2, self.wg_norm = nn.Linear(Z, D, **kw), RMSNorm(D, 1e-6, **kw)
        self.t_embedder = holder(mlp=nn.Sequential(nn.Linear(256, D, **kw), nn.SiLU(), nn.Linear(D, D, **kw)))
        self.y_embedder = holder(embedding_table=nn.Embedding(cfg.num_classes + 1, D, **kw))
        self.blocks = nn.ModuleList(Block(cfg, i, **kw) for i in range(cfg.depth))
        if cfg.on("align"):
            self.projectors = nn.ModuleList([nn.Sequential(
                nn.Linear(D, M, **kw), nn.SiLU(), nn.Linear(M, M, **kw), nn.SiLU(), nn.Linear(M, Z, **kw))])
        self.mask_token = nn.Parameter(torch.zeros(1, 1, D, **kw))
        self.fusion_proj = nn.Linear(2 * D, D, **kw)
        self.final_layer = FinalLayer(cfg, **kw)
        # The fixed tables are buffers; all else in state_dict is trained.
        self.register_buffer("pos_embed", sincos_pos_embed(cfg.G, D, cfg.on("cls")).to(kw["dtype"]))
        self.feat_rope = nn.Module()
        cos, sin = rope_table(cfg.G, D // cfg.num_heads, kw["dtype"])
        self.feat_rope.register_buffer("freqs_cos", cos)
        self.feat_rope.register_buffer("freqs_sin", sin)

    @torch.no_grad()
    def init_weights(self):
        """Where a real run starts. Reference files do not: with the gates at 0 most gradients vanish."""
        for name, p in self.named_parameters():
            if name.endswith(("norm.weight", "v1_lambda")):
                p.fill_(1 if name.endswith("norm.weight") else 0.5)
            elif name.endswith("bias") or name == "mask_token" or "adaLN" in name or "final_layer" in name:
                p.zero_()
            elif name.startswith(("t_embedder", "y_embedder")):
                p.normal_(0, 0.02)
            else:
                nn.init.xavier_uniform_(p.view(len(p), -1))

    def time_features(self, t):                 # t [B] in 0..1, not 0..1000 -> [B,256]
        angle = t[:, None] * 10000.0 ** (-torch.arange(128, dtype=t.dtype) / 128)
        return torch.cat([angle.cos(), angle.sin()], dim=-1)

    def forward(self, x, cls, t, y, ids=None, path_drop=False, act=None):
        """x [B,C,S,S], cls [B,Z], t [B], y [B] (K: no class), ids [B,Tk]: the tokens that g sees (None: all).
        Returns both velocities and zs, {depth: [B,T or Tk,Z]}; act, a dictionary, has the activations."""
        cfg, act, B, D = self.cfg, {} if act is None else act, len(x), self.cfg.hidden_size
        Lf, Lfg = cfg.num_f, cfg.depth - cfg.num_h
        zs, projector = {}, self.projectors[0] if cfg.on("align") else None
        def block_done(i, x):
            act[f"block.{i}"] = x
            if projector and i + 1 in cfg.depths:       # one projector for all depths
                zs[i + 1] = act[f"zs.{i + 1}" if cfg.align_depths else "zs"] = projector(x)
        # tokens and condition
        tokens = self.x_embedder.proj(x).flatten(2).transpose(1, 2)                     # [B,P,D]
        cos, sin = self.feat_rope.freqs_cos, self.feat_rope.freqs_sin                   # [P,Dh]
        if cfg.on("cls"):                       # first, and not rotated
            tokens = torch.cat([self.wg_norm(self.cls_projectors2(cls))[:, None], tokens], dim=1)
            cos, sin = torch.cat([torch.ones_like(cos[:1]), cos]), torch.cat([torch.zeros_like(sin[:1]), sin])
        x = act["embed"] = tokens + self.pos_embed                                      # [B,T,D]
        c = act["cond"] = self.t_embedder.mlp(self.time_features(t)) + self.y_embedder.embedding_table(y)
        # f, the encoder, on all T tokens
        rope, v1 = (cos[None], sin[None]), None
        for i in range(Lf):
            x, raw_v = self.blocks[i](x, c, rope, v1)
            v1 = raw_v if i == 0 else v1        # block 0's v, before any mixing
            block_done(i, x)
        E = x
        # g, the sparse middle, on the kept tokens, at their original positions
        mask = self.mask_token.expand(B, cfg.T, D)
        if path_drop and not self.training:
            G_pad = mask                        # nobody would read g: skip it
        else:
            g, g_rope, g_v1 = E, rope, v1
            if ids is not None:
                g, g_rope = torch.gather(E, 1, ids[..., None].expand(-1, -1, D)), (cos[ids], sin[ids])
                g_v1 = torch.gather(v1, 2, ids[:, None, :, None].expand(-1, v1.shape[1], -1, v1.shape[3]))
            for i in range(Lf, Lfg):
                g, _ = self.blocks[i](g, c, g_rope, g_v1)
                block_done(i, g)
            if ids is not None:
                g = mask.scatter(1, ids[..., None].expand(-1, -1, D), g)                # [B,T,D]
            G_pad = torch.where(torch.tensor(bool(path_drop)), mask, g)     # a gradient of 0 for g, not None
        # fusion, and h, the decoder, on all T tokens
        x = act["fused"] = self.fusion_proj(torch.cat([E, G_pad], dim=-1))
        for i in range(Lfg, cfg.depth):
            x, _ = self.blocks[i](x, c, rope, v1)
            block_done(i, x)
        act["out"], act["cls_out"] = self.final_layer(x, c)
        return act["out"], act["cls_out"], zs

# ---------------------------------------------------------------------------------- the loss, and the sampler

def training_loss(model, d, act=None):
    """The losses of one training step; d: its draws and inputs, a reference file's `in.` tensors."""
    cfg, out = model.cfg, {}
    y = torch.where(d["drop"].bool(), cfg.num_classes, d["y"]) if cfg.on("label_dropout") else d["y"]
    t, cls_t = cfg.shift_time(d["t"]), None     # [B]
    mix = lambda x, noise, t: (1 - t) * x + t * noise
    x_t, v = mix(d["x"], d["noise"], t[:, None, None, None]), d["noise"] - d["x"]       # [B,C,S,S]
    if cfg.on("cls"):
        cls_t, v_cls = mix(d["cls"], d["noise_cls"], t[:, None]), d["noise_cls"] - d["cls"]
    ids = d["ids_keep"] if cfg.on("routing") else None
    v_hat, v_cls_hat, zs = model(x_t, cls_t, t, y, ids, cfg.on("path_drop") and bool(d["path_drop"]), act)
    total = out["denoise"] = (v_hat - v).pow(2).mean()
    if cfg.on("cls"):
        out["cls"] = (v_cls_hat - v_cls).pow(2).mean()
        total = total + cfg.cls_coeff * out["cls"]
    if cfg.on("align"):                         # cosine of every token with the frozen encoder's
        unit, terms = (lambda x: F.normalize(x, dim=-1, eps=1e-12)), []
        for depth, z in zs.items():             # in g only of the kept tokens
            sparse = cfg.num_f < depth <= cfg.depth - cfg.num_h and cfg.on("routing")
            feats = d["feats"]
            if sparse:
                feats = torch.gather(feats, 1, d["ids_keep"][..., None].expand(-1, -1, cfg.z_dim))
            terms.append(-(unit(feats) * unit(z)).sum(-1).mean())
        out["proj"] = sum(terms) / len(terms)
        total = total + cfg.proj_coeff * out["proj"]
    if cfg.on("cfm"):                           # contrastive: away from the target of the sample before
        out["cfm"] = -(v_hat - v.roll(1, dims=0)).pow(2).mean()
        total = total + cfg.cfm_coeff * out["cfm"]
    out["total"] = total
    return out

def newton_schulz(x):                           # x [m,n] near U S V^T -> near U V^T
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x

class Muon:
    """Muon for the matrices that cfg.optimizer names, AdamW for the rest; both step in step()."""
    def __init__(self, cfg, named):
        self.cfg, self.of_muon, rest = cfg, [], []
        for name, p in named:
            parts = 3 if "attn.qkv" in name else 1
            if cfg.optimizer == "muon_srdit13":
                parts, mine = 1, p.dim() >= 2
            else:
                mine = p.dim() == 2 and name.split(".", 2)[-1] in (
                    "attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")
                mine = mine or name == "fusion_proj.weight"
            if mine:
                self.of_muon.append((p, parts, torch.zeros_like(p)))
            else:
                rest.append(p)
        self.adam = torch.optim.AdamW(rest, cfg.lr, (cfg.beta1, cfg.beta2), cfg.eps, cfg.weight_decay)

    @torch.no_grad()
    def step(self):
        self.adam.step()
        mu, lr = self.cfg.muon_momentum, self.cfg.muon_lr
        for p, parts, buffer in self.of_muon:
            buffer.mul_(mu).add_((1 - mu) * p.grad)
            g = mu * buffer + (1 - mu) * p.grad
            factor = math.sqrt(max(1, p.shape[-2] / parts / p.shape[-1]))
            x = torch.cat([newton_schulz(part.reshape(len(part), -1)).reshape(part.shape)
                           for part in g.chunk(parts)])
            p.mul_(1 - lr * self.cfg.muon_weight_decay).sub_(lr * factor * x)

@torch.no_grad()
def sample(model, x, cls, y, eps, cls_eps, steps, cfg_scale, cls_cfg_scale, low, high, path_drop):
    """Euler-Maruyama, t = 1 to 0: `steps` network evaluations, steps - 1 noises. The state is in double."""
    dtype, state = DTYPES[model.cfg.dtype], [s.double() for s in (x, cls) if s is not None]
    noises = [e.double() for e in (eps, cls_eps) if e is not None]
    times = torch.linspace(1, 0.04, steps, dtype=torch.float64)
    times = model.cfg.shift_time(F.pad(times, (0, 1))).tolist()         # 0 follows

    def drift(t, y, path_drop):                 # d = v - t score, of the latent and of CLS
        x, cls = state[0].to(dtype), state[1].to(dtype) if len(state) > 1 else None
        velocities = model(x, cls, torch.full((len(x),), t, dtype=dtype), y, None, path_drop)
        return [v.double() - t * (-((1 - t) * v.double() + s) / t) for s, v in zip(state, velocities)]

    model.eval()
    for i, t in enumerate(times[:-1]):
        dt, d = times[i + 1] - t, drift(t, y, False)                                    # dt < 0
        if cfg_scale > 1 and low <= t <= high:
            d_u = drift(t, torch.full_like(y, model.cfg.num_classes), path_drop)
            w = (cfg_scale, cls_cfg_scale if cls_cfg_scale > 0 else 1.0)      # 1: the conditional drift alone
            d = [u + w * (c - u) for c, u, w in zip(d, d_u, w)]
        state = [s + di * dt for s, di in zip(state, d)]
        if i < steps - 1:                       # the last step has no noise
            state = [s + math.sqrt(2 * t) * math.sqrt(-dt) * e[i] for s, e in zip(state, noises)]
    return state[0].to(dtype)

# ----------------------------------------------------------------------------------- the decoder of the INVAE

class ResnetBlock(nn.Module):
    def __init__(self, cin, cout, norm):        # norm(channels) makes a GroupNorm
        super().__init__()
        self.norm1, self.conv1 = norm(cin), nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2, self.conv2 = norm(cout), nn.Conv2d(cout, cout, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x):                       # [B,cin,h,w] -> [B,cout,h,w]
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))

class AttnBlock(nn.Module):
    def __init__(self, c, norm):
        super().__init__()
        self.norm = norm(c)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):                       # [B,c,h,w]: one head over the h*w places
        h = self.norm(x)
        q, k, v = (f(h).flatten(2) for f in (self.q, self.k, self.v))                   # [B,c,hw]
        a = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(x.shape[1]), dim=-1)        # [B,query,key]
        return x + self.proj_out((v @ a.transpose(1, 2)).view_as(x))

class Decoder(nn.Module):
    def __init__(self, ch, ch_mult, num_res_blocks, z_channels, out_ch, num_groups, norm_eps, attn_levels):
        super().__init__()
        norm, width = lambda c: nn.GroupNorm(num_groups, c, norm_eps), ch * ch_mult[-1]
        self.conv_in = nn.Conv2d(z_channels, width, 3, padding=1)
        self.mid = holder(block_1=ResnetBlock(width, width, norm), attn_1=AttnBlock(width, norm),
                          block_2=ResnetBlock(width, width, norm))
        levels = []
        for i in reversed(range(len(ch_mult))):                     # the last level, the smallest, runs first
            cin, width = width, ch * ch_mult[i]
            blocks = [ResnetBlock(cin if j == 0 else width, width, norm) for j in range(num_res_blocks + 1)]
            attn = [AttnBlock(width, norm) for _ in blocks] if i in attn_levels else []
            up = dict(upsample=holder(conv=nn.Conv2d(width, width, 3, padding=1))) if i > 0 else {}
            levels.append(holder(block=nn.ModuleList(blocks), attn=nn.ModuleList(attn), **up))
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out, self.conv_out = norm(width), nn.Conv2d(width, out_ch, 3, padding=1)

    def forward(self, h):                       # [B,z,h,w] -> [B,3,16h,16w] with 5 levels
        h = self.conv_in(h)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        for level in reversed(self.up):
            for j, block in enumerate(level.block):
                h = block(h)
                h = level.attn[j](h) if len(level.attn) else h
            if hasattr(level, "upsample"):
                h = level.upsample.conv(F.interpolate(h, scale_factor=2, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(h)))

def to_pixels(image):                           # [B,3,h,w] in about -1..1 -> U8 [B,h,w,3], not rounded
    return (255 * (image + 1) / 2).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()

# -------------------------------------------------------------------------------------------- reference files

ST_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64", torch.uint8: "U8"}
NP_DTYPES = {"F32": "<f4", "F64": "<f8", "I64": "<i8", "U8": "u1"}

def write_safetensors(path, meta, tensors):
    """Header length, the JSON header padded to 8 bytes, the data: wide types first, then by name."""
    header, offset = {"__metadata__": meta}, 0
    names = sorted(tensors, key=lambda n: (-tensors[n].element_size(), n))
    for name in names:
        x = tensors[name]
        end = offset + x.numel() * x.element_size()
        header[name] = dict(dtype=ST_DTYPES[x.dtype], shape=list(x.shape), data_offsets=[offset, end])
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            f.write(tensors[name].contiguous().numpy().tobytes())

def read_safetensors(path):
    with open(path, "rb") as f:
        header, data = json.loads(f.read(struct.unpack("<Q", f.read(8))[0])), f.read()
    meta = header.pop("__metadata__")
    return meta, {name: torch.from_numpy(np.frombuffer(data[slice(*h["data_offsets"])], NP_DTYPES[h["dtype"]])
                                         .reshape(h["shape"]).copy()) for name, h in header.items()}

def draw(seed, name):                           # a stream of random numbers for every tensor
    return np.random.RandomState([seed, zlib.crc32(name.encode())])

def normal(seed, name, *shape):
    return torch.from_numpy(np.asarray(draw(seed, name).standard_normal(shape)))

@torch.no_grad()
def randomize(model, seed):
    """Random values everywhere, at scales where nothing saturates and nothing vanishes."""
    for name, p in model.named_parameters():
        n = normal(seed, name, *p.shape)
        if name.endswith("v1_lambda"):
            p.copy_(0.5 + 0.2 * n)
        elif name.endswith(".weight") and p.dim() == 1:                 # a norm
            p.copy_(1 + 0.1 * n)
        elif name.endswith(".bias"):
            p.copy_(0.2 * n)
        elif name.startswith(("mask_token", "y_embedder")):
            p.copy_(0.5 * n)
        else:
            p.copy_(n / math.sqrt(p[0].numel()))

def sit_case(name, seed=1, batch=2, path_dropped=0, all_steps=0, sample_steps=4, sample_cfg_scale=1.0,
             sample_cls_cfg_scale=1.0, sample_guidance_low=0.0, sample_guidance_high=1.0, sample_path_drop=0,
             **config):
    """Metadata and tensors of one training-step file."""
    cfg = Config(**config)
    model, dtype, out = SRDiT(cfg), DTYPES[cfg.dtype], {}
    randomize(model, seed)
    B, K, N, Z = batch, cfg.num_classes, sample_steps, cfg.z_dim
    latent = cfg.in_channels, cfg.input_size, cfg.input_size
    floats = lambda key, *shape: normal(seed, key, *shape).to(dtype)
    uniform = lambda key: torch.from_numpy(draw(seed, key).random_sample(B))
    classes = lambda key: torch.from_numpy(draw(seed, key).randint(0, K, B)).long()
    only_if = lambda switch, x: x if cfg.on(switch) else None
    put = lambda pre, d: out.update({pre + k: x.detach().clone() for k, x in d.items() if x is not None})

    # One training step, and perhaps more of them on the same batch and draws.
    shuffle = draw(seed, "in.ids_keep").permutation
    drop_prob = cfg.class_dropout_prob if cfg.on("label_dropout") else 0
    ids = [shuffle(cfg.T)[:cfg.Tk] if cfg.on("routing") else np.arange(cfg.T) for _ in range(B)]
    d = dict(x=floats("in.x", B, *latent), noise=floats("in.noise", B, *latent), t=uniform("in.t").to(dtype),
             cls=only_if("cls", floats("in.cls", B, Z)),
             noise_cls=only_if("cls", floats("in.noise_cls", B, Z)), y=classes("in.y"),
             drop=(uniform("in.drop") < drop_prob).to(torch.uint8),
             feats=only_if("align", floats("in.feats", B, cfg.T, Z)),
             ids_keep=torch.from_numpy(np.stack(ids)).long(),
             path_drop=torch.tensor([path_dropped if cfg.on("path_drop") else 0], dtype=torch.uint8))
    if cfg.immiscible > 1:
        candidates = floats("in.noise_candidates", cfg.immiscible, B, *latent)
        nearest = ((candidates - d["x"]) ** 2).sum((2, 3, 4)).argmin(0)
        d["noise"] = candidates[nearest, torch.arange(B)]
        out["in.noise_candidates"] = candidates
    put("in.", d)
    put("param.", model.state_dict())
    params, act = dict(model.named_parameters()), {}
    start, ema = ({k: p.detach().clone() for k, p in params.items()} for _ in range(2))
    adam = torch.optim.AdamW(model.parameters(), cfg.lr, (cfg.beta1, cfg.beta2), cfg.eps, cfg.weight_decay)
    if cfg.optimizer != "adamw":
        adam = Muon(cfg, model.named_parameters())
    for k in range(1, cfg.steps + 1):
        model.zero_grad(set_to_none=True)
        losses = training_loss(model.train(), d, act)
        losses["total"].backward()
        if k == 1:
            put("act.", act)
            put("loss.", {key: x.reshape(1) for key, x in losses.items()})
            put("grad.", {key: p.grad for key, p in params.items()})
        # g *= min(1, max_grad_norm / (norm + 1e-6))
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm)
        out.setdefault("grad_norm", norm.detach().reshape(1))
        adam.step()
        ema = {key: cfg.ema_decay * ema[key] + (1 - cfg.ema_decay) * p.detach() for key, p in params.items()}
        if k == cfg.steps or all_steps:
            put(f"after{k}.", params)
            put(f"ema{k}.", ema if cfg.on("ema") else {})

    # Evaluation and sampling, with the parameters before the step.
    model.load_state_dict(start, strict=False)
    e = dict(x_t=floats("eval.x_t", B, *latent), cls_t=only_if("cls", floats("eval.cls_t", B, Z)),
             t=uniform("eval.t").to(dtype), y=classes("eval.y"))
    with torch.no_grad():
        e["v"], e["v_cls"], _ = model.eval()(e["x_t"], e["cls_t"], e["t"], e["y"])
        none = torch.full_like(e["y"], K)
        e["v_uncond"], e["v_cls_uncond"], _ = model(e["x_t"], e["cls_t"], e["t"], none, None, True)
    put("eval.", e)
    s = dict(latents=floats("sample.latents", B, *latent), y=classes("sample.y"),
             eps=floats("sample.eps", N - 1, B, *latent),
             cls_latents=only_if("cls", floats("sample.cls_latents", B, Z)),
             cls_eps=only_if("cls", floats("sample.cls_eps", N - 1, B, Z)))
    s["out"] = sample(model, s["latents"], s["cls_latents"], s["y"], s["eps"], s["cls_eps"], N,
                      sample_cfg_scale, sample_cls_cfg_scale, sample_guidance_low, sample_guidance_high,
                      bool(sample_path_drop))
    put("sample.", s)
    meta = dict(asdict(cfg), format="srdit-ref-1", kind="sit", case=name, seed=seed, qk_norm_eps=QK_NORM_EPS,
                tokens_kept=cfg.Tk, no_gradient=",".join(key for key, p in params.items() if p.grad is None),
                sample_steps=N, sample_cfg_scale=sample_cfg_scale,
                sample_cls_cfg_scale=sample_cls_cfg_scale, sample_guidance_low=sample_guidance_low,
                sample_guidance_high=sample_guidance_high, sample_path_drop=sample_path_drop)
    if cfg.optimizer != "adamw":
        meta["adamw_eps"], meta["muon_steps"] = meta.pop("eps"), 5
    defaults = {k: x for k, x in asdict(Config()).items() if k in LATER}
    return {k: str(x) for k, x in meta.items() if k not in defaults or x != defaults[k]}, out

def invae_case(name, seed=1, batch=1, height=2, width=2, ch=8, ch_mult="1,1,2,2,4", num_res_blocks=2,
               z_channels=4, num_groups=4, attn_levels="4", dtype="float64"):
    """Metadata and tensors of one decoder file."""
    sizes = dict(ch=ch, ch_mult=ch_mult, num_res_blocks=num_res_blocks, z_channels=z_channels, out_ch=3,
                 num_groups=num_groups, norm_eps=1e-6, attn_levels=attn_levels)
    ints = lambda s: [int(x) for x in s.split(",") if x]
    decoder = Decoder(**dict(sizes, ch_mult=ints(ch_mult), attn_levels=ints(attn_levels)))
    model = holder(post_quant_conv=nn.Conv2d(z_channels, z_channels, 1), decoder=decoder).to(DTYPES[dtype])
    randomize(model, seed)
    z = normal(seed, "in.z", batch, z_channels, height, width).to(DTYPES[dtype])
    with torch.no_grad():
        image = model.decoder(model.post_quant_conv(z))
    out = {"param." + k: p.detach() for k, p in model.named_parameters()}
    out.update({"in.z": z, "out.image": image, "out.pixels": to_pixels(image)})
    meta = dict(sizes, format="srdit-ref-1", kind="invae", case=name, seed=seed, dtype=dtype,
                latent_scale=0.3099)
    return {k: str(x) for k, x in meta.items()}, out

REF = os.path.join(os.path.dirname(os.path.abspath(__file__)), "ref")
CASES = {
    "base": (sit_case, dict(
        seed=101, batch=3, hidden_size=8, class_dropout_prob=0.4, shift_base=256.0, lr=1e-3, ema_decay=0.9,
        sample_cfg_scale=2.5, sample_cls_cfg_scale=1.7)),
    "path_drop": (sit_case, dict(
        seed=102, hidden_size=8, patch_size=2, in_channels=3, num_classes=4, path_dropped=1, steps=2,
        weight_decay=0.1, lr=1e-3, beta2=0.95, eps=1e-5, max_grad_norm=100.0, ema_decay=0.99, sample_steps=3,
        sample_cfg_scale=1.5, sample_cls_cfg_scale=1.5, sample_path_drop=1)),
    "batch1": (sit_case, dict(
        seed=103, batch=1, depth=3, num_f=1, num_h=1, hidden_size=8, num_heads=1, in_channels=2,
        input_size=8, patch_size=4, drop_ratio=0.5, class_dropout_prob=0.0, cfm_coeff=0.2, steps=3,
        all_steps=1, lr=1e-2, beta1=0.8, ema_decay=0.5, sample_steps=1, sample_cfg_scale=3.0,
        sample_cls_cfg_scale=0.5)),
    "wide": (sit_case, dict(
        seed=104, batch=4, depth=3, num_f=1, num_h=1, hidden_size=24, num_heads=3, patch_size=2,
        in_channels=8, mlp_ratio=0.7, z_dim=20, projector_dim=12, class_dropout_prob=0.5,
        max_grad_norm=1000.0, lr=1e-3, ema_decay=0.8, sample_steps=5, sample_cfg_scale=2.0,
        sample_cls_cfg_scale=0.0, sample_guidance_low=0.1)),
    "deep_h": (sit_case, dict(
        seed=105, batch=3, num_f=1, num_h=3, hidden_size=8, input_size=3, in_channels=1, num_classes=2,
        drop_ratio=0.5, class_dropout_prob=0.5, z_dim=8, shift_base=64.0, cls_coeff=1.0, proj_coeff=2.0,
        max_grad_norm=0.1, lr=1e-3, sample_cls_cfg_scale=2.0)),
    "shift_up": (sit_case, dict(
        seed=106, batch=5, depth=3, num_f=1, num_h=1, hidden_size=12, num_heads=1, patch_size=2,
        in_channels=8, mlp_ratio=1.5, drop_ratio=0.5, class_dropout_prob=0.3, shift_base=44.0, lr=1e-3,
        weight_decay=0.01, sample_steps=5, sample_cfg_scale=1.8, sample_cls_cfg_scale=1.3,
        sample_guidance_low=0.3, sample_guidance_high=0.7, sample_path_drop=1)),
    "off_cls": (sit_case, dict(
        seed=107, switch_off="cls", depth=3, num_f=1, num_h=1, hidden_size=8, shift_base=256.0, lr=1e-3,
        ema_decay=0.9, sample_cfg_scale=2.0, sample_path_drop=1)),
    "off_attention": (sit_case, dict(
        seed=108, switch_off="qk_norm,rope,value_residual,align", depth=3, num_f=1, num_h=1, hidden_size=8,
        num_heads=2, lr=1e-3, eps=1e-6, ema_decay=0.9, sample_cfg_scale=0.5)),
    "off_training": (sit_case, dict(
        seed=109, switch_off="routing,path_drop,cfm,time_shift,label_dropout,ema", batch=3, depth=3,
        num_f=1, num_h=1, hidden_size=8, num_heads=1, patch_size=2, steps=2, lr=1e-3, sample_cfg_scale=1.5,
        sample_cls_cfg_scale=1.5, sample_guidance_low=0.3)),
    "base_f32": (sit_case, dict(
        seed=118, dtype="float32", depth=4, num_h=1, hidden_size=8, shift_base=256.0, lr=1e-3,
        ema_decay=0.9, sample_cfg_scale=1.4, sample_cls_cfg_scale=1.4)),
    "muon": (sit_case, dict(
        seed=119, depth=3, num_f=1, num_h=1, hidden_size=8, z_dim=6, projector_dim=10, shift_base=256.0,
        lr=1e-3, ema_decay=0.9, steps=5, optimizer="muon_split", muon_lr=0.02, weight_decay=0.1,
        muon_weight_decay=0.2)),
    "srdit13": (sit_case, dict(
        seed=120, depth=4, num_f=1, num_h=1, hidden_size=8, num_heads=1, patch_size=2, in_channels=2,
        z_dim=6, projector_dim=10, mlp_ratio=2.0, shift_base=256.0, lr=1e-3, eps=1e-15, ema_decay=0.9,
        path_dropped=1, steps=5, optimizer="muon_srdit13", muon_momentum=0.9, align_depths="1,2",
        immiscible=8)),
    "depths": (sit_case, dict(
        seed=121, depth=4, num_f=1, num_h=1, hidden_size=8, z_dim=6, projector_dim=10, shift_base=256.0,
        lr=1e-3, ema_decay=0.9, align_depths="1,3,4", mlp_widths="64,64,13,192")),
    "invae_16x": (invae_case, dict(seed=201, ch=4, height=2, width=3)),
    "invae_2x": (invae_case, dict(
        seed=202, batch=2, ch=4, ch_mult="1,2", num_res_blocks=1, z_channels=6, num_groups=2,
        attn_levels="1", height=5, width=3)),
}

def random_case(seed):
    """Sizes and settings that nobody chose."""
    rs = np.random.RandomState(seed)
    pick, between = lambda *xs: xs[rs.randint(len(xs))], lambda low, high: int(rs.randint(low, high + 1))
    f, g, h, H = between(1, 3), between(0, 3), between(1, 3), between(1, 4)
    p, low = pick(1, 1, 2, 2, 4), pick(0.0, 0.1, 0.3)
    case = dict(
        seed=seed, batch=between(1, 5), depth=f + g + h, num_f=f, num_h=h, num_heads=H,
        hidden_size=4 * H * between(1, 4), patch_size=p, input_size=p * between(1, 4),
        in_channels=between(1, 8), num_classes=between(1, 12), z_dim=between(4, 40),
        projector_dim=between(4, 48), drop_ratio=pick(0.75, 0.5, 0.9, 0.0, round(rs.rand(), 2)),
        mlp_ratio=pick(4.0, 4.0, 1.0, 2.7), class_dropout_prob=pick(0.0, 0.1, 0.5, 1.0),
        cls_coeff=pick(0.03, 1.0), proj_coeff=pick(0.5, 1.5), cfm_coeff=pick(0.05, 0.3),
        shift_base=pick(4096.0, 256.0, 20.0), lr=pick(1e-4, 1e-2), beta1=pick(0.9, 0.5),
        beta2=pick(0.999, 0.9), eps=pick(1e-8, 1e-6), weight_decay=pick(0.0, 0.0, 0.1),
        max_grad_norm=pick(1.0, 0.1, 1000.0), ema_decay=pick(0.9999, 0.7), steps=between(1, 3),
        all_steps=between(0, 1), dtype=pick("float64", "float64", "float32"),
        path_dropped=int(rs.rand() < 0.25), sample_steps=between(1, 5),
        switch_off=",".join(s for s in SWITCHES if rs.rand() < 0.08), sample_cfg_scale=pick(1.0, 1.4, 2.5),
        sample_cls_cfg_scale=pick(0.0, 1.0, 1.8), sample_guidance_low=low,
        sample_guidance_high=low + pick(0.3, 0.7), sample_path_drop=between(0, 1), **later_of(rs, f + g + h))
    if "align" in case["switch_off"].split(","):
        case.pop("align_depths", None)   # nothing is aligned, at whatever depth
    return case

def later_of(rs, depth):
    """Of every third file what came after the paper, in part"""
    if rs.rand() > 0.33:
        return {}
    pick = lambda *xs: xs[rs.randint(len(xs))]
    depths = [i for i in range(1, depth + 1) if rs.rand() < 0.4][:8]
    return dict(optimizer=pick("adamw", "muon_split", "muon_srdit13"), muon_lr=pick(1e-3, 0.02),
                muon_momentum=pick(0.95, 0.5), muon_weight_decay=pick(0.0, 0.1), immiscible=pick(1, 2, 8),
                align_depths=",".join(map(str, depths)),
                mlp_widths=pick("", ",".join(str(rs.randint(1, 70)) for _ in range(depth))))

# ------------------------------------------------------------------------------------------------- the checks

def differences(ours, theirs, settings):
    """Two files, as (metadata, tensors): the largest used share of the tolerance, and the complaints."""
    bad, worst = [], 0.0
    for what, a, b in (("metadata", ours[0], theirs[0]), ("tensors", ours[1], theirs[1])):
        bad += [f"{what}: {k} is in one of the two only" for k in sorted(set(a) ^ set(b))]
    bad += [f"metadata: {k}: {theirs[0][k]}, not {x}" for k, x in ours[0].items() if theirs[0].get(k, x) != x]
    for k in sorted(set(ours[1]) & set(theirs[1])):
        a, b = ours[1][k], theirs[1][k]
        if a.shape != b.shape or a.dtype != b.dtype:
            bad.append(f"{k}: {b.dtype} {list(b.shape)}, not {a.dtype} {list(a.shape)}")
        elif a.numel():
            err, top = float((a.double() - b.double()).abs().max()), float(b.double().abs().max())
            tol = top * {torch.float64: 1e-12, torch.float32: 256 * 2.0 ** -23}.get(a.dtype, 0)
            if a.dtype == torch.float32 and k.startswith(("after", "ema")):   # Adam divides g by its own size
                tol += 0.1 * settings["lr"] * settings.get("steps", 1)
            if not err <= tol:                  # so that NaN complains
                bad.append(f"{k}: off by {err:.3g}, {tol:.3g} is allowed")
            worst = max(worst, err / tol if tol else 0.0)
    return worst, bad

def check_gradients(name="base", h=1e-5):
    """The loss's slope along one entry of every parameter, by central difference, against autograd's."""
    meta, tensors = sit_case(name, **CASES[name][1])
    under = lambda prefix: {k[len(prefix):]: x for k, x in tensors.items() if k.startswith(prefix)}
    model = SRDiT(Config(**{f.name: f.type(meta[f.name]) for f in fields(Config) if f.name in meta})).train()
    d, grads, worst = under("in."), under("grad."), 0.0
    model.load_state_dict(under("param."))
    with torch.no_grad():
        for key, p in model.named_parameters():
            grad, flat, loss = grads[key].flatten(), p.view(-1), []
            i = int(grad.abs().argmax())
            for step in (h, -2 * h):
                flat[i] += step
                loss.append(float(training_loss(model, d)["total"]))
            flat[i] += h
            err = abs((loss[0] - loss[1]) / (2 * h) - float(grad[i])) / (abs(float(grad[i])) + 1e-3)
            worst = err if not err <= worst else worst
    return worst <= 1e-6, f"the loss's finite differences and gradient: {worst:.1e} apart, 1e-6 is allowed"

def check_b1():
    b1 = Config(depth=12, hidden_size=768, num_heads=12, in_channels=32, input_size=16, num_classes=1000,
                z_dim=768, projector_dim=2048, dtype="float32")
    n = sum(p.numel() for p in SRDiT(b1, device="meta").parameters())   # shapes without memory
    return n == 140_037_675, f"SR-DiT-B/1 has {n:,} trained parameters; they are 140,037,675"

def check_start():
    model, x = SRDiT(Config(dtype="float32")), torch.ones(2, 4, 4, 4)
    model.init_weights()
    v, v_cls, _ = model(x, torch.ones(2, 12), torch.full((2,), 0.5), torch.tensor([0, 10]))
    most = float(v.abs().max() + v_cls.abs().max())
    return most == 0, f"where a real run starts the velocity is zero: {most:g}"

def check():
    good, total = True, 0
    def say(fine, text):
        nonlocal good
        good = good and fine
        print("ok  " if fine else "FAIL", text)
    for name, (make, settings) in CASES.items():
        path = os.path.join(REF, name + ".safetensors")
        if not os.path.exists(path):
            say(False, f"{name} is missing; python3 dev/reference.py write")
            continue
        worst, bad = differences(make(name, **settings), read_safetensors(path), settings)
        total += os.path.getsize(path)
        say(not bad, f"{name:14s} {os.path.getsize(path):9,} bytes, {worst:.3f} of the tolerance used")
        print("".join(f"       {line}\n" for line in bad[:5]), end="")
    strangers = sorted(set(os.listdir(REF)) - {name + ".safetensors" for name in CASES})
    say(not strangers, f"files in dev/ref that no case wrote: {', '.join(strangers) or 'none'}")
    say(total < 6e6, f"all files have {total:,} bytes; 6,000,000 are allowed")
    for fact in (check_gradients, check_b1, check_start):
        say(*fact())
    return good

def main():
    torch.set_num_threads(1)                    # so that no sum's order depends on the machine
    fmt, raw = argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", metavar="write | check | case | decoder | random")
    commands.add_parser("write", help="write dev/ref again")
    commands.add_parser("check", help="compare dev/ref with a fresh computation, and check the twin itself")
    for command, make, text in (("case", sit_case, "write one training-step file of any size"),
                                ("decoder", invae_case, "write one decoder file of any size")):
        sub = commands.add_parser(command, help=text, formatter_class=fmt)
        sub.add_argument("--out", required=True, help="the file")
        settings = asdict(Config()) if make is sit_case else {}
        settings.update({k: p.default for k, p in inspect.signature(make).parameters.items()})
        for k in ("name", "config", "switch_off"):
            settings.pop(k, None)
        for k, x in settings.items():
            choices = list(DTYPES) if k == "dtype" else None
            sub.add_argument("--" + k, type=type(x), default=x, help=" ", choices=choices)
        if make is sit_case:
            sub.add_argument("--off", dest="switch_off", default="", metavar="NAME,...",
                             help="of " + ", ".join(SWITCHES))
    sub = commands.add_parser("random", help="write files of random sizes and settings", formatter_class=fmt)
    sub.add_argument("--count", type=int, default=10, help=" ")
    sub.add_argument("--seed", type=int, default=1, help="of the first; the others count up")
    sub.add_argument("--out", required=True, help="the folder")
    args = vars(parser.parse_args())
    command, out, todo = args.pop("command"), args.pop("out", REF), []
    if command == "check":
        sys.exit(0 if check() else 1)
    elif command in ("case", "decoder"):
        todo = [(out, sit_case if command == "case" else invae_case, args)]
    elif command == "write":
        todo = [(os.path.join(REF, name + ".safetensors"), *case) for name, case in CASES.items()]
    elif command == "random":
        todo = [(os.path.join(out, f"random_{seed}.safetensors"), sit_case, random_case(seed))
                for seed in range(args["seed"], args["seed"] + args["count"])]
    else:
        parser.print_help()
    for path, make, settings in todo:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        write_safetensors(path, *make(os.path.basename(path).split(".")[0], **settings))
        print(f"{path}  {os.path.getsize(path):,} bytes")

if __name__ == "__main__":
    main()
