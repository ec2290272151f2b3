// Scores of generated pictures: how far their features lie from those of real ones, whether each shows what
// was asked for, and whether any are copies. And the judge, a small convolutional network that turns pictures
// into features and logits.
//
//   judge_open, judge_run      pictures -> features, logits, by the weights of a file
//   frechet_distance           between Gaussians fitted to the features (what FID is to Inception's)
//   kernel_distance            squared MMD of a cubic kernel, unbiased (what KID and KDD are)
//   sliced_wasserstein         mean over random directions of the squared distance of the projections
//   precision_recall           share of samples among real pictures, and of real pictures among samples
//   label_accuracy             share of pictures in which the judge sees what was asked for
//   nearest, memorisation      distances to the nearest training picture, against those of held-out ones
//   score_quantile             of any list, as numpy defines it
//
// All of it is computed in double, whatever `real` is, so that a program in float and one in double print the
// same scores. Sums have one fixed order; the bits do not depend on the number of threads. Bad input (numbers
// that are not finite, too few rows, unequal widths) is one sentence with the name that the rows were given,
// and the end. Not to be called inside a parallel region. dev/score_check.c shows all calls (`pictures`).
#ifndef SRDIT_SCORE_H
#define SRDIT_SCORE_H
#include "matmul.h"
#include "random.h"
#include "safetensors.h"
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"   // a program takes what it needs

// x[n,d], one picture's features (or pixels) a row; the name is for messages: "the samples"
typedef struct {
    const char *name;
    const double *x;
    size_t n, d;
} Features;
static inline Features features_of(const char *name, const double *x, size_t n, size_t d) {
    Features r = {name, x, n, d};
    return r;
}

// Zeros, or the end
static void *score_memory(size_t count, size_t size) {
    void *p = calloc(count ? count : 1, size);
    if (!p)
        die("out of memory: %.1f MB for scores could not be allocated; score fewer pictures",
            (double)count * (double)size / 1e6);
    return p;
}

static inline size_t size_min(size_t a, size_t b) { return a < b ? a : b; }

// Ends the program unless there are at least `least` rows, of numbers whose sixth powers are finite, too
static void features_check(Features r, size_t least) {
    if (r.n < least) die("%s: %zu pictures, and this score needs at least %zu", r.name, r.n, least);
    if (!r.d) die("%s: rows of no numbers cannot be scored", r.name);
    for (size_t i = 0; i < r.n * r.d; i++)
        if (!(fabs(r.x[i]) <= 1e50))
            die("%s: number %zu of picture %zu is %g: no score can be computed of what is not finite, or "
                "that "
                "large",
                r.name, i % r.d, i / r.d, r.x[i]);
}
static void features_match(Features a, Features b) {
    if (a.d != b.d)
        die("%s have %zu numbers a picture and %s %zu: they cannot be compared", a.name, a.d, b.name, b.d);
}

// ----------------------------------------------------------------------------------------------------------
// Dot products of all pairs of rows, in double: what matmul is to `real`. One side is copied into panels of
// DNR rows, turned, so that DNR sums run side by side; each sum adds its d products in order.

typedef double dvec __attribute__((vector_size(VBYTES), aligned(sizeof(double)), may_alias));
enum {
    DVL = VBYTES / sizeof(double),
    DNR = 2 * DVL,       // rows in a panel
    SCORE_TILE = 64,     // rows of x that are compared with
    SCORE_PANELS = 16,   // so many panels of y at a time
    SCORE_ROW = SCORE_PANELS * DNR,
    NEAREST_ROOM = 1 << 22   // numbers of memory for nearest's products
};

static size_t panel_count(size_t n) { return (n + DNR - 1) / DNR; }

// y[n,d] - center[d] (NULL: zeros) as [panel_count(n)][d][DNR]; zeros where the rows end
static double *panels_of(const double *y, size_t n, size_t d, const double *center) {
    double *panels = (double *)score_memory(panel_count(n) * d * DNR, sizeof(double));
#pragma omp parallel for
    for (size_t p = 0; p < panel_count(n); p++)
        for (size_t c = 0; c < DNR && p * DNR + c < n; c++)
            for (size_t k = 0; k < d; k++)
                panels[(p * d + k) * DNR + c] = y[(p * DNR + c) * d + k] - (center ? center[k] : 0);
    return panels;
}

// out[mr][DNR] = x[mr,d] times a panel; inlined, so that mr is a constant and the sums stay in registers
static inline __attribute__((always_inline)) void dots_tile(double *out, size_t ld, int mr, const double *x,
                                                            size_t d, const double *panel) {
    dvec sum[MR][2];
    const dvec zero = {0};
    UNROLL for (int i = 0; i < mr; i++) sum[i][0] = sum[i][1] = zero;
    for (size_t k = 0; k < d; k++)
        UNROLL for (int i = 0; i < mr; i++) UNROLL for (int v = 0; v < 2; v++) sum[i][v] +=
            x[(size_t)i * d + k] * ((const dvec *)(panel + k * DNR))[v];
    UNROLL for (int i = 0; i < mr; i++)
        UNROLL for (int v = 0; v < 2; v++)((dvec *)(out + (size_t)i * ld))[v] = sum[i][v];
}

// out[rows][count * DNR] = x[rows,d] times `count` panels, by one thread; out's rows lie ld numbers apart
static void dots(double *out, size_t ld, const double *x, size_t rows, size_t d, const double *panels,
                 size_t count) {
    for (size_t p = 0; p < count; p++, panels += d * DNR)
        for (size_t i = 0; i < rows;) {
            if (i + MR <= rows) dots_tile(out + i * ld + p * DNR, ld, MR, x + i * d, d, panels), i += MR;
            else dots_tile(out + i * ld + p * DNR, ld, 1, x + i * d, d, panels), i++;
        }
}

// ----------------------------------------------------------------------------------------------------------
// Frechet distance

typedef struct {
    const char *name;
    size_t n, d;
    double *mean, *cov;   // [d], [d,d]
} Moments;
enum { MOMENT_BLOCKS = 32 };   // partial sums, added in order

// mean = sum x / n, cov = sum (x - mean)(x - mean)^T / (n - 1); n >= 2
static Moments moments_of(Features r) {
    features_check(r, 2);
    size_t n = r.n, d = r.d, blocks = size_min((n + 63) / 64, MOMENT_BLOCKS);
    Moments m = {r.name, n, d, (double *)score_memory(d, sizeof(double)),
                 (double *)score_memory(d * d, sizeof(double))};
    double *part = (double *)score_memory(blocks * d * d, sizeof(double));
#pragma omp parallel for
    for (size_t b = 0; b < blocks; b++)
        for (size_t i = n * b / blocks; i < n * (b + 1) / blocks; i++)
            for (size_t k = 0; k < d; k++) part[b * d + k] += r.x[i * d + k];
    for (size_t b = 0; b < blocks; b++)
        for (size_t k = 0; k < d; k++) m.mean[k] += part[b * d + k] / (double)n;
#pragma omp parallel for
    for (size_t b = 0; b < blocks; b++) {
        size_t lo = n * b / blocks, rows = n * (b + 1) / blocks - lo, ld = panel_count(d) * DNR;
        double *turned = (double *)score_memory(d * rows, sizeof(double));   // [d,rows], around the mean
        for (size_t i = 0; i < rows; i++)
            for (size_t k = 0; k < d; k++) turned[k * rows + i] = r.x[(lo + i) * d + k] - m.mean[k];
        double *panels = panels_of(turned, d, rows, NULL);
        double *out = (double *)score_memory(d * ld, sizeof(double));
        dots(out, ld, turned, d, rows, panels, panel_count(d));
        for (size_t k = 0; k < d; k++) memcpy(part + (b * d + k) * d, out + k * ld, d * sizeof(double));
        free(turned), free(panels), free(out);
    }
    for (size_t b = 0; b < blocks; b++)
        for (size_t k = 0; k < d * d; k++) m.cov[k] += part[b * d * d + k] / (double)(n - 1);
    free(part);
    return m;
}
static void moments_close(Moments m) { free(m.mean), free(m.cov); }

// Rotates pairs of rows of w[d,d], scaled to a largest element of 1, until all rows are orthogonal: w becomes
// U^T w, the norms of its rows w's singular values and the rows' directions its right singular vectors.
// norms[d] gets the norms; returns the scale that was divided by.
//
// This is one-sided Jacobi (Hestenes 1958), in the order of a round-robin tournament (Brent and Luk 1985),
// whose d/2 games a round touch different rows and so may be played by any number of threads. Chosen over
// tridiagonal QL because one routine gives both the root of a covariance and the sum of singular values, is
// as accurate as its input, and runs along rows. Rows below d eps times the largest are rounding: they stay.
static double orthogonalise(double *w, double *norms, size_t d) {
    double top = 0, scale = 0;
    for (size_t i = 0; i < d * d; i++) scale = fabs(w[i]) > scale ? fabs(w[i]) : scale;
    if (!(scale < INFINITY)) die("a covariance is not finite");
    for (size_t i = 0; i < d * d && scale > 0; i++) w[i] /= scale;
    size_t ld = (d + DVL - 1) / DVL * DVL, even = d + d % 2;
    double *a = (double *)score_memory(d * ld, sizeof(double));   // rows of whole vectors
    for (size_t i = 0; i < d; i++) memcpy(a + i * ld, w + i * d, d * sizeof(double));
    int sweep = 0, rotated = 1;
    for (; rotated && sweep < 100; sweep++) {
        for (size_t i = 0; i < d; i++) {
            norms[i] = 0;
            for (size_t k = 0; k < d; k++) norms[i] += a[i * ld + k] * a[i * ld + k];
            top = norms[i] > top ? norms[i] : top;
        }
        double nothing = top * (double)(d * d) * DBL_EPSILON * DBL_EPSILON;
        rotated = 0;
#pragma omp parallel if (d > 256) reduction(| : rotated)   // shorter rounds are not worth waking threads for
        for (size_t round = 0; round + 1 < even; round++) {
#pragma omp for
            for (size_t game = 0; game < even / 2; game++) {
                size_t i = game ? (round + game) % (even - 1) : even - 1;
                size_t j = (round + even - 1 - game) % (even - 1);
                if (i >= d || j >= d) continue;   // d is odd, and this row rests
                double *p = a + i * ld, *q = a + j * ld;
                dvec pp = {0}, qq = {0}, pq = {0};
                for (size_t k = 0; k < ld; k += DVL) {
                    dvec x = *(dvec *)(p + k), y = *(dvec *)(q + k);
                    pp += x * x, qq += y * y, pq += x * y;
                }
                double P = 0, Q = 0, c = 0;
                for (int l = 0; l < (int)DVL; l++) P += pp[l], Q += qq[l], c += pq[l];
                if (P <= nothing || Q <= nothing || fabs(c) <= 4 * DBL_EPSILON * sqrt((double)d * P * Q))
                    continue;
                rotated = 1;
                // t = tan of the angle after which p.q = 0, the smaller of the two
                double zeta = (Q - P) / (2 * c),
                       t = (zeta < 0 ? -1 : 1) / (fabs(zeta) + sqrt(1 + zeta * zeta));
                double cosine = 1 / sqrt(1 + t * t), sine = cosine * t;
                for (size_t k = 0; k < ld; k += DVL) {
                    dvec x = *(dvec *)(p + k), y = *(dvec *)(q + k);
                    *(dvec *)(p + k) = cosine * x - sine * y;
                    *(dvec *)(q + k) = sine * x + cosine * y;
                }
            }
        }
    }
    if (rotated) die("the singular values of a %zu x %zu matrix were not found in %d sweeps", d, d, sweep);
    for (size_t i = 0; i < d; i++) {
        memcpy(w + i * d, a + i * ld, d * sizeof(double));
        norms[i] = sqrt(norms[i]);
    }
    free(a);
    return scale;
}

// F[d,d] with F^T F = S, a covariance: the rows of F are S's eigenvectors times the roots of their
// eigenvalues. Eigenvalues below d eps times the largest are what rounding left in the place of zeros; their
// roots, 1e-8 of the largest, would not be small, so they are zeros again.
static double *root_of(const double *S, size_t d) {
    double *F = (double *)score_memory(d * d, sizeof(double));
    double *lambda = (double *)score_memory(d, sizeof(double)), top = 0;
    memcpy(F, S, d * d * sizeof(double));
    double scale = orthogonalise(F, lambda, d);   // rows are now lambda_i times eigenvector i
    for (size_t i = 0; i < d; i++) top = lambda[i] > top ? lambda[i] : top;
    for (size_t i = 0; i < d; i++)
        for (size_t k = 0; k < d; k++)
            F[i * d + k] =
                lambda[i] > top * (double)d * DBL_EPSILON ? F[i * d + k] * sqrt(scale / lambda[i]) : 0;
    free(lambda);
    return F;
}

// |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)): the squared Wasserstein distance of two Gaussians (Dowson and
// Landau 1982; Heusel et al. 2017, arXiv 1706.08500, eq. 6).
//
// tr (S1 S2)^(1/2) = tr (S1^(1/2) S2 S1^(1/2))^(1/2) is the sum of the singular values of F1 F2^T where
// F^T F = S. Taking them from F1 F2^T, and not as roots of eigenvalues, keeps all digits: the root of an
// eigenvalue that should be 0 and is 1e-16 is 1e-8. The result may be below 0 by rounding.
static double frechet_of_moments(Moments a, Moments b) {
    features_match(features_of(a.name, NULL, a.n, a.d), features_of(b.name, NULL, b.n, b.d));
    size_t d = a.d, ld = panel_count(d) * DNR;
    double *F1 = root_of(a.cov, d), *F2 = root_of(b.cov, d), *panels = panels_of(F2, d, d, NULL);
    double *out = (double *)score_memory(d * ld, sizeof(double));
    double *sigma = (double *)score_memory(d, sizeof(double));
    dots(out, ld, F1, d, d, panels, panel_count(d));
    for (size_t i = 0; i < d; i++) memcpy(F1 + i * d, out + i * ld, d * sizeof(double));
    double scale = orthogonalise(F1, sigma, d), means = 0, traces = 0, cross = 0;
    for (size_t k = 0; k < d; k++) {
        means += (a.mean[k] - b.mean[k]) * (a.mean[k] - b.mean[k]);
        traces += a.cov[k * d + k] + b.cov[k * d + k];
        cross += sigma[k] * scale;
    }
    free(F1), free(F2), free(panels), free(out), free(sigma);
    return means + (traces - 2 * cross);
}
// The same from the sets themselves
static double frechet_distance(Features a, Features b) {
    Moments m1 = moments_of(a), m2 = moments_of(b);
    double distance = frechet_of_moments(m1, m2);
    moments_close(m1), moments_close(m2);
    return distance;
}

// ----------------------------------------------------------------------------------------------------------
// Kernel distance

// The sum of k(x, y) = (x.y / d + 1)^3 over all pairs of rows or, where b is the same as a, of different rows
static double kernel_sum(Features a, Features b, int same) {
    size_t tiles = (a.n + SCORE_TILE - 1) / SCORE_TILE, d = a.d, all = panel_count(b.n);
    double *panels = panels_of(b.x, b.n, d, NULL), *part = (double *)score_memory(tiles, sizeof(double)),
           sum = 0;
#pragma omp parallel for schedule(dynamic)
    for (size_t t = 0; t < tiles; t++) {
        size_t i0 = t * SCORE_TILE, rows = size_min(a.n - i0, SCORE_TILE);
        double out[SCORE_TILE * SCORE_ROW];
        // k is symmetric: where b is the same, pairs above the diagonal are enough
        for (size_t p = same ? i0 / DNR : 0; p < all; p += SCORE_PANELS) {
            size_t count = size_min(all - p, SCORE_PANELS);
            dots(out, SCORE_ROW, a.x + i0 * d, rows, d, panels + p * d * DNR, count);
            for (size_t i = 0; i < rows; i++) {
                size_t first = same && i0 + i + 1 > p * DNR ? i0 + i + 1 - p * DNR : 0;
                double row = 0;
                for (size_t j = first; j < count * DNR && p * DNR + j < b.n; j++) {
                    double k = out[i * SCORE_ROW + j] / (double)d + 1;
                    row += k * k * k;
                }
                part[t] += row;
            }
        }
    }
    for (size_t t = 0; t < tiles; t++) sum += part[t];
    free(panels), free(part);
    return same ? 2 * sum : sum;
}

// The squared maximum mean discrepancy, unbiased (Gretton et al. 2012, JMLR 13, eq. 3), of the cubic kernel
// of KID (Binkowski et al. 2018, arXiv 1801.01401), over all pairs:
//   mean over i != j of k(a_i, a_j) + mean over i != j of k(b_i, b_j) - 2 mean over i, j of k(a_i, b_j)
// The mean over random subsets, which KID's and KDD's code (dgm-eval: 100 of 1000) print, has the same
// expectation and adds the subsets' noise. It is below 0 as often as above where both sets come from one
// distribution.
static double kernel_distance(Features a, Features b) {
    features_check(a, 2), features_check(b, 2), features_match(a, b);
    double m = (double)a.n, n = (double)b.n;
    double aa = kernel_sum(a, a, 1), bb = kernel_sum(b, b, 1), ab = kernel_sum(a, b, 0);
    return aa / (m * (m - 1)) + bb / (n * (n - 1)) - 2 * ab / (m * n);
}

// ----------------------------------------------------------------------------------------------------------
// Sliced Wasserstein distance

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}
// The integral over u from 0 to 1 of (A(u) - B(u))^2, A and B the quantile functions of sorted a[n] and b[m]:
// steps that end at multiples of 1/n and of 1/m; u is counted in units of 1/(n m)
static double wasserstein_squared(const double *a, size_t n, const double *b, size_t m) {
    double sum = 0;
    for (size_t i = 0, j = 0, u = 0; i < n;) {
        size_t a_ends = (i + 1) * m, b_ends = (j + 1) * n, end = size_min(a_ends, b_ends);
        sum += (a[i] - b[j]) * (a[i] - b[j]) * (double)(end - u);
        i += end == a_ends, j += end == b_ends, u = end;
    }
    return sum / ((double)n * (double)m);
}

// theta[directions][d]: directions drawn from the unit sphere, by Philox at (seed, 0, 0, direction)
static double *score_directions(size_t directions, size_t d, uint64_t seed) {
    double *theta = (double *)score_memory(directions * d, sizeof(double));
    real *z = (real *)score_memory(d, sizeof(real));
    for (size_t l = 0; l < directions; l++) {
        double square = 0;
        fill_normal(z, d, seed, 0, 0, (uint32_t)l);
        for (size_t k = 0; k < d; k++) square += (double)z[k] * (double)z[k];
        for (size_t k = 0; k < d; k++) theta[l * d + k] = (double)z[k] / sqrt(square);
    }
    free(z);
    return theta;
}

// The mean over directions theta of the squared 2-Wasserstein distance between the projections theta.a and
// theta.b (Rabin et al. 2011; Bonneel et al. 2015). MIND (Berthet et al. 2026, arXiv 2605.06797) proposes the
// sliced distance of features in the Frechet distance's place. Sets that differ by a shift s are |s|^2 / d
// apart, so d times it is on the Frechet distance's scale.
static double sliced_wasserstein(Features a, Features b, size_t directions, uint64_t seed) {
    features_check(a, 1), features_check(b, 1), features_match(a, b);
    if (!directions) die("a sliced Wasserstein distance needs at least 1 direction");
    double *theta = score_directions(directions, a.d, seed),
           *panels = panels_of(theta, directions, a.d, NULL);
    double *part = (double *)score_memory(directions, sizeof(double)), sum = 0;
#pragma omp parallel for schedule(dynamic)
    for (size_t p = 0; p < panel_count(directions); p++) {
        double *shadow =
            (double *)score_memory((a.n + b.n) * (DNR + 1), sizeof(double));   // [a.n + b.n][DNR]
        double *one = shadow + (a.n + b.n) * DNR, *other = one + a.n;
        dots(shadow, DNR, a.x, a.n, a.d, panels + p * a.d * DNR, 1);
        dots(shadow + a.n * DNR, DNR, b.x, b.n, a.d, panels + p * a.d * DNR, 1);
        for (size_t l = 0; l < DNR && p * DNR + l < directions; l++) {
            for (size_t i = 0; i < a.n + b.n; i++) one[i] = shadow[i * DNR + l];
            qsort(one, a.n, sizeof(double), by_size), qsort(other, b.n, sizeof(double), by_size);
            part[p * DNR + l] = wasserstein_squared(one, a.n, other, b.n);
        }
        free(shadow);
    }
    for (size_t l = 0; l < directions; l++) sum += part[l];
    free(theta), free(panels), free(part);
    return sum / (double)directions;
}

// ----------------------------------------------------------------------------------------------------------
// Distances between pictures: precision and recall, and the nearest training picture

// The rows that others are compared with, in panels around their mean, and the squared lengths of these
typedef struct {
    Features rows;
    double *center, *panels, *square;   // [d], panels_of, [panels * DNR]
} Others;

// Keeps a pointer to y's numbers and takes as much memory again for a copy
static Others others_open(Features y) {
    Others o = {y, (double *)score_memory(y.d, sizeof(double)), NULL,
                (double *)score_memory(panel_count(y.n) * DNR, sizeof(double))};
    for (size_t i = 0; i < y.n; i++)
        for (size_t k = 0; k < y.d; k++) o.center[k] += y.x[i * y.d + k];
    for (size_t k = 0; k < y.d; k++) o.center[k] /= (double)y.n;
    o.panels = panels_of(y.x, y.n, y.d, o.center);
#pragma omp parallel for
    for (size_t p = 0; p < panel_count(y.n); p++)
        for (size_t k = 0; k < y.d; k++)
            for (size_t c = 0; c < DNR; c++) {
                double x = o.panels[(p * y.d + k) * DNR + c];
                o.square[p * DNR + c] += x * x;
            }
    return o;
}
static void others_close(Others o) { free(o.center), free(o.panels), free(o.square); }

// A tile of rows of x, copied around the others' mean
typedef struct {
    size_t first, rows;
    double *copy, square[SCORE_TILE], out[SCORE_TILE * SCORE_ROW];   // copy[SCORE_TILE,d]
} Tile;
static Tile *tile_open(const Others *o, Features x, size_t t) {
    Tile *tile = (Tile *)score_memory(1, sizeof(Tile));
    tile->first = t * SCORE_TILE, tile->rows = size_min(x.n - tile->first, SCORE_TILE);
    tile->copy = (double *)score_memory(tile->rows * x.d, sizeof(double));
    for (size_t i = 0; i < tile->rows; i++)
        for (size_t k = 0; k < x.d; k++) {
            double c = tile->copy[i * x.d + k] = x.x[(tile->first + i) * x.d + k] - o->center[k];
            tile->square[i] += c * c;
        }
    return tile;
}
static void tile_close(Tile *tile) { free(tile->copy), free(tile); }

// Squared distances of the tile's rows to those of panels p ...: out[i * SCORE_ROW + j], j below the
// number returned. |x - y|^2 = |x|^2 + |y|^2 - 2 x.y, but where that cancels all but the last digits, as it
// does for copies, by the definition.
static size_t tile_distances(Tile *tile, const Others *o, Features x, size_t p) {
    size_t d = x.d, all = panel_count(o->rows.n), count = size_min(all - p, SCORE_PANELS);
    size_t cols = size_min(o->rows.n - p * DNR, count * DNR);
    dots(tile->out, SCORE_ROW, tile->copy, tile->rows, d, o->panels + p * d * DNR, count);
    for (size_t i = 0; i < tile->rows; i++)
        for (size_t j = 0; j < cols; j++) {
            double squares = tile->square[i] + o->square[p * DNR + j];
            double *distance = &tile->out[i * SCORE_ROW + j];
            *distance = squares - 2 * *distance;
            if (!(*distance < 1e-5 * squares)) continue;
            const double *a = x.x + (tile->first + i) * d, *b = o->rows.x + (p * DNR + j) * d;
            *distance = 0;
            for (size_t k = 0; k < d; k++) *distance += (a[k] - b[k]) * (a[k] - b[k]);
        }
    return cols;
}
static size_t tile_count(size_t n) { return (n + SCORE_TILE - 1) / SCORE_TILE; }

// radius[i] = the squared distance of row i to the k-th nearest of the other rows of the same set
static double *kth_nearest(const Others *o, int k) {
    Features y = o->rows;
    double *radius = (double *)score_memory(y.n, sizeof(double));
#pragma omp parallel for schedule(dynamic)
    for (size_t t = 0; t < tile_count(y.n); t++) {
        Tile *tile = tile_open(o, y, t);
        double *near =
            (double *)score_memory(SCORE_TILE * (size_t)k, sizeof(double));   // the k smallest, in order
        for (size_t i = 0; i < SCORE_TILE * (size_t)k; i++) near[i] = INFINITY;
        for (size_t p = 0; p < panel_count(y.n); p += SCORE_PANELS) {
            size_t cols = tile_distances(tile, o, y, p);
            for (size_t i = 0; i < tile->rows; i++)
                for (size_t j = 0; j < cols; j++) {
                    double distance = tile->out[i * SCORE_ROW + j], *mine = near + i * (size_t)k;
                    if (!(distance < mine[k - 1]) || p * DNR + j == tile->first + i) continue;
                    int at = k - 1;
                    for (; at > 0 && mine[at - 1] > distance; at--) mine[at] = mine[at - 1];
                    mine[at] = distance;
                }
        }
        for (size_t i = 0; i < tile->rows; i++) radius[tile->first + i] = near[(i + 1) * (size_t)k - 1];
        free(near), tile_close(tile);
    }
    return radius;
}

// The share of rows of x that lie in at least one ball around a row of the others
static double share_inside(const Others *o, const double *radius, Features x) {
    size_t inside = 0;
#pragma omp parallel for schedule(dynamic) reduction(+ : inside)
    for (size_t t = 0; t < tile_count(x.n); t++) {
        Tile *tile = tile_open(o, x, t);
        uint8_t in[SCORE_TILE] = {0};
        for (size_t p = 0; p < panel_count(o->rows.n); p += SCORE_PANELS) {
            size_t cols = tile_distances(tile, o, x, p);
            for (size_t i = 0; i < tile->rows; i++)
                for (size_t j = 0; j < cols; j++)
                    in[i] |= tile->out[i * SCORE_ROW + j] <= radius[p * DNR + j];
        }
        for (size_t i = 0; i < tile->rows; i++) inside += in[i];
        tile_close(tile);
    }
    return (double)inside / (double)x.n;
}

// Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991, eq. 1 and 2, with k = 3): the
// share of samples within the balls around real pictures that reach to their k-th nearest other real picture,
// and the share of real pictures within the samples' balls. Both depend on the numbers of pictures: compare
// equal ones.
static void precision_recall(double *precision, double *recall, Features made, Features reference, int k) {
    if (k < 1) die("precision and recall: k is %d and must be at least 1", k);
    features_check(made, (size_t)k + 1), features_check(reference, (size_t)k + 1),
        features_match(made, reference);
    Features sets[2] = {reference, made};
    for (int s = 0; s < 2; s++) {
        Others o = others_open(sets[s]);
        double *radius = kth_nearest(&o, k);
        *(s ? recall : precision) = share_inside(&o, radius, sets[1 - s]);
        free(radius), others_close(o);
    }
}

// A coarse copy of x[n,d], less center and times scale, as `real`: of each four numbers side by side half
// their sum. square[i]: the squared length of its row i
enum { COARSE = 4 };
static real *coarse_rows(Features x, const double *center, double scale, double *square) {
    size_t width = (x.d + COARSE - 1) / COARSE;
    real *copy = (real *)score_memory(x.n * width, sizeof(real));
#pragma omp parallel for
    for (size_t i = 0; i < x.n; i++)
        for (size_t g = 0; g < width; g++) {
            double sum = 0;
            for (size_t k = COARSE * g; k < size_min(COARSE * g + COARSE, x.d); k++)
                sum += x.x[i * x.d + k] - center[k];
            real c = copy[i * width + g] = (real)(sum * scale / sqrt((double)COARSE));
            square[i] += (double)c * (double)c;
        }
    return copy;
}
static double square_between(const double *a, const double *b, size_t d) {
    double sums[8] = {0}, sum = 0;   // so many at once
    for (size_t k = 0; k < d / 8 * 8; k += 8)
        for (size_t j = 0; j < 8; j++) sums[j] += (a[k + j] - b[k + j]) * (a[k + j] - b[k + j]);
    for (size_t k = d / 8 * 8; k < d; k++) sum += (a[k] - b[k]) * (a[k] - b[k]);
    for (size_t j = 0; j < 8; j++) sum += sums[j];
    return sum;
}

// best[i] = the smaller of itself and the distance of row i of x to the nearest row of y. Start with INFINITY
// and call once, or once for each part of a y that need not be in memory as a whole.
// Coarse copies bound a distance from below, since (a + b + c + d)^2 <= 4 (a^2 + b^2 + c^2 + d^2) for the
// differences. Their products are made by the trainer's, off by at most width + 8 roundings of (|x| + |y|)^2.
// Whatever row could by its bound be nearer than the best so far is measured in double: of 60000 pictures of
// clothes one in a hundred.
static void nearest(double *best, Features x, Features y) {
    features_check(x, 1), features_check(y, 1), features_match(x, y);
    size_t d = x.d, width = (d + COARSE - 1) / COARSE, rows = size_min(x.n, 1 + NEAREST_ROOM / y.n);
    double *center = (double *)score_memory(d, sizeof(double)), largest = 0, y_most = 0;
    double *x_square = (double *)score_memory(x.n, sizeof(double));
    double *y_square = (double *)score_memory(y.n, sizeof(double));
    real *product = (real *)score_memory(rows * y.n, sizeof(real));
    for (size_t i = 0; i < y.n; i++)
        for (size_t k = 0; k < d; k++) center[k] += y.x[i * d + k] / (double)y.n;
    for (size_t i = 0; i < x.n * d; i++) largest = fmax(largest, fabs(x.x[i] - center[i % d]));
    for (size_t i = 0; i < y.n * d; i++) largest = fmax(largest, fabs(y.x[i] - center[i % d]));
    double scale = largest > 0 ? 1 / largest : 1;   // float holds the squares of numbers up to 1
    real *xs = coarse_rows(x, center, scale, x_square), *ys = coarse_rows(y, center, scale, y_square);
    for (size_t j = 0; j < y.n; j++) y_most = fmax(y_most, y_square[j]);
    for (size_t first = 0; first < x.n; first += rows) {
        size_t count = size_min(rows, x.n - first);
        matmul(product, xs + first * width, ys, NULL, count, y.n, width, 0, 1, 0);   // product[i,j] = x_i.y_j
#pragma omp parallel for schedule(dynamic, 16)
        for (size_t i = first; i < first + count; i++) {
            const real *dot = product + (i - first) * y.n;
            const double *row = x.x + i * d;
            double reach = sqrt(x_square[i]) + sqrt(y_most), bound, lowest = INFINITY;
            double slack =
                (double)(width + 8) * (sizeof(real) == 4 ? FLT_EPSILON : DBL_EPSILON) * reach * reach;
            slack += (double)(width + 8) * 1e-30;   // products below what float holds, sums that cancel
            size_t guess = 0;
            for (size_t j = 0; j < y.n; j++)
                if ((bound = 0.5 * y_square[j] - (double)dot[j]) < lowest) lowest = bound, guess = j;
            double least = square_between(row, y.x + guess * d, d);
            double before = best[i] * best[i] * (1 + 1e-14);   // of other parts of y, rounded up
            double limit = fmin(least, before) * scale * scale, own = x_square[i] - 2 * slack;
            for (size_t j = 0; j < y.n; j++) {
                if (own + y_square[j] - 2 * (double)dot[j] > limit) continue;
                least = fmin(least, square_between(row, y.x + j * d, d));
                limit = fmin(least, before) * scale * scale;
            }
            best[i] = fmin(best[i], sqrt(least));
        }
    }
    free(center), free(x_square), free(y_square), free(product), free(xs), free(ys);
}

// The q-quantile of x[n], numpy's default: between the two places around (n - 1) q, linearly
static double score_quantile(const double *x, size_t n, double q) {
    double *sorted = (double *)memcpy(score_memory(n, sizeof(double)), x, n * sizeof(double));
    qsort(sorted, n, sizeof(double), by_size);
    double place = (double)(n - 1) * q, low = floor(place);
    size_t i = (size_t)low, j = i + 1 < n ? i + 1 : i;
    double value = sorted[i] + (sorted[j] - sorted[i]) * (place - low);
    free(sorted);
    return value;
}

// Are samples copies of training pictures? made[n] and held_out[m] are distances to the nearest training
// picture, by nearest(). ratio: the samples' median over the held-out pictures' (1: as new as pictures that
// the model never saw; 0: copies); nearer: the share of samples that are nearer than 99 % of the held-out
// pictures are (0.01 for pictures like these). Both are also in dev/eval_digits.py; to compare with held-out
// data is the idea of Meehan et al. 2020, arXiv 2004.05675.
static void memorisation(double *ratio, double *nearer, const double *made, size_t n, const double *held_out,
                         size_t m) {
    features_check(features_of("the distances of the samples", made, n, 1), 1);
    features_check(features_of("the distances of the held-out pictures", held_out, m, 1), 1);
    double usual = score_quantile(held_out, m, 0.5), limit = score_quantile(held_out, m, 0.01);
    if (!(usual > 0))
        die("half of the held-out pictures are training pictures: what is a copy cannot be said");
    size_t below = 0;
    for (size_t i = 0; i < n; i++) below += made[i] < limit;
    *ratio = score_quantile(made, n, 0.5) / usual;
    *nearer = (double)below / (double)n;
}

// ----------------------------------------------------------------------------------------------------------
// The judge: convolutions with ReLU, one linear map to the features, one to the logits. Maps are channels
// last. Two kinds of file are read, by the metadata `format`:
//   srdit-judge-1      data/fashion_mnist.py: convN.kernel, .stride, .padding are metadata; `features` sees
//                      the whole last map, `features_logits` the features
//   digits-encoder-1   data/digits.py: three 3x3 convolutions; `cls` sees the means over the four quarters of
//                      the last map; the first 10 outputs of `cls_head` are logits

enum { JUDGE_CONVS = 8, JUDGE_BATCH = 16 };   // at most so many convolutions; pictures that a thread takes

// A convolution from [side,side,in] to [side_out,side_out,out]. A linear map is one whose kernel is as large
// as what it sees.
typedef struct {
    size_t side, in, kernel, stride, padding, side_out, out;
    int relu;
    double *panels, *bias;
} JudgeLayer;
typedef struct {
    SafeFile *file;
    size_t C, S, features, classes;   // pictures are [C,S,S]
    int count, quarters;              // layers before `features`; is the last map reduced to its quarters?
    JudgeLayer layers[JUDGE_CONVS + 2];
    size_t largest;   // numbers in the largest map of a picture
} Judge;

// NAME.PART of a judge, [rows,have] or, where rows is 0, [have], as doubles, turned: [cols,rows]. The first
// *cols columns are kept; where it is 0, it becomes `have`.
static double *judge_tensor(const SafeFile *f, const char *name, const char *part, size_t rows,
                            size_t *cols) {
    char full[64];
    snprintf(full, sizeof(full), "%s.%s", name, part);
    const SafeTensor *t = safe_find(f, full);
    if (!t) die("%s: tensor %s is missing: not a judge (data/README.md describes them)", f->path, full);
    if (t->ndim != (rows ? 2 : 1) || !is_floating(t->type) || (rows && t->shape[0] != rows))
        die("%s: tensor %s: not %s", f->path, full,
            rows ? "the weights of a layer that sees what the one before it gives" : "a layer's bias");
    size_t have = (size_t)t->shape[rows ? 1 : 0], all = rows ? rows : 1;
    if (!*cols) *cols = have;
    if (!have || have < *cols || have > 65536)
        die("%s: tensor %s: %zu outputs where %zu are expected", f->path, full, have, *cols);
    double *x = (double *)score_memory(all * *cols, sizeof(double));
    for (size_t k = 0; k < all; k++)
        for (size_t j = 0; j < *cols; j++) {   // turned: [out,in], as panels_of takes it
            double value = element(safe_data(f, t), t->type, k * have + j);
            if (!(fabs(value) < INFINITY))
                die("%s: tensor %s holds a number that is not finite", f->path, full);
            x[j * all + k] = value;
        }
    return x;
}

// Adds a layer that sees a map [side,side,in]; all outputs are taken where out is 0
static JudgeLayer *judge_layer(Judge *g, const char *name, size_t side, size_t in, size_t kernel,
                               size_t stride, size_t padding, size_t out, int relu) {
    JudgeLayer *l = &g->layers[g->count++];
    if (kernel > side + 2 * padding)
        die("%s: %s: a kernel of %zu does not fit into %zu pixels", g->file->path, name, kernel,
            side + 2 * padding);
    JudgeLayer made = {side, in,   kernel, stride, padding, (side + 2 * padding - kernel) / stride + 1,
                       out,  relu, NULL,   NULL};
    double *weight = judge_tensor(g->file, name, "weight", kernel * kernel * in, &made.out);
    made.bias = judge_tensor(g->file, name, "bias", 0, &made.out);
    made.panels = panels_of(weight, made.out, kernel * kernel * in, NULL);
    free(weight);
    *l = made;
    size_t size = made.side_out * made.side_out * made.out;
    g->largest = size > g->largest ? size : g->largest;
    return l;
}

// The judge in a file, whose sizes and numbers are checked. safe_metadata(judge->file, "name") is the name of
// the data set that it was trained on.
static Judge *judge_open(const char *path) {
    Judge *g = (Judge *)score_memory(1, sizeof(Judge));
    SafeFile *f = g->file = safe_open(path);
    const char *format = safe_metadata(f, "format");
    int digits = format && !strcmp(format, "digits-encoder-1");
    if (!digits && (!format || strcmp(format, "srdit-judge-1")))
        die("%s: its format is %s, and a judge's is srdit-judge-1 or digits-encoder-1", path,
            format ? format : "not given");
    g->S = digits ? 8 : (size_t)safe_whole(f, "size", 1, 4096, 0);
    g->C = digits ? 1 : (size_t)safe_whole(f, "channels", 1, 64, 0);
    g->classes = digits ? 10 : (size_t)safe_whole(f, "classes", 1, 65536, 0);
    int convs = digits ? 3 : (int)safe_whole(f, "convolutions", 0, JUDGE_CONVS, -1);
    size_t side = g->S, width = g->C;
    g->largest = side * side * width;
    for (int i = 1; i <= convs; i++) {
        static const char *const keys[3] = {"kernel", "stride", "padding"};
        size_t shape[3] = {3, 1, 1};
        char name[32], key[64];
        snprintf(name, sizeof(name), "conv%d", i);
        for (int k = 0; k < 3 && !digits; k++) {
            snprintf(key, sizeof(key), "%s.%s", name, keys[k]);
            shape[k] = (size_t)safe_whole(f, key, k < 2, 64, -1);
        }
        JudgeLayer *l = judge_layer(g, name, side, width, shape[0], shape[1], shape[2], 0, 1);
        side = l->side_out, width = l->out;
    }
    g->quarters = digits;
    if (digits) side = 2;
    JudgeLayer *l = judge_layer(g, digits ? "cls" : "features", side, width, side, 1, 0, 0, 0);
    g->features = l->out;
    judge_layer(g, digits ? "cls_head" : "features_logits", 1, l->out, 1, 1, 0, g->classes, 0);
    return g;
}
static void judge_close(Judge *g) {
    for (int i = 0; i < g->count; i++) free(g->layers[i].panels), free(g->layers[i].bias);
    safe_close(g->file), free(g);
}

// out[n][side_out^2,out] = layer of in[n][side^2,in], by one thread; work holds SCORE_TILE rows of what the
// kernel sees, and of sums
static void judge_layer_forward(double *out, const JudgeLayer *l, const double *in, size_t n, double *work) {
    size_t K = l->kernel * l->kernel * l->in, ld = panel_count(l->out) * DNR,
           places = l->side_out * l->side_out;
    double *seen = work, *sums = work + SCORE_TILE * K;
    for (size_t r0 = 0; r0 < n * places; r0 += SCORE_TILE) {
        size_t rows = size_min(n * places - r0, SCORE_TILE);
        memset(seen, 0, rows * K * sizeof(double));   // outside of the picture lie zeros
        for (size_t r = 0; r < rows; r++) {
            const double *map = in + (r0 + r) / places * l->side * l->side * l->in;
            size_t place = (r0 + r) % places, y = place / l->side_out * l->stride;
            size_t x = place % l->side_out * l->stride;   // corner of the kernel, in a padded map
            for (size_t i = 0; i < l->kernel; i++) {
                // columns x ... x + kernel of the padded map, less what is padding
                size_t from = x < l->padding ? l->padding : x, to = x + l->kernel;
                if (to > l->side + l->padding) to = l->side + l->padding;
                if (y + i < l->padding || y + i >= l->side + l->padding || from >= to) continue;
                memcpy(seen + r * K + (i * l->kernel + from - x) * l->in,
                       map + ((y + i - l->padding) * l->side + from - l->padding) * l->in,
                       (to - from) * l->in * sizeof(double));
            }
        }
        dots(sums, ld, seen, rows, K, l->panels, panel_count(l->out));
        for (size_t r = 0; r < rows; r++)
            for (size_t j = 0; j < l->out; j++) {
                double sum = sums[r * ld + j] + l->bias[j];
                out[(r0 + r) * l->out + j] = l->relu && sum < 0 ? 0 : sum;
            }
    }
}

// features[n,features], logits[n,classes] (NULL: not wanted) of pictures[n][C,S,S] in the model's units, as a
// shard's latents are after latent_scale and latent_offset. The judge saw values from -1 to 1: clip before.
static void judge_run(const Judge *g, const real *pictures, size_t n, double *features, double *logits) {
    size_t pixels = g->S * g->S, size = g->C * pixels, room = 0;
    for (size_t i = 0; i < n * size; i++)
        if (!(fabs((double)pictures[i]) < INFINITY))
            die("%s: picture %zu holds a number that is not finite: it cannot be judged", g->file->path,
                i / size);
    for (int i = 0; i < g->count; i++) {
        const JudgeLayer *l = &g->layers[i];
        size_t need = SCORE_TILE * (l->kernel * l->kernel * l->in + panel_count(l->out) * DNR);
        room = need > room ? need : room;
    }
#pragma omp parallel for schedule(dynamic)
    for (size_t first = 0; first < n; first += JUDGE_BATCH) {
        size_t B = size_min(n - first, JUDGE_BATCH);
        double *maps = (double *)score_memory(2 * B * g->largest + room, sizeof(double));
        double *now = maps, *next = maps + B * g->largest, *work = next + B * g->largest;
        for (size_t b = 0; b < B; b++)
            for (size_t c = 0; c < g->C; c++)
                for (size_t p = 0; p < pixels; p++)
                    now[b * size + p * g->C + c] = pictures[(first + b) * size + c * pixels + p];
        for (int i = 0; i < g->count; i++) {
            const JudgeLayer *l = &g->layers[i];
            if (i == g->count - 2 && g->quarters) {   // [B][side,side,in] -> [B][2,2,in], means
                size_t side = g->layers[i - 1].side_out, half = side / 2;
                memset(next, 0, B * 4 * l->in * sizeof(double));
                for (size_t b = 0; b < B; b++)
                    for (size_t p = 0; p < side * side; p++)
                        for (size_t c = 0; c < l->in; c++)
                            next[(b * 4 + p / side / half * 2 + p % side / half) * l->in + c] +=
                                now[(b * side * side + p) * l->in + c] / (double)(half * half);
                double *swap = now;
                now = next, next = swap;
            }
            judge_layer_forward(next, l, now, B, work);
            double *swap = now;
            now = next, next = swap;
            double *wanted = i == g->count - 2 ? features : i == g->count - 1 ? logits : NULL;
            if (wanted) memcpy(wanted + first * l->out, now, B * l->out * sizeof(double));
        }
        free(maps);
    }
}

// The share of pictures whose largest logit, of logits[n,classes], is that of the class wanted[n]; of equal
// ones the first counts
static double label_accuracy(const double *logits, const int *wanted, size_t n, size_t classes) {
    features_check(features_of("the logits", logits, n, classes), 1);
    size_t right = 0;
    for (size_t i = 0; i < n; i++) {
        if (wanted[i] < 0 || (size_t)wanted[i] >= classes)
            die("picture %zu was asked to show class %d, and the judge knows 0 to %zu", i, wanted[i],
                classes - 1);
        size_t most = 0;
        for (size_t c = 1; c < classes; c++)
            if (logits[i * classes + c] > logits[i * classes + most]) most = c;
        right += most == (size_t)wanted[i];
    }
    return (double)right / (double)n;
}
#pragma GCC diagnostic pop
#endif
