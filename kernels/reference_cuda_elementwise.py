"""What the elementwise CUDA ops mean that `reference` does not have, in float64 torch on the CPU."""

import math

import torch
from torch import Tensor

from millrace.kernels.memory import BLOCK_SIZE


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    x = x.double()
    centred = x - x.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    return y if bias is None else y + bias.double()


def activation(x: Tensor, name: str, gated: bool) -> Tensor:
    x = x.double()
    gate, factor = x.chunk(2, -1) if gated else (x, torch.ones_like(x))
    if name == "silu":
        y = gate / (1 + (-gate).exp())
    elif name == "gelu_tanh":
        y = gate / 2 * (1 + (math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)).tanh())
    else:
        y = gate / 2 * (1 + (gate / math.sqrt(2)).erf())
    return y * factor


def embedding(tokens: Tensor, weight: Tensor, positions: Tensor | None, position_weight: Tensor | None) -> Tensor:
    rows = [weight[token].double() if 0 <= token < len(weight) else None for token in tokens.tolist()]
    if positions is not None and position_weight is not None:
        for i, position in enumerate(positions.tolist()):
            row, known = rows[i], 0 <= position < len(position_weight)
            rows[i] = None if row is None or not known else row + position_weight[position].double()
    nothing = torch.full((weight.shape[1],), torch.nan, dtype=torch.float64)
    return torch.stack([nothing if row is None else row for row in rows])


def qkv_heads(
    qkv: Tensor,
    num_heads: int,
    num_kv_heads: int,
    bias: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    norm_eps: float,
    cos_sin: Tensor | None,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as attention shall see them: [num_tokens, heads, head_dim] float64 each."""
    x = qkv.double() if bias is None else qkv.double() + bias.double()
    heads = x.view(len(x), num_heads + 2 * num_kv_heads, -1)
    q, k, v = (part.clone() for part in torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], 1))
    if q_norm is not None:
        q = rms_norm(q, q_norm, norm_eps)
    if k_norm is not None:
        k = rms_norm(k, k_norm, norm_eps)
    if cos_sin is not None and positions is not None:
        q, k = rotate(q, cos_sin, positions), rotate(k, cos_sin, positions)
    return q, k, v


def rotate(x: Tensor, cos_sin: Tensor, positions: Tensor) -> Tensor:
    """x [num_tokens, heads, head_dim] float64; a token whose position the table does not have becomes NaN there."""
    rotary_dim = cos_sin.shape[1]
    y = x.clone()
    for token, position in enumerate(positions.tolist()):
        if not 0 <= position < len(cos_sin):
            y[token, :, :rotary_dim] = torch.nan
            continue
        cos, sin = cos_sin[position].double().chunk(2)
        low, high = x[token, :, : rotary_dim // 2], x[token, :, rotary_dim // 2 : rotary_dim]
        y[token, :, : rotary_dim // 2] = low * cos - high * sin
        y[token, :, rotary_dim // 2 : rotary_dim] = high * cos + low * sin
    return y


def slot(pool: Tensor, index: int) -> Tensor:
    """The heads that a slot of one half of a pool [num_blocks, num_kv_heads, BLOCK_SIZE, ...] holds."""
    return pool[index // BLOCK_SIZE, :, index % BLOCK_SIZE]
