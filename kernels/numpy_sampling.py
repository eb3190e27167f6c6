"""Sampling in numpy alone, for where the C++ library is not built.

Every function is batch-invariant: what it computes for a row is bit-identical in whatever batch, and at whatever place,
the row stands. Maxima and comparisons are exact in any order. numpy's elementwise functions, exp among them, give the
same bits at every place of an array. Sums are folds of elementwise additions, or running sums along one row, so that
their order stands in this file and is not a library's choice by shape.

The vocabulary is cut in two ways. Maxima are over BLOCK *neighbouring* ids, so that the few blocks that can hold a
likely token are read again in one piece. Weights are summed over BLOCK ids that lie num_blocks *apart*, because a fold
of halves then adds long contiguous runs.
"""

import threading
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from millrace.kernels.philox import uniforms
from millrace.kernels.sampling import (
    BROKEN,
    EMPTY,
    LOGIT_BLOCK,
    Floats,
    Index,
    Sampling,
    Settings,
    TokenDrawer,
    Tokens,
    num_blocks,
)

Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Number = TypeVar("Number", bound=np.generic)

BLOCK = LOGIT_BLOCK
CHUNK_ELEMENTS = 1 << 20  # logits handled at a time: 4 MiB, so that passes over them hit the cache
_BIN_SHIFT = 19  # float32 bits dropped to make a bin of weights: sixteen bins per power of two
_LOWEST = np.finfo(np.float32).min  # a threshold that all finite logits pass and masked ones do not
_scratch = threading.local()  # a place for weights: fresh pages for each step would cost more than the step


class NumpySampling(Sampling):
    def block_maxima(self, logits: Floats) -> Floats:
        return block_maxima(logits)

    def block_sums(self, logits: Floats, row_max: Floats) -> Floats:
        sums = np.empty((len(logits), num_blocks(logits.shape[1])), dtype=np.float32)
        chunk = max(1, CHUNK_ELEMENTS // logits.shape[1])
        for start in range(0, len(logits), chunk):
            part = slice(start, start + chunk)
            sums[part] = softmax_weights(logits[part], row_max[part], np.ones(len(row_max[part])))[1]
        return sums

    def token_drawer(self, table: Settings, vocab: int) -> TokenDrawer:
        return NumpyDrawer(table, vocab)


class NumpyDrawer(TokenDrawer):
    """Rows are handled some at a time, so that passes over their logits hit the cache."""

    def __call__(self, logits: Floats, rows: Index, source: Index | None = None) -> tuple[Tokens, int]:
        index = np.arange(len(rows)) if source is None else source
        self.check(logits, rows, index)
        settings = self.table[rows]
        uniform = np.zeros(len(rows))
        if not settings["greedy"].all():
            uniform = uniforms(settings["seed"], settings["choice"], settings["position"])
        tokens = np.empty(len(rows), dtype=np.int32)
        chunk = max(1, CHUNK_ELEMENTS // self.vocab)
        for start in range(0, len(rows), chunk):
            part = slice(start, start + chunk)
            tokens[part] = _draw_chunk(gather(logits, index[part]), settings[part], uniform[part])
        self.table["position"][rows[tokens >= 0]] += 1
        return tokens, int((tokens < 0).sum())


def _draw_chunk(x: Floats, settings: Settings, uniform: Doubles) -> Ints:
    best = x.argmax(axis=1)  # the lowest id on ties; the first NaN, if there is one
    row_max = x[np.arange(len(x)), best]
    good, is_greedy = np.isfinite(row_max), settings["greedy"] != 0
    tokens = np.where(np.isneginf(row_max), EMPTY, np.where(good, best, BROKEN))
    random = np.flatnonzero(good & ~is_greedy)
    if len(random):
        tokens[random] = _draw_random(gather(x, random), row_max[random], settings[random], uniform[random])
    return tokens


def _draw_random(x: Floats, row_max: Floats, settings: Settings, uniform: Doubles) -> Ints:
    vocab = x.shape[1]
    temperature, top_k, top_p, min_p = (settings[name] for name in ("temperature", "top_k", "top_p", "min_p"))
    cut = (top_k < vocab) | (min_p > 0.0)
    tokens = np.empty(len(x), dtype=np.int64)
    mass = np.full(len(x), np.nan)

    full = np.flatnonzero(~cut)  # those need the mass of the whole vocabulary
    weights = np.empty((0, vocab), dtype=np.float32)
    if len(full):
        weights, sums = softmax_weights(gather(x, full), row_max[full], temperature[full])
        mass[full] = sums.cumsum(axis=1)[:, -1]
        free = np.flatnonzero(top_p[full] >= 1.0)
        if len(free):
            tokens[full[free]] = draw_from_weights(gather(weights, free), gather(sums, free), uniform[full[free]])

    filtered = np.flatnonzero(cut | (top_p < 1.0))
    if not len(filtered):
        return tokens
    rows = gather(x, filtered)
    maxima = block_maxima(rows)
    # top_p alone is tried on a few of the most likely ids: few enough that most blocks drop out, or all where sorting
    # them costs no more than looking again.
    first = min(num_blocks(vocab) // 4, 256) if num_blocks(vocab) > 16 else vocab
    bound = kth_block_maximum(maxima, np.where(top_k < vocab, top_k, first)[filtered])
    by_min_p = reach(row_max[filtered], temperature[filtered], min_p[filtered])
    # min_p alone is decided by a weight; beside top_k, the tighter of both bounds holds all that is kept.
    only_min_p = ((min_p > 0.0) & (top_k >= vocab))[filtered]
    bound = np.where(only_min_p, by_min_p, np.maximum(bound, by_min_p))
    ids, values = candidates(rows, maxima, bound)
    tokens[filtered], enough = draw_filtered(
        ids,
        values,
        row_max=row_max[filtered],
        temperature=temperature[filtered],
        top_k=top_k[filtered],
        top_p=top_p[filtered],
        min_p=min_p[filtered],
        mass=mass[filtered],
        uniform=uniform[filtered],
    )
    for one in filtered[~enough]:
        weight = weights[np.searchsorted(full, one), :vocab]
        tokens[one] = draw_from_nucleus(weight, x[one], float(top_p[one]), float(uniform[one]))
    return tokens


def gather(array: npt.NDArray[Number], index: Index) -> npt.NDArray[Number]:
    """Rows of an array [rows, width]: [len(index), width]; a view where they are neighbours in order."""
    if len(index) > 0 and bool((np.diff(index) == 1).all()):
        return array[index[0] : index[-1] + 1]
    return array[index]


def block_maxima(logits: Floats) -> Floats:
    """Maxima over neighbouring ids: [rows, vocab] to [rows, num_blocks]. A NaN makes its block NaN."""
    maxima: Floats = np.maximum.reduceat(logits, np.arange(0, logits.shape[1], BLOCK), axis=1)
    return maxima


def softmax_weights(logits: Floats, row_max: Floats, temperature: Doubles) -> tuple[Floats, Doubles]:
    """Unnormalised probabilities exp((logit - max) / temperature), and their sums over blocks.

    Args:
        logits: [rows, vocab] float32, without NaN or +inf.
        row_max: [rows].
        temperature: [rows], above 0.

    Returns:
        weights [rows, num_blocks * BLOCK], zero behind the vocabulary, which the thread's next call overwrites; and
        sums [rows, num_blocks]: block j holds the ids j, j + num_blocks, j + 2 * num_blocks, ...
    """
    rows, vocab = logits.shape
    width = num_blocks(vocab) * BLOCK
    if not hasattr(_scratch, "weights") or _scratch.weights.size < rows * width:
        _scratch.weights = np.empty(rows * width, dtype=np.float32)
    padded: Floats = _scratch.weights[: rows * width].reshape(rows, width)
    weights = padded[:, :vocab]
    with np.errstate(over="ignore"):  # below the range of float32 lies -inf, whose weight is 0
        np.subtract(logits, row_max[:, None], out=weights)
        weights *= (1.0 / temperature).astype(np.float32)[:, None]
    np.exp(weights, out=weights)
    padded[:, vocab:] = 0.0
    sums = padded
    while width > num_blocks(vocab):
        width //= 2
        sums = sums[:, :width] + sums[:, width : 2 * width]
    return padded, sums.astype(np.float64)


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

    Weights fall into bins by their leading bits. Only the bins where the mass reaches top_p and the drawn number are
    sorted.

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
    ids = _ranked(np.flatnonzero(bins == last - cut), logits)
    before = running[cut - 1] if cut else 0.0
    inner = weights[ids].astype(np.float64).cumsum()
    inner = inner[: (inner < wanted - before).sum() + 1]
    total = before + inner[-1]
    target = min(uniform * total, np.nextafter(total, 0.0))
    if target < before:
        place = int((running <= target).sum())
        ids = _ranked(np.flatnonzero(bins == last - place), logits)
        before = running[place - 1] if place else 0.0
        inner = weights[ids].astype(np.float64).cumsum()
    index, _ = _invert(inner[None], np.array([target - before]))
    return int(ids[index[0]])


def _ranked(ids: Ints, logits: Floats) -> Ints:
    """Ids, ascending, put into the order of likelihood."""
    return ids[np.argsort(-logits[ids], kind="stable")]
