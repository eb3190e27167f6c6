"""Quantised checkpoints, made from those in float32, bfloat16 or float16."""

import hashlib
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch

from millrace.runtime.errors import CheckpointError, ConfigError
from millrace.runtime.models.declaration import LinearDecl
from millrace.runtime.models.rotary import RotaryLayerDecl
from millrace.runtime.quant.calibration import CALIBRATION_SEED, HELD_OUT_SEED, TextSource, windows
from millrace.runtime.quant.job import Job, Progress, Report, Texts
from millrace.runtime.quant.methods import METHODS, Method
from millrace.runtime.quant.source import Source
from millrace.runtime.quant.workfolder import WorkFolder, check_space, refuse_existing
from millrace.runtime.weights.resolve import resolve_model

_log = logging.getLogger(__name__)

_GROUP = 128  # what published checkpoints have, where it divides the inputs
_LEAST_GROUP = 16  # smaller ones cost more in scales than they save
_LEAST_HELD = 32  # windows of held-out text
_MATHEMATICS = 1  # to be raised when a method gives other numbers, so that no run mixes two
_OPTION_NAMES = {"group": "group_size"}


def quantize_awq(
    model_path: str | Path, output_path: str | Path, bits: int = 4, group_size: int | None = None, **options: Any
) -> Report:
    """`quantize` with method "awq"."""
    return quantize("awq", model_path, output_path, bits=bits, group_size=group_size, **options)


def quantize_gptq(
    model_path: str | Path, output_path: str | Path, bits: int = 4, group_size: int | None = None, **options: Any
) -> Report:
    """`quantize` with method "gptq"; two more options: sym (True), desc_act (False)."""
    return quantize("gptq", model_path, output_path, bits=bits, group_size=group_size, **options)


def quantize_int8(model_path: str | Path, output_path: str | Path, **options: Any) -> Report:
    """`quantize` with method "int8"."""
    return quantize("int8", model_path, output_path, **options)


def quantize_int4(
    model_path: str | Path, output_path: str | Path, bits: int = 4, group_size: int | None = None, **options: Any
) -> Report:
    """`quantize` with method "int4"."""
    return quantize("int4", model_path, output_path, bits=bits, group_size=group_size, **options)


def quantize_fp8(model_path: str | Path, output_path: str | Path, **options: Any) -> Report:
    """`quantize` with method "fp8"."""
    return quantize("fp8", model_path, output_path, **options)


@torch.inference_mode()
def quantize(
    method: str,
    model_path: str | Path,
    output_path: str | Path,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    sym: bool | None = None,
    desc_act: bool | None = None,
    calibration: str | Path | None = None,
    evaluation: str | Path | None = None,
    samples: int = 64,
    window: int = 512,
    progress: Progress | None = None,
) -> Report:
    """Writes a quantised copy of a checkpoint of the Llama family, in a layout that other programs load too.

    What is finished lies in `<output_path>.partial` until all is; called again after it was killed, with the same
    arguments, it goes on there. Embedding and output matrix are not quantised.

    Args:
        method: "awq" (AutoAWQ's gemm layout), "gptq" (version 1), or, in the layouts of compressed-tensors, "int8"
            (8 bits for weights and activations), "int4" (round to nearest) and "fp8".
        model_path: a folder, a hub id, or "grist", in float32, bfloat16 or float16.
        output_path: a folder that does not exist.
        bits: of a weight; the default is 8 for int8 and fp8, else 4.
        group_size: inputs that share a scale, for awq, gptq and int4; the default is 128, or the largest power of two
            below it that divides the inputs of every matrix.
        sym: GPTQ's zeros stay in the middle (the default), which the fastest kernels want; False loses less.
        desc_act: GPTQ rounds the most active inputs first; slower to run in some programs.
        calibration: a text file, or JSONL with "text" or "messages", that is like what the model will read; the default
            is a built-in stream of short conversations, which fits no model but grist.
        evaluation: the same for the held-out text; the default is the part of the calibration text behind what is used.
        samples: windows of calibration; an eighth as many, at least 32, are held out.
        window: tokens of each.
        progress: called after each layer.

    Raises:
        CheckpointError: the checkpoint cannot be read, quantised, or written for want of space.
        ConfigError: a setting does not fit the method or the model, the output exists, or it was begun otherwise.
    """
    started = time.perf_counter()
    output = Path(output_path).expanduser().absolute()
    refuse_existing(output)
    source = Source(resolve_model(model_path).path)
    chosen = _choose(method, source, {"bits": bits, "group": group_size, "sym": sym, "desc_act": desc_act})
    texts = _texts(source, chosen, calibration, evaluation, samples, window)
    check_space(output, _space(source, chosen, texts))
    manifest = {
        **msgspec.to_builtins(chosen),
        "mathematics": _MATHEMATICS,
        "samples": samples,
        "window": window,
        "model": source.digest(),
        "text": hashlib.sha256(b"".join(tensor.numpy().tobytes() for text in texts for tensor in text)).hexdigest(),
    }
    job = Job(source, chosen, texts, samples, WorkFolder(output, manifest), progress)
    return job.run(started)


def _choose(name: str, source: Source, options: Mapping[str, Any]) -> Method:
    """The method with its settings, those that were not given by default; refuses what it does not have."""
    kind = METHODS.get(name)
    if kind is None:
        raise ConfigError(f"method is {name}, but it must be one of {', '.join(METHODS)}", param="method")
    fields = {field.name for field in msgspec.structs.fields(kind)}
    settings = {key: value for key, value in options.items() if value is not None}
    if wrong := sorted(settings.keys() - fields):
        names = ", ".join(_OPTION_NAMES.get(key, key) for key in wrong)
        raise ConfigError(f"{names} is no setting of {name}", param=_OPTION_NAMES.get(wrong[0], wrong[0]))
    if "group" in fields:
        sizes = [linear.in_features for layer in source.layers for linear in _linears(layer)]
        settings.setdefault("group", math.gcd(_GROUP, *sizes))
    chosen = kind(**settings)
    _check_sizes(chosen, source)
    return chosen


def _check_sizes(method: Method, source: Source) -> None:
    group, has_groups = method.group_size, "group" in {field.name for field in msgspec.structs.fields(method)}
    for linear in (linear for layer in source.layers for linear in _linears(layer)):
        inputs = linear.in_features
        for part in linear.parts:
            if has_groups and (group < _LEAST_GROUP or inputs % group):
                fitting = ", ".join(str(size) for size in (128, 64, 32, 16) if inputs % size == 0)
                raise ConfigError(
                    f"group_size is {group}, but for {part.name} it must be a divisor of its {inputs} inputs, and at "
                    f"least {_LEAST_GROUP}: {fitting or 'there is none, but int8 and fp8 need no groups'}",
                    param="group_size",
                )
            if part.out_features % method.multiple or inputs % method.multiple:
                raise CheckpointError(
                    f"{part.name} is [{part.out_features}, {inputs}], but {method.name} with {method.bits} bits packs "
                    f"{method.multiple} together: both must be multiples of it. int8, int4 and fp8 need none"
                )


def _linears(layer: RotaryLayerDecl) -> tuple[LinearDecl, ...]:
    return layer.qkv, layer.output, layer.gate_up, layer.down


def _texts(
    source: Source,
    method: Method,
    calibration: str | Path | None,
    evaluation: str | Path | None,
    samples: int,
    window: int,
) -> Texts:
    longest = source.decl.spec.max_model_len
    if not 2 <= window <= longest:
        raise ConfigError(
            f"window is {window}, but it must be between 2 and {longest}, the model's positions", param="window"
        )
    if samples < 1:
        raise ConfigError(f"samples is {samples}, but it must be at least 1", param="samples")
    reader = TextSource.load(source.folder)
    held = max(samples // 8, _LEAST_HELD)
    used = samples if method.calibrated else 0
    if calibration is None:
        own = windows(reader.built_in(CALIBRATION_SEED), window, used)
        others = windows(reader.built_in(HELD_OUT_SEED), window, held)
    else:
        path = Path(calibration).expanduser()
        read = windows(reader.file(path), window, used + (held if evaluation is None else 0))
        count = len(read.ids)
        if count < method.calibrated + (evaluation is None):
            raise ConfigError(
                f"{path} holds {count} windows of {window} tokens, which is too little: give a longer text or a "
                "smaller window",
                param="calibration",
            )
        if evaluation is None and used:
            used = min(used, count - max(1, count // 8))  # a short text keeps the same proportion
        if method.calibrated and min(used, count) < samples:
            _log.warning("samples is %d, but %s holds only %d windows for it", samples, path, min(used, count))
        own, others = read.rows(0, used), read.rows(used, count)
    if evaluation is not None:
        others = windows(reader.file(Path(evaluation).expanduser()), window, held)
    if not others.scored[:, 1:].any():
        raise ConfigError(
            f"the held-out text has {len(others.ids)} windows of {window} tokens, and none can be scored: give a "
            "longer one, or a smaller window",
            param="evaluation",
        )
    return Texts(own, others)


def _space(source: Source, method: Method, texts: Texts) -> int:
    """Bytes on disk: the output, and the activations behind one layer and the next."""
    spec = source.decl.spec
    matrices = sum(linear.in_features * linear.out_features for layer in source.layers for linear in _linears(layer))
    others = spec.num_parameters - matrices
    scales = 4 / method.group_size if method.group_size else 0.01
    states = (texts.calibration.ids.numel() + 2 * texts.held_out.ids.numel()) * spec.hidden_size * 4
    return int(matrices * (method.bits / 8 + scales)) + others * 4 + 2 * states
