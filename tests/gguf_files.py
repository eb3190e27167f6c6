"""GGUF files made from Hugging Face checkpoints as llama.cpp's converter makes them, by the `gguf` package."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
import torch
from gguf.constants import GGMLQuantizationType, RopeScalingType, TokenType
from safetensors.torch import load_file
from torch import Tensor

from millrace.runtime.quant.gguf_blocks import BLOCK_TYPES

KindOf = Callable[[str], str]  # a tensor's name in the file -> the type of its values

# Where the float16 scale of a block lies, and where that of its minimum, with a factor that keeps the mean near 0.
_SCALES: dict[str, tuple[tuple[int, float], ...]] = {
    "Q4_1": ((0, 1.0), (2, -7.5)), "Q5_1": ((0, 1.0), (2, -15.5)), "Q2_K": ((80, 1.0), (82, 1.5)),
    "Q3_K": ((108, 1.0),), "Q4_K": ((0, 1.0), (2, 7.5)), "Q5_K": ((0, 1.0), (2, 15.5)), "Q6_K": ((208, 1.0),),
}  # fmt: skip
_MAP = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "ln_1": "attn_norm", "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip
_OUTSIDE = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm",
}  # fmt: skip


def random_blocks(kind: str, outputs: int, inputs: int, seed: int = 0, scale: float = 0.002) -> np.ndarray:
    """A matrix [outputs, bytes of a row] of valid blocks with random integers and scales of about `scale`."""
    generator = np.random.default_rng(seed)
    block = BLOCK_TYPES[kind]
    data = generator.integers(0, 256, (outputs, inputs // block.weights * block.nbytes), dtype=np.uint8)
    blocks = data.reshape(-1, block.nbytes)
    for at, factor in _SCALES.get(kind, ((0, 1.0),)):
        scales = (scale * factor * generator.normal(1.0, 0.2, len(blocks))).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    return data


def stored(values: np.ndarray, kind: str, seed: int = 0) -> np.ndarray:
    """`values` in a type; K-quants, which the package cannot make, are random blocks of the same shape."""
    number = GGMLQuantizationType[kind]
    try:
        return gguf.quants.quantize(values, number)
    except NotImplementedError:
        blocks = random_blocks(kind, *values.shape, seed=seed)
        spread = float(gguf.quants.dequantize(blocks, number).std() / values.std())
        return random_blocks(kind, *values.shape, seed=seed, scale=0.002 / spread)


def write_gguf(
    folder: Path,
    path: Path,
    kind_of: KindOf = lambda name: "F32",
    *,
    keys: Mapping[str, Any] | None = None,
    drop: Sequence[str] = (),
    values: Mapping[str, np.ndarray] | None = None,
    split_max_tensors: int = 0,
    tokenizer: bool = False,
    vectors: str = "F32",
) -> dict[str, np.ndarray]:
    """Writes a checkpoint as GGUF; returns its matrices as they are in the file, dequantised, by names in the file.

    Args:
        kind_of: types of the matrices.
        vectors: type of all vectors, which is F32 in llama.cpp's own files.
        keys: replace the header's keys; None takes one out.
        drop: tensors that are left out.
        values: replace the checkpoint's, and may add to them.
        tokenizer: with the folder's tokenizer, which must be of Qwen2's pattern; else with words of no meaning.
    """
    config = json.loads((folder / "config.json").read_text())
    arch = {"mistral": "llama"}.get(config["model_type"], config["model_type"])
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=split_max_tensors)
    fields = _model_keys(arch, config) | (
        _tokenizer_keys(folder, config["vocab_size"]) if tokenizer else _words(config)
    )
    for key, value in {**fields, **(keys or {})}.items():
        _add(writer, key, value)
    matrices: dict[str, np.ndarray] = {}
    for name, wide in {**_tensors(folder, arch, config), **(values or {})}.items():
        if name in drop:
            continue
        kind = kind_of(name) if wide.ndim == 2 else vectors
        data = stored(wide, kind, seed=len(matrices))
        matrices[name] = gguf.quants.dequantize(data, GGMLQuantizationType[kind]) if kind != "F32" else wide
        writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return matrices


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def _words(config: Mapping[str, Any]) -> dict[str, Any]:
    """The least that a vocabulary can be."""
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [f"w{index}" for index in range(config["vocab_size"])],
        "tokenizer.ggml.merges": ["w 1"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def _model_keys(arch: str, config: Mapping[str, Any]) -> dict[str, Any]:
    if arch == "gpt2":
        return {
            "gpt2.context_length": config["n_positions"],
            "gpt2.embedding_length": config["n_embd"],
            "gpt2.block_count": config["n_layer"],
            "gpt2.feed_forward_length": config.get("n_inner") or 4 * config["n_embd"],
            "gpt2.attention.head_count": config["n_head"],
            "gpt2.attention.layer_norm_epsilon": config["layer_norm_epsilon"],
        }
    heads = config["num_attention_heads"]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    keys = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.dimension_count": head_dim,
        "rope.freq_base": float(rope.get("rope_theta") or config["rope_theta"]),
        "vocab_size": config["vocab_size"],
    }
    if config["model_type"] == "mistral":
        keys["attention.sliding_window"] = config["sliding_window"]
    if rope.get("rope_type") in ("linear", "yarn"):
        keys["rope.scaling.type"] = RopeScalingType(rope["rope_type"]).value
        keys["rope.scaling.factor"] = rope["factor"]
    if rope.get("rope_type") == "yarn":
        keys["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    return {f"{arch}.{key}": value for key, value in keys.items()}


def _tensors(folder: Path, arch: str, config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    result: dict[str, np.ndarray] = {}
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") == "llama3":
        result["rope_freqs.weight"] = _llama3_factors(rope, config["head_dim"]).numpy()
    heads = {"attn_q": config.get("num_attention_heads"), "attn_k": config.get("num_key_value_heads")}
    for name, tensor in load_file(folder / "model.safetensors").items():
        base, _, what = name.rpartition(".")
        if base in _OUTSIDE:
            result[f"{_OUTSIDE[base]}.{what}"] = tensor.float().numpy()
            continue
        _, _, layer, part = base.split(".", 3)
        own = _MAP[part]
        if arch == "llama" and own in heads:
            # As LlamaModel.permute of convert_hf_to_gguf.py: rotated halves become rotated pairs.
            halves = tensor.reshape(heads[own], 2, len(tensor) // heads[own] // 2, *tensor.shape[1:])
            tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        if arch == "gpt2" and tensor.dim() == 2:
            tensor = tensor.t()
        result[f"blk.{layer}.{own}.{what}"] = np.ascontiguousarray(tensor.float().numpy())
    return result


def _llama3_factors(rope: Mapping[str, Any], head_dim: int) -> Tensor:
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    original, factors = rope["original_max_position_embeddings"], []
    for frequency in frequencies.tolist():
        wavelength = 2 * math.pi / frequency
        if wavelength < original / rope["high_freq_factor"]:
            factors.append(1.0)
        elif wavelength > original / rope["low_freq_factor"]:
            factors.append(rope["factor"])
        else:
            smooth = (original / wavelength - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"]
            )
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return torch.tensor(factors)


def _tokenizer_keys(folder: Path, vocab_size: int) -> dict[str, Any]:
    """The keys of a byte-level tokenizer.json, of Qwen2's pattern."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    lib = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return {
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.chat_template": config.get("chat_template"),
        **vocabulary_keys(lib, config, vocab_size),
    }


def vocabulary_keys(lib: tokenizers.Tokenizer, config: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """Tokens, types, merges and ids of named tokens, for a table of `vocab_size` rows."""
    spec, added = json.loads(lib.to_str()), lib.get_added_tokens_decoder()
    tokens, types = [], []
    for index in range(vocab_size):
        token = lib.id_to_token(index)
        tokens.append(f"[PAD{index}]" if token is None else token)
        special = index in added and added[index].special
        types.append(
            TokenType.UNUSED if token is None else TokenType.CONTROL if special
            else TokenType.USER_DEFINED if index in added else TokenType.NORMAL
        )  # fmt: skip
    names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    texts = {
        name: text["content"] if isinstance(text, dict) else text for name, text in config.items() if name in names
    }
    ids = {
        f"tokenizer.ggml.{names[name]}_token_id": lib.token_to_id(text)
        for name, text in texts.items()
        if text is not None
    }
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in spec["model"]["merges"]],
        **ids,
    }
