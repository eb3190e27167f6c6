"""Decode on a GPU: the batch lives on the device, and a step is one graph launch behind the differences of its plan."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from millrace.runtime.cuda.driver import CudaDriver
from millrace.runtime.cuda.graphs import DecodeGraphs, buckets
from millrace.runtime.cuda.memory import in_halves
from millrace.runtime.cuda.rows import DeviceRows
from millrace.runtime.cuda.staging import PinnedRing, Upload
from millrace.runtime.device import StepOutput
from millrace.runtime.messages import DecodePlan
from millrace.runtime.models.base import ForwardBatch, Model
from millrace.runtime.types import BLOCK_SIZE


class DecodeState:
    """What a step reads and writes on the device, at addresses that graphs can hold.

    Row `max_rows` belongs to nobody and fills the places of a graph behind the batch: its token is 0 at position 0, and
    its key and value go into the null block, which is all that it attends to.
    """

    def __init__(self, rows: DeviceRows, max_blocks: int, device: torch.device) -> None:
        count = rows.max_rows + 1
        self.last_tokens = rows.last_tokens  # [max_rows + 1] int64
        self.positions = torch.zeros(count, dtype=torch.int64, device=device)  # of the next input token
        self.tables = torch.zeros(count, max_blocks, dtype=torch.int32, device=device)
        self.advance = torch.ones(count, dtype=torch.int64, device=device)
        self.advance[-1] = 0
        self.batch = torch.full((rows.max_rows,), rows.max_rows, dtype=torch.int64, device=device)  # rows of the step
        self.starts = torch.arange(count, dtype=torch.int32, device=device)  # one query token per sequence
        self.ramp = torch.arange(rows.max_rows, dtype=torch.int64, device=device)
        self.max_context_len = max_blocks * BLOCK_SIZE

    def apply(self, columns: dict[str, Tensor]) -> None:
        """The differences of a plan: new entries of block tables, who joins where, and the rows if they changed."""
        if "blocks" in columns:
            self.tables.index_put_((columns["block_rows"], columns["block_indices"]), columns["blocks"])
        if "joined_rows" in columns:
            self.positions.index_copy_(0, columns["joined_rows"], columns["joined_positions"])
        if "batch" in columns:
            self.batch[: len(columns["batch"])].copy_(columns["batch"])

    def step(self, model: Model[Tensor], kv: Any, first: int, last: int) -> Tensor:
        """One token for the places first to last - 1 of the batch; logits [last - first, vocab_size]."""
        rows, count = self.batch[first:last], last - first
        tables = self.tables.index_select(0, rows)  # [count, max_blocks]
        positions = self.positions.index_select(0, rows)
        block = tables.gather(1, (positions // BLOCK_SIZE)[:, None])[:, 0]
        logits = model.forward(
            ForwardBatch[Tensor](
                tokens=self.last_tokens.index_select(0, rows),
                positions=positions,
                slot_mapping=block.long() * BLOCK_SIZE + positions % BLOCK_SIZE,
                query_starts=self.starts[: count + 1],
                context_lens=(positions + 1).int(),
                block_tables=tables,
                logits_indices=self.ramp[:count],
                max_query_len=1,
                max_context_len=self.max_context_len,
                is_decode=True,
            ),
            kv,
        )
        self.positions.index_copy_(0, rows, positions + self.advance.index_select(0, rows))
        return logits


class CudaDecode:
    """Owns the device batch: implements millrace.runtime.lanes.DecodeLane."""

    def __init__(
        self,
        driver: CudaDriver,
        ring: PinnedRing,
        model: Model[Tensor],
        kv: Any,
        rows: DeviceRows,
        max_blocks: int,
        *,
        use_graphs: bool = True,
    ) -> None:
        self._driver = driver
        self._ring = ring
        self._model = model
        self._kv = kv
        self._rows = rows
        self._state = state = DecodeState(rows, max_blocks, driver.device)
        self._batch: NDArray[np.int32] | None = None  # the rows that the device has
        sizes = buckets(rows.max_rows) if use_graphs else ()
        self.graphs = DecodeGraphs(driver, sizes, lambda size: state.step(model, kv, 0, size))

    def warm_up(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """On the lane's thread, before the first step: captures the graphs."""
        self.graphs.capture(progress)

    def run(self, plan: DecodePlan, output: StepOutput) -> None:
        batch = len(plan.rows)
        size = self.graphs.holding(batch)
        columns: dict[str, NDArray[Any]] = {}
        if plan.rows is not self._batch:  # the scheduler makes a new column when the batch changes, and only then
            columns["batch"] = np.full(size or batch, self._rows.max_rows, dtype=np.int64)
            columns["batch"][:batch] = plan.rows
        if len(plan.blocks.rows):
            columns |= {
                "block_rows": plan.blocks.rows.astype(np.int64),
                "block_indices": plan.blocks.indices.astype(np.int64),
                "blocks": plan.blocks.blocks.astype(np.int32),
            }
        if len(plan.joined_rows):
            columns |= {
                "joined_rows": plan.joined_rows.astype(np.int64),
                "joined_positions": plan.joined_positions.astype(np.int64),
            }
        upload = self._ring.upload(columns, output) if columns else None
        # What the prefill stream has left of those who join: keys, values, sampling state, the first token.
        for event in self._rows.claim(plan.joined_rows.tolist()):
            self._driver.wait(event)
        self._batch = None  # until this step is enqueued: one that fails may have come to anything
        self._driver.enqueue(partial(self._compute, plan, upload, size, output))
        self._batch = plan.rows

    def _compute(self, plan: DecodePlan, upload: Upload | None, size: int | None, output: StepOutput) -> None:
        if plan.copies is not None:
            # The lists stay on the host: the kernel takes them in its argument record.
            source, target = torch.from_numpy(plan.copies.source), torch.from_numpy(plan.copies.target)
            self._model.copy_blocks(self._kv, source, target)
        if upload is not None:
            self._state.apply(upload.run())
        batch = len(plan.rows)
        if size is not None:
            output.logits = self.graphs.replay(size)[:batch]
            return
        logits: list[Tensor] = []

        def compute(places: Sequence[int]) -> None:
            found = self._state.step(self._model, self._kv, places[0], places[-1] + 1)
            if len(places) == batch:
                logits[:] = [found]
                return
            if not logits:
                logits.append(found.new_zeros(batch, found.shape[1]))
            logits[0][places[0] : places[-1] + 1] = found

        for place, error in in_halves(self._driver, range(batch), compute):
            output.failed[plan.seqs[place]] = error
        if not logits:
            logits.append(torch.zeros(batch, self._model.spec.vocab_size, device=self._driver.device))
        output.logits = logits[0]
