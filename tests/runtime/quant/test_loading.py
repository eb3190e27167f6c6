"""Weights rounded as they are loaded: how far off the logits are, how small the weights, and what the model answers."""

import pytest
import torch
from checkpoints import PagedSequences, random_tokens

from millrace.kernels import ops
from millrace.kernels.quantized import QuantizedWeight
from millrace.runtime import ChatMessage, Runtime, SamplingParams
from millrace.runtime.models.decoder import DecoderModel
from millrace.runtime.quant.rounding import Method, Quantization
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


@pytest.mark.parametrize(("method", "group", "tied", "far", "small"), [
    ("int8", 64, True, 0.03, 0.27),
    ("int8", 64, False, 0.03, 0.27),
    ("fp8", 64, True, 0.07, 0.27),
    ("int4", 64, True, 0.22, 0.18),
    ("int4", 32, True, 0.22, 0.19),
    ("nf4", 64, True, 0.22, 0.18),
])  # fmt: skip
def test_logits_stay_near_and_weights_get_small(
    method: Method, group: int, tied: bool, far: float, small: float
) -> None:
    config = {**CONFIG, "tie_word_embeddings": tied}
    exact = random_model(config, seed=5)
    rounded = random_model(config, seed=5, quantize=Quantization(method=method, group_size=group))
    want, got = logits(exact), logits(rounded)
    assert ((got - want).norm() / want.norm()).item() < far
    table = 0 if tied else 499 * 256 * 4  # a table that is only looked up in stays as it is
    assert (rounded.weight_bytes - table) < small * (exact.weight_bytes - table)


def test_groups_that_do_not_fit_become_smaller_ones_and_outputs_keep_eight_bits() -> None:
    four = Quantization(method="int4", group_size=64)
    assert four.round(torch.randn(8, 96), is_output=False).group_size == 32
    for inputs, is_output in ((100, False), (128, True)):  # of 100 inputs the largest groups would be 4
        kept = four.round(torch.randn(8, inputs), is_output=is_output)
        assert isinstance(kept, QuantizedWeight)
        assert kept.bits == 8


@pytest.mark.parametrize("method", ["int8", "int4", "nf4", "fp8"])
def test_all_layers_in_one_call_take_rounded_matrices(method: Method) -> None:
    if ops.default_backends()[0].name == "torch":
        pytest.skip("NO C++ KERNELS HERE, SO ROUNDED MATRICES IN ONE CALL ARE NOT TESTED: install g++")
    rounded = random_model(CONFIG, seed=5, quantize=Quantization(method=method, group_size=32))
    assert rounded.stack is not None
    whole = logits(rounded)
    rounded.stack = None
    assert torch.equal(logits(rounded), whole)


@pytest.mark.parametrize("method", ["int8", "int4", "nf4", "fp8"])
async def test_the_embedded_model_still_answers(method: str) -> None:
    async with Runtime(model__quantize=method, model__quantize_group_size=32) as runtime:
        done = await runtime.submit(
            [ChatMessage(role="user", content="What is the capital of France?")], SamplingParams(temperature=0.0)
        )
    assert "Paris" in done.text
