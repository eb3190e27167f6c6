"""Round-to-nearest: errors within half a step, and what is refused."""

import pytest
import torch

from millrace.runtime.quant.rounding import Quantization, round_to_float8, round_to_nearest, round_to_nf4


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [8, 32, None])
def test_no_weight_is_off_by_more_than_half_a_step(bits: int, group_size: int | None) -> None:
    torch.manual_seed(0)
    weight = torch.randn(40, 96)
    weight[3, :32] = 0.0
    weight[4] = torch.rand(96) + 5.0  # far from zero on one side
    made = round_to_nearest(weight, bits, group_size)
    assert made.group_size == (group_size or 96)
    size = made.group_size
    scales = made.scales.float().repeat_interleave(size, 1)
    got = scales * (made.q.float() - made.zeros.float().repeat_interleave(size, 1))
    # float16 scales are off by at most 2^-11 of the scale, and up to 127 or 15 steps are counted by it
    assert ((got - weight).abs() <= scales * (0.5 + (1 << (bits - 1)) * 2.0**-11) + 1e-6).all()
    assert (got[3, :8] == 0).all()


def test_nf4_takes_the_nearest_of_its_levels() -> None:
    torch.manual_seed(0)
    weight = torch.randn(40, 96)
    weight[3, :32] = 0.0
    made = round_to_nf4(weight, 32)
    assert made.codebook is not None
    levels = made.codebook.float() * made.scales.float()[:, :, None]  # [40, 3, 16]
    grouped = weight.view(40, 3, 32)
    best = (grouped[:, :, :, None] - levels[:, :, None]).abs().amin(3)
    torch.testing.assert_close((made.widen().view(40, 3, 32) - grouped).abs(), best)
    assert (made.widen()[3, :32] == 0).all()
    with pytest.raises(ValueError, match="96 inputs cannot be cut into groups of 64"):
        round_to_nf4(weight, 64)


def test_float8_is_off_by_a_sixteenth_at_most() -> None:
    torch.manual_seed(0)
    weight = torch.randn(40, 96) * torch.logspace(-6, 3, 40)[:, None]
    weight[3] = 0.0
    made = round_to_float8(weight)
    # half of the last of three bits, or half of the smallest step below 2^-6
    assert ((made.widen() - weight).abs() <= weight.abs() * 2.0**-4 + made.scales * 2.0**-10).all()
    assert made.codes.float().abs().amax(1).tolist() == [448.0 if row != 3 else 0.0 for row in range(40)]
    with pytest.raises(ValueError, match="not finite"):
        round_to_float8(torch.full((2, 8), torch.inf))
    for is_output in (False, True):  # activations of the matrix that gives the logits stay as they are
        assert Quantization(method="fp8").round(weight, is_output=is_output).is_w8a8 is not is_output


def test_sizes_and_values_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="96 inputs cannot be cut into groups of 64"):
        round_to_nearest(torch.zeros(2, 96), 4, 64)
    with pytest.raises(ValueError, match="bits is 3"):
        round_to_nearest(torch.zeros(2, 96), 3, 32)
    for bad in (torch.inf, torch.nan, 1e9):
        with pytest.raises(ValueError, match="the largest is 65504"):
            round_to_nearest(torch.full((2, 32), bad), 8, 32)
