"""Products with weights of 8 bits that lie row by row, FP8 and integers: y = x W^T + bias for 1 to 8 rows of
activations, in float32 sums; and the weights as rows of 16-bit floats.

The layout is the one that torch's products of 8 bits by 8 bits take (`cuda_rounded`), so that small and large batches
read the same bytes. `gemv` is described in cuda/gemv_rows.cu; a row's result does not depend on the other rows of x.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from millrace.kernels.arguments import describe
from millrace.kernels.cuda_compile import Kernel
from millrace.kernels.cuda_gemv_common import THREADS, TILE_N, GemvWorkspace, fill, prepare
from millrace.kernels.cuda_gemv_pack import TYPES
from millrace.kernels.cuda_launch import Launcher
from millrace.kernels.quantized import Float8Weight, QuantizedWeight

CODES = {torch.float8_e4m3fn: "fp8", torch.int8: "int8"}
_TILE_K = 64
_ALIGN = 16  # bytes that a row is a multiple of
_COLUMNS = 16 * THREADS  # of a row that a thread block widens

_MATRIX = np.dtype(
    [(name, "u8") for name in ("codes", "scales")]
    + [("stride", "i8")]
    + [(name, "i4") for name in ("n", "k", "k_tiles", "group_shift")],
    align=True,
)
_GEMV_PARAMS = np.dtype(
    [("w", _MATRIX)]
    + [(name, "u8") for name in ("x", "bias", "y", "partial", "arrivals")]
    + [(name, "i8") for name in ("x_stride", "y_stride")]
    + [(name, "i4") for name in ("m", "split_tiles")],
    align=True,
)
_WIDEN_PARAMS = np.dtype([("w", _MATRIX), ("tokens", "u8"), ("out", "u8"), ("first_row", "i8")], align=True)


@dataclass(frozen=True, eq=False)
class RowsWeight:
    """W [n, k] of scale * code, made by `pack_float8` and `pack_integers`.

    Attributes:
        group: columns that share a scale, a power of two of at least 64; 0 if each row has one scale.
        dtype: of activations and result.
        codes: [n, k] float8_e4m3fn or int8, with zeros behind k up to a multiple of 16.
        scales: [n] float32; with a group [groups, n].
        bias: [n] of dtype, or None.
        is_w8a8: activations are to be rounded to 8 bits as well, where a product of such is there.
    """

    n: int
    k: int
    group: int
    dtype: torch.dtype
    codes: Tensor
    scales: Tensor
    bias: Tensor | None
    is_w8a8: bool

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.codes, self.scales, self.bias) if t is not None)

    @property
    def tiles(self) -> tuple[int, int]:
        """Of rows and of columns."""
        return -(-self.n // TILE_N), -(-self.k // _TILE_K)


def lacks(weight: Float8Weight, dtype: torch.dtype) -> str:
    """Why the kernels have no such matrix, or not for activations of `dtype`; empty if they have."""
    if dtype not in TYPES:
        return f"its products with 8 bits are of bfloat16 and float16, not of {dtype}"
    inputs, size = weight.codes.shape[1], weight.group_size
    if inputs % 8:
        return f"{inputs} inputs are no multiple of 8"
    if size < inputs and size % _TILE_K:
        return f"groups of {size} of {inputs} inputs are no multiples of {_TILE_K}"
    return ""


def pack_float8(weight: Float8Weight, bias: Tensor | None, dtype: torch.dtype) -> RowsWeight:
    """Tensors stay on their device, and codes where they are if their rows begin at multiples of 16 bytes.

    Raises:
        ValueError: what `lacks` says, or a bias of another shape.
    """
    reason = lacks(weight, dtype)
    if reason:
        raise ValueError(f"pack_float8: {reason}")
    inputs, size = weight.codes.shape[1], weight.group_size
    if size >= inputs:
        return _packed(weight.codes, weight.scales[:, 0].contiguous(), 0, bias, dtype, weight.is_w8a8)
    group = size & -size  # a power of two
    scales = weight.scales.repeat_interleave(size // group, 1)[:, : -(-inputs // group)]
    return _packed(weight.codes, scales.t().contiguous(), group, bias, dtype, weight.is_w8a8)


def are_row_scaled(weight: QuantizedWeight) -> bool:
    """Whether the integers are what int8 is commonly: of 8 bits, symmetric, with one scale for each output."""
    is_plain = weight.bits == 8 and weight.codebook is None and weight.order is None
    return is_plain and weight.scales.shape[1] == 1 and bool((weight.zeros == 128).all())


def pack_integers(weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> RowsWeight:
    """The same for integers of 8 bits.

    Raises:
        ValueError: they have groups, zero points, a codebook or an order; no such dtype; or a bias of another shape.
    """
    if not are_row_scaled(weight) or dtype not in TYPES or weight.q.shape[1] % 8:
        raise ValueError(
            "pack_integers: symmetric integers of 8 bits with one scale for each row of q, as long as a multiple"
            f" of 8, are needed for bfloat16 or float16, but q is {describe(weight.q)} with {weight.scales.shape[1]}"
            f" scales for {dtype}"
        )
    codes = (weight.q ^ 0x80).view(torch.int8)
    return _packed(codes, weight.scales[:, 0].float(), 0, bias, dtype, weight.is_w8a8)


def _packed(
    codes: Tensor, scales: Tensor, group: int, bias: Tensor | None, dtype: torch.dtype, is_w8a8: bool
) -> RowsWeight:
    n, k = codes.shape
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"pack: bias is {describe(bias)}, but [{n}] is needed")
    if k % _ALIGN or not codes.is_contiguous() or codes.data_ptr() % _ALIGN:
        held = torch.zeros(n, -(-k // _ALIGN) * _ALIGN, dtype=torch.uint8, device=codes.device)
        held[:, :k] = codes.view(torch.uint8)
        codes = held.view(codes.dtype)
    bias = None if bias is None else bias.to(dtype).contiguous()
    return RowsWeight(n, k, group, dtype, codes, scales, bias, is_w8a8)


def _variant(name: str, dtype: torch.dtype, codes: torch.dtype, has_groups: bool) -> Kernel:
    defines = (("MR_T", TYPES[dtype]), ("MR_CODE", CODES[codes]), ("MR_GROUPS", str(int(has_groups))))
    return Kernel("gemv_rows.cu", name, defines, 80 if name == "mr_gemv_rows" else 40)


_NAMES = ("mr_gemv_rows", "mr_widen_rows")


def weight_kernels(weight: RowsWeight) -> tuple[Kernel, ...]:
    """What `gemv` and `widen` launch."""
    return tuple(_variant(name, weight.dtype, weight.codes.dtype, weight.group > 0) for name in _NAMES)


def kernels() -> Iterable[Kernel]:
    """Every variant that can be launched."""
    for dtype in TYPES:
        for codes, has_groups in ((torch.float8_e4m3fn, False), (torch.float8_e4m3fn, True), (torch.int8, False)):
            for name in _NAMES:
                yield _variant(name, dtype, codes, has_groups)


def gemv(
    launcher: Launcher,
    x: Tensor,
    weight: RowsWeight,
    *,
    out: Tensor | None = None,
    workspace: GemvWorkspace | None = None,
    stream: int,
) -> Tensor:
    """x @ W.T + bias, as `cuda_gemv.gemv`."""
    call = prepare("gemv_rows", launcher, x, weight, out, workspace)
    params: Any = np.zeros((), _GEMV_PARAMS)
    _fill("gemv_rows", launcher, params, weight, {
        "x": x, "bias": weight.bias, "y": call.out, "partial": call.partial, "arrivals": call.arrivals,
    })  # fmt: skip
    params["x_stride"], params["y_stride"] = x.stride(0), call.out.stride(0)
    params["m"], params["split_tiles"] = x.shape[0], call.split_tiles
    launcher.launch(weight_kernels(weight)[0], call.grid, THREADS, params[()], stream=stream)
    return call.out


def widen(
    launcher: Launcher, weight: RowsWeight, rows: Tensor | range, *, out: Tensor | None = None, stream: int
) -> Tensor:
    """Rows of W, each weight rounded once.

    Args:
        rows: a range with step 1, or [num_rows] int64 on the device, whose rows outside of W are left as they are in
            `out`.
        out: [num_rows, k] of the weight's dtype, contiguous; a new tensor if None.

    Raises:
        ValueError: a wrong shape, dtype, device or layout.
    """
    device = weight.codes.device
    if isinstance(rows, range):
        if rows.step != 1 or not 0 <= rows.start <= rows.stop <= weight.n:
            raise ValueError(f"widen: rows are {rows}, but some of 0 to {weight.n} with step 1 are needed")
    elif rows.dim() != 1 or rows.dtype != torch.int64 or not rows.is_contiguous():
        raise ValueError(f"widen: rows are {describe(rows)}, but contiguous int64 [num_rows] is needed")
    shape = (len(rows), weight.k)
    if out is None:
        out = torch.empty(shape, dtype=weight.dtype, device=device)
    if out.shape != shape or out.dtype != weight.dtype or not out.is_contiguous() or out.data_ptr() % 16:
        raise ValueError(f"widen: out is {describe(out)}, but {weight.dtype} {list(shape)} is needed")
    if not len(rows):
        return out
    params: Any = np.zeros((), _WIDEN_PARAMS)
    _fill("widen", launcher, params, weight, {"tokens": None if isinstance(rows, range) else rows, "out": out})
    params["first_row"] = rows.start if isinstance(rows, range) else 0
    grid = (len(rows), -(-weight.k // _COLUMNS), 1)
    launcher.launch(weight_kernels(weight)[1], grid, THREADS, params[()], stream=stream)
    return out


def _fill(op: str, launcher: Launcher, params: Any, weight: RowsWeight, tensors: dict[str, Tensor | None]) -> None:
    device, into = weight.codes.device, params["w"]
    fill(op, launcher, device, params, tensors)
    fill(op, launcher, device, into, {"codes": weight.codes, "scales": weight.scales})
    into["n"], into["k"], into["k_tiles"] = weight.n, weight.k, weight.tiles[1]
    into["stride"] = weight.codes.shape[1]
    into["group_shift"] = max(0, (weight.group // _TILE_K).bit_length() - 1)
