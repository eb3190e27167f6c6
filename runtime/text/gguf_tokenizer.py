"""The tokenizer and the chat template in the keys of a GGUF file.

Sources: `src/llama-vocab.cpp` of llama.cpp (what the keys mean, which pre-tokenizer goes by which name) and the
tokenizer.json of the published models (their patterns).
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn

import msgspec
import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from millrace.runtime.errors import CheckpointError
from millrace.runtime.text.tokenizer import Tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # tokenizer.ggml.token_type
_NONE = 0xFFFFFFFF  # -1 in the type of ids
_NAMED: Mapping[str, str] = MappingProxyType(
    {
        "bos": "bos_token",
        "eos": "eos_token",
        "unknown": "unk_token",
        "seperator": "sep_token",  # spelled so in the format
        "padding": "pad_token",
        "cls": "cls_token",
        "mask": "mask_token",
    }
)
_SENTENCEPIECE_IDS: Mapping[str, int] = MappingProxyType({"bos": 1, "eos": 2, "unknown": 0})  # where no key has them
# A file names one token that ends a text or a turn, and models write others too.
_ENDINGS = frozenset((
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>", "<EOT>",
    "<｜end▁of▁sentence｜>",
))  # fmt: skip

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_SEED = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_GPT4O = (
    rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class _Pre(msgspec.Struct, frozen=True):
    """A pre-tokenizer: the pieces between matches of each pattern in turn are cut further, and so are the matches.

    Attributes:
        ignores_merges: a piece that is a token is that token, whatever the merges make of it.
        adds_bos: where the file does not say.
    """

    patterns: tuple[str, ...]
    nfc: bool = False
    ignores_merges: bool = False
    adds_bos: bool = False


_PRE_TOKENIZERS: Mapping[str, _Pre] = MappingProxyType(
    {
        # Of files that name none; llama.cpp's own, which is no published tokenizer's.
        "default": _Pre((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
        "gpt-2": _Pre((_GPT2,)),
        **dict.fromkeys(
            ("llama-bpe", "llama3", "llama-v3", "falcon3"), _Pre((_LLAMA3,), ignores_merges=True, adds_bos=True)
        ),
        **dict.fromkeys(("dbrx", "smaug-bpe"), _Pre((_LLAMA3,))),
        "qwen2": _Pre((_QWEN2,), nfc=True),
        **dict.fromkeys(("deepseek-r1-qwen", "megrez"), _Pre((_QWEN2,))),
        "seed-coder": _Pre((_SEED,)),
        **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), _Pre((r"\p{N}", _GPT2))),
        "tekken": _Pre((_TEKKEN,), ignores_merges=True, adds_bos=True),
        **dict.fromkeys(("gpt-4o", "llama4"), _Pre((_GPT4O,))),
    }
)


class SpecialIds(msgspec.Struct, frozen=True):
    """Attributes:
    named: `bos_token` and the like, as chat templates and tokenizers call them.
    endings: ids that end a text or a turn, the file's own first.
    """

    named: Mapping[str, int]
    endings: tuple[int, ...]


def special_ids(metadata: Mapping[str, Any], where: str) -> SpecialIds:
    """`where` names the file in errors. Raises CheckpointError for an id that is none of the file's tokens."""
    return _Vocabulary(metadata, where).special


def load_tokenizer(metadata: Mapping[str, Any], where: str) -> Tokenizer:
    """The tokenizer of a GGUF file: byte-level BPE (`gpt2`) or SentencePiece's BPE with scores (`llama`).

    Raises CheckpointError for another one, an unknown pre-tokenizer, and for keys that are damaged or missing.
    """
    vocabulary = _Vocabulary(metadata, where)
    for key in ("tokenizer.ggml.remove_extra_whitespaces", "tokenizer.ggml.add_sep_token"):
        if vocabulary.flag(key, False):
            vocabulary.refuse(key, "false or absent")
    try:
        lib, adds_bos = _KINDS[vocabulary.kind](vocabulary)
    except CheckpointError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{where}: no tokenizer can be made of tokenizer.ggml.*: {error}") from error
    lib.add_special_tokens(vocabulary.added(True, _CONTROL, _UNKNOWN))
    lib.add_tokens(vocabulary.added(False, _USER_DEFINED))
    named = vocabulary.special.named
    around = [
        (name, named.get(name))
        for name, default in (("bos_token", adds_bos), ("eos_token", False))
        if vocabulary.flag(f"tokenizer.ggml.add_{name}", default)
    ]
    if missing := [name for name, index in around if index is None]:
        raise CheckpointError(f"{where}: tokenizer.ggml.add_{missing[0]} is true, but tokenizer.ggml has no such token")
    if around:
        names = [name for name, _ in around]
        single = ["bos_token"] * ("bos_token" in names) + ["$A"] + ["eos_token"] * ("eos_token" in names)
        lib.post_processor = processors.TemplateProcessing(single=single, special_tokens=around)
    return Tokenizer(
        lib,
        special_tokens={name: vocabulary.tokens[index] for name, index in named.items()},
        model_eos_ids=vocabulary.special.endings,
    )


def chat_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The templates by name, as `ChatTemplate` takes them."""
    names = metadata.get("tokenizer.chat_templates")
    found = {"default": metadata.get("tokenizer.chat_template")}
    for name in names if isinstance(names, list) else []:
        found[name] = metadata.get(f"tokenizer.chat_template.{name}")
    return {name: source for name, source in found.items() if isinstance(source, str)}


class _Vocabulary:
    """The keys of a tokenizer, checked.

    Attributes:
        kind: "gpt2" or "llama".
        tokens: without the unused ones at the end, which fill the model's table up.
        ids: of `tokens`.
        special: the ids that have a meaning.
    """

    def __init__(self, metadata: Mapping[str, Any], where: str) -> None:
        self.metadata = metadata
        self._where = where
        self.kind = str(metadata.get("tokenizer.ggml.model"))
        if self.kind not in _KINDS:
            self.refuse("tokenizer.ggml.model", " or ".join(_KINDS))
        tokens = self.strings("tokenizer.ggml.tokens")
        self._types: Sequence[int] = self.numbers("tokenizer.ggml.token_type", len(tokens)) or [_NORMAL] * len(tokens)
        count = len(tokens)
        while count and self._types[count - 1] == _UNUSED:
            count -= 1
        self.tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens[:count])]
        self.ids = {token: index for index, token in enumerate(self.tokens)}
        if len(self.ids) != count:
            twice = next(token for index, token in enumerate(self.tokens) if self.ids[token] != index)
            raise CheckpointError(f"{where}: tokenizer.ggml.tokens holds {twice!r} twice")
        self.special = self._special()

    def refuse(self, key: str, supported: str) -> NoReturn:
        found = f"is {self.metadata[key]!r}" if key in self.metadata else "is missing"
        raise CheckpointError(f"{self._where}: {key} {found}, but it must be {supported}", param=key)

    def strings(self, key: str) -> list[str]:
        value = self.metadata.get(key)
        if not isinstance(value, list) or not value:
            raise CheckpointError(f"{self._where}: {key} must be a list of strings", param=key)
        return value

    def numbers(self, key: str, count: int) -> list[Any]:
        """One for each token; none where the key is absent."""
        value = self.metadata.get(key)
        if value is None:
            return []
        if not isinstance(value, np.ndarray) or len(value) != count:
            raise CheckpointError(
                f"{self._where}: {key} must be an array of {count} numbers, one for each token", param=key
            )
        numbers: list[Any] = value.tolist()
        return numbers

    def flag(self, key: str, default: bool) -> bool:
        value = self.metadata.get(key, default)
        if not isinstance(value, bool):
            self.refuse(key, "true or false")
        return value

    def is_type(self, index: int, *types: int) -> bool:
        return self._types[index] in types

    def added(self, special: bool, *types: int) -> list[AddedToken]:
        return [
            AddedToken(token, special=special, normalized=False)
            for token, kind in zip(self.tokens, self._types, strict=False)  # there are more types, of unused tokens
            if kind in types
        ]

    def _special(self) -> SpecialIds:
        named = {called: found for name, called in _NAMED.items() if (found := self._id(name)) is not None}
        stated = [found for name in ("eos", "eot", "eom") if (found := self._id(name)) is not None]
        by_name = sorted(self.ids[token] for token in _ENDINGS & self.ids.keys())
        return SpecialIds(named, tuple(dict.fromkeys((*stated, *by_name))))

    def _id(self, name: str) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        if key not in self.metadata:
            default = _SENTENCEPIECE_IDS.get(name) if self.kind == "llama" else None
            return default if default is not None and default < len(self.tokens) else None
        value = self.metadata[key]
        if value == _NONE:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(self.tokens):
            self.refuse(key, f"the id of one of {len(self.tokens)} tokens")
        return value


def _byte_level(vocabulary: _Vocabulary) -> tuple[tokenizers.Tokenizer, bool]:
    """(the tokenizer without its added tokens, whether it adds BOS where the file does not say)"""
    name = vocabulary.metadata.get("tokenizer.ggml.pre", "default")
    pre = _PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
    if pre is None:
        vocabulary.refuse("tokenizer.ggml.pre", f"one of {', '.join(_PRE_TOKENIZERS)}")
    merges = [merge.partition(" ") for merge in vocabulary.strings("tokenizer.ggml.merges")]
    lib = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary.ids,
            merges=[(left, right) for left, _, right in merges],
            ignore_merges=pre.ignores_merges,
        )
    )
    if pre.nfc:
        lib.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    lib.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    lib.decoder = decoders.ByteLevel()
    return lib, pre.adds_bos


def _pieces(vocabulary: _Vocabulary) -> tuple[tokenizers.Tokenizer, bool]:
    """The same for SentencePiece's BPE, which merges the neighbours whose piece has the highest score.

    So any two pieces that make a third are a merge, and the third's score is its rank.
    """
    ids = vocabulary.ids
    scores = vocabulary.numbers("tokenizer.ggml.scores", len(vocabulary.strings("tokenizer.ggml.tokens")))
    if not scores:
        vocabulary.refuse("tokenizer.ggml.scores", "an array of numbers")
    normal = [(token, index) for token, index in ids.items() if vocabulary.is_type(index, _NORMAL)]
    ranked = sorted(
        ((-scores[index], index, ids[left], ids[right]), (left, right))
        for token, index in normal
        for at in range(1, len(token))
        if (left := token[:at]) in ids and (right := token[at:]) in ids
    )
    unknown = vocabulary.special.named.get("unk_token")
    lib = tokenizers.Tokenizer(
        models.BPE(
            vocab=ids,
            merges=[merge for _, merge in ranked],
            unk_token=None if unknown is None else vocabulary.tokens[unknown],
            fuse_unk=True,
            byte_fallback=any(vocabulary.is_type(index, _BYTE) for index in ids.values()),
        )
    )
    has_prefix = vocabulary.flag("tokenizer.ggml.add_space_prefix", True)
    spaces: list[Any] = [normalizers.Replace(" ", "▁")]
    parts: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if has_prefix:
        spaces.insert(0, normalizers.Prepend("▁"))
        parts.append(decoders.Strip(" ", 1, 0))
    lib.normalizer, lib.decoder = normalizers.Sequence(spaces), decoders.Sequence(parts)
    return lib, True


_KINDS: Mapping[str, Callable[[_Vocabulary], tuple[tokenizers.Tokenizer, bool]]] = MappingProxyType(
    {"gpt2": _byte_level, "llama": _pieces}
)
