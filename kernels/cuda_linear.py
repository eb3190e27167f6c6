"""Weight matrices on an NVIDIA GPU: 16-bit ones, which cuBLAS multiplies, and quantised ones.

A quantised matrix is read as it is by `cuda_gemv` or `cuda_gemv_rows` for few rows. For more rows it is widened slice
by slice into memory that the slice's product by cuBLAS reads back from the L2; weights are the same then, rounded once
to 16 bits. One that is meant for activations of 8 bits is multiplied by those instead, where torch has such a product.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from millrace.kernels import cuda_gemv, cuda_gemv_rows, cuda_rounded
from millrace.kernels.arguments import PackedLinear
from millrace.kernels.cuda_compile import Kernel
from millrace.kernels.cuda_gemv_common import MAX_ROWS, TILE_N, GemvWorkspace, TiledWeight, workspace_size
from millrace.kernels.cuda_gemv_pack import PackedWeight
from millrace.kernels.cuda_gemv_rows import RowsWeight
from millrace.kernels.cuda_launch import Launcher

# To be measured on each new kind of device; results are right for any values.
GEMV_ROWS = {4: 32, 8: 16}  # by bits: up to so many rows, reading the integers once for 8 rows costs fewer bytes
SLICE_BYTES = 32 << 20  # of widened weights at a time: well within the 50 MB of an H100's L2


class CudaLinear(PackedLinear):
    """Keeps the weight [out, in] as it is; cuBLAS multiplies, and adds the bias in its epilogue.

    Args:
        row_lookup: rows of the weight, by a kernel.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, row_lookup: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.weight = weight.contiguous()
        self.bias = None if bias is None else bias.to(weight.dtype)
        self.out_features, self.in_features = weight.shape
        self.dtype = self.activation = weight.dtype
        self.weight_bytes = self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)
        self._row_lookup = row_lookup

    def apply(self, x: Tensor, y: Tensor) -> None:
        _multiply(x, self.weight, self.bias, y)

    def row_lookup(self, tokens: Tensor) -> Tensor:
        return self._row_lookup(tokens, self.weight)


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.t(), out=y)
    else:
        torch.addmm(bias, x, weight.t(), out=y)


def _multiply_widened(
    x: Tensor, weight: PackedWeight | RowsWeight, y: Tensor, widen: Callable[[range, Tensor], object]
) -> None:
    """By slices of the weight that `widen` fills, one after the other in the same memory."""
    size = max(1, SLICE_BYTES // (2 * TILE_N * weight.k)) * TILE_N
    wide = torch.empty(min(size, weight.n), weight.k, dtype=weight.dtype, device=x.device)
    for start in range(0, weight.n, size):
        columns = range(start, min(start + size, weight.n))
        part = wide[: len(columns)]
        widen(columns, part)
        bias = None if weight.bias is None else weight.bias[start : columns.stop]
        _multiply(x, part, bias, y[:, start : columns.stop])


class QuantizedProducts:
    """What all quantised matrices of a backend share.

    Scratch of products of few rows belongs to a stream, since one stream's products must not meet another's in it. It
    is made at the first product on a stream, which is no captured one, and kept: graphs know its address.
    """

    def __init__(self, launcher: Launcher, current_stream: Callable[[], int]) -> None:
        self.launcher = launcher
        self.current_stream = current_stream
        self.kernels: set[Kernel] = set()  # of the matrices that are there
        self._size = (0, 0)
        self._workspaces: dict[int, list[GemvWorkspace]] = {}  # by stream; the last one is in use

    def add(self, weight: TiledWeight, kernels: Iterable[Kernel]) -> None:
        """Says what a matrix needs: scratch, and what it launches."""
        self.kernels.update(kernels)
        floats, counters = workspace_size(self.launcher, weight)
        self._size = (max(self._size[0], floats), max(self._size[1], counters))

    def workspace(self, stream: int, device: torch.device) -> GemvWorkspace:
        held = self._workspaces.setdefault(stream, [])
        if not held or not held[-1].holds(self._size):
            held.append(GemvWorkspace.allocate(self._size, device))
        return held[-1]


class CudaQuantized(PackedLinear):
    """Keeps the integers in the layout of cuda/gemv.cu."""

    dtype = torch.uint8

    def __init__(self, products: QuantizedProducts, weight: PackedWeight) -> None:
        products.add(weight, cuda_gemv.weight_kernels(weight))
        self._products = products
        self._weight = weight
        self.out_features, self.in_features = weight.n, weight.k
        self.activation = weight.dtype
        self.weight_bytes = weight.nbytes

    def apply(self, x: Tensor, y: Tensor) -> None:
        weight, shared, num_rows = self._weight, self._products, x.shape[0]
        if weight.order is not None:
            x = x.index_select(1, weight.order)
        stream = shared.current_stream()
        if num_rows <= GEMV_ROWS[weight.bits]:
            workspace = shared.workspace(stream, x.device)
            for start in range(0, num_rows, MAX_ROWS):
                rows = slice(start, start + MAX_ROWS)
                cuda_gemv.gemv(shared.launcher, x[rows], weight, out=y[rows], workspace=workspace, stream=stream)
            return
        _multiply_widened(
            x, weight, y, lambda rows, out: cuda_gemv.dequantise(shared.launcher, weight, rows, out=out, stream=stream)
        )

    def row_lookup(self, tokens: Tensor) -> Tensor:
        weight, shared = self._weight, self._products
        rows = cuda_gemv.dequantise(shared.launcher, weight, tokens.contiguous(), stream=shared.current_stream())
        if weight.order is None:
            return rows
        ordered = torch.empty_like(rows)
        return ordered.index_copy_(1, weight.order, rows)


class CudaRows(PackedLinear):
    """Keeps numbers of 8 bits, FP8 or integers, row by row, as cuda/gemv_rows.cu and torch's products of 8 bits by 8
    bits both read them."""

    def __init__(self, products: QuantizedProducts, weight: RowsWeight) -> None:
        self._rounds = weight.is_w8a8 and cuda_rounded.serves(weight)
        kernels = cuda_gemv_rows.weight_kernels(weight)
        products.add(weight, kernels + cuda_rounded.weight_kernels(weight) if self._rounds else kernels)
        self._products = products
        self._weight = weight
        self.dtype = weight.codes.dtype
        self.out_features, self.in_features = weight.n, weight.k
        self.activation = weight.dtype
        self.weight_bytes = weight.nbytes

    def apply(self, x: Tensor, y: Tensor) -> None:
        weight, shared, num_rows = self._weight, self._products, x.shape[0]
        launcher, stream = shared.launcher, shared.current_stream()
        if num_rows <= GEMV_ROWS[8]:
            workspace = shared.workspace(stream, x.device)
            for start in range(0, num_rows, MAX_ROWS):
                rows = slice(start, start + MAX_ROWS)
                cuda_gemv_rows.gemv(launcher, x[rows], weight, out=y[rows], workspace=workspace, stream=stream)
        elif self._rounds and num_rows >= cuda_rounded.LEAST_ROWS:
            cuda_rounded.multiply(launcher, x, weight, y, stream=stream)
        else:
            _multiply_widened(
                x, weight, y, lambda rows, out: cuda_gemv_rows.widen(launcher, weight, rows, out=out, stream=stream)
            )

    def row_lookup(self, tokens: Tensor) -> Tensor:
        shared = self._products
        stream = shared.current_stream()
        return cuda_gemv_rows.widen(shared.launcher, self._weight, tokens.contiguous(), stream=stream)
