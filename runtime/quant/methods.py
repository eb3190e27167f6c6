"""The five ways to make a quantised checkpoint: what each does to a layer, and how it is written."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import msgspec
from torch import Tensor

from millrace.kernels.quantized import QuantizedWeight
from millrace.runtime.errors import CheckpointError, ConfigError
from millrace.runtime.quant import writer
from millrace.runtime.quant.awq import quantize_awq_block
from millrace.runtime.quant.blocks import Block, Input, InputStatistics
from millrace.runtime.quant.gptq import quantize_gptq_weight, round_about_zero
from millrace.runtime.quant.rounding import round_to_nearest
from millrace.runtime.quant.writer import Float8Weight

Rounded = QuantizedWeight | Float8Weight


class Method(msgspec.Struct, frozen=True, kw_only=True, tag_field="method"):
    """One way, with its settings.

    Attributes:
        calibrated: it looks at activations.
        is_half: all tensors are written in float16, which the kernels of the format compute in; else those that are
            not rounded stay as they are.
        bits: of a weight.
    """

    calibrated: ClassVar[bool] = False
    is_half: ClassVar[bool] = False
    bits_supported: ClassVar[tuple[int, ...]]

    bits: int

    def __post_init__(self) -> None:
        if self.bits not in self.bits_supported:
            supported = " or ".join(map(str, self.bits_supported))
            raise ConfigError(f"bits is {self.bits}, but for {self.name} it must be {supported}", param="bits")

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    @property
    def group_size(self) -> int:
        """Inputs that share a scale; 0: all of an output's."""
        return 0

    @property
    def multiple(self) -> int:
        """The number of outputs, and of inputs, must be a multiple of it for words to be full."""
        return 1

    def quantize(self, block: Block, x: Tensor) -> dict[str, Rounded]:
        """The layer's matrices by name; `x` is its input, windows [count, tokens, hidden], empty where not calibrated.

        The block's other tensors may change with them.
        """
        raise NotImplementedError

    def tensors(self, name: str, weight: Any) -> Mapping[str, Tensor]:
        """A matrix as the format stores it."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """`quantization_config` of config.json."""
        raise NotImplementedError

    def round_input(self, x: Tensor) -> Tensor:
        """What the format makes of activations [tokens, in] that a matrix reads."""
        return x


class _Grouped(Method, frozen=True, kw_only=True):
    """Methods with a scale and a zero for each group of consecutive inputs."""

    group: int

    @property
    def group_size(self) -> int:
        return self.group


class Awq(_Grouped, frozen=True, kw_only=True, tag="awq"):
    """Activation-aware scales and clipping; zeros; AutoAWQ's gemm layout."""

    calibrated = is_half = True
    bits_supported = (4,)

    bits: int = 4

    @property
    def multiple(self) -> int:
        return 8

    def quantize(self, block: Block, x: Tensor) -> dict[str, Rounded]:
        return dict(quantize_awq_block(block, x, self.group_size))

    def tensors(self, name: str, weight: QuantizedWeight) -> Mapping[str, Tensor]:
        return writer.awq_tensors(name, weight)

    def config(self) -> dict[str, Any]:
        return writer.awq_config(self.group_size)


class Gptq(_Grouped, frozen=True, kw_only=True, tag="gptq"):
    """Columns that make up for each other's rounding; version 1 of the GPTQ layout."""

    calibrated = is_half = True
    bits_supported = (2, 3, 4, 8)

    bits: int = 4
    sym: bool = True
    desc_act: bool = False

    @property
    def multiple(self) -> int:
        return 32 // math.gcd(32, self.bits)

    def quantize(self, block: Block, x: Tensor) -> dict[str, Rounded]:
        rounded: dict[str, Rounded] = {}
        for of in Input:
            # With the matrices before it rounded already, which then is part of what this one makes up for.
            seen = InputStatistics(block, of, x)
            for name in block.readers(of):
                try:
                    weight = quantize_gptq_weight(
                        block.weights[name],
                        seen.gram,
                        bits=self.bits,
                        group_size=self.group_size,
                        sym=self.sym,
                        desc_act=self.desc_act,
                    )
                except ValueError as error:
                    raise CheckpointError(
                        f"{name}: {error}. Give more calibration text or another one (samples, calibration), or use "
                        "awq, which needs no factorisation, or int8"
                    ) from None
                rounded[name] = weight
                block.weights[name] = weight.widen()
        return rounded

    def tensors(self, name: str, weight: QuantizedWeight) -> Mapping[str, Tensor]:
        return writer.gptq_tensors(name, weight, self.bits)

    def config(self) -> dict[str, Any]:
        return writer.gptq_config(self.bits, self.group_size, sym=self.sym, desc_act=self.desc_act)


class Int8(Method, frozen=True, kw_only=True, tag="int8"):
    """Round to nearest with a scale for each output, activations with one for each token; compressed-tensors."""

    bits_supported = (8,)

    bits: int = 8

    def quantize(self, block: Block, x: Tensor) -> dict[str, Rounded]:
        return {name: round_to_nearest(weight, 8, None) for name, weight in block.weights.items()}

    def tensors(self, name: str, weight: QuantizedWeight) -> Mapping[str, Tensor]:
        return writer.int8_tensors(name, weight)

    def config(self) -> dict[str, Any]:
        return writer.int8_config()

    def round_input(self, x: Tensor) -> Tensor:
        scale = (x.abs().amax(1, keepdim=True) / 127).clamp(min=1e-30)
        return (x / scale).round_() * scale


class Int4(_Grouped, frozen=True, kw_only=True, tag="int4"):
    """Round to nearest about zero, each group with the scale of the least squared error; compressed-tensors."""

    bits_supported = (4,)

    bits: int = 4

    def quantize(self, block: Block, x: Tensor) -> dict[str, Rounded]:
        return {name: round_about_zero(weight, self.group_size) for name, weight in block.weights.items()}

    def tensors(self, name: str, weight: QuantizedWeight) -> Mapping[str, Tensor]:
        return writer.packed_tensors(name, weight)

    def config(self) -> dict[str, Any]:
        return writer.packed_config(self.group_size)


class Fp8(Method, frozen=True, kw_only=True, tag="fp8"):
    """float8_e4m3fn with a scale for each output, activations with one for each token; compressed-tensors."""

    bits_supported = (8,)

    bits: int = 8

    def quantize(self, block: Block, x: Tensor) -> dict[str, Rounded]:
        return {name: writer.round_to_fp8(weight) for name, weight in block.weights.items()}

    def tensors(self, name: str, weight: Float8Weight) -> Mapping[str, Tensor]:
        return writer.fp8_tensors(name, weight)

    def config(self) -> dict[str, Any]:
        return writer.fp8_config()

    def round_input(self, x: Tensor) -> Tensor:
        return writer.round_to_fp8(x).widen()


METHODS: Mapping[str, type[Method]] = MappingProxyType(
    {"awq": Awq, "gptq": Gptq, "int8": Int8, "int4": Int4, "fp8": Fp8}
)
