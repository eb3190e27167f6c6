"""The CUDA device: two threads for each stream, words in order, and what a failure of the device does."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from cuda_fakes import FakeDriver, lanes_alive

from millrace.runtime.cuda.device import CudaDevice
from millrace.runtime.cuda.start import on_lane
from millrace.runtime.device import DeviceLostError
from millrace.runtime.world import AsyncioWorld


@asynccontextmanager
async def opened(driver: FakeDriver) -> AsyncIterator[tuple[AsyncioWorld, CudaDevice]]:
    world = AsyncioWorld()
    device = CudaDevice(world, driver)
    try:
        yield world, device
    finally:
        device.close()
        await world.close()


async def test_work_runs_in_order_and_words_come_behind_it() -> None:
    driver, seen = FakeDriver("random"), []
    done = asyncio.Event()
    async with opened(driver) as (_, device):
        stream = device.stream("decode", 0)
        assert device.stream("decode", 0) == stream
        for number in range(20):
            device.launch(stream, lambda number=number: driver.enqueue(lambda: seen.append(number)))
            device.notify(stream, lambda number=number: seen.append(-number))
        device.notify(stream, done.set)
        await done.wait()
    work, words = [n for n in seen if n > 0], [-n for n in seen if n < 0]
    assert work == words == list(range(1, 20))
    assert all(seen.index(n) < seen.index(-n) for n in work)
    assert lanes_alive() == []


async def test_a_word_of_one_stream_does_not_wait_for_the_other() -> None:
    """A long prefill, launched first and not done, holds no decode step back."""
    driver, gate = FakeDriver("lazy"), threading.Event()
    word = asyncio.Event()
    async with opened(driver) as (_, device):
        prefill, decode = device.stream("prefill", 1), device.stream("decode", 0)
        entered = asyncio.Event()
        loop = asyncio.get_running_loop()
        driver.hold(gate, lambda: loop.call_soon_threadsafe(entered.set))  # of the first event that is waited for
        device.notify(prefill, lambda: None)
        await entered.wait()
        device.notify(decode, word.set)
        await word.wait()
        gate.set()


async def test_a_lost_device_is_told_once_and_everybody_hears() -> None:
    driver = FakeDriver()
    async with opened(driver) as (world, device):
        stream = device.stream("decode", 0)
        device.check()
        driver.failure = RuntimeError("CUDA error: unspecified launch failure")
        words = [asyncio.Event() for _ in range(3)]
        for word in words:
            device.notify(stream, word.set)
        for word in words:
            await word.wait()
        with pytest.raises(DeviceLostError, match="unspecified launch failure"):
            device.check()
        with pytest.raises(DeviceLostError):
            await on_lane(world, device, "decode", 0, lambda: 1)


async def test_a_lane_that_cannot_enter_its_device_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    driver, ran = FakeDriver(), []

    def refuse(_: object) -> None:
        raise RuntimeError("CUDA error: invalid device ordinal")

    monkeypatch.setattr(driver, "use", refuse)
    async with opened(driver) as (world, device):
        with pytest.raises(DeviceLostError, match="invalid device ordinal"):
            await on_lane(world, device, "decode", 0, lambda: ran.append(1))
    assert ran == []


async def test_on_lane_brings_results_and_errors() -> None:
    async with opened(FakeDriver("at once")) as (world, device):
        assert await on_lane(world, device, "decode", 0, threading.current_thread) is not threading.main_thread()
        with pytest.raises(ZeroDivisionError):
            await on_lane(world, device, "decode", 0, lambda: 1 // 0)


async def test_close_is_idempotent_and_waits_for_what_is_launched() -> None:
    driver, seen = FakeDriver("random"), []
    async with opened(driver) as (_, device):
        stream = device.stream("decode", 0)
        device.launch(stream, lambda: seen.append(1))
        device.close()
        assert seen == [1]
        device.close()
        assert lanes_alive() == []
