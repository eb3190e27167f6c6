"""The scheduler under random traffic: pool, prefix cache, lanes and sampler with the ledger model, one event at a time.

The machine owns time and order: it decides when a plan is launched, when the device works, and when a result comes
back, so that cancels, preemptions and pauses meet steps in every state of flight. Every token is checked.
"""

import asyncio
import random
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest
from fakes import EOS, VOCAB, LedgerModel, LedgerSwap, greedy, next_token
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

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
from millrace.runtime.messages import Admitted, Cancel, Closed, Flow, Started, TokensSampled
from millrace.runtime.scheduling.budget import PrefillBudget
from millrace.runtime.types import BLOCK_SIZE, Priority, choice_of, request_of


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


class Traffic(RuleBasedStateMachine):
    """Few rows, few blocks, few distinct prompts: preemption and prefix hits all the time."""

    def __init__(self) -> None:
        super().__init__()
        self.house = House(num_blocks=14, max_num_seqs=5)
        self.paused: set[int] = set()

    @initialize(
        overlap=st.booleans(),
        prefix_cache=st.booleans(),
        slots=st.sampled_from([0, 3, 40]),
        failing=st.sets(st.integers(0, 12), max_size=3),
    )
    def build(self, overlap: bool, prefix_cache: bool, slots: int, failing: set[int]) -> None:
        self.house = House(num_blocks=14, max_num_seqs=5, overlap=overlap, prefix_cache=prefix_cache, slots=slots)
        if self.house.swap is not None:
            self.house.swap.fail_at = failing

    @rule(
        family=st.integers(0, 2),
        length=st.integers(1, 70),
        max_new=st.integers(0, 60),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        priority=st.integers(0, 3),
        deadline=st.sampled_from([None, None, None, 3.0]),
    )
    def submit(self, family: int, length: int, max_new: int, n: int, priority: int, deadline: float | None) -> None:
        draw = random.Random(family)
        prompt = [draw.randrange(1, VOCAB) for _ in range(length)]
        if self.house.capacity.blocks(length, max(max_new, 1), n) > self.house.capacity.num_blocks:
            return  # admission refuses it
        until = None if deadline is None else self.house.world.now() + deadline
        self.house.submit(prompt, max_new, n=n, priority=priority, deadline=until)

    @precondition(lambda self: self.house.open)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        rid = data.draw(st.sampled_from(sorted(self.house.open)))
        self.house.scheduler.handle(Cancel(rid))

    @precondition(lambda self: self.house.open)
    @rule(data=st.data())
    def stop_string(self, data: st.DataObject) -> None:
        """The streamer has ended one choice by itself."""
        rid = data.draw(st.sampled_from(sorted(self.house.open)))
        seqs = [seq for seq in self.house.output if request_of(seq) == rid and seq not in self.house.ended_seqs]
        if seqs:
            seq = data.draw(st.sampled_from(sorted(seqs)))
            self.house.end_choice(seq, "stop")
            self.house.scheduler.handle(Cancel(rid, None, choice_of(seq)))

    @precondition(lambda self: self.house.open)
    @rule(data=st.data())
    def pause(self, data: st.DataObject) -> None:
        rid = data.draw(st.sampled_from(sorted(self.house.open)))
        self.paused.add(rid)
        self.house.scheduler.handle(Flow(rid, True))

    @precondition(lambda self: self.paused)
    @rule()
    def resume(self) -> None:
        self.house.scheduler.handle(Flow(self.paused.pop(), False))

    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        """As if somebody needed the blocks."""
        holders = self.house.scheduler.residency.holders()
        if holders:
            self.house.scheduler._preempt(data.draw(st.sampled_from(holders)))

    @rule(seconds=st.floats(0.1, 2.0))
    def pass_time(self, seconds: float) -> None:
        self.house.world.time += seconds

    @rule()
    def pump(self) -> None:
        self.house.pump()

    @rule(items=st.integers(1, 6))
    def work(self, items: int) -> None:
        for _ in range(items):
            self.house.work()

    @rule(items=st.integers(1, 3))
    def copy(self, items: int) -> None:
        for _ in range(items):
            self.house.copy()

    @rule()
    def call(self) -> None:
        self.house.call()

    @rule(rounds=st.integers(1, 30))
    def go_on(self, rounds: int) -> None:
        for _ in range(rounds):
            self.house.pump()
            self.house.work()
            self.house.copy()
            self.house.call()

    @invariant()
    def accounts_balance(self) -> None:
        self.house.scheduler.check()

    def teardown(self) -> None:
        for rid in self.paused:
            self.house.scheduler.handle(Flow(rid, False))
        self.house.drain()


Traffic.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestTraffic = Traffic.TestCase


def prompts(length: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(1, VOCAB) for _ in range(length)]


def test_launches_run_ahead_but_never_past_the_sampling() -> None:
    house = House(num_blocks=20, max_num_seqs=2)
    house.submit(prompts(5), 12)
    house.drain()
    # Prefill and its draw; then forward N, sample N, forward N + 1, ... on the decode stream.
    assert house.device.launches[:2] == ["prefill", "prefill"]
    assert set(house.device.launches[2:]) == {"decode"}

    house = House(num_blocks=20, max_num_seqs=2)
    house.submit(prompts(5), 100)
    while not house.output:
        house.pump(), house.work(), house.call()
    house.device.work.clear()  # the device stands still from now on
    for _ in range(10):
        house.pump()
    assert house.scheduler.num_launched == 2


@pytest.mark.parametrize("overlap", [True, False])
def test_credits(overlap: bool) -> None:
    house = House(num_blocks=60, max_num_seqs=4, overlap=overlap, max_prefill_tokens=16)
    house.submit(prompts(100), 20)
    for _ in range(10):
        house.pump()
    assert house.scheduler.num_launched == (2 if overlap else 1)


def test_order_of_priorities_and_ageing() -> None:
    house = House(num_blocks=60, max_num_seqs=1)
    order: list[int] = []
    for index, priority in enumerate([3, 2, 1, 0]):
        house.submit(prompts(4, index), 1, priority=priority)
    house.drain()
    order = list(house.ended)
    assert order == [4, 3, 2, 1]


def test_low_priority_does_not_starve() -> None:
    """A LOW request among endless CRITICAL ones starts once it has aged by three classes."""
    house = House(num_blocks=60, max_num_seqs=1)
    low = house.submit(prompts(4), 1, priority=3)
    waited = 0
    while low not in house.ended:
        house.submit(prompts(4, waited), 1, priority=0)
        house.submit(prompts(5, waited), 1, priority=0)
        for _ in range(8):
            house.pump(), house.work(), house.call()
        house.world.time += 1.0
        waited += 1
        assert waited < 100
    assert house.world.time >= 30.0  # three classes of ten seconds
    house.drain()


def test_the_number_of_messages_per_step_does_not_depend_on_the_batch() -> None:
    def sends_per_step(batch: int) -> dict[str, float]:
        house = House(num_blocks=16 * batch + 1, max_num_seqs=batch, max_prefill_tokens=4096)
        for index in range(batch):
            house.submit([5 + index % 200, 6, 7], 200)
        while len(house.output) < batch:
            house.pump(), house.work(), house.call()
        before = {name: end[0].statistics().sent for name, end in house.ends.items()}
        steps = house.scheduler.stats.steps["decode"]
        while house.scheduler.stats.steps["decode"] < steps + 20:
            house.pump(), house.work(), house.call()
        return {name: end[0].statistics().sent - before[name] for name, end in house.ends.items()}

    one, many = sends_per_step(1), sends_per_step(256)
    assert {name: abs(one[name] - many[name]) <= 2 for name in one} == dict.fromkeys(one, True)


def test_prefill_budget_follows_the_rate() -> None:
    budget = PrefillBudget(512, 0.25)
    assert budget.tokens(decoding=True) == 512  # nothing is known yet
    budget.observe(512, 2.0)
    assert budget.tokens(decoding=True) == 64
    assert budget.tokens(decoding=False) == 512
    budget.observe(512, 100.0)
    assert budget.tokens(decoding=True) >= PrefillBudget.SMALLEST
    assert PrefillBudget(512, 0.0).tokens(decoding=True) == 512


@pytest.mark.parametrize(("prompt", "new", "n"), [(1, 1, 1), (16, 16, 1), (40, 30, 4), (48, 100, 2), (15, 2, 3)])
def test_what_admission_lets_in_fits_alone(prompt: int, new: int, n: int) -> None:
    blocks = Capacity(max_model_len=256, num_blocks=0, max_rows=8, vocab_size=VOCAB, max_logprobs=0).blocks(
        prompt, new, n
    )
    house = House(num_blocks=blocks + 1, max_num_seqs=n)
    house.submit(prompts(prompt), new, n=n)
    house.drain()
    assert house.scheduler.stats.preemptions == 0
