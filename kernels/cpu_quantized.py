"""A weight matrix of 8 or 4 bits in the panels of cpu/quantized.cpp."""

import ctypes

import torch
from torch import Tensor

from millrace.kernels.arguments import PackedLinear
from millrace.kernels.cpu_linear import MatrixC, padded_to_panels, pointer
from millrace.kernels.quantized import QuantizedWeight


class CpuQuantized(PackedLinear):
    """Copies the integers into panels; the originals are not kept. Activations are quantised to 8 bits on the way, with
    one scale for each group of each row."""

    dtype = torch.uint8

    def __init__(self, library: ctypes.CDLL, weight: QuantizedWeight, bias: Tensor | None) -> None:
        self._library = library
        self.out_features, self.in_features = weight.q.shape
        self._bits, self._group = weight.bits, weight.group_size
        shape = (self.out_features, self.in_features, self._group, self._bits)
        self._packed = torch.empty(library.mr_quantized_bytes(*shape), dtype=torch.uint8)
        self._bias = padded_to_panels(library, torch.zeros(self.out_features) if bias is None else bias)
        self._order = weight.order
        self._codebook, zeros = None, weight.zeros
        if weight.codebook is not None:  # the dot products take unsigned bytes
            self._codebook, zeros = (weight.codebook.short() + 128).to(torch.uint8), zeros + 128
        library.mr_quantized_pack(
            weight.q.data_ptr(), weight.scales.data_ptr(), zeros.data_ptr(), self._packed.data_ptr(), *shape,
            torch.get_num_threads(),
        )  # fmt: skip
        kept = (self._packed, self._bias, self._codebook, self._order)
        self.weight_bytes = sum(tensor.nbytes for tensor in kept if tensor is not None)

    def matrix_c(self) -> MatrixC:
        """The matrix as decoder.cpp knows it; it must not outlive this object."""
        return MatrixC(
            self._packed.data_ptr(), self._bias.data_ptr(), self.out_features, self.in_features, self._bits,
            self._group, None, pointer(self._codebook), pointer(self._order),
        )  # fmt: skip

    def apply(self, x: Tensor, y: Tensor) -> None:
        self._library.mr_quantized_linear(
            x.data_ptr(), self._packed.data_ptr(), pointer(self._codebook), pointer(self._order),
            self._bias.data_ptr(), y.data_ptr(), x.shape[0], self.out_features, self.in_features, self._group,
            self._bits, torch.get_num_threads(),
        )  # fmt: skip

    def row_lookup(self, tokens: Tensor) -> Tensor:
        tokens = tokens.contiguous()
        y = torch.empty(tokens.shape[0], self.in_features)
        bad = self._library.mr_quantized_rows(
            self._packed.data_ptr(), pointer(self._codebook), pointer(self._order), tokens.data_ptr(), y.data_ptr(),
            tokens.shape[0], self.out_features, self.in_features, self._group, self._bits,
        )  # fmt: skip
        if bad:
            raise IndexError(f"row_lookup: token {int(tokens[bad - 1])} is outside the table of {self.out_features}")
        return y
