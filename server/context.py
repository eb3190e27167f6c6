"""What all handlers of one application share: the runtime, limits, and the server's own counters."""

import secrets
import time
from typing import Any

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge

from millrace.runtime.config import Limits
from millrace.runtime.log import make_logger
from millrace.server.face import RuntimeFace
from millrace.server.pacing import Pacer

_NAMES_LOGGED = 256  # distinct unknown field names that one server logs; a client could send any number


class ServerMetrics:
    """The server's own counters, in a registry of their own: two applications may share one runtime."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.responses = Counter(
            "millrace_http_responses", "HTTP responses", ["route", "status"], registry=self.registry
        )
        self.unknown_fields = Counter(
            "millrace_http_unknown_fields", "request fields that the server does not know", registry=self.registry
        )
        self.streams = Gauge("millrace_http_streams", "open SSE streams", registry=self.registry)
        self.sockets = Gauge("millrace_http_websockets", "open WebSockets", registry=self.registry)


class Context:
    """One application's shared state. All of it is used on one event loop.

    Attributes:
        hosts: names besides IP addresses that a Host header may carry; None admits any.
        origins: browser origins that may connect besides the server's own.
        ping_s: seconds of silence after which a stream sends a comment.
        pacer: how often each stream writes.
    """

    def __init__(self, runtime: RuntimeFace, hosts: frozenset[str] | None) -> None:
        self.runtime = runtime
        self.limits: Limits = runtime.config.limits
        self.hosts = hosts
        self.origins = frozenset(origin.rstrip("/").lower() for origin in runtime.config.server.allowed_origins)
        self.metrics = ServerMetrics()
        self.ping_s = 15.0
        self.pacer = Pacer(runtime.config.server.flush_interval_ms / 1000)
        self.log = make_logger(runtime.config.log)
        self.sockets: set[web.WebSocketResponse[Any]] = set()
        self._unknown_logged: set[str] = set()

    @property
    def deadline(self) -> float | None:
        """Seconds that a request gets which names no deadline of its own."""
        return self.runtime.config.server.request_timeout_s or None

    def saw_unknown(self, names: list[str]) -> None:
        """Counts fields that the server does not know, and logs each name once."""
        self.metrics.unknown_fields.inc(len(names))
        for name in names:
            if name not in self._unknown_logged and len(self._unknown_logged) < _NAMES_LOGGED:
                self._unknown_logged.add(name)
                self.log.info("unknown request field", field=name[:64])


CONTEXT = web.AppKey("context", Context)
REQUEST_ID = web.RequestKey("request_id", str)


def new_request_id() -> str:
    return secrets.token_hex(12)


def wall() -> int:
    """Unix seconds, for `created`."""
    return int(time.time())
