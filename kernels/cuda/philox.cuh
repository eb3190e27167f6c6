// Philox4x32-10, the counter-based generator of Salmon et al. 2011 ("Parallel random numbers: as easy as 1, 2, 3").
//
// The same function as millrace.kernels.philox: the key is the seed, the counter is (low word of the position,
// choice, high word of the position, round). Round 0 gives the numbers that the CPU sampler draws with.
#pragma once
#include "prelude.cuh"

struct Random4 {
    u32 word[4];
};

MR_DEVICE Random4 philox4x32(u32 c0, u32 c1, u32 c2, u32 c3, u32 key0, u32 key1) {
#pragma unroll
    for (int i = 0; i < 10; i++) {
        const u64 product0 = static_cast<u64>(c0) * 0xD2511F53u;
        const u64 product1 = static_cast<u64>(c2) * 0xCD9E8D57u;
        c0 = static_cast<u32>(product1 >> 32) ^ c1 ^ key0;
        c1 = static_cast<u32>(product1);
        c2 = static_cast<u32>(product0 >> 32) ^ c3 ^ key1;
        c3 = static_cast<u32>(product0);
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return Random4{{c0, c1, c2, c3}};
}

MR_DEVICE Random4 draw_random(u64 seed, u32 choice, u64 position, u32 round) {
    return philox4x32(static_cast<u32>(position), choice, static_cast<u32>(position >> 32), round,
                      static_cast<u32>(seed), static_cast<u32>(seed >> 32));
}

// In [0, 1), 24 bits: every value is exact in float32.
MR_DEVICE float uniform24(u32 word) { return static_cast<float>(word >> 8) * 5.9604644775390625e-8f; }
