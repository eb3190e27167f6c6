"""FP8 weights: checkpoints of quant_method "fp8", and what compressed-tensors shares with them.

For a matrix [out, in] the weight is `weight` [out, in] float8_e4m3fn times a scale: `weight_scale_inv` of DeepSeek V3
(Liu et al. 2024) and what follows it, one for each block of 128 x 128 and in spite of its name a factor; or
`weight_scale`, one for the matrix or for each output. Activations are meant to be rounded to FP8 as well
(`Float8Weight.is_w8a8`); their scales (`activation_scheme` "static") are not needed: who rounds them finds one for each
row.

Blocks become scales for groups of inputs of each output.
"""

import re
from collections.abc import Sequence
from typing import Any

import msgspec
import torch

from millrace.kernels.quantized import Float8Weight
from millrace.runtime.models.config import ConfigReader
from millrace.runtime.quant.formats.base import FLOATS, Matrix, Part, StoredMatrix, is_listed

_SCALES = ("weight_scale_inv", "weight_scale")
_STORED = "F8_E4M3"

UNUSED_SCALES = tuple(
    re.compile(text)
    for text in (
        r".*\.(input|output)_(scale|zero_point|global_scale)",
        r".*\.activation_scale(_inv)?",
        # Of keys and values: kv.dtype decides their type here, and its scales are taken as they are written.
        r".*\.(k|v|kv)_(scale|zero_point)",
    )
)


class Fp8Layout(msgspec.Struct, frozen=True):
    """Implements millrace.runtime.quant.formats.base.Layout.

    Attributes:
        scale: suffix of the tensor of scales.
        shape: of that tensor: as many scales as there are blocks of rows x columns.
        is_w8a8: activations are meant to be FP8, too.
    """

    matrix: Matrix
    scale: str
    shape: tuple[int, ...]
    rows: int
    columns: int
    is_w8a8: bool

    @property
    def parts(self) -> Sequence[Part]:
        _, outputs, inputs = self.matrix
        return [
            Part("weight", (outputs, inputs), (_STORED,)),
            Part(self.scale, self.shape, (*FLOATS, "F8_E8M0")),
        ]

    def read(self, stored: StoredMatrix, wide: torch.dtype) -> Float8Weight:
        _, outputs, inputs = self.matrix
        scale = stored.read(self.scale).float().view(-(-outputs // self.rows), -(-inputs // self.columns))
        if not bool(scale.isfinite().all()):
            self.matrix.refuse(f"its {self.scale} is not finite everywhere: the checkpoint is damaged")
        codes = stored.read("weight").clone()  # what is in the file goes with it
        if bool((codes.view(torch.uint8) & 0x7F == 0x7F).any()):
            self.matrix.refuse("its weight is not a number somewhere: the checkpoint is damaged")
        scales = scale.repeat_interleave(self.rows, 0)[:outputs].contiguous()
        return Float8Weight(codes, scales, self.columns, self.is_w8a8)

    def describe(self) -> str:
        _, outputs, inputs = self.matrix
        scales = {
            (outputs, inputs): "one scale for each matrix",
            (1, inputs): "one scale for each output",
        }.get((self.rows, self.columns), f"blocks of {self.rows} x {self.columns}")
        return f"E4M3, {scales}, packed"


def scaled_layout(
    matrix: Matrix, stored: StoredMatrix, scale: str, block: tuple[int, int] | None, *, is_w8a8: bool
) -> Fp8Layout:
    """`block` is rows x columns; without one the stored shape tells whether each output has a scale."""
    _, outputs, inputs = matrix
    if block is not None:
        rows, columns = block
        return Fp8Layout(matrix, scale, (-(-outputs // rows), -(-inputs // columns)), rows, columns, is_w8a8)
    header = stored.header(scale)
    shape = (1,) if header is None else header.shape
    if shape in ((outputs,), (outputs, 1)) and outputs > 1:
        return Fp8Layout(matrix, scale, shape, 1, inputs, is_w8a8)
    return Fp8Layout(matrix, scale, shape if shape in ((), (1,), (1, 1)) else (1,), outputs, inputs, is_w8a8)


class Fp8Format:
    """Implements millrace.runtime.quant.formats.base.Format. What is stored tells which matrices are quantised."""

    name = "FP8"
    unused: Sequence[re.Pattern[str]] = UNUSED_SCALES

    def __init__(self, config: ConfigReader) -> None:
        config.refuse_unknown(
            # Whether another library should widen it, and how the type of keys and values was chosen there.
            "dequantize kv_cache_scheme kv_cache_quant_method",
            "quant_method activation_scheme weight_block_size modules_to_not_convert ignored_layers fmt scale_fmt "
            "expert_dtype",
        )
        config.one_of("activation_scheme", ("dynamic", "static"), "dynamic")
        config.one_of("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
        config.one_of("scale_fmt", ("float", "ue8m0"), "float")
        config.one_of("expert_dtype", ("fp8",), "fp8")
        self._block = _block(config, config.values.get("weight_block_size"))
        self._plain = config.strings("modules_to_not_convert") + config.strings("ignored_layers")

    def layout(self, matrix: Matrix, stored: StoredMatrix) -> Fp8Layout | None:
        if is_listed(matrix.name, self._plain):
            return None
        scale = next((suffix for suffix in _SCALES if stored.has(suffix)), None)
        header = stored.header("weight")
        if scale is None and header is not None and header.dtype in FLOATS:
            return None
        return scaled_layout(matrix, stored, scale or _SCALES[self._block is None], self._block, is_w8a8=True)


def _block(config: ConfigReader, value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    sizes = value if isinstance(value, list) else []
    if len(sizes) != 2 or any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in sizes):
        config.refuse("weight_block_size", "two positive integers, rows and columns")
    return sizes[0], sizes[1]
