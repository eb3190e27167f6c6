// What the lanes of a warp do together: shuffles, votes, reductions, ldmatrix and mma.
#pragma once

#include <type_traits>

#include "emu_memory.h"

namespace emu {

static uint16_t float_to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

static float bits_to_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static uint32_t float_to_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

static float half_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    const uint32_t magnitude = half & 0x7fffu;
    if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    // The exponent's bias goes from 15 to 127 by a product with 2^112, which is right for subnormals too.
    const float y = bits_to_float(magnitude << 13) * 5.192296858534828e33f;
    return bits_to_float(sign | float_to_bits(y));
}

static uint16_t float_to_half(float x) {
    const uint32_t bits = float_to_bits(x);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return sign | 0x7fffu;
    if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and above round to infinity
    if (magnitude < 0x38800000u) {                        // below 2^-14: steps of 2^-24; adding 1/2 rounds at that bit
        const uint32_t shifted = float_to_bits(bits_to_float(magnitude) + 0.5f);
        return static_cast<uint16_t>(sign | (shifted - 0x3f000000u));
    }
    const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
    return static_cast<uint16_t>(sign | ((rounded >> 13) - (112u << 10)));
}

struct Bf16 {
    static float decode(uint16_t bits) { return bits_to_float(static_cast<uint32_t>(bits) << 16); }
};
struct F16 {
    static float decode(uint16_t bits) { return half_to_float(bits); }
};

template <typename T> static T shuffle(const char* collective, uint32_t mask, T value, int source) {
    static_assert(sizeof(T) <= 8, "a shuffle moves 4 or 8 bytes");
    Warp& warp = warps[current >> 5];
    const int lane = current & 31;
    memcpy(warp.in[lane], &value, sizeof(T));
    warp.source[lane] = source;
    meet(mask, collective, [collective](Warp& w, uint32_t lanes) {
        for (uint32_t left = lanes; left; left &= left - 1) {
            const int reader = __builtin_ctz(left), read = w.source[reader];
            if (!(lanes >> read & 1))
                fail("%s: lane %d reads lane %d, which does not take part", collective, reader, read);
            memcpy(w.out[reader], w.in[read], sizeof(T));
        }
    });
    T result;
    memcpy(&result, warp.out[lane], sizeof(T));
    return result;
}

// All lanes take away reduce(values of the lanes that take part).
template <typename T, typename Reduce>
static T reduce_lanes(const char* collective, uint32_t mask, T value, Reduce reduce) {
    Warp& warp = warps[current >> 5];
    const int lane = current & 31;
    memcpy(warp.in[lane], &value, sizeof(T));
    meet(mask, collective, [reduce](Warp& w, uint32_t lanes) {
        T total{};
        bool first = true;
        for (uint32_t left = lanes; left; left &= left - 1) {
            T x;
            memcpy(&x, w.in[__builtin_ctz(left)], sizeof(T));
            total = first ? x : reduce(total, x);
            first = false;
        }
        for (uint32_t left = lanes; left; left &= left - 1) memcpy(w.out[__builtin_ctz(left)], &total, sizeof(T));
    });
    T result;
    memcpy(&result, warp.out[lane], sizeof(T));
    return result;
}

static uint32_t ballot(const char* collective, uint32_t mask, bool predicate) {
    const uint32_t mine = predicate ? 1u << (current & 31) : 0;
    return reduce_lanes(collective, mask, mine, [](uint32_t a, uint32_t b) { return a | b; });
}

// The row is read when its lane arrives: a lane that comes too early sees what lies there then.
static void ldmatrix(uint32_t (&r)[4], const void* shared, bool transposed) {
    check_aligned(shared, 16, "ldmatrix");
    check_in_shared(shared, 16, "ldmatrix");
    Warp& warp = warps[current >> 5];
    const int lane = current & 31;
    memcpy(warp.in[lane], shared, 16);
    const char* name = transposed ? "ldmatrix.trans" : "ldmatrix";
    meet(~0u, name, [transposed](Warp& w, uint32_t lanes) {
        if (lanes != ~0u) fail("ldmatrix with lanes %08x: all 32 must take part", lanes);
        uint16_t rows[32][8];
        for (int i = 0; i < 32; i++) memcpy(rows[i], w.in[i], 16);
        for (int l = 0; l < 32; l++) {
            uint16_t fragment[4][2];
            for (int m = 0; m < 4; m++)
                for (int e = 0; e < 2; e++) {
                    const int outer = l >> 2, inner = (l & 3) * 2 + e;
                    fragment[m][e] = transposed ? rows[m * 8 + inner][outer] : rows[m * 8 + outer][inner];
                }
            memcpy(w.out[l], fragment, 16);
        }
    });
    memcpy(r, warp.out[lane], 16);
}

template <typename Element>
static void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    Warp& warp = warps[current >> 5];
    const int lane = current & 31;
    memcpy(warp.in[lane], a, 16);
    memcpy(warp.in[lane] + 16, b, 8);
    meet(~0u, "mma.m16n8k16", [](Warp& w, uint32_t lanes) {
        if (lanes != ~0u) fail("mma with lanes %08x: all 32 must take part", lanes);
        float rows[16][16], columns[16][8], product[16][8] = {};
        for (int l = 0; l < 32; l++) {
            uint16_t half[12];
            memcpy(half, w.in[l], 24);
            const int g = l >> 2, t = (l & 3) * 2;
            for (int e = 0; e < 2; e++) {
                for (int i = 0; i < 4; i++)
                    rows[g + (i & 1) * 8][t + (i >> 1) * 8 + e] = Element::decode(half[2 * i + e]);
                for (int i = 0; i < 2; i++) columns[t + i * 8 + e][g] = Element::decode(half[8 + 2 * i + e]);
            }
        }
        for (int m = 0; m < 16; m++)
            for (int k = 0; k < 16; k++)
                for (int n = 0; n < 8; n++) product[m][n] += rows[m][k] * columns[k][n];
        for (int l = 0; l < 32; l++) {
            const int g = l >> 2, t = (l & 3) * 2;
            const float out[4] = {product[g][t], product[g][t + 1], product[g + 8][t], product[g + 8][t + 1]};
            memcpy(w.out[l], out, 16);
        }
    });
    float product[4];
    memcpy(product, warp.out[lane], 16);
    for (int i = 0; i < 4; i++) d[i] += product[i];
}

}  // namespace emu
