"""Packed linear layers and embeddings against float64."""

import numpy as np
import pytest
import torch

from millrace.kernels import ops, reference
from millrace.kernels.arguments import Backend
from millrace.kernels.quantized import Float8Weight
from millrace.kernels.torch_backend import TorchBackend

ROWS = [1, 2, 5, 12, 13, 25, 40, 200]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (31, 7), (64, 128), (100, 96), (161, 1100)])
def test_matches_the_reference_for_any_number_of_rows(backend: Backend, dtype: torch.dtype, n: int, k: int) -> None:
    weight = torch.randn(n, k).to(dtype)
    for bias in (None, torch.randn(n)):
        linear = ops.pack_linear(weight, bias, backends=[backend])
        assert (linear.out_features, linear.in_features, linear.dtype) == (n, k, dtype)
        assert linear.weight_bytes >= weight.nbytes
        for rows in ROWS:
            x = torch.randn(rows, k)
            expected = reference.linear(x.numpy(), weight.float().numpy(), None if bias is None else bias.numpy())
            y = linear(x)
            assert y.dtype == torch.float32
            np.testing.assert_allclose(y.numpy(), expected, rtol=0, atol=4e-6 * k**0.5 * 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_has_the_same_bits_in_any_batch(compiled: Backend, dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    linear = ops.pack_linear(torch.randn(161, 1100).to(dtype), torch.randn(161), backends=[compiled])
    x = torch.randn(900, 1100)
    alone = torch.cat([linear(x[i : i + 1]) for i in (0, 7, 11, 800, 899)])
    for rows in (12, 13, 37, 200, 900):
        y = linear(x[:rows].contiguous())
        for i, row in enumerate((0, 7, 11, 800, 899)):
            assert row >= rows or torch.equal(y[row], alone[i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_rows_give_no_rows(backend: Backend, dtype: torch.dtype) -> None:
    linear = ops.pack_linear(torch.randn(40, 24).to(dtype), backends=[backend])
    assert linear(torch.empty(0, 24)).shape == (0, 40)
    assert linear.row_lookup(torch.empty(0, dtype=torch.int64)).shape == (0, 24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_can_be_looked_up_in_a_packed_matrix(backend: Backend, dtype: torch.dtype) -> None:
    weight = torch.randn(77, 30).to(dtype)
    linear = ops.pack_linear(weight, backends=[backend])
    tokens = torch.tensor([0, 76, 31, 31, 32])
    assert torch.equal(linear.row_lookup(tokens), weight[tokens].float())
    with pytest.raises(IndexError):
        linear.row_lookup(torch.tensor([77]))


def eight_bits(n: int, k: int, group: int) -> Float8Weight:
    """Every code but NaN, zeros and subnormal ones among them."""
    codes = torch.randint(0, 127, (n, k), dtype=torch.uint8) | torch.randint(0, 2, (n, k), dtype=torch.uint8) << 7
    return Float8Weight(codes.view(torch.float8_e4m3fn), torch.rand(n, -(-k // group)) * 0.02 + 0.001, group)


@pytest.mark.parametrize(("n", "k", "group"), [(1, 1, 1), (33, 70, 70), (100, 300, 128), (161, 1100, 128)])
def test_float8_matches_the_reference(backend: Backend, n: int, k: int, group: int) -> None:
    weight = eight_bits(n, k, group)
    wide = weight.widen()
    for bias in (None, torch.randn(n)):
        linear = ops.pack_float8(weight, bias, backends=[backend])
        assert (linear.out_features, linear.in_features, linear.dtype) == (n, k, torch.float8_e4m3fn)
        for rows in ROWS:
            x = torch.randn(rows, k)
            expected = reference.linear(x.numpy(), wide.numpy(), None if bias is None else bias.numpy())
            np.testing.assert_allclose(linear(x).numpy(), expected, rtol=0, atol=4e-6 * np.abs(expected).max() * 3)
    tokens = torch.tensor([0, n - 1])
    assert torch.equal(linear.row_lookup(tokens), wide[tokens])


def test_float8_beside_16_bit_activations_is_widened_once_by_torch() -> None:
    weight, bias = eight_bits(33, 72, 24), torch.randn(33)
    linear = ops.pack_float8(weight, bias, activation=torch.bfloat16, backends=[TorchBackend()])
    assert (linear.dtype, linear.activation) == (torch.bfloat16, torch.bfloat16)  # which `inspect` tells
    wide, x = weight.widen().bfloat16(), torch.randn(5, 72).bfloat16()
    assert torch.equal(linear.row_lookup(torch.arange(33)), wide)
    torch.testing.assert_close(linear(x).float(), x.float() @ wide.float().t() + bias, rtol=0.02, atol=0.02)


def test_float8_rows_have_the_same_bits_in_any_batch(compiled: Backend) -> None:
    linear = ops.pack_float8(eight_bits(161, 1100, 128), torch.randn(161), backends=[compiled])
    x = torch.randn(200, 1100)
    whole = linear(x)
    for row in (0, 7, 199):
        assert torch.equal(linear(x[row : row + 1])[0], whole[row])


def test_float8_that_does_not_fit_is_refused(compiled: Backend) -> None:
    good = eight_bits(8, 96, 32)
    broken = good.codes.view(torch.uint8).clone()
    broken[3, 4] = 0xFF
    for bad, complaint in (
        (good._replace(codes=good.codes.float()), "codes is float32"),
        (good._replace(scales=good.scales.half()), "scales is float16"),
        (good._replace(scales=torch.ones(8, 0)), "scales is"),
        (good._replace(scales=torch.ones(8, 97)), "scales is"),
        (good._replace(codes=broken.view(torch.float8_e4m3fn)), "codes hold NaN"),
    ):
        with pytest.raises(ValueError, match=complaint):
            ops.pack_float8(bad)
    with pytest.raises(ops.UnservedError, match="not a power of two"):
        ops.pack_float8(eight_bits(8, 72, 24), backends=[compiled])


def test_not_a_number_stays_in_its_row(backend: Backend) -> None:
    linear = ops.pack_linear(torch.randn(40, 24), backends=[backend])
    x = torch.randn(3, 24)
    x[1, 5] = torch.nan
    y = linear(x)
    assert y[1].isnan().all()
    assert not y[[0, 2]].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_embedding(dtype: torch.dtype) -> None:
    weight = torch.randn(50, 24).to(dtype)
    tokens = torch.tensor([3, 49, 3])
    expected = reference.embedding(tokens.numpy(), weight.float().numpy())
    np.testing.assert_array_equal(ops.embedding(tokens, weight).numpy(), expected)


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(2, 23),
        torch.zeros(24),
        torch.zeros(2, 24, dtype=torch.float64),
        torch.zeros(24, 2).t(),
    ],
)
def test_a_wrong_input_is_refused_with_its_shape(backend: Backend, x: torch.Tensor) -> None:
    linear = ops.pack_linear(torch.randn(40, 24), backends=[backend])
    with pytest.raises(ValueError, match=r"num_tokens, 24"):
        linear(x)
