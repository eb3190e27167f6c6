"""Random weights for tests and benchmarks: as a source for a model, or written as a checkpoint in Hugging Face layout.

    python -m millrace.runtime.weights.synthetic qwen2.5-0.5b FOLDER [--seed 0] [--dtype bfloat16]

What a tensor holds depends on the seed and its name alone, so both ways give the same model.
"""

import argparse
import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from millrace.kernels.ops import PackedLinear
from millrace.runtime.errors import ConfigError
from millrace.runtime.models.declaration import Placement, TensorDecl
from millrace.runtime.models.registry import declare

StoredDtype = Literal["float32", "bfloat16", "float16"]
_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
)
_STD = 0.02  # of the normal distribution that the architectures are initialised with
_SHARD_BYTES = 1 << 30

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "qwen2.5-0.5b": {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "vocab_size": 151936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "hidden_act": "silu",
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "torch_dtype": "bfloat16",
        },
        "llama-3.2-1b": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "hidden_act": "silu",
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            "tie_word_embeddings": True,
            "bos_token_id": 128000,
            "eos_token_id": [128001, 128008, 128009],
            "torch_dtype": "bfloat16",
        },
        "llama-3.1-8b": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "hidden_act": "silu",
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            "tie_word_embeddings": False,
            "bos_token_id": 128000,
            "eos_token_id": [128001, 128008, 128009],
            "torch_dtype": "bfloat16",
        },
        "llama-2-7b": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "hidden_act": "silu",
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "float16",
        },
        "tiny-6x256": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": 4096,
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "hidden_act": "silu",
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "torch_dtype": "float32",
        },
    }
)


class RandomWeights:
    """Tensors drawn on demand: implements millrace.runtime.models.declaration.WeightSource."""

    def __init__(
        self,
        tensors: Iterable[TensorDecl],
        seed: int,
        stored: torch.dtype,
        storage: torch.dtype = torch.float32,
        placement: Placement | None = None,
    ) -> None:
        """Values are rounded to `stored`, as in a checkpoint of that type; the model keeps matrices in `storage`.

        On a GPU they are drawn there, by its own generator: other values than on the CPU, in a hundredth of the time.
        """
        self.placement = placement or Placement()
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self._seed = seed
        self._stored = stored
        self._storage = storage

    def read(self, name: str) -> Tensor:
        decl = self._tensors[name]
        if decl.ones:
            return torch.ones(decl.shape, dtype=self._stored, device=self.placement.device)
        # torch's CPU generator takes in 32 bits of a seed only, so both go through one hash of that size.
        device = self.placement.device
        generator = torch.Generator(device).manual_seed(zlib.crc32(f"{self._seed} {name}".encode()))
        return torch.empty(decl.shape, device=device).normal_(0.0, _STD, generator=generator).to(self._stored)

    def note_packed(self, names: Sequence[str], linear: PackedLinear) -> None:
        """Nobody is told: there is one kind of weights."""

    def matrix(self, name: str) -> Tensor:
        return self.read(f"{name}.weight")

    def storage_dtype(self, stored: torch.dtype) -> torch.dtype:
        return self._storage

    def release(self) -> None:
        """Nothing is kept."""


def preset(name: str) -> dict[str, Any]:
    """A copy of the config.json of a named shape; raises ConfigError that lists the names."""
    if name not in PRESETS:
        raise ConfigError(f"there is no preset {name}; there are {', '.join(PRESETS)}")
    return dict(PRESETS[name])


def write_random_checkpoint(
    folder: Path, config: Mapping[str, Any] | str, seed: int = 0, dtype: StoredDtype = "float32"
) -> None:
    """Writes config.json and safetensors files (sharded above 1 GiB) with random weights into `folder`.

    `config` is a config.json or the name of a preset. Weights are normal with a standard deviation of 0.02, the
    scales of norms 1. No tokenizer is written. Raises CheckpointError for a config that is not supported.
    """
    values = dict(preset(config) if isinstance(config, str) else config)
    values.pop("dtype", None)
    values["torch_dtype"] = dtype  # both versions of transformers read this key
    decl = declare(values)
    tensors = list(decl.tensors())
    source = RandomWeights(tensors, seed, _DTYPES[dtype])
    item = _DTYPES[dtype].itemsize
    shards: list[list[TensorDecl]] = [[]]
    filled = total = 0
    for tensor in tensors:
        size = math.prod(tensor.shape) * item
        if shards[-1] and filled + size > _SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled, total = filled + size, total + size
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file({tensor.name: source.read(tensor.name) for tensor in shard}, folder / file, {"format": "pt"})
        weight_map.update((tensor.name, file) for tensor in shard)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(values, indent=2), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Writes a checkpoint with random weights at the shape of a real model."
    )
    parser.add_argument("preset", choices=sorted(PRESETS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=sorted(_DTYPES), default="bfloat16")
    options = parser.parse_args()
    write_random_checkpoint(options.folder, options.preset, options.seed, options.dtype)
    print(f"{options.folder}: {options.preset}, random weights of seed {options.seed}, {options.dtype}")


if __name__ == "__main__":
    main()
