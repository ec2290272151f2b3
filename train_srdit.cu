// SR-DiT trained on a GPU: the same model as train_srdit.c, to be read beside it.
//
// What this file is: the kernels, and the order in which they run. Everything else (configuration, parameter
// table, data, random numbers, sampler, checkpoints, training loop) is in train_srdit.c, which this file
// includes. Products of large matrices go through cuBLASLt; the rest is written out here, fused so that each
// number makes as few trips to memory as it can. Each kernel says at its head what it computes, on what
// shapes, how many bytes an element it moves and what bounds it.
//
//   make train_srdit_cu && ./train_srdit_cu     (nvcc, cuBLASLt, a GPU of compute capability 8.0 or more)
//   make FP32=1 test_srdit_cu                   all in float instead of bf16, to be checked against the CPU
//   make train_srdit_emu                        this file on a CPU, to be stepped through (dev/cuda_on_cpu)
//
// Sections and functions come in the order of train_srdit.c and have its names. What is different here:
//
//   in train_srdit.c                     here
//   gate, then norm_modulate             fused: norm_modulate_forward, _backward over a `Residual`, that is
//                                        x + gate y not added up before its next reader
//   qk_norm, rope, value_residual        fused: attention does them as it loads rows and undoes them on
//                                        gradients in registers; only its plain way has a kernel for them
//   att, the rows of softmax             not kept: log sum exp, from which the backward makes them again
//   biases, gelu                         fused: epilogues of cuBLASLt; the slope is made again from fc1
//   *_backward of silu, gelu, biases     fused: activation_backward_kernel, slope and column sums in one pass
//   x_t, patchify                        fused: patchify_kernel mixes x and noise as it reads
//   put_tokens of patches and CLS        fused: embed_kernel, with CLS's rmsnorm and the positions
//   gather_rows of the kept tokens       fused: g's first norm reads at ids (Residual.x_ids)
//   fusion_proj of pair, scatter_rows    two products, E W1^T + G W2^T, since most rows of G are the mask
//                                        token's: that is one more row of G, and which row a token reads is
//                                        looked up (Residual.y_rows)
//   unpatchify                           only for the sampler: the losses read and write patches
//   clipping, AdamW, EMA                 fused, with the rounding to bf16: adamw_kernel
//   muon_matrix, newton_schulz           matrices of one shape at once, as batches (muon_update)
//   a block's adaLN layer                moved: all blocks' at once (adaln_forward), since B rows are few
//   gate_backward of a block's output    moved to the norm that read it (`before` in block_backward)
//   projector_backward                   moved: first, while wide2 still holds what the loss left there; d_E
//                                        starts with it
//   CLS of the final layer, of tokens    moved: last in memory, so that the patches are one matrix
//   gradients of the blocks' weights     moved: neighbours' at once, as batches (run_weights_backward)
//   zero_gradients                       a flag: the next gradients overwrite
//   noise, kept tokens of a batch        drawn on the device, from the same addresses
//   a step                               recorded once as a CUDA graph, then replayed (run_recorded)
//
// The same are all formulas, Config, Table and Params, the places in the table, and every random number.
//
// What is stored how: weights, moments, moving average, gradients of weights, the residual stream and its
// gradient, modulation, statistics, losses and every sum in float; what matrix products read and write in
// floatX, which is bf16 (or float, with -DFP32). No float atomics: every sum has a fixed order, so that the
// same run gives the same bits. The functions live in namespace gpu, since the CPU's have the same names.
//
// Letters as in train_srdit.c; rows is B T, n one of them or a block's tokens a sample. At batch 256 of B/1,
// N = 65,792 and D = 768: figures of bytes are those an element of such a [N,D] tensor. An H100 gives about
// 3.0 TB/s of memory and 800 TFLOP/s of bf16.
#define HOST_DEVICE __host__ __device__
#ifndef TRAIN_SRDIT_NO_MAIN
#define TRAIN_SRDIT_NO_MAIN
#endif
#include "train_srdit.c"
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#ifdef NCCL   // several GPUs (make says whether nccl.h was found); the library is opened only for them
#include <dlfcn.h>
#include <nccl.h>
#if NCCL_VERSION_CODE < 21400
#error "nccl.h is older than 2.14: install a newer NCCL, or build for one GPU with make NCCL_INC="
#endif
#ifndef NCCL_NAME
#define NCCL_NAME "libnccl.so.2"
#endif
#endif

namespace gpu {

typedef __nv_bfloat16 bf16;
#ifdef FP32
typedef float floatX;
#define FLOATX_TYPE CUDA_R_32F
#else
typedef bf16 floatX;
#define FLOATX_TYPE CUDA_R_16BF
#endif
static_assert(sizeof(real) == 4, "the GPU trainer computes in float: build without USE_DOUBLE");

// ----------------------------------------------------------------------------------------------------------
// Errors, memory, the device

static void check_cuda(cudaError_t e, const char *file, int line) {
    if (e == cudaSuccess) return;
    ranks_hear_first();
    die("CUDA: %s (%s:%d)", cudaGetErrorString(e), file, line);
}
#define CHECK(call) check_cuda((call), __FILE__, __LINE__)
#define LAUNCHED() launched(__func__, __FILE__, __LINE__)   // after each kernel launch

static cudaDeviceProp card;            // the GPU
static cudaStream_t stream;            // all work is queued here, in order,
static cudaStream_t copy_stream;       // but for the copies of the next step's data
static cudaStream_t ranks_stream;      // and, of several GPUs, what passes between them
static int device;                     // which GPU of this machine: of several ranks one each
static int verbose = 1;                // print the memory plan and what was tuned
static int use_graph = 1;              // record a step and replay it (--no-graph: launch every kernel)
static int use_gelu_epilogue = 1;      // GELU inside the matrix products, where that is faster (bf16)
static int use_tensor_attention = 1;   // attention on tensor cores, where it fits (bf16, Dh = 64, T <= 272)

// A block of memory handed out from the front, as `Arena` in train_srdit.c, in bytes: with base NULL
// it only counts. On the CPU each piece is an allocation of its own (unless `whole`), so that the
// emulator sees a step over its end.
typedef struct {
    char *base;
    size_t used;
    int whole;
    const void *owner;
} DeviceArena;
#ifdef CUDA_ON_CPU
static struct {
    void *memory;
    const void *owner;
} pieces[4096];
#endif
template <class E> static void take(E *&p, DeviceArena *a, size_t count) {
    size_t bytes = (count * sizeof(E) + 255) / 256 * 256;
    p = a->base && count ? (E *)(a->base + a->used) : NULL;
#ifdef CUDA_ON_CPU
    if (a->base && bytes && !a->whole) {
        CHECK(cudaMalloc((void **)&p, bytes));
        CHECK(cudaMemset((void *)p, 0, bytes));
        int i = 0;
        while (pieces[i].memory) i++;
        pieces[i].memory = (void *)p, pieces[i].owner = a->owner;
    }
#endif
    a->used += bytes;
}
// All of a model's memory at once; afterwards the arena hands it out.
static char *memory_take(DeviceArena *a, const void *owner) {
    char *base;
    size_t bytes = a->used;
#ifdef CUDA_ON_CPU
    bytes = a->whole ? bytes : 1;
#endif
    CHECK(cudaMalloc((void **)&base, bytes));
    CHECK(cudaMemset(base, 0, bytes));
    a->base = base;
    a->used = 0;
    a->owner = owner;
    return base;
}
static void memory_free(char *base, const void *owner) {
#ifdef CUDA_ON_CPU
    for (int i = 0; i < 4096; i++)
        if (pieces[i].memory && pieces[i].owner == owner)
            CHECK(cudaFree(pieces[i].memory)), pieces[i].memory = NULL;
#endif
    (void)owner;
    CHECK(cudaFree(base));
}

// ----------------------------------------------------------------------------------------------------------
// --profile: an event behind every launch. What passes between two counts for the launch between them: for
// the part of the step that is being queued (`place`) and for the kind of work, told from the product's
// transposes or from the name of the function. No step is recorded as a graph meanwhile.

enum Place { INPUT, CONDITION, DENSE, SPARSE, FUSION, PROJECTOR, OPTIMIZER, PLACES };
enum Work { PRODUCT, PRODUCT_BACK, PRODUCT_WEIGHT, ATTENTION, ATTENTION_BACK, OTHER, OTHER_BACK, WORKS };
enum { MAX_MARKS = 4096 };
typedef struct {
    double ms, flops, bytes, floor;   // floor: of products, seconds at the rates that can be reached
    long launches;
} Spent;
static struct {
    int on, recording, backward;   // asked for; in the middle of a step, of its backward
    int steps, samples, lost;      // so far; launches for which there was no room
    enum Place place;
    Spent spent[PLACES][WORKS];
    cudaEvent_t event[MAX_MARKS];
    signed char of_place[MAX_MARKS], of_work[MAX_MARKS];   // -1: a beginning, before which nothing counts
    int marks, made;
} profile;
// What an H100's products and memory were found to reach of their peaks (798 of 989 TFLOP/s, 3.0 of 3.35
// TB/s)
static const double REACHED_FLOPS = 0.807, REACHED_BYTES = 0.896;

static void profile_reset(int on) {
    for (int i = 0; i < profile.made; i++) CHECK(cudaEventDestroy(profile.event[i]));
    memset(&profile, 0, sizeof(profile));
    profile.on = on;
}
static void place(enum Place where) { profile.place = where; }
static void profile_mark(int where, int work) {
    if (!profile.recording) return;
    if (profile.marks == MAX_MARKS) {
        profile.lost++;
        return;
    }
    int i = profile.marks++;
    if (i == profile.made) CHECK(cudaEventCreate(&profile.event[profile.made++]));
    profile.of_place[i] = (signed char)where;
    profile.of_work[i] = (signed char)work;
    CHECK(cudaEventRecord(profile.event[i], stream));
}
static void launched(const char *function, const char *file, int line) {
    check_cuda(cudaGetLastError(), file, line);
    int attention = strstr(function, "attention") || strstr(function, "_launch");
    profile_mark(profile.place, (attention ? ATTENTION : OTHER) + profile.backward);
}

// Peaks of the card by its data sheet: dense bf16 products that add in float, and memory; 0 where not known
static double peak_flops(void) {
    static const struct {
        const char *name;
        double tera;
    } cards[] = {{"H100 PCIe", 756.5}, {"H100 NVL", 835}, {"H100", 989.4},
                 {"H200 NVL", 835},    {"H200", 989.4},   {"B200", 2250},
                 {"A100", 312},        {"L40S", 362},     {"RTX 4090", 165.2}};
    static double peak = -1;
    if (peak >= 0) return peak;
    cudaDeviceProp card;
    CHECK(cudaGetDeviceProperties(&card, device));
    peak = 0;
    for (size_t i = 0; i < sizeof(cards) / sizeof(cards[0]) && !peak && sizeof(floatX) == 2; i++)
        if (strstr(card.name, cards[i].name)) peak = cards[i].tera * 1e12;
    return peak;
}
static double peak_bandwidth(void) {
    int kilohertz = 0, bits = 0;
    CHECK(cudaDeviceGetAttribute(&kilohertz, cudaDevAttrMemoryClockRate, device));
    CHECK(cudaDeviceGetAttribute(&bits, cudaDevAttrGlobalMemoryBusWidth, device));
    return 2.0 * 1e3 * kilohertz * bits / 8;
}

static int div_up(int a, int b) { return (a + b - 1) / b; }
static size_t largest(size_t a, size_t b) { return a > b ? a : b; }
static size_t smallest(size_t a, size_t b) { return a < b ? a : b; }
// From one matrix to the next where several lie one behind the other, so that each is aligned
__host__ __device__ static inline size_t step_of(size_t count) { return (count + 127) / 128 * 128; }

// ----------------------------------------------------------------------------------------------------------
// Small pieces for kernels

// Four neighbouring numbers, which a thread loads and stores at once: 16 bytes of float, 8 of bf16
struct Vec4 {
    float x[4];
};
__device__ __forceinline__ unsigned pack(float lo, float hi) {
    __nv_bfloat162 p = __floats2bfloat162_rn(lo, hi);
    unsigned u;
    memcpy(&u, (void *)&p, 4);
    return u;
}
__device__ __forceinline__ float2 unpack(unsigned p) {   // a bf16 is the upper half of a float
    return make_float2(__uint_as_float(p << 16), __uint_as_float(p & 0xffff0000u));
}
// The same as they lie in memory. A number that is unpacked where it is loaded is waited for there; so loads
// that are to be under way together are made raw and unpacked where they are used.
#ifdef FP32
typedef Vec4 Raw4;   // four of floatX
#else
typedef uint2 Raw4;
#endif
__device__ __forceinline__ Vec4 raw4(const float *p) {
    float4 v = *(const float4 *)p;
    return {{v.x, v.y, v.z, v.w}};
}
__device__ __forceinline__ uint2 raw4(const bf16 *p) { return *(const uint2 *)p; }
__device__ __forceinline__ Vec4 unpack4(const Vec4 &v) { return v; }
__device__ __forceinline__ Vec4 unpack4(uint2 v) {
    float2 a = unpack(v.x), b = unpack(v.y);
    return {{a.x, a.y, b.x, b.y}};
}
template <class E> __device__ __forceinline__ Vec4 load4(const E *p) { return unpack4(raw4(p)); }
__device__ __forceinline__ void store4(float *p, const Vec4 &v) {
    *(float4 *)p = make_float4(v.x[0], v.x[1], v.x[2], v.x[3]);
}
__device__ __forceinline__ void store4(bf16 *p, const Vec4 &v) {
    *(uint2 *)p = make_uint2(pack(v.x[0], v.x[1]), pack(v.x[2], v.x[3]));
}
// As files store them: whole numbers of 8 bits, halves
struct Half {
    uint16_t bits;
};
__device__ __forceinline__ Vec4 load4(const int8_t *p) {
    char4 v = *(const char4 *)p;
    return {{(float)v.x, (float)v.y, (float)v.z, (float)v.w}};
}
__device__ __forceinline__ Vec4 load4(const Half *p) {
    uint2 u = *(const uint2 *)p;
    return {{half_to_float((uint16_t)u.x), half_to_float((uint16_t)(u.x >> 16)), half_to_float((uint16_t)u.y),
             half_to_float((uint16_t)(u.y >> 16))}};
}
__device__ __forceinline__ float to_float(uint8_t x) { return x; }
__device__ __forceinline__ float to_float(int8_t x) { return x; }
__device__ __forceinline__ float to_float(Half x) { return half_to_float(x.bits); }
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void store(float *p, float x) { *p = x; }
__device__ __forceinline__ void store(bf16 *p, float x) { *p = __float2bfloat16(x); }

// over groups of W neighbouring lanes
template <int W> __device__ __forceinline__ float sum_lanes(float x) {
#pragma unroll
    for (int m = 1; m < W; m *= 2) x += __shfl_xor_sync(0xffffffffu, x, m);
    return x;
}

// The sum of x over a block of 256 threads in a fixed order, in thread 0. Each use needs 8
// shared `sums` of its own.
__device__ __forceinline__ float sum_block(float x, float *sums) {
    x = sum_lanes<32>(x);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
    __syncthreads();
    float total = 0;
    for (int i = 0; i < 8 && threadIdx.x == 0; i++) total += sums[i];
    return total;
}

// The sum of every 32nd of `rows` numbers from the y-th on, ld apart; eight loads under way at a time
template <class S> __device__ __forceinline__ float sum_rows(const S *src, int y, int rows, size_t ld) {
    float sum = 0;
    int r = y;
    for (; r + 7 * 32 < rows; r += 8 * 32) {
        S x[8];
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = src[(r + i * 32) * ld];
#pragma unroll
        for (int i = 0; i < 8; i++) sum += to_float(x[i]);
    }
    for (; r < rows; r += 32) sum += to_float(src[r * ld]);
    return sum;
}

// The gradients of biases and of other small weights are column sums of what kernels leave in `parts`, a
// backward's one behind the other. The adding up waits until its end, and then is one launch for all of them.
typedef struct {
    float *dst;        // [cols] (+)= sum over rows
    const void *src;   // [rows, cols], rows `ld` apart, in float; `low`: in floatX
    unsigned ld : 31, low : 1;
    int rows, cols, end;   // end: where the grid's blocks of the next job begin
} SumJob;
enum { MAX_SUMS = 126 };
typedef struct {
    int count, add;
    SumJob of[MAX_SUMS];   // with the above less than the 4 KB that a kernel's arguments may be
} SumJobs;
typedef struct {
    float *parts;
    size_t used, room;
    SumJobs jobs;
} Sums;

// Blocks of 8 columns x 32 rows, each sum in a fixed order. Reads 4 bytes a number of all parts: 0.1 GB, 0.04
// ms in B/1.
__global__ void __launch_bounds__(256) sums_kernel(const SumJobs jobs) {
    __shared__ float sums[32][9];
    int i = 0, block = blockIdx.x;
    while (block >= jobs.of[i].end) i++;
    if (i) block -= jobs.of[i - 1].end;
    int rows = jobs.of[i].rows, cols = jobs.of[i].cols;
    int c = block * 8 + threadIdx.x % 8, y = threadIdx.x / 8;
    size_t ld = jobs.of[i].ld;
    float sum = 0;
    if (c < cols)
        sum = jobs.of[i].low ? sum_rows((const floatX *)jobs.of[i].src + c, y, rows, ld)
                             : sum_rows((const float *)jobs.of[i].src + c, y, rows, ld);
    sums[y][threadIdx.x % 8] = sum;
    __syncthreads();
    if (y || c >= cols) return;
    sum = jobs.add ? jobs.of[i].dst[c] : 0;
    for (int k = 0; k < 32; k++) sum += sums[k][threadIdx.x];
    jobs.of[i].dst[c] = sum;
}
static void sums_begin(Sums *s, int add) {
    s->used = 0;
    s->jobs.count = 0;
    s->jobs.add = add;
}
static void sums_end(Sums *s) {
    SumJobs *j = &s->jobs;
    if (j->count == 0) return;
    sums_kernel<<<(unsigned)j->of[j->count - 1].end, 256, 0, stream>>>(*j);
    LAUNCHED();
    j->count = 0;
}
// dst[cols] (+)= the sum over the rows of src[rows, cols], when sums_end comes
template <class S> static void sum_later(Sums *s, float *dst, const S *src, int rows, int cols, int ld) {
    SumJobs *j = &s->jobs;
    if (j->count == MAX_SUMS) sums_end(s);
    int before = j->count ? j->of[j->count - 1].end : 0;
    SumJob one = {dst, src, (unsigned)ld, sizeof(S) != 4, rows, cols, before + div_up(cols, 8)};
    j->of[j->count++] = one;
}
static float *sums_take(Sums *s, size_t count) {   // room for parts
    float *parts = s->parts + s->used;
    s->used += (count + 63) / 64 * 64;
    if (s->used > s->room) die("the sums of a step need more than the %zu numbers planned", s->room);
    return parts;
}
// The two together: where the parts [rows, cols] go, whose sum over rows is added to dst later
static float *sum_parts(Sums *s, float *dst, int rows, int cols) {
    float *parts = sums_take(s, (size_t)rows * (size_t)cols);
    sum_later(s, dst, parts, rows, cols, cols);
    return parts;
}

// out = in rounded to floatX. 4 + 2 bytes an element; bound by memory.
template <class Out, class In>
__global__ void __launch_bounds__(256) cast_kernel(Out *out, const In *in, size_t n) {
    size_t i = ((size_t)blockIdx.x * 256 + threadIdx.x) * 4;
    if (i < n) store4(out + i, load4(in + i));
}
template <class Out, class In> static void cast(Out *out, const In *in, size_t n, cudaStream_t on = stream) {
    if (!n) return;   // n is a multiple of 4
    cast_kernel<Out, In><<<(unsigned)((n / 4 + 255) / 256), 256, 0, on>>>(out, in, n);
    LAUNCHED();
}

// ----------------------------------------------------------------------------------------------------------
// The matrix product, by cuBLASLt. What tells one product from another is its key; for each key a plan is
// made once: descriptors, and the fastest of the algorithms that cuBLASLt proposes, timed on the product
// itself while the model is created (`tuning`). Split sums are added through the workspace in a fixed order,
// so a plan gives the same bits each time. Since timings vary, the choices are kept in a file (GEMM_PLANS in
// the environment, or build/gemm_plans.txt where there is a folder build); the next run takes them from there
// and repeats this one's bits.
//
// Nothing says which products cuBLASLt takes on which card (a dimension of 1 or an odd row length is
// doubtful). One that it refuses is done by simpler ones: without the bias, to which it is added, then a
// batch one by one, and at last by a plain kernel.

typedef struct {
    int M, N, K, lda, ldb, ldc;           // C[M,N] (+)= op(A)[M,K] op(B)[K,N], row-major; ld: from row to row
    int ta, tb, add, float_out;           // op transposes where ta, tb; C is float or floatX
    int epilogue, aux_ld, align, batch;   // align: of all pointers; batch products, each stepa ... further
    int64_t stepa, stepb, stepc, step_bias;
} GemmKey;
typedef struct {
    GemmKey key;
    cublasLtMatmulDesc_t op;
    cublasLtMatrixLayout_t a, b, c;
    cublasLtMatmulAlgo_t algo;
    int refused;       // by cuBLASLt
    int gelu_inside;   // 1: GELU in the epilogue is faster than a kernel of its own, 0: slower, -1: not known
} GemmPlan;

enum { MAX_PLANS = 16384, MAX_PROPOSALS = 16 };   // a training run makes about a hundred; tests, thousands
static GemmPlan *plans[MAX_PLANS];
static int plan_count, timed_count;
static int tuning;       // 1 while the model is created: new plans are timed
static int plans_kept;   // 1: what was timed last is in the file
static cublasLtHandle_t lt;
static void *workspace;
static size_t workspace_bytes = (size_t)32 << 20;

static void check_lt(cublasStatus_t s, const char *file, int line) {
    if (s != CUBLAS_STATUS_SUCCESS) die("cuBLASLt: status %d (%s:%d)", (int)s, file, line);
}
#define CHECK_LT(call) check_lt((call), __FILE__, __LINE__)
#define SET(op, name, value)                                                                                 \
    CHECK_LT(cublasLtMatmulDescSetAttribute(op, CUBLASLT_MATMUL_DESC_##name, &value, sizeof(value)))

static const char *plans_path(void) {
    const char *path = getenv("GEMM_PLANS");
    return path ? path : "build/gemm_plans.txt";
}
// The start of a line of that file: GPU, library and type, what was chosen, and the key
enum Choice { ALGORITHM, GELU_INSIDE };
static void plan_line(char *out, size_t size, enum Choice what, const GemmKey *k) {
    snprintf(out, size,
             "%s, cuBLASLt %zu, %s, %s of %d x %d x %d ld %d %d %d op %d%d%d%d%d aux %d align %d batch %d "
             "%lld %lld %lld %lld:",
             card.name, cublasLtGetVersion(), sizeof(floatX) == 4 ? "float" : "bf16",
             what == ALGORITHM ? "algorithm" : "GELU inside", k->M, k->N, k->K, k->lda, k->ldb, k->ldc, k->ta,
             k->tb, k->add, k->float_out, k->epilogue, k->aux_ld, k->align, k->batch, (long long)k->stepa,
             (long long)k->stepb, (long long)k->stepc, (long long)k->step_bias);
}
static int plan_remembered(enum Choice what, const GemmKey *k) {   // -1: not in the file
    char want[768], line[896];
    int choice = -1;
    FILE *f = fopen(plans_path(), "r");
    if (!f) return -1;
    plan_line(want, sizeof(want), what, k);
    while (fgets(line, sizeof(line), f))
        if (!strncmp(line, want, strlen(want))) choice = atoi(line + strlen(want));
    fclose(f);
    return choice;
}
static void plan_remember(enum Choice what, const GemmKey *k, int choice) {
    char line[768];
    FILE *f = fopen(plans_path(), "a");
    plans_kept = f != NULL;
    timed_count++;
    if (!f) return;
    plan_line(line, sizeof(line), what, k);
    fprintf(f, "%s %d\n", line, choice);
    fclose(f);
}

static cublasLtMatrixLayout_t layout_of(cudaDataType type, int rows, int cols, int ld, int batch,
                                        int64_t step) {
    cublasLtMatrixLayout_t l;   // in cuBLASLt's terms a row-major [rows, cols] is a [cols, rows] by columns
    int32_t count = batch;
    CHECK_LT(cublasLtMatrixLayoutCreate(&l, type, (uint64_t)cols, (uint64_t)rows, ld));
    if (batch == 1) return l;
    CHECK_LT(cublasLtMatrixLayoutSetAttribute(l, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof(count)));
    CHECK_LT(cublasLtMatrixLayoutSetAttribute(l, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &step,
                                              sizeof(step)));
    return l;
}

// The milliseconds that work() takes on the GPU: the least of three turns after one that does not count
template <class Work> static float time_least(Work work) {
    float least = INFINITY, ms;
    cudaEvent_t begin, end;
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    for (int turn = 0; turn < 4; turn++) {
        CHECK(cudaEventRecord(begin, stream));
        work();
        CHECK(cudaEventRecord(end, stream));
        CHECK(cudaEventSynchronize(end));
        CHECK(cudaEventElapsedTime(&ms, begin, end));
        if (turn) least = fminf(least, ms);
    }
    CHECK(cudaEventDestroy(begin));
    CHECK(cudaEventDestroy(end));
    return least;
}

// Times the proposals on these operands and returns the fastest; -1 if none can be run. (A product that adds
// to C adds several times then: what is computed while tuning is thrown away.)
static int plan_time(const GemmPlan *p, const cublasLtMatmulHeuristicResult_t *found, int count, void *C,
                     const void *A, const void *B) {
    float least = INFINITY, beta = (float)p->key.add, one = 1;
    int best = -1;
    for (int i = 0; i < count; i++) {
        cublasStatus_t status = CUBLAS_STATUS_SUCCESS;
        float ms = time_least([&] {
            status = cublasLtMatmul(lt, p->op, &one, B, p->b, A, p->a, &beta, C, p->c, C, p->c,
                                    &found[i].algo, workspace, workspace_bytes, stream);
        });
        if (status == CUBLAS_STATUS_SUCCESS && (best < 0 || ms < 0.98f * least)) least = ms, best = i;
    }
    return best;
}

// Makes the plan for a key. cuBLASLt thinks in columns: the row-major C = op(A) op(B) is its
// C^T = op(B)^T op(A)^T, so that A and B change places.
static GemmPlan *plan_make(const GemmKey *k, void *C, const void *A, const void *B, const void *bias,
                           void *aux) {
    GemmPlan *p = (GemmPlan *)alloc_zero(1, sizeof(GemmPlan));
    p->key = *k;
    p->gelu_inside = plan_remembered(GELU_INSIDE, k);
    cublasOperation_t ta = k->tb ? CUBLAS_OP_T : CUBLAS_OP_N, tb = k->ta ? CUBLAS_OP_T : CUBLAS_OP_N;
    cublasLtEpilogue_t epilogue = (cublasLtEpilogue_t)k->epilogue;
    CHECK_LT(cublasLtMatmulDescCreate(&p->op, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    SET(p->op, TRANSA, ta);
    SET(p->op, TRANSB, tb);
    SET(p->op, EPILOGUE, epilogue);
    if (epilogue != CUBLASLT_EPILOGUE_DEFAULT) {
        int64_t ld = k->aux_ld;
        if (bias) SET(p->op, BIAS_POINTER, bias);
        if (aux) SET(p->op, EPILOGUE_AUX_POINTER, aux);
        if (aux) SET(p->op, EPILOGUE_AUX_LD, ld);
        if (k->step_bias) SET(p->op, BIAS_BATCH_STRIDE, k->step_bias);
    }
    p->a = layout_of(FLOATX_TYPE, k->ta ? k->K : k->M, k->ta ? k->M : k->K, k->lda, k->batch, k->stepa);
    p->b = layout_of(FLOATX_TYPE, k->tb ? k->N : k->K, k->tb ? k->K : k->N, k->ldb, k->batch, k->stepb);
    p->c = layout_of(k->float_out ? CUDA_R_32F : FLOATX_TYPE, k->M, k->N, k->ldc, k->batch, k->stepc);
    cublasLtMatmulPreference_t wish;
    uint32_t align = (uint32_t)k->align, schemes = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    static const cublasLtMatmulPreferenceAttributes_t alignments[] = {
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
    CHECK_LT(cublasLtMatmulPreferenceCreate(&wish));
    CHECK_LT(cublasLtMatmulPreferenceSetAttribute(wish, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                  &workspace_bytes, sizeof(workspace_bytes)));
    CHECK_LT(cublasLtMatmulPreferenceSetAttribute(wish, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &schemes,
                                                  sizeof(schemes)));
    for (int i = 0; i < 4; i++)
        CHECK_LT(cublasLtMatmulPreferenceSetAttribute(wish, alignments[i], &align, sizeof(align)));
    static cublasLtMatmulHeuristicResult_t found[MAX_PROPOSALS];
    int count = 0;
    cublasStatus_t status =
        cublasLtMatmulAlgoGetHeuristic(lt, p->op, p->b, p->a, p->c, p->c, wish, MAX_PROPOSALS, found, &count);
    CHECK_LT(cublasLtMatmulPreferenceDestroy(wish));
    p->refused = status != CUBLAS_STATUS_SUCCESS || count == 0;
    int choice = count > 1 ? plan_remembered(ALGORITHM, k) : 0;
    if (choice < 0 && tuning && !p->refused) {
        choice = plan_time(p, found, count, C, A, B);
        p->refused = choice < 0;
        if (!p->refused) plan_remember(ALGORITHM, k, choice);
    }
    p->algo = found[choice < 0 || choice >= count ? 0 : choice].algo;
    if (plan_count == MAX_PLANS) die("more than %d different matrix products", MAX_PLANS);
    return plans[plan_count++] = p;
}

static GemmKey gemm_key(int M, int N, int K, int ta, int tb) {
    GemmKey k;
    memset(&k, 0, sizeof(k));
    k.M = M;
    k.N = N;
    k.K = K;
    k.ta = ta;
    k.tb = tb;
    k.batch = 1;
    k.epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    k.lda = ta ? M : K;
    k.ldb = tb ? K : N;
    k.ldc = N;
    return k;
}

// For --profile: the product that was just queued
static void profile_product(const GemmKey *k) {
    if (!profile.recording) return;
    enum Work work = k->ta ? PRODUCT_WEIGHT : k->tb ? PRODUCT : PRODUCT_BACK;
    double M = k->M, N = k->N, K = k->K, of = sizeof(floatX), n = k->batch;
    double flops = 2 * M * N * K * n, bytes = n * (of * (M * K + K * N + (k->aux_ld ? M * N : 0)) +
                                                   M * N * (k->float_out ? 4 : of) * (1 + k->add));
    double peak = peak_flops(), memory = peak_bandwidth();
    Spent *s = &profile.spent[profile.place][work];
    s->flops += flops;
    s->bytes += bytes;
    s->floor += fmax(flops / (REACHED_FLOPS * (peak ? peak : 989.4e12)),
                     bytes / (REACHED_BYTES * (memory ? memory : 3.35e12)));
    profile_mark(profile.place, work);
}

static GemmPlan *plan_of(GemmKey *k, void *C, const floatX *A, const floatX *B, const void *bias, void *aux) {
    uintptr_t bits = (uintptr_t)A | (uintptr_t)B | (uintptr_t)C | 256;
    bits |= (uintptr_t)(k->stepa | k->stepb) * sizeof(floatX) |
            (uintptr_t)k->stepc * (k->float_out ? 4 : sizeof(floatX));
    k->align = (int)(bits & (~bits + 1));
    for (int i = 0; i < plan_count; i++)
        if (!memcmp(&plans[i]->key, k, sizeof(*k))) return plans[i];
    return plan_make(k, C, A, B, bias, aux);
}

// C (+)= op(A) op(B), then the epilogue: bias [N] of C's type, aux of floatX. Returns 0, with nothing done,
// if cuBLASLt refuses, which it may do only here although it proposed the algorithm.
static int matmul_lt(GemmPlan *p, void *C, const floatX *A, const floatX *B, const void *bias, void *aux) {
    float one = 1, beta = (float)p->key.add;
    if (p->refused) return 0;
    if (bias) SET(p->op, BIAS_POINTER, bias);
    if (aux) SET(p->op, EPILOGUE_AUX_POINTER, aux);
    cublasStatus_t status = cublasLtMatmul(lt, p->op, &one, B, p->b, A, p->a, &beta, C, p->c, C, p->c,
                                           &p->algo, workspace, workspace_bytes, stream);
    p->refused = status == CUBLAS_STATUS_NOT_SUPPORTED || status == CUBLAS_STATUS_INVALID_VALUE ||
                 status == CUBLAS_STATUS_ARCH_MISMATCH;
    if (p->refused) return 0;
    CHECK_LT(status);
    profile_product(&p->key);
    return 1;
}

// out[rows,cols], rows ld apart, (+)= bias[cols]; z counts independent ones, each `step` and `bias_step`
// further. Writes an element once; bound by memory.
template <class E>
__global__ void __launch_bounds__(256) bias_rows_kernel(E *out, const E *bias, int rows, int cols, int ld,
                                                        int64_t step, int64_t bias_step, int add) {
    size_t i = (size_t)blockIdx.x * 256 + threadIdx.x, row = i / cols, c = i % cols;
    if (row >= (size_t)rows) return;
    E *at = out + blockIdx.z * step + row * ld + c;
    float b = to_float(bias[blockIdx.z * bias_step + c]);
    store(at, add ? to_float(*at) + b : b);
}
// The product of a key without batch or epilogue. A block makes 16 x 16 numbers of C, a thread one, from
// tiles of op(A) and op(B) in shared memory; sums in float, in a fixed order. Bound by shared memory.
template <class E>
__global__ void __launch_bounds__(256)
    matmul_kernel(E *C, const floatX *A, const floatX *B, const GemmKey k) {
    __shared__ float a[16][17];
    __shared__ float b[16][17];
    int x = threadIdx.x % 16, y = threadIdx.x / 16, m = blockIdx.x * 16 + y, n = blockIdx.y * 16 + x;
    float sum = 0;
    for (int k0 = 0; k0 < k.K; k0 += 16) {
        int ka = k0 + x, kb = k0 + y;
        size_t at_a = k.ta ? (size_t)ka * k.lda + m : (size_t)m * k.lda + ka;
        size_t at_b = k.tb ? (size_t)n * k.ldb + kb : (size_t)kb * k.ldb + n;
        a[y][x] = m < k.M && ka < k.K ? to_float(A[at_a]) : 0;
        b[y][x] = n < k.N && kb < k.K ? to_float(B[at_b]) : 0;
        __syncthreads();
        for (int i = 0; i < 16; i++) sum += a[y][i] * b[i][x];
        __syncthreads();
    }
    if (m >= k.M || n >= k.N) return;
    E *to = C + (size_t)m * k.ldc + n;
    store(to, k.add ? to_float(*to) + sum : sum);
}
template <class E> static void bias_rows(E *out, const E *bias, const GemmKey *k) {
    dim3 grid((unsigned)(((size_t)k->M * k->N + 255) / 256), 1, (unsigned)k->batch);
    bias_rows_kernel<E>
        <<<grid, 256, 0, stream>>>(out, bias, k->M, k->N, k->ldc, k->stepc, k->step_bias, k->add);
    LAUNCHED();
}
template <class E> static void matmul_plain(E *C, const floatX *A, const floatX *B, const GemmKey *k) {
    dim3 grid((unsigned)div_up(k->M, 16), (unsigned)div_up(k->N, 16));
    matmul_kernel<E><<<grid, 256, 0, stream>>>(C, A, B, *k);
    LAUNCHED();
}

// C (+)= op(A) op(B) + bias (NULL: none), C and bias of type E: by cuBLASLt, or in simpler steps
template <class E> static void matmul(GemmKey k, E *C, const floatX *A, const floatX *B, const E *bias) {
    k.float_out = sizeof(E) == 4;
    k.epilogue = bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
    if (matmul_lt(plan_of(&k, C, A, B, bias, NULL), C, A, B, bias, NULL)) return;
    GemmKey simpler = k;
    simpler.step_bias = 0;
    if (bias) {
        bias_rows<E>(C, bias, &k);   // first, so that a bf16 is rounded once
        simpler.add = 1;
        matmul<E>(simpler, C, A, B, NULL);
    } else if (k.batch > 1) {
        simpler.batch = 1;
        simpler.stepa = simpler.stepb = simpler.stepc = 0;
        for (int i = 0; i < k.batch; i++)
            matmul<E>(simpler, C + i * k.stepc, A + i * k.stepa, B + i * k.stepb, NULL);
    } else matmul_plain<E>(C, A, B, &k);
}

// GELU (or its slope) in the epilogue of a product, `inside`, which returns 0 if cuBLASLt refuses, or a
// product and a kernel, `apart`: whichever took less time on these operands while tuning. Not timed: inside.
template <class Inside, class Apart> static void gelu_way(GemmPlan *p, Inside inside, Apart apart) {
    if (tuning && p->gelu_inside < 0 && inside()) {
        apart();   // makes its plan
        p->gelu_inside = time_least(inside) < time_least(apart);
        plan_remember(GELU_INSIDE, &p->key, p->gelu_inside);
    }
    if (p->gelu_inside == 0 || !inside()) apart();
}

// One line: how many plans there are, and which products are not done as they would be at best
static void plans_report(FILE *to) {
    int biases = 0, batches = 0, plain = 0, gelu = 0, inside = 0;
    GemmKey big = {};
    for (int i = 0; i < plan_count; i++) {
        const GemmPlan *p = plans[i];
        const GemmKey *k = &p->key;
        if (k->aux_ld) gelu++, inside += !p->refused && p->gelu_inside;
        else if (p->refused && k->epilogue != CUBLASLT_EPILOGUE_DEFAULT) biases++;
        else if (p->refused && k->batch > 1) batches++;
        else if (p->refused) {
            plain++;
            if ((double)k->M * k->N * k->K > (double)big.M * big.N * big.K) big = *k;
        }
    }
    fprintf(to, "matrix products: %d plans, %d timed now", plan_count, timed_count);
    if (timed_count) fprintf(to, " (%s %s)", plans_kept ? "kept in" : "not kept: cannot write", plans_path());
    if (gelu) fprintf(to, "; GELU inside %d of %d", inside, gelu);
    if (biases + batches + plain) fprintf(to, "; cuBLASLt refuses");
    if (biases) fprintf(to, " %d with a bias (added by a kernel)%s", biases, batches + plain ? "," : "");
    if (batches) fprintf(to, " %d batches (done one by one)%s", batches, plain ? "," : "");
    if (plain) fprintf(to, " %d, up to %d x %d x %d (a plain kernel)", plain, big.M, big.N, big.K);
    fprintf(to, "\n");
}

// ----------------------------------------------------------------------------------------------------------
// Layers. Gradients of weights are overwritten, or added to where `add`; the rest as in train_srdit.c.

// out[N,O] = in[N,I] w[O,I]^T + b[O]; out and b are floatX or float; ldw: a row of w in memory (I, or more)
template <class E>
static void linear_forward(E *out, const floatX *in, const floatX *w, const E *b, int N, int I, int O,
                           int ldw = 0) {
    GemmKey k = gemm_key(N, O, I, 0, 1);
    if (ldw) k.ldb = ldw;
    matmul<E>(k, out, in, w, b);
}

// din[N,I] (+)= dout[N,O] w[O,I]
template <class E>
static void linear_backward_input(E *din, const floatX *dout, const floatX *w, int N, int I, int O, int add,
                                  int ldw = 0) {
    GemmKey k = gemm_key(N, I, O, 0, 0);
    if (ldw) k.ldb = ldw;
    k.add = add;
    matmul<E>(k, din, dout, w, NULL);
}

// dw[O,I] (+)= dout[N,O]^T in[N,I], in float; `count` such products, dout and in one behind the other, dw
// `step` apart
static void linear_backward_weight(float *dw, const floatX *dout, const floatX *in, int N, int I, int O,
                                   int add, int ldw = 0, int count = 1, int64_t step = 0) {
    GemmKey k = gemm_key(O, I, N, 1, 0);
    if (ldw) k.ldc = ldw;
    k.add = add;
    if (count > 1) {
        k.batch = count;
        k.stepa = (int64_t)step_of((size_t)N * O);
        k.stepb = (int64_t)step_of((size_t)N * I);
        k.stepc = step;
    }
    matmul<float>(k, dw, dout, in, NULL);
}

// The residual stream as the layer before leaves it: x + gate y, not yet added up, so that the next reader
// can do it. Row n of B T, of sample b, is
//   x[x_ids ? b x_tokens + x_ids[n] : n] + gate[b] y[y_rows ? y_rows[n] : n],     where gate NULL is 1.
typedef struct {
    const float *x;
    const int *x_ids;   // gather (g's first block reads the encoder's output at the kept tokens)
    int x_tokens;
    const floatX *y;     // NULL: only x
    const int *y_rows;   // scatter (the decoder's first block reads the fusion's two halves)
    const float *gate;
    int gate_stride;
} Residual;
static Residual residual_of(const float *x, const float *gate, int gate_stride, const floatX *y) {
    Residual r = {x, NULL, 0, y, NULL, gate, gate_stride};
    return r;
}

// Where row (b, t) of [B,T] lies: there if cls < 0; else the patches of all samples come first, then the CLS
// tokens (cls 1: token 0 is CLS; 0: there is none)
__device__ __forceinline__ size_t row_of(int b, int t, int B, int T, int cls) {
    if (cls < 0) return (size_t)b * T + t;
    return cls && t == 0 ? (size_t)B * (T - 1) + b : (size_t)b * (T - cls) + t - cls;
}

// A lane's columns d0, d0 + 128, ... of a row, as far as they lie below d1: 4 V numbers, zeros for the rest
// and where there is no row. All loads are under way before the first is waited for.
template <int V, class R, class E>
__device__ __forceinline__ void load_columns(R (&v)[V], const E *row, int d0, int d1) {
#pragma unroll
    for (int i = 0; i < V; i++) v[i] = row && d0 + i * 128 < d1 ? raw4(row + d0 + i * 128) : R{};
}

// x + gate y on these columns
template <int V>
__device__ __forceinline__ void load_residual(Vec4 (&v)[V], const float *x, const floatX *y,
                                              const float *gate, int d0, int D) {
    Raw4 ys[V];
    Vec4 g[V];
    load_columns(v, x, d0, D);
    load_columns(ys, y, d0, D);
    load_columns(g, gate, d0, D);
#pragma unroll
    for (int i = 0; i < V; i++) {
        Vec4 yv = unpack4(ys[i]);
        for (int j = 0; j < 4; j++) v[i].x[j] += (gate ? g[i].x[j] : 1) * yv.x[j];
    }
}

// x_out = x + gate y, r = 1 / sqrt(mean(x_out^2) + 1e-6), h = x_out r (1 + scale) + shift, in one pass: the
// gated residual of one layer with RMSNorm and adaLN of the next.
//   x_out [rows,D] float (NULL: not stored), h [rows,D] floatX (NULL: not stored), r [rows]
//   shift, scale [B, stride] float; shift NULL: no norm, h is x_out rounded
//   cls >= 0: h is stored patches first (see above), as the two last linear layers read it
// One warp a row, V times 4 numbers a lane at once, which stay in registers (a row of more than V x 128 is
// read a second time).
// Reads 4 + 2, writes 4 + 2 bytes an element: 0.6 GB, 0.2 ms; bound by memory.
template <int V>
__global__ void __launch_bounds__(256, V > 6   ? 1
                                       : V > 3 ? 2
                                               : 3)
    norm_modulate_forward_kernel(float *x_out, floatX *h, float *r, Residual in, const float *shift,
                                 const float *scale, int stride, int cls, int rows, int T, int D) {
    int n = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (n >= rows) return;
    int b = n / T;
    const float *x = in.x + (in.x_ids ? (size_t)b * in.x_tokens + in.x_ids[n] : (size_t)n) * D;
    const floatX *y = in.y ? in.y + (size_t)(in.y_rows ? in.y_rows[n] : n) * D : NULL;
    const float *gate = in.gate ? in.gate + (size_t)b * in.gate_stride : NULL;
    Vec4 v[V];
    float sum = 0;
    for (int first = 0; first < D; first += V * 128) {
        int d0 = first + lane * 4;
        load_residual(v, x, y, gate, d0, D);
#pragma unroll
        for (int i = 0; i < V; i++) {
            int d = d0 + i * 128;
            if (x_out && d < D) store4(x_out + (size_t)n * D + d, v[i]);
            for (int j = 0; j < 4; j++) sum += v[i].x[j] * v[i].x[j];
        }
    }
    float rn = 1;
    if (shift) {
        rn = rsqrtf(sum_lanes<32>(sum) / D + NORM_EPS);
        if (lane == 0) r[n] = rn;
        shift += (size_t)b * stride;
        scale += (size_t)b * stride;
    }
    if (!h) return;
    floatX *to = h + row_of(b, n - b * T, rows / T, T, cls) * D;
    for (int first = 0; first < D; first += V * 128) {
        int d0 = first + lane * 4;
        if (D > V * 128) load_residual(v, x, y, gate, d0, D);
        Vec4 sh[V], sc[V];   // zeros where there is no norm
        load_columns(sh, shift, d0, D);
        load_columns(sc, scale, d0, D);
#pragma unroll
        for (int i = 0; i < V; i++) {
            int d = d0 + i * 128;
            for (int j = 0; j < 4; j++) v[i].x[j] = v[i].x[j] * rn * (1 + sc[i].x[j]) + sh[i].x[j];
            if (d < D) store4(to + d, v[i]);
        }
    }
}
static void norm_modulate_forward(float *x_out, floatX *h, float *r, const Residual &in, const float *shift,
                                  const float *scale, int stride, int cls, int B, int T, int D) {
    unsigned grid = (unsigned)div_up(B * T, 8);
#define NORM(V)                                                                                              \
    norm_modulate_forward_kernel<V>                                                                          \
        <<<grid, 256, 0, stream>>>(x_out, h, r, in, shift, scale, stride, cls, B * T, T, D)
    if (D <= 128) NORM(1);
    else if (D <= 384) NORM(3);
    else if (D <= 768 || D > 1152) NORM(6);
    else NORM(9);
#undef NORM
    LAUNCHED();
}

// The backward of the same, from dh and the gradient dx of x_out by its other readers. With x^ = x_out r and
// dx^ = dh (1 + scale):
//   dx += r (dx^ - x^ mean(dx^ x^)),  dshift = sum_t dh,  dscale = sum_t dh x^;
// and then, as x_out = x + gate y:
//   dy = gate dx,  dgate = sum_t dx y,  db = sum_b gate sum_t dx, of the bias that was added to y (or, where
//   dy is stored patches first, to the patches).
typedef struct {
    float *dx;   // [rows,D]; read unless `fresh` (then it is taken as 0), written unless NULL
    int fresh;
    const float *dx2;   // where dh is NULL: a second gradient of x_out, of the rows dx2_rows[n] < dx2_count
    const int *dx2_rows;
    int dx2_count;
    const floatX *dh;   // NULL: there was no norm
    int dh_cls;         // >= 0: dh is stored patches first
    const float *x, *r, *scale;
    int stride;
    const floatX *y;     // NULL: nothing was added
    const float *gate;   // NULL: 1
    int gate_stride;
    floatX *dy;   // NULL: not wanted
    int dy_cls;   // >= 0: dy is stored patches first
    // sums over a sample's tokens, each NULL where it is not wanted: [B, stride], [B, gate_stride], [B,D]
    floatX *dshift, *dscale, *dgate;
    float *bias;      // what the sample adds to the gradient of y's bias
    float *parts;     // [B, chunks, 4, D]: sums over a chunk of tokens of dh, dh n, dx y, dx
    unsigned *done;   // [B, slabs]: chunks that are there; 0 between launches
    int T, D, chunk, slab;
} NormBackward;

// Stores sum k of sample b, columns d to d + 3
__device__ __forceinline__ void norm_sum_store(const NormBackward &a, int k, int b, int d, Vec4 sum) {
    if (k < 3) {
        floatX *to = k == 0 ? a.dshift : k == 1 ? a.dscale : a.dgate;
        if (to) store4(to + (size_t)b * (k < 2 ? a.stride : a.gate_stride) + d, sum);
    } else if (a.bias) {
        for (int j = 0; j < 4 && a.gate; j++) sum.x[j] *= a.gate[(size_t)b * a.gate_stride + d + j];
        store4(a.bias + (size_t)b * a.D + d, sum);
    }
}

// One pass: a block takes `chunk` tokens of one sample, a warp every NORM_WARPS-th of them. A row's four
// inputs are asked for at once and stay in registers until mean(dx^ x^) is known; a lane has the same columns
// of every row, so the column sums stay in registers too, until those of the warps are added through shared
// memory [NORM_WARPS, slab]. Those of several chunks are added, in order, by the block of the sample that is
// the last to leave its own. Where D is more than NORM_SLAB, blocks z share the columns, each `slab` of them,
// and read the others of dh and x for the mean only. Reads 2 + 4 + 4 + 2, writes 4 + 2 bytes an element:
// 0.9 GB, 0.3 ms; bound by memory. The price is 32 V registers a lane: few warps, each with 3 KB x V / 2 of
// loads under way.
enum { NORM_WARPS = 4, NORM_SLAB = 768 };
template <int V>
__global__ void __launch_bounds__(NORM_WARPS * 32, V > 3 ? 2 : 4)
    norm_modulate_backward_kernel(const NormBackward a) {
    extern __shared__ float warp_sums[];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, b = blockIdx.y, D = a.D;
    int t0 = blockIdx.x * a.chunk, t1 = min(t0 + a.chunk, a.T);
    int first = blockIdx.z * a.slab, d0 = first + lane * 4, d1 = min(first + a.slab, D);
    const float *scale = a.dh ? a.scale + (size_t)b * a.stride : NULL,
                *gate = a.gate ? a.gate + (size_t)b * a.gate_stride : NULL;
    Vec4 sums[4][V] = {};
    for (int t = t0 + warp; t < t1; t += NORM_WARPS) {
        int n = b * a.T + t;
        size_t at = (size_t)n * D;
        const floatX *dh_row = a.dh ? a.dh + row_of(b, t, gridDim.y, a.T, a.dh_cls) * D : NULL;
        const float *more = scale;
        if (a.dx2) more = a.dx2_rows[n] < a.dx2_count ? a.dx2 + (size_t)a.dx2_rows[n] * D : NULL;
        Raw4 dh[V], y[V];
        Vec4 x[V], dx[V], m[V], g[V];   // m: scale, then dx^; the second gradient where there is no norm
        load_columns(dh, dh_row, d0, d1);
        load_columns(x, a.dh ? a.x + at : NULL, d0, d1);
        load_columns(dx, a.fresh ? NULL : a.dx + at, d0, d1);
        load_columns(y, a.y ? a.y + at : NULL, d0, d1);
        load_columns(m, more, d0, d1);
        float r = 1, mean = 0;
        if (a.dh) {
            r = a.r[n];
#pragma unroll
            for (int i = 0; i < V; i++) {
                Vec4 v = unpack4(dh[i]);
                for (int j = 0; j < 4; j++) {
                    x[i].x[j] *= r;
                    sums[0][i].x[j] += v.x[j];
                    sums[1][i].x[j] += v.x[j] * x[i].x[j];
                    m[i].x[j] = v.x[j] * (1 + m[i].x[j]);
                    mean += m[i].x[j] * x[i].x[j];
                }
            }
            for (int d = lane * 4; d < D && a.slab < D; d += 128) {   // the other slabs' part of the mean
                if (d >= first && d < d1) continue;
                Vec4 v = load4(dh_row + d), xs = load4(a.x + at + d), sc = load4(scale + d);
                for (int j = 0; j < 4; j++) mean += v.x[j] * (1 + sc.x[j]) * (xs.x[j] * r);
            }
        }
        load_columns(g, gate, d0, d1);
        mean = sum_lanes<32>(mean) / D;
        floatX *dy = a.dy ? a.dy + row_of(b, t, gridDim.y, a.T, a.dy_cls) * D : NULL;
#pragma unroll
        for (int i = 0; i < V; i++) {
            Vec4 v = dx[i], ys = unpack4(y[i]);
            for (int j = 0; j < 4; j++) {
                v.x[j] += r * (m[i].x[j] - x[i].x[j] * mean);
                sums[2][i].x[j] += v.x[j] * ys.x[j];
                if (t >= a.dy_cls) sums[3][i].x[j] += v.x[j];   // (only CLS stands before that)
            }
            int d = d0 + i * 128;
            if (a.dx && d < d1) store4(a.dx + at + d, v);
            for (int j = 0; j < 4 && gate; j++) v.x[j] *= g[i].x[j];
            if (dy && d < d1) store4(dy + d, v);
        }
    }
    float *parts = a.parts + ((size_t)b * gridDim.x + blockIdx.x) * 4 * D;
#pragma unroll
    for (int k = 0; k < 4; k++) {
        if (k) __syncthreads();   // until all have read the ones before
        for (int i = 0; i < V; i++)
            if (d0 + i * 128 < d1) store4(warp_sums + warp * a.slab + d0 - first + i * 128, sums[k][i]);
        __syncthreads();
#pragma unroll 1
        for (int d = threadIdx.x * 4; d < d1 - first; d += NORM_WARPS * 128) {
            Vec4 sum = load4(warp_sums + d);
            for (int w = 1; w < NORM_WARPS; w++) {
                Vec4 more = load4(warp_sums + w * a.slab + d);
                for (int j = 0; j < 4; j++) sum.x[j] += more.x[j];
            }
            if (gridDim.x == 1) norm_sum_store(a, k, b, first + d, sum);
            else store4(parts + (size_t)k * D + first + d, sum);
        }
    }
    if (gridDim.x == 1) return;
    __shared__ int is_last;
    __threadfence();   // this block's parts are there before it is counted
    __syncthreads();
    if (threadIdx.x == 0)   // (which goes on to 0 from the last one)
        is_last = atomicInc(&a.done[b * gridDim.z + blockIdx.z], gridDim.x - 1) == gridDim.x - 1;
    __syncthreads();
    if (!is_last) return;
    __threadfence();   // from here on the others' are read
#pragma unroll 1
    for (int d = first + threadIdx.x * 4; d < d1; d += NORM_WARPS * 128)
#pragma unroll 1
        for (int k = 0; k < 4; k++) {
            Vec4 sum = {};
            const float *from = a.parts + ((size_t)b * gridDim.x * 4 + k) * D + d;
#pragma unroll 4
            for (unsigned c = 0; c < gridDim.x; c++) {
                Vec4 v = load4(from + (size_t)c * 4 * D);
                for (int j = 0; j < 4; j++) sum.x[j] += v.x[j];
            }
            norm_sum_store(a, k, b, d, sum);
        }
}

// Chunks of a sample's rows, of 32 rows at least: as many as let the card's multiprocessors, each with two
// blocks at a time, finish first. What a block needs besides its rows is counted as four of them.
static int norm_most_chunks(int T) { return div_up(T, 32); }
static int norm_chunks(int blocks, int T) {
    int best = 1, at_once = 2 * card.multiProcessorCount, least = INT_MAX;
    for (int chunks = 1; chunks <= norm_most_chunks(T); chunks++) {
        int time = div_up(blocks * chunks, at_once) * (div_up(T, chunks) + 4);
        if (time < least) least = time, best = chunks;
    }
    return best;
}
static void norm_modulate_backward(NormBackward *a, int B) {
    int slabs = div_up(a->D, NORM_SLAB), chunks = norm_chunks(B * slabs, a->T);
    a->chunk = div_up(a->T, chunks);
    a->slab = div_up(a->D / 4, slabs) * 4;
    dim3 grid((unsigned)chunks, (unsigned)B, (unsigned)slabs);
    size_t shared = (size_t)(NORM_WARPS * a->slab) * sizeof(float);
    if (a->slab <= 128) norm_modulate_backward_kernel<1><<<grid, NORM_WARPS * 32, shared, stream>>>(*a);
    else if (a->slab <= 384) norm_modulate_backward_kernel<3><<<grid, NORM_WARPS * 32, shared, stream>>>(*a);
    else norm_modulate_backward_kernel<6><<<grid, NORM_WARPS * 32, shared, stream>>>(*a);
    LAUNCHED();
}

// GELU, tanh form, and SiLU, as in train_srdit.c; `slope` is the derivative. The exponential
// is the device's own.
enum Activation { NONE, GELU, SILU };
__device__ __forceinline__ float gelu_tanh(float x) {
    float u = GELU_A * (x + GELU_B * x * x * x);
    return 1 - 2 / (expf(2 * u) + 1);   // tanh u; its error near 0 is small against the 1 it is added to
}
template <Activation A> __device__ __forceinline__ float activate(float x) {
    return A == GELU ? 0.5f * x * (1 + gelu_tanh(x)) : x / (1 + expf(-x));
}
template <Activation A> __device__ __forceinline__ float slope(float x) {
    if (A == GELU) {
        float h = gelu_tanh(x);
        return 0.5f * (1 + h) + 0.5f * x * (1 - h * h) * GELU_A * (1 + 3 * GELU_B * x * x);
    }
    float s = 1 / (1 + expf(-x));
    return s + x * s * (1 - s);
}

// out = act(in), a thread 4 times 4 numbers; buffers are padded, so the last four may lie past n. In bf16
// 2 + 2 bytes an element; bound by memory.
template <Activation A, class S>
__global__ void __launch_bounds__(256) activation_forward_kernel(floatX *out, const S *in, size_t n) {
    size_t at = (size_t)blockIdx.x * 4096 + threadIdx.x * 4;
    decltype(raw4(in)) x[4] = {};
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (at + i * 1024 < n) x[i] = raw4(in + at + i * 1024);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        Vec4 v = unpack4(x[i]);
        for (int j = 0; j < 4; j++) v.x[j] = activate<A>(v.x[j]);
        if (at + i * 1024 < n) store4(out + at + i * 1024, v);
    }
}
template <class S> static void silu_forward(floatX *out, const S *in, size_t n) {
    activation_forward_kernel<SILU, S><<<(unsigned)((n + 4095) / 4096), 256, 0, stream>>>(out, in, n);
    LAUNCHED();
}
static void gelu_forward(floatX *out, const floatX *in, size_t n) {
    activation_forward_kernel<GELU, floatX><<<(unsigned)((n + 4095) / 4096), 256, 0, stream>>>(out, in, n);
    LAUNCHED();
}

// din = dout act'(in) on [rows,cols], and the column sums of din over chunks of rows, parts [chunks,cols]:
// the gradient of the bias below. NONE: only the sums. z counts independent ones, one behind the other. A
// block is 8 rows at a time x 32 lanes of W columns. din may be dout. In bf16 reads 2 + 2, writes 2 bytes an
// element (NONE: reads 2); bound by memory.
template <Activation A, int W, class S>
__global__ void __launch_bounds__(256)
    activation_backward_kernel(floatX *din, float *parts, const floatX *dout, const S *in, int rows, int cols,
                               int chunk) {
    __shared__ float sums[8][32][W];
    int lane = threadIdx.x % 32, y = threadIdx.x / 32, c = (blockIdx.x * 32 + lane) * W;
    int r0 = blockIdx.y * chunk, r1 = min(r0 + chunk, rows);
    size_t matrix = blockIdx.z * step_of((size_t)rows * cols);
    float sum[W] = {};
    for (int r = r0 + y; W == 4 && r < r1 && c < cols; r += 32) {   // four rows' loads first
        Raw4 d[4] = {};
        decltype(raw4(in)) x[4] = {};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            size_t at = matrix + (size_t)(r + i * 8) * cols + c;
            if (r + i * 8 >= r1) continue;
            d[i] = raw4(dout + at);
            if (A != NONE) x[i] = raw4(in + at);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            Vec4 v = unpack4(d[i]), xs = unpack4(x[i]);
            for (int j = 0; j < 4 && A != NONE; j++) v.x[j] *= slope<A>(xs.x[j]);
            if (A != NONE && r + i * 8 < r1) store4(din + matrix + (size_t)(r + i * 8) * cols + c, v);
            for (int j = 0; j < W; j++) sum[j] += v.x[j];
        }
    }
    for (int r = r0 + y; W == 1 && r < r1 && c < cols; r += 8) {
        size_t at = matrix + (size_t)r * cols + c;
        float d = to_float(dout[at]);
        if (A != NONE) {
            d *= slope<A>(to_float(in[at]));
            store(&din[at], d);
        }
        sum[0] += d;
    }
    for (int j = 0; j < W; j++) sums[y][lane][j] = sum[j];
    __syncthreads();
    if (y || c >= cols) return;
    for (int j = 0; j < W; j++) {
        float total = 0;
        for (int i = 0; i < 8; i++) total += sums[i][lane][j];
        parts[((size_t)blockIdx.z * gridDim.y + blockIdx.y) * cols + c + j] = total;
    }
}
enum { BIAS_CHUNKS = 128 };   // at most; of at least 32 rows
// db[cols] (+)= the column sums of din, later; `count` matrices one behind the other, whose db are `step`
// apart
template <Activation A, class S>
static void activation_backward(floatX *din, float *db, Sums *sums, const floatX *dout, const S *in, int rows,
                                int cols, int count = 1, size_t step = 0) {
    int chunk = imax(32, div_up(rows, BIAS_CHUNKS)), chunks = div_up(rows, chunk), W = cols % 4 ? 1 : 4;
    float *parts = sums_take(sums, (size_t)count * (size_t)chunks * (size_t)cols);
    dim3 grid((unsigned)div_up(cols, 32 * W), (unsigned)chunks, (unsigned)count);
    if (W == 4)
        activation_backward_kernel<A, 4, S>
            <<<grid, 256, 0, stream>>>(din, parts, dout, in, rows, cols, chunk);
    else
        activation_backward_kernel<A, 1, S>
            <<<grid, 256, 0, stream>>>(din, parts, dout, in, rows, cols, chunk);
    LAUNCHED();
    for (int i = 0; i < count; i++)
        sum_later(sums, db + i * step, parts + (size_t)i * chunks * cols, chunks, cols, cols);
}
// db[O] (+)= column sums of dout[N,O], later
static void bias_backward(float *db, Sums *sums, const floatX *dout, int N, int O, int count = 1,
                          size_t step = 0) {
    activation_backward<NONE, floatX>(NULL, db, sums, dout, NULL, N, O, count, step);
}

// In float GELU is never an epilogue, whose tanh is too coarse for it; aux wants rows of a multiple of 8
static int gelu_may_be_inside(int F) { return sizeof(floatX) == 2 && use_gelu_epilogue && F % 8 == 0; }
// fc1[N,F] = in[N,D] w[F,D]^T + b[F],  gelu = GELU(fc1)
static void linear_gelu_forward(floatX *gelu, floatX *fc1, const floatX *in, const floatX *w, const floatX *b,
                                int N, int D, int F) {
    auto apart = [&] {
        linear_forward<floatX>(fc1, in, w, b, N, D, F);
        gelu_forward(gelu, fc1, (size_t)N * F);
    };
    if (!gelu_may_be_inside(F)) return apart();
    GemmKey k = gemm_key(N, F, D, 0, 1);
    k.epilogue = CUBLASLT_EPILOGUE_GELU_AUX_BIAS;
    k.aux_ld = F;
    GemmPlan *p = plan_of(&k, gelu, in, w, b, fc1);
    gelu_way(
        p, [&] { return matmul_lt(p, gelu, in, w, b, fc1); }, apart);
}
// d_fc1[N,F] = dout[N,D] w[D,F] GELU'(fc1), with w of fc2. Returns 1 if db[F] (+)= its column sums are left
// to the caller: where the product's epilogue took the slope. (DGELU_BGRAD, the epilogue that takes these
// sums too, would leave them in bf16, and has no fast kernel.)
static int linear_gelu_backward(floatX *d_fc1, float *db, Sums *sums, const floatX *dout, const floatX *w,
                                floatX *fc1, int N, int D, int F) {
    const size_t used = sums->used;
    const int count = sums->jobs.count;   // each attempt, when both ways are timed, asks for its sums anew
    auto anew = [&] { sums->used = used, sums->jobs.count = count; };
    int left = 0;
    auto apart = [&] {
        anew();
        linear_backward_input<floatX>(d_fc1, dout, w, N, F, D, 0);
        activation_backward<GELU, floatX>(d_fc1, db, sums, d_fc1, fc1, N, F);
        left = 0;
    };
    if (!gelu_may_be_inside(F)) return apart(), 0;
    GemmKey k = gemm_key(N, F, D, 0, 0);
    k.epilogue = CUBLASLT_EPILOGUE_DGELU;
    k.aux_ld = F;
    GemmPlan *p = plan_of(&k, d_fc1, dout, w, NULL, fc1);
    auto inside = [&] {
        anew();
        if (!matmul_lt(p, d_fc1, dout, w, NULL, fc1)) return 0;
        if (tuning) bias_backward(db, sums, d_fc1, N, F), anew();   // so that the times can be compared
        left = 1;
        return 1;
    };
    gelu_way(p, inside, apart);
    return left;
}

// RMSNorm with a weight, x r w (eps 1e-6), of the CLS token, put into the residual stream with
// its position; and the patches with theirs: out[B,T,D] = [CLS, patches] + pos_embed. One warp a
// row. 2 + 4 bytes read, 4 written.
__global__ void __launch_bounds__(256)
    embed_kernel(float *out, float *cls_r, const floatX *patches, const float *cls_proj,
                 const float *cls_norm, const float *pos, int cls, int rows, int T, int D) {
    int n = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (n >= rows) return;
    int b = n / T, t = n % T;
    float r = 0;
    const float *x = cls_proj + (size_t)b * D;
    if (cls && t == 0) {
        for (int d = lane; d < D; d += 32) r += x[d] * x[d];
        r = rsqrtf(sum_lanes<32>(r) / D + NORM_EPS);
        if (lane == 0) cls_r[b] = r;
    }
    for (int d = lane * 4; d < D; d += 128) {
        Vec4 v, p = load4(pos + (size_t)t * D + d);
        if (cls && t == 0) {
            Vec4 w = load4(cls_norm + d);
            v = load4(x + d);
            for (int j = 0; j < 4; j++) v.x[j] *= r * w.x[j];
        } else v = load4(patches + ((size_t)b * (T - cls) + t - cls) * D + d);
        for (int j = 0; j < 4; j++) v.x[j] += p.x[j];
        store4(out + (size_t)n * D + d, v);
    }
}

// out = x^ w with x^ = x r:
//   dx^ = dout w,  dx = r (dx^ - x^ mean(dx^ x^)),  dw_parts [B,D] = dout x^, summed later.
// A warp a row.
__global__ void __launch_bounds__(256)
    rmsnorm_backward_kernel(floatX *dx, float *dw_parts, const floatX *dout, const float *x, const float *r,
                            const float *w, int B, int D) {
    int b = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (b >= B) return;
    float sum = 0, rn = r[b];
    for (int d = lane; d < D; d += 32)
        sum += to_float(dout[(size_t)b * D + d]) * w[d] * x[(size_t)b * D + d] * rn;
    float mean = sum_lanes<32>(sum) / D;
    for (int d = lane; d < D; d += 32) {
        size_t at = (size_t)b * D + d;
        float g = to_float(dout[at]), n = x[at] * rn;
        dw_parts[at] = g * n;
        store(&dx[at], rn * (g * w[d] - n * mean));
    }
}

// patches[B,P,X] of x_t = (1 - t) x + t noise [B,C,S,S] (noise NULL: x itself), features in the
// order (channel, row, column) of a convolution's weight. A thread an element; 8 bytes read, 2
// written; bound by memory, small.
__global__ void __launch_bounds__(256) patchify_kernel(floatX *patches, const float *x, const float *noise,
                                                       const float *t, int C, int S, int p, size_t count) {
    size_t e = (size_t)blockIdx.x * 256 + threadIdx.x;
    if (e >= count) return;
    int X = C * p * p, G = S / p, i = (int)(e % X), patch = (int)(e / X % (G * G)),
        b = (int)(e / X / (G * G));
    int ch = i / (p * p), y = patch / G * p + i / p % p, z = patch % G * p + i % p;
    size_t at = (((size_t)b * C + ch) * S + y) * S + z;
    store(&patches[e], noise ? (1 - t[b]) * x[at] + t[b] * noise[at] : x[at]);
}
// The same for the CLS vectors [B,Z]
__global__ void __launch_bounds__(256)
    cls_input_kernel(floatX *out, const float *cls, const float *noise, const float *t, int Z, int count) {
    int e = blockIdx.x * 256 + threadIdx.x;
    if (e < count) store(&out[e], noise ? (1 - t[e / Z]) * cls[e] + t[e / Z] * noise[e] : cls[e]);
}

// Where feature i of patch row n lies in [B,C,S,S], in the order (row, column, channel) of the final layer
__device__ __forceinline__ size_t unpatchify_place(size_t n, int i, int C, int S, int p) {
    int G = S / p, patch = (int)(n % (G * G)), y = patch / G * p + i / C / p, z = patch % G * p + i / C % p;
    return ((n / (G * G) * C + i % C) * S + y) * S + z;
}
__global__ void __launch_bounds__(256)
    unpatchify_kernel(float *x, const float *patches, int C, int S, int p, size_t count) {
    size_t e = (size_t)blockIdx.x * 256 + threadIdx.x;
    int X = C * p * p;
    if (e < count) x[unpatchify_place(e / X, (int)(e % X), C, S, p)] = patches[e];
}

// e(t)[B,W] = [cos(t f_k), sin(t f_k)], f_k = 10000^(-k/128). A block a sample.
__global__ void __launch_bounds__(TIME_FEATURES / 2) time_features_kernel(floatX *out, const float *t) {
    int b = blockIdx.x, k = threadIdx.x;
    double angle = (double)t[b] * pow(10000, -k / (TIME_FEATURES / 2.0));
    store(&out[b * TIME_FEATURES + k], (float)cos(angle));
    store(&out[b * TIME_FEATURES + TIME_FEATURES / 2 + k], (float)sin(angle));
}

// cond [B,D] += the label's row, and its SiLU
__global__ void __launch_bounds__(256)
    label_kernel(float *cond, floatX *cond_silu, const float *label, const int *y, int D, int count) {
    int e = blockIdx.x * 256 + threadIdx.x;
    if (e >= count) return;
    float x = cond[e] += label[(size_t)y[e / D] * D + e % D];
    store(&cond_silu[e], activate<SILU>(x));
}
// d_cond [B,D] = silu'(cond) times the sum of the `count` parts [B,D] that the blocks' and
// the final adaLN left
__global__ void __launch_bounds__(256)
    condition_backward_kernel(floatX *d_cond, const float *parts, const float *cond, int count, int n) {
    int e = blockIdx.x * 256 + threadIdx.x;
    if (e >= n) return;
    float sum = 0;
    for (int i = 0; i < count; i++) sum += parts[(size_t)i * n + e];
    store(&d_cond[e], sum * slope<SILU>(cond[e]));
}
// dlabel[y[b]] += d_cond[b]: the block of the first sample with a label adds up all samples
// that have it, in order
__global__ void __launch_bounds__(256)
    label_backward_kernel(float *dlabel, const floatX *d_cond, const int *y, int B, int D) {
    int b = blockIdx.x;
    for (int i = 0; i < b; i++)
        if (y[i] == y[b]) return;
    for (int d = threadIdx.x; d < D; d += 256) {
        float sum = 0;
        for (int i = b; i < B; i++)
            if (y[i] == y[b]) sum += to_float(d_cond[(size_t)i * D + d]);
        dlabel[(size_t)y[b] * D + d] += sum;
    }
}

// rows[B T]: the row of G that each token reads: its own if g kept it, else the mask token's, which is row
// `mask`. ids [B,n] (NULL: all tokens, in order); of samples from `whole` on: none. A block a sample; those
// that follow write what stands behind the `mask` rows of g's output [padded,D]: the mask token, once more,
// and zeros up to a multiple of 64 rows.
__global__ void __launch_bounds__(256) rows_kernel(int *rows, floatX *g, const float *token, const int *ids,
                                                   int n, int T, int mask, int whole, int B, int D) {
    int b = blockIdx.x;
    if (b >= B) {
        for (int d = threadIdx.x; d < D; d += 256)
            store(&g[(size_t)(mask + b - B) * D + d], b - B < 2 ? token[d] : 0);
        return;
    }
    for (int t = threadIdx.x; t < T; t += 256) rows[(size_t)b * T + t] = ids || b >= whole ? mask : b * T + t;
    __syncthreads();
    for (int i = threadIdx.x; i < n && ids && b < whole; i += 256)
        rows[(size_t)b * T + ids[(size_t)b * n + i]] = b * n + i;
}

// Those rows' gradient [pads,D], from the sums over chunks of tokens that fusion_gather left. The sum is
// too much for one rounded number, so that it is kept as two, sum = row 0 + row 1 (which is why the mask
// token stands there twice). Blocks of 8 columns x 32 rows; 6 MB in B/1, bound by latency.
__global__ void __launch_bounds__(256)
    mask_rows_backward_kernel(floatX *dG, const float *parts, int chunks, int pads, int D) {
    __shared__ float sums[32][9];
    int x = threadIdx.x % 8, y = threadIdx.x / 8, d = blockIdx.x * 8 + x;
    sums[y][x] = d < D ? sum_rows(parts + d, y, chunks, (size_t)D) : 0;
    __syncthreads();
    if (d >= D) return;
    float sum = 0;
    for (int i = 0; i < 32; i++) sum += sums[i][x];
    floatX high;
    store(&high, sum);
    for (int row = y; row < pads; row += 32)
        store(&dG[(size_t)row * D + d], row == 0 ? sum : row == 1 ? sum - to_float(high) : 0);
}

// dG[rows[n]] = dY[n] for the kept tokens; the sum of dY over the others, which all read the mask
// token's row, goes to parts [chunks,D]. A block takes GATHER_CHUNK rows, a thread four columns, four rows
// at a time. 2 bytes read, 2/4 written; bound by memory.
enum { GATHER_CHUNK = 32 };
__global__ void __launch_bounds__(256) fusion_gather_kernel(floatX *dG, float *parts, const floatX *dY,
                                                            const int *rows, int mask, int N, int D) {
    int n0 = blockIdx.x * GATHER_CHUNK, n1 = min(n0 + GATHER_CHUNK, N);
    for (int d = threadIdx.x * 4; d < D; d += 1024) {
        Vec4 sum = {};
        for (int n = n0; n < n1; n += 4) {
            Raw4 v[4];
            int row[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int real = min(n + i, n1 - 1);
                v[i] = raw4(dY + (size_t)real * D + d);
                row[i] = rows[real];
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                Vec4 x = unpack4(v[i]);
                if (n + i >= n1) continue;
                if (row[i] < mask) store4(dG + (size_t)row[i] * D + d, x);
                else
                    for (int j = 0; j < 4; j++) sum.x[j] += x.x[j];
            }
        }
        store4(parts + (size_t)blockIdx.x * D + d, sum);
    }
}

// ----------------------------------------------------------------------------------------------------------
// Attention: q, k = RoPE(RMSNorm(.)), v = lambda v1 + (1 - lambda) v, out = softmax(q k^T / sqrt(Dh)) v. Two
// ways: on tensor cores (below), with all of it in one kernel each way, for bf16, Dh = 64 and T <= 272, that
// is all named sizes but XL (Dh = 72) up to 16 x 16 patches; and a plain one, for everything else and for the
// build in float.

typedef struct {
    const floatX *qkv;                  // [B,T,3D]
    const floatX *v1;                   // block 0's qkv [B,tokens,3D], NULL: values are not mixed
    const int *ids;                     // [B,T] original token of each token, NULL: itself
    int tokens, cls;                    // T of the full sequence; 1: token 0 is CLS
    const float *wq, *wk, *lambda;      // [Dh], [Dh], [1]; wq, wk NULL: no norm
    const float *rope_cos, *rope_sin;   // [P,Dh], NULL: no rotation
    const float2 *rope;           // [G,Dh/4] (cos, sin) of position * w_j, for the tensor cores' kernels
    int T, H, Dh, G, G_inverse;   // G_inverse: x G_inverse / 65536 is x / G for x < T
} Attention;
typedef struct {
    floatX *dqkv;    // [B,T,3D]
    float *dv1;      // [B,tokens,D]: += lambda dv at the original token; block 0 adds it up
    int dv1_fresh;   // 1: taken as zero, as the first one finds it
    int is_first;    // this is block 0
    float *parts;    // [attention_parts, 2 Dh + 1]: sums for wq, wk, lambda
    float *bias;     // [bias_parts, 3D]: sums of dqkv
} AttentionGrads;

__device__ __forceinline__ int token_of(const Attention &a, int b, int t) {
    return a.ids ? a.ids[(size_t)b * a.T + t] : t;
}

// The plain way, first part: out[B,T,3D] = q, k, v as they are multiplied. A warp a head of a row, a pair of
// neighbours a lane. Reads 6 (+ 2), writes 6 bytes an element of [N,D]; bound by memory.
__global__ void __launch_bounds__(256) qkv_mix_forward_kernel(floatX *out, const Attention a) {
    int b = blockIdx.x / a.T, t = blockIdx.x % a.T, lane = threadIdx.x % 32, D = a.H * a.Dh;
    int token = token_of(a, b, t), patch = token - a.cls;
    for (int h = threadIdx.x / 32; h < 3 * a.H; h += 8) {
        size_t at = (size_t)blockIdx.x * 3 * D + (size_t)h * a.Dh;
        const floatX *x = a.qkv + at;
        const float *w = h < a.H ? a.wq : a.wk;
        float r = 0;
        for (int i = lane; i < a.Dh && w && h < 2 * a.H; i += 32) r += to_float(x[i]) * to_float(x[i]);
        if (w && h < 2 * a.H) r = rsqrtf(sum_lanes<32>(r) / a.Dh + QK_EPS);
        for (int i = lane * 2; i < a.Dh; i += 64) {
            float x0 = to_float(x[i]), x1 = to_float(x[i + 1]);
            if (h >= 2 * a.H) {
                if (a.v1) {
                    const floatX *v1 = a.v1 + ((size_t)b * a.tokens + token) * 3 * D + (size_t)h * a.Dh;
                    float l = *a.lambda;
                    x0 = l * to_float(v1[i]) + (1 - l) * x0;
                    x1 = l * to_float(v1[i + 1]) + (1 - l) * x1;
                }
            } else {
                if (w) x0 *= r * w[i], x1 *= r * w[i + 1];
                if (a.rope_cos && patch >= 0) {
                    float c = a.rope_cos[(size_t)patch * a.Dh + i], s = a.rope_sin[(size_t)patch * a.Dh + i],
                          y0 = x0;
                    x0 = y0 * c - x1 * s;
                    x1 = x1 * c + y0 * s;
                }
            }
            store(&out[at + i], x0);
            store(&out[at + i + 1], x1);
        }
    }
}

// Its backward, in place (derivations at qk_norm_backward, rope_backward and value_residual_backward):
// out.dqkv comes in as the gradient of what the forward wrote. A block takes some tokens of a sample; its
// sums for the weights are one row of out.parts, those for the bias one of out.bias.
__global__ void __launch_bounds__(256)
    qkv_mix_backward_kernel(const AttentionGrads out, const Attention a, int chunk) {
    __shared__ float sums[8][2][128];
    __shared__ float lambda_sums[8];
    int b = blockIdx.y, lane = threadIdx.x % 32, warp = threadIdx.x / 32, D = a.H * a.Dh;
    int t0 = blockIdx.x * chunk, t1 = min(t0 + chunk, a.T);
    size_t block = (size_t)b * gridDim.x + blockIdx.x;
    float dw[2][2][2] = {}, dl = 0;   // of q or k, of this lane's pairs
    for (int h = warp; h < 3 * a.H; h += 8) {
        float bias[2][2] = {};
        for (int t = t0; t < t1; t++) {
            int token = token_of(a, b, t), patch = token - a.cls;
            size_t n = (size_t)b * a.T + t, full = (size_t)b * a.tokens + token;
            size_t at = n * 3 * D + (size_t)h * a.Dh;
            const floatX *x = a.qkv + at;
            floatX *d = out.dqkv + at;
            if (h >= 2 * a.H) {
                float l = a.v1 ? *a.lambda : 0;
                float *dv1 = out.dv1 + full * D + (size_t)(h - 2 * a.H) * a.Dh;
                for (int j = 0; j < 2; j++)
                    for (int e = 0; e < 2; e++) {
                        int i = lane * 2 + j * 64 + e;
                        if (i >= a.Dh) continue;
                        float dv = to_float(d[i]);
                        if (a.v1) {
                            float first = to_float(a.v1[full * 3 * D + (size_t)h * a.Dh + i]);
                            dl += dv * (first - to_float(x[i]));
                            dv1[i] = (out.dv1_fresh ? 0 : dv1[i]) + l * dv;
                        }
                        float dx = out.is_first ? dv + dv1[i] : (1 - l) * dv;
                        bias[j][e] += dx;
                        store(&d[i], dx);
                    }
                continue;
            }
            const float *w = h < a.H ? a.wq : a.wk;
            float r = 0, dot = 0, dn[2][2] = {}, xs[2][2] = {};
            for (int j = 0; j < 2; j++) {
                int i = lane * 2 + j * 64;
                if (i >= a.Dh) continue;
                float d0 = to_float(d[i]), d1 = to_float(d[i + 1]), y0 = d0;
                if (a.rope_cos && patch >= 0) {
                    float c = a.rope_cos[(size_t)patch * a.Dh + i], s = a.rope_sin[(size_t)patch * a.Dh + i];
                    d0 = y0 * c + d1 * s;
                    d1 = d1 * c - y0 * s;
                }
                dn[j][0] = d0;
                dn[j][1] = d1;
                xs[j][0] = to_float(x[i]);
                xs[j][1] = to_float(x[i + 1]);
                r += xs[j][0] * xs[j][0] + xs[j][1] * xs[j][1];
            }
            r = w ? rsqrtf(sum_lanes<32>(r) / a.Dh + QK_EPS) : 1;
            for (int j = 0; j < 2; j++)
                for (int e = 0; e < 2; e++) {
                    int i = lane * 2 + j * 64 + e;
                    if (i >= a.Dh || !w) continue;
                    if (h < a.H) dw[0][j][e] += dn[j][e] * xs[j][e] * r;
                    else dw[1][j][e] += dn[j][e] * xs[j][e] * r;
                    dn[j][e] *= w[i];
                    dot += dn[j][e] * xs[j][e] * r;
                }
            dot = w ? sum_lanes<32>(dot) / a.Dh : 0;
            for (int j = 0; j < 2; j++)
                for (int e = 0; e < 2; e++) {
                    int i = lane * 2 + j * 64 + e;
                    if (i >= a.Dh) continue;
                    float dx = r * (dn[j][e] - xs[j][e] * r * dot);
                    bias[j][e] += dx;
                    store(&d[i], dx);
                }
        }
        for (int j = 0; j < 2; j++)
            for (int e = 0; e < 2; e++) {
                int i = lane * 2 + j * 64 + e;
                if (i < a.Dh) out.bias[block * 3 * D + (size_t)h * a.Dh + i] = bias[j][e];
            }
    }
    for (int k = 0; k < 2; k++)
        for (int j = 0; j < 2; j++)
            for (int e = 0; e < 2; e++) sums[warp][k][lane * 2 + j * 64 + e] = dw[k][j][e];
    dl = sum_lanes<32>(dl);
    if (lane == 0) lambda_sums[warp] = dl;
    __syncthreads();
    float *part = out.parts + block * (2 * a.Dh + 1);
    for (int i = threadIdx.x; i <= 2 * a.Dh; i += 256) {
        float sum = 0;
        for (int w = 0; w < 8; w++) sum += i == 2 * a.Dh ? lambda_sums[w] : sums[w][i >= a.Dh][i % a.Dh];
        part[i] = sum;
    }
}

// Rows t0 ... t0+count of one head, from x (rows `ld` apart), as floats in shared memory;
// zeros past T and past Dh
template <int DH, int LD>
__device__ __forceinline__ void load_rows(float *to, const floatX *x, size_t ld, int t0, int count, int T,
                                          int Dh) {
    for (int i = threadIdx.x; i < count * DH; i += 32) {
        int t = t0 + i / DH, d = i % DH;
        to[i / DH * LD + d] = t < T && d < Dh ? to_float(x[(size_t)t * ld + d]) : 0;
    }
}

// The plain way, second part: a block is 32 queries of one head, a thread one query; the keys come by in
// tiles. Softmax with a running maximum: what was summed shrinks by exp(old maximum - new one). Bound by its
// arithmetic. out [B,T,D]; lse [B,H,T] = log sum exp, for the backward.
template <int DH>
__global__ void __launch_bounds__(32)
    attention_forward_kernel(floatX *out, float *lse, const floatX *qkv, int T, int H, int Dh) {
    constexpr int TILE = DH > 64 ? 8 : 16;
    __shared__ float q[32 * (DH + 1)];
    __shared__ float k[TILE * DH];
    __shared__ float v[TILE * DH];
    int b = blockIdx.y / H, h = blockIdx.y % H, t0 = blockIdx.x * 32, t = t0 + threadIdx.x, D = H * Dh;
    const floatX *at = qkv + (size_t)b * T * 3 * D + (size_t)h * Dh;
    float scale = rsqrtf((float)Dh), acc[DH] = {}, top = -INFINITY, sum = 0;
    load_rows<DH, DH + 1>(q, at, 3 * D, t0, 32, T, Dh);
    for (int n = 0; n < T; n += TILE) {
        __syncthreads();
        load_rows<DH, DH>(k, at + D, 3 * D, n, TILE, T, Dh);
        load_rows<DH, DH>(v, at + 2 * D, 3 * D, n, TILE, T, Dh);
        __syncthreads();
        for (int j = 0; j < TILE && n + j < T; j++) {
            float s = 0;
#pragma unroll 16
            for (int d = 0; d < DH; d++) s += q[threadIdx.x * (DH + 1) + d] * k[j * DH + d];
            s *= scale;
            float next = fmaxf(top, s), shrink = expf(top - next), p = expf(s - next);
            top = next;
            sum = sum * shrink + p;
#pragma unroll
            for (int d = 0; d < DH; d++) acc[d] = acc[d] * shrink + p * v[j * DH + d];
        }
    }
    if (t >= T) return;
    lse[(size_t)blockIdx.y * T + t] = top + logf(sum);
#pragma unroll
    for (int d = 0; d < DH; d++)
        if (d < Dh) store(&out[((size_t)b * T + t) * D + (size_t)h * Dh + d], acc[d] / sum);
}

// With p = exp(s - lse) and delta = sum do o:
//   ds = p (do v - delta) / sqrt(Dh),  dq = ds k.
// A thread one query.
template <int DH>
__global__ void __launch_bounds__(32)
    attention_backward_query_kernel(floatX *dqkv, float *delta, const floatX *dout, const floatX *out,
                                    const float *lse, const floatX *qkv, int T, int H, int Dh) {
    constexpr int TILE = DH > 64 ? 8 : 16, OWN = DH > 64 ? 1 : 32 * (DH + 1);   // OWN: do, if it fits
    __shared__ float q[32 * (DH + 1)];
    __shared__ float dob[OWN];
    __shared__ float k[TILE * DH];
    __shared__ float v[TILE * DH];
    int b = blockIdx.y / H, h = blockIdx.y % H, t0 = blockIdx.x * 32, t = t0 + threadIdx.x, D = H * Dh;
    const floatX *at = qkv + (size_t)b * T * 3 * D + (size_t)h * Dh;
    const floatX *d_at = dout + ((size_t)b * T + min(t, T - 1)) * D + (size_t)h * Dh;
    float scale = rsqrtf((float)Dh), acc[DH] = {}, sum = 0, l = lse[(size_t)blockIdx.y * T + min(t, T - 1)];
    load_rows<DH, DH + 1>(q, at, 3 * D, t0, 32, T, Dh);
    if (DH <= 64) load_rows<DH, DH + 1>(dob, dout + (size_t)b * T * D + (size_t)h * Dh, D, t0, 32, T, Dh);
    for (int d = 0; d < Dh; d++) sum += to_float(d_at[d]) * to_float(out[(d_at - dout) + d]);
    if (t < T) delta[(size_t)blockIdx.y * T + t] = sum;
    for (int n = 0; n < T; n += TILE) {
        __syncthreads();
        load_rows<DH, DH>(k, at + D, 3 * D, n, TILE, T, Dh);
        load_rows<DH, DH>(v, at + 2 * D, 3 * D, n, TILE, T, Dh);
        __syncthreads();
        for (int j = 0; j < TILE && n + j < T; j++) {
            float s = 0, dp = 0;
#pragma unroll 16
            for (int d = 0; d < DH; d++) {
                float o = DH <= 64 ? dob[threadIdx.x * (DH + 1) + d] : d < Dh ? to_float(d_at[d]) : 0;
                s += q[threadIdx.x * (DH + 1) + d] * k[j * DH + d];
                dp += o * v[j * DH + d];
            }
            float ds = expf(s * scale - l) * (dp - sum) * scale;
#pragma unroll
            for (int d = 0; d < DH; d++) acc[d] += ds * k[j * DH + d];
        }
    }
    if (t >= T) return;
#pragma unroll
    for (int d = 0; d < DH; d++)
        if (d < Dh) store(&dqkv[((size_t)b * T + t) * 3 * D + (size_t)h * Dh + d], acc[d]);
}

// The other two gradients, dk = ds^T q, dv = p^T do: a thread one key, the queries come by in tiles.
template <int DH>
__global__ void __launch_bounds__(32)
    attention_backward_key_kernel(floatX *dqkv, const float *delta, const floatX *dout, const float *lse,
                                  const floatX *qkv, int T, int H, int Dh) {
    constexpr int TILE = DH > 64 ? 4 : 16;
    __shared__ float k[32 * (DH + 1)];
    __shared__ float v[32 * (DH + 1)];
    __shared__ float q[TILE * DH];
    __shared__ float dob[TILE * DH];
    int b = blockIdx.y / H, h = blockIdx.y % H, t0 = blockIdx.x * 32, t = t0 + threadIdx.x, D = H * Dh;
    const floatX *at = qkv + (size_t)b * T * 3 * D + (size_t)h * Dh;
    float scale = rsqrtf((float)Dh), dk[DH] = {}, dv[DH] = {};
    load_rows<DH, DH + 1>(k, at + D, 3 * D, t0, 32, T, Dh);
    load_rows<DH, DH + 1>(v, at + 2 * D, 3 * D, t0, 32, T, Dh);
    for (int n = 0; n < T; n += TILE) {
        __syncthreads();
        load_rows<DH, DH>(q, at, 3 * D, n, TILE, T, Dh);
        load_rows<DH, DH>(dob, dout + (size_t)b * T * D + (size_t)h * Dh, D, n, TILE, T, Dh);
        __syncthreads();
        for (int j = 0; j < TILE && n + j < T; j++) {
            float s = 0, dp = 0;
#pragma unroll 16
            for (int d = 0; d < DH; d++) {
                s += q[j * DH + d] * k[threadIdx.x * (DH + 1) + d];
                dp += dob[j * DH + d] * v[threadIdx.x * (DH + 1) + d];
            }
            float p = expf(s * scale - lse[(size_t)blockIdx.y * T + n + j]);
            float ds = p * (dp - delta[(size_t)blockIdx.y * T + n + j]) * scale;
#pragma unroll
            for (int d = 0; d < DH; d++) dk[d] += ds * q[j * DH + d], dv[d] += p * dob[j * DH + d];
        }
    }
    if (t >= T) return;
    floatX *to = dqkv + ((size_t)b * T + t) * 3 * D + D + (size_t)h * Dh;
#pragma unroll
    for (int d = 0; d < DH; d++)
        if (d < Dh) store(&to[d], dk[d]), store(&to[D + d], dv[d]);
}

// Attention on tensor cores: one block (a CTA) a sample and head, the whole sequence in shared memory, no
// score matrix anywhere. Norm, RoPE and mix are done as rows are loaded, and undone on gradients while they
// are still in registers. The tensor core multiplies tiles: mma_bf16 does d[16x8] += a[16x16] b[16x8], all
// spread over a warp's registers.

enum { HD = 64, TMAX_SMALL = 64, TMAX_LARGE = 272 };   // head width; longest sequences of the two variants
enum { SMALL_WARPS = 4, LARGE_WARPS = 8, HALVES_WARPS = 6 };   // of the backward's
#ifndef FP32

#ifndef CUDA_ON_CPU   // the PTX this file uses; the emulator has the same functions for the CPU
__device__ __forceinline__ unsigned shared_address(const void *p) {
    return (unsigned)__cvta_generic_to_shared(p);
}
__device__ __forceinline__ void mma_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void ldmatrix(unsigned (&r)[4], const void *row) {   // four 8 x 8 tiles of bf16
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
__device__ __forceinline__ void ldmatrix_trans(unsigned (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
// 16 bytes to shared memory, zeros unless valid; they are there, for this thread, after the wait
__device__ __forceinline__ void cp_async16(void *shared, const void *global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#endif

constexpr float SCALE = 0.125f;   // 1 / sqrt(HD)
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
enum Kind { Q, K, V };   // the three parts of a qkv row
enum { FORWARD_WARPS = 4 };

// Lanes: in fragments g = lane / 4 is the row (and g + 8), c = lane % 4 the pair of columns
// (2c, 2c+1) of each 8.
__device__ __forceinline__ void unpack8(float (&x)[8], uint4 p) {
    float2 a = unpack(p.x), b = unpack(p.y), c = unpack(p.z), d = unpack(p.w);
    x[0] = a.x;
    x[1] = a.y;
    x[2] = b.x;
    x[3] = b.y;
    x[4] = c.x;
    x[5] = c.y;
    x[6] = d.x;
    x[7] = d.y;
}
__device__ __forceinline__ uint4 pack8(const float (&x)[8]) {
    return make_uint4(pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7]));
}

// A tile in shared memory is rows of 128 bytes; its 16-byte chunks are permuted within each row, so that the
// eight rows of an ldmatrix touch all 32 banks once.
typedef bf16 Row[HD];
__device__ __forceinline__ bf16 *tile_at(Row *tile, int row, int chunk) {
    return &tile[row][(chunk ^ (row & 7)) * 8];
}
// B fragments of two neighbouring n-tiles (f[0..1], f[2..3]). For X U^T: n = 16 rows of U,
// k = its columns 16kk..16kk+15.
__device__ __forceinline__ void load_b(unsigned (&f)[4], Row *u, int row0, int kk, int lane) {
    ldmatrix(f, tile_at(u, row0 + lane % 8 + lane / 16 * 8, kk * 2 + lane / 8 % 2));
}
// For P U: k = 16 rows of U, n = its columns 8j..8j+15.
__device__ __forceinline__ void load_b_trans(unsigned (&f)[4], Row *u, int row0, int j, int lane) {
    ldmatrix_trans(f, tile_at(u, row0 + lane % 16, j + lane / 16));
}
// The accumulators of 16 x 16 numbers are, once rounded, the A operand of the next product.
__device__ __forceinline__ void to_a(unsigned (&a)[4], const float (&p)[2][4]) {
    a[0] = pack(p[0][0], p[0][1]);
    a[1] = pack(p[0][2], p[0][3]);
    a[2] = pack(p[1][0], p[1][1]);
    a[3] = pack(p[1][2], p[1][3]);
}

// Eight lanes hold a row, eight numbers each. Where this lane's of row t (the last one, if there are fewer)
// begin: in qkv, in block 0's, in x [B,T,H,64]
template <Kind KIND>
__device__ __forceinline__ const uint4 *row_at(const Attention &a, int b, int h, int t, int lane) {
    const size_t row = (size_t)b * a.T + min(t, a.T - 1);
    return (const uint4 *)(a.qkv + (row * 3 + KIND) * a.H * HD + h * HD + lane % 8 * 8);
}
__device__ __forceinline__ const uint4 *first_at(const Attention &a, int b, int h, int token, int lane) {
    const size_t full = (size_t)b * a.tokens + token;
    return (const uint4 *)(a.v1 + (full * 3 + V) * a.H * HD + h * HD + lane % 8 * 8);
}
__device__ __forceinline__ const uint4 *plain_at(const bf16 *x, const Attention &a, int b, int h, int t,
                                                 int lane) {
    const size_t row = (size_t)b * a.T + min(t, a.T - 1);
    return (const uint4 *)(x + row * a.H * HD + h * HD + lane % 8 * 8);
}
__device__ __forceinline__ int token_at(const Attention &a, int b, int t) {
    const int real = min(t, a.T - 1);
    return a.ids ? __ldg(a.ids + (size_t)b * a.T + real) : real;
}
// Row and column of a token's patch, by a product instead of a division; CLS stands at position 0, whose
// rotation is the identity.
__device__ __forceinline__ int2 place_of(const Attention &a, int token) {
    const int pos = max(token - a.cls, 0), y = pos * a.G_inverse >> 16;
    return make_int2(y, pos - y * a.G);
}
// From the raw row x (and block 0's, y) what is multiplied: q and k: norm and RoPE; v: mix. Rows from T on
// are zeros.
template <Kind KIND>
__device__ __forceinline__ uint4 finish_row(const Attention &a, int t, int token, int lane, uint4 raw,
                                            uint4 raw_first) {
    const int c = lane % 8;
    float x[8];
    unpack8(x, raw);
    if (KIND == V) {
        if (!a.v1) return t < a.T ? raw : make_uint4(0, 0, 0, 0);
        float y[8], l = __ldg(a.lambda);
        unpack8(y, raw_first);
        for (int i = 0; i < 8; i++) x[i] = l * y[i] + (1 - l) * x[i];
    } else {
        float r = 0;
        for (int i = 0; i < 8; i++) r += x[i] * x[i];
        r = rsqrtf(sum_lanes<8>(r) / HD + QK_EPS);
        const int2 place = place_of(a, token);
        const float2 *w = (const float2 *)(KIND == Q ? a.wq : a.wk) + c * 4,
                     *rope = a.rope + (c < 4 ? place.x : place.y) * 16 + c % 4 * 4;
        for (int i = 0; i < 4; i++) {
            float2 wi = __ldg(w + i), cs = __ldg(rope + i);
            float y0 = x[2 * i] * r * wi.x, y1 = x[2 * i + 1] * r * wi.y;
            x[2 * i] = y0 * cs.x - y1 * cs.y;
            x[2 * i + 1] = y1 * cs.x + y0 * cs.y;
        }
    }
    return t < a.T ? pack8(x) : make_uint4(0, 0, 0, 0);
}

// A fragments of 16 query rows from t0 on, by way of 8 rows of shared memory of the warp's own
__device__ __forceinline__ void load_queries(unsigned (&f)[4][4], Row *stage, const Attention &a, int b,
                                             int h, int t0, int lane) {
    uint4 x[4];
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = __ldg(row_at<Q>(a, b, h, t0 + i * 4 + lane / 8, lane));
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int t = t0 + i * 4 + lane / 8;
        x[i] = finish_row<Q>(a, t, token_at(a, b, t), lane, x[i], x[i]);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        *(uint4 *)tile_at(stage, lane / 8, lane % 8) = x[half * 2];
        *(uint4 *)tile_at(stage, lane / 8 + 4, lane % 8) = x[half * 2 + 1];
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 2; i++) {   // matrix m: chunk 4i + m, that is half m%2 of k-step 2i + m/2
            unsigned r[4];
            ldmatrix(r, tile_at(stage, lane % 8, i * 4 + lane / 8));
            for (int m = 0; m < 4; m++) f[i * 2 + m / 2][half + m % 2 * 2] = r[m];
        }
        __syncwarp();
    }
}

template <int TMAX> struct ForwardShared { Row k[TMAX], v[TMAX], stage[FORWARD_WARPS][8]; };

// QK-norm bounds the scores: |q| <= 8 max|wq|, so |s| <= bound = 8 max|wq| max|wk|. exp(s - bound)
// needs no running maximum and cannot overflow; it cannot vanish either while the bound is small. For
// larger weights: online softmax.
__device__ __forceinline__ float score_bound(const Attention &a, int lane) {
    float mq = fmaxf(fabsf(__ldg(a.wq + lane)), fabsf(__ldg(a.wq + lane + 32)));
    float mk = fmaxf(fabsf(__ldg(a.wk + lane)), fabsf(__ldg(a.wk + lane + 32)));
    for (int m = 16; m; m /= 2) {
        mq = fmaxf(mq, __shfl_xor_sync(0xffffffffu, mq, m));
        mk = fmaxf(mk, __shfl_xor_sync(0xffffffffu, mk, m));
    }
    return HD * SCALE * mq * mk;
}

// MT * 16 query rows from t0 on, against all keys, 16 at a time
template <int MT>
__device__ __forceinline__ void forward_rows(bf16 *o, float *lse, const Attention &a, int b, int h, int t0,
                                             Row *k, Row *v, Row *stage, float bound, int lane) {
    const int g = lane / 4, c = lane % 4;
    const bool online = !(bound < 40);
    unsigned q[MT][4][4];
    float acc[MT][8][4] = {}, sum[MT][2] = {}, shift[MT][2];   // shift in units of log 2
#pragma unroll
    for (int m = 0; m < MT; m++) {
        load_queries(q[m], stage, a, b, h, t0 + m * 16, lane);
        shift[m][0] = shift[m][1] = online ? -INFINITY : bound * LOG2E;
    }
    for (int n = 0; n < a.T; n += 16) {
        float s[MT][2][4] = {};
#pragma unroll
        for (int kk = 0; kk < 4; kk++) {
            unsigned f[4];
            load_b(f, k, n, kk, lane);
#pragma unroll
            for (int m = 0; m < MT; m++) {
                mma_bf16(s[m][0], q[m][kk], {f[0], f[1]});
                mma_bf16(s[m][1], q[m][kk], {f[2], f[3]});
            }
        }
        if (n + 16 > a.T)   // keys past T, in the last tile
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int j = 0; j < 2; j++)
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        if (n + j * 8 + c * 2 + e % 2 >= a.T) s[m][j][e] = -INFINITY;
        if (online) {
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float top = fmaxf(fmaxf(s[m][0][i * 2], s[m][0][i * 2 + 1]),
                                      fmaxf(s[m][1][i * 2], s[m][1][i * 2 + 1]));
                    top = fmaxf(top * (SCALE * LOG2E), shift[m][i]);
                    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
                    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
                    float shrink = exp2_approx(shift[m][i] - top);   // key n is real: top is finite
                    shift[m][i] = top;
                    sum[m][i] *= shrink;
#pragma unroll
                    for (int j = 0; j < 8; j++) acc[m][j][i * 2] *= shrink, acc[m][j][i * 2 + 1] *= shrink;
                }
        }
        unsigned p[MT][4];
#pragma unroll
        for (int m = 0; m < MT; m++) {
#pragma unroll
            for (int j = 0; j < 2; j++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    sum[m][e / 2] += s[m][j][e] = exp2_approx(s[m][j][e] * (SCALE * LOG2E) - shift[m][e / 2]);
            to_a(p[m], s[m]);
        }
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
            unsigned f[4];
            load_b_trans(f, v, n, j, lane);
#pragma unroll
            for (int m = 0; m < MT; m++) {
                mma_bf16(acc[m][j], p[m], {f[0], f[1]});
                mma_bf16(acc[m][j + 1], p[m], {f[2], f[3]});
            }
        }
    }
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float total = sum_lanes<4>(sum[m][i]), r = 1 / total;
            const int t = t0 + m * 16 + i * 8 + g;
            if (t >= a.T) continue;
            unsigned *out = (unsigned *)(o + ((size_t)b * a.T + t) * a.H * HD + h * HD) + c;
#pragma unroll
            for (int j = 0; j < 8; j++) out[j * 4] = pack(acc[m][j][i * 2] * r, acc[m][j][i * 2 + 1] * r);
            if (c == 0) lse[((size_t)b * a.H + h) * a.T + t] = shift[m][i] * LN2 + logf(total);
        }
}

// o [B,T,H,64], lse [B,H,T]: k and v whole in shared memory (73 KB at T = 257, 3 blocks an
// SM), a warp MT * 16 query rows at a time. Reads 6 (+ 2 for v1), writes 2 bytes an element:
// 0.51 GB, 0.17 ms; bound by memory.
template <int TMAX, int MT>
__global__ void __launch_bounds__(FORWARD_WARPS * 32, TMAX > 64 ? 3 : 4)
    tensor_attention_forward_kernel(bf16 *__restrict__ o, float *__restrict__ lse, const Attention a) {
    extern __shared__ __align__(128) unsigned char raw[];
    ForwardShared<TMAX> &s = *reinterpret_cast<ForwardShared<TMAX> *>(raw);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, b = blockIdx.x / a.H, h = blockIdx.x % a.H;
    const int rows = (a.T + 15) / 16 * 16;
#pragma unroll 2
    for (int t = warp * 4 + lane / 8; t < rows; t += FORWARD_WARPS * 4) {
        const int token = token_at(a, b, t);
        uint4 k = __ldg(row_at<K>(a, b, h, t, lane)), v = __ldg(row_at<V>(a, b, h, t, lane)), first = v;
        if (a.v1) first = __ldg(first_at(a, b, h, token, lane));
        *(uint4 *)tile_at(s.k, t, lane % 8) = finish_row<K>(a, t, token, lane, k, k);
        *(uint4 *)tile_at(s.v, t, lane % 8) = finish_row<V>(a, t, token, lane, v, first);
    }
    const float bound = score_bound(a, lane);
    __syncthreads();
    for (int t = warp * MT * 16; t < a.T; t += FORWARD_WARPS * MT * 16)
        if (MT == 1 || a.T - t <= 16)
            forward_rows<1>(o, lse, a, b, h, t, s.k, s.v, s.stage[warp], bound, lane);
        else forward_rows<MT>(o, lse, a, b, h, t, s.k, s.v, s.stage[warp], bound, lane);
}

// Backward, with delta_i = do_i . o_i:
//   P = exp(S - lse),  dP = do v^T,  dS = P (dP - delta),
//   dv = P^T do,  dk = dS^T q / 8,  dq = dS k / 8.
// q, k, v, do lie whole in shared memory. The work is two kinds of jobs, so that a warp owns what it sums and
// nothing is exchanged:
//   a block of keys: P^T and dS^T from k q^T and v do^T, over all queries;  dv += P^T do,  dk += dS^T q
//   a block of queries: P and dS from q k^T and do v^T, over all keys;      dq += dS k
// S and dP are computed twice (7 products instead of 5); in return no dS or dq goes through shared memory, no
// warp waits for another, and nothing needs an atomic.
template <int TMAX, int NW> struct BackwardShared {
    Row q[TMAX], k[TMAX], v[TMAX], dout[TMAX];
    float lse[TMAX], delta[TMAX];                  // lse in units of log 2
    float2 dw[2][NW][HD / 2], db[3][NW][HD / 2];   // each warp's sums for wq, wk; for the bias of q, k, v
    float dlambda[NW];
};

// x[j] of this lane and of those with the other g -> the sum over all eight of x[g]: what a lane does not
// keep it hands over, half of what is left at each step
__device__ __forceinline__ float sum_transposed(float (&x)[8], int g) {
#pragma unroll
    for (int m = 4; m; m /= 2)
#pragma unroll
        for (int j = 0; j < m; j++) {
            float keep = g & m ? x[j + m] : x[j], give = g & m ? x[j] : x[j + m];
            x[j] = keep + __shfl_xor_sync(0xffffffffu, give, m * 4);
        }
    return x[0];
}
// *sum += over the rows of a fragment; a lane's two columns are 8g + 2c, + 1
__device__ __forceinline__ void sum_columns(float2 *sum, float (&x)[2][8], int lane) {
    sum[lane].x += sum_transposed(x[0], lane / 4);
    sum[lane].y += sum_transposed(x[1], lane / 4);
}

// x -> n = w x r(x) -> y = R n. Given dy/8 (rows t0 + g, + 8 of fragments d):
//   dn = R^T dy,  dw += sum_t dn x r,  dx = r (w dn - x r^2 mean(w dn x)),  db += sum_t dx
template <Kind KIND>
__device__ __forceinline__ void norm_rope_backward(bf16 *dqkv, float2 *dw, float2 *db, const float (&d)[8][4],
                                                   const Attention &a, int b, int h, int t0, int lane) {
    const int g = lane / 4, c = lane % 4;
    const float2 *w = (const float2 *)(KIND == Q ? a.wq : a.wk);
    float of_w[2][8] = {}, of_b[2][8] = {};
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int t = t0 + i * 8 + g;
        const size_t row = (size_t)b * a.T + min(t, a.T - 1),
                     start = (row * 3 + KIND) * a.H * HD + h * HD + c * 2;
        float2 x[8], dn[8];
        float r = 0, dot = 0;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            x[j] = unpack(__ldg((const unsigned *)(a.qkv + start + j * 8)));
            r += x[j].x * x[j].x + x[j].y * x[j].y;
        }
        r = rsqrtf(sum_lanes<4>(r) / HD + QK_EPS);
        const int2 place = place_of(a, token_at(a, b, t));
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float2 cs = __ldg(a.rope + (j < 4 ? place.x : place.y) * 16 + j % 4 * 4 + c),
                         wj = __ldg(w + j * 4 + c);
            const float dy0 = d[j][i * 2] * SCALE, dy1 = d[j][i * 2 + 1] * SCALE;
            dn[j] = make_float2(dy0 * cs.x + dy1 * cs.y, dy1 * cs.x - dy0 * cs.y);
            if (t < a.T) of_w[0][j] += dn[j].x * x[j].x * r, of_w[1][j] += dn[j].y * x[j].y * r;
            dn[j].x *= wj.x;
            dn[j].y *= wj.y;
            dot += dn[j].x * x[j].x + dn[j].y * x[j].y;
        }
        dot = sum_lanes<4>(dot) * r * r / HD;
        if (t < a.T)
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const float dx0 = r * (dn[j].x - x[j].x * dot), dx1 = r * (dn[j].y - x[j].y * dot);
                of_b[0][j] += dx0;
                of_b[1][j] += dx1;
                *(unsigned *)(dqkv + start + j * 8) = pack(dx0, dx1);
            }
    }
    sum_columns(dw, of_w, lane);
    sum_columns(db, of_b, lane);
}

// v = l v1 + (1 - l) x:  dx = (1 - l) dv,  dv1 += l dv,  dl = sum dv (v1 - x);  in block 0, dx = dv + dv1;
// db += sum_t dx
__device__ __forceinline__ void mix_backward(const AttentionGrads &out, float &dlambda, float2 *db,
                                             const float (&d)[8][4], const Attention &a, int b, int h, int t0,
                                             int lane) {
    const int g = lane / 4, c = lane % 4;
    const float l = a.v1 ? __ldg(a.lambda) : 0;
    float of_b[2][8] = {};
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int t = t0 + i * 8 + g;
        if (t >= a.T) continue;
        const size_t row = (size_t)b * a.T + t,
                     full = (size_t)b * a.tokens + (a.ids ? __ldg(a.ids + row) : t);
        const size_t start = (row * 3 + V) * a.H * HD + h * HD + c * 2,
                     first = (full * 3 + V) * a.H * HD + h * HD + c * 2;
        float *dv1 = out.dv1 + (full * a.H + h) * HD + c * 2;
        const bool mixed = a.v1, any = (mixed && !out.dv1_fresh) || out.is_first;
        unsigned x[8], y[8];
        float2 sum[8];
#pragma unroll
        for (int j = 0; j < 8; j++) {   // all loads first: a store in between would hold the next one back
            sum[j] = any ? *(const float2 *)(dv1 + j * 8) : make_float2(0, 0);
            x[j] = mixed ? __ldg((const unsigned *)(a.qkv + start + j * 8)) : 0;
            y[j] = mixed ? __ldg((const unsigned *)(a.v1 + first + j * 8)) : 0;
        }
#pragma unroll
        for (int j = 0; j < 8; j++) {
            float d0 = d[j][i * 2], d1 = d[j][i * 2 + 1];
            if (mixed) {
                const float2 own = unpack(x[j]), of_first = unpack(y[j]);
                *(float2 *)(dv1 + j * 8) = make_float2(sum[j].x + l * d0, sum[j].y + l * d1);
                dlambda += d0 * (of_first.x - own.x) + d1 * (of_first.y - own.y);
            } else {
                d0 += sum[j].x;
                d1 += sum[j].y;
            }
            d0 *= 1 - l;
            d1 *= 1 - l;
            of_b[0][j] += d0;
            of_b[1][j] += d1;
            *(unsigned *)(out.dqkv + start + j * 8) = pack(d0, d1);
        }
    }
    sum_columns(db, of_b, lane);
}

// MT * 16 rows from t0 on: keys (out = dk, out2 = dv) or queries (out = dq).
// x, y: the warp's own rows (k, v or q, do);  u, w: all rows of the other side (q, do or k, v).
template <int MT, bool KEYS>
__device__ __forceinline__ void backward_rows(float (&out)[MT][8][4], float (&out2)[KEYS ? MT : 1][8][4],
                                              Row *x, Row *y, Row *u, Row *w, const float *lse,
                                              const float *delta, int t0, int T, int lane) {
    const int g = lane / 4, c = lane % 4;
    unsigned a[MT][4][4], a2[MT][4][4];
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int kk = 0; kk < 4; kk++) {
            ldmatrix(a[m][kk], tile_at(x, t0 + m * 16 + lane % 16, kk * 2 + lane / 16));
            ldmatrix(a2[m][kk], tile_at(y, t0 + m * 16 + lane % 16, kk * 2 + lane / 16));
        }
    float own_lse[MT][2], own_d[MT][2];
    if (!KEYS)
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                own_lse[m][i] = lse[t0 + m * 16 + i * 8 + g];
                own_d[m][i] = delta[t0 + m * 16 + i * 8 + g];
            }
    for (int n = 0; n < T; n += 16) {
        float s[MT][2][4] = {}, ds[MT][2][4] = {};
#pragma unroll
        for (int kk = 0; kk < 4; kk++) {
            unsigned f[4], f2[4];
            load_b(f, u, n, kk, lane);
            load_b(f2, w, n, kk, lane);
#pragma unroll
            for (int m = 0; m < MT; m++) {
                mma_bf16(s[m][0], a[m][kk], {f[0], f[1]});
                mma_bf16(s[m][1], a[m][kk], {f[2], f[3]});
                mma_bf16(ds[m][0], a2[m][kk], {f2[0], f2[1]});
                mma_bf16(ds[m][1], a2[m][kk], {f2[2], f2[3]});
            }
        }
        if (!KEYS && n + 16 > T)   // keys past T, in the last tile (a query past T has an infinite lse)
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int j = 0; j < 2; j++)
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        if (n + j * 8 + c * 2 + e % 2 >= T) s[m][j][e] = -INFINITY;
        unsigned p[MT][4], dp[MT][4];
#pragma unroll
        for (int m = 0; m < MT; m++) {
#pragma unroll
            for (int j = 0; j < 2; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int other = n + j * 8 + c * 2 + e % 2;
                    const float l = KEYS ? lse[other] : own_lse[m][e / 2],
                                d = KEYS ? delta[other] : own_d[m][e / 2];
                    const float pe = exp2_approx(s[m][j][e] * (SCALE * LOG2E) - l);
                    s[m][j][e] = pe;
                    ds[m][j][e] = pe * (ds[m][j][e] - d);
                }
            to_a(dp[m], ds[m]);
            if (KEYS) to_a(p[m], s[m]);
        }
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
            unsigned f[4];
            load_b_trans(f, u, n, j, lane);
#pragma unroll
            for (int m = 0; m < MT; m++) {
                mma_bf16(out[m][j], dp[m], {f[0], f[1]});
                mma_bf16(out[m][j + 1], dp[m], {f[2], f[3]});
            }
            if (KEYS) {
                load_b_trans(f, w, n, j, lane);
#pragma unroll
                for (int m = 0; m < (KEYS ? MT : 0); m++) {
                    mma_bf16(out2[m][j], p[m], {f[0], f[1]});
                    mma_bf16(out2[m][j + 1], p[m], {f[2], f[3]});
                }
            }
        }
    }
}

template <int MT, class Shared>
__device__ __forceinline__ void query_rows(const AttentionGrads &out, const Attention &a, int b, int h,
                                           int t0, Shared &s, int warp, int lane) {
    float dq[MT][8][4] = {}, none[1][8][4];
    backward_rows<MT, false>(dq, none, s.q, s.dout, s.k, s.v, s.lse, s.delta, t0, a.T, lane);
#pragma unroll
    for (int m = 0; m < MT; m++)
        norm_rope_backward<Q>(out.dqkv, s.dw[Q][warp], s.db[Q][warp], dq[m], a, b, h, t0 + m * 16, lane);
}

// Where warp w's share of the work begins: of `tiles` jobs of 16 keys, then as many of 16 queries, which cost
// about 5 to 4. Each warp has neighbours; a job belongs to the warp in whose share its middle lies. At
// T = 257 the longest share is 20 (dealt out in turn: 23), the mean 19.1.
__device__ __forceinline__ int share_of(int w, int warps, int tiles) {
    int job = 0;
    for (int cost = 0; job < 2 * tiles; job++) {
        const int own = job < tiles ? 5 : 4;
        if ((2 * cost + own) * warps >= 2 * w * 9 * tiles) break;
        cost += own;
    }
    return job;
}

// o, dout [B,T,H,64], lse [B,H,T]. NW warps; a job is 16 keys or 16 to MQ * 16 queries. 152 KB of shared
// memory at T = 257, one block an SM; at T <= 64 38 KB, 3 an SM. Reads 6 (+ 2) + 4, writes 6, adds 4 + 4
// bytes an element: 1.2 GB, 0.4 ms; memory and shared memory bound it about equally.
template <int TMAX, int NW, int MQ, int CTAS>
__global__ void __launch_bounds__(NW * 32, CTAS)
    tensor_attention_backward_kernel(const AttentionGrads out, const Attention a,
                                     const bf16 *__restrict__ dout, const bf16 *__restrict__ o,
                                     const float *__restrict__ lse) {
    extern __shared__ __align__(128) unsigned char raw[];
    typedef BackwardShared<TMAX, NW> Shared;
    Shared &s = *reinterpret_cast<Shared *>(raw);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, b = blockIdx.x / a.H, h = blockIdx.x % a.H;
    const int rows = (a.T + 15) / 16 * 16;
    // Raw rows of q, k, v and do are copied to their places, all at once; then each thread makes of its own
    // chunks what is multiplied, with those of o and block 0's v, RL at a time.
    for (int t = warp * 4 + lane / 8; t < rows; t += NW * 4) {
        cp_async16(tile_at(s.q, t, lane % 8), row_at<Q>(a, b, h, t, lane), t < a.T);
        cp_async16(tile_at(s.k, t, lane % 8), row_at<K>(a, b, h, t, lane), t < a.T);
        cp_async16(tile_at(s.v, t, lane % 8), row_at<V>(a, b, h, t, lane), t < a.T);
        cp_async16(tile_at(s.dout, t, lane % 8), plain_at(dout, a, b, h, t, lane), t < a.T);
    }
    cp_async_commit();
    constexpr int RL = TMAX > 64 ? 3 : 2;
    for (int t0 = warp * 4 + lane / 8; t0 < rows; t0 += RL * NW * 4) {
        uint4 z[RL], first[RL];
        int token[RL];
#pragma unroll
        for (int i = 0; i < RL; i++) {
            token[i] = token_at(a, b, t0 + i * NW * 4);
            z[i] = __ldg(plain_at(o, a, b, h, t0 + i * NW * 4, lane));
            first[i] = a.v1 ? __ldg(first_at(a, b, h, token[i], lane)) : make_uint4(0, 0, 0, 0);
        }
        cp_async_wait<0>();
#pragma unroll
        for (int i = 0; i < RL; i++) {
            const int t = t0 + i * NW * 4;
            if (t >= rows) break;   // (the same for the whole warp)
            uint4 *q = (uint4 *)tile_at(s.q, t, lane % 8), *k = (uint4 *)tile_at(s.k, t, lane % 8),
                  *v = (uint4 *)tile_at(s.v, t, lane % 8), *y = (uint4 *)tile_at(s.dout, t, lane % 8);
            float d = 0, fy[8], fz[8];
            unpack8(fy, *y);
            unpack8(fz, z[i]);
            for (int j = 0; j < 8; j++) d += fy[j] * fz[j];
            d = sum_lanes<8>(d);
            *q = finish_row<Q>(a, t, token[i], lane, *q, *q);
            *k = finish_row<K>(a, t, token[i], lane, *k, *k);
            *v = finish_row<V>(a, t, token[i], lane, *v, first[i]);
            if (lane % 8 == 0) {
                s.lse[t] = t < a.T ? __ldg(lse + (size_t)blockIdx.x * a.T + t) * LOG2E : INFINITY;
                s.delta[t] = d;
            }
        }
    }
    float dl = 0;
    for (int i = 0; i < 2; i++) s.dw[i][warp][lane] = make_float2(0, 0);
    for (int i = 0; i < 3; i++) s.db[i][warp][lane] = make_float2(0, 0);   // a lane's own: nobody waits
    __syncthreads();

    const int tiles = (a.T + 15) / 16;
    constexpr bool one_each = TMAX <= NW * 16;   // job of keys and of queries for each warp
    const int begin = one_each ? warp : share_of(warp, NW, tiles);
    const int end = one_each ? warp + 1 : share_of(warp + 1, NW, tiles);
    for (int key = begin; key < min(end, tiles); key++) {
        float dk[1][8][4] = {}, dv[1][8][4] = {};
        backward_rows<1, true>(dk, dv, s.k, s.v, s.q, s.dout, s.lse, s.delta, key * 16, a.T, lane);
        mix_backward(out, dl, s.db[V][warp], dv[0], a, b, h, key * 16, lane);
        norm_rope_backward<K>(out.dqkv, s.dw[K][warp], s.db[K][warp], dk[0], a, b, h, key * 16, lane);
    }
    const int query_end = one_each ? min(end, tiles) : end - tiles;
    for (int query = one_each ? begin : max(begin - tiles, 0), count; query < query_end; query += count) {
        count = min(MQ, query_end - query);
        if (MQ == 1 || count == 1) query_rows<1>(out, a, b, h, query * 16, s, warp, lane);
        else query_rows<MQ>(out, a, b, h, query * 16, s, warp, lane);
    }

    // the weights' gradients: the warps' sums, added in order
    dl = sum_lanes<32>(dl);
    if (lane == 0) s.dlambda[warp] = dl;
    __syncthreads();
    float *part = out.parts + (size_t)blockIdx.x * (2 * HD + 1),
          *bias = out.bias + ((size_t)b * 3 * a.H + h) * HD;
    for (int i = threadIdx.x; i <= 5 * HD; i += NW * 32) {
        const int kind = i / HD, d = i % HD;
        const float *sums =
            kind == 5 ? s.dlambda : (const float *)(kind < 2 ? s.dw[kind] : s.db[kind - 2]) + d;
        float x = 0;
        for (int k = 0; k < NW; k++) x += sums[kind == 5 ? k : k * HD];
        if (kind < 2) part[i] = x;
        else if (kind == 5) part[2 * HD] = x;
        else bias[(kind - 2) * a.H * HD + d] = x;
    }
}

// The same where a card has less shared memory than that: sm_86, sm_89 and sm_120 have 99 KB a block, and
// this takes 99. The two kinds of jobs are two halves, one after the other, and only what all jobs of a half
// read lies whole in shared memory, q and do or k and v; 16 rows of the other two come through a warp's own.
// Reads each input row twice.
template <int TMAX, int NW> struct HalvesShared {
    Row u[TMAX], w[TMAX], own[NW][2][16];
    float lse[TMAX], delta[TMAX];
    float2 sums[3][NW]
               [HD / 2];   // each warp's: of wk, of the bias of k and of v; then of wq, of the bias of q
    float dlambda[NW];
};
// to[64] = the sums of a block's warps, added in order
template <int NW> __device__ __forceinline__ void add_warps(float *to, const float2 (&sums)[NW][HD / 2]) {
    for (int i = threadIdx.x; i < HD; i += NW * 32) {
        float x = 0;
        for (int k = 0; k < NW; k++) x += ((const float *)sums[k])[i];
        to[i] = x;
    }
}
// One row of q, k or v as it is multiplied, and one of do or o
template <Kind KIND>
__device__ __forceinline__ uint4 whole_row(const Attention &a, int b, int h, int t, int lane) {
    const int token = token_at(a, b, t);
    const uint4 x = __ldg(row_at<KIND>(a, b, h, t, lane));
    return finish_row<KIND>(a, t, token, lane, x,
                            KIND == V && a.v1 ? __ldg(first_at(a, b, h, token, lane)) : x);
}
__device__ __forceinline__ uint4 plain_row(const bf16 *x, const Attention &a, int b, int h, int t, int lane) {
    return t < a.T ? __ldg(plain_at(x, a, b, h, t, lane)) : make_uint4(0, 0, 0, 0);
}
template <int TMAX, int NW>
__global__ void __launch_bounds__(NW * 32, 1)
    tensor_attention_halves_kernel(const AttentionGrads out, const Attention a, const bf16 *__restrict__ dout,
                                   const bf16 *__restrict__ o, const float *__restrict__ lse) {
    extern __shared__ __align__(128) unsigned char raw[];
    typedef HalvesShared<TMAX, NW> Shared;
    Shared &s = *reinterpret_cast<Shared *>(raw);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, b = blockIdx.x / a.H, h = blockIdx.x % a.H;
    const int jobs = (a.T + 15) / 16;
    Row *x = s.own[warp][0], *y = s.own[warp][1];
    float dl = 0, *part = out.parts + (size_t)blockIdx.x * (2 * HD + 1);
    float *bias = out.bias + ((size_t)b * 3 * a.H + h) * HD;
    for (int i = 0; i < 3; i++) s.sums[i][warp][lane] = make_float2(0, 0);   // a lane's own: nobody waits
    for (int t = warp * 4 + lane / 8; t < jobs * 16; t += NW * 4) {
        uint4 q = whole_row<Q>(a, b, h, t, lane), p = plain_row(dout, a, b, h, t, lane);
        float d = 0, f[8], fo[8];
        unpack8(f, p);
        unpack8(fo, plain_row(o, a, b, h, t, lane));
        for (int i = 0; i < 8; i++) d += f[i] * fo[i];
        d = sum_lanes<8>(d);
        *(uint4 *)tile_at(s.u, t, lane % 8) = q;
        *(uint4 *)tile_at(s.w, t, lane % 8) = p;
        if (lane % 8 == 0) {
            s.lse[t] = t < a.T ? __ldg(lse + (size_t)blockIdx.x * a.T + t) * LOG2E : INFINITY;
            s.delta[t] = d;
        }
    }
    __syncthreads();
    for (int job = warp; job < jobs; job += NW) {
        for (int i = lane / 8; i < 16; i += 4) {
            uint4 k = whole_row<K>(a, b, h, job * 16 + i, lane),
                  v = whole_row<V>(a, b, h, job * 16 + i, lane);
            *(uint4 *)tile_at(x, i, lane % 8) = k;
            *(uint4 *)tile_at(y, i, lane % 8) = v;
        }
        __syncwarp();
        float dk[1][8][4] = {}, dv[1][8][4] = {};
        backward_rows<1, true>(dk, dv, x, y, s.u, s.w, s.lse, s.delta, 0, a.T, lane);
        norm_rope_backward<K>(out.dqkv, s.sums[0][warp], s.sums[1][warp], dk[0], a, b, h, job * 16, lane);
        mix_backward(out, dl, s.sums[2][warp], dv[0], a, b, h, job * 16, lane);
        __syncwarp();
    }
    dl = sum_lanes<32>(dl);
    if (lane == 0) s.dlambda[warp] = dl;
    __syncthreads();
    add_warps<NW>(part + K * HD, s.sums[0]);
    add_warps<NW>(bias + K * a.H * HD, s.sums[1]);
    add_warps<NW>(bias + V * a.H * HD, s.sums[2]);
    if (threadIdx.x == 0) {
        float x = 0;
        for (int k = 0; k < NW; k++) x += s.dlambda[k];
        part[2 * HD] = x;
    }
    for (int t = warp * 4 + lane / 8; t < jobs * 16; t += NW * 4) {
        uint4 k = whole_row<K>(a, b, h, t, lane), v = whole_row<V>(a, b, h, t, lane);
        *(uint4 *)tile_at(s.u, t, lane % 8) = k;
        *(uint4 *)tile_at(s.w, t, lane % 8) = v;
    }
    __syncthreads();
    for (int i = 0; i < 2; i++) s.sums[i][warp][lane] = make_float2(0, 0);
    for (int job = warp; job < jobs; job += NW) {
        for (int i = lane / 8; i < 16; i += 4) {
            uint4 q = whole_row<Q>(a, b, h, job * 16 + i, lane);
            *(uint4 *)tile_at(x, i, lane % 8) = q;
            *(uint4 *)tile_at(y, i, lane % 8) = plain_row(dout, a, b, h, job * 16 + i, lane);
        }
        __syncwarp();
        float dq[1][8][4] = {}, none[1][8][4];
        backward_rows<1, false>(dq, none, x, y, s.u, s.w, s.lse + job * 16, s.delta + job * 16, 0, a.T, lane);
        norm_rope_backward<Q>(out.dqkv, s.sums[0][warp], s.sums[1][warp], dq[0], a, b, h, job * 16, lane);
        __syncwarp();
    }
    __syncthreads();
    add_warps<NW>(part + Q * HD, s.sums[0]);
    add_warps<NW>(bias + Q * a.H * HD, s.sums[1]);
}

template <int TMAX, int MT> static void forward_launch(bf16 *o, float *lse, const Attention *a, int B) {
    const size_t bytes = sizeof(ForwardShared<TMAX>);
    CHECK(cudaFuncSetAttribute(tensor_attention_forward_kernel<TMAX, MT>,
                               cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
    tensor_attention_forward_kernel<TMAX, MT>
        <<<(unsigned)(B * a->H), FORWARD_WARPS * 32, bytes, stream>>>(o, lse, *a);
    LAUNCHED();
}
template <int TMAX, int NW, int MQ, int CTAS>
static void backward_launch(const AttentionGrads *g, const bf16 *dout, const bf16 *o, const float *lse,
                            const Attention *a, int B) {
    const size_t bytes = sizeof(BackwardShared<TMAX, NW>);
    CHECK(cudaFuncSetAttribute(tensor_attention_backward_kernel<TMAX, NW, MQ, CTAS>,
                               cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
    tensor_attention_backward_kernel<TMAX, NW, MQ, CTAS>
        <<<(unsigned)(B * a->H), NW * 32, bytes, stream>>>(*g, *a, dout, o, lse);
    LAUNCHED();
}
static void halves_launch(const AttentionGrads *g, const bf16 *dout, const bf16 *o, const float *lse,
                          const Attention *a, int B) {
    const size_t bytes = sizeof(HalvesShared<TMAX_LARGE, HALVES_WARPS>);
    CHECK(cudaFuncSetAttribute(tensor_attention_halves_kernel<TMAX_LARGE, HALVES_WARPS>,
                               cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
    tensor_attention_halves_kernel<TMAX_LARGE, HALVES_WARPS>
        <<<(unsigned)(B * a->H), HALVES_WARPS * 32, bytes, stream>>>(*g, *a, dout, o, lse);
    LAUNCHED();
}
static void tensor_attention_forward(bf16 *o, float *lse, const Attention *a, int B) {
    if (a->T <= TMAX_SMALL) forward_launch<TMAX_SMALL, 1>(o, lse, a, B);
    else forward_launch<TMAX_LARGE, 2>(o, lse, a, B);
}
static void tensor_attention_backward(const AttentionGrads *g, const bf16 *dout, const bf16 *o,
                                      const float *lse, const Attention *a, int B, int halves) {
    if (a->T <= TMAX_SMALL) backward_launch<TMAX_SMALL, SMALL_WARPS, 1, 3>(g, dout, o, lse, a, B);
    else if (halves) halves_launch(g, dout, o, lse, a, B);
    else backward_launch<TMAX_LARGE, LARGE_WARPS, 2, 1>(g, dout, o, lse, a, B);
}
#endif   // FP32

// Which way. The tensor cores' kernels bound the scores by the norm of q and k, so they need it; and a
// block's shared memory, of which not every card has as much. Forward and backward may go different ways:
// between them are only `out` and `lse`.
enum Way { PLAIN, HALVES, WHOLE };   // HALVES: of the backward
#ifdef FP32
static enum Way forward_way(const Attention *a) { return use_tensor_attention && !a ? WHOLE : PLAIN; }
static enum Way backward_way(const Attention *a) { return forward_way(a); }   // PLAIN
#else
static int tensor_shape(const Attention *a) {
    return use_tensor_attention && a->Dh == HD && a->T <= TMAX_LARGE && a->wq;
}
static int fits(size_t shared) { return shared <= card.sharedMemPerBlockOptin; }
static enum Way forward_way(const Attention *a) {
    if (!tensor_shape(a)) return PLAIN;
    if (a->T <= TMAX_SMALL) return fits(sizeof(ForwardShared<TMAX_SMALL>)) ? WHOLE : PLAIN;
    return fits(sizeof(ForwardShared<TMAX_LARGE>)) ? WHOLE : PLAIN;
}
static enum Way backward_way(const Attention *a) {
    if (!tensor_shape(a)) return PLAIN;
    if (a->T <= TMAX_SMALL) return fits(sizeof(BackwardShared<TMAX_SMALL, SMALL_WARPS>)) ? WHOLE : PLAIN;
    if (fits(sizeof(BackwardShared<TMAX_LARGE, LARGE_WARPS>))) return WHOLE;
    return fits(sizeof(HalvesShared<TMAX_LARGE, HALVES_WARPS>)) ? HALVES : PLAIN;
}
#endif
// What decides that for a model's longest sequences
static Attention longest_attention(const Config *c) {
    static const float weight = 1;
    Attention a;
    memset(&a, 0, sizeof(a));
    a.T = tokens_of(c);
    a.H = c->num_heads;
    a.Dh = c->hidden_size / c->num_heads;
    a.wq = c->qk_norm ? &weight : NULL;
    return a;
}
// One line, where attention is slower than it could be: why. (In float it is plain by design.)
static void attention_report(FILE *to, const Config *c) {
    Attention a = longest_attention(c);
    enum Way forward = forward_way(&a), backward = backward_way(&a);
    size_t room = card.sharedMemPerBlockOptin / 1024;
    if (sizeof(floatX) == 4 || backward == WHOLE) return;
    fprintf(to, "attention of all %d tokens: %s, since ", a.T,
            backward == HALVES ? "backward in two halves"
            : forward == PLAIN ? "plain kernels"
                               : "plain kernels backward");
    if (a.Dh != HD) fprintf(to, "heads are %d wide and the tensor cores' kernels take %d\n", a.Dh, HD);
    else if (a.T > TMAX_LARGE) fprintf(to, "the tensor cores' kernels take at most %d\n", TMAX_LARGE);
    else if (!a.wq) fprintf(to, "the tensor cores' kernels need QK-norm\n");
    else fprintf(to, "%s has %zu KB of shared memory a block\n", card.name, room);
}

enum { MIX_CHUNK = 16 };
static int attention_parts(const Attention *a, int B) {   // rows of AttentionGrads.parts
    return backward_way(a) == PLAIN ? B * div_up(a->T, MIX_CHUNK) : B * a->H;
}
static int bias_parts(const Attention *a, int B) {   // rows of AttentionGrads.bias
    return backward_way(a) == PLAIN ? B * div_up(a->T, MIX_CHUNK) : B;
}

#define BY_HEAD(KERNEL, ...)                                                                                 \
    do {                                                                                                     \
        if (a->Dh <= 16) KERNEL<16><<<grid, 32, 0, stream>>>(__VA_ARGS__);                                   \
        else if (a->Dh <= 32) KERNEL<32><<<grid, 32, 0, stream>>>(__VA_ARGS__);                              \
        else if (a->Dh <= 64) KERNEL<64><<<grid, 32, 0, stream>>>(__VA_ARGS__);                              \
        else KERNEL<128><<<grid, 32, 0, stream>>>(__VA_ARGS__);                                              \
        LAUNCHED();                                                                                          \
    } while (0)

// out [B,T,D], lse [B,H,T]; mix [B,T,3D] is scratch of the plain way
static void attention_forward(floatX *out, float *lse, floatX *mix, const Attention *a, int B) {
#ifndef FP32
    if (forward_way(a) != PLAIN) {
        tensor_attention_forward(out, lse, a, B);
        return;
    }
#endif
    dim3 grid((unsigned)div_up(a->T, 32), (unsigned)(B * a->H));
    qkv_mix_forward_kernel<<<(unsigned)(B * a->T), 256, 0, stream>>>(mix, *a);
    LAUNCHED();
    BY_HEAD(attention_forward_kernel, out, lse, mix, a->T, a->H, a->Dh);
}

// delta [B,H,T] is scratch of the plain way
static void attention_backward(const AttentionGrads *g, floatX *mix, float *delta, const floatX *dout,
                               const floatX *out, const float *lse, const Attention *a, int B) {
#ifndef FP32
    enum Way way = backward_way(a);
    if (way != PLAIN) {
        tensor_attention_backward(g, dout, out, lse, a, B, way == HALVES);
        return;
    }
#endif
    dim3 grid((unsigned)div_up(a->T, 32), (unsigned)(B * a->H)),
        mix_grid((unsigned)div_up(a->T, MIX_CHUNK), (unsigned)B);
    qkv_mix_forward_kernel<<<(unsigned)(B * a->T), 256, 0, stream>>>(mix, *a);   // (not kept)
    LAUNCHED();
    BY_HEAD(attention_backward_query_kernel, g->dqkv, delta, dout, out, lse, mix, a->T, a->H, a->Dh);
    BY_HEAD(attention_backward_key_kernel, g->dqkv, delta, dout, lse, mix, a->T, a->H, a->Dh);
    qkv_mix_backward_kernel<<<mix_grid, 256, 0, stream>>>(*g, *a, MIX_CHUNK);
    LAUNCHED();
}
#undef BY_HEAD

// ----------------------------------------------------------------------------------------------------------
// Input and draws: what a step brings from the host, and what it draws on the device from the
// same addresses as the CPU

// Where a micro-batch's random numbers lie
typedef struct {
    uint64_t seed;
    uint32_t step, first, whole;
} Draw;
typedef struct {   // laid out alike in pinned host memory and on the device
    Draw *draw;
    float *cls, *t;   // as in Batch
    int *y;
    void *x_stored,
        *feats;   // as Batch's x_stored and feats_stored; what is not so arrives as float and floatX
    float *noise, *noise_cls;   // copied if the batch brings them, else drawn here
    int *ids;
    float *x, *v_before;   // only on the device: from x_stored
    int *nearest;          // [B+1] immiscible noise's candidates of the samples, then of the one before
} Input;
// Bytes up to the stored samples, up to what is drawn, and of all that comes from the host
typedef struct {
    size_t small, stored, host;
} InputBytes;
static InputBytes input_layout(Input *in, DeviceArena *m, const Config *c, int B) {
    size_t b = (size_t)B, latent = (size_t)latent_of(c), Z = (size_t)c->z_dim, T = (size_t)tokens_of(c);
    InputBytes bytes;
    take(in->draw, m, 1);
    take(in->cls, m, b * Z);
    take(in->t, m, b);
    take(in->y, m, b);
    bytes.small = m->used;
    float *x;
    floatX *feats;
    take(x, m, (1 + b) * latent);
    take(feats, m, c->align ? b * T * Z : 0);
    in->x_stored = x, in->feats = feats;
    bytes.stored = m->used;
    take(in->noise, m, b * latent);
    take(in->noise_cls, m, b * Z);
    take(in->ids, m, b * (size_t)kept_of(c));
    bytes.host = m->used;
    take(in->x, m, b * latent);
    take(in->v_before, m, latent);
    take(in->nearest, m, b + 1);
    return bytes;
}

// x [B,C,S,S] and -v_before [C,S,S], the sample before, from their stored form. Reads 1 to 4, writes 4 bytes
// an element: 13 MB from bf16 at batch 256 of B/1, some 4 us (arithmetic).
template <class S>
__global__ void __launch_bounds__(256)
    latents_kernel(float *x, float *v_before, const S *stored, double scale, double offset, size_t latent,
                   size_t count) {
    size_t i = (size_t)blockIdx.x * 256 + threadIdx.x;
    if (i >= count) return;
    float value = to_float(stored[i]);
    if (scale != 1 || offset != 0) value = (float)((double)value * scale + offset);
    if (i < latent) v_before[i] = -value;
    else x[i - latent] = value;
}
template <class S> static void latents_of(const Input *in, const Batch *batch, size_t latent) {
    size_t count = (1 + (size_t)batch->B) * latent;
    latents_kernel<S><<<(unsigned)((count + 255) / 256), 256, 0, stream>>>(
        in->x, in->v_before, (const S *)in->x_stored, batch->scale, batch->offset, latent, count);
    LAUNCHED();
}
// The types that kernels convert. Others, and those of 8 bytes, are converted by the host.
static int latents_on_device(enum Dtype type) {
    return type == U8 || type == I8 || type == F16 || type == BF16 || type == F32;
}
static int feats_on_device(enum Dtype type) {
    return type == I8 || type == F16 || type == BF16 || (type == F32 && sizeof(floatX) == 4);
}
static void latents_convert(const Input *in, const Batch *batch, size_t latent) {
    switch (batch->x_type) {
        case U8: latents_of<uint8_t>(in, batch, latent); break;
        case I8: latents_of<int8_t>(in, batch, latent); break;
        case F16: latents_of<Half>(in, batch, latent); break;
        case BF16: latents_of<bf16>(in, batch, latent); break;
        default: latents_of<float>(in, batch, latent);
    }
}

// Standard normals of samples first + y, as fill_normal: noise [B,latent], noise_cls [B,Z]; and v_before
// [latent] += those of sample first - 1. y counts the samples, then that one, then the samples once more for
// CLS; nearest [B+1] (NULL: the first) says which candidate's the noise is. A thread draws four. 4 bytes
// written an element; bound by the arithmetic of Philox and Box-Muller.
__global__ void __launch_bounds__(256)
    noise_kernel(float *noise, float *v_before, float *noise_cls, const int *nearest, const Draw *draw, int B,
                 int latent, int Z) {
    int y = blockIdx.y, cls = y > B, b = cls ? y - B - 1 : y, before = y == B, n = cls ? Z : latent;
    uint32_t i = blockIdx.x * 256 + threadIdx.x,
             sample = (draw->first + (before ? draw->whole - 1 : (uint32_t)b)) % draw->whole;
    if (i * 4 >= (uint32_t)n) return;
    uint32_t which = cls ? (uint32_t)STREAM_NOISE_CLS : noise_stream(nearest ? nearest[y] : 0);
    Philox r = draw4(draw->seed, which, draw->step, sample, i);
    float z[4], *out = before ? v_before : (cls ? noise_cls : noise) + (size_t)b * n;
    normal2(z, r.v[0], r.v[1]), normal2(z + 2, r.v[2], r.v[3]);
    for (int j = 0; j < 4 && (int)i * 4 + j < n; j++) {
        float *to = out + i * 4 + j;
        *to = before ? *to + z[j] : z[j];
    }
}

// nearest[B+1]: which of the candidates' noises [n] is the nearest to x [B,n], then to the sample before the
// first, of which minus_before holds -x (draw_noise of train_srdit.c). A block a sample; no candidate is
// stored. Reads x once a candidate, from the cache after the first; bound by the arithmetic of Philox and
// Box-Muller: 16.8 million normals at batch 256 of B/1 with 8 candidates.
__global__ void __launch_bounds__(256) nearest_kernel(int *nearest, const float *x, const float *minus_before,
                                                      int n, const Draw *draw, int candidates) {
    __shared__ double sums[256];
    int before = blockIdx.x + 1 == gridDim.x;
    uint32_t sample = (draw->first + (before ? draw->whole - 1 : blockIdx.x)) % draw->whole;
    const float *own = before ? minus_before : x + (size_t)blockIdx.x * n;
    double least = 0;
    int best = 0;
    for (int k = 0; k < candidates; k++) {
        double sum = 0;
        for (int i = threadIdx.x; i * 4 < n; i += 256) {
            Philox r = draw4(draw->seed, noise_stream(k), draw->step, sample, (uint32_t)i);
            float z[4];
            normal2(z, r.v[0], r.v[1]), normal2(z + 2, r.v[2], r.v[3]);
            for (int j = 0; j < 4 && i * 4 + j < n; j++) {
                double d = (double)z[j] - (before ? -own[i * 4 + j] : own[i * 4 + j]);
                sum += d * d;
            }
        }
        sums[threadIdx.x] = sum;
        __syncthreads();
        if (threadIdx.x == 0) {
            for (int i = 1; i < 256; i++) sum += sums[i];
            if (k == 0 || sum < least) least = sum, best = k;
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) nearest[blockIdx.x] = best;
}

// ids[B,k]: for each sample its k of T tokens with the smallest random keys, in rising order, as draw_kept. A
// block a sample; keys in shared memory, ranks by counting: T^2 comparisons.
__global__ void __launch_bounds__(256) route_kernel(int *ids, const Draw *draw, int k, int T) {
    extern __shared__ uint32_t keys[];
    uint32_t sample = draw->first + blockIdx.x;
    for (int i = threadIdx.x; i * 4 < T; i += 256) {
        Philox r = draw4(draw->seed, STREAM_ROUTE, draw->step, sample, (uint32_t)i);
        for (int j = 0; j < 4 && i * 4 + j < T; j++) keys[i * 4 + j] = r.v[j];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < T; i += 256) {
        int rank = 0;
        uint32_t own = keys[i];
        for (int j = 0; j < T; j++) rank += keys[j] < own || (keys[j] == own && j < i);
        keys[T + i] = rank < k;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < T; i += 256) {
        if (!keys[T + i]) continue;
        int place = 0;
        for (int j = 0; j < i; j++) place += (int)keys[T + j];
        ids[(size_t)blockIdx.x * k + place] = i;
    }
}

// How batches reach the device: by way of pinned memory and a stream of its own, so that the host can go
// on at once and the copy runs under the step before. There are two of each buffer, used in turn; the host
// waits only when it is two batches ahead.
typedef struct {
    char *memory[2], *pinned[2];
    Input on_device[2], on_host[2];
    cudaEvent_t sent[2], done[2];   // the copy is over; the step that reads it is over
    InputBytes bytes;
    int turn;
} InputQueue;
static void queue_create(InputQueue *q, const Config *c, int B) {
    DeviceArena size = {NULL, 0, 1, NULL};
    q->bytes = input_layout(&q->on_device[0], &size, c, B);
    for (int i = 0; i < 2; i++) {
        DeviceArena device = {NULL, size.used, 1, NULL};
        q->memory[i] = memory_take(&device, NULL);
        input_layout(&q->on_device[i], &device, c, B);
        CHECK(cudaMallocHost((void **)&q->pinned[i], q->bytes.host));
        DeviceArena host = {q->pinned[i], 0, 1, NULL};
        input_layout(&q->on_host[i], &host, c, B);
        CHECK(cudaEventCreate(&q->sent[i]));
        CHECK(cudaEventCreate(&q->done[i]));
    }
}
static void queue_destroy(InputQueue *q) {
    for (int i = 0; i < 2; i++) {
        CHECK(cudaEventDestroy(q->sent[i]));
        CHECK(cudaEventDestroy(q->done[i]));
        CHECK(cudaFreeHost(q->pinned[i]));
        memory_free(q->memory[i], NULL);
    }
}

// A batch in memory of its own is copied to buffer k, in its stored form: latents as they are, features in
// floatX. Returns it as it lies there.
static Batch batch_into(InputQueue *q, int k, const Batch *batch, const Config *c) {
    size_t b = (size_t)batch->B, latent = (size_t)latent_of(c), Z = (size_t)c->z_dim;
    size_t feats = b * (size_t)tokens_of(c) * Z;
    Input *to = &q->on_host[k];
    float *x = (float *)to->x_stored;
    floatX *rounded = (floatX *)to->feats;
    CHECK(cudaEventSynchronize(q->sent[k]));
    for (size_t i = 0; i < latent; i++) x[i] = -batch->v_before[i];
    memcpy(x + latent, batch->x, b * latent * sizeof(float));
    memcpy(to->t, batch->t, b * sizeof(float));
    memcpy(to->y, batch->y, b * sizeof(int));
    if (c->cls) memcpy(to->cls, batch->cls, b * Z * sizeof(float));
    if (c->align) {
#pragma omp parallel for
        for (size_t i = 0; i < feats; i++) rounded[i] = (floatX)batch->feats[i];
    }
    if (!batch->on_device) {
        memcpy(to->noise, batch->noise, b * latent * sizeof(float));
        if (c->cls) memcpy(to->noise_cls, batch->noise_cls, b * Z * sizeof(float));
        memcpy(to->ids, batch->ids, b * (size_t)kept_of(c) * sizeof(int));
    }
    Batch there = *batch;
    there.stored = 1, there.slot = 1 + k, there.scale = 1, there.offset = 0;
    there.x_type = F32, there.feats_type = sizeof(floatX) == 4 ? F32 : BF16;
    return there;
}

static void copy_to_device(InputQueue *q, int k, size_t from, size_t bytes) {
    if (bytes)
        CHECK(cudaMemcpyAsync(q->memory[k] + from, q->pinned[k] + from, bytes, cudaMemcpyHostToDevice,
                              copy_stream));
}
// Queues the copy of a batch that lies in its buffer; kernels launched from here on find it on the device.
// batch_done follows the last of them.
static Input batch_upload(InputQueue *q, const Batch *batch, const Config *c) {
    int k = batch->slot - 1;
    size_t samples = (size_t)batch->B, latent = (size_t)latent_of(c) * (size_t)dtypes[batch->x_type].bytes;
    size_t feats = (size_t)(tokens_of(c) * c->z_dim) * (size_t)dtypes[batch->feats_type].bytes;
    Draw draw = {batch->seed, (uint32_t)batch->step, (uint32_t)batch->first, (uint32_t)batch->whole};
    *q->on_host[k].draw = draw;
    CHECK(cudaStreamWaitEvent(copy_stream, q->done[k], 0));
    copy_to_device(q, k, 0, q->bytes.small);
    copy_to_device(q, k, q->bytes.small, (1 + samples) * latent);
    if (c->align) copy_to_device(q, k, (size_t)((char *)q->on_host[k].feats - q->pinned[k]), samples * feats);
    if (!batch->on_device) copy_to_device(q, k, q->bytes.stored, q->bytes.host - q->bytes.stored);
    CHECK(cudaEventRecord(q->sent[k], copy_stream));
    CHECK(cudaStreamWaitEvent(stream, q->sent[k], 0));
    q->turn = !k;
    return q->on_device[k];
}
static void batch_done(InputQueue *q) { CHECK(cudaEventRecord(q->done[!q->turn], stream)); }

// The draws that the CPU makes in batch_load, from the same addresses
static void draw_on_device(const Input *in, const Config *c, int B) {
    int latent = latent_of(c), T = tokens_of(c), Z = c->cls ? c->z_dim : 0;
    dim3 grid((unsigned)div_up(imax(latent, Z), 1024), (unsigned)(B + 1 + (Z ? B : 0)));
    const int *nearest = c->immiscible > 1 ? in->nearest : NULL;
    if (nearest) {
        nearest_kernel<<<(unsigned)B + 1, 256, 0, stream>>>(in->nearest, in->x, in->v_before, latent,
                                                            in->draw, c->immiscible);
        LAUNCHED();
    }
    noise_kernel<<<grid, 256, 0, stream>>>(in->noise, in->v_before, in->noise_cls, nearest, in->draw, B,
                                           latent, Z);
    LAUNCHED();
    size_t keys = 2 * (size_t)T * sizeof(uint32_t);
    route_kernel<<<(unsigned)B, 256, keys, stream>>>(in->ids, in->draw, kept_of(c), T);
    LAUNCHED();
}

// ----------------------------------------------------------------------------------------------------------
// The model

typedef struct {                      // of one block, with n tokens a sample; what its backward needs
    float *x, *mid, *r1, *r2, *lse;   // [B,n,D] twice: the stream at its start, middle; [B,n]; [B,H,n]
    floatX *h1, *qkv, *a, *proj;      // [B,n,D], [B,n,3D], [B,n,D], [B,n,D]
    floatX *h2, *fc1, *gelu, *fc2;    // [B,n,D], [B,n,F], [B,n,F], [B,n,D]
} BlockActs;
typedef struct {                      // gradients of a block's products, which their weights' wait for
    floatX *fc2, *fc1, *proj, *qkv;   // [B,n,D], [B,n,F], [B,n,D], [B,n,3D]
} BlockGrads;
typedef struct {
    floatX *patches, *patch_tokens, *cls_t;     // [B,P,X], [B,P,D], [B,Z]
    float *cls_proj, *cls_r;                    // [B,D], [B]
    floatX *t_features, *t0_silu, *cond_silu;   // [B,W], [B,D], [B,D]
    float *t0, *cond, *mod, *final_mod;         // [B,D], [B,D], [L,B,6D], [B,2D]
    BlockActs block[MAX_DEPTH + 1];             // one more for evaluation, if h is empty
    float *E;                                   // [B,T,D] f's output, in float
    floatX *E_low, *g_out;                      // [align_row,D] rounded; [B Tk + mask + pads, D]
    int *rows;                                  // [B,T] row of g_out that a token reads
    float *fused, *last, *final_r;              // [B,T,D], [B,T,D], [B,T]
    floatX *p0, *p0_silu, *p2, *p2_silu, *zs;   // of all aligned rows: [...,M] four times, [...,Z]
    floatX *final_h;                            // [B,T,D], patches first
    float *out_patches, *cls_out;               // [B,P,X], [B,Z]
    // gradients, and scratch that all share
    float *dx, *d_E, *d_v1, *d_g;                      // [B,T,D] three times, [B Tk + ..., D]
    floatX *dy, *dh, *dG, *wide, *wide2;               // [B,T,D] twice, as g_out, [B,T,D] or [...,M|Z]
    BlockGrads d_run;                                  // of the blocks of a run, one behind the other
    floatX *d_mod, *d_final_mod, *d_out, *d_cls_out;   // [L,B,6D], [B,2D], [B,P,X], [B,Z]
    floatX *d_cond, *d_t0;                             // [B,D] twice
    float *d_cond_parts, *parts, *delta;               // [L+1,B,D], sums of chunks, [B,H,T]
    unsigned *done;                                    // [B, ...] of the norms' backward
    float *sums;                                       // what Sums hands out
    size_t sums_room;
    floatX *mix;   // [B,T,3D], where attention is plain
} Acts;

enum { LOSS_BLOCKS = 512, NORM_BLOCKS = 1024, MUON_BLOCKS = 64 };
// A matrix [rows,cols] that Muon takes; at: where it begins among the trained numbers
typedef struct {
    size_t at, own;   // own: where its momentum and average begin on its owner
    int rows, cols;
    float factor;   // max(1, fan_out / fan_in)^1/2
} MuonMatrix;
// Those of one shape, lying: m <= n; `count` of them from `first` on
typedef struct {
    int m, n, first, count;
} MuonGroup;
enum { MAX_GROUPS = 32 };
// Sums over the steps since they were read, the last step's gradient norm, and the first step that was not
// finite (0: none) with what of it was not, which stay
typedef struct {
    double denoise, cls, align, cfm, grad_norm;
    int bad_step;
    enum LossPart bad_part;
} DeviceLosses;
// The constants of a step, AdamW's of train_srdit.c in float, and its number (from 1)
typedef struct {
    float b1, b2, one1, one2, eps, rate, root, decay, ema, one_ema;
    double max_norm;
    int step;
} StepConstants;
// What tells one recorded piece of work from another: all that its kernels' arguments depend on and that may
// change while a model lives
typedef struct {
    int update;                                        // 1: of the optimizer; 0: forward and backward
    int slot, B, whole, path_drop, fresh, on_device;   // of the input queue, the batch, the gradients
    enum Dtype x_type, feats_type;
    double scale, offset;
} StepKind;
typedef struct {
    StepKind kind;
    cudaGraphExec_t graph;   // NULL: seen once, not recorded yet
} Recording;
enum { MAX_RECORDINGS = 16 };   // a training needs 5, with parts (--accum) 9
// The trained numbers begin ... end, multiples of 64, whose step one rank makes: it alone keeps their moments
// and their moving average, from `at` on in its own. With Muon one of its tensors, or all that lies between
// two of them; otherwise an equal part of a bucket.
typedef struct {
    size_t begin, end, at;
    int bucket, owner, muon;
} Piece;
// Of several ranks the gradients go round in buckets: the embedders', one of each run of blocks, and those of
// what lies behind the blocks.
enum { MAX_BUCKETS = MAX_DEPTH + 2 };
typedef struct {
    int count, equal;   // count 0: one rank; equal 1: a bucket's pieces are, in the ranks' order
    Piece *pieces;      // of all ranks
    int piece_count;
    size_t own;                       // numbers in this rank's pieces
    size_t begin[MAX_BUCKETS + 1];    // multiples of 64 (equal: of 64 size); the last is past all trained
    cudaEvent_t ready[MAX_BUCKETS];   // on `stream`: what the other ranks wait for lies there
    cudaEvent_t there[MAX_BUCKETS];   // on ranks_stream: it has come
    int due[MAX_BUCKETS];             // 1: its weights have not been waited for yet
    int reducing;                     // 1: this backward's gradients are the step's last
} Buckets;
typedef struct {
    Model base;   // its configuration and table are what shared code reads
    char *memory;
    float *params, *grads, *m, *v, *ema;   // one block each, in table order
    floatX *weights;                       // params (for sampling, ema) rounded; NULL in the float build
    enum Block weights_of;
    Params w, dw, w_ema;
    float2 *rope;   // [G,Dh/4] for attention on tensor cores
    Acts a;
    DeviceLosses *losses;
    StepConstants *constants;
    float *loss_parts, *norm_parts;           // [4, ...], [NORM_BLOCKS]
    Sums sums;                                // of this step's backward
    int bias_due[MAX_DEPTH];                  // 1: so far fc1's bias has no gradient of it
    MuonMatrix *muon_matrices, *muon_there;   // by group, on the host and on the device
    MuonGroup group[MAX_GROUPS];
    int groups, matrices;
    float *muon_sums;                // [matrices, MUON_BLOCKS]
    floatX *muon_X[2], *muon_R[4];   // a group's [count,m,n] twice and [count,m,m] four times
    InputQueue queue;
    Input in;   // the one of this step
    Recording recordings[MAX_RECORDINGS];
    int recorded;   // how many there were so far; the oldest makes room
    int fresh;      // 1: gradients count as zero, the next ones overwrite
    Buckets buckets;
    Piece *pieces;      // buckets.pieces on the device
    float *ema_whole;   // ema, or where it is gathered from several ranks
    double *shared;     // [5] of all ranks: the squared norm, the four losses
    bf16 *rounded;      // a bucket's gradients on their way (--reduce-bf16)
    float *host;        // what `activation` returns lies here
    size_t host_size;
} GpuModel;
static GpuModel *gpu_of(Model *m) { return (GpuModel *)m; }

// Tokens a sample of block i
static int tokens_in(const Config *c, int i) { return is_sparse(c, i) ? kept_of(c) : tokens_of(c); }

// The projector takes the aligned outputs of all depths at once, one below the other in a->E_low: E comes
// first, aligned or not, then the others as they rise. Here begin the rows of the k-th alignment; k =
// align_count: all end.
static int align_row(const Config *c, int k, int B) {
    int row = B * tokens_of(c);
    if (align_depth(c, k) == c->num_f) return 0;
    for (int j = 0; j < k; j++)
        if (align_depth(c, j) != c->num_f) row += B * tokens_in(c, align_depth(c, j) - 1);
    return row;
}
// Which alignment the output of block i has; -1: none
static int align_of(const Config *c, int i) {
    for (int k = 0; align_depth(c, k); k++)
        if (align_depth(c, k) == i + 1) return k;
    return -1;
}
// The first of the projector's rows, which is row 0 of zs; and how many they are
static int align_first(const Config *c, int B) {
    return align_of(c, c->num_f - 1) >= 0 ? 0 : B * tokens_of(c);
}
static int align_rows(const Config *c, int B) {
    return c->align ? align_row(c, align_count(c), B) - align_first(c, B) : 0;
}

static size_t loss_parts_of(const Config *c, int B) {   // of a depth: one for each 8 rows
    return (size_t)imax(LOSS_BLOCKS, div_up(B * tokens_of(c) + align_rows(c, B), 8) + MAX_SERIES);
}
// Rows of g_out: g's, the mask token twice, zeros
static int padded_rows(int rows) { return (rows + 2 + 63) / 64 * 64; }

// Neighbouring blocks whose weights' gradients are made together, one batch of products for each layer: the
// shorter a block's sequence, the worse would its products fill the card alone. A run's gradients of outputs
// are kept until its first block is reached; so it has at most the rows of two blocks of all tokens.
typedef struct {
    int first, count;
} BlockRun;
static int widths_differ(const Config *c) { return c->mlp_widths.count || c->hidden[0]; }   // the blocks'
static BlockRun run_of(const Config *c, int i) {
    int first_h = c->depth - c->num_h;
    int aligned = end_of_g(c, 1, 1);   // which a path-drop step runs alone
    int begin = i < c->num_f ? 0 : i < aligned ? c->num_f : i < first_h ? aligned : first_h;
    int end = i < c->num_f  ? c->num_f
              : i < aligned ? aligned
              : i < first_h ? first_h
                            : c->depth + (c->num_h == 0);
    int most = 2 * tokens_of(c) / tokens_in(c, i);
    if (widths_differ(c)) most = 1;
    BlockRun run;
    run.first = begin + (i - begin) / most * most;
    run.count = imin(most, end - run.first);
    return run;
}

static void acts_layout(Acts *a, DeviceArena *m, const Config *c, int B) {
    size_t b = (size_t)B, T = (size_t)tokens_of(c), Tk = (size_t)kept_of(c), P = (size_t)patches_of(c),
           L = (size_t)c->depth;
    size_t D = (size_t)c->hidden_size, F = (size_t)most_hidden_of(c), M = (size_t)c->projector_dim,
           Z = (size_t)c->z_dim;
    size_t H = (size_t)c->num_heads, X = (size_t)patch_dim_of(c), N = b * T,
           pad = (size_t)padded_rows(B * (int)Tk);
    take(a->patches, m, b * P * X);
    take(a->patch_tokens, m, b * P * D);
    take(a->cls_t, m, b * Z);
    take(a->cls_proj, m, b * D);
    take(a->cls_r, m, b);
    take(a->t_features, m, b * TIME_FEATURES);
    take(a->t0_silu, m, b * D);
    take(a->cond_silu, m, b * D);
    take(a->t0, m, b * D);
    take(a->cond, m, b * D);
    take(a->mod, m, L * b * 6 * D);
    take(a->final_mod, m, b * 2 * D);
    take(a->fused, m, N * D);
    size_t most_D = 0, most_F = 0, most_3D = 0;   // of a run
    for (int i = 0; i < c->depth + (c->num_h == 0); i++) {
        BlockActs *k = &a->block[i];
        int shared_by_g = c->num_h ? c->depth - 1 : c->depth;   // in evaluation
        size_t n = b * (is_sparse(c, i) ? Tk : T), Fi = i == shared_by_g ? F : (size_t)hidden_of(c, i);
        if (i == c->depth - c->num_h && c->num_h) k->x = a->fused;   // where the fusion ends
        else take(k->x, m, n * D);
        take(k->mid, m, n * D);
        take(k->r1, m, n);
        take(k->r2, m, n);
        take(k->lse, m, n * H);
        take(k->qkv, m, n * 3 * D);
        take(k->proj, m, n * D);
        take(k->fc1, m, n * Fi);
        take(k->fc2, m, n * D);
        size_t nD = step_of(n * D), nF = step_of(n * Fi);
        BlockRun run = run_of(c, i);   // what the weights' gradients read lies one behind the other in a run
        if (i > run.first) {
            const BlockActs *before = k - 1;
            k->h1 = before->h1 + nD, k->a = before->a + nD, k->h2 = before->h2 + nD;
            k->gelu = before->gelu + nF;
            continue;
        }
        most_D = largest(most_D, run.count * nD);
        most_F = largest(most_F, run.count * nF);
        most_3D = largest(most_3D, run.count * step_of(n * 3 * D));
        take(k->h1, m, run.count * nD);
        take(k->a, m, run.count * nD);
        take(k->h2, m, run.count * nD);
        take(k->gelu, m, run.count * nF);
    }
    take(a->E, m, N * D);
    take(a->E_low, m, (size_t)align_row(c, align_count(c), B) * D);
    take(a->g_out, m, pad * D);
    take(a->rows, m, N);
    take(a->last, m, c->num_h ? N * D : 0);
    take(a->final_r, m, N);
    size_t n_align = (size_t)align_rows(c, B);
    take(a->p0, m, n_align * M);
    take(a->p0_silu, m, n_align * M);
    take(a->p2, m, n_align * M);
    take(a->p2_silu, m, n_align * M);
    take(a->zs, m, n_align * Z);
    take(a->final_h, m, N * D);
    take(a->out_patches, m, b * P * X);
    take(a->cls_out, m, b * Z);
    take(a->dx, m, N * D);
    take(a->d_E, m, N * D);
    take(a->d_v1, m, N * D);
    take(a->d_g, m, pad * D);
    size_t wide = largest(N * D, n_align * M), wide2 = largest(wide, n_align * Z);
    take(a->d_run.fc2, m, most_D);
    take(a->d_run.fc1, m, most_F);
    take(a->d_run.proj, m, most_D);
    take(a->d_run.qkv, m, most_3D);
    take(a->dy, m, N * D);
    take(a->dh, m, N * D);
    take(a->dG, m, pad * D);
    take(a->wide, m, wide + 64 * D);
    take(a->wide2, m, wide2 + 64 * D);
    take(a->d_mod, m, L * b * 6 * D);
    take(a->d_final_mod, m, b * 2 * D);
    take(a->d_out, m, b * P * X);
    take(a->d_cls_out, m, b * Z);
    take(a->d_cond, m, b * D);
    take(a->d_t0, m, b * D);
    take(a->d_cond_parts, m, (L + 1) * b * D);
    size_t Dh = D / H, of_norm = b * (size_t)norm_most_chunks((int)T) * 4 * D;
    take(a->parts, m, largest(of_norm, (N / GATHER_CHUNK + 1) * D));
    take(a->done, m, b * (size_t)div_up(c->hidden_size, NORM_SLAB));
    Attention longest = longest_attention(c);
    size_t plain = forward_way(&longest) == PLAIN || backward_way(&longest) == PLAIN;
    // each block's two norms, fc1's bias, attention; the rest (p0, p2, p4, x, final, fusion, t, cls)
    a->sums_room = BIAS_CHUNKS * (2 * M + 2 * Z + X + 6 * D) + 4 * b * D;
    for (int i = 0; i < c->depth; i++) {
        longest.T = (int)(is_sparse(c, i) ? Tk : T);
        size_t rows = (size_t)attention_parts(&longest, (int)b),
               bias_rows = (size_t)bias_parts(&longest, (int)b);
        a->sums_room += 2 * b * D + BIAS_CHUNKS * F + rows * (2 * Dh + 1) + bias_rows * 3 * D + 5 * 64;
    }
    take(a->sums, m, a->sums_room);
    take(a->delta, m, plain * N * H);
    take(a->mix, m, plain * N * 3 * D);
}

// The piece of tensor t, which is Muon's
static const Piece *piece_of(const GpuModel *g, const Tensor *t) {
    const Piece *p = g->buckets.pieces;
    while (p->begin != t->offset) p++;
    return p;
}
// How many matrices of tensor t this rank's Muon takes
static int muon_of(const GpuModel *g, const Tensor *t) {
    return t->muon_parts && piece_of(g, t)->owner == ranks.rank ? t->muon_parts : 0;
}
// Sorts Muon's matrices into groups of one shape, on the host
static void muon_groups(GpuModel *g) {
    const Table *table = &g->base.table;
    int count = 0;
    for (int i = 0; i < table->count; i++) count += muon_of(g, &table->tensors[i]);
    g->muon_matrices = (MuonMatrix *)alloc_zero((size_t)count + 1, sizeof(MuonMatrix));
    g->matrices = count;
    g->groups = 0;
    for (int i = 0; i < table->count; i++) {   // the groups' shapes
        const Tensor *t = &table->tensors[i];
        if (!muon_of(g, t)) continue;
        int rows = t->shape[0] / t->muon_parts, cols = (int)(t->size / (size_t)t->shape[0]), k = 0;
        MuonGroup own = {imin(rows, cols), imax(rows, cols), 0, 0};
        while (k < g->groups && (g->group[k].m != own.m || g->group[k].n != own.n)) k++;
        if (k == MAX_GROUPS) die("Muon on the GPU takes at most %d shapes of matrices", MAX_GROUPS);
        if (k == g->groups) g->group[g->groups++] = own;
        g->group[k].count += t->muon_parts;
    }
    for (int k = 1; k < g->groups; k++) g->group[k].first = g->group[k - 1].first + g->group[k - 1].count;
    int filled[MAX_GROUPS] = {0};
    for (int i = 0; i < table->count; i++) {
        const Tensor *t = &table->tensors[i];
        if (!muon_of(g, t)) continue;
        int rows = t->shape[0] / t->muon_parts, cols = (int)(t->size / (size_t)t->shape[0]), k = 0;
        double ratio = (double)t->shape[t->ndim - 2] / t->muon_parts / t->shape[t->ndim - 1];
        while (g->group[k].m != imin(rows, cols) || g->group[k].n != imax(rows, cols)) k++;
        for (int p = 0; p < t->muon_parts; p++) {
            size_t before = (size_t)p * rows * cols;
            MuonMatrix one = {t->offset + before, piece_of(g, t)->at + before, rows, cols,
                              (float)sqrt(fmax(1, ratio))};
            g->muon_matrices[g->group[k].first + filled[k]++] = one;
        }
    }
}

// All device memory of a model but its input, walked twice: first to count, then to set the pointers.
// Returns the parameters' share.
static size_t memory_layout(GpuModel *g, DeviceArena *m, int B) {
    const Config *c = &g->base.c;
    const Buckets *b = &g->buckets;
    size_t n = largest(g->base.table.total, b->begin[b->count]), own = b->count ? b->own : n;
    take(g->params, m, n);
    take(g->grads, m, n);
    take(g->m, m, own);
    take(g->v, m, own);
    take(g->ema, m, own);
    take(g->weights, m, sizeof(floatX) == 4 ? 0 : n);
    size_t parameters = m->used;
    take(g->rope, m, (size_t)grid_of(c) * (size_t)(c->hidden_size / c->num_heads / 4));
    take(g->losses, m, 1);
    take(g->shared, m, 5);
    size_t most = 0;
    for (int k = 0; k < b->count; k++) most = largest(most, b->begin[k + 1] - b->begin[k]);
    take(g->rounded, m, ranks.bf16 ? most : 0);
    take(g->constants, m, 1);
    take(g->loss_parts, m, 4 * loss_parts_of(c, B));
    take(g->norm_parts, m, NORM_BLOCKS);
    take(g->pieces, m, (size_t)b->piece_count);
    size_t most_X = 0, most_R = 0;
    for (int k = 0; k < g->groups; k++) {
        const MuonGroup *one = &g->group[k];
        most_X = largest(most_X, (size_t)one->count * one->m * one->n);
        most_R = largest(most_R, (size_t)one->count * one->m * one->m);
    }
    take(g->muon_there, m, (size_t)g->matrices);
    take(g->muon_sums, m, (size_t)g->matrices * MUON_BLOCKS);
    for (int k = 0; k < 4; k++) {
        if (k < 2) take(g->muon_X[k], m, most_X);
        take(g->muon_R[k], m, most_R);
    }
    acts_layout(&g->a, m, c, B);
    g->sums.parts = g->a.sums;
    g->sums.room = g->a.sums_room;
    return parameters;
}

// The floatX twin of a weight
static const floatX *low(const GpuModel *g, const float *p) {
#ifdef FP32
    (void)g;
    return p;
#else
    const float *ema = g->ema_whole;
    const float *base = p >= ema && p < ema + g->base.table.total ? ema : g->params;
    return g->weights + (p - base);
#endif
}
static void buckets_await(GpuModel *g, int first, int last);
static void use_weights(GpuModel *g, enum Block which) {
    if (g->weights_of == which || sizeof(floatX) == 4) return;
    buckets_await(g, 0, g->buckets.count - 1);
    cast(g->weights, which == EMA ? g->ema_whole : g->params, g->base.table.trained);
    g->weights_of = which;
}

// ----------------------------------------------------------------------------------------------------------
// Several GPUs: each rank computes its share of a batch's samples, as a part of --accum does; then the
// gradients are added up. In time (the buckets of embedders e, runs of blocks f g h, the rest r; accum 1):
//
//   stream        backward h      g      f     e | norm   AdamW of e f r g h | forward e   f     g     h
//   ranks_stream            sum h | r  g |  f | e        weights e | f | r | g | h
//
// Of each bucket a rank gets the sums of its pieces, to which it makes the step: so moments, moving average
// and the weights in float of a piece are on one rank only (ZeRO-1). Then all get all pieces of the weights
// as the products read them, rounded, and the few that are read in float: biases, norms, labels. For a
// checkpoint or pictures the float ones are gathered, too. AdamW takes a piece as it comes: a rank's part
// of each bucket (reduce-scatter, all-gather). Muon needs whole matrices: each has an owner (reduce,
// broadcast). Every sum has a fixed order. A step is not replayed as a CUDA graph: its launches hide behind
// the step before.

#ifdef NCCL
// The calls of NCCL, found when they are needed: one GPU does without the library
static struct {
    decltype(&ncclGetUniqueId) GetUniqueId;
    decltype(&ncclCommInitRankConfig) CommInitRankConfig;
    decltype(&ncclCommGetAsyncError) CommGetAsyncError;
    decltype(&ncclCommFinalize) CommFinalize;
    decltype(&ncclCommDestroy) CommDestroy;
    decltype(&ncclGetErrorString) GetErrorString;
    decltype(&ncclGetLastError) GetLastError;
    decltype(&ncclAllReduce) AllReduce;
    decltype(&ncclReduce) Reduce;
    decltype(&ncclReduceScatter) ReduceScatter;
    decltype(&ncclAllGather) AllGather;
    decltype(&ncclBroadcast) Broadcast;
    decltype(&ncclGroupStart) GroupStart;
    decltype(&ncclGroupEnd) GroupEnd;
} nccl;
static ncclComm_t comm;
// NCCL takes calls with one communicator from one thread at a time; the listening thread asks after it, too.
static pthread_mutex_t nccl_lock = PTHREAD_MUTEX_INITIALIZER;

// Calls return before they are done. While ranks join and part one that does not come is waited for until
// the deadline; in between the listening thread hears of it, and a call may have to wait for as long as rank
// 0 writes a checkpoint. A step's calls end within microseconds, but joining takes seconds.
static double nccl_patience = INFINITY;
static void check_nccl(ncclResult_t r, const char *call) {
    double begin = now_seconds(), now = begin;
    for (; r == ncclInProgress && comm; now = now_seconds()) {
        if (now > begin + nccl_patience)
            die("NCCL: %s has not ended within %.0f s (RANKS_DEADLINE=SECONDS waits longer)", call,
                nccl_patience);
        if (now < begin + 0.002) sched_yield();
        else usleep(100);
        ncclResult_t asked = nccl.CommGetAsyncError(comm, &r);
        if (asked != ncclSuccess) r = asked;
    }
    if (r == ncclSuccess) return;
    ranks_hear_first();
    die("NCCL: %s: %s (%s); NCCL_DEBUG=INFO NCCL_DEBUG_FILE=nccl.%%h.%%p writes more to files", call,
        nccl.GetErrorString(r), nccl.GetLastError(NULL));
}
#define CHECK_NCCL(call, ...)                                                                                \
    (pthread_mutex_lock(&nccl_lock), check_nccl(nccl.call(__VA_ARGS__), #call),                              \
     pthread_mutex_unlock(&nccl_lock))
// What the listening thread asks every second (dev/lib/ranks.h); while a call is under way, that one asks.
// What another rank's end has caused is heard of by its connection, too, and told by that: so not at first.
static int nccl_trouble(char text[1024]) {
    static int seen;
    ncclResult_t r = ncclSuccess, asked = ncclSuccess;
    if (pthread_mutex_trylock(&nccl_lock)) return 0;
    if (comm) asked = nccl.CommGetAsyncError(comm, &r);
    if (asked != ncclSuccess) r = asked;
    seen = r == ncclSuccess || r == ncclInProgress ? 0 : seen + 1;
    int bad = seen > 3;
    if (bad) snprintf(text, 1024, "NCCL: %s (%s)", nccl.GetErrorString(r), nccl.GetLastError(NULL));
    pthread_mutex_unlock(&nccl_lock);
    return bad;
}
template <class T> static void ranks_sum(T *all, size_t n);
static void nccl_open(void) {
    const char *path = getenv("NCCL_LIBRARY");
    void *library = dlopen(path ? path : NCCL_NAME, RTLD_NOW | RTLD_LOCAL);
    if (!library)
        die("several GPUs need NCCL, which cannot be opened: %s (NCCL_LIBRARY=PATH names one)", dlerror());
#define FIND(name)                                                                                           \
    if (!(*(void **)&nccl.name = dlsym(library, "nccl" #name))) die("NCCL: it lacks nccl" #name)
    FIND(GetUniqueId);
    FIND(CommInitRankConfig);
    FIND(CommGetAsyncError);
    FIND(CommFinalize);
    FIND(CommDestroy);
    FIND(GetErrorString);
    FIND(GetLastError);
    FIND(AllReduce);
    FIND(Reduce);
    FIND(ReduceScatter);
    FIND(AllGather);
    FIND(Broadcast);
    FIND(GroupStart);
    FIND(GroupEnd);
#undef FIND
    // Rings add in one order; other algorithms are left to who sets NCCL_ALGO in the environment.
    setenv("NCCL_ALGO", "Ring", 0);
    // Rank 0's NCCL listens at an address of its choice (NCCL_SOCKET_IFNAME), which its handle tells the
    // others.
    static ncclUniqueId handles[MAX_RANKS];
    ncclUniqueId own;
    memset((void *)&own, 0, sizeof(own));
    if (!ranks.rank) CHECK_NCCL(GetUniqueId, &own);
    ranks_exchange(handles, &own, sizeof(own));
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    nccl_patience = 4 * ranks.deadline;   // all have come: who dies now is heard of
    CHECK_NCCL(CommInitRankConfig, &comm, ranks.size, handles[0], ranks.rank, &config);
    // A first sum, so that NCCL connects and takes its memory now: within that time, and before the model's
    // is counted.
    CHECK(cudaMemsetAsync(workspace, 0, sizeof(float), ranks_stream));
    ranks_sum((float *)workspace, 1);
    CHECK(cudaStreamSynchronize(ranks_stream));
    nccl_patience = INFINITY;
    ranks.trouble = nccl_trouble;
}
static void nccl_close(void) {
    nccl_patience = ranks.deadline;
    CHECK_NCCL(CommFinalize, comm);   // polled; then there is nothing left that could fail
    pthread_mutex_lock(&nccl_lock);
    nccl.CommDestroy(comm);
    comm = NULL;   // nccl_trouble asks no more
    pthread_mutex_unlock(&nccl_lock);
}
static ncclDataType_t type_of(const float *) { return ncclFloat; }
static ncclDataType_t type_of(const double *) { return ncclDouble; }
static ncclDataType_t type_of(const bf16 *) { return ncclBfloat16; }
// On ranks_stream: all[size][n] of which this rank has its own (in place where that is all + rank n), sums of
// it, sums of all, for one rank or for every one, and x of one rank to every one (from = to: in place)
template <class T> static void ranks_gather(T *all, const T *own, size_t n) {
    CHECK_NCCL(AllGather, own, all, n, type_of(all), comm, ranks_stream);
}
template <class T> static void ranks_scatter_sum(T *all, size_t n) {
    CHECK_NCCL(ReduceScatter, all, all + (size_t)ranks.rank * n, n, type_of(all), ncclSum, comm,
               ranks_stream);
}
template <class T> static void ranks_sum(T *all, size_t n) {
    CHECK_NCCL(AllReduce, all, all, n, type_of(all), ncclSum, comm, ranks_stream);
}
template <class T> static void ranks_sum_for(T *all, size_t n, int rank) {
    CHECK_NCCL(Reduce, all, all, n, type_of(all), ncclSum, rank, comm, ranks_stream);
}
template <class T> static void ranks_broadcast(T *to, const T *from, size_t n, int rank) {
    CHECK_NCCL(Broadcast, from, to, n, type_of(to), rank, comm, ranks_stream);
}
static void ranks_group_begin(void) { CHECK_NCCL(GroupStart); }   // calls in between go as one
static void ranks_group_end(void) { CHECK_NCCL(GroupEnd); }
#else
static void nccl_open(void) {
    die("this was built without NCCL (make said so), which several GPUs need: install it and build again");
}
static void nccl_close(void) {}
template <class T> static void ranks_gather(T *, const T *, size_t) {}
template <class T> static void ranks_scatter_sum(T *, size_t) {}
template <class T> static void ranks_sum(T *, size_t) {}
template <class T> static void ranks_sum_for(T *, size_t, int) {}
template <class T> static void ranks_broadcast(T *, const T *, size_t, int) {}
static void ranks_group_begin(void) {}
static void ranks_group_end(void) {}
#endif

// A tensor that is read in float, not only by products; of the others all but its owner need the rounded twin
// alone, where there is one.
static int read_in_float(const GpuModel *g, const Tensor *t) {
    const float *p = g->params + t->offset;
    return !g->weights || t->ndim < 2 || p == g->w.label || p == g->w.mask_token;
}
// Numbers that this rank will not be told any more: the emulator makes them NaN, so that nobody reads them.
static void forget(float *x, size_t n) {
#ifdef CUDA_ON_CPU
    CHECK(cudaMemsetAsync(x, 0xff, n * sizeof(float), ranks_stream));
#else
    (void)x, (void)n;
#endif
}
static size_t bucket_size(const Buckets *b, int k) { return b->begin[k + 1] - b->begin[k]; }
static size_t piece_size(const Buckets *b, int k) { return bucket_size(b, k) / ranks.size; }   // where equal
static void piece_add(Buckets *b, size_t begin, size_t end, int bucket, int owner, int muon, size_t *at) {
    Piece one = {begin, end, at[owner], bucket, owner, muon};
    b->pieces[b->piece_count++] = one;
    at[owner] += end - begin;
}
// AdamW of several ranks: each takes its part of each bucket. own[rank]: its numbers so far
static void pieces_of_buckets(GpuModel *g, size_t *own) {
    const Buckets *b = &g->buckets;
    size_t trained = g->base.table.trained;
    for (int k = 0; k < b->count; k++)
        for (int r = 0; r < ranks.size; r++) {
            size_t n = piece_size(b, k), begin = b->begin[k] + r * n;
            if (begin < trained)   // the last bucket's may end before its pieces do
                piece_add(&g->buckets, begin, smallest(begin + n, trained), k, r, 0, own);
        }
}
// Muon, or one rank: a tensor of Muon's goes to the rank that has least to do so far, a product's work
// being that of its numbers times the shorter side; what lies between two of them to the rank with fewest
// numbers.
static void pieces_of_tensors(GpuModel *g, size_t *own) {
    const Table *table = &g->base.table;
    const Buckets *b = &g->buckets;
    double work[MAX_RANKS] = {0};
    int k = 0;
    for (int i = 0, next; i < table->count && table->tensors[i].trained; i = next) {
        const Tensor *t = &table->tensors[i], *end = t + 1;
        if (k + 1 < b->count && t->offset == b->begin[k + 1]) k++;
        while (!t->muon_parts && end->trained && !end->muon_parts && end->offset != b->begin[k + 1]) end++;
        next = i + (int)(end - t);
        int owner = 0;
        for (int r = 1; r < ranks.size; r++)
            if (t->muon_parts ? work[r] < work[owner] : own[r] < own[owner]) owner = r;
        if (t->muon_parts)
            work[owner] +=
                (double)t->size * imin(t->shape[0] / t->muon_parts, (int)(t->size / (size_t)t->shape[0]));
        piece_add(&g->buckets, t->offset, end->offset, k, owner, t->muon_parts, own);
    }
}
// Where the buckets begin: borders between tensors, moved to a multiple of 64 `size`. They move up, so that
// the bucket before gets a little of what has its gradient earlier and whose weights may come early; but
// that of what lies behind a decoder moves down, since its gradients come after the decoder's. (Without one
// the projector's first numbers come with the last run of g, and are needed before: projector_forward.)
static void buckets_plan(GpuModel *g) {
    const Config *c = &g->base.c;
    Buckets *b = &g->buckets;
    memset(b, 0, sizeof(*b));
    b->equal = ranks.size > 1 && c->optimizer != MUON;
    size_t unit = 64 * (size_t)(b->equal ? ranks.size : 1), last = 0;
    for (int i = 0; i < g->base.table.count && ranks.size > 1; i++) {
        const Tensor *t = &g->base.table.tensors[i], *before = t - 1;
        int behind = i && t->block < 0 && before->block >= 0;
        int first =
            t->block >= 0 && run_of(c, t->block).first == t->block && (!i || before->block != t->block);
        size_t up = behind && c->num_h ? 0 : unit - 1;
        if (t->trained && (i == 0 || behind || first)) b->begin[b->count++] = (t->offset + up) / unit * unit;
        if (t->trained) last = (t->offset + t->size + unit - 1) / unit * unit;
    }
    b->begin[b->count] = last;
    for (int k = 0; k < b->count; k++) {
        if (b->begin[k] + unit > b->begin[k + 1])
            die("%d ranks are too many for a model so small", ranks.size);
        CHECK(cudaEventCreateWithFlags(&b->ready[k], cudaEventDisableTiming));
        CHECK(cudaEventCreateWithFlags(&b->there[k], cudaEventDisableTiming));
    }
    b->pieces = (Piece *)alloc_zero((size_t)(g->base.table.count + b->count * ranks.size), sizeof(Piece));
    size_t own[MAX_RANKS] = {0};
    b->equal ? pieces_of_buckets(g, own) : pieces_of_tensors(g, own);
    b->own = own[ranks.rank];
}
static void buckets_free(Buckets *b) {
    for (int k = 0; k < b->count; k++)
        CHECK(cudaEventDestroy(b->ready[k])), CHECK(cudaEventDestroy(b->there[k]));
    free(b->pieces);
}
// The bucket of the run whose first block is i
static int bucket_of(const Config *c, int i) {
    int k = 1;
    for (int j = 0; j < i; j++) k += run_of(c, j).first == j;
    return k;
}
// What is queued next on ranks_stream waits for `stream`, or the other way round
static void ranks_after(cudaEvent_t event) {
    CHECK(cudaEventRecord(event, stream));
    CHECK(cudaStreamWaitEvent(ranks_stream, event, 0));
}
static void stream_after(cudaEvent_t event) {
    CHECK(cudaEventRecord(event, ranks_stream));
    CHECK(cudaStreamWaitEvent(stream, event, 0));
}
// The gradients of bucket k are complete: those queued sums that wait are done, and they go on their way.
static void bucket_reduce(GpuModel *g, int k) {
    Buckets *b = &g->buckets;
    if (!b->reducing) return;
    sums_end(&g->sums);
    ranks_after(b->ready[k]);
    float *grads = g->grads + b->begin[k];
    size_t n = bucket_size(b, k), piece = piece_size(b, k), own = b->equal ? ranks.rank * piece : 0;
    if (ranks.bf16) cast(g->rounded, grads, n, ranks_stream);
    if (b->equal && ranks.bf16) ranks_scatter_sum(g->rounded, piece);
    else if (b->equal) ranks_scatter_sum(grads, piece);
    else {
        ranks_group_begin();
        for (int i = 0; i < b->piece_count; i++) {
            const Piece *p = &b->pieces[i];
            size_t at = p->begin - b->begin[k];
            if (p->bucket != k) continue;
            if (ranks.bf16) ranks_sum_for(g->rounded + at, p->end - p->begin, p->owner);
            else ranks_sum_for(grads + at, p->end - p->begin, p->owner);
        }
        ranks_group_end();
    }
    if (ranks.bf16) cast(grads + own, g->rounded + own, b->equal ? piece : n, ranks_stream);
}
// The weights of bucket k are new in this rank's pieces: rounded they go to all, and so does, tensor by
// tensor, what is read in float.
static void bucket_gather(GpuModel *g, int k) {
    Buckets *b = &g->buckets;
    ranks_after(b->ready[k]);
    size_t all = b->begin[k], piece = piece_size(b, k), own = all + ranks.rank * piece;
    int by_tensors = !b->equal || g->weights;
    if (b->equal && g->weights) ranks_gather(g->weights + all, g->weights + own, piece);
    if (!by_tensors) ranks_gather(g->params + all, g->params + own, piece);
    else ranks_group_begin();   // an empty one ends some versions of NCCL
    for (int i = 0; i < b->piece_count && by_tensors; i++) {
        const Piece *p = &b->pieces[i];
        if (p->bucket != k) continue;
        floatX *weights = g->weights + p->begin;
        if (!b->equal && g->weights) ranks_broadcast(weights, weights, p->end - p->begin, p->owner);
        for (int j = 0; j < g->base.table.count; j++) {
            const Tensor *t = &g->base.table.tensors[j];
            size_t low = largest(p->begin, t->offset), high = smallest(p->end, t->offset + t->size);
            if (!t->trained || low >= high) continue;
            float *params = g->params + low;
            if (read_in_float(g, t)) ranks_broadcast(params, params, high - low, p->owner);
            else if (p->owner != ranks.rank) forget(params, high - low);
        }
    }
    if (by_tensors) ranks_group_end();
    CHECK(cudaEventRecord(b->there[k], ranks_stream));
    b->due[k] = 1;
}
// Before their first use: all ranks' weights of buckets first ... last are here.
static void buckets_await(GpuModel *g, int first, int last) {
    Buckets *b = &g->buckets;
    for (int k = imax(first, 0); k <= last && k < b->count; k++) {
        if (b->due[k]) CHECK(cudaStreamWaitEvent(stream, b->there[k], 0));
        b->due[k] = 0;
    }
}
// A block of moments or averages, whole: in g->grads, which nobody needs between two steps; or the weights in
// float, where they are. All ranks call this.
static float *gather_pieces(GpuModel *g, float *own) {
    Buckets *b = &g->buckets;
    if (ranks.size == 1) return own;
    float *all = own == g->params ? own : g->grads;
    ranks_after(b->ready[0]);
    ranks_group_begin();
    for (int i = 0; i < b->piece_count; i++) {
        const Piece *p = &b->pieces[i];
        float *to = all + p->begin;
        ranks_broadcast(to, p->owner == ranks.rank && own != all ? own + p->at : to, p->end - p->begin,
                        p->owner);
    }
    ranks_group_end();
    stream_after(b->there[0]);
    return all;
}
static void gather_ema(Model *m) {
    GpuModel *g = gpu_of(m);
    gather_pieces(g, g->ema);
    if (g->weights)
        gather_pieces(g, g->params);   // they are rounded anew after the average has had their place
    if (g->weights_of == EMA && ranks.size > 1) g->weights_of = GRADS;   // an older one's
}

static Attention attention_of(const GpuModel *g, const Params *all, const BlockParams *w, const BlockActs *k,
                              const floatX *v1, const int *ids, int n) {
    const Config *c = &g->base.c;
    Attention a;
    a.qkv = k->qkv;
    a.v1 = v1;
    a.ids = ids;
    a.tokens = tokens_of(c);
    a.cls = c->cls;
    a.wq = w->q_norm;
    a.wk = w->k_norm;
    a.lambda = w->v1_lambda;
    a.rope_cos = c->rope ? all->rope_cos : NULL;
    a.rope_sin = c->rope ? all->rope_sin : NULL;
    a.rope = g->rope;
    a.T = n;
    a.H = c->num_heads;
    a.Dh = c->hidden_size / a.H;
    a.G = grid_of(c);
    a.G_inverse = div_up(65536, a.G);
    return a;
}

// Distance of a block's parameters from those of the block before it: the same for all
// tensors that all blocks have
static size_t block_stride(const GpuModel *g) {
    return g->base.c.depth > 1 ? (size_t)(g->w.block[1].adaln_w - g->w.block[0].adaln_w) : 0;
}

// Where MLPs have different widths blocks do not lie at equal steps: their layers go one by one
static int blocks_at_once(const Config *c) { return widths_differ(c) ? 1 : c->depth; }

// mod[L,B,6D] = cond_silu adaln_w^T + adaln_b for blocks first ... end at once
static void adaln_forward(GpuModel *g, const Params *w, int B, int first, int end) {
    place(CONDITION);
    const Config *c = &g->base.c;
    Acts *a = &g->a;
    int D = c->hidden_size, each = imin(blocks_at_once(c), end - first);
    GemmKey k = gemm_key(B, 6 * D, D, 0, 1);
    k.batch = each;
    k.stepb = k.step_bias = (int64_t)block_stride(g);
    k.stepc = (int64_t)B * 6 * D;
    for (int i = first; i < end; i += each)
        matmul<float>(k, a->mod + i * k.stepc, a->cond_silu, low(g, w->block[i].adaln_w),
                      w->block[i].adaln_b);
}

// The gradients of those layers from a->d_mod, blocks first ... end at once; into a->d_cond_parts [L,B,D]
// each block's part of the gradient of cond_silu
static void adaln_backward(GpuModel *g, int B, int first, int end) {
    place(CONDITION);
    Acts *a = &g->a;
    int D = g->base.c.hidden_size, add = !g->fresh, each = imin(blocks_at_once(&g->base.c), end - first);
    size_t step = block_stride(g), mod_step = (size_t)B * 6 * D;
    for (int i = first; i < end; i += each) {
        const floatX *d_mod = a->d_mod + i * mod_step;
        GemmKey k = gemm_key(6 * D, D, B, 1, 0);
        k.add = add;
        k.batch = each;
        k.stepa = (int64_t)mod_step;
        k.stepc = (int64_t)step;
        matmul<float>(k, g->dw.block[i].adaln_w, d_mod, a->cond_silu, NULL);
        k = gemm_key(B, D, 6 * D, 0, 0);
        k.batch = each;
        k.stepa = (int64_t)mod_step;
        k.stepb = (int64_t)step;
        k.stepc = (int64_t)B * D;
        matmul<float>(k, a->d_cond_parts + i * k.stepc, d_mod, low(g, g->w.block[i].adaln_w), NULL);
    }
    for (int i = first; i < end; i++)
        sum_later(&g->sums, g->dw.block[i].adaln_b, a->d_mod + i * mod_step, B, 6 * D, 6 * D);
}

// Block i on n tokens a sample: its output is the returned residual. v1: block 0's qkv, NULL
// where values are not mixed. B: the samples it runs on, the first of the `batch` that g->a.mod is of.
static Residual block_forward(GpuModel *g, int i, BlockActs *k, const Residual &in, const floatX *v1,
                              const int *ids, const Params *all, int batch, int B, int n) {
    place(is_sparse(&g->base.c, i) ? SPARSE : DENSE);
    const Config *c = &g->base.c;
    const BlockParams *w = &all->block[i];
    int D = c->hidden_size, F = hidden_of(c, i), N = B * n;
    const float *mod = g->a.mod + (size_t)i * batch * 6 * D;
    const float *shift1 = mod, *scale1 = mod + D, *gate1 = mod + 2 * D;
    const float *shift2 = mod + 3 * D, *scale2 = mod + 4 * D, *gate2 = mod + 5 * D;
    Attention attention = attention_of(g, all, w, k, v1, ids, n);
    norm_modulate_forward(in.x == k->x && !in.y ? NULL : k->x, k->h1, k->r1, in, shift1, scale1, 6 * D, -1, B,
                          n, D);
    linear_forward<floatX>(k->qkv, k->h1, low(g, w->qkv_w), low(g, w->qkv_b), N, D, 3 * D);
    attention_forward(k->a, k->lse, g->a.mix, &attention, B);
    linear_forward<floatX>(k->proj, k->a, low(g, w->proj_w), low(g, w->proj_b), N, D, D);
    norm_modulate_forward(k->mid, k->h2, k->r2, residual_of(k->x, gate1, 6 * D, k->proj), shift2, scale2,
                          6 * D, -1, B, n, D);
    linear_gelu_forward(k->gelu, k->fc1, k->h2, low(g, w->fc1_w), low(g, w->fc1_b), N, D, F);
    linear_forward<floatX>(k->fc2, k->gelu, low(g, w->fc2_w), low(g, w->fc2_b), N, F, D);
    return residual_of(k->mid, gate2, 6 * D, k->fc2);
}

// Where the gradients of block i's products lie
static BlockGrads block_grads(const GpuModel *g, int i, int B) {
    const Config *c = &g->base.c;
    size_t D = (size_t)c->hidden_size, rows = (size_t)(B * tokens_in(c, i));
    size_t at = (size_t)(i - run_of(c, i).first);
    BlockGrads d = g->a.d_run;
    d.fc2 += at * step_of(rows * D);
    d.fc1 += at * step_of(rows * (size_t)hidden_of(c, i));
    d.proj += at * step_of(rows * D);
    d.qkv += at * step_of(rows * 3 * D);
    return d;
}
// The backward of a norm that reads n tokens a sample, before its caller says what it read
static NormBackward norm_backward_of(GpuModel *g, float *dx, int n) {
    NormBackward a;
    memset(&a, 0, sizeof(a));
    a.dx = dx;
    a.dh_cls = a.dy_cls = -1;
    a.T = n;
    a.D = g->base.c.hidden_size;
    a.parts = g->a.parts;
    a.done = g->a.done;
    a.dy = g->a.dy;
    a.gate_stride = 6 * a.D;
    return a;
}
// The same where the residual was x + gate fc2 of block i: the gradients of fc2, of gate2 and of fc2's bias
// are taken
static void norm_backward_behind(NormBackward *a, GpuModel *g, int i, int B) {
    int D = a->D;
    size_t at = (size_t)i * B * 6 * D + 5 * D;
    a->y = g->a.block[i].fc2;
    a->dy = block_grads(g, i, B).fc2;
    a->gate = g->a.mod + at;
    a->dgate = g->a.d_mod + at;
    a->bias = sum_parts(&g->sums, g->dw.block[i].fc2_b, B, D);
    norm_modulate_backward(a, B);
}

// The block that writes a->d_v1 of all tokens, to which the others add: the decoder's last; -1: there is none
static int v1_begins_at(const Config *c) { return c->num_h && c->depth > 1 ? c->depth - 1 : -1; }

// The gradients of the weights of block i's run, and of those fc1's biases that are still due, from what the
// backward of its blocks left in a->d_run
static void run_weights_backward(GpuModel *g, int i, int B, int n) {
    const Config *c = &g->base.c;
    const BlockGrads *d = &g->a.d_run;
    BlockRun run = run_of(c, i);
    const BlockActs *k = &g->a.block[run.first];
    BlockParams *dw = &g->dw.block[run.first], *next = dw + (run.count > 1);
    int D = c->hidden_size, F = hidden_of(c, i), N = B * n, add = !g->fresh;
    linear_backward_weight(dw->fc2_w, d->fc2, k->gelu, N, F, D, add, 0, run.count, next->fc2_w - dw->fc2_w);
    linear_backward_weight(dw->fc1_w, d->fc1, k->h2, N, D, F, add, 0, run.count, next->fc1_w - dw->fc1_w);
    linear_backward_weight(dw->proj_w, d->proj, k->a, N, D, D, add, 0, run.count, next->proj_w - dw->proj_w);
    linear_backward_weight(dw->qkv_w, d->qkv, k->h1, N, D, 3 * D, add, 0, run.count, next->qkv_w - dw->qkv_w);
    for (int j = 0, end; j < run.count; j = imax(end, j + 1)) {   // all in one launch, if they are all due
        for (end = j; end < run.count && g->bias_due[run.first + end]; end++) continue;
        if (end == j) continue;
        bias_backward(dw[j].fc1_b, &g->sums, d->fc1 + j * step_of((size_t)N * F), N, F, end - j,
                      (size_t)(next->fc1_b - dw->fc1_b));
    }
}

// zs = p4(silu(p2(silu(p0(x))))) of all aligned blocks' outputs x: what is compared with the frozen encoder's
// features
static void projector_forward(GpuModel *g, const Params *w, int B) {
    place(PROJECTOR);
    const Config *c = &g->base.c;
    Acts *a = &g->a;
    int D = c->hidden_size, M = c->projector_dim, Z = c->z_dim, N = align_rows(c, B);
    const floatX *x = a->E_low + (size_t)align_first(c, B) * D;
    int last = g->buckets.count - 1;
    buckets_await(g, last - !c->num_h, last);   // without a decoder p0_w begins in the bucket before
    linear_forward<floatX>(a->p0, x, low(g, w->p0_w), low(g, w->p0_b), N, D, M);
    silu_forward<floatX>(a->p0_silu, a->p0, (size_t)N * M);
    linear_forward<floatX>(a->p2, a->p0_silu, low(g, w->p2_w), low(g, w->p2_b), N, M, M);
    silu_forward<floatX>(a->p2_silu, a->p2, (size_t)N * M);
    linear_forward<floatX>(a->zs, a->p2_silu, low(g, w->p4_w), low(g, w->p4_b), N, M, Z);
}
// From the gradient of zs in a->wide2 those of the weights; a->wide2 leaves as that of p0's output, for
// align_backward
static void projector_backward(GpuModel *g, int B) {
    place(PROJECTOR);
    const Config *c = &g->base.c;
    Acts *a = &g->a;
    const Params *w = &g->w, *dw = &g->dw;
    int D = c->hidden_size, M = c->projector_dim, Z = c->z_dim, N = align_rows(c, B), add = !g->fresh;
    const floatX *x = a->E_low + (size_t)align_first(c, B) * D;
    linear_backward_weight(dw->p4_w, a->wide2, a->p2_silu, N, M, Z, add);
    bias_backward(dw->p4_b, &g->sums, a->wide2, N, Z);
    linear_backward_input<floatX>(a->wide, a->wide2, low(g, w->p4_w), N, M, Z, 0);
    activation_backward<SILU, floatX>(a->wide, dw->p2_b, &g->sums, a->wide, a->p2, N, M);
    linear_backward_weight(dw->p2_w, a->wide, a->p0_silu, N, M, M, add);
    linear_backward_input<floatX>(a->wide2, a->wide, low(g, w->p2_w), N, M, M, 0);
    activation_backward<SILU, floatX>(a->wide2, dw->p0_b, &g->sums, a->wide2, a->p0, N, M);
    linear_backward_weight(dw->p0_w, a->wide2, x, N, D, M, add);
}
// Both for block i's output x, where that is aligned: it is rounded for the projector, which runs when it has
// all of them
static void align_forward(GpuModel *g, const Params *w, int i, const Residual &x, int B) {
    const Config *c = &g->base.c;
    int k = align_of(c, i);
    if (k < 0) return;
    if (i != c->num_f - 1)   // E's is there
        norm_modulate_forward(NULL, g->a.E_low + (size_t)align_row(c, k, B) * c->hidden_size, NULL, x, NULL,
                              NULL, 0, -1, B, tokens_in(c, i), c->hidden_size);
    if (k == align_count(c) - 1) projector_forward(g, w, B);
}
// dx (+)= what alignment asks of block i's output
static void align_backward(GpuModel *g, float *dx, int i, int add, int B) {
    const Config *c = &g->base.c;
    int k = align_of(c, i), D = c->hidden_size, M = c->projector_dim;
    if (k < 0) return;
    place(PROJECTOR);
    size_t row = (size_t)(align_row(c, k, B) - align_first(c, B));
    linear_backward_input<float>(dx, g->a.wide2 + row * M, low(g, g->w.p0_w), B * tokens_in(c, i), D, M, add);
}

// Block i: dx [B,n,D] comes in as the gradient of its output and leaves as that of its input; that of fc2's
// output lies in block_grads. before: the block whose fc2 this one's input added: the gradient of that is
// made; -1: none, and a->dy leaves as dx rounded, patches first if dy_cls >= 0, with db (NULL: none) its sum.
static void block_backward(GpuModel *g, int i, float *dx, const floatX *v1, const int *ids, int B, int n,
                           int before, int dy_cls, float *db) {
    place(is_sparse(&g->base.c, i) ? SPARSE : DENSE);
    const Config *c = &g->base.c;
    Acts *a = &g->a;
    const BlockActs *k = &a->block[i];
    const BlockParams *w = &g->w.block[i];
    BlockParams *dw = &g->dw.block[i];
    BlockGrads d = block_grads(g, i, B);
    int D = c->hidden_size, F = hidden_of(c, i), N = B * n, Dh = D / c->num_heads;
    const float *mod = a->mod + (size_t)i * B * 6 * D;
    floatX *d_mod = a->d_mod + (size_t)i * B * 6 * D;
    // out = mid + gate2 fc2(gelu(fc1(h2)))
    g->bias_due[i] =
        linear_gelu_backward(d.fc1, dw->fc1_b, &g->sums, d.fc2, low(g, w->fc2_w), k->fc1, N, D, F);
    linear_backward_input<floatX>(a->dh, d.fc1, low(g, w->fc1_w), N, D, F, 0);
    NormBackward nb = norm_backward_of(g, dx, n);
    nb.dh = a->dh;
    nb.x = k->mid;
    nb.r = k->r2;
    nb.scale = mod + 4 * D;
    nb.stride = 6 * D;
    nb.y = k->proj;
    nb.dy = d.proj;
    nb.gate = mod + 2 * D;
    nb.dshift = d_mod + 3 * D;
    nb.dscale = d_mod + 4 * D;
    nb.dgate = d_mod + 2 * D;
    nb.bias = sum_parts(&g->sums, dw->proj_b, B, D);
    norm_modulate_backward(&nb, B);
    // mid = in + gate1 proj(attention(qkv(h1)))
    linear_backward_input<floatX>(a->dh, d.proj, low(g, w->proj_w), N, D, D, 0);
    Attention attention = attention_of(g, &g->w, w, k, v1, ids, n);
    int parts = attention_parts(&attention, B), width = 2 * Dh + 1;
    float *sums = sums_take(&g->sums, (size_t)parts * (size_t)width);
    AttentionGrads grads = {d.qkv,
                            a->d_v1,
                            v1_begins_at(c) == i,
                            i == 0 && c->value_residual,
                            sums,
                            sum_parts(&g->sums, dw->qkv_b, bias_parts(&attention, B), 3 * D)};
    attention_backward(&grads, a->mix, a->delta, a->dh, k->a, k->lse, &attention, B);
    if (c->qk_norm) {
        sum_later(&g->sums, dw->q_norm, sums, parts, Dh, width);
        sum_later(&g->sums, dw->k_norm, sums + Dh, parts, Dh, width);
    }
    if (v1) sum_later(&g->sums, dw->v1_lambda, sums + 2 * Dh, parts, 1, width);
    linear_backward_input<floatX>(a->dh, d.qkv, low(g, w->qkv_w), N, D, 3 * D, 0);
    if (i == run_of(c, i).first) run_weights_backward(g, i, B, n);   // before the next run's take their place
    nb = norm_backward_of(g, dx, n);
    nb.dh = a->dh;
    nb.x = k->x;
    nb.r = k->r1;
    nb.scale = mod + D;
    nb.stride = 6 * D;
    nb.dshift = d_mod;
    nb.dscale = d_mod + D;
    if (before >= 0) {
        align_backward(g, dx, before, 1, B);
        norm_backward_behind(&nb, g, before, B);
        return;
    }
    nb.dy_cls = dy_cls;
    if (db) nb.bias = sum_parts(&g->sums, db, B, D);
    norm_modulate_backward(&nb, B);
}

// c = mlp(e(t)) + label, and silu(c), which all adaLN layers read
static void condition_forward(GpuModel *g, const Params *w, int B) {
    place(CONDITION);
    Acts *a = &g->a;
    int D = g->base.c.hidden_size, W = TIME_FEATURES, count = B * D;
    time_features_kernel<<<(unsigned)B, W / 2, 0, stream>>>(a->t_features, g->in.t);
    LAUNCHED();
    linear_forward<float>(a->t0, a->t_features, low(g, w->t0_w), w->t0_b, B, W, D);
    silu_forward<float>(a->t0_silu, a->t0, (size_t)count);
    linear_forward<float>(a->cond, a->t0_silu, low(g, w->t2_w), w->t2_b, B, D, D);
    unsigned blocks = (unsigned)div_up(count, 256);
    label_kernel<<<blocks, 256, 0, stream>>>(a->cond, a->cond_silu, w->label, g->in.y, D, count);
    LAUNCHED();
}
// From a->d_cond_parts, what each adaLN layer asks of silu(c)
static void condition_backward(GpuModel *g, int B) {
    place(CONDITION);
    const Config *c = &g->base.c;
    Acts *a = &g->a;
    const Params *w = &g->w, *dw = &g->dw;
    int D = c->hidden_size, W = TIME_FEATURES, add = !g->fresh, parts = c->depth + 1, count = B * D;
    unsigned blocks = (unsigned)div_up(count, 256);
    condition_backward_kernel<<<blocks, 256, 0, stream>>>(a->d_cond, a->d_cond_parts, a->cond, parts, count);
    LAUNCHED();
    label_backward_kernel<<<(unsigned)B, 256, 0, stream>>>(dw->label, a->d_cond, g->in.y, B, D);
    LAUNCHED();
    linear_backward_weight(dw->t2_w, a->d_cond, a->t0_silu, B, D, D, add);
    sum_later(&g->sums, dw->t2_b, a->d_cond, B, D, D);
    linear_backward_input<floatX>(a->d_t0, a->d_cond, low(g, w->t2_w), B, D, D, 0);
    activation_backward<SILU, float>(a->d_t0, dw->t0_b, &g->sums, a->d_t0, a->t0, B, D);
    linear_backward_weight(dw->t0_w, a->d_t0, a->t_features, B, W, D, add);
}

// fusion_proj([E, G]) = E W1^T + (G W2^T + b), G being g_out's `rows` rows where g has a token and the mask
// token elsewhere: that is one more row of g_out, and each token reads the product of its own row or of that
// one. The norm that comes next does the reading and the sum.
static Residual fusion_forward(GpuModel *g, const Params *w, floatX *g_out, const int *ids, int whole, int n,
                               int B) {
    place(FUSION);
    Acts *a = &g->a;
    int T = tokens_of(&g->base.c), D = g->base.c.hidden_size, N = B * T, rows = whole * n,
        padded = padded_rows(rows);
    floatX *product = a->wide;
    rows_kernel<<<(unsigned)(B + padded - rows), 256, 0, stream>>>(a->rows, g_out, w->mask_token, ids, n, T,
                                                                   rows, whole, B, D);
    LAUNCHED();
    const floatX *w1 = low(g, w->fusion_w), *w2 = w1 + D;
    linear_forward<float>(a->fused, a->E_low, w1, NULL, N, D, D, 2 * D);
    linear_forward<floatX>(product, g_out, w2, low(g, w->fusion_b), padded, D, D, 2 * D);
    Residual x = residual_of(a->fused, NULL, 0, product);
    x.y_rows = a->rows;
    return x;
}
// From a->dy, the gradient of the fused tokens: a->d_E (added to, if E is aligned) and
// a->d_g, of g_out's rows. The bias's gradient is taken by the norm that read the sum.
static void fusion_backward(GpuModel *g, int rows, int N) {
    place(FUSION);
    const Config *c = &g->base.c;
    Acts *a = &g->a;
    const Params *dw = &g->dw;
    int D = c->hidden_size, add = !g->fresh, padded = padded_rows(rows);
    int chunks = div_up(N, GATHER_CHUNK);
    const floatX *w1 = low(g, g->w.fusion_w), *w2 = w1 + D;
    fusion_gather_kernel<<<(unsigned)chunks, 256, 0, stream>>>(a->dG, a->parts, a->dy, a->rows, rows, N, D);
    LAUNCHED();
    mask_rows_backward_kernel<<<(unsigned)div_up(D, 8), 256, 0, stream>>>(a->dG + (size_t)rows * D, a->parts,
                                                                          chunks, padded - rows, D);
    LAUNCHED();
    linear_backward_weight(dw->fusion_w, a->dy, a->E_low, N, D, D, add, 2 * D);
    linear_backward_weight(dw->fusion_w + D, a->dG, a->g_out, padded, D, D, add, 2 * D);
    linear_backward_input<float>(a->d_E, a->dy, w1, N, D, D, align_of(c, c->num_f - 1) >= 0, 2 * D);
    linear_backward_input<float>(a->d_g, a->dG, w2, padded, D, D, 0, 2 * D);
    sum_later(&g->sums, dw->mask_token, a->d_g + (size_t)rows * D, 2, D,
              D);   // (nobody writes them any more)
}

// Of several ranks: before block i, if it is the first of a run, the run's weights are waited for, and its
// adaLN layers are done.
static void run_begins(GpuModel *g, const Params *w, int i, int B) {
    BlockRun run = run_of(&g->base.c, i);
    if (ranks.size == 1 || i != run.first) return;
    int k = bucket_of(&g->base.c, i);
    buckets_await(g, k, k);
    adaln_forward(g, w, B, i, i + run.count);
}
// Behind block i's backward, if it is the first of a run: its adaLN layers', and all gradients of the run are
// complete.
static void run_ends(GpuModel *g, int i, int B) {
    BlockRun run = run_of(&g->base.c, i);
    if (ranks.size == 1 || i != run.first) return;
    adaln_backward(g, B, i, i + run.count);
    bucket_reduce(g, bucket_of(&g->base.c, i));
}

// Velocity of the input at its times and labels into a->out_patches, a->cls_out. training: x_t is made from x
// and noise, g runs on the kept tokens, the projector runs too; else x is x_t, g runs on all tokens, in one
// block's memory. g runs on the first `whole` samples; every one of its tokens of the others is the mask
// token (path drop), though in training those of its blocks that alignment asks for run on all.
static void network_forward(GpuModel *g, const Params *w, int training, int whole, int B) {
    const Config *c = &g->base.c;
    Acts *a = &g->a;
    const Input *in = &g->in;
    int T = tokens_of(c), P = patches_of(c), D = c->hidden_size, Z = c->z_dim, X = patch_dim_of(c), N = B * T;
    int n = training ? kept_of(c) : T, first_h = c->depth - c->num_h;
    const int *ids = training ? in->ids : NULL;
    size_t latent = (size_t)B * (size_t)latent_of(c);
    buckets_await(g, 0, whole ? 0 : g->buckets.count - 1);
    // tokens: patches, CLS before them, positions
    patchify_kernel<<<(unsigned)((latent + 255) / 256), 256, 0, stream>>>(
        a->patches, in->x, training ? in->noise : NULL, in->t, c->in_channels, c->input_size, c->patch_size,
        latent);
    LAUNCHED();
    linear_forward<floatX>(a->patch_tokens, a->patches, low(g, w->x_w), low(g, w->x_b), B * P, X, D);
    if (c->cls) {
        cls_input_kernel<<<(unsigned)div_up(B * Z, 256), 256, 0, stream>>>(
            a->cls_t, in->cls, training ? in->noise_cls : NULL, in->t, Z, B * Z);
        LAUNCHED();
        linear_forward<float>(a->cls_proj, a->cls_t, low(g, w->cls_w), w->cls_b, B, Z, D);
    }
    embed_kernel<<<(unsigned)div_up(N, 8), 256, 0, stream>>>(
        a->block[0].x, a->cls_r, a->patch_tokens, a->cls_proj, w->cls_norm, w->pos_embed, c->cls, N, T, D);
    LAUNCHED();
    condition_forward(g, w, B);
    if (ranks.size == 1) adaln_forward(g, w, B, 0, c->depth);
    // encoder f on all tokens
    const floatX *v1 = c->value_residual ? a->block[0].qkv : NULL;
    Residual x = residual_of(a->block[0].x, NULL, 0, NULL);
    for (int i = 0; i < c->num_f; i++) {
        run_begins(g, w, i, B);
        x = block_forward(g, i, &a->block[i], x, i ? v1 : NULL, NULL, w, B, B, T);
        if (i == c->num_f - 1) norm_modulate_forward(a->E, a->E_low, NULL, x, NULL, NULL, 0, -1, B, T, D);
        if (training) align_forward(g, w, i, x, B);
    }
    buckets_await(g, g->buckets.count - 1, g->buckets.count - 1);   // the fusion's
    // sparse middle g on the kept tokens; its first norm gathers them
    floatX *g_out = training ? a->g_out : a->wide2;
    x = residual_of(a->E, NULL, 0, NULL);
    x.x_ids = ids;
    x.x_tokens = T;
    for (int i = c->num_f; i < end_of_g(c, training, !whole); i++) {
        run_begins(g, w, i, B);
        BlockActs *k = training ? &a->block[i] : &a->block[c->num_h ? c->depth - 1 : c->depth];
        x = block_forward(g, i, k, x, v1, ids, w, B, whole ? whole : B, n);
        if (training) align_forward(g, w, i, x, B);
    }
    if (whole) norm_modulate_forward(NULL, g_out, NULL, x, NULL, NULL, 0, -1, whole, n, D);
    x = fusion_forward(g, w, g_out, ids, whole, n, B);
    // decoder h on all tokens
    for (int i = first_h; i < c->depth; i++) {
        run_begins(g, w, i, B);
        x = block_forward(g, i, &a->block[i], x, v1, NULL, w, B, B, T);
        if (training) align_forward(g, w, i, x, B);
    }
    // final layer: out = linear(final_h[patches]), cls_out = linear_cls(final_h[CLS]); patches lie first
    place(INPUT);
    linear_forward<float>(a->final_mod, a->cond_silu, low(g, w->final_adaln_w), w->final_adaln_b, B, D,
                          2 * D);
    norm_modulate_forward(c->num_h ? a->last : a->fused, a->final_h, a->final_r, x, a->final_mod,
                          a->final_mod + D, 2 * D, c->cls, B, T, D);
    linear_forward<float>(a->out_patches, a->final_h, low(g, w->final_w), w->final_b, B * P, D, X);
    if (c->cls)
        linear_forward<float>(a->cls_out, a->final_h + (size_t)B * P * D, low(g, w->final_cls_w),
                              w->final_cls_b, B, D, Z);
}

// Zeros where a step's backward writes nothing or only adds: labels' gradients, values' where no block writes
// them first, and, where the sparse path was dropped, those of g's blocks that did not run
static void clear_gradients(GpuModel *g, int path_drop, int B) {
    const Config *c = &g->base.c;
    const Table *table = &g->base.table;
    size_t D = (size_t)c->hidden_size, N = (size_t)B * (size_t)tokens_of(c), mod = (size_t)B * 6 * D;
    int end = end_of_g(c, 1, path_drop), left_out = c->depth - c->num_h - end;
    if (c->value_residual && v1_begins_at(c) < 0)
        CHECK(cudaMemsetAsync(g->a.d_v1, 0, N * D * sizeof(float), stream));
    if (g->fresh)
        CHECK(cudaMemsetAsync(g->dw.label, 0, (size_t)(c->num_classes + 1) * D * sizeof(float), stream));
    if (!left_out) return;
    CHECK(cudaMemsetAsync(g->a.d_mod + end * mod, 0, left_out * mod * sizeof(floatX), stream));
    for (int i = 0, next; i < table->count && g->fresh; i = next) {   // neighbours in the table at once
        next = i;
        while (next < table->count && table->tensors[next].block >= end &&
               is_sparse(c, table->tensors[next].block))
            next++;
        if (next == i) {
            next++;
            continue;
        }
        size_t begin = table->tensors[i].offset;
        size_t end = table->tensors[next - 1].offset + table->tensors[next - 1].size;
        CHECK(cudaMemsetAsync(g->grads + begin, 0, (end - begin) * sizeof(float), stream));
    }
}

// Gradients of all parameters from those of the outputs (a->d_out, a->d_cls_out, and in a->wide2 that
// of zs), after a training network_forward. E has three readers: the projector, the fusion and the
// sparse path; they meet in a->d_E.
static void network_backward(GpuModel *g, int path_drop, int B) {
    const Config *c = &g->base.c;
    Acts *a = &g->a;
    const Params *w = &g->w, *dw = &g->dw;
    const Input *in = &g->in;
    int T = tokens_of(c), P = patches_of(c), D = c->hidden_size, Z = c->z_dim, X = patch_dim_of(c), N = B * T;
    int n = kept_of(c), first_h = c->depth - c->num_h, last = c->depth - 1, add = !g->fresh;
    int rows = path_drop ? 0 : B * n;
    const floatX *v1 = c->value_residual ? a->block[0].qkv : NULL;
    size_t patches = (size_t)B * P * D;   // CLS's rows lie behind those
    clear_gradients(g, path_drop, B);
    sums_begin(&g->sums, add);
    if (c->align) projector_backward(g, B);
    align_backward(g, a->d_E, c->num_f - 1, 0, B);
    // final layer: out = linear(final_h[patches]), cls_out = linear_cls(final_h[CLS])
    place(INPUT);
    linear_backward_weight(dw->final_w, a->d_out, a->final_h, B * P, D, X, add);
    bias_backward(dw->final_b, &g->sums, a->d_out, B * P, X);
    linear_backward_input<floatX>(a->dh, a->d_out, low(g, w->final_w), B * P, D, X, 0);
    if (c->cls) {
        linear_backward_weight(dw->final_cls_w, a->d_cls_out, a->final_h + patches, B, D, Z, add);
        sum_later(&g->sums, dw->final_cls_b, a->d_cls_out, B, Z, Z);
        linear_backward_input<floatX>(a->dh + patches, a->d_cls_out, low(g, w->final_cls_w), B, D, Z, 0);
    }
    int aligned = c->num_h && align_of(c, last) >= 0;   // what the final layer reads
    if (aligned) align_backward(g, a->dx, last, 0, B);
    NormBackward nb = norm_backward_of(g, a->dx, T);
    nb.fresh = !aligned;
    nb.dh = a->dh;
    nb.dh_cls = c->cls;
    nb.x = c->num_h ? a->last : a->fused;
    nb.r = a->final_r;
    nb.scale = a->final_mod + D;
    nb.stride = 2 * D;
    nb.dshift = a->d_final_mod;
    nb.dscale = a->d_final_mod + D;
    if (c->num_h) norm_backward_behind(&nb, g, last, B);
    else {
        nb.bias = sum_parts(&g->sums, dw->fusion_b, B, D);
        norm_modulate_backward(&nb, B);
    }
    linear_backward_weight(dw->final_adaln_w, a->d_final_mod, a->cond_silu, B, D, 2 * D, add);
    sum_later(&g->sums, dw->final_adaln_b, a->d_final_mod, B, 2 * D, 2 * D);
    linear_backward_input<float>(a->d_cond_parts + (size_t)c->depth * B * D, a->d_final_mod,
                                 low(g, w->final_adaln_w), B, D, 2 * D, 0);
    // decoder h
    for (int i = last; i >= first_h; i--)
        block_backward(g, i, a->dx, v1, NULL, B, T, i > first_h ? i - 1 : -1, -1, dw->fusion_b),
            run_ends(g, i, B);
    fusion_backward(g, rows, N);
    bucket_reduce(g, g->buckets.count - 1);
    // sparse middle g, on a path-drop step with no gradient but alignment's, for which a->dx is free now
    // (d_g has the mask token's) and a->rows must tell where the kept tokens lie
    int end = end_of_g(c, 1, path_drop);
    float *d_g = path_drop ? a->dx : a->d_g;
    for (int i = first_h - 1; i >= end; i--) run_ends(g, i, B);
    if (end > c->num_f) {
        align_backward(g, d_g, end - 1, !path_drop, B);
        nb = norm_backward_of(g, d_g, n);
        norm_backward_behind(&nb, g, end - 1, B);
        for (int i = end - 1; i >= c->num_f; i--)
            block_backward(g, i, d_g, v1, in->ids, B, n, i > c->num_f ? i - 1 : -1, -1, NULL),
                run_ends(g, i, B);
        if (path_drop) {
            rows = B * n;
            rows_kernel<<<(unsigned)B, 256, 0, stream>>>(a->rows, NULL, NULL, in->ids, n, T, rows, B, B, D);
            LAUNCHED();
        }
    }
    // encoder f; the gradient of the gathered tokens comes back here
    nb = norm_backward_of(g, a->d_E, T);
    nb.dx2 = d_g;
    nb.dx2_rows = a->rows;
    nb.dx2_count = rows;
    norm_backward_behind(&nb, g, c->num_f - 1, B);
    for (int i = c->num_f - 1; i >= 0; i--)
        block_backward(g, i, a->d_E, i ? v1 : NULL, NULL, B, T, i - 1, i ? -1 : c->cls, dw->x_b),
            run_ends(g, i, B);
    // tokens: a->dy has the patches' gradients, then those of CLS
    place(INPUT);
    linear_backward_weight(dw->x_w, a->dy, a->patches, B * P, X, D, add);
    if (c->cls) {
        rmsnorm_backward_kernel<<<(unsigned)div_up(B, 8), 256, 0, stream>>>(
            a->dh, sum_parts(&g->sums, dw->cls_norm, B, D), a->dy + patches, a->cls_proj, a->cls_r,
            w->cls_norm, B, D);
        LAUNCHED();
        linear_backward_weight(dw->cls_w, a->dh, a->cls_t, B, Z, D, add);
        sum_later(&g->sums, dw->cls_b, a->dh, B, D, D);   // (nobody writes that any more)
    }
    if (ranks.size == 1) adaln_backward(g, B, 0, c->depth);
    condition_backward(g, B);
    sums_end(&g->sums);
    bucket_reduce(g, 0);
}

// ----------------------------------------------------------------------------------------------------------
// The loss (derivation at loss_and_gradients in train_srdit.c). Each kernel leaves one partial
// sum a block, which loss_sums_kernel adds up in order; the gradients leave in floatX, as the
// products that follow read them.

// Velocity and contrastive loss over out [B,P,X]: reads 4 x 4, writes 2 bytes an element;
// 2 M elements in B/1.
__global__ void __launch_bounds__(256)
    velocity_loss_kernel(floatX *d_out, float *parts, float *cfm_parts, const float *out, const float *x,
                         const float *noise, const float *v_before, int C, int S, int p, float cfm,
                         double inverse, size_t count) {
    __shared__ float sums[8];
    __shared__ float cfm_sums[8];
    size_t latent = (size_t)C * S * S;
    int X = C * p * p;
    float sum = 0, cfm_sum = 0;
    for (size_t e = (size_t)blockIdx.x * 256 + threadIdx.x; e < count; e += (size_t)gridDim.x * 256) {
        size_t at = unpatchify_place(e / X, (int)(e % X), C, S, p);
        float d = out[e] - (noise[at] - x[at]);
        float before = out[e] - (at >= latent ? noise[at - latent] - x[at - latent] : v_before[at]);
        sum += d * d;
        cfm_sum -= before * before;
        store(&d_out[e], (float)((2 * d - cfm * 2 * before) * inverse));
    }
    sum = sum_block(sum, sums);
    cfm_sum = sum_block(cfm_sum, cfm_sums);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum, cfm_parts[blockIdx.x] = cfm_sum;
}
// Velocity loss of CLS over [B,Z]
__global__ void __launch_bounds__(256)
    cls_loss_kernel(floatX *d_out, float *parts, const float *out, const float *cls, const float *noise,
                    double scale, int count) {
    __shared__ float sums[8];
    float sum = 0;
    for (int e = blockIdx.x * 256 + threadIdx.x; e < count; e += (int)gridDim.x * 256) {
        float d = out[e] - (noise[e] - cls[e]);
        sum += d * d;
        store(&d_out[e], (float)(scale * 2 * d));
    }
    sum = sum_block(sum, sums);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}
// V numbers at once: four where rows are so aligned, else one
template <int V, class S> __device__ __forceinline__ void load_some(float (&x)[V], const S *p) {
    if constexpr (V == 4) {
        Vec4 v = load4(p);
        for (int j = 0; j < 4; j++) x[j] = v.x[j];
    } else x[0] = to_float(*p);
}
// One depth's alignment: its zs [rows,Z], and where their gradient and the partial sums go; its tokens are
// those of ids [B,n] (NULL: all T). weight: what a term counts, 1 where all tokens of one depth alone are
// aligned; scale: the gradient's
typedef struct {
    floatX *dz;
    float *parts;
    const floatX *zs;
    const int *ids;
    double scale;
    float weight;
    int rows, n, T, Z;
} AlignLoss;
// Cosine loss of zs against feats [B,T,Z], as they are stored, and its gradient, a warp a row, V numbers at
// once; the second reading comes from the cache. Reads 2 + 1 (feats in 8 bits), writes 2 bytes an element;
// bound by memory: 0.25 GB in B/1.
template <class S, int V>
__global__ void __launch_bounds__(256) align_loss_kernel(const AlignLoss a, const S *feats) {
    __shared__ float cosines[8];
    int n = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    float cosine = 0, f[V], z[V];
    if (n < a.rows) {
        size_t row = (size_t)n * a.Z;
        feats += a.ids ? ((size_t)(n / a.n) * a.T + a.ids[n]) * a.Z : row;
        float ff = 0, zz = 0, fz = 0;
        for (int i = lane * V; i < a.Z; i += 32 * V) {
            load_some<V>(f, feats + i);
            load_some<V>(z, a.zs + row + i);
            for (int j = 0; j < V; j++) {
                ff += f[j] * f[j];
                zz += z[j] * z[j];
                fz += f[j] * z[j];
            }
        }
        ff = fmaxf(sqrtf(sum_lanes<32>(ff)), 1e-12f);
        zz = fmaxf(sqrtf(sum_lanes<32>(zz)), 1e-12f);
        cosine = sum_lanes<32>(fz) / (ff * zz);
        float k = (float)(a.scale / zz);
        for (int i = lane * V; i < a.Z; i += 32 * V) {
            load_some<V>(f, feats + i);
            load_some<V>(z, a.zs + row + i);
            for (int j = 0; j < V; j++) f[j] = k * (f[j] / ff - cosine * z[j] / zz);
            if constexpr (V == 4) store4(a.dz + row + i, {{f[0], f[1], f[2], f[3]}});
            else store(a.dz + row + i, f[0]);
        }
    }
    if (lane == 0) cosines[threadIdx.x / 32] = cosine;
    __syncthreads();
    float sum = 0;
    for (int i = 0; i < 8 && threadIdx.x == 0; i++) sum -= cosines[i];
    if (threadIdx.x == 0) a.parts[blockIdx.x] = sum * a.weight;
}
template <class S> static void align_loss(const AlignLoss &a, const void *feats) {
    unsigned blocks = (unsigned)div_up(a.rows, 8);
    const S *stored = (const S *)feats;
    if (a.Z % 4 == 0) align_loss_kernel<S, 4><<<blocks, 256, 0, stream>>>(a, stored);
    else align_loss_kernel<S, 1><<<blocks, 256, 0, stream>>>(a, stored);
    LAUNCHED();
}
// Each part of the loss += scale * sum of parts[count], in double and in a fixed order; a block a part
typedef struct {
    double *total, scale;
    const float *parts;
    int count;
} LossSum;
typedef struct {
    LossSum of[4];
} LossSums;
__global__ void __launch_bounds__(256) loss_sums_kernel(const LossSums all) {
    __shared__ double sums[256];
    const LossSum &one = all.of[blockIdx.x];
    double sum = 0;
    for (int i = threadIdx.x; i < one.count; i += 256) sum += one.parts[i];
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x) return;
    for (int i = 1; i < 256; i++) sum += sums[i];
    *one.total += one.scale * sum;
}

static void loss_and_gradients(GpuModel *g, const Batch *batch) {
    const Config *c = &g->base.c;
    Acts *a = &g->a;
    const Input *in = &g->in;
    int B = batch->B, T = tokens_of(c), Z = c->z_dim;
    size_t latent = (size_t)latent_of(c), count = B * latent, room = loss_parts_of(c, g->base.max_batch);
    double whole = batch->whole, of_latent = 1 / (whole * (double)latent), of_cls = 1 / (whole * Z),
           of_align = 1 / (whole * T);
    float *parts = g->loss_parts;
    int blocks = imin(LOSS_BLOCKS, (int)((count + 255) / 256));
    velocity_loss_kernel<<<(unsigned)blocks, 256, 0, stream>>>(
        a->d_out, parts, parts + room, a->out_patches, in->x, in->noise, in->v_before, c->in_channels,
        c->input_size, c->patch_size, c->cfm ? (float)c->cfm_coeff : 0, of_latent, count);
    LAUNCHED();
    LossSums all = {{{&g->losses->denoise, of_latent, parts, blocks},
                     {&g->losses->cfm, of_latent, parts + room, blocks}}};
    unsigned sums = 2;
    if (c->cls) {
        blocks = imin(LOSS_BLOCKS, div_up(B * Z, 256));
        cls_loss_kernel<<<(unsigned)blocks, 256, 0, stream>>>(
            a->d_cls_out, parts + 2 * room, a->cls_out, in->cls, in->noise_cls, c->cls_coeff * of_cls, B * Z);
        LAUNCHED();
        all.of[sums++] = {&g->losses->cls, of_cls, parts + 2 * room, blocks};
    }
    float *cosines = parts + 3 * room;
    for (int k = 0, done = 0; align_depth(c, k); k++, done += blocks) {   // in zs's place a->wide2 gets dz
        place(PROJECTOR);
        int i = align_depth(c, k) - 1, n = tokens_in(c, i), depths = align_count(c);
        size_t at = (size_t)(align_row(c, k, B) - align_first(c, B)) * Z;
        double weight = (double)T / (n * depths);
        blocks = div_up(B * n, 8);
        AlignLoss one = {a->wide2 + at,
                         cosines + done,
                         a->zs + at,
                         is_sparse(c, i) ? in->ids : NULL,
                         -c->align_coeff * of_align * weight,
                         (float)weight,
                         B * n,
                         n,
                         T,
                         Z};
        switch (batch->feats_type) {
            case I8: align_loss<int8_t>(one, in->feats); break;
            case F16: align_loss<Half>(one, in->feats); break;
            case BF16: align_loss<bf16>(one, in->feats); break;
            default: align_loss<float>(one, in->feats);
        }
        if (k == depths - 1) all.of[sums++] = {&g->losses->align, of_align, cosines, done + blocks};
    }
    loss_sums_kernel<<<sums, 256, 0, stream>>>(all);
    LAUNCHED();
}

// A step is some 260 launches, of which the host needs 2 to 3 us each (arithmetic: 0.6 ms) and the device a
// gap between any two. Recorded as a CUDA graph they are one launch. The first time work of a kind is done as
// it is, so that plans of matrix products are made and kernels loaded; the second time it is recorded, from
// then on replayed. All that differs from step to step is read from device memory: Draw, StepConstants.
template <class Work> static void run_recorded(GpuModel *g, const StepKind &kind, Work work) {
    if (!use_graph || tuning || profile.on || ranks.size > 1) {   // (of ranks: waits and sends come between)
        work();
        return;
    }
    Recording *r = NULL;
    for (int i = 0; i < imin(g->recorded, MAX_RECORDINGS) && !r; i++)
        if (!memcmp(&g->recordings[i].kind, &kind, sizeof(kind))) r = &g->recordings[i];
    if (!r) {
        r = &g->recordings[g->recorded++ % MAX_RECORDINGS];
        if (r->graph) CHECK(cudaGraphExecDestroy(r->graph));
        r->kind = kind;
        r->graph = NULL;
        work();
        return;
    }
    if (!r->graph) {
        cudaGraph_t graph;
        CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
        work();
        CHECK(cudaStreamEndCapture(stream, &graph));
        CHECK(cudaGraphInstantiateWithFlags(&r->graph, graph, 0));
        CHECK(cudaGraphDestroy(graph));
    }
    CHECK(cudaGraphLaunch(r->graph, stream));
}

static void zero_gradients(Model *m) { gpu_of(m)->fresh = 1; }   // the next gradients overwrite
static void zero_now(GpuModel *g) {                              // where nothing came after zero_gradients
    if (g->fresh) CHECK(cudaMemsetAsync(g->grads, 0, g->base.table.total * sizeof(float), stream));
    g->fresh = 0;
}

static void forward_backward(Model *model, const Batch *batch) {
    GpuModel *g = gpu_of(model);
    if (batch->B > model->max_batch) die("a batch of %d in a model made for %d", batch->B, model->max_batch);
    use_weights(g, PARAMS);
    Batch here = batch->slot ? *batch : batch_into(&g->queue, g->queue.turn, batch, &model->c);
    StepKind kind;
    memset(&kind, 0, sizeof(kind));
    kind.slot = here.slot, kind.B = here.B, kind.whole = here.whole;
    kind.path_drop = here.path_drop, kind.fresh = g->fresh, kind.on_device = here.on_device;
    kind.x_type = here.x_type, kind.feats_type = here.feats_type;
    kind.scale = here.scale, kind.offset = here.offset;
    g->in = batch_upload(&g->queue, &here, &model->c);
    g->buckets.reducing = batch->last && ranks.size > 1;
    place(INPUT);
    profile.recording = profile.on;
    profile_mark(-1, -1);
    profile.samples += here.B;
    run_recorded(g, kind, [=, &here] {
        latents_convert(&g->in, &here, (size_t)latent_of(&model->c));
        if (here.on_device) draw_on_device(&g->in, &model->c, here.B);
        network_forward(g, &g->w, 1, here.path_drop ? 0 : here.B, here.B);
        profile.backward = 1;
        loss_and_gradients(g, &here);
        network_backward(g, here.path_drop, here.B);
        profile.backward = 0;
    });
    batch_done(&g->queue);
    g->fresh = 0;
}

// Velocities v [B,C,S,S], v_cls [B,Z] at x, cls, t, y on all tokens: what the sampler asks
// for, max_batch at a time
static void velocity(Model *model, real *v, real *v_cls, const real *x, const real *cls, const real *t,
                     const int *y, int use_ema, int path_drop, int B) {
    GpuModel *g = gpu_of(model);
    const Config *c = &model->c;
    size_t latent = (size_t)latent_of(c), Z = (size_t)c->z_dim;
    use_weights(g, use_ema ? EMA : PARAMS);
    for (int b = 0; b < B; b += model->max_batch) {
        size_t n = (size_t)imin(model->max_batch, B - b), at = (size_t)b;
        CHECK(cudaMemcpyAsync(g->in.x, x + at * latent, n * latent * sizeof(float), cudaMemcpyHostToDevice,
                              stream));
        CHECK(cudaMemcpyAsync(g->in.t, t + at, n * sizeof(float), cudaMemcpyHostToDevice, stream));
        CHECK(cudaMemcpyAsync(g->in.y, y + at, n * sizeof(int), cudaMemcpyHostToDevice, stream));
        if (c->cls)
            CHECK(cudaMemcpyAsync(g->in.cls, cls + at * Z, n * Z * sizeof(float), cudaMemcpyHostToDevice,
                                  stream));
        network_forward(g, use_ema ? &g->w_ema : &g->w, 0, path_drop ? 0 : (int)n, (int)n);
        unpatchify_kernel<<<(unsigned)((n * latent + 255) / 256), 256, 0, stream>>>(
            g->in.noise, g->a.out_patches, c->in_channels, c->input_size, c->patch_size, n * latent);
        LAUNCHED();
        CHECK(cudaMemcpyAsync(v + at * latent, g->in.noise, n * latent * sizeof(float),
                              cudaMemcpyDeviceToHost, stream));
        if (c->cls)
            CHECK(cudaMemcpyAsync(v_cls + at * Z, g->a.cls_out, n * Z * sizeof(float), cudaMemcpyDeviceToHost,
                                  stream));
        CHECK(cudaStreamSynchronize(stream));
    }
}

// ----------------------------------------------------------------------------------------------------------
// Optimizer: clipping to a global norm; AdamW, the moving average and the rounded weights in one pass; Muon

// What this thread of a grid adds to the sum of g^2
__device__ __forceinline__ float squares_of(const float *grads, size_t n) {
    float sum = 0;
    for (size_t i = ((size_t)blockIdx.x * 256 + threadIdx.x) * 4; i < n; i += (size_t)gridDim.x * 1024) {
        Vec4 v = load4(grads + i);
        for (int j = 0; j < 4; j++) sum += v.x[j] * v.x[j];
    }
    return sum;
}
// parts[block] = sum of g^2. 4 bytes an element, bound by memory: 0.56 GB, 0.2 ms in B/1.
__global__ void __launch_bounds__(256) grad_norm_kernel(float *parts, const float *grads, size_t n) {
    __shared__ float sums[8];
    float sum = sum_block(squares_of(grads, n), sums);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}
// The same of one rank's pieces
__global__ void __launch_bounds__(256)
    pieces_norm_kernel(float *parts, const float *grads, const Piece *pieces, int count, int rank) {
    __shared__ float sums[8];
    float sum = 0;
    for (int i = 0; i < count; i++)
        if (pieces[i].owner == rank)
            sum += squares_of(grads + pieces[i].begin, pieces[i].end - pieces[i].begin);
    sum = sum_block(sum, sums);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}
// The sum of parts in a fixed order, in thread 0 of 256
__device__ __forceinline__ double sum_parts_of(const float *parts, int count, double *sums) {
    double sum = 0;
    for (int i = threadIdx.x; i < count; i += 256) sum += parts[i];
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (int i = 1; i < 256 && threadIdx.x == 0; i++) sum += sums[i];
    return sum;
}
// The norm of the gradient, and whether this step is the first whose norm or losses are not finite. The host
// reads the losses only now and then: what goes wrong in between is kept here, and no later update covers it
// up. One block.
__global__ void __launch_bounds__(256)
    root_kernel(DeviceLosses *losses, const float *parts, int count, const StepConstants *constants) {
    __shared__ double sums[256];
    double sum = sum_parts_of(parts, count, sums);
    if (threadIdx.x) return;
    losses->grad_norm = sqrt(sum);
    enum LossPart bad = bad_part_of(losses->denoise, losses->cls, losses->align, losses->cfm, sum);
    if (bad == NO_PART || losses->bad_step) return;
    losses->bad_step = constants->step;
    losses->bad_part = bad;
}

// The same of several ranks, before and behind the sum of `shared` [5] over them: the squared norm of a
// rank's pieces, and its losses
__global__ void __launch_bounds__(256)
    share_kernel(double *shared, const DeviceLosses *losses, const float *parts, int count) {
    __shared__ double sums[256];
    double sum = sum_parts_of(parts, count, sums);
    if (threadIdx.x) return;
    shared[0] = sum;
    shared[1] = losses->denoise, shared[2] = losses->cls;
    shared[3] = losses->align, shared[4] = losses->cfm;
}
__global__ void shared_root_kernel(DeviceLosses *losses, const double *shared,
                                   const StepConstants *constants) {
    losses->grad_norm = sqrt(shared[0]);
    enum LossPart bad = bad_part_of(shared[1], shared[2], shared[3], shared[4], shared[0]);
    if (bad == NO_PART || losses->bad_step) return;
    losses->bad_step = constants->step;
    losses->bad_part = bad;
}
static void ranks_norm(GpuModel *g) {
    Buckets *b = &g->buckets;
    stream_after(b->there[0]);   // all sums of gradients
    pieces_norm_kernel<<<NORM_BLOCKS, 256, 0, stream>>>(g->norm_parts, g->grads, g->pieces, b->piece_count,
                                                        ranks.rank);
    LAUNCHED();
    share_kernel<<<1, 256, 0, stream>>>(g->shared, g->losses, g->norm_parts, NORM_BLOCKS);
    LAUNCHED();
    ranks_after(b->ready[0]);
    ranks_sum(g->shared, 5);
    stream_after(b->there[0]);
    shared_root_kernel<<<1, 1, 0, stream>>>(g->losses, g->shared, g->constants);
    LAUNCHED();
}

static StepConstants step_constants(const Config *c, int step) {
    AdamW d = adamw_of(c, step);
    StepConstants o;
    memset(&o, 0, sizeof(o));
    o.step = step;
    o.b1 = (float)d.b1;
    o.b2 = (float)d.b2;
    o.one1 = (float)(1 - d.b1);
    o.one2 = (float)(1 - d.b2);
    o.eps = (float)d.eps;
    o.rate = (float)d.rate;
    o.root = (float)d.root;
    o.decay = (float)d.decay;
    o.ema = (float)d.ema;
    o.one_ema = (float)(1 - d.ema);
    o.max_norm = d.max_norm;
    return o;
}

// The end of a step: its times are read. The first two steps, which load kernels, do not count.
static void profile_step(void) {
    if (!profile.on) return;
    CHECK(cudaStreamSynchronize(stream));
    for (int i = 1; i < profile.marks; i++) {
        if (profile.of_place[i] < 0) continue;
        Spent *s = &profile.spent[profile.of_place[i]][profile.of_work[i]];
        float ms;
        CHECK(cudaEventElapsedTime(&ms, profile.event[i - 1], profile.event[i]));
        s->ms += ms;
        s->launches++;
    }
    profile.marks = profile.recording = 0;
    if (++profile.steps == 2) memset(profile.spent, 0, sizeof(profile.spent));
}

// To device memory by way of a kernel's arguments, which are copied as it is launched: no buffer to guard
__global__ void constants_kernel(StepConstants *to, const StepConstants from) { *to = from; }

// Reads 20, writes 16 + 2 bytes a parameter: 5.3 GB, 1.8 ms in B/1; bound by memory. From the first step that
// is not finite on nothing is changed. n is a multiple of 64.
__global__ void __launch_bounds__(256)
    adamw_kernel(float *params, float *m, float *v, float *ema, floatX *weights, const float *grads,
                 const DeviceLosses *losses, const StepConstants *constants, size_t n) {
    const StepConstants o = *constants;
    size_t i = ((size_t)blockIdx.x * 256 + threadIdx.x) * 4;
    if (i >= n || losses->bad_step) return;
    double clip = o.max_norm / (losses->grad_norm + 1e-6);
    float scale = (float)(clip < 1 ? clip : 1);
    Vec4 g = load4(grads + i), p = load4(params + i), a = load4(m + i), b = load4(v + i), e = load4(ema + i);
    for (int j = 0; j < 4; j++) {
        float x = g.x[j] * scale;
        a.x[j] = o.b1 * a.x[j] + o.one1 * x;
        b.x[j] = o.b2 * b.x[j] + o.one2 * x * x;
        p.x[j] = p.x[j] * o.decay - o.rate * a.x[j] / (sqrtf(b.x[j]) * o.root + o.eps);
        e.x[j] = o.ema * e.x[j] + o.one_ema * p.x[j];
    }
    store4(params + i, p);
    store4(m + i, a);
    store4(v + i, b);
    store4(ema + i, e);
    if (weights) store4(weights + i, p);
}

// What Muon's kernels share: places on the device, constants of the run
typedef struct {
    float *params, *m, *ema, *parts;
    floatX *weights, *X;
    const float *grads;
    const MuonMatrix *matrix;   // of the group; blockIdx.y counts them
    const DeviceLosses *losses;
    const StepConstants *constants;
    float mu, one_mu, rate, decay;
    int lying;   // m n
} MuonStep;
__device__ static float clip_of(const MuonStep &k) {
    double clip = k.constants->max_norm / (k.losses->grad_norm + 1e-6);
    return (float)(clip < 1 ? clip : 1);
}
// Nesterov's momentum of a matrix' element i, from the buffer as it is after the step's gradient
__device__ static float momentum_of(const MuonStep &k, const MuonMatrix &w, int i, float clip) {
    return k.mu * k.m[w.own + i] + k.one_mu * (k.grads[w.at + i] * clip);
}
// The buffer, and parts[blockIdx.y][MUON_BLOCKS] of |G|^2. Reads 8, writes 4 bytes an element; bound by
// memory, as are the next two.
__global__ void __launch_bounds__(256) muon_momentum_kernel(const MuonStep k) {
    __shared__ float sums[8];
    const MuonMatrix w = k.matrix[blockIdx.y];
    float clip = clip_of(k), sum = 0;
    for (int i = blockIdx.x * 256 + threadIdx.x; i < k.lying && !k.losses->bad_step; i += MUON_BLOCKS * 256) {
        k.m[w.own + i] = k.mu * k.m[w.own + i] + k.one_mu * (k.grads[w.at + i] * clip);
        float g = momentum_of(k, w, i, clip);
        sum += g * g;
    }
    sum = sum_block(sum, sums);
    if (threadIdx.x == 0) k.parts[blockIdx.y * MUON_BLOCKS + blockIdx.x] = sum;
}
// The place of element i of a matrix in its lying copy
__device__ static size_t lying_place(const MuonMatrix &w, int i) {
    return w.rows > w.cols ? (size_t)(i % w.cols) * w.rows + i / w.cols : (size_t)i;
}
// X = G / |G|, lying. Reads 8, writes 2 bytes an element
__global__ void __launch_bounds__(256) muon_start_kernel(const MuonStep k) {
    const MuonMatrix w = k.matrix[blockIdx.y];
    float clip = clip_of(k), sum = 0;
    for (int i = 0; i < MUON_BLOCKS; i++) sum += k.parts[blockIdx.y * MUON_BLOCKS + i];
    float inverse = 1 / (sqrtf(sum) + 1e-7f);
    for (int i = blockIdx.x * 256 + threadIdx.x; i < k.lying; i += gridDim.x * 256)
        store(k.X + (size_t)blockIdx.y * k.lying + lying_place(w, i), momentum_of(k, w, i, clip) * inverse);
}
// P = a I + b R + c P, where P comes in as R^2; [count,m,m]
__global__ void __launch_bounds__(256)
    muon_poly_kernel(floatX *P, const floatX *R, int m, size_t count, float a, float b, float c) {
    size_t i = (size_t)blockIdx.x * 256 + threadIdx.x;
    if (i >= count) return;
    size_t in_matrix = i % ((size_t)m * m);
    store(P + i, b * to_float(R[i]) + c * to_float(P[i]) + (in_matrix % (m + 1) ? 0 : a));
}
// The step and the moving average. Reads 10, writes 8 + 2 bytes an element
__global__ void __launch_bounds__(256) muon_step_kernel(const MuonStep k) {
    const MuonMatrix w = k.matrix[blockIdx.y];
    const StepConstants o = *k.constants;
    if (k.losses->bad_step) return;
    for (int i = blockIdx.x * 256 + threadIdx.x; i < k.lying; i += gridDim.x * 256) {
        float x = to_float(k.X[(size_t)blockIdx.y * k.lying + lying_place(w, i)]);
        float p = k.params[w.at + i] * k.decay - k.rate * w.factor * x;
        k.params[w.at + i] = p;
        k.ema[w.own + i] = o.ema * k.ema[w.own + i] + o.one_ema * p;
        if (k.weights) store(k.weights + w.at + i, p);
    }
}
static void exchange(floatX *&a, floatX *&b) {
    floatX *c = a;
    a = b, b = c;
}
// The polynomials of `count` matrices [m,n], which lie in g->muon_X[0]: newton_schulz of train_srdit.c.
// Returns where they come to lie.
static floatX *newton_schulz(GpuModel *g, int m, int n, int count) {
    GemmKey small = gemm_key(m, m, n, 0, 1), square = gemm_key(m, m, m, 0, 0), wide = gemm_key(m, n, m, 0, 0);
    small.batch = square.batch = wide.batch = count;
    small.stepa = small.stepb = wide.stepb = wide.stepc = (int64_t)m * n;
    small.stepc = square.stepa = square.stepb = square.stepc = wide.stepa = (int64_t)m * m;
    floatX *X = g->muon_X[0], *Y = g->muon_X[1];
    floatX *R = g->muon_R[0], *P = g->muon_R[1], *Q = g->muon_R[2], *T = g->muon_R[3];
    size_t numbers = (size_t)count * m * m;
    for (int k = 0; k < 5; k++) {
        int begins = gram_begins((size_t)m, (size_t)n, ANEW_IN_BF16, k);
        if (begins) matmul<floatX>(small, R, X, X, NULL);
        matmul<floatX>(square, P, R, R, NULL);
        muon_poly_kernel<<<(unsigned)((numbers + 255) / 256), 256, 0, stream>>>(
            P, R, m, numbers, (float)muon_classic[0], (float)muon_classic[1], (float)muon_classic[2]);
        LAUNCHED();
        const floatX *step = P;
        if (begins) exchange(Q, P);   // Q is this step's P, and P free
        else {
            matmul<floatX>(square, T, P, Q, NULL);
            exchange(Q, T);
        }
        if (gram_ends((size_t)m, (size_t)n, ANEW_IN_BF16, k)) {
            matmul<floatX>(wide, Y, Q, X, NULL);
            exchange(X, Y);
            continue;
        }
        matmul<floatX>(square, T, step, R, NULL);
        matmul<floatX>(square, R, T, step, NULL);
    }
    return X;
}
// All of Muon's matrices, group by group
static void muon_update(GpuModel *g) {
    const Config *c = &g->base.c;
    for (int i = 0; i < g->groups; i++) {
        const MuonGroup *one = &g->group[i];
        int m = one->m, n = one->n;
        MuonStep k = {g->params,
                      g->m,
                      g->ema,
                      g->muon_sums,
                      g->weights,
                      g->muon_X[0],
                      g->grads,
                      g->muon_there + one->first,
                      g->losses,
                      g->constants,
                      (float)c->muon_momentum,
                      (float)(1 - c->muon_momentum),
                      (float)c->muon_lr,
                      (float)(1 - c->muon_lr * c->muon_weight_decay),
                      m * n};
        dim3 grid(MUON_BLOCKS, (unsigned)one->count);
        muon_momentum_kernel<<<grid, 256, 0, stream>>>(k);
        LAUNCHED();
        muon_start_kernel<<<grid, 256, 0, stream>>>(k);
        LAUNCHED();
        k.X = newton_schulz(g, m, n, one->count);
        muon_step_kernel<<<grid, 256, 0, stream>>>(k);
        LAUNCHED();
    }
}
// AdamW for the trained numbers begin ... end, multiples of 64, whose moments and average begin at `at`
static void adamw_update(GpuModel *g, size_t begin, size_t end, size_t at) {
    size_t n = end - begin;
    adamw_kernel<<<(unsigned)((n / 4 + 255) / 256), 256, 0, stream>>>(
        g->params + begin, g->m + at, g->v + at, g->ema + at, g->weights ? g->weights + begin : NULL,
        g->grads + begin, g->losses, g->constants, n);
    LAUNCHED();
}
// AdamW for this rank's pieces of a bucket
static void pieces_update(GpuModel *g, int bucket) {
    for (int i = 0; i < g->buckets.piece_count; i++) {
        const Piece *p = &g->buckets.pieces[i];
        if (p->bucket == bucket && p->owner == ranks.rank && !p->muon)
            adamw_update(g, p->begin, p->end, p->at);
    }
}
// Of several ranks; each bucket leaves as soon as it is done, in the order in which the next forward asks for
// them.
static void buckets_update(GpuModel *g) {
    const Config *c = &g->base.c;
    int of_f = bucket_of(c, c->num_f), last = g->buckets.count - 1;   // the runs of f are 1 ... of_f - 1
    for (int i = 0; i <= last; i++) {
        int k = i < of_f ? i : i == of_f ? last : i - 1;
        pieces_update(g, k);
        bucket_gather(g, k);
    }
}

static void update(Model *model, int step) {
    GpuModel *g = gpu_of(model);
    StepKind kind;
    memset(&kind, 0, sizeof(kind));
    kind.update = 1;
    zero_now(g);
    use_weights(g, PARAMS);
    place(OPTIMIZER);
    profile_mark(-1, -1);
    constants_kernel<<<1, 1, 0, stream>>>(g->constants, step_constants(&model->c, step));
    LAUNCHED();
    run_recorded(g, kind, [=] {
        size_t n = model->table.trained;
        if (ranks.size > 1) ranks_norm(g);
        else {
            grad_norm_kernel<<<NORM_BLOCKS, 256, 0, stream>>>(g->norm_parts, g->grads, n);
            LAUNCHED();
            root_kernel<<<1, 256, 0, stream>>>(g->losses, g->norm_parts, NORM_BLOCKS, g->constants);
            LAUNCHED();
        }
        muon_update(g);
        if (ranks.size > 1) buckets_update(g);
        else pieces_update(g, 0);
    });
    profile_step();
}

// The losses summed since the last call, and a fresh start. This waits for the GPU.
static Losses read_losses(Model *model) {
    GpuModel *g = gpu_of(model);
    const Config *c = &model->c;
    DeviceLosses d;
    double shared[5] = {0};
    CHECK(cudaMemcpyAsync(&d, g->losses, sizeof(d), cudaMemcpyDeviceToHost, stream));
    if (ranks.size > 1)
        CHECK(cudaMemcpyAsync(shared, g->shared, sizeof(shared), cudaMemcpyDeviceToHost, stream));
    CHECK(cudaMemsetAsync(g->losses, 0, offsetof(DeviceLosses, bad_step), stream));   // which stays
    CHECK(cudaStreamSynchronize(stream));
    if (ranks.size > 1) d.denoise = shared[1], d.cls = shared[2], d.align = shared[3], d.cfm = shared[4];
    Losses sum;
    sum.denoise = d.denoise;
    sum.cls = d.cls;
    sum.align = d.align;
    sum.cfm = d.cfm;
    sum.grad_norm = d.grad_norm;
    sum.bad_step = d.bad_step;
    sum.bad_part = d.bad_part;
    sum.total =
        d.denoise + c->cls_coeff * d.cls + c->align_coeff * d.align + (c->cfm ? c->cfm_coeff : 0) * d.cfm;
    return sum;
}

// ----------------------------------------------------------------------------------------------------------
// What a backend offers

static float *model_block(GpuModel *g, enum Block which) {
    float *blocks[] = {g->params, g->grads, g->m, g->v, g->ema};
    if (which == GRADS) zero_now(g);
    return blocks[which];
}
static int in_pieces(const GpuModel *g, enum Block which) {   // 1: no rank has all of it
    return ranks.size > 1 && (which == PARAMS ? g->weights != NULL : which != GRADS);
}
// All of several ranks call it, since each has but a piece of what is no gradient
static void get_block(real *host, Model *m, enum Block which) {
    GpuModel *g = gpu_of(m);
    size_t n = m->table.total, trained = m->table.trained;
    float *from = model_block(g, which);
    buckets_await(g, 0, g->buckets.count - 1);
    if (in_pieces(g, which)) from = gather_pieces(g, from);
    CHECK(cudaMemcpyAsync(host, from, n * sizeof(real), cudaMemcpyDeviceToHost, stream));
    if (in_pieces(g, which))   // the fixed tables
        CHECK(cudaMemcpyAsync(host + trained, g->params + trained, (n - trained) * sizeof(real),
                              cudaMemcpyDeviceToHost, stream));
    CHECK(cudaStreamSynchronize(stream));
}
static const real *host_block(Model *m, enum Block which, real *room) {
    gpu::get_block(room, m, which);
    return room;
}
static void put_block(Model *m, const real *host, enum Block which) {
    GpuModel *g = gpu_of(m);
    float *to = model_block(g, which);
    buckets_await(g, 0, g->buckets.count - 1);
    if (which == PARAMS || !in_pieces(g, which))
        CHECK(cudaMemcpyAsync(to, host, m->table.total * sizeof(real), cudaMemcpyHostToDevice, stream));
    else
        for (int i = 0; i < g->buckets.piece_count; i++) {
            const Piece *p = &g->buckets.pieces[i];
            if (p->owner == ranks.rank)
                CHECK(cudaMemcpyAsync(to + p->at, host + p->begin, (p->end - p->begin) * sizeof(real),
                                      cudaMemcpyHostToDevice, stream));
        }
    CHECK(cudaStreamSynchronize(stream));
    g->weights_of = GRADS;   // neither: they are rounded again before their next use
}

// An activation of the last forward by its name in activation_names, copied to the host. Only reports and
// tests ask, so that it may allocate.
static const real *activation(Model *m, const char *name) {
    GpuModel *g = gpu_of(m);
    const Config *c = &m->c;
    const Acts *a = &g->a;
    ActivationNames names = activation_names(c);
    size_t count = 0;
    int block = -1, first_h = c->depth - c->num_h;
    const float *x = NULL;
    const floatX *rounded = NULL;
    for (int i = 0; i < names.count; i++)
        if (!strcmp(names.of[i].name, name)) count = names.of[i].size * (size_t)m->max_batch;
    if (sscanf(name, "block.%d", &block) == 1) {   // where the next one reads
        if (block == c->num_f - 1) x = a->E;
        else if (block == first_h - 1) rounded = a->g_out;
        else x = block == c->depth - 1 ? a->last : a->block[block + 1].x;
    } else if (!strcmp(name, "embed")) x = a->block[0].x;
    else if (!strcmp(name, "cond")) x = a->cond;
    else if (!strcmp(name, "fused")) x = a->fused;
    else if (!strncmp(name, "zs", 2)) {   // zs, or zs.2 and so on
        int k = sscanf(name, "zs.%d", &block) == 1 ? align_of(c, block - 1) : 0;
        rounded = a->zs + (size_t)(align_row(c, k, m->max_batch) - align_first(c, m->max_batch)) * c->z_dim;
    } else if (!strcmp(name, "cls_out")) x = a->cls_out;
    else if (!strcmp(name, "out")) {
        x = g->in.noise;   // (not needed any more)
        unpatchify_kernel<<<(unsigned)((count + 255) / 256), 256, 0, stream>>>(
            g->in.noise, a->out_patches, c->in_channels, c->input_size, c->patch_size, count);
        LAUNCHED();
    }
    if (g->host_size < count) {
        free(g->host);
        g->host = (float *)alloc_zero(count, sizeof(float));
        g->host_size = count;
    }
    floatX *narrow = rounded ? (floatX *)alloc_zero(count, sizeof(floatX)) : NULL;
    if (rounded)
        CHECK(cudaMemcpyAsync(narrow, rounded, count * sizeof(floatX), cudaMemcpyDeviceToHost, stream));
    else CHECK(cudaMemcpyAsync(g->host, x, count * sizeof(float), cudaMemcpyDeviceToHost, stream));
    CHECK(cudaStreamSynchronize(stream));
    for (size_t i = 0; i < count && rounded; i++) g->host[i] = (float)narrow[i];
    free(narrow);
    return g->host;
}

// ----------------------------------------------------------------------------------------------------------
// Creation

// Numbers spread evenly over [-scale, scale), by a hash of their place
static void fill_spread(float *x, size_t n, float scale) {
#pragma omp parallel for
    for (size_t i = 0; i < n; i++) {
        uint32_t h = (uint32_t)i * 0x9e3779b9u;
        h = (h ^ h >> 15) * 0x85ebca6bu;
        x[i] = scale * (2 * uniform_of(h ^ h >> 13) - 1);
    }
}

// One step of each kind, so that every matrix product of training gets its plan and its time is taken: no
// step makes one later, nor allocates anything else. All numbers are random, since products of zeros, which
// most parameters are at first, draw less power and run faster; afterwards the parameters are as before.
static void tune(GpuModel *g) {
    Model *m = &g->base;
    const Config *c = &m->c;
    Batch *batch = batch_create(c, m->max_batch);
    size_t B = (size_t)m->max_batch, latent = B * (size_t)latent_of(c), Z = B * (size_t)c->z_dim,
           n = m->table.total;
    const size_t some = (size_t)1 << 20;   // the same again and again
    real *start = (real *)alloc_zero(n, sizeof(real)), *spread = (real *)alloc_zero(some, sizeof(real));
    gpu::get_block(start, m, PARAMS);
    if (ranks.rank)
        ranks_first(0);   // rank 0's plans, once they are in the file, are all ranks' of this machine
    fill_spread(spread, some, 0.1f);
    for (size_t at = 0; at < n; at += some)
        CHECK(cudaMemcpyAsync(g->params + at, spread, (n - at < some ? n - at : some) * sizeof(float),
                              cudaMemcpyHostToDevice, stream));
    g->weights_of = GRADS;   // to be rounded again
    fill_spread(batch->x, latent, 1);
    fill_spread(batch->cls, Z, 1);
    fill_spread(batch->feats, Z * (size_t)tokens_of(c), 1);
    for (size_t i = 0; i < B; i++) batch->t[i] = (real)((double)(i + 1) / (double)(B + 1));
    tuning = 1;
    timed_count = 0;
    batch->on_device = 1;
    for (int turn = 0; turn < 4; turn++) {
        if (turn % 2 == 0) gpu::zero_gradients(m);
        batch->path_drop = turn / 2 && c->path_drop;
        gpu::forward_backward(m, batch);
    }
    real *v = (real *)alloc_zero(latent, sizeof(real)), *v_cls = (real *)alloc_zero(Z, sizeof(real));
    for (int drop = 0; drop < 2; drop++)
        gpu::velocity(m, v, v_cls, batch->x, batch->cls, batch->t, batch->y, 0, drop, m->max_batch);
    gpu::put_block(m, start, PARAMS);
    free(v), free(v_cls), free(start), free(spread), batch_free(batch);
    gpu::read_losses(m);
    gpu::zero_gradients(m);
    tuning = 0;
    if (!ranks.rank) ranks_first(0);
    if (verbose) plans_report(stdout);
}

// The ranks' GPUs: no two may share one, and all compute in the same type; then NCCL joins them.
static void ranks_join(void) {
    typedef struct {
        char host[64], name[128], uuid[16];
        int bytes;
    } Card;
    static Card all[MAX_RANKS];
    Card own;
    memset(&own, 0, sizeof(own));
    gethostname(own.host, sizeof(own.host) - 1);
    snprintf(own.name, sizeof(own.name), "%.120s", card.name);
    memcpy(own.uuid, &card.uuid, sizeof(own.uuid));
    own.bytes = sizeof(floatX);
    ranks_exchange(all, &own, sizeof(own));
    for (int i = 0; i < ranks.size; i++) {
        for (int j = 0; j < i; j++)
            if (!strcmp(all[i].host, all[j].host) && !memcmp(all[i].uuid, all[j].uuid, sizeof(own.uuid)))
                die("ranks %d and %d have the same GPU on %s, which has fewer than ranks: start fewer there",
                    j, i, own.host);
        if (all[i].bytes != all[0].bytes) die("rank %d was built with another FP32= than rank 0", i);
    }
    for (int i = 1; i < ranks.size; i++)
        if (strcmp(all[i].name, all[0].name) && !ranks.rank) {
            fprintf(stderr, "warning: rank %d has %s and rank 0 has %s: all go as fast as the slowest\n", i,
                    all[i].name, all[0].name);
            break;
        }
    CHECK(cudaStreamCreate(&ranks_stream));
    nccl_open();
    if (verbose)
        printf("%d ranks, each with %s: a share of the batch, of the moments and of the average\n",
               ranks.size, card.name);
}

static void device_open(void) {
    int devices = 0, driver = 0, toolkit = 0;
    cudaError_t found = cudaGetDeviceCount(&devices);
    cudaDriverGetVersion(&driver);   // 0 where there is no driver at all
    cudaRuntimeGetVersion(&toolkit);
    if (found == cudaErrorInsufficientDriver && driver) {
        die("the driver knows CUDA %d.%d at most, but this was built with %d.%d: update the driver, or build "
            "with an older toolkit (make NVCC=...)",
            driver / 1000, driver % 1000 / 10, toolkit / 1000, toolkit % 1000 / 10);
    }
    if (found != cudaSuccess || devices == 0)
        die("no GPU was found: train_srdit runs the same model on the CPU");
    if (ranks.size > 1) device = devices == 1 ? 0 : ranks.local;   // 1: its starter shows each rank its own
    if (device >= devices)
        die("there are %d GPUs here, and at least %d ranks: start fewer (torchrun --nproc-per-node %d)",
            devices, device + 1, devices);
    CHECK(cudaSetDevice(device));
    CHECK(cudaGetDeviceProperties(&card, device));
    if (card.major < 8)
        die("%s has compute capability %d.%d, but 8.0 is needed: train_srdit runs the same model on the CPU",
            card.name, card.major, card.minor);
    cudaFuncAttributes any;
    cudaError_t built = cudaFuncGetAttributes(&any, loss_sums_kernel);
    if (built == cudaErrorNoKernelImageForDevice || built == cudaErrorInvalidDeviceFunction)
        die("this was not built for %s: run make clean and make again on this machine, or with "
            "ARCH=-arch=sm_%d%d",
            card.name, card.major, card.minor);
    CHECK(built);
    CHECK(cudaStreamCreate(&stream));
    CHECK(cudaStreamCreate(&copy_stream));
    CHECK(cudaMalloc(&workspace, workspace_bytes));
    CHECK_LT(cublasLtCreate(&lt));
    if (ranks.size > 1) ranks_join();
}

// The bytes that a model with max_batch samples takes on the device
typedef struct {
    size_t parameters, activations, input, all;
} MemoryPlan;
static MemoryPlan memory_plan(GpuModel *g, int max_batch) {
    MemoryPlan p;
    DeviceArena arena = {NULL, 0, 0, NULL}, input = {NULL, 0, 1, NULL};
    Input counted;
    input_layout(&counted, &input, &g->base.c, max_batch);
    p.parameters = memory_layout(g, &arena, max_batch);
    p.activations = arena.used - p.parameters;
    p.input = 2 * input.used;
    p.all = arena.used + p.input;
    return p;
}
// Says what is taken; an error, with the batch that would fit, if there is not so much
static void memory_check(GpuModel *g, const MemoryPlan *p, int max_batch) {
    size_t free_bytes, all_bytes;
    CHECK(cudaMemGetInfo(&free_bytes, &all_bytes));
    if (verbose)
        printf(
            "GPU memory: parameters, gradients, moments, average %.3f GB, activations and scratch %.3f GB, "
            "input %.3f GB, workspace %.3f GB; %.3f of %.1f GB\n",
            (double)p->parameters / 1e9, (double)p->activations / 1e9, (double)p->input / 1e9,
            (double)workspace_bytes / 1e9, (double)(p->all + workspace_bytes) / 1e9, (double)all_bytes / 1e9);
    if (p->all <= free_bytes) return;
    int fits = max_batch / 2;   // the largest of a half, a quarter, ... that fits
    while (fits && memory_plan(g, fits).all > free_bytes) fits /= 2;
    die("the GPU has %.1f GB free but %d samples at once need %.1f; %d fit (a smaller --batch, or --accum)",
        (double)free_bytes / 1e9, max_batch, (double)p->all / 1e9, fits);
}

// Start values; and RoPE's angles by position for attention on tensor cores, whose table is smaller:
// patch (p, 0) turns by those of p
static void start_values(GpuModel *g, uint64_t seed) {
    Model *m = &g->base;
    const Config *c = &m->c;
    int G = grid_of(c), Dh = c->hidden_size / c->num_heads, quarter = Dh / 4;
    real *start = (real *)alloc_zero(m->table.total, sizeof(real));
    float2 *rope = (float2 *)alloc_zero((size_t)(G * quarter), sizeof(float2));
    params_start(start, &m->table, c, seed);
    gpu::put_block(m, start, PARAMS);
    gpu::put_block(m, start, EMA);
    const real *cosines = start + (g->w.rope_cos - g->params), *sines = start + (g->w.rope_sin - g->params);
    for (int i = 0; i < G * quarter; i++) {
        size_t from = (size_t)(i / quarter * G * Dh + i % quarter * 2);
        rope[i] = c->rope ? make_float2(cosines[from], sines[from]) : make_float2(1, 0);
    }
    CHECK(cudaMemcpy(g->rope, rope, (size_t)(G * quarter) * sizeof(float2), cudaMemcpyHostToDevice));
    free(start), free(rope);
}

static Model *model_create(const Config *c, int max_batch, uint64_t seed) {
    if (c->hidden_size > 8192) die("hidden_size %d: the GPU's kernels take at most 8192", c->hidden_size);
    if (c->hidden_size / c->num_heads > 128)
        die("a head width of %d: the GPU's kernels take at most 128", c->hidden_size / c->num_heads);
    if (tokens_of(c) > 6000) die("%d tokens: the GPU's kernels take at most 6000", tokens_of(c));
    if (!stream) device_open();
    GpuModel *g = (GpuModel *)alloc_zero(1, sizeof(GpuModel));
    Model *m = &g->base;
    m->c = *c;
    m->max_batch = max_batch;
    m->table = params_table(&g->w, c, NULL);
    buckets_plan(g);
    muon_groups(g);
    MemoryPlan plan = memory_plan(g, max_batch);
    memory_check(g, &plan, max_batch);
    if (verbose) attention_report(stdout, c);
    m->parameter_bytes = plan.parameters;
    m->activation_bytes = plan.activations + plan.input;
    DeviceArena arena = {NULL, plan.all - plan.input, 0, NULL};
    g->memory = memory_take(&arena, g);
    memory_layout(g, &arena, max_batch);
    CHECK(cudaMemcpy(g->muon_there, g->muon_matrices, (size_t)g->matrices * sizeof(MuonMatrix),
                     cudaMemcpyHostToDevice));
    queue_create(&g->queue, c, max_batch);
    g->in = g->queue.on_device[0];
    free(m->table.tensors);
    m->table = params_table(&g->w, c, g->params);
    free(params_table(&g->dw, c, g->grads).tensors);
    CHECK(cudaMemcpy(g->pieces, g->buckets.pieces, (size_t)g->buckets.piece_count * sizeof(Piece),
                     cudaMemcpyHostToDevice));
    g->ema_whole = ranks.size > 1 ? g->grads : g->ema;
    free(params_table(&g->w_ema, c, g->ema_whole).tensors);
    g->w_ema.pos_embed = g->w.pos_embed, g->w_ema.rope_cos = g->w.rope_cos, g->w_ema.rope_sin = g->w.rope_sin;
    start_values(g, seed);
    gpu::zero_gradients(m);
#ifndef CUDA_ON_CPU   // the emulator proposes one algorithm
    tune(g);
#else
    (void)tune;
#endif
    return m;
}

// Input buffer i as a batch that the loader fills
static Batch *batch_in(Model *m, const Data *d, int i) {
    Input *in = &gpu_of(m)->queue.on_host[i];
    if (!latents_on_device(d->latent_type) || (m->c.align && !feats_on_device(d->feat_type))) return NULL;
    Batch *b = (Batch *)alloc_zero(1, sizeof(Batch));
    b->B = b->whole = m->max_batch;
    b->on_device = b->stored = 1, b->slot = 1 + i;
    b->t = in->t, b->y = in->y, b->cls = in->cls, b->x_stored = in->x_stored, b->feats_stored = in->feats;
    b->x_type = d->latent_type, b->feats_type = m->c.align ? d->feat_type : I8;
    b->scale = d->scale, b->offset = d->offset;
    return b;
}
static void batch_wait(Model *m, int i) { CHECK(cudaEventSynchronize(gpu_of(m)->queue.sent[i])); }

static void begin(Model *m, int no_graph, int with_profile) {
    (void)m;
    use_graph = !no_graph;
    profile_reset(with_profile);
}

// The table of --profile, a line for each part of the step: launches, GFLOP and GB that it needs at least; ms
// of that at the rates that can be reached (floor); what to expect: products at 0.75, attention at 0.66 and
// 0.48, passes over memory at 0.86 of the floor's rates, and 1.5 us a launch (model); and measured, with its
// share of the memory's peak.
static void profile_line(const char *name, const Spent *s, double share, double memory, Spent *all) {
    double steps = profile.steps - 2, ms = s->ms / steps, floor_ms = s->floor * 1e3;
    double model = floor_ms / share + 1.5e-3 * (double)s->launches / steps;
    char part[16] = "n/a";
    if (memory && ms > 0) snprintf(part, sizeof(part), "%.0f %%", 100 * s->bytes / (ms * 1e-3) / memory);
    printf("| %s | %.0f | %.4g | %.3g | %.3f | %.3f | %.3f | %s |\n", name, (double)s->launches / steps,
           s->flops / 1e9, s->bytes / 1e9, floor_ms, model, ms, part);
    all->ms += s->ms, all->flops += s->flops, all->bytes += s->bytes, all->floor += s->floor;
    all->launches += s->launches;
}
static void end(Model *m) {
    if (!profile.on) return;
    if (profile.steps < 3) {
        printf("--profile: the first two steps do not count; there were %d\n", profile.steps);
        profile_reset(0);
        return;
    }
    const Config *c = &m->c;
    double steps = profile.steps - 2, B = (double)profile.samples / profile.steps, f = sizeof(floatX);
    double T = tokens_of(c), Tk = kept_of(c), D = c->hidden_size, Z = c->z_dim;
    double flops = peak_flops(), memory = peak_bandwidth(), M = c->projector_dim;
    double aligned = align_rows(c, 1) * B;
    double to_flops = 1 / (REACHED_FLOPS * (flops ? flops : 989.4e12));
    double to_bytes = 1 / (REACHED_BYTES * (memory ? memory : 3.35e12));
    // what the passes of a step move at least
    double least[PLACES][WORKS] = {{0}}, attention[PLACES][WORKS] = {{0}};
    for (int i = 0; i < c->depth; i++) {
        int at = is_sparse(c, i) ? SPARSE : DENSE;
        double n = is_sparse(c, i) ? Tk : T, elements = B * n * D;
        attention[at][ATTENTION] += 4 * n * elements, attention[at][ATTENTION_BACK] += 10 * n * elements;
        least[at][ATTENTION] += 5 * f * elements;                        // q, k, v, v1; out
        least[at][ATTENTION_BACK] += (9 * f + (i ? 8 : 4)) * elements;   // and dout; their gradients; d_v1
        least[at][OTHER] += 2 * (8 + 2 * f) * elements;                  // twice x, y; x, h
        least[at][OTHER_BACK] += 2 * (12 + 3 * f) * elements;            // twice dh, x, y, dx; dx, dy
    }
    least[INPUT][OTHER] = B * T * D * (4 + f + 8 + 2 * f) + B * latent_of(c) * 20.0;
    least[INPUT][OTHER_BACK] = B * T * D * (12 + 3 * f) + B * latent_of(c) * (16 + f);
    least[FUSION][OTHER_BACK] = B * (T + Tk) * D * f;
    least[PROJECTOR][OTHER] = aligned * M * 4 * f;
    least[PROJECTOR][OTHER_BACK] = aligned * (M * 6 * f + Z * (2 * f + 1));
    least[OPTIMIZER][OTHER] = (double)m->table.trained * (24 + 16 + (f == 2 ? 2 : 0));
    static const struct {
        const char *name;
        enum Place place;
        int first, last;   // kinds of work
        double share;
    } lines[] = {{"products, dense blocks, forward", DENSE, PRODUCT, PRODUCT, 0.75},
                 {"products, dense blocks, gradients", DENSE, PRODUCT_BACK, PRODUCT_BACK, 0.75},
                 {"products, dense blocks, weights", DENSE, PRODUCT_WEIGHT, PRODUCT_WEIGHT, 0.75},
                 {"attention, dense blocks, forward", DENSE, ATTENTION, ATTENTION, 0.66},
                 {"attention, dense blocks, backward", DENSE, ATTENTION_BACK, ATTENTION_BACK, 0.48},
                 {"norms and the rest, dense, forward", DENSE, OTHER, OTHER, 0.86},
                 {"norms and the rest, dense, backward", DENSE, OTHER_BACK, OTHER_BACK, 0.86},
                 {"products, sparse blocks, forward", SPARSE, PRODUCT, PRODUCT, 0.75},
                 {"products, sparse blocks, gradients", SPARSE, PRODUCT_BACK, PRODUCT_BACK, 0.75},
                 {"products, sparse blocks, weights", SPARSE, PRODUCT_WEIGHT, PRODUCT_WEIGHT, 0.75},
                 {"attention, sparse blocks, forward", SPARSE, ATTENTION, ATTENTION, 0.66},
                 {"attention, sparse blocks, backward", SPARSE, ATTENTION_BACK, ATTENTION_BACK, 0.48},
                 {"norms and the rest, sparse, forward", SPARSE, OTHER, OTHER, 0.86},
                 {"norms and the rest, sparse, backward", SPARSE, OTHER_BACK, OTHER_BACK, 0.86},
                 {"fusion", FUSION, PRODUCT, OTHER_BACK, 0.75},
                 {"projector, products", PROJECTOR, PRODUCT, PRODUCT_WEIGHT, 0.75},
                 {"projector, SiLU, cosine loss", PROJECTOR, OTHER, OTHER_BACK, 0.86},
                 {"adaLN and embedders", CONDITION, PRODUCT, OTHER_BACK, 0.75},
                 {"input, patches, final layer, losses", INPUT, PRODUCT, OTHER_BACK, 0.86},
                 {"optimizer", OPTIMIZER, PRODUCT, OTHER_BACK, 0.86}};
    cudaDeviceProp card;
    CHECK(cudaGetDeviceProperties(&card, device));
    printf("\nWhere a step goes, mean of %.0f steps, batch %.0f, on %s%s\n\n", steps, B, card.name,
           flops && memory ? "" : " (its peaks are not known: floor and model are an H100's)");
    printf("| part | launches | GFLOP | GB | floor ms | model ms | measured ms | of bandwidth |\n"
           "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n");
    Spent all;
    memset(&all, 0, sizeof(all));
    double model = 0;
    for (size_t i = 0; i < sizeof(lines) / sizeof(lines[0]); i++) {
        Spent sum;
        memset(&sum, 0, sizeof(sum));
        for (int k = lines[i].first; k <= lines[i].last; k++) {
            const Spent *one = &profile.spent[lines[i].place][k];
            double bytes = least[lines[i].place][k], math = attention[lines[i].place][k];
            sum.ms += one->ms, sum.launches += one->launches;
            sum.flops += one->flops / steps + math, sum.bytes += one->bytes / steps + bytes;
            sum.floor += one->floor / steps + fmax(bytes * to_bytes, math * to_flops);
        }
        model += sum.floor * 1e3 / lines[i].share;
        profile_line(lines[i].name, &sum, lines[i].share, memory, &all);
    }
    char mfu[32] = "unknown";
    double needed = 3 * forward_flops(c) * B;
    if (flops) snprintf(mfu, sizeof(mfu), "%.1f %%", 100 * needed / (all.ms / steps * 1e-3) / flops);
    Spent unused = {0, 0, 0, 0, 0};
    profile_line("all", &all, all.floor * 1e3 / model, memory, &unused);
    if (profile.lost)
        printf("\n%d launches were not timed: there is room for %d a step (a smaller --accum)\n",
               profile.lost, MAX_MARKS);
    printf("\nThe model's own products: %.1f GFLOP a step; MFU of the measured time: %s\n", needed / 1e9,
           mfu);
    profile_reset(0);
}

static void model_destroy(Model *m) {
    GpuModel *g = gpu_of(m);
    CHECK(cudaDeviceSynchronize());
    for (int i = 0; i < MAX_RECORDINGS; i++)
        if (g->recordings[i].graph) CHECK(cudaGraphExecDestroy(g->recordings[i].graph));
    queue_destroy(&g->queue);
    buckets_free(&g->buckets);
    if (ranks.size > 1) nccl_close();
    memory_free(g->memory, g);
    free(g->host), free(g->muon_matrices), free(m->table.tensors), free(g);
}

}   // namespace gpu

static const Backend gpu_backend = {"GPU",
                                    gpu::model_create,
                                    gpu::model_destroy,
                                    gpu::zero_gradients,
                                    gpu::forward_backward,
                                    gpu::update,
                                    gpu::read_losses,
                                    gpu::velocity,
                                    gpu::get_block,
                                    gpu::host_block,
                                    gpu::put_block,
                                    gpu::activation,
                                    gpu::begin,
                                    gpu::end,
                                    gpu::peak_flops,
                                    gpu::gather_ema,
                                    gpu::batch_in,
                                    gpu::batch_wait};

#ifndef TRAIN_SRDIT_CU_NO_MAIN
int main(int argc, char **argv) {
    guard_streams();
    wait_calmly(argv);
    return train_main(argc, argv, &gpu_backend);
}
#endif
