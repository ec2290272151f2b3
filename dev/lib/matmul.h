// The matrix product, where nearly all the time goes, and what else must use whole vectors to be fast: exp, dot
// products, rows of softmax. This is the only file with vector types (the GNU ones that gcc and clang share).
//
//   matmul          C = op(A) op(B) (+ bias, or + C), by all threads; not inside a parallel region
//   matmul_small    the same by one thread, on parts of larger matrices, as attention needs for each head
#ifndef SRDIT_MATMUL_H
#define SRDIT_MATMUL_H
#include "base.h"
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"   // a program takes what it needs

// The matrix product, where nearly all the time goes. In its naive form:
//
//     for (i < M) for (j < N) {
//         c[i][j] = bias ? bias[j] : add ? c[i][j] : 0;
//         for (k < K) c[i][j] += (ta ? a[k][i] : a[i][k]) * (tb ? b[j][k] : b[k][j]);
//     }
//
// Two changes make it some hundred times faster. A tile of MR x NR sums stays in registers while k runs, so
// that each value loaded is used MR or NR times; and b is first copied into panels NR columns wide, so that
// it is read in order. The sum over k is cut into blocks that fit the cache. Every element is summed in one
// fixed order, so the bits do not depend on the number of threads. Vectors are the GNU type that gcc and
// clang share.

enum {
#if defined(__AVX512F__)
    VBYTES = 64, MR = 8,
#elif defined(__AVX__)
    VBYTES = 32, MR = 6,                // 16 registers: 6 x 2 sums, 2 of b, 1 of a
#else
    VBYTES = 16, MR = 6,
#endif
    VL = VBYTES / sizeof(real), NV = 2, NR = NV * VL,   // a tile is NV vectors wide
    KC = 512, MC = 128                  // at most KC steps of k in a block; MC rows at a time
};
typedef real vec __attribute__((vector_size(VBYTES), aligned(sizeof(real)), may_alias));
typedef real quad __attribute__((vector_size(4 * sizeof(real)), aligned(sizeof(real)), may_alias));
#if defined(__clang__)   // the sums stay in registers only if every loop over a tile is unrolled
#define UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__) && !defined(__CUDACC__)
#define UNROLL _Pragma("GCC unroll 32")
#else
#define UNROLL
#endif

// c[mr][nr] = (bias, or c, or 0) + a[mr][kc] b[kc][nv vectors]; inlined, so that mr and nv are constants.
// Element (i, k) of a lies at a[i si + k sk], so that a may stand as it is or turned.
static inline __attribute__((always_inline))
void matmul_tile(real *c, long ldc, int mr, int nv, int nr, int kc, const real *a, long si, long sk,
                 const real *b, long ldb, const real *bias, int add) {
    vec sum[MR][NV];
    const vec zero = {0};
    int narrow = nr < nv * (int)VL;                         // stored by way of edge
    UNROLL for (int i = 0; i < mr; i++) UNROLL for (int v = 0; v < nv; v++) {
        sum[i][v] = zero;
        __builtin_prefetch(c + i * ldc + v * VL, 1);        // c comes from memory while the sums are made
    }
    for (int k = 0; k < kc; k++) {
        UNROLL for (int v = 0; v < nv; v++) __builtin_prefetch(b + (k + 16) * ldb + v * VL);   // if in place
        UNROLL for (int i = 0; i < mr; i++) UNROLL for (int v = 0; v < nv; v++)
            sum[i][v] += a[i * si + k * sk] * ((const vec *)(b + k * ldb))[v];
    }
    UNROLL for (int i = 0; i < mr; i++) {
        real edge[NR], *to = narrow ? edge : c + i * ldc;
        for (int j = 0; j < NR && narrow; j++)
            edge[j] = j >= nr ? 0 : bias ? bias[j] : add ? c[i * ldc + j] : 0;
        UNROLL for (int v = 0; v < nv; v++) {
            vec *p = (vec *)to + v;
            *p = sum[i][v] + (narrow ? *p : bias ? ((const vec *)bias)[v] : add ? *p : zero);
        }
        for (int j = 0; j < nr && narrow; j++) c[i * ldc + j] = edge[j];
    }
}

// out[n][m] = in[m][n]^T by squares of 4 x 4; ldo and ldi are the lengths of the rows in memory
static void transpose(real *out, long ldo, const real *in, long ldi, int m, int n) {
    for (int j = 0; j < n; j += 4)
        for (int i = 0; i < m; i += 4) {
            const real *s = in + i * ldi + j;
            real *d = out + j * ldo + i;
            if (i + 4 <= m && j + 4 <= n) {
#if defined(__has_builtin) && !defined(__CUDACC__)
#if __has_builtin(__builtin_shufflevector)
                quad r0 = *(const quad *)s, r1 = *(const quad *)(s + ldi);
                quad r2 = *(const quad *)(s + 2 * ldi), r3 = *(const quad *)(s + 3 * ldi);
                quad t0 = __builtin_shufflevector(r0, r2, 0, 4, 1, 5);
                quad t1 = __builtin_shufflevector(r0, r2, 2, 6, 3, 7);
                quad t2 = __builtin_shufflevector(r1, r3, 0, 4, 1, 5);
                quad t3 = __builtin_shufflevector(r1, r3, 2, 6, 3, 7);
                *(quad *)d = __builtin_shufflevector(t0, t2, 0, 4, 1, 5);
                *(quad *)(d + ldo) = __builtin_shufflevector(t0, t2, 2, 6, 3, 7);
                *(quad *)(d + 2 * ldo) = __builtin_shufflevector(t1, t3, 0, 4, 1, 5);
                *(quad *)(d + 3 * ldo) = __builtin_shufflevector(t1, t3, 2, 6, 3, 7);
                continue;
#endif
#endif
            }
            for (int y = 0; y < imin(4, n - j); y++)
                for (int x = 0; x < imin(4, m - i); x++) d[y * ldo + x] = s[x * ldi + y];
        }
}

// Columns j0 ... j0+nr of kc rows of op(B), copied to a panel [kc][NR]; B points at row 0 of the block
static void matmul_panel(real *to, const real *B, long ldb, int tb, int j0, int nr, int kc) {
    if (nr < NR) memset(to, 0, sizeof(real) * (size_t)kc * NR);
    if (tb) transpose(to, NR, B + j0 * ldb, ldb, nr, kc);
    else
        for (int k = 0; k < kc; k++) memcpy(to + k * NR, B + k * ldb + j0, sizeof(real) * (size_t)nr);
}

// Rows 0 ... m of C += those of a (element (i, k) at a[i si + k sk]) times all panels; b in panels, or
// (ldb > 0) read in place
static void matmul_rows(real *C, long ldc, int m, int N, int kc, const real *a, long si, long sk,
                        const real *b, long ldb, const real *bias, int add) {
    long step = ldb ? ldb : (long)NR;
    for (int j = 0; j < N; j += NR) {
        const real *bj = ldb ? b + j : b + (long)j * kc, *bi = bias ? bias + j : NULL;
        int nr = imin(NR, N - j), one = nr <= (int)VL;       // the last panel may need only one vector
        for (int i = 0; i < m;) {
            real *c = C + i * ldc + j;
            const real *ai = a + i * si;
            if (i + MR <= m) {
                if (one) matmul_tile(c, ldc, MR, 1, nr, kc, ai, si, sk, bj, step, bi, add);
                else matmul_tile(c, ldc, MR, NV, nr, kc, ai, si, sk, bj, step, bi, add);
                i += MR;
            } else {
                if (one) matmul_tile(c, ldc, 1, 1, nr, kc, ai, si, sk, bj, step, bi, add);
                else matmul_tile(c, ldc, 1, NV, nr, kc, ai, si, sk, bj, step, bi, add);
                i++;
            }
        }
    }
}

// This thread's part of a scratch memory with `each` elements a thread
static real *thread_work(real *work, size_t each) { return work + (size_t)omp_get_thread_num() * each; }

// Nothing here but for the tests of train_srdit.cu (TEST_CUDA): there the CPU can round the operands of its
// products, and what passes through `stored`, to bf16 where the GPU does. What that changes measures what the
// GPU may be off by.
#ifndef TEST_CUDA
static inline void stored(real *x, size_t n) { (void)x, (void)n; }
#else
static int round_like_gpu;
static void round_bf16(real *x, size_t n) {
    for (size_t i = 0; i < n; i++) {
        float f = (float)x[i];
        uint32_t bits;
        memcpy(&bits, &f, 4);
        bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;   // to nearest, ties to even
        memcpy(&f, &bits, 4);
        x[i] = f;
    }
}
static void stored(real *x, size_t n) {
    if (round_like_gpu) round_bf16(x, n);
}
static real *rounded_copy(const real *x, long ld, int rows, int cols) {
    real *copy = (real *)alloc_zero((size_t)rows * (size_t)cols, sizeof(real));
    for (int i = 0; i < rows; i++) memcpy(copy + (size_t)i * cols, x + i * ld, sizeof(real) * (size_t)cols);
    round_bf16(copy, (size_t)rows * (size_t)cols);
    return copy;
}
#endif

// C[M,N] = op(A)[M,K] op(B)[K,N] (+ bias, or + C where add). Matrices are whole; op transposes where ta, tb.
// Memory for panels is kept between calls (so this is not for use inside a parallel region: see
// matmul_small).
static void matmul(real *C, const real *A, const real *B, const real *bias, int M, int N, int K, int ta,
                   int tb, int add) {
#ifdef TEST_CUDA
    if (round_like_gpu) {
        real *a = rounded_copy(A, ta ? M : K, ta ? K : M, ta ? M : K);
        real *b = rounded_copy(B, tb ? K : N, tb ? N : K, tb ? K : N);
        round_like_gpu = 0;
        matmul(C, a, b, bias, M, N, K, ta, tb, add);
        round_like_gpu = 1;
        free(a), free(b);
        return;
    }
#endif
    int panels = (N + NR - 1) / NR, blocks = (K + KC - 1) / KC, threads = omp_get_max_threads();
    // short rows of A^T and B are near enough to each other to be read in place
    int copy = tb || N > 512 || N % NR, turn = ta && M > 512;
    // The threads share out the columns of C where there are more of them than rows, else the rows
    int groups = N > 2 * M && !turn ? imin(threads, panels) : 1, each = groups > 1 ? 1 : threads;
    int strips = (M + each * MC - 1) / (each * MC) * each;   // of rows: the same number for each thread
    static real *pb;
    static size_t have;
    size_t need = (size_t)KC * NR * (size_t)panels + (size_t)threads * (MC + 2 * MR) * KC;
    if (have < need) {
        free(pb);
        if (posix_memalign((void **)&pb, 64, sizeof(real) * need)) die("out of memory in the matrix product");
        have = need;
    }
    real *pa_all = pb + (size_t)KC * NR * (size_t)panels;
    int small = (double)M * N * K < 1e5;   // not worth waking threads for
    (void)small;                           // unused without OpenMP
#pragma omp parallel if (!small)
    for (int q = 0; q < blocks; q++) {
        int k0 = (int)((long)K * q / blocks), kc = (int)((long)K * (q + 1) / blocks) - k0;
#pragma omp for
        for (int p = 0; p < panels * copy; p++)
            matmul_panel(pb + (size_t)p * NR * (size_t)kc, B + (tb ? k0 : (long)k0 * N), tb ? K : N, tb,
                         p * NR, imin(NR, N - p * NR), kc);
#pragma omp for
        for (int part = 0; part < strips * groups; part++) {
            int s = part % strips, g = part / strips, j0 = panels * g / groups * NR;
            int width = imin(N, panels * (g + 1) / groups * NR) - j0;
            int lo = (int)((long)M * s / strips / MR * MR);
            int hi = s + 1 < strips ? (int)((long)M * (s + 1) / strips / MR * MR) : M;
            const real *a = ta ? A + (long)k0 * M + lo : A + (long)lo * K + k0;
            const real *b = copy ? pb + (long)j0 * kc : B + (long)k0 * N + j0;
            long si = ta ? 1 : K, sk = ta ? M : 1;
            if (turn) {
                real *pa = thread_work(pa_all, (MC + 2 * MR) * KC);
                transpose(pa, kc, a, M, kc, hi - lo);
                a = pa, si = kc, sk = 1;
            }
            matmul_rows(C + (long)lo * N + j0, N, hi - lo, width, kc, a, si, sk, b, copy ? 0 : N,
                        q || !bias ? NULL : bias + j0, add || q);
        }
    }
}

// The same for one thread and matrices that are parts of larger ones (ldx: length of a row in memory), as
// attention needs for each head. Up to `room` >= N columns of C may be written, with zeros. `work` holds
// (N rounded up to NR) * K elements.
static void matmul_small(real *C, long ldc, int room, const real *A, long lda, int ta, const real *B,
                         long ldb, int tb, int M, int N, int K, real *work) {
    int copy = tb || N % VL;
#ifdef TEST_CUDA
    copy |= round_like_gpu;
#endif
    for (int j = 0; j < N && copy; j += NR)
        matmul_panel(work + (size_t)j * (size_t)K, B, ldb, tb, j, imin(NR, N - j), K);
    int width = imin(room, (N + VL - 1) / VL * VL);
#ifdef TEST_CUDA
    if (round_like_gpu) {
        real *a = rounded_copy(A, lda, ta ? K : M, ta ? M : K);
        round_bf16(work, (size_t)((N + NR - 1) / NR * NR) * (size_t)K);
        matmul_rows(C, ldc, M, width, K, a, ta ? 1 : K, ta ? M : 1, work, 0, NULL, 0);
        free(a);
        return;
    }
#endif
    matmul_rows(C, ldc, M, width, K, A, ta ? 1 : lda, ta ? lda : 1, copy ? work : B, copy ? 0 : ldb, NULL, 0);
}

// ----------------------------------------------------------------------------------------------------------
// An exp that the compiler can vectorise: no branch, no library call. Within 1.01 units in the last place of
// float (measured over all exponents). The double build, which checks gradients, uses libm's.

#ifdef USE_DOUBLE
static inline real fast_exp(real x) { return exp(x); }
#else
// e^x = 2^n e^r with n = round(x / ln 2), |r| <= ln 2 / 2; the polynomial is Cephes' expf
static inline real fast_exp(real x) {
    x = x < -87.3f ? -87.3f : x;
    x = x > 88.3f ? 88.3f : x;
    float n = x * 1.44269504f + 12582912.0f;               // adding 1.5 * 2^23 rounds to a whole number
    int32_t i;
    memcpy(&i, &n, 4);
    n -= 12582912.0f;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;   // ln 2 in two parts
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    i = (int32_t)(((uint32_t)i << 23) + 0x3f800000u);      // 2^n: the low bits of i hold n
    float s;
    memcpy(&s, &i, 4);
    return p * s;
}
#endif

// For vectors, a where a > b, else b
#define LARGER(a, b) ({ \
    __typeof__((a) > (b)) mask = (a) > (b); \
    (__typeof__(a))(((__typeof__(mask))(a) & mask) | ((__typeof__(mask))(b) & ~mask)); })
// The sum of a vector's lanes, and the largest of them: four at a time, then those four
static inline real lane_sum(vec x) {
    const real *lane = (const real *)&x;
    if (VL == 2) return lane[0] + lane[1];
    quad sum = *(const quad *)lane;
    UNROLL for (int l = 4; l < VL; l += 4) sum += *(const quad *)(lane + l);
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}
static inline real lane_max(vec x) {
    const real *lane = (const real *)&x;
    if (VL == 2) return lane[0] > lane[1] ? lane[0] : lane[1];
    quad most = *(const quad *)lane;
    UNROLL for (int l = 4; l < VL; l += 4) most = LARGER(most, *(const quad *)(lane + l));
    real a = most[0] > most[1] ? most[0] : most[1], b = most[2] > most[3] ? most[2] : most[3];
    return a > b ? a : b;
}

// sum_i a_i b_i over n, in one fixed order of vector lanes
static inline real dot(const real *a, const real *b, int n) {
    vec s = {0};
    int i = 0;
    for (; i + VL <= n; i += VL) s += *(const vec *)(a + i) * *(const vec *)(b + i);
    real sum = lane_sum(s);
    for (; i < n; i++) sum += a[i] * b[i];
    return sum;
}
#pragma GCC diagnostic pop
#endif
