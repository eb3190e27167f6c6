// Shared memory with red zones, poisoned before each block; asynchronous copies; checks of addresses.
#pragma once

#include "emu_fibers.h"

namespace emu {

// A stretch of shared memory, of which the red zones before and behind must stay as they are.
struct SharedRegion {
    unsigned char* data;
    size_t bytes;
    const char* name;
    SharedRegion* next;
};

static SharedRegion* static_regions;
static SharedRegion dynamic_region;

static void poison(const SharedRegion& region) {
    memset(region.data - REDZONE_BYTES, POISON, region.bytes + 2 * REDZONE_BYTES);
}

static void check_redzones(const SharedRegion& region) {
    for (size_t i = 0; i < REDZONE_BYTES; i++) {
        if (region.data[region.bytes + i] != POISON)
            fail("wrote %zu bytes behind the %zu bytes of %s", i, region.bytes, region.name);
        if (region.data[-1 - static_cast<ptrdiff_t>(i)] != POISON)
            fail("wrote %zu bytes before %s", i + 1, region.name);
    }
}

// A __shared__ variable. It enters the list when a thread first reaches its declaration.
template <typename T> struct SharedVariable {
    alignas(1024) unsigned char bytes[REDZONE_BYTES + (sizeof(T) + 15) / 16 * 16 + REDZONE_BYTES];
    SharedRegion region;

    explicit SharedVariable(const char* name) : region{bytes + REDZONE_BYTES, sizeof(T), name, static_regions} {
        static_regions = &region;
        poison(region);
    }
    T& value() { return *reinterpret_cast<T*>(region.data); }
};

static void poison_shared() {
    poison(dynamic_region);
    for (SharedRegion* region = static_regions; region; region = region->next) poison(*region);
}

static void check_shared() {
    check_redzones(dynamic_region);
    for (SharedRegion* region = static_regions; region; region = region->next) check_redzones(*region);
}

static bool inside(const SharedRegion& region, const void* address, size_t bytes) {
    const unsigned char* p = static_cast<const unsigned char*>(address);
    return p >= region.data && p + bytes <= region.data + region.bytes;
}

static void check_aligned(const void* address, size_t bytes, const char* what) {
    if (reinterpret_cast<uintptr_t>(address) % bytes)
        fail("%s: address %p is not a multiple of %zu", what, address, bytes);
}

static void check_in_shared(const void* address, size_t bytes, const char* what) {
    if (inside(dynamic_region, address, bytes)) return;
    for (SharedRegion* region = static_regions; region; region = region->next)
        if (inside(*region, address, bytes)) return;
    const ptrdiff_t offset = static_cast<const unsigned char*>(address) - dynamic_region.data;
    fail("%s: %zu bytes at offset %td are not in shared memory, of which %zu bytes are dynamic", what, bytes, offset,
         dynamic_region.bytes);
}

static void land(const PendingCopy& copy) {
    if (copy.from)
        memcpy(copy.to, copy.from, 16);
    else
        memset(copy.to, 0, 16);
}

static void cp_async16(void* shared, const void* global, bool valid) {
    check_aligned(shared, 16, "cp.async, shared address");
    check_aligned(global, 16, "cp.async, global address");
    check_in_shared(shared, 16, "cp.async");
    Fiber& fiber = fibers[current];
    const PendingCopy copy{shared, valid ? global : nullptr, fiber.groups_committed};
    if (!late_copies) {
        land(copy);
        return;
    }
    memset(shared, POISON, 16);
    if (fiber.copy_tail == fiber.copy_capacity) {
        if (fiber.copy_head) {
            memmove(fiber.copies, fiber.copies + fiber.copy_head,
                    (fiber.copy_tail - fiber.copy_head) * sizeof(PendingCopy));
            fiber.copy_tail -= fiber.copy_head;
            fiber.copy_head = 0;
        } else {
            fiber.copy_capacity = fiber.copy_capacity ? 2 * fiber.copy_capacity : 64;
            void* grown = realloc(fiber.copies, fiber.copy_capacity * sizeof(PendingCopy));
            if (!grown) fail("no memory for %u copies under way", fiber.copy_capacity);
            fiber.copies = static_cast<PendingCopy*>(grown);
        }
    }
    fiber.copies[fiber.copy_tail++] = copy;
}

static void cp_async_commit() { fibers[current].groups_committed++; }

// Lands all committed groups but the latest `pending`.
static void cp_async_wait(unsigned pending) {
    Fiber& fiber = fibers[current];
    while (fiber.copy_head < fiber.copy_tail) {
        const PendingCopy& copy = fiber.copies[fiber.copy_head];
        if (copy.group + pending >= fiber.groups_committed) break;
        land(copy);
        fiber.copy_head++;
    }
    if (fiber.copy_head == fiber.copy_tail) fiber.copy_head = fiber.copy_tail = 0;
}

}  // namespace emu
