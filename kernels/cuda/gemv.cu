// y = x W^T + bias for 1 to 8 rows of x, with 8-bit or 4-bit weights: the matrix products of decode at a small batch;
// and the same weights as rows of 16-bit floats, for larger batches and for a table.
//
// The weights stand on the 16-row side of mma.m16n8k16 and the rows of x on the 8-column side: one instruction sequence
// for every batch of up to 8, float accumulation, and a row's result does not depend on the other rows. A thread block
// owns 16 rows of W; its eight warps share out the columns, tile by tile, and add up in a fixed order.
//
// Layout (made by cuda_gemv_pack.pack): [n_tiles][k_tiles][32 lanes][16 bytes]. A tile is 16 rows by 32 columns of 8
// bits or 64 of 4; a lane's 16 bytes are what it feeds to 2 or 4 mma. Columns are permuted inside 32 so that a lane's
// part of x is 16 neighbouring bytes: lane (g, t) holds columns 8 t .. 8 t + 7 of rows g and g + 8, the order of the
// mma's sum over columns being free. With groups of 16 (NARROW) a mma has the columns of one group, and a lane 4 t .. 4
// t + 3 of each. Words hold pairs of weights in both halves, so that one `and` + `or` makes two 16-bit floats: for 4
// bits 0x4300 | q is the bfloat16 128 + q (0x6400 | q the half 1024 + q), and one subtraction leaves the exact integer.
//
// A weight is scale * (v - zero), v the integer or what a codebook of 16 gives for it. Scales of groups along the
// columns multiply the float sums of the group's mma, not the weights, so that v stays exact; and so do zero points,
// which may have fractions: a second mma with ones in place of weights gives the sum of x, and sum(v x) - zero * sum(x)
// is what the scale multiplies. Where all zero points are CENTER, which is subtracted from v beforehand, there is no
// second mma.
//
// Floor: bytes of weights and scales / bandwidth; x lies in L1. Each lane keeps three or four 16-byte loads under way
// and refills one as it uses it: with 24 warps on an SM that is 36 or 48 KiB in flight, where about 32 KiB cover the
// latency of H100's memory at full bandwidth. Work per 512 bytes of 4 bits (a warp's tile): about 75 instructions, 130 with a
// codebook, of the 150 issue slots that the four schedulers have while the memory delivers them.
#include "gemv.cuh"

constexpr i32 BITS = MR_BITS;      // 4 or 8
constexpr i32 GROUPS = MR_GROUPS;  // scales per tile and row: 1, 2 or 4; 0: one scale per row of W, applied at the end
constexpr bool ZEROS = MR_ZEROS != 0;
constexpr bool CODEBOOK = MR_CODEBOOK != 0;
constexpr i32 TILE_K = BITS == 4 ? 64 : 32;
constexpr bool NARROW = GROUPS * 16 == TILE_K;
constexpr i32 SCALES = GROUPS == 0 ? 1 : GROUPS;
constexpr i32 SCALE_WORDS = SCALES * (ZEROS ? 2 : 1);  // of a lane and tile
constexpr i32 MIN_CTAS = SCALE_WORDS == 8 ? 2 : 3;  // on an SM, that the registers must allow
constexpr i32 IN_FLIGHT = SCALE_WORDS > (BITS == 4 ? 1 : 2) ? 3 : 4;  // tiles; more do not fit 80 registers
constexpr float CENTER = CODEBOOK ? 0.0f : BITS == 4 ? 8.0f : 128.0f;
static_assert(!CODEBOOK || (BITS == 4 && !ZEROS && !NARROW), "what codebooks come with");
static_assert(GROUPS != 0 || (BITS == 8 && !ZEROS), "one scale per row comes with 8 bits and without zero points");

// A quantised matrix [n, k].
struct Matrix {
    const uint4* weight;       // [n_tiles, k_tiles, 32]
    const u32* group_scales;   // [n_tiles, num_groups / GROUPS, 8, GROUPS, 1 or 2]: scale and, with ZEROS, zero point,
                               // both as float16 of rows g (low half) and g + 8
    const float* row_scales;   // [n], where GROUPS is 0
    u32 codebook[4];           // 16 signed bytes
    i32 n;
    i32 k;  // a multiple of 8; with NARROW of 16
    i32 k_tiles;
    i32 num_groups;
    i32 group_shift;  // tile >> group_shift is its group, with one group per tile
};

struct GemvParams {
    Matrix w;
    const MR_T* x;     // [m, x_stride]
    const MR_T* bias;  // [n] or null
    MR_T* y;           // [m, y_stride]
    float* partial;    // [splits, n_tiles, 8 * 16], where splits > 1
    u32* arrivals;     // [n_tiles], zero before and after
    i64 x_stride;
    i64 y_stride;
    i32 m;
    i32 split_tiles;  // k_tiles of one split
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
    static constexpr u32 ONE = 0x3f803f80u;
};
template <> struct Magic<f16> {
    static constexpr u32 BASE = 0x64006400u;  // 1024
    static constexpr u32 ONE = 0x3c003c00u;
};

// Four pairs of signed bytes in two words: bytes 0 and 2 are a pair of row g, bytes 1 and 3 one of row g + 8.
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

// Four bytes of the codebook for the four nibbles in the low half.
MR_DEVICE u32 look_up4(const u32 (&codebook)[4], u32 nibbles) {
    const u32 place = nibbles & 0x7777u;
    const u32 low = __byte_perm(codebook[0], codebook[1], place), high = __byte_perm(codebook[2], codebook[3], place);
    return __byte_perm(low, high, 0x3210u | (nibbles & 0x8888u) >> 1);
}

// The four registers of the i-th mma of a 32-column half: rows g, g + 8, and again for the next columns; v - CENTER.
MR_DEVICE void widen(u32 (&a)[4], const Matrix& w, const u32 (&words)[4], i32 half, i32 i) {
    if constexpr (CODEBOOK) {
        // The nibbles of the low half are in the order of the bytes of widen8's first word, the others of its second.
        const u32 word = words[2 * half + i];
        widen8(a, look_up4(w.codebook, word), look_up4(w.codebook, word >> 16));
    } else if constexpr (BITS == 4) {
        // Pair j in nibble j of both halves; even pairs are of row g, odd ones of row g + 8.
#pragma unroll
        for (i32 j = 0; j < 4; j++)
            a[j] = subtract2<MR_T>((words[2 * half + i] >> 4 * j & 0x000f000fu) | Magic<MR_T>::BASE,
                                   Magic<MR_T>::BASE + 0x00080008u);
    } else {
        widen8(a, words[2 * i], words[2 * i + 1]);
    }
}

// What a lane needs of one tile beside x.
struct Tile {
    uint4 weight;
    u32 scales[SCALE_WORDS];
};

// This lane's part of row tile `n_tile` of the weights.
struct Source {
    const uint4* weight;
    const u32* scales;

    MR_DEVICE Source(const Matrix& w, i64 n_tile, i32 lane)
        : weight(w.weight + n_tile * w.k_tiles * 32 + lane),
          scales(w.group_scales + (n_tile * w.num_groups / SCALES * 8 + lane / 4) * SCALE_WORDS) {}
};

MR_DEVICE void load_tile(Tile& tile, const Source& from, i32 k_tile, i32 group_shift) {
    tile.weight = load16_streaming(from.weight + k_tile * 32);
    if constexpr (GROUPS == 0) return;
    const u32* scales = from.scales + (GROUPS == 1 ? k_tile >> group_shift : k_tile) * 8 * SCALE_WORDS;
    if constexpr (SCALE_WORDS == 1) {
        tile.scales[0] = scales[0];
    } else if constexpr (SCALE_WORDS == 2) {
        const uint2 both = *reinterpret_cast<const uint2*>(scales);
        tile.scales[0] = both.x;
        tile.scales[1] = both.y;
    } else {
#pragma unroll
        for (i32 i = 0; i < SCALE_WORDS; i += 4) {
            const uint4 four = load16(scales + i);
            tile.scales[i] = four.x;
            tile.scales[i + 1] = four.y;
            tile.scales[i + 2] = four.z;
            tile.scales[i + 3] = four.w;
        }
    }
}

// Scale and zero point (less CENTER) of a group, for rows g and g + 8.
struct GroupScale {
    float scale[2];
    float zero[2];

    MR_DEVICE GroupScale(const Tile& tile, i32 group) {
        zero[0] = zero[1] = 0.0f;
        unpack2<f16>(tile.scales[group * (ZEROS ? 2 : 1)], scale[0], scale[1]);
        if constexpr (ZEROS) {
            unpack2<f16>(tile.scales[group * 2 + 1], zero[0], zero[1]);
            zero[0] -= CENTER;
            zero[1] -= CENTER;
        }
    }
};

// A group's sums: [0..1] are row g of W and rows 2 t, 2 t + 1 of x, [2..3] the same for row g + 8; and the sums of x.
struct Part {
    float of_weights[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    float of_ones[4] = {0.0f, 0.0f, 0.0f, 0.0f};

    MR_DEVICE void add(const u32 (&a)[4], const u32 (&b)[2]) {
        mma_m16n8k16<MR_T>(of_weights, a, b);
        if constexpr (ZEROS) {
            constexpr u32 ONE = Magic<MR_T>::ONE;
            const u32 ones[4] = {ONE, ONE, ONE, ONE};
            mma_m16n8k16<MR_T>(of_ones, ones, b);
        }
    }

    MR_DEVICE void scale_into(float (&sums)[4], const Tile& tile, i32 group) const {
        const GroupScale by(tile, group);
#pragma unroll
        for (i32 i = 0; i < 4; i++) {
            const float product = ZEROS ? of_weights[i] - by.zero[i / 2] * of_ones[i % 2] : of_weights[i];
            sums[i] = fmaf(product, by.scale[i / 2], sums[i]);
        }
    }
};

// x: the lane's row, from its first column on; `columns` are those of the row, less that first one; none for a lane
// whose row does not exist.
MR_DEVICE void load_x(u32 (&pairs)[4], const MR_T* x, i32 columns, i32 column) {
    if constexpr (NARROW) {
#pragma unroll
        for (i32 i = 0; i < 2; i++) {
            uint2 v = make_uint2(0u, 0u);
            if (column + 16 * i < columns) v = *reinterpret_cast<const uint2*>(x + column + 16 * i);
            pairs[2 * i] = v.x;
            pairs[2 * i + 1] = v.y;
        }
    } else {
        uint4 v = make_uint4(0u, 0u, 0u, 0u);
        if (column < columns) v = load16(x + column);
        pairs[0] = v.x;
        pairs[1] = v.y;
        pairs[2] = v.z;
        pairs[3] = v.w;
    }
}

MR_DEVICE void multiply_tile(float (&sums)[4], const Matrix& w, const Tile& tile, const MR_T* x, i32 columns,
                             i32 k_tile) {
    const u32 words[4] = {tile.weight.x, tile.weight.y, tile.weight.z, tile.weight.w};
    Part part;
#pragma unroll
    for (i32 half = 0; half < TILE_K / 32; half++) {
        u32 pairs[4];
        load_x(pairs, x, columns, k_tile * TILE_K + half * 32);
#pragma unroll
        for (i32 i = 0; i < 2; i++) {
            u32 a[4];
            widen(a, w, words, half, i);
            const u32 b[2] = {pairs[2 * i], pairs[2 * i + 1]};
            if constexpr (GROUPS == 0) {
                mma_m16n8k16<MR_T>(sums, a, b);
            } else {
                part.add(a, b);
            }
            if constexpr (NARROW) {
                part.scale_into(sums, tile, 2 * half + i);
                part = Part();
            }
        }
        if constexpr (GROUPS == 2 && !NARROW) {
            part.scale_into(sums, tile, half);
            part = Part();
        }
    }
    if constexpr (GROUPS == 1) part.scale_into(sums, tile, 0);
}

// Grid: (n_tiles, splits).
extern "C" __global__ void __launch_bounds__(GEMV_THREADS, MIN_CTAS) mr_gemv(GemvParams p) {
    const i32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const i32 begin = blockIdx.y * p.split_tiles + warp;
    const i32 end = min(static_cast<i32>(blockIdx.y + 1) * p.split_tiles, p.w.k_tiles);
    const Source from(p.w, blockIdx.x, lane);
    const i32 first_column = lane % 4 * (NARROW ? 4 : 8);
    const MR_T* x = p.x + lane / 4 * p.x_stride + first_column;
    const i32 columns = lane / 4 < p.m ? p.w.k - first_column : 0;

    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    Tile ring[IN_FLIGHT];
#pragma unroll
    for (i32 i = 0; i < IN_FLIGHT; i++)
        if (begin + i * GEMV_WARPS < end) load_tile(ring[i], from, begin + i * GEMV_WARPS, p.w.group_shift);
    for (i32 first = begin; first < end; first += IN_FLIGHT * GEMV_WARPS) {
#pragma unroll
        for (i32 i = 0; i < IN_FLIGHT; i++) {
            const i32 k_tile = first + i * GEMV_WARPS, ahead = k_tile + IN_FLIGHT * GEMV_WARPS;
            if (k_tile >= end) break;
            const Tile tile = ring[i];
            if (ahead < end) load_tile(ring[i], from, ahead, p.w.group_shift);
            multiply_tile(sums, p.w, tile, x, columns, k_tile);
        }
    }

    float sum;
    if (!add_up(sums, p.partial, p.arrivals, sum)) return;
    const i32 column = blockIdx.x * TILE_N + threadIdx.x % TILE_N, row = threadIdx.x / TILE_N;
    if (row >= p.m || column >= p.w.n) return;
    if constexpr (GROUPS == 0) sum *= p.w.row_scales[column];
    if (p.bias != nullptr) sum += to_float(p.bias[column]);
    p.y[row * p.y_stride + column] = from_float<MR_T>(sum);
}

struct DequantiseParams {
    Matrix w;
    const i64* tokens;  // [num_rows], rows of W; null: the rows from first_tile * 16 on
    MR_T* out;          // [num_rows, k]
    i32 num_rows;
    i32 first_tile;
};

// Rows of W as MR_T. Grid: (row tiles or tokens, k_tiles / 8): a warp has one tile, and the lanes of a token's row
// that one.
extern "C" __global__ void __launch_bounds__(GEMV_THREADS) mr_dequantise(DequantiseParams p) {
    const i32 lane = threadIdx.x % 32, g = lane / 4;
    const i32 k_tile = blockIdx.y * GEMV_WARPS + threadIdx.x / 32;
    if (k_tile >= p.w.k_tiles) return;
    i64 n_tile = p.first_tile + static_cast<i64>(blockIdx.x);
    i32 place = -1;  // of a token's row in its tile
    if (p.tokens != nullptr) {
        const i64 token = p.tokens[blockIdx.x];
        if (token < 0 || token >= p.w.n) return;
        n_tile = token / TILE_N;
        place = static_cast<i32>(token % TILE_N);
        if (g != place % 8) return;
    }
    Tile tile;
    load_tile(tile, Source(p.w, n_tile, lane), k_tile, p.w.group_shift);
    const u32 words[4] = {tile.weight.x, tile.weight.y, tile.weight.z, tile.weight.w};
#pragma unroll
    for (i32 half = 0; half < TILE_K / 32; half++) {
        u32 pairs[2][4];  // of rows g and g + 8, in the order of their columns
#pragma unroll
        for (i32 i = 0; i < 2; i++) {
            u32 a[4];
            widen(a, p.w, words, half, i);
#pragma unroll
            for (i32 j = 0; j < 4; j++) {
                const i32 upper = j % 2;
                const i64 row = n_tile * TILE_N + g + 8 * upper;
                float low, high, scale, zero = 0.0f;
                unpack2<MR_T>(a[j], low, high);
                if constexpr (GROUPS == 0) {
                    scale = row < p.w.n ? p.w.row_scales[row] : 0.0f;
                } else {
                    const GroupScale by(tile, NARROW ? 2 * half + i : GROUPS == 2 ? half : 0);
                    scale = by.scale[upper];
                    zero = by.zero[upper];
                }
                pairs[upper][2 * i + j / 2] = pack2<MR_T>((low - zero) * scale, (high - zero) * scale);
            }
        }
        const i32 column = k_tile * TILE_K + half * 32 + lane % 4 * (NARROW ? 4 : 8);
#pragma unroll
        for (i32 upper = 0; upper < 2; upper++) {
            const i64 row = place >= 0 ? blockIdx.x : static_cast<i64>(blockIdx.x) * TILE_N + g + 8 * upper;
            if (row >= p.num_rows || (place >= 0 && place / 8 != upper)) continue;
            MR_T* to = p.out + row * p.w.k + column;
            const u32* four = pairs[upper];
            if constexpr (NARROW) {
                if (column < p.w.k) *reinterpret_cast<uint2*>(to) = make_uint2(four[0], four[1]);
                if (column + 16 < p.w.k) *reinterpret_cast<uint2*>(to + 16) = make_uint2(four[2], four[3]);
            } else {
                if (column < p.w.k) store16(to, make_uint4(four[0], four[1], four[2], four[3]));
            }
        }
    }
}
