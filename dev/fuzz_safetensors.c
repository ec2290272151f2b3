// Damaged files against the reader of train_srdit.c: built and run by dev/fuzz_safetensors.sh, over libFuzzer
// where clang has it (-DLIBFUZZER), else over the small mutator at the end.
//
// The trainer is included as it is, with a few library calls renamed: a file is the bytes of the input, its
// map is a block of exactly that many bytes, so that the address sanitizer sees one byte too many; die()
// jumps back instead of ending the program; and what a refused file left allocated is freed after each input.
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

static const uint8_t *input;
static size_t input_size;
static jmp_buf refused;
static char message[4096];

// What the code under test holds, so that it can be freed when it is left in the middle
enum { MOST_BLOCKS = 1 << 16 };
static void *blocks[MOST_BLOCKS];
static int block_count;
static void *keep(void *p) {
    if (p && block_count == MOST_BLOCKS) free(p), longjmp(refused, 1);
    if (p) blocks[block_count++] = p;
    return p;
}
static void forget(void *p) {
    for (int i = block_count - 1; p && i >= 0; i--)
        if (blocks[i] == p) {
            blocks[i] = blocks[--block_count];
            break;
        }
}
// More than 2 GB counts as refused: the real program says "out of memory".
static void *fuzz_calloc(size_t n, size_t size) {
    if (size && n > ((size_t)1 << 31) / size) longjmp(refused, 1);
    return keep(calloc(n, size));
}
static void *fuzz_realloc(void *p, size_t size) {
    forget(p);
    return keep(realloc(p, size));
}
static void fuzz_free(void *p) { forget(p), free(p); }
static char *fuzz_strdup(const char *s) { return (char *)keep(strdup(s)); }
static int fuzz_open(void) { return 1000; }
static int fuzz_fstat(struct stat *st) {
    memset(st, 0, sizeof(*st));
    st->st_mode = S_IFREG | 0644, st->st_size = (off_t)input_size;
    return 0;
}
static void *fuzz_mmap(size_t size) {
    void *p = keep(malloc(size));
    return p ? memcpy(p, input, size) : MAP_FAILED;
}
#define calloc fuzz_calloc
#define realloc fuzz_realloc
#define free fuzz_free
#define strdup fuzz_strdup
#define _exit(status) longjmp(refused, 1)
#define open(...) fuzz_open()
#define close(fd) (void)(fd)
#define fstat(fd, st) ((void)(fd), fuzz_fstat(st))
#define mmap(at, size, protection, flags, fd, offset) fuzz_mmap(size)
#define munmap(at, size) fuzz_free(at)
#define vfprintf(file, format, args) vsnprintf(message, sizeof(message), format, args)
#define fputs(text, file) ((void)(text), 0)
#define fputc(c, file) ((void)(c), 0)
#pragma GCC diagnostic ignored "-Wunused-function"
#pragma GCC diagnostic ignored "-Wunused-value"
#define TRAIN_SRDIT_NO_MAIN
#include "../train_srdit.c"
#undef calloc
#undef realloc
#undef free
#undef strdup
#undef exit
#undef open
#undef close
#undef fstat
#undef mmap
#undef munmap
#undef vfprintf
#undef fputs
#undef fputc

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
static void read_data(void) {
    char *paths[] = {(char *)"input"};
    Data *d = data_open(paths, 1);
    Config c = config_default();
    c.patch_size = 1, c.in_channels = d->C, c.input_size = d->S, c.num_classes = d->K, c.z_dim = d->Z;
    c.align = d->shards[0].feats != NULL, c.cls = d->shards[0].cls != NULL;
    data_check(d, &c);
    Batch *b = batch_create(&c, 1);
    for (size_t i = 0; i < d->count; i += d->count > 1 ? d->count - 1 : 1)
        data_sample(d, i, b->x, b->y, c.cls ? b->cls : NULL, c.align ? b->feats : NULL, !c.cls);
    batch_free(b);
    data_close(d);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static void (*const readers[])(void) = {read_all_tensors, read_checkpoint, read_data};
    input = data, input_size = size;
    for (volatile int i = 0; i < 3; i++) {
        if (!setjmp(refused)) readers[i]();
        while (block_count) free(blocks[--block_count]);
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
    case 0: if (at < now_size) now_in[at] ^= (uint8_t)(1 << below(8)); break;
    case 1: if (at < now_size) now_in[at] = (uint8_t)below(256); break;
    case 2: n = below(n < 32 ? n + 1 : 32), memmove(now_in + at, now_in + at + n, now_size - at - n);
            now_size -= n; break;
    case 3: now_size = at; break;
    case 4: n = n < sizeof(part) ? n : sizeof(part), memcpy(part, now_in + at, n);
            insert_at(below(now_size + 1), part, n); break;
    case 5: { const char *word = words[below(word_count)]; insert_at(at, word, strlen(word)); break; }
    default: if (at < now_size && isdigit(now_in[at])) now_in[at] = (uint8_t)('0' + below(10));
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
