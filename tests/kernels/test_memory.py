"""Where weights lie."""

import gc
import itertools
import mmap
import sys
import threading
import weakref

import pytest

from millrace.kernels import memory
from millrace.kernels.memory import Bytes, empty_weight

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere numpy allocates")
LINE, HUGE_PAGE = 64, 2 << 20


@pytest.fixture
def mappings(monkeypatch: pytest.MonkeyPatch) -> list["weakref.ref[mmap.mmap]"]:
    """Fresh weight memory of 4 MiB chunks; the mappings that it makes."""
    made: list[weakref.ref[mmap.mmap]] = []
    real = mmap.mmap

    def counted(*args: int, **options: int) -> mmap.mmap:
        mapping = real(*args, **options)
        made.append(weakref.ref(mapping))
        return mapping

    monkeypatch.setattr(memory, "_CHUNK", 2 * HUGE_PAGE)
    monkeypatch.setattr(memory, "_weight_memory", memory._WeightMemory())
    monkeypatch.setattr(memory.mmap, "mmap", counted)
    return made


def bounds(array: Bytes) -> tuple[int, int]:
    return array.ctypes.data, array.ctypes.data + array.nbytes


def test_arrays_are_apart_aligned_and_writable(mappings: list["weakref.ref[mmap.mmap]"]) -> None:
    arrays = [empty_weight(count) for count in (1, 7, 13000, 3)]
    assert [array.size for array in arrays] == [1, 7, 13000, 3]
    assert all(array.ctypes.data % LINE == 0 for array in arrays)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(map(bounds, arrays)))
    for value, array in enumerate(arrays):
        array.fill(value)
    assert all((array == value).all() for value, array in enumerate(arrays))
    assert len(mappings) == 1


def test_chunks_begin_on_a_huge_page_and_hold_what_fits(mappings: list["weakref.ref[mmap.mmap]"]) -> None:
    first = empty_weight(HUGE_PAGE // 2)
    second = empty_weight(HUGE_PAGE // 2)
    assert first.ctypes.data % HUGE_PAGE == 0
    assert second.ctypes.data == first.ctypes.data + first.nbytes
    large = empty_weight(5 * HUGE_PAGE)  # larger than a chunk
    assert large.ctypes.data % HUGE_PAGE == 0
    assert len(mappings) == 2


def test_memory_goes_back_with_the_last_array(mappings: list["weakref.ref[mmap.mmap]"]) -> None:
    first, second = empty_weight(100), empty_weight(100)
    del first
    gc.collect()
    assert mappings[0]() is not None
    second.fill(1)
    del second
    gc.collect()
    assert mappings[0]() is None
    assert empty_weight(100).size == 100  # in a mapping of its own
    assert len(mappings) == 2


def test_nothing_takes_no_memory(mappings: list["weakref.ref[mmap.mmap]"]) -> None:
    assert empty_weight(0).size == 0
    assert not mappings


def test_threads_get_memory_of_their_own(mappings: list["weakref.ref[mmap.mmap]"]) -> None:
    found: list[Bytes] = []
    threads = [threading.Thread(target=lambda: found.extend(empty_weight(1000) for _ in range(50))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    places = sorted(map(bounds, found))
    assert len(places) == 200
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(places))
