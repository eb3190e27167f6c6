"""Device time of enqueued work, by CUDA events, with a cold L2."""

import statistics
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

COLD_FACTOR = 4.0  # buffers that are rotated are this many times the L2 in all


class Timer(Protocol):
    def seconds(self, works: Sequence[Callable[[], object]], repeats: int = 20) -> float:
        """Median device time of one work. The works are alike and over buffers of their own, and take turns, so that
        each finds the L2 filled with the others'."""


class CudaTimer:
    """Each work lies between two events. A burst is enqueued behind a wait of the device, so that the host, which
    launches more slowly than small kernels run, is ahead of it."""

    def __init__(self, head_start_cycles: int = 10_000_000) -> None:
        self._cycles = head_start_cycles

    def seconds(self, works: Sequence[Callable[[], object]], repeats: int = 20) -> float:
        for work in works[:2]:
            work()  # loads modules and fills caches of the host
        torch.cuda.synchronize()
        times: list[float] = []
        while len(times) < repeats:
            burst = min(8, repeats - len(times))
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(2 * burst)]
            torch.cuda._sleep(self._cycles)
            for index in range(burst):
                marks[2 * index].record()
                works[(len(times) + index) % len(works)]()
                marks[2 * index + 1].record()
            torch.cuda.synchronize()
            times += [marks[2 * i].elapsed_time(marks[2 * i + 1]) / 1e3 for i in range(burst)]
        return statistics.median(times)


def num_rotated(working_set: int, l2_bytes: int, free_bytes: int, most: int = 64) -> int:
    """How many sets of buffers to take turns over, so that none is in the L2 when its turn comes: 1 for a set that is
    larger by itself than what must pass."""
    wanted = -(-int(COLD_FACTOR * l2_bytes) // max(1, working_set)) if working_set < COLD_FACTOR * l2_bytes else 1
    fitting = max(1, int(0.6 * free_bytes) // max(1, working_set))
    return max(1, min(wanted + (wanted > 1), fitting, most))


def l2_bytes() -> int:
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)


def free_bytes() -> int:
    return int(torch.cuda.mem_get_info()[0])
