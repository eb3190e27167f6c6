"""What runs in stream order behind prefill, decode and the sampler: from a plan to a forward pass, and from logits to
tokens. An actor decides when a step is launched and says what came of it; its lane does the step.

The lanes here compute where the event loop's process computes, on the CPU, with numpy's arrays. `runtime/cuda/` has
those that only enqueue work for a GPU.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from millrace.runtime.device import StepOutput
from millrace.runtime.kv.tables import BlockTables
from millrace.runtime.messages import DecodePlan, LogitsReady, PrefillPlan, PromptLogprobs, SampleJoin, SwapPlan
from millrace.runtime.models.base import ArrayT, ForwardBatch, Model
from millrace.runtime.sampling.batch import SamplerState
from millrace.runtime.sampling.logprobs import prompt_logprobs
from millrace.runtime.sampling.rows import TokenRows
from millrace.runtime.types import BLOCK_SIZE, SamplingParams, choice_of

PLAIN = SamplingParams(temperature=0.0)  # cannot fail: for a row whose own parameters did
_NO_TOKENS = np.empty(0, dtype=np.int32)

HostModel = Model[NDArray[Any]]


class PrefillLane(Protocol):
    def run(self, plan: PrefillPlan, output: StepOutput) -> None:
        """Computes the chunks; leaves logits [num sequences that are done, vocab_size] in `output.logits`, and the
        prompt log probabilities that were asked for."""


class DecodeLane(Protocol):
    def run(self, plan: DecodePlan, output: StepOutput) -> None:
        """Computes one token for each row; leaves logits [batch, vocab_size] in `output.logits`."""


class SamplingLane(Protocol):
    @property
    def max_rows(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...

    def run(self, ready: LogitsReady) -> None:
        """Draws a token for each row from `ready.output.logits`, and leaves it where the next decode step reads it;
        what was drawn stands in `ready.output.sampled` once the output is finished."""


class SwapLane(Protocol):
    @property
    def num_slots(self) -> int: ...
    @property
    def block_seconds(self) -> float:
        """What it takes to copy one block to the host and back."""

    def run(self, plan: SwapPlan) -> None:
        """Copies blocks of all layers to slots of host memory, or back."""


class Lanes(NamedTuple):
    """The lanes of one engine; they share KV storage and the last token of every row."""

    prefill: PrefillLane
    decode: DecodeLane
    sampling: SamplingLane
    swap: SwapLane | None = None  # None: what a preempted sequence had is computed again


def host_lanes(model: HostModel, num_blocks: int, max_rows: int, max_model_len: int) -> Lanes:
    """Lanes on the CPU, with their storage."""
    kv = model.allocate_kv(num_blocks)
    max_blocks = -(-max_model_len // BLOCK_SIZE)
    tokens = TokenRows(max_rows)
    return Lanes(
        HostPrefill(model, kv, BlockTables(max_rows, max_blocks)),
        HostDecode(model, kv, BlockTables(max_rows, max_blocks), tokens),
        HostSampling(SamplerState(max_rows, model.spec.vocab_size, model.spec.eos_token_ids), tokens),
    )


class Chunks(NamedTuple):
    """A prefill plan as the columns of a forward pass, on the host. Several forward passes may share its work."""

    tokens: NDArray[np.int64]  # [num_tokens]
    positions: NDArray[np.int64]  # [num_tokens]
    slot_mapping: NDArray[np.int64]  # [num_tokens]
    query_starts: NDArray[np.int32]  # [num_seqs + 1]
    context_lens: NDArray[np.int32]  # [num_seqs]
    block_tables: NDArray[np.int32]  # [num_seqs, max_blocks]
    logits_indices: NDArray[np.int64]  # [num_logits]

    @staticmethod
    def of(plan: PrefillPlan, tables: BlockTables) -> "Chunks":
        """Logits are wanted of the last token of each sequence that draws, and behind those of every token whose
        prompt log probabilities are."""
        lengths = plan.lengths
        ends = plan.starts + lengths  # [num_seqs]
        query_starts = np.zeros(len(lengths) + 1, dtype=np.int32)
        np.cumsum(lengths, out=query_starts[1:])
        positions = np.arange(len(plan.tokens), dtype=np.int64) + np.repeat(plan.starts - query_starts[:-1], lengths)
        last_tokens = query_starts[1:][np.unique(plan.join_of)] - 1
        wanted = [np.arange(query_starts[i], query_starts[i + 1]) for i in np.flatnonzero(plan.prompt_logprobs >= 0)]
        return Chunks(
            tokens=plan.tokens.astype(np.int64),
            positions=positions,
            slot_mapping=tables.slots(np.repeat(plan.rows, lengths), positions, BLOCK_SIZE),
            query_starts=query_starts,
            context_lens=ends.astype(np.int32),
            block_tables=tables.gather(plan.rows, -(-int(ends.max()) // BLOCK_SIZE)),
            logits_indices=np.concatenate([last_tokens, *wanted]).astype(np.int64),
        )

    def batch(
        self, columns: Mapping[str, ArrayT], host: tuple[Sequence[int], Sequence[int]] | None = None
    ) -> ForwardBatch[ArrayT]:
        """The forward pass over these columns, which are given by name as arrays of the model's."""
        return ForwardBatch(
            tokens=columns["tokens"],
            positions=columns["positions"],
            slot_mapping=columns["slot_mapping"],
            query_starts=columns["query_starts"],
            context_lens=columns["context_lens"],
            block_tables=columns["block_tables"],
            logits_indices=columns["logits_indices"],
            max_query_len=int(np.diff(self.query_starts).max()),
            max_context_len=int(self.context_lens.max()),
            host=host,
        )


class Scored(NamedTuple):
    """A chunk whose prompt log probabilities are wanted."""

    seq: int
    start: int  # position of the chunk's first token
    row: int  # of the logits, of its first token
    following: NDArray[np.int32]  # [n], the token behind each position; the last prompt token has none
    num_top: int


def scored_chunks(plan: PrefillPlan) -> list[Scored]:
    """What to score of a plan, against the logits that `Chunks.of` asks for."""
    row = len(np.unique(plan.join_of))
    found = []
    bounds = np.concatenate([[0], np.cumsum(plan.lengths)])
    for i in np.flatnonzero(plan.prompt_logprobs >= 0).tolist():
        following = np.append(plan.tokens[bounds[i] + 1 : bounds[i + 1]], plan.next_tokens[i])
        if plan.next_tokens[i] < 0:
            following = following[:-1]
        top = int(plan.prompt_logprobs[i])
        found.append(Scored(plan.seqs[i], int(plan.starts[i]), row, following.astype(np.int32), top))
        row += int(plan.lengths[i])
    return found


class HostPrefill:
    """Owns the block tables of the prompts in flight."""

    def __init__(self, model: HostModel, kv: Any, tables: BlockTables) -> None:
        self._model = model
        self._kv = kv
        self._tables = tables

    def run(self, plan: PrefillPlan, output: StepOutput) -> None:
        self._tables.apply(plan.blocks)
        chunks = Chunks.of(plan, self._tables)
        logits = self._model.forward(chunks.batch(chunks._asdict()), self._kv)
        output.logits = logits[: len(np.unique(plan.join_of))]
        scores = []
        for scored in scored_chunks(plan):
            rows = logits[scored.row : scored.row + len(scored.following)]
            found = prompt_logprobs(rows, scored.following, scored.num_top)
            scores.append(PromptLogprobs(scored.seq, scored.start, scored.following, found))
        output.prompt_logprobs = tuple(scores)


class HostDecode:
    """Owns the device batch: position and block table of every row."""

    def __init__(self, model: HostModel, kv: Any, tables: BlockTables, tokens: TokenRows) -> None:
        self._model = model
        self._kv = kv
        self._tables = tables
        self._tokens = tokens
        self._positions = np.zeros(tokens.max_rows, dtype=np.int64)  # [max_rows], of rows outside `_columns`
        ramp = np.arange(tokens.max_rows + 1, dtype=np.int32)  # 0, 1, 2, ...: one query token per sequence
        self._query_starts, self._logits_indices = ramp, ramp[:-1].astype(np.int64)
        # Sampling reads a step's logits before the next step is computed. Pages are committed as rows are first used.
        self._logits = np.empty((tokens.max_rows, model.spec.vocab_size), dtype=np.float32)
        self._columns = self._make_columns(np.empty(0, dtype=np.int32))

    def run(self, plan: DecodePlan, output: StepOutput) -> None:
        if plan.copies is not None:
            self._model.copy_blocks(self._kv, plan.copies.source, plan.copies.target)
        self._advance(plan)
        batch = self._columns.batch
        self._tokens.gather(plan.rows, batch.tokens)
        output.logits = self._model.forward(batch, self._kv)

    def _advance(self, plan: DecodePlan) -> None:
        """Takes the columns to the next position, or makes new ones where rows or block tables have changed."""
        columns = self._columns
        if plan.rows is columns.rows and not len(plan.blocks.rows):
            columns.advance()
            return
        self._tables.apply(plan.blocks)
        self._positions[columns.rows] = columns.batch.positions + 1
        self._positions[plan.joined_rows] = plan.joined_positions
        self._columns = self._make_columns(plan.rows)

    def _make_columns(self, rows: NDArray[np.int32]) -> "_Columns":
        count, positions = len(rows), self._positions[rows]
        longest = int(positions.max(initial=-1)) + 1
        batch = ForwardBatch[NDArray[Any]](
            tokens=np.empty(count, dtype=np.int64),
            positions=positions,
            slot_mapping=self._tables.slots(rows, positions, BLOCK_SIZE),
            query_starts=self._query_starts[: count + 1],
            context_lens=(positions + 1).astype(np.int32),
            block_tables=self._tables.gather(rows, -(-longest // BLOCK_SIZE)),
            logits_indices=self._logits_indices[:count],
            max_query_len=1,
            max_context_len=longest,
            is_decode=True,
            logits_out=self._logits,
        )
        return _Columns(rows, batch)


class _Columns(NamedTuple):
    """What a step knows of each row. As long as the batch keeps its rows and blocks, the next step is this one, moved
    on in place by one position: most of the cost of a small step would be in making these arrays anew."""

    rows: NDArray[np.int32]
    batch: ForwardBatch[NDArray[Any]]

    def advance(self) -> None:
        """No row may enter a block that it had not: that would have come with an update of its table."""
        batch = self.batch
        batch.max_context_len += 1
        batch.positions += 1
        batch.slot_mapping += 1
        batch.context_lens += 1


class HostSampling:
    """Owns the sampling state of all rows."""

    def __init__(self, state: SamplerState, tokens: TokenRows) -> None:
        self.max_rows = state.max_rows
        self.vocab_size = state.vocab_size
        self._state = state
        self._tokens = tokens
        self._joined: set[int] = set()

    def run(self, ready: LogitsReady) -> None:
        broken = {index: reason for index, join in enumerate(ready.joins) if (reason := self._join(join)) is not None}
        sampled = self._state.sample(ready.output.logits, ready.rows, ready.logits_index)
        if broken:
            sampled = msgspec.structs.replace(
                sampled,
                bad_rows=np.append(sampled.bad_rows, list(broken)).astype(np.int64),
                bad_reasons=(*sampled.bad_reasons, *broken.values()),
            )
        # A row with broken logits has no token; it has ended, and what is computed behind it is dropped.
        tokens = np.maximum(sampled.tokens, 0) if len(sampled.bad_rows) else sampled.tokens
        self._tokens.scatter(ready.rows, tokens)
        ready.output.sampled = sampled
        ready.output.logits = None

    def _join(self, join: SampleJoin) -> str | None:
        """Puts a sequence into its row. What goes wrong ends this sequence and not the step: then it says why, and the
        row takes part in this step with parameters that cannot fail."""
        if join.row in self._joined:
            self._joined.remove(join.row)
            self._state.leave(join.row)
        reason = None
        try:
            self._state.join(join.row, join.sampling, join.seed, choice_of(join.seq), join.prompt, join.output)
        except Exception as error:
            reason = f"the sampling parameters cannot be used ({type(error).__name__})"
            self._state.join(join.row, PLAIN, 0, 0, _NO_TOKENS, _NO_TOKENS)
        self._joined.add(join.row)
        return reason
