// y = x W^T + bias for 1 to 8 rows of x, with int8 or int4 weights: the matrix products of decode at a small batch.
//
// The weights stand on the 16-row side of mma.m16n8k16 and the rows of x on the 8-column side: one instruction sequence
// for every batch of up to 8, float accumulation, and a row's result does not depend on the other rows. A thread block
// owns 16 rows of W; its eight warps share out the columns, tile by tile, and add up in a fixed order.
//
// Layout (made by cuda_gemv.pack): [n_tiles][k_tiles][32 lanes][16 bytes]. A tile is 16 rows by 32 columns of int8 or 64
// of int4; a lane's 16 bytes are what it feeds to 2 or 4 mma. Columns are permuted inside 32 so that a lane's part of x
// is 16 neighbouring bytes: lane (g, t) holds columns 8 t .. 8 t + 7 of rows g and g + 8, the order of the mma's sum over
// columns being free. Words hold pairs of weights in both halves, so that one `and` + `or` makes two 16-bit floats:
// for int4 0x4300 | q is the bfloat16 128 + q (0x6400 | q the half 1024 + q), and one subtraction of 128 + zero point
// leaves the exact integer.
//
// Scales of groups along the columns multiply the float sums of the group's mma, not the weights: integers stay exact.
//
// Floor: bytes of weights and scales / bandwidth; x lies in L1. Each lane keeps four 16-byte loads under way and refills
// one as it uses it: with 24 warps on an SM that is 48 KiB in flight, where about 32 KiB cover the latency of H100's
// memory at full bandwidth. Work per 512 bytes of int4 (a warp's tile): about 75 instructions of the 150 issue slots that
// the four schedulers have while the memory delivers them.
#include "prelude.cuh"

#ifndef MR_ZEROS
#define MR_ZEROS 0
#endif

constexpr i32 BITS = MR_BITS;      // 4 or 8
constexpr i32 GROUPS = MR_GROUPS;  // scales per tile and row; 0: one scale per row of W, applied at the end
constexpr bool ZEROS = MR_ZEROS != 0;
constexpr i32 GEMV_THREADS = 256;
constexpr i32 GEMV_WARPS = GEMV_THREADS / 32;
constexpr i32 TILE_N = 16;
constexpr i32 TILE_K = BITS == 4 ? 64 : 32;
constexpr i32 MAX_ROWS = 8;
constexpr i32 IN_FLIGHT = GROUPS == 2 ? 3 : 4;  // with two scales and zero points a tile, four do not fit 80 registers
constexpr i32 SCALES = GROUPS == 0 ? 1 : GROUPS;

struct GemvParams {
    const MR_T* x;              // [m, x_stride]
    const uint4* weight;        // [n_tiles, k_tiles, 32]
    const u32* group_scales;    // [n_tiles, num_groups, 8], MR_T of rows g (low half) and g + 8; with two groups per
                                // tile [n_tiles, num_groups / 2, 8, 2]
    const u16* zeros;           // in the same order, bytes of rows g (low) and g + 8
    const float* row_scales;    // [n]
    const MR_T* bias;           // [n] or null
    MR_T* y;                    // [m, y_stride]
    float* partial;             // [splits, n_tiles, 8 * 16], where splits > 1
    u32* arrivals;              // [n_tiles], zero before and after
    i64 x_stride;
    i64 y_stride;
    i32 m;
    i32 n;
    i32 k;  // a multiple of 8
    i32 k_tiles;
    i32 split_tiles;  // k_tiles of one split
    i32 num_groups;
    i32 group_shift;  // tile >> group_shift is its group, with one group per tile
};

// a - b of two pairs; exact for the small integers here.
template <typename T> MR_DEVICE u32 subtract2(u32 a, u32 b);
template <> MR_DEVICE u32 subtract2<bf16>(u32 a, u32 b) {
#ifdef MR_HOST
    float a0, a1, b0, b1;
    unpack2<bf16>(a, a0, a1);
    unpack2<bf16>(b, b0, b1);
    return pack2<bf16>(a0 - b0, a1 - b1);
#else
    u32 d;  // sub.bf16x2 exists from sm_90 on, fma from sm_80
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(b), "r"(0xbf80bf80u), "r"(a));
    return d;
#endif
}
template <> MR_DEVICE u32 subtract2<f16>(u32 a, u32 b) {
#ifdef MR_HOST
    float a0, a1, b0, b1;
    unpack2<f16>(a, a0, a1);
    unpack2<f16>(b, b0, b1);
    return pack2<f16>(a0 - b0, a1 - b1);
#else
    u32 d;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
#endif
}

template <typename T> struct Magic;
template <> struct Magic<bf16> {
    static constexpr u32 BASE = 0x43004300u;  // 128, whose last mantissa bits count ones
};
template <> struct Magic<f16> {
    static constexpr u32 BASE = 0x64006400u;  // 1024
};

// Four pairs of int4 weights: pair i in nibble i of both halves; even pairs are of row g, odd ones of row g + 8.
MR_DEVICE void widen4(u32 (&a)[4], u32 word, const u32 (&offset)[2]) {
#pragma unroll
    for (i32 i = 0; i < 4; i++)
        a[i] = subtract2<MR_T>((word >> 4 * i & 0x000f000fu) | Magic<MR_T>::BASE, offset[i % 2]);
}

// Four pairs of int8 weights in two words: bytes 0 and 2 are a pair of row g, bytes 1 and 3 one of row g + 8.
template <typename T> MR_DEVICE u32 widen8_pair(u32 word);
template <> MR_DEVICE u32 widen8_pair<bf16>(u32 word) {
    // Seven mantissa bits hold the low seven bits; the sign bit, or'ed into 128.0, makes it 256.0.
    return subtract2<bf16>((word & 0x007f007fu) | 0x43004300u, (word & 0x00800080u) | 0x43004300u);
}
template <> MR_DEVICE u32 widen8_pair<f16>(u32 word) {
    return subtract2<f16>((word & 0x00ff00ffu) ^ 0x64806480u, 0x64806480u);  // 1024 + 128 + value, less 1152
}
MR_DEVICE void widen8(u32 (&a)[4], u32 first, u32 second) {
    a[0] = widen8_pair<MR_T>(first);
    a[1] = widen8_pair<MR_T>(first >> 8);
    a[2] = widen8_pair<MR_T>(second);
    a[3] = widen8_pair<MR_T>(second >> 8);
}

// What a lane needs of one tile beside x.
struct Tile {
    uint4 weight;
    u32 scales[SCALES];
    u32 zeros;  // a byte each: rows g and g + 8 of the first group, then of the second
};

// Where this lane's parts of its 16 rows begin.
struct Sources {
    const uint4* weight;
    const u32* scales;
    const u16* zeros;
    const MR_T* x;
};

MR_DEVICE void load_tile(Tile& tile, const Sources& from, i32 k_tile, i32 group_shift) {
    tile.weight = load16_streaming(from.weight + k_tile * 32);
    if constexpr (GROUPS == 1) {
        const i32 group = k_tile >> group_shift;
        tile.scales[0] = from.scales[group * 8];
        if constexpr (ZEROS) tile.zeros = from.zeros[group * 8];
    } else if constexpr (GROUPS == 2) {
        const uint2 both = *reinterpret_cast<const uint2*>(from.scales + k_tile * 16);
        tile.scales[0] = both.x;
        tile.scales[1] = both.y;
        if constexpr (ZEROS) tile.zeros = *reinterpret_cast<const u32*>(from.zeros + k_tile * 16);
    }
}

// sums[0..1] are row g of W and rows 2 t, 2 t + 1 of x; sums[2..3] the same for row g + 8.
MR_DEVICE void scale_into(float (&sums)[4], const float (&part)[4], u32 scales) {
    float low, high;
    unpack2<MR_T>(scales, low, high);
    sums[0] = fmaf(part[0], low, sums[0]);
    sums[1] = fmaf(part[1], low, sums[1]);
    sums[2] = fmaf(part[2], high, sums[2]);
    sums[3] = fmaf(part[3], high, sums[3]);
}

// columns: those of x, less this lane's place among them; none for a lane whose row of x does not exist.
MR_DEVICE void multiply_tile(float (&sums)[4], const Tile& tile, const MR_T* x, i32 columns, i32 k_tile) {
    const u32 words[4] = {tile.weight.x, tile.weight.y, tile.weight.z, tile.weight.w};
    float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (i32 half = 0; half < TILE_K / 32; half++) {
        const i32 column = k_tile * TILE_K + half * 32;
        uint4 v = make_uint4(0u, 0u, 0u, 0u);
        if (column < columns) v = load16(x + column);
        const u32 pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (i32 i = 0; i < 2; i++) {
            u32 a[4];
            if constexpr (BITS == 4) {
                u32 offset[2] = {Magic<MR_T>::BASE + 0x00080008u, Magic<MR_T>::BASE + 0x00080008u};
                if constexpr (ZEROS) {
                    const u32 zeros = tile.zeros >> (GROUPS == 2 ? 16 * half : 0);
                    offset[0] = Magic<MR_T>::BASE + (zeros & 0xffu) * 0x00010001u;
                    offset[1] = Magic<MR_T>::BASE + (zeros >> 8 & 0xffu) * 0x00010001u;
                }
                widen4(a, words[2 * half + i], offset);
            } else {
                widen8(a, words[2 * i], words[2 * i + 1]);
            }
            const u32 b[2] = {pairs[2 * i], pairs[2 * i + 1]};
            if constexpr (GROUPS == 0) {
                mma_m16n8k16<MR_T>(sums, a, b);
            } else {
                mma_m16n8k16<MR_T>(part, a, b);
            }
        }
        if constexpr (GROUPS == 2) {
            scale_into(sums, part, tile.scales[half]);
            part[0] = part[1] = part[2] = part[3] = 0.0f;
        }
    }
    if constexpr (GROUPS == 1) scale_into(sums, part, tile.scales[0]);
}

// The other splits' sums, in the order of the splits; true in the one thread block that arrives last.
MR_DEVICE bool combine_splits(const GemvParams& p, float& sum) {
    __shared__ bool is_last;
    const i64 n_tiles = gridDim.x, stride = TILE_N * MAX_ROWS;
    if (threadIdx.x < TILE_N * MAX_ROWS) {
        p.partial[(blockIdx.y * n_tiles + blockIdx.x) * stride + threadIdx.x] = sum;
        __threadfence();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        is_last = atomicAdd(&p.arrivals[blockIdx.x], 1u) == gridDim.y - 1;
        if (is_last) p.arrivals[blockIdx.x] = 0u;
    }
    __syncthreads();
    if (!is_last) return false;
    __threadfence();
    if (threadIdx.x < TILE_N * MAX_ROWS) {
        sum = 0.0f;
        for (u32 split = 0; split < gridDim.y; split++)
            sum += __ldcg(&p.partial[(split * n_tiles + blockIdx.x) * stride + threadIdx.x]);
    }
    return true;
}

// Grid: (n_tiles, splits).
extern "C" __global__ void __launch_bounds__(GEMV_THREADS, 3) mr_gemv(GemvParams p) {
    __shared__ float of_warp[GEMV_WARPS][MAX_ROWS][TILE_N + 1];
    const i32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const i32 begin = blockIdx.y * p.split_tiles + warp;
    const i32 end = min(static_cast<i32>(blockIdx.y + 1) * p.split_tiles, p.k_tiles);
    const i64 group_base = static_cast<i64>(blockIdx.x) * p.num_groups * 8 + lane / 4 * SCALES;
    const Sources from{p.weight + static_cast<i64>(blockIdx.x) * p.k_tiles * 32 + lane, p.group_scales + group_base,
                       p.zeros + group_base, p.x + lane / 4 * p.x_stride + lane % 4 * 8};
    const i32 columns = lane / 4 < p.m ? p.k - lane % 4 * 8 : 0;

    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    Tile ring[IN_FLIGHT];
#pragma unroll
    for (i32 i = 0; i < IN_FLIGHT; i++)
        if (begin + i * GEMV_WARPS < end) load_tile(ring[i], from, begin + i * GEMV_WARPS, p.group_shift);
    for (i32 first = begin; first < end; first += IN_FLIGHT * GEMV_WARPS) {
#pragma unroll
        for (i32 i = 0; i < IN_FLIGHT; i++) {
            const i32 k_tile = first + i * GEMV_WARPS, ahead = k_tile + IN_FLIGHT * GEMV_WARPS;
            if (k_tile >= end) break;
            const Tile tile = ring[i];
            if (ahead < end) load_tile(ring[i], from, ahead, p.group_shift);
            multiply_tile(sums, tile, from.x, columns, k_tile);
        }
    }

    const i32 g = lane / 4, row = lane % 4 * 2;
    of_warp[warp][row][g] = sums[0];
    of_warp[warp][row + 1][g] = sums[1];
    of_warp[warp][row][g + 8] = sums[2];
    of_warp[warp][row + 1][g + 8] = sums[3];
    __syncthreads();
    const i32 place = threadIdx.x % TILE_N, out_row = threadIdx.x / TILE_N;
    float sum = 0.0f;
    if (threadIdx.x < TILE_N * MAX_ROWS) {
#pragma unroll
        for (i32 i = 0; i < GEMV_WARPS; i++) sum += of_warp[i][out_row][place];
    }
    if (gridDim.y > 1 && !combine_splits(p, sum)) return;
    const i32 column = blockIdx.x * TILE_N + place;
    if (out_row >= p.m || column >= p.n) return;
    if constexpr (GROUPS == 0) sum *= p.row_scales[column];
    if (p.bias != nullptr) sum += to_float(p.bias[column]);
    p.y[out_row * p.y_stride + column] = from_float<MR_T>(sum);
}
