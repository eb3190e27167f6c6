"""The ops that models are written in. Each front checks its arguments and asks the backends in order of preference.

Activations are contiguous float32; weights are float32 or bfloat16 and arithmetic is float32. A backend that cannot
serve refuses with a reason; if all refuse, `UnservedError` lists every reason. All fronts raise ValueError, with the
shapes, for a wrong rank, dtype, size, device or layout: kernels compute addresses from shapes alone.

`backends` (last argument of each front) replaces the default list, which `default_backends()` gives.
"""

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from millrace.kernels.arguments import (
    BLOCK_SIZE,
    ActivationArgs,
    AttentionArgs,
    AttentionBatch,
    Backend,
    CopyBlocksArgs,
    DecoderArgs,
    DecoderLayerArgs,
    EmbeddingArgs,
    NormArgs,
    NormWeights,
    PackArgs,
    PackedDecoder,
    PackedLinear,
    QuantizedArgs,
    QuantizedWeight,
    Refusal,
    RopeArgs,
    WriteKvArgs,
    describe,
)
from millrace.kernels.cpu_backend import CpuBackend, load_library
from millrace.kernels.cpu_build import BuildError, Toolchain, build_library, find_library
from millrace.kernels.torch_backend import TorchBackend

__all__ = [
    "BLOCK_SIZE",
    "AttentionBatch",
    "DecoderArgs",
    "DecoderLayerArgs",
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
    "pack_linear",
    "pack_quantized",
    "paged_attention",
    "prepare",
    "rms_norm",
    "rope_",
    "silu_mul",
    "write_kv",
]

_log = logging.getLogger(__name__)

Backends = Sequence[Backend] | None


class UnservedError(RuntimeError):
    """No backend serves an op for these arguments; the message gives every backend's reason."""


@functools.cache
def default_backends() -> tuple[Backend, ...]:
    """Backends of this process, the preferred one first. A C++ library is used if it is built already; this never
    builds one (see `prepare`)."""
    try:
        path = find_library(Toolchain())
        if path is None:
            reason = "the C++ kernels are not built; `millrace.kernels.ops.prepare()` builds them"
        else:
            return (CpuBackend(load_library(path)), TorchBackend())
    except (OSError, AttributeError) as error:
        reason = f"the C++ kernels cannot be loaded: {error}"
    _log.info("CPU ops run in torch: %s", reason)
    return (TorchBackend(),)


def prepare() -> str:
    """Builds the C++ kernels if they are not cached, and puts them first in the default list; call it before weights
    are packed. Takes some seconds the first time on a machine, milliseconds afterwards; fit for a thread.

    Returns:
        A sentence for the start-up log: which library serves, or why torch does.
    """
    try:
        path = build_library(Toolchain())
    except BuildError as error:
        _log.warning("CPU ops run in torch: %s", error)
        return f"CPU ops run in torch: {error}"
    default_backends.cache_clear()
    names = ", then ".join(backend.name for backend in default_backends())
    return f"CPU ops run in {names}; library {path}"


def _serve(op: str, args: Any, backends: Backends) -> Any:
    refusals = []
    for backend in default_backends() if backends is None else backends:
        result = getattr(backend, op)(args)
        if not isinstance(result, Refusal):
            return result
        refusals.append(f"{backend.name}: {result.reason}")
    raise UnservedError(f"no backend serves {op}: " + "; ".join(refusals or ["the list of backends is empty"]))


def _refuse(op: str, name: str, tensor: Tensor, wanted: str) -> ValueError:
    return ValueError(f"{op}: {name} is {describe(tensor)}, but it must be {wanted}")


_FLOAT = (torch.float32,)
_WEIGHT = (torch.float32, torch.bfloat16)
_LONG = (torch.int64,)
_INT = (torch.int32,)


def _check(op: str, name: str, tensor: Tensor, shape: tuple[int | str, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    """Contiguous, of one of the dtypes, and of the shape; a string in the shape names a size that may be anything."""
    given = tensor.shape
    if (
        len(given) == len(shape)
        and tensor.dtype in dtypes
        and tensor.is_contiguous()
        and all(want.__class__ is str or size == want for size, want in zip(given, shape, strict=True))
    ):
        return
    kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    raise _refuse(op, name, tensor, f"contiguous {kinds} [{', '.join(map(str, shape))}]")


def pack_linear(weight: Tensor, bias: Tensor | None = None, *, backends: Backends = None) -> PackedLinear:
    """Takes a weight [out, in] (float32 or bfloat16) and bias [out] into the layout that multiplies fastest.

    The result keeps either the given tensor or its own copy, never both. For a tied embedding, pack the matrix once
    and look rows up with `PackedLinear.row_lookup`.
    """
    _check("pack_linear", "weight", weight, ("out", "in"), _WEIGHT)
    if 0 in weight.shape:
        raise _refuse("pack_linear", "weight", weight, "of at least one row and one column")
    if bias is not None:
        _check("pack_linear", "bias", bias, (weight.shape[0],), _WEIGHT)
    packed: PackedLinear = _serve("pack_linear", PackArgs(weight, bias), backends)
    return packed


def pack_quantized(weight: QuantizedWeight, bias: Tensor | None = None, *, backends: Backends = None) -> PackedLinear:
    """As `pack_linear`, for a matrix of 8 or 4 bits: weight = scale * (q - zero), group by group of its inputs.

    The C++ backend also rounds activations to 8 bits, with a scale for each row and group; torch does not.
    """
    op, q = "pack_quantized", weight.q
    if weight.bits not in (4, 8):
        raise ValueError(f"{op}: bits is {weight.bits}, but it must be 4 or 8")
    _check(op, "q", q, ("out", "in"), (torch.uint8,))
    if 0 in q.shape:
        raise _refuse(op, "q", q, "of at least one row and one column")
    _check(op, "scales", weight.scales, (q.shape[0], "groups"), (torch.float16,))
    groups = weight.scales.shape[1]
    if not groups or q.shape[1] % groups:
        raise _refuse(op, "scales", weight.scales, f"of as many columns as groups divide {q.shape[1]} inputs")
    _check(op, "zeros", weight.zeros, (q.shape[0], groups), (torch.uint8,))
    largest = max(int(q.max()), int(weight.zeros.max()))
    if largest >= 1 << weight.bits:
        raise ValueError(f"{op}: q or zeros reach {largest}, but {weight.bits} bits hold 0 to {(1 << weight.bits) - 1}")
    if bias is not None:
        _check(op, "bias", bias, (q.shape[0],), _WEIGHT)
    packed: PackedLinear = _serve(op, QuantizedArgs(weight, bias), backends)
    return packed


def pack_decoder(args: DecoderArgs, *, backends: Backends = None) -> PackedDecoder | None:
    """All layers as one call, with the same result as the ops one by one; None where no backend has that."""
    for backend in default_backends() if backends is None else backends:
        packed = backend.pack_decoder(args)
        if not isinstance(packed, Refusal):
            return packed
    return None


def embedding(tokens: Tensor, weight: Tensor, *, backends: Backends = None) -> Tensor:
    """Rows of a table: tokens [num_tokens] int64, weight [vocab, hidden] -> [num_tokens, hidden] float32."""
    _check("embedding", "tokens", tokens, ("num_tokens",), _LONG)
    _check("embedding", "weight", weight, ("vocab", "hidden"), _WEIGHT)
    y: Tensor = _serve("embedding", EmbeddingArgs(tokens, weight), backends)
    return y


def _check_norm(op: str, args: NormArgs) -> None:
    x = args.x
    if x.dim() < 1 or x.dtype != torch.float32 or not x.is_contiguous():
        raise _refuse(op, "x", x, "contiguous float32 [..., hidden]")
    _check(op, "weight", args.weight, (x.shape[-1],), _WEIGHT)
    if args.bias is not None:
        _check(op, "bias", args.bias, (x.shape[-1],), _WEIGHT)
    if args.residual is not None:
        _check(op, "residual", args.residual, tuple(x.shape), _FLOAT)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, backends: Backends = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich 2019); x [..., hidden]."""
    args = NormArgs(x, weight, eps)
    _check_norm("rms_norm", args)
    y: Tensor = _serve("rms_norm", args, backends)
    return y


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, backends: Backends = None
) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual); the sum is written in place into `residual`, which is returned."""
    args = NormArgs(x, weight, eps, residual=residual)
    _check_norm("add_rms_norm", args)
    return _serve("rms_norm", args, backends), residual


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, backends: Backends = None) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension (Ba et al. 2016); x [..., hidden]."""
    args = NormArgs(x, weight, eps, bias=bias)
    _check_norm("layer_norm", args)
    y: Tensor = _serve("layer_norm", args, backends)
    return y


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, backends: Backends = None
) -> tuple[Tensor, Tensor]:
    """(layer_norm(x + residual), x + residual); the sum is written in place into `residual`, which is returned."""
    args = NormArgs(x, weight, eps, bias=bias, residual=residual)
    _check_norm("add_layer_norm", args)
    return _serve("layer_norm", args, backends), residual


def silu_mul(gate_up: Tensor, *, backends: Backends = None) -> Tensor:
    """silu(gate) * up (Shazeer 2020): gate_up [num_tokens, 2 * width], gate first -> [num_tokens, width]."""
    _check("silu_mul", "gate_up", gate_up, ("num_tokens", "2 * width"), _FLOAT)
    if gate_up.shape[1] % 2:
        raise _refuse("silu_mul", "gate_up", gate_up, "of an even width: gate, then up")
    y: Tensor = _serve("silu_mul", ActivationArgs(gate_up), backends)
    return y


def gelu_tanh(x: Tensor, *, backends: Backends = None) -> Tensor:
    """x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))) elementwise (Hendrycks & Gimpel 2016)."""
    if x.dtype != torch.float32 or not x.is_contiguous():
        raise _refuse("gelu_tanh", "x", x, "contiguous float32")
    y: Tensor = _serve("gelu_tanh", ActivationArgs(x), backends)
    return y


def rope_(q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor, *, backends: Backends = None) -> None:
    """Rotates the first rotary_dim dimensions of every head in place (Su et al. 2021), halves paired as in NeoX.

    q [num_tokens, num_heads, head_dim], k [num_tokens, num_kv_heads, head_dim], cos_sin [max_positions, rotary_dim]
    with the cosines in the first half of the columns, positions [num_tokens] int64 below max_positions.
    """
    _check("rope_", "q", q, ("num_tokens", "num_heads", "head_dim"), _FLOAT)
    _check("rope_", "k", k, (q.shape[0], "num_kv_heads", q.shape[2]), _FLOAT)
    _check("rope_", "cos_sin", cos_sin, ("max_positions", "rotary_dim"), _FLOAT)
    _check("rope_", "positions", positions, (q.shape[0],), _LONG)
    if cos_sin.shape[1] % 2 or cos_sin.shape[1] > q.shape[2]:
        raise _refuse("rope_", "cos_sin", cos_sin, f"of an even rotary_dim up to head_dim {q.shape[2]}")
    _serve("rope", RopeArgs(q, k, cos_sin, positions), backends)


def _check_cache(op: str, k_cache: Tensor, v_cache: Tensor, num_kv_heads: int | str, head_dim: int) -> None:
    _check(op, "k_cache", k_cache, ("num_blocks", num_kv_heads, BLOCK_SIZE, head_dim), _FLOAT)
    _check(op, "v_cache", v_cache, tuple(k_cache.shape), _FLOAT)


def write_kv(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, *, backends: Backends = None
) -> None:
    """Puts keys and values [num_tokens, num_kv_heads, head_dim] into the slots of the pool of one layer.

    slot_mapping [num_tokens] int64 is block * BLOCK_SIZE + offset; no slot may occur twice.
    """
    _check("write_kv", "k", k, ("num_tokens", "num_kv_heads", "head_dim"), _FLOAT)
    _check("write_kv", "v", v, tuple(k.shape), _FLOAT)
    _check_cache("write_kv", k_cache, v_cache, k.shape[1], k.shape[2])
    _check("write_kv", "slot_mapping", slot_mapping, (k.shape[0],), _LONG)
    _serve("write_kv", WriteKvArgs(k, v, k_cache, v_cache, slot_mapping), backends)


def attention_batch(
    query_starts: Tensor, context_lens: Tensor, block_tables: Tensor, max_query_len: int, max_context_len: int
) -> AttentionBatch:
    """The record that all layers of one forward pass share; sequences' bounds are checked here, once.

    query_starts [num_seqs + 1] int32 rising from 0, context_lens [num_seqs] int32 (this batch's tokens included),
    block_tables [num_seqs, max_blocks] int32 with an entry for each block of the context.
    """
    op = "attention_batch"
    num_seqs = context_lens.shape[0] if context_lens.dim() == 1 else -1
    _check(op, "context_lens", context_lens, ("num_seqs",), _INT)
    _check(op, "query_starts", query_starts, (num_seqs + 1,), _INT)
    _check(op, "block_tables", block_tables, (num_seqs, "max_blocks"), _INT)
    if max_context_len > block_tables.shape[1] * BLOCK_SIZE:
        raise _refuse(op, "block_tables", block_tables, f"wide enough for max_context_len {max_context_len}")
    bounds: list[int] = query_starts.tolist()
    if bounds[0] != 0:
        raise ValueError(f"{op}: query_starts begins with {bounds[0]}, but it must begin with 0")
    for seq, context_len in enumerate(context_lens.tolist()):
        query_len = bounds[seq + 1] - bounds[seq]
        if not 0 <= query_len <= min(context_len, max_query_len) or context_len > max_context_len:
            raise ValueError(
                f"{op}: sequence {seq} has {query_len} query tokens and a context of {context_len}, but they must"
                f" satisfy 0 <= query <= context, query <= max_query_len {max_query_len}"
                f" and context <= max_context_len {max_context_len}"
            )
    return AttentionBatch(query_starts, context_lens, block_tables, max_query_len, max_context_len, bounds[-1])


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    window: int | None,
    *,
    backends: Backends = None,
) -> Tensor:
    """Causal attention of each sequence's new tokens over its whole context, read through the block table.

    The keys of this batch are in the cache already. Token i of a sequence with n query tokens and context c sits at
    position p = c - n + i and sees positions j <= p, with a window also j > p - window. Slots outside a sequence's
    context may hold anything, NaN included.

    Args:
        q: [num_tokens, num_heads, head_dim] float32.
        k_cache, v_cache: [num_blocks, num_kv_heads, BLOCK_SIZE, head_dim] float32; num_kv_heads divides num_heads.
        scale: factor on the scores, usually head_dim ** -0.5.
        window: None, or at least 1.

    Returns:
        [num_tokens, num_heads, head_dim] float32.
    """
    _check("paged_attention", "q", q, (batch.num_tokens, "num_heads", "head_dim"), _FLOAT)
    _check_cache("paged_attention", k_cache, v_cache, "num_kv_heads", q.shape[2])
    if q.shape[1] % k_cache.shape[1]:
        raise _refuse("paged_attention", "q", q, f"of num_heads divisible by num_kv_heads {k_cache.shape[1]}")
    if window is not None and window < 1:
        raise ValueError(f"paged_attention: window is {window}, but it must be None or at least 1")
    y: Tensor = _serve("paged_attention", AttentionArgs(q, k_cache, v_cache, batch, scale, window), backends)
    return y


def copy_blocks(kv_storage: Tensor, source: Tensor, target: Tensor, *, backends: Backends = None) -> None:
    """Copies whole blocks in every layer. No block may be both a source and a target, nor a target twice.

    kv_storage [num_layers, 2, num_blocks, num_kv_heads, BLOCK_SIZE, head_dim]; source, target [num_copies] int64.
    """
    _check("copy_blocks", "kv_storage", kv_storage, ("layers", 2, "blocks", "kv_heads", BLOCK_SIZE, "dim"), _FLOAT)
    _check("copy_blocks", "source", source, ("num_copies",), _LONG)
    _check("copy_blocks", "target", target, tuple(source.shape), _LONG)
    _serve("copy_blocks", CopyBlocksArgs(kv_storage, source, target), backends)
