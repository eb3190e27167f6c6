"""CPU kernels at the shapes of Qwen2.5-0.5B against torch, oneDNN and what the machine can do.

Run: python bench/kernels_cpu.py [--json FILE] [--threads N] [--seconds S] [--best]

Candidates take turns within one loop, so that a disturbance meets all of them; a figure is the median of its times.
Each linear rotates over copies of its weight that together exceed the caches. `floor` is the larger of weight bytes
over the measured read rate and operations over the measured multiply-add rate; both are measured again for each shape.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from millrace.kernels import ops
from millrace.kernels.arguments import Backend
from millrace.kernels.cpu_backend import CpuBackend
from millrace.kernels.cpu_build import Toolchain, build_library
from millrace.kernels.cpu_library import load_library
from millrace.kernels.torch_backend import TorchBackend

HEADS, KV_HEADS, HEAD_DIM = 14, 2, 64
SHAPES = {  # name: (in, out, row counts)
    "gate_up": (896, 9728, (1, 8, 16, 32, 128, 512)),
    "up": (896, 4864, (1, 8, 16, 32, 128, 512)),
    "down": (4864, 896, (1, 8, 16, 32, 128, 512)),
    "qkv": (896, 1152, (1, 8, 16, 32, 128, 512)),
    "o": (896, 896, (1, 8, 16, 32, 128, 512)),
    "lm_head": (896, 151936, (1, 8, 16, 32)),  # only rows that want logits
}
ATTENTION = {  # name: (query length, context, sequences)
    "decode b1 c128": (1, 128, 1),
    "decode b1 c4096": (1, 4096, 1),
    "decode b1 c32768": (1, 32768, 1),
    "decode b8 c512": (1, 512, 8),
    "decode b16 c1024": (1, 1024, 16),
    "prefill 128": (128, 128, 1),
    "prefill 512": (512, 512, 1),
    "chunk 256 at 2048": (256, 2048, 1),
}
KV = {"bfloat16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
RING_BYTES = 160e6

Calls = Mapping[str, Callable[[int], Any]]


class Bench:
    """Runs candidates in turns; `best` reports the fastest time of each instead of the median."""

    def __init__(self, seconds: float, best: bool) -> None:
        self._seconds = seconds
        self._summary: Callable[[list[float]], float] = min if best else statistics.median

    def times(self, calls: Calls, at_least: int = 5) -> dict[str, float]:
        """Seconds of each call; call(i) may use i to walk a ring of weights."""
        times: dict[str, list[float]] = {name: [] for name in calls}
        for call in calls.values():
            call(0)
        begin, turn = time.perf_counter(), 0
        while turn < at_least or (time.perf_counter() - begin < self._seconds and turn < 2000):
            for name, call in calls.items():
                start = time.perf_counter()
                call(turn)
                times[name].append(time.perf_counter() - start)
            turn += 1
        return {name: self._summary(values) for name, values in times.items()}


class Machine:
    """Read rate past the caches (bytes/s) and multiply-add rate (operations/s), with all threads."""

    def __init__(self, library: Any, threads: int) -> None:
        self._library, self._threads = library, threads
        self._data = torch.ones(int(256e6) // 4)

    def rates(self, bench: Bench) -> tuple[float, float]:
        rounds, lanes = 200_000, int(self._library.mr_attention_dim_step())
        data, threads = self._data, self._threads
        times = bench.times(
            {
                "read": lambda _: self._library.mr_probe_read(data.data_ptr(), data.numel(), threads),
                "fma": lambda _: self._library.mr_probe_fma(rounds, threads),
            }
        )
        return data.nbytes / times["read"], 24 * lanes * rounds * threads / times["fma"]


def micros(times: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value * 1e6, 2) for name, value in times.items()}


def show(label: str, times: Mapping[str, float], *notes: str) -> None:
    figures = "".join(f" {name} {value * 1e6:9.1f}" for name, value in times.items())
    print(" | ".join([f"{label:22s}", f"us:{figures}", *notes]), flush=True)


class LinearShape:
    """One shape with its ring of weights in every layout."""

    def __init__(self, name: str, k: int, n: int, backend: CpuBackend) -> None:
        self.name, self.k, self.n = name, k, n
        self.weights = [torch.randn(n, k) * 0.02 for _ in range(max(1, round(RING_BYTES / (n * k * 4))))]
        self.fp32 = [ops.pack_linear(w, backends=[backend]) for w in self.weights]
        self.bf16 = [ops.pack_linear(w.bfloat16(), backends=[backend]) for w in self.weights for _ in range(2)]
        self.prepacked = [torch.ops.mkldnn._reorder_linear_weight(w) for w in self.weights]

    def calls(self, rows: int) -> Calls:
        x, copies = torch.randn(rows, self.k), len(self.weights)
        onednn = torch.ops.mkldnn._linear_pointwise
        return {
            "fp32": lambda i: self.fp32[i % copies](x),
            "bf16": lambda i: self.bf16[i % (2 * copies)](x),
            "torch": lambda i: F.linear(x, self.weights[i % copies]),
            "onednn": lambda i: onednn(x, self.prepacked[i % copies], None, "none", [], ""),
        }

    def measure(self, rows: int, bench: Bench, read_rate: float, fma_rate: float) -> dict[str, Any]:
        times = bench.times(self.calls(rows))
        elements = self.n * self.k
        compute = 2 * rows * elements / fma_rate
        floors = {"fp32": max(elements * 4 / read_rate, compute), "bf16": max(elements * 2 / read_rate, compute)}
        show(
            f"{self.name} {rows} rows",
            times,
            "of floor: " + ", ".join(f"{name} {floor / times[name]:.2f}" for name, floor in floors.items()),
            f"torch/fp32 {times['torch'] / times['fp32']:.2f}, onednn/fp32 {times['onednn'] / times['fp32']:.2f}",
            f"torch/bf16 {times['torch'] / times['bf16']:.2f}",
        )
        return {
            "name": self.name, "in": self.k, "out": self.n, "rows": rows, "us": micros(times),
            "floor_us": micros(floors), "read_gb_s": read_rate / 1e9, "fma_gop_s": fma_rate / 1e9,
        }  # fmt: skip


def bench_linear(machine: Machine, backend: CpuBackend, bench: Bench) -> list[dict[str, Any]]:
    results = []
    for name, (k, n, row_counts) in SHAPES.items():
        shape = LinearShape(name, k, n, backend)
        read_rate, fma_rate = machine.rates(bench)
        print(f"read {read_rate / 1e9:.1f} GB/s, multiply-add {fma_rate / 1e9:.0f} Gop/s")
        results += [shape.measure(rows, bench, read_rate, fma_rate) for rows in row_counts]
    return results


def narrow_pool(
    k_cache: torch.Tensor, v_cache: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The same keys and values in another type, with scales if it is one of 8 bits."""
    narrow = torch.empty(2, *k_cache.shape, dtype=dtype)
    scales = torch.empty(narrow.shape[:-1]) if dtype.itemsize == 1 else None
    slots = torch.arange(k_cache.shape[0] * ops.BLOCK_SIZE)
    k, v = (cache.transpose(1, 2).flatten(0, 1).contiguous() for cache in (k_cache, v_cache))
    ops.write_kv(k, v, narrow[0], narrow[1], slots, kv_scales=scales)
    return narrow[0], narrow[1], scales


def bench_attention(
    name: str, query_len: int, context: int, sequences: int, backend: CpuBackend, bench: Bench
) -> dict[str, Any]:
    blocks = -(-context // ops.BLOCK_SIZE)
    k_cache, v_cache = torch.randn(2, sequences * blocks + 1, KV_HEADS, ops.BLOCK_SIZE, HEAD_DIM)
    tables = (torch.randperm(sequences * blocks) + 1).int().view(sequences, blocks)
    starts = torch.arange(0, (sequences + 1) * query_len, query_len, dtype=torch.int32)
    lens = torch.full((sequences,), context, dtype=torch.int32)
    q = torch.randn(sequences * query_len, HEADS, HEAD_DIM)
    pools = {"cpu": (k_cache, v_cache, None)} | {kv: narrow_pool(k_cache, v_cache, dtype) for kv, dtype in KV.items()}
    batch = ops.attention_batch(starts, lens, tables, query_len, context)

    def attend(chosen: Backend, kv: str, _: int) -> torch.Tensor:
        keys, values, scales = pools[kv]
        return ops.paged_attention(q, keys, values, batch, HEAD_DIM**-0.5, None, kv_scales=scales, backends=[chosen])

    times = bench.times(
        {
            **{kv: partial(attend, backend, kv) for kv in pools},
            "torch": partial(attend, TorchBackend(), "cpu"),
            "attention_batch": lambda _: ops.attention_batch(starts, lens, tables, query_len, context),
        }
    )
    kv_bytes = sequences * context * KV_HEADS * HEAD_DIM * 8
    show(
        name,
        times,
        f"torch/cpu {times['torch'] / times['cpu']:.2f}",
        "cpu over narrower keys and values: " + ", ".join(f"{kv} {times['cpu'] / times[kv]:.2f}" for kv in KV),
        f"KV {kv_bytes / times['cpu'] / 1e9:.1f} GB/s",
    )
    return {"name": name, "us": micros(times), "kv_bytes": kv_bytes}


def bench_elementwise(rows: int, backend: CpuBackend, bench: Bench) -> list[dict[str, Any]]:
    x, residual, weight = torch.randn(rows, 896), torch.zeros(rows, 896), torch.ones(896)
    gate_up = torch.randn(rows, 2 * 4864)
    q, k = torch.randn(rows, HEADS, HEAD_DIM), torch.randn(rows, KV_HEADS, HEAD_DIM)
    cache = torch.zeros(2, rows // ops.BLOCK_SIZE + 1, KV_HEADS, ops.BLOCK_SIZE, HEAD_DIM)
    cos_sin, positions = torch.ones(rows, HEAD_DIM) * 0.7, torch.arange(rows)
    calls: dict[str, Callable[[Backend], Any]] = {
        "add_rms_norm": lambda b: ops.add_rms_norm(x, residual, weight, 1e-6, backends=[b]),
        "silu_mul": lambda b: ops.silu_mul(gate_up, backends=[b]),
        "rope_": lambda b: ops.rope_(q, k, cos_sin, positions, backends=[b]),
        "write_kv": lambda b: ops.write_kv(k, k, cache[0], cache[1], positions, backends=[b]),
    }
    plain, results = TorchBackend(), []
    for name, call in calls.items():
        times = bench.times({"cpu": partial(_on, call, backend), "torch": partial(_on, call, plain)})
        show(f"{name} {rows} rows", times, f"torch/cpu {times['torch'] / times['cpu']:.2f}")
        results.append({"name": name, "rows": rows, "us": micros(times)})
    return results


def _on(call: Callable[[Backend], Any], backend: Backend, _: int) -> Any:
    return call(backend)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.0, help="for each row of the table")
    parser.add_argument("--best", action="store_true", help="fastest times instead of medians, for a busy machine")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    start = time.perf_counter()
    library = load_library(build_library(Toolchain()))
    ready, load = time.perf_counter() - start, os.getloadavg()[0]
    print(f"library ready after {ready:.2f} s; {args.threads} threads; load {load:.1f}")
    backend, bench = CpuBackend(library), Bench(args.seconds, args.best)
    report = {
        "torch": torch.__version__,
        "threads": args.threads,
        "statistic": "best" if args.best else "median",
        "load_before": load,
        "elementwise": [row for rows in (1, 16, 512) for row in bench_elementwise(rows, backend, bench)],
        "attention": [bench_attention(name, *shape, backend, bench) for name, shape in ATTENTION.items()],
        "linear": bench_linear(Machine(library, args.threads), backend, bench),
        "load_after": os.getloadavg()[0],
    }
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
