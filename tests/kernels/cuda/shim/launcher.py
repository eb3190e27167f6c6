"""A launcher that executes kernels on the CPU, on CPU tensors, in one of four ways."""

import ctypes
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from millrace.kernels.cuda_compile import Kernel, read_source
from shim.build import ShimBuildError, build, load

Edits = Mapping[str, Sequence[tuple[str, str]]]
_MESSAGE_BYTES = 1000


class ShimError(RuntimeError):
    """A kernel did what no kernel may do; the message says what, and in which block and thread."""


class _Request(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32),
        ("shared_bytes", ctypes.c_uint64),
        ("params", ctypes.c_void_p),
        ("params_bytes", ctypes.c_uint64),
        ("backward", ctypes.c_uint32),
        ("late_copies", ctypes.c_uint32),
        ("error", ctypes.c_char_p),
        ("error_bytes", ctypes.c_uint64),
        ("num_switches", ctypes.c_uint64),
    )


class ShimLauncher:
    """Implements `millrace.kernels.cuda_launch.Launcher`.

    Args:
        backward: blocks, warps and lanes run from the last to the first.
        late_copies: asynchronous copies land when they are waited for, not when they are issued.
        cache_dir: where compiled kernels lie; None: a folder of this user among the temporary files.
        sm_count, shared_bytes_per_sm: what the fronts are told.
        edits: replacements in the sources of kernels/cuda before they are compiled, by file name; each text must be
            there exactly once.
    """

    device_type = "cpu"

    def __init__(
        self,
        *,
        backward: bool = False,
        late_copies: bool = True,
        cache_dir: Path | None = None,
        sm_count: int = 4,
        shared_bytes_per_sm: int = 228 * 1024,
        edits: Edits | None = None,
    ) -> None:
        self.backward = backward
        self.late_copies = late_copies
        self.cache_dir = cache_dir or Path(tempfile.gettempdir()) / f"millrace-shim-{os.getuid()}"
        self.sm_count = sm_count
        self.shared_bytes_per_sm = shared_bytes_per_sm
        self.launches: list[Kernel] = []
        self.num_switches = 0
        self._edits = edits or {}
        self._functions: dict[Kernel, Any] = {}

    def __repr__(self) -> str:
        order, copies = "backward" if self.backward else "forward", "late" if self.late_copies else "early"
        return f"ShimLauncher({order}, {copies})"

    def launch(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        block: int,
        params: np.void,
        *,
        shared_bytes: int = 0,
        stream: int,
    ) -> None:
        """Runs to the end before it returns, whatever the stream.

        Raises:
            ShimError: a fault, a deadlock, a wrong access, or a size of `params` that is not the kernel's.
            ShimBuildError: the kernel does not compile.
        """
        if not all(0 < size <= limit for size, limit in zip(grid, (2**31 - 1, 65535, 65535), strict=True)):
            raise ShimError(f"{kernel}: grid {grid} is outside of (2147483647, 65535, 65535)")
        if shared_bytes > 227 * 1024:
            raise ShimError(f"{kernel}: {shared_bytes} bytes of dynamic shared memory, and no GPU has over 232448")
        data = np.asarray(params)
        message = ctypes.create_string_buffer(_MESSAGE_BYTES)
        request = _Request(
            (ctypes.c_uint32 * 3)(*grid),
            block,
            shared_bytes,
            data.ctypes.data,
            data.dtype.itemsize,
            self.backward,
            self.late_copies,
            ctypes.cast(message, ctypes.c_char_p),
            _MESSAGE_BYTES,
        )
        status = self._function(kernel)(ctypes.byref(request))
        self.launches.append(kernel)
        self.num_switches += request.num_switches
        if status:
            raise ShimError(f"{kernel}: {message.value.decode(errors='replace')}")

    def _function(self, kernel: Kernel) -> Any:
        function = self._functions.get(kernel)
        if function is None:
            library = load(build(kernel, self.cache_dir, self._read))
            try:
                function = getattr(library, f"mr_emu_launch_{kernel.name}")
            except AttributeError as error:
                raise ShimBuildError(f"{kernel}: {kernel.source} has no such kernel") from error
            self._functions[kernel] = function
        return function

    def _read(self, name: str) -> str:
        text = read_source(name)
        for old, new in self._edits.get(name, ()):
            if text.count(old) != 1:
                raise ShimBuildError(f"{name}: {old!r} is there {text.count(old)} times, but an edit needs one place")
            text = text.replace(old, new)
        return text
