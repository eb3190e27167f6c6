"""The tokenizer of a checkpoint: text to ids and back, through the `tokenizers` library.

Control tokens are the added tokens by which a model's format is told apart from its content (`<|im_end|>`, `[INST]`).
In text that a user wrote they are text: `encode` never yields a control id but for those that add_special_tokens asks
for. Only a chat template writes control tokens (`encode_mixed`).
"""

import functools
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from millrace.runtime.errors import CheckpointError, InvalidRequestError
from millrace.runtime.text.decoding import (
    DecoderPlan,
    TokenTable,
    plan_decoder,
    token_table,
    without,
)

# Stand-ins for control tokens: Unicode noncharacters, which no interchanged text holds, around the token's id.
ALIAS_OPEN, ALIAS_CLOSE = "\ufdd0", "\ufdd1"

_FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# Gemma has these as added tokens that are not special: they are how the model reads HTML in plain text.
_HTML = re.compile(
    r"(?:table|caption|thead|tbody|tfoot|tr|th|td|h[1-6]|blockquote|strong|em|b|i|u|s|sub|sup|code|pre|p|br|hr|a|img|"
    r"[uo]l|li|div|span)"
)


_Trie = dict[str, "_Trie"]


class Tokenizer:
    """Encodes and decodes; immutable after loading, so it may be shared.

    Attributes:
        vocab_size: one more than the largest token id (a model may have more, padded, rows).
        special_ids: ids that skip_special_tokens leaves out of the text.
        control_ids: ids that user text never encodes to: the special tokens, and those added tokens that are markers
            (`<think>`, `<tool_call>`) rather than text (runs of spaces, HTML elements).
        special_tokens: named special tokens (`bos_token`, ...), as chat templates read them.
        longest_token: characters of the longest token, as the vocabulary spells it.
        bos_id, eos_id: from the tokenizer's config files, None where they name none.
        eos_ids: every id that ends a text: the tokenizer's, and those of generation_config.json (else config.json).
    """

    def __init__(
        self,
        lib: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        model_eos_ids: Sequence[int] = (),
    ) -> None:
        """Takes ownership of `lib`.

        Args:
            special_tokens: named special tokens; those that `lib` lacks are added to it.
            model_eos_ids: ids that the model's own config names as the end of a text.
        """
        lib.no_truncation()
        lib.no_padding()
        lib.encode_special_tokens = False
        self.special_tokens: Mapping[str, str] = dict(special_tokens or {})
        known = lib.get_added_tokens_decoder().values()
        already = {token.content for token in known if token.special}
        lib.add_special_tokens(
            [
                tokenizers.AddedToken(content, special=True, normalized=False)
                for content in self.special_tokens.values()
                if content not in already
            ]
        )
        self._lib = lib
        added = lib.get_added_tokens_decoder()
        vocab = lib.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(vocab.values(), default=-1)
        pieces: list[str | None] = [None] * self.vocab_size
        for piece, index in vocab.items():
            pieces[index] = piece
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        self.control_ids = frozenset(
            index for index, token in added.items() if token.special or not _carries_text(token.content)
        )
        self.bos_id = self._id_of("bos_token")
        self.eos_id = self._id_of("eos_token")
        own_eos = () if self.eos_id is None else (self.eos_id,)
        self.eos_ids = tuple(dict.fromkeys((*own_eos, *model_eos_ids)))

        self.control_tokens: Mapping[int, str] = {index: added[index].content for index in sorted(self.control_ids)}
        self._control_by_text = {content: index for index, content in self.control_tokens.items()}
        self.control_pattern = _control_pattern(added[index] for index in self.control_ids)
        contents = self._control_by_text
        self._longest_control = max(map(len, contents), default=0)
        self._heads = frozenset(text[:size] for text in contents for size in range(1, len(text)))
        self._tails = frozenset(text[size:] for text in contents for size in range(1, len(text)))
        # A model writes its unknown token for any text that it cannot spell; that is no injection.
        self._forgeable = self.control_ids - self._unknown_ids()
        self._text_lib, self._real_ids = self._without_controls(added)
        self._model_size = lib.get_vocab_size(with_added_tokens=False)
        self._prefix, self._suffix = self._post_processing()

        self.decoder_plan: DecoderPlan | None = plan_decoder(lib.decoder)
        self._table = token_table(lib, self.decoder_plan, pieces)
        self._table_skipping = without(self._table, self.special_ids)
        self.longest_token = max((len(lib.id_to_token(index) or "") for index in range(self.vocab_size)), default=1)

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Reads tokenizer.json and the config files beside it, as transformers 4 and 5 write them.

        What add_special_tokens adds is what the post-processor of tokenizer.json adds: like transformers 5, this reads
        no add_bos_token from tokenizer_config.json, which is often stale.

        Raises:
            CheckpointError: tokenizer.json is missing or cannot be read; the message says what to do.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(_missing(folder))
        try:
            lib = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(
                f"{path} cannot be read: {error}; it may be cut short, or written by a later version of `tokenizers` "
                f"than {tokenizers.__version__}"
            ) from error
        config = read_json(folder / "tokenizer_config.json")
        named = _named_tokens(read_json(folder / "special_tokens_map.json")) | _named_tokens(config)
        _add_tokens(lib, config.get("added_tokens_decoder") or {}, read_json(folder / "added_tokens.json"))
        extra = [_content(token) for key in ("additional_special_tokens", "extra_special_tokens")
                 for token in _as_list(config.get(key))]  # fmt: skip
        special = {token.content for token in lib.get_added_tokens_decoder().values() if token.special}
        lib.add_special_tokens(
            [tokenizers.AddedToken(token, special=True, normalized=False) for token in extra if token not in special]
        )
        generation = _eos_ids(read_json(folder / "generation_config.json"))
        return cls(
            lib,
            special_tokens=named,
            model_eos_ids=generation or _eos_ids(read_json(folder / "config.json")),
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of user text, in which control tokens are text.

        Raises:
            InvalidRequestError: the text holds a control token that this tokenizer cannot spell in other tokens, or
                half of a surrogate pair.
        """
        ids = _spell(self._lib, text)
        if not self.control_ids.isdisjoint(ids):
            ids = self.encode_mixed(text, ())
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def encode_control(self, text: str) -> list[int]:
        """The ids of text in which every control token is control: for what a chat template, not a user, wrote."""
        return _spell(self._lib, text)

    def encode_mixed(self, text: str, control_spans: Iterable[tuple[int, int]]) -> list[int]:
        """The ids of text in which control tokens are control at the given spans and text elsewhere.

        Args:
            control_spans: (start, end) of control tokens in `text`, ascending and apart, each exactly one token.

        Raises:
            InvalidRequestError: the text cannot be told apart from control tokens.
        """
        if ALIAS_OPEN in text:
            raise InvalidRequestError(
                f"the text holds a control token together with the noncharacter U+{ord(ALIAS_OPEN):04X}; "
                "remove the noncharacter"
            )
        parts, end = [], 0
        for start, stop in control_spans:
            parts += [text[end:start], _alias(self._control_by_text[text[start:stop]])]
            end = stop
        parts.append(text[end:])
        ids = _spell(self._text_lib, "".join(parts))
        # Ids of the model's own vocabulary come from spelling, those above it from aliases and added text tokens.
        forged = next((index for index in ids if index in self._forgeable and index < self._model_size), None)
        if forged is not None:
            raise InvalidRequestError(
                f"the text holds {self.control_tokens[forged]!r}, a control token of this model that its tokenizer "
                "cannot spell as plain text; remove it or break it up"
            )
        return [self._real_ids.get(index, index) for index in ids]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        text: str = self._lib.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_text(self, token_id: int) -> str:
        """What one token shows; bytes that are no whole character show as U+FFFD. "" for an id without a token."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes of one token, b"" for an id without a token (a padded row of the model's vocabulary)."""
        return self._table.bytes[token_id] if 0 <= token_id < self.vocab_size else b""

    def token_piece(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it, or None."""
        piece: str | None = self._lib.id_to_token(token_id)
        return piece

    def table(self, skip_special_tokens: bool) -> TokenTable:
        return self._table_skipping if skip_special_tokens else self._table

    def touches_control(self, text: str) -> bool:
        """Whether the text holds a control token, or begins or ends with a part of one that text around it could
        complete."""
        return self.starts_inside_control(text) or self.ends_inside_control(text) or self.contains_control(text)

    def starts_inside_control(self, text: str) -> bool:
        """Whether the text starts with the rest of a control token that has begun before it."""
        return any(text[:size] in self._tails for size in range(1, self._longest_control))

    def ends_inside_control(self, text: str) -> bool:
        """Whether the text ends with the beginning of a control token."""
        return any(text[-size:] in self._heads for size in range(1, self._longest_control))

    def contains_control(self, text: str) -> bool:
        """Whether a control token could be recognised in the text."""
        if self.control_pattern.search(text):
            return True
        return self._normalized_controls and self.control_pattern.search(self._normalize(text)) is not None

    @functools.cached_property
    def _normalized_controls(self) -> bool:
        added = self._lib.get_added_tokens_decoder()
        return self._lib.normalizer is not None and any(added[index].normalized for index in self.control_ids)

    def _normalize(self, text: str) -> str:
        normalized: str = self._lib.normalizer.normalize_str(text)
        return normalized

    def _id_of(self, name: str) -> int | None:
        content = self.special_tokens.get(name)
        return None if content is None else self._lib.token_to_id(content)

    def _unknown_ids(self) -> frozenset[int]:
        model = self._lib.model
        unknown = getattr(model, "unk_token", None)
        index = self._lib.token_to_id(unknown) if unknown is not None else getattr(model, "unk_id", None)
        return frozenset(() if index is None else (index,))

    def _without_controls(
        self, added: Mapping[int, tokenizers.AddedToken]
    ) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
        """A tokenizer that knows control tokens by alias only, and the map from its added ids to the real ones.

        It shares the model with `self._lib`, so it costs next to nothing, and cuts text at an alias exactly as the
        original cuts it at the token: the same normaliser, pre-tokeniser and token flags do it.
        """
        lib = tokenizers.Tokenizer(self._lib.model)
        if self._lib.normalizer is not None:
            lib.normalizer = self._lib.normalizer
        if self._lib.pre_tokenizer is not None:
            lib.pre_tokenizer = self._lib.pre_tokenizer
        names = {index: _alias(index) if index in self.control_ids else added[index].content for index in sorted(added)}
        lib.add_tokens(  # in one call, as each call builds the search for all of them anew
            [
                tokenizers.AddedToken(
                    name,
                    special=False,
                    lstrip=added[index].lstrip,
                    rstrip=added[index].rstrip,
                    normalized=added[index].normalized,
                    single_word=added[index].single_word and index not in self.control_ids,
                )
                for index, name in names.items()
            ]
        )
        real = {lib.token_to_id(name): index for index, name in names.items()}
        return lib, {index: to for index, to in real.items() if index is not None}

    def _post_processing(self) -> tuple[list[int], list[int]]:
        bare = self._lib.encode("a", add_special_tokens=False).ids
        full = self._lib.encode("a", add_special_tokens=True).ids
        start = next((i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare), None)
        if start is None:
            raise CheckpointError(
                f"the post-processor of tokenizer.json does more than add tokens around a text: 'a' gives {bare} "
                f"without and {full} with special tokens; only prefixes and suffixes are supported"
            )
        return full[:start], full[start + len(bare) :]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}; fetch the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, but it must hold an object")
    return value


def _spell(lib: tokenizers.Tokenizer, text: str) -> list[int]:
    try:
        ids: list[int] = lib.encode(text, add_special_tokens=False).ids
    except TypeError as error:  # how the library refuses a str that has no UTF-8
        raise InvalidRequestError(
            "the text holds a lone surrogate (U+D800 to U+DFFF), which is no character; send valid Unicode"
        ) from error
    return ids


def _alias(index: int) -> str:
    return f"{ALIAS_OPEN}{index}{ALIAS_CLOSE}"


def _carries_text(content: str) -> bool:
    """Whether an added token that is not special is a shorthand for text (spaces, a word, an HTML element)."""
    inner = content.strip("</>")
    return _HTML.fullmatch(inner) is not None or not re.search(r"[<>\[\]{}|｜]", content)


def _control_pattern(tokens: Iterable[tokenizers.AddedToken]) -> re.Pattern[str]:
    # A trie, so that the time at one character does not grow with the number of tokens (Gemma 3 has six thousand).
    # Each node prefers its children to its own end: the leftmost-longest match that the library makes.
    plain: _Trie = {}
    words = []
    for token in tokens:
        if token.single_word:
            words.append(rf"(?<!\w){re.escape(token.content)}(?!\w)")
            continue
        node = plain
        for char in token.content:
            node = node.setdefault(char, {})
        node[""] = {}
    words.sort(key=len, reverse=True)
    return re.compile("|".join([*words, *([_spell_trie(plain)] if plain else [])]) or r"(?!)")


def _spell_trie(node: "_Trie") -> str:
    branches = [re.escape(char) + _spell_trie(child) for char, child in node.items() if char]
    if not branches:
        return ""
    if len(branches) == 1 and "" not in node:
        return branches[0]
    return f"(?:{'|'.join(branches)}){'?' if '' in node else ''}"


def _content(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _as_list(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, list) else []


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    names = {name: _content(config[name]) for name in _NAMED if config.get(name)}
    extra = config.get("extra_special_tokens")
    return names | {name: _content(token) for name, token in extra.items()} if isinstance(extra, dict) else names


def _add_tokens(lib: tokenizers.Tokenizer, declared: Mapping[str, Any], legacy: Mapping[str, int]) -> None:
    """Adds what tokenizer_config.json or added_tokens.json declare beyond tokenizer.json, or with other flags."""
    known = lib.get_added_tokens_decoder()
    wanted = {
        int(index): _added_token(token) for index, token in sorted(declared.items(), key=lambda item: int(item[0]))
    }
    new = [token for index, token in wanted.items() if index not in known or repr(known[index]) != repr(token)]
    for special, tokens in itertools.groupby(new, key=lambda token: token.special):
        (lib.add_special_tokens if special else lib.add_tokens)(list(tokens))
    for index, token in wanted.items():
        _check_id(lib, token.content, index, "tokenizer_config.json")
    legacy = dict(sorted(legacy.items(), key=lambda item: item[1]))
    lib.add_tokens([content for content in legacy if lib.token_to_id(content) is None])
    for content, index in legacy.items():
        _check_id(lib, content, index, "added_tokens.json")


def _added_token(token: Mapping[str, Any]) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(token["content"], **{key: token[key] for key in _FLAGS if key in token})


def _check_id(lib: tokenizers.Tokenizer, content: str, index: int, name: str) -> None:
    if lib.token_to_id(content) != index:
        raise CheckpointError(
            f"{name} gives the token {content!r} the id {index}, but with tokenizer.json its id is "
            f"{lib.token_to_id(content)}; the two files are not of the same checkpoint"
        )


def _eos_ids(config: Mapping[str, Any]) -> tuple[int, ...]:
    value = config.get("eos_token_id")
    return (value,) if isinstance(value, int) else tuple(value or ())


def _missing(folder: Path) -> str:
    other = next((name for name in ("tokenizer.model", "spiece.model", "tekken.json", "vocab.json") if
                  (folder / name).is_file()), None)  # fmt: skip
    found = other or next((path.name for path in sorted(folder.glob("*.tiktoken"))), None)
    if found is None:
        return f"{folder} has no tokenizer.json; fetch the tokenizer files of the checkpoint into it"
    return (
        f"{folder} has {found} but no tokenizer.json, and only tokenizer.json is read; convert it once with "
        f"transformers: AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
    )
