"""Whole engine against transformers: the same greedy tokens, whatever happens to a request on its way."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import load_reference, make_checkpoint, random_tokens, reference_greedy
from fakes import engine, greedy, submit

from millrace.runtime.weights.loader import load_model

KINDS = ["llama", "llama-rope-llama3", "mistral", "qwen2", "qwen3", "gpt2"]
STEPS = 64


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("checkpoint") / kind
            make_checkpoint(kind, made[kind])
        return made[kind]

    return make


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
async def test_greedy_tokens_equal_transformers(kind: str, folder: Callable[[str], Path]) -> None:
    """Alone, in a mixed batch of 16, chunked, with prefix hits, and after forced preemptions."""
    path = folder(kind)
    reference = load_reference(path)
    prompts = [random_tokens(3 + 7 * i % 60, seed=i) for i in range(16)]
    wanted = [reference_greedy(reference, prompt, STEPS) for prompt in prompts]
    sampling = greedy(STEPS, ignore_eos=True)

    async with engine(model=load_model(path), num_blocks=200, null_device=False) as made:
        alone = await submit(made, prompts[5], sampling)
        assert list(alone.token_ids) == wanted[5]
        batch = await asyncio.gather(*[submit(made, prompt, sampling) for prompt in prompts])
        assert [list(completion.token_ids) for completion in batch] == wanted
        again = await asyncio.gather(*[submit(made, prompt, sampling) for prompt in prompts])
        assert [list(completion.token_ids) for completion in again] == wanted
        assert sum(completion.usage.cached_tokens for completion in again) > 0

    options = {"scheduler__max_prefill_tokens": 16, "null_device": False}
    async with engine(model=load_model(path), num_blocks=20, **options) as made:
        cramped = await asyncio.gather(*[submit(made, prompt, sampling) for prompt in prompts])
        assert [list(completion.token_ids) for completion in cramped] == wanted
        assert made.scheduler.stats.preemptions > 0
