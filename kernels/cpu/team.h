// Threads that work on one call together. All of them run the same code over the same arguments, stage by stage: a
// stage shares its work out by `share` or `grab`, and ends with `barrier`, behind which all see what each has written.
// A region of threads is begun once for a call, be it one op or all layers of a decoder: between stages a barrier costs
// a fraction of what beginning a region does.
#pragma once

#include "common.h"

#include <atomic>

#include <omp.h>

class Team {
    static constexpr int COUNTERS = 3;

  public:
    struct Shared {
        struct alignas(64) Counter {
            std::atomic<long> value{0};
        };
        Counter next[COUNTERS];
    };

    const int rank, size;
    Team(Shared& shared, int rank, int size) : rank(rank), size(size), shared(shared) {}

    // The next piece of this stage's work, counted from 0.
    long grab() { return shared.next[stage].value.fetch_add(1, std::memory_order_relaxed); }

    // f(begin, end): this thread's part of 0 .. count.
    template <class F>
    INLINE void share(long count, F f) const {
        f(count * rank / size, count * (rank + 1) / size);
    }

    void barrier() {
#pragma omp barrier
        stage = (stage + 1) % COUNTERS;
        // Of the stage after this one: nobody can be in it yet, nor any more in the one that used it before.
        if (rank == 0) shared.next[(stage + 1) % COUNTERS].value.store(0, std::memory_order_relaxed);
    }

  private:
    Shared& shared;
    int stage = 0;
};

// body(team) in each of up to `threads` threads.
template <class F>
void with_team(int threads, F body) {
    Team::Shared shared;
#pragma omp parallel num_threads(threads)
    {
        Team team(shared, omp_get_thread_num(), omp_get_num_threads());
        body(team);
    }
}
