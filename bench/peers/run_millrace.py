"""Millrace as a worker, by its public interface: run_millrace.py MODEL --threads N [--dtype D] [--quantize Q]."""

import argparse
import asyncio
from collections.abc import Mapping
from itertools import count

import torch
from protocol import Generate, Tally, serve

from millrace.kernels import ops
from millrace.runtime import Runtime, SamplingParams


def load(path: str, threads: int, dtype: str, quantize: str, default: bool) -> tuple[Generate, Mapping[str, str]]:
    # Throughput before latency, as offline work is set up: whole prompts in a step, however long others wait.
    offline = {} if default else {"scheduler__inter_token_target_ms": 0, "scheduler__max_prefill_tokens": 2048}
    loop = asyncio.new_event_loop()
    runtime = Runtime(
        path,
        model__dtype=dtype,
        model__quantize=quantize,
        model__quantize_group_size=128,  # as the int4 of OpenVINO
        model__max_model_len=2048,
        device__threads=threads,
        **offline,
    )
    loop.run_until_complete(runtime.start())
    salts = map(str, count())  # one for each job, so that no prefix is found

    async def one(prompt: list[int], number: int, new_tokens: int, salt: str, tally: Tally) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
        async for delta in runtime.submit(prompt, params, cache_salt=salt):
            tally.add(number, *delta.token_ids)

    async def run(prompts: list[list[int]], new_tokens: int, tally: Tally) -> None:
        salt = next(salts)
        async with asyncio.TaskGroup() as group:
            for number, prompt in enumerate(prompts):
                group.create_task(one(prompt, number, new_tokens, salt, tally))

    def generate(prompts: list[list[int]], new_tokens: int, tally: Tally) -> None:
        loop.run_until_complete(run(prompts, new_tokens, tally))

    return generate, {"torch": torch.__version__, "kernels": ops.default_backends()[0].name}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantize", default="none")
    parser.add_argument("--default", action="store_true", help="scheduling as `millrace serve` has it")
    args = parser.parse_args()
    serve(lambda: load(args.model, args.threads, args.dtype, args.quantize, args.default))
