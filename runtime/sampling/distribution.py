"""The arithmetic of drawing: blocks of maxima, softmax weights, candidates in order of likelihood, inverse CDF.

Every function is batch-invariant: what it computes for a row is bit-identical in whatever batch, and at whatever place,
the row stands. Maxima and comparisons are exact in any order. Sums are folds of elementwise additions, or running sums
along one row, so that their order stands in this file and is not a library's choice by shape.

The vocabulary is cut in two ways. Maxima are over BLOCK *neighbouring* ids, so that the few blocks that can hold a
likely token are read again in one piece. Weights are summed over BLOCK ids that lie num_blocks *apart*, because a fold
of halves then adds long contiguous runs.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

BLOCK = 64  # ids per block, a power of two
_BIN_SHIFT = 19  # float32 bits dropped to make a bin of weights: sixteen bins per power of two
_LOWEST = np.finfo(np.float32).min  # a threshold that all finite logits pass and masked ones do not


def gather(logits: Tensor, index: Ints) -> Tensor:
    """Rows of the logits: [len(index), vocab]; a view where they are neighbours."""
    if len(index) > 0 and bool((np.diff(index) == 1).all()):
        return logits[index[0] : index[-1] + 1]
    return logits.index_select(0, torch.from_numpy(index))


def block_maxima(logits: Tensor) -> Floats:
    """Maxima over neighbouring ids: [rows, vocab] to [rows, ceil(vocab / BLOCK)]. A NaN makes its block NaN."""
    rows, vocab = logits.shape
    whole = vocab // BLOCK
    maxima = torch.empty(rows, num_blocks(vocab), dtype=torch.float32)
    if whole:
        maxima[:, :whole] = logits[:, : whole * BLOCK].reshape(rows, whole, BLOCK).amax(dim=2)
    if whole * BLOCK < vocab:
        maxima[:, whole] = logits[:, whole * BLOCK :].amax(dim=1)
    return maxima.numpy()


def num_blocks(vocab: int) -> int:
    return -(-vocab // BLOCK)


def argmax(logits: Floats, maxima: Floats) -> Ints:
    """The most likely id of each row, the lowest one on ties: [rows]."""
    block = maxima.argmax(axis=1)
    ids = np.minimum(block[:, None] * BLOCK + np.arange(BLOCK), logits.shape[1] - 1)  # [rows, BLOCK]
    rows = np.arange(len(ids))
    token: Ints = ids[rows, logits[rows[:, None], ids].argmax(axis=1)]
    return token


def softmax_weights(logits: Tensor, row_max: Floats, temperature: Doubles, scratch: Tensor) -> tuple[Floats, Doubles]:
    """Unnormalised probabilities exp((logit - max) / temperature), and their sums over blocks.

    Args:
        logits: [rows, vocab] float32, without NaN or +inf.
        row_max: [rows].
        temperature: [rows], above 0.
        scratch: at least [rows, num_blocks * BLOCK] float32; the weights are written here.

    Returns:
        weights [rows, num_blocks * BLOCK], zero behind the vocabulary, and sums [rows, num_blocks]: block j holds the
        ids j, j + num_blocks, j + 2 * num_blocks, ...
    """
    rows, vocab = logits.shape
    width = num_blocks(vocab) * BLOCK
    padded = scratch[:rows, :width]
    weights = padded[:, :vocab]
    torch.sub(logits, torch.from_numpy(row_max)[:, None], out=weights)
    weights.mul_(torch.from_numpy((1.0 / temperature).astype(np.float32))[:, None]).exp_()
    padded[:, vocab:] = 0.0
    sums = padded
    while width > num_blocks(vocab):
        width //= 2
        sums = sums[:, :width] + sums[:, width : 2 * width]
    return padded.numpy(), sums.numpy().astype(np.float64)


def draw_from_weights(weights: Floats, sums: Doubles, uniform: Doubles) -> Ints:
    """Inverse CDF over all ids, in the order of the blocks of `softmax_weights`: [rows].

    Args:
        weights, sums: what `softmax_weights` returned.
        uniform: [rows] in [0, 1).
    """
    rows, blocks = sums.shape
    running = sums.cumsum(axis=1)
    block, target = _invert(running, uniform * running[:, -1])
    row = np.arange(rows)
    before = np.where(block > 0, running[row, block - 1], 0.0)
    inner = weights.reshape(rows, BLOCK, blocks)[row, :, block].astype(np.float64).cumsum(axis=1)  # [rows, BLOCK]
    place, _ = _invert(inner, target - before)
    token: Ints = place * blocks + block
    return token


def _invert(running: Doubles, target: Doubles) -> tuple[Ints, Doubles]:
    """First index whose running sum exceeds the target, which is kept below the total: rounding never draws past the
    last id that has weight, and an id without weight is never first."""
    target = np.minimum(target, np.nextafter(running[:, -1], 0.0))
    index: Ints = (running <= target[:, None]).sum(axis=1)
    return index, target


def kth_block_maximum(maxima: Floats, k: Ints) -> Floats:
    """A lower bound of the k-th largest logit: k blocks have a maximum that reaches it. [rows]"""
    ordered = np.sort(maxima, axis=1)
    blocks = maxima.shape[1]
    bound = ordered[np.arange(len(k)), np.maximum(blocks - k, 0)]
    return np.where(k <= blocks, np.maximum(bound, _LOWEST), _LOWEST)


def candidates(logits: Floats, maxima: Floats, threshold: Floats) -> tuple[Ints, Floats]:
    """Ids whose logit reaches the row's threshold, most likely first and lowest id first on ties.

    Args:
        logits: [rows, vocab], without NaN.
        maxima: `block_maxima` of them.
        threshold: [rows], finite.

    Returns:
        ids and logits, [rows, width]; rows with fewer candidates end in id -1 and logit -inf.
    """
    rows, vocab = logits.shape
    row, block = np.nonzero(maxima >= threshold[:, None])
    whole = vocab // BLOCK
    blocks = logits[:, : whole * BLOCK].reshape(rows, whole, BLOCK)
    if whole * BLOCK == vocab:
        values = blocks[row, block]  # [num_hit, BLOCK]
    else:
        values = np.full((len(row), BLOCK), -np.inf, dtype=np.float32)
        inside = block < whole
        values[inside] = blocks[row[inside], block[inside]]
        values[~inside, : vocab - whole * BLOCK] = logits[row[~inside], whole * BLOCK :]
    hit, offset = np.nonzero(values >= threshold[row, None])
    row = row[hit]
    # One 64-bit key orders by logit downwards, then by id upwards. Adding zero makes -0.0 equal to 0.0.
    bits = (values[hit, offset] + np.float32(0.0)).view(np.uint32)
    rising = np.where(bits >> 31, ~bits, bits | np.uint32(0x80000000))
    keys = (~rising).astype(np.uint64) << np.uint64(32) | (block[hit] * BLOCK + offset).astype(np.uint64)
    counts = np.bincount(row, minlength=rows)
    place = np.arange(len(row)) - (counts.cumsum() - counts)[row]
    width = int(counts.max(initial=0))
    ordered = np.full((rows, width), np.iinfo(np.uint64).max)
    ordered[row, place] = keys
    ordered.sort(axis=1)
    present = np.arange(width) < counts[:, None]
    ids = np.where(present, (ordered & np.uint64(0xFFFFFFFF)).astype(np.int64), -1)
    logit = np.where(present, logits[np.arange(rows)[:, None], ids], np.float32(-np.inf))
    return ids, logit


def reach(row_max: Floats, temperature: Doubles, weight: Doubles) -> Floats:
    """The logit below which a weight is surely below `weight`, with room for rounding: [rows]."""
    with np.errstate(divide="ignore"):
        depth = temperature * np.log(weight)
    bound = row_max + depth - 1e-5 * (1.0 + np.abs(row_max) - depth)
    return np.maximum(bound, float(_LOWEST)).astype(np.float32)


def draw_filtered(
    ids: Ints,
    logits: Floats,
    row_max: Floats,
    temperature: Doubles,
    top_k: Ints,
    top_p: Doubles,
    min_p: Doubles,
    mass: Doubles,
    uniform: Doubles,
) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Draws among the most likely ids: min_p, then top_k, then top_p over what those two keep.

    Each filter keeps a beginning of the order by likelihood, so together they are one cut.

    Args:
        ids, logits: `candidates`, [rows, width].
        top_k: [rows]; width or more is off.
        mass: [rows], sum of all weights where top_p alone filters; NaN where the candidates hold all that is kept.
        uniform: [rows] in [0, 1).

    Returns:
        tokens [rows], and whether the candidates were enough [rows]: False means that the nucleus is larger than they
        are, and the token is not to be used.
    """
    with np.errstate(over="ignore"):
        weights = np.exp((logits.astype(np.float64) - row_max[:, None]) / temperature[:, None])
    running = weights.cumsum(axis=1)
    row = np.arange(len(ids))
    kept = np.minimum((weights >= min_p[:, None]).sum(axis=1), top_k)
    kept = np.clip(kept, 1, (ids >= 0).sum(axis=1))
    wanted = top_p * np.where(np.isnan(mass), running[row, kept - 1], mass)
    reached = (running < wanted[:, None]).sum(axis=1) + 1  # the shortest beginning whose mass reaches top_p
    enough = np.isnan(mass) | (reached <= kept)
    kept = np.where(top_p < 1.0, np.minimum(kept, reached), kept)
    total = running[row, kept - 1]
    place, _ = _invert(np.minimum(running, total[:, None]), uniform * total)
    return ids[row, place], enough


def draw_from_nucleus(weights: Floats, logits: Floats, top_p: float, uniform: float) -> int:
    """Draws from a nucleus that may be most of the vocabulary, without sorting it; for one row.

    Weights fall into bins by their leading bits. The bin where the mass reaches top_p is sorted, no other is.

    Args:
        weights: [vocab], of `softmax_weights`.
        logits: [vocab], which order the ids of a bin: lowest id first on ties.
        top_p: below 1.
        uniform: in [0, 1).
    """
    bins = weights.view(np.int32) >> _BIN_SHIFT  # [vocab], rises with the weight
    running = np.bincount(bins, weights)[::-1].cumsum()  # [num_bins], from the largest weights down
    last = len(running) - 1
    wanted = top_p * running[-1]
    cut = int((running < wanted).sum())  # place of the bin in which the nucleus ends
    ids = np.flatnonzero(bins == last - cut)
    ids = ids[np.argsort(-logits[ids], kind="stable")]
    before = running[cut - 1] if cut else 0.0
    inner = weights[ids].astype(np.float64).cumsum()
    inner = inner[: (inner < wanted - before).sum() + 1]
    total = before + inner[-1]
    target = min(uniform * total, np.nextafter(total, 0.0))
    if target < before:
        place = int((running <= target).sum())
        ids = np.flatnonzero(bins == last - place)
        before = running[place - 1] if place else 0.0
        inner = weights[ids].astype(np.float64).cumsum()
    index, _ = _invert(inner[None], np.array([target - before]))
    return int(ids[index[0]])
