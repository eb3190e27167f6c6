"""Round-to-nearest quantisation: the plain way to make integers from weights, without looking at activations."""

import math
from typing import Literal

import msgspec
import torch
from torch import Tensor

from millrace.kernels.ops import Float8Weight, QuantizedWeight

Method = Literal["int8", "int4", "nf4", "fp8"]

_LEAST_GROUP = 16  # smaller ones cost more in scales than they save
_SLICE = 1 << 22  # weights that are wide at a time
_SMALLEST = 2.0**-24  # of float16: a scale of 0 would lose a group's zero point
_LARGEST = 65504.0
_FP8_LARGEST = 448.0  # of float8_e4m3fn
# Levels of NF4 (Dettmers et al. 2023, appendix E) in units of 1/112, which holds them to 0.0039 of the largest.
_NF4_UNIT = 112
_NF4 = (-112, -78, -59, -44, -32, -21, -10, 0, 9, 18, 28, 38, 49, 63, 81, 112)


class Quantization(msgspec.Struct, frozen=True, kw_only=True):
    """How matrices are rounded as they are loaded.

    Attributes:
        method: "int8" and "fp8" (e4m3), with one scale for each output; "int4" and "nf4", with one for each group of
            inputs.
        group_size: inputs that share a scale, for 4 bits.
    """

    method: Method
    group_size: int = 64

    @property
    def bits(self) -> int:
        return 4 if self.method in ("int4", "nf4") else 8

    def round(self, weight: Tensor, *, is_output: bool) -> QuantizedWeight | Float8Weight:
        """`weight` [out, in], rounded to the nearest. The matrix that gives the logits is not rounded to 4 bits but to
        8, and with FP8 its activations are left alone: its errors go straight into the choice of a token. Where groups
        do not divide the inputs, smaller ones that do are taken."""
        if self.method == "fp8":
            return round_to_float8(weight)._replace(is_w8a8=not is_output)
        inputs = weight.shape[1]
        group = math.gcd(inputs, self.group_size)
        if self.method == "int8" or is_output or group < _LEAST_GROUP:
            return round_to_nearest(weight, 8, None)
        return round_to_nf4(weight, group) if self.method == "nf4" else round_to_nearest(weight, 4, group)


def round_to_float8(weight: Tensor) -> Float8Weight:
    """e4m3 with one scale for each output: the largest weight of each becomes 448. Raises ValueError where a weight is
    not finite."""
    outputs, inputs = weight.shape
    codes = torch.empty(outputs, inputs, dtype=torch.float8_e4m3fn, device=weight.device)
    scales = torch.empty(outputs, 1, device=weight.device)
    step = max(1, _SLICE // inputs)
    for start in range(0, outputs, step):
        rows = slice(start, start + step)
        part = weight[rows].float()
        largest = part.abs().amax(1, keepdim=True)
        if not bool(largest.isfinite().all()):
            raise ValueError("a weight is not finite")
        scales[rows] = (largest / _FP8_LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
        codes[rows] = (part / scales[rows]).to(codes.dtype)
    return Float8Weight(codes, scales, inputs)


def round_to_nf4(weight: Tensor, group_size: int) -> QuantizedWeight:
    """The 16 levels of NF4 with one scale per group of inputs, its largest weight (Dettmers et al. 2023).

    Raises ValueError as `round_to_nearest`.
    """
    inputs = weight.shape[1]
    if inputs % group_size:
        raise ValueError(f"{inputs} inputs cannot be cut into groups of {group_size}")
    book = torch.tensor(_NF4, dtype=torch.int8, device=weight.device)
    borders = (book[1:].float() + book[:-1].float()) / 2
    rows = max(1, _SLICE // inputs)
    parts = [_round_nf4(weight[start : start + rows], group_size, borders) for start in range(0, len(weight), rows)]
    q, scales = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return QuantizedWeight(q, scales, torch.zeros_like(scales), 4, book)


def _round_nf4(weight: Tensor, size: int, borders: Tensor) -> tuple[Tensor, Tensor]:
    grouped = weight.float().view(len(weight), -1, size)
    scales = _scales(grouped.abs().amax(2) / _NF4_UNIT)
    q = torch.bucketize(grouped / scales[:, :, None], borders)
    return q.to(torch.uint8).flatten(1), scales.half()


def round_to_nearest(weight: Tensor, bits: int, group_size: int | None) -> QuantizedWeight:
    """Integers with one scale per group of inputs: 8 bits symmetric about zero, 4 bits between minimum and maximum.

    The scale is rounded to float16 before the weights are divided by it, so that its rounding costs nothing more.

    Args:
        weight: [out, in], finite.
        bits: 8 or 4.
        group_size: inputs that share a scale, a divisor of in; None: all of an output's.

    Raises:
        ValueError: the sizes do not fit, or a weight is not finite or too large for a float16 scale.
    """
    outputs, inputs = weight.shape
    size = group_size or inputs
    if not outputs or not inputs:
        raise ValueError(f"a matrix of {outputs} outputs and {inputs} inputs holds nothing to round")
    if bits not in (4, 8):
        raise ValueError(f"bits is {bits}, but it must be 4 or 8")
    if inputs % size:
        raise ValueError(f"{inputs} inputs cannot be cut into groups of {size}")
    rows = max(1, _SLICE // inputs)
    parts = [_round(weight[start : start + rows], bits, size) for start in range(0, outputs, rows)]
    q, scales, zeros = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return QuantizedWeight(q, scales, zeros, bits)


def _round(weight: Tensor, bits: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    grouped = weight.float().view(len(weight), -1, size)
    levels = (1 << bits) - 1
    if bits == 8:
        largest = grouped.abs().amax(2)
        scales = _scales(largest / 127)
        zeros = torch.full_like(scales, 128)
    else:
        # A range that holds zero: then zero itself is exact.
        low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
        scales = _scales((high - low) / levels)
        zeros = (-low / scales).round().clamp(0, levels)
    q = (grouped / scales[:, :, None] + zeros[:, :, None]).round().clamp(0, levels)
    return q.to(torch.uint8).flatten(1), scales.half(), zeros.half()


def _scales(wanted: Tensor) -> Tensor:
    """What float16 keeps of them, in float32."""
    if not bool((wanted <= _LARGEST).all()):
        raise ValueError(f"a group needs a scale of {float(wanted.max())}, but the largest is {_LARGEST}")
    return wanted.clamp(min=_SMALLEST).half().float()
