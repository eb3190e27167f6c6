"""Prompt log probabilities on a GPU: computed behind the logits, and copied to the host with the step."""

import numpy as np
import torch
from torch import Tensor

from millrace.runtime.cuda.staging import PinnedRing
from millrace.runtime.device import StepOutput
from millrace.runtime.lanes import Scored
from millrace.runtime.messages import LogprobColumns, PromptLogprobs

_ROWS = 16  # rows of logits handled at a time: their keys are 8 bytes per id


class PromptScores:
    """The log probabilities of one chunk."""

    def __init__(self, scored: Scored, vocab_size: int, ring: PinnedRing, output: StepOutput) -> None:
        self.seq = scored.seq
        self._scored = scored
        self._num_top = top = min(scored.num_top, vocab_size)
        count = len(scored.following)
        self._following = ring.upload({"following": scored.following.astype(np.int64)}, output)
        # [count, 1 + top] float32, then [count, top] int32: log probabilities of the tokens and of the alternatives.
        size = 4 * count
        buffer = ring.take(max(1, size * (1 + 2 * top)), output)
        self._values = buffer[: size * (1 + top)].view(torch.float32).view(count, 1 + top)
        self._ids = buffer[size * (1 + top) : size * (1 + 2 * top)].view(torch.int32).view(count, top)

    def compute(self, logits: Tensor) -> None:
        """Within `CudaDriver.enqueue`; logits of all tokens of the step."""
        first, count = self._scored.row, len(self._scored.following)
        following = self._following.run()["following"]
        for start in range(0, count, _ROWS):
            part = slice(start, min(start + _ROWS, count))
            rows = logits[first + part.start : first + part.stop]
            values, ids = log_probabilities(rows, following[part], self._num_top)
            self._values[part].copy_(values, non_blocking=True)
            self._ids[part].copy_(ids, non_blocking=True)

    def read(self) -> PromptLogprobs:
        """When the device has done the step."""
        scored = self._scored
        values, ids = self._values.numpy().copy(), self._ids.numpy().copy()
        found = np.isfinite(values[:, 1:])
        columns = LogprobColumns(
            index=np.arange(len(values), dtype=np.int32),
            logprobs=np.ascontiguousarray(values[:, 0]),
            num_top=found.sum(axis=1).astype(np.int32),
            top_ids=np.where(found, ids, -1).astype(np.int32),
            top_logprobs=np.where(found, values[:, 1:], -np.inf).astype(np.float32),
        )
        return PromptLogprobs(scored.seq, scored.start, scored.following, columns)


def log_probabilities(logits: Tensor, tokens: Tensor, num_top: int) -> tuple[Tensor, Tensor]:
    """Log-softmax at the given tokens and its largest entries, the lowest id first among equals.

    Args:
        logits: [n, vocab]; a row with NaN or infinity gives NaN throughout.
        tokens: [n] int64.

    Returns:
        [n, 1 + num_top] float32, of the token and of the alternatives, and the alternatives' ids [n, num_top] int32.
    """
    x = logits.float()
    top = x.amax(dim=-1, keepdim=True)
    normaliser = torch.where(top.isfinite(), x.logsumexp(dim=-1, keepdim=True), torch.nan)
    chosen = x.gather(1, tokens[:, None]) - normaliser
    if num_top == 0:
        return chosen, torch.empty(len(x), 0, dtype=torch.int32, device=x.device)
    # Keys that rise with the logit and fall with the id: 32 bits of each. -0.0 counts as 0.0.
    bits = (x + 0.0).view(torch.int32).long()
    rising = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ids = torch.arange(x.shape[1], device=x.device)
    best = ((rising << 32) | (0x7FFFFFFF - ids)).topk(num_top, dim=-1).values
    best_ids = 0x7FFFFFFF - (best & 0x7FFFFFFF)
    return torch.cat([chosen, x.gather(1, best_ids) - normaliser], dim=1), best_ids.int()
