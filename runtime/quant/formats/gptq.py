"""GPTQ checkpoints (Frantar et al. 2022) in the layout of AutoGPTQ, GPTQModel and optimum.

For a matrix [out, in], with b bits and groups of g inputs:

    qweight [in * b / 32, out] int32   integers, packed along the inputs, the first input in the lowest bits
    qzeros  [in / g, out * b / 32] int32   zeros, packed the same way along the outputs
    scales  [in / g, out]
    g_idx   [in] int32   the group of each input; sorted unless `desc_act`

and weight = scale * (q - zero). Checkpoints of format "gptq" store each zero minus one; those of "gptq_v2" store it as
it is. Integers of 3 bits go on from one word to the next.
"""

import re
from collections.abc import Mapping, Sequence

import msgspec
import torch
from torch import Tensor

from millrace.kernels.quantized import QuantizedWeight
from millrace.runtime.models.config import ConfigReader
from millrace.runtime.quant.formats.base import AUTO_ROUND, FLOATS, Matrix, Part, StoredMatrix, compiled
from millrace.runtime.quant.formats.packing import quantized, unpack_rows

_BITS = (2, 3, 4, 8)
_SUFFIXES = ("qweight", "qzeros", "scales")

# How the checkpoint was made, and by what it was meant to be run; nothing of it changes what the tensors mean.
_BOOKKEEPING = (
    "act_group_aware auto_forward_data_parallel backend batch_size block_name_to_quantize cache_block_outputs "
    "calibration_data_device compute_device_filter damp_auto_increment damp_percent dataset dense_vram_strategy "
    "dense_vram_strategy_devices device disable_exllama exllama_config failsafe fallback foem gc_mode gptaq hessian "
    "hyb_act lm_head max_input_length meta mock_quantization model_file_base_name model_name_or_path model_seqlen "
    "module_name_preceding_first_block modules_in_block_to_quantize moe moe_vram_strategy moe_vram_strategy_devices "
    "mse offload_to_disk offload_to_disk_path pack_impl pad_token_id static_groups sym telemetry tokenizer "
    "true_sequential use_cuda_fp16 use_exllama v2 v2_alpha v2_memory_device vram_strategy "
    "wait_for_submodule_finalizers " + AUTO_ROUND
)


class GptqLayout(msgspec.Struct, frozen=True):
    """Implements millrace.runtime.quant.formats.base.Layout."""

    matrix: Matrix
    bits: int
    group_size: int
    minus_one: bool  # zeros are stored minus one
    has_groups: bool  # g_idx is stored

    @property
    def parts(self) -> Sequence[Part]:
        _, outputs, inputs = self.matrix
        groups = self.matrix.groups(self.group_size)
        parts = [
            Part("qweight", (inputs * self.bits // 32, outputs), ("I32",)),
            Part("qzeros", (groups, -(-outputs * self.bits // 32)), ("I32",)),
            Part("scales", (groups, outputs), FLOATS),
        ]
        return [*parts, Part("g_idx", (inputs,), ("I32", "I64"))] if self.has_groups else parts

    def read(self, stored: StoredMatrix, wide: torch.dtype) -> QuantizedWeight | Tensor:
        order = self._order(stored.read("g_idx")) if self.has_groups else None
        q = unpack_rows(stored.read("qweight").t(), self.bits, self.matrix.in_features)
        if order is not None:
            q = q[:, order]
        zeros = unpack_zeros(stored.read("qzeros"), self.bits, self.matrix.out_features, minus_one=self.minus_one)
        scales = stored.read("scales").t()
        return quantized(self.matrix, q, scales, zeros.t(), self.bits, wide, order=order)

    def _order(self, groups: Tensor) -> Tensor | None:
        """The inputs sorted by group: [in] int64, or None where they lie so."""
        order = groups.argsort(stable=True)
        wanted = torch.arange(len(groups)) // self.group_size
        if not torch.equal(groups[order].long(), wanted):
            self.matrix.refuse(
                f"g_idx must name each of {self.matrix.groups(self.group_size)} groups {self.group_size} times, but it "
                f"does not: the checkpoint is damaged, or group_size is wrong"
            )
        return None if torch.equal(groups.long(), wanted) else order

    def describe(self) -> str:
        return f"{self.bits} bits, {self.matrix.describe_groups(self.group_size)}, packed"


def unpack_zeros(words: Tensor, bits: int, outputs: int, *, minus_one: bool) -> Tensor:
    """qzeros [groups, words] int32 -> zeros [groups, outputs] uint8.

    The one is added to whole words where integers do not go on from word to word, as GPTQModel takes it off: what one
    zero borrowed from the next, which happens at 0, it gives back.
    """
    if not minus_one:
        return unpack_rows(words, bits, outputs)
    if 32 % bits:
        return (unpack_rows(words, bits, outputs) + 1) & ((1 << bits) - 1)
    ones = sum(1 << shift for shift in range(0, 32, bits))
    # In 64 bits, so that the carry out of the highest integer is cut off rather than an overflow.
    return unpack_rows(((words.long() + ones) & 0xFFFFFFFF).to(torch.uint32).view(torch.int32), bits, outputs)


class GptqFormat:
    """Implements millrace.runtime.quant.formats.base.Format. What is stored tells which matrices are quantised."""

    name = "GPTQ"
    unused: Sequence[re.Pattern[str]] = ()

    def __init__(self, config: ConfigReader) -> None:
        config.refuse_unknown(
            _BOOKKEEPING,
            "quant_method method bits group_size desc_act format checkpoint_format is_marlin_format "
            "awq_gemm_checkpoint pack_dtype dynamic rotation adapter activation preprocessors data_type",
        )
        config.one_of("data_type", ("int",), "int")
        self._bits = _bits(config)
        self._group_size = _group_size(config)
        self._needs_groups = config.flag("desc_act", False)
        self._minus_one = _version(config) == "gptq"
        config.one_of("method", ("gptq",), "gptq")
        for key in ("is_marlin_format", "awq_gemm_checkpoint"):
            if config.flag(key, False):
                config.refuse(key, "false")
        config.one_of("pack_dtype", ("int32", "torch.int32"), "int32")
        for key in ("rotation", "adapter", "activation", "preprocessors"):
            if config.values.get(key):
                config.refuse(key, "absent")
        self._dynamic = tuple(_overrides(config.section("dynamic")))

    def layout(self, matrix: Matrix, stored: StoredMatrix) -> GptqLayout | None:
        if not any(stored.has(suffix) for suffix in _SUFFIXES) and stored.has("weight"):
            return None
        bits, size, needs_groups = self._bits, self._group_size, self._needs_groups
        for pattern, override in self._dynamic:
            if pattern.match(matrix.name):
                bits, size = override.bits or bits, override.group_size or size
                needs_groups = needs_groups if override.desc_act is None else override.desc_act
                break
        size = matrix.in_features if size == -1 else size
        matrix.groups(size)
        if matrix.in_features * bits % 32:
            matrix.refuse(f"{matrix.in_features} inputs of {bits} bits do not fill whole words of 32 bits")
        return GptqLayout(matrix, bits, size, self._minus_one, needs_groups or stored.has("g_idx"))


class _Override(msgspec.Struct, frozen=True):
    """Settings of the matrices that a pattern of `dynamic` names; None: as all others."""

    bits: int | None
    group_size: int | None
    desc_act: bool | None


def _overrides(dynamic: ConfigReader | None) -> Sequence[tuple[re.Pattern[str], _Override]]:
    """GPTQModel's `dynamic`: patterns that begin with "-:" are of matrices left as they are, which the stored tensors
    show; others ("+:" or nothing in front) change settings. The first that matches counts."""
    if dynamic is None:
        return ()
    found = []
    for key, value in dynamic.values.items():
        pattern = compiled(dynamic, key, key.removeprefix("+:").removeprefix("-:"))
        if key.startswith("-:"):
            found.append((pattern, _Override(None, None, None)))
            continue
        if not isinstance(value, Mapping):
            dynamic.refuse(key, "an object")
        own = ConfigReader(value, f"{dynamic.where}: {key}")
        own.refuse_unknown(_BOOKKEEPING, "bits group_size desc_act")
        found.append(
            (
                pattern,
                _Override(
                    _bits(own) if own.values.get("bits") is not None else None,
                    _group_size(own) if own.values.get("group_size") is not None else None,
                    own.flag("desc_act", False) if own.values.get("desc_act") is not None else None,
                ),
            )
        )
    return found


def _bits(config: ConfigReader) -> int:
    bits = config.integer("bits")
    if bits not in _BITS:
        config.refuse("bits", "2, 3, 4 or 8")
    return bits


def _group_size(config: ConfigReader) -> int:
    return -1 if config.values.get("group_size") == -1 else config.integer("group_size")


def _version(config: ConfigReader) -> str:
    """Its key was `checkpoint_format`, and is now `format` too; without one it is the first version."""
    versions = {
        key: config.one_of(key, ("gptq", "gptq_v2"), "gptq")
        for key in ("checkpoint_format", "format")
        if config.values.get(key) is not None
    }
    if len(set(versions.values())) > 1:
        config.refuse("format", f"the same as checkpoint_format ({versions['checkpoint_format']})")
    return next(iter(versions.values()), "gptq")
