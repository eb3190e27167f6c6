"""Checkpoints that bitsandbytes has quantised: NF4 and FP4 (Dettmers et al. 2023), and LLM.int8() (2022).

4 bits, for a matrix [out, in] of n weights in blocks of b:

    weight            [ceil(n / 2), 1]   two indices in a byte, the first in the high bits; its type is
                      bnb_4bit_quant_storage, whatever the bytes mean
    weight.quant_map  [16] float32   what an index stands for
    weight.absmax     [ceil(n / b)] float32   the factor of each block; blocks follow each other through the rows
    weight.quant_state.bitsandbytes__nf4 (or __fp4)   JSON: quant_type, blocksize, shape, ...

With double quantisation absmax is uint8, and the factors are
nested_quant_map[absmax] * nested_absmax[block of nested_blocksize] + nested_offset.

8 bits: weight [out, in] int8, SCB [out] float32, and weight = value * SCB / 127. Inputs that stick out are not
multiplied apart from others here (`llm_int8_threshold`): activations are not rounded in the same way.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

import msgspec
import torch
from torch import Tensor

from millrace.kernels.cpu_matrix import CODEBOOK_SIZE
from millrace.kernels.quantized import QuantizedWeight
from millrace.runtime.models.config import ConfigReader
from millrace.runtime.quant.formats.base import FLOATS, Matrix, Part, StoredMatrix, is_listed
from millrace.runtime.quant.formats.packing import quantized

_BYTES = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8}  # that bnb_4bit_quant_storage may have
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_SLICE = 1 << 20  # weights that are wide at a time
_STATE = "weight.quant_state.bitsandbytes__"
_STATE_BYTES = 1 << 16  # more than any has
_BOOKKEEPING = "bnb_4bit_compute_dtype bnb_4bit_use_double_quant llm_int8_enable_fp32_cpu_offload llm_int8_threshold"


class FourBitLayout(msgspec.Struct, frozen=True):
    """Implements millrace.runtime.quant.formats.base.Layout.

    Attributes:
        storage: safetensors type that the bytes lie in.
        state: shape of the tensor that holds the JSON.
        nested: weights' blocks in a block of their factors; None: the factors are stored as they are.
        offset: what is added to nested factors.
    """

    matrix: Matrix
    kind: str
    storage: str
    state: tuple[int, ...]
    block: int
    nested: int | None
    offset: float

    @property
    def _blocks(self) -> int:
        return -(-self.matrix.out_features * self.matrix.in_features // self.block)

    @property
    def parts(self) -> Sequence[Part]:
        _, outputs, inputs = self.matrix
        factors: list[Part]
        if self.nested is None:
            factors = [Part("weight.absmax", (self._blocks,), ("F32",))]
        else:
            factors = [
                Part("weight.absmax", (self._blocks,), ("U8",)),
                Part("weight.nested_absmax", (-(-self._blocks // self.nested),), ("F32",)),
                Part("weight.nested_quant_map", (256,), ("F32",)),
            ]
        items = -(-outputs * inputs // (2 * _BYTES[self.storage]))
        return [
            Part("weight", (items, 1), (self.storage,)),
            Part("weight.quant_map", (CODEBOOK_SIZE,), ("F32",)),
            *factors,
            Part(_STATE + self.kind, self.state, ("U8",)),
        ]

    @property
    def is_packed(self) -> bool:
        """Whether each block lies within a row."""
        return self.matrix.in_features % self.block == 0

    def read(self, stored: StoredMatrix, wide: torch.dtype) -> QuantizedWeight | Tensor:
        _, outputs, inputs = self.matrix
        table = stored.read("weight.quant_map")
        if not bool((table.abs() <= 1).all()):
            self.matrix.refuse("weight.quant_map must lie between -1 and 1: the checkpoint is damaged")
        factors = self._factors(stored)
        q = unpack_nibbles(stored.read("weight"), outputs * inputs)
        if self.is_packed:
            codebook, unit = integer_codebook(table)
            scales = factors.view(outputs, -1) / unit
            q = q.view(outputs, inputs)
            return quantized(self.matrix, q, scales, torch.zeros_like(scales), 4, wide, codebook=codebook)
        if not bool(factors.isfinite().all()):
            self.matrix.refuse("weight.absmax is not finite everywhere: the checkpoint is damaged")
        out = torch.empty(len(q), dtype=wide)
        for start in range(0, len(q), _SLICE):
            values = table[q[start : start + _SLICE].int()]
            blocks = torch.arange(start, start + len(values)) // self.block
            out[start : start + _SLICE] = values * factors[blocks]
        return out.view(outputs, inputs)

    def _factors(self, stored: StoredMatrix) -> Tensor:
        """[blocks] float32."""
        absmax = stored.read("weight.absmax")
        if self.nested is None:
            return absmax
        values = stored.read("weight.nested_quant_map")[absmax.int()]
        scales = stored.read("weight.nested_absmax")[torch.arange(len(values)) // self.nested]
        return values * scales + self.offset

    def describe(self) -> str:
        return f"{self.kind.upper()}, blocks of {self.block}{', packed' if self.is_packed else ' that cross rows'}"


class EightBitLayout(msgspec.Struct, frozen=True):
    """Implements millrace.runtime.quant.formats.base.Layout."""

    matrix: Matrix
    has_order: bool  # weight_format is stored

    @property
    def parts(self) -> Sequence[Part]:
        _, outputs, inputs = self.matrix
        parts = [Part("weight", (outputs, inputs), ("I8",)), Part("SCB", (outputs,), ("F32", "F16", "BF16"))]
        return [*parts, Part("weight_format", (), ("U8",))] if self.has_order else parts

    def read(self, stored: StoredMatrix, wide: torch.dtype) -> QuantizedWeight | Tensor:
        if self.has_order and int(stored.read("weight_format")) != 0:
            self.matrix.refuse("weight_format must be 0, row by row; save it again with bitsandbytes 0.45 or later")
        q = stored.read("weight").view(torch.uint8) ^ 128
        scales = stored.read("SCB").float().view(-1, 1) / 127
        return quantized(self.matrix, q, scales, torch.full_like(scales, 128), 8, wide)

    def describe(self) -> str:
        return "8 bits, one scale for each output, packed"


def unpack_nibbles(stored: Tensor, count: int) -> Tensor:
    """The first `count` indices, [count] uint8, from bytes of any type; the high bits of a byte come first."""
    both = stored.flatten().view(torch.uint8)
    return torch.stack((both >> 4, both & 15), dim=1).flatten()[:count]


def integer_codebook(table: Tensor) -> tuple[Tensor, int]:
    """[16] float32 between -1 and 1 -> ([16] int8, unit), where table is about codebook / unit.

    The unit is the one below 128 with the least squared error: 112 for NF4, off by at most 0.0039 of a block's largest
    weight; 120 for FP4, exact but for its smallest value, which is off by 0.0032.
    """
    wanted = table.double()
    errors = [(float((((wanted * unit).round() / unit) - wanted).square().sum()), unit) for unit in range(64, 128)]
    unit = min(errors)[1]
    return (wanted * unit).round().to(torch.int8), unit


class BitsAndBytesFormat:
    """Implements millrace.runtime.quant.formats.base.Format. What is stored tells which matrices are quantised."""

    name = "bitsandbytes"
    unused: Sequence[re.Pattern[str]] = ()

    def __init__(self, config: ConfigReader) -> None:
        config.refuse_unknown(
            _BOOKKEEPING,
            "quant_method load_in_4bit load_in_8bit _load_in_4bit _load_in_8bit bnb_4bit_quant_type "
            "bnb_4bit_quant_storage llm_int8_has_fp16_weight llm_int8_skip_modules",
        )
        four, eight = (
            config.flag(f"load_in_{bits}bit", False) or config.flag(f"_load_in_{bits}bit", False) for bits in (4, 8)
        )
        if four == eight:
            config.refuse("load_in_4bit", "true where load_in_8bit is false, and the other way round")
        if config.flag("llm_int8_has_fp16_weight", False):
            config.refuse("llm_int8_has_fp16_weight", "false")
        config.one_of("bnb_4bit_quant_type", ("nf4", "fp4"), "fp4")
        storages = ("uint8", "int8", "float16", "bfloat16", "float32", "float64")
        config.one_of("bnb_4bit_quant_storage", storages, "uint8")
        self._bits = 4 if four else 8
        self._plain = config.strings("llm_int8_skip_modules")

    def layout(self, matrix: Matrix, stored: StoredMatrix) -> FourBitLayout | EightBitLayout | None:
        if is_listed(matrix.name, self._plain):
            return None
        if self._bits == 8:
            header = stored.header("weight")
            if not stored.has("SCB") and header is not None and header.dtype in FLOATS:
                return None
            return EightBitLayout(matrix, stored.has("weight_format"))
        kind = next((kind for kind in ("nf4", "fp4") if stored.has(_STATE + kind)), None)
        if kind is None:
            if not stored.has("weight.absmax") and stored.has("weight"):
                return None
            matrix.refuse(f"there is no {matrix.name}.{_STATE}nf4, which tells how it is quantised")
        return _four_bits(matrix, stored, kind)


def _four_bits(matrix: Matrix, stored: StoredMatrix, kind: str) -> FourBitLayout:
    state, state_shape = _state(matrix, stored, _STATE + kind)
    weight = stored.header("weight")
    storage = weight.dtype if weight is not None and weight.dtype in _BYTES else "U8"
    state.one_of("quant_type", (kind,))
    shape = state.values.get("shape")
    if shape != [matrix.out_features, matrix.in_features]:
        state.refuse("shape", f"[{matrix.out_features}, {matrix.in_features}]")
    nested, offset = None, 0.0
    if stored.has("weight.nested_absmax"):
        nested = state.integer("nested_blocksize")
        found = state.values.get("nested_offset")
        if isinstance(found, bool) or not isinstance(found, int | float) or not abs(found) < float("inf"):
            state.refuse("nested_offset", "a number")
        offset = float(found)
    block = state.integer("blocksize")
    if block not in _BLOCKS:
        state.refuse("blocksize", f"one of {', '.join(map(str, _BLOCKS))}")
    return FourBitLayout(matrix, kind, storage, state_shape, block, nested, offset)


def _state(matrix: Matrix, stored: StoredMatrix, suffix: str) -> tuple[ConfigReader, tuple[int, ...]]:
    """The JSON that stands in a tensor of bytes, and that tensor's shape."""
    header = stored.header(suffix)
    if header is None or header.dtype != "U8" or len(header.shape) != 1 or header.shape[0] > _STATE_BYTES:
        matrix.refuse(f"{suffix} must be a short row of bytes: the checkpoint is damaged")
    try:
        values: Any = json.loads(bytes(stored.read(suffix).tolist()))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        matrix.refuse(f"{suffix} is not valid JSON ({error}): the checkpoint is damaged")
    if not isinstance(values, dict):
        matrix.refuse(f"{suffix} holds {type(values).__name__}, but it must hold an object")
    state = ConfigReader(values, f"{matrix.name}.{suffix}")
    state.refuse_unknown("dtype nested_dtype", "quant_type blocksize shape nested_blocksize nested_offset")
    return state, header.shape
