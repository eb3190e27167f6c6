// Whole KV blocks from one place to another: copy-on-write inside the pool, and between the pool and a contiguous
// staging buffer that is swapped to the host.
//
// A region is a tensor [planes][blocks][block_bytes]: planes are the layers times keys and values, and a second region
// holds the scales of a quantised pool. One launch moves a list of blocks through all planes of both regions; the list
// travels in the argument record, so nothing is uploaded.
//
// Floor: every byte is read and written once. A thread has four 16-byte loads under way, a thread block of 256 threads
// 16 KiB; eight of those fit on an SM, where about 32 KiB cover the latency of H100's memory.
#include "prelude.cuh"

constexpr i32 COPY_THREADS = 256;
constexpr i32 IN_FLIGHT = 4;
constexpr i32 CHUNK_VECTORS = COPY_THREADS * IN_FLIGHT;  // 16 KiB
constexpr i32 MAX_MOVES = 256;

struct Region {
    const u8* source;
    u8* target;
    i64 source_plane_stride;  // bytes, as all strides
    i64 source_block_stride;
    i64 target_plane_stride;
    i64 target_block_stride;
    i32 num_planes;
    i32 block_vectors;  // 16-byte vectors per block of one plane
};

struct MoveBlocksParams {
    Region regions[2];  // the second may have no planes
    i32 from[MAX_MOVES];
    i32 to[MAX_MOVES];
};

// Grid: (chunks of the larger region's block, planes of both regions, moves).
extern "C" __global__ void __launch_bounds__(COPY_THREADS) mr_move_blocks(MoveBlocksParams p) {
    const i32 num_first = p.regions[0].num_planes;
    const bool second = static_cast<i32>(blockIdx.y) >= num_first;
    const Region& region = p.regions[second ? 1 : 0];
    const i64 plane = static_cast<i32>(blockIdx.y) - (second ? num_first : 0);
    const i32 begin = blockIdx.x * CHUNK_VECTORS + threadIdx.x;
    const u8* source = region.source + plane * region.source_plane_stride +
                       p.from[blockIdx.z] * region.source_block_stride;
    u8* target = region.target + plane * region.target_plane_stride + p.to[blockIdx.z] * region.target_block_stride;
    uint4 held[IN_FLIGHT];
#pragma unroll
    for (i32 i = 0; i < IN_FLIGHT; i++) {
        const i32 place = begin + i * COPY_THREADS;
        if (place < region.block_vectors) held[i] = load16_streaming(source + static_cast<i64>(place) * 16);
    }
#pragma unroll
    for (i32 i = 0; i < IN_FLIGHT; i++) {
        const i32 place = begin + i * COPY_THREADS;
        if (place < region.block_vectors) store16(target + static_cast<i64>(place) * 16, held[i]);
    }
}
