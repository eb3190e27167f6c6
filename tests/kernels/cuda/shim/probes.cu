// What test_shim.py asks of the shim. p.k says which probe runs; x and y are what it reads and writes.
#include "prelude.cuh"

struct Params {
    const void* x;
    void* y;
    i32 n, k;
};

template <typename T> MR_DEVICE T* as(const void* p) { return static_cast<T*>(const_cast<void*>(p)); }

// Every conversion of the prelude over whole ranges: 16-bit patterns one way, floats the other.
extern "C" __global__ void conversions(Params p) {
    const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= static_cast<u32>(p.n)) return;
    const float* in = as<const float>(p.x);
    float* out = as<float>(p.y);
    float low, high;
    switch (p.k) {
        case 0: out[i] = to_float(f16{static_cast<u16>(i)}); break;
        case 1: out[i] = to_float(bf16{static_cast<u16>(i)}); break;
        case 2: out[i] = e4m3_to_float(static_cast<u8>(i)); break;
        case 3: out[i] = to_float(from_float<f16>(in[i])); break;
        case 4: out[i] = to_float(from_float<bf16>(in[i])); break;
        case 5: out[i] = e4m3_to_float(float_to_e4m3(in[i])); break;
        case 6: unpack2<f16>(pack2<f16>(in[i], -in[i]), low, high); out[i] = low == -high || low != low ? low : 1e9f; break;
        case 7: unpack2<bf16>(pack2<bf16>(-in[i], in[i]), low, high); out[i] = low == -high || low != low ? high : 1e9f; break;
    }
}

// One warp per product: y [16, 8] float = x[0] [16, 16] times x[1] [16, 8], both row-major in shared memory.
extern "C" __global__ void product(Params p) {
    __shared__ __align__(16) MR_T a[16][16];
    __shared__ __align__(16) MR_T b[16][8];
    const MR_T* x = as<const MR_T>(p.x);
    float* y = as<float>(p.y);
    const u32 lane = threadIdx.x;
    cp_async16(&a[lane / 2][lane % 2 * 8], x + lane * 8, true);
    if (lane < 16) cp_async16(&b[lane][0], x + 256 + lane * 8, true);
    cp_async_commit();
    cp_async_wait<0>();
    __syncwarp();
    u32 af[4], bf[4];
    ldmatrix_x4(af, &a[lane % 16][lane / 16 * 8]);
    ldmatrix_x4_trans(bf, &b[lane % 16][0]);
    const u32 half[2] = {bf[0], bf[1]};
    float d[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    mma_m16n8k16<MR_T>(d, af, half);
    for (int i = 0; i < 4; i++) y[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i] - 1.0f;
}

extern "C" __global__ void collectives(Params p) {
    const int lane = threadIdx.x % 32;
    int* y = as<int>(p.y) + 32 * (blockIdx.x * blockDim.x + threadIdx.x);
    const int v = static_cast<int>(threadIdx.x) + 100;
    y[0] = __shfl_sync(FULL_WARP, v, 5);
    y[1] = __shfl_sync(FULL_WARP, v, 3, 8);
    y[2] = __shfl_xor_sync(FULL_WARP, v, 9);
    y[3] = __shfl_up_sync(FULL_WARP, v, 3);
    y[4] = __shfl_down_sync(FULL_WARP, v, 2, 16);
    y[5] = static_cast<int>(__ballot_sync(FULL_WARP, lane % 3 == 0));
    y[6] = __any_sync(FULL_WARP, lane == 40) * 2 + __all_sync(FULL_WARP, lane < 32);
    y[7] = static_cast<int>(__reduce_add_sync(FULL_WARP, static_cast<u32>(lane)));
    y[8] = __reduce_max_sync(FULL_WARP, -lane);
    y[9] = static_cast<int>(__reduce_min_sync(FULL_WARP, static_cast<u32>(lane + 7)));
    y[10] = static_cast<int>(warp_sum(static_cast<float>(lane)));
    y[11] = static_cast<int>(warp_max<8>(static_cast<float>(lane)));
    y[12] = static_cast<int>(block_sum<64>(static_cast<float>(threadIdx.x)));
    y[13] = static_cast<int>(block_max<64>(static_cast<float>(threadIdx.x)));
    // Parts of a warp that go their own ways and different numbers of times, then meet.
    int turns = 0;
    if (lane < 20) {
        const u32 mask = 0xfffffu;
        for (int i = 0; i < 3; i++) turns += __shfl_sync(mask, lane, (lane + 1) % 20);
    } else {
        __syncwarp(0xfff00000u);
        turns = __shfl_xor_sync(0xfff00000u, lane, 1);
    }
    y[14] = turns;
    y[15] = __shfl_sync(FULL_WARP, turns, 31 - lane);
    y[16] = __syncthreads_count(lane % 2) * 100 + __syncthreads_or(lane == 99) * 10 + __syncthreads_and(lane >= 0);
    y[17] = static_cast<int>(__shfl_xor_sync(FULL_WARP, static_cast<u64>(lane) << 33, 1) >> 33);
    const u32 packed = __byte_perm(0x03020100u, 0x07060504u, 0x7531u);
    y[18] = packed == 0x07050301u && __dp4a(0x01ff0203, 0x04050607, 10) == 10 + 21 + 12 - 5 + 4;
    y[19] = __popc(0xf0f0u) * 1000 + __ffs(8) * 100 + __clz(1) + (__brev(1u) == 0x80000000u) * 10000;
    y[20] = __umulhi(0x80000000u, 6u) == 3u && __umul64hi(1ull << 63, 6ull) == 3ull;
}

// The order in which threads run: each takes a number.
extern "C" __global__ void order(Params p) {
    static __shared__ int next;
    if (p.k == 0 && threadIdx.x == 0) next = -1;  // shared memory is poisoned with -1 anyway
    __syncthreads();
    int* y = as<int>(p.y) + blockIdx.x * blockDim.x;
    y[threadIdx.x] = atomicAdd(&next, 1) + 1;
    __syncthreads();
    if (threadIdx.x == 0) y[0] += 1000 * atomicInc(as<u32>(p.x), 1u << 30);
}

// Groups of asynchronous copies: what lies in shared memory before and after each wait.
extern "C" __global__ void copies(Params p) {
    extern __shared__ __align__(16) float shared[];
    const float* x = as<const float>(p.x);
    float* y = as<float>(p.y) + threadIdx.x * 8;
    float* mine = shared + threadIdx.x * 12;
    cp_async16(mine, x, true);
    cp_async_commit();
    cp_async16(mine + 4, x + 4, true);
    if (threadIdx.x == 1) cp_async_commit();  // groups are counted per thread
    cp_async16(mine + 8, x, false);
    cp_async_commit();
    y[0] = mine[0];
    cp_async_wait<1>();
    y[1] = mine[1];
    y[2] = mine[4];
    y[3] = mine[8];
    cp_async_wait<0>();
    y[4] = mine[5];
    y[5] = mine[8];
}

// The last block to come adds up what all have left behind, and makes the counter ready for the next launch.
extern "C" __global__ void last_block(Params p) {
    float* parts = as<float>(p.y) + 2;
    u32* counter = as<u32>(p.y);
    __shared__ bool last;
    const float sum = block_sum<64>(as<const float>(p.x)[blockIdx.x * 64 + threadIdx.x]);
    if (threadIdx.x == 0) {
        parts[blockIdx.x] = sum;
        __threadfence();
        last = atomicAdd(counter, 1u) == gridDim.x - 1;
    }
    __syncthreads();
    if (!last || threadIdx.x) return;
    float total = 0.0f;
    for (u32 i = 0; i < gridDim.x; i++) total += parts[i];
    as<float>(p.y)[1] = total;
    *counter = 0;
}

__noinline__ __device__ float deep(u32 t) {
    volatile char local[200000];
    local[0] = local[199999] = static_cast<char>(t);
    return local[0];
}

// One forbidden thing each.
extern "C" __global__ void misdeeds(Params p) {
    extern __shared__ __align__(16) u8 dynamic[];
    __shared__ float fixed[4];
    const u32 t = threadIdx.x, lane = t % 32;
    float* y = as<float>(p.y);
    const float* x = as<const float>(p.x);
    switch (p.k) {
        case 0: if (t < 40) __syncthreads(); else __syncwarp(); break;
        case 1: if (lane < 16) y[t] = __shfl_xor_sync(FULL_WARP, y[t], 1); break;
        case 2: if (lane < 16) __syncwarp(); else y[t] = __shfl_sync(FULL_WARP, y[t], 0); break;
        case 3: __syncwarp(lane < 16 ? FULL_WARP : 0xffff0001u); break;
        case 4: y[t] = __shfl_sync(0xffffu << (lane & 16), y[t], lane ^ 16); break;
        case 5: if (lane) __syncwarp(); break;
        case 6: if (lane == 3) return; __syncwarp(); break;
        case 7: __syncwarp(0xffu << (8 * ((lane / 8 + 1) % 4))); break;
        case 8: y[t] = *reinterpret_cast<const float*>(static_cast<u64>(p.k) - 8); break;
        case 9: y[-1] = 1.0f; break;
        case 10: y[p.n + lane] = x[p.n]; break;
        case 11: store16(y + 1, load16(x)); break;
        case 12: cp_async16(dynamic + 8, x, true); break;
        case 13: cp_async16(dynamic + 256, x, true); break;
        case 14: cp_async16(y, x, true); break;
        case 15: { u32 r[4]; ldmatrix_x4(r, dynamic + 16 * t); break; }
        case 16: dynamic[256 + t] = 1; break;
        case 17: fixed[4 + lane] = 1.0f; break;
        case 18: fixed[-1] = 0.0f; break;
        case 19: y[0] = static_cast<float>(p.n / static_cast<i32>(x[0])); break;
        case 20: __trap(); break;
        case 21: if (lane < 16) { u32 r[4]; ldmatrix_x4(r, dynamic); } break;
        case 22: y[0] = deep(t); break;
        case 23: y[0] = static_cast<float>(p.n / (p.k - 23)); break;
        case 24: __activemask(); break;
    }
}
