"""Pacing: who is served at once, who waits, and that nothing waits for ever."""

import asyncio
from types import SimpleNamespace
from typing import Any

from millrace.server.pacing import Pacer


def handle() -> Any:
    return SimpleNamespace(done=False)


async def test_a_silent_stream_writes_at_once_and_a_fast_one_waits_for_the_turn() -> None:
    writes: list[str] = []
    pacer = Pacer(0.02)
    ready = pacer.pace(handle(), lambda: writes.append("a"))
    ready()
    assert writes == ["a"]
    ready()
    ready()
    assert writes == ["a"]  # within the interval
    async with asyncio.timeout(5):
        while len(writes) < 2:
            await asyncio.sleep(0.001)
    assert writes == ["a", "a"]  # both tokens in one write


async def test_the_end_is_never_delayed() -> None:
    writes: list[str] = []
    own = handle()
    ready = Pacer(100.0).pace(own, lambda: writes.append("a"))
    ready()
    ready()
    own.done = True
    ready()
    assert writes == ["a", "a"]


async def test_one_turn_serves_all_who_wait() -> None:
    writes: list[str] = []
    pacer = Pacer(0.01)
    streams = [pacer.pace(handle(), lambda name=name: writes.append(name)) for name in "abc"]
    for _ in range(2):
        for ready in streams:
            ready()
    assert writes == ["a", "b", "c"]
    async with asyncio.timeout(5):
        while len(writes) < 6:
            await asyncio.sleep(0.001)
    assert writes == ["a", "b", "c"] * 2


async def test_without_an_interval_every_step_writes() -> None:
    writes: list[str] = []
    ready = Pacer(0.0).pace(handle(), lambda: writes.append("a"))
    ready()
    ready()
    assert writes == ["a", "a"]
