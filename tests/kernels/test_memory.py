"""Where weights lie."""

import gc
import itertools
import mmap
import sys
import threading
import weakref

import pytest
import torch
from torch import Tensor

from millrace.kernels import memory
from millrace.kernels.memory import empty_weight

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere torch allocates")
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


def bounds(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_tensors_are_apart_aligned_and_writable(mappings: list["weakref.ref[mmap.mmap]"], dtype: torch.dtype) -> None:
    tensors = [empty_weight([rows, 13], dtype) for rows in (1, 7, 1000, 3)]
    assert [tensor.shape for tensor in tensors] == [(1, 13), (7, 13), (1000, 13), (3, 13)]
    assert all(tensor.dtype == dtype and tensor.data_ptr() % LINE == 0 for tensor in tensors)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(map(bounds, tensors)))
    for value, tensor in enumerate(tensors):
        tensor.fill_(value)
    assert all((tensor.float() == value).all() for value, tensor in enumerate(tensors))
    assert len(mappings) == 1


def test_chunks_begin_on_a_huge_page_and_hold_what_fits(mappings: list["weakref.ref[mmap.mmap]"]) -> None:
    first = empty_weight([HUGE_PAGE // 2], torch.uint8)
    second = empty_weight([HUGE_PAGE // 2], torch.uint8)
    assert first.data_ptr() % HUGE_PAGE == 0
    assert second.data_ptr() == first.data_ptr() + first.nbytes
    large = empty_weight([5 * HUGE_PAGE], torch.uint8)  # larger than a chunk
    assert large.data_ptr() % HUGE_PAGE == 0
    assert len(mappings) == 2


def test_memory_goes_back_with_the_last_tensor(mappings: list["weakref.ref[mmap.mmap]"]) -> None:
    first, second = empty_weight([100], torch.uint8), empty_weight([100], torch.uint8)
    del first
    gc.collect()
    assert mappings[0]() is not None
    second.fill_(1)
    del second
    gc.collect()
    assert mappings[0]() is None
    assert empty_weight([100], torch.uint8).numel() == 100  # in a mapping of its own
    assert len(mappings) == 2


def test_nothing_takes_no_memory(mappings: list["weakref.ref[mmap.mmap]"]) -> None:
    assert empty_weight([0, 4], torch.float32).shape == (0, 4)
    assert not mappings


def test_threads_get_memory_of_their_own(mappings: list["weakref.ref[mmap.mmap]"]) -> None:
    found: list[Tensor] = []
    threads = [
        threading.Thread(target=lambda: found.extend(empty_weight([1000], torch.uint8) for _ in range(50)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    places = sorted(map(bounds, found))
    assert len(places) == 200
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(places))
