"""Torch's matrices in the panels of the C++ library (`cpu_matrix`), as packed weights of the ops."""

import ctypes

import torch
from torch import Tensor

from millrace.kernels.arguments import PackedLinear
from millrace.kernels.cpu_matrix import (
    BFLOAT16,
    FLOAT8,
    FLOAT16,
    FLOAT32,
    PER_OUTPUT,
    Array,
    CpuMatrix,
    MatrixState,
)
from millrace.kernels.memory import empty_weight
from millrace.kernels.quantized import Float8Weight, QuantizedWeight

KINDS = {torch.bfloat16: BFLOAT16, torch.float16: FLOAT16, torch.float8_e4m3fn: FLOAT8, torch.float32: FLOAT32}
_TYPES = {kind: dtype for dtype, kind in KINDS.items()}


class CpuLinear(PackedLinear):
    """A weight copied into panels; the original is not kept. For a matrix of integers activations are quantised to 8
    bits on the way, with one scale for each group of each row."""

    def __init__(self, matrix: CpuMatrix) -> None:
        self.matrix = matrix
        self.out_features, self.in_features = matrix.out_features, matrix.in_features
        self.dtype = _TYPES.get(matrix.state.kind, torch.uint8)
        self.weight_bytes = matrix.num_bytes

    def apply(self, x: Tensor, y: Tensor) -> None:
        self.matrix.library.mr_product(
            ctypes.byref(self.matrix.c), x.data_ptr(), y.data_ptr(), x.shape[0], torch.get_num_threads()
        )

    def row_lookup(self, tokens: Tensor) -> Tensor:
        tokens = tokens.contiguous()
        y = torch.empty(tokens.shape[0], self.in_features)
        bad = self.matrix.library.mr_matrix_rows(
            ctypes.byref(self.matrix.c), tokens.data_ptr(), y.data_ptr(), tokens.shape[0]
        )
        if bad:
            raise IndexError(f"row_lookup: token {int(tokens[bad - 1])} is outside the table of {self.out_features}")
        return y


def array_of(tensor: Tensor) -> Array:
    """The same memory in numpy, of float32, whatever float type it is."""
    return tensor.detach().float().contiguous().numpy()


def bytes_of(tensor: Tensor) -> Array:
    """The bytes of a contiguous tensor, which share its memory."""
    return tensor.detach().flatten().view(torch.uint8).numpy()


def pack_matrix(library: ctypes.CDLL, weight: Tensor | Float8Weight, bias: Tensor | None) -> CpuLinear:
    group, scales = 0, None
    if isinstance(weight, Float8Weight):
        codes, groups = weight.codes, weight.scales.shape[1]
        group = PER_OUTPUT if groups == 1 else weight.group_size.bit_length() - 1
        rows = _padded(library, weight.scales * 256.0)  # what `widen_e4m3` of cpu/convert.h leaves out
        panels = rows.view(-1, library.mr_panel_width(), groups)
        scales = panels.transpose(1, 2).contiguous().numpy()
    else:
        codes = weight
    outputs, inputs = codes.shape
    padded = _padded_bias(library, bias, outputs)
    packed = empty_weight(len(padded) * inputs * codes.itemsize)
    kind = KINDS[codes.dtype]
    library.mr_pack(codes.data_ptr(), kind, packed.ctypes.data, outputs, inputs, torch.get_num_threads())
    state = MatrixState(
        out_features=outputs, in_features=inputs, kind=kind, group=group, weight=packed, bias=padded, scales=scales
    )
    return CpuLinear(CpuMatrix(library, state))


def pack_integers(library: ctypes.CDLL, weight: QuantizedWeight, bias: Tensor | None) -> CpuLinear:
    outputs, inputs = weight.q.shape
    shape = (outputs, inputs, weight.group_size, weight.bits)
    packed = empty_weight(library.mr_quantized_bytes(*shape))
    codebook, zeros = None, weight.zeros
    if weight.codebook is not None:  # the dot products take unsigned bytes
        codebook, zeros = (weight.codebook.short() + 128).to(torch.uint8).numpy(), zeros + 128
    library.mr_quantized_pack(
        weight.q.data_ptr(), weight.scales.data_ptr(), zeros.data_ptr(), packed.ctypes.data, *shape,
        torch.get_num_threads(),
    )  # fmt: skip
    state = MatrixState(
        out_features=outputs,
        in_features=inputs,
        kind=weight.bits,
        group=weight.group_size,
        weight=packed,
        bias=_padded_bias(library, bias, outputs),
        codebook=codebook,
        order=None if weight.order is None else weight.order.numpy(),
    )
    return CpuLinear(CpuMatrix(library, state))


def _padded(library: ctypes.CDLL, rows: Tensor) -> Tensor:
    """float32 [out, ...], with zeros up to a whole number of panels."""
    missing = -rows.shape[0] % library.mr_panel_width()
    return torch.cat([rows.float(), torch.zeros(missing, *rows.shape[1:])])


def _padded_bias(library: ctypes.CDLL, bias: Tensor | None, outputs: int) -> Array:
    return _padded(library, torch.zeros(outputs) if bias is None else bias.detach()).numpy()
