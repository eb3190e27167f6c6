// y = x W^T + bias for 1 to 8 rows of x, where W is 8-bit numbers that lie row by row, as torch's products of 8 bits read
// them too; and the same weights as rows of 16-bit floats, for products of larger batches and for a table.
//
// MR_T       bf16 or f16, of x and y
// MR_CODE    fp8 (e4m3) or int8
// MR_GROUPS  0: one scale for each row of W, applied at the end; 1: one for each group of columns
//
// As in gemv.cu the weights stand on the 16-row side of mma.m16n8k16 and eight warps share out the columns. A warp's tile
// is 16 rows by 64 columns: lane (g, t) loads columns 16 t .. 16 t + 15 of rows g and g + 8, so that four lanes read 64
// neighbouring bytes and the block's warps 512. The i-th of its four mma has the i-th words of both; a word widens to the
// pairs (0, 2) and (1, 3) of its columns, and x is brought into that order. Widened numbers are exact, sums are float;
// with groups a tile lies in one, and its sums are scaled before they are added up.
//
// Floor: bytes of weights / bandwidth. Each lane keeps IN_FLIGHT tiles, of two 16-byte loads each, under way: with 24
// warps on an SM that is 48 KiB. Work per kilobyte of weights: about 120 instructions of the 300 that fit.
#include "eight_bits.cuh"
#include "gemv.cuh"

constexpr bool GROUPS = MR_GROUPS != 0;
constexpr i32 TILE_K = 64;
constexpr i32 IN_FLIGHT = 2;

// A matrix [n, k].
struct Matrix {
    const u8* codes;      // [n, stride]
    const float* scales;  // [n], with GROUPS [groups, n]
    i64 stride;           // bytes, a multiple of 16; those behind k hold zeros
    i32 n;
    i32 k;            // a multiple of 8
    i32 k_tiles;      // of 64 columns, the last perhaps short
    i32 group_shift;  // tile >> group_shift is its group
};

struct GemvRowsParams {
    Matrix w;
    const MR_T* x;     // [m, x_stride]
    const MR_T* bias;  // [n] or null
    MR_T* y;           // [m, y_stride]
    float* partial;    // as add_up has them
    u32* arrivals;
    i64 x_stride;
    i64 y_stride;
    i32 m;
    i32 split_tiles;  // k_tiles of one split
};

// What a lane needs of one tile beside x, of rows g and g + 8.
struct Tile {
    uint4 codes[2];
    float scales[2];
};

// This lane's part of the weights. Behind the last row its codes are read again, for sums that nobody stores.
struct Source {
    const u8* codes[2];
    const float* scales[2];
    i32 columns;  // of a row, less the lane's first one

    MR_DEVICE Source(const Matrix& w, i32 lane) : columns(static_cast<i32>(w.stride) - lane % 4 * 16) {
#pragma unroll
        for (i32 i = 0; i < 2; i++) {
            const i32 row = min(static_cast<i32>(blockIdx.x) * TILE_N + lane / 4 + 8 * i, w.n - 1);
            codes[i] = w.codes + row * w.stride + lane % 4 * 16;
            scales[i] = w.scales + row;
        }
    }
};

MR_DEVICE void load_tile(Tile& tile, const Source& from, const Matrix& w, i32 k_tile) {
#pragma unroll
    for (i32 i = 0; i < 2; i++) {
        tile.codes[i] = make_uint4(0u, 0u, 0u, 0u);
        if (k_tile * TILE_K < from.columns) tile.codes[i] = load16_streaming(from.codes[i] + k_tile * TILE_K);
        if constexpr (GROUPS) tile.scales[i] = from.scales[i][static_cast<i64>(k_tile >> w.group_shift) * w.n];
    }
}

// x: the lane's row, from its first column on; `columns` are those of the row, less that first one; none for a lane
// whose row does not exist.
MR_DEVICE void multiply_tile(float (&sums)[4], const Tile& tile, const MR_T* x, i32 columns, i32 k_tile) {
    float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (i32 half = 0; half < 2; half++) {
        const i32 column = k_tile * TILE_K + 8 * half;
        uint4 v = make_uint4(0u, 0u, 0u, 0u);
        if (column < columns) v = load16(x + column);
        const u32 pairs[4] = {v.x, v.y, v.z, v.w};
        const u32 words[2][2] = {{half ? tile.codes[0].z : tile.codes[0].x, half ? tile.codes[0].w : tile.codes[0].y},
                                 {half ? tile.codes[1].z : tile.codes[1].x, half ? tile.codes[1].w : tile.codes[1].y}};
#pragma unroll
        for (i32 i = 0; i < 2; i++) {
            u32 a[4];
            widen<MR_T, MR_CODE>(words[0][i], a[0], a[2]);
            widen<MR_T, MR_CODE>(words[1][i], a[1], a[3]);
            const u32 b[2] = {__byte_perm(pairs[2 * i], pairs[2 * i + 1], 0x5410u),
                              __byte_perm(pairs[2 * i], pairs[2 * i + 1], 0x7632u)};
            mma_m16n8k16<MR_T>(GROUPS ? part : sums, a, b);
        }
    }
    if constexpr (GROUPS) {
#pragma unroll
        for (i32 i = 0; i < 4; i++) sums[i] = fmaf(part[i], tile.scales[i / 2], sums[i]);
    }
}

// Grid: (n_tiles, splits).
extern "C" __global__ void __launch_bounds__(GEMV_THREADS, 3) mr_gemv_rows(GemvRowsParams p) {
    const i32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const i32 begin = blockIdx.y * p.split_tiles + warp;
    const i32 end = min(static_cast<i32>(blockIdx.y + 1) * p.split_tiles, p.w.k_tiles);
    const Source from(p.w, lane);
    const MR_T* x = p.x + lane / 4 * p.x_stride + lane % 4 * 16;
    const i32 columns = lane / 4 < p.m ? p.w.k - lane % 4 * 16 : 0;

    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    Tile ring[IN_FLIGHT];
#pragma unroll
    for (i32 i = 0; i < IN_FLIGHT; i++)
        if (begin + i * GEMV_WARPS < end) load_tile(ring[i], from, p.w, begin + i * GEMV_WARPS);
    for (i32 first = begin; first < end; first += IN_FLIGHT * GEMV_WARPS) {
#pragma unroll
        for (i32 i = 0; i < IN_FLIGHT; i++) {
            const i32 k_tile = first + i * GEMV_WARPS, ahead = k_tile + IN_FLIGHT * GEMV_WARPS;
            if (k_tile >= end) break;
            const Tile tile = ring[i];
            if (ahead < end) load_tile(ring[i], from, p.w, ahead);
            multiply_tile(sums, tile, x, columns, k_tile);
        }
    }

    float sum;
    if (!add_up(sums, p.partial, p.arrivals, sum)) return;
    const i32 column = blockIdx.x * TILE_N + threadIdx.x % TILE_N, row = threadIdx.x / TILE_N;
    if (row >= p.m || column >= p.w.n) return;
    if constexpr (!GROUPS) sum *= p.w.scales[column];
    if (p.bias != nullptr) sum += to_float(p.bias[column]);
    p.y[row * p.y_stride + column] = from_float<MR_T>(sum);
}

struct WidenRowsParams {
    Matrix w;
    const i64* tokens;  // [num_rows], rows of W; null: those from first_row on
    MR_T* out;          // [num_rows, k]
    i64 first_row;
};

// Rows of W as MR_T, each weight rounded once. Grid: (num_rows, k / 4096): 16 columns a thread.
extern "C" __global__ void __launch_bounds__(GEMV_THREADS) mr_widen_rows(WidenRowsParams p) {
    const i32 column = (blockIdx.y * GEMV_THREADS + threadIdx.x) * 16;
    const i64 row = p.tokens == nullptr ? p.first_row + blockIdx.x : p.tokens[blockIdx.x];
    if (column >= p.w.k || row < 0 || row >= p.w.n) return;
    const float scale = p.w.scales[GROUPS ? static_cast<i64>(column / TILE_K >> p.w.group_shift) * p.w.n + row : row];
    const uint4 codes = load16_streaming(p.w.codes + row * p.w.stride + column);
    const u32 words[4] = {codes.x, codes.y, codes.z, codes.w};
    u32 pairs[8];
#pragma unroll
    for (i32 i = 0; i < 4; i++) {
        u32 even, odd;
        widen<MR_T, MR_CODE>(words[i], even, odd);
        float w0, w1, w2, w3;
        unpack2<MR_T>(even, w0, w2);
        unpack2<MR_T>(odd, w1, w3);
        pairs[2 * i] = pack2<MR_T>(w0 * scale, w1 * scale);
        pairs[2 * i + 1] = pack2<MR_T>(w2 * scale, w3 * scale);
    }
    MR_T* to = p.out + blockIdx.x * static_cast<i64>(p.w.k) + column;
    store16(to, make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
    if (column + 8 < p.w.k) store16(to + 8, make_uint4(pairs[4], pairs[5], pairs[6], pairs[7]));
}
