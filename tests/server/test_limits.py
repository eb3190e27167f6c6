"""Every bound of the Limits table, at the bound and one beyond it. The message holds both numbers."""

import asyncio
import dataclasses
import json
from typing import Any

import msgspec
import pytest
from server_fakes import Served, chat

from millrace.runtime.config import Limits
from millrace.server.app import KEEPALIVE_S, LINGER_S, MAX_HEADERS
from millrace.server.connection import Connection

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"


def many(count: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": "x"}] * count


# name of the limit, its value in the test, path, and the request of a size
COUNTED: list[tuple[str, int, str, Any]] = [
    ("max_choices", 2, CHAT, lambda size: chat(n=size)),
    ("max_choices", 2, TEXT, lambda size: {"prompt": "a", "n": size}),
    ("max_prompts", 3, TEXT, lambda size: {"prompt": ["a"] * size}),
    ("max_prompts", 3, TEXT, lambda size: {"prompt": [[97]] * size}),
    ("max_messages", 3, CHAT, lambda size: {"messages": many(size)}),
    (
        "max_messages",
        3,
        CHAT,
        lambda size: {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * size}]},
    ),
    ("max_stop", 2, CHAT, lambda size: chat(stop=["zz"] * size)),
    ("max_stop_chars", 5, CHAT, lambda size: chat(stop="z" * size)),
    ("max_stop_token_ids", 3, CHAT, lambda size: chat(stop_token_ids=[1] * size)),
    ("max_logprobs", 4, CHAT, lambda size: chat(logprobs=True, top_logprobs=size)),
    ("max_logprobs", 4, CHAT, lambda size: chat(prompt_logprobs=size)),
    ("max_logprobs", 4, TEXT, lambda size: {"prompt": "a", "logprobs": size}),
    ("max_logit_bias", 3, CHAT, lambda size: chat(logit_bias={str(i): 1 for i in range(size)})),
    ("max_token_ids", 3, CHAT, lambda size: chat(allowed_token_ids=list(range(size)))),
    ("max_name_chars", 12, CHAT, lambda size: chat(request_id="r" * size)),
    ("max_name_chars", 12, CHAT, lambda size: chat(cache_salt="r" * size)),
    ("max_name_chars", 12, CHAT, lambda size: {"messages": [{"role": "user", "content": "x", "name": "n" * size}]}),
    ("max_name_chars", 12, CHAT, lambda size: chat(chat_template_kwargs={"x" * size: 1})),
    ("max_name_chars", 12, CHAT, lambda size: chat(chat_template_kwargs={"x": "y" * size})),
    ("max_json_depth", 8, CHAT, lambda size: chat(extra=json.loads("[" * (size - 1) + "]" * (size - 1)))),
]


@pytest.mark.parametrize(("limit", "bound", "path", "request_of"), COUNTED)
async def test_counts(start: Any, limit: str, bound: int, path: str, request_of: Any) -> None:
    served = await start(**{f"limits__{limit}": bound})
    status, _, body = await served.post(path, request_of(bound))
    assert status == 200, body
    status, _, body = await served.post(path, request_of(bound + 1))
    assert status == 400
    assert str(bound + 1) in body["error"]["message"] and str(bound) in body["error"]["message"]
    assert served.runtime.running == 0


async def test_body_bytes(start: Any) -> None:
    served = await start(limits__max_body_bytes=2048)
    body = json.dumps(chat()).encode()
    assert (await served.raw(CHAT, body.ljust(2048)))[0] == 200
    status, _, reply = await served.raw(CHAT, body.ljust(2049))
    error = json.loads(reply)["error"]
    assert (status, error["code"]) == (413, "body_too_large")
    assert "2049" in error["message"] and "2048" in error["message"]


async def test_body_bytes_without_a_length(start: Any) -> None:
    served = await start(limits__max_body_bytes=2048)

    async def pieces(size: int) -> Any:
        yield json.dumps(chat()).encode().ljust(size - 1)
        yield b" "

    for size, status in ((2048, 200), (2049, 413)):
        async with served.client.post(served.url + CHAT, data=pieces(size)) as reply:
            assert reply.status == status


async def test_header_bytes(start: Any) -> None:
    served = await start(limits__max_header_bytes=1024)
    assert (await served.get("/livez", headers={"x-a": "v" * 1021}))[0] == 200
    status, _, body = await served.get("/livez", headers={"x-a": "v" * 1025})
    assert (status, json.loads(body)["error"]["code"]) == (431, "header_too_large")
    assert (await served.get("/livez?" + "q" * 2000))[0] == 431


async def test_number_of_headers(served: Served) -> None:
    status, _, _ = await served.get("/livez", headers={f"x-{i}": "v" for i in range(MAX_HEADERS + 1)})
    assert status == 400


async def test_slow_head(start: Any) -> None:
    served = await start(limits__header_timeout_s=0.1)
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(b"GET /livez HTTP/1.1\r\nHost: local")
    async with asyncio.timeout(5):
        assert await reader.read() == b""
    writer.close()


async def test_slow_second_head(start: Any) -> None:
    served = await start(limits__header_timeout_s=0.1)
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert b"200 OK" in await reader.readuntil(b'{"status":"ok"}')
    writer.write(b"GET /livez HTTP/1.1\r\nHost: local")
    async with asyncio.timeout(5):
        assert await reader.read() == b""
    writer.close()


async def test_a_long_answer_outlives_the_deadline_of_heads(start: Any) -> None:
    served = await start(limits__header_timeout_s=0.05)
    served.runtime.auto = False
    asking = asyncio.ensure_future(served.post(CHAT, chat()))
    await served.runtime.until(lambda: served.runtime.running == 1)
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    assert await reader.read() == b""  # a deadline has passed for another connection, which sent nothing
    writer.close()
    served.runtime.step(100)
    assert (await asking)[0] == 200


async def test_slow_body(start: Any) -> None:
    served = await start(limits__body_timeout_s=0.1)
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{{".encode())
    head = await reader.readuntil(b"\r\n\r\n")
    assert b" 408 " in head and b"Connection: close" in head
    assert b"body_timeout" in await reader.readuntil(b"}}")
    writer.close()


async def test_connections(start: Any) -> None:
    served = await start(limits__max_connections=2)
    kept = [await asyncio.open_connection("127.0.0.1", served.port) for _ in range(2)]
    for reader, writer in kept:
        writer.write(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await reader.readuntil(b"}")
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    reply = await reader.read()
    assert b"HTTP/1.1 503" in reply and b"too_many_connections" in reply and b"Retry-After" in reply
    writer.close()
    for _, writer in kept:
        writer.close()


@pytest.mark.parametrize("size", [1024, 1025])
async def test_ws_message_bytes(start: Any, size: int) -> None:
    served = await start(limits__max_ws_message_bytes=1024)
    async with served.client.ws_connect(served.url + "/v1/ws") as socket:
        await socket.send_str(json.dumps(chat()).ljust(size))
        message = await socket.receive()
        assert (message.type.name, socket.close_code) == (("TEXT", None) if size == 1024 else ("CLOSE", 1009))


async def test_ws_requests(start: Any) -> None:
    served = await start(limits__max_ws_requests=2)
    served.runtime.auto = False
    async with served.client.ws_connect(served.url + "/v1/ws") as socket:
        for tag in "abc":
            await socket.send_json(chat(id=tag))
        error = await socket.receive_json()
    assert (error["id"], error["error"]["code"]) == ("c", "too_many_requests")


def test_every_limit_has_a_test() -> None:
    """A limit that nobody enforces would be an option accepted and ignored."""
    tested = {limit for limit, *_ in COUNTED} | {
        "max_body_bytes",
        "max_header_bytes",
        "max_ws_message_bytes",
        "max_ws_requests",
        "max_connections",
        "header_timeout_s",
        "body_timeout_s",
    }
    assert tested == {field.name for field in msgspec.structs.fields(Limits)}


async def test_aiohttps_own_bounds_are_set_by_name(start: Any) -> None:
    served = await start(limits__max_header_bytes=2000, limits__header_timeout_s=3.0, server__stall_timeout_s=7.0)
    _, writer = await asyncio.open_connection("127.0.0.1", served.port)
    async with served.client.get(served.url + "/livez"):
        connection = next(iter(served.server.connections))
    writer.close()
    assert isinstance(connection, Connection)
    assert connection.keepalive_timeout == KEEPALIVE_S and connection._lingering_time == LINGER_S
    assert (connection.max_line_size, connection.max_field_size) == (2000, 2000)
    assert connection.max_headers == MAX_HEADERS
    assert dataclasses.astuple(connection._bounds)[:3] == (3.0, 7.0, 10_000)
    assert connection.access_log is None
    assert connection._manager is not None and connection._manager.handler_cancellation
