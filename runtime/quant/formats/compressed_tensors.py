"""Checkpoints of compressed-tensors, as llm-compressor writes them.

`config_groups` says which matrices have which scheme, `ignore` which of them have none. Both hold names of modules,
patterns ("re:..."), or "Linear". For a matrix [out, in] of b bits, by `format`:

    pack-quantized   weight_packed [out, ceil(in * b / 32)] int32, weight_shape [2], weight_scale, and maybe
                     weight_zero_point (int8, or int32 packed along the outputs) and weight_g_idx [in]; until pull
                     request 732 of the library (June 2026) [out, ceil(in / (32 // b))], no integer crossing words
    int-quantized    weight [out, in] int8, weight_scale, and maybe weight_zero_point int8
    float-quantized  weight [out, in] float8_e4m3fn, weight_scale
    naive-quantized  as one of the last two

with weight = scale * (q - zero), q and zero signed; packed ones are stored plus 2^(b - 1). Scales are [1] for strategy
"tensor", [out, 1] for "channel", [out, in / g] for "group", and one for each block for "block". That activations have 8
bits as well is passed on (`is_w8a8`); how they are rounded is not: the kernels do it in their own way, or not at all.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import torch
from torch import Tensor

from millrace.kernels.quantized import AnyWeight
from millrace.runtime.models.config import ConfigReader
from millrace.runtime.quant.formats.base import FLOATS, Layout, Matrix, Part, StoredMatrix, compiled
from millrace.runtime.quant.formats.fp8 import UNUSED_SCALES, Fp8Layout, scaled_layout
from millrace.runtime.quant.formats.packing import quantized, unpack_rows, unpack_whole_words

_PACKED = "pack-quantized"
_FORMATS = (_PACKED, "int-quantized", "float-quantized", "naive-quantized")
_MIXED = "mixed-precision"  # each group names its own


class Scheme(msgspec.Struct, frozen=True):
    """One entry of config_groups, for weights.

    Attributes:
        block: rows and columns that share a scale; 0 stands for all of them.
        is_w8a8: weights and activations have 8 bits, of the same kind.
    """

    targets: tuple[str, ...]
    form: str
    bits: int
    is_float: bool
    block: tuple[int, int]
    is_symmetric: bool
    is_w8a8: bool


class IntegerLayout(msgspec.Struct, frozen=True):
    """Implements millrace.runtime.quant.formats.base.Layout, for integers packed or one in a byte.

    Attributes:
        scales: shape of the stored scales, and of zeros that are not packed.
        block: rows and columns that share a scale.
        zeros: safetensors type of the stored zeros: I8, or I32 where they are packed; None: all are 0.
        has_groups: weight_g_idx is stored, the group of each input.
        is_w8a8: activations are meant to be integers of 8 bits, too.
        has_gaps: packed integers do not cross words, as old releases packed those of 3, 5, 6 and 7 bits.
    """

    matrix: Matrix
    bits: int
    is_packed: bool
    scales: tuple[int, ...]
    block: tuple[int, int]
    zeros: str | None
    has_groups: bool
    is_w8a8: bool
    has_gaps: bool

    @property
    def parts(self) -> Sequence[Part]:
        _, outputs, inputs = self.matrix
        if self.is_packed:
            parts = [
                Part("weight_packed", (outputs, _words(inputs, self.bits, self.has_gaps)), ("I32",)),
                Part("weight_shape", (2,), ("I64", "I32")),
            ]
        else:
            parts = [Part("weight", (outputs, inputs), ("I8",))]
        parts.append(Part("weight_scale", self.scales, FLOATS))
        if self.zeros == "I32":
            words = _words(outputs, self.bits, self.has_gaps)
            parts.append(Part("weight_zero_point", (words, self.scales[-1]), ("I32",)))
        elif self.zeros is not None:
            parts.append(Part("weight_zero_point", self.scales, ("I8",)))
        if self.has_groups:
            parts.append(Part("weight_g_idx", (inputs,), ("I32", "I64")))
        return parts

    def read(self, stored: StoredMatrix, wide: torch.dtype) -> AnyWeight:
        _, outputs, inputs = self.matrix
        middle = 1 << (self.bits - 1)
        if self.is_packed:
            shape = stored.read("weight_shape").tolist()
            if shape != [outputs, inputs]:
                self.matrix.refuse(f"weight_shape is {shape}, but it must be {[outputs, inputs]}")
            q = self._unpacked(stored.read("weight_packed"), inputs)
        else:
            signed = stored.read("weight")
            if self.bits < 8 and not bool(((signed >= -middle) & (signed < middle)).all()):
                self.matrix.refuse(f"weight must lie between {-middle} and {middle - 1}: the checkpoint is damaged")
            q = signed.view(torch.uint8) + middle
        order = self._order(stored.read("weight_g_idx")) if self.has_groups else None
        if order is not None:
            q = q[:, order]
        scales = self._for_rows(stored.read("weight_scale").float())
        zeros = torch.full_like(scales, middle) + self._for_rows(self._zeros(stored))
        weight = quantized(self.matrix, q, scales, zeros, self.bits, wide, order=order)
        return weight if isinstance(weight, Tensor) else weight._replace(is_w8a8=self.is_w8a8)

    def _unpacked(self, words: Tensor, count: int) -> Tensor:
        return (unpack_whole_words if self.has_gaps else unpack_rows)(words, self.bits, count)

    def _zeros(self, stored: StoredMatrix) -> Tensor:
        if self.zeros is None:
            return torch.zeros(self.scales)
        values = stored.read("weight_zero_point")
        if self.zeros == "I8":
            return values.float()
        # Its outputs follow each other down the words, in one column for each group.
        packed = self._unpacked(values.t(), self.matrix.out_features)
        return packed.t().float() - (1 << (self.bits - 1))

    def _for_rows(self, values: Tensor) -> Tensor:
        """Scales or zeros as stored -> [out, groups]."""
        _, outputs, inputs = self.matrix
        rows, columns = self.block
        grid = values.reshape(-(-outputs // rows), inputs // columns)
        return grid[torch.arange(outputs) // rows]

    def _order(self, groups: Tensor) -> Tensor | None:
        columns = self.block[1]
        order = groups.argsort(stable=True)
        wanted = torch.arange(len(groups)) // columns
        # All -1 is what a checkpoint without an order may hold.
        if bool((groups == -1).all()) or torch.equal(groups.long(), wanted):
            return None
        if not torch.equal(groups[order].long(), wanted):
            self.matrix.refuse(f"weight_g_idx must name each group {columns} times: the checkpoint is damaged")
        return order

    def describe(self) -> str:
        rows, columns = self.block
        groups = self.matrix.describe_groups(columns) if rows == 1 else f"blocks of {rows} x {columns}"
        if rows == self.matrix.out_features > 1:
            groups = "one scale for each matrix"
        return f"{self.bits} bits, {groups}, packed"


class CompressedTensorsFormat:
    """Implements millrace.runtime.quant.formats.base.Format. The config tells which matrices are quantised."""

    name = "compressed-tensors"
    unused: Sequence[re.Pattern[str]] = UNUSED_SCALES

    def __init__(self, config: ConfigReader) -> None:
        config.refuse_unknown(
            # How far a library had come with it, and how keys and values are kept there.
            "version global_compression_ratio kv_cache_scheme run_compressed dequantize use_optimized_inference "
            "provider",
            "quant_method format config_groups ignore quantization_status sparsity_config transform_config "
            "moe_sparsity_config",
        )
        form = config.one_of("format", (*_FORMATS, _MIXED))
        config.one_of("quantization_status", ("compressed", "frozen"), "compressed")
        for key in ("sparsity_config", "transform_config", "moe_sparsity_config"):
            section = config.section(key)
            if section is not None and section.values and section.values.get("format") != "dense":
                config.refuse(key, "absent or empty")
        groups = config.section("config_groups")
        if groups is None or not groups.values:
            config.refuse("config_groups", "an object with at least one group")
        schemes = [_scheme(groups, key, None if form == _MIXED else form) for key in groups.values]
        self._ignored = [_matcher(config, "ignore", entry) for entry in config.strings("ignore")]
        # As the library resolves it: the last group that names a target, a name before a pattern, a pattern before a
        # class.
        targets = {target: scheme for scheme in schemes for target in scheme.targets}
        order = sorted(targets, key=lambda target: (target == "Linear", target.startswith("re:"), target))
        self._targets = [(_matcher(config, "config_groups", target), targets[target]) for target in order]

    def layout(self, matrix: Matrix, stored: StoredMatrix) -> Layout | None:
        if any(_names(entry, matrix.name) for entry in self._ignored):
            return None
        scheme = next((scheme for entry, scheme in self._targets if _names(entry, matrix.name)), None)
        return None if scheme is None else _layout(matrix, scheme, stored)


Matcher = str | re.Pattern[str]


def _matcher(config: ConfigReader, key: str, text: str) -> Matcher:
    return compiled(config, key, text.removeprefix("re:")) if text.startswith("re:") else text


def _names(entry: Matcher, name: str) -> bool:
    if isinstance(entry, str):
        return entry in (name, "Linear")
    return entry.match(name) is not None


def _layout(matrix: Matrix, scheme: Scheme, stored: StoredMatrix) -> IntegerLayout | Fp8Layout:
    _, outputs, inputs = matrix
    rows, columns = scheme.block[0] or outputs, scheme.block[1] or inputs
    if scheme.is_float:
        whole = scheme.block[1] == 0
        block = None if whole else (rows, columns)
        return scaled_layout(matrix, stored, "weight_scale", block, is_w8a8=scheme.is_w8a8)
    groups = matrix.groups(columns)
    header = stored.header("weight_scale")
    shape: tuple[int, ...] = (-(-outputs // rows), groups)
    if rows == outputs and header is not None and header.shape in ((), (1,)):
        shape = header.shape
    return IntegerLayout(
        matrix=matrix,
        bits=scheme.bits,
        is_packed=scheme.form == _PACKED,
        scales=shape,
        block=(rows, columns),
        zeros=_stored_zeros(scheme, stored),
        has_groups=stored.has("weight_g_idx"),
        is_w8a8=scheme.is_w8a8,
        has_gaps=scheme.form == _PACKED and _has_gaps(matrix, scheme.bits, stored),
    )


def _words(count: int, bits: int, has_gaps: bool) -> int:
    """Of 32 bits, for `count` integers."""
    return -(-count // (32 // bits)) if has_gaps else -(-count * bits // 32)


def _has_gaps(matrix: Matrix, bits: int, stored: StoredMatrix) -> bool:
    """By the number of words, which differs for every multiple of 32 inputs; else today's layout is taken."""
    header = stored.header("weight_packed")
    dense, gapped = (_words(matrix.in_features, bits, has_gaps) for has_gaps in (False, True))
    return header is not None and dense != gapped and header.shape[-1:] == (gapped,)


def _stored_zeros(scheme: Scheme, stored: StoredMatrix) -> str | None:
    """Type of the zeros. Early releases did not pack them, and stored those of symmetric schemes too."""
    packed = scheme.form == _PACKED and scheme.block[0] == 1
    header = stored.header("weight_zero_point")
    if header is None:
        return None if scheme.is_symmetric else "I32" if packed else "I8"
    return "I32" if packed and header.dtype == "I32" else "I8"


def _scheme(groups: ConfigReader, key: str, form: str | None) -> Scheme:
    """`form` is None where each group names its own."""
    value = groups.values[key]
    if not isinstance(value, Mapping):
        groups.refuse(key, "an object with targets and weights")
    group = ConfigReader(value, f"{groups.where}: {key}")
    # Activations: of input_activations only scales are stored, which are not needed; outputs are not rounded either.
    group.refuse_unknown("targets weights format input_activations output_activations")
    own = group.one_of("format", _FORMATS, form)
    if form is not None and own != form:
        group.refuse("format", f'"{form}", as that of the checkpoint')
    for side in ("input_activations", "output_activations"):
        activations = group.section(side)
        if activations is not None:
            _check_arguments(activations)
    if group.section("output_activations") is not None:
        group.refuse("output_activations", "null")
    weights = group.section("weights")
    if weights is None:
        group.refuse("weights", "an object")
    _check_arguments(weights)
    targets = group.strings("targets")
    if not targets:
        group.refuse("targets", "a list of names")
    for target in targets:
        if target != "Linear" and "." not in target and not target.startswith("re:") and target != "lm_head":
            group.refuse("targets", 'names of matrices, patterns ("re:...") or "Linear"')
    bits, is_float, block = _numbers(weights, own)
    inputs = group.section("input_activations")
    is_w8a8 = bits == 8 and inputs is not None and _are_alike(inputs, is_float)
    return Scheme(targets, own, bits, is_float, block, weights.flag("symmetric", True), is_w8a8)


def _are_alike(activations: ConfigReader, is_float: bool) -> bool:
    """Whether activations have 8 bits and the kind of the weights."""
    is_float_too = activations.one_of("type", ("int", "float"), "int") == "float"
    return activations.integer("num_bits", 8) == 8 and is_float_too == is_float


def _numbers(weights: ConfigReader, form: str) -> tuple[int, bool, tuple[int, int]]:
    """Bits, whether they are floating, and rows and columns that share a scale."""
    kinds = {"float-quantized": ("float",), "naive-quantized": ("int", "float")}.get(form, ("int",))
    is_float = weights.one_of("type", kinds, "int") == "float"
    bits = weights.integer("num_bits", 8)
    if bits > 8 or bits < 2 or (is_float and bits != 8):
        weights.refuse("num_bits", "8" if is_float else "between 2 and 8")
    if weights.flag("dynamic", False):
        weights.refuse("dynamic", "false")
    size = weights.values.get("group_size")
    size = None if size == -1 or size is None else weights.integer("group_size")
    fallback = "group" if size is not None else "channel" if weights.values.get("group_size") == -1 else "tensor"
    strategy = weights.one_of("strategy", ("tensor", "channel", "group", "block"), fallback)
    if (strategy == "group") != (size is not None):
        weights.refuse("group_size", "given for strategy group, and for no other")
    if strategy == "block":
        return bits, is_float, _block(weights, weights.values.get("block_structure"))
    return bits, is_float, (0 if strategy == "tensor" else 1, size or 0)


def _block(weights: ConfigReader, value: Any) -> tuple[int, int]:
    """[128, 128], or "128x128" as older releases wrote it."""
    sizes = value.split("x") if isinstance(value, str) else value if isinstance(value, list) else []
    numbers = [int(size) for size in sizes if isinstance(size, int) or (isinstance(size, str) and size.isdecimal())]
    if len(sizes) != 2 or len(numbers) != 2 or min(numbers) < 1 or any(isinstance(size, bool) for size in sizes):
        weights.refuse("block_structure", "two positive integers, rows and columns")
    return numbers[0], numbers[1]


def _check_arguments(arguments: ConfigReader) -> None:
    arguments.refuse_unknown(
        # How scales were found when the checkpoint was made, and their types, which the tensors show.
        "observer observer_kwargs actorder scale_dtype zp_dtype",
        "symmetric num_bits type strategy group_size block_structure dynamic",
    )
