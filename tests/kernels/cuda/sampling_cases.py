"""What the tests of sampling run: rows on the host shim, and the cases in which bugs are planted."""

from typing import Any

import torch
from torch import Tensor

from millrace.kernels import reference_cuda_sampling as reference
from millrace.kernels.cuda_sampling import (
    BLOCK,
    CODES,
    RowSettings,
    SampleBuffers,
    SamplerTables,
    sample,
)
from millrace.runtime.sampling import SamplerState
from millrace.runtime.types import SamplingParams
from shim.fence import fenced, nan_filled
from shim.launcher import ShimLauncher

NOT_FINITE, NOTHING_LEFT, SEEN_IS_FULL = 1, 2, 3


class Rows:
    """Rows 0, 1, ... of tables in fenced memory, and one step at a time for all of them."""

    def __init__(self, launcher: ShimLauncher, vocab: int, settings: list[RowSettings], **joins: Any) -> None:
        self.launcher, self.settings = launcher, settings
        self.tables = SamplerTables(len(settings), vocab, "cpu")
        self.tables.table = fenced(self.tables.table)
        self.tables.edited = nan_filled(*self.tables.edited.shape, dtype=torch.float32)
        self.tables.last_tokens = fenced(self.tables.last_tokens)
        for row, one in enumerate(settings):
            self.tables.join(row, one, **joins)
        shaped = SampleBuffers.allocate(len(settings), self.tables, max_top=5)
        self.buffers = SampleBuffers(*(nan_filled(*one.shape, dtype=one.dtype) for one in shaped))

    def step(
        self, logits: Tensor, rows: list[int] | None = None, index: list[int] | None = None
    ) -> tuple[list[int], list[int]]:
        """Tokens and codes."""
        chosen = torch.arange(len(self.settings)).int() if rows is None else torch.tensor(rows, dtype=torch.int32)
        picked = None if index is None else fenced(torch.tensor(index, dtype=torch.int32))
        before = logits.clone()
        sample(self.launcher, self.tables, self.buffers, logits, fenced(chosen), picked, stream=0)
        assert torch.equal(logits.view(torch.uint8), before.view(torch.uint8)), "the model's logits were changed"
        return self.buffers.tokens[: len(chosen)].tolist(), self.buffers.codes[: len(chosen)].tolist()


def cpu_sampler(settings: list[RowSettings], vocab: int, prompt: list[int], output: list[int]) -> SamplerState:
    state = SamplerState(len(settings), vocab)
    for row, s in enumerate(settings):
        params = SamplingParams(
            temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, min_p=s.min_p, min_tokens=s.min_tokens,
            repetition_penalty=s.repetition_penalty, presence_penalty=s.presence_penalty,
            frequency_penalty=s.frequency_penalty, logit_bias=s.logit_bias, allowed_token_ids=s.allowed,
            banned_token_ids=s.banned, stop_token_ids=s.held, logprobs=None if s.num_logprobs < 0 else s.num_logprobs,
        )  # fmt: skip
        state.join(row, params, s.seed, s.choice, prompt, output)
    return state


PROMPT, OUTPUT = [3, 3, 140, 299, 5], [5, 5, 141, 5]


EDITS = [
    RowSettings(0),
    RowSettings(0, allowed=[5, 130, 299, 130]),
    RowSettings(0, allowed=[]),
    RowSettings(0, logit_bias={0: 5.0, 127: -3.0, 128: 2.5, 299: 9.0}),
    RowSettings(0, banned=[1, 2, 3], logit_bias={3: 90.0}),
    RowSettings(0, held=[4, 200], min_tokens=5),
    RowSettings(0, held=[4, 200], min_tokens=4),
    RowSettings(0, held=[4, 200], min_tokens=4, logit_bias={4: 90.0}),
    RowSettings(0, repetition_penalty=1.7),
    RowSettings(0, presence_penalty=0.9),
    RowSettings(0, frequency_penalty=0.7),
    RowSettings(0, repetition_penalty=0.6, presence_penalty=-0.4, frequency_penalty=0.3, logit_bias={5: 4.0, 3: -4.0}),
    RowSettings(0, allowed=[4, 5, 6], banned=[6], held=[4], min_tokens=9, frequency_penalty=1.5, logit_bias={5: 0.5}),
]


def edits_case(launcher: ShimLauncher) -> None:
    settings = [one._replace(temperature=0.0) for one in EDITS]
    run = Rows(launcher, 300, settings, prompt_tokens=PROMPT, output_tokens=OUTPUT, max_new_tokens=4)
    logits = torch.randn(len(settings), 300) * 3
    cpu = cpu_sampler(settings, 300, PROMPT, OUTPUT)
    output: list[list[int]] = [list(OUTPUT) for _ in settings]
    for _ in range(3):
        tokens, codes = run.step(fenced(logits))
        drawn = cpu.sample(logits.numpy(), range(len(settings)))
        assert tokens == drawn.tokens.tolist()
        assert codes == [NOTHING_LEFT if one.allowed == [] else 0 for one in settings]
        for row, (one, token) in enumerate(zip(settings, tokens, strict=True)):
            wanted = reference.edited_logits(logits[row], one, PROMPT, output[row])
            slot = int(run.tables.record(row)["edit_slot"])
            assert (slot >= 0) == one.has_edits
            if slot >= 0 and (not one.held or one.logit_bias or len(output[row]) < one.min_tokens):
                torch.testing.assert_close(run.tables.edited[slot, :300].double(), wanted, rtol=1e-6, atol=1e-6)
                assert bool((run.tables.edited[slot, 300:] == -torch.inf).all())
            if token >= 0:
                output[row].append(token)
                logits[row, token] -= 1.0


def broken_case(launcher: ShimLauncher) -> None:
    plain, edit = RowSettings(0, temperature=0.0), RowSettings(0, allowed=[1, 2], num_logprobs=2)
    settings = [plain, plain, plain, RowSettings(0), edit, edit, edit, edit, plain]
    run = Rows(launcher, 500, settings)
    logits = torch.randn(len(settings), 500)
    logits[0, 499], logits[1, 3], logits[2] = torch.nan, torch.inf, -torch.inf
    logits[3, 130] = torch.nan
    logits[4, 499], logits[5, 400] = torch.nan, torch.inf  # hidden by the edit, and yet the row is broken
    logits[6, 1:3], logits[7] = -torch.inf, -torch.inf
    tokens, codes = run.step(fenced(logits))
    broken = [NOT_FINITE] * 6 + [NOTHING_LEFT, NOT_FINITE]
    assert codes == [*broken, 0]
    assert tokens[:8] == [-1] * 8 and tokens[8] == int(logits[8].argmax())
    assert [int(run.tables.record(row)["position"]) for row in range(9)] == [0] * 8 + [1]
    drawn = cpu_sampler(settings, 500, [], []).sample(logits.numpy(), range(9))
    assert drawn.bad_rows.tolist() == list(range(8))
    for reason, code in zip(drawn.bad_reasons, broken, strict=True):
        assert reason.startswith(CODES[code])


FILTERED = [
    RowSettings(1, top_k=5),
    RowSettings(2, top_k=40, temperature=2.5),
    RowSettings(3, top_k=60, top_p=0.9, temperature=1.5),
    RowSettings(4, top_p=0.3),
    RowSettings(5, top_p=0.8, temperature=0.4),
    RowSettings(6, min_p=0.05),
    RowSettings(7, min_p=0.02, top_p=0.6),
    RowSettings(8, min_p=0.3, top_k=3, top_p=0.7, choice=9),
    RowSettings(-9, top_k=1, min_tokens=2**40),
    RowSettings(10, top_k=2**40, min_p=0.2),
    RowSettings(2**63 + 5, top_k=2, logit_bias={100: 6.0}, banned=[6]),
    RowSettings(11, top_k=50, top_p=0.9, temperature=1e-3),
]


def filtered_case(launcher: ShimLauncher, vocab: int = 64 * BLOCK - 60, steps: int = 3) -> None:
    """Filters that keep few ids: the CPU sampler's tokens."""
    logits = torch.randn(len(FILTERED), vocab) * 3
    run, cpu = Rows(launcher, vocab, FILTERED), cpu_sampler(FILTERED, vocab, [], [])
    for _ in range(steps):
        tokens, codes = run.step(fenced(logits))
        assert tokens == cpu.sample(logits.numpy(), range(len(FILTERED))).tokens.tolist()
        assert codes == [0] * len(FILTERED)
        logits = logits.roll(1, 1)


def rejection_case(launcher: ShimLauncher, draws: int = 24) -> None:
    """Large nuclei: the same draws in every order of threads, and never an id outside."""
    torch.manual_seed(3)
    logits = torch.randn(1, 1400) * 0.7
    one = RowSettings(0, top_p=0.6)
    two = RowSettings(0, top_k=900, top_p=0.5, min_p=0.01)
    for settings in (one, two):
        run = Rows(launcher, 1400, [settings._replace(seed=seed) for seed in range(draws)])
        tokens, _ = run.step(fenced(logits), None, [0] * draws)
        kept = reference.probabilities(logits[0].double(), settings) > 0
        assert bool(kept[tokens].all())
        assert len(set(tokens)) > draws // 2


def logprobs_case(launcher: ShimLauncher) -> None:
    vocab = 1100
    settings = [
        RowSettings(0, temperature=0.0, num_logprobs=0),
        RowSettings(1, temperature=0.5, num_logprobs=5),
        RowSettings(2, banned=[int(i) for i in range(500)], num_logprobs=3, temperature=0.0),
        RowSettings(3, temperature=0.0, num_logprobs=5),
        RowSettings(4, temperature=0.0, num_logprobs=5),
        RowSettings(5, temperature=0.0),
    ]
    logits = torch.randn(len(settings), vocab) * 4
    logits[3] = 2.0  # more equal logits than are put in order at once
    logits[4] = -torch.inf
    logits[4, [70, 900]] = torch.tensor([1.0, 2.0])
    run = Rows(launcher, vocab, settings)
    tokens, _ = run.step(fenced(logits))
    b = run.buffers
    for row, one in enumerate(settings[:5]):
        wanted = reference.log_probabilities(logits[row])
        assert abs(float(b.logprobs[row]) - float(wanted[tokens[row]])) < 1e-5
        found = min(one.num_logprobs, int((logits[row] > -torch.inf).sum()))
        assert int(b.num_top[row]) == found
        order = reference.ranked(logits[row])[:found]
        assert b.top_ids[row].tolist() == order.tolist() + [-1] * (5 - found)
        torch.testing.assert_close(b.top_logprobs[row, :found].double(), wanted[order], atol=1e-5, rtol=1e-5)
        assert bool((b.top_logprobs[row, found:] == -torch.inf).all())
    assert tokens[2] >= 500 and int(b.top_ids[2, 0]) == int(logits[2].argmax())
    assert bool(b.logprobs[5].isnan())


def ties_case(launcher: ShimLauncher) -> None:
    run = Rows(launcher, 700, [RowSettings(0, temperature=0.0)] * 2)
    logits = torch.zeros(2, 700)
    logits[1, 300:310] = 1.0
    assert run.step(fenced(logits))[0] == [0, 300]
