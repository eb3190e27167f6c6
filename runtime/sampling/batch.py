"""The sampling state of all rows, and the sampling of one step on the CPU.

Rows are slots of the device batch. Everything that a draw depends on lies in the columns of its row, and the random
number is a function of (seed, choice, position): a row draws the same tokens alone and in any batch.
"""

import msgspec
import numpy as np
import numpy.typing as npt

from millrace.kernels import host_sampling
from millrace.kernels.numpy_sampling import CHUNK_ELEMENTS
from millrace.kernels.sampling import BROKEN, DRAW_DTYPE, EMPTY, Floats, Index, Sampling, Tokens
from millrace.runtime.messages import LogprobColumns
from millrace.runtime.sampling.edits import LogitEdits
from millrace.runtime.sampling.logprobs import token_logprobs
from millrace.runtime.sampling.penalties import PenaltyTable
from millrace.runtime.types import SamplingParams

Ints = npt.NDArray[np.int64]

GREEDY_BELOW = 1e-5  # temperatures under this are greedy: scaled logits would leave the range of float32


class Sampled(msgspec.Struct, frozen=True):
    """The outcome of one step.

    Attributes:
        tokens: [num_rows] int32, -1 for a bad row.
        logprobs: columns of the rows that asked and drew; None if there are none.
        bad_rows: [num_bad] int64, places among the sampled rows where nothing was drawn and no state changed.
        bad_reasons: [num_bad], why, in words fit for the request's error.
    """

    tokens: npt.NDArray[np.int32]
    logprobs: LogprobColumns | None
    bad_rows: Ints
    bad_reasons: tuple[str, ...]


class SamplerState:
    """Sampling parameters, positions and seen tokens of every row. Owned by one thread.

    `sampling` is what draws, as for `kernels.host_sampling`.
    """

    def __init__(
        self, max_rows: int, vocab_size: int, eos_token_ids: tuple[int, ...] = (), *, sampling: Sampling | None = None
    ) -> None:
        strange = [token for token in eos_token_ids if not 0 <= token < vocab_size]
        if strange:
            raise ValueError(f"EOS ids {strange} lie outside of the vocabulary of {vocab_size} tokens")
        self.max_rows = max_rows
        self.vocab_size = vocab_size
        self._edits = LogitEdits(max_rows, tuple(eos_token_ids))
        self._penalties = PenaltyTable(max_rows, vocab_size)
        self._table = np.zeros(max_rows, dtype=DRAW_DTYPE)
        self._top_k, self._position = self._table["top_k"], self._table["position"]  # [max_rows], views
        self._drawer = host_sampling.token_drawer(self._table, vocab_size, sampling=sampling)
        self._num_logprobs = np.full(max_rows, -1, dtype=np.int64)  # -1 is off
        self._num_asking = 0  # rows that want log probabilities
        # Logits of rows that edit theirs are copied here, so many rows at a time that passes over them hit the cache.
        self._copies = np.empty((max(1, min(max_rows, CHUNK_ELEMENTS // vocab_size)), vocab_size), dtype=np.float32)

    def join(
        self,
        row: int,
        params: SamplingParams,
        seed: int,
        choice: int,
        prompt_tokens: npt.ArrayLike,
        output_tokens: npt.ArrayLike = (),
    ) -> None:
        """Puts one choice of a request into a free row.

        Args:
            row: between 0 and max_rows - 1.
            params: validated parameters.
            seed: 64-bit integer; a negative one counts as its two's complement.
            choice: index among the choices of the request.
            prompt_tokens: [num_prompt] ids.
            output_tokens: [num_output] ids drawn before, when a request resumes; its next draws are those that it
                would have made without the break.
        """
        if not 0 <= row < self.max_rows:
            raise ValueError(f"row {row} is outside of 0 to {self.max_rows - 1}")
        if self._top_k[row]:
            raise ValueError(f"row {row} is taken; its choice must leave before another joins")
        prompt = np.asarray(prompt_tokens, dtype=np.int64)
        output = np.asarray(output_tokens, dtype=np.int64)
        for name, tokens in (("prompt_tokens", prompt), ("output_tokens", output)):
            if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
                raise ValueError(
                    f"{name} hold ids from {tokens.min()} to {tokens.max()}, but the vocabulary ends at "
                    f"{self.vocab_size - 1}"
                )
        self._edits.leave(row)  # what a join that failed half-way has left
        self._penalties.leave(row)
        self._edits.join(row, params)
        self._penalties.join(row, params, prompt, output)
        self._table[row] = (
            seed & (2**64 - 1),
            choice,
            len(output),
            params.temperature < GREEDY_BELOW or params.top_k == 1,
            min(params.top_k, self.vocab_size) if params.top_k > 0 else self.vocab_size,
            params.top_p,
            params.min_p,
            max(params.temperature, GREEDY_BELOW),
        )
        self._num_logprobs[row] = -1 if params.logprobs is None else params.logprobs
        self._num_asking += params.logprobs is not None

    def leave(self, row: int) -> None:
        """Frees a row."""
        if not 0 <= row < self.max_rows or not self._top_k[row]:
            raise ValueError(f"row {row} is not taken, so nothing can leave it")
        self._edits.leave(row)
        self._penalties.leave(row)
        self._num_asking -= int(self._num_logprobs[row] >= 0)
        self._top_k[row] = 0

    def sample(self, logits: Floats, rows: npt.ArrayLike, logits_index: npt.ArrayLike | None = None) -> Sampled:
        """Draws the next token of each row, and advances the rows that drew.

        Args:
            logits: [num_logits, vocab_size] float32; read only.
            rows: [num_rows] distinct rows that have joined.
            logits_index: [num_rows], which row of `logits` each row draws from (the choices of one prompt share
                theirs); None is the identity.
        """
        row = rows if isinstance(rows, np.ndarray) else np.asarray(rows, dtype=np.int64)
        source = logits_index
        if not (source is None or isinstance(source, np.ndarray)):
            source = np.asarray(source, dtype=np.int64)
        if logits.strides[-1] != logits.itemsize:
            logits = np.ascontiguousarray(logits)
        penalised = self._penalties.in_use
        draw = self._draw_edited if penalised or self._edits.in_use else self._draw
        tokens, num_bad = draw(logits, row, source)
        bad, reasons = _NONE, _NO_REASONS
        if num_bad:
            bad = np.flatnonzero(tokens < 0)
            reasons = tuple(_REASONS[code] for code in tokens[bad].tolist())
            tokens[bad] = -1
        if penalised:
            drew = tokens >= 0
            self._penalties.record(row[drew], tokens[drew].astype(np.int64))
        logprobs = self._logprobs(logits, row, source, tokens) if self._num_asking else None
        return Sampled(tokens, logprobs, bad, reasons)

    def _draw(self, logits: Floats, rows: Index, source: Index | None) -> tuple[Tokens, int]:
        """For rows without edits: tokens [num_rows], BROKEN for a bad row, and how many those are."""
        tokens, num_bad = self._drawer(logits, rows, source)
        if num_bad:
            np.maximum(tokens, BROKEN, out=tokens)  # a model that rules out every token
        return tokens, num_bad

    def _draw_edited(self, logits: Floats, rows: Index, source: Index | None) -> tuple[Tokens, int]:
        """For any rows: tokens [num_rows], BROKEN or, where edits leave nothing, EMPTY, and how many those are."""
        if source is None:
            source = np.arange(len(rows))
        self._drawer.check(logits, rows, source)
        is_edited = self._edits.uses(rows, self._position[rows]) | self._penalties.uses(rows)
        plain, edited = np.flatnonzero(~is_edited), np.flatnonzero(is_edited)
        tokens, num_bad = np.empty(len(rows), dtype=np.int32), 0
        if len(plain):
            tokens[plain], num_bad = self._draw(logits, rows[plain], source[plain])
        for start in range(0, len(edited), len(self._copies)):
            part = edited[start : start + len(self._copies)]
            row = rows[part]
            x = self._copies[: len(part)]
            np.take(logits, source[part], axis=0, out=x, mode="clip")  # as checked; "raise" would copy them twice
            # Edits may hide a NaN, but a model that gave one is not to be trusted on the rest of the row.
            broken = ~np.isfinite(x.max(axis=1))
            self._edits.apply(x, row, self._position[row])
            self._penalties.apply(x, row)
            x[broken] = np.nan
            tokens[part], more_bad = self._drawer(x, row)
            num_bad += more_bad
        return tokens, num_bad

    def _logprobs(self, logits: Floats, rows: Index, source: Index | None, tokens: Tokens) -> LogprobColumns | None:
        asked = np.flatnonzero((self._num_logprobs[rows] >= 0) & (tokens >= 0))
        if not len(asked):
            return None
        at = asked if source is None else source[asked].astype(np.int64)
        return token_logprobs(logits, asked, at, tokens[asked].astype(np.int64), self._num_logprobs[rows[asked]])


_NONE = np.empty(0, dtype=np.int64)
_NO_REASONS: tuple[str, ...] = ()
_REASONS = {
    BROKEN: "the model gave NaN or infinite logits for this request",
    EMPTY: "no token is left to draw: allowed, banned and min_tokens together rule out every token that the model can "
    "give; allow more tokens or lower min_tokens",
}
