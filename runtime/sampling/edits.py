"""Changes of logits that do not depend on what was drawn: allowed and banned ids, biases, and the hold on EOS and stop
ids until min_tokens."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from millrace.runtime.types import SamplingParams

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


class _Shift(NamedTuple):
    ids: Ints  # [n], unique
    values: Floats  # [n], added to the logits; -inf for a banned id


class LogitEdits:
    """The edits of each row, and which rows have any at their present position."""

    def __init__(self, max_rows: int, eos_token_ids: tuple[int, ...]) -> None:
        self._eos_token_ids = eos_token_ids
        self._allowed: dict[int, Ints] = {}
        self._shifts: dict[int, _Shift] = {}
        self._held: dict[int, Ints] = {}  # ids that end the text
        self._edits = np.zeros(max_rows, dtype=np.bool_)  # [max_rows], allowed ids or shifts
        self._min_tokens = np.zeros(max_rows, dtype=np.int64)  # [max_rows]

    def join(self, row: int, params: SamplingParams) -> None:
        if params.allowed_token_ids is not None:
            self._allowed[row] = np.unique(np.asarray(params.allowed_token_ids, dtype=np.int64))
        shifts = dict(params.logit_bias) | dict.fromkeys(params.banned_token_ids, -np.inf)
        if shifts:
            ids = np.fromiter(shifts.keys(), dtype=np.int64, count=len(shifts))
            self._shifts[row] = _Shift(ids, np.fromiter(shifts.values(), dtype=np.float32, count=len(shifts)))
        ends = set(params.stop_token_ids) | (set() if params.ignore_eos else set(self._eos_token_ids))
        if params.min_tokens and ends:
            self._held[row] = np.array(sorted(ends), dtype=np.int64)
            self._min_tokens[row] = params.min_tokens
        self._edits[row] = row in self._allowed or row in self._shifts

    def leave(self, row: int) -> None:
        self._allowed.pop(row, None)
        self._shifts.pop(row, None)
        self._held.pop(row, None)
        self._edits[row] = False
        self._min_tokens[row] = 0

    @property
    def in_use(self) -> bool:
        return bool(self._allowed or self._shifts or self._held)

    def uses(self, rows: Ints, positions: Ints) -> npt.NDArray[np.bool_]:
        return self._edits[rows] | (positions < self._min_tokens[rows])

    def apply(self, logits: Floats, rows: Ints, positions: Ints) -> None:
        """Changes logits [len(rows), vocab] in place."""
        named = [(place, int(row)) for place, row in enumerate(rows)]
        for place, row in named:
            if row in self._allowed:
                ids = self._allowed[row]
                values = logits[place, ids]
                logits[place] = -np.inf
                logits[place, ids] = values
        shifted = [(place, self._shifts[row]) for place, row in named if row in self._shifts]
        if shifted:
            at = _flatten([(place, shift.ids) for place, shift in shifted])
            logits[at] += np.concatenate([shift.values for _, shift in shifted])
        early = positions < self._min_tokens[rows]
        held = [(place, self._held[row]) for place, row in named if early[place]]
        if held:
            logits[_flatten(held)] = -np.inf


def _flatten(parts: list[tuple[int, Ints]]) -> tuple[Ints, Ints]:
    """Ids of several rows as one index into [rows, vocab]."""
    places = np.repeat([place for place, _ in parts], [len(ids) for _, ids in parts])
    return places, np.concatenate([ids for _, ids in parts])
