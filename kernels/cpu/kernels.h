// The kernels that decoder.cpp calls; what they compute stands where they are defined.
#pragma once

#include "common.h"
#include "kv.h"

// How a matrix is stored, in bits where that is enough; the same numbers are in cpu_linear.py.
enum Kind { INT4 = 4, INT8 = 8, BFLOAT16 = 16, FLOAT16 = 17, FLOAT8 = 18, FLOAT = 32 };

EXPORT void mr_linear(const float* x, const void* w, int kind, const float* scales, long group_bits, const float* bias,
                      float* y, long m, long n, long k, int threads);
EXPORT void mr_rms_norm(const float* x, float* residual, const float* weight, float* y, long rows, long width, float eps,
                        int threads);
EXPORT void mr_layer_norm(const float* x, float* residual, const float* weight, const float* bias, float* y, long rows,
                          long width, float eps, int threads);
EXPORT void mr_silu_mul(const float* gate_up, float* y, long rows, long width, int threads);
EXPORT void mr_gelu_tanh(const float* x, float* y, long count, int threads);
EXPORT void mr_qkv_to_cache(float* qkv, const float* q_norm, const float* k_norm, float eps, const float* cos_sin,
                            const int64_t* positions, const int64_t* slots, const KvPool* pool, long tokens, long heads,
                            long kv_heads, long dim, long rotary_dim, int threads);
EXPORT long mr_attention(const float* q, const KvPool* pool, const int32_t* query_starts, const int32_t* context_lens,
                         const int32_t* block_tables, float* out, long num_seqs, long max_blocks, long num_blocks,
                         long num_heads, long num_kv_heads, long dim, long q_stride, long window, float scale,
                         int threads);
EXPORT void mr_quantized_linear(const float* x, const uint8_t* w, const uint8_t* codebook, const int64_t* order,
                                const float* bias, float* y, long m, long n, long k, long group, int bits,
                                int threads);
