"""Channels: order, bounds, closing, cancellation; each promise of the docstrings."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.runtime.channel import ChannelClosed, ChannelFull, Receiver, Sender, channel
from millrace.runtime.world import AsyncioWorld


def make(capacity: int = 4, reserve: int = 0) -> tuple[Sender[int], Receiver[int]]:
    ends: tuple[Sender[int], Receiver[int]] = channel("numbers", capacity, AsyncioWorld(), reserve=reserve)
    return ends


async def test_takes_all_that_waits_in_order() -> None:
    sender, receiver = make()
    for number in range(3):
        sender.send_nowait(number)
    assert await receiver.recv_batch() == [0, 1, 2]


async def test_bounds() -> None:
    sender, _ = make(capacity=2, reserve=1)
    for number in range(3):
        sender.send_nowait(number)
    with pytest.raises(ChannelFull, match="numbers holds 3 items"):
        sender.send_nowait(3)


async def test_send_waits_for_room_below_the_reserve() -> None:
    sender, receiver = make(capacity=1, reserve=5)
    await sender.send(0)
    waiting = asyncio.ensure_future(sender.send(1))
    await asyncio.sleep(0)
    assert not waiting.done()
    assert await receiver.recv_batch() == [0]
    await waiting
    assert await receiver.recv_batch() == [1]


async def test_closing_every_sender_ends_the_stream_after_its_items() -> None:
    sender, receiver = make()
    other = sender.clone()
    sender.send_nowait(1)
    sender.close()
    sender.close()
    other.send_nowait(2)
    other.close()
    assert await receiver.recv_batch() == [1, 2]
    with pytest.raises(ChannelClosed):
        await receiver.recv_batch()
    with pytest.raises(ChannelClosed):
        other.send_nowait(3)


async def test_closing_wakes_a_receiver_that_waits() -> None:
    sender, receiver = make()
    waiting = asyncio.ensure_future(receiver.recv_batch())
    await asyncio.sleep(0)
    sender.close()
    with pytest.raises(ChannelClosed):
        await waiting


async def test_closing_the_receiver_wakes_senders() -> None:
    sender, receiver = make(capacity=1)
    sender.send_nowait(0)
    waiting = asyncio.ensure_future(sender.send(1))
    await asyncio.sleep(0)
    receiver.close()
    with pytest.raises(ChannelClosed):
        await waiting


async def test_until() -> None:
    world = AsyncioWorld()
    ends: tuple[Sender[int], Receiver[int]] = channel("numbers", 1, world)
    sender, receiver = ends
    assert await receiver.recv_batch(until=world.now() - 1) == []
    assert await receiver.recv_batch(until=world.now() + 0.001) == []
    sender.send_nowait(1)
    assert await receiver.recv_batch(until=world.now() - 1) == [1]


async def test_a_cancelled_receive_loses_nothing() -> None:
    sender, receiver = make()
    waiting = asyncio.ensure_future(receiver.recv_batch())
    await asyncio.sleep(0)
    sender.send_nowait(1)
    waiting.cancel()  # in the same tick as the item
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await receiver.recv_batch() == [1]


async def test_a_cancelled_send_passes_its_place_on() -> None:
    sender, receiver = make(capacity=1)
    sender.send_nowait(0)
    first, second = asyncio.ensure_future(sender.send(1)), asyncio.ensure_future(sender.send(2))
    await asyncio.sleep(0)
    assert receiver.take() == [0]
    first.cancel()
    await second
    with pytest.raises(asyncio.CancelledError):
        await first
    assert receiver.take() == [2]


async def test_one_receiver_at_a_time() -> None:
    _, receiver = make()
    waiting = asyncio.ensure_future(receiver.recv_batch())
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="two tasks"):
        await receiver.recv_batch()
    waiting.cancel()


async def test_statistics() -> None:
    sender, receiver = make(capacity=3, reserve=1)
    sender.send_nowait(1)
    sender.send_nowait(2)
    receiver.take()
    stats = sender.statistics()
    assert (stats.depth, stats.sent, stats.most, stats.capacity, stats.reserve) == (0, 2, 2, 3, 1)


@given(capacity=st.integers(1, 4), counts=st.lists(st.integers(0, 12), min_size=1, max_size=4), data=st.data())
@settings(max_examples=60, deadline=None)
def test_every_item_arrives_once_and_in_its_senders_order(
    capacity: int, counts: list[int], data: st.DataObject
) -> None:
    """Several waiting senders, cancels at random, one receiver: nothing lost, doubled or out of order."""
    cancelled = data.draw(st.sets(st.integers(0, len(counts) - 1)))

    async def run() -> None:
        ends: tuple[Sender[tuple[int, int]], Receiver[tuple[int, int]]] = channel("pairs", capacity, AsyncioWorld())
        sender, receiver = ends
        sent: list[list[int]] = [[] for _ in counts]

        async def produce(who: int, end: Sender[tuple[int, int]]) -> None:
            try:
                for number in range(counts[who]):
                    await end.send((who, number))
                    sent[who].append(number)
            finally:
                end.close()

        tasks = [asyncio.ensure_future(produce(who, sender.clone())) for who in range(len(counts))]
        sender.close()
        got: list[list[int]] = [[] for _ in counts]
        await asyncio.sleep(0)
        for who in cancelled:
            tasks[who].cancel()
        try:
            while True:
                for who, number in await receiver.recv_batch():
                    got[who].append(number)
        except ChannelClosed:
            pass
        await asyncio.gather(*tasks, return_exceptions=True)
        assert got == sent

    asyncio.run(run())
