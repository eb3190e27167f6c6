"""Products with int8 and int4 weights for 1 to 8 rows of activations: y = x W^T + bias, in float32 sums.

`pack` lays plain integers out for the kernel once; `gemv` multiplies. The layout is described in cuda/gemv.cu. A row's
result does not depend on the other rows of x, nor on their number: the split of the columns is chosen from the shape of
W and the device alone.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from millrace.kernels.arguments import describe
from millrace.kernels.cuda_compile import Kernel
from millrace.kernels.cuda_launch import Launcher

MAX_ROWS = 8
TYPES = {torch.bfloat16: "bf16", torch.float16: "f16"}
_THREADS = 256
_WARPS = _THREADS // 32
_TILE_N = 16
_TILE_K = {4: 64, 8: 32}
_MIN_TILES_PER_WARP = 2  # a split of less has no loads to overlap

PARAMS_DTYPE = np.dtype(
    [(name, "u8") for name in ("x", "weight", "group_scales", "zeros", "row_scales", "bias", "y", "partial",
                               "arrivals")]
    + [(name, "i8") for name in ("x_stride", "y_stride")]
    + [(name, "i4") for name in ("m", "n", "k", "k_tiles", "split_tiles", "num_groups", "group_shift")],
    align=True,
)  # fmt: skip


def gemv_kernel(dtype: torch.dtype, bits: int, scales_per_tile: int, has_zeros: bool) -> Kernel:
    defines = (
        ("MR_T", TYPES[dtype]), ("MR_BITS", str(bits)), ("MR_GROUPS", str(scales_per_tile)),
        ("MR_ZEROS", str(int(has_zeros))),
    )  # fmt: skip
    return Kernel("gemv.cu", "mr_gemv", defines, max_registers=80)


def kernels() -> Iterable[Kernel]:
    """Every variant that can be launched."""
    for dtype in TYPES:
        for bits, groups, zeros in ((8, 0, False), (8, 1, False), (4, 1, False), (4, 2, False), (4, 1, True),
                                    (4, 2, True)):  # fmt: skip
            yield gemv_kernel(dtype, bits, groups, zeros)


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A quantised W [n, k], laid out for the kernel by `pack`.

    Attributes:
        bits: 4 or 8.
        group: columns that share a scale; 0 if each row has one scale.
        dtype: of activations, scales and result.
        weight: [n_tiles, k_tiles, 32, 16] uint8.
        num_groups: along the columns, with those of padded columns.
        scales: [n_tiles, num_groups / j, 8, j, 2] of dtype, where j = scales_per_tile; [n] float32 with group 0.
        zeros: as the scales, uint8; or None: symmetric.
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
    zeros: Tensor | None
    bias: Tensor | None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.weight, self.scales, self.zeros, self.bias) if t is not None)

    @property
    def scales_per_tile(self) -> int:
        return 0 if self.group == 0 else 2 if self.group < _TILE_K[self.bits] else 1


def pack(
    quantised: Tensor,
    scales: Tensor,
    dtype: torch.dtype,
    *,
    bits: int,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
) -> PackedWeight:
    """Lays W out for the kernel: W[i, j] = scales[i, g] * (quantised[i, j] - zero), with g the group of column j.

    Args:
        quantised: [n, k] int8: -128 to 127 with 8 bits; 0 to 15 with 4 bits. k is a multiple of 8.
        scales: [n] for one scale per row (8 bits only; kept in float32), or [n, k / group] with groups of 32, 64, 128,
            ... columns, the last one possibly short; these are rounded to `dtype`.
        dtype: bfloat16 or float16, of activations and result.
        bits: 8, whose zero is 0; or 4, whose zero is 8 unless `zeros` are given.
        zeros: [n, k / group], 0 to 15, for 4 bits.
        bias: [n].

    Raises:
        ValueError: shapes that do not fit, or integers outside of their range.
    """
    if bits not in _TILE_K or dtype not in TYPES:
        raise ValueError(f"pack: {bits} bits for {dtype}, but 4 or 8 bits for bfloat16 or float16 are served")
    if quantised.dim() != 2 or quantised.dtype != torch.int8 or quantised.shape[1] % 8 or 0 in quantised.shape:
        raise ValueError(f"pack: weights are {describe(quantised)}, but int8 [n, multiple of 8] is needed")
    n, k = quantised.shape
    low, high = int(quantised.min()), int(quantised.max())
    if bits == 4 and not 0 <= low <= high <= 15:
        raise ValueError(f"pack: 4-bit weights reach from {low} to {high}, but 0 to 15 is their range")
    group = _group("pack", scales, n, k, bits)
    if zeros is not None and (bits != 4 or zeros.shape != scales.shape or not 0 <= zeros.min() <= zeros.max() <= 15):
        raise ValueError(f"pack: zeros are {describe(zeros)}, but 4-bit weights have one per scale, 0 to 15")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"pack: bias is {describe(bias)}, but [{n}] is needed")
    tile_k = _TILE_K[bits]
    n_tiles, k_tiles = -(-n // _TILE_N), -(-k // tile_k)
    padded = quantised.new_zeros(n_tiles * _TILE_N, k_tiles * tile_k)
    padded[:n, :k] = quantised
    if bits == 8:
        # Row = 8 h + g, column = 8 t + 4 j + 2 p + e: lane (g, t) holds it in byte h + 2 e of word 2 j + p.
        tiles = padded.view(n_tiles, 2, 8, k_tiles, 4, 2, 2, 2)  # [n_tiles, h, g, k_tiles, t, j, p, e]
        weight = tiles.permute(0, 3, 2, 4, 5, 6, 7, 1).contiguous().view(torch.uint8)
    else:
        # Row = 8 h + g, column = 32 half + 8 t + 4 j + 2 p + e: nibble 4 e + 2 p + h of word 2 half + j.
        tiles = padded.view(n_tiles, 2, 8, k_tiles, 2, 4, 2, 2, 2)  # [n_tiles, h, g, k_tiles, half, t, j, p, e]
        nibbles = tiles.permute(0, 3, 2, 5, 4, 6, 8, 7, 1).contiguous().view(torch.uint8)
        weight = nibbles[..., 0] | nibbles[..., 1] << 4
    laid_zeros, num_groups = None, 0
    if group == 0:
        laid_scales = scales.float().contiguous()
    else:
        # A tile that reaches behind the last column reads a scale there.
        num_groups = max(scales.shape[1], -(-k_tiles * tile_k // group))
        per_tile = 2 if group < tile_k else 1
        laid_scales = _by_lane(scales.to(dtype), n_tiles, num_groups, per_tile)
        laid_zeros = None if zeros is None else _by_lane(zeros.to(torch.uint8), n_tiles, num_groups, per_tile)
    return PackedWeight(
        n=n,
        k=k,
        bits=bits,
        group=group,
        num_groups=num_groups,
        dtype=dtype,
        weight=weight.reshape(n_tiles, k_tiles, 32, 16),
        scales=laid_scales,
        zeros=laid_zeros,
        bias=None if bias is None else bias.to(dtype).contiguous(),
    )


def _group(op: str, scales: Tensor, n: int, k: int, bits: int) -> int:
    if scales.dim() == 1 and scales.shape[0] == n and bits == 8:
        return 0
    if scales.dim() == 2 and scales.shape[0] == n and scales.shape[1] > 0:
        for group in (32 << i for i in range(16)):
            if -(-k // group) == scales.shape[1]:
                return group
    wanted = f"[{n}, {k} / group] for a group of 32, 64, 128, ...{f', or [{n}]' if bits == 8 else ''}"
    raise ValueError(f"{op}: scales are {describe(scales)}, but {wanted} is needed")


def _by_lane(values: Tensor, n_tiles: int, num_groups: int, per_tile: int) -> Tensor:
    """[n, groups] to [n_tiles, num_groups / per_tile, 8, per_tile, 2], padded with zeros: what a lane reads for a tile
    of W, rows g and g + 8 of its groups, lies in one piece."""
    padded = values.new_zeros(n_tiles * _TILE_N, num_groups)
    padded[: values.shape[0], : values.shape[1]] = values
    tiles = padded.view(n_tiles, 2, 8, num_groups // per_tile, per_tile)
    return tiles.permute(0, 3, 2, 4, 1).contiguous()


class GemvWorkspace(NamedTuple):
    """Scratch of the products whose columns are split over thread blocks; one stream at a time may use it.

    Attributes:
        partial: [size] float32.
        arrivals: [n_tiles] int32, zero between launches.
    """

    partial: Tensor
    arrivals: Tensor

    @classmethod
    def allocate(cls, launcher: Launcher, weights: Iterable[PackedWeight]) -> "GemvWorkspace | None":
        """Enough for any of the weights; None if there are none."""
        all_weights = list(weights)
        if not all_weights:
            return None
        splits = [(_splits(launcher, one), one.weight.shape[0]) for one in all_weights]
        partial = max((count * tiles * _TILE_N * MAX_ROWS for count, tiles in splits if count > 1), default=0)
        device = all_weights[0].weight.device
        return cls(
            torch.empty(partial, dtype=torch.float32, device=device),
            torch.zeros(max(tiles for _, tiles in splits), dtype=torch.int32, device=device),
        )


def _splits(launcher: Launcher, weight: PackedWeight) -> int:
    """Parts of the columns. From shape and device alone, so that a row's sums do not depend on the batch."""
    n_tiles, k_tiles = weight.weight.shape[:2]
    if n_tiles >= launcher.sm_count:
        return 1
    wanted = -(-2 * launcher.sm_count // n_tiles)
    return max(1, min(wanted, k_tiles // (_WARPS * _MIN_TILES_PER_WARP)))


def gemv(
    launcher: Launcher,
    x: Tensor,
    weight: PackedWeight,
    *,
    out: Tensor | None = None,
    workspace: GemvWorkspace | None = None,
    stream: int,
) -> Tensor:
    """x @ W.T + bias.

    Args:
        x: [m, k] of the weight's dtype, m from 1 to 8; rows may lie apart, by a multiple of 8 elements.
        out: [m, n] of the same dtype, with neighbouring columns; a new tensor if None.
        workspace: needed in a graph; allocated and cleared for this call if None.

    Raises:
        ValueError: a wrong shape, dtype, device or layout.
    """
    if x.dim() != 2 or not 1 <= x.shape[0] <= MAX_ROWS or x.shape[1] != weight.k or x.dtype != weight.dtype:
        raise ValueError(f"gemv: x is {describe(x)}, but {weight.dtype} [1 to {MAX_ROWS}, {weight.k}] is needed")
    m = x.shape[0]
    if x.stride(1) != 1 or (m > 1 and x.stride(0) % 8) or x.data_ptr() % 16:
        raise ValueError(
            f"gemv: x has strides {x.stride()} at address {x.data_ptr():#x}, but neighbouring columns and rows at "
            "multiples of 16 bytes are needed"
        )
    if out is None:
        out = torch.empty(m, weight.n, dtype=weight.dtype, device=x.device)
    if out.shape != (m, weight.n) or out.dtype != weight.dtype or (weight.n > 1 and out.stride(1) != 1):
        raise ValueError(f"gemv: out is {describe(out)}, but {weight.dtype} [{m}, {weight.n}] is needed")
    splits = _splits(launcher, weight)
    if splits > 1 and workspace is None:
        workspace = GemvWorkspace.allocate(launcher, [weight])
    n_tiles, k_tiles = weight.weight.shape[:2]
    if splits > 1 and workspace is not None:
        needed = splits * n_tiles * _TILE_N * MAX_ROWS
        if workspace.partial.numel() < needed or workspace.arrivals.numel() < n_tiles:
            raise ValueError(
                f"gemv: the workspace has {workspace.partial.numel()} floats and {workspace.arrivals.numel()} "
                f"counters, but this weight needs {needed} and {n_tiles}"
            )
    tensors: dict[str, Tensor | None] = {
        "x": x,
        "weight": weight.weight,
        "group_scales": weight.scales if weight.group else None,
        "zeros": weight.zeros,
        "row_scales": None if weight.group else weight.scales,
        "bias": weight.bias,
        "y": out,
        "partial": workspace.partial if splits > 1 and workspace is not None else None,
        "arrivals": workspace.arrivals if splits > 1 and workspace is not None else None,
    }
    params: Any = np.zeros((), PARAMS_DTYPE)
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device.type != launcher.device_type or tensor.device != x.device:
            raise ValueError(f"gemv: {name} is on {tensor.device}, x on {x.device}, but both must be on one "
                             f"{launcher.device_type} device")  # fmt: skip
        params[name] = tensor.data_ptr()
    split_tiles = -(-k_tiles // splits)
    splits = -(-k_tiles // split_tiles)  # no split without a tile
    params["x_stride"], params["y_stride"] = x.stride(0), out.stride(0)
    params["m"], params["n"], params["k"] = m, weight.n, weight.k
    params["k_tiles"], params["split_tiles"] = k_tiles, split_tiles
    if weight.group:
        params["num_groups"] = weight.num_groups
        params["group_shift"] = max(0, (weight.group // _TILE_K[weight.bits]).bit_length() - 1)
    kernel = gemv_kernel(weight.dtype, weight.bits, weight.scales_per_tile, weight.zeros is not None)
    launcher.launch(kernel, (n_tiles, splits, 1), _THREADS, params[()], stream=stream)
    return out
