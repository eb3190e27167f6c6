"""GET /v1/ws: chat completions over a WebSocket, several at once, with cancel and credits (docs/api.md has the frames).

Chunks go from the streamer's callback straight into the transport, as in sse.py, each as one text frame.
"""

import asyncio
from typing import Annotated, Any

import msgspec
from aiohttp import WSMsgType, web
from aiohttp.abc import AbstractStreamWriter
from msgspec import Meta

from millrace.runtime.errors import MillraceError, RequestCancelledError
from millrace.runtime.handle import RequestHandle
from millrace.server.answer import submit
from millrace.server.body import check_depth, decode
from millrace.server.chat import chat_format
from millrace.server.context import CONTEXT, Context, new_request_id, wall
from millrace.server.errors import BadRequest, HttpError, error_object, internal_error
from millrace.server.protocol import parse_chat
from millrace.server.shapes import Chunks, usage_object

_CREDITS = Annotated[int, Meta(ge=0, le=1_000_000)]
_FRAME_FIELDS = frozenset({"type", "id", "credits"})


class Envelope(msgspec.Struct):
    """What is read of each frame before it is known what it is."""

    type: str | None = None
    id: str | None = None
    credits: _CREDITS | None = None


def text_frame(payload: bytes) -> bytes:
    """A whole, unmasked text message (RFC 6455, section 5.2)."""
    size = len(payload)
    if size < 126:
        return b"\x81%c%b" % (size, payload)
    if size < 65_536:
        return b"\x81\x7e%b%b" % (size.to_bytes(2, "big"), payload)
    return b"\x81\x7f%b%b" % (size.to_bytes(8, "big"), payload)


class _Run:
    """One request on a socket.

    `credits` is how many times chunks may still be sent, None for any number. A time covers what has come since the
    last one, at most one chunk for each choice.
    """

    def __init__(
        self,
        socket: "ChatSocket",
        tag: str | None,
        handle: RequestHandle,
        chunks: Chunks,
        usage: bool,
        credits: int | None,
    ) -> None:
        self.socket = socket
        self.tag = tag
        self.handle = handle
        self.chunks = chunks
        self.usage = usage
        self.credits = credits
        self.cancelled = False
        self.stall: asyncio.TimerHandle | None = None

    def ready(self) -> None:
        """Runs in the streamer, once per step, and must not raise there."""
        try:
            self.socket.pump(self)
        except Exception as error:
            self.socket.context.log.error("a WebSocket answer could not be written", exc_info=error)
            self.socket.end(self, internal_error())

    def close(self) -> None:
        self.handle.mailbox.on_ready = None
        self.handle.cancel()
        if self.stall is not None:
            self.stall.cancel()
            self.stall = None


class ChatSocket:
    """One WebSocket and its requests."""

    def __init__(
        self,
        context: Context,
        request: web.Request,
        response: "web.WebSocketResponse[Any]",
        writer: AbstractStreamWriter,
    ) -> None:
        if request.transport is None:
            raise ConnectionResetError("the client has gone")
        self.context = context
        self._response = response
        self._writer = writer
        self._protocol = request.protocol
        self._transport = request.transport
        self._runs: dict[str | None, _Run] = {}
        self._resumer: asyncio.Task[None] | None = None

    async def serve(self) -> None:
        """Reads frames until the client leaves. A client that does not read the answers is not read either."""
        async for message in self._response:
            if message.type is WSMsgType.TEXT:
                self._receive(message.data)
            elif message.type is WSMsgType.BINARY:
                self._refuse(None, BadRequest("frames must be text that holds JSON", code="invalid_json"))
            if self._protocol.writing_paused:
                await self._writer.drain()

    def close(self) -> None:
        if self._resumer is not None:
            self._resumer.cancel()
        for run in self._runs.values():
            run.close()
        self._runs.clear()

    # -- what the client sends ----------------------------------------------------------------------------------------

    def _receive(self, body: bytes) -> None:
        tag: str | None = None
        try:
            check_depth(body, self.context.limits)
            frame = decode(body, Envelope)
            tag = frame.id
            if tag is not None and (len(tag) > self.context.limits.max_name_chars or not tag.isprintable()):
                tag = None
                raise BadRequest(
                    f"id must have at most {self.context.limits.max_name_chars} printable characters", "id"
                )
            if frame.type in (None, "request"):
                self._start(body, frame)
            elif frame.type == "cancel":
                self._cancel(tag)
            elif frame.type == "credit":
                self._credit(tag, frame.credits)
            else:
                raise BadRequest("type must be request, cancel or credit", "type")
        except (HttpError, MillraceError) as error:
            self._refuse(tag, error)
        except Exception as error:
            self.context.log.error("a WebSocket frame failed", exc_info=error)
            self._refuse(tag, internal_error())

    def _start(self, body: bytes, frame: Envelope) -> None:
        limit = self.context.limits.max_ws_requests
        if frame.id in self._runs:
            text = "give each request on a socket an id of its own" if frame.id is None else "this id is in use"
            raise BadRequest(text, "id", "id_in_use")
        if len(self._runs) >= limit:
            raise HttpError(429, "too_many_requests", f"{limit} requests run on this socket, and it takes no more")
        job = parse_chat(body, self.context, _FRAME_FIELDS, streams=True)
        request_id = job.request_id or new_request_id()
        handle = submit(self.context, job, job.prompts[0], request_id)
        chunks = Chunks(
            chat_format(job),
            frame.id or f"chatcmpl-{request_id}",
            wall(),
            self.context.runtime.model_name,
            frame=text_frame,
            usage=job.include_usage,
            running=(lambda: usage_object([handle.usage])) if job.continuous_usage else None,
        )
        run = self._runs[frame.id] = _Run(self, frame.id, handle, chunks, job.include_usage, frame.credits)
        handle.mailbox.on_ready = self.context.pacer.pace(handle, run.ready)
        if handle.done:
            run.ready()

    def _cancel(self, tag: str | None) -> None:
        """Unknown ids are no error: the request may have ended while the frame was on its way."""
        run = self._runs.get(tag)
        if run is not None:
            run.cancelled = True
            run.handle.cancel()

    def _credit(self, tag: str | None, credits: int | None) -> None:
        if credits is None:
            raise BadRequest("a credit frame needs credits, a number", "credits")
        run = self._runs.get(tag)
        if run is not None and run.credits is not None:
            run.credits += credits
            if run.stall is not None and run.credits:
                run.stall.cancel()
                run.stall = None
            run.ready()

    # -- what the client gets -----------------------------------------------------------------------------------------

    def pump(self, run: _Run) -> None:
        """Sends what has come for a request, as far as the connection and the client's credits let it."""
        handle = run.handle
        if self._runs.get(run.tag) is not run:
            return  # it has had its last frame, and a paced write came after
        if self._transport.is_closing():
            handle.cancel()
        elif self._protocol.writing_paused:
            if self._resumer is None:
                self._resumer = asyncio.get_running_loop().create_task(self._resume())
        elif handle.error is not None and (run.cancelled or run.credits == 0):
            self.end(run, handle.error)
        elif run.credits == 0:
            if run.stall is None:
                timeout = self.context.runtime.config.server.stall_timeout_s
                run.stall = asyncio.get_running_loop().call_later(timeout, self._stalled, run)
        else:
            done = handle.done
            data = run.chunks.read(handle, 0)
            if data:
                self._transport.write(data)
                if run.credits is not None:
                    run.credits -= 1
            if done:
                self.end(run, handle.error)

    def end(self, run: _Run, error: HttpError | MillraceError | None) -> None:
        """The last frame of a request."""
        if self._runs.get(run.tag) is not run:
            return
        del self._runs[run.tag]
        usage = usage_object([run.handle.usage])
        run.close()
        if run.cancelled and isinstance(error, RequestCancelledError):
            self._send({"type": "done", "cancelled": True}, run.tag)
        elif error is not None:
            self._refuse(run.tag, error)
        else:
            if run.usage:
                self._transport.write(run.chunks.chunk([], usage))
            self._send({"type": "done"}, run.tag)

    def _stalled(self, run: _Run) -> None:
        run.stall = None
        seconds = self.context.runtime.config.server.stall_timeout_s
        text = f"no credit came for {seconds:g} s while output waited, so the request was cancelled"
        self.end(run, HttpError(408, "stalled", text))

    def _refuse(self, tag: str | None, error: HttpError | MillraceError) -> None:
        self._send({"type": "error", **error_object(error)}, tag)

    def _send(self, body: dict[str, Any], tag: str | None) -> None:
        if tag is not None:
            body["id"] = tag
        if not self._transport.is_closing():
            self._transport.write(text_frame(msgspec.json.encode(body)))

    async def _resume(self) -> None:
        """Goes on with all requests once the connection has drained."""
        try:
            await self._writer.drain()
        except ConnectionError:
            return  # the client has gone, and the reading side will hear of it
        finally:
            self._resumer = None
        for run in list(self._runs.values()):
            run.ready()


async def chat_socket(request: web.Request) -> web.StreamResponse:
    context = request.app[CONTEXT]
    response: web.WebSocketResponse[Any] = web.WebSocketResponse(
        timeout=2.0,  # for the client's half of the closing handshake
        # A ping is answered only after all that waits before it, so it gets as long as any reading does.
        heartbeat=2 * context.runtime.config.server.stall_timeout_s,
        max_msg_size=context.limits.max_ws_message_bytes + 1,  # aiohttp's is the first size refused
        compress=False,
        decode_text=False,
    )
    if not response.can_prepare(request):
        raise BadRequest("this route speaks WebSocket; send an Upgrade request", code="not_a_websocket")
    writer = await response.prepare(request)
    socket = ChatSocket(context, request, response, writer)
    context.sockets.add(response)
    try:
        with context.metrics.sockets.track_inprogress():
            await socket.serve()
    finally:
        context.sockets.discard(response)
        socket.close()
    return response
