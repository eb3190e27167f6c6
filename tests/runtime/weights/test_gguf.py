"""GGUF files as checkpoints: the model that they hold, what is refused, and damaged files."""

import struct
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from checkpoints import KINDS, PagedSequences, make_checkpoint, random_tokens
from gguf_files import write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from millrace.kernels.quantized import QuantizedWeight
from millrace.kernels.torch_backend import TorchBackend
from millrace.runtime.errors import CheckpointError, ConfigError
from millrace.runtime.models.base import Model
from millrace.runtime.models.declaration import Placement
from millrace.runtime.models.registry import declare
from millrace.runtime.quant.gguf_blocks import BLOCK_TYPES
from millrace.runtime.quant.rounding import Quantization
from millrace.runtime.weights.gguf import GgufCheckpoint
from millrace.runtime.weights.gguf_file import read_gguf
from millrace.runtime.weights.loader import gpu_dtype, load_model

torch.set_num_threads(1)

WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}  # whole K-blocks


def logits(model: Model) -> Tensor:
    return PagedSequences(model, 1, 48).step({0: random_tokens(40, seed=1)})[0]


def far(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def assert_same_model(folder: Path) -> None:
    """packed.gguf gives the logits of exact.gguf: nearly in torch, and roughly in C++, which rounds activations to 8
    bits."""
    paths = folder / "packed.gguf", folder / "exact.gguf"
    plain = Placement(backends=(TorchBackend(),))
    assert far(*(logits(load_model(path, placement=plain)) for path in paths)) < 0.02
    assert far(*(logits(load_model(path)) for path in paths)) < 0.15


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        "llama", tmp_path_factory.mktemp("gguf") / "llama", num_hidden_layers=1, intermediate_size=96
    )


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("gguf") / "wide", **WIDE)


# Dynamic scaling changes nothing within the context and is in no key; Qwen's windows are refused, below.
@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"llama-rope-dynamic", "qwen2-windows"}))
def test_float32_files_hold_the_same_model(kind: str, tmp_path: Path) -> None:
    folder = make_checkpoint(kind, tmp_path / kind)
    write_gguf(folder, tmp_path / "model.gguf")
    want, got = load_model(folder), load_model(tmp_path / "model.gguf")
    assert msgspec.structs.replace(got.spec, weights=want.spec.weights) == want.spec
    assert got.spec.weights.startswith("GGUF: ")
    if kind == "llama-rope-llama3":  # frequencies divided by factors that were rounded to float32
        assert torch.allclose(logits(got), logits(want), atol=1e-4)
    else:
        assert torch.equal(logits(got), logits(want))


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_narrow_floats(kind: str, wide: Path, tmp_path: Path) -> None:
    held = write_gguf(wide, tmp_path / "narrow.gguf", lambda name: kind)
    write_gguf(wide, tmp_path / "wide.gguf", values=held)
    narrow, same = load_model(tmp_path / "narrow.gguf"), load_model(tmp_path / "wide.gguf")
    assert torch.allclose(logits(narrow), logits(same), atol=1e-3)
    assert gpu_dtype(tmp_path / "narrow.gguf", "auto") is {"F16": torch.float16, "BF16": torch.bfloat16}[kind]


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_quantised_files(kind: str, wide: Path, tmp_path: Path) -> None:
    """Every matrix is what the format says, rows of q and k in their places; and the model runs on the integers."""
    held = write_gguf(wide, tmp_path / "packed.gguf", lambda name: kind)
    write_gguf(wide, tmp_path / "exact.gguf", values=held)
    packed, exact = GgufCheckpoint(tmp_path / "packed.gguf"), GgufCheckpoint(tmp_path / "exact.gguf")
    for name, tensor in exact.tensors.items():
        if len(tensor.shape) == 2:
            weight = packed.matrix(name)
            assert isinstance(weight, QuantizedWeight)
            want = exact.read(name)
            assert torch.equal(packed.read(name), want)
            assert torch.allclose(weight.widen(), want, rtol=0, atol=float(want.abs().max()) * 2.0**-9)
    assert_same_model(tmp_path)


def test_gpt2_matrices_are_turned(tmp_path: Path) -> None:
    folder = make_checkpoint("gpt2", tmp_path / "gpt2")
    held = write_gguf(
        folder, tmp_path / "packed.gguf", lambda name: "Q8_0" if name != "position_embd.weight" else "F32"
    )
    write_gguf(folder, tmp_path / "exact.gguf", values=held)
    assert_same_model(tmp_path)
    mixed = GgufCheckpoint(tmp_path / "packed.gguf")
    assert mixed.tensors["transformer.h.0.mlp.c_fc.weight"].shape == (64, 256)
    assert mixed.read("transformer.h.0.mlp.c_fc.weight").shape == (64, 256)


def test_mixed_types_stay_packed(wide: Path, tmp_path: Path) -> None:
    """As in Q4_K_M, where v and down have more bits than their neighbours."""

    def kind_of(name: str) -> str:
        return "Q6_K" if "attn_v" in name or "ffn_down" in name or name == "output.weight" else "Q4_K"

    held = write_gguf(wide, tmp_path / "packed.gguf", kind_of)
    write_gguf(wide, tmp_path / "exact.gguf", values=held)
    assert_same_model(tmp_path)
    mixed, exact = load_model(tmp_path / "packed.gguf"), load_model(tmp_path / "exact.gguf")
    table = 199 * 256 * 4  # looked up in, and kept in bfloat16 or float32
    assert mixed.weight_bytes - table < 0.35 * (exact.weight_bytes - table)
    assert GgufCheckpoint(tmp_path / "packed.gguf").describe("bfloat16") == (
        "GGUF: 11 tensors Q4_K, 5 tensors Q6_K, packed; token_embd.weight widened to bfloat16; 5 tensors F32"
    )


@pytest.mark.parametrize("kind", ["Q8_0", "F16"])
def test_vectors_of_any_type(kind: str, tmp_path: Path) -> None:
    """Norms and biases, of which those of q and k are turned as their rows are."""
    sizes = {"attention_bias": True, "mlp_bias": True, "num_hidden_layers": 1, "intermediate_size": 96}
    folder = make_checkpoint("llama", tmp_path / "llama", **sizes)
    held = write_gguf(folder, tmp_path / "narrow.gguf", vectors=kind)
    write_gguf(folder, tmp_path / "wide.gguf", values=held)
    narrow, wide = (logits(load_model(tmp_path / name, dtype="float32")) for name in ("narrow.gguf", "wide.gguf"))
    assert torch.equal(narrow, wide)
    assert far(narrow, logits(load_model(folder, dtype="float32"))) < 0.02


def test_what_no_kernel_reads_together_is_widened_and_said(wide: Path, tmp_path: Path) -> None:
    held = write_gguf(wide, tmp_path / "packed.gguf", lambda name: "F16" if name == "blk.1.attn_v.weight" else "Q8_0")
    write_gguf(wide, tmp_path / "exact.gguf", values=held)
    assert_same_model(tmp_path)
    for dtype in ("float32", "bfloat16"):
        assert load_model(tmp_path / "packed.gguf", dtype=dtype).spec.weights == (
            f"GGUF: 15 tensors Q8_0, packed; token_embd.weight widened to {dtype}; 5 tensors F32, 1 tensors F16; "
            f"but widened to {dtype}: model.layers.1.self_attn.q_proj + k_proj + v_proj"
        )


def test_tied_and_untied_outputs(llama: Path, tmp_path: Path) -> None:
    write_gguf(llama, tmp_path / "untied.gguf")
    write_gguf(llama, tmp_path / "tied.gguf", drop=["output.weight"])
    assert not GgufCheckpoint(tmp_path / "untied.gguf").config()["tie_word_embeddings"]
    tied = GgufCheckpoint(tmp_path / "tied.gguf")
    assert tied.config()["tie_word_embeddings"] and "lm_head.weight" not in tied.tensors
    assert logits(load_model(tmp_path / "tied.gguf")).shape == (40, 199)


@pytest.mark.parametrize("given", [1, 2])
def test_split_files(given: int, llama: Path, tmp_path: Path) -> None:
    write_gguf(llama, tmp_path / "model.gguf", split_max_tensors=7)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert [part.name for part in parts] == ["model-00001-of-00002.gguf", "model-00002-of-00002.gguf"]
    assert torch.equal(logits(load_model(parts[given - 1])), logits(load_model(llama)))
    parts[0].rename(tmp_path / "other.gguf")
    with pytest.raises(CheckpointError, match=r"is one of 2 files of a split model.*-00001-of-00002\.gguf"):
        read_gguf(tmp_path / "other.gguf")
    with pytest.raises(CheckpointError, match=r"one of 2 files; not beside it: model-00001-of-00002\.gguf"):
        read_gguf(parts[1])
    parts[1].rename(tmp_path / "model-00001-of-00002.gguf")
    (tmp_path / "other.gguf").rename(tmp_path / "model-00002-of-00002.gguf")
    with pytest.raises(CheckpointError, match=r"says that it is part 1 of 2, but by its name it is part 0 of 2"):
        read_gguf(parts[0])


def test_options_that_a_quantised_file_cannot_have(llama: Path, tmp_path: Path) -> None:
    write_gguf(llama, tmp_path / "packed.gguf", lambda name: "Q8_0")
    write_gguf(llama, tmp_path / "plain.gguf")
    rounding = Quantization(method="int8", group_size=32)
    with pytest.raises(ConfigError, match=r"quantised already \(GGUF\): leave the option out"):
        load_model(tmp_path / "packed.gguf", quantize=rounding)
    plain, rounded = (load_model(tmp_path / "plain.gguf", quantize=wanted) for wanted in (None, rounding))
    assert rounded.weight_bytes < plain.weight_bytes


# What is changed in the keys of a good file, and what is said of it.
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"general.architecture": "mamba"}, r'general\.architecture is \'mamba\', but it must be "llama" or "qwen2"'),
    ({"llama.block_count": 2}, r"llama\.block_count is 2, but it must be as many as the file has layers, 1"),
    ({"llama.block_count": 4_000_000_000}, r"as many as the file has layers, 1"),
    ({"llama.block_count": None}, r"llama\.block_count is missing"),
    ({"llama.attention.head_count": 0}, r"llama\.attention\.head_count is 0, but it must be a positive integer"),
    ({"llama.attention.head_count": "4"}, r"head_count is '4', but it must be a positive integer"),
    ({"llama.attention.head_count_kv": [2, 1]}, r"head_count_kv is \[2, 1\], but it must be a positive integer"),
    ({"llama.attention.head_count": 3, "llama.attention.key_length": None}, r"a divisor of embedding_length \(64\)"),
    ({"llama.attention.key_length": 10**9}, r"key_length is 1000000000, but it must be 16, as blk\.0\.attn_q\.weight"),
    ({"llama.attention.value_length": 8}, r"value_length is 8, but it must be 16, as keys and values"),
    ({"llama.rope.dimension_count": 8}, r"dimension_count is 8, but it must be 16, as whole heads must be rotated"),
    ({"llama.attention.layer_norm_rms_epsilon": None}, r"layer_norm_rms_epsilon is missing"),
    ({"llama.attention.layer_norm_rms_epsilon": 0.0}, r"must be a positive number"),
    ({"llama.rope.scaling.type": "longrope"}, r'type is \'longrope\', but it must be "none" or "linear"'),
    ({"llama.rope.scaling.attn_factor": 0.5}, r"rope\.scaling\.attn_factor is 0\.5, but it must be 1\.0"),
    ({"llama.expert_count": 8}, r"llama\.expert_count is 8, but it must be 0"),
    ({"llama.attention.clamp_kqv": 8.0}, r"clamp_kqv is 8\.0, but it must be 0\.0"),
    ({"llama.attention.scale": 0.3}, r"llama\.attention\.scale is 0\.3.*, a key that is not known here for llama"),
    ({"llama.context_length": None}, r"context_length is missing"),
    ({"tokenizer.ggml.eos_token_id": 199}, r"eos_token_id is 199, but it must be the id of one of 199 tokens"),
    ({"tokenizer.ggml.tokens": None}, r"tokenizer\.ggml\.tokens must be a list of strings"),
    ({"general.alignment": 4}, r"general\.alignment is 4, but it must be a multiple of 8"),
    ({"split.count": "2"}, r"split\.count is '2', but it must be an integer"),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "said"), REFUSED)
def test_keys_that_are_refused(keys: dict[str, Any], said: str, llama: Path, tmp_path: Path) -> None:
    write_gguf(llama, tmp_path / "model.gguf", keys=keys)
    with pytest.raises(CheckpointError, match=said) as caught:
        load_model(tmp_path / "model.gguf")
    assert str(tmp_path) in str(caught.value)


def test_one_value_for_each_layer_is_fine_where_all_are_equal(llama: Path, tmp_path: Path) -> None:
    write_gguf(llama, tmp_path / "model.gguf", keys={"llama.attention.head_count_kv": [2, 2]})
    assert GgufCheckpoint(tmp_path / "model.gguf").config()["num_key_value_heads"] == 2


def test_scalings_without_a_type_are_linear(llama: Path, tmp_path: Path) -> None:
    for key in ("llama.rope.scale_linear", "llama.rope.scaling.factor"):
        write_gguf(llama, tmp_path / "model.gguf", keys={key: 4.0})
        assert GgufCheckpoint(tmp_path / "model.gguf").config()["rope_scaling"] == {
            "rope_type": "linear",
            "factor": 4.0,
        }


def test_frequency_factors(llama: Path, tmp_path: Path) -> None:
    path, factors = tmp_path / "model.gguf", {"rope_freqs.weight": np.ones(8, np.float32)}
    write_gguf(llama, path, values=factors)
    assert torch.equal(logits(load_model(path)), logits(load_model(llama)))
    write_gguf(llama, path, values=factors, keys={"llama.rope.scaling.factor": 4.0})
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight and rope\.scaling exclude each other"):
        load_model(path)
    for wrong in (np.ones(7, np.float32), np.zeros(8, np.float32), np.full(8, np.nan, np.float32)):
        write_gguf(llama, path, values={"rope_freqs.weight": wrong})
        with pytest.raises(CheckpointError, match="8 positive numbers, one for each frequency"):
            load_model(path)


def test_windows_of_qwen_are_refused(tmp_path: Path) -> None:
    folder = make_checkpoint("qwen2", tmp_path / "qwen2")
    write_gguf(folder, tmp_path / "model.gguf", keys={"qwen2.attention.sliding_window": 20})
    with pytest.raises(CheckpointError, match=r"sliding_window is 20, but it must be absent: which layers"):
        load_model(tmp_path / "model.gguf")


def test_tensors_that_do_not_fit_are_listed(llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(llama, path, values={"blk.0.ssm_a": np.ones(3, np.float32)}, drop=["blk.0.attn_k.weight"])
    with pytest.raises(CheckpointError, match=r"1 missing: model\.layers\.0\.self_attn\.k_proj\.weight; 1 unexpected: "
                                              r"blk\.0\.ssm_a"):  # fmt: skip
        load_model(path)
    write_gguf(llama, path, values={"blk.0.attn_q.weight": np.ones((64, 60), np.float32)})
    with pytest.raises(CheckpointError, match=r"1 of the wrong shape: model\.layers\.0\.self_attn\.q_proj\.weight"):
        load_model(path)
    write_gguf(llama, path, drop=["token_embd.weight"])
    with pytest.raises(CheckpointError, match=r"token_embd\.weight is missing"):
        load_model(path)


def replaced(data: bytes, old: bytes, new: bytes) -> bytes:
    assert old in data and len(old) == len(new)
    return data.replace(old, new, 1)


def tensor_info(name: str, shape: tuple[int, ...], kind: int) -> bytes:
    text = name.encode()
    dims = b"".join(struct.pack("<Q", size) for size in shape)
    return struct.pack("<Q", len(text)) + text + struct.pack("<I", len(shape)) + dims + struct.pack("<I", kind)


def test_damaged_headers(llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(llama, path)
    whole = path.read_bytes()
    norm = tensor_info("output_norm.weight", (64,), 0)
    cases = [
        (b"GGUF", "too short"),
        (b"GGML" + whole[4:], "begins with b'GGML'"),
        (b"GGUF" + struct.pack(">I", 3) + whole[8:], "is big-endian"),
        (b"GGUF" + struct.pack("<I", 1) + whole[8:], "is GGUF version 1, but supported are versions 2 and 3"),
        (whole[:200], "not a whole GGUF file"),
        (whole[:-64], "cut short or damaged"),
        (replaced(whole, norm, tensor_info("output_norm.weight", (64,), 19)), "of type IQ1_S, but supported are F32"),
        (replaced(whole, norm, tensor_info("output_norm.weight", (64,), 99)), "is of type number 99"),
        (replaced(whole, norm, tensor_info("output_norm.weight", (64,), 12)), "rows of 64, but Q4_K has blocks of 256"),
        (replaced(whole, norm, tensor_info("output_norm.weight", (0,), 0)), r"is empty: its dimensions are \[0\]"),
        (replaced(whole, b"output_norm.weight", b"token_embd.weight\0"), "cut short|damaged|unexpected|missing"),
        (replaced(whole, b"llama.vocab_size", b"llama.block_coun"), r"llama\.block_coun is"),
        (replaced(whole, b"llama.vocab_size", b"\xff" * 16), "a key is not UTF-8"),
        (replaced(whole, b"blk.0.ffn_up.weight", b"blk.0.attn_k.weight"), r"attn_k\.weight stands twice"),
    ]  # fmt: skip
    for data, said in cases:
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=said):
            load_model(path)


@pytest.fixture(scope="module")
def packed(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "whole.gguf"
    write_gguf(llama, path, lambda name: "Q8_0")
    return path


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_damage_is_a_checkpoint_error(packed: Path, data: st.DataObject) -> None:
    """Bytes of the header are overwritten, or the file is cut: it opens, or the error is ours."""
    header = min(tensor.start for tensor in read_gguf(packed).tensors.values())
    changed = bytearray(packed.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, header - 1))
        new = data.draw(st.one_of(st.binary(min_size=1, max_size=9), st.sampled_from([b"\xff" * 8, b"\0" * 8])))
        changed[at : at + len(new)] = new
    path = packed.with_name("damaged.gguf")
    path.write_bytes(changed[: data.draw(st.integers(0, len(changed)) | st.just(len(changed)))])
    try:
        opened = GgufCheckpoint(path)
        declare(opened.config())
        for name in opened.tensors:
            opened.read(name)
    except CheckpointError:
        return
    assert opened.tensors


def test_damaged_scales_name_the_tensor(llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(llama, path, lambda name: "Q8_0")
    place = read_gguf(path).tensors["blk.0.ffn_up.weight"]
    with path.open("r+b") as file:
        file.seek(place.start)
        file.write(np.array([np.inf], np.float16).tobytes())
    with pytest.raises(
        CheckpointError, match=r"blk\.0\.ffn_up\.weight is damaged: it holds a scale that is not finite"
    ):
        load_model(path)


def test_the_model_does_not_lean_on_the_file(llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(llama, path)
    model = load_model(path, dtype="float32")
    want = logits(model)
    if Path("/proc/self/maps").exists():
        assert str(path) not in Path("/proc/self/maps").read_text()
    with path.open("r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    assert torch.equal(logits(model), want)


def test_a_vocabulary_alone_is_no_model(llama: Path, tmp_path: Path) -> None:
    names = write_gguf(llama, tmp_path / "whole.gguf")
    write_gguf(llama, tmp_path / "vocab.gguf", drop=list(names))
    with pytest.raises(CheckpointError, match="block_count is 1, but it must be as many as the file has layers, 0"):
        load_model(tmp_path / "vocab.gguf")
