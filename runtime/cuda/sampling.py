"""Sampling on a GPU: two launches behind the logits; ids stay there, and reach the host with the step."""

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from millrace.kernels import cuda_sampling
from millrace.kernels.cuda_launch import Launcher
from millrace.kernels.cuda_sampling import RowSettings, SampleBuffers, SamplerTables
from millrace.runtime.cuda.driver import CudaDriver
from millrace.runtime.cuda.rows import DeviceRows
from millrace.runtime.cuda.staging import PinnedRing, Upload
from millrace.runtime.device import StepOutput
from millrace.runtime.messages import LogitsReady, LogprobColumns, SampleJoin
from millrace.runtime.sampling.batch import Sampled
from millrace.runtime.types import Lane, SamplingParams, choice_of

_LANES = (Lane.PREFILL, Lane.DECODE)
_PLAIN = RowSettings(seed=0, temperature=0.0)  # cannot fail: for a row whose own parameters did


class CudaSampling:
    """Owns the sampling state of all rows: implements millrace.runtime.lanes.SamplingLane.

    Rows change hands on the prefill stream alone; a row that joins there has left every launched decode step. Each lane
    has scratch of its own, because both streams sample at the same time.
    """

    def __init__(
        self,
        driver: CudaDriver,
        ring: PinnedRing,
        launcher: Launcher,
        tables: SamplerTables,
        rows: DeviceRows,
        eos_token_ids: tuple[int, ...],
        max_logprobs: int,
    ) -> None:
        self.max_rows = rows.max_rows
        self.vocab_size = tables.vocab_size
        self._driver = driver
        self._ring = ring
        self._launcher = launcher
        self._tables = tables
        self._rows = rows
        self._eos = eos_token_ids
        top = max(max_logprobs, 1)
        self._buffers = {lane: SampleBuffers.allocate(rows.max_rows, tables, top) for lane in _LANES}
        self._known = {lane: _KnownRows() for lane in _LANES}
        # On the host: which rows want log probabilities, [max_rows], and who has joined.
        self._num_logprobs = np.full(rows.max_rows, -1, dtype=np.int32)
        self._joined: set[int] = set()

    def run(self, ready: LogitsReady) -> None:
        output = ready.output
        known = self._known[ready.lane]
        columns: dict[str, NDArray[Any]] = {}
        if known.host is not ready.rows:  # decode has the same column of rows for many steps
            columns["rows"] = ready.rows.astype(np.int32)
        if ready.logits_index is not None:
            columns["logits_index"] = ready.logits_index.astype(np.int32)
        for join in ready.joins:
            wanted = join.sampling.logprobs
            self._num_logprobs[join.row] = -1 if wanted is None else wanted
        asked = np.flatnonzero(self._num_logprobs[ready.rows] >= 0)
        num_top = self._num_logprobs[ready.rows[asked]]
        results = _Results.take(self._ring, output, len(ready.rows), int(num_top.max(initial=0)), len(asked) > 0)
        broken: dict[int, str] = {}
        upload = self._ring.upload(columns, output) if columns else None
        known.host = None  # until this step is enqueued
        self._driver.enqueue(partial(self._compute, ready, upload, results, broken))
        known.host = ready.rows
        if ready.lane is Lane.PREFILL:
            self._rows.hand_over(ready.rows.tolist(), self._driver.record())
        output.at_end.append(partial(_read, output, results, asked, num_top, broken))

    def _compute(self, ready: LogitsReady, upload: Upload | None, results: "_Results", broken: dict[int, str]) -> None:
        for index, join in enumerate(ready.joins):
            reason = self._join(join)
            if reason is not None:
                broken[index] = reason
        columns = {} if upload is None else upload.run()
        rows = self._known[ready.lane].device = columns.get("rows", self._known[ready.lane].device)
        assert rows is not None
        buffers = self._buffers[ready.lane]
        cuda_sampling.sample(
            self._launcher,
            self._tables,
            buffers,
            ready.output.logits,
            rows,
            columns.get("logits_index"),
            stream=self._driver.current(),
        )
        ready.output.logits = None
        results.copy(buffers)

    def _join(self, join: SampleJoin) -> str | None:
        """Puts a sequence into its row. What goes wrong ends this sequence and not the step: then it says why, and the
        row takes part in this step with parameters that cannot fail."""
        if join.row in self._joined:
            self._joined.remove(join.row)
            self._tables.leave(join.row)
        reason = None
        try:
            settings = row_settings(join.sampling, join.seed, choice_of(join.seq), self._eos)
            left = max(0, join.max_new_tokens - len(join.output)) + 2  # steps launched behind the last token
            self._tables.join(join.row, settings, join.prompt.tolist(), join.output.tolist(), left)
        except torch.OutOfMemoryError:
            reason = "the GPU has no memory left for the sampling parameters"
        except Exception as error:
            reason = f"the sampling parameters cannot be used ({type(error).__name__})"
        if reason is not None:
            self._tables.join(join.row, _PLAIN)
        self._joined.add(join.row)
        return reason


def row_settings(params: SamplingParams, seed: int, choice: int, eos_token_ids: tuple[int, ...]) -> RowSettings:
    """A request's parameters as the kernels take them."""
    held = set(params.stop_token_ids) | (set() if params.ignore_eos else set(eos_token_ids))
    return RowSettings(
        seed=seed,
        choice=choice,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=dict(params.logit_bias),
        allowed=None if params.allowed_token_ids is None else tuple(params.allowed_token_ids),
        banned=tuple(params.banned_token_ids),
        held=tuple(sorted(held)) if params.min_tokens else (),
        min_tokens=params.min_tokens,
        num_logprobs=-1 if params.logprobs is None else params.logprobs,
    )


class _KnownRows:
    """The rows of a lane's last step: the scheduler's own column, and its copy on the device."""

    def __init__(self) -> None:
        self.host: NDArray[Any] | None = None
        self.device: Tensor | None = None  # [num_rows] int32


class _Results(NamedTuple):
    """Pinned memory for what a step draws."""

    tokens: Tensor  # [num_rows] int32
    codes: Tensor  # [num_rows] int32
    logprobs: Tensor | None  # [num_rows] float32; None where no row asked
    num_top: Tensor | None  # [num_rows] int32
    top_ids: Tensor | None  # [num_rows, max_top] int32
    top_logprobs: Tensor | None  # [num_rows, max_top] float32

    @staticmethod
    def take(ring: PinnedRing, output: StepOutput, num_rows: int, max_top: int, wanted: bool) -> "_Results":
        words = num_rows * (4 + 2 * max_top if wanted else 2)
        flat = ring.take(4 * max(words, 1), output)[: 4 * words].view(torch.int32)
        tokens, codes, rest = torch.split(flat, [num_rows, num_rows, words - 2 * num_rows])
        if not wanted:
            return _Results(tokens, codes, None, None, None, None)
        logprobs, found, ids, tops = torch.split(rest, [num_rows, num_rows, num_rows * max_top, num_rows * max_top])
        return _Results(
            tokens,
            codes,
            logprobs.view(torch.float32),
            found,
            ids.view(num_rows, max_top),
            tops.view(torch.float32).view(num_rows, max_top),
        )

    def copy(self, buffers: SampleBuffers) -> None:
        """Within `CudaDriver.enqueue`."""
        count = len(self.tokens)
        self.tokens.copy_(buffers.tokens[:count], non_blocking=True)
        self.codes.copy_(buffers.codes[:count], non_blocking=True)
        if self.logprobs is None or self.num_top is None or self.top_ids is None or self.top_logprobs is None:
            return
        self.logprobs.copy_(buffers.logprobs[:count], non_blocking=True)
        self.num_top.copy_(buffers.num_top[:count], non_blocking=True)
        width = self.top_ids.shape[1]
        if width:
            # Dense on the device first: a copy of columns to the host would be one small copy for each row.
            self.top_ids.copy_(buffers.top_ids[:count, :width].contiguous(), non_blocking=True)
            self.top_logprobs.copy_(buffers.top_logprobs[:count, :width].contiguous(), non_blocking=True)


def _read(
    output: StepOutput,
    results: _Results,
    asked: NDArray[np.int64],
    num_top: NDArray[np.int32],
    broken: dict[int, str],
) -> None:
    """When the device has done the step: what was drawn, out of memory that goes back afterwards."""
    codes = results.codes.numpy()
    bad = {int(index): cuda_sampling.CODES[codes[index]] for index in np.flatnonzero(codes)} | broken
    logprobs = None
    drew = np.isin(asked, list(bad), invert=True)
    asked, num_top = asked[drew], num_top[drew]
    if len(asked) and results.logprobs is not None and results.num_top is not None:
        assert results.top_ids is not None and results.top_logprobs is not None
        width = int(num_top.max())
        found = np.minimum(results.num_top.numpy()[asked], num_top)
        kept = np.arange(width) < found[:, None]
        logprobs = LogprobColumns(
            index=asked.astype(np.int32),
            logprobs=results.logprobs.numpy()[asked],
            num_top=found,
            top_ids=np.where(kept, results.top_ids.numpy()[asked, :width], -1).astype(np.int32),
            top_logprobs=np.where(kept, results.top_logprobs.numpy()[asked, :width], -np.inf).astype(np.float32),
        )
    output.sampled = Sampled(
        tokens=results.tokens.numpy().copy(),
        logprobs=logprobs,
        bad_rows=np.array(list(bad), dtype=np.int64),
        bad_reasons=tuple(bad.values()),
    )
