"""The ops that models are written in. Each front checks its arguments and asks the backends in order of preference.

Activations are contiguous and of one type throughout a model: float32 on the CPU, bfloat16 or float16 on a GPU. Weights
are of any of the three, sums are float32. A backend that cannot serve refuses with a reason; if all refuse,
`UnservedError` lists every reason. All fronts raise ValueError, with the shapes, for a wrong rank, dtype, size, device
or layout: kernels compute addresses from shapes alone.

`backends` (last argument of each front) replaces the default list, which `default_backends()` gives.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from millrace.kernels.arguments import (
    ActivationArgs,
    AttentionArgs,
    AttentionBatch,
    CopyBlocksArgs,
    DecoderArgs,
    DecoderLayerArgs,
    EmbeddingArgs,
    NormArgs,
    NormWeights,
    PackedDecoder,
    PackedLinear,
    Refusal,
    RopeArgs,
    RopeKvArgs,
    WriteKvArgs,
)
from millrace.kernels.checks import ACTIVATION, FLOAT, INT, KV_8_BIT, LONG, WEIGHT, check, refuse
from millrace.kernels.cpu_library import prepare
from millrace.kernels.dispatch import Backends, UnservedError, default_backends, serve
from millrace.kernels.memory import BLOCK_SIZE
from millrace.kernels.pack import pack_decoder, pack_float8, pack_linear, pack_quantized
from millrace.kernels.quantized import Float8Weight, QuantizedWeight

__all__ = [
    "BLOCK_SIZE",
    "AttentionBatch",
    "Backends",
    "DecoderArgs",
    "DecoderLayerArgs",
    "Float8Weight",
    "NormWeights",
    "PackedDecoder",
    "PackedLinear",
    "QuantizedWeight",
    "UnservedError",
    "add_layer_norm",
    "add_rms_norm",
    "attention_batch",
    "copy_blocks",
    "default_backends",
    "embedding",
    "gelu_tanh",
    "layer_norm",
    "pack_decoder",
    "pack_float8",
    "pack_linear",
    "pack_quantized",
    "paged_attention",
    "prepare",
    "rms_norm",
    "rope_",
    "rope_kv",
    "silu_mul",
    "write_kv",
]


def embedding(
    tokens: Tensor, weight: Tensor, *, dtype: torch.dtype = torch.float32, backends: Backends = None
) -> Tensor:
    """Rows of a table: tokens [num_tokens] int64, weight [vocab, hidden] -> [num_tokens, hidden] of type `dtype`."""
    check("embedding", "tokens", tokens, ("num_tokens",), LONG)
    check("embedding", "weight", weight, ("vocab", "hidden"), WEIGHT)
    y: Tensor = serve("embedding", EmbeddingArgs(tokens, weight, dtype), backends)
    return y


def _check_norm(op: str, args: NormArgs) -> None:
    x = args.x
    if x.dim() < 1 or x.dtype not in ACTIVATION or not x.is_contiguous():
        raise refuse(op, "x", x, "contiguous float32, bfloat16 or float16 [..., hidden]")
    check(op, "weight", args.weight, (x.shape[-1],), WEIGHT)
    if args.bias is not None:
        check(op, "bias", args.bias, (x.shape[-1],), WEIGHT)
    if args.residual is not None:
        check(op, "residual", args.residual, tuple(x.shape), (x.dtype,))


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, backends: Backends = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich 2019); x [..., hidden]."""
    args = NormArgs(x, weight, eps)
    _check_norm("rms_norm", args)
    y: Tensor = serve("rms_norm", args, backends)
    return y


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, backends: Backends = None
) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual); the sum is written in place into `residual`, which is returned."""
    args = NormArgs(x, weight, eps, residual=residual)
    _check_norm("add_rms_norm", args)
    return serve("rms_norm", args, backends), residual


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, backends: Backends = None) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension (Ba et al. 2016); x [..., hidden]."""
    args = NormArgs(x, weight, eps, bias=bias)
    _check_norm("layer_norm", args)
    y: Tensor = serve("layer_norm", args, backends)
    return y


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, backends: Backends = None
) -> tuple[Tensor, Tensor]:
    """(layer_norm(x + residual), x + residual); the sum is written in place into `residual`, which is returned."""
    args = NormArgs(x, weight, eps, bias=bias, residual=residual)
    _check_norm("add_layer_norm", args)
    return serve("layer_norm", args, backends), residual


def silu_mul(gate_up: Tensor, *, backends: Backends = None) -> Tensor:
    """silu(gate) * up (Shazeer 2020): gate_up [num_tokens, 2 * width], gate first -> [num_tokens, width]."""
    check("silu_mul", "gate_up", gate_up, ("num_tokens", "2 * width"), ACTIVATION)
    if gate_up.shape[1] % 2:
        raise refuse("silu_mul", "gate_up", gate_up, "of an even width: gate, then up")
    y: Tensor = serve("silu_mul", ActivationArgs(gate_up), backends)
    return y


def gelu_tanh(x: Tensor, *, backends: Backends = None) -> Tensor:
    """x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))) elementwise (Hendrycks & Gimpel 2016)."""
    if x.dtype not in ACTIVATION or not x.is_contiguous():
        raise refuse("gelu_tanh", "x", x, "contiguous float32, bfloat16 or float16")
    y: Tensor = serve("gelu_tanh", ActivationArgs(x), backends)
    return y


def rope_(q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor, *, backends: Backends = None) -> None:
    """Rotates the first rotary_dim dimensions of every head in place (Su et al. 2021), halves paired as in NeoX.

    q [num_tokens, num_heads, head_dim], k [num_tokens, num_kv_heads, head_dim], cos_sin [max_positions, rotary_dim]
    with the cosines in the first half of the columns, positions [num_tokens] int64 below max_positions.
    """
    check("rope_", "q", q, ("num_tokens", "num_heads", "head_dim"), ACTIVATION)
    check("rope_", "k", k, (q.shape[0], "num_kv_heads", q.shape[2]), (q.dtype,))
    check("rope_", "cos_sin", cos_sin, ("max_positions", "rotary_dim"), FLOAT)
    check("rope_", "positions", positions, (q.shape[0],), LONG)
    _check_rotary_dim("rope_", cos_sin, q.shape[2])
    serve("rope", RopeArgs(q, k, cos_sin, positions), backends)


def _check_rotary_dim(op: str, cos_sin: Tensor, head_dim: int) -> None:
    if cos_sin.shape[1] % 2 or cos_sin.shape[1] > head_dim:
        raise refuse(op, "cos_sin", cos_sin, f"of an even rotary_dim up to head_dim {head_dim}")


def _kv_dtypes(activation: torch.dtype, kv_scales: Tensor | None) -> tuple[torch.dtype, ...]:
    """What a pool may be of: the activations' dtype, bfloat16 beside float32, or 8 bits with scales."""
    if kv_scales is not None:
        return KV_8_BIT
    return (torch.float32, torch.bfloat16) if activation == torch.float32 else (activation,)


def _check_cache(
    op: str,
    k_cache: Tensor,
    v_cache: Tensor,
    num_kv_heads: int | str,
    head_dim: int | str,
    dtype: torch.dtype,
    kv_scales: Tensor | None = None,
) -> None:
    """The pool of one layer."""
    shape = ("num_blocks", num_kv_heads, BLOCK_SIZE, head_dim)
    check(op, "k_cache", k_cache, shape, _kv_dtypes(dtype, kv_scales))
    check(op, "v_cache", v_cache, tuple(k_cache.shape), (k_cache.dtype,))
    if kv_scales is not None:
        check(op, "kv_scales", kv_scales, (2, *k_cache.shape[:3]), FLOAT)


def write_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    kv_scales: Tensor | None = None,
    backends: Backends = None,
) -> None:
    """Puts keys and values [num_tokens, num_kv_heads, head_dim] into the slots of the pool of one layer.

    slot_mapping [num_tokens] int64 is block * BLOCK_SIZE + offset; no slot may occur twice. kv_scales, as for rope_kv,
    is written along with a pool of 8 bits.
    """
    check("write_kv", "k", k, ("num_tokens", "num_kv_heads", "head_dim"), ACTIVATION)
    check("write_kv", "v", v, tuple(k.shape), (k.dtype,))
    _check_cache("write_kv", k_cache, v_cache, k.shape[1], k.shape[2], k.dtype, kv_scales)
    check("write_kv", "slot_mapping", slot_mapping, (k.shape[0],), LONG)
    serve("write_kv", WriteKvArgs(k, v, k_cache, v_cache, slot_mapping, kv_scales), backends)


def rope_kv(
    qkv: Tensor,
    num_heads: int,
    kv_cache: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    *,
    cos_sin: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    kv_scales: Tensor | None = None,
    backends: Backends = None,
) -> Tensor:
    """Norms queries and keys, turns them by their positions, and puts keys and values into the pool: all that stands
    between the product of a layer's queries, keys and values and its attention, in one pass over them.

    Where no backend has it in one piece, it is composed of rms_norm, rope_ and write_kv.

    Args:
        qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], queries first, then keys, then values; its
            contents may be changed.
        kv_cache: [2, num_blocks, num_kv_heads, BLOCK_SIZE, head_dim] of one layer, keys first.
        positions, slot_mapping: [num_tokens] int64, as for rope_ and write_kv.
        cos_sin: [max_positions, rotary_dim] float32; None turns nothing.
        q_norm, k_norm: [head_dim], scales of an RMS norm over each head before the rotation; both or neither.
        kv_scales: [2, num_blocks, num_kv_heads, BLOCK_SIZE] float32 for a pool of float8_e4m3fn or int8: element times
            scale is the value, and the largest magnitude of a head is 448 or 127 times its scale.

    Returns:
        Queries [num_tokens, num_heads, head_dim]; they may be a view into `qkv`.
    """
    op = "rope_kv"
    kv_shape = (2, "num_blocks", "num_kv_heads", BLOCK_SIZE, "head_dim")
    check(op, "kv_cache", kv_cache, kv_shape, _kv_dtypes(qkv.dtype, kv_scales))
    if kv_scales is not None:
        check(op, "kv_scales", kv_scales, tuple(kv_cache.shape[:-1]), FLOAT)
    kv_heads, head_dim = kv_cache.shape[2], kv_cache.shape[4]
    check(op, "qkv", qkv, ("num_tokens", (num_heads + 2 * kv_heads) * head_dim), ACTIVATION)
    check(op, "positions", positions, (qkv.shape[0],), LONG)
    check(op, "slot_mapping", slot_mapping, (qkv.shape[0],), LONG)
    if cos_sin is not None:
        check(op, "cos_sin", cos_sin, ("max_positions", "rotary_dim"), FLOAT)
        _check_rotary_dim(op, cos_sin, head_dim)
    if (q_norm is None) != (k_norm is None):
        raise ValueError(f"{op}: q_norm and k_norm must be given both or neither")
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None:
            check(op, name, norm, (head_dim,), WEIGHT)
    args = RopeKvArgs(qkv, num_heads, kv_cache, positions, slot_mapping, cos_sin, q_norm, k_norm, eps, kv_scales)
    for backend in default_backends() if backends is None else backends:
        y = backend.rope_kv(args)
        if not isinstance(y, Refusal):
            return y
    # Kernels address by shape alone, so the three parts are copied out of the fused rows.
    widths = [heads * head_dim for heads in (num_heads, kv_heads, kv_heads)]
    q, k, v = (part.contiguous().view(qkv.shape[0], -1, head_dim) for part in qkv.split_with_sizes(widths, 1))
    if q_norm is not None and k_norm is not None:
        q = rms_norm(q, q_norm, eps, backends=backends)
        k = rms_norm(k, k_norm, eps, backends=backends)
    if cos_sin is not None:
        rope_(q, k, cos_sin, positions, backends=backends)
    write_kv(k, v, kv_cache[0], kv_cache[1], slot_mapping, kv_scales=kv_scales, backends=backends)
    return q


def attention_batch(
    query_starts: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    max_query_len: int,
    max_context_len: int,
    host: tuple[Sequence[int], Sequence[int]] | None = None,
    is_decode: bool = False,
) -> AttentionBatch:
    """The record that all layers of one forward pass share; sequences' bounds are checked here, once.

    query_starts [num_seqs + 1] int32 rising from 0, context_lens [num_seqs] int32 (this batch's tokens included),
    block_tables [num_seqs, max_blocks] int32 with an entry for each block of the context.

    `host` are the values of query_starts and context_lens, where these tensors lie on a device: reading them back would
    wait for it. Without, tensors on a device are taken to hold one query token per sequence, and are not checked: a
    step that was captured as a graph knows its lengths on the device alone.
    """
    op = "attention_batch"
    num_seqs = context_lens.shape[0] if context_lens.dim() == 1 else -1
    check(op, "context_lens", context_lens, ("num_seqs",), INT)
    check(op, "query_starts", query_starts, (num_seqs + 1,), INT)
    check(op, "block_tables", block_tables, (num_seqs, "max_blocks"), INT)
    if max_context_len > block_tables.shape[1] * BLOCK_SIZE:
        raise refuse(op, "block_tables", block_tables, f"wide enough for max_context_len {max_context_len}")
    if host is None and context_lens.device.type != "cpu":
        if max_query_len != 1:
            raise ValueError(f"{op}: max_query_len is {max_query_len}, but without host bounds it must be 1")
        return AttentionBatch(
            query_starts, context_lens, block_tables, 1, max_context_len, num_seqs, None, None, is_decode
        )
    bounds, contexts = (query_starts.tolist(), context_lens.tolist()) if host is None else host
    if len(bounds) != num_seqs + 1 or len(contexts) != num_seqs:
        raise ValueError(f"{op}: host bounds are of {len(bounds)} and {len(contexts)} for {num_seqs} sequences")
    if bounds[0] != 0:
        raise ValueError(f"{op}: query_starts begins with {bounds[0]}, but it must begin with 0")
    for seq, context_len in enumerate(contexts):
        query_len = bounds[seq + 1] - bounds[seq]
        if not 0 <= query_len <= min(context_len, max_query_len) or context_len > max_context_len:
            raise ValueError(
                f"{op}: sequence {seq} has {query_len} query tokens and a context of {context_len}, but they must"
                f" satisfy 0 <= query <= context, query <= max_query_len {max_query_len}"
                f" and context <= max_context_len {max_context_len}"
            )
    return AttentionBatch(
        query_starts,
        context_lens,
        block_tables,
        max_query_len,
        max_context_len,
        bounds[-1],
        bounds,
        contexts,
        is_decode,
    )


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    window: int | None,
    *,
    kv_scales: Tensor | None = None,
    backends: Backends = None,
) -> Tensor:
    """Causal attention of each sequence's new tokens over its whole context, read through the block table.

    The keys of this batch are in the cache already. Token i of a sequence with n query tokens and context c sits at
    position p = c - n + i and sees positions j <= p, with a window also j > p - window. Slots outside a sequence's
    context may hold anything, NaN included.

    Args:
        q: [num_tokens, num_heads, head_dim].
        k_cache, v_cache: [num_blocks, num_kv_heads, BLOCK_SIZE, head_dim]; num_kv_heads divides num_heads.
        scale: factor on the scores, usually head_dim ** -0.5.
        window: None, or at least 1.
        kv_scales: for a pool of 8 bits, as for rope_kv.

    Returns:
        [num_tokens, num_heads, head_dim].
    """
    check("paged_attention", "q", q, (batch.num_tokens, "num_heads", "head_dim"), ACTIVATION)
    _check_cache("paged_attention", k_cache, v_cache, "num_kv_heads", q.shape[2], q.dtype, kv_scales)
    if q.shape[1] % k_cache.shape[1]:
        raise refuse("paged_attention", "q", q, f"of num_heads divisible by num_kv_heads {k_cache.shape[1]}")
    if window is not None and window < 1:
        raise ValueError(f"paged_attention: window is {window}, but it must be None or at least 1")
    y: Tensor = serve("paged_attention", AttentionArgs(q, k_cache, v_cache, batch, scale, window, kv_scales), backends)
    return y


def copy_blocks(
    kv_storage: Tensor,
    source: Tensor,
    target: Tensor,
    *,
    kv_scales: Tensor | None = None,
    backends: Backends = None,
) -> None:
    """Copies whole blocks in every layer. No block may be both a source and a target, nor a target twice.

    kv_storage [num_layers, 2, num_blocks, num_kv_heads, BLOCK_SIZE, head_dim]; source, target [num_copies] int64, on
    the host wherever the storage is. kv_scales, the same without head_dim, moves along with a pool of 8 bits.
    """
    dtypes = ACTIVATION if kv_scales is None else KV_8_BIT
    check("copy_blocks", "kv_storage", kv_storage, ("layers", 2, "blocks", "kv_heads", BLOCK_SIZE, "dim"), dtypes)
    if kv_scales is not None:
        check("copy_blocks", "kv_scales", kv_scales, tuple(kv_storage.shape[:-1]), FLOAT)
    check("copy_blocks", "source", source, ("num_copies",), LONG)
    check("copy_blocks", "target", target, tuple(source.shape), LONG)
    serve("copy_blocks", CopyBlocksArgs(kv_storage, source, target, kv_scales), backends)
