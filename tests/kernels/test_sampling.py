"""Sampling on the host against its plain meaning, in numpy and in C++ for every vector width."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.kernels import host_sampling, reference
from millrace.kernels.cpu_sampling import CpuSampling
from millrace.kernels.host_sampling import block_maxima, block_sums, token_drawer
from millrace.kernels.numpy_sampling import NumpySampling
from millrace.kernels.philox import uniforms
from millrace.kernels.sampling import BROKEN, DRAW_DTYPE, EMPTY, Sampling

VOCABS = [1, 3, 17, 63, 64, 65, 129, 1000, 1024, 4099]
BIG = 35_001  # enough for a thread team, and no multiple of anything


def logits_of(rows, vocab, seed, spread=2.0):
    """Coarse values, as bfloat16 gives, so that ties are common."""
    x = np.random.default_rng(seed).standard_normal((rows, vocab), dtype=np.float32) * np.float32(spread)
    return (x * 8).round() / 8


def table_of(vocab, *rows):
    """Settings by keyword; what is not named is off."""
    table = np.zeros(len(rows), dtype=DRAW_DTYPE)
    for record, row in zip(table, rows, strict=True):
        plain = {"seed": 1, "top_k": vocab, "top_p": 1.0, "temperature": 1.0}
        for name, value in (plain | row).items():
            record[name] = value
    return table


# Of these, the first bound on a nucleus keeps few ids, many, or all; ladders and clusters take the finest cuts.
SETTINGS = [
    {"greedy": 1},
    {},
    {"temperature": 0.3},
    {"temperature": 30.0},
    {"top_p": 0.9},
    {"top_p": 0.5, "temperature": 20.0},
    {"top_p": 0.999_999},
    {"top_p": 1e-6},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 3000, "temperature": 5.0},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"min_p": 1e-6, "temperature": 10.0, "top_p": 0.7},
    {"top_k": 200, "top_p": 0.8, "min_p": 0.001, "temperature": 3.0},
]


def assert_drawn(logits, record, token):
    """The interval of [0, 1) that leads to the token holds the row's number, as near as rounding can tell."""
    if record["greedy"]:
        assert token == logits.argmax()
        return
    u = float(uniforms(record["seed"], record["choice"], record["position"])[0])
    misses = []
    for slack in (0.0, -2e-6, 2e-6):  # a filter's bound may lie that near an id
        cut = {
            name: record[name] if record[name] in (0.0, 1.0) else record[name] + slack for name in ("top_p", "min_p")
        }
        ids, probabilities = reference.draw_order(logits, record["temperature"], record["top_k"], **cut)
        place = np.flatnonzero(ids == token)
        if len(place):
            low = probabilities[: place[0]].sum()
            misses.append(max(low - u, u - low - probabilities[place[0]]))
    assert misses
    assert min(misses) < 1e-5


@given(st.sampled_from(VOCABS), st.integers(1, 5), st.data())
@settings(max_examples=60, deadline=None)
def test_block_maxima(sampling: Sampling, vocab, rows, data):
    x = logits_of(rows, vocab, data.draw(st.integers(0, 1000)))
    for value in data.draw(st.lists(st.sampled_from([np.nan, np.inf, -np.inf, 0.0, -0.0, 3e38, -3e38]), max_size=6)):
        x[data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, vocab - 1))] = value
    if data.draw(st.booleans()):
        x[0] = -np.inf
    np.testing.assert_array_equal(block_maxima(x, sampling=sampling), reference.block_maxima(x))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_every_place_of_a_block_counts(sampling: Sampling, value):
    x = np.full((4 * 64 + 7, 4 * 64 + 7), -5.0, dtype=np.float32)
    np.fill_diagonal(x, value)
    np.testing.assert_array_equal(block_maxima(x, sampling=sampling), reference.block_maxima(x))


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("spread", [0.0, 2.0, 60.0])
def test_block_sums(sampling: Sampling, vocab, spread):
    x = logits_of(4, vocab, 1, spread)
    x[1, 1::2] = -np.inf
    x[2, : vocab // 2] = -np.inf
    row_max = x.max(axis=1)
    sums = block_sums(x, row_max, sampling=sampling)
    np.testing.assert_allclose(sums, reference.block_sums(x, row_max), rtol=2e-5, atol=1e-36)
    assert (sums[1].astype(bool) == reference.block_sums(x, row_max)[1].astype(bool)).all() or spread > 2


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("spread", [0.01, 2.0, 6.0])
def test_draws_are_those_of_the_reference(sampling: Sampling, vocab, spread):
    x = logits_of(len(SETTINGS), vocab, vocab, spread)
    x[:, vocab // 3 : vocab // 2] = -np.inf
    rows = [setting | {"seed": 7 + n, "choice": n % 3, "position": n * 10**10} for n, setting in enumerate(SETTINGS)]
    table = table_of(vocab, *rows)
    table["top_k"] = np.minimum(table["top_k"], vocab)
    drawer = token_drawer(table, vocab, sampling=sampling)
    for _ in range(2):
        before = table.copy()
        tokens, num_bad = drawer(x, np.arange(len(rows)))
        assert num_bad == 0
        for logits, record, token in zip(x, before, tokens, strict=True):
            assert_drawn(logits, record, token)
        assert (table["position"] == before["position"] + 1).all()


SHAPES = {
    "all equal": lambda i: 0.0 * i,
    "ladder": lambda i: -0.01 * i,
    "steep ladder": lambda i: -0.5 * i,
    "outlier over a cluster": lambda i: np.where(i == 99, 50.0, 1e-5 * np.sin(i)),
    "two clusters": lambda i: np.where(i % 2, 5.0 + 1e-6 * i, -5.0 - 1e-6 * i),
    "tiny": lambda i: 1e-38 * np.sin(i),
    "huge": lambda i: 1e37 * np.sin(i),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    "setting", [{"top_p": 0.5}, {"top_p": 0.99}, {"top_k": 1500}, {"min_p": 1e-4, "top_p": 0.9}, {}]
)
def test_odd_distributions(sampling: Sampling, name, setting):
    x = SHAPES[name](np.arange(3000)).astype(np.float32)[None]
    table = table_of(3000, setting | {"temperature": 4.0}, setting | {"temperature": 100.0, "seed": 5})
    drawer = token_drawer(table, 3000, sampling=sampling)
    for _ in range(3):
        before = table.copy()
        tokens, _ = drawer(x, np.arange(2), np.zeros(2, dtype=np.int64))
        for record, token in zip(before, tokens, strict=True):
            assert_drawn(x[0], record, token)


def mixed_batch(rows=18, vocab=BIG):
    spreads = np.linspace(0.01, 6.0, rows, dtype=np.float32)[:, None]
    x = logits_of(rows, vocab, 3, 1.0) * spreads
    table = table_of(vocab, *(SETTINGS[row % len(SETTINGS)] | {"seed": row} for row in range(rows)))
    return x, table


def test_rows_are_alone_in_the_world(sampling: Sampling):
    """The same tokens in a batch, alone, from a row elsewhere, with any number of threads."""
    x, table = mixed_batch()
    rows = np.arange(len(table))
    expected, num_bad = token_drawer(table.copy(), BIG, sampling=sampling)(x, rows)
    assert num_bad == 0
    wide = np.full((len(rows), BIG + 9), np.nan, dtype=np.float32)  # rows that lie apart
    wide[:, 3 : BIG + 3] = x
    order = np.random.default_rng(0).permutation(len(rows))
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        drawer = token_drawer(table.copy(), BIG, sampling=sampling)
        tokens, _ = drawer(wide[:, 3 : BIG + 3], order.astype(np.int32), order.astype(np.int32))
        assert tokens.tolist() == expected[order].tolist()
        drawer = token_drawer(table.copy(), BIG, sampling=sampling)
        for some in np.split(rows, [1, 4, 12, 14, 15]):
            tokens, _ = drawer(x, some, some)
            assert tokens.tolist() == expected[some].tolist()


def test_logits_may_lie_anyhow_in_memory(sampling: Sampling):
    x, table = mixed_batch(8, 1300)
    table["top_k"] = np.minimum(table["top_k"], 1300)
    rows = np.arange(8)
    expected = token_drawer(table.copy(), 1300, sampling=sampling)(x, rows)[0].tolist()
    maxima = block_maxima(x, sampling=sampling)
    fixed = x.copy()
    fixed.flags.writeable = False
    for other in (fixed, x[::-1].copy()[::-1], np.repeat(x, 2, axis=0)[::2]):
        assert token_drawer(table.copy(), 1300, sampling=sampling)(other, rows)[0].tolist() == expected
        assert np.array_equal(block_maxima(other, sampling=sampling), maxima)
    shared = np.broadcast_to(x[3], x.shape)
    assert token_drawer(table.copy(), 1300, sampling=sampling)(shared, rows)[0][3] == expected[3]
    single = token_drawer(table_of(1, {}, {}), 1, sampling=sampling)
    assert single(x[:2, 5][:, None], rows[:2])[0].tolist() == [0, 0]


def test_maxima_and_sums_have_the_same_bits_for_any_threads(compiled_sampling: Sampling):
    x, _ = mixed_batch(5)
    maxima, sums = [], []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for part in (x, x[2:3]):
            maxima.append(block_maxima(part, sampling=compiled_sampling))
            sums.append(block_sums(part, maxima[-1].max(axis=1), sampling=compiled_sampling))
    for found in (maxima, sums):
        for whole, alone in zip(found[::2], found[1::2], strict=True):
            assert np.array_equal(whole, found[0])
            assert np.array_equal(alone[0], found[0][2])


def test_both_draw_the_same_tokens(compiled_sampling: Sampling):
    """They may differ where a number falls into the last bits of a bound: hardly ever."""
    x, table = mixed_batch(30, 5000)
    tables, drawn = [table.copy(), table.copy()], []
    for kept, one in zip(tables, (compiled_sampling, NumpySampling()), strict=True):
        drawer = token_drawer(kept, 5000, sampling=one)
        drawn.append(np.stack([drawer(x, np.arange(30))[0] for _ in range(50)]))
    assert (drawn[0] != drawn[1]).sum() <= 2
    assert np.array_equal(*tables)


@pytest.mark.parametrize(("vocab", "place"), [(200, 0), (200, 70), (200, -1), (BIG, 5000)])
@pytest.mark.parametrize(("value", "code"), [(np.nan, BROKEN), (np.inf, BROKEN), (-np.inf, EMPTY)])
def test_a_bad_row_stays_alone(sampling: Sampling, vocab, place, value, code):
    x, table = mixed_batch(len(SETTINGS), vocab)
    table["top_k"] = np.minimum(table["top_k"], vocab)
    rows = np.arange(len(table))
    expected, _ = token_drawer(table.copy(), vocab, sampling=sampling)(x, rows)
    sick = np.arange(1, len(rows), 2)
    broken = x.copy()
    broken[sick, place] = value
    if code == EMPTY:
        broken[sick] = value
    drawer = token_drawer(table, vocab, sampling=sampling)
    tokens, num_bad = drawer(broken, rows)
    assert num_bad == len(sick)
    assert (tokens[sick] == code).all()
    assert tokens[::2].tolist() == expected[::2].tolist()
    assert table["position"].tolist() == [1, 0] * (len(rows) // 2) + [1] * (len(rows) % 2)


def test_what_a_draw_refuses(sampling: Sampling):
    table = table_of(10, {}, {}, {})
    table["top_k"][1] = 0  # not in use
    drawer = token_drawer(table, 10, sampling=sampling)
    x, rows = np.zeros((2, 10), dtype=np.float32), np.array([0, 2])
    for arguments, words in [
        ((np.zeros((2, 11), dtype=np.float32), rows), r"\[2, 11\].*\[num_logits, 10\]"),
        ((x.astype(np.float64), rows), "float64"),
        ((x[0], rows), r"float32 \[10\]"),
        ((np.zeros((10, 2), dtype=np.float32).T, rows), "side by side"),
        ((np.zeros(3, dtype=[("x", "f4", 10), ("odd", "u1")])["x"], rows), r"strides of \(41, 4\) bytes"),
        ((x, rows.astype(np.float32)), "float32"),
        ((x, rows.astype(np.int16)), "int16"),
        ((x, rows, rows / 2), "logits_index is float64"),
        ((x, rows[None]), r"rows is int64 \[1, 2\]"),
        ((x, rows, np.array([0, 2])), "reaches 2, but there are 2 rows"),
        ((x, rows, np.array([-1, 0])), "logits_index"),
        ((x, rows, np.array([0])), "1 entries for 2 rows"),
        ((x[:1], rows), "reaches 1, but there are 1 rows"),
        ((x, np.array([0, 1])), "not joined"),
        ((x, np.array([0, 3])), "not joined"),
        ((x, np.array([0, -1])), "not joined"),
        ((x, np.array([2, 2])), "twice"),
        ((np.zeros((4, 10), dtype=np.float32), np.array([0, 2, 0, 2])), "twice"),
    ]:
        with pytest.raises(ValueError, match=words):
            drawer(*arguments)
    assert (table["position"] == 0).all()
    assert drawer(x[:0], rows[:0])[0].tolist() == []


def test_what_the_fronts_refuse():
    x = np.zeros((2, 8), dtype=np.float32)
    for call, words in [
        (lambda: block_maxima(x.astype(np.float64)), "float64"),
        (lambda: block_maxima(x.T), "side by side"),
        (lambda: block_maxima(np.zeros((2, 0), dtype=np.float32)), r"\[2, 0\]"),
        (lambda: block_maxima(x[0]), r"\[8\]"),
        (lambda: block_sums(x, np.zeros(3, dtype=np.float32)), r"\[3\], not float32 \[2\]"),
        (lambda: block_sums(x, np.zeros(2)), "float64"),
        (lambda: token_drawer(np.zeros(2), 8), "DRAW_DTYPE"),
        (lambda: token_drawer(np.zeros((2, 2), dtype=DRAW_DTYPE), 8), r"\[2, 2\]"),
        (lambda: token_drawer(np.zeros(4, dtype=DRAW_DTYPE)[::2], 8), "DRAW_DTYPE"),
        (lambda: token_drawer(np.zeros(2, dtype=DRAW_DTYPE), 0), "vocab is 0"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()


def test_the_library_is_preferred(monkeypatch: pytest.MonkeyPatch, compiled_sampling: Sampling):
    library = compiled_sampling._library
    monkeypatch.setattr(host_sampling, "default_library", lambda: library)
    assert isinstance(host_sampling.default_sampling(), CpuSampling)
    monkeypatch.setattr(host_sampling, "default_library", lambda: None)
    assert isinstance(host_sampling.default_sampling(), NumpySampling)
    assert block_maxima(np.ones((1, 65), dtype=np.float32)).tolist() == [[1.0, 1.0]]
