"""AWQ checkpoints: integers exactly, logits as transformers has them for the same weights, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_checkpoints import (
    Pair,
    Stored,
    altered,
    awq,
    load_on_torch,
    logits,
    make_pair,
    random_integers,
    read_matrices,
    relative,
    wanted_logits,
)
from safetensors.torch import load_file

from millrace.kernels.quantized import QuantizedWeight
from millrace.runtime.errors import CheckpointError
from millrace.runtime.quant.formats import read_format
from millrace.runtime.quant.formats.awq import unpack_columns
from millrace.runtime.weights.loader import load_model

torch.set_num_threads(1)

SETTINGS = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


@pytest.mark.parametrize("others", [
    {"checkpoint_format": "gemm", "format": "gemm", "pack_dtype": "int32", "desc_act": False, "meta": {}},
    {"provider": "auto-round", "autoround_version": "0.5", "data_type": "int", "iters": 200, "sym": False},
])  # fmt: skip
def test_what_current_tools_write_is_read(others: dict[str, Any]) -> None:
    assert read_format({"quantization_config": SETTINGS | others}) is not None


def convert(name: str, weight: torch.Tensor) -> Stored | None:
    return None if name == "lm_head" else awq(random_integers(*weight.shape, 4, 32, seed=len(name)))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("awq"), convert, SETTINGS)


def test_words_are_those_that_autoawq_packs() -> None:
    """Checked once against what from_linear() of AutoAWQ 0.2.9's WQLinear_GEMM gives for these integers."""
    words = torch.tensor(
        [[1183506195, -838707301] * 2, [1241970097, -1030849223] * 2],
        dtype=torch.int32,
    )
    want = [[(7 * index + 3) % 16 for index in range(32)], [(5 * index + 1) % 16 for index in range(32)]]
    assert unpack_columns(words).t().tolist() == want


@pytest.mark.parametrize("changes", [{}, {"modules_to_not_convert": ["lm_head"]}, {"version": "GEMM", "bits": 4}])
def test_every_integer_is_kept_and_logits(changes: dict[str, Any], tmp_path: Path) -> None:
    pair = make_pair(tmp_path, convert, SETTINGS | changes)
    want = load_file(pair.plain / "model.safetensors")
    matrices = read_matrices(pair.quantized)
    assert len(matrices) == 14
    for name, weight in matrices.items():
        assert isinstance(weight, QuantizedWeight), name
        assert torch.equal(weight.widen(), want[f"{name}.weight"]), name
    logits_ = wanted_logits(pair)
    assert (logits(load_on_torch(pair.quantized)) - logits_).abs().max() < 2e-4
    model = load_model(pair.quantized)
    assert relative(logits(model), logits_) < 0.03
    assert model.spec.weights == "AWQ 4 bits, groups of 32, packed; others float16"


def test_one_group_for_each_output(tmp_path: Path) -> None:
    pair = make_pair(
        tmp_path,
        lambda name, weight: awq(random_integers(*weight.shape, 4, weight.shape[1])) if "layers" in name else None,
        SETTINGS | {"group_size": -1},
    )
    assert (logits(load_on_torch(pair.quantized)) - wanted_logits(pair)).abs().max() < 2e-4


def test_settings_of_early_releases(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, convert, None)
    old = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (pair.quantized / "quant_config.json").write_text(json.dumps(old))
    assert (logits(load_on_torch(pair.quantized)) - wanted_logits(pair)).abs().max() < 2e-4


@pytest.mark.parametrize(("values", "named"), [
    ({"bits": 8}, "bits is 8, but it must be 4"),
    ({"zero_point": False}, "zero_point is False"),
    ({"version": "gemv"}, "version is 'gemv'.*gemm"),
    ({"version": "marlin"}, "version is 'marlin'"),
    ({"backend": "llm-awq"}, "backend is 'llm-awq'"),
    ({"group_size": 48}, "64 inputs cannot be cut into groups of 48"),
    ({"group_size": 64}, r"28 of the wrong shape: .*qzeros is \[4, 8\], expected \[2, 8\]"),
    ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert is 'lm_head'.*list of strings"),
    ({"modules_to_not_convert": ["mlp"]}, r"6 missing: .*down_proj\.weight.*18 unexpected: .*down_proj\.qweight"),
    ({"colour": 1}, "colour is 1"),
])  # fmt: skip
def test_settings_are_refused_by_name(values: dict[str, Any], named: str, small: Pair, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=named):
        load_model(altered(small.quantized, tmp_path / "altered", values, {}))
