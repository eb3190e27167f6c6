"""A weight matrix of 8 or 4 bits in the panels of cpu/quantized.cpp."""

import ctypes

import torch
from torch import Tensor

from millrace.kernels.arguments import PackedLinear, PackedState
from millrace.kernels.cpu_linear import MatrixC, padded_to_panels, pointer
from millrace.kernels.memory import empty_weight
from millrace.kernels.quantized import CODEBOOK_SIZE, QuantizedWeight


class CpuQuantized(PackedLinear):
    """Copies the integers into panels; the originals are not kept. Activations are quantised to 8 bits on the way, with
    one scale for each group of each row."""

    dtype = torch.uint8

    def __init__(self, library: ctypes.CDLL, state: PackedState) -> None:
        """From `pack_integers`, or what `state` gave."""
        self._library, self._state = library, state
        self.out_features, self.in_features, self._bits, self._group = (
            state.numbers[name] for name in ("out_features", "in_features", "bits", "group")
        )
        self._packed, self._bias = state.tensors["packed"], state.tensors["bias"]
        self._codebook, self._order = state.tensors.get("codebook"), state.tensors.get("order")
        self.weight_bytes = sum(tensor.nbytes for tensor in state.tensors.values())
        self._matrix = self.matrix_c()

    @staticmethod
    def fault(library: ctypes.CDLL, state: PackedState) -> str:
        """What keeps the kernels from reading such a state without leaving its tensors; empty if nothing."""
        numbers, tensors = state.numbers, state.tensors
        try:
            outputs, inputs, bits, group = (numbers[name] for name in ("out_features", "in_features", "bits", "group"))
            packed, bias = tensors["packed"], tensors["bias"]
        except KeyError as error:
            return f"{error} is missing"
        if bits not in (4, 8) or group < 4 or group % 4 or inputs < group or inputs % group:
            return f"there are no {bits} bits in groups of {group} of {inputs}"
        padded = -(-outputs // library.mr_panel_width()) * library.mr_panel_width()
        order, codebook = tensors.get("order"), tensors.get("codebook")
        fits = (
            packed.numel() == library.mr_quantized_bytes(outputs, inputs, group, bits)
            and (packed.dtype, bias.dtype, bias.numel()) == (torch.uint8, torch.float32, padded)
            and (order is None or torch.equal(order.sort().values, torch.arange(inputs)))
            and (codebook is None or (codebook.dtype, codebook.numel()) == (torch.uint8, CODEBOOK_SIZE))
        )
        return "" if fits else f"its tensors do not have the sizes of a matrix of {outputs} x {inputs}"

    def state(self) -> PackedState:
        return self._state

    def matrix_c(self) -> MatrixC:
        """The matrix as the library knows it; it must not outlive this object."""
        return MatrixC(
            self._packed.data_ptr(), self._bias.data_ptr(), self.out_features, self.in_features, self._bits,
            self._group, None, pointer(self._codebook), pointer(self._order),
        )  # fmt: skip

    def apply(self, x: Tensor, y: Tensor) -> None:
        self._library.mr_product(
            ctypes.byref(self._matrix), x.data_ptr(), y.data_ptr(), x.shape[0], torch.get_num_threads()
        )

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


def pack_integers(library: ctypes.CDLL, weight: QuantizedWeight, bias: Tensor | None) -> CpuQuantized:
    outputs, inputs = weight.q.shape
    shape = (outputs, inputs, weight.group_size, weight.bits)
    tensors = {
        "packed": empty_weight([library.mr_quantized_bytes(*shape)], torch.uint8),
        "bias": padded_to_panels(library, torch.zeros(outputs) if bias is None else bias),
    }
    zeros = weight.zeros
    if weight.order is not None:
        tensors["order"] = weight.order
    if weight.codebook is not None:  # the dot products take unsigned bytes
        tensors["codebook"], zeros = (weight.codebook.short() + 128).to(torch.uint8), zeros + 128
    library.mr_quantized_pack(
        weight.q.data_ptr(), weight.scales.data_ptr(), zeros.data_ptr(), tensors["packed"].data_ptr(), *shape,
        torch.get_num_threads(),
    )  # fmt: skip
    numbers = {"out_features": outputs, "in_features": inputs, "bits": weight.bits, "group": weight.group_size}
    return CpuQuantized(library, PackedState("quantized", numbers, tensors))
