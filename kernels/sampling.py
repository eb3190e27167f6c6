"""The ops of sampling: maxima and sums over blocks of the vocabulary, and the draw of one token per row.

Results lie on the host, in numpy arrays. Whatever the backend, a row's result has the same bits in every batch and for
any number of threads. Between backends the last bits of exp differ, so that a draw whose random number falls that near
a bound may give the neighbouring token.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from millrace.kernels.arguments import DRAW_DTYPE, DrawArgs, MaximaArgs, SumsArgs
from millrace.kernels.checks import refuse
from millrace.kernels.dispatch import Backends, serve

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


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


def draw_tokens(
    logits: Tensor, source: Ints, rows: Ints, table: npt.NDArray[np.void], *, backends: Backends = None
) -> npt.NDArray[np.int32]:
    """Draws one token for each of some rows: [num_draws], BROKEN or EMPTY where the row's logits allow none.

    A greedy row takes the most likely id, the lowest one on ties. Another takes one number in [0, 1) from Philox
    (`philox.uniforms`) of its seed, choice and position, and inverts with it the cumulative distribution of
    exp(logit / temperature): over all ids in the order of the blocks of `block_sums`, or, where a filter is on, over
    the ids that min_p, then top_k, then top_p over what those two keep have left, the most likely one first.

    Args:
        logits: [num_logits, vocab] float32, whose rows may lie apart.
        source: [num_draws], the row of the logits that each draw reads.
        rows: [num_draws], the row of the table that has its settings.
        table: [num_rows] of DRAW_DTYPE.
    """
    _check_logits("draw_tokens", logits)
    if table.dtype != DRAW_DTYPE or table.ndim != 1 or not table.flags.c_contiguous:
        raise ValueError(f"draw_tokens: table is {table.dtype} {list(table.shape)}, not [num_rows] of DRAW_DTYPE")
    for name, index, limit in (("source", source, len(logits)), ("rows", rows, len(table))):
        if index.dtype != np.int64 or index.shape != (len(source),) or not index.flags.c_contiguous:
            raise ValueError(f"draw_tokens: {name} is {index.dtype} {list(index.shape)}, not int64 [{len(source)}]")
        listed = index.tolist()  # a handful: Python is quicker than numpy
        if listed and not 0 <= min(listed) <= max(listed) < limit:
            raise ValueError(
                f"draw_tokens: {name} holds {min(listed)} to {max(listed)}, but it must stay below {limit}"
            )
    tokens: npt.NDArray[np.int32] = serve("draw_tokens", DrawArgs(logits, source, rows, table), backends)
    return tokens


def _check_logits(op: str, logits: Tensor) -> None:
    if logits.dim() != 2 or logits.dtype != torch.float32 or logits.shape[1] < 1 or logits.stride(1) != 1:
        raise refuse(op, "logits", logits, "float32 [rows, vocab] with neighbouring ids side by side")
