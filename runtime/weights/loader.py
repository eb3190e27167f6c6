"""From a folder, or from nothing, to a model: all names and shapes are checked before any weight is read."""

import ctypes
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from millrace.kernels import ops
from millrace.kernels.cpu_backend import CpuBackend
from millrace.kernels.quantized import AnyWeight
from millrace.runtime.errors import CheckpointError, ConfigError
from millrace.runtime.models.base import ModelSpec
from millrace.runtime.models.declaration import Placement
from millrace.runtime.models.decoder import DecoderDecl, DecoderModel
from millrace.runtime.models.registry import declare
from millrace.runtime.quant.formats import read_format
from millrace.runtime.quant.formats.base import FLOATS, type_name
from millrace.runtime.quant.rounding import Quantization
from millrace.runtime.weights.checkpoint import Checkpoint, CheckpointFiles, read_config
from millrace.runtime.weights.gguf import GgufCheckpoint
from millrace.runtime.weights.gguf_file import is_gguf
from millrace.runtime.weights.matching import Matched, match
from millrace.runtime.weights.synthetic import RandomWeights

_LISTED = 4  # names in a description

# Of keys and values, by the name in the configuration; None goes with the weights.
KV_DTYPES = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
}

Progress = Callable[[int, int], None]  # (modules loaded, modules in all)


def load_model(
    path: Path,
    *,
    dtype: str = "auto",
    placement: Placement | None = None,
    quantize: Quantization | None = None,
    kv: torch.dtype | None = torch.float32,
    max_model_len: int | None = None,
    progress: Progress | None = None,
    gguf: GgufCheckpoint | None = None,
) -> DecoderModel:
    """Loads a checkpoint in Hugging Face layout or a GGUF file, quantised or not; memory peaks at the weights and one
    layer.

    Args:
        path: the folder with config.json and safetensors files, or the GGUF file.
        dtype: how matrices are stored: "float32", "bfloat16", "float16", or "auto", which keeps matrices of 16 bits as
            they are where the kernels read them directly, and widens all others. Arithmetic is float32 either way. With
            a placement it stays "auto": everything is of the type that the placement computes in. Matrices that a
            quantised checkpoint holds as integers stay integers; those that no kernel reads are kept as bfloat16
            ones would be.
        placement: a GPU and its backends; None is the CPU.
        quantize: how matrices are rounded as they are read, on the CPU; None keeps them as they are.
        kv: type of keys and values in the cache, on the CPU, as in `Placement`; with a placement its own counts. None
            is what goes with the weights: bfloat16, but float32 where every one of them is.
        max_model_len: positions to prepare for, at most what the checkpoint was made for, which is the default.
        progress: called after each module with (modules loaded, modules in all).
        gguf: the GGUF file at `path`, where it is open already.

    Raises:
        CheckpointError: unknown architecture or setting; missing, unexpected, misshapen or unreadable weights.
        ConfigError: dtype or max_model_len is not supported; quantize is given for a quantised checkpoint.
    """
    if gguf is None and is_gguf(path):
        gguf = GgufCheckpoint(path)
    config = read_config(path) if gguf is None else gguf.config()
    decl = declare(config)
    quantization = read_format(config, path)
    method = quantization.name if quantization is not None else "GGUF" if gguf and gguf.is_quantized else None
    rounded = quantize if placement is None else placement.quantize
    if method is not None and rounded is not None:
        raise ConfigError(
            f"model.quantize is {rounded.method}, but the checkpoint is quantised already "
            f"({method}): leave the option out, or load the checkpoint it was made from",
            param="quantize",
        )
    length = _model_len(decl, max_model_len)
    checkpoint: CheckpointFiles = gguf or Checkpoint(path)
    place = placement or Placement(quantize=quantize, kv=kv or _kv_dtype(dtype, quantize, _stored_types(checkpoint)))
    matched = match(decl, checkpoint, quantization, path)
    storage = _storage(dtype, placement)
    source = _CheckpointWeights(checkpoint, matched, storage, place)
    model = decl.build(source, length, progress or _silent)
    stored = matched.describe(quantization) if gguf is None else gguf.describe(type_name(storage[torch.bfloat16]))
    model.spec = _described(model.spec, f"{stored}{_widened(source.widened)}{_rounding(place)}")
    return model


def random_model(
    config: Mapping[str, Any],
    seed: int = 0,
    *,
    dtype: str = "auto",
    placement: Placement | None = None,
    quantize: Quantization | None = None,
    kv: torch.dtype | None = torch.float32,
    max_model_len: int | None = None,
    progress: Progress | None = None,
) -> DecoderModel:
    """A model with random weights and no files; equal to loading `write_random_checkpoint(folder, config, seed)`.

    Matrices are stored in float32 ("auto" too) or bfloat16, with a placement in the type that it computes in. Raises
    CheckpointError and ConfigError as `load_model`.
    """
    if read_format(config) is not None:
        raise CheckpointError(
            "config.json: quantization_config is given, but random weights are not quantised so: take it out, or round "
            "them with quantize",
            param="quantization_config",
        )
    place = placement or Placement(quantize=quantize, kv=kv or _kv_dtype(dtype, quantize, {"F32"}))
    decl = declare(config)
    decl = msgspec.structs.replace(decl, spec=_described(decl.spec, f"random{_rounding(place)}"))
    automatic = dtype == "auto" and placement is None
    stored = torch.float32 if automatic else _storage(dtype, placement)[torch.float32]
    source = RandomWeights(decl.tensors(), seed, stored, stored, place)
    return decl.build(source, _model_len(decl, max_model_len), progress or _silent)


def gpu_dtype(path: Path | None, dtype: str, gguf: GgufCheckpoint | None = None) -> torch.dtype:
    """The type that a checkpoint is computed in on a GPU: "auto" keeps bfloat16 and float16, and takes bfloat16 for
    float32 and where there is no checkpoint. `gguf` as in `load_model`. Raises CheckpointError where it cannot be read,
    ConfigError for a dtype that no GPU kernel has."""
    known = {"bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype in known:
        return known[dtype]
    if dtype != "auto":
        raise ConfigError(f"model.dtype is {dtype}, but on a GPU it must be auto, bfloat16 or float16", param="dtype")
    stored: set[str] = set()
    if path is not None:
        stored = _stored_types(gguf or (GgufCheckpoint(path) if is_gguf(path) else Checkpoint(path)))
    return torch.float16 if "F16" in stored and "BF16" not in stored else torch.bfloat16


def _stored_types(files: CheckpointFiles) -> set[str]:
    return {tensor.dtype for tensor in files.tensors.values()}


def _kv_dtype(dtype: str, quantize: Quantization | None, stored: Collection[str]) -> torch.dtype:
    """Of keys and values on the CPU, where nobody has named one: who has 32 bits of weights keeps them throughout."""
    if quantize is not None:
        return torch.bfloat16
    if dtype == "auto":
        return torch.float32 if set(stored) == {"F32"} else torch.bfloat16
    return torch.float32 if dtype == "float32" else torch.bfloat16


class _CheckpointWeights:
    """A checkpoint under the names of the declaration: implements millrace.runtime.models.declaration.WeightSource."""

    def __init__(
        self,
        checkpoint: CheckpointFiles,
        matched: Matched,
        storage: Mapping[torch.dtype, torch.dtype],
        placement: Placement,
    ) -> None:
        self.placement = placement
        self._checkpoint = checkpoint
        self._matched = matched
        self._storage = storage
        self.widened: dict[torch.dtype, list[str]] = {}  # matrices that no kernel reads as they are stored

    def read(self, name: str) -> Tensor:
        return self._checkpoint.read(self._matched.names[name])

    def note_packed(self, names: Sequence[str], linear: ops.PackedLinear) -> None:
        if linear.dtype in self._storage and any(map(self._is_quantized, names)):
            joined = " + ".join([names[0], *(name.rpartition(".")[2] for name in names[1:])])
            self.widened.setdefault(linear.dtype, []).append(joined)

    def _is_quantized(self, name: str) -> bool:
        stored = self._matched.names.get(f"{name}.weight")
        return stored is None or self._checkpoint.tensors[stored].dtype not in FLOATS

    def matrix(self, name: str) -> AnyWeight:
        quantized = self._matched.quantized.get(name)
        if quantized is None:
            return self._checkpoint.matrix(self._matched.names[f"{name}.weight"])
        return quantized.read(self._storage[torch.bfloat16])

    def storage_dtype(self, stored: torch.dtype) -> torch.dtype:
        return self._storage[stored]

    def release(self) -> None:
        self._checkpoint.release()
        _return_freed_memory()


def _return_freed_memory() -> None:
    """glibc keeps the pages of freed staging buffers: 13 % of a 0.5B checkpoint stayed resident without this."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)


def _described(spec: ModelSpec, weights: str) -> ModelSpec:
    return msgspec.structs.replace(spec, weights=weights)


def _widened(found: Mapping[torch.dtype, Sequence[str]]) -> str:
    text = ""
    for dtype, names in found.items():
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        text += f"; but widened to {type_name(dtype)}: {', '.join(names[:_LISTED])}{more}"
    return text


def _rounding(place: Placement) -> str:
    return "" if place.quantize is None else f", rounded to {place.quantize.bits} bits at load"


def _storage(dtype: str, placement: Placement | None) -> Mapping[torch.dtype, torch.dtype]:
    """Stored type -> the type that matrices are kept in."""
    if placement is not None:
        if dtype != "auto":
            raise ConfigError(f"dtype is {dtype}, but with a placement it must be auto", param="dtype")
        return dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), placement.activation)
    kept = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype in kept:
        return dict.fromkeys(kept.values(), kept[dtype])
    if dtype != "auto":
        raise ConfigError(f"dtype is {dtype}, but it must be auto, {', '.join(kept)}", param="dtype")
    # The C++ kernels widen 16 bits as they read them; torch would widen whole matrices at each call.
    if isinstance(ops.default_backends()[0], CpuBackend):
        return {stored: stored for stored in kept.values()}
    return dict.fromkeys(kept.values(), torch.float32)


def _model_len(decl: DecoderDecl, wanted: int | None) -> int:
    longest = decl.spec.max_model_len
    if wanted is not None and not 1 <= wanted <= longest:
        raise ConfigError(
            f"max_model_len is {wanted}, but it must be between 1 and {longest}, which the checkpoint was made for",
            param="max_model_len",
        )
    return longest if wanted is None else wanted


def _silent(done: int, total: int) -> None:
    """No progress is shown."""
