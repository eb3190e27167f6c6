"""Swap on a GPU: blocks of preempted sequences in pinned host memory, copied on a stream of their own.

Blocks are scattered over every layer's part of the pool, so a kernel collects some of them in a staging buffer, where
each is one run of bytes, and the copy engine takes them from there; on the way back the other way round. All of it is
in the order of one stream, slots and staging included. Against the other streams no event is needed: the scheduler
gives blocks away, and lets a sequence go on, only when the swap has reported.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from millrace.kernels.cuda_copy import gather_blocks, scatter_blocks
from millrace.kernels.cuda_launch import Launcher
from millrace.runtime.cuda.driver import CudaDriver
from millrace.runtime.messages import SwapPlan
from millrace.runtime.models.base import Model

STAGED_BLOCKS = 32
STAGED_BYTES = 64 << 20
SLAB_BYTES = 256 << 20  # pinned at a time: torch rounds each piece up to a power of two


class SwappableModel(Model[Tensor], Protocol):
    def block_storage(self, kv: Any) -> tuple[Tensor, Tensor | None]:
        """Where whole blocks lie, for those who copy them elsewhere: [num_layers, 2, num_blocks, ...], and the scales
        of a quantised cache in the same form."""


class CudaSwap:
    """Owns slots and staging: implements millrace.runtime.lanes.SwapLane.

    Attributes:
        block_seconds: measured by whoever starts the engine, with `rehearse`.
        num_staged: blocks that the staging buffer holds.
    """

    def __init__(self, driver: CudaDriver, launcher: Launcher, model: SwappableModel, kv: Any, num_slots: int) -> None:
        self.num_slots = num_slots
        self.block_seconds = 0.0
        self._driver = driver
        self._launcher = launcher
        self._pool, self._scales = model.block_storage(kv)
        parts = [part for part in (self._pool, self._scales) if part is not None]
        sizes = [part[:, :, 0].numel() * part.element_size() for part in parts]  # bytes of one block
        self.num_staged = max(1, min(STAGED_BLOCKS, STAGED_BYTES // sum(sizes)))
        # Of each part [num_staged, num_layers, 2, ...], and the same as bytes.
        self._staging = [part.new_empty(self.num_staged, *part.shape[:2], *part.shape[3:]) for part in parts]
        self._staged = [part.view(self.num_staged, -1).view(torch.uint8) for part in self._staging]
        self._slots: list[list[Tensor]] = []  # of each slot the bytes of each part
        slab = max(1, SLAB_BYTES // sum(sizes))
        for start in range(0, num_slots, slab):
            count = min(slab, num_slots - start)
            pinned = driver.pinned(count * sum(sizes)).view(count, sum(sizes))
            self._slots += [list(row.split(sizes)) for row in pinned]

    def run(self, plan: SwapPlan) -> None:
        for start in range(0, len(plan.blocks), self.num_staged):
            part = slice(start, start + self.num_staged)
            self._driver.enqueue(partial(self._move, plan.out, plan.blocks[part], plan.slots[part]))

    def rehearse(self) -> int:
        """On the lane's thread, before any step: copies as many blocks as are staged to the host and back, and returns
        their number."""
        count = min(self.num_staged, self.num_slots, self._pool.shape[2] - 1)
        blocks, slots = list(range(1, count + 1)), list(range(count))
        for out in (True, False):
            self.run(SwapPlan(0, out, blocks, slots))
        self._driver.drain()
        return count

    def _move(self, out: bool, blocks: Sequence[int], slots: Sequence[int]) -> None:
        staging = self._staging[0]
        scales = {"scales": self._scales, "scales_staging": self._staging[1] if self._scales is not None else None}
        stream = self._driver.current()
        if out:
            gather_blocks(self._launcher, self._pool, blocks, staging, stream=stream, **scales)
        for place, slot in enumerate(slots):
            for staged, held in zip(self._staged, self._slots[slot], strict=True):
                if out:
                    held.copy_(staged[place], non_blocking=True)
                else:
                    staged[place].copy_(held, non_blocking=True)
        if not out:
            scatter_blocks(self._launcher, staging, self._pool, blocks, stream=stream, **scales)
