"""Qwen2 and Qwen2.5 (Yang et al. 2024): Llama with biases on q, k and v. Qwen3 (2025): norms on q and k instead."""

from millrace.runtime.errors import CheckpointError
from millrace.runtime.models.config import ConfigReader
from millrace.runtime.models.rotary import RotaryDecl, declare_rotary, read_head_dim

_FULL, _SLIDING = "full_attention", "sliding_attention"


def declare_qwen2(config: ConfigReader) -> RotaryDecl:
    return declare_rotary(
        config,
        "Qwen2ForCausalLM",
        head_dim=read_head_dim(config),
        windows=_windows(config),
        qkv_bias=True,
        output_bias=False,
        mlp_bias=False,
        qk_norm=False,
    )


def declare_qwen3(config: ConfigReader) -> RotaryDecl:
    bias = config.flag("attention_bias", False)
    return declare_rotary(
        config,
        "Qwen3ForCausalLM",
        head_dim=config.integer("head_dim", 128),  # independent of the hidden size; the default is the class's
        windows=_windows(config),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=False,
        qk_norm=True,
    )


def _windows(config: ConfigReader) -> tuple[int | None, ...]:
    """Each layer's window: from `layer_types` where it is written, else for layers from max_window_layers on."""
    count = config.integer("num_hidden_layers")
    window = None
    if config.flag("use_sliding_window", False):
        window = config.integer("sliding_window", 4096)
    types = config.values.get("layer_types")
    if types is None:
        first = config.values.get("max_window_layers", 28)
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            config.refuse("max_window_layers", "an integer, 0 or more")
        return tuple(window if index >= first else None for index in range(count))
    if not isinstance(types, list) or len(types) != count:
        config.refuse("layer_types", f"a list of num_hidden_layers ({count}) names")
    if unknown := sorted({str(name) for name in types} - {_FULL, _SLIDING}):
        raise CheckpointError(
            f'{config.where}: layer_types has {", ".join(unknown)}, but only "{_FULL}" and "{_SLIDING}" are supported',
            param="layer_types",
        )
    if _SLIDING in types and window is None:
        config.refuse("layer_types", f'free of "{_SLIDING}" while use_sliding_window is false')
    return tuple(window if name == _SLIDING else None for name in types)
