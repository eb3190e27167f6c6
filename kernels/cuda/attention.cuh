// Paged attention: what decode and prefill share.
//
// The pool of a layer holds keys and values as [num_blocks][num_kv_heads][16][HEAD_DIM]: the 16 tokens of one block and
// one kv head are one contiguous run, so a warp copies a page with fully coalesced 16-byte cp.async. In shared memory
// a token's row has an odd number of 16-byte chunks (one of padding where needed), so the eight rows that one ldmatrix
// phase reads lie in different banks.
//
// Data flow of decode (attention_decode.cu): one CTA per (work item, kv head), where an item is a range of pages of one
// sequence. Warp w owns pages w, w + WARPS, ... and its own ring of stages; nothing in its loop waits for another warp.
//   S = Q K^T     A = the group's query heads as rows (8 or 16), B = keys: a page is two n-tiles
//   P = softmax   online, base 2; a lane holds two adjacent tokens of head lane / 4
//   O^T = V^T P^T the accumulator of S is, word for word, the B fragment of P^T, so P never leaves the registers, and
//                 a group of up to 8 heads costs HEAD_DIM / 4 accumulators a lane where O = P V would cost HEAD_DIM / 2
// The warps merge through shared memory; the items of a sequence merge in whichever CTA finishes last.
//
// Data flow of prefill (attention_prefill.cu): one CTA per (64 or 128 query rows, kv head), a row being one head of the
// group at one token, so that a short chunk still fills the tile and keys are read once per group. FlashAttention-2
// (Dao 2023): tiles of keys and values, double-buffered, shared by the warps, of which each owns 16 rows; O = P V.
//
// Slots that hold no token of the sequence may hold anything, NaN included. Copies write zeros in their place, and the
// scores of such tokens are replaced, not added to.
//
// Keys and values of 8 bits (FP8 e4m3, INT8) have a float scale per (slot, kv head). They enter the tensor cores as
// exact 16-bit numbers; the key's scale multiplies its score, and the value's scale joins the exponent: with
// p'_j = exp2(s_j + log2 scale_j - m) the output is (sum p'_j v_j) / (sum p'_j / scale_j). So P stays within [0, 1] and
// loses no bits in 16-bit form, however small the scales are.
#pragma once
#include "eight_bits.cuh"

constexpr int BLOCK_TOKENS = 16;
constexpr float LOG2_E = 1.44269504088896f;
constexpr float LN_2 = 0.69314718055995f;

template <typename KV> constexpr bool QUANTISED = sizeof(KV) == 1;

MR_DEVICE constexpr int padded_row(int bytes) { return (bytes / 16 | 1) * 16; }

// ---------------------------------------------------------------------------------------------------------------
// Arithmetic.

// log2(x) to about 1e-6 absolute near 1 and 2 ulp elsewhere.
MR_DEVICE float log2_approx(float x) {
#ifdef MR_HOST
    return log2f(x);
#else
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// 1 / x to 1 ulp; 1 / inf = 0. Volatile, lest the compiler compute caps for all and then select.
MR_DEVICE float reciprocal_approx(float x) {
#ifdef MR_HOST
    return 1.0f / x;
#else
    float y;
    asm volatile("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// Scores are kept in base 2: a product q.k times the front's score_factor, which is scale * log2(e). With a soft cap
// (Gemma 2: cap tanh(scale q.k / cap)) the factor is 2 log2(e) * scale / cap, the front's soft_cap is the cap times
// log2(e), and this is what follows the multiplication; tanh(x) = 1 - 2 / (1 + exp(2 x)).
MR_DEVICE float capped(float x, float soft_cap) {
    return soft_cap - 2.0f * soft_cap * reciprocal_approx(1.0f + exp2_approx(x));
}

// The largest value so far as a subtrahend: rows that have seen no key yet must not compute inf - inf.
MR_DEVICE float finite_max(float x) { return x == -MR_INF ? 0.0f : x; }

// A row's output from its weighted sum, the sum of its weights and the largest score; zeros without keys.
MR_DEVICE float normalised(float4& total, float top, float sum) {
    const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
    total = make_float4(total.x * inverse, total.y * inverse, total.z * inverse, total.w * inverse);
    return sum > 0.0f ? top + log2_approx(sum) : -MR_INF;  // log-sum-exp in base 2
}

// Another CTA's results, past this SM's L1.
MR_DEVICE float load_l2(const float* address) {
#ifdef MR_HOST
    return *address;
#else
    float x;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(x) : "l"(address) : "memory");
    return x;
#endif
}

MR_DEVICE float4 load_l2_vec(const float* address) {
#ifdef MR_HOST
    return *reinterpret_cast<const float4*>(address);
#else
    float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(address)
                 : "memory");
    return v;
#endif
}

// ---------------------------------------------------------------------------------------------------------------
// Pages.

// Block ids of the pages first, first + stride, ... of one sequence, in order; the null block for pages that are not in
// [begin, end), whose entries may be anything. Lane i holds the i-th of a run of 32, and the next run is loaded one run
// ahead, so copies never wait for the table. All lanes of a warp call.
struct BlockIds {
    const i32* table;  // row of block_tables
    int first, stride, begin, end;
    i32 now, next;

    MR_DEVICE i32 load(int index) const {
        const int page = first + (index + static_cast<int>(threadIdx.x % 32)) * stride;
        return page >= begin && page < end ? table[page] : 0;
    }

    MR_DEVICE BlockIds(const i32* table, int first, int stride, int begin, int end)
        : table(table), first(first), stride(stride), begin(begin), end(end) {
        now = load(0);
        next = load(32);
    }

    // Ids are taken with index = 0, 1, 2, ...
    MR_DEVICE i32 take(int index) {
        if (index % 32 == 0 && index > 0) {
            now = next;
            next = load(index + 32);
        }
        return __shfl_sync(FULL_WARP, now, index % 32);
    }
};

// A warp starts the copy of one page, `run` [16][HEAD_DIM] of KV, to rows of STRIDE bytes; tokens outside
// [valid_from, valid_to) become zeros.
template <typename KV, int HEAD_DIM, int STRIDE>
MR_DEVICE void copy_page(char* rows, const char* run, int valid_from, int valid_to) {
    constexpr int CHUNKS = HEAD_DIM * static_cast<int>(sizeof(KV)) / 16;
    constexpr int TOTAL = BLOCK_TOKENS * CHUNKS;
    const int lane = threadIdx.x % 32;
    if constexpr (32 % CHUNKS == 0) {  // a lane keeps its column, so that all offsets are constants
        const int first = lane / CHUNKS;
        char* to = rows + first * STRIDE + lane % CHUNKS * 16;
        const char* from = run + lane * 16;
#pragma unroll
        for (int start = 0; start < TOTAL; start += 32) {
            const int row = start / CHUNKS;
            cp_async16(to + row * STRIDE, from + start * 16, row >= valid_from - first && row < valid_to - first);
        }
    } else {
#pragma unroll
        for (int start = 0; start < TOTAL; start += 32) {
            const int chunk = start + lane, row = chunk / CHUNKS;
            if (TOTAL % 32 != 0 && chunk >= TOTAL) break;
            char* to = rows + row * STRIDE + chunk % CHUNKS * 16;
            cp_async16(to, run + chunk * 16, row >= valid_from && row < valid_to);
        }
    }
}

// The scales of a page's 16 tokens, [16] floats, by lanes 0 to 3 of a warp. Those of unused slots may be anything.
MR_DEVICE void copy_page_scales(float* to, const float* from) {
    const int lane = threadIdx.x % 32;
    if (lane < 4) cp_async16(to + lane * 4, from + lane * 4, true);
}
