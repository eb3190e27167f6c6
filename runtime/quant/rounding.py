"""Round-to-nearest quantisation: the plain way to make integers from weights, without looking at activations."""

import torch
from torch import Tensor

from millrace.kernels.ops import QuantizedWeight

_SMALLEST = 2.0**-24  # of float16: a scale of 0 would lose a group's zero point
_LARGEST = 65504.0


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
    if bits not in (4, 8):
        raise ValueError(f"bits is {bits}, but it must be 4 or 8")
    if inputs % size:
        raise ValueError(f"{inputs} inputs cannot be cut into groups of {size}")
    grouped = weight.float().view(outputs, -1, size)
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
    return QuantizedWeight(q.to(torch.uint8).view(outputs, inputs), scales.half(), zeros.to(torch.uint8), bits)


def _scales(wanted: Tensor) -> Tensor:
    """What float16 keeps of them, in float32."""
    if not bool((wanted <= _LARGEST).all()):
        raise ValueError(f"a group needs a scale of {float(wanted.max())}, but the largest is {_LARGEST}")
    return wanted.clamp(min=_SMALLEST).half().float()
