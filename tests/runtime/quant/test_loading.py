"""Weights rounded as they are loaded: how far off the logits are, how small the weights, and what the model answers."""

import pytest
import torch
from checkpoints import PagedSequences, random_tokens

from millrace.kernels import ops
from millrace.runtime import ChatMessage, Runtime, SamplingParams
from millrace.runtime.models.decoder import DecoderModel
from millrace.runtime.quant.rounding import Quantization
from millrace.runtime.weights.loader import random_model

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 499,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


def logits(model: DecoderModel) -> torch.Tensor:
    return PagedSequences(model, 1, 64).step({0: random_tokens(40, seed=1, vocab_size=499)})[0].double()


@pytest.mark.parametrize(("bits", "group", "tied", "far", "small"), [
    (8, 64, True, 0.03, 0.27),
    (8, 64, False, 0.03, 0.27),
    (4, 64, True, 0.22, 0.18),
    (4, 32, True, 0.22, 0.19),
])  # fmt: skip
def test_logits_stay_near_and_weights_get_small(bits: int, group: int, tied: bool, far: float, small: float) -> None:
    config = {**CONFIG, "tie_word_embeddings": tied}
    exact = random_model(config, seed=5)
    rounded = random_model(config, seed=5, quantize=Quantization(bits=bits, group_size=group))
    want, got = logits(exact), logits(rounded)
    assert ((got - want).norm() / want.norm()).item() < far
    table = 0 if tied else 499 * 256 * 4  # a table that is only looked up in stays as it is
    assert (rounded.weight_bytes - table) < small * (exact.weight_bytes - table)


def test_groups_that_do_not_fit_become_smaller_ones_and_outputs_keep_eight_bits() -> None:
    four = Quantization(bits=4, group_size=64)
    assert four.round(torch.randn(8, 96), is_output=False).group_size == 32
    assert four.round(torch.randn(8, 100), is_output=False).bits == 8  # the largest group would be 4
    assert four.round(torch.randn(8, 128), is_output=True).bits == 8


@pytest.mark.skipif(ops.default_backends()[0].name == "torch", reason="the C++ kernels are not built")
def test_all_layers_in_one_call_take_rounded_matrices() -> None:
    rounded = random_model(CONFIG, seed=5, quantize=Quantization(bits=4, group_size=32))
    assert rounded._stack is not None
    whole = logits(rounded)
    rounded._stack = None
    assert torch.equal(logits(rounded), whole)


@pytest.mark.parametrize("method", ["int8", "int4"])
async def test_the_embedded_model_still_answers(method: str) -> None:
    async with Runtime(model__quantize=method, model__quantize_group_size=32) as runtime:
        done = await runtime.submit(
            [ChatMessage(role="user", content="What is the capital of France?")], SamplingParams(temperature=0.0)
        )
    assert "Paris" in done.text
