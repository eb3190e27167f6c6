"""Checkpoints that bitsandbytes packs: weights near what it unpacks, by how much, and what is refused."""

import json
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes import functional
from quantized_checkpoints import (
    Pair,
    Stored,
    altered,
    load_on_torch,
    logits,
    make_pair,
    read_matrices,
    relative,
    wanted_logits,
)
from safetensors.torch import load_file

from millrace.kernels.quantized import QuantizedWeight
from millrace.runtime.errors import CheckpointError
from millrace.runtime.quant.formats.bitsandbytes import integer_codebook
from millrace.runtime.weights.loader import load_model

torch.set_num_threads(1)

FOUR = {
    "quant_method": "bitsandbytes",
    "_load_in_4bit": True,
    "_load_in_8bit": False,
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_compute_dtype": "float32",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": False,
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
    "llm_int8_skip_modules": None,
    "llm_int8_threshold": 6.0,
}
EIGHT = {**FOUR, "_load_in_4bit": False, "_load_in_8bit": True, "load_in_4bit": False, "load_in_8bit": True}
# Largest distance of an entry of the integer codebook, in units of a block's largest weight; and float16's of a scale.
OFF = {"nf4": 0.0039, "fp4": 0.0032}
FAR = 0.03  # of logits: what that rounding does to them, a tenth of what NF4 itself does
HALF = 2.0**-11


def four_bits(
    weight: torch.Tensor, kind: str, block: int, nested: bool = False, storage: torch.dtype = torch.uint8
) -> Stored:
    packed, state = functional.quantize_4bit(
        weight, blocksize=block, compress_statistics=nested, quant_type=kind, quant_storage=storage
    )
    tensors = {f"weight.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}
    # As one row: its CPU kernel begins a new block with each row, where what it packs goes on.
    state.shape = torch.Size((1, weight.numel()))
    with torch.compiler.set_stance("force_eager"):  # it compiles for each shape
        wide = functional.dequantize_4bit(packed, state).float()
    return Stored({"weight": packed, **tensors}, wide.view(weight.shape))


def eight_bits(weight: torch.Tensor) -> Stored:
    values, scales, _ = functional.int8_vectorwise_quant(weight.half())
    tensors = {"weight": values, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return Stored(tensors, functional.int8_vectorwise_dequant(values, scales).float())


def plain_head(convert: Any) -> Any:
    return lambda name, weight: None if name == "lm_head" else convert(weight)


def blocks_of(weight: torch.Tensor, size: int) -> torch.Tensor:
    """Largest absolute weight of each weight's block."""
    return weight.flatten().view(-1, size).abs().amax(1).repeat_interleave(size).view(weight.shape)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_blocks_within_rows_stay_packed(kind: str, nested: bool, storage: torch.dtype, tmp_path: Path) -> None:
    pair = make_pair(
        tmp_path,
        plain_head(lambda weight: four_bits(weight, kind, 64, nested, storage)),
        FOUR | {"bnb_4bit_quant_type": kind, "bnb_4bit_quant_storage": str(storage).removeprefix("torch.")},
    )
    want = load_file(pair.plain / "model.safetensors")
    for name, weight in read_matrices(pair.quantized).items():
        assert isinstance(weight, QuantizedWeight), name
        assert weight.codebook is not None
        exact = want[f"{name}.weight"]
        off = (weight.widen() - exact).abs() / blocks_of(exact, 64)
        assert off.max() < OFF[kind] + 2 * HALF, name
    logits_ = wanted_logits(pair)
    assert relative(logits(load_on_torch(pair.quantized)), logits_) < FAR
    assert relative(logits(load_model(pair.quantized)), logits_) < 0.04
    described = load_model(pair.quantized).spec.weights
    assert described == f"bitsandbytes {kind.upper()}, blocks of 64, packed; others float16"


def test_blocks_that_go_on_in_the_next_row_are_widened(tmp_path: Path) -> None:
    """Exactly: nothing is rounded on the way to float32."""
    pair = make_pair(tmp_path, plain_head(lambda weight: four_bits(weight, "nf4", 64)), FOUR, intermediate_size=96)
    want = load_file(pair.plain / "model.safetensors")
    matrices = read_matrices(pair.quantized)
    down = matrices["model.layers.0.mlp.down_proj"]
    assert isinstance(down, torch.Tensor)
    assert torch.equal(down, want["model.layers.0.mlp.down_proj.weight"])
    assert isinstance(matrices["model.layers.0.mlp.up_proj"], QuantizedWeight)
    assert relative(logits(load_on_torch(pair.quantized)), wanted_logits(pair)) < FAR
    assert load_model(pair.quantized, dtype="float32").spec.weights == (
        "bitsandbytes NF4, blocks of 64 that cross rows; NF4, blocks of 64, packed; others float16; "
        "but widened to float32: model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj"
    )


@pytest.mark.parametrize("nested", [False, True])
def test_a_last_block_may_be_cut_off(nested: bool, tmp_path: Path) -> None:
    pair = make_pair(
        tmp_path,
        lambda name, weight: four_bits(weight, "nf4", 4096, nested) if name.endswith("down_proj") else None,
        FOUR,
        intermediate_size=100,
    )
    want = load_file(pair.plain / "model.safetensors")
    for name, weight in read_matrices(pair.quantized).items():
        assert isinstance(weight, torch.Tensor)
        assert torch.allclose(weight, want[f"{name}.weight"], rtol=1e-6, atol=1e-8)


def test_eight_bits(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, plain_head(eight_bits), EIGHT | {"llm_int8_skip_modules": ["lm_head"]})
    want = load_file(pair.plain / "model.safetensors")
    for name, weight in read_matrices(pair.quantized).items():
        assert isinstance(weight, QuantizedWeight)
        assert torch.allclose(weight.widen(), want[f"{name}.weight"], rtol=2 * HALF, atol=0), name
    assert relative(logits(load_on_torch(pair.quantized)), wanted_logits(pair)) < 0.002
    model = load_model(pair.quantized)
    assert relative(logits(model), wanted_logits(pair)) < 0.03
    assert model.spec.weights == "bitsandbytes 8 bits, one scale for each output, packed; others float16"


def test_matrices_of_gpt2_are_stored_turned(tmp_path: Path) -> None:
    """And lm_head may be quantised."""
    pair = make_pair(tmp_path, lambda name, weight: four_bits(weight, "nf4", 128), FOUR, kind="gpt2")
    # 64 inputs, so that blocks of 128 are widened; mlp.c_proj has 256.
    kinds = {name: type(weight) for name, weight in read_matrices(pair.quantized).items()}
    assert kinds["transformer.h.0.attn.c_attn"] is torch.Tensor
    assert kinds["transformer.h.0.mlp.c_proj"] is QuantizedWeight
    assert relative(logits(load_on_torch(pair.quantized)), wanted_logits(pair)) < FAR


@pytest.mark.parametrize(("kind", "unit"), [("nf4", 112), ("fp4", 120)])
def test_codebooks_are_as_near_as_is_said(kind: str, unit: int) -> None:
    table = bitsandbytes.functional.get_4bit_type(kind, device="cpu")
    codebook, got = integer_codebook(table)
    assert got == unit
    assert codebook.dtype == torch.int8
    assert (codebook.float() / unit - table).abs().max() < OFF[kind]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("four")
    return make_pair(folder, plain_head(lambda weight: four_bits(weight, "nf4", 64, nested=True)), FOUR)


@pytest.mark.parametrize(("values", "named"), [
    ({"load_in_8bit": True}, "load_in_4bit is True, but it must be true where load_in_8bit is false"),
    ({"load_in_4bit": False, "_load_in_4bit": False}, "load_in_4bit is False"),
    ({"llm_int8_has_fp16_weight": True}, "llm_int8_has_fp16_weight is True"),
    ({"bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type is 'int4'"),
    ({"bnb_4bit_quant_storage": "complex64"}, "bnb_4bit_quant_storage is 'complex64'"),
    ({"llm_int8_skip_modules": ["down_proj"]}, r"2 of the wrong shape: .*down_proj\.weight is \[4096, 1\]"),
    ({"colour": "blue"}, "colour is 'blue'"),
    (EIGHT, r"14 missing: .*q_proj\.SCB"),
])  # fmt: skip
def test_settings_are_refused_by_name(values: dict[str, Any], named: str, small: Pair, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=named):
        load_model(altered(small.quantized, tmp_path / "altered", values, {}))


STATE = "weight.quant_state.bitsandbytes__nf4"
GOOD_STATE = {"quant_type": "nf4", "blocksize": 64, "shape": [64, 64], "nested_blocksize": 256, "nested_offset": 0.1}


def as_bytes(value: Any) -> torch.Tensor:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return torch.tensor(list(text), dtype=torch.uint8)


@pytest.mark.parametrize(("suffix", "tensor", "named"), [
    ("weight.absmax", None, r"1 missing: .*q_proj\.weight\.absmax"),
    ("weight.quant_map", torch.full((16,), float("nan")), "q_proj: weight.quant_map must lie between -1 and 1"),
    ("weight.nested_absmax", torch.full((1,), float("inf")), "q_proj: its scales are not all finite"),
    ("weight.nested_quant_map", torch.zeros(16), r"nested_quant_map is \[16\], expected \[256\]"),
    ("weight", torch.zeros(64, 64, dtype=torch.uint8), r"q_proj\.weight is \[64, 64\], expected \[2048, 1\]"),
    (STATE, None, r"q_proj: there is no .*q_proj\.weight\.quant_state\.bitsandbytes__nf4"),
    (STATE, as_bytes(b"{"), "is not valid JSON"),
    (STATE, as_bytes(b"\xff\xfe"), "is not valid JSON"),
    (STATE, as_bytes([1]), "holds list, but it must hold an object"),
    (STATE, torch.zeros(100000, dtype=torch.uint8), "must be a short row of bytes"),
    (STATE, torch.zeros(3), "must be a short row of bytes"),
    (STATE, as_bytes(GOOD_STATE | {"blocksize": 10**12}), "blocksize is 1000000000000, but it must be one of 32, 64"),
    (STATE, as_bytes(GOOD_STATE | {"blocksize": 128}), r"absmax is \[64\], expected \[32\]"),
    (STATE, as_bytes(GOOD_STATE | {"shape": [32, 128]}), r"shape is \[32, 128\], but it must be \[64, 64\]"),
    (STATE, as_bytes(GOOD_STATE | {"quant_type": "fp4"}), "quant_type is 'fp4'"),
    (STATE, as_bytes(GOOD_STATE | {"nested_offset": "much"}), "nested_offset is 'much'"),
    (STATE, as_bytes(GOOD_STATE | {"colour": 1}), "colour is 1"),
])  # fmt: skip
def test_damaged_tensors_are_named(
    suffix: str, tensor: torch.Tensor | None, named: str, small: Pair, tmp_path: Path
) -> None:
    changes = {f"model.layers.0.self_attn.q_proj.{suffix}": tensor}
    with pytest.raises(CheckpointError, match=named):
        load_model(altered(small.quantized, tmp_path / "altered", {}, changes))
