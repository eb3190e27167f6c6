"""The library that `cpu_build` makes, through ctypes, which releases the GIL. Nothing here wants torch.

Threads are those of one OpenMP runtime, torch's if torch is installed: how many is a setting of the calling thread,
which `torch.set_num_threads` sets as well.
"""

import ctypes
import functools
import logging
import sys
from pathlib import Path

from millrace.kernels.cpu_build import BuildError, Toolchain, build_library, find_library, openmp_runtime

_log = logging.getLogger(__name__)

_P, _L, _I, _F = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_SIGNATURES: dict[str, tuple[list[type], type | None]] = {
    "mr_num_threads": ([], _I),
    "mr_set_num_threads": ([_I], None),
    "mr_panel_width": ([], _L),
    "mr_pack": ([_P, _I, _P, _L, _L, _I], None),
    "mr_product": ([_P, _P, _P, _L, _I], None),
    "mr_matrix_rows": ([_P, _P, _P, _L], ctypes.c_int64),
    "mr_rms_norm": ([_P, _P, _P, _P, _L, _L, _F, _I], None),
    "mr_layer_norm": ([_P, _P, _P, _P, _P, _L, _L, _F, _I], None),
    "mr_silu_mul": ([_P, _P, _L, _L, _I], None),
    "mr_gelu_tanh": ([_P, _P, _L, _I], None),
    "mr_rope": ([_P, _P, _P, _P, _L, _L, _L, _L, _L, _L, _I], _L),
    "mr_write_kv": ([_P, _P, _P, _P, _L, _L, _L, _L], _L),
    "mr_attention": ([_P, _P, _P, _P, _P, _P, _L, _L, _L, _L, _L, _L, _L, _L, _F, _I], _L),
    "mr_decoder": ([_P, _P, _P, _P], ctypes.c_int64),
    "mr_transformer": ([_P, _P, _P, _P, _P], ctypes.c_int64),
    "mr_quantized_bytes": ([_L, _L, _L, _I], ctypes.c_int64),
    "mr_quantized_pack": ([_P, _P, _P, _P, _L, _L, _L, _I, _I], None),
    "mr_block_maxima": ([_P, _L, _L, _L, _P, _I], None),
    "mr_block_sums": ([_P, _L, _L, _L, _P, _P, _I], None),
    "mr_draw_tokens": ([_P, _L, _L, _L, _P, _L, _P, _L, _P, _L, _L, _P, _I], _L),
    "mr_probe_read": ([_P, _L, _I], _F),
    "mr_probe_fma": ([_L, _I], _F),
    "mr_attention_max_dim": ([], _L),
    "mr_attention_dim_step": ([], _L),
}


def load_library(path: Path) -> ctypes.CDLL:
    """Opens the library and declares its functions.

    Raises:
        OSError: it cannot be loaded.
        AttributeError: it lacks a function.
    """
    runtime = openmp_runtime()
    if runtime is not None:
        ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)  # before any other of that name is found
    library = ctypes.CDLL(str(path))
    for name, (arguments, result) in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
    return library


@functools.cache
def default_library() -> ctypes.CDLL | None:
    """The library of this process, if it is built already: this never builds one (see `prepare`). One that comes to be
    later is not looked for."""
    try:
        path = find_library(Toolchain())
        if path is not None:
            return load_library(path)
        reason = "the C++ kernels are not built; `millrace.kernels.cpu_library.prepare()` builds them"
    except (OSError, AttributeError) as error:
        reason = f"the C++ kernels cannot be loaded: {error}"
    _log.info("CPU ops run in torch, sampling in numpy: %s", reason)
    return None


def set_num_threads(threads: int) -> None:
    """How many threads the calling thread's calls may use, of the library and of torch, whichever are here."""
    library, torch = default_library(), sys.modules.get("torch")
    if library is not None:
        library.mr_set_num_threads(threads)
    if torch is not None:
        torch.set_num_threads(threads)


def prepare() -> str:
    """Builds the library if it is not cached, and makes it the default; call it before weights are packed. Takes some
    seconds the first time on a machine, milliseconds afterwards; fit for a thread.

    Returns:
        A sentence for the start-up log: which library serves, or why torch does.
    """
    try:
        path = build_library(Toolchain())
    except BuildError as error:
        _log.warning("CPU ops run in torch: %s", error)
        return f"CPU ops run in torch: {error}"
    if default_library() is None:
        default_library.cache_clear()
    return f"CPU ops run in {'cpu, then torch' if default_library() else 'torch'}; library {path}"
