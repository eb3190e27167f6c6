"""CupyLauncher against a CuPy that only writes down what it is asked for; and what it relies on in the real one."""

import builtins
import dataclasses
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from millrace.kernels.cpu_build import BuildError
from millrace.kernels.cuda_compile import CudaCompiler, Kernel, Module, Resources
from millrace.kernels.cuda_launch import CupyLauncher

PARAMS = np.dtype([("x", "u8"), ("n", "i4"), ("eps", "f4")], align=True)
KERNEL = Kernel("norm.cu", "first", (("MR_T", "bf16"),))
MAX_SHARED = 8
ATTRIBUTES = {"MultiProcessorCount": 132, "MaxSharedMemoryPerMultiprocessor": 233_472}
STATIC_SHARED = 1024


class FakeFunction:
    def __init__(self, cupy: "FakeCupy", name: str) -> None:
        self.cupy, self.name, self.ptr = cupy, name, 1000 + len(cupy.functions)
        cupy.functions.append(name)

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...], shared_mem: int, stream: Any
    ) -> None:
        (record,) = args
        assert type(grid) is type(block) is tuple and isinstance(record, np.ndarray) and record.size == 1
        address = record.__array_interface__["data"][0]
        data = np.ctypeslib.as_array((np.ctypeslib.ctypes.c_uint8 * record.itemsize).from_address(address)).tobytes()
        self.cupy.launches.append((self.name, grid, block, data, shared_mem, stream.ptr))


class FakeModule:
    cupy: "FakeCupy"

    def load(self, cubin: bytes) -> None:
        assert type(cubin) is bytes
        self.cupy.loads.append(cubin)

    def get_function(self, name: str) -> FakeFunction:
        return FakeFunction(self.cupy, name)


class FakeCupy:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, capability: str) -> None:
        self.loads: list[bytes] = []
        self.functions: list[str] = []
        self.launches: list[tuple[Any, ...]] = []
        self.attributes: list[tuple[int, int, int]] = []
        cupy, cuda = ModuleType("cupy"), ModuleType("cupy.cuda")
        driver, function = ModuleType("cupy.cuda.driver"), ModuleType("cupy.cuda.function")
        device = SimpleNamespace(compute_capability=capability, attributes=ATTRIBUTES)
        cuda.Device = lambda index: device  # type: ignore[attr-defined]
        driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = MAX_SHARED  # type: ignore[attr-defined]
        driver.funcSetAttribute = lambda *arguments: self.attributes.append(arguments)  # type: ignore[attr-defined]
        function.Module = type("Module", (FakeModule,), {"cupy": self})  # type: ignore[attr-defined]
        cupy.cuda, cuda.driver, cuda.function = cuda, driver, function  # type: ignore[attr-defined]
        for module in (cupy, cuda, driver, function):
            monkeypatch.setitem(sys.modules, module.__name__, module)


@dataclasses.dataclass(frozen=True)
class FakeCompiler(CudaCompiler):
    """Modules with two kernels, without a compiler."""

    nvrtc: Path | None = None

    def module(self, kernel: Kernel, arch: str) -> Module:
        resources = Resources(32, 0, 0, 0, STATIC_SHARED, PARAMS.itemsize)
        return Module(
            arch, f"{kernel.source} {kernel.defines} {arch}".encode(), dict.fromkeys(("first", "second"), resources), ""
        )


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> FakeCupy:
    return FakeCupy(monkeypatch, "90")


@pytest.fixture
def launcher(cupy: FakeCupy) -> CupyLauncher:
    return CupyLauncher(0, FakeCompiler())


def params(x: int = 7) -> np.void:
    record: np.void = np.array((x, 3, 0.5), PARAMS)[()]
    return record


def test_a_launch_passes_the_struct_by_value_on_the_stream(cupy: FakeCupy, launcher: CupyLauncher) -> None:
    assert (launcher.device_type, launcher.arch) == ("cuda", "sm_90")
    assert (launcher.sm_count, launcher.shared_bytes_per_sm) == (132, 228 * 1024)
    launcher.launch(KERNEL, (5, 2, 1), 128, params(), shared_bytes=64, stream=4711)
    assert cupy.launches == [("first", (5, 2, 1), (128, 1, 1), params().tobytes(), 64, 4711)]
    launcher.launch(KERNEL, (1, 1, 1), 32, params(9), stream=0)
    assert cupy.launches[1] == ("first", (1, 1, 1), (32, 1, 1), params(9).tobytes(), 0, 0)


def test_kernels_of_one_module_load_it_once(cupy: FakeCupy, launcher: CupyLauncher) -> None:
    other = KERNEL._replace(defines=(("MR_T", "f16"),))
    launcher.prepare([KERNEL, KERNEL._replace(name="second"), other])
    assert len(cupy.loads) == 2 and cupy.functions == ["first", "second", "first"]
    for kernel in (KERNEL, KERNEL._replace(name="second"), other):
        launcher.launch(kernel, (1, 1, 1), 32, params(), stream=1)
    assert len(cupy.loads) == 2 and len(cupy.functions) == 3  # nothing is loaded in a launch after `prepare`


def test_shared_memory_above_48_kb_is_asked_for_once(cupy: FakeCupy, launcher: CupyLauncher) -> None:
    """The static part counts as well."""
    most = 48 * 1024 - STATIC_SHARED
    for size in (most, most + 16, 70_000, 60_000, 70_000, 90_000):
        launcher.launch(KERNEL, (1, 1, 1), 32, params(), shared_bytes=size, stream=0)
    assert cupy.attributes == [(1000, MAX_SHARED, size) for size in (most + 16, 70_000, 90_000)]
    assert [launch[4] for launch in cupy.launches] == [most, most + 16, 70_000, 60_000, 70_000, 90_000]


def test_a_record_of_another_size_is_refused(cupy: FakeCupy, launcher: CupyLauncher) -> None:
    wrong = np.zeros(1, np.dtype([("x", "u8"), ("n", "i8"), ("m", "i8")]))[0]
    with pytest.raises(ValueError, match="has 16 bytes, but 24 were passed"):
        launcher.launch(KERNEL, (1, 1, 1), 32, wrong, stream=0)
    assert cupy.launches == []


def test_an_unknown_kernel_is_refused(cupy: FakeCupy, launcher: CupyLauncher) -> None:
    with pytest.raises(BuildError, match="no such kernel; it has first, second"):
        launcher.launch(KERNEL._replace(name="third"), (1, 1, 1), 32, params(), stream=0)


def test_without_cupy_the_error_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *arguments: Any, **options: Any) -> Any:
        if name.split(".")[0] == "cupy":
            raise ImportError("No module named 'cupy'")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install 'millrace\[cuda\]'"):
        CupyLauncher()


def test_the_real_cupy_has_what_the_launcher_uses() -> None:
    cupy = pytest.importorskip("cupy")
    from cupy.cuda import driver, function

    assert callable(driver.funcSetAttribute) and isinstance(driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, int)
    assert callable(function.Module().load) and callable(function.Module().get_function)
    assert hasattr(function.Function, "ptr") and callable(function.Function.__call__)
    assert hasattr(cupy.cuda.Device, "compute_capability") and hasattr(cupy.cuda.Device, "attributes")
    for name in ATTRIBUTES:
        assert hasattr(cupy.cuda.runtime, f"cudaDevAttr{name}")
