"""From packed words to integers, and from integers with wide scales to what the kernels take."""

import torch
from torch import Tensor

from millrace.kernels.quantized import QuantizedWeight, widen_into
from millrace.runtime.quant.formats.base import Matrix

_SLICE = 1 << 20  # integers that are taken apart at a time
_HALF_STEP = 2.0**-11  # of float16: its relative rounding error


def unpack_rows(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` integers of each row.

    Integer i begins at bit i * bits of its row, counted from the lowest bit of the first word, and may go on in the
    next word: the layout of GPTQ (along the inputs, its 3 bits too) and of compressed-tensors.

    Args:
        words: [rows, words] int32, in any strides.
        bits: 1 to 8.
        count: integers in a row, at most 32 * words // bits.

    Returns:
        [rows, count] uint8.
    """
    out = torch.empty(words.shape[0], count, dtype=torch.uint8)
    step = max(1, _SLICE // max(1, count))
    for start in range(0, len(out), step):
        rows = bytes_of(words[start : start + step])
        integers = _whole(rows, bits) if 8 % bits == 0 else _straddling(rows, bits, count)
        out[start : start + step] = integers[:, :count]
    return out


def unpack_whole_words(words: Tensor, bits: int, count: int) -> Tensor:
    """The same where no integer goes on in the next word: 32 // bits of them lie in each, and its highest bits are not
    used."""
    out = torch.empty(words.shape[0], count, dtype=torch.uint8)
    in_word = 32 // bits
    for index in range(min(in_word, count)):
        integers = (words >> (index * bits)) & ((1 << bits) - 1)
        out[:, index::in_word] = integers[:, : -(-(count - index) // in_word)]
    return out


def bytes_of(words: Tensor) -> Tensor:
    """[..., n] of any type -> [..., n * size] uint8, the lowest byte of each first."""
    # By way of one dimension: one of size 1 may keep a stride that a view as another type refuses.
    flat = words.contiguous().flatten().view(torch.uint8)
    return flat.view(*words.shape[:-1], words.shape[-1] * words.element_size())


def _whole(rows: Tensor, bits: int) -> Tensor:
    """Integers that lie within a byte each."""
    out = torch.empty(*rows.shape, 8 // bits, dtype=torch.uint8)
    for index in range(8 // bits):
        out[:, :, index] = (rows >> (index * bits)) & ((1 << bits) - 1)
    return out.flatten(1)


def _straddling(rows: Tensor, bits: int, count: int) -> Tensor:
    """Eight integers lie in `bits` bytes, each of them in at most two."""
    octets = -(-count // 8)
    grouped = torch.zeros(len(rows), octets * bits, dtype=torch.uint8)
    used = min(grouped.shape[1], rows.shape[1])
    grouped[:, :used] = rows[:, :used]
    grouped = grouped.view(len(rows), octets, bits)
    out = torch.empty(len(rows), octets, 8, dtype=torch.uint8)
    for index in range(8):
        byte, shift = divmod(index * bits, 8)
        value = grouped[:, :, byte].short()
        if shift + bits > 8:
            value |= grouped[:, :, byte + 1].short() << 8
        out[:, :, index] = (value >> shift) & ((1 << bits) - 1)
    return out.flatten(1)


def quantized(
    matrix: Matrix,
    q: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    wide: torch.dtype,
    *,
    codebook: Tensor | None = None,
    order: Tensor | None = None,
) -> QuantizedWeight | Tensor:
    """The matrix as integers with float16 scales; widened to type `wide` where float16 cannot hold the scales.

    Rounding a scale to float16 moves its group's weights by at most 2^-11 of their size. Scales below float16's normal
    range are rounded more coarsely; they pass as long as they are off by no more than 2^-11 of the output's largest.

    Args:
        q: [out, in] uint8, below 2 ** bits.
        scales, zeros: [out, groups], of any type; zeros between -256 and 511.
        bits: of the integers, at most 8; they are kept in 4 or 8.

    Raises:
        CheckpointError: a scale is not finite.
    """
    scales, zeros = scales.float(), zeros.float()
    if not bool(scales.isfinite().all()):
        matrix.refuse("its scales are not all finite numbers: the checkpoint is damaged")
    halves = scales.half()
    weight = QuantizedWeight(q, halves, zeros.half().contiguous(), 4 if bits <= 4 else 8, codebook, order)
    if bool(((halves.float() - scales).abs().amax(1) <= _HALF_STEP * scales.abs().amax(1)).all()):
        return weight._replace(scales=halves.contiguous())
    return widen_into(torch.empty(q.shape, dtype=wide), weight._replace(scales=scales, zeros=zeros))
