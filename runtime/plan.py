"""The memory plan: what weights take, what is left for the KV cache, and how many tokens fit, before anything is
allocated."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from millrace.runtime.config import Config
from millrace.runtime.errors import ConfigError
from millrace.runtime.models.base import Model
from millrace.runtime.types import BLOCK_SIZE

MIB = 1 << 20
SHORTEST_CONTEXT = 2048  # tokens; a model that cannot hold one such sequence is not started unless it is asked for


class GpuMemory(NamedTuple):
    """Memory of one GPU in bytes, measured when the weights were loaded.

    Attributes:
        free: beside the weights, with nothing else of ours allocated.
        activations: what the largest prefill step and the sampling state took.
        graphs: what the captured decode steps will take.
    """

    name: str
    total: int
    free: int
    activations: int
    graphs: int


class MemoryPlan(msgspec.Struct, frozen=True, kw_only=True):
    """All sizes in bytes, all lengths in tokens."""

    total: int
    weights: int
    kv_cache: int
    kv_per_token: int
    num_blocks: int
    max_model_len: int
    max_num_seqs: int
    activations: int = 0  # on a GPU, and the next as well
    graphs: int = 0
    swap_slots: int = 0  # blocks that the host has room for
    device: str = ""  # a GPU's name

    @property
    def num_tokens(self) -> int:
        return (self.num_blocks - 1) * BLOCK_SIZE

    def table(self) -> str:
        """The plan as aligned lines, for people."""
        full = self.num_tokens / self.max_model_len
        swap = self.swap_slots * self.kv_per_token * BLOCK_SIZE
        rows = [
            ("memory", _size(self.total), f"of {self.device or 'this machine, or of its cgroup'}"),
            ("weights", _size(self.weights), "resident"),
            *([("steps", _size(self.activations), "of the largest prefill step, and sampling")] if self.device else []),
            *([("graphs", _size(self.graphs), "captured decode steps")] if self.device else []),
            (
                "KV cache",
                _size(self.kv_cache),
                f"at most; {_size(self.kv_per_token)} per token" + ("" if self.device else ", committed as it fills"),
            ),
            ("tokens", f"{self.num_tokens:,}", f"fit into the cache, {self.num_blocks - 1:,} blocks of {BLOCK_SIZE}"),
            *(
                [("swap", f"{self.swap_slots:,}", f"blocks of preempted sequences fit into {_size(swap)} of the host")]
                if swap
                else []
            ),
            ("context", f"{self.max_model_len:,}", f"tokens per sequence; {full:.1f} full ones fit at once"),
            ("sequences", f"{self.max_num_seqs:,}", "run at once (scheduler.max_num_seqs)"),
        ]
        return "\n".join(f"  {name:<10} {value:>12}  {text}" for name, value, text in rows)


def plan_memory(config: Config, model: Model[Any], max_model_len: int) -> MemoryPlan:
    """Decides the number of KV blocks. Raises ConfigError with the numbers when not even one sequence has room."""
    if config.kv.swap_memory_mb:
        raise ConfigError(
            f"kv.swap_memory_mb is {config.kv.swap_memory_mb}, but the model runs on the CPU, whose KV cache lies in"
            " host memory already; set it to 0, and kv.memory_mb to more",
            param="kv.swap_memory_mb",
        )
    total = total_memory()
    block = model.kv_bytes_per_token * BLOCK_SIZE
    useful = config.scheduler.max_num_seqs * -(-max_model_len // BLOCK_SIZE) + 1
    given = config.kv.memory_mb * MIB
    num_blocks = given // block if given else min(useful, max(total // 4, 0) // block)
    if num_blocks < 2:
        raise ConfigError(
            f"kv.memory_mb is {config.kv.memory_mb}, which holds {num_blocks} blocks of {_size(block)}; "
            f"at least 2 are needed, and {-(-useful * block // MIB)} MiB hold every sequence at full length",
            param="kv.memory_mb",
        )
    return MemoryPlan(
        total=total,
        weights=model.weight_bytes,
        kv_cache=num_blocks * block,
        kv_per_token=model.kv_bytes_per_token,
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        max_num_seqs=config.scheduler.max_num_seqs,
    )


def plan_gpu(config: Config, model: Model[Any], memory: GpuMemory) -> MemoryPlan:
    """Gives the KV cache what weights, steps and graphs leave of `device.memory_fraction` of a GPU.

    Where `model.max_model_len` is 0 and the checkpoint's own length has no room, the context is as long as there is
    room for. Raises ConfigError, with a table and with settings that would each fit, where the length that was asked
    for, or SHORTEST_CONTEXT, has none.
    """
    block = model.kv_bytes_per_token * BLOCK_SIZE
    reserve = int((1 - config.device.memory_fraction) * memory.total)
    room = memory.free - reserve - memory.activations - memory.graphs
    given = config.kv.memory_mb * MIB
    longest = config.model.max_model_len or model.spec.max_model_len
    least = config.model.max_model_len or min(model.spec.max_model_len, SHORTEST_CONTEXT)
    kv_least = max(given, (-(-least // BLOCK_SIZE) + 1) * block)
    if room < kv_least:
        raise ConfigError(_refusal(config, model, memory, room, kv_least, least), param="device.memory_fraction")
    # More than this would hold prefixes of more prompts than anybody comes back to, and a list entry on the host each.
    useful = 4 * (config.scheduler.max_num_seqs * -(-longest // BLOCK_SIZE) + 1)
    num_blocks = (given or room) // block
    num_blocks = num_blocks if given else min(num_blocks, useful)
    if num_blocks < -(-least // BLOCK_SIZE) + 1:
        raise ConfigError(
            f"kv.memory_mb is {config.kv.memory_mb}, which holds {num_blocks} blocks of {_size(block)}, but"
            f" {least} tokens need {-(-least // BLOCK_SIZE) + 1}",
            param="kv.memory_mb",
        )
    return MemoryPlan(
        total=memory.total,
        weights=model.weight_bytes,
        kv_cache=num_blocks * block,
        kv_per_token=model.kv_bytes_per_token,
        num_blocks=num_blocks,
        max_model_len=min(longest, (num_blocks - 1) * BLOCK_SIZE),
        max_num_seqs=config.scheduler.max_num_seqs,
        activations=memory.activations,
        graphs=memory.graphs,
        swap_slots=swap_slots(config, model),
        device=memory.name,
    )


def swap_slots(config: Config, model: Model[Any]) -> int:
    """Blocks that fit into `kv.swap_memory_mb` of pinned memory. Raises ConfigError where it holds none, or is more
    than the machine has."""
    block, given, total = model.kv_bytes_per_token * BLOCK_SIZE, config.kv.swap_memory_mb * MIB, total_memory()
    if given and not block <= given <= total:
        raise ConfigError(
            f"kv.swap_memory_mb is {config.kv.swap_memory_mb}; a block takes {_size(block)}, and the machine has"
            f" {_size(total)}: choose something between, or 0 to swap nothing",
            param="kv.swap_memory_mb",
        )
    return given // block


def _refusal(config: Config, model: Model[Any], memory: GpuMemory, room: int, wanted: int, tokens: int) -> str:
    """A table of where the memory goes, and what would fit."""
    missing = wanted - room
    block = model.kv_bytes_per_token * BLOCK_SIZE
    fraction, steps = config.device.memory_fraction, config.scheduler
    elsewhere = memory.total - memory.free - model.weight_bytes
    rows = [
        ("memory", memory.total, f"of {memory.name}"),
        ("weights", model.weight_bytes, "resident"),
        ("others", max(0, elsewhere), "the driver, and other processes"),
        ("steps", memory.activations, f"of a prefill step of {steps.max_prefill_tokens} tokens, and sampling"),
        ("graphs", memory.graphs, f"decode steps of up to {steps.max_num_seqs} sequences"),
        ("unused", int((1 - fraction) * memory.total), f"device.memory_fraction = {fraction:g}"),
        ("left", max(0, room), "for the KV cache"),
        ("needed", wanted, f"kv.memory_mb = {config.kv.memory_mb}, or one sequence of {tokens:,} tokens"),
    ]
    table = "\n".join(f"  {name:<10} {_size(size):>12}  {text}" for name, size, text in rows)
    fitting = []
    length = (room // block - 1) * BLOCK_SIZE
    if length >= BLOCK_SIZE and not config.kv.memory_mb:
        fitting.append(f"model.max_model_len = {length}")
    if config.kv.memory_mb and room // MIB:
        fitting.append(f"kv.memory_mb = {room // MIB}")
    more = -(-(fraction + missing / memory.total) * 1000 // 1) / 1000
    if more <= 0.99:
        fitting.append(f"device.memory_fraction = {more:g}")
    # What a step takes is nearly proportional to its tokens; the constant part makes this estimate too optimistic.
    fewer = int(steps.max_prefill_tokens * (1 - 1.1 * missing / max(1, memory.activations))) // 16 * 16
    if fewer >= 16:
        fitting.append(f"scheduler.max_prefill_tokens = {fewer}")
    fewer = int(steps.max_num_seqs * (1 - 1.1 * missing / max(1, memory.graphs)))
    if fewer >= 1:
        fitting.append(f"scheduler.max_num_seqs = {fewer}")
    if config.device.cuda_graphs and memory.graphs >= missing:
        fitting.append("device.cuda_graphs = false")
    if not fitting:
        need = memory.total + missing - int((1 - fraction) * memory.total)
        return f"the model does not fit on the GPU:\n{table}\nno single setting makes it fit; {_size(need)} would"
    settings = "".join(f"\n  {setting}" for setting in fitting)
    return f"the KV cache does not fit on the GPU:\n{table}\nany one of these would fit:{settings}"


def total_memory() -> int:
    """Bytes that this process may use: the machine's memory, or its cgroup's limit."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text("ascii").strip()
    except OSError:
        return physical
    return min(physical, int(limit)) if limit.isdigit() else physical


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} GiB"
