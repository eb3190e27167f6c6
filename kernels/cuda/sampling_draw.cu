// Second launch of sampling: one thread block per row draws the token from the summaries that the scan has left.
//
// The filters are those of the CPU sampler: min_p, then top_k, then top_p over what those two keep; each keeps a
// beginning of the order (largest logit first, lowest id among equals). The vocabulary is never sorted:
//  1. Greedy and unfiltered draws need the summaries and one block of 128 ids.
//  2. Otherwise a bound on the logit is taken from the maxima of the blocks. If few ids reach it and they hold all that
//     the filters keep, they alone are put in order, and the draw is by inverse CDF in that order: with the same random
//     number as on the CPU, so it is the CPU's token unless rounding decides.
//  3. Else rejection (as in FlashInfer's sampling, flashinfer.ai 2025-03-10): draw from all that may be kept, measure
//     the mass before the drawn id, accept if it lies inside; if not, everything from it on is cut off and the next
//     round draws from the rest. The mass outside shrinks by a uniform factor each round. A token of 1 (without filters)
//     or 3 differs from the CPU's, and is a function of logits, parameters, seed, choice and position alone.
// All sums are in fixed order and float32; compiled without flush-to-zero.
//
// Floor: 8 bytes per 128 ids, and the blocks that are read again lie in L2. It is latency that counts: about ten block
// barriers for greedy, sixty to a hundred with filters.
#include "philox.cuh"
#include "prelude.cuh"
#include "sampling.cuh"
#include "sampling_select.cuh"

constexpr i32 FEW_BLOCKS = 128;  // of top_p alone: the blocks whose maxima give the bound that is tried first
constexpr i32 NO_PLACE = 0x7fffffff;

enum Code : i32 { GOOD = 0, NOT_FINITE = 1, NOTHING_LEFT = 2, SEEN_IS_FULL = 3 };

struct SampleDrawParams {
    const MR_T* logits;        // [num_logits, logits_stride]
    const i32* rows;           // [num_rows], -1 for a place that is not used
    const i32* logits_index;   // [num_rows] or null
    SamplingRow* table;        // [max_rows]
    const float2* summary;     // [num_rows, num_blocks]
    const float2* raw_summary; // the same, for rows that want logprobs
    const float* edited;       // [edit_slots, num_blocks * 128]
    i32* tokens;               // [num_rows], -1 where none was drawn
    i32* codes;                // [num_rows], enum Code
    i64* last_tokens;          // [max_rows], by row
    float* logprobs;           // [num_rows]
    i32* num_top;              // [num_rows]
    i32* top_ids;              // [num_rows, max_top]
    float* top_logprobs;       // [num_rows, max_top]
    i64 logits_stride;
    i32 vocab;
    i32 num_blocks;
    i32 max_top;
    i32 vectors;
};

// What the filters ask of one row.
struct Filters {
    float top;  // largest logit of the row
    float inv_temperature;
    float min_p;  // 0 is off
    float top_p;  // 1 is off
    i32 top_k;    // 0 is off
};

struct Prefix {
    i32 count;
    float mass;
};

// Reads a row of summaries into w.maxima, and the masses of its blocks into w.mass. Returns GOOD or why not; `top` and
// `mass` are the row's largest logit and sum of weights.
MR_DEVICE i32 load_summaries(const Workspace& w, const float2* summary, float inv_temperature, float& top,
                             float& mass) {
    float largest = -MR_INF, flag = 0.0f;
    for (i32 b = threadIdx.x; b < w.num_blocks; b += THREADS) {
        const float2 s = summary[b];
        w.maxima[b] = s.x;
        w.mass[b] = s.y;
        largest = fmaxf(largest, s.x);
        flag = fmaxf(flag, s.y != s.y ? 2.0f : s.y < 0.0f ? 1.0f : 0.0f);
    }
    top = block_max<THREADS>(largest);
    flag = block_max<THREADS>(flag);
    if (flag == 2.0f || top == MR_INF) return NOT_FINITE;
    if (top == -MR_INF) return flag == 1.0f ? NOTHING_LEFT : NOT_FINITE;
    float sum = 0.0f;
    for (i32 b = threadIdx.x; b < w.num_blocks; b += THREADS) {
        const float x = w.maxima[b];
        w.mass[b] = x == -MR_INF ? 0.0f : w.mass[b] * weight_of(x, top, inv_temperature);
        sum += w.mass[b];
    }
    mass = block_sum<THREADS>(sum);
    return GOOD;
}

MR_DEVICE i32 argmax(const Workspace& w, const LogitRow& logits, float top) {
    i32 place = NO_PLACE;
    for (i32 b = threadIdx.x; b < w.num_blocks; b += THREADS)
        if (w.maxima[b] == top) place = min(place, b);
    place = block_min(place);
    i32 id = NO_PLACE;
    if (threadIdx.x < 32) {
        float x[4];
        const i32 first = place * BLOCK + 4 * static_cast<i32>(threadIdx.x);
        load_ids(x, logits, first);
#pragma unroll
        for (i32 i = 3; i >= 0; i--)
            if (x[i] == top) id = first + i;
    }
    return block_min(id);
}

// Draws one block by w.mass, then one id of it by weight, among those before the bound that min_p keeps.
MR_DEVICE i32 draw_by_mass(const Workspace& w, const LogitRow& logits, const Filters& f, u64 bound, Random4 random) {
    const i32 share = (w.num_blocks + THREADS - 1) / THREADS;
    const i32 begin = threadIdx.x * share, end = min(begin + share, w.num_blocks);
    __syncthreads();  // w.mass is read in another distribution than it was written in
    float sum = 0.0f;
    for (i32 b = begin; b < end; b++) sum += w.mass[b];
    float total;
    float running = block_sum_before(sum, total);
    const float target = uniform24(random.word[0]) * total;
    i32 place = NO_PLACE, last = -1;
    for (i32 b = begin; b < end; b++) {
        running += w.mass[b];
        if (w.mass[b] <= 0.0f) continue;
        if (running > target && place == NO_PLACE) place = b;
        last = b;
    }
    place = block_min(place);
    if (place == NO_PLACE) place = block_largest(last);  // rounding left the target at the very end
    i32 id = -1;
    if (threadIdx.x < 32) {
        const i32 first = place * BLOCK + 4 * static_cast<i32>(threadIdx.x);
        float x[4], weight[4];
        load_ids(x, logits, first);
        float inner = 0.0f;
#pragma unroll
        for (i32 i = 0; i < 4; i++) {
            const bool kept = likelihood_key(x[i], first + i) < bound &&
                              weight_of(x[i], f.top, f.inv_temperature) >= f.min_p;
            // Relative to the block's own maximum, so that a block far below the row's keeps its differences.
            weight[i] = kept ? weight_of(x[i], w.maxima[place], f.inv_temperature) : 0.0f;
            inner += weight[i];
        }
        const float up_to = warp_running_sum(inner);
        const float inner_target = uniform24(random.word[1]) * __shfl_sync(FULL_WARP, up_to, 31);
        const float below = __shfl_up_sync(FULL_WARP, up_to, 1);
        float sum_before = threadIdx.x == 0 ? 0.0f : below;
        i32 chosen = NO_PLACE, last_kept = -1;
#pragma unroll
        for (i32 i = 0; i < 4; i++) {
            sum_before += weight[i];
            if (weight[i] <= 0.0f) continue;
            if (sum_before > inner_target && chosen == NO_PLACE) chosen = first + i;
            last_kept = first + i;
        }
        chosen = __reduce_min_sync(FULL_WARP, chosen);
        last_kept = __reduce_max_sync(FULL_WARP, last_kept);
        id = chosen == NO_PLACE ? last_kept : chosen;
    }
    return block_largest(id);
}

// Count and mass of the ids before the bound that min_p keeps; w.mass becomes their masses.
MR_DEVICE Prefix measure(const Workspace& w, const LogitRow& logits, const Filters& f, u64 bound) {
    const i32 num_listed = list_blocks(w, fmaxf(key_logit(bound), LOWEST));
    for (i32 b = threadIdx.x; b < w.num_blocks; b += THREADS) w.mass[b] = 0.0f;
    __syncthreads();
    i32 count = 0;
    visit_listed<2>(w, logits, num_listed, [&](i32 block, const float(&x)[4], i32 id) {
        float sum = 0.0f;
#pragma unroll
        for (i32 i = 0; i < 4; i++) {
            if (x[i] == -MR_INF || likelihood_key(x[i], id + i) >= bound) continue;
            const float weight = weight_of(x[i], f.top, f.inv_temperature);
            if (weight < f.min_p) continue;
            sum += weight;
            count++;
        }
        sum = warp_sum(sum);
        if (threadIdx.x % 32 == 0) w.mass[block] = sum;
    });
    __syncthreads();
    float mass = 0.0f;
    for (i32 b = threadIdx.x; b < w.num_blocks; b += THREADS) mass += w.mass[b];
    mass = block_sum<THREADS>(mass);
    return Prefix{block_add(count), mass};
}

// Any filters, any distribution; without filters w.mass is there already, and one round of draws is all. What min_p and
// top_k keep reaches the logit `start`.
MR_DEVICE i32 draw_by_rejection(const Workspace& w, const LogitRow& logits, const Filters& f, const SamplingRow& state,
                                float start, bool filtered) {
    const u64 all = likelihood_key(start, NO_PLACE);
    u64 bound = all;
    u64 low = likelihood_key(f.top, 0), high = bound;  // at most top_k ids come before low, more before high
    bool cut_known = false;
    float wanted = 0.0f;
    i32 id = -1;
    for (u32 round = filtered ? 1 : 0;;) {
        if (filtered) {
            const Prefix before = measure(w, logits, f, bound);
            if (cut_known) {
                if (before.mass < wanted || before.count == 0) return id;
            } else {
                // Bisection for the key that exactly top_k ids come before; keys are distinct, so there is one.
                const bool short_row = before.count < f.top_k && bound == all;
                if (f.top_k > 0 && before.count != f.top_k && !short_row) {
                    if (before.count < f.top_k) {
                        low = bound;
                    } else {
                        high = bound;
                    }
                    bound = low + (high - low) / 2;
                    continue;
                }
                cut_known = true;
                wanted = f.top_p * before.mass;
            }
        }
        const Random4 random = draw_random(state.seed, state.choice, state.position, round++);
        id = draw_by_mass(w, logits, f, bound, random);
        if (f.top_p >= 1.0f) return id;
        float x[4];
        load_ids(x, logits, id & ~3);
        bound = likelihood_key(id % 4 == 0 ? x[0] : id % 4 == 1 ? x[1] : id % 4 == 2 ? x[2] : x[3], id);
    }
}

// Inverse CDF over the first `count` keys, or -1 where the nucleus may be larger than they are. `mass` is that of the
// whole row where top_p alone filters, else negative: then the keys hold all that min_p and top_k keep.
MR_DEVICE i32 draw_from_candidates(const Workspace& w, const Filters& f, i32 count, float mass, Random4 random) {
    const i32 first = OF_THREAD * threadIdx.x;
    float weight[OF_THREAD], running[OF_THREAD], sum = 0.0f, total;
    i32 kept = 0;
#pragma unroll
    for (i32 i = 0; i < OF_THREAD; i++) {
        const bool present = first + i < count;
        weight[i] = present ? weight_of(key_logit(w.keys[first + i]), f.top, f.inv_temperature) : 0.0f;
        kept += present && weight[i] >= f.min_p;
        sum += weight[i];
        running[i] = sum;
    }
    kept = block_add(kept);
    if (f.top_k > 0) kept = min(kept, f.top_k);
    kept = max(kept, 1);
    const float before = block_sum_before(sum, total);
#pragma unroll
    for (i32 i = 0; i < OF_THREAD; i++) {
        running[i] += before;
        w.running[first + i] = running[i];
    }
    __syncthreads();
    if (f.top_p < 1.0f) {
        const float wanted = f.top_p * (mass >= 0.0f ? mass : w.running[kept - 1]);
        i32 reached = NO_PLACE;
#pragma unroll
        for (i32 i = OF_THREAD - 1; i >= 0; i--)
            if (first + i < count && running[i] >= wanted) reached = first + i + 1;
        reached = block_min(reached);
        if (mass >= 0.0f && reached > kept) return -1;
        kept = min(kept, reached);
    }
    // 53 random bits, as the CPU sampler takes them.
    const u64 bits = static_cast<u64>(random.word[0] >> 5) << 26 | random.word[1] >> 6;
    const double uniform = static_cast<double>(static_cast<i64>(bits)) * 1.1102230246251565e-16;
    const float target = static_cast<float>(uniform * w.running[kept - 1]);
    i32 place = NO_PLACE, last = 0;
#pragma unroll
    for (i32 i = OF_THREAD - 1; i >= 0; i--) {
        if (first + i >= kept || weight[i] <= 0.0f) continue;
        if (running[i] > target) place = first + i;
        last = max(last, first + i);
    }
    place = block_min(place);
    if (place == NO_PLACE) place = block_largest(last);
    return static_cast<i32>(static_cast<u32>(w.keys[place]));
}

MR_DEVICE i32 draw(const Workspace& w, const LogitRow& logits, const Filters& f, const SamplingRow& state, float mass) {
    const bool cut = f.top_k > 0 || f.min_p > 0.0f;
    const bool filtered = cut || f.top_p < 1.0f;
    float bound = LOWEST;
    if (filtered) {
        if (f.top_k > 0 || !cut) {
            const i32 k = f.top_k > 0 ? f.top_k : max(1, min(FEW_BLOCKS, w.num_blocks / 2));
            if (k <= w.num_blocks) bound = kth_largest_maximum(w, k);
        }
        if (f.min_p > 0.0f) {
            // The logit below which a weight is surely below min_p, with room for rounding.
            const float depth = logf(f.min_p) / f.inv_temperature;
            bound = fmaxf(bound, f.top + depth - 1e-5f * (1.0f + fabsf(f.top) - depth));
        }
        const i32 count = ordered_candidates(w, logits, bound);
        if (count <= MAX_CANDIDATES) {
            const Random4 random = draw_random(state.seed, state.choice, state.position, 0);
            const i32 token = draw_from_candidates(w, f, count, cut ? -1.0f : mass, random);
            if (token >= 0) return token;
        }
    }
    return draw_by_rejection(w, logits, f, state, cut ? bound : LOWEST, filtered);
}

// Counts the token in the row's list. Returns false, and counts nothing, if it is new and the list is full.
MR_DEVICE bool record_seen(SamplingRow& state, i32 num_seen, i32 token) {
    __shared__ i32 is_new;
    __syncthreads();
    if (threadIdx.x == 0) is_new = 1;
    __syncthreads();
    for (i32 i = threadIdx.x; i < num_seen; i += THREADS) {
        if (state.seen[i] != token) continue;
        state.seen_counts[i] += 1;  // ids are distinct: no other thread comes here
        is_new = 0;
    }
    __syncthreads();
    if (is_new == 0) return true;
    if (num_seen >= state.seen_capacity) return false;
    if (threadIdx.x == 0) {
        state.seen[num_seen] = token;
        state.seen_counts[num_seen] = 1;
        state.num_seen = num_seen + 1;
    }
    return true;
}

// The drawn token's log probability and the most likely ids, under the model's own distribution.
MR_DEVICE void write_logprobs(const SampleDrawParams& p, const Workspace& w, const LogitRow& logits, i32 num_wanted,
                              i32 token) {
    const i32 place = blockIdx.x;
    float top, mass;
    __syncthreads();
    load_summaries(w, p.raw_summary + static_cast<i64>(place) * p.num_blocks, 1.0f, top, mass);
    const float log_mass = logf(mass);
    if (threadIdx.x == 0) p.logprobs[place] = to_float(logits.raw[token]) - top - log_mass;
    const i32 wanted = min(min(num_wanted, p.max_top), p.vocab);
    i32 found = 0;
    if (wanted > 0) {
        const float bound = wanted <= w.num_blocks ? kth_largest_maximum(w, wanted) : LOWEST;
        const i32 count = ordered_candidates(w, logits, bound);
        found = min(count, wanted);
        if (count > MAX_CANDIDATES) {
            // So many equal logits that they do not fit: the next key of all, one after the other.
            const i32 num_listed = list_blocks(w, bound);
            u64 after = 0;
            for (i32 i = 0; i < found; i++) {
                u64 best = ~0ull;
                visit_listed<1>(w, logits, num_listed, [&](i32, const float(&x)[4], i32 id) {
#pragma unroll
                    for (i32 j = 0; j < 4; j++) {
                        const u64 key = likelihood_key(x[j], id + j);
                        if (x[j] >= bound && (i == 0 || key > after)) best = min(best, key);
                    }
                });
                after = block_min_key(best);
                if (threadIdx.x == 0) w.keys[i] = after;
            }
            __syncthreads();
        }
    }
    if (threadIdx.x == 0) p.num_top[place] = found;
    for (i32 i = threadIdx.x; i < p.max_top; i += THREADS) {
        const i64 out = static_cast<i64>(place) * p.max_top + i;
        p.top_ids[out] = i < found ? static_cast<i32>(static_cast<u32>(w.keys[i])) : -1;
        p.top_logprobs[out] = i < found ? key_logit(w.keys[i]) - top - log_mass : -MR_INF;
    }
}

// Grid: (num_rows). Dynamic shared memory: ten bytes per summary. At most 64 registers, so that two rows share an SM.
extern "C" __global__ void __launch_bounds__(THREADS, 1024 / THREADS) mr_sample_draw(SampleDrawParams p) {
    extern __shared__ __align__(16) u8 dynamic[];
    __shared__ u64 keys[MAX_CANDIDATES];
    __shared__ float running[MAX_CANDIDATES];
    __shared__ i32 counters[2];
    Workspace w;
    w.maxima = reinterpret_cast<float*>(dynamic);
    w.mass = w.maxima + p.num_blocks;
    w.listed = reinterpret_cast<u16*>(w.mass + p.num_blocks);
    w.keys = keys;
    w.running = running;
    w.counters = counters;
    w.num_blocks = p.num_blocks;

    const i32 place = blockIdx.x;
    const i32 row = p.rows[place];
    if (row < 0) {
        if (threadIdx.x == 0) {
            p.tokens[place] = -1;
            p.codes[place] = GOOD;
        }
        return;
    }
    SamplingRow& state = p.table[row];
    const i64 source = p.logits_index != nullptr ? p.logits_index[place] : place;
    const LogitRow raw{p.logits + source * p.logits_stride, nullptr, p.vocab, p.vectors != 0};
    Filters f{0.0f, state.inv_temperature, state.min_p, state.top_p, state.top_k < p.vocab ? state.top_k : 0};
    float mass;
    i32 code = load_summaries(w, p.summary + static_cast<i64>(place) * p.num_blocks, f.inv_temperature, f.top, mass);
    LogitRow logits = raw;
    if (is_edited(state)) logits.edited = p.edited + static_cast<i64>(state.edit_slot) * p.num_blocks * BLOCK;
    i32 token = -1;
    if (code == GOOD) {
        token = state.greedy != 0 ? argmax(w, logits, f.top) : draw(w, logits, f, state, mass);
        if (state.seen != nullptr && !record_seen(state, state.num_seen, token)) {
            code = SEEN_IS_FULL;
            token = -1;
        }
    }
    const i32 num_logprobs = token >= 0 ? state.num_logprobs : -1;
    if (threadIdx.x == 0) {
        p.tokens[place] = token;
        p.codes[place] = code;
        if (token >= 0) {
            p.last_tokens[row] = token;
            state.position += 1;
        }
    }
    if (num_logprobs >= 0) write_logprobs(p, w, raw, num_logprobs, token);
}
