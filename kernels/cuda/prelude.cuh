// What every kernel starts from: short type names, 16-bit floats, PTX behind small wrappers, reductions.
//
// NVRTC brings no headers, so nothing is included here. MR_HOST is defined where the host shim of the tests executes
// the same source with g++; the wrappers then call their twins in namespace emu, which the shim declares beforehand.
// Targets sm_80 and later. Instruction semantics: PTX ISA 9.0, sections 9.7.9 (cp.async) and 9.7.14 (mma, ldmatrix).
#pragma once

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef int i32;
typedef unsigned long long u64;
typedef long long i64;

#define MR_DEVICE __device__ __forceinline__
#define MR_INF __int_as_float(0x7f800000)
enum : u32 { FULL_WARP = 0xffffffffu };  // the mask of a collective in which all 32 lanes take part

// ---------------------------------------------------------------------------------------------------------------
// 16-bit and 8-bit floats. The structs hold bits alone: arithmetic is float, and conversions are spelled out.

struct bf16 {
    u16 bits;
};
struct f16 {
    u16 bits;
};

MR_DEVICE float to_float(float x) { return x; }
MR_DEVICE float to_float(bf16 x) { return __uint_as_float(static_cast<u32>(x.bits) << 16); }
MR_DEVICE float to_float(f16 x) {
#ifdef MR_HOST
    return emu::half_to_float(x.bits);
#else
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
#endif
}

// Rounds to nearest even; above the largest value comes infinity, and a NaN stays one.
template <typename T> MR_DEVICE T from_float(float x);
template <> MR_DEVICE float from_float<float>(float x) { return x; }
template <> MR_DEVICE bf16 from_float<bf16>(float x) {
#ifdef MR_HOST
    return bf16{emu::float_to_bf16(x)};
#else
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
#endif
}
template <> MR_DEVICE f16 from_float<f16>(float x) {
#ifdef MR_HOST
    return f16{emu::float_to_half(x)};
#else
    f16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
#endif
}

// Two 16-bit floats in a word, the one at the lower address in the lower half.
template <typename T> MR_DEVICE void unpack2(u32 word, float& low, float& high);
template <> MR_DEVICE void unpack2<bf16>(u32 word, float& low, float& high) {
    low = __uint_as_float(word << 16);
    high = __uint_as_float(word & 0xffff0000u);
}
template <> MR_DEVICE void unpack2<f16>(u32 word, float& low, float& high) {
    low = to_float(f16{static_cast<u16>(word)});
    high = to_float(f16{static_cast<u16>(word >> 16)});
}

template <typename T> MR_DEVICE u32 pack2(float low, float high);
template <> MR_DEVICE u32 pack2<bf16>(float low, float high) {
#ifdef MR_HOST
    return emu::float_to_bf16(low) | static_cast<u32>(emu::float_to_bf16(high)) << 16;
#else
    u32 word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
#endif
}
template <> MR_DEVICE u32 pack2<f16>(float low, float high) {
#ifdef MR_HOST
    return emu::float_to_half(low) | static_cast<u32>(emu::float_to_half(high)) << 16;
#else
    u32 word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
#endif
}

// FP8 e4m3 (Micikevicius et al. 2022): bias 7, largest value 448, no infinity, 0x7f and 0xff are NaN.
// Its seven low bits, put at bit 7 of a half, are the same number times 2^-8, subnormals too; only NaN needs care.
MR_DEVICE float e4m3_to_float(u8 x) {
    const u32 magnitude = x & 0x7fu;
    const u16 half_bits = static_cast<u16>((x & 0x80u) << 8 | magnitude << 7);
    const float y = to_float(f16{half_bits}) * 256.0f;
    return magnitude == 0x7fu ? __uint_as_float(0x7fffffffu) : y;
}

// Rounds to nearest even and saturates at 448; a NaN stays one.
MR_DEVICE u8 float_to_e4m3(float x) {
#if !defined(MR_HOST) && __CUDA_ARCH__ >= 890
    u16 pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(x));
    return static_cast<u8>(pair);
#else
    const u32 bits = __float_as_uint(x);
    const u32 sign = bits >> 24 & 0x80u;
    const u32 magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<u8>(sign | 0x7fu);
    if (magnitude >= 0x43e00000u) return static_cast<u8>(sign | 0x7eu);  // 448 and above
    if (magnitude < 0x3c800000u) {  // below 2^-6: steps of 2^-9; adding 2^14 rounds at exactly that bit
        const float shifted = __uint_as_float(magnitude) + 16384.0f;
        return static_cast<u8>(sign | (__float_as_uint(shifted) - 0x46800000u));
    }
    const u32 rounded = magnitude + 0x7ffffu + (magnitude >> 20 & 1u);
    const u32 code = (rounded >> 20) - (120u << 3);  // the exponent's bias goes from 127 to 7
    return static_cast<u8>(sign | (code < 0x7eu ? code : 0x7eu));
#endif
}

// ---------------------------------------------------------------------------------------------------------------
// 16 bytes at a time. The address must be a multiple of 16; the shim checks it.

MR_DEVICE uint4 load16(const void* address) {
#ifdef MR_HOST
    emu::check_aligned(address, 16, "load16");
#endif
    return *static_cast<const uint4*>(address);
}

// For what is read once: keeps it out of L1. Nobody may write it while the kernel runs: .nc goes through a path that
// sees no writes, and the compiler may move or repeat what is not volatile.
MR_DEVICE uint4 load16_streaming(const void* address) {
#ifdef MR_HOST
    return load16(address);
#else
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(address));
    return v;
#endif
}

MR_DEVICE void store16(void* address, uint4 value) {
#ifdef MR_HOST
    emu::check_aligned(address, 16, "store16");
#endif
    *static_cast<uint4*>(address) = value;
}

// A vector of T that fills 16 bytes: 8 elements of bf16 or f16, 4 of float.
template <typename T> constexpr int VEC = 16 / sizeof(T);

template <typename T> MR_DEVICE void unpack16(uint4 v, float (&out)[VEC<T>]) {
    const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if constexpr (sizeof(T) == 4) {
            out[i] = __uint_as_float(words[i]);
        } else {
            unpack2<T>(words[i], out[2 * i], out[2 * i + 1]);
        }
    }
}

template <typename T> MR_DEVICE uint4 pack16(const float (&in)[VEC<T>]) {
    u32 words[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if constexpr (sizeof(T) == 4) {
            words[i] = __float_as_uint(in[i]);
        } else {
            words[i] = pack2<T>(in[2 * i], in[2 * i + 1]);
        }
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

// N elements as floats, N a multiple of VEC<T>, from or to an address that is a multiple of 16.
template <int N, typename T> MR_DEVICE void load_vec(float (&out)[N], const T* from) {
    static_assert(N % VEC<T> == 0, "whole 16-byte vectors");
#pragma unroll
    for (int i = 0; i < N; i += VEC<T>) unpack16<T>(load16(from + i), reinterpret_cast<float(&)[VEC<T>]>(out[i]));
}

template <int N, typename T> MR_DEVICE void load_streaming(float (&out)[N], const T* from) {
    static_assert(N % VEC<T> == 0, "whole 16-byte vectors");
#pragma unroll
    for (int i = 0; i < N; i += VEC<T>)
        unpack16<T>(load16_streaming(from + i), reinterpret_cast<float(&)[VEC<T>]>(out[i]));
}

template <int N, typename T> MR_DEVICE void store_vec(T* to, const float (&in)[N]) {
    static_assert(N % VEC<T> == 0, "whole 16-byte vectors");
#pragma unroll
    for (int i = 0; i < N; i += VEC<T>) store16(to + i, pack16<T>(reinterpret_cast<const float(&)[VEC<T>]>(in[i])));
}

// ---------------------------------------------------------------------------------------------------------------
// Asynchronous copies global -> shared, in groups per thread (PTX cp.async, bypassing L1).

// Copies 16 bytes, or writes 16 zero bytes where not valid (`global` is then not read, but must be aligned).
MR_DEVICE void cp_async16(void* shared, const void* global, bool valid) {
#ifdef MR_HOST
    emu::cp_async16(shared, global, valid);
#else
    const u32 address = static_cast<u32>(__cvta_generic_to_shared(shared));
    const u32 bytes = valid ? 16u : 0u;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes) : "memory");
#endif
}

MR_DEVICE void cp_async_commit() {
#ifdef MR_HOST
    emu::cp_async_commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most N of this thread's latest groups are still under way. Other threads' copies need a barrier.
template <int N> MR_DEVICE void cp_async_wait() {
#ifdef MR_HOST
    emu::cp_async_wait(N);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// ---------------------------------------------------------------------------------------------------------------
// Tensor cores. Fragments of m16n8k16, with g = lane / 4 and t = lane % 4 (two 16-bit elements in a word):
//   a[0] (g, 2t..)  a[1] (g + 8, 2t..)  a[2] (g, 2t + 8..)  a[3] (g + 8, 2t + 8..)     A is 16 x 16, rows
//   b[0] (2t.., g)  b[1] (2t + 8.., g)                                                 B is 16 x 8, columns
//   d[0] (g, 2t)    d[1] (g, 2t + 1)    d[2] (g + 8, 2t)        d[3] (g + 8, 2t + 1)   D is 16 x 8, float

// Four 8 x 8 matrices of 16-bit elements: lane 8 i + j gives the address of row j of matrix i, r[i] is its fragment.
MR_DEVICE void ldmatrix_x4(u32 (&r)[4], const void* shared) {
#ifdef MR_HOST
    emu::ldmatrix(r, shared, false);
#else
    const u32 address = static_cast<u32>(__cvta_generic_to_shared(shared));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
#endif
}

MR_DEVICE void ldmatrix_x4_trans(u32 (&r)[4], const void* shared) {
#ifdef MR_HOST
    emu::ldmatrix(r, shared, true);
#else
    const u32 address = static_cast<u32>(__cvta_generic_to_shared(shared));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
#endif
}

// d += A B with float accumulation.
template <typename T> MR_DEVICE void mma_m16n8k16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]);
template <> MR_DEVICE void mma_m16n8k16<bf16>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#ifdef MR_HOST
    emu::mma_m16n8k16<emu::Bf16>(d, a, b);
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
template <> MR_DEVICE void mma_m16n8k16<f16>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#ifdef MR_HOST
    emu::mma_m16n8k16<emu::F16>(d, a, b);
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// ---------------------------------------------------------------------------------------------------------------
// Arithmetic and reductions.

// 2^x to about 2 ulp, a subnormal result becoming zero; 2^-inf = 0.
MR_DEVICE float exp2_approx(float x) {
#ifdef MR_HOST
    return exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// Over the lowest WIDTH lanes' peers (an aligned group of WIDTH lanes); all 32 lanes take part, all get the result.
// The trees are fixed, so a result does not depend on timing.
template <int WIDTH = 32> MR_DEVICE float warp_sum(float x) {
#pragma unroll
    for (int step = WIDTH / 2; step > 0; step /= 2) x += __shfl_xor_sync(FULL_WARP, x, step);
    return x;
}

template <int WIDTH = 32> MR_DEVICE float warp_max(float x) {
#pragma unroll
    for (int step = WIDTH / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, step));
    return x;
}

// Over a block of THREADS (a power of two of at least 32, all of which call), result in all threads.
// The first barrier lets the readers of the call before finish.
template <int THREADS> MR_DEVICE float block_sum(float x) {
    constexpr int WARPS = THREADS / 32;
    static_assert(THREADS % 32 == 0 && (WARPS & (WARPS - 1)) == 0 && WARPS <= 32, "a power of two of warps");
    x = warp_sum(x);
    if constexpr (WARPS > 1) {
        __shared__ float partial[WARPS];
        __syncthreads();
        if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
        __syncthreads();
        x = warp_sum<WARPS>(partial[threadIdx.x % WARPS]);
    }
    return x;
}

template <int THREADS> MR_DEVICE float block_max(float x) {
    constexpr int WARPS = THREADS / 32;
    static_assert(THREADS % 32 == 0 && (WARPS & (WARPS - 1)) == 0 && WARPS <= 32, "a power of two of warps");
    x = warp_max(x);
    if constexpr (WARPS > 1) {
        __shared__ float partial[WARPS];
        __syncthreads();
        if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
        __syncthreads();
        x = warp_max<WARPS>(partial[threadIdx.x % WARPS]);
    }
    return x;
}
