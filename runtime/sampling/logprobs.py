"""Log probabilities under the model's own distribution, before penalties and temperature."""

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from millrace.runtime.errors import RequestFailedError
from millrace.runtime.sampling import distribution

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

CHUNK_ELEMENTS = 1 << 20  # logits handled at a time: 4 MiB, so that passes over them hit the cache


class LogprobColumns(msgspec.Struct, frozen=True):
    """Log probabilities of some tokens of a step or a prompt, one entry per row that asked.

    Attributes:
        index: [n] int32, place among the sampled rows (or position in the chunk of a prompt).
        logprobs: [n] float32, of the drawn (or given) token.
        num_top: [n] int32, how many alternatives this entry asked for.
        top_ids: [n, max_top] int32, best first, lowest id first on ties; -1 behind num_top.
        top_logprobs: [n, max_top] float32; -inf behind num_top.
    """

    index: npt.NDArray[np.int32]
    logprobs: Floats
    num_top: npt.NDArray[np.int32]
    top_ids: npt.NDArray[np.int32]
    top_logprobs: Floats


def token_logprobs(logits: Tensor, index: Ints, logits_index: Ints, tokens: Ints, num_top: Ints) -> LogprobColumns:
    """Log-softmax at the given tokens, and its largest entries.

    Args:
        logits: [num_logits, vocab] float32 on the CPU, without NaN in the rows used.
        index: [n], handed through to the columns.
        logits_index: [n], row of `logits` of each entry.
        tokens: [n], ids whose log probability is wanted.
        num_top: [n], at least 0 and at most the vocabulary.
    """
    count, vocab = len(tokens), logits.shape[1]
    num_top = np.minimum(num_top, vocab)
    max_top = int(num_top.max(initial=0))
    logprobs = np.empty(count, dtype=np.float32)
    top_ids = np.full((count, max_top), -1, dtype=np.int32)
    top_logprobs = np.full((count, max_top), -np.inf, dtype=np.float32)
    chunk = max(1, CHUNK_ELEMENTS // vocab)
    scratch = torch.empty(min(chunk, count), distribution.num_blocks(vocab) * distribution.BLOCK)
    for start in range(0, count, chunk):
        part = slice(start, min(start + chunk, count))
        x = distribution.gather(logits, logits_index[part])
        values, rows = x.numpy(), np.arange(len(x))
        maxima = distribution.block_maxima(x)
        row_max = maxima.max(axis=1)
        _, sums = distribution.softmax_weights(x, row_max, np.ones(len(x)), scratch)
        normaliser = row_max + np.log(sums.cumsum(axis=1)[:, -1])  # [rows] float64
        logprobs[part] = values[rows, tokens[part]] - normaliser
        if max_top == 0:
            continue
        bound = distribution.kth_block_maximum(maxima, np.maximum(num_top[part], 1))
        ids, best = distribution.candidates(values, maxima, bound)
        width = min(max_top, ids.shape[1])
        wanted = (np.arange(width) < num_top[part][:, None]) & (ids[:, :width] >= 0)
        top_ids[part, :width] = np.where(wanted, ids[:, :width], -1)
        top_logprobs[part, :width] = np.where(wanted, best[:, :width] - normaliser[:, None], -np.inf)
    return LogprobColumns(
        index=index.astype(np.int32),
        logprobs=logprobs,
        num_top=num_top.astype(np.int32),
        top_ids=top_ids,
        top_logprobs=top_logprobs,
    )


def prompt_logprobs(logits: Tensor, next_tokens: npt.ArrayLike, k: int) -> LogprobColumns:
    """Log probabilities of the prompt tokens that follow each position.

    Args:
        logits: [num_tokens, vocab] float32 on the CPU.
        next_tokens: [num_tokens], the token that stands after each position.
        k: alternatives to report for each.

    Returns:
        Columns with index 0, 1, ..., num_tokens - 1.

    Raises:
        RequestFailedError: the model gave NaN or infinity at some position.
    """
    tokens = np.asarray(next_tokens, dtype=np.int64)
    if len(tokens) != logits.shape[0]:
        raise ValueError(f"{logits.shape[0]} rows of logits need as many next_tokens, but {len(tokens)} were given")
    broken = np.flatnonzero(~np.isfinite(distribution.block_maxima(logits).max(axis=1)))
    if len(broken):
        raise RequestFailedError(
            f"the model gave NaN or infinite logits at {len(broken)} of {len(tokens)} prompt positions, "
            f"the first at {broken[0]}"
        )
    positions = np.arange(len(tokens))
    return token_logprobs(logits, positions, positions, tokens, np.full(len(tokens), k))
