"""Huge pages for large CPU tensors that are read in scattered runs."""

import ctypes
import sys

from torch import Tensor

_PAGE = 4096
_MADV_HUGEPAGE = 14
_WORTH = 8 << 20  # bytes of a run of blocks from which on page walks cost more than half-used huge pages


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
