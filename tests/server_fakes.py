"""A runtime for the server's tests: real handles and mailboxes, a byte tokenizer, and steps that tests can hold.

The answer to a prompt is known beforehand (`reply`), so that tests can state what must come out.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import aiohttp
from prometheus_client import CollectorRegistry, Counter

from millrace.runtime.config import Config, load_config
from millrace.runtime.errors import (
    ContextLengthError,
    InvalidRequestError,
    MillraceError,
    QueueFullError,
    RequestCancelledError,
    RequestFailedError,
    RuntimeClosedError,
)
from millrace.runtime.handle import RequestHandle
from millrace.runtime.mailbox import Mailbox
from millrace.runtime.types import (
    ChatPrompt,
    FinishReason,
    Priority,
    SamplingParams,
    TextPrompt,
    TokenLogprob,
    TokensPrompt,
    TopLogprob,
)
from millrace.server.app import Server

EOS = 256
VOCAB = 257
CREATED = 1_700_000_000


class ByteTokenizer:
    vocab_size = VOCAB

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


@dataclass(frozen=True)
class FakeHealth:
    state: str
    progressing: bool
    reason: str = ""
    running: int = 0
    waiting: int = 0
    seconds_since_progress: float = 0.0


@dataclass
class Submitted:
    """What the server asked for."""

    prompt: ChatPrompt | TextPrompt | TokensPrompt
    sampling: SamplingParams
    priority: Priority
    deadline: float | None
    request_id: str | None
    cache_salt: str


@dataclass
class _Piece:
    text: str
    token: int


@dataclass
class _Choice:
    index: int
    pieces: list[_Piece]
    reason: FinishReason
    stop_reason: str | None
    at: int = 0
    done: bool = False


@dataclass
class _Request:
    handle: RequestHandle
    sampling: SamplingParams
    choices: list[_Choice]
    paused: bool = False
    steps: int = 0


def logprob_of(token: int) -> float:
    return -(token % 7) / 4 - 0.25


def scored(token: int, top: int, first: bool = False) -> TokenLogprob:
    """A token's made-up score, with `top` likelier tokens before it."""
    ids = [(token + i) % 128 for i in range(top)]
    tops = tuple(TopLogprob(i, chr(i), bytes([i]), -0.125 * n) for n, i in enumerate(ids))
    data = bytes([token]) if token < 256 else b""
    return TokenLogprob(token, data.decode(errors="replace"), data, None if first else logprob_of(token), tops)


@dataclass
class FakeRuntime:
    """Honours the face that the server uses.

    Attributes:
        reply: the whole answer to a prompt's text, for a choice; one token per byte.
        auto: steps run by themselves; else tests call `step`.
        fail_at: the step of a request at which it fails, if any.
        refuse: every submit ends with this error.
        submits: everything that was submitted.
        cancelled: names of requests whose cancel reached the engine.
        tokens: how many tokens each request, by its name, has cost.
    """

    config: Config = field(default_factory=Config)
    model_name: str = "fake/model:1"
    max_model_len: int = 4096
    created: int = CREATED
    reply: Callable[[str, int], bytes] = lambda prompt, choice: f"answer {choice} to {prompt}".encode()
    auto: bool = True
    fail_at: int | None = None
    refuse: MillraceError | None = None
    state: FakeHealth = FakeHealth("ready", True)

    def __post_init__(self) -> None:
        self.registry = CollectorRegistry()
        self.tokens_generated = Counter("millrace_tokens_generated", "tokens", registry=self.registry)
        self.tokenizer = ByteTokenizer()
        self.submits: list[Submitted] = []
        self.cancelled: list[str] = []
        self.tokens: dict[str, int] = {}
        self.pauses: list[str] = []
        self._requests: dict[str, _Request] = {}
        self._rid = 0
        self._changed = asyncio.Event()
        self._engine: asyncio.Task[None] | None = None
        self._admitting: set[asyncio.Handle] = set()

    # -- the face -----------------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt: ChatPrompt | TextPrompt | TokensPrompt,
        sampling: SamplingParams | None = None,
        *,
        priority: Priority = Priority.NORMAL,
        deadline: float | None = None,
        request_id: str | None = None,
        cache_salt: str = "",
    ) -> RequestHandle:
        sampling = sampling or SamplingParams()
        self.submits.append(Submitted(prompt, sampling, priority, deadline, request_id, cache_salt))
        self._rid += 1
        name = request_id or f"req-{self._rid}"
        mailbox = Mailbox(sampling.n, self.config.streamer.max_unread_tokens)
        key = f"{name}#{self._rid}"
        handle = RequestHandle(self._rid, name, self.model_name, sampling.n, mailbox, partial(self._cancel, key))
        asyncio.get_running_loop().call_soon(self._admit, key, handle, prompt, sampling)
        return handle

    def health(self) -> FakeHealth:
        return self.state

    async def drain(self, timeout: float) -> bool:
        self.refuse = RuntimeClosedError("the runtime is draining")
        self.state = FakeHealth("draining", True, "draining")
        self._changed.set()
        try:
            async with asyncio.timeout(timeout):
                await self.until(lambda: not self._requests)
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        if self._engine is not None:
            self._engine.cancel()
            await asyncio.gather(self._engine, return_exceptions=True)

    # -- the engine ---------------------------------------------------------------------------------------------------

    @property
    def running(self) -> int:
        return len(self._requests)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits for something about the engine; each event there looks again."""
        async with asyncio.timeout(10):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    def step(self, count: int = 1) -> None:
        """Runs steps: each gives every running choice a token."""
        for _ in range(count):
            for key, request in list(self._requests.items()):
                if not request.paused:
                    self._advance(key, request)
        self._changed.set()

    def fail_first(self) -> None:
        """Ends the oldest request with an error, the others go on."""
        key, request = next(iter(self._requests.items()))
        self._end(key)
        request.handle.mailbox.fail(RequestFailedError("the step of this request failed"))

    def _advance(self, key: str, request: _Request) -> None:
        mailbox = request.handle.mailbox
        request.steps += 1
        if self.fail_at == request.steps:
            self._end(key)
            mailbox.fail(RequestFailedError("the step of this request failed"))
            return
        for choice in request.choices:
            if choice.done:
                continue
            if choice.at < len(choice.pieces):
                piece = choice.pieces[choice.at]
                choice.at += 1
                self.tokens[key] = self.tokens.get(key, 0) + 1
                self.tokens_generated.inc()
                wanted = request.sampling.logprobs
                mailbox.push(
                    choice.index, piece.text, piece.token, None if wanted is None else scored(piece.token, wanted)
                )
            if choice.at == len(choice.pieces):
                choice.done = True
                mailbox.finish(choice.index, "", choice.reason, choice.stop_reason)
        if mailbox.closed:
            self._end(key)
        mailbox.notify()

    def _admit(
        self, key: str, handle: RequestHandle, prompt: ChatPrompt | TextPrompt | TokensPrompt, sampling: SamplingParams
    ) -> None:
        mailbox = handle.mailbox
        if mailbox.closed:
            return
        try:
            if self.refuse is not None:
                raise self.refuse
            if len(self._requests) >= self.config.scheduler.max_queue:
                raise QueueFullError(f"{len(self._requests)} requests wait, and the queue holds no more")
            ids, text = self._read(prompt)
            sampling = sampling.checked(VOCAB, self.config.limits.max_logprobs)
            if not ids:
                raise InvalidRequestError("the prompt is empty", param="prompt")
            if any(not 0 <= token < VOCAB for token in ids):
                raise InvalidRequestError(f"prompt holds a token id outside of 0 to {VOCAB - 1}", param="prompt")
            room = self.max_model_len - len(ids)
            if room < (sampling.max_tokens or 0):
                raise ContextLengthError(
                    f"{len(ids)} prompt tokens and {sampling.max_tokens} new ones exceed {self.max_model_len}"
                )
        except MillraceError as error:
            mailbox.fail(error)
            return
        mailbox.prompt_token_ids = tuple(ids)
        if sampling.prompt_logprobs is not None:
            mailbox.prompt_logprobs = [scored(i, sampling.prompt_logprobs, n == 0) for n, i in enumerate(ids)]
        choices = [self._plan(index, text, sampling, room) for index in range(sampling.n)]
        request = self._requests[key] = _Request(handle, sampling, choices)

        def set_flow(paused: bool) -> None:
            request.paused = paused
            if paused:
                self.pauses.append(key)
            self._changed.set()

        mailbox.set_flow = set_flow
        self._changed.set()
        if self.auto and self._engine is None:
            self._engine = asyncio.get_running_loop().create_task(self._run())

    def _plan(self, index: int, prompt: str, sampling: SamplingParams, room: int) -> _Choice:
        whole = self.reply(prompt, index)
        limit = room if sampling.max_tokens is None else sampling.max_tokens
        reason, stop_reason = FinishReason.STOP, None
        for stop in sampling.stop:
            at = whole.find(stop.encode())
            if at >= 0:
                whole, stop_reason = whole[: at + (len(stop) if sampling.include_stop else 0)], stop
        if len(whole) > limit:
            whole, reason, stop_reason = whole[:limit], FinishReason.LENGTH, None
        if limit == 0:
            reason = FinishReason.LENGTH
        pieces, held = [], b""
        for byte in whole:  # text comes at whole characters, as the detokenizer gives it
            held += bytes([byte])
            try:
                pieces.append(_Piece(held.decode(), byte))
                held = b""
            except UnicodeDecodeError:
                pieces.append(_Piece("", byte))
        return _Choice(index, pieces, reason, stop_reason)

    def _read(self, prompt: ChatPrompt | TextPrompt | TokensPrompt) -> tuple[list[int], str]:
        if isinstance(prompt, TokensPrompt):
            return list(prompt.tokens), self.tokenizer.decode(prompt.tokens)
        text = prompt.text if isinstance(prompt, TextPrompt) else "|".join(m.content for m in prompt.messages)
        return self.tokenizer.encode(text), text

    def _cancel(self, key: str) -> None:
        request = self._requests.get(key)
        if request is not None:
            self._end(key)
            self.cancelled.append(key.partition("#")[0])
            request.handle.mailbox.fail(RequestCancelledError("cancelled"))

    def _end(self, key: str) -> None:
        del self._requests[key]
        self._changed.set()

    async def _run(self) -> None:
        while True:
            if any(not request.paused for request in self._requests.values()):
                self.step()
                await asyncio.sleep(0)  # the loop's turn between two steps
            else:
                self._changed.clear()
                await self._changed.wait()


def configured(**options: Any) -> Config:
    """A configuration with some options changed: `limits__max_choices=2`."""
    # Every step writes unless a test asks for pacing: the fake engine's steps take no time.
    given = {"server__flush_interval_ms": 0, **options}
    return load_config(None, {key.replace("__", ".", 1): value for key, value in given.items()})


class Served:
    """A running server with its runtime, and a client."""

    def __init__(self, runtime: FakeRuntime, server: Server, client: aiohttp.ClientSession) -> None:
        self.runtime = runtime
        self.server = server
        self.client = client
        self.url = server.url
        self.port = server.port

    async def post(self, path: str, body: Any, **options: Any) -> tuple[int, Any, Any]:
        """Status, headers and decoded body of a JSON request."""
        async with self.client.post(self.url + path, json=body, **options) as reply:
            return reply.status, reply.headers, await reply.json()

    async def raw(self, path: str, body: bytes, **options: Any) -> tuple[int, Any, bytes]:
        async with self.client.post(self.url + path, data=body, **options) as reply:
            return reply.status, reply.headers, await reply.read()

    async def get(self, path: str, **options: Any) -> tuple[int, Any, bytes]:
        async with self.client.get(self.url + path, **options) as reply:
            return reply.status, reply.headers, await reply.read()


def chat(content: str = "hi", **fields: Any) -> dict[str, Any]:
    return {"model": "fake/model:1", "messages": [{"role": "user", "content": content}], **fields}
