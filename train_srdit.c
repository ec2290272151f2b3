// SR-DiT, the Speedrun Diffusion Transformer (arXiv 2512.12386), trained on the CPU in one file of plain C.
//
// What this file is: the whole training program, to be read from top to bottom: configuration, random
// numbers, safetensors, matrix product, every layer forward and backward with its derivation, the model, the
// loss, AdamW, the sampler, data, checkpoints, the training loop. It is also the reference that
// train_srdit.cu (the same on a GPU), sample.c and test_srdit.c include. What it refuses to become: a
// framework. There is no tape and no graph: each backward is written by hand beside its forward.
//
//   make && ./train_srdit            train the nano model on the bundled digits (about a minute on two cores)
//   ./train_srdit --help             every flag with its default
//
// The language is the one that C and C++ share, so that nvcc can compile it too. It needs libc and libm;
// OpenMP is used where there is one. `real` is float, or double in the build that checks gradients
// (-DUSE_DOUBLE).
//
// Letters, as in the paper and in dev/reference.py:
//   B batch            C, S latent channels, side    p patch size          P = (S/p)^2 patches
//   T = P + 1 tokens, CLS first (P without it)       Tk tokens kept in the sparse middle
//   D width            H heads      Dh = D/H         L = Lf + Lg + Lh blocks: encoder f, sparse g, decoder h
//   Z width of the alignment features and of CLS     M hidden width of the projector       K classes
// In signatures outputs come first, then inputs, then sizes; dX is the gradient of the loss by X.
#include "dev/lib/cli.h"
#include "dev/lib/matmul.h"
#include "dev/lib/picture.h"
#include "dev/lib/random.h"
#include "dev/lib/shards.h"
#include <ctype.h>
#include <sys/file.h>
#include <sys/mman.h>


// A block of memory handed out from the front. With base NULL it only counts: the same walk is made twice,
// first to learn the size, then to set the pointers. Every piece starts at a multiple of 64 elements.
typedef struct { real *base; size_t used; } Arena;
static real *take(Arena *a, size_t count) {
    real *p = a->base ? a->base + a->used : NULL;
    a->used += (count + 63) / 64 * 64;
    return p;
}

enum Stream { STREAM_INIT = 1, STREAM_ORDER, STREAM_TIME, STREAM_LABEL_DROP, STREAM_ROUTE, STREAM_PATH_DROP,
              STREAM_NOISE, STREAM_NOISE_CLS, STREAM_SAMPLE_X, STREAM_SAMPLE_CLS, STREAM_SAMPLE_LABEL };

// ----------------------------------------------------------------------------------------------------------
// Configuration: one table gives each setting its name in files, its flag, its range and its help

typedef struct {
    int depth, hidden_size, num_heads, patch_size, in_channels, input_size, num_classes, z_dim, projector_dim;
    int num_f, num_h;
    double mlp_ratio, drop_ratio, class_dropout_prob, path_drop_prob;
    double cls_coeff, proj_coeff, cfm_coeff, shift_base;
    double lr, beta1, beta2, eps, weight_decay, max_grad_norm, ema_decay;
    int ema_warmup;
    // one switch per technique of the paper
    int routing, path_drop, align, cls, cfm, qk_norm, rope, value_residual, time_shift, label_dropout, ema;
} Config;

enum { MAX_DEPTH = 128 };
#define SETTING(name, kind, low, high, fixed, help) \
    {#name, kind, offsetof(Config, name), low, high, fixed, help}
static const Option config_options[] = {   // fixed: 1 where a tensor's shape depends on it
    SETTING(depth, WHOLE, 1, MAX_DEPTH, 1, "blocks, L"),
    SETTING(hidden_size, WHOLE, 4, 65536, 1, "width, D"),
    SETTING(num_heads, WHOLE, 1, 1024, 1, "heads, H; D/H must be divisible by 4"),
    SETTING(patch_size, WHOLE, 1, 1024, 1, "patch side, p; must divide the latent side"),
    SETTING(in_channels, WHOLE, 1, 65536, 1, "latent channels, C (default: what the data has)"),
    SETTING(input_size, WHOLE, 1, 4096, 1, "latent height and width, S (default: what the data has)"),
    SETTING(num_classes, WHOLE, 1, 10000000, 1, "classes, K (default: what the data has)"),
    SETTING(z_dim, WHOLE, 1, 65536, 1, "width of the alignment features, Z (default: what the data has)"),
    SETTING(projector_dim, WHOLE, 1, 65536, 1, "hidden width of the alignment projector, M"),
    SETTING(num_f, WHOLE, 1, MAX_DEPTH, 1, "dense encoder blocks, Lf"),
    SETTING(num_h, WHOLE, 0, MAX_DEPTH, 1, "dense decoder blocks, Lh"),
    SETTING(mlp_ratio, NUMBER, 0.01, 64, 1, "hidden width of the MLP as a multiple of D"),
    SETTING(drop_ratio, NUMBER, 0, 1, 0, "share of the tokens that the sparse middle leaves out, r"),
    SETTING(class_dropout_prob, NUMBER, 0, 1, 0, "share of labels replaced by \"no class\""),
    SETTING(path_drop_prob, NUMBER, 0, 1, 0, "share of steps that drop the whole sparse path"),
    SETTING(cls_coeff, NUMBER, 0, 1e6, 0, "weight of the CLS velocity loss"),
    SETTING(proj_coeff, NUMBER, 0, 1e6, 0, "weight of the alignment loss"),
    SETTING(cfm_coeff, NUMBER, 0, 1e6, 0, "weight of the contrastive loss"),
    SETTING(shift_base, NUMBER, 1e-6, 1e12, 0, "time shift s = sqrt(C*S*S / shift_base)"),
    SETTING(lr, NUMBER, 0, 1e6, 0, "learning rate"),
    SETTING(beta1, NUMBER, 0, 0.9999999, 0, "AdamW's decay of the first moment"),
    SETTING(beta2, NUMBER, 0, 0.9999999, 0, "AdamW's decay of the second moment"),
    SETTING(eps, NUMBER, 1e-30, 1, 0, "AdamW's epsilon"),
    SETTING(weight_decay, NUMBER, 0, 1e6, 0, "decoupled weight decay"),
    SETTING(max_grad_norm, NUMBER, 1e-12, 1e30, 0, "gradients are clipped to this global norm"),
    SETTING(ema_decay, NUMBER, 0, 1, 0, "decay of the weights' moving average, which is sampled from"),
    SETTING(ema_warmup, WHOLE, 0, 1, 0, "1: the decay at step n is at most (1+n)/(10+n), for short runs"),
    SETTING(routing, TECHNIQUE, 0, 1, 0, "sparse middle: g sees only the kept tokens (SPRINT)"),
    SETTING(path_drop, TECHNIQUE, 0, 1, 0, "now and then drop the sparse path (SPRINT)"),
    SETTING(align, TECHNIQUE, 0, 1, 1, "align block Lf's output with a frozen encoder (REPA)"),
    SETTING(cls, TECHNIQUE, 0, 1, 1, "denoise the encoder's CLS token beside the image (REG)"),
    SETTING(cfm, TECHNIQUE, 0, 1, 0, "contrastive flow matching"),
    SETTING(qk_norm, TECHNIQUE, 0, 1, 1, "RMSNorm on queries and keys"),
    SETTING(rope, TECHNIQUE, 0, 1, 0, "rotary 2-D positions"),
    SETTING(value_residual, TECHNIQUE, 0, 1, 1, "mix block 0's values into every later block"),
    SETTING(time_shift, TECHNIQUE, 0, 1, 0, "shift the times by the latent's size"),
    SETTING(label_dropout, TECHNIQUE, 0, 1, 0, "drop labels, for guidance"),
    SETTING(ema, TECHNIQUE, 0, 1, 0, "moving average of the weights"),
};
enum { CONFIG_OPTIONS = sizeof(config_options) / sizeof(config_options[0]) };
static OptionTable config_table(Config *c) {
    OptionTable t = {config_options, CONFIG_OPTIONS, c, NULL};
    return t;
}

// The paper's settings at ImageNet-256 with the INVAE latents; `model_preset` sets the sizes.
static Config config_default(void) {
    Config c;
    memset(&c, 0, sizeof(c));
    c.in_channels = 32, c.input_size = 16, c.num_classes = 1000, c.z_dim = 768, c.projector_dim = 2048;
    c.num_f = c.num_h = 2;
    c.mlp_ratio = 4, c.drop_ratio = 0.75, c.class_dropout_prob = 0.1, c.path_drop_prob = 0.05;
    c.cls_coeff = 0.03, c.proj_coeff = 0.5, c.cfm_coeff = 0.05, c.shift_base = 4096;
    c.lr = 1e-4, c.beta1 = 0.9, c.beta2 = 0.999, c.eps = 1e-8, c.max_grad_norm = 1, c.ema_decay = 0.9999;
    c.routing = c.path_drop = c.align = c.cls = c.cfm = c.qk_norm = c.rope = c.value_residual = 1;
    c.time_shift = c.label_dropout = c.ema = 1;
    return c;
}

// "nano", or S, B, L, XL with the patch size 1, 2 or 4, such as "B/1". Returns 0 for another name.
static int model_preset(Config *c, const char *name) {
    static const struct { const char *name; int depth, width, heads; } sizes[] =
        {{"S", 12, 384, 6}, {"B", 12, 768, 12}, {"L", 24, 1024, 16}, {"XL", 28, 1152, 16}};
    if (!strcmp(name, "nano")) {
        c->depth = 6, c->hidden_size = 64, c->num_heads = 4, c->patch_size = 1, c->projector_dim = 128;
        c->shift_base = 64;              // 8 x 8 pixels of one channel: s = 1, no shift
        c->lr = 2e-3, c->ema_decay = 0.999, c->ema_warmup = 1;
        return 1;
    }
    for (int i = 0; i < 4; i++) {
        size_t n = strlen(sizes[i].name);
        if (strncmp(name, sizes[i].name, n) || name[n] != '/' || !strchr("124", name[n + 1]) ||
            !name[n + 1] || name[n + 2])
            continue;
        c->depth = sizes[i].depth, c->hidden_size = sizes[i].width, c->num_heads = sizes[i].heads;
        c->patch_size = name[n + 1] - '0';
        return 1;
    }
    return 0;
}

// What follows from the configuration
static int grid_of(const Config *c) { return c->input_size / c->patch_size; }
static int patches_of(const Config *c) { return grid_of(c) * grid_of(c); }
static int tokens_of(const Config *c) { return patches_of(c) + c->cls; }
static int kept_of(const Config *c) {   // Tk = max(1, (int)(T (1 - r))), in doubles
    return c->routing ? imax(1, (int)(tokens_of(c) * (1.0 - c->drop_ratio))) : tokens_of(c);
}
static int hidden_of(const Config *c) { return (int)(c->hidden_size * c->mlp_ratio); }
static int latent_of(const Config *c) { return c->in_channels * c->input_size * c->input_size; }
static int patch_dim_of(const Config *c) { return c->in_channels * c->patch_size * c->patch_size; }
static int is_sparse(const Config *c, int block) { return block >= c->num_f && block < c->depth - c->num_h; }

// t = s u / (1 + (s - 1) u), clamped to [0, 1]: unclamped, u = 1 can give 1 + 2e-16
static double shift_time(const Config *c, double u) {
    double s = c->time_shift ? sqrt(latent_of(c) / c->shift_base) : 1.0;
    double t = s * u / (1.0 + (s - 1.0) * u);
    return t < 0 ? 0 : t > 1 ? 1 : t;
}

static void config_check(const Config *c, const char *where) {
    OptionTable t = config_table((Config *)c);
    for (int i = 0; i < t.count; i++)
        if (option_get(&t, i) < t.options[i].low) die("%s: %s is missing", where, t.options[i].name);
    // so that products of two or three sizes stay in an int
    if ((double)c->in_channels * c->input_size * c->input_size > 1 << 27)
        die("%s: latents of %d x %d x %d are too large", where, c->in_channels, c->input_size, c->input_size);
    if (c->patch_size > c->input_size || patches_of(c) >= 1 << 16)
        die("%s: patch_size %d on a side of %d gives no usable number of patches", where, c->patch_size,
            c->input_size);
    if (c->hidden_size % c->num_heads || c->hidden_size / c->num_heads % 4)
        die("%s: hidden_size %d over num_heads %d must give a head width that is a multiple of 4", where,
            c->hidden_size, c->num_heads);
    if (c->input_size % c->patch_size)
        die("%s: patch_size %d does not divide the latent side %d", where, c->patch_size, c->input_size);
    if (c->num_f + c->num_h > c->depth)
        die("%s: num_f %d + num_h %d is more than the depth, %d", where, c->num_f, c->num_h, c->depth);
    if (hidden_of(c) < 1)
        die("%s: hidden_size %d x mlp_ratio %g leaves no hidden unit", where, c->hidden_size, c->mlp_ratio);
}

// The configuration in a file's metadata, read over `c`. `switch_off` lists techniques that are off.
static void config_read(Config *c, const SafeFile *f) {
    OptionTable t = config_table(c);
    for (int i = 0; i < t.count; i++) {
        const char *name = t.options[i].name;
        if (safe_metadata(f, name)) option_set(&t, i, safe_number(f, name, 0), f->path, name);
    }
    const char *off = safe_metadata(f, "switch_off");
    while (off && *off) {
        char name[64];
        size_t n = strcspn(off, ",");
        snprintf(name, sizeof(name), "%.*s", (int)n, off);
        int i = option_find(&t, name);
        if (i < 0 || t.options[i].kind != TECHNIQUE)
            die("%s: switch_off names %s, which is no technique", f->path, name);
        option_set(&t, i, 0, f->path, name);
        off += n + (off[n] == ',');
    }
    config_check(c, f->path);
}

// ----------------------------------------------------------------------------------------------------------
// Parameters: one line a tensor says its name, shape, start and where the model finds it. The table drives
// allocation, start values, AdamW, EMA, checkpoints and the comparison with reference files.

enum Start {
    ZERO,
    ONE,
    HALF,
    NORMAL,
    XAVIER,
    POSITIONS,
    ROPE_COS,
    ROPE_SIN
};   // the last three: not trained

typedef struct { char name[64]; enum Start start; int ndim, shape[4]; size_t size, offset; } Tensor;
typedef struct { Tensor *tensors; int count, room; size_t trained, total; } Table;   // elements, with pads

typedef struct {
    real *qkv_w, *qkv_b, *q_norm, *k_norm, *v1_lambda, *proj_w, *proj_b;
    real *fc1_w, *fc1_b, *fc2_w, *fc2_b, *adaln_w, *adaln_b;
} BlockParams;
typedef struct {
    real *x_w, *x_b, *cls_w, *cls_b, *cls_norm, *t0_w, *t0_b, *t2_w, *t2_b, *label;
    BlockParams block[MAX_DEPTH];
    real *p0_w, *p0_b, *p2_w, *p2_b, *p4_w, *p4_b, *mask_token, *fusion_w, *fusion_b;
    real *final_adaln_w, *final_adaln_b, *final_w, *final_b, *final_cls_w, *final_cls_b;
    real *pos_embed, *rope_cos, *rope_sin;   // fixed
} Params;

// Appends a tensor to the table and returns its place in the block at base (NULL: only the table is wanted).
// Trailing sizes of 0 are no dimensions. Each tensor starts at a multiple of 64 elements; the pads stay zero.
static real *declare(Table *t, real *base, enum Start start, int a, int b, int c, int d, const char *format,
                     ...) {
    if (t->count == t->room) {
        t->room = 2 * t->room + 64;
        t->tensors = (Tensor *)realloc(t->tensors, sizeof(Tensor) * (size_t)t->room);
        if (!t->tensors) die("out of memory for the parameter table");
    }
    Tensor *x = &t->tensors[t->count++];
    va_list args;
    va_start(args, format);
    vsnprintf(x->name, sizeof(x->name), format, args);
    va_end(args);
    int shape[4] = {a, b, c, d};
    x->start = start, x->size = 1, x->offset = t->total;
    for (x->ndim = 0; x->ndim < 4 && shape[x->ndim]; x->ndim++) x->size *= (size_t)shape[x->ndim];
    memcpy(x->shape, shape, sizeof(shape));
    t->total += (x->size + 63) / 64 * 64;
    if (start < POSITIONS) t->trained = t->total;
    return base ? base + x->offset : NULL;
}

// The whole model, one line a tensor. Names are those of the reference implementation's state_dict.
static Table params_table(Params *w, const Config *c, real *base) {
    Table t;
    memset(&t, 0, sizeof(t));
    memset(w, 0, sizeof(*w));
    int D = c->hidden_size, Dh = D / c->num_heads, F = hidden_of(c), M = c->projector_dim, Z = c->z_dim;
    int C = c->in_channels, p = c->patch_size;
    w->x_w = declare(&t, base, XAVIER, D, C, p, p, "x_embedder.proj.weight");
    w->x_b = declare(&t, base, ZERO, D, 0, 0, 0, "x_embedder.proj.bias");
    if (c->cls) {
        w->cls_w = declare(&t, base, XAVIER, D, Z, 0, 0, "cls_projectors2.weight");
        w->cls_b = declare(&t, base, ZERO, D, 0, 0, 0, "cls_projectors2.bias");
        w->cls_norm = declare(&t, base, ONE, D, 0, 0, 0, "wg_norm.weight");
    }
    w->t0_w = declare(&t, base, NORMAL, D, 256, 0, 0, "t_embedder.mlp.0.weight");
    w->t0_b = declare(&t, base, ZERO, D, 0, 0, 0, "t_embedder.mlp.0.bias");
    w->t2_w = declare(&t, base, NORMAL, D, D, 0, 0, "t_embedder.mlp.2.weight");
    w->t2_b = declare(&t, base, ZERO, D, 0, 0, 0, "t_embedder.mlp.2.bias");
    w->label = declare(&t, base, NORMAL, c->num_classes + 1, D, 0, 0, "y_embedder.embedding_table.weight");
    for (int i = 0; i < c->depth; i++) {
        BlockParams *b = &w->block[i];
        b->qkv_w = declare(&t, base, XAVIER, 3 * D, D, 0, 0, "blocks.%d.attn.qkv.weight", i);
        b->qkv_b = declare(&t, base, ZERO, 3 * D, 0, 0, 0, "blocks.%d.attn.qkv.bias", i);
        if (c->qk_norm) {
            b->q_norm = declare(&t, base, ONE, Dh, 0, 0, 0, "blocks.%d.attn.q_norm.weight", i);
            b->k_norm = declare(&t, base, ONE, Dh, 0, 0, 0, "blocks.%d.attn.k_norm.weight", i);
        }
        if (c->value_residual && i > 0)
            b->v1_lambda = declare(&t, base, HALF, 0, 0, 0, 0, "blocks.%d.attn.v1_lambda", i);
        b->proj_w = declare(&t, base, XAVIER, D, D, 0, 0, "blocks.%d.attn.proj.weight", i);
        b->proj_b = declare(&t, base, ZERO, D, 0, 0, 0, "blocks.%d.attn.proj.bias", i);
        b->fc1_w = declare(&t, base, XAVIER, F, D, 0, 0, "blocks.%d.mlp.fc1.weight", i);
        b->fc1_b = declare(&t, base, ZERO, F, 0, 0, 0, "blocks.%d.mlp.fc1.bias", i);
        b->fc2_w = declare(&t, base, XAVIER, D, F, 0, 0, "blocks.%d.mlp.fc2.weight", i);
        b->fc2_b = declare(&t, base, ZERO, D, 0, 0, 0, "blocks.%d.mlp.fc2.bias", i);
        b->adaln_w = declare(&t, base, ZERO, 6 * D, D, 0, 0, "blocks.%d.adaLN_modulation.1.weight", i);
        b->adaln_b = declare(&t, base, ZERO, 6 * D, 0, 0, 0, "blocks.%d.adaLN_modulation.1.bias", i);
    }
    if (c->align) {
        w->p0_w = declare(&t, base, XAVIER, M, D, 0, 0, "projectors.0.0.weight");
        w->p0_b = declare(&t, base, ZERO, M, 0, 0, 0, "projectors.0.0.bias");
        w->p2_w = declare(&t, base, XAVIER, M, M, 0, 0, "projectors.0.2.weight");
        w->p2_b = declare(&t, base, ZERO, M, 0, 0, 0, "projectors.0.2.bias");
        w->p4_w = declare(&t, base, XAVIER, Z, M, 0, 0, "projectors.0.4.weight");
        w->p4_b = declare(&t, base, ZERO, Z, 0, 0, 0, "projectors.0.4.bias");
    }
    w->mask_token = declare(&t, base, ZERO, 1, 1, D, 0, "mask_token");
    w->fusion_w = declare(&t, base, XAVIER, D, 2 * D, 0, 0, "fusion_proj.weight");
    w->fusion_b = declare(&t, base, ZERO, D, 0, 0, 0, "fusion_proj.bias");
    w->final_adaln_w = declare(&t, base, ZERO, 2 * D, D, 0, 0, "final_layer.adaLN_modulation.1.weight");
    w->final_adaln_b = declare(&t, base, ZERO, 2 * D, 0, 0, 0, "final_layer.adaLN_modulation.1.bias");
    w->final_w = declare(&t, base, ZERO, patch_dim_of(c), D, 0, 0, "final_layer.linear.weight");
    w->final_b = declare(&t, base, ZERO, patch_dim_of(c), 0, 0, 0, "final_layer.linear.bias");
    if (c->cls) {
        w->final_cls_w = declare(&t, base, ZERO, Z, D, 0, 0, "final_layer.linear_cls.weight");
        w->final_cls_b = declare(&t, base, ZERO, Z, 0, 0, 0, "final_layer.linear_cls.bias");
    }
    w->pos_embed = declare(&t, base, POSITIONS, 1, tokens_of(c), D, 0, "pos_embed");
    w->rope_cos = declare(&t, base, ROPE_COS, patches_of(c), Dh, 0, 0, "feat_rope.freqs_cos");
    w->rope_sin = declare(&t, base, ROPE_SIN, patches_of(c), Dh, 0, 0, "feat_rope.freqs_sin");
    return t;
}

static size_t count_trained(const Table *t) {   // without the pads
    size_t n = 0;
    for (int i = 0; i < t->count; i++) n += t->tensors[i].start < POSITIONS ? t->tensors[i].size : 0;
    return n;
}

// Fills a tensor with its start values, as the reference implementation of arXiv 2512.12386 does
static void tensor_start(real *out, const Tensor *t, const Config *c, uint64_t seed) {
    int D = c->hidden_size, G = grid_of(c);
    uint32_t hash = 2166136261u;   // FNV-1a of the name: a tensor starts alike whatever else is switched off
    for (const char *s = t->name; *s; s++) hash = (hash ^ (uint8_t)*s) * 16777619u;
    size_t fan_out = t->ndim ? (size_t)t->shape[0] : 1, fan_in = t->size / fan_out;
    double bound = sqrt(6.0 / (double)(fan_in + fan_out));
    if (t->start == NORMAL) {
        fill_normal(out, t->size, seed, STREAM_INIT, 0, hash);
        for (size_t i = 0; i < t->size; i++) out[i] *= (real)0.02;
        return;
    }
    for (size_t i = 0; i < t->size; i++) {
        if (t->start == XAVIER) {
            double u = uniform_of(draw4(seed, STREAM_INIT, 0, hash, (uint32_t)(i / 4)).v[i % 4]);
            out[i] = (real)(bound * (2 * u - 1));
        } else if (t->start == POSITIONS) {   // [sin, cos] of the column, then [sin, cos] of the row
            int token = (int)(i / (size_t)D), k = (int)(i % (size_t)D), patch = token - c->cls;
            double pos = k < D / 2 ? patch % G : patch / G;
            double angle = pos * pow(10000, -(double)(k % (D / 4)) / (D / 4));
            out[i] = patch < 0 ? 0 : (real)(float)(k / (D / 4) % 2 ? cos(angle) : sin(angle));
        } else if (t->start == ROPE_COS || t->start == ROPE_SIN) {   // first half by row, second by column
            int Dh = t->shape[1], patch = (int)(i / (size_t)Dh), k = (int)(i % (size_t)Dh), half = Dh / 2;
            double pos = k < half ? patch / G : patch % G;
            double angle = pos * pow(10000, -2.0 * (k % half / 2) / half);
            out[i] = (real)(t->start == ROPE_COS ? cos(angle) : sin(angle));
        } else
            out[i] = t->start == ONE ? 1 : t->start == HALF ? (real)0.5 : 0;
    }
}

static void params_start(real *params, const Table *t, const Config *c, uint64_t seed) {
    for (int i = 0; i < t->count; i++) tensor_start(params + t->tensors[i].offset, &t->tensors[i], c, seed);
}

// ----------------------------------------------------------------------------------------------------------
// Layers. Backward functions quote the forward line that they differentiate. Gradients of weights are added
// to; gradients of activations are overwritten unless the comment says "+=".

// out[N,O] = in[N,I] w[O,I]^T + b[O]
static void linear_forward(real *out, const real *in, const real *w, const real *b, int N, int I, int O) {
    matmul(out, in, w, b, N, O, I, 0, 1, 0);
}

// sum[O] += all N rows of in[N,O]; ld is the length of a row in memory
static void add_rows(real *sum, const real *in, long ld, int N, int O) {
#pragma omp parallel for
    for (int o = 0; o < O; o += VL) {
        vec part = {0};
        for (int n = 0; n < N && o + VL <= O; n++) part += *(const vec *)(in + n * ld + o);
        if (o + VL <= O) *(vec *)(sum + o) += part;
        for (int i = o; i < O && o + VL > O; i++)
            for (int n = 0; n < N; n++) sum[i] += in[n * ld + i];
    }
}

// din[N,I] = dout[N,O] w (NULL: not wanted; += where add_din);  dw[O,I] += dout^T in;  db[O] += sum_n dout
static void linear_backward(real *din, real *dw, real *db, const real *dout, const real *in, const real *w,
                            int N, int I, int O, int add_din) {
    stored((real *)dout, (size_t)N * O);
    if (din) matmul(din, dout, w, NULL, N, I, O, 0, 0, add_din);
    if (din && !add_din) stored(din, (size_t)N * I);
    matmul(dw, dout, in, NULL, O, I, N, 1, 0, 1);
    add_rows(db, dout, O, N, O);
}

// RMSNorm, n = x r with r = 1 / sqrt(mean(x^2) + eps). Its backward, used three times below: from
//   dn_j/dx_i = r [i = j] - x_i x_j r^3 / D      follows      dx = r (dn - n mean(dn n)).
static real rms_scale(const real *x, int D, real eps) { return 1 / (real)sqrt(dot(x, x, D) / D + eps); }

// RMSNorm and adaLN: out[B,T,D] = x[B,T,D] r (1 + scale) + shift, with shift and scale [B, stride] of the
// sample. r [B,T] is kept for the backward.
static void norm_modulate_forward(real *out, real *r, const real *x, const real *shift, const real *scale,
                                  int stride, int B, int T, int D) {
#pragma omp parallel for
    for (int n = 0; n < B * T; n++) {
        const real *xn = x + (size_t)n * D, *sh = shift + (size_t)(n / T) * stride,
                   *sc = scale + (size_t)(n / T) * stride;
        real *o = out + (size_t)n * D, rn = r[n] = rms_scale(xn, D, (real)1e-6);
        for (int i = 0; i < D; i++) o[i] = xn[i] * rn * (1 + sc[i]) + sh[i];
    }
}

// out = n (1 + scale) + shift with n = x r:
//   dshift = sum_t dout,  dscale = sum_t dout n,  dn = dout (1 + scale),  dx += r (dn - n mean(dn n))
static void norm_modulate_backward(real *dx, real *dshift, real *dscale, const real *dout, const real *x,
                                   const real *r, const real *scale, int stride, int B, int T, int D) {
#pragma omp parallel for
    for (int b = 0; b < B; b++) {
        const real *sc = scale + (size_t)b * stride;
        real *dsh = dshift + (size_t)b * stride, *dsc = dscale + (size_t)b * stride;
        memset(dsh, 0, sizeof(real) * (size_t)D);
        memset(dsc, 0, sizeof(real) * (size_t)D);
        for (int n = b * T; n < (b + 1) * T; n++) {
            const real *xn = x + (size_t)n * D, *d = dout + (size_t)n * D;
            real *dxn = dx + (size_t)n * D, rn = r[n];
            vec sums = {0};
            int i = 0;
            for (; i + VL <= D; i += VL) {
                vec v = *(const vec *)(d + i), nv = *(const vec *)(xn + i) * rn;
                *(vec *)(dsh + i) += v;
                *(vec *)(dsc + i) += v * nv;
                sums += v * (1 + *(const vec *)(sc + i)) * nv;
            }
            real sum = lane_sum(sums);
            for (; i < D; i++) {
                dsh[i] += d[i];
                dsc[i] += d[i] * xn[i] * rn;
                sum += d[i] * (1 + sc[i]) * xn[i] * rn;
            }
            real mean = sum / D;
            for (i = 0; i < D; i++) dxn[i] += rn * (d[i] * (1 + sc[i]) - xn[i] * rn * mean);
        }
    }
}

// out[B,T,D] = x + gate y, gate [B, stride] of the sample
static void gate_forward(real *out, const real *x, const real *gate, const real *y, int stride, int B, int T,
                         int D) {
#pragma omp parallel for
    for (int n = 0; n < B * T; n++) {
        const real *xn = x + (size_t)n * D, *yn = y + (size_t)n * D, *g = gate + (size_t)(n / T) * stride;
        real *o = out + (size_t)n * D;
        for (int i = 0; i < D; i++) o[i] = xn[i] + g[i] * yn[i];
    }
}

// out = x + gate y:  dgate = sum_t dout y,  dy = dout gate  (and dx = dout, which the caller keeps in place)
static void gate_backward(real *dy, real *dgate, const real *dout, const real *gate, const real *y,
                          int stride, int B, int T, int D) {
#pragma omp parallel for
    for (int b = 0; b < B; b++) {
        const real *g = gate + (size_t)b * stride;
        real *dg = dgate + (size_t)b * stride;
        memset(dg, 0, sizeof(real) * (size_t)D);
        for (int n = b * T; n < (b + 1) * T; n++) {
            const real *d = dout + (size_t)n * D, *yn = y + (size_t)n * D;
            real *dyn = dy + (size_t)n * D;
            for (int i = 0; i < D; i++) {
                dg[i] += d[i] * yn[i];
                dyn[i] = d[i] * g[i];
            }
        }
    }
}

// RMSNorm with a weight, out[N,D] = x r w (eps 1e-6): of the CLS token
static void rmsnorm_forward(real *out, real *r, const real *x, const real *w, int N, int D) {
    for (int n = 0; n < N; n++) {
        const real *xn = x + (size_t)n * D;
        r[n] = rms_scale(xn, D, (real)1e-6);
        for (int i = 0; i < D; i++) out[(size_t)n * D + i] = xn[i] * r[n] * w[i];
    }
}

// out = n w with n = x r:  dw += dout n,  dn = dout w,  dx = r (dn - n mean(dn n))
static void rmsnorm_backward(real *dx, real *dw, const real *dout, const real *x, const real *r,
                             const real *w, int N, int D) {
    for (int n = 0; n < N; n++) {
        const real *xn = x + (size_t)n * D, *d = dout + (size_t)n * D;
        real sum = 0;
        for (int i = 0; i < D; i++) {
            dw[i] += d[i] * xn[i] * r[n];
            sum += d[i] * w[i] * xn[i] * r[n];
        }
        for (int i = 0; i < D; i++) dx[(size_t)n * D + i] = r[n] * (d[i] * w[i] - xn[i] * r[n] * (sum / D));
    }
}

// GELU, tanh form: out = x/2 (1 + tanh u) with u = sqrt(2/pi) (x + 0.044715 x^3). As (1 + tanh u)/2 is the
// sigmoid of 2u, out = x s with s = 1 / (1 + e^-2u): one exp, and nothing cancels.
#define GELU_A ((real)0.7978845608028654)
#define GELU_B ((real)0.044715)
// The derivative wants the same exp and is kept: with e = e^-2u, so that 1 - s = e s,
//   slope = s + x s (1 - s) 2 du/dx,  du/dx = sqrt(2/pi) (1 + 3 * 0.044715 x^2).
// slope may be in.
static void gelu_forward(real *out, real *slope, const real *in, size_t n) {
#pragma omp parallel for
    for (size_t i = 0; i < n; i++) {
        real x = in[i], x2 = GELU_B * x * x, e = fast_exp(-2 * GELU_A * x * (1 + x2)), s = 1 / (1 + e);
        out[i] = x * s;
        slope[i] = s * (1 + e * s * x * 2 * GELU_A * (1 + 3 * x2));
    }
}

// dx = dout slope. din may be dout.
static void gelu_backward(real *din, const real *dout, const real *slope, size_t n) {
#pragma omp parallel for
    for (size_t i = 0; i < n; i++) din[i] = dout[i] * slope[i];
}

// SiLU: out = x s with s = 1 / (1 + e^-x)
static void silu_forward(real *out, const real *in, size_t n) {
#pragma omp parallel for
    for (size_t i = 0; i < n; i++) out[i] = in[i] / (1 + fast_exp(-in[i]));
}

// dout/dx = s + x s (1 - s). din may be dout.
static void silu_backward(real *din, const real *dout, const real *in, size_t n) {
#pragma omp parallel for
    for (size_t i = 0; i < n; i++) {
        real s = 1 / (1 + fast_exp(-in[i]));
        din[i] = dout[i] * (s + in[i] * s * (1 - s));
    }
}

// What attention does to q, k and v before it multiplies them, besides QK-norm: where a token stands
typedef struct {
    const int *ids;                   // [B,T] original token of each token, NULL: itself
    int cls;                          // 1: token 0 is CLS, which is not rotated, and patch i is token i + 1
    int tokens;                       // T of the full sequence, in which v1 lies
    const real *rope_cos, *rope_sin;  // [P,Dh], NULL: no rotation
} Places;
static int place_of(const Places *p, int b, int t, int T) { return p->ids ? p->ids[(size_t)b * T + t] : t; }

// RoPE on two pairs of neighbours: (a, b) turns by its angle to (a cos - b sin, b cos + a sin); cs and sn are
// rows of the tables, which hold each value twice. sign -1 turns back.
static inline void rotate(quad *x, const real *cs, const real *sn, real sign) {
    const quad other = {(*x)[1], (*x)[0], (*x)[3], (*x)[2]}, signs = {-sign, sign, -sign, sign};
    *x = *x * *(const quad *)cs + other * (*(const quad *)sn * signs);
}

// out[B,T,3D] from qkv[B,T,3D]; r [B,T,2H] is kept.
//   q, k:  n = q r (RMSNorm over the head, eps 2^-23), m = n w, then RoPE     wq, wk [Dh] NULL: no norm
//   v:     lambda v1 + (1 - lambda) v                                         v1 [B,tokens,D] NULL: v itself
static void qkv_mix_forward(real *out, real *r, const real *qkv, const real *wq, const real *wk,
                            const real *v1, real lambda, const Places *places, int B, int T, int H, int Dh) {
    int D = H * Dh;
#pragma omp parallel for
    for (int n = 0; n < B * T; n++) {
        int token = place_of(places, n / T, n % T, T), patch = token - places->cls;
        int turned = places->rope_cos && patch >= 0;
        const real *cs = turned ? places->rope_cos + patch * Dh : NULL;
        const real *sn = turned ? places->rope_sin + patch * Dh : NULL;
        for (int h = 0; h < 2 * H; h++) {   // the heads of q, then those of k
            const real *x = qkv + (size_t)n * 3 * D + (size_t)h * Dh, *w = h < H ? wq : wk;
            real *o = out + (size_t)n * 3 * D + (size_t)h * Dh, rn = 1;
            if (w) rn = r[(size_t)n * 2 * H + h] = rms_scale(x, Dh, (real)1.1920928955078125e-07);
            for (int i = 0; i < Dh; i += 4) {
                quad m = *(const quad *)(x + i) * rn;
                if (w) m *= *(const quad *)(w + i);
                if (cs) rotate(&m, cs + i, sn + i, 1);
                *(quad *)(o + i) = m;
            }
        }
        const real *v = qkv + (size_t)n * 3 * D + 2 * D;
        real *o = out + (size_t)n * 3 * D + 2 * D;
        if (!v1) memcpy(o, v, sizeof(real) * (size_t)D);
        else {
            const real *first = v1 + ((size_t)(n / T) * places->tokens + token) * D;
            for (int i = 0; i < D; i++) o[i] = lambda * first[i] + (1 - lambda) * v[i];
        }
    }
}

// The rotation's transpose is the rotation by -angle: dm = RoPE^-1 dq';  then dw += dm n, dn = dm w,
// dq = r (dn - n mean(dn n)).  And v' = lambda v1 + (1 - lambda) v:  dv = (1 - lambda) dv', dv1 += lambda dv'
// at the original token, dlambda += sum (v1 - v) dv'.  parts [B, 2
// Dh + 1] holds each sample's sums for wq, wk and lambda, added up in the order of the samples.
static void qkv_mix_backward(real *dqkv, real *dwq, real *dwk, real *dv1, real *dlambda, real *parts,
                             const real *dout, const real *qkv, const real *r, const real *wq, const real *wk,
                             const real *v1, real lambda, const Places *places, int B, int T, int H, int Dh) {
    int D = H * Dh;
    memset(parts, 0, sizeof(real) * (size_t)B * (size_t)(2 * Dh + 1));
#pragma omp parallel for
    for (int n0 = 0; n0 < B * T; n0 += T)
        for (int n = n0; n < n0 + T; n++) {
            int token = place_of(places, n / T, n % T, T), patch = token - places->cls;
            int turned = places->rope_cos && patch >= 0;
            const real *cs = turned ? places->rope_cos + patch * Dh : NULL;
            const real *sn = turned ? places->rope_sin + patch * Dh : NULL;
            real *part = parts + (size_t)(n / T) * (size_t)(2 * Dh + 1);
            for (int h = 0; h < 2 * H; h++) {
                size_t at = (size_t)n * 3 * D + (size_t)h * Dh;
                const real *x = qkv + at, *d = dout + at, *w = h < H ? wq : wk;
                real *dx = dqkv + at, *dw = part + (h < H ? 0 : Dh), rn = w ? r[(size_t)n * 2 * H + h] : 1;
                quad sums = {0};
                for (int i = 0; i < Dh; i += 4) {
                    quad dm = *(const quad *)(d + i), nn = *(const quad *)(x + i) * rn;
                    if (cs) rotate(&dm, cs + i, sn + i, -1);
                    if (w) {
                        *(quad *)(dw + i) += dm * nn;
                        dm *= *(const quad *)(w + i);   // now dn
                        sums += dm * nn;
                    }
                    *(quad *)(dx + i) = dm;
                }
                real mean = (sums[0] + sums[1] + sums[2] + sums[3]) / Dh;
                for (int i = 0; i < Dh && w; i += 4) {
                    quad nn = *(const quad *)(x + i) * rn;
                    *(quad *)(dx + i) = rn * (*(quad *)(dx + i) - nn * mean);
                }
            }
            const real *d = dout + (size_t)n * 3 * D + 2 * D, *v = qkv + (size_t)n * 3 * D + 2 * D;
            real *dv = dqkv + (size_t)n * 3 * D + 2 * D;
            if (!v1) memcpy(dv, d, sizeof(real) * (size_t)D);
            else {
                size_t row = (size_t)(n / T) * places->tokens + token;
                const real *first = v1 + row * D;
                real *dfirst = dv1 + row * D;
                quad sums = {0};
                for (int i = 0; i < D; i += 4) {
                    quad di = *(const quad *)(d + i);
                    sums += di * (*(const quad *)(first + i) - *(const quad *)(v + i));
                    *(quad *)(dv + i) = (1 - lambda) * di;
                    *(quad *)(dfirst + i) += lambda * di;
                }
                part[2 * Dh] += sums[0] + sums[1] + sums[2] + sums[3];
            }
        }
    for (int b = 0; b < B; b++) {
        const real *part = parts + (size_t)b * (size_t)(2 * Dh + 1);
        for (int i = 0; i < Dh && wq; i++) dwq[i] += part[i], dwk[i] += part[Dh + i];
        if (v1) *dlambda += part[2 * Dh];
    }
}

// A row of attention's T scores in memory: whole vectors, so that no loop over it has an end of its own
static int attention_row(int T) { return (T + VL - 1) / VL * VL; }

// Elements of scratch memory that attention needs for one head: panels and a matrix of scores
static size_t attention_work(int T, int Dh) {
    int most = T > Dh ? T : Dh;
    return (size_t)((most + NR - 1) / NR * NR) * (size_t)most + (size_t)T * (size_t)attention_row(T);
}

// out[B,T,D] = softmax(q k^T / sqrt(Dh)) v for each sample and head, from qkv[B,T,3D]; att [B,H,T,R] is kept,
// in rows of R = attention_row(T). work: attention_work elements a thread
static void attention_forward(real *out, real *att, const real *qkv, real *work, int B, int T, int H,
                              int Dh) {
    int D = H * Dh, R = attention_row(T);
    real scale = (real)(1.0 / sqrt((double)Dh)), pads[VL], kept[VL];   // added to the last scores, times them
    for (int l = 0; l < VL; l++) kept[l] = R - VL + l < T, pads[l] = kept[l] ? 0 : -INFINITY;
#pragma omp parallel for
    for (int bh = 0; bh < B * H; bh++) {
        const real *q = qkv + (size_t)(bh / H) * T * 3 * D + (size_t)(bh % H) * Dh;
        const real *k = q + D, *v = q + 2 * D;
        real *p = att + (size_t)bh * T * R, *o = out + (size_t)(bh / H) * T * D + (size_t)(bh % H) * Dh;
        real *w = thread_work(work, attention_work(T, Dh));
        matmul_small(p, R, R, q, 3 * D, 0, k, 3 * D, 1, T, T, Dh, w);
        for (real *row = p; row < p + (size_t)T * R; row += R) {
            *(vec *)(row + R - VL) += *(vec *)pads;   // -infinity after the T scores: e^-inf adds nothing
            vec most = *(vec *)row, sums = {0};
            for (int i = VL; i < R; i += VL) most = LARGER(most, *(vec *)(row + i));
            real top = lane_max(most);
            for (int i = 0; i < R; i += VL) {
                for (int l = 0; l < VL; l++) row[i + l] = fast_exp((row[i + l] - top) * scale);
                sums += *(vec *)(row + i);
            }
            *(vec *)(row + R - VL) *= *(vec *)kept;   // fast_exp ends at 1e-38; less than that is slow to use
            real inverse = 1 / lane_sum(sums);
            for (int i = 0; i < R; i += VL) *(vec *)(row + i) *= inverse;
        }
        matmul_small(o, D, Dh, p, R, 0, v, 3 * D, 0, T, Dh, T, w);
    }
}

// o = p v, p = softmax(s), s = q k^T / sqrt(Dh):
//   dv = p^T do,  dp = do v^T,  ds_ij = p_ij (dp_ij - sum_k p_ik dp_ik),
//   dq = ds k / sqrt(Dh),  dk = ds^T q / sqrt(Dh)
static void attention_backward(real *dqkv, const real *dout, const real *qkv, const real *att, real *work,
                               int B, int T, int H, int Dh) {
    int D = H * Dh, R = attention_row(T);
    real scale = (real)(1.0 / sqrt((double)Dh));
#pragma omp parallel for
    for (int bh = 0; bh < B * H; bh++) {
        size_t at = (size_t)(bh / H) * T * 3 * D + (size_t)(bh % H) * Dh;
        const real *q = qkv + at, *k = q + D, *v = q + 2 * D, *p = att + (size_t)bh * T * R;
        const real *d = dout + (size_t)(bh / H) * T * D + (size_t)(bh % H) * Dh;
        real *dq = dqkv + at, *dk = dq + D, *dv = dq + 2 * D;
        real *ds = thread_work(work, attention_work(T, Dh)), *w = ds + (size_t)T * R;
        matmul_small(ds, R, R, d, D, 0, v, 3 * D, 1, T, T, Dh, w);
        for (int t = 0; t < T; t++, ds += R, p += R) {
            real sum = dot(ds, p, R);
            for (int i = 0; i < R; i += VL) {
                vec *row = (vec *)(ds + i);
                *row = (*row - sum) * (scale * *(const vec *)(p + i));
            }
        }
        ds -= (size_t)T * R, p -= (size_t)T * R;
        matmul_small(dv, 3 * D, Dh, p, R, 1, d, D, 0, T, Dh, T, w);
        matmul_small(dq, 3 * D, Dh, ds, R, 0, k, 3 * D, 0, T, Dh, T, w);
        matmul_small(dk, 3 * D, Dh, ds, R, 1, q, 3 * D, 0, T, Dh, T, w);
    }
}

// patches[B,P,C p p] of x[B,C,S,S], features in the order (channel, row, column) of a convolution's weight
static void patchify(real *patches, const real *x, const Config *c, int B) {
    int S = c->input_size, p = c->patch_size, G = grid_of(c), P = patches_of(c), C = c->in_channels;
#pragma omp parallel for
    for (int n = 0; n < B * P; n++)
        for (int i = 0; i < C * p * p; i++) {
            int ch = i / (p * p), y = n % P / G * p + i / p % p, z = n % P % G * p + i % p;
            patches[(size_t)n * (C * p * p) + i] = x[(((size_t)(n / P) * C + ch) * S + y) * S + z];
        }
}

// x[B,C,S,S] from patches[B,P,p p C], features in the order (row, column, channel) of the final layer; and
// its backward, which reads where the forward wrote.
static void unpatchify(real *x, real *patches, const Config *c, int B, int backward) {
    int S = c->input_size, p = c->patch_size, G = grid_of(c), P = patches_of(c), C = c->in_channels;
#pragma omp parallel for
    for (int n = 0; n < B * P; n++)
        for (int i = 0; i < C * p * p; i++) {
            int ch = i % C, y = n % P / G * p + i / C / p, z = n % P % G * p + i / C % p;
            real *at = &x[(((size_t)(n / P) * C + ch) * S + y) * S + z],
                 *feature = &patches[(size_t)n * (C * p * p) + i];
            if (backward) *feature = *at;
            else *at = *feature;
        }
}

// e(t)[B,256] = [cos(t f_k), sin(t f_k)], f_k = 10000^(-k/128); t in [0, 1], not times 1000
static void time_features(real *out, const real *t, int B) {
#pragma omp parallel for
    for (int k = 0; k < 128; k++) {
        double f = pow(10000, -k / 128.0);
        for (int b = 0; b < B; b++) {
            out[b * 256 + k] = (real)cos((double)t[b] * f);
            out[b * 256 + 128 + k] = (real)sin((double)t[b] * f);
        }
    }
}

// N rows of D; ldo and ldi are the lengths of the rows in memory
static void copy_rows(real *out, long ldo, const real *in, long ldi, int N, int D) {
#pragma omp parallel for
    for (int n = 0; n < N; n++) memcpy(out + n * ldo, in + n * ldi, sizeof(real) * (size_t)D);
}

// out[B,n,D] = rows ids[b] of in[B,T,D]
static void gather_rows(real *out, const real *in, const int *ids, int B, int n, int T, int D) {
#pragma omp parallel for
    for (int i = 0; i < B * n; i++)
        memcpy(out + (size_t)i * D, in + ((size_t)(i / n) * T + ids[i]) * D, sizeof(real) * (size_t)D);
}

// Rows of a sequence [B,T,D] that are tokens t0 ... t0+n, copied out of it or (to_tokens) into it: [B,n,D]
static void copy_tokens(real *part, real *tokens, int to_tokens, int B, int n, int t0, int T, int D) {
#pragma omp parallel for
    for (int b = 0; b < B; b++) {
        real *a = part + (size_t)b * n * D, *s = tokens + ((size_t)b * T + t0) * D;
        memcpy(to_tokens ? s : a, to_tokens ? a : s, sizeof(real) * (size_t)n * (size_t)D);
    }
}

// ----------------------------------------------------------------------------------------------------------
// The model

// What one micro-batch of a training step needs: data and random draws. `first` and `whole` place its B
// samples in the whole batch, so that means and contrastive pairs are those of the whole batch however it is
// split.
typedef struct {
    int B, first, whole, path_drop;
    int on_device;           // 1: noises and ids are left to a GPU, which draws them from (seed, step) itself
    uint64_t seed;
    int step;
    real *x, *noise;         // [B,C,S,S]
    real *v_before;          // [C,S,S] v of the sample before the first; before sample 0 comes the last
    real *cls, *noise_cls;   // [B,Z]
    real *t;                 // [B], after the time shift
    int *y;                  // [B], after label dropout: K is "no class"
    int *ids;                // [B,Tk] tokens kept
    real *feats;             // [B,T,Z]
} Batch;

// The total, and its parts before their coefficients, summed over the steps since they were last read; the
// last step's gradient norm
typedef struct { double total, denoise, cls, proj, cfm, grad_norm; } Losses;

// Activations of a block that its backward needs; n = tokens of the block (T, or Tk in g)
typedef struct {
    const real *in;               // [B,n,D] the block before's output
    real *mod;                    // [B,6D] shift1, scale1, gate1, shift2, scale2, gate2
    real *h1, *r1, *qkv, *r_qk;   // [B,n,D], [B,n], [B,n,3D], [B,n,2H]
    real *mix, *att;              // [B,n,3D] normed, rotated, mixed; [B,H,n,attention_row(n)]
    real *a, *proj;               // [B,n,D] twice
    real *mid, *h2, *r2;          // [B,n,D] after the first residual; [B,n,D]; [B,n]
    real *fc1, *gelu, *fc2, *out; // [B,n,F], in the end GELU's slope there; [B,n,F], [B,n,D], [B,n,D]
} BlockActs;

typedef struct {
    real *x_t, *cls_t;                                              // [B,C,S,S], [B,Z]
    real *patches, *patch_tokens, *cls_proj, *cls_r, *cls_token;    // [B,P,Cpp], [B,P,D], [B,D], [B], [B,D]
    real *embed, *v1;                                               // [B,T,D] twice; v1: block 0's values
    real *t_features, *t0, *t0_silu, *cond, *cond_silu;             // [B,256], then [B,D]
    BlockActs block[MAX_DEPTH + 1];                                 // one more for evaluation, if h is empty
    real *kept, *pair, *fused;                                      // [B,Tk,D], [B,T,2D], [B,T,D]
    real *p0, *p0_silu, *p2, *p2_silu, *zs;                         // [B,T,M] four times, [B,T,Z]
    real *final_mod, *final_h, *final_r;                            // [B,2D], [B,T,D], [B,T]
    real *final_patches, *final_cls, *out_patches;                  // [B,P,D], [B,D], [B,P,ppC]
    real *out, *cls_out;                                            // [B,C,S,S], [B,Z]
    // gradients, and scratch that blocks share
    real *dx, *d_E, *d_kept, *d_v1, *d_zs;   // [B,T,D] twice, [B,Tk,D], [B,T,D], [B,T,Z]
    real *d_wide, *d_wide2, *d_qkv, *d_mix;                         // [B,T, max(F,M,2D) twice | 3D | 3D]
    real *d_mod, *d_cond_silu, *d_cond, *d_out, *d_cls_out, *parts, *work;
} Acts;

typedef struct Model {
    Config c;
    Table table;
    int max_batch, threads;
    Losses losses;
    size_t activation_bytes, parameter_bytes;
    real *params, *grads, *m, *v, *ema;   // one block each, in table order
    Params w, dw, w_ema;                  // the same, by name
    Acts a;
    real *memory;
} Model;

static void acts_layout(Acts *a, Arena *m, const Config *c, int B, int threads) {
    size_t b = (size_t)B, T = (size_t)tokens_of(c), Tk = (size_t)kept_of(c), P = (size_t)patches_of(c);
    size_t D = (size_t)c->hidden_size, F = (size_t)hidden_of(c), M = (size_t)c->projector_dim,
           Z = (size_t)c->z_dim;
    size_t H = (size_t)c->num_heads, latent = (size_t)latent_of(c), X = (size_t)patch_dim_of(c);
    a->x_t = take(m, b * latent), a->cls_t = take(m, b * Z);
    a->patches = take(m, b * P * X), a->patch_tokens = take(m, b * P * D);
    a->cls_proj = take(m, b * D), a->cls_r = take(m, b), a->cls_token = take(m, b * D);
    a->embed = take(m, b * T * D), a->v1 = take(m, b * T * D);
    a->t_features = take(m, b * 256), a->t0 = take(m, b * D), a->t0_silu = take(m, b * D);
    a->cond = take(m, b * D), a->cond_silu = take(m, b * D);
    for (int i = 0; i < c->depth + (c->num_h == 0); i++) {
        BlockActs *k = &a->block[i];
        size_t n = b * (is_sparse(c, i) ? Tk : T), t = is_sparse(c, i) ? Tk : T;
        k->mod = take(m, b * 6 * D);
        k->h1 = take(m, n * D), k->r1 = take(m, n), k->qkv = take(m, n * 3 * D), k->r_qk = take(m, n * 2 * H);
        k->mix = take(m, n * 3 * D), k->att = take(m, b * H * t * (size_t)attention_row((int)t));
        k->a = take(m, n * D), k->proj = take(m, n * D);
        k->mid = take(m, n * D), k->h2 = take(m, n * D), k->r2 = take(m, n);
        k->fc1 = take(m, n * F), k->gelu = take(m, n * F), k->fc2 = take(m, n * D), k->out = take(m, n * D);
    }
    a->kept = take(m, b * Tk * D), a->pair = take(m, b * T * 2 * D), a->fused = take(m, b * T * D);
    if (c->align) {
        a->p0 = take(m, b * T * M), a->p0_silu = take(m, b * T * M);
        a->p2 = take(m, b * T * M), a->p2_silu = take(m, b * T * M), a->zs = take(m, b * T * Z);
    }
    a->final_mod = take(m, b * 2 * D), a->final_h = take(m, b * T * D), a->final_r = take(m, b * T);
    a->final_patches = take(m, b * P * D), a->final_cls = take(m, b * D), a->out_patches = take(m, b * P * X);
    a->out = take(m, b * latent), a->cls_out = take(m, b * Z);

    size_t wide = F > M ? F : M;
    wide = wide > 2 * D ? wide : 2 * D;
    a->dx = take(m, b * T * D), a->d_E = take(m, b * T * D), a->d_kept = take(m, b * Tk * D);
    a->d_v1 = take(m, b * T * D), a->d_zs = take(m, b * T * Z);
    a->d_wide = take(m, b * T * wide), a->d_wide2 = take(m, b * T * wide);
    a->d_qkv = take(m, b * T * 3 * D), a->d_mix = take(m, b * T * 3 * D);
    a->d_mod = take(m, b * 6 * D), a->d_cond_silu = take(m, b * D), a->d_cond = take(m, b * D);
    a->d_out = take(m, b * latent), a->d_cls_out = take(m, b * Z), a->parts = take(m, b * (2 * D / H + 1));
    a->work = take(m, (size_t)threads * attention_work((int)T, (int)(D / H)));
}

// A model whose activations hold max_batch samples; the parameters are at their start values.
static Model *model_create(const Config *c, int max_batch, uint64_t seed) {
    if ((double)max_batch * tokens_of(c) > 1 << 30)
        die("%d samples of %d tokens are too many at once; use a larger --accum", max_batch, tokens_of(c));
    Model *model = (Model *)alloc_zero(1, sizeof(Model));
    model->c = *c, model->max_batch = max_batch, model->threads = omp_get_max_threads();
    model->table = params_table(&model->w, c, NULL);
    size_t n = model->table.total;
    Arena arena = {NULL, 0};
    acts_layout(&model->a, &arena, c, max_batch, model->threads);
    size_t count = 5 * n + arena.used + 64;
    model->activation_bytes = arena.used * sizeof(real), model->parameter_bytes = 5 * n * sizeof(real);
    model->memory = (real *)alloc_zero(count, sizeof(real));
#ifdef MADV_HUGEPAGE   // fewer misses of the page table
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t start = ((uintptr_t)model->memory + page - 1) / page * page;
    (void)madvise((void *)start, count * sizeof(real) / page * page - page, MADV_HUGEPAGE);
#endif
    arena.base = (real *)(((uintptr_t)model->memory + 63) / 64 * 64), arena.used = 0;
    model->params = take(&arena, n), model->grads = take(&arena, n);
    model->m = take(&arena, n), model->v = take(&arena, n), model->ema = take(&arena, n);
    Arena acts = {arena.base + arena.used, 0};
    acts_layout(&model->a, &acts, c, max_batch, model->threads);
    free(model->table.tensors);
    model->table = params_table(&model->w, c, model->params);
    free(params_table(&model->dw, c, model->grads).tensors);
    free(params_table(&model->w_ema, c, model->ema).tensors);
    params_start(model->params, &model->table, c, seed);
    memcpy(model->ema, model->params, n * sizeof(real));
    return model;
}
static void model_destroy(Model *m) { free(m->table.tensors), free(m->memory), free(m); }

static Places places_of(const Config *c, const Params *w, const int *ids) {
    Places p = {ids, c->cls, tokens_of(c), c->rope ? w->rope_cos : NULL, c->rope ? w->rope_sin : NULL};
    return p;
}

// Block i on n tokens a sample: out = block(in; cond). v1: block 0's values, NULL where values are not mixed.
static void block_forward(BlockActs *k, const BlockParams *w, const real *in, const real *v1, const int *ids,
                          const Config *c, const Params *all, Acts *a, int B, int n) {
    int D = c->hidden_size, H = c->num_heads, F = hidden_of(c), N = B * n;
    Places places = places_of(c, all, ids);
    k->in = in;
    linear_forward(k->mod, a->cond_silu, w->adaln_w, w->adaln_b, B, D, 6 * D);
    const real *shift1 = k->mod, *scale1 = k->mod + D, *gate1 = k->mod + 2 * D;
    const real *shift2 = k->mod + 3 * D, *scale2 = k->mod + 4 * D, *gate2 = k->mod + 5 * D;
    norm_modulate_forward(k->h1, k->r1, in, shift1, scale1, 6 * D, B, n, D);
    linear_forward(k->qkv, k->h1, w->qkv_w, w->qkv_b, N, D, 3 * D), stored(k->qkv, (size_t)N * 3 * D);
    qkv_mix_forward(k->mix, k->r_qk, k->qkv, w->q_norm, w->k_norm, v1, v1 ? *w->v1_lambda : 0, &places, B, n,
                    H, D / H);
    attention_forward(k->a, k->att, k->mix, a->work, B, n, H, D / H);
    linear_forward(k->proj, k->a, w->proj_w, w->proj_b, N, D, D), stored(k->proj, (size_t)N * D);
    gate_forward(k->mid, in, gate1, k->proj, 6 * D, B, n, D);
    norm_modulate_forward(k->h2, k->r2, k->mid, shift2, scale2, 6 * D, B, n, D);
    linear_forward(k->fc1, k->h2, w->fc1_w, w->fc1_b, N, D, F), stored(k->fc1, (size_t)N * F);
    gelu_forward(k->gelu, k->fc1, k->fc1, (size_t)N * F);
    linear_forward(k->fc2, k->gelu, w->fc2_w, w->fc2_b, N, F, D), stored(k->fc2, (size_t)N * D);
    gate_forward(k->out, k->mid, gate2, k->fc2, 6 * D, B, n, D);
}

// dx [B,n,D] comes in as the gradient of the block's output and leaves as that of its input. a->d_v1 collects
// the gradients of block 0's values; block 0, which runs last, adds them to its own. a->d_cond_silu is added
// to.
static void block_backward(real *dx, BlockParams *dw, const BlockActs *k, const BlockParams *w,
                           const real *v1, const int *ids, const Config *c, const Params *all, Acts *a, int B,
                           int n, int is_first) {
    int D = c->hidden_size, H = c->num_heads, F = hidden_of(c), N = B * n;
    Places places = places_of(c, all, ids);
    const real *scale1 = k->mod + D, *gate1 = k->mod + 2 * D, *scale2 = k->mod + 4 * D,
               *gate2 = k->mod + 5 * D;
    real *dm = a->d_mod, *dh = a->d_wide2;
    // out = mid + gate2 fc2(gelu(fc1(h2)))
    gate_backward(a->d_wide2, dm + 5 * D, dx, gate2, k->fc2, 6 * D, B, n, D);
    linear_backward(a->d_wide, dw->fc2_w, dw->fc2_b, a->d_wide2, k->gelu, w->fc2_w, N, F, D, 0);
    gelu_backward(a->d_wide, a->d_wide, k->fc1, (size_t)N * F);
    linear_backward(dh, dw->fc1_w, dw->fc1_b, a->d_wide, k->h2, w->fc1_w, N, D, F, 0);
    norm_modulate_backward(dx, dm + 3 * D, dm + 4 * D, dh, k->mid, k->r2, scale2, 6 * D, B, n, D);
    // mid = in + gate1 proj(attention(mix(qkv(h1))))
    gate_backward(a->d_wide2, dm + 2 * D, dx, gate1, k->proj, 6 * D, B, n, D);
    linear_backward(a->d_wide, dw->proj_w, dw->proj_b, a->d_wide2, k->a, w->proj_w, N, D, D, 0);
    attention_backward(a->d_mix, a->d_wide, k->mix, k->att, a->work, B, n, H, D / H);
    qkv_mix_backward(a->d_qkv, dw->q_norm, dw->k_norm, a->d_v1, dw->v1_lambda, a->parts, a->d_mix, k->qkv,
                     k->r_qk, w->q_norm, w->k_norm, v1, v1 ? *w->v1_lambda : 0, &places, B, n, H, D / H);
    if (is_first && c->value_residual) {
#pragma omp parallel for
        for (size_t i = 0; i < (size_t)N; i++)
            for (int j = 0; j < D; j++) a->d_qkv[i * 3 * D + 2 * D + j] += a->d_v1[i * D + j];
    }
    linear_backward(dh, dw->qkv_w, dw->qkv_b, a->d_qkv, k->h1, w->qkv_w, N, D, 3 * D, 0);
    norm_modulate_backward(dx, dm, dm + D, dh, k->in, k->r1, scale1, 6 * D, B, n, D);
    linear_backward(a->d_cond_silu, dw->adaln_w, dw->adaln_b, dm, a->cond_silu, w->adaln_w, B, D, 6 * D, 1);
}

// Velocity of a->x_t, a->cls_t at times t [B] with labels y [B] into a->out, a->cls_out. ids [B,Tk]:
// training, on the kept tokens, with the projector; NULL: evaluation, on all tokens, where the blocks of g
// share one block's memory. path_drop: g is not run and every one of its tokens is the mask token.
static void network_forward(Model *model, const Params *w, const real *t, const int *y, const int *ids,
                            int path_drop, int B) {
    const Config *c = &model->c;
    Acts *a = &model->a;
    int T = tokens_of(c), P = patches_of(c), D = c->hidden_size, M = c->projector_dim, Z = c->z_dim,
        X = patch_dim_of(c);
    int n = ids ? kept_of(c) : T, first_h = c->depth - c->num_h;
    // tokens: patches, CLS before them, positions
    patchify(a->patches, a->x_t, c, B);
    linear_forward(a->patch_tokens, a->patches, w->x_w, w->x_b, B * P, X, D);
    stored(a->patch_tokens, (size_t)B * P * D);
    copy_tokens(a->patch_tokens, a->embed, 1, B, P, c->cls, T, D);
    if (c->cls) {
        linear_forward(a->cls_proj, a->cls_t, w->cls_w, w->cls_b, B, Z, D);
        rmsnorm_forward(a->cls_token, a->cls_r, a->cls_proj, w->cls_norm, B, D);
        copy_tokens(a->cls_token, a->embed, 1, B, 1, 0, T, D);
    }
    for (int b = 0; b < B; b++)
        for (size_t i = 0; i < (size_t)T * D; i++) a->embed[(size_t)b * T * D + i] += w->pos_embed[i];
    // condition: c = mlp(e(t)) + label
    time_features(a->t_features, t, B);
    linear_forward(a->t0, a->t_features, w->t0_w, w->t0_b, B, 256, D);
    silu_forward(a->t0_silu, a->t0, (size_t)B * D);
    linear_forward(a->cond, a->t0_silu, w->t2_w, w->t2_b, B, D, D);
    for (int b = 0; b < B; b++)
        for (int i = 0; i < D; i++) a->cond[(size_t)b * D + i] += w->label[(size_t)y[b] * D + i];
    silu_forward(a->cond_silu, a->cond, (size_t)B * D);
    // encoder f on all tokens
    const real *x = a->embed, *v1 = c->value_residual ? a->v1 : NULL;
    for (int i = 0; i < c->num_f; i++) {
        block_forward(&a->block[i], &w->block[i], x, i ? v1 : NULL, NULL, c, w, a, B, T);
        if (i == 0) copy_rows(a->v1, D, a->block[0].qkv + 2 * D, 3 * D, B * T, D);
        x = a->block[i].out;
    }
    const real *E = x, *g = NULL;
    if (ids && c->align) {   // zs = projector(E)
        linear_forward(a->p0, E, w->p0_w, w->p0_b, B * T, D, M);
        silu_forward(a->p0_silu, a->p0, (size_t)B * T * M);
        linear_forward(a->p2, a->p0_silu, w->p2_w, w->p2_b, B * T, M, M);
        silu_forward(a->p2_silu, a->p2, (size_t)B * T * M);
        linear_forward(a->zs, a->p2_silu, w->p4_w, w->p4_b, B * T, M, Z), stored(a->zs, (size_t)B * T * Z);
    }
    // sparse middle g on the kept tokens
    if (!path_drop) {
        if (ids) gather_rows(a->kept, E, ids, B, n, T, D);
        g = ids ? a->kept : E;
        for (int i = c->num_f; i < first_h; i++) {
            BlockActs *k = ids ? &a->block[i] : &a->block[c->num_h ? c->depth - 1 : c->depth];
            block_forward(k, &w->block[i], g, v1, ids, c, w, a, B, n);
            g = k->out;
        }
    }
    // pad with the mask token, fuse: fusion_proj([E, G])
    copy_rows(a->pair, 2 * D, E, D, B * T, D);
    if (g && !ids) copy_rows(a->pair + D, 2 * D, g, D, B * T, D);
    else copy_rows(a->pair + D, 2 * D, w->mask_token, 0, B * T, D);
#pragma omp parallel for
    for (int i = 0; i < (g && ids ? B * n : 0); i++)
        memcpy(a->pair + ((size_t)(i / n) * T + ids[i]) * 2 * D + D, g + (size_t)i * D,
               sizeof(real) * (size_t)D);
    linear_forward(a->fused, a->pair, w->fusion_w, w->fusion_b, B * T, 2 * D, D);
    // decoder h on all tokens
    x = a->fused;
    for (int i = first_h; i < c->depth; i++) {
        block_forward(&a->block[i], &w->block[i], x, v1, NULL, c, w, a, B, T);
        x = a->block[i].out;
    }
    // final layer
    linear_forward(a->final_mod, a->cond_silu, w->final_adaln_w, w->final_adaln_b, B, D, 2 * D);
    norm_modulate_forward(a->final_h, a->final_r, x, a->final_mod, a->final_mod + D, 2 * D, B, T, D);
    copy_tokens(a->final_patches, a->final_h, 0, B, P, c->cls, T, D);
    linear_forward(a->out_patches, a->final_patches, w->final_w, w->final_b, B * P, D, X);
    unpatchify(a->out, a->out_patches, c, B, 0);
    if (!c->cls) return;
    copy_tokens(a->final_cls, a->final_h, 0, B, 1, 0, T, D);
    linear_forward(a->cls_out, a->final_cls, w->final_cls_w, w->final_cls_b, B, D, Z);
}

// Gradients of all parameters, added to model->grads, from those of the outputs (a->d_out, a->d_cls_out,
// a->d_zs), after a training network_forward with the same arguments. E, block Lf's output, has three
// readers: the projector, the sparse path and the fusion; their gradients meet in a->d_E.
static void network_backward(Model *model, const int *y, const int *ids, int path_drop, int B) {
    const Config *c = &model->c;
    const Params *w = &model->w;
    Params *dw = &model->dw;
    Acts *a = &model->a;
    int T = tokens_of(c), P = patches_of(c), D = c->hidden_size, M = c->projector_dim, Z = c->z_dim,
        X = patch_dim_of(c);
    int n = kept_of(c), first_h = c->depth - c->num_h;
    size_t N = (size_t)B * (size_t)T, bytes = sizeof(real) * N * (size_t)D;
    const real *v1 = c->value_residual ? a->v1 : NULL;
    memset(a->d_cond_silu, 0, sizeof(real) * (size_t)B * (size_t)D);
    memset(a->d_v1, 0, bytes);
    // final layer: out = linear(final_h[patches]), cls_out = linear_cls(final_h[CLS])
    unpatchify(a->d_out, a->out_patches, c, B, 1);   // out_patches becomes its own gradient
    linear_backward(a->d_wide, dw->final_w, dw->final_b, a->out_patches, a->final_patches, w->final_w, B * P,
                    D, X, 0);
    copy_tokens(a->d_wide, a->d_wide2, 1, B, P, c->cls, T, D);
    if (c->cls) {
        linear_backward(a->d_wide, dw->final_cls_w, dw->final_cls_b, a->d_cls_out, a->final_cls,
                        w->final_cls_w, B, D, Z, 0);
        copy_tokens(a->d_wide, a->d_wide2, 1, B, 1, 0, T, D);
    }
    memset(a->dx, 0, bytes);
    norm_modulate_backward(a->dx, a->d_mod, a->d_mod + D, a->d_wide2,
                           c->num_h ? a->block[c->depth - 1].out : a->fused, a->final_r, a->final_mod + D,
                           2 * D, B, T, D);
    linear_backward(a->d_cond_silu, dw->final_adaln_w, dw->final_adaln_b, a->d_mod, a->cond_silu,
                    w->final_adaln_w, B, D, 2 * D, 1);
    // decoder h
    for (int i = c->depth - 1; i >= first_h; i--)
        block_backward(a->dx, &dw->block[i], &a->block[i], &w->block[i], v1, NULL, c, w, a, B, T, 0);
    // fused = fusion_proj([E, G]), G = mask_token where g has no token
    linear_backward(a->d_wide, dw->fusion_w, dw->fusion_b, a->dx, a->pair, w->fusion_w, (int)N, 2 * D, D, 0);
    copy_rows(a->d_E, D, a->d_wide, 2 * D, (int)N, D);
    // kept tokens pass theirs to g; what is left is the mask's
#pragma omp parallel for
    for (int i = 0; i < (path_drop ? 0 : B * n); i++) {
        real *from = a->d_wide + ((size_t)(i / n) * T + ids[i]) * 2 * D + D;
        memcpy(a->d_kept + (size_t)i * D, from, sizeof(real) * (size_t)D);
        memset(from, 0, sizeof(real) * (size_t)D);
    }
    add_rows(dw->mask_token, a->d_wide + D, 2 * D, (int)N, D);
    // sparse middle g, on a path-drop step without gradient
    if (!path_drop) {
        for (int i = first_h - 1; i >= c->num_f; i--)
            block_backward(a->d_kept, &dw->block[i], &a->block[i], &w->block[i], v1, ids, c, w, a, B, n, 0);
#pragma omp parallel for
        for (int i = 0; i < B * n; i++)
            for (int j = 0; j < D; j++)
                a->d_E[((size_t)(i / n) * T + ids[i]) * D + j] += a->d_kept[(size_t)i * D + j];
    }
    // zs = p4(silu(p2(silu(p0(E)))))
    if (c->align) {
        linear_backward(a->d_wide, dw->p4_w, dw->p4_b, a->d_zs, a->p2_silu, w->p4_w, (int)N, M, Z, 0);
        silu_backward(a->d_wide, a->d_wide, a->p2, N * M);
        linear_backward(a->d_wide2, dw->p2_w, dw->p2_b, a->d_wide, a->p0_silu, w->p2_w, (int)N, M, M, 0);
        silu_backward(a->d_wide2, a->d_wide2, a->p0, N * M);
        linear_backward(a->d_E, dw->p0_w, dw->p0_b, a->d_wide2, a->block[c->num_f - 1].out, w->p0_w, (int)N,
                        D, M, 1);
    }
    // encoder f
    for (int i = c->num_f - 1; i >= 0; i--)
        block_backward(a->d_E, &dw->block[i], &a->block[i], &w->block[i], i ? v1 : NULL, NULL, c, w, a, B, T,
                       i == 0);
    // tokens
    copy_tokens(a->d_wide, a->d_E, 0, B, P, c->cls, T, D);
    linear_backward(NULL, dw->x_w, dw->x_b, a->d_wide, a->patches, w->x_w, B * P, X, D, 0);
    if (c->cls) {
        copy_tokens(a->d_wide, a->d_E, 0, B, 1, 0, T, D);
        rmsnorm_backward(a->d_wide2, dw->cls_norm, a->d_wide, a->cls_proj, a->cls_r, w->cls_norm, B, D);
        linear_backward(NULL, dw->cls_w, dw->cls_b, a->d_wide2, a->cls_t, w->cls_w, B, Z, D, 0);
    }
    // condition
    silu_backward(a->d_cond, a->d_cond_silu, a->cond, (size_t)B * D);
    for (int b = 0; b < B; b++)
        for (int i = 0; i < D; i++) dw->label[(size_t)y[b] * D + i] += a->d_cond[(size_t)b * D + i];
    linear_backward(a->d_wide, dw->t2_w, dw->t2_b, a->d_cond, a->t0_silu, w->t2_w, B, D, D, 0);
    silu_backward(a->d_wide, a->d_wide, a->t0, (size_t)B * D);
    linear_backward(NULL, dw->t0_w, dw->t0_b, a->d_wide, a->t_features, w->t0_w, B, 256, D, 0);
}

// ----------------------------------------------------------------------------------------------------------
// The loss, over the outputs of the network and the batch:
//
//   L = mean (out - v)^2 + cls_coeff mean (cls_out - v_cls)^2 + proj_coeff L_align + cfm_coeff L_cfm
//   v = noise - x,   L_cfm = - mean (out - v[b-1])^2,   L_align = - mean_{b,t} cos(feats, zs)
//
// Means run over the whole batch; this adds the micro-batch's share to model->losses and writes the gradients
//   dout = 2 (out - v) / n - cfm_coeff 2 (out - v[b-1]) / n
//   dzs = - proj_coeff / (B T) (f^ - cos z^) / |z|,  f^ and z^ unit vectors, |z| = max(norm, 1e-12),
// the latter since z^'s own derivative is (1 - z^ z^T) / |z|.
static void loss_and_gradients(Model *model, const Batch *batch) {
    const Config *c = &model->c;
    Acts *a = &model->a;
    size_t latent = (size_t)latent_of(c), Z = (size_t)c->z_dim, T = (size_t)tokens_of(c);
    double whole = batch->whole, cfm = c->cfm ? c->cfm_coeff : 0;
    Losses *each = (Losses *)alloc_zero((size_t)batch->B, sizeof(Losses));   // summed in order: the same bits
#pragma omp parallel for
    for (int b = 0; b < batch->B; b++) {
        const real *x = batch->x + b * latent, *noise = batch->noise + b * latent, *out = a->out + b * latent;
        for (size_t i = 0; i < latent; i++) {
            real v = noise[i] - x[i],
                 v_before = b ? (noise - latent)[i] - (x - latent)[i] : batch->v_before[i];
            real d = out[i] - v, d_before = out[i] - v_before;
            each[b].denoise += (double)d * d;
            each[b].cfm -= (double)d_before * d_before;
            a->d_out[b * latent + i] = (real)((2 * d - cfm * 2 * d_before) / (whole * (double)latent));
        }
        for (size_t i = 0; i < Z && c->cls; i++) {
            real d = a->cls_out[b * Z + i] - (batch->noise_cls[b * Z + i] - batch->cls[b * Z + i]);
            each[b].cls += (double)d * d;
            a->d_cls_out[b * Z + i] = (real)(c->cls_coeff * 2 * d / (whole * (double)Z));
        }
        for (size_t t = 0; t < T && c->align; t++) {
            const real *f = batch->feats + (b * T + t) * Z, *z = a->zs + (b * T + t) * Z;
            real *dz = a->d_zs + (b * T + t) * Z;
            double f_norm = sqrt((double)dot(f, f, (int)Z)), z_norm = sqrt((double)dot(z, z, (int)Z));
            f_norm = f_norm > 1e-12 ? f_norm : 1e-12, z_norm = z_norm > 1e-12 ? z_norm : 1e-12;
            double cosine = (double)dot(f, z, (int)Z) / (f_norm * z_norm);
            each[b].proj -= cosine;
            double k = -c->proj_coeff / (whole * (double)T * z_norm);
            for (size_t i = 0; i < Z; i++) dz[i] = (real)(k * (f[i] / f_norm - cosine * z[i] / z_norm));
        }
    }
    Losses *sum = &model->losses;
    for (int b = 0; b < batch->B; b++) {
        sum->denoise += each[b].denoise / (whole * (double)latent);
        sum->cfm += each[b].cfm / (whole * (double)latent);
        sum->cls += each[b].cls / (whole * (double)Z);
        sum->proj += each[b].proj / (whole * (double)T);
    }
    free(each);
    sum->total = sum->denoise + c->cls_coeff * sum->cls + c->proj_coeff * sum->proj + cfm * sum->cfm;
}

// Gradients are added to; call zero_gradients before the first micro-batch of a step.
static void zero_gradients(Model *m) { memset(m->grads, 0, m->table.total * sizeof(real)); }

static void forward_backward(Model *model, const Batch *batch) {
    const Config *c = &model->c;
    size_t latent = (size_t)latent_of(c), Z = (size_t)c->z_dim;
    for (int b = 0; b < batch->B; b++) {   // x_t = (1 - t) x + t noise, and CLS alike
        real t = batch->t[b];
        for (size_t i = b * latent; i < (b + 1) * latent; i++)
            model->a.x_t[i] = (1 - t) * batch->x[i] + t * batch->noise[i];
        for (size_t i = b * Z; i < (b + 1) * Z && c->cls; i++)
            model->a.cls_t[i] = (1 - t) * batch->cls[i] + t * batch->noise_cls[i];
    }
    network_forward(model, &model->w, batch->t, batch->y, batch->ids, batch->path_drop, batch->B);
    loss_and_gradients(model, batch);
    network_backward(model, batch->y, batch->ids, batch->path_drop, batch->B);
}

// Velocities v [B,C,S,S], v_cls [B,Z] at x, cls, t, y on all tokens: what the sampler asks for, max_batch at
// a time.
static void velocity(Model *model, real *v, real *v_cls, const real *x, const real *cls, const real *t,
                     const int *y, int use_ema, int path_drop, int B) {
    size_t latent = (size_t)latent_of(&model->c), Z = (size_t)model->c.z_dim;
    for (int b = 0; b < B; b += model->max_batch) {
        int n = imin(model->max_batch, B - b);
        memcpy(model->a.x_t, x + b * latent, n * latent * sizeof(real));
        if (model->c.cls) memcpy(model->a.cls_t, cls + b * Z, n * Z * sizeof(real));
        network_forward(model, use_ema ? &model->w_ema : &model->w, t + b, y + b, NULL, path_drop, n);
        memcpy(v + b * latent, model->a.out, n * latent * sizeof(real));
        if (model->c.cls) memcpy(v_cls + b * Z, model->a.cls_out, n * Z * sizeof(real));
    }
}

// ----------------------------------------------------------------------------------------------------------
// Optimizer: clipping to a global norm, AdamW and the moving average in one pass; step counts from 1. The
// norm before clipping goes to model->losses. Where it is not finite nothing is changed, so that the last
// good state stays.
static void update(Model *model, int step) {
    const Config *c = &model->c;
    size_t n = model->table.trained, chunk = 4096, chunks = (n + chunk - 1) / chunk;
    double *sums = (double *)alloc_zero(chunks, sizeof(double)), total = 0;
#pragma omp parallel for
    for (size_t k = 0; k < chunks; k++)
        for (size_t i = k * chunk; i < n && i < (k + 1) * chunk; i++)
            sums[k] += (double)model->grads[i] * model->grads[i];
    for (size_t k = 0; k < chunks; k++)
        total += sums[k];   // in order: the same bits for any number of threads
    free(sums);
    double norm = model->losses.grad_norm = sqrt(total), clip = c->max_grad_norm / (norm + 1e-6);
    if (!(norm < INFINITY)) return;
    real scale = (real)(clip < 1 ? clip : 1), b1 = (real)c->beta1, b2 = (real)c->beta2, eps = (real)c->eps;
    real rate = (real)(c->lr / (1 - pow(c->beta1, step))), decay = (real)(1 - c->lr * c->weight_decay);
    real root = (real)(1 / sqrt(1 - pow(c->beta2, step)));
    real one1 = (real)(1 - c->beta1), one2 = (real)(1 - c->beta2);
    double ema = c->ema ? c->ema_decay : 0, warm = (1.0 + step) / (10.0 + step);
    real e = (real)(c->ema_warmup && warm < ema ? warm : ema);
    real one_e = (real)(1 - (c->ema_warmup && warm < ema ? warm : ema));
#pragma omp parallel for
    for (size_t i = 0; i < n; i++) {
        real g = model->grads[i] * scale, p = model->params[i] * decay;
        real m = model->m[i] = b1 * model->m[i] + one1 * g, v = model->v[i] = b2 * model->v[i] + one2 * g * g;
        model->params[i] = p -= rate * m / ((real)sqrt(v) * root + eps);
        model->ema[i] = e * model->ema[i] + one_e * p;
    }
}

// The losses summed since the last call, and a fresh start
static Losses read_losses(Model *model) {
    Losses sum = model->losses;
    memset(&model->losses, 0, sizeof(Losses));
    return sum;
}

enum Block { PARAMS, GRADS, ADAM_M, ADAM_V, EMA };
static real *model_block(Model *m, enum Block which) {
    real *blocks[] = {m->params, m->grads, m->m, m->v, m->ema};
    return blocks[which];
}
static void get_block(real *host, Model *m, enum Block which) {
    memcpy(host, model_block(m, which), m->table.total * sizeof(real));
}
static void put_block(Model *m, const real *host, enum Block which) {
    memcpy(model_block(m, which), host, m->table.total * sizeof(real));
}

// An activation of the last forward by the name that reference files use (shared with the tests); NULL if
// unknown
static const real *activation(Model *m, const char *name, size_t *n) {
    const Config *c = &m->c;
    const Acts *a = &m->a;
    size_t T = (size_t)tokens_of(c), D = (size_t)c->hidden_size, Z = (size_t)c->z_dim;
    int i;
    if (sscanf(name, "block.%d", &i) == 1 && i >= 0 && i < c->depth) {
        *n = (is_sparse(c, i) ? (size_t)kept_of(c) : T) * D;
        return a->block[i].out;
    }
    struct { const char *name; const real *x; size_t n; } list[] = {
        {"embed", a->embed, T * D}, {"cond", a->cond, D}, {"fused", a->fused, T * D}, {"zs", a->zs, T * Z},
        {"out", a->out, (size_t)latent_of(c)}, {"cls_out", a->cls_out, Z}};
    for (i = 0; i < 6; i++)
        if (!strcmp(name, list[i].name)) { *n = list[i].n; return list[i].x; }
    return NULL;
}

static int all_finite(const real *x, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (!(fabs((double)x[i]) < INFINITY)) return 0;
    return 1;
}

// The first tensor, in the order of the computation, that holds a number that is not finite; "" if there is
// none
static void find_bad(char name[96], Model *model, const Batch *batch) {
    const Config *c = &model->c;
    size_t B = (size_t)batch->B, T = (size_t)tokens_of(c), Z = (size_t)c->z_dim, n = 0;
    const real *data[] = {batch->x, batch->cls, batch->feats};
    size_t sizes[] = {B * (size_t)latent_of(c), c->cls ? B * Z : 0, c->align ? B * T * Z : 0};
    static const char *const data_names[] = {"latents", "cls", "feats"};
    static const char *const order[] = {"embed", "cond", "block", "fused", "zs", "out", "cls_out"};
    name[0] = 0;
    for (int i = 0; i < 3 && !name[0]; i++)
        if (!all_finite(data[i], sizes[i])) snprintf(name, 96, "%s of the data", data_names[i]);
    for (int i = 0; i < model->table.count && !name[0]; i++) {
        const Tensor *t = &model->table.tensors[i];
        if (!all_finite(model->params + t->offset, t->size)) snprintf(name, 96, "parameter %s", t->name);
    }
    for (int k = 0; k < 7 && !name[0]; k++)
        for (int i = 0; i < (k == 2 ? c->depth : 1) && !name[0]; i++) {
            char what[32];
            if (k == 2) snprintf(what, sizeof(what), "block.%d", i);
            else snprintf(what, sizeof(what), "%s", order[k]);
            const real *x = activation(model, what, &n);
            int unused = (k == 2 && is_sparse(c, i) && batch->path_drop) || (k == 4 && !c->align) ||
                         (k == 6 && !c->cls);
            if (!unused && !all_finite(x, n * B)) snprintf(name, 96, "activation %s", what);
        }
    for (int i = 0; i < model->table.count && !name[0]; i++) {
        const Tensor *t = &model->table.tensors[i];
        if (!all_finite(model->grads + t->offset, t->size)) snprintf(name, 96, "gradient of %s", t->name);
    }
}

// What a trainer offers to the sampler, the training loop and the tests. train_srdit.cu offers the same on a
// GPU; its model begins with a Model, whose configuration and table are read here.
typedef struct {
    const char *name;
    Model *(*create)(const Config *, int max_batch, uint64_t seed);
    void (*destroy)(Model *);
    void (*zero_gradients)(Model *);
    void (*forward_backward)(Model *, const Batch *);
    void (*update)(Model *, int step);
    Losses (*read_losses)(Model *);
    void (*velocity)(Model *, real *v, real *v_cls, const real *x, const real *cls, const real *t,
                     const int *y, int use_ema, int path_drop, int B);
    void (*get_block)(real *, Model *, enum Block);
    void (*put_block)(Model *, const real *, enum Block);
    const real *(*activation)(Model *, const char *name, size_t *n);
    void (*find_bad)(char name[96], Model *, const Batch *);
} Backend;
static const Backend cpu_backend = {
    "CPU", model_create, model_destroy, zero_gradients, forward_backward, update,
    read_losses, velocity, get_block, put_block, activation, find_bad};

// ----------------------------------------------------------------------------------------------------------
// Sampler: from noise at t = 1 to data at t = 0. State in double.

typedef struct {
    int steps;                      // network evaluations, N
    double cfg, cls_cfg;            // guidance scales, w; cfg <= 1: none; cls_cfg <= 0: CLS unguided
    double low, high;               // guidance only for t in [low, high]
    int path_drop;                  // the unconditional branch drops the sparse path
    int use_ema;
    uint64_t seed;
    int first;   // global index of the first sample: its noise does not depend on the batch
    const double *eps, *cls_eps;    // noises given [N-1,B,C,S,S], [N-1,B,Z] (tests), or NULL: drawn
} Sampling;

static Sampling sampling_default(void) {
    Sampling s = {50, 1, 0, 0, 1, 1, 1, 1, 0, NULL, NULL};
    return s;
}

// t[N+1]: linspace(1, 0.04, N), then 0, each shifted
static void sampling_times(double *t, const Config *c, int N) {
    for (int i = 0; i < N; i++) t[i] = shift_time(c, N > 1 ? 1 + (0.04 - 1) * i / (N - 1) : 1);
    t[N] = shift_time(c, 0);
}

// Memory for n samples, used again from step to step
typedef struct { real *x, *cls, *t, *v[2], *v_cls[2]; int *y, *no_class; } SamplerWork;
static SamplerWork sampler_work(const Config *c, int n) {
    SamplerWork w;
    size_t latent = (size_t)n * (size_t)latent_of(c), Z = (size_t)n * (size_t)c->z_dim;
    w.x = (real *)alloc_zero(latent, sizeof(real)), w.cls = (real *)alloc_zero(Z, sizeof(real));
    w.t = (real *)alloc_zero((size_t)n, sizeof(real));
    for (int i = 0; i < 2; i++) {
        w.v[i] = (real *)alloc_zero(latent, sizeof(real));
        w.v_cls[i] = (real *)alloc_zero(Z, sizeof(real));
    }
    w.y = (int *)alloc_zero((size_t)n, sizeof(int)), w.no_class = (int *)alloc_zero((size_t)n, sizeof(int));
    for (int i = 0; i < n; i++) w.no_class[i] = c->num_classes;
    return w;
}
static void sampler_work_free(SamplerWork *w) {
    free(w->x), free(w->cls), free(w->t), free(w->y), free(w->no_class);
    for (int i = 0; i < 2; i++) free(w->v[i]), free(w->v_cls[i]);
}

// Guided velocities into w->v[0], w->v_cls[0]: v_u + w (v_c - v_u). Guiding v is guiding the drift, which is
// linear in v.
static void guided_velocity(SamplerWork *w, const Backend *backend, Model *model, const Sampling *s,
                            const double *x, const double *cls, const int *y, double t, int n) {
    size_t latent = (size_t)n * (size_t)latent_of(&model->c),
           Z = model->c.cls ? (size_t)n * (size_t)model->c.z_dim : 0;
    for (size_t i = 0; i < latent; i++) w->x[i] = (real)x[i];
    for (size_t i = 0; i < Z; i++) w->cls[i] = (real)cls[i];
    for (int i = 0; i < n; i++) w->t[i] = (real)t;
    backend->velocity(model, w->v[0], w->v_cls[0], w->x, w->cls, w->t, y, s->use_ema, 0, n);
    if (!(s->cfg > 1 && t >= s->low && t <= s->high)) return;
    backend->velocity(model, w->v[1], w->v_cls[1], w->x, w->cls, w->t, w->no_class, s->use_ema, s->path_drop,
                      n);
    for (size_t i = 0; i < latent; i++)
        w->v[0][i] = (real)(w->v[1][i] + s->cfg * ((double)w->v[0][i] - w->v[1][i]));
    for (size_t i = 0; i < Z && s->cls_cfg > 0; i++)
        w->v_cls[0][i] = (real)(w->v_cls[1][i] + s->cls_cfg * ((double)w->v_cls[0][i] - w->v_cls[1][i]));
}

// Standard normals for the state of n samples: i = 0 the start, i >= 1 step i of the sampler
static void sampler_noise(double *x, double *cls, const Config *c, const Sampling *s, int i, int n) {
    size_t latent = (size_t)latent_of(c), Z = (size_t)c->z_dim;
    real *z = (real *)alloc_zero(latent > Z ? latent : Z, sizeof(real));
    for (int b = 0; b < n; b++) {
        fill_normal(z, latent, s->seed, STREAM_SAMPLE_X, (uint32_t)i, (uint32_t)(s->first + b));
        for (size_t j = 0; j < latent; j++) x[b * latent + j] = z[j];
        fill_normal(z, Z, s->seed, STREAM_SAMPLE_CLS, (uint32_t)i, (uint32_t)(s->first + b));
        for (size_t j = 0; j < Z; j++) cls[b * Z + j] = z[j];
    }
    free(z);
}

// x += d dt + sqrt(2t) sqrt(|dt|) eps, with score = -((1-t) v + x) / t and drift d = v - t score; eps NULL:
// no noise
static void euler_maruyama_step(double *x, const real *v, const double *eps, size_t n, double t, double dt) {
    for (size_t i = 0; i < n; i++) {
        double score = -((1 - t) * v[i] + x[i]) / t, drift = v[i] - t * score;
        x[i] += drift * dt + (eps ? sqrt(2 * t) * sqrt(fabs(dt)) * eps[i] : 0);
    }
}

// n samples: x [n,C,S,S] and cls [n,Z] come in as noise and leave as data. progress (NULL: none) is called
// after each of the N steps.
static void sample_euler_maruyama(double *x, double *cls, const Backend *backend, Model *model,
                                  const Sampling *s, const int *y, int n,
                                  void (*progress)(int step, int steps, const double *x, void *),
                                  void *user) {
    const Config *c = &model->c;
    size_t latent = (size_t)n * (size_t)latent_of(c), Z = (size_t)n * (size_t)c->z_dim;
    SamplerWork w = sampler_work(c, n);
    double *t = (double *)alloc_zero((size_t)s->steps + 1, sizeof(double));
    double *eps = (double *)alloc_zero(latent, sizeof(double)),
           *cls_eps = (double *)alloc_zero(Z, sizeof(double));
    sampling_times(t, c, s->steps);
    for (int i = 0; i < s->steps; i++) {
        const double *e = eps, *e_cls = cls_eps;
        if (s->eps) e = s->eps + (size_t)i * latent, e_cls = s->cls_eps + (size_t)i * Z;
        else if (i < s->steps - 1) sampler_noise(eps, cls_eps, c, s, i + 1, n);
        guided_velocity(&w, backend, model, s, x, cls, y, t[i], n);
        int last = i == s->steps - 1;   // the last step takes the mean
        euler_maruyama_step(x, w.v[0], last ? NULL : e, latent, t[i], t[i + 1] - t[i]);
        if (c->cls) euler_maruyama_step(cls, w.v_cls[0], last ? NULL : e_cls, Z, t[i], t[i + 1] - t[i]);
        if (progress) progress(i + 1, s->steps, x, user);
    }
    free(t), free(eps), free(cls_eps), sampler_work_free(&w);
}


// The model must fit the data.
static void data_check(const Data *d, const Config *c) {
    const char *path = d->shards[0].file->path;
    if (c->in_channels != d->C || c->input_size != d->S)
        die("%s: its latents are %d x %d x %d, but the model takes %d x %d x %d (--in-channels, "
            "--input-size)",
            path, d->C, d->S, d->S, c->in_channels, c->input_size, c->input_size);
    if (c->num_classes < d->K)
        die("%s: it has %d classes, but the model only %d (--num-classes)", path, d->K, c->num_classes);
    if (c->align && !d->shards[0].feats)
        die("%s: it has no feats to align with; --no-align trains without", path);
    if (c->cls && !d->shards[0].cls) die("%s: it has no cls; --no-cls trains without the CLS token", path);
    if ((c->align || c->cls) && c->z_dim != d->Z)
        die("%s: its features are %d wide, but the model takes %d (--z-dim)", path, d->Z, c->z_dim);
    if (c->align && d->tokens != patches_of(c) + 1)
        die("%s: it has features for %d tokens, but the model has %d: CLS and %d patches (--patch-size)",
            path, d->tokens, patches_of(c) + 1, patches_of(c));
}

static Batch *batch_create(const Config *c, int B) {
    Batch *batch = (Batch *)alloc_zero(1, sizeof(Batch));
    size_t n = (size_t)B, latent = (size_t)latent_of(c), Z = (size_t)c->z_dim, T = (size_t)tokens_of(c);
    batch->B = batch->whole = B;
    batch->x = (real *)alloc_zero(n * latent, sizeof(real));
    batch->noise = (real *)alloc_zero(n * latent, sizeof(real));
    batch->v_before = (real *)alloc_zero(latent, sizeof(real));
    batch->cls = (real *)alloc_zero(n * Z, sizeof(real));
    batch->noise_cls = (real *)alloc_zero(n * Z, sizeof(real));
    batch->t = (real *)alloc_zero(n, sizeof(real)), batch->y = (int *)alloc_zero(n, sizeof(int));
    batch->ids = (int *)alloc_zero(n * T, sizeof(int));
    batch->feats = (real *)alloc_zero(n * T * Z, sizeof(real));
    return batch;
}
static void batch_free(Batch *b) {
    free(b->x), free(b->noise), free(b->v_before), free(b->cls), free(b->noise_cls);
    free(b->t), free(b->y), free(b->ids), free(b->feats), free(b);
}

// A uniformly random set of k of T tokens, in rising order: those with the k smallest of T random keys
static void draw_kept(int *ids, int k, int T, uint64_t seed, uint32_t step, uint32_t sample) {
    uint32_t *key = (uint32_t *)alloc_zero((size_t)T, sizeof(uint32_t));
    int count = 0;
    for (int i = 0; i < T; i++) key[i] = draw4(seed, STREAM_ROUTE, step, sample, (uint32_t)i / 4).v[i % 4];
    for (int i = 0; i < T; i++) {
        int rank = 0;
        for (int j = 0; j < T; j++) rank += key[j] < key[i] || (key[j] == key[i] && j < i);
        if (rank < k) ids[count++] = i;
    }
    free(key);
}

// The data and the draws of samples first ... first+B of a step whose batch has `whole` samples
static void batch_load(Batch *batch, const Data *d, const Config *c, uint64_t seed, int step, int first,
                       int whole) {
    size_t latent = (size_t)latent_of(c), Z = (size_t)c->z_dim, T = (size_t)tokens_of(c),
           Tk = (size_t)kept_of(c);
    uint32_t n = (uint32_t)d->count, s = (uint32_t)step;
    batch->first = first, batch->whole = whole, batch->seed = seed, batch->step = step;
    batch->path_drop = c->path_drop && uniform(seed, STREAM_PATH_DROP, s, 0) < c->path_drop_prob;
#pragma omp parallel for
    for (int b = -1; b < batch->B; b++) {   // -1: the sample before the first, for the contrastive pair
        uint32_t sample = (uint32_t)((first + b + whole) % whole);
        uint64_t position = (uint64_t)step * (uint64_t)whole + sample;
        size_t at = permuted((uint32_t)(position % n), n, seed, STREAM_ORDER, (uint32_t)(position / n));
        if (b < 0) {
            real *noise = (real *)alloc_zero(latent, sizeof(real));
            data_sample(d, at, batch->v_before, NULL, NULL, NULL, 0);
            if (!batch->on_device) fill_normal(noise, latent, seed, STREAM_NOISE, s, sample);
            for (size_t i = 0; i < latent; i++) batch->v_before[i] = noise[i] - batch->v_before[i];
            free(noise);
            continue;
        }
        size_t k = (size_t)b;
        data_sample(d, at, batch->x + k * latent, &batch->y[b], c->cls ? batch->cls + k * Z : NULL,
                    c->align ? batch->feats + k * T * Z : NULL, !c->cls);
        if (!batch->on_device) fill_normal(batch->noise + k * latent, latent, seed, STREAM_NOISE, s, sample);
        if (c->cls && !batch->on_device)
            fill_normal(batch->noise_cls + k * Z, Z, seed, STREAM_NOISE_CLS, s, sample);
        batch->t[b] = (real)shift_time(c, uniform(seed, STREAM_TIME, s, sample));
        if (c->label_dropout && uniform(seed, STREAM_LABEL_DROP, s, sample) < c->class_dropout_prob)
            batch->y[b] = c->num_classes;
        if (c->routing && !batch->on_device) draw_kept(batch->ids + k * Tk, (int)Tk, (int)T, seed, s, sample);
        else
            for (size_t i = 0; i < T; i++) batch->ids[k * T + i] = (int)i;
    }
}

// ----------------------------------------------------------------------------------------------------------
// A run: its options, its checkpoints

typedef struct {
    TextList data;
    const char *model, *out, *resume, *export_to;
    int batch, accum, steps, log_every, save_every, sample_every, sample_steps, threads;
    uint64_t seed;
} Run;

enum { MAX_PAIRS = CONFIG_OPTIONS + 24 };
// The metadata of checkpoints and exports; returns how many pairs
static int run_pairs(SafePair pairs[MAX_PAIRS], const char *format, const Config *c, const Run *run,
                     const Data *d, int step) {
    int n = 0;
    pairs[n++] = pair_text("format", format), pairs[n++] = pair_text("model", run->model);
    OptionTable t = config_table((Config *)c);
    for (int i = 0; i < t.count; i++) pairs[n++] = pair_number(t.options[i].name, option_get(&t, i));
    pairs[n++] = pair_number("step", step), pairs[n++] = pair_number("steps", run->steps);
    pairs[n++] = pair_number("batch", run->batch), pairs[n++] = pair_number("accum", run->accum);
    pairs[n] = pair_text("seed", "");
    snprintf(pairs[n++].value, sizeof(pairs[0].value), "%llu", (unsigned long long)run->seed);
    pairs[n++] = pair_text("data", d->name), pairs[n++] = pair_text("decoder", d->decoder);
    pairs[n++] = pair_number("latent_scale", d->scale), pairs[n++] = pair_number("latent_offset", d->offset);
    pairs[n++] = pair_number("data_samples", (double)d->count);
    return n;
}

static const char *const block_prefix[] = {"model.", "", "adam.m.", "adam.v.", "ema."};   // by enum Block

static void checkpoint_write(const char *path, const Backend *backend, Model *m, const Run *run,
                             const Data *d, int step) {
    static const enum Block blocks[] = {PARAMS, EMA, ADAM_M, ADAM_V};
    SafePair pairs[MAX_PAIRS];
    int pair_count = run_pairs(pairs, "srdit-checkpoint-1", &m->c, run, d, step), n = 0;
    SafeItem *items = (SafeItem *)alloc_zero(4 * (size_t)m->table.count, sizeof(SafeItem));
    real *host[4];
    for (int k = 0; k < 4; k++) {
        host[k] = (real *)alloc_zero(m->table.total, sizeof(real));
        backend->get_block(host[k], m, blocks[k]);
        if (!all_finite(host[k], m->table.total))
            die("step %d: the weights are no longer finite numbers, so %s was not written; try a smaller "
                "--lr",
                step, path);
        for (int i = 0; i < m->table.count; i++) {
            const Tensor *t = &m->table.tensors[i];
            if (t->start >= POSITIONS) continue;
            SafeItem *item = &items[n++];
            snprintf(item->name, sizeof(item->name), "%s%s", block_prefix[blocks[k]], t->name);
            item->dtype = real_dtype(), item->ndim = t->ndim, item->data = host[k] + t->offset;
            memcpy(item->shape, t->shape, sizeof(item->shape));
        }
    }
    safe_write(path, pairs, pair_count, items, n);
    for (int k = 0; k < 4; k++) free(host[k]);
    free(items);
}

// The EMA under the reference implementation's names, with its fixed tables: what its load_state_dict(strict)
// takes
static void export_write(const char *path, const Backend *backend, Model *m, const Run *run, const Data *d,
                         int step) {
    SafePair pairs[MAX_PAIRS];
    int pair_count = run_pairs(pairs, "srdit-export-1", &m->c, run, d, step);
    SafeItem *items = (SafeItem *)alloc_zero((size_t)m->table.count, sizeof(SafeItem));
    real *host = (real *)alloc_zero(m->table.total, sizeof(real));
    backend->get_block(host, m, EMA);
    for (int i = 0; i < m->table.count; i++) {
        const Tensor *t = &m->table.tensors[i];
        snprintf(items[i].name, sizeof(items[i].name), "%s", t->name);
        items[i].dtype = real_dtype(), items[i].ndim = t->ndim, items[i].data = host + t->offset;
        memcpy(items[i].shape, t->shape, sizeof(items[i].shape));
    }
    safe_write(path, pairs, pair_count, items, m->table.count);
    free(items), free(host);
}

static SafeFile *checkpoint_open(const char *path, Config *c) {
    SafeFile *f = safe_open(path);
    const char *format = safe_metadata(f, "format");
    if (!format || (strcmp(format, "srdit-checkpoint-1") && strcmp(format, "srdit-export-1")))
        die("%s: not a checkpoint of this program: its metadata has no format srdit-checkpoint-1", path);
    config_read(c, f);
    return f;
}

// One block of a checkpoint (names with the given prefix) in table order; the fixed tables come from the
// model's own.
static void checkpoint_block(real *host, const Table *table, const SafeFile *f, const char *prefix) {
    for (int i = 0; i < table->count; i++) {
        const Tensor *t = &table->tensors[i];
        char name[96];
        snprintf(name, sizeof(name), "%s%s", prefix, t->name);
        if (t->start >= POSITIONS) continue;
        const SafeTensor *s = safe_find(f, name);
        if (!s) die("%s: tensor %s is missing", f->path, name);
        int same = s->ndim == t->ndim;
        for (int d = 0; same && d < t->ndim; d++) same = s->shape[d] == (uint64_t)t->shape[d];
        if (!same) die("%s: tensor %s: its shape is not that of the model in the metadata", f->path, name);
        if (!strchr("FB", s->dtype[0]) || !strcmp(s->dtype, "BOOL"))
            die("%s: tensor %s: dtype %s where floating point is expected", f->path, name, s->dtype);
        safe_read(host + t->offset, f, s);
        if (!all_finite(host + t->offset, t->size))
            die("%s: tensor %s holds a number that is not finite", f->path, name);
    }
}

static void checkpoint_load(const Backend *backend, Model *m, const SafeFile *f) {
    static const enum Block blocks[] = {PARAMS, EMA, ADAM_M, ADAM_V};
    real *host = (real *)alloc_zero(m->table.total, sizeof(real));
    backend->get_block(host, m, PARAMS);   // for the fixed tables
    for (int k = 0; k < 4; k++) {
        checkpoint_block(host, &m->table, f, block_prefix[blocks[k]]);
        backend->put_block(m, host, blocks[k]);
    }
    free(host);
}

// ----------------------------------------------------------------------------------------------------------
// Command line

#define OPTION(name, field, kind, low, high, help) {name, kind, offsetof(Run, field), low, high, 0, help}
static const Option run_options[] = {
    OPTION("model", model, TEXT, 0, 0, "nano, or S, B, L, XL with a patch size, such as B/1 [nano]"),
    OPTION("data", data, LIST, 0, 0, "one or more data shards [data/digits.safetensors]"),
    OPTION("out", out, TEXT, 0, 0, "folder for checkpoint.safetensors, samples.png, log.csv [out]"),
    OPTION("steps", steps, WHOLE, 0, 1e9, "training steps in all"),
    OPTION("batch", batch, WHOLE, 1, 1e6, "samples a step"),
    OPTION("accum", accum, WHOLE, 0, 1e6, "parts that a batch is computed in, to save memory; 0: chosen"),
    OPTION("seed", seed, SEED, 0, 9e15, "of everything random"),
    OPTION("resume", resume, TEXT, 0, 0, "go on from this checkpoint, bit for bit"),
    OPTION("export", export_to, TEXT, 0, 0,
           "at the end write the EMA under the reference implementation's names"),
    OPTION("log_every", log_every, WHOLE, 1, 1e9,
           "steps between lines; a line shows the mean since the last"),
    OPTION("save_every", save_every, WHOLE, 1, 1e9, "steps between checkpoints"),
    OPTION("sample_every", sample_every, WHOLE, 0, 1e9, "steps between pictures; 0: one at the end"),
    OPTION("sample_steps", sample_steps, WHOLE, 1, 1e6, "network evaluations a picture"),
    OPTION("threads", threads, WHOLE, 0, 4096, "CPU threads; 0: what OpenMP chooses"),
};
enum { RUN_OPTIONS = sizeof(run_options) / sizeof(run_options[0]) };

static void print_help(const char *program, const OptionTable *run_table, const OptionTable *config) {
    printf("Trains SR-DiT, the Speedrun Diffusion Transformer (arXiv 2512.12386).\n\n"
           "  %s                                          nano on the bundled digits\n"
           "  %s --resume out/checkpoint.safetensors --steps 3000\n"
           "  %s --no-align --no-cls --steps 500 --out out/plain    two of the paper's techniques off\n\n"
           "Options, with their defaults for --model %s:\n", program, program, program,
           ((const Run *)run_table->fields)->model);
    options_print(run_table, 0, 22);
    printf("\nSizes, loss and optimizer:\n");
    options_print(config, 0, 22);
    printf("\nThe paper's techniques; each is on, and its flag switches it off:\n");
    options_print(config, 1, 22);
    printf("\nCtrl-C ends the step, writes the checkpoint and says how to go on.\n");
}

// ----------------------------------------------------------------------------------------------------------
// Training

static void print_start(const Config *c, const Run *run, const Data *d, const Model *m,
                        const Backend *backend, int step) {
    int sparse = c->depth - c->num_f - c->num_h, off = 0;
    printf("SR-DiT %s on the %s\n", run->model, backend->name);
    printf("  model      %d blocks (%d dense, %d sparse, %d dense), width %d, %d heads, patch %d; %d tokens, "
           "%d kept in "
           "the sparse blocks\n",
           c->depth, c->num_f, sparse, c->num_h, c->hidden_size, c->num_heads, c->patch_size, tokens_of(c),
           kept_of(c));
    printf("  parameters %zu trained\n  techniques ", count_trained(&m->table));
    OptionTable config = config_table((Config *)c);
    for (int i = 0; i < config.count; i++)
        if (config.options[i].kind == TECHNIQUE && !option_get(&config, i))
            printf("%s%s", off++ ? ", " : "off: ", config.options[i].name);
    printf("%s\n", off ? "" : "all on");
    printf("  data       %s: %zu samples in %d file%s, %d classes, latents %d x %d x %d, features %d x %d\n",
           d->name, d->count, d->shard_count, d->shard_count > 1 ? "s" : "", d->K, d->C, d->S, d->S,
           d->tokens, d->Z);
    printf("  run        steps %d to %d, batch %d in %d part%s, lr %g, seed %llu\n", step, run->steps,
           run->batch, run->accum, run->accum > 1 ? "s" : "", c->lr, (unsigned long long)run->seed);
    printf("  memory     %.1f MB of parameters, gradients, moments and EMA, %.1f MB of activations\n",
           (double)m->parameter_bytes / 1e6, (double)m->activation_bytes / 1e6);
    printf("  build      %s, vectors of %d bytes, ", sizeof(real) == 4 ? "float" : "double", VBYTES);
#ifdef _OPENMP
    printf("OpenMP with %d thread%s\n\n", omp_get_max_threads(), omp_get_max_threads() > 1 ? "s" : "");
#else
    printf("no OpenMP: one thread\n\n");
#endif
    fflush(stdout);
}

// 10 rows of samples, a column a class, as a PNG and in the terminal
static void write_samples(const char *path, const Backend *backend, Model *m, const Run *run, const Data *d,
                          int step) {
    const Config *c = &m->c;
    int columns = imin(d->K, 10), n = 10 * columns;
    if (strcmp(d->decoder, "pixels") || (c->in_channels != 1 && c->in_channels != 3)) {
        printf("pictures of this data need its decoder: ./sample CHECKPOINT --decoder FILE\n");
        return;
    }
    double start = now_seconds();
    Sampling s = sampling_default();
    s.steps = run->sample_steps, s.seed = run->seed;
    size_t latent = (size_t)n * (size_t)latent_of(c);
    double *x = (double *)alloc_zero(latent, sizeof(double));
    double *cls = (double *)alloc_zero((size_t)n * (size_t)c->z_dim, sizeof(double));
    int *y = (int *)alloc_zero((size_t)n, sizeof(int));
    for (int i = 0; i < n; i++) y[i] = i % columns;
    sampler_noise(x, cls, c, &s, 0, n);
    sample_euler_maruyama(x, cls, backend, m, &s, y, n, NULL, NULL);
    int S = c->input_size, C = c->in_channels;
    uint8_t *pixels = (uint8_t *)alloc_zero(latent, 1);
    pixels_of(pixels, x, n, C, S, S);
    Grid grid = grid_of_all(pixels, n, S, S, C, columns, imax(1, 48 / S), 2);
    SafePair text[4] = {pair_text("Software", "SR-DiT in C"), pair_text("model", run->model),
                        pair_number("step", step), pair_number("seed", (double)run->seed)};
    png_write(path, &grid.p, text, 4);
    printf("%s: %d samples, one column a class, %d sampling steps, %.1f s\n", path, n, s.steps,
           now_seconds() - start);
    if (isatty(STDOUT_FILENO)) pictures_show(pixels, n, S, S, C, columns);
    fflush(stdout);
    free(grid.p.pixels), free(pixels), free(x), free(cls), free(y);
}

// log.csv: a fresh one, or on resume the rows up to `step` of the one that is there
static FILE *log_open(const char *path, int step) {
    char line[1024], *kept = NULL;
    size_t length = 0;
    FILE *memory = open_memstream(&kept, &length), *old = step ? fopen(path, "r") : NULL;
    if (!memory) die("%s: out of memory", path);
    fprintf(memory, "step,loss,denoise,cls,proj,cfm,grad_norm,lr,ms_per_step,images_per_s\n");
    while (old && fgets(line, sizeof(line), old))
        if (isdigit((unsigned char)line[0]) && atoi(line) <= step && strchr(line, '\n')) fputs(line, memory);
    if (old) fclose(old);
    fclose(memory);
    FILE *log = fopen(path, "w");
    if (!log || fwrite(kept, 1, length, log) != length || fflush(log))
        die("%s: cannot be written: %s", path, strerror(errno));
    free(kept);
    return log;
}

// Parts that suit a CPU's cache: of no more than some 3000 tokens, if the batch can be halved so often
static int parts_of(const Config *c, int batch) {
    int parts = 1;
    while (batch % (2 * parts) == 0 && batch / parts > 3000 / tokens_of(c)) parts *= 2;
    return parts;
}

static int train_main(int argc, char **argv, const Backend *backend) {
    char *default_data[] = {(char *)"data/digits.safetensors"};
    Config c = config_default();
    Run run;
    memset(&run, 0, sizeof(run));   // 0 steps, batch, accum, threads: chosen below
    run.data.items = default_data, run.data.count = 1, run.model = "nano", run.out = "out";
    run.log_every = 50, run.save_every = 500, run.sample_steps = 50, run.seed = 1;
    int given[CONFIG_OPTIONS] = {0}, step = 0, help = wants_help(argc, argv);
    OptionTable tables[2] = {{run_options, RUN_OPTIONS, &run, NULL}, config_table(&c)};
    tables[1].given = given;
    SafeFile *resume = NULL;
    const char *model_flag = text_after("--model", argc, argv);   // these two come first, whatever their place
    if (model_flag) run.model = model_flag;
    run.resume = text_after("--resume", argc, argv);
    if (run.resume && !help) {
        resume = checkpoint_open(run.resume, &c);
        if (strcmp(safe_metadata(resume, "format"), "srdit-checkpoint-1"))
            die("%s: an export holds only weights; resume from a checkpoint", run.resume);
        const char *name = safe_metadata(resume, "model");
        run.model = name ? name : "custom";
        step = (int)safe_whole(resume, "step", 0, 1e9, 0),
        run.steps = (int)safe_whole(resume, "steps", 0, 1e9, 0);
        run.batch = (int)safe_whole(resume, "batch", 1, 1e6, 64);
        run.accum = (int)safe_whole(resume, "accum", 1, 1e6, 1);
        run.seed = (uint64_t)safe_whole(resume, "seed", 0, 9e15, 1);
    } else {
        if (!model_preset(&c, run.model))
            die("--model %s: there is no such model; there are nano and S/1 S/2 S/4 B/1 ... XL/4", run.model);
        run.batch = strcmp(run.model, "nano") ? 256 : 64,
        run.steps = strcmp(run.model, "nano") ? 400000 : 900;
    }
    if (help) {
        print_help(argv[0], &tables[0], &tables[1]);
        return 0;
    }
    double before[CONFIG_OPTIONS];
    for (int i = 0; i < CONFIG_OPTIONS; i++) before[i] = option_get(&tables[1], i);
    const char *model_name = run.model;
    options_parse(tables, 2, NULL, argc, argv);
    if (resume && strcmp(model_name, run.model))
        die("--model %s: the checkpoint's model is %s", run.model, model_name);
    if (run.steps < step && !run.export_to)   // exporting needs no step
        die("--steps %d: %s is at step %d already", run.steps, run.resume, step);
    if (run.accum && run.batch % run.accum)
        die("--accum %d does not divide --batch %d", run.accum, run.batch);
    if (run.threads) omp_set_num_threads(run.threads);

    Data *d = data_open(run.data.items, run.data.count);
    if (resume) {   // the run must go on with what it was begun with
        for (int i = 0; i < CONFIG_OPTIONS; i++)
            if (config_options[i].fixed && option_get(&tables[1], i) != before[i])
                die("%s: its %s is %g; it cannot be changed to %g", run.resume, config_options[i].name, before[i],
                    option_get(&tables[1], i));
        const char *name = safe_metadata(resume, "data"), *decoder = safe_metadata(resume, "decoder");
        if (name && strcmp(name, d->name))
            die("%s: it was trained on %s, and %s is %s", run.resume, name, run.data.items[0], d->name);
        if (safe_number(resume, "data_samples", (double)d->count) != (double)d->count)
            die("%s: it was trained on %.0f samples, and %s has %zu (are all shards given to --data?)",
                run.resume, safe_number(resume, "data_samples", 0), run.data.items[0], d->count);
        if (decoder && strcmp(decoder, d->decoder))
            die("%s: its decoder is %s, that of %s is %s", run.resume, decoder, run.data.items[0], d->decoder);
        if (safe_number(resume, "latent_scale", d->scale) != d->scale ||
            safe_number(resume, "latent_offset", d->offset) != d->offset)
            die("%s: its latent scale and offset are %g, %g; those of %s are %g, %g", run.resume,
                safe_number(resume, "latent_scale", 0), safe_number(resume, "latent_offset", 0), run.data.items[0],
                d->scale, d->offset);
    } else {        // what the data dictates, where no flag says otherwise
        int *sizes[] = {&c.in_channels, &c.input_size, &c.num_classes, &c.z_dim},
            from_data[] = {d->C, d->S, d->K, d->Z};
        for (int i = 0; i < 4; i++) {
            int flagged = 0;
            for (int k = 0; k < CONFIG_OPTIONS; k++)
                flagged |= given[k] && option_field(&tables[1], k) == sizes[i];
            if (!flagged && from_data[i]) *sizes[i] = from_data[i];
        }
    }
    config_check(&c, "the model");
    data_check(d, &c);

    char path[PATH_MAX], picture[PATH_MAX], log_path[PATH_MAX];
    make_folder(run.out);
    int folder = open(run.out, O_RDONLY | O_DIRECTORY);   // locked until the program ends
    if (folder < 0 || (flock(folder, LOCK_EX | LOCK_NB) && errno == EWOULDBLOCK))
        die("%s: another run is writing there; give this one another --out", run.out);
    if (run.export_to) {   // better to know now than after the training
        char temporary[PATH_MAX];
        fclose(file_begin(temporary, run.export_to));
        unlink(temporary);
    }
    snprintf(path, sizeof(path), "%s/checkpoint.safetensors", run.out);
    snprintf(picture, sizeof(picture), "%s/samples.png", run.out);
    snprintf(log_path, sizeof(log_path), "%s/log.csv", run.out);
    if (!resume && !access(path, F_OK)) {   // a new run does not destroy an old one's work
        char old[PATH_MAX];
        if (snprintf(old, sizeof(old), "%s/checkpoint.old.safetensors", run.out) < PATH_MAX &&
            !rename(path, old))
            printf("%s: kept as %s\n", path, old);
    }
    if (!run.accum) run.accum = backend == &cpu_backend ? parts_of(&c, run.batch) : 1;
    Model *m = backend->create(&c, run.batch / run.accum, run.seed);
    if (resume) checkpoint_load(backend, m, resume);
    print_start(&c, &run, d, m, backend, step);
    Batch *batch = batch_create(&c, run.batch / run.accum);
    batch->on_device = backend != &cpu_backend;
    FILE *log = log_open(log_path, step);
    catch_interrupts();

    Losses sum;
    memset(&sum, 0, sizeof(sum));
    int first = step, counted = 0, saved = -1, lines = 0, width;
    char total[16];
    snprintf(total, sizeof(total), "%d", run.steps);
    width = 2 * (int)strlen(total) + 1;
    double begin = now_seconds(), since = begin, logged = begin,
           paused = 0;   // pauses: pictures and checkpoints
    while (step < run.steps && !interrupted) {
        backend->zero_gradients(m);
        for (int k = 0; k < run.accum; k++) {
            batch_load(batch, d, &c, run.seed, step, k * batch->B, run.batch);
            backend->forward_backward(m, batch);
        }
        backend->update(m, ++step);
        counted++;
        int last = step == run.steps || interrupted, save = last || step % run.save_every == 0;
        int log_now = last || save || step % run.log_every == 0 || step == 1;
        if (backend == &cpu_backend ||
            log_now) {   // reading waits for a GPU, so there only where a line is due
            Losses now = backend->read_losses(m);
            if (!(fabs(now.total) < INFINITY && now.grad_norm < INFINITY)) {
                char bad[96] = "";
                backend->zero_gradients(m);
                for (int k = 0; k < run.accum && !bad[0]; k++) {   // once more, to see where it began
                    batch_load(batch, d, &c, run.seed, step - 1, k * batch->B, run.batch);
                    backend->forward_backward(m, batch);
                    backend->find_bad(bad, m, batch);
                }
                die("step %d: the loss or its gradient is not a finite number; first bad: %s. %s%s; try a "
                    "smaller --lr",
                    step, bad[0] ? bad : "unknown",
                    saved >= 0 ? "The last checkpoint is " : "No checkpoint was written yet",
                    saved >= 0 ? path : "");
            }
            sum.total += now.total, sum.denoise += now.denoise, sum.cls += now.cls, sum.proj += now.proj,
                sum.cfm += now.cfm;
            sum.grad_norm = now.grad_norm;
        }
        if (log_now) {
            double ms = 1000 * (now_seconds() - since) / counted, k = 1.0 / counted;
            double left = (now_seconds() - begin - paused) / (step - first) * (run.steps - step);
            if (lines++ % 20 == 0)
                printf("%*s      loss  denoise     cls    align      cfm     norm       lr      ms   img/s   "
                       " left\n",
                       width, "step");
            printf("%*d/%d %9.5f %8.5f %7.4f %8.4f %8.4f %8.4f %8.1e %7.1f %7.0f %4d:%02d\n",
                   width - 1 - (int)strlen(total), step, run.steps, sum.total * k, sum.denoise * k,
                   sum.cls * k, sum.proj * k, sum.cfm * k, sum.grad_norm, c.lr, ms, 1000 * run.batch / ms,
                   (int)left / 60, (int)left % 60);
            fprintf(log, "%d,%.9g,%.9g,%.9g,%.9g,%.9g,%.9g,%g,%.4g,%.5g\n", step, sum.total * k,
                    sum.denoise * k, sum.cls * k, sum.proj * k, sum.cfm * k, sum.grad_norm, c.lr, ms,
                    1000 * run.batch / ms);
            fflush(stdout);
            if (fflush(log)) die("%s: cannot be written: %s", log_path, strerror(errno));
            memset(&sum, 0, sizeof(sum)), counted = 0, logged = now_seconds();
        }
        if (save) checkpoint_write(path, backend, m, &run, d, step), saved = step;
        if (!last && run.sample_every && step % run.sample_every == 0)
            write_samples(picture, backend, m, &run, d, step);
        if (log_now) paused += now_seconds() - logged, since = now_seconds();
    }
    if (step > first && saved != step) checkpoint_write(path, backend, m, &run, d, step), saved = step;
    if (fclose(log)) die("%s: cannot be written: %s", log_path, strerror(errno));
    if (interrupted && step == first)
        printf("\ninterrupted before the first step; nothing was written to %s\n", path);
    else if (interrupted) {
        printf("\ninterrupted after step %d; to go on:  %s --resume %s", step, argv[0], path);
        for (int i = 0; i < run.data.count; i++) printf("%s %s", i ? "" : " --data", run.data.items[i]);
        printf(" --out %s\n", run.out);
    } else {
        if (step > first) printf("\n%s: written after step %d, %.1f s\n", path, step, now_seconds() - begin);
        write_samples(picture, backend, m, &run, d, step);
    }
    if (run.export_to) {
        export_write(run.export_to, backend, m, &run, d, step);
        printf("%s: the EMA of step %d\n", run.export_to, step);
    }
    batch_free(batch);
    backend->destroy(m);
    if (resume) safe_close(resume);
    data_close(d);
    close(folder);
    if (fflush(stdout) || ferror(stdout)) die("standard output: %s", strerror(errno));
    return interrupted ? 130 : 0;
}

#ifndef TRAIN_SRDIT_NO_MAIN
int main(int argc, char **argv) {
    wait_calmly(argv);
    return train_main(argc, argv, &cpu_backend);
}
#endif
