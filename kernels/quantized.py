"""A weight matrix as integers of 8 bits or fewer, the form that every quantised format is read into."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CODEBOOK_SIZE = 16


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

    @property
    def group_size(self) -> int:
        return self.q.shape[1] // self.scales.shape[1]

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


def stack_rows(parts: Sequence[QuantizedWeight]) -> QuantizedWeight | None:
    """One matrix with the outputs of all; None where bits, groups, codebooks or orders differ."""
    first = parts[0]
    for part in parts[1:]:
        if (part.bits, part.group_size) != (first.bits, first.group_size):
            return None
        for mine, its in ((first.codebook, part.codebook), (first.order, part.order)):
            if (mine is None) != (its is None) or (mine is not None and its is not None and not torch.equal(mine, its)):
                return None
    if len(parts) == 1:
        return first
    return first._replace(
        q=torch.cat([part.q for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        zeros=torch.cat([part.zeros for part in parts]),
    )
