// What dev/bench_cpu.py measures of ours: a shared library over train_srdit.c, which it builds and loads with
// ctypes, so that OpenBLAS and PyTorch run in the same process, turn by turn.
#pragma GCC diagnostic ignored "-Wunused-function"
#define MATMUL_VERSIONS_NO_MAIN
#include "matmul_versions.c"

#define EXPORT __attribute__((visibility("default")))

// C = op(A) op(B) (+ C), by version of dev/matmul_versions.c, `times` times over
EXPORT void bench_matmul(int version, int times, real *C, const real *A, const real *B, int M, int N, int K,
                         int ta, int tb, int add) {
    for (int i = 0; i < times; i++) matmul_version(version, C, A, B, M, N, K, ta, tb, add);
}

// The same with OpenBLAS, which the caller has loaded: 101 row-major; 111 as it is, 112 turned
typedef void Sgemm(int order, int ta, int tb, int M, int N, int K, float alpha, const float *A, int lda,
                   const float *B, int ldb, float beta, float *C, int ldc);
EXPORT void bench_sgemm(Sgemm *sgemm, int times, float *C, const float *A, const float *B, int M, int N,
                        int K, int ta, int tb, int add) {
    for (int i = 0; i < times; i++)
        sgemm(101, 111 + ta, 111 + tb, M, N, K, 1, A, ta ? M : K, B, tb ? K : N, (float)add, C, N);
}

// out = f(in) for n elements, `times` times over, on one thread: ours 0 exp, 1 GELU; with libm's 2, 3
EXPORT void bench_function(int which, int times, float *out, const float *in, int n) {
    int threads = omp_get_max_threads();
    omp_set_num_threads(1);
    static real slope[1 << 16];   // GELU's own by-product
    for (int k = 0; k < times; k++) {
        if (which == 0) for (int i = 0; i < n; i++) out[i] = fast_exp(in[i]);
        if (which == 1) gelu_forward(out, slope, in, (size_t)n);
        if (which == 2) for (int i = 0; i < n; i++) out[i] = expf(in[i]);
        if (which == 3)
            for (int i = 0; i < n; i++)
                out[i] = 0.5f * in[i] * (1 + tanhf(GELU_A * (in[i] + GELU_B * in[i] * in[i] * in[i])));
        __asm__ volatile("" ::: "memory");   // so that no repetition is left out
    }
    omp_set_num_threads(threads);
}

// A whole training step: a model, and a batch that the caller fills
typedef struct { Model *model; Batch *batch; int parts; } Bench;
EXPORT Bench *bench_create(const char *name, int B) {
    Config c = config_default();
    if (!model_preset(&c, name)) die("no model %s", name);
    if (!strcmp(name, "nano"))   // the bundled digits
        c.in_channels = 1, c.input_size = 8, c.num_classes = 10, c.z_dim = 32;
    Bench *t = (Bench *)alloc_zero(1, sizeof(Bench));
    t->parts = parts_of(&c, B);   // as the trainer takes them
    t->model = model_create(&c, B / t->parts, 1);
    t->batch = batch_create(&c, B);
    t->batch->whole = B;
    return t;
}
EXPORT void bench_destroy(Bench *t) { model_destroy(t->model), batch_free(t->batch), free(t); }

EXPORT double bench_setting(const Bench *t, const char *name) {
    OptionTable settings = config_table(&t->model->c);
    int i = option_find(&settings, strcmp(name, "proj_coeff") ? name : "align_coeff");   // its name in PyTorch
    return i < 0 ? NAN : option_get(&settings, i);
}
// Parameter tensor i: its name, place and size; NULL after the last
EXPORT const char *bench_parameter(const Bench *t, int i, real **data, size_t *size) {
    const Tensor *x = &t->model->table.tensors[i];
    if (i >= t->model->table.count) return NULL;
    *data = t->model->params + x->offset, *size = x->size;
    return x->name;
}
EXPORT void *bench_input(Bench *t, const char *name) {
    Batch *b = t->batch;
    const struct { const char *name; void *data; } list[] = {
        {"x", b->x}, {"noise", b->noise}, {"cls", b->cls}, {"noise_cls", b->noise_cls}, {"t", b->t},
        {"y", b->y}, {"ids_keep", b->ids}, {"feats", b->feats}, {"v_before", b->v_before}};
    for (size_t i = 0; i < sizeof(list) / sizeof(list[0]); i++)
        if (!strcmp(name, list[i].name)) return list[i].data;
    return NULL;
}
EXPORT void bench_start(Bench *t) {   // the EMA starts at the parameters that were put in
    memcpy(t->model->ema, t->model->params, t->model->table.total * sizeof(real));
}
// Zero, forward, backward, clipping, AdamW, EMA; the total loss
EXPORT double bench_step(Bench *t, int step) {
    zero_gradients(t->model);
    const Config *c = &t->model->c;
    size_t latent = (size_t)latent_of(c), Z = (size_t)c->z_dim, T = (size_t)tokens_of(c);
    size_t Tk = (size_t)kept_of(c), B = (size_t)(t->batch->whole / t->parts);
    for (size_t b = 0; b < (size_t)t->batch->whole; b += B) {
        Batch part = *t->batch;
        part.B = (int)B, part.first = (int)b;
        part.x += b * latent, part.noise += b * latent, part.cls += b * Z, part.noise_cls += b * Z;
        part.t += b, part.y += b, part.ids += b * Tk, part.feats += b * T * Z;
        real before[latent];
        for (size_t i = 0; i < latent && b; i++) before[i] = (part.noise - latent)[i] - (part.x - latent)[i];
        if (b) part.v_before = before;
        forward_backward(t->model, &part);
    }
    update(t->model, step);
    return read_losses(t->model).total;
}
EXPORT int bench_vector_bytes(void) { return VBYTES; }
EXPORT const char *bench_compiler(void) {
#ifdef __clang__
    return "clang " __VERSION__;
#else
    return "gcc " __VERSION__;
#endif
}
