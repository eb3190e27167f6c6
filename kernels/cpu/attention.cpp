// Causal attention over the block pool, for any mix of decode and prefill sequences.
//
// Keys are taken in segments of SEGMENT positions, counted from position 0. Each segment gets its own softmax maximum,
// sum and weighted values, and segments are merged in order of position. A query's result therefore has the same bits
// however its sequence was cut into chunks, batched, or shared among threads. Only slots inside the context are read.
//
// Elements of the pool are widened as a segment is read. Scales, where it has them, are those of a slot: a key's goes
// onto its scores, a value's onto its weights.

#include "common.h"
#include "kernels.h"

#include <type_traits>
#include <vector>

namespace {

constexpr int BLOCK_SIZE = 16;    // slots per KV block
constexpr int SEGMENT = 128;      // positions
constexpr int SEGMENT_BLOCKS = SEGMENT / BLOCK_SIZE;
constexpr int MAX_DIM = 256;
constexpr int TILE_ROWS = 96;     // query rows (tokens x heads that share a kv head) per task
constexpr int ROWS = VL == 16 ? 6 : 3;  // rows of a register tile: ROWS x 4 accumulators
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

// Per-thread working space.
struct Space {
    alignas(64) float keys[MAX_DIM * SEGMENT];     // [dim][SEGMENT]: the segment's keys, transposed
    alignas(64) float wide[SEGMENT * MAX_DIM];     // [slot][dim]: its values, where the pool's are not float32
    alignas(64) float key_scales[SEGMENT];         // of its slots; those outside the context may be anything
    alignas(64) float value_scales[SEGMENT];
    alignas(64) float scores[ROWS * SEGMENT];
    alignas(64) float values[ROWS * MAX_DIM];
    alignas(64) float zeros[MAX_DIM];
    Scratch query, state;                          // [rows][dim] scaled queries; [rows][dim + 2] running results
};

// Not inlined: the compiler would ask for the address again and again, in the middle of loops.
__attribute__((noinline)) Space& own_space() {
    static thread_local Space space;  // zeroed, and `zeros` stays so
    return space;
}

// Rows of a task: row r is token r / group, head kv_head * group + r % group.
void gather_queries(const Problem& p, const Task& task, float* to) {
    const long group = p.shape.group(), dim = p.shape.heads.dim;
    for (long r = 0; r < task.count * group; r++) {
        const float* from = p.q + (task.token + r / group) * p.shape.q_stride + (task.kv_head * group + r % group) * dim;
        for (long i = 0; i < dim; i++) to[r * dim + i] = from[i] * p.scale;
    }
}

// Joins a segment's (maximum, sum, values) of one row to the running ones, to = [maximum, sum, values[dim]].
void merge_row(float* to, float maximum, float sum, const float* values, long dim) {
    const float top = to[0] > maximum ? to[0] : maximum;
    const vf old_scale = vexp(splat(to[0] - top)), new_scale = vexp(splat(maximum - top));
    to[0] = top;
    to[1] = to[1] * old_scale[0] + sum * new_scale[0];
    for (long i = 0; i < dim; i += VL) store(to + 2 + i, load(to + 2 + i) * old_scale + load(values + i) * new_scale);
}

INLINE void fetch(const void* from, long bytes) {
    for (long i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)from + i, 0, 2);
}

// One segment against all rows of a task, joined to the running (maximum, sum, values[dim]) of each row in `state`.
template <class Kv>
__attribute__((noinline)) void attend_segment(const Problem& p, const Task& task, long segment, const float* query,
                                              float* state, Space& space) {
    typedef typename Kv::Element Element;
    const Attention& shape = p.shape;
    const long dim = shape.heads.dim, group = shape.group(), rows = task.count * group, stride = dim + 2;
    const long begin = most(segment * SEGMENT, task.first_key / BLOCK_SIZE * BLOCK_SIZE);
    const long end = least((segment + 1) * SEGMENT, task.last_key);
    const long pieces = ceil_div(end - begin, BLOCK_SIZE), keys = end - begin;
    const int32_t* table = shape.block_tables + task.seq * shape.max_blocks + begin / BLOCK_SIZE;
    const Element *key_pool = (const Element*)p.pool.keys, *value_pool = (const Element*)p.pool.values;
    const Element *key_blocks[SEGMENT_BLOCKS], *value_blocks[SEGMENT_BLOCKS];
    const auto slot_of = [&](long i) { return ((long)table[i] * shape.heads.kv + task.kv_head) * BLOCK_SIZE; };
    for (long i = 0; i < pieces; i++) {
        const long slot = slot_of(i);
        key_blocks[i] = key_pool + slot * dim;
        value_blocks[i] = value_pool + slot * dim;
        if constexpr (Kv::SCALED)
            for (long j = 0; j < BLOCK_SIZE; j++) {
                space.key_scales[i * BLOCK_SIZE + j] = p.pool.key_scales[slot + j] * Kv::FACTOR;
                space.value_scales[i * BLOCK_SIZE + j] = p.pool.value_scales[slot + j] * Kv::FACTOR;
            }
    }
    for (long key = 0; key < pieces * BLOCK_SIZE; key += VL) {
        const long piece = key / BLOCK_SIZE;
        const Element* lines[VL];
        for (int i = 0; i < VL; i++)
            lines[i] = key + i < keys ? key_blocks[piece] + (key + i) % BLOCK_SIZE * dim : (const Element*)space.zeros;
        for (long d = 0; d < dim; d += VL) {
            vf square[VL];
#pragma GCC unroll 16
            for (int i = 0; i < VL; i++) square[i] = Kv::widen(lines[i] + d);
            transpose(square);
#pragma GCC unroll 16
            for (int i = 0; i < VL; i++) store(space.keys + (d + i) * SEGMENT + key, square[i]);
        }
        // The values of these keys come next, and the keys of the next segment after that.
        const long offset = key % BLOCK_SIZE * dim, bytes = VL * dim * sizeof(Element);
        fetch(value_blocks[piece] + offset, bytes);
        if (begin + SEGMENT + key < task.last_key) {
            const long later = slot_of(piece + SEGMENT_BLOCKS);
            fetch(key_pool + later * dim + offset, bytes);
            if constexpr (Kv::SCALED) {
                fetch(p.pool.key_scales + later, BLOCK_SIZE * sizeof(float));
                fetch(p.pool.value_scales + later, BLOCK_SIZE * sizeof(float));
            }
        }
    }
    const float* value_rows[SEGMENT_BLOCKS];
    for (long i = 0; i < pieces; i++) {
        if constexpr (std::is_same_v<Element, float>) {
            value_rows[i] = value_blocks[i];
        } else {
            float* to = space.wide + i * BLOCK_SIZE * dim;
            const long count = least(BLOCK_SIZE, keys - i * BLOCK_SIZE) * dim;
            for (long j = 0; j < count; j += VL) store(to + j, Kv::widen(value_blocks[i] + j));
            value_rows[i] = to;
        }
    }
    const float* transposed[1] = {space.keys};
    vi lane;
    for (int i = 0; i < VL; i++) lane[i] = i;

    const long step = ceil_div(rows, ceil_div(rows, ROWS));
    for (long r0 = 0; r0 < rows; r0 += step) {
        const long height = least(step, rows - r0);
        // Keys past the last of these rows would all be masked.
        const long seen = least(keys, task.position + (r0 + height - 1) / group + 1 - begin);
        if (seen <= 0) continue;
        const long seen_pieces = ceil_div(seen, BLOCK_SIZE), width = seen_pieces * BLOCK_SIZE;
        product_rows(height, query + r0 * dim, dim, transposed, 1, dim, SEGMENT, dim, space.scores, SEGMENT,
                     width);
        float maxima[ROWS], sums[ROWS];
        int32_t starts[ROWS], stops[ROWS];
        for (long r = 0; r < height; r++) {
            float* scores = space.scores + r * SEGMENT;
            const long position = task.position + (r0 + r) / group;
            const int32_t stop = (int32_t)(least(end, position + 1) - begin);
            const int32_t start = (int32_t)(shape.window ? most(0, position - shape.window + 1 - begin) : 0);
            starts[r] = start;
            stops[r] = stop;
            vf top = splat(LOWEST);
            for (long key = 0; key < width; key += VL) {
                vi index = lane + (int32_t)key;
                vf x = load(scores + key);
                if constexpr (Kv::SCALED) x *= load(space.key_scales + key);
                x = ((index >= start) & (index < stop)) ? x : splat(LOWEST);
                store(scores + key, x);
                top = vmax(top, x);
            }
            maxima[r] = hmax(top);
            vf sum{}, shift = splat(maxima[r]);
            for (long key = 0; key < width; key += VL) {
                vi index = lane + (int32_t)key;
                vf weight = vexp(load(scores + key) - shift);
                weight = ((index >= start) & (index < stop)) ? weight : vf{};
                sum += weight;
                if constexpr (Kv::SCALED) {
                    vf scaled = weight * load(space.value_scales + key);
                    scaled = scaled < splat(SMALLEST) ? vf{} : scaled;
                    weight = ((index >= start) & (index < stop)) ? scaled : vf{};
                }
                store(scores + key, weight);
            }
            sums[r] = hsum(sum);
        }
        product_rows(height, space.scores, SEGMENT, value_rows, seen_pieces, BLOCK_SIZE, dim, seen, space.values, dim,
                     dim);
        for (long r = 0; r < height; r++) {
            float* values = space.values + r * dim;
            vf broken{};
            for (long d = 0; d < dim; d += VL) broken += load(values + d) * 0.0f;
            if (hsum(broken) != 0.0f) {  // a NaN: it may come from a key that this row does not see, with weight 0
                memset(values, 0, dim * sizeof(float));
                for (long key = starts[r]; key < stops[r]; key++) {
                    const vf weight = splat(space.scores[r * SEGMENT + key]);
                    const float* from = value_rows[key / BLOCK_SIZE] + key % BLOCK_SIZE * dim;
                    for (long d = 0; d < dim; d += VL) store(values + d, load(values + d) + weight * load(from + d));
                }
            }
            merge_row(state + (r0 + r) * stride, maxima[r], sums[r], values, dim);
        }
    }
}

void clear_state(float* state, long rows, long stride) {
    for (long r = 0; r < rows; r++) {
        memset(state + r * stride, 0, stride * sizeof(float));
        state[r * stride] = LOWEST;
    }
}

void write_result(const Problem& p, const Task& task, const float* state) {
    const long group = p.shape.group(), dim = p.shape.heads.dim, stride = dim + 2;
    for (long r = 0; r < task.count * group; r++) {
        const float* from = state + r * stride;
        float* to = p.out + ((task.token + r / group) * p.shape.heads.q + task.kv_head * group + r % group) * dim;
        const vf inverse = splat(1.0f / from[1]);
        for (long i = 0; i < dim; i += VL) store(to + i, load(from + 2 + i) * inverse);
    }
}

long first_segment(const Task& task) { return task.first_key / SEGMENT; }
long end_segment(const Task& task) { return ceil_div(task.last_key, SEGMENT); }

template <class Kv>
void run_task(const Problem& p, const Task& task, Space& space) {
    const long rows = task.count * p.shape.group(), dim = p.shape.heads.dim;
    float* query = space.query.get(rows * dim);
    float* state = space.state.get(rows * (dim + 2));
    gather_queries(p, task, query);
    clear_state(state, rows, dim + 2);
    for (long segment = first_segment(task); segment < end_segment(task); segment++)
        attend_segment<Kv>(p, task, segment, query, state, space);
    write_result(p, task, state);
}

// Every (task, segment) is computed apart, and the segments are merged after.
template <class Kv>
void run_units(const Problem& p, float* partial, Team& team) {
    const Attention& shape = p.shape;
    const long dim = shape.heads.dim, stride = dim + 2;
    Space& space = own_space();
    for (long i; (i = team.grab()) < (long)shape.units.size();) {
        const Attention::Unit& unit = shape.units[i];
        const Task& task = shape.tasks[unit.task];
        const long rows = task.count * shape.group();
        float* query = space.query.get(rows * dim);
        gather_queries(p, task, query);
        clear_state(partial + unit.offset, rows, stride);
        attend_segment<Kv>(p, task, unit.segment, query, partial + unit.offset, space);
    }
    team.barrier();
    team.share((long)shape.tasks.size(), [&](long begin, long end) {
        long at = 0;
        while (at < (long)shape.units.size() && shape.units[at].task < begin) at++;
        for (long i = begin; i < end; i++) {
            const long rows = shape.tasks[i].count * shape.group();
            float* state = space.state.get(rows * stride);
            clear_state(state, rows, stride);
            for (; at < (long)shape.units.size() && shape.units[at].task == i; at++)
                for (long r = 0; r < rows; r++) {
                    const float* part = partial + shape.units[at].offset + r * stride;
                    merge_row(state + r * stride, part[0], part[1], part + 2, dim);
                }
            write_result(p, shape.tasks[i], state);
        }
    });
    team.barrier();
}

template <class Kv>
void run(const Problem& p, float* space, Team& team) {
    if (!p.shape.units.empty()) return run_units<Kv>(p, space, team);
    for (long i; (i = team.grab()) < (long)p.shape.tasks.size();) run_task<Kv>(p, p.shape.tasks[i], own_space());
    team.barrier();
}

}  // namespace

long plan_attention(Attention& a, long num_blocks, int threads) {
    const long tile = most(1, TILE_ROWS / a.group());
    long longest = 0, total = 0;
    for (long seq = 0; seq < a.num_seqs; seq++) {
        const long count = a.query_starts[seq + 1] - a.query_starts[seq], base = a.context_lens[seq] - count;
        for (long first = 0; first < count; first += tile) {
            const long size = least(tile, count - first), position = base + first;
            const long first_key = a.window ? most(0, position - a.window + 1) : 0, last_key = position + size;
            for (long i = first_key / BLOCK_SIZE; i < ceil_div(last_key, BLOCK_SIZE); i++) {
                const int32_t block = a.block_tables[seq * a.max_blocks + i];
                if (block < 0 || block >= num_blocks) return seq + 1;
            }
            for (long head = 0; head < a.heads.kv; head++) {
                a.tasks.push_back({seq, head, a.query_starts[seq] + first, position, size, first_key, last_key});
                const long work = (end_segment(a.tasks.back()) - first_segment(a.tasks.back())) * size;
                longest = most(longest, work);
                total += work;
            }
        }
    }
    if (longest * threads > total + total / 2)
        for (size_t i = 0; i < a.tasks.size(); i++)
            for (long segment = first_segment(a.tasks[i]); segment < end_segment(a.tasks[i]); segment++) {
                a.units.push_back({(long)i, segment, a.space});
                a.space += a.tasks[i].count * a.group() * (a.heads.dim + 2);
            }
    return 0;
}

void attend(const Attention& attention, const float* q, const KvPool& pool, float scale, float* out, float* space,
            Team& team) {
    const Problem p{attention, q, pool, scale, out};
    with_kv(pool.kind, [&](auto kv) { run<decltype(kv)>(p, space, team); });
}

EXPORT long mr_attention_max_dim() { return MAX_DIM; }
EXPORT long mr_attention_dim_step() { return VL; }

// Returns 0, or 1 + the sequence whose block table names a block that the pool does not have.
EXPORT long mr_attention(const float* q, const KvPool* pool, const int32_t* query_starts, const int32_t* context_lens,
                         const int32_t* block_tables, float* out, long num_seqs, long max_blocks, long num_blocks,
                         long num_heads, long num_kv_heads, long dim, long q_stride, long window, float scale,
                         int threads) {
    static thread_local Scratch scratch;
    Attention attention{{num_heads, num_kv_heads, dim}, query_starts, context_lens, block_tables, num_seqs, max_blocks,
                        q_stride, window, {}, {}};
    const long bad = plan_attention(attention, num_blocks, threads);
    if (bad) return bad;
    float* space = scratch.get(attention.space);
    with_team(threads, [&](Team& team) { attend(attention, q, *pool, scale, out, space, team); });
    return 0;
}
