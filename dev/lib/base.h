// What every other header here and all programs need: the number type, the end in one sentence, memory, time,
// and files that appear under their name only when they are whole.
//
//   real            float, or double where gradients are checked (-DUSE_DOUBLE)
//   die             a user's mistake, or a machine that cannot go on: one sentence on stderr, exit status 1
//   alloc_zero      memory or the end; now_seconds: a clock for differences
//   file_begin, file_end    write beside PATH, flush to disk, rename
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
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_max_threads(void) { return 1; }
static int omp_get_num_procs(void) { return 1; }
static int omp_get_thread_num(void) { return 0; }
static int omp_in_parallel(void) { return 0; }
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

// What die() does first: one of several ranks tells the others
static void (*before_death)(const char *text);

// One sentence on stderr and the end: for mistakes of the user's, and for a machine that cannot go on. What
// it quotes may come from a hostile file, so control characters do not reach the terminal.
__attribute__((noreturn, format(printf, 1, 2))) static void die(const char *format, ...) {
    char text[3 * PATH_MAX];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof(text), format, args);
    va_end(args);
    for (char *s = text; *s; s++)
        if ((unsigned char)*s < 32 || *s == 127) *s = '?';
    if (before_death) before_death(text);
    fflush(stdout);
    fprintf(stderr, "error: %s\n", text);
    fflush(NULL);
    _exit(1);   // not exit: a leak checker would miss pointers that a call without return need not keep
}

static const char *memory_hint = "";   // what the program's user can do about it
static void *alloc_zero(size_t count, size_t size) {
    void *p = calloc(count ? count : 1, size);
    if (!p)
        die("out of memory: %.1f MB could not be allocated%s", (double)count * (double)size / 1e6,
            memory_hint);
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
    double x = strtod(text, &end);   // which would also take 0x10, inf and nan
    if (end == text || *end || text[strspn(text, "+-.0123456789eE")])
        die("%s: %s is \"%s\", which is not a number", where, what, text);
    return x;
}

// ----------------------------------------------------------------------------------------------------------
// Files that appear under their name only when they are whole: written beside it, flushed to disk, renamed.
// Where the name is a link, the file that it points to is replaced and the link stays.

#define PART ".srdit.part"   // what is added to the name meanwhile; nobody else's files end so
typedef struct {
    FILE *file;
    char path[PATH_MAX], temporary[PATH_MAX];
} NewFile;

static void part_name(NewFile *n, const char *path) {
    struct stat st;
    int link = !lstat(path, &st) && S_ISLNK(st.st_mode);
    if (link && !realpath(path, n->path)) die("%s: is a link to nothing: %s", path, strerror(errno));
    if ((!link && snprintf(n->path, PATH_MAX, "%s", path) >= PATH_MAX) ||
        snprintf(n->temporary, PATH_MAX, "%s" PART, n->path) >= PATH_MAX)
        die("%s: the name is too long", path);
    if (!stat(n->path, &st) && !S_ISREG(st.st_mode))
        die("%s: there is something of that name that is not a file", path);
}
// Opens what will become `path`, with all that an interrupted program left in it, and locks it: of two that
// write the same file, in one program or in two, the second ends.
static void part_open(NewFile *n, const char *path) {
    struct stat ours, there;
    part_name(n, path);
    for (int same = 0; !same;) {   // until it is the file of that name: another may have renamed it meanwhile
        int fd = open(n->temporary, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
        if (fd < 0 && errno == ENOENT) die("%s: cannot be written: there is no such folder", path);
        if (fd < 0) die("%s: cannot be written: %s", n->temporary, strerror(errno));
        if (flock(fd, LOCK_EX | LOCK_NB) && errno == EWOULDBLOCK)
            die("%s: another output or another program is writing it; give this one another name", path);
        if (fstat(fd, &ours)) die("%s: cannot be written: %s", n->temporary, strerror(errno));
        if (S_ISREG(ours.st_mode) && !lstat(n->temporary, &there) && S_ISLNK(there.st_mode))
            die("%s: is a link; delete it", n->temporary);
        same = !stat(n->temporary, &there) && ours.st_dev == there.st_dev && ours.st_ino == there.st_ino;
        if (!same) close(fd);
        else if (!(n->file = fdopen(fd, "r+b"))) die("%s: cannot be written: %s", path, strerror(errno));
    }
}
// The same, emptied
static NewFile file_begin(const char *path) {
    NewFile n;
    struct stat st;
    part_open(&n, path);
    int fd = fileno(n.file);
    if (fstat(fd, &st) || (S_ISREG(st.st_mode) && ftruncate(fd, 0)))
        die("%s: cannot be written: %s", n.temporary, strerror(errno));
    return n;
}
static void file_abandon(const NewFile *n) {
    unlink(n->temporary);
    fclose(n->file);
}
// Everything so far to the disk; returns 0 or the error.
static int file_flush(NewFile *n) {
    int failed = ferror(n->file);   // an earlier write, and errno is still what it said
    return failed || fflush(n->file) || fsync(fileno(n->file)) ? errno ? errno : EIO : 0;
}
// Returns 0, or the error where the file did not come to its name; then it is still in n->temporary.
static int file_finish(NewFile *n) {
    int error = file_flush(n), lock = dup(fileno(n->file));   // it holds until the name is given
    if (lock < 0 && !error) error = errno;
    if (fclose(n->file) && !error) error = errno;
    if (!error && rename(n->temporary, n->path)) error = errno;
    close(lock);
    return error;
}
__attribute__((noreturn)) static void file_failed(const NewFile *n, int error) {
    unlink(n->temporary);
    die("%s: cannot be written: %s; a file that had this name is untouched", n->path, strerror(error));
}
static void file_end(NewFile *n) {
    int error = file_finish(n);
    if (error) file_failed(n, error);
}
// Ends the program early where file_begin(path) would fail later; nothing is changed.
static void file_probe(const char *path) {
    NewFile n;
    struct stat st;
    part_name(&n, path);
    int fresh = lstat(n.temporary, &st);
    part_open(&n, path);
    if (fresh) unlink(n.temporary);
    fclose(n.file);
}
// Is there a file, and is it the same by both names?
static int same_file(const char *a, const char *b) {
    struct stat s, t;
    return a && b && !stat(a, &s) && !stat(b, &t) && s.st_dev == t.st_dev && s.st_ino == t.st_ino;
}
// Ends the program where an output would replace a file that is not of its kind: one that does not have
// `mark` among its first bytes
static void refuse_foreign(const char *flag, const char *path, const char *mark) {
    char head[8192];
    FILE *f = path ? fopen(path, "rb") : NULL;
    if (!f) return;
    size_t n = fread(head, 1, sizeof(head), f);
    fclose(f);
    if (n && !memmem(head, n, mark, strlen(mark)))
        die("%s %s: there is a file of that name, and of another kind; give this one another name", flag,
            path);
}
// Would two outputs, of which there may be neither yet, be one file?
static int same_output(const char *a, const char *b) {
    NewFile m, n;
    if (!a || !b) return 0;
    part_name(&m, a);
    part_name(&n, b);
    char *last_m = strrchr(m.path, '/'), *last_n = strrchr(n.path, '/');
    const char *name_m = last_m ? last_m + 1 : m.path, *name_n = last_n ? last_n + 1 : n.path;
    if (strcmp(name_m, name_n)) return 0;
    if (last_m) last_m[1] = 0;
    if (last_n) last_n[1] = 0;
    return same_file(last_m ? m.path : ".", last_n ? n.path : ".");
}
// Outputs are never inputs: ends the program where one file would be both.
static void refuse_input(const char *flag, const char *output, const char *input) {
    if (same_file(output, input))
        die("%s %s would replace its own input; give it another name", flag, output);
}
#pragma GCC diagnostic pop
#endif
