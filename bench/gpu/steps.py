"""A model at a real shape with random weights: decode steps as graphs and prefill, by device time, and how many kernels
a layer launches. The engine around it is measured by `engine`."""

import gc
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from gpu.case_list import Place
from gpu.cases import device_place
from gpu.context import Context
from gpu.floors import GOAL_DECODE, GOAL_LAUNCHES, GOAL_PREFILL, Shape
from gpu.model_tools import decode_graph, placement, prepare, prompt_batch
from gpu.plan import Row, rated, timed
from gpu.timing import CudaTimer, Timer, free_bytes
from millrace.runtime.cuda.driver import CudaDriver, TorchDriver
from millrace.runtime.quant.rounding import Quantization
from millrace.runtime.types import BLOCK_SIZE
from millrace.runtime.weights.loader import random_model
from millrace.runtime.weights.synthetic import preset


class Load(NamedTuple):
    """A model and the batches it decodes."""

    preset: str
    batches: tuple[int, ...]
    quantize: Quantization | None = None

    @property
    def name(self) -> str:
        return self.preset if self.quantize is None else f"{self.preset} {self.quantize.method}"

    @property
    def shape(self) -> Shape:
        shape = Shape.of(preset(self.preset))
        return shape if self.quantize is None else shape.rounded(self.quantize.bits, self.quantize.group_size)


LOADS = {
    "steps-8b": (Load("llama-3.1-8b", (1, 64, 256)),),
    "steps-7b": (Load("llama-2-7b", (1, 64)),),
    "steps-int": (
        Load("llama-3.1-8b", (1, 8), Quantization(method="int8")),
        Load("llama-3.1-8b", (1, 8), Quantization(method="int4")),
        Load("llama-3.1-8b", (1, 8), Quantization(method="fp8")),
    ),
}  # fmt: skip
NEED = 12.0  # seconds that a further model takes to make and measure, at least
CONTEXT, PREFILL = 1024, (2048, 1024)
KV_SHARE = 0.85  # of what the weights leave


def decode_rows(
    context: Context, driver: CudaDriver, timer: Timer, load: Load, model: Any, length: int, free: int
) -> None:
    """One row for each batch: the time of a step in percent of its floor."""
    shape, part, name, batches = load.shape, context.part.name, load.name, load.batches
    fitting = int(KV_SHARE * free) // (model.kv_bytes_per_token * BLOCK_SIZE)
    pages = -(-length // BLOCK_SIZE)
    chosen = [batch for batch in batches if batch * pages + 1 <= fitting]
    for batch in set(batches) - set(chosen):
        context.say(f"   batch {batch} x {length} tokens needs {batch * pages} blocks, and {fitting} fit")
    if not chosen:
        return
    num_blocks = max(chosen) * pages + 1
    kv = model.allocate_kv(num_blocks)
    kv.storage.normal_()  # what was never written may be NaN, and what is read here was not
    for batch in chosen:
        graphs = None  # the last batch's hold memory that this one's need
        if context.left < 6:
            context.say(f"   batch {batch}: no time left")
            continue
        graphs, _ = decode_graph(driver, model, kv, num_blocks, batch, length, length)
        if graphs.refused:
            note = graphs.refused[:300]
            context.row(Row(part, f"decode graph, batch {batch}", 0, "graphs", note=note, failed=True))
            continue
        seconds = timer.seconds([lambda graphs=graphs, batch=batch: graphs.replay(batch)], 12)
        floor = shape.decode_floor(context.roof(), batch, length)
        goal = GOAL_DECODE.get((name, batch))
        note = f"{batch / seconds:,.0f} tokens/s, {batch / floor:,.0f} at the floor; without sampling and host"
        context.row(timed(part, f"{name} decode step, batch {batch} at {length}", seconds * 1e3, "ms", floor * 1e3,
                          note=note, goal=goal))  # fmt: skip


def prefill_rows(context: Context, timer: Timer, load: Load, model: Any, lengths: tuple[int, ...]) -> None:
    shape, name, vocab = load.shape, load.name, model.spec.vocab_size
    goal = GOAL_PREFILL if load.quantize is None else None
    for length in lengths:
        kv = model.allocate_kv(-(-length // BLOCK_SIZE) + 1)
        tokens = [(i * 7919 + 13) % vocab for i in range(length)]
        batch = prompt_batch(tokens, model.device, all_logits=False)
        seconds = timer.seconds([lambda batch=batch, kv=kv: model.forward(batch, kv)], 6)
        roof = length / shape.prefill_floor(context.roof(), length)
        context.row(rated(context.part.name, f"{name} prefill of {length}", length / seconds, "tokens/s", roof,
                          note=f"{seconds * 1e3:.1f} ms", goal=goal if length == 2048 else None))  # fmt: skip


def count_kernels(work: Callable[[], object]) -> int:
    """Kernels that a work launches, whoever launches them; copies and fills of memory are not counted."""
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("TEARDOWN_CUPTI", "0")  # a profiler that is taken down between graphs may crash them
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        work()
        torch.cuda.synchronize()
    events = [event for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in events)


def launches(context: Context, place: Place, driver: CudaDriver, name: str, count: Callable[[Any], int]) -> None:
    """Kernels of a decode step with 4 layers less those with 2: what a layer takes, at the model's own widths."""
    counts = []
    for layers in (2, 4):
        config = preset(name) | {"num_hidden_layers": layers, "vocab_size": 1024}
        config |= {"eos_token_id": 1, "bos_token_id": 0}
        model = random_model(config, placement=placement(place, driver, 4), max_model_len=256)
        prepare(place, model)
        kv = model.allocate_kv(17)
        kv.storage.zero_()
        graphs, _ = decode_graph(driver, model, kv, 17, 4, 64, 256)
        counts.append(count(lambda graphs=graphs: graphs.replay(4)))
    note = f"{counts[0]} with 2 layers, {counts[1]} with 4"
    context.row(Row(context.part.name, f"{name} kernels per layer in the graph", (counts[1] - counts[0]) / 2, "kernels",
                    goal=GOAL_LAUNCHES, goal_kind="at most", note=note))  # fmt: skip


def run(context: Context) -> None:
    loads = LOADS[context.part.name]
    place, driver, timer = device_place(), TorchDriver(0), CudaTimer()
    stream = torch.cuda.Stream()
    # A graph cannot be captured on the default stream.
    with torch.inference_mode(), torch.cuda.stream(stream):
        place = place._replace(stream=stream.cuda_stream)
        for load in loads:
            if load is not loads[0] and context.left < NEED:
                context.say(f"   {load.name}: {context.left:.0f} s are left, and it takes {NEED:.0f} s")
                continue
            where = placement(place, driver, max(load.batches), quantize=load.quantize)
            model = random_model(preset(load.preset), placement=where, max_model_len=4096)
            prepare(place, model)
            gc.collect()
            torch.cuda.empty_cache()
            decode_rows(context, driver, timer, load, model, CONTEXT, free_bytes())
            prefill_rows(context, timer, load, model, PREFILL)
            del model, where
            gc.collect()
        # Last: what has once been profiled may launch its graphs more slowly.
        if loads[0].quantize is None:
            launches(context, place, driver, loads[0].preset, count_kernels)
