"""GPTQ: equal to the algorithm written column by column, and nearer to the layer's output than rounding alone."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from millrace.runtime.quant.blocks import output_error
from millrace.runtime.quant.gptq import quantize_gptq_weight, round_about_zero
from millrace.runtime.quant.rounding import round_to_nearest


def correlated(inputs: int, seed: int, tokens: int = 400) -> Tensor:
    """The Gram matrix of inputs of which a few directions carry the most."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, max(2, inputs // 4), generator=generator)
    x = hidden @ torch.randn(hidden.shape[1], inputs, generator=generator)
    x += 0.1 * torch.randn(tokens, inputs, generator=generator)
    return x.t() @ x


def matrix(outputs: int, inputs: int, seed: int) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 1000), bits=st.sampled_from([2, 3, 4]), sym=st.booleans(), desc_act=st.booleans())
def test_less_output_error_than_the_same_integers_without_correction(
    seed: int, bits: int, sym: bool, desc_act: bool
) -> None:
    weight, gram = matrix(24, 64, seed), correlated(64, seed)
    options = {"bits": bits, "group_size": 32, "sym": sym, "desc_act": desc_act}
    corrected = quantize_gptq_weight(weight, gram, **options)
    # Inputs that know nothing of each other leave nothing to make up for.
    alone = quantize_gptq_weight(weight, torch.diag(gram.diagonal()), **options)
    assert output_error(corrected.widen() - weight, gram) < 0.8 * output_error(alone.widen() - weight, gram)


@pytest.mark.parametrize("sym", [True, False])
def test_less_output_error_than_round_to_nearest(sym: bool) -> None:
    weight, gram = matrix(48, 128, 3), correlated(128, 3)
    corrected = quantize_gptq_weight(weight, gram, bits=4, group_size=64, sym=sym)
    nearest = round_to_nearest(weight, 4, 64)
    assert output_error(corrected.widen() - weight, gram) < 0.5 * output_error(nearest.widen() - weight, gram)


@pytest.mark.parametrize("group", [16, 96, 144, 288])
def test_corrections_in_blocks_equal_those_column_by_column(group: int) -> None:
    """Groups that begin within a block of 128 columns and end in the next one too."""
    weight, gram = matrix(8, 288, 5), correlated(288, 5, tokens=1000)
    got = quantize_gptq_weight(weight, gram, bits=4, group_size=group)
    damped = gram.double() + 0.01 * gram.diagonal().mean() * torch.eye(288)
    rest, q = weight.double(), torch.empty(8, 288)
    inverse = torch.linalg.inv(damped)
    for column in range(288):
        scale, zero = got.scales[:, column // group].double(), got.zeros[:, column // group].double()
        q[:, column] = (rest[:, column] / scale + zero).round().clamp(0, 15)
        error = (rest[:, column] - scale * (q[:, column] - zero)) / inverse[column, column]
        rest -= error[:, None] * inverse[column]
        # Takes the column out of the inverse (one step of Gaussian elimination), as equation 3 of the paper does.
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        inverse[column, column] = 1.0
    # A sum that is rounded otherwise may tip a value that lies between two integers, and those behind it.
    assert (got.q != q).float().mean() < 0.02


def test_a_column_that_cannot_be_made_up_for_is_rounded_to_the_nearest() -> None:
    weight = torch.tensor([[0.0, 1.0, 7.4, 15.0], [-7.0, 0.0, 3.4, 8.0]])
    got = quantize_gptq_weight(weight, torch.eye(4), bits=4, group_size=4)
    assert got.zeros.min() >= 1  # version 1 of the format stores them less 1
    assert torch.equal((weight / got.scales.float() + got.zeros.float()).round().clamp(0, 15).to(torch.uint8), got.q)


def test_active_inputs_first() -> None:
    gram = torch.diag(torch.tensor([1.0, 9.0, 4.0, 16.0]))
    got = quantize_gptq_weight(torch.tensor([[1.0, 20.0, 2.0, 21.0]]), gram, bits=8, group_size=2, desc_act=True)
    assert got.order is not None
    assert got.order.tolist() == [3, 1, 2, 0]
    assert (got.widen() - torch.tensor([[1.0, 20.0, 2.0, 21.0]])).abs().max() < 0.1
    assert got.scales[0, 0] > 5 * got.scales[0, 1]  # the two large ones share a group


def test_inputs_that_were_never_active() -> None:
    gram = correlated(32, 7)
    gram[5] = gram[:, 5] = 0
    weight = matrix(4, 32, 7)
    got = quantize_gptq_weight(weight, gram, bits=4, group_size=32)
    assert ((got.widen() - weight)[:, 5].abs() <= got.scales.float()[:, 0] / 2 + 1e-3).all()


@pytest.mark.parametrize(("weight", "gram", "bits", "group", "message"), [
    ((4, 32), torch.eye(32), 5, 16, "bits is 5, but it must be 2, 3, 4 or 8"),
    ((4, 32), torch.eye(16), 4, 16, "gram is [16, 16], but the matrix has 32 inputs"),
    ((4, 32), torch.eye(32), 4, 24, "32 inputs cannot be cut into groups of 24"),
    ((4, 32), torch.zeros(32, 32), 4, 16, "the mean square of the inputs is 0.0"),
    ((4, 32), torch.full((32, 32), float("nan")), 4, 16, "the mean square of the inputs is nan"),
    ((4, 32), torch.eye(32) - 100 * torch.ones(32, 32).triu(1) - 100 * torch.ones(32, 32).tril(-1), 4, 16,
     "no factorisation"),
])  # fmt: skip
def test_what_does_not_fit(weight: tuple[int, int], gram: Tensor, bits: int, group: int, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        quantize_gptq_weight(torch.ones(weight), gram, bits=bits, group_size=group)


def test_round_about_zero() -> None:
    weight = matrix(6, 64, 9)
    got = round_about_zero(weight, 16)
    assert (got.zeros == 8).all()
    assert got.group_size == 16
    # Ranges are cut only where that is better on the whole.
    plain = weight.view(6, 4, 16).abs().amax(2) / 7.5
    steps = plain[:, :, None]
    plainly = ((weight.view(6, 4, 16) / steps).round().clamp(-8, 7) * steps).flatten(1)
    assert (got.widen() - weight).square().sum() <= (plainly - weight).square().sum() * 1.001
