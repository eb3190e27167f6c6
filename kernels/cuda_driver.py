"""Whether there can be a GPU at all, asked without torch."""

import ctypes
import sys


def has_driver() -> bool:
    """Whether NVIDIA's driver is installed, without which there is no CUDA device."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True
