"""Paged attention of prompt chunks: front of kernels/cuda/attention_prefill.cu, and a route over torch's attention."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from millrace.kernels.cuda_attention_common import (
    POINTERS,
    TYPES,
    AttentionOptions,
    KvPool,
    Variant,
    check,
    check_heads,
    check_pool,
    check_rest,
    macros,
    pack,
    padded_row,
    pointer,
    pool_pointers,
    type_names,
)
from millrace.kernels.cuda_compile import Kernel
from millrace.kernels.cuda_launch import Launcher
from millrace.kernels.memory import BLOCK_SIZE

# To be measured on each new kind of device; the kernel is right for any values.
WIDE_TILE_ROUNDS = 2  # CTAs per SM that there must be for tiles of 128 query rows; with fewer they have 64
# Where torch's attention on gathered keys is faster than the kernel: (head_dim, query tokens, context) from which on.
# Empty until a measurement says otherwise.
GATHER_FROM: tuple[tuple[int, int, int], ...] = ()


def _variant(dtype: str, kv: str, head_dim: int, warps: int) -> Variant:
    quantised = kv != dtype
    tokens = 32 if head_dim > 128 else 64
    stride = padded_row(2 * head_dim)
    stage = 2 * tokens * (head_dim if quantised else stride) + (2 * tokens * 4 if quantised else 0)
    queries = 16 * warps * stride if head_dim > 128 else 0
    shared = queries + 2 * stage + (2 * tokens * stride if quantised else 0)
    defines = {"MR_T": dtype, "MR_KV": kv, "MR_HEAD_DIM": head_dim, "MR_WARPS": warps, "MR_SHARED_BYTES": shared}
    kernel = Kernel("attention_prefill.cu", "mr_attention_prefill", macros(defines), 255)
    return Variant(kernel, 32 * warps, shared)


def prefill_variants(dtype: str, kv: str, head_dim: int) -> Iterator[Variant]:
    """Tiles of 64 query rows, and of 128 where the head is small enough."""
    yield _variant(dtype, kv, head_dim, 4)
    if head_dim <= 128:
        yield _variant(dtype, kv, head_dim, 8)


class PrefillPlan(NamedTuple):
    """Where the queries of a prefill step lie, for all its layers.

    Attributes:
        tiles: [num_tiles, 2] int32, sequence and first query row of each CTA, the longest work first.
        query_starts: [num_seqs + 1] int32.
        context_lens: [num_seqs] int32.
        query_lens, context_lens_host: the same on the host.
        num_heads, num_kv_heads, head_dim: of the layers.
        tile_rows: query rows of a tile, 64 or 128; a row is one head of a kv head's group at one token.
    """

    tiles: Tensor
    query_starts: Tensor
    context_lens: Tensor
    query_lens: tuple[int, ...]
    context_lens_host: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tile_rows: int


def plan_prefill(
    launcher: Launcher,
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    device: torch.device | str,
) -> PrefillPlan:
    """Cuts the chunks of a prefill step into query tiles. One upload to the device, on torch's current stream.

    Args:
        query_lens: query tokens of each sequence, at least 1.
        context_lens: keys of each, the chunk's included: a prefix that is in the pool makes it larger than query_len.
    """
    op, num_seqs = "plan_prefill", len(query_lens)
    check_heads(op, num_heads, num_kv_heads, head_dim, 1)
    if num_seqs == 0 or len(context_lens) != num_seqs:
        raise ValueError(f"{op}: {num_seqs} query lengths and {len(context_lens)} context lengths; as many, at least 1")
    for seq, (query_len, context_len) in enumerate(zip(query_lens, context_lens, strict=True)):
        if not 1 <= query_len <= context_len:
            raise ValueError(f"{op}: sequence {seq} has {query_len} query tokens in a context of {context_len}")
    group = num_heads // num_kv_heads
    lens, contexts = np.asarray(query_lens, np.int64), np.asarray(context_lens, np.int64)
    tile_rows = 128
    if head_dim > 128 or (-(-lens * group // 128)).sum() * num_kv_heads < WIDE_TILE_ROUNDS * launcher.sm_count:
        tile_rows = 64
    counts = -(-lens * group // tile_rows)
    seqs = np.repeat(np.arange(num_seqs), counts)
    rows = (np.arange(len(seqs)) - np.repeat(np.cumsum(counts) - counts, counts)) * tile_rows
    last_token = np.minimum((rows + tile_rows - 1) // group, lens[seqs] - 1)
    order = np.argsort(-((contexts - lens)[seqs] + last_token), kind="stable")
    tiles = np.stack([seqs, rows], axis=1)[order]
    if len(tiles) > 65535:
        raise ValueError(f"{op}: {lens.sum()} query tokens make {len(tiles)} tiles, but a launch has at most 65535")
    starts = np.concatenate([[0], np.cumsum(lens)])
    data = torch.from_numpy(np.concatenate([tiles.ravel(), starts, contexts]).astype(np.int32)).to(device)
    tiles_there, starts_there, contexts_there = torch.split(data, [tiles.size, starts.size, contexts.size])
    return PrefillPlan(
        tiles_there.view(-1, 2),
        starts_there,
        contexts_there,
        tuple(map(int, query_lens)),
        tuple(map(int, context_lens)),
        num_heads,
        num_kv_heads,
        head_dim,
        tile_rows,
    )


_PARAMS = np.dtype(
    [(name, "u8") for name in (*POINTERS, "query_starts", "context_lens", "tiles", "alibi_slopes", "out", "lse")]
    + [(name, "i4") for name in ("max_blocks", "group", "window")]
    + [("score_factor", "f4"), ("soft_cap", "f4")],
    align=True,
)


def prefill_attention(
    launcher: Launcher,
    q: Tensor,
    pool: KvPool,
    block_tables: Tensor,
    plan: PrefillPlan,
    options: AttentionOptions,
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    route: Literal["kernel", "gather"] | None = None,
    stream: int,
) -> Tensor:
    """Causal attention of a ragged batch of chunks.

    Args:
        q: [num_tokens, num_heads, head_dim] bfloat16 or float16, the chunks one after the other.
        block_tables: [num_seqs, max_blocks] int32; what lies past a context is not read.
        plan: `plan_prefill` of this step.
        out: as q; allocated if None.
        lse: [num_tokens, num_heads] float32 for the natural log-sum-exp of the scores; the kernel's route only.
        route: "gather" runs torch's attention on gathered keys and values, on torch's current stream, which must be
            `stream`, and has no soft cap; None chooses by GATHER_FROM.

    Returns:
        out.
    """
    op, num_tokens, num_seqs = "prefill_attention", sum(plan.query_lens), len(plan.query_lens)
    names = type_names(op, q.dtype, pool.keys.dtype)
    check(op, "q", q, (num_tokens, plan.num_heads, plan.head_dim), tuple(TYPES), launcher)
    check_pool(op, pool, plan.num_kv_heads, plan.head_dim, q.dtype, launcher)
    check(op, "block_tables", block_tables, (num_seqs, "max_blocks"), (torch.int32,), launcher, align=4)
    check(op, "tiles", plan.tiles, ("num_tiles", 2), (torch.int32,), launcher, align=4)
    longest = max(plan.context_lens_host)
    if block_tables.shape[1] * BLOCK_SIZE < longest:
        raise ValueError(f"{op}: block_tables has {block_tables.shape[1]} blocks a sequence for {longest} tokens")
    out, scoring = check_rest(op, q, options, out, lse, launcher)
    lacking = "soft_cap" if options.soft_cap is not None else "lse" if lse is not None else None
    if route is None:
        route = "gather" if lacking is None and _gather_is_faster(plan) else "kernel"
    if route == "gather":
        if lacking is not None:
            raise ValueError(f"{op}: route 'gather' has no {lacking}")
        return _gather_attention(q, pool, block_tables, plan, options, out)
    if route != "kernel":
        raise ValueError(f"{op}: route is {route!r}, but it must be 'kernel', 'gather' or None")
    variant = _variant(*names, plan.head_dim, plan.tile_rows // 16)
    params = pack(
        _PARAMS,
        q=q.data_ptr(),
        **pool_pointers(pool),
        block_tables=block_tables.data_ptr(),
        query_starts=plan.query_starts.data_ptr(),
        context_lens=plan.context_lens.data_ptr(),
        tiles=plan.tiles.data_ptr(),
        out=out.data_ptr(),
        lse=pointer(lse),
        max_blocks=block_tables.shape[1],
        group=plan.num_heads // plan.num_kv_heads,
        **scoring,
    )
    grid = (plan.num_kv_heads, plan.tiles.shape[0], 1)
    launcher.launch(variant.kernel, grid, variant.threads, params, shared_bytes=variant.shared_bytes, stream=stream)
    return out


def _gather_is_faster(plan: PrefillPlan) -> bool:
    """Whether every chunk of the step lies in one row of GATHER_FROM."""
    chunks = list(zip(plan.query_lens, plan.context_lens_host, strict=True))
    return any(
        plan.head_dim == head_dim and all(new >= queries and total >= context for new, total in chunks)
        for head_dim, queries, context in GATHER_FROM
    )


def _gather(pool: Tensor, scales: Tensor | None, blocks: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """A sequence's keys or values: [num_kv_heads, length, head_dim] of dtype."""
    raw = pool.view(torch.uint8)[blocks].view(pool.dtype) if pool.element_size() == 1 else pool[blocks]
    rows = raw.to(dtype) if scales is None else (raw.float() * scales[blocks].unsqueeze(-1)).to(dtype)
    return rows.transpose(0, 1).flatten(1, 2)[:, :length]


def _gather_attention(
    q: Tensor, pool: KvPool, block_tables: Tensor, plan: PrefillPlan, options: AttentionOptions, out: Tensor
) -> Tensor:
    start = 0
    for seq, (query_len, context_len) in enumerate(zip(plan.query_lens, plan.context_lens_host, strict=True)):
        blocks = block_tables[seq, : -(-context_len // BLOCK_SIZE)].long()
        queries = q[start : start + query_len].transpose(0, 1)[None]
        keys = _gather(pool.keys, pool.key_scales, blocks, context_len, q.dtype)[None]
        values = _gather(pool.values, pool.value_scales, blocks, context_len, q.dtype)[None]
        mask: Any = None
        if options.window is not None or options.alibi_slopes is not None:
            positions = torch.arange(context_len - query_len, context_len, device=q.device)
            behind = positions[:, None] - torch.arange(context_len, device=q.device)  # [query_len, context_len]
            mask = (behind >= 0) & (behind < (options.window or context_len))
            if options.alibi_slopes is not None:
                bias = (-options.alibi_slopes[:, None, None] * behind).masked_fill(~mask, -math.inf)
                mask = bias.to(q.dtype)[None]
        elif query_len != context_len:
            # Only here: the import brings torch._dynamo, which takes seconds.
            from torch.nn.attention.bias import causal_lower_right

            mask = causal_lower_right(query_len, context_len)
        attended = torch.nn.functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=mask is None, scale=options.scale, enable_gqa=True
        )
        out[start : start + query_len] = attended[0].transpose(0, 1)
        start += query_len
    return out
