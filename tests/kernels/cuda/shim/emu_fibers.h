// One block at a time; each of its threads is a fiber, run in a fixed order until it waits.
//
// A thread leaves the processor only where it waits: in a warp collective for the lanes of its mask, or at
// __syncthreads for the block. Then the next runnable lane of its warp runs, else the next warp's. With no runnable
// thread left the block is in a deadlock, which is an error with the place where each kind of waiter stands.
#pragma once

#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <sys/mman.h>

// The switch between fibers: twelve instructions on x86-64, four times slower by ucontext elsewhere or when asked for.
#if defined(__x86_64__) && !defined(MR_EMU_UCONTEXT)
#define MR_EMU_ASSEMBLY 1
#else
#define MR_EMU_ASSEMBLY 0
#endif
#if !MR_EMU_ASSEMBLY
#include <ucontext.h>
#endif

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

static uint3 threadIdx, blockIdx;
static dim3 blockDim, gridDim;

namespace emu {

constexpr int MAX_THREADS = 1024;
constexpr size_t STACK_BYTES = 96 * 1024;
constexpr size_t GUARD_BYTES = 4096;  // below each stack: an overflow is a fault, not a neighbour's changed variable
constexpr size_t REDZONE_BYTES = 1024;
constexpr unsigned char POISON = 0xff;  // NaN in every float type, -1 in the integers

// An asynchronous copy that was issued and has not landed.
struct PendingCopy {
    void* to;
    const void* from;  // null: zeros
    unsigned group;
};

struct Fiber {
#if MR_EMU_ASSEMBLY
    void* stack_pointer;
#else
    ucontext_t context;
#endif
    char* stack;
    PendingCopy* copies;  // [copy_capacity], in order of issue from copy_head to copy_tail
    unsigned copy_head, copy_tail, copy_capacity;
    unsigned groups_committed;
    bool waits_in_warp;
};

struct Warp {
    uint32_t alive, runnable, at_block_barrier;
    uint32_t arrived;  // lanes that wait in a collective
    uint32_t mask[32];
    const char* collective[32];
    // What the lanes brought and what they take away; the last lane to arrive computes the latter from the former.
    alignas(16) unsigned char in[32][32];
    alignas(16) unsigned char out[32][16];
    int source[32];
};

static Fiber fibers[MAX_THREADS];
static Warp warps[MAX_THREADS / 32];
static int current = -1;  // thread that runs; -1 outside of a block
static int num_threads, num_warps, num_alive, num_at_barrier;
static int barrier_votes, barrier_result;  // of __syncthreads_or, _and and _count
static unsigned long long num_switches;
static bool backward;     // order of lanes and warps
static bool late_copies;  // cp.async lands when it is waited for, else when it is issued
static void (*block_body)();

static sigjmp_buf launch_frame;
static char* error_text;
static size_t error_capacity;

// Ends the launch: the launcher returns the message, and fibers are left where they stand.
[[noreturn]] static void fail(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    int used = vsnprintf(error_text, error_capacity, format, arguments);
    va_end(arguments);
    size_t end = used >= 0 && static_cast<size_t>(used) < error_capacity ? used : error_capacity - 1;
    end += snprintf(error_text + end, error_capacity - end, " (block %u,%u,%u", blockIdx.x, blockIdx.y, blockIdx.z);
    if (current >= 0 && end < error_capacity)
        end += snprintf(error_text + end, error_capacity - end, " thread %d", current);
    if (end < error_capacity) snprintf(error_text + end, error_capacity - end, ")");
    siglongjmp(launch_frame, 1);
}

#if MR_EMU_ASSEMBLY
extern "C" void mr_emu_switch(void** from, void* to);
asm(R"(
.text
.hidden mr_emu_switch
.globl mr_emu_switch
.type mr_emu_switch,@function
mr_emu_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp,(%rdi)
    mov %rsi,%rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
.size mr_emu_switch,.-mr_emu_switch
)");
static void* main_stack_pointer;
#else
static ucontext_t main_context;
#endif

static void switch_to(int thread) {
    const int from = current;
    current = thread;
    num_switches++;
    if (thread >= 0) threadIdx.x = static_cast<unsigned>(thread);
#if MR_EMU_ASSEMBLY
    mr_emu_switch(from < 0 ? &main_stack_pointer : &fibers[from].stack_pointer,
                  thread < 0 ? main_stack_pointer : fibers[thread].stack_pointer);
#else
    swapcontext(from < 0 ? &main_context : &fibers[from].context, thread < 0 ? &main_context : &fibers[thread].context);
#endif
}

// The next lane after `lane` in the order of the run, around the warp; -1 if none is runnable.
static int next_lane(uint32_t runnable, int lane) {
    if (!runnable) return -1;
    if (backward) {
        const uint32_t below = lane > 0 ? runnable & ((1u << lane) - 1) : 0;
        return 31 - __builtin_clz(below ? below : runnable);
    }
    const uint32_t above = lane < 31 ? runnable & ~((2u << lane) - 1) : 0;
    return __builtin_ctz(above ? above : runnable);
}

static int next_thread() {
    const int warp = current >> 5;
    const int lane = next_lane(warps[warp].runnable, current & 31);
    if (lane >= 0) return warp * 32 + lane;
    for (int step = 1; step < num_warps; step++) {
        const int other = (warp + (backward ? num_warps - step : step)) % num_warps;
        const int first = next_lane(warps[other].runnable, backward ? 0 : 31);
        if (first >= 0) return other * 32 + first;
    }
    return -1;
}

[[noreturn]] static void fail_deadlock() {
    int in_warp = 0, at_block = 0, first = -1;
    for (int w = 0; w < num_warps; w++) {
        const Warp& warp = warps[w];
        at_block += __builtin_popcount(warp.at_block_barrier);
        in_warp += __builtin_popcount(warp.arrived);
        if (!warp.arrived || first >= 0) continue;
        first = w * 32 + __builtin_ctz(warp.arrived);
        for (int lane = 0; lane < 32; lane++)
            for (int other = 0; other < 32; other++)
                if (warp.arrived >> lane & warp.arrived >> other & warp.mask[lane] >> other & 1u &&
                    warp.mask[lane] != warp.mask[other])
                    fail("deadlock: lanes %d and %d of warp %d wait with different masks, %08x in %s and %08x in %s",
                         lane, other, w, warp.mask[lane], warp.collective[lane], warp.mask[other],
                         warp.collective[other]);
    }
    if (in_warp)
        fail("deadlock: %d of %d threads wait at __syncthreads, %d in a warp collective (thread %d in %s)", at_block,
             num_alive, in_warp, first, warps[first >> 5].collective[first & 31]);
    fail("deadlock: %d of %d threads wait at __syncthreads", at_block, num_alive);
}

// The current thread is not runnable: another one runs until this one is.
static void wait() {
    Warp& warp = warps[current >> 5];
    const uint32_t bit = 1u << (current & 31);
    while (!(warp.runnable & bit)) {
        const int thread = next_thread();
        if (thread < 0) fail_deadlock();
        switch_to(thread);
    }
}

// Whoever comes last to a barrier lets the first in the order of the run go on first: after a barrier, threads run in
// the same order as after the start.
static void yield_to(int thread) {
    if (thread != current) switch_to(thread);
}

static void release_block() {
    num_at_barrier = 0;
    barrier_result = barrier_votes;
    barrier_votes = 0;
    for (int w = 0; w < num_warps; w++) {
        warps[w].runnable |= warps[w].at_block_barrier;
        warps[w].at_block_barrier = 0;
    }
}

// The number of threads of the block whose vote is true.
static int sync_block(bool vote) {
    Warp& warp = warps[current >> 5];
    const uint32_t bit = 1u << (current & 31);
    warp.at_block_barrier |= bit;
    warp.runnable &= ~bit;
    barrier_votes += vote;
    if (++num_at_barrier == num_alive) {
        release_block();
        int first = backward ? num_warps - 1 : 0;
        while (!warps[first].runnable) first += backward ? -1 : 1;
        yield_to(first * 32 + next_lane(warps[first].runnable, backward ? 0 : 31));
    } else {
        wait();
    }
    return barrier_result;
}

// Meets the lanes of `mask`. The last to arrive calls finish(warp, lanes), then all go on. To name a lane that exited
// is an error here, although the hardware forgives it in __syncwarp.
template <typename Finish> static void meet(uint32_t mask, const char* collective, Finish finish) {
    Warp& warp = warps[current >> 5];
    const int lane = current & 31;
    const uint32_t bit = 1u << lane;
    if (!(mask & bit)) fail("%s: lane %d is not in its own mask %08x", collective, lane, mask);
    if (mask & ~warp.alive) fail("%s: mask %08x names lanes that do not exist or exited", collective, mask);
    // Lanes of the mask that wait with another one are in a collective of their own and come here later.
    uint32_t here = bit;
    for (uint32_t left = warp.arrived & mask; left; left &= left - 1) {
        const int other = __builtin_ctz(left);
        if (warp.mask[other] != mask) continue;
        if (warp.collective[other] != collective)
            fail("lanes of one warp met in different collectives: %s and %s", collective, warp.collective[other]);
        here |= 1u << other;
    }
    warp.mask[lane] = mask;
    warp.collective[lane] = collective;
    warp.arrived |= bit;
    if (here == mask) {
        finish(warp, mask);
        warp.arrived &= ~mask;
        warp.runnable |= mask;
        yield_to((current & ~31) + next_lane(mask, backward ? 0 : 31));
    } else {
        warp.runnable &= ~bit;
        wait();
    }
}

static void thread_entry() {
    block_body();
    Warp& warp = warps[current >> 5];
    const uint32_t bit = 1u << (current & 31);
    warp.alive &= ~bit;
    warp.runnable &= ~bit;
    num_alive--;
    for (uint32_t left = warp.arrived; left; left &= left - 1) {
        const int lane = __builtin_ctz(left);
        if (warp.mask[lane] & bit)
            fail("the thread exited while lane %d waits for it in %s", lane, warp.collective[lane]);
    }
    if (num_alive == 0) switch_to(-1);
    if (num_at_barrier == num_alive) release_block();
    const int thread = next_thread();
    if (thread < 0) fail_deadlock();
    switch_to(thread);
    fail("an exited thread was resumed");
}

static void prepare_fiber(int thread) {
    Fiber& fiber = fibers[thread];
    if (!fiber.stack) {
        void* memory = mmap(nullptr, STACK_BYTES + GUARD_BYTES, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) fail("no memory for the stack of thread %d", thread);
        mprotect(memory, GUARD_BYTES, PROT_NONE);
        fiber.stack = static_cast<char*>(memory);
    }
    fiber.copy_head = fiber.copy_tail = fiber.groups_committed = 0;
#if MR_EMU_ASSEMBLY
    // What the switch pops: six registers, then the address to return to; the ABI wants 16 n + 8 at a function's entry.
    void** top = reinterpret_cast<void**>(fiber.stack + STACK_BYTES + GUARD_BYTES - 64);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(thread_entry);
    for (int i = 0; i < 6; i++) *--top = nullptr;
    fiber.stack_pointer = top;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack + GUARD_BYTES;
    fiber.context.uc_stack.ss_size = STACK_BYTES;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, thread_entry, 0);
#endif
}

static void run_block() {
    num_alive = num_threads;
    num_at_barrier = barrier_votes = 0;
    for (int w = 0; w < num_warps; w++) {
        const int lanes = num_threads - w * 32;
        const uint32_t all = lanes >= 32 ? ~0u : (1u << lanes) - 1;
        warps[w].alive = warps[w].runnable = all;
        warps[w].arrived = warps[w].at_block_barrier = 0;
    }
    for (int thread = 0; thread < num_threads; thread++) prepare_fiber(thread);
    switch_to(backward ? num_threads - 1 : 0);
}

}  // namespace emu
