// The candidates of a draw, and how to walk them in the order of likelihood without sorting them all.
#pragma once

#include "sampling_passes.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

namespace {

constexpr int BINS = 1024;    // of a histogram over logits
constexpr long SORTED = 128;  // so many entries are sorted outright

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

}  // namespace
