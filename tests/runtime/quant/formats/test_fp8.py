"""FP8 checkpoints: each weight is the stored byte times its scale, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_checkpoints import (
    Pair,
    Stored,
    altered,
    load_on_torch,
    logits,
    make_pair,
    read_matrices,
    wanted_logits,
)
from safetensors.torch import load_file

from millrace.kernels.quantized import Float8Weight
from millrace.runtime.errors import CheckpointError
from millrace.runtime.weights.loader import load_model

torch.set_num_threads(1)

SETTINGS = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [48, 32]}


def in_blocks(weight: torch.Tensor, rows: int, columns: int, name: str = "weight_scale_inv") -> Stored:
    """One scale for each block, block by block; the last ones are smaller where sizes do not divide."""
    stored = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    wide = torch.empty_like(weight)
    scales = torch.empty(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
    for row in range(scales.shape[0]):
        for column in range(scales.shape[1]):
            place = (
                slice(row * rows, (row + 1) * rows),
                slice(column * columns, (column + 1) * columns),
            )
            scale = weight[place].abs().max() / 448
            stored[place] = (weight[place] / scale).to(torch.float8_e4m3fn)
            wide[place] = stored[place].float() * scale
            scales[row, column] = scale
    return Stored({"weight": stored, name: scales}, wide)


def plain_head(convert: Any) -> Any:
    return lambda name, weight: None if name == "lm_head" else convert(weight)


def one_scale(weight: torch.Tensor, shape: tuple[int, ...] = ()) -> Stored:
    stored = in_blocks(weight, *weight.shape)
    tensors = {"weight": stored.tensors["weight"], "weight_scale": stored.tensors["weight_scale_inv"].view(shape)}
    return Stored({**tensors, "input_scale": torch.tensor(0.5)}, stored.wide)


def for_each_output(weight: torch.Tensor) -> Stored:
    stored = in_blocks(weight, 1, weight.shape[1], "weight_scale")
    return Stored({**stored.tensors, "weight_scale": stored.tensors["weight_scale"].flatten()}, stored.wide)


def powers_of_two(weight: torch.Tensor) -> Stored:
    stored = in_blocks(weight, *weight.shape)
    scale = torch.tensor([[2.0**-12]])
    wide = stored.tensors["weight"].float() * scale
    return Stored({**stored.tensors, "weight_scale_inv": scale.to(torch.float8_e8m0fnu)}, wide)


@pytest.mark.parametrize(("changes", "convert", "described"), [
    ({}, lambda weight: in_blocks(weight, 48, 32), "blocks of 48 x 32"),
    ({"weight_block_size": [128, 128]}, lambda weight: in_blocks(weight, 128, 128), "blocks of 128 x 128"),
    (
        {"weight_block_size": None, "activation_scheme": "static"},
        one_scale,
        "one scale for each matrix",
    ),
    ({"weight_block_size": None}, for_each_output, "one scale for each output"),
    ({"weight_block_size": [128, 128], "scale_fmt": "ue8m0"}, powers_of_two, "blocks of 128 x 128"),
])  # fmt: skip
def test_weights_and_logits(changes: dict[str, Any], convert: Any, described: str, tmp_path: Path) -> None:
    settings = {**SETTINGS, **changes, "modules_to_not_convert": ["lm_head"]}
    pair = make_pair(tmp_path, plain_head(convert), settings, dtype=torch.bfloat16)
    want = load_file(pair.plain / "model.safetensors")
    matrices = read_matrices(pair.quantized)
    assert len(matrices) == 14
    for name, weight in matrices.items():
        assert isinstance(weight, Float8Weight)
        assert weight.is_w8a8
        assert torch.equal(weight.widen(), want[f"{name}.weight"]), name
    logits_ = wanted_logits(pair)
    model = load_model(pair.quantized)
    for loaded in (load_on_torch(pair.quantized), model):
        assert (logits(loaded) - logits_).abs().max() < 2e-4
    assert model.spec.weights == f"FP8 E4M3, {described}, packed; others bfloat16"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("fp8")
    return make_pair(folder, plain_head(lambda weight: in_blocks(weight, 48, 32)), SETTINGS)


@pytest.mark.parametrize(("values", "named"), [
    ({"fmt": "e5m2"}, "fmt is 'e5m2'"),
    ({"activation_scheme": "none"}, "activation_scheme is 'none'"),
    ({"weight_block_size": [128]}, r"weight_block_size is \[128\], but it must be two positive integers"),
    ({"weight_block_size": [0, 128]}, r"weight_block_size is \[0, 128\]"),
    ({"weight_block_size": [64, 32]}, r"weight_scale_inv is \[3, 2\], expected \[2, 2\]"),
    ({"weight_block_size": None}, r"14 of the wrong shape: .*weight_scale_inv is \[2, 4\], expected \[1\]"),
    ({"expert_dtype": "fp4"}, "expert_dtype is 'fp4'"),
    ({"modules_to_convert": ["lm_head"]}, "modules_to_convert is"),
])  # fmt: skip
def test_settings_are_refused_by_name(values: dict[str, Any], named: str, small: Pair, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=named):
        load_model(altered(small.quantized, tmp_path / "altered", values, {}))


@pytest.mark.parametrize(("suffix", "tensor", "named"), [
    ("weight_scale_inv", None, r"1 missing: .*q_proj\.weight_scale_inv"),
    ("weight_scale_inv", torch.full((2, 2), float("nan")), r"q_proj: its weight_scale_inv is not finite"),
    ("weight", torch.full((64, 64), float("nan")).to(torch.float8_e4m3fn), "q_proj: its weight is not a number"),
    ("weight", torch.zeros(64, 64), r"q_proj\.weight is F32, expected F8_E4M3"),
    ("weight", torch.zeros(64, 64).to(torch.float8_e5m2), r"q_proj\.weight is F8_E5M2, expected F8_E4M3"),
])  # fmt: skip
def test_damaged_tensors_are_named(
    suffix: str, tensor: torch.Tensor | None, named: str, small: Pair, tmp_path: Path
) -> None:
    changes = {f"model.layers.0.self_attn.q_proj.{suffix}": tensor}
    with pytest.raises(CheckpointError, match=named):
        load_model(altered(small.quantized, tmp_path / "altered", {}, changes))
