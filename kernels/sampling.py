"""The ops of sampling: maxima and sums over blocks of the vocabulary, and the draw of one token per row.

Results lie on the host, in numpy arrays. Whatever the backend, a row's result has the same bits in every batch and for
any number of threads. Between backends the last bits of exp differ, so that a draw whose random number falls that near
a bound may give the neighbouring token.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from millrace.kernels.arguments import DRAW_DTYPE, DrawerArgs, MaximaArgs, SumsArgs, TokenDrawer
from millrace.kernels.checks import refuse
from millrace.kernels.dispatch import Backends, serve

Floats = npt.NDArray[np.float32]


def block_maxima(logits: Tensor, *, backends: Backends = None) -> Floats:
    """Maxima over LOGIT_BLOCK neighbouring ids; a NaN makes its block NaN.

    logits [rows, vocab] float32, whose rows may lie apart -> [rows, ceil(vocab / LOGIT_BLOCK)].
    """
    _check_logits("block_maxima", logits)
    maxima: Floats = serve("block_maxima", MaximaArgs(logits), backends)
    return maxima


def block_sums(logits: Tensor, row_max: Floats, *, backends: Backends = None) -> Floats:
    """Sums of exp(logit - row_max) over ids that lie ceil(vocab / LOGIT_BLOCK) = blocks apart: [rows, blocks], block j
    with the ids j, j + blocks, j + 2 * blocks, ...

    logits [rows, vocab] float32 without NaN, whose rows may lie apart; row_max [rows] finite, their largest.
    """
    _check_logits("block_sums", logits)
    if row_max.shape != (len(logits),) or row_max.dtype != np.float32 or not row_max.flags.c_contiguous:
        raise ValueError(f"block_sums: row_max is {row_max.dtype} {list(row_max.shape)}, not float32 [{len(logits)}]")
    sums: Floats = serve("block_sums", SumsArgs(logits, row_max), backends)
    return sums


def token_drawer(table: npt.NDArray[np.void], vocab: int, *, backends: Backends = None) -> TokenDrawer:
    """What draws tokens with the settings of a table, [num_rows] of DRAW_DTYPE, which it keeps and advances.

    An object, because in a step of a small model a dispatch and a handful of small arrays would be a visible cost.
    """
    if table.dtype != DRAW_DTYPE or table.ndim != 1 or not table.flags.c_contiguous or not table.flags.writeable:
        raise ValueError(f"token_drawer: table is {table.dtype} {list(table.shape)}, not [num_rows] of DRAW_DTYPE")
    if vocab < 1:
        raise ValueError(f"token_drawer: vocab is {vocab}, but there must be an id to draw")
    drawer: TokenDrawer = serve("token_drawer", DrawerArgs(table, vocab), backends)
    return drawer


def _check_logits(op: str, logits: Tensor) -> None:
    if logits.dim() != 2 or logits.dtype != torch.float32 or logits.shape[1] < 1 or logits.stride(1) != 1:
        raise refuse(op, "logits", logits, "float32 [rows, vocab] with neighbouring ids side by side")
