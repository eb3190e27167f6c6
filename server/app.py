"""The aiohttp application, and what runs it: listening, stopping gracefully, and the signals that ask for it."""

import asyncio
import logging
import signal
from collections.abc import Callable
from ipaddress import ip_address
from typing import Any

from aiohttp import web

from millrace.server.chat import chat_completions
from millrace.server.completions import completions
from millrace.server.connection import Bounds, Connection
from millrace.server.context import CONTEXT, Context
from millrace.server.face import RuntimeFace
from millrace.server.guards import add_headers, guard, loopback_hosts
from millrace.server.health import get_model, health, list_models, livez, metrics, readyz
from millrace.server.page import add_page_routes
from millrace.server.websocket import chat_socket

KEEPALIVE_S = 75.0  # an idle connection stays open this long: longer than common proxies keep theirs
LINGER_S = 5.0  # for the rest of a body that was refused, so that the client gets to read why
MAX_HEADERS = 128
CLOSE_S = 0.5  # for handlers to end after they were cancelled; grace comes before that, in `Server.stop`
BACKLOG = 1024  # connections that the kernel holds until they are accepted


def make_app(runtime: RuntimeFace, *, host: str | None = None, page: bool = True) -> web.Application:
    """The server's routes over a started runtime.

    Args:
        runtime: serves the requests; starting and closing it is the caller's.
        host: the address that the server listens on, which decides the Host headers that it takes; None reads
            `server.host`.
        page: serve the chat page at `/`.

    `start_server` adds the deadlines of a connection; an application in a runner of one's own goes without them.
    """
    config = runtime.config
    listens = config.server.host if host is None else host
    app = web.Application(middlewares=[guard], client_max_size=config.limits.max_body_bytes)
    app[CONTEXT] = Context(runtime, loopback_hosts(listens, config.server.allowed_origins))
    app.on_response_prepare.append(add_headers)
    app.on_shutdown.append(_close_sockets)
    router = app.router
    router.add_post("/v1/chat/completions", chat_completions)
    router.add_post("/v1/completions", completions)
    router.add_get("/v1/models", list_models)
    router.add_get("/v1/models/{id:.+}", get_model)
    router.add_get("/v1/ws", chat_socket, allow_head=False)
    router.add_get("/health", health)
    router.add_get("/livez", livez)
    router.add_get("/readyz", readyz)
    router.add_get("/metrics", metrics)
    if page:
        add_page_routes(app)
    return app


async def _close_sockets(app: web.Application) -> None:
    sockets = app[CONTEXT].sockets
    await asyncio.gather(*(socket.close(code=1001, message=b"the server stops") for socket in sockets))


class Server:
    """A listening server. `stop` ends it gracefully, `close` at once.

    Attributes:
        url: where it listens, with the port that it got.
        context: what its handlers share.
    """

    def __init__(self, runtime: RuntimeFace, runner: web.AppRunner, listener: asyncio.Server, host: str) -> None:
        self._runtime = runtime
        self._runner = runner
        self.context = runner.app[CONTEXT]
        self._listener = listener
        self.port: int = listener.sockets[0].getsockname()[1]
        self.url = f"http://{_shown(host)}:{self.port}"

    @property
    def connections(self) -> list[web.RequestHandler]:
        """The open connections."""
        manager = self._runner.server
        return [] if manager is None else manager.connections

    async def stop(self, grace_s: float | None = None) -> bool:
        """Lets open requests finish for `grace_s` seconds (`server.shutdown_grace_s` if None), then closes.

        New requests are refused with 503 meanwhile, so that a balancer that polls /readyz has time to turn away.
        Returns whether all had finished.
        """
        grace = self._runtime.config.server.shutdown_grace_s if grace_s is None else grace_s
        try:
            return await self._runtime.drain(grace)
        finally:
            await self.close()

    async def close(self) -> None:
        """Stops listening, and cancels what still runs."""
        self._listener.close()
        await self._runner.cleanup()


async def start_server(
    runtime: RuntimeFace,
    host: str | None = None,
    port: int | None = None,
    *,
    access_log: bool = False,
    page: bool = True,
) -> Server:
    """Listens on `host` and `port` (by default of the configuration; port 0 takes a free one) and returns.

    Raises OSError if the address cannot be listened on.
    """
    config = runtime.config
    host = config.server.host if host is None else host
    port = config.server.port if port is None else port
    logger = logging.getLogger("millrace.server")
    runner = web.AppRunner(make_app(runtime, host=host, page=page), handler_cancellation=True, shutdown_timeout=CLOSE_S)
    await runner.setup()
    manager = runner.server
    assert manager is not None
    bounds = Bounds(config.limits.header_timeout_s, config.server.stall_timeout_s, config.limits.max_connections)
    options: dict[str, Any] = {
        "keepalive_timeout": KEEPALIVE_S,
        "tcp_keepalive": True,
        "logger": logger,
        "access_log": logging.getLogger("millrace.access") if access_log else None,
        "max_line_size": config.limits.max_header_bytes,
        "max_field_size": config.limits.max_header_bytes,
        "max_headers": MAX_HEADERS,
        "lingering_time": LINGER_S,
        "auto_decompress": False,  # a small body must not become a large one; encoded bodies are refused
    }
    loop = asyncio.get_running_loop()
    try:
        listener = await loop.create_server(
            lambda: Connection(manager, bounds, loop=loop, **options), host, port, backlog=BACKLOG, reuse_address=True
        )
    except BaseException:
        await runner.cleanup()
        raise
    return Server(runtime, runner, listener, host)


async def serve(
    runtime: RuntimeFace,
    host: str | None = None,
    port: int | None = None,
    *,
    access_log: bool = False,
    page: bool = True,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serves until SIGTERM or SIGINT, then lets open requests finish; a second signal ends them too.

    Signal handlers are installed here and nowhere else, and are removed at the end. `on_ready` gets the URL once the
    server listens. Raises OSError if the address cannot be listened on.
    """
    server = await start_server(runtime, host, port, access_log=access_log, page=page)
    loop = asyncio.get_running_loop()
    first, second = asyncio.Event(), asyncio.Event()

    def asked() -> None:
        (second if first.is_set() else first).set()

    signals = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in signals}
    for number in signals:
        loop.add_signal_handler(number, asked)
    try:
        if on_ready is not None:
            on_ready(server.url)
        await first.wait()
        stopping = asyncio.ensure_future(server.stop())
        impatient = asyncio.ensure_future(second.wait())
        await asyncio.wait({stopping, impatient}, return_when=asyncio.FIRST_COMPLETED)
        impatient.cancel()
        if not stopping.done():
            stopping.cancel()
        await asyncio.gather(stopping, impatient, return_exceptions=True)
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
            signal.signal(number, before[number])
        await server.close()


def _shown(host: str) -> str:
    """The host as it stands in a URL that a person can open."""
    try:
        address = ip_address(host)
    except ValueError:
        return host or "127.0.0.1"
    if address.is_unspecified:
        return "127.0.0.1" if address.version == 4 else "[::1]"
    return f"[{address}]" if address.version == 6 else str(address)
