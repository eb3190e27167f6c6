"""`millrace build`: packs a model's matrices once, so that later starts read them ready."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from millrace.kernels import ops
from millrace.runtime.config import Config
from millrace.runtime.errors import ConfigError
from millrace.runtime.loading import build_options, load
from millrace.runtime.weights.build import BuildWriter, identity
from millrace.runtime.weights.resolve import resolve_model

_BUILD = """pack a model's matrices for this processor, so that starts are quicker

Later: millrace serve MODEL --build OUT, with the same --dtype and --quantize. The folder may be deleted at any time;
where it does not fit any more (another processor, other kernels or options, a changed model), the log says so, and
the model is packed at the start as without it."""

_err = Console(stderr=True, highlight=False)


def add_build(commands: Any, add_options: Callable[[argparse.ArgumentParser], None]) -> None:
    """`add_options` adds the options of config.toml to a command."""
    command = commands.add_parser(
        "build",
        help=_BUILD.splitlines()[0],
        description=_BUILD,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(command=_build)
    command.add_argument("model", metavar="MODEL", help="checkpoint folder, GGUF file, hub id or grist")
    command.add_argument("output", metavar="OUT", type=Path, help="folder that does not exist yet")
    command.add_argument("--config", type=Path, metavar="FILE", help="read options from a TOML file")
    add_options(command)


def _build(args: argparse.Namespace, config: Config) -> int:
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
