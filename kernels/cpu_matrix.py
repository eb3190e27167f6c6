"""A weight matrix as the C++ library multiplies it: panels of cpu/linear.cpp or, of integers, quantized.cpp.

Nothing here wants torch; `cpu_linear` packs torch's tensors into such matrices.
"""

import ctypes
from typing import Any, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]

# `Kind` of cpu/kernels.h, by the name of the type.
INT4, INT8, BFLOAT16, FLOAT16, FLOAT8, FLOAT32 = 4, 8, 16, 17, 18, 32
KIND_BYTES = {BFLOAT16: 2, FLOAT16: 2, FLOAT8: 1, FLOAT32: 4}
CODEBOOK_SIZE = 16
PER_OUTPUT = 62  # `group` of FLOAT8 where a whole output has one scale: a group as long as any


class MatrixC(ctypes.Structure):
    """`Matrix` of cpu/kernels.h."""

    _fields_ = [
        ("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("out", ctypes.c_int64), ("in_", ctypes.c_int64),
        ("kind", ctypes.c_int64), ("group", ctypes.c_int64), ("scales", ctypes.c_void_p),
        ("codebook", ctypes.c_void_p), ("order", ctypes.c_void_p),
    ]  # fmt: skip


class MatrixState(msgspec.Struct, frozen=True, kw_only=True):
    """All that a packed matrix is, which can be written to a file, for the same kernels on the same kind of processor.

    Attributes:
        kind: how a weight is stored: INT4 and so on.
        group: inputs that share a scale, of INT4 and INT8; of FLOAT8 the logarithm of that to base 2.
        weight: bytes of the panels.
        bias: [out_features padded to panels] float32.
        scales: of FLOAT8: [panels, groups, panel width] float32.
        codebook: [CODEBOOK_SIZE] uint8, what INT4 may stand for.
        order: [in_features] int64, the input that a column multiplies.
    """

    out_features: int
    in_features: int
    kind: int
    group: int = 0
    weight: Array
    bias: Array
    scales: Array | None = None
    codebook: Array | None = None
    order: Array | None = None


class CpuMatrix:
    """A matrix [out_features, in_features] with its bias, ready to be multiplied.

    Raises ValueError for a state whose arrays are not of the sizes that its numbers tell: the kernels would read what
    is not theirs.
    """

    def __init__(self, library: ctypes.CDLL, state: MatrixState) -> None:
        fault = _fault(library, state)
        if fault:
            raise ValueError(f"a matrix of {state.out_features} x {state.in_features}: {fault}")
        self.library, self.state = library, state
        self.out_features, self.in_features = state.out_features, state.in_features
        arrays = (state.weight, state.bias, state.scales, state.codebook, state.order)
        self.num_bytes = sum(array.nbytes for array in arrays if array is not None)
        weight, bias, scales, codebook, order = (None if array is None else array.ctypes.data for array in arrays)
        self.c = MatrixC(
            weight, bias, state.out_features, state.in_features, state.kind, state.group, scales, codebook, order
        )  # must not outlive this object


def _fault(library: ctypes.CDLL, state: MatrixState) -> str:
    """What keeps the kernels from reading such a state without leaving its arrays; empty if nothing."""
    outputs, inputs, kind, group = state.out_features, state.in_features, state.kind, state.group
    if not (0 < outputs < 1 << 40 and 0 < inputs < 1 << 40):
        return "there is no such size"
    width = library.mr_panel_width()
    padded = -(-outputs // width) * width
    scales = 0
    if kind in (INT4, INT8):
        if group < 4 or group % 4 or inputs % group:
            return f"there are no {kind} bits in groups of {group} of {inputs}"
        num_bytes = library.mr_quantized_bytes(outputs, inputs, group, kind)
    elif kind in KIND_BYTES:
        num_bytes = padded * inputs * KIND_BYTES[kind]
        if kind == FLOAT8:
            if not 0 <= group <= PER_OUTPUT:
                return f"there are no groups of 2**{group} inputs"
            scales = padded * (((inputs - 1) >> group) + 1)
    else:
        return f"there is no kind {kind}"
    for name, array, dtype, size in (
        ("weight", state.weight, np.uint8, num_bytes),
        ("bias", state.bias, np.float32, padded),
        ("scales", state.scales, np.float32, scales),
        ("codebook", state.codebook, np.uint8, CODEBOOK_SIZE),
        ("order", state.order, np.int64, inputs),
    ):
        if array is None and (name in ("codebook", "order") or (name == "scales" and not scales)):
            continue
        if name == "codebook" and kind != INT4:
            return f"there is a codebook for {kind} bits"
        if array is None or array.dtype != dtype or array.size != size or not array.flags.c_contiguous:
            return f"{name} is not contiguous {np.dtype(dtype)} of {size} elements"
    if state.order is not None and not np.array_equal(np.sort(state.order), np.arange(inputs)):
        return f"order does not hold each of {inputs} inputs once"
    return ""
