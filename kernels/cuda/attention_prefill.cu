// Prefill attention over the paged pool: chunks of queries at the end of their contexts, ragged, causal. See
// attention.cuh for layouts and data flow.
//
// Variants: MR_T bf16 | f16; MR_KV the same, fp8 or int8; MR_HEAD_DIM; MR_WARPS 4 or 8, each with 16 query rows: eight
// read keys and values from L2 half as often, four leave more tiles to spread over the SMs; MR_SHARED_BYTES what the
// front will pass as dynamic shared memory.
#include "attention.cuh"

typedef MR_T T;
typedef MR_KV KV;
constexpr int HEAD_DIM = MR_HEAD_DIM;
constexpr int WARPS = MR_WARPS;
constexpr int THREADS = 32 * WARPS;
constexpr int ROWS = 16 * WARPS;                        // of the query tile; a warp owns 16
constexpr int TILE_TOKENS = HEAD_DIM > 128 ? 32 : 64;   // of keys and values
constexpr int TILE_PAGES = TILE_TOKENS / BLOCK_TOKENS;
constexpr int KSTEPS = HEAD_DIM / 16;
constexpr int STRIDE = padded_row(HEAD_DIM * 2);        // bytes of a row of queries, or of keys as T
constexpr int RAW_STRIDE = QUANTISED<KV> ? HEAD_DIM : STRIDE;  // of keys as they come; ldmatrix reads no 8-bit rows
constexpr int RAW_TILE_BYTES = TILE_TOKENS * RAW_STRIDE;
constexpr int SCALE_BYTES = QUANTISED<KV> ? 2 * TILE_TOKENS * 4 : 0;
constexpr int STAGE_BYTES = 2 * RAW_TILE_BYTES + SCALE_BYTES;  // keys, values, key scales, value scales
constexpr int QUERY_BYTES = ROWS * STRIDE;
constexpr int WIDE_BYTES = QUANTISED<KV> ? 2 * TILE_TOKENS * STRIDE : 0;  // keys and values widened to T
// Where the query fragments do not fit beside the accumulators, they are read from shared memory for every tile. Else
// the queries only pass through it, where the widened tile or the second stage will be.
constexpr bool Q_IN_SHARED = HEAD_DIM > 128;
constexpr int QUERY_OFFSET = Q_IN_SHARED || QUANTISED<KV> ? 2 * STAGE_BYTES : STAGE_BYTES;
constexpr int WIDE_OFFSET = 2 * STAGE_BYTES + (Q_IN_SHARED ? QUERY_BYTES : 0);
constexpr int SHARED_BYTES = WIDE_OFFSET + WIDE_BYTES;
static_assert(Q_IN_SHARED || QUERY_OFFSET + QUERY_BYTES <= SHARED_BYTES, "the queries fit where they pass");
static_assert(WARPS == TILE_PAGES || WARPS == 2 * TILE_PAGES, "how pages are dealt to warps");
static_assert(SHARED_BYTES == MR_SHARED_BYTES, "the front computes the same size");
static_assert(SHARED_BYTES <= 99 * 1024, "what a block may have on sm_86, sm_89 and sm_120");
static_assert(QUANTISED<KV> || SAME<T, KV>, "a pool of 16 bits has the query's dtype");

struct AttentionPrefillParams {
    const T* q;                // [num_tokens, num_kv_heads * group, HEAD_DIM]
    const KV* keys;            // [num_blocks, num_kv_heads, 16, HEAD_DIM]
    const KV* values;          // as keys
    const float* key_scales;   // [num_blocks, num_kv_heads, 16], of a quantised pool
    const float* value_scales;
    const i32* block_tables;   // [num_seqs, max_blocks]
    const i32* query_starts;   // [num_seqs + 1]
    const i32* context_lens;   // [num_seqs], the chunk's tokens included
    const i32* tiles;          // [num_tiles, 2]: sequence, first row; row = token of the chunk * group + head
    const float* alibi_slopes; // [num_heads] or null
    T* out;                    // as q
    float* lse;                // [num_tokens, num_heads], natural log, or null
    i32 max_blocks;
    i32 group;
    i32 window;                // 0: all keys
    float score_factor;        // see capped() in attention.cuh
    float soft_cap;
};

// Keys and values of a tile's pages: with a warp per page it copies both, with two the lower half of the warps copies
// the keys and the upper half the values.
struct TileCopier {
    BlockIds ids;
    int page, first_key, end_key, kv_head, next_index;

    MR_DEVICE static int page_in_tile() { return threadIdx.x / 32 % TILE_PAGES; }

    MR_DEVICE TileCopier(const i32* table, int first_page, int first_key, int end_key, int kv_head)
        : ids(table, first_page + page_in_tile(), TILE_PAGES, first_key / BLOCK_TOKENS,
              (end_key + BLOCK_TOKENS - 1) / BLOCK_TOKENS),
          page(first_page + page_in_tile()), first_key(first_key), end_key(end_key), kv_head(kv_head), next_index(0) {}

    MR_DEVICE void start(const AttentionPrefillParams& p, char* stage) {
        const i64 block = ids.take(next_index++);
        // A page that no row sees is not read, but its rows become zeros all the same: the null block stands for it.
        const i64 run = (block * gridDim.x + kv_head) * BLOCK_TOKENS;
        const int from = first_key - page * BLOCK_TOKENS, to = end_key - page * BLOCK_TOKENS;
        page += TILE_PAGES;
        const int offset = page_in_tile() * BLOCK_TOKENS;
        const bool both = TILE_PAGES == WARPS;
        if (both || threadIdx.x < THREADS / 2) {
            copy_page<KV, HEAD_DIM, RAW_STRIDE>(stage + offset * RAW_STRIDE,
                                                reinterpret_cast<const char*>(p.keys + run * HEAD_DIM), from, to);
            if constexpr (QUANTISED<KV>)
                copy_page_scales(reinterpret_cast<float*>(stage + 2 * RAW_TILE_BYTES) + offset, p.key_scales + run);
        }
        if (both || threadIdx.x >= THREADS / 2) {
            copy_page<KV, HEAD_DIM, RAW_STRIDE>(stage + RAW_TILE_BYTES + offset * RAW_STRIDE,
                                                reinterpret_cast<const char*>(p.values + run * HEAD_DIM), from, to);
            if constexpr (QUANTISED<KV>)
                copy_page_scales(reinterpret_cast<float*>(stage + 2 * RAW_TILE_BYTES) + TILE_TOKENS + offset,
                                 p.value_scales + run);
        }
    }
};

// All threads widen a tile of 8-bit numbers to rows of T.
MR_DEVICE void widen_tile(const char* raw, char* wide) {
    constexpr int CHUNKS = HEAD_DIM / 16;
    for (int i = threadIdx.x; i < TILE_TOKENS * CHUNKS; i += THREADS) {
        const uint4 v = *reinterpret_cast<const uint4*>(raw + i * 16);
        const u32 words[4] = {v.x, v.y, v.z, v.w};
        u32 pairs[8];
#pragma unroll
        for (int w = 0; w < 4; w++) {
            u32 even, odd;
            widen<T, KV>(words[w], even, odd);
            pairs[2 * w] = (even & 0xffffu) | odd << 16;
            pairs[2 * w + 1] = even >> 16 | (odd & 0xffff0000u);
        }
        char* to = wide + i / CHUNKS * STRIDE + i % CHUNKS * 32;
        // Eight lanes store at a time: those of a row's second 128 bytes begin with the other half, so that no two meet
        // in a bank.
        const int second = i % CHUNKS & 4;
        const uint4 halves[2] = {make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]),
                                 make_uint4(pairs[4], pairs[5], pairs[6], pairs[7])};
        store16(to + (second ? 16 : 0), second ? halves[1] : halves[0]);
        store16(to + (second ? 0 : 16), second ? halves[0] : halves[1]);
    }
}

// A lane's two rows of the warp's 16, g and g + 8.
struct Rows {
    int end[2], begin[2];  // keys from begin, before end are seen
    float slope[2];        // ALiBi, base 2
    float max[2], sum[2];
};

MR_DEVICE void load_query_fragment(u32 (&a)[4], const char* queries, int step) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    ldmatrix_x4(a, queries + (warp * 16 + lane % 16) * STRIDE + step * 32 + lane / 16 * 16);
}

// products = Q K^T of the warp's rows and the tile: n-tile i holds tokens 8i + 2t, 8i + 2t + 1 of rows g and g + 8.
MR_DEVICE void multiply_keys(float (&products)[TILE_TOKENS / 8][4], const u32 (*q)[4], const char* queries,
                             const char* keys) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < TILE_TOKENS / 8; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) products[i][j] = 0.0f;
#pragma unroll
    for (int step = 0; step < KSTEPS; step++) {
        u32 a[4];
        if constexpr (Q_IN_SHARED) {
            load_query_fragment(a, queries, step);
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++) a[i] = q[step][i];
        }
#pragma unroll
        for (int pair = 0; pair < TILE_TOKENS / 16; pair++) {
            u32 k[4];
            ldmatrix_x4(k, keys + (pair * 16 + lane % 8 + lane / 16 * 8) * STRIDE + step * 32 + lane / 8 % 2 * 16);
            const u32 low[2] = {k[0], k[1]}, high[2] = {k[2], k[3]};
            mma_m16n8k16<T>(products[2 * pair], a, low);
            mma_m16n8k16<T>(products[2 * pair + 1], a, high);
        }
    }
}

// Products -> scores in base 2, -inf where a row does not see the key.
MR_DEVICE void score_tile(const AttentionPrefillParams& p, const Rows& rows, int first_token, bool all_seen,
                          const float* scales, float (&scores)[TILE_TOKENS / 8][4]) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < TILE_TOKENS / 8; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++)
            scores[i][j] *= QUANTISED<KV> ? p.score_factor * scales[i * 8 + 2 * t + j % 2] : p.score_factor;
    }
    if (p.soft_cap != 0.0f) {
#pragma unroll
        for (int i = 0; i < TILE_TOKENS / 8; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) scores[i][j] = capped(scores[i][j], p.soft_cap);
    }
    if (p.alibi_slopes != nullptr) {
#pragma unroll
        for (int i = 0; i < TILE_TOKENS / 8; i++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int distance = first_token + i * 8 + 2 * t + j % 2 - rows.end[j / 2] + 1;
                scores[i][j] += rows.slope[j / 2] * static_cast<float>(distance);
            }
        }
    }
    if constexpr (QUANTISED<KV>) {
#pragma unroll
        for (int i = 0; i < TILE_TOKENS / 8; i++)
#pragma unroll
            for (int j = 0; j < 4; j++)
                scores[i][j] += log2_approx(fmaxf(scales[TILE_TOKENS + i * 8 + 2 * t + j % 2], 1e-30f));
    }
    if (all_seen) return;
#pragma unroll
    for (int i = 0; i < TILE_TOKENS / 8; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int token = first_token + i * 8 + 2 * t + j % 2, h = j / 2;
            if (token < rows.begin[h] || token >= rows.end[h]) scores[i][j] = -MR_INF;
        }
    }
}

// Moves the maxima, scales sums and output, and turns the scores into weights.
MR_DEVICE void update_softmax(Rows& rows, const float* value_scales, float (&scores)[TILE_TOKENS / 8][4],
                              float (&out)[2 * KSTEPS][4]) {
    const int t = threadIdx.x % 4;
    float base[2], factor[2], sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float top = -MR_INF;
#pragma unroll
        for (int i = 0; i < TILE_TOKENS / 8; i++) top = fmaxf(top, fmaxf(scores[i][2 * h], scores[i][2 * h + 1]));
        top = fmaxf(rows.max[h], warp_max<4>(top));
        base[h] = finite_max(top);
        factor[h] = exp2_approx(rows.max[h] - base[h]);
        rows.max[h] = top;
    }
#pragma unroll
    for (int i = 0; i < TILE_TOKENS / 8; i++) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            // The scale of an unused slot may be anything; its weight is 0, and fmaxf makes a number of a NaN.
            const float inverse =
                QUANTISED<KV> ? reciprocal_approx(fmaxf(value_scales[i * 8 + 2 * t + j], 1e-30f)) : 1.0f;
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float& score = scores[i][2 * h + j];
                score = exp2_approx(score - base[h]);
                sum[h] += QUANTISED<KV> ? score * inverse : score;
            }
        }
    }
#pragma unroll
    for (int h = 0; h < 2; h++) rows.sum[h] = rows.sum[h] * factor[h] + sum[h];
    if (__ballot_sync(FULL_WARP, factor[0] != 1.0f || factor[1] != 1.0f) == 0) return;  // the rule after some tiles
#pragma unroll
    for (int i = 0; i < 2 * KSTEPS; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) out[i][j] *= factor[j / 2];
}

// out += P V
MR_DEVICE void multiply_values(float (&out)[2 * KSTEPS][4], const float (&weights)[TILE_TOKENS / 8][4],
                               const char* values) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int pair = 0; pair < TILE_TOKENS / 16; pair++) {
        const u32 a[4] = {pack2<T>(weights[2 * pair][0], weights[2 * pair][1]),
                          pack2<T>(weights[2 * pair][2], weights[2 * pair][3]),
                          pack2<T>(weights[2 * pair + 1][0], weights[2 * pair + 1][1]),
                          pack2<T>(weights[2 * pair + 1][2], weights[2 * pair + 1][3])};
#pragma unroll
        for (int step = 0; step < KSTEPS; step++) {
            u32 v[4];
            ldmatrix_x4_trans(v, values + (pair * 16 + lane % 16) * STRIDE + step * 32 + lane / 16 * 16);
            const u32 low[2] = {v[0], v[1]}, high[2] = {v[2], v[3]};
            mma_m16n8k16<T>(out[2 * step], a, low);
            mma_m16n8k16<T>(out[2 * step + 1], a, high);
        }
    }
}

// The address of a row's query or output, 0 being the chunk's first token and the group's first head.
MR_DEVICE i64 row_offset(const AttentionPrefillParams& p, int first_token, int kv_head, int row) {
    const i64 token = first_token + row / p.group;
    return (token * gridDim.x + kv_head) * p.group + row % p.group;
}

// The warp's 16 rows through where its queries were, so that they are written 16 bytes at a time.
MR_DEVICE void write_rows(const AttentionPrefillParams& p, const Rows& rows, const float (&out)[2 * KSTEPS][4],
                          int first_token, int first_row, int num_rows, int kv_head, char* queries) {
    constexpr int CHUNKS = HEAD_DIM / 8;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    char* own = queries + warp * 16 * STRIDE;
    __syncwarp();  // every lane has read its queries
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int row = lane / 4 + 8 * h;
        const float sum = warp_sum<4>(rows.sum[h]);
        const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
#pragma unroll
        for (int i = 0; i < 2 * KSTEPS; i++)
            *reinterpret_cast<u32*>(own + row * STRIDE + i * 16 + lane % 4 * 4) =
                pack2<T>(out[i][2 * h] * inverse, out[i][2 * h + 1] * inverse);
        const int tile_row = first_row + warp * 16 + row;
        if (p.lse != nullptr && lane % 4 == 0 && tile_row < num_rows)
            p.lse[row_offset(p, first_token, kv_head, tile_row)] =
                sum > 0.0f ? (rows.max[h] + log2_approx(sum)) * LN_2 : -MR_INF;
    }
    __syncwarp();  // the rows are complete
    for (int i = lane; i < 16 * CHUNKS; i += 32) {
        const int row = i / CHUNKS, chunk = i % CHUNKS, tile_row = first_row + warp * 16 + row;
        if (tile_row < num_rows)
            store16(p.out + row_offset(p, first_token, kv_head, tile_row) * HEAD_DIM + chunk * 8,
                    *reinterpret_cast<const uint4*>(own + row * STRIDE + chunk * 16));
    }
}

// grid (num_kv_heads, num_tiles); the longest tiles come first.
extern "C" __global__ void __launch_bounds__(THREADS, 8 / WARPS) mr_attention_prefill(AttentionPrefillParams p) {
    extern __shared__ __align__(16) char shared[];
    char* stages = shared;
    char* queries = shared + QUERY_OFFSET;
    char* wide = shared + WIDE_OFFSET;
    const int kv_head = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    const int seq = p.tiles[2 * blockIdx.y], first_row = p.tiles[2 * blockIdx.y + 1];
    const int query_start = p.query_starts[seq], query_len = p.query_starts[seq + 1] - query_start;
    const int context_len = p.context_lens[seq], prefix = context_len - query_len;
    const int num_rows = query_len * p.group;
    const int last_row = min(first_row + ROWS, num_rows) - 1;
    const int end_key = prefix + last_row / p.group + 1;
    const int first_key = p.window > 0 ? max(0, prefix + first_row / p.group + 1 - p.window) : 0;
    // From a whole tile on, so that a row meets its keys in the same portions however its prompt is cut into chunks.
    const int first_page = first_key / TILE_TOKENS * TILE_PAGES;

    TileCopier copier(p.block_tables + static_cast<i64>(seq) * p.max_blocks, first_page, first_key, end_key, kv_head);
    constexpr int CHUNKS = HEAD_DIM / 8;
    for (int i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS) {
        const int row = i / CHUNKS, chunk = i % CHUNKS;
        const bool used = first_row + row < num_rows;
        const T* from = p.q + row_offset(p, query_start, kv_head, used ? first_row + row : 0) * HEAD_DIM + chunk * 8;
        cp_async16(queries + row * STRIDE + chunk * 16, from, used);
    }
    cp_async_commit();
    copier.start(p, stages);
    cp_async_commit();

    Rows rows;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int row = min(first_row + warp * 16 + lane / 4 + 8 * h, last_row);
        rows.end[h] = prefix + row / p.group + 1;
        rows.begin[h] = p.window > 0 ? rows.end[h] - p.window : 0;
        rows.slope[h] = 0.0f;
        if (p.alibi_slopes != nullptr) rows.slope[h] = p.alibi_slopes[kv_head * p.group + row % p.group] * LOG2_E;
        rows.max[h] = -MR_INF;
        rows.sum[h] = 0.0f;
    }
    float out[2 * KSTEPS][4];
#pragma unroll
    for (int i = 0; i < 2 * KSTEPS * 4; i++) out[i / 4][i % 4] = 0.0f;
    u32 q[Q_IN_SHARED ? 1 : KSTEPS][4];
    if constexpr (!Q_IN_SHARED) {
        cp_async_wait<1>();
        __syncthreads();  // every thread's part of the queries has landed
#pragma unroll
        for (int step = 0; step < KSTEPS; step++) load_query_fragment(q[step], queries, step);
        __syncwarp();  // what the warp copies into the second stage overwrites no rows but its own, which it has read
    }

    // Keys that every row of the tile sees need no mask.
    const int seen_from = p.window > 0 ? end_key - p.window : 0;
    const int seen_to = prefix + first_row / p.group + 1;

    int stage = 0;
    for (int token = first_page * BLOCK_TOKENS; token < end_key; token += TILE_TOKENS) {
        if (token + TILE_TOKENS < end_key) copier.start(p, stages + (1 - stage) * STAGE_BYTES);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();  // every thread's part of the tile has landed
        const char* tile = stages + stage * STAGE_BYTES;
        const char *keys = tile, *values = tile + RAW_TILE_BYTES;
        const float* key_scales = reinterpret_cast<const float*>(tile + 2 * RAW_TILE_BYTES);
        if constexpr (QUANTISED<KV>) {
            widen_tile(keys, wide);
            widen_tile(values, wide + TILE_TOKENS * STRIDE);
            keys = wide;
            values = wide + TILE_TOKENS * STRIDE;
            __syncthreads();  // the tile is widened
        }
        float scores[TILE_TOKENS / 8][4];
        multiply_keys(scores, q, queries, keys);
        score_tile(p, rows, token, token >= seen_from && token + TILE_TOKENS <= seen_to, key_scales, scores);
        update_softmax(rows, key_scales + TILE_TOKENS, scores, out);
        multiply_values(out, scores, values);
        stage = 1 - stage;
        __syncthreads();  // the stage may be overwritten
    }
    cp_async_wait<0>();
    write_rows(p, rows, out, query_start, first_row, num_rows, kv_head, queries);
}
