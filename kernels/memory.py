"""Huge pages for large CPU tensors: a walk through the page tables for every 4 KiB is a visible part of reading weights
once a step, and of reading keys and values in scattered runs."""

import ctypes
import math
import mmap
import sys
import threading
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

_PAGE = 4096
_HUGE_PAGE = 2 << 20
_LINE = 64
_MADV_HUGEPAGE = 14
_WORTH = 8 << 20  # bytes of a run of blocks from which on page walks cost more than half-used huge pages
_CHUNK = 256 << 20  # bytes of address space taken at a time; pages are committed when they are first written


class _WeightMemory:
    """Hands out parts of large mappings. The C library's allocator would do for one large matrix; but smaller ones, and
    whatever fits into what was freed before, it puts onto pages of 4 KiB."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunk: weakref.ref[mmap.mmap] | None = None  # tensors keep it; without any it goes back to the system
        self._used = 0

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        count = math.prod(shape)
        size = -(-count * dtype.itemsize // _LINE) * _LINE
        with self._lock:
            chunk = None if self._chunk is None else self._chunk()
            if chunk is None or self._used + size > len(chunk):
                chunk = mmap.mmap(-1, max(size + _HUGE_PAGE, _CHUNK), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                chunk.madvise(_MADV_HUGEPAGE)  # a request: where it is not granted, pages are small
                self._chunk = weakref.ref(chunk)
                address = torch.frombuffer(chunk, dtype=torch.uint8, count=1).data_ptr()
                self._used = -address % _HUGE_PAGE
            begin, self._used = self._used, self._used + size
        return torch.frombuffer(chunk, dtype=dtype, count=count, offset=begin).view(shape)


_weight_memory = _WeightMemory()


def empty_weight(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A fresh CPU tensor for weights that stay, on huge pages where the system has them."""
    if not sys.platform.startswith("linux") or not math.prod(shape):
        return torch.empty(*shape, dtype=dtype)
    return _weight_memory.take(shape, dtype)


def ask_for_huge_pages(storage: Tensor, regions: int) -> None:
    """Asks Linux to back a fresh tensor with 2 MiB pages; elsewhere, or for small tensors, nothing happens.

    A pool of KV blocks is read in runs of a few KiB, each on a page of its own, so that page walks are a visible part
    of attention. `regions` is the number of equal parts that fill up separately; each of them may
    hold one page more than it needs.
    """
    if not storage.is_cpu or not sys.platform.startswith("linux") or storage.nbytes < regions * _WORTH:
        return
    begin = -(-storage.data_ptr() // _PAGE) * _PAGE
    size = (storage.data_ptr() + storage.nbytes - begin) // _PAGE * _PAGE
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    madvise(begin, size, _MADV_HUGEPAGE)  # a request: it may fail, and then pages are small
