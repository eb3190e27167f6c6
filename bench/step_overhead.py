"""What a step costs besides the arithmetic: CPU microseconds of scheduler, decode, sampler and streamer per step.

    python bench/step_overhead.py [--json FILE]

Model and sampling do nothing, the device runs everything at the launch, and all of it happens on one thread, so that
the thread's CPU time divided by the number of steps is what the engine costs: scheduling, building the batch, reading
back, ending sequences, detokenising and delivering to mailboxes. Then what streaming through aiohttp costs on top
(bench/stream_cost.py). Microseconds depend on the machine's mood: the cost of a fixed piece of Python is printed too.
"""

import argparse
import asyncio
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from prometheus_client import CollectorRegistry
from rich.console import Console
from rich.table import Table
from stream_cost import measure as stream_cost
from stream_cost import measure_floor

from millrace.kernels.cpu_library import set_num_threads
from millrace.runtime import lanes as lanes_module
from millrace.runtime.config import load_config
from millrace.runtime.device import NullDevice
from millrace.runtime.engine import Engine
from millrace.runtime.log import make_logger
from millrace.runtime.models.base import ForwardBatch, ModelSpec
from millrace.runtime.plan import MemoryPlan
from millrace.runtime.sampling.batch import Sampled
from millrace.runtime.text.chat import ChatTemplate
from millrace.runtime.text.tokenizer import Tokenizer
from millrace.runtime.types import Priority, SamplingParams, TokensPrompt
from millrace.runtime.weights.resolve import resolve_model
from millrace.runtime.world import AsyncioWorld

VOCAB = 256
BUDGET_US, BUDGET_US_PER_ROW = 300.0, 2.0


class NullModel:
    """Logits that are there already: zeros."""

    def __init__(self, max_model_len: int) -> None:
        self.spec = ModelSpec(
            architecture="null",
            vocab_size=VOCAB,
            hidden_size=1,
            num_layers=1,
            num_heads=1,
            num_kv_heads=1,
            head_dim=1,
            max_model_len=max_model_len,
        )
        self.weight_bytes = 0
        self.kv_bytes_per_token = 1
        self._logits = np.zeros((4096, VOCAB), dtype=np.float32)

    def allocate_kv(self, num_blocks: int) -> Any:
        return None

    def forward(self, batch: ForwardBatch[Any], kv: Any) -> Any:
        return self._logits[: len(batch.logits_indices)]

    def copy_blocks(self, kv: Any, source: Any, target: Any) -> None:
        return None


class NullSampling:
    """Draws token 1 for everybody: sampling is arithmetic too."""

    def __init__(self, max_rows: int, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self.max_rows, self.vocab_size = max_rows, vocab_size
        self._tokens = np.ones(max_rows, dtype=np.int32)
        self._none = np.empty(0, dtype=np.int64)

    def join(self, *args: Any) -> None:
        return None

    def leave(self, row: int) -> None:
        return None

    def sample(self, logits: Any, rows: Any, logits_index: Any) -> Sampled:
        return Sampled(self._tokens[: len(rows)], None, self._none, ())


async def measure(batch: int, steps: int) -> float:
    """CPU microseconds per decode step at this batch size."""
    world = AsyncioWorld()
    config = load_config(None, {"scheduler.max_num_seqs": batch, "log.level": "error"})
    length = steps + 64
    blocks = batch * (length // 16 + 2) + 1
    engine = Engine(
        config=config,
        world=world,
        device=NullDevice(world),
        model=NullModel(length),
        plan=MemoryPlan(
            total=0,
            weights=0,
            kv_cache=0,
            kv_per_token=1,
            num_blocks=blocks,
            max_model_len=length,
            max_num_seqs=batch,
        ),
        tokenizer=Tokenizer.load(resolve_model().path),
        template=ChatTemplate({}, {}),
        model_name="null",
        registry=CollectorRegistry(),
        log=make_logger(config.log),
    )
    engine.start()
    sampling = SamplingParams(temperature=0.0, max_tokens=steps + 32, ignore_eos=True)
    handles = [
        engine.submit(
            TokensPrompt([1, 2, 3]), sampling, priority=Priority.NORMAL, deadline=None, name="x", cache_salt=""
        )
        for _ in range(batch)
    ]
    for handle in handles:
        handle.mailbox.collect()
    stats = engine.scheduler.stats
    while stats.steps["decode"] < 16:
        await asyncio.sleep(0.002)  # looking more often would be measured too
    gc.collect()
    gc.disable()
    first, start = stats.steps["decode"], time.thread_time()
    while stats.steps["decode"] < first + steps - 32:
        await asyncio.sleep(0.002)  # looking more often would be measured too
    cost = (time.thread_time() - start) / (stats.steps["decode"] - first)
    gc.enable()
    for handle in handles:
        handle.cancel()
    await engine.stop()
    await world.close()
    return cost * 1e6


def python_loop_ns() -> float:
    """What one turn of an empty loop costs, the best of five: compare it before comparing microseconds."""
    turns = 300_000

    def once() -> float:
        start = time.thread_time()
        for _ in range(turns):
            pass
        return time.thread_time() - start

    return min(once() for _ in range(5)) / turns * 1e9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--runs", type=int, default=5, help="runs of each batch, interleaved; the median counts")
    args = parser.parse_args()
    set_num_threads(1)
    lanes_module.SamplerState = NullSampling  # type: ignore[assignment,misc]
    costs: dict[int, list[float]] = {batch: [] for batch in args.batches}
    for _ in range(args.runs):
        for batch in args.batches:
            costs[batch].append(uvloop.run(measure(batch, args.steps)))
    console = Console()
    table = Table(title="CPU per decode step without the arithmetic, microseconds")
    for column in ("batch", "median", "fastest", "slowest", "per row", "budget", "of budget"):
        table.add_column(column, justify="right")
    rows = []
    for batch, values in costs.items():
        median = statistics.median(values)
        budget = BUDGET_US + BUDGET_US_PER_ROW * batch
        rows.append({"batch": batch, "median_us": median, "runs_us": values, "budget_us": budget})
        cells = (median, min(values), max(values))
        table.add_row(
            str(batch),
            *(f"{cell:.0f}" for cell in cells),
            f"{median / batch:.2f}",
            f"{budget:.0f}",
            f"{median / budget:.2f}",
        )
    console.print(table)
    table = Table(title="CPU of the server process per streamed token, microseconds")
    for column in ("streams", "steps", "tokens share writes within", "per token", "a bare send"):
        table.add_column(column, justify="right")
    streaming = []
    for step_ms, flush_ms in ((0, 0), (0, 5), (8, 5)):
        cost = uvloop.run(stream_cost(64, 400, step_ms, flush_ms))
        cost["us_cpu_per_send"] = measure_floor(64, 400, step_ms)
        streaming.append(cost)
        steps = f"{step_ms} ms apart" if step_ms else "without a break"
        share = f"{flush_ms} ms" if flush_ms else "never"
        table.add_row("64", steps, share, f"{cost['us_cpu_per_token']:.1f}", f"{cost['us_cpu_per_send']:.1f}")
    console.print(table)
    loop_ns = python_loop_ns()
    console.print(f"this machine now: {loop_ns:.0f} ns for one turn of an empty Python loop")
    if args.json:
        result = {"bench": "step_overhead", "python_loop_ns": loop_ns, "rows": rows, "streaming": streaming}
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
