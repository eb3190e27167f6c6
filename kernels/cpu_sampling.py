"""Sampling through the C++ library; what the ops mean stands in `sampling`."""

import ctypes

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from millrace.kernels.arguments import LOGIT_BLOCK, DrawerArgs, MaximaArgs, SumsArgs, TokenDrawer

Floats = npt.NDArray[np.float32]
Index = npt.NDArray[np.signedinteger]


def block_maxima(library: ctypes.CDLL, args: MaximaArgs) -> Floats:
    logits = args.logits
    maxima = _blocks(logits)
    library.mr_block_maxima(
        logits.data_ptr(), logits.stride(0), *logits.shape, maxima.ctypes.data, torch.get_num_threads()
    )
    return maxima


def block_sums(library: ctypes.CDLL, args: SumsArgs) -> Floats:
    logits = args.logits
    sums = _blocks(logits)
    library.mr_block_sums(
        logits.data_ptr(), logits.stride(0), *logits.shape, args.row_max.ctypes.data, sums.ctypes.data,
        torch.get_num_threads(),
    )  # fmt: skip
    return sums


def _blocks(logits: Tensor) -> Floats:
    rows, vocab = logits.shape
    return np.empty((rows, -(-vocab // LOGIT_BLOCK)), dtype=np.float32)


class CpuDrawer(TokenDrawer):
    """Behind a step that has streamed a model through the caches every array operation and every look-up of an address
    costs tens of microseconds. So the addresses are looked up once, indices go over as bytes, and C++ checks them."""

    def __init__(self, library: ctypes.CDLL, args: DrawerArgs) -> None:
        super().__init__(args)
        self._draw = library.mr_draw_tokens
        self._num_rows = len(args.table)
        self._tokens = np.empty(self._num_rows, dtype=np.int32)
        self._table_address, self._tokens_address = args.table.ctypes.data, self._tokens.ctypes.data

    def __call__(self, logits: Tensor, rows: Index, source: Index | None = None) -> tuple[npt.NDArray[np.int32], int]:
        count, shape, strides = len(rows), logits.shape, logits.stride()
        num_bad = -1
        if (
            len(shape) == 2
            and shape[1] == self.vocab
            and (strides[1] == 1 or self.vocab == 1)
            and logits.dtype is torch.float32
            and logits.is_cpu
            and rows.shape == (count,)
            and rows.dtype.kind == "i"
            and (source is None or (source.dtype.kind == "i" and source.shape == (count,)))
        ):
            num_bad = self._draw(
                logits.data_ptr(), strides[0], shape[0], self.vocab, self._table_address, self._num_rows,
                None if source is None else source.tobytes(), 0 if source is None else source.itemsize,
                rows.tobytes(), rows.itemsize, count, self._tokens_address, torch.get_num_threads(),
            )  # fmt: skip
        if num_bad < 0:
            self.check(logits, rows, np.arange(count) if source is None else source)
            raise AssertionError("C++ refused arguments that Python takes")
        return self._tokens[:count].copy(), num_bad
