// selftest.cu - does cuda_on_cpu do what CUDA does? One small kernel per construct that is supported.
//
//   make test_cuda_on_cpu          in every thread order, with late streams and under the sanitizers
//   nvcc -std=c++17 -arch=sm_80 selftest.cu -lcublasLt && ./a.out      the same on a GPU
//
// The last part is for the CPU only: each planted bug must be reported, in a process of its own. The argument
// no-bugs leaves it out.
#include <cuda_runtime.h>
#include <cuda_bf16.h>
#include <cublasLt.h>
#include <assert.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <functional>
#include <vector>
typedef __nv_bfloat16 bf16;
using std::vector;

#ifndef CUDA_ON_CPU     // the PTX this file uses; cuda_cpu.h has the same functions for the CPU
__device__ __forceinline__ unsigned shared_address(const void *p) {
    return (unsigned)__cvta_generic_to_shared(p);
}
__device__ __forceinline__ void mma_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void ldmatrix(unsigned (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void ldmatrix_trans(unsigned (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void cp_async16(void *shared, const void *global, bool valid = true) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" :: "n"(PENDING) : "memory");
}
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#endif
#define PTX_CHECK_NO_MAIN
#include "../ptx_check.cu"

// ----------------------------------------------------------------------------------------------------------
// Checks, and arrays on the device

static int checks, failed;
static void check(bool good, const char *what, int line) {
    checks++;
    if (good) return;
    failed++;
    printf("selftest.cu:%d: %s\n", line, what);
}
static void must(bool good, const char *what, const char *why, int line) {
    if (good) return;
    printf("selftest.cu:%d: %s: %s\n", line, what, why);
    exit(2);
}
#define CHECK(x) check(x, #x, __LINE__)
#define CUDA(x) do { cudaError_t e_ = (x); must(!e_, #x, cudaGetErrorString(e_), __LINE__); } while (0)
#define LT(x) must((x) == CUBLAS_STATUS_SUCCESS, #x, "not CUBLAS_STATUS_SUCCESS", __LINE__)

template <class T> struct Device {
    T *p = nullptr;
    size_t n;
    explicit Device(size_t count) : n(count) { CUDA(cudaMalloc((void **)&p, n * sizeof(T))); }
    Device(size_t count, T value) : Device(vector<T>(count, value)) {}
    explicit Device(const vector<T> &x) : Device(x.size()) {
        CUDA(cudaMemcpy(p, x.data(), n * sizeof(T), cudaMemcpyHostToDevice));
    }
    Device(const Device &) = delete;
    ~Device() { cudaFree(p); }
    vector<T> get() const {
        vector<T> x(n);
        CUDA(cudaGetLastError());
        CUDA(cudaMemcpy((void *)x.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost));
        return x;
    }
};
template <class T, class F> static vector<T> fill(int n, F f) {
    vector<T> x((size_t)n);
    for (int i = 0; i < n; i++) x[(size_t)i] = (T)f(i);
    return x;
}
template <class T, class F> static bool all(const vector<T> &x, F want) {
    for (size_t i = 0; i < x.size(); i++)
        if (!(x[i] == (T)want((int)i))) return false;
    return true;
}
static float noise(int i) {                         // -1..1, a multiple of 1/64, so exact in bf16
    unsigned x = (unsigned)i * 2654435761u;
    return (float)(int)((x ^ x >> 15) * 2246822519u >> 25) / 64.0f - 1.0f;
}

// ----------------------------------------------------------------------------------------------------------
// Launches, indices, arguments

struct View { float *p; int n; float scale; };
template <int N> struct Vector {
    float x[N];
    __host__ __device__ float &operator[](int i) { return x[i]; }
};
__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
__constant__ float table[4];
__device__ int counter;

__global__ void indices(int *p, int width, int height) {
    int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
    int z = blockIdx.z * blockDim.z + threadIdx.z;
    if (x < width && y < height) p[(z * height + y) * width + x] = x + 100 * y + 10000 * z;
}
template <typename T, int N> __global__ void __launch_bounds__(N) reverse(T *p, int n) {    // N at a time
    __shared__ T s[N];
    int i = blockIdx.x * N + threadIdx.x, here = min(N, n - (int)blockIdx.x * N);
    if (i < n) s[threadIdx.x] = p[i];
    __syncthreads();
    if (i < n) p[i] = s[here - 1 - threadIdx.x];
}
__global__ void by_value(View a, Vector<4> v, const float *none) {
    int i = threadIdx.x;
    if (i < a.n) a.p[i] = a.scale * v[i % 4] + (none ? 1000.0f : 0.0f);
}
template <bool FIRST> __global__ void branch(float *p) {
    if constexpr (FIRST) p[threadIdx.x] = 1;
    else p[threadIdx.x] = 2;
}
__global__ void globals(float *p) {
    if (blockIdx.x == 0) p[threadIdx.x] = table[threadIdx.x % 4];
    atomicAdd(&counter, 1);
}
__global__ void closure(float *p) {
    auto f = [&](int i) { return p[i] * 2 + (float)threadIdx.x; };
    float x = f((threadIdx.x + 1) % blockDim.x);
    __syncthreads();
    p[threadIdx.x] = x;
}
__global__ void talk(int n) {
    if (threadIdx.x == 0 && n) printf("printf in a kernel: %d\n", n);
    assert(n >= 0);
}
#define LAUNCH(kernel, grid, block, ...) kernel<<<grid, block>>>(__VA_ARGS__)

static void test_launches() {
    Device<int> q(7 * 5 * 3, -1);
    indices<<<dim3(2, 2, 3), dim3(4, 4, 1)>>>(q.p, 7, 5);
    CHECK(all(q.get(), [](int i) { return i % 7 + 100 * (i / 7 % 5) + 10000 * (i / 35); }));
    Device<float> p(fill<float>(100, [](int i) { return i; }));
    reverse<float, 64><<<2, 64>>>(p.p, 100);
    CHECK(all(p.get(), [](int i) { return i < 64 ? 63 - i : 163 - i; }));
    Device<double> d(fill<double>(32, [](int i) { return i; }));
    reverse<double, 32> <<<dim3(1), dim3(32)>>> (d.p, 32);
    CHECK(all(d.get(), [](int i) { return 31 - i; }));
    Vector<4> v = {{1, 2, 3, 4}};
    by_value<<<1, 32>>>(View{p.p, 20, 2.0f}, v, nullptr);
    CHECK(p.get()[7] == 8 && p.get()[20] == 43);
    by_value<<<1, 32>>>(View{p.p, 20, 2.0f}, v, NULL);
    CHECK(p.get()[7] == 8);
    by_value<<<1, 32>>>(View{p.p, 20, 2.0f}, v, p.p + p.n);     // one past the end may be passed
    CHECK(p.get()[7] == 1008);
    if (p.n) branch<true><<<1, 32>>>(p.p); else branch<false><<<1, 32>>>(p.p);
    CHECK(p.get()[31] == 1);
    branch<false>
        <<<1,
           32, 0,
           0>>>
        (p.p);
    CHECK(p.get()[31] == 2);
    LAUNCH(branch<true>, ceil_div(1, 32), 32, p.p);
    CHECK(p.get()[31] == 1);
    int zero = 0, count = -1;
    const float values[4] = {1, 2, 3, 4}, last = 9;
    CUDA(cudaMemcpyToSymbol(table, values, sizeof values));
    CUDA(cudaMemcpyToSymbol(table, &last, sizeof last, 3 * sizeof(float)));
    CUDA(cudaMemcpyToSymbol(counter, &zero, sizeof zero));
    globals<<<2, 16>>>(p.p);
    CHECK(p.get()[6] == 3 && p.get()[7] == 9);
    CUDA(cudaMemcpyFromSymbol(&count, counter, sizeof count));
    CHECK(count == 32);
    Device<float> c(fill<float>(64, [](int i) { return i; }));
    closure<<<1, 64>>>(c.p);
    CHECK(all(c.get(), [](int i) { return 2 * ((i + 1) % 64) + i; }));
    talk<<<1, 32>>>(7);
    CUDA(cudaDeviceSynchronize());

    branch<true><<<1, 1025>>>(p.p);                 // launches that cannot be: an error, and nothing happens
    CHECK(cudaPeekAtLastError() == cudaErrorInvalidConfiguration);
    CHECK(cudaGetLastError() == cudaErrorInvalidConfiguration && cudaGetLastError() == cudaSuccess);
    branch<true><<<0, 32>>>(p.p);
    CHECK(cudaGetLastError() == cudaErrorInvalidConfiguration);
    branch<true><<<1, 32, 64 * 1024>>>(p.p);
    CHECK(cudaGetLastError() == cudaErrorInvalidValue);
}

// ----------------------------------------------------------------------------------------------------------
// Shared memory and barriers

struct alignas(16) Pair { float a, b, c, d; };
__global__ void shared_kinds(float *p) {
    __shared__ int total;
    __shared__ Pair pairs[2];
    __shared__ float square[16][17];
    __shared__ volatile float noisy[96];
    const int t = threadIdx.x;
    if (t == 0) { total = 0; pairs[1].d = 5; }
    for (int i = t; i < 256; i += blockDim.x) square[i / 16][i % 16] = (float)i;
    noisy[t] = (float)t;
    __syncthreads();
    atomicAdd(&total, 1);
    __syncthreads();
    p[t] = (float)total + pairs[1].d + square[t % 16][t / 16] + noisy[t ^ 1];
}
__global__ void dynamic_shared(float *p) {
    extern __shared__ __align__(16) unsigned char raw[];
    float *a = reinterpret_cast<float *>(raw);
    int *b = reinterpret_cast<int *>(raw + blockDim.x * sizeof(float));
    a[threadIdx.x] = (float)threadIdx.x;
    b[threadIdx.x] = 1;
    __syncthreads();
    float x = a[blockDim.x - 1 - threadIdx.x] + b[(threadIdx.x + 1) % blockDim.x];
    p[blockIdx.x * blockDim.x + threadIdx.x] = x;
}

struct Sum {
    __device__ static float start() { return 0; }
    __device__ static float of(float a, float b) { return a + b; }
};
struct Largest {
    __device__ static float start() { return -INFINITY; }
    __device__ static float of(float a, float b) { return fmaxf(a, b); }
};
// Each instance of the template has a `partial` of its own, so two may follow each other with one barrier
template <class Op> __device__ __noinline__ float block_reduce(float x) {
    __shared__ float partial[32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int m = 16; m; m /= 2) x = Op::of(x, __shfl_xor_sync(0xffffffffu, x, m));
    if (lane == 0) partial[warp] = x;
    __syncthreads();
    x = lane < (int)blockDim.x / 32 ? partial[lane] : Op::start();
    for (int m = 16; m; m /= 2) x = Op::of(x, __shfl_xor_sync(0xffffffffu, x, m));
    return x;
}
__global__ void softmax(float *p, const float *x, int n) {
    float v = (int)threadIdx.x < n ? x[blockIdx.x * n + threadIdx.x] : -INFINITY;
    float top = block_reduce<Largest>(v);
    float e = expf(v - top), sum = block_reduce<Sum>(e);
    if ((int)threadIdx.x < n) p[blockIdx.x * n + threadIdx.x] = e / sum;
}
__global__ void early_exit(float *p, int n) {       // those who left do not keep the others waiting
    __shared__ float s[64];
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    s[threadIdx.x] = (float)i;
    __syncthreads();
    p[i] = s[threadIdx.x ^ 1];
}
__global__ void barrier_votes(int *p) {
    int t = threadIdx.x;
    int any = __syncthreads_or(t == 5), none = __syncthreads_or(t == 500);
    int all = __syncthreads_and(t < 50), some = __syncthreads_and(t < 49);
    p[t] = any * 1 + none * 10 + all * 100 + some * 1000 + 10000 * __syncthreads_count(t < 7);
}

static void test_shared() {
    Device<float> p(96);
    shared_kinds<<<1, 96>>>(p.p);
    CHECK(all(p.get(), [](int i) { return 96 + 5 + i % 16 * 16 + i / 16 + (i ^ 1); }));
    dynamic_shared<<<2, 48, 48 * (sizeof(float) + sizeof(int))>>>(p.p);
    CHECK(all(p.get(), [](int i) { return 47 - i % 48 + 1; }));
    CUDA(cudaFuncSetAttribute(dynamic_shared, cudaFuncAttributeMaxDynamicSharedMemorySize, 64 * 1024));
    dynamic_shared<<<2, 48, 64 * 1024>>>(p.p);
    CUDA(cudaDeviceSynchronize());
    cudaDeviceProp prop;                            // what the card offers a block, and not a byte more
    CUDA(cudaGetDeviceProperties(&prop, 0));
    const int most = (int)prop.sharedMemPerBlockOptin;
    CUDA(cudaFuncSetAttribute(dynamic_shared, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
    dynamic_shared<<<2, 48, (size_t)most>>>(p.p);
    CUDA(cudaDeviceSynchronize());
    CHECK(cudaFuncSetAttribute(dynamic_shared, cudaFuncAttributeMaxDynamicSharedMemorySize, most + 1) ==
          cudaErrorInvalidValue);
    cudaGetLastError();
    dynamic_shared<<<2, 48, (size_t)most + 1>>>(p.p);
    CHECK(cudaGetLastError() == cudaErrorInvalidValue);

    const int n = 100;
    vector<float> x = fill<float>(3 * n, noise);
    Device<float> in(x), out(3 * n);
    softmax<<<3, 128>>>(out.p, in.p, n);
    vector<float> y = out.get();
    bool good = true;
    for (int row = 0; row < 3; row++) {
        double sum = 0;
        for (int i = 0; i < n; i++) sum += exp((double)x[(size_t)(row * n + i)]);
        for (int i = 0; i < n; i++) {
            size_t at = (size_t)(row * n + i);
            good = good && fabs(y[at] - exp((double)x[at]) / sum) < 1e-6;
        }
    }
    CHECK(good);
    Device<float> e(80, -1.0f);
    early_exit<<<3, 32>>>(e.p, 70);                 // 32, 32, 6 threads stay
    CHECK(all(e.get(), [](int i) { return i < 70 ? i ^ 1 : -1; }));
    Device<int> v(50);
    barrier_votes<<<1, 50>>>(v.p);
    CHECK(all(v.get(), [](int) { return 1 + 100 + 70000; }));
}

// ----------------------------------------------------------------------------------------------------------
// Warps

__global__ void shuffles(int *p) {
    const int t = threadIdx.x, x = 100 * (t / 32) + t % 32;
    int *out = p + t * 8;
    out[0] = __shfl_sync(0xffffffffu, x, 5);
    out[1] = __shfl_sync(0xffffffffu, x, t + 1);                // the lane wraps
    out[2] = __shfl_sync(0xffffffffu, x, 1, 4);                 // within segments of 4
    out[3] = __shfl_xor_sync(0xffffffffu, x, 16);
    out[4] = __shfl_up_sync(0xffffffffu, x, 3);
    out[5] = __shfl_up_sync(0xffffffffu, x, 1, 8);
    out[6] = __shfl_down_sync(0xffffffffu, x, 3);
    out[7] = __shfl_down_sync(0xffffffffu, x, 2, 16);
}
__global__ void partial_masks(float *p) {           // the halves of a warp do different things
    float x = (float)threadIdx.x;
    if (threadIdx.x < 16) for (int m = 8; m; m /= 2) x += __shfl_xor_sync(0x0000ffffu, x, m);
    else x = __shfl_sync(0xffff0000u, x, 20);
    p[threadIdx.x] = x;
}
__global__ void votes(unsigned *p) {
    const int t = threadIdx.x;
    unsigned *out = p + t * 8;
    out[0] = __ballot_sync(0xffffffffu, t % 3 == 0);
    out[1] = (unsigned)__any_sync(0xffffffffu, t == 40);
    out[2] = (unsigned)__all_sync(0xffffffffu, t < 32);
    out[3] = __popc(__ballot_sync(0xffffffffu, t >= 30));
#if defined(CUDA_ON_CPU) || __CUDA_ARCH__ >= 800
    out[4] = (unsigned)__reduce_add_sync(0xffffffffu, t % 32 - 16);
    out[5] = (unsigned)__reduce_max_sync(0xffffffffu, t * 7 % 32 - 40);
    out[6] = __reduce_min_sync(0xffffffffu, (unsigned)(t * 7 % 32 + 3));
#endif
    out[7] = (unsigned)(__ffs((int)out[0]) + 100 * __clz((int)out[3]));
}
__global__ void last_warp(int *p) {                 // 40 threads: the second warp has 8
    int x = threadIdx.x;
    for (int m = 4; m; m /= 2) x += __shfl_xor_sync(threadIdx.x < 32 ? 0xffffffffu : 0xffu, x, m);
    p[threadIdx.x] = x;
}
__global__ void warp_shared(int *p) {               // what one lane writes the others see after __syncwarp
    __shared__ int s[64];
    int t = threadIdx.x, x = t;
    for (int i = 0; i < 5; i++) {
        s[t] = x;
        __syncwarp();
        x = s[t ^ (1 << i)] + 1;
        __syncwarp();
    }
    p[t] = x;
}
__global__ void shuffle_types(float *p) {
    const int t = threadIdx.x;
    double d = __shfl_xor_sync(0xffffffffu, t * 0.5, 1);
    bf16 h = __shfl_xor_sync(0xffffffffu, __float2bfloat16((float)t), 1);
    __nv_bfloat162 h2 = __shfl_xor_sync(0xffffffffu, __floats2bfloat162_rn((float)t, (float)-t), 1);
    long long l = __shfl_sync(0xffffffffu, (long long)t << 40, 3);
    p[t] = (float)d + __bfloat162float(h) * 100 + __high2float(h2) * 10000 + (float)(l >> 40) * 0.125f;
}

static void test_warps() {
    Device<int> p(64 * 8);
    shuffles<<<1, 64>>>(p.p);
    CHECK(all(p.get(), [](int i) {
        int t = i / 8, w = 100 * (t / 32), l = t % 32;
        int want[8] = {w + 5, w + (l + 1) % 32, w + l / 4 * 4 + 1, w + (l ^ 16), w + (l < 3 ? l : l - 3),
                       w + (l % 8 < 1 ? l : l - 1), w + (l > 28 ? l : l + 3), w + (l % 16 > 13 ? l : l + 2)};
        return want[i % 8];
    }));
    Device<float> f(32);
    partial_masks<<<1, 32>>>(f.p);
    CHECK(all(f.get(), [](int i) { return i < 16 ? 120 : 20; }));
    Device<unsigned> v(64 * 8, 0u);
    votes<<<1, 64>>>(v.p);
    CHECK(all(v.get(), [](int i) {
        unsigned third = i / 8 < 32 ? 0x49249249u : 0x92492492u, high = i / 8 < 32 ? 2 : 32;
        unsigned want[8] = {third, i / 8 >= 32, i / 8 < 32, high, (unsigned)-16, (unsigned)-9, 3,
                            (i / 8 < 32 ? 1u : 2u) + 100 * (i / 8 < 32 ? 30 : 26)};
        return want[i % 8];
    }));
    Device<int> w(40), q(64);
    last_warp<<<1, 40>>>(w.p);
    CHECK(w.get()[3] == 28 && w.get()[39] == 32 * 8 + 28);
    warp_shared<<<1, 64>>>(q.p);
    CHECK(all(q.get(), [](int i) { return (i ^ 31) + 5; }));
    shuffle_types<<<1, 32>>>(f.p);
    CHECK(all(f.get(), [](int i) { int j = i ^ 1; return j * 0.5f + j * 100 - j * 10000 + 3 * 0.125f; }));
}

// ----------------------------------------------------------------------------------------------------------
// Atomics, and blocks that work together

__global__ void atomics(int *p, unsigned *u, float *f, __nv_bfloat162 *h, unsigned long long *l) {
    const int t = blockIdx.x * blockDim.x + threadIdx.x;
    atomicAdd(&p[0], t);
    atomicSub(&p[1], t);
    atomicMax(&p[2], t);
    atomicMin(&p[3], -t);
    atomicOr(&p[4], 1 << t % 8);
    if (t == 9) atomicExch(&p[5], 42);
    atomicCAS(&p[6], 0, 7);                         // only the first finds 0
    atomicInc(&u[0], 9);                            // 0..9 and round again
    atomicAdd(&f[0], 0.5f);
    atomicAdd(h, __floats2bfloat162_rn(1.0f, 2.0f));
    atomicAdd(l, 1ull << 33);
}
// The last block to finish adds up what the others left
__global__ void last_block(float *out, float *part, int *done) {
    __shared__ bool last;
    if (threadIdx.x == 0) {
        part[blockIdx.x] = (float)blockIdx.x;
        __threadfence();
        last = atomicAdd(done, 1) == (int)gridDim.x - 1;
    }
    __syncthreads();
    if (last && threadIdx.x == 0) {
        float sum = 0;
        for (unsigned i = 0; i < gridDim.x; i++) sum += __ldcg(&part[i]);
        *out = sum;
    }
}

static void test_atomics() {
    Device<int> p(7, 0);
    Device<unsigned> u(1, 0u);
    Device<float> f(1, 0.0f), part(10);
    Device<__nv_bfloat162> h(vector<__nv_bfloat162>(1, __floats2bfloat162_rn(0, 0)));
    Device<unsigned long long> l(1, 0ull);
    atomics<<<2, 48>>>(p.p, u.p, f.p, h.p, l.p);
    const int want[7] = {4560, -4560, 95, -95, 255, 42, 7};
    CHECK(all(p.get(), [&](int i) { return want[i]; }));
    CHECK(u.get()[0] == 96 % 10 && f.get()[0] == 48 && l.get()[0] == 96ull << 33);
    CHECK(__low2float(h.get()[0]) == 96 && __high2float(h.get()[0]) == 192);
    Device<int> done(1, 0);
    last_block<<<10, 32>>>(f.p, part.p, done.p);
    CHECK(f.get()[0] == 45);
}

// ----------------------------------------------------------------------------------------------------------
// Types and functions

__global__ void bf16_arithmetic(float *p, const bf16 *x) {
    const int t = threadIdx.x;
    bf16 a = x[t], b = __float2bfloat16(2.0f);
    __nv_bfloat162 v = __halves2bfloat162(a, a * b + __float2bfloat16_rn(1.0f));
    v = __hmul2(v, v);
    p[t] = __low2float(v) + 1000 * __bfloat162float(v.y);
}
__global__ void wide_access(float4 *p, const float4 *x) {
    float4 v = __ldg(&x[threadIdx.x]);
    float *e = reinterpret_cast<float *>(&v);
    e[2] += 1;
    float4 w = __ldcs(&x[threadIdx.x]);
    int4 zero = {0, 0, 0, 0};
    v = make_float4(v.x + w.w, v.y, v.z, v.w + (float)zero.x);
    __stcs(&p[threadIdx.x], v);
}
__global__ void functions(float *p, unsigned *u) {
    const float x = 0.3f + 0.1f * (float)threadIdx.x;
    float *out = p + threadIdx.x * 16;
    out[0] = rsqrtf(x), out[1] = __expf(x), out[2] = __logf(x), out[3] = __log2f(x);
    out[4] = __sinf(x), out[5] = __cosf(x), out[6] = __powf(x, 1.5f), out[7] = __fdividef(1.0f, x);
    out[8] = __frcp_rn(x), out[9] = __fmaf_rn(x, x, 1.0f), out[10] = __saturatef(x + 0.5f);
    out[11] = __int_as_float(__float_as_int(x)), out[12] = __uint_as_float(__float_as_uint(x));
    out[13] = __fadd_rn(x, __fmul_rn(x, x)), out[14] = max(x, 0.5f), out[15] = exp2_approx(x) + min(x, 0.0f);
    if (threadIdx.x == 0) u[0] = __umulhi(0xd2511f53u, 0x12345678u), u[1] = (unsigned)__float2int_rn(2.5f);
}

static void test_types() {
    Device<bf16> x(fill<bf16>(32, [](int i) { return __float2bfloat16((float)(i % 8)); }));
    Device<float> p(32);
    bf16_arithmetic<<<1, 32>>>(p.p, x.p);
    CHECK(all(p.get(), [](int i) { int a = i % 8, b = 2 * a + 1; return a * a + 1000 * b * b; }));
    Device<float4> q(fill<float4>(16, [](int i) { return make_float4((float)i, 1, 2, 3); })), r(16);
    wide_access<<<1, 16>>>(r.p, q.p);
    vector<float4> y = r.get();
    CHECK(y[5].x == 8 && y[5].y == 1 && y[5].z == 3 && y[5].w == 3);
    Device<float> f(32 * 16);
    Device<unsigned> u(2);
    functions<<<1, 32>>>(f.p, u.p);
    vector<float> z = f.get();
    bool good = true;
    for (int i = 0; i < 32; i++) {
        const double t = 0.3f + 0.1f * (float)i;
        const double want[16] = {1 / sqrt(t), exp(t), log(t), log2(t), sin(t), cos(t), pow(t, 1.5), 1 / t,
                                 1 / t, t * t + 1, fmin(t + 0.5, 1), t, t, t + t * t, fmax(t, 0.5), exp2(t)};
        for (int j = 0; j < 16; j++)
            good = good && fabs(z[(size_t)(i * 16 + j)] - want[j]) < 1e-5 * (1 + fabs(want[j]));
    }
    CHECK(good);
    CHECK(u.get()[0] == (unsigned)((0xd2511f53ull * 0x12345678u) >> 32) && u.get()[1] == 2);
}

// ----------------------------------------------------------------------------------------------------------
// Tensor cores and cp.async together: c[m,n] = a[m,k] b[k,n], tiles of 64 x 64 x 32, two buffers, four warps.
// k must be a multiple of 32, n of 8.

constexpr int TILE = 64, DEPTH = 32;
struct Buffers { bf16 a[2][TILE][DEPTH + 8], b[2][DEPTH][TILE + 8]; };      // 8: no bank conflicts

__global__ void __launch_bounds__(128) product(float *c, const bf16 *a, const bf16 *b, int m, int n, int k) {
    extern __shared__ __align__(16) unsigned char raw[];
    Buffers &s = *reinterpret_cast<Buffers *>(raw);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row0 = blockIdx.y * TILE, col0 = blockIdx.x * TILE;
    auto load = [&](int buffer, int k0) {
        for (int i = threadIdx.x; i < TILE * DEPTH / 8; i += blockDim.x) {
            int r = i / (DEPTH / 8), q = i % (DEPTH / 8) * 8;
            bool in = row0 + r < m;
            cp_async16(&s.a[buffer][r][q], a + (size_t)(in ? row0 + r : 0) * k + k0 + q, in);
        }
        for (int i = threadIdx.x; i < DEPTH * TILE / 8; i += blockDim.x) {
            int r = i / (TILE / 8), q = i % (TILE / 8) * 8;
            bool in = col0 + q < n;
            cp_async16(&s.b[buffer][r][q], b + (size_t)(k0 + r) * n + (in ? col0 + q : 0), in);
        }
    };
    float sum[8][4] = {};
    load(0, 0);
    cp_async_commit();
    for (int k0 = 0; k0 < k; k0 += DEPTH) {
        const int now = k0 / DEPTH % 2;
        if (k0 + DEPTH < k) load(!now, k0 + DEPTH);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();                            // everybody's part of the tile is there
        for (int i = 0; i < DEPTH / 16; i++) {
            unsigned fa[4];
            ldmatrix(fa, &s.a[now][warp * 16 + lane % 16][i * 16 + lane / 16 * 8]);
            for (int j = 0; j < 8; j += 2) {
                unsigned fb[4];
                ldmatrix_trans(fb, &s.b[now][i * 16 + lane % 16][j * 8 + lane / 16 * 8]);
                mma_bf16(sum[j], fa, {fb[0], fb[1]});
                mma_bf16(sum[j + 1], fa, {fb[2], fb[3]});
            }
        }
        __syncthreads();                            // nobody needs it any more
    }
    for (int j = 0; j < 8; j++)
        for (int i = 0; i < 4; i++) {
            int row = row0 + warp * 16 + i / 2 * 8 + lane / 4, col = col0 + j * 8 + lane % 4 * 2 + i % 2;
            if (row < m && col < n) c[(size_t)row * n + col] = sum[j][i];
        }
}

static void test_tensor_cores() {
    CHECK(ptx_check::run(true) == 0);
    const int m = 100, n = 72, k = 160;
    vector<bf16> a = fill<bf16>(m * k, [](int i) { return __float2bfloat16(noise(i)); });
    vector<bf16> b = fill<bf16>(k * n, [](int i) { return __float2bfloat16(noise(i + 77777)); });
    Device<bf16> da(a), db(b);
    Device<float> c(m * n);
    product<<<dim3(ceil_div(n, TILE), ceil_div(m, TILE)), 128, sizeof(Buffers)>>>(c.p, da.p, db.p, m, n, k);
    CHECK(all(c.get(), [&](int i) {                 // multiples of 2^-12 below 160: exact
        double sum = 0;
        for (int l = 0; l < k; l++)
            sum += (double)__bfloat162float(a[(size_t)(i / n * k + l)]) *
                   (double)__bfloat162float(b[(size_t)(l * n + i % n)]);
        return sum;
    }));
}

// ----------------------------------------------------------------------------------------------------------
// Streams, events, memory, the device

__global__ void add(float *p, float x) { p[threadIdx.x] += x; }
__global__ void scale(float *p, float x) { p[threadIdx.x] *= x; }

static void test_host() {
    cudaStream_t s, t;
    cudaEvent_t from, to;
    CUDA(cudaStreamCreate(&s));
    CUDA(cudaStreamCreateWithFlags(&t, cudaStreamNonBlocking));
    CUDA(cudaEventCreate(&from));
    CUDA(cudaEventCreateWithFlags(&to, cudaEventDefault));
    float *pinned, *p, ms = -1;
    CUDA(cudaMallocHost((void **)&pinned, 64 * sizeof(float)));
    CUDA(cudaMalloc((void **)&p, 64 * sizeof(float)));
    for (int i = 0; i < 64; i++) pinned[i] = (float)i;
    CUDA(cudaEventRecord(from, s));
    CUDA(cudaMemsetAsync(p, 0, 64 * sizeof(float), s));
    CUDA(cudaMemcpyAsync(p, pinned, 64 * sizeof(float), cudaMemcpyHostToDevice, s));
    add<<<1, 64, 0, s>>>(p, 1);
    CUDA(cudaEventRecord(to, s));
    CUDA(cudaStreamWaitEvent(t, to, 0));            // without it t may be first
    scale<<<1, 64, 0, t>>>(p, 10);
    CUDA(cudaMemcpyAsync(pinned, p, 64 * sizeof(float), cudaMemcpyDeviceToHost, t));
#ifdef CUDA_ON_CPU
    const char *async = getenv("CUDA_CPU_ASYNC");
    CHECK(pinned[5] == (async && *async == '1' ? 5 : 60));      // too early: late streams show it
#endif
    CUDA(cudaStreamSynchronize(t));
    CHECK(pinned[5] == 60);
    CUDA(cudaEventSynchronize(to));
    CHECK(cudaEventQuery(to) == cudaSuccess);
    CUDA(cudaEventElapsedTime(&ms, from, to));
    CHECK(ms >= 0 && ms < 60000);
    CUDA(cudaMemset(p, 0, 32 * sizeof(float)));
    CUDA(cudaMemcpy(pinned, p, 64 * sizeof(float), cudaMemcpyDeviceToHost));
    CHECK(pinned[31] == 0 && pinned[32] == 330);
    add<<<1, 64, 0, s>>>(p, 1);
    CUDA(cudaMemcpy(pinned, p, sizeof(float), cudaMemcpyDefault));  // the null stream waits for s
    CHECK(pinned[0] == 1);
    CUDA(cudaDeviceSynchronize());
    CUDA(cudaEventDestroy(from));
    CUDA(cudaEventDestroy(to));
    CUDA(cudaStreamDestroy(s));
    CUDA(cudaStreamDestroy(t));
    CUDA(cudaFree(p));
    CUDA(cudaFree(nullptr));
    CUDA(cudaFreeHost(pinned));

    cudaDeviceProp prop;
    int count = 0, device = -1, driver = 0, runtime = 0, processors = 0, blocks = 0;
    size_t available = 0, total = 0;
    CUDA(cudaGetDeviceCount(&count));
    CUDA(cudaSetDevice(0));
    CUDA(cudaGetDevice(&device));
    CUDA(cudaGetDeviceProperties(&prop, 0));
    CUDA(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, 0));
    CUDA(cudaDriverGetVersion(&driver));
    CUDA(cudaRuntimeGetVersion(&runtime));
    CUDA(cudaMemGetInfo(&available, &total));
    CUDA(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, add, 64, 0));
    CHECK(count >= 1 && device == 0 && prop.major >= 8 && prop.warpSize == 32 && prop.name[0]);
    CHECK(processors == prop.multiProcessorCount && driver >= runtime && blocks >= 1);
    CHECK(runtime == CUDART_VERSION && available <= total && total > 0);
    CHECK(cudaGetErrorString(cudaErrorInvalidValue)[0]);
}

// ----------------------------------------------------------------------------------------------------------
// Graphs: captured work is not done, but again at every launch, with the arguments of the capture; what may
// not be captured is refused and spoils the capture

__global__ void set_to(float *p, float x) { p[threadIdx.x] = x; }
__global__ void add_from(float *p, const float *x) { p[threadIdx.x] += x[threadIdx.x]; }

static void test_graphs() {
    cudaStream_t s, t, other;
    cudaEvent_t forked, joined, before;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cudaStreamCaptureStatus status;
    CUDA(cudaStreamCreate(&s));
    CUDA(cudaStreamCreate(&t));
    CUDA(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking));
    CUDA(cudaEventCreate(&forked));
    CUDA(cudaEventCreate(&joined));
    CUDA(cudaEventCreate(&before));
    CUDA(cudaEventRecord(before, other));
    Device<float> p(32, 1.0f), q(32, 0.0f);
    // x = 2 on s; then p += 3 beside q = 5 on t; then p += q
    auto work = [&](float x) {
        add<<<1, 32, 0, s>>>(p.p, x);
        cudaEventRecord(forked, s);
        cudaStreamWaitEvent(t, forked, 0);
        add<<<1, 32, 0, s>>>(p.p, 3);
        cudaMemsetAsync(q.p, 0, 128, t);
        set_to<<<1, 32, 0, t>>>(q.p, 5);
        cudaEventRecord(joined, t);
        cudaStreamWaitEvent(s, joined, 0);
        add_from<<<1, 32, 0, s>>>(p.p, q.p);
    };
    CUDA(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal));
    float x = 2;
    work(x);
    x = 100;
    CUDA(cudaStreamIsCapturing(t, &status));
    CHECK(status == cudaStreamCaptureStatusActive);
    CUDA(cudaStreamIsCapturing(other, &status));
    CHECK(status == cudaStreamCaptureStatusNone);
    CUDA(cudaStreamEndCapture(s, &graph));
    size_t nodes = 0;
    CUDA(cudaGraphGetNodes(graph, nullptr, &nodes));
    CHECK(nodes == 5);
    CUDA(cudaGraphInstantiateWithFlags(&exec, graph, 0));
    CUDA(cudaGraphDestroy(graph));                  // the copy lives on
    CUDA(cudaStreamSynchronize(s));
    CHECK(p.get()[7] == 1 && q.get()[7] == 0);      // nothing was done
    for (int turn = 1; turn <= 3; turn++) {
        CUDA(cudaGraphLaunch(exec, s));
        add<<<1, 32, 0, s>>>(p.p, 0.5f);
        CUDA(cudaStreamSynchronize(s));
        CHECK(p.get()[31] == 1 + 10.5f * turn && q.get()[0] == 5);
    }
    CUDA(cudaGraphExecDestroy(exec));
    // one mistake each; the capture is spoilt, and the streams are as good as before
    float on_host[32];
    float *memory;
    std::function<cudaError_t()> mistakes[] = {
        [&] { return cudaStreamSynchronize(s); },
        [&] { return cudaDeviceSynchronize(); },
        [&] { return cudaEventSynchronize(before); },
        [&] { cudaEventRecord(forked, s); return cudaEventQuery(forked); },
        [&] { return cudaStreamWaitEvent(s, before, 0); },
        [&] { return cudaMalloc((void **)&memory, 128); },
        [&] { return cudaMemcpy(on_host, p.p, 128, cudaMemcpyDeviceToHost); },
        [&] { return cudaMemcpyAsync(p.p, on_host, 128, cudaMemcpyHostToDevice, s); },
        [&] { add<<<1, 32>>>(p.p, 1); return cudaGetLastError(); },
    };
    cudaError_t refusals[] = {
        cudaErrorStreamCaptureUnsupported, cudaErrorStreamCaptureImplicit, cudaErrorStreamCaptureUnsupported,
        cudaErrorCapturedEvent, cudaErrorStreamCaptureIsolation, cudaErrorStreamCaptureUnsupported,
        cudaErrorStreamCaptureImplicit, cudaErrorStreamCaptureUnsupported, cudaErrorStreamCaptureImplicit};
    for (int i = 0; i < 9; i++) {
        CUDA(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal));
        add<<<1, 32, 0, s>>>(p.p, 1);
        CHECK(mistakes[i]() == refusals[i]);
        add<<<1, 32, 0, s>>>(p.p, 1);
        CHECK(cudaGetLastError() == cudaErrorStreamCaptureInvalidated);
        CHECK(cudaStreamEndCapture(s, &graph) == cudaErrorStreamCaptureInvalidated && !graph);
        cudaGetLastError();
    }
    CUDA(cudaStreamBeginCapture(s, cudaStreamCaptureModeGlobal));
    add<<<1, 32, 0, s>>>(p.p, 1);
    CUDA(cudaEventRecord(forked, s));
    CUDA(cudaStreamWaitEvent(t, forked, 0));
    add<<<1, 32, 0, t>>>(q.p, 1);
    CHECK(cudaStreamEndCapture(s, &graph) == cudaErrorStreamCaptureUnjoined && !graph);
    cudaGetLastError();
    CHECK(cudaStreamWaitEvent(s, forked, 0) == cudaErrorCapturedEvent);     // of a capture that is over
    cudaGetLastError();
    CHECK(p.get()[3] == 1 + 10.5f * 3);
    add<<<1, 32, 0, s>>>(p.p, 1);
    CUDA(cudaStreamSynchronize(s));
    CHECK(p.get()[3] == 2 + 10.5f * 3);
    CUDA(cudaEventDestroy(forked));
    CUDA(cudaEventDestroy(joined));
    CUDA(cudaEventDestroy(before));
    CUDA(cudaStreamDestroy(s));
    CUDA(cudaStreamDestroy(t));
    CUDA(cudaStreamDestroy(other));
}

// ----------------------------------------------------------------------------------------------------------
// cuBLASLt: every epilogue, type, transposition, order and batch against naive loops

enum Type { FLOATS, BF16_TO_BF16, BF16_TO_FLOAT };
static const char *const type_names[] = {"float", "bf16", "bf16 to float"};
struct Case {
    Type type;
    cublasLtEpilogue_t epilogue;
    bool ta, tb;                                    // transposed
    float alpha, beta;
    int batch;
    bool rows;                                      // row-major instead of column-major
};
static double gelu_tanh(double x) { return tanh(sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)); }
static double gelu(double x) { return 0.5 * x * (1 + gelu_tanh(x)); }
static double gelu_slope(double x) {
    double t = gelu_tanh(x);
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * sqrt(2 / M_PI) * (1 + 3 * 0.044715 * x * x);
}

struct Numbers {                                    // the same on both sides, in one of the two types
    bool wide;
    vector<float> host;
    void *p = nullptr;
    Numbers(bool is_float, size_t n, int seed) : wide(is_float) {
        host = fill<float>((int)n, [&](int i) { return noise(i + seed); });
        CUDA(cudaMalloc(&p, n * size()));
        vector<bf16> narrow = fill<bf16>((int)n, [&](int i) { return __float2bfloat16(host[(size_t)i]); });
        const void *from = wide ? (void *)host.data() : (void *)narrow.data();
        CUDA(cudaMemcpy(p, from, n * size(), cudaMemcpyHostToDevice));
    }
    Numbers(const Numbers &) = delete;
    ~Numbers() { cudaFree(p); }
    size_t size() const { return wide ? 4 : 2; }
    vector<float> get() const {
        vector<float> x(host.size());
        vector<bf16> narrow(host.size());
        void *to = wide ? (void *)x.data() : (void *)narrow.data();
        CUDA(cudaMemcpy(to, p, host.size() * size(), cudaMemcpyDeviceToHost));
        if (!wide) x = fill<float>((int)x.size(), [&](int i) { return __bfloat162float(narrow[(size_t)i]); });
        return x;
    }
};

// D[m,n] = epilogue(alpha op(A)[m,k] op(B)[k,n] + beta C[m,n]). Returns false if the library does not do it.
static bool blas_case(cublasLtHandle_t handle, const Case &c) {
    const int m = 24, n = 20, k = 40, ld_pad = 8, aux_ld = m + 8;       // m, and ld of aux: multiples of 8
    const bool in_float = c.type == FLOATS, out_float = c.type != BF16_TO_BF16;
    const cudaDataType in = in_float ? CUDA_R_32F : CUDA_R_16BF, out = out_float ? CUDA_R_32F : CUDA_R_16BF;
    const int bits = c.epilogue;
    const bool adds_bias = bits & 4, gives_bias = bits & (16 | 256 | 512), uses_gelu = bits & 32;
    const bool uses_slope = bits & 64, uses_aux = bits & 128;
    struct Shape { int rows, cols, ld; size_t size; } a, b, d;
    auto shape = [&](int rows, int cols) {
        int ld = (c.rows ? cols : rows) + ld_pad;
        return Shape{rows, cols, ld, (size_t)ld * (size_t)(c.rows ? rows : cols)};
    };
    a = c.ta ? shape(k, m) : shape(m, k);
    b = c.tb ? shape(n, k) : shape(k, n);
    d = shape(m, n);
    const size_t batch = (size_t)c.batch, aux_size = (size_t)aux_ld * n;
    Numbers A(in_float, a.size * batch, 1), B(in_float, b.size * batch, 100000);
    Numbers C(out_float, d.size * batch, 200000), D(out_float, d.size * batch, 300000);
    Numbers bias(out_float, (size_t)(m > n ? m : n), 400000), aux(out_float, aux_size * batch, 500000);
    Numbers workspace(true, 1 << 20, 0);

    cublasLtMatmulDesc_t product;
    cublasLtMatrixLayout_t la, lb, ld;
    cublasLtMatmulPreference_t preference;
    LT(cublasLtMatmulDescCreate(&product, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    LT(cublasLtMatrixLayoutCreate(&la, in, (uint64_t)a.rows, (uint64_t)a.cols, a.ld));
    LT(cublasLtMatrixLayoutCreate(&lb, in, (uint64_t)b.rows, (uint64_t)b.cols, b.ld));
    LT(cublasLtMatrixLayoutCreate(&ld, out, (uint64_t)d.rows, (uint64_t)d.cols, d.ld));
    auto set = [&](cublasLtMatmulDescAttributes_t which, auto value) {
        LT(cublasLtMatmulDescSetAttribute(product, which, &value, sizeof value));
    };
    set(CUBLASLT_MATMUL_DESC_TRANSA, c.ta ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(CUBLASLT_MATMUL_DESC_TRANSB, c.tb ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(CUBLASLT_MATMUL_DESC_EPILOGUE, c.epilogue);
    if (adds_bias || gives_bias) set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias.p);
    if (adds_bias || gives_bias) set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, out);
    if (uses_aux) {
        set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, aux.p);
        set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, (int64_t)aux_ld);
        if (batch > 1) set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_BATCH_STRIDE, (int64_t)aux_size);
    }
    const Shape *shapes[] = {&a, &b, &d};
    cublasLtMatrixLayout_t layouts[] = {la, lb, ld};
    for (int i = 0; i < 3; i++) {
        auto put = [&](cublasLtMatrixLayoutAttribute_t which, auto value) {
            LT(cublasLtMatrixLayoutSetAttribute(layouts[i], which, &value, sizeof value));
        };
        if (c.rows) put(CUBLASLT_MATRIX_LAYOUT_ORDER, (int32_t)CUBLASLT_ORDER_ROW);
        put(CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, (int32_t)c.batch);
        put(CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, (int64_t)shapes[i]->size);
    }
    size_t room = 4 << 20;
    const auto most = CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
    LT(cublasLtMatmulPreferenceCreate(&preference));
    LT(cublasLtMatmulPreferenceSetAttribute(preference, most, &room, sizeof room));
    cublasLtMatmulHeuristicResult_t found[4];
    int count = 0;
    bool possible = cublasLtMatmulAlgoGetHeuristic(handle, product, la, lb, ld, ld, preference, 4, found,
                                                   &count) == CUBLAS_STATUS_SUCCESS;
    possible = possible && count > 0;
    if (possible)
        LT(cublasLtMatmul(handle, product, &c.alpha, A.p, la, B.p, lb, &c.beta, C.p, ld, D.p, ld,
                          &found[0].algo, workspace.p, room, 0));
    CUDA(cudaDeviceSynchronize());
    LT(cublasLtMatmulPreferenceDestroy(preference));
    for (cublasLtMatrixLayout_t layout : layouts) LT(cublasLtMatrixLayoutDestroy(layout));
    LT(cublasLtMatmulDescDestroy(product));
    if (!possible) return false;

    // the same by naive loops
    auto at = [&](const Shape &s, size_t batch, int row, int col) {
        return batch * s.size + (size_t)(c.rows ? row * s.ld + col : col * s.ld + row);
    };
    vector<float> got = D.get(), got_bias = bias.get(), got_aux = aux.get(), want = D.host;
    vector<float> want_bias = bias.host, want_aux = aux.host;
    for (size_t e = 0; e < batch; e++) {
        vector<double> sums((size_t)(m > n ? m : n));
        for (int i = 0; i < m; i++)
            for (int j = 0; j < n; j++) {
                double x = 0;
                for (int l = 0; l < k; l++) {
                    double u = A.host[c.ta ? at(a, e, l, i) : at(a, e, i, l)];
                    double v = B.host[c.tb ? at(b, e, j, l) : at(b, e, l, j)];
                    x += u * v;
                    if (bits & 256 && j == 0) sums[(size_t)i] += u;
                    if (bits & 512 && i == 0) sums[(size_t)j] += v;
                }
                x = c.alpha * x + (c.beta != 0 ? c.beta * C.host[at(d, e, i, j)] : 0);
                const size_t q = e * aux_size + (size_t)(j * aux_ld + i);
                if (adds_bias) x += bias.host[(size_t)i];
                if (uses_slope) x *= gelu_slope(aux.host[q]);
                else if (uses_aux) want_aux[q] = (float)x;
                if (uses_gelu) x = gelu(x);
                want[at(d, e, i, j)] = (float)x;
                if (bits & 16) sums[(size_t)i] += x;
            }
        if (gives_bias)
            for (int i = 0; i < (bits & 512 ? n : m); i++) want_bias[(size_t)i] = (float)sums[(size_t)i];
    }
    const double tolerance = out_float ? 2e-5 : 1.0 / 128;     // one rounding to bf16 of a sum in float
    auto near = [&](const vector<float> &x, const vector<float> &y, double size) {
        for (size_t i = 0; i < x.size(); i++)
            if (!(fabs(x[i] - y[i]) <= tolerance * (size + fabs(y[i])))) return false;
        return true;
    };
    const bool good = near(got, want, 1) && near(got_aux, want_aux, 1) && near(got_bias, want_bias, 8);
    if (!good)
        printf("cublasLt: %s, epilogue %d, op %c%c, alpha %g, beta %g, batch %d, %s-major: wrong\n",
               type_names[c.type], (int)c.epilogue, "NT"[c.ta], "NT"[c.tb], c.alpha, c.beta, c.batch,
               c.rows ? "row" : "column");
    CHECK(good);
    return true;
}

static void test_blas() {
    cublasLtHandle_t handle;
    LT(cublasLtCreate(&handle));
    const cublasLtEpilogue_t plain = CUBLASLT_EPILOGUE_DEFAULT, with_aux = CUBLASLT_EPILOGUE_GELU_AUX;
    const cublasLtEpilogue_t epilogues[] = {
        plain, CUBLASLT_EPILOGUE_BIAS, CUBLASLT_EPILOGUE_GELU, CUBLASLT_EPILOGUE_GELU_BIAS, with_aux,
        CUBLASLT_EPILOGUE_GELU_AUX_BIAS, CUBLASLT_EPILOGUE_DGELU, CUBLASLT_EPILOGUE_DGELU_BGRAD,
        CUBLASLT_EPILOGUE_BGRADA, CUBLASLT_EPILOGUE_BGRADB};
    vector<Case> cases;
    for (Type type : {FLOATS, BF16_TO_BF16, BF16_TO_FLOAT}) {
        for (int op = 0; op < 4; op++) {
            for (cublasLtEpilogue_t e : epilogues)
                cases.push_back({type, e, op % 2 > 0, op > 1, 1, 0, 1, false});
            cases.push_back({type, plain, op % 2 > 0, op > 1, 1, 0, 2, true});
        }
        cases.push_back({type, plain, true, false, 0.5f, 1, 1, false});
        cases.push_back({type, CUBLASLT_EPILOGUE_BIAS, true, false, 2, -0.5f, 1, false});
        cases.push_back({type, plain, false, true, 1, 1, 3, false});
        cases.push_back({type, with_aux, true, false, 1, 0, 3, false});
    }
    int refused = 0;
    for (const Case &c : cases) refused += !blas_case(handle, c);
    if (refused) printf("cublasLt: %d of %d cases are not supported here\n", refused, (int)cases.size());
#ifdef CUDA_ON_CPU
    const char *mood = getenv("CUDA_CPU_CUBLAS");
    CHECK(mood && strcmp(mood, "kind") ? refused > 0 : refused == 0);
#endif
    LT(cublasLtDestroy(handle));
}

// ----------------------------------------------------------------------------------------------------------
// Planted bugs: each must end its process with the right message

#ifdef CUDA_ON_CPU
#include <sys/wait.h>
#include <unistd.h>
#ifndef __has_feature
#define __has_feature(x) 0
#endif
#if defined(__SANITIZE_ADDRESS__) || __has_feature(address_sanitizer)
constexpr char SANITIZER = 'a';
#elif defined(__SANITIZE_THREAD__) || __has_feature(thread_sanitizer)
constexpr char SANITIZER = 't';
#elif __has_feature(memory_sanitizer)
constexpr char SANITIZER = 'm';
#else
constexpr char SANITIZER = '-';
#endif

__global__ void bug_two_barriers(float *p) {
    if (threadIdx.x < 32) __syncthreads();
    else { p[0] = 1; __syncthreads(); }
}
__global__ void bug_deadlock(float *p) {
    if (threadIdx.x < 48) __syncthreads();
    else p[0] = __shfl_sync(0xffffffffu, 1.0f, 0);
}
__global__ void bug_exited_lane(float *p) {
    if (threadIdx.x == 3) return;
    p[threadIdx.x] = __shfl_sync(0xffffffffu, 1.0f, 0);
}
__global__ void bug_not_in_mask(float *p) { p[threadIdx.x] = __shfl_sync(0xffffu, 1.0f, 0); }
__global__ void bug_absent_source(float *p) {
    if (threadIdx.x < 16) p[threadIdx.x] = __shfl_sync(0xffffu, 1.0f, 20);
}
__global__ void bug_write_past_end(float *p) { p[threadIdx.x + 1] = 0; }
__global__ void bug_misaligned_copy(float *p) {
    __shared__ float s[8];
    cp_async16(&s[1], p);
}
__global__ void bug_row_not_shared(float *p) {
    unsigned r[4];
    ldmatrix(r, p);
    p[threadIdx.x] = (float)r[0];
}
__global__ void bug_past_shared(float *p) {
    __shared__ float s[32];
    s[threadIdx.x + 1] = 0;
    p[threadIdx.x] = s[threadIdx.x];
}
__global__ void bug_past_dynamic(float *p) {
    extern __shared__ float s[];
    s[threadIdx.x] = 0;
    p[threadIdx.x] = s[threadIdx.x];
}
__global__ void bug_race_between_warps(float *p) {
    __shared__ float s[64];
    s[threadIdx.x] = 1;
    p[threadIdx.x] = s[threadIdx.x ^ 32];           // no barrier
}
__global__ void bug_race_in_warp(float *p) {
    __shared__ float s[32];
    s[threadIdx.x] = 1;
    p[threadIdx.x] = s[threadIdx.x ^ 1];            // no __syncwarp
}
__global__ void bug_race_between_blocks(float *p) { if (threadIdx.x == 0) p[0] += 1; }
__global__ void bug_missing_fence(float *out, float *part, int *done) {
    if (threadIdx.x) return;
    part[blockIdx.x] = 1;
    if (atomicAdd(done, 1) == (int)gridDim.x - 1) *out = part[0] + part[1];
}
__global__ void bug_unwritten(float *p) { if (threadIdx.x != 5) p[threadIdx.x] = 1; }
__global__ void bug_copy_past_end(float *p) {       // never waited for, and yet read
    __shared__ float4 s[32];
    cp_async16(&s[threadIdx.x], p + 4 * (threadIdx.x + 1));
    cp_async_commit();
}
__global__ void bug_no_wait(float *p) {
    __shared__ float4 s[32];
    cp_async16(&s[threadIdx.x], p + 4 * threadIdx.x);
    cp_async_commit();
    p[threadIdx.x] = s[threadIdx.x].x;
}

// Bugs that show in the results instead of a message: the process says so and ends with status 1
static void expect_ones(const vector<float> &x) {
    for (float y : x)
        if (!(y == 1)) fprintf(stderr, "wrong result\n"), exit(1);
}
struct Bug {
    const char *name;
    void (*run)();
    const char *plain, *address, *thread, *memory;  // the message without, with a sanitizer; null: not seen
};
static const char *const RACE = "data race", *const PAST = "use-after-poison", *const WRONG = "wrong result";
static const char *const UNWRITTEN = "uninitialized";
#define RUNTIME(message) message, nullptr, nullptr, nullptr     // found by cuda_cpu.cpp, with or without
static const Bug bugs[] = {
    {"threads at different barriers", [] { Device<float> p(64); bug_two_barriers<<<1, 64>>>(p.p); },
     RUNTIME("different __syncthreads")},
    {"deadlock", [] { Device<float> p(64); bug_deadlock<<<1, 64>>>(p.p); }, RUNTIME("wait for ever")},
    {"mask names a lane that exited", [] { Device<float> p(32); bug_exited_lane<<<1, 32>>>(p.p); },
     RUNTIME("lanes that have exited")},
    {"caller not in its mask", [] { Device<float> p(32); bug_not_in_mask<<<1, 32>>>(p.p); },
     RUNTIME("not in its own mask")},
    {"shuffle from a lane that takes no part", [] { Device<float> p(32); bug_absent_source<<<1, 32>>>(p.p); },
     RUNTIME("takes no part")},
    {"host pointer as an argument", [] { static float x[64]; branch<true><<<1, 32>>>(x); },
     RUNTIME("no device memory")},
    {"cudaMemcpy in the wrong direction",
     [] { Device<float> p(64); float x[64]; cudaMemcpy(x, p.p, sizeof x, cudaMemcpyHostToDevice); },
     RUNTIME("wrong direction")},
    {"cudaMemcpy past the end",
     [] { Device<float> p(64), q(64); cudaMemcpy(q.p, p.p + 1, 256, cudaMemcpyDeviceToDevice); },
     RUNTIME("past the end")},
    {"cudaFree twice", [] { Device<float> p(64); cudaFree(p.p); }, RUNTIME("cudaMalloc did not return")},
    {"misaligned cp.async", [] { Device<float> p(64, 1.0f); bug_misaligned_copy<<<1, 1>>>(p.p); },
     RUNTIME("misaligned")},
    {"ldmatrix from global memory", [] { Device<float> p(128, 1.0f); bug_row_not_shared<<<1, 32>>>(p.p); },
     RUNTIME("outside shared memory")},
    {"cp.async without a wait",
     [] { Device<float> p(128, 1.0f); bug_no_wait<<<1, 32>>>(p.p); expect_ones(p.get()); }, RUNTIME(WRONG)},
    {"write past an allocation", [] { Device<float> p(64); bug_write_past_end<<<1, 64>>>(p.p); },
     "behind an allocation", "heap-buffer-overflow", "behind an allocation", nullptr},
    {"cp.async from past an allocation",
     [] { Device<float> p(128, 1.0f); bug_copy_past_end<<<1, 32>>>(p.p); },
     nullptr, "heap-buffer-overflow", nullptr, nullptr},
    {"the host touches device memory", [] { Device<float> p(64, 1.0f); volatile float x = p.p[3]; (void)x; },
     nullptr, PAST, nullptr, nullptr},
    {"write past a shared array", [] { Device<float> p(32); bug_past_shared<<<1, 32>>>(p.p); },
     nullptr, "index 32 out of bounds", nullptr, nullptr},
    {"too little dynamic shared memory", [] { Device<float> p(32); bug_past_dynamic<<<1, 32, 64>>>(p.p); },
     nullptr, PAST, nullptr, nullptr},
    {"race between warps",
     [] { Device<float> p(64); bug_race_between_warps<<<1, 64>>>(p.p); expect_ones(p.get()); },
     WRONG, WRONG, RACE, UNWRITTEN},
    {"race in a warp", [] { Device<float> p(32); bug_race_in_warp<<<1, 32>>>(p.p); expect_ones(p.get()); },
     WRONG, WRONG, RACE, UNWRITTEN},
    {"race between blocks", [] { Device<float> p(1, 0.0f); bug_race_between_blocks<<<4, 32>>>(p.p); },
     nullptr, nullptr, RACE, nullptr},
    {"missing fence",
     [] { Device<float> p(3, 1.0f); Device<int> n(1, 0); bug_missing_fence<<<2, 32>>>(p.p, p.p + 1, n.p); },
     nullptr, nullptr, RACE, nullptr},
    {"result that nobody wrote",
     [] { Device<float> p(32); bug_unwritten<<<1, 32>>>(p.p); expect_ones(p.get()); },
     WRONG, WRONG, WRONG, UNWRITTEN},
};

static void test_bugs() {
    int seen = 0, wanted = 0;
    for (const Bug &bug : bugs) {
        const char *message = SANITIZER == 'a'   ? bug.address
                              : SANITIZER == 't' ? bug.thread
                              : SANITIZER == 'm' ? bug.memory
                                                 : bug.plain;
        if (!message) continue;
        int channel[2];
        if (pipe(channel)) exit(2);
        fflush(stdout);
        pid_t child = fork();
        if (child == 0) {
            dup2(channel[1], 2);
            close(channel[0]), close(channel[1]);
            bug.run();
            cudaDeviceSynchronize();
            exit(0);
        }
        close(channel[1]);
        static char text[1 << 16];
        size_t length = 0;
        for (ssize_t n = 1; n > 0; length += (size_t)n)
            if ((n = read(channel[0], text + length, sizeof text - 1 - length)) <= 0) break;
        text[length] = 0;
        close(channel[0]);
        int status = 0;
        waitpid(child, &status, 0);
        const bool reported = status != 0 && strstr(text, message);
        seen += reported, wanted++;
        if (!reported) printf("planted bug not reported as \"%s\": %s\n%s", message, bug.name, text);
        CHECK(reported);
    }
    printf("planted bugs: %d of %d reported\n", seen, wanted);
}
#endif

int main(int argc, char **argv) {
    const bool plant = argc < 2 || strcmp(argv[1], "no-bugs");      // valgrind reports those of children too
    test_launches();
    test_shared();
    test_warps();
    test_atomics();
    test_types();
    test_tensor_cores();
    test_host();
    test_graphs();
    test_blas();
#ifdef CUDA_ON_CPU
    if (plant) test_bugs();
#endif
    (void)plant;
    printf("selftest: %d checks, %d failed\n", checks, failed);
    return failed != 0;
}
