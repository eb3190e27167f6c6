"""The last token of every row, on the device: how a decode step learns what the step before it has drawn."""

import numpy as np
from numpy.typing import NDArray


class TokenRows:
    """Written by the sampler and read by decode, both in stream order; the host never waits for it."""

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self._tokens = np.zeros(max_rows, dtype=np.int64)

    def scatter(self, rows: NDArray[np.int32], tokens: NDArray[np.int32]) -> None:
        self._tokens[rows] = tokens

    def gather(self, rows: NDArray[np.int32], out: NDArray[np.int64]) -> None:
        self._tokens.take(rows, out=out, mode="clip")  # which, unlike "raise", has no copy of its own
