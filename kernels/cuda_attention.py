"""Paged attention on CUDA: fronts of kernels/cuda/attention_{plan,decode,prefill}.cu, explained in attention.cuh.

Decode: make a `DecodeWorkspace` once, call `plan_decode` once per step and `decode_attention` once per layer. They
depend on the lengths through device memory alone, so a captured CUDA graph serves any lengths. Prefill: `plan_prefill`
once per step from the lengths on the host, `prefill_attention` once per layer.

Query tokens are the last of their contexts, whose keys and values are in the pool already. Fronts raise ValueError,
with the shapes, for a wrong size, dtype, device, alignment or layout. They launch on the raw `stream` and do not wait.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from millrace.kernels.arguments import describe
from millrace.kernels.cuda_attention_common import (
    HEAD_DIMS,
    KV_TYPES,
    MAX_QUERY_ROWS,
    POINTERS,
    TYPES,
    AttentionOptions,
    KvPool,
    Variant,
    check,
    check_heads,
    check_pool,
    check_rest,
    check_window,
    macros,
    pack,
    padded_row,
    pointer,
    pool_pointers,
    type_names,
)
from millrace.kernels.cuda_attention_prefill import PrefillPlan, plan_prefill, prefill_attention, prefill_variants
from millrace.kernels.cuda_compile import Kernel
from millrace.kernels.cuda_launch import Launcher
from millrace.kernels.memory import BLOCK_SIZE

__all__ = [
    "HEAD_DIMS",
    "MAX_QUERY_ROWS",
    "AttentionOptions",
    "DecodeShape",
    "DecodeWorkspace",
    "KvPool",
    "PrefillPlan",
    "decode_attention",
    "decode_workspace",
    "decode_workspace_bytes",
    "kernels",
    "plan_decode",
    "plan_prefill",
    "prefill_attention",
]

# To be measured on each new kind of device; the kernels are right for any values.
MIN_SPLIT_PAGES = 8  # 128 tokens: below, a CTA's start costs more than its share of the keys
MAX_SPLITS = 128  # per sequence; one CTA combines them. Below 2**15
INVARIANT_SPLIT_PAGES = 32  # 512 tokens, the length of a split in batch-invariant mode,
INVARIANT_MAX_SPLITS = 16  # unless that makes more splits than this


def _decode_variant(dtype: str, kv: str, head_dim: int, rows: int) -> Variant:
    quantised = kv != dtype
    row_bytes = head_dim * (1 if quantised else 2)
    stage = 2 * BLOCK_SIZE * padded_row(row_bytes) + (2 * BLOCK_SIZE * 4 if quantised else 0)
    warps = 2 if row_bytes > 256 else 4
    stages = 3 if row_bytes <= 160 else 2
    query = head_dim // 16 * 32 * 16 if head_dim * rows // 8 > 256 else 0
    shared = query + max(warps * stages * stage, warps * rows * (head_dim + 6) * 4)
    ctas = 2 if head_dim > 128 else 3 if head_dim * rows // 8 > 80 else 4
    budget = {2: 255, 3: 168, 4: 128}[ctas]
    defines = {"MR_T": dtype, "MR_KV": kv, "MR_HEAD_DIM": head_dim, "MR_ROWS": rows, "MR_SHARED_BYTES": shared}
    kernel = Kernel("attention_decode.cu", "mr_attention_decode", macros(defines), budget)
    return Variant(kernel, 32 * warps, shared)


_PLAN = Kernel("attention_plan.cu", "mr_plan_decode", (), 48)


def kernels() -> Iterator[Kernel]:
    """Every variant that the attention fronts launch."""
    yield _PLAN
    for dtype in TYPES.values():
        for kv in (dtype, *KV_TYPES.values()):
            for head_dim in HEAD_DIMS:
                for rows in (8, 16):
                    yield _decode_variant(dtype, kv, head_dim, rows).kernel
                yield from (variant.kernel for variant in prefill_variants(dtype, kv, head_dim))


@dataclass(frozen=True)
class DecodeShape:
    """What a decode workspace is made for.

    Attributes:
        max_seqs: rows of the largest batch.
        max_context_len: tokens of the longest context, this step's included.
        num_queries: query tokens per sequence, the last of its context; num_queries * group is at most 16.
        windows: the distinct `AttentionOptions.window` of the layers.
        batch_invariant: splits depend on their sequence's length alone, so that its result, bit for bit, does not
            depend on the batch; costs speed where few long sequences would be split further.
    """

    max_seqs: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context_len: int
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype = torch.bfloat16
    num_queries: int = 1
    windows: tuple[int | None, ...] = (None,)
    batch_invariant: bool = False


@dataclass(frozen=True)
class DecodeWorkspace:
    """Memory and split rule of decode attention; all layers of a step may share it, two steps at once may not.

    Attributes:
        target_items: work items that fill the device.
        capacity: items that can ever be needed.
        tables: by window, [1 + capacity, 4] int32, filled by `plan_decode`.
        partial_out: [capacity, num_kv_heads, num_queries * group, head_dim] float32.
        partial_lse: the same without head_dim.
        counters: [max_seqs, num_kv_heads] int32; the kernel leaves zeros behind.
    """

    shape: DecodeShape
    target_items: int
    capacity: int
    tables: Mapping[int | None, Tensor]
    partial_out: Tensor
    partial_lse: Tensor
    counters: Tensor


def _variant_of(shape: DecodeShape) -> Variant:
    rows = shape.num_heads // shape.num_kv_heads * shape.num_queries
    names = type_names("decode_attention", shape.dtype, shape.kv_dtype)
    return _decode_variant(*names, shape.head_dim, 8 if rows <= 8 else 16)


def _items(shape: DecodeShape, launcher: Launcher) -> tuple[int, int]:
    """Target and capacity of the work table."""
    op = "decode_workspace"
    check_heads(op, shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.num_queries)
    if shape.max_seqs < 1 or shape.max_context_len < 1:
        raise ValueError(
            f"{op}: max_seqs {shape.max_seqs} and max_context_len {shape.max_context_len} must be positive"
        )
    for window in shape.windows:
        check_window(op, window)
    pages = -(-shape.max_context_len // BLOCK_SIZE)
    target = max(1, _variant_of(shape).ctas_per_sm(launcher) * launcher.sm_count // shape.num_kv_heads)
    if shape.batch_invariant:
        return target, shape.max_seqs * min(INVARIANT_MAX_SPLITS, -(-pages // INVARIANT_SPLIT_PAGES))
    # A sequence of p pages gets ceil(p / split) splits, and the split is chosen so that sum(p / split) <= target.
    return target, min(shape.max_seqs + target, shape.max_seqs * min(MAX_SPLITS, -(-pages // MIN_SPLIT_PAGES)))


def decode_workspace_bytes(shape: DecodeShape, launcher: Launcher) -> int:
    """Device memory of a workspace, for the memory plan."""
    _, capacity = _items(shape, launcher)
    tables = len(set(shape.windows)) * (1 + capacity) * 16
    partial = capacity * shape.num_heads * shape.num_queries * (shape.head_dim + 1) * 4
    return tables + partial + shape.max_seqs * shape.num_kv_heads * 4


def decode_workspace(shape: DecodeShape, launcher: Launcher, device: torch.device | str) -> DecodeWorkspace:
    """Allocates the memory of decode attention (`decode_workspace_bytes`), whatever the batch up to max_seqs."""
    target, capacity = _items(shape, launcher)
    rows = shape.num_heads // shape.num_kv_heads * shape.num_queries
    partial_shape = (capacity, shape.num_kv_heads, rows)
    tables = {w: torch.zeros(1 + capacity, 4, dtype=torch.int32, device=device) for w in shape.windows}
    partial_out = torch.empty(*partial_shape, shape.head_dim, dtype=torch.float32, device=device)
    partial_lse = torch.empty(*partial_shape, dtype=torch.float32, device=device)
    counters = torch.zeros(shape.max_seqs, shape.num_kv_heads, dtype=torch.int32, device=device)
    return DecodeWorkspace(shape, target, capacity, tables, partial_out, partial_lse, counters)


_PLAN_PARAMS = np.dtype(
    [("context_lens", "u8"), ("table", "u8")]
    + [(name, "i4") for name in ("num_seqs", "capacity", "num_queries", "window", "target_items")]
    + [(name, "i4") for name in ("min_split_pages", "max_splits", "fixed_split_pages")],
    align=True,
)


def plan_decode(launcher: Launcher, context_lens: Tensor, workspace: DecodeWorkspace, *, stream: int) -> None:
    """Fills the workspace's tables for a step: one small launch per distinct window.

    Args:
        context_lens: [num_seqs] int32 on the device, this step's tokens included; 0 for a padded row.
    """
    op, shape = "plan_decode", workspace.shape
    check(op, "context_lens", context_lens, ("num_seqs",), (torch.int32,), launcher, align=4)
    num_seqs = context_lens.shape[0]
    if not 0 < num_seqs <= shape.max_seqs:
        raise ValueError(f"{op}: {num_seqs} sequences, but the workspace is for 1 to {shape.max_seqs}")
    invariant = shape.batch_invariant
    for window, table in workspace.tables.items():
        check(op, "table", table, (1 + workspace.capacity, 4), (torch.int32,), launcher)
        params = pack(
            _PLAN_PARAMS,
            context_lens=context_lens.data_ptr(),
            table=table.data_ptr(),
            num_seqs=num_seqs,
            capacity=workspace.capacity,
            num_queries=shape.num_queries,
            window=window or 0,
            target_items=workspace.target_items,
            min_split_pages=MIN_SPLIT_PAGES,
            max_splits=INVARIANT_MAX_SPLITS if invariant else MAX_SPLITS,
            fixed_split_pages=INVARIANT_SPLIT_PAGES if invariant else 0,
        )
        launcher.launch(_PLAN, (1, 1, 1), 256, params, stream=stream)


_DECODE_PARAMS = np.dtype(
    [(name, "u8") for name in (*POINTERS, "context_lens", "table", "alibi_slopes", "partial_out", "partial_lse")]
    + [(name, "u8") for name in ("counters", "out", "lse")]
    + [(name, "i4") for name in ("max_blocks", "group", "num_queries", "window")]
    + [("score_factor", "f4"), ("soft_cap", "f4")],
    align=True,
)


def decode_attention(
    launcher: Launcher,
    q: Tensor,
    pool: KvPool,
    block_tables: Tensor,
    context_lens: Tensor,
    workspace: DecodeWorkspace,
    options: AttentionOptions,
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    stream: int,
) -> Tensor:
    """Attention of num_queries tokens per sequence; `plan_decode` ran before with these context_lens.

    Args:
        q: [num_seqs * num_queries, num_heads, head_dim] bfloat16 or float16.
        block_tables: [num_seqs, max_blocks] int32; what lies past a context is not read.
        context_lens: [num_seqs] int32; where it is 0, zeros are written.
        out: as q; allocated if None.
        lse: [num_seqs * num_queries, num_heads] float32 for the log-sum-exp of the scores, natural, -inf without keys.

    Returns:
        out.
    """
    op, shape = "decode_attention", workspace.shape
    num_seqs = context_lens.shape[0] if context_lens.dim() == 1 else 0
    if not 0 < num_seqs <= shape.max_seqs:
        raise ValueError(
            f"{op}: context_lens is {describe(context_lens)}, but the workspace is for [1 to {shape.max_seqs}]"
        )
    if (q.dtype, pool.keys.dtype) != (shape.dtype, shape.kv_dtype):
        raise ValueError(
            f"{op}: queries are {q.dtype} over a pool of {pool.keys.dtype}, but the workspace is for {shape.dtype} over"
            f" {shape.kv_dtype}"
        )
    if options.window not in workspace.tables:
        raise ValueError(f"{op}: window is {options.window}, but the workspace is for {list(workspace.tables)}")
    num_tokens = num_seqs * shape.num_queries
    check(op, "q", q, (num_tokens, shape.num_heads, shape.head_dim), (shape.dtype,), launcher)
    check_pool(op, pool, shape.num_kv_heads, shape.head_dim, shape.dtype, launcher)
    check(op, "context_lens", context_lens, (num_seqs,), (torch.int32,), launcher, align=4)
    check(op, "block_tables", block_tables, (num_seqs, "max_blocks"), (torch.int32,), launcher, align=4)
    max_blocks = block_tables.shape[1]
    if max_blocks * BLOCK_SIZE >= shape.max_context_len + BLOCK_SIZE:
        raise ValueError(
            f"{op}: block_tables has {max_blocks} blocks a sequence, but the workspace is for contexts of"
            f" {shape.max_context_len} tokens"
        )
    out, scoring = check_rest(op, q, options, out, lse, launcher)
    variant = _variant_of(shape)
    slots = num_seqs * INVARIANT_MAX_SPLITS if shape.batch_invariant else num_seqs + workspace.target_items
    slots = min(
        slots, workspace.capacity, num_seqs + 2 * workspace.target_items, 65535
    )  # items past it: a second round
    params = pack(
        _DECODE_PARAMS,
        q=q.data_ptr(),
        **pool_pointers(pool),
        block_tables=block_tables.data_ptr(),
        context_lens=context_lens.data_ptr(),
        table=workspace.tables[options.window].data_ptr(),
        partial_out=workspace.partial_out.data_ptr(),
        partial_lse=workspace.partial_lse.data_ptr(),
        counters=workspace.counters.data_ptr(),
        out=out.data_ptr(),
        lse=pointer(lse),
        max_blocks=max_blocks,
        group=shape.num_heads // shape.num_kv_heads,
        num_queries=shape.num_queries,
        **scoring,
    )
    grid = (shape.num_kv_heads, slots, 1)
    launcher.launch(variant.kernel, grid, variant.threads, params, shared_bytes=variant.shared_bytes, stream=stream)
    return out
