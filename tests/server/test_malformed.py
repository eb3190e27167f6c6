"""Input that no honest client sends: the server answers 4xx with an error object, or hangs up, and goes on."""

import asyncio
import gzip
import json
import threading
from collections.abc import Iterator
from http.client import HTTPConnection
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from server_fakes import FakeRuntime, Served, chat

from millrace.server.app import start_server
from millrace.server.body import json_depth
from millrace.server.fields import REFUSED
from millrace.server.protocol import CHAT_FIELDS, COMPLETION_FIELDS

CHAT = "/v1/chat/completions"
DEEP = 100_000

BODIES: dict[str, bytes] = {
    "nothing": b"",
    "space": b"   ",
    "text": b"hello",
    "open object": b'{"messages": [',
    "trailing comma": b'{"messages": [],}',
    "two objects": b"{}{}",
    "byte order mark": b"\xef\xbb\xbf{}",
    "utf-16": "{}".encode("utf-16"),
    "invalid utf-8": b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}',
    "invalid utf-8 in an unknown field": b'{"messages": [{"role": "user", "content": "x"}], "\xff": 1}',
    "overlong utf-8": b'{"messages": [{"role": "user", "content": "\xc0\x80"}]}',
    "surrogate in utf-8": b'{"messages": [{"role": "user", "content": "\xed\xa0\x80"}]}',
    "lone high surrogate": b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    "lone low surrogate": b'{"messages": [{"role": "user", "content": "\\udc00 x"}]}',
    "surrogates in wrong order": b'{"messages": [{"role": "user", "content": "\\udc00\\ud800"}]}',
    "bad escape": b'{"messages": [{"role": "user", "content": "\\x"}]}',
    "raw newline": b'{"messages": [{"role": "user", "content": "a\nb"}]}',
    "NaN": b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
    "Infinity": b'{"messages": [{"role": "user", "content": "x"}], "temperature": Infinity}',
    "huge number": b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e400}',
    "huge integer": b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": ' + b"9" * 5000 + b"}",
    "integer beyond 64 bits": b'{"messages": [{"role": "user", "content": "x"}], "seed": 99999999999999999999}',
    "array": b"[]",
    "null": b"null",
    "number": b"5",
    "string": b'"x"',
    "deep array": b"[" * DEEP + b"]" * DEEP,
    "deep object": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "deep unknown field": b'{"messages": [], "x": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    "deep and open": b"[" * DEEP,
    "deep content": b'{"messages": [{"role": "user", "content": ' + b"[" * 200 + b"]" * 200 + b"}]}",
    "no messages": b'{"model": "fake/model:1"}',
    "messages an object": b'{"messages": {}}',
    "messages of strings": b'{"messages": ["x"]}',
    "content a number": b'{"messages": [{"role": "user", "content": 5}]}',
    "n a string": b'{"messages": [{"role": "user", "content": "x"}], "n": "1"}',
    "n a fraction": b'{"messages": [{"role": "user", "content": "x"}], "n": 1.5}',
    "stream a string": b'{"messages": [{"role": "user", "content": "x"}], "stream": "yes"}',
    "bias of names": b'{"messages": [{"role": "user", "content": "x"}], "logit_bias": {"a": 1}}',
    "stop a number": b'{"messages": [{"role": "user", "content": "x"}], "stop": 5}',
    "stop empty": b'{"messages": [{"role": "user", "content": "x"}], "stop": [""]}',
}


@pytest.mark.parametrize("name", BODIES)
async def test_bodies(served: Served, name: str) -> None:
    status, headers, reply = await served.raw(CHAT, BODIES[name])
    error = json.loads(reply)["error"]
    assert status == 400 and "x-request-id" in headers
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert not any(leak in error["message"] for leak in ("Traceback", "0x", "millrace.", "msgspec", ".py"))
    assert served.runtime.submits == [] or name == "stop empty"
    assert (await served.post(CHAT, chat(max_tokens=1)))[0] == 200


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "gzip, gzip"])
async def test_encoded_bodies_are_refused_unread(served: Served, encoding: str) -> None:
    bomb = gzip.compress(b" " * 50_000_000)
    status, _, reply = await served.raw(CHAT, bomb, headers={"Content-Encoding": encoding})
    assert (status, json.loads(reply)["error"]["code"]) == (415, "unsupported_encoding")


REQUESTS: dict[str, tuple[bytes, bytes]] = {
    "not http": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 9 + b"\r\n\r\n", b" 400 "),
    "http 2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b" 400 "),
    "no colon": (b"GET /livez HTTP/1.1\r\nHost localhost\r\n\r\n", b" 400 "),
    "nul in header": (b"GET /livez HTTP/1.1\r\nHost: localhost\r\nx: \x00\r\n\r\n", b" 400 "),
    "space before colon": (b"GET /livez HTTP/1.1\r\nHost : localhost\r\n\r\n", b" 400 "),
    "two lengths": (
        b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        b" 400 ",
    ),
    "length and chunks": (
        b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b" 400 ",
    ),
    "negative length": (
        b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b" 400 ",
    ),
    "bad chunk size": (
        b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
        b" 400 ",
    ),
    "long target": (b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", b" 431 "),
    "huge length": (
        b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n",
        b" 413 ",
    ),
}


@pytest.mark.parametrize("name", REQUESTS)
async def test_raw_requests(served: Served, name: str) -> None:
    request, status = REQUESTS[name]
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(request)
    async with asyncio.timeout(10):
        head = await reader.readuntil(b"\r\n\r\n")
        assert status in head.split(b"\r\n")[0]
        assert b"Connection: close" in head
        body = json.loads(await reader.readuntil(b"}}"))
        assert body["error"]["type"] == "invalid_request_error"
        assert "localhost" not in body["error"]["message"]  # what the client sent is not quoted
    writer.close()
    assert (await served.get("/livez"))[0] == 200


async def test_pipelined_requests_are_answered_in_order(served: Served) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    for number in range(5):
        writer.write(f"GET /livez HTTP/1.1\r\nHost: localhost\r\nx-request-id: r{number}\r\n\r\n".encode())
    for number in range(5):
        head = await reader.readuntil(b"\r\n\r\n")
        assert f"r{number}".encode() in head
        await reader.readexactly(len(b'{"status":"ok"}'))
    writer.close()


@pytest.mark.parametrize(
    ("body", "depth"),
    [(b"1", 0), (b"[]", 1), (b'{"a":[{"b":"]]]["}]}', 3), (rb'["\"[[[","\\",[]]', 2), (b"[[],[],[[]]]", 3)],
)
def test_depth(body: bytes, depth: int) -> None:
    assert json_depth(body) == depth


@given(st.recursive(st.none() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_depth_of_any_value(value: Any) -> None:
    def depth(node: Any) -> int:
        if isinstance(node, dict):
            return 1 + max(map(depth, node.values()), default=0)
        return 1 + max(map(depth, node), default=0) if isinstance(node, list) else 0

    assert json_depth(json.dumps(value).encode()) == depth(value)
    assert json_depth(json.dumps(value, ensure_ascii=False).encode()) == depth(value)


class Background:
    """A server on a loop in a thread: hypothesis calls its tests without a loop."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.port = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)

    async def _start(self) -> int:
        self._runtime = FakeRuntime(max_model_len=512)
        self._server = await start_server(self._runtime, "127.0.0.1", 0)
        return self._server.port

    async def _stop(self) -> None:
        await self._server.close()
        await self._runtime.close()

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("POST", path, body)
            reply = connection.getresponse()
            return reply.status, reply.read()
        finally:
            connection.close()


@pytest.fixture(scope="module")
def background() -> Iterator[Background]:
    server = Background()
    yield server
    server.close()


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-2, 3) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
NAMES = st.sampled_from(sorted(CHAT_FIELDS | COMPLETION_FIELDS | {*REFUSED, "tools"}))
MESSAGES = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": st.text()}))
FIELDS = st.dictionaries(NAMES, ANY, max_size=4)
HEAVY = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check(status: int, reply: bytes) -> None:
    assert status < 500, reply
    if status != 200:
        assert set(json.loads(reply)["error"]) == {"message", "type", "param", "code"}


@HEAVY
@given(messages=MESSAGES, fields=FIELDS)
def test_chat_never_fails(background: Background, messages: Any, fields: Any) -> None:
    check(*background.post(CHAT, json.dumps({"messages": messages, "max_tokens": 3, **fields}).encode()))


@HEAVY
@given(prompt=ANY | st.lists(st.integers(0, 300)) | st.lists(st.text()), fields=FIELDS)
def test_completions_never_fail(background: Background, prompt: Any, fields: Any) -> None:
    check(*background.post("/v1/completions", json.dumps({"prompt": prompt, "max_tokens": 3, **fields}).encode()))


@HEAVY
@given(st.binary(max_size=200))
def test_bytes_never_fail(background: Background, body: bytes) -> None:
    status, reply = background.post(CHAT, body)
    assert status == 400
    check(status, reply)
