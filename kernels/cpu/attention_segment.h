// Attention of one task over one segment of positions, for attention.cpp.
#pragma once

#include "common.h"
#include "kernels.h"

#include <type_traits>

namespace {

constexpr int BLOCK_SIZE = 16;    // slots per KV block
constexpr int SEGMENT = 128;      // positions
constexpr int SEGMENT_BLOCKS = SEGMENT / BLOCK_SIZE;
constexpr int MAX_DIM = 256;
constexpr int ROWS = VL == 16 ? 6 : 3;  // rows of a register tile: ROWS x 4 accumulators
constexpr int FEW = 8;            // rows up to which keys are transposed in registers, not into memory
constexpr float LOWEST = -1e30f;  // stands for minus infinity: differences of it stay finite
constexpr float SMALLEST = 1.17549435e-38f;  // below it floats are denormal, for which processors are slow

using Task = Attention::Task;

struct Problem {
    const Attention& shape;
    const float* q;  // [num_tokens][num_heads][dim], q_stride elements from token to token
    const KvPool& pool;
    float scale;     // of scores
    float* out;      // [num_tokens][num_heads][dim]
};

// Per-thread working space.
struct Space {
    alignas(64) float keys[MAX_DIM * SEGMENT];     // [dim][SEGMENT]: the segment's keys, transposed
    alignas(64) float wide[SEGMENT * MAX_DIM];     // [slot][dim]: its values, where the pool's are not float32
    alignas(64) float key_scales[SEGMENT];         // of its slots; those outside the context may be anything
    alignas(64) float value_scales[SEGMENT];
    alignas(64) float scores[FEW * SEGMENT];
    alignas(64) float values[FEW * MAX_DIM];
    Scratch query, state;                          // [rows][dim] scaled queries; [rows][dim + 2] running results
};

INLINE void fetch(const void* from, long bytes) {
    for (long i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)from + i, 0, 2);
}

// Where a segment of a task's positions lies in the pool: blocks of [BLOCK_SIZE][dim] elements.
template <class Kv>
struct Segment {
    typedef typename Kv::Element Element;
    long begin = 0, end = 0, pieces = 0;  // positions [begin, end) in so many blocks
    long slots[SEGMENT_BLOCKS];           // the first one of each block, of one head
    const Element *keys[SEGMENT_BLOCKS], *values[SEGMENT_BLOCKS];

    Segment() = default;
    Segment(const Problem& p, const Task& task, long index) {
        const Attention& shape = p.shape;
        begin = most(index * SEGMENT, task.first_key / BLOCK_SIZE * BLOCK_SIZE);
        end = least((index + 1) * SEGMENT, task.last_key);
        pieces = ceil_div(end - begin, BLOCK_SIZE);
        const int32_t* table = shape.block_tables + task.seq * shape.max_blocks + begin / BLOCK_SIZE;
        for (long i = 0; i < pieces; i++) {
            slots[i] = ((long)table[i] * shape.heads.kv + task.kv_head) * BLOCK_SIZE;
            keys[i] = (const Element*)p.pool.keys + slots[i] * shape.heads.dim;
            values[i] = (const Element*)p.pool.values + slots[i] * shape.heads.dim;
        }
    }
    void widen_scales(const KvPool& pool, Space& space) const {
        if constexpr (Kv::SCALED)
            for (long i = 0; i < pieces * BLOCK_SIZE; i++) {
                const long slot = slots[i / BLOCK_SIZE] + i % BLOCK_SIZE;
                space.key_scales[i] = pool.key_scales[slot] * Kv::FACTOR;
                space.value_scales[i] = pool.value_scales[slot] * Kv::FACTOR;
            }
    }
    // Fetches this segment's share of keys for step `step` of `steps`.
    void fetch_keys(const KvPool& pool, long dim, long step, long steps) const {
        for (long i = pieces * step / steps; i < pieces * (step + 1) / steps; i++) {
            fetch(keys[i], BLOCK_SIZE * dim * sizeof(Element));
            if constexpr (Kv::SCALED) {
                fetch(pool.key_scales + slots[i], BLOCK_SIZE * sizeof(float));
                fetch(pool.value_scales + slots[i], BLOCK_SIZE * sizeof(float));
            }
        }
    }
};

// What one row sees of a segment, [start, stop) counted from its begin, and its softmax there.
struct Seen {
    int32_t start, stop;
    float maximum, sum;
};

// The row's scores, [width], become weights.
template <class Kv>
INLINE Seen weigh_scores(const Attention& shape, const Segment<Kv>& segment, long position, long width, float* scores,
                         const Space& space) {
    vi lane;
    for (int i = 0; i < VL; i++) lane[i] = i;
    Seen seen;
    seen.stop = (int32_t)(least(segment.end, position + 1) - segment.begin);
    seen.start = (int32_t)(shape.window ? most(0, position - shape.window + 1 - segment.begin) : 0);
    vf top = splat(LOWEST);
    for (long key = 0; key < width; key += VL) {
        vi index = lane + (int32_t)key;
        vf x = load(scores + key);
        if constexpr (Kv::SCALED) x *= load(space.key_scales + key);
        x = ((index >= seen.start) & (index < seen.stop)) ? x : splat(LOWEST);
        store(scores + key, x);
        top = vmax(top, x);
    }
    seen.maximum = hmax(top);
    vf sum{}, shift = splat(seen.maximum);
    for (long key = 0; key < width; key += VL) {
        vi index = lane + (int32_t)key;
        vf weight = vexp(load(scores + key) - shift);
        weight = ((index >= seen.start) & (index < seen.stop)) ? weight : vf{};
        sum += weight;
        if constexpr (Kv::SCALED) {
            vf scaled = weight * load(space.value_scales + key);
            scaled = scaled < splat(SMALLEST) ? vf{} : scaled;
            weight = ((index >= seen.start) & (index < seen.stop)) ? scaled : vf{};
        }
        store(scores + key, weight);
    }
    seen.sum = hsum(sum);
    return seen;
}

// Joins a segment's (maximum, sum, values) of one row to the running ones, to = [maximum, sum, values[dim]].
void merge_row(float* to, float maximum, float sum, const float* values, long dim) {
    const float top = to[0] > maximum ? to[0] : maximum;
    const vf old_scale = vexp(splat(to[0] - top)), new_scale = vexp(splat(maximum - top));
    to[0] = top;
    to[1] = to[1] * old_scale[0] + sum * new_scale[0];
    for (long i = 0; i < dim; i += VL) store(to + 2 + i, load(to + 2 + i) * old_scale + load(values + i) * new_scale);
}

// The same for a row's weighted values, where value(key, d) gives a vector of the segment's. A NaN may come from a key
// that this row does not see, with weight 0: then only those that it sees are summed.
template <class F>
INLINE void join_row(const Seen& seen, const float* weights, float* values, long dim, float* state, F value) {
    vf broken{};
    for (long d = 0; d < dim; d += VL) broken += load(values + d) * 0.0f;
    if (hsum(broken) != 0.0f) {
        memset(values, 0, dim * sizeof(float));
        for (long key = seen.start; key < seen.stop; key++) {
            const vf weight = splat(weights[key]);
            for (long d = 0; d < dim; d += VL) store(values + d, load(values + d) + weight * value(key, d));
        }
    }
    merge_row(state, seen.maximum, seen.sum, values, dim);
}

// Few rows, as in decode steps. The sums are those of `attend_many`, term by term.
// scores [R][SEGMENT] of one block's keys; garbage behind a context's end stays in its lanes.
template <class Kv, int R>
void score_block(const float* query, const typename Kv::Element* keys, long dim, float* scores) {
    for (int first = 0; first < BLOCK_SIZE; first += VL) {
        vf sum[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) sum[r] = vf{};
        for (long d = 0; d < dim; d += VL) {
            vf square[VL];
#pragma GCC unroll 16
            for (int i = 0; i < VL; i++) square[i] = Kv::widen(keys + (first + i) * dim + d);
            transpose(square);
#pragma GCC unroll 16
            for (int i = 0; i < VL; i++)
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) sum[r] += splat(query[r * dim + d + i]) * square[i];
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) store(scores + r * SEGMENT + first, sum[r]);
    }
}

// out [R][dim] = weights [R][SEGMENT] times the values of `count` keys, NV vectors of dim from d on.
template <class Kv, int R, int NV>
INLINE void weigh_columns(const float* weights, const typename Kv::Element* const* blocks, long count, long dim, long d,
                          float* out) {
    vf sum[R][NV];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int v = 0; v < NV; v++) sum[r][v] = vf{};
    for (long piece = 0; piece * BLOCK_SIZE < count; piece++) {
        const typename Kv::Element* from = blocks[piece] + d;
        const float* block_weights = weights + piece * BLOCK_SIZE;
        for (long i = 0; i < least(BLOCK_SIZE, count - piece * BLOCK_SIZE); i++) {
            vf value[NV];
#pragma GCC unroll 2
            for (int v = 0; v < NV; v++) value[v] = Kv::widen(from + i * dim + v * VL);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                const vf weight = splat(block_weights[r * SEGMENT + i]);
#pragma GCC unroll 2
                for (int v = 0; v < NV; v++) sum[r][v] += weight * value[v];
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int v = 0; v < NV; v++) store(out + r * dim + d + v * VL, sum[r][v]);
}

template <class Kv, int R>
__attribute__((noinline)) void attend_few(const Problem& p, const Task& task, const Segment<Kv>& segment,
                                          const Segment<Kv>& next, const float* query, float* state, Space& space) {
    constexpr int NV = VL == 16 ? 2 : 1;
    const long dim = p.shape.heads.dim, count = segment.end - segment.begin;
    for (long i = 0; i < segment.pieces; i++) {
        score_block<Kv, R>(query, segment.keys[i], dim, space.scores + i * BLOCK_SIZE);
        fetch(segment.values[i], BLOCK_SIZE * dim * sizeof(typename Kv::Element));
        next.fetch_keys(p.pool, dim, i, segment.pieces);
    }
    Seen seen[R];
    for (int r = 0; r < R; r++)
        seen[r] = weigh_scores(p.shape, segment, task.position + r / p.shape.group(), segment.pieces * BLOCK_SIZE,
                               space.scores + r * SEGMENT, space);
    long d = 0;
    for (; d + NV * VL <= dim; d += NV * VL)
        weigh_columns<Kv, R, NV>(space.scores, segment.values, count, dim, d, space.values);
    for (; d < dim; d += VL) weigh_columns<Kv, R, 1>(space.scores, segment.values, count, dim, d, space.values);
    for (int r = 0; r < R; r++)
        join_row(seen[r], space.scores + r * SEGMENT, space.values + r * dim, dim, state + r * (dim + 2),
                 [&](long key, long d) { return Kv::widen(segment.values[key / BLOCK_SIZE] + key % BLOCK_SIZE * dim + d); });
}

// c[R][NV * VL] (+)= a[R][k] b[k][NV * VL], with b in pieces of `piece` rows.
template <int R, int NV>
void product(const float* a, long a_stride, const float* const* b, long pieces, long piece, long b_stride, long k,
             float* c, long c_stride) {
    vf sum[R][NV];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < NV; v++) sum[r][v] = vf{};
    for (long part = 0; part < pieces; part++) {
        const float* rows = b[part];
        long count = least(piece, k - part * piece);
        for (long i = 0; i < count; i++) {
            vf weights[NV];
#pragma GCC unroll 8
            for (int v = 0; v < NV; v++) weights[v] = load(rows + i * b_stride + v * VL);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                vf x = splat(a[r * a_stride + part * piece + i]);
#pragma GCC unroll 8
                for (int v = 0; v < NV; v++) sum[r][v] += x * weights[v];
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < NV; v++) store(c + r * c_stride + v * VL, sum[r][v]);
}

template <int R>
void product_columns(const float* a, long a_stride, const float* const* b, long pieces, long piece, long b_stride,
                     long k, float* c, long c_stride, long columns) {
    const float* shifted[SEGMENT_BLOCKS];
    for (long column = 0; column < columns;) {
        for (long part = 0; part < pieces; part++) shifted[part] = b[part] + column;
        long left = (columns - column) / VL;
        float* to = c + column;
        if (left >= 4) {
            product<R, 4>(a, a_stride, shifted, pieces, piece, b_stride, k, to, c_stride);
            column += 4 * VL;
        } else if (left >= 2) {
            product<R, 2>(a, a_stride, shifted, pieces, piece, b_stride, k, to, c_stride);
            column += 2 * VL;
        } else {
            product<R, 1>(a, a_stride, shifted, pieces, piece, b_stride, k, to, c_stride);
            column += VL;
        }
    }
}

void product_rows(long rows, const float* a, long a_stride, const float* const* b, long pieces, long piece,
                  long b_stride, long k, float* c, long c_stride, long columns) {
    switch (rows) {
        case 1: return product_columns<1>(a, a_stride, b, pieces, piece, b_stride, k, c, c_stride, columns);
        case 2: return product_columns<2>(a, a_stride, b, pieces, piece, b_stride, k, c, c_stride, columns);
        case 3: return product_columns<3>(a, a_stride, b, pieces, piece, b_stride, k, c, c_stride, columns);
        case 4: return product_columns<4>(a, a_stride, b, pieces, piece, b_stride, k, c, c_stride, columns);
        case 5: return product_columns<5>(a, a_stride, b, pieces, piece, b_stride, k, c, c_stride, columns);
        default: return product_columns<6>(a, a_stride, b, pieces, piece, b_stride, k, c, c_stride, columns);
    }
}

// Any number of rows: the segment's keys are transposed once for all of them.
template <class Kv>
__attribute__((noinline)) void attend_many(const Problem& p, const Task& task, const Segment<Kv>& segment,
                                           const Segment<Kv>& next, const float* query, float* state, Space& space) {
    typedef typename Kv::Element Element;
    const long dim = p.shape.heads.dim, group = p.shape.group(), rows = task.count * group;
    const long keys = segment.end - segment.begin, pieces = segment.pieces;
    for (long key = 0; key < pieces * BLOCK_SIZE; key += VL) {
        const long piece = key / BLOCK_SIZE, first = key % BLOCK_SIZE;
        for (long d = 0; d < dim; d += VL) {
            vf square[VL];
#pragma GCC unroll 16
            for (int i = 0; i < VL; i++) square[i] = Kv::widen(segment.keys[piece] + (first + i) * dim + d);
            transpose(square);
#pragma GCC unroll 16
            for (int i = 0; i < VL; i++) store(space.keys + (d + i) * SEGMENT + key, square[i]);
        }
        fetch(segment.values[piece] + first * dim, VL * dim * sizeof(Element));
        if (first == 0) next.fetch_keys(p.pool, dim, piece, pieces);
    }
    const float* value_rows[SEGMENT_BLOCKS];
    for (long i = 0; i < pieces; i++) {
        if constexpr (std::is_same_v<Element, float>) {
            value_rows[i] = segment.values[i];
        } else {
            float* to = space.wide + i * BLOCK_SIZE * dim;
            const long count = least(BLOCK_SIZE, keys - i * BLOCK_SIZE) * dim;
            for (long j = 0; j < count; j += VL) store(to + j, Kv::widen(segment.values[i] + j));
            value_rows[i] = to;
        }
    }
    const float* transposed[1] = {space.keys};
    const long step = ceil_div(rows, ceil_div(rows, ROWS));
    for (long r0 = 0; r0 < rows; r0 += step) {
        const long height = least(step, rows - r0);
        // Keys past the last of these rows would all be masked.
        const long seen_keys = least(keys, task.position + (r0 + height - 1) / group + 1 - segment.begin);
        if (seen_keys <= 0) continue;
        const long seen_pieces = ceil_div(seen_keys, BLOCK_SIZE), width = seen_pieces * BLOCK_SIZE;
        product_rows(height, query + r0 * dim, dim, transposed, 1, dim, SEGMENT, dim, space.scores, SEGMENT, width);
        Seen seen[ROWS];
        for (long r = 0; r < height; r++)
            seen[r] = weigh_scores(p.shape, segment, task.position + (r0 + r) / group, width,
                                   space.scores + r * SEGMENT, space);
        product_rows(height, space.scores, SEGMENT, value_rows, seen_pieces, BLOCK_SIZE, dim, seen_keys, space.values,
                     dim, dim);
        for (long r = 0; r < height; r++)
            join_row(seen[r], space.scores + r * SEGMENT, space.values + r * dim, dim, state + (r0 + r) * (dim + 2),
                     [&](long key, long d) { return load(value_rows[key / BLOCK_SIZE] + key % BLOCK_SIZE * dim + d); });
    }
}

// One segment against all rows of a task, joined to the running (maximum, sum, values[dim]) of each row in `state`;
// `next`, which may be empty, is fetched meanwhile.
template <class Kv>
void attend_segment(const Problem& p, const Task& task, const Segment<Kv>& segment, const Segment<Kv>& next,
                    const float* query, float* state, Space& space) {
    segment.widen_scales(p.pool, space);
    static constexpr decltype(&attend_many<Kv>) few[] = {
        nullptr,           attend_few<Kv, 1>, attend_few<Kv, 2>, attend_few<Kv, 3>, attend_few<Kv, 4>,
        attend_few<Kv, 5>, attend_few<Kv, 6>, attend_few<Kv, 7>, attend_few<Kv, 8>};
    const long rows = task.count * p.shape.group();
    (rows <= FEW ? few[rows] : attend_many<Kv>)(p, task, segment, next, query, state, space);
}

}  // namespace
