// All scores of a set of pictures against a shard's held-out ones, beside what real and what trivial pictures
// reach: what ./sample --score prints, and what a timed run ends in.
//
//   scoring_open     a shard, its judge, and all that is the same for every set of pictures
//   scores_of        a set's scores
//   scores_table     the table: the set, training pictures (the floor), a Gaussian, and what each row means
#ifndef SRDIT_SCORING_H
#define SRDIT_SCORING_H
#include "score.h"
#include "shards.h"
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"   // a program takes what it needs

enum { SCORING_PART = 4096, GAUSS_ROWS = 2000, DIRECTIONS = 256, NEIGHBOURS = 3 };

// frechet, kernel, sliced: distances of the judge's features to those of held-out pictures; right, precision,
// recall and copies are shares; newness is 1 for pictures as far from the training pictures as held-out ones
typedef struct {
    double frechet, kernel, sliced, precision, recall, right, newness, copies;
} Scores;
enum { SCORES = sizeof(Scores) / sizeof(double) };
static const struct {
    const char *name, *what;
} score_rows[SCORES] = {
    {"frechet", "Frechet distance of the judge's features; 0 is best"},
    {"kernel", "cubic kernel distance of the same, unbiased; 0 is best"},
    {"sliced", "sliced Wasserstein distance of the same; 0 is best"},
    {"precision", "share of pictures that lie among real ones"},
    {"recall", "share of real pictures that lie among these"},
    {"right", "share in which the judge sees the class that was asked for"},
    {"newness", "distance to the nearest training picture, that of held-out ones being 1"},
    {"copies", "share nearer to a training picture than 99 % of held-out ones are"}};

// A set of pictures x[n][C,S,S], and what the judge sees in them
typedef struct {
    real *x;
    double *logits;
    Features features, pixels;
    size_t n;
} Judged;
typedef struct {
    char judge_path[PATH_MAX];
    Data *data;
    Judge *judge;
    size_t train, held, size;   // pictures, and numbers in one
    Judged real_ones;           // the held-out pictures
    double *held_nearest;       // distance of each to its nearest training picture
    double held_right;          // share of them that the judge names
} Scoring;

// x is clipped to -1 ... 1, as a picture is; the set keeps it.
static Judged judged_open(const Scoring *s, const char *name, real *x, size_t n) {
    Judged j;
    double *features = (double *)score_memory(n * s->judge->features, sizeof(double));
    double *pixels = (double *)score_memory(n * s->size, sizeof(double));
    j.x = x;
    j.n = n;
    j.logits = (double *)score_memory(n * s->judge->classes, sizeof(double));
    for (size_t i = 0; i < n * s->size; i++) {
        x[i] = x[i] > 1 ? 1 : x[i] < -1 ? -1 : x[i];   // NaN stays NaN, and is refused
        pixels[i] = (double)x[i];
    }
    judge_run(s->judge, x, n, features, j.logits);
    j.features = features_of(name, features, n, s->judge->features);
    j.pixels = features_of(name, pixels, n, s->size);
    return j;
}
static void judged_close(Judged *j) {
    free(j->x), free(j->logits), free((double *)j->features.x), free((double *)j->pixels.x);
}

// Pictures first ... first + n of the shard, in the model's units, and their labels (NULL: not wanted)
static real *shard_pictures(const Scoring *s, size_t first, size_t n, int *y) {
    const Shard *shard = s->data->shards;
    const SafeTensor *t = shard->labels;
    real *x = (real *)score_memory(n * s->size, sizeof(real));
    read_elements(x, shard->file, shard->latents, first * s->size, n * s->size, s->data->scale,
                  s->data->offset);
    for (size_t i = 0; y && i < n; i++) y[i] = (int)element(safe_data(shard->file, t), t->type, first + i);
    return x;
}

// Distance of each of these pictures to its nearest training picture, in pixels; the caller frees.
static double *nearest_training(const Scoring *s, Features pictures) {
    double *best = (double *)score_memory(pictures.n, sizeof(double));
    for (size_t i = 0; i < pictures.n; i++) best[i] = INFINITY;
    for (size_t first = 0; first < s->train; first += SCORING_PART) {
        size_t n = size_min(s->train - first, SCORING_PART), count = n * s->size;
        real *x = shard_pictures(s, first, n, NULL);
        double *y = (double *)score_memory(count, sizeof(double));
        for (size_t i = 0; i < count; i++) y[i] = (double)x[i];
        nearest(best, pictures, features_of("the training pictures", y, n, s->size));
        free(x), free(y);
    }
    return best;
}

// judge: a file, or NULL: the shard's own, NAME_judge.safetensors beside it or else NAME_encoder.safetensors
static Scoring *scoring_open(const char *shard, const char *judge) {
    Scoring *s = (Scoring *)score_memory(1, sizeof(Scoring));
    s->data = data_open((char **)&shard, 1);
    const Data *d = s->data;
    const char *slash = strrchr(shard, '/'), *const kinds[] = {"judge", "encoder"};
    int folder = slash ? (int)(slash + 1 - shard) : 0, found = judge != NULL;
    if (judge) snprintf(s->judge_path, PATH_MAX, "%s", judge);
    for (int i = 0; i < 2 && !found; i++) {
        snprintf(s->judge_path, PATH_MAX, "%.*s%s_%s.safetensors", folder, shard, d->name, kinds[i]);
        found = !access(s->judge_path, F_OK);
    }
    if (!found)
        die("%s: there is no judge for it, %.*s%s_judge.safetensors; --judge FILE names another", shard,
            folder, shard, d->name);
    s->judge = judge_open(s->judge_path);
    const Judge *g = s->judge;
    if ((size_t)d->C != g->C || (size_t)d->S != g->S || (size_t)d->K != g->classes)
        die("%s: it judges pictures of %zu x %zu x %zu in %zu classes, and %s has %d x %d x %d in %d",
            s->judge_path, g->C, g->S, g->S, g->classes, shard, d->C, d->S, d->S, d->K);
    s->train = d->count;
    s->held = (size_t)d->shards->latents->shape[0] - s->train;
    s->size = (size_t)d->C * (size_t)d->S * (size_t)d->S;
    if (s->held <= NEIGHBOURS)
        die("%s: it has no held-out pictures to compare with (train_samples in its metadata)", shard);
    int *y = (int *)score_memory(s->held, sizeof(int));
    s->real_ones = judged_open(s, "the held-out pictures", shard_pictures(s, s->train, s->held, y), s->held);
    s->held_right = label_accuracy(s->real_ones.logits, y, s->held, g->classes);
    s->held_nearest = nearest_training(s, s->real_ones.pixels);
    if (!(score_quantile(s->held_nearest, s->held, 0.5) > 0))
        die("%s: half of its held-out pictures are training pictures: what is a copy cannot be said", shard);
    free(y);
    return s;
}
static void scoring_close(Scoring *s) {
    judged_close(&s->real_ones);
    judge_close(s->judge);
    data_close(s->data);
    free(s->held_nearest);
    free(s);
}

// x[n][C,S,S] in the model's units, which the scores take over and free; y: the classes that were asked for.
// are_training: each is its own nearest training picture, which need not be looked for.
static Scores scores_of(const Scoring *s, const char *name, real *x, const int *y, size_t n,
                        int are_training) {
    Scores r;
    if (n <= NEIGHBOURS) die("%s: %zu pictures are too few to be scored", name, n);
    Judged j = judged_open(s, name, x, n);
    Features a = j.features, b = s->real_ones.features;
    r.frechet = frechet_distance(a, b);
    r.kernel = kernel_distance(a, b);
    r.sliced = sliced_wasserstein(a, b, DIRECTIONS, 1);
    precision_recall(&r.precision, &r.recall, a, b, NEIGHBOURS);
    r.right = label_accuracy(j.logits, y, n, s->judge->classes);
    double *best = are_training ? (double *)score_memory(n, sizeof(double)) : nearest_training(s, j.pixels);
    memorisation(&r.newness, &r.copies, best, n, s->held_nearest, s->held);
    free(best);
    judged_close(&j);
    return r;
}

// The scores of the first n training pictures, or of all: what a perfect copyist reaches
static Scores scores_of_training(const Scoring *s, size_t n) {
    n = size_min(n, s->train);
    int *y = (int *)score_memory(n, sizeof(int));
    real *x = shard_pictures(s, 0, n, y);
    Scores r = scores_of(s, "the training pictures", x, y, n, 1);
    free(y);
    return r;
}

// The scores of n pictures drawn from a Gaussian: mean + sum_i g_i (x_i - mean) / sqrt(m - 1), g_i normal,
// has mean and covariance of the m training pictures x_i.
static Scores scores_of_gaussian(const Scoring *s, size_t n) {
    size_t m = size_min(GAUSS_ROWS, s->train), d = s->size;
    int *y = (int *)score_memory(n, sizeof(int));
    real *from = shard_pictures(s, 0, m, NULL), *g = (real *)score_memory(n * m, sizeof(real));
    real *x = (real *)score_memory(n * d, sizeof(real)), *mean = (real *)score_memory(d, sizeof(real));
    for (size_t i = 0; i < n; i++) {
        fill_normal(g + i * m, m, 1, 0, 0, (uint32_t)i);
        y[i] = (int)(i % s->judge->classes);
    }
    for (size_t k = 0; k < d; k++) {
        double sum = 0;
        for (size_t i = 0; i < m; i++) sum += (double)from[i * d + k];
        mean[k] = (real)(sum / (double)m);
        for (size_t i = 0; i < m; i++)
            from[i * d + k] = (from[i * d + k] - mean[k]) / (real)sqrt((double)m - 1);
    }
    matmul(x, g, from, mean, n, d, m, 0, 0, 0);
    free(from), free(g), free(mean);
    Scores r = scores_of(s, "the Gaussian", x, y, n, 0);
    free(y);
    return r;
}

static void scores_table(const Scoring *s, Scores made, size_t n) {
    Scores train = scores_of_training(s, n), gauss = scores_of_gaussian(s, n);
    const double *columns[3] = {&made.frechet, &train.frechet, &gauss.frechet};
    printf("scores of %zu samples against %zu held-out pictures of %s; %s is right on %.2f %% of these\n", n,
           s->held, s->data->name, s->judge_path, 100 * s->held_right);
    printf("             samples  training  Gaussian\n");
    for (int i = 0; i < SCORES; i++)
        printf("%-10s %9.5f %9.5f %9.5f  %s\n", score_rows[i].name, columns[0][i], columns[1][i],
               columns[2][i], score_rows[i].what);
    fflush(stdout);
}
#pragma GCC diagnostic pop
#endif
