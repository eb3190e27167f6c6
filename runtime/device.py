"""Devices: streams of work in order, and word on the loop when work is done.

A lane launches work on its stream and goes on; nothing here waits. The CPU device runs all streams on one lane thread,
so that arithmetic never runs on the event loop and the OpenMP pool, which belongs to the thread that first used it, is
made once. The null device runs work at the launch itself: everything is deterministic, for tests and for
measuring what the engine costs besides the arithmetic.
"""

import queue
import threading
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from millrace.kernels.cpu_library import set_num_threads
from millrace.runtime.world import World

Work = Callable[[], None]


class DeviceLostError(Exception):
    """The device has failed for good (an illegal address, a lost GPU); the process must start anew to use it."""


class StepMemoryError(Exception):
    """A sequence does not fit into the device's memory even when it is computed alone; the message has the numbers."""


class Stream(msgspec.Struct, frozen=True):
    """Work on one stream runs in the order of its launches."""

    name: str
    priority: int  # lower is served first where the device can choose


class StepOutput:
    """What the work of one step leaves behind, in stream order; read on the loop after `notify` and `finish`.

    Work of a step that has failed is skipped, so that the first error is the one that is reported.

    Attributes:
        failed: sequences that could not be computed though the rest of the step was: (seq, error).
        at_end: work that `finish` does: making messages out of what the device has copied to the host.
        releases: what gives back the host memory of a step that the device has done with.
    """

    __slots__ = ("at_end", "error", "failed", "logits", "prompt_logprobs", "releases", "sampled")

    def __init__(self) -> None:
        self.logits: Any = None
        self.sampled: Any = None
        self.prompt_logprobs: tuple[Any, ...] = ()
        self.failed: dict[int, Exception] = {}
        self.error: Exception | None = None
        self.at_end: list[Work] = []
        self.releases: list[Work] = []

    def run(self, work: Work) -> None:
        if self.error is None:
            try:
                work()
            except Exception as error:  # it belongs to this step, and is reported with it
                self.error = error

    def finish(self) -> None:
        """On the loop, when the device has done the step."""
        for work in self.at_end:
            self.run(work)
        for release in self.releases:
            release()
        self.at_end.clear()
        self.releases.clear()


class Device(Protocol):
    name: str
    concurrent: bool  # streams do not wait for each other

    def stream(self, name: str, priority: int) -> Stream: ...

    def launch(self, stream: Stream, work: Work) -> None:
        """Puts work on a stream; it must not raise."""

    def notify(self, stream: Stream, callback: Work) -> None:
        """Calls back on the event loop once everything launched on the stream so far has finished."""

    def check(self) -> None:
        """Raises DeviceLostError once the device itself has failed, so that nothing launched later can succeed."""

    def close(self) -> None:
        """Waits for launched work and gives the threads back; idempotent."""


class CpuDevice:
    """One lane thread for all streams, with `threads` OpenMP threads under it."""

    name = "cpu"
    concurrent = False

    def __init__(self, world: World, threads: int) -> None:
        self._world = world
        self._queue: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(threads,), name="millrace-lane", daemon=True)
        self._open = True
        self._thread.start()

    def stream(self, name: str, priority: int) -> Stream:
        return Stream(name, priority)

    def launch(self, stream: Stream, work: Work) -> None:
        self._queue.put(work)

    def notify(self, stream: Stream, callback: Work) -> None:
        self._queue.put(lambda: self._world.call_soon_threadsafe(callback))

    def check(self) -> None:
        """A processor does not get lost."""

    def close(self) -> None:
        if self._open:
            self._open = False
            self._queue.put(None)
            self._thread.join()

    def _run(self, threads: int) -> None:
        set_num_threads(threads)
        while (work := self._queue.get()) is not None:
            work()
            del work  # the last step's arrays must not live until the next step comes


class NullDevice:
    """Runs work at the launch, on the loop, and keeps a log of launches (`[(stream name, work name)]`)."""

    name = "null"
    concurrent = False

    def __init__(self, world: World) -> None:
        self._world = world
        self.launches: list[str] = []

    def stream(self, name: str, priority: int) -> Stream:
        return Stream(name, priority)

    def launch(self, stream: Stream, work: Work) -> None:
        self.launches.append(stream.name)
        work()

    def notify(self, stream: Stream, callback: Work) -> None:
        self._world.call_soon_threadsafe(callback)

    def check(self) -> None:
        """Nothing can fail."""

    def close(self) -> None:
        self.launches.clear()
