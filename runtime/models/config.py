"""Typed reads of a checkpoint's config.json: every refusal names the key, its value and what is supported."""

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from millrace.runtime.errors import CheckpointError

# Settings that would change the arithmetic, each with the values that change nothing. Checkpoints of other
# architectures that were relabelled as one of ours carry them; computing without them would give fluent nonsense.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "add_cross_attention": (None, False),
    "attention_multiplier": (None, 1.0),
    "attn_logit_softcapping": (None,),
    "clip_qkv": (None,),
    "embedding_multiplier": (None, 1.0),
    "final_logit_softcapping": (None,),
    "is_encoder_decoder": (None, False),
    "logit_scale": (None, 1.0),
    "logits_scaling": (None, 1.0),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "residual_multiplier": (None, 1.0),
}


class ConfigReader:
    """One JSON object of a checkpoint, read key by key.

    A key whose value is null counts as absent: transformers writes either for the same setting.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "config.json") -> None:
        self.values = values
        self.where = where

    def __contains__(self, key: str) -> bool:
        """Whether the key is written at all, null included."""
        return key in self.values

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer; without a default the key is required."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.refuse(key, "a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive finite number; without a default the key is required."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < float("inf"):
            self.refuse(key, "a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            self.refuse(key, "true or false")
        return value

    def one_of(self, key: str, supported: Sequence[str], default: str | None = None) -> str:
        value = self._value(key, default)
        if value not in supported:
            self.refuse(key, " or ".join(f'"{name}"' for name in supported))
        return str(value)

    def section(self, key: str) -> "ConfigReader | None":
        """A nested object, or None where the key is absent or null."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            self.refuse(key, "an object")
        return ConfigReader(value, f"{self.where}: {key}")

    def strings(self, key: str) -> tuple[str, ...]:
        """A list of texts; empty where the key is absent or null."""
        value = self.values.get(key)
        texts = [] if value is None else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            self.refuse(key, "a list of strings")
        return tuple(texts)

    def token_ids(self, key: str) -> tuple[int, ...]:
        """An id or a list of ids; empty where the key is absent or null."""
        value = self.values.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(token, bool) or not isinstance(token, int) or token < 0 for token in ids):
            self.refuse(key, "a token id or a list of token ids")
        return tuple(ids)

    def refuse(self, key: str, supported: str) -> NoReturn:
        found = f"is {self.values[key]!r}" if key in self.values else "is missing"
        raise CheckpointError(f"{self.where}: {key} {found}, but it must be {supported}", param=key)

    def refuse_unknown(self, *known: str) -> None:
        """Refuses every key that is not null and that `known` does not name; its texts hold names between spaces."""
        names = frozenset(" ".join(known).split())
        for key, value in self.values.items():
            if value is not None and key not in names:
                raise CheckpointError(
                    f"{self.where}: {key} is {value!r}, but this setting is not known here", param=key
                )

    def refuse_unsupported(self) -> None:
        """Refuses settings that change the arithmetic of every architecture and that nothing here computes."""
        for key, neutral in _NEUTRAL.items():
            if self.values.get(key) not in neutral:
                self.refuse(key, " or ".join("absent" if value is None else str(value) for value in neutral))

    def _value(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            if default is None:
                self.refuse(key, "given")
            return default
        return value


def special_tokens(config: ConfigReader) -> dict[str, Any]:
    """The ModelSpec fields of ids that begin and end a text."""
    bos = config.token_ids("bos_token_id")
    return {"eos_token_ids": config.token_ids("eos_token_id"), "bos_token_id": bos[0] if bos else None}
