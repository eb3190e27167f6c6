"""What this machine has: memory that is free, and the rate at which it reads."""

import os
import statistics
import time

import numpy as np

from millrace.kernels.cpu_build import Toolchain, build_library
from millrace.kernels.cpu_library import load_library
from millrace.kernels.memory import empty_weight

_BYTES = 256_000_000  # well above the caches


class ReadProbe:
    """Reads so many bytes from the kind of pages that weights lie on, with `threads` threads, by Millrace's probe."""

    def __init__(self, num_bytes: int, threads: int) -> None:
        self._library = load_library(build_library(Toolchain()))
        self._data = empty_weight(num_bytes // 4 * 4).view(np.float32)
        self._data.fill(1.0)
        self._threads = threads

    def seconds(self) -> float:
        start = time.perf_counter()
        self._library.mr_probe_read(self._data.ctypes.data, self._data.size, self._threads)
        return time.perf_counter() - start


def read_bandwidth(threads: int, repeats: int = 15) -> float:
    """Bytes per second: the median of reading 256 MB."""
    probe = ReadProbe(_BYTES, threads)
    probe.seconds()
    return _BYTES / statistics.median(probe.seconds() for _ in range(repeats))


def available_memory() -> int:
    """Bytes that can be taken without swapping, page cache included; all memory where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
