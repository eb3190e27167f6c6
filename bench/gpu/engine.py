"""The whole engine at real shapes with random weights: what a client sees.

Decoding is timed over the steps in which all sequences run: from the moment when each has its first token to the moment
when the first has all that it asked for. Prompts are random ids, so that no two share a prefix. They are sent twice:
the first time for their prefill alone, which is timed; the second time their blocks are found in the prefix cache, so
that all start to decode at about the same time.
"""

import asyncio
import gc
import itertools
import random
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from gpu.context import Context
from gpu.floors import (
    GOAL_BUSY,
    GOAL_DECODE,
    GOAL_FIRST_TOKEN_MS,
    GOAL_GAP_MS,
    GOAL_TOKENS_PER_S,
    Shape,
)
from gpu.plan import Row, rated, timed
from millrace.runtime import Runtime, SamplingParams
from millrace.runtime.weights.synthetic import preset

CONTEXT = 1024
LOADS = (("llama-3.1-8b", (1, 64, 256), 96), ("llama-2-7b", (1, 64), 96))  # shape, batches, new tokens
NEED = 22.0  # seconds that a shape takes to load, capture and measure, at least
BATCH_SECONDS, SEQUENCE_SECONDS = 4.0, 0.06  # of a batch: its decoding, and the prompts of its sequences
INTERFERENCE = (16, 4, 4096)  # sequences that decode, prompts that come, tokens of each


class Run(NamedTuple):
    """Arrival times of a request's tokens: (seconds, tokens that came)."""

    submitted: float
    arrivals: list[tuple[float, int]]

    @property
    def first(self) -> float:
        return self.arrivals[0][0]

    @property
    def last(self) -> float:
        return self.arrivals[-1][0]

    def between(self, start: float, end: float) -> int:
        return sum(count for at, count in self.arrivals if start < at <= end)


def prompts(count: int, length: int, vocab: int, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(vocab) for _ in range(length)] for _ in range(count)]


async def follow(runtime: Any, prompt: list[int], new_tokens: int, **sampling: Any) -> Run:
    params = SamplingParams(max_tokens=new_tokens, ignore_eos=True, **({"temperature": 0.0} | sampling))
    found = Run(time.perf_counter(), [])
    async for delta in runtime.submit(prompt, params):
        if delta.token_ids:
            found.arrivals.append((time.perf_counter(), len(delta.token_ids)))
    return found


def steady(runs: Sequence[Run]) -> tuple[float, float, int]:
    """The span in which all requests decode, and the tokens that came in it."""
    start, end = max(run.first for run in runs), min(run.last for run in runs)
    return start, end, sum(run.between(start, end) for run in runs)


def gaps(runs: Sequence[Run], start: float, end: float) -> list[float]:
    """Seconds between tokens of one request, within a span."""
    found = []
    for run in runs:
        at = [arrival for arrival, _ in run.arrivals if start <= arrival <= end]
        found += [b - a for a, b in itertools.pairwise(at)]
    return found


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def busy_share(intervals: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Of the span from the first start to the last end, the share that some kernel ran in; and the median gap between
    one and the next, of those gaps of over 20 us: between steps, not between kernels."""
    if not intervals:
        return 0.0, 0.0
    ordered = sorted(intervals)
    busy, pauses, end = 0.0, [], ordered[0][0]
    for begin, stop in ordered:
        if begin > end + 20e-6:
            pauses.append(begin - end)
        busy += max(0.0, stop - max(begin, end))
        end = max(end, stop)
    span = end - ordered[0][0]
    return busy / span if span else 0.0, statistics.median(pauses) if pauses else 0.0


async def decode_rows(context: Context, runtime: Any, name: str, batch: int, length: int, new_tokens: int) -> None:
    """Tokens per second of prompts and of a full batch that decodes, in percent of the floors."""
    shape, part = Shape.of(preset(name)), context.part.name
    chosen = prompts(batch, length, shape.vocab, batch)
    first = await asyncio.gather(*(follow(runtime, prompt, 1) for prompt in chosen))
    seconds = max(run.first for run in first) - min(run.submitted for run in first)
    roof = length * batch / shape.prefill_floor(context.roof(), length * batch, batch)
    note = f"first token after {statistics.median(run.first - run.submitted for run in first) * 1e3:.0f} ms (median)"
    label = f"{name} prompts of {length}, {batch} at once"
    context.row(rated(part, label, length * batch / seconds, "tokens/s", roof, note=note))
    runs = await asyncio.gather(*(follow(runtime, prompt, new_tokens) for prompt in chosen))
    start, end, tokens = steady(runs)
    if end <= start or not tokens:
        context.say(f"   {name}, batch {batch}: no span in which all decode; {new_tokens} tokens are too few")
        return
    rate = tokens / (end - start)
    floor = batch / shape.decode_floor(context.roof(), batch, length + new_tokens / 2)
    slow = percentile(gaps(runs, start, end), 0.99) * 1e3
    note = f"{tokens} tokens in {(end - start) * 1e3:.0f} ms; p99 of the gaps between tokens {slow:.1f} ms"
    goal: dict[str, Any] = {"goal": GOAL_DECODE[name, batch]} if (name, batch) in GOAL_DECODE else {}
    context.row(rated(part, f"{name} engine, batch {batch} at {length}", rate, "tokens/s", floor, note=note, **goal))
    if (name, batch) == ("llama-2-7b", 64):
        context.row(Row(part, f"{name} tokens/s, seed target", rate, "tokens/s", goal=GOAL_TOKENS_PER_S,
                        goal_kind="at least"))  # fmt: skip


async def first_token_rows(context: Context, runtime: Any, name: str, lengths: Sequence[int]) -> None:
    """Time to the first token of an idle engine."""
    shape = Shape.of(preset(name))
    for length in lengths:
        times = []
        for seed in range(5):
            run = await follow(runtime, prompts(1, length, shape.vocab, 1000 * length + seed)[0], 1)
            times.append(run.first - run.submitted)
        floor = shape.prefill_floor(context.roof(), length) * 1e3
        goal: dict[str, Any] = {"goal": GOAL_FIRST_TOKEN_MS, "goal_kind": "at most"} if length <= 512 else {}
        value = statistics.median(times) * 1e3
        context.row(timed(context.part.name, f"{name} first token, prompt of {length}", value, "ms", floor, **goal))


async def interference_rows(context: Context, runtime: Any, name: str, load: tuple[int, int, int]) -> None:
    """Gaps between the tokens of streams that decode, before and while long prompts come in."""
    decoding, coming, length = load
    vocab = Shape.of(preset(name)).vocab
    short = prompts(decoding, 64, vocab, 7)
    streams = [asyncio.create_task(follow(runtime, prompt, 400)) for prompt in short]
    await asyncio.sleep(0.8)
    begin = time.perf_counter()
    long = await asyncio.gather(*(follow(runtime, prompt, 1) for prompt in prompts(coming, length, vocab, 8)))
    end = max(run.last for run in long)
    runs = await asyncio.gather(*streams)
    alone, beside = gaps(runs, max(run.first for run in runs), begin), gaps(runs, begin, end)
    if not alone or not beside:
        context.say("   interference: the streams had ended before the prompts came")
        return
    part = context.part.name
    context.row(Row(part, f"{name} gap between tokens, {decoding} streams, p95", percentile(alone, 0.95) * 1e3, "ms"))
    note = f"{coming} prompts of {length} prefilled within {(end - begin) * 1e3:.0f} ms meanwhile"
    context.row(Row(part, f"{name} the same beside prefill, p95", percentile(beside, 0.95) * 1e3, "ms", note=note))
    context.row(Row(part, f"{name} the same beside prefill, longest", max(beside) * 1e3, "ms"))


async def busy_rows(context: Context, runtime: Any, name: str, batch: int) -> None:
    """Share of the time in which a kernel runs while a full batch decodes, by the profiler, which adds its own cost."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    vocab = Shape.of(preset(name)).vocab
    streams = [asyncio.create_task(follow(runtime, prompt, 300)) for prompt in prompts(batch, 16, vocab, 9)]
    await asyncio.sleep(1.0)
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        await asyncio.sleep(0.4)
    for stream in streams:
        stream.cancel()
    await asyncio.gather(*streams, return_exceptions=True)
    spans = [(event.time_range.start / 1e6, event.time_range.end / 1e6) for event in found.events()
             if event.device_type == torch.autograd.DeviceType.CUDA]  # fmt: skip
    busy, gap = busy_share(spans)
    if not spans:
        context.say("   the profiler saw no kernels; the busy share is left out")
        return
    part = context.part.name
    context.row(Row(part, f"{name} GPU busy, batch {batch}", busy, "of the time", goal=GOAL_BUSY, goal_kind="at least"))
    context.row(Row(part, f"{name} gap between steps, batch {batch}", gap * 1e3, "ms", goal=GOAL_GAP_MS,
                    goal_kind="at most", note="median of pauses over 20 us"))  # fmt: skip


def make_runtime(name: str, rows: int, length: int) -> Runtime:
    return Runtime(
        model__random_weights=name, model__max_model_len=length, device__kind="cuda", scheduler__max_num_seqs=rows,
        scheduler__max_prefill_tokens=2048, log__level="warning",
    )  # fmt: skip


async def _decode_if_time(context: Context, runtime: Any, name: str, batch: int, new_tokens: int) -> None:
    needed = BATCH_SECONDS + SEQUENCE_SECONDS * batch
    if context.left > needed:
        await decode_rows(context, runtime, name, batch, CONTEXT, new_tokens)
    else:
        context.say(f"   {name}, batch {batch}: {context.left:.0f} s are left, and it takes {needed:.0f} s")


async def measure(context: Context, name: str, batches: Sequence[int], new_tokens: int) -> None:
    longest = 4096 if name == "llama-2-7b" else INTERFERENCE[2] + 512
    begin = time.perf_counter()
    async with make_runtime(name, max(batches), longest) as runtime:
        seconds = time.perf_counter() - begin
        context.row(Row(context.part.name, f"{name} start", seconds, "s", note="weights, plan, graphs"))
        context.note(f"{name}.memory_plan", runtime.memory_plan.table())
        await follow(runtime, [1] * 64, 8)
        *others, largest = sorted(batches)
        for batch in others:
            await _decode_if_time(context, runtime, name, batch, new_tokens)
        if context.left > 4:
            await first_token_rows(context, runtime, name, (128, 512, 2048))
        if context.left > 5:
            await busy_rows(context, runtime, name, min(64, largest))
        await _decode_if_time(context, runtime, name, largest, new_tokens)  # the longest, behind what must not miss
        if context.left > 6 and name == LOADS[0][0]:
            await interference_rows(context, runtime, name, INTERFERENCE)


def run(context: Context) -> None:
    for name, batches, new_tokens in LOADS:
        if context.left < NEED:
            context.say(f"   {name}: {context.left:.0f} s are left, and it takes {NEED:.0f} s")
            continue
        asyncio.run(measure(context, name, batches, new_tokens))
        gc.collect()  # the next one needs the memory
