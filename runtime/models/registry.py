"""Which declaration reads which checkpoint."""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from millrace.runtime.errors import CheckpointError
from millrace.runtime.models.config import ConfigReader
from millrace.runtime.models.decoder import DecoderDecl
from millrace.runtime.models.gpt2 import declare_gpt2
from millrace.runtime.models.llama import declare_llama
from millrace.runtime.models.mistral import declare_mistral
from millrace.runtime.models.qwen import declare_qwen2, declare_qwen3

ARCHITECTURES: Mapping[str, Callable[[ConfigReader], DecoderDecl]] = MappingProxyType(
    {
        "GPT2LMHeadModel": declare_gpt2,
        "LlamaForCausalLM": declare_llama,
        "MistralForCausalLM": declare_mistral,
        "Qwen2ForCausalLM": declare_qwen2,
        "Qwen3ForCausalLM": declare_qwen3,
    }
)
_BY_MODEL_TYPE: Mapping[str, str] = MappingProxyType(
    {
        "gpt2": "GPT2LMHeadModel",
        "llama": "LlamaForCausalLM",
        "mistral": "MistralForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
    }
)


def declare(config: Mapping[str, Any]) -> DecoderDecl:
    """Reads a checkpoint's config.json, as transformers 4 or 5 wrote it.

    Code that a checkpoint brings along (`auto_map`) is never run: its architecture must be one of ARCHITECTURES.

    Raises CheckpointError that names the key, its value and what is supported.
    """
    reader = ConfigReader(config)
    named = config.get("architectures")
    if named:
        architecture = named[0] if isinstance(named, list) else named
    else:
        architecture = _BY_MODEL_TYPE.get(str(config.get("model_type")), config.get("model_type"))
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"config.json: the architecture is {architecture}, but supported are {', '.join(ARCHITECTURES)}",
            param="architectures",
        )
    reader.refuse_unsupported()
    decl = ARCHITECTURES[architecture](reader)
    parameters = sum(math.prod(tensor.shape) for tensor in decl.tensors())
    spec = msgspec.structs.replace(decl.spec, num_parameters=parameters)
    return msgspec.structs.replace(decl, spec=spec)
