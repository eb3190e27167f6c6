"""Log probabilities in the three shapes that clients read: chat, legacy completions, and vLLM's prompt_logprobs."""

import codecs
from collections.abc import Iterable, Sequence

from millrace.runtime.types import TokenLogprob, TopLogprob

FLOOR = -9999.0  # JSON has no infinity; OpenAI's value for "practically impossible"


def _floor(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, FLOOR)


def chat_logprobs(tokens: Iterable[TokenLogprob]) -> dict[str, object]:
    """`choices[].logprobs` of a chat completion."""
    return {
        "content": [
            {**_chat_token(token), "top_logprobs": [_chat_token(top) for top in token.top]} for token in tokens
        ],
        "refusal": None,
    }


def _chat_token(token: TokenLogprob | TopLogprob) -> dict[str, object]:
    logprob = token.logprob
    return {
        "token": token.token,
        "logprob": FLOOR if logprob is None else max(logprob, FLOOR),
        "bytes": list(token.bytes),
    }


def _legacy_name(token: TokenLogprob | TopLogprob) -> str:
    """The token's text; for a part of a character its bytes, as OpenAI writes them, so that names stay apart."""
    try:
        return token.bytes.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.bytes)


class TextOffset:
    """Where the next token stands in a choice's text, in characters; a part of a character adds none until its last."""

    def __init__(self, offset: int = 0) -> None:
        self._offset = offset
        self._decoder = codecs.getincrementaldecoder("utf-8")("ignore")

    def advance(self, data: bytes) -> int:
        """The offset of a token with these bytes."""
        offset = self._offset
        self._offset += len(self._decoder.decode(data))
        return offset


def legacy_logprobs(tokens: Sequence[TokenLogprob], offset: TextOffset) -> dict[str, object]:
    """`choices[].logprobs` of a legacy completion; `offset` is where the first token stands, and is moved on.

    A token's alternatives always hold the token itself, as OpenAI's do: with k asked for there are k or k + 1. A token
    that nothing predicts, the first of the prompt, has null for both.
    """
    names = [_legacy_name(token) for token in tokens]
    return {
        "tokens": names,
        "token_logprobs": [_floor(token.logprob) for token in tokens],
        "top_logprobs": [
            None
            if token.logprob is None
            else {**{_legacy_name(top): _floor(top.logprob) for top in token.top}, name: _floor(token.logprob)}
            for name, token in zip(names, tokens, strict=True)
        ],
        "text_offset": [offset.advance(token.bytes) for token in tokens],
    }


def prompt_logprobs(tokens: Sequence[TokenLogprob]) -> list[dict[str, dict[str, object]] | None]:
    """vLLM's `prompt_logprobs`: for each prompt token its id and the likeliest ids; null for the first.

    `rank` counts from 1; it is null for a token beyond the alternatives that were asked for.
    """
    rows: list[dict[str, dict[str, object]] | None] = []
    for token in tokens:
        if token.logprob is None:
            rows.append(None)
            continue
        row = {str(token.token_id): _ranked(token, None)}
        row.update({str(top.token_id): _ranked(top, rank) for rank, top in enumerate(token.top, 1)})
        rows.append(row)
    return rows


def _ranked(token: TokenLogprob | TopLogprob, rank: int | None) -> dict[str, object]:
    return {"logprob": _floor(token.logprob), "rank": rank, "decoded_token": token.token}
