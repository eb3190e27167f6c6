"""Server-sent events: each step's text goes from the streamer's callback straight into the connection's transport.

No task wakes for a token. The handler's coroutine sleeps until the answer ends, the client goes away, or the client
reads too slowly: then nothing is taken from the mailboxes until the connection has drained. Text merges there, and the
request itself is paused in the end.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from aiohttp import HttpVersion11, web

from millrace.runtime.errors import MillraceError
from millrace.runtime.handle import RequestHandle
from millrace.server.context import Context
from millrace.server.errors import error_object, internal_error
from millrace.server.shapes import Chunks, Format, usage_object

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"  # a comment: clients skip it, and proxies see that the connection lives

_HEADERS = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def sse_frame(payload: bytes) -> bytes:
    return b"data: %b\n\n" % payload


class EventStream:
    """One streamed answer, of one or several requests with `n` choices each."""

    def __init__(
        self,
        context: Context,
        request: web.Request,
        handles: Sequence[RequestHandle],
        form: Format,
        *,
        n: int,
        name: str,
        created: int,
        usage: bool,
        running: bool,
    ) -> None:
        if request.transport is None:
            raise ConnectionResetError("the client has gone")
        self._context = context
        self._request = request
        self._protocol = request.protocol
        self._transport = request.transport
        self._chunked = request.version >= HttpVersion11
        self._handles = handles
        self._bases = [number * n for number in range(len(handles))]
        self._chunks = Chunks(
            form,
            name,
            created,
            context.runtime.model_name,
            frame=sse_frame,
            usage=usage,
            running=self._usage if running else None,
        )
        self._include_usage = usage
        self._pumps: list[Callable[[], None]] = []
        self._ended = False
        self._failure: Exception | None = None
        self._wake: asyncio.Future[None] | None = None
        self._quiet = True  # nothing has been written since the last ping

    async def run(self) -> web.StreamResponse:
        """Writes the whole answer. Raises the request's error if it ends before anything has been written."""
        for handle in self._handles:
            handle.mailbox.on_ready = self._rouse
        await self._first_output()
        response = web.StreamResponse(headers=_HEADERS)
        writer = await response.prepare(self._request)
        if writer is None:
            raise RuntimeError("the response was sent before the stream began")
        for handle, base in zip(self._handles, self._bases, strict=True):
            pump = self._pump(handle, base)
            self._pumps.append(pump)
            handle.mailbox.on_ready = self._context.pacer.pace(handle, pump)
        with self._context.metrics.streams.track_inprogress():
            while True:
                self._pump_all()
                if self._protocol.writing_paused:
                    await writer.drain()
                elif self._over():
                    break
                else:
                    await self._sleep()
        self._ended = True  # a request that still runs beside a failed one must not write behind the end
        await response.write_eof(self._ending())
        return response

    async def _first_output(self) -> None:
        """Waits for the first token or error, so that a refusal still gets its status, but not for ever: clients and
        proxies give up on a server that says nothing."""
        try:
            async with asyncio.timeout(self._context.ping_s):
                while not any(handle.done or handle.mailbox.unread for handle in self._handles):
                    await self._woken()
        except TimeoutError:
            return
        for handle in self._handles:
            if handle.error is not None:
                raise handle.error

    async def _sleep(self) -> None:
        self._quiet = True
        try:
            async with asyncio.timeout(self._context.ping_s):
                await self._woken()
        except TimeoutError:
            if self._quiet:
                self._write(PING)

    async def _woken(self) -> None:
        self._wake = asyncio.get_running_loop().create_future()
        try:
            await self._wake
        finally:
            self._wake = None

    def _rouse(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def _over(self) -> bool:
        return (
            self._failure is not None
            or all(handle.done for handle in self._handles)
            or any(handle.error is not None for handle in self._handles)
        )

    def _pump(self, handle: RequestHandle, base: int) -> Callable[[], None]:
        """The callback of one request: runs in the streamer, once per step, and must not raise there."""
        protocol, transport, read, chunked = self._protocol, self._transport, self._chunks.read, self._chunked

        def ready() -> None:
            if self._ended:
                return
            if protocol.writing_paused:
                self._rouse()
                return
            if transport.is_closing():
                handle.cancel()
                return
            try:
                data = read(handle, base)
            except Exception as error:
                self._failure = error
                self._rouse()
                return
            if data:
                transport.write(b"%x\r\n%b\r\n" % (len(data), data) if chunked else data)
                self._quiet = False
            if handle.done:
                self._rouse()

        return ready

    def _pump_all(self) -> None:
        for pump in self._pumps:
            pump()

    def _write(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    def _usage(self) -> dict[str, Any]:
        return usage_object([handle.usage for handle in self._handles])

    def _ending(self) -> bytes:
        error: Exception | None = self._failure or next((h.error for h in self._handles if h.error is not None), None)
        if error is not None:
            if not isinstance(error, MillraceError):
                self._context.log.error("a stream could not be written", exc_info=error)
                error = internal_error()
            return sse_frame(msgspec.json.encode(error_object(error))) + DONE
        if self._include_usage:
            return self._chunks.chunk([], self._usage()) + DONE
        return DONE
