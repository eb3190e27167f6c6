"""Which backends compute the ops: the process's default list, and the asking of one after the other."""

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

from millrace.kernels.arguments import Backend, Refusal
from millrace.kernels.cpu_backend import CpuBackend
from millrace.kernels.cpu_library import default_library
from millrace.kernels.torch_backend import TorchBackend

Backends = Sequence[Backend] | None


class UnservedError(RuntimeError):
    """No backend serves an op for these arguments; the message gives every backend's reason."""


def default_backends() -> tuple[Backend, ...]:
    """Backends of this process, the preferred one first: the C++ library if it is built (see `cpu_library.prepare`),
    then torch."""
    return _backends(default_library())


@functools.cache
def _backends(library: ctypes.CDLL | None) -> tuple[Backend, ...]:
    return (TorchBackend(),) if library is None else (CpuBackend(library), TorchBackend())


def serve(op: str, args: Any, backends: Backends) -> Any:
    """What the first backend that can serve gives; raises UnservedError with the reasons of all if none can."""
    refusals = []
    for backend in default_backends() if backends is None else backends:
        result = getattr(backend, op)(args)
        if not isinstance(result, Refusal):
            return result
        refusals.append(f"{backend.name}: {result.reason}")
    raise UnservedError(f"no backend serves {op}: " + "; ".join(refusals or ["the list of backends is empty"]))
