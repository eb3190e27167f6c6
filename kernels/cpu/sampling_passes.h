// What sampling.cpp does over a whole vocabulary: maxima of blocks of neighbouring ids, weights, sums of weights.
#pragma once

#include "common.h"

#include <cmath>

#if defined(__SSE__)
#include <immintrin.h>
#endif

namespace {

constexpr long BLOCK = 64;        // ids per block, LOGIT_BLOCK in kernels/sampling.py
constexpr long SUMS_PIECE = 512;  // blocks that are summed at a time, at most: their sums stay in L1
constexpr float LEAST = -87.0f;   // exp of less is taken for 0

// The next VL values, of which there are `count`: the rest is `other`.
INLINE vf load_or(const float* from, long count, float other) {
    if (count >= VL) return load(from);
    float lanes[VL];
    for (long i = 0; i < VL; i++) lanes[i] = i < count ? from[i] : other;
    return load(lanes);
}
INLINE vf load_or_mask(const float* from, long count) { return load_or(from, count, -INFINITY); }

// The larger of both, and NaN where one is.
INLINE vf larger(vf a, vf b) {
    const vf m = a > b ? a : b;
    return a == a ? m : a;
}

// The larger of both where both are numbers.
INLINE vf larger_number(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE__)
    return (vf)_mm_max_ps((__m128)a, (__m128)b);
#else
    return vmax(a, b);
#endif
}

// Maxima of VL blocks that are whole; true where it may have passed by a NaN. Their vectors are interleaved with those
// VL / 2, VL / 4, ... blocks on, so that lane i ends with block i.
INLINE bool maxima_of_numbers(const float* x, float* maxima) {
    vf now[VL], marks[4] = {};
    const vf small = splat(0x1p-20f);  // sums of finite values stay finite
    for (int b = 0; b < VL; b++) {
        const float* from = x + b * BLOCK;
        for (int line = 0; line < BLOCK; line += 16) __builtin_prefetch(from + 512 + line);
        vf m[4] = {load(from), load(from + VL), load(from + 2 * VL), load(from + 3 * VL)};
        for (int i = 0; i < 4; i++) marks[i] += m[i] * small;
        for (long i = 4 * VL; i < BLOCK; i += 4 * VL)
            for (int j = 0; j < 4; j++) {
                const vf v = load(from + i + j * VL);
                marks[j] += v * small;
                m[j] = larger_number(m[j], v);
            }
        now[b] = larger_number(larger_number(m[0], m[1]), larger_number(m[2], m[3]));
    }
#pragma GCC unroll 4
    for (int half = VL / 2; half; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; i++)
            now[i] = larger_number(low_halves(now[i], now[i + half]), high_halves(now[i], now[i + half]));
    store(maxima, now[0]);
    const float mark = hsum(marks[0] + marks[1] + marks[2] + marks[3]);  // NaN, or two infinities that differ
    return mark != mark;
}

// Maxima of the blocks begin .. end - 1.
void block_maxima(const float* x, long vocab, long begin, long end, float* maxima) {
    long b = begin;
    for (; b + VL <= end && (b + VL) * BLOCK <= vocab; b += VL)
        if (maxima_of_numbers(x + b * BLOCK, maxima + b)) break;
    for (; b < end; b++) {
        vf m = load_or_mask(x + b * BLOCK, vocab - b * BLOCK);
        for (long i = b * BLOCK + VL; i < least(vocab, (b + 1) * BLOCK); i += VL)
            m = larger(m, load_or_mask(x + i, vocab - i));
        maxima[b] = fold(m, larger);
    }
}

float row_maximum(const float* maxima, long blocks) {
    vf m = load_or_mask(maxima, blocks);
    for (long i = VL; i < blocks; i += VL) m = larger(m, load_or_mask(maxima + i, blocks - i));
    return fold(m, larger);
}

// exp((logit - largest) / temperature). NaN, as of -inf - -inf, is 0.
struct Weight {
    vf largest, inverse;
    Weight(float row_max, double temperature) : largest(splat(row_max)), inverse(splat((float)(1.0 / temperature))) {}
    INLINE vf operator()(vf logits) const {
        const vf depth = (logits - largest) * inverse;
        return depth >= splat(LEAST) ? vexp(depth) : vf{};
    }
};

// Sums of weights over the ids j, j + blocks, j + 2 blocks, ... for begin <= j < end; each adds up in this order
// however the j are cut. Runs of neighbouring ids are read, which the processor fetches ahead.
void block_sums(const float* x, long vocab, long begin, long end, const Weight& weights, float* sums) {
    const long blocks = ceil_div(vocab, BLOCK), width = end - begin;
    const Weight weight = weights;
    alignas(64) float total[SUMS_PIECE] = {};
    for (long first = begin; first < vocab; first += blocks) {
        const float* from = x + first;
        const long count = least(width, vocab - first);
        long i = 0;
        for (; i + VL <= count; i += VL) {
            __builtin_prefetch(from + i + 256);
            store(total + i, load(total + i) + weight(load(from + i)));
        }
        if (i < count) store(total + i, load(total + i) + weight(load_or_mask(from + i, count - i)));
    }
    memcpy(sums + begin, total, width * sizeof(float));
}

}  // namespace
