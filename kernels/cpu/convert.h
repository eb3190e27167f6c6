// Between float32 or int32 lanes and the narrower types that memory holds.
#pragma once

#include "common.h"

#if defined(__AVX2__) || defined(__F16C__)
#include <immintrin.h>
#endif

// VL elements of a memory without alignment as lanes of 32 bits. GCC takes __builtin_convertvector between sizes apart
// into lanes, for float16 even on AVX-512, so that x86 says what it means.
typedef int8_t bytes_of_lanes __attribute__((vector_size(VL), aligned(1), may_alias));
typedef uint16_t shorts_of_lanes __attribute__((vector_size(VL * 2), aligned(1), may_alias));
typedef _Float16 halves_of_lanes __attribute__((vector_size(VL * 2), aligned(1), may_alias));

static INLINE vi widen_signed_bytes(const int8_t* from) {
#if defined(__AVX512F__)
    return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from));
#elif defined(__AVX2__)
    return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from));
#else
    return __builtin_convertvector(*(const bytes_of_lanes*)from, vi);
#endif
}

// The low bytes of lanes.
static INLINE bytes_of_lanes narrow_to_bytes(vi v) {
#if defined(__AVX512F__)
    return (bytes_of_lanes)_mm512_cvtepi32_epi8((__m512i)v);
#else
    return __builtin_convertvector(v, bytes_of_lanes);
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

static INLINE vf widen_halves(const void* from) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__AVX2__) && defined(__F16C__)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#elif defined(__F16C__)  // Ivy Bridge
    return (vf)_mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)from));
#else
    return __builtin_convertvector(*(const halves_of_lanes*)from, vf);
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
    const shorts bits = __builtin_convertvector(*(const bytes_of_lanes*)from, shorts) << 7 & (int16_t)0xbfff;
    return widen_halves(&bits);
#endif
}
