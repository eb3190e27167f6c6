"""Matrices of 8 and 4 bits against float64, on every backend."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from millrace.kernels import ops
from millrace.kernels.arguments import Backend
from millrace.kernels.ops import QuantizedWeight
from millrace.kernels.quantized import stack_rows


def made(n: int, k: int, bits: int, group: int, *, codebook: bool = False, order: bool = False) -> QuantizedWeight:
    q = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8)
    scales = (torch.rand(n, k // group) * 0.1 + 0.01).half()
    zeros = torch.randint(0, 1 << bits, (n, k // group)).half() + 0.375
    book = torch.randint(-128, 128, (16,)).to(torch.int8) if codebook else None
    return QuantizedWeight(q, scales, zeros, bits, book, torch.randperm(k) if order else None)


def widened(weight: QuantizedWeight) -> NDArray[np.float64]:
    scales, zeros = (t.double().repeat_interleave(weight.group_size, 1) for t in (weight.scales, weight.zeros))
    values = weight.q.double() if weight.codebook is None else weight.codebook.double()[weight.q.long()]
    wide = (values - zeros) * scales
    return (wide if weight.order is None else wide[:, weight.order.argsort()]).numpy()


def rounded(x: torch.Tensor, group: int) -> tuple[NDArray[np.float64], float]:
    """Activations as the C++ backend rounds them, and the largest step."""
    part = next((part for part in range(min(group, 128) // 4 * 4, 28, -4) if group % part == 0), group)
    grouped = x.view(len(x), -1, part)
    scales = grouped.abs().amax(2, keepdim=True) / 127
    inverse = torch.where(scales > 0, 1 / scales, 0.0)
    return ((grouped * inverse).round().double() * scales.double()).view(len(x), -1).numpy(), float(scales.max())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "k", "group"), [
    (1, 4, 4), (31, 64, 32), (100, 96, 96), (161, 1088, 64), (33, 60, 12), (40, 896, 896), (70, 520, 260),
])  # fmt: skip
def test_matches_the_reference_for_any_number_of_rows(backend: Backend, bits: int, n: int, k: int, group: int) -> None:
    weight = made(n, k, bits, group)
    matrix = widened(weight)
    for bias in (None, torch.randn(n)):
        linear = ops.pack_quantized(weight, bias, backends=[backend])
        assert (linear.out_features, linear.in_features) == (n, k)
        for rows in (1, 2, 12, 13, 40, 100):
            x = torch.randn(rows, k)
            x[-1, : group // 2] = 0.0
            used, step = (x.double().numpy(), 0.0) if backend.name == "torch" else rounded(x, group)
            expected = used @ matrix.T + (0.0 if bias is None else bias.double().numpy())
            # A product at the border of rounding may fall the other way in float32: two of them in a row are allowed.
            tolerance = 2 * step * np.abs(matrix).max() + 1e-5 * np.abs(expected).max()
            np.testing.assert_allclose(linear(x).numpy(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_activations_stays_near_the_exact_product(compiled: Backend, bits: int) -> None:
    weight = made(64, 512, bits, 128)
    linear = ops.pack_quantized(weight, backends=[compiled])
    x = torch.randn(20, 512)
    exact = x.double().numpy() @ widened(weight).T
    error = np.sqrt(np.mean((linear(x).numpy() - exact) ** 2) / np.mean(exact**2))
    assert error < 0.01


def test_a_large_input_leaves_the_others_their_bits(compiled: Backend) -> None:
    """One scale for each output, as in checkpoints of W8A8: activations are still rounded in short parts."""
    weight = made(64, 3584, 8, 3584)
    weight = weight._replace(zeros=torch.full_like(weight.zeros, 128.0))
    linear = ops.pack_quantized(weight, backends=[compiled])
    x = torch.randn(20, 3584)
    others = x.double().numpy() @ widened(weight).T
    x[:, 700], x[:, 2900] = 300.0, -150.0
    exact = x.double().numpy() @ widened(weight).T
    error = np.sqrt(np.mean((linear(x).numpy() - exact) ** 2) / np.mean(others**2))
    assert error < 0.2  # with one scale for the whole row it is 0.7


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_has_the_same_bits_in_any_batch(compiled: Backend, bits: int, threads: int) -> None:
    torch.set_num_threads(threads)
    linear = ops.pack_quantized(made(161, 1088, bits, 64), torch.randn(161), backends=[compiled])
    x = torch.randn(300, 1088)
    alone = {row: linear(x[row : row + 1])[0] for row in (0, 7, 11, 299)}
    for rows in (12, 13, 37, 300):
        y = linear(x[:rows].contiguous())
        for row, want in alone.items():
            assert row >= rows or torch.equal(y[row], want)


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_can_be_looked_up(backend: Backend, bits: int) -> None:
    weight = made(77, 60, bits, 12)
    linear = ops.pack_quantized(weight, backends=[backend])
    tokens = torch.tensor([0, 76, 31, 31, 32])
    np.testing.assert_allclose(linear.row_lookup(tokens).numpy(), widened(weight)[tokens.numpy()], rtol=1e-6)
    assert linear.row_lookup(torch.empty(0, dtype=torch.int64)).shape == (0, 60)
    with pytest.raises(IndexError):
        linear.row_lookup(torch.tensor([77]))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_comes_out_and_stays_in_its_row(backend: Backend, bits: int, bad: float) -> None:
    linear = ops.pack_quantized(made(40, 72, bits, 24), backends=[backend])
    x = torch.randn(3, 72)
    x[1, 70] = bad
    y = linear(x)
    assert not y[1].isfinite().any()
    assert y[[0, 2]].isfinite().all()
    assert linear(torch.empty(0, 72)).shape == (0, 40)


def test_four_bits_take_about_half_a_byte(compiled: Backend) -> None:
    weight = made(256, 1024, 4, 128)
    linear = ops.pack_quantized(weight, backends=[compiled])
    assert linear.weight_bytes < weight.q.numel() * 0.54


@pytest.mark.parametrize(("codebook", "order"), [(True, False), (False, True), (True, True)])
def test_codebooks_and_orders_of_the_inputs(backend: Backend, codebook: bool, order: bool) -> None:
    weight = made(77, 96, 4, 32, codebook=codebook, order=order)
    np.testing.assert_allclose(weight.widen().numpy(), widened(weight), rtol=1e-6)
    linear = ops.pack_quantized(weight, backends=[backend])
    tokens = torch.tensor([0, 76, 31])
    np.testing.assert_allclose(linear.row_lookup(tokens).numpy(), widened(weight)[tokens.numpy()], rtol=1e-6)
    for rows in (1, 40):
        x = torch.randn(rows, 96)
        used, step = x.double().numpy(), 0.0
        if backend.name != "torch":
            columns = torch.arange(96) if weight.order is None else weight.order
            in_order, step = rounded(x[:, columns], 32)
            used[:, columns.numpy()] = in_order
        expected = used @ widened(weight).T
        tolerance = 2 * step * np.abs(widened(weight)).max() + 1e-5 * np.abs(expected).max()
        np.testing.assert_allclose(linear(x).numpy(), expected, rtol=0, atol=tolerance)


def test_rows_stack_where_one_form_holds_them_all() -> None:
    one, other = made(8, 64, 4, 32), made(5, 64, 4, 32)
    both = stack_rows([one, other])
    assert both is not None
    assert torch.equal(both.widen(), torch.cat([one.widen(), other.widen()]))
    assert stack_rows([one]) is one
    for marks in ((True, True), (True, False)):
        joined = stack_rows([part._replace(is_w8a8=mark) for part, mark in zip((one, other), marks, strict=True)])
        assert isinstance(joined, QuantizedWeight) and joined.is_w8a8 is all(marks)
    book = torch.arange(-120, 120, 15).to(torch.int8)
    with_book = one._replace(codebook=book)
    for first, second, bits, group in (
        (one, made(5, 64, 8, 32), 8, 32),
        (one, made(5, 64, 4, 16), 4, 16),
        (made(5, 64, 8, 64), one, 8, 32),
        (with_book, other._replace(codebook=book), 4, 32),
        (one, other._replace(codebook=book), 8, 32),
        (with_book, other._replace(codebook=book.flip(0)), 8, 32),
    ):
        joined = stack_rows([first, second])
        assert isinstance(joined, QuantizedWeight)
        assert torch.equal(joined.widen(), torch.cat([first.widen(), second.widen()]))
        assert (joined.bits, joined.group_size) == (bits, group)
        ops.pack_quantized(joined)
    ordered = other._replace(order=torch.randperm(64))
    assert stack_rows([one, ordered]) is None
    assert stack_rows([ordered, other._replace(order=ordered.order.flip(0))]) is None
    assert stack_rows([made(3, 96, 4, 32), made(3, 96, 4, 48)]) is None
    assert stack_rows([one, one.widen()]) is None


def test_what_does_not_fit_is_refused() -> None:
    good = made(8, 64, 4, 32)
    for bad, complaint in (
        (good._replace(bits=5), "bits is 5"),
        (good._replace(q=good.q.int()), r"q is int32 \[8, 64\]"),
        (good._replace(scales=good.scales.float()), r"scales is float32 \[8, 2\]"),
        (good._replace(scales=good.scales[:, :0].contiguous()), "groups divide 64"),
        (good._replace(scales=torch.ones(8, 3).half()), "groups divide 64"),
        (good._replace(zeros=good.zeros[:4]), r"zeros is float16 \[4, 2\]"),
        (good._replace(q=torch.full_like(good.q, 16)), "reaches 16, but 4 bits hold 0 to 15"),
        (good._replace(codebook=torch.zeros(8, dtype=torch.int8)), r"codebook is int8 \[8\]"),
        (made(8, 64, 8, 32)._replace(codebook=torch.zeros(16, dtype=torch.int8)), "with a codebook it must be 4"),
        (good._replace(order=torch.zeros(64, dtype=torch.int64)), "each of the 64 inputs once"),
    ):
        with pytest.raises(ValueError, match=complaint):
            ops.pack_quantized(bad)
    with pytest.raises(ValueError, match="bias"):
        ops.pack_quantized(good, torch.zeros(7))
