"""The few calls that the engine makes to CUDA, behind one protocol: streams, events, graphs, memory.

Everything else is tensors and kernels, which are enqueued inside `CudaDriver.enqueue`. So the tests can put a double in
the place of `TorchDriver` that executes on the CPU, late and out of order across streams as a GPU may.
"""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Work = Callable[[], None]


class DeviceMemory(NamedTuple):
    """Bytes of one GPU."""

    free: int
    total: int


class CudaDriver(Protocol):
    """One GPU. Streams, events and graphs are the driver's own objects, and only passed back to it.

    Attributes:
        device: where its tensors lie.
        name: of the device, for people.
    """

    device: torch.device
    name: str

    def stream(self, priority: int) -> Any:
        """A new stream; 0 is the highest priority, larger numbers are lower where the device has so many."""

    def use(self, stream: Any) -> None:
        """Makes a stream the calling thread's own, for all that follows; the thread can enqueue then."""

    def current(self) -> int:
        """The raw handle of the stream that kernels are to be launched on now: the thread's own, or a capture's."""

    def enqueue(self, work: Work) -> None:
        """Calls `work`, whose tensor operations and kernel launches go onto the thread's stream.

        `work` must be complete in itself: it may run on the device later than the call returns, and what it reads of
        the host's memory (pinned tensors) must not change until an event recorded behind it is done.
        """

    def record(self) -> Any:
        """An event behind everything enqueued so far on the thread's stream."""

    def wait(self, event: Any) -> None:
        """What is enqueued next on the thread's stream starts after the event; the host goes on at once."""

    def synchronize(self, event: Any) -> None:
        """Blocks the calling thread, without using the processor, until the event is done. Raises RuntimeError if the
        device has failed."""

    def drain(self) -> None:
        """Blocks until everything on the thread's stream is done."""

    def settle(self) -> None:
        """Blocks until the device has done everything, on all streams: what was allocated and filled on one may be used
        on another then."""

    def capture(self, work: Work, pool: Any) -> Any:
        """Records what `work` enqueues as a graph and executes nothing; None for `pool` makes a new memory pool.
        Tensors that `work` allocates belong to the pool and keep their addresses."""

    def pool_of(self, graph: Any) -> Any:
        """The memory pool of a graph, for `capture` of the next one."""

    def replay(self, graph: Any) -> None:
        """Enqueues the whole graph on the thread's stream."""

    def pinned(self, num_bytes: int) -> Tensor:
        """Page-locked host memory, [num_bytes] uint8, aligned to 16 bytes at least."""

    def memory(self) -> DeviceMemory: ...

    def release_cached(self) -> None:
        """Gives memory that is cached and not used back to the device."""


class TorchDriver:
    """A GPU through torch.cuda: implements CudaDriver."""

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)
        properties = torch.cuda.get_device_properties(index)
        self.name = f"{properties.name}, sm_{properties.major}{properties.minor}"

    def stream(self, priority: int) -> Any:
        # CUDA counts downwards from 0, and torch knows 0 and -1: the lowest number is served first.
        return torch.cuda.Stream(self.device, priority=-1 if priority == 0 else 0)  # type: ignore[no-untyped-call]

    def use(self, stream: Any) -> None:
        torch.cuda.set_device(self.device)
        torch.cuda.set_stream(stream)

    def current(self) -> int:
        # Asked anew at each launch: during a capture it is the capture's stream.
        return int(torch.cuda.current_stream(self.device).cuda_stream)

    def enqueue(self, work: Work) -> None:
        work()

    def record(self) -> Any:
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def wait(self, event: Any) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)

    def synchronize(self, event: Any) -> None:
        self._enter()
        event.synchronize()

    def drain(self) -> None:
        torch.cuda.current_stream(self.device).synchronize()

    def settle(self) -> None:
        torch.cuda.synchronize(self.device)

    def capture(self, work: Work, pool: Any) -> Any:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.device)
        # Other threads may allocate and synchronise meanwhile: that is no fault of this capture. torch.cuda.graph would
        # collect garbage and give cached memory back before each of the captures, which takes longer than they do.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            work()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # the capture is broken; what broke it is what matters
                graph.capture_end()
            raise
        graph.capture_end()
        return graph

    def pool_of(self, graph: Any) -> Any:
        return graph.pool()

    def replay(self, graph: Any) -> None:
        graph.replay()

    def pinned(self, num_bytes: int) -> Tensor:
        self._enter()
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def memory(self) -> DeviceMemory:
        self._enter()
        return DeviceMemory(*torch.cuda.mem_get_info(self.device))

    def release_cached(self) -> None:
        self._enter()
        torch.cuda.empty_cache()

    def _enter(self) -> None:
        """In whatever thread: without a current device of its own it would make a context on device 0."""
        torch.cuda.set_device(self.device)
