// Numbers of 8 bits, FP8 e4m3 and INT8, and how they become 16-bit floats of exactly their values.
#pragma once
#include "prelude.cuh"

struct fp8 {
    u8 bits;
};
struct int8 {
    u8 bits;
};

template <typename A, typename B> constexpr bool SAME = false;
template <typename A> constexpr bool SAME<A, A> = true;

// a b + c of two pairs of 16-bit floats, rounded once; subnormals are kept.
template <typename T> MR_DEVICE u32 fma_pair(u32 a, u32 b, u32 c) {
#ifdef MR_HOST
    float a0, a1, b0, b1, c0, c1;
    unpack2<T>(a, a0, a1);
    unpack2<T>(b, b0, b1);
    unpack2<T>(c, c0, c1);
    return pack2<T>(a0 * b0 + c0, a1 * b1 + c1);
#else
    u32 d;
    if constexpr (SAME<T, bf16>) {
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    } else {
        asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    }
    return d;
#endif
}

// Four 8-bit numbers -> pairs of T with exactly their values: bytes 0 and 2 in `even`, bytes 1 and 3 in `odd`.
template <typename T, typename N> MR_DEVICE void widen(u32 word, u32& even, u32& odd) {
    constexpr bool WIDE_EXPONENT = SAME<T, bf16>;
    if constexpr (SAME<N, fp8>) {
        // The seven low bits of e4m3, put where T's exponent begins to grow, are the number over a power of two.
        constexpr u32 SIGN = 0x80008000u;
        constexpr u32 MAGNITUDE = WIDE_EXPONENT ? 0x07f007f0u : 0x3f803f80u;
        constexpr u32 POWER = WIDE_EXPONENT ? 0x7b807b80u : 0x5c005c00u;  // 2^120 and 2^8
        constexpr int UP = WIDE_EXPONENT ? 4 : 7;
        even = fma_pair<T>((word << 8 & SIGN) | (word << UP & MAGNITUDE), POWER, SIGN);  // + (-0) changes nothing
        odd = fma_pair<T>((word & SIGN) | (word >> (8 - UP) & MAGNITUDE), POWER, SIGN);
    } else {
        // 7 low bits on top of BASE (128 or 1024, where the last place is worth 1), less BASE, less 128 if negative.
        constexpr u32 BASE = WIDE_EXPONENT ? 0x43004300u : 0x64006400u;
        constexpr u32 ONE = WIDE_EXPONENT ? 0x3f803f80u : 0x3c003c00u;
        constexpr u32 MINUS = 0x80008000u;
        const u32 high = word >> 8;
        even = fma_pair<T>((word & 0x007f007fu) | BASE, ONE, (word & 0x00800080u) | BASE | MINUS);
        odd = fma_pair<T>((high & 0x007f007fu) | BASE, ONE, (high & 0x00800080u) | BASE | MINUS);
    }
}
