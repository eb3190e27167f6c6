"""`millrace build`: packs a model's weights once, so that later starts read them ready."""

import argparse
import time

from rich.console import Console

from millrace.kernels import cpu_library
from millrace.runtime.config import Config, replace
from millrace.runtime.errors import ConfigError
from millrace.runtime.loading import build_options, load
from millrace.runtime.models.cpu_model import CpuModel
from millrace.runtime.weights.build import check_output, identity, write_build

_err = Console(stderr=True, highlight=False)


def build(args: argparse.Namespace, config: Config) -> int:
    for key, value, wanted in (
        ("model.build", config.model.build, ""),
        ("model.random_weights", config.model.random_weights, ""),
        ("device.kind", config.device.kind, "cpu"),
    ):
        if value != wanted and not (key == "device.kind" and value == "auto"):
            fault = f"{key} is {value}, but a build is made of a checkpoint for the CPU: leave it out"
            raise ConfigError(fault, param=key)
    started = time.perf_counter()
    output = args.output.expanduser()
    check_output(output)
    _err.print(cpu_library.prepare(), soft_wrap=True)
    if cpu_library.default_library() is None:
        raise ConfigError("a build keeps weights as the C++ kernels want them, which are not here: install g++")
    # For all positions and any cache: the start says which.
    loaded = load(replace(config, {"model.max_model_len": 0, "kv.dtype": "auto"}))
    if not isinstance(loaded.model, CpuModel):
        raise ConfigError(
            f"{loaded.name} has matrices or heads that torch computes and not the C++ kernels, whose weights a build "
            "keeps: start without one"
        )
    size = write_build(output, identity(loaded.path, build_options(config)), loaded.model)
    print(f"{args.output}: {size / 1e6:,.1f} MB in {time.perf_counter() - started:.1f} s")
    return 0
