"""Sampling kernels on the host shim: against float64, against the CPU sampler, and by the statistics of their draws."""

from typing import Any

import numpy as np
import pytest
import torch
from sampling_cases import (
    SEEN_IS_FULL,
    Rows,
    broken_case,
    cpu_sampler,
    edits_case,
    filtered_case,
    logprobs_case,
    rejection_case,
    ties_case,
)
from torch import Tensor

from millrace.kernels import reference_cuda_sampling as reference
from millrace.kernels.cuda_sampling import (
    BLOCK,
    DRAW_DTYPE,
    RowSettings,
    SampleBuffers,
    SamplerTables,
    sample,
)
from millrace.runtime.sampling import uniforms
from shim.fence import fenced
from shim.launcher import ShimLauncher

pytestmark = (
    pytest.mark.slow
)  # tests/runtime/cuda drives the same kernels within models, and `make test-fast` runs that

# ---- greedy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "vocab", "stride"),
    [
        (torch.float32, 5000, 5000),  # whole vectors, a ragged last block
        (torch.float32, 1, 1),
        (torch.bfloat16, 128, 128),
        (torch.bfloat16, 4099, 4099),  # rows that are not aligned
        (torch.float16, 700, 704),  # rows that lie apart
        (torch.float32, 9000, 9000),  # 512 threads
    ],
)
def test_greedy(launcher: ShimLauncher, dtype: torch.dtype, vocab: int, stride: int) -> None:
    run = Rows(launcher, vocab, [RowSettings(0, temperature=0.0)] * 5)
    # Few values, so that there are ties in a block and across blocks; nothing may be read behind a row.
    logits = (torch.randn(5, vocab) * 4).round().to(dtype)
    held = torch.full((5, stride), torch.inf, dtype=dtype)
    held[:, :vocab] = logits
    held = fenced(held)[:, :vocab]
    held[0], held[1, : vocab // 2], held[2, -1], held[3, 0] = 0.0, -torch.inf, 50.0, 50.0
    held[4, ::2] = -0.0
    tokens, codes = run.step(held)
    assert tokens == [int(np.argmax(row.float().numpy())) for row in held]
    assert codes == [0] * 5
    assert run.tables.last_tokens.tolist() == tokens
    assert [int(run.tables.record(row)["position"]) for row in range(5)] == [1] * 5


def test_slices_do_not_matter(launcher: ShimLauncher) -> None:
    """Many thread blocks or few: the same bits in the summaries."""
    found = []
    logits = fenced(torch.randn(1, 70 * BLOCK))
    for sm_count in (1, 1000):
        launcher.sm_count = sm_count
        run = Rows(launcher, 70 * BLOCK, [RowSettings(3)])
        found.append((run.step(logits), run.buffers.summary.clone()))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_unused_places_and_shared_logits(launcher: ShimLauncher) -> None:
    run = Rows(launcher, 300, [RowSettings(0, temperature=0.0), RowSettings(0, temperature=0.0, banned=[7])])
    run.buffers.tokens.fill_(99)
    logits = torch.zeros(2, 300)
    logits[1, 7], logits[1, 8] = 3.0, 2.0
    held = SampleBuffers.allocate(3, run.tables, max_top=5)
    run.buffers = held
    tokens, codes = run.step(fenced(logits), [1, -1, 0], [1, 0, 1])
    assert tokens == [8, -1, 7]
    assert codes == [0, 0, 0]
    assert run.tables.last_tokens.tolist() == [7, 8]


# ---- edits ------------------------------------------------------------------------------------------------------


def test_edits(launcher: ShimLauncher) -> None:
    edits_case(launcher)


def test_counts_of_drawn_tokens(launcher: ShimLauncher) -> None:
    """New ids are appended, known ones counted; a list without room fails its row and changes nothing."""
    run = Rows(
        launcher, 200, [RowSettings(0, temperature=0.0, frequency_penalty=0.5)] * 2,
        output_tokens=[9, 9, 30], max_new_tokens=1,
    )  # fmt: skip
    logits = torch.zeros(2, 200)
    logits[0, 9], logits[1, 150] = 9.0, 9.0
    assert run.step(fenced(logits)) == ([9, 150], [0, 0])
    first, second = run.tables.record(0), run.tables.record(1)
    lists = run.tables._lists
    assert int(first["num_seen"]) == 2 and int(second["num_seen"]) == 3
    assert lists[0]["seen_counts"].tolist() == [3, 1, 0] and lists[1]["seen_counts"].tolist() == [2, 1, 1]
    assert lists[1]["seen"].tolist() == [9, 30, 150]
    logits[1, 60] = 20.0
    assert run.step(fenced(logits)) == ([9, -1], [0, SEEN_IS_FULL])
    assert int(run.tables.record(1)["position"]) == 4 and lists[1]["seen_counts"].tolist() == [2, 1, 1]


def test_broken_logits(launcher: ShimLauncher) -> None:
    broken_case(launcher)


# ---- draws ------------------------------------------------------------------------------------------------------


def test_filtered(launcher: ShimLauncher) -> None:
    filtered_case(launcher)


def test_filtered_with_512_threads(launcher: ShimLauncher) -> None:
    filtered_case(launcher, vocab=90 * BLOCK + 4, steps=1)


def test_many_settings_at_once(launcher: ShimLauncher) -> None:
    """Random filters, edits and penalties in one batch, for some steps: only what the filters keep is drawn, and where
    few ids are kept it is the CPU sampler's token."""
    vocab, rng = 64 * BLOCK - 60, np.random.default_rng(5)
    settings = [
        RowSettings(
            int(rng.integers(2**62)), choice=int(rng.integers(128)), temperature=float(rng.choice([0.3, 1.0, 2.0])),
            top_k=int(rng.choice([0, 3, 40])), top_p=float(rng.choice([1.0, 0.9, 0.4])),
            min_p=float(rng.choice([0.0, 0.0, 0.1])), repetition_penalty=float(rng.choice([1.0, 1.3])),
            presence_penalty=float(rng.choice([0.0, 0.8])), frequency_penalty=float(rng.choice([0.0, -0.3])),
            logit_bias={int(rng.integers(vocab)): 9.0} if rng.random() < 0.5 else {},
            banned=rng.integers(0, vocab, 3).tolist() if rng.random() < 0.5 else (),
        )
        for _ in range(40)
    ]  # fmt: skip
    prompt = rng.integers(0, vocab, 30).tolist()
    run = Rows(launcher, vocab, settings, prompt_tokens=prompt, max_new_tokens=2)
    cpu = cpu_sampler(settings, vocab, prompt, [])
    # float32 logits of the size of real ones: the mass of top_p lies in tens to hundreds of ids.
    logits = torch.randn(len(settings), vocab) * 3
    for step in range(2):
        tokens, codes = run.step(fenced(logits))
        assert codes == [0] * len(settings)
        wanted = cpu.sample(logits.numpy(), range(len(settings))).tokens.tolist()
        for row, one in enumerate(settings):
            if step == 0:
                relaxed = one._replace(top_p=min(1.0, one.top_p + 1e-4), min_p=one.min_p * 0.9999)
                edited = reference.edited_logits(logits[row], one, prompt)
                assert reference.probabilities(edited, relaxed)[tokens[row]] > 0
            if one.top_k or one.min_p:
                assert tokens[row] == wanted[row]


def test_ties_are_kept_by_id(launcher: ShimLauncher) -> None:
    """All logits equal: top_k keeps the lowest ids, whether they are put in order or found by bisection."""
    vocab = 3000
    settings = [RowSettings(seed, top_k=7) for seed in range(6)] + [RowSettings(s, top_k=2000) for s in range(6)]
    settings += [RowSettings(seed, top_k=2000, top_p=0.01) for seed in range(6)]
    run = Rows(launcher, vocab, settings)
    tokens, _ = run.step(fenced(torch.zeros(len(settings), vocab)))
    assert max(tokens[:6]) < 7 and len(set(tokens[:6])) > 1
    assert 100 < max(tokens[6:12]) < 2000
    assert max(tokens[12:]) < 20


def chi_square(launcher: ShimLauncher, logits: Tensor, settings: RowSettings, draws: int) -> None:
    """One launch, one seed per row. Bins with few expected draws are put together."""
    logits = logits.view(1, -1)
    vocab = logits.shape[1]
    run = Rows(launcher, vocab, [settings._replace(seed=seed * 7919 + 13) for seed in range(draws)])
    tokens, codes = run.step(fenced(logits), None, [0] * draws)
    assert codes == [0] * draws
    edited = reference.edited_logits(logits[0].float(), settings)
    wanted = reference.probabilities(edited, settings).numpy() * draws
    observed = np.bincount(tokens, minlength=vocab).astype(float)
    assert observed[wanted == 0].sum() == 0, "a token was drawn that the filters drop"
    cells, seen, mean = [], 0.0, 0.0
    for token in np.argsort(-wanted):  # neighbours by probability share a cell, so that each expects eight draws
        seen, mean = seen + observed[token], mean + wanted[token]
        if mean >= 8:
            cells.append((seen, mean))
            seen, mean = 0.0, 0.0
    cells[-1] = (cells[-1][0] + seen, cells[-1][1] + mean)
    freedom = len(cells) - 1
    statistic = sum((seen - mean) ** 2 / mean for seen, mean in cells)
    # Wilson-Hilferty: the cube root is nearly normal; four deviations.
    bound = freedom * (1 - 2 / (9 * freedom) + 4 * np.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < bound, f"chi-square {statistic:.1f} with {freedom} degrees of freedom, bound {bound:.1f}"


STATISTICS = {
    "all": (RowSettings(0), 400, 2500),
    "hot": (RowSettings(0, temperature=3.0), 700, 1500),
    "edited": (RowSettings(0, temperature=0.7, logit_bias={3: 5.0}, banned=[4, 5]), 200, 1200),
    "in order": (RowSettings(0, top_p=0.9), 200, 800),
    # More ids than are put in order at once: rejection.
    "large nucleus": (RowSettings(0, top_p=0.85, temperature=1.6), 1500, 800),
    "small nucleus of all": (RowSettings(0, top_p=0.1, top_k=700, temperature=9.0), 1500, 350),
    "top_k": (RowSettings(0, top_k=400, temperature=4.0), 1500, 500),
    "top_k and min_p": (RowSettings(0, top_k=500, min_p=0.1, top_p=0.7, temperature=9.0), 1500, 350),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_distribution(shim_cache: Any, name: str) -> None:
    settings, vocab, draws = STATISTICS[name]
    logits = torch.randn(vocab) * 2 - torch.arange(vocab) * 0.01
    chi_square(ShimLauncher(cache_dir=shim_cache), logits, settings, draws)


def test_rejection(launcher: ShimLauncher) -> None:
    rejection_case(launcher)


def test_same_draws_in_every_order_and_batch(shim_cache: Any) -> None:
    """A draw depends on logits, parameters, seed, choice and position alone."""
    settings = [RowSettings(5), RowSettings(5, choice=1), RowSettings(6), RowSettings(7, top_p=0.7, temperature=2.0)]
    logits = torch.randn(4, 1300)
    found = []
    for backward in (False, True):
        run = Rows(ShimLauncher(backward=backward, cache_dir=shim_cache), 1300, settings)
        found.append([run.step(fenced(logits))[0] for _ in range(3)])
    assert found[0] == found[1]
    alone = [Rows(ShimLauncher(cache_dir=shim_cache), 1300, [one]) for one in settings]
    for step in range(3):
        assert [run.step(fenced(logits[i : i + 1]))[0][0] for i, run in enumerate(alone)] == found[0][step]
    resumed = Rows(ShimLauncher(cache_dir=shim_cache), 1300, settings, output_tokens=[1, 2])
    assert resumed.step(fenced(logits))[0] == found[0][2]
    assert found[0][0][0] != found[0][0][1] or found[0][1][0] != found[0][1][1]


def test_random_numbers(launcher: ShimLauncher) -> None:
    """Two equal logits: the token tells on which side of a half the CPU's random number lies."""
    seeds, choices, positions = [0, 1, 2**63 + 11, 2**64 - 1, 12345], [0, 3, 2**32 - 1, 7, 1], [0, 1, 5, 2, 3]
    for seed, choice, position in zip(seeds, choices, positions, strict=True):
        one = RowSettings(seed, choice=choice, top_k=2)
        run = Rows(launcher, 4, [one], output_tokens=[0] * position)
        logits = fenced(torch.tensor([[0.0, 0.0, -9.0, -9.0]]))
        bits = [run.step(logits)[0][0] for _ in range(4)]
        wanted = uniforms(np.full(4, seed % 2**64, np.uint64), choice, np.arange(position, position + 4)) >= 0.5
        assert bits == wanted.astype(int).tolist()


# ---- log probabilities ------------------------------------------------------------------------------------------


def test_logprobs(launcher: ShimLauncher) -> None:
    logprobs_case(launcher)


# ---- what the front refuses -------------------------------------------------------------------------------------


def test_refusals() -> None:
    launcher = ShimLauncher()
    tables = SamplerTables(2, 100, "cpu", edit_slots=1)
    buffers = SampleBuffers.allocate(2, tables)
    rows = torch.zeros(2, dtype=torch.int32)

    def refuses(match: str, logits: Tensor, rows: Tensor = rows, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            sample(launcher, tables, options.pop("buffers", buffers), logits, rows, stream=0, **options)

    good = torch.zeros(2, 100)
    refuses(r"float64 \[2, 100\]", good.double())
    refuses(r"\[2, 99\]", good[:, :99])
    refuses("neighbouring columns", torch.zeros(100, 2).t())
    refuses("rows is int64", good, rows.long())
    refuses("logits_index is int32", good, logits_index=torch.zeros(3, dtype=torch.int32))
    refuses("2 rows draw from 1 rows of logits", good[:1])
    refuses("logits is on meta", good.to("meta"))
    refuses("buffer tokens", good, buffers=buffers._replace(tokens=buffers.tokens[:1]))
    refuses("buffer summary", good, buffers=buffers._replace(summary=torch.zeros(2, 9, 2)))
    for settings, match in (
        (RowSettings(0, banned=[100]), "banned hold ids from 100"),
        (RowSettings(0, allowed=[-1, 3]), "allowed hold ids from -1"),
    ):
        with pytest.raises(ValueError, match=match):
            tables.join(0, settings)
    tables.join(0, RowSettings(0, banned=[1]))
    with pytest.raises(ValueError, match="row 0 must be free"):
        tables.join(0, RowSettings(0))
    with pytest.raises(ValueError, match="all 1 slots are taken"):
        tables.join(1, RowSettings(0, banned=[1]))
    tables.leave(0)
    assert tables.num_free_edit_slots == 1
    with pytest.raises(ValueError, match="row 0 is not taken"):
        tables.leave(0)
    with pytest.raises(ValueError, match="524288 tokens"):
        SamplerTables(1, 524288, "cpu")
    assert DRAW_DTYPE.itemsize == 14 * 8 + 8 + 16


# ---- planted bugs -----------------------------------------------------------------------------------------------


SCAN, DRAW, SELECT = "sampling_scan.cu", "sampling_draw.cu", "sampling_select.cuh"
BUGS = {
    "a bias is added where it was not asked for": (
        edits_case,
        SCAN,
        "slice[place] += state.shift_values[i];",
        "slice[place] += state.shift_values[0];",
    ),
    "an allowed id marks its neighbour": (edits_case, SCAN, "1u << place % 32", "2u << place % 32"),
    "a NaN is hidden by an edit": (broken_case, SCAN, "if (raw[block].y != raw[block].y) {", "if (false) {"),
    "held for one token too many": (
        edits_case,
        SCAN,
        "state.position < state.min_tokens ? state.num_held",
        "state.position <= state.min_tokens ? state.num_held",
    ),
    "presence for tokens of the prompt": (
        edits_case,
        SCAN,
        "times > 0.0f ? state.presence",
        "times >= 0.0f ? state.presence",
    ),
    "a block with nothing left has a NaN": (edits_case, SCAN, "top == -MR_INF ? 0.0f : top;", "top;"),
    "the last of equal logits": (
        ties_case,
        DRAW,
        "for (i32 i = 3; i >= 0; i--)\n            if (x[i] == top)",
        "for (i32 i = 0; i < 4; i++)\n            if (x[i] == top)",
    ),
    "the nucleus is one token short": (filtered_case, DRAW, "reached = first + i + 1;", "reached = first + i;"),
    "a drawn token outside of the nucleus is kept": (
        rejection_case,
        DRAW,
        "if (before.mass < wanted || before.count == 0) return id;",
        "return id;",
    ),
    "no barrier in the sort": (filtered_case, SELECT, "step /= 2) {\n            __syncthreads();", "step /= 2) {"),
}


@pytest.mark.parametrize("case", sorted({bug[0] for bug in BUGS.values()}, key=lambda case: case.__name__))
def test_planted_cases_without_a_bug(four_ways: Any, case: Any) -> None:
    four_ways(case)


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs(planted: Any, name: str) -> None:
    case, source, old, new = BUGS[name]
    planted({source: [(old, new)]}, case)
