// Fills the work table of decode attention from the context lengths on the device, once per step and window: a captured
// graph needs no number from the host.
#include "prelude.cuh"

constexpr int THREADS = 256;
constexpr int BLOCK_TOKENS = 16;

struct PlanDecodeParams {
    const i32* context_lens;  // [num_seqs], 0 for a padded row
    i32* table;               // [1 + capacity][4]: {num_items, pages per split, 0, 0}, then the items
    i32 num_seqs;
    i32 capacity;
    i32 num_queries;        // query tokens per sequence, the last of its context
    i32 window;             // keys that a query sees, its own included; 0: all
    i32 target_items;       // items that fill the device
    i32 min_split_pages;    // no split is shorter, unless its sequence is
    i32 max_splits;         // per sequence
    i32 fixed_split_pages;  // 0, or the length of a split whatever else is in the batch
};

struct Pages {
    int first, count;
};

// Pages that hold a key which one of the queries sees.
MR_DEVICE Pages pages_of(const PlanDecodeParams& p, int seq) {
    const int context_len = seq < p.num_seqs ? p.context_lens[seq] : 0;
    const int end = (context_len + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    const int first_key = context_len - p.num_queries + 1 - p.window;
    const int first = p.window > 0 && first_key > 0 ? first_key / BLOCK_TOKENS : 0;
    return {first, end - first};
}

MR_DEVICE int divide_up(int a, int b) { return (a + b - 1) / b; }

// Sums over the threads before this one; `total` is the sum over all. Two barriers.
MR_DEVICE int exclusive_sum(int x, int& total) {
    __shared__ int warp_totals[THREADS / 32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int sum = x;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int below = __shfl_up_sync(FULL_WARP, sum, step);
        if (lane >= step) sum += below;
    }
    __syncthreads();  // readers of the call before are done
    if (lane == 31) warp_totals[warp] = sum;
    __syncthreads();
    int before = 0;
    total = 0;
#pragma unroll
    for (int i = 0; i < THREADS / 32; i++) {
        if (i < warp) before += warp_totals[i];
        total += warp_totals[i];
    }
    return before + sum - x;
}

// Item: {seq, first page, number of pages, split | num_splits << 16}; the items of a sequence stand together in order.
// A sequence without keys gets one item of no pages, which writes its zeros.
extern "C" __global__ void __launch_bounds__(THREADS) mr_plan_decode(PlanDecodeParams p) {
    const int thread = threadIdx.x, lane = thread % 32;

    int split_pages = p.fixed_split_pages;
    if (split_pages == 0) {
        int pages = 0;
        for (int seq = thread; seq < p.num_seqs; seq += THREADS) pages += pages_of(p, seq).count;
        int total;
        exclusive_sum(pages, total);
        split_pages = max(p.min_split_pages, divide_up(total, p.target_items));
    }

    int num_items = 0;
    for (int start = 0; start < p.num_seqs; start += THREADS) {
        const int seq = start + thread;
        const Pages pages = pages_of(p, seq);
        int num_splits = seq < p.num_seqs ? 1 : 0;
        int length = pages.count;  // of each split but the last
        if (pages.count > split_pages) {
            length = divide_up(pages.count, min(p.max_splits, divide_up(pages.count, split_pages)));
            num_splits = divide_up(pages.count, length);
        }
        int added;
        const int first_item = num_items + exclusive_sum(num_splits, added);
        num_items += added;

        for (int owner = 0; owner < 32; owner++) {  // the warp writes the items of one lane's sequence after the other
            const int splits = __shfl_sync(FULL_WARP, num_splits, owner);
            const int base = __shfl_sync(FULL_WARP, first_item, owner);
            const int size = __shfl_sync(FULL_WARP, length, owner);
            const int first_page = __shfl_sync(FULL_WARP, pages.first, owner);
            const int num_pages = __shfl_sync(FULL_WARP, pages.count, owner);
            for (int split = lane; split < splits && base + split < p.capacity; split += 32) {
                i32* item = p.table + 4 * static_cast<i64>(1 + base + split);
                item[0] = seq - lane + owner;
                item[1] = first_page + split * size;
                item[2] = min(size, num_pages - split * size);
                item[3] = split | splits << 16;
            }
        }
    }
    if (thread == 0) {
        p.table[0] = min(num_items, p.capacity);
        p.table[1] = split_pages;
        p.table[2] = 0;
        p.table[3] = 0;
    }
}
