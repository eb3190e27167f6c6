"""Structured logs: a logger of one's own per runtime, never a change to the program's logging."""

import io
import logging
import sys
from typing import Any, Protocol, TextIO, cast

import structlog

from millrace.runtime.config import LogConfig


class Logger(Protocol):
    """The part of structlog's loggers that we use: an event's name and its fields."""

    def debug(self, event: str, **fields: Any) -> Any: ...
    def info(self, event: str, **fields: Any) -> Any: ...
    def warning(self, event: str, **fields: Any) -> Any: ...
    def error(self, event: str, **fields: Any) -> Any: ...


class _Stderr(io.TextIOBase):
    """Whatever sys.stderr is when a line is written: programs and tests put another one in its place."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()

    def isatty(self) -> bool:
        return sys.stderr.isatty()


def make_logger(config: LogConfig, stream: TextIO | None = None) -> Logger:
    """A logger that writes to stderr (or `stream`); control characters in values arrive escaped."""
    target = stream or _Stderr()
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if config.json
        else structlog.dev.ConsoleRenderer(
            colors=target.isatty(),
            # The default shows local variables, and with them prompts.
            exception_formatter=structlog.dev.plain_traceback,
        )
    )
    processors: list[Any] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso"),
    ]
    if config.json:
        processors.append(structlog.processors.format_exc_info)
    logger: Logger = structlog.wrap_logger(
        structlog.PrintLogger(cast(TextIO, target)),
        processors=[*processors, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(config.level.upper())),
    )
    return logger
