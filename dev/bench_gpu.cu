// bench_gpu.cu - how fast are the matrix products of a training step of SR-DiT-B/1 on this GPU?
//
// Every product of one step at batch 256, with and without the epilogues that it could use; all that
// cuBLASLt's heuristic proposes is timed. Prints a markdown table: the first proposal, the best one, and the
// floor, which is the larger of arithmetic and memory traffic at the rates of an H100 (or of --tflops, --tb).
//
//   nvcc -std=c++17 -O3 -arch=sm_90 dev/bench_gpu.cu -o build/bench_gpu -lcublasLt && build/bench_gpu
//   make build/emu-plain/bench_gpu && build/emu-plain/bench_gpu --shrink 64      whether it runs; no speed
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <algorithm>
#include <vector>

static void must(int bad, const char *what, int line) {
    if (!bad) return;
    fprintf(stderr, "bench_gpu.cu:%d: %s: error %d\n", line, what, bad);
    exit(1);
}
#define CHECK(x) must((int)(x), #x, __LINE__)

// ----------------------------------------------------------------------------------------------------------
// The products, all row-major: a forward one is out[M,N] = in[M,K] w[N,K]^T, an input gradient
// out[M,N] = in[M,K] w[K,N], a weight gradient out[M,N] = dout[K,M]^T in[K,N] in float.
// T tokens of B samples are 257 B rows in the dense blocks, 64 B in the sparse ones.

enum Kind { FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT };
enum Rows { DENSE, SPARSE, SAMPLES };               // how many rows: 257 B, 64 B, B
struct Product {
    const char *name;
    Kind kind;
    Rows rows;                                      // M, but K of a weight gradient
    int n, k;                                       // N and K; of a weight gradient: M and N
    int count;                                      // in a step
    cublasLtEpilogue_t epilogues[2];                // to try besides none
};
static const cublasLtEpilogue_t NONE = CUBLASLT_EPILOGUE_DEFAULT, BIAS = CUBLASLT_EPILOGUE_BIAS,
    GELU = CUBLASLT_EPILOGUE_GELU_AUX_BIAS, DGELU = CUBLASLT_EPILOGUE_DGELU,
    DGELU_BIAS = CUBLASLT_EPILOGUE_DGELU_BGRAD, BIAS_GRADIENT = CUBLASLT_EPILOGUE_BGRADB;
#define BLOCK(NAME, ROWS, COUNT) \
    {NAME " qkv", FORWARD, ROWS, 2304, 768, COUNT, {BIAS, NONE}}, \
    {NAME " proj", FORWARD, ROWS, 768, 768, COUNT, {BIAS, NONE}}, \
    {NAME " fc1", FORWARD, ROWS, 3072, 768, COUNT, {BIAS, GELU}}, \
    {NAME " fc2", FORWARD, ROWS, 768, 3072, COUNT, {BIAS, NONE}}, \
    {NAME " fc2", INPUT_GRADIENT, ROWS, 3072, 768, COUNT, {DGELU, DGELU_BIAS}}, \
    {NAME " fc1", INPUT_GRADIENT, ROWS, 768, 3072, COUNT, {NONE, NONE}}, \
    {NAME " proj", INPUT_GRADIENT, ROWS, 768, 768, COUNT, {NONE, NONE}}, \
    {NAME " qkv", INPUT_GRADIENT, ROWS, 768, 2304, COUNT, {NONE, NONE}}, \
    {NAME " fc2", WEIGHT_GRADIENT, ROWS, 768, 3072, COUNT, {BIAS_GRADIENT, NONE}}, \
    {NAME " fc1", WEIGHT_GRADIENT, ROWS, 3072, 768, COUNT, {BIAS_GRADIENT, NONE}}, \
    {NAME " proj", WEIGHT_GRADIENT, ROWS, 768, 768, COUNT, {BIAS_GRADIENT, NONE}}, \
    {NAME " qkv", WEIGHT_GRADIENT, ROWS, 2304, 768, COUNT, {BIAS_GRADIENT, NONE}}
static const Product products[] = {
    BLOCK("dense", DENSE, 4),
    BLOCK("sparse", SPARSE, 8),
    {"fusion, E", FORWARD, DENSE, 768, 768, 1, {BIAS, NONE}},
    {"fusion, g", FORWARD, SPARSE, 768, 768, 1, {NONE, NONE}},
    {"fusion, E", INPUT_GRADIENT, DENSE, 768, 768, 1, {NONE, NONE}},
    {"fusion, g", INPUT_GRADIENT, SPARSE, 768, 768, 1, {NONE, NONE}},
    {"fusion, E", WEIGHT_GRADIENT, DENSE, 768, 768, 1, {NONE, NONE}},
    {"fusion, g", WEIGHT_GRADIENT, SPARSE, 768, 768, 1, {NONE, NONE}},
    {"projector 1", FORWARD, DENSE, 2048, 768, 1, {BIAS, NONE}},
    {"projector 2", FORWARD, DENSE, 2048, 2048, 1, {BIAS, NONE}},
    {"projector 3", FORWARD, DENSE, 768, 2048, 1, {BIAS, NONE}},
    {"projector 3", INPUT_GRADIENT, DENSE, 2048, 768, 1, {NONE, NONE}},
    {"projector 2", INPUT_GRADIENT, DENSE, 2048, 2048, 1, {NONE, NONE}},
    {"projector 1", INPUT_GRADIENT, DENSE, 768, 2048, 1, {NONE, NONE}},
    {"projector 3", WEIGHT_GRADIENT, DENSE, 768, 2048, 1, {BIAS_GRADIENT, NONE}},
    {"projector 2", WEIGHT_GRADIENT, DENSE, 2048, 2048, 1, {BIAS_GRADIENT, NONE}},
    {"projector 1", WEIGHT_GRADIENT, DENSE, 2048, 768, 1, {BIAS_GRADIENT, NONE}},
    {"modulation, all blocks", FORWARD, SAMPLES, 56832, 768, 1, {BIAS, NONE}},
    {"modulation, all blocks", INPUT_GRADIENT, SAMPLES, 768, 56832, 1, {NONE, NONE}},
    {"modulation, all blocks", WEIGHT_GRADIENT, SAMPLES, 56832, 768, 1, {BIAS_GRADIENT, NONE}},
};

static const char *kind_name(Kind k) {
    return k == FORWARD ? "forward" : k == INPUT_GRADIENT ? "input gradient" : "weight gradient";
}
static const char *epilogue_name(int e) {
    return e == NONE ? "" : e == BIAS ? "bias" : e == GELU ? "bias, gelu, aux" : e == DGELU ? "dgelu"
           : e == DGELU_BIAS ? "dgelu, bias gradient" : "bias gradient";
}

// ----------------------------------------------------------------------------------------------------------

static cublasLtHandle_t lt;
static cudaStream_t stream;
static char *in, *weight, *out, *aux, *bias, *workspace;
static const size_t ROOM = (size_t)32 << 20;
static int repeats = 10;

__global__ void fill(__nv_bfloat16 *p, size_t n, unsigned seed) {       // -1..1: zeros would draw less power
    const size_t step = (size_t)gridDim.x * blockDim.x;
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += step) {
        unsigned x = (unsigned)i * 2654435761u + seed;
        x = (x ^ x >> 15) * 2246822519u;
        p[i] = __float2bfloat16((float)((x ^ x >> 13) >> 8) * (1.0f / 8388608.0f) - 1.0f);
    }
}
static char *allocate(size_t bytes, unsigned seed) {
    char *p;
    CHECK(cudaMalloc((void **)&p, bytes));
    fill<<<1024, 256, 0, stream>>>((__nv_bfloat16 *)p, bytes / 2, seed);
    CHECK(cudaGetLastError());
    return p;
}

template <class F> static double microseconds(int n, F run) {      // mean of n, after one that does not count
    cudaEvent_t from, to;
    float ms;
    CHECK(cudaEventCreate(&from));
    CHECK(cudaEventCreate(&to));
    run();
    CHECK(cudaEventRecord(from, stream));
    for (int i = 0; i < n; i++) run();
    CHECK(cudaEventRecord(to, stream));
    CHECK(cudaEventSynchronize(to));
    CHECK(cudaEventElapsedTime(&ms, from, to));
    CHECK(cudaEventDestroy(from));
    CHECK(cudaEventDestroy(to));
    return 1e3 * ms / n;
}

struct Shape { Kind kind; int64_t M, N, K; };
struct Timing { double first, best; int proposals; };       // microseconds; proposals 0: not supported

static Timing time_product(const Shape &s, cublasLtEpilogue_t epilogue) {
    // cuBLASLt thinks in columns: the row-major out[M,N] is its [N,M], and the factors change places
    const cudaDataType type = CUDA_R_16BF, out_type = s.kind == WEIGHT_GRADIENT ? CUDA_R_32F : CUDA_R_16BF;
    const cublasOperation_t ta = s.kind == FORWARD ? CUBLAS_OP_T : CUBLAS_OP_N;
    const cublasOperation_t tb = s.kind == WEIGHT_GRADIENT ? CUBLAS_OP_T : CUBLAS_OP_N;
    const bool has_aux = epilogue == GELU || epilogue == DGELU || epilogue == DGELU_BIAS;
    const int64_t ld = s.N;
    const float one = 1, zero = 0;
    const size_t room = ROOM;
    cublasLtMatmulDesc_t d;
    cublasLtMatrixLayout_t a, b, c;
    cublasLtMatmulPreference_t preference;
    auto set = [&](cublasLtMatmulDescAttributes_t which, auto value) {
        CHECK(cublasLtMatmulDescSetAttribute(d, which, &value, sizeof value));
    };
    CHECK(cublasLtMatmulDescCreate(&d, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    set(CUBLASLT_MATMUL_DESC_TRANSA, ta);
    set(CUBLASLT_MATMUL_DESC_TRANSB, tb);
    set(CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue);
    if (epilogue != NONE && epilogue != DGELU) set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, (void *)bias);
    if (has_aux) set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, (void *)aux);
    if (has_aux) set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, ld);
    auto layout = [](cublasLtMatrixLayout_t *l, cudaDataType t, int64_t rows, int64_t cols) {
        CHECK(cublasLtMatrixLayoutCreate(l, t, (uint64_t)rows, (uint64_t)cols, rows));
    };
    if (s.kind == FORWARD) layout(&a, type, s.K, s.N);
    else layout(&a, type, s.N, s.K);
    if (s.kind == WEIGHT_GRADIENT) layout(&b, type, s.M, s.K);
    else layout(&b, type, s.K, s.M);
    layout(&c, out_type, s.N, s.M);
    CHECK(cublasLtMatmulPreferenceCreate(&preference));
    CHECK(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &room,
                                               sizeof room));
    cublasLtMatmulHeuristicResult_t found[32];
    Timing t = {0, 0, 0};
    int count = 0;
    cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(lt, d, a, b, c, c, preference, 32, found, &count);
    if (status != CUBLAS_STATUS_SUCCESS) count = 0;
    const char *left = s.kind == WEIGHT_GRADIENT ? in : weight;
    const char *right = s.kind == WEIGHT_GRADIENT ? weight : in;
    for (int i = 0; i < count; i++) {
        bool works = true;
        double us = microseconds(repeats, [&] {
            if (cublasLtMatmul(lt, d, &one, left, a, right, b, &zero, out, c, out, c, &found[i].algo,
                               workspace, ROOM, stream) != CUBLAS_STATUS_SUCCESS)
                works = false;
        });
        if (!works) continue;
        if (t.proposals == 0) t.first = t.best = us;
        t.best = std::min(t.best, us);
        t.proposals++;
    }
    CHECK(cublasLtMatmulPreferenceDestroy(preference));
    for (cublasLtMatrixLayout_t l : {a, b, c}) CHECK(cublasLtMatrixLayoutDestroy(l));
    CHECK(cublasLtMatmulDescDestroy(d));
    return t;
}

int main(int argc, char **argv) {
    double tflops = 798, tb = 3.0;
    int batch = 256, shrink = 1;
    for (int i = 1; i < argc; i++) {
        double value = i + 1 < argc ? atof(argv[i + 1]) : 0;
        if (!strcmp(argv[i], "--batch")) batch = (int)value;
        else if (!strcmp(argv[i], "--shrink")) shrink = (int)value;
        else if (!strcmp(argv[i], "--repeats")) repeats = (int)value;
        else if (!strcmp(argv[i], "--tflops")) tflops = value;
        else if (!strcmp(argv[i], "--tb")) tb = value;
        else value = 0;
        if (!(value > 0)) {
            fprintf(stderr, "usage: bench_gpu [--batch 256] [--repeats 10] [--tflops 798] [--tb 3.0] "
                    "[--shrink 1: all sizes divided]\n");
            return 1;
        }
        i++;
    }
    auto rows_of = [&](Rows r) {
        return (int64_t)std::max(8, batch * (r == DENSE ? 257 : r == SPARSE ? 64 : 1) / shrink / 8 * 8);
    };
    auto size_of = [&](int n) { return (int64_t)std::max(8, n / shrink / 8 * 8); };
    cudaDeviceProp prop;
    CHECK(cudaGetDeviceProperties(&prop, 0));
    CHECK(cudaStreamCreate(&stream));
    CHECK(cublasLtCreate(&lt));
    const int64_t square = size_of(8192);
    const size_t big = 2 * (size_t)std::max({rows_of(DENSE) * size_of(3072),
                                             2 * size_of(56832) * size_of(768), square * square});
    in = allocate(big, 1), weight = allocate(big, 2), out = allocate(big, 3), aux = allocate(big, 4);
    bias = allocate((size_t)1 << 20, 5), workspace = allocate(ROOM, 6);

    printf("%s, %d SMs, cuBLASLt %zu, batch %d%s\n\n", prop.name, prop.multiProcessorCount,
           cublasLtGetVersion(), batch, shrink > 1 ? ", ALL SIZES DIVIDED: no speed" : "");
    double copy = microseconds(repeats, [&] {
        CHECK(cudaMemcpyAsync(out, in, big, cudaMemcpyDeviceToDevice, stream));
    });
    printf("copy of %.0f MB: %.2f TB/s read and written\n", (double)big / 1e6, 2e-6 * (double)big / copy);
    Timing t = time_product({FORWARD, square, square, square}, NONE);
    if (t.proposals)
        printf("%lld x %lld x %lld: %.0f TFLOP/s\n", (long long)square, (long long)square, (long long)square,
               2e-6 * (double)square * (double)square * (double)square / t.best);
    printf("floor: %.0f TFLOP/s, %.2f TB/s\n\n", tflops, tb);
    printf(
        "| product | | M | N | K | a step | epilogue | proposals | first us | best us | TFLOP/s | floor us "
        "| of it |\n|---|---|---:|---:|---:|---:|---|---:|---:|---:|---:|---:|---:|\n");
    double plain = 0, first = 0, fused = 0, lower = 0, flops = 0;      // microseconds a step
    for (const Product &p : products) {
        Shape s = {p.kind, rows_of(p.rows), size_of(p.n), size_of(p.k)};
        if (p.kind == WEIGHT_GRADIENT) s = {p.kind, size_of(p.n), size_of(p.k), rows_of(p.rows)};
        const double work = 2.0 * (double)s.M * (double)s.N * (double)s.K;
        const double out_bytes = (double)(s.M * s.N) * (p.kind == WEIGHT_GRADIENT ? 4 : 2);
        double with_epilogue = 0;
        for (int v = 0; v < 3; v++) {
            const cublasLtEpilogue_t e = v ? p.epilogues[v - 1] : NONE;
            if (v && e == NONE) continue;
            const bool has_aux = e == GELU || e == DGELU || e == DGELU_BIAS;
            const double bytes = 2.0 * (double)(s.M * s.K + s.K * s.N) + out_bytes * (has_aux ? 2 : 1);
            const double floor_us = std::max(work / tflops, bytes / tb) * 1e-6;
            Timing t = time_product(s, e);
            printf("| %s | %s | %d | %d | %d | %d | %s | %d |", p.name, kind_name(p.kind), (int)s.M, (int)s.N,
                   (int)s.K, p.count, epilogue_name(e), t.proposals);
            if (!t.proposals) {
                printf(" | not supported | | | |\n");
                continue;
            }
            printf(" %.1f | %.1f | %.0f | %.1f | %.0f %% |\n", t.first, t.best, work / t.best * 1e-6,
                   floor_us, 100 * floor_us / t.best);
            fflush(stdout);
            if (!v) {
                plain += p.count * t.best, first += p.count * t.first;
                lower += p.count * floor_us, flops += p.count * work;
            }
            with_epilogue = t.best;                 // of the last, which does the most
        }
        fused += p.count * with_epilogue;
    }
    printf("\n| all products of a step | ms | TFLOP/s |\n|---|---:|---:|\n");
    printf("| floor, no epilogues | %.2f | %.0f |\n", lower * 1e-3, flops / lower * 1e-6);
    printf("| best proposal, no epilogues | %.2f | %.0f |\n", plain * 1e-3, flops / plain * 1e-6);
    printf("| first proposal, no epilogues | %.2f | %.0f |\n", first * 1e-3, flops / first * 1e-6);
    printf("| best proposal, with epilogues | %.2f | %.0f |\n", fused * 1e-3, flops / fused * 1e-6);
    return 0;
}
