"""What a streamed token costs the server: CPU time of one process over an engine that costs nothing.

    python bench/stream_cost.py [--streams 64] [--step-ms 0 8] [--flush-ms 0 5]

A step gives each stream one token, as a decode step does: one step after the other without a break, or some
milliseconds apart. With --flush-ms 0 every token is a write of its own; otherwise tokens that come within
server.flush_interval_ms share one. The floor beside it is a bare `socket.send` of as many bytes in the same rhythm:
with pauses between the steps most of it is the waking of the reader and of the processor itself. Mailbox pushes and
notifications are counted too, because a server cannot stream without them. The client is another process, which reads
raw bytes and parses nothing. The figure is the server process's CPU time (user and system) from the first step to the
last, divided by the tokens.
"""

import argparse
import asyncio
import json
import socket
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import uvloop
from prometheus_client import CollectorRegistry

from millrace.runtime.config import load_config
from millrace.runtime.handle import RequestHandle
from millrace.runtime.mailbox import Mailbox
from millrace.runtime.types import FinishReason
from millrace.server.app import start_server


class Engine:
    """A runtime that only streams: every step pushes one token to each open request."""

    def __init__(self, streams: int, tokens: int, step_s: float, flush_ms: float) -> None:
        self.config = load_config(None, {"server.flush_interval_ms": flush_ms})
        self._step_s = step_s
        self.model_name = "cost"
        self.max_model_len = 1 << 20
        self.created = 0
        self.tokenizer: Any = None
        self.registry = CollectorRegistry()
        self._mailboxes: list[Mailbox] = []
        self._streams = streams
        self._tokens = tokens
        self.result: asyncio.Future[tuple[float, float]] = asyncio.get_running_loop().create_future()

    def submit(self, prompt: object, sampling: object = None, **options: object) -> RequestHandle:
        mailbox = Mailbox(1, 1 << 30)
        mailbox.prompt_token_ids = (1,)
        self._mailboxes.append(mailbox)
        if len(self._mailboxes) == self._streams:
            asyncio.get_running_loop().create_task(self._run())
        return RequestHandle(len(self._mailboxes), "r", self.model_name, 1, mailbox, lambda: None)

    def health(self) -> Any:
        return SimpleNamespace(state="ready", progressing=True)

    async def drain(self, timeout: float) -> bool:
        return True

    async def _run(self) -> None:
        self._step(0)
        await asyncio.sleep(0.5)  # all heads are out before the measurement begins
        cpu, wall = time.process_time(), time.perf_counter()
        for step in range(1, self._tokens):
            self._step(step)
            await asyncio.sleep(self._step_s)
        self.result.set_result((time.process_time() - cpu, time.perf_counter() - wall))
        for mailbox in self._mailboxes:
            mailbox.finish(0, "", FinishReason.LENGTH)
            mailbox.notify()

    def _step(self, step: int) -> None:
        for mailbox in self._mailboxes:
            mailbox.push(0, " token", step)
            mailbox.notify()


CLIENT = """
import selectors, socket, sys
port, streams = int(sys.argv[1]), int(sys.argv[2])
body = b'{"messages":[{"role":"user","content":"hi"}],"stream":true}'
head = b"POST /v1/chat/completions HTTP/1.1\\r\\nHost: localhost\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(body)
select = selectors.DefaultSelector()
for _ in range(streams):
    sock = socket.create_connection(("127.0.0.1", port))
    sock.sendall(head + body)
    select.register(sock, selectors.EVENT_READ)
while streams:
    for key, _ in select.select():
        data = key.fileobj.recv(1 << 18)
        if not data or data.endswith(b"0\\r\\n\\r\\n"):
            select.unregister(key.fileobj)
            key.fileobj.close()
            streams -= 1
"""


FLOOR_CLIENT = """
import selectors, socket, sys
port, streams = int(sys.argv[1]), int(sys.argv[2])
select = selectors.DefaultSelector()
for _ in range(streams):
    select.register(socket.create_connection(("127.0.0.1", port)), selectors.EVENT_READ)
while streams:
    for key, _ in select.select():
        if not key.fileobj.recv(1 << 18):
            select.unregister(key.fileobj)
            streams -= 1
"""


def measure_floor(streams: int, tokens: int, step_ms: float, chunk_bytes: int = 250) -> float:
    """CPU microseconds of a bare `socket.send` per token to readers in another process, one send per token."""
    with socket.create_server(("127.0.0.1", 0), backlog=streams) as listener:
        port = listener.getsockname()[1]
        client = subprocess.Popen([sys.executable, "-c", FLOOR_CLIENT, str(port), str(streams)])
        sockets = [listener.accept()[0] for _ in range(streams)]
    chunk = b"x" * chunk_bytes
    cpu = time.process_time()
    for _ in range(tokens):
        for sock in sockets:
            sock.send(chunk)
        if step_ms:
            time.sleep(step_ms / 1000)
    cost = (time.process_time() - cpu) / (streams * tokens)
    for sock in sockets:
        sock.close()
    client.wait(timeout=60)
    return cost * 1e6


async def measure(streams: int, tokens: int, step_ms: float, flush_ms: float = 5.0) -> dict[str, float]:
    """CPU microseconds of the server process per token."""
    engine = Engine(streams, tokens, step_ms / 1000, flush_ms)
    server = await start_server(engine, "127.0.0.1", 0, page=False)
    client = await asyncio.create_subprocess_exec(sys.executable, "-c", CLIENT, str(server.port), str(streams))
    try:
        async with asyncio.timeout(120):
            cpu, wall = await engine.result
            await client.wait()
    finally:
        if client.returncode is None:
            client.kill()
        await server.close()
    count = streams * (tokens - 1)
    return {
        "streams": streams,
        "flush_ms": flush_ms,
        "step_ms": step_ms,
        "tokens": count,
        "us_cpu_per_token": round(cpu / count * 1e6, 2),
        "tokens_per_second": round(count / wall),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--tokens", type=int, default=1000, help="per stream")
    parser.add_argument("--step-ms", type=float, nargs="+", default=[0, 8], help="pause between two steps")
    parser.add_argument(
        "--flush-ms", type=float, nargs="+", default=[0, 5], help="server.flush_interval_ms; 0: a write per token"
    )
    args = parser.parse_args()
    for step_ms in args.step_ms:
        for streams in args.streams:
            for flush_ms in args.flush_ms:
                print(json.dumps(uvloop.run(measure(streams, args.tokens, step_ms, flush_ms))), flush=True)
            floor = measure_floor(streams, args.tokens, step_ms)
            print(json.dumps({"streams": streams, "step_ms": step_ms, "us_cpu_per_send": round(floor, 2)}), flush=True)


if __name__ == "__main__":
    main()
