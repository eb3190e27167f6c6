// From rows of logits to one token each: maxima of blocks of neighbouring ids, sums of weights over blocks of ids that
// lie far apart, and the draw, which then reads little more than those. What each step means stands in
// numpy_sampling.py; ids are drawn in the same order there, and weights differ in the last bits of exp.
//
// Every sum is one thread's, and adds up in the same order however a row is cut into pieces: a row's token is the same in
// every batch and for any number of threads.

#include "sampling_passes.h"
#include "sampling_ranking.h"
#include "team.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

namespace {

constexpr long MAXIMA_PIECE = 32;  // blocks whose maxima are found at a time

// DRAW_DTYPE of kernels/sampling.py.
struct Settings {
    uint64_t seed;
    uint64_t choice;
    int64_t position;
    int64_t greedy;
    int64_t top_k;  // vocab or more is off
    double top_p, min_p, temperature;
};

struct Problem {
    const float* logits;  // [..][stride]
    long stride, vocab;
    const int64_t* source;  // [count], row of the logits
    const int64_t* rows;    // [count], row of the table
    const Settings* table;
    long blocks() const { return ceil_div(vocab, BLOCK); }
    const float* row(long i) const { return logits + source[i] * stride; }
    const Settings& settings(long i) const { return table[rows[i]]; }
    // Whether the mass of the whole vocabulary is asked for.
    bool needs_sums(long i) const {
        const Settings& s = settings(i);
        return !s.greedy && s.min_p <= 0.0 && s.top_k >= vocab;
    }
};

// Philox4x32-10 (Salmon et al. 2011) of (position, choice) under the seed: 53 bits in [0, 1), as in philox.py.
double uniform(const Settings& s) {
    const uint64_t position = s.position;
    uint32_t c[4] = {(uint32_t)position, (uint32_t)s.choice, (uint32_t)(position >> 32), 0};
    uint32_t key[2] = {(uint32_t)s.seed, (uint32_t)(s.seed >> 32)};
    for (int round = 0; round < 10; round++) {
        const uint64_t a = 0xD2511F53ull * c[0], b = 0xCD9E8D57ull * c[2];
        const uint32_t next[4] = {(uint32_t)(b >> 32) ^ c[1] ^ key[0], (uint32_t)b, (uint32_t)(a >> 32) ^ c[3] ^ key[1],
                                  (uint32_t)a};
        memcpy(c, next, sizeof c);
        key[0] += 0x9E3779B9u;
        key[1] += 0xBB67AE85u;
    }
    return (double)((uint64_t)(c[0] >> 5) << 26 | c[1] >> 6) * 0x1p-53;
}

// The target, or less where rounding would take it past the last id that has weight.
double below(double target, double total) { return std::min(target, std::nextafter(total, 0.0)); }

int32_t most_likely(const float* x, const float* maxima, float row_max) {
    long id = 0;
    while (maxima[id / BLOCK] != row_max) id += BLOCK;
    while (x[id] != row_max) id++;
    return (int32_t)id;
}

// Inverts the CDF over all ids, in the order of the blocks of block_sums.
int32_t draw_from_all(const float* x, long vocab, const float* sums, const Weight& weight, double u) {
    const long blocks = ceil_div(vocab, BLOCK);
    double total = 0.0;
    for (long j = 0; j < blocks; j++) total += sums[j];
    double target = below(u * total, total), running = 0.0;
    long block = 0;
    for (; running + sums[block] <= target; block++) running += sums[block];
    float lanes[BLOCK];
    for (long p = 0; p < BLOCK; p++) lanes[p] = block + p * blocks < vocab ? x[block + p * blocks] : -INFINITY;
    for (long p = 0; p < BLOCK; p += VL) store(lanes + p, weight(load(lanes + p)));
    long last = block;
    for (long p = 0; p < BLOCK; p++) {
        if (lanes[p] == 0.0f) continue;
        last = block + p * blocks;
        running += lanes[p];
        if (running > target) break;
    }
    return (int32_t)last;
}

// The logit below which a weight is surely below `weight`, with room for rounding.
double reach(float row_max, double temperature, double weight) {
    const double depth = temperature * std::log(std::max(weight, (double)FLT_MIN));
    return row_max + depth - 1e-5 * (1.0 + std::fabs(row_max) - depth);
}

// A lower bound of the k-th largest logit: k blocks have a maximum that reaches it.
float kth_block_maximum(const float* maxima, long blocks, long k, float* spare) {
    memcpy(spare, maxima, blocks * sizeof(float));
    std::nth_element(spare, spare + k - 1, spare + blocks, [](float a, float b) { return a > b; });
    return spare[k - 1];
}

// min_p, then top_k, then top_p over what those two keep: each keeps a beginning of the order of likelihood, in which
// the CDF is inverted.
int32_t draw_from_cut(const Problem& p, const float* x, const Settings& s, const float* maxima, const float* sums,
                      float row_max, const Weight& weight, double u) {
    static thread_local Scratch space;
    const long vocab = p.vocab, blocks = p.blocks(), room = (ceil_div(vocab, VL) + 1) * VL;
    float* memory = space.get(8 * room);
    auto columns = [&] {
        Entries e{memory, memory + room, (int32_t*)memory + 2 * room, (int32_t*)memory + 3 * room, 0};
        memory += 4 * room;
        return e;
    };
    Entries entries = columns(), spare = columns();
    double bound = reach(row_max, s.temperature, s.min_p), mass = 0.0, light = FLT_MIN;
    if (sums) {
        for (long j = 0; j < blocks; j++) mass += sums[j];
        // Ids of less than this weight have less than (1 - top_p) / 2 of the mass together: the nucleus ends before.
        light = std::max(light, 0.5 * (1.0 - s.top_p) * mass / (double)vocab);
        bound = reach(row_max, s.temperature, light);
    } else if (s.top_k <= blocks) {
        bound = std::max(bound, (double)kth_block_maximum(maxima, blocks, s.top_k, spare.logits));
    }
    collect(x, vocab, maxima, (float)std::max(bound, -(double)FLT_MAX), entries);
    weigh(entries, weight, (float)s.min_p);
    if (sums) narrow(entries, s.top_p * mass, light);
    const Ranking ranking(entries, spare);
    const long kept = least(s.top_k, entries.count);
    double total = mass;
    if (!sums) total = ranking.walk([&](long count, double) { return count >= kept; }).mass;
    if (s.top_p < 1.0) {
        const double wanted = s.top_p * total;
        total = ranking.walk([&](long count, double so_far) { return count >= kept || so_far >= wanted; }).mass;
    }
    const double target = below(u * total, total);
    return ranking.walk([&](long, double so_far) { return so_far > target; }).id;
}

// The token, or what is wrong with the row: the codes BROKEN and EMPTY of kernels/sampling.py.
int32_t draw(const Problem& p, long i, const float* maxima, const float* sums) {
    const float row_max = row_maximum(maxima, p.blocks());
    if (!(row_max <= FLT_MAX)) return -1;
    if (row_max < -FLT_MAX) return -2;
    const float* x = p.row(i);
    const Settings& s = p.settings(i);
    if (s.greedy) return most_likely(x, maxima, row_max);
    const Weight weight(row_max, s.temperature);
    const double u = uniform(s);
    if (p.needs_sums(i) && s.top_p >= 1.0) return draw_from_all(x, p.vocab, sums, weight, u);
    return draw_from_cut(p, x, s, maxima, p.needs_sums(i) ? sums : nullptr, row_max, weight, u);
}

// Blocks to be summed at a time where a row is shared: some pieces for each thread.
long sums_piece(long blocks, int threads) {
    return most(BLOCK, least(SUMS_PIECE, ceil_div(blocks, 4 * threads * BLOCK) * BLOCK));
}

int64_t integer(const void* from, long bytes, long i) {
    return bytes == 4 ? ((const int32_t*)from)[i] : ((const int64_t*)from)[i];
}

}  // namespace

// logits [rows][stride] -> maxima [rows][ceil(vocab / 64)] over neighbouring ids; a NaN makes its block NaN.
EXPORT void mr_block_maxima(const float* logits, long stride, long rows, long vocab, float* maxima, int threads) {
    const long blocks = ceil_div(vocab, BLOCK), pieces = ceil_div(blocks, MAXIMA_PIECE);
    with_team(useful_threads(rows * vocab, threads), [&](Team& team) {
        team.each(rows * pieces, [&](long t, long) {
            const long row = t / pieces, begin = t % pieces * MAXIMA_PIECE, end = least(begin + MAXIMA_PIECE, blocks);
            block_maxima(logits + row * stride, vocab, begin, end, maxima + row * blocks);
        });
    });
}

// logits [rows][stride] -> sums [rows][blocks] of exp(logit - row_max[row]) over ids that lie `blocks` apart.
EXPORT void mr_block_sums(const float* logits, long stride, long rows, long vocab, const float* row_max, float* sums,
                          int threads) {
    const long blocks = ceil_div(vocab, BLOCK), step = sums_piece(blocks, threads), pieces = ceil_div(blocks, step);
    with_team(useful_threads(rows * vocab, threads), [&](Team& team) {
        team.each(rows * pieces, [&](long t, long) {
            const long row = t / pieces, begin = t % pieces * step, end = least(begin + step, blocks);
            const Weight weight(row_max[row], 1.0);
            block_sums(logits + row * stride, vocab, begin, end, weight, sums + row * blocks);
        });
    });
}

// One token for each of `count` distinct rows of the table, or a code below 0; the positions of rows that drew advance.
// Integers of source and rows are of 4 or 8 bytes; without a source, draw i reads row i of the logits. Returns how many
// rows drew nothing; -1, with nothing done, if an index is out of range or a row is named twice or has no settings.
EXPORT long mr_draw_tokens(const float* logits, long stride, long num_logits, long vocab, void* table, long num_rows,
                           const void* source, long source_bytes, const void* rows, long row_bytes, long count,
                           int32_t* tokens, int threads) {
    auto is_size = [](long bytes) { return bytes == 4 || bytes == 8; };
    if (count > num_rows || !is_size(row_bytes) || (source && !is_size(source_bytes))) return -1;
    static thread_local Scratch space, index_space;
    const long blocks = ceil_div(vocab, BLOCK), pieces = ceil_div(blocks, MAXIMA_PIECE);
    int64_t *sources = (int64_t*)index_space.get(4 * count + num_rows), *table_rows = sources + count;
    uint8_t* is_named = (uint8_t*)(table_rows + count);
    memset(is_named, 0, num_rows);
    Settings* settings = (Settings*)table;
    for (long i = 0; i < count; i++) {
        const int64_t from = source ? integer(source, source_bytes, i) : i, row = integer(rows, row_bytes, i);
        if (from < 0 || from >= num_logits || row < 0 || row >= num_rows) return -1;
        if (is_named[row]++ || settings[row].top_k < 1) return -1;
        sources[i] = from;
        table_rows[i] = row;
    }
    const Problem p{logits, stride, vocab, sources, table_rows, settings};
    float *maxima = space.get(2 * count * blocks), *sums = maxima + count * blocks;
    const int threads_used = useful_threads(count * vocab, threads);
    const bool whole_rows = count >= 4 * threads_used;  // a row is read again while a thread has it in its cache
    const long step = whole_rows ? SUMS_PIECE : sums_piece(blocks, threads_used), sum_pieces = ceil_div(blocks, step);
    auto find_maxima = [&](long i, long piece) {
        const long begin = piece * MAXIMA_PIECE;
        block_maxima(p.row(i), vocab, begin, least(begin + MAXIMA_PIECE, blocks), maxima + i * blocks);
    };
    auto weight_of = [&](long i) {
        return Weight(row_maximum(maxima + i * blocks, blocks), p.settings(i).temperature);
    };
    auto sum = [&](long i, long piece, const Weight& weight) {
        const long begin = piece * step;
        block_sums(p.row(i), vocab, begin, least(begin + step, blocks), weight, sums + i * blocks);
    };
    auto finish = [&](long i) { tokens[i] = draw(p, i, maxima + i * blocks, sums + i * blocks); };
    bool any_sums = false;
    for (long i = 0; i < count; i++) any_sums |= p.needs_sums(i);
    with_team(threads_used, [&](Team& team) {
        if (whole_rows) {
            team.each(count, [&](long i, long) {
                for (long piece = 0; piece < pieces; piece++) find_maxima(i, piece);
                if (p.needs_sums(i)) {
                    const Weight weight = weight_of(i);
                    for (long piece = 0; piece < sum_pieces; piece++) sum(i, piece, weight);
                }
                finish(i);
            });
            return;
        }
        team.each(count * pieces, [&](long t, long) { find_maxima(t / pieces, t % pieces); });
        team.barrier();
        if (any_sums) {
            team.each(count * sum_pieces, [&](long t, long) {
                const long i = t / sum_pieces;
                if (p.needs_sums(i)) sum(i, t % sum_pieces, weight_of(i));
            });
            team.barrier();
        }
        team.each(count, [&](long i, long) { finish(i); });
    });
    long num_bad = 0;
    for (long i = 0; i < count; i++) {
        num_bad += tokens[i] < 0;
        settings[table_rows[i]].position += tokens[i] >= 0;
    }
    return num_bad;
}
