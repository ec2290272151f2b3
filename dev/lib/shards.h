// Data shards in safetensors, memory-mapped (data/README.md describes them): opened and checked together,
// read by sample.
//
//   data_open       one or more shards that belong together, every label and size checked
//   data_sample     sample i: latent in the model's units, label, alignment features, CLS
//   data_stored     the same with latent and features as the file stores them, to be converted elsewhere
#ifndef SRDIT_SHARDS_H
#define SRDIT_SHARDS_H
#include "safetensors.h"
#ifdef __SSE2__
#include <emmintrin.h>
#endif
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"   // a program takes what it needs

typedef struct {
    SafeFile *file;
    const SafeTensor *latents, *labels, *feats, *cls;
    size_t count;     // samples to train on
    uint64_t print;   // of its samples: all labels, and some latents
} Shard;
typedef struct {
    Shard *shards;
    int shard_count;
    size_t count;
    char name[128], decoder[32];
    double scale, offset;                // model input = stored * scale + offset
    enum Dtype latent_type, feat_type;   // as stored; DTYPES where shards differ (or have no feats)
    int C, S, K, tokens, Z;              // tokens is 0 where there are no feats
} Data;

static const SafeTensor *shard_tensor(const SafeFile *f, const char *name, int ndim, int required) {
    const SafeTensor *t = safe_find(f, name);
    if (!t && required)
        die("%s: tensor %s is missing: not a data shard (data/README.md describes them)", f->path, name);
    if (t && t->ndim != ndim)
        die("%s: tensor %s: %d dimensions where %d are expected", f->path, name, t->ndim, ndim);
    return t;
}

// The types that a tensor of a shard may have (data/README.md)
static void shard_type(const SafeFile *f, const SafeTensor *t, int allowed, const char *types) {
    if (t && !allowed) die("%s: tensor %s: dtype %s where %s is expected", f->path, t->name, t->dtype, types);
}

// FNV-1a of n bytes at stride apart, going on from `hash`
static uint64_t print_bytes(uint64_t hash, const uint8_t *bytes, size_t n, size_t stride) {
    for (size_t i = 0; i < n; i += stride) hash = (hash ^ bytes[i]) * 1099511628211u;
    return hash;
}
// Tells shards apart, so that a run goes on with its own, in their order: all labels and a thousand bytes of
// the latents
static uint64_t shard_print(const Shard *s) {
    const SafeTensor *t = s->labels, *x = s->latents;
    size_t bytes = (size_t)(x->end - x->begin);
    uint64_t hash = print_bytes(1469598103934665603u, (const uint8_t *)safe_data(s->file, t),
                                (size_t)(t->end - t->begin), 1);
    return print_bytes(hash, (const uint8_t *)safe_data(s->file, x), bytes, bytes / 1009 + 1);
}
// The same of all shards; the order counts
static uint64_t data_print(const Data *d) {
    uint64_t hash = 0;
    for (int i = 0; i < d->shard_count; i++) hash = (hash ^ d->shards[i].print) * 1099511628211u;
    return hash;
}

static Data *data_open(char **paths, int count) {
    Data *d = (Data *)alloc_zero(1, sizeof(Data));
    d->shards = (Shard *)alloc_zero((size_t)count, sizeof(Shard)), d->shard_count = count;
    for (int i = 0; i < count; i++) {
        Shard *s = &d->shards[i];
        SafeFile *f = s->file = safe_open(paths[i]);
        s->latents = shard_tensor(f, "latents", 4, 1), s->labels = shard_tensor(f, "labels", 1, 1);
        s->feats = shard_tensor(f, "feats", 3, 0), s->cls = shard_tensor(f, "cls", 2, 0);
        uint64_t n = s->latents->shape[0], C = s->latents->shape[1], S = s->latents->shape[2];
        if (S != s->latents->shape[3]) die("%s: tensor latents: height and width differ", f->path);
        if (!n || !C || !S || n > INT_MAX || C > 65536 || S > 4096)
            die("%s: tensor latents: no usable size", f->path);
        if (s->labels->shape[0] != n)
            die("%s: tensor labels: %.0f labels for %.0f latents", f->path, (double)s->labels->shape[0],
                (double)n);
        enum Dtype x = s->latents->type, feats = s->feats ? s->feats->type : F32;
        shard_type(f, s->labels, is_integer(s->labels->type), "an integer type");
        shard_type(f, s->latents, x == U8 || is_floating(x), "U8, F16, BF16, F32 or F64");
        shard_type(f, s->feats, feats == I8 || is_floating(feats), "I8, F16, BF16, F32 or F64");
        shard_type(f, s->cls, s->cls && is_floating(s->cls->type), "F16, BF16, F32 or F64");
        if (s->feats && s->feats->shape[0] != n)
            die("%s: tensor feats: not one for each of %.0f latents", f->path, (double)n);
        if (s->cls && s->cls->shape[0] != n)
            die("%s: tensor cls: not one for each of %.0f latents", f->path, (double)n);
        if (s->feats && s->cls && s->feats->shape[2] != s->cls->shape[1])
            die("%s: tensor cls: its width %.0f is not that of feats, %.0f", f->path,
                (double)s->cls->shape[1], (double)s->feats->shape[2]);
        if ((s->feats && (s->feats->shape[2] > 65536 || s->feats->shape[1] > (1 << 26))) ||
            (s->cls && s->cls->shape[1] > 65536))
            die("%s: tensor %s: no usable size", f->path, s->feats ? "feats" : "cls");
        Data one;
        memset(&one, 0, sizeof(one));
        one.C = (int)C, one.S = (int)S, one.K = (int)safe_whole(f, "classes", 0, 1e7, 0);
        one.tokens = s->feats ? (int)s->feats->shape[1] : 0;
        one.Z = s->feats ? (int)s->feats->shape[2] : s->cls ? (int)s->cls->shape[1] : 0;
        one.latent_type = s->latents->type, one.feat_type = s->feats ? s->feats->type : DTYPES;
        one.scale = safe_number(f, "latent_scale", 1), one.offset = safe_number(f, "latent_offset", 0);
        const char *name = safe_metadata(f, "name"), *decoder = safe_metadata(f, "decoder");
        const char *format = safe_metadata(f, "format");
        if (format && strcmp(format, "srdit-data-1"))
            die("%s: its format is %s, and a data shard's is srdit-data-1", f->path, format);
        copy_text(one.name, sizeof(one.name), name ? name : "unnamed");
        copy_text(one.decoder, sizeof(one.decoder), decoder ? decoder : "pixels");
        if (strcmp(one.decoder, "pixels") && strcmp(one.decoder, "invae"))
            die("%s: decoder is \"%s\", which is neither pixels nor invae", f->path, one.decoder);
        if (one.K < 1) die("%s: metadata `classes` is missing: how many classes the labels have", f->path);
        if (one.scale == 0 || !(fabs(one.scale) < INFINITY) || !(fabs(one.offset) < INFINITY))
            die("%s: latent_scale %g, latent_offset %g are not usable", f->path, one.scale, one.offset);
        s->count = (size_t)safe_whole(f, "train_samples", 1, (double)n, (double)n);
        for (size_t k = 0; k < n; k++) {
            double label = element(safe_data(f, s->labels), s->labels->type, k);
            if (!(label >= 0 && label < one.K))
                die("%s: tensor labels: sample %zu has label %.0f, but classes are 0 to %d", f->path, k,
                    label, one.K - 1);
        }
        s->print = shard_print(s);
        for (int k = 0; k < i; k++)
            if (s->print == d->shards[k].print)
                die("%s: it has the same samples as %s; each shard is given once", f->path, paths[k]);
        if (i == 0) {
            Shard *shards = d->shards;
            *d = one, d->shards = shards, d->shard_count = count;
        } else {
            const char *what = one.C != d->C || one.S != d->S             ? "latent size"
                               : one.K != d->K                            ? "number of classes"
                               : one.tokens != d->tokens || one.Z != d->Z ? "alignment features"
                               : one.scale != d->scale                    ? "latent_scale"
                               : one.offset != d->offset                  ? "latent_offset"
                               : strcmp(one.decoder, d->decoder)          ? "decoder"
                               : !s->cls != !d->shards[0].cls             ? "cls"
                                                                          : NULL;
            if (what) die("%s: its %s differs from that of %s", f->path, what, paths[0]);
            if (one.latent_type != d->latent_type) d->latent_type = DTYPES;
            if (one.feat_type != d->feat_type) d->feat_type = DTYPES;
        }
        d->count += s->count;
    }
    if (d->count > INT_MAX) die("%s: more than %d samples", paths[0], INT_MAX);
    // Where the shards do not fit into memory, what the system reads ahead of a sample only drives others out
    double bytes = 0, memory = (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE);
    for (int i = 0; i < count; i++) bytes += (double)d->shards[i].file->size;
    for (int i = 0; i < count && bytes > memory / 2; i++)
        madvise((void *)(uintptr_t)d->shards[i].file->map, d->shards[i].file->size, MADV_RANDOM);
    return d;
}
static void data_close(Data *d) {
    for (int i = 0; i < d->shard_count; i++) safe_close(d->shards[i].file);
    free(d->shards), free(d);
}

// n elements of a shard's tensor from `first` on
static void read_elements(real *out, const SafeFile *f, const SafeTensor *t, size_t first, size_t n,
                          double scale, double offset) {
    elements_read(out, safe_data(f, t), t->type, first, n, scale, offset);
}
// The shard that holds sample *i, and in *i its place there
static const Shard *shard_of(const Data *d, size_t *i) {
    const Shard *s = d->shards;
    for (; *i >= s->count; s++) *i -= s->count;
    return s;
}
// Sample i of the data: latent [C,S,S] in the model's units, label y, cls [Z], and feats [tokens,Z], without
// their first row (that of CLS) where skip_cls; what is NULL is not wanted
static void data_sample(const Data *d, size_t i, real *x, int *y, real *cls, real *feats, int skip_cls) {
    const Shard *s = shard_of(d, &i);
    size_t latent = (size_t)d->C * (size_t)d->S * (size_t)d->S, Z = (size_t)d->Z;
    size_t skip = (size_t)skip_cls, T = (size_t)d->tokens;
    read_elements(x, s->file, s->latents, i * latent, latent, d->scale, d->offset);
    if (y) *y = (int)element(safe_data(s->file, s->labels), s->labels->type, i);
    if (cls) read_elements(cls, s->file, s->cls, i * Z, Z, 1, 0);
    if (feats) read_elements(feats, s->file, s->feats, (i * T + skip) * Z, (T - skip) * Z, 1, 0);
}

// The bytes of sample i in the tensor t, of n elements a sample
static const uint8_t *sample_bytes(const Shard *s, const SafeTensor *t, size_t i, size_t n, size_t *bytes) {
    *bytes = n * (size_t)dtypes[t->type].bytes;
    return (const uint8_t *)safe_data(s->file, t) + i * *bytes;
}
// memcpy past the cache: what is copied is read next by the GPU, and memory that is only written need not be
// read before. It takes a fifth less of the processor's time.
static void copy_past_cache(void *to, const uint8_t *from, size_t n) {
    size_t i = 0;
#ifdef __SSE2__
    if ((uintptr_t)to % sizeof(__m128i) == 0) {
        for (; i + sizeof(__m128i) <= n; i += sizeof(__m128i))
            _mm_stream_si128((__m128i *)((uint8_t *)to + i), _mm_loadu_si128((const __m128i *)(from + i)));
        _mm_sfence();
    }
#endif
    memcpy((uint8_t *)to + i, from + i, n - i);
}
// As data_sample, but x [C,S,S] is in d->latent_type, not yet scaled, and feats [tokens,Z] in d->feat_type:
// neither may be DTYPES
static void data_stored(const Data *d, size_t i, void *x, int *y, real *cls, void *feats, int skip_cls) {
    const Shard *s = shard_of(d, &i);
    size_t Z = (size_t)d->Z, bytes;
    const uint8_t *from = sample_bytes(s, s->latents, i, (size_t)d->C * (size_t)d->S * (size_t)d->S, &bytes);
    copy_past_cache(x, from, bytes);
    if (y) *y = (int)element(safe_data(s->file, s->labels), s->labels->type, i);
    if (cls) read_elements(cls, s->file, s->cls, i * Z, Z, 1, 0);
    if (!feats) return;
    from = sample_bytes(s, s->feats, i, (size_t)d->tokens * Z, &bytes);
    size_t skip = skip_cls ? bytes / (size_t)d->tokens : 0;
    copy_past_cache(feats, from + skip, bytes - skip);
}
#pragma GCC diagnostic pop
#endif
