"""Starting on a GPU: what runs on the lanes' threads before the first request."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from millrace.runtime.cuda.decode import CudaDecode
from millrace.runtime.cuda.device import CudaDevice
from millrace.runtime.lanes import Lanes
from millrace.runtime.world import World

T = TypeVar("T")


async def on_lane(world: World, device: CudaDevice, name: str, priority: int, work: Callable[[], T]) -> T:
    """Runs work on a lane's thread, and returns its result once the device has done what it enqueued."""
    stream = device.stream(name, priority)
    done = asyncio.Event()
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    device.launch(stream, run)
    device.notify(stream, done.set)
    await done.wait()
    if errors:
        raise errors[0]
    device.check()
    return results[0]


async def warm_up(
    world: World, device: CudaDevice, lanes: Lanes, progress: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Captures the graphs of the decode lane."""
    decode = lanes.decode
    assert isinstance(decode, CudaDecode)
    await on_lane(world, device, "decode", 0, lambda: decode.warm_up(progress))
