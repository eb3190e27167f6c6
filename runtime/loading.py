"""Everything that a checkpoint holds, loaded: model, tokenizer, chat template, and a name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch

from millrace.kernels import ops
from millrace.runtime.config import Config
from millrace.runtime.errors import ConfigError
from millrace.runtime.gpu import Gpu, placement
from millrace.runtime.models.base import Model
from millrace.runtime.quant.rounding import Quantization
from millrace.runtime.text.chat import ChatTemplate
from millrace.runtime.text.gguf_tokenizer import chat_templates, load_tokenizer
from millrace.runtime.text.tokenizer import Tokenizer
from millrace.runtime.weights.build import Build, identity, open_build
from millrace.runtime.weights.gguf import GgufCheckpoint
from millrace.runtime.weights.gguf_file import is_gguf
from millrace.runtime.weights.loader import gpu_dtype, load_model, random_model
from millrace.runtime.weights.resolve import resolve_model
from millrace.runtime.weights.synthetic import preset

_KV_DTYPES = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
}

Progress = Callable[[str, int, int], None]  # (what, done, total)


class Loaded(msgspec.Struct, frozen=True):
    name: str
    path: Path  # of tokenizer and template
    model: Model
    tokenizer: Tokenizer
    template: ChatTemplate


def _quantization(config: Config) -> Quantization | None:
    method = config.model.quantize
    return None if method == "none" else Quantization(method=method, group_size=config.model.quantize_group_size)


def _load_text(path: Path, gguf: GgufCheckpoint | None) -> tuple[Tokenizer, ChatTemplate]:
    if gguf is None:
        tokenizer = Tokenizer.load(path)
        return tokenizer, ChatTemplate.load(path, tokenizer.special_tokens)
    tokenizer = load_tokenizer(gguf.metadata, str(path))
    return tokenizer, ChatTemplate(chat_templates(gguf.metadata), tokenizer.special_tokens)


def build_options(config: Config) -> dict[str, Any]:
    """The options that packed matrices depend on."""
    model = config.model
    return {"dtype": model.dtype, "quantize": model.quantize, "group_size": model.quantize_group_size}


def _build(config: Config, path: Path, gpu: Gpu | None) -> Build | None:
    folder = config.model.build
    if not folder:
        return None
    if gpu is not None or config.model.random_weights:
        what = "the CPU: leave it empty, and see `millrace kernels build`" if gpu else "a checkpoint: leave it empty"
        raise ConfigError(f"model.build is {folder}, but it is for {what}", param="model.build")
    return open_build(Path(folder).expanduser(), identity(path, build_options(config)))


def load(
    config: Config, progress: Progress | None = None, gpu: Gpu | None = None, build: Build | None = None
) -> Loaded:
    """Loads what `config.model` names, onto a GPU if one is given. Blocks; raises CheckpointError or ConfigError.

    `build` takes down what is packed; without one, that of `config.model.build` has it ready.
    """
    if config.kv.dtype in ("float32", "bfloat16") and gpu is not None:
        message = "but on a GPU it must be auto, which is the type that it computes in, fp8 or int8"
        raise ConfigError(f"kv.dtype is {config.kv.dtype}, {message}", param="kv.dtype")
    if config.device.compile_kernels and gpu is None:
        # Before weights are packed: it decides how. Some seconds, the first time on a machine.
        if progress is not None:
            progress("CPU kernels", 0, 1)
        ops.prepare()
        if progress is not None:
            progress("CPU kernels", 1, 1)
    found = resolve_model(config.model.path)
    name = config.model.served_name or config.model.random_weights or found.name
    gguf = GgufCheckpoint(found.path) if is_gguf(found.path) else None
    tokenizer, template = _load_text(found.path, gguf)
    length = config.model.max_model_len or None
    report = None if progress is None else (lambda done, total: progress("weights", done, total))
    model: Model
    dtype, place, rounded = config.model.dtype, None, _quantization(config)
    if gpu is not None:
        path = None if config.model.random_weights else found.path
        dtype, place = "auto", placement(gpu, config, gpu_dtype(path, config.model.dtype, gguf), rounded)
    kv = _KV_DTYPES[config.kv.dtype]
    if config.model.random_weights:
        _build(config, found.path, gpu)  # which refuses one
        # Random weights answer nonsense anyway, so the text side of whatever model is named serves as well.
        shape = preset(config.model.random_weights)
        model = random_model(
            shape, dtype=dtype, placement=place, quantize=rounded, kv=kv, max_model_len=length, progress=report
        )
    else:
        model = load_model(
            found.path,
            dtype=dtype,
            placement=place,
            quantize=rounded,
            kv=kv,
            max_model_len=length,
            progress=report,
            gguf=gguf,
            build=build or _build(config, found.path, gpu),
        )
    return Loaded(name, found.path, model, tokenizer, template)
