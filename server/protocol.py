"""Requests as clients write them, checked against the limits and turned into prompts and sampling parameters."""

from collections.abc import Sized
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from millrace.runtime.config import Limits
from millrace.runtime.errors import ContextLengthError, ModelNotFoundError
from millrace.runtime.types import ChatMessage, ChatPrompt, Priority, SamplingParams, TextPrompt, TokensPrompt
from millrace.server.body import check_depth, decode
from millrace.server.context import Context
from millrace.server.errors import BadRequest
from millrace.server.fields import check_fields

S = TypeVar("S", bound=Sized | None)

# Bounds of types rather than of policy: what a token id or a count can be at all.
Count = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Role = Literal["system", "developer", "user", "assistant", "tool", "function"]

DEFAULT_COMPLETION_TOKENS = 16  # of the legacy endpoint, as OpenAI's specification has it
_MAX_TEMPLATE_KWARGS = 32

# Variables of the template that the request's own fields set, or that would reach into the renderer.
_RESERVED_KWARGS = frozenset(
    {
        "add_generation_prompt",
        "bos_token",
        "chat_template",
        "continue_final_message",
        "conversation",
        "documents",
        "eos_token",
        "messages",
        "pad_token",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tools",
        "unk_token",
    }
)


class ContentPart(msgspec.Struct):
    type: str
    text: str | None = None


class Message(msgspec.Struct):
    role: Role
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[object] | None = None
    function_call: object = None


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class CommonRequest(msgspec.Struct, kw_only=True):
    """The fields that both endpoints share. None is the same as absent."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Count | None = None
    max_tokens: Count | None = None
    min_tokens: Count | None = None
    temperature: float | None = None
    top_k: Count | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[TokenId, float] | None = None
    allowed_token_ids: list[TokenId] | None = None
    seed: Seed | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[TokenId] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: Count | None = None
    echo: bool | None = None
    best_of: Count | None = None
    priority: Count | str | None = None
    service_tier: str | None = None
    deadline_s: float | None = None
    request_id: str | None = None
    cache_salt: str | None = None


class ChatRequest(CommonRequest):
    messages: list[Message]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Count | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, object] | None = None


class CompletionRequest(CommonRequest):
    prompt: msgspec.Raw  # a string, a list of strings, a list of ids, or a list of lists of ids
    logprobs: Count | None = None
    add_special_tokens: bool | None = None


CHAT_FIELDS = frozenset(ChatRequest.__struct_encode_fields__)
COMPLETION_FIELDS = frozenset(CompletionRequest.__struct_encode_fields__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A checked request: what to submit, and how the answer is to be written.

    Attributes:
        prompts: one for chat; choice j of prompt i has the index i * n + j.
        request_id: the client's own name for the request, or None.
        deadline: seconds, or None.
        logprobs: whether the answer shows log probabilities; how many stands in `sampling`.
        show_prompt_logprobs: whether the answer shows vLLM's `prompt_logprobs`.
        echo: stands before the text of each choice; for prompts of ids it is decoded by the handler.
    """

    prompts: list[ChatPrompt | TextPrompt | TokensPrompt]
    sampling: SamplingParams
    priority: Priority
    deadline: float | None
    request_id: str | None
    cache_salt: str
    stream: bool
    include_usage: bool
    continuous_usage: bool
    logprobs: bool
    show_prompt_logprobs: bool
    echo: bool


def parse_chat(body: bytes, context: Context, extra: frozenset[str] = frozenset(), *, streams: bool = False) -> Job:
    """Raises BadRequest or MillraceError that names the field at fault.

    `extra` names fields that the caller reads; `streams` says that the carrier knows streamed answers only.
    """
    limits = context.limits
    _check_names(body, context, CHAT_FIELDS | extra, chat=True)
    request = decode(body, ChatRequest)
    if streams and request.stream is False:
        raise BadRequest("answers on a WebSocket are always streamed; leave stream out", "stream", "unsupported_value")
    request.stream = streams or request.stream
    messages = _messages(request.messages, limits)
    wants = bool(request.logprobs)
    if request.top_logprobs is not None and not wants:
        raise BadRequest("top_logprobs needs logprobs: true", "top_logprobs")
    continue_final = bool(request.continue_final_message)
    if continue_final and request.add_generation_prompt:
        raise BadRequest(
            "continue_final_message and add_generation_prompt exclude each other", "continue_final_message"
        )
    prompt = ChatPrompt(
        messages=messages,
        add_generation_prompt=not continue_final and request.add_generation_prompt is not False,
        continue_final_message=continue_final,
        template_kwargs=_template_kwargs(request.chat_template_kwargs or {}, limits),
    )
    name = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
    top = _within("top_logprobs", request.top_logprobs or 0, 0, limits.max_logprobs)
    return _job(
        request,
        context,
        prompts=[prompt],
        max_tokens=(name, getattr(request, name)),
        logprobs=top if wants else None,
        echo=bool(request.echo),
    )


def parse_completion(body: bytes, context: Context) -> Job:
    """Raises BadRequest or MillraceError that names the field at fault."""
    _check_names(body, context, COMPLETION_FIELDS, chat=False)
    request = decode(body, CompletionRequest)
    if request.logprobs is not None:
        _within("logprobs", request.logprobs, 0, context.limits.max_logprobs)
    max_tokens = DEFAULT_COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
    return _job(
        request,
        context,
        prompts=_prompts(request.prompt, request.add_special_tokens is not False, context),
        max_tokens=("max_tokens", max_tokens),
        logprobs=request.logprobs,
        echo=bool(request.echo),
    )


def _check_names(body: bytes, context: Context, known: frozenset[str], chat: bool) -> None:
    check_depth(body, context.limits)
    fields = decode(body, dict[str, msgspec.Raw])
    unknown = check_fields(fields, known, chat)
    if unknown:
        context.saw_unknown(unknown)


def _job(
    request: CommonRequest,
    context: Context,
    *,
    prompts: list[ChatPrompt | TextPrompt | TokensPrompt],
    max_tokens: tuple[str, int | None],
    logprobs: int | None,
    echo: bool,
) -> Job:
    limits, runtime = context.limits, context.runtime
    if request.model:
        _label("model", request.model, limits)
        if request.model != runtime.model_name:
            raise ModelNotFoundError(
                f"there is no model {request.model!r} here; this server has {runtime.model_name!r}", param="model"
            )
    stream = bool(request.stream)
    options = request.stream_options
    if options is not None and not stream:
        raise BadRequest("stream_options needs stream: true", "stream_options")
    if request.prompt_logprobs is not None and stream:
        raise BadRequest("prompt_logprobs needs stream: false", "prompt_logprobs")
    n = 1 if request.n is None else _within("n", request.n, 1, limits.max_choices)
    if request.best_of is not None and request.best_of != n:
        raise BadRequest(
            f"best_of is {request.best_of}, but it must equal n ({n}): choices are not ranked",
            "best_of",
            "unsupported_value",
        )
    if max_tokens[1] is not None:
        _within(max_tokens[0], max_tokens[1], 0, 2**31 - 1)
    prompt_logprobs = request.prompt_logprobs
    if prompt_logprobs is not None:
        _within("prompt_logprobs", prompt_logprobs, 0, limits.max_logprobs)
    if echo and logprobs is not None:
        prompt_logprobs = max(prompt_logprobs or 0, logprobs)
    deadline = context.deadline
    if request.deadline_s is not None:
        if not 0 < request.deadline_s <= 86_400:
            raise BadRequest(
                f"deadline_s is {request.deadline_s:g}, but it must be above 0 and at most 86400", "deadline_s"
            )
        deadline = request.deadline_s
    given: dict[str, Any] = {
        "min_tokens": request.min_tokens,
        "temperature": request.temperature,
        "top_k": request.top_k,
        "top_p": request.top_p,
        "min_p": request.min_p,
        "repetition_penalty": request.repetition_penalty,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "logit_bias": _bounded("logit_bias", request.logit_bias, limits.max_logit_bias),
        "allowed_token_ids": _bounded("allowed_token_ids", request.allowed_token_ids, limits.max_token_ids),
        "seed": request.seed,
        "stop": _stops(request.stop, limits),
        "stop_token_ids": _bounded("stop_token_ids", request.stop_token_ids, limits.max_stop_token_ids),
        "include_stop": request.include_stop_str_in_output,
        "ignore_eos": request.ignore_eos,
        "skip_special_tokens": request.skip_special_tokens,
        "max_tokens": max_tokens[1],
        "logprobs": logprobs,
        "prompt_logprobs": prompt_logprobs,
    }
    return Job(
        prompts=prompts,
        sampling=SamplingParams(n=n, **{name: value for name, value in given.items() if value is not None}),
        priority=_priority(request),
        deadline=deadline,
        request_id=None if request.request_id is None else _label("request_id", request.request_id, limits),
        cache_salt="" if request.cache_salt is None else _label("cache_salt", request.cache_salt, limits),
        stream=stream,
        include_usage=bool(options and options.include_usage),
        continuous_usage=bool(options and options.continuous_usage_stats),
        logprobs=logprobs is not None,
        show_prompt_logprobs=request.prompt_logprobs is not None,
        echo=echo,
    )


def _messages(messages: list[Message], limits: Limits) -> list[ChatMessage]:
    if not messages:
        raise BadRequest("messages is empty, but it must hold at least one message", "messages")
    _bounded("messages", messages, limits.max_messages)
    flat = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if message.role in ("tool", "function") or message.tool_calls or message.function_call is not None:
            param = f"{where}.role" if message.role in ("tool", "function") else f"{where}.tool_calls"
            raise BadRequest(
                f"{param} is not supported: this server does not serve tool calls", param, "unsupported_value"
            )
        if message.name is not None:
            _label(f"{where}.name", message.name, limits)
        role = "system" if message.role == "developer" else message.role
        flat.append(ChatMessage(role=role, content=_text(message, where, limits), name=message.name))
    return flat


def _text(message: Message, where: str, limits: Limits) -> str:
    content = message.content
    if isinstance(content, str):
        return content
    if content is None:
        if message.role == "assistant":
            return ""
        raise BadRequest(f"{where}.content is missing or null", f"{where}.content")
    _bounded(f"{where}.content", content, limits.max_messages)
    texts = []
    for index, part in enumerate(content):
        if part.type != "text" or part.text is None:
            param = f"{where}.content[{index}].type"
            raise BadRequest(
                f"{param} is {part.type[:64]!r}, but this model reads text parts only "
                '({"type": "text", "text": "..."})',
                param,
                "unsupported_value",
            )
        texts.append(part.text)
    return "\n".join(texts)


def _template_kwargs(kwargs: dict[str, object], limits: Limits) -> dict[str, object]:
    _bounded("chat_template_kwargs", kwargs, _MAX_TEMPLATE_KWARGS)
    for name, value in kwargs.items():
        param = f"chat_template_kwargs.{name[:64]}"
        if not name.isidentifier() or not name.isascii() or name.startswith("_") or name in _RESERVED_KWARGS:
            raise BadRequest(f"{param} is not a variable that a request may set", param)
        _label(param, name, limits)
        if value is not None and not isinstance(value, bool | int | float | str):
            raise BadRequest(f"{param} must be a string, number, boolean or null", param)
        if isinstance(value, str):
            _label(param, value, limits)
    return kwargs


def _prompts(
    raw: msgspec.Raw, add_special_tokens: bool, context: Context
) -> list[ChatPrompt | TextPrompt | TokensPrompt]:
    view = memoryview(raw)
    head = bytes(view[:1])
    if head == b'"':
        return [TextPrompt(decode(raw, str, "prompt"), add_special_tokens)]
    inner = bytes(view[1:64]).lstrip()[:1] if head == b"[" else b""
    if inner == b'"':
        texts = _bounded("prompt", decode(raw, list[str], "prompt"), context.limits.max_prompts)
        return [TextPrompt(text, add_special_tokens) for text in texts]
    if inner == b"[":
        many = _bounded("prompt", decode(raw, list[list[TokenId]], "prompt"), context.limits.max_prompts)
        return [_tokens(ids, context) for ids in many]
    if inner != b"" and inner in b"-0123456789":
        return [_tokens(decode(raw, list[TokenId], "prompt"), context)]
    if inner == b"]":
        raise BadRequest("prompt is empty, but it must hold at least one string or token id", "prompt")
    raise BadRequest(
        "prompt must be a string, a list of strings, a list of token ids or a list of such lists", "prompt"
    )


def _tokens(ids: list[int], context: Context) -> TokensPrompt:
    if not ids:
        raise BadRequest("prompt holds an empty list, but it must hold at least one token id", "prompt")
    if len(ids) > context.runtime.max_model_len:
        raise ContextLengthError(
            f"the prompt has {len(ids)} tokens, but the model's context holds {context.runtime.max_model_len}",
            param="prompt",
        )
    return TokensPrompt(ids)


def _stops(stop: str | list[str] | None, limits: Limits) -> list[str] | None:
    if stop is None:
        return None
    stops = [stop] if isinstance(stop, str) else stop
    _bounded("stop", stops, limits.max_stop)
    for text in stops:
        if len(text) > limits.max_stop_chars:
            raise BadRequest(
                f"a stop string has {len(text)} characters, but this server takes at most {limits.max_stop_chars}",
                "stop",
            )
    return stops


def _priority(request: CommonRequest) -> Priority:
    """By name or number; without one, by OpenAI's service tier."""
    wanted = request.priority
    if wanted is None:
        return {"flex": Priority.LOW, "priority": Priority.HIGH}.get(request.service_tier or "", Priority.NORMAL)
    if isinstance(wanted, str) and wanted.upper() in Priority.__members__:
        return Priority[wanted.upper()]
    if isinstance(wanted, int) and Priority.CRITICAL <= wanted <= Priority.LOW:
        return Priority(wanted)
    names = ", ".join(f"{priority.name.lower()} ({priority.value})" for priority in Priority)
    raise BadRequest(f"priority must be one of {names}", "priority")


def _within(name: str, value: int, low: int, high: int) -> int:
    if not low <= value <= high:
        raise BadRequest(f"{name} is {value}, but this server takes {low} to {high}", name)
    return value


def _bounded(name: str, items: S, limit: int) -> S:
    if items is not None and len(items) > limit:
        raise BadRequest(f"{name} has {len(items)} entries, but this server takes at most {limit}", name)
    return items


def _label(name: str, text: str, limits: Limits) -> str:
    """A short string that is a name and no content: bounded, and without control characters."""
    if len(text) > limits.max_name_chars:
        raise BadRequest(
            f"{name} has {len(text)} characters, but this server takes at most {limits.max_name_chars}", name[:80]
        )
    if not text.isprintable():
        raise BadRequest(f"{name} holds control characters", name[:80])
    return text
