"""OpenVINO GenAI's continuous batching as a worker: run_openvino.py MODEL --threads N (in its environment)."""

import argparse
from collections.abc import Mapping

import numpy as np
import openvino
import openvino_genai
from protocol import Generate, Tally, serve

CACHE_GB = 2


def load(path: str, threads: int) -> tuple[Generate, Mapping[str, str]]:
    scheduling = openvino_genai.SchedulerConfig()
    scheduling.cache_size = CACHE_GB
    scheduling.enable_prefix_caching = False  # rounds send the same prompts
    scheduling.max_num_batched_tokens = 2048  # whole prompts in a step: throughput before latency
    scheduling.max_num_seqs = 64
    pipe = openvino_genai.ContinuousBatchingPipeline(path, scheduling, "CPU", {"INFERENCE_NUM_THREADS": threads})
    config = openvino_genai.GenerationConfig()
    config.do_sample = False
    config.ignore_eos = True
    config.eos_token_id = -1  # the model's config must not end a sequence either
    config.stop_token_ids = set()

    def generate(prompts: list[list[int]], new_tokens: int, tally: Tally) -> None:
        config.max_new_tokens = new_tokens
        handles = [
            pipe.add_request(number, openvino.Tensor(np.array([prompt], np.int64)), config)
            for number, prompt in enumerate(prompts)
        ]
        while pipe.has_non_finished_requests():
            pipe.step()
            for number, handle in enumerate(handles):
                while handle.can_read():
                    for output in handle.read().values():
                        tally.add(number, *output.generated_ids)

    return generate, {"openvino-genai": openvino_genai.__version__, "openvino": openvino.__version__}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    serve(lambda: load(args.model, args.threads))
