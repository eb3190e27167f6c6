"""What a decode step takes beside its forward pass, and how near it is to the memory's floor.

    python bench/step_share.py [--shape S] [--precisions P ...] [--batches N ...] [--rounds N] [--json FILE]

A runtime over random weights decodes greedily through `Runtime.submit`. Behind every second forward pass of a decode
step the same pass is done again, with nothing else to do for anybody: that is what the arithmetic takes. Behind that a
probe reads as many bytes as the weights have: the floor, at the rate that the machine has within these milliseconds.

A step is from the end of one pass to the end of the next. By the medians of a round, `around` is 1 - pass / step for
the pass alone, `idle` is the part of a step in which no pass ran (the rest of `around` is what other work on the same
cores costs the pass), and `of floor` is probe / step.
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

import uvloop
from peers.probe import ReadProbe
from peers.table import weight_bytes
from rich.console import Console
from rich.table import Table

from millrace.runtime import Runtime, SamplingParams
from millrace.runtime.app import available_cores
from millrace.runtime.models.base import ForwardBatch
from millrace.runtime.models.cpu_model import CpuModel
from millrace.runtime.weights.synthetic import preset

PROMPT, NEW_TOKENS, SETTLED = 128, 64, 8
GROUP = 128  # weights with one scale, in int4
PRECISIONS: dict[str, dict[str, str]] = {
    "fp32": {"model__dtype": "float32"},
    "bf16": {"model__dtype": "bfloat16"},
    "int8": {"model__quantize": "int8"},
    "int4": {"model__quantize": "int4"},
}


class Recorder:
    """Stands in for `CpuModel.forward`: times the passes of decode steps, and repeats every second one."""

    def __init__(self, probe: ReadProbe) -> None:
        self.steps: list[float] = []  # seconds, from the end of the pass before
        self.passes: list[float] = []  # seconds, within the step of the same index
        self.alone: list[float] = []  # seconds, of repeated ones
        self.floor: list[float] = []  # seconds, of the probe
        self._probe = probe
        self._ended = 0.0
        self._forward = CpuModel.forward

    def __enter__(self) -> "Recorder":
        recorder = self
        # A function, so that it is bound to the model like the method whose place it takes.
        CpuModel.forward = lambda model, batch, kv: recorder.forward(model, batch, kv)  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        CpuModel.forward = self._forward  # type: ignore[method-assign]

    def forward(self, model: CpuModel, batch: ForwardBatch[Any], kv: Any) -> Any:
        start = time.perf_counter()
        logits = self._forward(model, batch, kv)
        end = time.perf_counter()
        if batch.is_decode:
            self.steps.append(end - self._ended)
            self.passes.append(end - start)
            if len(self.steps) % 2:
                self._forward(model, batch, kv)  # the same keys and values over the ones that are there
                self.alone.append(time.perf_counter() - end)
                self.floor.append(self._probe.seconds())
        self._ended = time.perf_counter()
        return logits

    def take(self) -> dict[str, float]:
        """Of the steps since it was last asked, the first few left out: sequences may join one after the other."""
        step, inside = (statistics.median(times[SETTLED:]) for times in (self.steps, self.passes))
        alone, floor = (statistics.median(times[SETTLED // 2 :]) for times in (self.alone, self.floor))
        for times in (self.steps, self.passes, self.alone, self.floor):
            times.clear()
        return {"step_ms": 1e3 * step, "around": 1 - alone / step, "idle": 1 - inside / step, "floor": floor / step}


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


async def measure(shape: str, precision: str, batches: list[int], rounds: int, threads: int) -> list[dict[str, Any]]:
    samples: dict[int, list[dict[str, float]]] = {batch: [] for batch in batches}
    options: dict[str, Any] = {
        "model__random_weights": shape,
        **PRECISIONS[precision],
        "model__quantize_group_size": GROUP,
        "model__max_model_len": 2048,
        "device__threads": threads,
        "log__level": "error",
        # Whole prompts in one step: sequences decode together soon.
        "scheduler__inter_token_target_ms": 0,
        "scheduler__max_prefill_tokens": 2048,
    }
    probe = ReadProbe(round(weight_bytes(preset(shape), precision, GROUP)), threads)
    with Recorder(probe) as recorder:
        async with Runtime(**options) as runtime:
            for number in range(-1, rounds):  # the first meets cold code, and does not count
                for batch in batches:
                    await decode(runtime, batch, f"{number} {batch}")
                    found = recorder.take()
                    if number >= 0:
                        samples[batch].append(found)
    return [{"precision": precision, "batch": batch, "rounds": found} for batch, found in samples.items()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen2.5-0.5b")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--json", type=Path, help="write all rounds there too")
    args = parser.parse_args()
    rows = []
    for precision in args.precisions:
        rows += uvloop.run(measure(args.shape, precision, args.batches, args.rounds, args.threads))
    table = Table(title=f"{args.shape}: parts of a decode step, median (min-max) of rounds")
    for column in ("", "batch", "around the pass", "of it idle", "of floor"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        cells = []
        for name in ("around", "idle", "floor"):
            found = [sample[name] for sample in row["rounds"]]
            cells.append(f"{statistics.median(found):.1%} ({min(found):.1%}-{max(found):.1%})")
        table.add_row(row["precision"], str(row["batch"]), *cells)
    Console().print(table)
    if args.json is not None:
        result = {"bench": "step_share", "shape": args.shape, "threads": args.threads, "rows": rows}
        args.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
