"""How a compiled kernel gets onto a device: the protocol that the fronts use, and its CuPy implementation."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from millrace.kernels.cpu_build import BuildError
from millrace.kernels.cuda_compile import Built, CudaCompiler, Kernel, Module, build_all

DEFAULT_SHARED_BYTES = 48 * 1024  # static and dynamic; a kernel that takes more has to say so beforehand


def pack_params(layout: np.dtype[np.void], values: Sequence[int | float]) -> np.void:
    """The argument record of a kernel: one value per field, pointers as integers."""
    record: np.void = np.array([tuple(values)], layout)[0]
    return record


class Launcher(Protocol):
    """Launches kernels on one device.

    Attributes:
        device_type: of the tensors that kernels may be given: "cuda", or "cpu" for the shim of the tests.
        sm_count: streaming multiprocessors, for fronts that choose a grid by it.
        shared_bytes_per_sm: shared memory of one of them, for the thread blocks on it together.
    """

    device_type: str
    sm_count: int
    shared_bytes_per_sm: int

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
        """Enqueues one kernel on the raw stream and does not wait.

        Args:
            kernel: takes one struct by value.
            params: that struct, of a numpy structured dtype with the same layout.
            block: threads of the one-dimensional block.
            shared_bytes: dynamic shared memory.

        Raises:
            ValueError: `params` has another size than the kernel's struct.
        """
        ...


class _Stream(NamedTuple):
    """What CuPy reads of a stream object (14.2, cupy/cuda/function.pyx)."""

    ptr: int


@dataclass
class _Loaded:
    """A kernel on the device.

    Attributes:
        function: CuPy's, which keeps its module loaded.
        record: untyped bytes of the size of the kernel's struct: CuPy asks numpy for a description of each argument,
            which takes ten times as long for a struct with named fields.
        shared_limit: dynamic shared memory that it may be launched with.
    """

    function: Any
    record: np.dtype[np.void]
    shared_limit: int


class CupyLauncher:
    """Loads cubins with CuPy and launches them; kernels are loaded at their first use, or all by `prepare`.

    A kernel is loaded and launched in the context of the device that is current in the calling thread: it must be the
    one given here. Loading cannot be captured into a CUDA graph, so `prepare` comes first, in the thread that captures;
    launching can.

    Args:
        device: its index.
        compiler: where cubins come from.

    Raises:
        ImportError: CuPy is not installed.
    """

    device_type = "cuda"

    def __init__(self, device: int = 0, compiler: CudaCompiler | None = None) -> None:
        # Only here: CuPy is a large optional dependency, and a process without a GPU never needs it.
        try:
            import cupy
            from cupy.cuda import driver, function
        except ImportError as error:
            raise ImportError(f"CUDA kernels are launched with CuPy: pip install 'millrace[cuda]' ({error})") from error
        properties = cupy.cuda.Device(device)
        self.device = device
        self.arch = f"sm_{properties.compute_capability}"
        self.sm_count = int(properties.attributes["MultiProcessorCount"])
        self.shared_bytes_per_sm = int(properties.attributes["MaxSharedMemoryPerMultiprocessor"])
        self.compiler = compiler or CudaCompiler()
        self._driver = driver
        self._module_type = function.Module
        self._modules: dict[tuple[str, tuple[tuple[str, str], ...]], tuple[Any, Module]] = {}
        self._loaded: dict[Kernel, _Loaded] = {}

    def prepare(self, kernels: Iterable[Kernel], progress: Callable[[Built], None] = lambda built: None) -> None:
        """Compiles what the cache does not hold, and loads every kernel; after this, `launch` only launches.

        Raises:
            BuildError: a kernel could not be built.
        """
        chosen = list(kernels)
        if self.compiler.nvrtc is not None:
            build_all(chosen, [self.arch], progress, compiler=self.compiler)
        for kernel in chosen:
            self._load(kernel)

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
        loaded = self._loaded.get(kernel) or self._load(kernel)
        if params.dtype.itemsize != loaded.record.itemsize:
            raise ValueError(
                f"{kernel}: the kernel's argument record has {loaded.record.itemsize} bytes, but"
                f" {params.dtype.itemsize} were passed"
            )
        if shared_bytes > loaded.shared_limit:
            attribute = self._driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._driver.funcSetAttribute(loaded.function.ptr, attribute, shared_bytes)
            loaded.shared_limit = shared_bytes
        # A numpy array of one element is passed by value, whatever its type (cupy/cuda/function.pyx, _pointer).
        record = np.frombuffer(params, loaded.record)
        loaded.function(grid, (block, 1, 1), (record,), shared_bytes, _Stream(stream))

    def _load(self, kernel: Kernel) -> _Loaded:
        key = (kernel.source, kernel.defines)
        if key not in self._modules:
            compiled = self.compiler.module(kernel, self.arch)
            module = self._module_type()
            module.load(compiled.cubin)
            self._modules[key] = (module, compiled)
        module, compiled = self._modules[key]
        if kernel.name not in compiled.resources:
            raise BuildError(f"{kernel}: {kernel.source} has no such kernel; it has {', '.join(compiled.resources)}")
        resources = compiled.resources[kernel.name]
        record = np.dtype(f"V{resources.params_bytes}")
        limit = DEFAULT_SHARED_BYTES - resources.shared_bytes
        loaded = self._loaded[kernel] = _Loaded(module.get_function(kernel.name), record, limit)
        return loaded
