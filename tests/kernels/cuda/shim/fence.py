"""Tensors between pages that nobody may touch: a read or a write past an end is a fault, not a neighbour's value."""

import ctypes
import mmap
from typing import Any

import numpy as np
import torch
from torch import Tensor

_PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_PROT_NONE = 0


def fenced(tensor: Tensor) -> Tensor:
    """A contiguous copy whose end, rounded up to 16 bytes, lies at a forbidden page, with another before its first.

    What lies between the end of a page and the first element, or in the rounding, is 0xff, so a NaN in any float type.
    """
    flat = tensor.contiguous()
    num_bytes = flat.numel() * flat.element_size()
    rounded = -(-num_bytes // 16) * 16
    pages = max(1, -(-rounded // _PAGE))
    memory = mmap.mmap(-1, (pages + 2) * _PAGE)
    anchor = ctypes.c_char.from_buffer(memory)
    base = ctypes.addressof(anchor)
    del anchor
    start = (pages + 1) * _PAGE - rounded
    raw: np.ndarray[Any, np.dtype[np.uint8]] = np.frombuffer(memory, np.uint8)
    raw[_PAGE : (pages + 1) * _PAGE] = 0xFF
    for address in (base, base + (pages + 1) * _PAGE):
        if _libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(_PAGE), _PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    copy = torch.from_numpy(raw[start : start + num_bytes]).view(flat.dtype).reshape(flat.shape)
    copy.copy_(flat)
    return copy


def nan_filled(*shape: int, dtype: torch.dtype) -> Tensor:
    """Fenced memory that was never written: every byte is 0xff."""
    size = torch.empty(0, dtype=dtype).element_size()
    raw = fenced(torch.full((int(np.prod(shape)) * size,), 0xFF, dtype=torch.uint8))
    return raw.view(dtype).reshape(shape)
