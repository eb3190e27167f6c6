// What products of few rows with quantised weights share: a thread block of eight warps owns 16 rows of W, and the columns
// may be split over several blocks.
#pragma once
#include "prelude.cuh"

constexpr i32 GEMV_THREADS = 256;
constexpr i32 GEMV_WARPS = GEMV_THREADS / 32;
constexpr i32 TILE_N = 16;
constexpr i32 MAX_ROWS = 8;

// The other splits' sums, in the order of the splits; true in the one thread block that arrives last.
MR_DEVICE bool combine_splits(float* all, u32* arrivals, float& sum) {
    __shared__ bool is_last;
    const i64 n_tiles = gridDim.x, stride = TILE_N * MAX_ROWS;
    if (threadIdx.x < TILE_N * MAX_ROWS) {
        all[(blockIdx.y * n_tiles + blockIdx.x) * stride + threadIdx.x] = sum;
        __threadfence();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        is_last = atomicAdd(&arrivals[blockIdx.x], 1u) == gridDim.y - 1;
        if (is_last) arrivals[blockIdx.x] = 0u;
        __threadfence();
    }
    __syncthreads();
    if (!is_last) return false;
    if (threadIdx.x < TILE_N * MAX_ROWS) {
        sum = 0.0f;
        for (u32 split = 0; split < gridDim.y; split++)
            sum += __ldcg(&all[(split * n_tiles + blockIdx.x) * stride + threadIdx.x]);
    }
    return true;
}

// Adds up the mma sums of all warps and splits, in a fixed order. True in a thread whose `sum` is the product of row
// threadIdx.x % 16 of W's tile and row threadIdx.x / 16 of x. Grid: (n_tiles, splits).
//   all       [splits, n_tiles, 8 * 16], where there are several splits
//   arrivals  [n_tiles], zero before and after
MR_DEVICE bool add_up(const float (&sums)[4], float* all, u32* arrivals, float& sum) {
    __shared__ float of_warp[GEMV_WARPS][MAX_ROWS][TILE_N + 1];
    const i32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, row = lane % 4 * 2;
    of_warp[warp][row][g] = sums[0];
    of_warp[warp][row + 1][g] = sums[1];
    of_warp[warp][row][g + 8] = sums[2];
    of_warp[warp][row + 1][g + 8] = sums[3];
    __syncthreads();
    sum = 0.0f;
    if (threadIdx.x < TILE_N * MAX_ROWS) {
#pragma unroll
        for (i32 i = 0; i < GEMV_WARPS; i++) sum += of_warp[i][threadIdx.x / TILE_N][threadIdx.x % TILE_N];
    }
    if (gridDim.y > 1 && !combine_splits(all, arrivals, sum)) return false;
    return threadIdx.x < TILE_N * MAX_ROWS;
}
