"""What the scheduler keeps of requests, sequences, rows and launched steps; the scheduler actor is their only writer."""

import itertools

import numpy as np
from numpy.typing import NDArray

from millrace.runtime.messages import Admitted, BlockUpdates
from millrace.runtime.types import BLOCK_SIZE, Lane, SequenceId, sequence_id

_EMPTY = np.empty(0, dtype=np.int32)


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
    """One choice of a request. It is in exactly one place: the waiting heap, `prefilling`, `ready`, the decode batch,
    `parked` (paused, without a row), `draining` (its target is planned; the last tokens are on their way), or ended."""

    __slots__ = (
        "announced",
        "choice",
        "ended",
        "hashes",
        "history",
        "published",
        "request",
        "retiring",
        "row",
        "seq",
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
        self.retiring = False  # row and blocks go as soon as no launched step names them

    def __lt__(self, other: "Sequence") -> bool:
        return (self.request.key, self.seq) < (other.request.key, other.seq)


class Rows:
    """Columns per row, [max_rows]; all counts are positions of the sequence in the row.

    known       tokens whose ids have reached the host (prompt and output)
    computed    positions whose keys and values are computed or launched
    confirmed   positions whose step has reported
    target      positions to compute before the last token is drawn
    inflight    launched steps that name the row and have not reported
    """

    def __init__(self, max_rows: int, max_model_len: int) -> None:
        self.known = np.zeros(max_rows, dtype=np.int64)
        self.computed = np.zeros(max_rows, dtype=np.int64)
        self.confirmed = np.zeros(max_rows, dtype=np.int64)
        self.target = np.zeros(max_rows, dtype=np.int64)
        self.inflight = np.zeros(max_rows, dtype=np.int32)
        # Pages of rows and positions that are never reached are never committed.
        self.history = np.zeros((max_rows, max_model_len + 1), dtype=np.int32)
        self.owner: list[Sequence | None] = [None] * max_rows
        self.free = list(range(max_rows - 1, -1, -1))


class Step:
    """A launched step: which rows it names, and for prefill how far it takes them."""

    __slots__ = ("ends", "num_tokens", "rows", "sequences")

    def __init__(
        self, rows: NDArray[np.int32], sequences: list[Sequence], num_tokens: int, ends: NDArray[np.int64] | None
    ) -> None:
        self.rows = rows
        self.sequences = sequences
        self.num_tokens = num_tokens
        self.ends = ends  # [num_seqs] positions confirmed once it reports; None: one more each


class SchedulerStats:
    """Counts for metrics and health; written here, read by whoever reports."""

    def __init__(self) -> None:
        self.preemptions = 0
        self.prefix_queries = 0  # prompt tokens looked up
        self.prefix_hits = 0  # prompt tokens found
        self.steps = {Lane.PREFILL: 0, Lane.DECODE: 0}
        self.last_progress = 0.0  # world.now() when a step last reported
        self.last_launch = 0.0  # world.now() when a step was last launched with none before it
        self.longest_step = 0.0  # seconds
        self.prefill_budget = 0


class PrefillBudget:
    """How many prompt tokens one prefill step may hold.

    While sequences decode, a prefill step delays their next token by its own duration, so the chunk is what the
    measured rate allows within the inter-token target. Nobody decoding: the full chunk.
    """

    SMALLEST = 32  # tokens; smaller steps cost more in overhead than they spare in delay

    def __init__(self, most: int, target_seconds: float) -> None:
        self._most = most
        self._target = target_seconds
        self._rate = 0.0  # tokens per second, smoothed

    def observe(self, tokens: int, seconds: float) -> None:
        if tokens >= self.SMALLEST and seconds > 0:
            rate = tokens / seconds
            self._rate = rate if self._rate == 0.0 else 0.7 * self._rate + 0.3 * rate

    def tokens(self, *, decoding: bool) -> int:
        if not decoding or self._target == 0 or self._rate == 0:
            return self._most
        return max(self.SMALLEST, min(self._most, int(self._rate * self._target)))


def block_updates(entries: list[tuple[int, int, list[int]]]) -> BlockUpdates:
    """Columns from (row, first index, blocks)."""
    if not entries:
        return BlockUpdates(_EMPTY, _EMPTY, _EMPTY)
    counts = [len(blocks) for _, _, blocks in entries]
    rows = np.repeat(np.array([row for row, _, _ in entries], dtype=np.int32), counts)
    indices = [range(first, first + len(blocks)) for _, first, blocks in entries]
    return BlockUpdates(
        rows,
        np.fromiter(itertools.chain.from_iterable(indices), dtype=np.int32, count=len(rows)),
        np.fromiter(itertools.chain.from_iterable(blocks for _, _, blocks in entries), dtype=np.int32, count=len(rows)),
    )
