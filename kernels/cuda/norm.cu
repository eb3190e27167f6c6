// (Add +) RMSNorm and LayerNorm: one block per row, and the row stays in registers between its passes.
//
// MR_T      bf16 or f16
// MR_VECS   16-byte vectors per thread: blockDim.x * MR_VECS vectors hold a row
//
// The block's size follows from the row's length alone, and so does the tree of every sum: a row's result does not
// depend on the other rows. Bytes moved per row: x and out, with a residual also that one read and written.
#include "prelude.cuh"

struct NormParams {
    const MR_T* x;       // [num_rows, hidden]
    MR_T* residual;      // [num_rows, hidden], becomes x + residual; null: no addition
    const MR_T* weight;  // [hidden]
    const MR_T* bias;    // [hidden]; null: none
    MR_T* out;           // [num_rows, hidden]
    i32 hidden;          // a multiple of 8
    float eps;
};

// Over the block, in every thread. `partial` serves one sum per launch, so one barrier is enough.
MR_DEVICE float row_sum(float x, float (&partial)[32]) {
    const u32 lane = threadIdx.x % 32;
    x = warp_sum(x);
    if (lane == 0) partial[threadIdx.x / 32] = x;
    __syncthreads();
    return warp_sum(lane < blockDim.x / 32 ? partial[lane] : 0.0f);
}

template <bool CENTRED> MR_DEVICE void normalise(const NormParams& p, float (&means)[32], float (&squares)[32]) {
    const i32 num_vectors = p.hidden / VEC<MR_T>;
    const i64 row = static_cast<i64>(blockIdx.x) * p.hidden;
    const uint4 zeros = make_uint4(0, 0, 0, 0);

    // All loads before the first store: a store that may alias would hold later loads back.
    uint4 kept[MR_VECS], added[MR_VECS], weight[MR_VECS];
#pragma unroll
    for (int i = 0; i < MR_VECS; i++) {
        const i32 vector = threadIdx.x + i * blockDim.x;
        const bool inside = vector < num_vectors;
        kept[i] = inside ? load16_streaming(p.x + row + vector * VEC<MR_T>) : zeros;
        added[i] = inside && p.residual ? load16(p.residual + row + vector * VEC<MR_T>) : zeros;
        weight[i] = inside ? load16(p.weight + vector * VEC<MR_T>) : zeros;
    }

    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < MR_VECS; i++) {
        const i32 vector = threadIdx.x + i * blockDim.x;
        float x[VEC<MR_T>];
        unpack16<MR_T>(kept[i], x);
        if (p.residual) {
            float r[VEC<MR_T>];
            unpack16<MR_T>(added[i], r);
#pragma unroll
            for (int e = 0; e < VEC<MR_T>; e++) x[e] += r[e];
            kept[i] = pack16<MR_T>(x);
            unpack16<MR_T>(kept[i], x);  // what is normalised is what the residual holds
            if (vector < num_vectors) store16(p.residual + row + vector * VEC<MR_T>, kept[i]);
        }
#pragma unroll
        for (int e = 0; e < VEC<MR_T>; e++) sum += CENTRED ? x[e] : x[e] * x[e];
    }

    float mean = 0.0f;
    if constexpr (CENTRED) {
        mean = row_sum(sum, means) / p.hidden;
        sum = 0.0f;
#pragma unroll
        for (int i = 0; i < MR_VECS; i++) {
            if (threadIdx.x + i * blockDim.x >= num_vectors) continue;  // its zeros are no elements of the row
            float x[VEC<MR_T>];
            unpack16<MR_T>(kept[i], x);
#pragma unroll
            for (int e = 0; e < VEC<MR_T>; e++) sum += (x[e] - mean) * (x[e] - mean);
        }
    }
    const float scale = rsqrtf(row_sum(sum, squares) / p.hidden + p.eps);

#pragma unroll
    for (int i = 0; i < MR_VECS; i++) {
        const i32 vector = threadIdx.x + i * blockDim.x;
        if (vector >= num_vectors) continue;
        float x[VEC<MR_T>], w[VEC<MR_T>], b[VEC<MR_T>] = {};
        unpack16<MR_T>(kept[i], x);
        unpack16<MR_T>(weight[i], w);
        if (CENTRED && p.bias) load_vec(b, p.bias + vector * VEC<MR_T>);
#pragma unroll
        for (int e = 0; e < VEC<MR_T>; e++) x[e] = (x[e] - mean) * scale * w[e] + b[e];
        store_vec(p.out + row + vector * VEC<MR_T>, x);
    }
}

extern "C" __global__ void __launch_bounds__(1024) mr_rms_norm(NormParams p) {
    __shared__ float squares[32];
    normalise<false>(p, squares, squares);
}

extern "C" __global__ void __launch_bounds__(1024) mr_layer_norm(NormParams p) {
    __shared__ float means[32];
    __shared__ float squares[32];
    normalise<true>(p, means, squares);
}
