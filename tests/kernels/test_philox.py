import numpy as np
import pytest

from millrace.kernels.philox import philox4x32, uniforms

# counter, key, output; from the file kat_vectors of the Random123 distribution.
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_known_answers(counter, key, output):
    result = philox4x32(np.array(counter, dtype=np.uint64)[:, None], np.array(key, dtype=np.uint64)[:, None])
    assert result[:, 0].tolist() == output


def test_known_answers_side_by_side():
    counters, keys, outputs = (np.array(column, dtype=np.uint64).T for column in zip(*KNOWN_ANSWERS, strict=True))
    assert philox4x32(counters, keys).tolist() == outputs.tolist()


def test_uniforms_use_seed_as_key_and_position_and_choice_as_counter():
    seed, choice, position = 0x299F31D0A4093822, 0x85A308D3, 0x13198A2E243F6A88
    counter = np.array([[0x243F6A88], [0x85A308D3], [0x13198A2E], [0]], dtype=np.uint64)
    words = philox4x32(counter, np.array([[0xA4093822], [0x299F31D0]], dtype=np.uint64))[:, 0]
    expected = ((int(words[0]) >> 5) * 2**26 + (int(words[1]) >> 6)) / 2**53
    assert uniforms([seed], [choice], np.array([position], dtype=np.uint64)).tolist() == [expected]


def test_each_row_is_its_own_function():
    rng = np.random.default_rng(1)
    seeds = rng.integers(0, 2**64, 200, dtype=np.uint64)
    choices = rng.integers(0, 128, 200, dtype=np.uint32)
    positions = rng.integers(0, 10_000, 200)
    together = uniforms(seeds, choices, positions)
    alone = [uniforms([seeds[i]], [choices[i]], [positions[i]])[0] for i in range(200)]
    assert together.tolist() == alone
    assert len(set(alone)) == 200


def test_range_and_evenness():
    draws = uniforms(np.full(64_000, 7, dtype=np.uint64), np.zeros(64_000, dtype=np.uint32), np.arange(64_000))
    assert draws.min() >= 0.0 and draws.max() < 1.0
    counts = np.bincount((draws * 64).astype(int), minlength=64)
    statistic = ((counts - 1000) ** 2 / 1000).sum()
    assert statistic < 103.4  # chi-square, 63 degrees of freedom, p = 0.001
    pairs = np.bincount((draws[:-1] * 8).astype(int) * 8 + (draws[1:] * 8).astype(int), minlength=64)
    assert ((pairs - 63_999 / 64) ** 2 / (63_999 / 64)).sum() < 103.4
