"""The keys of a GGUF file's architecture as a config.json, which `declare` reads.

Sources: `gguf-py/gguf/constants.py` and `src/llama-model.cpp` of llama.cpp.
"""

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np

from millrace.runtime.errors import CheckpointError
from millrace.runtime.models.config import ConfigReader
from millrace.runtime.weights.gguf_file import Gguf

# Keys behind the architecture's name. Those that are not here are refused: they may change the arithmetic.
_READ = frozenset((
    "context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_epsilon",
    "attention.layer_norm_rms_epsilon", "attention.sliding_window", "rope.dimension_count", "rope.freq_base",
    "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
    "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
))  # fmt: skip
_WITHOUT_EFFECT = frozenset(("vocab_size", "rope.scaling.finetuned"))  # the table has the size
_NEUTRAL: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "attention.causal": (True,),
        "attention.clamp_kqv": (0.0,),
        "attention.max_alibi_bias": (0.0,),
        "attn_logit_softcapping": (0.0,),
        "expert_count": (0,),
        "expert_used_count": (0,),
        "final_logit_softcapping": (0.0,),
        "logit_scale": (0.0, 1.0),
        "pooling_type": (0,),
        "rope.scaling.attn_factor": (1.0,),
        "rope.scaling.yarn_attn_factor": (1.0,),
        "rope.scaling.yarn_ext_factor": (-1.0, 1.0),
        "rope.scaling.yarn_log_multiplier": (0.0,),
        "tensor_data_layout": ("Meta AI original pth",),
        "use_parallel_residual": (False,),
    }
)
_LAYER = re.compile(r"blk\.(\d+)\..*", re.DOTALL)


def architecture(file: Gguf) -> str:
    """Raises CheckpointError for one that is not supported."""
    return ConfigReader(file.metadata, str(file.path)).one_of("general.architecture", tuple(_CONFIGS))


def model_config(file: Gguf) -> dict[str, Any]:
    """What config.json would hold, without scalings that stand in tensors and without ids of tokens.

    Raises CheckpointError for an architecture or a key that is not supported, or is damaged.
    """
    arch = architecture(file)
    return _CONFIGS[arch](_Keys(arch, file))


class _Keys:
    """The keys of one architecture, read under their names without it."""

    def __init__(self, arch: str, file: Gguf) -> None:
        self.tensors = file.tensors
        self._arch = arch
        where = str(file.path)
        values = {key: _uniform(value) for key, value in file.metadata.items() if key.startswith(f"{arch}.")}
        self._reader = ConfigReader(values, where)
        for key, value in values.items():
            name = key.removeprefix(f"{arch}.")
            if name in _NEUTRAL:
                if value not in _NEUTRAL[name]:
                    self._reader.refuse(key, " or ".join(map(str, _NEUTRAL[name])))
            elif name not in _READ and name not in _WITHOUT_EFFECT:
                raise CheckpointError(
                    f"{where}: {key} is {value!r}, a key that is not known here for {arch}; it may change what the "
                    "model computes",
                    param=key,
                )

    def __contains__(self, name: str) -> bool:
        return f"{self._arch}.{name}" in self._reader

    def integer(self, name: str, default: int | None = None) -> int:
        return self._reader.integer(f"{self._arch}.{name}", default)

    def number(self, name: str, default: float | None = None) -> float:
        return self._reader.number(f"{self._arch}.{name}", default)

    def one_of(self, name: str, supported: tuple[str, ...], default: str) -> str:
        return self._reader.one_of(f"{self._arch}.{name}", supported, default)

    def require(self, name: str, value: int, why: str) -> None:
        """Refuses the key where it is there with another value."""
        if name in self and self.integer(name) != value:
            self.refuse(name, f"{value}, {why}")

    def refuse(self, name: str, supported: str) -> NoReturn:
        self._reader.refuse(f"{self._arch}.{name}", supported)

    def num_layers(self) -> int:
        """block_count, which as many layers must be there for: a damaged number must not ask for a billion."""
        count = self.integer("block_count")
        stored = {match[1] for name in self.tensors if (match := _LAYER.fullmatch(name))}
        if stored != {str(layer) for layer in range(min(count, len(stored) + 1))}:
            self.refuse("block_count", f"as many as the file has layers, {len(stored)}")
        return count

    def vocab_size(self) -> int:
        if "token_embd.weight" not in self.tensors:
            raise CheckpointError(f"{self._reader.where}: the tensor token_embd.weight is missing")
        return self.tensors["token_embd.weight"].shape[0]


def _uniform(value: Any) -> Any:
    """The value that all layers share, where a key has one for each."""
    if isinstance(value, np.ndarray):
        items = value.tolist()
        return items[0] if items and items.count(items[0]) == len(items) else items
    return value


def _rotary(keys: _Keys) -> dict[str, Any]:
    hidden, heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    if hidden % heads and "attention.key_length" not in keys:
        keys.refuse("attention.head_count", f"a divisor of embedding_length ({hidden}), or key_length must be given")
    head_dim = keys.integer("attention.key_length", hidden // heads)
    query = keys.tensors.get("blk.0.attn_q.weight")
    if query is not None and query.shape[0] % heads == 0:  # else the loader tells of the shape
        keys.require("attention.key_length", query.shape[0] // heads, "as blk.0.attn_q.weight has it for each head")
    keys.require("attention.value_length", head_dim, "as keys and values must be of one length")
    keys.require("rope.dimension_count", head_dim, "as whole heads must be rotated")
    return {
        "hidden_size": hidden,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": keys.num_layers(),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.number("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(keys),
        "vocab_size": keys.vocab_size(),
        "tie_word_embeddings": "output.weight" not in keys.tensors,
    }


def _rope_scaling(keys: _Keys) -> dict[str, Any] | None:
    # A factor without a type is linear, under its present name or its first one.
    factor_key = "rope.scaling.factor" if "rope.scaling.factor" in keys else "rope.scale_linear"
    kind = keys.one_of("rope.scaling.type", ("none", "linear", "yarn"), "linear" if factor_key in keys else "none")
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": keys.number(factor_key, 1.0)}
    return {
        "rope_type": "yarn",
        "factor": keys.number(factor_key),
        "original_max_position_embeddings": keys.integer(
            "rope.scaling.original_context_length", keys.integer("context_length")
        ),
        "beta_fast": keys.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": keys.number("rope.scaling.yarn_beta_slow", 1.0),
    }


def _llama(keys: _Keys) -> dict[str, Any]:
    config = _rotary(keys)
    config |= {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": "blk.0.attn_q.bias" in keys.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in keys.tensors,
    }
    if "attention.sliding_window" in keys:  # Llama has none; Mistral is Llama with one
        config |= {
            "architectures": ["MistralForCausalLM"],
            "sliding_window": keys.integer("attention.sliding_window"),
        }
    return config


def _qwen(keys: _Keys, architecture: str) -> dict[str, Any]:
    if "attention.sliding_window" in keys:
        keys.refuse("attention.sliding_window", "absent: which layers of a Qwen have the window is in no key")
    has_bias = "blk.0.attn_q.bias" in keys.tensors
    return _rotary(keys) | {"architectures": [architecture], "attention_bias": has_bias}


def _gpt2(keys: _Keys) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": keys.integer("embedding_length"),
        "n_head": keys.integer("attention.head_count"),
        "n_layer": keys.num_layers(),
        "n_positions": keys.integer("context_length"),
        "n_inner": keys.integer("feed_forward_length"),
        "layer_norm_epsilon": keys.number("attention.layer_norm_epsilon"),
        "vocab_size": keys.vocab_size(),
        "tie_word_embeddings": "output.weight" not in keys.tensors,
    }


_CONFIGS: Mapping[str, Callable[[_Keys], dict[str, Any]]] = MappingProxyType(
    {
        "llama": _llama,
        "qwen2": lambda keys: _qwen(keys, "Qwen2ForCausalLM"),
        "qwen3": lambda keys: _qwen(keys, "Qwen3ForCausalLM"),
        "gpt2": _gpt2,
    }
)
