"""A GGUF file as a checkpoint: its keys as a config.json, its tensors under the names of Hugging Face checkpoints.

Sources: `gguf-py/gguf/constants.py` (names) and `convert_hf_to_gguf.py` (what a conversion changes) of llama.cpp.
"""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from millrace.kernels.quantized import AnyWeight
from millrace.runtime.errors import CheckpointError
from millrace.runtime.quant.gguf_blocks import BLOCK_TYPES, read_blocks, widen_blocks
from millrace.runtime.text.gguf_tokenizer import special_ids
from millrace.runtime.weights.checkpoint import StoredTensor
from millrace.runtime.weights.gguf_config import architecture, model_config
from millrace.runtime.weights.gguf_file import GgufMaps, read_gguf

FLOAT_TYPES = MappingProxyType({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16})
_FACTORS = "rope_freqs.weight"  # what Llama 3's scaling divides each frequency by
_ROTARY_FILE = re.compile(r"blk\.\d+\.attn_rot_embd\.weight")  # old files carry frequencies, which the keys give
_IN_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


class _Names(NamedTuple):
    """GGUF names -> Hugging Face names, without `.weight` and `.bias`."""

    outside: Mapping[str, str]
    layer: str
    in_layer: Mapping[str, str]
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
        self._arch = architecture(header)
        self._names = _GPT2_NAMES if self._arch == "gpt2" else _ROTARY_NAMES
        ids = special_ids(self.metadata, str(self.path))
        self._config = model_config(header) | {
            "bos_token_id": ids.named.get("bos_token"),
            "eos_token_id": list(ids.endings),
        }
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
            factors = self._stored[_FACTORS]
            if factors.kind != "F32":
                raise CheckpointError(f"{self.path}: {_FACTORS} is {factors.kind}, but it must be F32")
            values = self._maps.rows(factors).view(np.float32).flatten().tolist()
            config["rope_scaling"] = {"rope_type": "factors", "factors": values}
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
        order = self._order(own)
        if order is not None and values.dim() == 1:  # the integers of a vector share blocks
            return values[order]
        return values.t() if match and self._is_turned(match) else values

    def matrix(self, name: str) -> AnyWeight:
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
        return weight

    def read_any(self, name: str) -> Tensor:
        return self.read(name)  # no setting of GGUF makes a matrix of several tensors

    def release(self) -> None:
        self._maps.release()

    @property
    def is_quantized(self) -> bool:
        return any(tensor.kind in BLOCK_TYPES for tensor in self._stored.values())

    def describe(self, wide: str) -> str:
        """For people: how many tensors are of which type, and what becomes of them; `wide` is the type of widened
        ones."""
        kinds = Counter(tensor.kind for tensor in self._stored.values())
        packed, plain = (
            [f"{count} tensors {kind}" for kind, count in kinds.most_common() if (kind in BLOCK_TYPES) is wanted]
            for wanted in (True, False)
        )
        said = [f"{', '.join(packed)}, packed"] if packed else []
        table = self._stored["token_embd.weight"].kind
        if "output.weight" in self._stored and table in BLOCK_TYPES:
            said.append(f"token_embd.weight widened to {wide}")
        return f"GGUF: {'; '.join([*said, ', '.join(plain)] if plain else said)}"

    def _hub_name(self, name: str, match: re.Match[str] | None) -> str:
        if match is not None and match[2] in self._names.in_layer:
            return f"{self._names.layer}.{match[1]}.{self._names.in_layer[match[2]]}.{match[3]}"
        part, _, what = name.rpartition(".")
        return f"{self._names.outside[part]}.{what}" if part in self._names.outside else name

    def _is_turned(self, match: re.Match[str]) -> bool:
        return match[2] in self._names.turned and match[3] == "weight"

    def _rows(self, own: str) -> Tensor:
        """The bytes of a tensor, those of a matrix row by row in the order of a Hugging Face checkpoint."""
        rows = torch.from_numpy(self._maps.rows(self._stored[own]))
        order = self._order(own)
        return rows if order is None or len(self._stored[own].shape) == 1 else rows.index_select(0, order)

    def _order(self, own: str) -> Tensor | None:
        """Places in the file of the outputs, where they are not those of a Hugging Face checkpoint.

        The conversion of Llama turns the rows of each head of q and k from two halves into pairs, as ggml rotates.
        """
        match = _IN_LAYER.fullmatch(own)
        if self._arch != "llama" or match is None or match[2] not in ("attn_q", "attn_k"):
            return None
        heads = self._config["num_attention_heads" if match[2] == "attn_q" else "num_key_value_heads"]
        count = self._stored[own].shape[0]
        if count % (2 * heads):
            raise CheckpointError(f"{self.path}: {own} has {count} outputs, which {heads} heads of pairs do not make")
        return torch.arange(count).view(heads, -1, 2).transpose(1, 2).flatten()

    def _damaged(self, own: str, error: ValueError) -> CheckpointError:
        return CheckpointError(f"{self._stored[own].file}: {own} is damaged: {error}")
