"""Sampling on the host: maxima and sums over blocks of the vocabulary, and the draw of one token per row.

Logits and results are numpy arrays. `sampling` (last argument of each front) replaces the default implementation.
"""

import ctypes
import functools

import numpy as np

from millrace.kernels.cpu_library import default_library
from millrace.kernels.cpu_sampling import CpuSampling
from millrace.kernels.numpy_sampling import NumpySampling
from millrace.kernels.sampling import DRAW_DTYPE, Floats, Sampling, Settings, TokenDrawer, has_whole_rows


def default_sampling() -> Sampling:
    """The C++ library's if it is built (see `cpu_library.prepare`), else numpy's."""
    return _sampling(default_library())


@functools.cache
def _sampling(library: ctypes.CDLL | None) -> Sampling:
    return NumpySampling() if library is None else CpuSampling(library)


def block_maxima(logits: Floats, *, sampling: Sampling | None = None) -> Floats:
    """Maxima over LOGIT_BLOCK neighbouring ids; a NaN makes its block NaN.

    logits [rows, vocab] float32, whose rows may lie apart -> [rows, ceil(vocab / LOGIT_BLOCK)].
    """
    _check_logits("block_maxima", logits)
    return (sampling or default_sampling()).block_maxima(logits)


def block_sums(logits: Floats, row_max: Floats, *, sampling: Sampling | None = None) -> Floats:
    """Sums of exp(logit - row_max) over ids that lie ceil(vocab / LOGIT_BLOCK) = blocks apart: [rows, blocks], block j
    with the ids j, j + blocks, j + 2 * blocks, ...

    logits [rows, vocab] float32 without NaN, whose rows may lie apart; row_max [rows] finite, their largest.
    """
    _check_logits("block_sums", logits)
    if row_max.shape != (len(logits),) or row_max.dtype != np.float32 or not row_max.flags.c_contiguous:
        raise ValueError(f"block_sums: row_max is {row_max.dtype} {list(row_max.shape)}, not float32 [{len(logits)}]")
    return (sampling or default_sampling()).block_sums(logits, row_max)


def token_drawer(table: Settings, vocab: int, *, sampling: Sampling | None = None) -> TokenDrawer:
    """What draws tokens with the settings of a table, [num_rows] of DRAW_DTYPE, which it keeps and advances.

    An object, because in a step of a small model a choice and a handful of small arrays would be a visible cost.
    """
    if table.dtype != DRAW_DTYPE or table.ndim != 1 or not table.flags.c_contiguous or not table.flags.writeable:
        raise ValueError(f"token_drawer: table is {table.dtype} {list(table.shape)}, not [num_rows] of DRAW_DTYPE")
    if vocab < 1:
        raise ValueError(f"token_drawer: vocab is {vocab}, but there must be an id to draw")
    return (sampling or default_sampling()).token_drawer(table, vocab)


def _check_logits(front: str, logits: Floats) -> None:
    if logits.ndim != 2 or logits.dtype != np.float32 or logits.shape[1] < 1 or not has_whole_rows(logits):
        raise ValueError(
            f"{front}: logits are {logits.dtype} {list(logits.shape)} with strides of {logits.strides} bytes, but they"
            " must be float32 [rows, vocab] with neighbouring ids side by side"
        )
