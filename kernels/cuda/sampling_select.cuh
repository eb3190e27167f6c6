// Parts of the draw that concern one thread block: reductions, the k-th largest maximum, gathering and ordering the few
// ids that can be drawn. All threads of the block call every function here.
#pragma once
#include "sampling.cuh"

#ifndef MR_THREADS
#define MR_THREADS 512
#endif
constexpr i32 THREADS = MR_THREADS;
constexpr i32 WARPS = THREADS / 32;
constexpr i32 MAX_CANDIDATES = 1024;  // ids that are put in order at once
constexpr i32 OF_THREAD = MAX_CANDIDATES / THREADS;

// Shared memory of the draw. The first three are as long as the row has summaries.
struct Workspace {
    float* maxima;  // [num_blocks], largest logit of each block
    float* mass;    // [num_blocks], sum of weights of each block, relative to the row's maximum
    u16* listed;    // [num_blocks], blocks to read again
    u64* keys;      // [MAX_CANDIDATES]
    float* running; // [MAX_CANDIDATES], sum of weights up to and with a candidate
    i32* counters;  // [2]
    i32 num_blocks;
};

// Over the block, result in all threads. The first barrier lets the readers of the call before finish.
template <typename T, typename Combine> MR_DEVICE T block_reduce(T x, Combine combine) {
    __shared__ T partial[WARPS];
#pragma unroll
    for (i32 step = 16; step > 0; step /= 2) x = combine(x, __shfl_xor_sync(FULL_WARP, x, step));
    __syncthreads();
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
    __syncthreads();
    x = partial[threadIdx.x % WARPS];
#pragma unroll
    for (i32 step = WARPS / 2; step > 0; step /= 2) x = combine(x, __shfl_xor_sync(FULL_WARP, x, step));
    return x;
}
MR_DEVICE i32 block_add(i32 x) {
    return block_reduce(x, [](i32 a, i32 b) { return a + b; });
}
MR_DEVICE i32 block_min(i32 x) {
    return block_reduce(x, [](i32 a, i32 b) { return min(a, b); });
}
MR_DEVICE i32 block_largest(i32 x) {
    return block_reduce(x, [](i32 a, i32 b) { return max(a, b); });
}
MR_DEVICE u64 block_min_key(u64 x) {
    return block_reduce(x, [](u64 a, u64 b) { return min(a, b); });
}

MR_DEVICE float warp_running_sum(float x) {
    const u32 lane = threadIdx.x % 32;
#pragma unroll
    for (i32 step = 1; step < 32; step *= 2) {
        const float below = __shfl_up_sync(FULL_WARP, x, step);
        if (lane >= step) x += below;
    }
    return x;
}

// Sum over the threads before this one; `total` is over all.
MR_DEVICE float block_sum_before(float x, float& total) {
    __shared__ float of_warp[WARPS];
    const i32 warp = threadIdx.x / 32;
    const float inclusive = warp_running_sum(x);
    __syncthreads();
    if (threadIdx.x % 32 == 31) of_warp[warp] = inclusive;
    __syncthreads();
    float before = 0.0f;
    total = 0.0f;
#pragma unroll
    for (i32 i = 0; i < WARPS; i++) {
        if (i == warp) before = total;
        total += of_warp[i];
    }
    // The inclusive sum of the lane below, not `inclusive - x`: a difference of sums may lose small weights.
    const float below = __shfl_up_sync(FULL_WARP, inclusive, 1);
    return before + (threadIdx.x % 32 == 0 ? 0.0f : below);
}

// The k-th largest of the maxima (1 <= k <= num_blocks), bit by bit from the top; ends where k maxima are left. What it
// returns is reached by k blocks, so the k largest logits of the row reach it too. Never below the finite numbers.
MR_DEVICE float kth_largest_maximum(const Workspace& w, i32 k) {
    u32 bound = 0;
    for (i32 bit = 31; bit >= 0; bit--) {
        const u32 tried = bound | 1u << bit;
        i32 count = 0;
        for (i32 first = 0; first < w.num_blocks; first += THREADS) {
            const i32 b = first + threadIdx.x;
            count += __syncthreads_count(b < w.num_blocks && rising_bits(w.maxima[b]) >= tried);
        }
        if (count >= k) bound = tried;
        if (count == k) break;
    }
    return fmaxf(from_rising_bits(bound), LOWEST);
}

// Lists the blocks that hold an id whose logit reaches the bound; returns their number. In no certain order: nothing
// that is computed from the list depends on it.
MR_DEVICE i32 list_blocks(const Workspace& w, float bound) {
    __syncthreads();
    if (threadIdx.x == 0) w.counters[0] = 0;
    __syncthreads();
    for (i32 b = threadIdx.x; b < w.num_blocks; b += THREADS)
        if (w.maxima[b] >= bound) w.listed[atomicAdd(&w.counters[0], 1)] = static_cast<u16>(b);
    __syncthreads();
    return w.counters[0];
}

// Calls visit(block, x[4], id of x[0]) in every lane of a warp for each listed block, UNDER_WAY loads at a time.
template <i32 UNDER_WAY, typename Visit>
MR_DEVICE void visit_listed(const Workspace& w, const LogitRow& logits, i32 num_listed, Visit visit) {
    const i32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (i32 first = warp; first < num_listed; first += UNDER_WAY * WARPS) {
        float x[UNDER_WAY][4];
#pragma unroll
        for (i32 i = 0; i < UNDER_WAY; i++) {
            const i32 place = first + i * WARPS;
            if (place < num_listed) load_ids(x[i], logits, w.listed[place] * BLOCK + 4 * lane);
        }
#pragma unroll
        for (i32 i = 0; i < UNDER_WAY; i++) {
            const i32 place = first + i * WARPS;
            if (place < num_listed) visit(w.listed[place], x[i], w.listed[place] * BLOCK + 4 * lane);
        }
    }
}

// Puts the keys of all ids whose logit reaches the bound into w.keys, in order of likelihood. Returns their number, or
// one above MAX_CANDIDATES: then there are more than that, and w.keys holds nothing of use.
MR_DEVICE i32 ordered_candidates(const Workspace& w, const LogitRow& logits, float bound) {
    const i32 num_listed = list_blocks(w, bound);
    if (threadIdx.x == 0) w.counters[1] = 0;
    __syncthreads();
    bool full = false;  // then this thread stops counting: the number only has to be too large
    visit_listed<2>(w, logits, num_listed, [&](i32, const float(&x)[4], i32 id) {
#pragma unroll
        for (i32 i = 0; i < 4; i++) {
            if (full || !(x[i] >= bound)) continue;
            const i32 place = atomicAdd(&w.counters[1], 1);
            full = place >= MAX_CANDIDATES;
            if (!full) w.keys[place] = likelihood_key(x[i], id + i);
        }
    });
    __syncthreads();
    const i32 count = w.counters[1];
    if (count > MAX_CANDIDATES) return count;
    i32 size = 2;
    while (size < count) size *= 2;
    for (i32 i = count + threadIdx.x; i < size; i += THREADS) w.keys[i] = ~0ull;
    // Bitonic sort (Batcher 1968) of pairs.
    for (i32 run = 2; run <= size; run *= 2) {
        for (i32 step = run / 2; step > 0; step /= 2) {
            __syncthreads();
            for (i32 pair = threadIdx.x; pair < size / 2; pair += THREADS) {
                const i32 low = 2 * pair - (pair & (step - 1)), high = low + step;
                const bool rising = (low & run) == 0;
                const u64 a = w.keys[low], b = w.keys[high];
                if ((a > b) == rising) {
                    w.keys[low] = b;
                    w.keys[high] = a;
                }
            }
        }
    }
    __syncthreads();
    return count;
}
