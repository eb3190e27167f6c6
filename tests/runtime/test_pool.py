"""The block pool against a plain model of it: a hypothesis state machine, and the edges by hand."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from millrace.runtime.kv.pool import BlockPool, PoolExhausted
from millrace.runtime.kv.prefix import PrefixHasher
from millrace.runtime.kv.tables import BlockTables
from millrace.runtime.messages import BlockUpdates

SIZE = 4


def block_of(content: int) -> np.ndarray:
    return np.full(SIZE, content, dtype=np.int32)


class PoolMachine(RuleBasedStateMachine):
    """Tables allocate, share, publish, match and release; contents tell whether a hit is what it claims to be."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(9)
        self.tables: list[list[int]] = []
        self.content: dict[int, int] = {}  # block -> what was written into it last

    @rule(count=st.integers(0, 4), content=st.integers(0, 5))
    def allocate(self, count: int, content: int) -> None:
        if count > self.pool.num_free:
            with pytest.raises(PoolExhausted, match=f"{count} blocks wanted"):
                self.pool.allocate(count)
            return
        blocks = self.pool.allocate(count)
        assert len(set(blocks)) == count
        assert not set(blocks) & {block for table in self.tables for block in table}
        for block in blocks:
            self.content[block] = content
        self.tables.append(blocks)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        self.pool.share(table)
        self.tables.append(list(table))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.tables) - 1))
        self.pool.release(self.tables.pop(index))

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from([table for table in self.tables if table]))
        block = table[0]
        self.pool.publish(block, bytes([self.content[block]]), block_of(self.content[block]))

    @rule(content=st.integers(0, 5))
    def match(self, content: int) -> None:
        found = self.pool.match([bytes([content])], block_of(content), SIZE)
        for block in found:
            assert self.content[block] == content
        if found:
            self.tables.append(found)

    @invariant()
    def accounts_balance(self) -> None:
        self.pool.check(self.tables)
        live = len({block for table in self.tables for block in table})
        assert self.pool.num_free + live == self.pool.num_usable


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
TestPoolMachine = PoolMachine.TestCase


def test_least_recently_used_goes_first_and_worthless_before_cached() -> None:
    pool = BlockPool(5)
    a, b, c, d = pool.allocate(4)
    for block, name in ((a, b"a"), (b, b"b"), (c, b"c")):
        pool.publish(block, name, block_of(1))
    for block in (b, a, c, d):
        pool.release([block])
    assert pool.num_cached == 3
    assert pool.allocate(4) == [d, b, a, c]
    assert pool.evictions == 3


def test_the_tail_of_a_table_is_evicted_before_its_head() -> None:
    pool = BlockPool(4)
    table = pool.allocate(3)
    for index, block in enumerate(table):
        pool.publish(block, bytes([index]), block_of(index))
    pool.release(table)
    assert pool.allocate(1) == [table[-1]]


def test_a_hit_compares_the_tokens() -> None:
    pool = BlockPool(3)
    (block,) = pool.allocate(1)
    pool.publish(block, b"hash", block_of(1))
    assert pool.match([b"hash"], block_of(2), SIZE) == []
    assert pool.match([b"hash"], block_of(1), SIZE) == [block]


def test_misuse_is_refused() -> None:
    pool = BlockPool(3)
    with pytest.raises(ValueError, match="no room beside the null block"):
        BlockPool(1)
    with pytest.raises(ValueError, match="not live"):
        pool.share([1])
    with pytest.raises(ValueError, match="released more often"):
        pool.release([1])


def test_hashes_depend_on_salt_key_and_everything_before() -> None:
    tokens = np.arange(12, dtype=np.int32)

    def hashes(key: bytes, salt: str, given: np.ndarray) -> list[bytes]:
        out: list[bytes] = []
        PrefixHasher(key, SIZE).extend(out, given, salt)
        return out

    base = hashes(b"k", "s", tokens)
    assert len(base) == 3
    assert base[:2] == hashes(b"k", "s", tokens[:11])
    other = tokens.copy()
    other[0] = 99
    for changed in (hashes(b"x", "s", tokens), hashes(b"k", "t", tokens), hashes(b"k", "s", other)):
        assert not set(base) & set(changed)
    grown = base[:1]
    PrefixHasher(b"k", SIZE).extend(grown, tokens, "s")
    assert grown == base


def test_tables() -> None:
    tables = BlockTables(3, 4)
    column = lambda *values: np.array(values, dtype=np.int32)  # noqa: E731
    tables.apply(BlockUpdates(column(1, 1, 2), column(0, 1, 0), column(7, 5, 3)))
    slots = tables.slots(column(1, 1, 2), np.array([2, 17, 5]), 16)
    assert slots.tolist() == [7 * 16 + 2, 5 * 16 + 1, 3 * 16 + 5]
    assert slots.dtype == np.int64
    assert tables.gather(column(2, 1), 2).tolist() == [[3, 0], [7, 5]]
