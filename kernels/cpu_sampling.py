"""Sampling through the C++ library; what its functions mean stands in `host_sampling`."""

import ctypes
from collections.abc import Callable

import numpy as np

from millrace.kernels.sampling import Floats, Index, Sampling, Settings, TokenDrawer, Tokens, num_blocks

_FLOAT32 = np.dtype(np.float32)
_NUM_BYTES = _FLOAT32.itemsize
_first_byte: Callable[[Floats], ctypes.c_char] = ctypes.c_char.from_buffer  # type: ignore[assignment]  # a buffer


class CpuSampling(Sampling):
    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def block_maxima(self, logits: Floats) -> Floats:
        maxima = np.empty((len(logits), num_blocks(logits.shape[1])), dtype=np.float32)
        self._library.mr_block_maxima(
            _address(logits), logits.strides[0] // _NUM_BYTES, *logits.shape, maxima.ctypes.data,
            self._library.mr_num_threads(),
        )  # fmt: skip
        return maxima

    def block_sums(self, logits: Floats, row_max: Floats) -> Floats:
        sums = np.empty((len(logits), num_blocks(logits.shape[1])), dtype=np.float32)
        self._library.mr_block_sums(
            _address(logits), logits.strides[0] // _NUM_BYTES, *logits.shape, row_max.ctypes.data, sums.ctypes.data,
            self._library.mr_num_threads(),
        )  # fmt: skip
        return sums

    def token_drawer(self, table: Settings, vocab: int) -> TokenDrawer:
        return CpuDrawer(self._library, table, vocab)


class CpuDrawer(TokenDrawer):
    """Behind a step that has streamed a model through the caches every array operation and every look-up of an address
    costs tens of microseconds. So addresses are looked up once where they can be (a decode lane gives the same logits
    array again), indices go over as bytes, and C++ checks them."""

    def __init__(self, library: ctypes.CDLL, table: Settings, vocab: int) -> None:
        super().__init__(table, vocab)
        self._draw, self._num_threads = library.mr_draw_tokens, library.mr_num_threads
        self._num_rows = len(table)
        self._tokens = np.empty(self._num_rows, dtype=np.int32)
        self._table_address, self._tokens_address = table.ctypes.data, self._tokens.ctypes.data
        self._logits = np.empty((0, vocab), dtype=np.float32)  # the last that fitted; its place, stride and rows:
        self._place = (0, vocab, 0)

    def __call__(self, logits: Floats, rows: Index, source: Index | None = None) -> tuple[Tokens, int]:
        count = len(rows)
        num_bad = -1
        if (
            (logits is self._logits or self._takes(logits))
            and rows.ndim == 1
            and rows.dtype.kind == "i"
            and (source is None or (source.dtype.kind == "i" and source.shape == (count,)))
        ):
            address, stride, num_logits = self._place
            num_bad = self._draw(
                address, stride, num_logits, self.vocab, self._table_address, self._num_rows,
                None if source is None else source.tobytes(), 0 if source is None else source.itemsize,
                rows.tobytes(), rows.itemsize, count, self._tokens_address, self._num_threads(),
            )  # fmt: skip
        if num_bad < 0:
            self.check(logits, rows, np.arange(count) if source is None else source)
            raise AssertionError("C++ refused arguments that Python takes")
        return self._tokens[:count].copy(), num_bad

    def _takes(self, logits: Floats) -> bool:
        """Whether C++ can read these logits; then it has their place."""
        shape, strides = logits.shape, logits.strides
        fits = (
            len(shape) == 2
            and shape[1] == self.vocab
            and (strides[1] == _NUM_BYTES or self.vocab == 1 or shape[0] == 0)
            and strides[0] % _NUM_BYTES == 0
            and logits.dtype == _FLOAT32
        )
        if fits:
            self._logits, self._place = logits, (_address(logits), strides[0] // _NUM_BYTES, shape[0])
        return fits


def _address(logits: Floats) -> int:
    """Where the first number lies."""
    try:
        return ctypes.addressof(_first_byte(logits))  # half the time of `.ctypes.data`
    except (TypeError, ValueError):  # read-only or empty, or its rows lie apart
        return logits.ctypes.data
