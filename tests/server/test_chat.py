"""Chat completions: golden shapes, the framing of a stream byte by byte, and what each field does."""

import json
import re
from typing import Any

import pytest
from server_fakes import Served, chat

from millrace.runtime.errors import ContextLengthError, QueueFullError, RuntimeClosedError
from millrace.runtime.types import ChatMessage, ChatPrompt, Priority

PATH = "/v1/chat/completions"
NO_DETAILS = {"reasoning_tokens": 0, "accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0}


def events(body: bytes) -> list[Any]:
    """Decoded events of a stream whose framing is exactly `data: ...` and an empty line each, ended by [DONE]."""
    assert body.endswith(b"data: [DONE]\n\n")
    parts = body.removesuffix(b"data: [DONE]\n\n").split(b"\n\n")
    assert parts.pop() == b""
    assert all(part.startswith(b"data: {") and b"\n" not in part for part in parts)
    return [json.loads(part.removeprefix(b"data: ")) for part in parts]


async def test_whole_answer(served: Served) -> None:
    status, headers, body = await served.post(PATH, chat("hé", max_tokens=6), headers={"x-request-id": "my-id.1"})
    assert status == 200
    assert headers["x-request-id"] == "my-id.1"
    assert headers["Content-Type"] == "application/json"
    created = body.pop("created")
    assert isinstance(created, int)
    assert body == {
        "id": "chatcmpl-my-id.1",
        "object": "chat.completion",
        "model": "fake/model:1",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "answer", "refusal": None},
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 6,
            "total_tokens": 9,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": NO_DETAILS,
        },
    }


async def test_stream_byte_by_byte(served: Served) -> None:
    served.runtime.reply = lambda prompt, choice: 'é"'.encode()
    status, headers, body = await served.raw(
        PATH, json.dumps(chat(stream=True)).encode(), headers={"x-request-id": "x"}
    )
    assert status == 200
    assert headers["Content-Type"] == "text/event-stream"
    assert headers["Cache-Control"] == "no-cache"
    assert headers["X-Accel-Buffering"] == "no"
    created = re.search(rb'"created":(\d+)', body)
    assert created is not None
    head = (
        b'data: {"id":"chatcmpl-x","object":"chat.completion.chunk","created":%b,"model":"fake/model:1","choices":'
        % created[1]
    )
    assert body == b"".join(
        (
            head + b'[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}\n\n',
            head + '[{"index":0,"delta":{"content":"é"},"logprobs":null,"finish_reason":null}]}\n\n'.encode(),
            head + b'[{"index":0,"delta":{"content":"\\""},"logprobs":null,"finish_reason":null}]}\n\n',
            head + b'[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop","stop_reason":null}]}\n\n',
            b"data: [DONE]\n\n",
        )
    )


async def test_usage_chunk_comes_last_and_every_chunk_has_the_key(served: Served) -> None:
    request = chat(stream=True, stream_options={"include_usage": True}, n=2, max_tokens=3)
    _, _, body = await served.raw(PATH, json.dumps(request).encode())
    *chunks, last = events(body)
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 6,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": NO_DETAILS,
    }
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in [*chunks, last]}) == 1


async def test_each_choice_has_one_role_chunk_first_and_one_finish_chunk_last(served: Served) -> None:
    _, _, body = await served.raw(PATH, json.dumps(chat("q", stream=True, n=3)).encode())
    for index in range(3):
        mine = [c["choices"][0] for c in events(body) if c["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert all("role" not in choice["delta"] for choice in mine[1:])
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + ["stop"]
        assert mine[-1]["delta"] == {}
        assert "".join(c["delta"].get("content", "") for c in mine) == f"answer {index} to q"


async def test_continuous_usage(served: Served) -> None:
    request = chat(stream=True, stream_options={"continuous_usage_stats": True}, max_tokens=3)
    _, _, body = await served.raw(PATH, json.dumps(request).encode())
    counts = [chunk["usage"]["completion_tokens"] for chunk in events(body)]
    assert counts == sorted(counts) and counts[-1] == 3


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs(served: Served, stream: bool) -> None:
    served.runtime.reply = lambda prompt, choice: "é".encode()
    request = chat(logprobs=True, top_logprobs=2, stream=stream)
    if stream:
        _, _, raw = await served.raw(PATH, json.dumps(request).encode())
        content = [
            token
            for chunk in events(raw)
            if chunk["choices"][0]["logprobs"]
            for token in chunk["choices"][0]["logprobs"]["content"]
        ]
    else:
        _, _, body = await served.post(PATH, request)
        assert body["choices"][0]["logprobs"]["refusal"] is None
        content = body["choices"][0]["logprobs"]["content"]
    first, second = "é".encode()
    assert [token["bytes"] for token in content] == [[first], [second]]
    assert content[0]["token"] == "�"
    assert content[0]["logprob"] == -(first % 7) / 4 - 0.25
    assert len(content[0]["top_logprobs"]) == 2
    assert set(content[0]["top_logprobs"][0]) == {"token", "logprob", "bytes"}


async def test_logprobs_without_alternatives(served: Served) -> None:
    _, _, body = await served.post(PATH, chat(logprobs=True, max_tokens=1))
    assert body["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


async def test_prompt_logprobs(served: Served) -> None:
    _, _, body = await served.post(PATH, chat("ab", prompt_logprobs=1, max_tokens=1))
    first, second = body["prompt_logprobs"]
    assert first is None
    assert second["98"] == {"logprob": -0.0, "rank": 1, "decoded_token": "b"}


async def test_stop_string_is_reported(served: Served) -> None:
    _, _, body = await served.post(PATH, chat("q", stop=["zzz", " to"]))
    choice = body["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"], choice["stop_reason"]) == ("answer 0", "stop", " to")


async def test_echo_goes_on_with_the_assistants_message(served: Served) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "Sure: "}]
    request = {"messages": messages, "echo": True, "continue_final_message": True, "max_tokens": 6}
    _, _, body = await served.post(PATH, request)
    assert body["choices"][0]["message"]["content"] == "Sure: answer"
    _, _, raw = await served.raw(PATH, json.dumps({**request, "stream": True}).encode())
    texts = [chunk["choices"][0]["delta"].get("content", "") for chunk in events(raw)]
    assert texts[:2] == ["", "Sure: "] and "".join(texts) == "Sure: answer"


async def test_every_field_reaches_the_runtime(served: Served) -> None:
    fields = {
        "n": 2,
        "max_tokens": 9,
        "max_completion_tokens": 4,
        "min_tokens": 1,
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.5,
        "min_p": 0.25,
        "repetition_penalty": 1.5,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "logit_bias": {"5": 2},
        "allowed_token_ids": [1, 2, 97],
        "seed": 11,
        "stop": "x",
        "stop_token_ids": [3],
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "priority": "high",
        "deadline_s": 2.5,
        "request_id": "mine",
        "cache_salt": "salt",
        "chat_template_kwargs": {"enable_thinking": False, "level": 3},
    }
    status, headers, body = await served.post(PATH, chat(**fields))
    assert status == 200 and body["id"] == "chatcmpl-mine" and headers["x-request-id"] != "mine"
    (got,) = served.runtime.submits
    sampling = got.sampling
    assert (sampling.n, sampling.max_tokens, sampling.min_tokens, sampling.temperature) == (2, 4, 1, 0.5)
    assert (sampling.top_k, sampling.top_p, sampling.min_p, sampling.repetition_penalty) == (7, 0.5, 0.25, 1.5)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.seed) == (0.5, 0.25, 11)
    assert (sampling.logit_bias, sampling.allowed_token_ids, sampling.stop) == ({5: 2.0}, [1, 2, 97], ["x"])
    assert (sampling.stop_token_ids, sampling.include_stop, sampling.ignore_eos) == ([3], True, True)
    assert (sampling.skip_special_tokens, sampling.logprobs) == (False, None)
    assert (got.priority, got.deadline, got.request_id, got.cache_salt) == (Priority.HIGH, 2.5, "mine", "salt")
    assert isinstance(got.prompt, ChatPrompt)
    assert got.prompt.template_kwargs == {"enable_thinking": False, "level": 3}


async def test_defaults(served: Served) -> None:
    await served.post(PATH, chat())
    (got,) = served.runtime.submits
    assert got.sampling.max_tokens is None and got.sampling.temperature == 1.0
    assert (got.priority, got.deadline) == (Priority.NORMAL, 600.0)


@pytest.mark.parametrize(
    ("fields", "priority"),
    [
        ({"priority": 0}, Priority.CRITICAL),
        ({"priority": "Low"}, Priority.LOW),
        ({"service_tier": "flex"}, Priority.LOW),
        ({"service_tier": "priority"}, Priority.HIGH),
        ({"service_tier": "auto"}, Priority.NORMAL),
    ],
)
async def test_priorities(served: Served, fields: dict[str, Any], priority: Priority) -> None:
    assert (await served.post(PATH, chat(**fields)))[0] == 200
    assert served.runtime.submits[0].priority is priority


async def test_messages_are_flattened(served: Served) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "name": "ann", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": []},
    ]
    status, _, _ = await served.post(PATH, {"messages": messages})
    assert status == 200
    prompt = served.runtime.submits[0].prompt
    assert isinstance(prompt, ChatPrompt)
    assert list(prompt.messages) == [
        ChatMessage(role="system", content="be brief"),
        ChatMessage(role="user", name="ann", content="a\nb"),
        ChatMessage(role="assistant", content=""),
    ]
    assert prompt.add_generation_prompt and not prompt.continue_final_message


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": []},
        {"tools": None, "tool_choice": "auto"},
        {"tools": [{"type": "function"}], "tool_choice": "none"},
        {"response_format": {"type": "text"}},
        {"modalities": ["text"]},
        {"suffix": "", "best_of": 1, "use_beam_search": False, "length_penalty": 1.0},
        {"user": "u", "metadata": {"a": "b"}, "store": True, "verbosity": "low", "prompt_cache_key": "k"},
        {"stream_options": None, "stream": None, "temperature": None, "messages_per_hour": [1, {"deep": []}]},
        {"add_special_tokens": False, "reasoning_effort": "none"},
    ],
)
async def test_fields_that_change_nothing_are_accepted(served: Served, fields: dict[str, Any]) -> None:
    assert (await served.post(PATH, chat(**fields)))[0] == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"guided_regex": "a+"}, "guided_regex"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"add_special_tokens": True}, "add_special_tokens"),
        ({"bad_words": ["x"]}, "bad_words"),
        ({"web_search_options": {"a": 1}}, "web_search_options"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"priority": "urgent"}, "priority"),
        ({"priority": 9}, "priority"),
        ({"deadline_s": 0}, "deadline_s"),
        ({"temperature": -1}, "temperature"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs.messages"),
        ({"chat_template_kwargs": {"x": []}}, "chat_template_kwargs.x"),
        ({"chat_template_kwargs": {"__class__": 1}}, "chat_template_kwargs.__class__"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages[0].role"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    ],
)
async def test_values_that_cannot_be_honoured_are_refused_by_name(
    served: Served, fields: dict[str, Any], param: str
) -> None:
    status, _, body = await served.post(PATH, chat(**fields))
    assert status == 400
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert (body["error"]["param"], body["error"]["type"]) == (param, "invalid_request_error")
    assert param.split("[")[0].split(".")[0] in body["error"]["message"]
    assert (await served.post(PATH, chat()))[0] == 200  # and the server goes on


async def test_unknown_fields_are_counted_and_logged_once(capsys: pytest.CaptureFixture[str], served: Served) -> None:
    for _ in range(3):
        assert (await served.post(PATH, chat(wobble=1, user="u")))[0] == 200
    _, _, metrics = await served.get("/metrics")
    assert b"millrace_http_unknown_fields_total 3.0" in metrics
    assert capsys.readouterr().err.count("wobble") == 1


async def test_unknown_model(served: Served) -> None:
    status, _, body = await served.post(PATH, chat(model="gpt-9"))
    assert (status, body["error"]["code"], body["error"]["param"]) == (404, "model_not_found", "model")
    assert "fake/model:1" in body["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("refusal", "status", "code", "retry"),
    [
        (ContextLengthError("5000 tokens, but 4096 fit"), 400, "context_length_exceeded", None),
        (QueueFullError("1024 requests wait"), 429, "queue_full", "1"),
        (RuntimeClosedError("draining"), 503, "runtime_closed", "2"),
    ],
)
async def test_refusals_keep_their_status_also_when_streamed(
    served: Served, stream: bool, refusal: Any, status: int, code: str, retry: str | None
) -> None:
    served.runtime.refuse = refusal
    got, headers, body = await served.post(PATH, chat(stream=stream))
    assert (got, body["error"]["code"], headers.get("Retry-After")) == (status, code, retry)
    assert body["error"]["message"] == refusal.message


async def test_failure_of_a_whole_answer_is_a_500(served: Served) -> None:
    served.runtime.fail_at = 3
    status, _, body = await served.post(PATH, chat())
    assert (status, body["error"]["type"], body["error"]["code"]) == (500, "server_error", "request_failed")


async def test_failure_in_mid_stream_is_an_event(served: Served) -> None:
    served.runtime.fail_at = 4
    status, _, body = await served.raw(PATH, json.dumps(chat(stream=True)).encode())
    *chunks, failure = events(body)
    assert status == 200
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == "ans"
    assert failure == {
        "error": {
            "message": "the step of this request failed",
            "type": "server_error",
            "param": None,
            "code": "request_failed",
        }
    }


async def test_an_unexpected_exception_tells_nothing(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("secret /path")

    monkeypatch.setattr(served.runtime, "submit", broken)
    status, headers, body = await served.post(PATH, chat())
    assert (status, headers["x-should-retry"], body["error"]["code"]) == (500, "false", "internal_error")
    assert "secret" not in json.dumps(body) and "Zero" not in json.dumps(body)
