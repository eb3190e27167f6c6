"""What all formats share: where settings are found, and that nothing in them ends in anything but a CheckpointError."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_checkpoints import Pair, Stored, awq, gptq, make_pair, random_integers

from millrace.runtime.errors import CheckpointError, ConfigError
from millrace.runtime.models.declaration import Placement
from millrace.runtime.quant.formats import FORMATS, read_format
from millrace.runtime.quant.formats.base import Matrix, StoredMatrix, is_listed
from millrace.runtime.quant.rounding import Quantization
from millrace.runtime.weights.checkpoint import StoredTensor
from millrace.runtime.weights.loader import gpu_dtype, load_model, random_model

torch.set_num_threads(1)

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}

KEYS = [
    "quant_method",
    "bits",
    "w_bit",
    "group_size",
    "q_group_size",
    "desc_act",
    "format",
    "checkpoint_format",
    "dynamic",
    "pack_dtype",
    "zero_point",
    "version",
    "backend",
    "modules_to_not_convert",
    "activation_scheme",
    "weight_block_size",
    "fmt",
    "scale_fmt",
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_quant_type",
    "bnb_4bit_quant_storage",
    "llm_int8_skip_modules",
    "ignore",
    "config_groups",
    "quantization_status",
    "sparsity_config",
    "transform_config",
    "weights",
    "targets",
    "input_activations",
    "group_0",
]
ARGUMENTS = ["num_bits", "type", "strategy", "group_size", "block_structure", "symmetric", "dynamic", "actorder"]
VALUES = (
    f"{' '.join(FORMATS)} gptq_v2 gemm pack-quantized int-quantized float-quantized naive-quantized mixed-precision "
    "compressed Linear lm_head re:.*proj re:( 128x128 tensor channel group block int float nf4 fp4 dynamic static"
).split()
SUFFIXES = [
    "weight",
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
    "weight_scale",
    "weight_scale_inv",
    "weight_packed",
    "weight_shape",
    "weight_zero_point",
    "weight_g_idx",
    "SCB",
    "weight.absmax",
    "weight_format",
    "weight.quant_state.bitsandbytes__nf4",
]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-2, 9)
    | st.sampled_from([0, 2, 3, 4, 8, 16, 32, 64, 128, 10**30])
    | st.floats()
    | st.sampled_from(VALUES)
    | st.text(max_size=4)
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=3), inner, max_size=6)
    ),
    max_leaves=20,
)
GROUP = st.fixed_dictionaries(
    {
        "targets": st.just(["Linear"]) | ANYTHING,
        "weights": st.dictionaries(
            st.sampled_from(ARGUMENTS),
            SCALARS | st.lists(SCALARS, max_size=3),
            max_size=6,
        ),
    }
)
SETTINGS = st.fixed_dictionaries(
    {"quant_method": st.sampled_from(sorted(FORMATS))},
    optional={
        **{key: SCALARS | st.lists(SCALARS, max_size=3) for key in KEYS[1:]},
        "config_groups": st.dictionaries(st.just("group_0"), GROUP) | ANYTHING,
        "dynamic": st.dictionaries(st.sampled_from(["-:a", "+:.*", "(", ".*"]), ANYTHING, max_size=2),
    },
)
SHAPES = st.lists(st.integers(0, 130), max_size=3).map(tuple)
HEADERS = st.dictionaries(
    st.sampled_from(SUFFIXES),
    st.tuples(SHAPES, st.sampled_from(["F16", "BF16", "F32", "I32", "I8", "U8", "F8_E4M3", "I64", "BOOL"])),
)


@settings(max_examples=150, deadline=None)
@given(ANYTHING | SETTINGS, HEADERS, st.integers(1, 130), st.integers(1, 130), st.binary(max_size=40))
def test_any_settings_and_any_headers_are_read_or_refused(
    found: Any, headers: dict[str, tuple[tuple[int, ...], str]], outputs: int, inputs: int, state: bytes
) -> None:
    def header(suffix: str) -> StoredTensor | None:
        return StoredTensor(Path("x"), *headers[suffix]) if suffix in headers else None

    with contextlib.suppress(CheckpointError):
        form = read_format({"quantization_config": found})
        assert form is None if found is None else form is not None
        if form is not None:
            stored = StoredMatrix(header, lambda suffix: torch.tensor(list(state), dtype=torch.uint8))
            layout = form.layout(Matrix("model.layers.0.mlp.up_proj", outputs, inputs), stored)
            if layout is not None:
                assert all(size >= 0 for part in layout.parts for size in part.shape)
                assert layout.describe()


def test_the_format_is_found_by_its_method() -> None:
    assert read_format({}) is None
    assert read_format({"quantization_config": None}) is None
    old = read_format({"quantization_config": {"load_in_8bit": True}})
    assert old is not None
    assert old.name == "bitsandbytes"
    with pytest.raises(CheckpointError, match=r'quant_method is missing, but it must be .*"gptq"'):
        read_format({"quantization_config": {"bits": 4}})
    with pytest.raises(CheckpointError, match="quantization_config is 'gptq', but it must be an object"):
        read_format({"quantization_config": "gptq"})


@pytest.mark.parametrize(("name", "listed", "is_there"), [
    ("lm_head", ["lm_head"], True),
    ("model.layers.1.mlp.gate_proj", ["mlp"], True),
    ("model.layers.1.mlp.gate_proj", ["mlp.gate"], False),
    ("model.layers.11.mlp.gate_proj", ["layers.1"], False),
    ("model.layers.1.mlp.gate_proj", ["gate_proj", "x"], True),
    ("model.layers.1.mlp.gate_proj", [], False),
])  # fmt: skip
def test_modules_are_listed_by_whole_parts_of_their_names(name: str, listed: list[str], is_there: bool) -> None:
    assert is_listed(name, listed) == is_there


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    def convert(name: str, weight: torch.Tensor) -> Stored | None:
        return None if name == "lm_head" else gptq(random_integers(*weight.shape, 4, 32), 4)

    return make_pair(tmp_path_factory.mktemp("gptq"), convert, GPTQ)


def test_a_quantised_checkpoint_is_not_rounded_again(pair: Pair) -> None:
    four = Quantization(method="int4", group_size=32)
    for options in ({"quantize": four}, {"placement": Placement(quantize=four)}):
        with pytest.raises(ConfigError, match=r"model\.quantize is int4, but .* is quantised already \(GPTQ\)"):
            load_model(pair.quantized, **options)  # type: ignore[arg-type]


def test_random_weights_are_not_quantised_by_config(pair: Pair) -> None:
    with pytest.raises(CheckpointError, match="random weights are not quantised"):
        random_model(json.loads((pair.quantized / "config.json").read_text()))


def test_a_plain_checkpoint_that_is_said_to_be_quantised(pair: Pair, tmp_path: Path) -> None:
    folder = make_checkpoint("llama", tmp_path / "plain")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": GPTQ}))
    with pytest.raises(CheckpointError, match=r"quantised \(GPTQ\), but all its matrices are stored plainly"):
        load_model(folder)


def test_a_quantised_checkpoint_that_does_not_say_so(pair: Pair, tmp_path: Path) -> None:
    config = json.loads((pair.quantized / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(pair.quantized / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"14 missing: .*; 56 unexpected: .*g_idx"):
        load_model(tmp_path)


def test_what_a_gpu_computes_in(pair: Pair, tmp_path: Path) -> None:
    assert gpu_dtype(pair.quantized, "auto") is torch.float16

    def convert(name: str, weight: torch.Tensor) -> Stored | None:
        return awq(random_integers(*weight.shape, 4, 32)) if "mlp" in name else None

    folder = make_pair(tmp_path, convert, {**GPTQ, "quant_method": "awq"}, dtype=torch.bfloat16).quantized
    assert gpu_dtype(folder, "auto") is torch.bfloat16  # scales are float16 in any case


def test_plain_checkpoints_tell_their_type(pair: Pair) -> None:
    assert load_model(pair.plain).spec.weights == "float32"
    rounded = load_model(pair.plain, quantize=Quantization(method="int8", group_size=32))
    assert rounded.spec.weights == "float32, rounded to 8 bits at load"
