"""What each op means, in float64 numpy and plain loops: slow, and short enough to be seen to be right.

Functions take and return numpy arrays with the shapes of the fronts in `ops`; nothing is changed in place.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x [num_tokens, in], weight [out, in], bias [out] -> [num_tokens, out]."""
    y: Array = x.astype(np.float64) @ weight.astype(np.float64).T
    return y if bias is None else y + bias


def embedding(tokens: Array, weight: Array) -> Array:
    return weight[tokens].astype(np.float64)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    x = x.astype(np.float64)
    return np.asarray(x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight)


def layer_norm(x: Array, weight: Array, bias: Array | None, eps: float) -> Array:
    x = x.astype(np.float64)
    centred = x - x.mean(-1, keepdims=True)
    y = centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + eps) * weight
    return np.asarray(y if bias is None else y + bias)


def silu_mul(gate_up: Array) -> Array:
    gate, up = np.split(gate_up.astype(np.float64), 2, axis=-1)
    return np.asarray(gate / (1 + np.exp(-gate)) * up)


def gelu_tanh(x: Array) -> Array:
    x = x.astype(np.float64)
    return np.asarray(x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))))


def rope(x: Array, cos_sin: Array, positions: Array) -> Array:
    """x [num_tokens, heads, head_dim]: pairs (i, i + half) turned by the angle of their position."""
    y = x.astype(np.float64)
    half = cos_sin.shape[1] // 2
    for token, position in enumerate(positions):
        for i in range(half):
            cos, sin = float(cos_sin[position, i]), float(cos_sin[position, half + i])
            low, high = y[token, :, i].copy(), y[token, :, half + i].copy()
            y[token, :, i] = low * cos - high * sin
            y[token, :, half + i] = high * cos + low * sin
    return y


def write_kv(new: Array, cache: Array, slot_mapping: Array) -> Array:
    """The cache [num_blocks, heads, block_size, head_dim] with rows new [num_tokens, heads, head_dim] put in."""
    cache = cache.copy()
    block_size = cache.shape[2]
    for token, slot in enumerate(slot_mapping):
        cache[slot // block_size, :, slot % block_size] = new[token]
    return cache


def paged_attention(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    query_starts: Array,
    context_lens: Array,
    block_tables: Array,
    scale: float,
    window: int | None,
) -> Array:
    """One token, one head, one key after the other."""
    out = np.zeros(q.shape)
    num_heads, block_size = q.shape[1], k_cache.shape[2]
    group = num_heads // k_cache.shape[1]
    for seq, context_len in enumerate(context_lens):
        query_len = query_starts[seq + 1] - query_starts[seq]
        for i in range(query_len):
            position = int(context_len - query_len + i)
            first = 0 if window is None else max(0, position - window + 1)
            slots = [(block_tables[seq, j // block_size], j % block_size) for j in range(first, position + 1)]
            token = query_starts[seq] + i
            for head in range(num_heads):
                keys = np.array([k_cache[block, head // group, offset] for block, offset in slots], np.float64)
                values = np.array([v_cache[block, head // group, offset] for block, offset in slots], np.float64)
                scores = keys @ q[token, head].astype(np.float64) * scale
                weights = np.exp(scores - scores.max())
                out[token, head] = weights @ values / weights.sum()
    return out


def copy_blocks(kv_storage: Array, source: Array, target: Array) -> Array:
    """[num_layers, 2, num_blocks, ...] with the source blocks copied over the target blocks."""
    storage = kv_storage.copy()
    for a, b in zip(source, target, strict=True):
        storage[:, :, b] = kv_storage[:, :, a]
    return storage


def block_maxima(logits: Array) -> Array:
    """[rows, vocab] -> maxima over 64 neighbouring ids, NaN where one of them is."""
    rows, vocab = logits.shape
    return np.array([[logits[row, i : i + 64].max() for i in range(0, vocab, 64)] for row in range(rows)])


def block_sums(logits: Array, row_max: Array) -> Array:
    """[rows, vocab] -> sums of exp(logit - row_max) over ids that lie ceil(vocab / 64) apart."""
    blocks = -(-logits.shape[1] // 64)
    weights = np.exp(logits.astype(np.float64) - row_max[:, None])
    return np.stack([weights[:, block::blocks].sum(axis=1) for block in range(blocks)], axis=1)


def draw_order(logits: Array, temperature: float, top_k: int, top_p: float, min_p: float) -> tuple[Array, Array]:
    """Ids that can be drawn from logits [vocab], in the order in which the distribution is inverted, and their
    probabilities."""
    x = logits.astype(np.float64)
    weights = np.exp((x - x.max()) / temperature)
    blocks = -(-len(x) // 64)
    if top_k >= len(x) and top_p >= 1.0 and min_p <= 0.0:
        ids = np.lexsort((np.arange(len(x)), np.arange(len(x)) % blocks))
    else:
        ids = np.lexsort((np.arange(len(x)), -x))
        ids = ids[weights[ids] >= min_p][:top_k]
        if top_p < 1.0:
            running = weights[ids].cumsum()
            ids = ids[: (running < top_p * running[-1]).sum() + 1]
    return ids, weights[ids] / weights[ids].sum()
