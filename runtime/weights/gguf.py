"""A GGUF file as a checkpoint: its keys as a config.json, its tensors under the names of Hugging Face checkpoints.

Sources: `gguf-py/gguf/constants.py` (keys and names), `convert_hf_to_gguf.py` (what a conversion changes) and
`src/llama-model.cpp` (what the keys mean) of llama.cpp.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from millrace.kernels.quantized import QuantizedWeight
from millrace.runtime.errors import CheckpointError
from millrace.runtime.models.config import ConfigReader
from millrace.runtime.quant.gguf_blocks import BLOCK_TYPES, in_one_form, read_blocks, widen_blocks
from millrace.runtime.text.gguf_tokenizer import special_ids
from millrace.runtime.weights.checkpoint import StoredTensor
from millrace.runtime.weights.gguf_file import FLOAT_TYPES, GgufMaps, GgufTensor, read_gguf

# Keys behind the architecture's name. Those that are not here are refused: they may change the arithmetic.
_READ = frozenset(
    [
        "context_length",
        "embedding_length",
        "block_count",
        "feed_forward_length",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_epsilon",
        "attention.layer_norm_rms_epsilon",
        "attention.sliding_window",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scale_linear",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
    ]
)
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
_FACTORS = "rope_freqs.weight"  # what Llama 3's scaling divides each frequency by
_ROTARY_FILE = re.compile(r"blk\.\d+\.attn_rot_embd\.weight")  # old files carry frequencies, which the keys give
_IN_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


class _Names(NamedTuple):
    """GGUF names -> Hugging Face names, without `.weight` and `.bias`."""

    outside: Mapping[str, str]
    layer: str
    in_layer: Mapping[str, str]
    joined: tuple[tuple[str, ...], ...] = ()  # matrices of a layer that the model makes one of
    turned: frozenset[str] = frozenset()  # stored [in, out] in Hugging Face checkpoints


_ROTARY_NAMES = _Names(
    outside={"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"},
    layer="model.layers",
    in_layer={
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    },
    joined=(("attn_q", "attn_k", "attn_v"), ("ffn_gate", "ffn_up")),
)
_GPT2_NAMES = _Names(
    outside={
        "token_embd": "transformer.wte",
        "position_embd": "transformer.wpe",
        "output_norm": "transformer.ln_f",
        "output": "lm_head",
    },
    layer="transformer.h",
    in_layer={
        "attn_norm": "ln_1",
        "attn_qkv": "attn.c_attn",
        "attn_output": "attn.c_proj",
        "ffn_norm": "ln_2",
        "ffn_up": "mlp.c_fc",
        "ffn_down": "mlp.c_proj",
    },
    turned=frozenset(("attn_qkv", "attn_output", "ffn_up", "ffn_down")),
)


class GgufCheckpoint:
    """The model in a GGUF file; opening it reads the header, of all files where it is split.

    Attributes:
        path: the file, the first one of a split model.
        metadata: the header's keys.
        tensors: under Hugging Face names, with the shapes that those have; others under their own.

    Raises CheckpointError for a damaged file and for types, architectures and keys that are not supported.
    """

    def __init__(self, path: Path) -> None:
        header = read_gguf(path)
        self.path = header.path
        self.metadata = header.metadata
        self._stored = header.tensors
        self._maps = GgufMaps()
        reader = ConfigReader(self.metadata, str(self.path))
        self._arch = reader.one_of("general.architecture", tuple(_ARCHITECTURES))
        self._names, configure = _ARCHITECTURES[self._arch]
        keys = _Keys(self._arch, self.metadata, str(self.path), self._stored)
        self._config = configure(keys) | self._special_tokens()
        self._own: dict[str, str] = {}  # Hugging Face names -> names in the file
        self.tensors: dict[str, StoredTensor] = {}
        for name, tensor in self._stored.items():
            if name == _FACTORS or _ROTARY_FILE.fullmatch(name):
                continue
            match = _IN_LAYER.fullmatch(name)
            shape = tensor.shape[::-1] if match and self._is_turned(match) else tensor.shape
            found = self._hub_name(name, match)
            self._own[found] = name
            self.tensors[found] = StoredTensor(tensor.file, shape, tensor.kind)

    def config(self) -> dict[str, Any]:
        """What config.json would hold."""
        config = dict(self._config)
        if _FACTORS in self._stored:
            # Only the file has them, so that they are read here rather than when it is opened.
            if config.get("rope_scaling") is not None:
                raise CheckpointError(f"{self.path}: {_FACTORS} and rope.scaling exclude each other")
            factors = self._floats(self._stored[_FACTORS], _FACTORS)
            config["rope_scaling"] = {"rope_type": "factors", "factors": factors.tolist()}
            self.release()
        return config

    def read(self, name: str) -> Tensor:
        """The tensor in a float type; where it is stored in one, it lies in the memory map and is valid until
        `release`."""
        own = self._own[name]
        tensor = self._stored[own]
        match = _IN_LAYER.fullmatch(own)
        if tensor.kind in FLOAT_TYPES:
            values = self._rows(own).view(FLOAT_TYPES[tensor.kind]).view(tensor.shape)
        else:
            try:
                values = widen_blocks(BLOCK_TYPES[tensor.kind], self._rows(own)).view(tensor.shape)
            except ValueError as error:
                raise self._damaged(own, error) from None
        return values.t() if match and self._is_turned(match) else values

    def matrix(self, name: str) -> Tensor | QuantizedWeight:
        """The matrix of that name, `.weight` included; a quantised one as integers, and always [out, in]."""
        own = self._own[name]
        if self._stored[own].kind in FLOAT_TYPES:
            return self.read(name)
        try:
            weight = read_blocks(BLOCK_TYPES[self._stored[own].kind], self._rows(own))
        except ValueError as error:
            raise self._damaged(own, error) from None
        if isinstance(weight, Tensor):
            match = _IN_LAYER.fullmatch(own)
            return weight.t() if match and self._is_turned(match) else weight
        kinds = [BLOCK_TYPES[kind] for kind in self._kinds_joined(own) if kind in BLOCK_TYPES]
        return in_one_form(weight, kinds)

    def release(self) -> None:
        self._maps.release()

    @property
    def is_quantized(self) -> bool:
        return any(tensor.kind in BLOCK_TYPES for tensor in self._stored.values())

    def describe(self) -> str:
        """How many tensors are of which type, and in which form they are computed with."""
        kinds = Counter(tensor.kind for tensor in self._stored.values())
        packed, plain = (
            [f"{count} tensors {kind}" for kind, count in kinds.most_common() if (kind in BLOCK_TYPES) is wanted]
            for wanted in (True, False)
        )
        said = [f"{', '.join(packed)}, packed"] if packed else []
        table = self._stored["token_embd.weight"].kind
        if "output.weight" in self._stored and table in BLOCK_TYPES:
            said.append("token_embd.weight widened to bfloat16")
        return f"GGUF: {'; '.join([*said, ', '.join(plain)] if plain else said)}"

    def _hub_name(self, name: str, match: re.Match[str] | None) -> str:
        if match is not None and match[2] in self._names.in_layer:
            return f"{self._names.layer}.{match[1]}.{self._names.in_layer[match[2]]}.{match[3]}"
        part, _, what = name.rpartition(".")
        return f"{self._names.outside[part]}.{what}" if part in self._names.outside else name

    def _is_turned(self, match: re.Match[str]) -> bool:
        return match[2] in self._names.turned and match[3] == "weight"

    def _special_tokens(self) -> dict[str, Any]:
        ids = special_ids(self.metadata, str(self.path))
        return {"bos_token_id": ids.named.get("bos_token"), "eos_token_id": list(ids.endings)}

    def _rows(self, own: str) -> Tensor:
        """The bytes of a tensor, row by row in the order of a Hugging Face checkpoint.

        The conversion of Llama turns the rows of each head of q and k from two halves into pairs, as ggml rotates.
        """
        rows = self._maps.rows(self._stored[own])
        match = _IN_LAYER.fullmatch(own)
        if self._arch != "llama" or match is None or match[2] not in ("attn_q", "attn_k"):
            return rows
        heads = self._config["num_attention_heads" if match[2] == "attn_q" else "num_key_value_heads"]
        count = self._stored[own].shape[-1 if match[3] == "bias" else 0]
        if count % (2 * heads):
            raise CheckpointError(f"{self.path}: {own} has {count} outputs, which {heads} heads of pairs do not make")
        order = torch.arange(count).view(heads, -1, 2).transpose(1, 2).flatten()
        if match[3] == "bias":
            return rows.view(count, -1).index_select(0, order).view(1, -1)
        return rows.index_select(0, order)

    def _damaged(self, own: str, error: ValueError) -> CheckpointError:
        return CheckpointError(f"{self._stored[own].file}: {own} is damaged: {error}")

    def _floats(self, tensor: GgufTensor, name: str) -> Tensor:
        if tensor.kind != "F32":
            raise CheckpointError(f"{self.path}: {name} is {tensor.kind}, but it must be F32")
        return self._maps.rows(tensor).view(torch.float32).flatten()

    def _kinds_joined(self, own: str) -> list[str]:
        """The types of `own` and of the matrices that the model joins it with."""
        match = _IN_LAYER.fullmatch(own)
        if match is not None:
            for parts in self._names.joined:
                if match[2] in parts:
                    names = (f"blk.{match[1]}.{part}.weight" for part in parts)
                    return [self._stored[name].kind for name in names if name in self._stored]
        return [self._stored[own].kind]


class _Keys:
    """The keys of one architecture, read under their names without it."""

    def __init__(self, arch: str, metadata: Mapping[str, Any], where: str, tensors: Mapping[str, GgufTensor]) -> None:
        self.tensors = tensors
        self._arch = arch
        values = {key: _uniform(value) for key, value in metadata.items() if key.startswith(f"{arch}.")}
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
        stored = {match[1] for name in self.tensors if (match := _IN_LAYER.fullmatch(name))}
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


_ARCHITECTURES: Mapping[str, tuple[_Names, Callable[[_Keys], dict[str, Any]]]] = MappingProxyType(
    {
        "llama": (_ROTARY_NAMES, _llama),
        "qwen2": (_ROTARY_NAMES, lambda keys: _qwen(keys, "Qwen2ForCausalLM")),
        "qwen3": (_ROTARY_NAMES, lambda keys: _qwen(keys, "Qwen3ForCausalLM")),
        "gpt2": (_GPT2_NAMES, _gpt2),
    }
)
