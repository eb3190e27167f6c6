"""Tokens per second in one process, side by side with transformers `generate`, on a random Qwen2.5-0.5B.

    python bench/offline.py [--quick] [--json FILE]

Runs are interleaved and the ratio of medians counts. Millrace keeps the checkpoint's bf16 weights and computes in
float32; transformers runs in float32 and in bf16. The ragged load (32 requests, 16-512 tokens in, 16-128 out) is one
padded batch for transformers, as `generate` wants it; only tokens that were asked for are counted. Then the prefix
cache: time to the first token of a 1,024-token prompt, the first and the second time.
"""

import argparse
import asyncio
import gc
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from rich.console import Console
from rich.table import Table

from millrace.kernels import ops
from millrace.runtime import Runtime, SamplingParams
from millrace.runtime.app import available_cores
from millrace.runtime.weights.resolve import resolve_model
from millrace.runtime.weights.synthetic import write_random_checkpoint

SHAPE = "qwen2.5-0.5b"


class Request(NamedTuple):
    prompt: list[int]
    new_tokens: int


def uniform(count: int, prompt: int, new_tokens: int, seed: int) -> list[Request]:
    draw = random.Random(seed)
    return [Request([draw.randrange(1000, 100_000) for _ in range(prompt)], new_tokens) for _ in range(count)]


def ragged(count: int, seed: int) -> list[Request]:
    draw = random.Random(seed)
    lengths = [(draw.randint(16, 512), draw.randint(16, 128)) for _ in range(count)]
    return [Request([draw.randrange(1000, 100_000) for _ in range(size)], new) for size, new in lengths]


@torch.inference_mode()
def run_transformers(model: Any, requests: Sequence[Request]) -> None:
    """One padded batch, generated to the longest answer."""
    longest = max(len(request.prompt) for request in requests)
    new_tokens = max(request.new_tokens for request in requests)
    ids = torch.tensor([[0] * (longest - len(r.prompt)) + r.prompt for r in requests])
    mask = torch.tensor([[0] * (longest - len(r.prompt)) + [1] * len(r.prompt) for r in requests])
    out = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens, min_new_tokens=new_tokens, pad_token_id=0
    )
    assert out.shape[1] == longest + new_tokens


async def run_millrace(runtime: Runtime, requests: Sequence[Request], salt: str) -> None:
    """All at once; every run under a salt of its own, so that no prefix is found."""
    handles = [
        runtime.submit(
            request.prompt,
            SamplingParams(temperature=0.0, max_tokens=request.new_tokens, ignore_eos=True),
            cache_salt=salt,
        )
        for request in requests
    ]
    for handle, request in zip(handles, requests, strict=True):
        assert len((await handle).token_ids) == request.new_tokens


async def first_token_seconds(runtime: Runtime, prompt: list[int]) -> float:
    start = time.perf_counter()
    async for _ in runtime.submit(prompt, SamplingParams(temperature=0.0, max_tokens=1)):
        break
    return time.perf_counter() - start


def timed(run: Callable[..., object], *arguments: object) -> float:
    gc.collect()
    start = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--runs", type=int, default=3, help="interleaved runs of each cell (the ragged load: one less)")
    parser.add_argument("--quick", action="store_true", help="one run each, and transformers only in float32")
    parser.add_argument("--checkpoint", type=Path, help="keep the random checkpoint in this folder and use it again")
    args = parser.parse_args()
    runs = 1 if args.quick else args.runs
    torch.set_num_threads(args.threads)
    console = Console()
    console.print(ops.prepare())

    with tempfile.TemporaryDirectory() as scratch:
        folder = args.checkpoint or Path(scratch) / SHAPE
        if not (folder / "config.json").is_file():
            write_random_checkpoint(folder, SHAPE, seed=0, dtype="bfloat16")
            # The tokenizer of the embedded model serves: prompts are ids, and what comes out is nonsense anyway.
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(resolve_model().path / name, folder / name)
        result = measure(folder, args, runs, console)
    report(result, console)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def measure(folder: Path, args: argparse.Namespace, runs: int, console: Console) -> dict[str, Any]:
    peers = {"transformers fp32": load_peer(folder, torch.float32)}
    if not args.quick:
        peers["transformers bf16"] = load_peer(folder, torch.bfloat16)
    loads = {
        "1": (uniform(1, 128, 64, 1), runs),
        "8": (uniform(8, 128, 64, 2), runs),
        "32 ragged": (ragged(32, 3), max(1, runs - 1)),
    }
    loop = asyncio.new_event_loop()
    runtime = Runtime(
        folder,
        model__max_model_len=2048,
        device__threads=args.threads,
        # Throughput before latency: whole chunks of prompts, however long decoding streams wait for them.
        scheduler__inter_token_target_ms=0,
        scheduler__max_prefill_tokens=2048,
    )
    loop.run_until_complete(runtime.start())
    seconds: dict[str, dict[str, list[float]]] = {}
    for name, (requests, count) in loads.items():
        cell = seconds[name] = {"millrace": [], **{peer: [] for peer in peers}}
        for index in range(count):
            salt = f"{name}-{index}"
            cell["millrace"].append(timed(loop.run_until_complete, run_millrace(runtime, requests, salt)))
            for peer, model in peers.items():
                cell[peer].append(timed(run_transformers, model, requests))
            console.print(f"{name}: " + ", ".join(f"{who} {values[-1]:.1f} s" for who, values in cell.items()))
    prompt = uniform(1, 1024, 1, 4)[0].prompt
    prefix = []
    for index in range(runs):
        own = [index + 1, *prompt[1:]]
        cold = loop.run_until_complete(first_token_seconds(runtime, own))
        prefix.append((cold, loop.run_until_complete(first_token_seconds(runtime, own))))
    loop.run_until_complete(runtime.close())
    loop.close()
    return {
        "bench": "offline",
        "shape": SHAPE,
        "threads": args.threads,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "kernels": ops.default_backends()[0].name,
        "tokens": {name: sum(r.new_tokens for r in requests) for name, (requests, _) in loads.items()},
        "seconds": seconds,
        "prefix_first_token_seconds": prefix,
    }


def load_peer(folder: Path, dtype: torch.dtype) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def report(result: dict[str, Any], console: Console) -> None:
    table = Table(title=f"output tokens/s, {result['shape']}, {result['threads']} threads (medians; prompt included)")
    for column in ("requests", "engine", "tokens/s", "min-max", "millrace is"):
        table.add_column(column, justify="right")
    for name, cell in result["seconds"].items():
        tokens = result["tokens"][name]
        own = statistics.median(cell["millrace"])
        for who, values in cell.items():
            median = statistics.median(values)
            span = f"{tokens / max(values):.1f}-{tokens / min(values):.1f}"
            ratio = "" if who == "millrace" else f"{median / own:.2f}x"
            table.add_row(name, who, f"{tokens / median:.1f}", span, ratio)
    console.print(table)
    cold = statistics.median(first for first, _ in result["prefix_first_token_seconds"])
    warm = statistics.median(second for _, second in result["prefix_first_token_seconds"])
    console.print(f"1,024-token prompt: the second time its first token comes {cold / warm:.1f}x sooner")


if __name__ == "__main__":
    sys.exit(main())
