"""The engine on a GPU that is none: every token is checked while streams run in any order that their events allow."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from cuda_fakes import POLICIES, CountingLauncher, FakeDriver, PaddedLedger, gpu
from fakes import engine, expected, greedy, submit

from millrace.runtime.errors import RequestFailedError, RuntimeClosedError
from millrace.runtime.types import SamplingParams
from shim.launcher import ShimLauncher


def prompt(length: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(1, 211) for _ in range(length)]


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("overlap", [True, False])
async def test_a_batch_under_every_order(shim: ShimLauncher, policy: str, overlap: bool) -> None:
    driver = FakeDriver(policy)
    launcher = CountingLauncher(shim, driver)
    lengths = [(7 * i) % 90 + 1 for i in range(10)]
    options = {"scheduler__overlap": overlap, "scheduler__max_num_seqs": 6, "scheduler__max_prefill_tokens": 48}
    async with engine(model=PaddedLedger(), num_blocks=200, gpu=gpu(driver, launcher), **options) as made:
        handles = [submit(made, prompt(n, i), greedy(3 + i % 20, ignore_eos=i % 2 == 0)) for i, n in enumerate(lengths)]
        completions = await asyncio.gather(*handles)
    for i, (length, completion) in enumerate(zip(lengths, completions, strict=True)):
        assert list(completion.token_ids) == expected(prompt(length, i), 3 + i % 20, ignore_eos=i % 2 == 0)
    assert driver.replays > 0


@asynccontextmanager
async def ledger(
    shim: ShimLauncher, policy: str = "random", *, graphs: bool = True, **options: Any
) -> AsyncIterator[Any]:
    """An engine around the ledger model on the fake GPU; yields (engine, model, driver)."""
    driver = FakeDriver(policy, seed=options.pop("seed", 0))
    model = options.pop("model", None) or PaddedLedger()
    make = gpu(driver, CountingLauncher(shim, driver), use_graphs=graphs)
    options = {"scheduler__max_num_seqs": 8, "num_blocks": 65} | options
    async with engine(model=model, gpu=make, **options) as made:
        yield made, model, driver


@pytest.mark.parametrize("policy", POLICIES)
async def test_preemption_and_copies(shim: ShimLauncher, policy: str) -> None:
    """Sequences that together want more than the pool has, and choices that share a prompt and copy its last block."""
    async with ledger(shim, policy, num_blocks=17, scheduler__max_prefill_tokens=32) as (made, _, _):
        single = [submit(made, prompt(10 + i, i), greedy(60, ignore_eos=True)) for i in range(6)]
        forked = [submit(made, prompt(15 + i, i), greedy(12, n=3, ignore_eos=True)) for i in range(3)]
        completions = await asyncio.gather(*single)
        choices = await asyncio.gather(*forked)
        assert made.scheduler.stats.preemptions > 0
    for i, completion in enumerate(completions):
        assert list(completion.token_ids) == expected(prompt(10 + i, i), 60, ignore_eos=True)
    for i, completion in enumerate(choices):
        for choice in completion.choices:
            assert list(choice.token_ids) == expected(prompt(15 + i, i), 12, ignore_eos=True)


async def test_without_graphs(shim: ShimLauncher) -> None:
    async with ledger(shim, graphs=False) as (made, _, driver):
        completions = await asyncio.gather(*[submit(made, prompt(9, i), greedy(20, ignore_eos=True)) for i in range(5)])
    assert driver.replays == 0
    for i, completion in enumerate(completions):
        assert list(completion.token_ids) == expected(prompt(9, i), 20, ignore_eos=True)


async def test_prefix_hits_on_what_the_other_stream_wrote(shim: ShimLauncher) -> None:
    async with ledger(shim, "others-first") as (made, _, _):
        first = await submit(made, prompt(20), greedy(60, ignore_eos=True))
        history = [*prompt(20), *first.token_ids]
        second = await submit(made, history, greedy(5))
    assert second.usage.cached_tokens == 64
    assert list(second.token_ids) == expected(history, 5)


async def test_sampling_parameters_mean_what_they_mean_on_the_cpu(shim: ShimLauncher) -> None:
    """Penalties, biases, bans, stop ids, filters, log probabilities: the same tokens and numbers from both samplers."""
    every = [
        greedy(12, ignore_eos=True, repetition_penalty=1.4, logprobs=3),
        greedy(12, ignore_eos=True, frequency_penalty=1.5, presence_penalty=0.5),
        greedy(12, ignore_eos=True, logit_bias={7: 60.0, 8: 59.0}, banned_token_ids=(7,)),
        greedy(12, ignore_eos=True, allowed_token_ids=(3, 5, 8), logprobs=0),
        greedy(20, stop_token_ids=(5, 9), allowed_token_ids=(5, 9, 11), min_tokens=4),
        SamplingParams(temperature=30.0, top_k=20, max_tokens=12, seed=5, ignore_eos=True),
        SamplingParams(temperature=30.0, top_k=40, top_p=0.7, max_tokens=12, seed=6, ignore_eos=True, logprobs=5),
    ]

    async def run(made: Any) -> list[Any]:
        return await asyncio.gather(*[submit(made, prompt(11, i), params) for i, params in enumerate(every)])

    async with ledger(shim) as (made, _, _):
        got = await run(made)
    async with engine(num_blocks=65) as made:
        want = await run(made)
    for here, there in zip(got, want, strict=True):
        assert here.token_ids == there.token_ids
        assert here.finish_reason == there.finish_reason
        a, b = here.choices[0].logprobs, there.choices[0].logprobs
        assert (a is None) == (b is None)
        for one, two in zip(a or (), b or (), strict=True):
            assert one.logprob == pytest.approx(two.logprob, abs=1e-3)
            assert [entry.token_id for entry in one.top] == [entry.token_id for entry in two.top]


async def test_prompt_log_probabilities(shim: ShimLauncher) -> None:
    sampling = greedy(3, ignore_eos=True, prompt_logprobs=2)
    async with ledger(shim, scheduler__max_prefill_tokens=32) as (made, _, _):
        got = (await submit(made, prompt(70), sampling)).prompt_logprobs
    async with engine(scheduler__max_prefill_tokens=32) as made:
        want = (await submit(made, prompt(70), sampling)).prompt_logprobs
    assert got is not None
    assert want is not None
    assert [entry.token_id for entry in got] == prompt(70)
    for one, two in zip(got[1:], want[1:], strict=True):
        assert one.logprob == pytest.approx(two.logprob, abs=1e-3)
        assert [entry.token_id for entry in one.top] == [entry.token_id for entry in two.top]


async def test_a_step_that_does_not_fit_is_computed_in_parts(shim: ShimLauncher) -> None:
    model = PaddedLedger(limit=20)
    async with ledger(shim, "at once", model=model, scheduler__max_prefill_tokens=200) as (made, _, driver):
        lengths = (70, 5, 33, 64)
        completions = await asyncio.gather(
            *[submit(made, prompt(n, n), greedy(6, ignore_eos=True)) for n in lengths[:-1]],
            submit(made, prompt(64, 64), greedy(6, ignore_eos=True, prompt_logprobs=0)),
        )
    assert model.refused > 0
    assert driver.released == model.refused
    for n, completion in zip(lengths, completions, strict=True):
        assert list(completion.token_ids) == expected(prompt(n, n), 6, ignore_eos=True)


async def test_only_the_request_that_cannot_fit_fails(shim: ShimLauncher) -> None:
    """Nothing that was computed for it may be found by those that come later."""
    model = PaddedLedger()
    async with ledger(shim, "at once", model=model, scheduler__max_prefill_tokens=200) as (made, _, _):
        model.too_long = 40  # tokens of context: no chunk of such a sequence fits
        handles = [submit(made, prompt(n, n), greedy(6, ignore_eos=True)) for n in (9, 60, 20)]
        results = await asyncio.gather(*handles, return_exceptions=True)
        assert isinstance(results[1], RequestFailedError)
        assert "out of GPU memory" in str(results[1])
        for n, completion in ((9, results[0]), (20, results[2])):
            assert list(completion.token_ids) == expected(prompt(n, n), 6, ignore_eos=True)
        model.too_long = 1 << 30
        later = await submit(made, prompt(60, 60), greedy(6, ignore_eos=True))
        assert list(later.token_ids) == expected(prompt(60, 60), 6, ignore_eos=True)


async def test_decode_in_halves_where_there_are_no_graphs(shim: ShimLauncher) -> None:
    model = PaddedLedger()
    async with ledger(shim, "at once", model=model, graphs=False) as (made, _, _):
        handles = [submit(made, prompt(9, i), greedy(20, ignore_eos=True)) for i in range(7)]
        model.limit = 9
        model.decode_limit = 2
        completions = await asyncio.gather(*handles)
    assert model.refused > 0
    for i, completion in enumerate(completions):
        assert list(completion.token_ids) == expected(prompt(9, i), 20, ignore_eos=True)


async def test_a_lost_device_ends_everything_with_its_name(shim: ShimLauncher) -> None:
    async with ledger(shim) as (made, _, driver):
        deltas = aiter(submit(made, prompt(9), greedy(400, ignore_eos=True)))
        await anext(deltas)
        driver.failure = RuntimeError("CUDA error: an illegal memory access was encountered")
        with pytest.raises(RuntimeClosedError, match="DeviceLostError"):
            await exhaust(deltas)
        assert made.state == "failed"


async def exhaust(deltas: AsyncIterator[Any]) -> None:
    async for _ in deltas:
        pass


@pytest.mark.parametrize("seed", range(3))
async def test_random_traffic(shim: ShimLauncher, seed: int) -> None:
    """Cancels, priorities, stops and preemptions over random orders of the streams."""
    draw = random.Random(seed)
    async with ledger(shim, seed=seed, num_blocks=33, scheduler__max_prefill_tokens=48) as (made, _, _):

        async def one(i: int) -> None:
            for _ in range(draw.randrange(20)):
                await asyncio.sleep(0)
            length, count = draw.randrange(1, 90), draw.randrange(1, 50)
            handle = submit(
                made, prompt(length, i), greedy(count, n=draw.choice((1, 1, 2))), priority=draw.randrange(4)
            )
            if draw.random() < 0.3:
                async for _ in handle:
                    break
                handle.cancel()
                return
            for choice in (await handle).choices:
                assert list(choice.token_ids) == expected(prompt(length, i), count)

        await asyncio.gather(*[one(i) for i in range(14)])
