// The matrix product by versions, from the three loops of the definition to the one in train_srdit.c: what
// each idea brings. The results on one machine stand in dev/README.md.
//
//   cc -O3 -march=native -std=gnu11 -fno-math-errno -fno-trapping-math -fopenmp dev/matmul_versions.c -o build/versions -lm
//   ./build/versions                  all versions, checked against the first
//   ./build/versions 4 2000           only version 4, for two seconds a shape (as `perf record` wants it)
//
// All compute C[M,N] = op(A)[M,K] op(B)[K,N] (+ C where add); op transposes where ta, tb.
#ifndef MATMUL_VERSIONS_NO_MAIN
#pragma GCC diagnostic ignored "-Wunused-function"
#endif
#define TRAIN_SRDIT_NO_MAIN
#include "../train_srdit.c"

// 1. The definition. The sum runs through one register, whose additions wait for one another; without
// fast-math the compiler may not reorder them, so there are no vectors here.
static void matmul_1(real *C, const real *A, const real *B, int M, int N, int K, int ta, int tb, int add) {
#pragma omp parallel for
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) {
            real sum = add ? C[(size_t)i * N + j] : 0;
            for (int k = 0; k < K; k++)
                sum += (ta ? A[(size_t)k * M + i] : A[(size_t)i * K + k]) *
                       (tb ? B[(size_t)j * K + k] : B[(size_t)k * N + j]);
            C[(size_t)i * N + j] = sum;
        }
}

// B turned round where the versions below need its rows; one copy, which costs little beside the product
static const real *rows_of(const real *B, int N, int K, int tb) {
    static real *copy;
    static size_t have;
    if (!tb) return B;
    if (have < (size_t)N * K) {
        free(copy);
        have = (size_t)N * K, copy = (real *)alloc_zero(have, sizeof(real));
    }
#pragma omp parallel for
    for (int j = 0; j < N; j += 64) transpose(copy + j, N, B + (long)j * K, K, imin(64, N - j), K);
    return copy;
}

// 2. The loops turned: j inside. Its sums do not depend on one another, so the compiler makes vectors of
// them; but each step loads and stores a vector of C for one multiplication.
static void matmul_2(real *C, const real *A, const real *B, int M, int N, int K, int ta, int tb, int add) {
    const real *b = rows_of(B, N, K, tb);
#pragma omp parallel for
    for (int i = 0; i < M; i++) {
        real *c = C + (size_t)i * N;
        if (!add) memset(c, 0, sizeof(real) * (size_t)N);
        for (int k = 0; k < K; k++) {
            real a = ta ? A[(size_t)k * M + i] : A[(size_t)i * K + k];
            for (int j = 0; j < N; j++) c[j] += a * b[(size_t)k * N + j];
        }
    }
}

// 3. A tile of MR x NR sums that stay in registers while k runs: each vector of B loaded serves MR rows, each
// element of A serves NR columns. Nothing is packed and nothing is cut to the cache.
static void matmul_3(real *C, const real *A, const real *B, int M, int N, int K, int ta, int tb, int add) {
    const real *b = rows_of(B, N, K, tb);
    long ai = ta ? 1 : K, ak = ta ? M : 1;
#pragma omp parallel for collapse(2)
    for (int j = 0; j < N; j += NR)
        for (int i = 0; i < M; i += MR) {
            if (i + MR <= M && j + NR <= N) {
                vec sum[MR][NV];
                const vec zero = {0};
                UNROLL for (int r = 0; r < MR; r++) UNROLL for (int v = 0; v < NV; v++)
                    sum[r][v] = add ? ((const vec *)(C + (long)(i + r) * N + j))[v] : zero;
                for (int k = 0; k < K; k++)
                    UNROLL for (int r = 0; r < MR; r++) UNROLL for (int v = 0; v < NV; v++)
                        sum[r][v] += A[(i + r) * ai + k * ak] * ((const vec *)(b + (long)k * N + j))[v];
                UNROLL for (int r = 0; r < MR; r++) UNROLL for (int v = 0; v < NV; v++)
                    ((vec *)(C + (long)(i + r) * N + j))[v] = sum[r][v];
            } else
                for (int y = i; y < imin(i + MR, M); y++)
                    for (int x = j; x < imin(j + NR, N); x++) {
                        real s = add ? C[(long)y * N + x] : 0;
                        for (int k = 0; k < K; k++) s += A[y * ai + k * ak] * b[(long)k * N + x];
                        C[(long)y * N + x] = s;
                    }
        }
}

// 4. The trainer's: panels of B read in order, and blocks of k that fit the cache.
static void matmul_version(int version, real *C, const real *A, const real *B, int M, int N, int K, int ta,
                           int tb, int add) {
    if (version == 1) matmul_1(C, A, B, M, N, K, ta, tb, add);
    if (version == 2) matmul_2(C, A, B, M, N, K, ta, tb, add);
    if (version == 3) matmul_3(C, A, B, M, N, K, ta, tb, add);
    if (version == 4) matmul(C, A, B, NULL, M, N, K, ta, tb, add);
}

#ifndef MATMUL_VERSIONS_NO_MAIN
int main(int argc, char **argv) {
    static const char *const names[] = {"1 naive", "2 loops turned", "3 register tile", "4 train_srdit.c"};
    static const struct { const char *name; int rows, in, out; } layers[] = {
        {"nano fc1", 4160, 64, 256}, {"S/1 fc1", 1028, 384, 1536}, {"B/1 fc1", 257, 768, 3072}};
    static const char *const products[] = {"output", "input gradient", "weight gradient"};
    int only = argc > 1 ? atoi(argv[1]) : 0, milliseconds = argc > 2 ? atoi(argv[2]) : 300, bad = 0;
    if (only < 0 || only > 4 || (argc > 1 && !only)) die("the argument is a version, 1 to 4");
    printf("%-26s", "GFLOP/s");
    for (int v = 1; v <= 4; v++)
        if (!only || v == only) printf(" %16s", names[v - 1]);
    printf("\n");
    for (int l = 0; l < 3; l++)
        for (int p = 0; p < 3; p++) {   // as in linear_forward and linear_backward
            int n = layers[l].rows, in = layers[l].in, out = layers[l].out, ta = p == 2, tb = p == 0;
            int M = p == 2 ? out : n, N = p == 0 ? out : in, K = p == 0 ? in : p == 1 ? out : n;
            size_t m = (size_t)M, k = (size_t)K, w = (size_t)N;
            real *a = (real *)alloc_zero(m * k, sizeof(real)), *b = (real *)alloc_zero(k * w, sizeof(real));
            real *c = (real *)alloc_zero(m * w, sizeof(real));
            real *want = (real *)alloc_zero(m * w, sizeof(real));
            fill_normal(a, m * k, 1, 1, 0, 0), fill_normal(b, k * w, 1, 2, 0, 0);
            matmul_1(want, a, b, M, N, K, ta, tb, 0);
            printf("%-9s %-16s", layers[l].name, products[p]);
            for (int v = 1; v <= 4; v++) {
                if (only && v != only) continue;
                double best = 1e30, error = 0, end = now_seconds() + milliseconds * 1e-3;
                matmul_version(v, c, a, b, M, N, K, ta, tb, 0);
                for (size_t i = 0; i < m * w; i++) {
                    double e = fabs((double)c[i] - want[i]);
                    if (!(e <= error)) error = e;
                }
                if (!(error <= 4 * REAL_EPS * K)) printf(" (v%d WRONG by %.1e)", v, error), bad = 1;
                do {
                    double start = now_seconds();
                    matmul_version(v, c, a, b, M, N, K, ta, tb, p == 2);
                    best = fmin(best, now_seconds() - start);
                } while (now_seconds() < end);
                printf(" %16.1f", 2e-9 * M * N * K / best);
                fflush(stdout);
            }
            printf("\n");
            free(a), free(b), free(c), free(want);
        }
    return bad;
}
#endif
