"""Scheduler, prefill, decode and sampler with the ledger model, without an event loop: the test owns time and order."""

import asyncio
import random
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
from fakes import EOS, VOCAB, LedgerModel, LedgerSwap, greedy, next_token

from millrace.actors.admission import Capacity
from millrace.actors.decode import Decode
from millrace.actors.prefill import Prefill
from millrace.actors.sampler import Sampler
from millrace.actors.scheduler import Scheduler
from millrace.runtime.channel import Receiver, Sender, channel
from millrace.runtime.config import SchedulerConfig
from millrace.runtime.device import Stream
from millrace.runtime.kv.host import HostSlots
from millrace.runtime.kv.pool import BlockPool
from millrace.runtime.kv.prefix import PrefixHasher
from millrace.runtime.lanes import host_lanes
from millrace.runtime.messages import Admitted, Closed, Started, TokensSampled
from millrace.runtime.types import BLOCK_SIZE, Priority, request_of


def prompts(length: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(1, VOCAB) for _ in range(length)]


class ManualWorld:
    """Time stands until it is moved; callbacks wait until they are called."""

    def __init__(self) -> None:
        self.time = 0.0
        self.callbacks: deque[Callable[[], None]] = deque()

    def now(self) -> float:
        return self.time

    def wall(self) -> float:
        return self.time

    def rng(self, name: str) -> random.Random:
        return random.Random(name)

    def new_id(self) -> int:
        return 1

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> Any:
        raise AssertionError("nothing is spawned here")

    def call_at(self, when: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
        raise AssertionError("nobody waits here")

    def call_soon_threadsafe(self, callback: Callable[[], None]) -> None:
        self.callbacks.append(callback)

    async def to_thread(self, work: Callable[[], Any]) -> Any:
        return work()


class ManualDevice:
    """A device that works one item at a time, when it is told to; the swap stream is not held up by the others."""

    name = "manual"

    def __init__(self, world: ManualWorld) -> None:
        self.world = world
        self.work: deque[Callable[[], None]] = deque()
        self.swaps: deque[Callable[[], None]] = deque()
        self.launches: list[str] = []

    def stream(self, name: str, priority: int) -> Stream:
        return Stream(name, priority)

    def launch(self, stream: Stream, work: Callable[[], None]) -> None:
        self.launches.append(stream.name)
        self.queue(stream).append(work)

    def notify(self, stream: Stream, callback: Callable[[], None]) -> None:
        self.queue(stream).append(lambda: self.world.call_soon_threadsafe(callback))

    def queue(self, stream: Stream) -> deque[Callable[[], None]]:
        return self.swaps if stream.name == "swap" else self.work

    def check(self) -> None:
        pass

    def close(self) -> None:
        self.work.clear()


class House:
    """Scheduler, both lanes and sampler without a loop; messages move when `pump` is called."""

    def __init__(
        self,
        *,
        num_blocks: int,
        max_num_seqs: int,
        max_prefill_tokens: int = 48,
        overlap: bool = True,
        prefix_cache: bool = True,
        slots: int = 0,
        block_seconds: float = 0.0,
    ) -> None:
        world = self.world = ManualWorld()
        self.device = ManualDevice(world)
        self.model = LedgerModel(max_model_len=256)
        config = SchedulerConfig(max_num_seqs=max_num_seqs, max_prefill_tokens=max_prefill_tokens, overlap=overlap)
        ends: dict[str, tuple[Sender[Any], Receiver[Any]]] = {
            name: channel(name, 1000, world) for name in ("scheduler", "prefill", "decode", "sampler", "streamer")
        }
        self.ends = ends
        hasher = PrefixHasher(b"key", BLOCK_SIZE)
        self.hasher = hasher
        self.pool = BlockPool(num_blocks)
        self.scheduler = Scheduler(
            config=config,
            pool=self.pool,
            hasher=hasher if prefix_cache else None,
            max_model_len=256,
            world=world,
            inbox=ends["scheduler"][1],
            prefill=ends["prefill"][0],
            decode=ends["decode"][0],
            streamer=ends["streamer"][0],
            host=HostSlots(slots, block_seconds) if slots else None,
        )
        lanes = host_lanes(self.model, num_blocks, max_num_seqs, 256)
        self.swap = LedgerSwap(lanes.prefill._kv, slots) if slots else None
        to_sampler = ends["sampler"][0]
        self.prefill = Prefill(
            device=self.device, lane=lanes.prefill, swap=self.swap, inbox=ends["prefill"][1], sampler=to_sampler
        )
        self.decode = Decode(device=self.device, lane=lanes.decode, inbox=ends["decode"][1], sampler=to_sampler)
        self.sampler = Sampler(
            device=self.device,
            world=world,
            lane=lanes.sampling,
            eos_token_ids=(EOS,),
            inbox=ends["sampler"][1],
            own=ends["sampler"][0],
            decode=ends["decode"][0],
            scheduler=ends["scheduler"][0],
            streamer=ends["streamer"][0],
        )
        self.capacity = Capacity(
            max_model_len=256, num_blocks=num_blocks - 1, max_rows=max_num_seqs, vocab_size=VOCAB, max_logprobs=5
        )
        self.prompts: dict[int, list[int]] = {}
        self.limits: dict[int, int] = {}
        self.output: dict[int, list[int]] = {}
        self.ended: dict[int, str] = {}
        self.ended_seqs: set[int] = set()  # choices that ended by their tokens
        self.closed: set[int] = set()
        self.stopped: set[int] = set()  # choices that a stop string has ended
        self.open: dict[int, int] = {}  # rid -> choices that have not ended

    def submit(
        self, prompt: list[int], max_new: int, *, n: int = 1, priority: int = 2, deadline: float | None = None
    ) -> int:
        rid = len(self.prompts) + 1
        hashes: list[bytes] = []
        tokens = np.array(prompt, dtype=np.int32)
        self.hasher.extend(hashes, tokens, "")
        self.prompts[rid], self.limits[rid], self.open[rid] = prompt, max_new, n
        sampling = greedy(max_new, n=n)
        priorities = Priority(priority)
        now = self.world.now()
        self.scheduler.handle(Admitted(rid, tokens, tuple(hashes), sampling, 0, max_new, priorities, deadline, now, ""))
        return rid

    def end_choice(self, seq: int, why: str) -> None:
        """A choice has ended: by its tokens, or by the streamer's stop string, which may cross with tokens."""
        assert seq not in self.ended_seqs, "a choice ends twice"
        self.ended_seqs.add(seq)
        if why == "stop":
            self.stopped.add(seq)
        rid = request_of(seq)
        self.open[rid] -= 1
        if not self.open[rid]:
            self.end(rid, why)

    def end(self, rid: int, why: str) -> None:
        assert rid not in self.ended, "two terminal events"
        self.ended[rid] = why
        self.open.pop(rid)

    def pump(self) -> bool:
        """Moves every message by one hop; the device and its results stay where they are."""
        moved = False
        self.scheduler.plan()
        for name, handle in (
            ("prefill", self.prefill.handle),
            ("decode", self.decode.handle),
            ("sampler", self.sampler.handle),
            ("scheduler", self.scheduler.handle),
            ("streamer", self.receive),
        ):
            for message in self.ends[name][1].take():
                handle(message)
                moved = True
        return moved

    def receive(self, message: Any) -> None:
        """The streamer's part: every token right, at its place, and one terminal event for each request."""
        if isinstance(message, TokensSampled):
            tokens = iter(message.tokens.tolist())
            for place, seq in enumerate(message.seqs):
                if not message.counts[place]:
                    continue
                token, rid = next(tokens), request_of(seq)
                if seq not in self.stopped:
                    assert seq not in self.ended_seqs, "a token behind the end"
                if rid in self.ended or seq in self.stopped:
                    continue
                output = self.output.setdefault(seq, [])
                assert message.positions[place] == len(output)
                assert token == next_token([*self.prompts[rid], *output])
                output.append(token)
            for finished in message.finished:
                rid = request_of(message.seqs[finished.index])
                seq = message.seqs[finished.index]
                if rid in self.open and seq not in self.stopped:
                    output = self.output.get(message.seqs[finished.index], [])
                    assert len(output) == self.limits[rid] or output[-1] == EOS
                    self.end_choice(seq, f"sampler: {finished.reason}")
        elif isinstance(message, Closed):
            assert message.rid not in self.closed, "two terminal events"
            self.closed.add(message.rid)
            if message.rid not in self.ended:  # the last token and a cancel may cross
                self.end(message.rid, message.reason)
        else:
            assert isinstance(message, Started)

    def work(self) -> bool:
        """The device does one item."""
        if self.device.work:
            self.device.work.popleft()()
            return True
        return False

    def copy(self) -> bool:
        """The swap stream does one item."""
        if self.device.swaps:
            self.device.swaps.popleft()()
            return True
        return False

    def call(self) -> bool:
        """One result reaches the loop."""
        if self.world.callbacks:
            self.world.callbacks.popleft()()
            return True
        return False

    def drain(self) -> None:
        """Everything that can happen happens; whoever is still open then would wait for ever."""
        for _ in range(100_000):
            if not any([self.pump(), self.work(), self.copy(), self.call()]):
                break
        self.scheduler.plan()
        assert not self.open, f"{self.open} hang"
        assert not self.scheduler.num_launched
        self.scheduler.check()
