"""Swap: blocks of preempted sequences on their way to the host, and back.

A swap is a step of a lane of its own that computes nothing. All of them run on one stream, in the order of the queue
here. So a slot may change hands as soon as a swap that reads it is queued: whoever writes it next is queued behind.
"""

from collections import deque
from typing import NamedTuple

from millrace.runtime.kv.host import HostSlots
from millrace.runtime.kv.pool import BlockPool
from millrace.runtime.messages import SwapPlan
from millrace.runtime.scheduling.budget import PrefillBudget
from millrace.runtime.scheduling.records import Sequence
from millrace.runtime.types import BLOCK_SIZE

PIECE = 32  # blocks that go to the host at a time: those who wait for them get them as they are copied
DEPTH = 2  # swaps that are launched at once


class Swap(NamedTuple):
    """To the host: holds a reference of its own to each block until it has reported. Back: fills blocks of the
    sequence's table, from index `first` on."""

    sequence: Sequence
    out: bool
    first: int
    blocks: list[int]
    slots: list[int]


class Swaps:
    """The queue of swaps, the slots, and the choice between swapping and computing again.

    Attributes:
        num_out, num_in: blocks that have been brought to the host, and back.
    """

    def __init__(self, pool: BlockPool, host: HostSlots, budget: PrefillBudget) -> None:
        self.num_out = self.num_in = 0
        self._pool = pool
        self._host = host
        self._budget = budget
        self._queue: deque[Swap] = deque()
        self._launched = 0  # of them, from the first on
        self._next_step = 0

    @property
    def outgoing(self) -> list[list[int]]:
        """Blocks that swaps to the host hold; they come back."""
        return [swap.blocks for swap in self._queue if swap.out]

    @property
    def rows(self) -> set[int]:
        """Rows into whose blocks something is being brought back."""
        return {swap.sequence.row for swap in self._queue if not swap.out}

    def save(self, sequence: Sequence, confirmed: int) -> int:
        """Queues swaps to the host if they pay; for a sequence that loses its row.

        Args:
            confirmed: its positions that are computed.

        Returns:
            How many blocks from the beginning of its table belong to the swaps from now on.
        """
        if self._host.block_seconds >= BLOCK_SIZE * self._budget.seconds_per_token:
            return 0
        if sequence.request.admitted.sampling.prompt_logprobs is not None:
            return 0  # its prompt is to be computed anew: the prefix cache does not serve it either
        # The last token is always computed anew: its logits are wanted.
        count = min(confirmed, len(sequence.history) - 1) // BLOCK_SIZE
        count = min(count, self._host.num_free)
        sequence.slots = self._host.take(count)
        # The tail first, as `BlockPool.release` has it: what is cached of a prefix is of use from its beginning on.
        for first in reversed(range(0, count, PIECE)):
            piece = slice(first, min(first + PIECE, count))
            sequence.saving += 1
            self._queue.append(Swap(sequence, True, first, sequence.table[piece], sequence.slots[piece]))
        return count

    def fetch(self, sequence: Sequence, cached: int) -> None:
        """Queues the way back into the table, for a sequence with slots that has got a row; the first `cached` blocks
        are there already."""
        slots = sequence.slots[cached:]
        self.drop(sequence)
        if slots:
            sequence.arriving = True
            blocks = sequence.table[cached : cached + len(slots)]
            self._queue.append(Swap(sequence, False, cached, blocks, slots))

    def drop(self, sequence: Sequence) -> None:
        """Gives its slots back."""
        self._host.give_back(sequence.slots)
        sequence.slots = []

    def next(self) -> SwapPlan | None:
        """The swap to launch now, if any."""
        if self._launched == min(DEPTH, len(self._queue)):
            return None
        swap = self._queue[self._launched]
        self._launched += 1
        self._next_step += 1
        return SwapPlan(self._next_step - 1, swap.out, swap.blocks, swap.slots)

    def complete(self, *, failed: bool) -> Swap:
        """The swap launched first has reported. One that failed leaves a sequence to be computed again."""
        swap = self._queue.popleft()
        self._launched -= 1
        sequence = swap.sequence
        if swap.out:
            self._pool.release(swap.blocks)
            sequence.saving -= 1
            if failed:
                self.drop(sequence)
        else:
            sequence.arriving = False
        if not failed and swap.out:
            self.num_out += len(swap.blocks)
        elif not failed:
            self.num_in += len(swap.blocks)
        return swap

    def check(self, slots: list[list[int]]) -> None:
        """Raises AssertionError unless slots are accounted for; `slots` are those of the sequences."""
        self._host.check(slots)
        assert 0 <= self._launched <= min(DEPTH, len(self._queue))
