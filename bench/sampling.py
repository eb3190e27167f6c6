"""What sampling costs a decode step on the CPU: the C++ kernels and numpy side by side.

    python bench/sampling.py [--json FILE] [--vocab N] [--threads N] [--times N]

One step of `SamplerState.sample` at the vocabulary of Qwen2.5, over random logits whose nucleus of 0.9 is some hundred
ids. Between steps a buffer larger than the caches is written, as a step of a model streams its weights: what a step
costs then is mostly what it takes to fetch code and data. Both take turns, so that a disturbance meets both; a
figure is the median of its times.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from millrace.kernels.cpu_build import Toolchain, build_library
from millrace.kernels.cpu_library import load_library
from millrace.kernels.cpu_sampling import CpuSampling
from millrace.kernels.numpy_sampling import NumpySampling
from millrace.kernels.sampling import Floats, Sampling
from millrace.runtime.sampling import SamplerState
from millrace.runtime.types import SamplingParams

SETTINGS = {
    "greedy": SamplingParams(temperature=0.0),
    "temperature": SamplingParams(temperature=1.0),
    "top_p": SamplingParams(temperature=0.8, top_p=0.9),
    "top_k": SamplingParams(temperature=0.8, top_k=40, top_p=0.95),
    "min_p": SamplingParams(temperature=1.0, min_p=0.05),
}
ROWS = (1, 8, 16)
FLUSH_BYTES = 64 << 20


def sampler(sampling: Sampling, params: SamplingParams, rows: int, vocab: int) -> SamplerState:
    state = SamplerState(rows, vocab, sampling=sampling)
    for row in range(rows):
        state.join(row, params, row, 0, [1, 2, 3])
    return state


def measure(states: dict[str, SamplerState], logits: Floats, times: int) -> dict[str, float]:
    """Median microseconds of a step of each."""
    flush = np.zeros(FLUSH_BYTES // 4, dtype=np.float32)
    index = np.arange(len(logits), dtype=np.int32)
    taken: dict[str, list[float]] = {name: [] for name in states}
    for turn in range(times + 1):
        for name, state in states.items():
            flush += 1.0
            logits *= 1.0  # the model has just written them
            start = time.perf_counter()
            state.sample(logits, index)
            if turn:
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) * 1e6 for name, values in taken.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--threads", type=int, help="of the C++ kernels")
    parser.add_argument("--times", type=int, default=15, help="steps of each; the median counts")
    args = parser.parse_args()
    library = load_library(build_library(Toolchain()))
    if args.threads:
        library.mr_set_num_threads(args.threads)
    ways: dict[str, Sampling] = {"cpu": CpuSampling(library), "numpy": NumpySampling()}
    logits = np.random.default_rng(0).standard_normal((max(ROWS), args.vocab), dtype=np.float32) * 3
    load = os.getloadavg()[0]
    table = Table(title=f"Sampling of a step in us, {args.vocab} ids")
    for column in ("settings", "rows", *ways, "numpy / cpu"):
        table.add_column(column, justify="left" if column == "settings" else "right")
    results = []
    for name, params in SETTINGS.items():
        for rows in ROWS:
            states = {key: sampler(sampling, params, rows, args.vocab) for key, sampling in ways.items()}
            us = measure(states, logits[:rows], args.times)
            results.append({"settings": name, "rows": rows, "us": {key: round(value, 1) for key, value in us.items()}})
            cells = (f"{us[key]:.0f}" for key in ways)
            table.add_row(name, str(rows), *cells, f"{us['numpy'] / us['cpu']:.1f}")
    Console().print(table)
    if args.json:
        result = {
            "bench": "sampling",
            "numpy": np.__version__,
            "vocab": args.vocab,
            "threads": library.mr_num_threads(),
            "load_before": load,
            "load_after": os.getloadavg()[0],
            "rows": results,
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
