"""CTranslate2 as a worker: run_ctranslate2.py MODEL --threads N (in its environment)."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import ctranslate2
from protocol import Generate, Tally, serve


def load(path: str, threads: int) -> tuple[Generate, Mapping[str, str]]:
    generator = ctranslate2.Generator(path, device="cpu", intra_threads=threads, inter_threads=1)
    # Its interface takes tokens as text, so ids go through its own vocabulary.
    words = json.loads((Path(path) / "vocabulary.json").read_text("utf-8"))

    def generate(prompts: list[list[int]], new_tokens: int, tally: Tally) -> None:
        def step(result: ctranslate2.GenerationStepResult) -> bool:
            tally.add(result.batch_id, result.token_id)
            return False

        generator.generate_batch(
            [[words[token] for token in prompt] for prompt in prompts],
            max_length=new_tokens,
            min_length=new_tokens,
            beam_size=1,
            sampling_topk=1,
            include_prompt_in_result=False,
            callback=step,
        )

    return generate, {"ctranslate2": ctranslate2.__version__}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    serve(lambda: load(args.model, args.threads))
