// Makes the n-th call to the operating system fail, or ends the process there: a library to preload, driven
// by dev/test_faults.py. It sees the calls that the program itself makes, not those of libc or OpenMP, with
// one exception: what libc writes and reads for the program's own FILEs goes through here too, since every
// FILE becomes one of fopencookie's.
//
//   cc -shared -fPIC -O1 dev/faults.c -o faults.so
//   FAULTS_LOG=calls LD_PRELOAD=./faults.so ./sample ...                    a line for each call: "name file"
//   FAULTS_AT=17 FAULTS_DO=ENOSPC's number LD_PRELOAD=./faults.so ...       the 17th (from 1) fails with it
//   FAULTS_AT=17 FAULTS_DO=kill|torn|stop                                   SIGKILL, SIGSTOP before the 17th;
//                                                       torn: half of a write, then SIGKILL
//   FAULTS_KEEP=folder      a hard link to each file that gets its name by rename, as folder/NUMBER.NAME
//
// A write that fails writes half of its bytes first, as a full disk does. A close that fails still closes.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);

enum { FILES = 1024, NAME = 160, KILL = -1, TORN = -2, STOP = -3 };
static char names[FILES][NAME];          // of open files, by descriptor
static FILE *streams[FILES];             // and their FILEs
static uintptr_t code_begin, code_end;   // of the program
static long calls, fault_at;
static int fault_do, log_fd = -1, renames;
static const char *keep;

// The function of that name that would have been called without this library
#define REAL(name) ((__typeof__(name) *)real_function(#name))
static void *real_function(const char *name) { return dlsym(RTLD_NEXT, name); }
#define FROM_PROGRAM from_program(__builtin_return_address(0))
static int from_program(void *at) { return (uintptr_t)at >= code_begin && (uintptr_t)at < code_end; }

static int find_code(struct dl_phdr_info *info, size_t size, void *none) {
    (void)size, (void)none;
    for (int i = 0; i < info->dlpi_phnum; i++) {   // the first object is the program
        const ElfW(Phdr) *p = &info->dlpi_phdr[i];
        if (p->p_type != PT_LOAD || !(p->p_flags & PF_X)) continue;
        code_begin = info->dlpi_addr + p->p_vaddr, code_end = code_begin + p->p_memsz;
    }
    return 1;
}
__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("FAULTS_LOG"), *at = getenv("FAULTS_AT"), *what = getenv("FAULTS_DO");
    keep = getenv("FAULTS_KEEP");
    dl_iterate_phdr(find_code, NULL);
    if (path) {   // far from the descriptors that the program gets
        int fd = REAL(open)(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
        log_fd = fcntl(fd, F_DUPFD_CLOEXEC, 900);
        REAL(close)(fd);
    }
    if (!at || !what) return;
    fault_do = !strcmp(what, "kill")   ? KILL
               : !strcmp(what, "torn") ? TORN
               : !strcmp(what, "stop") ? STOP
                                       : atoi(what);
    fault_at = atol(at);
}

// Counts a call. 0: it is to go on; TORN; else the error that it is to fail with, which errno is set to.
static int fault(const char *call, const char *file) {
    long n = __atomic_add_fetch(&calls, 1, __ATOMIC_RELAXED);
    if (log_fd >= 0) {
        char line[NAME + 32];
        int length = snprintf(line, sizeof(line), "%s %s\n", call, file ? file : "");
        if (REAL(write)(log_fd, line, (size_t)length) != length) abort();
    }
    if (n != fault_at) return 0;
    if (fault_do == KILL) kill(getpid(), SIGKILL);
    if (fault_do == STOP) raise(SIGSTOP);
    if (fault_do > 0) errno = fault_do;
    return fault_do == STOP ? 0 : fault_do;
}
static const char *name_of(int fd) { return fd >= 0 && fd < FILES ? names[fd] : ""; }
static int opened(int fd, const char *path) {
    if (fd >= 0 && fd < FILES) snprintf(names[fd], NAME, "%s", path);
    return fd;
}

// ---- Files by descriptor

#define MODE_OF(flags)                                                                                       \
    mode_t mode = 0;                                                                                         \
    va_list args;                                                                                            \
    va_start(args, flags);                                                                                   \
    if (flags & O_CREAT) mode = va_arg(args, mode_t);                                                        \
    va_end(args)
int open(const char *path, int flags, ...) {
    MODE_OF(flags);
    if (FROM_PROGRAM && fault(flags & O_CREAT ? "create" : "open", path)) return -1;
    return opened(REAL(open)(path, flags, mode), path);
}
int openat(int folder, const char *path, int flags, ...) {
    MODE_OF(flags);
    if (FROM_PROGRAM && fault(flags & O_CREAT ? "create" : "open", path)) return -1;
    return opened(REAL(openat)(folder, path, flags, mode), path);
}
int close(int fd) {
    int bad = FROM_PROGRAM ? fault("close", name_of(fd)) : 0, error = errno, result = REAL(close)(fd);
    if (!bad) return result;
    errno = error;
    return -1;
}
static ssize_t written(int fd, const void *data, size_t n) {
    int bad = fault("write", name_of(fd)), error = errno;
    if (!bad) return REAL(write)(fd, data, n);
    ssize_t half = n > 1 ? REAL(write)(fd, data, n / 2) : 0;
    if (bad == TORN) kill(getpid(), SIGKILL);
    errno = error;
    return half > 0 ? half : -1;
}
ssize_t write(int fd, const void *data, size_t n) {
    return FROM_PROGRAM ? written(fd, data, n) : REAL(write)(fd, data, n);
}
ssize_t read(int fd, void *data, size_t n) {
    if (FROM_PROGRAM && fault("read", name_of(fd))) return -1;
    return REAL(read)(fd, data, n);
}
int fsync(int fd) { return FROM_PROGRAM && fault("fsync", name_of(fd)) ? -1 : REAL(fsync)(fd); }
int fdatasync(int fd) { return FROM_PROGRAM && fault("fsync", name_of(fd)) ? -1 : REAL(fdatasync)(fd); }
int flock(int fd, int how) { return FROM_PROGRAM && fault("flock", name_of(fd)) ? -1 : REAL(flock)(fd, how); }
int ftruncate(int fd, off_t size) {
    return FROM_PROGRAM && fault("ftruncate", name_of(fd)) ? -1 : REAL(ftruncate)(fd, size);
}
int fstat(int fd, struct stat *st) {
    return FROM_PROGRAM && fault("fstat", name_of(fd)) ? -1 : REAL(fstat)(fd, st);
}
void *mmap(void *at, size_t size, int protection, int flags, int fd, off_t offset) {
    if (FROM_PROGRAM && fault("mmap", name_of(fd))) return MAP_FAILED;
    return REAL(mmap)(at, size, protection, flags, fd, offset);
}

// ---- Files by name

int stat(const char *path, struct stat *st) {
    return FROM_PROGRAM && fault("stat", path) ? -1 : REAL(stat)(path, st);
}
int lstat(const char *path, struct stat *st) {
    return FROM_PROGRAM && fault("stat", path) ? -1 : REAL(lstat)(path, st);
}
int unlink(const char *path) { return FROM_PROGRAM && fault("unlink", path) ? -1 : REAL(unlink)(path); }
int rmdir(const char *path) { return FROM_PROGRAM && fault("unlink", path) ? -1 : REAL(rmdir)(path); }
int mkdir(const char *path, mode_t mode) {
    return FROM_PROGRAM && fault("mkdir", path) ? -1 : REAL(mkdir)(path, mode);
}
char *realpath(const char *restrict path, char *restrict into) {
    return FROM_PROGRAM && fault("realpath", path) ? NULL : REAL(realpath)(path, into);
}
int rename(const char *from, const char *to) {
    if (FROM_PROGRAM && fault("rename", from)) return -1;
    int bad = REAL(rename)(from, to);
    if (bad || !keep || !FROM_PROGRAM) return bad;
    char path[4096];
    const char *slash = strrchr(to, '/');
    snprintf(path, sizeof(path), "%s/%d.%s", keep, renames++, slash ? slash + 1 : to);
    if (link(to, path)) abort();
    return 0;
}

// ---- FILEs: the cookie is the descriptor plus 1

static int fd_of(void *cookie) { return (int)(intptr_t)cookie - 1; }
static ssize_t cookie_read(void *cookie, char *data, size_t n) {
    return fault("read", name_of(fd_of(cookie))) ? -1 : REAL(read)(fd_of(cookie), data, n);
}
static ssize_t cookie_write(void *cookie, const char *data, size_t n) {   // 0, not -1, means none
    ssize_t done = written(fd_of(cookie), data, n);
    return done < 0 ? 0 : done;
}
static int cookie_seek(void *cookie, off64_t *at, int from) {
    off64_t to = lseek64(fd_of(cookie), *at, from);
    if (to < 0) return -1;
    *at = to;
    return 0;
}
static int cookie_close(void *cookie) {
    int fd = fd_of(cookie), bad = fault("close", name_of(fd)), error = errno;
    streams[fd] = NULL;
    if (REAL(close)(fd)) return -1;
    errno = error;
    return bad ? -1 : 0;
}
static FILE *stream(int fd, const char *mode) {
    static const cookie_io_functions_t functions = {cookie_read, cookie_write, cookie_seek, cookie_close};
    FILE *f = fd < 0 || fd >= FILES ? NULL : fopencookie((void *)(intptr_t)(fd + 1), mode, functions);
    if (f) streams[fd] = f;
    return f;
}
FILE *fopen(const char *restrict path, const char *restrict mode) {
    if (!FROM_PROGRAM) return REAL(fopen)(path, mode);
    int plus = strchr(mode, '+') != NULL, access = plus ? O_RDWR : *mode == 'r' ? O_RDONLY : O_WRONLY;
    int flags = *mode == 'w' ? O_CREAT | O_TRUNC : *mode == 'a' ? O_CREAT | O_APPEND : 0;
    if (strchr(mode, 'x')) flags |= O_EXCL;
    if (strchr(mode, 'e')) flags |= O_CLOEXEC;
    if (fault(flags & O_CREAT ? "create" : "open", path)) return NULL;
    return stream(opened(REAL(open)(path, access | flags, 0666), path), mode);
}
FILE *fdopen(int fd, const char *mode) {
    if (!FROM_PROGRAM) return REAL(fdopen)(fd, mode);
    return fault("fdopen", name_of(fd)) ? NULL : stream(fd, mode);
}
int fileno(FILE *f) {
    for (int i = 0; i < FILES; i++)
        if (streams[i] == f) return i;
    return REAL(fileno)(f);
}
FILE *open_memstream(char **text, size_t *size) {
    return FROM_PROGRAM && fault("malloc", "") ? NULL : REAL(open_memstream)(text, size);
}

// ---- Memory

void *malloc(size_t n) { return FROM_PROGRAM && fault("malloc", "") ? NULL : __libc_malloc(n); }
void *calloc(size_t n, size_t size) {
    return FROM_PROGRAM && fault("malloc", "") ? NULL : __libc_calloc(n, size);
}
void *realloc(void *p, size_t n) { return FROM_PROGRAM && fault("malloc", "") ? NULL : __libc_realloc(p, n); }
char *strdup(const char *text) { return FROM_PROGRAM && fault("malloc", "") ? NULL : REAL(strdup)(text); }
char *strndup(const char *text, size_t n) {
    return FROM_PROGRAM && fault("malloc", "") ? NULL : REAL(strndup)(text, n);
}
int posix_memalign(void **p, size_t alignment, size_t n) {
    if (FROM_PROGRAM && fault("malloc", "")) return ENOMEM;
    *p = __libc_memalign(alignment, n);
    return *p ? 0 : ENOMEM;
}
