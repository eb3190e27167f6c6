// The part of CUDA C++ that the kernels use, for g++ on the CPU, and the launcher that Python calls.
#pragma once

#define MR_HOST 1

#include <cmath>

#include "emu_warp.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

enum { warpSize = 32 };

// Vector types with CUDA's alignment.
struct alignas(8) float2 { float x, y; };
struct float3 { float x, y, z; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) ulonglong2 { unsigned long long x, y; };
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static inline int2 make_int2(int x, int y) { return {x, y}; }
static inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

// min and max of the same type, or of mixed integers as CUDA's headers have them.
template <typename A, typename B> static inline std::common_type_t<A, B> min(A a, B b) { return b < a ? b : a; }
template <typename A, typename B> static inline std::common_type_t<A, B> max(A a, B b) { return a < b ? b : a; }

// Bits and integers.
static inline float __int_as_float(int x) { return emu::bits_to_float(static_cast<uint32_t>(x)); }
static inline float __uint_as_float(unsigned x) { return emu::bits_to_float(x); }
static inline int __float_as_int(float x) { return static_cast<int>(emu::float_to_bits(x)); }
static inline unsigned __float_as_uint(float x) { return emu::float_to_bits(x); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
static inline unsigned __brev(unsigned x) {
    unsigned y = 0;
    for (int i = 0; i < 32; i++) y |= (x >> i & 1u) << (31 - i);
    return y;
}
static inline unsigned __umulhi(unsigned a, unsigned b) {
    return static_cast<unsigned>(static_cast<unsigned long long>(a) * b >> 32);
}
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
static inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const unsigned long long bytes = static_cast<unsigned long long>(y) << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) {
        const unsigned s = selector >> 4 * i & 15u;
        unsigned byte = static_cast<unsigned>(bytes >> 8 * (s & 7u)) & 0xffu;
        if (s & 8u) byte = byte & 0x80u ? 0xffu : 0u;
        result |= byte << 8 * i;
    }
    return result;
}
static inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>((static_cast<unsigned long long>(high) << 32 | low) >> (shift & 31));
}
static inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>((static_cast<unsigned long long>(high) << 32 | low) << (shift & 31) >> 32);
}
static inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; i++) c += static_cast<signed char>(a >> 8 * i) * static_cast<signed char>(b >> 8 * i);
    return c;
}

// Floats. The fast variants are exact here; what they lose is inside of every test's tolerance.
#define __expf(x) expf(x)
#define __exp2f(x) exp2f(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline float __frsqrt_rn(float x) { return 1.0f / sqrtf(x); }
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __frcp_rn(float x) { return 1.0f / x; }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
// Out of range: the nearest integer; NaN: 0, as cvt does.
static inline int emu_float_to_int(float x) {
    return x != x ? 0 : x >= 2147483648.0f ? 2147483647 : x < -2147483648.0f ? -2147483647 - 1 : static_cast<int>(x);
}
static inline int __float2int_rn(float x) { return emu_float_to_int(nearbyintf(x)); }
static inline int __float2int_rz(float x) { return emu_float_to_int(truncf(x)); }
static inline int __float2int_rd(float x) { return emu_float_to_int(floorf(x)); }
static inline float __int2float_rn(int x) { return static_cast<float>(x); }
static inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }

// Memory. Blocks run one after the other, so fences and cache hints have nothing to do.
template <typename T> static inline T __ldg(const T* p) { return *p; }
template <typename T> static inline T __ldcg(const T* p) { return *p; }
template <typename T> static inline T __ldcs(const T* p) { return *p; }
template <typename T> static inline void __stcg(T* p, T value) { *p = value; }
template <typename T> static inline void __stcs(T* p, T value) { *p = value; }
static inline void __threadfence() {}
static inline void __threadfence_block() {}
static inline void __threadfence_system() {}
[[noreturn]] static inline void __trap() { emu::fail("__trap()"); }

template <typename T> struct emu_same { using type = T; };  // lets the second argument convert
#define MR_EMU_ATOMIC(name, expression)                                                  \
    template <typename T> static inline T name(T* p, typename emu_same<T>::type value) { \
        const T old = *p;                                                                \
        *p = (expression);                                                               \
        return old;                                                                      \
    }
MR_EMU_ATOMIC(atomicAdd, old + value)
MR_EMU_ATOMIC(atomicSub, old - value)
MR_EMU_ATOMIC(atomicMax, old < value ? value : old)
MR_EMU_ATOMIC(atomicMin, value < old ? value : old)
MR_EMU_ATOMIC(atomicExch, value)
MR_EMU_ATOMIC(atomicOr, old | value)
MR_EMU_ATOMIC(atomicAnd, old & value)
MR_EMU_ATOMIC(atomicXor, old ^ value)
MR_EMU_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
MR_EMU_ATOMIC(atomicDec, old == 0 || old > value ? value : old - 1)
#undef MR_EMU_ATOMIC
template <typename T>
static inline T atomicCAS(T* p, typename emu_same<T>::type expected, typename emu_same<T>::type value) {
    const T old = *p;
    if (old == expected) *p = value;
    return old;
}

// Barriers and warp collectives.
static inline void __syncthreads() { emu::sync_block(false); }
static inline int __syncthreads_or(int predicate) { return emu::sync_block(predicate != 0) != 0; }
static inline int __syncthreads_and(int predicate) { return emu::sync_block(predicate == 0) == 0; }
static inline int __syncthreads_count(int predicate) { return emu::sync_block(predicate != 0); }
static inline void __syncwarp(unsigned mask = ~0u) {
    emu::meet(mask, "__syncwarp", [](emu::Warp&, uint32_t) {});
}
static inline unsigned __activemask() { emu::fail("__activemask() has no defined value here: name the lanes"); }

template <typename T> static inline T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    const int lane = emu::current & 31;
    return emu::shuffle("__shfl_sync", mask, value, (lane & ~(width - 1)) | (source & (width - 1)));
}
template <typename T> static inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
    const int lane = emu::current & 31, source = lane ^ bits;
    return emu::shuffle("__shfl_xor_sync", mask, value, (source & ~(width - 1)) > lane ? lane : source);
}
template <typename T> static inline T __shfl_down_sync(unsigned mask, T value, unsigned step, int width = 32) {
    const int lane = emu::current & 31, place = lane & (width - 1);
    return emu::shuffle("__shfl_down_sync", mask, value, place + static_cast<int>(step) < width ? lane + step : lane);
}
template <typename T> static inline T __shfl_up_sync(unsigned mask, T value, unsigned step, int width = 32) {
    const int lane = emu::current & 31, place = lane & (width - 1);
    return emu::shuffle("__shfl_up_sync", mask, value, place >= static_cast<int>(step) ? lane - step : lane);
}

static inline unsigned __ballot_sync(unsigned mask, int predicate) {
    return emu::ballot("__ballot_sync", mask, predicate);
}
static inline int __any_sync(unsigned mask, int predicate) { return emu::ballot("__any_sync", mask, predicate) != 0; }
static inline int __all_sync(unsigned mask, int predicate) { return emu::ballot("__all_sync", mask, !predicate) == 0; }

#define MR_EMU_REDUCE(name, type, expression)                                                      \
    static inline type name(unsigned mask, type value) {                                           \
        return emu::reduce_lanes(#name, mask, value, [](type a, type b) -> type { return expression; }); \
    }
MR_EMU_REDUCE(__reduce_add_sync, unsigned, a + b)
MR_EMU_REDUCE(__reduce_min_sync, unsigned, b < a ? b : a)
MR_EMU_REDUCE(__reduce_max_sync, unsigned, a < b ? b : a)
MR_EMU_REDUCE(__reduce_and_sync, unsigned, a & b)
MR_EMU_REDUCE(__reduce_or_sync, unsigned, a | b)
MR_EMU_REDUCE(__reduce_xor_sync, unsigned, a ^ b)
MR_EMU_REDUCE(__reduce_add_sync, int, a + b)
MR_EMU_REDUCE(__reduce_min_sync, int, b < a ? b : a)
MR_EMU_REDUCE(__reduce_max_sync, int, a < b ? b : a)
#undef MR_EMU_REDUCE

// ---------------------------------------------------------------------------------------------------------------
// The launcher. build.py puts one MR_EMU_KERNEL before each kernel.

namespace emu {

struct LaunchRequest {
    uint32_t grid[3];
    uint32_t block;
    uint64_t shared_bytes;
    const void* params;
    uint64_t params_bytes;
    uint32_t backward;
    uint32_t late_copies;
    char* error;
    uint64_t error_bytes;
    uint64_t num_switches;  // out
};

static void on_fault(int signal, siginfo_t* info, void*) {
    // Not a call that is safe in a handler in general; here the fault comes from a kernel, which holds no lock.
    if (signal == SIGILL) fail("a trap that g++ put where the behaviour is undefined, such as a null pointer");
    const char* address = static_cast<const char*>(info->si_addr);
    const char* guard = current >= 0 ? fibers[current].stack : nullptr;
    if (guard && signal != SIGFPE && address >= guard && address < guard + GUARD_BYTES)
        fail("local variables of over %zu KB", STACK_BYTES / 1024);
    fail("%s at address %p", signal == SIGFPE ? "arithmetic fault" : "invalid memory access", info->si_addr);
}

// Kernels read and write through bad pointers in the tests that plant bugs: such a fault ends the launch only.
struct FaultHandlers {
    static constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
    static constexpr int COUNT = sizeof(SIGNALS) / sizeof(SIGNALS[0]);
    struct sigaction before[COUNT];
    stack_t stack_before;
    char* stack;

    FaultHandlers() {
        stack = static_cast<char*>(malloc(65536));
        stack_t alternate{};
        alternate.ss_sp = stack;
        alternate.ss_size = 65536;
        sigaltstack(&alternate, &stack_before);
        struct sigaction action {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        for (int i = 0; i < COUNT; i++) sigaction(SIGNALS[i], &action, &before[i]);
    }
    void restore() {
        for (int i = 0; i < COUNT; i++) sigaction(SIGNALS[i], &before[i], nullptr);
        sigaltstack(&stack_before, nullptr);
        free(stack);
    }
};

template <typename Params> struct Launch {
    static void (*kernel)(Params);
    static Params params;
    static void body() { kernel(params); }
};
template <typename Params> void (*Launch<Params>::kernel)(Params);
template <typename Params> Params Launch<Params>::params;

// 0, or 1 with a message in request.error.
template <typename Params> static int launch(void (*kernel)(Params), LaunchRequest& request) {
    static_assert(std::is_trivially_copyable<Params>::value, "the argument record is passed as bytes");
    error_text = request.error;
    error_capacity = request.error_bytes;
    current = -1;
    blockIdx = {0, 0, 0};
    FaultHandlers handlers;
    unsigned char* volatile memory = nullptr;
    int status = 1;
    if (sigsetjmp(launch_frame, 1) == 0) {
        if (sizeof(Params) != request.params_bytes)
            fail("the kernel's argument record has %zu bytes, but %llu were passed", sizeof(Params),
                 static_cast<unsigned long long>(request.params_bytes));
        if (request.block < 1 || request.block > MAX_THREADS)
            fail("a block of %u threads: it must have 1 to %d", request.block, MAX_THREADS);
        memcpy(&Launch<Params>::params, request.params, sizeof(Params));
        Launch<Params>::kernel = kernel;
        block_body = Launch<Params>::body;
        backward = request.backward;
        late_copies = request.late_copies;
        num_switches = 0;
        gridDim = {request.grid[0], request.grid[1], request.grid[2]};
        blockDim = {request.block, 1, 1};
        num_threads = static_cast<int>(request.block);
        num_warps = (num_threads + 31) / 32;
        const size_t rounded = (request.shared_bytes + 1023) / 1024 * 1024;
        memory = static_cast<unsigned char*>(aligned_alloc(1024, rounded + 2 * REDZONE_BYTES));
        if (!memory) fail("no memory for %llu shared bytes", static_cast<unsigned long long>(request.shared_bytes));
        dynamic_region = {memory + REDZONE_BYTES, request.shared_bytes, "the dynamic shared memory", nullptr};
        const uint64_t blocks = static_cast<uint64_t>(gridDim.x) * gridDim.y * gridDim.z;
        for (uint64_t i = 0; i < blocks; i++) {
            const uint64_t b = backward ? blocks - 1 - i : i;
            blockIdx = {static_cast<unsigned>(b % gridDim.x), static_cast<unsigned>(b / gridDim.x % gridDim.y),
                        static_cast<unsigned>(b / gridDim.x / gridDim.y)};
            poison_shared();
            run_block();
            check_shared();
        }
        status = 0;
    }
    current = -1;
    request.num_switches = num_switches;
    free(memory);
    handlers.restore();
    return status;
}

}  // namespace emu

#define MR_EMU_KERNEL(name, Params)                                                                        \
    extern "C" void name(Params);                                                                          \
    extern "C" int mr_emu_launch_##name(emu::LaunchRequest* request) { return emu::launch(name, *request); } \
    extern "C" unsigned long long mr_emu_size_##name() { return sizeof(Params); }
