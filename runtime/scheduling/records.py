"""What the scheduler keeps of requests, sequences and launched steps. The scheduler actor is the only writer."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from millrace.runtime.messages import Admitted
from millrace.runtime.types import BLOCK_SIZE, Lane, SequenceId, sequence_id


def num_blocks(tokens: int) -> int:
    """Blocks that hold this many positions."""
    return -(-tokens // BLOCK_SIZE)


class Request:
    """One admitted request, from admission to its terminal event."""

    __slots__ = ("admitted", "key", "live", "paused", "sequences", "started")

    def __init__(self, admitted: Admitted, aging_seconds: float) -> None:
        self.admitted = admitted
        # Waiting lowers a request's effective priority by one class every `aging_seconds`. All of them age at the same
        # rate, so their order never changes and the key is fixed: a LOW request that came first is overtaken only by
        # what comes within its first 3 * aging_seconds.
        self.key = admitted.priority * aging_seconds + admitted.arrived
        self.sequences: list[Sequence] = []
        self.live = admitted.sampling.n  # choices that have not ended
        self.paused = False
        self.started = False


class Sequence:
    """One choice of a request. It is in exactly one place: the queue, `prefilling`, `ready`, the decode batch,
    `draining` (its target is planned; the last tokens are on their way), `arriving` (its blocks are), or ended."""

    __slots__ = (
        "announced",
        "arriving",
        "choice",
        "ended",
        "hashes",
        "history",
        "leaving",
        "published",
        "request",
        "row",
        "saving",
        "seq",
        "slots",
        "table",
    )

    def __init__(self, request: Request, choice: int, history: NDArray[np.int32]) -> None:
        self.request = request
        self.choice = choice
        self.seq: SequenceId = sequence_id(request.admitted.rid, choice)
        self.row = -1  # -1 while it has none
        self.table: list[int] = []
        self.history = history  # tokens known when it last had no row; with a row they are in `Rows.history`
        self.hashes: list[bytes] = []  # of the full blocks at its beginning
        self.published = 0  # blocks of the table that can be found by their hash
        self.announced = False  # the prefill lane has the table
        self.ended = False
        self.leaving = False  # row and blocks go as soon as no launched step names them
        self.slots: list[int] = []  # without a row: where the host keeps the blocks of its beginning
        self.saving = 0  # swaps that are to copy these blocks there
        self.arriving = False  # with a row: they are being copied back

    def __lt__(self, other: "Sequence") -> bool:
        return (self.request.key, self.seq) < (other.request.key, other.seq)


class Step:
    """A launched step: which rows it names, and for prefill how far it takes them."""

    __slots__ = ("copied", "ends", "fills", "num_tokens", "rows", "sequences")

    def __init__(
        self,
        rows: NDArray[np.int32],
        sequences: list[Sequence],
        num_tokens: int,
        ends: NDArray[np.int64] | None,
        copied: Iterable[int] = (),
        *,
        fills: bool = True,
    ) -> None:
        self.rows = rows
        self.sequences = sequences
        self.num_tokens = num_tokens
        self.ends = ends  # [num_seqs] positions confirmed once it reports; None: one more each
        self.fills = fills  # whether it may write the last position of a block
        self.copied = list(copied)  # blocks that it copies from, with a reference of its own to each

    def rows_of(self, seqs: list[SequenceId]) -> NDArray[np.int32]:
        """Rows of some of the step's sequences, [len(seqs)]."""
        rows = {sequence.seq: row for sequence, row in zip(self.sequences, self.rows.tolist(), strict=True)}
        return np.array([rows[seq] for seq in seqs], dtype=np.int32)


class SchedulerStats:
    """Counts for metrics and health; written here, read by whoever reports."""

    def __init__(self, *, concurrent: bool = False) -> None:
        """`concurrent`: the lanes do not wait for each other, as they do on one processor."""
        self._concurrent = concurrent
        self._reported = {Lane.PREFILL: 0.0, Lane.DECODE: 0.0}
        self.preemptions = 0
        self.prefix_queries = 0  # prompt tokens looked up
        self.prefix_hits = 0  # prompt tokens found
        self.steps = {Lane.PREFILL: 0, Lane.DECODE: 0}
        self.last_progress = 0.0  # world.now() when a step last reported
        self.last_launch = 0.0  # world.now() when a step was last launched with none before it
        self.longest_step = 0.0  # seconds
        self.prefill_budget = 0

    def observe(self, lane: Lane, launched_at: float, ready_at: float) -> float:
        """A step has reported; returns its seconds."""
        self.steps[lane] += 1
        # A step begins when it was launched and the one before had ended: of its lane, or of any.
        before = self._reported[lane] if self._concurrent else self.last_progress
        seconds = ready_at - max(launched_at, before)
        self._reported[lane] = self.last_progress = ready_at
        self.longest_step = max(self.longest_step, seconds)
        return seconds
