"""Writes a checkpoint in Hugging Face layout as GGUF, in F32 or BF16: Qwen2 and Llama.

    python bench/peers/convert_gguf.py CHECKPOINT OUT.gguf f32|bf16

Names of keys and tensors, and that llama.cpp's Llama wants the rows of q and k interleaved (its rotary embedding pairs
neighbours, Hugging Face's pairs halves): the GGUF specification (ggml, docs/gguf.md), llama.cpp's conversion scripts.
"""

import argparse
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

ARCHITECTURES = {"Qwen2ForCausalLM": "qwen2", "LlamaForCausalLM": "llama"}
_TOP = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight"}  # fmt: skip
_PARTS = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def tensor_name(name: str) -> str:
    """GGUF's name of a tensor; raises ValueError for one that the format has none for."""
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if found and found[2] in _PARTS:
        return f"blk.{found[1]}.{_PARTS[found[2]]}.{found[3]}"
    if name in _TOP:
        return _TOP[name]
    raise ValueError(f"{name} has no place in a GGUF file of Qwen2 or Llama")


def interleave(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k, [heads * dim, ...]: of each head, row i of the first half is followed by row i of the second."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def llama3_factors(config: Mapping[str, Any], head_dim: int) -> Tensor | None:
    """Divisors of the rotary frequencies, [head_dim / 2], of the rope type llama3; None for any other."""
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type") != "llama3":
        return None
    wavelengths = 2 * math.pi * config["rope_theta"] ** (torch.arange(0, head_dim, 2) / head_dim)
    context = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    # 1 above the high frequency, `factor` below the low one, a blend of the reciprocals between.
    blend = ((context / wavelengths - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - blend) / scaling["factor"] + blend)


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is not a mapping
                yield name, tensors.get_tensor(name)


def add_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any], head_dim: int) -> None:
    heads = config["num_attention_heads"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads", heads))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(config["vocab_size"])


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, config: Mapping[str, Any]) -> None:
    """A byte-level BPE tokenizer.json, as type gpt2 with the splitting of Qwen2."""
    lib = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    size = config["vocab_size"]
    words = [f"<unused_{index}>" for index in range(size)]
    types = [int(gguf.TokenType.UNUSED)] * size
    for word, index in lib["model"]["vocab"].items():
        words[index], types[index] = word, int(gguf.TokenType.NORMAL)
    for token in lib["added_tokens"]:
        words[token["id"]], types[token["id"]] = token["content"], int(gguf.TokenType.CONTROL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(words)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in lib["model"]["merges"]])
    eos = config["eos_token_id"]
    writer.add_eos_token_id(eos[0] if isinstance(eos, list) else eos)
    writer.add_add_bos_token(False)


def convert(folder: Path, out: Path, kind: str) -> None:
    """Writes `out`; matrices in `kind` (f32 or bf16), vectors in float32. One tensor is in memory at a time."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    architecture = config["architectures"][0]
    if architecture not in ARCHITECTURES:
        raise ValueError(f"{architecture} is not among {', '.join(ARCHITECTURES)}")
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    key_heads = config.get("num_key_value_heads", heads)
    stored = {"f32": torch.float32, "bf16": torch.bfloat16}[kind]
    out.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(out, ARCHITECTURES[architecture])
    writer.add_file_type(int({"f32": gguf.LlamaFileType.ALL_F32, "bf16": gguf.LlamaFileType.MOSTLY_BF16}[kind]))
    add_keys(writer, config, head_dim)
    add_tokenizer(writer, folder, config)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        factors = llama3_factors(config, head_dim)
        if factors is not None:
            yield "rope_freqs.weight", factors
        for name, tensor in read_tensors(folder):
            if name == "lm_head.weight" and config.get("tie_word_embeddings", False):
                continue  # readers take the embeddings where it is missing
            if architecture == "LlamaForCausalLM" and re.search(r"\.[qk]_proj\.", name):
                tensor = interleave(tensor, heads if ".q_proj." in name else key_heads)
            yield tensor_name(name), tensor.to(stored if tensor.dim() > 1 else torch.float32).contiguous()

    for name, tensor in tensors():
        raw = gguf.GGMLQuantizationType.BF16 if tensor.dtype == torch.bfloat16 else gguf.GGMLQuantizationType.F32
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, tensor in tensors():
        writer.write_tensor_data(tensor.view(torch.uint16 if tensor.dtype == torch.bfloat16 else tensor.dtype).numpy())
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("kind", choices=("f32", "bf16"))
    args = parser.parse_args()
    convert(args.checkpoint, args.out, args.kind)


if __name__ == "__main__":
    main()
