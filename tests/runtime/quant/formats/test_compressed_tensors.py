"""Checkpoints that the compressed-tensors library packs: weights equal to what it unpacks, and what is refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from quantized_checkpoints import (
    Pair,
    Stored,
    altered,
    gptq,
    int32,
    load_on_torch,
    logits,
    make_pair,
    pack_bits,
    random_integers,
    read_matrices,
    relative,
    wanted_logits,
    widened,
)
from safetensors.torch import load_file

from millrace.kernels.quantized import Float8Weight, QuantizedWeight
from millrace.runtime.errors import CheckpointError
from millrace.runtime.weights.loader import load_model

torch.set_num_threads(1)

DYNAMIC_TOKENS = QuantizationArgs(num_bits=8, strategy="token", dynamic=True)
DYNAMIC_FP8 = QuantizationArgs(num_bits=8, type="float", strategy="token", dynamic=True)
STATIC_FP8 = QuantizationArgs(num_bits=8, type="float", strategy="tensor")


def grid(weight: torch.Tensor, args: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and largest weight of each part that shares a scale, in the shape of the library's scales."""
    outputs, inputs = weight.shape
    rows, columns = {
        "tensor": (outputs, inputs),
        "channel": (1, inputs),
        "group": (1, args.group_size),
        "block": tuple(args.block_structure or ()),
    }[args.strategy]
    tall, broad = -(-outputs // rows), -(-inputs // columns)
    padded = torch.zeros(tall * rows, broad * columns)
    padded[:outputs, :inputs] = weight
    parts = padded.view(tall, rows, broad, columns)
    low, high = parts.amin((1, 3)).clamp(max=0), parts.amax((1, 3)).clamp(min=0)
    return (low[0], high[0]) if args.strategy == "tensor" else (low, high)


def compress(
    weight: torch.Tensor, scheme: QuantizationScheme, form: str, scale_type: torch.dtype = torch.float16
) -> Stored:
    """What the library stores for a weight, and what it reads back."""
    args = scheme.weights
    assert args is not None
    low, high = grid(weight, args)
    levels = 448.0 if args.type == "float" else float((1 << (args.num_bits - 1)) - 1)
    state = {"weight": weight}
    if args.symmetric:
        scale = torch.maximum(-low, high) / levels
    else:
        scale = (high - low) / (2 * levels + 1)
        middle = (-low / scale).round() - (1 << (args.num_bits - 1))
        state["weight_zero_point"] = middle.clamp(-levels - 1, levels).to(torch.int8)
    state["weight_scale"] = scale.to(scale_type)
    library = BaseCompressor.get_value_from_registry(form)
    packed = library.compress(state, scheme)
    wide = library.decompress({**packed, "weight_scale": packed["weight_scale"].float()}, scheme)["weight"]
    if scheme.input_activations is not None and not scheme.input_activations.dynamic:
        packed["input_scale"] = torch.ones(1)
    return Stored(packed, wide)


def settings(form: str, *schemes: QuantizationScheme) -> dict[str, Any]:
    """As the library writes them into config.json."""
    config = QuantizationConfig(
        config_groups={f"group_{index}": scheme for index, scheme in enumerate(schemes)},
        format=form,
        ignore=["lm_head"],
        quantization_status="compressed",
    )
    return {**config.model_dump(mode="json"), "sparsity_config": {}, "transform_config": {}, "version": "0.20.0"}


def scheme_of(targets: list[str] | None = None, inputs: QuantizationArgs | None = None, **weights: Any) -> Any:
    return QuantizationScheme(
        targets=targets or ["Linear"], weights=QuantizationArgs(**weights), input_activations=inputs
    )


def pair_of(folder: Path, scheme: QuantizationScheme, form: str, **options: Any) -> Pair:
    kept = options.pop("scale_type", torch.float16)
    return make_pair(
        folder,
        lambda name, weight: None if name == "lm_head" else compress(weight, scheme, form, kept),
        settings(form, scheme),
        **options,
    )


INTEGERS = {
    "w4-group": ("pack-quantized", scheme_of(num_bits=4, strategy="group", group_size=32)),
    "w4-group-zeros": ("pack-quantized", scheme_of(num_bits=4, strategy="group", group_size=32, symmetric=False)),
    "w4-channel-zeros": ("pack-quantized", scheme_of(num_bits=4, strategy="channel", symmetric=False)),
    "w4-tensor": ("pack-quantized", scheme_of(num_bits=4, strategy="tensor")),
    "w8-group": ("pack-quantized", scheme_of(num_bits=8, strategy="group", group_size=64)),
    "w8-channel-zeros": ("pack-quantized", scheme_of(num_bits=8, strategy="channel", symmetric=False)),
    "w3-group-zeros": ("pack-quantized", scheme_of(num_bits=3, strategy="group", group_size=32, symmetric=False)),
    "w6-channel": ("pack-quantized", scheme_of(num_bits=6, strategy="channel")),
    "w8a8-channel": ("int-quantized", scheme_of(inputs=DYNAMIC_TOKENS, num_bits=8, strategy="channel")),
    "w8a8-tensor": ("int-quantized", scheme_of(inputs=DYNAMIC_TOKENS, num_bits=8, strategy="tensor")),
    "w8a8-zeros": ("int-quantized", scheme_of(inputs=DYNAMIC_TOKENS, num_bits=8, strategy="channel", symmetric=False)),
    "w8-block": ("naive-quantized", scheme_of(num_bits=8, strategy="block", block_structure=[48, 32])),
    "w4-in-bytes": ("naive-quantized", scheme_of(num_bits=4, strategy="group", group_size=32)),
}
FLOATS = {
    "tensor-static": scheme_of(inputs=STATIC_FP8, num_bits=8, type="float", strategy="tensor"),
    "tensor": scheme_of(inputs=DYNAMIC_FP8, num_bits=8, type="float", strategy="tensor"),
    "channel": scheme_of(inputs=DYNAMIC_FP8, num_bits=8, type="float", strategy="channel"),
    "weights alone": scheme_of(num_bits=8, type="float", strategy="channel"),
    "block": scheme_of(inputs=DYNAMIC_FP8, num_bits=8, type="float", strategy="block", block_structure=[48, 32]),
}


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_are_those_that_the_library_reads(name: str, tmp_path: Path) -> None:
    form, scheme = INTEGERS[name]
    pair = pair_of(tmp_path, scheme, form)
    want = load_file(pair.plain / "model.safetensors")
    matrices = read_matrices(pair.quantized)
    assert len(matrices) == 14
    for matrix, weight in matrices.items():
        assert isinstance(weight, QuantizedWeight), matrix
        assert weight.is_w8a8 is name.startswith("w8a8")
        assert torch.equal(weight.widen(), want[f"{matrix}.weight"]), matrix
    logits_ = wanted_logits(pair)
    assert (logits(load_on_torch(pair.quantized)) - logits_).abs().max() < 2e-4
    assert relative(logits(load_model(pair.quantized)), logits_) < 0.03


def with_gaps(values: torch.Tensor, bits: int) -> torch.Tensor:
    """[rows, count] of signed integers -> words of 32 // bits of them, each row by itself."""
    per_word, middle = 32 // bits, 1 << (bits - 1)
    rows = [[value + middle for value in row] for row in values.tolist()]
    starts = range(0, values.shape[1], per_word)
    return int32([[pack_bits(row[start : start + per_word], bits)[0] for start in starts] for row in rows])


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_integers_of_old_releases_do_not_cross_words(bits: int, tmp_path: Path) -> None:
    scheme = scheme_of(num_bits=bits, strategy="group", group_size=32, symmetric=False)

    def convert(name: str, weight: torch.Tensor) -> Stored | None:
        if name == "lm_head":
            return None
        stored = compress(weight, scheme, "pack-quantized")
        packed, zeros = stored.tensors["weight_packed"], stored.tensors["weight_zero_point"]
        outputs, groups = weight.shape[0], zeros.shape[1]
        changed = {
            "weight_packed": with_gaps(unpack_from_int32(packed, bits, weight.shape), bits),
            "weight_zero_point": with_gaps(unpack_from_int32(zeros, bits, (outputs, groups), 0).t(), bits).t(),
        }
        assert changed["weight_packed"].shape[1] > packed.shape[1]
        return Stored({**stored.tensors, **changed}, stored.wide)

    pair = make_pair(tmp_path, convert, settings("pack-quantized", scheme))
    want = load_file(pair.plain / "model.safetensors")
    matrices = read_matrices(pair.quantized)
    assert len(matrices) == 14
    for matrix, weight in matrices.items():
        assert torch.equal(widened(weight), want[f"{matrix}.weight"]), matrix
    assert (logits(load_on_torch(pair.quantized)) - wanted_logits(pair)).abs().max() < 2e-4


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("scale_type", [torch.float32, torch.bfloat16])
def test_fp8_weights_are_those_that_the_library_reads(name: str, scale_type: torch.dtype, tmp_path: Path) -> None:
    pair = pair_of(tmp_path, FLOATS[name], "float-quantized", scale_type=scale_type, dtype=torch.bfloat16)
    want = load_file(pair.plain / "model.safetensors")
    for matrix, weight in read_matrices(pair.quantized).items():
        assert isinstance(weight, Float8Weight)
        assert weight.is_w8a8 is (name != "weights alone")
        assert torch.equal(weight.widen(), want[f"{matrix}.weight"]), matrix
    assert (logits(load_on_torch(pair.quantized)) - wanted_logits(pair)).abs().max() < 2e-4
    assert relative(logits(load_model(pair.quantized)), wanted_logits(pair)) < 0.01


def test_bfloat16_scales_are_kept_exactly(tmp_path: Path) -> None:
    scheme = scheme_of(num_bits=4, strategy="group", group_size=32)
    pair = pair_of(tmp_path, scheme, "pack-quantized", scale_type=torch.bfloat16, dtype=torch.bfloat16)
    want = load_file(pair.plain / "model.safetensors")
    for matrix, weight in read_matrices(pair.quantized).items():
        assert isinstance(weight, QuantizedWeight)
        assert torch.equal(weight.widen(), want[f"{matrix}.weight"]), matrix


def test_groups_targets_and_ignored_matrices(tmp_path: Path) -> None:
    """A name goes before a pattern, a pattern before a class, and what is ignored before all."""
    four = scheme_of(num_bits=4, strategy="group", group_size=32)
    eight = scheme_of(["re:.*down_proj$", "model.layers.0.self_attn.o_proj"], num_bits=8, strategy="channel")
    fp8 = scheme_of(["re:.*(gate|up)_proj"], DYNAMIC_FP8, num_bits=8, type="float", strategy="channel")
    for scheme, form in ((four, "pack-quantized"), (eight, "int-quantized"), (fp8, "float-quantized")):
        scheme.format = form

    def convert(name: str, weight: torch.Tensor) -> Stored | None:
        if name == "lm_head" or "layers.1.mlp" in name:
            return None
        if name.endswith("down_proj") or name == "model.layers.0.self_attn.o_proj":
            return compress(weight, eight, "int-quantized")
        if "gate" in name or "up_proj" in name:
            return compress(weight, fp8, "float-quantized")
        return compress(weight, four, "pack-quantized")

    chosen = settings("mixed-precision", four, eight, fp8)
    chosen["ignore"] += ["re:.*layers\\.1\\.mlp.*", "a.module.that.is.not.there"]
    pair = make_pair(tmp_path, convert, chosen)
    assert (logits(load_on_torch(pair.quantized)) - wanted_logits(pair)).abs().max() < 2e-4
    described = (
        "4 bits, groups of 32, packed",
        "8 bits, one scale for each output, packed",
        "E4M3, one scale for each output, packed",
    )
    model = load_model(pair.quantized, dtype="float32")
    assert model.spec.weights == f"compressed-tensors {'; '.join(described)}; others float16"


def test_zeros_of_early_releases_lie_one_in_a_byte_and_inputs_have_an_order(tmp_path: Path) -> None:
    form, scheme = INTEGERS["w4-group-zeros"]
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))

    def convert(name: str, weight: torch.Tensor) -> Stored | None:
        if name == "lm_head":
            return None
        stored = compress(weight, scheme, form)
        low, high = grid(weight, scheme.weights)
        scale = stored.tensors["weight_scale"]
        zeros = ((-low / ((high - low) / 15)).round() - 8).clamp(-8, 7).to(torch.int8)
        tensors = {**stored.tensors, "weight_zero_point": zeros}
        if weight.shape[1] != 64:
            return Stored(tensors, stored.wide)
        groups = torch.empty(64, dtype=torch.int32)
        groups[order] = (torch.arange(64) // 32).int()
        integers = random_integers(len(weight), 64, 4, 32, order=order)
        packed = gptq(integers, 4).tensors["qweight"].t().contiguous()
        signed = (integers.zeros - 8).to(torch.int8)
        tensors |= {"weight_packed": packed, "weight_zero_point": signed, "weight_g_idx": groups}
        return Stored({**tensors, "weight_scale": integers.scales.to(scale.dtype)}, integers.widen())

    pair = make_pair(tmp_path, convert, settings(form, scheme))
    want = load_file(pair.plain / "model.safetensors")
    matrices = read_matrices(pair.quantized)
    assert {weight.order is not None for weight in matrices.values() if isinstance(weight, QuantizedWeight)} == {
        True,
        False,
    }
    for matrix, weight in matrices.items():
        assert torch.equal(widened(weight), want[f"{matrix}.weight"]), matrix


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pair_of(tmp_path_factory.mktemp("packed"), INTEGERS["w4-group"][1], "pack-quantized")


@pytest.mark.parametrize(("path", "value", "named"), [
    (["format"], "nvfp4-pack-quantized", "format is 'nvfp4-pack-quantized'"),
    (["format"], "marlin-24", "format is 'marlin-24'"),
    (["format"], "int-quantized", r"14 missing: .*\.weight, .*28 unexpected: .*weight_packed"),
    (["quantization_status"], "initialized", "quantization_status is 'initialized'"),
    (["sparsity_config"], {"format": "sparse-24-bitmask"}, "sparsity_config is .*24"),
    (["transform_config"], {"config_groups": {"R1": {}}}, "transform_config is"),
    (["ignore"], "lm_head", "ignore is 'lm_head', but it must be a list of strings"),
    (["ignore"], ["re:("], r"ignore is .*regular expressions \(in '\('"),
    (["ignore"], [], r"3 missing: lm_head\.weight_packed, lm_head\.weight_scale, .*1 unexpected: lm_head\.weight"),
    (["ignore"], ["lm_head", "re:.*q_proj"], r"2 missing: .*q_proj\.weight, .*6 unexpected: .*q_proj\.weight_packed"),
    (["config_groups"], {}, "config_groups is {}"),
    (["config_groups"], {"W4A16": ["Linear"]}, r"config_groups: W4A16 is \['Linear'\]"),
    (["config_groups", "group_0", "targets"], ["Embedding"], r"targets is \['Embedding'\]"),
    (["config_groups", "group_0", "targets"], [], r"targets is \[\]"),
    (["config_groups", "group_0", "weights"], None, "group_0: weights is None"),
    (["config_groups", "group_0", "output_activations"], {"num_bits": 8}, "output_activations is"),
    (["config_groups", "group_0", "weights", "num_bits"], 9, "weights: num_bits is 9"),
    (["config_groups", "group_0", "weights", "type"], "float", "type is 'float'"),
    (["config_groups", "group_0", "weights", "strategy"], "tensor_group", "strategy is 'tensor_group'"),
    (["config_groups", "group_0", "weights", "strategy"], "channel", "group_size is 32, but it must be given for"),
    (["config_groups", "group_0", "weights", "group_size"], 48, "64 inputs cannot be cut into groups of 48"),
    (["config_groups", "group_0", "weights", "group_size"], 16, r"14 of the wrong shape: .*weight_scale is"),
    (["config_groups", "group_0", "weights", "dynamic"], True, "dynamic is True"),
    (["config_groups", "group_0", "weights", "symmetric"], False, r"14 missing: .*weight_zero_point"),
    (["config_groups", "group_0", "weights", "colour"], 1, "group_0: weights: colour is 1"),
    (["config_groups", "group_0", "colour"], 1, "group_0: colour is 1"),
    (["colour"], 1, "quantization_config: colour is 1"),
])  # fmt: skip
def test_settings_are_refused_by_name(path: list[str], value: Any, named: str, small: Pair, tmp_path: Path) -> None:
    changed = copy.deepcopy(settings("pack-quantized", INTEGERS["w4-group"][1]))
    place: Any = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(CheckpointError, match=named):
        load_model(altered(small.quantized, tmp_path / "altered", changed, {}))


@pytest.mark.parametrize(("suffix", "tensor", "named"), [
    ("weight_shape", torch.tensor([64, 63]), r"q_proj: weight_shape is \[64, 63\], but it must be \[64, 64\]"),
    ("weight_scale", torch.full((64, 2), float("inf")), "q_proj: its scales are not all finite"),
    ("weight_packed", torch.zeros(64, 8), "q_proj.weight_packed is F32, expected I32"),
    ("weight_g_idx", torch.zeros(64, dtype=torch.int32), "weight_g_idx must name each group 32 times"),
    ("weight_zero_point", torch.zeros(64, 3, dtype=torch.int8), r"weight_zero_point is \[64, 3\], expected \[64, 2\]"),
])  # fmt: skip
def test_damaged_tensors_are_named(suffix: str, tensor: torch.Tensor, named: str, small: Pair, tmp_path: Path) -> None:
    changes = {f"model.layers.0.self_attn.q_proj.{suffix}": tensor}
    with pytest.raises(CheckpointError, match=named):
        load_model(altered(small.quantized, tmp_path / "altered", {}, changes))


def test_integers_in_bytes_must_fit_their_bits(tmp_path: Path) -> None:
    form, scheme = INTEGERS["w4-in-bytes"]
    pair = pair_of(tmp_path, scheme, form)
    name = "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(CheckpointError, match="q_proj: weight must lie between -8 and 7"):
        load_model(altered(pair.quantized, tmp_path / "altered", {}, {name: torch.full((64, 64), 8).to(torch.int8)}))
