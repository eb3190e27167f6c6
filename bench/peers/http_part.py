"""Concurrent streams over HTTP: `millrace serve` and llama-server take turns, and Millrace in process beside them."""

import asyncio
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from rich.table import Table

from peers.measure import Load, Running
from peers.table import spread
from peers.worker import WorkerError

LOAD = Load("16 streams", 16, 128, 64)
LLAMA_SERVER = "llama-server Q8_0"
MILLRACE_SERVER = "millrace serve int8"
IN_PROCESS = "Millrace int8 in process"


@dataclass(frozen=True)
class Streams:
    """One round on a server: seconds for everything, each stream's seconds to its first chunk, tokens in all."""

    seconds: float
    first: list[float]
    tokens: int

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


class Server:
    """A server process on a free port of this machine, ready when `path` answers 200.

    Raises WorkerError if it ends or is not ready within `limit` seconds.
    """

    def __init__(
        self, command: Callable[[int], Sequence[str]], path: str, env: Mapping[str, str], log: Path, limit: float
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._limit = limit
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as sink:
            self._process = subprocess.Popen(
                command(port), stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, env={**os.environ, **env},
                start_new_session=True,
            )  # fmt: skip
        try:
            asyncio.run(self._ready(path, log))
        except BaseException:
            self.close()
            raise

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Streams:
        """All prompts at once; raises WorkerError if one fails or does not give all of its tokens."""
        try:
            return asyncio.run(self._streams(prompts, new_tokens))
        except (aiohttp.ClientError, TimeoutError) as error:
            raise WorkerError(f"{type(error).__name__}: {error}") from error

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    async def _ready(self, path: str, log: Path) -> None:
        deadline = time.monotonic() + self._limit
        async with aiohttp.ClientSession() as session:
            while time.monotonic() < deadline:
                if self._process.poll() is not None:
                    raise WorkerError(f"the server ended with {self._process.returncode}; the log is {log}")
                with suppress(aiohttp.ClientError):
                    async with session.get(self.url + path) as reply:
                        if reply.status == 200:
                            return
                await asyncio.sleep(0.1)
        raise WorkerError(f"the server was not ready after {self._limit:.0f} s; the log is {log}")

    async def _streams(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Streams:
        limit = aiohttp.ClientTimeout(total=self._limit)
        async with aiohttp.ClientSession(timeout=limit, connector=aiohttp.TCPConnector(limit=0)) as session:
            begin = time.perf_counter()
            answers = await asyncio.gather(*(self._stream(session, prompt, new_tokens, begin) for prompt in prompts))
            seconds = time.perf_counter() - begin
        return Streams(seconds, [first for first, _ in answers], sum(tokens for _, tokens in answers))

    async def _stream(
        self, session: aiohttp.ClientSession, prompt: Sequence[int], new_tokens: int, begin: float
    ) -> tuple[float, int]:
        body = {
            "model": "default",
            "prompt": list(prompt),
            "max_tokens": new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        first, tokens = None, 0
        async with session.post(f"{self.url}/v1/completions", json=body) as reply:
            if reply.status != 200:
                raise WorkerError(f"HTTP {reply.status}: {(await reply.text())[:200]}")
            async for line in reply.content:
                if not line.startswith(b"data: {"):
                    continue
                chunk = msgspec.json.decode(line[6:])
                if "error" in chunk:
                    raise WorkerError(str(chunk["error"])[:200])
                if first is None and any(choice.get("text") for choice in chunk.get("choices", ())):
                    first = time.perf_counter() - begin
                if chunk.get("usage"):
                    tokens = chunk["usage"]["completion_tokens"]
        if first is None or tokens != new_tokens:
            raise WorkerError(f"a stream gave {tokens} of {new_tokens} tokens")
        return first, tokens


def millrace_server(model: Path, threads: int, log: Path, limit: float) -> Server:
    def command(port: int) -> list[str]:
        return [sys.executable, "-m", "millrace.runtime.cli", "serve", str(model), "--served-model-name", "default",
                "--quantize", "int8", "--max-model-len", "2048", "--threads", str(threads),
                "--port", str(port)]  # fmt: skip

    return Server(command, "/readyz", {}, log, limit)


def llama_server(binary: Path, model: Path, threads: int, env: Mapping[str, str], log: Path, limit: float) -> Server:
    def command(port: int) -> list[str]:
        cells = LOAD.sequences * 256  # of the KV cache: room for 192 tokens each, in its steps of 256
        return [str(binary), "--model", str(model), "--alias", "default", "--parallel", str(LOAD.sequences),
                "--ctx-size", str(cells), "--threads", str(threads), "--threads-batch", str(threads),
                "--host", "127.0.0.1", "--port", str(port)]  # fmt: skip

    return Server(command, "/health", env, log, limit)


def measure_http(
    servers: Mapping[str, Callable[[], Server]],
    in_process: Callable[[], Running],
    rounds: int,
    deadline: float,
    told: Callable[[str], None],
) -> dict[str, Any]:
    """Rounds of LOAD on every server and in process, in turns; the JSON of this part.

    All stay loaded. A server that fails is out, and `failed` says why; so is what the deadline (time.monotonic) cut.
    """
    rates: dict[str, list[float]] = {name: [] for name in (*servers, IN_PROCESS)}
    first: dict[str, list[float]] = {name: [] for name in servers}
    failed: dict[str, str] = {}
    open_now: dict[str, Any] = {}
    try:
        for number in range(rounds):
            for name in rates:
                if name in failed:
                    continue
                if time.monotonic() > deadline:
                    failed.setdefault("time", f"ran out in round {number + 1} at {name}")
                    break
                try:
                    if name not in open_now:
                        open_now[name] = in_process() if name == IN_PROCESS else servers[name]()
                        if name != IN_PROCESS:
                            open_now[name].run(LOAD.prompts(-1)[:2], 4)
                    answer = open_now[name].run(LOAD.prompts(number), LOAD.new_tokens)
                except WorkerError as error:
                    failed[name] = str(error)
                    told(f"{name} is out: {error}")
                    continue
                if isinstance(answer, Streams):
                    first[name].append(statistics.median(answer.first))
                    rates[name].append(answer.rate)
                else:
                    rates[name].append(LOAD.sequences * LOAD.new_tokens / answer["seconds"])
                told(f"round {number + 1}, {LOAD.name}: {name}")
    finally:
        for process in open_now.values():
            process.close()
    return {"load": LOAD.name, "rates": rates, "median_first_token_seconds": first, "failed": failed,
            "ratios": http_ratios(rates, first)}  # fmt: skip


def http_ratios(
    rates: Mapping[str, Sequence[float]], first: Mapping[str, Sequence[float]]
) -> dict[str, dict[str, float] | None]:
    """Spreads of: output rate to llama-server's, median time to first token to its, output rate to in process."""

    def over(values: Mapping[str, Sequence[float]], other: str) -> dict[str, float] | None:
        pairs = zip(values.get(MILLRACE_SERVER, ()), values.get(other, ()), strict=False)
        return spread([own / theirs for own, theirs in pairs])

    return {
        "output tokens/s over llama-server's": over(rates, LLAMA_SERVER),
        "time to first token over llama-server's": over(first, LLAMA_SERVER),
        "output tokens/s over in process": over(rates, IN_PROCESS),
    }


def http_table(shape: str, result: Mapping[str, Any]) -> Table:
    table = Table(title=f"{shape}, int8, {LOAD.sequences} streams over HTTP: `millrace serve`, median (min-max)")
    table.add_column("")
    table.add_column("ratio", justify="right")
    for name, found in result["ratios"].items():
        shown = "-" if found is None else f"{found['median']:.2f} ({found['min']:.2f}-{found['max']:.2f})"
        table.add_row(name, shown)
    return table
