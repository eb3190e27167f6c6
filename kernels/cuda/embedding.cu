// Rows of the embedding table, with learned positions added where a model has them (GPT-2).
//
// MR_T  bf16 or f16
//
// One 16-byte vector per thread; blocks of a row lie along y. An id or position outside of its table gives a row of
// NaN: the kernel stays inside of its memory, and the request at fault can be named.
#include "prelude.cuh"

struct EmbeddingParams {
    const i64* tokens;           // [num_tokens]
    const MR_T* weight;          // [vocab, hidden]
    const i64* positions;        // [num_tokens]; null: no positions are added
    const MR_T* position_weight; // [max_positions, hidden]
    MR_T* out;                   // [num_tokens, hidden]
    i64 vocab;
    i64 max_positions;
    i32 hidden;                  // a multiple of 8
};

extern "C" __global__ void __launch_bounds__(256) mr_embedding(EmbeddingParams p) {
    const i32 column = (blockIdx.y * blockDim.x + threadIdx.x) * VEC<MR_T>;
    if (column >= p.hidden) return;
    const i64 row = blockIdx.x;
    const i64 token = p.tokens[row];
    const i64 position = p.positions ? p.positions[row] : 0;
    MR_T* out = p.out + row * p.hidden + column;
    if (token < 0 || token >= p.vocab || position < 0 || (p.positions && position >= p.max_positions)) {
        store16(out, make_uint4(~0u, ~0u, ~0u, ~0u));
        return;
    }
    uint4 value = load16_streaming(p.weight + token * p.hidden + column);
    if (p.positions) {
        float x[VEC<MR_T>], y[VEC<MR_T>];
        load_streaming(y, p.position_weight + position * p.hidden + column);
        unpack16<MR_T>(value, x);
#pragma unroll
        for (int e = 0; e < VEC<MR_T>; e++) x[e] += y[e];
        value = pack16<MR_T>(x);
    }
    store16(out, value);
}
