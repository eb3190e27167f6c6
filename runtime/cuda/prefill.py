"""Prefill on a GPU: chunks of prompts, launched op by op on a stream of their own."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from millrace.runtime.cuda.driver import CudaDriver
from millrace.runtime.cuda.memory import in_halves
from millrace.runtime.cuda.scores import PromptScores
from millrace.runtime.cuda.staging import PinnedRing, Upload
from millrace.runtime.device import StepOutput
from millrace.runtime.kv.tables import BlockTables
from millrace.runtime.lanes import Chunks, scored_chunks
from millrace.runtime.messages import PrefillPlan
from millrace.runtime.models.base import Model
from millrace.runtime.types import BLOCK_SIZE

REHEARSED_LOGITS = 64  # at least: scheduler.PROMPT_LOGPROB_CHUNK


class Piece(NamedTuple):
    """Tokens begin to end - 1 of the flat batch; all of them belong to one sequence."""

    seq: int
    begin: int
    end: int


class CudaPrefill:
    """Owns the block tables of the prompts in flight: implements millrace.runtime.lanes.PrefillLane."""

    def __init__(
        self, driver: CudaDriver, ring: PinnedRing, model: Model[Tensor], kv: Any, tables: BlockTables
    ) -> None:
        self._driver = driver
        self._ring = ring
        self._model = model
        self._kv = kv
        self._tables = tables

    def run(self, plan: PrefillPlan, output: StepOutput) -> None:
        self._tables.apply(plan.blocks)
        chunks = Chunks.of(plan, self._tables)
        upload = self._ring.upload(chunks._asdict(), output)
        scored = scored_chunks(plan)
        scores = [PromptScores(entry, self._model.spec.vocab_size, self._ring, output) for entry in scored]
        self._driver.enqueue(partial(self._compute, plan, chunks, upload, scores, output))
        if scores:
            output.at_end.append(partial(_read_scores, scores, output))

    def _compute(
        self, plan: PrefillPlan, chunks: Chunks, upload: Upload, scores: list[PromptScores], output: StepOutput
    ) -> None:
        bounds = chunks.query_starts.tolist()
        whole = [Piece(seq, bounds[seq], bounds[seq + 1]) for seq in range(len(plan.seqs))]
        logits: list[Tensor] = []

        def compute(pieces: Sequence[Piece]) -> None:
            if len(pieces) == len(whole) and pieces[0] == whole[0] and pieces[-1] == whole[-1]:
                logits[:] = [self._forward(chunks, upload.run())]
                return
            part, places = select(chunks, pieces)
            columns = {name: torch.from_numpy(value).to(self._driver.device) for name, value in part._asdict().items()}
            found = self._forward(part, columns)
            if not logits:
                logits.append(found.new_zeros(len(chunks.logits_indices), found.shape[1]))
            logits[0][torch.from_numpy(places).to(self._driver.device)] = found

        failed = in_halves(self._driver, whole, compute, _halves)
        for piece, error in failed:
            # Those who would draw from what is not there fail with it.
            drawing = [join.seq for join, chunk in zip(plan.joins, plan.join_of, strict=True) if chunk == piece.seq]
            output.failed.update(dict.fromkeys((plan.seqs[piece.seq], *drawing), error))
        if not logits:  # nothing at all fitted, and what is sampled from here is dropped
            logits.append(
                torch.zeros(len(chunks.logits_indices), self._model.spec.vocab_size, device=self._driver.device)
            )
        output.logits = logits[0][: len(np.unique(plan.join_of))]
        for score in scores:
            score.compute(logits[0])

    def rehearse(self, num_tokens: int, max_len: int, max_rows: int) -> None:
        """On the lane's thread, before any step: computes a step of that many tokens, in sequences of up to `max_len`,
        with as many logits as prompt log probabilities, or `max_rows` sequences that end their prompts together, ask
        for at a time. It writes from block 1 on, as many as they need."""
        num_logits = min(num_tokens, max(REHEARSED_LOGITS, max_rows))
        lengths = [min(max_len, num_tokens - at) for at in range(0, num_tokens, max_len)]
        width = -(-max(lengths) // BLOCK_SIZE)
        tables = 1 + np.arange(len(lengths) * width, dtype=np.int32).reshape(len(lengths), width)
        positions = np.concatenate([np.arange(length, dtype=np.int64) for length in lengths])
        owner = np.repeat(np.arange(len(lengths)), lengths)
        starts = np.zeros(len(lengths) + 1, dtype=np.int32)
        np.cumsum(lengths, out=starts[1:])
        chunks = Chunks(
            tokens=np.zeros(num_tokens, dtype=np.int64),
            positions=positions,
            slot_mapping=tables[owner, positions // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE + positions % BLOCK_SIZE,
            query_starts=starts,
            context_lens=np.array(lengths, dtype=np.int32),
            block_tables=tables,
            logits_indices=np.arange(num_tokens - num_logits, num_tokens, dtype=np.int64),
        )
        output = StepOutput()
        upload = self._ring.upload(chunks._asdict(), output)
        self._driver.enqueue(lambda: self._rehearse(chunks, upload))
        self._driver.drain()
        output.finish()

    def _rehearse(self, chunks: Chunks, upload: Upload) -> None:
        self._forward(chunks, upload.run())

    def _forward(self, chunks: Chunks, columns: dict[str, Tensor]) -> Tensor:
        host = (chunks.query_starts.tolist(), chunks.context_lens.tolist())
        return self._model.forward(chunks.batch(columns, host), self._kv)


def select(chunks: Chunks, pieces: Sequence[Piece]) -> tuple[Chunks, np.ndarray[Any, np.dtype[np.int64]]]:
    """The columns of some pieces, and the places of their logits among those of all."""
    tokens = np.concatenate([np.arange(piece.begin, piece.end) for piece in pieces])
    seqs = [piece.seq for piece in pieces]
    starts = np.zeros(len(pieces) + 1, dtype=np.int32)
    np.cumsum([piece.end - piece.begin for piece in pieces], out=starts[1:])
    ends = np.array([chunks.positions[piece.end - 1] + 1 for piece in pieces], dtype=np.int32)
    places = np.flatnonzero(np.isin(chunks.logits_indices, tokens))
    part = Chunks(
        tokens=chunks.tokens[tokens],
        positions=chunks.positions[tokens],
        slot_mapping=chunks.slot_mapping[tokens],
        query_starts=starts,
        context_lens=ends,
        block_tables=np.ascontiguousarray(chunks.block_tables[seqs]),
        logits_indices=np.searchsorted(tokens, chunks.logits_indices[places]).astype(np.int64),
    )
    return part, places


def _halves(piece: Piece) -> tuple[Piece, Piece] | None:
    if piece.end - piece.begin < 2:
        return None
    middle = (piece.begin + piece.end) // 2
    return Piece(piece.seq, piece.begin, middle), Piece(piece.seq, middle, piece.end)


def _read_scores(scores: list[PromptScores], output: StepOutput) -> None:
    output.prompt_logprobs = tuple(score.read() for score in scores if score.seq not in output.failed)
