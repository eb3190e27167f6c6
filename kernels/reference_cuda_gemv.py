"""What the quantised products mean, in float64: for the tests of `cuda_gemv`."""

import torch
from torch import Tensor


def dequantised(
    quantised: Tensor, scales: Tensor, dtype: torch.dtype, bits: int, zeros: Tensor | None = None
) -> Tensor:
    """W [n, k] float64. As in `cuda_gemv.pack`, scales of groups are rounded to `dtype`, those of rows to float32."""
    n, k = quantised.shape
    zero = torch.tensor(8.0 if bits == 4 else 0.0, dtype=torch.float64).expand(n, k)
    if scales.dim() == 1:
        scale = scales.float().double()[:, None].expand(n, k)
    else:
        group = next(size for size in (32 << i for i in range(16)) if -(-k // size) == scales.shape[1])
        scale = scales.to(dtype).double().repeat_interleave(group, 1)[:, :k]
        if zeros is not None:
            zero = zeros.double().repeat_interleave(group, 1)[:, :k]
    return scale * (quantised.double() - zero)


def gemv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [m, k], weight [n, k] float64, bias [n] -> [m, n] float64."""
    y = x.double() @ weight.T
    return y if bias is None else y + bias.to(x.dtype).double()
