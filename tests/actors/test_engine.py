"""The six actors together, around the ledger model: every output token is checked against the prompt alone."""

import asyncio
import random

import pytest
from fakes import EOS, LedgerModel, engine, expected, greedy, settle, submit

from millrace.runtime.errors import (
    ContextLengthError,
    DeadlineExceededError,
    InvalidRequestError,
    QueueFullError,
    RequestCancelledError,
    RequestFailedError,
    RuntimeClosedError,
)
from millrace.runtime.types import Delta, FinishReason, SamplingParams


def prompt(length: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(1, 211) for _ in range(length)]


async def test_one_request() -> None:
    async with engine() as made:
        completion = await submit(made, prompt(5), greedy(20, ignore_eos=True))
        assert list(completion.token_ids) == expected(prompt(5), 20, ignore_eos=True)
        assert completion.text == "".join(f"<{token}>" for token in completion.token_ids if token != EOS)
        assert completion.finish_reason is FinishReason.LENGTH
        assert completion.usage.prompt_tokens == 5
        assert completion.usage.completion_tokens == 20


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("batch", [1, 8, 64])
@pytest.mark.parametrize("null_device", [True, False])
async def test_batches_with_overlap_and_without(overlap: bool, batch: int, null_device: bool) -> None:
    lengths = [(7 * i) % 90 + 1 for i in range(batch)]
    async with engine(num_blocks=1000, scheduler__overlap=overlap, null_device=null_device) as made:
        handles = [
            submit(made, prompt(length, i), greedy(3 + i % 40, ignore_eos=i % 2 == 0))
            for i, length in enumerate(lengths)
        ]
        completions = await asyncio.gather(*handles)
    for i, (length, completion) in enumerate(zip(lengths, completions, strict=True)):
        assert list(completion.token_ids) == expected(prompt(length, i), 3 + i % 40, ignore_eos=i % 2 == 0)


async def test_chunked_prefill_and_prefix_hits() -> None:
    model = LedgerModel()
    async with engine(model=model, scheduler__max_prefill_tokens=16) as made:
        first = await submit(made, prompt(200), greedy(10))
        computed = model.num_tokens
        second = await submit(made, prompt(200), greedy(10))
    assert list(first.token_ids) == list(second.token_ids) == expected(prompt(200), 10)
    assert first.usage.cached_tokens == 0
    assert second.usage.cached_tokens == 192
    assert model.num_tokens - computed < 30


async def test_salt_separates_prefixes() -> None:
    async with engine() as made:
        await submit(made, prompt(64), greedy(2), cache_salt="a")
        other = await submit(made, prompt(64), greedy(2), cache_salt="b")
        same = await submit(made, prompt(64), greedy(2), cache_salt="a")
    assert (other.usage.cached_tokens, same.usage.cached_tokens) == (0, 48)


async def test_next_turn_hits_the_output_of_the_last() -> None:
    async with engine() as made:
        first = await submit(made, prompt(20), greedy(60, ignore_eos=True))
        history = [*prompt(20), *first.token_ids]
        second = await submit(made, history, greedy(5))
    assert second.usage.cached_tokens == 64  # 79 tokens were computed: four full blocks
    assert list(second.token_ids) == expected(history, 5)


@pytest.mark.parametrize("null_device", [True, False])
async def test_preemption(null_device: bool) -> None:
    """Sixteen sequences that together want far more than the pool has."""
    async with engine(num_blocks=25, null_device=null_device) as made:
        handles = [submit(made, prompt(10 + i, i), greedy(120, ignore_eos=True)) for i in range(16)]
        completions = await asyncio.gather(*handles)
        assert made.scheduler.stats.preemptions > 0
    for i, completion in enumerate(completions):
        assert list(completion.token_ids) == expected(prompt(10 + i, i), 120, ignore_eos=True)


@pytest.mark.parametrize("length", [15, 16, 17, 40])
@pytest.mark.parametrize("blocks", [100, 24])
async def test_choices_share_the_prompt(length: int, blocks: int) -> None:
    model = LedgerModel()
    async with engine(model=model, num_blocks=blocks) as made:
        handles = [submit(made, prompt(length, i), greedy(30, n=4, ignore_eos=True)) for i in range(4)]
        completions = await asyncio.gather(*handles)
    for i, completion in enumerate(completions):
        assert len(completion.choices) == 4
        for choice in completion.choices:
            assert list(choice.token_ids) == expected(prompt(length, i), 30, ignore_eos=True)
        assert completion.usage.prompt_tokens == length
    if blocks == 100:
        assert model.num_tokens <= 4 * (length + 4 * 30)


async def test_iteration_yields_everything_once() -> None:
    async with engine() as made:
        deltas: list[Delta] = [delta async for delta in submit(made, prompt(9), greedy(25, ignore_eos=True))]
    tokens = [token for delta in deltas for token in delta.token_ids]
    assert tokens == expected(prompt(9), 25, ignore_eos=True)
    assert [delta.finish_reason for delta in deltas if delta.finish_reason] == [FinishReason.LENGTH]


async def test_zero_new_tokens() -> None:
    async with engine() as made:
        completion = await submit(made, prompt(20), greedy(0))
    assert completion.token_ids == ()
    assert completion.finish_reason is FinishReason.LENGTH


async def test_stop_string_across_tokens() -> None:
    tokens = expected(prompt(4), 30, ignore_eos=True)
    stop = f"{tokens[6]}><{tokens[7]}"  # begins inside one token and ends inside the next
    async with engine() as made:
        completion = await submit(made, prompt(4), greedy(30, ignore_eos=True, stop=(stop,)))
        assert completion.text == "".join(f"<{token}>" for token in tokens[:6]) + "<"
        assert completion.choices[0].stop_reason == stop
        assert completion.finish_reason is FinishReason.STOP


async def test_stop_id_and_min_tokens() -> None:
    tokens = expected(prompt(4), 30, ignore_eos=True)
    async with engine() as made:
        held = greedy(30, ignore_eos=True, stop_token_ids=(tokens[5],), min_tokens=8)
        assert len((await submit(made, prompt(4), held)).token_ids) >= 8
        completion = await submit(made, prompt(4), greedy(30, ignore_eos=True, stop_token_ids=(tokens[5],)))
    assert list(completion.token_ids) == tokens[: tokens.index(tokens[5]) + 1]
    assert completion.choices[0].stop_reason == tokens[5]
    assert completion.text == "".join(f"<{token}>" for token in completion.token_ids[:-1])


async def test_cancel_frees_within_a_step() -> None:
    model = LedgerModel()
    async with engine(model=model) as made:
        handle = submit(made, prompt(9), greedy(400, ignore_eos=True))
        async for _ in handle:
            break
        at_cancel = model.num_forwards
        with pytest.raises(RequestCancelledError):
            await handle
        await settle(made)
        assert model.num_forwards <= at_cancel + 2  # the steps that were launched already
        assert made.scheduler.residency.pool.num_free == made.scheduler.residency.pool.num_usable


async def test_cancelled_task_and_dropped_handle() -> None:
    async with engine() as made:
        task = asyncio.ensure_future(_complete(made))
        while not made.scheduler.num_running:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await settle(made)
        submit(made, prompt(9), greedy(400, ignore_eos=True))
        await settle(made)


async def _complete(made: object) -> None:
    await submit(made, prompt(9), greedy(400, ignore_eos=True))  # type: ignore[arg-type]


async def test_deadline() -> None:
    async with engine() as made:
        with pytest.raises(DeadlineExceededError, match=r"0\.000 s"):
            await submit(made, prompt(9), greedy(100), deadline=0.0)
        with pytest.raises(DeadlineExceededError):
            await submit(made, prompt(9), greedy(500, ignore_eos=True), deadline=0.01)


async def test_refusals_name_the_numbers() -> None:
    async with engine(num_blocks=9, model__max_model_len=400) as made:
        with pytest.raises(ContextLengthError, match="400 tokens, but the prompt has 390 and 20 output"):
            await submit(made, prompt(390), greedy(20))
        with pytest.raises(ContextLengthError, match="need 13 KV blocks of 16 tokens, but the cache has 8"):
            await submit(made, prompt(100), greedy(100))
        with pytest.raises(InvalidRequestError, match="empty"):
            await submit(made, [], greedy(1))
        with pytest.raises(InvalidRequestError, match="token id 211"):
            await submit(made, [211], greedy(1))
        with pytest.raises(InvalidRequestError, match="temperature is -1"):
            await submit(made, [1], SamplingParams(temperature=-1))
        assert len((await submit(made, prompt(100), greedy(None, ignore_eos=True))).token_ids) == 28


async def test_bounded_queue() -> None:
    async with engine(scheduler__max_queue=2, scheduler__max_num_seqs=1) as made:
        handles = [submit(made, prompt(5), greedy(50, ignore_eos=True)) for _ in range(8)]
        results = await asyncio.gather(*handles, return_exceptions=True)
    refused = [result for result in results if isinstance(result, QueueFullError)]
    assert 4 <= len(refused) <= 6
    assert all(len(r.token_ids) == 50 for r in results if not isinstance(r, BaseException))


async def test_a_failed_step_ends_only_its_requests() -> None:
    model = LedgerModel()
    async with engine(model=model) as made:
        model.fail_at = 3
        with pytest.raises(RequestFailedError, match="RuntimeError"):
            await submit(made, prompt(5), greedy(50, ignore_eos=True))
        completion = await submit(made, prompt(6), greedy(50, ignore_eos=True))
        assert list(completion.token_ids) == expected(prompt(6), 50, ignore_eos=True)


async def test_stop_ends_open_requests() -> None:
    async with engine() as made:
        handle = submit(made, prompt(5), greedy(300, ignore_eos=True))
        waiter = asyncio.ensure_future(_await(handle))
        while not made.scheduler.num_running:
            await asyncio.sleep(0)
        await made.stop()
        with pytest.raises(RuntimeClosedError):
            await waiter
        with pytest.raises(RuntimeClosedError):
            await submit(made, prompt(5), greedy(3))


async def _await(handle: object) -> object:
    return await handle  # type: ignore[misc]


async def test_slow_reader_pauses_only_itself() -> None:
    async with engine(streamer__max_unread_tokens=8) as made:
        slow = submit(made, prompt(5), greedy(200, ignore_eos=True))
        fast = await submit(made, prompt(6), greedy(200, ignore_eos=True))
        assert list(fast.token_ids) == expected(prompt(6), 200, ignore_eos=True)
        for _ in range(50):
            await asyncio.sleep(0)
        assert not slow.done
        assert 8 < slow.mailbox.unread <= 8 + 4
        assert list((await slow).token_ids) == expected(prompt(5), 200, ignore_eos=True)


async def test_paused_readers_give_way() -> None:
    async with engine(streamer__max_unread_tokens=4, scheduler__max_num_seqs=2) as made:
        stalled = [submit(made, prompt(5, i), greedy(100, ignore_eos=True)) for i in range(2)]
        while not all(handle.mailbox.unread > 4 for handle in stalled):
            await asyncio.sleep(0)
        other = await submit(made, prompt(6), greedy(20))
        assert list(other.token_ids) == expected(prompt(6), 20)
        for i, handle in enumerate(stalled):
            assert list((await handle).token_ids) == expected(prompt(5, i), 100, ignore_eos=True)


async def test_seeded_draws_do_not_depend_on_the_batch() -> None:
    def sampling(seed: int) -> SamplingParams:
        return SamplingParams(temperature=30.0, max_tokens=20, seed=seed, ignore_eos=True)

    async with engine() as made:
        alone = [await submit(made, prompt(8, i), sampling(i)) for i in range(6)]
        together = await asyncio.gather(*[submit(made, prompt(8, i), sampling(i)) for i in range(6)])
    assert [c.token_ids for c in alone] == [c.token_ids for c in together]
    assert len({c.token_ids for c in alone}) == 6


async def test_logprobs_and_prompt_logprobs() -> None:
    async with engine(scheduler__max_prefill_tokens=32) as made:
        completion = await submit(made, prompt(70), greedy(5, ignore_eos=True, logprobs=2, prompt_logprobs=1))
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert [entry.token_id for entry in logprobs] == list(completion.token_ids)
    assert all(len(entry.top) == 2 and entry.top[0].token_id == entry.token_id for entry in logprobs)
    scored = completion.prompt_logprobs
    assert scored is not None
    assert [entry.token_id for entry in scored] == prompt(70)
    assert scored[0].logprob is None
    from fakes import next_token

    for i, entry in enumerate(scored[1:], start=1):
        assert entry.top[0].token_id == next_token(prompt(70)[:i])


async def test_prompt_logprobs_come_once_after_a_preemption_during_prefill() -> None:
    options = {"scheduler__max_prefill_tokens": 16, "num_blocks": 38}
    async with engine(**options) as made:
        others = [submit(made, prompt(10, i), greedy(120, ignore_eos=True)) for i in range(6)]
        scored = submit(made, prompt(400, 9), greedy(2, ignore_eos=True, prompt_logprobs=0))
        results = await asyncio.gather(scored, *others)
    assert [entry.token_id for entry in results[0].prompt_logprobs] == prompt(400, 9)


@pytest.mark.parametrize(
    "wrong",
    [
        {"stop": [5]},
        {"stop": "END"},
        {"stop": [b"ab"]},
        {"top_k": "2"},
        {"temperature": None},
        {"allowed_token_ids": "abc"},
        {"logit_bias": {"x": 1.0}},
        {"n": 10**9},
    ],
)
async def test_wrong_types_are_named_and_hurt_nobody_else(wrong: dict[str, object]) -> None:
    async with engine() as made:
        victim = submit(made, prompt(5), greedy(100, ignore_eos=True))
        with pytest.raises(InvalidRequestError, match=f"^{next(iter(wrong))} "):
            await submit(made, prompt(5), SamplingParams(**wrong))  # type: ignore[arg-type]
        assert list((await victim).token_ids) == expected(prompt(5), 100, ignore_eos=True)


@pytest.mark.parametrize("more", [{"priority": "high"}, {"cache_salt": "\ud800"}, {"deadline": float("nan")}])
async def test_wrong_options_are_named_and_hurt_nobody_else(more: dict[str, object]) -> None:
    async with engine() as made:
        victim = submit(made, prompt(5), greedy(100, ignore_eos=True))
        with pytest.raises(InvalidRequestError, match=next(iter(more))):
            await submit(made, prompt(5), greedy(5), **more)
        assert list((await victim).token_ids) == expected(prompt(5), 100, ignore_eos=True)


async def test_collections_of_any_kind_are_taken() -> None:
    async with engine() as made:
        completion = await submit(made, prompt(5), greedy(3, allowed_token_ids={7, 8}, logit_bias={8: -50}))
        assert completion.token_ids == (7, 7, 7)


async def test_a_join_that_fails_ends_one_choice_and_the_row_is_good_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from millrace.runtime.sampling.penalties import PenaltyTable

    join = PenaltyTable.join

    def planted(self: PenaltyTable, row: int, params: SamplingParams, *rest: object) -> None:
        if params.presence_penalty == 1.5:
            raise MemoryError
        join(self, row, params, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(PenaltyTable, "join", planted)
    async with engine(scheduler__max_num_seqs=2) as made:
        results = await asyncio.gather(
            submit(made, prompt(5), greedy(20, presence_penalty=1.5)),
            submit(made, prompt(6), greedy(20, ignore_eos=True)),
            return_exceptions=True,
        )
        assert isinstance(results[0], RequestFailedError)
        assert list(results[1].token_ids) == expected(prompt(6), 20, ignore_eos=True)
        for i in range(4):
            again = await submit(made, prompt(7, i), greedy(10, ignore_eos=True))
            assert list(again.token_ids) == expected(prompt(7, i), 10, ignore_eos=True)


async def test_a_dead_actor_ends_everything_and_computes_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LedgerModel()
    async with engine(model=model) as made:
        handle = submit(made, prompt(5), greedy(400, ignore_eos=True))
        async for _ in handle:
            break_here = model.num_forwards > 3
            if break_here:
                monkeypatch.setattr(made.scheduler, "handle", lambda message: 1 / 0)
                with pytest.raises(RuntimeClosedError, match="scheduler: ZeroDivisionError"):
                    await handle
                break
        steps = model.num_forwards
        for _ in range(50):
            await asyncio.sleep(0)
        assert model.num_forwards == steps
        assert made.health().state == "failed"
        assert not made.health().progressing
        with pytest.raises(RuntimeClosedError):
            await submit(made, prompt(5), greedy(2))


async def test_a_burst_is_bounded_and_every_cancel_arrives() -> None:
    async with engine(scheduler__max_num_seqs=2, scheduler__max_queue=2) as made:
        handles = [submit(made, prompt(5, i), greedy(300, ignore_eos=True)) for i in range(50)]
        for handle in handles:
            for _ in range(20):
                handle.cancel()
        results = await asyncio.gather(*handles, return_exceptions=True)
    kinds = {type(result) for result in results}
    assert kinds == {RequestCancelledError, QueueFullError}
    assert sum(isinstance(result, QueueFullError) for result in results) == 46


async def test_a_burst_fills_rows_and_queue() -> None:
    async with engine(scheduler__max_num_seqs=8, scheduler__max_queue=1) as made:
        results = await asyncio.gather(
            *[submit(made, prompt(5, i), greedy(5)) for i in range(9)], return_exceptions=True
        )
    assert not [result for result in results if isinstance(result, BaseException)]


async def test_an_urgent_request_overtakes_a_long_prompt() -> None:
    async with engine(scheduler__max_prefill_tokens=16) as made:
        low = submit(made, prompt(480), greedy(1), priority=3)
        ended: list[str] = []
        while not made.scheduler.num_running:
            await asyncio.sleep(0)
        urgent = submit(made, prompt(4), greedy(1), priority=0)

        async def wait(name: str, handle: object) -> None:
            await handle  # type: ignore[misc]
            ended.append(name)

        await asyncio.gather(wait("low", low), wait("urgent", urgent))
    assert ended == ["urgent", "low"]


async def test_every_choice_publishes_its_own_blocks() -> None:
    async with engine(num_blocks=200) as made:
        first = await submit(
            made, prompt(20), SamplingParams(n=2, temperature=30.0, seed=1, max_tokens=50, ignore_eos=True)
        )
        for choice in first.choices:
            history = [*prompt(20), *choice.token_ids]
            assert (await submit(made, history, greedy(1))).usage.cached_tokens == 64


async def test_a_prompt_as_long_as_the_context_can_be_scored() -> None:
    async with engine() as made:
        completion = await submit(made, prompt(512), greedy(0, prompt_logprobs=0))
        assert len(completion.prompt_logprobs) == 512
        with pytest.raises(ContextLengthError):
            await submit(made, prompt(512), greedy(1))


async def test_a_long_text_is_cancelled_at_once_and_refused_by_its_size() -> None:
    async with engine() as made:
        with pytest.raises(ContextLengthError, match="characters"):
            await submit(made, "<7>" * 100_000, greedy(1))
        handle = submit(made, "<7>" * 500, greedy(1))
        handle.cancel()
        with pytest.raises((RequestCancelledError, ContextLengthError)):
            await handle
