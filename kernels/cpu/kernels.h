// The kernels as stages that a team runs, for decoder.cpp and for the ops one by one. Each needs its inputs to be visible
// to the whole team, and ends with a barrier; what it computes stands where it is defined.
#pragma once

#include "common.h"
#include "kv.h"
#include "team.h"

#include <vector>

// How a matrix is stored, in bits where that is enough; the same numbers are in cpu_matrix.py.
enum Kind { INT4 = 4, INT8 = 8, BFLOAT16 = 16, FLOAT16 = 17, FLOAT8 = 18, FLOAT = 32 };

struct Matrix {  // laid out as in cpu_matrix.py: 8-byte fields only
    const void* weight;  // packed
    const float* bias;   // padded to panels
    int64_t out, in, kind;
    int64_t group;            // inputs that share a scale; of FLOAT8 its logarithm
    const float* scales;      // of FLOAT8
    const uint8_t* codebook;  // [16] of 4 bits, or null
    const int64_t* order;     // [in], the input that a column multiplies, or null
};

// y [rows][out] = x [rows][in] times the matrix, plus its bias. `space` has product_space floats.
long product_space(const Matrix& matrix, long rows);
void product(const Matrix& matrix, const float* x, float* y, long rows, float* space, Team& team);
long quantized_space(const Matrix& matrix, long rows);  // of 4 and 8 bits
void quantized_product(const Matrix& matrix, const float* x, float* y, long rows, float* space, Team& team);

// y [count][in] = the rows of the matrix that tokens name, which are checked by the caller.
void matrix_rows(const Matrix& matrix, const int64_t* tokens, float* y, long count);
void quantized_rows(const Matrix& matrix, const int64_t* tokens, float* y, long count);  // of 4 and 8 bits

struct Norm {  // 8-byte fields only
    const float *weight, *bias;
    double eps;
};

void rms_norm(const float* x, float* residual, const Norm& norm, float* y, long rows, long width, Team& team);
void layer_norm(const float* x, float* residual, const Norm& norm, float* y, long rows, long width, Team& team);
void silu_mul(const float* gate_up, float* y, long rows, long width, Team& team);
void gelu_tanh(const float* x, float* y, long count, Team& team);

struct Heads {
    long q, kv, dim;
};

// What stands between the projection and the attention, in one pass: heads of q and k are normed (if they have norms)
// and rotated (if there is a table) in place, k and v go to their slots. qkv [tokens][(heads.q + 2 heads.kv) * dim].
struct ToCache {
    Heads heads;
    const float *q_norm, *k_norm;  // or null
    float eps;
    const float* cos_sin;  // [positions][rotary_dim], or null
    long rotary_dim;
    const int64_t *positions, *slots;  // [tokens]; checked by the caller
};
void qkv_to_cache(float* qkv, const ToCache& how, const KvPool& pool, long tokens, Team& team);

// A ragged batch of sequences for one kind of attention, and how its work is cut.
struct Attention {
    Heads heads;
    const int32_t *query_starts, *context_lens;  // [num_seqs + 1], [num_seqs]
    const int32_t* block_tables;                 // [num_seqs][max_blocks]
    long num_seqs, max_blocks;
    long q_stride;  // elements from token to token of q
    long window;    // 0: all keys are seen

    // Query tokens [token, token + count) of the flat batch, for one kv head; positions are in the sequence.
    struct Task {
        long seq, kv_head, token, position, count;
        long first_key, last_key;  // what any of its rows may see: [first_key, last_key)
    };
    struct Unit {  // a segment of positions of a task
        long task, segment, offset;
    };
    std::vector<Task> tasks;
    std::vector<Unit> units;  // where tasks are too few to keep the threads busy; else empty
    long space = 0;           // floats that the units need

    long group() const { return heads.q / heads.kv; }
};

// Returns 0, or 1 + the sequence whose block table names a block that the pool does not have.
long plan_attention(Attention& attention, long num_blocks, int threads);
void attend(const Attention& attention, const float* q, const KvPool& pool, float scale, float* out, float* space,
            Team& team);
