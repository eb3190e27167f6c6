"""The words that every layer shares: sampling parameters, prompts, deltas, completions, priorities, finish reasons."""

import enum
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from millrace.runtime.errors import InvalidRequestError

BLOCK_SIZE = 16  # tokens per KV block
MAX_CHOICES = 128  # a sequence id has seven bits for the choice
_CHOICE_BITS = 7

RequestId = int
SequenceId = int  # one choice of one request: both numbers packed into one, so that step messages carry one column


def sequence_id(rid: RequestId, choice: int) -> SequenceId:
    return rid << _CHOICE_BITS | choice


def request_of(seq: SequenceId) -> RequestId:
    return seq >> _CHOICE_BITS


def choice_of(seq: SequenceId) -> int:
    return seq & (MAX_CHOICES - 1)


class Lane(enum.StrEnum):
    """A lane of execution: its own stream and its own step counter."""

    PREFILL = "prefill"
    DECODE = "decode"
    SWAP = "swap"  # copies KV blocks to the host and back, and samples nothing


class Priority(enum.IntEnum):
    """Lower runs first. Waiting requests age towards CRITICAL, so that none starves."""

    CRITICAL = 0
    HIGH = 1
    NORMAL = 2
    LOW = 3


class FinishReason(enum.StrEnum):
    """Why a choice ended. Each reason has exactly one author (docs/architecture.md, "One terminal event")."""

    STOP = "stop"  # sampler: EOS or stop id; streamer: stop string
    LENGTH = "length"  # sampler
    CANCELLED = "cancelled"  # scheduler
    DEADLINE = "deadline"  # scheduler
    REFUSED = "refused"  # admission; scheduler for a full queue
    FAILED = "failed"  # scheduler for a failed step; supervisor for a failed engine


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the tokens of one request are drawn, and when it stops.

    Attributes:
        n: choices to generate; they share the prompt's KV blocks.
        max_tokens: upper bound on new tokens; None means the rest of the context.
        min_tokens: EOS and stop ids are not drawn before this many tokens.
        temperature: 0 is greedy.
        top_k: keep the k most likely tokens; 0 or -1 is off.
        top_p: keep the smallest set of tokens whose probability reaches top_p (Holtzman et al. 2020).
        min_p: drop tokens below min_p times the probability of the most likely one.
        repetition_penalty: divides positive and multiplies negative logits of tokens seen in prompt or output
            (Keskar et al. 2019); 1 is off.
        presence_penalty, frequency_penalty: subtracted once, or per occurrence, for tokens seen in the output.
        logit_bias: added to the logits of token ids.
        allowed_token_ids: if given, nothing else can be drawn.
        banned_token_ids: never drawn.
        seed: draws depend only on (seed, choice, position); None takes a fresh one.
        stop: strings that end the text; they are cut off unless include_stop.
        stop_token_ids: ids that end the text like EOS.
        ignore_eos: EOS is a token like any other.
        logprobs: None is off; k >= 0 reports the drawn token and the k most likely ones,
            under the model's distribution before penalties and temperature.
        prompt_logprobs: the same for each prompt token; it turns off prefix-cache hits for this request.
        skip_special_tokens: special tokens leave no text.
    """

    n: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = {}
    allowed_token_ids: Sequence[int] | None = None
    banned_token_ids: Sequence[int] = ()
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True

    def checked(self, vocab_size: int, max_logprobs: int = 20) -> "SamplingParams":
        """The same parameters, with every field of its declared type and within its bounds.

        Raises InvalidRequestError that names the field, the value and the bounds.
        """
        fields = {name: _plain(value) for name, value in msgspec.structs.asdict(self).items()}
        try:
            params = msgspec.convert(fields, SamplingParams)
        except msgspec.ValidationError as error:
            found = re.search(r" - at .*\$\.(\w+)", str(error))
            name = found.group(1) if found else "sampling"
            text = str(error).partition(" - at ")[0]
            raise InvalidRequestError(f"{name} is {fields.get(name)!r}, but: {text}", param=name) from error
        params._check_bounds(vocab_size, max_logprobs)
        return params

    def _check_bounds(self, vocab_size: int, max_logprobs: int) -> None:
        if not 1 <= self.n <= MAX_CHOICES:
            _refuse("n", self.n, f"between 1 and {MAX_CHOICES}")
        if self.max_tokens is not None and self.max_tokens < 0:
            _refuse("max_tokens", self.max_tokens, "at least 0")
        if self.min_tokens < 0 or (self.max_tokens is not None and self.min_tokens > self.max_tokens):
            _refuse("min_tokens", self.min_tokens, f"between 0 and max_tokens ({self.max_tokens})")
        if self.top_k < -1:
            _refuse("top_k", self.top_k, "-1 or 0 (off), or at least 1")
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            _refuse("seed", self.seed, "a 64-bit integer")
        for name, low, high in (
            ("temperature", 0.0, 100.0),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("repetition_penalty", 0.0, 100.0),
            ("presence_penalty", -100.0, 100.0),
            ("frequency_penalty", -100.0, 100.0),
        ):
            value = getattr(self, name)
            if not math.isfinite(value) or not low <= value <= high:
                _refuse(name, value, f"between {low:g} and {high:g}")
        if self.top_p == 0.0:
            _refuse("top_p", self.top_p, "above 0")
        if self.repetition_penalty == 0.0:
            _refuse("repetition_penalty", self.repetition_penalty, "above 0")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            if count is not None and not 0 <= count <= max_logprobs:
                _refuse(name, count, f"between 0 and {max_logprobs}")
        for name in ("logit_bias", "allowed_token_ids", "banned_token_ids", "stop_token_ids"):
            for token in getattr(self, name) or ():
                if not 0 <= token < vocab_size:
                    _refuse(name, token, f"token ids between 0 and {vocab_size - 1}")
        for token, bias in self.logit_bias.items():
            if not math.isfinite(bias) or abs(bias) > 100:
                _refuse("logit_bias", f"{bias} for token {token}", "biases between -100 and 100")
        if self.allowed_token_ids is not None and not set(self.allowed_token_ids) - set(self.banned_token_ids):
            raise InvalidRequestError(
                "allowed_token_ids less banned_token_ids leaves no token to draw", param="allowed_token_ids"
            )
        if any(not stop for stop in self.stop):
            raise InvalidRequestError("stop must not contain an empty string", param="stop")


def _plain(value: Any) -> Any:
    """Sets, arrays and other collections as lists, mappings as dicts; anything else as it is."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return list(value.tolist() if hasattr(value, "tolist") else value)
    return value


def _refuse(name: str, value: Any, wanted: str) -> None:
    raise InvalidRequestError(f"{name} is {value}, but it must be {wanted}", param=name)


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One turn of a conversation, after the server has flattened content parts to text."""

    role: str
    content: str = ""
    name: str | None = None


class TextPrompt(msgspec.Struct, frozen=True, tag="text"):
    text: str
    add_special_tokens: bool = True


class TokensPrompt(msgspec.Struct, frozen=True, tag="tokens"):
    tokens: Sequence[int]


class ChatPrompt(msgspec.Struct, frozen=True, tag="chat"):
    """Messages for the model's chat template.

    Attributes:
        continue_final_message: the last message is left open, and the model goes on with it.
        template_kwargs: extra variables that the template may read.
    """

    messages: Sequence[ChatMessage]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_kwargs: Mapping[str, Any] = {}


Prompt = TextPrompt | TokensPrompt | ChatPrompt
PromptLike = str | Sequence[int] | Sequence[ChatMessage] | Sequence[Mapping[str, str]] | Prompt


def as_prompt(prompt: PromptLike) -> Prompt:
    """Tells text, token ids and chat messages apart. Raises InvalidRequestError for anything else."""
    if isinstance(prompt, Prompt):
        return prompt
    if isinstance(prompt, str):
        return TextPrompt(prompt)
    items = list(prompt)
    if all(isinstance(item, int) and not isinstance(item, bool) for item in items):
        return TokensPrompt([item for item in items if isinstance(item, int)])
    messages = []
    for item in items:
        if isinstance(item, ChatMessage):
            messages.append(item)
        elif isinstance(item, Mapping) and isinstance(item.get("role"), str) and isinstance(item.get("content"), str):
            messages.append(ChatMessage(role=item["role"], content=item["content"], name=item.get("name")))
        else:
            raise InvalidRequestError(
                "a prompt is a string, a list of token ids, or a list of messages with role and content; "
                f"it holds {type(item).__name__}",
                param="prompt",
            )
    return ChatPrompt(messages)


class TopLogprob(msgspec.Struct, frozen=True):
    token_id: int
    token: str
    bytes: bytes
    logprob: float


class TokenLogprob(msgspec.Struct, frozen=True):
    """A drawn (or prompt) token with its log probability and the most likely alternatives, best first."""

    token_id: int
    token: str
    bytes: bytes
    logprob: float | None  # None for the first prompt token, which nothing predicts, and behind broken logits
    top: tuple[TopLogprob, ...] = ()


class Delta(msgspec.Struct, frozen=True):
    """What has come since the last read of one choice: text at whole characters, and the tokens behind it.

    Text may lag behind tokens (an unfinished UTF-8 character, a possible start of a stop string).
    """

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or stop id that ended it


class Choice(msgspec.Struct, frozen=True):
    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None


class Usage(msgspec.Struct, frozen=True):
    """Token counts of a request; the prompt counts once, however many choices share it."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class Completion(msgspec.Struct, frozen=True):
    """The whole answer: what `await runtime.submit(...)` returns."""

    id: str
    model: str
    choices: tuple[Choice, ...]
    usage: Usage
    prompt_token_ids: tuple[int, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        return self.choices[0].finish_reason
