"""Prefill: computes prompts, a chunk of each of some sequences per step, on its own stream; where there is a swap lane,
it also brings blocks to the host and back, on another."""

from functools import partial

import numpy as np

from millrace.runtime.channel import Receiver, Sender
from millrace.runtime.device import Device, StepOutput
from millrace.runtime.lanes import PrefillLane, SwapLane
from millrace.runtime.messages import LogitsReady, PrefillInbox, PrefillPlan, SamplerInbox, SwapPlan
from millrace.runtime.types import Lane

_NO_ROWS = np.empty(0, dtype=np.int32)


class Prefill:
    """Launches each plan as it comes: stream order does the rest. Its lane owns the block tables of the prompts in
    flight."""

    def __init__(
        self,
        *,
        device: Device,
        lane: PrefillLane,
        swap: SwapLane | None = None,
        inbox: Receiver[PrefillInbox],
        sampler: Sender[SamplerInbox],
    ) -> None:
        self._device = device
        self._stream = device.stream("prefill", priority=1)
        self._lane = lane
        self._swap = swap
        if swap is not None:
            self._swap_stream = device.stream("swap", priority=1)
        self._inbox = inbox
        self._sampler = sampler

    async def run(self) -> None:
        while True:
            for plan in await self._inbox.recv_batch():
                self.handle(plan)

    def handle(self, plan: PrefillInbox) -> None:
        if isinstance(plan, SwapPlan):
            self.swap(plan)
        else:
            self.launch(plan)

    def launch(self, plan: PrefillPlan) -> None:
        output = StepOutput()
        self._device.launch(self._stream, partial(output.run, partial(self._lane.run, plan, output)))
        sampled, logits_index = np.unique(plan.join_of, return_inverse=True)
        self._sampler.send_nowait(
            LogitsReady(
                lane=Lane.PREFILL,
                step=plan.step,
                seqs=[join.seq for join in plan.joins],
                rows=np.array([join.row for join in plan.joins], dtype=np.int32),
                logits_index=None if len(sampled) == len(plan.joins) else logits_index.astype(np.int64),
                joins=plan.joins,
                output=output,
                stream=self._stream,
            )
        )

    def swap(self, plan: SwapPlan) -> None:
        """Nothing is sampled behind it; the sampler reports it like any step."""
        assert self._swap is not None, "a swap was planned without a lane for it"
        output = StepOutput()
        self._device.launch(self._swap_stream, partial(output.run, partial(self._swap.run, plan)))
        self._sampler.send_nowait(
            LogitsReady(
                lane=Lane.SWAP,
                step=plan.step,
                seqs=[],
                rows=_NO_ROWS,
                logits_index=None,
                joins=(),
                output=output,
                stream=self._swap_stream,
            )
        )
