"""Products whose both sides have 8 bits, by torch: activations are rounded row by row, with a scale for each.

`torch._scaled_mm` multiplies FP8 with a scale for each row of both (compute capability 8.9 and later), `torch._int_mm`
integers. What they ask for is in aten/src/ATen/native/cuda/{ScaledBlas,Blas}.cpp of PyTorch: the second matrix
column-major, its sizes multiples of 16 (FP8) or 8 (integers), more than 16 rows of integers. Releases differ in which
devices and types they serve, so a small product is tried before a matrix relies on them.
"""

import functools
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from millrace.kernels.arguments import describe
from millrace.kernels.cuda_compile import Kernel
from millrace.kernels.cuda_gemv_common import fill
from millrace.kernels.cuda_gemv_pack import TYPES
from millrace.kernels.cuda_gemv_rows import CODES, RowsWeight
from millrace.kernels.cuda_launch import Launcher

LEAST_ROWS = 17  # of _int_mm
SUMS_BYTES = 32 << 20  # of integer sums at a time, which are then read back from the L2
_MOST_INPUTS = 1 << 17  # times 127 * 128 is what int32 holds
_THREADS = 256

_ROUND = np.dtype([("x", "u8"), ("codes", "u8"), ("scales", "u8"), ("k", "i4")], align=True)
_SCALE = np.dtype(
    [(name, "u8") for name in ("sums", "rows", "columns", "bias", "y")] + [("y_stride", "i8"), ("n", "i4")], align=True
)


def _variant(name: str, dtype: torch.dtype, codes: torch.dtype) -> Kernel:
    return Kernel("round_rows.cu", name, (("MR_T", TYPES[dtype]), ("MR_CODE", CODES[codes])), 48)


def kernels() -> Iterable[Kernel]:
    """Every variant that can be launched."""
    for dtype in TYPES:
        for codes in CODES:
            yield _variant("mr_round_rows", dtype, codes)
        yield _variant("mr_scale_sums", dtype, torch.int8)


def weight_kernels(weight: RowsWeight) -> tuple[Kernel, ...]:
    """What products of rounded activations with the weight launch beside torch's."""
    names = ("mr_round_rows", "mr_scale_sums") if weight.codes.dtype == torch.int8 else ("mr_round_rows",)
    return tuple(_variant(name, weight.dtype, weight.codes.dtype) for name in names)


def serves(weight: RowsWeight) -> bool:
    """Whether `multiply` has the weight, on its device."""
    if weight.group or weight.n % 16 or weight.k % 16 or weight.k > _MOST_INPUTS:
        return False
    return _torch_multiplies(weight.codes.device, weight.codes.dtype, weight.dtype, weight.bias is not None)


@functools.cache
def _torch_multiplies(device: torch.device, codes: torch.dtype, dtype: torch.dtype, has_bias: bool) -> bool:
    """Whether a small product comes out right: rows, columns and bias each count."""
    rows, columns = torch.arange(1.0, 33, device=device), torch.arange(1.0, 17, device=device)
    x, weight = (torch.ones(size, 16, device=device).to(codes) for size in (32, 16))
    bias = columns.to(dtype) if has_bias else None
    try:
        if codes == torch.int8:
            y = torch._int_mm(x, weight.t()) * rows[:, None] * columns
        else:
            y = _scaled_product(x, rows, weight, columns, bias, rows.new_empty(32, 16, dtype=dtype))
    except torch.OutOfMemoryError:
        raise  # which says nothing about products, and must not be remembered as if it did
    except (RuntimeError, ValueError, NotImplementedError):
        return False
    wanted = 16 * rows[:, None] * columns
    if bias is not None and codes != torch.int8:
        wanted += columns
    return bool(torch.allclose(y.float(), wanted, rtol=0.01))


def multiply(launcher: Launcher, x: Tensor, weight: RowsWeight, out: Tensor, *, stream: int) -> Tensor:
    """x @ W.T + bias with rounded x: x [m, k] of the weight's dtype, contiguous, `serves` and for integers at least
    LEAST_ROWS rows; out [m, n] of the same dtype, contiguous. Raises ValueError for another shape, dtype or layout.
    """
    codes, scales = round_rows(launcher, x, weight.codes.dtype, stream=stream)
    if out.shape != (len(x), weight.n) or out.dtype != x.dtype or not out.is_contiguous():
        raise ValueError(f"multiply: out is {describe(out)}, but {x.dtype} [{len(x)}, {weight.n}] is needed")
    if weight.codes.dtype != torch.int8:
        return _scaled_product(codes, scales, weight.codes, weight.scales, weight.bias, out)
    size = max(16, SUMS_BYTES // (4 * len(x)) // 16 * 16)
    for start in range(0, weight.n, size):
        columns = slice(start, min(start + size, weight.n))
        sums = torch._int_mm(codes, weight.codes[columns].t())
        scale_sums(launcher, sums, scales, weight, columns, out, stream=stream)
    return out


def _scaled_product(
    codes: Tensor, scales: Tensor, weight: Tensor, columns: Tensor, bias: Tensor | None, out: Tensor
) -> Tensor:
    # What fast accumulation drops of the sums is little beside what rounding to three bits of mantissa has cost.
    torch._scaled_mm(
        codes,
        weight.t(),
        scales[:, None],
        columns[None, :],
        bias=bias,
        out_dtype=out.dtype,
        use_fast_accum=True,
        out=out,
    )
    return out


def round_rows(launcher: Launcher, x: Tensor, codes: torch.dtype, *, stream: int) -> tuple[Tensor, Tensor]:
    """x [m, k] as codes [m, k], float8_e4m3fn or int8, and scales [m] float32; k is a multiple of 8.

    The scale takes the largest magnitude of a row to the largest code. A NaN or an infinity makes it one too.

    Raises:
        ValueError: a wrong shape, dtype, device or layout.
    """
    if x.dim() != 2 or x.dtype not in TYPES or not x.is_contiguous() or x.shape[1] % 8 or x.data_ptr() % 16:
        raise ValueError(f"round_rows: x is {describe(x)}, but contiguous bfloat16 or float16 [m, a multiple of 8] at a"
                         " multiple of 16 bytes is needed")  # fmt: skip
    m, k = x.shape
    found, scales = torch.empty(m, k, dtype=codes, device=x.device), x.new_empty(m, dtype=torch.float32)
    params: Any = np.zeros((), _ROUND)
    fill("round_rows", launcher, x.device, params, {"x": x, "codes": found, "scales": scales})
    params["k"] = k
    if m:
        launcher.launch(_variant("mr_round_rows", x.dtype, codes), (m, 1, 1), _THREADS, params[()], stream=stream)
    return found, scales


def scale_sums(
    launcher: Launcher, sums: Tensor, scales: Tensor, weight: RowsWeight, columns: slice, out: Tensor, *, stream: int
) -> None:
    """Fills columns of out [m, n] with sums [m, len(columns)] int32 * scales [m] * the weight's scales + bias. They
    begin and end at multiples of 16. Raises ValueError where a tensor is elsewhere."""
    m, n = sums.shape
    params: Any = np.zeros((), _SCALE)
    fill("scale_sums", launcher, sums.device, params, {
        "sums": sums, "rows": scales, "columns": weight.scales[columns], "y": out[:, columns],
        "bias": None if weight.bias is None else weight.bias[columns],
    })  # fmt: skip
    params["y_stride"], params["n"] = out.stride(0), n
    grid = (m, -(-n // (8 * _THREADS)), 1)
    launcher.launch(_variant("mr_scale_sums", out.dtype, torch.int8), grid, _THREADS, params[()], stream=stream)
