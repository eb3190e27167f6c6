"""The lanes without an engine, and their parts: order across streams, pinned memory, graphs, halves, scores."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from cuda_fakes import POLICIES, CountingLauncher, FakeDriver, PaddedLedger
from fakes import expected, greedy
from torch import Tensor

from millrace.runtime.cuda.decode import CudaDecode
from millrace.runtime.cuda.graphs import DecodeGraphs, buckets
from millrace.runtime.cuda.lanes import cuda_lanes
from millrace.runtime.cuda.memory import in_halves
from millrace.runtime.cuda.rows import DeviceRows
from millrace.runtime.cuda.scores import log_probabilities
from millrace.runtime.cuda.staging import PinnedRing
from millrace.runtime.device import StepMemoryError, StepOutput
from millrace.runtime.messages import BlockUpdates, DecodePlan, LogitsReady, PrefillPlan, SampleJoin
from millrace.runtime.sampling.logprobs import prompt_logprobs
from millrace.runtime.types import Lane, sequence_id
from shim.launcher import ShimLauncher

PROMPT = [5, 9, 13, 2, 7, 11, 3, 8, 1, 6, 12, 4, 10, 14, 15, 16, 17, 18]  # two blocks
BLOCKS = [7, 3, 5]


def ints(*values: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.array(values, dtype=np.int32)


def updates(row: int, blocks: Sequence[int]) -> BlockUpdates:
    return BlockUpdates(ints(*[row] * len(blocks)), ints(*range(len(blocks))), ints(*blocks))


def prefill_plan(row: int, prompt: Sequence[int], max_new: int) -> PrefillPlan:
    seq = sequence_id(1, 0)
    join = SampleJoin(seq, row, greedy(max_new), 0, max_new, ints(*prompt), ints())
    return PrefillPlan(
        step=0,
        seqs=[seq],
        rows=ints(row),
        starts=ints(0),
        lengths=ints(len(prompt)),
        tokens=ints(*prompt),
        prompt_logprobs=ints(-1),
        next_tokens=ints(-1),
        blocks=updates(row, BLOCKS),
        joins=(join,),
        join_of=ints(0),
    )


def decode_plan(step: int, row: int, position: int | None) -> DecodePlan:
    joined = ints() if position is None else ints(row)
    return DecodePlan(
        step=step,
        seqs=[sequence_id(1, 0)],
        rows=ints(row),
        joined_rows=joined,
        joined_positions=ints() if position is None else ints(position),
        blocks=updates(row, [] if position is None else BLOCKS),
        copies=None,
    )


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("graphs", [True, False])
def test_decode_sees_what_prefill_left_though_nobody_waited(shim: ShimLauncher, policy: str, graphs: bool) -> None:
    """Prefill, its sampling, and decode steps are all enqueued before the device does anything: the events alone keep
    keys, values and the first token before the step that reads them."""
    tokens, driver = launch_all(shim, policy, graphs)
    assert tokens == expected(PROMPT, 4, ignore_eos=True)
    assert driver.waits == 1  # one for the row that joined, and none afterwards
    assert driver.max_pending > 8


def test_without_the_event_the_token_is_wrong(shim: ShimLauncher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeDriver, "wait", lambda self, event: None)
    tokens, _ = launch_all(shim, "lazy", True)
    assert tokens[1:] != expected(PROMPT, 4, ignore_eos=True)[1:]


def launch_all(shim: ShimLauncher, policy: str, graphs: bool) -> tuple[list[int], FakeDriver]:
    driver, row = FakeDriver(policy), 2
    lanes = cuda_lanes(
        driver,
        CountingLauncher(shim, driver),
        PaddedLedger(),
        num_blocks=9,
        max_rows=4,
        max_model_len=48,
        max_logprobs=1,
        use_graphs=graphs,
    )
    decode = lanes.decode
    assert isinstance(decode, CudaDecode)
    streams = driver.stream(1), driver.stream(0)
    driver.use(streams[1])
    decode.warm_up()
    driver.waits = 0
    outputs: list[StepOutput] = []
    events = []

    def sample(lane: Lane, step: int, joins: tuple[SampleJoin, ...]) -> None:
        ready = LogitsReady(lane, step, [sequence_id(1, 0)], ints(row), None, joins, outputs[-1], None)
        lanes.sampling.run(ready)
        events.append(driver.record())

    driver.use(streams[0])
    plan = prefill_plan(row, PROMPT, 4)
    outputs.append(StepOutput())
    lanes.prefill.run(plan, outputs[-1])
    sample(Lane.PREFILL, 0, plan.joins)
    driver.use(streams[1])
    for step in range(3):
        outputs.append(StepOutput())
        decode.run(decode_plan(step, row, len(PROMPT) if step == 0 else None), outputs[-1])
        sample(Lane.DECODE, step, ())
    for event in reversed(events):  # the last first: nothing makes the prefill stream advance but the event
        driver.synchronize(event)
    tokens = []
    for output in outputs:
        output.finish()
        assert output.error is None
        tokens.append(int(output.sampled.tokens[0]))
    return tokens, driver


def test_a_pinned_buffer_belongs_to_its_step() -> None:
    driver = FakeDriver("lazy")
    ring = PinnedRing(driver, most=3)
    driver.use(driver.stream(0))
    outputs = [StepOutput() for _ in range(3)]
    seen: list[list[int]] = []
    for number, output in enumerate(outputs):
        upload = ring.upload({"rows": ints(number, 10 + number), "wide": np.array([2**40 + number])}, output)
        driver.enqueue(lambda upload=upload: seen.append([int(x) for t in upload.run().values() for x in t]))
    assert ring.in_use == 3
    with pytest.raises(RuntimeError, match="3 pinned buffers are in use"):
        ring.take(1, StepOutput())
    driver.synchronize(driver.record())
    assert seen == [[number, 10 + number, 2**40 + number] for number in range(3)]
    for output in outputs:
        output.finish()
    assert ring.in_use == 0
    again = ring.take(8, StepOutput())
    assert len(again) == 4096
    assert ring.in_use == 1


def test_a_larger_buffer_takes_the_place_of_a_smaller() -> None:
    ring = PinnedRing(FakeDriver(), most=1)
    output = StepOutput()
    ring.take(10, output)
    output.finish()
    assert len(ring.take(5000, output)) == 8192


def test_the_smallest_of_several_free_buffers_goes() -> None:
    ring, outputs = PinnedRing(FakeDriver(), most=2), [StepOutput(), StepOutput()]
    ring.take(8192, outputs[0])
    ring.take(4096, outputs[1])
    for output in outputs:
        output.finish()
    assert len(ring.take(16384, outputs[0])) == 16384
    assert len(ring.take(1, outputs[1])) == 8192


def test_releases_come_back_when_a_step_has_failed() -> None:
    ring, output = PinnedRing(FakeDriver()), StepOutput()
    ring.take(1, output)
    output.run(lambda: 1 // 0)
    output.at_end.append(lambda: pytest.fail("work of a failed step"))
    output.finish()
    assert ring.in_use == 0
    assert isinstance(output.error, ZeroDivisionError)


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [(1, (1,)), (3, (1, 2, 3)), (8, (1, 2, 4, 8)), (20, (1, 2, 4, 8, 16, 20))],
)
def test_buckets(rows: int, sizes: tuple[int, ...]) -> None:
    assert buckets(rows) == sizes


def test_buckets_are_dense_where_it_matters() -> None:
    sizes = buckets(300)
    assert sizes[:6] == (1, 2, 4, 8, 16, 24)
    assert sizes[-3:] == (256, 288, 300)
    assert list(sizes) == sorted(set(sizes))


def test_graphs_are_captured_from_the_largest_and_share_a_pool() -> None:
    driver = FakeDriver(capture_bytes=(100, 10))
    driver.use(driver.stream(0))
    order: list[int] = []
    seen: list[tuple[int, int]] = []

    def step(size: int) -> Tensor:
        order.append(size)
        return torch.full((size, 3), float(size))

    graphs = DecodeGraphs(driver, (1, 2, 4), step)
    assert graphs.holding(1) is None
    graphs.capture(lambda done, total: seen.append((done, total)))
    assert order == [4, 2, 1]  # the warm-ups; a capture executes nothing
    assert driver.captures == [(0, None), (1, "pool"), (2, "pool")]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert graphs.capture_bytes == [100, 10, 10]
    assert [graphs.holding(batch) for batch in (1, 2, 3, 4, 5)] == [1, 2, 4, 4, None]
    logits = graphs.replay(4)
    driver.drain()
    assert logits.tolist() == [[4.0] * 3] * 4
    assert graphs.replay(2).data_ptr() == logits.data_ptr()


def test_what_cannot_be_captured_runs_without_graphs() -> None:
    driver = FakeDriver(uncapturable=1)
    driver.use(driver.stream(0))
    graphs = DecodeGraphs(driver, (1, 8), lambda size: torch.zeros(size, 3))
    graphs.capture()
    assert graphs.captured == ()
    assert graphs.holding(1) is None
    assert (
        graphs.refused == "a step of 1 sequences cannot be captured: operation not permitted when stream is capturing"
    )


def test_a_shortage_in_a_capture_is_told_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    driver = FakeDriver()
    driver.use(driver.stream(0))
    monkeypatch.setattr(driver, "capture", short)
    with pytest.raises(torch.OutOfMemoryError):
        DecodeGraphs(driver, (1,), lambda size: torch.zeros(size, 3)).capture()


def test_halves_compute_everything_that_fits() -> None:
    driver = FakeDriver()
    done: list[int] = []

    def compute(parts: Sequence[int]) -> None:
        if len(parts) > 2 or 5 in parts:
            raise torch.OutOfMemoryError(f"{len(parts)} parts")
        done.extend(parts)

    failed = in_halves(driver, range(8), compute)
    assert sorted(done) == [0, 1, 2, 3, 4, 6, 7]
    assert [part for part, _ in failed] == [5]
    assert "1 parts" in str(failed[0][1])
    assert isinstance(failed[0][1], StepMemoryError)
    assert driver.released >= 3


def test_a_part_is_cut_before_it_fails() -> None:
    """In order, and nothing behind a piece that failed: it would attend to keys that are not there."""
    done: list[tuple[int, int]] = []

    def compute(parts: Sequence[tuple[int, int]]) -> None:
        if sum(end - begin for begin, end in parts) > 3 or any(begin <= bad < end for begin, end in parts):
            raise torch.OutOfMemoryError("too long")
        done.extend(parts)

    def split(part: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]] | None:
        middle = sum(part) // 2
        return None if part[1] - part[0] < 2 else ((part[0], middle), (middle, part[1]))

    bad = -1
    assert in_halves(FakeDriver(), [(0, 8), (8, 10)], compute, split) == []
    assert [token for part in done for token in range(*part)] == list(range(10))
    done.clear()
    bad = 3
    failed = in_halves(FakeDriver(), [(0, 8), (8, 10)], compute, split)
    assert [part for part, _ in failed] == [(0, 8)]
    assert (8, 10) in done
    assert not any(begin > 3 and end <= 8 for begin, end in done)


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    with pytest.raises(ZeroDivisionError):
        in_halves(FakeDriver(), [1, 2], lambda parts: 1 // 0)  # type: ignore[func-returns-value, arg-type, return-value]


def test_rows_change_hands_behind_one_event() -> None:
    rows = DeviceRows(4, torch.zeros(5, dtype=torch.int64))
    first, second = object(), object()
    rows.hand_over([0, 1], first)
    rows.hand_over([2], second)
    assert rows.claim([0, 1, 3]) == [first]
    assert rows.claim([0, 1, 2]) == [second]
    assert rows.claim([0, 1, 2]) == []


@pytest.mark.parametrize("num_top", [0, 1, 5])
def test_log_probabilities_equal_those_of_the_cpu(num_top: int) -> None:
    logits = torch.randn(21, 300) * 4
    logits[3] = logits[3].round()  # ties: the lowest id first
    logits[4, :298] = -math.inf  # fewer than were asked for
    logits[5, 7] = math.nan
    logits[6, 7] = math.inf
    logits[7] = -0.0
    logits[7, ::2] = 0.0
    tokens = torch.randint(0, 300, (21,))
    tokens[4] = 299
    want = prompt_logprobs(logits.numpy(), tokens.numpy(), num_top)
    values, ids = (tensor.numpy() for tensor in log_probabilities(logits, tokens, num_top))
    np.testing.assert_allclose(values[:, 0], want.logprobs, rtol=1e-5, atol=1e-5)
    found = np.isfinite(values[:, 1:])
    np.testing.assert_array_equal(found.sum(axis=1), want.num_top)
    np.testing.assert_array_equal(np.where(found, ids, -1), want.top_ids)
    np.testing.assert_allclose(np.where(found, values[:, 1:], -np.inf), want.top_logprobs, rtol=1e-5, atol=1e-5)


def test_a_buffer_that_goes_round_too_early_is_a_wrong_token(
    shim: ShimLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The double is worth its salt: memory that is used again before the device has read it shows."""
    take = PinnedRing.take

    def forgetful(self: PinnedRing, num_bytes: int, output: StepOutput) -> Tensor:
        early = StepOutput()
        buffer = take(self, num_bytes, early)
        early.finish()
        return buffer

    monkeypatch.setattr(PinnedRing, "take", forgetful)
    try:
        tokens, _ = launch_all(shim, "lazy", True)
    except (AssertionError, RuntimeError):
        return  # the device reads nonsense, and says so
    assert tokens != expected(PROMPT, 4, ignore_eos=True)
