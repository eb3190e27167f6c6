"""Norms, activations, rotary embedding, KV writes and block copies against float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

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


LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def poisoned_pool(kv: torch.dtype, heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """A pool of 4 blocks in which every byte is 0x7f, and scales that are NaN."""
    pool = torch.full((2, 4, heads, 16, head_dim), 0x7F, dtype=torch.uint8).view(kv)
    return pool, torch.full(pool.shape[:-1], torch.nan)


@pytest.mark.parametrize("head_dim", [6, 32, 80])
@pytest.mark.parametrize("kv", LIMITS)
def test_write_kv_in_8_bits(backend: Backend, kv: torch.dtype, head_dim: int) -> None:
    """The scale takes the largest of a head to the limit; elements are off by half a step; other slots stay."""
    new = torch.randn(2, 5, 2, head_dim) * torch.logspace(-12, 12, 5)[:, None, None]
    pool, scales = poisoned_pool(kv, 2, head_dim)
    slots = torch.tensor([16, 17, 63, 40, 31])
    ops.write_kv(new[0], new[1], pool[0], pool[1], slots, kv_scales=scales, backends=[backend])
    block, offset = slots // 16, slots % 16
    for half in range(2):
        scale = scales[half][block, :, offset].double()
        largest = new[half].abs().amax(-1).double()
        torch.testing.assert_close(scale, largest / LIMITS[kv], rtol=1e-6, atol=0.0)
        stored = pool[half].view(torch.uint8)[block, :, offset].view(kv).double()
        assert (stored.abs().amax(-1) == LIMITS[kv]).all()
        # INT8: half a step. e4m3: half a unit of four significant bits, or of the subnormals' step of 2^-9.
        want, step = new[half].double(), scale[..., None]
        within = step / 2 if kv == torch.int8 else (want.abs() / 16).maximum(step * 2.0**-10)
        assert ((stored * step - want).abs() <= within * 1.00001).all()
    untouched = torch.ones(4, 16, dtype=torch.bool).index_put((block, offset), torch.tensor(False))
    assert (pool.view(torch.uint8).transpose(2, 3)[:, untouched] == 0x7F).all()
    assert scales.transpose(2, 3)[:, untouched].isnan().all()
    with pytest.raises(IndexError):
        ops.write_kv(
            new[0], new[1], pool[0], pool[1], torch.tensor([1, 2, 3, 64, 4]), kv_scales=scales, backends=[backend]
        )


@pytest.mark.parametrize("kv", LIMITS)
def test_elements_of_8_bits_are_rounded_to_the_nearest_and_ties_to_even(backend: Backend, kv: torch.dtype) -> None:
    """In heads whose largest is the limit, so that the scale is 1: every element, every tie, and what lies between."""
    if kv == torch.int8:
        grid = torch.arange(0, 128).float()
    else:
        grid = torch.arange(0, 127, dtype=torch.uint8).view(kv).float()
    middles = (grid[1:] + grid[:-1]) / 2
    x = torch.cat((grid, middles, middles * (1 - 1e-6), middles * (1 + 1e-6), torch.rand(800) * 2))
    x = torch.cat((x, -x))
    x = torch.cat((x, x.new_zeros(-len(x) % 31))).view(-1, 1, 31)
    x = torch.cat((x, torch.full((len(x), 1, 1), LIMITS[kv])), -1)  # [tokens, 1, 32]
    pool = torch.zeros(2, len(x) // 16 + 1, 1, 16, 32, dtype=kv)
    scales = torch.zeros(pool.shape[:-1])
    ops.write_kv(x, x, pool[0], pool[1], torch.arange(len(x)), kv_scales=scales, backends=[backend])
    want = x.round().to(kv) if kv == torch.int8 else x.to(kv)
    for half in pool:
        assert torch.equal(half.float().flatten(0, 2)[: len(x)], want.float()[:, 0])
    assert (scales.flatten(1)[:, : len(x)] == 1).all()


def test_write_kv_in_bfloat16(backend: Backend) -> None:
    k = torch.randn(40, 2, 80) * torch.logspace(-30, 30, 40)[:, None, None]
    k[3, 0, :6] = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 3.4e38])
    k.view(torch.int32)[4, 0, :2] = torch.tensor([0x7F800001, -1])  # NaN whose bits rounding would carry over the top
    pool = torch.zeros(2, 3, 2, 16, 80, dtype=torch.bfloat16)
    ops.write_kv(k, -k, pool[0], pool[1], torch.arange(40), backends=[backend])
    for half, want in zip(pool, (k, -k), strict=True):
        np.testing.assert_array_equal(half.transpose(1, 2).flatten(0, 1)[:40].float(), want.bfloat16().float())


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kv", LIMITS)
def test_not_a_number_stays_with_its_head_in_8_bits(backend: Backend, kv: torch.dtype, broken: float) -> None:
    """A key or a value that is none makes the attention of its head none, and no other; zeros and dust stay numbers."""
    k, v = torch.randn(2, 4, 3, 32)
    k[1, 0, 5] = v[2, 1, 31] = broken
    k[3], v[3] = 0.0, 1e-37
    pool, scales = poisoned_pool(kv, 3, 32)
    slots = torch.arange(16, 20)
    ops.write_kv(k, v, pool[0], pool[1], slots, kv_scales=scales, backends=[backend])
    stored = pool.float() * scales[..., None]
    assert (stored[:, 1, 2, 3].abs() < 1e-36).all()
    assert stored[0, 1, 0, 1].isnan().all() and stored[1, 1, 1, 2].isnan().all()
    starts, tables = torch.arange(5, dtype=torch.int32), torch.ones(4, 1, dtype=torch.int32)
    batch = ops.attention_batch(starts, starts[1:], tables, 1, 4)  # one query each that sees 1, 2, 3 and 4 slots
    y = ops.paged_attention(
        torch.randn(4, 3, 32), pool[0], pool[1], batch, 0.3, None, kv_scales=scales, backends=[backend]
    )
    bad = torch.zeros(4, 3, dtype=torch.bool)
    bad[1:, 0] = bad[2:, 1] = True
    assert torch.equal(y.isnan().all(-1), bad) and torch.equal(y.isnan().any(-1), bad)


@pytest.mark.parametrize("kv", LIMITS)
def test_rope_kv_in_8_bits(backend: Backend, kv: torch.dtype) -> None:
    """The keys that reach the pool are normed and rotated."""
    qkv, cos_sin, norm = torch.randn(5, (4 + 2 * 2) * 32), torch.randn(40, 32), torch.rand(32) + 0.5
    positions, slots = torch.randint(0, 40, (5,)), torch.arange(20, 25)
    options = {"cos_sin": cos_sin, "q_norm": norm, "k_norm": norm, "eps": 1e-6, "backends": [backend]}
    plain = torch.zeros(2, 4, 2, 16, 32)
    want = ops.rope_kv(qkv.clone(), 4, plain, positions, slots, **options)
    pool, scales = poisoned_pool(kv, 2, 32)
    got = ops.rope_kv(qkv.clone(), 4, pool, positions, slots, kv_scales=scales, **options)
    assert torch.equal(got, want)
    stored, heads = (pool.float() * scales[..., None])[:, 1, :, 4:9], plain[:, 1, :, 4:9]
    near = heads.abs().amax(-1, keepdim=True) / 250 if kv == torch.int8 else heads.abs() / 15 + 0.01
    assert ((stored - heads).abs() <= near).all()


@pytest.mark.parametrize("kv", LIMITS)
def test_copy_blocks_in_8_bits(kv: torch.dtype) -> None:
    storage, scales = torch.randint(0, 256, (3, 2, 6, 2, 16, 8), dtype=torch.uint8), torch.randn(3, 2, 6, 2, 16)
    source, target = torch.tensor([1, 1, 4]), torch.tensor([2, 3, 5])
    want = [reference.copy_blocks(part.numpy(), source.numpy(), target.numpy()) for part in (storage, scales)]
    ops.copy_blocks(storage.view(kv), source, target, kv_scales=scales)
    np.testing.assert_array_equal(storage.numpy(), want[0])
    np.testing.assert_array_equal(scales.numpy(), want[1])


def test_copy_blocks() -> None:
    storage = torch.randn(3, 2, 6, 2, 16, 8)
    source, target = torch.tensor([1, 1, 4]), torch.tensor([2, 3, 5])
    expected = reference.copy_blocks(storage.numpy(), source.numpy(), target.numpy())
    ops.copy_blocks(storage, source, target)
    np.testing.assert_array_equal(storage.numpy(), expected)
    ops.copy_blocks(storage, source[:0], target[:0])
    np.testing.assert_array_equal(storage.numpy(), expected)
