// SR-DiT, the Speedrun Diffusion Transformer (arXiv 2512.12386), trained on the CPU in one file of plain C.
//
// What this file is: the model and its training, to be read from top to bottom: configuration, every layer
// forward and backward with its derivation, parameters, the model, the loss, AdamW, the random draws, the
// sampler, checkpoints, the training loop. It is also the reference that train_srdit.cu (the same on a GPU),
// sample.c and test_srdit.c include. What every program needs and no student must open is in dev/lib: matrix
// product, random numbers, safetensors, data shards, pictures, command line. What this file refuses to
// become: a framework. There is no tape and no graph: each backward is written by hand beside its forward.
//
//   make && ./train_srdit            train the nano model on the bundled digits (one to three minutes)
//   ./train_srdit --help             every flag with its default
//
// The language is the one that C and C++ share, so that nvcc can compile it too. It needs libc and libm;
// OpenMP is used where there is one. `real` is float, or double in the build that checks gradients
// (-DUSE_DOUBLE).
//
// Letters, as in the paper and in dev/reference.py:
//   B batch            C, S latent channels, side    p patch size          G = S/p, P = G^2 patches
//   T = P + 1 tokens, CLS first (P without it)       Tk tokens kept in the sparse middle
//   Tb tokens of a block: T or Tk                    N rows, all tokens of a batch; n one of them
//   D width            H heads      Dh = D/H         L = Lf + Lg + Lh blocks: encoder f, sparse g, decoder h
//   F hidden width of an MLP                         X = p p C numbers of a patch
//   Z width of the alignment features and of CLS     M hidden width of the projector       K classes
//   E output of the encoder f                        R length in memory of a row of attention's scores
//   I, O inputs and outputs of a linear layer        W = 256 features of the time
//   x^ a normalized x, r what it was multiplied by   v1 block 0's values        u a uniform draw
//   ld... the length of a row in memory, where rows are parts of longer ones
// "first ... end" and the like: from first on, without end. Where a function has matrices or a struct of
// the same letter (Muon's X, R, P; BlockActs *k), it says so. In signatures outputs come first, then
// inputs, then sizes; dX is the gradient of the loss by X.
#include "dev/lib/cli.h"
#include "dev/lib/curve.h"
#include "dev/lib/folder.h"
#include "dev/lib/matmul.h"
#include "dev/lib/picture.h"
#include "dev/lib/random.h"
#include "dev/lib/ranks.h"
#include "dev/lib/shards.h"
#include <pthread.h>
#include <sys/mman.h>

// ----------------------------------------------------------------------------------------------------------
// Configuration: one table gives each setting its name in files, its flag, default, range and help

enum { MAX_DEPTH = 128 };
typedef struct {
    int depth, hidden_size, num_heads, patch_size, in_channels, input_size, num_classes, z_dim, projector_dim;
    int num_f, num_h;
    double mlp_ratio, drop_ratio, class_dropout_prob, path_drop_prob;
    double cls_coeff, align_coeff, cfm_coeff, shift_base;
    double lr, beta1, beta2, eps, weight_decay, max_grad_norm, ema_decay;
    int ema_warmup;
    // one switch per technique of the paper
    int routing, path_drop, align, cls, cfm, qk_norm, rope, value_residual, time_shift, label_dropout, ema;
    // after the paper (README.md): what its author's later runs add
    int optimizer, muon, immiscible;
    double muon_lr, muon_momentum, muon_weight_decay;
    Series align_depths, mlp_widths;
    int hidden[MAX_DEPTH];   // widths of the blocks' MLPs as reference files say them; 0: by what is above
} Config;
enum { ADAMW, MUON };      // Config's optimizer
enum { SPLIT, SRDIT13 };   // and muon: which tensors, and how

// Defaults are the paper's at ImageNet-256 with INVAE latents, of size B/1. FIXED: shapes or states depend on
// it. LATER: not in the paper; written to files only where it is not at its default, so that files of the
// paper's recipe stay what they were.
enum { FREE = 0, FIXED = 1, LATER = 2 };
#define SETTING(name, kind, initial, low, high, flags, help)                                                 \
    { #name, kind, offsetof(Config, name), low, high, flags, help, initial, NULL }
#define CHOOSE(name, words, last, flags, help)                                                               \
    { #name, CHOICE, offsetof(Config, name), 0, last, flags, help, 0, words }
#define ON_OFF(name, flags, help) SETTING(name, TECHNIQUE, 1, 0, 1, flags, help)
static const Option config_options[] = {
    SETTING(depth, WHOLE, 12, 1, MAX_DEPTH, FIXED, "blocks, L"),
    SETTING(hidden_size, WHOLE, 768, 4, 65536, FIXED, "width, D"),
    SETTING(num_heads, WHOLE, 12, 1, 1024, FIXED, "heads, H; D/H must be divisible by 4"),
    SETTING(patch_size, WHOLE, 1, 1, 1024, FIXED, "patch side, p; must divide the latent side"),
    SETTING(in_channels, WHOLE, 32, 1, 65536, FIXED, "latent channels, C (default: what the data has)"),
    SETTING(input_size, WHOLE, 16, 1, 4096, FIXED, "latent height and width, S (default: what the data has)"),
    SETTING(num_classes, WHOLE, 1000, 1, 10000000, FIXED, "classes, K (default: what the data has)"),
    SETTING(z_dim, WHOLE, 768, 1, 65536, FIXED, "width of the features, Z (default: what the data has)"),
    SETTING(projector_dim, WHOLE, 2048, 1, 65536, FIXED, "hidden width of the alignment projector, M"),
    SETTING(num_f, WHOLE, 2, 1, MAX_DEPTH, FIXED, "dense encoder blocks, Lf"),
    SETTING(num_h, WHOLE, 2, 0, MAX_DEPTH, FIXED, "dense decoder blocks, Lh"),
    SETTING(mlp_ratio, NUMBER, 4, 0.01, 64, FIXED, "hidden width of the MLP as a multiple of D"),
    SETTING(drop_ratio, NUMBER, 0.75, 0, 1, FREE, "share of the tokens that the sparse middle leaves out, r"),
    SETTING(class_dropout_prob, NUMBER, 0.1, 0, 1, FREE, "share of labels replaced by \"no class\""),
    SETTING(path_drop_prob, NUMBER, 0.05, 0, 1, FREE, "share of steps that drop the whole sparse path"),
    SETTING(cls_coeff, NUMBER, 0.03, 0, 1e6, FREE, "weight of the CLS velocity loss"),
    SETTING(align_coeff, NUMBER, 0.5, 0, 1e6, FREE, "weight of the alignment loss"),
    SETTING(cfm_coeff, NUMBER, 0.05, 0, 1e6, FREE, "weight of the contrastive loss"),
    SETTING(shift_base, NUMBER, 4096, 1e-6, 1e12, FREE, "time shift s = sqrt(C*S*S / shift_base)"),
    SETTING(lr, NUMBER, 1e-4, 0, 1e6, FREE, "learning rate"),
    SETTING(beta1, NUMBER, 0.9, 0, 0.9999999, FREE, "AdamW's decay of the first moment"),
    SETTING(beta2, NUMBER, 0.999, 0, 0.9999999, FREE, "AdamW's decay of the second moment"),
    SETTING(eps, NUMBER, 1e-8, 1e-30, 1, FREE, "AdamW's epsilon"),
    SETTING(weight_decay, NUMBER, 0, 0, 1e6, FREE, "AdamW's decoupled weight decay"),
    SETTING(max_grad_norm, NUMBER, 1, 1e-12, 1e30, FREE, "gradients are clipped to this global norm"),
    SETTING(ema_decay, NUMBER, 0.9999, 0, 1, FREE,
            "decay of the weights' moving average, which is sampled from"),
    SETTING(ema_warmup, WHOLE, 0, 0, 1, FREE,
            "1: the decay at step n is at most (1+n)/(10+n), for short runs"),
    ON_OFF(routing, FREE, "sparse middle: g sees only the kept tokens (SPRINT)"),
    ON_OFF(path_drop, FREE, "now and then drop the sparse path (SPRINT)"),
    ON_OFF(align, FIXED, "align block Lf's output with a frozen encoder (REPA)"),
    ON_OFF(cls, FIXED, "denoise the encoder's CLS token beside the image (REG)"),
    ON_OFF(cfm, FREE, "contrastive flow matching"),
    ON_OFF(qk_norm, FIXED, "RMSNorm on queries and keys"),
    ON_OFF(rope, FREE, "rotary 2-D positions"),
    ON_OFF(value_residual, FIXED, "mix block 0's values into every later block"),
    ON_OFF(time_shift, FREE, "shift the times by the latent's size"),
    ON_OFF(label_dropout, FREE, "drop labels, for guidance"),
    ON_OFF(ema, FREE, "moving average of the weights"),
    CHOOSE(optimizer, "adamw muon", 1, FIXED | LATER, "muon: for matrices, and AdamW for what is left"),
    CHOOSE(muon, "split srdit13", 1, FIXED | LATER,
           "which matrices: split (attention's, the MLPs', the fusion's; q, k, v apart) or srdit13 (all; "
           "--eps is 1e-15)"),
    SETTING(muon_lr, NUMBER, 1e-3, 0, 1e6, LATER,
            "Muon's learning rate (default for nano and fashion: 0.02)"),
    SETTING(muon_momentum, NUMBER, 0.95, 0, 0.9999999, LATER, "Muon's momentum"),
    SETTING(muon_weight_decay, NUMBER, 0, 0, 1e6, LATER, "Muon's decoupled weight decay"),
    SETTING(align_depths, SERIES, 0, 1, MAX_DEPTH, FIXED | LATER,
            "align the outputs of these blocks, counted from 1: 2,4,6 (default: block Lf's alone)"),
    SETTING(immiscible, WHOLE, 1, 1, 1024, LATER, "noise is the nearest to its latent of so many draws"),
    SETTING(mlp_widths, SERIES, 0, 0.01, 64, FIXED | LATER,
            "hidden widths of the first and the last block's MLP as multiples of D, between them by\n"
            "                         equal steps, rounded to multiples of 64: 2,6 (default: --mlp-ratio)"),
};
enum { CONFIG_OPTIONS = sizeof(config_options) / sizeof(config_options[0]) };
static OptionTable config_table(Config *c) {
    OptionTable t = {config_options, CONFIG_OPTIONS, c, NULL};
    return t;
}
// 1: files do not say it, since it came after the paper and is at its default
static int unsaid(const OptionTable *t, int i) {
    const Option *o = &t->options[i];
    if (!(o->flags & LATER)) return 0;
    if (o->kind == SERIES) return !((const Series *)option_field(t, i))->count;
    return option_get(t, i) == o->initial;
}
static Config config_default(void) {
    Config c;
    OptionTable t = config_table(&c);
    memset(&c, 0, sizeof(c));
    options_reset(&t);
    return c;
}

// "nano", "fashion", or S, B, L, XL with the patch size 1, 2 or 4, such as "B/1". Returns 0 for another name.
static int model_preset(Config *c, const char *name) {
    static const struct {
        const char *name;
        int depth, width, heads, patch, side;   // of the latent; patch 0: the name ends with it
    } sizes[] = {{"nano", 6, 64, 4, 1, 8}, {"fashion", 6, 128, 4, 4, 28}, {"S", 12, 384, 6, 0, 0},
                 {"B", 12, 768, 12, 0, 0}, {"L", 24, 1024, 16, 0, 0},     {"XL", 28, 1152, 16, 0, 0}};
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        const char *patch = name + strlen(sizes[i].name);
        int small = sizes[i].patch, whole = strncmp(name, sizes[i].name, (size_t)(patch - name)) == 0;
        if (!whole || (small ? *patch : *patch != '/')) continue;
        if (!small && (!patch[1] || !strchr("124", patch[1]) || patch[2])) continue;
        c->depth = sizes[i].depth;
        c->hidden_size = sizes[i].width;
        c->num_heads = sizes[i].heads;
        c->patch_size = small ? small : patch[1] - '0';
        if (!small) return 1;
        c->projector_dim = 128;
        c->shift_base = sizes[i].side * sizes[i].side;   // s = 1, no shift
        // a step of Adam moves each weight by about lr, and so a sum of D terms by up to D lr: 2e-3 for nano
        c->lr = 0.128 / c->hidden_size;
        c->ema_decay = 0.999;
        c->ema_warmup = 1;
        return 1;
    }
    return 0;
}

// What follows from the configuration
static int grid_of(const Config *c) { return c->input_size / c->patch_size; }
static int patches_of(const Config *c) { return grid_of(c) * grid_of(c); }
static int tokens_of(const Config *c) { return patches_of(c) + c->cls; }
static int kept_of(const Config *c) {   // Tk = max(1, (int)(T (1 - drop_ratio))), in doubles
    return c->routing ? imax(1, (int)(tokens_of(c) * (1.0 - c->drop_ratio))) : tokens_of(c);
}
static int hidden_of(const Config *c, int block) {   // of the block's MLP
    const Series *s = &c->mlp_widths;
    if (c->hidden[block]) return c->hidden[block];
    if (!s->count) return (int)(c->hidden_size * c->mlp_ratio);
    double width = s->x[0] + (s->x[1] - s->x[0]) * block / imax(1, c->depth - 1);
    return imax(1, (int)(c->hidden_size * width / 64 + 0.5)) * 64;
}
static int most_hidden_of(const Config *c) {
    int most = 0;
    for (int i = 0; i < c->depth; i++) most = imax(most, hidden_of(c, i));
    return most;
}
static int latent_of(const Config *c) { return c->in_channels * c->input_size * c->input_size; }
static int patch_dim_of(const Config *c) { return c->in_channels * c->patch_size * c->patch_size; }
static int is_sparse(const Config *c, int block) { return block >= c->num_f && block < c->depth - c->num_h; }
// Which block's output the k-th alignment (k from 0) is of; blocks are counted from 1 here. 0: there is none
static int align_depth(const Config *c, int k) {
    if (!c->align) return 0;
    return c->align_depths.count ? k < c->align_depths.count ? (int)c->align_depths.x[k] : 0
           : k                   ? 0
                                 : c->num_f;
}
static int align_count(const Config *c) { return c->align ? imax(1, c->align_depths.count) : 0; }
// Blocks num_f ... end of g that a step computes: on a path-drop step only what is aligned
static int end_of_g(const Config *c, int training, int path_drop) {
    int first_h = c->depth - c->num_h, end = path_drop ? c->num_f : first_h;
    for (int k = 0; path_drop && training && align_depth(c, k); k++)
        if (align_depth(c, k) <= first_h) end = imax(end, align_depth(c, k));
    return end;
}

// t = s u / (1 + (s - 1) u), clamped to [0, 1]: unclamped, u = 1 can give 1 + 2e-16
static double shift_time(const Config *c, double u) {
    double s = c->time_shift ? sqrt(latent_of(c) / c->shift_base) : 1.0;
    double t = s * u / (1.0 + (s - 1.0) * u);
    return t < 0 ? 0 : t > 1 ? 1 : t;
}

// Ends the program over settings. where: the file that has them, whose names they have; NULL: the command
// line, where they are flags
__attribute__((noreturn, format(printf, 2, 3))) static void refuse(const char *where, const char *format,
                                                                   ...) {
    char text[512], flags[1024];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof(text), format, list);
    va_end(list);
    if (where) die("%s: %s", where, text);
    size_t n = 0;
    for (const char *at = text; *at && n < sizeof(flags) - 64;) {   // a word with _ is a setting
        size_t word = strspn(at, "abcdefghijklmnopqrstuvwxyz_");
        int setting = memchr(at, '_', word) != NULL;
        if (setting) flags[n++] = '-', flags[n++] = '-';
        for (word = word ? word : 1; word && n < sizeof(flags) - 1; word--, at++)
            flags[n++] = setting && *at == '_' ? '-' : *at;
    }
    flags[n] = 0;
    die("%s", flags);
}
static void config_check(const Config *c, const char *where) {
    OptionTable t = config_table((Config *)c);
    for (int i = 0; i < t.count; i++)
        if (t.options[i].kind != SERIES && option_get(&t, i) < t.options[i].low)
            refuse(where, "%s is missing", t.options[i].name);
    // so that products of two or three sizes stay in an int
    if ((double)c->in_channels * c->input_size * c->input_size > 1 << 27)
        refuse(where, "latents of %d x %d x %d are too large", c->in_channels, c->input_size, c->input_size);
    if (c->patch_size > c->input_size || patches_of(c) >= 1 << 16)
        refuse(where, "patch_size %d on a side of %d gives no usable number of patches", c->patch_size,
               c->input_size);
    if (c->hidden_size % c->num_heads || c->hidden_size / c->num_heads % 4)
        refuse(where, "hidden_size %d over num_heads %d must give a head width that is a multiple of 4",
               c->hidden_size, c->num_heads);
    if (c->input_size % c->patch_size)
        refuse(where, "patch_size %d does not divide the latent side %d", c->patch_size, c->input_size);
    if (c->num_f + c->num_h > c->depth)
        refuse(where, "num_f %d + num_h %d is more than the depth, %d", c->num_f, c->num_h, c->depth);
    if (c->mlp_widths.count && c->mlp_widths.count != 2)
        refuse(where, "mlp_widths are two numbers, of the first and the last block: 2,6");
    if (hidden_of(c, 0) < 1)
        refuse(where, "hidden_size %d x mlp_ratio %g leaves no hidden unit", c->hidden_size, c->mlp_ratio);
    if (c->align_depths.count && !c->align)
        refuse(where, "align_depths without alignment; leave out --no-align or --align-depths");
    for (int k = 0; k < c->align_depths.count; k++) {
        double depth = c->align_depths.x[k];
        if (depth != floor(depth) || depth > c->depth)
            refuse(where, "align_depths has %g, but there are blocks 1 to %d", depth, c->depth);
        if (k && depth <= c->align_depths.x[k - 1])
            refuse(where, "align_depths must rise, and %g does not follow %g", depth,
                   c->align_depths.x[k - 1]);
    }
}

// The configuration in a file's metadata, read over `c`. `switch_off` lists techniques that are off. except:
// names, to a NULL, that are left to the caller
static void config_read(Config *c, const SafeFile *f, const char *const *except) {
    OptionTable t = config_table(c);
    for (int i = 0; i < t.count; i++) {
        const char *name = t.options[i].name;
        int k = 0;
        while (except[k] && strcmp(except[k], name)) k++;
        if (safe_metadata(f, name) && !except[k]) option_put(&t, i, safe_metadata(f, name), f->path, name);
    }
    if (safe_metadata(f, "proj_coeff"))   // its name in reference files
        option_set(&t, option_find(&t, "align_coeff"), safe_number(f, "proj_coeff", 0), f->path,
                   "proj_coeff");
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
// Layers. Backward functions quote the forward line that they differentiate. Gradients of weights are added
// to; gradients of activations are overwritten unless the comment says "+=".

// out[N,O] = in[N,I] w[O,I]^T + b[O]
static void linear_forward(real *out, const real *in, const real *w, const real *b, size_t N, size_t I,
                           size_t O) {
    matmul(out, in, w, b, N, O, I, 0, 1, 0);
}

// din[N,I] = dout[N,O] w (NULL: not wanted; += where add_din);  dw[O,I] += dout^T in;  db[O] += sum_n dout
static void linear_backward(real *din, real *dw, real *db, const real *dout, const real *in, const real *w,
                            size_t N, size_t I, size_t O, int add_din) {
    column_sums(db, dout, O, N, O);
    if (din) matmul(din, dout, w, NULL, N, I, O, 0, 0, add_din);
    matmul(dw, dout, in, NULL, O, I, N, 1, 0, 1);
}

// RMSNorm of a row: x^ = x r with r = 1 / sqrt(mean(x^2) + eps). Its backward, used three times below, where
// dx and dx^ are gradients of the loss: x^_j changes with x_i by r [i = j] - x_i x_j r^3 / D, and so
//   dx_i = sum_j dx^_j (r [i = j] - x_i x_j r^3 / D) = r (dx^_i - x^_i mean(dx^ x^)).
#define NORM_EPS ((real)1e-6)
#define QK_EPS ((real)1.1920928955078125e-07)   // 2^-23
static real rms_scale(const real *x, size_t D, real eps) { return 1 / (real)sqrt(dot(x, x, D) / D + eps); }

// RMSNorm and adaLN: out[B,Tb,D] = x[B,Tb,D] r (1 + scale) + shift, with shift and scale [B, stride] of the
// sample. r [B,Tb] is kept for the backward.
static void norm_modulate_forward(real *out, real *r, const real *x, const real *shift, const real *scale,
                                  size_t stride, size_t B, size_t Tb, size_t D) {
#pragma omp parallel for
    for (size_t n = 0; n < B * Tb; n++) {
        const real *xn = x + n * D, *sh = shift + n / Tb * stride, *sc = scale + n / Tb * stride;
        real *o = out + n * D, rn = r[n] = rms_scale(xn, D, NORM_EPS);
        for (size_t i = 0; i < D; i++) o[i] = xn[i] * rn * (1 + sc[i]) + sh[i];
    }
}

// out = x^ (1 + scale) + shift:
//   dshift = sum_t dout,  dscale = sum_t dout x^,  dx^ = dout (1 + scale),  dx += r (dx^ - x^ mean(dx^ x^))
static void norm_modulate_backward(real *dx, real *dshift, real *dscale, const real *dout, const real *x,
                                   const real *r, const real *scale, size_t stride, size_t B, size_t Tb,
                                   size_t D) {
#pragma omp parallel for
    for (size_t b = 0; b < B; b++) {
        const real *sc = scale + b * stride;
        real *dsh = dshift + b * stride, *dsc = dscale + b * stride;
        memset(dsh, 0, sizeof(real) * D);
        memset(dsc, 0, sizeof(real) * D);
        for (size_t n = b * Tb; n < (b + 1) * Tb; n++) {
            const real *xn = x + n * D, *d = dout + n * D;
            real *dxn = dx + n * D, rn = r[n], sum = 0;
#pragma omp simd reduction(+ : sum)
            for (size_t i = 0; i < D; i++) {
                real normed = xn[i] * rn;
                dsh[i] += d[i];
                dsc[i] += d[i] * normed;
                sum += d[i] * (1 + sc[i]) * normed;
            }
            real mean = sum / D;
            for (size_t i = 0; i < D; i++) dxn[i] += rn * (d[i] * (1 + sc[i]) - xn[i] * rn * mean);
        }
    }
}

// The residual connection of adaLN-Zero: out[B,Tb,D] = x + gate y, y the branch, gate [B, stride] of the
// sample, which starts at 0
static void gate_forward(real *out, const real *x, const real *gate, const real *y, size_t stride, size_t B,
                         size_t Tb, size_t D) {
#pragma omp parallel for
    for (size_t n = 0; n < B * Tb; n++) {
        const real *xn = x + n * D, *yn = y + n * D, *g = gate + n / Tb * stride;
        real *o = out + n * D;
        for (size_t i = 0; i < D; i++) o[i] = xn[i] + g[i] * yn[i];
    }
}

// out = x + gate y:  dgate = sum_t dout y,  dy = dout gate  (and dx = dout, which the caller keeps in place)
static void gate_backward(real *dy, real *dgate, const real *dout, const real *gate, const real *y,
                          size_t stride, size_t B, size_t Tb, size_t D) {
#pragma omp parallel for
    for (size_t b = 0; b < B; b++) {
        const real *g = gate + b * stride;
        real *dg = dgate + b * stride;
        memset(dg, 0, sizeof(real) * D);
        for (size_t n = b * Tb; n < (b + 1) * Tb; n++) {
            const real *d = dout + n * D, *yn = y + n * D;
            real *dyn = dy + n * D;
            for (size_t i = 0; i < D; i++) {
                dg[i] += d[i] * yn[i];
                dyn[i] = d[i] * g[i];
            }
        }
    }
}

// RMSNorm with a weight, out[N,D] = x r w (eps 1e-6): of the CLS token
static void rmsnorm_forward(real *out, real *r, const real *x, const real *w, size_t N, size_t D) {
    for (size_t n = 0; n < N; n++) {
        const real *xn = x + n * D;
        r[n] = rms_scale(xn, D, NORM_EPS);
        for (size_t i = 0; i < D; i++) out[n * D + i] = xn[i] * r[n] * w[i];
    }
}

// out = x^ w:  dw += dout x^,  dx^ = dout w,  dx = r (dx^ - x^ mean(dx^ x^))
static void rmsnorm_backward(real *dx, real *dw, const real *dout, const real *x, const real *r,
                             const real *w, size_t N, size_t D) {
    for (size_t n = 0; n < N; n++) {
        const real *xn = x + n * D, *d = dout + n * D;
        real sum = 0;
        for (size_t i = 0; i < D; i++) {
            dw[i] += d[i] * xn[i] * r[n];
            sum += d[i] * w[i] * xn[i] * r[n];
        }
        for (size_t i = 0; i < D; i++) dx[n * D + i] = r[n] * (d[i] * w[i] - xn[i] * r[n] * (sum / D));
    }
}

// GELU, tanh form: out = x/2 (1 + tanh u) with u = sqrt(2/pi) (x + 0.044715 x^3). As (1 + tanh u)/2 is the
// sigmoid of 2u, out = x s with s = 1 / (1 + e^-2u): one exp, and nothing cancels. fast_exp stays finite, and
// so does e s below.
#define GELU_A ((real)0.7978845608028654)
#define GELU_B ((real)0.044715)
// The derivative wants the same exp and is kept: with e = e^-2u, so that 1 - s = e s,
//   slope = s + x s (1 - s) 2 du/dx,  du/dx = sqrt(2/pi) (1 + 3 * 0.044715 x^2).
static void gelu_forward(real *out, real *slope, const real *in, size_t count) {
#pragma omp parallel for
    for (size_t i = 0; i < count; i++) {
        real x = in[i], x2 = GELU_B * x * x, e = fast_exp(-2 * GELU_A * x * (1 + x2)), s = 1 / (1 + e);
        out[i] = x * s;
        slope[i] = s * (1 + e * s * x * 2 * GELU_A * (1 + 3 * x2));
    }
}

// dx = dout slope, in place: x comes in as dout
static void gelu_backward(real *x, const real *slope, size_t count) {
#pragma omp parallel for
    for (size_t i = 0; i < count; i++) x[i] *= slope[i];
}

// SiLU: out = x s with s = 1 / (1 + e^-x)
static void silu_forward(real *out, const real *in, size_t count) {
#pragma omp parallel for
    for (size_t i = 0; i < count; i++) out[i] = in[i] / (1 + fast_exp(-in[i]));
}

// dout/dx = s + x s (1 - s). din may be dout.
static void silu_backward(real *din, const real *dout, const real *in, size_t count) {
#pragma omp parallel for
    for (size_t i = 0; i < count; i++) {
        real s = 1 / (1 + fast_exp(-in[i]));
        din[i] = dout[i] * (s + in[i] * s * (1 - s));
    }
}

// QK-norm (arXiv 2010.04245): RMSNorm with a weight over each head of the queries and of the keys, which lie
// in rows of 3D, q first: out = x r w, eps 2^-23. wq, wk [Dh]; r [N,2H] is kept.
static void qk_norm_forward(real *out, real *r, const real *qkv, const real *wq, const real *wk, size_t N,
                            size_t H, size_t Dh) {
#pragma omp parallel for
    for (size_t n = 0; n < N; n++)
        for (size_t h = 0; h < 2 * H; h++) {
            const real *x = qkv + (n * 3 * H + h) * Dh, *w = h < H ? wq : wk;
            real *o = out + (n * 3 * H + h) * Dh, rh = r[n * 2 * H + h] = rms_scale(x, Dh, QK_EPS);
#pragma omp simd
            for (size_t i = 0; i < Dh; i++) o[i] = x[i] * rh * w[i];
        }
}

// As rmsnorm's: dw += dout x^,  dx^ = dout w,  dx = r (dx^ - x^ mean(dx^ x^)).  Each sample's sums for dwq
// and dwk go to its part of parts [B,2Dh]; these are added in the order of the samples, so that the bits do
// not depend on the number of threads.
static void qk_norm_backward(real *dqkv, real *dwq, real *dwk, real *parts, const real *dout, const real *qkv,
                             const real *r, const real *wq, const real *wk, size_t B, size_t Tb, size_t H,
                             size_t Dh) {
    memset(parts, 0, sizeof(real) * B * 2 * Dh);
#pragma omp parallel for
    for (size_t b = 0; b < B; b++)
        for (size_t n = b * Tb; n < (b + 1) * Tb; n++)
            for (size_t h = 0; h < 2 * H; h++) {
                size_t at = (n * 3 * H + h) * Dh;
                const real *x = qkv + at, *d = dout + at, *w = h < H ? wq : wk;
                real *dx = dqkv + at, *dw = parts + (2 * b + h / H) * Dh, rh = r[n * 2 * H + h];
#pragma omp simd
                for (size_t i = 0; i < Dh; i++) {
                    dw[i] += d[i] * (x[i] * rh);
                    dx[i] = d[i] * w[i];   // dx^ for now
                }
                real mean = rh * dot(dx, x, Dh) / Dh;
#pragma omp simd
                for (size_t i = 0; i < Dh; i++) dx[i] = rh * (dx[i] - x[i] * rh * mean);
            }
    for (size_t b = 0; b < B; b++)
        for (size_t i = 0; i < Dh; i++) {
            dwq[i] += parts[2 * b * Dh + i];
            dwk[i] += parts[(2 * b + 1) * Dh + i];
        }
}

// The original token of the t-th of sample b's Tb tokens; ids [B,Tb], NULL: itself
static size_t token_of(const int *ids, size_t b, size_t t, size_t Tb) {
    return ids ? (size_t)ids[b * Tb + t] : t;
}

// RoPE (RoFormer, arXiv 2104.09864) in two dimensions, in place on the queries and keys of rows of 3D: pairs
// of neighbours turn by angles of the token's original place, (a, b) -> (a cos - b sin, b cos + a sin), so
// that q.k depends on the difference of two places alone. cosines, sines [P,Dh] hold each value twice. CLS
// (token 0, if cls) is not turned. direction -1: back.
static void rope_turn(real *x, real direction, const real *cosines, const real *sines, const int *ids,
                      int cls, size_t B, size_t Tb, size_t H, size_t Dh) {
#pragma omp parallel for
    for (size_t row = 0; row < B * Tb; row++) {
        size_t token = token_of(ids, row / Tb, row % Tb, Tb);
        if (cls && token == 0) continue;
        const real *cs = cosines + (token - (size_t)cls) * Dh, *sn = sines + (token - (size_t)cls) * Dh;
        for (size_t h = 0; h < 2 * H; h++) {
            real *v = x + (row * 3 * H + h) * Dh;
            for (size_t i = 0; i < Dh; i += 4) {   // two pairs, which compilers make one vector of
                real a = v[i], b = v[i + 1], c = v[i + 2], d = v[i + 3];
                v[i] = a * cs[i] - b * (direction * sn[i]);
                v[i + 1] = b * cs[i + 1] + a * (direction * sn[i + 1]);
                v[i + 2] = c * cs[i + 2] - d * (direction * sn[i + 2]);
                v[i + 3] = d * cs[i + 3] + c * (direction * sn[i + 3]);
            }
        }
    }
}
static void rope_forward(real *x, const real *cosines, const real *sines, const int *ids, int cls, size_t B,
                         size_t Tb, size_t H, size_t Dh) {
    rope_turn(x, 1, cosines, sines, ids, cls, B, Tb, H, Dh);
}
// The transpose of a rotation is the rotation by the negative angle.
static void rope_backward(real *dx, const real *cosines, const real *sines, const int *ids, int cls, size_t B,
                          size_t Tb, size_t H, size_t Dh) {
    rope_turn(dx, -1, cosines, sines, ids, cls, B, Tb, H, Dh);
}

// Value residual (arXiv 2410.17897): out = lambda v1 + (1 - lambda) v. v and out are the values inside of
// rows of 3D; v1 [B,T,D] has block 0's at all tokens.
static void value_residual_forward(real *out, const real *v, const real *v1, real lambda, const int *ids,
                                   size_t B, size_t Tb, size_t T, size_t D) {
#pragma omp parallel for
    for (size_t row = 0; row < B * Tb; row++) {
        const real *first = v1 + (row / Tb * T + token_of(ids, row / Tb, row % Tb, Tb)) * D,
                   *vn = v + row * 3 * D;
        real *o = out + row * 3 * D;
        for (size_t i = 0; i < D; i++) o[i] = lambda * first[i] + (1 - lambda) * vn[i];
    }
}

// dv = (1 - lambda) dout;  dv1 += lambda dout at the original token;  dlambda += sum (v1 - v) dout, by way of
// each sample's part of parts [B]
static void value_residual_backward(real *dv, real *dv1, real *dlambda, real *parts, const real *dout,
                                    const real *v, const real *v1, real lambda, const int *ids, size_t B,
                                    size_t Tb, size_t T, size_t D) {
#pragma omp parallel for
    for (size_t b = 0; b < B; b++) {
        real sum = 0;
        for (size_t t = 0; t < Tb; t++) {
            size_t at = (b * T + token_of(ids, b, t, Tb)) * D, row = (b * Tb + t) * 3 * D;
            const real *d = dout + row, *vn = v + row, *first = v1 + at;
            real *dvn = dv + row, *dfirst = dv1 + at;
#pragma omp simd reduction(+ : sum)
            for (size_t i = 0; i < D; i++) {
                sum += d[i] * (first[i] - vn[i]);
                dvn[i] = (1 - lambda) * d[i];
                dfirst[i] += lambda * d[i];
            }
        }
        parts[b] = sum;
    }
    for (size_t b = 0; b < B; b++) *dlambda += parts[b];
}

// Elements of scratch memory that attention needs for one head: panels and a matrix of scores
static size_t attention_work(size_t Tb, size_t Dh) {
    size_t most = Tb > Dh ? Tb : Dh;
    return (most + NR - 1) / NR * NR * most + Tb * softmax_row(Tb);
}

// out[B,Tb,D] = softmax(q k^T / sqrt(Dh)) v for each sample and head, from qkv[B,Tb,3D]; att [B,H,Tb,R] is
// kept, R = softmax_row(Tb). work: attention_work elements for each of `threads` threads. matmul_small takes
// the result, its row length, the columns it may write, the factors (a part's begin, row length, 1:
// transposed), the rows, columns and terms of a sum, and scratch.
static void attention_forward(real *out, real *att, const real *qkv, real *work, int threads, size_t B,
                              size_t Tb, size_t H, size_t Dh) {
    size_t D = H * Dh, R = softmax_row(Tb);
    (void)threads;   // unused without OpenMP
#pragma omp parallel for num_threads(threads)
    for (size_t bh = 0; bh < B * H; bh++) {
        const real *q = qkv + bh / H * Tb * 3 * D + bh % H * Dh, *k = q + D, *v = k + D;
        real *p = att + bh * Tb * R, *w = thread_work(work, attention_work(Tb, Dh));
        matmul_small(p, R, R, part_of(q, 3 * D, 0), part_of(k, 3 * D, 1), Tb, Tb, Dh, w);
        softmax_forward(p, Tb, Tb, (real)(1.0 / sqrt((double)Dh)));
        real *o = out + bh / H * Tb * D + bh % H * Dh;
        matmul_small(o, D, Dh, part_of(p, R, 0), part_of(v, 3 * D, 0), Tb, Dh, Tb, w);
    }
}

// o = p v, p = softmax(s / sqrt(Dh)), s = q k^T:
//   dv = p^T do,  dp = do v^T,  ds_ij = p_ij (dp_ij - sum_k p_ik dp_ik) / sqrt(Dh),  dq = ds k,  dk = ds^T q
static void attention_backward(real *dqkv, const real *dout, const real *qkv, const real *att, real *work,
                               int threads, size_t B, size_t Tb, size_t H, size_t Dh) {
    size_t D = H * Dh, R = softmax_row(Tb);
    (void)threads;
#pragma omp parallel for num_threads(threads)
    for (size_t bh = 0; bh < B * H; bh++) {
        size_t at = bh / H * Tb * 3 * D + bh % H * Dh;
        const real *q = qkv + at, *k = q + D, *v = k + D, *p = att + bh * Tb * R;
        const real *d = dout + bh / H * Tb * D + bh % H * Dh;
        real *dq = dqkv + at, *dk = dq + D, *dv = dk + D;
        real *ds = thread_work(work, attention_work(Tb, Dh)), *w = ds + Tb * R;
        matmul_small(ds, R, R, part_of(d, D, 0), part_of(v, 3 * D, 1), Tb, Tb, Dh, w);
        softmax_backward(ds, p, Tb, Tb, (real)(1.0 / sqrt((double)Dh)));
        matmul_small(dv, 3 * D, Dh, part_of(p, R, 1), part_of(d, D, 0), Tb, Dh, Tb, w);
        matmul_small(dq, 3 * D, Dh, part_of(ds, R, 0), part_of(k, 3 * D, 0), Tb, Dh, Tb, w);
        matmul_small(dk, 3 * D, Dh, part_of(ds, R, 1), part_of(q, 3 * D, 0), Tb, Dh, Tb, w);
    }
}

// patches[B,P,X] of x[B,C,S,S], features in the order (channel, row, column) of a convolution's weight
static void patchify(real *patches, const real *x, const Config *c, size_t B) {
    size_t S = c->input_size, p = c->patch_size, G = grid_of(c), P = patches_of(c), C = c->in_channels,
           X = C * p * p;
#pragma omp parallel for
    for (size_t n = 0; n < B * P; n++)
        for (size_t i = 0; i < X; i++) {
            size_t channel = i / (p * p), row = n % P / G * p + i / p % p, column = n % P % G * p + i % p;
            patches[n * X + i] = x[((n / P * C + channel) * S + row) * S + column];
        }
}

// x[B,C,S,S] from patches[B,P,X], features in the order (row, column, channel) of the final layer
static size_t unpatchify_place(size_t n, size_t i, const Config *c) {   // where feature i of patch n goes
    size_t S = c->input_size, p = c->patch_size, G = grid_of(c), P = patches_of(c), C = c->in_channels;
    size_t channel = i % C, row = n % P / G * p + i / C / p, column = n % P % G * p + i / C % p;
    return ((n / P * C + channel) * S + row) * S + column;
}
static void unpatchify_forward(real *x, const real *patches, const Config *c, size_t B) {
    size_t P = patches_of(c), X = patch_dim_of(c);
#pragma omp parallel for
    for (size_t n = 0; n < B * P; n++)
        for (size_t i = 0; i < X; i++) x[unpatchify_place(n, i, c)] = patches[n * X + i];
}
static void unpatchify_backward(real *dpatches, const real *dx, const Config *c, size_t B) {
    size_t P = patches_of(c), X = patch_dim_of(c);
#pragma omp parallel for
    for (size_t n = 0; n < B * P; n++)
        for (size_t i = 0; i < X; i++) dpatches[n * X + i] = dx[unpatchify_place(n, i, c)];
}

// e(t)[B,W] = [cos(t f_k), sin(t f_k)], f_k = 10000^(-k/128); t in [0, 1], not times 1000
enum { TIME_FEATURES = 256 };   // W
static void time_features(real *out, const real *t, size_t B) {
    enum { PAIRS = TIME_FEATURES / 2 };
#pragma omp parallel for
    for (size_t k = 0; k < PAIRS; k++) {
        double f = pow(10000, -(double)k / PAIRS);
        for (size_t b = 0; b < B; b++) {
            out[b * TIME_FEATURES + k] = (real)cos((double)t[b] * f);
            out[b * TIME_FEATURES + PAIRS + k] = (real)sin((double)t[b] * f);
        }
    }
}

// N rows of D; ldo and ldi are the lengths of the rows in memory
static void copy_rows(real *out, size_t ldo, const real *in, size_t ldi, size_t N, size_t D) {
#pragma omp parallel for
    for (size_t row = 0; row < N; row++) memcpy(out + row * ldo, in + row * ldi, sizeof(real) * D);
}

// Kept tokens: out[B,Tk] are rows ids[b] of in[B,T], D numbers in rows of ldo and ldi; and back again
static void gather_rows(real *out, size_t ldo, const real *in, size_t ldi, const int *ids, size_t B,
                        size_t Tk, size_t T, size_t D) {
#pragma omp parallel for
    for (size_t i = 0; i < B * Tk; i++)
        memcpy(out + i * ldo, in + (i / Tk * T + (size_t)ids[i]) * ldi, sizeof(real) * D);
}
static void scatter_rows(real *out, size_t ldo, const real *in, size_t ldi, const int *ids, size_t B,
                         size_t Tk, size_t T, size_t D) {
#pragma omp parallel for
    for (size_t i = 0; i < B * Tk; i++)
        memcpy(out + (i / Tk * T + (size_t)ids[i]) * ldo, in + i * ldi, sizeof(real) * D);
}

// out[B,count,D] = tokens t0 ... t0+count of in[B,T,D]; and back into their places
static void take_tokens(real *out, const real *in, size_t B, size_t count, size_t t0, size_t T, size_t D) {
#pragma omp parallel for
    for (size_t b = 0; b < B; b++)
        memcpy(out + b * count * D, in + (b * T + t0) * D, sizeof(real) * count * D);
}
static void put_tokens(real *out, const real *in, size_t B, size_t count, size_t t0, size_t T, size_t D) {
#pragma omp parallel for
    for (size_t b = 0; b < B; b++)
        memcpy(out + (b * T + t0) * D, in + b * count * D, sizeof(real) * count * D);
}

// sum[N,D] += in[N,D], whose rows may be longer in memory; ldi 0: the same row for all
static void add_rows(real *sum, size_t lds, const real *in, size_t ldi, size_t N, size_t D) {
#pragma omp parallel for
    for (size_t row = 0; row < N; row++)
        for (size_t i = 0; i < D; i++) sum[row * lds + i] += in[row * ldi + i];
}

// ----------------------------------------------------------------------------------------------------------
// Parameters: one line a tensor says its name, shape, start and where the model finds it. The table drives
// allocation, start values, AdamW, EMA, checkpoints and the comparison with reference files.

enum Start { ZERO, ONE, HALF, NORMAL, XAVIER, POSITIONS, ROPE_COS, ROPE_SIN };
typedef struct {
    char name[64];
    enum Start start;
    int trained;      // 0: a fixed table
    int muon_parts;   // how many matrices, one below the other, it is to Muon; 0: it is AdamW's
    int block;        // which block it belongs to, -1: none
    int ndim, shape[4];
    size_t size, offset;
} Tensor;
// trained, total: elements of the trained tensors, which come first, and of all, with pads
typedef struct {
    Tensor *tensors;
    int count, room, block;
    int all_muon;   // of tensors of two or more dimensions 1: all are Muon's, 0: as declare is told, -1: none
    size_t trained, total;
    real *base;
} Table;

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

// Which optimizer a tensor has under --optimizer muon: AdamW, or Muon for one matrix or for three
enum { OF_ADAMW = 0, OF_MUON = 1, OF_MUON_QKV = 3 };
// Appends a tensor to the table and returns its place in the array at t->base (NULL: only the table is
// wanted). Trailing sizes of 0 are no dimensions. Each tensor starts at a multiple of 64 elements; the pads
// stay zero.
static real *declare(Table *t, enum Start start, int muon_parts, int a, int b, int c, int d,
                     const char *name) {
    if (t->count == t->room) {
        t->room = 2 * t->room + 64;
        t->tensors = (Tensor *)realloc(t->tensors, sizeof(Tensor) * (size_t)t->room);
        if (!t->tensors) die("out of memory for the parameter table");
    }
    Tensor *x = &t->tensors[t->count++];
    if (t->block < 0) snprintf(x->name, sizeof(x->name), "%s", name);
    else snprintf(x->name, sizeof(x->name), "blocks.%d.%s", t->block, name);
    int shape[4] = {a, b, c, d};
    memcpy(x->shape, shape, sizeof(shape));
    x->start = start;
    x->trained = start < POSITIONS;
    x->block = t->block;
    x->offset = t->total;
    x->size = 1;
    for (x->ndim = 0; x->ndim < 4 && shape[x->ndim]; x->ndim++) x->size *= (size_t)shape[x->ndim];
    x->muon_parts = t->all_muon < 0 ? 0 : t->all_muon ? x->trained && x->ndim > 1 : muon_parts;
    t->total += (x->size + 63) / 64 * 64;
    if (x->trained) t->trained = t->total;
    return t->base ? t->base + x->offset : NULL;
}

// The whole model, one line a tensor. Names are those of the reference implementation's state_dict.
static Table params_table(Params *w, const Config *c, real *base) {
    Table t;
    memset(&t, 0, sizeof(t));
    memset(w, 0, sizeof(*w));
    t.base = base;
    t.block = -1;
    t.all_muon = c->optimizer == MUON ? c->muon == SRDIT13 : -1;
    int D = c->hidden_size, Dh = D / c->num_heads, M = c->projector_dim, Z = c->z_dim;
    int C = c->in_channels, p = c->patch_size, X = patch_dim_of(c), W = TIME_FEATURES;
    w->x_w = declare(&t, XAVIER, OF_ADAMW, D, C, p, p, "x_embedder.proj.weight");
    w->x_b = declare(&t, ZERO, OF_ADAMW, D, 0, 0, 0, "x_embedder.proj.bias");
    if (c->cls) {
        w->cls_w = declare(&t, XAVIER, OF_ADAMW, D, Z, 0, 0, "cls_projectors2.weight");
        w->cls_b = declare(&t, ZERO, OF_ADAMW, D, 0, 0, 0, "cls_projectors2.bias");
        w->cls_norm = declare(&t, ONE, OF_ADAMW, D, 0, 0, 0, "wg_norm.weight");
    }
    w->t0_w = declare(&t, NORMAL, OF_ADAMW, D, W, 0, 0, "t_embedder.mlp.0.weight");
    w->t0_b = declare(&t, ZERO, OF_ADAMW, D, 0, 0, 0, "t_embedder.mlp.0.bias");
    w->t2_w = declare(&t, NORMAL, OF_ADAMW, D, D, 0, 0, "t_embedder.mlp.2.weight");
    w->t2_b = declare(&t, ZERO, OF_ADAMW, D, 0, 0, 0, "t_embedder.mlp.2.bias");
    w->label =
        declare(&t, NORMAL, OF_ADAMW, c->num_classes + 1, D, 0, 0, "y_embedder.embedding_table.weight");
    for (t.block = 0; t.block < c->depth; t.block++) {   // names begin with blocks.0, blocks.1, ...
        BlockParams *b = &w->block[t.block];
        int F = hidden_of(c, t.block);
        b->qkv_w = declare(&t, XAVIER, OF_MUON_QKV, 3 * D, D, 0, 0, "attn.qkv.weight");
        b->qkv_b = declare(&t, ZERO, OF_ADAMW, 3 * D, 0, 0, 0, "attn.qkv.bias");
        if (c->qk_norm) {
            b->q_norm = declare(&t, ONE, OF_ADAMW, Dh, 0, 0, 0, "attn.q_norm.weight");
            b->k_norm = declare(&t, ONE, OF_ADAMW, Dh, 0, 0, 0, "attn.k_norm.weight");
        }
        if (c->value_residual && t.block > 0)
            b->v1_lambda = declare(&t, HALF, OF_ADAMW, 0, 0, 0, 0, "attn.v1_lambda");
        b->proj_w = declare(&t, XAVIER, OF_MUON, D, D, 0, 0, "attn.proj.weight");
        b->proj_b = declare(&t, ZERO, OF_ADAMW, D, 0, 0, 0, "attn.proj.bias");
        b->fc1_w = declare(&t, XAVIER, OF_MUON, F, D, 0, 0, "mlp.fc1.weight");
        b->fc1_b = declare(&t, ZERO, OF_ADAMW, F, 0, 0, 0, "mlp.fc1.bias");
        b->fc2_w = declare(&t, XAVIER, OF_MUON, D, F, 0, 0, "mlp.fc2.weight");
        b->fc2_b = declare(&t, ZERO, OF_ADAMW, D, 0, 0, 0, "mlp.fc2.bias");
        b->adaln_w = declare(&t, ZERO, OF_ADAMW, 6 * D, D, 0, 0, "adaLN_modulation.1.weight");
        b->adaln_b = declare(&t, ZERO, OF_ADAMW, 6 * D, 0, 0, 0, "adaLN_modulation.1.bias");
    }
    t.block = -1;
    if (c->align) {
        w->p0_w = declare(&t, XAVIER, OF_ADAMW, M, D, 0, 0, "projectors.0.0.weight");
        w->p0_b = declare(&t, ZERO, OF_ADAMW, M, 0, 0, 0, "projectors.0.0.bias");
        w->p2_w = declare(&t, XAVIER, OF_ADAMW, M, M, 0, 0, "projectors.0.2.weight");
        w->p2_b = declare(&t, ZERO, OF_ADAMW, M, 0, 0, 0, "projectors.0.2.bias");
        w->p4_w = declare(&t, XAVIER, OF_ADAMW, Z, M, 0, 0, "projectors.0.4.weight");
        w->p4_b = declare(&t, ZERO, OF_ADAMW, Z, 0, 0, 0, "projectors.0.4.bias");
    }
    w->mask_token = declare(&t, ZERO, OF_ADAMW, 1, 1, D, 0, "mask_token");
    w->fusion_w = declare(&t, XAVIER, OF_MUON, D, 2 * D, 0, 0, "fusion_proj.weight");
    w->fusion_b = declare(&t, ZERO, OF_ADAMW, D, 0, 0, 0, "fusion_proj.bias");
    w->final_adaln_w = declare(&t, ZERO, OF_ADAMW, 2 * D, D, 0, 0, "final_layer.adaLN_modulation.1.weight");
    w->final_adaln_b = declare(&t, ZERO, OF_ADAMW, 2 * D, 0, 0, 0, "final_layer.adaLN_modulation.1.bias");
    w->final_w = declare(&t, ZERO, OF_ADAMW, X, D, 0, 0, "final_layer.linear.weight");
    w->final_b = declare(&t, ZERO, OF_ADAMW, X, 0, 0, 0, "final_layer.linear.bias");
    if (c->cls) {
        w->final_cls_w = declare(&t, ZERO, OF_ADAMW, Z, D, 0, 0, "final_layer.linear_cls.weight");
        w->final_cls_b = declare(&t, ZERO, OF_ADAMW, Z, 0, 0, 0, "final_layer.linear_cls.bias");
    }
    w->pos_embed = declare(&t, POSITIONS, OF_ADAMW, 1, tokens_of(c), D, 0, "pos_embed");
    w->rope_cos = declare(&t, ROPE_COS, OF_ADAMW, patches_of(c), Dh, 0, 0, "feat_rope.freqs_cos");
    w->rope_sin = declare(&t, ROPE_SIN, OF_ADAMW, patches_of(c), Dh, 0, 0, "feat_rope.freqs_sin");
    return t;
}

static size_t count_trained(const Table *t) {   // without the pads
    size_t count = 0;
    for (int i = 0; i < t->count; i++) count += t->tensors[i].trained ? t->tensors[i].size : 0;
    return count;
}

// What a random number is for: a part of its address, as are seed, step and sample (dev/lib/random.h)
enum Stream {
    STREAM_INIT = 1,
    STREAM_ORDER,
    STREAM_TIME,
    STREAM_LABEL_DROP,
    STREAM_ROUTE,
    STREAM_PATH_DROP,
    STREAM_NOISE,
    STREAM_NOISE_CLS,
    STREAM_SAMPLE_X,
    STREAM_SAMPLE_CLS,
    STREAM_SAMPLE_LABEL,
    STREAM_CANDIDATE   // and those after it: immiscible noise
};

// Element i of the fixed table of positions [T,D]: [sin, cos] of the column, then [sin, cos] of the row
static real position_of(size_t i, const Config *c) {
    int D = c->hidden_size, G = grid_of(c), k = (int)(i % (size_t)D), patch = (int)(i / (size_t)D) - c->cls;
    double place = k < D / 2 ? patch % G : patch / G;
    double angle = place * pow(10000, -(double)(k % (D / 4)) / (D / 4));
    return patch < 0 ? 0 : (real)(float)(k / (D / 4) % 2 ? cos(angle) : sin(angle));
}
// Angle i of RoPE's fixed tables [P,Dh]: the first half by row, the second by column; pair j of a half
// turns by place * 10000^(-2j / (Dh/2)).
static double rope_angle(size_t i, const Config *c) {
    int Dh = c->hidden_size / c->num_heads, G = grid_of(c), half = Dh / 2;
    int k = (int)(i % (size_t)Dh), patch = (int)(i / (size_t)Dh);
    return (k < half ? patch / G : patch % G) * pow(10000, -2.0 * (k % half / 2) / half);
}

// Fills a tensor with its start values, as the reference implementation of arXiv 2512.12386 does
static void tensor_start(real *out, const Tensor *t, const Config *c, uint64_t seed) {
    uint32_t hash = 2166136261u;   // FNV-1a of the name: a tensor starts alike whatever else is switched off
    for (const char *s = t->name; *s; s++) hash = (hash ^ (uint8_t)*s) * 16777619u;
    size_t fan_out = t->ndim ? (size_t)t->shape[0] : 1, fan_in = t->size / fan_out;
    double bound = sqrt(6.0 / (double)(fan_in + fan_out));
    if (t->start == NORMAL) fill_normal(out, t->size, seed, STREAM_INIT, 0, hash);
    for (size_t i = 0; i < t->size; i++) {
        double u = 0;
        switch (t->start) {
            case ZERO: out[i] = 0; break;
            case ONE: out[i] = 1; break;
            case HALF: out[i] = (real)0.5; break;
            case NORMAL: out[i] *= (real)0.02; break;
            case XAVIER:
                u = uniform_of(draw4(seed, STREAM_INIT, 0, hash, (uint32_t)(i / 4)).v[i % 4]);
                out[i] = (real)(bound * (2 * u - 1));
                break;
            case POSITIONS: out[i] = position_of(i, c); break;
            case ROPE_COS: out[i] = (real)cos(rope_angle(i, c)); break;
            case ROPE_SIN: out[i] = (real)sin(rope_angle(i, c)); break;
        }
    }
}

static void params_start(real *params, const Table *t, const Config *c, uint64_t seed) {
    for (int i = 0; i < t->count; i++) tensor_start(params + t->tensors[i].offset, &t->tensors[i], c, seed);
}

// ----------------------------------------------------------------------------------------------------------
// The model

// What one micro-batch of a training step needs: data and random draws. `first` and `whole` place its B
// samples in the whole batch, so that means and contrastive pairs are those of the whole batch however it is
// split.
typedef struct {
    int B, first, whole, path_drop;
    int on_device;   // 1: noises and ids are left to a GPU, which draws them from (seed, step) itself
    uint64_t seed;
    int step;                // from 0: the steps before it
    real *x, *noise;         // [B,C,S,S]
    real *v_before;          // [C,S,S] v of the sample before the first; before sample 0 comes the last
    real *cls, *noise_cls;   // [B,Z]
    real *t;                 // [B], after the time shift
    int *y;                  // [B], after label dropout: K is "no class"
    int *ids;                // [B,Tk] tokens kept
    real *feats;             // [B,T,Z]
    real *noise_before;      // [C,S,S] scratch
    uint64_t *keys;          // [B,T] scratch
    // For a GPU that converts by itself: the samples as the data stores them, in place of x, v_before and
    // feats
    int stored;   // 1: so it is
    enum Dtype x_type, feats_type;
    double scale, offset;            // x = stored scale + offset
    void *x_stored, *feats_stored;   // [1+B,C,S,S] from the sample before the first on, [B,T,Z]
    int slot;   // 1, 2: the batch lies in that input buffer of a GPU; 0: in memory of its own
    int last;   // 1: with its gradients the step's are whole, so that several ranks may sum them up
} Batch;

// The total, and its parts before their coefficients, summed over the steps since they were last read; the
// last step's gradient norm; the first step that was not finite (0: none), after which updates change
// nothing, and which part of it was not finite
enum LossPart { NO_PART, DENOISE, CLS, ALIGN, CFM, GRADIENT };
typedef struct {
    double total, denoise, cls, align, cfm, grad_norm;
    int bad_step;
    enum LossPart bad_part;
} Losses;
HOST_DEVICE static inline enum LossPart bad_part_of(double denoise, double cls, double align, double cfm,
                                                    double gradient) {
    double parts[] = {denoise, cls, align, cfm, gradient};
    for (int i = 0; i < 5; i++)
        if (!(fabs(parts[i]) < (double)INFINITY)) return (enum LossPart)(DENOISE + i);
    return NO_PART;
}

// Activations of a block that its backward needs
typedef struct {
    const real *in;        // [B,Tb,D] the block before's output (in evaluation, within g, `out` itself: what
                           // `in` held is not needed any more when `out` is written)
    real *mod;             // [B,6D] shift1, scale1, gate1, shift2, scale2, gate2
    real *h1, *r1, *qkv;   // [B,Tb,D], [B,Tb], [B,Tb,3D]
    real *r_qk;            // [B,Tb,2H]
    real *mix, *att;       // [B,Tb,3D] q and k normed and turned, v mixed; [B,H,Tb,R]
    real *a, *proj;        // [B,Tb,D] twice
    real *mid, *h2, *r2;   // [B,Tb,D] after the first residual; [B,Tb,D]; [B,Tb]
    real *gelu, *gelu_slope;   // [B,Tb,F] twice
    real *fc2, *out;           // [B,Tb,D] twice
} BlockActs;

// Of the alignment projector at one depth
typedef struct {
    real *p0, *p0_silu, *p2, *p2_silu, *zs, *d_zs;   // [B,Tb,M] four times, [B,Tb,Z] twice
} ProjectorActs;

typedef struct {
    real *x_t, *v, *cls_t;                                         // [B,C,S,S] twice, [B,Z]
    real *patches, *patch_tokens, *cls_proj, *cls_r, *cls_token;   // [B,P,X], [B,P,D], [B,D], [B], [B,D]
    real *embed, *v1;                                              // [B,T,D] twice; v1: block 0's values
    real *t_features, *t0, *t0_silu, *cond, *cond_silu;            // [B,W], then [B,D]
    BlockActs block[MAX_DEPTH + 1];                  // evaluation: g shares the last, or one more
    real *kept, *pair, *fused;                       // [B,Tk,D], [B,T,2D], [B,T,D]
    ProjectorActs align[MAX_SERIES];                 // one an aligned depth
    real *final_mod, *final_h, *final_r;             // [B,2D], [B,T,D], [B,T]
    real *final_patches, *final_cls, *out_patches;   // [B,P,D], [B,D], [B,P,X]
    real *out, *cls_out;                             // [B,C,S,S], [B,Z]
    // gradients
    real *dx, *d_E, *d_kept, *d_v1;                   // [B,T,D] twice, [B,Tk,D], [B,T,D]
    real *d_qkv, *d_mix, *d_mod;                      // [B,T,3D] twice, [B,6D]
    real *d_cond_silu, *d_cond, *d_out, *d_cls_out;   // [B,D] twice, [B,C,S,S], [B,Z]
    // scratch that blocks share
    real *wide, *wide2;      // [B,T, the largest of F, M and 2D]
    real *parts, *work;      // [B,2Dh]; attention_work for each thread
    Losses *sample_losses;   // [B]
    double *norm_parts;      // one for each NORM_CHUNK trained numbers
    real *muon_work;   // [threads,muon_room]: of Muon's largest matrix [m,n] twice, newton_schulz's work
    size_t muon_room;
} Acts;
enum { NORM_CHUNK = 4096 };

typedef struct Model {
    Config c;
    Table table;
    int max_batch, threads;
    Losses losses;
    size_t activation_bytes, parameter_bytes;
    real *params, *grads, *m, *v, *ema;   // an array of all tensors each, in table order
    Params w, dw, w_ema;                  // the same, by name
    Acts a;
    real *memory;
} Model;

// A block of memory handed out from the front. With base NULL it only counts: the same walk is made twice,
// first to learn the size, then to set the pointers. Every piece starts at a multiple of 64 elements.
typedef struct {
    real *base;
    size_t used;
} Arena;
static real *take(Arena *a, size_t count) {
    real *p = a->base ? a->base + a->used : NULL;
    a->used += (count + 63) / 64 * 64;
    return p;
}
static size_t reals_of(size_t bytes) { return (bytes + sizeof(real) - 1) / sizeof(real); }

static void block_layout(BlockActs *k, Arena *m, const Config *c, size_t B, size_t Tb, size_t F) {
    size_t D = c->hidden_size, H = c->num_heads, N = B * Tb;
    k->mod = take(m, B * 6 * D);
    k->h1 = take(m, N * D);
    k->r1 = take(m, N);
    k->qkv = take(m, N * 3 * D);
    k->r_qk = take(m, N * 2 * H);
    k->mix = take(m, N * 3 * D);
    k->att = take(m, B * H * Tb * softmax_row(Tb));
    k->a = take(m, N * D);
    k->proj = take(m, N * D);
    k->mid = take(m, N * D);
    k->h2 = take(m, N * D);
    k->r2 = take(m, N);
    k->gelu = take(m, N * F);
    k->gelu_slope = take(m, N * F);
    k->fc2 = take(m, N * D);
    k->out = take(m, N * D);
}

static void acts_layout(Acts *a, Arena *m, const Config *c, size_t B, size_t threads) {
    size_t T = tokens_of(c), Tk = kept_of(c), P = patches_of(c), X = patch_dim_of(c), W = TIME_FEATURES;
    size_t D = c->hidden_size, H = c->num_heads, F = most_hidden_of(c), M = c->projector_dim, Z = c->z_dim;
    size_t latent = latent_of(c);
    a->x_t = take(m, B * latent);
    a->v = take(m, B * latent);
    a->cls_t = take(m, B * Z);
    a->patches = take(m, B * P * X);
    a->patch_tokens = take(m, B * P * D);
    a->cls_proj = take(m, B * D);
    a->cls_r = take(m, B);
    a->cls_token = take(m, B * D);
    a->embed = take(m, B * T * D);
    a->v1 = take(m, B * T * D);
    a->t_features = take(m, B * W);
    a->t0 = take(m, B * D);
    a->t0_silu = take(m, B * D);
    a->cond = take(m, B * D);
    a->cond_silu = take(m, B * D);
    // in evaluation all blocks of g share one block's memory (network_forward)
    int shared_by_g = c->num_h ? c->depth - 1 : c->depth;
    for (int i = 0; i <= shared_by_g; i++)
        block_layout(&a->block[i], m, c, B, is_sparse(c, i) ? Tk : T,
                     i == shared_by_g ? F : (size_t)hidden_of(c, i));
    a->kept = take(m, B * Tk * D);
    a->pair = take(m, B * T * 2 * D);
    a->fused = take(m, B * T * D);
    for (int k = 0; align_depth(c, k); k++) {
        ProjectorActs *p = &a->align[k];
        size_t N = B * (is_sparse(c, align_depth(c, k) - 1) ? Tk : T);
        p->p0 = take(m, N * M);
        p->p0_silu = take(m, N * M);
        p->p2 = take(m, N * M);
        p->p2_silu = take(m, N * M);
        p->zs = take(m, N * Z);
        p->d_zs = take(m, N * Z);
    }
    a->final_mod = take(m, B * 2 * D);
    a->final_h = take(m, B * T * D);
    a->final_r = take(m, B * T);
    a->final_patches = take(m, B * P * D);
    a->final_cls = take(m, B * D);
    a->out_patches = take(m, B * P * X);
    a->out = take(m, B * latent);
    a->cls_out = take(m, B * Z);
    a->dx = take(m, B * T * D);
    a->d_E = take(m, B * T * D);
    a->d_kept = take(m, B * Tk * D);
    a->d_v1 = take(m, B * T * D);
    a->d_qkv = take(m, B * T * 3 * D);
    a->d_mix = take(m, B * T * 3 * D);
    a->d_mod = take(m, B * 6 * D);
    a->d_cond_silu = take(m, B * D);
    a->d_cond = take(m, B * D);
    a->d_out = take(m, B * latent);
    a->d_cls_out = take(m, B * Z);
    size_t wide = F > M ? F : M;
    if (wide < 2 * D) wide = 2 * D;
    a->wide = take(m, B * T * wide);
    a->wide2 = take(m, B * T * wide);
    a->parts = take(m, B * 2 * (D / H));
    a->work = take(m, threads * attention_work(T, D / H));
    a->sample_losses = (Losses *)(void *)take(m, reals_of(B * sizeof(Losses)));
}

// The widest product of the model, for matmul_reserve
static size_t widest(const Config *c) {
    int sizes[] = {6 * c->hidden_size, most_hidden_of(c), c->projector_dim,
                   c->z_dim,           patch_dim_of(c),   TIME_FEATURES};
    int most = 0;
    for (int i = 0; i < 6; i++) most = imax(most, sizes[i]);
    return (size_t)most;
}

// Numbers of scratch that Muon needs for a tensor (muon_matrix), and the longer side of its matrices
static size_t muon_room_of(const Tensor *t, size_t *longer) {
    *longer = 0;
    if (!t->muon_parts) return 0;
    size_t rows = (size_t)(t->shape[0] / t->muon_parts), cols = t->size / (size_t)t->muon_parts / rows;
    size_t shorter = rows < cols ? rows : cols;
    *longer = rows < cols ? cols : rows;
    return (3 * rows * cols + 4 * shorter * shorter + 63) / 64 * 64;
}

// Whether a matrix of Muon's is so large that all threads make its step together
static int by_all_threads(const Tensor *t) {
    return t->muon_parts && t->size / (size_t)t->muon_parts > 1 << 20;
}

// Memory for the parameters and the activations of max_batch samples. trained: the model is to be trained
// and has all five arrays; else one, its EMA's or its weights', and m->grads, m->m, m->v are NULL.
static Model *model_allocate(const Config *c, int max_batch, int trained) {
    if ((double)max_batch * tokens_of(c) > 1 << 30)
        die("%d samples of %d tokens are too many at once; use a larger --accum", max_batch, tokens_of(c));
    Model *model = (Model *)alloc_zero(1, sizeof(Model));
    model->c = *c;
    model->max_batch = max_batch;
    model->threads = omp_get_max_threads();
    model->table = params_table(&model->w, c, NULL);
    size_t n = model->table.total, blocks = trained ? 5 : 1;
    size_t chunks = (model->table.trained + NORM_CHUNK - 1) / NORM_CHUNK * trained;
    Arena count = {NULL, 0};
    acts_layout(&model->a, &count, c, max_batch, model->threads);
    take(&count, reals_of(chunks * sizeof(double)));
    size_t widest_product = widest(c), muon_room = 0, muon_rooms = 0;   // of a thread, and in all
    for (int i = 0; i < model->table.count && trained; i++) {
        size_t side, room = muon_room_of(&model->table.tensors[i], &side);
        if (by_all_threads(&model->table.tensors[i])) muon_rooms = room > muon_rooms ? room : muon_rooms;
        else muon_room = room > muon_room ? room : muon_room;
        widest_product = side > widest_product ? side : widest_product;
    }
    size_t threads_room = muon_room * (size_t)model->threads;
    muon_rooms = threads_room > muon_rooms ? threads_room : muon_rooms;
    take(&count, muon_rooms);
    size_t all = blocks * n + count.used + 64;
    model->activation_bytes = count.used * sizeof(real);
    model->parameter_bytes = blocks * n * sizeof(real);
    model->memory = (real *)alloc_zero(all, sizeof(real));
#ifdef MADV_HUGEPAGE   // fewer misses of the page table
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t start = ((uintptr_t)model->memory + page - 1) / page * page;
    (void)madvise((void *)start, all * sizeof(real) / page * page - page, MADV_HUGEPAGE);
#endif
    Arena arena = {(real *)(((uintptr_t)model->memory + 63) / 64 * 64), 0};
    model->params = model->ema = take(&arena, n);
    if (trained) {
        model->grads = take(&arena, n);
        model->m = take(&arena, n);
        model->v = take(&arena, n);
        model->ema = take(&arena, n);
    }
    acts_layout(&model->a, &arena, c, max_batch, model->threads);
    model->a.norm_parts = (double *)(void *)take(&arena, reals_of(chunks * sizeof(double)));
    model->a.muon_work = take(&arena, muon_rooms);
    model->a.muon_room = muon_room;
    free(model->table.tensors);
    model->table = params_table(&model->w, c, model->params);
    free(params_table(&model->w_ema, c, model->ema).tensors);
    if (trained) free(params_table(&model->dw, c, model->grads).tensors);
    matmul_reserve(widest_product);
#pragma omp parallel num_threads(model->threads) if (muon_room)
    matmul_reserve(widest_product);
    return model;
}

// A model to be trained, whose activations hold max_batch samples; the parameters are at their start values.
static Model *model_create(const Config *c, int max_batch, uint64_t seed) {
    Model *model = model_allocate(c, max_batch, 1);
    params_start(model->params, &model->table, c, seed);
    memcpy(model->ema, model->params, model->table.total * sizeof(real));
    return model;
}
static void model_destroy(Model *m) { free(m->table.tensors), free(m->memory), free(m); }

// Block i on Tb tokens a sample, those of ids (NULL: all), out = block(in; cond). Its activations go to k.
static void block_forward(BlockActs *k, Acts *a, const Params *all, int i, const real *in, const int *ids,
                          const Config *c, int threads, size_t B, size_t Tb) {
    size_t T = tokens_of(c), D = c->hidden_size, H = c->num_heads, Dh = D / H, F = hidden_of(c, i),
           N = B * Tb;
    const BlockParams *w = &all->block[i];
    k->in = in;
    linear_forward(k->mod, a->cond_silu, w->adaln_w, w->adaln_b, B, D, 6 * D);
    const real *shift1 = k->mod, *scale1 = shift1 + D, *gate1 = scale1 + D;
    const real *shift2 = gate1 + D, *scale2 = shift2 + D, *gate2 = scale2 + D;
    // mid = in + gate1 proj(attention(norm(in)))
    norm_modulate_forward(k->h1, k->r1, in, shift1, scale1, 6 * D, B, Tb, D);
    linear_forward(k->qkv, k->h1, w->qkv_w, w->qkv_b, N, D, 3 * D);
    real *v = k->qkv + 2 * D, *mix_v = k->mix + 2 * D;
    if (c->qk_norm) qk_norm_forward(k->mix, k->r_qk, k->qkv, w->q_norm, w->k_norm, N, H, Dh);
    else copy_rows(k->mix, 3 * D, k->qkv, 3 * D, N, 2 * D);
    if (c->rope) rope_forward(k->mix, all->rope_cos, all->rope_sin, ids, c->cls, B, Tb, H, Dh);
    if (c->value_residual && i > 0) value_residual_forward(mix_v, v, a->v1, *w->v1_lambda, ids, B, Tb, T, D);
    else copy_rows(mix_v, 3 * D, v, 3 * D, N, D);
    if (i == 0) copy_rows(a->v1, D, v, 3 * D, N, D);
    attention_forward(k->a, k->att, k->mix, a->work, threads, B, Tb, H, Dh);
    linear_forward(k->proj, k->a, w->proj_w, w->proj_b, N, D, D);
    gate_forward(k->mid, in, gate1, k->proj, 6 * D, B, Tb, D);
    // out = mid + gate2 fc2(gelu(fc1(norm(mid))))
    norm_modulate_forward(k->h2, k->r2, k->mid, shift2, scale2, 6 * D, B, Tb, D);
    linear_forward(a->wide, k->h2, w->fc1_w, w->fc1_b, N, D, F);
    gelu_forward(k->gelu, k->gelu_slope, a->wide, N * F);
    linear_forward(k->fc2, k->gelu, w->fc2_w, w->fc2_b, N, F, D);
    gate_forward(k->out, k->mid, gate2, k->fc2, 6 * D, B, Tb, D);
}

// dx [B,Tb,D] comes in as the gradient of block i's output and leaves as that of its input. a->d_v1 collects
// the gradients of block 0's values; block 0, which runs last, adds them to its own. a->d_cond_silu is added
// to.
static void block_backward(real *dx, Params *d_all, Acts *a, const Params *all, int i, const int *ids,
                           const Config *c, int threads, size_t B, size_t Tb) {
    size_t T = tokens_of(c), D = c->hidden_size, H = c->num_heads, Dh = D / H, F = hidden_of(c, i),
           N = B * Tb;
    const BlockActs *k = &a->block[i];
    const BlockParams *w = &all->block[i];
    BlockParams *dw = &d_all->block[i];
    const real *scale1 = k->mod + D, *gate1 = scale1 + D, *scale2 = gate1 + 2 * D, *gate2 = scale2 + D;
    real *d_shift1 = a->d_mod, *d_scale1 = d_shift1 + D, *d_gate1 = d_scale1 + D;
    real *d_shift2 = d_gate1 + D, *d_scale2 = d_shift2 + D, *d_gate2 = d_scale2 + D;
    // out = mid + gate2 fc2(gelu(fc1(h2)))
    gate_backward(a->wide2, d_gate2, dx, gate2, k->fc2, 6 * D, B, Tb, D);
    linear_backward(a->wide, dw->fc2_w, dw->fc2_b, a->wide2, k->gelu, w->fc2_w, N, F, D, 0);
    gelu_backward(a->wide, k->gelu_slope, N * F);
    linear_backward(a->wide2, dw->fc1_w, dw->fc1_b, a->wide, k->h2, w->fc1_w, N, D, F, 0);
    norm_modulate_backward(dx, d_shift2, d_scale2, a->wide2, k->mid, k->r2, scale2, 6 * D, B, Tb, D);
    // mid = in + gate1 proj(attention(mix))
    gate_backward(a->wide2, d_gate1, dx, gate1, k->proj, 6 * D, B, Tb, D);
    linear_backward(a->wide, dw->proj_w, dw->proj_b, a->wide2, k->a, w->proj_w, N, D, D, 0);
    attention_backward(a->d_mix, a->wide, k->mix, k->att, a->work, threads, B, Tb, H, Dh);
    // mix = rope(qk_norm(q, k)), value_residual(v)
    const real *v = k->qkv + 2 * D, *d_mix_v = a->d_mix + 2 * D;
    real *dv = a->d_qkv + 2 * D;
    if (c->rope) rope_backward(a->d_mix, all->rope_cos, all->rope_sin, ids, c->cls, B, Tb, H, Dh);
    if (c->qk_norm)
        qk_norm_backward(a->d_qkv, dw->q_norm, dw->k_norm, a->parts, a->d_mix, k->qkv, k->r_qk, w->q_norm,
                         w->k_norm, B, Tb, H, Dh);
    else copy_rows(a->d_qkv, 3 * D, a->d_mix, 3 * D, N, 2 * D);
    if (c->value_residual && i > 0)
        value_residual_backward(dv, a->d_v1, dw->v1_lambda, a->parts, d_mix_v, v, a->v1, *w->v1_lambda, ids,
                                B, Tb, T, D);
    else copy_rows(dv, 3 * D, d_mix_v, 3 * D, N, D);
    if (c->value_residual && i == 0) add_rows(dv, 3 * D, a->d_v1, D, N, D);
    // qkv = linear(h1), h1 = norm(in) modulated by adaln(cond_silu)
    linear_backward(a->wide2, dw->qkv_w, dw->qkv_b, a->d_qkv, k->h1, w->qkv_w, N, D, 3 * D, 0);
    norm_modulate_backward(dx, d_shift1, d_scale1, a->wide2, k->in, k->r1, scale1, 6 * D, B, Tb, D);
    linear_backward(a->d_cond_silu, dw->adaln_w, dw->adaln_b, a->d_mod, a->cond_silu, w->adaln_w, B, D, 6 * D,
                    1);
}

// zs [N,Z] = p4(silu(p2(silu(p0(x))))) of the output x [N,D] of an aligned block: what is compared with the
// frozen encoder's features. All aligned depths have the same weights.
static void projector_forward(ProjectorActs *p, const Params *w, const real *x, const Config *c, size_t N) {
    size_t D = c->hidden_size, M = c->projector_dim, Z = c->z_dim;
    linear_forward(p->p0, x, w->p0_w, w->p0_b, N, D, M);
    silu_forward(p->p0_silu, p->p0, N * M);
    linear_forward(p->p2, p->p0_silu, w->p2_w, w->p2_b, N, M, M);
    silu_forward(p->p2_silu, p->p2, N * M);
    linear_forward(p->zs, p->p2_silu, w->p4_w, w->p4_b, N, M, Z);
}
// dx += its gradient
static void projector_backward(real *dx, Params *dw, Acts *a, const ProjectorActs *p, const Params *w,
                               const real *x, const Config *c, size_t N) {
    size_t D = c->hidden_size, M = c->projector_dim, Z = c->z_dim;
    linear_backward(a->wide, dw->p4_w, dw->p4_b, p->d_zs, p->p2_silu, w->p4_w, N, M, Z, 0);
    silu_backward(a->wide, a->wide, p->p2, N * M);
    linear_backward(a->wide2, dw->p2_w, dw->p2_b, a->wide, p->p0_silu, w->p2_w, N, M, M, 0);
    silu_backward(a->wide2, a->wide2, p->p0, N * M);
    linear_backward(dx, dw->p0_w, dw->p0_b, a->wide2, x, w->p0_w, N, D, M, 1);
}
// Both for block i's output [N,D], where that is aligned
static void align_forward(Acts *a, const Params *w, int i, const Config *c, size_t N) {
    for (int k = 0; align_depth(c, k); k++)
        if (align_depth(c, k) == i + 1) projector_forward(&a->align[k], w, a->block[i].out, c, N);
}
static void align_backward(real *dx, Params *dw, Acts *a, const Params *w, int i, const Config *c, size_t N) {
    for (int k = 0; align_depth(c, k); k++)
        if (align_depth(c, k) == i + 1) projector_backward(dx, dw, a, &a->align[k], w, a->block[i].out, c, N);
}

// c = mlp(e(t)) + label, and silu(c), which all adaLN layers read
static void condition_forward(Acts *a, const Params *w, const real *t, const int *y, const Config *c,
                              size_t B) {
    size_t D = c->hidden_size, W = TIME_FEATURES;
    time_features(a->t_features, t, B);
    linear_forward(a->t0, a->t_features, w->t0_w, w->t0_b, B, W, D);
    silu_forward(a->t0_silu, a->t0, B * D);
    linear_forward(a->cond, a->t0_silu, w->t2_w, w->t2_b, B, D, D);
    for (size_t b = 0; b < B; b++)
        for (size_t i = 0; i < D; i++) a->cond[b * D + i] += w->label[(size_t)y[b] * D + i];
    silu_forward(a->cond_silu, a->cond, B * D);
}
static void condition_backward(Params *dw, Acts *a, const Params *w, const int *y, const Config *c,
                               size_t B) {
    size_t D = c->hidden_size, W = TIME_FEATURES;
    silu_backward(a->d_cond, a->d_cond_silu, a->cond, B * D);
    for (size_t b = 0; b < B; b++)
        for (size_t i = 0; i < D; i++) dw->label[(size_t)y[b] * D + i] += a->d_cond[b * D + i];
    linear_backward(a->wide, dw->t2_w, dw->t2_b, a->d_cond, a->t0_silu, w->t2_w, B, D, D, 0);
    silu_backward(a->wide, a->wide, a->t0, B * D);
    linear_backward(NULL, dw->t0_w, dw->t0_b, a->wide, a->t_features, w->t0_w, B, W, D, 0);
}

// Velocity of a->x_t, a->cls_t at times t [B] with labels y [B] into a->out, a->cls_out. ids [B,Tk]:
// training, on the kept tokens, with the projector; NULL: evaluation, on all tokens, where the blocks of g
// share one block's memory. path_drop: every token of g is the mask token, and of its blocks only those are
// run that alignment asks for.
static void network_forward(Model *model, const Params *w, const real *t, const int *y, const int *ids,
                            int path_drop, size_t B) {
    const Config *c = &model->c;
    Acts *a = &model->a;
    size_t T = tokens_of(c), P = patches_of(c), D = c->hidden_size, Z = c->z_dim, X = patch_dim_of(c),
           N = B * T;
    size_t Tb = ids ? (size_t)kept_of(c) : T;
    int first_h = c->depth - c->num_h, threads = model->threads;
    // tokens: patches, CLS before them, positions
    patchify(a->patches, a->x_t, c, B);
    linear_forward(a->patch_tokens, a->patches, w->x_w, w->x_b, B * P, X, D);
    put_tokens(a->embed, a->patch_tokens, B, P, c->cls, T, D);
    if (c->cls) {
        linear_forward(a->cls_proj, a->cls_t, w->cls_w, w->cls_b, B, Z, D);
        rmsnorm_forward(a->cls_token, a->cls_r, a->cls_proj, w->cls_norm, B, D);
        put_tokens(a->embed, a->cls_token, B, 1, 0, T, D);
    }
    add_rows(a->embed, T * D, w->pos_embed, 0, B, T * D);
    condition_forward(a, w, t, y, c, B);
    // encoder f on all tokens
    const real *x = a->embed;
    for (int i = 0; i < c->num_f; i++) {
        block_forward(&a->block[i], a, w, i, x, NULL, c, threads, B, T);
        x = a->block[i].out;
        if (ids) align_forward(a, w, i, c, N);
    }
    const real *E = x;
    // sparse middle g on the kept tokens; on a path-drop step only for what is aligned in it
    int end = end_of_g(c, ids != NULL, path_drop);
    if (ids && (end > c->num_f || !path_drop)) gather_rows(a->kept, D, E, D, ids, B, Tb, T, D);
    const real *g = ids ? a->kept : E;
    for (int i = c->num_f; i < end; i++) {
        BlockActs *k = ids ? &a->block[i] : &a->block[c->num_h ? c->depth - 1 : c->depth];
        block_forward(k, a, w, i, g, ids, c, threads, B, Tb);
        g = k->out;
        if (ids) align_forward(a, w, i, c, B * Tb);
    }
    if (path_drop) g = NULL;
    // pad with the mask token, fuse: fusion_proj([E, G])
    copy_rows(a->pair, 2 * D, E, D, N, D);
    if (g && !ids) copy_rows(a->pair + D, 2 * D, g, D, N, D);
    else copy_rows(a->pair + D, 2 * D, w->mask_token, 0, N, D);
    if (g && ids) scatter_rows(a->pair + D, 2 * D, g, D, ids, B, Tb, T, D);
    linear_forward(a->fused, a->pair, w->fusion_w, w->fusion_b, N, 2 * D, D);
    // decoder h on all tokens
    x = a->fused;
    for (int i = first_h; i < c->depth; i++) {
        block_forward(&a->block[i], a, w, i, x, NULL, c, threads, B, T);
        x = a->block[i].out;
        if (ids) align_forward(a, w, i, c, N);
    }
    // final layer
    linear_forward(a->final_mod, a->cond_silu, w->final_adaln_w, w->final_adaln_b, B, D, 2 * D);
    norm_modulate_forward(a->final_h, a->final_r, x, a->final_mod, a->final_mod + D, 2 * D, B, T, D);
    take_tokens(a->final_patches, a->final_h, B, P, c->cls, T, D);
    linear_forward(a->out_patches, a->final_patches, w->final_w, w->final_b, B * P, D, X);
    unpatchify_forward(a->out, a->out_patches, c, B);
    if (!c->cls) return;
    take_tokens(a->final_cls, a->final_h, B, 1, 0, T, D);
    linear_forward(a->cls_out, a->final_cls, w->final_cls_w, w->final_cls_b, B, D, Z);
}

// Gradients of all parameters, added to model->grads, from those of the outputs (a->d_out, a->d_cls_out,
// d_zs), after a training network_forward with the same arguments. E, block Lf's output, has three readers:
// the projector, the sparse path and the fusion; their gradients meet in a->d_E.
static void network_backward(Model *model, const int *y, const int *ids, int path_drop, size_t B) {
    const Config *c = &model->c;
    const Params *w = &model->w;
    Params *dw = &model->dw;
    Acts *a = &model->a;
    size_t T = tokens_of(c), P = patches_of(c), D = c->hidden_size, Z = c->z_dim, X = patch_dim_of(c),
           N = B * T;
    size_t Tb = kept_of(c), bytes = sizeof(real) * N * D;
    int first_h = c->depth - c->num_h, threads = model->threads;
    memset(a->d_cond_silu, 0, sizeof(real) * B * D);
    memset(a->d_v1, 0, bytes);
    memset(a->dx, 0, bytes);
    // final layer: out = linear(final_h[patches]), cls_out = linear_cls(final_h[CLS])
    unpatchify_backward(a->out_patches, a->d_out, c, B);   // out_patches becomes its own gradient
    linear_backward(a->wide, dw->final_w, dw->final_b, a->out_patches, a->final_patches, w->final_w, B * P, D,
                    X, 0);
    put_tokens(a->wide2, a->wide, B, P, c->cls, T, D);
    if (c->cls) {
        linear_backward(a->wide, dw->final_cls_w, dw->final_cls_b, a->d_cls_out, a->final_cls, w->final_cls_w,
                        B, D, Z, 0);
        put_tokens(a->wide2, a->wide, B, 1, 0, T, D);
    }
    const real *last = c->num_h ? a->block[c->depth - 1].out : a->fused;
    norm_modulate_backward(a->dx, a->d_mod, a->d_mod + D, a->wide2, last, a->final_r, a->final_mod + D, 2 * D,
                           B, T, D);
    linear_backward(a->d_cond_silu, dw->final_adaln_w, dw->final_adaln_b, a->d_mod, a->cond_silu,
                    w->final_adaln_w, B, D, 2 * D, 1);
    // decoder h
    for (int i = c->depth - 1; i >= first_h; i--) {
        align_backward(a->dx, dw, a, w, i, c, N);
        block_backward(a->dx, dw, a, w, i, NULL, c, threads, B, T);
    }
    // fused = fusion_proj([E, G]), G = mask_token where g has no token
    linear_backward(a->wide, dw->fusion_w, dw->fusion_b, a->dx, a->pair, w->fusion_w, N, 2 * D, D, 0);
    copy_rows(a->d_E, D, a->wide, 2 * D, N, D);
    // kept tokens pass theirs to g; what is left is the mask's
    real *dG = a->wide + D;   // in rows of 2D
    size_t kept = path_drop ? 0 : B * Tb;
    int end = end_of_g(c, 1, path_drop);
    if (path_drop && end > c->num_f) memset(a->d_kept, 0, sizeof(real) * B * Tb * D);
    if (!path_drop) gather_rows(a->d_kept, D, dG, 2 * D, ids, B, Tb, T, D);
#pragma omp parallel for
    for (size_t i = 0; i < kept; i++) memset(dG + (i / Tb * T + (size_t)ids[i]) * 2 * D, 0, sizeof(real) * D);
    column_sums(dw->mask_token, dG, 2 * D, N, D);
    // sparse middle g, on a path-drop step with no gradient but alignment's
    for (int i = end - 1; i >= c->num_f; i--) {
        align_backward(a->d_kept, dw, a, w, i, c, B * Tb);
        block_backward(a->d_kept, dw, a, w, i, ids, c, threads, B, Tb);
    }
#pragma omp parallel for
    for (size_t i = 0; i < (end > c->num_f ? B * Tb : kept); i++)
        for (size_t j = 0; j < D; j++) a->d_E[(i / Tb * T + (size_t)ids[i]) * D + j] += a->d_kept[i * D + j];
    // encoder f
    for (int i = c->num_f - 1; i >= 0; i--) {
        align_backward(a->d_E, dw, a, w, i, c, N);
        block_backward(a->d_E, dw, a, w, i, NULL, c, threads, B, T);
    }
    // tokens
    take_tokens(a->wide, a->d_E, B, P, c->cls, T, D);
    linear_backward(NULL, dw->x_w, dw->x_b, a->wide, a->patches, w->x_w, B * P, X, D, 0);
    if (c->cls) {
        take_tokens(a->wide, a->d_E, B, 1, 0, T, D);
        rmsnorm_backward(a->wide2, dw->cls_norm, a->wide, a->cls_proj, a->cls_r, w->cls_norm, B, D);
        linear_backward(NULL, dw->cls_w, dw->cls_b, a->wide2, a->cls_t, w->cls_w, B, Z, D, 0);
    }
    condition_backward(dw, a, w, y, c, B);
}

// ----------------------------------------------------------------------------------------------------------
// The loss, over the outputs of the network and the batch:
//
//   L = mean (out - v)^2 + cls_coeff mean (cls_out - v_cls)^2 + align_coeff L_align + cfm_coeff L_cfm
//   v = noise - x,   L_cfm = - mean (out - v[b-1])^2,   L_align = - mean_depths mean_{b,t} cos(feats, zs)
//
// Means run over the whole batch, and t over the tokens of the aligned block. Each function adds up its
// sample's terms in `sum`, without dividing, and writes the gradients; `share` is what one term counts in
// the mean: 1 / (whole * numbers of a sample), whole the samples of the whole batch, and in L_align 1 /
// (whole Tb depths).

// dout = 2 (out - v) share - cfm_coeff 2 (out - v_before) share; v, v_before [C,S,S] of the sample and of the
// one before it in the whole batch
static void velocity_loss(Losses *sum, real *dout, const real *out, const real *v, const real *v_before,
                          double cfm, double whole, size_t latent) {
    for (size_t i = 0; i < latent; i++) {
        real d = out[i] - v[i], d_before = out[i] - v_before[i];
        sum->denoise += (double)d * d;
        sum->cfm -= (double)d_before * d_before;
        dout[i] = (real)((2 * d - cfm * 2 * d_before) / (whole * (double)latent));
    }
}
// dout = cls_coeff 2 (out - v) share
static void cls_loss(Losses *sum, real *dout, const real *out, const real *cls, const real *noise,
                     double coeff, double whole, size_t Z) {
    for (size_t i = 0; i < Z; i++) {
        real d = out[i] - (noise[i] - cls[i]);
        sum->cls += (double)d * d;
        dout[i] = (real)(coeff * 2 * d / (whole * (double)Z));
    }
}
// dz = - align_coeff share (f^ - cos z^) / |z|, f^ and z^ unit vectors, |z| = max(norm, 1e-12), since z^'s
// own derivative is (1 - z^ z^T) / |z|. z, dz [Tb,Z]; the features [T,Z] are those of the tokens ids (NULL:
// all). The sum is divided by whole T later, so that a term is added T / (Tb depths) times.
static void align_loss(Losses *sum, real *dz, const real *z, const real *feats, const int *ids, double coeff,
                       double whole, size_t depths, size_t Tb, size_t T, size_t Z) {
    double weight = (double)T / (double)(Tb * depths);
    for (size_t t = 0; t < Tb; t++, z += Z, dz += Z) {
        const real *f = feats + token_of(ids, 0, t, Tb) * Z;
        double f_norm = sqrt((double)dot(f, f, Z)), z_norm = sqrt((double)dot(z, z, Z));
        f_norm = f_norm > 1e-12 ? f_norm : 1e-12;
        z_norm = z_norm > 1e-12 ? z_norm : 1e-12;
        double cosine = (double)dot(f, z, Z) / (f_norm * z_norm),
               k = -coeff / (whole * (double)(Tb * depths) * z_norm);
        sum->align -= cosine * weight;
        for (size_t i = 0; i < Z; i++) dz[i] = (real)(k * (f[i] / f_norm - cosine * z[i] / z_norm));
    }
}

// The losses, and their gradients by the network's outputs: d_out, d_cls_out and each aligned depth's d_zs
static void loss_and_gradients(Model *model, const Batch *batch) {
    const Config *c = &model->c;
    Acts *a = &model->a;
    size_t latent = latent_of(c), Z = c->z_dim, T = tokens_of(c), Tk = kept_of(c), B = batch->B;
    double whole = batch->whole, cfm = c->cfm ? c->cfm_coeff : 0;
#pragma omp parallel for
    for (size_t b = 0; b < B; b++) {
        Losses *one = &a->sample_losses[b];
        const real *v = a->v + b * latent, *v_before = b ? v - latent : batch->v_before;
        memset(one, 0, sizeof(*one));
        velocity_loss(one, a->d_out + b * latent, a->out + b * latent, v, v_before, cfm, whole, latent);
        if (c->cls)
            cls_loss(one, a->d_cls_out + b * Z, a->cls_out + b * Z, batch->cls + b * Z,
                     batch->noise_cls + b * Z, c->cls_coeff, whole, Z);
        for (int k = 0; align_depth(c, k); k++) {
            int sparse = is_sparse(c, align_depth(c, k) - 1);
            size_t n = sparse ? Tk : T;
            align_loss(one, a->align[k].d_zs + b * n * Z, a->align[k].zs + b * n * Z,
                       batch->feats + b * T * Z, sparse ? batch->ids + b * Tk : NULL, c->align_coeff, whole,
                       (size_t)align_count(c), n, T, Z);
        }
    }
    Losses *sum = &model->losses;
    for (size_t b = 0; b < B; b++) {   // in the order of the samples: the same bits for any number of threads
        const Losses *one = &a->sample_losses[b];
        sum->denoise += one->denoise / (whole * (double)latent);
        sum->cfm += one->cfm / (whole * (double)latent);
        sum->cls += one->cls / (whole * (double)Z);
        sum->align += one->align / (whole * (double)T);
    }
    sum->total = sum->denoise + c->cls_coeff * sum->cls + c->align_coeff * sum->align + cfm * sum->cfm;
}

// Before the first part of a step
static void zero_gradients(Model *m) { memset(m->grads, 0, m->table.total * sizeof(real)); }

// One part of a step's batch: noised, forward, losses, and backward. Gradients and losses are added to
// those of the parts before.
static void forward_backward(Model *model, const Batch *batch) {
    const Config *c = &model->c;
    Acts *a = &model->a;
    size_t latent = latent_of(c), Z = c->z_dim, B = batch->B;
    for (size_t b = 0; b < B; b++) {   // x_t = (1 - t) x + t noise, v = noise - x, and CLS alike
        real t = batch->t[b];
        for (size_t i = b * latent; i < (b + 1) * latent; i++) {
            a->x_t[i] = (1 - t) * batch->x[i] + t * batch->noise[i];
            a->v[i] = batch->noise[i] - batch->x[i];
        }
        for (size_t i = b * Z; i < (b + 1) * Z && c->cls; i++)
            a->cls_t[i] = (1 - t) * batch->cls[i] + t * batch->noise_cls[i];
    }
    network_forward(model, &model->w, batch->t, batch->y, batch->ids, batch->path_drop, B);
    loss_and_gradients(model, batch);
    network_backward(model, batch->y, batch->ids, batch->path_drop, B);
}

// Velocities v [B,C,S,S], v_cls [B,Z] at x, cls, t, y on all tokens: what the sampler asks for, max_batch at
// a time.
static void velocity(Model *model, real *v, real *v_cls, const real *x, const real *cls, const real *t,
                     const int *y, int use_ema, int path_drop, int B) {
    size_t latent = latent_of(&model->c), Z = model->c.z_dim;
    for (int b = 0; b < B; b += model->max_batch) {
        size_t at = b, n = imin(model->max_batch, B - b);
        memcpy(model->a.x_t, x + at * latent, n * latent * sizeof(real));
        if (model->c.cls) memcpy(model->a.cls_t, cls + at * Z, n * Z * sizeof(real));
        network_forward(model, use_ema ? &model->w_ema : &model->w, t + at, y + at, NULL, path_drop, n);
        memcpy(v + at * latent, model->a.out, n * latent * sizeof(real));
        if (model->c.cls) memcpy(v_cls + at * Z, model->a.cls_out, n * Z * sizeof(real));
    }
}

// ----------------------------------------------------------------------------------------------------------
// Optimizer

// Constants of step `step` (from 1): AdamW with bias correction and decoupled weight decay, and the EMA
typedef struct {
    double b1, b2, eps, rate, root, decay, ema, max_norm;
} AdamW;
static AdamW adamw_of(const Config *c, int step) {
    AdamW o;
    double warm = (1.0 + step) / (10.0 + step);
    o.b1 = c->beta1;
    o.b2 = c->beta2;
    o.eps = c->eps;
    o.rate = c->lr / (1 - pow(c->beta1, step));   // m^ = m / (1 - b1^step)
    o.root = 1 / sqrt(1 - pow(c->beta2, step));   // sqrt(v^) = sqrt(v) root
    o.decay = 1 - c->lr * c->weight_decay;
    o.ema = c->ema ? c->ema_decay : 0;
    if (c->ema_warmup && warm < o.ema) o.ema = warm;
    o.max_norm = c->max_grad_norm;
    return o;
}

// |gradient|_2 over all trained tensors, summed in an order that does not depend on the number of threads
static double gradient_norm(Model *model) {
    size_t n = model->table.trained, chunks = (n + NORM_CHUNK - 1) / NORM_CHUNK;
    double *parts = model->a.norm_parts, sum = 0;
#pragma omp parallel for
    for (size_t k = 0; k < chunks; k++) {
        parts[k] = 0;
        for (size_t i = k * NORM_CHUNK; i < n && i < (k + 1) * NORM_CHUNK; i++)
            parts[k] += (double)model->grads[i] * model->grads[i];
    }
    for (size_t k = 0; k < chunks; k++) sum += parts[k];
    return sqrt(sum);
}

// AdamW and the moving average for the trained numbers begin ... end, g being the gradient after clipping:
//   m = b1 m + (1 - b1) g,   m^ = m / (1 - b1^step),   v = b2 v + (1 - b2) g^2,   v^ = v / (1 - b2^step),
//   p = (1 - lr weight_decay) p - lr m^ / (sqrt(v^) + eps),   ema = e ema + (1 - e) p
static void adamw_update(Model *model, const AdamW *o, real scale, size_t begin, size_t end) {
    real b1 = (real)o->b1, b2 = (real)o->b2, one1 = (real)(1 - o->b1), one2 = (real)(1 - o->b2);
    real rate = (real)o->rate, root = (real)o->root, eps = (real)o->eps, decay = (real)o->decay;
    real e = (real)o->ema, one_e = (real)(1 - o->ema);
#pragma omp parallel for
    for (size_t i = begin; i < end; i++) {
        real g = model->grads[i] * scale, p = model->params[i] * decay;
        real m = model->m[i] = b1 * model->m[i] + one1 * g, v = model->v[i] = b2 * model->v[i] + one2 * g * g;
        model->params[i] = p -= rate * m / ((real)sqrt(v) * root + eps);
        model->ema[i] = e * model->ema[i] + one_e * p;
    }
}

// Muon (Keller Jordan, 2024): of the matrix G that momentum makes of a weight's gradients, with the singular
// value decomposition G = U S V^T, the step is U V^T, all of whose singular values are 1, so that no
// direction is too small to be learned. No decomposition is needed: an odd polynomial of a matrix acts on its
// singular values alone, since with X = U S V^T
//   a X + b (X X^T) X + c (X X^T)^2 X = U (a S + b S^3 + c S^5) V^T,
// and where s -> a s + b s^3 + c s^5 has a slope a > 1 at 0 and carries a band around 1 into itself, a small
// s grows nearly a-fold each time until it is in the band: five times do for all above 1 / a^5, some 0.002
// (Newton-Schulz; dev/pictures/muon.png). Divided by its Frobenius norm, G has no s above 1.
static const double muon_classic[3] = {3.4445, -4.7750, 2.0315};   // the band is 0.68 ... 1.21

// X[m,n] <- its polynomial, five times, m <= n (a tall matrix comes transposed: the polynomial's transpose
// is that of X^T); work [m n + 4 m m]. X, R, P, Q, T, Y are matrices here. Where n is well above m most
// products are made small, by way of R = X X^T alone (the Gram form): P is symmetric, as R is, so X <- P X
// makes R <- P R P, and several steps are one product Q X, Q being that of all their P: 4 m^2 n + 34 m^3
// FLOP in place of 20 m^2 n + 10 m^3, fewer from n = 1.5 m on. But R has the squares of the singular
// values, and small ones are lost in its rounding. In float that is no more than the plain form loses. In
// bf16 (on the GPU, in its float build, too) X and R have to be made anew before the third and the fourth
// step (dev/README.md): 12 m^2 n + 22 m^3.
enum { ANEW_IN_FLOAT = 1 << 0, ANEW_IN_BF16 = 1 << 0 | 1 << 2 | 1 << 3 };   // bits: the steps
static int gram_begins(size_t m, size_t n, int anew, int step) { return 2 * n <= 3 * m || anew >> step & 1; }
static int gram_ends(size_t m, size_t n, int anew, int step) {
    return step == 4 || gram_begins(m, n, anew, step + 1);
}
static void newton_schulz(real *X, real *work, const double poly[3], size_t m, size_t n) {
    int anew = ANEW_IN_FLOAT;
#ifdef TEST_CUDA
    if (matmul_rounds) anew = ANEW_IN_BF16;
#endif
    real *R = work, *P = R + m * m, *Q = P + m * m, *T = Q + m * m, *Y = T + m * m;
    for (int k = 0; k < 5; k++) {
        int begins = gram_begins(m, n, anew, k);
        if (begins) matmul(R, X, X, NULL, m, m, n, 0, 1, 0);
        matmul(P, R, R, NULL, m, m, m, 0, 0, 0);
        for (size_t i = 0; i < m * m; i++)   // P = a I + b R + c R^2
            P[i] = (real)poly[1] * R[i] + (real)poly[2] * P[i] + (i % (m + 1) ? 0 : (real)poly[0]);
        if (!begins) matmul(T, P, Q, NULL, m, m, m, 0, 0, 0);
        memcpy(Q, begins ? P : T, sizeof(real) * m * m);
        if (gram_ends(m, n, anew, k)) {
            matmul(Y, Q, X, NULL, m, n, m, 0, 0, 0);
            memcpy(X, Y, sizeof(real) * m * n);
            continue;
        }
        matmul(T, P, R, NULL, m, m, m, 0, 0, 0);
        matmul(R, T, P, NULL, m, m, m, 0, 0, 0);
    }
}
// Muon's step and the moving average for a tensor's k-th matrix; q, k and v, where apart, are three of one:
//   buffer = mu buffer + (1 - mu) g,  G = mu buffer + (1 - mu) g (Nesterov's momentum),  X of G / |G|,
//   p = p (1 - lr decay) - lr max(1, fan_out / fan_in)^1/2 X
// fan_out and fan_in are the tensor's last two sizes, as Muon's author has it: p and p of a patch embedding
// [D,C,p,p], although its matrix is D x C p p.
static void muon_matrix(Model *model, const AdamW *o, real scale, const Tensor *t, int k, real *work) {
    const Config *c = &model->c;
    size_t count = t->size / (size_t)t->muon_parts, at = t->offset + (size_t)k * count;
    size_t rows = (size_t)(t->shape[0] / t->muon_parts), cols = count / rows;
    size_t m = rows < cols ? rows : cols, n = rows < cols ? cols : rows;
    double fans = (double)t->shape[t->ndim - 2] / t->muon_parts / t->shape[t->ndim - 1];
    real *buffer = model->m + at;   // the momentum lies where AdamW has its first moment
    real *G = work, *X = rows > cols ? G + count : G, *more = G + 2 * count;
    real *p = model->params + at, *ema = model->ema + at;
    real mu = (real)c->muon_momentum, one_mu = (real)(1 - c->muon_momentum);
    double sum = 0;
    for (size_t i = 0; i < count; i++) {
        real g = model->grads[at + i] * scale;
        buffer[i] = mu * buffer[i] + one_mu * g;
        G[i] = mu * buffer[i] + one_mu * g;
        sum += (double)G[i] * G[i];
    }
    real inverse = (real)(1 / (sqrt(sum) + 1e-7));
    for (size_t i = 0; i < count; i++) G[i] *= inverse;
    if (rows > cols) transpose(X, (long)rows, G, (long)cols, (int)rows, (int)cols);
    newton_schulz(X, more, muon_classic, m, n);
    if (rows > cols) transpose(G, (long)cols, X, (long)rows, (int)cols, (int)rows);
    real rate = (real)(c->muon_lr * sqrt(fmax(1, fans))),
         decay = (real)(1 - c->muon_lr * c->muon_weight_decay);
    real e = (real)o->ema, one_e = (real)(1 - o->ema);
    for (size_t i = 0; i < count; i++) {
        p[i] = p[i] * decay - rate * G[i];
        ema[i] = e * ema[i] + one_e * p[i];
    }
}

// Clipping to a global norm, then each tensor's optimizer and the moving average. A step whose loss or
// gradient is not finite changes nothing, and nor does any later one, so that the state stays that of the
// last good step.
static void update(Model *model, int step) {
    Losses *losses = &model->losses;
    const Table *table = &model->table;
    AdamW o = adamw_of(&model->c, step);
    double norm = losses->grad_norm = gradient_norm(model), clip = o.max_norm / (norm + 1e-6);
    if (!losses->bad_step) {
        losses->bad_part =
            bad_part_of(losses->denoise, losses->cls, losses->align, losses->cfm, losses->grad_norm);
        losses->bad_step = losses->bad_part == NO_PART ? 0 : step;
    }
    if (losses->bad_step) return;
    real scale = (real)(clip < 1 ? clip : 1);
    size_t done = 0;   // AdamW takes all that lies between two of Muon's tensors at once
    for (int i = 0; i < table->count; i++) {
        const Tensor *t = &table->tensors[i];
        if (!t->muon_parts) continue;
        adamw_update(model, &o, scale, done, t->offset);
        done = t->offset + t->size;
    }
    adamw_update(model, &o, scale, done, table->trained);
    for (int i = 0; i < table->count; i++) {
        const Tensor *t = &table->tensors[i];
        for (int k = 0; by_all_threads(t) && k < t->muon_parts; k++)
            muon_matrix(model, &o, scale, t, k, model->a.muon_work);
    }
    // The products of smaller ones are not worth waiting for: each thread takes whole matrices.
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(model->threads)
    for (int i = 0; i < table->count; i++)
        for (int k = 0; k < OF_MUON_QKV; k++)
            if (k < table->tensors[i].muon_parts && !by_all_threads(&table->tensors[i]))
                muon_matrix(model, &o, scale, &table->tensors[i], k,
                            thread_work(model->a.muon_work, model->a.muon_room));
}

// The losses summed since the last call, and a fresh start
static Losses read_losses(Model *model) {
    Losses sum = model->losses;
    memset(&model->losses, 0, sizeof(Losses));
    model->losses.bad_step = sum.bad_step, model->losses.bad_part = sum.bad_part;
    return sum;
}

// ----------------------------------------------------------------------------------------------------------
// What a trainer offers to the sampler, the training loop and the tests. train_srdit.cu offers the same on a
// GPU; its model begins with a Model, whose configuration and table are read here.

enum Block { PARAMS, GRADS, ADAM_M, ADAM_V, EMA };   // a model's arrays, each of all tensors
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
    const real *(*host_block)(Model *, enum Block, real *room);   // the block itself, or copied to room
    void (*put_block)(Model *, const real *, enum Block);
    const real *(*activation)(Model *, const char *name);
    // only a GPU's, else NULL
    void (*begin)(Model *, int no_graph, int profile);   // before a training
    void (*end)(Model *);                                // after it: says what --profile found
    double (*peak)(void);                                // FLOP/s of its matrix products; 0: unknown
    void (*gather_ema)(Model *);                         // of several ranks, before one of them samples
    // Its input buffer i, 0 or 1, as a batch to be loaded to; NULL: it cannot convert what the data stores
    Batch *(*batch_in)(Model *, const Data *, int i);
    void (*batch_wait)(Model *, int i);   // until buffer i may be loaded to again
} Backend;

static real *model_block(Model *m, enum Block which) {
    real *blocks[] = {m->params, m->grads, m->m, m->v, m->ema};
    return blocks[which];
}
static void get_block(real *host, Model *m, enum Block which) {
    memcpy(host, model_block(m, which), m->table.total * sizeof(real));
}
static const real *host_block(Model *m, enum Block which, real *room) {
    (void)room;
    return model_block(m, which);
}
static void put_block(Model *m, const real *host, enum Block which) {
    memcpy(model_block(m, which), host, m->table.total * sizeof(real));
}

// The activations that can be asked for by name, those of reference files
typedef struct {
    char name[24];
    size_t size;
    int sparse;
} ActivationName;   // size: numbers a sample
typedef struct {
    ActivationName of[MAX_DEPTH + MAX_SERIES + 6];
    int count;
} ActivationNames;
static void name_add(ActivationNames *names, const char *name, int block, size_t size, int sparse) {
    ActivationName *one = &names->of[names->count++];
    if (block < 0) snprintf(one->name, sizeof(one->name), "%s", name);
    else snprintf(one->name, sizeof(one->name), "%s.%d", name, block);
    one->size = size;
    one->sparse = sparse;
}
static ActivationNames activation_names(const Config *c) {   // in the order of the computation
    ActivationNames names;
    size_t T = tokens_of(c), Tk = kept_of(c), D = c->hidden_size, Z = c->z_dim;
    names.count = 0;
    name_add(&names, "embed", -1, T * D, 0);
    name_add(&names, "cond", -1, D, 0);
    for (int i = 0; i <= c->depth; i++) {
        for (int k = 0; align_depth(c, k); k++) {   // zs, or zs.2 and so on
            int sparse = is_sparse(c, i - 1);
            if (align_depth(c, k) == i)
                name_add(&names, "zs", c->align_depths.count ? i : -1, (sparse ? Tk : T) * Z, sparse);
        }
        if (i == c->depth - c->num_h) name_add(&names, "fused", -1, T * D, 0);
        if (i < c->depth) name_add(&names, "block", i, (is_sparse(c, i) ? Tk : T) * D, is_sparse(c, i));
    }
    name_add(&names, "out", -1, latent_of(c), 0);
    if (c->cls) name_add(&names, "cls_out", -1, Z, 0);
    return names;
}
static const real *activation(Model *m, const char *name) {   // of the last forward
    const Acts *a = &m->a;
    int i;
    if (sscanf(name, "block.%d", &i) == 1) return a->block[i].out;
    for (int k = 0; sscanf(name, "zs.%d", &i) == 1 && align_depth(&m->c, k); k++)
        if (align_depth(&m->c, k) == i) return a->align[k].zs;
    return !strcmp(name, "embed")   ? a->embed
           : !strcmp(name, "cond")  ? a->cond
           : !strcmp(name, "fused") ? a->fused
           : !strcmp(name, "zs")    ? a->align[0].zs
           : !strcmp(name, "out")   ? a->out
                                    : a->cls_out;
}

static const Backend cpu_backend = {"CPU",     model_create, model_destroy, zero_gradients, forward_backward,
                                    update,    read_losses,  velocity,      get_block,      host_block,
                                    put_block, activation,   NULL,          NULL,           NULL,
                                    NULL,      NULL,         NULL};

static int all_finite(const real *x, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (!(fabs((double)x[i]) < INFINITY)) return 0;
    return 1;
}

// The first tensor, in the order of the computation, that holds a number that is not finite; "" if there is
// none. It follows a forward_backward on the batch.
static void find_bad(char name[96], const Backend *backend, Model *m, const Batch *batch) {
    const Config *c = &m->c;
    size_t B = batch->B, T = tokens_of(c), Z = c->z_dim;
    ActivationNames names = activation_names(c);
    real *host = (real *)alloc_zero(m->table.total, sizeof(real));   // the program is about to end
    name[0] = 0;
    if (!all_finite(batch->x, B * (size_t)latent_of(c))) snprintf(name, 96, "latents of the data");
    else if (c->cls && !all_finite(batch->cls, B * Z)) snprintf(name, 96, "cls of the data");
    else if (c->align && !all_finite(batch->feats, B * T * Z)) snprintf(name, 96, "feats of the data");
    for (int turn = 0; turn < 2; turn++) {
        backend->get_block(host, m, turn ? GRADS : PARAMS);
        for (int i = 0; i < m->table.count && !name[0]; i++) {
            const Tensor *t = &m->table.tensors[i];
            if (!all_finite(host + t->offset, t->size))
                snprintf(name, 96, "%s%s", turn ? "gradient of " : "parameter ", t->name);
        }
        for (int i = 0; i < names.count && !name[0] && !turn; i++) {
            const ActivationName *one = &names.of[i];
            if (one->sparse && batch->path_drop) continue;
            if (!all_finite(backend->activation(m, one->name), one->size * B))
                snprintf(name, 96, "activation %s", one->name);
        }
    }
    free(host);
}

// ----------------------------------------------------------------------------------------------------------
// Draws: what is random in a training step, addressed by (seed, stream, step, sample)

static Batch *batch_create(const Config *c, int B) {
    Batch *batch = (Batch *)alloc_zero(1, sizeof(Batch));
    size_t n = B, latent = latent_of(c), Z = c->z_dim, T = tokens_of(c);
    batch->B = batch->whole = B;
    batch->x = (real *)alloc_zero(n * latent, sizeof(real));
    batch->noise = (real *)alloc_zero(n * latent, sizeof(real));
    batch->v_before = (real *)alloc_zero(latent, sizeof(real));
    batch->noise_before = (real *)alloc_zero(latent, sizeof(real));
    batch->cls = (real *)alloc_zero(n * Z, sizeof(real));
    batch->noise_cls = (real *)alloc_zero(n * Z, sizeof(real));
    batch->t = (real *)alloc_zero(n, sizeof(real));
    batch->y = (int *)alloc_zero(n, sizeof(int));
    batch->ids = (int *)alloc_zero(n * T, sizeof(int));
    batch->feats = (real *)alloc_zero(n * T * Z, sizeof(real));
    batch->keys = (uint64_t *)alloc_zero(n * T, sizeof(uint64_t));
    return batch;
}
static void batch_free(Batch *b) {
    if (b->stored) {   // in memory of others
        free(b);
        return;
    }
    free(b->x), free(b->noise), free(b->v_before), free(b->noise_before), free(b->cls), free(b->noise_cls);
    free(b->t), free(b->y), free(b->ids), free(b->feats), free(b->keys), free(b);
}

// A uniformly random set of k of T tokens, in rising order: those with the k smallest of T random keys. A key
// ends in its token's number, so that no two are equal. scratch [T]
static uint64_t route_key(size_t token, uint64_t seed, uint32_t step, uint32_t sample) {
    return (uint64_t)draw4(seed, STREAM_ROUTE, step, sample, (uint32_t)token / 4).v[token % 4] << 32 | token;
}
static void draw_kept(int *ids, size_t k, size_t T, uint64_t *scratch, uint64_t seed, uint32_t step,
                      uint32_t sample) {
    for (size_t i = 0; i < T; i++) scratch[i] = route_key(i, seed, step, sample);
    uint64_t last = kth_smallest(scratch, (long)T, (long)k - 1);
    for (size_t i = 0; i < T; i++)
        if (route_key(i, seed, step, sample) <= last) *ids++ = (int)i;
}

// The noise of a sample: standard normals at its address. Immiscible noise (the idea: arXiv 2406.12303, which
// assigns a batch's noises; this choice for each sample: 2505.18521): of so many candidates, each at an
// address of its own, the nearest to the latent x [latent] in L2, so that paths of different samples cross
// less. The first candidate is what would be the noise without. No candidate is kept: the nearest is drawn
// again.
HOST_DEVICE static uint32_t noise_stream(int candidate) {
    return candidate ? (uint32_t)STREAM_CANDIDATE + (uint32_t)candidate - 1 : (uint32_t)STREAM_NOISE;
}
static double square_distance(const real *a, const real *b, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
    return sum;
}
static void draw_noise(real *noise, const real *x, const Config *c, uint64_t seed, uint32_t step,
                       uint32_t sample) {
    size_t latent = latent_of(c);
    double least = INFINITY;
    int nearest = 0;
    for (int k = 0; k < c->immiscible && c->immiscible > 1; k++) {
        fill_normal(noise, latent, seed, noise_stream(k), step, sample);
        double far = square_distance(noise, x, latent);
        if (far < least) least = far, nearest = k;
    }
    fill_normal(noise, latent, seed, noise_stream(nearest), step, sample);
}

// Sample b of a micro-batch: its data, and the draws at its address
static void sample_load(Batch *batch, size_t b, const Data *d, size_t at, uint32_t sample, const Config *c) {
    size_t latent = latent_of(c), Z = c->z_dim, T = tokens_of(c), Tk = kept_of(c);
    uint64_t seed = batch->seed;
    uint32_t step = (uint32_t)batch->step;
    real *cls = c->cls ? batch->cls + b * Z : NULL;
    if (batch->stored) {
        size_t of_x = (size_t)dtypes[batch->x_type].bytes, of_feats = (size_t)dtypes[batch->feats_type].bytes;
        char *x = (char *)batch->x_stored + (1 + b) * latent * of_x;
        char *feats = c->align ? (char *)batch->feats_stored + b * T * Z * of_feats : NULL;
        data_stored(d, at, x, &batch->y[b], cls, feats, !c->cls);
    } else
        data_sample(d, at, batch->x + b * latent, &batch->y[b], cls,
                    c->align ? batch->feats + b * T * Z : NULL, !c->cls);
    batch->t[b] = (real)shift_time(c, uniform(seed, STREAM_TIME, step, sample));
    if (c->label_dropout && uniform(seed, STREAM_LABEL_DROP, step, sample) < c->class_dropout_prob)
        batch->y[b] = c->num_classes;
    if (batch->on_device) return;   // a GPU draws what follows by itself
    draw_noise(batch->noise + b * latent, batch->x + b * latent, c, seed, step, sample);
    if (c->cls) fill_normal(batch->noise_cls + b * Z, Z, seed, STREAM_NOISE_CLS, step, sample);
    if (c->routing) draw_kept(batch->ids + b * Tk, Tk, T, batch->keys + b * T, seed, step, sample);
    else
        for (size_t i = 0; i < T; i++) batch->ids[b * T + i] = (int)i;
}

// Which of the n samples of the data is sample first + b of a step (from 0): every pass over the data has
// an order of its own
static size_t sample_at(int b, int first, int whole, int step, uint32_t n, uint64_t seed) {
    uint64_t position = (uint64_t)step * (uint64_t)whole + (uint64_t)((first + b + whole) % whole);
    return permuted((uint32_t)(position % n), n, seed, STREAM_ORDER, (uint32_t)(position / n));
}
// The data and the draws of samples first ... first+B of a step (from 0) whose batch has `whole` samples
static void batch_load(Batch *batch, const Data *d, const Config *c, uint64_t seed, int step, int first,
                       int whole) {
    size_t latent = latent_of(c);
    uint32_t n = (uint32_t)d->count;
    batch->first = first;
    batch->whole = whole;
    batch->seed = seed;
    batch->step = step;
    batch->path_drop = c->path_drop && uniform(seed, STREAM_PATH_DROP, (uint32_t)step, 0) < c->path_drop_prob;
#pragma omp parallel for
    for (int b = -1; b < batch->B; b++) {   // -1: the sample before the first, for the contrastive pair
        uint32_t sample = (uint32_t)((first + b + whole) % whole);
        size_t at = sample_at(b, first, whole, step, n, seed);
        if (b >= 0) {
            sample_load(batch, (size_t)b, d, at, sample, c);
            continue;
        }
        if (batch->stored) {
            data_stored(d, at, batch->x_stored, NULL, NULL, NULL, 0);
            continue;
        }
        data_sample(d, at, batch->v_before, NULL, NULL, NULL, 0);
        if (!batch->on_device)
            draw_noise(batch->noise_before, batch->v_before, c, seed, (uint32_t)step, sample);
        for (size_t i = 0; i < latent; i++) batch->v_before[i] = batch->noise_before[i] - batch->v_before[i];
    }
}

// The batches of a training, part by part and step by step. With two buffers a thread of its own reads one
// while the other is computed on: it reads files and writes to memory, and never calls a GPU.
typedef struct {
    const Data *data;
    const Config *c;
    uint64_t seed;
    int parts, whole, threads;   // parts a step (of this rank); samples a step; of OpenMP, 0: its choice
    Batch *batch[2];             // [1] NULL: nothing is read ahead
    long next, end;              // parts, counted through all steps: the next that loader_next gives, the end
    long asked, ready;           // ends of what may be read, and of what has been: under the lock
    int stop, started;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
} Loader;

static void loader_read(Loader *l, long part) {
    Batch *b = l->batch[l->batch[1] ? part % 2 : 0];
    int of_step = (int)(part % l->parts);   // of several ranks each takes as many neighbouring samples
    b->last = ranks.size > 1 && of_step == l->parts - 1;
    batch_load(b, l->data, l->c, l->seed, (int)(part / l->parts), (ranks.rank * l->parts + of_step) * b->B,
               l->whole);
}
static void *loader_thread(void *loader) {
    Loader *l = (Loader *)loader;
    if (l->threads) omp_set_num_threads(l->threads);   // what a thread starts with is not what main set
    pthread_mutex_lock(&l->lock);
    for (;;) {
        while (!l->stop && l->ready == l->asked) pthread_cond_wait(&l->changed, &l->lock);
        if (l->stop) break;
        long part = l->ready;
        pthread_mutex_unlock(&l->lock);
        loader_read(l, part);
        pthread_mutex_lock(&l->lock);
        l->ready++;
        pthread_cond_signal(&l->changed);
    }
    pthread_mutex_unlock(&l->lock);
    return NULL;
}
// From now on the next part may be read: the buffer that it goes to is free.
static void loader_ask(Loader *l) {
    if (!l->started || l->asked == l->end) return;
    pthread_mutex_lock(&l->lock);
    l->asked++;
    pthread_cond_signal(&l->changed);
    pthread_mutex_unlock(&l->lock);
}
// Begins to read ahead, of the parts first ... end
static void loader_start(Loader *l, long first, long end) {
    l->next = l->asked = l->ready = first, l->end = end;
    if (!l->batch[1] || first == end) return;
    pthread_mutex_init(&l->lock, NULL), pthread_cond_init(&l->changed, NULL);
    if (pthread_create(&l->thread, NULL, loader_thread, l))
        die("the thread that reads data cannot be started");
    l->started = 1;
    loader_ask(l);
}
// The next part, waited for; it stays until loader_ask has been called twice more.
static Batch *loader_next(Loader *l) {
    long part = l->next++;
    if (!l->started) loader_read(l, part);
    else {
        pthread_mutex_lock(&l->lock);
        while (l->ready <= part) pthread_cond_wait(&l->changed, &l->lock);
        pthread_mutex_unlock(&l->lock);
    }
    return l->batch[l->batch[1] ? part % 2 : 0];
}
static void loader_stop(Loader *l) {
    if (!l->started) return;
    pthread_mutex_lock(&l->lock);
    l->stop = 1;
    pthread_cond_signal(&l->changed);
    pthread_mutex_unlock(&l->lock);
    pthread_join(l->thread, NULL);
    pthread_mutex_destroy(&l->lock), pthread_cond_destroy(&l->changed);
    l->started = l->stop = 0;
}

// ----------------------------------------------------------------------------------------------------------
// Sampler: from noise at t = 1 to data at t = 0. State in double.

typedef struct {
    int steps;             // N; network evaluations: N, by Heun 2N - 1, where guided up to twice as many
    double cfg, cls_cfg;   // guidance scales, w; cfg <= 1: none; cls_cfg <= 0: CLS unguided
    double low, high;      // guidance only for t in [low, high]
    int path_drop;         // the unconditional branch drops the sparse path
    int use_ema;
    uint64_t seed;
    int first;                     // global index of the first sample: its noise does not depend on the batch
    const double *eps, *cls_eps;   // noises given [N-1,B,C,S,S], [N-1,B,Z] (tests), or NULL: drawn
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
typedef struct {
    real *x, *cls, *t, *v[2], *v_cls[2];
    int *y, *no_class;
} SamplerWork;
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

// x_t = (1 - t) x_0 + t noise and v = noise - x_0 give noise = x_t + (1 - t) v. The network knows its mean
// given x_t; and since x_t given x_0 is normal with deviation t, the gradient of log p_t, the score, is
// minus that mean / t. By Fokker-Planck noise of variance g^2 dt widens p_t as a drift of -(g^2 / 2) score
// would; time runs backwards, so that -(g^2 / 2) score in the drift undoes it: with the reference's g^2 =
// 2t the marginals of dx = (v - t score) dt + sqrt(2t) dW are those of dx = v dt.
//   x += (v - t score) dt + sqrt(2t) sqrt(|dt|) eps;  eps NULL: no noise
static void euler_maruyama_step(double *x, const real *v, const double *eps, size_t n, double t, double dt) {
    for (size_t i = 0; i < n; i++) {
        double score = -((1 - t) * v[i] + x[i]) / t, drift = v[i] - t * score;
        x[i] += drift * dt + (eps ? sqrt(2 * t) * sqrt(fabs(dt)) * eps[i] : 0);
    }
}

// What is called after each step with the state so far; not 0: stop here
typedef int Progress(int step, int steps, const double *x, void *user);

// n samples: x [n,C,S,S] and cls [n,Z] come in as noise and leave as data, N steps later. Returns 0 if
// progress (NULL: none) stopped it.
static int sample_euler_maruyama(double *x, double *cls, const Backend *backend, Model *model,
                                 const Sampling *s, const int *y, int n, Progress *progress, void *user) {
    const Config *c = &model->c;
    size_t latent = (size_t)n * (size_t)latent_of(c), Z = (size_t)n * (size_t)c->z_dim;
    SamplerWork w = sampler_work(c, n);
    double *t = (double *)alloc_zero((size_t)s->steps + 1, sizeof(double));
    double *eps = (double *)alloc_zero(latent, sizeof(double)),
           *cls_eps = (double *)alloc_zero(Z, sizeof(double));
    sampling_times(t, c, s->steps);
    int stopped = 0;
    for (int i = 0; i < s->steps && !stopped; i++) {
        const double *e = eps, *e_cls = cls_eps;
        if (s->eps) e = s->eps + (size_t)i * latent, e_cls = s->cls_eps + (size_t)i * Z;
        else if (i < s->steps - 1) sampler_noise(eps, cls_eps, c, s, i + 1, n);
        guided_velocity(&w, backend, model, s, x, cls, y, t[i], n);
        int last = i == s->steps - 1;   // the last step takes the mean
        euler_maruyama_step(x, w.v[0], last ? NULL : e, latent, t[i], t[i + 1] - t[i]);
        if (c->cls) euler_maruyama_step(cls, w.v_cls[0], last ? NULL : e_cls, Z, t[i], t[i + 1] - t[i]);
        if (progress) stopped = progress(i + 1, s->steps, x, user);
    }
    free(t), free(eps), free(cls_eps), sampler_work_free(&w);
    return !stopped;
}

// The same marginals follow from an ordinary equation, dx/dt = v(x, t): no noise on the way, so few steps are
// enough for a rough picture, and a solver of second order needs fewer still. x and cls are as above. N =
// s->steps intervals, t = 1 - i/N, shifted.
//   Euler   x += v(x, t) dt
//   Heun    x' = x + v(x, t) dt, then x += (v(x, t) + v(x', t + dt)) / 2 dt. Its last interval is Euler's, as
//           in the reference, so N steps are 2N - 1 evaluations (the error still falls with the square of the
//           step, since one interval's error does).
//   AB2     (Adams and Bashforth) the line through v and the v before, u, leads to v in the middle of the
//           interval: x += (v + (v - u) r) dt, r = dt / (2 dt before). The first interval is Euler's.
enum Solver { EULER, HEUN, AB2 };
static int solver_of(const char *sampler) {   // -1: none
    static const char *const names[] = {"euler", "heun", "ab2"};
    for (int i = 0; i < 3; i++)
        if (!strcmp(sampler, names[i])) return i;
    return -1;
}
static int sample_ode(double *x, double *cls, const Backend *backend, Model *model, const Sampling *s,
                      enum Solver solver, const int *y, int n, Progress *progress, void *user) {
    const Config *c = &model->c;
    size_t latent = (size_t)n * (size_t)latent_of(c), Z = c->cls ? (size_t)n * (size_t)c->z_dim : 0;
    SamplerWork w = sampler_work(c, n);
    double *first = (double *)alloc_zero(latent, sizeof(double)),
           *x2 = (double *)alloc_zero(latent, sizeof(double));
    double *first_cls = (double *)alloc_zero(Z, sizeof(double)),
           *cls2 = (double *)alloc_zero(Z, sizeof(double)), dt_before = INFINITY;
    int stopped = 0;
    for (int i = 0; i < s->steps && !stopped; i++) {
        double t = shift_time(c, 1 - (double)i / s->steps),
               next = shift_time(c, 1 - (double)(i + 1) / s->steps), dt = next - t;
        double r = solver == AB2 ? dt / (2 * dt_before) : 0;
        int twice = solver == HEUN && i < s->steps - 1;
        guided_velocity(&w, backend, model, s, x, cls, y, t, n);
        for (size_t k = 0; k < latent; k++) {
            double v = w.v[0][k];
            x2[k] = x[k] + dt * (v + (v - first[k]) * r);
            first[k] = v;
        }
        for (size_t k = 0; k < Z; k++) {
            double v = w.v_cls[0][k];
            cls2[k] = cls[k] + dt * (v + (v - first_cls[k]) * r);
            first_cls[k] = v;
        }
        if (twice) guided_velocity(&w, backend, model, s, x2, cls2, y, next, n);
        for (size_t k = 0; k < latent; k++) x[k] = twice ? x[k] + dt * (first[k] + w.v[0][k]) / 2 : x2[k];
        for (size_t k = 0; k < Z; k++)
            cls[k] = twice ? cls[k] + dt * (first_cls[k] + w.v_cls[0][k]) / 2 : cls2[k];
        dt_before = dt;
        if (progress) stopped = progress(i + 1, s->steps, x, user);
    }
    free(first), free(x2), free(first_cls), free(cls2), sampler_work_free(&w);
    return !stopped;
}

// ----------------------------------------------------------------------------------------------------------
// A run: its data, its options, what it works on

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

typedef struct {
    TextList data;
    const char *model, *recipe, *out, *resume, *export_to, *track;
    char **words;   // the command line, for how to go on
    int word_count;
    int batch, accum, steps, log_every, save_every, sample_every, sample_steps, threads, overwrite;
    int no_graph, profile, reduce_bf16;
    uint64_t seed;
} Run;
#define OPTION(name, field, kind, initial, low, high, help)                                                  \
    { name, kind, offsetof(Run, field), low, high, FREE, help, initial, NULL }
static const Option run_options[] = {
    OPTION("model", model, TEXT, 0, 0, 0, "nano, fashion, or S, B, L, XL with a patch size: B/1 [nano]"),
    OPTION("recipe", recipe, TEXT, 0, 0, 0,
           "paper, or srdit13: what its author added later, Muon and the settings after it below [paper]"),
    OPTION("data", data, LIST, 0, 0, 0, "one or more data shards [data/digits.safetensors]"),
    OPTION("out", out, TEXT, 0, 0, 0,
           "folder for checkpoint.safetensors, samples.png, log.csv, loss.png [out, or the next free of "
           "out-2, ...; with --resume the checkpoint's]"),
    OPTION("overwrite", overwrite, SWITCH, 0, 0, 1,
           "replace the run that --out holds, once a step has succeeded"),
    OPTION("steps", steps, WHOLE, 0, 0, 1e9, "training steps in all"),
    OPTION("batch", batch, WHOLE, 64, 1, 1e6, "samples a step"),
    OPTION("accum", accum, WHOLE, 0, 0, 1e6, "parts that a batch is computed in, to save memory; 0: chosen"),
    OPTION("seed", seed, SEED, 1, 0, 9e15, "of everything random"),
    OPTION("resume", resume, TEXT, 0, 0, 0, "go on from this checkpoint, bit for bit"),
    OPTION("track", track, TEXT, 0, 0, 0,
           "a run of the race, timed and scored by its rules (dev/speedrun/README.md)"),
    OPTION("export", export_to, TEXT, 0, 0, 0,
           "at the end write the EMA under the reference implementation's names"),
    OPTION("log_every", log_every, WHOLE, 50, 1, 1e9,
           "steps between lines; a line shows the mean since the last"),
    OPTION("save_every", save_every, WHOLE, 500, 1, 1e9, "steps between checkpoints"),
    OPTION("sample_every", sample_every, WHOLE, 0, 0, 1e9, "steps between pictures; 0: one at the end"),
    OPTION("sample_steps", sample_steps, WHOLE, 50, 1, 1e6, "steps from noise to a picture"),
    OPTION("threads", threads, WHOLE, 0, 0, 4096, "CPU threads; 0: what OpenMP chooses"),
    OPTION("no_graph", no_graph, SWITCH, 0, 0, 1,
           "GPU: launch every kernel, instead of replaying a recorded step"),
    OPTION("profile", profile, SWITCH, 0, 0, 1, "GPU: at the end, where the time of the steps went"),
    OPTION("reduce_bf16", reduce_bf16, SWITCH, 0, 0, 1,
           "several GPUs: gradients go to each other in bf16, half the bytes"),
};
enum { RUN_OPTIONS = sizeof(run_options) / sizeof(run_options[0]) };

// Sums since the last line of log.csv, and the clocks that the step line shows
typedef struct {
    Losses sum;
    int steps, lines;              // since the last line; lines printed
    double begin, since, paused;   // seconds: the loop began, the last line plus pauses, all pauses for files
    double clock;      // seconds from the loop's begin to the end of the last step, pauses included
    double stepping;   // the same without pauses
    FILE *file;        // NULL until the first line, so that nothing is touched before a step succeeded
} Log;

// A run: all that the training loop works on
typedef struct {
    Config c;
    Run run;
    const Backend *backend;
    Data *data;
    Folder folder;
    Model *model;
    Loader loader;
    int first, step, saved;   // steps done at the start, now, and in the last checkpoint (-1: none)
    SafeItem *items;          // memory for writing checkpoints,
    real *room[4];            // with that for the blocks of a GPU
    Log log;
} Training;

// ----------------------------------------------------------------------------------------------------------
// Checkpoints

enum { MAX_PAIRS = CONFIG_OPTIONS + 24 };
// The metadata of checkpoints and exports; returns how many pairs
static int run_pairs(SafePair pairs[MAX_PAIRS], const char *format, Training *t) {
    const Run *run = &t->run;
    const Data *d = t->data;
    OptionTable config = config_table(&t->c);
    int n = 0;
    pairs[n++] = pair_text("format", format);
    pairs[n++] = pair_text("model", run->model);
    for (int i = 0; i < config.count; i++) {
        char text[TEXT_OF_OPTION];
        option_text(text, &config, i);
        if (!unsaid(&config, i)) pairs[n++] = pair_text(config.options[i].name, text);
    }
    pairs[n++] = pair_number("step", t->step);
    pairs[n++] = pair_number("steps", run->steps);
    pairs[n++] = pair_number("batch", run->batch);
    pairs[n++] = pair_number("accum", run->accum);
    pairs[n++] = pair_number("seed", (double)run->seed);
    pairs[n++] = pair_text("data", d->name);
    pairs[n++] = pair_text("decoder", d->decoder);
    pairs[n++] = pair_number("latent_scale", d->scale);
    pairs[n++] = pair_number("latent_offset", d->offset);
    pairs[n++] = pair_number("data_samples", (double)d->count);
    pairs[n] = pair_text("data_print", "");
    snprintf(pairs[n++].value, sizeof(pairs[0].value), "%016llx", (unsigned long long)data_print(d));
    return n;
}

static const enum Block saved_blocks[] = {PARAMS, EMA, ADAM_M, ADAM_V};
static const char *const block_prefix[] = {"model.", "", "adam.m.", "adam.v.", "ema."};   // by enum Block
// What the tensor's name begins with in the array whose others have `prefix`; NULL: it is not written. What
// Muon takes has a momentum, and no second moment.
static const char *prefix_of(const Tensor *t, const char *prefix) {
    if (t->muon_parts && !strcmp(prefix, block_prefix[ADAM_M])) return "muon.";
    return t->muon_parts && !strcmp(prefix, block_prefix[ADAM_V]) ? NULL : prefix;
}

// Adds a block's tensors to a list of things to write; returns the new count
static int items_add(SafeItem *items, int count, const Table *table, const real *block, const char *prefix,
                     int with_fixed) {
    for (int i = 0; i < table->count; i++) {
        const Tensor *t = &table->tensors[i];
        const char *before = prefix_of(t, prefix);
        if ((!t->trained && !with_fixed) || !before) continue;
        SafeItem *item = &items[count++];
        snprintf(item->name, sizeof(item->name), "%s%s", before, t->name);
        item->type = real_dtype();
        item->ndim = t->ndim;
        item->data = block + t->offset;
        memcpy(item->shape, t->shape, sizeof(item->shape));
    }
    return count;
}

static void checkpoint_write(Training *t) {
    SafePair pairs[MAX_PAIRS];
    Model *m = t->model;
    int count = 0;
    for (int k = 0; k < 4; k++) {
        const real *block = t->backend->host_block(m, saved_blocks[k], t->room[k]);
        if (!all_finite(block, m->table.total))
            die("step %d: the weights are no longer finite numbers, so %s was not written; try a smaller "
                "--lr",
                t->step, t->folder.checkpoint);
        count = items_add(t->items, count, &m->table, block, block_prefix[saved_blocks[k]], 0);
    }
    if (ranks.rank && t->saved >= 0) ranks.checkpoint = t->folder.checkpoint;   // rank 0 has written that one
    t->saved = t->step;
    if (ranks.rank) return;
    int pair_count = run_pairs(pairs, "srdit-checkpoint-1", t);
    NewFile file = safe_fill(t->folder.checkpoint, pairs, pair_count, t->items, count);
    folder_clear(&t->folder);   // the new run is on the disk; now its name
    file_end(&file);
    ranks.checkpoint = t->folder.checkpoint;
}

// The EMA under the reference implementation's names, with its fixed tables: what its load_state_dict(strict)
// takes
static void export_write(Training *t) {
    SafePair pairs[MAX_PAIRS];
    const real *block = t->backend->host_block(t->model, EMA, t->room[0]);
    if (ranks.rank) return;
    int count = items_add(t->items, 0, &t->model->table, block, "", 1);
    safe_write(t->run.export_to, pairs, run_pairs(pairs, "srdit-export-1", t), t->items, count);
    printf("%s: the EMA of step %d\n", t->run.export_to, t->step);
}

static SafeFile *checkpoint_open(const char *path, Config *c) {
    SafeFile *f = safe_open(path);
    const char *format = safe_metadata(f, "format");
    if (!format || (strcmp(format, "srdit-checkpoint-1") && strcmp(format, "srdit-export-1")))
        die("%s: not a checkpoint of this program: its metadata has no format srdit-checkpoint-1", path);
    static const char *const none[] = {NULL};
    config_read(c, f, none);
    return f;
}

// A trained tensor of a checkpoint (names with the given prefix), which has the table's shape; NULL: by
// prefix_of it is not there
static const SafeTensor *checkpoint_tensor(const SafeFile *f, const Tensor *t, const char *prefix) {
    char name[96];
    if (!prefix_of(t, prefix)) return NULL;
    snprintf(name, sizeof(name), "%s%s", prefix_of(t, prefix), t->name);
    const SafeTensor *s = safe_find(f, name);
    if (!s) die("%s: tensor %s is missing", f->path, name);
    int same = s->ndim == t->ndim;
    for (int d = 0; same && d < t->ndim; d++) same = s->shape[d] == (uint64_t)t->shape[d];
    if (!same) die("%s: tensor %s: its shape is not that of the model in the metadata", f->path, name);
    if (!is_floating(s->type))
        die("%s: tensor %s: dtype %s where floating point is expected", f->path, name, s->dtype);
    return s;
}
// Ends the program where a block is not that of a model of these sizes, before memory is taken for one.
static void checkpoint_check(const SafeFile *f, const Config *c, const char *prefix) {
    Params unused;
    Table table = params_table(&unused, c, NULL);
    for (int i = 0; i < table.count; i++)
        if (table.tensors[i].trained) checkpoint_tensor(f, &table.tensors[i], prefix);
    free(table.tensors);
}

// One block of a checkpoint in table order; the fixed tables come from the model's own.
static void checkpoint_block(real *host, const Table *table, const SafeFile *f, const char *prefix) {
    for (int i = 0; i < table->count; i++) {
        const Tensor *t = &table->tensors[i];
        if (!t->trained) continue;
        const SafeTensor *s = checkpoint_tensor(f, t, prefix);
        if (!s) continue;
        safe_read(host + t->offset, f, s);
        if (!all_finite(host + t->offset, t->size))
            die("%s: tensor %s holds a number that is not finite", f->path, s->name);
        for (size_t k = 0; k < t->size && !strcmp(prefix, block_prefix[ADAM_V]); k++)
            if (host[t->offset + k] < 0)
                die("%s: tensor %s holds a negative number, which a mean of squares is not", f->path,
                    s->name);
    }
}

static void checkpoint_load(const Backend *backend, Model *m, const SafeFile *f) {
    real *host = (real *)alloc_zero(m->table.total, sizeof(real));
    backend->get_block(host, m, PARAMS);   // for the fixed tables
    for (int k = 0; k < 4; k++) {
        checkpoint_block(host, &m->table, f, block_prefix[saved_blocks[k]]);
        backend->put_block(m, host, saved_blocks[k]);
    }
    free(host);
}

// ----------------------------------------------------------------------------------------------------------
// Training

static void print_help(const char *program, const OptionTable *run_table, const OptionTable *config) {
    printf("Trains SR-DiT, the Speedrun Diffusion Transformer (arXiv 2512.12386).\n\n"
           "  %s                                          nano on the bundled digits\n"
           "  %s --resume out/checkpoint.safetensors --steps 3000\n"
           "  %s --no-align --no-cls --steps 500 --out out/plain    two of the paper's techniques off\n\n"
           "Options, with their defaults for --model %s:\n",
           program, program, program, ((const Run *)run_table->fields)->model);
    options_print(run_table, 0, 22);
    printf("\nSizes, loss and optimizer:\n");
    options_print(config, 0, 22);
    printf("\nThe paper's techniques; each is on, and its flag switches it off:\n");
    options_print(config, 1, 22);
    printf("\nThe step line: loss = denoise + cls_coeff cls + align_coeff align + cfm_coeff cfm. align is "
           "minus a\n"
           "cosine and cfm minus a distance, so both, and the loss, may fall below zero; norm is the "
           "gradient's.\n"
           "Ctrl-C ends the step, writes the checkpoint and says how to go on.\n");
}

// The author's thirteenth version, which reaches FID 3.11 where the paper has 3.49: all that LATER settings
// add.
static void recipe_preset(Config *c, const char *name) {
    if (!strcmp(name, "paper")) return;
    if (strcmp(name, "srdit13"))
        die("--recipe %s: there is no such recipe; there are paper and srdit13", name);
    c->optimizer = MUON;
    c->muon = SRDIT13;
    c->immiscible = 8;
    c->mlp_widths.count = 2, c->mlp_widths.x[0] = 2, c->mlp_widths.x[1] = 6;
}
// What of it depends on other flags. Depths 2, 4 and 6 are those of 12 blocks; of a smaller model what lies
// behind g is left out.
static void recipe_settle(Config *c, const Run *run, const OptionTable *config) {
    if (c->optimizer == MUON && c->muon == SRDIT13 && !config->given[option_find(config, "eps")])
        c->eps = 1e-15;
    if (c->optimizer == MUON && !strchr(run->model, '/') && !config->given[option_find(config, "muon_lr")])
        c->muon_lr = 0.02;   // of a model for minutes on a CPU (dev/README.md)
    if (!run->recipe || strcmp(run->recipe, "srdit13") || !c->align || c->align_depths.count) return;
    for (int depth = 2; depth <= 6 && depth <= c->depth - c->num_h; depth += 2)
        c->align_depths.x[c->align_depths.count++] = depth;
}

// A new run's defaults: those of the tables, then what --model and --recipe say
static void start_new(Config *c, Run *run) {
    if (!model_preset(c, run->model))
        die("--model %s: there is no such model; there are nano, fashion and S/1 S/2 S/4 B/1 ... XL/4",
            run->model);
    recipe_preset(c, run->recipe ? run->recipe : "paper");
    const char *optimizer = text_after("--optimizer", run->word_count, run->words);
    if (optimizer) c->optimizer = !strcmp(optimizer, "muon");
    if (c->optimizer != MUON) c->muon = SPLIT;   // as where there is no recipe
    int small = !strchr(run->model, '/');        // minutes on a CPU
    run->steps = !small ? 400000 : strcmp(run->model, "nano") ? 3000 : 900;
    if (!small) run->batch = 256;
}

// A resumed run's defaults: those that its checkpoint was written with
static SafeFile *start_resumed(Config *c, Run *run, int *step) {
    SafeFile *f = checkpoint_open(run->resume, c);
    if (strcmp(safe_metadata(f, "format"), "srdit-checkpoint-1"))
        die("%s: an export holds only weights; resume from a checkpoint", run->resume);
    const char *name = safe_metadata(f, "model");
    run->model = name ? name : "custom";
    OptionTable config = config_table(c);
    int missing = 0;
    // what is missing: from a program that did not know the setting, or kept it apart
    for (int i = 0; i < config.count; i++) {
        const char *key = config.options[i].name;
        if (safe_metadata(f, key) || (!strcmp(key, "align_coeff") && safe_metadata(f, "proj_coeff")))
            continue;
        if (config.options[i].flags & LATER) continue;   // left out where it is not used
        printf("%s%s", missing++ ? ", " : "the checkpoint does not say, so the defaults stand: ", key);
    }
    if (missing) printf("\n");
    static const char *const keys[] = {"step", "steps", "batch", "seed"};
    for (int i = 0; i < 4; i++)
        if (!safe_metadata(f, keys[i]))
            die("%s: its metadata have no %s: not a whole checkpoint", f->path, keys[i]);
    for (int k = 0; k < 4; k++) checkpoint_check(f, c, block_prefix[saved_blocks[k]]);
    *step = (int)safe_whole(f, "step", 0, 1e9, 0);
    run->steps = (int)safe_whole(f, "steps", 0, 1e9, 0);
    run->batch = (int)safe_whole(f, "batch", 1, 1e6, 64);
    run->accum = (int)safe_whole(f, "accum", 1, 1e6, 1);
    run->seed = (uint64_t)safe_whole(f, "seed", 0, 9e15, 1);
    return f;
}

// What fixes a tensor's shape or its optimizer, and the data, must be what the run was begun with. before:
// the settings of then
static void check_resumed(const SafeFile *f, const OptionTable *config, const Config *before, const Data *d,
                          const char *data_path) {
    const OptionTable then = config_table((Config *)before);
    for (int i = 0; i < config->count; i++) {
        char was[TEXT_OF_OPTION], is[TEXT_OF_OPTION];
        option_text(was, &then, i), option_text(is, config, i);
        if (config->options[i].flags & FIXED && strcmp(was, is))
            die("%s: its %s is %s; it cannot be changed to %s", f->path, config->options[i].name,
                *was ? was : "the default", is);
    }
    const char *name = safe_metadata(f, "data"), *decoder = safe_metadata(f, "decoder");
    double samples = safe_number(f, "data_samples", (double)d->count);
    double scale = safe_number(f, "latent_scale", d->scale),
           offset = safe_number(f, "latent_offset", d->offset);
    if (name && strcmp(name, d->name))
        die("%s: it was trained on %s, and %s is %s", f->path, name, data_path, d->name);
    if (samples != (double)d->count)
        die("%s: it was trained on %.0f samples, and %s has %zu (are all shards given to --data?)", f->path,
            samples, data_path, d->count);
    const char *print = safe_metadata(f, "data_print");
    if (print && strtoull(print, NULL, 16) != data_print(d))
        die("%s: %s%s not the shards that it was trained on, in the order of then", f->path, data_path,
            d->shard_count > 1 ? " and those after it are" : " is");
    if (decoder && strcmp(decoder, d->decoder))
        die("%s: its decoder is %s, that of %s is %s", f->path, decoder, data_path, d->decoder);
    if (scale != d->scale || offset != d->offset)
        die("%s: its latent scale and offset are %g, %g; those of %s are %g, %g", f->path, scale, offset,
            data_path, d->scale, d->offset);
}

// Flags that others leave without effect: Muon's need Muon, and a ratio is not for MLPs of given widths.
static void flags_check(const Config *c, const OptionTable *config) {
    static const char *const names[] = {"muon", "muon_lr", "muon_momentum", "muon_weight_decay"};
    for (int k = 0; k < 4 && c->optimizer != MUON; k++)
        if (config->given[option_find(config, names[k])]) {
            char flag[FLAG_BYTES];
            flag_of(flag, &config->options[option_find(config, names[k])]);
            die("%s is for --optimizer muon, and this one is AdamW", flag);
        }
    if (c->mlp_widths.count && config->given[option_find(config, "mlp_ratio")])
        die("--mlp-ratio and --mlp-widths exclude each other: both say how wide the MLPs are");
}

// What the data dictates, where no flag says otherwise
static void take_sizes(const OptionTable *config, const Data *d) {
    static const char *const names[] = {"in_channels", "input_size", "num_classes", "z_dim"};
    int sizes[] = {d->C, d->S, d->K, d->Z};
    for (int k = 0; k < 4; k++) {
        int i = option_find(config, names[k]);
        if (sizes[k] && !config->given[i]) option_set(config, i, sizes[k], d->shards[0].file->path, names[k]);
    }
}

// Parts that suit a CPU's cache: of no more than some 3000 tokens, if the batch can be halved so often
static int parts_of(const Config *c, int batch) {
    int parts = 1;
    while (batch % (2 * parts) == 0 && batch / parts > 3000 / tokens_of(c)) parts *= 2;
    return parts;
}

// Everything a run needs, printed once
static void print_start(const Training *t) {
    const Config *c = &t->c;
    const Run *run = &t->run;
    const Data *d = t->data;
    const Model *m = t->model;
    int sparse = c->depth - c->num_f - c->num_h, off = 0;
    printf("SR-DiT %s on the %s\n", run->model, t->backend->name);
    printf("  model      %d blocks (%d dense, %d sparse, %d dense), width %d, %d heads, patch %d; %d tokens, "
           "%d kept "
           "in the sparse blocks\n",
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
    printf("  run        steps %d to %d, batch %d in %d part%s, lr %g, seed %llu, folder %s\n", t->step,
           run->steps, run->batch, run->accum, run->accum > 1 ? "s" : "", c->lr,
           (unsigned long long)run->seed, t->folder.name);
    char later[TEXT_OF_OPTION];
    int said = 0;
    for (int i = 0; i < config.count; i++) {
        if (unsaid(&config, i) || !(config.options[i].flags & LATER)) continue;
        option_text(later, &config, i);
        printf("%s%s %s", said++ ? ", " : "  later      ", config.options[i].name, later);
    }
    printf("%s  memory     %.1f MB of parameters, gradients, moments and EMA, %.1f MB of activations\n",
           said ? "\n" : "", (double)m->parameter_bytes / 1e6, (double)m->activation_bytes / 1e6);
    printf("  build      %s, vectors of %d bytes, ", sizeof(real) == 4 ? "float" : "double", VBYTES);
#ifdef _OPENMP
    printf("OpenMP with %d thread%s\n\n", omp_get_max_threads(), omp_get_max_threads() > 1 ? "s" : "");
#else
    printf("no OpenMP: one thread\n\n");
#endif
    fflush(stdout);
}

static int stop_if_interrupted(int step, int steps, const double *x, void *user) {
    (void)step, (void)steps, (void)x, (void)user;
    return interrupted;
}
// 10 rows of samples, a column a class, as a PNG and in the terminal. Returns 0 where there is nothing to
// show: Ctrl-C came before, or the samples are not made of finite numbers. Of several ranks the first draws.
static int write_samples(const Training *t) {
    if (t->backend->gather_ema) t->backend->gather_ema(t->model);
    if (ranks.rank) return 1;
    const Config *c = &t->c;
    const Data *d = t->data;
    int columns = imin(d->K, 10), n = 10 * columns, S = c->input_size, C = c->in_channels;
    if (strcmp(d->decoder, "pixels") || (C != 1 && C != 3)) {
        printf("pictures of this data need its decoder: ./sample %s --decoder FILE\n", t->folder.checkpoint);
        return 1;
    }
    double start = now_seconds();
    Sampling s = sampling_default();
    s.steps = t->run.sample_steps;
    s.seed = t->run.seed;
    size_t latent = (size_t)n * (size_t)latent_of(c);
    double *x = (double *)alloc_zero(latent, sizeof(double));
    double *cls = (double *)alloc_zero((size_t)n * (size_t)c->z_dim, sizeof(double));
    int *y = (int *)alloc_zero((size_t)n, sizeof(int));
    for (int i = 0; i < n; i++) y[i] = i % columns;
    sampler_noise(x, cls, c, &s, 0, n);
    int whole = sample_euler_maruyama(x, cls, t->backend, t->model, &s, y, n, stop_if_interrupted, NULL),
        finite = 1;
    for (size_t i = 0; i < latent; i++) finite &= fabs(x[i]) < INFINITY;
    if (!whole || !finite) {
        fflush(stdout);
        if (whole)
            fprintf(stderr, "error: %s: the samples are not made of finite numbers; try a smaller --lr\n",
                    t->folder.picture);
        else printf("%s: left out, since it was interrupted\n", t->folder.picture);
        free(x), free(cls), free(y);
        return 0;
    }
    uint8_t *pixels = (uint8_t *)alloc_zero(latent, 1);
    pixels_of(pixels, x, n, C, S, S);
    Grid grid = grid_of_all(pixels, n, S, S, C, columns, imax(1, 48 / S), 2);
    SafePair text[4] = {pair_text("Software", "SR-DiT in C"), pair_text("model", t->run.model),
                        pair_number("step", t->step), pair_number("seed", (double)t->run.seed)};
    png_write(t->folder.picture, &grid.p, text, 4);
    printf("%s: %d samples, one column a class, %d sampling steps, %.1f s\n", t->folder.picture, n, s.steps,
           now_seconds() - start);
    if (isatty(STDOUT_FILENO)) pictures_show(pixels, n, S, S, C, columns);
    fflush(stdout);
    free(grid.p.pixels), free(pixels), free(x), free(cls), free(y);
    return 1;
}

// Additions and multiplications of a sample's forward in training: products and attention, nothing else. A
// step counts as three forwards, the usual convention: of B/1 81.6e9 a sample.
static double forward_flops(const Config *c) {
    double T = tokens_of(c), P = patches_of(c), D = c->hidden_size, Z = c->z_dim;
    double M = c->projector_dim, X = patch_dim_of(c), W = TIME_FEATURES, sum = 0;
    for (int i = 0; i < c->depth; i++) {
        double n = is_sparse(c, i) ? kept_of(c) : T, F = hidden_of(c, i);
        sum += 2 * n * (3 * D * D + D * D + 2 * D * F) + 4 * n * n * D + 2 * D * 6 * D;
    }
    sum += 2 * T * 2 * D * D + 2 * (W * D + D * D) + 2 * D * 2 * D + 2 * 2 * P * X * D;
    for (int k = 0; align_depth(c, k); k++)
        sum += 2.0 * (is_sparse(c, align_depth(c, k) - 1) ? kept_of(c) : T) * (D * M + M * M + M * Z);
    if (c->cls) sum += 2 * 2 * Z * D;
    return sum;
}

// The first line of a run: a step has succeeded, so that a run that is overwritten can go. Checkpoint first,
// log last: whenever the program is ended, the folder never holds this run's log beside another's checkpoint.
static void log_begin(Training *t) {
    const Folder *f = &t->folder;
    int fresh = f->replaces;
    if (fresh) checkpoint_write(t);
    if (ranks.rank) return;
    t->log.file = log_open(f->log, "step,loss,denoise,cls,align,cfm,grad_norm,lr,ms_per_step,images_per_s",
                           fresh ? 0 : t->first);
}

// The dashboard: a line in the terminal and in log.csv, of means over the steps since the last one; the
// norm is the last step's, before clipping
static void log_line(Training *t) {
    Log *log = &t->log;
    const Run *run = &t->run;
    const Losses *sum = &log->sum;
    char total[16];
    int digits = snprintf(total, sizeof(total), "%d", run->steps);
    double now = now_seconds(), ms = 1000 * (now - log->since) / log->steps, k = 1.0 / log->steps;
    double left = (now - log->begin - log->paused) / (t->step - t->first) * (run->steps - t->step);
    char mfu[16] = "";   // of a GPU: the share of its peak that the model's products take
    double peak = t->backend->peak ? t->backend->peak() : 0;
    if (t->backend->peak) snprintf(mfu, sizeof(mfu), "    n/a");
    if (peak > 0)
        snprintf(mfu, sizeof(mfu), " %5.1f%%",
                 100 * 3 * forward_flops(&t->c) * run->batch / (ms / 1000) / (peak * ranks.size));
    if (!log->lines) log_begin(t);
    if (log->lines++ % 20 == 0)
        printf(
            "%*s      loss  denoise     cls    align      cfm     norm       lr      ms   img/s%s    left\n",
            2 * digits + 1, "step", *mfu ? "    MFU" : "");
    printf("%*d/%d %9.5f %8.5f %7.4f %8.4f %8.4f %8.4f %8.1e %7.1f %7.0f%s %4d:%02d\n", digits, t->step,
           run->steps, sum->total * k, sum->denoise * k, sum->cls * k, sum->align * k, sum->cfm * k,
           sum->grad_norm, t->c.lr, ms, 1000 * run->batch / ms, mfu, (int)left / 60, (int)left % 60);
    if (!ranks.rank)
        fprintf(log->file, "%d,%.9g,%.9g,%.9g,%.9g,%.9g,%.9g,%g,%.4g,%.5g\n", t->step, sum->total * k,
                sum->denoise * k, sum->cls * k, sum->align * k, sum->cfm * k, sum->grad_norm, t->c.lr, ms,
                1000 * run->batch / ms);
    fflush(stdout);
    if (!ranks.rank && fflush(log->file)) die("%s: cannot be written: %s", t->folder.log, strerror(errno));
    memset(&log->sum, 0, sizeof(log->sum));
    log->steps = 0;
    log->since = now;
}
static void log_add(Log *log, const Losses *one) {
    log->sum.total += one->total;
    log->sum.denoise += one->denoise;
    log->sum.cls += one->cls;
    log->sum.align += one->align;
    log->sum.cfm += one->cfm;
    log->sum.grad_norm = one->grad_norm;
}
// The clocks leave out what happened from `start` on: lines, checkpoints and pictures are not steps.
static void log_pause(Log *log, double start) {
    double pause = now_seconds() - start;
    log->since += pause;
    log->paused += pause;
}

// Forward and backward of the next step, part by part
static void forward_backward_step(Training *t) {
    Loader *l = &t->loader;
    t->backend->zero_gradients(t->model);
    for (int k = 0; k < t->run.accum; k++) {
        t->backend->forward_backward(t->model, loader_next(l));
        if (!l->started) continue;
        t->backend->batch_wait(t->model, (int)(l->next % 2));
        loader_ask(l);
    }
}

// The end of a run whose step `step` (from 1) was not finite: the state is still that of the step before, so
// that the step can be made once more to see where it began.
__attribute__((noreturn)) static void report_not_finite(Training *t, int step, enum LossPart part) {
    static const char *const parts[] = {
        "the loss or its gradient", "the velocity loss",    "the CLS loss",
        "the alignment loss",       "the contrastive loss", "the norm of the gradient"};
    char bad[96] = "";
    loader_stop(&t->loader);
    Batch *batch = batch_create(&t->c, t->run.batch / t->run.accum / ranks.size);
    batch->on_device = t->backend != &cpu_backend;
    t->backend->zero_gradients(t->model);
    for (int k = 0; k < t->run.accum && !*bad; k++) {
        batch_load(batch, t->data, &t->c, t->run.seed, step - 1, (ranks.rank * t->run.accum + k) * batch->B,
                   t->run.batch);
        t->backend->forward_backward(t->model, batch);
        find_bad(bad, t->backend, t->model, batch);
    }
    if (!*bad && ranks.size > 1) sleep(5);   // the rank that finds it says it
    die("step %d: %s is not a finite number; first bad: %s. %s%s; try a smaller --lr", step, parts[part],
        *bad ? bad : "unknown", t->saved >= 0 ? "The last checkpoint is " : "No checkpoint was written yet",
        t->saved >= 0 ? t->folder.checkpoint : "");
}

static void train(Training *t) {
    const Run *run = &t->run;
    Log *log = &t->log;
    t->loader.c = &t->c;
    log->begin = log->since = now_seconds();
    loader_start(&t->loader, (long)t->step * run->accum, (long)run->steps * run->accum);
    while (t->step < run->steps && !ranks_stop(t->step)) {
        forward_backward_step(t);
        t->backend->update(t->model, ++t->step);
        log->steps++;
        int last = t->step == run->steps || ranks_stop(t->step),
            save = last || t->step % run->save_every == 0;
        int line = save || t->step % run->log_every == 0 || t->step == 1;
        if (line || t->backend == &cpu_backend) {   // reading waits for a GPU
            Losses now = t->backend->read_losses(t->model);
            if (now.bad_step) report_not_finite(t, now.bad_step, now.bad_part);
            log_add(log, &now);
        }
        double pause = now_seconds();
        log->clock = pause - log->begin;
        log->stepping = log->clock - log->paused;
        if (line) log_line(t);
        if (save && t->saved != t->step) checkpoint_write(t);
        if (!last && run->sample_every && t->step % run->sample_every == 0) write_samples(t);
        log_pause(log, pause);
    }
    if (t->step > t->first && t->saved != t->step) {   // interrupted while a picture was drawn
        Losses now = t->backend->read_losses(t->model);
        if (now.bad_step) report_not_finite(t, now.bad_step, now.bad_part);
        checkpoint_write(t);
    }
    if (t->backend->end) t->backend->end(t->model);
}

// The command that goes on from a checkpoint: the one that was typed, but for where it begins
static void print_again(const Run *run, const char *checkpoint) {
    for (int i = 0; i < run->word_count; i++) {
        const char *word = run->words[i];
        if (!strcmp(word, "--resume") || !strcmp(word, "--recipe")) i++;   // the checkpoint has its recipe
        else if (strcmp(word, "--overwrite") && strncmp(word, "--resume=", 9) &&
                 strncmp(word, "--recipe=", 9)) {
            if (i) putchar(' ');
            print_word(word);
        }
    }
    printf(" --resume ");
    print_word(checkpoint);
    printf("\n");
}

// Of several ranks what each needed. Each step waits for the slowest, so that the times are much the same.
static void ranks_report(const Training *t) {
    typedef struct {
        double ms, bytes;
        char host[64];
    } Part;
    static Part all[MAX_RANKS];
    Part own = {1000 * t->log.stepping / (t->step - t->first),
                (double)(t->model->parameter_bytes + t->model->activation_bytes), ""};
    gethostname(own.host, sizeof(own.host) - 1);
    ranks_exchange(all, &own, sizeof(own));
    printf("\n");
    for (int i = 0; i < ranks.size; i++)
        printf("rank %d on %s: %.1f ms a step, %.3f GB\n", i, all[i].host, all[i].ms, all[i].bytes / 1e9);
}

// What was made, or how to go on; the exit status
static int report_end(Training *t) {
    int good = 1;
    if (ranks.size > 1 && t->step > t->first) ranks_report(t);
    int lacks = ranks_first(!ranks.rank && folder_lacks_picture(&t->folder));
    if (!ranks.rank && (t->step > t->first || lacks)) curve_write(t->folder.curve, t->folder.log);
    // What follows all do alike: a signal in the last steps reaches one rank now and another never.
    int cut_short = ranks_first(interrupted);
    if (cut_short && t->step == t->first)
        printf("\ninterrupted before the first step; nothing was written to %s\n", t->folder.name);
    else if (cut_short) {
        printf("\ninterrupted after step %d%s", t->step, t->run.track ? "\n" : "; to go on:  ");
        if (!t->run.track)
            print_again(&t->run, t->folder.checkpoint);   // a run of the race is not gone on with
    } else if (t->step > t->first) {
        printf("\n%s: written after step %d, %.1f s\n", t->folder.checkpoint, t->step,
               now_seconds() - t->log.begin);
        good = write_samples(t);
    } else if (t->step) {
        printf("%s is at step %d, its last; --steps with a larger number goes on\n", t->run.resume, t->step);
        if (lacks) good = write_samples(t);   // it was stopped while drawing
    } else printf("no step was asked for, and nothing was written to %s\n", t->folder.name);
    if (t->folder.made && t->step == t->first) rmdir(t->folder.name);   // if nothing is in it
    return cut_short || interrupted ? 130 : !good;
}

// Ends the program where --export would replace what the run reads or writes, or another checkpoint.
static void export_check(const Run *run, const Folder *folder) {
    const char *to = run->export_to;
    const char *const own[] = {folder->checkpoint, folder->picture, folder->curve, folder->log,
                               folder->track};
    refuse_input("--export", to, run->resume);
    for (int i = 0; i < run->data.count; i++) refuse_input("--export", to, run->data.items[i]);
    for (int i = 0; i < 5; i++)
        if (same_output(to, own[i])) die("--export %s is a file of this run; give it another name", to);
    refuse_foreign("--export", to, "srdit-export-1");
    file_probe(to);
}

// Where the batches of the run are loaded to: for a GPU its two input buffers, or, where it cannot convert
// what the data stores, two batches that it copies from
static void loader_open(Training *t) {
    Loader *l = &t->loader;
    const Backend *backend = t->backend;
    int B = t->run.batch / t->run.accum / ranks.size, gpu = backend != &cpu_backend;
    l->data = t->data, l->seed = t->run.seed, l->threads = t->run.threads;
    l->parts = t->run.accum, l->whole = t->run.batch;
    for (int i = 0; i <= gpu; i++) {
        if (gpu) l->batch[i] = backend->batch_in(t->model, t->data, i);
        if (l->batch[i]) continue;
        l->batch[i] = batch_create(&t->c, B);
        l->batch[i]->on_device = gpu;
    }
}

// Several ranks: all must train the same model with the same flags on the same data, from the same
// checkpoint. Ends every rank otherwise.
static void settings_agree(const Config *c, const Run *run, const Data *d, const SafeFile *resume) {
    typedef struct {
        uint64_t flags, data, start;
    } Print;
    static Print all[MAX_RANKS];
    Print own = {0, data_print(d) ^ d->count, 0};
    const OptionTable tables[] = {config_table((Config *)c), {run_options, RUN_OPTIONS, (void *)run, NULL}};
    for (int k = 0; k < 2; k++)
        for (int i = 0; i < tables[k].count; i++) {
            char text[TEXT_OF_OPTION];
            enum Kind kind = tables[k].options[i].kind;
            if (kind == TEXT || kind == LIST || !strcmp(tables[k].options[i].name, "threads")) continue;
            option_text(text, &tables[k], i);
            own.flags = print_bytes(own.flags, (const uint8_t *)text, strlen(text) + 1, 1);
        }
    if (run->export_to) own.flags++;
    if (resume)
        own.start = print_bytes(0, (const uint8_t *)resume->map, resume->size, 1 + resume->size / 65536);
    ranks_exchange(all, &own, sizeof(own));
    for (int i = 1; i < ranks.size; i++) {
        if (all[i].flags != all[0].flags) die("rank %d was started with other flags than rank 0", i);
        if (all[i].data != all[0].data) die("rank %d has other --data than rank 0", i);
        if (all[i].start != all[0].start) die("rank %d goes on from another checkpoint than rank 0", i);
    }
}

// All that a run works on, from the settings; whatever is wrong is said here, before the first step.
static Training training_open(const Config *c, const Run *run, const Backend *backend, Data *d,
                              SafeFile *resume, int step) {
    Training t;
    memset(&t, 0, sizeof(t));
    t.c = *c;
    t.run = *run;
    t.backend = backend;
    t.data = d;
    t.first = t.step = step;
    t.saved = -1;
    if (!ranks.rank) t.folder = folder_open(run->out, run->resume, run->overwrite);
    ranks_first_text(t.folder.checkpoint, PATH_MAX);
    if (resume) ranks.checkpoint = run->resume;
    t.folder.replaces = ranks_first(t.folder.replaces);
    // Only now is the folder ours: another run may have gone on in it since the file was opened.
    struct stat st;
    if (resume && !ranks.rank &&
        (stat(run->resume, &st) || st.st_dev != resume->device || st.st_ino != resume->inode))
        die("%s: another run has just gone on from it; start again to go on from there", run->resume);
    if (run->steps > step && !ranks.rank) {   // better to know now than after the training
        file_probe(t.folder.checkpoint);
        file_probe(t.folder.picture);
        file_probe(t.folder.curve);
        file_probe(t.folder.log);
    }
    if (run->export_to && !ranks.rank) export_check(run, &t.folder);
    if (ranks.size > 1) settings_agree(c, run, d, resume);
    if (!t.run.accum) t.run.accum = backend == &cpu_backend ? parts_of(c, run->batch) : 1;
    t.model = backend->create(c, run->batch / t.run.accum / ranks.size, run->seed);
    if (backend->begin) backend->begin(t.model, run->no_graph, run->profile);
    if (resume) checkpoint_load(backend, t.model, resume);
    loader_open(&t);
    t.items = (SafeItem *)alloc_zero(4 * (size_t)t.model->table.count, sizeof(SafeItem));
    for (int k = 0; k < 4 && backend != &cpu_backend; k++)
        t.room[k] = (real *)alloc_zero(t.model->table.total, sizeof(real));
    ranks_first(0);   // whoever needs long for what is above is waited for here, not by NCCL
    return t;
}
static void training_close(Training *t) {
    if (t->log.file && fclose(t->log.file)) die("%s: cannot be written: %s", t->folder.log, strerror(errno));
    for (int k = 0; k < 4; k++) free(t->room[k]);
    free(t->items);
    loader_stop(&t->loader);
    for (int i = 0; i < 2; i++)
        if (t->loader.batch[i]) batch_free(t->loader.batch[i]);
    ranks_first(0);   // rank 0 may have drawn or written for long; NCCL is left by all at once
    t->backend->destroy(t->model);
    data_close(t->data);
    if (!ranks.rank) close(t->folder.lock);
}

#include "dev/speedrun/track.h"   // the race: what --track NAME fixes, times and tells

static int train_main(int argc, char **argv, const Backend *backend) {
    static char *default_data[] = {(char *)"data/digits.safetensors"};
    Config c = config_default();
    Run run;
    memset(&run, 0, sizeof(run));
    int given[CONFIG_OPTIONS] = {0}, step = 0, help = wants_help(argc, argv);
    memory_hint = "; a smaller --batch or a larger --accum needs less";
    argv = split_words(&argc, argv);
    OptionTable run_table = {run_options, RUN_OPTIONS, &run, NULL}, config = config_table(&c);
    options_reset(&run_table);
    config.given = given;
    run.data.items = default_data;
    run.data.count = 1;
    run.words = argv;
    run.word_count = argc;

    if (!help) ranks_environment(&ranks);
    if (ranks.size > 1 && backend == &cpu_backend)
        die("this was started as one of %d ranks, but only the GPU's trainer has several (make "
            "train_srdit_cu)",
            ranks.size);
    if (!help) ranks_open();
    const char *model_flag = text_after("--model", argc, argv);   // these two come first, wherever they stand
    run.model = model_flag ? model_flag : "nano";
    run.resume = help ? NULL : text_after("--resume", argc, argv);
    run.recipe = text_after("--recipe", argc, argv);
    if (run.resume && run.recipe) die("--recipe %s: a run that goes on has its recipe already", run.recipe);
    const OptionTable both[2] = {run_table, config};
    if (ranks.size > 1 && text_after("--track", argc, argv))
        die("--track: a run of the race is made by one process, and these are %d ranks", ranks.size);
    Track *track = help ? NULL : track_begin(&run, both, argc, argv);
    SafeFile *resume = run.resume ? start_resumed(&c, &run, &step) : NULL;
    if (!resume) start_new(&c, &run);
    if (help) {
        if (!access(default_data[0], R_OK)) {
            Data *bundled = data_open(default_data, 1);
            take_sizes(&config, bundled);
            data_close(bundled);
        }
        recipe_settle(&c, &run, &config);
        print_help(argv[0], &run_table, &config);
        check_output_taken();
        return 0;
    }
    const Config before = c;
    const char *model_name = run.model;
    options_parse(both, 2, NULL, argc, argv);
    if (!resume) recipe_settle(&c, &run, &config);
    if (track) track_settle(track, &run, both, argc, argv);
    if (resume && strcmp(model_name, run.model))
        die("--model %s: the checkpoint's model is %s", run.model, model_name);
    if (run.steps < step && !run.export_to)   // exporting needs no step
        die("--steps %d: %s is at step %d already", run.steps, run.resume, step);
    if (run.batch % (imax(run.accum, 1) * ranks.size)) {
        if (ranks.size > 1)
            die("--batch %d does not divide by %d ranks%s: each takes as many samples", run.batch, ranks.size,
                run.accum > 1 ? " times --accum" : "");
        die("--accum %d does not divide --batch %d", run.accum, run.batch);
    }
    if (!backend->begin && (run.no_graph || run.profile))
        die("--%s: only the GPU's trainer has it (make train_srdit_cu)",
            run.profile ? "profile" : "no-graph");
    if (run.reduce_bf16 && ranks.size == 1)
        die("--reduce-bf16: it is for several GPUs (torchrun --nproc-per-node 8 --no-python "
            "./train_srdit_cu)");
    ranks.bf16 = run.reduce_bf16;
    run.threads = use_threads(run.threads);

    Data *d = data_open(run.data.items, run.data.count);
    if (resume) check_resumed(resume, &config, &before, d, run.data.items[0]);
    else take_sizes(&config, d);
    config_check(&c, NULL);
    flags_check(&c, &config);
    data_check(d, &c);
    Training t = training_open(&c, &run, backend, d, resume, step);
    print_start(&t);
    catch_interrupts(ranks.size > 1);
    if (track) track_warm_up(track, &t);
    train(&t);
    int status = report_end(&t);
    if (track) status = track_end(track, &t, status);
    if (run.export_to) export_write(&t);
    training_close(&t);
    if (resume) safe_close(resume);
    ranks_close();
    check_output_taken();
    return status;
}

#ifndef TRAIN_SRDIT_NO_MAIN
int main(int argc, char **argv) {
    guard_streams();
    wait_calmly(argv);
    return train_main(argc, argv, &cpu_backend);
}
#endif
