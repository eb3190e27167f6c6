"""`millrace build`: packs a model's matrices once, so that later starts read them ready."""

import argparse
import time

from rich.console import Console

from millrace.kernels import ops
from millrace.runtime.config import Config
from millrace.runtime.errors import ConfigError
from millrace.runtime.loading import build_options, load
from millrace.runtime.weights.build import BuildWriter, identity
from millrace.runtime.weights.resolve import resolve_model

_err = Console(stderr=True, highlight=False)


def build(args: argparse.Namespace, config: Config) -> int:
    for key, value, wanted in (
        ("model.build", config.model.build, ""),
        ("model.random_weights", config.model.random_weights, ""),
        ("device.kind", config.device.kind, "cpu"),
    ):
        if value not in (wanted, "auto"):
            fault = f"{key} is {value}, but a build is made of a checkpoint for the CPU: leave it out"
            raise ConfigError(fault, param=key)
    started = time.perf_counter()
    _err.print(ops.prepare(), soft_wrap=True)
    path = resolve_model(config.model.path).path
    writer = BuildWriter(args.output.expanduser(), identity(path, build_options(config)))
    try:
        load(config, build=writer)
        size = writer.finish()
    except BaseException:
        writer.abandon()
        raise
    print(f"{args.output}: {size / 1e6:,.1f} MB in {time.perf_counter() - started:.1f} s")
    return 0
