"""Runs the actors, and decides what a failure of one of them ends.

An actor is only left by an exception that could not be given to a request or a step, so its state can no longer be
trusted: every open request then gets its terminal event, and the runtime refuses new ones.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from millrace.runtime.channel import ChannelClosed
from millrace.runtime.world import World


class Supervisor:
    def __init__(self, world: World, on_failure: Callable[[str, BaseException], None]) -> None:
        self._world = world
        self._on_failure = on_failure
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, name: str, run: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._tasks.append(self._world.spawn(self._guard(name, run), f"millrace-{name}"))

    def cancel(self) -> None:
        """Ends the actors, in reverse order of their start."""
        for task in reversed(self._tasks):
            task.cancel()

    async def stop(self) -> None:
        """Ends the actors and waits until they are gone."""
        self.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()

    async def _guard(self, name: str, run: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            await run()
        except ChannelClosed:
            return  # its senders are gone: an ordinary end
        except Exception as error:
            self._on_failure(name, error)
