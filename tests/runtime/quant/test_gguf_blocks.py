"""GGUF's block types against the `gguf` package: float32 exactly, integers within what float16 scales lose."""

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf_files import random_blocks

from millrace.kernels.quantized import QuantizedWeight, stack_rows
from millrace.runtime.quant.gguf_blocks import BLOCK_TYPES, read_blocks, widen_blocks

EXACT = ("Q4_0", "Q5_0", "Q8_0", "IQ4_NL")


def matrix(kind: str, outputs: int = 24, inputs: int = 512, **options: float) -> tuple[torch.Tensor, np.ndarray]:
    """(bytes, what they stand for)"""
    data = random_blocks(kind, outputs, inputs, **options)
    return torch.from_numpy(data), gguf.quants.dequantize(data, GGMLQuantizationType[kind])


def packed(kind: str, data: torch.Tensor) -> QuantizedWeight:
    weight = read_blocks(BLOCK_TYPES[kind], data)
    assert isinstance(weight, QuantizedWeight)
    return weight


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_sizes_are_those_of_the_format(kind: str) -> None:
    assert GGML_QUANT_SIZES[GGMLQuantizationType[kind]] == (BLOCK_TYPES[kind].weights, BLOCK_TYPES[kind].nbytes)


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_every_type_widens_exactly(kind: str) -> None:
    data, want = matrix(kind)
    assert np.array_equal(widen_blocks(BLOCK_TYPES[kind], data).numpy(), want)


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_integers_stand_for_the_same_weights(kind: str) -> None:
    data, want = matrix(kind)
    block, weight = BLOCK_TYPES[kind], packed(kind, data)
    assert (weight.bits, weight.group_size) == (block.bits, block.group)
    assert int(weight.q.max()) < 1 << block.bits
    error = np.abs(weight.widen().numpy() - want)
    if kind in EXACT:
        assert not error.any()
        return
    # Half a unit in the last place of a float16, for the scale and again for the zero, of a group's largest weights.
    groups = np.abs(want).reshape(24, -1, block.group).max(2).repeat(block.group, 1)
    minima = (weight.zeros.float() * weight.scales.float()).abs().numpy().repeat(block.group, 1)
    assert (error <= 2.0**-11 * (groups + 2 * minima) + 1e-9).all()
    assert error.any()  # or the bound above would say nothing


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_what_the_package_quantises(kind: str) -> None:
    wide = np.random.default_rng(3).normal(0, 0.02, (8, 96)).astype(np.float32)
    data = gguf.quants.quantize(wide, GGMLQuantizationType[kind])
    want = gguf.quants.dequantize(data, GGMLQuantizationType[kind])
    assert np.allclose(packed(kind, torch.from_numpy(data)).widen().numpy(), want, rtol=0, atol=3e-5)


@pytest.mark.parametrize("kind", ["Q2_K", "Q4_K", "Q5_K"])
def test_groups_with_a_minimum_and_no_scale_keep_it(kind: str) -> None:
    data, _ = matrix(kind, 4, 256)
    at = 16 if kind != "Q2_K" else 80  # dmin behind d
    blocks = data.view(-1, BLOCK_TYPES[kind].nbytes).numpy()
    scales = blocks[:, 4:16] if kind != "Q2_K" else blocks[:, :16]
    scales &= 0xF0 if kind == "Q2_K" else 0x00
    if kind != "Q2_K":
        scales[:, 4:8] = 0x15  # minima of the first four groups; their scales and all of the last four are 0
    assert blocks[:, at].any()
    want = gguf.quants.dequantize(data.numpy(), GGMLQuantizationType[kind])
    assert want.any()
    got = packed(kind, data).widen().numpy()
    assert np.allclose(got, want, rtol=2.0**-11, atol=0)


def test_a_minimum_far_above_its_scale_is_kept() -> None:
    data, _ = matrix("Q4_1", 2, 64)
    blocks = data.view(-1, 20).numpy()
    blocks[:, :4] = np.array([1e-7, -0.5], np.float16).view(np.uint8)
    want = gguf.quants.dequantize(data.numpy(), GGMLQuantizationType.Q4_1)
    got = packed("Q4_1", data)
    assert bool(got.zeros.isfinite().all())
    assert np.allclose(got.widen().numpy(), want, rtol=1e-4, atol=0)


def test_matrices_of_zeros() -> None:
    for kind, block in BLOCK_TYPES.items():
        data = torch.zeros(3, 256 // block.weights * block.nbytes, dtype=torch.uint8)
        assert not packed(kind, data).widen().any()


@pytest.mark.parametrize(("kind", "at", "scale"), [("Q6_K", 208, 6e4), ("Q4_K", 0, 5e4), ("Q4_K", 2, 5e4)])
def test_scales_that_float16_cannot_hold_widen_the_matrix(kind: str, at: int, scale: float) -> None:
    data, _ = matrix(kind)
    blocks = data.view(-1, BLOCK_TYPES[kind].nbytes).numpy()
    blocks[0, at : at + 2] = np.array([scale], np.float16).view(np.uint8)
    if at == 2:
        blocks[0, 4:8] = 0  # a minimum beside no scale
        blocks[0, 8:12] = 63
    want = gguf.quants.dequantize(data.numpy(), GGMLQuantizationType[kind])
    got = read_blocks(BLOCK_TYPES[kind], data)
    assert isinstance(got, torch.Tensor)
    assert np.array_equal(got.numpy(), want)


@pytest.mark.parametrize("kind", ["Q3_K", "Q6_K"])
def test_the_smallest_scales_are_exact(kind: str) -> None:
    """Rows of tokens that were never trained have such scales."""
    data, _ = matrix(kind)
    at = 208 if kind == "Q6_K" else 108
    data.view(-1, BLOCK_TYPES[kind].nbytes).numpy()[:, at : at + 2] = np.array([6e-8], np.float16).view(np.uint8)
    want = gguf.quants.dequantize(data.numpy(), GGMLQuantizationType[kind])
    assert want.any()
    assert np.array_equal(packed(kind, data).widen().numpy(), want)


@pytest.mark.parametrize("value", [np.inf, np.nan])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
def test_scales_that_are_not_finite_are_refused(kind: str, value: float) -> None:
    data, _ = matrix(kind)
    data.view(-1, BLOCK_TYPES[kind].nbytes).numpy()[5, :2] = np.array([value], np.float16).view(np.uint8)
    for read in (read_blocks, widen_blocks):
        with pytest.raises(ValueError, match="not finite"):
            read(BLOCK_TYPES[kind], data)


def test_matrices_longer_than_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    data, want = matrix("Q3_K", 50, 256)
    whole = packed("Q3_K", data)
    monkeypatch.setattr("millrace.runtime.quant.gguf_blocks._SLICE", 7 * 256)
    for one, two in zip(whole[:3], packed("Q3_K", data)[:3], strict=True):
        assert torch.equal(one, two)
    assert np.array_equal(widen_blocks(BLOCK_TYPES["Q3_K"], data).numpy(), want)


@pytest.mark.parametrize("kinds", [
    ("Q4_K", "Q6_K"), ("Q4_0", "Q5_1"), ("Q2_K", "Q3_K", "Q4_K"), ("IQ4_NL", "Q6_K"), ("IQ4_XS", "Q4_K"),
    ("IQ4_NL", "IQ4_XS"), ("Q4_0", "Q4_1"),
])  # fmt: skip
def test_matrices_that_the_model_joins_take_one_form(kinds: tuple[str, ...]) -> None:
    """The files of llama.cpp's mixes (Q4_K_M) have v in another type than q and k."""
    parts = [packed(kind, matrix(kind, 8, seed=place)[0]) for place, kind in enumerate(kinds)]
    joined = stack_rows(parts)
    assert joined is not None
    assert torch.equal(joined.widen(), torch.cat([part.widen() for part in parts]))
    assert int(joined.q.max()) < 1 << joined.bits
