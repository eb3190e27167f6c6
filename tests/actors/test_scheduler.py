"""The scheduler under random traffic: pool, prefix cache, lanes and sampler with the ledger model, one event at a time.

The machine owns time and order: it decides when a plan is launched, when the device works, and when a result comes
back, so that cancels, preemptions and pauses meet steps in every state of flight. Every token is checked.
"""

import random

import pytest
from fakes import VOCAB
from house import House, prompts
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from millrace.actors.admission import Capacity
from millrace.runtime.messages import Cancel, Flow
from millrace.runtime.scheduling import swaps
from millrace.runtime.scheduling.budget import PrefillBudget
from millrace.runtime.scheduling.records import SchedulerStats
from millrace.runtime.types import Lane, choice_of, request_of

PIECE = swaps.PIECE


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
        piece=st.integers(1, 3),
    )
    def build(self, overlap: bool, prefix_cache: bool, slots: int, failing: set[int], piece: int) -> None:
        swaps.PIECE = piece
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
        swaps.PIECE = PIECE
        for rid in self.paused:
            self.house.scheduler.handle(Flow(rid, False))
        self.house.drain()


Traffic.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestTraffic = Traffic.TestCase


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


def test_how_long_a_step_takes() -> None:
    """Two decode steps report during a prefill step: on one processor they take of its time, on a GPU they do not."""
    for concurrent, seconds in ((False, 1.0), (True, 4.0)):
        stats = SchedulerStats(concurrent=concurrent)
        for at in (2.0, 4.0):
            stats.observe(Lane.DECODE, at - 1.0, at)
        assert stats.observe(Lane.PREFILL, 1.0, 5.0) == seconds
        assert stats.last_progress == 5.0


@pytest.mark.parametrize(("prompt", "new", "n"), [(1, 1, 1), (16, 16, 1), (40, 30, 4), (48, 100, 2), (15, 2, 3)])
def test_what_admission_lets_in_fits_alone(prompt: int, new: int, n: int) -> None:
    blocks = Capacity(max_model_len=256, num_blocks=0, max_rows=8, vocab_size=VOCAB, max_logprobs=0).blocks(
        prompt, new, n
    )
    house = House(num_blocks=blocks + 1, max_num_seqs=n)
    house.submit(prompts(prompt), new, n=n)
    house.drain()
    assert house.scheduler.stats.preemptions == 0
