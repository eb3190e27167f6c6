"""AWQ checkpoints (Lin et al. 2023) in the layout "gemm" of AutoAWQ.

For a matrix [out, in], with 4 bits and groups of g inputs:

    qweight [in, out / 8] int32   integers, packed along the outputs
    qzeros  [in / g, out / 8] int32   zeros, packed the same way
    scales  [in / g, out] float16

and weight = scale * (q - zero). Of the eight outputs in a word the lowest four bits hold output 0, the next ones 2, 4,
6, 1, 3, 5, 7. AWQ scales inputs before it rounds; the checkpoint's norms have taken that up already.
"""

import re
from collections.abc import Sequence

import msgspec
import torch
from torch import Tensor

from millrace.kernels.quantized import QuantizedWeight
from millrace.runtime.models.config import ConfigReader
from millrace.runtime.quant.formats.base import AUTO_ROUND, FLOATS, Matrix, Part, StoredMatrix, is_listed
from millrace.runtime.quant.formats.packing import bytes_of, quantized

_PER_WORD = 8
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where outputs 0, 1, 2, ... of a word lie in it, in units of four bits
_WORDS_AT_ONCE = 128  # columns of words that are taken apart at a time
_SUFFIXES = ("qweight", "qzeros", "scales")

# How the checkpoint was made, and by what it was meant to be run.
_BOOKKEEPING = (
    "act_group_aware batch_size block_name_to_quantize cache_block_outputs damp_percent dataset do_fuse exllama_config "
    "fuse_max_seq_len lm_head max_input_length meta model_seqlen module_name_preceding_first_block "
    "modules_in_block_to_quantize modules_to_fuse pad_token_id sym tokenizer true_sequential " + AUTO_ROUND
)


class AwqLayout(msgspec.Struct, frozen=True):
    """Implements millrace.runtime.quant.formats.base.Layout."""

    matrix: Matrix
    group_size: int

    @property
    def parts(self) -> Sequence[Part]:
        _, outputs, inputs = self.matrix
        groups = self.matrix.groups(self.group_size)
        return [
            Part("qweight", (inputs, outputs // _PER_WORD), ("I32",)),
            Part("qzeros", (groups, outputs // _PER_WORD), ("I32",)),
            Part("scales", (groups, outputs), FLOATS),
        ]

    def read(self, stored: StoredMatrix, wide: torch.dtype) -> QuantizedWeight | Tensor:
        q, zeros = unpack_columns(stored.read("qweight")), unpack_columns(stored.read("qzeros"))
        return quantized(self.matrix, q, stored.read("scales").t(), zeros, 4, wide)

    def describe(self) -> str:
        return f"4 bits, {self.matrix.describe_groups(self.group_size)}, packed"


def unpack_columns(words: Tensor) -> Tensor:
    """qweight or qzeros [rows, out / 8] int32 -> integers [out, rows] uint8."""
    rows, columns = words.shape
    out = torch.empty(columns, _PER_WORD, rows, dtype=torch.uint8)
    for start in range(0, columns, _WORDS_AT_ONCE):
        some = slice(start, start + _WORDS_AT_ONCE)
        pairs = bytes_of(words[:, some].t()).view(-1, rows, _PER_WORD // 2)
        for output, place in enumerate(_PLACES):
            out[some, output] = (pairs[:, :, place // 2] >> (place % 2 * 4)) & 15
    return out.flatten(0, 1)


class AwqFormat:
    """Implements millrace.runtime.quant.formats.base.Format. What is stored tells which matrices are quantised."""

    name = "AWQ"
    unused: Sequence[re.Pattern[str]] = ()

    def __init__(self, config: ConfigReader) -> None:
        config.refuse_unknown(
            _BOOKKEEPING,
            "quant_method bits w_bit group_size q_group_size zero_point version format backend desc_act "
            "modules_to_not_convert checkpoint_format method pack_dtype dynamic data_type",
        )
        if config.integer(_older(config, "bits", "w_bit")) != 4:
            config.refuse(_older(config, "bits", "w_bit"), "4")
        key = _older(config, "group_size", "q_group_size")
        self._group_size = -1 if config.values.get(key) == -1 else config.integer(key)
        if not config.flag("zero_point", True):
            config.refuse("zero_point", "true")
        if config.flag("desc_act", False):
            config.refuse("desc_act", "false")
        for key in ("version", "format", "checkpoint_format"):
            config.one_of(key, ("gemm", "GEMM"), "gemm")
        config.one_of("method", ("awq",), "awq")
        config.one_of("pack_dtype", ("int32",), "int32")
        config.one_of("data_type", ("int",), "int")
        if config.values.get("dynamic"):
            config.refuse("dynamic", "absent or empty")
        config.one_of("backend", ("auto", "autoawq", "auto_trainable", "legacy_awq"), "auto")
        self._plain = config.strings("modules_to_not_convert")

    def layout(self, matrix: Matrix, stored: StoredMatrix) -> AwqLayout | None:
        if is_listed(matrix.name, self._plain):
            return None
        if not any(stored.has(suffix) for suffix in _SUFFIXES) and stored.has("weight"):
            return None
        size = matrix.in_features if self._group_size == -1 else self._group_size
        matrix.groups(size)
        if matrix.out_features % _PER_WORD:
            matrix.refuse(f"{matrix.out_features} outputs do not fill whole words of {_PER_WORD}")
        return AwqLayout(matrix, size)


def _older(config: ConfigReader, key: str, older: str) -> str:
    """quant_config.json of early releases has other names."""
    return older if config.values.get(key) is None and config.values.get(older) is not None else key
