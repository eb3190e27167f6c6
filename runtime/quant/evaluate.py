"""Perplexity of a text: how many tokens, on average, a model finds as likely as the right one at each place."""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from millrace.runtime.errors import ConfigError
from millrace.runtime.models.base import ForwardBatch
from millrace.runtime.models.host import PlacedModel
from millrace.runtime.quant.calibration import Token
from millrace.runtime.types import BLOCK_SIZE

_LOGITS = 1 << 24  # that are held at a time: 64 MiB of float32
_CHUNK = 512  # tokens of one step, at most


class Perplexity(msgspec.Struct, frozen=True, kw_only=True):
    """What came out.

    Attributes:
        value: exp of the mean negative log-likelihood of the scored tokens.
        scored: how many tokens that is; the first of a text is predicted by nothing and is none of them.
        seconds: how long it took.
    """

    value: float
    scored: int
    seconds: float


def perplexity(
    model: PlacedModel,
    tokens: Iterable[Token],
    *,
    window: int | None = None,
    stride: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Perplexity:
    """Reads a text in windows that overlap, so that tokens are predicted from some context and each is scored once.

    Args:
        window: tokens that the model sees at a time; the default is 1024, or all that it has positions for.
        stride: tokens by which the window moves on; the others of it are context only. The default is half a window.
            With a whole one the first token of each has no context, and is not scored.
        progress: called with the number of tokens read so far.

    Raises:
        ConfigError: window or stride does not fit the model, or the text holds no scored token.
    """
    longest = model.spec.max_model_len
    window = min(1024, longest) if window is None else window
    if not 2 <= window <= longest:
        raise ConfigError(f"window is {window}, but it must be between 2 and {longest}, the model's positions")
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= stride <= window:
        raise ConfigError(f"stride is {stride}, but it must be between 1 and window ({window})")
    reader = _Reader(model, window)
    started = time.perf_counter()
    total, scored, done = 0.0, 0, 0
    for part, first in _sliding(tokens, window, stride):
        wanted = [at for at in range(max(first, 1), len(part)) if part[at].scored]
        total += reader.nll([token.id for token in part], wanted)
        scored += len(wanted)
        done += len(part) - first
        if progress is not None:
            progress(done)
    if not scored:
        raise ConfigError(f"the text holds {done} tokens, of which none can be scored: it needs at least two")
    return Perplexity(value=exp_mean(total, scored), scored=scored, seconds=time.perf_counter() - started)


def exp_mean(nll: float, count: int) -> float:
    """exp(nll / count), infinite where no float holds it."""
    return math.exp(nll / count) if nll / count < 700 else math.inf


def _sliding(tokens: Iterable[Token], window: int, stride: int) -> Iterator[tuple[list[Token], int]]:
    """Windows, each with the index of its first token that no window before it held."""
    stream = iter(tokens)
    part = list(itertools.islice(stream, window))
    first = 0
    while len(part) > first:
        yield part, first
        # A last window that cannot be filled keeps more context instead of being short.
        fresh = list(itertools.islice(stream, stride))
        part = part[len(part) + len(fresh) - window :] + fresh if len(part) == window else []
        first = len(part) - len(fresh)


class _Reader:
    """Runs one window at a time through a model, over storage of its own."""

    def __init__(self, model: PlacedModel, window: int) -> None:
        self._model = model
        blocks = -(-window // BLOCK_SIZE)
        self._kv: Any = model.allocate_kv(1 + blocks)
        # Block 0 is the null block, so position p lies in slot p + BLOCK_SIZE.
        self._table = torch.arange(1, blocks + 1, dtype=torch.int32, device=model.device)[None]
        self._chunk = max(16, min(_CHUNK, window, _LOGITS // model.spec.vocab_size))

    def nll(self, ids: Sequence[int], wanted: Sequence[int]) -> float:
        """Sum of -log p(ids[at] | ids before it) over `wanted`, in ascending order."""
        total = 0.0
        for start in range(0, len(ids), self._chunk):
            end = min(start + self._chunk, len(ids))
            here = [at for at in wanted if start < at <= end]
            logits = self._forward(ids[start:end], start, [at - 1 - start for at in here])
            if here:
                targets = torch.tensor([ids[at] for at in here], device=logits.device)
                total += float(F.cross_entropy(logits.float(), targets, reduction="sum"))
        return total

    def _forward(self, ids: Sequence[int], start: int, indices: Sequence[int]) -> Tensor:
        device, end = self._model.device, start + len(ids)
        positions = torch.arange(start, end, device=device)
        batch = ForwardBatch[Tensor](
            tokens=torch.tensor(ids, device=device),
            positions=positions,
            slot_mapping=positions + BLOCK_SIZE,
            query_starts=torch.tensor([0, len(ids)], dtype=torch.int32, device=device),
            context_lens=torch.tensor([end], dtype=torch.int32, device=device),
            block_tables=self._table,
            logits_indices=torch.tensor(indices, dtype=torch.int64, device=device),
            max_query_len=len(ids),
            max_context_len=end,
            host=([0, len(ids)], [end]),
        )
        return self._model.forward(batch, self._kv)
