// A transformer in one call, from tokens to logits, or all of its layers, so that a step costs no Python between its
// kernels and no fresh memory: the working space stays with the thread (new pages for each intermediate cost up to a
// sixth of a long prefill). The structures are laid out as in cpu_transformer.py: 8-byte fields only.

#include "common.h"
#include "kernels.h"

namespace {

constexpr long BLOCK_SIZE = 16;  // slots per KV block
constexpr long MLP_ROWS = 512;   // rows whose intermediates exist at a time

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
    const float* cos_sin;  // [max_positions][rotary_dim], or null: positions are in the embedding
    int64_t num_layers, hidden, num_heads, num_kv_heads, head_dim, rotary_dim, max_positions, is_rms, is_gated;
    Heads heads() const { return {num_heads, num_kv_heads, head_dim}; }
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

// What stands before and behind the layers.
struct Ends {
    const Matrix* head;        // gives the logits
    const void* table;         // [vocab][hidden], embeddings; null: they are the head's rows
    int64_t table_kind;        // FLOAT, BFLOAT16 or FLOAT16
    const float* learned;      // [max_positions][hidden], added to the embeddings; or null
};

// Working space for all of a team.
struct Space {
    float *x, *qkv, *attended, *wanted, *up, *inner, *product, *attention;
};

Space take_space(const Decoder& decoder, const Batch& batch, const std::vector<Attention>& attentions,
                 const Matrix* head) {
    static thread_local Scratch x, qkv, attended, wanted, up, inner, products, attention;  // stay with who calls
    const long rows = batch.num_tokens, mlp_rows = least(rows, MLP_ROWS), hidden = decoder.hidden;
    const long q_width = decoder.num_heads * decoder.head_dim;
    long qkv_width = 0, up_width = 0, inner_width = 0, split = 0;
    long product = head ? product_space(*head, batch.num_logits) : 0;
    for (long i = 0; i < decoder.num_layers; i++) {
        const Layer& layer = decoder.layers[i];
        qkv_width = most(qkv_width, layer.qkv.out);
        up_width = most(up_width, layer.up.out);
        inner_width = most(inner_width, layer.down.in);
        product = most(product, most(product_space(layer.qkv, rows), product_space(layer.output, rows)));
        product = most(product, most(product_space(layer.up, mlp_rows), product_space(layer.down, mlp_rows)));
    }
    for (const Attention& each : attentions) split = most(split, each.space);
    return {x.get(most(rows, batch.num_logits) * hidden), qkv.get(rows * qkv_width),
            attended.get(rows * q_width),                 wanted.get(batch.num_logits * (q_width + hidden)),
            up.get(mlp_rows * up_width),                  inner.get(mlp_rows * inner_width),
            products.get(product),                        attention.get(split)};
}

const Attention* find(const std::vector<Attention>& attentions, long window) {
    for (const Attention& each : attentions)
        if (each.window == window) return &each;
    return nullptr;
}

// All layers, by one thread of a team.
class Pass {
  public:
    Pass(const Decoder& decoder, const Batch& batch, const std::vector<Attention>& attentions, const Space& space,
         Team& team)
        : decoder(decoder), batch(batch), attentions(attentions), space(space), team(team) {}

    // out [num_logits][hidden]; with a head, logits [num_logits][head->out] instead.
    void run(float* residual, float* out, const Matrix* head = nullptr) {
        const Heads heads = decoder.heads();
        float *x = space.x, *attended = space.attended;
        long rows = batch.num_tokens;
        norm(decoder.layers[0].input_norm, residual, nullptr, x, rows);
        for (long index = 0; index < decoder.num_layers; index++) {
            const Layer& layer = decoder.layers[index];
            const bool is_last = index + 1 == decoder.num_layers;
            const KvPool pool = batch.pool(index, batch.num_blocks * heads.kv * BLOCK_SIZE, heads.dim);
            const ToCache how{heads, layer.q_norm.weight, layer.k_norm.weight, (float)layer.q_norm.eps, decoder.cos_sin,
                              decoder.rotary_dim, batch.positions, batch.slots};
            linear(layer.qkv, x, space.qkv, rows);
            qkv_to_cache(space.qkv, how, pool, rows, team);
            if (is_last && batch.num_logits == 0) return;
            attend(*find(attentions, layer.window), space.qkv, pool, layer.scale, attended, space.attention, team);
            if (is_last) {  // past the last keys and values only the rows that want logits matter
                const long width = heads.q * heads.dim;
                rows = batch.num_logits;
                float* wanted_residual = space.wanted + rows * width;
                gather_rows(attended, space.wanted, width);
                gather_rows(residual, wanted_residual, decoder.hidden);
                attended = space.wanted;
                residual = wanted_residual;
            }
            linear(layer.output, attended, x, rows);
            norm(layer.post_attention_norm, x, residual, x, rows);
            mlp(layer, x, rows);
            norm(is_last ? decoder.final_norm : decoder.layers[index + 1].input_norm, x, residual,
                 is_last && !head ? out : x, rows);
        }
        if (head) linear(*head, x, out, rows);
    }

  private:
    void linear(const Matrix& matrix, const float* x, float* y, long rows) {
        product(matrix, x, y, rows, space.product, team);
    }
    // y = norm(x + residual), where residual takes the sum; without a residual y = norm(x).
    void norm(const Norm& norm, const float* x, float* residual, float* y, long rows) {
        if (decoder.is_rms)
            rms_norm(x, residual, norm, y, rows, decoder.hidden, team);
        else
            layer_norm(x, residual, norm, y, rows, decoder.hidden, team);
    }
    void mlp(const Layer& layer, float* x, long rows) {
        for (long row = 0; row < rows; row += MLP_ROWS) {
            const long count = least(MLP_ROWS, rows - row);
            float* from = x + row * decoder.hidden;
            linear(layer.up, from, space.up, count);
            if (decoder.is_gated)
                silu_mul(space.up, space.inner, count, layer.down.in, team);
            else
                gelu_tanh(space.up, space.inner, count * layer.down.in, team);
            linear(layer.down, space.inner, from, count);
        }
    }
    // to [num_logits][width] = the rows of x that want logits
    void gather_rows(const float* x, float* to, long width) {
        team.share(batch.num_logits, [&](long begin, long end) {
            for (long i = begin; i < end; i++)
                memcpy(to + i * width, x + batch.logits_indices[i] * width, width * sizeof(float));
        });
        team.barrier();
    }

    const Decoder& decoder;
    const Batch& batch;
    const std::vector<Attention>& attentions;
    const Space space;
    Team& team;
};

// What may be wrong with a batch; as in cpu_transformer.py.
enum Fault { POSITION, SLOT, LOGITS_INDEX, BLOCK_TABLE, TOKEN, BOUNDS, NUM_FAULTS };
int64_t fault(Fault what, long index) { return 1 + index * NUM_FAULTS + what; }

// 0, or the fault of the first thing that a batch may not have; but for blocks, which `plan` looks at.
int64_t check(const Decoder& decoder, const Batch& batch, bool has_positions) {
    for (long t = 0; t < batch.num_tokens; t++) {
        if (has_positions && (batch.positions[t] < 0 || batch.positions[t] >= decoder.max_positions))
            return fault(POSITION, t);
        if (batch.slots[t] < 0 || batch.slots[t] >= batch.num_blocks * BLOCK_SIZE) return fault(SLOT, t);
    }
    for (long i = 0; i < batch.num_logits; i++)
        if (batch.logits_indices[i] < 0 || batch.logits_indices[i] >= batch.num_tokens) return fault(LOGITS_INDEX, i);
    const int32_t* starts = batch.query_starts;
    if (starts[0] != 0 || starts[batch.num_seqs] != batch.num_tokens) return fault(BOUNDS, 0);
    for (long i = 0; i < batch.num_seqs; i++) {
        const long count = starts[i + 1] - starts[i], context = batch.context_lens[i];
        if (count < 0 || context < count || context > batch.max_blocks * BLOCK_SIZE) return fault(BOUNDS, i);
    }
    return 0;
}

// The attention of each window; 0, or the fault of a block table.
int64_t plan(const Decoder& decoder, const Batch& batch, std::vector<Attention>& attentions) {
    const Heads heads = decoder.heads();
    for (long index = 0; index < decoder.num_layers; index++) {
        const long window = decoder.layers[index].window;
        if (find(attentions, window)) continue;
        attentions.push_back({heads, batch.query_starts, batch.context_lens, batch.block_tables, batch.num_seqs,
                              batch.max_blocks, (heads.q + 2 * heads.kv) * heads.dim, window, {}, {}});
        const long bad = plan_attention(attentions.back(), batch.num_blocks, (int)batch.threads);
        if (bad) return fault(BLOCK_TABLE, bad - 1);
    }
    return 0;
}

template <class T, class F>
void widen_rows(const T* table, const int64_t* tokens, float* y, long count, long width, F widen) {
    for (long t = 0; t < count; t++)
        for (long i = 0; i < width; i++) y[t * width + i] = widen(table[tokens[t] * width + i]);
}

// y [num_tokens][hidden]
void embed(const Decoder& decoder, const Ends& ends, const Batch& batch, const int64_t* tokens, float* y) {
    const long count = batch.num_tokens, width = decoder.hidden;
    if (!ends.table)
        matrix_rows(*ends.head, tokens, y, count);
    else if (ends.table_kind == FLOAT)
        widen_rows((const float*)ends.table, tokens, y, count, width, [](float value) { return value; });
    else if (ends.table_kind == FLOAT16)
        widen_rows((const _Float16*)ends.table, tokens, y, count, width, [](_Float16 value) { return (float)value; });
    else
        widen_rows((const uint16_t*)ends.table, tokens, y, count, width, [](uint16_t value) {
            const uint32_t bits = (uint32_t)value << 16;
            float wide;
            memcpy(&wide, &bits, 4);
            return wide;
        });
    if (ends.learned)
        for (long t = 0; t < count; t++)
            for (long i = 0; i < width; i++) y[t * width + i] += ends.learned[batch.positions[t] * width + i];
}

}  // namespace

// residual [num_tokens][hidden] comes as embeddings and is used up; out [num_logits][hidden] is what the output matrix
// multiplies. Returns 0, or a fault, and then nothing was written.
EXPORT int64_t mr_decoder(const Decoder* decoder, const Batch* batch, float* residual, float* out) {
    const int64_t bad = check(*decoder, *batch, decoder->cos_sin);
    if (bad) return bad;
    std::vector<Attention> attentions;
    const int64_t unplanned = plan(*decoder, *batch, attentions);
    if (unplanned) return unplanned;
    const Space space = take_space(*decoder, *batch, attentions, nullptr);
    with_team((int)batch->threads,
              [&](Team& team) { Pass(*decoder, *batch, attentions, space, team).run(residual, out); });
    return 0;
}

// The same from tokens [num_tokens] to logits [num_logits][vocab].
EXPORT int64_t mr_transformer(const Decoder* decoder, const Ends* ends, const Batch* batch, const int64_t* tokens,
                              float* logits) {
    static thread_local Scratch embeddings;
    const int64_t bad = check(*decoder, *batch, decoder->cos_sin || ends->learned);
    if (bad) return bad;
    for (long t = 0; t < batch->num_tokens; t++)
        if (tokens[t] < 0 || tokens[t] >= ends->head->out) return fault(TOKEN, t);
    std::vector<Attention> attentions;
    const int64_t unplanned = plan(*decoder, *batch, attentions);
    if (unplanned) return unplanned;
    const Space space = take_space(*decoder, *batch, attentions, ends->head);
    float* residual = embeddings.get(batch->num_tokens * decoder->hidden);
    embed(*decoder, *ends, *batch, tokens, residual);
    with_team((int)batch->threads, [&](Team& team) {
        Pass(*decoder, *batch, attentions, space, team).run(residual, logits, ends->head);
    });
    return 0;
}
