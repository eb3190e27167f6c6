"""Weights in the layout that multiplies fastest, whatever they are stored as; part of `ops`."""

import torch
from torch import Tensor

from millrace.kernels.arguments import (
    DecoderArgs,
    Float8Args,
    PackArgs,
    PackedDecoder,
    PackedLinear,
    QuantizedArgs,
    Refusal,
)
from millrace.kernels.checks import FLOAT, LONG, WEIGHT, check, refuse
from millrace.kernels.cpu_matrix import CODEBOOK_SIZE
from millrace.kernels.dispatch import Backends, default_backends, serve
from millrace.kernels.quantized import Float8Weight, QuantizedWeight


def pack_linear(
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: torch.dtype = torch.float32,
    backends: Backends = None,
) -> PackedLinear:
    """Takes a weight [out, in] and bias [out] into the layout that multiplies fastest, for inputs of type `activation`.

    The result keeps either the given tensor or its own copy, never both. For a tied embedding, pack the matrix once
    and look rows up with `PackedLinear.row_lookup`.
    """
    check("pack_linear", "weight", weight, ("out", "in"), WEIGHT)
    if 0 in weight.shape:
        raise refuse("pack_linear", "weight", weight, "of at least one row and one column")
    if bias is not None:
        check("pack_linear", "bias", bias, (weight.shape[0],), WEIGHT)
    packed: PackedLinear = serve("pack_linear", PackArgs(weight, bias, activation), backends)
    return packed


def pack_quantized(
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    *,
    activation: torch.dtype = torch.float32,
    backends: Backends = None,
) -> PackedLinear:
    """As `pack_linear`, for a matrix of 8 or 4 bits: weight = scale * (q - zero), group by group of its inputs.

    The C++ backend also rounds activations to 8 bits, with a scale for each row and group, and so does a GPU for many
    rows where the weight is marked `is_w8a8`; torch does not.
    """
    op, q = "pack_quantized", weight.q
    if weight.bits not in (4, 8):
        raise ValueError(f"{op}: bits is {weight.bits}, but it must be 4 or 8")
    check(op, "q", q, ("out", "in"), (torch.uint8,))
    if 0 in q.shape:
        raise refuse(op, "q", q, "of at least one row and one column")
    check(op, "scales", weight.scales, (q.shape[0], "groups"), (torch.float16,))
    groups = weight.scales.shape[1]
    if not groups or q.shape[1] % groups:
        raise refuse(op, "scales", weight.scales, f"of as many columns as groups divide {q.shape[1]} inputs")
    check(op, "zeros", weight.zeros, (q.shape[0], groups), (torch.float16,))
    largest = int(q.max())
    if largest >= 1 << weight.bits:
        raise ValueError(f"{op}: q reaches {largest}, but {weight.bits} bits hold 0 to {(1 << weight.bits) - 1}")
    if weight.codebook is not None:
        check(op, "codebook", weight.codebook, (CODEBOOK_SIZE,), (torch.int8,))
        if weight.bits != 4:
            raise ValueError(f"{op}: bits is {weight.bits}, but with a codebook it must be 4")
    if weight.order is not None:
        check(op, "order", weight.order, (q.shape[1],), LONG)
        if not torch.equal(weight.order.sort().values, torch.arange(q.shape[1], device=q.device)):
            raise ValueError(f"{op}: order must hold each of the {q.shape[1]} inputs once")
    if bias is not None:
        check(op, "bias", bias, (q.shape[0],), WEIGHT)
    packed: PackedLinear = serve(op, QuantizedArgs(weight, bias, activation), backends)
    return packed


def pack_float8(
    weight: Float8Weight,
    bias: Tensor | None = None,
    *,
    activation: torch.dtype = torch.float32,
    backends: Backends = None,
) -> PackedLinear:
    """As `pack_linear`, for a matrix of float8_e4m3fn with scales.

    Activations stay as they are, but where the weight is marked `is_w8a8` a GPU may round them to FP8.
    """
    op, codes = "pack_float8", weight.codes
    check(op, "codes", codes, ("out", "in"), (torch.float8_e4m3fn,))
    if 0 in codes.shape:
        raise refuse(op, "codes", codes, "of at least one row and one column")
    check(op, "scales", weight.scales, (codes.shape[0], "groups"), FLOAT)
    if weight.group_size < 1 or weight.scales.shape[1] != -(-codes.shape[1] // weight.group_size):
        wanted = f"of one column for each {weight.group_size} of {codes.shape[1]} inputs"
        raise refuse(op, "scales", weight.scales, wanted)
    if bool((codes.view(torch.uint8) & 127 == 127).any()):
        raise ValueError(f"{op}: codes hold NaN")
    if bias is not None:
        check(op, "bias", bias, (codes.shape[0],), WEIGHT)
    packed: PackedLinear = serve(op, Float8Args(weight, bias, activation), backends)
    return packed


def pack_decoder(args: DecoderArgs, *, backends: Backends = None) -> PackedDecoder | None:
    """All layers as one call, with the same result as the ops one by one; None where no backend has that."""
    for backend in default_backends() if backends is None else backends:
        packed = backend.pack_decoder(args)
        if not isinstance(packed, Refusal):
            return packed
    return None
