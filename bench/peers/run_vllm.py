"""vLLM's engine in process as a worker: run_vllm.py MODEL --threads N --dtype float32 (in its environment)."""

import argparse
import os
from collections.abc import Mapping

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import torch
import vllm
from protocol import Generate, Tally, serve


def load(path: str, threads: int, dtype: str) -> tuple[Generate, Mapping[str, str]]:
    torch.set_num_threads(threads)
    engine = vllm.LLMEngine.from_engine_args(
        vllm.EngineArgs(
            model=path,
            dtype=dtype,
            max_model_len=2048,
            max_num_batched_tokens=2048,
            enable_prefix_caching=False,
            enforce_eager=True,  # compiling takes minutes here, and gains little
            disable_log_stats=True,
        )
    )
    serial = iter(range(1 << 62))

    def generate(prompts: list[list[int]], new_tokens: int, tally: Tally) -> None:
        params = vllm.SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        numbers, seen = {}, [0] * len(prompts)
        for number, prompt in enumerate(prompts):
            name = str(next(serial))
            numbers[name] = number
            engine.add_request(name, {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                number, ids = numbers[output.request_id], output.outputs[0].token_ids  # all so far
                tally.add(number, *ids[seen[number] :])
                seen[number] = len(ids)

    return generate, {"vllm": vllm.__version__, "torch": torch.__version__}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    serve(lambda: load(args.model, args.threads, args.dtype))
