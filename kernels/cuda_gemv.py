"""Products with weights of 8 and 4 bits: y = x W^T + bias for 1 to 8 rows of activations, in float32 sums; and the
weights as rows of 16-bit floats.

`pack` lays a matrix out for the kernels once; `gemv` multiplies, `dequantise` widens. The layout is described in
cuda/gemv.cu. A row's result does not depend on the other rows of x, nor on their number: the split of the columns is
chosen from the shape of W and the device alone.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from millrace.kernels.arguments import describe
from millrace.kernels.cuda_compile import Kernel
from millrace.kernels.cuda_gemv_pack import TILE_K, TILE_N, TYPES, PackedWeight, lacks, pack
from millrace.kernels.cuda_launch import Launcher

__all__ = ["MAX_ROWS", "GemvWorkspace", "PackedWeight", "dequantise", "gemv", "kernels", "lacks", "pack",
           "weight_kernels", "workspace_size"]  # fmt: skip

MAX_ROWS = 8
_THREADS = 256
_WARPS = _THREADS // 32
_MIN_TILES_PER_WARP = 2  # a split of less has no loads to overlap

_MATRIX = np.dtype(
    [(name, "u8") for name in ("weight", "group_scales", "row_scales")]
    + [("codebook", "i4", (4,))]
    + [(name, "i4") for name in ("n", "k", "k_tiles", "num_groups", "group_shift")],
    align=True,
)
_GEMV_PARAMS = np.dtype(
    [("w", _MATRIX)]
    + [(name, "u8") for name in ("x", "bias", "y", "partial", "arrivals")]
    + [(name, "i8") for name in ("x_stride", "y_stride")]
    + [(name, "i4") for name in ("m", "split_tiles")],
    align=True,
)
_DEQUANTISE_PARAMS = np.dtype(
    [("w", _MATRIX), ("tokens", "u8"), ("out", "u8"), ("num_rows", "i4"), ("first_tile", "i4")], align=True
)


def _variant(
    name: str, dtype: torch.dtype, bits: int, scales_per_tile: int, has_zeros: bool, has_codebook: bool
) -> Kernel:
    defines = (
        ("MR_T", TYPES[dtype]), ("MR_BITS", str(bits)), ("MR_GROUPS", str(scales_per_tile)),
        ("MR_ZEROS", str(int(has_zeros))), ("MR_CODEBOOK", str(int(has_codebook))),
    )  # fmt: skip
    return Kernel("gemv.cu", name, defines, max_registers=128 if scales_per_tile * (1 + has_zeros) == 8 else 80)


_NAMES = ("mr_gemv", "mr_dequantise")


def weight_kernels(weight: PackedWeight) -> tuple[Kernel, ...]:
    """What products with the weight launch."""
    is_coded = weight.codebook is not None
    return tuple(
        _variant(name, weight.dtype, weight.bits, weight.scales_per_tile, weight.has_zeros, is_coded) for name in _NAMES
    )


def kernels() -> Iterable[Kernel]:
    """Every variant that can be launched."""
    variants = [(8, groups, zeros, False) for groups in (0, 1, 2) for zeros in (False, True) if groups or not zeros]
    variants += [(4, groups, zeros, False) for groups in (1, 2, 4) for zeros in (False, True)]
    variants += [(4, groups, False, True) for groups in (1, 2)]
    for dtype in TYPES:
        for variant in variants:
            for name in _NAMES:
                yield _variant(name, dtype, *variant)


class GemvWorkspace(NamedTuple):
    """Scratch of the products whose columns are split over thread blocks; one stream at a time may use it.

    Attributes:
        partial: [size] float32.
        arrivals: [n_tiles] int32, zero between launches.
    """

    partial: Tensor
    arrivals: Tensor

    @classmethod
    def allocate(cls, size: tuple[int, int], device: torch.device) -> "GemvWorkspace":
        """`size` is the largest `workspace_size` of the weights, part by part."""
        return cls(
            torch.empty(size[0], dtype=torch.float32, device=device),
            torch.zeros(size[1], dtype=torch.int32, device=device),
        )

    def holds(self, size: tuple[int, int]) -> bool:
        return self.partial.numel() >= size[0] and self.arrivals.numel() >= size[1]


def workspace_size(launcher: Launcher, weight: PackedWeight) -> tuple[int, int]:
    """Floats and counters that products with the weight need; (0, 0) if its columns are not split."""
    splits, n_tiles = _splits(launcher, weight), weight.weight.shape[0]
    return (splits * n_tiles * TILE_N * MAX_ROWS, n_tiles) if splits > 1 else (0, 0)


def _splits(launcher: Launcher, weight: PackedWeight) -> int:
    """Parts of the columns. From shape and device alone, so that a row's sums do not depend on the batch."""
    n_tiles, k_tiles = weight.weight.shape[:2]
    if n_tiles >= 2 * launcher.sm_count:  # a wave has three thread blocks on each
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
        x: [m, k] of the weight's dtype, m from 1 to 8, in the order of the weight's columns; rows may lie apart, by a
            multiple of 8 elements.
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
    needed = workspace_size(launcher, weight)
    if not any(needed):
        workspace = None
    elif workspace is None:
        workspace = GemvWorkspace.allocate(needed, x.device)
    elif not workspace.holds(needed):
        raise ValueError(
            f"gemv: the workspace has {workspace.partial.numel()} floats and {workspace.arrivals.numel()} "
            f"counters, but this weight needs {needed[0]} and {needed[1]}"
        )
    n_tiles, k_tiles = weight.weight.shape[:2]
    split_tiles = -(-k_tiles // _splits(launcher, weight))
    params: Any = np.zeros((), _GEMV_PARAMS)
    _fill("gemv", launcher, params, weight, x.device, {
        "x": x,
        "bias": weight.bias,
        "y": out,
        "partial": None if workspace is None else workspace.partial,
        "arrivals": None if workspace is None else workspace.arrivals,
    })  # fmt: skip
    params["x_stride"], params["y_stride"] = x.stride(0), out.stride(0)
    params["m"], params["split_tiles"] = m, split_tiles
    grid = (n_tiles, -(-k_tiles // split_tiles), 1)  # no split without a tile
    launcher.launch(weight_kernels(weight)[0], grid, _THREADS, params[()], stream=stream)
    return out


def dequantise(
    launcher: Launcher, weight: PackedWeight, rows: Tensor | range, *, out: Tensor | None = None, stream: int
) -> Tensor:
    """Rows of W, each weight rounded once, with columns in the weight's own order.

    Args:
        rows: a range with step 1 that starts at a multiple of 16, or [num_rows] int64 on the device, whose rows outside
            of W are left as they are in `out`.
        out: [num_rows, k] of the weight's dtype, contiguous; a new tensor if None.

    Raises:
        ValueError: a wrong shape, dtype, device or layout.
    """
    device = weight.weight.device
    if isinstance(rows, range):
        if rows.step != 1 or rows.start % TILE_N or not 0 <= rows.start <= rows.stop <= weight.n:
            raise ValueError(f"dequantise: rows are {rows}, but a start at a multiple of {TILE_N} and an end of at most"
                             f" {weight.n} are needed")  # fmt: skip
    elif rows.dim() != 1 or rows.dtype != torch.int64 or not rows.is_contiguous():
        raise ValueError(f"dequantise: rows are {describe(rows)}, but contiguous int64 [num_rows] is needed")
    shape = (len(rows), weight.k)
    if out is None:
        out = torch.empty(shape, dtype=weight.dtype, device=device)
    if out.shape != shape or out.dtype != weight.dtype or not out.is_contiguous() or out.data_ptr() % 16:
        raise ValueError(f"dequantise: out is {describe(out)}, but {weight.dtype} {list(shape)} is needed")
    if not len(rows):
        return out
    params: Any = np.zeros((), _DEQUANTISE_PARAMS)
    tokens = None if isinstance(rows, range) else rows
    _fill("dequantise", launcher, params, weight, device, {"tokens": tokens, "out": out})
    params["num_rows"] = len(rows)
    params["first_tile"] = rows.start // TILE_N if isinstance(rows, range) else 0
    num_tiles = -(-len(rows) // TILE_N) if isinstance(rows, range) else len(rows)
    grid = (num_tiles, -(-weight.weight.shape[1] // _WARPS), 1)
    launcher.launch(weight_kernels(weight)[1], grid, _THREADS, params[()], stream=stream)
    return out


def _fill(
    op: str,
    launcher: Launcher,
    params: Any,
    weight: PackedWeight,
    device: torch.device,
    tensors: Mapping[str, Tensor | None],
) -> None:
    """Puts the weight's and the named tensors' addresses and sizes into an argument record."""
    matrix = {
        "weight": weight.weight,
        "group_scales": weight.scales if weight.group else None,
        "row_scales": None if weight.group else weight.scales,
    }
    for record, named in ((params, tensors), (params["w"], matrix)):
        for name, tensor in named.items():
            if tensor is None:
                continue
            if tensor.device.type != launcher.device_type or tensor.device != device:
                raise ValueError(f"{op}: {name} is on {tensor.device}, the others on {device}, but all must be on one "
                                 f"{launcher.device_type} device")  # fmt: skip
            record[name] = tensor.data_ptr()
    into = params["w"]
    into["n"], into["k"], into["k_tiles"] = weight.n, weight.k, weight.weight.shape[1]
    if weight.codebook is not None:
        into["codebook"] = weight.codebook
    if weight.group:
        into["num_groups"] = weight.num_groups
        into["group_shift"] = max(0, (weight.group // TILE_K[weight.bits]).bit_length() - 1)
