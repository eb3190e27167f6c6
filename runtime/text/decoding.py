"""Tables from token id to text and bytes, read once from a tokenizer's decoder, so that decoding one token is a lookup.

Two families of decoders cover nearly all published language models, and both are pure functions of the token's piece
but for a few rules at borders:

* byte-level BPE (GPT-2, Llama 3, Qwen): each piece is a byte string, the text is the UTF-8 of their concatenation;
* piece decoders (SentencePiece style: Llama 2, Mistral, Gemma): pieces are text with a stand-in for the space, runs of
  `<0xNN>` pieces are bytes, and the first piece may lose its leading space.

Every other decoder is served by decoding a window of tokens through the library (`runtime/text/detokenizer.py`).
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

import tokenizers

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclasses.dataclass(frozen=True, slots=True)
class TokenTable:
    """What each token id stands for, under one choice of skip_special_tokens.

    Attributes:
        text: [vocab_size] the token's text where it is whole characters and depends on nothing else, "" for a token
            that leaves no text, None where only its bytes are known.
        bytes: [vocab_size] the exact bytes of the token.
        skipped: ids that the decoder never sees (special tokens under skip_special_tokens).
    """

    text: Sequence[str | None]
    bytes: Sequence[bytes]
    skipped: frozenset[int]


@dataclasses.dataclass(frozen=True, slots=True)
class ByteLevelDecoder:
    """Text is the UTF-8 of the pieces' bytes; each maximal malformed part becomes one U+FFFD."""


@dataclasses.dataclass(frozen=True, slots=True)
class PieceDecoder:
    """Text is the concatenation of pieces, under the rules of the `tokenizers` library for runs of byte pieces.

    Attributes:
        replacements: (from, to) pairs applied within each piece, before byte pieces are recognised.
        byte_fallback: `<0xNN>` pieces are bytes; a whole run of them becomes text if it is UTF-8, else one
            U+FFFD per byte.
        space: the character that a Metaspace decoder turns into a space, or None; it is applied after byte fallback.
        drop_first_space: the first piece loses its `space` characters instead.
        strip: (character, at most how many) taken off the start of the whole text.
    """

    replacements: tuple[tuple[str, str], ...]
    byte_fallback: bool
    space: str | None
    drop_first_space: bool
    strip: tuple[str, int]

    def piece(self, token: str) -> str:
        for pattern, content in self.replacements:
            token = token.replace(pattern, content)
        return token

    def byte(self, piece: str) -> int | None:
        """The byte that a piece (after replacements) stands for, or None."""
        if not self.byte_fallback:
            return None
        match = _BYTE_PIECE.fullmatch(piece)
        return int(match[1], 16) if match else None

    def surface(self, piece: str, first: bool) -> str:
        if self.space is None:
            return piece
        return piece.replace(self.space, "" if first and self.drop_first_space else " ")


DecoderPlan = ByteLevelDecoder | PieceDecoder


def plan_decoder(decoder: Any) -> DecoderPlan | None:
    """The plan of a `tokenizers` decoder, or None where its text is not a function of pieces that we know."""
    if decoder is None:
        return None
    spec = json.loads(decoder.__getstate__())
    steps = spec["decoders"] if spec["type"] == "Sequence" else [spec]
    kinds = [step["type"] for step in steps]
    if kinds in (["ByteLevel"], ["ByteLevel", "Fuse"]):
        return ByteLevelDecoder()
    return _plan_pieces(steps)


def _plan_pieces(steps: Sequence[dict[str, Any]]) -> PieceDecoder | None:
    # Accepted in this order only: Replace*, ByteFallback?, Metaspace?, Fuse?, Strip?. A Replace behind Fuse or a Strip
    # before it works on something other than single pieces.
    rest = list(steps)
    replacements: list[tuple[str, str]] = []
    while rest and rest[0]["type"] == "Replace" and rest[0]["pattern"].get("String"):
        replacements.append((rest[0]["pattern"]["String"], rest.pop(0)["content"]))
    byte_fallback = bool(rest) and rest[0]["type"] == "ByteFallback"
    if byte_fallback:
        rest.pop(0)
    space, drop_first = None, False
    if rest and rest[0]["type"] == "Metaspace":
        step = rest.pop(0)
        space = step["replacement"]
        drop_first = step.get("prepend_scheme", "always") != "never"
    strip = (" ", 0)
    if rest and rest[0]["type"] == "Fuse":
        rest.pop(0)
        if rest and rest[0]["type"] == "Strip" and rest[0]["stop"] == 0:
            step = rest.pop(0)
            strip = (step["content"], step["start"])
    if rest or not (replacements or byte_fallback or space):
        return None
    return PieceDecoder(tuple(replacements), byte_fallback, space, drop_first, strip)


def token_table(lib: tokenizers.Tokenizer, plan: DecoderPlan | None, tokens: Sequence[str | None]) -> TokenTable:
    """The table in which special tokens are text; `without` gives the one that skips them.

    Args:
        tokens: [vocab_size] as the vocabulary spells them, None for ids without a token.
    """
    holes = frozenset(index for index, token in enumerate(tokens) if token is None)
    if isinstance(plan, ByteLevelDecoder):
        alphabet = byte_level_alphabet()
        known, translation = frozenset(alphabet), str.maketrans({char: chr(byte) for char, byte in alphabet.items()})
        raw = [_byte_level_bytes(token or "", known, translation) for token in tokens]
        return TokenTable([_whole_characters(data) for data in raw], raw, holes)
    if isinstance(plan, PieceDecoder):
        text: list[str | None] = []
        raw = []
        for token in tokens:
            piece = plan.piece(token or "")
            byte = plan.byte(piece)
            surface = plan.surface(piece, first=False)
            text.append(surface if byte is None else None)
            raw.append(surface.encode() if byte is None else bytes((byte,)))
        return TokenTable(text, raw, holes)
    # No plan: the text of a token depends on its neighbours, and what it shows alone is the best there is.
    raw = [lib.decode([index], skip_special_tokens=False).encode() for index in range(len(tokens))]
    return TokenTable([None] * len(tokens), raw, holes)


def without(table: TokenTable, skipped: frozenset[int]) -> TokenTable:
    """The same table, in which the tokens of `skipped` leave no text."""
    text, raw = list(table.text), list(table.bytes)
    for index in skipped:
        text[index], raw[index] = "", b""
    return TokenTable(text, raw, table.skipped | skipped)


def byte_level_alphabet() -> dict[str, int]:
    """The GPT-2 bijection from printable characters to bytes (Radford et al. 2019): printable Latin-1 bytes stand for
    themselves, the other 68 are moved up to U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in frozenset(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + rank): byte for rank, byte in enumerate(moved)}


def _byte_level_bytes(token: str, known: frozenset[str], translation: dict[int, Any]) -> bytes:
    # A token with any other character (an added token, mostly) stands for its own UTF-8, as in the library.
    if known.issuperset(token):
        return token.translate(translation).encode("latin-1")
    return token.encode()


def _whole_characters(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None
