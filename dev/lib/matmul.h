// The matrix product, where nearly all the time goes, and the few other loops that must use whole vectors to
// be fast: dot products, column sums, exp, softmax. Only this file has vector types, the GNU ones that gcc
// and clang share.
//
//   matmul          C = op(A) op(B) (+ bias, or + C), by all threads; in a parallel region by the caller
//   matmul_small    the same by one thread, on parts of larger matrices, as attention needs for each head
//   matmul_naive    the definition: what the tests compare with; -DNAIVE puts it in matmul's place
//   softmax_forward, softmax_backward    rows of scores, softmax_row(n) numbers apart, so of whole vectors
//   column_sums, dot, fast_exp
#ifndef SRDIT_MATMUL_H
#define SRDIT_MATMUL_H
#include "base.h"
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"   // a program takes what it needs

// The definition. Two changes make it some hundred times faster. A tile of MR x NR sums stays in registers
// while k runs, so that each value loaded is used MR or NR times; and b is first copied into panels NR
// columns wide, so that it is read in order. The sum over k is cut into blocks that fit the cache. Every
// element is summed in one fixed order, so the bits do not depend on the number of threads.
static void matmul_naive(real *C, const real *A, const real *B, const real *bias, size_t M, size_t N,
                         size_t K, int ta, int tb, int add) {
#pragma omp parallel for
    for (size_t i = 0; i < M; i++)
        for (size_t j = 0; j < N; j++) {
            real sum = bias ? bias[j] : add ? C[i * N + j] : 0;
            for (size_t k = 0; k < K; k++)
                sum += (ta ? A[k * M + i] : A[i * K + k]) * (tb ? B[j * K + k] : B[k * N + j]);
            C[i * N + j] = sum;
        }
}

enum {
#if defined(__AVX512F__)
    VBYTES = 64,
    MR = 8,
#elif defined(__AVX__)
    VBYTES = 32,
    MR = 6,   // 16 registers: 6 x 2 sums, 2 of b, 1 of a
#else
    VBYTES = 16,
    MR = 6,
#endif
    VL = VBYTES / sizeof(real),
    NV = 2,
    NR = NV * VL,   // a tile is NV vectors wide
    KC = 512,
    MC = 128   // at most KC steps of k in a block; MC rows at a time
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
static inline __attribute__((always_inline)) void matmul_tile(real *c, long ldc, int mr, int nv, int nr,
                                                              int kc, const real *a, long si, long sk,
                                                              const real *b, long ldb, const real *bias,
                                                              int add) {
    vec sum[MR][NV];
    const vec zero = {0};
    int narrow = nr < nv * (int)VL;   // stored by way of edge
    UNROLL for (int i = 0; i < mr; i++) UNROLL for (int v = 0; v < nv; v++) {
        sum[i][v] = zero;
        __builtin_prefetch(c + i * ldc + v * VL, 1);   // c comes from memory while the sums are made
    }
    for (int k = 0; k < kc; k++) {
        UNROLL for (int v = 0; v < nv; v++) __builtin_prefetch(b + (k + 16) * ldb + v * VL);   // if in place
        UNROLL for (int i = 0; i < mr; i++) UNROLL for (int v = 0; v < nv; v++) sum[i][v] +=
            a[i * si + k * sk] * ((const vec *)(b + k * ldb))[v];
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
        int nr = imin(NR, N - j), one = nr <= (int)VL;   // the last panel may need only one vector
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

// For the tests of train_srdit.cu (TEST_CUDA) only: while matmul_rounds is set, the operands of products are
// rounded to bf16 as the GPU's are, and so are the results that it says the GPU stores in bf16, and what
// columns are summed of. What that changes measures what the GPU may be off by.
#ifdef TEST_CUDA
static int (*matmul_rounds)(const real *C);
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
static real *rounded_copy(const real *x, long ld, long rows, long cols) {
    real *copy = (real *)alloc_zero((size_t)(rows * cols), sizeof(real));
    for (long i = 0; i < rows; i++) memcpy(copy + i * cols, x + i * ld, sizeof(real) * (size_t)cols);
    round_bf16(copy, (size_t)(rows * cols));
    return copy;
}
#endif

// Within a parallel region a product has but the thread that calls.
static int matmul_threads(void) { return omp_in_parallel() ? 1 : omp_get_max_threads(); }

// Memory of this thread for the panels of products with up to N columns. It is kept between calls and grows
// where it must, so that a program that knows its widest product can have it once.
static real *matmul_reserve(size_t N) {
    static __thread real *panels;
    static __thread size_t have;
    size_t threads = (size_t)matmul_threads();
    size_t need = (size_t)KC * ((N + NR - 1) / NR * NR) + threads * (MC + 2 * MR) * KC;
    if (have < need) {
        free(panels);
        if (posix_memalign((void **)&panels, 64, sizeof(real) * need))
            die("out of memory in the matrix product");
        have = need;
    }
    return panels;
}

// C[M,N] = op(A)[M,K] op(B)[K,N] (+ bias, or + C where add). Matrices are whole; op transposes where ta, tb.
static void matmul_tiled(real *C, const real *A, const real *B, const real *bias, int M, int N, int K, int ta,
                         int tb, int add) {
    int panels = (N + NR - 1) / NR, blocks = (K + KC - 1) / KC, threads = matmul_threads();
    // short rows of A^T and B are near enough to each other to be read in place
    int copy = tb || N > 512 || N % NR, turn = ta && M > 512;
    // The threads share out the columns of C where there are more of them than rows, else the rows
    int groups = N > 2 * M && !turn ? imin(threads, panels) : 1, each = groups > 1 ? 1 : threads;
    int strips = (M + each * MC - 1) / (each * MC) * each;   // of rows: the same number for each thread
    real *pb = matmul_reserve((size_t)N);
    real *pa_all = pb + (size_t)KC * NR * (size_t)panels;
    int small = (double)M * N * K < 1e5;   // not worth waking threads for
    (void)small;                           // unused without OpenMP
#pragma omp parallel num_threads(threads) if (!small)
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
static void matmul(real *C, const real *A, const real *B, const real *bias, size_t M, size_t N, size_t K,
                   int ta, int tb, int add) {
    if (M > INT_MAX || N > INT_MAX || K > INT_MAX) die("a product of %zu x %zu x %zu is too large", M, N, K);
#ifdef TEST_CUDA
    if (matmul_rounds) {
        long m = (long)M, n = (long)N, k = (long)K;
        real *a = rounded_copy(A, ta ? m : k, ta ? k : m, ta ? m : k);
        real *b = rounded_copy(B, tb ? k : n, tb ? n : k, tb ? k : n);
        matmul_tiled(C, a, b, bias, (int)M, (int)N, (int)K, ta, tb, add);
        if (matmul_rounds(C)) round_bf16(C, M * N);
        free(a), free(b);
        return;
    }
#endif
#ifdef NAIVE
    matmul_naive(C, A, B, bias, M, N, K, ta, tb, add);
#else
    matmul_tiled(C, A, B, bias, (int)M, (int)N, (int)K, ta, tb, add);
#endif
}

// A part of a larger matrix: where it begins, how far apart its rows lie, whether it is meant transposed
typedef struct {
    const real *x;
    long ld;
    int t;
} Part;
static inline Part part_of(const real *x, size_t ld, int t) {
    Part p = {x, (long)ld, t};
    return p;
}

// C[M,N] = op(A)[M,K] op(B)[K,N] by one thread, on parts of larger matrices, as attention needs for each
// head. Up to `room` >= N columns of C may be written, with zeros. `work` holds (N rounded up to NR) * K
// elements.
static void matmul_small(real *C, size_t ldc, size_t room, Part A, Part B, size_t rows, size_t cols,
                         size_t inner, real *work) {
    int M = (int)rows, N = (int)cols, K = (int)inner, copy = B.t || N % VL;
#ifdef TEST_CUDA
    copy |= matmul_rounds != NULL;
#endif
    for (int j = 0; j < N && copy; j += NR)
        matmul_panel(work + (size_t)j * inner, B.x, B.ld, B.t, j, imin(NR, N - j), K);
    int width = imin((int)room, (N + VL - 1) / VL * VL);
#ifdef TEST_CUDA
    if (matmul_rounds) {
        real *a = rounded_copy(A.x, A.ld, A.t ? K : M, A.t ? M : K);
        round_bf16(work, (size_t)((N + NR - 1) / NR * NR) * inner);
        matmul_rows(C, (long)ldc, M, width, K, a, A.t ? 1 : K, A.t ? M : 1, work, 0, NULL, 0);
        free(a);
        return;
    }
#endif
    matmul_rows(C, (long)ldc, M, width, K, A.x, A.t ? 1 : A.ld, A.t ? A.ld : 1, copy ? work : B.x,
                copy ? 0 : B.ld, NULL, 0);
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
    float n = x * 1.44269504f + 12582912.0f;   // adding 1.5 * 2^23 rounds to a whole number
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
    i = (int32_t)(((uint32_t)i << 23) + 0x3f800000u);   // 2^n: the low bits of i hold n
    float s;
    memcpy(&s, &i, 4);
    return p * s;
}
#endif

// For vectors, a where a > b, else b
#define LARGER(a, b)                                                                                         \
    ({                                                                                                       \
        __typeof__((a) > (b)) mask = (a) > (b);                                                              \
        (__typeof__(a))(((__typeof__(mask))(a)&mask) | ((__typeof__(mask))(b) & ~mask));                     \
    })
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
static inline real dot(const real *a, const real *b, size_t n) {
    vec s = {0};
    size_t i = 0;
    for (; i + VL <= n; i += VL) s += *(const vec *)(a + i) * *(const vec *)(b + i);
    real sum = lane_sum(s);
    for (; i < n; i++) sum += a[i] * b[i];
    return sum;
}

// sums[O] += all N rows of in[N,O]; ld is the length of a row in memory
static void column_sums(real *sums, const real *in, size_t ld, size_t N, size_t O) {
#ifdef TEST_CUDA
    for (size_t n = 0; n < N && matmul_rounds; n++) round_bf16((real *)in + n * ld, O);
#endif
#pragma omp parallel for
    for (size_t o = 0; o < O; o += VL) {
        vec part = {0};
        for (size_t n = 0; n < N && o + VL <= O; n++) part += *(const vec *)(in + n * ld + o);
        if (o + VL <= O) *(vec *)(sums + o) += part;
        for (size_t i = o; i < O && o + VL > O; i++)
            for (size_t n = 0; n < N; n++) sums[i] += in[n * ld + i];
    }
}

// The length in memory of a row of n scores: whole vectors, so that no loop over it has an end of its own
static size_t softmax_row(size_t n) { return (n + VL - 1) / VL * VL; }

// Each row of x, n scores in R = softmax_row(n) places, becomes softmax(scale x); what is behind becomes 0.
static void softmax_forward(real *x, size_t rows, size_t n, real scale) {
    size_t R = softmax_row(n);
    real pads[VL], kept[VL];   // added to the last scores, times them
    for (size_t l = 0; l < VL; l++) kept[l] = R - VL + l < n, pads[l] = kept[l] ? 0 : -INFINITY;
    for (real *row = x; row < x + rows * R; row += R) {
        *(vec *)(row + R - VL) += *(vec *)pads;   // -infinity after the n scores: e^-inf adds nothing
        vec most = *(vec *)row, sums = {0};
        for (size_t i = VL; i < R; i += VL) most = LARGER(most, *(vec *)(row + i));
        real top = lane_max(most);
        for (size_t i = 0; i < R; i += VL) {
            for (size_t l = 0; l < VL; l++) row[i + l] = fast_exp((row[i + l] - top) * scale);
            sums += *(vec *)(row + i);
        }
        *(vec *)(row + R - VL) *= *(vec *)kept;   // fast_exp ends at 1e-38; less than that is slow to use
        real inverse = 1 / lane_sum(sums);
        for (size_t i = 0; i < R; i += VL) *(vec *)(row + i) *= inverse;
    }
}

// p = softmax(scale x):  dx_i = scale p_i (dp_i - sum_k p_k dp_k), row by row. dp comes in, in dx's place.
static void softmax_backward(real *dx, const real *p, size_t rows, size_t n, real scale) {
    size_t R = softmax_row(n);
    for (size_t t = 0; t < rows; t++, dx += R, p += R) {
        real sum = dot(dx, p, R);
        for (size_t i = 0; i < R; i += VL) {
            vec *d = (vec *)(dx + i);
            *d = (*d - sum) * (scale * *(const vec *)(p + i));
        }
    }
}
#pragma GCC diagnostic pop
#endif
