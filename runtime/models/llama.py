"""Llama 1 to 3.2 (Touvron et al. 2023, Grattafiori et al. 2024) and what uses its architecture."""

from millrace.runtime.models.config import ConfigReader
from millrace.runtime.models.rotary import RotaryDecl, declare_rotary, read_head_dim


def declare_llama(config: ConfigReader) -> RotaryDecl:
    bias = config.flag("attention_bias", False)
    return declare_rotary(
        config,
        "LlamaForCausalLM",
        head_dim=read_head_dim(config),
        windows=(None,) * config.integer("num_hidden_layers"),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=config.flag("mlp_bias", False),
        qk_norm=False,
    )
