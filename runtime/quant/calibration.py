"""Text for calibration and evaluation: files, or conversations made from a seed, as tokens cut into windows."""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from millrace.runtime.errors import ConfigError, InvalidRequestError
from millrace.runtime.text.chat import ChatTemplate, encode_chat
from millrace.runtime.text.tokenizer import Tokenizer
from millrace.runtime.types import ChatMessage

CALIBRATION_SEED, HELD_OUT_SEED = 1001, 1002  # neither is a seed that grist was trained or examined with
_PART_CHARS = 1 << 20  # of a plain text that are tokenised at a time


class Token(NamedTuple):
    """`scored`: the model was to learn to write it. Of a conversation only the replies count; of a text, all."""

    id: int
    scored: bool


class Windows(NamedTuple):
    """Tokens in rows of one length."""

    ids: Tensor  # [count, length] int64
    scored: Tensor  # [count, length] bool

    def rows(self, start: int, end: int) -> "Windows":
        return Windows(self.ids[start:end], self.scored[start:end])


class TextSource:
    """A model's tokenizer and chat template, which turn text into the tokens that the model would see in use."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self._tokenizer = tokenizer
        self._template = template

    @classmethod
    def load(cls, folder: Path) -> "TextSource":
        """Raises CheckpointError where `folder` has no readable tokenizer."""
        tokenizer = Tokenizer.load(folder)
        return cls(tokenizer, ChatTemplate.load(folder, tokenizer.special_tokens))

    def file(self, path: Path) -> Iterator[Token]:
        """The tokens of a file, read as they are wanted.

        A `.jsonl` file holds one object a line: {"text": "..."}, or {"messages": [...]}, which goes through the chat
        template, and of which the assistant's messages are scored. Any other file is one plain text in UTF-8.

        Raises ConfigError that names the file and the line at fault.
        """
        if not path.is_file():
            raise ConfigError(f"there is no file {path}: give a text file, or JSONL with text or messages")
        parts = self._jsonl(path) if path.suffix == ".jsonl" else self._plain(path)
        try:
            yield from itertools.chain.from_iterable(parts)
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not a text in UTF-8: {error}") from None

    def built_in(self, seed: int) -> Iterator[Token]:
        """An endless stream of the short conversations that grist learned from, in this model's chat format if it has
        one."""
        # Imported where it is wanted: its tables take a moment to build.
        from millrace.runtime.assets.grist.corpus import conversations

        for conversation in conversations(seed):
            system = [ChatMessage(role="system", content=conversation.system)] if conversation.system else []
            turns = [
                ChatMessage(role=role, content=text)
                for turn in conversation.turns
                for role, text in (("user", turn.user), ("assistant", turn.reply))
            ]
            if not turns:
                yield from self._text(conversation.text)
            elif self._template.source is None:
                yield from self._text("\n".join(str(message.content) for message in (*system, *turns)) + "\n\n")
            else:
                try:
                    yield from self._chat([*system, *turns])
                except InvalidRequestError:
                    if not system:
                        raise
                    yield from self._chat(turns)  # some templates know no system message

    def _text(self, text: str) -> list[Token]:
        """A document of its own, which ends as texts of this model end."""
        end = self._tokenizer.eos_ids[:1]
        return [Token(index, True) for index in (*self._tokenizer.encode(text), *end)]

    def _chat(self, messages: Sequence[Mapping[str, Any] | ChatMessage]) -> list[Token]:
        whole = self._encode_chat(messages)
        scored = [False] * len(whole)
        for at, message in enumerate(messages):
            role = message.role if isinstance(message, ChatMessage) else message.get("role")
            if role != "assistant":
                continue
            before = self._encode_chat(messages[:at], add_generation_prompt=True) if at else []
            after = self._encode_chat(messages[: at + 1])
            if whole[: len(before)] != before or whole[: len(after)] != after:
                # A template that tells earlier turns otherwise than the last one: there is no saying what is a reply.
                return [Token(index, True) for index in whole]
            scored[len(before) : len(after)] = [True] * (len(after) - len(before))
        return list(map(Token, whole, scored))

    def _encode_chat(
        self, messages: Sequence[Mapping[str, Any] | ChatMessage], add_generation_prompt: bool = False
    ) -> list[int]:
        return encode_chat(self._tokenizer, self._template, messages, add_generation_prompt=add_generation_prompt)

    def _plain(self, path: Path) -> Iterator[list[Token]]:
        with path.open(encoding="utf-8") as opened:
            for number in itertools.count():
                lines = opened.readlines(_PART_CHARS)
                if not lines:
                    return
                ids = self._tokenizer.encode("".join(lines), add_special_tokens=number == 0)
                yield [Token(index, True) for index in ids]

    def _jsonl(self, path: Path) -> Iterator[list[Token]]:
        with path.open(encoding="utf-8") as opened:
            for number, line in enumerate(opened, 1):
                if line.strip():
                    try:
                        yield self._document(json.loads(line))
                    except (ValueError, InvalidRequestError) as error:
                        raise ConfigError(f"{path}, line {number}: {error}") from None

    def _document(self, values: Any) -> list[Token]:
        if isinstance(values, dict) and isinstance(values.get("text"), str):
            return self._text(values["text"])
        messages = values.get("messages") if isinstance(values, dict) else None
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise ValueError('a line must be an object with "text", a string, or "messages", a list of objects')
        return self._chat(messages)


def windows(tokens: Iterable[Token], length: int, most: int) -> Windows:
    """The first tokens, cut into rows: up to `most` of `length`. What does not fill a row is left out."""
    taken = list(itertools.islice(tokens, length * most))
    whole = len(taken) // length
    ids = torch.tensor([token.id for token in taken[: whole * length]], dtype=torch.int64)
    scored = torch.tensor([token.scored for token in taken[: whole * length]], dtype=torch.bool)
    return Windows(ids.view(whole, length), scored.view(whole, length))
