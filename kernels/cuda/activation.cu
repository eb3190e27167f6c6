// SiLU and GELU, of a matrix or of the gate half of a merged gate-up matrix times its other half.
//
// MR_T      bf16 or f16
// MR_ACT    0 SiLU, 1 GELU by tanh, 2 GELU by erf (Hendrycks & Gimpel 2016)
// MR_GATED  1: x holds [gate, up] side by side, out = act(gate) * up (Shazeer 2020); 0: out = act(x)
//
// One 16-byte vector per thread; blocks of a row lie along y.
#include "prelude.cuh"

struct ActivationParams {
    const MR_T* x;  // [num_rows, width], gated [num_rows, 2 * width]
    MR_T* out;      // [num_rows, width]
    i32 width;      // a multiple of 8
};

// x / (1 + e^-z). For z below -87 the denominator is so large that the quotient comes out as 0.
MR_DEVICE float times_sigmoid(float x, float z) {
    return __fdividef(x, 1.0f + exp2_approx(z * -1.4426950408889634f));
}

MR_DEVICE float activate(float x) {
#if MR_ACT == 0
    return times_sigmoid(x, x);
#elif MR_ACT == 1
    // (1 + tanh u) / 2 is the sigmoid of 2 u, and u = sqrt(2 / pi) (x + 0.044715 x^3).
    return times_sigmoid(x, x * (1.5957691216057308f + 0.07135481282830453f * x * x));
#else
    return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
#endif
}

extern "C" __global__ void __launch_bounds__(256) mr_activation(ActivationParams p) {
    const i32 column = (blockIdx.y * blockDim.x + threadIdx.x) * VEC<MR_T>;
    if (column >= p.width) return;
    const i64 row = blockIdx.x;
    const MR_T* x = p.x + row * p.width * (MR_GATED ? 2 : 1) + column;
    float y[VEC<MR_T>];
    uint4 up;
    if (MR_GATED) up = load16_streaming(x + p.width);  // both loads under way before the arithmetic
    load_streaming(y, x);
#pragma unroll
    for (int e = 0; e < VEC<MR_T>; e++) y[e] = activate(y[e]);
    if (MR_GATED) {
        float factor[VEC<MR_T>];
        unpack16<MR_T>(up, factor);
#pragma unroll
        for (int e = 0; e < VEC<MR_T>; e++) y[e] *= factor[e];
    }
    store_vec(p.out + row * p.width + column, y);
}
