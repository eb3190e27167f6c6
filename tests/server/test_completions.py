"""Legacy completions: all kinds of prompts, echo, and the call that scores a text."""

import json
from typing import Any

import pytest
from server_fakes import Served, logprob_of

from millrace.runtime.types import TextPrompt, TokensPrompt

PATH = "/v1/completions"


def events(body: bytes) -> list[Any]:
    lines = body.decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


async def test_whole_answer_and_default_length(served: Served) -> None:
    served.runtime.reply = lambda prompt, choice: b"0123456789" * 9
    status, _, body = await served.post(PATH, {"prompt": "ab"}, headers={"x-request-id": "r"})
    assert status == 200
    del body["created"], body["usage"]["completion_tokens_details"]
    assert body == {
        "id": "cmpl-r",
        "object": "text_completion",
        "model": "fake/model:1",
        "choices": [
            {
                "index": 0,
                "text": "0123456789012345",  # 16 tokens, as the specification has it
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": 16,
            "total_tokens": 18,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("ab", ["ab"]),
        (["ab", "c"], ["ab", "c"]),
        ([97, 98], ["ab"]),
        ([[97, 98], [99]], ["ab", "c"]),
        (["only"], ["only"]),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_kinds_of_prompts_and_prompt_major_indices(
    served: Served, prompt: Any, texts: list[str], stream: bool
) -> None:
    request = {"prompt": prompt, "n": 2, "max_tokens": 99, "stream": stream}
    got: dict[int, str] = {}
    if stream:
        status, _, raw = await served.raw(PATH, json.dumps(request).encode())
        ends = []
        for chunk in events(raw):
            (choice,) = chunk["choices"]
            assert chunk["object"] == "text_completion"
            got[choice["index"]] = got.get(choice["index"], "") + choice["text"]
            ends += [choice["index"]] if choice["finish_reason"] else []
        assert sorted(ends) == list(range(2 * len(texts)))
    else:
        status, _, body = await served.post(PATH, request)
        got = {choice["index"]: choice["text"] for choice in body["choices"]}
        assert list(got) == list(range(2 * len(texts)))
    assert status == 200
    assert got == {i * 2 + j: f"answer {j} to {text}" for i, text in enumerate(texts) for j in range(2)}


async def test_usage_sums_over_prompts(served: Served) -> None:
    _, _, body = await served.post(PATH, {"prompt": ["ab", "cde"], "n": 2, "max_tokens": 2})
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (5, 8)
    stream = {"prompt": ["ab", "cde"], "n": 2, "max_tokens": 2, "stream": True}
    _, _, raw = await served.raw(PATH, json.dumps({**stream, "stream_options": {"include_usage": True}}).encode())
    assert events(raw)[-1]["usage"]["total_tokens"] == 13


async def test_names_of_many_prompts_differ(served: Served) -> None:
    await served.post(PATH, {"prompt": ["a", "b"], "request_id": "r"})
    assert [got.request_id for got in served.runtime.submits] == ["r-0", "r-1"]


async def test_special_tokens_can_be_left_out(served: Served) -> None:
    await served.post(PATH, {"prompt": "a", "add_special_tokens": False})
    await served.post(PATH, {"prompt": "a"})
    assert [got.prompt for got in served.runtime.submits] == [TextPrompt("a", False), TextPrompt("a", True)]
    await served.post(PATH, {"prompt": [7]})
    assert served.runtime.submits[-1].prompt == TokensPrompt([7])


async def test_echo(served: Served) -> None:
    _, _, body = await served.post(PATH, {"prompt": ["ab", "c"], "echo": True, "max_tokens": 3})
    assert [choice["text"] for choice in body["choices"]] == ["abans", "cans"]
    _, _, body = await served.post(PATH, {"prompt": [97, 98], "echo": True, "max_tokens": 3})
    assert body["choices"][0]["text"] == "abans"
    _, _, raw = await served.raw(PATH, json.dumps({"prompt": "ab", "echo": True, "stream": True}).encode())
    assert [chunk["choices"][0]["text"] for chunk in events(raw)][:2] == ["ab", "a"]


async def test_the_scoring_call(served: Served) -> None:
    """echo, max_tokens 0, logprobs 1: what evaluation harnesses send."""
    request = {"prompt": "abc", "echo": True, "max_tokens": 0, "logprobs": 1}
    status, _, body = await served.post(PATH, request)
    (choice,) = body["choices"]
    scores = choice["logprobs"]
    assert (status, choice["text"], choice["finish_reason"]) == (200, "abc", "length")
    assert scores["tokens"] == ["a", "b", "c"]
    assert scores["token_logprobs"] == [None, logprob_of(98), logprob_of(99)]
    assert scores["top_logprobs"] == [None, {"b": logprob_of(98)}, {"c": logprob_of(99)}]
    assert scores["text_offset"] == [0, 1, 2]
    assert body["usage"]["completion_tokens"] == 0
    _, _, raw = await served.raw(PATH, json.dumps({**request, "stream": True}).encode())
    first, last = events(raw)
    assert first["choices"][0]["logprobs"] == scores
    assert last["choices"][0]["finish_reason"] == "length"


async def test_logprobs_of_drawn_tokens_follow_those_of_the_prompt(served: Served) -> None:
    served.runtime.reply = lambda prompt, choice: "é!".encode()
    request = {"prompt": "ab", "echo": True, "logprobs": 2}
    _, _, body = await served.post(PATH, request)
    scores = body["choices"][0]["logprobs"]
    assert scores["tokens"] == ["a", "b", "bytes:\\xc3", "bytes:\\xa9", "!"]
    assert scores["text_offset"] == [0, 1, 2, 2, 3]  # a character counts with its last part
    assert len(scores["top_logprobs"][1]) == 2
    _, _, raw = await served.raw(PATH, json.dumps({**request, "stream": True}).encode())
    tokens = [t for c in events(raw) if (s := c["choices"][0]["logprobs"]) for t in s["tokens"]]
    assert tokens == scores["tokens"]


async def test_logprobs_zero_gives_the_drawn_token(served: Served) -> None:
    _, _, body = await served.post(PATH, {"prompt": "ab", "logprobs": 0, "max_tokens": 1})
    assert body["choices"][0]["logprobs"]["top_logprobs"] == [{"a": logprob_of(97)}]


async def test_prompt_logprobs_stand_in_each_choice(served: Served) -> None:
    _, _, body = await served.post(PATH, {"prompt": ["ab", "c"], "prompt_logprobs": 0, "max_tokens": 1})
    assert [len(choice["prompt_logprobs"]) for choice in body["choices"]] == [2, 1]
    assert body["choices"][0]["prompt_logprobs"][1] == {
        "98": {"logprob": logprob_of(98), "rank": None, "decoded_token": "b"}
    }


@pytest.mark.parametrize(
    ("prompt", "code"),
    [
        ([], "invalid_value"),
        ([[]], "invalid_value"),
        ("", "invalid_value"),
        (["a", 1], "invalid_value"),
        ([1, "a"], "invalid_value"),
        ([[1], 2], "invalid_value"),
        ([-1], "invalid_value"),
        ([257], "invalid_value"),
        ([2**40], "invalid_value"),
        ([1.5], "invalid_value"),
        ({"a": 1}, "invalid_value"),
        (None, "invalid_value"),
        ([True], "invalid_value"),
        ([97] * 5000, "context_length_exceeded"),
    ],
)
async def test_bad_prompts(served: Served, prompt: Any, code: str) -> None:
    status, _, body = await served.post(PATH, {"prompt": prompt})
    assert (status, body["error"]["code"]) == (400, code)
    assert body["error"]["param"].startswith("prompt")
    assert served.runtime.running == 0


async def test_one_bad_prompt_ends_the_others(served: Served) -> None:
    served.runtime.reply = lambda prompt, choice: b"x" * 3000
    status, _, _ = await served.post(PATH, {"prompt": [[97], [257]], "max_tokens": 3000})
    await served.runtime.until(lambda: served.runtime.running == 0)
    assert status == 400 and len(served.runtime.cancelled) == 1


async def test_prompt_is_required(served: Served) -> None:
    status, _, body = await served.post(PATH, {"model": "fake/model:1"})
    assert (status, body["error"]["param"]) == (400, "prompt")
