// What the machine can do at best: the floors that benches compare with.

#include "common.h"

// Reads `count` floats with all threads; the sum is returned so that the reads are not optimised away.
EXPORT float mr_probe_read(const float* data, long count, int threads) {
    float total = 0.0f;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) reduction(+ : total)
    for (long begin = 0; begin < count; begin += 1 << 18) {
        const long end = least(count, begin + (1 << 18));
        vf sums[4] = {};
        for (long i = begin; i + 4 * VL <= end; i += 4 * VL)
            for (int j = 0; j < 4; j++) {
                __builtin_prefetch(data + i + j * VL + 1024, 0, 2);
                sums[j] += load(data + i + j * VL);
            }
        total += hsum(sums[0] + sums[1] + sums[2] + sums[3]);
    }
    return total;
}

// Keeps a vector in a register, and the compiler from folding the loop.
#if defined(__x86_64__)
#define KEEP(value) asm volatile("" : "+v"(value))
#elif defined(__aarch64__)
#define KEEP(value) asm volatile("" : "+w"(value))
#else
#define KEEP(value) asm volatile("" : "+m"(value))
#endif

// Each thread does `rounds` times 12 vector multiply-adds in registers: 24 * VL * rounds * threads operations.
EXPORT float mr_probe_fma(long rounds, int threads) {
    float total = 0.0f;
#pragma omp parallel num_threads(threads) reduction(+ : total)
    {
        vf sums[12];
        for (int j = 0; j < 12; j++) sums[j] = splat((float)j);
        const vf factor = splat(0.5f), term = splat(0.25f);
        for (long i = 0; i < rounds; i++) {
#pragma GCC unroll 12
            for (int j = 0; j < 12; j++) {
                sums[j] = sums[j] * factor + term;
                KEEP(sums[j]);
            }
        }
        vf all{};
        for (int j = 0; j < 12; j++) all += sums[j];
        total += hsum(all);
    }
    return total;
}
