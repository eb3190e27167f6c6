"""Everything that a checkpoint holds, loaded: model, tokenizer, chat template, and a name."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from millrace.kernels import cpu_library
from millrace.runtime.config import Config
from millrace.runtime.errors import ConfigError
from millrace.runtime.models.base import Model
from millrace.runtime.text.chat import ChatTemplate
from millrace.runtime.text.gguf_tokenizer import chat_templates, load_tokenizer
from millrace.runtime.text.tokenizer import Tokenizer
from millrace.runtime.weights.build import Build, identity, open_build
from millrace.runtime.weights.gguf_file import is_gguf, read_gguf
from millrace.runtime.weights.resolve import resolve_model

if TYPE_CHECKING:
    from millrace.runtime.gpu import Gpu

Progress = Callable[[str, int, int], None]  # (what, done, total)


class Loaded(msgspec.Struct, frozen=True):
    """A model for the lanes of the device that it was loaded for."""

    name: str
    path: Path  # of tokenizer and template
    model: Model[Any]
    tokenizer: Tokenizer
    template: ChatTemplate


def load_text(path: Path, metadata: Mapping[str, Any] | None) -> tuple[Tokenizer, ChatTemplate]:
    """Of a folder, or of a GGUF file with its metadata."""
    if metadata is None:
        tokenizer = Tokenizer.load(path)
        return tokenizer, ChatTemplate.load(path, tokenizer.special_tokens)
    tokenizer = load_tokenizer(metadata, str(path))
    return tokenizer, ChatTemplate(chat_templates(metadata), tokenizer.special_tokens)


def build_options(config: Config) -> dict[str, Any]:
    """The options that packed matrices depend on."""
    model = config.model
    return {"dtype": model.dtype, "quantize": model.quantize, "group_size": model.quantize_group_size}


def _open_build(config: Config, path: Path, gpu: "Gpu | None") -> Build | None:
    folder = config.model.build
    if not folder:
        return None
    if gpu is not None or config.model.random_weights:
        what = (
            "the CPU: leave it empty, and see `millrace kernels build`, or set device.kind = cpu"
            if gpu
            else "a checkpoint: leave it empty"
        )
        raise ConfigError(f"model.build is {folder}, but it is for {what}", param="model.build")
    return open_build(Path(folder).expanduser(), identity(path, build_options(config)))


def load(config: Config, progress: Progress | None = None, gpu: "Gpu | None" = None) -> Loaded:
    """Loads what `config.model` names, onto a GPU if one is given, and from the build that it names, if that holds.
    Blocks; raises CheckpointError or ConfigError."""
    if config.kv.dtype in ("float32", "bfloat16") and gpu is not None:
        message = "but on a GPU it must be auto, which is the type that it computes in, fp8 or int8"
        raise ConfigError(f"kv.dtype is {config.kv.dtype}, {message}", param="kv.dtype")
    if config.device.compile_kernels and gpu is None:
        # Before weights are packed: it decides how. Some seconds, the first time on a machine.
        if progress is not None:
            progress("CPU kernels", 0, 1)
        cpu_library.prepare()
        if progress is not None:
            progress("CPU kernels", 1, 1)
    found = resolve_model(config.model.path)
    name = config.model.served_name or config.model.random_weights or found.name
    build = _open_build(config, found.path, gpu)
    if build is not None:
        # Weights are read meanwhile.
        with build:
            tokenizer, template = load_text(found.path, read_gguf(found.path).metadata if is_gguf(found.path) else None)
            model = build.model(config.kv.dtype, config.model.max_model_len)
        if model is not None:
            return Loaded(name, found.path, model, tokenizer, template)
        del build  # and with it the memory of its weights
    # Imported here, because it brings torch, which takes longer than all that a start from a build does.
    from millrace.runtime.loading_torch import load_with_torch

    return load_with_torch(config, found.path, name, progress, gpu)
