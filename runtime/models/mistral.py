"""Mistral 7B (Jiang et al. 2023) and its successors of the same architecture: Llama with a sliding window."""

from millrace.runtime.models.config import ConfigReader
from millrace.runtime.models.rotary import RotaryDecl, declare_rotary, read_head_dim

_DEFAULT_WINDOW = 4096  # of the first release, whose configuration class supplies it where the key is not written


def declare_mistral(config: ConfigReader) -> RotaryDecl:
    if config.values.get("layer_types") is not None:
        config.refuse("layer_types", "absent: Mistral has the same window in all layers")
    # Here null differs from an absent key: it turns the window off.
    off = "sliding_window" in config and config.values["sliding_window"] is None
    window = None if off else config.integer("sliding_window", _DEFAULT_WINDOW)
    return declare_rotary(
        config,
        "MistralForCausalLM",
        head_dim=read_head_dim(config),
        windows=(window,) * config.integer("num_hidden_layers"),
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm=False,
    )
