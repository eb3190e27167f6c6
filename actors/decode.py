"""Decode: computes the next token of every sequence in its batch, one step after the other, on its own stream."""

from collections import deque
from functools import partial

from millrace.runtime.channel import Receiver, Sender
from millrace.runtime.device import Device, StepOutput
from millrace.runtime.lanes import DecodeLane
from millrace.runtime.messages import DecodeInbox, DecodePlan, LogitsReady, RowsReady, SamplerInbox
from millrace.runtime.types import Lane


class Decode:
    """Its lane owns the device batch: position and block table of every row.

    A step reads the tokens that the step before it has drawn, from the rows that the sampler writes on the device. So a
    plan is launched once it is there *and* sampling of the step before it is launched (`RowsReady`): two plans in the
    inbox must never become two launches without the sampling between them.
    """

    def __init__(
        self,
        *,
        device: Device,
        lane: DecodeLane,
        inbox: Receiver[DecodeInbox],
        sampler: Sender[SamplerInbox],
    ) -> None:
        self._device = device
        self._stream = device.stream("decode", priority=0)
        self._lane = lane
        self._inbox = inbox
        self._sampler = sampler
        self._plans: deque[DecodePlan] = deque()
        self._ready = 0  # the step that may be launched

    async def run(self) -> None:
        while True:
            for message in await self._inbox.recv_batch():
                self.handle(message)

    def handle(self, message: DecodeInbox) -> None:
        if isinstance(message, RowsReady):
            self._ready = message.step + 1
        else:
            self._plans.append(message)
        if self._plans and self._plans[0].step == self._ready:
            self.launch(self._plans.popleft())

    def launch(self, plan: DecodePlan) -> None:
        output = StepOutput()
        self._device.launch(self._stream, partial(output.run, partial(self._lane.run, plan, output)))
        self._sampler.send_nowait(
            LogitsReady(
                lane=Lane.DECODE,
                step=plan.step,
                seqs=plan.seqs,
                rows=plan.rows,
                logits_index=None,
                joins=(),
                output=output,
                stream=self._stream,
            )
        )
