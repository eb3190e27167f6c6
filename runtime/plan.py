"""The memory plan: what weights take, what is left for the KV cache, and how many tokens fit, before anything is
allocated."""

import os
from pathlib import Path

import msgspec

from millrace.runtime.config import Config
from millrace.runtime.errors import ConfigError
from millrace.runtime.models.base import Model
from millrace.runtime.types import BLOCK_SIZE

MIB = 1 << 20


class MemoryPlan(msgspec.Struct, frozen=True, kw_only=True):
    """All sizes in bytes, all lengths in tokens."""

    total: int
    weights: int
    kv_cache: int
    kv_per_token: int
    num_blocks: int
    max_model_len: int
    max_num_seqs: int

    @property
    def num_tokens(self) -> int:
        return (self.num_blocks - 1) * BLOCK_SIZE

    def table(self) -> str:
        """The plan as aligned lines, for people."""
        full = self.num_tokens / self.max_model_len
        rows = [
            ("memory", _size(self.total), "of this machine, or of its cgroup"),
            ("weights", _size(self.weights), "resident"),
            ("KV cache", _size(self.kv_cache), f"at most; {_size(self.kv_per_token)} per token, committed as it fills"),
            ("tokens", f"{self.num_tokens:,}", f"fit into the cache, {self.num_blocks - 1:,} blocks of {BLOCK_SIZE}"),
            ("context", f"{self.max_model_len:,}", f"tokens per sequence; {full:.1f} full ones fit at once"),
            ("sequences", f"{self.max_num_seqs:,}", "run at once (scheduler.max_num_seqs)"),
        ]
        return "\n".join(f"  {name:<10} {value:>12}  {text}" for name, value, text in rows)


def plan_memory(config: Config, model: Model, max_model_len: int) -> MemoryPlan:
    """Decides the number of KV blocks. Raises ConfigError with the numbers when not even one sequence has room."""
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
