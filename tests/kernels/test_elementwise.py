"""Norms, activations, rotary embedding, KV writes and block copies against float64."""

import numpy as np
import pytest
import torch

from millrace.kernels import ops, reference
from millrace.kernels.arguments import Backend

SHAPES = [(1, 64), (3, 50), (7, 5, 32), (2, 900), (0, 64), (120, 512)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(backend: Backend, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = torch.randn(shape), torch.randn(shape[-1]).to(dtype)
    wide = weight.float().numpy()
    y = ops.rms_norm(x, weight, 1e-6, backends=[backend])
    np.testing.assert_allclose(y.numpy(), reference.rms_norm(x.numpy(), wide, 1e-6), rtol=1e-5, atol=1e-6)
    residual = torch.randn(shape)
    total = x + residual
    y, new = ops.add_rms_norm(x, residual, weight, 1e-6, backends=[backend])
    assert torch.equal(new, total)
    np.testing.assert_allclose(y.numpy(), reference.rms_norm(total.numpy(), wide, 1e-6), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_layer_norm(backend: Backend, shape: tuple[int, ...], with_bias: bool) -> None:
    x, weight, bias = torch.randn(shape) + 3, torch.randn(shape[-1]), torch.randn(shape[-1]) if with_bias else None
    plain = None if bias is None else bias.numpy()
    y = ops.layer_norm(x, weight, bias, 1e-5, backends=[backend])
    expected = reference.layer_norm(x.numpy(), weight.numpy(), plain, 1e-5)
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-5, atol=5e-6)
    residual = torch.randn(shape)
    total = x + residual
    y, new = ops.add_layer_norm(x, residual, weight, bias, 1e-5, backends=[backend])
    assert torch.equal(new, total)
    expected = reference.layer_norm(total.numpy(), weight.numpy(), plain, 1e-5)
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize(("rows", "width"), [(1, 16), (3, 37), (0, 8), (100, 700)])
def test_activations(backend: Backend, rows: int, width: int) -> None:
    x = torch.randn(rows, 2 * width) * 5
    x[:, ::7] *= 30  # far into both tails
    y = ops.silu_mul(x, backends=[backend])
    np.testing.assert_allclose(y.numpy(), reference.silu_mul(x.numpy()), rtol=2e-6, atol=1e-6)
    y = ops.gelu_tanh(x, backends=[backend])
    np.testing.assert_allclose(y.numpy(), reference.gelu_tanh(x.numpy()), rtol=2e-5, atol=2e-6)


def test_not_a_number_comes_out_of_activations_and_norms(backend: Backend) -> None:
    x = torch.randn(2, 64)
    x[1, 3] = torch.nan
    assert ops.silu_mul(x, backends=[backend])[1].isnan().any()
    assert ops.gelu_tanh(x, backends=[backend])[1].isnan().any()
    y = ops.rms_norm(x, torch.ones(64), 1e-6, backends=[backend])
    assert y[1].isnan().all() and not y[0].isnan().any()


@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (80, 32), (6, 6), (128, 64)])
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_rope(backend: Backend, head_dim: int, rotary_dim: int, tokens: int) -> None:
    q, k = torch.randn(tokens, 6, head_dim), torch.randn(tokens, 2, head_dim)
    cos_sin, positions = torch.randn(40, rotary_dim), torch.randint(0, 40, (tokens,))
    expected = [reference.rope(x.numpy(), cos_sin.numpy(), positions.numpy()) for x in (q, k)]
    ops.rope_(q, k, cos_sin, positions, backends=[backend])
    np.testing.assert_allclose(q.numpy(), expected[0], rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(k.numpy(), expected[1], rtol=1e-5, atol=2e-6)


def test_a_position_past_the_table_is_an_error(backend: Backend) -> None:
    with pytest.raises(IndexError):
        ops.rope_(
            torch.randn(1, 2, 32), torch.randn(1, 2, 32), torch.randn(4, 32), torch.tensor([4]), backends=[backend]
        )


@pytest.mark.parametrize("head_dim", [32, 80])
def test_write_kv(backend: Backend, head_dim: int) -> None:
    k, v = torch.randn(5, 2, head_dim), torch.randn(5, 2, head_dim)
    k_cache, v_cache = torch.randn(4, 2, 16, head_dim), torch.randn(4, 2, 16, head_dim)
    slots = torch.tensor([16, 17, 63, 40, 31])
    expected = [
        reference.write_kv(new.numpy(), cache.numpy(), slots.numpy()) for new, cache in ((k, k_cache), (v, v_cache))
    ]
    ops.write_kv(k, v, k_cache, v_cache, slots, backends=[backend])
    np.testing.assert_array_equal(k_cache.numpy(), expected[0])
    np.testing.assert_array_equal(v_cache.numpy(), expected[1])
    with pytest.raises(IndexError):
        ops.write_kv(k, v, k_cache, v_cache, torch.tensor([1, 2, 3, 64, 4]), backends=[backend])


def test_copy_blocks() -> None:
    storage = torch.randn(3, 2, 6, 2, 16, 8)
    source, target = torch.tensor([1, 1, 4]), torch.tensor([2, 3, 5])
    expected = reference.copy_blocks(storage.numpy(), source.numpy(), target.numpy())
    ops.copy_blocks(storage, source, target)
    np.testing.assert_array_equal(storage.numpy(), expected)
    ops.copy_blocks(storage, source[:0], target[:0])
    np.testing.assert_array_equal(storage.numpy(), expected)
