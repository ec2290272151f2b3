// cuda_cpu.cpp - the runtime behind cuda_cpu.h: fibers, barriers, warps, memory, streams and events.
//
// Compile it with the sanitizer of the program, except thread sanitizer: all fibers share the bookkeeping
// here on purpose, so leave -fsanitize=thread away; linked into such a program, it notices.
//
// Environment, read at the first call:
//   CUDA_CPU_ORDER   fwd, rev or rand: the order of threads, warps and blocks (fwd)
//   CUDA_CPU_SEED    of the order rand (0)
//   CUDA_CPU_ASYNC   1: streams run as late as allowed, the youngest first (0)
//   CUDA_CPU_STRICT  0: threads may meet at different lines' barriers (1)
//   CUDA_CPU_SM      the compute capability to pose as, 86 for 8.6; with its shared memory a block (90)
//   CUDA_CPU_SHARED  bytes of shared memory that a block may ask for, if not those of CUDA_CPU_SM
//   CUDA_CPU_SMS     multiprocessors (4)
#include "cuda_cpu.h"
#include <stdarg.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <deque>
#include <vector>
#ifndef __has_feature
#define __has_feature(x) 0
#endif
#if defined(__SANITIZE_ADDRESS__) || __has_feature(address_sanitizer)
#define ASAN 1
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if __has_feature(memory_sanitizer)
#define MSAN 1
#include <sanitizer/msan_interface.h>
#endif
#if __has_include(<valgrind/memcheck.h>) && !defined(ASAN) && !defined(MSAN)
#include <valgrind/memcheck.h>
#else
#define VALGRIND_STACK_REGISTER(from, to) 0
#define VALGRIND_MAKE_MEM_UNDEFINED(p, n) 0
#define VALGRIND_MAKE_MEM_DEFINED(p, n) 0
#define VALGRIND_MAKE_MEM_NOACCESS(p, n) 0
#define VALGRIND_CHECK_MEM_IS_DEFINED(p, n) 0
#endif
// Thread sanitizer: there if the program is linked with it
#define WEAK __attribute__((weak))
extern "C" {
WEAK void *__tsan_get_current_fiber();
WEAK void *__tsan_create_fiber(unsigned);
WEAK void __tsan_switch_to_fiber(void *, unsigned no_order);
WEAK void __tsan_set_fiber_name(void *, const char *);
WEAK void __tsan_acquire(void *);
WEAK void __tsan_release(void *);
}

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_cpu {

enum { MAX_THREADS = 1024, MAX_SHARED = 227 * 1024, STACK = 256 * 1024, GUARD = 4096 };
enum { SPARE_STACKS = 61 };                         // for thread sanitizer, see start_threads
enum State : char { READY, AT_BARRIER, AT_COLLECTIVE, DONE };

struct Stack { char *base; void *tsan; };
struct Fiber {                                      // one CUDA thread
    void *sp;                                       // where it was left
    uint3 index;
    State state;
    bool started;
    int line;                                       // where and for what it waits
    const char *what;
    unsigned mask;                                  // the collective it waits in
    void *args;
    Done done;
    char *stack;
    void *fake_stack, *tsan;
};
struct Warp { unsigned ready, waiting, live; };     // masks of lanes
struct Barrier { int arrived, line, phase, vote[3], result[3]; char sync[2]; };

static const bool tsan = __tsan_create_fiber != nullptr;
static Stack stacks[MAX_THREADS + SPARE_STACKS];
static Fiber fibers[MAX_THREADS];
static Warp warps[MAX_THREADS / 32];
static Barrier block_barrier;
static Fiber *current;                              // null: the host runs
static int threads, live;                           // of the block
static void *host_sp, *host_tsan;
#ifdef ASAN
static void *host_fake_stack;
static const void *host_stack;
static size_t host_stack_size;
#endif
static Call *kernel;                                // the running kernel and its launch
static const Launch *now;
static char *shared;                                // the block's shared memory
static size_t shared_top, shared_dynamic;           // bytes in use, bytes that the launch asked for
struct SharedVariable { int line; const char *function, *name; size_t offset; };
static std::vector<SharedVariable> shared_variables;
struct DynamicLimit { const void *kernel; size_t bytes; };
static std::vector<DynamicLimit> dynamic_limits;    // of cudaFuncSetAttribute
static enum { FORWARD, REVERSE, RANDOM } order;
static bool strict = true, late_streams;
static struct { int sm, processors; size_t shared; } card = {90, 4, MAX_SHARED};
static uint64_t random_state = 1;

static unsigned random_below(unsigned n) {          // xorshift64
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (unsigned)((random_state >> 20) % n);
}

int lane() { return (int)(current - fibers) & 31; }

void fail(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fflush(stdout);
    fprintf(stderr, "cuda_cpu: ");
    vfprintf(stderr, format, args);
    va_end(args);
    if (now)
        fprintf(stderr, "\n  kernel launched at %s:%d, grid (%u,%u,%u) block (%u,%u,%u)", now->file,
                now->line, now->grid.x, now->grid.y, now->grid.z, now->block.x, now->block.y, now->block.z);
    if (current)
        fprintf(stderr, "\n  in block (%u,%u,%u) thread (%u,%u,%u)", blockIdx.x, blockIdx.y, blockIdx.z,
                threadIdx.x, threadIdx.y, threadIdx.z);
    fprintf(stderr, "\n");
    abort();
}

// ----------------------------------------------------------------------------------------------------------
// Fibers. The switch saves the registers that a call must keep. A system with another processor takes
// swapcontext, which is slower, since it makes a system call.

#if defined(__x86_64__) && !defined(CUDA_CPU_UCONTEXT)
extern "C" void cuda_cpu_switch(void **save, void *load);
asm(".text\n.globl cuda_cpu_switch\n.type cuda_cpu_switch,@function\ncuda_cpu_switch:\n"
    " push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
    " mov %rsp,(%rdi)\n mov %rsi,%rsp\n"
    " pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret\n"
    ".size cuda_cpu_switch,.-cuda_cpu_switch\n");
static void make_fiber(Fiber &f, size_t size, void (*entry)()) {
    void **sp = (void **)(f.stack + size);
    *--sp = nullptr;                                // aligns the stack, and ends gdb's backtrace
    *--sp = (void *)entry;
    f.sp = sp - 6;
    memset(f.sp, 0, 6 * sizeof(void *));
}
#else
#include <ucontext.h>
static ucontext_t contexts[MAX_THREADS + 1];        // the last: the host's
static void cuda_cpu_switch(void **save, void *load) {
    ucontext_t *from = current ? &contexts[current - fibers] : nullptr;
    if (save == &host_sp) from = &contexts[MAX_THREADS];
    *save = from;
    swapcontext(from, (ucontext_t *)load);
}
static void make_fiber(Fiber &f, size_t size, void (*entry)()) {
    ucontext_t *c = &contexts[&f - fibers];
    getcontext(c);
    c->uc_stack.ss_sp = f.stack;
    c->uc_stack.ss_size = size;
    c->uc_link = nullptr;
    makecontext(c, entry, 0);
    f.sp = c;
}
#endif

static void to_fiber(Fiber &f) {
    current = &f;
    threadIdx = f.index;
#ifdef ASAN
    __sanitizer_start_switch_fiber(&host_fake_stack, f.stack, STACK);
#endif
    // What the host did comes before the thread's first instruction; later switches order nothing
    if (tsan) __tsan_switch_to_fiber(f.tsan, f.started);
    f.started = true;
    cuda_cpu_switch(&host_sp, f.sp);
#ifdef ASAN
    __sanitizer_finish_switch_fiber(host_fake_stack, nullptr, nullptr);
#endif
    current = nullptr;
}

static void to_host(bool for_ever) {
    Fiber &f = *current;
#ifdef ASAN
    __sanitizer_start_switch_fiber(for_ever ? nullptr : &f.fake_stack, host_stack, host_stack_size);
#endif
    (void)for_ever;
    if (tsan) __tsan_switch_to_fiber(host_tsan, 1);
    cuda_cpu_switch(&f.sp, host_sp);
#ifdef ASAN
    __sanitizer_finish_switch_fiber(f.fake_stack, nullptr, nullptr);
#endif
}

static void wake(Fiber &f) {
    int t = (int)(&f - fibers);
    f.state = READY;
    warps[t / 32].ready |= 1u << (t & 31);
}

static void suspend(State state, const char *what, int line) {      // until somebody wakes it
    current->state = state;
    current->what = what;
    current->line = line;
    warps[(current - fibers) / 32].ready &= ~(1u << lane());
}

// ----------------------------------------------------------------------------------------------------------
// __syncthreads: all live threads, at the same line. For thread sanitizer two objects are used in turn: with
// one, a fast thread's next release would leak into a slow thread's acquire and hide races.

static void clear_votes(Barrier &b) {
    b.vote[0] = b.vote[2] = 0;
    b.vote[1] = 1;
}
static void open_barrier() {
    Barrier &b = block_barrier;
    for (int t = 0; t < threads; t++)
        if (fibers[t].state == AT_BARRIER) wake(fibers[t]);
    b.arrived = 0;
    b.phase ^= 1;
    memcpy(b.result, b.vote, sizeof b.vote);
    clear_votes(b);
}
void barrier(int line) {
    if (!current) fail("__syncthreads() outside a kernel, line %d", line);
    Barrier &b = block_barrier;
    if (b.arrived == 0) b.line = line;
    else if (b.line != line && strict)
        fail("threads wait at different __syncthreads(): lines %d and %d", b.line, line);
    char *sync = &b.sync[b.phase];
    if (tsan) __tsan_release(sync);
    suspend(AT_BARRIER, "__syncthreads", line);
    if (++b.arrived == live) open_barrier();
    to_host(false);
    if (tsan) __tsan_acquire(sync);
}
int barrier_vote(int vote, int which, int line) {   // which: 0 or, 1 and, 2 count
    Barrier &b = block_barrier;
    b.vote[0] |= vote != 0;
    b.vote[1] &= vote != 0;
    b.vote[2] += vote != 0;
    barrier(line);
    return b.result[which];
}

// ----------------------------------------------------------------------------------------------------------
// Warps: one meeting place for everything that lanes do together

static bool try_finish(Warp &w, Fiber *lanes, unsigned mask) {
    unsigned need = mask & w.live;
    if (!need || (w.waiting & need) != need) return false;
    int first = __builtin_ctz(need);
    void *args[32];
    for (int l = 0; l < 32; l++) {
        if (!(need >> l & 1)) continue;
        Fiber &f = lanes[l], &g = lanes[first];
        if (f.mask != mask || f.done != g.done || (strict && f.line != g.line))
            fail("lanes of a warp disagree: lane %d at %s line %d mask %08x, lane %d at %s line %d mask %08x",
                 first, g.what, g.line, g.mask, l, f.what, f.line, f.mask);
        args[l] = f.args;
    }
    lanes[first].done(args, need);
    w.waiting &= ~need;
    for (int l = 0; l < 32; l++)
        if (need >> l & 1) wake(lanes[l]);
    return true;
}

void collective(unsigned mask, void *args, Done done, const char *what, int line) {
    if (!current) fail("%s outside a kernel, line %d", what, line);
    int id = (int)(current - fibers);
    Warp &w = warps[id / 32];
    if (!(mask >> lane() & 1))
        fail("%s line %d: calling lane %d is not in its own mask %08x", what, line, lane(), mask);
    bool whole = id / 32 * 32 + 32 <= threads;      // else ~0u is the usual name for the last, partial warp
    if (strict && whole && mask & ~w.live)
        fail("%s line %d: mask %08x names lanes that have exited (live: %08x)", what, line, mask, w.live);
    current->mask = mask;
    current->args = args;
    current->done = done;
    w.waiting |= 1u << lane();
    suspend(AT_COLLECTIVE, what, line);
    try_finish(w, &fibers[id & ~31], mask);
    to_host(false);
}

void syncwarp(unsigned mask, int line) {
    static char sync[MAX_THREADS / 32][2];
    static int phase[MAX_THREADS];
    int id = (int)(current - fibers);
    char *s = tsan ? &sync[id / 32][phase[id] ^= 1] : nullptr;
    if (tsan) __tsan_release(s);
    collective(mask, nullptr, [](void **, unsigned) {}, "__syncwarp", line);
    if (tsan) __tsan_acquire(s);
}

void shuffle(unsigned mask, Shuffle &s, int line) {
    collective(mask, &s, [](void **args, unsigned live) {
        for (int l = 0; l < 32; l++) {
            if (!(live >> l & 1)) continue;
            Shuffle *me = (Shuffle *)args[l];
            int source = me->source < 0 ? l : me->source;
            if (!(live >> source & 1)) fail("lane %d shuffles from lane %d, which takes no part", l, source);
            memcpy(me->result, ((Shuffle *)args[source])->value, 16);
        }
    }, "shuffle", line);
}

// Fragments of mma.m16n8k16, from the PTX manual; g = lane / 4, t = 2 (lane % 4), each register holds two:
//   A: a0 (g, t) a1 (g+8, t) a2 (g, t+8) a3 (g+8, t+8)    B: b0 (t, g) b1 (t+8, g), pairs run down k
//   D: d0 d1 (g, t), (g, t+1)  d2 d3 (g+8, t), (g+8, t+1)
static float bf16_of(unsigned x) { return __uint_as_float(x << 16); }

void mma_bf16(Mma &m, int line) {
    collective(~0u, &m, [](void **args, unsigned live) {
        if (live != ~0u) fail("mma by a part of a warp (%08x)", live);
        float a[16][16], b[16][8], d[16][8];
        for (int l = 0; l < 32; l++) {
            const Mma *m = (Mma *)args[l];
            int g = l / 4, t = l % 4 * 2;
            for (int i = 0; i < 4; i++) {
                int row = g + i % 2 * 8, col = t + i / 2 * 8;
                a[row][col] = bf16_of(m->a[i]);
                a[row][col + 1] = bf16_of(m->a[i] >> 16);
                d[g + i / 2 * 8][t + i % 2] = m->d[i];
            }
            for (int i = 0; i < 2; i++) {
                b[t + i * 8][g] = bf16_of(m->b[i]);
                b[t + i * 8 + 1][g] = bf16_of(m->b[i] >> 16);
            }
        }
        for (int i = 0; i < 16; i++)
            for (int k = 0; k < 16; k++)
                for (int j = 0; j < 8; j++) d[i][j] += a[i][k] * b[k][j];
        for (int l = 0; l < 32; l++)
            for (int i = 0; i < 4; i++) ((Mma *)args[l])->d[i] = d[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
    }, "mma", line);
}

static bool in_shared(const void *p) { return (char *)p >= shared && (char *)p + 16 <= shared + shared_top; }

void check_row(const void *row, int line) {
    if ((uintptr_t)row % 16) fail("ldmatrix line %d: row address %p is not a multiple of 16", line, row);
    if (!in_shared(row)) fail("ldmatrix line %d: row address outside shared memory", line);
}

// Register i of lane l: row l / 4, columns 2 (l % 4) and the next, of matrix i; transposed: row <-> column
void ldmatrix(Rows &rows, int line) {
    collective(~0u, &rows, [](void **args, unsigned live) {
        if (live != ~0u) fail("ldmatrix by a part of a warp (%08x)", live);
        for (int l = 0; l < 32; l++) {
            Rows *me = (Rows *)args[l];
            for (int i = 0; i < me->count; i++) {
                auto at = [&](int r, int c) { return (unsigned)((Rows *)args[i * 8 + r])->row[c]; };
                int r = l / 4, c = l % 4 * 2;
                me->r[i] = me->trans ? at(c, r) | at(c + 1, r) << 16 : at(r, c) | at(r, c + 1) << 16;
            }
        }
    }, "ldmatrix", line);
}

// cp.async: a ring a thread, since thread sanitizer objects to the heap in a fiber
enum { MAX_COPIES = 256 };
struct CopyRing {
    struct { void *to; const void *from; int group; } copies[MAX_COPIES];
    unsigned head, tail;
    int group;
};
static CopyRing copy_rings[MAX_THREADS];

void check_copy(const void *to, const void *from, int line) {
    if ((uintptr_t)to % 16 || (uintptr_t)from % 16) fail("cp.async line %d: misaligned address", line);
    if (!in_shared(to)) fail("cp.async line %d: destination outside shared memory", line);
}
void cp_async(void *to, const void *from) {
    CopyRing &q = copy_rings[current - fibers];
    if (q.tail - q.head == MAX_COPIES) fail("cp.async: more than %d copies in flight", MAX_COPIES);
    q.copies[q.tail++ % MAX_COPIES] = {to, from, q.group};
}
void cp_async_commit() { copy_rings[current - fibers].group++; }
void cp_async_wait(int pending, Copy16 copy) {
    CopyRing &q = copy_rings[current - fibers];
    for (; q.head != q.tail && q.copies[q.head % MAX_COPIES].group < q.group - pending; q.head++)
        copy(q.copies[q.head % MAX_COPIES].to, q.copies[q.head % MAX_COPIES].from);
}

// For thread sanitizer: write, __threadfence, atomic in one thread; atomic, read in another. An atomic sees
// what was written before any fence.
void fence(bool release) {
    static char sync;
    static bool fenced;
    if (!tsan) return;
    if (release) fenced = true, __tsan_release(&sync);
    else if (fenced) __tsan_acquire(&sync);
}

// ----------------------------------------------------------------------------------------------------------
// Shared memory: one arena a block, all NaN when the block starts, with no man's land between the variables

void *dynamic_shared() { return shared; }

// A variable is known by its function, not only by its line: each instance of a template has its own
void *shared_bytes(size_t bytes, const char *name, const char *function, int line) {
    for (SharedVariable &v : shared_variables)
        if (v.line == line && v.function == function && !strcmp(v.name, name)) return shared + v.offset;
    size_t offset = (shared_top + 32 + 127) / 128 * 128;
    shared_top = offset + bytes;
    if (shared_top > card.shared) fail("__shared__ %s, line %d: %zu bytes in all", name, line, shared_top);
#ifdef ASAN
    __asan_unpoison_memory_region(shared + offset, bytes);
#endif
#ifdef MSAN
    __msan_poison(shared + offset, bytes);
#endif
    (void)VALGRIND_MAKE_MEM_UNDEFINED(shared + offset, bytes);
    shared_variables.push_back({line, function, name, offset});
    return shared + offset;
}

static void clear_shared(bool first_block) {
    size_t used = first_block ? (size_t)MAX_SHARED : shared_top;    // what was written since it was NaN
    if (used < shared_dynamic) used = shared_dynamic;
    shared_variables.clear();
#ifdef ASAN
    __asan_unpoison_memory_region(shared, MAX_SHARED);
#endif
    if (tsan)                                       // a new mapping: only that makes it forget the last block
        mmap(shared, MAX_SHARED, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    else memset(shared, 0xff, used);
#ifdef ASAN
    __asan_poison_memory_region(shared + shared_dynamic, MAX_SHARED + GUARD - shared_dynamic);
#endif
#ifdef MSAN
    __msan_poison(shared, MAX_SHARED);
#endif
    (void)VALGRIND_MAKE_MEM_UNDEFINED(shared, MAX_SHARED);
    shared_top = shared_dynamic;
}

// ----------------------------------------------------------------------------------------------------------
// Blocks

static char kernel_end;                             // for thread sanitizer: before what the host does next

static void thread_main() {
#ifdef ASAN
    __sanitizer_finish_switch_fiber(nullptr, &host_stack, &host_stack_size);
#endif
    kernel->run();
    int id = (int)(current - fibers);
    Warp &w = warps[id / 32];
    current->state = DONE;
    live--;
    w.ready &= ~(1u << lane());
    w.live &= ~(1u << lane());
    // Others may have waited for this thread only
    for (int l = 0; l < 32; l++)
        if (w.waiting >> l & 1) try_finish(w, &fibers[id & ~31], fibers[(id & ~31) + l].mask);
    if (block_barrier.arrived && block_barrier.arrived == live) open_barrier();
    if (tsan) __tsan_release(&kernel_end);
    to_host(true);
    __builtin_unreachable();
}

static void start_threads(int block_number) {
    uint3 index{0, 0, 0};
    live = threads;
    memset(warps, 0, sizeof warps);
    for (int i = 0; i < threads; i++) {
        Fiber &f = fibers[i];
        // For thread sanitizer, another stack and fiber than in the last block: else it would see one thread
        // run both, and no race between them
        Stack &s = stacks[tsan ? (i + block_number * 37) % (threads + SPARE_STACKS) : i];
        if (tsan) {
            char name[64];
            snprintf(name, sizeof name, "block (%u,%u,%u) thread (%u,%u,%u)", blockIdx.x, blockIdx.y,
                     blockIdx.z, index.x, index.y, index.z);
            if (!s.tsan) s.tsan = __tsan_create_fiber(0);
            __tsan_set_fiber_name(s.tsan, name);
        }
        f = Fiber();
        f.stack = s.base;
        f.tsan = s.tsan;
        f.index = index;
        copy_rings[i].head = copy_rings[i].tail = 0;
        copy_rings[i].group = 0;
        make_fiber(f, STACK - (size_t)(i % 61 + 1) * 64, thread_main);  // not all in the same cache sets
        warps[i / 32].ready |= 1u << (i & 31);
        warps[i / 32].live |= 1u << (i & 31);
        if (++index.x == blockDim.x) {
            index.x = 0;
            if (++index.y == blockDim.y) index.y = 0, index.z++;
        }
    }
}

static void run_warp(int number) {                  // until it is stuck; in random order, perhaps not so long
    Warp &w = warps[number];
    while (w.ready) {
        for (unsigned todo = w.ready; todo;) {
            int l = order == FORWARD   ? __builtin_ctz(todo)
                    : order == REVERSE ? 31 - __builtin_clz(todo)
                                       : (int)random_below(32);
            if (!(todo >> l & 1)) continue;
            todo &= ~(1u << l);
            to_fiber(fibers[number * 32 + l]);
        }
        if (order == RANDOM && random_below(2)) break;
    }
}

[[noreturn]] static void deadlock() {
    fprintf(stderr, "cuda_cpu: %d threads of block (%u,%u,%u) wait for ever:\n", live, blockIdx.x, blockIdx.y,
            blockIdx.z);
    const Fiber *last = nullptr;
    for (int t = 0, shown = 0; t < threads && shown < 40; t++) {
        const Fiber &f = fibers[t];
        if (f.state == DONE || (last && last->line == f.line && last->mask == f.mask)) continue;
        fprintf(stderr, "  thread %d (warp %d lane %d) and on: %s at line %d, mask %08x\n", t, t / 32, t & 31,
                f.what, f.line, f.mask);
        last = &f;
        shown++;
    }
    fail("deadlock");
}

static void run_block(int block_number) {
    block_barrier = Barrier();
    clear_votes(block_barrier);
    clear_shared(block_number == 0);
    start_threads(block_number);
    int count = (threads + 31) / 32, turn[MAX_THREADS / 32];
    for (int i = 0; i < count; i++) turn[i] = order == REVERSE ? count - 1 - i : i;
    for (bool any = true; any && live;) {
        any = false;
        if (order == RANDOM)
            for (int i = count - 1; i > 0; i--) std::swap(turn[i], turn[random_below(i + 1)]);
        for (int i = 0; i < count; i++) {
            any |= warps[turn[i]].ready != 0;
            run_warp(turn[i]);
        }
    }
    if (live) deadlock();
}

static void run_grid(const Launch &l, Call &call) {
    now = &l;
    kernel = &call;
    blockDim = l.block;
    gridDim = l.grid;
    shared_dynamic = l.smem;
    threads = (int)(l.block.x * l.block.y * l.block.z);
    if (tsan) host_tsan = __tsan_get_current_fiber();
    unsigned n = l.grid.x * l.grid.y * l.grid.z, stride = 1, start = 0;
    if (order == RANDOM) {                          // a permutation of the blocks: start + stride i
        start = random_below(n);
        do stride = random_below(n) | 1;
        while (std::__gcd(stride, n) != 1);
    }
    for (unsigned i = 0; i < n; i++) {
        unsigned b = order == REVERSE ? n - 1 - i : (unsigned)(((uint64_t)i * stride + start) % n);
        blockIdx = {b % l.grid.x, b / l.grid.x % l.grid.y, b / l.grid.x / l.grid.y};
        run_block((int)i);
    }
    if (tsan) __tsan_acquire(&kernel_end);
    now = nullptr;
}

// ----------------------------------------------------------------------------------------------------------
// Start

static bool flag(const char *name, bool otherwise) {
    const char *s = getenv(name);
    if (s && strcmp(s, "0") && strcmp(s, "1")) fail("%s is %s; it can be 0 or 1", name, s);
    return s ? *s == '1' : otherwise;
}

// A number from the environment
static long number(const char *name, long otherwise, long least, long most) {
    const char *s = getenv(name);
    if (!s) return otherwise;
    char *end;
    long x = strtol(s, &end, 10);
    if (end == s || *end || x < least || x > most)
        fail("%s is %s; it can be a whole number from %ld to %ld", name, s, least, most);
    return x;
}

// The shared memory that a block may ask for, by compute capability (the CUDA C++ Programming Guide's table)
static long shared_of(long sm) {
    return 1024 * (sm < 80                                             ? 64
                   : sm == 80 || sm == 87                              ? 163
                   : sm == 86 || sm == 88 || sm == 89 || sm / 10 == 12 ? 99
                                                                       : 227);
}

static char *map(size_t bytes) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void *p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (p == MAP_FAILED) fail("no memory for the stacks");
    return (char *)p;
}

static void start() {
    static bool done;
    if (done) return;
    done = true;
    if (const char *s = getenv("CUDA_CPU_ORDER")) {
        if (!strcmp(s, "rev")) order = REVERSE;
        else if (!strcmp(s, "rand")) order = RANDOM;
        else if (strcmp(s, "fwd")) fail("CUDA_CPU_ORDER is %s; it can be fwd, rev or rand", s);
    }
    if (const char *s = getenv("CUDA_CPU_SEED"))
        random_state = strtoull(s, nullptr, 0) * 0x9E3779B97F4A7C15u + 1;
    strict = flag("CUDA_CPU_STRICT", true);
    late_streams = flag("CUDA_CPU_ASYNC", false);
    card.sm = (int)number("CUDA_CPU_SM", 90, 50, 999);
    card.shared = (size_t)number("CUDA_CPU_SHARED", shared_of(card.sm), 48 * 1024, MAX_SHARED);
    card.processors = (int)number("CUDA_CPU_SMS", 4, 1, 1024);
    shared_variables.reserve(256);                  // no heap in a fiber
    shared = map(MAX_SHARED + 2 * GUARD);
    char *p = map((size_t)(MAX_THREADS + SPARE_STACKS) * (STACK + GUARD));
    for (Stack &s : stacks) {
        mprotect(p, GUARD, PROT_NONE);
        s.base = p + GUARD;
        p += GUARD + STACK;
        (void)VALGRIND_STACK_REGISTER(s.base, s.base + STACK);
    }
}
} // namespace cuda_cpu
using namespace cuda_cpu;

// ----------------------------------------------------------------------------------------------------------
// Streams and events. Work is done at once, or, with CUDA_CPU_ASYNC=1, not before somebody waits for it.

struct CUevent_st {
    long recorded = 0, done = 0;
    double time = 0;
    cudaStream_t stream = nullptr;
    long capture = 0;                               // that it was recorded in; 0: none
};
struct CUstream_st {
    bool blocking;
    std::deque<std::function<void()>> work;
    bool captured = false, loose = false;           // see Graphs
};
static std::vector<cudaStream_t> streams;
static cudaError_t last_error;

static cudaError_t error(cudaError_t e) {
    if (e) last_error = e;
    return e;
}
static void device_memory(bool usable);
static bool capture_takes(cudaStream_t s, const std::function<void()> &f);          // see Graphs
static cudaError_t capture_forbids(cudaStream_t s, bool waits);

static void perform(const std::function<void()> &f) {
    device_memory(true);
    f();
    device_memory(false);
}
static void step(cudaStream_t s) {
    auto f = std::move(s->work.front());
    s->work.pop_front();
    perform(f);
}
static void drain(cudaStream_t s) { while (!s->work.empty()) step(s); }
static void drain_all(bool only_blocking) {         // the youngest stream first: the worst case
    for (size_t i = streams.size(); i-- > 0;)
        if (streams[i]->blocking || !only_blocking) drain(streams[i]);
}
static bool is_null(cudaStream_t s) { return !s || s == cudaStreamLegacy || s == cudaStreamPerThread; }
static void wait_for(cudaStream_t s) {              // what comes before new work in s
    if (is_null(s)) drain_all(true);
    else drain(s);
}

void cuda_cpu::on_stream(cudaStream_t s, std::function<void()> f) {
    start();
    if (capture_takes(s, f)) return;
    if (late_streams && !is_null(s)) return s->work.push_back(std::move(f));
    wait_for(s);
    perform(f);
}

long cuda_cpu::launches, cuda_cpu::products;

void cuda_cpu::launch(const Launch &l, std::shared_ptr<Call> call) {
    start();
    size_t n = (size_t)l.block.x * l.block.y * l.block.z, blocks = (size_t)l.grid.x * l.grid.y * l.grid.z;
    if (!n || !blocks || n > MAX_THREADS || l.block.z > 64 || l.grid.y > 65535 || l.grid.z > 65535 ||
        l.grid.x > 0x7fffffff)
        return (void)error(cudaErrorInvalidConfiguration);
    size_t limit = 48 * 1024;
    for (DynamicLimit &d : dynamic_limits)
        if (d.kernel == l.kernel) limit = d.bytes;
    if (l.smem > limit) return (void)error(cudaErrorInvalidValue);
    if (capture_forbids(l.stream, false)) return;
    launches++;
    on_stream(l.stream, [l, call] { run_grid(l, *call); });
}

extern "C" {
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags) {
    start();
    *s = new CUstream_st{!(flags & cudaStreamNonBlocking), {}, false, false};
    streams.push_back(*s);
    return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t *s) { return cudaStreamCreateWithFlags(s, cudaStreamDefault); }
cudaError_t cudaStreamDestroy(cudaStream_t s) {
    drain(s);
    for (size_t i = 0; i < streams.size(); i++)
        if (streams[i] == s) streams.erase(streams.begin() + (long)i);
    delete s;
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t s) {
    if (cudaError_t e = capture_forbids(s, true)) return e;
    wait_for(s);
    return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
    if (cudaError_t e = capture_forbids(nullptr, true)) return e;
    drain_all(false);
    return cudaSuccess;
}

static bool capture_records(cudaEvent_t e, cudaStream_t s);                         // see Graphs
static bool capture_waits(cudaStream_t s, cudaEvent_t e, cudaError_t *result);
static cudaError_t capture_spoils(cudaError_t e);

static void await(cudaEvent_t e, long n) {
    while (e->done < n) {
        if (is_null(e->stream) || e->stream->work.empty())
            fail("an event that nothing records is waited for");
        step(e->stream);
    }
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned) {
    *e = new CUevent_st;
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *e) { return cudaEventCreateWithFlags(e, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t e) {
    drain_all(false);                               // others may still wait for it
    delete e;
    return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned) {
    if (cudaError_t refused = capture_forbids(s, false)) return refused;
    e->stream = s;
    if (capture_records(e, s)) return cudaSuccess;
    long n = ++e->recorded;
    on_stream(s, [=] {
        timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        e->time = (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
        e->done = n;
    });
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) { return cudaEventRecordWithFlags(e, s, 0); }
cudaError_t cudaEventSynchronize(cudaEvent_t e) {
    if (e->capture) return capture_spoils(cudaErrorCapturedEvent);
    if (cudaError_t refused = capture_forbids(e->stream, true)) return refused;
    await(e, e->recorded);
    return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t e) { return cudaEventSynchronize(e); }       // asked: so it is time
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned) {
    cudaError_t result;
    if (capture_waits(s, e, &result)) return result;
    long n = e->recorded;
    on_stream(s, [=] { await(e, n); });
    return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) {
    if (from->capture || to->capture || !from->recorded || !to->recorded)
        return error(cudaErrorInvalidResourceHandle);
    if (from->done < from->recorded || to->done < to->recorded) return error(cudaErrorNotReady);
    *ms = (float)(to->time - from->time);
    return cudaSuccess;
}
} // extern "C"

// ----------------------------------------------------------------------------------------------------------
// Graphs. While a stream is captured, what is queued in it is kept instead of done, in the order of the
// calls; a launch queues all of it as one piece of work. Another stream that waits for an event recorded in
// the capture belongs to it too, until the first one has waited for it. What the card refuses meanwhile is
// refused here, and spoils the capture. One capture at a time; the modes global and thread-local are the same
// here, and graphs are made by capture alone.

struct CUgraph_st { std::vector<std::function<void()>> work; };
struct CUgraphExec_st { std::shared_ptr<const CUgraph_st> graph; };
static CUgraph_st *captured_graph;                  // null: nothing is captured
static cudaStream_t captured_stream;                // the one that began it
static long captures;                               // so far; the number of the present one
static bool capture_spoilt;

static const char *capture_error(cudaError_t e) {
    return e == cudaErrorStreamCaptureUnsupported   ? "operation not permitted when stream is capturing"
           : e == cudaErrorStreamCaptureImplicit    ? "legacy stream would depend on a capturing blocking one"
           : e == cudaErrorStreamCaptureInvalidated ? "a previous error during capture"
           : e == cudaErrorStreamCaptureUnjoined    ? "capturing stream has unjoined work"
           : e == cudaErrorStreamCaptureIsolation   ? "dependency on uncaptured work in another stream"
           : e == cudaErrorCapturedEvent            ? "event last recorded in a capturing stream"
                                                    : "CUDA error";
}
static cudaError_t capture_spoils(cudaError_t e) {
    capture_spoilt = true;
    return error(e);
}
static bool capture_takes(cudaStream_t s, const std::function<void()> &f) {
    if (!captured_graph || is_null(s) || !s->captured) return false;
    captured_graph->work.push_back(f);
    s->loose = s != captured_stream;
    return true;
}
// What may not be called during a capture, of stream s: anything that waits, and the null stream, which
// would wait for the captured one (unless that was made not to)
static cudaError_t capture_forbids(cudaStream_t s, bool waits) {
    if (!captured_graph) return cudaSuccess;
    if (!is_null(s) && s->captured && capture_spoilt) return error(cudaErrorStreamCaptureInvalidated);
    if (is_null(s) && captured_stream->blocking) return capture_spoils(cudaErrorStreamCaptureImplicit);
    return waits ? capture_spoils(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}
static bool capture_records(cudaEvent_t e, cudaStream_t s) {
    e->capture = captured_graph && !is_null(s) && s->captured ? captures : 0;
    return e->capture != 0;
}
static bool capture_waits(cudaStream_t s, cudaEvent_t e, cudaError_t *result) {
    bool inside = captured_graph && !is_null(s) && s->captured;
    *result = cudaSuccess;
    if (!inside && !e->capture) return false;
    if (!captured_graph || is_null(s)) *result = error(cudaErrorCapturedEvent);   // a capture that is over
    else if (e->capture != captures) *result = capture_spoils(cudaErrorStreamCaptureIsolation);
    else {
        s->captured = true;
        s->loose = s != captured_stream;
        if (e->stream != s) e->stream->loose = false;
    }
    return true;
}

extern "C" {
cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode mode) {
    start();
    if (mode == cudaStreamCaptureModeRelaxed) fail("captures in relaxed mode are not emulated");
    if (is_null(s)) return error(cudaErrorStreamCaptureUnsupported);
    if (captured_graph) return capture_spoils(cudaErrorIllegalState);
    captured_graph = new CUgraph_st;
    captured_stream = s;
    captures++;
    s->captured = true;
    capture_spoilt = s->loose = false;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *graph) {
    *graph = nullptr;
    if (!captured_graph) return error(cudaErrorIllegalState);
    if (s != captured_stream) return capture_spoils(cudaErrorStreamCaptureUnmatched);
    bool loose = false;
    for (cudaStream_t t : streams) {
        loose |= t->captured && t->loose;
        t->captured = false;
    }
    CUgraph_st *made = captured_graph;
    captured_graph = nullptr;
    if (!capture_spoilt && !loose) return *graph = made, cudaSuccess;
    delete made;
    return error(capture_spoilt ? cudaErrorStreamCaptureInvalidated : cudaErrorStreamCaptureUnjoined);
}
cudaError_t cudaStreamIsCapturing(cudaStream_t s, cudaStreamCaptureStatus *status) {
    *status = !captured_graph || is_null(s) || !s->captured ? cudaStreamCaptureStatusNone
              : capture_spoilt                              ? cudaStreamCaptureStatusInvalidated
                                                            : cudaStreamCaptureStatusActive;
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long) {
    if (!graph) return error(cudaErrorInvalidValue);
    *exec = new CUgraphExec_st{std::make_shared<CUgraph_st>(*graph)};
    return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
    if (!graph || nodes) return error(cudaErrorInvalidValue);       // only how many
    *count = graph->work.size();
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t s) {
    if (!exec) return error(cudaErrorInvalidValue);
    if (cudaError_t e = capture_forbids(s, false)) return e;
    std::shared_ptr<const CUgraph_st> graph = exec->graph;
    on_stream(s, [graph] {
        for (const std::function<void()> &f : graph->work) f();
    });
    return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) { return delete exec, cudaSuccess; }
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete graph, cudaSuccess; }
} // extern "C"

// ----------------------------------------------------------------------------------------------------------
// Memory. Everything is NaN (as float and as bf16; -1 as int) until it is written. Behind an allocation come
// 4 KiB more of NaN, which cudaFree looks at again; address sanitizer has its own redzones, and may touch
// device memory only while a kernel or a copy runs.

struct Block { uintptr_t base; size_t size; bool on_device; };
static std::vector<Block> blocks;                   // memory sanitizer does not see into std::map
#if defined(ASAN) || defined(MSAN)
enum { PAD = 0 };
#else
enum { PAD = 4096 };
#endif

static void device_memory(bool usable) {
    (void)usable;
#ifdef ASAN
    static int depth;
    depth += usable ? 1 : -1;
    if (depth != usable) return;                    // one inside another
    for (Block &b : blocks) {
        if (!b.on_device) continue;
        if (usable) __asan_unpoison_memory_region((void *)b.base, b.size);
        else __asan_poison_memory_region((void *)b.base, b.size);
    }
#endif
}

static Block *find(const void *p) {
    for (Block &b : blocks)
        if ((uintptr_t)p - b.base < b.size) return &b;
    return nullptr;
}

void cuda_cpu::check_pointer(const Launch &l, int index, const void *p) {
    if (!p || find(p) || find((const char *)p - 1)) return;     // one past the end is allowed
    now = &l;
    fail("argument %d, %p, points to no device memory", index, p);
}

static cudaError_t allocate(void **p, size_t n, bool on_device) {
    start();
    *p = nullptr;
    if (captured_graph) return capture_spoils(cudaErrorStreamCaptureUnsupported);
    if (n == 0) return cudaSuccess;
    if (posix_memalign(p, 256, n + PAD)) return error(cudaErrorMemoryAllocation);
#ifndef MSAN
    memset(*p, 0xff, n + PAD);
#endif
    (void)VALGRIND_MAKE_MEM_UNDEFINED(*p, n);
    (void)VALGRIND_MAKE_MEM_NOACCESS((char *)*p + n, PAD);
#ifdef ASAN
    if (on_device) __asan_poison_memory_region(*p, n);
#endif
    blocks.push_back({(uintptr_t)*p, n, on_device});
    return cudaSuccess;
}

static cudaError_t deallocate(void *p) {
    if (!p) return cudaSuccess;
    if (captured_graph) return capture_spoils(cudaErrorStreamCaptureUnsupported);
    drain_all(false);
    Block *b = find(p);
    if (!b || b->base != (uintptr_t)p) fail("cudaFree of %p, which cudaMalloc did not return", p);
#ifdef ASAN
    __asan_unpoison_memory_region(p, b->size);
#endif
    const unsigned char *pad = (unsigned char *)p + b->size;
    (void)VALGRIND_MAKE_MEM_DEFINED(pad, PAD);
    for (size_t i = 0; i < PAD; i++)
        if (pad[i] != 0xff) fail("byte %zu behind an allocation of %zu was written", i, b->size);
    blocks.erase(blocks.begin() + (b - blocks.data()));
    free(p);
    return cudaSuccess;
}

static void copy(void *to, const void *from, size_t n, cudaMemcpyKind kind) {
    static const char *const names[] = {"host", "device"};
    Block *d = find(to), *s = find(from);
    bool device_to = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    bool device_from = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    if (kind != cudaMemcpyDefault && n && ((device_to && !d) || (device_from && !s)))
        fail("cudaMemcpy of %zu bytes in the wrong direction: destination on the %s, source on the %s", n,
             names[d != nullptr], names[s != nullptr]);
    if ((d && (uintptr_t)to - d->base + n > d->size) || (s && (uintptr_t)from - s->base + n > s->size))
        fail("cudaMemcpy of %zu bytes runs past the end of an allocation", n);
    device_memory(true);
    if (s && (!d || !d->on_device)) {               // results: do they depend on memory that nobody wrote?
#ifdef MSAN
        __msan_check_mem_is_initialized(from, n);   // (its report calls this place copy)
#endif
        (void)VALGRIND_CHECK_MEM_IS_DEFINED(from, n);
    }
    if (n) memcpy(to, from, n);   // an empty copy may have no address
    device_memory(false);
}

extern "C" {
cudaError_t cudaMalloc(void **p, size_t n) { return allocate(p, n, true); }
cudaError_t cudaMallocHost(void **p, size_t n) { return allocate(p, n, false); }
cudaError_t cudaHostAlloc(void **p, size_t n, unsigned) { return allocate(p, n, false); }
cudaError_t cudaFree(void *p) { return deallocate(p); }
cudaError_t cudaFreeHost(void *p) { return deallocate(p); }
cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
    *available = *total = (size_t)80 << 30;
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t n, cudaMemcpyKind kind) {
    start();
    if (cudaError_t e = capture_forbids(nullptr, true)) return e;
    wait_for(nullptr);
    copy(to, from, n, kind);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, cudaMemcpyKind kind, cudaStream_t s) {
    start();
    const bool pageable = !find(to) || !find(from);
    if (cudaError_t e = capture_forbids(s, pageable && s && s->captured)) return e;
    if (!pageable) on_stream(s, [=] { copy(to, from, n, kind); });
    else wait_for(s), copy(to, from, n, kind);      // pageable memory: not asynchronous
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *p, int value, size_t n, cudaStream_t s) {
    Block *b = find(p);
    if (n && (!b || (uintptr_t)p - b->base + n > b->size)) fail("cudaMemset of what is not device memory");
    if (cudaError_t e = capture_forbids(s, false)) return e;
    on_stream(s, [=] { memset(p, value, n); });
    return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t f, void *data) {
    if (cudaError_t e = capture_forbids(s, false)) return e;
    on_stream(s, [=] { f(data); });
    return cudaSuccess;
}
cudaError_t cudaMemset(void *p, int value, size_t n) { return cudaMemsetAsync(p, value, n, nullptr); }

// ----------------------------------------------------------------------------------------------------------
// Errors and the device

cudaError_t cudaGetLastError() {
    cudaError_t e = last_error;
    last_error = cudaSuccess;
    return e;
}
cudaError_t cudaPeekAtLastError() { return last_error; }
const char *cudaGetErrorString(cudaError_t e) {
    return e == cudaSuccess                     ? "no error"
           : e == cudaErrorInvalidConfiguration ? "invalid configuration argument"
           : e == cudaErrorInvalidValue         ? "invalid argument"
           : e == cudaErrorMemoryAllocation     ? "out of memory"
           : e == cudaErrorNotReady             ? "device not ready"
                                                : capture_error(e);
}
const char *cudaGetErrorName(cudaError_t e) { return cudaGetErrorString(e); }
static int devices() {                                          // CUDA_CPU_DEVICES: so many, all alike
    const char *text = getenv("CUDA_CPU_DEVICES");
    return text ? atoi(text) : 1;
}
static int current_device;
cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= devices()) return error(cudaErrorInvalidDevice);
    return current_device = device, cudaSuccess;
}
cudaError_t cudaGetDevice(int *device) { return *device = current_device, cudaSuccess; }
cudaError_t cudaGetDeviceCount(int *n) { return *n = devices(), cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *v) { return *v = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *v) { return *v = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int device) {
    start();
    memset((void *)p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "CPU posing as sm_%d", card.sm);
    p->uuid.bytes[0] = (char)device;
    p->major = card.sm / 10;
    p->minor = card.sm % 10;
    p->multiProcessorCount = card.processors;
    p->warpSize = 32;
    p->maxThreadsPerBlock = MAX_THREADS;
    p->maxThreadsPerMultiProcessor = 2048;
    p->sharedMemPerBlock = 48 * 1024;
    p->sharedMemPerBlockOptin = card.shared;
    p->sharedMemPerMultiprocessor = card.shared + 1024;
    p->regsPerBlock = 65536;
    p->l2CacheSize = 50 << 20;
    p->totalGlobalMem = (size_t)80 << 30;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *v, cudaDeviceAttr a, int) {
    start();
    *v = a == cudaDevAttrMultiProcessorCount              ? card.processors
         : a == cudaDevAttrMaxSharedMemoryPerBlockOptin   ? (int)card.shared
         : a == cudaDevAttrMaxSharedMemoryPerBlock        ? 48 * 1024
         : a == cudaDevAttrMaxThreadsPerBlock             ? MAX_THREADS
         : a == cudaDevAttrMaxThreadsPerMultiProcessor    ? 2048
         : a == cudaDevAttrComputeCapabilityMajor         ? card.sm / 10
         : a == cudaDevAttrComputeCapabilityMinor         ? card.sm % 10
         : a == cudaDevAttrWarpSize                       ? 32
                                                          : 0;
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void *kernel, cudaFuncAttribute attribute, int value) {
    start();
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value < 0 || (size_t)value > card.shared) return error(cudaErrorInvalidValue);
    for (DynamicLimit &d : dynamic_limits)
        if (d.kernel == kernel) return d.bytes = (size_t)value, cudaSuccess;
    dynamic_limits.push_back({kernel, (size_t)value});
    return cudaSuccess;
}
} // extern "C"
