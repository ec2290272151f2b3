// How fast batches are read: what the host does for a step of a GPU, apart from launching it. Samples as they
// are stored (what a GPU is given), and converted to float (what the CPU's trainer reads); the file in memory
// or not.
//
//   make bench_loader && ./bench_loader [--data my.safetensors] [--model B/1] [--batch 256] [--threads 2]
//
// Without --data it makes a shard of ImageNet's shapes and of no meaning, once:
// build/bench_loader.safetensors.
// Each line is of a pass over the data, the best of three: seconds by the clock, and of the processor, all
// threads together. "From the disk" empties the system's cache of the file first (posix_fadvise), as far as
// it follows that advice.
#define TRAIN_SRDIT_NO_MAIN
#pragma GCC diagnostic ignored "-Wunused-function"   // a program takes what it needs
#pragma GCC diagnostic ignored "-Warray-bounds"      // gcc 12: an option of any kind might be a Series
#include "../train_srdit.c"
#include <sys/resource.h>

static double cpu_seconds(void) {
    struct rusage r;
    getrusage(RUSAGE_SELF, &r);
    return (double)(r.ru_utime.tv_sec + r.ru_stime.tv_sec) +
           1e-6 * (double)(r.ru_utime.tv_usec + r.ru_stime.tv_usec);
}

static void forget(const TextList *paths) {
    for (int i = 0; i < paths->count; i++) {
        int fd = open(paths->items[i], O_RDONLY), status = -1;
        if (fd >= 0 && !fsync(fd)) status = posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
        if (status) die("%s: the system's cache of it cannot be emptied", paths->items[i]);
        close(fd);
    }
}

// One line of the table; the data is opened anew, since what is mapped stays in memory
static void measure(const char *what, const TextList *paths, Config *c, Batch *b, int stored, int cold) {
    double least = INFINITY, cpu = 0;
    size_t images = 0;
    for (int turn = 0; turn < 3; turn++) {
        if (cold) forget(paths);
        Data *d = data_open(paths->items, paths->count);
        int steps = (int)(d->count / (size_t)b->B);
        b->stored = stored;
        if (!cold && !turn) batch_load(b, d, c, 1, 0, 0, b->B);   // touches the memory
        double start = now_seconds(), used = cpu_seconds();
        for (int step = 0; step < steps; step++) batch_load(b, d, c, 1, step + turn * steps, 0, b->B);
        double seconds = now_seconds() - start;
        if (seconds < least) least = seconds, cpu = cpu_seconds() - used, images = (size_t)(steps * b->B);
        data_close(d);
    }
    double per_step = 1000 * (double)b->B / (double)images;
    printf("| %s | %.0f | %.1f | %.1f |\n", what, (double)images / least, least * per_step, cpu * per_step);
}

// 2048 samples as data/imagenet.py stores them, 0.45 GB: features in int8, latents in bf16
static void make_shard(const char *path) {
    enum { SAMPLES = 2048, LATENT = 32 * 16 * 16, WIDTH = 768, FEATS = 257 * WIDTH };
    size_t bytes[4] = {4ul * WIDTH * SAMPLES, 2ul * LATENT * SAMPLES, 4ul * SAMPLES, (size_t)FEATS * SAMPLES};
    size_t end[5] = {0};
    for (int k = 0; k < 4; k++) end[k + 1] = end[k] + bytes[k];
    char head[1024];
    int n = snprintf(
        head, sizeof(head),
        "{\"__metadata__\":{\"format\":\"srdit-data-1\",\"name\":\"nothing\",\"classes\":\"1000\","
        "\"latent_scale\":\"0.3099\",\"latent_offset\":\"0\",\"decoder\":\"invae\",\"train_samples\":\"%d\"},"
        "\"cls\":{\"dtype\":\"F32\",\"shape\":[%d,%d],\"data_offsets\":[%zu,%zu]},"
        "\"latents\":{\"dtype\":\"BF16\",\"shape\":[%d,32,16,16],\"data_offsets\":[%zu,%zu]},"
        "\"labels\":{\"dtype\":\"I32\",\"shape\":[%d],\"data_offsets\":[%zu,%zu]},"
        "\"feats\":{\"dtype\":\"I8\",\"shape\":[%d,257,%d],\"data_offsets\":[%zu,%zu]}}",
        SAMPLES, SAMPLES, WIDTH, end[0], end[1], SAMPLES, end[1], end[2], SAMPLES, end[2], end[3], SAMPLES,
        WIDTH, end[3], end[4]);
    while (n % 8) head[n++] = ' ';
    uint64_t size = (uint64_t)n;
    uint8_t *part = (uint8_t *)alloc_zero(FEATS, 1);
    printf("%s: a shard of %d samples, made for this\n", path, (int)SAMPLES);
    mkdir("build", 0777);
    NewFile file = file_begin(path);
    fwrite(&size, sizeof(size), 1, file.file);
    fwrite(head, 1, (size_t)n, file.file);
    for (size_t left = end[3]; left;) {   // zeros, which are numbers of any type
        size_t now = left < FEATS ? left : FEATS;
        fwrite(part, 1, now, file.file);
        left -= now;
    }
    for (int i = 0; i < SAMPLES; i++) {
        for (int k = 0; k < FEATS; k++)
            part[k] = (uint8_t)((unsigned)(i + 1) * (unsigned)(k + 1) * 2654435761u >> 24);
        fwrite(part, 1, FEATS, file.file);
    }
    file_end(&file);
    free(part);
}

typedef struct {
    TextList data;
    const char *model;
    int batch, threads;
} LoaderBench;
#define LINE(name, field, kind, initial, low, high, help)                                                    \
    { name, kind, offsetof(LoaderBench, field), low, high, 0, help, initial, NULL }
static const Option bench_options[] = {
    LINE("data", data, LIST, 0, 0, 0, "one or more data shards"),
    LINE("model", model, TEXT, 0, 0, 0, "whose patches and techniques count [B/1]"),
    LINE("batch", batch, WHOLE, 256, 1, 1e6, "samples a step"),
    LINE("threads", threads, WHOLE, 2, 1, 4096, "of OpenMP"),
};

int main(int argc, char **argv) {
    wait_calmly(argv);
    LoaderBench o;
    memset(&o, 0, sizeof(o));
    OptionTable table = {bench_options, sizeof(bench_options) / sizeof(bench_options[0]), &o, NULL};
    options_reset(&table);
    if (wants_help(argc, argv)) {
        options_print(&table, 0, 12);
        return 0;
    }
    options_parse(&table, 1, NULL, argc, argv);
    static char *own[] = {(char *)"build/bench_loader.safetensors"};
    if (!o.data.count) {
        if (access(own[0], F_OK)) make_shard(own[0]);
        o.data.items = own;
        o.data.count = 1;
    }
    omp_set_num_threads(o.threads);
    Config c = config_default();
    if (!model_preset(&c, o.model ? o.model : "B/1")) die("--model %s: no such model", o.model);
    Data *d = data_open(o.data.items, o.data.count);
    c.in_channels = d->C, c.input_size = d->S, c.num_classes = d->K, c.z_dim = d->Z;
    if (!d->shards[0].cls) c.cls = 0;
    if (!d->shards[0].feats) c.align = 0;
    config_check(&c, "the model");
    data_check(d, &c);
    if (d->latent_type == DTYPES || (c.align && d->feat_type == DTYPES))
        die("%s: the shards store their samples in different types", o.data.items[0]);
    if ((size_t)o.batch > d->count) die("--batch %d: the data has only %zu samples", o.batch, d->count);
    Batch *b = batch_create(&c, o.batch);
    b->on_device = 1;
    b->x_type = d->latent_type, b->feats_type = c.align ? d->feat_type : I8;
    size_t latent = (size_t)latent_of(&c) * (size_t)dtypes[b->x_type].bytes, B = (size_t)o.batch;
    size_t feats = (size_t)(tokens_of(&c) * c.z_dim) * (size_t)dtypes[b->feats_type].bytes;
    b->x_stored = alloc_zero(1 + B, latent), b->feats_stored = alloc_zero(B, feats);
    printf("%zu samples of %.0f kB as stored; steps of %d; %d thread%s\n\n", d->count,
           (double)(latent + (c.align ? feats : 0)) / 1e3, o.batch, o.threads, o.threads > 1 ? "s" : "");
    data_close(d);
    printf("| samples | pictures/s | ms a step | ms of the processor |\n| --- | ---: | ---: | ---: |\n");
    measure("as stored, in memory", &o.data, &c, b, 1, 0);
    measure("converted, in memory", &o.data, &c, b, 0, 0);
    measure("as stored, from the disk", &o.data, &c, b, 1, 1);
    measure("converted, from the disk", &o.data, &c, b, 0, 1);
    return 0;
}
