"""Which request fields mean what, where the answer is not "it sets a sampling parameter".

Three tables. A field with a value that would change the answer, and that this server cannot honour, is refused by name.
Fields that change nothing about the answer are accepted. All others are unknown: accepted, counted and logged once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec

from millrace.server.body import decode
from millrace.server.errors import BadRequest
from millrace.server.face import JsonValue


@dataclass(frozen=True, slots=True)
class Refusal:
    """A field of which only some values are served."""

    accepts: Callable[[JsonValue], bool]
    reason: str


def _only(*values: JsonValue) -> Callable[[JsonValue], bool]:
    return lambda value: any(value == known and type(value) is type(known) for known in values)


def _empty(value: JsonValue) -> bool:
    return value in ([], {}, "") or value is False


_TOOLS = "this server does not parse tool calls, so the model could not make any"
_STRUCTURED = "output cannot be constrained to a grammar or schema; ask for the format in the prompt"
_TRUNCATE = "prompts are never cut; shorten the prompt"

REFUSED: Mapping[str, Refusal] = {
    "audio": Refusal(_empty, "the model writes text only"),
    "modalities": Refusal(_only(["text"], []), 'the model writes text only; send ["text"]'),
    "functions": Refusal(_empty, _TOOLS),
    "function_call": Refusal(_only("none", "auto"), _TOOLS),
    "tool_choice": Refusal(_only("none", "auto"), _TOOLS),
    "response_format": Refusal(lambda value: isinstance(value, dict) and value.get("type") == "text", _STRUCTURED),
    "structured_outputs": Refusal(_empty, _STRUCTURED),
    "guided_json": Refusal(_empty, _STRUCTURED),
    "guided_regex": Refusal(_empty, _STRUCTURED),
    "guided_choice": Refusal(_empty, _STRUCTURED),
    "guided_grammar": Refusal(_empty, _STRUCTURED),
    "grammar": Refusal(_empty, _STRUCTURED),
    "json_schema": Refusal(_empty, _STRUCTURED),
    "web_search_options": Refusal(_empty, "the server makes no connections of its own"),
    "moderation": Refusal(_empty, "the server does not moderate"),
    "reasoning_effort": Refusal(
        _only("none"), "the effort cannot be set; a template's own switch goes into chat_template_kwargs"
    ),
    "suffix": Refusal(_empty, "text cannot be inserted before a suffix"),
    "use_beam_search": Refusal(_empty, "beam search is not served; sample n choices"),
    "length_penalty": Refusal(_only(1, 1.0), "it belongs to beam search, which is not served"),
    "truncate_prompt_tokens": Refusal(_empty, _TRUNCATE),
    "truncation_side": Refusal(_empty, _TRUNCATE),
    "bad_words": Refusal(_empty, "words cannot be banned; ban token ids with logit_bias -100"),
    "spaces_between_special_tokens": Refusal(_only(True), "no spaces are put between special tokens"),
    "logprob_token_ids": Refusal(_empty, "log probabilities are given for the most likely tokens; use logprobs"),
    "return_tokens_as_token_ids": Refusal(_empty, "tokens are given as text and bytes"),
    "return_token_ids": Refusal(_empty, "tokens are given as text and bytes; use logprobs"),
    "return_prompt_text": Refusal(_empty, "the rendered prompt is not returned"),
    "repetition_detection": Refusal(_empty, "repetition is not detected; use repetition_penalty"),
    "chat_template": Refusal(_empty, "templates come with the checkpoint only: one from a request is code"),
    "documents": Refusal(_empty, "documents are not rendered; put their text into a message"),
    "mm_processor_kwargs": Refusal(_empty, "the model reads text only"),
    "kv_transfer_params": Refusal(_empty, "KV caches are not transferred between servers"),
    "vllm_xargs": Refusal(_empty, "there are no engine extensions to receive them"),
    "stream_interval": Refusal(_only(1), "chunks are sent as the tokens come"),
    "thinking_token_budget": Refusal(_empty, "reasoning tokens are not counted apart; use max_tokens"),
    "watermarking": Refusal(_empty, "output is not watermarked"),
}

# Only of chat requests: completions have this field as a working one.
REFUSED_IN_CHAT: Mapping[str, Refusal] = {
    "add_special_tokens": Refusal(_only(False), "the chat template writes the special tokens"),
}

# Fields that clients send and that change nothing about the answer: bookkeeping, hints, or meaningless without tools.
ACCEPTED = frozenset(
    {
        "include_reasoning",
        "metadata",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "session_id",
        "store",
        "user",
        "verbosity",
    }
)


def check_fields(fields: Mapping[str, msgspec.Raw], known: frozenset[str], chat: bool) -> list[str]:
    """Refuses values that are not served, and returns the names that nobody knows.

    Raises BadRequest that names the field and says why its value is not served.
    """
    unknown = []
    for name, raw in fields.items():
        if name in known or name in ACCEPTED:
            continue
        refusal = REFUSED.get(name) or (REFUSED_IN_CHAT.get(name) if chat else None)
        if refusal is not None:
            value = decode(raw, object, name)
            if value is not None and not refusal.accepts(value):
                raise BadRequest(
                    f"{name} is not supported with this value: {refusal.reason}", name, "unsupported_value"
                )
        elif name == "tools":
            _check_tools(fields)
        else:
            unknown.append(name)
    return unknown


def _check_tools(fields: Mapping[str, msgspec.Raw]) -> None:
    """Tools are fine where none may be called."""
    choice = decode(fields["tool_choice"], object, "tool_choice") if "tool_choice" in fields else None
    tools = decode(fields["tools"], object, "tools")
    if tools is not None and not _empty(tools) and choice != "none":
        raise BadRequest(f"tools is not supported with this value: {_TOOLS}", "tools", "unsupported_value")
