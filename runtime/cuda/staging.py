"""Pinned host memory of steps in flight: what goes to the device, and what comes back from it.

A copy from or to the device happens later than it is enqueued, and reads or writes this memory then. So a buffer
belongs to its step until the device has done it (`StepOutput.releases`), and is used again by a later one: as many
exist as are needed by the steps in flight at once, two per lane.
"""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from millrace.runtime.cuda.driver import CudaDriver
from millrace.runtime.device import StepOutput

_ALIGN = 16  # bytes between columns: kernels read them in vectors
_SMALLEST = 1 << 12


class PinnedRing:
    """Buffers that go round, shared by the lanes."""

    def __init__(self, driver: CudaDriver, most: int = 1024) -> None:
        """`most` buffers: more than four steps can hold means that they are not given back."""
        self._driver = driver
        self._most = most
        self._free: list[Tensor] = []
        self._made = 0
        self._lock = threading.Lock()

    @property
    def in_use(self) -> int:
        with self._lock:
            return self._made - len(self._free)

    def take(self, num_bytes: int, output: StepOutput) -> Tensor:
        """A pinned buffer [at least num_bytes] uint8 that belongs to the step until its output is finished."""
        with self._lock:
            fitting = [index for index, buffer in enumerate(self._free) if len(buffer) >= num_bytes]
            if fitting:
                buffer = self._free.pop(min(fitting, key=lambda index: len(self._free[index])))
            else:
                if self._free:  # a larger one takes the place of the smallest
                    del self._free[min(range(len(self._free)), key=lambda index: len(self._free[index]))]
                    self._made -= 1
                if self._made >= self._most:
                    raise RuntimeError(f"{self._made} pinned buffers are in use, and no step has given one back")
                size = max(_SMALLEST, 1 << (num_bytes - 1).bit_length())
                buffer = self._driver.pinned(size)
                self._made += 1
        output.releases.append(lambda: self._give_back(buffer))
        return buffer

    def _give_back(self, buffer: Tensor) -> None:
        with self._lock:
            self._free.append(buffer)

    def upload(self, columns: Mapping[str, NDArray[Any]], output: StepOutput) -> "Upload":
        """Packs columns into one buffer; `Upload.run` makes them tensors on the device with one copy."""
        places: list[tuple[str, int, NDArray[Any]]] = []
        size = 0
        for name, column in columns.items():
            size = -(-size // _ALIGN) * _ALIGN
            places.append((name, size, column))
            size += column.nbytes
        buffer = self.take(max(size, 1), output)[:size]
        flat = buffer.numpy()
        for _, at, column in places:
            flat[at : at + column.nbytes] = np.ascontiguousarray(column).reshape(-1).view(np.uint8)
        layout = [(name, at, column.nbytes, column.dtype, column.shape) for name, at, column in places]
        return Upload(buffer, layout, self._driver.device)


class Upload:
    """Columns of one step, packed in pinned memory."""

    def __init__(
        self,
        buffer: Tensor,
        layout: Sequence[tuple[str, int, int, np.dtype[Any], tuple[int, ...]]],
        device: torch.device,
    ) -> None:
        self._buffer = buffer
        self._layout = layout
        self._device = device

    def run(self) -> dict[str, Tensor]:
        """Within `CudaDriver.enqueue`: the columns on the device."""
        there = torch.empty(len(self._buffer), dtype=torch.uint8, device=self._device)
        there.copy_(self._buffer, non_blocking=True)
        return {
            name: there[at : at + size].view(_TORCH[dtype.name]).view(shape)
            for name, at, size, dtype, shape in self._layout
        }


_TORCH = {
    "int32": torch.int32,
    "int64": torch.int64,
    "float32": torch.float32,
    "uint8": torch.uint8,
    "bool": torch.bool,
    "uint64": torch.int64,  # the same bits
}
