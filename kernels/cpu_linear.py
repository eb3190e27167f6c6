"""A weight matrix in the panels of cpu/linear.cpp."""

import ctypes
from types import MappingProxyType

import torch
from torch import Tensor

from millrace.kernels.arguments import PackedLinear, PackedState
from millrace.kernels.memory import empty_weight
from millrace.kernels.quantized import Float8Weight

KINDS = MappingProxyType(  # `Kind` of cpu/kernels.h
    {torch.bfloat16: 16, torch.float16: 17, torch.float8_e4m3fn: 18, torch.float32: 32}
)


class MatrixC(ctypes.Structure):
    """`Matrix` of cpu/kernels.h."""

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

    def __init__(self, library: ctypes.CDLL, state: PackedState) -> None:
        """From `pack_matrix`, or what `state` gave."""
        self._library, self._state = library, state
        self.out_features, self.in_features, self._kind, self._group_bits = (
            state.numbers[name] for name in ("out_features", "in_features", "kind", "group_bits")
        )
        self._packed, self._bias = state.tensors["packed"], state.tensors["bias"]
        self._scales = state.tensors.get("scales")
        self.dtype = self._packed.dtype
        self.weight_bytes = sum(tensor.nbytes for tensor in state.tensors.values())
        self._matrix = self.matrix_c()

    @staticmethod
    def fault(library: ctypes.CDLL, state: PackedState) -> str:
        """What keeps the kernels from reading such a state without leaving its tensors; empty if nothing."""
        numbers, tensors = state.numbers, state.tensors
        try:
            outputs, inputs, kind, group_bits = (
                numbers[name] for name in ("out_features", "in_features", "kind", "group_bits")
            )
            packed, bias = tensors["packed"], tensors["bias"]
        except KeyError as error:
            return f"{error} is missing"
        width = library.mr_panel_width()
        padded = -(-outputs // width) * width
        groups = ((inputs - 1) >> group_bits) + 1 if 0 <= group_bits < 63 and inputs > 0 else 0
        scales = {padded * groups} if kind == KINDS[torch.float8_e4m3fn] else {0}
        found = (packed.numel(), bias.numel(), KINDS.get(packed.dtype), bias.dtype)
        scaled = tensors.get("scales", torch.empty(0))
        if found != (padded * inputs, padded, kind, torch.float32) or {scaled.numel()} != scales:
            return f"its tensors do not have the sizes of a matrix of {outputs} x {inputs}"
        return ""

    def state(self) -> PackedState:
        return self._state

    def matrix_c(self) -> MatrixC:
        """The matrix as the library knows it; it must not outlive this object."""
        return MatrixC(
            self._packed.data_ptr(), self._bias.data_ptr(), self.out_features, self.in_features, self._kind,
            self._group_bits, pointer(self._scales), None, None,
        )  # fmt: skip

    def apply(self, x: Tensor, y: Tensor) -> None:
        self._library.mr_product(
            ctypes.byref(self._matrix), x.data_ptr(), y.data_ptr(), x.shape[0], torch.get_num_threads()
        )

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


def pack_matrix(library: ctypes.CDLL, weight: Tensor | Float8Weight, bias: Tensor | None) -> CpuLinear:
    group_bits, tensors = 0, {}
    if isinstance(weight, Float8Weight):
        codes, groups = weight.codes, weight.scales.shape[1]
        # A scale for the whole of an output is one for a group as long as any.
        group_bits = 62 if groups == 1 else weight.group_size.bit_length() - 1
        scales = weight.scales * 256.0  # what `widen_e4m3` of cpu/convert.h leaves out
        panels = padded_to_panels(library, scales).view(-1, library.mr_panel_width(), groups)
        tensors["scales"] = panels.transpose(1, 2).contiguous()
    else:
        codes = weight
    outputs, inputs = codes.shape
    tensors["bias"] = padded_to_panels(library, torch.zeros(outputs) if bias is None else bias)
    tensors["packed"] = empty_weight([len(tensors["bias"]) * inputs], codes.dtype)
    kind = KINDS[codes.dtype]
    library.mr_pack(codes.data_ptr(), kind, tensors["packed"].data_ptr(), outputs, inputs, torch.get_num_threads())
    numbers = {"out_features": outputs, "in_features": inputs, "kind": kind, "group_bits": group_bits}
    return CpuLinear(library, PackedState("linear", numbers, tensors))
