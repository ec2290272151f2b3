// What every other header here and all programs need: the number type, the end in one sentence, memory, time,
// and files that appear under their name only when they are whole.
//
//   real            float, or double where gradients are checked (-DUSE_DOUBLE)
//   die             a user's mistake, or a machine that cannot go on: one sentence on stderr, exit status 1
//   alloc_zero      memory or the end; now_seconds: a clock for differences
//   file_begin, file_end    write PATH.part, flush it to disk, rename it
//
// The language, here as in all headers of this folder, is the one that C and C++ share. Each can be included
// alone, and more than once.
#ifndef SRDIT_BASE_H
#define SRDIT_BASE_H
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"   // a program takes what it needs
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_max_threads(void) { return 1; }
static int omp_get_thread_num(void) { return 0; }
static void omp_set_num_threads(int n) { (void)n; }
#endif

#if defined(FLT_EVAL_METHOD) && FLT_EVAL_METHOD != 0
#error "floats are computed in another precision here (-mfpmath=387?): gradients would be wrong; use SSE"
#endif
#ifdef USE_DOUBLE
typedef double real;
#define REAL_EPS 2.220446049250313e-16
#else
typedef float real;
#define REAL_EPS 1.1920928955078125e-07
#endif
#ifndef HOST_DEVICE   // train_srdit.cu defines it, so that its kernels draw the same random numbers
#define HOST_DEVICE
#endif

// One sentence on stderr and the end: for mistakes of the user's, and for a machine that cannot go on.
__attribute__((noreturn, format(printf, 1, 2))) static void die(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fflush(stdout);
    fputs("error: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    fflush(NULL);
    _exit(1);   // not exit: a leak checker would miss pointers that a call without return need not keep
}

static void *alloc_zero(size_t count, size_t size) {
    void *p = calloc(count ? count : 1, size);
    if (!p)
        die("out of memory: %.1f MB could not be allocated; a smaller --batch or a larger --accum needs less",
            (double)count * (double)size / 1e6);
    return p;
}

static double now_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int imin(int a, int b) { return a < b ? a : b; }
static int imax(int a, int b) { return a > b ? a : b; }

static double text_number(const char *text, const char *where, const char *what) {
    char *end;
    double x = strtod(text, &end);
    if (end == text || *end) die("%s: %s is \"%s\", which is not a number", where, what, text);
    return x;
}

// A file appears under its name only when it is whole: it is written beside it, flushed to disk and renamed.
static FILE *file_begin(char temporary[PATH_MAX], const char *path) {
    struct stat st;
    if (snprintf(temporary, PATH_MAX, "%s.part", path) >= PATH_MAX) die("%s: the name is too long", path);
    if (!stat(path, &st) && !S_ISREG(st.st_mode))
        die("%s: there is something of that name that is not a file", path);
    FILE *out = fopen(temporary, "wb");
    if (!out) die("%s: cannot be written: %s", temporary, strerror(errno));
    return out;
}
static void file_end(FILE *out, const char *temporary, const char *path) {
    int bad = fflush(out) || ferror(out) || fsync(fileno(out));
    int error = errno;
    bad |= fclose(out) != 0;
    if (bad || rename(temporary, path)) {
        if (!bad) error = errno;
        unlink(temporary);
        die("%s: cannot be written: %s; a file that had this name is untouched", path, strerror(error));
    }
}
// Is there a file, and is it the same by both names?
static int same_file(const char *a, const char *b) {
    struct stat s, t;
    return a && b && !stat(a, &s) && !stat(b, &t) && s.st_dev == t.st_dev && s.st_ino == t.st_ino;
}
// Outputs are never inputs: ends the program where one file would be both.
static void refuse_input(const char *flag, const char *output, const char *input) {
    if (same_file(output, input))
        die("%s %s would replace its own input; give it another name", flag, output);
}
// Ends the program early where file_begin(path) would fail later; nothing is changed.
static void file_probe(const char *path) {
    char temporary[PATH_MAX];
    struct stat st;
    if (!stat(path, &st) && !S_ISREG(st.st_mode))
        die("%s: there is something of that name that is not a file", path);
    if (snprintf(temporary, PATH_MAX, "%s.part", path) >= PATH_MAX) die("%s: the name is too long", path);
    int fresh = lstat(temporary, &st), file = open(temporary, O_WRONLY | O_CREAT, 0666);
    if (file < 0) die("%s: cannot be written: %s", temporary, strerror(errno));
    close(file);
    if (fresh) unlink(temporary);
}
#pragma GCC diagnostic pop
#endif
