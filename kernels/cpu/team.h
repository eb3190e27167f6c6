// Threads that work on one call together. All of them run the same code over the same arguments, stage by stage: a
// stage shares its work out by `share` or `each`, and ends with `barrier`, behind which all see what each has written.
// A region of threads is begun once for a call, be it one op or all layers of a decoder: between stages a barrier costs
// a fraction of what beginning a region does.
#pragma once

#include "common.h"

#include <atomic>
#include <vector>

#include <omp.h>

class Team {
  public:
    struct alignas(64) Counter {
        std::atomic<long> value{0};
    };
    static constexpr int STAGES = 3;  // a counter is set back while the stages before and after its own may go on

    const int rank, size;
    Team(std::vector<Counter>& counters, int rank, int size) : rank(rank), size(size), counters(counters) {}

    // f(begin, end): this thread's part of 0 .. count.
    template <class F>
    INLINE void share(long count, F f) const {
        f(count * rank / size, count * (rank + 1) / size);
    }

    // f(piece, following) for each piece of 0 .. count, by some thread: this one takes those of its own part in order,
    // and when it has no more, those that others have not begun. `following` is what it most likely takes next, or
    // count. Once in a stage.
    template <class F>
    INLINE void each(long count, F f) {
        for (int i = 0; i < size; i++) {
            const int owner = (rank + i) % size;
            const long begin = count * owner / size, end = count * (owner + 1) / size;
            std::atomic<long>& taken = counter(stage, owner);
            for (long piece; (piece = begin + taken.fetch_add(1, std::memory_order_relaxed)) < end;)
                f(piece, piece + 1 < end ? piece + 1 : count);
        }
    }

    void barrier() {
#pragma omp barrier
        stage = (stage + 1) % STAGES;
        // Of the stage after this one: nobody can be in it yet, nor any more in the one that used it before.
        counter((stage + 1) % STAGES, rank).store(0, std::memory_order_relaxed);
    }

  private:
    std::atomic<long>& counter(int of_stage, int of_rank) { return counters[of_stage * size + of_rank].value; }

    std::vector<Counter>& counters;
    int stage = 0;
};

constexpr long PARALLEL_ELEMENTS = 1 << 15;  // below this a team costs more to begin than it saves

inline int useful_threads(long elements, int threads) { return elements < PARALLEL_ELEMENTS ? 1 : threads; }

// body(team) in each of up to `threads` threads.
template <class F>
void with_team(int threads, F body) {
    std::vector<Team::Counter> counters(Team::STAGES * threads);
#pragma omp parallel num_threads(threads)
    {
        Team team(counters, omp_get_thread_num(), omp_get_num_threads());
        body(team);
    }
}
