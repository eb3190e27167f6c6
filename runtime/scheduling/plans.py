"""From the scheduler's records to the columns of a plan."""

import itertools
from typing import NamedTuple

import numpy as np

from millrace.runtime.messages import BlockCopies, BlockUpdates, DecodePlan, PrefillPlan, SampleJoin
from millrace.runtime.scheduling.batch import DecodeBatch
from millrace.runtime.scheduling.records import Sequence, Step
from millrace.runtime.scheduling.residency import Rows

_EMPTY = np.empty(0, dtype=np.int32)

Update = tuple[int, int, list[int]]  # (row, first index, blocks) of a block table
Copy = tuple[Sequence, int, int]  # (for whom, source block, target block)


class Chunk(NamedTuple):
    """Positions start to end - 1 of one sequence's prompt."""

    sequence: Sequence
    start: int
    end: int


def prefill_plan(step: int, chunks: list[Chunk], drawing: list[list[Sequence]], rows: Rows) -> tuple[Step, PrefillPlan]:
    """One prefill step.

    Args:
        drawing: for each chunk the sequences that draw their first token from its end; empty before the last chunk.
    """
    named = [(chunk.sequence, chunk.end) for chunk in chunks]
    joins: list[SampleJoin] = []
    join_of: list[int] = []
    for index, (chunk, sequences) in enumerate(zip(chunks, drawing, strict=True)):
        joins += [_sample_join(sequence, rows) for sequence in sequences]
        join_of += [index] * len(sequences)
        named += [(sequence, chunk.end) for sequence in sequences if sequence is not chunk.sequence]
    fresh = [chunk.sequence for chunk in chunks if not chunk.sequence.announced]
    for sequence in fresh:
        sequence.announced = True
    lengths = [chunk.end - chunk.start for chunk in chunks]
    record = Step(
        rows=_ints([sequence.row for sequence, _ in named]),
        sequences=[sequence for sequence, _ in named],
        num_tokens=sum(lengths),
        ends=np.array([end for _, end in named], dtype=np.int64),
    )
    plan = PrefillPlan(
        step=step,
        seqs=[chunk.sequence.seq for chunk in chunks],
        rows=_ints([chunk.sequence.row for chunk in chunks]),
        starts=_ints([chunk.start for chunk in chunks]),
        lengths=_ints(lengths),
        tokens=np.concatenate([rows.history[chunk.sequence.row, chunk.start : chunk.end] for chunk in chunks]),
        prompt_logprobs=_ints([_prompt_logprobs(chunk.sequence, rows) for chunk in chunks]),
        next_tokens=_ints([_next_token(chunk, rows) for chunk in chunks]),
        blocks=_block_updates([(sequence.row, 0, sequence.table) for sequence in fresh]),
        joins=tuple(joins),
        join_of=_ints(join_of),
    )
    return record, plan


def decode_plan(
    step: int, batch: DecodeBatch, joined: list[Sequence], updates: list[Update], copies: list[Copy], rows: Rows
) -> DecodePlan:
    """One decode step of the whole batch, as differences to the one before."""
    joined_rows = _ints([sequence.row for sequence in joined]) if joined else _EMPTY
    return DecodePlan(
        step=step,
        seqs=batch.seqs,
        rows=batch.rows,
        joined_rows=joined_rows,
        joined_positions=rows.computed[joined_rows].astype(np.int32) if joined else _EMPTY,
        blocks=_block_updates(updates),
        copies=BlockCopies(
            source=np.array([source for _, source, _ in copies], dtype=np.int64),
            target=np.array([target for _, _, target in copies], dtype=np.int64),
        )
        if copies
        else None,
    )


def _sample_join(sequence: Sequence, rows: Rows) -> SampleJoin:
    admitted = sequence.request.admitted
    row = sequence.row
    return SampleJoin(
        seq=sequence.seq,
        row=row,
        sampling=admitted.sampling,
        seed=admitted.seed,
        max_new_tokens=admitted.max_new_tokens,
        prompt=admitted.prompt,
        output=rows.history[row, len(admitted.prompt) : rows.known[row]].copy(),
    )


def _prompt_logprobs(sequence: Sequence, rows: Rows) -> int:
    """Alternatives wanted, -1 for none: they are not reported again once the sequence has output."""
    wanted = sequence.request.admitted.sampling.prompt_logprobs
    first_time = rows.known[sequence.row] == len(sequence.request.admitted.prompt)
    return wanted if wanted is not None and first_time and sequence.choice == 0 else -1


def _next_token(chunk: Chunk, rows: Rows) -> int:
    row = chunk.sequence.row
    return int(rows.history[row, chunk.end]) if chunk.end < rows.known[row] else -1


def _ints(values: list[int]) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.array(values, dtype=np.int32)


def _block_updates(entries: list[Update]) -> BlockUpdates:
    """Columns from (row, first index, blocks)."""
    if not entries:
        return BlockUpdates(_EMPTY, _EMPTY, _EMPTY)
    counts = [len(blocks) for _, _, blocks in entries]
    rows = np.repeat(np.array([row for row, _, _ in entries], dtype=np.int32), counts)
    indices = [range(first, first + len(blocks)) for _, first, blocks in entries]
    return BlockUpdates(
        rows,
        np.fromiter(itertools.chain.from_iterable(indices), dtype=np.int32, count=len(rows)),
        np.fromiter(itertools.chain.from_iterable(blocks for _, _, blocks in entries), dtype=np.int32, count=len(rows)),
    )
