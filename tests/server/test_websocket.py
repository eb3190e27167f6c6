"""The WebSocket: several requests on one, cancel, credits, bad frames, and pages that may not connect."""

import asyncio
import json
from typing import Any

import aiohttp
import pytest
from server_fakes import Served, chat

PATH = "/v1/ws"


def connect(served: Served, **options: Any) -> Any:
    return served.client.ws_connect(served.url + PATH, **options)


async def receive(socket: Any) -> Any:
    """The next frame, which must be text that holds JSON."""
    async with asyncio.timeout(10):
        return await socket.receive_json()


async def answer(socket: Any) -> tuple[str, list[Any], Any]:
    """Text, chunks and last frame of the only request on a socket."""
    text, chunks = "", []
    while "choices" in (frame := await receive(socket)):
        chunks.append(frame)
        text += "".join(choice["delta"].get("content", "") for choice in frame["choices"])
    return text, chunks, frame


async def test_one_request(served: Served) -> None:
    async with connect(served) as socket:
        for _ in range(2):  # one after another needs no ids
            await socket.send_json(chat(stream_options={"include_usage": True}))
            text, chunks, last = await answer(socket)
            assert text == "answer 0 to hi"
            assert last == {"type": "done"}
            assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
            assert chunks[0]["object"] == "chat.completion.chunk" and chunks[0]["id"].startswith("chatcmpl-")
            assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
            assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == len(text)


async def test_several_requests_are_told_apart_by_id(served: Served) -> None:
    async with connect(served) as socket:
        for tag in ("a", "b", "c"):
            await socket.send_json(chat(f"q{tag}", id=tag, n=2))
        texts: dict[tuple[str, int], str] = {}
        open_ids = {"a", "b", "c"}
        order = []
        while open_ids:
            frame = await receive(socket)
            if frame.get("type") == "done":
                assert set(frame) == {"type", "id"}
                open_ids.remove(frame["id"])
                continue
            order.append(frame["id"])
            for choice in frame["choices"]:
                key = frame["id"], choice["index"]
                texts[key] = texts.get(key, "") + choice["delta"].get("content", "")
    assert texts == {(tag, index): f"answer {index} to q{tag}" for tag in "abc" for index in range(2)}
    assert order != sorted(order)  # they ran at the same time


async def test_large_frames(served: Served) -> None:
    """All three encodings of a frame's length."""
    served.runtime.max_model_len = 1_000_000
    for size in (10, 1000, 100_000):
        messages = [{"role": "assistant", "content": "e" * size}]
        async with connect(served, max_msg_size=0) as socket:
            await socket.send_json({"messages": messages, "echo": True, "max_tokens": 1})
            assert (await answer(socket))[0] == "e" * size + "a"


async def test_cancel(served: Served) -> None:
    served.runtime.auto = False
    async with connect(served) as socket:
        await socket.send_json(chat(id="a"))
        await socket.send_json(chat(id="b"))
        await served.runtime.until(lambda: served.runtime.running == 2)
        await socket.send_json({"type": "cancel", "id": "a"})
        assert await receive(socket) == {"type": "done", "id": "a", "cancelled": True}
        assert served.runtime.running == 1 and served.runtime.tokens == {}
        await socket.send_json({"type": "cancel", "id": "a"})  # has ended already: no error
        await socket.send_json({"type": "cancel"})
        served.runtime.step(100)
        text, _, last = await answer(socket)
        assert (text, last) == ("answer 0 to hi", {"type": "done", "id": "b"})


async def test_credits_hold_text_back_and_merge_it(served: Served) -> None:
    served.runtime.auto = False
    async with connect(served) as socket:
        await socket.send_json(chat(id="a", credits=1))
        await served.runtime.until(lambda: served.runtime.running == 1)
        served.runtime.step(4)
        frames = [await receive(socket) for _ in range(2)]
        assert [frame["choices"][0]["delta"]["content"] for frame in frames] == ["", "a"]
        await socket.send_json({"type": "credit", "id": "a", "credits": 1})
        assert (await receive(socket))["choices"][0]["delta"]["content"] == "nsw"
        served.runtime.step(100)
        await socket.send_json({"type": "credit", "id": "a", "credits": 5})
        text, chunks, last = await answer(socket)
        assert text == "er 0 to hi" and last == {"type": "done", "id": "a"}
        assert len(chunks) == 2  # all the rest in one, and the finish chunk


async def test_without_credits_the_request_itself_pauses(start: Any) -> None:
    served = await start(streamer__max_unread_tokens=8)
    served.runtime.reply = lambda prompt, choice: b"x" * (1000 if prompt == "slow" else 100)
    async with connect(served) as socket:
        await socket.send_json(chat("slow", id="slow", credits=0))
        await served.runtime.until(lambda: len(served.runtime.pauses) == 1)
        assert sum(served.runtime.tokens.values()) < 20
        await socket.send_json(chat("quick", id="quick"))
        text, _, last = await answer(socket)
        assert (text, last["id"]) == ("x" * 100, "quick")
        await socket.send_json({"type": "credit", "id": "slow", "credits": 1000})
        text, _, last = await answer(socket)
        assert (text, last) == ("x" * 1000, {"type": "done", "id": "slow"})


async def test_credits_that_never_come(start: Any) -> None:
    served = await start(server__stall_timeout_s=0.1)
    async with connect(served, autoping=True) as socket:
        await socket.send_json(chat(id="a", credits=0))
        frame = await receive(socket)
        assert (frame["type"], frame["id"], frame["error"]["code"]) == ("error", "a", "stalled")
        assert served.runtime.running == 0


@pytest.mark.parametrize(
    ("frame", "code", "param"),
    [
        ("{", "invalid_json", None),
        ("", "invalid_json", None),
        ("[" * 100, "invalid_json", None),
        ("[]", "invalid_value", None),
        ('{"type": "dance"}', "invalid_value", "type"),
        ('{"type": 5}', "invalid_value", "type"),
        ('{"id": 5}', "invalid_value", "id"),
        ('{"id": "a\\u0000"}', "invalid_value", "id"),
        ('{"type": "credit", "id": "x"}', "invalid_value", "credits"),
        ('{"type": "credit", "id": "x", "credits": -1}', "invalid_value", "credits"),
        ('{"messages": []}', "invalid_value", "messages"),
        ('{"messages": [{"role": "user", "content": "x"}], "stream": false}', "unsupported_value", "stream"),
        ('{"messages": [{"role": "user", "content": "x"}], "model": "y"}', "model_not_found", "model"),
        ('{"messages": [{"role": "user", "content": "x"}], "n": 999}', "invalid_value", "n"),
    ],
)
async def test_a_bad_frame_gets_an_error_and_the_socket_lives(
    served: Served, frame: str, code: str, param: str | None
) -> None:
    async with connect(served) as socket:
        await socket.send_str(frame)
        error = await receive(socket)
        assert error["type"] == "error"
        assert (error["error"]["code"], error["error"]["param"]) == (code, param)
        await socket.send_json(chat())
        assert (await answer(socket))[0] == "answer 0 to hi"


async def test_binary_frames_and_invalid_utf8(served: Served) -> None:
    async with connect(served) as socket:
        await socket.send_bytes(b"{}")
        assert (await receive(socket))["error"]["code"] == "invalid_json"
        await socket.send_frame(b'{"id": "\xff"}', aiohttp.WSMsgType.TEXT)
        assert (await receive(socket))["error"]["code"] == "invalid_json"


async def test_ids_in_use(served: Served) -> None:
    served.runtime.auto = False
    async with connect(served) as socket:
        for tag in ({"id": "a"}, {}):
            await socket.send_json(chat(**tag))
            await socket.send_json(chat(**tag))
            error = await receive(socket)
            assert (error.get("id"), error["error"]["code"]) == (tag.get("id"), "id_in_use")


async def test_a_refused_or_failed_request_ends_with_an_error_frame(served: Served) -> None:
    served.runtime.fail_at = 3
    async with connect(served) as socket:
        await socket.send_json(chat(id="a"))
        text, _, error = await answer(socket)
        assert (text, error["id"], error["error"]["code"]) == ("an", "a", "request_failed")
        await socket.send_json(chat(id="a", temperature=-1))  # the id is free again
        error = await receive(socket)
        assert (error["id"], error["error"]["param"]) == ("a", "temperature")


@pytest.mark.parametrize("leave", ["close", "abort"])
async def test_leaving_cancels_everything(served: Served, leave: str) -> None:
    served.runtime.auto = False
    socket = await connect(served)
    for tag in "abc":
        await socket.send_json(chat(id=tag))
    await served.runtime.until(lambda: served.runtime.running == 3)
    if leave == "close":
        closing = asyncio.ensure_future(socket.close())
    else:
        socket.get_extra_info("socket").shutdown(2)
        closing = asyncio.ensure_future(socket.receive())
    await served.runtime.until(lambda: served.runtime.running == 0)
    assert len(served.runtime.cancelled) == 3 and served.runtime.tokens == {}
    await closing
    await socket.close()


async def test_a_client_that_does_not_read_pauses_and_slows_nobody(start: Any) -> None:
    served = await start(streamer__max_unread_tokens=64)
    served.runtime.max_model_len = 1_000_000
    served.runtime.reply = lambda prompt, choice: b"x" * (200 if prompt == "quick" else 5000)
    async with connect(served, max_msg_size=0) as slow:
        transport = slow._response.connection.transport
        transport.pause_reading()
        await slow.send_json(chat("slow"))
        await served.runtime.until(lambda: len(served.runtime.pauses) > 0)
        async with connect(served) as other:
            await other.send_json(chat("quick"))
            assert len((await answer(other))[0]) == 200
        transport.resume_reading()
        text, _, last = await answer(slow)
        assert len(text) == 5000 and last == {"type": "done"}


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (None, 101),
        ("http://127.0.0.1:{port}", 101),
        ("https://chat.example", 101),
        ("http://evil.example", 403),
        ("http://127.0.0.1:1", 403),
        ("null", 403),
        ("", 403),
    ],
)
async def test_origin(start: Any, origin: str | None, status: int) -> None:
    served = await start(server__allowed_origins=("https://chat.example",))
    headers = {} if origin is None else {"Origin": origin.format(port=served.port)}
    if status == 101:
        async with connect(served, headers=headers) as socket:
            await socket.send_json(chat())
            assert (await answer(socket))[0] == "answer 0 to hi"
    else:
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await connect(served, headers=headers)
        assert refused.value.status == status


async def test_a_stopping_server_says_goodbye(served: Served) -> None:
    async with connect(served) as socket:
        closing = asyncio.ensure_future(served.server.close())
        message = await socket.receive()
        assert message.type is aiohttp.WSMsgType.CLOSE and message.data == 1001
        await closing


async def test_unknown_fields_do_not_include_the_frames_own(served: Served) -> None:
    async with connect(served) as socket:
        await socket.send_str(json.dumps(chat(id="a", type="request", credits=99, user="u")))
        await answer(socket)
    assert b"unknown_fields_total 0.0" in (await served.get("/metrics"))[2]
