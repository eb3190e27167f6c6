"""Prefill: computes prompts, a chunk of each of some sequences per step, on its own stream."""

from functools import partial

import numpy as np
import torch

from millrace.runtime.channel import Receiver, Sender
from millrace.runtime.device import Device, StepOutput
from millrace.runtime.kv.tables import BlockTables
from millrace.runtime.messages import LogitsReady, PrefillPlan, PromptLogprobs, SamplerInbox
from millrace.runtime.models.base import ForwardBatch, Model
from millrace.runtime.sampling.logprobs import prompt_logprobs
from millrace.runtime.types import BLOCK_SIZE, Lane


class Prefill:
    """Owns the block tables of the prompts in flight. Launches each plan as it comes: stream order does the rest."""

    def __init__(
        self,
        *,
        device: Device,
        model: Model,
        kv: object,
        tables: BlockTables,
        inbox: Receiver[PrefillPlan],
        sampler: Sender[SamplerInbox],
    ) -> None:
        self._device = device
        self._stream = device.stream("prefill", priority=1)
        self._model = model
        self._kv = kv
        self._tables = tables
        self._inbox = inbox
        self._sampler = sampler

    async def run(self) -> None:
        while True:
            for plan in await self._inbox.recv_batch():
                self.launch(plan)

    def launch(self, plan: PrefillPlan) -> None:
        output = StepOutput()
        self._device.launch(self._stream, partial(output.run, partial(self._forward, plan, output)))
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

    def _forward(self, plan: PrefillPlan, output: StepOutput) -> None:
        """In stream order: computes the chunks; leaves logits [num sequences that are done, vocab_size]."""
        self._tables.apply(plan.blocks)
        lengths = plan.lengths
        ends = plan.starts + lengths  # [num_seqs]
        query_starts = np.zeros(len(lengths) + 1, dtype=np.int32)
        np.cumsum(lengths, out=query_starts[1:])
        positions = np.arange(len(plan.tokens), dtype=np.int64) + np.repeat(plan.starts - query_starts[:-1], lengths)
        longest = int(ends.max())
        last_tokens = query_starts[1:][np.unique(plan.join_of)] - 1
        scored = np.flatnonzero(plan.prompt_logprobs >= 0)
        # Every token of a chunk whose prompt log probabilities are wanted, behind the rows to sample from.
        wanted = [np.arange(query_starts[i], query_starts[i + 1]) for i in scored]
        logits = self._model.forward(
            ForwardBatch(
                tokens=torch.from_numpy(plan.tokens.astype(np.int64)),
                positions=torch.from_numpy(positions),
                slot_mapping=torch.from_numpy(self._tables.slots(np.repeat(plan.rows, lengths), positions, BLOCK_SIZE)),
                query_starts=torch.from_numpy(query_starts),
                context_lens=torch.from_numpy(ends.astype(np.int32)),
                block_tables=torch.from_numpy(self._tables.gather(plan.rows, -(-longest // BLOCK_SIZE))),
                logits_indices=torch.from_numpy(np.concatenate([last_tokens, *wanted]).astype(np.int64)),
                max_query_len=int(lengths.max()),
                max_context_len=longest,
            ),
            self._kv,
        )
        output.logits = logits[: len(last_tokens)]
        row = len(last_tokens)
        scores = []
        for i in scored:
            length = int(lengths[i])
            following = np.append(plan.tokens[query_starts[i] + 1 : query_starts[i + 1]], plan.next_tokens[i])
            if plan.next_tokens[i] < 0:
                following = following[:-1]  # nothing follows the last prompt token
            columns = prompt_logprobs(logits[row : row + len(following)], following, int(plan.prompt_logprobs[i]))
            scores.append(PromptLogprobs(plan.seqs[i], int(plan.starts[i]), following.astype(np.int32), columns))
            row += length
        output.prompt_logprobs = tuple(scores)
