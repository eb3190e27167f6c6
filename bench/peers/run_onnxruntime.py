"""onnxruntime-genai as a worker: run_onnxruntime.py MODEL --threads N (in its environment)."""

import argparse
import json
from collections.abc import Mapping

import numpy as np
import onnxruntime_genai
from protocol import Generate, Tally, serve


def load(path: str, threads: int) -> tuple[Generate, Mapping[str, str]]:
    config = onnxruntime_genai.Config(path)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = onnxruntime_genai.Model(config)

    def generate(prompts: list[list[int]], new_tokens: int, tally: Tally) -> None:
        length = len(prompts[0]) + new_tokens
        params = onnxruntime_genai.GeneratorParams(model)
        # min_length keeps the end token from being chosen.
        params.set_search_options(batch_size=len(prompts), max_length=length, min_length=length, do_sample=False)
        generator = onnxruntime_genai.Generator(model, params)
        generator.append_tokens(np.array(prompts, np.int32))
        for _ in range(new_tokens):
            generator.generate_next_token()
            for number, token in enumerate(generator.get_next_tokens()):
                tally.add(number, int(token))

    return generate, {"onnxruntime-genai": onnxruntime_genai.__version__}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    serve(lambda: load(args.model, args.threads))
