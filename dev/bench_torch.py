#!/usr/bin/env python3
"""How fast is the same training step in PyTorch? The yardstick of train_srdit.cu.

The model is dev/reference.py's with what costs speed replaced: torch.compile over model and loss, autocast to
bf16, the SDPA backend that is fastest on these shapes, fused AdamW, foreach clipping and EMA. Latents,
features and labels are synthetic and lie on the GPU (no data loading, no encoder); noise, times, labels to
drop and tokens to keep are drawn anew in every step. `--check` compares loss and gradients with
dev/reference.py.

  python3 dev/bench_torch.py                        SR-DiT-B/1 at batch 256 on the GPU
  python3 dev/bench_torch.py --compile default,max-autotune-no-cudagraphs --json build/bench_torch.json
  python3 dev/bench_torch.py --tiny --cpu --check   whether it runs (torch 1.13 or newer); no speed
"""
import argparse, json, math, os, sys, time
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import reference
from reference import Config, SRDiT, apply_rope
import torch, torch.nn.functional as F

PEAK, STEPS = 989.4e12, 400_000             # dense bf16 FLOP/s of an H100 SXM; steps of a full training
MODERN = hasattr(torch, "compile")          # torch 2

def step_flops(c, B):
    """Three times the forward's multiply-adds times two; 20.895e12 for B/1 at batch 256."""
    D, T, Tk, Z, M = c.hidden_size, c.T, c.Tk, c.z_dim, c.projector_dim
    sparse = c.depth - c.num_f - c.num_h
    token = 2 * (4 * D * D + 2 * D * int(D * c.mlp_ratio))
    f = (c.num_f + c.num_h) * (B * T * token + 4 * B * T * T * D)               # dense blocks
    f += sparse * (B * Tk * token + 4 * B * Tk * Tk * D)
    f += 2 * B * T * 2 * D * D + 2 * B * T * (D * M + M * M + M * Z)            # fusion, projector
    f += 2 * B * (c.depth * 6 + 2) * D * D + 2 * B * (256 * D + D * D)          # modulation, time
    f += 2 * B * c.P * c.patch_size ** 2 * c.in_channels * D * 2 + 4 * B * D * Z    # patches, CLS: in and out
    return 3 * f

# ----------------------------------------------------------------------------------------------------------
# The model. Norms in float, as the reference's autocast would; attention by SDPA

def wide(x):
    return x.float() if x.dtype == torch.bfloat16 else x

def rms_norm(x, eps=1e-6):
    x = wide(x)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

def attention_forward(self, x, rope, v1):
    (B, T, D), H = x.shape, self.cfg.num_heads
    q, k, v = raw = self.qkv(x).view(B, T, 3, H, D // H).permute(2, 0, 3, 1, 4)     # 3 x [B,H,T,Dh]
    if self.cfg.on("qk_norm"):
        q, k = self.q_norm(q), self.k_norm(k)
    if self.v1_lambda is not None:
        v = torch.lerp(v, v1, self.v1_lambda.to(v.dtype))
    if self.cfg.on("rope"):
        q, k = apply_rope(q, rope), apply_rope(k, rope)
    q, k = q.to(v.dtype), k.to(v.dtype)
    if MODERN:
        a = F.scaled_dot_product_attention(q, k, v)
    else:
        a = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(D // H), dim=-1) @ v
    return self.proj(a.transpose(1, 2).reshape(B, T, D)), raw[2]

ORIGINAL = reference.rms_norm, reference.Attention.forward
def patch(parts):
    reference.rms_norm, reference.Attention.forward = parts

class Model(SRDiT):
    def time_features(self, t):
        angle = t[:, None] * 10000.0 ** (-torch.arange(128, dtype=t.dtype, device=t.device) / 128)
        return torch.cat([angle.cos(), angle.sin()], dim=-1)

    def forward(self, x, cls, t, y, ids, path_drop):        # path_drop [], a tensor: one graph for both kinds
        cfg, B, D = self.cfg, len(x), self.cfg.hidden_size
        dense, sparse = cfg.num_f, cfg.depth - cfg.num_h
        tokens = self.x_embedder.proj(x).flatten(2).transpose(1, 2)
        cos, sin = self.feat_rope.freqs_cos, self.feat_rope.freqs_sin
        if cfg.on("cls"):
            tokens = torch.cat([self.wg_norm(self.cls_projectors2(cls))[:, None], tokens], dim=1)
            cos, sin = F.pad(cos, (0, 0, 1, 0), value=1.0), F.pad(sin, (0, 0, 1, 0))
        x = tokens + self.pos_embed
        c = self.t_embedder.mlp(self.time_features(t)) + self.y_embedder.embedding_table(y)
        rope, v1 = (cos[None], sin[None]), None
        for i in range(dense):
            x, raw_v = self.blocks[i](x, c, rope, v1)
            v1 = raw_v if i == 0 else v1
        E = x
        zs = self.projectors[0](E) if cfg.on("align") else None
        mask = self.mask_token.expand(B, cfg.T, D).to(x.dtype)
        g, g_rope, g_v1 = E, rope, v1
        if ids is not None:
            rows = ids[..., None].expand(-1, -1, D)
            g, g_rope = torch.gather(E, 1, rows), (cos[ids], sin[ids])
            g_v1 = torch.gather(v1, 2, ids[:, None, :, None].expand(-1, v1.shape[1], -1, v1.shape[3]))
        for i in range(dense, sparse):
            g, _ = self.blocks[i](g, c, g_rope, g_v1)
        if ids is not None:
            g = mask.scatter(1, rows, g.to(mask.dtype))
        x = self.fusion_proj(torch.cat([E, torch.where(path_drop, mask, g)], dim=-1))
        for i in range(sparse, cfg.depth):
            x, _ = self.blocks[i](x, c, rope, v1)
        return (*self.final_layer(x, c), zs)

def loss_of(model, d):
    """reference.training_loss, for a path_drop that stays on the GPU."""
    cfg, cls_t = model.cfg, None
    y = torch.where(d["drop"], cfg.num_classes, d["y"]) if cfg.on("label_dropout") else d["y"]
    t = cfg.shift_time(d["t"])
    x_t, v = torch.lerp(d["x"], d["noise"], t[:, None, None, None]), d["noise"] - d["x"]
    if cfg.on("cls"):
        cls_t, v_cls = torch.lerp(d["cls"], d["noise_cls"], t[:, None]), d["noise_cls"] - d["cls"]
    ids = d["ids_keep"] if cfg.on("routing") else None
    v_hat, v_cls_hat, zs = model(x_t, cls_t, t, y, ids, d["path_drop"])
    v_hat = wide(v_hat)
    total = (v_hat - v).square().mean()
    if cfg.on("cls"):
        total = total + cfg.cls_coeff * (wide(v_cls_hat) - v_cls).square().mean()
    if cfg.on("align"):
        cosine = F.cosine_similarity(wide(d["feats"]), wide(zs), dim=-1, eps=1e-12)
        total = total - cfg.proj_coeff * cosine.mean()
    if cfg.on("cfm"):
        total = total - cfg.cfm_coeff * (v_hat - v.roll(1, dims=0)).square().mean()
    return total

# ----------------------------------------------------------------------------------------------------------
# Data and optimizer

def fixed_data(cfg, B, device):
    """What a data loader would have put on the GPU."""
    return dict(x=torch.randn(B, cfg.in_channels, cfg.input_size, cfg.input_size, device=device),
                cls=torch.randn(B, cfg.z_dim, device=device),
                feats=torch.randn(B, cfg.T, cfg.z_dim, device=device).to(torch.bfloat16),
                y=torch.randint(cfg.num_classes, (B,), device=device))

def draw(cfg, data, B, device):
    """One step's draws."""
    uniform = lambda *shape: torch.rand(shape, device=device)
    return dict(data, noise=torch.randn_like(data["x"]), noise_cls=torch.randn_like(data["cls"]),
                t=uniform(B), drop=uniform(B) < cfg.class_dropout_prob, path_drop=uniform(1)[0] < 0.05,
                ids_keep=uniform(B, cfg.T).argsort(dim=1)[:, :cfg.Tk].sort(dim=1)[0])

class Optimizer:
    def __init__(self, model):
        self.cfg, self.params = model.cfg, [p for p in model.parameters()]
        self.ema = [p.detach().clone() for p in self.params]
        c, fused = self.cfg, dict(fused=True) if self.params[0].is_cuda else {}
        self.adam = torch.optim.AdamW(self.params, lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps,
                                      weight_decay=c.weight_decay, **fused)

    def step(self):
        foreach = dict(foreach=True) if MODERN and self.params[0].is_cuda else {}
        torch.nn.utils.clip_grad_norm_(self.params, self.cfg.max_grad_norm, **foreach)
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        with torch.no_grad():
            if hasattr(torch, "_foreach_lerp_"):
                torch._foreach_lerp_(self.ema, self.params, 1 - self.cfg.ema_decay)
            else:
                for e, p in zip(self.ema, self.params):
                    e.lerp_(p, 1 - self.cfg.ema_decay)

# ----------------------------------------------------------------------------------------------------------

def sdpa_backends(cfg, B, device, log):
    """The backends of SDPA, the fastest forward + backward over both sequence lengths first."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    times, heads, Dh = {}, cfg.num_heads, cfg.hidden_size // cfg.num_heads
    for name in ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"):
        backend, total = getattr(SDPBackend, name, None), 0.0
        if backend is None:
            continue
        try:
            for T, count in ((cfg.T, cfg.num_f + cfg.num_h), (cfg.Tk, cfg.depth - cfg.num_f - cfg.num_h)):
                qkv = torch.randn(3, B, T, heads, Dh, device=device, dtype=torch.bfloat16)
                q, k, v = (x.transpose(1, 2).requires_grad_() for x in qkv)
                with sdpa_kernel(backend):
                    run = lambda: F.scaled_dot_product_attention(q, k, v).sum().backward()
                    total += count * milliseconds(run, 5, 10, device)
            times[name] = total
        except RuntimeError as e:
            log(f"  {name}: {str(e).splitlines()[0]}")
    for name in sorted(times, key=times.get):
        log(f"  {name}: {times[name]:.2f} ms a step (forward and backward, eager)")
    return [getattr(SDPBackend, name) for name in sorted(times, key=times.get)]

def milliseconds(run, warmup, steps, device):
    """Mean over `steps` calls between two CUDA events."""
    for _ in range(warmup):
        run()
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(steps):
            run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / steps
    start = time.time()
    for _ in range(steps):
        run()
    return 1e3 * (time.time() - start) / steps

def bench(cfg, args, device, mode, backend, log):
    """{what was measured} of one way to compile."""
    torch.manual_seed(args.seed)
    if mode != "none":
        torch._dynamo.reset()
    model = Model(cfg, device=device)
    model.init_weights()
    model.train()
    data, optimizer, B = fixed_data(cfg, args.batch, device), Optimizer(model), args.batch
    loss_fn = loss_of
    if mode != "none":
        loss_fn = torch.compile(loss_of, fullgraph=True, mode=None if mode == "default" else mode)
    losses = []
    def step():
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = loss_fn(model, draw(cfg, data, B, device))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    def timed():
        start = time.time()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        log(f"  first step (compiles): {time.time() - start:.1f} s")
        milliseconds(step, args.warmup, 1, device)
        return [milliseconds(step, 0, args.steps, device) for i in range(args.repeats)]
    if backend is None:
        times = timed()
    else:
        from torch.nn.attention import sdpa_kernel
        with sdpa_kernel(backend):
            times = timed()
    ms, flops = sorted(times)[len(times) // 2], step_flops(cfg, B)
    last = float(losses[-1])
    if not math.isfinite(last):
        sys.exit(f"the loss is {last}")
    return dict(mode=mode, sdpa=backend.name if backend is not None else "none", ms_per_step=ms, all_ms=times,
                images_per_s=B / ms * 1e3, tflop_per_step=flops / 1e12, mfu=flops / (ms * 1e-3) / PEAK,
                hours_400k=ms * STEPS / 3.6e6, first_loss=float(losses[0]), last_loss=last,
                memory_gb=torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None)

def check(log, B=4):
    """The same function as the reference: loss and gradients in double, random weights."""
    cfg = Config(depth=3, num_f=1, num_h=1, hidden_size=32, num_heads=2, dtype="float64")
    torch.manual_seed(1)
    ours, theirs = Model(cfg), SRDiT(cfg)
    with torch.no_grad():
        for p in ours.parameters():
            p.copy_(torch.randn_like(p) * 0.2 + (1.0 if p.ndim == 1 and p.mean() == 1 else 0.0))
    theirs.load_state_dict(ours.state_dict())
    d = draw(cfg, fixed_data(cfg, B, torch.device("cpu")), B, torch.device("cpu"))
    d = {k: v.double() if v.is_floating_point() else v for k, v in d.items()}
    worst = 0.0
    for path_drop in (False, True):
        d["path_drop"] = torch.tensor(path_drop)
        patch((rms_norm, attention_forward))
        a = loss_of(ours.train(), d)
        patch(ORIGINAL)
        b = reference.training_loss(theirs.train(), d)["total"]
        ga, gb = (torch.autograd.grad(loss, list(m.parameters())) for loss, m in ((a, ours), (b, theirs)))
        pairs = [(a[None], b[None])] + list(zip(ga, gb))
        apart = [(x - y).abs().max() / y.abs().max().clamp(min=1e-12) for x, y in pairs]
        worst = max(worst, float(torch.stack(apart).detach().max()))
    patch((rms_norm, attention_forward))
    log(f"against dev/reference.py, loss and all gradients: {worst:.1e} apart (1e-9 is allowed)")
    return worst <= 1e-9

def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=30, help="timed at once [30]")
    parser.add_argument("--repeats", type=int, default=3, help="the middle of these means counts [3]")
    parser.add_argument("--warmup", type=int, default=15, help="steps before them [15]")
    parser.add_argument("--compile", metavar="MODE,...", help="of torch.compile: default, reduce-overhead, "
                        "max-autotune-no-cudagraphs, ...; none: eager. The best counts [default; on a CPU none]")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="a model of seconds instead of B/1")
    parser.add_argument("--cpu", action="store_true", help="no speed: only whether it runs")
    parser.add_argument("--check", action="store_true", help="first compare with dev/reference.py")
    parser.add_argument("--json", metavar="FILE", help="write the results there too")
    args = parser.parse_args()
    log = lambda text: print(text, flush=True)
    patch((rms_norm, attention_forward))
    tiny = dict(depth=3, num_f=1, num_h=1, hidden_size=32, num_heads=2)
    b1 = dict(depth=12, hidden_size=768, num_heads=12, in_channels=32, input_size=16, num_classes=1000,
              z_dim=768, projector_dim=2048)
    make = lambda: Config(dtype="float32", **(tiny if args.tiny else b1))
    if args.tiny and args.batch == 256:
        args.batch, args.steps, args.warmup = 4, 3, 1
    if not args.cpu and not torch.cuda.is_available():
        sys.exit("no GPU: only --tiny --cpu works here")
    device = torch.device("cpu" if args.cpu else "cuda")
    if args.check and not check(log):
        sys.exit("the yardstick is not the reference's function")
    modes = (args.compile or ("none" if args.cpu else "default")).split(",")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    log(f"{name}, torch {torch.__version__}" + ("; SDPA on these shapes:" if MODERN else ""))
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    backends = sdpa_backends(make(), args.batch, device, log) if MODERN else []
    results = []
    for mode in modes:
        log(f"compile {mode}, batch {args.batch}:")
        r = bench(make(), args, device, mode, backends[0] if backends else None, log)
        results.append(r)
        log(f"  {r['ms_per_step']:.2f} ms/step  {r['images_per_s']:.0f} images/s  "
            f"{r['tflop_per_step']:.3f} TFLOP a step: MFU {100 * r['mfu']:.1f} % of 989.4  "
            f"{r['hours_400k']:.2f} hours for 400,000 steps  "
            f"loss {r['first_loss']:.4f} -> {r['last_loss']:.4f}")
    best = min(results, key=lambda r: r["ms_per_step"])
    log(f"best: {best['ms_per_step']:.2f} ms/step with compile {best['mode']}")
    if args.json:
        summary = dict(device=name, torch=torch.__version__, batch=args.batch, best=best, all=results)
        with open(args.json, "w") as f:
            json.dump(summary, f, indent=1)

if __name__ == "__main__":
    main()
