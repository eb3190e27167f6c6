"""The `millrace` command: serve, chat, generate, inspect, eval; every option of config.toml is a flag of each. And what
can be done beforehand: prepare (CPU kernels), kernels build (CUDA kernels), quantize (a checkpoint)."""

import argparse
import asyncio
import sys
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import torch
import uvloop
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from millrace.kernels import ops
from millrace.kernels.cpu_build import BuildError
from millrace.kernels.cuda_catalog import all_kernels
from millrace.kernels.cuda_compile import ARCHS, Built, CudaCompiler, build_all
from millrace.runtime.app import Runtime
from millrace.runtime.cli_build import add_build
from millrace.runtime.cli_quant import add_eval, add_quantize
from millrace.runtime.config import Config, load_config, options
from millrace.runtime.errors import MillraceError
from millrace.runtime.types import ChatMessage, SamplingParams

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
    for run, text in (
        (_serve, "serve a model over HTTP, SSE and WebSocket"),
        (_chat, "talk to a model in the terminal"),
        (_generate, "continue a text"),
        (_inspect, "print architecture, sizes and the memory plan"),
    ):
        command = commands.add_parser(
            run.__name__.lstrip("_"),
            help=text,
            description=text,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        command.set_defaults(command=run)
        command.add_argument(
            "model",
            nargs="?",
            metavar="MODEL",
            help="checkpoint folder, GGUF file or hub id; the embedded grist if left out",
        )
        command.add_argument("--config", type=Path, metavar="FILE", help="read options from a TOML file")
        _add_options(command)
        if run in (_chat, _generate):
            command.add_argument("--max-tokens", type=int, default=256, help="longest answer in tokens")
            command.add_argument("--temperature", type=float, default=0.7, help="0 is greedy")
            command.add_argument("--seed", type=int, help="the same seed draws the same tokens")
        if run is _generate:
            command.add_argument("--prompt", help="text to continue; standard input if left out")
    text = "build the CPU kernels now instead of at the first start"
    commands.add_parser("prepare", help=text, description=text).set_defaults(command=None, beforehand=_prepare)
    _add_kernels(commands)
    add_build(commands, _add_options)
    add_quantize(commands)
    add_eval(commands, _add_options)
    return parser


def _add_kernels(commands: Any) -> None:
    text = "compile the CUDA kernels into the cache; needs NVRTC, and no GPU"
    kernels = commands.add_parser("kernels", help="compile the CUDA kernels beforehand")
    build = kernels.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "build", help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    build.set_defaults(command=None, beforehand=_build_kernels)
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


def _add_options(command: argparse.ArgumentParser) -> None:
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


class _Bar:
    """A progress bar that appears only if loading takes long enough to be looked at."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        self._progress = Progress(*columns, TimeElapsedColumn(), console=_err, transient=True)
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self._tasks:
            self._progress.start()
            self._tasks[what] = self._progress.add_task(f"loading {what}", total=total)
        self._progress.update(self._tasks[what], completed=done)
        if done >= total:
            self._progress.stop()


def _prepare(args: argparse.Namespace) -> int:
    _err.print(ops.prepare(), soft_wrap=True)
    return 0


def _build_kernels(args: argparse.Namespace) -> int:
    """Fills the cache of compiled CUDA kernels, and prints where it is."""
    compiler = CudaCompiler() if args.cache is None else CudaCompiler(cache_dir=args.cache)
    fault = ""
    archs = args.arch or _own_arch()
    if not archs:
        fault = f"there is no GPU here whose architecture could be taken; name one with --arch ({', '.join(ARCHS)})"
    elif compiler.nvrtc is None:
        fault = "NVRTC, which compiles the kernels, was not found: pip install 'nvidia-cuda-nvrtc==13.0.*'"
    elif args.jobs is not None and args.jobs < 1:
        fault = f"--jobs is {args.jobs}, but it must be at least 1"
    if fault:
        _err.print(f"[bold red]error:[/] {escape(fault)}", soft_wrap=True)
        return 2
    archs = list(dict.fromkeys(archs))
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    compiled = 0
    try:
        with Progress(*columns, TimeElapsedColumn(), console=_err, transient=True) as progress:
            task = progress.add_task("CUDA kernels", total=None)

            def show(built: Built) -> None:
                nonlocal compiled
                compiled += not built.cached
                progress.update(task, description=f"CUDA kernels {built.arch}", completed=built.done, total=built.total)

            total = build_all(all_kernels(), archs, show, compiler=compiler, workers=args.jobs)
    except BuildError as error:
        _err.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        return 130
    _err.print(f"{total} CUDA modules for {', '.join(archs)} ({compiled} compiled now) in", soft_wrap=True)
    print(compiler.cache_dir)
    return 0


def _own_arch() -> list[str]:
    """The architecture of this machine's first GPU, if there is one."""
    if not torch.cuda.is_available():
        return []
    major, minor = torch.cuda.get_device_capability()
    return [f"sm_{major}{minor}"]


async def _serve(args: argparse.Namespace, config: Config) -> int:
    # The server is imported where it is served: the other commands, and programs that embed the runtime, need no HTTP.
    from millrace.server.app import serve

    runtime = Runtime(config=config, progress=_Bar())
    async with runtime:
        _describe(runtime)

        def ready(url: str) -> None:
            _err.print(f"\n  chat page  [bold]{url}/[/]\n  API        {url}/v1\n", highlight=False)

        await serve(runtime, on_ready=ready)
    return 0


async def _inspect(args: argparse.Namespace, config: Config) -> int:
    async with Runtime(config=config, progress=_Bar()) as runtime:
        _describe(runtime)
    return 0


async def _generate(args: argparse.Namespace, config: Config) -> int:
    text = args.prompt if args.prompt is not None else sys.stdin.read()
    async with Runtime(config=config, progress=_Bar()) as runtime:
        async for delta in runtime.submit(text, _sampling(args, runtime, text)):
            print(delta.text, end="", flush=True)
        print()
    return 0


async def _chat(args: argparse.Namespace, config: Config) -> int:
    async with Runtime(config=config, progress=_Bar()) as runtime:
        _err.print(f"[dim]{runtime.model_name}; an empty line or Ctrl-D ends the conversation[/]")
        messages: list[ChatMessage] = []
        while line := await asyncio.to_thread(_read_line):
            messages.append(ChatMessage(role="user", content=line))
            answer = ""
            async for delta in runtime.submit(messages, _sampling(args, runtime, "")):
                answer += delta.text
                print(delta.text, end="", flush=True)
            print("\n")
            messages.append(ChatMessage(role="assistant", content=answer))
    return 0


def _sampling(args: argparse.Namespace, runtime: Runtime, text: str) -> SamplingParams:
    return SamplingParams(
        max_tokens=min(args.max_tokens, runtime.max_model_len // 2), temperature=args.temperature, seed=args.seed
    )


def _read_line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def _describe(runtime: Runtime) -> None:
    spec = runtime.spec
    rows = [
        ("model", runtime.model_name, spec.architecture),
        ("parameters", f"{spec.num_parameters:,}", f"{spec.num_layers} layers, {spec.hidden_size} wide"),
        (
            "attention",
            f"{spec.num_heads} heads",
            f"{spec.num_kv_heads} of keys and values, {spec.head_dim} wide"
            + (f", window {spec.sliding_window}" if spec.sliding_window else ""),
        ),
        ("vocabulary", f"{spec.vocab_size:,}", f"tokens; a text ends at {list(spec.eos_token_ids)}"),
    ]
    for name, value, text in rows:
        _err.print(f"  {name:<10} {value:>12}  {text}", markup=False)
    _err.print(f"  {'matrices':<10} {spec.weights}", markup=False, soft_wrap=True)
    _err.print(runtime.memory_plan.table(), markup=False)


if __name__ == "__main__":
    sys.exit(main())
