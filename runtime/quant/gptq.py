"""GPTQ (Frantar et al. 2022): columns are rounded one after the other, and what each one's rounding changes in the
output is made up for by the columns that are not rounded yet."""

import torch
from torch import Tensor

from millrace.kernels.quantized import QuantizedWeight

_LAZY = 128  # columns whose corrections are applied to the rest of the matrix at once
_SHRINK = torch.linspace(1.0, 0.6, 17)  # of a group's range; a smaller one rounds the many at the cost of the few
_SMALLEST = 2.0**-24  # of float16


def quantize_gptq_weight(
    weight: Tensor,
    gram: Tensor,
    *,
    bits: int,
    group_size: int,
    sym: bool = False,
    desc_act: bool = False,
    damping: float = 0.01,
) -> QuantizedWeight:
    """A matrix in integers that keep its products with the inputs seen in calibration.

    Args:
        weight: [out, in] float32.
        gram: [in, in], the sum of x xᵀ over the inputs.
        bits: 2, 3, 4 or 8.
        group_size: inputs that share a scale and a zero, a divisor of in.
        sym: zeros stay in the middle of the range.
        desc_act: inputs with the largest activations are rounded first, while all others can still make up for them.
            Groups are then of inputs that follow in that order (`QuantizedWeight.order`).
        damping: what is added to the diagonal of `gram`, in parts of its mean.

    Returns:
        Zeros are integers from 1 on, as version 1 of the format stores them less 1.

    Raises:
        ValueError: the sizes do not fit, or `gram` is not finite, all zero, or has no factorisation even well damped.
    """
    outputs, inputs = weight.shape
    if bits not in (2, 3, 4, 8):
        raise ValueError(f"bits is {bits}, but it must be 2, 3, 4 or 8")
    if gram.shape != (inputs, inputs):
        raise ValueError(f"gram is {list(gram.shape)}, but the matrix has {inputs} inputs")
    if not group_size or inputs % group_size:
        raise ValueError(f"{inputs} inputs cannot be cut into groups of {group_size}")
    order = gram.diagonal().argsort(descending=True, stable=True) if desc_act else None
    rest = weight.clone() if order is None else weight[:, order]
    factor = _inverse_factor(gram if order is None else gram[order][:, order], damping)
    q = torch.empty(outputs, inputs, dtype=torch.uint8)
    scales = torch.empty(outputs, inputs // group_size)
    zeros = torch.empty_like(scales)
    for start in range(0, inputs, _LAZY):
        end = min(start + _LAZY, inputs)
        here, inner = rest[:, start:end], factor[start:end, start:end]
        errors = torch.empty_like(here)
        for column in range(end - start):
            group, offset = divmod(start + column, group_size)
            if offset == 0:
                # Columns of this group beyond the lazy block have not been corrected by it yet.
                ahead = rest[:, start + column : start + column + group_size].clone()
                if start + column + group_size > end and column:
                    ahead[:, end - start - column :] -= (
                        errors[:, :column] @ factor[start : start + column, end : start + column + group_size]
                    )
                importance = factor.diagonal()[start + column : start + column + group_size] ** -2
                scales[:, group], zeros[:, group] = _fit(ahead, importance, bits, sym)
            scale, zero = scales[:, group], zeros[:, group]
            value = here[:, column]
            integers = (value / scale + zero).round_().clamp_(0, (1 << bits) - 1)
            q[:, start + column] = integers.to(torch.uint8)
            error = (value - scale * (integers - zero)) / inner[column, column]
            here[:, column:].addr_(error, inner[column, column:], alpha=-1)
            errors[:, column] = error
        rest[:, end:].addmm_(errors, factor[start:end, end:], alpha=-1)
    return QuantizedWeight(q, scales.half(), zeros.half(), 8 if bits == 8 else 4, order=order)


def round_about_zero(weight: Tensor, group_size: int) -> QuantizedWeight:
    """`weight` [out, in] rounded to the nearest of 16 levels, zero the ninth of them, without a look at the inputs."""
    parts = [_fit(part, torch.ones(group_size), 4, True)[0] for part in torch.split(weight, group_size, dim=1)]
    scales = torch.stack(parts, 1)
    grouped = weight.view(len(weight), -1, group_size)
    q = (grouped / scales[:, :, None] + 8).round_().clamp_(0, 15).to(torch.uint8).flatten(1)
    return QuantizedWeight(q, scales.half(), torch.full_like(scales, 8).half(), 4)


def _inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """Upper U with Uᵀ U = (gram + damping)^-1: row i holds how the columns after i make up for i's error."""
    mean = float(gram.diagonal().mean())
    if not mean > 0 or not mean < float("inf"):
        raise ValueError(f"the mean square of the inputs is {mean}: calibration saw no usable activations")
    # In float32 first: wide layers take gigabytes in float64.
    for dtype, more in ((torch.float32, 1), (torch.float64, 1), (torch.float64, 10), (torch.float64, 100)):
        damped = gram.to(dtype, copy=True)
        damped.diagonal().add_(damping * more * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed):
                wide: Tensor = factor.float()
                return wide
    raise ValueError(f"the products of its inputs have no factorisation, with a damping of {100 * damping} either")


def _fit(weight: Tensor, importance: Tensor, bits: int, sym: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero [out] of one group [out, size], with the least rounding error weighted by `importance` [size]."""
    levels = (1 << bits) - 1
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
    if sym:
        high = torch.maximum(high, -low)
        low = -high
    best = torch.full_like(low, float("inf"))
    scales, zeros = torch.empty_like(low), torch.empty_like(low)
    for shrink in _SHRINK:
        # Rounded to float16 before anything is divided by it, so that its rounding costs nothing more.
        scale = ((high - low) * (shrink / levels)).clamp(min=_SMALLEST).half().float()
        middle = torch.full_like(scale, (levels + 1) // 2)
        zero = middle if sym else (-low * shrink / scale).round().clamp(1, levels)
        integers = (weight / scale[:, None] + zero[:, None]).round().clamp(0, levels)
        error = (((integers - zero[:, None]) * scale[:, None] - weight).square() * importance).sum(1)
        better = error < best
        best = torch.where(better, error, best)
        scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)
    return scales, zeros
