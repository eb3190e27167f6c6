// Decode attention over the paged pool, in one file of over 500 lines because its stages share registers and memory:
// one or a few query tokens per sequence, split-KV by a work table. See attention.cuh for layouts and data flow.
//
// Variants: MR_T bf16 | f16; MR_KV the same, fp8 or int8; MR_HEAD_DIM; MR_ROWS 8 or 16, at least num_queries * group;
// MR_SHARED_BYTES what the front will pass as dynamic shared memory.
//
// Tensor cores for every group, 1 included: a page of 16 tokens at HEAD_DIM 128 in bf16 is 8 KB, 600 cycles of one SM's
// share of an H100's memory, and costs a warp 24 mma, 16 ldmatrix, 16 cp.async and some 200 other instructions, spread
// over four schedulers: a tenth of the issue slots. CUDA cores would need 64 fma and 64 unpacking instructions per lane
// and head for the same page.
#include "attention.cuh"

typedef MR_T T;
typedef MR_KV KV;
constexpr int HEAD_DIM = MR_HEAD_DIM;
constexpr int ROWS = MR_ROWS;
constexpr int ROW_TILES = ROWS / 8;
constexpr int KSTEPS = HEAD_DIM / 16;
constexpr int ROW_BYTES = HEAD_DIM * static_cast<int>(sizeof(KV));
constexpr int STRIDE = padded_row(ROW_BYTES);
constexpr int TILE_BYTES = BLOCK_TOKENS * STRIDE;
constexpr int SCALE_BYTES = QUANTISED<KV> ? 2 * BLOCK_TOKENS * 4 : 0;
constexpr int STAGE_BYTES = 2 * TILE_BYTES + SCALE_BYTES;  // keys, values, key scales, value scales

// Sized so that three or four CTAs share an SM of 227 KB and one fits in 99 KB (sm_86, sm_89, sm_120).
constexpr int WARPS = ROW_BYTES > 256 ? 2 : 4;
constexpr int THREADS = 32 * WARPS;
constexpr int STAGES = ROW_BYTES <= 160 ? 3 : 2;

// CTAs per SM that the registers must allow; more would spill, or would not fit with their shared memory.
constexpr int MIN_CTAS = HEAD_DIM > 128 ? 2 : (HEAD_DIM * ROW_TILES > 80 ? 3 : 4);

constexpr int OUT_STRIDE = HEAD_DIM + 4;  // floats; 4 more spread the four heads of a quad over the banks
constexpr int RING_BYTES = WARPS * STAGES * STAGE_BYTES;
constexpr int MERGE_BYTES = WARPS * ROWS * (OUT_STRIDE + 2) * 4;
constexpr bool Q_IN_SHARED = HEAD_DIM * ROW_TILES > 256;  // its fragments would not fit beside the accumulators
constexpr int Q_BYTES = Q_IN_SHARED ? KSTEPS * 32 * 16 : 0;
constexpr int SHARED_BYTES = Q_BYTES + (RING_BYTES > MERGE_BYTES ? RING_BYTES : MERGE_BYTES);
static_assert(SHARED_BYTES == MR_SHARED_BYTES, "the front computes the same size");
static_assert(ROWS == 8 || ROWS == 16, "one or two tiles of eight heads");
static_assert(HEAD_DIM % 16 == 0, "whole k-steps");
static_assert(QUANTISED<KV> || SAME<T, KV>, "a pool of 16 bits has the query's dtype");

struct AttentionDecodeParams {
    const T* q;                // [num_seqs * num_queries, num_kv_heads * group, HEAD_DIM]
    const KV* keys;            // [num_blocks, num_kv_heads, 16, HEAD_DIM]
    const KV* values;          // as keys
    const float* key_scales;   // [num_blocks, num_kv_heads, 16], of a quantised pool
    const float* value_scales;
    const i32* block_tables;   // [num_seqs, max_blocks]
    const i32* context_lens;   // [num_seqs]
    const i32* table;          // see attention_plan.cu
    const float* alibi_slopes; // [num_heads] or null
    float* partial_out;        // [capacity, num_kv_heads, num_queries * group, HEAD_DIM]
    float* partial_lse;        // [capacity, num_kv_heads, num_queries * group], base 2
    u32* counters;             // [num_seqs, num_kv_heads], zero between launches
    T* out;                    // as q
    float* lse;                // [num_seqs * num_queries, num_heads], natural log, or null
    i32 max_blocks;
    i32 group;
    i32 num_queries;
    i32 window;                // 0: all keys
    float score_factor;        // see capped() in attention.cuh
    float soft_cap;
};

// Fragments of Q. Row r of the tile is query token r / group and head r % group; rows past the end are zeros.
// word[0], word[1]: row lane / 4; word[2], word[3]: row lane / 4 + 8.
struct QueryStep {
    u32 word[2 * ROW_TILES];
};

MR_DEVICE const T* row_of(const AttentionDecodeParams& p, const T* base, int seq, int kv_head, int row) {
    const i64 token = static_cast<i64>(seq) * p.num_queries + row / p.group;
    return base + ((token * gridDim.x + kv_head) * p.group + row % p.group) * HEAD_DIM;
}

MR_DEVICE QueryStep load_query_step(const T* (&rows)[ROW_TILES], int step) {
    const int t = threadIdx.x % 4;
    QueryStep q;
#pragma unroll
    for (int h = 0; h < ROW_TILES; h++) {
        u32 low = 0, high = 0;
        if (rows[h] != nullptr) {
            if constexpr (QUANTISED<KV>) {
                // k-columns in the order in which widen() gives a key's dims: (4t, 4t + 2), then (4t + 1, 4t + 3)
                const uint2 four = *reinterpret_cast<const uint2*>(rows[h] + step * 16 + 4 * t);
                low = (four.x & 0xffffu) | four.y << 16;
                high = four.x >> 16 | (four.y & 0xffff0000u);
            } else {
                low = *reinterpret_cast<const u32*>(rows[h] + step * 16 + 2 * t);
                high = *reinterpret_cast<const u32*>(rows[h] + step * 16 + 2 * t + 8);
            }
        }
        q.word[2 * h] = low;
        q.word[2 * h + 1] = high;
    }
    return q;
}

MR_DEVICE void mma_scores(float (&scores)[2][4], const QueryStep& q, u32 k0, u32 k1, u32 k2, u32 k3) {
    u32 a[4] = {q.word[0], 0u, q.word[1], 0u};
    if constexpr (ROW_TILES == 2) {
        a[1] = q.word[2];
        a[3] = q.word[3];
    }
    const u32 low[2] = {k0, k1}, high[2] = {k2, k3};
    mma_m16n8k16<T>(scores[0], a, low);
    mma_m16n8k16<T>(scores[1], a, high);
}

// A warp's online softmax and output: of the 16 tokens' scores in base 2 a lane holds tokens 2t, 2t + 1, 2t + 8, 2t + 9
// of rows g and g + 8; of the output dims g and g + 8 of each 16 (a quantised pool: 2g and 2g + 1) at rows 2t, 2t + 1.
struct Accumulator {
    float out[KSTEPS][ROW_TILES][4];
    float max[ROW_TILES], sum[ROW_TILES];

    MR_DEVICE void clear() {
#pragma unroll
        for (int i = 0; i < KSTEPS * ROW_TILES * 4; i++) out[i / (ROW_TILES * 4)][i / 4 % ROW_TILES][i % 4] = 0.0f;
#pragma unroll
        for (int h = 0; h < ROW_TILES; h++) {
            max[h] = -MR_INF;
            sum[h] = 0.0f;
        }
    }

    // Moves the maximum to that of the new scores and scales what has been summed.
    MR_DEVICE void rescale(const float (&scores)[ROW_TILES][4]) {
        float factor[ROW_TILES];
        bool changed = false;
#pragma unroll
        for (int h = 0; h < ROW_TILES; h++) {
            float top = fmaxf(fmaxf(scores[h][0], scores[h][1]), fmaxf(scores[h][2], scores[h][3]));
            top = fmaxf(max[h], warp_max<4>(top));
            factor[h] = exp2_approx(max[h] - finite_max(top));
            changed = changed || top != max[h];
            max[h] = top;
            sum[h] *= factor[h];
        }
        if (__ballot_sync(FULL_WARP, changed) == 0) return;  // the rule after the first few pages
        const int source = threadIdx.x % 4 * 8;  // lane 4r holds row r
#pragma unroll
        for (int h = 0; h < ROW_TILES; h++) {
            const float even = __shfl_sync(FULL_WARP, factor[h], source);
            const float odd = __shfl_sync(FULL_WARP, factor[h], source + 4);
#pragma unroll
            for (int i = 0; i < KSTEPS; i++) {
                out[i][h][0] *= even;
                out[i][h][1] *= odd;
                out[i][h][2] *= even;
                out[i][h][3] *= odd;
            }
        }
    }
};

// What a lane needs to turn products into scores and to mask them.
struct Rows {
    int end[ROW_TILES];      // keys before this one are seen,
    int window;              // so many of them
    float slope[ROW_TILES];  // ALiBi, base 2
};

MR_DEVICE void score_page(const AttentionDecodeParams& p, const Rows& rows, int first_token, const float* key_scales,
                          const float (&products)[2][4], const float (&value_log)[4],
                          float (&scores)[ROW_TILES][4]) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int offset = i / 2 * 8 + 2 * t + i % 2;
        const float factor = QUANTISED<KV> ? p.score_factor * key_scales[offset] : p.score_factor;
#pragma unroll
        for (int h = 0; h < ROW_TILES; h++) scores[h][i] = products[i / 2][2 * h + i % 2] * factor;
    }
    if (p.soft_cap != 0.0f) {
#pragma unroll
        for (int i = 0; i < 4 * ROW_TILES; i++) scores[i / 4][i % 4] = capped(scores[i / 4][i % 4], p.soft_cap);
    }
#pragma unroll
    for (int h = 0; h < ROW_TILES; h++) {
        const int first = first_token + 2 * t - rows.end[h];  // of the lane's four tokens
        if (p.alibi_slopes != nullptr) {
#pragma unroll
            for (int i = 0; i < 4; i++)
                scores[h][i] += rows.slope[h] * static_cast<float>(first + i / 2 * 8 + i % 2 + 1);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int behind = -(first + i / 2 * 8 + i % 2);  // 1 for the query's own key
            if constexpr (QUANTISED<KV>) scores[h][i] += value_log[i];
            if (behind <= 0 || behind > rows.window) scores[h][i] = -MR_INF;
        }
    }
}

// One page of the warp: scores, softmax, output.
MR_DEVICE void attend_page(const AttentionDecodeParams& p, const Rows& rows, const QueryStep* q_registers,
                           const uint4* q_shared, const char* stage, int first_token, Accumulator& acc) {
    const int lane = threadIdx.x % 32, t = lane % 4;
    const char* key_tile = stage;
    const char* value_tile = stage + TILE_BYTES;
    const float* key_scales = reinterpret_cast<const float*>(stage + 2 * TILE_BYTES);
    const float* value_scales = key_scales + BLOCK_TOKENS;

    const auto query = [&](int step) {
        if constexpr (Q_IN_SHARED) {
            const uint4 v = q_shared[step * 32 + lane];
            QueryStep q;
            const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int i = 0; i < 2 * ROW_TILES; i++) q.word[i] = words[i];
            return q;
        } else {
            return q_registers[step];
        }
    };

    float products[2][4] = {};
    if constexpr (QUANTISED<KV>) {
        // one ldmatrix brings 32 dims: tokens 0-7 and 8-15 of the first 16, then of the second 16
#pragma unroll
        for (int step = 0; step < KSTEPS; step += 2) {
            const bool two = step + 1 < KSTEPS;
            u32 r[4], k[8];
            ldmatrix_x4(r, key_tile + lane % 16 * STRIDE + step * 16 + (two ? lane / 16 * 16 : 0));
#pragma unroll
            for (int i = 0; i < 4; i++) widen<T, KV>(r[i], k[2 * i], k[2 * i + 1]);
            mma_scores(products, query(step), k[0], k[1], k[2], k[3]);
            if (two) mma_scores(products, query(step + 1), k[4], k[5], k[6], k[7]);
        }
    } else {
#pragma unroll
        for (int step = 0; step < KSTEPS; step++) {
            u32 k[4];
            ldmatrix_x4(k, key_tile + (lane % 8 + lane / 16 * 8) * STRIDE + step * 32 + lane / 8 % 2 * 16);
            mma_scores(products, query(step), k[0], k[1], k[2], k[3]);
        }
    }

    float value_log[4] = {}, value_inverse[4] = {};
    if constexpr (QUANTISED<KV>) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float scale = fmaxf(value_scales[i / 2 * 8 + 2 * t + i % 2], 1e-30f);
            value_log[i] = log2_approx(scale);
            value_inverse[i] = reciprocal_approx(scale);
        }
    }
    float scores[ROW_TILES][4];
    score_page(p, rows, first_token, key_scales, products, value_log, scores);
    acc.rescale(scores);

    u32 weights[ROW_TILES][2];  // B fragments of P^T
#pragma unroll
    for (int h = 0; h < ROW_TILES; h++) {
        const float top = finite_max(acc.max[h]);
        float w[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            w[i] = exp2_approx(scores[h][i] - top);
            acc.sum[h] += QUANTISED<KV> ? w[i] * value_inverse[i] : w[i];
        }
        weights[h][0] = pack2<T>(w[0], w[1]);
        weights[h][1] = pack2<T>(w[2], w[3]);
    }

    if constexpr (QUANTISED<KV>) {
#pragma unroll
        for (int step = 0; step < KSTEPS; step += 2) {
            const bool two = step + 1 < KSTEPS;
            u32 r[4], a[2][4];
            ldmatrix_x4_trans(r, value_tile + lane % 16 * STRIDE + step * 16 + (two ? lane / 16 * 16 : 0));
#pragma unroll
            for (int i = 0; i < 4; i++) widen<T, KV>(r[i], a[i / 2][i % 2 * 2], a[i / 2][i % 2 * 2 + 1]);
#pragma unroll
            for (int h = 0; h < ROW_TILES; h++) {
                mma_m16n8k16<T>(acc.out[step][h], a[0], weights[h]);
                if (two) mma_m16n8k16<T>(acc.out[two ? step + 1 : step][h], a[1], weights[h]);
            }
        }
    } else {
#pragma unroll
        for (int step = 0; step < KSTEPS; step++) {
            u32 a[4];
            ldmatrix_x4_trans(a, value_tile + (lane % 8 + lane / 16 * 8) * STRIDE + step * 32 + lane / 8 % 2 * 16);
#pragma unroll
            for (int h = 0; h < ROW_TILES; h++) mma_m16n8k16<T>(acc.out[step][h], a, weights[h]);
        }
    }
}

// Puts the warps' results side by side in shared memory.
MR_DEVICE void share_results(const Accumulator& acc, float* outs, float* maxima, float* sums) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int h = 0; h < ROW_TILES; h++) {
        const float sum = warp_sum<4>(acc.sum[h]);
        if (t == 0) {
            maxima[warp * ROWS + h * 8 + g] = acc.max[h];
            sums[warp * ROWS + h * 8 + g] = sum;
        }
#pragma unroll
        for (int step = 0; step < KSTEPS; step++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int row = h * 8 + 2 * t + i % 2;
                const int dim = step * 16 + (QUANTISED<KV> ? 2 * g + i / 2 : g + i / 2 * 8);
                outs[(warp * ROWS + row) * OUT_STRIDE + dim] = acc.out[step][h][i];
            }
        }
    }
}

MR_DEVICE void write_row(const AttentionDecodeParams& p, int seq, int kv_head, int row, int dim, float4 total,
                         float top, float sum) {
    const float lse = normalised(total, top, sum);
    T* to = const_cast<T*>(row_of(p, p.out, seq, kv_head, row)) + dim;
    *reinterpret_cast<uint2*>(to) = make_uint2(pack2<T>(total.x, total.y), pack2<T>(total.z, total.w));
    if (p.lse != nullptr && dim == 0) {
        const i64 token = static_cast<i64>(seq) * p.num_queries + row / p.group;
        p.lse[(token * gridDim.x + kv_head) * p.group + row % p.group] = lse * LN_2;
    }
}

// The last CTA of a (sequence, kv head) merges the partial results of all, in the order of the splits. Every round
// loads COMBINE_SPLITS of them at once, so that few splits cost one round trip to L2.
MR_DEVICE void combine(const AttentionDecodeParams& p, int seq, int kv_head, int first_item, int num_splits) {
    constexpr int COMBINE_SPLITS = 8;
    const int num_rows = p.num_queries * p.group;
    const i64 base = (static_cast<i64>(first_item) * gridDim.x + kv_head) * num_rows;  // of split 0
    const i64 step = static_cast<i64>(gridDim.x) * num_rows;
    for (int i = threadIdx.x; i < num_rows * (HEAD_DIM / 4); i += THREADS) {
        const int row = i / (HEAD_DIM / 4), dim = i % (HEAD_DIM / 4) * 4;
        float top = -MR_INF, sum = 0.0f;
        float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        for (int first = 0; first < num_splits; first += COMBINE_SPLITS) {
            float lse[COMBINE_SPLITS];
            float4 x[COMBINE_SPLITS];
#pragma unroll
            for (int k = 0; k < COMBINE_SPLITS; k++) {
                const i64 at = base + min(first + k, num_splits - 1) * step + row;
                lse[k] = load_l2(p.partial_lse + at);
                x[k] = load_l2_vec(p.partial_out + at * HEAD_DIM + dim);
            }
            const float before = top;
#pragma unroll
            for (int k = 0; k < COMBINE_SPLITS; k++) top = fmaxf(top, lse[k]);
            const float factor = exp2_approx(before - finite_max(top));
            sum *= factor;
            total = make_float4(total.x * factor, total.y * factor, total.z * factor, total.w * factor);
#pragma unroll
            for (int k = 0; k < COMBINE_SPLITS; k++) {
                const float w = first + k < num_splits ? exp2_approx(lse[k] - finite_max(top)) : 0.0f;
                sum += w;
                total.x += w * x[k].x;
                total.y += w * x[k].y;
                total.z += w * x[k].z;
                total.w += w * x[k].w;
            }
        }
        write_row(p, seq, kv_head, row, dim, total, top, sum);
    }
}

// Merges the warps and writes the result, or a partial one that the last CTA of the sequence combines.
MR_DEVICE void finish_item(const AttentionDecodeParams& p, int item, int seq, int kv_head, int split, int num_splits,
                           const Accumulator& acc, char* shared) {
    float* outs = reinterpret_cast<float*>(shared);
    float* maxima = outs + WARPS * ROWS * OUT_STRIDE;
    float* sums = maxima + WARPS * ROWS;
    const int num_rows = p.num_queries * p.group;
    cp_async_wait<0>();
    __syncthreads();  // the ring of every warp is free
    share_results(acc, outs, maxima, sums);
    __syncthreads();

    const i64 partial = (static_cast<i64>(item) * gridDim.x + kv_head) * num_rows;
    for (int i = threadIdx.x; i < num_rows * (HEAD_DIM / 4); i += THREADS) {
        const int row = i / (HEAD_DIM / 4), dim = i % (HEAD_DIM / 4) * 4;
        float top = -MR_INF;
#pragma unroll
        for (int w = 0; w < WARPS; w++) top = fmaxf(top, maxima[w * ROWS + row]);
        float sum = 0.0f;
        float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float factor = exp2_approx(maxima[w * ROWS + row] - finite_max(top));
            const float4 x = *reinterpret_cast<const float4*>(outs + (w * ROWS + row) * OUT_STRIDE + dim);
            sum += factor * sums[w * ROWS + row];
            total.x += factor * x.x;
            total.y += factor * x.y;
            total.z += factor * x.z;
            total.w += factor * x.w;
        }
        if (num_splits == 1) {
            write_row(p, seq, kv_head, row, dim, total, top, sum);
        } else {
            const float lse = normalised(total, top, sum);
            *reinterpret_cast<float4*>(p.partial_out + (partial + row) * HEAD_DIM + dim) = total;
            if (dim == 0) p.partial_lse[partial + row] = lse;
        }
    }
    if (num_splits == 1) return;

    __shared__ bool is_last;
    __threadfence();  // this thread's partial results before the count
    __syncthreads();
    if (threadIdx.x == 0) {
        u32* counter = p.counters + static_cast<i64>(seq) * gridDim.x + kv_head;
        is_last = atomicAdd(counter, 1u) == static_cast<u32>(num_splits - 1);
        if (is_last) *counter = 0;  // ready for the next launch
        __threadfence();
    }
    __syncthreads();
    if (is_last) combine(p, seq, kv_head, item - split, num_splits);
}

// grid (num_kv_heads, item slots): kv heads of a block lie side by side, so neighbouring CTAs read neighbouring memory.
extern "C" __global__ void __launch_bounds__(THREADS, MIN_CTAS) mr_attention_decode(AttentionDecodeParams p) {
    extern __shared__ __align__(16) char shared[];
    char* ring = shared + Q_BYTES;
    const int kv_head = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const auto item_of = [&](int item) {
        return *reinterpret_cast<const int4*>(p.table + 4 * (1 + static_cast<i64>(item)));
    };
    // The first item comes beside the number of items, not behind it: the table has a place for every slot.
    int4 work = item_of(blockIdx.y);
    const int num_items = p.table[0];
    char* stages = ring + warp * STAGES * STAGE_BYTES;

    for (int item = blockIdx.y; item < num_items; item += gridDim.y) {
        const int seq = work.x, end_page = work.y + work.z;
        const int context_len = p.context_lens[seq];
        const int first_key = p.window > 0 ? max(0, context_len - p.num_queries + 1 - p.window) : 0;
        BlockIds ids(p.block_tables + static_cast<i64>(seq) * p.max_blocks, work.y + warp, WARPS, work.y, end_page);

        int issued = 0;
        const auto start_copy = [&](int stage) {
            const int page = work.y + warp + issued * WARPS;
            const i64 block = ids.take(issued++);
            if (page < end_page) {
                const i64 run = (block * gridDim.x + kv_head) * BLOCK_TOKENS;
                const int from = first_key - page * BLOCK_TOKENS, to = context_len - page * BLOCK_TOKENS;
                char* tile = stages + stage * STAGE_BYTES;
                copy_page<KV, HEAD_DIM, STRIDE>(tile, reinterpret_cast<const char*>(p.keys + run * HEAD_DIM), from, to);
                copy_page<KV, HEAD_DIM, STRIDE>(tile + TILE_BYTES,
                                                reinterpret_cast<const char*>(p.values + run * HEAD_DIM), from, to);
                if constexpr (QUANTISED<KV>) {
                    float* scales = reinterpret_cast<float*>(tile + 2 * TILE_BYTES);
                    copy_page_scales(scales, p.key_scales + run);
                    copy_page_scales(scales + BLOCK_TOKENS, p.value_scales + run);
                }
            }
            cp_async_commit();
        };
#pragma unroll
        for (int stage = 0; stage < STAGES; stage++) start_copy(stage);

        // Queries while the first pages are under way.
        Rows rows;
        rows.window = p.window > 0 ? p.window : 0x7fffffff;
        const T* query_rows[ROW_TILES];
#pragma unroll
        for (int h = 0; h < ROW_TILES; h++) {
            const int row = h * 8 + lane / 4;
            const bool used = row < p.num_queries * p.group;
            query_rows[h] = used ? row_of(p, p.q, seq, kv_head, row) : nullptr;
            rows.end[h] = context_len - (used ? p.num_queries - 1 - row / p.group : 0);
            rows.slope[h] = 0.0f;
            if (used && p.alibi_slopes != nullptr)
                rows.slope[h] = p.alibi_slopes[kv_head * p.group + row % p.group] * LOG2_E;
        }
        QueryStep q[Q_IN_SHARED ? 1 : KSTEPS];
        if constexpr (Q_IN_SHARED) {
            for (int step = warp; step < KSTEPS; step += WARPS) {
                const QueryStep s = load_query_step(query_rows, step);
                reinterpret_cast<uint4*>(shared)[step * 32 + lane] =
                    make_uint4(s.word[0], s.word[1], s.word[2 * ROW_TILES - 2], s.word[2 * ROW_TILES - 1]);
            }
            __syncthreads();
        } else {
#pragma unroll
            for (int step = 0; step < KSTEPS; step++) q[step] = load_query_step(query_rows, step);
        }

        Accumulator acc;
        acc.clear();
        int stage = 0;
        for (int page = work.y + warp; page < end_page; page += WARPS) {
            cp_async_wait<STAGES - 1>();
            __syncwarp();  // every lane's part of the page has landed
            attend_page(p, rows, q, reinterpret_cast<const uint4*>(shared), stages + stage * STAGE_BYTES,
                        page * BLOCK_TOKENS, acc);
            __syncwarp();  // every lane has read it
            start_copy(stage);
            stage = stage + 1 < STAGES ? stage + 1 : 0;
        }
        finish_item(p, item, seq, kv_head, work.w & 0xffff, work.w >> 16, acc, ring);
        if (item + static_cast<int>(gridDim.y) < num_items) work = item_of(item + gridDim.y);
        __syncthreads();  // shared memory is free for the next item
    }
}
