"""A GPU that is none: streams, events and graphs on the CPU, executed late and in any order that a GPU might choose."""

import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import torch
from fakes import LedgerModel
from torch import Tensor

from millrace.runtime.config import Config
from millrace.runtime.cuda.device import CudaDevice
from millrace.runtime.cuda.driver import DeviceMemory, Work
from millrace.runtime.cuda.lanes import cuda_lanes
from millrace.runtime.cuda.start import warm_up
from millrace.runtime.lanes import Lanes
from millrace.runtime.models.base import ForwardBatch
from millrace.runtime.plan import MemoryPlan
from millrace.runtime.types import BLOCK_SIZE
from millrace.runtime.world import AsyncioWorld

POLICIES = ("lazy", "others-first", "random")


class FakeEvent:
    def __init__(self, stream: "FakeStream") -> None:
        self.stream = stream
        self.done = False


class FakeStream:
    def __init__(self, priority: int) -> None:
        self.priority = priority
        self.items: deque[tuple[str, Any]] = deque()  # ("work", callable), ("record", event), ("wait", event)


class FakeDriver:
    """Implements millrace.runtime.cuda.driver.CudaDriver.

    Nothing is executed when it is enqueued, but when somebody waits for an event; then streams advance as the policy
    says, each in its own order and held only by the events that it waits for:

        lazy          the stream of the event alone, and those that it waits for
        others-first  every other stream as far as it can, before the one that is waited for
        random        one item of any stream after the other
        at once       each item when it is enqueued, so that an exception reaches the lane as on a real device
    """

    device = torch.device("cpu")
    name = "a GPU that is none"

    def __init__(
        self,
        policy: str = "random",
        seed: int = 0,
        *,
        free: int = 8 << 30,
        total: int = 10 << 30,
        step_bytes: int = 0,
        capture_bytes: tuple[int, ...] = (0,),
        uncapturable: int = 0,
    ) -> None:
        """Memory is only counted: enqueued work takes `step_bytes` until `release_cached`, and captures take what
        `capture_bytes` says in their order. A capture in which more than `uncapturable` were made before fails."""
        self.policy = policy
        self.free, self.total = free, total
        self.step_bytes, self.capture_bytes, self.uncapturable = step_bytes, capture_bytes, uncapturable
        self._taken = self._captured = 0
        self.failure: RuntimeError | None = None
        self.captures: list[tuple[int, Any]] = []  # (number of graph, pool that was passed)
        self.replays = 0
        self.waits = 0
        self.released = 0
        self.max_pending = 0
        self._choose = random.Random(seed)
        self._streams: list[FakeStream] = []
        self._own = threading.local()
        self._lock = threading.RLock()
        self._executing = False
        self._gate: tuple[threading.Event, Work] | None = None

    def stream(self, priority: int) -> FakeStream:
        with self._lock:
            self._streams.append(FakeStream(priority))
            return self._streams[-1]

    def use(self, stream: FakeStream) -> None:
        self._own.stream = stream

    def current(self) -> int:
        if not self._executing:
            raise AssertionError("a kernel is launched outside of CudaDriver.enqueue")
        return 1

    def enqueue(self, work: Work) -> None:
        with self._lock:
            self._taken = max(self._taken, self.step_bytes)
            if self._executing:
                work()
            else:
                self._put("work", work)

    def record(self) -> FakeEvent:
        if self.failure is not None:
            raise self.failure
        event = FakeEvent(self._own.stream)
        self._put("record", event)
        return event

    def wait(self, event: FakeEvent) -> None:
        self.waits += 1
        self._put("wait", event)

    def hold(self, gate: threading.Event, entered: Work) -> None:
        """The next thread that waits for an event waits for the gate first, and says that it has come there."""
        self._gate = (gate, entered)

    def synchronize(self, event: FakeEvent) -> None:
        gate, self._gate = self._gate, None
        if gate is not None:
            gate[1]()
            gate[0].wait()
        with self._lock:
            while not event.done:
                if self.failure is not None:
                    raise self.failure
                try:
                    self._advance(event)
                except AssertionError:
                    raise
                except Exception as error:  # what fails on the device later than its launch is lost with the device
                    self.failure = RuntimeError(f"{type(error).__name__}: {error}")
                    raise self.failure from error

    def drain(self) -> None:
        self.synchronize(self.record())

    def settle(self) -> None:
        """What is filled outside of enqueued work is there at once."""

    def capture(self, work: Work, pool: Any) -> Work:
        number = len(self.captures)
        if self.uncapturable and number >= self.uncapturable:
            raise RuntimeError("operation not permitted when stream is capturing\nand a long explanation")
        self.captures.append((number, pool))
        self._captured += self.capture_bytes[min(number, len(self.capture_bytes) - 1)]
        return work

    def pool_of(self, graph: Any) -> str:
        return "pool"

    def replay(self, graph: Work) -> None:
        self.replays += 1
        self.enqueue(graph)

    def pinned(self, num_bytes: int) -> Tensor:
        return torch.full((num_bytes,), 0xAA, dtype=torch.uint8)

    def memory(self) -> DeviceMemory:
        return DeviceMemory(self.free - self._taken - self._captured, self.total)

    def release_cached(self) -> None:
        self.released += 1
        self._taken = self._captured = 0

    @contextmanager
    def on(self, stream: FakeStream) -> Iterator[None]:
        """Makes a stream the thread's own, in a test that has no lane threads."""
        self.use(stream)
        yield

    def _put(self, kind: str, item: Any) -> None:
        with self._lock:
            stream = self._own.stream
            stream.items.append((kind, item))
            self.max_pending = max(self.max_pending, len(stream.items))
            while self.policy == "at once" and self._can_run(stream):
                self._run_one(stream)

    def _can_run(self, stream: FakeStream) -> bool:
        if not stream.items:
            return False
        kind, item = stream.items[0]
        return kind != "wait" or item.done

    def _run_one(self, stream: FakeStream) -> None:
        kind, item = stream.items.popleft()
        if kind == "record":
            item.done = True
        elif kind == "work":
            self._executing = True
            try:
                with torch.inference_mode():
                    item()
            finally:
                self._executing = False

    def _advance(self, event: FakeEvent) -> None:
        own = event.stream
        able = [stream for stream in self._streams if self._can_run(stream)]
        if not able:
            raise AssertionError("the streams wait for each other, or for an event that nobody recorded")
        others = [stream for stream in able if stream is not own]
        if self.policy == "random":
            chosen = self._choose.choice(able)
        elif self.policy == "others-first" and others:
            chosen = self._choose.choice(others)
        else:
            while not self._can_run(own):
                own = own.items[0][1].stream  # it waits for that one
            chosen = own
        self._run_one(chosen)


class PaddedLedger(LedgerModel):
    """The ledger model for graphs: places that pad a batch must be what they are said to be, and are not computed.

    It runs out of memory above `limit` tokens at a time (`decode_limit` in a decode step), and for a sequence of
    `too_long` tokens or more."""

    def __init__(self, max_model_len: int = 512, limit: int = 1 << 30) -> None:
        super().__init__(max_model_len)
        self.spec = msgspec.structs.replace(self.spec, head_dim=64)  # one that may be captured
        self.limit = self.decode_limit = limit
        self.too_long = 1 << 30
        self.refused = self.most_logits = 0

    def forward(self, batch: ForwardBatch[Tensor], kv: Any) -> Tensor:
        self.most_logits = max(self.most_logits, len(batch.logits_indices))
        limit = self.decode_limit if batch.is_decode else self.limit
        if len(batch.tokens) > limit or int(batch.context_lens.max()) >= self.too_long:
            self.refused += 1
            raise torch.OutOfMemoryError(f"{len(batch.tokens)} tokens\nand a long explanation")
        if not batch.is_decode:
            return torch.from_numpy(super().forward(batch.converted(Tensor.numpy), kv))
        real = batch.slot_mapping >= BLOCK_SIZE
        count = int(real.sum())
        assert real[:count].all(), "padding stands behind the batch"
        assert not batch.tokens[count:].any()
        assert not batch.positions[count:].any()
        assert not batch.block_tables[count:].any()
        logits = torch.zeros(len(real), self.spec.vocab_size)
        if count:
            part = ForwardBatch(
                tokens=batch.tokens[:count],
                positions=batch.positions[:count],
                slot_mapping=batch.slot_mapping[:count],
                query_starts=batch.query_starts[: count + 1],
                context_lens=batch.context_lens[:count],
                block_tables=batch.block_tables[:count],
                logits_indices=batch.logits_indices[:count],
                max_query_len=1,
                max_context_len=batch.max_context_len,
            )
            logits[:count] = torch.from_numpy(super().forward(part.converted(Tensor.numpy), kv))
        return logits

    def block_storage(self, kv: Any) -> tuple[Tensor, None]:
        """Two planes of one layer, the halves of each block: [1, 2, num_blocks, BLOCK_SIZE] int64."""
        size = BLOCK_SIZE
        return torch.from_numpy(kv).as_strided((1, 2, len(kv) // size, size), (2 * size, size, 2 * size, 1)), None


class CountingLauncher:
    """Passes launches on to another launcher and counts them; all must come from within enqueued work."""

    def __init__(self, launcher: Any, driver: FakeDriver) -> None:
        self.device_type: str = launcher.device_type
        self.sm_count: int = launcher.sm_count
        self.shared_bytes_per_sm: int = launcher.shared_bytes_per_sm
        self._launcher = launcher
        self._driver = driver
        self.num_launches = 0

    def launch(self, *args: Any, stream: int, **more: Any) -> None:
        assert stream == self._driver.current()
        self.num_launches += 1
        self._launcher.launch(*args, stream=stream, **more)


def gpu(driver: FakeDriver, launcher: Any, *, use_graphs: bool = True, swap_slots: int = 0) -> Callable[..., Any]:
    """For `fakes.engine(gpu=...)`: a CudaDevice on the fake driver, with its graphs captured; a swap costs nothing."""

    async def make(world: AsyncioWorld, model: Any, plan: MemoryPlan, config: Config) -> tuple[CudaDevice, Lanes]:
        device = CudaDevice(world, driver)
        lanes = cuda_lanes(
            driver,
            launcher,
            model,
            num_blocks=plan.num_blocks,
            max_rows=plan.max_num_seqs,
            max_model_len=plan.max_model_len,
            max_logprobs=config.limits.max_logprobs,
            use_graphs=use_graphs,
            swap_slots=swap_slots,
        )
        await warm_up(world, device, lanes)
        return device, lanes

    return make


def lanes_alive() -> list[str]:
    """Names of the threads of CUDA devices that are not closed."""
    return sorted(thread.name for thread in threading.enumerate() if thread.name.endswith(("-lane", "-waiter")))
