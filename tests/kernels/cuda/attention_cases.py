"""Attention cases for the host shim: a pool in which every slot that no context uses holds NaN, and the comparison."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from millrace.kernels.cuda_attention import (
    AttentionOptions,
    DecodeShape,
    DecodeWorkspace,
    KvPool,
    decode_attention,
    decode_workspace,
    plan_decode,
    plan_prefill,
    prefill_attention,
)
from millrace.kernels.reference_cuda_attention import paged_attention
from shim.fence import fenced, nan_filled
from shim.launcher import ShimLauncher

BF16, F16, FP8, INT8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8
FAR = 10**9  # an entry of a block table that must not be read


class Spec(NamedTuple):
    """Heads, dtypes and options of a case; `slopes` switches ALiBi on."""

    group: int = 4
    num_kv_heads: int = 1
    head_dim: int = 64
    dtype: torch.dtype = BF16
    kv_dtype: torch.dtype = BF16
    window: int | None = None
    soft_cap: float | None = None
    slopes: bool = False
    num_queries: int = 1

    @property
    def num_heads(self) -> int:
        return self.group * self.num_kv_heads

    def options(self) -> AttentionOptions:
        slopes = fenced(torch.rand(self.num_heads) / 4) if self.slopes else None
        return AttentionOptions(self.head_dim**-0.5, self.window, self.soft_cap, slopes)

    def shape(self, max_seqs: int, max_context_len: int, batch_invariant: bool = False) -> DecodeShape:
        return DecodeShape(
            max_seqs,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            max_context_len,
            self.dtype,
            self.kv_dtype,
            self.num_queries,
            (self.window,),
            batch_invariant,
        )


class Sequences(NamedTuple):
    pool: KvPool
    block_tables: Tensor
    context_lens: Tensor


def make_sequences(spec: Spec, context_lens: Sequence[int], query_lens: Sequence[int] | None = None) -> Sequences:
    """Random keys and values in shuffled blocks.

    Unused slots, the null block included, hold NaN or scales of NaN. Given query_lens, so do those before the first
    query's window, and the entries of their pages in the tables are not valid.
    """
    pages = [-(-length // 16) for length in context_lens]
    num_blocks = sum(pages) + 3
    order = (torch.randperm(num_blocks - 1) + 1).int()
    tables = torch.full((len(pages), max(*pages, 1)), FAR, dtype=torch.int32)
    used = torch.zeros(num_blocks, 16, dtype=torch.bool)
    start = 0
    for seq, (length, count) in enumerate(zip(context_lens, pages, strict=True)):
        blocks = order[start : start + count]
        tables[seq, :count] = blocks
        for page, block in enumerate(blocks.tolist()):
            used[block, : length - 16 * page] = True
        if query_lens is not None and spec.window is not None:
            first_key = max(0, length - query_lens[seq] + 1 - spec.window)
            for position in range(min(first_key, length)):
                used[tables[seq, position // 16], position % 16] = False
            tables[seq, : first_key // 16] = FAR
        start += count
    unused = ~used[:, None, :].expand(-1, spec.num_kv_heads, -1)
    tensors = []
    for _ in range(2):
        x = torch.randn(num_blocks, spec.num_kv_heads, 16, spec.head_dim)
        if spec.kv_dtype == spec.dtype:
            tensors.append((fenced(x.masked_fill(unused[..., None], math.nan).to(spec.dtype)), None))
            continue
        x = x * torch.rand(num_blocks, spec.num_kv_heads, 16, 1)  # rows of unlike size, so that scales differ
        scales = x.abs().amax(-1) / (127 if spec.kv_dtype == INT8 else 448)
        rows = x / scales[..., None]
        rows = rows.round().to(INT8) if spec.kv_dtype == INT8 else rows.masked_fill(unused[..., None], math.nan).to(FP8)
        tensors.append((fenced(rows), fenced(scales.masked_fill(unused, math.nan))))
    (keys, key_scales), (values, value_scales) = tensors
    lens = fenced(torch.tensor(context_lens, dtype=torch.int32))
    return Sequences(KvPool(keys, values, key_scales, value_scales), fenced(tables), lens)


def make_workspace(
    launcher: ShimLauncher, spec: Spec, max_seqs: int, max_context_len: int, **options: Any
) -> DecodeWorkspace:
    """A workspace whose partial results are NaN before the first launch."""
    workspace = decode_workspace(spec.shape(max_seqs, max_context_len, **options), launcher, "cpu")
    return dataclasses.replace(
        workspace,
        tables={window: fenced(table) for window, table in workspace.tables.items()},
        partial_out=nan_filled(*workspace.partial_out.shape, dtype=torch.float32),
        partial_lse=nan_filled(*workspace.partial_lse.shape, dtype=torch.float32),
        counters=fenced(workspace.counters),
    )


def compare(out: Tensor, lse: Tensor | None, reference: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    """Errors of an output's rounding and of weights rounded to dtype: about 2^-9 (bf16) and 2^-12 (f16) of the size."""
    want, want_lse = reference
    unit = 2**-8 if dtype == BF16 else 2**-11
    assert bool(out.isfinite().all()), "an output that is not finite"
    torch.testing.assert_close(out.double(), want, rtol=4 * unit, atol=2 * unit * float(want.abs().max()))
    assert float((out.double() - want).norm()) <= unit * float(want.norm())
    if lse is not None:
        torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)


def check_decode(
    launcher: ShimLauncher,
    spec: Spec,
    context_lens: Sequence[int],
    *,
    workspace: DecodeWorkspace | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """One decode step against the reference; returns the output."""
    num_seqs, longest = len(context_lens), max(*context_lens, 16)
    if workspace is None:
        workspace = make_workspace(launcher, spec, num_seqs, longest, batch_invariant=batch_invariant)
    sequences = make_sequences(spec, context_lens, [spec.num_queries] * num_seqs)
    options = spec.options()
    q = fenced(torch.randn(num_seqs * spec.num_queries, spec.num_heads, spec.head_dim).to(spec.dtype))
    out = nan_filled(*q.shape, dtype=spec.dtype)
    lse = nan_filled(*q.shape[:2], dtype=torch.float32)
    plan_decode(launcher, sequences.context_lens, workspace, stream=0)
    decode_attention(
        launcher, q, sequences.pool, sequences.block_tables, sequences.context_lens, workspace, options,
        out=out, lse=lse, stream=0,
    )  # fmt: skip
    query_lens = [spec.num_queries] * num_seqs
    want = paged_attention(q, sequences.pool, sequences.block_tables, query_lens, list(context_lens), options)
    compare(out, lse, want, spec.dtype)
    assert not workspace.counters.any(), "a counter was not re-armed"
    return out


def check_prefill(
    launcher: ShimLauncher,
    spec: Spec,
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    route: Any = "kernel",
) -> Tensor:
    """One prefill step against the reference; returns the output."""
    sequences = make_sequences(spec, context_lens, query_lens if route == "kernel" else None)
    options = spec.options()
    q = fenced(torch.randn(sum(query_lens), spec.num_heads, spec.head_dim).to(spec.dtype))
    out = nan_filled(*q.shape, dtype=spec.dtype)
    lse = nan_filled(*q.shape[:2], dtype=torch.float32) if route == "kernel" else None
    plan = plan_prefill(
        launcher, query_lens, context_lens,
        num_heads=spec.num_heads, num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim, device="cpu",
    )  # fmt: skip
    prefill_attention(
        launcher, q, sequences.pool, sequences.block_tables, plan, options, out=out, lse=lse, route=route, stream=0
    )
    want = paged_attention(q, sequences.pool, sequences.block_tables, list(query_lens), list(context_lens), options)
    compare(out, lse, want, spec.dtype)
    return out
