"""One client's connection, with the deadlines and bounds that aiohttp's own protocol does not have.

aiohttp waits without limit for the rest of a request's head, for a client that does not read what it asked for, and for
the last bytes of a closing connection. Each of these holds memory for as long as the peer likes.
"""

import asyncio
import socket
import struct
from dataclasses import dataclass
from typing import Any, cast

from aiohttp import web
from aiohttp.http_exceptions import LineTooLong
from aiohttp.web_request import BaseRequest

from millrace.server.errors import HttpError, error_response

# Bytes that may wait unsent in the kernel. Without it megabytes of socket buffer hide that a client does not read.
_UNSENT_BYTES = 32_768
_RESET = struct.pack("ii", 1, 0)  # linger for no time at all
_BUSY = b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 2\r\nConnection: close\r\n"


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one connection may take.

    Attributes:
        header_timeout_s: from the first byte of a request's head to its last.
        stall_timeout_s: without a byte read by a client that has some to read.
        max_connections: open at once; one more is turned away.
        high_water: bytes that wait in the transport before writing pauses.
    """

    header_timeout_s: float
    stall_timeout_s: float
    max_connections: int
    high_water: int = 65_536


class Connection(web.RequestHandler):
    """aiohttp's protocol for one connection, and three timers."""

    __slots__ = ("_bounds", "_ended", "_head_timer", "_peer", "_stall_timer", "_waiting_bytes")

    def __init__(self, manager: web.Server, bounds: Bounds, **options: Any) -> None:
        super().__init__(manager, **options)
        self._bounds = bounds
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._peer: asyncio.Transport | None = None  # kept after aiohttp has let go of it
        self._waiting_bytes = 0
        self._ended = False

    def connection_made(self, base_transport: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.Transport, base_transport)  # uvloop's is none by inheritance
        manager = self._manager
        if manager is not None and len(manager.connections) >= self._bounds.max_connections:
            self._turn_away(transport)
            return
        self._peer = transport
        transport.set_write_buffer_limits(high=self._bounds.high_water)
        sock = transport.get_extra_info("socket")
        if (
            sock is not None
            and hasattr(socket, "TCP_NOTSENT_LOWAT")
            and sock.family in (socket.AF_INET, socket.AF_INET6)
        ):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)
        super().connection_made(base_transport)
        self._await_head()

    def _turn_away(self, transport: asyncio.Transport) -> None:
        limit = self._bounds.max_connections
        error = HttpError(503, "too_many_connections", f"{limit} connections are open, and this server takes no more")
        body = error_response(error).body
        assert isinstance(body, bytes)
        self._force_close = True  # whatever this client sends is not read
        transport.write(_BUSY + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        transport.close()

    def data_received(self, data: bytes) -> None:
        heads = self._request_count
        super().data_received(data)
        if self._request_count > heads:
            self._cancel_head_timer()
        elif self._waiter is not None and not self._waiter.done() and self._payload_parser is None:
            self._await_head()  # a part of a head, and no request is being served

    def connection_lost(self, exc: BaseException | None) -> None:
        self._cancel_head_timer()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None
        self._peer = None
        super().connection_lost(exc)

    async def start(self) -> None:
        try:
            await super().start()
        finally:
            # A closing transport still sends what waits, and would do so for as long as the peer does not read.
            self._ended = True
            if self._peer is not None and self._stall_timer is None:
                self._watch_stall()

    # -- a slow head --------------------------------------------------------------------------------------------------

    def _await_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self._loop.call_later(self._bounds.header_timeout_s, self._head_too_slow)

    def _cancel_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_too_slow(self) -> None:
        self._head_timer = None
        self.force_close()

    # -- a slow reader ------------------------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_stall()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None
        if self._ended:
            self._watch_stall()

    def _watch_stall(self) -> None:
        if self._peer is not None:
            self._waiting_bytes = self._peer.get_write_buffer_size()
            self._stall_timer = self._loop.call_later(self._bounds.stall_timeout_s, self._look_for_progress)

    def _look_for_progress(self) -> None:
        self._stall_timer = None
        if self._peer is None:
            return
        if self._peer.get_write_buffer_size() >= self._waiting_bytes:
            # It read nothing for the whole time: its requests are cancelled as for one who left. A reset, because the
            # kernel would keep what it has for a peer that does not read.
            sock = self._peer.get_extra_info("socket")
            if sock is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self._peer.abort()
        else:
            self._watch_stall()

    # -- broken HTTP --------------------------------------------------------------------------------------------------

    def handle_error(
        self, request: BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """The parser's refusals as error objects. What the parser says quotes the client, so it is not passed on."""
        if request.writer.output_size > 0:
            raise ConnectionError("a part of the response has been sent; no other can follow")
        if isinstance(exc, LineTooLong):
            limit = max(self.max_line_size, self.max_field_size)
            text = f"the request line or a header field is longer than this server takes ({limit} bytes)"
            error = HttpError(431, "header_too_large", text, close=True)
        elif status < 500:
            error = HttpError(status, "invalid_http", "the request is not valid HTTP", close=True)
        elif isinstance(exc, ConnectionError):
            error = HttpError(499, "client_gone", "the client has gone", close=True)
        else:
            self.logger.error("a request failed outside of its handler", exc_info=exc)
            error = HttpError(500, "internal_error", "the server failed on this request", close=True)
        response = error_response(error)
        response.headers.update({"Connection": "close", "Server": "millrace"})
        return response
