"""Answers as bytes: whole objects, and chunks cut from templates that are built once per request.

A chunk that only carries text is a prefix, the text as JSON, and a suffix. Everything else is rare and encoded in full.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec

from millrace.runtime.handle import RequestHandle
from millrace.runtime.types import Choice, Completion, Delta, FinishReason, TokenLogprob, Usage
from millrace.server.logprobs import TextOffset, chat_logprobs, legacy_logprobs, prompt_logprobs

_encode = msgspec.json.Encoder().encode
_SLOT = "\x00text\x00"  # stands in a template where the text goes; it cannot occur in an encoded object elsewhere
_SLOT_BYTES = _encode(_SLOT)

# Reasons beyond the official ones would break strict enums; an answer that was cut short is one of bounded length.
_FINISH = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


def finish_reason(reason: FinishReason | None) -> str | None:
    return None if reason is None else _FINISH.get(reason, "length")


def usage_object(usages: Sequence[Usage]) -> dict[str, Any]:
    prompt = sum(usage.prompt_tokens for usage in usages)
    completion = sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in usages)},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


class Format(Protocol):
    """How one endpoint writes choices. `index` counts over all prompts of the request."""

    @property
    def chunk_object(self) -> str: ...

    def chunk_choice(self, index: int, text: str, logprobs: object, finish: str | None) -> dict[str, Any]: ...

    def opening(self, index: int, handle: RequestHandle) -> list[dict[str, Any]]:
        """Choices of the chunks that come before a choice's first token."""

    def finish_apart(self) -> bool:
        """The reason comes in a chunk of its own, after the last text."""

    def logprobs(self, index: int, tokens: tuple[TokenLogprob, ...]) -> object: ...


class ChatFormat:
    """Chat completions."""

    chunk_object = "chat.completion.chunk"

    def __init__(self, echo: str = "") -> None:
        self._echo = echo

    def chunk_choice(self, index: int, text: str, logprobs: object, finish: str | None) -> dict[str, Any]:
        delta = {} if finish is not None else {"content": text}
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def opening(self, index: int, handle: RequestHandle) -> list[dict[str, Any]]:
        role = {"role": "assistant", "content": ""}
        chunks: list[dict[str, Any]] = [{"index": index, "delta": role, "logprobs": None, "finish_reason": None}]
        if self._echo:
            chunks.append(self.chunk_choice(index, self._echo, None, None))
        return chunks

    def finish_apart(self) -> bool:
        return True

    def logprobs(self, index: int, tokens: tuple[TokenLogprob, ...]) -> object:
        return chat_logprobs(tokens)

    def whole(self, completion: Completion, name: str, created: int, logprobs: bool, probe: bool) -> bytes:
        """A chat completion; `probe` adds vLLM's prompt_logprobs."""
        answer: dict[str, Any] = {
            "id": name,
            "object": "chat.completion",
            "created": created,
            "model": completion.model,
            "choices": [self._choice(choice, logprobs) for choice in completion.choices],
            "usage": usage_object([completion.usage]),
        }
        if probe:
            answer["prompt_logprobs"] = prompt_logprobs(completion.prompt_logprobs or ())
        return _encode(answer)

    def _choice(self, choice: Choice, logprobs: bool) -> dict[str, Any]:
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": self._echo + choice.text, "refusal": None},
            "logprobs": chat_logprobs(choice.logprobs or ()) if logprobs else None,
            "finish_reason": finish_reason(choice.finish_reason),
            "stop_reason": choice.stop_reason,
        }


class CompletionFormat:
    """Legacy completions of one or several prompts with `n` choices each; `echo` holds a text for each prompt."""

    chunk_object = "text_completion"

    def __init__(self, n: int, echo: Sequence[str] | None = None, logprobs: bool = False) -> None:
        self._n = n
        self._echo = echo
        self._logprobs = logprobs
        self._offsets: dict[int, TextOffset] = {}  # of each choice, behind what has been written

    def chunk_choice(self, index: int, text: str, logprobs: object, finish: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def opening(self, index: int, handle: RequestHandle) -> list[dict[str, Any]]:
        if self._echo is None:
            return []
        text = self._echo[index // self._n]
        tokens = handle.mailbox.prompt_logprobs
        shown = legacy_logprobs(tokens, TextOffset()) if self._logprobs and tokens is not None else None
        self._offsets[index] = TextOffset(len(text))
        return [self.chunk_choice(index, text, shown, None)]

    def finish_apart(self) -> bool:
        return False

    def logprobs(self, index: int, tokens: tuple[TokenLogprob, ...]) -> object:
        return legacy_logprobs(tokens, self._offsets.setdefault(index, TextOffset()))

    def whole(self, completions: Sequence[Completion], name: str, created: int, probe: bool) -> bytes:
        """A text completion; `probe` adds vLLM's prompt_logprobs to each choice."""
        choices = []
        for number, completion in enumerate(completions):
            choices += [self._choice(number, completion, choice, probe) for choice in completion.choices]
        return _encode(
            {
                "id": name,
                "object": "text_completion",
                "created": created,
                "model": completions[0].model,
                "choices": choices,
                "usage": usage_object([completion.usage for completion in completions]),
            }
        )

    def _choice(self, number: int, completion: Completion, choice: Choice, probe: bool) -> dict[str, Any]:
        echo = "" if self._echo is None else self._echo[number]
        tokens = choice.logprobs or ()
        if self._echo is not None:
            tokens = (*(completion.prompt_logprobs or ()), *tokens)
        written: dict[str, Any] = {
            "index": number * self._n + choice.index,
            "text": echo + choice.text,
            "logprobs": legacy_logprobs(tokens, TextOffset()) if self._logprobs else None,
            "finish_reason": finish_reason(choice.finish_reason),
            "stop_reason": choice.stop_reason,
        }
        if probe:
            written["prompt_logprobs"] = prompt_logprobs(completion.prompt_logprobs or ())
        return written


class Chunks:
    """Writes the chunks of one answer, each through `frame`, which wraps a JSON object for its carrier.

    With `usage` every chunk has the key, null but for the last; with `running` it holds the figures so far.
    """

    def __init__(
        self,
        form: Format,
        name: str,
        created: int,
        model: str,
        *,
        frame: Callable[[bytes], bytes],
        usage: bool,
        running: Callable[[], dict[str, Any]] | None = None,
    ) -> None:
        self._form = form
        self._head = {"id": name, "object": form.chunk_object, "created": created, "model": model}
        self._frame = frame
        self._usage = usage
        self._running = running
        self._templates: dict[int, tuple[bytes, bytes]] = {}  # of the choices that have been opened

    def read(self, handle: RequestHandle, base: int) -> bytes:
        """Takes what has come for a request whose first choice has the index `base`, as framed chunks."""
        written = b""
        for delta in handle.take():
            index = base + delta.index
            template = self._templates.get(index)
            if template is None:
                written += self._open(index, handle)
                template = self._templates[index]
            if delta.finish_reason is None and delta.logprobs is None and self._running is None:
                if delta.text:
                    written += self._frame(template[0] + _encode(delta.text) + template[1])
            else:
                written += self._full(index, delta)
        return written

    def chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        """Any chunk, encoded in full."""
        return self._frame(self._encoded(choices, usage))

    def _encoded(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        body: dict[str, Any] = {**self._head, "choices": choices}
        if usage is None and self._running is not None:
            usage = self._running()
        if self._usage or usage is not None:
            body["usage"] = usage
        return _encode(body)

    def _open(self, index: int, handle: RequestHandle) -> bytes:
        template = self._encoded([self._form.chunk_choice(index, _SLOT, None, None)])
        before, after = template.split(_SLOT_BYTES)
        self._templates[index] = before, after
        return b"".join(self.chunk([choice]) for choice in self._form.opening(index, handle))

    def _full(self, index: int, delta: Delta) -> bytes:
        form = self._form
        logprobs = None if delta.logprobs is None else form.logprobs(index, delta.logprobs)
        finish = finish_reason(delta.finish_reason)
        apart = finish is not None and form.finish_apart()
        written = b""
        if delta.text or logprobs is not None or (finish is not None and not apart):
            choice = form.chunk_choice(index, delta.text, logprobs, None if apart else finish)
            if finish is not None and not apart:
                choice["stop_reason"] = delta.stop_reason
            written = self.chunk([choice])
        if apart:
            choice = form.chunk_choice(index, "", None, finish)
            choice["stop_reason"] = delta.stop_reason
            written += self.chunk([choice])
        return written
