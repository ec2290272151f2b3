// Damaged files against all that reads one: the reader itself, checkpoints to sample from and to go on from,
// data, decoders, reference files. Built and run by dev/fuzz_safetensors.sh, over libFuzzer where clang has
// it (-DLIBFUZZER), else over the small mutator at the end; dev/fuzz_seeds.c writes the sound files.
//
// The tests are included as they are, and with them the sampler and the trainer, with a few library calls
// renamed: a file is the bytes of the input, its map is a block of exactly that many bytes, so that the
// address sanitizer sees one byte too many; die() jumps back instead of ending the program; and what a
// refused file left allocated is freed after each input. A file that makes the program ask for far more
// memory than the file has bytes, or keeps it busy for a second, is a find like a crash.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#pragma GCC diagnostic ignored "-Wunused-function"
#pragma GCC diagnostic ignored "-Wunused-value"

static const uint8_t *input;
static size_t input_size;
static jmp_buf refused;
static char message[4096];

__attribute__((noreturn)) static void found(const char *what, double number) {
    fprintf(stderr, "%s: %.0f\n", what, number);
    abort();
}

// What the code under test holds, so that it can be freed when it is left in the middle, and how much it is.
// More than MOST_BYTES at once was asked for by a number in the file, not by what is in it.
enum { MOST_BLOCKS = 1 << 16, MOST_BYTES = 64 << 20 };
static void *blocks[MOST_BLOCKS];
static size_t block_bytes[MOST_BLOCKS], held;
static int block_count;
static void *keep(void *p, size_t bytes) {
    if (p && block_count == MOST_BLOCKS) found("blocks of memory for one file", MOST_BLOCKS);
    if (p) held += block_bytes[block_count] = bytes, blocks[block_count++] = p;
    return p;
}
static void forget(void *p) {
    for (int i = block_count - 1; p && i >= 0; i--)
        if (blocks[i] == p) {
            held -= block_bytes[i];
            blocks[i] = blocks[--block_count], block_bytes[i] = block_bytes[block_count];
            break;
        }
}
static void afford(double bytes) {
    if ((double)held + bytes > MOST_BYTES) found("bytes of memory for one small file", (double)held + bytes);
}
static void *fuzz_calloc(size_t n, size_t size) {
    afford((double)n * (double)size);
    return keep(calloc(n, size), n * size);
}
static void *fuzz_realloc(void *p, size_t size) {
    afford((double)size);
    forget(p);
    return keep(realloc(p, size), size);
}
static void fuzz_free(void *p) { forget(p), free(p); }
static char *fuzz_strdup(const char *s) { return (char *)keep(strdup(s), strlen(s) + 1); }
static int fuzz_open(void) { return 1000; }
static int fuzz_close(void) { return 0; }
static int fuzz_fstat(struct stat *st) {
    memset(st, 0, sizeof(*st));
    st->st_mode = S_IFREG | 0644, st->st_size = (off_t)input_size;
    return 0;
}
static void *fuzz_mmap(size_t size) {
    void *p = keep(malloc(size), size);
    return p ? memcpy(p, input, size) : MAP_FAILED;
}
#define calloc fuzz_calloc
#define realloc fuzz_realloc
#define free fuzz_free
#define strdup fuzz_strdup
#define _exit(status) longjmp(refused, 1)
#define open(...) fuzz_open()
#define close(fd) fuzz_close()
#define fstat(fd, st) ((void)(fd), fuzz_fstat(st))
#define mmap(at, size, protection, flags, fd, offset) fuzz_mmap(size)
#define munmap(at, size) fuzz_free(at)
#define printf(...) ((void)0)
#define vprintf(...) ((void)0)
#define fprintf(...) ((void)0)
#define main test_main
#include "../test_srdit.c"
#undef main
// the tests' other half, over a trainer in double, is left out
void replay_double(const char *path, double tolerance, int most, int counts[2]) {
    (void)path, (void)tolerance, (void)most, (void)counts;
}
void tests_double(int counts[2]) { (void)counts; }
#undef calloc
#undef realloc
#undef free
#undef strdup
#undef _exit
#undef open
#undef close
#undef fstat
#undef mmap
#undef munmap
#undef printf
#undef vprintf
#undef fprintf

// Everything that reads a file, each up to its own end or refusal
static void read_all_tensors(void) {
    SafeFile *f = safe_open("input");
    for (int i = 0; i < f->count; i++) {
        const SafeTensor *t = &f->tensors[i];
        if (safe_find(f, t->name) != t) abort();
        if (safe_elements(t) > input_size) abort();
        real *x = (real *)fuzz_calloc(safe_elements(t) + 1, sizeof(real));
        safe_read(x, f, t);
        fuzz_free(x);
    }
    safe_close(f);
    if (block_count) abort();   // a file that was read well leaves nothing behind
}
static void read_checkpoint(void) {
    Config c = config_default();
    SafeFile *f = checkpoint_open("input", &c);
    Params w;
    Table t = params_table(&w, &c, NULL);
    static Acts acts;
    Arena arena = {NULL, 0};
    acts_layout(&acts, &arena, &c, 1, 1);   // sizes only
    real *host = t.total < 1 << 16 ? (real *)fuzz_calloc(t.total, sizeof(real)) : NULL;
    if (host) checkpoint_block(host, &t, f, "model.");
}
// A training that goes on: the checkpoint's settings, its blocks, and that it fits data of its own sizes
// Activations grow with the tokens and the batch, which no tensor's shape need bound: few of both, so that
// memory that is asked for too early is told from memory that is needed.
static void few_tokens(const Config *c) {
    if (tokens_of(c) > 64) longjmp(refused, 1);
}
static void read_resumed(void) {
    Config c = config_default();
    Run run;
    Data d;
    int step;
    memset(&run, 0, sizeof(run)), memset(&d, 0, sizeof(d));
    run.resume = "input";
    SafeFile *f = start_resumed(&c, &run, &step);
    OptionTable config = config_table(&c);
    const Config before = c;
    snprintf(d.name, sizeof(d.name), "x"), snprintf(d.decoder, sizeof(d.decoder), "pixels");
    d.scale = 1, d.count = 2;
    check_resumed(f, &config, &before, &d, "data");
    few_tokens(&c);
    Model *m = cpu_backend.create(&c, 1, run.seed);
    checkpoint_load(&cpu_backend, m, f);
    cpu_backend.destroy(m);
    safe_close(f);
}
static void read_sampled(void) {   // as ./sample does
    SampleRun r = sample_run_default();
    Source s;
    r.checkpoint = "input", r.latents = "none";
    source_open(&s, &r);
    few_tokens(&s.c);
    Model *m = sampling_model(&cpu_backend, &s.c, 1, s.file, s.prefix, 0);
    cpu_backend.destroy(m);
    source_close(&s);
}
static void read_decoder(void) {
    SafeFile *f = safe_open("input");
    Decoder *d = decoder_open(f, "");
    size_t n = (size_t)d->out_ch * (size_t)decoder_factor(d) * (size_t)decoder_factor(d);
    if (n < 1 << 16 && decoder_map_elements(d, 1, 1) < 1 << 16) {
        real *z = (real *)fuzz_calloc((size_t)d->z, sizeof(real)),
             *image = (real *)fuzz_calloc(n, sizeof(real));
        decoder_decode(image, d, z, 1, 1, 1);
        fuzz_free(z), fuzz_free(image);
    }
    decoder_close(d);
    safe_close(f);
}
static void read_reference(void) {
    SafeFile *f = safe_open("input");
    if (safe_whole(f, "steps", 0, 1000, 0) > 2 || safe_whole(f, "sample_steps", 1, 1e6, 1) > 2)
        longjmp(refused, 1);   // slow
    static const char *const inputs[] = {"in.x", "eval.x_t", "sample.latents"};
    for (int i = 0; i < 3; i++) {
        const SafeTensor *t = safe_find(f, inputs[i]);
        if (t && t->ndim && safe_elements(t) && t->shape[0] > 16) longjmp(refused, 1);
    }
    Config c = config_default();
    const char *kind = safe_metadata(f, "kind");
    if (!kind || strcmp(kind, "invae")) reference_config(&c, f), few_tokens(&c);
    safe_close(f);
    replay("input", 0, 0);
}
static void read_data(void) {
    char *paths[] = {(char *)"input"};
    Data *d = data_open(paths, 1);
    Config c = config_default();
    c.patch_size = 1, c.in_channels = d->C, c.input_size = d->S, c.num_classes = d->K, c.z_dim = d->Z;
    c.align = d->shards[0].feats != NULL, c.cls = d->shards[0].cls != NULL;
    data_check(d, &c);
    Batch *b = batch_create(&c, 1);
    for (size_t i = 0; i<d->count; i += d->count> 1 ? d->count - 1 : 1)
        data_sample(d, i, b->x, b->y, c.cls ? b->cls : NULL, c.align ? b->feats : NULL, !c.cls);
    batch_free(b);
    data_close(d);
}

// Each reader must have read some file to its end, or nothing behind its first check would be tested.
enum { READERS = 7 };
static void (*const readers[READERS])(void) = {read_all_tensors, read_checkpoint, read_resumed,  read_sampled,
                                               read_data,        read_decoder,    read_reference};
static const char *const reader_names[READERS] = {"tensors", "checkpoint", "resumed",  "sampled",
                                                  "data",    "decoder",    "reference"};
static size_t accepted[READERS];
static void count_accepted(void) {
    fprintf(stderr, "files read to the end:");
    for (int i = 0; i < READERS; i++)
        fprintf(stderr, " %s %zu%s", reader_names[i], accepted[i], accepted[i] ? "" : "!");
    fputc('\n', stderr);
}
int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc, (void)argv;
    return atexit(count_accepted);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    input = data, input_size = size;
    for (volatile int i = 0; i < READERS; i++) {
        clock_t begin = clock();
        if (!setjmp(refused)) readers[i](), accepted[i]++;
        while (block_count) free(blocks[--block_count]);
        held = 0, safe_files = NULL;
        double seconds = (double)(clock() - begin) / CLOCKS_PER_SEC;
        if (seconds > 1) found("milliseconds for one small file", 1e3 * seconds);
    }
    return 0;
}

// Most damage to a header also breaks the length before it, and nothing behind that check would be reached:
// so half of all inputs get the right one.
static size_t mend_length(uint8_t *data, size_t size) {
    size_t end = size;
    while (end > 9 && data[end - 1] != '}') end--;
    for (int i = 0; i < 8 && end > 9; i++) data[i] = (uint8_t)((uint64_t)(end - 8) >> (8 * i));
    return size;
}

#ifdef LIBFUZZER
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t most);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed) {
    size = LLVMFuzzerMutate(data, size, most);
    return seed & 1 ? mend_length(data, size) : size;
}

#else
// ./fuzz SECONDS WORDS CRASH_FILE SEED_FILE ...    WORDS: a text file, a word a line
static uint8_t now_in[1 << 16];
static size_t now_size;
static const char *crash_file;
static uint64_t state = 88172645463325252u;
static size_t below(size_t n) {   // xorshift
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return n ? (size_t)(state % n) : 0;
}
static void save_crash(int signal) {
    int fd = open(crash_file, O_WRONLY | O_CREAT | O_TRUNC, 0644);
    if (fd < 0 || write(fd, now_in, now_size) < 0) _exit(99);
    _exit(signal ? 77 : 0);
}
static void insert_at(size_t at, const void *what, size_t n) {
    if (now_size + n > sizeof(now_in)) return;
    memmove(now_in + at + n, now_in + at, now_size - at);
    memcpy(now_in + at, what, n);
    now_size += n;
}
static void damage(char words[][64], size_t word_count) {
    uint8_t part[256];
    size_t at = below(now_size + 1), n = below(now_size - at + 1);
    switch (below(7)) {
        case 0:
            if (at < now_size) now_in[at] ^= (uint8_t)(1 << below(8));
            break;
        case 1:
            if (at < now_size) now_in[at] = (uint8_t)below(256);
            break;
        case 2:
            n = below(n < 32 ? n + 1 : 32), memmove(now_in + at, now_in + at + n, now_size - at - n);
            now_size -= n;
            break;
        case 3: now_size = at; break;
        case 4:
            n = n < sizeof(part) ? n : sizeof(part), memcpy(part, now_in + at, n);
            insert_at(below(now_size + 1), part, n);
            break;
        case 5: {
            const char *word = words[below(word_count)];
            insert_at(at, word, strlen(word));
            break;
        }
        default:
            if (at < now_size && isdigit(now_in[at])) now_in[at] = (uint8_t)('0' + below(10));
    }
}
int main(int argc, char **argv) {
    static char words[256][64];
    size_t word_count = 0;
    if (argc < 5) return fputs("usage: fuzz SECONDS WORDS CRASH_FILE SEED_FILE ...\n", stderr), 2;
    FILE *f = fopen(argv[2], "r");
    while (f && word_count < 256 && fscanf(f, "%63s", words[word_count]) == 1) word_count++;
    if (f) fclose(f);
    crash_file = argv[3];
    signal(SIGABRT, save_crash), signal(SIGSEGV, save_crash), signal(SIGFPE, save_crash);
    size_t runs = 0;
    LLVMFuzzerInitialize(&argc, &argv);
    for (int i = 4; i < argc; i++) {   // first the sound files
        if (!(f = fopen(argv[i], "rb"))) return perror("seed"), 2;
        now_size = fread(now_in, 1, sizeof(now_in), f);
        fclose(f);
        LLVMFuzzerTestOneInput(now_in, now_size);
    }
    for (double end = now_seconds() + atof(argv[1]); now_seconds() < end; runs++) {
        f = fopen(argv[4 + below((size_t)argc - 4)], "rb");
        if (!f) return perror("seed"), 2;
        now_size = fread(now_in, 1, sizeof(now_in), f);
        fclose(f);
        for (size_t i = 1 + below(8); i; i--) damage(words, word_count);
        if (below(2)) mend_length(now_in, now_size);
        LLVMFuzzerTestOneInput(now_in, now_size);
    }
    printf("%zu damaged files, no crash\n", runs);
    return 0;
}
#endif
