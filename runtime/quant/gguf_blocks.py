"""The block types of GGUF: a row of bytes is cut into blocks, each with its integers and the scales of its groups.

Layouts: `ggml-common.h` and `ggml-quants.c` of llama.cpp; the tests compare each with the `gguf` package.
"""

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from millrace.kernels.quantized import QuantizedWeight
from millrace.runtime.weights.gguf_file import LAYOUTS

_SLICE = 1 << 20  # weights that are spread out at a time
_LARGEST = 65504.0  # of float16
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


class _Blocks(NamedTuple):
    """n blocks: weight = scale * (q - zero) - minimum; with a codebook, scale * codebook[q]."""

    q: Tensor  # [n, weights of a block] uint8
    scale: Tensor  # [n, groups of a block] float32
    minimum: Tensor | None = None  # [n, groups of a block] float32


class BlockType(NamedTuple):
    """How one type lies in a file.

    Attributes:
        weights, nbytes: of one block.
        bits: storage that its integers need as a QuantizedWeight, 4 or 8.
        group: weights that share a scale.
        zero: the integer that stands for 0.
        unpack: [n, nbytes] uint8 -> its blocks.
        has_codebook: integers are places in the table of IQ4_NL.
    """

    weights: int
    nbytes: int
    bits: int
    group: int
    zero: int
    unpack: Callable[[Tensor], _Blocks]
    has_codebook: bool = False


def read_blocks(kind: BlockType, data: Tensor) -> QuantizedWeight | Tensor:
    """The matrix in `data` [out, bytes of a row] uint8, its integers as they are stored.

    Scales and zeros are rounded to float16. That is exact for Q4_0, Q5_0, Q8_0 and IQ4_NL; elsewhere a weight may be
    off by 2^-11 of its group's largest and of its minimum. Small scales lose nothing: a float16 times an integer is a
    multiple of the smallest float16. A matrix with a scale that is too large for one is given in float32 instead.

    Raises ValueError where a scale is not finite.
    """
    outputs, groups = len(data), data.shape[1] // kind.nbytes * (kind.weights // kind.group)
    q = torch.empty(outputs, groups * kind.group, dtype=torch.uint8)
    scales, zeros = (torch.empty(outputs, groups, dtype=torch.float16) for _ in range(2))
    for rows, blocks in _unpacked(kind, data):
        part, minimum = blocks.q.view(-1, kind.group), blocks.minimum
        scale = blocks.scale.view(-1).half()
        if minimum is None:
            zero = torch.full_like(scale, kind.zero)
        else:
            scale, zero, is_flat = _with_minimum(scale, minimum.view(-1))
            part.masked_fill_(is_flat[:, None], 0)
        if not bool(scale.isfinite().all()):
            return widen_blocks(kind, data)
        q[rows] = blocks.q.view(-1, q.shape[1])
        scales[rows], zeros[rows] = scale.view(-1, groups), zero.view(-1, groups)
    codebook = torch.tensor(_IQ4, dtype=torch.int8) if kind.has_codebook else None
    return QuantizedWeight(q, scales, zeros, kind.bits, codebook)


def widen_blocks(kind: BlockType, data: Tensor) -> Tensor:
    """The same matrix in float32, exactly as the type defines it. Raises ValueError as `read_blocks`."""
    wide = torch.empty(len(data), data.shape[1] // kind.nbytes * kind.weights)
    codebook = torch.tensor(_IQ4, dtype=torch.float32)
    for rows, blocks in _unpacked(kind, data):
        values = codebook[blocks.q.int()] if kind.has_codebook else blocks.q.float() - kind.zero
        values = values.view(-1, kind.group).mul_(blocks.scale.view(-1, 1))
        if blocks.minimum is not None:
            values -= blocks.minimum.view(-1, 1)
        wide[rows] = values.view(-1, wide.shape[1])
    return wide


def _unpacked(kind: BlockType, data: Tensor) -> Iterable[tuple[slice, _Blocks]]:
    """Slices of rows with their blocks, a few million weights at a time."""
    per_row = data.shape[1] // kind.nbytes
    step = max(1, _SLICE // (per_row * kind.weights))
    for start in range(0, len(data), step):
        rows = data[start : start + step]
        blocks = kind.unpack(rows.reshape(-1, kind.nbytes))
        for scale in (blocks.scale, blocks.minimum):
            if scale is not None and not bool(scale.isfinite().all()):
                raise ValueError("it holds a scale that is not finite")
        yield slice(start, start + len(rows)), blocks


def _with_minimum(scale: Tensor, minimum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(scale, zero, is_flat), each [groups], for weights scale * q - minimum.

    The zero is taken from the scale as it was rounded, so that the minimum loses nothing to that. In a flat group the
    scale is 0, or so small beside the minimum that no float16 holds their ratio: there all weights are -minimum, which
    is minimum * (0 - 1).
    """
    zero = minimum / scale.float()
    is_flat = ~(zero.abs() <= _LARGEST)  # NaN for 0 / 0 too
    return torch.where(is_flat, minimum.half(), scale), torch.where(is_flat, 1.0, zero).half(), is_flat


def _whole(data: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, bytes], an even place of even-sized blocks, as a contiguous [n, words]."""
    return data.view(torch.int16).clone(memory_format=torch.contiguous_format).view(dtype)


def _float16(data: Tensor) -> Tensor:
    """[n, 2 * count] bytes -> [n, count] float32."""
    return _whole(data, torch.float16).float()


def _fields(data: Tensor, shifts: int, width: int, run: int) -> Tensor:
    """Bit fields of `width` at multiples of it, `shifts` in a byte: the lowest fields of `run` bytes come first, then
    the next ones of the same bytes; [n, bytes] -> [n, shifts * bytes]. Eight bytes are handled at a time."""
    words = _whole(data, torch.int64)
    mask = ((1 << width) - 1) * 0x0101010101010101
    fields = torch.empty(len(words), words.shape[1] * 8 // run, shifts, run // 8, dtype=torch.int64)
    for place in range(shifts):
        fields[:, :, place] = ((words >> (place * width)) & mask).view(len(words), -1, run // 8)
    return fields.flatten(1).view(torch.uint8)


def _narrow_fields(data: Tensor, shifts: int, width: int, run: int) -> Tensor:
    """The same for runs shorter than eight bytes, which only scales have."""
    shift = torch.arange(shifts, dtype=torch.uint8).mul_(width).view(1, 1, -1, 1)
    return ((data.reshape(len(data), -1, 1, run) >> shift) & ((1 << width) - 1)).flatten(1)


def _q4_0(data: Tensor) -> _Blocks:
    return _Blocks(_fields(data[:, 2:], 2, 4, 16), _float16(data[:, :2]))


def _q4_1(data: Tensor) -> _Blocks:
    return _Blocks(_fields(data[:, 4:], 2, 4, 16), _float16(data[:, :2]), -_float16(data[:, 2:4]))


def _fifth_bits(data: Tensor) -> Tensor:
    """Bit i of four bytes belongs to weight i; [n, 4] -> [n, 32]."""
    every = torch.arange(256, dtype=torch.uint8).view(256, 1)
    spread = (_narrow_fields(every, 8, 1, 1) << 4).view(torch.int64).flatten()  # the eight bits of each byte
    return spread[data.int()].view(torch.uint8)


def _q5_0(data: Tensor) -> _Blocks:
    return _Blocks(_fields(data[:, 6:], 2, 4, 16) | _fifth_bits(data[:, 2:6]), _float16(data[:, :2]))


def _q5_1(data: Tensor) -> _Blocks:
    q = _fields(data[:, 8:], 2, 4, 16) | _fifth_bits(data[:, 4:8])
    return _Blocks(q, _float16(data[:, :2]), -_float16(data[:, 2:4]))


def _q8_0(data: Tensor) -> _Blocks:
    return _Blocks(_whole(data[:, 2:], torch.uint8) ^ 0x80, _float16(data[:, :2]))  # int8 + 128


def _q2_k(data: Tensor) -> _Blocks:
    scales, d = data[:, :16], _float16(data[:, 80:84])
    q = _fields(data[:, 16:80], 4, 2, 32)
    return _Blocks(q, d[:, :1] * (scales & 15).float(), d[:, 1:] * (scales >> 4).float())


def _q3_k(data: Tensor) -> _Blocks:
    q = _fields(data[:, 32:96], 4, 2, 32) | (_fields(data[:, :32], 8, 1, 32) << 2)
    low, high = _fields(data[:, 96:104], 2, 4, 8), _narrow_fields(data[:, 104:108], 4, 2, 4)
    scales = (low | (high << 4)).float() - 32
    return _Blocks(q, _float16(data[:, 108:110]) * scales)


def _k_scales(data: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima [n, 8] of 6 bits each, out of 12 bytes: the first four lie whole in bytes 0-3 and 4-7, whose
    upper two bits and the nibbles of bytes 8-11 are the last four."""
    first, second, third = data[:, :4], data[:, 4:8], data[:, 8:]
    scales = torch.cat([first & 63, (third & 15) | ((first >> 6) << 4)], 1)
    minima = torch.cat([second & 63, (third >> 4) | ((second >> 6) << 4)], 1)
    return scales.float(), minima.float()


def _q4_k(data: Tensor) -> _Blocks:
    d, (scales, minima) = _float16(data[:, :4]), _k_scales(data[:, 4:16])
    return _Blocks(_fields(data[:, 16:], 2, 4, 32), d[:, :1] * scales, d[:, 1:] * minima)


def _q5_k(data: Tensor) -> _Blocks:
    d, (scales, minima) = _float16(data[:, :4]), _k_scales(data[:, 4:16])
    q = _fields(data[:, 48:], 2, 4, 32) | (_fields(data[:, 16:48], 8, 1, 32) << 4)
    return _Blocks(q, d[:, :1] * scales, d[:, 1:] * minima)


def _q6_k(data: Tensor) -> _Blocks:
    q = _fields(data[:, :128], 2, 4, 64) | (_fields(data[:, 128:192], 4, 2, 32) << 4)
    scales = _whole(data[:, 192:208], torch.int8).float()
    return _Blocks(q, _float16(data[:, 208:210]) * scales)


def _iq4_nl(data: Tensor) -> _Blocks:
    return _Blocks(_fields(data[:, 2:], 2, 4, 16), _float16(data[:, :2]))


def _iq4_xs(data: Tensor) -> _Blocks:
    high, low = _narrow_fields(data[:, 2:4], 4, 2, 1), _narrow_fields(data[:, 4:8], 2, 4, 1)
    scales = (low | (high << 4)).float() - 32
    return _Blocks(_fields(data[:, 8:], 2, 4, 16), _float16(data[:, :2]) * scales)


BLOCK_TYPES: Mapping[str, BlockType] = MappingProxyType(
    {
        "Q4_0": BlockType(*LAYOUTS["Q4_0"], 4, 32, 8, _q4_0),
        "Q4_1": BlockType(*LAYOUTS["Q4_1"], 4, 32, 0, _q4_1),
        "Q5_0": BlockType(*LAYOUTS["Q5_0"], 8, 32, 16, _q5_0),
        "Q5_1": BlockType(*LAYOUTS["Q5_1"], 8, 32, 0, _q5_1),
        "Q8_0": BlockType(*LAYOUTS["Q8_0"], 8, 32, 128, _q8_0),
        "Q2_K": BlockType(*LAYOUTS["Q2_K"], 4, 16, 0, _q2_k),
        "Q3_K": BlockType(*LAYOUTS["Q3_K"], 4, 16, 4, _q3_k),
        "Q4_K": BlockType(*LAYOUTS["Q4_K"], 4, 32, 0, _q4_k),
        "Q5_K": BlockType(*LAYOUTS["Q5_K"], 8, 32, 0, _q5_k),
        "Q6_K": BlockType(*LAYOUTS["Q6_K"], 8, 16, 32, _q6_k),
        "IQ4_NL": BlockType(*LAYOUTS["IQ4_NL"], 4, 32, 0, _iq4_nl, has_codebook=True),
        "IQ4_XS": BlockType(*LAYOUTS["IQ4_XS"], 4, 32, 0, _iq4_xs, has_codebook=True),
    }
)
