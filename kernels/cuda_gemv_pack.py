"""Quantised matrices in the layout of cuda/gemv.cu."""

from dataclasses import dataclass

import torch
from torch import Tensor

from millrace.kernels.arguments import describe
from millrace.kernels.cuda_gemv_common import TILE_N
from millrace.kernels.quantized import QuantizedWeight

TYPES = {torch.bfloat16: "bf16", torch.float16: "f16"}
TILE_K = {4: 64, 8: 32}
_NARROW = 16  # the smallest group; its columns lie in another order


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A quantised W [n, k], laid out for the kernels by `pack`.

    Attributes:
        bits: 4 or 8.
        group: columns that share a scale, a power of two; 0 if each row has one scale.
        dtype: of activations and result.
        weight: [n_tiles, k_tiles, 32, 16] uint8.
        num_groups: along the columns, with those of padded columns.
        scales: [n_tiles, num_groups / j, 8, j, 1 or 2, 2] float16, where j = scales_per_tile, with zero points behind
            the scales where there are any; [n] float32 with group 0.
        has_zeros: zero points differ from the one that the kernel subtracts.
        codebook: sixteen signed bytes in four words; None: integers.
        order: [k] int64, the input that each column multiplies; None: its own.
        bias: [n] of dtype, or None.
    """

    n: int
    k: int
    bits: int
    group: int
    num_groups: int
    dtype: torch.dtype
    weight: Tensor
    scales: Tensor
    has_zeros: bool
    codebook: tuple[int, ...] | None
    order: Tensor | None
    bias: Tensor | None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.weight, self.scales, self.order, self.bias) if t is not None)

    @property
    def tiles(self) -> tuple[int, int]:
        """Of rows and of columns."""
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def scales_per_tile(self) -> int:
        return 0 if self.group == 0 else max(1, TILE_K[self.bits] // self.group)


def lacks(weight: QuantizedWeight, dtype: torch.dtype) -> str:
    """Why the kernels have no such matrix, or not for activations of `dtype`; empty if they have."""
    if dtype not in TYPES:
        return f"its products with integers are of bfloat16 and float16, not of {dtype}"
    inputs, size = weight.q.shape[1], weight.group_size
    has_row_scales = weight.bits == 8 and size == inputs and bool((weight.zeros == weight.zeros[0, 0]).all())
    if size % _NARROW and not (has_row_scales and inputs % 8 == 0):
        return f"groups of {size} of {inputs} inputs are no multiples of {_NARROW}"
    if weight.codebook is not None and (bool(weight.zeros.any()) or size & -size == _NARROW):
        return f"it has no codebook with zero points, nor with groups of {size}"
    return ""


def pack(weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> PackedWeight:
    """Lays W out; tensors stay on their device.

    Scales and zero points keep their values. Groups whose size is no power of two are cut into some that are.

    Raises:
        ValueError: what `lacks` says, or a bias of another shape.
    """
    reason = lacks(weight, dtype)
    if reason:
        raise ValueError(f"pack: {reason}")
    (n, k), bits = weight.q.shape, weight.bits
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"pack: bias is {describe(bias)}, but [{n}] is needed")
    q, zeros = _centred(weight)
    size, tile_k = weight.group_size, TILE_K[bits]
    k_tiles, num_groups = -(-k // tile_k), 0
    if bits == 8 and size == k and zeros is None:
        group, scales = 0, weight.scales[:, 0].float()
    else:
        group = size & -size
        # A tile that reaches behind the last column reads a scale there.
        num_groups = max(k // group, -(-k_tiles * tile_k // group))
        columns = weight.scales[:, :, None] if zeros is None else torch.stack((weight.scales, zeros), 2)
        scales = _by_lane(columns.repeat_interleave(size // group, 1), num_groups, max(1, tile_k // group))
    codebook = None
    if weight.codebook is not None:
        codebook = tuple(weight.codebook.cpu().contiguous().view(torch.int32).tolist())
    return PackedWeight(
        n=n,
        k=k,
        bits=bits,
        group=group,
        num_groups=num_groups,
        dtype=dtype,
        weight=_tiles(q, bits, group == _NARROW, codebook is not None),
        scales=scales,
        has_zeros=zeros is not None,
        codebook=codebook,
        order=weight.order,
        bias=None if bias is None else bias.to(dtype).contiguous(),
    )


def _centred(weight: QuantizedWeight) -> tuple[Tensor, Tensor | None]:
    """The integers, and the zero points; None for those if they are all what the kernel subtracts from the integers.
    Where one other zero point serves all, and the range allows it (3, 5 and 6 bits in 4 and 8), integers are shifted
    so that it is."""
    if weight.codebook is not None:
        return weight.q, None
    centre = float(1 << weight.bits - 1)
    zero = weight.zeros[0, 0]
    shift = centre - float(zero)
    if bool((weight.zeros == zero).all()) and shift == int(shift):
        low, high = int(weight.q.min()) + int(shift), int(weight.q.max()) + int(shift)
        if low >= 0 and high < 1 << weight.bits:
            return (weight.q + int(shift) if shift else weight.q), None
    return weight.q, weight.zeros


def _tiles(q: Tensor, bits: int, is_narrow: bool, has_codebook: bool) -> Tensor:
    """[n, k] uint8 to [n_tiles, k_tiles, 32, 16]. Row = 8 h + g; column = 32 half + 8 t + 4 j + 2 p + e, or with narrow
    groups 32 half + 16 j + 4 t + 2 p + e."""
    (n, k), tile_k = q.shape, TILE_K[bits]
    n_tiles, k_tiles = -(-n // TILE_N), -(-k // tile_k)
    padded = q.new_zeros(n_tiles * TILE_N, k_tiles * tile_k)
    padded[:n, :k] = q
    columns = (2, 4, 2, 2) if is_narrow else (4, 2, 2, 2)
    tiles = padded.view(n_tiles, 2, 8, k_tiles, tile_k // 32, *columns)
    if is_narrow:
        tiles = tiles.transpose(5, 6)
    # [n_tiles 0, h 1, g 2, k_tiles 3, half 4, t 5, j 6, p 7, e 8]
    if bits == 8:  # lane (g, t) holds signed bytes, in byte h + 2 e of word 2 j + p
        laid = tiles.permute(0, 3, 2, 5, 4, 6, 7, 8, 1).contiguous() ^ 0x80
    else:  # in nibble 4 e + 2 p + h of word 2 half + j, or with a codebook in nibble 4 p + 2 e + h
        inner = (7, 8) if has_codebook else (8, 7)
        nibbles = tiles.permute(0, 3, 2, 5, 4, 6, *inner, 1).contiguous()
        laid = nibbles[..., 0] | nibbles[..., 1] << 4
    return laid.reshape(n_tiles, k_tiles, 32, 16)


def _by_lane(values: Tensor, num_groups: int, per_tile: int) -> Tensor:
    """[n, groups, width] to [n_tiles, num_groups / per_tile, 8, per_tile, width, 2], padded with zeros: what a lane
    reads for a tile of W, rows g and g + 8 of its groups, lies in one piece."""
    n, groups, width = values.shape
    n_tiles = -(-n // TILE_N)
    padded = values.new_zeros(n_tiles * TILE_N, num_groups, width)
    padded[:n, :groups] = values
    tiles = padded.view(n_tiles, 2, 8, num_groups // per_tile, per_tile, width)
    return tiles.permute(0, 3, 2, 4, 5, 1).contiguous()
