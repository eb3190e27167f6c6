"""Formats of quantised checkpoints: one module for each family, found by the settings of a checkpoint."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from millrace.runtime.models.config import ConfigReader
from millrace.runtime.quant.formats.awq import AwqFormat
from millrace.runtime.quant.formats.base import Format
from millrace.runtime.quant.formats.bitsandbytes import BitsAndBytesFormat
from millrace.runtime.quant.formats.compressed_tensors import CompressedTensorsFormat
from millrace.runtime.quant.formats.fp8 import Fp8Format
from millrace.runtime.quant.formats.gptq import GptqFormat
from millrace.runtime.weights.checkpoint import read_json

FORMATS: Mapping[str, Callable[[ConfigReader], Format]] = MappingProxyType(
    {
        "awq": AwqFormat,
        "bitsandbytes": BitsAndBytesFormat,
        "compressed-tensors": CompressedTensorsFormat,
        "fp8": Fp8Format,
        "gptq": GptqFormat,
    }
)
# Early releases of AutoGPTQ and AutoAWQ wrote their settings beside config.json and not into it.
_BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


def read_format(config: Mapping[str, Any], folder: Path | None = None) -> Format | None:
    """How a checkpoint is quantised; None where it is not.

    Args:
        config: its config.json.
        folder: where its files lie, for those that keep the settings in a file of their own.

    Raises:
        CheckpointError: an unknown method, or a setting that is unknown or not supported, by name and value.
    """
    reader = ConfigReader(config)
    for key in ("quantization_config", "compression_config"):  # the second is an early name of compressed-tensors
        section = reader.section(key)
        if section is not None:
            return _format(section, "compressed-tensors" if key == "compression_config" else None)
    for name, method in _BESIDE.items():
        if folder is not None and (folder / name).is_file():
            return _format(ConfigReader(read_json(folder / name), name), method)
    return None


def _format(section: ConfigReader, method: str | None) -> Format:
    if method is None and any(section.values.get(key) for key in ("load_in_4bit", "load_in_8bit")):
        method = "bitsandbytes"  # left out by early releases
    named = section.values.get("quant_method") or method
    if not isinstance(named, str) or named not in FORMATS:
        section.refuse("quant_method", " or ".join(f'"{name}"' for name in FORMATS))
    return FORMATS[named](section)
