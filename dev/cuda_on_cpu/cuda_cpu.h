// cuda_cpu.h - CUDA kernels on the CPU: what a .cu file sees in place of nvcc's built-ins.
//
// A .cu file that nvcc compiles as it stands is passed through cuda_cpu.sed and compiled by g++ or clang++
// with this header in front (-include cuda_cpu.h) and CUDA's own headers behind (-isystem .../cuda/include);
// the program is linked with cuda_cpu.cpp and cuda_cpu_blas.cpp. emu.mk has the rules, README.md the manual.
// One OS thread runs everything: a CUDA thread is a fiber, and the blocks of a grid run one after another.
//
// The CPU twins of a program's PTX wrappers stand at the end: the .cu file defines the wrappers themselves
// under `#ifndef CUDA_ON_CPU`, and its kernels contain no other #ifdef. Namespace cuda_cpu is internal.
#pragma once
#define CUDA_ON_CPU 1
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <functional>
#include <limits>
#include <memory>
#include <tuple>
#include <type_traits>
#include <utility>
#define __shared__ "a declaration that cuda_cpu.sed did not rewrite: one __shared__ variable each"
#include <cuda_runtime.h>
#include <cuda_bf16.h>
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __restrict__
#define __restrict__                // never keep a load in a register while other threads run

// Plain globals, set at each switch of fibers. device_launch_parameters.h has them const: then they would be
// kept in registers across a switch.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace cuda_cpu {

// ----------------------------------------------------------------------------------------------------------
// What cuda_cpu.cpp provides

extern long launches, products;     // of kernels and of matrix products, since the program began
struct Launch {
    dim3 grid, block;
    size_t smem;
    cudaStream_t stream;
    const char *file;               // where the launch stands
    int line;
    const void *kernel;
};
struct Call { virtual void run() = 0; virtual ~Call() {} };     // a kernel and its arguments
void launch(const Launch &, std::shared_ptr<Call>);             // checks, then runs or enqueues
void check_pointer(const Launch &, int index, const void *);    // dies if it is no device memory
void on_stream(cudaStream_t, std::function<void()>);
void *dynamic_shared();
void *shared_bytes(size_t bytes, const char *name, const char *function, int line);
template <class T> using Ref = T &;
template <class T> T &shared_variable(const char *name, const char *function, int line) {
    return *(T *)shared_bytes(sizeof(T), name, function, line);
}
#define CUDA_CPU_SHARED(name, ...) cuda_cpu::Ref<__VA_ARGS__> name = \
    cuda_cpu::shared_variable<__VA_ARGS__>(#name, __PRETTY_FUNCTION__, __LINE__)
void barrier(int line);
int  barrier_vote(int vote, int which, int line);
void fence(bool release);
int  lane();
// The lanes of `mask` meet here; the last to arrive runs done(args of all, lanes that take part) for all.
using Done = void (*)(void **args, unsigned live);
void collective(unsigned mask, void *args, Done done, const char *what, int line);
void syncwarp(unsigned mask, int line);
[[noreturn]] void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

// ----------------------------------------------------------------------------------------------------------
// Launches: kernel<<<g, b, smem, stream>>>(args) -> kernel ->*cuda_cpu::config(g, b, smem, stream)(args).
// ->* binds less tightly than a call, so that this is an exchange of tokens.

template <class... A> struct Bound { Launch launch; std::tuple<A...> args; };

struct Config {
    Launch launch;
    template <class... A> Bound<std::decay_t<A>...> operator()(A &&...a) const {
        return {launch, {std::forward<A>(a)...}};
    }
};
inline Config config(dim3 grid, dim3 block, size_t smem = 0, cudaStream_t stream = 0,
                     const char *file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {{grid, block, smem, stream, file, line, nullptr}};
}

template <class P, class A> P convert(const A &a) {             // as in a call; a NULL arrives as an integer
    if constexpr (std::is_pointer_v<P> && std::is_integral_v<A>) return a ? P(uintptr_t(a)) : nullptr;
    else return a;
}

template <class I, class... P> struct KernelCall;
template <size_t... I, class... P> struct KernelCall<std::index_sequence<I...>, P...> : Call {
    void (*kernel)(P...);
    std::tuple<std::decay_t<P>...> args;
    template <class... A> KernelCall(void (*k)(P...), const Bound<A...> &b)
        : kernel(k), args(convert<std::decay_t<P>>(std::get<I>(b.args))...) {
        (check<I>(b.launch), ...);
    }
    template <size_t N> void check(const Launch &l) {
        if constexpr (std::is_pointer_v<std::tuple_element_t<N, decltype(args)>>)
            check_pointer(l, N, (const void *)std::get<N>(args));
    }
    void run() override { kernel(std::get<I>(args)...); }
};
template <class... P, class... A> void operator->*(void (*kernel)(P...), Bound<A...> &&b) {
    static_assert(sizeof...(P) == sizeof...(A), "kernel launched with the wrong number of arguments");
    b.launch.kernel = (const void *)kernel;
    launch(b.launch, std::make_shared<KernelCall<std::index_sequence_for<P...>, P...>>(kernel, b));
}

// ----------------------------------------------------------------------------------------------------------
// Warps

#define CUDA_CPU_LINE int line = __builtin_LINE()               // the caller's line, without a macro
// For what reads the arguments of other fibers off their stacks, between two switches: no race
#define CUDA_CPU_QUIET __attribute__((no_sanitize("thread")))

struct Shuffle { char value[16], result[16]; int source; };     // source < 0: keep one's own
void shuffle(unsigned mask, Shuffle &, int line);
template <class T> T shuffle(unsigned mask, T value, int source, int line) {
    static_assert(sizeof(T) <= 16, "at most 16 bytes can be shuffled");
    Shuffle s;
    s.source = source;
    memcpy(s.value, (void *)&value, sizeof(T));
    shuffle(mask, s, line);
    memcpy((void *)&value, s.result, sizeof(T));
    return value;
}
inline int segment(int width) { return lane() & ~(width - 1); } // its first lane

// f folds the values of all lanes; every lane gets the result
template <class R, class T, class F>
R fold(unsigned mask, T value, R start, F f, const char *what, int line) {
    struct Args { T value; R result; F *f; } args{value, start, &f};
    collective(mask, &args, [](void **all, unsigned live) CUDA_CPU_QUIET {
        R r = ((Args *)all[__builtin_ctz(live)])->result;
        for (int l = 0; l < 32; l++)
            if (live >> l & 1) r = (*((Args *)all[l])->f)(r, ((Args *)all[l])->value, l);
        for (int l = 0; l < 32; l++)
            if (live >> l & 1) ((Args *)all[l])->result = r;
    }, what, line);
    return args.result;
}
} // namespace cuda_cpu

inline void __syncthreads(CUDA_CPU_LINE) { cuda_cpu::barrier(line); }
inline int __syncthreads_or(int vote, CUDA_CPU_LINE) { return cuda_cpu::barrier_vote(vote, 0, line); }
inline int __syncthreads_and(int vote, CUDA_CPU_LINE) { return cuda_cpu::barrier_vote(vote, 1, line); }
inline int __syncthreads_count(int vote, CUDA_CPU_LINE) { return cuda_cpu::barrier_vote(vote, 2, line); }
inline void __syncwarp(unsigned mask = ~0u, CUDA_CPU_LINE) { cuda_cpu::syncwarp(mask, line); }
inline void __threadfence() { cuda_cpu::fence(true); }
inline void __threadfence_block() { cuda_cpu::fence(true); }

template <class T> T __shfl_sync(unsigned mask, T x, int source, int width = 32, CUDA_CPU_LINE) {
    return cuda_cpu::shuffle(mask, x, cuda_cpu::segment(width) + (source & (width - 1)), line);
}
template <class T> T __shfl_xor_sync(unsigned mask, T x, int lanes, int width = 32, CUDA_CPU_LINE) {
    int s = cuda_cpu::lane() ^ lanes;
    return cuda_cpu::shuffle(mask, x, s < cuda_cpu::segment(width) + width ? s : -1, line);
}
template <class T> T __shfl_down_sync(unsigned mask, T x, unsigned by, int width = 32, CUDA_CPU_LINE) {
    int s = cuda_cpu::lane() + (int)by;
    return cuda_cpu::shuffle(mask, x, s < cuda_cpu::segment(width) + width ? s : -1, line);
}
template <class T> T __shfl_up_sync(unsigned mask, T x, unsigned by, int width = 32, CUDA_CPU_LINE) {
    int s = cuda_cpu::lane() - (int)by;
    return cuda_cpu::shuffle(mask, x, s >= cuda_cpu::segment(width) ? s : -1, line);
}
inline unsigned __ballot_sync(unsigned mask, int vote, CUDA_CPU_LINE) {
    auto f = [](unsigned r, int x, int l) { return r | unsigned(x != 0) << l; };
    return cuda_cpu::fold(mask, vote, 0u, f, "__ballot_sync", line);
}
inline int __any_sync(unsigned mask, int vote, CUDA_CPU_LINE) {
    return cuda_cpu::fold(mask, vote, 0, [](int r, int x, int) { return int(r || x); }, "__any_sync", line);
}
inline int __all_sync(unsigned mask, int vote, CUDA_CPU_LINE) {
    return cuda_cpu::fold(mask, vote, 1, [](int r, int x, int) { return int(r && x); }, "__all_sync", line);
}
template <class T> T __reduce_add_sync(unsigned mask, T x, CUDA_CPU_LINE) {
    static_assert(sizeof(T) == 4 && std::is_integral_v<T>, "__reduce_*_sync takes int and unsigned");
    return cuda_cpu::fold(mask, x, T(0), [](T r, T x, int) { return T(r + x); }, "__reduce_add_sync", line);
}
template <class T> T __reduce_max_sync(unsigned mask, T x, CUDA_CPU_LINE) {
    static_assert(sizeof(T) == 4 && std::is_integral_v<T>, "__reduce_*_sync takes int and unsigned");
    auto f = [](T r, T x, int) { return r < x ? x : r; };
    return cuda_cpu::fold(mask, x, std::numeric_limits<T>::min(), f, "__reduce_max_sync", line);
}
template <class T> T __reduce_min_sync(unsigned mask, T x, CUDA_CPU_LINE) {
    static_assert(sizeof(T) == 4 && std::is_integral_v<T>, "__reduce_*_sync takes int and unsigned");
    auto f = [](T r, T x, int) { return x < r ? x : r; };
    return cuda_cpu::fold(mask, x, std::numeric_limits<T>::max(), f, "__reduce_min_sync", line);
}

// ----------------------------------------------------------------------------------------------------------
// Atomics: real ones, so that thread sanitizer knows them. The second argument never decides the type.

namespace cuda_cpu {
template <class T, class F> T update(T *p, F f) {
    static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8, "no atomic of this size");
    using Wide = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
    using Word = std::conditional_t<sizeof(T) == 2, uint16_t, Wide>;
    Word old = __atomic_load_n((Word *)p, __ATOMIC_RELAXED), word;
    T before, after;
    do {
        memcpy((void *)&before, &old, sizeof(T));
        after = f(before);
        memcpy(&word, (void *)&after, sizeof(T));
    } while (!__atomic_compare_exchange_n((Word *)p, &old, word, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    fence(false);
    return before;
}
template <class T> struct Same { using Type = T; };
template <class T> using same = typename Same<T>::Type;
} // namespace cuda_cpu

template <class T> T atomicAdd(T *p, cuda_cpu::same<T> x) {
    return cuda_cpu::update(p, [x](T old) { return T(old + x); });
}
template <class T> T atomicSub(T *p, cuda_cpu::same<T> x) {
    return cuda_cpu::update(p, [x](T old) { return T(old - x); });
}
template <class T> T atomicMax(T *p, cuda_cpu::same<T> x) {
    return cuda_cpu::update(p, [x](T old) { return old < x ? x : old; });
}
template <class T> T atomicMin(T *p, cuda_cpu::same<T> x) {
    return cuda_cpu::update(p, [x](T old) { return x < old ? x : old; });
}
template <class T> T atomicOr(T *p, cuda_cpu::same<T> x) {
    return cuda_cpu::update(p, [x](T old) { return T(old | x); });
}
template <class T> T atomicExch(T *p, cuda_cpu::same<T> x) {
    return cuda_cpu::update(p, [x](T) { return x; });
}
template <class T> T atomicCAS(T *p, cuda_cpu::same<T> expected, cuda_cpu::same<T> x) {
    return cuda_cpu::update(p, [expected, x](T old) { return old == expected ? x : old; });
}
inline unsigned atomicInc(unsigned *p, unsigned most) {
    return cuda_cpu::update(p, [most](unsigned old) { return old >= most ? 0u : old + 1; });
}

// ----------------------------------------------------------------------------------------------------------
// Device functions that a C++ compiler lacks. The fast ones (__expf, ...) are exact here.

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __tanhf(float x) { return tanhf(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __frsqrt_rn(float a) { return (float)(1.0 / sqrt((double)a)); }
inline float __saturatef(float a) { return a > 0 ? a < 1 ? a : 1.0f : 0.0f; }      // NaN: 0
namespace cuda_cpu {
template <class To, class From> To bits(From x) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To y;
    memcpy(&y, &x, sizeof y);
    return y;
}
} // namespace cuda_cpu
inline float __int_as_float(int x) { return cuda_cpu::bits<float>(x); }
inline float __uint_as_float(unsigned x) { return cuda_cpu::bits<float>(x); }
inline int __float_as_int(float x) { return cuda_cpu::bits<int>(x); }
inline unsigned __float_as_uint(float x) { return cuda_cpu::bits<unsigned>(x); }
inline int __float2int_rn(float x) { return (int)rintf(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
template <class A, class B> constexpr std::common_type_t<A, B> max(A a, B b) { return a < b ? b : a; }
template <class A, class B> constexpr std::common_type_t<A, B> min(A a, B b) { return b < a ? b : a; }
template <class T> T __ldg(const T *p) { return *p; }
template <class T> T __ldcs(const T *p) { return *p; }
template <class T> T __ldcg(const T *p) { return *p; }
template <class T> void __stcs(T *p, cuda_cpu::same<T> x) { *p = x; }
template <class T> void __stcg(T *p, cuda_cpu::same<T> x) { *p = x; }
#define __trap() cuda_cpu::fail("__trap() at line %d", __LINE__)
inline unsigned __cvta_generic_to_shared(const void *) = delete;    // stays inside the PTX wrappers

// The templates of cuda_runtime.h that only nvcc sees
template <class F> cudaError_t cudaFuncSetAttribute(F *kernel, cudaFuncAttribute attribute, int value) {
    return ::cudaFuncSetAttribute((const void *)kernel, attribute, value);
}
template <class F> cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *a, F *) {
    memset((void *)a, 0, sizeof *a);
    return cudaSuccess;
}
template <class F>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, F *, int threads, size_t) {
    *n = 2048 / threads;
    return cudaSuccess;
}
template <class T>
cudaError_t cudaMemcpyToSymbol(T &symbol, const void *from, size_t bytes, size_t offset = 0,
                               cudaMemcpyKind = cudaMemcpyHostToDevice) {
    cudaDeviceSynchronize();
    if (offset + bytes > sizeof symbol) return cudaErrorInvalidValue;
    memcpy((char *)&symbol + offset, from, bytes);
    return cudaSuccess;
}
template <class T>
cudaError_t cudaMemcpyFromSymbol(void *to, const T &symbol, size_t bytes, size_t offset = 0,
                                 cudaMemcpyKind = cudaMemcpyDeviceToHost) {
    cudaDeviceSynchronize();
    if (offset + bytes > sizeof symbol) return cudaErrorInvalidValue;
    memcpy(to, (const char *)&symbol + offset, bytes);
    return cudaSuccess;
}

// ----------------------------------------------------------------------------------------------------------
// CPU twins of the PTX wrappers

namespace cuda_cpu {
// 16 bytes by plain loads and stores: g++'s -fsanitize=thread does not see a memcpy that it expands in line
struct __attribute__((may_alias, aligned(16))) Quad { unsigned x, y, z, w; };
struct Mma { float *d; const unsigned *a, *b; };
void mma_bf16(Mma &, int line);
struct Rows { alignas(16) uint16_t row[8]; unsigned *r; int count; bool trans; };
void check_copy(const void *to, const void *from, int line);
void check_row(const void *row, int line);
void ldmatrix(Rows &, int line);
template <int N> void ldmatrix(unsigned (&r)[N], const void *row, bool trans, int line) {
    static_assert(N == 1 || N == 2 || N == 4, "ldmatrix loads 1, 2 or 4 matrices");
    Rows rows{{}, r, N, trans};
    if (lane() < N * 8) {
        check_row(row, line);
        *(Quad *)rows.row = *(const Quad *)row;     // here, where the sanitizers see it
    }
    ldmatrix(rows, line);
}
using Copy16 = void (*)(void *to, const void *from);
void cp_async(void *to, const void *from);
void cp_async_commit();
void cp_async_wait(int pending, Copy16 copy);
} // namespace cuda_cpu

// d += a b for one tile m16n8k16: bf16 in, float sums
inline void mma_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], CUDA_CPU_LINE) {
    cuda_cpu::Mma m{d, a, b};
    cuda_cpu::mma_bf16(m, line);
}
// N 8x8 matrices of 16-bit numbers; lane i gives the address of row i % 8 of matrix i / 8
template <int N> void ldmatrix(unsigned (&r)[N], const void *row, CUDA_CPU_LINE) {
    cuda_cpu::ldmatrix(r, row, false, line);
}
template <int N> void ldmatrix_trans(unsigned (&r)[N], const void *row, CUDA_CPU_LINE) {
    cuda_cpu::ldmatrix(r, row, true, line);
}
// 16 bytes from global to shared memory (zeros if not valid): NaN there until this thread waits for them. The
// source is looked at here already, for the sanitizers: the hardware reads it even if nobody ever waits.
inline void cp_async16(void *shared, const void *global, bool valid = true, CUDA_CPU_LINE) {
    cuda_cpu::check_copy(shared, global, line);
    if (valid) (void)*(const volatile uint64_t *)global, (void)((const volatile uint64_t *)global)[1];
    *(cuda_cpu::Quad *)shared = {~0u, ~0u, ~0u, ~0u};
    cuda_cpu::cp_async(shared, valid ? global : nullptr);
}
inline void cp_async_commit() { cuda_cpu::cp_async_commit(); }
template <int PENDING> void cp_async_wait() {
    cuda_cpu::cp_async_wait(PENDING, [](void *to, const void *from) {
        *(cuda_cpu::Quad *)to = from ? *(const cuda_cpu::Quad *)from : cuda_cpu::Quad{0, 0, 0, 0};
    });
}
inline float exp2_approx(float x) {                             // ex2.approx.ftz: no subnormal results
    float y = exp2f(x);
    return y < FLT_MIN ? 0.0f : y;
}
