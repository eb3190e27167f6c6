"""Repetition, presence and frequency penalties: which tokens a row has seen, and how often it drew them.

Only rows that use a penalty hold a slot here. A step touches the listed tokens of such a row, never its whole
vocabulary.
"""

import numpy as np
import numpy.typing as npt

from millrace.runtime.types import SamplingParams

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


class PenaltyTable:
    """Tokens seen by the rows that use penalties.

    `_marks` answers how often a token was drawn; `_seen` lists the tokens to touch. Both grow by doubling, and a slot
    that is given back is cleared through its list.
    """

    def __init__(self, max_rows: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._slot = np.full(max_rows, -1, dtype=np.int64)  # [max_rows], -1 without penalties
        self._free: list[int] = []
        self._marks = np.zeros((0, vocab_size), dtype=np.int32)  # [slots, vocab], 0 or 1 + times drawn
        self._seen = np.zeros((0, 64), dtype=np.int64)  # [slots, capacity], token ids, unique
        self._num_seen = np.zeros(0, dtype=np.int64)  # [slots]
        self._repetition = np.ones(max_rows, dtype=np.float32)
        self._presence = np.zeros(max_rows, dtype=np.float32)
        self._frequency = np.zeros(max_rows, dtype=np.float32)

    @property
    def in_use(self) -> bool:
        return len(self._free) < len(self._marks)

    def uses(self, rows: Ints) -> npt.NDArray[np.bool_]:
        return self._slot[rows] >= 0

    def join(self, row: int, params: SamplingParams, prompt: Ints, output: Ints) -> None:
        """Gives the row a slot if it asks for a penalty, with the marks that drawing `output` would have left."""
        if params.repetition_penalty == 1.0 and params.presence_penalty == 0.0 and params.frequency_penalty == 0.0:
            return
        slot = self._take_slot()
        self._slot[row] = slot
        self._repetition[row] = params.repetition_penalty
        self._presence[row] = params.presence_penalty
        self._frequency[row] = params.frequency_penalty
        # The prompt counts for repetition alone, which asks only whether a token is listed.
        listed = np.unique(np.concatenate((prompt, output))) if params.repetition_penalty != 1.0 else np.unique(output)
        self._reserve(len(listed))
        self._seen[slot, : len(listed)] = listed
        self._num_seen[slot] = len(listed)
        self._marks[slot, listed] = 1
        drawn, times = np.unique(output, return_counts=True)
        self._marks[slot, drawn] += times.astype(np.int32)

    def leave(self, row: int) -> None:
        slot = self._slot[row]
        if slot < 0:
            return
        self._marks[slot, self._seen[slot, : self._num_seen[slot]]] = 0
        self._num_seen[slot] = 0
        self._slot[row] = -1
        self._free.append(int(slot))

    def record(self, rows: Ints, tokens: Ints) -> None:
        """Marks one drawn token for each of these distinct rows; rows without penalties are passed over."""
        slots = self._slot[rows]
        tokens, slots = tokens[slots >= 0], slots[slots >= 0]
        if not len(slots):
            return
        first = self._marks[slots, tokens] == 0
        self._marks[slots, tokens] += 1 + first.astype(np.int32)
        slots, tokens = slots[first], tokens[first]
        self._reserve(int(self._num_seen[slots].max(initial=0)) + 1)
        self._seen[slots, self._num_seen[slots]] = tokens
        self._num_seen[slots] += 1

    def apply(self, logits: Floats, rows: Ints) -> None:
        """Changes logits [len(rows), vocab] in place: repetition first, then frequency and presence."""
        place = np.flatnonzero(self._slot[rows] >= 0)  # rows of `logits`
        slots = self._slot[rows[place]]
        num_seen = self._num_seen[slots]
        width = int(num_seen.max(initial=0))
        which, offset = np.nonzero(np.arange(width) < num_seen[:, None])
        slots, row = slots[which], rows[place[which]]
        tokens = self._seen[slots, offset]
        times = (self._marks[slots, tokens] - 1).astype(np.float32)
        value = logits[place[which], tokens]
        factor = self._repetition[row]
        value = np.where(value > 0, value / factor, value * factor)
        value -= self._frequency[row] * times + self._presence[row] * (times > 0)
        logits[place[which], tokens] = value

    def _take_slot(self) -> int:
        if not self._free:
            have = len(self._marks)
            more = max(4, have)
            # np.zeros maps pages that are committed at the first write, so an unused slot costs no memory.
            marks = np.zeros((have + more, self._vocab_size), dtype=np.int32)
            marks[:have] = self._marks
            self._marks = marks
            self._seen = np.concatenate((self._seen, np.zeros((more, self._seen.shape[1]), dtype=np.int64)))
            self._num_seen = np.concatenate((self._num_seen, np.zeros(more, dtype=np.int64)))
            self._free = list(range(have + more - 1, have - 1, -1))
        return self._free.pop()

    def _reserve(self, num_tokens: int) -> None:
        slots, capacity = self._seen.shape
        if num_tokens > capacity:
            wider = np.zeros((slots, max(num_tokens, 2 * capacity)), dtype=np.int64)
            wider[:, :capacity] = self._seen
            self._seen = wider
