"""GPTQ checkpoints: integers exactly, logits as transformers has them for the same weights, and what is refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_checkpoints import (
    Integers,
    Pair,
    Stored,
    altered,
    gptq,
    load_on_torch,
    logits,
    make_pair,
    random_integers,
    read_matrices,
    relative,
    wanted_logits,
)
from safetensors.torch import load_file

from millrace.kernels import ops
from millrace.kernels.quantized import QuantizedWeight
from millrace.runtime.errors import CheckpointError
from millrace.runtime.quant.formats.gptq import unpack_zeros
from millrace.runtime.quant.formats.packing import unpack_rows
from millrace.runtime.weights.loader import load_model

torch.set_num_threads(1)

SETTINGS = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}


def shuffled(inputs: int, seed: int = 7) -> torch.Tensor:
    return torch.randperm(inputs, generator=torch.Generator().manual_seed(seed))


def pair_of(
    folder: Path, settings: Mapping[str, Any] | None, *, seed: int = 0, version: int = 1, **options: Any
) -> Pair:
    """Quantised but for lm_head; `order` takes a name and a number of inputs, and gives the order of the inputs."""
    bits, size = options.pop("bits", 4), options.pop("group_size", 32)
    order, with_groups = options.pop("order", lambda name, inputs: None), options.pop("with_groups", True)

    def convert(name: str, weight: torch.Tensor) -> Stored | None:
        if name == "lm_head":
            return None
        outputs, inputs = weight.shape
        group = inputs if size == -1 else size
        integers = random_integers(outputs, inputs, bits, group, seed=len(name), order=order(name, inputs))
        return gptq(integers, bits, version=version, with_groups=with_groups)

    return make_pair(folder, convert, settings, **options)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pair_of(tmp_path_factory.mktemp("gptq"), SETTINGS)


def test_words_are_those_that_autogptq_packs() -> None:
    """Checked once against what pack() of AutoGPTQ 0.7.1's QuantLinear gives for these integers."""
    words = {
        2: ([454761243] * 2, [606348324] * 2),
        3: ([1402433619, 1884526448, -1754246249], [-1468481368, -1062700864, 2025891960]),
        4: ([1299153315, -974714581] * 2, [1049889360, -1239649576] * 2),
        8: (
            [403769859, 875374111, 1346978363, 1818582615, -2004780429, -1533176177, -1061571925, -589967673],
            [252314880, 589175060, 926035240, 1262895420, 1599755600, 1936615780, -2021491336, -1684631156],
        ),
    }
    for bits, (weights, zeros) in words.items():
        q = unpack_rows(torch.tensor([weights], dtype=torch.int32), bits, 32)
        assert q[0].tolist() == [(7 * index + 3) % (1 << bits) for index in range(32)], bits
        got = unpack_zeros(torch.tensor([zeros], dtype=torch.int32), bits, 32, minus_one=True)
        assert got[0].tolist() == [max(1, (5 * index + 1) % (1 << bits)) for index in range(32)], bits


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 4, 7, 31, 32, 33, 100])
def test_any_number_of_integers_of_any_bits_is_unpacked(bits: int, count: int) -> None:
    values = torch.randint(0, 1 << bits, (3, count), generator=torch.Generator().manual_seed(count))
    words = []
    for row in values.tolist():
        number = sum(value << (index * bits) for index, value in enumerate(row))
        words.append([number >> start & 0xFFFFFFFF for start in range(0, count * bits, 32)])
    packed = torch.tensor(words).to(torch.uint32).view(torch.int32)
    for layout in (packed, packed.t().contiguous().t()):
        assert torch.equal(unpack_rows(layout, bits, count), values.to(torch.uint8))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_zero_of_zero_gives_back_what_it_borrowed(bits: int) -> None:
    """Version 1 takes one off whole words, so that a zero of 0 borrows from the next one."""
    zeros = torch.tensor([[0] * 31 + [1], [0, 1] * 16])
    stored = gptq(
        Integers(torch.zeros(32, 32).long(), torch.ones(32, 2).half(), zeros.t(), torch.arange(32) // 16), bits
    )
    assert torch.equal(unpack_zeros(stored.tensors["qzeros"], bits, 32, minus_one=True), zeros.to(torch.uint8))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("order", [False, True])
def test_every_integer_is_kept(bits: int, version: int, order: bool, tmp_path: Path) -> None:
    settings = SETTINGS | {"bits": bits, "desc_act": order, "checkpoint_format": ["gptq", "gptq_v2"][version - 1]}
    pair = pair_of(
        tmp_path,
        settings,
        bits=bits,
        version=version,
        order=lambda name, inputs: shuffled(inputs) if order else None,
        num_hidden_layers=1,
    )
    want = load_file(pair.plain / "model.safetensors")
    matrices = read_matrices(pair.quantized)
    assert len(matrices) == 7
    for name, weight in matrices.items():
        assert isinstance(weight, QuantizedWeight), name
        assert weight.bits == (8 if bits == 8 else 4)
        assert (weight.order is not None) == order
        assert torch.equal(weight.widen(), want[f"{name}.weight"]), name


@pytest.mark.parametrize(("bits", "group_size", "order"), [
    (4, 32, "none"),
    (4, 64, "shared"),
    (4, 32, "own"),  # gate and up differ, so that they are widened to be one matrix
    (8, -1, "none"),
    (3, 32, "shared"),
    (2, -1, "none"),
])  # fmt: skip
def test_logits(bits: int, group_size: int, order: str, tmp_path: Path) -> None:
    def inputs_of(name: str, inputs: int) -> torch.Tensor | None:
        return None if order == "none" else shuffled(inputs, len(name) if order == "own" else 7)

    settings = SETTINGS | {"bits": bits, "group_size": group_size, "desc_act": order != "none"}
    pair = pair_of(tmp_path, settings, bits=bits, group_size=group_size, order=inputs_of)
    want = wanted_logits(pair)
    assert (logits(load_on_torch(pair.quantized)) - want).abs().max() < 2e-4
    assert relative(logits(load_model(pair.quantized)), want) < 0.03  # the C++ kernels round activations to 8 bits


def test_packed_matrices_are_small(tmp_path: Path) -> None:
    pair = pair_of(tmp_path, SETTINGS, vocab_size=32)
    wide, packed = load_model(pair.plain), load_model(pair.quantized)
    table = 2 * 32 * 64 * 4  # embedding and lm_head stay as they are
    assert (packed.weight_bytes - table) < 0.22 * (wide.weight_bytes - table)
    assert packed.spec.weights == "GPTQ 4 bits, groups of 32, packed; others float16"


def test_other_architectures_and_quantised_lm_heads(tmp_path: Path) -> None:
    def convert(name: str, weight: torch.Tensor) -> Stored:
        return gptq(random_integers(*weight.shape, 4, 32, seed=len(name)), 4)

    for kind, changes in (("gpt2", {"vocab_size": 192}), ("qwen2", {"tie_word_embeddings": False, "vocab_size": 192})):
        pair = make_pair(tmp_path / kind, convert, SETTINGS | {"lm_head": True}, kind=kind, **changes)
        assert any(name.endswith(("lm_head", "c_proj")) for name in read_matrices(pair.quantized))
        got = logits(load_on_torch(pair.quantized))
        assert (got - wanted_logits(pair)).abs().max() < 3e-4, kind


def test_settings_beside_the_weights_and_the_file_names_of_early_releases(tmp_path: Path) -> None:
    pair = pair_of(tmp_path, None, with_groups=False)
    beside = {key: value for key, value in SETTINGS.items() if key != "quant_method"} | {"model_file_base_name": "x"}
    (pair.quantized / "quantize_config.json").write_text(json.dumps(beside))
    (pair.quantized / "model.safetensors").rename(pair.quantized / "gptq_model-4bit-32g.safetensors")
    assert (logits(load_on_torch(pair.quantized)) - wanted_logits(pair)).abs().max() < 2e-4
    (pair.quantized / "quantize_config.json").write_text(json.dumps(beside | {"bits": 5}))
    with pytest.raises(CheckpointError, match=r"quantize_config\.json: bits is 5, but it must be 2, 3, 4 or 8"):
        load_model(pair.quantized)


def test_patterns_give_matrices_settings_of_their_own(tmp_path: Path) -> None:
    def convert(name: str, weight: torch.Tensor) -> Stored | None:
        if "layers.1." in name or name == "lm_head":
            return None
        bits, size = (8, 64) if name.endswith(("down_proj", "v_proj")) else (4, 32)
        return gptq(random_integers(*weight.shape, bits, size), bits)

    dynamic = {"-:.*layers\\.1\\.": {}, "+:.*(down|v)_proj": {"bits": 8, "group_size": 64}}
    pair = make_pair(tmp_path, convert, SETTINGS | {"dynamic": dynamic})
    assert (logits(load_on_torch(pair.quantized)) - wanted_logits(pair)).abs().max() < 2e-4
    assert load_model(pair.quantized).spec.weights == (  # v, joined with q and k, too
        "GPTQ 4 bits, groups of 32, packed; 8 bits, groups of 64, packed; 8 bits, one scale for each output, packed; "
        "others float16"
    )


def test_biases_that_are_all_zeros_are_harmless(small: Pair, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.o_proj.bias"
    load_model(altered(small.quantized, tmp_path / "zeros", {}, {name: torch.zeros(64).half()}))
    with pytest.raises(CheckpointError, match=f"1 unexpected: {name}"):
        load_model(altered(small.quantized, tmp_path / "ones", {}, {name: torch.ones(64).half()}))


@pytest.mark.parametrize(("values", "named"), [
    ({"bits": 5}, "quantization_config: bits is 5, but it must be 2, 3, 4 or 8"),
    ({"bits": True}, "bits is True"),
    ({"bits": None}, "bits is None, but it must be given"),
    ({"group_size": 0}, "group_size is 0"),
    ({"group_size": -2}, "group_size is -2"),
    ({"group_size": 48}, "q_proj: 64 inputs cannot be cut into groups of 48"),
    ({"group_size": 128}, "64 inputs cannot be cut into groups of 128"),
    ({"group_size": 64}, r"28 of the wrong shape: .*down_proj\.qzeros is \[4, 8\], expected \[2, 8\]"),
    ({"bits": 8}, r"down_proj\.qweight is \[16, 64\], expected \[32, 64\]"),
    ({"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'.*gptq_v2"),
    ({"checkpoint_format": "gptq_v2", "format": "gptq"}, "format is 'gptq'.*same as checkpoint_format .gptq_v2"),
    ({"is_marlin_format": True}, "is_marlin_format is True"),
    ({"pack_dtype": "int16"}, "pack_dtype is 'int16'"),
    ({"rotation": "hadamard"}, "rotation is 'hadamard'"),
    ({"dynamic": {"(": {}}}, r"dynamic: \( is \{\}, but it must be made of .*regular expressions"),
    ({"dynamic": {"+:a{99999999999999999999}": {}}}, "regular expressions"),
    ({"dynamic": {".*": {"format": "marlin"}}}, "format is 'marlin'"),
    ({"colour": "blue"}, "quantization_config: colour is 'blue', but this setting is not known here"),
    ({"quant_method": "hqq"}, "quant_method is 'hqq'.*\"gptq\""),
])  # fmt: skip
def test_settings_are_refused_by_name(values: dict[str, Any], named: str, small: Pair, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=named):
        load_model(altered(small.quantized, tmp_path / "altered", values, {}))


@pytest.mark.parametrize(("name", "change", "named"), [
    ("qzeros", None, r"1 missing: .*q_proj\.qzeros"),
    ("qweight", None, r"1 missing: .*q_proj\.qweight"),
    ("g_idx", torch.zeros(64, dtype=torch.int32), "g_idx must name each of 2 groups 32 times"),
    ("g_idx", torch.full((64,), -1, dtype=torch.int32), "g_idx must name"),
    ("g_idx", torch.full((64,), 2**31 - 1, dtype=torch.int32), "g_idx must name"),
    ("qweight", torch.zeros(8, 64), r"1 of the wrong type: .*q_proj\.qweight is F32, expected I32"),
    ("qweight", torch.zeros(0, 64, dtype=torch.int32), r"q_proj\.qweight is \[0, 64\], expected \[8, 64\]"),
    ("scales", torch.full((2, 64), float("nan")).half(), "q_proj: its scales are not all finite"),
    ("perm", torch.zeros(64), r"1 unexpected: .*q_proj\.perm"),
])  # fmt: skip
def test_damaged_tensors_are_named(
    name: str, change: torch.Tensor | None, named: str, small: Pair, tmp_path: Path
) -> None:
    changes = {f"model.layers.1.self_attn.q_proj.{name}": change}
    with pytest.raises(CheckpointError, match=named):
        load_model(altered(small.quantized, tmp_path / "altered", {}, changes))


def test_an_order_that_is_demanded_must_be_there(tmp_path: Path) -> None:
    pair = pair_of(tmp_path, SETTINGS | {"desc_act": True}, with_groups=False)
    with pytest.raises(CheckpointError, match=r"14 missing: .*g_idx"):
        load_model(pair.quantized)


def test_scales_that_float16_cannot_hold_widen_the_matrix(tmp_path: Path) -> None:
    def convert(name: str, weight: torch.Tensor) -> Stored | None:
        if not name.endswith("o_proj"):
            return None
        stored = gptq(random_integers(*weight.shape, 4, 32), 4)
        tiny = stored.tensors["scales"].float() * 2.0**-20
        return Stored({**stored.tensors, "scales": tiny}, stored.wide * 2.0**-20)

    pair = make_pair(tmp_path, convert, SETTINGS)
    want = load_file(pair.plain / "model.safetensors")
    for name, weight in read_matrices(pair.quantized).items():
        assert isinstance(weight, torch.Tensor)
        assert torch.equal(weight, want[f"{name}.weight"])


@pytest.mark.skipif(ops.default_backends()[0].name == "torch", reason="the C++ kernels are not built")
def test_matrices_of_one_order_stay_packed_together(tmp_path: Path) -> None:
    shared = pair_of(tmp_path / "a", SETTINGS, order=lambda name, inputs: shuffled(inputs))
    own = pair_of(tmp_path / "b", SETTINGS, order=lambda name, inputs: shuffled(inputs, len(name)))
    together, apart = load_model(shared.quantized), load_model(own.quantized)
    assert together.weight_bytes < apart.weight_bytes
    assert "widened" not in together.spec.weights
    assert "; but widened to bfloat16: model.layers.0.mlp.gate_proj + up_proj, " in apart.spec.weights
