"""Block tables of a lane: which block holds positions 16 i to 16 i + 15 of the sequence in each row."""

import numpy as np
from numpy.typing import NDArray

from millrace.runtime.messages import BlockUpdates


class BlockTables:
    """Owned and written by one lane, in stream order."""

    def __init__(self, max_rows: int, max_blocks: int) -> None:
        self._tables = np.zeros((max_rows, max_blocks), dtype=np.int32)

    def apply(self, updates: BlockUpdates) -> None:
        if len(updates.rows):
            self._tables[updates.rows, updates.indices] = updates.blocks

    def slots(self, rows: NDArray[np.int32], positions: NDArray[np.int64], block_size: int) -> NDArray[np.int64]:
        """Where each position of each row lies in the pool: block * block_size + offset. Same shape as the inputs."""
        index, offset = np.divmod(positions, block_size)
        slots: NDArray[np.int64] = self._tables[rows, index] * np.int64(block_size)
        slots += offset
        return slots

    def gather(self, rows: NDArray[np.int32], num_blocks: int) -> NDArray[np.int32]:
        """Tables of some rows, [len(rows), num_blocks]; entries beyond a row's context are stale and not to be read."""
        return self._tables[rows, :num_blocks]
