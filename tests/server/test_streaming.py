"""Clients that leave or read slowly: what it costs them, and that it costs nobody else anything."""

import asyncio
import json
import select
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
import uvloop
from server_fakes import Served, chat

PATH = "/v1/chat/completions"
# The hook that replaces this fixture is missing from the older releases that the project admits.
pytestmark = pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy.:DeprecationWarning")
LONG = 3900  # tokens: nearly the whole context of the fake


@pytest.fixture(params=["asyncio", "uvloop"])
def event_loop_policy(request: pytest.FixtureRequest) -> asyncio.AbstractEventLoopPolicy:
    return uvloop.EventLoopPolicy() if request.param == "uvloop" else asyncio.DefaultEventLoopPolicy()


class RawClient:
    """A connection that reads only when told to, with a small receive buffer."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def connect(cls, port: int) -> "RawClient":
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        client = cls(sock)
        await client._loop.sock_connect(sock, ("127.0.0.1", port))
        return client

    async def send(self, data: bytes) -> None:
        await self._loop.sock_sendall(self.sock, data)

    async def post(self, body: Any, version: str = "1.1", path: str = PATH) -> None:
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/{version}\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
        await self.send(head.encode() + data)

    async def read(self) -> bytes:
        return await self._loop.sock_recv(self.sock, 65536)

    async def read_all(self) -> bytes:
        data = b""
        while chunk := await self.read():
            data += chunk
        return data

    def close(self, abort: bool = False) -> None:
        if abort:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        self.sock.close()


@pytest.fixture
async def raw(served: Served) -> AsyncIterator[RawClient]:
    client = await RawClient.connect(served.port)
    yield client
    client.close()


def long_answers(served: Served) -> None:
    served.runtime.reply = lambda prompt, choice: b"x" * LONG


@pytest.mark.parametrize("abort", [False, True])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_stops_costing_steps(
    served: Served, raw: RawClient, stream: bool, abort: bool
) -> None:
    long_answers(served)
    served.runtime.auto = False
    await raw.post(chat(stream=stream))
    await served.runtime.until(lambda: served.runtime.running == 1)
    served.runtime.step(3)
    if stream:
        assert (await raw.read()).startswith(b"HTTP/1.1 200")
    raw.close(abort)
    await served.runtime.until(lambda: served.runtime.running == 0)  # without a step: the leaving itself ends it
    assert len(served.runtime.cancelled) == 1
    assert sum(served.runtime.tokens.values()) == 3


async def test_leaving_before_the_first_token(served: Served, raw: RawClient) -> None:
    served.runtime.auto = False
    await raw.post(chat(stream=True))
    await served.runtime.until(lambda: served.runtime.running == 1)
    raw.close()
    await served.runtime.until(lambda: served.runtime.running == 0)
    assert served.runtime.tokens == {}


async def test_a_slow_reader_gets_merged_text_then_a_pause_and_slows_nobody(start: Any) -> None:
    served = await start(streamer__max_unread_tokens=64)
    served.runtime.max_model_len = 1_000_000
    served.runtime.reply = lambda prompt, choice: b"x" * (200 if prompt == "quick" else 5000)
    slow = await RawClient.connect(served.port)
    await slow.post(chat("slow", stream=True))
    await served.runtime.until(lambda: len(served.runtime.pauses) > 0)  # the connection is full, and then the mailbox
    assert served.runtime.running == 1
    status, _, body = await served.post(PATH, chat("quick"))
    assert status == 200 and len(body["choices"][0]["message"]["content"]) == 200
    assert served.runtime.running == 1
    # Reading again lets it go on to its end, with nothing lost.
    slow.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    data = b""
    while not data.endswith(b"0\r\n\r\n"):
        data += await slow.read()
    slow.close()
    chunks = [json.loads(line[len(b"data: ") :]) for line in data.split(b"\n") if line.startswith(b"data: {")]
    texts = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert len("".join(texts)) == 5000
    assert max(map(len, texts)) > 1  # some were merged


async def test_a_client_that_never_reads_is_cancelled_and_disconnected(start: Any) -> None:
    served = await start(streamer__max_unread_tokens=64, server__stall_timeout_s=0.2)
    served.runtime.max_model_len = 1_000_000
    served.runtime.reply = lambda prompt, choice: b"x" * 20_000
    stalled = await RawClient.connect(served.port)
    await stalled.post(chat(stream=True))
    await served.runtime.until(lambda: len(served.runtime.cancelled) == 1)
    with pytest.raises(ConnectionResetError):
        await stalled.read_all()
    stalled.close()


async def test_a_client_that_never_reads_a_whole_answer_is_disconnected(start: Any) -> None:
    served = await start(server__stall_timeout_s=0.2)
    served.runtime.max_model_len = 1_000_000
    stalled = await RawClient.connect(served.port)
    await stalled.post({"prompt": "x" * 400_000, "echo": True, "max_tokens": 1}, path="/v1/completions")
    async with asyncio.timeout(10):
        with pytest.raises(ConnectionResetError):
            await poll_reset(stalled.sock)
    stalled.close()


async def poll_reset(sock: socket.socket) -> None:
    """Until the peer resets the connection, without reading a byte that it has sent."""
    reset = asyncio.get_running_loop().create_future()
    with select.epoll() as poll:
        poll.register(sock.fileno(), 0)  # errors and hang-ups only
        asyncio.get_running_loop().add_reader(poll.fileno(), reset.set_result, None)
        await reset
        asyncio.get_running_loop().remove_reader(poll.fileno())
    raise ConnectionResetError(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))


async def test_http_1_0_gets_a_stream_without_chunks(served: Served, raw: RawClient) -> None:
    await raw.post(chat(stream=True, max_tokens=2), version="1.0")
    head, _, body = (await raw.read_all()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 200") and b"chunked" not in head
    assert body.startswith(b"data: {") and body.endswith(b"data: [DONE]\n\n")


async def test_http_1_1_chunks_are_well_formed(served: Served, raw: RawClient) -> None:
    await raw.post(chat(stream=True, max_tokens=3))
    data = b""
    while not data.endswith(b"0\r\n\r\n"):
        data += await raw.read()
    _, _, body = data.partition(b"\r\n\r\n")
    while body != b"0\r\n\r\n":
        size, _, rest = body.partition(b"\r\n")
        chunk, end, body = rest[: int(size, 16)], rest[int(size, 16) :][:2], rest[int(size, 16) + 2 :]
        assert end == b"\r\n" and chunk.startswith(b"data: ") and chunk.endswith(b"\n\n")
    # The connection is still good for the next request.
    await raw.post(chat(max_tokens=1))
    assert (await raw.read()).startswith(b"HTTP/1.1 200")


async def test_a_silent_stream_gets_comments(served: Served, raw: RawClient) -> None:
    served.server.context.ping_s = 0.05
    served.runtime.auto = False
    await raw.post(chat(stream=True))
    data = b""
    while data.count(b": ping\n\n") < 2:
        data += await raw.read()
    served.runtime.step(100)
    while not data.endswith(b"0\r\n\r\n"):
        data += await raw.read()
    assert data.count(b'"role":"assistant"') == 1 and b"data: [DONE]" in data


async def test_many_streams_at_once(served: Served) -> None:
    async def one(number: int) -> str:
        text = ""
        body = json.dumps(chat(f"p{number}", stream=True)).encode()
        async with served.client.post(served.url + PATH, data=body) as reply:
            async for line in reply.content:
                if line.startswith(b"data: {"):
                    text += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
        return text

    texts = await asyncio.gather(*(one(number) for number in range(40)))
    assert texts == [f"answer 0 to p{number}" for number in range(40)]


async def test_nothing_is_written_behind_the_end_of_a_stream_that_failed(served: Served, raw: RawClient) -> None:
    """One prompt of two is refused; the other one runs until it is cancelled, and must not touch the connection."""
    served.runtime.auto = False
    await raw.post({"prompt": [[97], [98]], "stream": True, "max_tokens": 50}, path="/v1/completions")
    await served.runtime.until(lambda: served.runtime.running == 2)
    served.runtime.step(2)
    data = await raw.read()
    served.runtime.fail_first()
    served.runtime.step(3)
    await served.runtime.until(lambda: served.runtime.running == 0)
    while not data.endswith(b"0\r\n\r\n"):
        data += await raw.read()
    assert data.count(b"data: [DONE]") == 1 and b'"code":"request_failed"' in data
    await raw.post(chat(max_tokens=1))
    await served.runtime.until(lambda: served.runtime.running == 1)
    served.runtime.step(2)
    assert (await raw.read()).startswith(b"HTTP/1.1 200")
