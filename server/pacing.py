"""How often one stream writes: tokens that come faster than a reader could tell apart share one write.

A write is most of what a streamed token costs (a system call, and the client's wake-up). A stream that has been silent
for an interval writes at once, so steps that are further apart than that are never delayed.
"""

import asyncio
from collections.abc import Callable

from millrace.runtime.handle import RequestHandle


class Pacer:
    """Shared by all streams of an application, so that those who wait are served by one timer."""

    def __init__(self, interval_s: float) -> None:
        self._interval = interval_s
        self._waiting: list[Callable[[], None]] = []

    def pace(self, handle: RequestHandle, write: Callable[[], None]) -> Callable[[], None]:
        """Wraps the callback of a mailbox: `write` runs now if the interval has passed or the request has ended, else
        with the next turn of the timer."""
        if not self._interval:
            return write
        clock = asyncio.get_running_loop().time
        last, waits = 0.0, False

        def flush() -> None:
            nonlocal last, waits
            last, waits = clock(), False
            write()

        def ready() -> None:
            nonlocal waits
            if handle.done or clock() - last >= self._interval:
                flush()
            elif not waits:
                waits = True
                self._later(flush)

        return ready

    def _later(self, flush: Callable[[], None]) -> None:
        if not self._waiting:
            asyncio.get_running_loop().call_later(self._interval, self._turn)
        self._waiting.append(flush)

    def _turn(self) -> None:
        waiting, self._waiting = self._waiting, []
        for flush in waiting:
            flush()
