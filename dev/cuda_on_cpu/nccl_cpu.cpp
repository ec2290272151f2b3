// nccl_cpu.cpp - the calls of NCCL that the trainer uses, between processes of one machine, through shared memory.
// A library of its own, which an emulated program opens as it would the real one (libnccl.so.2); nccl.h is the
// real one, so that declarations agree. Sums are taken in the order of the ranks.
//
// Processes meet in a file in /dev/shm named by the handle that ncclGetUniqueId makes up; rank 0 makes it,
// and removes it when all are there.
// As with the real one, whoever has been left alone waits for ever: a deadline is the program's business.
// Communicators are non-blocking: as long as a process is missing, ncclCommGetAsyncError says ncclInProgress. So do,
// once, a collective outside of a group and the end of a group, as from NCCL 2.23 on; inside they say ncclSuccess. A
// call before one is known to have ended, and a group without any (which ends NCCL 2.23 to 2.25), are errors here.
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <nccl.h>
#include <atomic>
#include <fcntl.h>
#include <functional>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <string>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { SLOT = 1 << 18, MOST = 64, MAGIC = 0x6e63636c };
struct Meeting {                                // the file, followed by a slot for each rank
    std::atomic<unsigned> ready, attached, arrived, generation;
    int size;
    pid_t creator;
};
struct ncclComm {
    int rank, size;
    std::string name;
    Meeting *meeting = nullptr;
    size_t bytes = 0;
    bool gone = false, busy = false;
    char *slot(int rank) const { return (char *)meeting + 4096 + (size_t)rank * SLOT; }
};

// Tries once to be at the meeting; true when all are
static bool attach(ncclComm *c) {
    if (!c->meeting) {
        if (c->rank == 0) unlink(c->name.c_str());
        int fd = open(c->name.c_str(), c->rank ? O_RDWR : O_RDWR | O_CREAT | O_EXCL, 0600);
        if (fd < 0) return false;
        c->bytes = 4096 + (size_t)c->size * SLOT;
        if (c->rank == 0 && ftruncate(fd, (off_t)c->bytes)) return close(fd), false;
        if (lseek(fd, 0, SEEK_END) < (off_t)c->bytes) return close(fd), false;
        void *map = mmap(nullptr, c->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        close(fd);
        if (map == MAP_FAILED) return false;
        Meeting *m = (Meeting *)map;
        if (c->rank == 0) m->size = c->size, m->creator = getpid(), m->ready = MAGIC;
        // a file that a run left behind that was killed: its rank 0 is gone, or all had come
        if (m->ready != MAGIC || m->size != c->size || kill(m->creator, 0) || m->attached >= (unsigned)c->size)
            return munmap(map, c->bytes), false;
        c->meeting = m;
        m->attached++;
    }
    if (c->meeting->attached < (unsigned)c->size) return false;
    if (c->rank == 0 && !c->gone) unlink(c->name.c_str()), c->gone = true;
    return true;
}
static void barrier(ncclComm *c) {
    Meeting *m = c->meeting;
    unsigned now = m->generation;
    if (++m->arrived == (unsigned)c->size) {
        m->arrived = 0;
        m->generation++;
        return;
    }
    for (int i = 0; m->generation == now; i++)
        if (i < 50) sched_yield();
        else usleep(50);
}

static size_t bytes_of(ncclDataType_t t) {
    return t == ncclFloat ? 4 : t == ncclDouble ? 8 : t == ncclBfloat16 ? 2 : 0;
}
template <class T> static void add(ncclComm *c, T *out, size_t from, size_t n) {
    for (size_t i = 0; i < n; i++) {
        T sum = ((T *)c->slot(0))[from + i];
        for (int r = 1; r < c->size; r++) sum = sum + ((T *)c->slot(r))[from + i];
        out[i] = sum;
    }
}
static void add(ncclComm *c, void *out, size_t from, size_t n, ncclDataType_t t) {
    if (t == ncclFloat) add(c, (float *)out, from, n);
    else if (t == ncclDouble) add(c, (double *)out, from, n);
    else add(c, (__nv_bfloat16 *)out, from, n);   // rounded after each rank, as on a ring
}
static int depth, grouped;           // of open groups; calls in this one
static ncclComm *group_comm;
static ncclResult_t queue(ncclComm *c, cudaStream_t s, std::function<void()> work) {
    if (c->busy) return ncclInvalidUsage;
    auto *f = new std::function<void()>(std::move(work));
    cudaHostFn_t run = [](void *p) {
        auto *g = (std::function<void()> *)p;
        (*g)();
        delete g;
    };
    if (cudaLaunchHostFunc(s, run, f) != cudaSuccess) return ncclUnhandledCudaError;
    grouped++, group_comm = c;
    if (depth) return ncclSuccess;
    c->busy = true;
    return ncclInProgress;
}

extern "C" {
ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
    timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    memset((void *)id, 0, sizeof *id);
    snprintf(id->internal, sizeof id->internal, "%d.%lld.%ld", (int)getpid(), (long long)now.tv_sec, now.tv_nsec);
    return ncclSuccess;
}
ncclResult_t ncclCommInitRankConfig(ncclComm_t *comm, int size, ncclUniqueId id, int rank, ncclConfig_t *config) {
    if (size < 1 || size > MOST || rank < 0 || rank >= size || !config || config->blocking) return ncclInvalidArgument;
    ncclComm *c = new ncclComm;
    c->rank = rank, c->size = size;
    c->name = "/dev/shm/nccl_cpu.";
    for (const char *s = id.internal; *s; s++) c->name += *s == '/' ? '_' : *s;
    *comm = c;
    return attach(c) ? ncclSuccess : ncclInProgress;
}
ncclResult_t ncclCommGetAsyncError(ncclComm_t c, ncclResult_t *result) {
    *result = c->busy ? ncclInProgress : c->meeting && c->gone ? ncclSuccess : attach(c) ? ncclSuccess : ncclInProgress;
    c->busy = false;
    return ncclSuccess;
}
ncclResult_t ncclCommFinalize(ncclComm_t) { return ncclSuccess; }
ncclResult_t ncclCommDestroy(ncclComm_t c) {
    if (c->meeting) munmap((void *)c->meeting, c->bytes);
    delete c;
    return ncclSuccess;
}
const char *ncclGetErrorString(ncclResult_t r) {
    return r == ncclSuccess ? "no error" : r == ncclInvalidUsage ? "invalid usage" : "an error of nccl_cpu";
}
const char *ncclGetLastError(ncclComm_t) { return "nccl_cpu"; }

ncclResult_t ncclAllReduce(const void *from, void *to, size_t n, ncclDataType_t type, ncclRedOp_t op, ncclComm_t c,
                           cudaStream_t s) {
    size_t bytes = bytes_of(type), most = SLOT / (bytes ? bytes : 1);
    if (op != ncclSum || !bytes) return ncclInvalidArgument;
    return queue(c, s, [=] {
        for (size_t at = 0, some; at < n; at += some) {
            some = n - at < most ? n - at : most;
            memcpy(c->slot(c->rank), (const char *)from + at * bytes, some * bytes);
            barrier(c);
            add(c, (char *)to + at * bytes, 0, some, type);
            barrier(c);
        }
    });
}
// to: the root's
ncclResult_t ncclReduce(const void *from, void *to, size_t n, ncclDataType_t type, ncclRedOp_t op, int root,
                        ncclComm_t c, cudaStream_t s) {
    size_t bytes = bytes_of(type), most = SLOT / (bytes ? bytes : 1);
    if (op != ncclSum || !bytes || root < 0 || root >= c->size) return ncclInvalidArgument;
    return queue(c, s, [=] {
        for (size_t at = 0, some; at < n; at += some) {
            some = n - at < most ? n - at : most;
            memcpy(c->slot(c->rank), (const char *)from + at * bytes, some * bytes);
            barrier(c);
            if (c->rank == root) add(c, (char *)to + at * bytes, 0, some, type);
            barrier(c);
        }
    });
}
// from[size][n], to[n]
ncclResult_t ncclReduceScatter(const void *from, void *to, size_t n, ncclDataType_t type, ncclRedOp_t op,
                               ncclComm_t c, cudaStream_t s) {
    size_t bytes = bytes_of(type), most = SLOT / (bytes ? bytes : 1) / (size_t)c->size;
    if (op != ncclSum || !bytes) return ncclInvalidArgument;
    return queue(c, s, [=] {
        for (size_t at = 0, some; at < n; at += some) {
            some = n - at < most ? n - at : most;
            for (int r = 0; r < c->size; r++)
                memcpy(c->slot(c->rank) + (size_t)r * most * bytes,
                       (const char *)from + ((size_t)r * n + at) * bytes, some * bytes);
            barrier(c);
            add(c, (char *)to + at * bytes, (size_t)c->rank * most, some, type);
            barrier(c);
        }
    });
}
// from[n], to[size][n]
ncclResult_t ncclAllGather(const void *from, void *to, size_t n, ncclDataType_t type, ncclComm_t c, cudaStream_t s) {
    size_t bytes = bytes_of(type), most = SLOT / (bytes ? bytes : 1);
    if (!bytes) return ncclInvalidArgument;
    return queue(c, s, [=] {
        for (size_t at = 0, some; at < n; at += some) {
            some = n - at < most ? n - at : most;
            memcpy(c->slot(c->rank), (const char *)from + at * bytes, some * bytes);
            barrier(c);
            for (int r = 0; r < c->size; r++)
                memcpy((char *)to + ((size_t)r * n + at) * bytes, c->slot(r), some * bytes);
            barrier(c);
        }
    });
}
ncclResult_t ncclBroadcast(const void *from, void *to, size_t n, ncclDataType_t type, int root, ncclComm_t c,
                           cudaStream_t s) {
    size_t bytes = bytes_of(type), most = SLOT / (bytes ? bytes : 1);
    if (!bytes || root < 0 || root >= c->size) return ncclInvalidArgument;
    return queue(c, s, [=] {
        for (size_t at = 0, some; at < n; at += some) {
            some = n - at < most ? n - at : most;
            if (c->rank == root) memcpy(c->slot(root), (const char *)from + at * bytes, some * bytes);
            barrier(c);
            memcpy((char *)to + at * bytes, c->slot(root), some * bytes);
            barrier(c);
        }
    });
}
// Calls of a group go one by one here.
ncclResult_t ncclGroupStart() {
    if (!depth++) grouped = 0;
    return ncclSuccess;
}
ncclResult_t ncclGroupEnd() {
    if (--depth) return ncclSuccess;
    if (!grouped) return ncclInvalidUsage;
    group_comm->busy = true;
    return ncclInProgress;
}
}
