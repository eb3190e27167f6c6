"""The `millrace` command: serve, chat, generate, inspect, eval; every option of config.toml is a flag of each. And what
can be done beforehand: prepare (CPU kernels), kernels build (CUDA kernels), build and quantize (a checkpoint)."""

import argparse
import sys
from collections.abc import Callable, Coroutine, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.markup import escape

from millrace.kernels.cuda_compile import ARCHS
from millrace.runtime.config import Config, load_config, options
from millrace.runtime.errors import MillraceError

# Flags that people know from other servers, beside --section-name.
_SHORT = {
    "server.host": "--host",
    "server.port": "--port",
    "model.served_name": "--served-model-name",
    "model.dtype": "--dtype",
    "model.max_model_len": "--max-model-len",
    "model.quantize": "--quantize",
    "model.build": "--build",
    "model.random_weights": "--random-weights",
    "device.threads": "--threads",
    "log.level": "--log-level",
}

_BUILD = """pack a model's weights for this processor, so that a start needs neither minutes nor torch

Later: millrace serve MODEL --build OUT, with the same --dtype and --quantize. The folder may be deleted at any time;
where it does not fit any more (another processor, other kernels or options, a changed model), the log says so, and
the model is packed at the start as without it."""

_QUANTIZE = """write a quantised copy of a checkpoint: AWQ, GPTQ, int8, int4 or FP8

Layer by layer, in the memory of one layer and the activations. What is finished lies in OUT.partial; the same command
goes on there after it was stopped. It ends with the perplexity of held-out text before and after."""

_METHODS = {
    "awq": "4 bits, scaled by activations (AutoAWQ gemm)",
    "gptq": "2, 3, 4 or 8 bits, errors made up for (GPTQ v1)",
    "int8": "weights and activations (compressed-tensors)",
    "int4": "4 bits, round to nearest (compressed-tensors)",
    "fp8": "weights and activations (compressed-tensors)",
}

_err = Console(stderr=True, highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    args = _parser().parse_args(arguments)
    try:
        if args.command is None:
            beforehand: Callable[[argparse.Namespace], int] = args.beforehand
            return beforehand(args)
        overrides = {key: value for key, value in vars(args).items() if "." in key and value is not None}
        if args.model is not None:
            overrides["model.path"] = args.model
        config = load_config(args.config, overrides)
        command: Callable[[argparse.Namespace, Config], Coroutine[Any, Any, int] | int] = args.command
        result = command(args, config)
        return result if isinstance(result, int) else uvloop.run(result)
    except MillraceError as error:
        _err.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        return 2
    except OSError as error:
        _err.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="millrace", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, text in (
        ("serve", "serve a model over HTTP, SSE and WebSocket"),
        ("chat", "talk to a model in the terminal"),
        ("generate", "continue a text"),
        ("inspect", "print architecture, sizes and the memory plan"),
    ):
        command = commands.add_parser(
            name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        command.set_defaults(command=_later("cli_run", name))
        command.add_argument(
            "model",
            nargs="?",
            metavar="MODEL",
            help="checkpoint folder, GGUF file or hub id; the embedded grist if left out",
        )
        _add_options(command)
        if name in ("chat", "generate"):
            command.add_argument("--max-tokens", type=int, default=256, help="longest answer in tokens")
            command.add_argument("--temperature", type=float, default=0.7, help="0 is greedy")
            command.add_argument("--seed", type=int, help="the same seed draws the same tokens")
        if name == "generate":
            command.add_argument("--prompt", help="text to continue; standard input if left out")
    text = "build the CPU kernels now instead of at the first start"
    prepare = commands.add_parser("prepare", help=text, description=text)
    prepare.set_defaults(command=None, beforehand=_later("cli_kernels", "prepare"))
    _add_kernels(commands)
    _add_build(commands)
    _add_quantize(commands)
    _add_eval(commands)
    return parser


def _later(module: str, function: str) -> Callable[..., Any]:
    """What a command does is imported when it runs: `--help`, and the word about a wrong option, need no torch."""
    return lambda *args: getattr(import_module(f"millrace.runtime.{module}"), function)(*args)


def _add_kernels(commands: Any) -> None:
    text = "compile the CUDA kernels into the cache; needs NVRTC, and no GPU"
    kernels = commands.add_parser("kernels", help="compile the CUDA kernels beforehand")
    build = kernels.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "build", help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    build.set_defaults(command=None, beforehand=_later("cli_kernels", "build"))
    build.add_argument(
        "--arch",
        nargs="+",
        choices=ARCHS,
        metavar="ARCH",
        help=f"{', '.join(ARCHS)}; that of this machine's GPU if left out",
    )
    build.add_argument(
        "--cache", type=Path, metavar="DIR", help="folder of the cache; $XDG_CACHE_HOME decides if left out"
    )
    build.add_argument("--jobs", type=int, metavar="N", help="compile N at a time; one per processor if left out")


def _add_described(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    """A command whose help is the first line of its description."""
    raw = argparse.RawDescriptionHelpFormatter
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text.splitlines()[0], description=text, formatter_class=raw
    )
    return parser


def _add_build(commands: Any) -> None:
    command = _add_described(commands, "build", _BUILD)
    command.set_defaults(command=_later("cli_build", "build"))
    command.add_argument("model", metavar="MODEL", help="checkpoint folder, GGUF file, hub id or grist")
    command.add_argument("output", metavar="OUT", type=Path, help="folder that does not exist yet")
    _add_options(command)


def _add_quantize(commands: Any) -> None:
    command = _add_described(commands, "quantize", _QUANTIZE)
    command.set_defaults(command=None, beforehand=_later("cli_quant", "quantize_checkpoint"))
    command.add_argument("model", metavar="MODEL", help="checkpoint folder, hub id or grist")
    command.add_argument("output", metavar="OUT", type=Path, help="folder that does not exist yet")
    methods = "; ".join(f"{name}: {text}" for name, text in _METHODS.items())
    command.add_argument("--method", required=True, choices=tuple(_METHODS), help=methods)
    command.add_argument("--bits", type=int, help="of a weight; 4 for awq, gptq and int4, else 8, if left out")
    command.add_argument(
        "--group-size",
        type=int,
        metavar="N",
        help="inputs that share a scale; if left out 128, or the largest power of two below it that divides all inputs",
    )
    command.add_argument(
        "--sym",
        action=argparse.BooleanOptionalAction,
        help="gptq: zeros in the middle, as the fastest kernels want them (the default); --no-sym loses less",
    )
    command.add_argument(
        "--desc-act",
        action=argparse.BooleanOptionalAction,
        help="gptq: the most active inputs first; slower to run in some programs",
    )
    command.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help='plain text, or JSONL with "text" or "messages". A file of what the model will be used for is better than '
        "the built-in conversations, which fit no model but grist",
    )
    command.add_argument(
        "--eval", type=Path, metavar="FILE", help="held-out text; if left out, the calibration text behind what is used"
    )
    command.add_argument("--samples", type=int, default=64, metavar="N", help="windows of calibration (64)")
    command.add_argument("--window", type=int, default=512, metavar="N", help="tokens of each (512)")


def _add_eval(commands: Any) -> None:
    evals = commands.add_parser("eval", help="measure what a model knows of a text")
    text = "perplexity of a text: exp of the mean negative log-likelihood of its tokens"
    command = evals.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "perplexity", help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    command.set_defaults(command=_later("cli_quant", "print_perplexity"))
    command.add_argument("model", metavar="MODEL", help="checkpoint folder, hub id or grist")
    command.add_argument(
        "file",
        type=Path,
        metavar="FILE",
        help='plain text, or JSONL with "text" or "messages"; of messages, the replies are scored',
    )
    command.add_argument("--window", type=int, metavar="N", help="tokens that the model sees at a time; up to 1024")
    command.add_argument("--stride", type=int, metavar="N", help="tokens by which it moves on; half a window")
    _add_options(command)


def _add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", type=Path, metavar="FILE", help="read options from a TOML file")
    group = command.add_argument_group("options of config.toml")
    for option in options():
        if option.key == "model.path":
            continue  # MODEL
        flags = [flag for flag in (_SHORT.get(option.key), option.flag) if flag]
        settings: dict[str, Any] = {"dest": option.key, "default": argparse.SUPPRESS}
        text = option.description.replace("%", "%%")
        if option.kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings["type"] = _comma_separated if option.kind is tuple else option.kind
            settings["metavar"] = option.name.upper()
            if option.choices:
                settings |= {"choices": option.choices, "metavar": None}
        group.add_argument(*flags, help=f"{text} (default: {option.default!r})", **settings)


def _comma_separated(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


if __name__ == "__main__":
    sys.exit(main())
