"""What to test: torch and numpy, and the C++ library built for this CPU and for narrower vectors."""

import ctypes
import platform
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from millrace.kernels.arguments import Backend
from millrace.kernels.cpu_backend import CpuBackend
from millrace.kernels.cpu_build import FLAGS, Toolchain, build_library, find_compiler
from millrace.kernels.cpu_library import load_library
from millrace.kernels.cpu_sampling import CpuSampling
from millrace.kernels.numpy_sampling import NumpySampling
from millrace.kernels.sampling import Sampling
from millrace.kernels.torch_backend import TorchBackend

TARGETS = {"native": "native", "avx2": "haswell", "sse2": "x86-64"}
NARROW = [pytest.param(name, marks=pytest.mark.slow) for name in ("avx2", "sse2")]  # ten seconds of compiler each


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def cache_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Libraries by their sources and flags: kept in pytest's cache from run to run, where there is one."""
    cache = getattr(request.config, "cache", None)
    return Path(cache.mkdir("millrace-cpu")) if cache is not None else tmp_path_factory.mktemp("kernel-cache")


def cpu_library(cache_dir: Path, target: str) -> ctypes.CDLL:
    if find_compiler() is None:
        pytest.skip("no C++ compiler")
    if target != "native" and platform.machine() != "x86_64":
        pytest.skip(f"{target} is an x86-64 target")
    if target == "avx2" and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX"):
        pytest.skip("this CPU has no AVX2")
    flags = [flag.replace("native", TARGETS[target]) for flag in FLAGS]
    with FileLock(cache_dir / f"{target}.lock"):  # another worker of this run may be building it
        return load_library(build_library(Toolchain(cache_dir=cache_dir, flags=flags)))


@pytest.fixture(scope="session", params=["torch", "native", *NARROW])
def backend(request: pytest.FixtureRequest, cache_dir: Path) -> Backend:
    return TorchBackend() if request.param == "torch" else CpuBackend(cpu_library(cache_dir, request.param))


@pytest.fixture(scope="session", params=["native", *NARROW])
def compiled(request: pytest.FixtureRequest, cache_dir: Path) -> Backend:
    """The C++ backends alone, for what only they promise."""
    return CpuBackend(cpu_library(cache_dir, request.param))


@pytest.fixture(scope="session", params=["numpy", "native", *NARROW])
def sampling(request: pytest.FixtureRequest, cache_dir: Path) -> Sampling:
    return NumpySampling() if request.param == "numpy" else CpuSampling(cpu_library(cache_dir, request.param))


@pytest.fixture(scope="session", params=["native", *NARROW])
def compiled_sampling(request: pytest.FixtureRequest, cache_dir: Path) -> Sampling:
    """Sampling in C++ alone, for what only it promises."""
    return CpuSampling(cpu_library(cache_dir, request.param))
