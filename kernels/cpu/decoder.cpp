// All layers of a decoder in one call, so that a step costs no Python between its kernels and no fresh memory: the
// working space stays with the thread (new pages for each intermediate cost up to a sixth of a long prefill).
// The structures are laid out as in cpu_decoder.py: 8-byte fields only.

#include "common.h"
#include "kernels.h"

namespace {

constexpr long BLOCK_SIZE = 16;  // slots per KV block
constexpr long MLP_ROWS = 512;   // rows whose intermediates exist at a time

struct Matrix {
    const void* weight;  // packed
    const float* bias;   // padded
    int64_t out, in, kind, group;  // of FLOAT8 the group's logarithm
    const float* scales;           // of FLOAT8
    const uint8_t* codebook;       // of 4 bits, or null
    const int64_t* order;          // of the inputs, or null
};

struct Norm {
    const float *weight, *bias;
    double eps;
};

struct Layer {
    Norm input_norm;
    Matrix qkv;
    Norm q_norm, k_norm;  // null weights: none
    Matrix output;
    Norm post_attention_norm;
    Matrix up, down;  // up is gate and up where the MLP is gated
    double scale;
    int64_t window;  // 0: all keys are seen
};

struct Decoder {
    const Layer* layers;
    Norm final_norm;
    const float* cos_sin;  // [max_positions][rotary_dim], or null
    int64_t num_layers, hidden, num_heads, num_kv_heads, head_dim, rotary_dim, max_positions, is_rms, is_gated;
};

struct Batch {
    const int64_t *positions, *slots;  // [num_tokens]
    const int64_t* logits_indices;     // [num_logits]
    const int32_t *query_starts, *context_lens, *block_tables;
    char* kv;          // [num_layers][2][num_blocks][num_kv_heads][BLOCK_SIZE][head_dim]
    float* kv_scales;  // the same without head_dim, of 8 bits; else null
    int64_t kv_kind, kv_bytes;  // of an element
    int64_t num_tokens, num_logits, num_seqs, max_blocks, num_blocks, threads;
    KvPool pool(long layer, long slots, long dim) const {
        char* keys = kv + layer * 2 * slots * dim * kv_bytes;
        float* scales = kv_scales ? kv_scales + layer * 2 * slots : nullptr;
        return {keys, keys + slots * dim * kv_bytes, scales, scales ? scales + slots : nullptr, (int)kv_kind};
    }
};

struct Pass {
    const Decoder& decoder;
    const Batch& batch;
    int threads;

    void linear(const Matrix& matrix, const float* x, float* y, long rows) const {
        if (matrix.kind > INT8)
            mr_linear(x, matrix.weight, matrix.kind, matrix.scales, matrix.group, matrix.bias, y, rows, matrix.out,
                      matrix.in, threads);
        else
            mr_quantized_linear(x, (const uint8_t*)matrix.weight, matrix.codebook, matrix.order, matrix.bias, y, rows,
                                matrix.out, matrix.in, matrix.group, matrix.kind, threads);
    }
    // y = norm(x + residual), where residual takes the sum; without a residual y = norm(x).
    void norm(const Norm& norm, const float* x, float* residual, float* y, long rows) const {
        if (decoder.is_rms)
            mr_rms_norm(x, residual, norm.weight, y, rows, decoder.hidden, norm.eps, threads);
        else
            mr_layer_norm(x, residual, norm.weight, norm.bias, y, rows, decoder.hidden, norm.eps, threads);
    }
    void mlp(const Layer& layer, const float* x, float* y, long rows) const {
        static thread_local Scratch up_space, inner_space;
        float* up = up_space.get(least(rows, MLP_ROWS) * layer.up.out);
        float* inner = inner_space.get(least(rows, MLP_ROWS) * layer.down.in);
        for (long row = 0; row < rows; row += MLP_ROWS) {
            const long count = least(MLP_ROWS, rows - row);
            linear(layer.up, x + row * decoder.hidden, up, count);
            if (decoder.is_gated)
                mr_silu_mul(up, inner, count, layer.down.in, threads);
            else
                mr_gelu_tanh(up, inner, count * layer.down.in, threads);
            linear(layer.down, inner, y + row * decoder.hidden, count);
        }
    }
};

void gather_rows(const float* x, const int64_t* rows, float* to, long count, long width) {
    for (long i = 0; i < count; i++) memcpy(to + i * width, x + rows[i] * width, width * sizeof(float));
}

}  // namespace

// residual [num_tokens][hidden] comes as embeddings and is used up; out [num_logits][hidden] is what the output matrix
// multiplies. Returns 0, or what is wrong: 1 + 4 * token for its position, 2 + 4 * token for its slot, 3 + 4 * index for
// a row of logits, 4 + 4 * sequence for its block table. Nothing outside the given memory is touched.
EXPORT int64_t mr_decoder(const Decoder* decoder_, const Batch* batch_, float* residual, float* out) {
    static thread_local Scratch x_space, qkv_space, attended_space, wanted_space;
    const Decoder& decoder = *decoder_;
    const Batch& batch = *batch_;
    for (long t = 0; t < batch.num_tokens; t++) {
        if (decoder.cos_sin && (batch.positions[t] < 0 || batch.positions[t] >= decoder.max_positions)) return 1 + 4 * t;
        if (batch.slots[t] < 0 || batch.slots[t] >= batch.num_blocks * BLOCK_SIZE) return 2 + 4 * t;
    }
    for (long i = 0; i < batch.num_logits; i++)
        if (batch.logits_indices[i] < 0 || batch.logits_indices[i] >= batch.num_tokens) return 3 + 4 * i;

    const Pass pass{decoder, batch, (int)batch.threads};
    const long hidden = decoder.hidden, dim = decoder.head_dim;
    const long q_width = decoder.num_heads * dim, qkv_width = q_width + 2 * decoder.num_kv_heads * dim;
    long rows = batch.num_tokens;
    float* x = x_space.get(most(rows, batch.num_logits) * hidden);
    float* qkv = qkv_space.get(rows * qkv_width);
    float* attended = attended_space.get(rows * q_width);
    pass.norm(decoder.layers[0].input_norm, residual, nullptr, x, rows);
    for (long index = 0; index < decoder.num_layers; index++) {
        const Layer& layer = decoder.layers[index];
        const bool is_last = index + 1 == decoder.num_layers;
        const KvPool pool = batch.pool(index, batch.num_blocks * decoder.num_kv_heads * BLOCK_SIZE, dim);
        pass.linear(layer.qkv, x, qkv, rows);
        mr_qkv_to_cache(qkv, layer.q_norm.weight, layer.k_norm.weight, layer.q_norm.eps, decoder.cos_sin,
                        batch.positions, batch.slots, &pool, rows, decoder.num_heads, decoder.num_kv_heads, dim,
                        decoder.rotary_dim, pass.threads);
        if (is_last && batch.num_logits == 0) return 0;
        const long bad = mr_attention(qkv, &pool, batch.query_starts, batch.context_lens, batch.block_tables, attended,
                                      batch.num_seqs, batch.max_blocks, batch.num_blocks, decoder.num_heads,
                                      decoder.num_kv_heads, dim, qkv_width, layer.window, layer.scale, pass.threads);
        if (bad) return 4 + 4 * (bad - 1);
        if (is_last) {  // past the last keys and values only the rows that want logits matter
            rows = batch.num_logits;
            float* wanted = wanted_space.get(rows * (q_width + hidden));
            gather_rows(attended, batch.logits_indices, wanted, rows, q_width);
            gather_rows(residual, batch.logits_indices, wanted + rows * q_width, rows, hidden);
            attended = wanted;
            residual = wanted + rows * q_width;
        }
        pass.linear(layer.output, attended, x, rows);
        pass.norm(layer.post_attention_norm, x, residual, x, rows);
        pass.mlp(layer, x, x, rows);
        pass.norm(is_last ? decoder.final_norm : decoder.layers[index + 1].input_norm, x, residual, is_last ? out : x,
                  rows);
    }
    return 0;
}
