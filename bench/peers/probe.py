"""What this machine has: memory that is free, and the rate at which it reads."""

import os
import statistics
import time

import torch

from millrace.kernels.cpu_backend import load_library
from millrace.kernels.cpu_build import Toolchain, build_library
from millrace.kernels.memory import empty_weight

_BYTES = 256_000_000  # well above the caches


def read_bandwidth(threads: int, repeats: int = 15) -> float:
    """Bytes per second with `threads` threads: the median of reading 256 MB by Millrace's own probe."""
    library = load_library(build_library(Toolchain()))
    data = empty_weight([_BYTES // 4], torch.float32).fill_(1.0)  # on the kind of pages that weights lie on
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        library.mr_probe_read(data.data_ptr(), data.numel(), threads)
        times.append(time.perf_counter() - start)
    return data.nbytes / statistics.median(times[1:])


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
