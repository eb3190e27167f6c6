"""Philox4x32-10, the counter-based generator of Salmon et al. 2011 ("Parallel random numbers: as easy as 1, 2, 3").

A draw is a pure function of (seed, choice, position). No generator state exists, so nothing has to be saved, moved or
restored when a request is batched, preempted, or replayed after a crash.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

_ROUNDS = 10
_WORD = np.uint64(0xFFFFFFFF)
_WORD_BITS = np.uint64(32)
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)  # [2, 1], for counter words 0 and 2
_WEYL = np.array([[0x9E3779B9], [0xBB67AE85]], dtype=np.uint64)  # [2, 1], added to the key words each round


def philox4x32(counter: npt.NDArray[np.uint64], key: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Ten rounds of Philox4x32 on every column.

    Args:
        counter: [4, n], 32-bit words in uint64.
        key: [2, n], 32-bit words in uint64.

    Returns:
        [4, n] random 32-bit words in uint64.
    """
    # Words 0 and 2 are multiplied, words 1 and 3 are mixed in: kept as two pairs, a round is six array operations.
    even, odd = counter[0::2], counter[1::2]  # [2, n] each
    schedule = (key + np.arange(_ROUNDS, dtype=np.uint64)[:, None, None] * _WEYL) & _WORD  # [10, 2, n]
    for round_key in schedule:
        product = (_MULTIPLIERS * even)[::-1]  # word 2's product goes into words 0 and 1, word 0's into 2 and 3
        even = (product >> _WORD_BITS) ^ odd ^ round_key
        odd = product & _WORD
    return np.stack((even[0], odd[0], even[1], odd[1]))


def uniforms(seeds: npt.ArrayLike, choices: npt.ArrayLike, positions: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """One uniform number per row in [0, 1), with 53 random bits.

    The key is the seed; the counter is (low word of the position, choice, high word of the position, 0).

    Args:
        seeds: [n] uint64.
        choices: [n] uint32.
        positions: [n] non-negative, output tokens drawn before this one.

    Returns:
        [n] float64.
    """
    seed, choice, position = np.broadcast_arrays(*map(_unsigned, (seeds, choices, positions)))
    key = np.stack((seed & _WORD, seed >> _WORD_BITS))
    counter = np.stack((position & _WORD, choice, position >> _WORD_BITS, np.zeros_like(position)))
    high, low, _, _ = philox4x32(counter, key)
    fraction = ((high >> np.uint64(5)) << np.uint64(26)) | (low >> np.uint64(6))  # 27 + 26 bits
    uniform: npt.NDArray[np.float64] = fraction.astype(np.float64) * 2.0**-53
    return uniform


def _unsigned(values: Any) -> npt.NDArray[np.uint64]:
    return np.atleast_1d(np.asarray(values)).astype(np.uint64)
