// From a checkpoint to pictures on a GPU: the sampler and the INVAE decoder of sample.c, beside which it
// is to be read.
//
// What this file is: the kernels of the decoder, those that a sampler's step needs, and the loop that draws
// batch after batch. The network, the product by cuBLASLt and the memory's arena are train_srdit.cu's;
// command line, files and everything else are sample.c's, which this file includes.
//
//   make sample_cu && ./sample_cu out/checkpoint.safetensors --show
//   make sample_emu       this file on a CPU (dev/cuda_on_cpu)
//
// Functions have the names of sample.c and train_srdit.c, in their order. What is different here:
//
//   there                                here
//   a map has a border of zeros, and     no borders: [B,H,W,C]. The nine neighbours of each pixel of a
//   a convolution reads it in place      stretch are copied side by side (patches_kernel), then one product;
//                                        the stretch is so short that they stay in the second-level cache
//   upsample_forward                     fused: patches_kernel reads each pixel four times
//   add_forward                          fused: a block's last product adds to x
//   attention_forward                    two products and softmax_kernel, since the only head is 512 wide
//   sampler_noise, guided_velocity,      fused: euler_maruyama_kernel, ode_kernel; the state stays on the
//   euler_maruyama_step                  device until a picture is done
//   two evaluations, with and without    one, of twice the samples; path drop skips the sparse blocks of the
//   a class                              second half
//   outputs_put after a batch            while the next batch is drawn
//
// What is stored how: the residual stream x of the decoder, its image and all statistics in float; what
// products read, and what a block's first convolution writes, in floatX; the sampler's state in double, as
// there. Random numbers have the same addresses, so sample 17 of a seed is the same picture but for rounding.
// No atomics.
//
// Letters: B pictures of H x W pixels with C channels. Bytes and FLOPs of the full decoder: dev/README.md.
#ifdef __GNUC__
#pragma GCC diagnostic ignored "-Wunused-function"   // this program does not train
#endif
#define TRAIN_SRDIT_CU_NO_MAIN
#include "train_srdit.cu"
#define SAMPLE_NO_TRAINER
#ifndef SAMPLE_NO_MAIN
#define SAMPLE_CU_MAIN
#define SAMPLE_NO_MAIN
#endif
#include "sample.c"

namespace gpu {

// ----------------------------------------------------------------------------------------------------------
// The decoder's weights on the device, from those that sample.c has read and checked

// Channels that no norm divides (the latents', the image's) are padded to a multiple of 8 with zeros, so that
// rows are aligned as tensor cores want them.
typedef struct {
    int taps, in, out;
    floatX *w;   // [out, taps, taps, in]
    float *b;    // [out], and rounded
    floatX *b_low;
} Conv;
typedef struct {
    int channels;
    float *w, *b;
} Norm;
typedef struct {
    Norm norm1, norm2;
    Conv conv1, conv2, shortcut;
} ResBlock;   // shortcut.w NULL: none
typedef struct {
    Norm norm;
    Conv qkv, proj;
} AttnBlock;   // qkv.w NULL: none
typedef struct {
    ResBlock block[MAX_RES];
    AttnBlock attn[MAX_RES];
    Conv up;
} Level;
typedef struct {
    int levels, blocks, groups, out_ch, h, w, at_once;   // of h x w latents, at_once at a time
    double eps;
    Conv post_quant, conv_in, conv_out;
    ResBlock mid1, mid2;
    AttnBlock mid_attn;
    Level level[MAX_LEVELS];
    Norm norm_out;
    float *x, *x2, *image;   // maps: of the residual stream, in turn; the image, padded
    floatX *n, *t;           // what a product reads, what it wrote
    floatX *patches;         // [patch_rows, 9C]
    size_t patch_room;       // numbers
    floatX *qkv, *att;       // [B,T,3C], [B,T,T]
    float *scores;           // [B,T,T]
    float2 *parts;           // [B,chunks,groups] sums of a norm
    float *scale, *shift;    // [B,C] of a norm
    uint8_t *pixels;         // [B,H,W,out_ch]
    char *memory;
    size_t bytes;
} Decoder;

// Patches in memory at a time: half of an H100's second-level cache
static size_t patch_bytes = (size_t)24 << 20;
enum { NORM_PIXELS = 64, NORM_MOST = 1024 };   // pixels that a block adds up; channels of a norm at most

static int padded(int channels) { return (channels + 7) / 8 * 8; }

// n numbers to the device, as they are and rounded
static void upload(float *to, floatX *low, const float *from, size_t n) {
    if (to) CHECK(cudaMemcpy(to, from, n * sizeof(float), cudaMemcpyHostToDevice));
    if (!low) return;
    floatX *rounded = (floatX *)alloc_zero(n, sizeof(floatX));
    for (size_t i = 0; i < n; i++) rounded[i] = (floatX)from[i];
    CHECK(cudaMemcpy(low, rounded, n * sizeof(floatX), cudaMemcpyHostToDevice));
    free(rounded);
}

// Memory for a convolution; where the arena has any, w [out, taps, taps, in] and b are uploaded to it
static void conv_take(Conv *c, DeviceArena *m, int taps, int in, int out, const float *w, const float *b) {
    size_t n = (size_t)out * (size_t)(taps * taps) * (size_t)in;
    c->taps = taps;
    c->in = in;
    c->out = out;
    take(c->w, m, n);
    take(c->b, m, (size_t)out);
    take(c->b_low, m, (size_t)out);
    if (!m->base) return;
    upload(NULL, c->w, w, n);
    upload(c->b, c->b_low, b, (size_t)out);
}

// The weight of output o, kernel row ky, input k of taps * in, from the panels of sample.c
static real conv_weight(const ::Conv *c, int o, int ky, int k) {
    int q = 0;
    while (conv_cut(c, q + 1) <= k) q++;
    int k0 = conv_cut(c, q), kc = conv_cut(c, q + 1) - k0;
    size_t panels = (size_t)((c->out + NR - 1) / NR),
           before = (size_t)ky * (size_t)(c->taps * c->in) + (size_t)k0;
    const real *block = c->w + before * panels * NR;
    return block[(size_t)(o / NR) * NR * (size_t)kc + (size_t)(k - k0) * NR + (size_t)(o % NR)];
}
static void conv_open(Conv *c, DeviceArena *m, const ::Conv *from, int in, int out) {
    if (!from->w) return;
    int taps = from->taps;
    size_t row = (size_t)(taps * in);
    if (!m->base) {
        conv_take(c, m, taps, in, out, NULL, NULL);
        return;
    }
    float *w = (float *)alloc_zero((size_t)out * (size_t)taps * row, sizeof(float));
    float *b = (float *)alloc_zero((size_t)out, sizeof(float));
    memcpy(b, from->b, (size_t)from->out * sizeof(float));
#pragma omp parallel for
    for (int o = 0; o < from->out; o++)
        for (int ky = 0; ky < taps; ky++)
            for (int k = 0; k < taps * from->in; k++)
                w[((size_t)(o * taps) + (size_t)ky) * row + (size_t)(k / from->in * in + k % from->in)] =
                    conv_weight(from, o, ky, k);
    conv_take(c, m, taps, in, out, w, b);
    free(w), free(b);
}

static void norm_open(Norm *n, DeviceArena *m, const ::Norm *from) {
    n->channels = from->channels;
    if (n->channels % 4 || n->channels > NORM_MOST)
        die("a decoder with maps of %d channels: the GPU's kernels take multiples of 4 up to %d; ./sample "
            "decodes it on the CPU",
            n->channels, NORM_MOST);
    take(n->w, m, (size_t)n->channels);
    take(n->b, m, (size_t)n->channels);
    if (!m->base) return;
    upload(n->w, NULL, from->w, (size_t)n->channels);
    upload(n->b, NULL, from->b, (size_t)n->channels);
}

static void res_open(ResBlock *r, DeviceArena *m, const ::ResBlock *from) {
    norm_open(&r->norm1, m, &from->norm1);
    conv_open(&r->conv1, m, &from->conv1, from->conv1.in, from->conv1.out);
    norm_open(&r->norm2, m, &from->norm2);
    conv_open(&r->conv2, m, &from->conv2, from->conv2.in, from->conv2.out);
    conv_open(&r->shortcut, m, &from->shortcut, from->shortcut.in, from->shortcut.out);
}

static void attn_open(AttnBlock *a, DeviceArena *m, const ::AttnBlock *from) {
    if (!from->qkv_w) return;
    int C = from->norm.channels;
    norm_open(&a->norm, m, &from->norm);
    conv_take(&a->qkv, m, 1, C, 3 * C, from->qkv_w, from->qkv_b);
    conv_take(&a->proj, m, 1, C, C, from->proj_w, from->proj_b);
}

// What the maps of one picture need at most, in numbers: largest map, patches of 64 pixels, squared pixels
// and pixels x channels of attention
typedef struct {
    size_t map, patches, square, wide, pixels;
} MapSizes;
static void sizes_of_conv(MapSizes *s, const Conv *c, int H, int W) {
    size_t pixels = (size_t)H * (size_t)W;
    s->map = largest(s->map, pixels * (size_t)imax(c->in, c->out));
    if (c->taps > 1) s->patches = largest(s->patches, 64 * (size_t)(c->taps * c->taps * c->in));
    s->pixels = largest(s->pixels, pixels);
}
static void sizes_of_attn(MapSizes *s, const AttnBlock *a, int H, int W) {
    size_t T = (size_t)H * (size_t)W;
    if (!a->qkv.out) return;
    s->square = largest(s->square, T * T);
    s->wide = largest(s->wide, T * (size_t)a->qkv.out);
}
static MapSizes map_sizes(const Decoder *d) {
    MapSizes s = {0, 0, 0, 0, 0};
    int H = d->h, W = d->w;
    sizes_of_conv(&s, &d->post_quant, H, W), sizes_of_conv(&s, &d->conv_in, H, W);
    sizes_of_conv(&s, &d->mid1.conv1, H, W), sizes_of_attn(&s, &d->mid_attn, H, W);
    for (int l = d->levels - 1; l >= 0; l--) {
        for (int i = 0; i < d->blocks; i++) {
            sizes_of_conv(&s, &d->level[l].block[i].conv1, H, W);
            sizes_of_conv(&s, &d->level[l].block[i].conv2, H, W);
            sizes_of_attn(&s, &d->level[l].attn[i], H, W);
        }
        if (!d->level[l].up.out) continue;
        H *= 2, W *= 2;
        sizes_of_conv(&s, &d->level[l].up, H, W);
    }
    sizes_of_conv(&s, &d->conv_out, H, W);
    return s;
}

// All memory, walked twice: first to count, then to set the pointers and to upload the weights
static void decoder_layout(Decoder *d, DeviceArena *m, const ::Decoder *from) {
    int z = padded(from->z);
    conv_open(&d->post_quant, m, &from->post_quant, z, z);
    conv_open(&d->conv_in, m, &from->conv_in, z, from->conv_in.out);
    res_open(&d->mid1, m, &from->mid1);
    attn_open(&d->mid_attn, m, &from->mid_attn);
    res_open(&d->mid2, m, &from->mid2);
    for (int l = d->levels - 1; l >= 0; l--) {
        const ::Level *level = &from->level[l];
        for (int i = 0; i < d->blocks; i++) {
            res_open(&d->level[l].block[i], m, &level->block[i]);
            attn_open(&d->level[l].attn[i], m, &level->attn[i]);
        }
        conv_open(&d->level[l].up, m, &level->up, level->up.in, level->up.out);
    }
    norm_open(&d->norm_out, m, &from->norm_out);
    conv_open(&d->conv_out, m, &from->conv_out, from->conv_out.in, padded(from->out_ch));
    MapSizes s = map_sizes(d);
    size_t B = (size_t)d->at_once, chunks = (s.pixels + NORM_PIXELS - 1) / NORM_PIXELS;
    d->patch_room = largest(s.patches, patch_bytes / sizeof(floatX));
    take(d->x, m, B * s.map);
    take(d->x2, m, B * s.map);
    take(d->image, m, B * s.pixels * (size_t)d->conv_out.out);
    take(d->n, m, B * s.map);
    take(d->t, m, B * s.map);
    take(d->patches, m, d->patch_room);
    take(d->qkv, m, B * s.wide);
    take(d->att, m, B * s.square);
    take(d->scores, m, B * s.square);
    take(d->parts, m, B * chunks * (size_t)d->groups);
    take(d->scale, m, B * NORM_MOST);
    take(d->shift, m, B * NORM_MOST);
    take(d->pixels, m, B * s.pixels * (size_t)d->out_ch);
}

// A decoder of h x w latents, `at_once` pictures at a time or fewer where memory is short
static Decoder *decoder_create(const ::Decoder *from, int h, int w, int at_once) {
    Decoder *d = (Decoder *)alloc_zero(1, sizeof(Decoder));
    d->levels = from->levels, d->blocks = from->blocks, d->groups = from->groups, d->out_ch = from->out_ch;
    d->eps = from->eps;
    d->h = h, d->w = w;
    size_t free_bytes, all_bytes;
    CHECK(cudaMemGetInfo(&free_bytes, &all_bytes));
    DeviceArena arena = {NULL, 0, 0, NULL};
    for (d->at_once = at_once; d->at_once; d->at_once /= 2) {
        arena.used = 0;
        decoder_layout(d, &arena, from);
        if (arena.used <= free_bytes) break;
    }
    if (!d->at_once)
        die("the decoder needs %.1f GB, but the GPU has %.1f left; a smaller --batch leaves more",
            (double)arena.used / 1e9, (double)free_bytes / 1e9);
    d->bytes = arena.used;
    d->memory = memory_take(&arena, d);
    decoder_layout(d, &arena, from);
    return d;
}
static void decoder_destroy(Decoder *d) {
    CHECK(cudaDeviceSynchronize());
    memory_free(d->memory, d);
    free(d);
}

// ----------------------------------------------------------------------------------------------------------
// The decoder's layers

// patches[rows, 9C]: for each of the `count` / 9C pixels from `first` on, its 3 x 3 neighbours in the maps in
// [B,H,W,C], zeros outside; up: in is [B,H/2,W/2,C], each pixel of it four. A thread four channels. 2 bytes
// read (nine times, mostly from cache), 2 written an element of patches; bound by the second-level cache.
__global__ void __launch_bounds__(256) patches_kernel(floatX *patches, const floatX *in, unsigned first,
                                                      unsigned count, int H, int W, int C, int up) {
    unsigned e = blockIdx.x * 256 + threadIdx.x, quads = (unsigned)C / 4;
    if (e >= count / 4) return;
    unsigned c = e % quads * 4, tap = e / quads % 9, pixel = first + e / quads / 9;
    int z = (int)(pixel % (unsigned)W + tap % 3) - 1,
        y = (int)(pixel / (unsigned)W % (unsigned)H + tap / 3) - 1;
    size_t b = pixel / (unsigned)W / (unsigned)H;
    Vec4 v = {};
    if (z >= 0 && z < W && y >= 0 && y < H)
        v = load4(in +
                  ((b * (size_t)(H >> up) + (size_t)(y >> up)) * (size_t)(W >> up) + (size_t)(z >> up)) * C +
                  c);
    store4(patches + (size_t)e * 4, v);
}

// out [B,H,W,out] (+)= convolution of in [B,H,W,in]; up: of in [B,H/2,W/2,in], enlarged
template <class E>
static void conv_forward(E *out, const floatX *in, const Conv *c, const Decoder *d, int add, int up, int B,
                         int H, int W) {
    const E *bias = sizeof(E) == sizeof(float) ? (const E *)c->b : (const E *)c->b_low;
    int pixels = B * H * W, K = c->taps * c->taps * c->in, most = pixels;
    if (c->taps > 1) most = imin(pixels, (int)(d->patch_room / (size_t)K) / 64 * 64);
    for (int first = 0; first < pixels; first += most) {
        int rows = imin(most, pixels - first);
        const floatX *a = in + (size_t)first * (size_t)c->in;
        if (c->taps > 1) {
            unsigned count = (unsigned)rows * (unsigned)K;
            patches_kernel<<<(count / 4 + 255) / 256, 256, 0, stream>>>(d->patches, in, (unsigned)first,
                                                                        count, H, W, c->in, up);
            LAUNCHED();
            a = d->patches;
        }
        GemmKey k = gemm_key(rows, c->out, K, 0, 1);
        k.add = add;
        matmul<E>(k, out + (size_t)first * (size_t)c->out, a, c->w, bias);
    }
}

// parts[B,chunks,G] = sum and sum of squares over a chunk of NORM_PIXELS pixels and a group of C / G
// channels. A block a chunk, a thread four channels of some of its pixels. 2 or 4 bytes read; bound by
// memory.
template <class S>
__global__ void __launch_bounds__(256)
    group_sums_kernel(float2 *parts, const S *x, int pixels, int C, int G) {
    __shared__ float sums[1024];
    __shared__ float squares[1024];
    int quads = C / 4, lanes = 256 / quads, lane = threadIdx.x / quads, c = threadIdx.x % quads * 4;
    int p0 = blockIdx.x * NORM_PIXELS, p1 = min(p0 + NORM_PIXELS, pixels);
    const S *at = x + (size_t)blockIdx.y * pixels * C + c;
    Vec4 sum = {}, square = {};
    for (int p = p0 + lane; p < p1 && lane < lanes; p += lanes) {
        Vec4 v = load4(at + (size_t)p * C);
        for (int j = 0; j < 4; j++) sum.x[j] += v.x[j], square.x[j] += v.x[j] * v.x[j];
    }
    for (int j = 0; j < 4 && lane < lanes; j++) {
        sums[lane * C + c + j] = sum.x[j];
        squares[lane * C + c + j] = square.x[j];
    }
    __syncthreads();
    for (int g = threadIdx.x; g < G; g += 256) {
        float2 all = make_float2(0, 0);
        for (int i = 0; i < lanes; i++)
            for (int k = g * (C / G); k < (g + 1) * (C / G); k++)
                all.x += sums[i * C + k], all.y += squares[i * C + k];
        parts[((size_t)blockIdx.y * gridDim.x + blockIdx.x) * G + g] = all;
    }
}
// scale, shift [B,C] with GroupNorm(x) = x scale + shift. A block a picture, a thread a group. The chunks'
// sums are added in double, as the CPU adds all; latency bounds it.
__global__ void __launch_bounds__(256)
    group_scale_kernel(float *scale, float *shift, const float2 *parts, const float *w, const float *b,
                       int chunks, int pixels, int C, int G, double eps) {
    for (int g = threadIdx.x; g < G; g += 256) {
        double sum = 0, square = 0, n = (double)pixels * (C / G);
        for (int i = 0; i < chunks; i++) {
            float2 part = parts[((size_t)blockIdx.x * chunks + i) * G + g];
            sum += part.x, square += part.y;
        }
        double mean = sum / n, variance = square / n - mean * mean, r = 1 / sqrt(fmax(variance, 0.0) + eps);
        for (int k = g * (C / G); k < (g + 1) * (C / G); k++) {
            scale[(size_t)blockIdx.x * C + k] = (float)(w[k] * r);
            shift[(size_t)blockIdx.x * C + k] = (float)(b[k] - mean * w[k] * r);
        }
    }
}
// out = x scale + shift, then SiLU where silu. A thread four channels. 2 or 4 bytes read, 2 written; bound by
// memory.
template <class S>
__global__ void __launch_bounds__(256)
    group_apply_kernel(floatX *out, const S *x, const float *scale, const float *shift, int silu, int pixels,
                       int C, size_t count) {
    size_t e = ((size_t)blockIdx.x * 256 + threadIdx.x) * 4;
    if (e >= count) return;
    size_t at = e / ((size_t)pixels * C) * C + e % C;
    Vec4 v = load4(x + e), s = load4(scale + at), t = load4(shift + at);
    for (int j = 0; j < 4; j++) {
        v.x[j] = v.x[j] * s.x[j] + t.x[j];
        if (silu) v.x[j] = activate<SILU>(v.x[j]);
    }
    store4(out + e, v);
}
static unsigned blocks_of(size_t threads) { return (unsigned)((threads + 255) / 256); }

// out = GroupNorm(x), then SiLU where silu
template <class S>
static void group_norm_forward(floatX *out, const S *x, const Norm *norm, const Decoder *d, int silu, int B,
                               int H, int W) {
    int C = norm->channels, pixels = H * W, chunks = div_up(pixels, NORM_PIXELS);
    size_t count = (size_t)B * (size_t)pixels * (size_t)C;
    dim3 grid((unsigned)chunks, (unsigned)B);
    group_sums_kernel<S><<<grid, 256, 0, stream>>>(d->parts, x, pixels, C, d->groups);
    LAUNCHED();
    group_scale_kernel<<<(unsigned)B, 256, 0, stream>>>(d->scale, d->shift, d->parts, norm->w, norm->b,
                                                        chunks, pixels, C, d->groups, d->eps);
    LAUNCHED();
    group_apply_kernel<S>
        <<<blocks_of(count / 4), 256, 0, stream>>>(out, x, d->scale, d->shift, silu, pixels, C, count);
    LAUNCHED();
}

// x = shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))))))
static void res_forward(Decoder *d, const ResBlock *r, int B, int H, int W) {
    group_norm_forward<float>(d->n, d->x, &r->norm1, d, 1, B, H, W);
    conv_forward<floatX>(d->t, d->n, &r->conv1, d, 0, 0, B, H, W);
    if (r->shortcut.w) {
        cast(d->n, d->x, (size_t)(B * H * W) * (size_t)r->shortcut.in);
        conv_forward<float>(d->x2, d->n, &r->shortcut, d, 0, 0, B, H, W);
        float *x = d->x;
        d->x = d->x2, d->x2 = x;
    }
    group_norm_forward<floatX>(d->n, d->t, &r->norm2, d, 1, B, H, W);
    conv_forward<float>(d->x, d->n, &r->conv2, d, 1, 0, B, H, W);
}

// att [rows,T] = softmax(scores [rows,T] * scale). A warp a row. 4 bytes read (again from cache), 2 written.
__global__ void __launch_bounds__(256)
    softmax_kernel(floatX *att, const float *scores, int rows, int T, float scale) {
    int row = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    const float *s = scores + (size_t)row * T;
    float top = -INFINITY, sum = 0;
    for (int i = lane; i < T; i += 32) top = fmaxf(top, s[i]);
    for (int m = 1; m < 32; m *= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, m));
    for (int i = lane; i < T; i += 32) sum += expf((s[i] - top) * scale);
    sum = sum_lanes<32>(sum);
    for (int i = lane; i < T; i += 32) store(&att[(size_t)row * T + i], expf((s[i] - top) * scale) / sum);
}

// x += proj(softmax(q k^T / sqrt(C)) v), q, k, v linear in norm(x): one head over the T = H W pixels
static void attn_forward(Decoder *d, const AttnBlock *a, int B, int H, int W) {
    int C = a->norm.channels, T = H * W;
    group_norm_forward<float>(d->n, d->x, &a->norm, d, 0, B, H, W);
    conv_forward<floatX>(d->qkv, d->n, &a->qkv, d, 0, 0, B, H, W);
    GemmKey k = gemm_key(T, T, C, 0, 1);
    k.lda = k.ldb = 3 * C;
    k.batch = B;
    k.stepa = k.stepb = (int64_t)T * 3 * C;
    k.stepc = (int64_t)T * T;
    matmul<float>(k, d->scores, d->qkv, d->qkv + C, NULL);
    softmax_kernel<<<(unsigned)div_up(B * T, 8), 256, 0, stream>>>(d->att, d->scores, B * T, T,
                                                                   1 / sqrtf((float)C));
    LAUNCHED();
    k = gemm_key(T, C, T, 0, 0);
    k.ldb = 3 * C;
    k.batch = B;
    k.stepa = (int64_t)T * T;
    k.stepb = (int64_t)T * 3 * C;
    k.stepc = (int64_t)T * C;
    matmul<floatX>(k, d->t, d->att, d->qkv + 2 * C, NULL);
    conv_forward<float>(d->x, d->t, &a->proj, d, 1, 0, B, H, W);
}

// map [B,h,w,C], its channels from z on zero, of planes [B,z,h,w]: decoder's units = (model's - offset) /
// scale
__global__ void __launch_bounds__(256)
    planes_to_map_kernel(floatX *map, const double *planes, double scale, double offset, int z, int C,
                         int pixels, int count) {
    int e = blockIdx.x * 256 + threadIdx.x, c = e % C, p = e / C % pixels, b = e / C / pixels;
    if (e >= count) return;
    store(&map[e], c < z ? (float)((planes[((size_t)b * z + c) * pixels + p] - offset) / scale) : 0);
}
// pixels [n,channels] as bytes, of an image whose rows are C long
__global__ void __launch_bounds__(256)
    pixels_kernel(uint8_t *pixels, const float *image, int channels, int C, size_t count) {
    size_t e = (size_t)blockIdx.x * 256 + threadIdx.x;
    if (e < count) pixels[e] = pixel_of(image[e / channels * C + e % channels]);
}

// d->image [B,f h,f w,padded out_ch], about -1 ... 1, and d->pixels of it, from the latents x [B,z,h,w] in
// the model's units, B <= at_once. All on the device.
static void decoder_decode(Decoder *d, const double *x, int z, double scale, double offset, int B) {
    int H = d->h, W = d->w, count = B * H * W * d->post_quant.in;
    planes_to_map_kernel<<<blocks_of((size_t)count), 256, 0, stream>>>(d->n, x, scale, offset, z,
                                                                       d->post_quant.in, H * W, count);
    LAUNCHED();
    conv_forward<floatX>(d->t, d->n, &d->post_quant, d, 0, 0, B, H, W);
    conv_forward<float>(d->x, d->t, &d->conv_in, d, 0, 0, B, H, W);
    res_forward(d, &d->mid1, B, H, W);
    attn_forward(d, &d->mid_attn, B, H, W);
    res_forward(d, &d->mid2, B, H, W);
    for (int l = d->levels - 1; l >= 0; l--) {
        const Level *level = &d->level[l];
        for (int i = 0; i < d->blocks; i++) {
            res_forward(d, &level->block[i], B, H, W);
            if (level->attn[i].qkv.w) attn_forward(d, &level->attn[i], B, H, W);
        }
        if (!level->up.w) continue;
        cast(d->n, d->x, (size_t)(B * H * W) * (size_t)level->up.in);
        H *= 2, W *= 2;
        conv_forward<float>(d->x, d->n, &level->up, d, 0, 1, B, H, W);
    }
    group_norm_forward<float>(d->n, d->x, &d->norm_out, d, 1, B, H, W);
    conv_forward<float>(d->image, d->n, &d->conv_out, d, 0, 0, B, H, W);
    size_t bytes = (size_t)B * (size_t)(H * W) * (size_t)d->out_ch;
    pixels_kernel<<<blocks_of(bytes), 256, 0, stream>>>(d->pixels, d->image, d->out_ch, d->conv_out.out,
                                                        bytes);
    LAUNCHED();
}

// ----------------------------------------------------------------------------------------------------------
// Samplers. A state's count of numbers is n latents' or n CLS vectors', `each` of them a sample's. A thread
// has four neighbours of one sample, whose noise is one draw.

// Where a step's noise lies
typedef struct {
    uint64_t seed;
    uint32_t stream, step, first;
} Address;
__device__ __forceinline__ void normals(float *z, const Address &a, uint32_t sample, uint32_t block) {
    Philox r = draw4(a.seed, a.stream, a.step, a.first + sample, block);
    normal2(z, r.v[0], r.v[1]), normal2(z + 2, r.v[2], r.v[3]);
}

// x [n,each] = standard normals; a row of blocks a sample
__global__ void __launch_bounds__(256) sampler_noise_kernel(double *x, const Address at, int each) {
    uint32_t i = blockIdx.x * 256 + threadIdx.x;
    if (i * 4 >= (uint32_t)each) return;
    float z[4];
    normals(z, at, blockIdx.y, i);
    for (int j = 0; j < 4 && (int)i * 4 + j < each; j++) x[(size_t)blockIdx.y * each + i * 4 + j] = z[j];
}

// What the network reads: in [halves,count] = x rounded, once or twice; t [times] all t
__global__ void __launch_bounds__(256)
    sampler_input_kernel(float *in, float *times, const double *x, size_t count, int halves, int n, float t) {
    size_t e = (size_t)blockIdx.x * 256 + threadIdx.x;
    if (e < (size_t)n && times) times[e] = t;
    for (int i = 0; i < halves && e < count; i++) in[i * count + e] = (float)x[e];
}

// v_u + w (v_c - v_u), of v [2,count]; w 0: v_c
__device__ __forceinline__ float guided(const float *v, size_t e, size_t count, double w) {
    return w ? (float)(v[count + e] + w * ((double)v[e] - v[count + e])) : v[e];
}

// x += (v - t score) dt + sqrt(2t) sqrt(|dt|) eps, score = -((1 - t) v + x) / t; last: without eps. 8 + 4 (8)
// bytes read, 8 written a number.
__global__ void __launch_bounds__(256)
    euler_maruyama_kernel(double *x, const float *velocity, double w, double t, double dt, int last,
                          const Address at, int each) {
    uint32_t i = blockIdx.x * 256 + threadIdx.x;
    if (i * 4 >= (uint32_t)each) return;
    size_t count = (size_t)gridDim.y * each;
    float eps[4] = {};
    if (!last) normals(eps, at, blockIdx.y, i);
    for (int j = 0; j < 4 && (int)i * 4 + j < each; j++) {
        size_t e = (size_t)blockIdx.y * each + i * 4 + j;
        double v = guided(velocity, e, count, w), score = -((1 - t) * v + x[e]) / t, drift = v - t * score;
        x[e] += drift * dt + (last ? 0 : sqrt(2 * t) * sqrt(fabs(dt)) * eps[j]);
    }
}

// to[e] = x + (v + (v - before) r) dt, of v alone where r is 0; keep: `before` becomes v
__global__ void __launch_bounds__(256)
    ode_kernel(double *to, const double *x, float *before, const float *velocity, double w, double dt,
               double r, int keep, size_t count) {
    size_t e = (size_t)blockIdx.x * 256 + threadIdx.x;
    if (e >= count) return;
    double v = guided(velocity, e, count, w);
    to[e] = x[e] + dt * (r ? v + (v - before[e]) * r : v);
    if (keep) before[e] = (float)v;
}

enum { AHEAD = 4 };   // steps that are queued before the oldest must have ended
typedef struct {
    double *x, *cls, *x2, *cls2;   // [n,C,S,S], [n,Z]: the state, and Heun's between two evaluations
    float *before, *before_cls;    // the velocities of the evaluation before
    char *memory;
    cudaEvent_t step_done[AHEAD];
} SamplerWork;
static void sampler_layout(SamplerWork *w, DeviceArena *m, const Config *c, int n) {
    size_t latent = (size_t)n * (size_t)latent_of(c), Z = (size_t)n * (size_t)c->z_dim;
    take(w->x, m, latent), take(w->x2, m, latent), take(w->before, m, latent);
    take(w->cls, m, Z), take(w->cls2, m, Z), take(w->before_cls, m, Z);
}
static SamplerWork *sampler_work(const Config *c, int n) {
    SamplerWork *w = (SamplerWork *)alloc_zero(1, sizeof(SamplerWork));
    DeviceArena arena = {NULL, 0, 0, NULL};
    sampler_layout(w, &arena, c, n);
    w->memory = memory_take(&arena, w);
    sampler_layout(w, &arena, c, n);
    for (int i = 0; i < AHEAD; i++) CHECK(cudaEventCreate(&w->step_done[i]));
    return w;
}
static void sampler_work_free(SamplerWork *w) {
    CHECK(cudaDeviceSynchronize());
    for (int i = 0; i < AHEAD; i++) CHECK(cudaEventDestroy(w->step_done[i]));
    memory_free(w->memory, w);
    free(w);
}

// Velocities of n samples at x, cls and time t into g->in.noise and g->a.cls_out: with their classes
// (g->in.y), and behind them, where the step is guided, without. Returns whether it is.
static int guided_velocity(GpuModel *g, const Sampling *s, const double *x, const double *cls, double t,
                           int n) {
    const Config *c = &g->base.c;
    int is_guided = s->cfg > 1 && t >= s->low && t <= s->high, halves = 1 + is_guided;
    size_t latent = (size_t)n * (size_t)latent_of(c), Z = (size_t)n * (size_t)c->z_dim,
           all = (size_t)halves * latent;
    sampler_input_kernel<<<blocks_of(largest(latent, (size_t)(halves * n))), 256, 0, stream>>>(
        g->in.x, g->in.t, x, latent, halves, halves * n, (float)t);
    LAUNCHED();
    if (c->cls) {
        sampler_input_kernel<<<blocks_of(Z), 256, 0, stream>>>(g->in.cls, NULL, cls, Z, halves, 0, 0);
        LAUNCHED();
    }
    network_forward(g, s->use_ema ? &g->w_ema : &g->w, 0, is_guided && s->path_drop ? n : halves * n,
                    halves * n);
    unpatchify_kernel<<<blocks_of(all), 256, 0, stream>>>(g->in.noise, g->a.out_patches, c->in_channels,
                                                          c->input_size, c->patch_size, all);
    LAUNCHED();
    return is_guided;
}

// The state of n samples as it starts: noise
static void sampler_noise(SamplerWork *w, const Config *c, const Sampling *s, int n) {
    const Address at = {s->seed, STREAM_SAMPLE_X, 0, (uint32_t)s->first},
                  cls_at = {s->seed, STREAM_SAMPLE_CLS, 0, (uint32_t)s->first};
    dim3 grid(blocks_of((size_t)(latent_of(c) + 3) / 4), (unsigned)n),
        cls_grid(blocks_of((size_t)(c->z_dim + 3) / 4), (unsigned)n);
    sampler_noise_kernel<<<grid, 256, 0, stream>>>(w->x, at, latent_of(c));
    LAUNCHED();
    sampler_noise_kernel<<<cls_grid, 256, 0, stream>>>(w->cls, cls_at, c->z_dim);
    LAUNCHED();
}

// Step i of N of Euler-Maruyama, at times t[N+1]
static void euler_maruyama_step(SamplerWork *w, GpuModel *g, const Sampling *s, const double *t, int i,
                                int n) {
    const Config *c = &g->base.c;
    int last = i == s->steps - 1, is_guided = guided_velocity(g, s, w->x, w->cls, t[i], n);
    double dt = t[i + 1] - t[i];
    const Address at = {s->seed, STREAM_SAMPLE_X, (uint32_t)i + 1, (uint32_t)s->first},
                  cls_at = {s->seed, STREAM_SAMPLE_CLS, (uint32_t)i + 1, (uint32_t)s->first};
    dim3 grid(blocks_of((size_t)(latent_of(c) + 3) / 4), (unsigned)n),
        cls_grid(blocks_of((size_t)(c->z_dim + 3) / 4), (unsigned)n);
    euler_maruyama_kernel<<<grid, 256, 0, stream>>>(w->x, g->in.noise, is_guided ? s->cfg : 0, t[i], dt, last,
                                                    at, latent_of(c));
    LAUNCHED();
    if (!c->cls) return;
    euler_maruyama_kernel<<<cls_grid, 256, 0, stream>>>(
        w->cls, g->a.cls_out, is_guided && s->cls_cfg > 0 ? s->cls_cfg : 0, t[i], dt, last, cls_at, c->z_dim);
    LAUNCHED();
}

// One evaluation, at the state or (second) between two: to = x + (v + (v - before) r) dt
static void ode_evaluation(SamplerWork *w, GpuModel *g, const Sampling *s, int second, double *to,
                           double *to_cls, double t, double dt, double r, int n) {
    const Config *c = &g->base.c;
    size_t latent = (size_t)n * (size_t)latent_of(c), Z = (size_t)n * (size_t)c->z_dim;
    int is_guided = guided_velocity(g, s, second ? w->x2 : w->x, second ? w->cls2 : w->cls, t, n);
    ode_kernel<<<blocks_of(latent), 256, 0, stream>>>(to, w->x, w->before, g->in.noise,
                                                      is_guided ? s->cfg : 0, dt, r, !second, latent);
    LAUNCHED();
    if (!c->cls) return;
    ode_kernel<<<blocks_of(Z), 256, 0, stream>>>(to_cls, w->cls, w->before_cls, g->a.cls_out,
                                                 is_guided && s->cls_cfg > 0 ? s->cls_cfg : 0, dt, r, !second,
                                                 Z);
    LAUNCHED();
}
// Step i of N of sample_ode's solvers. Heun's mean of two velocities is r = -1/2.
static void ode_step(SamplerWork *w, GpuModel *g, const Sampling *s, enum Solver solver, int i, int n) {
    const Config *c = &g->base.c;
    double t[3];   // before, now, next
    for (int k = 0; k < 3; k++) t[k] = shift_time(c, 1 - (double)(i - 1 + k) / s->steps);
    double dt = t[2] - t[1], r = solver == AB2 && i ? dt / (2 * (t[1] - t[0])) : 0;
    int twice = solver == HEUN && i < s->steps - 1;
    ode_evaluation(w, g, s, 0, twice ? w->x2 : w->x, twice ? w->cls2 : w->cls, t[1], dt, r, n);
    if (twice) ode_evaluation(w, g, s, 1, w->x, w->cls, t[2], dt, -0.5, n);
}

// What a step of drawing has to do besides: write pictures of the batch before, say how far it is. x: the
// state so far on the device. Not 0: stop here.
typedef int StepEnded(int step, const double *x, void *user);

// n samples, s->first and their classes y on, from noise to w->x. The host stays `ahead` steps, at most
// AHEAD, before the device and hears of each that has ended; with 1, the state is then the one after that
// step. Returns 0 where `ended` stopped it.
static int sample(SamplerWork *w, Model *m, const Sampling *s, const char *sampler, const int *y, int n,
                  int ahead, StepEnded *ended, void *user) {
    GpuModel *g = gpu_of(m);
    int stopped = 0;
    double *t = (double *)alloc_zero((size_t)s->steps + 1, sizeof(double));
    int *classes = (int *)alloc_zero(2 * (size_t)n, sizeof(int));
    sampling_times(t, &m->c, s->steps);
    for (int i = 0; i < n; i++) classes[i] = y[i], classes[n + i] = m->c.num_classes;
    use_weights(g, s->use_ema ? EMA : PARAMS);
    CHECK(cudaMemcpyAsync(g->in.y, classes, (size_t)n * (s->cfg > 1 ? 2 : 1) * sizeof(int),
                          cudaMemcpyHostToDevice, stream));
    sampler_noise(w, &m->c, s, n);
    for (int i = 0; i < s->steps + ahead && !stopped; i++) {
        cudaEvent_t done = w->step_done[i % ahead];
        if (i >= ahead) {
            CHECK(cudaEventSynchronize(done));
            if (ended) stopped = ended(i - ahead + 1, w->x, user);
        }
        if (i >= s->steps || stopped) continue;
        if (!strcmp(sampler, "em")) euler_maruyama_step(w, g, s, t, i, n);
        else ode_step(w, g, s, (enum Solver)solver_of(sampler), i, n);
        CHECK(cudaEventRecord(done, stream));
    }
    free(t), free(classes);   // (all steps have ended)
    return !stopped;
}

// ----------------------------------------------------------------------------------------------------------
// The run

// A batch that the host has not put into its files yet: its latents and pictures in pinned memory
typedef struct {
    double *x;
    uint8_t *pixels;
    cudaEvent_t drawn, copied;   // before the decoder begins, after the last copy
    int first, n;                // n 0: there is none
} Made;
typedef struct {
    Outputs *o;
    Watch w;
    Made made[2], *before;   // used in turn; that of the batch before
} Drawing;

// Pictures of the batch before go to their files, if they have not yet
static void made_put(Drawing *d) {
    Made *made = d->before;
    float ms;
    if (!made->n) return;
    CHECK(cudaEventSynchronize(made->copied));
    CHECK(cudaEventElapsedTime(&ms, made->drawn, made->copied));
    int decoded = made->pixels != NULL;
    if (decoded) d->o->decoding += ms / 1000;
    outputs_put(d->o, made->x, made->pixels, made->first, made->n);
    watch_first(&d->w, made->first + made->n);
    made->n = 0;
}

// After a step: the batch before is written while the device draws this one, which has AHEAD steps to go on
// with.
static int step_ended(int step, const double *x, void *user) {
    Drawing *d = (Drawing *)user;
    double *host = NULL;
    made_put(d);
    if (d->w.draw) {
        size_t n = (size_t)d->w.n * (size_t)latent_of(&d->o->source->c);
        host = (double *)alloc_zero(n, sizeof(double));
        CHECK(cudaMemcpyAsync(host, x, n * sizeof(double), cudaMemcpyDeviceToHost, stream));
        CHECK(cudaStreamSynchronize(stream));
    }
    int stopped = watch(step, d->o->r->steps, host, &d->w);
    free(host);
    return stopped;
}

// Decodes n latents x on the device (decoder NULL: the host makes pixels of them), and copies both to `made`
static void made_queue(Made *made, Decoder *decoder, const Source *s, const double *x, int first, int n) {
    size_t latent = (size_t)latent_of(&s->c), size = (size_t)s->H * (size_t)s->W * (size_t)s->channels;
    made->first = first, made->n = n;
    CHECK(cudaEventRecord(made->drawn, stream));
    for (int b = 0; decoder && b < n; b += decoder->at_once) {
        int B = imin(decoder->at_once, n - b);
        decoder_decode(decoder, x + (size_t)b * latent, s->c.in_channels, s->scale, s->offset, B);
        CHECK(cudaMemcpyAsync(made->pixels + (size_t)b * size, decoder->pixels, (size_t)B * size,
                              cudaMemcpyDeviceToHost, stream));
    }
    CHECK(cudaMemcpyAsync(made->x, x, (size_t)n * latent * sizeof(double), cudaMemcpyDeviceToHost, stream));
    CHECK(cudaEventRecord(made->copied, stream));
}

// Every product of sampling gets its plan, and its algorithm is chosen by time (tune in train_srdit.cu).
static void tune_sampling(Model *m, const Sampling *s, SamplerWork *w, Decoder *decoder, const Source *source,
                          int n) {
    Sampling both = *s;
    both.low = 0, both.high = 1;
    tuning = 1;
    timed_count = 0;
    use_weights(gpu_of(m), s->use_ema ? EMA : PARAMS);
    for (int i = 0; i < 2; i++) {
        both.cfg = i ? s->cfg : 1;
        sampler_noise(w, &m->c, s, n);
        guided_velocity(gpu_of(m), &both, w->x, w->cls, 0.5, n);
    }
    if (decoder)
        decoder_decode(decoder, w->x, source->c.in_channels, source->scale, source->offset, decoder->at_once);
    CHECK(cudaStreamSynchronize(stream));
    tuning = 0;
    if (verbose) plans_report(stdout);
}

// As many as sample.c takes at most, or as the card has memory for, twice as many where guidance draws each
// twice
static int choose_batch(const SampleRun *r, const Config *c, int num) {
    if (!stream) device_open();
    GpuModel g;
    memset(&g, 0, sizeof(g));
    g.base.c = *c;
    g.base.table = params_table(&g.w, c, NULL);
    size_t free_bytes, all_bytes;
    CHECK(cudaMemGetInfo(&free_bytes, &all_bytes));
    int batch = imin(r->batch ? r->batch : 64, num);
    while (!r->batch && batch > 1 && memory_plan(&g, r->cfg > 1 ? 2 * batch : batch).all > free_bytes / 2)
        batch /= 2;
    free(g.base.table.tensors);
    return batch;
}

// Draws all pictures, batch by batch, into the outputs; returns the seconds that it took.
static double draw_all(Outputs *o, const Backend *backend, Model *m, Sampling *s, int batch) {
    const Source *source = o->source;
    int num = o->classes->num, S = source->c.input_size;
    size_t latent = (size_t)latent_of(&m->c);
    Decoder *decoder = source->decoder ? decoder_create(source->decoder, S, S, imin(batch, 16)) : NULL;
    SamplerWork *work = gpu::sampler_work(&m->c, batch);
    if (decoder)
        printf("decoder: %.2f GB on the GPU, %d pictures at a time\n", (double)decoder->bytes / 1e9,
               decoder->at_once);
#ifndef CUDA_ON_CPU
    tune_sampling(m, s, work, decoder, source, batch);
#else
    (void)tune_sampling;
#endif
    (void)backend;
    Drawing d;
    memset(&d, 0, sizeof(d));
    d.o = o;
    for (int i = 0; i < 2; i++) {
        CHECK(cudaMallocHost((void **)&d.made[i].x, (size_t)batch * latent * sizeof(double)));
        if (decoder) CHECK(cudaMallocHost((void **)&d.made[i].pixels, (size_t)batch * o->size));
        CHECK(cudaEventCreate(&d.made[i].drawn));
        CHECK(cudaEventCreate(&d.made[i].copied));
    }
    d.before = &d.made[1];
    d.w = watch_begin(o);
    for (int i = o->first, turn = 0; i < num; i += d.w.n, turn = !turn) {
        d.w.n = imin(batch, num - i);
        d.w.done = s->first = i;
        sample(work, m, s, o->r->sampler, o->classes->y + i, d.w.n, d.w.draw ? 1 : AHEAD, step_ended, &d);
        made_queue(&d.made[turn], decoder, source, work->x, i, d.w.n);
        d.before = &d.made[turn];
    }
    made_put(&d);
    double seconds = watch_end(&d.w);
    for (int i = 0; i < 2; i++) {
        CHECK(cudaFreeHost(d.made[i].x));
        if (decoder) CHECK(cudaFreeHost(d.made[i].pixels));
        CHECK(cudaEventDestroy(d.made[i].drawn));
        CHECK(cudaEventDestroy(d.made[i].copied));
    }
    sampler_work_free(work);
    if (decoder) decoder_destroy(decoder);
    return seconds;
}
}   // namespace gpu

static const Painter gpu_painter = {&gpu_backend, sizeof(gpu::floatX) == 2 ? BF16 : F32, gpu::choose_batch,
                                    gpu::draw_all};

#ifdef SAMPLE_CU_MAIN
int main(int argc, char **argv) {
    guard_streams();
    wait_calmly(argv);
    return sample_main(argc, argv, &gpu_painter);
}
#endif
