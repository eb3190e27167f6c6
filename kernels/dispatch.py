"""Which backends compute the ops: the process's default list, and the asking of one after the other."""

import functools
import logging
from collections.abc import Sequence
from typing import Any

from millrace.kernels.arguments import Backend, Refusal
from millrace.kernels.cpu_backend import CpuBackend, load_library
from millrace.kernels.cpu_build import BuildError, Toolchain, build_library, find_library
from millrace.kernels.torch_backend import TorchBackend

_log = logging.getLogger(__name__)

Backends = Sequence[Backend] | None


class UnservedError(RuntimeError):
    """No backend serves an op for these arguments; the message gives every backend's reason."""


@functools.cache
def default_backends() -> tuple[Backend, ...]:
    """Backends of this process, the preferred one first. A C++ library is used if it is built already; this never
    builds one (see `prepare`)."""
    try:
        path = find_library(Toolchain())
        if path is None:
            reason = "the C++ kernels are not built; `millrace.kernels.ops.prepare()` builds them"
        else:
            return (CpuBackend(load_library(path)), TorchBackend())
    except (OSError, AttributeError) as error:
        reason = f"the C++ kernels cannot be loaded: {error}"
    _log.info("CPU ops run in torch: %s", reason)
    return (TorchBackend(),)


def prepare() -> str:
    """Builds the C++ kernels if they are not cached, and puts them first in the default list; call it before weights
    are packed. Takes some seconds the first time on a machine, milliseconds afterwards; fit for a thread.

    Returns:
        A sentence for the start-up log: which library serves, or why torch does.
    """
    try:
        path = build_library(Toolchain())
    except BuildError as error:
        _log.warning("CPU ops run in torch: %s", error)
        return f"CPU ops run in torch: {error}"
    default_backends.cache_clear()
    names = ", then ".join(backend.name for backend in default_backends())
    return f"CPU ops run in {names}; library {path}"


def serve(op: str, args: Any, backends: Backends) -> Any:
    """What the first backend that can serve gives; raises UnservedError with the reasons of all if none can."""
    refusals = []
    for backend in default_backends() if backends is None else backends:
        result = getattr(backend, op)(args)
        if not isinstance(result, Refusal):
            return result
        refusals.append(f"{backend.name}: {result.reason}")
    raise UnservedError(f"no backend serves {op}: " + "; ".join(refusals or ["the list of backends is empty"]))
