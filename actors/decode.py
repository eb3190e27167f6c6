"""Decode: computes the next token of every sequence in its batch, one step after the other, on its own stream."""

from collections import deque
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

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
        self._positions = np.zeros(tokens.max_rows, dtype=np.int64)  # [max_rows], of rows outside `_columns`
        self._columns = _Columns(np.empty(0, dtype=np.int32), self._positions[:0], tables)
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
        self._advance(plan)
        columns = self._columns
        batch = len(plan.rows)
        output.logits = self._model.forward(
            ForwardBatch(
                tokens=torch.from_numpy(self._tokens.gather(plan.rows)),
                positions=columns.positions_tensor,
                slot_mapping=columns.slots_tensor,
                query_starts=self._starts[: batch + 1],
                context_lens=columns.context_lens_tensor,
                block_tables=columns.block_tables_tensor,
                logits_indices=self._ramp[:batch],
                max_query_len=1,
                max_context_len=columns.longest,
                logits_out=self._logits,
            ),
            self._kv,
        )

    def _advance(self, plan: DecodePlan) -> None:
        """Takes the columns to the next position, or makes new ones where rows or block tables have changed."""
        columns = self._columns
        if plan.rows is columns.rows and not len(plan.blocks.rows):
            columns.advance()
            return
        self._tables.apply(plan.blocks)
        self._positions[columns.rows] = columns.positions + 1
        self._positions[plan.joined_rows] = plan.joined_positions
        self._columns = _Columns(plan.rows, self._positions[plan.rows], self._tables)


class _Columns:
    """What a step knows of each row. As long as the batch keeps its rows and blocks, the next step is this one, moved
    on in place by one position: most of the cost of a small step would be in making these arrays anew."""

    def __init__(self, rows: NDArray[np.int32], positions: NDArray[np.int64], tables: BlockTables) -> None:
        self.rows = rows
        self.positions = positions  # [batch]
        self.longest = int(positions.max(initial=-1)) + 1  # the longest context
        self._slots = tables.slots(rows, positions, BLOCK_SIZE)  # [batch]
        self._context_lens = (positions + 1).astype(np.int32)  # [batch]
        self.positions_tensor = torch.from_numpy(positions)
        self.slots_tensor = torch.from_numpy(self._slots)
        self.context_lens_tensor = torch.from_numpy(self._context_lens)
        self.block_tables_tensor = torch.from_numpy(tables.gather(rows, -(-self.longest // BLOCK_SIZE)))

    def advance(self) -> None:
        """No row may enter a block that it had not: that would have come with an update of its table."""
        self.longest += 1
        self.positions += 1
        self._slots += 1
        self._context_lens += 1
