"""What a decode step takes beside its forward pass: sampling, the actors, and everything between two steps.

    python bench/step_share.py [--shape S] [--quantize Q ...] [--batches N ...] [--rounds N] [--threads N] [--json FILE]

One runtime over random weights. In every round it decodes greedily through `Runtime.submit`, which gives the time of a
step; then one forward pass of that run is repeated alone, by a thread of its own: what the arithmetic takes when nothing
else happens. The share is 1 - forward / step, the median of the rounds. `idle` is the part of it in which no forward
pass ran; the rest is what other work on the same cores costs the forward pass.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import uvloop
from rich.console import Console
from rich.table import Table
from torch import Tensor

from millrace.runtime import Runtime, SamplingParams
from millrace.runtime.app import available_cores
from millrace.runtime.models.base import ForwardBatch
from millrace.runtime.models.decoder import DecoderModel

PROMPT, NEW_TOKENS, SETTLED = 128, 64, 8


class Recorder:
    """The forward passes of decode steps: when each began and ended, and one to repeat."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []
        self.pass_: tuple[DecoderModel, ForwardBatch, Any] | None = None
        self._forward = DecoderModel.forward
        recorder = self

        def forward(model: DecoderModel, batch: ForwardBatch, kv: Any) -> Tensor:
            start = time.perf_counter()
            logits = recorder._forward(model, batch, kv)
            if batch.is_decode:
                recorder.times.append((start, time.perf_counter()))
                if len(recorder.times) == NEW_TOKENS // 2:
                    recorder.pass_ = (model, _kept(batch), kv)
            return logits

        DecoderModel.forward = forward  # type: ignore[method-assign]

    def repeat(self, times: int) -> list[float]:
        """Seconds of each repetition. It writes the same keys and values over the ones that are there."""
        assert self.pass_ is not None
        model, batch, kv = self.pass_
        seconds = []
        for _ in range(times):
            start = time.perf_counter()
            self._forward(model, batch, kv)
            seconds.append(time.perf_counter() - start)
        return seconds


def _kept(batch: ForwardBatch) -> ForwardBatch:
    """A batch that later steps do not write into."""
    copied = {name: value.clone() for name, value in msgspec.structs.asdict(batch).items() if isinstance(value, Tensor)}
    return msgspec.structs.replace(batch, **copied)


async def decode(runtime: Runtime, batch: int, salt: str) -> None:
    draw = random.Random(salt)
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)

    async def one() -> None:
        prompt = [draw.randrange(1000, 100_000) for _ in range(PROMPT)]
        async for _ in runtime.submit(prompt, params, cache_salt=salt):
            pass

    async with asyncio.TaskGroup() as group:
        for _ in range(batch):
            group.create_task(one())


async def measure(shape: str, quantize: str, batches: list[int], rounds: int, threads: int) -> list[dict[str, Any]]:
    recorder, samples = Recorder(), {batch: [] for batch in batches}  # type: ignore[var-annotated]
    options: dict[str, Any] = {"model__random_weights": shape, "model__quantize": quantize}
    # Whole prompts in one step: sequences decode together soon.
    offline = {"scheduler__inter_token_target_ms": 0, "scheduler__max_prefill_tokens": 2048}
    async with Runtime(
        **options, **offline, model__max_model_len=2048, device__threads=threads, log__level="error"
    ) as runtime:
        for number in range(-1, rounds):  # the first meets cold code, and does not count
            for batch in batches:
                recorder.times.clear()
                await decode(runtime, batch, f"{number} {batch}")
                times = recorder.times[SETTLED - NEW_TOKENS :]
                alone = await asyncio.to_thread(recorder.repeat, NEW_TOKENS // 2)
                if number < 0:
                    continue
                steps = [after[1] - before[1] for before, after in zip(times, times[1:], strict=False)]
                inside = [end - start for start, end in times[1:]]
                step = statistics.median(steps)
                samples[batch].append(
                    {
                        "step_ms": 1e3 * step,
                        "share": 1 - statistics.median(alone) / step,
                        "idle": statistics.median(1 - part / whole for part, whole in zip(inside, steps, strict=True)),
                    }
                )
    DecoderModel.forward = recorder._forward  # type: ignore[method-assign]
    return [{"quantize": quantize, "batch": batch, "rounds": found} for batch, found in samples.items()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen2.5-0.5b")
    parser.add_argument("--quantize", nargs="+", default=["none", "int8", "int4"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--json", type=Path, help="write all rounds there too")
    args = parser.parse_args()
    rows = []
    for quantize in args.quantize:
        rows += uvloop.run(measure(args.shape, quantize, args.batches, args.rounds, args.threads))
    table = Table(title=f"{args.shape}: share of a decode step beside its forward pass, median (min-max)")
    for column in ("weights", "batch", "share", "of it idle"):
        table.add_column(column, justify="left" if column == "weights" else "right")
    for row in rows:
        cells = []
        for name in ("share", "idle"):
            found = [sample[name] for sample in row["rounds"]]
            cells.append(f"{statistics.median(found):.1%} ({min(found):.1%}-{max(found):.1%})")
        table.add_row("as they are" if row["quantize"] == "none" else row["quantize"], str(row["batch"]), *cells)
    Console().print(table)
    if args.json is not None:
        result = {"bench": "step_share", "shape": args.shape, "threads": args.threads, "rows": rows}
        args.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
