"""`millrace quantize`, which makes quantised checkpoints, and `millrace eval perplexity`, which says what they lose."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from millrace.runtime.config import Config
from millrace.runtime.gpu import open_gpu
from millrace.runtime.loading import load

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


def add_quantize(commands: Any) -> None:
    command = commands.add_parser(
        "quantize",
        help=_QUANTIZE.splitlines()[0],
        description=_QUANTIZE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(command=None, beforehand=_quantize)
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


def _quantize(args: argparse.Namespace) -> int:
    # Imported where it is used: it brings what no other command needs.
    from millrace.runtime.quant.quantize import quantize

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} layers"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=_err, transient=True) as progress:
        task = progress.add_task(f"{args.method}: reading", total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, description=args.method, completed=done, total=total)

        try:
            report = quantize(
                args.method,
                args.model,
                args.output,
                bits=args.bits,
                group_size=args.group_size,
                sym=args.sym,
                desc_act=args.desc_act,
                calibration=args.calibration,
                evaluation=args.eval,
                samples=args.samples,
                window=args.window,
                progress=show,
            )
        except KeyboardInterrupt:
            _err.print("stopped; the same command goes on behind the last finished layer")
            raise
    print(report.table())
    _err.print(f"written to {report.output}", markup=False, soft_wrap=True)
    return 0


def add_eval(commands: Any, add_options: Callable[[argparse.ArgumentParser], None]) -> None:
    """`add_options` adds the options of config.toml to a command."""
    evals = commands.add_parser("eval", help="measure what a model knows of a text")
    text = "perplexity of a text: exp of the mean negative log-likelihood of its tokens"
    command = evals.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "perplexity", help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    command.set_defaults(command=_perplexity)
    command.add_argument("model", metavar="MODEL", help="checkpoint folder, hub id or grist")
    command.add_argument(
        "file",
        type=Path,
        metavar="FILE",
        help='plain text, or JSONL with "text" or "messages"; of messages, the replies are scored',
    )
    command.add_argument("--window", type=int, metavar="N", help="tokens that the model sees at a time; up to 1024")
    command.add_argument("--stride", type=int, metavar="N", help="tokens by which it moves on; half a window")
    command.add_argument("--config", type=Path, metavar="FILE", help="read options from a TOML file")
    add_options(command)


def _perplexity(args: argparse.Namespace, config: Config) -> int:
    from millrace.runtime.quant.calibration import TextSource
    from millrace.runtime.quant.evaluate import perplexity

    if config.device.threads:
        torch.set_num_threads(config.device.threads)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=_err, transient=True) as progress:
        task = progress.add_task("loading")
        loaded = load(config, gpu=open_gpu(config))
        started = time.perf_counter()

        def show(tokens: int) -> None:
            rate = tokens / (time.perf_counter() - started)
            progress.update(task, description=f"{tokens:,} tokens, {rate:,.0f} tokens/s")

        text = TextSource(loaded.tokenizer, loaded.template)
        result = perplexity(loaded.model, text.file(args.file), window=args.window, stride=args.stride, progress=show)
    print(f"perplexity {result.value:.4f} over {result.scored:,} tokens ({result.seconds:.1f} s)")
    return 0
