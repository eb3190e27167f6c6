"""The mailbox between streamer and reader: merging, one terminal event, flow control."""

import asyncio

import pytest

from millrace.runtime.errors import QueueFullError
from millrace.runtime.mailbox import Mailbox
from millrace.runtime.types import FinishReason


def test_deltas_merge_per_choice() -> None:
    box = Mailbox(2, 100)
    box.push(0, "a", 1)
    box.push(1, "x", 9)
    box.push(0, "b", 2)
    first, second = box.take()
    assert (first.index, first.text, first.token_ids) == (0, "ab", (1, 2))
    assert (second.index, second.text) == (1, "x")
    assert box.take() == []


def test_the_last_choice_ends_the_request() -> None:
    closed: list[bool] = []
    box = Mailbox(2, 100)
    box.on_closed = lambda: closed.append(True)
    box.finish(0, "", FinishReason.STOP, "end")
    assert not box.closed
    box.finish(1, "tail", FinishReason.LENGTH)
    assert box.closed
    assert closed == [True]
    assert [(d.text, d.finish_reason, d.stop_reason) for d in box.take()] == [
        ("", FinishReason.STOP, "end"),
        ("tail", FinishReason.LENGTH, None),
    ]


def test_an_error_is_terminal_once() -> None:
    box = Mailbox(1, 100)
    box.fail(QueueFullError("one"))
    box.fail(QueueFullError("two"))
    assert box.error is not None
    assert box.error.message == "one"


def test_a_reader_that_falls_behind_pauses_the_request_and_resumes_it() -> None:
    flow: list[bool] = []
    box = Mailbox(1, 2)
    box.set_flow = flow.append
    for token in range(3):
        box.push(0, "x", token)
        box.notify()
    assert flow == [True]
    box.push(0, "x", 3)
    box.notify()
    assert flow == [True]
    box.take()
    assert flow == [True, False]
    box.collect()
    for token in range(9):
        box.push(0, "x", token)
        box.notify()
    assert flow == [True, False]


async def test_one_word_per_step_and_one_reader() -> None:
    box = Mailbox(1, 100)
    waiting = asyncio.ensure_future(box.wait())
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="two tasks read one request"):
        await box.wait()
    box.push(0, "x", 1)
    await asyncio.sleep(0)
    assert not waiting.done()
    box.notify()
    await waiting
    calls: list[int] = []
    box.on_ready = lambda: calls.append(box.unread)
    box.push(0, "y", 2)
    box.notify()
    assert calls == [2]
