"""What an architecture declares: its tensors, named as the checkpoint names them, and how they become modules.

The same declaration tells which weights must be there, how large they are, and how to load them, so that the lists
cannot drift apart.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

import msgspec
import torch
from torch import Tensor

from millrace.kernels import ops
from millrace.kernels.quantized import AnyWeight, Float8Weight, QuantizedWeight, stack_rows, widen_into
from millrace.runtime.quant.rounding import Quantization


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """Where a model lives and computes: the CPU in float32, or a GPU in bfloat16 or float16.

    Attributes:
        quantize: what matrices are rounded to as they are loaded; None keeps them as they are.
        activation: type of everything that flows through the model.
        scales: type that the scales and biases of norms are kept in.
        kv: type of keys and values in the cache: None is the activations'; bfloat16 beside float32 halves it;
            float8_e4m3fn and int8 have a scale for each slot and head.
        backends: who computes the ops; None is the CPU's default list.
    """

    device: torch.device = torch.device("cpu")
    activation: torch.dtype = torch.float32
    scales: torch.dtype = torch.float32
    kv: torch.dtype | None = None
    backends: ops.Backends = None
    quantize: Quantization | None = None

    def pack(self, weight: Tensor, bias: Tensor | None, *, is_output: bool = False) -> ops.PackedLinear:
        """A matrix [out, in] in the layout that multiplies fastest here; `is_output`: it gives the logits."""
        if self.quantize is None:
            return ops.pack_linear(weight, bias, activation=self.activation, backends=self.backends)
        return self.pack_narrow(self.quantize.round(weight, is_output=is_output), bias)

    def pack_narrow(self, weight: QuantizedWeight | Float8Weight, bias: Tensor | None) -> ops.PackedLinear:
        """The same for a matrix that is in 8 bits or fewer already."""
        there = weight.to(self.device)
        if isinstance(there, Float8Weight):
            return ops.pack_float8(there, bias, activation=self.activation, backends=self.backends)
        return ops.pack_quantized(there, bias, activation=self.activation, backends=self.backends)


class WeightSource(Protocol):
    """Where a model takes its tensors from: a checkpoint's files, or a random generator."""

    @property
    def placement(self) -> Placement: ...

    def read(self, name: str) -> Tensor:
        """The tensor as stored: float32, bfloat16 or float16. It may lie in the file and is valid until `release`."""

    def note_packed(self, names: Sequence[str], linear: ops.PackedLinear) -> None:
        """The parts `names` have become this matrix: a source may tell people of it."""

    def matrix(self, name: str) -> AnyWeight:
        """The weight of a linear map or a table, `<name>.weight`: as `read` gives it, or in the 8 bits or fewer that it
        is stored in."""

    def storage_dtype(self, stored: torch.dtype) -> torch.dtype:
        """The type that a matrix stored as `stored` is kept in."""

    def release(self) -> None:
        """All tensors that were read so far have been copied; what they occupy may go."""


class TensorDecl(msgspec.Struct, frozen=True):
    """One tensor of the checkpoint.

    Attributes:
        ones: a norm's scale, which random weights leave at 1.
        linear: whether it is the weight of a linear map, which a checkpoint may hold quantised, and how it is stored:
            "rows" [out, in] or "columns" [in, out].
    """

    name: str
    shape: tuple[int, ...]
    ones: bool = False
    linear: Literal["rows", "columns"] | None = None


class LinearPart(msgspec.Struct, frozen=True):
    """One matrix of the checkpoint, <name>.weight and, if it has one, <name>.bias."""

    name: str
    out_features: int
    bias: bool = False


class LinearDecl(msgspec.Struct, frozen=True, kw_only=True):
    """A linear map made of one or more matrices that read the same input; they are fused along the output.

    `transposed` matrices are stored [in, out] (the Conv1D of GPT-2) instead of [out, in].
    """

    parts: tuple[LinearPart, ...]
    in_features: int
    transposed: bool = False

    @property
    def out_features(self) -> int:
        return sum(part.out_features for part in self.parts)

    def tensors(self) -> Iterator[TensorDecl]:
        for part in self.parts:
            shape = (part.out_features, self.in_features)
            if self.transposed:
                yield TensorDecl(f"{part.name}.weight", shape[::-1], linear="columns")
            else:
                yield TensorDecl(f"{part.name}.weight", shape, linear="rows")
            if part.bias:
                yield TensorDecl(f"{part.name}.bias", (part.out_features,))

    def load(self, source: WeightSource, *, is_output: bool = False) -> ops.PackedLinear:
        linear = self._pack(source, is_output)
        source.note_packed([part.name for part in self.parts], linear)
        return linear

    def _pack(self, source: WeightSource, is_output: bool) -> ops.PackedLinear:
        place = source.placement
        has_bias = any(part.bias for part in self.parts)
        bias = torch.zeros(self.out_features, dtype=place.activation, device=place.device) if has_bias else None
        starts = list(itertools.accumulate((part.out_features for part in self.parts), initial=0))
        for part, start in zip(self.parts, starts, strict=False):
            if bias is not None and part.bias:
                bias[start : start + part.out_features].copy_(source.read(f"{part.name}.bias"))
        first = source.matrix(self.parts[0].name)
        if not isinstance(first, Tensor):
            joined = stack_rows([first, *(source.matrix(part.name) for part in self.parts[1:])])
            if joined is not None:
                return place.pack_narrow(joined, bias)
        # Each part is copied, widened and turned straight into its place: no second copy of the matrix exists.
        dtype = source.storage_dtype(first.dtype if isinstance(first, Tensor) else torch.bfloat16)
        weight = torch.empty(self.out_features, self.in_features, dtype=dtype, device=place.device)
        for part, start in zip(self.parts, starts, strict=False):
            stored = source.matrix(part.name)
            rows = weight[start : start + part.out_features]
            if isinstance(stored, Tensor):
                rows.copy_(stored.t() if self.transposed else stored)
            else:
                widen_into(rows, stored)
        return place.pack(weight, bias, is_output=is_output)


class EmbeddingDecl(msgspec.Struct, frozen=True):
    """A table [rows, width], kept in the storage type of matrices; <name>.weight in the checkpoint."""

    name: str
    rows: int
    width: int

    def tensors(self) -> Iterator[TensorDecl]:
        yield TensorDecl(f"{self.name}.weight", (self.rows, self.width))

    def load(self, source: WeightSource) -> Tensor:
        stored = source.matrix(self.name)
        dtype = source.storage_dtype(stored.dtype if isinstance(stored, Tensor) else torch.bfloat16)
        table = torch.empty(self.rows, self.width, dtype=dtype, device=source.placement.device)
        return table.copy_(stored) if isinstance(stored, Tensor) else widen_into(table, stored)

    def load_tied(self, source: WeightSource) -> ops.PackedLinear:
        """The table as the matrix that gives the logits; its rows are looked up there too."""
        linear = self._pack_tied(source)
        source.note_packed([self.name], linear)
        return linear

    def _pack_tied(self, source: WeightSource) -> ops.PackedLinear:
        stored = source.matrix(self.name)
        if not isinstance(stored, Tensor):
            return source.placement.pack_narrow(stored, None)
        return source.placement.pack(self.load(source), None, is_output=True)


class RMSNormDecl(msgspec.Struct, frozen=True):
    name: str
    width: int
    eps: float

    def tensors(self) -> Iterator[TensorDecl]:
        yield TensorDecl(f"{self.name}.weight", (self.width,), ones=True)

    def load(self, source: WeightSource) -> "RMSNorm":
        return RMSNorm(_kept(source, f"{self.name}.weight"), self.eps, source.placement.backends)


class LayerNormDecl(msgspec.Struct, frozen=True):
    name: str
    width: int
    eps: float

    def tensors(self) -> Iterator[TensorDecl]:
        yield TensorDecl(f"{self.name}.weight", (self.width,), ones=True)
        yield TensorDecl(f"{self.name}.bias", (self.width,))

    def load(self, source: WeightSource) -> "LayerNorm":
        weight, bias = (_kept(source, f"{self.name}.{part}") for part in ("weight", "bias"))
        return LayerNorm(weight, bias, self.eps, source.placement.backends)


class RMSNorm:
    """Root-mean-square norm over the last dimension (Zhang and Sennrich 2019)."""

    def __init__(self, weight: Tensor, eps: float, backends: ops.Backends = None) -> None:
        self.weight = weight  # [width]
        self.eps = eps
        self._backends = backends

    def weights(self) -> ops.NormWeights:
        return ops.NormWeights(self.weight, None, self.eps)

    def __call__(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps, backends=self._backends)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (norm(x + residual), x + residual); the sum may overwrite `residual`."""
        return ops.add_rms_norm(x, residual, self.weight, self.eps, backends=self._backends)


class LayerNorm:
    """Layer norm over the last dimension (Ba et al. 2016)."""

    def __init__(self, weight: Tensor, bias: Tensor, eps: float, backends: ops.Backends = None) -> None:
        self.weight = weight  # [width]
        self.bias = bias  # [width]
        self.eps = eps
        self._backends = backends

    def weights(self) -> ops.NormWeights:
        return ops.NormWeights(self.weight, self.bias, self.eps)

    def __call__(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps, backends=self._backends)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (norm(x + residual), x + residual); the sum may overwrite `residual`."""
        return ops.add_layer_norm(x, residual, self.weight, self.bias, self.eps, backends=self._backends)


def _kept(source: WeightSource, name: str) -> Tensor:
    """A copy of a norm's tensor that does not lie in the file."""
    stored = source.read(name)
    return torch.empty(stored.shape, dtype=source.placement.scales, device=source.placement.device).copy_(stored)
