"""The drawing functions over a fine grid of uniform numbers: how much of [0, 1) leads to a token is its probability."""

import numpy as np
import pytest

from millrace.kernels import numpy_sampling as d
from millrace.kernels.sampling import num_blocks

GRID = 1500
UNIFORM = (np.arange(GRID) + 0.5) / GRID


def logits_like_a_model(vocab, seed, spread=2.0):
    """Coarse values, as bfloat16 gives, so that ties are common."""
    x = np.random.default_rng(seed).standard_normal((1, vocab), dtype=np.float32) * np.float32(spread)
    return (x * 8).round() / 8


def probabilities(x, temperature):
    weights = np.exp((x.astype(np.float64) - x.max()) / temperature)
    return weights / weights.sum()


@pytest.mark.parametrize("vocab", [1, 5, 63, 64, 65, 500, 1000])
def test_maxima(vocab):
    x = np.concatenate([logits_like_a_model(vocab, seed) for seed in range(20)])
    maxima = d.block_maxima(x)
    assert maxima.shape == (20, num_blocks(vocab))
    for row, values in enumerate(x):
        expected = [values[start : start + d.BLOCK].max() for start in range(0, vocab, d.BLOCK)]
        assert maxima[row].tolist() == expected


@pytest.mark.parametrize("vocab", [1, 5, 64, 130, 1000])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
def test_draw_from_weights_follows_softmax(vocab, temperature):
    x = logits_like_a_model(vocab, 3)
    x[0, vocab // 2] = -np.inf if vocab > 1 else 0.0
    weights, sums = d.softmax_weights(x, x.max(axis=1), np.array([temperature]))
    tokens = d.draw_from_weights(weights.repeat(GRID, axis=0), sums.repeat(GRID, axis=0), UNIFORM)
    share = np.bincount(tokens, minlength=vocab) / GRID
    # A token's stretch of [0, 1) is one interval, so its share of the grid is right to one grid point.
    np.testing.assert_allclose(share, probabilities(x[0], temperature), atol=1.01 / GRID + 1e-6)


@pytest.mark.parametrize("vocab", [1, 7, 64, 130, 1003])
def test_weights_have_the_same_bits_at_any_place(vocab):
    x = np.random.default_rng(vocab).standard_normal((9, vocab), dtype=np.float32) * 7
    row_max, temperature = x.max(axis=1), np.linspace(0.3, 3.0, 9)
    expected = [part.copy() for part in d.softmax_weights(x, row_max, temperature)]
    apart = np.full((9, vocab + 5), np.nan, dtype=np.float32)
    apart[:, 3 : vocab + 3] = x
    for logits in (x, apart[:, 3 : vocab + 3]):
        for some in (slice(4, 5), slice(2, 7), slice(8, 9)):
            found = d.softmax_weights(logits[some], row_max[some], temperature[some])
            for whole, part in zip(expected, found, strict=True):
                assert np.array_equal(whole[some], part)


@pytest.mark.parametrize("uniform", [0.0, 2.0**-53, 1.0 - 2.0**-53])
def test_extreme_uniforms_draw_a_possible_token(uniform):
    x = np.full((1, 200), -np.inf, dtype=np.float32)
    x[0, [17, 90, 150]] = [0.1, 0.3, 0.2]
    weights, sums = d.softmax_weights(x, np.array([0.3], dtype=np.float32), np.ones(1))
    assert d.draw_from_weights(weights, sums, np.array([uniform]))[0] in (17, 90, 150)
    assert d.draw_from_nucleus(weights[0, :200], x[0], 0.99, uniform) in (17, 90, 150)


@pytest.mark.parametrize("vocab", [40, 64, 150, 1000])
@pytest.mark.parametrize("count", [1, 3, 20, 5000])
def test_candidates_are_complete_and_in_order(vocab, count):
    x = np.concatenate([logits_like_a_model(vocab, seed) for seed in range(4)])
    x[1, ::2] = -np.inf
    x[2, :5] = [-0.0, 0.0, -0.0, 0.0, 0.0]
    maxima = d.block_maxima(x)
    bound = d.kth_block_maximum(maxima, np.full(4, count))
    ids, values = d.candidates(x, maxima, bound)
    for row in range(4):
        possible = sorted((token for token in range(vocab) if x[row, token] > -np.inf), key=lambda t: (-x[row, t], t))
        found = ids[row][ids[row] >= 0].tolist()
        assert found == possible[: len(found)]
        assert len(found) >= min(count, len(possible))
        assert values[row, : len(found)].tolist() == x[row, found].tolist()
        assert (values[row, len(found) :] == -np.inf).all()


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize(("temperature", "spread"), [(1.0, 2.0), (0.2, 2.0), (30.0, 1.0), (1.0, 0.0)])
def test_nucleus_without_sorting_equals_the_sorted_one(top_p, temperature, spread):
    vocab = 777
    x = logits_like_a_model(vocab, 9, spread)
    weights, _ = d.softmax_weights(x, x.max(axis=1), np.array([temperature]))
    values = x[0]
    tokens = [d.draw_from_nucleus(weights[0, :vocab], values, top_p, u) for u in UNIFORM]
    full = probabilities(values, temperature)
    ranked = np.lexsort((np.arange(vocab), -values))
    kept = ranked[: int((full[ranked].cumsum() < top_p).sum()) + 1]
    expected = np.zeros(vocab)
    expected[kept] = full[kept] / full[kept].sum()
    share = np.bincount(tokens, minlength=vocab) / GRID
    np.testing.assert_allclose(share, expected, atol=1.01 / GRID + 1e-5)
    assert set(tokens) <= set(kept.tolist())


def test_reach_leaves_out_only_what_is_below():
    row_max, temperature = np.array([5.0, -300.0, 0.0], dtype=np.float32), np.array([1.0, 0.01, 100.0])
    weight = np.array([0.3, 1.0, 1e-8])
    bound = d.reach(row_max, temperature, weight)
    assert (np.exp((bound.astype(np.float64) - row_max) / temperature) <= weight).all()
    assert (d.reach(row_max, temperature, np.zeros(3)) == np.finfo(np.float32).min).all()
