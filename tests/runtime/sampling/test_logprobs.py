import numpy as np
import pytest

from millrace.runtime.sampling import SamplerState, prompt_logprobs
from millrace.runtime.types import SamplingParams


def coarse(num_rows, vocab, seed):
    x = np.random.default_rng(seed).standard_normal((num_rows, vocab), dtype=np.float32) * np.float32(2.0)
    return (x * 8).round() / 8  # in eighths, so that ties are common


def check(columns, logits, logits_index, tokens, num_top):
    exact = logits.astype(np.float64)
    expected = exact - np.logaddexp.reduce(exact, axis=1, keepdims=True)
    for i, (source, token, k) in enumerate(zip(logits_index, tokens, num_top, strict=True)):
        row = expected[source]
        assert columns.logprobs[i] == pytest.approx(row[token], abs=2e-6, rel=2e-6)
        ranked = sorted(range(len(row)), key=lambda t: (-float(logits[source, t]), t))[:k]
        assert columns.num_top[i] == len(ranked)
        assert columns.top_ids[i, : len(ranked)].tolist() == ranked
        np.testing.assert_allclose(columns.top_logprobs[i, : len(ranked)], row[ranked], atol=2e-6, rtol=2e-6)
        assert (columns.top_ids[i, len(ranked) :] == -1).all()
        assert (columns.top_logprobs[i, len(ranked) :] == -np.inf).all()


@pytest.mark.parametrize("vocab", [8, 300, 1500])
def test_sampled_logprobs_are_those_of_the_raw_logits(vocab):
    """Penalties, bias, temperature and filters change the draw, never what is reported."""
    asked = [None, 0, 3, 20, 1, None]
    state = SamplerState(6, vocab)
    for row, k in enumerate(asked):
        params = SamplingParams(
            logprobs=k, temperature=0.5 * row, top_p=0.9, repetition_penalty=1.5, logit_bias={1: 5.0, 2: -100.0}
        )
        state.join(row, params, row, 0, [1, 2, 3])
    logits, index = coarse(3, vocab, 1), np.array([2, 2, 0, 1, 0, 1])
    rows = np.array([5, 1, 2, 3, 4, 0])
    for _ in range(4):
        sampled = state.sample(logits, rows, index)
        places = [1, 2, 3, 4]
        assert sampled.logprobs.index.tolist() == places
        check(sampled.logprobs, logits, index[places], sampled.tokens[places], [0, 3, 20, 1])


def test_no_columns_where_nobody_asks():
    state = SamplerState(2, 50)
    for row in range(2):
        state.join(row, SamplingParams(), 0, 0, ())
    assert state.sample(coarse(2, 50, 0), [0, 1]).logprobs is None


@pytest.mark.slow
@pytest.mark.parametrize(("count", "vocab"), [(1, 70), (40, 1000), (30, 60_000)])
@pytest.mark.parametrize("k", [0, 1, 20])
def test_prompt_logprobs(count, vocab, k):
    logits = coarse(count, vocab, 2)
    tokens = np.random.default_rng(0).integers(0, vocab, count)
    columns = prompt_logprobs(logits, tokens, k)
    assert columns.index.tolist() == list(range(count))
    assert columns.top_ids.shape == (count, k)
    picked = range(0, count, 1 if vocab < 2000 else 13)  # the loop below is slow
    for i in picked:
        part = prompt_logprobs(logits[i : i + 1], tokens[i : i + 1], k)
        assert part.logprobs[0] == columns.logprobs[i]
        assert part.top_ids[0].tolist() == columns.top_ids[i].tolist()
        check(part, logits[i : i + 1], [0], tokens[i : i + 1], [k])


def test_masked_tokens_have_no_probability():
    logits = np.full((1, 100), -np.inf, dtype=np.float32)
    logits[0, [3, 50]] = 2.0
    columns = prompt_logprobs(logits, [7], 4)
    assert columns.logprobs[0] == -np.inf
    assert columns.num_top.tolist() == [2]
    assert columns.top_ids[0].tolist() == [3, 50, -1, -1]
    np.testing.assert_allclose(columns.top_logprobs[0, :2], np.log(0.5))


def test_broken_prompt_logits_touch_only_their_position():
    logits = coarse(5, 100, 3)
    healthy = prompt_logprobs(logits, range(5), 2)
    logits[1, 70], logits[3, 0] = np.nan, np.inf
    columns = prompt_logprobs(logits, range(5), 2)
    assert columns.index.tolist() == [0, 1, 2, 3, 4]
    assert np.isnan(columns.logprobs).tolist() == [False, True, False, True, False]
    assert columns.num_top.tolist() == [2, 0, 2, 0, 2]
    for i in (0, 2, 4):
        assert columns.logprobs[i] == healthy.logprobs[i]
        assert columns.top_ids[i].tolist() == healthy.top_ids[i].tolist()
        assert columns.top_logprobs[i].tolist() == healthy.top_logprobs[i].tolist()


def test_prompt_logprobs_need_one_token_per_row():
    logits = coarse(5, 100, 3)
    with pytest.raises(ValueError, match="5 rows of logits need as many next_tokens, but 4"):
        prompt_logprobs(logits, range(4), 2)
