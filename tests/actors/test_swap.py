"""Preempted sequences on the host and back: every token, block and slot is accounted for, whatever crosses what."""

import random

import pytest
from fakes import EOS, expected
from house import House, prompts

from millrace.runtime.kv.host import HostSlots
from millrace.runtime.messages import Cancel, Flow
from millrace.runtime.scheduling import swaps
from millrace.runtime.scheduling.records import Sequence


def endless(length: int, output: int) -> list[int]:
    """A prompt behind which the ledger does not end by itself so soon."""
    found = (prompts(length, seed) for seed in range(100))
    return next(prompt for prompt in found if EOS not in expected(prompt, output, ignore_eos=True))


def go_on(house: House, rounds: int, *, copies: bool = True) -> None:
    for _ in range(rounds):
        house.pump(), house.work(), house.call()
        if copies:
            house.copy()
        house.scheduler.check()


def running(house: House, tokens: int) -> Sequence:
    """The first of the running sequences, once so many tokens of it are known."""
    for _ in range(2000):
        go_on(house, 1)
        for sequence in house.scheduler.residency.holders():
            if house.scheduler.residency.rows.known[sequence.row] >= tokens:
                return sequence
    raise AssertionError("nobody gets so far")


def preempt(house: House, sequence: Sequence, *, copies: bool = True) -> None:
    """And waits until no launched step names its row."""
    house.scheduler._preempt(sequence)
    for _ in range(50):
        if sequence.row < 0:
            return
        go_on(house, 1, copies=copies)
    raise AssertionError("its row does not come back")


def stall(house: House, sequence: Sequence) -> None:
    """Its reader, so that the sequence does not come back at once."""
    house.scheduler.handle(Flow(sequence.request.admitted.rid, True))


def counts(house: House) -> tuple[int, int]:
    swaps = house.scheduler.residency.swaps
    assert swaps is not None
    return swaps.num_out, swaps.num_in


def house_with_slots(slots: int = 40, block_seconds: float = 0.0) -> House:
    return House(num_blocks=20, max_num_seqs=4, prefix_cache=False, slots=slots, block_seconds=block_seconds)


def test_what_was_computed_is_copied_and_not_computed_again() -> None:
    house = house_with_slots()
    house.submit(endless(40, 60), 60)
    sequence = running(house, 70)
    preempt(house, sequence)
    house.drain()
    out, back = counts(house)
    assert out == back >= 4
    assert house.model.num_tokens <= 40 + 60 + 16 + 2


def test_a_pool_that_is_too_small_swaps_by_itself() -> None:
    house = House(num_blocks=14, max_num_seqs=5, prefix_cache=False, slots=40)
    for seed in range(5):
        house.submit(endless(20 + seed, 60), 60)
    house.drain()
    assert house.scheduler.stats.preemptions > 0
    out, back = counts(house)
    assert out == back > 0


def test_nobody_else_is_preempted_while_blocks_are_on_their_way() -> None:
    house = House(num_blocks=14, max_num_seqs=5, prefix_cache=False, slots=40)
    for seed in range(5):
        house.submit(endless(20 + seed, 60), 60)
    swaps = house.scheduler.residency.swaps
    assert swaps is not None
    for _ in range(2000):
        if swaps.outgoing:
            break
        go_on(house, 1)
    assert house.scheduler.stats.preemptions == 1
    go_on(house, 60, copies=False)
    assert house.scheduler.stats.preemptions == 1
    house.drain()


def test_a_prefix_that_is_still_there_is_not_copied_back() -> None:
    house = House(num_blocks=20, max_num_seqs=4, slots=40)
    house.submit(endless(40, 60), 60)
    preempt(house, running(house, 70))
    house.drain()
    out, back = counts(house)
    assert out >= 4
    assert back == 0


def test_blocks_are_not_given_away_before_they_are_copied() -> None:
    house = house_with_slots()
    house.submit(endless(100, 30), 30)
    sequence = running(house, 110)
    stall(house, sequence)
    preempt(house, sequence, copies=False)
    assert sequence.saving
    saved = len(sequence.slots)
    assert house.pool.num_free == house.pool.num_usable - saved == 19 - saved
    go_on(house, 10, copies=False)
    assert house.pool.num_free == 19 - saved
    go_on(house, 8)
    assert house.pool.num_free == 19
    assert not sequence.saving
    house.scheduler.handle(Flow(sequence.request.admitted.rid, False))
    house.drain()
    assert counts(house) == (saved, saved)


def test_blocks_come_free_piece_by_piece_the_tail_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swaps, "PIECE", 2)
    house = house_with_slots()
    house.submit(endless(100, 30), 30)
    sequence = running(house, 110)
    stall(house, sequence)
    table = list(sequence.table)
    preempt(house, sequence, copies=False)
    assert len(sequence.slots) == 6
    for left in (4, 2, 0):
        for _ in range(20):
            if house.pool.num_free < 19 - left:
                go_on(house, 1)
        assert [block for block in table if house.pool.refcount(block)] == table[:left]
    house.scheduler.handle(Flow(sequence.request.admitted.rid, False))
    house.drain()
    assert counts(house) == (6, 6)


def test_preempted_twice() -> None:
    house = house_with_slots()
    house.submit(endless(40, 90), 90)
    for known in (60, 80, 100):
        preempt(house, running(house, known))
    house.drain()
    out, back = counts(house)
    assert out == back >= 3 + 4 + 6 - 3


def test_preempted_while_it_comes_back() -> None:
    house = house_with_slots()
    house.submit(endless(40, 60), 60)
    sequence = running(house, 70)
    preempt(house, sequence)
    for _ in range(20):
        go_on(house, 1, copies=not house.device.swaps or not sequence.row >= 0)
        if sequence.arriving:
            break
    assert sequence.arriving
    house.scheduler._preempt(sequence)
    go_on(house, 5, copies=False)
    assert sequence.row >= 0  # blocks that are being written are nobody else's
    house.drain()
    out, back = counts(house)
    assert out == back >= 8


@pytest.mark.parametrize("when", ["saving", "saved", "arriving"])
@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_ended_while_it_is_swapped(when: str, how: str) -> None:
    """`check` counts slots and blocks after every round; at the end all of them are free."""
    house = house_with_slots()
    rid = house.submit(endless(40, 60), 60, deadline=house.world.now() + 5.0 if how == "deadline" else None)
    sequence = running(house, 70)
    stall(house, sequence)
    preempt(house, sequence, copies=False)
    if when != "saving":
        go_on(house, 8)
        assert sequence.slots and not sequence.saving
    if when == "arriving":
        house.scheduler.handle(Flow(rid, False))
        go_on(house, 8, copies=False)
        assert sequence.arriving
    if how == "cancel":
        house.scheduler.handle(Cancel(rid))
    house.world.time += 6.0
    go_on(house, 2, copies=False)
    assert rid in house.ended
    assert not sequence.slots
    other = house.submit(prompts(50, 3), 20)
    house.drain()
    assert other in house.ended
    assert house.pool.num_free == house.pool.num_usable


@pytest.mark.parametrize("failing", [{0}, {1}, {0, 1, 2, 3, 4, 5}])
def test_a_swap_that_fails_is_computed_again(failing: set[int]) -> None:
    """Step 0 goes to the host, step 1 back."""
    house = house_with_slots()
    assert house.swap is not None
    house.swap.fail_at = failing
    house.submit(endless(40, 60), 60)
    preempt(house, running(house, 70))
    house.drain()
    assert counts(house) == ((0, 0) if 0 in failing else (4, 0))
    assert house.model.num_tokens >= 40 + 60 + 60


def test_as_many_blocks_as_there_are_slots_for() -> None:
    house = house_with_slots(slots=3)
    house.submit(endless(40, 60), 60)
    preempt(house, running(house, 70))
    house.drain()
    assert counts(house) == (3, 3)


@pytest.mark.parametrize(("block_seconds", "swapped"), [(0.0, True), (0.31, True), (0.33, False)])
def test_what_is_faster(block_seconds: float, swapped: bool) -> None:
    """A prompt token takes 20 ms, so a block of them 320."""
    house = house_with_slots(block_seconds=block_seconds)
    house.submit(endless(40, 60), 60)
    sequence = running(house, 70)
    house.scheduler._budget._rate = 50.0
    house.scheduler._preempt(sequence)
    house.drain()
    assert (counts(house)[0] > 0) is swapped


def test_before_a_prompt_was_measured_swapping_pays() -> None:
    house = house_with_slots(block_seconds=1e9)
    house.submit(endless(40, 60), 60)
    sequence = running(house, 70)
    assert house.scheduler._budget.seconds_per_token == float("inf")
    preempt(house, sequence)
    house.drain()
    assert counts(house) == (4, 4)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_random_orders(seed: int, prefix_cache: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The streams, the loop and the reports advance in a random order, with preemptions, stalls, cancels and failures
    in between; `House` compares every token."""
    draw = random.Random(seed)
    monkeypatch.setattr(swaps, "PIECE", 1 + seed % 3)
    house = House(num_blocks=16, max_num_seqs=5, prefix_cache=prefix_cache, slots=draw.choice((4, 60)))
    assert house.swap is not None
    house.swap.fail_at = {draw.randrange(40) for _ in range(4)}
    actions = [house.pump, house.work, house.work, house.copy, house.call, house.call]
    submitted = 0
    for turn in range(3000):
        draw.choice(actions)()
        if turn % 5 == 0:
            house.scheduler.check()
        chance = draw.random()
        holders = house.scheduler.residency.holders()
        if chance < 0.02 and submitted < 40:
            submitted += 1
            house.submit(
                prompts(draw.randrange(1, 70), draw.randrange(3)), draw.randrange(1, 60), n=draw.choice((1, 1, 2))
            )
        elif chance < 0.03 and holders:
            house.scheduler._preempt(draw.choice(holders))
        elif chance < 0.033 and house.open:
            house.scheduler.handle(Cancel(draw.choice(sorted(house.open))))
        elif chance < 0.05 and house.open:
            house.scheduler.handle(Flow(draw.choice(sorted(house.open)), draw.random() < 0.3))
    for rid in list(house.open):
        house.scheduler.handle(Flow(rid, False))
    house.drain()
    assert counts(house)[0] > 0


def test_slots() -> None:
    slots = HostSlots(3, 0.0)
    first = slots.take(2)
    assert slots.num_free == 1
    slots.check([first])
    with pytest.raises(AssertionError):
        slots.check([])
    slots.give_back(first)
    slots.check([])
