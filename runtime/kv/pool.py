"""The pool of KV blocks: reference counts, a free list that is also the LRU of cached blocks, and the prefix index.

Only ids live here; the storage belongs to the model. Block 0 is the null block: it fills unused table entries and is
never handed out. A block is in exactly one of three states:

    live    refcount > 0, named by that many block tables
    cached  refcount 0, in the free list, and still found by its prefix hash
    free    refcount 0, in the free list, with nothing of worth in it
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray


class PoolExhausted(Exception):
    """Fewer blocks are free than were asked for."""


class BlockPool:
    """`num_blocks` counts the null block, so that one fewer can be used."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"a pool of {num_blocks} blocks has no room beside the null block")
        self.num_blocks = num_blocks
        self.evictions = 0
        self._refcounts = [0] * num_blocks
        # Oldest first: worthless blocks are put at the front, cached ones at the back.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        self._by_hash: dict[bytes, int] = {}
        self._hash_of: dict[int, tuple[bytes, bytes]] = {}  # block -> (prefix hash, its own token ids as bytes)

    @property
    def num_usable(self) -> int:
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out: free and cached ones."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return sum(1 for block in self._hash_of if self._refcounts[block] == 0)

    def refcount(self, block: int) -> int:
        return self._refcounts[block]

    def allocate(self, count: int) -> list[int]:
        """Takes blocks with one reference each, the least recently used first; all of them or none."""
        if count > len(self._free):
            raise PoolExhausted(f"{count} blocks wanted, {len(self._free)} of {self.num_usable} free")
        blocks = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self._refcounts[block] = 1
            blocks.append(block)
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Adds a reference to live blocks (choices that share a prompt)."""
        for block in blocks:
            if self._refcounts[block] < 1:
                raise ValueError(f"block {block} is not live")
            self._refcounts[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drops one reference each. Give a table from its beginning: its tail is then evicted before its head."""
        for block in reversed(blocks):
            count = self._refcounts[block]
            if count < 1:
                raise ValueError(f"block {block} is released more often than it was taken")
            self._refcounts[block] = count - 1
            if count == 1:
                self._free[block] = None
                if block not in self._hash_of:
                    self._free.move_to_end(block, last=False)

    def publish(self, block: int, prefix_hash: bytes, tokens: NDArray[np.int32]) -> None:
        """Makes a full, written block findable. The first block under a hash stays; tables are append-only, so a
        second one with the same content is simply not shared."""
        if prefix_hash not in self._by_hash and block not in self._hash_of:
            self._by_hash[prefix_hash] = block
            self._hash_of[block] = (prefix_hash, tokens.tobytes())

    def match(self, hashes: Sequence[bytes], tokens: NDArray[np.int32], block_size: int) -> list[int]:
        """Takes a reference to the longest published run of blocks, comparing the token ids of each as well."""
        found: list[int] = []
        for index, prefix_hash in enumerate(hashes):
            block = self._by_hash.get(prefix_hash)
            if block is None:
                break
            own = tokens[index * block_size : (index + 1) * block_size].tobytes()
            if self._hash_of[block][1] != own:
                break
            if self._refcounts[block] == 0:
                del self._free[block]
            self._refcounts[block] += 1
            found.append(block)
        return found

    def check(self, tables: Iterable[Iterable[int]]) -> None:
        """Raises AssertionError unless free + live = total, and every refcount is the number of tables that hold it."""
        held = Counter(block for table in tables for block in table)
        assert 0 not in held, "a table names the null block"
        assert 0 not in self._free, "the null block is free"
        for block in range(1, self.num_blocks):
            assert self._refcounts[block] == held[block], (block, self._refcounts[block], held[block])
            assert (block in self._free) == (self._refcounts[block] == 0), block
        for block, (prefix_hash, _) in self._hash_of.items():
            assert self._by_hash[prefix_hash] == block
        assert len(self._by_hash) == len(self._hash_of)

    def _forget(self, block: int) -> None:
        known = self._hash_of.pop(block, None)
        if known is not None:
            del self._by_hash[known[0]]
            self.evictions += 1
