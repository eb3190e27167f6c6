"""transformers' `generate` as a worker: run_transformers.py MODEL --threads N --dtype float32|bfloat16."""

import argparse
from collections.abc import Mapping

import torch
import transformers
from protocol import Generate, Tally, serve


class Watch(transformers.StoppingCriteria):
    """Sees the ids after every step, and stops nothing."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        for number, token in enumerate(input_ids[:, -1].tolist()):
            self._tally.add(number, token)
        return torch.zeros(len(input_ids), dtype=torch.bool)


def load(path: str, threads: int, dtype: str) -> tuple[Generate, Mapping[str, str]]:
    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
    # No id ends a sequence. min_new_tokens would do that too, but costs a pass over the logits in every step.
    model.generation_config.eos_token_id = None

    @torch.inference_mode()
    def generate(prompts: list[list[int]], new_tokens: int, tally: Tally) -> None:
        ids = torch.tensor(prompts)
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new_tokens,
            pad_token_id=0,
            stopping_criteria=transformers.StoppingCriteriaList([Watch(tally)]),
        )

    return generate, {"transformers": transformers.__version__, "torch": torch.__version__}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    args = parser.parse_args()
    serve(lambda: load(args.model, args.threads, args.dtype))
