"""A weight matrix in the panels of cpu/linear.cpp."""

import ctypes
from types import MappingProxyType

import torch
from torch import Tensor

from millrace.kernels.arguments import PackedLinear
from millrace.kernels.quantized import Float8Weight

KINDS = MappingProxyType(  # `Kind` of cpu/kernels.h
    {torch.bfloat16: 16, torch.float16: 17, torch.float8_e4m3fn: 18, torch.float32: 32}
)


class MatrixC(ctypes.Structure):
    """`Matrix` of cpu/decoder.cpp."""

    _fields_ = [
        ("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("out", ctypes.c_int64), ("in_", ctypes.c_int64),
        ("kind", ctypes.c_int64), ("group", ctypes.c_int64), ("scales", ctypes.c_void_p),
        ("codebook", ctypes.c_void_p), ("order", ctypes.c_void_p),
    ]  # fmt: skip


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def padded_to_panels(library: ctypes.CDLL, rows: Tensor) -> Tensor:
    """float32 [out, ...], with zeros up to a whole number of panels."""
    missing = -rows.shape[0] % library.mr_panel_width()
    return torch.cat([rows.float(), torch.zeros(missing, *rows.shape[1:])])


class CpuLinear(PackedLinear):
    """A weight copied into panels of `mr_panel_width` output features (see linear.cpp); the original is not kept."""

    def __init__(self, library: ctypes.CDLL, weight: Tensor | Float8Weight, bias: Tensor | None) -> None:
        self._library = library
        self._scales: Tensor | None = None
        self._group_bits = 0
        if isinstance(weight, Float8Weight):
            codes, groups = weight.codes, weight.scales.shape[1]
            # A scale for the whole of an output is one for a group as long as any.
            self._group_bits = 62 if groups == 1 else weight.group_size.bit_length() - 1
            panels = padded_to_panels(library, weight.scales).view(-1, library.mr_panel_width(), groups)
            self._scales = panels.transpose(1, 2).contiguous()
        else:
            codes = weight
        self.out_features, self.in_features = codes.shape
        self.dtype = codes.dtype
        self._kind = KINDS[codes.dtype]
        self._bias = padded_to_panels(library, torch.zeros(self.out_features) if bias is None else bias)
        self._packed = torch.empty(len(self._bias) * self.in_features, dtype=codes.dtype)
        library.mr_pack(
            codes.data_ptr(), self._kind, self._packed.data_ptr(), self.out_features, self.in_features,
            torch.get_num_threads(),
        )  # fmt: skip
        kept = (self._packed, self._bias, self._scales)
        self.weight_bytes = sum(tensor.nbytes for tensor in kept if tensor is not None)

    def matrix_c(self) -> MatrixC:
        """The matrix as decoder.cpp knows it; it must not outlive this object."""
        return MatrixC(
            self._packed.data_ptr(), self._bias.data_ptr(), self.out_features, self.in_features, self._kind,
            self._group_bits, pointer(self._scales), None, None,
        )  # fmt: skip

    def apply(self, x: Tensor, y: Tensor) -> None:
        self._library.mr_linear(
            x.data_ptr(), self._packed.data_ptr(), self._kind, pointer(self._scales), self._group_bits,
            self._bias.data_ptr(), y.data_ptr(), x.shape[0], self.out_features, self.in_features,
            torch.get_num_threads(),
        )  # fmt: skip

    def row_lookup(self, tokens: Tensor) -> Tensor:
        tokens = tokens.contiguous()
        y = torch.empty(tokens.shape[0], self.in_features)
        bad = self._library.mr_unpack_rows(
            self._packed.data_ptr(), self._kind, pointer(self._scales), self._group_bits, tokens.data_ptr(),
            y.data_ptr(), tokens.shape[0], self.out_features, self.in_features,
        )  # fmt: skip
        if bad:
            raise IndexError(f"row_lookup: token {int(tokens[bad - 1])} is outside the table of {self.out_features}")
        return y
