"""From a folder, or from nothing, to a model: all names and shapes are checked before any weight is read."""

import ctypes
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from millrace.kernels import ops
from millrace.kernels.cpu_backend import CpuBackend
from millrace.kernels.quantized import QuantizedWeight
from millrace.runtime.errors import CheckpointError, ConfigError
from millrace.runtime.models.declaration import Placement
from millrace.runtime.models.decoder import DecoderDecl, DecoderModel
from millrace.runtime.models.registry import declare
from millrace.runtime.quant.rounding import Quantization
from millrace.runtime.weights.checkpoint import Checkpoint, CheckpointFiles, read_config
from millrace.runtime.weights.gguf import GgufCheckpoint
from millrace.runtime.weights.gguf_file import is_gguf
from millrace.runtime.weights.synthetic import RandomWeights

Progress = Callable[[int, int], None]  # (modules loaded, modules in all)

_LISTED = 12  # names in one error message


def load_model(
    path: Path,
    *,
    dtype: str = "auto",
    placement: Placement | None = None,
    quantize: Quantization | None = None,
    max_model_len: int | None = None,
    progress: Progress | None = None,
    gguf: GgufCheckpoint | None = None,
) -> DecoderModel:
    """Loads a checkpoint in Hugging Face layout, or a GGUF file; memory peaks at the weights and one layer.

    Args:
        path: the folder with config.json and safetensors files, or the GGUF file.
        dtype: how matrices are stored: "float32", "bfloat16", or "auto", which keeps bfloat16 matrices as they are
            where the kernels read them directly, and widens all others. Arithmetic is float32 either way. With a
            placement it stays "auto": everything is of the type that the placement computes in.
        placement: a GPU and its backends; None is the CPU.
        quantize: how matrices are rounded as they are read, on the CPU; None keeps them as they are.
        max_model_len: positions to prepare for, at most what the checkpoint was made for, which is the default.
        progress: called after each module with (modules loaded, modules in all).
        gguf: the GGUF file at `path`, where it is open already.

    Raises:
        CheckpointError: unknown architecture or setting; missing, unexpected, misshapen or unreadable weights.
        ConfigError: dtype or max_model_len is not supported.
    """
    if gguf is None and is_gguf(path):
        gguf = GgufCheckpoint(path)
    if gguf is not None and gguf.is_quantized and quantize is not None:
        raise ConfigError(
            f"{path} holds quantised weights, which are not rounded again: leave model.quantize at none",
            param="quantize",
        )
    decl = declare(read_config(path) if gguf is None else gguf.config())
    length = _model_len(decl, max_model_len)
    checkpoint: CheckpointFiles = gguf or Checkpoint(path)
    names = _match(decl, checkpoint, path)
    source = _CheckpointWeights(
        checkpoint, names, _storage(dtype, placement), placement or Placement(quantize=quantize)
    )
    return decl.build(source, length, progress or _silent)


def random_model(
    config: Mapping[str, Any],
    seed: int = 0,
    *,
    dtype: str = "auto",
    placement: Placement | None = None,
    quantize: Quantization | None = None,
    max_model_len: int | None = None,
    progress: Progress | None = None,
) -> DecoderModel:
    """A model with random weights and no files; equal to loading `write_random_checkpoint(folder, config, seed)`.

    Matrices are stored in float32 ("auto" too) or bfloat16, with a placement in the type that it computes in. Raises
    CheckpointError and ConfigError as `load_model`.
    """
    decl = declare(config)
    automatic = dtype == "auto" and placement is None
    stored = torch.float32 if automatic else _storage(dtype, placement)[torch.float32]
    source = RandomWeights(decl.tensors(), seed, stored, stored, placement or Placement(quantize=quantize))
    return decl.build(source, _model_len(decl, max_model_len), progress or _silent)


def gpu_dtype(path: Path | None, dtype: str) -> torch.dtype:
    """The type that a checkpoint is computed in on a GPU: "auto" keeps bfloat16 and float16, and takes bfloat16 for
    float32 and where there is no checkpoint. Raises CheckpointError where it cannot be read, ConfigError for a dtype
    that no GPU kernel has."""
    known = {"bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype in known:
        return known[dtype]
    if dtype != "auto":
        raise ConfigError(f"model.dtype is {dtype}, but on a GPU it must be auto, bfloat16 or float16", param="dtype")
    stored: set[str] = set()
    if path is not None:
        files: CheckpointFiles = GgufCheckpoint(path) if is_gguf(path) else Checkpoint(path)
        stored = {tensor.dtype for tensor in files.tensors.values()}
    return torch.float16 if "F16" in stored and "BF16" not in stored else torch.bfloat16


class _CheckpointWeights:
    """A checkpoint under the names of the declaration: implements millrace.runtime.models.declaration.WeightSource."""

    def __init__(
        self,
        checkpoint: CheckpointFiles,
        names: Mapping[str, str],
        storage: Mapping[torch.dtype, torch.dtype],
        placement: Placement,
    ) -> None:
        """`names` maps declared names to stored ones."""
        self.placement = placement
        self._checkpoint = checkpoint
        self._names = names
        self._storage = storage

    def read(self, name: str) -> Tensor:
        return self._checkpoint.read(self._names[name])

    def matrix(self, name: str) -> Tensor | QuantizedWeight:
        return self._checkpoint.matrix(self._names[f"{name}.weight"])

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


def _match(decl: DecoderDecl, checkpoint: CheckpointFiles, path: Path) -> dict[str, str]:
    """Declared name -> stored name; raises CheckpointError that lists every name or shape at fault."""
    stored = checkpoint.tensors
    prefix = decl.base_prefix if any(name.startswith(decl.base_prefix) for name in stored) else ""
    names: dict[str, str] = {}
    missing, misshapen = [], []
    for tensor in decl.tensors():
        bare = tensor.name.removeprefix(decl.base_prefix)
        name = prefix + bare if bare != tensor.name else tensor.name
        names[tensor.name] = name
        if name not in stored:
            missing.append(name)
        elif stored[name].shape != tensor.shape:
            misshapen.append(f"{name} is {list(stored[name].shape)}, expected {list(tensor.shape)}")
    known = set(names.values())
    extra = [
        name
        for name in stored
        if name not in known and not any(pattern.fullmatch(name.removeprefix(prefix)) for pattern in decl.harmless)
    ]
    if decl.lm_head is None and "lm_head.weight" in extra:
        extra.remove("lm_head.weight")
        _check_tied(checkpoint, names[f"{decl.embedding.name}.weight"])
    faults = [
        f"{len(found)} {what}: {_listing(found)}"
        for what, found in (("missing", missing), ("unexpected", extra), ("of the wrong shape", misshapen))
        if found
    ]
    if faults:
        raise CheckpointError(
            f"the weights in {path} do not fit {decl.spec.architecture} as config.json describes it. "
            + "; ".join(faults)
        )
    return names


def _check_tied(checkpoint: CheckpointFiles, embedding: str) -> None:
    """Some checkpoints store a tied output matrix a second time."""
    same = torch.equal(checkpoint.read("lm_head.weight"), checkpoint.read(embedding))
    checkpoint.release()
    if not same:
        raise CheckpointError(
            f"config.json: tie_word_embeddings is true, but lm_head.weight differs from {embedding}; "
            "set it to false to use both",
            param="tie_word_embeddings",
        )


def _listing(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - _LISTED} more" if len(ordered) > _LISTED else ""
    return ", ".join(ordered[:_LISTED]) + more


def _storage(dtype: str, placement: Placement | None) -> Mapping[torch.dtype, torch.dtype]:
    """Stored type -> the type that matrices are kept in."""
    if placement is not None:
        if dtype != "auto":
            raise ConfigError(f"dtype is {dtype}, but with a placement it must be auto", param="dtype")
        return dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), placement.activation)
    if dtype not in ("auto", "float32", "bfloat16"):
        raise ConfigError(f"dtype is {dtype}, but it must be auto, float32 or bfloat16", param="dtype")
    wide = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    # The C++ kernels widen bfloat16 as they read it; torch would widen whole matrices at each call.
    direct = dtype == "auto" and isinstance(ops.default_backends()[0], CpuBackend)
    narrow = torch.bfloat16 if direct else wide
    return {torch.float32: wide, torch.float16: wide, torch.bfloat16: narrow}


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
