"""What the quantised products mean, in float64: for the tests of `cuda_gemv`."""

import torch
from torch import Tensor

from millrace.kernels.quantized import QuantizedWeight


def widened(weight: QuantizedWeight) -> Tensor:
    """W [n, k] float64, its columns as they are stored."""
    values = weight.q.double() if weight.codebook is None else weight.codebook.double()[weight.q.long()]
    size = weight.group_size
    return weight.scales.double().repeat_interleave(size, 1) * (
        values - weight.zeros.double().repeat_interleave(size, 1)
    )


def gemv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [m, k], weight [n, k] float64, bias [n] -> [m, n] float64."""
    y = x.double() @ weight.T
    return y if bias is None else y + bias.to(x.dtype).double()


def random_weight(
    n: int, k: int, bits: int, group: int, zeros: str = "fractions", codebook: bool = False
) -> QuantizedWeight:
    """For tests: any integers; zero points with "fractions", "integers", or the "centre" of the integers' range."""
    shape = (n, k // group)
    if zeros == "centre":
        zero = torch.full(shape, 0.0 if codebook else float(1 << bits - 1))
    else:
        zero = torch.rand(shape) * (1 << bits)
        zero = zero.round() if zeros == "integers" else zero
    return QuantizedWeight(
        torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8),
        (torch.rand(shape) + 0.5).half(),
        zero.half(),
        bits,
        torch.randperm(256)[:16].sub(128).to(torch.int8) if codebook else None,
    )
