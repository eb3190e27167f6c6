"""Random weights: the same in memory and on disk, and valid for transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import PagedSequences, load_reference, random_tokens, reference_logits

from millrace.runtime.errors import ConfigError
from millrace.runtime.models.registry import declare
from millrace.runtime.weights import synthetic
from millrace.runtime.weights.loader import load_model, random_model
from millrace.runtime.weights.synthetic import PRESETS, preset, write_random_checkpoint

torch.set_num_threads(1)

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 199,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOKENS = random_tokens(30, seed=1)


def small(name: str) -> dict[str, Any]:
    return preset(name) | SMALL


@pytest.mark.parametrize("name", PRESETS)
def test_memory_file_and_transformers_agree(name: str, tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, small(name), seed=3)
    loaded = PagedSequences(load_model(tmp_path), 1, 32).step({0: TOKENS})[0]
    made = PagedSequences(random_model(small(name), seed=3), 1, 32).step({0: TOKENS})[0]
    assert torch.equal(loaded, made)
    assert (loaded - reference_logits(load_reference(tmp_path), TOKENS)).abs().max() < 2e-4
    other = PagedSequences(random_model(small(name), seed=4), 1, 32).step({0: TOKENS})[0]
    assert not torch.equal(loaded, other)


def test_large_checkpoints_are_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_random_checkpoint(tmp_path / "whole", small("llama-3.2-1b"), dtype="bfloat16")
    monkeypatch.setattr(synthetic, "_SHARD_BYTES", 50_000)
    write_random_checkpoint(tmp_path / "sharded", small("llama-3.2-1b"), dtype="bfloat16")
    shards = list((tmp_path / "sharded").glob("model-*-of-*.safetensors"))
    assert len(shards) > 1
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    assert index["metadata"]["total_size"] == 2 * declare(small("llama-3.2-1b")).spec.num_parameters
    whole, sharded = (
        PagedSequences(load_model(tmp_path / folder), 1, 32).step({0: TOKENS})[0] for folder in ("whole", "sharded")
    )
    assert torch.equal(whole, sharded)


def test_presets_have_the_sizes_of_their_models() -> None:
    assert declare(preset("qwen2.5-0.5b")).spec.num_parameters == 494_032_768
    assert declare(preset("llama-3.2-1b")).spec.num_parameters == 1_235_814_400
    with pytest.raises(ConfigError, match=r"no preset nothing; there are .*qwen2\.5-0\.5b"):
        preset("nothing")


def test_bfloat16_storage_of_random_weights() -> None:
    wide, narrow = (random_model(small("qwen2.5-0.5b"), dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert narrow.weight_bytes < 0.52 * wide.weight_bytes
