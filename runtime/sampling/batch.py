"""The sampling state of all rows, and the sampling of one step on the CPU.

Rows are slots of the device batch. Everything that a draw depends on lies in the columns of its row, and the random
number is a function of (seed, choice, position): a row draws the same tokens alone and in any batch.
"""

from typing import TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from millrace.runtime.messages import LogprobColumns
from millrace.runtime.sampling import distribution
from millrace.runtime.sampling.edits import LogitEdits
from millrace.runtime.sampling.logprobs import CHUNK_ELEMENTS, token_logprobs
from millrace.runtime.sampling.penalties import PenaltyTable
from millrace.runtime.sampling.philox import uniforms
from millrace.runtime.types import SamplingParams

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Number = TypeVar("Number", bound=np.generic)

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
    """Sampling parameters, positions and seen tokens of every row. Owned by one thread."""

    def __init__(self, max_rows: int, vocab_size: int, eos_token_ids: tuple[int, ...] = ()) -> None:
        strange = [token for token in eos_token_ids if not 0 <= token < vocab_size]
        if strange:
            raise ValueError(f"EOS ids {strange} lie outside of the vocabulary of {vocab_size} tokens")
        self.max_rows = max_rows
        self.vocab_size = vocab_size
        self._edits = LogitEdits(max_rows, tuple(eos_token_ids))
        self._penalties = PenaltyTable(max_rows, vocab_size)
        self._joined = np.zeros(max_rows, dtype=np.bool_)
        self._num_output = np.zeros(max_rows, dtype=np.int64)  # tokens drawn so far: the position of the next draw
        self._seed = np.zeros(max_rows, dtype=np.uint64)
        self._choice = np.zeros(max_rows, dtype=np.uint64)
        self._greedy = np.zeros(max_rows, dtype=np.bool_)
        self._temperature = np.ones(max_rows, dtype=np.float64)
        self._top_k = np.zeros(max_rows, dtype=np.int64)  # vocab_size is off
        self._top_p = np.ones(max_rows, dtype=np.float64)
        self._min_p = np.zeros(max_rows, dtype=np.float64)
        self._num_logprobs = np.full(max_rows, -1, dtype=np.int64)  # -1 is off
        # How many of the most likely ids are tried for top_p before all are looked at: few enough that most blocks
        # drop out, or all where sorting them costs no more than looking again.
        blocks = distribution.num_blocks(vocab_size)
        self._first_candidates = min(blocks // 4, 256) if blocks > 16 else vocab_size
        # Rows handled at a time, and a place for their weights.
        self._chunk = max(1, min(max_rows, CHUNK_ELEMENTS // vocab_size))
        self._scratch = torch.empty(self._chunk, distribution.num_blocks(vocab_size) * distribution.BLOCK)

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
        if self._joined[row]:
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
        self._num_output[row] = len(output)
        self._seed[row] = seed & (2**64 - 1)
        self._choice[row] = choice
        self._greedy[row] = params.temperature < GREEDY_BELOW or params.top_k == 1
        self._temperature[row] = max(params.temperature, GREEDY_BELOW)
        self._top_k[row] = min(params.top_k, self.vocab_size) if params.top_k > 0 else self.vocab_size
        self._top_p[row] = params.top_p
        self._min_p[row] = params.min_p
        self._num_logprobs[row] = -1 if params.logprobs is None else params.logprobs
        self._joined[row] = True

    def leave(self, row: int) -> None:
        """Frees a row."""
        if not 0 <= row < self.max_rows or not self._joined[row]:
            raise ValueError(f"row {row} is not taken, so nothing can leave it")
        self._edits.leave(row)
        self._penalties.leave(row)
        self._joined[row] = False

    def sample(self, logits: Tensor, rows: npt.ArrayLike, logits_index: npt.ArrayLike | None = None) -> Sampled:
        """Draws the next token of each row, and advances the rows that drew.

        Args:
            logits: [num_logits, vocab_size] float32 on the CPU; read only.
            rows: [num_rows] distinct rows that have joined.
            logits_index: [num_rows], which row of `logits` each row draws from (the choices of one prompt share
                theirs); None is the identity.
        """
        row = np.asarray(rows, dtype=np.int64)
        source = np.arange(len(row)) if logits_index is None else np.asarray(logits_index, dtype=np.int64)
        self._check(logits, row, source)
        tokens = np.full(len(row), -1, dtype=np.int64)
        reasons = np.zeros(len(row), dtype=np.int64)
        uniform = np.zeros(len(row))
        if not self._greedy[row].all():
            uniform = uniforms(self._seed[row], self._choice[row], self._num_output[row])
        for start in range(0, len(row), self._chunk):
            part = slice(start, start + self._chunk)
            tokens[part], reasons[part] = self._sample_chunk(logits, row[part], source[part], uniform[part])
        drew = np.flatnonzero(reasons == 0)
        self._penalties.record(row[drew], tokens[drew])
        self._num_output[row[drew]] += 1
        asked = drew[self._num_logprobs[row[drew]] >= 0]
        logprobs = None
        if len(asked):
            logprobs = token_logprobs(logits, asked, source[asked], tokens[asked], self._num_logprobs[row[asked]])
        bad = np.flatnonzero(reasons)
        return Sampled(
            tokens=tokens.astype(np.int32),
            logprobs=logprobs,
            bad_rows=bad,
            bad_reasons=tuple(_REASONS[reason] for reason in reasons[bad]),
        )

    def _sample_chunk(self, logits: Tensor, rows: Ints, source: Ints, uniform: Doubles) -> tuple[Ints, Ints]:
        """Tokens [num_rows] (-1 where none), and numbers of reasons [num_rows] (0 where a token was drawn)."""
        positions = self._num_output[rows]
        penalised = self._penalties.uses(rows)
        edited = self._edits.uses(rows, positions) | penalised
        x = distribution.gather(logits, source)
        reasons = np.zeros(len(rows), dtype=np.int64)
        if edited.any():
            x = x.clone()
            # Edits may hide a NaN, but a model that gave one is not to be trusted on the rest of the row.
            reasons[~np.isfinite(distribution.block_maxima(x).max(axis=1))] = _NOT_FINITE
            self._edits.apply(x.numpy(), rows, positions)
            if penalised.any():
                self._penalties.apply(x.numpy(), rows)
        maxima = distribution.block_maxima(x)
        row_max = maxima.max(axis=1)
        reasons[(reasons == 0) & np.isneginf(row_max) & edited] = _NOTHING_LEFT
        reasons[(reasons == 0) & ~np.isfinite(row_max)] = _NOT_FINITE

        tokens = np.full(len(rows), -1, dtype=np.int64)
        good = reasons == 0
        greedy = np.flatnonzero(good & self._greedy[rows])
        if len(greedy):
            tokens[greedy] = distribution.argmax(_pick(greedy, x.numpy()), _pick(greedy, maxima))
        random = np.flatnonzero(good & ~self._greedy[rows])
        if len(random):
            tokens[random] = self._draw(x, maxima, row_max, rows, random, uniform[random])
        return tokens, reasons

    def _draw(self, x: Tensor, maxima: Floats, row_max: Floats, rows: Ints, places: Ints, uniform: Doubles) -> Ints:
        """Draws for some places of a chunk: [len(places)]."""
        row = rows[places]
        cut = (self._top_k[row] < self.vocab_size) | (self._min_p[row] > 0.0)
        nucleus = self._top_p[row] < 1.0
        tokens = np.empty(len(places), dtype=np.int64)
        mass = np.full(len(places), np.nan)

        full = np.flatnonzero(~cut)  # those need the mass of the whole vocabulary
        weights = np.empty((0, self.vocab_size), dtype=np.float32)
        if len(full):
            at = places[full]
            weights, sums = distribution.softmax_weights(
                distribution.gather(x, at), row_max[at], self._temperature[row[full]], self._scratch
            )
            mass[full] = sums.cumsum(axis=1)[:, -1]
            free = np.flatnonzero(~nucleus[full])
            if len(free):
                tokens[full[free]] = distribution.draw_from_weights(
                    _pick(free, weights), _pick(free, sums), uniform[full[free]]
                )

        filtered = np.flatnonzero(cut | nucleus)
        if len(filtered):
            at, row = places[filtered], row[filtered]
            first = np.where(self._top_k[row] < self.vocab_size, self._top_k[row], self._first_candidates)
            bound = distribution.kth_block_maximum(maxima[at], first)
            by_min_p = distribution.reach(row_max[at], self._temperature[row], self._min_p[row])
            # min_p alone is decided by a weight; beside top_k, the tighter of both bounds holds all that is kept.
            only_min_p = (self._min_p[row] > 0.0) & (self._top_k[row] == self.vocab_size)
            bound = np.where(only_min_p, by_min_p, np.maximum(bound, by_min_p))
            drawn, enough = self._draw_filtered(x, maxima, rows, at, bound, mass[filtered], uniform[filtered])
            tokens[filtered] = drawn
            for one in filtered[~enough]:
                logit, weight = x.numpy()[places[one]], weights[np.searchsorted(full, one), : self.vocab_size]
                top_p = float(self._top_p[rows[places[one]]])
                tokens[one] = distribution.draw_from_nucleus(weight, logit, top_p, float(uniform[one]))
        return tokens

    def _draw_filtered(
        self, x: Tensor, maxima: Floats, rows: Ints, places: Ints, bound: Floats, mass: Doubles, uniform: Doubles
    ) -> tuple[Ints, Bools]:
        blocks, row = _pick(places, maxima), rows[places]
        ids, values = distribution.candidates(_pick(places, x.numpy()), blocks, bound)
        return distribution.draw_filtered(
            ids,
            values,
            row_max=blocks.max(axis=1),
            temperature=self._temperature[row],
            top_k=self._top_k[row],
            top_p=self._top_p[row],
            min_p=self._min_p[row],
            mass=mass,
            uniform=uniform,
        )

    def _check(self, logits: Tensor, rows: Ints, source: Ints) -> None:
        if logits.ndim != 2 or logits.shape[1] != self.vocab_size or logits.dtype != torch.float32:
            raise ValueError(
                f"logits are {logits.dtype} {list(logits.shape)}, but float32 [num_logits, {self.vocab_size}] is needed"
            )
        if logits.device.type != "cpu":
            raise ValueError(f"logits lie on {logits.device}, but this sampler reads CPU memory")
        if len(source) != len(rows):
            raise ValueError(f"logits_index has {len(source)} entries for {len(rows)} rows")
        if len(rows) and (source.min() < 0 or source.max() >= len(logits)):
            raise ValueError(f"logits_index reaches {source.max()}, but there are {len(logits)} rows of logits")
        if len(rows) and (rows.min() < 0 or rows.max() >= self.max_rows or not self._joined[rows].all()):
            raise ValueError(f"rows {rows.tolist()} name one that has not joined")
        if len(np.unique(rows)) != len(rows):
            raise ValueError(f"rows {rows.tolist()} name one twice; a row draws one token per step")


_NOT_FINITE, _NOTHING_LEFT = 1, 2
_REASONS = {
    _NOT_FINITE: "the model gave NaN or infinite logits for this request",
    _NOTHING_LEFT: "no token is left to draw: allowed, banned and min_tokens together rule out every token that the "
    "model can give; allow more tokens or lower min_tokens",
}


def _pick(places: Ints, array: npt.NDArray[Number]) -> npt.NDArray[Number]:
    """The given rows, in order, without a copy where that is all of them."""
    return array if len(places) == len(array) else array[places]
