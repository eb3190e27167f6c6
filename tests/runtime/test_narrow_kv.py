"""Keys and values in 16 and 8 bits on the CPU, through whole models, the engine and the public face."""

import asyncio

import pytest
import torch
from checkpoints import PagedSequences, random_tokens
from fakes import engine, greedy, submit

from millrace.kernels import ops
from millrace.kernels.torch_backend import TorchBackend
from millrace.runtime import Runtime, SamplingParams
from millrace.runtime.models.declaration import Placement
from millrace.runtime.models.decoder import DecoderModel
from millrace.runtime.weights.loader import random_model

torch.set_num_threads(1)

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 97,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
}
KINDS = {"bfloat16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


def by_torch(kv: torch.dtype | None) -> DecoderModel:
    return random_model(CONFIG, seed=2, placement=Placement(kv=kv, backends=(TorchBackend(),)))


@pytest.mark.parametrize("made_of", ["default", "torch"])
@pytest.mark.parametrize(("kv", "far"), [("bfloat16", 0.005), ("int8", 0.015), ("fp8", 0.06)])
def test_logits_stay_near(kv: str, far: float, made_of: str) -> None:
    """In prefill, behind a prefix, and in decode; as a part of the norm of all logits."""

    def logits(kind: torch.dtype | None) -> torch.Tensor:
        model = by_torch(kind) if made_of == "torch" else random_model(CONFIG, seed=2, kv=kind)
        tokens, sequence = random_tokens(150, seed=1, vocab_size=97), PagedSequences(model, 1, 160)
        parts = [sequence.step({0: tokens[:100]})[0], sequence.step({0: tokens[100:140]})[0]]
        parts += [sequence.step({0: [token]})[0] for token in tokens[140:]]
        return torch.cat(parts).double()

    want, got = logits(None), logits(KINDS[kv])
    assert 0 < ((got - want).norm() / want.norm()).item() < far


@pytest.mark.parametrize("kv", KINDS)
def test_both_backends_write_and_read_the_same(kv: str) -> None:
    """Up to the rounding of sums, which now and then moves an element to its neighbour."""
    tokens = random_tokens(90, seed=1, vocab_size=97)
    sequences = [
        PagedSequences(model, 1, 96) for model in (random_model(CONFIG, seed=2, kv=KINDS[kv]), by_torch(KINDS[kv]))
    ]
    one, two = (sequence.step({0: tokens})[0] for sequence in sequences)
    assert ((one - two).norm() / two.norm()).item() < 2e-3


@pytest.mark.skipif(ops.default_backends()[0].name == "torch", reason="the C++ kernels are not built")
@pytest.mark.parametrize("kv", KINDS)
def test_logits_have_the_same_bits_alone_and_in_a_batch(kv: str) -> None:
    model = random_model(CONFIG, seed=2, kv=KINDS[kv])
    prompts = {seq: random_tokens(length, seed=seq, vocab_size=97) for seq, length in enumerate((1, 33, 150))}
    together = PagedSequences(model, 3, 160)
    batch = [together.step(prompts), together.step({seq: [seq + 5] for seq in prompts})]
    for seq, prompt in prompts.items():
        alone = PagedSequences(model, 1, 160, seed=seq + 7)
        chunks = [prompt[at : at + 40] for at in range(0, len(prompt), 40)]
        assert torch.equal(torch.cat([alone.step({0: chunk})[0] for chunk in chunks]), batch[0][seq])
        assert torch.equal(alone.step({0: [seq + 5]})[0], batch[1][seq])


@pytest.mark.slow
@pytest.mark.parametrize("made_of", ["default", "torch"])
@pytest.mark.parametrize("kv", KINDS)
async def test_tokens_are_the_same_whatever_happens_to_a_request(kv: str, made_of: str) -> None:
    """Alone, in a batch, behind a prefix hit, as one of two choices that share blocks, and after preemptions."""

    def model() -> DecoderModel:
        return by_torch(KINDS[kv]) if made_of == "torch" else random_model(CONFIG, seed=2, kv=KINDS[kv])

    prompts = [random_tokens(3 + 7 * i % 60, seed=i, vocab_size=97) for i in range(6)]
    sampling = greedy(24, ignore_eos=True)
    async with engine(model=model(), num_blocks=120) as made:
        alone = [(await submit(made, prompt, sampling)).token_ids for prompt in prompts]
    assert len(set(alone)) == len(alone)
    async with engine(model=model(), num_blocks=120) as made:
        batch = await asyncio.gather(*[submit(made, prompt, sampling) for prompt in prompts])
        assert [completion.token_ids for completion in batch] == alone
        again = await asyncio.gather(*[submit(made, prompt, greedy(24, ignore_eos=True, n=2)) for prompt in prompts])
        assert sum(completion.usage.cached_tokens for completion in again) > 0
        for completion, want in zip(again, alone, strict=True):
            assert [choice.token_ids for choice in completion.choices] == [want, want]
    async with engine(model=model(), num_blocks=8, scheduler__max_prefill_tokens=16) as made:
        cramped = await asyncio.gather(*[submit(made, prompt, sampling) for prompt in prompts])
        assert [completion.token_ids for completion in cramped] == alone
        assert made.scheduler.stats.preemptions > 0


HEAD_BYTES = {"float32": 32 * 4, "auto": 32 * 2, "bfloat16": 32 * 2, "int8": 32 + 4, "fp8": 32 + 4}
QUESTIONS = {
    "What is the capital of France?": "Paris",
    "What is the opposite of hot?": "cold",
    "Count from 3 to 9.": "3, 4, 5, 6, 7, 8, 9",
    "Who are you?": "grist",
}


async def test_the_embedded_model_answers_as_with_float32() -> None:
    answers = {}
    for kv in HEAD_BYTES:
        async with Runtime(kv__dtype=kv) as runtime:
            bytes_per_token = runtime.memory_plan.kv_per_token
            done = await asyncio.gather(
                *[
                    runtime.submit([{"role": "user", "content": text}], SamplingParams(temperature=0.0, max_tokens=40))
                    for text in QUESTIONS
                ]
            )
        answers[kv] = [completion.token_ids for completion in done]
        assert all(word in completion.text for word, completion in zip(QUESTIONS.values(), done, strict=True))
        assert bytes_per_token == 5 * 2 * 2 * HEAD_BYTES[kv]  # layers, keys and values, heads
    assert all(given == answers["float32"] for given in answers.values())
