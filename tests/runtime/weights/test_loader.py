"""Loading: which files are read, which names and shapes are demanded, and what is said when they do not fit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import PagedSequences, make_checkpoint, random_tokens
from safetensors.torch import load_file, save_file
from torch import Tensor

from millrace.runtime.errors import CheckpointError, ConfigError
from millrace.runtime.models.base import Model
from millrace.runtime.models.declaration import Placement
from millrace.runtime.quant.rounding import Quantization
from millrace.runtime.weights.checkpoint import Checkpoint
from millrace.runtime.weights.loader import gpu_dtype, load_model

torch.set_num_threads(1)


def logits(model: Model) -> Tensor:
    return PagedSequences(model, 1, 48).step({0: random_tokens(40, seed=1)})[0]


def rewrite(folder: Path, change: dict[str, Tensor | None]) -> None:
    """Puts tensors into the single weights file, or takes those out that map to None."""
    tensors: dict[str, Tensor | None] = {**load_file(folder / "model.safetensors"), **change}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def set_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return make_checkpoint("llama", tmp_path / "llama")


def test_a_sharded_checkpoint_equals_a_whole_one(tmp_path: Path) -> None:
    whole = make_checkpoint("llama", tmp_path / "whole")
    sharded = make_checkpoint("llama", tmp_path / "sharded", max_shard_size="100KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 3
    assert torch.equal(logits(load_model(whole)), logits(load_model(sharded)))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = make_checkpoint("llama", tmp_path, max_shard_size="100KB")
    gone = sorted(folder.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=f"{gone.name} is missing"):
        load_model(folder)


def test_an_index_cannot_name_files_elsewhere(llama: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    load_model(llama)  # a single file goes before an index, which may be left from what it was made of
    (llama / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="outside its folder"):
        load_model(llama)


def test_missing_unexpected_and_misshapen_weights_are_all_listed(llama: Path) -> None:
    rewrite(
        llama,
        {
            "model.layers.1.mlp.up_proj.weight": None,
            "lm_head.weight": None,
            "model.layers.0.self_attn.q_proj.bias": torch.zeros(64),
            "model.norm.weight": torch.ones(63),
        },
    )
    with pytest.raises(CheckpointError) as caught:
        load_model(llama)
    message = str(caught.value)
    assert "2 missing: lm_head.weight, model.layers.1.mlp.up_proj.weight" in message
    assert "1 unexpected: model.layers.0.self_attn.q_proj.bias" in message
    assert "1 of the wrong shape: model.norm.weight is [63], expected [64]" in message


def test_a_long_list_is_cut_with_its_length(llama: Path) -> None:
    set_config(llama, num_hidden_layers=9)
    with pytest.raises(CheckpointError, match=r"54 missing: .* and 42 more"):
        load_model(llama)


def test_rotary_buffers_are_harmless(llama: Path) -> None:
    want = logits(load_model(llama))
    rewrite(llama, {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.zeros(8) for layer in range(3)})
    assert torch.equal(logits(load_model(llama)), want)


@pytest.mark.parametrize("bare", [False, True])
def test_gpt2_with_and_without_its_prefix_and_with_old_masks(bare: bool, tmp_path: Path) -> None:
    folder = make_checkpoint("gpt2", tmp_path)
    want = logits(load_model(folder))
    prefix = "" if bare else "transformer."
    stored = load_file(folder / "model.safetensors")
    renamed = {prefix + name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    for layer in range(3):
        renamed[f"{prefix}h.{layer}.attn.bias"] = torch.ones(1, 1, 256, 256).tril().bool()
        renamed[f"{prefix}h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    assert torch.equal(logits(load_model(folder)), want)


def test_a_tied_matrix_may_be_stored_twice_if_it_is_the_same(tmp_path: Path) -> None:
    folder = make_checkpoint("qwen2", tmp_path)
    want = logits(load_model(folder))
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(folder, {"lm_head.weight": table.clone()})
    assert torch.equal(logits(load_model(folder)), want)
    rewrite(folder, {"lm_head.weight": table + 1})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load_model(folder)
    set_config(folder, tie_word_embeddings=False)
    assert not torch.equal(logits(load_model(folder)), want)


def test_a_tied_matrix_is_held_once(tmp_path: Path) -> None:
    model = load_model(make_checkpoint("qwen2", tmp_path), dtype="float32")
    # Packing may pad the rows a little; a second table would add 11 %.
    assert 0.95 < model.weight_bytes / (4 * model.spec.num_parameters) < 1.05


def test_float16_gives_the_numbers_of_its_float32(tmp_path: Path) -> None:
    folder = make_checkpoint("llama", tmp_path, dtype=torch.float16)
    exact = load_file(folder / "model.safetensors")
    narrow = logits(load_model(folder))
    save_file({name: tensor.float() for name, tensor in exact.items()}, folder / "model.safetensors", {"format": "pt"})
    assert torch.equal(logits(load_model(folder)), narrow)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_16_bits_halve_the_matrices(name: str, tmp_path: Path) -> None:
    folder = make_checkpoint("llama", tmp_path, dtype=getattr(torch, name))
    wide, narrow = (load_model(folder, dtype=dtype) for dtype in ("float32", name))
    assert 0.5 <= narrow.weight_bytes / wide.weight_bytes < 0.52  # biases stay wide, and packing may add some
    assert load_model(folder).weight_bytes in (wide.weight_bytes, narrow.weight_bytes)
    # Both hold the same numbers; only the order of summation may differ.
    assert torch.allclose(logits(wide), logits(narrow), atol=1e-4)


def test_types_that_nothing_here_reads_are_refused(llama: Path) -> None:
    rewrite(llama, {"model.norm.weight": torch.ones(64, dtype=torch.int8)})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is stored as I8, but supported are F32, BF16, F16"):
        load_model(llama)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickle_is_never_read(llama: Path, name: str) -> None:
    (llama / "model.safetensors").rename(llama / name)
    with pytest.raises(CheckpointError, match=f"only as pickle .{name}.*save_pretrained"):
        load_model(llama)


def test_files_under_other_names_are_listed(llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"only weights\.safetensors"):
        load_model(llama)


def test_an_empty_folder_and_an_adapter_say_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_model(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds an adapter"):
        load_model(tmp_path)


def test_damaged_files_are_refused(llama: Path) -> None:
    weights = llama / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors .* not a whole safetensors file"):
        load_model(llama)
    weights.write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_model(llama)
    (llama / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON"):
        load_model(llama)
    (llama / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="must hold an object"):
        load_model(llama)


def test_generation_config_names_the_ids_that_end_a_text(llama: Path) -> None:
    (llama / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5], "bos_token_id": None}))
    spec = load_model(llama).spec
    assert (spec.eos_token_ids, spec.bos_token_id) == ((2, 5), 1)


def test_max_model_len_is_bounded_by_the_checkpoint(llama: Path) -> None:
    assert load_model(llama).spec.max_model_len == 256
    short = load_model(llama, max_model_len=64)
    assert short.spec.max_model_len == 64
    assert torch.equal(logits(short), logits(load_model(llama)))
    for wanted in (0, 257):
        with pytest.raises(ConfigError, match=f"max_model_len is {wanted}.*between 1 and 256"):
            load_model(llama, max_model_len=wanted)


def test_other_options_are_checked(llama: Path) -> None:
    with pytest.raises(ConfigError, match="dtype is float64"):
        load_model(llama, dtype="float64")
    with pytest.raises(ConfigError, match="with a placement it must be auto"):
        load_model(llama, dtype="float32", placement=Placement())
    with pytest.raises(ConfigError, match=r"model\.dtype is float32, but on a GPU"):
        gpu_dtype(llama, "float32")
    assert gpu_dtype(llama, "auto") is torch.bfloat16
    assert gpu_dtype(llama, "float16") is torch.float16


def test_progress_counts_every_module(llama: Path) -> None:
    seen: list[tuple[int, int]] = []
    load_model(llama, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 5) for done in range(1, 6)]


def test_the_model_does_not_lean_on_the_file(llama: Path) -> None:
    """The map is private to the load: weights survive a file that is overwritten in place."""
    model = load_model(llama, dtype="float32")
    want = logits(model)
    with (llama / "model.safetensors").open("r+b") as file:
        file.write(b"\0" * (llama / "model.safetensors").stat().st_size)
    assert torch.equal(logits(model), want)


def test_release_unmaps_the_files(llama: Path) -> None:
    def mapped() -> bool:
        return str(llama / "model.safetensors") in Path("/proc/self/maps").read_text()

    if not Path("/proc/self/maps").exists():
        pytest.skip("this system does not list its memory maps")
    checkpoint = Checkpoint(llama)
    tensor = checkpoint.read("model.norm.weight")
    assert tensor.shape == (64,)
    del tensor
    assert mapped()
    checkpoint.release()
    assert not mapped()


@pytest.mark.parametrize(
    ("stored", "dtype", "method", "expected"),
    [
        (torch.float32, "auto", None, torch.float32),
        (torch.float32, "bfloat16", None, torch.bfloat16),
        (torch.float32, "auto", "int8", torch.bfloat16),
        (torch.bfloat16, "auto", None, torch.bfloat16),
        (torch.bfloat16, "float32", None, torch.float32),
    ],
)
def test_keys_and_values_go_with_the_weights(
    stored: torch.dtype, dtype: str, method: Any, expected: torch.dtype, tmp_path: Path
) -> None:
    folder = make_checkpoint("llama", tmp_path, dtype=stored)
    rounded = None if method is None else Quantization(method=method)
    assert load_model(folder, dtype=dtype, quantize=rounded, kv=None).kv_dtype == expected
    assert load_model(folder, dtype=dtype, quantize=rounded).kv_dtype == torch.float32
