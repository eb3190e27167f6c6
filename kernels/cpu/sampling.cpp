// From rows of logits to one token each: maxima of blocks of neighbouring ids, sums of weights over blocks of ids that
// lie far apart, and the draw, which then reads little more than those. What each step means stands in
// torch_sampling.py; ids are drawn in the same order there, and weights differ in the last bits of exp.
//
// Every sum is one thread's, and adds up in the same order however a row is cut into pieces: a row's token is the same in
// every batch and for any number of threads.

#include "common.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

#if defined(__SSE__)
#include <immintrin.h>
#endif

namespace {

constexpr long BLOCK = 64;         // ids per block, LOGIT_BLOCK in arguments.py
constexpr long MAXIMA_PIECE = 32;  // blocks whose maxima are found at a time
constexpr long SUMS_PIECE = 512;   // blocks that are summed at a time, at most: their sums stay in L1
constexpr int BINS = 1024;         // of a histogram over logits
constexpr long SORTED = 128;       // so many entries are sorted outright
constexpr float LEAST = -87.0f;    // exp of less is taken for 0
constexpr long PARALLEL_ELEMENTS = 1 << 15;  // below this a thread team costs more than it saves

// DRAW_DTYPE of arguments.py.
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

// The next VL values, of which there are `count`: the rest is `other`.
INLINE vf load_or(const float* from, long count, float other) {
    if (count >= VL) return load(from);
    float lanes[VL];
    for (long i = 0; i < VL; i++) lanes[i] = i < count ? from[i] : other;
    return load(lanes);
}
INLINE vf load_or_mask(const float* from, long count) { return load_or(from, count, -INFINITY); }

// The larger of both, and NaN where one is.
INLINE vf larger(vf a, vf b) {
    const vf m = a > b ? a : b;
    return a == a ? m : a;
}

// The larger of both where both are numbers.
INLINE vf larger_number(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE__)
    return (vf)_mm_max_ps((__m128)a, (__m128)b);
#else
    return vmax(a, b);
#endif
}

// Maxima of VL blocks that are whole; true where it may have passed by a NaN. Their vectors are interleaved with those
// VL / 2, VL / 4, ... blocks on, so that lane i ends with block i.
INLINE bool maxima_of_numbers(const float* x, float* maxima) {
    vf now[VL], marks[4] = {};
    const vf small = splat(0x1p-20f);  // sums of finite values stay finite
    for (int b = 0; b < VL; b++) {
        const float* from = x + b * BLOCK;
        for (int line = 0; line < BLOCK; line += 16) __builtin_prefetch(from + 512 + line);
        vf m[4] = {load(from), load(from + VL), load(from + 2 * VL), load(from + 3 * VL)};
        for (int i = 0; i < 4; i++) marks[i] += m[i] * small;
        for (long i = 4 * VL; i < BLOCK; i += 4 * VL)
            for (int j = 0; j < 4; j++) {
                const vf v = load(from + i + j * VL);
                marks[j] += v * small;
                m[j] = larger_number(m[j], v);
            }
        now[b] = larger_number(larger_number(m[0], m[1]), larger_number(m[2], m[3]));
    }
#pragma GCC unroll 4
    for (int half = VL / 2; half; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; i++)
            now[i] = larger_number(low_halves(now[i], now[i + half]), high_halves(now[i], now[i + half]));
    store(maxima, now[0]);
    const float mark = hsum(marks[0] + marks[1] + marks[2] + marks[3]);  // NaN, or two infinities that differ
    return mark != mark;
}

// Maxima of the blocks begin .. end - 1.
void block_maxima(const float* x, long vocab, long begin, long end, float* maxima) {
    long b = begin;
    for (; b + VL <= end && (b + VL) * BLOCK <= vocab; b += VL)
        if (maxima_of_numbers(x + b * BLOCK, maxima + b)) break;
    for (; b < end; b++) {
        vf m = load_or_mask(x + b * BLOCK, vocab - b * BLOCK);
        for (long i = b * BLOCK + VL; i < least(vocab, (b + 1) * BLOCK); i += VL)
            m = larger(m, load_or_mask(x + i, vocab - i));
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

// Sums of weights over the ids j, j + blocks, j + 2 blocks, ... for begin <= j < end; each adds up in this order
// however the j are cut. Runs of neighbouring ids are read, which the processor fetches ahead.
void block_sums(const float* x, long vocab, long begin, long end, const Weight& weights, float* sums) {
    const long blocks = ceil_div(vocab, BLOCK), width = end - begin;
    const Weight weight = weights;
    alignas(64) float total[SUMS_PIECE] = {};
    for (long first = begin; first < vocab; first += blocks) {
        const float* from = x + first;
        const long count = least(width, vocab - first);
        long i = 0;
        for (; i + VL <= count; i += VL) {
            __builtin_prefetch(from + i + 256);
            store(total + i, load(total + i) + weight(load(from + i)));
        }
        if (i < count) store(total + i, load(total + i) + weight(load_or_mask(from + i, count - i)));
    }
    memcpy(sums + begin, total, width * sizeof(float));
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

struct Entry {
    float logit;
    int32_t id;
    float weight;
};

// The order of likelihood: lowest id first on ties.
bool comes_first(const Entry& a, const Entry& b) {
    return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

// Entries in ascending order of ids, as columns with room for VL more.
struct Entries {
    float *logits, *weights;
    int32_t *ids, *bins;
    long count;
};

// Counts and masses of entries by BINS equal parts of the range of their logits, from the highest down.
struct Histogram {
    bool flat;  // one logit, or so nearly one that it cannot be cut
    int32_t counts[BINS];
    double masses[BINS];

    void fill(const Entries& e) {
        vf high_lanes = splat(e.logits[0]), low_lanes = high_lanes;
        for (long i = 0; i < e.count; i += VL) {
            const vf v = load_or(e.logits + i, e.count - i, e.logits[0]);
            high_lanes = vmax(high_lanes, v);
            low_lanes = -vmax(-low_lanes, -v);
        }
        const float high = hmax(high_lanes), low = -hmax(-low_lanes), scale = BINS / (high - low);
        flat = !(high > low && std::isfinite(scale));
        if (flat) return;
        for (long i = 0; i < e.count; i += VL) {
            const vi bin = __builtin_convertvector((high - load(e.logits + i)) * scale, vi);
            const vi last = vi{} + (BINS - 1), inside = bin > last ? last : bin;
            memcpy(e.bins + i, &inside, sizeof inside);
        }
        memset(counts, 0, sizeof counts);
        memset(masses, 0, sizeof masses);
        for (long i = 0; i < e.count; i++) {
            counts[e.bins[i]]++;
            masses[e.bins[i]] += e.weights[i];
        }
    }
};

struct Found {
    int32_t id;
    long count;   // of the entries up to this one
    double mass;  // of the same
};

// Entries to be walked in the order of likelihood without being sorted as a whole.
class Ranking {
  public:
    // spare: room for as many entries.
    Ranking(const Entries& entries, const Entries& spare) : entries_(entries), spare_(spare) {
        if (entries.count > SORTED) histogram_.fill(entries);
    }

    // The first entry at which stop(count, mass) holds of all up to it, else the last. The same sums stand behind every
    // walk, so that what a walk found bounds the next.
    template <class Stop>
    Found walk(Stop stop) const {
        Found at{-1, 0, 0.0};
        Entries e = entries_;
        Histogram finer;
        for (const Histogram* bins = &histogram_; e.count > SORTED && !bins->flat; bins = &finer) {
            Found before = at;
            int32_t chosen = 0;
            for (int32_t bin = 0; bin < BINS; bin++) {
                if (!bins->counts[bin]) continue;
                before = at;
                chosen = bin;
                at.count += bins->counts[bin];
                at.mass += bins->masses[bin];
                if (stop(at.count, at.mass)) break;
            }
            at = before;
            long inside = 0;
            for (long i = 0; i < e.count; i++) {
                if (e.bins[i] != chosen) continue;
                spare_.logits[inside] = e.logits[i];
                spare_.weights[inside] = e.weights[i];
                spare_.ids[inside++] = e.ids[i];
            }
            e = spare_;
            e.count = inside;
            if (inside > SORTED) finer.fill(e);
        }
        static thread_local Scratch space;
        Entry* sorted = (Entry*)space.get(e.count * (sizeof(Entry) / sizeof(float)));
        for (long i = 0; i < e.count; i++) sorted[i] = {e.logits[i], e.ids[i], e.weights[i]};
        if (!std::is_sorted(sorted, sorted + e.count, comes_first)) std::sort(sorted, sorted + e.count, comes_first);
        for (long i = 0; i < e.count; i++) {
            at = {sorted[i].id, at.count + 1, at.mass + sorted[i].weight};
            if (stop(at.count, at.mass)) break;
        }
        return at;
    }

  private:
    Entries entries_, spare_;
    Histogram histogram_;
};

// Ids whose logit reaches the bound, which no -inf does.
void collect(const float* x, long vocab, const float* maxima, float bound, Entries& to) {
    long count = 0;
    for (long b = 0; b < ceil_div(vocab, BLOCK); b++) {
        if (!(maxima[b] >= bound)) continue;
        const long end = least(vocab, (b + 1) * BLOCK);
#if defined(__AVX512F__)
        const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        for (long i = b * BLOCK; i < end; i += VL) {
            const __m512 v = (__m512)load_or(x + i, end - i, -INFINITY);
            const __mmask16 hit = _mm512_cmp_ps_mask(v, _mm512_set1_ps(bound), _CMP_GE_OQ);
            _mm512_storeu_ps(to.logits + count, _mm512_maskz_compress_ps(hit, v));
            const __m512i ids = _mm512_add_epi32(lanes, _mm512_set1_epi32((int)i));
            _mm512_storeu_si512(to.ids + count, _mm512_maskz_compress_epi32(hit, ids));
            count += __builtin_popcount(hit);
        }
#else
        for (long i = b * BLOCK; i < end; i++) {
            to.logits[count] = x[i];
            to.ids[count] = (int32_t)i;
            count += x[i] >= bound;
        }
#endif
    }
    to.count = count;
}

// Takes out the entries of less weight than `smallest`.
void drop_below(Entries& e, float smallest) {
    long kept = 0;
    for (long i = 0; i < e.count; i++) {
        e.logits[kept] = e.logits[i];
        e.ids[kept] = e.ids[i];
        e.weights[kept] = e.weights[i];
        kept += e.weights[i] >= smallest;
    }
    e.count = kept;
}

// Weights of the entries, of which those of less than `smallest`, or of none, are taken out.
void weigh(Entries& e, const Weight& weight, float smallest) {
    vf low = splat(1.0f);
    for (long i = 0; i < e.count; i += VL) {
        const vf w = weight(load_or(e.logits + i, e.count - i, INFINITY));
        store(e.weights + i, w);
        low = w < low ? w : low;
    }
    smallest = std::max(smallest, FLT_MIN);
    if (-hmax(-low) < smallest) drop_below(e, smallest);
}

// Mass of the entries of at least this weight.
double mass_from(const Entries& e, float smallest) {
    double mass = 0.0;
    for (long begin = 0; begin < e.count; begin += 64 * VL) {
        vf sum{};
        for (long i = begin; i < least(begin + 64 * VL, e.count); i += VL) {
            const vf w = load_or(e.weights + i, e.count - i, 0.0f);
            sum += w >= splat(smallest) ? w : vf{};
        }
        mass += hsum(sum);
    }
    return mass;
}

// Takes out light entries as long as the others hold more than the mass that is wanted, by bisection from `low` up: a
// few sums over many entries cost less than their histogram.
void narrow(Entries& e, double wanted, double low) {
    if (e.count <= 8 * SORTED) return;
    double high = 1.0;
    for (int i = 0; i < 8; i++) {
        const double middle = std::sqrt(low * high);
        (mass_from(e, (float)middle) > wanted * (1.0 + 1e-5) ? low : high) = middle;
    }
    drop_below(e, (float)low);
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

// The token, or what is wrong with the row: the codes BROKEN and EMPTY of arguments.py.
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
    std::atomic<long> next{0};
#pragma omp parallel num_threads(team(rows* vocab, threads))
    share(next, rows * pieces, [&](long t) {
        const long row = t / pieces, begin = t % pieces * MAXIMA_PIECE, end = least(begin + MAXIMA_PIECE, blocks);
        block_maxima(logits + row * stride, vocab, begin, end, maxima + row * blocks);
    });
}

// logits [rows][stride] -> sums [rows][blocks] of exp(logit - row_max[row]) over ids that lie `blocks` apart.
EXPORT void mr_block_sums(const float* logits, long stride, long rows, long vocab, const float* row_max, float* sums,
                          int threads) {
    const long blocks = ceil_div(vocab, BLOCK), step = sums_piece(blocks, threads), pieces = ceil_div(blocks, step);
    std::atomic<long> next{0};
#pragma omp parallel num_threads(team(rows* vocab, threads))
    share(next, rows * pieces, [&](long t) {
        const long row = t / pieces, begin = t % pieces * step, end = least(begin + step, blocks);
        const Weight weight(row_max[row], 1.0);
        block_sums(logits + row * stride, vocab, begin, end, weight, sums + row * blocks);
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
    const int threads_used = team(count * vocab, threads);
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
    std::atomic<long> next{0}, next_sum{0}, next_row{0};
#pragma omp parallel num_threads(threads_used)
    if (whole_rows) {
        share(next, count, [&](long i) {
            for (long piece = 0; piece < pieces; piece++) find_maxima(i, piece);
            if (p.needs_sums(i)) {
                const Weight weight = weight_of(i);
                for (long piece = 0; piece < sum_pieces; piece++) sum(i, piece, weight);
            }
            finish(i);
        });
    } else {
        share(next, count * pieces, [&](long t) { find_maxima(t / pieces, t % pieces); });
#pragma omp barrier
        if (any_sums) {
            share(next_sum, count * sum_pieces, [&](long t) {
                const long i = t / sum_pieces;
                if (p.needs_sums(i)) sum(i, t % sum_pieces, weight_of(i));
            });
#pragma omp barrier
        }
        share(next_row, count, finish);
    }
    long num_bad = 0;
    for (long i = 0; i < count; i++) {
        num_bad += tokens[i] < 0;
        settings[table_rows[i]].position += tokens[i] >= 0;
    }
    return num_bad;
}
