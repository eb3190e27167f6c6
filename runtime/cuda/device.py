"""A GPU as a device of the engine: one lane thread and one waiter thread for each stream.

A lane thread enqueues what is launched, with its stream as the current one, and never waits for the GPU; the event loop
does neither. A waiter blocks on the events behind the steps of its stream, in their order, and calls back on the loop:
nothing polls, and an idle engine uses no processor. There is a waiter for each stream because a word about a decode
step must not wait behind a long prefill that was launched before it.
"""

import queue
import threading
from typing import Any, NamedTuple

import torch

from millrace.runtime.cuda.driver import CudaDriver
from millrace.runtime.device import DeviceLostError, Stream, Work
from millrace.runtime.world import World


class Mark(NamedTuple):
    """In a lane's queue: a callback for when everything before it is done."""

    callback: Work


class CudaDevice:
    """Implements millrace.runtime.device.Device."""

    name = "cuda"
    concurrent = True

    def __init__(self, world: World, driver: CudaDriver) -> None:
        self._world = world
        self._driver = driver
        self._lanes: dict[str, _Lane] = {}
        self._failure: BaseException | None = None

    def stream(self, name: str, priority: int) -> Stream:
        stream = Stream(name, priority)
        if name not in self._lanes:
            self._lanes[name] = _Lane(self, self._driver, stream)
        return stream

    def launch(self, stream: Stream, work: Work) -> None:
        self._lanes[stream.name].work.put(work)

    def notify(self, stream: Stream, callback: Work) -> None:
        self._lanes[stream.name].work.put(Mark(callback))

    def check(self) -> None:
        if self._failure is not None:
            raise DeviceLostError(f"the GPU has failed: {self._failure}") from self._failure

    def close(self) -> None:
        """Waits for what is launched; each thread ends with its queue."""
        for lane in self._lanes.values():
            lane.close()
        self._lanes.clear()

    def reported(self, callback: Work, failure: BaseException | None) -> None:
        """From a waiter thread: what was marked is done, or the device has failed."""
        if failure is not None and self._failure is None:
            self._failure = failure
        self._world.call_soon_threadsafe(callback)


class _Lane:
    """One stream, the thread that enqueues on it, and the thread that waits for its events."""

    def __init__(self, device: CudaDevice, driver: CudaDriver, stream: Stream) -> None:
        self.work: queue.SimpleQueue[Work | Mark | None] = queue.SimpleQueue()
        self._events: queue.SimpleQueue[tuple[Any, Work] | None] = queue.SimpleQueue()
        self._device = device
        self._driver = driver
        self._stream = driver.stream(stream.priority)
        self._threads = [
            threading.Thread(target=target, name=f"millrace-{stream.name}-{what}", daemon=True)
            for target, what in ((self._enqueue, "lane"), (self._wait, "waiter"))
        ]
        for thread in self._threads:
            thread.start()

    def _mark(self, callback: Work) -> None:
        """Calls back once everything enqueued so far is done."""
        try:
            event = self._driver.record()
        except Exception as error:  # a device that has failed takes no events either
            self._device.reported(callback, error)
            return
        self._events.put((event, callback))

    def close(self) -> None:
        self.work.put(None)
        self._threads[0].join()
        self._events.put(None)
        self._threads[1].join()

    def _enqueue(self) -> None:
        failure: Exception | None = None
        try:
            self._driver.use(self._stream)
        except Exception as error:  # nothing can be enqueued then, and every mark says so
            failure = error
        with torch.inference_mode():
            while (work := self.work.get()) is not None:
                if not isinstance(work, Mark):
                    if failure is None:
                        work()
                elif failure is None:
                    self._mark(work.callback)
                else:
                    self._device.reported(work.callback, failure)
                del work  # the last step's tensors must not live until the next step comes

    def _wait(self) -> None:
        while (marked := self._events.get()) is not None:
            event, callback = marked
            try:
                self._driver.synchronize(event)
            except Exception as error:  # sticky: every later call fails as well, so that the queue drains
                self._device.reported(callback, error)
            else:
                self._device.reported(callback, None)
            del marked, event, callback
