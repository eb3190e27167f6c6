"""The commands that run a model: serve, inspect, generate and chat."""

import argparse
import asyncio
import sys
from importlib import import_module

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from millrace.runtime.app import Runtime
from millrace.runtime.config import Config
from millrace.runtime.types import ChatMessage, SamplingParams

_err = Console(stderr=True, highlight=False)


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


async def serve(args: argparse.Namespace, config: Config) -> int:
    # The server is imported where it is served, since other commands and programs that embed the runtime need no HTTP:
    # in a thread, while weights are read.
    importing = asyncio.create_task(asyncio.to_thread(import_module, "millrace.server.app"))
    runtime = Runtime(config=config, progress=_Bar())
    async with runtime:
        _describe(runtime)

        def ready(url: str) -> None:
            _err.print(f"\n  chat page  [bold]{url}/[/]\n  API        {url}/v1\n", highlight=False)

        await (await importing).serve(runtime, on_ready=ready)
    return 0


async def inspect(args: argparse.Namespace, config: Config) -> int:
    async with Runtime(config=config, progress=_Bar()) as runtime:
        _describe(runtime)
    return 0


async def generate(args: argparse.Namespace, config: Config) -> int:
    text = args.prompt if args.prompt is not None else sys.stdin.read()
    async with Runtime(config=config, progress=_Bar()) as runtime:
        async for delta in runtime.submit(text, _sampling(args, runtime, text)):
            print(delta.text, end="", flush=True)
        print()
    return 0


async def chat(args: argparse.Namespace, config: Config) -> int:
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
