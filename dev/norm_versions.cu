// norm_versions.cu - one layer by versions, from the kernel that one writes first to the kind in
// train_srdit.cu: what each idea brings. What the steps teach stands in dev/README.md.
//
// The layer is RMSNorm with adaLN modulation, norm_modulate_forward and _backward of train_srdit.c:
//   n = x r with r = 1 / sqrt(mean(x^2) + 1e-6),  out = n (1 + scale) + shift
//   dn = dout (1 + scale),  dx += r (dn - n mean(dn n)),  dshift = sum_t dout,  dscale = sum_t dout n
// It is a handful of operations a number: all that can be won is to ask memory for less, in whole pieces,
// and to keep it busy. No version adds with atomics: every sum has one order, every run gives the same bits.
//
//   nvcc -std=c++17 -O3 -arch=sm_90 dev/norm_versions.cu -o build/norm_versions && build/norm_versions
//   make norm_versions_emu && ./norm_versions_emu           on the CPU: the same checks, but no times
//
// "Bytes an element" are those of [B,T,D] arrays that loads and stores ask for; shift, scale and r are small
// and come from a cache. Memory answers in sectors of 32 bytes; the table also counts what a warp touches.
// What bounds each kernel is a reckoning: no GPU has run them yet.
#include <cuda_runtime.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vector>
using std::vector;

struct Norm {                           // all pointers: device memory, row-major
    int B, T, D, stride, chunks, chunk;
    const float *x, *shift, *scale;     // [B,T,D]; [B, stride], of which D are read
    float *out, *r;                     // [B,T,D], [B,T]; r is kept for the backward
    const float *dout;                  // [B,T,D]
    float *dx, *dshift, *dscale;        // [B,T,D], added to; [B, stride], of which D are written
    float *parts;                       // [B, chunks, 2, D]: sums over `chunk` tokens of dout and dout n
};
static int div_up(int a, int b) { return (a + b - 1) / b; }

// Forward 1: x -> out, r; [B,T,D] -> [B,T,D], [B,T]. One thread a row: the CPU's loop over rows as a kernel.
// Reads 8, writes 4 bytes an element. Neighbouring lanes read D floats apart, so each load of a warp touches
// 32 sectors and takes 4 bytes of each: the load units bound it, with eight times the sectors needed. And
// threads are few: 256 x 257 rows are 500 for each of an H100's 132 multiprocessors, which hold 2048.
__global__ void forward_1_kernel(const Norm a) {
    int n = blockIdx.x * blockDim.x + threadIdx.x, D = a.D;
    if (n >= a.B * a.T) return;
    size_t at = (size_t)n * D, mod = (size_t)(n / a.T) * a.stride;
    float sum = 0;
    for (int d = 0; d < D; d++) sum += a.x[at + d] * a.x[at + d];
    float r = a.r[n] = rsqrtf(sum / D + 1e-6f);
    for (int d = 0; d < D; d++) a.out[at + d] = a.x[at + d] * r * (1 + a.scale[mod + d]) + a.shift[mod + d];
}
static void forward_1(const Norm &a) { forward_1_kernel<<<div_up(a.B * a.T, 256), 256>>>(a); }

// Forward 2: the same, one block of 256 threads a row. 1 read far apart; here neighbours read neighbours, and
// a load of a warp is four whole sectors. Reads 8, writes 4 bytes an element. The squares are added in shared
// memory, in halves with a barrier each: 9 a row, for which a thread has three numbers at D = 768. Waiting at
// barriers bounds it.
__global__ void __launch_bounds__(256) forward_2_kernel(const Norm a) {
    __shared__ float sums[256];
    int n = blockIdx.x, i = threadIdx.x, D = a.D;
    size_t at = (size_t)n * D, mod = (size_t)(n / a.T) * a.stride;
    float sum = 0;
    for (int d = i; d < D; d += 256) sum += a.x[at + d] * a.x[at + d];
    sums[i] = sum;
    for (int half = 128; half > 0; half /= 2) {
        __syncthreads();
        if (i < half) sums[i] += sums[i + half];
    }
    __syncthreads();
    float r = rsqrtf(sums[0] / D + 1e-6f);
    if (i == 0) a.r[n] = r;
    for (int d = i; d < D; d += 256)
        a.out[at + d] = a.x[at + d] * r * (1 + a.scale[mod + d]) + a.shift[mod + d];
}
static void forward_2(const Norm &a) { forward_2_kernel<<<a.B * a.T, 256>>>(a); }

// The sum over a warp, in every lane. Lanes hand each other registers: no shared memory and no barrier.
__device__ __forceinline__ float sum_warp(float x) {
    for (int m = 1; m < 32; m *= 2) x += __shfl_xor_sync(0xffffffffu, x, m);
    return x;
}

// Forward 3: the same, one warp a row. In 2 eight warps waited for one another nine times a row; here a sum
// is five shuffles, and no warp waits for another. Reads 8, writes 4 bytes an element; x the second time
// perhaps from the first-level cache (64 warps hold 64 rows, 192 KB at D = 768). The number of loads bounds
// it: 48 a lane of x alone at D = 768, of 4 bytes each.
__global__ void __launch_bounds__(256) forward_3_kernel(const Norm a) {
    int n = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32, D = a.D;
    if (n >= a.B * a.T) return;                         // the whole warp
    size_t at = (size_t)n * D, mod = (size_t)(n / a.T) * a.stride;
    float sum = 0;
    for (int d = lane; d < D; d += 32) sum += a.x[at + d] * a.x[at + d];
    float r = rsqrtf(sum_warp(sum) / D + 1e-6f);
    if (lane == 0) a.r[n] = r;
    for (int d = lane; d < D; d += 32)
        a.out[at + d] = a.x[at + d] * r * (1 + a.scale[mod + d]) + a.shift[mod + d];
}
static void forward_3(const Norm &a) { forward_3_kernel<<<div_up(a.B * a.T, 8), 256>>>(a); }

// Four neighbouring floats, 16 bytes at once. read4 is for what no thread writes: __ldg says so, else the
// compiler would have to keep each load behind the stores before it.
struct Vec4 { float x[4]; };
__device__ __forceinline__ Vec4 vec4(float4 v) { return {{v.x, v.y, v.z, v.w}}; }
__device__ __forceinline__ Vec4 load4(const float *p) { return vec4(*(const float4 *)p); }
__device__ __forceinline__ Vec4 read4(const float *p) { return vec4(__ldg((const float4 *)p)); }
__device__ __forceinline__ void store4(float *p, const Vec4 &v) {
    *(float4 *)p = make_float4(v.x[0], v.x[1], v.x[2], v.x[3]);
}
// A row in registers is V pieces of 32 lanes x 4 numbers. Registers have no index, so V is a constant and
// every loop over it is unrolled.
#define LAUNCH(KERNEL, GRID, BYTES, A)                                                                       \
    if ((A).D <= 128) KERNEL<1><<<GRID, 256, BYTES>>>(A);                                                    \
    else if ((A).D <= 384) KERNEL<3><<<GRID, 256, BYTES>>>(A);                                               \
    else if ((A).D <= 768) KERNEL<6><<<GRID, 256, BYTES>>>(A);                                               \
    else KERNEL<9><<<GRID, 256, BYTES>>>(A)

// Forward 4: the same, x read once, 16 bytes a lane, and kept in registers until r is known. 3 read x twice,
// in four times as many loads. Reads 4, writes 4 bytes an element, the least there is: 0.40 GB at B = 256,
// T = 257, D = 768; bound by memory. D and stride are multiples of 4, and D is at most 1152.
template <int V> __global__ void __launch_bounds__(256) forward_4_kernel(const Norm a) {
    int n = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32, D = a.D;
    if (n >= a.B * a.T) return;
    size_t at = (size_t)n * D, mod = (size_t)(n / a.T) * a.stride;
    Vec4 x[V];
    float sum = 0;
#pragma unroll
    for (int i = 0, d = lane * 4; i < V && d < D; i++, d += 128) {
        x[i] = read4(a.x + at + d);
        for (int j = 0; j < 4; j++) sum += x[i].x[j] * x[i].x[j];
    }
    float r = rsqrtf(sum_warp(sum) / D + 1e-6f);
    if (lane == 0) a.r[n] = r;
#pragma unroll
    for (int i = 0, d = lane * 4; i < V && d < D; i++, d += 128) {
        Vec4 shift = read4(a.shift + mod + d), scale = read4(a.scale + mod + d);
        for (int j = 0; j < 4; j++) x[i].x[j] = x[i].x[j] * r * (1 + scale.x[j]) + shift.x[j];
        store4(a.out + at + d, x[i]);
    }
}
static void forward_4(const Norm &a) { LAUNCH(forward_4_kernel, div_up(a.B * a.T, 8), 0, a); }

// Backward 1, rows: dout, x [B,T,D], r, scale -> dx [B,T,D]. One thread a row. Reads 20, writes 4 bytes an
// element (dout and x twice, dx), in eight times the sectors, as forward 1: the load units bound it.
__global__ void backward_1_kernel(const Norm a) {
    int n = blockIdx.x * blockDim.x + threadIdx.x, D = a.D;
    if (n >= a.B * a.T) return;
    size_t at = (size_t)n * D, mod = (size_t)(n / a.T) * a.stride;
    float r = a.r[n], sum = 0;
    for (int d = 0; d < D; d++) sum += a.dout[at + d] * (1 + a.scale[mod + d]) * a.x[at + d] * r;
    float mean = sum / D;
    for (int d = 0; d < D; d++)
        a.dx[at + d] += r * (a.dout[at + d] * (1 + a.scale[mod + d]) - a.x[at + d] * r * mean);
}
// Backward 1 and 2, columns: dout, x, r -> dshift, dscale [B, stride]. One thread a column of a sample. Reads
// 8 bytes an element: dout and x once more. Neighbours read neighbours, so memory bounds it where B D threads
// keep it busy; but each walks T rows alone, and where samples are few its latency does.
__global__ void __launch_bounds__(256) columns_kernel(const Norm a) {
    int d = blockIdx.x * 256 + threadIdx.x, b = blockIdx.y, D = a.D;
    if (d >= D) return;
    float dshift = 0, dscale = 0;
    for (int n = b * a.T; n < (b + 1) * a.T; n++) {
        float dout = a.dout[(size_t)n * D + d];
        dshift += dout;
        dscale += dout * a.x[(size_t)n * D + d] * a.r[n];
    }
    a.dshift[(size_t)b * a.stride + d] = dshift;
    a.dscale[(size_t)b * a.stride + d] = dscale;
}
static void backward_1(const Norm &a) {
    backward_1_kernel<<<div_up(a.B * a.T, 256), 256>>>(a);
    columns_kernel<<<dim3(div_up(a.D, 256), a.B), 256>>>(a);
}

// dx of one row by one warp. The row is read once and kept in registers, as in forward 4: dn in place of dout
// and n in place of x. COLUMNS: dout and dout n are added to the sums of the lane's columns on the way.
template <int V, bool COLUMNS>
__device__ __forceinline__ void backward_row(const Norm &a, int row, Vec4 (*columns)[V]) {
    int lane = threadIdx.x % 32, D = a.D;
    size_t at = (size_t)row * D, mod = (size_t)(row / a.T) * a.stride;
    Vec4 dn[V], n[V];
    float r = a.r[row], sum = 0;
#pragma unroll
    for (int i = 0, d = lane * 4; i < V && d < D; i++, d += 128) {
        Vec4 dout = read4(a.dout + at + d), x = read4(a.x + at + d), scale = read4(a.scale + mod + d);
        for (int j = 0; j < 4; j++) {
            n[i].x[j] = x.x[j] * r, dn[i].x[j] = dout.x[j] * (1 + scale.x[j]);
            sum += dn[i].x[j] * n[i].x[j];
            if (COLUMNS) columns[0][i].x[j] += dout.x[j], columns[1][i].x[j] += dout.x[j] * n[i].x[j];
        }
    }
    float mean = sum_warp(sum) / D;
#pragma unroll
    for (int i = 0, d = lane * 4; i < V && d < D; i++, d += 128) {
        Vec4 dx = load4(a.dx + at + d);
        for (int j = 0; j < 4; j++) dx.x[j] += r * (dn[i].x[j] - n[i].x[j] * mean);
        store4(a.dx + at + d, dx);
    }
}
// Backward 2: the rows by a warp each; 1 read far apart, and dout and x twice. Reads 12, writes 4 bytes an
// element; the columns, as in 1, read 8 more. Both bound by memory. D and stride are multiples of 4, and D is
// at most 1152.
template <int V> __global__ void __launch_bounds__(256) backward_2_kernel(const Norm a) {
    int row = blockIdx.x * 8 + threadIdx.x / 32;
    if (row < a.B * a.T) backward_row<V, false>(a, row, NULL);
}
static void backward_2(const Norm &a) {
    LAUNCH(backward_2_kernel, div_up(a.B * a.T, 8), 0, a);
    columns_kernel<<<dim3(div_up(a.D, 256), a.B), 256>>>(a);
}

// Backward 3: dx and the column sums in one pass; 2 read dout and x once for each. A block takes `chunk` rows
// of one sample, a warp every eighth of them. A lane has the same columns in every row, so their sums stay in
// its registers; at the end those of the eight warps are added through shared memory [8,D], first dshift's,
// then dscale's, to `parts` [B, chunks, 2, D]. Reads 12, writes 4 bytes an element, and 8 a column and chunk;
// bound by memory: 0.82 GB at B = 256, T = 257, D = 768. The price is 16 V registers a lane: few warps fit a
// multiprocessor, each with 2 V loads of 16 bytes under way at a time. D and stride as in 2.
template <int V> __global__ void __launch_bounds__(256) backward_3_kernel(const Norm a) {
    extern __shared__ float sums[];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, b = blockIdx.y, D = a.D;
    int t0 = blockIdx.x * a.chunk, t1 = min(t0 + a.chunk, a.T);
    Vec4 columns[2][V] = {};                            // of dout, of dout n
    for (int t = t0 + warp; t < t1; t += 8) backward_row<V, true>(a, b * a.T + t, columns);
    float *parts = a.parts + ((size_t)b * a.chunks + blockIdx.x) * 2 * D;
#pragma unroll
    for (int k = 0; k < 2; k++) {
        if (k) __syncthreads();                         // until all have read dshift's
#pragma unroll
        for (int i = 0, d = lane * 4; i < V && d < D; i++, d += 128)
            store4(sums + warp * D + d, columns[k][i]);
        __syncthreads();
        for (int d = threadIdx.x; d < D; d += 256) {
            float sum = 0;
            for (int w = 0; w < 8; w++) sum += sums[w * D + d];
            parts[k * D + d] = sum;
        }
    }
}
// parts -> dshift, dscale [B, stride]: the sums of the chunks, added in order. Reads 8 bytes a column and
// chunk, perhaps from the second-level cache; latency bounds it.
__global__ void __launch_bounds__(256) parts_3_kernel(const Norm a) {
    int d = blockIdx.x * 256 + threadIdx.x, b = blockIdx.y, D = a.D;
    if (d >= D) return;
    float sums[2] = {};
    for (int c = 0; c < a.chunks; c++)
        for (int k = 0; k < 2; k++) sums[k] += a.parts[(((size_t)b * a.chunks + c) * 2 + k) * D + d];
    a.dshift[(size_t)b * a.stride + d] = sums[0];
    a.dscale[(size_t)b * a.stride + d] = sums[1];
}
static void backward_3(const Norm &a) {
    LAUNCH(backward_3_kernel, dim3(a.chunks, a.B), 8 * a.D * sizeof(float), a);
    parts_3_kernel<<<dim3(div_up(a.D, 256), a.B), 256>>>(a);
}

// ----------------------------------------------------------------------------------------------------------
// Each version against double loops, then its time

static const struct Version {
    const char *name;
    bool backward, fours;               // fours: D must be a multiple of 4
    double bytes, sectors, parts;       // bytes an element; in sectors; more of both, a column and chunk
    void (*run)(const Norm &);
} versions[] = {{"forward 1, a thread a row", false, false, 12, 96, 0, forward_1},
                {"forward 2, a block a row", false, false, 12, 12, 0, forward_2},
                {"forward 3, a warp a row", false, false, 12, 12, 0, forward_3},
                {"forward 4, read once, by 16 bytes", false, true, 8, 8, 0, forward_4},
                {"backward 1, a thread a row or column", true, false, 32, 200, 0, backward_1},
                {"backward 2, a warp a row", true, true, 24, 24, 0, backward_2},
                {"backward 3, one pass", true, true, 16, 16, 16, backward_3}};
enum { VERSIONS = sizeof versions / sizeof *versions };

static void must(cudaError_t e, const char *what) {
    if (e == cudaSuccess) return;
    fprintf(stderr, "norm_versions: %s: %s\n", what, cudaGetErrorString(e));
    exit(1);
}
// The arrays on the host and on the device. shift and scale share rows of 3 D with what nobody may touch.
enum { X, MOD, OUT, R, DOUT, DX, DMOD, PARTS, ARRAYS };
struct Problem {
    Norm a;
    vector<float> h[ARRAYS];
    float *d[ARRAYS];
    Problem(int B, int T, int D) {
        const int chunks = div_up(T, 32);
        const size_t rows = (size_t)B * T, n = rows * D, m = (size_t)B * 3 * D;
        const size_t size[ARRAYS] = {n, m, n, rows, n, n, m, (size_t)B * chunks * 2 * D};
        const float span[ARRAYS] = {2, 1, NAN, NAN, 1, 1, 1, NAN};     // evenly between -span and span
        uint32_t state = 1;
        for (int k = 0; k < ARRAYS; k++) {
            h[k].resize(size[k]);
            for (float &x : h[k])
                state = state * 1664525u + 1013904223u, x = span[k] * ((float)(state >> 8) / 8388608 - 1);
            must(cudaMalloc((void **)&d[k], size[k] * sizeof(float)), "cudaMalloc");
            put(k);
        }
        a = {B, T, D, 3 * D, chunks, div_up(T, chunks), d[X], d[MOD], d[MOD] + D, d[OUT], d[R],
             d[DOUT], d[DX], d[DMOD], d[DMOD] + D, d[PARTS]};
    }
    Problem(const Problem &) = delete;
    ~Problem() { for (float *p : d) cudaFree(p); }
    void put(int k) {
        must(cudaMemcpy(d[k], &h[k][0], h[k].size() * 4, cudaMemcpyHostToDevice), "cudaMemcpy");
    }
    void get(int k, vector<float> &to) const {
        to.resize(h[k].size());
        must(cudaMemcpy(&to[0], d[k], to.size() * 4, cudaMemcpyDeviceToHost), "kernel or cudaMemcpy");
    }
};

// How many numbers of a version are wrong, or not the same the second time. NaN is wrong, hence !(<=).
static long check(const Version &v, int B, int T, int D, double *worst) {
    Problem p(B, T, D);
    vector<double> want[ARRAYS];
    for (int d = 0; d < D; d++) p.h[X][d] *= 1e-3f;     // a row where the 1e-6 counts
    for (int k = 0; k < ARRAYS; k++) want[k].assign(p.h[k].begin(), p.h[k].end());
    for (int n = 0; n < B * T; n++) {
        const size_t at = (size_t)n * D, mod = (size_t)(n / T) * 3 * D;
        const double *x = &want[X][at], *dout = &want[DOUT][at], *shift = &want[MOD][mod], *scale = shift + D;
        double *dshift = &want[DMOD][mod], *dscale = dshift + D, sum = 0, mean = 0;
        for (int d = 0; d < D; d++) sum += x[d] * x[d];
        const double r = want[R][n] = 1 / sqrt(sum / D + 1e-6);
        for (int d = 0; d < D; d++) {
            want[OUT][at + d] = x[d] * r * (1 + scale[d]) + shift[d];
            mean += dout[d] * (1 + scale[d]) * x[d] * r / D;
            dshift[d] = (n % T ? dshift[d] : 0) + dout[d];
            dscale[d] = (n % T ? dscale[d] : 0) + dout[d] * x[d] * r;
        }
        for (int d = 0; d < D; d++) want[DX][at + d] += r * (dout[d] * (1 + scale[d]) - x[d] * r * mean);
        if (v.backward) p.h[R][n] = (float)r;
    }
    p.put(X), p.put(R);
    long bad = 0;
    vector<float> got[2][ARRAYS];
    for (auto &g : got) {
        p.put(DX), p.put(DMOD), p.put(PARTS);
        v.run(p.a);
        must(cudaGetLastError(), v.name);
        for (int k : {OUT, R, DX, DMOD}) p.get(k, g[k]);
    }
    for (int k : {v.backward ? DX : OUT, v.backward ? DMOD : R})
        for (size_t i = 0; i < want[k].size(); i++) {
            double error = fabs(got[0][k][i] - want[k][i]) / (1 + fabs(want[k][i]));
            bad += !(error <= 5e-5) || memcmp(&got[0][k][i], &got[1][k][i], 4);
            *worst = fmax(*worst, error);
        }
    return bad;
}

#ifndef CUDA_ON_CPU
#define CUDA_ON_CPU 0
#endif
static double milliseconds(const Version &v, const Norm &a) {       // the mean of 20 runs
    cudaEvent_t event[2];
    float ms = 0;
    for (auto &e : event) must(cudaEventCreate(&e), "cudaEventCreate");
    for (int i = -1; i < 20; i++) {                     // the first warms up
        if (i == 0) must(cudaEventRecord(event[0]), "cudaEventRecord");
        v.run(a);
    }
    must(cudaEventRecord(event[1]), "cudaEventRecord"), must(cudaEventSynchronize(event[1]), v.name);
    must(cudaEventElapsedTime(&ms, event[0], event[1]), "cudaEventElapsedTime");
    return ms / 20;
}

int main(int argc, char **argv) {
    if (argc > 1 && !strcmp(argv[1], "--help"))
        return puts("norm_versions: checks each version of norm_modulate; on a GPU, times it too") < 0;
    if (argc > 1) return fprintf(stderr, "norm_versions: unknown argument '%s'; see --help\n", argv[1]), 2;
    Problem p(CUDA_ON_CPU ? 1 : 256, 257, 768);
    double ms[VERSIONS] = {}, best[2] = {INFINITY, INFINITY};
    for (int i = 0; i < VERSIONS && !CUDA_ON_CPU; i++) {
        ms[i] = milliseconds(versions[i], p.a);
        best[versions[i].backward] = fmin(best[versions[i].backward], ms[i]);
    }
    printf("%-36s %13s  %7s %7s%s\n", "", "error", "bytes", "sectors",
           CUDA_ON_CPU ? "" : "       ms    GB/s  of best");
    int failed = 0;
    for (int i = 0; i < VERSIONS; i++) {
        const Version &v = versions[i];
        long bad = 0;
        double worst = 0, parts = v.parts / p.a.chunk, need = (v.backward ? 16 : 8) * (double)p.h[X].size();
        for (int D : {30, 64, 100, 300, 768, 1152})
            for (int T : {257, 1, 65})
                if (!v.fours || D % 4 == 0) bad += check(v, 2, T, D, &worst);
        failed += bad != 0;
        printf("%-36s %-5s %.1e%c", v.name, bad ? "WRONG" : "ok", worst, v.fours ? '*' : ' ');
        printf(" %7.1f %7.1f", v.bytes + parts, v.sectors + parts);
        if (!CUDA_ON_CPU)
            printf(" %8.3f %7.0f %6.0f %%", ms[i], need / ms[i] * 1e-6, best[v.backward] / ms[i] * 100);
        puts("");
    }
    puts("error: largest / (1 + |value|) in 2 samples of 257, 1, 65 tokens, D = 30, 64, 100, 300, 768, 1152\n"
         "*: D = 30 skipped, since it is no multiple of 4\n"
         "bytes an element, asked for and in sectors, by formula, at T = 257");
    puts(CUDA_ON_CPU ? "no time is measured: the emulator says nothing of speed"
                     : "B = 256, T = 257, D = 768; GB/s of the 8 or 16 bytes an element that must move");
    puts(failed ? "norm_versions: FAILED" : "norm_versions: all good");
    return failed != 0;
}
