"""Chat templates: from messages to the ids that the model was trained on, with user text kept from being control.

A template writes control tokens around what users wrote, into one string. To tell the two apart afterwards, the
messages are rendered a second time with marks around every control token that a user wrote, and the marks are carried
over to the first rendering. That is done only where user text holds (part of) a control token; otherwise the rendered
string is encoded at once, exactly as transformers does.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import msgspec

from millrace.runtime.errors import CheckpointError, InvalidRequestError
from millrace.runtime.text.template import MAX_TEMPLATE_CHARS, TemplateEnvironment
from millrace.runtime.text.tokenizer import Tokenizer, read_json
from millrace.runtime.types import ChatMessage

MAX_RENDERED_CHARS = 16 * 1024 * 1024

# Noncharacters around control tokens in user text, and at an end of it that its surroundings could make one. They never
# reach the tokenizer.
_OPEN, _CLOSE, _BORDER = "\ufdd2", "\ufdd3", "\ufdd5"


def _mark(char: str) -> str:
    # A mark may also come as tojson(ensure_ascii=True) writes it.
    return f"(?:{char}|\\\\u{ord(char):04x})"


_ANY_MARK = re.compile("|".join(map(_mark, (_OPEN, _CLOSE, _BORDER))))

# Appended to a message that is to be continued; the space shows whether the template trims.
_TAG = "\ufdd4 "

_Message = ChatMessage | Mapping[str, Any]
_RESERVED = frozenset(("messages", "add_generation_prompt", "range", "raise_exception", "strftime_now"))


class ChatTemplate:
    """The chat template of a checkpoint; immutable after loading.

    Attributes:
        source: the default template, None if the checkpoint has none.
        variables: names that the templates read; other template arguments have no effect.
    """

    def __init__(
        self,
        templates: Mapping[str, str],
        special_tokens: Mapping[str, str],
        *,
        now: Callable[[], datetime] = datetime.now,
        max_chars: int = MAX_RENDERED_CHARS,
    ) -> None:
        """Compiles the templates; one that does not compile is reported by `render`, as the model can do without.

        Args:
            templates: by name; "default" is used, or "tool_use" where there is one and a request has tools.
            special_tokens: `bos_token` and the like, which templates may write.
            now: the clock that templates may read.
            max_chars: longest rendering.

        Raises:
            CheckpointError: a template is longer than MAX_TEMPLATE_CHARS.
        """
        self._special_tokens = dict(special_tokens)
        self._environment = TemplateEnvironment(max_chars, now)
        self._compiled: dict[str, jinja2.Template] = {}
        self._broken: dict[str, str] = {}
        self.source = templates.get("default")
        names: set[str] = set()
        for name, source in templates.items():
            if len(source) > MAX_TEMPLATE_CHARS:
                raise CheckpointError(
                    f"the chat template {name!r} has {len(source)} characters; at most {MAX_TEMPLATE_CHARS} are read"
                )
            try:
                names |= jinja2.meta.find_undeclared_variables(self._environment.parse(source))
                self._compiled[name] = self._environment.from_string(source)
            except jinja2.TemplateSyntaxError as error:
                self._broken[name] = f"line {error.lineno}: {error.message}"
        self.variables = frozenset(names)

    @classmethod
    def load(
        cls, folder: Path, special_tokens: Mapping[str, str], *, now: Callable[[], datetime] = datetime.now
    ) -> "ChatTemplate":
        """Reads chat_template.jinja, else chat_template.json, else the chat_template of tokenizer_config.json."""
        templates = _templates(read_json(folder / "tokenizer_config.json").get("chat_template"))
        templates |= _templates(read_json(folder / "chat_template.json").get("chat_template"))
        paths = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
        paths["default"] = folder / "chat_template.jinja"
        templates |= {name: path.read_text(encoding="utf-8") for name, path in paths.items() if path.is_file()}
        return cls(templates, special_tokens, now=now)

    def render(
        self,
        messages: Sequence[_Message],
        /,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """The conversation as one string.

        Args:
            messages: at least one; entries that are None are left out.
            add_generation_prompt: end with the header of an assistant's message.
            continue_final_message: end inside the last message, so that the model goes on with it.
            kwargs: further variables (`tools`, `documents`, `enable_thinking`); those that the template does not read
                have no effect.

        Raises:
            InvalidRequestError: there is no template, or the template refuses the messages; the message says why.
        """
        plain = self._check(messages, add_generation_prompt, continue_final_message, kwargs)
        return self._render(plain, kwargs, add_generation_prompt, continue_final_message)

    def _check(
        self,
        messages: Sequence[_Message],
        add_generation_prompt: bool,
        continue_final_message: bool,
        kwargs: Mapping[str, Any],
    ) -> list[dict[str, Any]]:
        if not messages:
            raise InvalidRequestError("messages is empty, but a chat needs at least one message", param="messages")
        if continue_final_message and add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message and add_generation_prompt exclude each other: set one of them to false",
                param="continue_final_message",
            )
        for name in kwargs:
            if name in _RESERVED or name in self._special_tokens or name.startswith("_"):
                raise InvalidRequestError(
                    f"the template argument {name!r} is set by the server and cannot be given",
                    param="chat_template_kwargs",
                )
        plain = [_plain(message) for message in messages]
        if continue_final_message and not isinstance(plain[-1].get("content"), str):
            raise InvalidRequestError(
                "continue_final_message needs a last message whose content is text", param="continue_final_message"
            )
        return plain

    def _render(
        self,
        messages: list[dict[str, Any]],
        kwargs: Mapping[str, Any],
        add_generation_prompt: bool,
        continue_final_message: bool,
    ) -> str:
        template = self._template("tool_use" if kwargs.get("tools") else "default")
        if continue_final_message:
            messages = [*messages[:-1], messages[-1] | {"content": messages[-1]["content"] + _TAG}]
        variables = {"tools": None, "documents": None, **self._special_tokens, **kwargs}
        variables |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            text = self._environment.render_limited(template, variables)
        except jinja2.TemplateError as error:
            raise InvalidRequestError(f"the chat template refused: {error}", param="messages") from error
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError) as error:
            # A template that meets a message of another shape than it expects fails like any Python code.
            raise InvalidRequestError(
                f"the chat template failed on these messages: {type(error).__name__}: {error}", param="messages"
            ) from error
        return _open_end(text) if continue_final_message else text

    def _template(self, name: str) -> jinja2.Template:
        for candidate in (name, "default"):
            if candidate in self._compiled:
                return self._compiled[candidate]
            if candidate in self._broken:
                raise InvalidRequestError(f"the chat template of this model is broken: {self._broken[candidate]}")
        raise InvalidRequestError(
            "this model has no chat template: use the completions API with a text prompt, or put a chat_template.jinja "
            "into the model's folder"
        )


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[_Message],
    /,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    **kwargs: Any,
) -> list[int]:
    """The ids of the rendered conversation: control tokens of the template are control, those in `messages` and
    `kwargs` are text. Arguments and errors are those of `ChatTemplate.render`, and errors those of `Tokenizer.encode`.
    """
    flags = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
    plain = [_plain(message) for message in messages]
    text = template.render(plain, **flags, **kwargs)
    marks = _Marks(tokenizer)
    if not (marks.needed(plain) or marks.needed(kwargs)):
        return tokenizer.encode_control(text)
    marked = template.render(marks.mark(plain), **flags, **marks.mark(kwargs))
    return tokenizer.encode_mixed(*marks.template_spans(text, marked))


class _Marks:
    """Marks control tokens in user text, and finds out from a marked rendering which ones the template wrote."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pattern = tokenizer.control_pattern

    def needed(self, value: Any) -> bool:
        """Whether any string in `value` holds a control token, or a part that its surroundings could complete."""
        if isinstance(value, str):
            return self._tokenizer.touches_control(value)
        if isinstance(value, Mapping):
            for key in value:
                if isinstance(key, str) and self._tokenizer.contains_control(key):
                    # Templates look keys up, so a key cannot be marked; but no honest field has such a name.
                    raise InvalidRequestError(f"the field name {key!r} holds a control token of this model; rename it")
            return any(map(self.needed, value.values()))
        return isinstance(value, (list, tuple)) and any(map(self.needed, value))

    def mark(self, value: Any) -> Any:
        """The same value with marks in its strings."""
        if isinstance(value, str):
            text = _ANY_MARK.sub("", value)  # a forged mark could hide a control token of the template
            head = _BORDER if self._tokenizer.starts_inside_control(text) else ""
            tail = _BORDER if self._tokenizer.ends_inside_control(text) else ""
            return head + self._pattern.sub(rf"{_OPEN}\g<0>{_CLOSE}", text) + tail
        if isinstance(value, Mapping):
            return {key: self.mark(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.mark(item) for item in value]
        return value

    def template_spans(self, text: str, marked: str) -> tuple[str, list[tuple[int, int]]]:
        """The text to encode and the spans of control tokens in it that the template wrote.

        The text is `text`, unless the marks changed the template's course (it may cut messages at control tokens):
        then it is `marked` without its marks.
        """
        parts: list[str] = []
        users: list[tuple[int, int]] = []  # spans of users' tokens in the unmarked text; empty spans are borders
        size = end = 0
        for match in _marked(self._pattern).finditer(marked):
            parts += [marked[end : match.start()], match[1] or ""]
            size += match.start() - end
            users.append((size, size + len(parts[-1])))
            size += len(parts[-1])
            end = match.end()
        unmarked = "".join([*parts, marked[end:]])
        found = list(self._pattern.finditer(unmarked))
        by_template = _untouched([match.span() for match in found], users)
        if unmarked != text:
            found_plain = list(self._pattern.finditer(text))
            if [match[0] for match in found_plain] == [match[0] for match in found]:
                found, unmarked = found_plain, text
        return unmarked, [match.span() for match, own in zip(found, by_template, strict=True) if own]


def _marked(pattern: re.Pattern[str]) -> re.Pattern[str]:
    return re.compile(f"{_mark(_OPEN)}({pattern.pattern}){_mark(_CLOSE)}|{_ANY_MARK.pattern}")


def _untouched(spans: Sequence[tuple[int, int]], others: Sequence[tuple[int, int]]) -> list[bool]:
    """For each span, whether no other span overlaps it and no empty one lies strictly inside; both are ascending."""
    result, first = [], 0
    for start, end in spans:
        while first < len(others) and others[first][1] <= start:
            first += 1
        result.append(first == len(others) or others[first][0] >= end)
    return result


def _plain(message: _Message) -> dict[str, Any]:
    fields = msgspec.structs.asdict(message) if isinstance(message, ChatMessage) else message
    plain = {key: value for key, value in fields.items() if value is not None}
    # Clients send reasoning under three names, and templates read one of two.
    reasoning = next((plain[name] for name in ("reasoning_content", "thinking", "reasoning") if name in plain), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _open_end(text: str) -> str:
    at = text.rfind(_TAG[0])
    if at < 0:
        raise InvalidRequestError(
            "continue_final_message: the chat template leaves out the end of the last message", param="messages"
        )
    # Without its space the tag stood at an end that the template trims, and so must the message.
    return text[:at] if text.startswith(_TAG, at) else text[:at].rstrip()


def _templates(value: Any) -> dict[str, str]:
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list):
        return {entry["name"]: entry["template"] for entry in value}
    return dict(value) if isinstance(value, dict) else {}
