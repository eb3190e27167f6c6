import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from millrace.kernels.philox import uniforms
from millrace.runtime.sampling import SamplerState
from millrace.runtime.types import SamplingParams

EOS = (2, 3)


def coarse(num_rows, vocab, seed, spread=2.0):
    """Logits in eighths, as bfloat16 would give: ties are common, and float32 arithmetic on them is exact."""
    x = np.random.default_rng(seed).standard_normal((num_rows, vocab), dtype=np.float32) * np.float32(spread)
    return (x * 8).round() / 8


def state_of(params, vocab, *, prompt=(), output=(), seed=0, choice=0, eos=EOS, max_rows=1, row=0):
    state = SamplerState(max_rows, vocab, eos)
    state.join(row, params, seed, choice, prompt, output)
    return state


# --- every field against the reference ---------------------------------------------------------------------------


@st.composite
def cases(draw):
    vocab = draw(st.sampled_from([4, 7, 64, 130, 300, 1200]))
    token = st.integers(0, vocab - 1)
    tokens = st.lists(token, max_size=12)
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.1, 0.7, 1.0, 1.5, 20.0])),
        top_k=draw(st.sampled_from([-1, 0, 1, 2, 5, 70, 1000])),
        top_p=draw(st.sampled_from([1.0, 0.97, 0.8, 0.31, 0.003])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.013, 0.21, 1.0])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 2.0, 0.5])),
        presence_penalty=draw(st.sampled_from([0.0, 0.5, -1.0])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.25, -0.5])),
        logit_bias=draw(st.dictionaries(token, st.sampled_from([-100.0, -1.5, 0.25, 3.0, 100.0]), max_size=4)),
        allowed_token_ids=draw(st.none() | st.lists(token, min_size=1, max_size=20)),
        banned_token_ids=draw(st.lists(token, max_size=5)),
        min_tokens=draw(st.integers(0, 10)),
        stop_token_ids=draw(st.lists(token, max_size=3)),
        ignore_eos=draw(st.booleans()),
    )
    return vocab, params, draw(tokens), draw(tokens), draw(st.integers(0, 2**64 - 1)), draw(st.integers(0, 127))


@pytest.mark.slow
@given(cases(), st.integers(0, 2**31), st.sampled_from([0.0, 0.5, 2.0, 6.0]))
@settings(max_examples=250, deadline=None)
def test_random_parameters_against_the_reference(reference, case, logits_seed, spread):
    vocab, params, prompt, output, seed, choice = case
    logits = coarse(1, vocab, logits_seed, spread)
    before = logits.copy()
    expected = reference(params, prompt, output, EOS)
    state = state_of(params, vocab, prompt=prompt, output=output, seed=seed, choice=choice)
    sampled = state.sample(logits, [0])
    assert np.array_equal(logits, before)
    edited = expected.edited(logits[0].tolist())
    if max(edited) == -math.inf:
        assert sampled.tokens.tolist() == [-1]
        assert sampled.bad_rows.tolist() == [0] and "no token is left" in sampled.bad_reasons[0]
        return
    assert len(sampled.bad_rows) == 0
    token = int(sampled.tokens[0])
    if params.temperature == 0.0 or params.top_k == 1:
        assert token == expected.greedy(logits[0].tolist())
        return
    filtered = expected.filtered(logits[0].tolist())
    assume(not filtered.ambiguous)
    assert token in filtered.probability
    if (0 < params.top_k < vocab) or params.min_p > 0.0 or params.top_p < 1.0:
        order = filtered.ranked
    else:
        blocks = -(-vocab // 64)
        order = sorted(filtered.probability, key=lambda token: (token % blocks, token))
    # The inverse CDF in that order: the token's interval holds the row's uniform number.
    u = float(uniforms([seed], [choice], [len(output)])[0])
    low = sum(filtered.probability[other] for other in order[: order.index(token)])
    assert low - 1e-5 <= u <= low + filtered.probability[token] + 1e-5


FIELDS = {
    "bias": SamplingParams(temperature=0, logit_bias={5: 100.0}),
    "allowed": SamplingParams(temperature=0, allowed_token_ids=[30, 31]),
    "banned": SamplingParams(temperature=0, banned_token_ids=[0, 1]),
    "repetition": SamplingParams(temperature=0, repetition_penalty=4.0),
    "presence": SamplingParams(temperature=0, presence_penalty=1.0),
    "frequency": SamplingParams(temperature=0, frequency_penalty=0.25),
}


@pytest.mark.parametrize("name", FIELDS)
def test_each_edit_alone_over_many_steps(reference, name):
    """The same logits at every step, so that the penalties alone move the argmax."""
    params, vocab, steps = FIELDS[name], 100, 30
    logits = coarse(1, vocab, 5)
    logits[0, :4] = 6.0
    state, expected = state_of(params, vocab, prompt=[0, 0, 7]), reference(params, [0, 0, 7], [], EOS)
    plain = reference(SamplingParams(temperature=0), [], []).greedy(logits[0].tolist())
    changed = False
    for _ in range(steps):
        token = int(state.sample(logits, [0]).tokens[0])
        assert token == expected.greedy(logits[0].tolist())
        expected.output.append(token)
        changed |= token != plain
    assert changed, "the field did nothing"


@pytest.mark.parametrize(("ignore_eos", "held"), [(False, {2, 3, 9}), (True, {9})])
def test_min_tokens_holds_eos_and_stop_ids(ignore_eos, held):
    params = SamplingParams(temperature=0, min_tokens=3, stop_token_ids=[9], ignore_eos=ignore_eos)
    state = state_of(params, 20)
    for step in range(5):
        logits = np.zeros((1, 20), dtype=np.float32)
        logits[0, [2, 3, 9]] = [3.0, 4.0, 5.0]
        banned_now = held if step < 3 else set()
        best = next((token for token in (9, 3, 2) if token not in banned_now), 0)
        assert state.sample(logits, [0]).tokens.tolist() == [best], step


def test_top_k_one_is_greedy():
    logits = coarse(30, 200, 1, 0.3)
    greedy, one = SamplerState(30, 200), SamplerState(30, 200)
    for row in range(30):
        greedy.join(row, SamplingParams(temperature=0), row, 0, ())
        one.join(row, SamplingParams(top_k=1, temperature=2.0), row, 0, ())
    rows = np.arange(30)
    assert greedy.sample(logits, rows).tokens.tolist() == one.sample(logits, rows).tokens.tolist()


def test_greedy_takes_the_lowest_id_on_ties():
    logits = np.zeros((2, 300), dtype=np.float32)
    logits[0, [299, 130, 131]] = 1.0
    state = SamplerState(2, 300)
    for row in range(2):
        state.join(row, SamplingParams(temperature=0), 0, 0, ())
    assert state.sample(logits, [0, 1]).tokens.tolist() == [130, 0]


# --- draws follow the distribution --------------------------------------------------------------------------------

# Chi-square critical values at p = 0.001 by degrees of freedom.
CRITICAL = {
    2: 13.816, 3: 16.266, 4: 18.467, 5: 20.515, 6: 22.458, 7: 24.322, 8: 26.124, 9: 27.877, 10: 29.588, 11: 31.264,
    12: 32.909, 13: 34.528, 14: 36.123, 15: 37.697, 16: 39.252, 17: 40.790, 18: 42.312, 19: 43.820, 20: 45.315,
    39: 72.055,
}  # fmt: skip


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.6, top_k=6),
        SamplingParams(temperature=1.3, top_p=0.7),
        SamplingParams(min_p=0.15),
        SamplingParams(temperature=1.5, top_k=12, top_p=0.8, min_p=0.05),
        SamplingParams(allowed_token_ids=[1, 4, 6, 9, 20], logit_bias={4: 1.0, 20: -0.5}),
    ],
    ids=["softmax", "top_k", "top_p", "min_p", "together", "allowed"],
)
@pytest.mark.parametrize("vocab", [40, 1200])
def test_chi_square(reference, params, vocab):
    """In the large vocabulary few ids matter, but the sampler cannot know that beforehand."""
    rows, steps = 100, 60
    logits = np.full((1, vocab), -60.0, dtype=np.float32)
    logits[0, :40] = np.random.default_rng(12).standard_normal(40)
    expected = reference(params, [], []).filtered(logits[0].tolist())
    assert not expected.ambiguous
    state = SamplerState(rows, vocab)
    for row in range(rows):
        state.join(row, params, seed=row // 4, choice=row % 4, prompt_tokens=())
    index = np.zeros(rows, dtype=np.int64)
    drawn = np.concatenate([state.sample(logits, np.arange(rows), index).tokens for _ in range(steps)])
    counts = np.bincount(drawn, minlength=vocab)
    assert set(np.flatnonzero(counts)) <= set(expected.probability)
    possible = {token: p for token, p in expected.probability.items() if p > 1e-12}
    statistic = sum((counts[token] - rows * steps * p) ** 2 / (rows * steps * p) for token, p in possible.items())
    assert counts[list(possible)].sum() == rows * steps
    assert statistic < CRITICAL[len(possible) - 1]


# --- a row is alone in the world -----------------------------------------------------------------------------------

MIXED = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.8, logprobs=3),
    SamplingParams(top_k=50, top_p=0.9),
    SamplingParams(top_p=0.95),
    SamplingParams(temperature=3.0, top_p=0.9, logprobs=0),  # a nucleus too large for the first candidates
    SamplingParams(min_p=0.05, temperature=1.2),
    SamplingParams(repetition_penalty=1.3, temperature=0.9, logprobs=5),
    SamplingParams(temperature=0, frequency_penalty=0.7, presence_penalty=0.3),
    SamplingParams(logit_bias={7: 4.0, 8: -3.0}, min_tokens=50, stop_token_ids=[5]),
    SamplingParams(allowed_token_ids=list(range(0, 499, 3)), banned_token_ids=[9, 12], top_k=3),
]


class Request:
    def __init__(self, number, vocab):
        self.params = MIXED[number % len(MIXED)]
        self.number, self.vocab = number, vocab
        self.prompt = np.random.default_rng(number).integers(0, vocab, 20)
        self.tokens, self.logprobs = [], []

    def logits(self):
        """A function of what has been drawn, like a model's; rougher than eighths so that rounding could show."""
        rng = np.random.default_rng([self.number, *self.tokens])
        return rng.standard_normal(self.vocab, dtype=np.float32) * 3

    def join(self, state, row):
        state.join(row, self.params, self.number * 77, self.number % 3, self.prompt, self.tokens)


def run(requests, rows, steps, state, shuffle=None):
    """Steps all requests; the order of the batch and of the logits changes from step to step with `shuffle`."""
    for request, row in zip(requests, rows, strict=True):
        request.join(state, row)
    for _ in range(steps):
        order = np.arange(len(requests)) if shuffle is None else shuffle.permutation(len(requests))
        place = np.arange(len(requests)) if shuffle is None else shuffle.permutation(len(requests))
        logits = np.empty((len(requests), requests[0].vocab), dtype=np.float32)
        for i, number in enumerate(order):
            logits[place[i]] = requests[number].logits()
        index = None if shuffle is None else place
        sampled = state.sample(logits, np.asarray(rows)[order], index)
        found = {} if sampled.logprobs is None else {int(at): i for i, at in enumerate(sampled.logprobs.index)}
        for i, number in enumerate(order):
            requests[number].tokens.append(int(sampled.tokens[i]))
            if i in found:
                columns, at = sampled.logprobs, found[i]
                top = slice(0, int(columns.num_top[at]))
                requests[number].logprobs.append(
                    (columns.logprobs[at], columns.top_ids[at, top].tolist(), columns.top_logprobs[at, top].tolist())
                )


@pytest.mark.parametrize(("vocab", "batch", "steps"), [(1300, 3, 12), (1300, 64, 8), (40_007, 64, 3)])
def test_same_tokens_alone_and_in_any_batch(vocab, batch, steps):
    alone = [Request(number, vocab) for number in range(batch)]
    for request in alone:
        run([request], [0], steps, SamplerState(1, vocab, EOS))
    shuffle = np.random.default_rng(batch)
    together = [Request(number, vocab) for number in range(batch)]
    run(together, shuffle.permutation(100)[:batch], steps, SamplerState(100, vocab, EOS), shuffle)
    for one, other in zip(alone, together, strict=True):
        assert one.tokens == other.tokens
        assert one.logprobs == other.logprobs
        assert len(one.logprobs) == (steps if one.params.logprobs is not None else 0)


def test_same_tokens_with_more_threads():
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        requests = [Request(number, 40_007) for number in range(10)]
        run(requests, range(10), 3, SamplerState(10, 40_007, EOS))
        results.append([(request.tokens, request.logprobs) for request in requests])
    assert results[0] == results[1]


def test_preempted_requests_go_on_as_if_nothing_had_happened():
    steady = [Request(number, 1300) for number in range(20)]
    run(steady, range(20), 16, SamplerState(20, 1300, EOS))
    broken = [Request(number, 1300) for number in range(20)]
    state = SamplerState(25, 1300, EOS)
    run(broken, range(20), 7, state)
    for row in range(20):
        state.leave(row)
    run(broken, range(24, 4, -1), 9, state)
    assert [request.tokens for request in broken] == [request.tokens for request in steady]


def test_a_row_keeps_nothing_of_who_was_there_before():
    fresh = [Request(number, 500) for number in range(10)]
    for request in fresh:
        run([request], [0], 8, SamplerState(1, 500, EOS))
    state = SamplerState(1, 500, EOS)
    for number in range(10):
        request = Request(number, 500)
        run([request], [0], 8, state)
        state.leave(0)
        assert request.tokens == fresh[number].tokens


def test_choices_share_logits_and_differ_reproducibly():
    logits = coarse(2, 500, 4)
    drawn = []
    for _ in range(2):
        state = SamplerState(16, 500)
        for choice in range(16):
            state.join(choice, SamplingParams(n=16), 42, choice, ())
        drawn.append(state.sample(logits, np.arange(16), np.full(16, 1)).tokens.tolist())
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) > 8


def test_seed_and_position_matter_and_negative_seeds_are_seeds():
    logits = np.zeros((1, 1000), dtype=np.float32)
    first = [int(state_of(SamplingParams(), 1000, seed=seed).sample(logits, [0]).tokens[0]) for seed in range(30)]
    assert len(set(first)) > 25
    later = [
        int(state_of(SamplingParams(), 1000, output=[1] * position).sample(logits, [0]).tokens[0])
        for position in range(30)
    ]
    assert len(set(later)) > 25
    negative = state_of(SamplingParams(), 1000, seed=-1).sample(logits, [0]).tokens
    assert negative.tolist() == state_of(SamplingParams(), 1000, seed=2**64 - 1).sample(logits, [0]).tokens.tolist()


# --- what can go wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("where", [0, 64, 499])
def test_broken_logits_hurt_only_their_row(poison, where):
    requests = [Request(number, 500) for number in range(12)]
    healthy, state = SamplerState(12, 500, EOS), SamplerState(12, 500, EOS)
    for row, request in enumerate(requests):
        request.join(healthy, row)
        request.join(state, row)
    logits = np.stack([request.logits() for request in requests])
    expected = healthy.sample(logits, np.arange(12)).tokens
    broken = logits.copy()
    sick = [0, 2, 6, 9]  # greedy, filtered, penalised, and one whose allowed ids may not hold the place at all
    broken[sick, where] = poison
    sampled = state.sample(broken, np.arange(12))
    assert sampled.bad_rows.tolist() == sick
    assert all("NaN" in reason for reason in sampled.bad_reasons)
    others = [row for row in range(12) if row not in sick]
    assert sampled.tokens[others].tolist() == expected[others].tolist()
    assert sampled.tokens[sick].tolist() == [-1] * 4
    assert sampled.logprobs is not None and not set(sampled.logprobs.index.tolist()) & set(sick)
    # A bad row has not moved: with sound logits it draws what it would have drawn.
    assert state.sample(logits[sick], sick).tokens.tolist() == expected[sick].tolist()


def test_masked_logits_are_fine_and_an_empty_row_is_not():
    logits = np.full((2, 100), -np.inf, dtype=np.float32)
    logits[0, 40] = 1.0
    for params in MIXED[:8]:
        state = SamplerState(2, 100, EOS)
        for row in range(2):
            state.join(row, params, 0, 0, [1, 2])
        sampled = state.sample(logits, [0, 1])
        assert sampled.tokens.tolist() == [40, -1]
        assert sampled.bad_rows.tolist() == [1]


@pytest.mark.parametrize("scale", [1e-30, 1e4, 1e37])
@pytest.mark.parametrize("temperature", [1e-300, 1e-5, 0.01, 100.0])
def test_extreme_magnitudes_draw_something(scale, temperature):
    logits = coarse(8, 300, 6) * np.float32(scale)
    for extra in ({}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.3}, {"top_p": 0.9999999}):
        state = SamplerState(8, 300)
        for row in range(8):
            state.join(row, SamplingParams(temperature=temperature, **extra), row, 0, ())
        sampled = state.sample(logits, np.arange(8))
        assert len(sampled.bad_rows) == 0
        assert ((sampled.tokens >= 0) & (sampled.tokens < 300)).all()


def test_misuse_is_refused_with_the_numbers():
    state = state_of(SamplingParams(), 10, max_rows=4, row=1)
    good = np.zeros((2, 10), dtype=np.float32)
    for arguments, words in [
        ((np.zeros((2, 11), dtype=np.float32), [1]), r"\[2, 11\].*\[num_logits, 10\]"),
        ((good.astype(np.float64), [1]), "float64"),
        ((good, [1], [2]), "reaches 2, but there are 2 rows"),
        ((good, [1], [0, 1]), "2 entries for 1 rows"),
        ((good, [0]), "not joined"),
        ((good, [4]), "not joined"),
        ((good, [1, 1]), "twice"),
    ]:
        with pytest.raises(ValueError, match=words):
            state.sample(*arguments)
    with pytest.raises(ValueError, match="row 1 is taken"):
        state.join(1, SamplingParams(), 0, 0, ())
    with pytest.raises(ValueError, match="row 4 is outside of 0 to 3"):
        state.join(4, SamplingParams(), 0, 0, ())
    with pytest.raises(ValueError, match="row 0 is not taken"):
        state.leave(0)
    with pytest.raises(ValueError, match="ids from 3 to 10, but the vocabulary ends at 9"):
        state.join(0, SamplingParams(), 0, 0, [3, 10])
    state.join(0, SamplingParams(), 0, 0, [3, 9])  # the refusal left nothing behind
    with pytest.raises(ValueError, match=r"EOS ids \[10\]"):
        SamplerState(1, 10, (10,))


def test_an_empty_step_and_strided_logits():
    state = state_of(SamplingParams(temperature=0), 100)
    assert state.sample(np.zeros((0, 100), dtype=np.float32), []).tokens.tolist() == []
    wide = coarse(2, 200, 8)
    for logits in (wide[1:, 100:], np.asfortranarray(wide)[1:, :100]):
        expected = int(logits[0].argmax())
        assert state.sample(logits, [0]).tokens.tolist() == [expected]
