// dev/lib/score.h at work on files, for dev/test_score.py; also an example of how it is called.
//
//   cc -std=gnu11 -O3 -march=native -fno-math-errno -fno-trapping-math -fopenmp dev/score_check.c -o build/score_check -lm
//   build/score_check scores SETS.safetensors        every score that the file has tensors for, one a line
//   build/score_check judge JUDGE.safetensors SHARD.safetensors [N]     features and logits of N latents
//   build/score_check pictures JUDGE SHARD SAMPLES   a table for what ./sample --latents SAMPLES wrote
//   build/score_check time MADE REAL TRAIN D PIXELS  seconds for each score of so many random pictures
#include "lib/scoring.h"

// Tensor NAME of the file as doubles, its rows and what is in each; x is NULL where there is none
static Features read_set(const SafeFile *f, const char *name) {
    const SafeTensor *t = safe_find(f, name);
    Features r = features_of(name, NULL, 0, 0);
    if (!t) return r;
    size_t count = safe_elements(t);
    double *x = (double *)score_memory(count, sizeof(double));
    for (size_t i = 0; i < count; i++) x[i] = element(safe_data(f, t), t->type, i);
    r.x = x, r.n = (size_t)t->shape[0], r.d = t->ndim == 2 ? (size_t)t->shape[1] : 1;
    return r;
}

static double *nearest_of(Features x, Features y, size_t parts) {
    double *best = (double *)score_memory(x.n, sizeof(double));
    for (size_t i = 0; i < x.n; i++) best[i] = INFINITY;
    for (size_t p = 0; p < parts; p++) {   // as if y were too large for the memory
        size_t lo = y.n * p / parts, hi = y.n * (p + 1) / parts;
        if (hi > lo) nearest(best, x, features_of(y.name, y.x + lo * y.d, hi - lo, y.d));
    }
    return best;
}

static void print_list(const char *name, const double *x, size_t n) {
    for (size_t i = 0; i < n; i++) printf("%s.%zu %.17g\n", name, i, x[i]);
}

static void scores(const char *path) {
    SafeFile *f = safe_open(path);
    Features made = read_set(f, "made"), reference = read_set(f, "real");
    if (made.x && reference.x) {
        double precision, recall, *theta = score_directions(40, made.d, 1234);
        Moments m = moments_of(made);
        print_list("mean", m.mean, m.d), print_list("cov", m.cov, m.d * m.d);
        printf("frechet %.17g\n", frechet_distance(made, reference));
        printf("kernel %.17g\n", kernel_distance(made, reference));
        printf("sliced %.17g\n", sliced_wasserstein(made, reference, 40, 1234));
        print_list("theta", theta, 40 * made.d);
        if (!safe_metadata(f, "few")) {   // fewer pictures than precision and recall need
            precision_recall(&precision, &recall, made, reference, 3);
            printf("precision %.17g\nrecall %.17g\n", precision, recall);
        }
        free(theta), moments_close(m);
    }
    Features pixels = read_set(f, "made_pixels"), held = read_set(f, "held_pixels");
    Features train = read_set(f, "train_pixels");
    if (pixels.x && held.x && train.x) {
        double ratio, nearer, *near_made = nearest_of(pixels, train, 1),
                              *parts = nearest_of(pixels, train, 3);
        double *near_held = nearest_of(held, train, 1);
        print_list("nearest", near_made, pixels.n), print_list("nearest_in_parts", parts, pixels.n);
        memorisation(&ratio, &nearer, near_made, pixels.n, near_held, held.n);
        printf("ratio %.17g\nnearer %.17g\n", ratio, nearer);
        free(near_made), free(parts), free(near_held);
    }
    Features logits = read_set(f, "logits"), wanted = read_set(f, "wanted");
    if (logits.x && wanted.x) {
        int *y = (int *)score_memory(wanted.n, sizeof(int));
        for (size_t i = 0; i < wanted.n; i++) y[i] = (int)wanted.x[i];
        printf("accuracy %.17g\n", label_accuracy(logits.x, y, logits.n, logits.d));
        free(y);
    }
    Features all[] = {made, reference, pixels, held, train, logits, wanted};
    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++) free((double *)all[i].x);
    safe_close(f);
}

static void judge(const char *judge_path, char *shard, size_t n) {
    Judge *g = judge_open(judge_path);
    Data *d = data_open(&shard, 1);
    size_t all = (size_t)d->shards->latents->shape[0], size = g->C * g->S * g->S;
    if ((size_t)d->C != g->C || (size_t)d->S != g->S)
        die("%s: its latents are no pictures for %s, which judges %zu x %zu x %zu", shard, judge_path, g->C,
            g->S, g->S);
    n = n && n < all ? n : all;
    real *x = (real *)score_memory(n * size, sizeof(real));
    double *features = (double *)score_memory(n * g->features, sizeof(double));
    double *logits = (double *)score_memory(n * g->classes, sizeof(double));
    elements_read(x, safe_data(d->shards->file, d->shards->latents), d->shards->latents->type, 0, n * size,
                  d->scale, d->offset);
    judge_run(g, x, n, features, logits);
    print_list("features", features, n * g->features), print_list("logits", logits, n * g->classes);
    free(x), free(features), free(logits);
    data_close(d), judge_close(g);
}

// The samples of a file, by the table that ./sample --score prints of its own
static void pictures(const char *judge_path, char *shard_path, const char *samples_path) {
    Scoring *s = scoring_open(shard_path, judge_path);
    SafeFile *f = safe_open(samples_path);
    const SafeTensor *made = safe_find(f, "latents"), *wanted = safe_find(f, "labels");
    size_t C = s->judge->C, S = s->judge->S;
    if (!made || !wanted || made->ndim != 4 || made->shape[1] != C || made->shape[2] != S ||
        made->shape[3] != S || wanted->ndim != 1 || wanted->shape[0] != made->shape[0])
        die("%s: no latents [N,%zu,%zu,%zu] and labels [N]: ./sample --latents writes them", samples_path, C,
            S, S);
    size_t n = (size_t)made->shape[0];
    real *x = (real *)score_memory(n * s->size, sizeof(real));
    int *y = (int *)score_memory(n, sizeof(int));
    safe_read(x, f, made);
    for (size_t i = 0; i < n; i++) y[i] = (int)element(safe_data(f, wanted), wanted->type, i);
    scores_table(s, scores_of(s, "the samples", x, y, n, 0), n);
    free(y);
    safe_close(f);
    scoring_close(s);
}

// n rows of d normal numbers, each of its own width, at (seed 5, stream, 0, row)
static Features random_set(const char *name, size_t n, size_t d, uint32_t stream) {
    double *x = (double *)score_memory(n * d, sizeof(double));
    real *z = (real *)score_memory(d, sizeof(real));
    for (size_t i = 0; i < n; i++) {
        fill_normal(z, d, 5, stream, 0, (uint32_t)i);
        for (size_t k = 0; k < d; k++) x[i * d + k] = (double)z[k] / (1 + 0.05 * (double)k);
    }
    free(z);
    return features_of(name, x, n, d);
}
// Prints what was computed and what it took since the last call: by the clock, and of all processors together
static void lap(const char *what, double value) {
    static double last, last_busy;
    if (what)
        printf("%-26s %7.2f s, %7.2f s of processors   %.9g\n", what, now_seconds() - last,
               (double)clock() / CLOCKS_PER_SEC - last_busy, value);
    last = now_seconds(), last_busy = (double)clock() / CLOCKS_PER_SEC;
}
static void timing(size_t n, size_t m, size_t t, size_t d, size_t pixels) {
    Features made = random_set("the samples", n, d, 1), reference = random_set("the real pictures", m, d, 2);
    Features made_pixels = random_set("the samples", n, pixels, 3);
    Features held = random_set("the held-out pictures", m, pixels, 4);
    Features train = random_set("the training pictures", t, pixels, 5);
    Features train_features = random_set("the training pictures", t, d, 6);
    double precision, recall, ratio, nearer;
    lap(NULL, 0);
    lap("Frechet distance", frechet_distance(made, reference));
    lap("Frechet distance to train", frechet_distance(made, train_features));
    lap("kernel distance", kernel_distance(made, reference));
    lap("sliced distance, 1000", sliced_wasserstein(made, reference, 1000, 1));
    precision_recall(&precision, &recall, made, reference, 3);
    lap("precision and recall", precision);
    free(nearest_of(made, train_features, 1));
    lap("nearest, features", 0);
    double *a = nearest_of(made_pixels, train, 1), *b = nearest_of(held, train, 1);
    memorisation(&ratio, &nearer, a, n, b, m);
    lap("memorisation, pixels", ratio);
    free(a), free(b);
    Features all[] = {made, reference, made_pixels, held, train, train_features};
    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++) free((double *)all[i].x);
}

int main(int argc, char **argv) {
    if (argc == 3 && !strcmp(argv[1], "scores")) scores(argv[2]);
    else if ((argc == 4 || argc == 5) && !strcmp(argv[1], "judge"))
        judge(argv[2], argv[3], argc == 5 ? (size_t)atol(argv[4]) : 0);
    else if (argc == 5 && !strcmp(argv[1], "pictures")) pictures(argv[2], argv[3], argv[4]);
    else if (argc == 7 && !strcmp(argv[1], "time"))
        timing((size_t)atol(argv[2]), (size_t)atol(argv[3]), (size_t)atol(argv[4]), (size_t)atol(argv[5]),
               (size_t)atol(argv[6]));
    else
        die("usage: score_check scores SETS | judge JUDGE SHARD [N] | pictures JUDGE SHARD SAMPLES | time "
            "MADE REAL TRAIN D PIXELS");
    return 0;
}
