// What lies between the qkv product and attention, in one pass: bias, q/k-norm, rotary embedding, and the new keys
// and values into their slots of the paged pool.
//
// MR_T      bf16 or f16
// MR_LANES  8, 16 or 32 lanes share a head, 8 elements each: head_dim <= 8 * MR_LANES
// MR_KV     what the pool holds: 0 MR_T, 1 FP8 e4m3, 2 INT8; the latter two with a scale per slot and head
//
// Queries go to a matrix of their own or stay in place; keys and values are read once and go straight into the pool. Heads are independent, so
// a token's result does not depend on the batch.
#include "prelude.cuh"

constexpr int THREADS = 128;
constexpr int HEADS = THREADS / MR_LANES;  // per block
constexpr int WIDTH = 8 * MR_LANES;

struct RopeKvParams {
    const MR_T* qkv;          // [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]
    MR_T* queries;            // [num_tokens, num_heads * head_dim], rows query_stride apart; may be qkv itself
    const MR_T* bias;         // [(num_heads + 2 * num_kv_heads) * head_dim]; null: none
    const MR_T* q_norm;       // [head_dim]; null: queries are not normalised
    const MR_T* k_norm;       // [head_dim]; null: keys are not normalised
    const float* cos_sin;     // [max_positions, rotary_dim], cosines in the first half; null: nothing is rotated
    const i64* positions;     // [num_tokens]
    const i64* slot_mapping;  // [num_tokens], block * 16 + offset; outside of the pool: written nowhere
    void* k_cache;            // [num_blocks, num_kv_heads, 16, head_dim]
    void* v_cache;
    float* k_scale;           // [num_blocks, num_kv_heads, 16], where MR_KV is not 0
    float* v_scale;
    i64 max_positions;
    i64 num_slots;
    i64 query_stride;
    i32 num_heads;
    i32 num_kv_heads;
    i32 head_dim;             // a multiple of 8
    i32 rotary_dim;           // a multiple of 8 up to head_dim
    float norm_eps;
};

// Writes 8 elements of a head into the pool; all lanes of the head come here together, `inside` or not.
MR_DEVICE void write_pool(void* cache, float* scales, i64 row, i32 column, i32 head_dim, bool inside,
                          const float (&x)[8]) {
#if MR_KV == 0
    if (inside) store_vec(static_cast<MR_T*>(cache) + row * head_dim + column, x);
#else
    // As integers, magnitudes order like floats with NaN on top, so that a NaN reaches the scale.
    u32 bits = 0;
#pragma unroll
    for (int e = 0; e < 8; e++) bits = max(bits, __float_as_uint(x[e]) & 0x7fffffffu);
#pragma unroll
    for (int step = MR_LANES / 2; step > 0; step /= 2) bits = max(bits, __shfl_xor_sync(FULL_WARP, bits, step));
    const float largest = __uint_as_float(bits);
    const float limit = MR_KV == 1 ? 448.0f : 127.0f;
    const float inverse = largest > 1e-30f ? limit / largest : 0.0f;  // below, all is 0: no infinite factor
    u32 words[2] = {};
#pragma unroll
    for (int e = 0; e < 8; e++) {
        const float scaled = x[e] * inverse;
#if MR_KV == 1
        const u32 byte = float_to_e4m3(scaled);
#else
        const u32 byte = static_cast<u32>(max(-127, min(127, __float2int_rn(scaled)))) & 0xffu;
#endif
        words[e / 4] |= byte << e % 4 * 8;
    }
    if (!inside) return;
    *reinterpret_cast<uint2*>(static_cast<u8*>(cache) + row * head_dim + column) = make_uint2(words[0], words[1]);
    if (column == 0) scales[row] = largest / limit;
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS) mr_rope_kv(RopeKvParams p) {
    __shared__ __align__(16) float rows[HEADS][WIDTH];
    const i64 token = blockIdx.x;
    const i32 group = threadIdx.x / MR_LANES;
    const i32 column = threadIdx.x % MR_LANES * 8;
    const i32 num_heads = p.num_heads + 2 * p.num_kv_heads;
    const i32 head = blockIdx.y * HEADS + group;
    const bool inside = head < num_heads && column < p.head_dim;
    const bool is_query = head < p.num_heads;
    const bool is_value = head >= p.num_heads + p.num_kv_heads;

    float x[8] = {};
    if (inside) {
        load_vec(x, p.qkv + (token * num_heads + head) * p.head_dim + column);
        if (p.bias) {
            float b[8];
            load_vec(b, p.bias + head * p.head_dim + column);
#pragma unroll
            for (int e = 0; e < 8; e++) x[e] += b[e];
        }
    }

    if (p.q_norm || p.k_norm) {
        float sum = 0.0f;
#pragma unroll
        for (int e = 0; e < 8; e++) sum += x[e] * x[e];
        const float scale = rsqrtf(warp_sum<MR_LANES>(sum) / p.head_dim + p.norm_eps);
        const MR_T* weight = is_query ? p.q_norm : p.k_norm;
        if (inside && !is_value && weight) {
            float w[8];
            load_vec(w, weight + column);
#pragma unroll
            for (int e = 0; e < 8; e++) x[e] *= scale * w[e];
        }
    }

    if (p.cos_sin) {
        // The partner of an element is half a rotary_dim away, in another lane: by way of shared memory.
        float* const row = rows[group];
        store_vec(row + column, x);
        __syncwarp();
        const i64 position = p.positions[token];
        const bool known = position >= 0 && position < p.max_positions;
        const float* const table = p.cos_sin + (known ? position : 0) * p.rotary_dim;
        const i32 half = p.rotary_dim / 2;
#pragma unroll
        for (int part = 0; part < 8; part += 4) {
            const i32 at = column + part;
            if (is_value || at >= p.rotary_dim) continue;
            const bool low = at < half;
            const i32 angle = low ? at : at - half;
            float partner[4], cosine[4], sine[4];
            load_vec(partner, row + (low ? at + half : at - half));
            load_vec(cosine, table + angle);
            load_vec(sine, table + half + angle);
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float turned = x[part + e] * cosine[e] + (low ? -partner[e] : partner[e]) * sine[e];
                x[part + e] = known ? turned : __uint_as_float(0x7fffffffu);  // no such position: NaN
            }
        }
    }

    if (is_query && inside) store_vec(p.queries + token * p.query_stride + head * p.head_dim + column, x);
    const i64 slot = p.slot_mapping[token];
    const bool written = inside && !is_query && slot >= 0 && slot < p.num_slots;
    const i32 kv_head = head - p.num_heads - (is_value ? p.num_kv_heads : 0);
    const i64 row = ((slot >> 4) * p.num_kv_heads + kv_head) * 16 + (slot & 15);
    write_pool(is_value ? p.v_cache : p.k_cache, is_value ? p.v_scale : p.k_scale, row, column, p.head_dim, written, x);
}
