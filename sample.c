// From a checkpoint to pictures: the sampler's front end, and the decoder of the INVAE latents.
//
// What this file is: the convolutional decoder that turns ImageNet latents into pixels, the command line, and
// the places where pictures can go (a PNG grid, one PNG each, an .npz for the ADM evaluator, latents, the
// terminal). What it refuses to become: an image library. The network and the samplers are train_srdit.c's;
// the formats of files and terminals are dev/lib's.
//
// sample.cu draws and decodes on a GPU; it includes this file for everything else.
//
//   make && ./sample out/checkpoint.safetensors --show
//   ./sample --show             the newest run's checkpoint
//   ./sample --help             every flag with its default
//
// Every number is addressed by (seed, step, global index of the sample), so sample 17 of a seed is the same
// picture whatever the batch, the number of threads or the place where an interrupted run went on.
#ifndef TRAIN_SRDIT_NO_MAIN
#define TRAIN_SRDIT_NO_MAIN
#endif
#ifdef __GNUC__
#pragma GCC diagnostic ignored "-Wunused-function"   // this program does not train
#endif
#ifndef SAMPLE_NO_TRAINER   // sample.cu has included train_srdit.cu already
#include "train_srdit.c"
#endif
#include "dev/lib/npz.h"
#include "dev/lib/scoring.h"

// ----------------------------------------------------------------------------------------------------------
// The decoder (that of latent diffusion, arXiv 2112.10752). A map of C channels and H x W pixels lies
// channels last and with a border of one pixel: [H+2, W+2, C]. With the border zero, a 3x3 convolution is
// three matrix products without any copy (no im2col): for kernel row ky, the 3 C numbers that pixel q sees
// are one stretch of memory, which starts C numbers after that of pixel q-1. So they are the rows of a matrix
// whose rows overlap, [pixels, 3C] with a row length of C. All pixels are one such matrix; what is computed
// at the border between two rows of pixels is never read.
//
//   H x W x C         whose      x          the residual stream; its border holds anything
//                                n          what a convolution reads; its border is zero
//                                h          what a convolution wrote; its border holds anything

// A convolution of taps x taps, 1 or 3. w: for each row of the kernel and each block of at most KC of its
// taps * in inputs, panels of NR outputs as matmul_rows wants them, made once when the file is opened.
typedef struct {
    int taps, in, out;
    real *w, *b;
} Conv;
typedef struct {
    int channels;
    real *w, *b;
} Norm;
typedef struct {
    Norm norm1, norm2;
    Conv conv1, conv2, shortcut;
} ResBlock;   // shortcut.w NULL: none
// [3C,C], [3C], [C,C], [C]; w NULL: none
typedef struct {
    Norm norm;
    real *qkv_w, *qkv_b, *proj_w, *proj_b;
} AttnBlock;

enum { MAX_LEVELS = 8, MAX_RES = 8 };
// up.w NULL: no upsampling
typedef struct {
    ResBlock block[MAX_RES];
    AttnBlock attn[MAX_RES];
    Conv up;
} Level;
typedef struct {
    int levels, blocks, groups, z, out_ch, width;   // width: channels of the smallest map
    double eps;
    Conv post_quant, conv_in, conv_out;
    ResBlock mid1, mid2;
    AttnBlock mid_attn;
    Level level[MAX_LEVELS];
    Norm norm_out;
    size_t weight_bytes;
} Decoder;

// Elements of a map, and the place of its pixel (y, x)
static size_t map_elements(int H, int W, int C) { return (size_t)(H + 2) * (size_t)(W + 2) * (size_t)C; }
static size_t map_at(int y, int x, int W, int C) {
    return ((size_t)(y + 1) * (size_t)(W + 2) + (size_t)(x + 1)) * (size_t)C;
}

// The name of a tensor, put together; good to the end of the expression that it stands in
typedef struct {
    char text[160];
} Name;
__attribute__((format(printf, 1, 2))) static Name name_of(const char *format, ...) {
    Name name;
    va_list args;
    va_start(args, format);
    vsnprintf(name.text, sizeof(name.text), format, args);
    va_end(args);
    return name;
}

static real *decoder_alloc(Decoder *d, size_t n) {
    d->weight_bytes += n * sizeof(real);
    return (real *)alloc_zero(n, sizeof(real));
}

static const SafeTensor *decoder_find(const SafeFile *f, const char *name) {
    const SafeTensor *t = safe_find(f, name);
    if (!t)
        die("%s: tensor %s is missing: not a decoder of INVAE latents, or not a whole one", f->path, name);
    return t;
}

// A tensor of shape [a] (taps 0) or [a,b,taps,taps], as `real`
static real *decoder_tensor(Decoder *d, const SafeFile *f, const char *name, int a, int b, int taps) {
    const SafeTensor *t = decoder_find(f, name);
    uint64_t shape[4] = {(uint64_t)a, (uint64_t)b, (uint64_t)taps, (uint64_t)taps};
    int same = t->ndim == (taps ? 4 : 1);
    for (int i = 0; same && i < t->ndim; i++) same = t->shape[i] == shape[i];
    if (!same) die("%s: tensor %s: its shape does not fit the tensors before it", f->path, name);
    if (!is_floating(t->type))
        die("%s: tensor %s: dtype %s where floating point is expected", f->path, name, t->dtype);
    size_t n = safe_elements(t);
    real *out = decoder_alloc(d, n);
    safe_read(out, f, t);
    if (!all_finite(out, n)) die("%s: tensor %s holds a number that is not finite", f->path, name);
    return out;
}

// Size of a dimension of a tensor that decides the decoder's sizes, from 1 to 65536
static int decoder_size(const SafeFile *f, const char *name, int dim) {
    const SafeTensor *t = decoder_find(f, name);
    if (t->ndim <= dim || !t->shape[dim] || t->shape[dim] > 65536)
        die("%s: tensor %s: its shape is not one of a convolution", f->path, name);
    return (int)t->shape[dim];
}

// The taps * in inputs of one row of the kernel are cut into blocks of at most KC; where block q begins
static int conv_blocks(const Conv *c) { return (c->taps * c->in + KC - 1) / KC; }
static int conv_cut(const Conv *c, int q) { return (int)((long)c->taps * c->in * q / conv_blocks(c)); }

// w [out,in,taps,taps] of the file, packed: each row of the kernel becomes [taps * in, out], cut into blocks
// and panels
static Conv conv_open(Decoder *d, const SafeFile *f, const char *name, int in, int out, int taps) {
    Conv c = {taps, in, out, NULL, NULL};
    c.b = decoder_tensor(d, f, name_of("%s.bias", name).text, out, 0, 0);
    real *w = decoder_tensor(d, f, name_of("%s.weight", name).text, out, in, taps);
    int K = taps * in, panels = (out + NR - 1) / NR;
    real *row = (real *)alloc_zero((size_t)out * (size_t)K, sizeof(real));
    c.w = decoder_alloc(d, (size_t)taps * (size_t)K * (size_t)panels * NR);
    for (int ky = 0; ky < taps; ky++) {
#pragma omp parallel for
        for (int o = 0; o < out; o++)
            for (int kx = 0; kx < taps; kx++)
                for (int i = 0; i < in; i++)
                    row[(size_t)o * K + kx * in + i] = w[(((size_t)o * in + i) * taps + ky) * taps + kx];
        for (int q = 0; q < conv_blocks(&c); q++) {
            int k0 = conv_cut(&c, q), kc = conv_cut(&c, q + 1) - k0;
            real *to = c.w + ((size_t)ky * (size_t)K + (size_t)k0) * (size_t)panels * NR;
            for (int p = 0; p < panels; p++)
                matmul_panel(to + (size_t)p * NR * (size_t)kc, row + k0, K, 1, p * NR, imin(NR, out - p * NR),
                             kc);
        }
    }
    d->weight_bytes -= (size_t)out * (size_t)K * (size_t)taps * sizeof(real);
    free(row);
    free(w);
    return c;
}

static Norm norm_open(Decoder *d, const SafeFile *f, const char *name, int channels) {
    Norm n = {channels, NULL, NULL};
    if (channels % d->groups)
        die("%s: %s: %d channels are not a multiple of %d groups", f->path, name, channels, d->groups);
    n.w = decoder_tensor(d, f, name_of("%s.weight", name).text, channels, 0, 0);
    n.b = decoder_tensor(d, f, name_of("%s.bias", name).text, channels, 0, 0);
    return n;
}

static ResBlock res_open(Decoder *d, const SafeFile *f, const char *name, int in, int out) {
    ResBlock r;
    memset(&r, 0, sizeof(r));
    r.norm1 = norm_open(d, f, name_of("%s.norm1", name).text, in);
    r.conv1 = conv_open(d, f, name_of("%s.conv1", name).text, in, out, 3);
    r.norm2 = norm_open(d, f, name_of("%s.norm2", name).text, out);
    r.conv2 = conv_open(d, f, name_of("%s.conv2", name).text, out, out, 3);
    if (in != out) r.shortcut = conv_open(d, f, name_of("%s.nin_shortcut", name).text, in, out, 1);
    return r;
}

// The 1x1 convolutions q, k and v become one matrix [3C,C], so that attention_forward can be the trainer's.
static AttnBlock attn_open(Decoder *d, const SafeFile *f, const char *name, int C) {
    static const char *const parts[] = {"q", "k", "v", "proj_out"};
    AttnBlock a;
    size_t n = (size_t)C;
    a.norm = norm_open(d, f, name_of("%s.norm", name).text, C);
    a.qkv_w = decoder_alloc(d, 3 * n * n);
    a.qkv_b = decoder_alloc(d, 3 * n);
    a.proj_w = decoder_alloc(d, n * n);
    a.proj_b = decoder_alloc(d, n);
    for (size_t i = 0; i < 4; i++) {
        real *w = decoder_tensor(d, f, name_of("%s.%s.weight", name, parts[i]).text, C, C, 1);
        real *b = decoder_tensor(d, f, name_of("%s.%s.bias", name, parts[i]).text, C, 0, 0);
        memcpy(i < 3 ? a.qkv_w + i * n * n : a.proj_w, w, n * n * sizeof(real));
        memcpy(i < 3 ? a.qkv_b + i * n : a.proj_b, b, n * sizeof(real));
        d->weight_bytes -= (n * n + n) * sizeof(real);
        free(w);
        free(b);
    }
    return a;
}

// Sizes come from the tensors' shapes; the number of groups and the norms' epsilon, which no shape tells,
// from the metadata (num_groups, norm_eps) or else from the specification.
static void decoder_sizes(Decoder *d, const SafeFile *f, const char *prefix) {
    d->groups = (int)safe_whole(f, "num_groups", 1, 65536, 32);
    d->eps = safe_number(f, "norm_eps", 1e-6);
    if (!(d->eps > 0 && d->eps < 1)) die("%s: norm_eps %g is not from 0 to 1", f->path, d->eps);
    d->z = decoder_size(f, name_of("%spost_quant_conv.weight", prefix).text, 1);
    if (decoder_size(f, name_of("%spost_quant_conv.weight", prefix).text, 0) != d->z)
        die("%s: post_quant_conv changes the channels", f->path);
    d->width = decoder_size(f, name_of("%sdecoder.conv_in.weight", prefix).text, 0);
    d->out_ch = decoder_size(f, name_of("%sdecoder.conv_out.weight", prefix).text, 0);
    while (d->levels <= MAX_LEVELS &&
           safe_find(f, name_of("%sdecoder.up.%d.block.0.conv1.weight", prefix, d->levels).text))
        d->levels++;
    while (d->blocks <= MAX_RES &&
           safe_find(f, name_of("%sdecoder.up.0.block.%d.conv1.weight", prefix, d->blocks).text))
        d->blocks++;
    if (d->levels < 1 || d->levels > MAX_LEVELS || d->blocks > MAX_RES)
        die("%s: it has no level decoder.up.0, or more than %d levels or %d blocks a level: not a decoder",
            f->path, MAX_LEVELS, MAX_RES);
}

// Level l, whose input has `in` channels; returns those of its output.
static int level_open(Decoder *d, const SafeFile *f, const char *prefix, int l, int in) {
    Level *level = &d->level[l];
    Name name = name_of("%sdecoder.up.%d", prefix, l);
    int out = decoder_size(f, name_of("%s.block.0.conv1.weight", name.text).text, 0);
    for (int i = 0; i < d->blocks; i++) {
        Name attn = name_of("%s.attn.%d", name.text, i);
        level->block[i] = res_open(d, f, name_of("%s.block.%d", name.text, i).text, i ? out : in, out);
        if (safe_find(f, name_of("%s.norm.weight", attn.text).text))
            level->attn[i] = attn_open(d, f, attn.text, out);
    }
    if (l > 0) level->up = conv_open(d, f, name_of("%s.upsample.conv", name.text).text, out, out, 3);
    return out;
}

// Where the file's metadata names a size, it must be the one that the tensors have.
static void decoder_agrees(const SafeFile *f, const char *key, double have) {
    double want = safe_number(f, key, have);
    if (want != have) die("%s: its metadata say %s = %g, but its tensors %g", f->path, key, want, have);
}
static void metadata_agree(const Decoder *d, const SafeFile *f) {
    decoder_agrees(f, "z_channels", d->z);
    decoder_agrees(f, "num_res_blocks", d->blocks - 1);
    decoder_agrees(f, "out_ch", d->out_ch);
    // attn_levels is a list of levels, such as "4"; ch_mult of multiples of ch, such as "1,1,2,2,4"
    const char *attn_levels = safe_metadata(f, "attn_levels"), *mult = safe_metadata(f, "ch_mult");
    int attended = 0, said = 0;   // a bit a level
    for (int l = 0; l < d->levels; l++) {
        attended |= (d->level[l].attn[0].qkv_w != NULL) << l;
        if (!mult) continue;
        int have = d->level[l].block[0].conv1.out;
        double want = safe_number(f, "ch", d->norm_out.channels) * atof(mult);
        if (want != have)
            die("%s: its metadata say %g channels at level %d, but its tensors %d", f->path, want, l, have);
        mult += strcspn(mult, ",");
        mult += *mult == ',';
    }
    for (const char *p = attn_levels; p && *p; p += p[1] == ',' && p[2] ? 2 : 1) {
        if (*p < '0' || *p >= '0' + d->levels || (p[1] && p[1] != ','))
            die("%s: attn_levels is \"%s\", which is no list of levels such as 3,4", f->path, attn_levels);
        said |= 1 << (*p - '0');
    }
    if (attn_levels && said != attended)
        die("%s: its metadata say attn_levels = %s, but its tensors differ", f->path, attn_levels);
}

// The decoder in a safetensors file with the public names, each after `prefix` ("" or "param."). The file can
// be closed afterwards.
static Decoder *decoder_open(const SafeFile *f, const char *prefix) {
    Decoder *d = (Decoder *)alloc_zero(1, sizeof(Decoder));
    decoder_sizes(d, f, prefix);
    int C = d->width;
    d->post_quant = conv_open(d, f, name_of("%spost_quant_conv", prefix).text, d->z, d->z, 1);
    d->conv_in = conv_open(d, f, name_of("%sdecoder.conv_in", prefix).text, d->z, C, 3);
    d->mid1 = res_open(d, f, name_of("%sdecoder.mid.block_1", prefix).text, C, C);
    d->mid_attn = attn_open(d, f, name_of("%sdecoder.mid.attn_1", prefix).text, C);
    d->mid2 = res_open(d, f, name_of("%sdecoder.mid.block_2", prefix).text, C, C);
    for (int l = d->levels - 1; l >= 0; l--) C = level_open(d, f, prefix, l, C);
    d->norm_out = norm_open(d, f, name_of("%sdecoder.norm_out", prefix).text, C);
    d->conv_out = conv_open(d, f, name_of("%sdecoder.conv_out", prefix).text, C, d->out_ch, 3);
    metadata_agree(d, f);
    return d;
}

static void conv_close(Conv *c) { free(c->w), free(c->b); }
static void norm_close(Norm *n) { free(n->w), free(n->b); }
static void res_close(ResBlock *r) {
    norm_close(&r->norm1), norm_close(&r->norm2);
    conv_close(&r->conv1), conv_close(&r->conv2), conv_close(&r->shortcut);
}
static void attn_close(AttnBlock *a) {
    norm_close(&a->norm), free(a->qkv_w), free(a->qkv_b), free(a->proj_w), free(a->proj_b);
}
static void decoder_close(Decoder *d) {
    conv_close(&d->post_quant), conv_close(&d->conv_in), conv_close(&d->conv_out), norm_close(&d->norm_out);
    res_close(&d->mid1), res_close(&d->mid2), attn_close(&d->mid_attn);
    for (int l = 0; l < d->levels; l++) {
        for (int i = 0; i < d->blocks; i++)
            res_close(&d->level[l].block[i]), attn_close(&d->level[l].attn[i]);
        conv_close(&d->level[l].up);
    }
    free(d);
}

// For the tests of sample.cu (TEST_CUDA) only: while decoder_rounds is set, maps that the GPU stores in bf16
// are rounded so, which measures what the GPU may be off by (as matmul_rounds in dev/lib/matmul.h).
#ifdef TEST_CUDA
static int decoder_rounds;
#define AS_STORED(x, n) (decoder_rounds ? round_bf16(x, n) : (void)0)
#else
#define AS_STORED(x, n) ((void)0)
#endif

// out = convolution of in, both maps with borders: in's must be zero where taps is 3; out's is left with
// anything. Strips of pixels go to threads; every number is summed in the same order wherever the strips end.
static void conv_forward(real *out, const real *in, const Conv *c, int H, int W) {
    // a multiple of MR, and short enough that a strip's inputs and outputs stay in cache
    enum { STRIP = 48 };
    int row = W + 2, first = row + 1, pixels = H * row - 2, K = c->taps * c->in;
    int reach = c->taps / 2, strips = (pixels + STRIP - 1) / STRIP;
    size_t packed = (size_t)((c->out + NR - 1) / NR * NR);
#pragma omp parallel for schedule(dynamic)
    for (int s = 0; s < strips; s++)
        for (int ky = 0; ky < c->taps; ky++)
            for (int q = 0; q < conv_blocks(c); q++) {
                int k0 = conv_cut(c, q), kc = conv_cut(c, q + 1) - k0, begin = ky || q;
                size_t to = (size_t)first + (size_t)s * STRIP;
                const real *a =
                    in + (to + (size_t)(ky * row) - (size_t)(reach * row) - (size_t)reach) * (size_t)c->in;
                matmul_rows(out + to * (size_t)c->out, c->out, imin(STRIP, pixels - s * STRIP), c->out, kc,
                            a + k0, c->in, 1, c->w + ((size_t)ky * (size_t)K + (size_t)k0) * packed, 0,
                            begin ? NULL : c->b, begin);
            }
}

// out = GroupNorm(x), then SiLU where silu; out's border becomes zero. Sums in double: by row of pixels, then
// the rows in order.
static void group_norm_forward(real *out, const real *x, const Norm *norm, const Decoder *d, int silu, int H,
                               int W) {
    int C = norm->channels, G = d->groups, each = C / G;
    double *sums = (double *)alloc_zero((size_t)H * (size_t)C * 2, sizeof(double));
    real *scale = (real *)alloc_zero((size_t)C, sizeof(real)),
         *shift = (real *)alloc_zero((size_t)C, sizeof(real));
#pragma omp parallel for
    for (int y = 0; y < H; y++) {
        double *s = sums + (size_t)y * (size_t)C * 2, *s2 = s + C;
        const real *in = x + map_at(y, 0, W, C);
        for (int z = 0; z < W; z++, in += C)
            for (int i = 0; i < C; i++) s[i] += in[i], s2[i] += (double)in[i] * in[i];
    }
    for (int g = 0; g < G; g++) {
        double sum = 0, sum2 = 0, n = (double)H * W * each;
        for (int y = 0; y < H; y++)
            for (int i = g * each; i < (g + 1) * each; i++)
                sum += sums[(size_t)y * C * 2 + i], sum2 += sums[(size_t)y * C * 2 + C + i];
        double mean = sum / n, variance = sum2 / n - mean * mean,
               r = 1 / sqrt((variance > 0 ? variance : 0) + d->eps);
        for (int i = g * each; i < (g + 1) * each; i++) {
            scale[i] = (real)(norm->w[i] * r);
            shift[i] = (real)(norm->b[i] - mean * norm->w[i] * r);
        }
    }
#pragma omp parallel for
    for (int y = 0; y < H + 2; y++) {
        real *o = out + (size_t)y * (size_t)(W + 2) * (size_t)C;
        const real *in = x + (size_t)y * (size_t)(W + 2) * (size_t)C;
        int inside = y > 0 && y <= H;
        memset(o, 0, (inside ? 1 : (size_t)(W + 2)) * (size_t)C * sizeof(real));
        if (!inside) continue;
        memset(o + (size_t)(W + 1) * C, 0, (size_t)C * sizeof(real));
        for (int z = 1; z <= W; z++)
            for (int i = 0; i < C; i++) {
                real v = in[(size_t)z * C + i] * scale[i] + shift[i];
                o[(size_t)z * C + i] = silu ? v / (1 + fast_exp(-v)) : v;
            }
    }
    AS_STORED(out, map_elements(H, W, C));
    free(sums), free(scale), free(shift);
}

// x += h over n elements
static void add_forward(real *x, const real *h, size_t n) {
#pragma omp parallel for
    for (size_t i = 0; i < n; i++) x[i] += h[i];
}

// x = shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))))))
static void res_forward(real *x, real *n, real *h, const ResBlock *r, const Decoder *d, int H, int W) {
    group_norm_forward(n, x, &r->norm1, d, 1, H, W);
    conv_forward(h, n, &r->conv1, H, W);
    AS_STORED(h, map_elements(H, W, r->conv1.out));
    group_norm_forward(n, h, &r->norm2, d, 1, H, W);
    conv_forward(h, n, &r->conv2, H, W);
    size_t size = map_elements(H, W, r->conv1.out);
    if (r->shortcut.w) {
        conv_forward(n, x, &r->shortcut, H, W);
        memcpy(x, n, size * sizeof(real));
    }
    add_forward(x, h, size);
}

// Rows of pixels between a map with borders and a matrix [H W, C] without; to_map: into the map
static void map_rows(real *map, real *matrix, int to_map, int H, int W, int C) {
    for (int y = 0; y < H; y++) {
        real *a = map + map_at(y, 0, W, C), *b = matrix + (size_t)y * (size_t)W * (size_t)C;
        memcpy(to_map ? a : b, to_map ? b : a, (size_t)W * (size_t)C * sizeof(real));
    }
}

// x += proj(softmax(q k^T / sqrt(C)) v), q, k, v linear in norm(x): one head over the T = H W pixels
static void attn_forward(real *x, real *n, real *h, const AttnBlock *a, const Decoder *d, int H, int W) {
    int C = a->norm.channels, T = H * W;
    size_t t = (size_t)T, c = (size_t)C, r = softmax_row(T);
    real *qkv = (real *)alloc_zero(5 * t * c + t * r + (size_t)omp_get_max_threads() * attention_work(T, C),
                                   sizeof(real));
    real *in = qkv + 3 * t * c, *out = in + t * c, *att = out + t * c, *work = att + t * r;
    group_norm_forward(n, x, &a->norm, d, 0, H, W);
    map_rows(n, in, 0, H, W, C);
    matmul(qkv, in, a->qkv_w, a->qkv_b, T, 3 * C, C, 0, 1, 0);
    attention_forward(out, att, qkv, work, omp_get_max_threads(), 1, T, 1, C);
    matmul(in, out, a->proj_w, a->proj_b, T, C, C, 0, 1, 0);
    memset(h, 0, map_elements(H, W, C) * sizeof(real));
    map_rows(h, in, 1, H, W, C);
    add_forward(x, h, map_elements(H, W, C));
    free(qkv);
}

// n [2H+2,2W+2,C] = x [H+2,W+2,C], each pixel four times, with a border of zeros
static void upsample_forward(real *n, const real *x, int H, int W, int C) {
    size_t pixel = (size_t)C * sizeof(real), row = (size_t)(2 * W + 2) * pixel;
    memset(n, 0, row);
    memset(n + map_at(2 * H, -1, 2 * W, C), 0, row);
#pragma omp parallel for
    for (int y = 0; y < 2 * H; y++) {
        memset(n + map_at(y, -1, 2 * W, C), 0, pixel);
        for (int z = 0; z < 2 * W; z++)
            memcpy(n + map_at(y, z, 2 * W, C), x + map_at(y / 2, z / 2, W, C), pixel);
        memset(n + map_at(y, 2 * W, 2 * W, C), 0, pixel);
    }
}

// Between planes [C,H,W] and a map
static void planes_to_map(real *map, const real *planes, int H, int W, int C) {
    for (int ch = 0; ch < C; ch++)
        for (int y = 0; y < H; y++)
            for (int z = 0; z < W; z++) map[map_at(y, z, W, C) + (size_t)ch] = *planes++;
}
static void map_to_planes(real *planes, const real *map, int H, int W, int C) {
    for (int ch = 0; ch < C; ch++)
        for (int y = 0; y < H; y++)
            for (int z = 0; z < W; z++) *planes++ = map[map_at(y, z, W, C) + (size_t)ch];
}

// pixels a side for one of the latent's
static int decoder_factor(const Decoder *d) { return 1 << (d->levels - 1); }

// Elements of the largest map on the way from an h x w latent
static size_t decoder_map_elements(const Decoder *d, int h, int w) {
    size_t most = map_elements(h, w, imax(d->width, d->z));
    for (int l = d->levels - 1, k = 1; l >= 0; l--, k *= 2) {
        const Level *level = &d->level[l];
        size_t in = map_elements(h * k, w * k, imax(level->block[0].conv1.in, level->block[0].conv1.out));
        size_t up = level->up.w ? map_elements(2 * h * k, 2 * w * k, level->up.in) : 0;
        most = in > most ? in : most;
        most = up > most ? up : most;
    }
    size_t last = map_elements(h * decoder_factor(d), w * decoder_factor(d), d->out_ch);
    return last > most ? last : most;
}

// image [B,out_ch,f h,f w], about -1 ... 1, from latents z [B,z,h,w] (already divided by the latent scale); f
// is decoder_factor. Three maps are allocated: for 256 x 256 at full width 3 x 34 MB.
static void decoder_decode(real *image, const Decoder *d, const real *z, int B, int h, int w) {
    size_t map = decoder_map_elements(d, h, w), in = (size_t)d->z * (size_t)h * (size_t)w;
    real *x = (real *)alloc_zero(3 * map, sizeof(real)), *n = x + map, *t = n + map;
    for (int b = 0; b < B; b++) {
        int H = h, W = w;
        memset(x, 0, map_elements(H, W, d->z) * sizeof(real));
        planes_to_map(x, z + (size_t)b * in, H, W, d->z);
        conv_forward(t, x, &d->post_quant, H, W);
        memset(n, 0, map_elements(H, W, d->z) * sizeof(real));
        map_rows(t, x, 0, H, W, d->z), map_rows(n, x, 1, H, W, d->z);   // its border must be zero again
        AS_STORED(n, map_elements(H, W, d->z));
        conv_forward(x, n, &d->conv_in, H, W);
        res_forward(x, n, t, &d->mid1, d, H, W);
        attn_forward(x, n, t, &d->mid_attn, d, H, W);
        res_forward(x, n, t, &d->mid2, d, H, W);
        for (int l = d->levels - 1; l >= 0; l--) {
            const Level *level = &d->level[l];
            for (int i = 0; i < d->blocks; i++) {
                res_forward(x, n, t, &level->block[i], d, H, W);
                if (level->attn[i].qkv_w) attn_forward(x, n, t, &level->attn[i], d, H, W);
            }
            if (!level->up.w) continue;
            upsample_forward(n, x, H, W, level->up.in);
            H *= 2, W *= 2;
            AS_STORED(n, map_elements(H, W, level->up.in));
            conv_forward(x, n, &level->up, H, W);
        }
        group_norm_forward(n, x, &d->norm_out, d, 1, H, W);
        conv_forward(t, n, &d->conv_out, H, W);
        map_to_planes(image + (size_t)b * (size_t)d->out_ch * (size_t)H * (size_t)W, t, H, W, d->out_ch);
    }
    free(x);
}

// ----------------------------------------------------------------------------------------------------------
// Drawing

// What guidance costs is measured, by asking the network through here.
static const Backend *timed_backend;
static double timed_seconds[2];   // evaluations with a label, and without
static long timed_samples[2];
static void timed_velocity(Model *m, real *v, real *v_cls, const real *x, const real *cls, const real *t,
                           const int *y, int use_ema, int path_drop, int B) {
    double start = now_seconds();
    int unconditional = y[0] == m->c.num_classes;
    timed_backend->velocity(m, v, v_cls, x, cls, t, y, use_ema, path_drop, B);
    timed_seconds[unconditional] += now_seconds() - start, timed_samples[unconditional] += B;
}

// ----------------------------------------------------------------------------------------------------------
// Command line

typedef struct {
    const char *checkpoint, *sampler, *classes, *one_class, *decoder, *out, *separate, *npz, *latents, *score,
        *judge;
    int steps, num, batch, threads, scale, columns, raw, no_path_drop, random_classes, show, show_steps;
    double cfg, cls_cfg, low, high;
    uint64_t seed;
    char newest[PATH_MAX], pictures[PATH_MAX];   // checkpoint and output where none was given
} SampleRun;

#define SAMPLE_OPTION(name, field, kind, low, high, help)                                                    \
    { name, kind, offsetof(SampleRun, field), low, high, FREE, help, 0, NULL }
static const Option sample_options[] = {
    SAMPLE_OPTION(
        "sampler", sampler, TEXT, 0, 0,
        "em: stochastic Euler-Maruyama, as the paper scores; or the ODE with euler, heun or ab2 [em]"),
    SAMPLE_OPTION("steps", steps, WHOLE, 1, 1e6, "steps from noise to data; 250 to score"),
    SAMPLE_OPTION("cfg", cfg, NUMBER, 1, 1000, "classifier-free guidance; 1: none"),
    SAMPLE_OPTION("cls_cfg", cls_cfg, NUMBER, -1, 1000,
                  "guidance of the CLS vector, where --cfg is above 1; 0: none"),
    SAMPLE_OPTION("guidance_low", low, NUMBER, 0, 1, "guide only at times t from here, 0 is data ..."),
    SAMPLE_OPTION("guidance_high", high, NUMBER, 0, 1, "... to here, 1 is noise"),
    SAMPLE_OPTION("no_path_drop", no_path_drop, SWITCH, 0, 0,
                  "guide with the whole network instead of without its sparse blocks"),
    SAMPLE_OPTION("class", one_class, TEXT, 0, 0, "all of this class, or none: without a class"),
    SAMPLE_OPTION("classes", classes, TEXT, 0, 0, "these classes in turn, such as 0-9 or 1,4,7-9 [all]"),
    SAMPLE_OPTION("random_classes", random_classes, SWITCH, 0, 0, "classes drawn at random"),
    SAMPLE_OPTION("num", num, WHOLE, 0, 1e7,
                  "pictures; 0: 8 of each class, or 8 in all where there are over 20 classes"),
    SAMPLE_OPTION("seed", seed, SEED, 0, 9e15, "of everything random"),
    SAMPLE_OPTION("raw", raw, SWITCH, 0, 0, "the weights themselves instead of their moving average"),
    SAMPLE_OPTION("decoder", decoder, TEXT, 0, 0, "the decoder's weights, for checkpoints of INVAE latents"),
    SAMPLE_OPTION(
        "out", out, TEXT, 0, 0,
        "one PNG with all pictures [pictures.png beside the checkpoint, where nothing below is asked for]"),
    SAMPLE_OPTION("scale", scale, WHOLE, 0, 1000, "enlarge each pixel; 0: to 64 a side at least"),
    SAMPLE_OPTION("columns", columns, WHOLE, 0, 1e6,
                  "of the PNG; 0: one a class, up to 20, or nearly square"),
    SAMPLE_OPTION("separate", separate, TEXT, 0, 0, "folder for one PNG each"),
    SAMPLE_OPTION("npz", npz, TEXT, 0, 0,
                  "for the ADM evaluator; the same command goes on with what an interrupted one left"),
    SAMPLE_OPTION("latents", latents, TEXT, 0, 0, "safetensors with what the network made, undecoded"),
    SAMPLE_OPTION("score", score, TEXT, 0, 0,
                  "compare 10000 pictures, or --num, with the held-out ones of this data shard; by ab2, 6 "
                  "steps, unless --sampler or --steps is given"),
    SAMPLE_OPTION("judge", judge, TEXT, 0, 0, "the network that scores [the data set's own]"),
    SAMPLE_OPTION("show", show, SWITCH, 0, 0, "show the pictures in the terminal"),
    SAMPLE_OPTION("show_steps", show_steps, SWITCH, 0, 0, "and how they come out of the noise"),
    SAMPLE_OPTION("batch", batch, WHOLE, 0, 1e5, "pictures at a time; 0: what fits into 1 GB, at most 64"),
    SAMPLE_OPTION("threads", threads, WHOLE, 0, 4096, "CPU threads; 0: what OpenMP chooses"),
};
static OptionTable sample_table(SampleRun *r) {
    OptionTable t = {sample_options, sizeof(sample_options) / sizeof(sample_options[0]), r, NULL};
    return t;
}

static SampleRun sample_run_default(void) {
    SampleRun r;
    memset(&r, 0, sizeof(r));
    r.sampler = "em";
    r.steps = 50;
    r.cfg = 1;
    r.high = 1;
    r.seed = 1;
    return r;
}

static void sample_help(const char *program, SampleRun *r) {
    OptionTable table = sample_table(r);
    printf("Makes pictures from a checkpoint of train_srdit; without a path, from the newest run's.\n\n"
           "  %s out/checkpoint.safetensors --show\n"
           "  %s out/checkpoint.safetensors --classes 3,7 --cfg 2 --num 16 --out 3_and_7.png\n"
           "  %s out/checkpoint.safetensors --sampler heun --steps 10 --show-steps\n"
           "  %s out/checkpoint.safetensors --steps 250 --num 5000 --npz samples.npz\n\n"
           "Options, with their defaults in brackets:\n",
           program, program, program, program);
    options_print(&table, 0, 17);
    printf("\nThe same seed makes the same pictures whatever --batch and --threads are.\n");
}

static int evaluations_of(const SampleRun *r) {
    return strcmp(r->sampler, "heun") ? r->steps : 2 * r->steps - 1;
}

// Reads the command line; what contradicts itself is a mistake. Without an output it will be pictures.png
// beside the checkpoint; without a checkpoint the newest run's, which is named.
static void sample_flags(SampleRun *r, int argc, char **argv) {
    OptionTable table = sample_table(r);
    int given[sizeof(sample_options) / sizeof(sample_options[0])] = {0};
    table.given = given;
    options_parse(&table, 1, &r->checkpoint, argc, argv);
    if (strcmp(r->sampler, "em") && solver_of(r->sampler) < 0)
        die("--sampler %s: there is no such sampler; there are em, euler, heun and ab2", r->sampler);
    if (r->score && !given[option_find(&table, "sampler")] && !given[option_find(&table, "steps")])
        r->sampler = "ab2", r->steps = 6;   // as good a score as the paper's 50 steps (data/README.md)
    static const char *const guiding[] = {"cls_cfg", "guidance_low", "guidance_high", "no_path_drop"};
    for (int i = 0; i < 4 && r->cfg <= 1; i++)
        if (given[option_find(&table, guiding[i])]) {
            char flag[FLAG_BYTES];
            flag_of(flag, &sample_options[option_find(&table, guiding[i])]);
            die("%s changes nothing without guidance; --cfg above 1 guides", flag);
        }
    if (r->low > r->high) die("--guidance-low %g is above --guidance-high %g", r->low, r->high);
    if (!!r->classes + !!r->one_class + r->random_classes > 1)
        die("--class, --classes and --random-classes exclude each other");
    if (!r->checkpoint) {
        if (!newest_run(r->newest))
            die("which checkpoint? For example: %s out/checkpoint.safetensors (--help lists everything)",
                argv[0]);
        r->checkpoint = r->newest;
        printf("%s is the newest run's checkpoint\n", r->checkpoint);
    }
    int drawn = r->out || r->separate || r->show || r->show_steps || !(r->npz || r->latents || r->score);
    if (!drawn && (given[option_find(&table, "scale")] || given[option_find(&table, "columns")]))
        die("--scale and --columns are for PNGs and the terminal; nothing of these is asked for");
    if (r->judge && !r->score) die("--judge is for --score SHARD");
    if (r->out || r->separate || r->npz || r->latents || r->score) return;
    const char *slash = strrchr(r->checkpoint, '/');
    if (snprintf(r->pictures, sizeof(r->pictures), "%.*spictures.png",
                 slash ? (int)(slash + 1 - r->checkpoint) : 0, r->checkpoint) >= PATH_MAX)
        die("%s: the name is too long", r->checkpoint);
    r->out = r->pictures;
}

static int wants_pictures(const SampleRun *r) {
    return r->out || r->separate || r->npz || r->show || r->show_steps;
}

// ----------------------------------------------------------------------------------------------------------
// The checkpoint

// A model that can only be sampled from: one block of parameters, the EMA's or the raw ones, and nothing of
// the training.
static Model *sampling_model(const Backend *backend, const Config *c, int max_batch, const SafeFile *f,
                             const char *prefix, int raw) {
    Model *m;
    if (backend != &cpu_backend) {
        m = backend->create(c, max_batch, 0);
        real *host = (real *)alloc_zero(m->table.total, sizeof(real));
        backend->get_block(host, m, PARAMS);   // for the fixed tables
        checkpoint_block(host, &m->table, f, prefix);
        backend->put_block(m, host, raw ? PARAMS : EMA);
        free(host);
        return m;
    }
    m = model_allocate(c, max_batch, 0);
    for (int i = 0; i < m->table.count; i++)
        if (!m->table.tensors[i].trained)
            tensor_start(m->params + m->table.tensors[i].offset, &m->table.tensors[i], c, 0);
    checkpoint_block(m->params, &m->table, f, prefix);
    return m;
}

// 64 bits that change with any bit of the file's tensors whose names begin with prefix: FNV-1a of 8 bytes at
// a time, in pieces that threads can share. It tells apart two states of a checkpoint that keeps its name
// while training goes on.
static uint64_t fingerprint(const SafeFile *f, const char *prefix) {
    enum { PIECE = 1 << 20 };
    uint64_t all = 1469598103934665603u;
    for (int i = 0; i < f->count; i++) {
        const SafeTensor *t = &f->tensors[i];
        if (strncmp(t->name, prefix, strlen(prefix))) continue;
        size_t n = (size_t)(t->end - t->begin), pieces = (n + PIECE - 1) / PIECE;
        const uint8_t *data = (const uint8_t *)safe_data(f, t);
        uint64_t *hash = (uint64_t *)alloc_zero(pieces, sizeof(uint64_t));
#pragma omp parallel for
        for (size_t p = 0; p < pieces; p++) {
            size_t end = (p + 1) * PIECE < n ? (p + 1) * PIECE : n;
            uint64_t h = 1469598103934665603u;
            for (size_t k = p * PIECE; k < end; k += 8) {
                uint64_t word = 0;
                memcpy(&word, data + k, end - k < 8 ? end - k : 8);
                h = (h ^ word) * 1099511628211u, h ^= h >> 29;
            }
            hash[p] = h;
        }
        for (size_t p = 0; p < pieces; p++) all = (all ^ hash[p]) * 1099511628211u, all ^= all >> 29;
        free(hash);
    }
    return all;
}

// What is sampled from: a checkpoint and, where its latents are not pixels, their decoder
typedef struct {
    SafeFile *file;
    Config c;
    const char *prefix;              // of the names of the weights that are used
    const char *step, *data;         // what the file says of its training
    Decoder *decoder;                // NULL: the latents are pixels, or stay latents
    double scale, offset;            // model's units = decoder's * scale + offset
    int H, W, channels;              // of a picture
    uint64_t print, decoder_print;   // fingerprints
} Source;

static void source_decoder(Source *s, const SampleRun *r) {
    SafeFile *f = safe_open(r->decoder);
    s->decoder = decoder_open(f, "");
    if (safe_number(f, "latent_scale", s->scale) != s->scale)
        die("%s: its latent_scale is %s, but that of %s is %g: they do not belong together", r->decoder,
            safe_metadata(f, "latent_scale"), r->checkpoint, s->scale);
    if (s->decoder->z != s->c.in_channels)
        die("%s: it decodes %d channels, but %s makes %d", r->decoder, s->decoder->z, r->checkpoint,
            s->c.in_channels);
    if (s->decoder->out_ch != 1 && s->decoder->out_ch != 3)
        die("%s: its pictures have %d channels", r->decoder, s->decoder->out_ch);
    s->decoder_print = fingerprint(f, "");
    safe_close(f);
    s->channels = s->decoder->out_ch;
    s->H = s->W = s->c.input_size * decoder_factor(s->decoder);
}

// Opens the checkpoint, and the decoder if pictures are wanted that need one; the network's weights are not
// read yet.
static void source_open(Source *s, const SampleRun *r) {
    const char *path = r->checkpoint;
    memset(s, 0, sizeof(*s));
    s->c = config_default();
    s->file = checkpoint_open(path, &s->c);
    int is_export = !strcmp(safe_metadata(s->file, "format"), "srdit-export-1");
    if (is_export && r->raw)
        die("%s: an export holds only the moving average; --raw needs a checkpoint", path);
    s->prefix = is_export ? "" : r->raw ? "model." : "ema.";
    checkpoint_check(s->file, &s->c, s->prefix);
    s->print = fingerprint(s->file, s->prefix);
    s->step = safe_metadata(s->file, "step");
    s->data = safe_metadata(s->file, "data");
    s->H = s->W = s->c.input_size;
    s->channels = s->c.in_channels;
    s->scale = safe_number(s->file, "latent_scale", 1);
    s->offset = safe_number(s->file, "latent_offset", 0);
    if (s->scale == 0 || !(fabs(s->scale) < INFINITY) || !(fabs(s->offset) < INFINITY))
        die("%s: latent_scale %g, latent_offset %g are not usable", path, s->scale, s->offset);

    const char *kind = safe_metadata(s->file, "decoder");
    int pixels = !kind || !strcmp(kind, "pixels");
    if (!pixels && strcmp(kind, "invae"))
        die("%s: its decoder is \"%s\", which is neither pixels nor invae", path, kind);
    if (pixels && r->decoder)
        die("--decoder %s: the checkpoint was trained on pixels, which need no decoder", r->decoder);
    if (!wants_pictures(r)) return;
    if (pixels && s->channels != 1 && s->channels != 3)
        die("%s: %d channels are no picture; --latents FILE keeps them", path, s->channels);
    if (!pixels && !r->decoder)
        die("%s makes latents of the INVAE: --decoder FILE turns them into pictures (dev/convert.py makes "
            "one), --latents FILE keeps them",
            path);
    if (!pixels) source_decoder(s, r);
}

static void source_close(Source *s) {
    if (s->decoder) decoder_close(s->decoder);
    safe_close(s->file);
}

// pixels [n,H,W,channels] of x [n,C,S,S]
static void view(uint8_t *pixels, const Source *s, const double *x, size_t n) {
    if (!s->decoder) {
        pixels_of(pixels, x, (int)n, s->channels, s->H, s->W);
        return;
    }
    size_t latent = (size_t)latent_of(&s->c), size = (size_t)s->H * (size_t)s->W * (size_t)s->channels;
    real *z = (real *)alloc_zero(latent, sizeof(real)), *image = (real *)alloc_zero(size, sizeof(real));
    double *planes = (double *)alloc_zero(size, sizeof(double));
    for (size_t b = 0; b < n; b++) {
        for (size_t i = 0; i < latent; i++) z[i] = (real)((x[b * latent + i] - s->offset) / s->scale);
        decoder_decode(image, s->decoder, z, 1, s->c.input_size, s->c.input_size);
        for (size_t i = 0; i < size; i++) planes[i] = image[i];
        pixels_of(pixels + b * size, planes, 1, s->channels, s->H, s->W);
    }
    free(z);
    free(image);
    free(planes);
}

// ----------------------------------------------------------------------------------------------------------
// What is drawn: classes, their places, and the settings that decide every bit of it

// Who draws: this file, or sample.cu on a GPU
typedef struct Outputs Outputs;
typedef struct {
    const Backend *backend;
    enum Dtype type;   // of the numbers that products read
    int (*choose_batch)(const SampleRun *, const Config *, int num);
    double (*draw_all)(Outputs *, const Backend *, Model *, Sampling *, int batch);
} Painter;

// The classes of a list such as "1,4,7-9", and `none`, which is class K: they are counted; classes NULL: only
// that.
static int class_list(int *classes, const char *list, int K) {
    int n = 0;
    const char *p = list;
    do {
        char *end;
        long first, last;
        if (!strncmp(p, "none", 4)) first = last = K, end = (char *)p + 4;
        else {
            if (!isdigit((unsigned char)*p))
                die("classes \"%s\": a list such as 0-9 or 1,4,7-9 is expected", list);
            first = last = strtol(p, &end, 10);
            const char *second = p;
            if (*end == '-' && isdigit((unsigned char)end[1])) last = strtol(second = end + 1, &end, 10);
            if (first >= K) second = p;
            if (first >= K || last >= K)
                die("classes \"%s\": there is no class %.*s; there are 0 to %d", list,
                    (int)strspn(second, "0123456789"), second, K - 1);
            if (last < first) die("classes \"%s\": %ld-%ld runs backwards", list, first, last);
        }
        if (*end && (*end != ',' || !end[1]))
            die("classes \"%s\": a list such as 0-9 or 1,4,7-9 is expected", list);
        if (n > 10000000) die("classes \"%s\": too many", list);
        for (long i = first; i <= last; i++, n++)
            if (classes) classes[n] = (int)i;
        p = *end ? end + 1 : NULL;
    } while (p);
    return n;
}

typedef struct {
    int *y, num;        // a class for each picture; K is "no class"
    int kinds;          // how many classes there are among them
    const char *text;   // what was asked for
} Classes;

static Classes choose_classes(const SampleRun *r, const Config *c) {
    Classes k;
    const char *list = r->one_class ? r->one_class : r->classes;
    int K = c->num_classes, count = list ? class_list(NULL, list, K) : 0;
    if (list && strlen(list) >= sizeof(((SafePair *)0)->value))
        die("--classes: the list is longer than the %zu characters that are kept with the pictures",
            sizeof(((SafePair *)0)->value) - 1);
    if (r->one_class && count > 1)
        die("--class %s is more than one class; --classes takes a list", r->one_class);
    int *classes = (int *)alloc_zero((size_t)count, sizeof(int));
    if (list) class_list(classes, list, K);
    k.kinds = list ? count : K;
    k.num = r->num ? r->num : r->score ? 10000 : k.kinds <= 20 ? 8 * k.kinds : 8;
    k.text = list ? list : r->random_classes ? "random" : "balanced";
    k.y = (int *)alloc_zero((size_t)k.num, sizeof(int));
    for (int i = 0; i < k.num; i++) {
        uint64_t random = draw4(r->seed, STREAM_SAMPLE_LABEL, 0, (uint32_t)i, 0).v[0];
        k.y[i] = list ? classes[i % count] : r->random_classes ? (int)(random * (uint64_t)K >> 32) : i % K;
    }
    free(classes);
    return k;
}

typedef struct {
    int columns, scale, gap;
} Layout;   // of the grid, in pictures and in pixels

static Layout choose_layout(const SampleRun *r, const Source *s, const Classes *k) {
    Layout l;
    l.scale = r->scale ? r->scale : imax(1, (63 + s->W) / s->W);
    l.gap = imax(2, s->W * l.scale / 32);
    int one_a_class = k->kinds > 1 && k->kinds <= 20 && !r->random_classes;
    l.columns = r->columns ? r->columns : one_a_class ? k->kinds : (int)ceil(sqrt(k->num));
    l.columns = imin(l.columns, k->num);
    return l;
}

static Sampling sampling_of(const SampleRun *r) {
    Sampling s = sampling_default();
    s.steps = r->steps;
    s.cfg = r->cfg;
    s.cls_cfg = r->cls_cfg;
    s.low = r->low;
    s.high = r->high;
    s.seed = r->seed;
    s.use_ema = !r->raw;
    s.path_drop = !r->no_path_drop;
    return s;
}

static void warn_about_guidance(const Sampling *s, const Config *c) {
    if (s->cfg <= 1) return;
    if (!c->label_dropout)
        fprintf(stderr, "warning: this checkpoint was trained without label dropout; guidance by a network "
                        "that has never seen \"no class\" is arbitrary\n");
    if (s->path_drop && !c->path_drop)
        fprintf(stderr, "warning: this checkpoint was trained without path drop; --no-path-drop guides "
                        "with the whole network\n");
}

// The settings that go into the PNG, the .npz and the latents: first those that pictures depend on, then what
// the numbers of latents mean.
enum { MAX_SETTINGS = 24 };
typedef struct {
    SafePair pairs[MAX_SETTINGS];
    int count, decisive;
} Settings;

__attribute__((format(printf, 3, 4))) static void settings_add(Settings *s, const char *key,
                                                               const char *format, ...) {
    SafePair p = pair_text(key, "");
    va_list args;
    va_start(args, format);
    vsnprintf(p.value, sizeof(p.value), format, args);
    va_end(args);
    s->pairs[s->count++] = p;
}

static Settings settings_of(const SampleRun *r, const Source *s, const Classes *k, const Painter *painter) {
    Settings t;
    t.count = 0;
    const char *base = strrchr(r->checkpoint, '/');
    settings_add(&t, "Software", "SR-DiT in C and CUDA");
    settings_add(&t, "checkpoint", "%s", base ? base + 1 : r->checkpoint);
    settings_add(&t, "step", "%s", s->step ? s->step : "?");
    settings_add(&t, "weights", "%s %016llx", r->raw ? "raw" : "EMA", (unsigned long long)s->print);
    if (s->decoder) settings_add(&t, "decoder", "invae %016llx", (unsigned long long)s->decoder_print);
    else settings_add(&t, "decoder", "pixels");
    settings_add(&t, "seed", "%llu", (unsigned long long)r->seed);
    settings_add(&t, "num", "%d", k->num);
    settings_add(&t, "classes", "%s", k->text);
    settings_add(&t, "sampler", "%s", r->sampler);
    settings_add(&t, "steps", "%d", r->steps);
    settings_add(&t, "cfg", "%.17g", r->cfg);
    settings_add(&t, "cls_cfg", "%.17g", r->cls_cfg);
    settings_add(&t, "guidance_low", "%.17g", r->low);
    settings_add(&t, "guidance_high", "%.17g", r->high);
    settings_add(&t, "path_drop", "%d", !r->no_path_drop);
    settings_add(&t, "build", "%s, %s, vectors of %d bytes", painter->backend->name,
                 dtypes[painter->type].name, (int)VBYTES);
    t.decisive = t.count;
    settings_add(&t, "space", "model");
    settings_add(&t, "latent_scale", "%.17g", s->scale);
    settings_add(&t, "latent_offset", "%.17g", s->offset);
    settings_add(&t, "data", "%s", s->data ? s->data : "unnamed");
    return t;
}

// Those that pictures depend on, a line each; the caller frees.
static char *settings_text(const Settings *s) {
    char *text = NULL;
    size_t bytes = 0;
    FILE *out = open_memstream(&text, &bytes);
    if (!out) die("out of memory");
    for (int i = 0; i < s->decisive; i++) fprintf(out, "%s: %s\n", s->pairs[i].key, s->pairs[i].value);
    fclose(out);
    return text;
}

// ----------------------------------------------------------------------------------------------------------
// Where pictures go. Pictures are bytes, [height, width, channels], channels 1 (grey) or 3.

// Ends the program early, before hours of sampling, where `path` cannot become a file.
static void check_output(const char *path, const char *flag) {
    char folder[PATH_MAX];
    struct stat st;
    if (!*path || snprintf(folder, sizeof(folder), "%s", path) >= PATH_MAX - 16)
        die("%s: the name is empty or too long", flag);
    if (!stat(path, &st) && !S_ISREG(st.st_mode))
        die("%s %s: there is something of that name that is not a file", flag, path);
    char *slash = strrchr(folder, '/');
    if (!slash) snprintf(folder, sizeof(folder), ".");
    else slash[slash == folder] = 0;
    if (stat(folder, &st) || !S_ISDIR(st.st_mode))
        die("%s %s: there is no folder %s; make it with: mkdir -p %s", flag, path, folder, folder);
    if (access(folder, W_OK))
        die("%s %s: the folder %s cannot be written to: %s", flag, path, folder, strerror(errno));
}

// Latents as a safetensors file, written as a stream: `latents` F32 [N,C,S,S] in the model's units, then
// `labels` I32 [N]
static NewFile latents_open(const char *path, const Config *c, int n, const SafePair *pairs, int count) {
    SafeItem items[2] = {{"latents", F32, 4, {n, c->in_channels, c->input_size, c->input_size}, NULL},
                         {"labels", I32, 1, {n}, NULL}};
    return safe_begin(path, pairs, count, items, 2);
}
static void latents_put(NewFile *l, const double *x, size_t n) {
    for (size_t i = 0; i < n; i++) {
        float value = (float)x[i];
        fwrite(&value, 4, 1, l->file);
    }
    if (fflush(l->file)) {
        int error = errno;
        file_abandon(l);
        die("%s: cannot be written: %s", l->path, strerror(error));
    }
}
static void latents_close(NewFile *l, const int *y, int n) {
    for (int i = 0; i < n; i++) put_le(l->file, 4, (uint64_t)(uint32_t)y[i]);
    file_end(l);
}

struct Outputs {
    const SampleRun *r;
    const Source *source;
    const Classes *classes;
    const Settings *settings;
    Layout layout;
    Grid grid;         // for --out
    NewFile png;       // the same
    Npz npz;           // for --npz
    NewFile latents;   // for --latents
    real *scored;      // for --score, all pictures in the model's units
    uint8_t *shown;    // for --show, the first shown_count pictures
    int shown_count;
    int fresh;         // something other than the .npz wants all pictures
    int first;         // those before it are in the .npz already
    size_t size;       // bytes of a picture
    uint8_t *pixels;   // a batch of them
    double decoding;   // seconds
};

// Ends the program early, before hours of sampling, where a picture could not be written.
static void outputs_check(const SampleRun *r, const Source *s, const Layout *l, int num) {
    if (r->out) {
        check_output(r->out, "--out");
        if (strlen(r->out) < 5 || strcmp(r->out + strlen(r->out) - 4, ".png"))
            die("--out %s: pictures are PNG, so the name must end in .png", r->out);
        double width = (double)l->columns * (s->W * l->scale + l->gap);
        double rows = (num + l->columns - 1) / l->columns;
        if (width * rows * (s->H * l->scale + l->gap) > 4e8 || width > 1e6)
            die("--out %s: %d pictures in one are too many; --separate DIR or --npz FILE takes any number",
                r->out, num);
    }
    if (r->npz) check_output(r->npz, "--npz");
    if (r->latents) check_output(r->latents, "--latents");
    if (same_output(r->out, r->npz) || same_output(r->out, r->latents) || same_output(r->npz, r->latents))
        die("--out, --npz and --latents need a file each");
    const char *const inputs[] = {r->checkpoint, r->decoder, r->score, r->judge};
    for (int i = 0; i < 4; i++) {
        refuse_input("--out", r->out, inputs[i]);
        refuse_input("--npz", r->npz, inputs[i]);
        refuse_input("--latents", r->latents, inputs[i]);
    }
    refuse_foreign("--out", r->out, "\x89PNG");
    refuse_foreign("--npz", r->npz, npz_member);
    refuse_foreign("--latents", r->latents, "SR-DiT in C");
    if (r->separate) make_folder(r->separate);
    if (r->separate && access(r->separate, W_OK))
        die("--separate %s: the folder cannot be written to: %s", r->separate, strerror(errno));
    if (r->separate && folder_lock(r->separate) < 0)   // kept to the program's end
        die("--separate %s: another program is writing there; give this one another folder", r->separate);
}

// An .npz goes on where it stopped if nothing else wants the pictures that it has.
static void outputs_open(Outputs *o, const SampleRun *r, const Source *s, const Classes *k,
                         const Settings *settings, const Layout *l, int batch) {
    memset(o, 0, sizeof(*o));
    o->r = r;
    o->source = s;
    o->classes = k;
    o->settings = settings;
    o->layout = *l;
    o->size = (size_t)s->H * (size_t)s->W * (size_t)s->channels;
    o->pixels = (uint8_t *)alloc_zero((size_t)batch, o->size);
    o->shown_count = r->show ? imin(k->num, s->decoder ? 4 : 10 * l->columns) : 0;
    o->shown = (uint8_t *)alloc_zero((size_t)o->shown_count, o->size);
    o->fresh = r->out || r->separate || r->latents || r->show || r->score;
    if (r->score) o->scored = (real *)alloc_zero((size_t)k->num * (size_t)latent_of(&s->c), sizeof(real));
    if (r->npz) {
        char *text = settings_text(settings);
        o->first = (int)npz_open(&o->npz, r->npz, (uint64_t)k->num, s->H, s->W, text);
        free(text);
    }
    if (o->first && o->fresh)
        die("%s" PART " is what an interrupted run left; it goes on without --out, --separate, --latents, "
            "--score and --show, which need all pictures; delete it to begin anew",
            r->npz);
    if (o->first) printf("%s" PART " has the first %d pictures already\n", r->npz, o->first);
    if (r->out) {
        o->grid = grid_create(k->num, s->W, s->H, s->channels, l->columns, l->scale, l->gap);
        o->png = file_begin(r->out);
    }
    if (r->latents) o->latents = latents_open(r->latents, &s->c, k->num, settings->pairs, settings->count);
}

// Picture i in a file of its own, with its class and number among the settings
static void put_separate(const Outputs *o, int i, const uint8_t *pixels) {
    const Source *s = o->source;
    char name[PATH_MAX];
    if (snprintf(name, sizeof(name), "%s/%06d.png", o->r->separate, i) >= PATH_MAX)
        die("%s: the name is too long", o->r->separate);
    Settings t = *o->settings;
    settings_add(&t, "index", "%d", i);
    settings_add(&t, "class", "%d", o->classes->y[i]);
    Grid one = grid_of_all(pixels, 1, s->W, s->H, s->channels, 1, o->r->scale ? o->r->scale : 1, 0);
    png_write(name, &one.p, t.pairs, t.count);
    free(one.p.pixels);
}

// Nothing is left of files that cannot go on; the .npz can.
static void outputs_abandon(const Outputs *o) {
    if (o->r->latents) file_abandon(&o->latents);
    if (o->r->out) file_abandon(&o->png);
}

// Pictures i ... i + n - 1, x [n,C,S,S], to every place; pixels [n,H,W,channels], NULL: they are made here
static void outputs_put(Outputs *o, const double *x, const uint8_t *pixels, int i, int n) {
    const SampleRun *r = o->r;
    size_t latent = (size_t)latent_of(&o->source->c);
    for (size_t k = 0; k < (size_t)n * latent; k++)
        if (!(fabs(x[k]) < INFINITY)) {
            outputs_abandon(o);
            die("picture %zu is not made of finite numbers: the checkpoint's weights are of no use, or "
                "guidance is too strong",
                (size_t)i + k / latent);
        }
    if (r->latents) latents_put(&o->latents, x, (size_t)n * latent);
    for (size_t k = 0; r->score && k < (size_t)n * latent; k++)
        o->scored[(size_t)i * latent + k] = (real)x[k];
    if (!wants_pictures(r)) return;
    if (!pixels) {
        double start = now_seconds();
        view(o->pixels, o->source, x, (size_t)n);
        o->decoding += now_seconds() - start;
        pixels = o->pixels;
    }
    if (r->npz) npz_put(&o->npz, pixels, (size_t)n, o->source->channels);
    for (int k = 0; k < n; k++, pixels += o->size) {
        if (r->out) grid_put(&o->grid, i + k, pixels);
        if (i + k < o->shown_count) memcpy(o->shown + (size_t)(i + k) * o->size, pixels, o->size);
        if (r->separate) put_separate(o, i + k, pixels);
    }
}

// Gives the files their names, and says so.
static void outputs_close(Outputs *o) {
    const SampleRun *r = o->r;
    const Config *c = &o->source->c;
    int num = o->classes->num, columns = o->layout.columns;
    if (r->latents) {
        latents_close(&o->latents, o->classes->y, num);
        printf("%s: latents [%d,%d,%d,%d] and labels\n", r->latents, num, c->in_channels, c->input_size,
               c->input_size);
    }
    if (r->npz) {
        npz_close(&o->npz);
        printf("%s: arr_0 [%d,%d,%d,3]\n", r->npz, num, o->source->H, o->source->W);
    }
    if (r->out) {
        png_end(&o->png, &o->grid.p, o->settings->pairs, o->settings->count);
        printf("%s: %d x %d pixels, %d pictures in %d column%s\n", r->out, o->grid.p.width, o->grid.p.height,
               num, columns, columns > 1 ? "s" : "");
        free(o->grid.p.pixels);
    }
    if (r->separate) printf("%s/000000.png ... %06d.png\n", r->separate, num - 1);
    free(o->pixels);
}

static void outputs_score(Outputs *o, Scoring *scoring) {
    const Classes *k = o->classes;
    Scores made = scores_of(scoring, "the samples", o->scored, k->y, (size_t)k->num, 0);
    scores_table(scoring, made, (size_t)k->num);
    scoring_close(scoring);
}

// The first pictures, in the terminal
static void outputs_show(Outputs *o) {
    const Source *s = o->source;
    const Layout *l = &o->layout;
    enum Terminal terminal = terminal_kind();
    if (o->shown_count && terminal == HALF_BLOCKS)
        pictures_show(o->shown, o->shown_count, s->H, s->W, s->channels, l->columns);
    else if (o->shown_count) {
        Grid g = grid_of_all(o->shown, o->shown_count, s->W, s->H, s->channels,
                             imin(l->columns, o->shown_count), imax(1, l->scale / 2), imax(1, l->gap / 2));
        picture_send(&g.p, terminal);
        free(g.p.pixels);
    }
    free(o->shown);
}

// ----------------------------------------------------------------------------------------------------------
// The run

// What the callback of the samplers needs: it keeps the line with the time left, draws the steps, and ends on
// Ctrl-C.
typedef struct {
    const Outputs *out;
    int done, n;          // pictures before this batch, and in it
    int draw;             // pictures of the first batch whose steps are drawn; 0 from the second on
    int line;             // the line with the time left stands there
    int told;             // the first batch has ended
    double begin, last;   // times: of the start, of that line
} Watch;

// The first n pictures of x after this step, in the terminal, over those of the step before
static void watch_draw(const Outputs *o, int step, int steps, const double *x, int n) {
    const Source *s = o->source;
    uint8_t *pixels = (uint8_t *)alloc_zero((size_t)n, o->size);
    view(pixels, s, x, (size_t)n);
    printf("step %d/%d\x1b[K\n", step, steps);
    int lines = 1 + pictures_show(pixels, n, s->H, s->W, s->channels, o->layout.columns);
    if (isatty(STDOUT_FILENO) && step < steps) printf("\x1b[%dA", lines);
    fflush(stdout);
    free(pixels);
}

static int watch(int step, int steps, const double *x, void *user) {
    Watch *w = (Watch *)user;
    const Outputs *o = w->out;
    int total = o->classes->num, slow = o->source->decoder != NULL;
    if (interrupted) {
        const char *npz = o->fresh ? NULL : o->r->npz;   // that can go on
        if (w->line) fprintf(stderr, "\n");
        outputs_abandon(o);
        fprintf(stderr, "interrupted after %d of %d pictures%s%s%s\n", w->done, total,
                npz ? "; they are in " : "", npz ? npz : "",
                npz ? PART ", and the same command goes on from there" : "");
        exit(130);
    }
    int each = slow || !isatty(STDOUT_FILENO) ? imax(1, steps / 8) : 1;
    if (w->draw && (step % each == 0 || step == steps)) {
        watch_draw(o, step, steps, x, imin(w->n, slow ? 1 : w->draw));
        if (step == steps) w->draw = 0;
    }
    double now = now_seconds(), part = w->done + w->n * (double)step / steps;
    if (w->draw || !isatty(STDERR_FILENO) || (now - w->last < 0.1 && part < total)) return 0;
    double left = (now - w->begin) / (part - o->first) * (total - part);
    w->last = now;
    w->line = 1;
    fprintf(stderr, "\r%d of %d pictures, step %d/%d, %d:%02d left \x1b[K", w->done, total, step, steps,
            (int)left / 60, (int)left % 60);
    return 0;
}

static Watch watch_begin(const Outputs *o) {
    Watch w;
    memset(&w, 0, sizeof(w));
    w.out = o;
    w.draw = o->r->show_steps ? 2 * o->layout.columns : 0;
    w.begin = now_seconds();
    return w;
}
// After the first batch of several, which ended with picture `done`: how long all of them will take
static void watch_first(Watch *w, int done) {
    const Outputs *o = w->out;
    double seconds = now_seconds() - w->begin;
    int made = done - o->first, left = o->classes->num - done;
    if (w->told || left <= 0) return;
    w->told = 1;
    seconds *= (double)left / made;
    if (seconds < 60) return;
    if (w->line) fprintf(stderr, "\r\x1b[K");
    printf("%.2f hours for the other %d pictures, if they go as the first %d went\n", seconds / 3600, left,
           made);
    fflush(stdout);
}
// The seconds that it took
static double watch_end(const Watch *w) {
    if (w->line) fprintf(stderr, "\r\x1b[K");
    return now_seconds() - w->begin;
}

// How many pictures at a time: what was asked for, or what fits into a gigabyte
static int choose_batch(const SampleRun *r, const Config *c, int num) {
    Acts none;
    Arena count = {NULL, 0};
    acts_layout(&none, &count, c, 1, 1);
    double fit = 1e9 / ((double)count.used * sizeof(real));
    return imin(r->batch ? r->batch : imax(1, imin(64, (int)fit)), num);
}

static void print_plan(const SampleRun *r, const Source *s, const Model *m, const Classes *k, double loaded) {
    int S = s->c.input_size;
    printf("%s: step %s of %s, %s weights, %.1f MB read in %.2f s\n", r->checkpoint, s->step ? s->step : "?",
           s->data ? s->data : "unnamed data", r->raw ? "raw" : "EMA", (double)m->parameter_bytes / 1e6,
           loaded);
    if (s->decoder)
        printf("%s: %d x %d to %d x %d pixels, %.0f MB of weights, %.0f MB of maps\n", r->decoder, S, S, s->H,
               s->W, (double)s->decoder->weight_bytes / 1e6,
               3.0 * (double)decoder_map_elements(s->decoder, S, S) * sizeof(real) / 1e6);
    printf("sampler %s, %d steps, %d evaluations; ", r->sampler, r->steps, evaluations_of(r));
    if (r->cfg > 1)
        printf("cfg %g, cls-cfg %g, t %g to %g, path drop %s; ", r->cfg, r->cls_cfg, r->low, r->high,
               r->no_path_drop ? "off" : "on");
    else printf("no guidance; ");
    printf("%d pictures, classes %s, seed %llu\n", k->num, k->text, (unsigned long long)r->seed);
    fflush(stdout);
}

// Additions and multiplications of an evaluation, all tokens through all blocks or, path drop, without the
// sparse ones
static double evaluation_flops(const Config *c, int path_drop) {
    Config whole = *c;
    whole.routing = whole.align = 0;
    if (path_drop) whole.depth = c->num_f + c->num_h;
    return forward_flops(&whole);
}
// Of a picture from an h x w latent: convolutions and attention
static double conv_flops(const Conv *c, double pixels) {
    return c->w ? 2.0 * c->taps * c->taps * c->in * c->out * pixels : 0;
}
static double attn_flops(const AttnBlock *a, double pixels) {
    double C = a->norm.channels;
    return a->qkv_w ? 8 * pixels * C * C + 4 * pixels * pixels * C : 0;
}
static double res_flops(const ResBlock *r, double pixels) {
    return conv_flops(&r->conv1, pixels) + conv_flops(&r->conv2, pixels) + conv_flops(&r->shortcut, pixels);
}
static double decoder_flops(const Decoder *d, int h, int w) {
    double pixels = (double)h * w;
    double sum = conv_flops(&d->post_quant, pixels) + conv_flops(&d->conv_in, pixels) +
                 res_flops(&d->mid1, pixels) + attn_flops(&d->mid_attn, pixels) + res_flops(&d->mid2, pixels);
    for (int l = d->levels - 1; l >= 0; l--) {
        const Level *level = &d->level[l];
        for (int i = 0; i < d->blocks; i++)
            sum += res_flops(&level->block[i], pixels) + attn_flops(&level->attn[i], pixels);
        if (!level->up.w) continue;
        pixels *= 4;
        sum += conv_flops(&level->up, pixels);
    }
    return sum + conv_flops(&d->conv_out, pixels);
}

// What there is to compute, and what it would take at the peak of the card, where that is known
static void print_work(const SampleRun *r, const Source *s, const Classes *k, const Backend *backend) {
    double evaluations = evaluations_of(r), S = s->c.input_size,
           guided = r->cfg > 1 ? evaluations * (r->high - r->low) : 0;   // nearly: times may be shifted
    double drawing =
               evaluations * evaluation_flops(&s->c, 0) + guided * evaluation_flops(&s->c, !r->no_path_drop),
           decoding = s->decoder ? decoder_flops(s->decoder, (int)S, (int)S) : 0,
           all = (drawing + decoding) * k->num, peak = backend->peak ? backend->peak() : 0;
    printf("by arithmetic %.4g TFLOP a picture, %.4g of them for decoding; %.4g in all",
           (drawing + decoding) / 1e12, decoding / 1e12, all / 1e12);
    if (peak > 0) printf(": %.2f hours if the card's peak could be reached", all / peak / 3600);
    printf("\n");
    fflush(stdout);
}

// One batch, s->first and the y of its pictures on: x [n,C,S,S], cls [n,Z]
static void draw_batch(double *x, double *cls, const Backend *backend, Model *m, const Sampling *s,
                       const char *sampler, const int *y, Watch *w) {
    sampler_noise(x, cls, &m->c, s, 0, w->n);
    if (!strcmp(sampler, "em")) sample_euler_maruyama(x, cls, backend, m, s, y, w->n, watch, w);
    else sample_ode(x, cls, backend, m, s, (enum Solver)solver_of(sampler), y, w->n, watch, w);
}

// Draws all pictures, batch by batch, into the outputs; returns the seconds that it took.
static double draw_all(Outputs *o, const Backend *backend, Model *m, Sampling *s, int batch) {
    const Config *c = &m->c;
    int num = o->classes->num;
    double *x = (double *)alloc_zero((size_t)batch * (size_t)latent_of(c), sizeof(double));
    double *cls = (double *)alloc_zero((size_t)batch * (size_t)c->z_dim, sizeof(double));
    Backend timed = *backend;
    timed_backend = backend;
    timed.velocity = timed_velocity;
    Watch w = watch_begin(o);
    for (int i = o->first; i < num; i += w.n) {
        w.n = imin(batch, num - i);
        w.done = s->first = i;
        draw_batch(x, cls, &timed, m, s, o->r->sampler, o->classes->y + i, &w);
        outputs_put(o, x, NULL, i, w.n);
        watch_first(&w, i + w.n);
    }
    free(x);
    free(cls);
    return watch_end(&w);
}

// What it took, and what guidance adds
static void print_times(const Outputs *o, const Sampling *s, double seconds) {
    const Config *c = &o->source->c;
    int made = o->classes->num - o->first;
    printf("%.2f s, %.1f pictures/s", seconds, made / seconds);
    if (o->source->decoder && made) printf(", of which decoding %.2f s a picture", o->decoding / made);
    printf("\n");
    if (!timed_samples[0] || !timed_samples[1]) return;
    double with = 1e3 * timed_seconds[0] / (double)timed_samples[0];
    double without = 1e3 * timed_seconds[1] / (double)timed_samples[1];
    printf("guidance: an evaluation with the class takes %.3f ms a picture, one without %.3f ms "
           "(%.0f %%), %d of %d blocks%s\n",
           with, without, 100 * without / with, s->path_drop ? c->num_f + c->num_h : c->depth, c->depth,
           s->path_drop ? ": path drop" : "");
}

// What the samples are compared with, if they can be
static Scoring *scoring_for(const SampleRun *r, const Source *s, const Classes *k) {
    if (s->decoder || s->H != s->c.input_size)
        die("--score is for pixels; pictures of ImageNet are scored from an .npz");
    if (k->num <= NEIGHBOURS) die("--score: %d pictures are too few to be scored", k->num);
    Scoring *scoring = scoring_open(r->score, r->judge);
    const Data *d = scoring->data;
    if (d->C != s->c.in_channels || d->S != s->c.input_size || d->scale != s->scale || d->offset != s->offset)
        die("%s: its pictures are not of the kind that %s makes", r->score, r->checkpoint);
    for (int i = 0; i < k->num; i++)
        if (k->y[i] >= d->K) die("--score: picture %d has no class that could be judged", i);
    return scoring;
}

static const Painter cpu_painter = {&cpu_backend, sizeof(real) == 4 ? F32 : F64, choose_batch, draw_all};

static int sample_main(int argc, char **argv, const Painter *painter) {
    const Backend *backend = painter->backend;
    SampleRun r = sample_run_default();
    memory_hint = "; a smaller --batch needs less";
    argv = split_words(&argc, argv);
    if (wants_help(argc, argv)) {
        sample_help(argv[0], &r);
        check_output_taken();
        return 0;
    }
    sample_flags(&r, argc, argv);
    use_threads(r.threads);

    double begin = now_seconds();
    Source source;
    source_open(&source, &r);
    Classes classes = choose_classes(&r, &source.c);
    Layout layout = choose_layout(&r, &source, &classes);
    outputs_check(&r, &source, &layout, classes.num);
    Scoring *scoring = r.score ? scoring_for(&r, &source, &classes) : NULL;
    int batch = painter->choose_batch(&r, &source.c, classes.num);
    int at_once = painter != &cpu_painter && r.cfg > 1 ? 2 * batch : batch;   // with a class and without
    Model *m = sampling_model(backend, &source.c, at_once, source.file, source.prefix, r.raw);
    double loaded = now_seconds() - begin;

    Sampling sampling = sampling_of(&r);
    Settings settings = settings_of(&r, &source, &classes, painter);
    warn_about_guidance(&sampling, &source.c);
    print_plan(&r, &source, m, &classes, loaded);
    print_work(&r, &source, &classes, backend);

    Outputs outputs;
    outputs_open(&outputs, &r, &source, &classes, &settings, &layout, batch);
    catch_interrupts(0);
    double seconds = painter->draw_all(&outputs, backend, m, &sampling, batch);
    outputs_close(&outputs);
    release_interrupts();   // all is written; scores can be had again
    print_times(&outputs, &sampling, seconds);
    if (scoring) outputs_score(&outputs, scoring);
    outputs_show(&outputs);

    backend->destroy(m);
    source_close(&source);
    free(classes.y);
    check_output_taken();
    return 0;
}

#ifndef SAMPLE_NO_MAIN
int main(int argc, char **argv) {
    guard_streams();
    wait_calmly(argv);
    return sample_main(argc, argv, &cpu_painter);
}
#endif
