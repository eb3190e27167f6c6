"""Decode steps as CUDA graphs: one for each size of batch that is worth having, captured at start.

A step at 32 layers is some 300 launches of a few microseconds each on the host, and one where it is a graph. A batch
runs in the smallest graph that holds it; the places behind it are padded (see `DecodeState`).
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from millrace.runtime.cuda.driver import CudaDriver

DENSE_FROM = 8  # buckets above are multiples of this: the tile of eight rows that a tensor core multiplies anyway
COARSE_FROM, COARSE = 256, 32


def buckets(max_rows: int) -> tuple[int, ...]:
    """Batch sizes with a graph: 1, 2, 4, 8, 16, 24, ... 256, 288, ... and max_rows itself, rising."""
    sizes = [1, 2, 4, *range(DENSE_FROM, COARSE_FROM, DENSE_FROM), *range(COARSE_FROM, max_rows, COARSE)]
    return (*(size for size in sizes if size < max_rows), max_rows)


class DecodeGraphs:
    """The graphs of one engine, which share a memory pool: only one of them runs at a time.

    Attributes:
        sizes: that are to be captured, rising.
        refused: why there are none, in words; empty if all are. Batches without a graph are launched op by op.
        capture_bytes: what each capture took of the device, in their order.
    """

    def __init__(self, driver: CudaDriver, sizes: Iterable[int], step: Callable[[int], Tensor]) -> None:
        """`step(size)` enqueues a decode step of that many places and returns its logits [size, vocab_size]."""
        self.sizes = sorted(set(sizes))
        self.refused = ""
        self.capture_bytes: list[int] = []
        self._driver = driver
        self._step = step
        self._graphs: dict[int, Any] = {}
        self._pool: Any = None
        # [largest size, vocab_size], written by all graphs: in their pool each would keep logits of its own.
        self._logits: Tensor | None = None

    @property
    def captured(self) -> tuple[int, ...]:
        return tuple(sorted(self._graphs))

    def capture(self, progress: Callable[[int, int], None] = lambda done, total: None, most: int | None = None) -> None:
        """On the lane's thread, before any step: the largest first, so that the smaller ones live in its memory.

        What cannot be captured (an op that reads back from the device) is said in `refused`; then no size has a graph,
        since a broken capture may leave the pool that all share in a state of its own. Raises torch.OutOfMemoryError.
        """
        for done, size in enumerate(list(reversed(self.sizes))[:most], 1):
            # Once for real: modules are loaded and libraries take their workspaces outside of any capture.
            self._driver.enqueue(partial(self._keep, size))
            self._driver.drain()
            before = self._driver.memory().free
            try:
                graph = self._driver.capture(partial(self._keep, size), self._pool)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                reason = str(error).partition("\n")[0]
                self.refused = f"a step of {size} sequences cannot be captured: {reason}"
                self._graphs.clear()
                self._pool = None
                return
            self.capture_bytes.append(before - self._driver.memory().free)
            self._pool = self._driver.pool_of(graph)
            self._graphs[size] = graph
            progress(done, len(self.sizes))

    def holding(self, batch: int) -> int | None:
        """The smallest captured size for a batch; None if there is none."""
        return next((size for size in self.sizes if size >= batch and size in self._graphs), None)

    def replay(self, size: int) -> Tensor:
        """Within `CudaDriver.enqueue`: the step of a captured size. Its logits are overwritten by the next step, which
        is enqueued behind whoever reads these."""
        assert self._logits is not None
        self._driver.replay(self._graphs[size])
        return self._logits[:size]

    def _keep(self, size: int) -> None:
        logits = self._step(size)
        if self._logits is None:
            self._logits = torch.empty_like(logits)  # the first and largest, and outside of any capture
        self._logits[:size].copy_(logits)
