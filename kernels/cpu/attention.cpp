// Causal attention over the block pool, for any mix of decode and prefill sequences.
//
// Keys are taken in segments of SEGMENT positions, counted from position 0. Each segment gets its own softmax maximum,
// sum and weighted values, and segments are merged in order of position. A query's result therefore has the same bits
// however its sequence was cut into chunks, batched, or shared among threads. Slots behind a context's end are read
// within its last block, whatever they hold, and their scores masked.
//
// Elements of the pool are widened as a segment is read. Scales, where it has them, are those of a slot: a key's goes
// onto its scores, a value's onto its weights.

#include "attention_segment.h"

namespace {

constexpr int TILE_ROWS = 96;  // query rows (tokens x heads that share a kv head) per task

// Not inlined: the compiler would ask for the address again and again, in the middle of loops.
__attribute__((noinline)) Space& own_space() {
    static thread_local Space space;
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

// Every task by one thread.
template <class Kv>
void run_tasks(const Problem& p, Team& team) {
    const Attention& shape = p.shape;
    const long dim = shape.heads.dim, count = (long)shape.tasks.size();
    Space& space = own_space();
    team.each(count, [&](long index, long following) {
        const Task& task = shape.tasks[index];
        const long rows = task.count * shape.group(), last = end_segment(task) - 1;
        float* query = space.query.get(rows * dim);
        float* state = space.state.get(rows * (dim + 2));
        gather_queries(p, task, query);
        clear_state(state, rows, dim + 2);
        Segment<Kv> segment(p, task, first_segment(task));
        for (long i = first_segment(task); i <= last; i++) {
            Segment<Kv> next;
            if (i < last)
                next = Segment<Kv>(p, task, i + 1);
            else if (following < count)
                next = Segment<Kv>(p, shape.tasks[following], first_segment(shape.tasks[following]));
            attend_segment(p, task, segment, next, query, state, space);
            segment = next;
        }
        write_result(p, task, state);
    });
    team.barrier();
}

// Every (task, segment) is computed apart, and the segments are merged after.
template <class Kv>
void run_units(const Problem& p, float* partial, Team& team) {
    const Attention& shape = p.shape;
    const long dim = shape.heads.dim, stride = dim + 2, count = (long)shape.units.size();
    Space& space = own_space();
    const auto segment_of = [&](long index) {
        const Attention::Unit& unit = shape.units[index];
        return Segment<Kv>(p, shape.tasks[unit.task], unit.segment);
    };
    team.each(count, [&](long index, long following) {
        const Attention::Unit& unit = shape.units[index];
        const Task& task = shape.tasks[unit.task];
        const long rows = task.count * shape.group();
        float* query = space.query.get(rows * dim);
        gather_queries(p, task, query);
        clear_state(partial + unit.offset, rows, stride);
        const Segment<Kv> next = following < count ? segment_of(following) : Segment<Kv>();
        attend_segment(p, task, segment_of(index), next, query, partial + unit.offset, space);
    });
    team.barrier();
    team.share((long)shape.tasks.size(), [&](long begin, long end) {
        long at = 0;
        while (at < count && shape.units[at].task < begin) at++;
        for (long i = begin; i < end; i++) {
            const long rows = shape.tasks[i].count * shape.group();
            float* state = space.state.get(rows * stride);
            clear_state(state, rows, stride);
            for (; at < count && shape.units[at].task == i; at++)
                for (long r = 0; r < rows; r++) {
                    const float* part = partial + shape.units[at].offset + r * stride;
                    merge_row(state + r * stride, part[0], part[1], part + 2, dim);
                }
            write_result(p, shape.tasks[i], state);
        }
    });
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
    with_kv(pool.kind, [&](auto kv) {
        if (attention.units.empty())
            run_tasks<decltype(kv)>(p, team);
        else
            run_units<decltype(kv)>(p, space, team);
    });
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
