"""Products with weights of 8 and 4 bits: y = x W^T + bias for 1 to 8 rows of activations, in float32 sums; and the
weights as rows of 16-bit floats.

`pack` lays a matrix out for the kernels once; `gemv` multiplies, `dequantise` widens. The layout is described in
cuda/gemv.cu. A row's result does not depend on the other rows of x, nor on their number: the split of the columns is
chosen from the shape of W and the device alone.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from millrace.kernels.arguments import describe
from millrace.kernels.cuda_compile import Kernel
from millrace.kernels.cuda_gemv_common import (
    THREADS,
    TILE_N,
    WARPS,
    GemvWorkspace,
    fill,
    prepare,
)
from millrace.kernels.cuda_gemv_pack import TILE_K, TYPES, PackedWeight, lacks, pack
from millrace.kernels.cuda_launch import Launcher

__all__ = ["PackedWeight", "dequantise", "gemv", "kernels", "lacks", "pack", "weight_kernels"]

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
    call = prepare("gemv", launcher, x, weight, out, workspace)
    params: Any = np.zeros((), _GEMV_PARAMS)
    _fill("gemv", launcher, params, weight, x.device, {
        "x": x,
        "bias": weight.bias,
        "y": call.out,
        "partial": call.partial,
        "arrivals": call.arrivals,
    })  # fmt: skip
    params["x_stride"], params["y_stride"] = x.stride(0), call.out.stride(0)
    params["m"], params["split_tiles"] = x.shape[0], call.split_tiles
    launcher.launch(weight_kernels(weight)[0], call.grid, THREADS, params[()], stream=stream)
    return call.out


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
    grid = (num_tiles, -(-weight.tiles[1] // WARPS), 1)
    launcher.launch(weight_kernels(weight)[1], grid, THREADS, params[()], stream=stream)
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
    into = params["w"]
    fill(op, launcher, device, params, tensors)
    fill(op, launcher, device, into, matrix)
    into["n"], into["k"], into["k_tiles"] = weight.n, weight.k, weight.tiles[1]
    if weight.codebook is not None:
        into["codebook"] = weight.codebook
    if weight.group:
        into["num_groups"] = weight.num_groups
        into["group_shift"] = max(0, (weight.group // TILE_K[weight.bits]).bit_length() - 1)
