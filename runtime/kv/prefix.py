"""Prefix hashes: a keyed chain over blocks of token ids.

A block's hash covers the tenant's salt, all tokens before it and its own, so equal hashes mean equal prefixes under
the same salt. The key is drawn when the runtime starts: hashes cannot be predicted from outside, and a hit compares
the token ids as well (runtime/kv/pool.py).
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

DIGEST_SIZE = 16  # bytes


class PrefixHasher:
    def __init__(self, key: bytes, block_size: int) -> None:
        self._key = key
        self._block_size = block_size

    def extend(self, hashes: list[bytes], tokens: NDArray[np.int32], salt: str) -> None:
        """Appends the hashes of those full blocks of `tokens` that `hashes` does not cover yet."""
        size = self._block_size
        for start in range(len(hashes) * size, len(tokens) - size + 1, size):
            parent = hashes[-1] if hashes else hashlib.blake2b(salt.encode(), digest_size=DIGEST_SIZE).digest()
            block = tokens[start : start + size].tobytes()
            hashes.append(hashlib.blake2b(parent + block, key=self._key, digest_size=DIGEST_SIZE).digest())
