"""The ops of sampling against their plain meaning, in every backend and for every vector width."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.kernels import ops, reference
from millrace.kernels.arguments import BROKEN, DRAW_DTYPE, EMPTY, Backend
from millrace.kernels.philox import uniforms
from millrace.kernels.torch_backend import TorchBackend

VOCABS = [1, 3, 17, 63, 64, 65, 129, 1000, 1024, 4099]
BIG = 35_001  # enough for a thread team, and no multiple of anything


def logits_of(rows, vocab, seed, spread=2.0):
    """Coarse values, as bfloat16 gives, so that ties are common."""
    x = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread
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
def test_block_maxima(backend: Backend, vocab, rows, data):
    x = logits_of(rows, vocab, data.draw(st.integers(0, 1000)))
    for value in data.draw(st.lists(st.sampled_from([np.nan, np.inf, -np.inf, 0.0, -0.0, 3e38, -3e38]), max_size=6)):
        x[data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, vocab - 1))] = value
    if data.draw(st.booleans()):
        x[0] = -torch.inf
    np.testing.assert_array_equal(ops.block_maxima(x, backends=[backend]), reference.block_maxima(x.numpy()))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_every_place_of_a_block_counts(backend: Backend, value):
    x = torch.full((4 * 64 + 7, 4 * 64 + 7), -5.0)
    x.fill_diagonal_(value)
    np.testing.assert_array_equal(ops.block_maxima(x, backends=[backend]), reference.block_maxima(x.numpy()))


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("spread", [0.0, 2.0, 60.0])
def test_block_sums(backend: Backend, vocab, spread):
    x = logits_of(4, vocab, 1, spread)
    x[1, 1::2] = -torch.inf
    x[2, : vocab // 2] = -torch.inf
    row_max = x.numpy().max(axis=1)
    sums = ops.block_sums(x, row_max, backends=[backend])
    np.testing.assert_allclose(sums, reference.block_sums(x.numpy(), row_max), rtol=2e-5, atol=1e-36)
    assert (sums[1].astype(bool) == reference.block_sums(x.numpy(), row_max)[1].astype(bool)).all() or spread > 2


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("spread", [0.01, 2.0, 6.0])
def test_draws_are_those_of_the_reference(backend: Backend, vocab, spread):
    x = logits_of(len(SETTINGS), vocab, vocab, spread)
    x[:, vocab // 3 : vocab // 2] = -torch.inf
    rows = [setting | {"seed": 7 + n, "choice": n % 3, "position": n * 10**10} for n, setting in enumerate(SETTINGS)]
    table = table_of(vocab, *rows)
    table["top_k"] = np.minimum(table["top_k"], vocab)
    drawer = ops.token_drawer(table, vocab, backends=[backend])
    for _ in range(2):
        before = table.copy()
        tokens, num_bad = drawer(x, np.arange(len(rows)))
        assert num_bad == 0
        for logits, record, token in zip(x.numpy(), before, tokens, strict=True):
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
def test_odd_distributions(backend: Backend, name, setting):
    x = torch.from_numpy(SHAPES[name](np.arange(3000)).astype(np.float32))[None]
    table = table_of(3000, setting | {"temperature": 4.0}, setting | {"temperature": 100.0, "seed": 5})
    drawer = ops.token_drawer(table, 3000, backends=[backend])
    for _ in range(3):
        before = table.copy()
        tokens, _ = drawer(x, np.arange(2), np.zeros(2, dtype=np.int64))
        for record, token in zip(before, tokens, strict=True):
            assert_drawn(x[0].numpy(), record, token)


def mixed_batch(rows=18, vocab=BIG):
    spreads = torch.linspace(0.01, 6.0, rows)[:, None]
    x = logits_of(rows, vocab, 3, 1.0) * spreads
    table = table_of(vocab, *(SETTINGS[row % len(SETTINGS)] | {"seed": row} for row in range(rows)))
    return x, table


def test_rows_are_alone_in_the_world(backend: Backend):
    """The same tokens in a batch, alone, from a row elsewhere, with any number of threads."""
    x, table = mixed_batch()
    rows = np.arange(len(table))
    expected, num_bad = ops.token_drawer(table.copy(), BIG, backends=[backend])(x, rows)
    assert num_bad == 0
    wide = torch.full((len(rows), BIG + 9), torch.nan)  # rows that lie apart
    wide[:, 3 : BIG + 3] = x
    order = np.random.default_rng(0).permutation(len(rows))
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        drawer = ops.token_drawer(table.copy(), BIG, backends=[backend])
        tokens, _ = drawer(wide[:, 3 : BIG + 3], order.astype(np.int32), order.astype(np.int32))
        assert tokens.tolist() == expected[order].tolist()
        drawer = ops.token_drawer(table.copy(), BIG, backends=[backend])
        for some in np.split(rows, [1, 4, 12, 14, 15]):
            tokens, _ = drawer(x, some, some)
            assert tokens.tolist() == expected[some].tolist()


def test_maxima_and_sums_have_the_same_bits_for_any_threads(compiled: Backend):
    x, _ = mixed_batch(5)
    maxima, sums = [], []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for part in (x, x[2:3]):
            maxima.append(ops.block_maxima(part, backends=[compiled]))
            sums.append(ops.block_sums(part, maxima[-1].max(axis=1), backends=[compiled]))
    for found in (maxima, sums):
        for whole, alone in zip(found[::2], found[1::2], strict=True):
            assert np.array_equal(whole, found[0])
            assert np.array_equal(alone[0], found[0][2])


def test_backends_draw_the_same_tokens(compiled: Backend):
    """They may differ where a number falls into the last bits of a bound: hardly ever."""
    x, table = mixed_batch(30, 5000)
    tables, drawn = [table.copy(), table.copy()], []
    for kept, backend in zip(tables, (compiled, TorchBackend()), strict=True):
        drawer = ops.token_drawer(kept, 5000, backends=[backend])
        drawn.append(np.stack([drawer(x, np.arange(30))[0] for _ in range(50)]))
    assert (drawn[0] != drawn[1]).sum() <= 2
    assert np.array_equal(*tables)


@pytest.mark.parametrize(("vocab", "place"), [(200, 0), (200, 70), (200, -1), (BIG, 5000)])
@pytest.mark.parametrize(("value", "code"), [(np.nan, BROKEN), (np.inf, BROKEN), (-np.inf, EMPTY)])
def test_a_bad_row_stays_alone(backend: Backend, vocab, place, value, code):
    x, table = mixed_batch(len(SETTINGS), vocab)
    table["top_k"] = np.minimum(table["top_k"], vocab)
    rows = np.arange(len(table))
    expected, _ = ops.token_drawer(table.copy(), vocab, backends=[backend])(x, rows)
    sick = np.arange(1, len(rows), 2)
    broken = x.clone()
    broken[sick, place] = value
    if code == EMPTY:
        broken[sick] = value
    drawer = ops.token_drawer(table, vocab, backends=[backend])
    tokens, num_bad = drawer(broken, rows)
    assert num_bad == len(sick)
    assert (tokens[sick] == code).all()
    assert tokens[::2].tolist() == expected[::2].tolist()
    assert table["position"].tolist() == [1, 0] * (len(rows) // 2) + [1] * (len(rows) % 2)


def test_what_a_draw_refuses(backend: Backend):
    table = table_of(10, {}, {}, {})
    table["top_k"][1] = 0  # not in use
    drawer = ops.token_drawer(table, 10, backends=[backend])
    x, rows = torch.zeros(2, 10), np.array([0, 2])
    for arguments, words in [
        ((torch.zeros(2, 11), rows), r"\[2, 11\].*\[num_logits, 10\]"),
        ((x.double(), rows), "float64"),
        ((x[0], rows), r"float32 \[10\]"),
        ((torch.zeros(10, 2).t(), rows), "side by side"),
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
        ((torch.zeros(4, 10), np.array([0, 2, 0, 2])), "twice"),
    ]:
        with pytest.raises(ValueError, match=words):
            drawer(*arguments)
    assert (table["position"] == 0).all()
    assert drawer(x[:0], rows[:0])[0].tolist() == []


def test_what_the_fronts_refuse():
    x = torch.zeros(2, 8)
    for call, words in [
        (lambda: ops.block_maxima(x.double()), "float64"),
        (lambda: ops.block_maxima(x.t()), "side by side"),
        (lambda: ops.block_maxima(x[0]), r"\[8\]"),
        (lambda: ops.block_sums(x, np.zeros(3, dtype=np.float32)), r"\[3\], not float32 \[2\]"),
        (lambda: ops.block_sums(x, np.zeros(2)), "float64"),
        (lambda: ops.token_drawer(np.zeros(2), 8), "DRAW_DTYPE"),
        (lambda: ops.token_drawer(np.zeros((2, 2), dtype=DRAW_DTYPE), 8), r"\[2, 2\]"),
        (lambda: ops.token_drawer(np.zeros(4, dtype=DRAW_DTYPE)[::2], 8), "DRAW_DTYPE"),
        (lambda: ops.token_drawer(np.zeros(2, dtype=DRAW_DTYPE), 0), "vocab is 0"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
