"""The official client, sync and async, streamed and not, against the server."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from server_fakes import Served

from millrace.runtime.errors import ContextLengthError, QueueFullError, RequestFailedError

MODEL = "fake/model:1"
USER: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture
async def client(served: Served) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as made:
        yield made  # one that is not closed would begin a task on the loop of a later test


async def test_chat(served: Served, client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model=MODEL, messages=USER, n=2, logprobs=True, top_logprobs=1)
    assert [choice.message.content for choice in answer.choices] == ["answer 0 to hi", "answer 1 to hi"]
    assert answer.usage is not None and answer.usage.prompt_tokens == 2
    assert answer.choices[0].logprobs is not None and answer.choices[0].logprobs.content is not None
    assert len(answer.choices[0].logprobs.content) == len("answer 0 to hi")
    assert answer._request_id is not None and answer.id == f"chatcmpl-{answer._request_id}"
    assert not answer.choices[0].model_extra or set(answer.choices[0].model_extra) == {"stop_reason"}


async def test_chat_stream(served: Served, client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model=MODEL, messages=USER, stream=True, stream_options={"include_usage": True}
    )
    text, usage, finish = "", None, None
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
    assert (text, finish) == ("answer 0 to hi", "stop")
    assert usage is not None and usage.completion_tokens == len(text)


async def test_stream_helper(served: Served, client: openai.AsyncOpenAI) -> None:
    async with client.chat.completions.stream(model=MODEL, messages=USER) as stream:
        async for _ in stream:
            pass
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == "answer 0 to hi"


async def test_completions(served: Served, client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model=MODEL, prompt=["a", "b"], echo=True, max_tokens=0, logprobs=1)
    assert [choice.text for choice in answer.choices] == ["a", "b"]
    assert answer.choices[0].logprobs is not None and answer.choices[0].logprobs.token_logprobs == [None]
    stream = await client.completions.create(model=MODEL, prompt="q", stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "answer 0 to q"


async def test_models(served: Served, client: openai.AsyncOpenAI) -> None:
    models = [model async for model in client.models.list()]
    assert [model.id for model in models] == [MODEL]
    assert (await client.models.retrieve(MODEL)).created == served.runtime.created
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("other")


async def test_extra_body(served: Served, client: openai.AsyncOpenAI) -> None:
    await client.chat.completions.create(model=MODEL, messages=USER, extra_body={"top_k": 3, "min_p": 0.5})
    sampling = served.runtime.submits[0].sampling
    assert (sampling.top_k, sampling.min_p) == (3, 0.5)


async def test_errors_have_their_classes(served: Served, client: openai.AsyncOpenAI) -> None:
    create = client.chat.completions.create
    with pytest.raises(openai.BadRequestError) as bad:
        await create(model=MODEL, messages=USER, n=99)
    assert (bad.value.param, bad.value.code) == ("n", "invalid_value")
    with pytest.raises(openai.NotFoundError):
        await create(model="other", messages=USER)
    served.runtime.refuse = ContextLengthError("too long")
    with pytest.raises(openai.BadRequestError) as long:
        await create(model=MODEL, messages=USER)
    assert long.value.code == "context_length_exceeded"
    served.runtime.refuse = QueueFullError("full")
    with pytest.raises(openai.RateLimitError):
        await create(model=MODEL, messages=USER)
    served.runtime.refuse = RequestFailedError("failed")
    with pytest.raises(openai.InternalServerError):
        await create(model=MODEL, messages=USER)


async def test_error_in_mid_stream_is_raised(served: Served, client: openai.AsyncOpenAI) -> None:
    served.runtime.fail_at = 3
    stream = await client.chat.completions.create(model=MODEL, messages=USER, stream=True)
    with pytest.raises(openai.APIError, match="the step of this request failed"):
        async for _ in stream:
            pass


async def test_leaving_a_stream_cancels(served: Served, client: openai.AsyncOpenAI) -> None:
    served.runtime.reply = lambda prompt, choice: b"x" * 4000
    stream = await client.chat.completions.create(model=MODEL, messages=USER, stream=True)
    async for _ in stream:
        break
    await stream.close()
    await served.runtime.until(lambda: served.runtime.running == 0)
    assert len(served.runtime.cancelled) == 1


async def test_sync_client_in_a_thread(served: Served) -> None:
    def program() -> tuple[str | None, str, str]:
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            whole = client.chat.completions.create(model=MODEL, messages=USER)
            chunks = client.chat.completions.create(model=MODEL, messages=USER, stream=True)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            legacy = client.completions.create(model=MODEL, prompt=[97, 98])
            with pytest.raises(openai.BadRequestError):
                client.completions.create(model=MODEL, prompt="a", best_of=3)
            return whole.choices[0].message.content, text, legacy.choices[0].text

    whole, text, legacy = await asyncio.to_thread(program)
    assert whole == text == "answer 0 to hi"
    assert legacy == "answer 0 to ab"
