// What the CPU kernels share: vectors as wide as the target has them, unaligned loads, exp, a work counter.
// GCC and Clang vector extensions only, so that one source serves AVX-512, AVX2 and anything narrower.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#ifdef __linux__
#include <sys/mman.h>
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))
#define INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int VL = 16;  // floats per vector
constexpr int MR = 12;  // rows of a register tile: MR x 2 accumulators, 2 weights, 1 broadcast fit the register file
#elif defined(__AVX2__)
constexpr int VL = 8;
constexpr int MR = 6;
#elif defined(__aarch64__)
constexpr int VL = 4;
constexpr int MR = 12;
#else
constexpr int VL = 4;
constexpr int MR = 6;
#endif

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef float vf_any __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef uint32_t vu_any __attribute__((vector_size(VL * 4), aligned(4), may_alias));

static INLINE vf load(const float* p) { return *(const vf_any*)p; }
static INLINE void store(float* p, vf v) { *(vf_any*)p = v; }
static INLINE vf splat(float s) { return s - vf{}; }
static INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }

// Lanes turned by half, a quarter, ... of the vector: lane 0 of the last takes part in every lane.
#if defined(__AVX512F__)
#define TURN(v, by)                                                                                                  \
    __builtin_shufflevector(v, v, by, (by + 1) % 16, (by + 2) % 16, (by + 3) % 16, (by + 4) % 16, (by + 5) % 16,     \
                            (by + 6) % 16, (by + 7) % 16, (by + 8) % 16, (by + 9) % 16, (by + 10) % 16,              \
                            (by + 11) % 16, (by + 12) % 16, (by + 13) % 16, (by + 14) % 16, (by + 15) % 16)
#elif defined(__AVX2__)
#define TURN(v, by)                                                                                                  \
    __builtin_shufflevector(v, v, by, (by + 1) % 8, (by + 2) % 8, (by + 3) % 8, (by + 4) % 8, (by + 5) % 8,          \
                            (by + 6) % 8, (by + 7) % 8)
#else
#define TURN(v, by) __builtin_shufflevector(v, v, by, (by + 1) % 4, (by + 2) % 4, (by + 3) % 4)
#endif

// A fixed tree: lanes i and i + half, halving. Never reordered, so equal inputs give equal bits.
template <class F>
static INLINE float fold(vf v, F f) {
#if defined(__AVX512F__)
    v = f(v, TURN(v, 8));
#endif
#if defined(__AVX2__)
    v = f(v, TURN(v, 4));
#endif
    v = f(v, TURN(v, 2));
    return f(v, TURN(v, 1))[0];
}
static INLINE float hsum(vf v) {
    return fold(v, [](vf a, vf b) { return a + b; });
}
static INLINE float hmax(vf v) { return fold(v, vmax); }

// exp to about 1 ulp of float32: range reduction by ln 2 in two parts, then the Cephes expf polynomial.
// Arguments below -87 give about 1e-38, above 88 give about 1.7e38, NaN gives NaN; exp(0) is exactly 1.
static INLINE vf vexp(vf x) {
    x = x < splat(-87.0f) ? splat(-87.0f) : x;
    x = x > splat(88.0f) ? splat(88.0f) : x;
    const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    vf n = (x * 1.44269504f + magic) - magic;
    vf r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return p * (vf)((__builtin_convertvector(n, vi) + 127) << 23);
}

// Interleaves the first or the second halves of two vectors: a0 b0 a1 b1 ...
#if defined(__AVX512F__)
static INLINE vf low_halves(vf a, vf b) {
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
static INLINE vf high_halves(vf a, vf b) {
    return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
#elif defined(__AVX2__)
static INLINE vf low_halves(vf a, vf b) { return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
static INLINE vf high_halves(vf a, vf b) { return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
#else
static INLINE vf low_halves(vf a, vf b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
static INLINE vf high_halves(vf a, vf b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
#endif

// VL rows of VL floats -> VL columns: log2(VL) rounds of interleaving row i with row i + VL / 2.
static INLINE void transpose(vf* now) {
    vf then[VL];
#pragma GCC unroll 4
    for (int round = 1; round < VL; round *= 2) {
#pragma GCC unroll 16
        for (int i = 0; i < VL / 2; i++) {
            then[2 * i] = low_halves(now[i], now[i + VL / 2]);
            then[2 * i + 1] = high_halves(now[i], now[i + VL / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < VL; i++) now[i] = then[i];
    }
}

static INLINE long ceil_div(long a, long b) { return (a + b - 1) / b; }
static INLINE long least(long a, long b) { return a < b ? a : b; }
static INLINE long most(long a, long b) { return a > b ? a : b; }

// Huge pages save a page walk every 4 KiB of a weight stream; the request may be ignored.
static inline void ask_for_huge_pages(void* memory, size_t size) {
#ifdef __linux__
    uintptr_t begin = ((uintptr_t)memory + 4095) & ~(uintptr_t)4095;
    if (size > (1 << 21)) madvise((void*)begin, (size - 4096) & ~(uintptr_t)4095, MADV_HUGEPAGE);
#endif
}

// Scratch that grows and stays with its thread, so that a call in the hot path does not allocate.
struct Scratch {
    float* data = nullptr;
    size_t capacity = 0;
    float* get(size_t count) {
        if (count > capacity) {
            free(data);
            capacity = (count + 4095) / 4096 * 4096;
            data = (float*)aligned_alloc(64, capacity * sizeof(float));
            if (!data) abort();  // no error can cross the thread team
        }
        return data;
    }
    ~Scratch() { free(data); }
};
