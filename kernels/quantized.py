"""A weight matrix as integers of 8 bits or fewer, the form that every quantised format is read into."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_SLICE = 1 << 22  # elements that are float32 at a time


class QuantizedWeight(NamedTuple):
    """A matrix [out, in] of scale * (q - zero), with one scale and zero for each group of consecutive columns.

    With a codebook (NF4, IQ4_NL) it is scale * (codebook[q] - zero). With an order (GPTQ's desc_act) column i
    multiplies input order[i] rather than input i. Integers of 2, 3, 5 or 6 bits lie in 4 or 8.
    """

    q: Tensor  # [out, in] uint8, 0 .. 2 ** bits - 1
    scales: Tensor  # [out, in // group_size] float16
    zeros: Tensor  # [out, in // group_size] float16, any value: K-quants of GGUF have fractions
    bits: int  # 8 or 4
    codebook: Tensor | None = None  # [16] int8, for 4 bits
    order: Tensor | None = None  # [in] int64, a permutation
    is_w8a8: bool = False  # meant for activations of 8 bits too: a backend may round them where that is faster

    @property
    def group_size(self) -> int:
        return self.q.shape[1] // self.scales.shape[1]

    def rows(self, rows: slice | Tensor) -> "QuantizedWeight":
        return self._replace(q=self.q[rows], scales=self.scales[rows], zeros=self.zeros[rows])

    def to(self, device: torch.device) -> "QuantizedWeight":
        return self._replace(
            q=self.q.to(device),
            scales=self.scales.to(device),
            zeros=self.zeros.to(device),
            codebook=None if self.codebook is None else self.codebook.to(device),
            order=None if self.order is None else self.order.to(device),
        )

    def widen(self) -> Tensor:
        """The matrix in float32, its columns in the order of the inputs."""
        values = self.q.float() if self.codebook is None else self.codebook.float()[self.q.int()]
        grouped = values.view(*self.scales.shape, self.group_size)
        wide = ((grouped - self.zeros.float()[:, :, None]) * self.scales.float()[:, :, None]).flatten(1)
        if self.order is None:
            return wide
        ordered = torch.empty_like(wide)
        ordered[:, self.order] = wide
        return ordered


class Float8Weight(NamedTuple):
    """A matrix [out, in] of scale * code, with one scale for each group of columns; the last may be short."""

    codes: Tensor  # [out, in] float8_e4m3fn
    scales: Tensor  # [out, ceil(in / group_size)] float32
    group_size: int
    is_w8a8: bool = False  # as of QuantizedWeight

    def rows(self, rows: slice | Tensor) -> "Float8Weight":
        # Torch cannot index float8 by a tensor, but bytes it can.
        codes = self.codes.view(torch.uint8)[rows].view(torch.float8_e4m3fn)
        return self._replace(codes=codes, scales=self.scales[rows])

    def to(self, device: torch.device) -> "Float8Weight":
        return self._replace(codes=self.codes.to(device), scales=self.scales.to(device))

    def widen(self) -> Tensor:
        """The matrix in float32."""
        return self.codes.float() * self.scales.repeat_interleave(self.group_size, 1)[:, : self.codes.shape[1]]


AnyWeight = Tensor | QuantizedWeight | Float8Weight


def widen_into(out: Tensor, weight: QuantizedWeight | Float8Weight) -> Tensor:
    """Fills `out` [out, in] of any floating type, some rows at a time: the whole never lies in memory in float32."""
    step = max(1, _SLICE // out.shape[1])
    for start in range(0, len(out), step):
        rows = slice(start, start + step)
        out[rows] = weight.rows(rows).widen()
    return out


def stack_rows(parts: Sequence[AnyWeight]) -> QuantizedWeight | Float8Weight | None:
    """One matrix with the outputs of all, exactly; None where there is none such: parts of several kinds, of the plain
    one, with other orders of the inputs, or in groups of which the smallest does not divide all."""
    eights = [part for part in parts if isinstance(part, Float8Weight)]
    if len(eights) == len(parts):
        return _stack_eights(eights)
    integers = [part for part in parts if isinstance(part, QuantizedWeight)]
    return _stack_integers(integers) if len(integers) == len(parts) else None


def _stack_eights(parts: Sequence[Float8Weight]) -> Float8Weight | None:
    if len(parts) == 1:
        return parts[0]
    if len({part.group_size for part in parts}) > 1:
        return None
    codes = torch.cat([part.codes for part in parts])
    scales = torch.cat([part.scales for part in parts])
    return Float8Weight(codes, scales, parts[0].group_size, all(part.is_w8a8 for part in parts))


def _stack_integers(parts: Sequence[QuantizedWeight]) -> QuantizedWeight | None:
    """Checkpoints of mixed types (GGUF's Q4_K_M, GPTQ with `dynamic`) give q, k and v different ones: the whole takes
    the wider storage, the smaller groups, and a codebook only where all have the same."""
    if len(parts) == 1:
        return parts[0]
    if not _all_equal([part.codebook for part in parts]):
        parts = [_without_codebook(part) for part in parts]
    group = min(part.group_size for part in parts)
    if not _all_equal([part.order for part in parts]) or any(part.group_size % group for part in parts):
        return None
    repeats = [part.group_size // group for part in parts]
    scales, zeros = (
        torch.cat([groups.repeat_interleave(count, 1) for groups, count in zip(all_groups, repeats, strict=True)])
        for all_groups in ([part.scales for part in parts], [part.zeros for part in parts])
    )
    return parts[0]._replace(
        q=torch.cat([part.q for part in parts]),
        scales=scales,
        zeros=zeros,
        bits=max(part.bits for part in parts),
        is_w8a8=all(part.is_w8a8 for part in parts),
    )


def _all_equal(tensors: Sequence[Tensor | None]) -> bool:
    """Whether all are the same, or all None."""
    first = tensors[0]
    return all(
        tensor is None if first is None else tensor is not None and torch.equal(tensor, first) for tensor in tensors
    )


def _without_codebook(weight: QuantizedWeight) -> QuantizedWeight:
    """The same in 8 bits: the entries themselves, moved up by 128, with their zeros."""
    if weight.codebook is None:
        return weight
    q = (weight.codebook.short() + 128).to(torch.uint8)[weight.q.int()]
    return weight._replace(q=q, zeros=weight.zeros + 128, bits=8, codebook=None)
