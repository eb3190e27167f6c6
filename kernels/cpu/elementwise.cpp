// Norms, activations, rotary embedding and KV writes: one pass over memory each, shared among threads. A row's result
// depends on that row alone.

#include "common.h"
#include "kernels.h"

#include <cmath>

namespace {

constexpr long CHUNK = 1024;  // elements of a row that one thread activates at a time

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

void layer_norm_row(const float* from, const Norm& norm, float* to, long width) {
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
    const vf scale = splat(1.0f / sqrtf(hsum(squares) / width + (float)norm.eps));
    each_vector(width, [&](long i, long n) {
        vf v = (take(from + i, n) - mean) * scale * take(norm.weight + i, n);
        put(to + i, norm.bias ? v + take(norm.bias + i, n) : v, n);
    });
}

// f(from, to) for each row. With a residual, x + residual is written there first and takes the place of x.
template <class F>
INLINE void each_row(const float* x, float* residual, float* y, long rows, long width, Team& team, F f) {
    team.share(rows, [&](long begin, long end) {
        for (long row = begin; row < end; row++) {
            const float* from = x + row * width;
            if (residual) {
                float* sum = residual + row * width;
                each_vector(width, [&](long i, long n) { put(sum + i, take(from + i, n) + take(sum + i, n), n); });
                from = sum;
            }
            f(from, y + row * width);
        }
    });
    team.barrier();
}

}  // namespace

// y = x / rms(x) * weight
void rms_norm(const float* x, float* residual, const Norm& norm, float* y, long rows, long width, Team& team) {
    each_row(x, residual, y, rows, width, team,
             [&](const float* from, float* to) { rms_norm_row(from, norm.weight, to, width, (float)norm.eps); });
}

// y = (x - mean) / sqrt(variance + eps) * weight + bias, which may be null
void layer_norm(const float* x, float* residual, const Norm& norm, float* y, long rows, long width, Team& team) {
    each_row(x, residual, y, rows, width, team,
             [&](const float* from, float* to) { layer_norm_row(from, norm, to, width); });
}

// gate_up [rows][2 * width] -> y [rows][width]
void silu_mul(const float* gate_up, float* y, long rows, long width, Team& team) {
    const long chunks = ceil_div(width, CHUNK);
    team.share(rows * chunks, [&](long first, long last) {
        for (long unit = first; unit < last; unit++) {
            const long row = unit / chunks, begin = unit % chunks * CHUNK;
            const float *gate = gate_up + row * 2 * width + begin, *up = gate + width;
            float* to = y + row * width + begin;
            each_vector(least(CHUNK, width - begin), [&](long i, long n) {
                vf g = take(gate + i, n);
                put(to + i, g * logistic(g) * take(up + i, n), n);
            });
        }
    });
    team.barrier();
}

// tanh(u) = 2 logistic(2u) - 1, so x/2 (1 + tanh(u)) = x logistic(2u)
void gelu_tanh(const float* x, float* y, long count, Team& team) {
    team.share(ceil_div(count, CHUNK), [&](long first, long last) {
        const long begin = first * CHUNK, end = least(last * CHUNK, count);
        each_vector(end - begin, [&](long i, long n) {
            vf v = take(x + begin + i, n);
            put(y + begin + i, v * logistic(1.5957691216f * (v + 0.044715f * v * v * v)), n);
        });
    });
    team.barrier();
}

EXPORT void mr_rms_norm(const float* x, float* residual, const float* weight, float* y, long rows, long width, float eps,
                        int threads) {
    const Norm norm{weight, nullptr, eps};
    with_team(useful_threads(rows * width, threads), [&](Team& team) { rms_norm(x, residual, norm, y, rows, width, team); });
}

EXPORT void mr_layer_norm(const float* x, float* residual, const float* weight, const float* bias, float* y, long rows,
                          long width, float eps, int threads) {
    const Norm norm{weight, bias, eps};
    with_team(useful_threads(rows * width, threads), [&](Team& team) { layer_norm(x, residual, norm, y, rows, width, team); });
}

EXPORT void mr_silu_mul(const float* gate_up, float* y, long rows, long width, int threads) {
    with_team(useful_threads(rows * width, threads), [&](Team& team) { silu_mul(gate_up, y, rows, width, team); });
}

EXPORT void mr_gelu_tanh(const float* x, float* y, long count, int threads) {
    with_team(useful_threads(count, threads), [&](Team& team) { gelu_tanh(x, y, count, team); });
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

// k, v [dim] of one head of one token into its slot.
template <class Kv>
INLINE void write_pair(const float* k, const float* v, const KvPool& pool, int64_t slot, long head, const Heads& heads) {
    typedef typename Kv::Element Element;
    const long to = (slot / BLOCK_SIZE * heads.kv + head) * BLOCK_SIZE + slot % BLOCK_SIZE;
    float* k_scale = Kv::SCALED ? pool.key_scales + to : nullptr;
    float* v_scale = Kv::SCALED ? pool.value_scales + to : nullptr;
    write_head<Kv>(k, (Element*)pool.keys + to * heads.dim, k_scale, heads.dim);
    write_head<Kv>(v, (Element*)pool.values + to * heads.dim, v_scale, heads.dim);
}

}  // namespace

// x [tokens][heads][dim] in place; cos_sin [positions][rotary_dim]. Returns 0, or 1 + the token with a bad position.
EXPORT long mr_rope(float* q, float* k, const float* cos_sin, const int64_t* positions, long tokens, long q_heads,
                    long k_heads, long dim, long rotary_dim, long max_positions, int threads) {
    for (long t = 0; t < tokens; t++)
        if (positions[t] < 0 || positions[t] >= max_positions) return t + 1;
#pragma omp parallel for num_threads(useful_threads(tokens*(q_heads + k_heads) * dim, threads)) schedule(static)
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
    const Heads shape{heads, heads, dim};
    with_kv(pool->kind, [&](auto kv) {
        for (long i = 0; i < tokens * heads; i++)
            write_pair<decltype(kv)>(k + i * dim, v + i * dim, *pool, slots[i / heads], i % heads, shape);
    });
    return 0;
}

// Units are the heads that share a key, of one token.
void qkv_to_cache(float* qkv, const ToCache& how, const KvPool& pool, long tokens, Team& team) {
    const Heads& heads = how.heads;
    const long dim = heads.dim, group = heads.q / heads.kv, width = (heads.q + 2 * heads.kv) * dim;
    team.share(tokens * heads.kv, [&](long begin, long end) {
        for (long unit = begin; unit < end; unit++) {
            const long t = unit / heads.kv, index = unit % heads.kv;
            float *queries = qkv + t * width, *k = queries + (heads.q + index) * dim, *v = k + heads.kv * dim;
            const float* cos = how.cos_sin ? how.cos_sin + how.positions[t] * how.rotary_dim : nullptr;
            const auto turn = [&](float* head, const float* norm) {
                if (norm) rms_norm_row(head, norm, head, dim, how.eps);
                if (cos) rotate(head, cos, cos + how.rotary_dim / 2, how.rotary_dim / 2);
            };
            for (long h = 0; h < group; h++) turn(queries + (index * group + h) * dim, how.q_norm);
            turn(k, how.k_norm);
            with_kv(pool.kind, [&](auto kv) { write_pair<decltype(kv)>(k, v, pool, how.slots[t], index, heads); });
        }
    });
    team.barrier();
}
