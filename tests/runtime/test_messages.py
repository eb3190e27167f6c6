"""What may cross a process border comes back as it went."""

import msgspec
import numpy as np
import pytest

from millrace.runtime.errors import InvalidRequestError, QueueFullError
from millrace.runtime.messages import (
    Admitted,
    Cancel,
    Closed,
    Finished,
    Flow,
    LogprobColumns,
    PromptLogprobs,
    Started,
    TokensSampled,
    Wire,
    decode,
    encode,
)
from millrace.runtime.types import FinishReason, Lane, Priority, SamplingParams


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


COLUMNS = LogprobColumns(
    index=ints(0),
    logprobs=np.array([-0.5], dtype=np.float32),
    num_top=ints(2),
    top_ids=ints(3, 4).reshape(1, 2),
    top_logprobs=np.array([[-0.5, -1.0]], dtype=np.float32),
)
MESSAGES: list[Wire] = [
    Admitted(
        rid=7,
        prompt=ints(1, 2, 3),
        block_hashes=(b"abc",),
        sampling=SamplingParams(logit_bias={3: 1.5}, stop=("x",), allowed_token_ids=(1, 2)),
        seed=2**64 - 1,
        max_new_tokens=5,
        priority=Priority.LOW,
        deadline=None,
        arrived=1.5,
        cache_salt="s",
    ),
    Cancel(3, None, 1),
    Cancel(4),
    Closed(5, FinishReason.REFUSED, QueueFullError("full").info()),
    Flow(6, True),
    Started(7, 32, 0.5),
    TokensSampled(
        lane=Lane.DECODE,
        step=9,
        seqs=[128, 256],
        counts=ints(1, 0),
        tokens=ints(17),
        positions=ints(4, 5),
        finished=(
            Finished(0, FinishReason.STOP, 17),
            Finished(1, FinishReason.FAILED, None, QueueFullError("x").info()),
        ),
        logprobs=COLUMNS,
        prompt_logprobs=(PromptLogprobs(128, 0, ints(5), COLUMNS),),
        launched_at=1.0,
        ready_at=2.0,
    ),
]


def plain(value: object) -> object:
    """Columns as lists, so that messages compare."""
    return msgspec.json.encode(value, enc_hook=lambda array: [str(array.dtype), array.tolist()])


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_round_trip(message: Wire) -> None:
    back = decode(encode(message))
    assert type(back) is type(message)
    assert plain(back) == plain(message)


def test_every_wire_message_is_tried() -> None:
    assert {type(message) for message in MESSAGES} == set(Wire.__args__)  # type: ignore[attr-defined]


def test_device_objects_do_not_cross() -> None:
    with pytest.raises(NotImplementedError):
        encode(Cancel(1, None, object()))  # type: ignore[arg-type]


def test_errors_come_back_as_themselves() -> None:
    error = InvalidRequestError("n is 0", param="n")
    back = error.info().exception()
    assert type(back) is InvalidRequestError
    assert (back.message, back.param, back.http_status) == ("n is 0", "n", 400)
