// What both sampling kernels share: the row record, blocks of the vocabulary, how logits are read.
//
// The vocabulary is cut into blocks of 128 neighbouring ids, one warp load each (four ids a lane). The scan kernel leaves
// a summary of each block: its maximum, and its sum of weights relative to that maximum. All that the draw kernel needs
// to know of ids that cannot be drawn is in the summaries, so it reads again only the blocks that can hold its token.
#pragma once
#include "prelude.cuh"

constexpr i32 BLOCK = 128;  // ids per summary
constexpr float LOWEST = -3.402823466e38f;  // a bound that finite logits reach and masked ones do not

// The sampling state of one row of the device batch; cuda_sampling.ROW_DTYPE is the same layout. The host writes it
// when a choice joins; only the draw kernel changes it afterwards (position, num_seen, and the lists behind seen).
struct SamplingRow {
    u64 seed;
    i64 position;              // tokens drawn so far: the counter of the next random number
    const i32* allowed;        // [num_allowed] distinct ids
    const i32* shift_ids;      // [num_shifts] distinct ids
    const float* shift_values; // [num_shifts], added to the logits; -inf bans
    const i32* held;           // [num_held] distinct ids that end the text, not drawn before min_tokens
    i32* seen;                 // [seen_capacity] distinct ids that the penalties touch, or null for no penalties
    i32* seen_counts;          // [seen_capacity], times drawn; 0 for an id that only the prompt holds
    float inv_temperature;
    float top_p;   // 1 is off
    float min_p;   // 0 is off
    float repetition;
    float presence;
    float frequency;
    i32 top_k;         // 0 is off
    i32 greedy;
    i32 num_logprobs;  // -1 is off
    u32 choice;
    i32 min_tokens;
    i32 num_allowed;  // -1: every id is allowed
    i32 num_shifts;
    i32 num_held;
    i32 num_seen;
    i32 seen_capacity;
    i32 edit_slot;  // which row of the scratch for edited logits is its own; -1 for a row that never edits
    i32 reserved;
};

// Whether the row's logits differ from the model's at its present position.
MR_DEVICE bool is_edited(const SamplingRow& row) {
    return row.edit_slot >= 0 && (row.num_allowed >= 0 || row.num_shifts > 0 || row.seen != nullptr ||
                                  (row.num_held > 0 && row.position < row.min_tokens));
}

// One row of logits: the model's own, or the edited copy where `edited` is set.
struct LogitRow {
    const MR_T* raw;
    const float* edited;  // 16-byte aligned and padded with -inf to whole blocks
    i32 vocab;
    bool vectors;  // raw is aligned to four elements
};

// Four neighbours, from an address that is aligned to all of them.
template <typename T> MR_DEVICE void load4(float (&x)[4], const T* from) {
    if constexpr (sizeof(T) == 4) {
        load_vec<4>(x, from);
    } else {
        const uint2 words = *reinterpret_cast<const uint2*>(from);
        unpack2<T>(words.x, x[0], x[1]);
        unpack2<T>(words.y, x[2], x[3]);
    }
}

// Ids id .. id + 3 (id a multiple of 4); -inf behind the vocabulary.
MR_DEVICE void load_ids(float (&x)[4], const LogitRow& row, i32 id) {
    if (row.edited != nullptr) {
        load4(x, row.edited + id);
    } else if (row.vectors && id + 4 <= row.vocab) {
        load4(x, row.raw + id);
    } else {
#pragma unroll
        for (i32 i = 0; i < 4; i++) x[i] = id + i < row.vocab ? to_float(row.raw[id + i]) : -MR_INF;
    }
}

// Products and sums that are rounded one by one, so that an edited logit has the same bits as on the CPU.
#ifdef MR_HOST
MR_DEVICE float rounded_mul(float a, float b) { return a * b; }
MR_DEVICE float rounded_add(float a, float b) { return a + b; }
#else
MR_DEVICE float rounded_mul(float a, float b) { return __fmul_rn(a, b); }
MR_DEVICE float rounded_add(float a, float b) { return __fadd_rn(a, b); }
#endif

// exp((x - top) / temperature); zero for x = -inf, NaN for a NaN.
MR_DEVICE float weight_of(float x, float top, float inv_temperature) {
    return expf(rounded_mul(rounded_add(x, -top), inv_temperature));
}

// Larger logits get smaller keys, and lower ids come first among equal logits: the order in which filters keep ids.
// Adding zero makes -0.0 equal to 0.0. No two ids share a key.
MR_DEVICE u32 rising_bits(float x) {
    const u32 bits = __float_as_uint(x + 0.0f);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
MR_DEVICE float from_rising_bits(u32 bits) { return __uint_as_float(bits >> 31 ? bits & 0x7fffffffu : ~bits); }
MR_DEVICE u64 likelihood_key(float x, i32 id) {
    return static_cast<u64>(~rising_bits(x)) << 32 | static_cast<u32>(id);
}
MR_DEVICE float key_logit(u64 key) { return from_rising_bits(~static_cast<u32>(key >> 32)); }
