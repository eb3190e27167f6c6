"""Log probabilities under the model's own distribution, before penalties and temperature."""

import numpy as np
import numpy.typing as npt

from millrace.kernels import host_sampling, numpy_sampling
from millrace.kernels.sampling import Floats
from millrace.runtime.messages import LogprobColumns

Ints = npt.NDArray[np.int64]


def token_logprobs(logits: Floats, index: Ints, logits_index: Ints, tokens: Ints, num_top: Ints) -> LogprobColumns:
    """Log-softmax at the given tokens, and its largest entries.

    Args:
        logits: [num_logits, vocab] float32, without NaN in the rows used.
        index: [n], handed through to the columns.
        logits_index: [n], row of `logits` of each entry.
        tokens: [n], ids whose log probability is wanted.
        num_top: [n], alternatives that are wanted; a row with fewer possible tokens reports as many as it has.
    """
    count, vocab = len(tokens), logits.shape[1]
    max_top = min(int(num_top.max(initial=0)), vocab)
    found = np.zeros(count, dtype=np.int32)
    logprobs = np.empty(count, dtype=np.float32)
    top_ids = np.full((count, max_top), -1, dtype=np.int32)
    top_logprobs = np.full((count, max_top), -np.inf, dtype=np.float32)
    chunk = max(1, numpy_sampling.CHUNK_ELEMENTS // vocab)
    for start in range(0, count, chunk):
        part = slice(start, min(start + chunk, count))
        x = numpy_sampling.gather(logits, logits_index[part])
        maxima = host_sampling.block_maxima(x)
        row_max = maxima.max(axis=1)
        mass = host_sampling.block_sums(x, row_max).cumsum(axis=1, dtype=np.float64)[:, -1]
        normaliser = row_max + np.log(mass)  # [rows] float64
        logprobs[part] = x[np.arange(len(x)), tokens[part]] - normaliser
        if max_top == 0:
            continue
        bound = numpy_sampling.kth_block_maximum(maxima, np.maximum(num_top[part], 1))
        ids, best = numpy_sampling.candidates(x, maxima, bound)
        width = min(max_top, ids.shape[1])
        wanted = (np.arange(width) < num_top[part][:, None]) & (ids[:, :width] >= 0)
        found[part] = wanted.sum(axis=1)
        top_ids[part, :width] = np.where(wanted, ids[:, :width], -1)
        top_logprobs[part, :width] = np.where(wanted, best[:, :width] - normaliser[:, None], -np.inf)
    return LogprobColumns(
        index=index.astype(np.int32),
        logprobs=logprobs,
        num_top=found,
        top_ids=top_ids,
        top_logprobs=top_logprobs,
    )


def prompt_logprobs(logits: Floats, next_tokens: npt.ArrayLike, k: int) -> LogprobColumns:
    """Log probabilities of the prompt tokens that follow each position.

    Args:
        logits: [num_tokens, vocab] float32.
        next_tokens: [num_tokens], the token that stands after each position.
        k: alternatives to report for each.

    Returns:
        Columns with index 0, 1, ..., num_tokens - 1. Where the model gave NaN or infinity, logprobs is NaN and num_top
        is 0: other prompts of the step go on, and the sampler fails the request if its last position is so.
    """
    tokens = np.asarray(next_tokens, dtype=np.int64)
    count = len(tokens)
    if count != logits.shape[0]:
        raise ValueError(f"{logits.shape[0]} rows of logits need as many next_tokens, but {count} were given")
    sound = np.flatnonzero(np.isfinite(logits.max(axis=1)))
    columns = token_logprobs(logits, sound, sound, tokens[sound], np.full(len(sound), k))
    if len(sound) == count:
        return columns
    width = columns.top_ids.shape[1]
    whole = LogprobColumns(
        index=np.arange(count, dtype=np.int32),
        logprobs=np.full(count, np.nan, dtype=np.float32),
        num_top=np.zeros(count, dtype=np.int32),
        top_ids=np.full((count, width), -1, dtype=np.int32),
        top_logprobs=np.full((count, width), -np.inf, dtype=np.float32),
    )
    whole.logprobs[sound] = columns.logprobs
    whole.num_top[sound] = columns.num_top
    whole.top_ids[sound] = columns.top_ids
    whole.top_logprobs[sound] = columns.top_logprobs
    return whole
