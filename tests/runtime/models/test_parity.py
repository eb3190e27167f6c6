"""Logits equal to transformers' for every architecture, in every way that a batch can be put together."""

import random
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers
from checkpoints import (
    KINDS,
    PagedSequences,
    load_reference,
    make_checkpoint,
    random_tokens,
    reference_greedy,
    reference_logits,
)

from millrace.runtime.models.decoder import DecoderModel
from millrace.runtime.weights.loader import load_model

torch.set_num_threads(1)

TOLERANCE = 2e-4
BFLOAT16_KINDS = ("llama", "qwen2", "qwen3", "gpt2")
VARIANTS = [(kind, torch.float32, "float32") for kind in KINDS] + [
    (kind, torch.bfloat16, storage) for kind in BFLOAT16_KINDS for storage in ("float32", "bfloat16")
]


class Pair(NamedTuple):
    model: DecoderModel
    reference: transformers.PreTrainedModel


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda variant: f"{variant[0]}-{variant[1]}-as-{variant[2]}")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    kind, stored, storage = request.param
    folder: Path = make_checkpoint(kind, tmp_path_factory.mktemp("checkpoint"), dtype=stored)
    return Pair(load_model(folder, dtype=storage), load_reference(folder))


def difference(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest absolute difference; NaN counts as infinite."""
    assert got.shape == want.shape
    return (got - want).abs().nan_to_num(nan=float("inf")).max().item()


def test_one_prompt(pair: Pair) -> None:
    tokens = random_tokens(90, seed=1)
    want = reference_logits(pair.reference, tokens)
    assert want.std() > 0.3  # logits that are all alike would prove nothing
    got = PagedSequences(pair.model, 1, 96).step({0: tokens})[0]
    assert got.dtype == torch.float32
    assert difference(got, want) < TOLERANCE


@pytest.mark.parametrize("chunk", [1, 7, 16, 33])
def test_chunked_prefill(pair: Pair, chunk: int) -> None:
    tokens = random_tokens(70, seed=2)
    want = reference_logits(pair.reference, tokens)
    sequence = PagedSequences(pair.model, 1, 96)
    got = [sequence.step({0: tokens[at : at + chunk]})[0] for at in range(0, len(tokens), chunk)]
    assert difference(torch.cat(got), want) < TOLERANCE


def test_ragged_batches_of_sixteen(pair: Pair) -> None:
    """Prefill chunks and decode tokens mixed at random, over shuffled block tables, until all sequences are through."""
    choose = random.Random(3)
    prompts = {seq: random_tokens(choose.randint(1, 80), seed=100 + seq) for seq in range(16)}
    sequences = PagedSequences(pair.model, 16, 80, seed=4)
    got: dict[int, list[torch.Tensor]] = {seq: [] for seq in prompts}
    first = True
    while left := [seq for seq in prompts if sequences.lengths[seq] < len(prompts[seq])]:
        batch = left if first else choose.sample(left, choose.randint(1, len(left)))
        chunks = {}
        for seq in batch:
            start = sequences.lengths[seq]
            chunks[seq] = prompts[seq][start : start + choose.choice((1, 1, 5, 40))]
        for seq, logits in sequences.step(chunks).items():
            got[seq].append(logits)
        first = False
    for seq, prompt in prompts.items():
        assert difference(torch.cat(got[seq]), reference_logits(pair.reference, prompt)) < TOLERANCE, seq


def test_only_the_wanted_logits(pair: Pair) -> None:
    prompts = {seq: random_tokens(10 + seq, seed=seq) for seq in range(4)}
    every = PagedSequences(pair.model, 4, 32).step(prompts)
    last = PagedSequences(pair.model, 4, 32).step(prompts, last_only=True)
    for seq in prompts:
        assert last[seq].shape == (1, pair.model.spec.vocab_size)
        assert difference(last[seq][0], every[seq][-1]) < TOLERANCE


@pytest.mark.slow
def test_sixty_four_greedy_tokens(pair: Pair) -> None:
    prompts = {seq: random_tokens(length, seed=seq) for seq, length in enumerate((3, 40))}
    sequences = PagedSequences(pair.model, len(prompts), 112, seed=5)
    logits = sequences.step(dict(prompts), last_only=True)
    got: dict[int, list[int]] = {seq: [] for seq in prompts}
    for _ in range(64):
        chosen = {seq: int(row[-1].argmax()) for seq, row in logits.items()}
        for seq, token in chosen.items():
            got[seq].append(token)
        logits = sequences.step({seq: [token] for seq, token in chosen.items()}, last_only=True)
    for seq, prompt in prompts.items():
        assert got[seq] == reference_greedy(pair.reference, prompt, 64)


def test_spec_agrees_with_the_reference(pair: Pair) -> None:
    spec, config = pair.model.spec, pair.reference.config
    assert spec.architecture == type(pair.reference).__name__
    assert spec.num_parameters == sum(parameter.numel() for parameter in pair.reference.parameters())
    assert (spec.num_layers, spec.hidden_size) == (config.num_hidden_layers, config.hidden_size)
    assert (spec.eos_token_ids, spec.bos_token_id) == ((2,), 1)
