// How the pool keeps an element of a key or value: float32, bfloat16, or 8 bits (integers, or floats e4m3) with a
// float32 scale for each slot and head, where element * scale is the value.
//
// Each kind tells: Element; SCALED; LIMIT, the largest magnitude that it writes; FACTOR, which widened elements lack;
// widen(from), VL elements as floats; narrow(v), the nearest elements, ties to even.
#pragma once

#include "common.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// VL elements of a memory without alignment as lanes of 32 bits. GCC takes __builtin_convertvector between sizes apart
// into lanes, for float16 even on AVX-512, so that x86 says what it means.
typedef int8_t bytes_of_lanes __attribute__((vector_size(VL), aligned(1), may_alias));
typedef uint16_t shorts_of_lanes __attribute__((vector_size(VL * 2), aligned(1), may_alias));

static INLINE vi widen_signed_bytes(const int8_t* from) {
#if defined(__AVX512F__)
    return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from));
#elif defined(__AVX2__)
    return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from));
#else
    return __builtin_convertvector(*(const bytes_of_lanes*)from, vi);
#endif
}

static INLINE vu widen_shorts(const uint16_t* from) {
#if defined(__AVX512F__)
    return (vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__AVX2__)
    return (vu)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
#else
    return __builtin_convertvector(*(const shorts_of_lanes*)from, vu);
#endif
}

// Bytes e4m3 ("fn", without infinities) as floats, but for a factor of 2^-8: exponents are biased by 7, those of
// float16 by 15, and float16 has room for the subnormals, so that the bits moved up by 7 are a float16. No denormal float32
// occurs on the way, for which processors are slow. The one NaN comes out as 480 * 2^-8.
static INLINE vf widen_e4m3(const int8_t* from) {
    // The sign is copied into the upper byte, and so arrives in bits 15 and 14.
#if defined(__AVX512F__)
    const __m256i bytes = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)from));
    return (vf)_mm512_cvtph_ps(_mm256_and_si256(_mm256_slli_epi16(bytes, 7), _mm256_set1_epi16((short)0xbfff)));
#elif defined(__AVX2__) && defined(__F16C__)
    const __m128i bytes = _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)from));
    return (vf)_mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(bytes, 7), _mm_set1_epi16((short)0xbfff)));
#else
    typedef int16_t shorts __attribute__((vector_size(VL * 2)));
    typedef _Float16 halves __attribute__((vector_size(VL * 2)));
    const shorts bits = __builtin_convertvector(*(const bytes_of_lanes*)from, shorts) << 7;
    return __builtin_convertvector((halves)(bits & (int16_t)0xbfff), vf);
#endif
}

enum KvKind { KV_FLOAT32, KV_BFLOAT16, KV_INT8, KV_FP8 };  // numbered as in cpu_decoder.py

struct KvFloat32 {
    typedef float Element;
    static constexpr bool SCALED = false;
    static INLINE vf widen(const Element* from) { return load(from); }
    static INLINE vf narrow(vf v) { return v; }
};

struct KvBFloat16 {
    typedef uint16_t Element;
    static constexpr bool SCALED = false;
    static INLINE vf widen(const Element* from) { return (vf)(widen_shorts(from) << 16); }
    static INLINE shorts_of_lanes narrow(vf v) {
        const vu bits = (vu)v, nan = vu{} + 0x7fc0u;
        const vu rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
        return __builtin_convertvector(v == v ? rounded : nan, shorts_of_lanes);  // rounding could make a NaN infinite
    }
};

struct KvInt8 {
    typedef int8_t Element;
    static constexpr bool SCALED = true;
    static constexpr float LIMIT = 127.0f, FACTOR = 1.0f;
    static INLINE vf widen(const Element* from) { return __builtin_convertvector(widen_signed_bytes(from), vf); }
    static INLINE bytes_of_lanes narrow(vf v) {
        const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, found in the low bits
        return __builtin_convertvector((vi)(v + magic) - (vi)splat(magic), bytes_of_lanes);
    }
};

struct KvFp8 {  // e4m3; a NaN is not written with a scale that is a number
    typedef int8_t Element;  // the bits
    static constexpr bool SCALED = true;
    static constexpr float LIMIT = 448.0f, FACTOR = 256.0f;
    static INLINE vf widen(const Element* from) { return widen_e4m3(from); }
    static INLINE bytes_of_lanes narrow(vf v) {
        const vu magnitude = (vu)v & 0x7fffffffu;
        const vu normal = ((magnitude + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20) - (120u << 3);
        const float magic = 16384.0f;  // its last bit is worth 2^-9, as that of the subnormals
        const vu subnormal = (vu)((vf)magnitude + magic) - (vu)splat(magic);
        const vu smallest_normal = vu{} + 0x3c800000u;  // 2^-6
        const vu code = (magnitude < smallest_normal ? subnormal : normal) | ((vu)v >> 24 & 0x80u);
        return __builtin_convertvector(code, bytes_of_lanes);
    }
};

// The pool of one layer.
struct KvPool {
    void *keys, *values;              // [num_blocks][num_kv_heads][slots of a block][dim]
    float *key_scales, *value_scales; // the same without dim, of 8 bits; else null
    int kind;
};

// f(kind) with the KvKind as a type.
template <class F>
INLINE auto with_kv(int kind, F f) {
    switch (kind) {
        case KV_BFLOAT16: return f(KvBFloat16());
        case KV_INT8: return f(KvInt8());
        case KV_FP8: return f(KvFp8());
        default: return f(KvFloat32());
    }
}
