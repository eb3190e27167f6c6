"""A weight matrix in the panels of cpu/linear.cpp."""

import ctypes

import torch
from torch import Tensor

from millrace.kernels.arguments import PackedLinear


class MatrixC(ctypes.Structure):
    """`Matrix` of cpu/decoder.cpp."""

    _fields_ = [
        ("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("out", ctypes.c_int64), ("in_", ctypes.c_int64),
        ("bits", ctypes.c_int64), ("group", ctypes.c_int64), ("codebook", ctypes.c_void_p),
        ("order", ctypes.c_void_p),
    ]  # fmt: skip


class CpuLinear(PackedLinear):
    """A weight copied into panels of `mr_panel_width` output features (see linear.cpp); the original is not kept."""

    def __init__(self, library: ctypes.CDLL, weight: Tensor, bias: Tensor | None) -> None:
        self._library = library
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self._is_bf16 = int(weight.dtype == torch.bfloat16)
        width = library.mr_panel_width()
        padded = -(-self.out_features // width) * width
        self._packed = torch.empty(padded * self.in_features, dtype=weight.dtype)
        self._bias = torch.zeros(padded)
        if bias is not None:
            self._bias[: self.out_features] = bias
        library.mr_pack(
            weight.data_ptr(), self._is_bf16, self._packed.data_ptr(), self.out_features, self.in_features,
            torch.get_num_threads(),
        )  # fmt: skip
        self.weight_bytes = self._packed.nbytes + self._bias.nbytes

    def matrix_c(self) -> MatrixC:
        """The matrix as decoder.cpp knows it; it must not outlive this object."""
        return MatrixC(
            self._packed.data_ptr(), self._bias.data_ptr(), self.out_features, self.in_features,
            16 if self._is_bf16 else 32, 0, None, None,
        )  # fmt: skip

    def apply(self, x: Tensor, y: Tensor) -> None:
        self._library.mr_linear(
            x.data_ptr(), self._packed.data_ptr(), self._is_bf16, self._bias.data_ptr(), y.data_ptr(), x.shape[0],
            self.out_features, self.in_features, torch.get_num_threads(),
        )  # fmt: skip

    def row_lookup(self, tokens: Tensor) -> Tensor:
        tokens = tokens.contiguous()
        y = torch.empty(tokens.shape[0], self.in_features)
        bad = self._library.mr_unpack_rows(
            self._packed.data_ptr(), self._is_bf16, tokens.data_ptr(), y.data_ptr(), tokens.shape[0],
            self.out_features, self.in_features,
        )  # fmt: skip
        if bad:
            raise IndexError(f"row_lookup: token {int(tokens[bad - 1])} is outside the table of {self.out_features}")
        return y
