"""Decode: computes the next token of every sequence in its batch, one step after the other, on its own stream."""

from collections import deque
from functools import partial

import numpy as np
import torch

from millrace.runtime.channel import Receiver, Sender
from millrace.runtime.device import Device, StepOutput
from millrace.runtime.kv.tables import BlockTables
from millrace.runtime.messages import DecodeInbox, DecodePlan, LogitsReady, RowsReady, SamplerInbox
from millrace.runtime.models.base import ForwardBatch, Model
from millrace.runtime.sampling.rows import TokenRows
from millrace.runtime.types import BLOCK_SIZE, Lane


class Decode:
    """Owns the device batch: position and block table of every row.

    A step reads the tokens that the step before it has drawn, from the rows that the sampler writes on the device. So a
    plan is launched once it is there *and* sampling of the step before it is launched (`RowsReady`): two plans in the
    inbox must never become two launches without the sampling between them.
    """

    def __init__(
        self,
        *,
        device: Device,
        model: Model,
        kv: object,
        tables: BlockTables,
        tokens: TokenRows,
        inbox: Receiver[DecodeInbox],
        sampler: Sender[SamplerInbox],
    ) -> None:
        self._device = device
        self._stream = device.stream("decode", priority=0)
        self._model = model
        self._kv = kv
        self._tables = tables
        self._tokens = tokens
        self._positions = np.zeros(tokens.max_rows, dtype=np.int64)  # [max_rows], of the next input token
        self._ramp = torch.arange(tokens.max_rows, dtype=torch.int64)  # 0, 1, 2, ...: logits of every row
        self._starts = torch.arange(tokens.max_rows + 1, dtype=torch.int32)  # one query token per sequence
        # Sampling reads a step's logits before the next step is computed. Pages are committed as rows are first used.
        self._logits = torch.empty(tokens.max_rows, model.spec.vocab_size)  # [max_rows, vocab_size]
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
        self._device.launch(self._stream, partial(output.run, partial(self._forward, plan, output)))
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

    def _forward(self, plan: DecodePlan, output: StepOutput) -> None:
        """In stream order: one token for each row; leaves logits [batch, vocab_size]."""
        if plan.copies is not None:
            source, target = torch.from_numpy(plan.copies.source), torch.from_numpy(plan.copies.target)
            self._model.copy_blocks(self._kv, source, target)
        self._tables.apply(plan.blocks)
        self._positions[plan.joined_rows] = plan.joined_positions
        rows = plan.rows
        batch = len(rows)
        positions = self._positions[rows]  # [batch]
        longest = int(positions.max()) + 1
        output.logits = self._model.forward(
            ForwardBatch(
                tokens=torch.from_numpy(self._tokens.gather(rows)),
                positions=torch.from_numpy(positions),
                slot_mapping=torch.from_numpy(self._tables.slots(rows, positions, BLOCK_SIZE)),
                query_starts=self._starts[: batch + 1],
                context_lens=torch.from_numpy((positions + 1).astype(np.int32)),
                block_tables=torch.from_numpy(self._tables.gather(rows, -(-longest // BLOCK_SIZE))),
                logits_indices=self._ramp[:batch],
                max_query_len=1,
                max_context_len=longest,
                logits_out=self._logits,
            ),
            self._kv,
        )
        self._positions[rows] += 1
