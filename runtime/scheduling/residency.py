"""Who holds rows and KV blocks: columns per row, the block pool, and the prefix cache.

A row and its blocks are given back when its sequence leaves *and* every launched step that names the row has reported,
because a step in flight still writes there.
"""

from collections.abc import Iterable

import numpy as np

from millrace.runtime.kv.pool import BlockPool
from millrace.runtime.kv.prefix import PrefixHasher
from millrace.runtime.scheduling.records import Sequence, Step, num_blocks
from millrace.runtime.scheduling.swaps import Swaps
from millrace.runtime.types import BLOCK_SIZE


class Rows:
    """Columns per row, [max_rows]; all counts are positions of the sequence in the row.

    known       tokens whose ids have reached the host (prompt and output)
    computed    positions whose keys and values are computed or launched
    confirmed   positions whose step has reported
    target      positions to compute before the last token is drawn
    """

    def __init__(self, max_rows: int, max_model_len: int) -> None:
        self.known = np.zeros(max_rows, dtype=np.int64)
        self.computed = np.zeros(max_rows, dtype=np.int64)
        self.confirmed = np.zeros(max_rows, dtype=np.int64)
        self.target = np.zeros(max_rows, dtype=np.int64)
        # Pages of rows and positions that are never reached are never committed.
        self.history = np.zeros((max_rows, max_model_len + 1), dtype=np.int32)
        self.owner: list[Sequence | None] = [None] * max_rows
        self.free = list(range(max_rows - 1, -1, -1))


class Residency:
    """Rows and blocks of the sequences that run. `hasher` None turns the prefix cache off, `swaps` None the copying of
    preempted sequences to the host."""

    def __init__(
        self,
        pool: BlockPool,
        hasher: PrefixHasher | None,
        max_rows: int,
        max_model_len: int,
        swaps: Swaps | None = None,
    ) -> None:
        self.pool = pool
        self.swaps = swaps
        self.rows = Rows(max_rows, max_model_len)
        self._hasher = hasher
        self._leaving: list[Sequence] = []

    @property
    def num_running(self) -> int:
        """Sequences that hold a row."""
        return len(self.rows.owner) - len(self.rows.free)

    @property
    def leaving(self) -> bool:
        """Rows and blocks are on their way back: a launched step or a swap names them, and will report."""
        return bool(self._leaving) or (self.swaps is not None and bool(self.swaps.outgoing))

    def holders(self) -> list[Sequence]:
        """Who holds a row and does not leave; first in line for preemption are the last: stalled readers, then those
        behind in the order of the queue."""
        holders = [s for s in self.rows.owner if s is not None and not s.leaving]
        return sorted(holders, key=lambda s: (s.request.paused, s.request.key, s.seq))

    def enter(self, sequence: Sequence, num_rows: int) -> int | None:
        """Gives a sequence a row and the blocks of all tokens that it has, some of them from the prefix cache, and some
        to be filled from the host: then it is `arriving` until the swap has reported. One that is `saving` has to wait.

        Args:
            num_rows: rows that must be free, for this sequence and those that will fork from it.

        Returns:
            Prompt tokens found in the cache, or None if there is no room; then nothing has changed.
        """
        if len(self.rows.free) < num_rows:
            return None
        tokens, admitted = sequence.history, sequence.request.admitted
        matchable: list[bytes] = []
        if self._hasher is not None and admitted.sampling.prompt_logprobs is None:
            self._hasher.extend(sequence.hashes, tokens, admitted.cache_salt)
            # The last token is always computed anew: its logits are wanted.
            matchable = sequence.hashes[: (len(tokens) - 1) // BLOCK_SIZE]
        hits = self.pool.match(matchable, tokens, BLOCK_SIZE)
        wanted = num_blocks(len(tokens)) - len(hits)
        # Room for everybody who runs to grow by a block: starting one more must not preempt at once.
        if self.pool.num_free < wanted + self.num_running:
            self.pool.release(hits)
            return None
        sequence.table = hits + self.pool.allocate(wanted)
        sequence.published = len(hits)
        sequence.announced = False
        self.take_row(sequence, len(hits) * BLOCK_SIZE)
        if self.swaps is not None:
            self.swaps.fetch(sequence, len(hits))
        return len(hits) * BLOCK_SIZE

    def take_row(self, sequence: Sequence, confirmed: int = 0) -> None:
        """Puts a sequence into a free row, with its first `confirmed` positions computed."""
        rows, tokens = self.rows, sequence.history
        row = rows.free.pop()
        sequence.row = row
        rows.owner[row] = sequence
        rows.history[row, : len(tokens)] = tokens
        rows.known[row] = len(tokens)
        rows.computed[row] = rows.confirmed[row] = confirmed
        admitted = sequence.request.admitted
        rows.target[row] = len(admitted.prompt) + max(admitted.max_new_tokens, 1) - 1

    def fork(self, sequence: Sequence) -> list[Sequence]:
        """Shares the prompt's blocks with those other choices that wait for them in their rows."""
        if sequence.choice > 0:
            return []
        waiting = [s for s in sequence.request.sequences[1:] if s.row >= 0 and not s.table and not s.leaving]
        for other in waiting:
            self.pool.share(sequence.table)
            other.table = list(sequence.table)
            other.hashes = list(sequence.hashes)
            # What is full is published by the first choice; the block behind it will be a copy of one's own.
            other.published = len(sequence.history) // BLOCK_SIZE
            self.rows.computed[other.row] = self.rows.computed[sequence.row]
        return waiting

    def leave(self, sequence: Sequence) -> None:
        """Marks row and blocks to be given back by `retire`; without a row, gives back slots. Idempotent."""
        if sequence.row >= 0 and not sequence.leaving:
            sequence.leaving = True
            self._leaving.append(sequence)
        elif self.swaps is not None:
            self.swaps.drop(sequence)

    def retire(self, launched: Iterable[Step]) -> list[Sequence]:
        """Gives back what no launched step names; returns those who have left without having ended."""
        if not self._leaving:
            return []
        busy = {row for step in launched for row in step.rows.tolist()}
        if self.swaps is not None:
            busy |= self.swaps.rows
        gone, waits = [], []
        for sequence in self._leaving:
            row = sequence.row
            if row in busy:
                waits.append(sequence)
                continue
            kept = 0
            if not sequence.ended:
                sequence.history = self.rows.history[row, : self.rows.known[row]].copy()
                gone.append(sequence)
                if self.swaps is not None:
                    kept = self.swaps.save(sequence, int(self.rows.confirmed[row]))
            self.pool.release(sequence.table[kept:])
            sequence.table = []
            sequence.row = -1
            sequence.leaving = False
            self.rows.owner[row] = None
            self.rows.free.append(row)
        self._leaving = waits
        return gone

    def confirm(self, step: Step) -> None:
        """What a step wrote is there now: full blocks among it become findable."""
        before = self.rows.confirmed[step.rows]
        ends = before + 1 if step.ends is None else step.ends
        self.rows.confirmed[step.rows] = ends
        if self._hasher is not None and step.fills:
            for index in (before // BLOCK_SIZE != ends // BLOCK_SIZE).nonzero()[0].tolist():
                if not step.sequences[index].leaving:
                    self._publish(self._hasher, step.sequences[index], int(ends[index]) // BLOCK_SIZE)

    def swapped(self, swaps: Swaps, *, failed: bool) -> Sequence | None:
        """The swap launched first has reported; returns the sequence that may go on now, from whatever is there."""
        swap = swaps.complete(failed=failed)
        sequence = swap.sequence
        if swap.out:
            return None
        if not failed:
            full = swap.first + len(swap.blocks)
            self.rows.computed[sequence.row] = self.rows.confirmed[sequence.row] = full * BLOCK_SIZE
            if self._hasher is not None and not sequence.leaving:
                self._publish(self._hasher, sequence, full)
        return None if sequence.leaving else sequence

    def check(self, copied: list[list[int]], slots: list[list[int]]) -> None:
        """Raises AssertionError unless every row, block and slot is accounted for; `copied` are blocks that steps hold,
        `slots` those of sequences without a row."""
        rows = self.rows
        if self.swaps is not None:
            self.swaps.check(slots)
            copied = copied + self.swaps.outgoing
        held = [sequence for sequence in rows.owner if sequence is not None]
        self.pool.check([*(sequence.table for sequence in held), *copied])
        assert len(held) + len(rows.free) == len(rows.owner)
        assert all(rows.owner[sequence.row] is sequence for sequence in held)
        assert self._leaving == [sequence for sequence in self._leaving if sequence.leaving and sequence.row >= 0]
        if not held and not any(copied):
            assert self.pool.num_free == self.pool.num_usable

    def _publish(self, hasher: PrefixHasher, sequence: Sequence, full: int) -> None:
        tokens = self.rows.history[sequence.row]
        if len(sequence.hashes) < full:
            hasher.extend(sequence.hashes, tokens[: full * BLOCK_SIZE], sequence.request.admitted.cache_salt)
        for index in range(sequence.published, full):
            own = tokens[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE]
            self.pool.publish(sequence.table[index], sequence.hashes[index], own)
        sequence.published = max(sequence.published, full)
