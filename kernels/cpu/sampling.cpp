// From rows of logits to one token each: maxima of blocks of neighbouring ids, sums of weights over blocks of ids that
// lie far apart, and the draw, which then reads little more than those. What each step means stands in
// torch_sampling.py; ids are drawn in the same order there, and weights differ in the last bits of exp.
//
// Every sum has one order, whoever computes it: rows are cut into pieces of fixed size, and a piece is one thread's. A
// row's token has the same bits in every batch and for any number of threads.

#include "common.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

namespace {

constexpr long BLOCK = 64;     // ids per block, as in sampling.py
constexpr long PIECE = 32;     // blocks that are handled at a time
constexpr long BINS = 1024;    // of a histogram over logits
constexpr long SORTED = 64;    // so many entries are sorted outright
constexpr float LEAST = -87.0f;  // exp of less is taken for 0
constexpr long PARALLEL_ELEMENTS = 1 << 15;  // below this a thread team costs more than it saves

// DRAW_DTYPE of sampling.py.
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

// VL values from `from` on, of which the row has `count`: the rest is -inf.
INLINE vf load_or_mask(const float* from, long count) {
    if (count >= VL) return load(from);
    float lanes[VL];
    for (long i = 0; i < VL; i++) lanes[i] = i < count ? from[i] : -INFINITY;
    return load(lanes);
}

// The larger of both, and NaN where one is.
INLINE vf larger(vf a, vf b) {
    const vf m = a > b ? a : b;
    return a == a ? m : a;
}

// Maxima of the blocks begin .. end - 1.
void block_maxima(const float* x, long vocab, long begin, long end, float* maxima) {
    for (long b = begin; b < end; b++) {
        const float* from = x + b * BLOCK;
        const long count = vocab - b * BLOCK;
        vf m = load_or_mask(from, count);
        if (count >= BLOCK)
            for (long i = VL; i < BLOCK; i += VL) m = larger(m, load(from + i));
        else
            for (long i = VL; i < count; i += VL) m = larger(m, load_or_mask(from + i, count - i));
        maxima[b] = fold(m, larger);
    }
}

float row_maximum(const float* maxima, long blocks) {
    vf m = load_or_mask(maxima, blocks);
    for (long i = VL; i < blocks; i += VL) m = larger(m, load_or_mask(maxima + i, blocks - i));
    return fold(m, larger);
}

// exp((logit - largest) / temperature). NaN, as of -inf - -inf, is 0.
struct Weight {
    vf largest, inverse;
    Weight(float row_max, double temperature) : largest(splat(row_max)), inverse(splat((float)(1.0 / temperature))) {}
    INLINE vf operator()(vf logits) const {
        const vf depth = (logits - largest) * inverse;
        return depth >= splat(LEAST) ? vexp(depth) : vf{};
    }
};

// Sums of weights over the ids j, j + blocks, j + 2 blocks, ... for the PIECE of j that begins with `begin`.
void block_sums(const float* x, long vocab, long begin, const Weight& weight, float* sums) {
    const long blocks = ceil_div(vocab, BLOCK);
    vf total[PIECE / VL] = {};
    for (long first = begin; first < vocab; first += blocks) {
        const float* from = x + first;
        const long count = vocab - first;
        if (count >= PIECE)
            for (long i = 0; i < PIECE / VL; i++) total[i] += weight(load(from + i * VL));
        else
            for (long i = 0; i < PIECE / VL; i++) total[i] += weight(load_or_mask(from + i * VL, count - i * VL));
    }
    memcpy(sums + begin, total, least(PIECE, blocks - begin) * sizeof(float));
}

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

// Where rounding would take a draw past the last id that has weight.
double below(double target, double total) { return std::min(target, std::nextafter(total, 0.0)); }

int32_t most_likely(const float* x, const float* maxima, float row_max) {
    long id = 0;
    while (maxima[id / BLOCK] != row_max) id += BLOCK;
    while (x[id] != row_max) id++;
    return (int32_t)id;
}

// Inverse CDF over all ids, in the order of the blocks of block_sums.
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

struct Entry {
    float logit;
    int32_t id;
    float weight;
};

// The order of likelihood: lowest id first on ties.
bool comes_first(const Entry& a, const Entry& b) {
    return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

// Counts and masses of entries by BINS equal parts of the range of their logits, from the highest down.
class Histogram {
  public:
    long counts[BINS];
    double masses[BINS];

    void fill(const Entry* entries, long count) {
        float low = entries[0].logit, high = low;
        for (long i = 1; i < count; i++) {
            low = entries[i].logit < low ? entries[i].logit : low;
            high = entries[i].logit > high ? entries[i].logit : high;
        }
        high_ = high;
        scale_ = high > low ? BINS / ((double)high - low) : 0.0;
        memset(counts, 0, sizeof counts);
        memset(masses, 0, sizeof masses);
        for (long i = 0; i < count; i++) {
            const long bin = of(entries[i]);
            counts[bin]++;
            masses[bin] += entries[i].weight;
        }
    }
    bool flat() const { return scale_ == 0.0; }
    long of(const Entry& entry) const { return least(BINS - 1, (long)((high_ - entry.logit) * scale_)); }

  private:
    double high_, scale_;
};

struct Found {
    int32_t id;
    long count;   // of the entries up to this one
    double mass;  // of the same
};

// Entries in ascending order of ids, to be walked in the order of likelihood without being sorted as a whole.
class Ranking {
  public:
    Ranking(Entry* entries, long count, Entry* spare) : entries_(entries), spare_(spare), count_(count) {
        if (count > SORTED)
            histogram_.fill(entries, count);
        else
            std::sort(entries, entries + count, comes_first);
    }
    long count() const { return count_; }

    // The first entry at which stop(count, mass) holds of all up to it, else the last. The same sums stand behind every
    // walk, so that what a walk found bounds the next.
    template <class Stop>
    Found walk(Stop stop) const {
        Found at{-1, 0, 0.0};
        const Entry* entries = entries_;
        long count = count_;
        Histogram finer;
        for (const Histogram* bins = &histogram_; count > SORTED && !bins->flat();) {
            Found before = at;
            long chosen = 0;
            for (long bin = 0; bin < BINS; bin++) {
                if (!bins->counts[bin]) continue;
                before = at;
                chosen = bin;
                at.count += bins->counts[bin];
                at.mass += bins->masses[bin];
                if (stop(at.count, at.mass)) break;
            }
            at = before;
            long inside = 0;
            for (long i = 0; i < count; i++) {
                const Entry entry = entries[i];
                const bool is_in = bins->of(entry) == chosen;
                spare_[inside] = entry;
                inside += is_in;
            }
            entries = spare_;
            count = inside;
            if (count > SORTED) {
                finer.fill(entries, count);
                bins = &finer;
            } else {
                std::sort(spare_, spare_ + count, comes_first);
            }
        }
        for (long i = 0; i < count; i++) {
            at = {entries[i].id, at.count + 1, at.mass + entries[i].weight};
            if (stop(at.count, at.mass)) break;
        }
        return at;
    }

  private:
    const Entry* entries_;
    Entry* spare_;
    long count_;
    Histogram histogram_;
};

// Ids whose logit reaches the bound and whose weight is least_weight or more, in ascending order.
long collect(const float* x, long vocab, const float* maxima, float bound, float least_weight, const Weight& weight,
             Entry* to) {
    long count = 0;
    for (long b = 0; b < ceil_div(vocab, BLOCK); b++) {
        if (!(maxima[b] >= bound)) continue;
        const float* from = x + b * BLOCK;
        const long inside = least(BLOCK, vocab - b * BLOCK);
        float weights[BLOCK];
        for (long i = 0; i < inside; i += VL) store(weights + i, weight(load_or_mask(from + i, inside - i)));
        for (long i = 0; i < inside; i++) {
            to[count] = {from[i], (int32_t)(b * BLOCK + i), weights[i]};
            count += (from[i] >= bound) & (weights[i] >= least_weight) & (weights[i] > 0.0f);
        }
    }
    return count;
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
    const long vocab = p.vocab, blocks = p.blocks(), room = ceil_div(vocab + 1, 16) * 16;
    Entry* entries = (Entry*)space.get(2 * room * sizeof(Entry) / sizeof(float) + blocks);
    Entry* spare = entries + room;
    double bound = reach(row_max, s.temperature, s.min_p), mass = NAN;
    if (sums) {
        // Ids of less than this weight have less than (1 - top_p) / 2 of the mass together: the nucleus ends before.
        mass = 0.0;
        for (long j = 0; j < blocks; j++) mass += sums[j];
        bound = reach(row_max, s.temperature, 0.5 * (1.0 - s.top_p) * mass / (double)vocab);
    } else if (s.top_k <= blocks) {
        bound = std::max(bound, (double)kth_block_maximum(maxima, blocks, s.top_k, (float*)(spare + room)));
    }
    const float lowest = (float)std::max(bound, -(double)FLT_MAX);
    const Ranking ranking(entries, collect(x, vocab, maxima, lowest, (float)s.min_p, weight, entries), spare);
    const long kept = least(s.top_k, ranking.count());
    double total = mass;
    if (!sums) total = ranking.walk([&](long count, double) { return count >= kept; }).mass;
    if (s.top_p < 1.0) {
        const double wanted = s.top_p * total;
        total = ranking.walk([&](long count, double so_far) { return count >= kept || so_far >= wanted; }).mass;
    }
    const double target = below(u * total, total);
    return ranking.walk([&](long, double so_far) { return so_far > target; }).id;
}

// The token, or what is wrong with the row: the codes of sampling.py.
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

// f(t) for every t below `tasks`, each by whichever thread of the team comes first.
template <class F>
INLINE void share(std::atomic<long>& next, long tasks, F f) {
    for (long t; (t = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) f(t);
}

INLINE int team(long elements, int threads) { return elements < PARALLEL_ELEMENTS ? 1 : threads; }

}  // namespace

// logits [rows][stride] -> maxima [rows][ceil(vocab / 64)] over neighbouring ids; a NaN makes its block NaN.
EXPORT void mr_block_maxima(const float* logits, long stride, long rows, long vocab, float* maxima, int threads) {
    const long blocks = ceil_div(vocab, BLOCK), pieces = ceil_div(blocks, PIECE);
    std::atomic<long> next{0};
#pragma omp parallel num_threads(team(rows* vocab, threads))
    share(next, rows * pieces, [&](long t) {
        const long row = t / pieces, begin = t % pieces * PIECE;
        block_maxima(logits + row * stride, vocab, begin, least(begin + PIECE, blocks), maxima + row * blocks);
    });
}

// logits [rows][stride] -> sums [rows][blocks] of exp(logit - row_max[row]) over ids that lie `blocks` apart.
EXPORT void mr_block_sums(const float* logits, long stride, long rows, long vocab, const float* row_max, float* sums,
                          int threads) {
    const long blocks = ceil_div(vocab, BLOCK), pieces = ceil_div(blocks, PIECE);
    std::atomic<long> next{0};
#pragma omp parallel num_threads(team(rows* vocab, threads))
    share(next, rows * pieces, [&](long t) {
        const long row = t / pieces;
        const Weight weight(row_max[row], 1.0);
        block_sums(logits + row * stride, vocab, t % pieces * PIECE, weight, sums + row * blocks);
    });
}

// One token for each of `count` rows, or a code below 0; source and rows were checked by the caller.
EXPORT void mr_draw_tokens(const float* logits, long stride, long vocab, const int64_t* source, const int64_t* rows,
                           const void* table, long count, int32_t* tokens, int threads) {
    static thread_local Scratch space;
    const Problem p{logits, stride, vocab, source, rows, (const Settings*)table};
    const long blocks = p.blocks(), pieces = ceil_div(blocks, PIECE);
    float *maxima = space.get(2 * count * blocks), *sums = maxima + count * blocks;
    const int threads_used = team(count * vocab, threads);
    auto piece_of_maxima = [&](long i, long piece) {
        const long begin = piece * PIECE;
        block_maxima(p.row(i), vocab, begin, least(begin + PIECE, blocks), maxima + i * blocks);
    };
    auto piece_of_sums = [&](long i, long piece, const Weight& weight) {
        block_sums(p.row(i), vocab, piece * PIECE, weight, sums + i * blocks);
    };
    auto weight_of = [&](long i) {
        return Weight(row_maximum(maxima + i * blocks, blocks), p.settings(i).temperature);
    };
    auto finish = [&](long i) { tokens[i] = draw(p, i, maxima + i * blocks, sums + i * blocks); };
    std::atomic<long> next{0}, next_sum{0}, next_row{0};
    if (count >= 4 * threads_used) {  // a row is read again while a thread has it in its cache
#pragma omp parallel num_threads(threads_used)
        share(next, count, [&](long i) {
            for (long piece = 0; piece < pieces; piece++) piece_of_maxima(i, piece);
            if (p.needs_sums(i)) {
                const Weight weight = weight_of(i);
                for (long piece = 0; piece < pieces; piece++) piece_of_sums(i, piece, weight);
            }
            finish(i);
        });
        return;
    }
    bool any_sums = false;
    for (long i = 0; i < count; i++) any_sums |= p.needs_sums(i);
#pragma omp parallel num_threads(threads_used)
    {
        share(next, count * pieces, [&](long t) { piece_of_maxima(t / pieces, t % pieces); });
#pragma omp barrier
        if (any_sums) {
            long at = -1;
            Weight weight(0.0f, 1.0);
            share(next_sum, count * pieces, [&](long t) {
                const long i = t / pieces;
                if (!p.needs_sums(i)) return;
                if (i != at) weight = weight_of(i);
                at = i;
                piece_of_sums(i, t % pieces, weight);
            });
#pragma omp barrier
        }
        share(next_row, count, finish);
    }
}
