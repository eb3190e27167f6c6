"""Millrace: an async-native LLM inference runtime. The public names are imported on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from millrace.runtime.app import Runtime
    from millrace.runtime.config import Config, load_config
    from millrace.runtime.errors import MillraceError
    from millrace.runtime.handle import RequestHandle
    from millrace.runtime.quant.quantize import quantize_awq, quantize_fp8, quantize_gptq, quantize_int4, quantize_int8
    from millrace.runtime.types import (
        ChatMessage,
        ChatPrompt,
        Completion,
        Delta,
        FinishReason,
        Priority,
        SamplingParams,
        TextPrompt,
        TokensPrompt,
    )

__all__ = [
    "ChatMessage",
    "ChatPrompt",
    "Completion",
    "Config",
    "Delta",
    "FinishReason",
    "MillraceError",
    "Priority",
    "RequestHandle",
    "Runtime",
    "SamplingParams",
    "TextPrompt",
    "TokensPrompt",
    "load_config",
    "quantize_awq",
    "quantize_fp8",
    "quantize_gptq",
    "quantize_int4",
    "quantize_int8",
]

_HOME = {
    "Config": "config",
    "MillraceError": "errors",
    "RequestHandle": "handle",
    "Runtime": "app",
    "load_config": "config",
    **dict.fromkeys(
        ("quantize_awq", "quantize_fp8", "quantize_gptq", "quantize_int4", "quantize_int8"), "quant.quantize"
    ),
}


def __getattr__(name: str) -> Any:
    """Lazy, because actors/ imports runtime.messages while runtime.app imports actors/."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME.get(name, 'types')}"), name)
