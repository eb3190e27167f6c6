"""Typed channels between actors: two ends, a bound, defined closing, and statistics.

The shape is trio's: the call that does not wait holds the logic, closing every sender *is* end-of-stream, and the
receiver takes all that is there. One channel has one receiver and any number of senders (`Sender.clone`).

A channel has two bounds. `send` waits at `capacity`. `send_nowait` may go on to `capacity + reserve`: return edges,
whose number of items in flight is bounded by credits, use it and therefore never wait, which is why the cycles
between actors cannot deadlock on full channels.
"""

import asyncio
from collections import deque
from typing import Generic, TypeVar

import msgspec

from millrace.runtime.world import World

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
T_contra = TypeVar("T_contra", contravariant=True)


class ChannelFull(Exception):
    """`send_nowait` found capacity and reserve used up."""


class ChannelClosed(Exception):
    """The other end is closed: for a receiver, after every item has been received."""


class ChannelStatistics(msgspec.Struct, frozen=True):
    name: str
    depth: int
    capacity: int
    reserve: int
    sent: int
    most: int  # the deepest it has been
    open_senders: int


class _State(Generic[T]):
    def __init__(self, name: str, capacity: int, reserve: int, world: World) -> None:
        self.name = name
        self.capacity = capacity
        self.reserve = reserve
        self.world = world
        self.items: deque[T] = deque()
        self.receiver_open = True
        self.open_senders = 0
        self.sent = 0
        self.most = 0
        self.receive_waiter: asyncio.Future[None] | None = None
        self.send_waiters: deque[asyncio.Future[None]] = deque()

    def wake_receiver(self) -> None:
        waiter = self.receive_waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def wake_senders(self, places: int) -> None:
        while self.send_waiters and places > 0:
            waiter = self.send_waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                places -= 1


class Sender(Generic[T_contra]):
    def __init__(self, state: _State[T_contra]) -> None:
        self._state = state
        self._open = True
        state.open_senders += 1

    def send_nowait(self, item: T_contra) -> None:
        """Never waits; raises ChannelFull beyond capacity + reserve, ChannelClosed when nobody receives."""
        state = self._state
        if not self._open or not state.receiver_open:
            raise ChannelClosed(state.name)
        depth = len(state.items)
        if depth >= state.capacity + state.reserve:
            raise ChannelFull(f"{state.name} holds {depth} items, its bound")
        state.items.append(item)
        state.sent += 1
        if depth >= state.most:
            state.most = depth + 1
        state.wake_receiver()

    async def send(self, item: T_contra) -> None:
        """Waits while the channel holds `capacity` items. A cancelled send has not sent."""
        state = self._state
        while state.receiver_open and self._open and len(state.items) >= state.capacity:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            state.send_waiters.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                if waiter.done() and not waiter.cancelled():
                    state.wake_senders(1)  # the place given to us goes to the next in line
                raise
        self.send_nowait(item)

    def clone(self) -> "Sender[T_contra]":
        return Sender(self._state)

    def close(self) -> None:
        """Idempotent. When the last sender closes, the receiver drains what is there and then sees ChannelClosed."""
        if self._open:
            self._open = False
            self._state.open_senders -= 1
            if self._state.open_senders == 0:
                self._state.wake_receiver()

    def statistics(self) -> ChannelStatistics:
        state = self._state
        return ChannelStatistics(
            name=state.name,
            depth=len(state.items),
            capacity=state.capacity,
            reserve=state.reserve,
            sent=state.sent,
            most=state.most,
            open_senders=state.open_senders,
        )


class Receiver(Generic[T_co]):
    def __init__(self, state: _State[T_co]) -> None:
        self._state = state

    def take(self) -> list[T_co]:
        """All items that wait, perhaps none."""
        state = self._state
        items = list(state.items)
        state.items.clear()
        state.wake_senders(state.capacity)
        return items

    async def recv_batch(self, until: float | None = None) -> list[T_co]:
        """All items that wait, suspending only while there is none.

        Returns an empty list once `world.now()` reaches `until`. Raises ChannelClosed after the last item of a
        channel whose senders are all closed. Being cancelled loses no item.
        """
        state = self._state
        while not state.items:
            if state.open_senders == 0 or not state.receiver_open:
                raise ChannelClosed(state.name)
            if state.receive_waiter is not None:
                raise RuntimeError(f"two tasks receive from {state.name}")
            waiter = state.receive_waiter = asyncio.get_running_loop().create_future()
            timer = None
            if until is not None:
                if state.world.now() >= until:
                    state.receive_waiter = None
                    return []
                timer = state.world.call_at(until, state.wake_receiver)
            try:
                await waiter
            finally:
                state.receive_waiter = None
                if timer is not None:
                    timer.cancel()
        return self.take()

    def close(self) -> None:
        """Idempotent. Senders that wait, and later sends, see ChannelClosed; items that wait are dropped."""
        state = self._state
        state.receiver_open = False
        state.items.clear()
        state.wake_senders(len(state.send_waiters))
        state.wake_receiver()


def channel(name: str, capacity: int, world: World, *, reserve: int = 0) -> tuple[Sender[T], Receiver[T]]:
    """Makes a channel of at least one place; both bounds are counted in items."""
    if capacity < 1 or reserve < 0:
        raise ValueError(f"channel {name}: capacity {capacity} must be at least 1, reserve {reserve} at least 0")
    state: _State[T] = _State(name, capacity, reserve, world)
    return Sender(state), Receiver(state)
