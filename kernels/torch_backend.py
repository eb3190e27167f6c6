"""The ops in plain torch: works wherever torch does, needs no compiler, and serves what faster backends refuse."""

import abc

import torch
import torch.nn.functional as F
from torch import Tensor

from millrace.kernels.arguments import (
    ActivationArgs,
    AttentionArgs,
    AttentionBatch,
    Backend,
    CopyBlocksArgs,
    EmbeddingArgs,
    Float8Args,
    NormArgs,
    PackArgs,
    PackedLinear,
    QuantizedArgs,
    Refusal,
    RopeArgs,
    WriteKvArgs,
)
from millrace.kernels.memory import BLOCK_SIZE
from millrace.kernels.quantized import Float8Weight, QuantizedWeight, widen_into

_WIDEN_ELEMENTS = 1 << 20  # weights widened to float32 at a time: 4 MiB, which stays in the last-level cache


class TorchLinear(PackedLinear):
    """Keeps the given weight tensor itself; where its type is not the activations' it is converted at each call, slice
    by slice."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: torch.dtype = torch.float32) -> None:
        self.weight = weight.contiguous()  # [out, in]
        self.bias = None if bias is None else bias.to(activation)  # [out]
        self.activation = activation
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self.weight_bytes = self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def apply(self, x: Tensor, y: Tensor) -> None:
        if self.dtype == self.activation:
            torch.mm(x, self.weight.t(), out=y)
        else:
            rows = max(1, _WIDEN_ELEMENTS // self.in_features)
            for start in range(0, self.out_features, rows):
                y[:, start : start + rows] = x @ self.weight[start : start + rows].to(self.activation).t()
        if self.bias is not None:
            y += self.bias

    def row_lookup(self, tokens: Tensor) -> Tensor:
        return self.weight.index_select(0, tokens).to(self.activation)


class _TorchWidened(PackedLinear):
    """Widens rows of its matrix at each call, slice by slice."""

    def __init__(self, shape: torch.Size, bias: Tensor | None, activation: torch.dtype) -> None:
        self.activation = activation
        self.out_features, self.in_features = shape
        self._bias = None if bias is None else bias.to(activation)

    @abc.abstractmethod
    def _widened(self, rows: slice | Tensor) -> Tensor:
        """[rows, in_features] of the activations' type."""

    def _count(self, *kept: Tensor | None) -> None:
        self.weight_bytes = sum(tensor.nbytes for tensor in (*kept, self._bias) if tensor is not None)

    def apply(self, x: Tensor, y: Tensor) -> None:
        rows = max(1, _WIDEN_ELEMENTS // self.in_features)
        for start in range(0, self.out_features, rows):
            part = slice(start, start + rows)
            y[:, part] = x @ self._widened(part).t()
        if self._bias is not None:
            y += self._bias

    def row_lookup(self, tokens: Tensor) -> Tensor:
        return self._widened(tokens)


class TorchQuantized(_TorchWidened):
    """Keeps the integers, 4-bit ones two to a byte."""

    dtype = torch.uint8

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, activation: torch.dtype) -> None:
        q = weight.q
        super().__init__(q.shape, bias, activation)
        self._is_paired = weight.bits == 4 and self.in_features % 2 == 0
        self._weight = weight._replace(q=q[:, 0::2] | q[:, 1::2] << 4) if self._is_paired else weight
        self._count(*self._weight[:3], weight.codebook, weight.order)

    def _widened(self, rows: slice | Tensor) -> Tensor:
        part = self._weight.rows(rows)
        if self._is_paired:
            part = part._replace(q=torch.stack((part.q & 15, part.q >> 4), dim=2).flatten(1))
        return part.widen().to(self.activation)


class TorchFloat8(_TorchWidened):
    dtype = torch.float8_e4m3fn

    def __init__(self, weight: Float8Weight, bias: Tensor | None, activation: torch.dtype) -> None:
        super().__init__(weight.codes.shape, bias, activation)
        self._weight = weight
        self._count(weight.codes, weight.scales)

    def _widened(self, rows: slice | Tensor) -> Tensor:
        return self._weight.rows(rows).widen().to(self.activation)


class TorchBackend(Backend):
    name = "torch"

    def pack_quantized(self, args: QuantizedArgs) -> PackedLinear:
        return TorchQuantized(args.weight, args.bias, args.activation)

    def pack_float8(self, args: Float8Args) -> PackedLinear:
        if args.activation == torch.float32:
            return TorchFloat8(args.weight, args.bias, args.activation)
        # On a GPU, which has room for it, widening in every step would cost more than the bytes that it saves.
        wide = torch.empty(args.weight.codes.shape, dtype=args.activation, device=args.weight.codes.device)
        return TorchLinear(widen_into(wide, args.weight), args.bias, args.activation)

    def pack_linear(self, args: PackArgs) -> PackedLinear:
        return TorchLinear(args.weight, args.bias, args.activation)

    def embedding(self, args: EmbeddingArgs) -> Tensor:
        return args.weight.index_select(0, args.tokens).to(args.dtype)

    def rms_norm(self, args: NormArgs) -> Tensor:
        x = _add_residual(args).float()
        return F.rms_norm(x, (x.shape[-1],), args.weight.float(), args.eps).to(args.x.dtype)

    def layer_norm(self, args: NormArgs) -> Tensor:
        x = _add_residual(args).float()
        bias = None if args.bias is None else args.bias.float()
        return F.layer_norm(x, (x.shape[-1],), args.weight.float(), bias, args.eps).to(args.x.dtype)

    def silu_mul(self, args: ActivationArgs) -> Tensor:
        gate, up = args.x.float().chunk(2, dim=-1)
        return F.silu(gate).mul_(up).to(args.x.dtype)

    def gelu_tanh(self, args: ActivationArgs) -> Tensor:
        return F.gelu(args.x, approximate="tanh")

    def rope(self, args: RopeArgs) -> None:
        rows = args.cos_sin.index_select(0, args.positions).unsqueeze(1)  # [num_tokens, 1, rotary_dim]
        cos, sin = rows.chunk(2, dim=-1)
        half = cos.shape[-1]
        for x in (args.q, args.k):
            low, high = x[..., :half].float(), x[..., half : 2 * half].float()
            if x.dtype == torch.float32:
                low = low.clone()
            x[..., :half] = low * cos - high * sin
            x[..., half : 2 * half] = high * cos + low * sin

    def write_kv(self, args: WriteKvArgs) -> None:
        block, offset = args.slot_mapping // BLOCK_SIZE, args.slot_mapping % BLOCK_SIZE
        for half, (x, cache) in enumerate(((args.k, args.k_cache), (args.v, args.v_cache))):
            if args.kv_scales is None:
                cache[block, :, offset] = x.to(cache.dtype)
                continue
            elements, scales = _to_8_bits(x.float(), cache.dtype)
            cache.view(torch.uint8)[block, :, offset] = elements.view(torch.uint8)
            args.kv_scales[half][block, :, offset] = scales

    def paged_attention(self, args: AttentionArgs) -> Tensor | Refusal:
        if args.batch.num_tokens == 0:
            return torch.empty_like(args.q)
        if args.batch.max_query_len == 1 and args.batch.num_tokens == args.batch.num_seqs:
            return _decode_attention(args)
        return _ragged_attention(args)

    def copy_blocks(self, args: CopyBlocksArgs) -> None:
        pool = args.kv_storage
        for part in (pool,) if args.kv_scales is None else (pool.view(torch.uint8), args.kv_scales):
            part[:, :, args.target] = part[:, :, args.source]


def _add_residual(args: NormArgs) -> Tensor:
    return args.x if args.residual is None else args.residual.add_(args.x)


def _to_8_bits(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Heads [..., head_dim] float32 as elements of int8 or float8_e4m3fn, and their scales [...].

    The scale takes the largest magnitude to the largest element. A NaN or an infinity makes it a NaN, and so the head.
    """
    limit = 127.0 if dtype == torch.int8 else 448.0
    largest = x.abs().amax(-1)
    inverse = torch.where(largest > 1e-30, limit / largest, 0.0)  # below, all is 0: no infinite factor
    scaled = (x * inverse[..., None]).nan_to_num(0.0)
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), largest / limit + largest * 0.0


def _gather(args: AttentionArgs, half: int, blocks: Tensor) -> Tensor:
    """Blocks of keys (half 0) or values (1), [*blocks.shape, num_kv_heads, BLOCK_SIZE, head_dim]; of 8 bits they come
    as float32, else as they are."""
    cache = args.v_cache if half else args.k_cache
    if args.kv_scales is None:
        return cache[blocks]
    elements = cache.view(torch.uint8)[blocks].view(cache.dtype)  # torch indexes no float8
    return elements.float() * args.kv_scales[half][blocks][..., None]


class _DecodePlan:
    """Which blocks a decode step gathers, and which of the gathered slots count.

    Only blocks inside the window are gathered; the start is each sequence's own.
    """

    def __init__(self, batch: AttentionBatch, window: int | None) -> None:
        ends = batch.context_lens.long()  # [num_seqs]
        starts = torch.zeros_like(ends) if window is None else (ends - window).clamp_min(0)
        first = starts // BLOCK_SIZE
        width = int(((ends + BLOCK_SIZE - 1) // BLOCK_SIZE - first).max())
        columns = first[:, None] + torch.arange(width, device=ends.device)
        self.blocks = batch.block_tables.long().gather(1, columns.clamp_max(batch.block_tables.shape[1] - 1))
        slots = first[:, None] * BLOCK_SIZE + torch.arange(width * BLOCK_SIZE, device=ends.device)
        self.unseen = (slots < starts[:, None]) | (slots >= ends[:, None])  # [num_seqs, width * BLOCK_SIZE]


def _decode_attention(args: AttentionArgs) -> Tensor:
    """One query a sequence: all sequences in one batched product, query heads grouped by the kv head they share."""
    num_seqs, num_heads, head_dim = args.q.shape
    num_kv_heads = args.k_cache.shape[1]
    plan = args.batch.plan(("torch decode", args.window), lambda: _DecodePlan(args.batch, args.window))
    shape = (num_seqs, num_kv_heads, plan.unseen.shape[1], head_dim)
    # Slots that nobody wrote may hold NaN, and 0 * NaN is NaN: values are zeroed, scores are replaced.
    k = _gather(args, 0, plan.blocks).transpose(1, 2).reshape(shape).float()
    v = _gather(args, 1, plan.blocks).transpose(1, 2).reshape(shape).float()
    v = v.masked_fill_(plan.unseen[:, None, :, None], 0.0)
    q = (args.q.float() * args.scale).view(num_seqs, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = (q @ k.transpose(2, 3)).masked_fill_(plan.unseen[:, None, None, :], -torch.inf)
    return (scores.softmax(-1) @ v).view(num_seqs, num_heads, head_dim).to(args.q.dtype)


def _ragged_attention(args: AttentionArgs) -> Tensor:
    """Any query lengths, one sequence after the other."""
    _, num_heads, head_dim = args.q.shape
    num_kv_heads = args.k_cache.shape[1]
    group = num_heads // num_kv_heads
    out = torch.empty_like(args.q)
    batch = args.batch
    bounds = batch.query_starts.tolist() if batch.bounds is None else batch.bounds
    for seq, context_len in enumerate(batch.context_lens.tolist() if batch.contexts is None else batch.contexts):
        begin, end = bounds[seq], bounds[seq + 1]
        query_len = end - begin
        if query_len == 0:
            continue
        first_query = context_len - query_len
        first_key = 0 if args.window is None else max(0, first_query - args.window + 1)
        first_block = first_key // BLOCK_SIZE
        blocks = batch.block_tables[seq, first_block : (context_len + BLOCK_SIZE - 1) // BLOCK_SIZE].long()
        base = first_block * BLOCK_SIZE
        keys = slice(first_key - base, context_len - base)
        k, v = (
            _gather(args, half, blocks).transpose(0, 1).reshape(num_kv_heads, -1, head_dim)[:, keys].to(args.q.dtype)
            for half in (0, 1)
        )
        query = torch.arange(first_query, context_len, device=k.device)[:, None]
        key = torch.arange(first_key, context_len, device=k.device)[None, :]
        seen = key <= query if args.window is None else (key <= query) & (key > query - args.window)
        # Query heads that share a kv head become rows of one product, so that keys are not repeated.
        q = args.q[begin:end].view(query_len, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
        q = q.reshape(1, num_kv_heads, group * query_len, head_dim)
        mask = seen.repeat(group, 1)  # [group * query_len, keys]
        y = F.scaled_dot_product_attention(q, k[None], v[None], attn_mask=mask, scale=args.scale)
        y = y.view(num_kv_heads, group, query_len, head_dim).permute(2, 0, 1, 3)
        out[begin:end] = y.reshape(query_len, num_heads, head_dim)
    return out
