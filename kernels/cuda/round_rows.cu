// Around products whose both sides have 8 bits: activations rounded with a scale for each row, and sums of integers
// brought back to 16-bit floats. Rows are independent of each other.
//
// MR_T     bf16 or f16
// MR_CODE  fp8 (e4m3) or int8
#include "eight_bits.cuh"

constexpr i32 THREADS = 256;

struct RoundRowsParams {
    const MR_T* x;  // [m, k]
    u8* codes;      // [m, k]
    float* scales;  // [m]: code * scale is x; the row's largest magnitude becomes the largest code
    i32 k;          // a multiple of 8
};

// One block for each row. A NaN or an infinity makes the scale no finite number, and so the row's product.
extern "C" __global__ void __launch_bounds__(THREADS) mr_round_rows(RoundRowsParams p) {
    __shared__ u32 of_warp[THREADS / 32];
    const MR_T* x = p.x + blockIdx.x * static_cast<i64>(p.k);
    u32 bits = 0;  // as integers, magnitudes order like floats with NaN on top
    for (i32 column = threadIdx.x * 8; column < p.k; column += THREADS * 8) {
        float v[8];
        load_vec(v, x + column);
#pragma unroll
        for (i32 e = 0; e < 8; e++) bits = max(bits, __float_as_uint(v[e]) & 0x7fffffffu);
    }
#pragma unroll
    for (i32 step = 16; step > 0; step /= 2) bits = max(bits, __shfl_xor_sync(FULL_WARP, bits, step));
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = bits;
    __syncthreads();
#pragma unroll
    for (i32 warp = 0; warp < THREADS / 32; warp++) bits = max(bits, of_warp[warp]);
    const float largest = __uint_as_float(bits);
    constexpr float LIMIT = SAME<MR_CODE, fp8> ? 448.0f : 127.0f;
    const float inverse = largest > 1e-30f ? LIMIT / largest : 0.0f;  // below, all is 0: no infinite factor
    for (i32 column = threadIdx.x * 8; column < p.k; column += THREADS * 8) {
        float v[8];
        load_vec(v, x + column);
        u32 words[2] = {};
#pragma unroll
        for (i32 e = 0; e < 8; e++) {
            u32 byte;
            if constexpr (SAME<MR_CODE, fp8>) {
                byte = float_to_e4m3(v[e] * inverse);
            } else {
                byte = static_cast<u32>(max(-127, min(127, __float2int_rn(v[e] * inverse)))) & 0xffu;
            }
            words[e / 4] |= byte << e % 4 * 8;
        }
        u8* to = p.codes + blockIdx.x * static_cast<i64>(p.k) + column;
        *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
    }
    if (threadIdx.x == 0) p.scales[blockIdx.x] = largest / LIMIT;
}

struct ScaleSumsParams {
    const i32* sums;       // [m, n]
    const float* rows;     // [m], scales of the activations
    const float* columns;  // [n], scales of the weights
    const MR_T* bias;      // [n] or null
    MR_T* y;               // [m, y_stride]
    i64 y_stride;
    i32 n;  // a multiple of 8
};

// y = sums * rows * columns + bias. Grid: (m, n / 2048): 8 columns a thread.
extern "C" __global__ void __launch_bounds__(THREADS) mr_scale_sums(ScaleSumsParams p) {
    const i32 column = (blockIdx.y * THREADS + threadIdx.x) * 8;
    if (column >= p.n) return;
    const i64 row = blockIdx.x;
    const i32* sums = p.sums + row * p.n + column;
    const uint4 low = load16_streaming(sums), high = load16_streaming(sums + 4);
    const u32 words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    const float of_row = p.rows[row];
    float y[8], of_column[8], bias[8] = {};
    load_vec(of_column, p.columns + column);
    if (p.bias != nullptr) load_vec(bias, p.bias + column);
#pragma unroll
    for (i32 e = 0; e < 8; e++)
        y[e] = fmaf(static_cast<float>(static_cast<i32>(words[e])) * of_row, of_column[e], bias[e]);
    store_vec(p.y + row * p.y_stride + column, y);
}
