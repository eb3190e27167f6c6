"""Incremental detokenising: the text of a growing token sequence, at whole characters, as it grows."""

import codecs
from collections.abc import Sequence
from typing import Protocol

from millrace.runtime.text.decoding import REPLACEMENT, ByteLevelDecoder, PieceDecoder, TokenTable
from millrace.runtime.text.tokenizer import Tokenizer

# A window without a plan is cut loose after this many tokens that end in U+FFFD: then the model means the character.
_MAX_HELD_TOKENS = 16


class Detokenizer:
    """The text of one stream of tokens.

    The concatenation of all that `push` and `finish` return equals `tokenizer.decode(prompt_tail + ids)` less the text
    of the prompt, however the ids are cut into calls. A character that the prompt began and the output ends belongs to
    the output. For a tokenizer with byte fallback, a run of byte tokens is text only if all of it is UTF-8 (the rule of
    the `tokenizers` library), so its text comes when the run ends.

    Args:
        prompt_tail: the last tokens of the prompt, or all of them. They decide whether the first piece loses its
            leading space, and complete a character that is cut by the border; eight tokens are enough for that
            unless more than those are special tokens that are skipped.
        skip_special_tokens: special tokens leave no text.
    """

    __slots__ = ("_clean", "_stream", "_text")

    def __init__(self, tokenizer: Tokenizer, prompt_tail: Sequence[int], skip_special_tokens: bool) -> None:
        table = tokenizer.table(skip_special_tokens)
        plan = tokenizer.decoder_plan
        self._text = table.text  # [vocab_size]
        self._stream: _Stream
        if isinstance(plan, ByteLevelDecoder):
            self._stream = _ByteLevelStream(table, prompt_tail)
        elif isinstance(plan, PieceDecoder):
            self._stream = _PieceStream(tokenizer, plan, table, prompt_tail)
        else:
            self._stream = _WindowStream(tokenizer, prompt_tail, skip_special_tokens)
        self._clean = self._stream.clean

    def push_one(self, token_id: int) -> str:
        """`push` of one token."""
        if self._clean and token_id < len(self._text):
            piece = self._text[token_id]
            if piece is not None:
                return piece
        return self.push((token_id,))

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete, which may be empty or start with text of earlier tokens."""
        if self._clean:  # nothing is held back, so a piece of whole characters is its own text
            try:
                return "".join([self._text[index] for index in token_ids])  # type: ignore[misc]
            except (IndexError, TypeError):
                pass  # an id without a token, or a piece that is not whole characters
        text = self._stream.push(token_ids)
        self._clean = self._stream.clean
        return text

    def finish(self) -> str:
        """The text held back, in which an unfinished character is U+FFFD. Call it once, at the end."""
        return self._stream.finish()


class _Stream(Protocol):
    """One family of decoders. `clean` says that the next piece of whole characters is its own text."""

    clean: bool

    def push(self, token_ids: Sequence[int]) -> str: ...

    def finish(self) -> str: ...


class _ByteLevelStream:
    __slots__ = ("_bytes", "_held", "clean")

    def __init__(self, table: TokenTable, prompt_tail: Sequence[int]) -> None:
        self._bytes = table.bytes  # [vocab_size]
        self._held = b""  # the start of a character, at most 3 bytes
        self.clean = True
        self.push(prompt_tail)

    def push(self, token_ids: Sequence[int]) -> str:
        size = len(self._bytes)
        data = self._held + b"".join([self._bytes[index] for index in token_ids if index < size])
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._held = data[used:]
        self.clean = not self._held
        return text

    def finish(self) -> str:
        held, self._held = self._held, b""
        return held.decode("utf-8", "replace")


class _PieceStream:
    __slots__ = ("_broken", "_first", "_plan", "_run", "_strip", "_table", "_tokenizer", "clean")

    def __init__(self, tokenizer: Tokenizer, plan: PieceDecoder, table: TokenTable, prompt_tail: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._plan = plan
        self._table = table
        self._run = b""  # byte tokens since the last other token, or since the run was found to be broken
        self._broken = False  # the current run is not UTF-8, so each of its bytes is U+FFFD
        self._first = True  # the decoder has seen no piece
        self._strip = plan.strip[1]  # leading characters that may still be taken off
        self.clean = False
        self.push(prompt_tail)
        # Whole characters at the end of the prompt are the prompt's; only the rest of its last run is still open.
        _, used = codecs.utf_8_decode(self._run, "strict", False)
        if used:
            self._leave_first(self._surface(self._run[:used].decode()))
        self._run = self._run[used:]
        self._settle()

    def push(self, token_ids: Sequence[int]) -> str:
        out: list[str] = []
        for index in token_ids:
            if index >= len(self._table.text) or index in self._table.skipped:
                continue
            piece = self._table.text[index]
            if piece is None:
                self._push_byte(self._table.bytes[index], out)
                continue
            self._end_run(out)
            if self._first:
                raw = self._plan.piece(self._tokenizer.token_piece(index) or "")
                piece = self._plan.surface(raw, first=True)
            out.append(self._leave_first(piece))
        self._settle()
        return "".join(out)

    def finish(self) -> str:
        out: list[str] = []
        self._end_run(out)
        return "".join(out)

    def _push_byte(self, byte: bytes, out: list[str]) -> None:
        self._run += byte
        if not self._broken:
            try:
                codecs.utf_8_decode(self._run, "strict", False)
            except UnicodeDecodeError:
                self._broken = True
        if self._broken:  # nothing that follows can mend the run, so it need not wait
            out.append(self._leave_first(REPLACEMENT * len(self._run)))
            self._run = b""

    def _end_run(self, out: list[str]) -> None:
        if self._run:
            try:
                text = self._surface(self._run.decode())
            except UnicodeDecodeError:
                text = REPLACEMENT * len(self._run)
            out.append(self._leave_first(text))
        self._run, self._broken = b"", False

    def _surface(self, text: str) -> str:
        return self._plan.surface(text, first=self._first)

    def _leave_first(self, text: str) -> str:
        self._first = False
        if self._strip and text:
            char = self._plan.strip[0]
            kept = text.lstrip(char)
            cut = min(self._strip, len(text) - len(kept))
            text = text[cut:]
            self._strip = 0 if text else self._strip - cut
        return text

    def _settle(self) -> None:
        self.clean = not (self._run or self._broken or self._first or self._strip)


class _WindowStream:
    """Decodes a window of tokens again and emits what grew: right for decoders that look only at near neighbours."""

    __slots__ = ("_emitted", "_skip", "_start", "_tokenizer", "_window", "clean")

    def __init__(self, tokenizer: Tokenizer, prompt_tail: Sequence[int], skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window = list(prompt_tail)
        self._start = len(self._window)  # tokens of the window whose text is out already
        self._emitted = len(self._decode(self._window))  # characters of the window's text that are out already
        self.clean = False

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join([self._push_one(index) for index in token_ids])

    def finish(self) -> str:
        text = self._decode(self._window)[self._emitted :]
        self._emitted += len(text)
        return text

    def _push_one(self, index: int) -> str:
        self._window.append(index)
        text = self._decode(self._window)
        held = len(self._window) - self._start
        if len(text) <= self._emitted or (text.endswith(REPLACEMENT) and held < _MAX_HELD_TOKENS):
            return ""
        fresh = text[self._emitted :]
        # The tokens just told stay as the context of the next ones; what lay before them goes.
        self._window = self._window[self._start :]
        self._start = len(self._window)
        self._emitted = len(self._decode(self._window))
        return fresh

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)
