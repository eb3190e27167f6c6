// First of the two launches of sampling: one pass over the logits of all rows, split over as many blocks as fill the GPU.
//
// For each 128 ids: the maximum, and the sum of exp((x - maximum) / temperature). Rows with edits get theirs here: the
// slice of the vocabulary is put into shared memory, the row's short lists are applied to it, and the edited slice is
// written to a scratch row for the draw. The model's own logits are never changed: choices of one prompt share them, and
// log probabilities are of the model's own distribution.
//
// Floor: the logits are read once, num_rows * vocab * sizeof(MR_T) bytes. A warp has 4 loads of 16 bytes a lane under
// way (8 for 16-bit logits), 64 warps an SM: 128 KiB (64 KiB) in flight where about 32 KiB cover the latency of H100's
// memory. Sums are fixed trees within 128 ids, so a row's result does not depend on the grid or on other rows.
#include "prelude.cuh"
#include "sampling.cuh"

constexpr i32 SCAN_THREADS = 256;
constexpr i32 SCAN_WARPS = SCAN_THREADS / 32;
constexpr i32 MAX_SLICE_BLOCKS = 32;  // summaries a thread block makes at most
constexpr i32 IN_FLIGHT = MAX_SLICE_BLOCKS / SCAN_WARPS;

struct SampleScanParams {
    const MR_T* logits;       // [num_logits, logits_stride]
    const i32* rows;          // [num_rows], rows of `table`, -1 for a place that is not used
    const i32* logits_index;  // [num_rows], row of `logits`; null is the identity
    const SamplingRow* table; // [max_rows]
    float2* summary;          // [num_rows, num_blocks], maximum and sum of weights
    float2* raw_summary;      // the same of the model's own logits at temperature 1, for rows that want logprobs
    float* edited;            // [edit_slots, num_blocks * 128]
    i64 logits_stride;
    i32 vocab;
    i32 num_blocks;    // ceil(vocab / 128)
    i32 slice_blocks;  // summaries per thread block
    i32 vectors;       // whether every row of logits is aligned to four elements
};

// A NaN or +inf among the ids makes the sum NaN: fmaxf passes over a NaN, the difference does not.
MR_DEVICE float2 summarise(const float (&x)[4], float inv_temperature) {
    const float top = warp_max(fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3])));
    const float base = top == -MR_INF ? 0.0f : top;  // -inf - -inf would be NaN
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; i++) sum += weight_of(x[i], base, inv_temperature);
    return make_float2(top, warp_sum(sum));
}

MR_DEVICE void scan_plain(const SampleScanParams& p, const SamplingRow& state, const LogitRow& logits, i32 first,
                          i32 count) {
    const i32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const i64 out = static_cast<i64>(blockIdx.y) * p.num_blocks + first;
    const bool wants_logprobs = state.num_logprobs >= 0;
    const float inv_temperature = state.inv_temperature;
    float x[IN_FLIGHT][4];
#pragma unroll
    for (int i = 0; i < IN_FLIGHT; i++) {
        const i32 block = warp + i * SCAN_WARPS;
        if (block < count) load_ids(x[i], logits, (first + block) * BLOCK + 4 * lane);
    }
#pragma unroll
    for (int i = 0; i < IN_FLIGHT; i++) {
        const i32 block = warp + i * SCAN_WARPS;
        if (block >= count) break;
        const float2 found = summarise(x[i], inv_temperature);
        if (lane == 0) p.summary[out + block] = found;
        if (wants_logprobs) {
            const float2 raw = summarise(x[i], 1.0f);
            if (lane == 0) p.raw_summary[out + block] = raw;
        }
    }
}

// In the order of the CPU sampler: allowed ids, biases and bans, ids held back until min_tokens, penalties.
MR_DEVICE void edit_slice(const SamplingRow& state, float* slice, u32* marked, i32 start, i32 size) {
    const i32 thread = threadIdx.x;
    if (state.num_allowed >= 0) {
        for (i32 i = thread; i < size / 32; i += SCAN_THREADS) marked[i] = 0u;
        __syncthreads();
        for (i32 i = thread; i < state.num_allowed; i += SCAN_THREADS) {
            const i32 place = state.allowed[i] - start;
            if (place >= 0 && place < size) atomicOr(&marked[place / 32], 1u << place % 32);
        }
        __syncthreads();
        for (i32 i = thread; i < size; i += SCAN_THREADS)
            if ((marked[i / 32] >> i % 32 & 1u) == 0u) slice[i] = -MR_INF;
        __syncthreads();
    }
    for (i32 i = thread; i < state.num_shifts; i += SCAN_THREADS) {
        const i32 place = state.shift_ids[i] - start;
        if (place >= 0 && place < size) slice[place] += state.shift_values[i];
    }
    __syncthreads();
    const i32 num_held = state.position < state.min_tokens ? state.num_held : 0;
    for (i32 i = thread; i < num_held; i += SCAN_THREADS) {
        const i32 place = state.held[i] - start;
        if (place >= 0 && place < size) slice[place] = -MR_INF;
    }
    __syncthreads();
    const i32 num_seen = state.seen != nullptr ? state.num_seen : 0;
    for (i32 i = thread; i < num_seen; i += SCAN_THREADS) {
        const i32 place = state.seen[i] - start;
        if (place < 0 || place >= size) continue;
        const float times = static_cast<float>(state.seen_counts[i]);
        const float x = slice[place];
        const float repeated = x > 0.0f ? x / state.repetition : rounded_mul(x, state.repetition);
        const float presence = times > 0.0f ? state.presence : 0.0f;
        slice[place] = rounded_add(repeated, -rounded_add(rounded_mul(state.frequency, times), presence));
    }
    __syncthreads();
}

MR_DEVICE void scan_edited(const SampleScanParams& p, const SamplingRow& state, const LogitRow& logits, i32 first,
                           i32 count) {
    __shared__ __align__(16) float slice[MAX_SLICE_BLOCKS * BLOCK];
    __shared__ u32 marked[MAX_SLICE_BLOCKS * BLOCK / 32];
    __shared__ float2 raw[MAX_SLICE_BLOCKS];
    const i32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const i64 out = static_cast<i64>(blockIdx.y) * p.num_blocks + first;
    for (i32 block = warp; block < count; block += SCAN_WARPS) {
        float x[4];
        load_ids(x, logits, (first + block) * BLOCK + 4 * lane);
        const float2 found = summarise(x, 1.0f);
        if (lane == 0) {
            raw[block] = found;
            if (state.num_logprobs >= 0) p.raw_summary[out + block] = found;
        }
        store_vec<4>(slice + block * BLOCK + 4 * lane, x);
    }
    __syncthreads();
    edit_slice(state, slice, marked, first * BLOCK, count * BLOCK);
    float* edited = p.edited + (static_cast<i64>(state.edit_slot) * p.num_blocks + first) * BLOCK;
    for (i32 block = warp; block < count; block += SCAN_WARPS) {
        float x[4];
        load_vec<4>(x, slice + block * BLOCK + 4 * lane);
        store_vec<4>(edited + block * BLOCK + 4 * lane, x);
        float2 found = summarise(x, state.inv_temperature);
        // Edits may hide a NaN, but a model that gave one is not to be trusted on the rest of the row. A block with
        // nothing left gets the sum -1 where the model's own logits had something: the row's error tells them apart.
        if (raw[block].y != raw[block].y) {
            found.y = raw[block].y;
        } else if (found.x == -MR_INF && found.y == 0.0f && raw[block].x > -MR_INF) {
            found.y = -1.0f;
        }
        if (lane == 0) p.summary[out + block] = found;
    }
}

// Grid: (ceil(num_blocks / slice_blocks), num_rows).
extern "C" __global__ void __launch_bounds__(SCAN_THREADS) mr_sample_scan(SampleScanParams p) {
    const i32 place = blockIdx.y;
    const i32 row = p.rows[place];
    if (row < 0) return;
    const SamplingRow& state = p.table[row];
    const i64 source = p.logits_index != nullptr ? p.logits_index[place] : place;
    const LogitRow logits{p.logits + source * p.logits_stride, nullptr, p.vocab, p.vectors != 0};
    const i32 first = blockIdx.x * p.slice_blocks;
    const i32 count = min(p.slice_blocks, p.num_blocks - first);
    if (is_edited(state)) {
        scan_edited(p, state, logits, first, count);
    } else {
        scan_plain(p, state, logits, first, count);
    }
}
