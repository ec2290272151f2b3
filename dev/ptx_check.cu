// ptx_check.cu - do the PTX wrappers do what their kernels believe?
//
// Random bits go through each wrapper of train_srdit.cu and are compared with plain C++ written down from the
// fragment tables of the PTX manual (mma.m16n8k16, ldmatrix), not from any kernel. On a GPU this checks the
// wrappers and that reading of the tables; emulated, it checks the CPU twins in cuda_on_cpu against the same
// model. The hashes cover what is exact, so the two runs must print the same ones.
//
//   nvcc -std=c++17 -O3 -arch=sm_80 dev/ptx_check.cu -o build/ptx_check -lcublasLt && build/ptx_check
//   make ptx_check_emu && ./ptx_check_emu
//
// dev/cuda_on_cpu/selftest.cu includes this file, with its own copy of the wrappers.
#include <cuda_runtime.h>
#include <cuda_bf16.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vector>
#if !defined(CUDA_ON_CPU) && !defined(PTX_CHECK_NO_MAIN)
#define TRAIN_SRDIT_CU_NO_MAIN
#include "../train_srdit.cu"
using gpu::mma_bf16, gpu::ldmatrix, gpu::ldmatrix_trans, gpu::exp2_approx;
using gpu::cp_async16, gpu::cp_async_commit, gpu::cp_async_wait;
#endif

namespace ptx_check {
using std::vector;

// ----------------------------------------------------------------------------------------------------------
// One kernel a wrapper: a warp or two, registers from and to global memory

__global__ void mma_kernel(float *d, const unsigned *a, const unsigned *b) {       // d[tile][lane][4], ...
    const size_t at = (size_t)blockIdx.x * 32 + threadIdx.x;
    unsigned ra[4], rb[2];
    float rd[4];
    for (int i = 0; i < 4; i++) ra[i] = a[at * 4 + i], rd[i] = d[at * 4 + i];
    for (int i = 0; i < 2; i++) rb[i] = b[at * 2 + i];
    mma_bf16(rd, ra, rb);
    for (int i = 0; i < 4; i++) d[at * 4 + i] = rd[i];
}

// rows[block][64] of 16 bytes; lane l points at row which[block][l]
template <bool TRANS> __global__ void ldmatrix_kernel(unsigned *out, const uint4 *rows, const int *which) {
    __shared__ uint4 tile[64];
    tile[threadIdx.x] = rows[blockIdx.x * 64 + threadIdx.x];
    tile[threadIdx.x + 32] = rows[blockIdx.x * 64 + threadIdx.x + 32];
    __syncwarp();
    const size_t at = (size_t)blockIdx.x * 32 + threadIdx.x;
    unsigned r[4];
    if (TRANS) ldmatrix_trans(r, &tile[which[at]]);
    else ldmatrix(r, &tile[which[at]]);
    for (int i = 0; i < 4; i++) out[at * 4 + i] = r[i];
}

// 64 threads copy two groups of 64 pieces to shuffled places; out has what is there after each wait
__global__ void cp_async_kernel(uint4 *out, const uint4 *in, const int *from, const int *to,
                                const int *valid) {
    __shared__ uint4 buffer[128];
    const int t = threadIdx.x;
    for (int g = 0; g < 2; g++) {
        const int i = blockIdx.x * 128 + g * 64 + t;
        cp_async16(&buffer[to[i]], &in[from[i]], valid[i]);
        cp_async_commit();
    }
    cp_async_wait<1>();
    out[(blockIdx.x * 3 + 0) * 64 + t] = buffer[to[blockIdx.x * 128 + t]];     // its own, of the first group
    cp_async_wait<0>();
    __syncthreads();
    out[(blockIdx.x * 3 + 1) * 64 + t] = buffer[t];
    out[(blockIdx.x * 3 + 2) * 64 + t] = buffer[64 + t];
}

__global__ void exp2_kernel(float *out, const float *in, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = exp2_approx(in[i]);
}

// ----------------------------------------------------------------------------------------------------------
// The host's side

static uint32_t state = 1;
static uint32_t random_bits() {                     // a linear congruence, upper half first
    uint32_t x = 0;
    for (int i = 0; i < 2; i++) state = state * 1664525u + 1013904223u, x = x << 16 | state >> 16;
    return x;
}
static int random_below(int n) { return (int)(((uint64_t)random_bits() * (uint64_t)n) >> 32); }
static vector<int> shuffled(int n) {
    vector<int> p((size_t)n);
    for (int i = 0; i < n; i++) p[(size_t)i] = i;
    for (int i = n - 1; i > 0; i--) std::swap(p[(size_t)i], p[(size_t)random_below(i + 1)]);
    return p;
}
static float from_bf16(uint16_t x) {
    uint32_t u = (uint32_t)x << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}
static uint16_t to_bf16_exact(float f) {            // of a number that is one
    uint32_t u;
    memcpy(&u, &f, 4);
    return (uint16_t)(u >> 16);
}

static void must(cudaError_t e, const char *what) {
    if (e == cudaSuccess) return;
    fprintf(stderr, "ptx_check: %s: %s\n", what, cudaGetErrorString(e));
    exit(2);
}
template <class T> struct Array {                   // on the device
    T *p = nullptr;
    size_t n;
    explicit Array(const vector<T> &x) : n(x.size()) {
        must(cudaMalloc((void **)&p, n * sizeof(T)), "cudaMalloc");
        must(cudaMemcpy(p, x.data(), n * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
    }
    Array(const Array &) = delete;
    ~Array() { cudaFree(p); }
    vector<T> get() const {
        vector<T> x(n);
        must(cudaDeviceSynchronize(), "kernel");
        must(cudaMemcpy(x.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
        return x;
    }
};

static uint64_t hash(const void *p, size_t n) {     // FNV-1a
    uint64_t h = 14695981039346656037u;
    for (size_t i = 0; i < n; i++) h = (h ^ ((const unsigned char *)p)[i]) * 1099511628211u;
    return h;
}
static int failures, quiet;
template <class T> static void report(const char *name, int bad, const vector<T> &exact, const char *note) {
    failures += bad != 0;
    if (bad || !quiet) {
        printf("%-34s %-4s ", name, bad ? "FAIL" : "ok");
        if (exact.empty()) printf("%s\n", note);
        else printf("hash %016llx\n", (unsigned long long)hash(exact.data(), exact.size() * sizeof(T)));
    }
    if (bad) printf("    %d values are not what the manual's tables say\n", bad);
}

// mma.m16n8k16, .bf16: where element i of a lane's fragment lies. Element i is half i % 2 of register i / 2.
struct Place { int row, col; };
static Place a_place(int lane, int i) {             // i = 0..7
    return {lane / 4 + (i < 2 || (i >= 4 && i < 6) ? 0 : 8), lane % 4 * 2 + (i & 1) + (i < 4 ? 0 : 8)};
}
static Place b_place(int lane, int i) { return {lane % 4 * 2 + (i & 1) + (i < 2 ? 0 : 8), lane / 4}; }
static Place d_place(int lane, int i) { return {lane / 4 + (i < 2 ? 0 : 8), lane % 4 * 2 + (i & 1)}; }

// Exact: whole numbers whose sums need few bits. Else any sign and mantissa, exponents in a range of 2^range;
// then the sums round, in an order and width of the hardware's own.
static void check_mma(const char *name, int tiles, int range) {
    const bool exact = range == 0;
    vector<uint16_t> a((size_t)tiles * 256), b((size_t)tiles * 128);    // [tile][lane][8], [tile][lane][4]
    vector<float> c((size_t)tiles * 128);
    auto number = [&](int most) {
        if (exact) return to_bf16_exact((float)(random_below(2 * most + 1) - most));
        uint32_t exponent = (uint32_t)(127 - range / 2 + random_below(range + 1));
        return (uint16_t)((random_bits() & 0x807f) | exponent << 7);
    };
    for (uint16_t &x : a) x = number(100);
    for (uint16_t &x : b) x = number(100);
    for (float &x : c) x = exact ? (float)(random_below(200001) - 100000) : from_bf16(number(0));
    vector<unsigned> ra((size_t)tiles * 128), rb((size_t)tiles * 64);
    memcpy(ra.data(), a.data(), a.size() * 2);      // element 0 in the lower half
    memcpy(rb.data(), b.data(), b.size() * 2);
    Array<unsigned> da(ra), db(rb);
    Array<float> dd(c);
    mma_kernel<<<tiles, 32>>>(dd.p, da.p, db.p);
    vector<float> d = dd.get();

    int bad = 0;
    double worst = 0;
    for (int tile = 0; tile < tiles; tile++) {
        double A[16][16], B[16][8];
        for (int lane = 0; lane < 32; lane++) {
            const size_t at = (size_t)tile * 32 + (size_t)lane;
            for (int i = 0; i < 8; i++) {
                Place p = a_place(lane, i);
                A[p.row][p.col] = from_bf16(a[at * 8 + (size_t)i]);
            }
            for (int i = 0; i < 4; i++) {
                Place p = b_place(lane, i);
                B[p.row][p.col] = from_bf16(b[at * 4 + (size_t)i]);
            }
        }
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < 4; i++) {
                const size_t at = ((size_t)tile * 32 + (size_t)lane) * 4 + (size_t)i;
                Place p = d_place(lane, i);
                double want = c[at], size = fabs(c[at]);
                for (int k = 0; k < 16; k++) {
                    want += A[p.row][k] * B[k][p.col];
                    size += fabs(A[p.row][k] * B[k][p.col]);
                }
                double error = fabs(d[at] - want) / size * 8388608;     // in 2^-23 of the sum of the sizes
                if (!(error <= (exact ? 0 : 16))) bad++;        // a unit a term, if they are cut off
                if (!(error <= worst)) worst = error;
            }
    }
    char note[64] = "";
    if (!exact) snprintf(note, sizeof note, "largest error %.2f x 2^-23 of |a||b|", worst);
    report(name, bad, exact ? d : vector<float>(), note);
}

// ldmatrix: lane 8i + r points at row r of matrix i. Register i of lane l has two elements of matrix i, at
// (l / 4, 2 (l % 4)) and the next in the row, or, transposed, (2 (l % 4), l / 4) and the next in the column.
template <bool TRANS> static void check_ldmatrix(const char *name, int blocks) {
    vector<uint16_t> rows((size_t)blocks * 64 * 8);
    vector<int> which;
    for (uint16_t &x : rows) x = (uint16_t)random_bits();
    for (int i = 0; i < blocks; i++) {
        vector<int> p = shuffled(64);
        which.insert(which.end(), p.begin(), p.begin() + 32);
    }
    vector<uint4> packed((size_t)blocks * 64);
    memcpy((void *)packed.data(), rows.data(), rows.size() * 2);
    Array<uint4> in(packed);
    Array<int> lanes(which);
    Array<unsigned> out(vector<unsigned>((size_t)blocks * 128));
    ldmatrix_kernel<TRANS><<<blocks, 32>>>(out.p, in.p, lanes.p);
    vector<unsigned> got = out.get();
    int bad = 0;
    for (int block = 0; block < blocks; block++)
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < 4; i++)
                for (int half = 0; half < 2; half++) {
                    int row = lane / 4, col = lane % 4 * 2 + half;
                    if (TRANS) std::swap(row, col);
                    int source = which[(size_t)(block * 32 + i * 8 + row)];
                    unsigned want = rows[((size_t)block * 64 + (size_t)source) * 8 + (size_t)col];
                    bad += (got[(size_t)((block * 32 + lane) * 4 + i)] >> (16 * half) & 0xffff) != want;
                }
    report(name, bad, got, "");
}

static void check_cp_async(const char *name, int blocks) {
    const int n = blocks * 128;
    vector<uint4> in((size_t)n);
    vector<int> from = shuffled(n), to, valid((size_t)n);
    for (uint4 &x : in) x.x = random_bits(), x.y = random_bits(), x.z = random_bits(), x.w = random_bits();
    for (int &x : valid) x = random_below(4) != 0;
    for (int i = 0; i < blocks; i++) {
        vector<int> p = shuffled(128);
        to.insert(to.end(), p.begin(), p.end());
    }
    Array<uint4> din(in), out(vector<uint4>((size_t)blocks * 192));
    Array<int> dfrom(from), dto(to), dvalid(valid);
    cp_async_kernel<<<blocks, 64>>>(out.p, din.p, dfrom.p, dto.p, dvalid.p);
    vector<uint4> got = out.get(), want(got.size());
    for (int i = 0; i < n; i++) {
        uint4 x = valid[(size_t)i] ? in[(size_t)from[(size_t)i]] : make_uint4(0, 0, 0, 0);
        int block = i / 128, t = i % 128;
        want[(size_t)(block * 192 + 64 + to[(size_t)i])] = x;
        if (t < 64) want[(size_t)(block * 192 + t)] = x;
    }
    int bad = 0;
    for (size_t i = 0; i < got.size(); i++) bad += memcmp(&got[i], &want[i], 16) != 0;
    report(name, bad, got, "");
}

static void check_exp2(const char *name, int n) {
    vector<float> x((size_t)n);
    for (int i = 0; i < n; i++) x[(size_t)i] = (float)random_bits() / 4294967296.0f * 280 - 150;
    const float special[] = {0, -INFINITY, -200, -126, -127.5f, 1, 127, 128, INFINITY};
    memcpy(x.data(), special, sizeof special);
    Array<float> in(x), out(vector<float>((size_t)n));
    exp2_kernel<<<(n + 127) / 128, 128>>>(out.p, in.p, n);
    vector<float> got = out.get();
    int bad = 0;
    double worst = 0;
    for (int i = 0; i < n; i++) {
        double want = exp2((double)x[(size_t)i]), y = got[(size_t)i];
        if (want >= ldexp(1, 128)) bad += y != (double)INFINITY;
        else if (want < ldexp(1, -126)) bad += y != 0;          // .ftz: no subnormal results
        else {
            double error = fabs(y - want) / want * 4194304;     // in 2^-22
            if (!(error <= 2)) bad++;
            if (!(error <= worst)) worst = error;
        }
    }
    char note[64];
    snprintf(note, sizeof note, "largest relative error %.2f x 2^-22", worst);
    report(name, bad, vector<float>(), note);
}

// Returns the number of wrappers that failed
static int run(bool only_failures) {
    quiet = only_failures;
    failures = 0;
    state = 1;
    check_mma("mma m16n8k16, whole numbers", 64, 0);
    check_mma("mma m16n8k16, any mantissa", 64, 4);
    check_mma("mma m16n8k16, exponents over 2^40", 64, 40);
    check_ldmatrix<false>("ldmatrix.x4", 32);
    check_ldmatrix<true>("ldmatrix.x4.trans", 32);
    check_cp_async("cp.async 16, wait_group", 16);
    check_exp2("ex2.approx.ftz", 4096);
    return failures;
}
} // namespace ptx_check

#ifndef PTX_CHECK_NO_MAIN
int main() {
    int failed = ptx_check::run(false);
    printf(failed ? "ptx_check: %d FAILED\n" : "ptx_check: all good\n", failed);
    return failed != 0;
}
#endif
