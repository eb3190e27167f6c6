"""The sampler: draws the next token of every row behind its logits, and says which sequences ended by their tokens.

It is the author of EOS, stop ids, length and broken logits (docs/architecture.md, "One terminal event").
"""

from functools import partial

import numpy as np

from millrace.runtime.channel import Receiver, Sender
from millrace.runtime.device import Device, StepMemoryError
from millrace.runtime.errors import ErrorInfo, RequestFailedError
from millrace.runtime.lanes import SamplingLane
from millrace.runtime.messages import (
    Column,
    DecodeInbox,
    Finished,
    LogitsReady,
    RowsReady,
    SamplerInbox,
    SchedulerInbox,
    StepDone,
    StreamerInbox,
    TokensSampled,
)
from millrace.runtime.types import FinishReason, Lane
from millrace.runtime.world import World

_NO_TOKENS = np.empty(0, dtype=np.int32)
_NO_ROWS = np.empty(0, dtype=np.int32)  # no step has this very object


class Sampler:
    """Owns what decides a sequence's end on the host; its lane owns the sampling state of all rows on the device.

    The lane's part runs in stream order and never waits for the host: a sequence that has ended is sampled once or
    twice more by the steps launched behind its last one, and those tokens are dropped here.
    """

    def __init__(
        self,
        *,
        device: Device,
        world: World,
        lane: SamplingLane,
        eos_token_ids: tuple[int, ...],
        inbox: Receiver[SamplerInbox],
        own: Sender[SamplerInbox],
        decode: Sender[DecodeInbox],
        scheduler: Sender[SchedulerInbox],
        streamer: Sender[StreamerInbox],
    ) -> None:
        self._device = device
        self._world = world
        self._inbox = inbox
        self._own = own  # the device's word that a step is done comes through the inbox, like everything else
        self._decode = decode
        self._scheduler = scheduler
        self._streamer = streamer
        self._lane = lane
        self._eos = frozenset(eos_token_ids)
        self._is_eos = np.zeros(lane.vocab_size, dtype=bool)  # [vocab_size]
        self._is_eos[list(eos_token_ids)] = True
        # [max_rows]:
        rows = lane.max_rows
        self._ones = np.ones(rows, dtype=np.int32)
        self._ones.flags.writeable = False  # parts of it go into messages
        self._num_output = np.zeros(rows, dtype=np.int32)
        self._max_new = np.zeros(rows, dtype=np.int32)
        self._stops_at_eos = np.zeros(rows, dtype=bool)
        self._ended = np.ones(rows, dtype=bool)
        self._stop_ids: dict[int, frozenset[int]] = {}  # row -> ids, for rows that have any
        # Rows of a decode step of which none had ended, and how many more such steps none of them can end by length.
        self._steady: Column = _NO_ROWS
        self._steady_steps = 0

    async def run(self) -> None:
        while True:
            for message in await self._inbox.recv_batch():
                self.handle(message)

    def handle(self, message: SamplerInbox) -> None:
        if isinstance(message, LogitsReady):
            self.launch(message)
        else:
            self.complete(message)

    def launch(self, ready: LogitsReady) -> None:
        for join in ready.joins:
            self._num_output[join.row] = len(join.output)
            self._max_new[join.row] = join.max_new_tokens
            self._stops_at_eos[join.row] = not join.sampling.ignore_eos
            self._ended[join.row] = False
            self._stop_ids.pop(join.row, None)
            if join.sampling.stop_token_ids:
                self._stop_ids[join.row] = frozenset(join.sampling.stop_token_ids)
        launched_at = self._world.now()
        if len(ready.rows):
            self._device.launch(ready.stream, partial(ready.output.run, partial(self._lane.run, ready)))
        if ready.lane is Lane.DECODE:
            self._decode.send_nowait(RowsReady(ready.step))
        self._device.notify(ready.stream, partial(self._own.send_nowait, StepDone(ready, launched_at)))

    def complete(self, done: StepDone) -> None:
        """Tells scheduler and streamer what a step brought."""
        done.ready.output.finish()
        self._device.check()
        message = self._report(done.ready, done.launched_at)
        self._scheduler.send_nowait(message)
        self._streamer.send_nowait(message)

    def _report(self, ready: LogitsReady, launched_at: float) -> TokensSampled:
        rows, output = ready.rows, ready.output
        error: ErrorInfo | None = None
        finished: tuple[Finished, ...] = ()
        counts: Column = self._ones[: len(rows)]
        tokens: Column = _NO_TOKENS
        positions = self._num_output[rows]
        if output.error is not None:
            error = _step_error(output.error)
            counts = np.zeros(len(rows), dtype=np.int32)
            self._ended[rows] = True
            self._steady = _NO_ROWS
        elif self._all_go_on(ready):
            tokens = output.sampled.tokens
            self._num_output[rows] = positions + 1
        elif len(rows):
            if output.failed:
                self._ended[rows[[seq in output.failed for seq in ready.seqs]]] = True
            drawn = ~self._ended[rows]
            finished = self._finish(ready, positions, drawn)
            counts = drawn.astype(np.int32)
            tokens = output.sampled.tokens
            if len(finished) or not drawn.all():
                tokens = tokens[drawn]
            elif ready.lane is Lane.DECODE and not self._stop_ids:
                self._steady = rows
                self._steady_steps = int((self._max_new[rows] - self._num_output[rows]).min()) - 1
        return TokensSampled(
            lane=ready.lane,
            step=ready.step,
            seqs=ready.seqs,
            counts=counts,
            tokens=tokens,
            positions=positions,
            finished=finished,
            logprobs=None if output.sampled is None else output.sampled.logprobs,
            prompt_logprobs=output.prompt_logprobs,
            error=error,
            failed=tuple((seq, _step_error(reason)) for seq, reason in output.failed.items()),
            launched_at=launched_at,
            ready_at=self._world.now(),
        )

    def _all_go_on(self, ready: LogitsReady) -> bool:
        """Whether every row of the step drew a token that does not end it, as most steps are: told without the dozen
        operations on columns of `_finish`, which are a visible part of a small model's step."""
        if ready.rows is not self._steady or self._steady_steps < 1:
            return False
        output = ready.output
        steady = (
            not output.failed
            and not len(output.sampled.bad_rows)
            and self._eos.isdisjoint(output.sampled.tokens.tolist())
        )
        self._steady_steps -= 1
        if not steady:
            self._steady = _NO_ROWS
        return steady

    def _finish(self, ready: LogitsReady, positions: Column, drawn: Column) -> tuple[Finished, ...]:
        """Finds the sequences that ended with this step; rows without a token of their own are cleared in `drawn`."""
        rows, sampled = ready.rows, ready.output.sampled
        finished: list[Finished] = []
        for index, reason in zip(sampled.bad_rows.tolist(), sampled.bad_reasons, strict=True):
            if drawn[index]:
                drawn[index] = False
                finished.append(Finished(index, FinishReason.FAILED, error=RequestFailedError(reason).info()))
        for index, join in enumerate(ready.joins):
            if join.max_new_tokens == 0 and drawn[index]:
                drawn[index] = False
                finished.append(Finished(index, FinishReason.LENGTH))
        num_output = positions + drawn
        self._num_output[rows] = num_output
        stopped = self._is_eos[sampled.tokens]  # a broken row's -1 is masked by `drawn`
        stopped &= self._stops_at_eos[rows]
        if self._stop_ids:
            for index, row in enumerate(rows.tolist()):
                ids = self._stop_ids.get(row)
                if ids is not None and int(sampled.tokens[index]) in ids:
                    stopped[index] = True
        ended = num_output >= self._max_new[rows]
        ended |= stopped
        ended &= drawn
        if ended.any():
            for index in ended.nonzero()[0].tolist():
                if stopped[index]:
                    finished.append(Finished(index, FinishReason.STOP, stop_id=int(sampled.tokens[index])))
                else:
                    finished.append(Finished(index, FinishReason.LENGTH))
        for end in finished:
            row = int(rows[end.index])
            self._ended[row] = True
            self._stop_ids.pop(row, None)
        return tuple(finished)


def _step_error(error: Exception) -> ErrorInfo:
    reason = str(error) if isinstance(error, StepMemoryError) else type(error).__name__
    return RequestFailedError(f"the engine failed while it computed this request: {reason}").info()
