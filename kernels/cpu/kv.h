// How the pool keeps an element of a key or value: float32, bfloat16, or 8 bits (integers, or floats e4m3) with a
// float32 scale for each slot and head, where element * scale is the value.
//
// Each kind tells: Element; SCALED; LIMIT, the largest magnitude that it writes; FACTOR, which widened elements lack;
// widen(from), VL elements as floats; narrow(v), the nearest elements, ties to even.
#pragma once

#include "convert.h"

enum KvKind { KV_FLOAT32, KV_BFLOAT16, KV_INT8, KV_FP8 };  // numbered as in cpu_transformer.py

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
        return narrow_to_bytes((vi)(v + magic) - (vi)splat(magic));
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
        return narrow_to_bytes((vi)code);
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
