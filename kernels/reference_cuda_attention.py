"""Paged attention in float64 torch, for the CUDA kernels: one sequence and one kv head after the other."""

import math

import torch
from torch import Tensor

from millrace.kernels.cuda_attention_common import AttentionOptions, KvPool


def dequantise(pool: KvPool) -> tuple[Tensor, Tensor]:
    """Keys and values [num_blocks, num_kv_heads, 16, head_dim] in float64."""
    keys, values = pool.keys.double(), pool.values.double()
    if pool.key_scales is None or pool.value_scales is None:
        return keys, values
    return keys * pool.key_scales.double().unsqueeze(-1), values * pool.value_scales.double().unsqueeze(-1)


def paged_attention(
    q: Tensor,
    pool: KvPool,
    block_tables: Tensor,
    query_lens: list[int],
    context_lens: list[int],
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """The queries are the last of their contexts. q [num_tokens, num_heads, head_dim].

    Returns:
        out as q and log-sum-exp [num_tokens, num_heads], both float64; a query without keys has zeros and -inf.
    """
    num_tokens, num_heads, head_dim = q.shape
    all_keys, all_values = dequantise(pool)
    num_kv_heads = all_keys.shape[1]
    out = torch.zeros(num_tokens, num_heads, head_dim, dtype=torch.float64)
    lse = torch.full((num_tokens, num_heads), -math.inf, dtype=torch.float64)
    start = 0
    for seq, (query_len, context_len) in enumerate(zip(query_lens, context_lens, strict=True)):
        oldest = 0 if options.window is None else max(0, context_len - query_len + 1 - options.window) // 16 * 16
        blocks = block_tables[seq, oldest // 16 : -(-context_len // 16)].long()
        keys = all_keys[blocks].transpose(0, 1).flatten(1, 2)  # [num_kv_heads, tokens from oldest on, head_dim]
        values = all_values[blocks].transpose(0, 1).flatten(1, 2)
        for i in range(query_len):
            position = context_len - query_len + i
            first = 0 if options.window is None else max(0, position - options.window + 1)
            if position < 0:
                continue
            for head in range(num_heads):
                kv_head = head // (num_heads // num_kv_heads)
                scores = (
                    keys[kv_head, first - oldest : position + 1 - oldest] @ q[start + i, head].double() * options.scale
                )
                if options.soft_cap is not None:
                    scores = options.soft_cap * torch.tanh(scores / options.soft_cap)
                if options.alibi_slopes is not None:
                    distance = torch.arange(first, position + 1, dtype=torch.float64) - position
                    scores = scores + float(options.alibi_slopes[head]) * distance
                lse[start + i, head] = scores.logsumexp(0)
                out[start + i, head] = scores.softmax(0) @ values[kv_head, first - oldest : position + 1 - oldest]
        start += query_len
    return out, lse
