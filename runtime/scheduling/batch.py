"""The decode batch as the scheduler sees it: which rows take part in the next step."""

import numpy as np
from numpy.typing import NDArray

from millrace.runtime.scheduling.records import Sequence
from millrace.runtime.types import SequenceId


class DecodeBatch:
    """Sequences by row, in the order in which they joined.

    `rows` and `seqs` are columns for plans. Launched plans hold them, so a change replaces them and never writes.

    Attributes:
        quiet_steps: how many steps nobody will end or need a block in, if nobody joins or leaves: most steps are so,
            and columns need not be looked at in each.
    """

    def __init__(self) -> None:
        self.quiet_steps = 0
        self._members: dict[int, Sequence] = {}
        self._changed = False
        self._rows: NDArray[np.int32] = np.empty(0, dtype=np.int32)
        self._seqs: list[SequenceId] = []
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, row: int) -> Sequence:
        return self._members[row]

    def get(self, row: int) -> Sequence | None:
        return self._members.get(row)

    def join(self, sequence: Sequence) -> None:
        self._members[sequence.row] = sequence
        self._changed = True
        self.quiet_steps = 0

    def leave(self, row: int) -> None:
        del self._members[row]
        self._changed = True
        self.quiet_steps = 0

    @property
    def rows(self) -> NDArray[np.int32]:
        """[batch] int32"""
        self._refresh()
        return self._rows

    @property
    def seqs(self) -> list[SequenceId]:
        self._refresh()
        return self._seqs

    @property
    def sequences(self) -> list[Sequence]:
        self._refresh()
        return self._sequences

    def _refresh(self) -> None:
        if self._changed:
            self._changed = False
            self._rows = np.fromiter(self._members, dtype=np.int32, count=len(self._members))
            self._sequences = list(self._members.values())
            self._seqs = [sequence.seq for sequence in self._sequences]
