"""Huge pages for large arrays: a walk through the page tables for every 4 KiB is a visible part of reading weights
once a step, and of reading keys and values in scattered runs."""

import contextlib
import ctypes
import mmap
import sys
import threading
import weakref

import numpy as np
import numpy.typing as npt

BLOCK_SIZE = 16  # token slots per KV block

_PAGE = 4096
_HUGE_PAGE = 2 << 20
_LINE = 64
_MADV_HUGEPAGE = 14
_WORTH = 8 << 20  # bytes of a run of blocks from which on page walks cost more than half-used huge pages
_CHUNK = 256 << 20  # bytes of address space taken at a time; pages are committed when they are first written

Bytes = npt.NDArray[np.uint8]


class _WeightMemory:
    """Hands out parts of large mappings. The C library's allocator would do for one large matrix; but smaller ones, and
    whatever fits into what was freed before, it puts onto pages of 4 KiB."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunk: weakref.ref[mmap.mmap] | None = None  # arrays keep it; without any it goes back to the system
        self._used = 0

    def take(self, num_bytes: int) -> Bytes:
        size = -(-num_bytes // _LINE) * _LINE
        with self._lock:
            chunk = None if self._chunk is None else self._chunk()
            if chunk is None or self._used + size > len(chunk):
                chunk = mmap.mmap(-1, max(size + _HUGE_PAGE, _CHUNK), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                with contextlib.suppress(OSError):  # a system without huge pages
                    chunk.madvise(_MADV_HUGEPAGE)
                self._chunk = weakref.ref(chunk)
                self._used = -np.frombuffer(chunk, dtype=np.uint8, count=1).ctypes.data % _HUGE_PAGE
            begin, self._used = self._used, self._used + size
        return np.frombuffer(chunk, dtype=np.uint8, count=num_bytes, offset=begin)


_weight_memory = _WeightMemory()


def empty_weight(num_bytes: int) -> Bytes:
    """Fresh memory for weights that stay, aligned to cache lines, on huge pages where the system has them."""
    if not sys.platform.startswith("linux") or not num_bytes:
        return np.empty(num_bytes, dtype=np.uint8)
    return _weight_memory.take(num_bytes)


def ask_for_huge_pages(address: int, num_bytes: int, regions: int) -> None:
    """Asks Linux to back fresh memory with 2 MiB pages; elsewhere, or for little of it, nothing happens.

    A pool of KV blocks is read in runs of a few KiB, each on a page of its own, so that page walks are a visible part
    of attention. `regions` is the number of equal parts that fill up separately; each of them may
    hold one page more than it needs.
    """
    if not sys.platform.startswith("linux") or num_bytes < regions * _WORTH:
        return
    begin = -(-address // _PAGE) * _PAGE
    size = (address + num_bytes - begin) // _PAGE * _PAGE
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    madvise(begin, size, _MADV_HUGEPAGE)  # a request: it may fail, and then pages are small
