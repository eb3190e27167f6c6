// Norms, activations, rotary embedding and KV writes: one pass over memory each, rows shared among threads when there
// is enough to share. A row's result depends on that row alone.

#include "common.h"
#include "kernels.h"

#include <cmath>

namespace {

constexpr long PARALLEL_ELEMENTS = 1 << 15;  // below this a thread team costs more than it saves

INLINE int team(long elements, int threads) { return elements < PARALLEL_ELEMENTS ? 1 : threads; }

// Rows whose length is no multiple of VL end in a partial vector, which goes through a buffer.
INLINE vf load_part(const float* p, long count) {
    float lanes[VL] = {};
    memcpy(lanes, p, count * sizeof(float));
    return load(lanes);
}
INLINE void store_part(float* p, vf v, long count) {
    float lanes[VL];
    store(lanes, v);
    memcpy(p, lanes, count * sizeof(float));
}

// f(offset, count) for each vector of a row; count is VL but for the last.
template <class F>
INLINE void each_vector(long width, F f) {
    long i = 0;
    for (; i + VL <= width; i += VL) f(i, (long)VL);
    if (i < width) f(i, width - i);
}
INLINE vf take(const float* p, long count) { return count == VL ? load(p) : load_part(p, count); }
INLINE void put(float* p, vf v, long count) {
    if (count == VL)
        store(p, v);
    else
        store_part(p, v, count);
}

// to may be from itself.
INLINE void rms_norm_row(const float* from, const float* weight, float* to, long width, float eps) {
    vf squares{};
    each_vector(width, [&](long i, long n) {
        vf v = take(from + i, n);
        squares += v * v;
    });
    const vf scale = splat(1.0f / sqrtf(hsum(squares) / width + eps));
    each_vector(width, [&](long i, long n) { put(to + i, take(from + i, n) * scale * take(weight + i, n), n); });
}

// 1 / (1 + exp(-x))
INLINE vf logistic(vf x) { return 1.0f / (1.0f + vexp(-x)); }

}  // namespace

// y = x / rms(x) * weight. With a residual, x + residual is written there first and takes the place of x.
EXPORT void mr_rms_norm(const float* x, float* residual, const float* weight, float* y, long rows, long width, float eps,
                        int threads) {
#pragma omp parallel for num_threads(team(rows* width, threads)) schedule(static)
    for (long row = 0; row < rows; row++) {
        const float* from = x + row * width;
        if (residual) {
            float* sum = residual + row * width;
            each_vector(width, [&](long i, long n) { put(sum + i, take(from + i, n) + take(sum + i, n), n); });
            from = sum;
        }
        rms_norm_row(from, weight, y + row * width, width, eps);
    }
}

// y = (x - mean) / sqrt(variance + eps) * weight + bias (bias may be null); the residual as in mr_rms_norm.
EXPORT void mr_layer_norm(const float* x, float* residual, const float* weight, const float* bias, float* y, long rows,
                          long width, float eps, int threads) {
#pragma omp parallel for num_threads(team(rows* width, threads)) schedule(static)
    for (long row = 0; row < rows; row++) {
        const float* from = x + row * width;
        if (residual) {
            float* sum = residual + row * width;
            each_vector(width, [&](long i, long n) { put(sum + i, take(from + i, n) + take(sum + i, n), n); });
            from = sum;
        }
        vf total{};
        each_vector(width, [&](long i, long n) { total += take(from + i, n); });
        const float mean = hsum(total) / width;
        vf squares{};
        float lanes[VL];
        each_vector(width, [&](long i, long n) {
            vf v = take(from + i, n) - mean;
            if (n < VL) {  // lanes past the end are not part of the row
                store(lanes, v);
                for (long j = n; j < VL; j++) lanes[j] = 0.0f;
                v = load(lanes);
            }
            squares += v * v;
        });
        const vf scale = splat(1.0f / sqrtf(hsum(squares) / width + eps));
        float* to = y + row * width;
        each_vector(width, [&](long i, long n) {
            vf v = (take(from + i, n) - mean) * scale * take(weight + i, n);
            put(to + i, bias ? v + take(bias + i, n) : v, n);
        });
    }
}

// gate_up [rows][2 * width] -> y [rows][width]
EXPORT void mr_silu_mul(const float* gate_up, float* y, long rows, long width, int threads) {
#pragma omp parallel for num_threads(team(rows* width, threads)) schedule(static)
    for (long row = 0; row < rows; row++) {
        const float *gate = gate_up + row * 2 * width, *up = gate + width;
        float* to = y + row * width;
        each_vector(width, [&](long i, long n) {
            vf g = take(gate + i, n);
            put(to + i, g * logistic(g) * take(up + i, n), n);
        });
    }
}

// tanh(u) = 2 logistic(2u) - 1, so x/2 (1 + tanh(u)) = x logistic(2u)
EXPORT void mr_gelu_tanh(const float* x, float* y, long count, int threads) {
    const long chunk = 1024, chunks = ceil_div(count, chunk);
#pragma omp parallel for num_threads(team(count, threads)) schedule(static)
    for (long c = 0; c < chunks; c++) {
        const long begin = c * chunk;
        each_vector(least(chunk, count - begin), [&](long i, long n) {
            vf v = take(x + begin + i, n);
            put(y + begin + i, v * logistic(1.5957691216f * (v + 0.044715f * v * v * v)), n);
        });
    }
}

namespace {

INLINE void rotate(float* head, const float* cos, const float* sin, long half) {
    each_vector(half, [&](long i, long n) {
        vf low = take(head + i, n), high = take(head + half + i, n), c = take(cos + i, n), s = take(sin + i, n);
        put(head + i, low * c - high * s, n);
        put(head + half + i, high * c + low * s, n);
    });
}

constexpr long BLOCK_SIZE = 16;  // slots per KV block

// One head of a key or value into its slot of the pool. Of 8 bits the scale takes the largest magnitude to LIMIT; a NaN
// or an infinity makes the scale a NaN, and so the whole head.
template <class Kv>
INLINE void write_head(const float* from, typename Kv::Element* to, float* scale, long dim) {
    vf inverse = splat(1.0f);
    if constexpr (Kv::SCALED) {
        vi top{};  // magnitudes as integers order like floats, with NaN above all
        each_vector(dim, [&](long i, long n) {
            const vi bits = (vi)take(from + i, n) & 0x7fffffff;
            top = bits > top ? bits : top;
        });
        int32_t lanes[VL], bits = 0;
        memcpy(lanes, &top, sizeof lanes);
        for (int32_t lane : lanes) bits = lane > bits ? lane : bits;
        float largest;
        memcpy(&largest, &bits, sizeof largest);
        *scale = largest / Kv::LIMIT + largest * 0.0f;
        inverse = splat(largest > 1e-30f ? Kv::LIMIT / largest : 0.0f);  // below, all is 0: no infinite factor
    }
    each_vector(dim, [&](long i, long n) {
        vf v = take(from + i, n);
        if constexpr (Kv::SCALED) v *= inverse;
        const auto narrow = Kv::narrow(v);
        memcpy(to + i, &narrow, n * sizeof *to);
    });
}

// k, v [heads][dim] of one token into its slot.
template <class Kv>
INLINE void write_token(const float* k, const float* v, const KvPool& pool, int64_t slot, long heads, long dim) {
    typedef typename Kv::Element Element;
    for (long h = 0; h < heads; h++) {
        const long to = (slot / BLOCK_SIZE * heads + h) * BLOCK_SIZE + slot % BLOCK_SIZE;
        float* k_scale = Kv::SCALED ? pool.key_scales + to : nullptr;
        float* v_scale = Kv::SCALED ? pool.value_scales + to : nullptr;
        write_head<Kv>(k + h * dim, (Element*)pool.keys + to * dim, k_scale, dim);
        write_head<Kv>(v + h * dim, (Element*)pool.values + to * dim, v_scale, dim);
    }
}

}  // namespace

// x [tokens][heads][dim] in place; cos_sin [positions][rotary_dim]. Returns 0, or 1 + the token with a bad position.
EXPORT long mr_rope(float* q, float* k, const float* cos_sin, const int64_t* positions, long tokens, long q_heads,
                    long k_heads, long dim, long rotary_dim, long max_positions, int threads) {
    for (long t = 0; t < tokens; t++)
        if (positions[t] < 0 || positions[t] >= max_positions) return t + 1;
#pragma omp parallel for num_threads(team(tokens*(q_heads + k_heads) * dim, threads)) schedule(static)
    for (long t = 0; t < tokens; t++) {
        const float *cos = cos_sin + positions[t] * rotary_dim, *sin = cos + rotary_dim / 2;
        for (long h = 0; h < q_heads; h++) rotate(q + (t * q_heads + h) * dim, cos, sin, rotary_dim / 2);
        for (long h = 0; h < k_heads; h++) rotate(k + (t * k_heads + h) * dim, cos, sin, rotary_dim / 2);
    }
    return 0;
}

// k, v [tokens][heads][dim] -> pool. Returns 0, or 1 + the token with a bad slot.
EXPORT long mr_write_kv(const float* k, const float* v, const KvPool* pool, const int64_t* slots, long tokens,
                        long heads, long dim, long num_blocks) {
    for (long t = 0; t < tokens; t++)
        if (slots[t] < 0 || slots[t] >= num_blocks * BLOCK_SIZE) return t + 1;
    with_kv(pool->kind, [&](auto kv) {
        for (long t = 0; t < tokens; t++)
            write_token<decltype(kv)>(k + t * heads * dim, v + t * heads * dim, *pool, slots[t], heads, dim);
    });
    return 0;
}

// What stands between the projection and the attention, in one pass: heads of q and k are normed (if they have norms)
// and rotated (if there is a table) in place, k and v go to their slots. qkv [tokens][(heads + 2 kv_heads) * dim];
// positions and slots were checked by the caller.
EXPORT void mr_qkv_to_cache(float* qkv, const float* q_norm, const float* k_norm, float eps, const float* cos_sin,
                            const int64_t* positions, const int64_t* slots, const KvPool* pool, long tokens, long heads,
                            long kv_heads, long dim, long rotary_dim, int threads) {
    const long width = (heads + 2 * kv_heads) * dim;
#pragma omp parallel for num_threads(team(tokens* width, threads)) schedule(static)
    for (long t = 0; t < tokens; t++) {
        float *q = qkv + t * width, *k = q + heads * dim, *v = k + kv_heads * dim;
        for (float* head = q; head < v; head += dim) {
            const float* norm = head < k ? q_norm : k_norm;
            if (norm) rms_norm_row(head, norm, head, dim, eps);
            const float* cos = cos_sin + positions[t] * rotary_dim;
            if (cos_sin) rotate(head, cos, cos + rotary_dim / 2, rotary_dim / 2);
        }
        with_kv(pool->kind, [&](auto kv) { write_token<decltype(kv)>(k, v, *pool, slots[t], kv_heads, dim); });
    }
}
