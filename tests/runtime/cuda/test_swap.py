"""Swap on a GPU that is none: bytes through the real kernels, tokens under every order of the streams, the start."""

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cuda_fakes import POLICIES, CountingLauncher, FakeDriver, PaddedLedger, gpu, lanes_alive
from fakes import engine, expected, greedy, submit

from millrace.runtime import Runtime
from millrace.runtime.config import load_config
from millrace.runtime.cuda import swap as cuda_swap
from millrace.runtime.cuda.device import CudaDevice
from millrace.runtime.cuda.swap import CudaSwap
from millrace.runtime.device import Stream
from millrace.runtime.errors import ConfigError
from millrace.runtime.gpu import Gpu, start_gpu
from millrace.runtime.messages import SwapPlan
from millrace.runtime.world import AsyncioWorld
from shim.launcher import ShimLauncher


def prompt(length: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(1, 211) for _ in range(length)]


class Storage:
    """As much of a model as a swap looks at."""

    def __init__(self, dtype: torch.dtype, num_blocks: int = 9) -> None:
        values = torch.randint(-100, 100, (3, 2, num_blocks, 2, 16, 64), generator=torch.Generator().manual_seed(1))
        scales = torch.arange(3 * 2 * num_blocks * 2 * 16, dtype=torch.float32).view(values.shape[:-1])
        self.pool, self.scales = values.to(dtype), scales if dtype.itemsize == 1 else None

    def block_storage(self, kv: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.pool, self.scales


@pytest.mark.parametrize("policy", ["random", "at once"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("staged", [2, 32])
def test_blocks_come_back_as_they_were(
    shim: ShimLauncher, monkeypatch: pytest.MonkeyPatch, policy: str, dtype: torch.dtype, staged: int
) -> None:
    """Into other blocks, with the host's memory in several pieces, and with more blocks than are staged at a time."""
    monkeypatch.setattr(cuda_swap, "STAGED_BLOCKS", staged)
    monkeypatch.setattr(cuda_swap, "SLAB_BYTES", 30_000)
    driver, model = FakeDriver(policy), Storage(dtype)
    before = [part.clone() for part in model.block_storage(None) if part is not None]
    as_model: Any = model
    swap = CudaSwap(driver, CountingLauncher(shim, driver), as_model, None, 7)
    driver.use(driver.stream(1))
    swap.run(SwapPlan(0, True, [4, 1, 7, 2, 5], [6, 0, 3, 1, 2]))
    swap.run(SwapPlan(1, False, [3, 8, 6], [3, 6, 2]))
    driver.drain()
    for part, was in zip((model.pool, model.scales), before, strict=False):
        assert part is not None
        want = was.clone()
        want[:, :, [3, 8, 6]] = was[:, :, [7, 4, 5]]
        assert torch.equal(part.view(torch.uint8), want.view(torch.uint8))
    assert swap.rehearse() == min(staged, 7)


async def traffic(driver: FakeDriver, shim: ShimLauncher, *, slots: int = 60, **options: Any) -> tuple[bool, int, int]:
    """Sequences that together want far more than the pool has, without a prefix cache: whether all tokens are right,
    and blocks that went out and came back."""
    make = gpu(driver, CountingLauncher(shim, driver), swap_slots=slots)
    given = {"num_blocks": 17, "scheduler__max_num_seqs": 6, "scheduler__max_prefill_tokens": 32} | options
    async with engine(model=PaddedLedger(), gpu=make, kv__prefix_cache=False, **given) as made:
        handles = [submit(made, prompt(20 + 3 * i, i), greedy(60, ignore_eos=True)) for i in range(7)]
        completions = await asyncio.gather(*handles)
        swaps = made.scheduler.residency.swaps
        assert swaps is not None
    right = all(
        list(completion.token_ids) == expected(prompt(20 + 3 * i, i), 60, ignore_eos=True)
        for i, completion in enumerate(completions)
    )
    return right, swaps.num_out, swaps.num_in


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("overlap", [True, False])
async def test_tokens_are_right_under_every_order(shim: ShimLauncher, policy: str, overlap: bool) -> None:
    right, out, back = await traffic(FakeDriver(policy), shim, scheduler__overlap=overlap)
    assert right
    assert out == back > 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
async def test_few_slots_and_random_orders(shim: ShimLauncher, seed: int) -> None:
    right, out, back = await traffic(FakeDriver("random", seed), shim, slots=4)
    assert right
    assert out == back > 0


async def test_reports_before_the_copies_give_a_wrong_token(
    shim: ShimLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That swaps report when the device has done them is all that orders them against the other streams."""
    notify = CudaDevice.notify

    def early(self: CudaDevice, stream: Stream, callback: Callable[[], None]) -> None:
        if stream.name == "swap":
            self._world.call_soon_threadsafe(callback)
        else:
            notify(self, stream, callback)

    monkeypatch.setattr(CudaDevice, "notify", early)
    right, out, _ = await traffic(FakeDriver("lazy"), shim)
    assert out > 0
    assert not right


async def test_a_swap_that_fails_is_computed_again(shim: ShimLauncher, monkeypatch: pytest.MonkeyPatch) -> None:
    run, calls = CudaSwap.run, 0

    def failing(self: CudaSwap, plan: SwapPlan) -> None:
        nonlocal calls
        calls += 1
        if calls % 3:
            raise RuntimeError("planted")
        run(self, plan)

    monkeypatch.setattr(CudaSwap, "run", failing)
    right, _, _ = await traffic(FakeDriver("random"), shim)
    assert right
    assert calls > 0  # the first of which fails; how many there are depends on the order that the driver draws


async def test_cancels_while_sequences_are_swapped(shim: ShimLauncher) -> None:
    """`engine` checks that nothing is left when it is left."""
    driver = FakeDriver("random", seed=5)
    make = gpu(driver, CountingLauncher(shim, driver), swap_slots=30)
    async with engine(model=PaddedLedger(), num_blocks=17, gpu=make, kv__prefix_cache=False) as made:

        async def one(i: int) -> None:
            handle = submit(made, prompt(20 + i, i), greedy(60, ignore_eos=True))
            if i % 2:
                assert list((await handle).token_ids) == expected(prompt(20 + i, i), 60, ignore_eos=True)
                return
            read = 0
            async for delta in handle:
                read += len(delta.token_ids)
                if read > 10 * i:
                    break
            handle.cancel()

        await asyncio.gather(*[one(i) for i in range(8)])
        swaps, registry = made.scheduler.residency.swaps, made._metrics._registry
        assert swaps is not None
        assert registry.get_sample_value("millrace_kv_blocks_swapped_out_total") == swaps.num_out > 0
        assert registry.get_sample_value("millrace_kv_blocks_swapped_in_total") == swaps.num_in


async def test_the_start_measures_a_swap(shim: ShimLauncher) -> None:
    model: Any = PaddedLedger(max_model_len=256)
    driver, world = FakeDriver("random"), AsyncioWorld()
    config = load_config(None, {"scheduler.max_num_seqs": 2, "kv.swap_memory_mb": 1})
    started = await start_gpu(world, Gpu(driver, CountingLauncher(shim, driver)), config, model)
    try:
        swap = started.lanes.swap
        assert swap is not None
        assert swap.num_slots == started.plan.swap_slots == (1 << 20) // 256
        assert 0 < swap.block_seconds < 60
        assert "blocks of preempted sequences fit into 1 MiB of the host" in started.plan.table()
    finally:
        started.device.close()
        await world.close()
    assert lanes_alive() == []


async def test_a_swap_memory_that_holds_nothing_or_too_much(shim: ShimLauncher) -> None:
    model: Any = PaddedLedger(max_model_len=256)
    driver, world = FakeDriver("random"), AsyncioWorld()
    made = Gpu(driver, CountingLauncher(shim, driver))
    config = load_config(None, {"scheduler.max_num_seqs": 2, "kv.swap_memory_mb": 1 << 40})
    with pytest.raises(ConfigError, match=r"kv\.swap_memory_mb is 1099511627776; a block takes 256 B, and the machine"):
        await start_gpu(world, made, config, model)
    await world.close()
    assert lanes_alive() == []


async def test_there_is_no_swap_on_a_cpu() -> None:
    with pytest.raises(ConfigError, match=r"kv\.swap_memory_mb is 64, but the model runs on the CPU"):
        await Runtime(kv__swap_memory_mb=64, device__kind="cpu").start()
