"""The part of loading that wants torch: a checkpoint's weights, read, rounded and packed."""

from pathlib import Path
from typing import Any

from millrace.runtime.config import Config
from millrace.runtime.gpu import Gpu, placement
from millrace.runtime.loading import Loaded, Progress, load_text
from millrace.runtime.models.base import Model
from millrace.runtime.models.decoder import DecoderModel
from millrace.runtime.models.host import host_model
from millrace.runtime.quant.rounding import Quantization
from millrace.runtime.weights.gguf import GgufCheckpoint
from millrace.runtime.weights.gguf_file import is_gguf
from millrace.runtime.weights.loader import KV_DTYPES, gpu_dtype, load_model, random_model
from millrace.runtime.weights.synthetic import preset


def load_with_torch(
    config: Config, path: Path, name: str, progress: Progress | None = None, gpu: Gpu | None = None
) -> Loaded:
    """As `loading.load`, of the checkpoint at `path`, without a build."""
    gguf = GgufCheckpoint(path) if is_gguf(path) else None
    tokenizer, template = load_text(path, None if gguf is None else gguf.metadata)
    rounded = _quantization(config)
    dtype, place = config.model.dtype, None
    if gpu is not None:
        source = None if config.model.random_weights else path
        dtype, place = "auto", placement(gpu, config, gpu_dtype(source, config.model.dtype, gguf), rounded)
    options: dict[str, Any] = {
        "dtype": dtype,
        "placement": place,
        "quantize": rounded,
        "kv": KV_DTYPES[config.kv.dtype],
        "max_model_len": config.model.max_model_len or None,
        "progress": None if progress is None else (lambda done, total: progress("weights", done, total)),
    }
    loaded: DecoderModel
    if config.model.random_weights:
        # They answer nonsense anyway, so the text side of whatever model is named serves as well.
        loaded = random_model(preset(config.model.random_weights), **options)
    else:
        loaded = load_model(path, gguf=gguf, **options)
    model: Model[Any] = loaded if gpu is not None else host_model(loaded)
    return Loaded(name, path, model, tokenizer, template)


def _quantization(config: Config) -> Quantization | None:
    method = config.model.quantize
    return None if method == "none" else Quantization(method=method, group_size=config.model.quantize_group_size)
