"""The seam to everything that is not deterministic: time, randomness, identities, tasks and threads.

Actors take a `World` and use nothing else of the kind (tests/test_layers.py enforces it), so that the same
code can run under a simulated world.
"""

import asyncio
import random
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol


class World(Protocol):
    def now(self) -> float:
        """Monotonic seconds; only differences mean anything."""

    def wall(self) -> float:
        """Seconds since the epoch, for logs and for `created` on the wire."""

    def rng(self, name: str) -> random.Random:
        """A generator of its own for each name, so that one consumer's draws do not shift another's."""

    def new_id(self) -> int:
        """1, 2, 3, ... unique within this world."""

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> "asyncio.Task[None]":
        """Starts a task and keeps a reference to it until it ends."""

    def call_at(self, when: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
        """Runs a callback on the loop at `now() >= when`."""

    def call_soon_threadsafe(self, callback: Callable[[], None]) -> None:
        """Runs a callback on the loop, from any thread; silently nothing once the loop is closed."""

    async def to_thread(self, work: Callable[[], Any]) -> Any:
        """Runs blocking work in a helper thread."""


class AsyncioWorld:
    """The real world, bound to the running event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._next_id = 0
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="millrace-helper")

    def now(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()

    def rng(self, name: str) -> random.Random:
        return random.Random(random.SystemRandom().getrandbits(64))

    def new_id(self) -> int:
        self._next_id += 1
        return self._next_id

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> "asyncio.Task[None]":
        task = self._loop.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def call_at(self, when: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
        return self._loop.call_later(max(0.0, when - self.now()), callback)

    def call_soon_threadsafe(self, callback: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:
            # The loop was closed between the check and the call: nobody is left to care.
            if not self._loop.is_closed():
                raise

    async def to_thread(self, work: Callable[[], Any]) -> Any:
        # A pool of our own: asyncio's default one would keep its threads when the runtime is closed.
        return await self._loop.run_in_executor(self._threads, work)

    async def close(self) -> None:
        """Ends what was spawned and gives the helper threads back; idempotent."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        joined = asyncio.Event()

        def join() -> None:
            # As long as the work in a helper takes, a download perhaps: the loop must not wait for it.
            self._threads.shutdown(wait=True, cancel_futures=True)
            self.call_soon_threadsafe(joined.set)

        thread = threading.Thread(target=join, name="millrace-join", daemon=True)
        thread.start()
        await joined.wait()
        thread.join()  # it has said its last word
