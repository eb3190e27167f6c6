"""`millrace quantize`, which makes quantised checkpoints, and `millrace eval perplexity`, which says what they lose."""

import argparse
import time

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from millrace.runtime.config import Config
from millrace.runtime.gpu import open_gpu
from millrace.runtime.loading import load
from millrace.runtime.models.host import tensor_model
from millrace.runtime.quant.calibration import TextSource
from millrace.runtime.quant.evaluate import perplexity
from millrace.runtime.quant.quantize import quantize

_err = Console(stderr=True, highlight=False)


def quantize_checkpoint(args: argparse.Namespace) -> int:
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


def print_perplexity(args: argparse.Namespace, config: Config) -> int:
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

        model, text = tensor_model(loaded.model), TextSource(loaded.tokenizer, loaded.template)
        result = perplexity(model, text.file(args.file), window=args.window, stride=args.stride, progress=show)
    print(f"perplexity {result.value:.4f} over {result.scored:,} tokens ({result.seconds:.1f} s)")
    return 0
