"""The C++ library without torch, and beside it."""

import subprocess
import sys
import threading

import pytest
import torch

from millrace.kernels import cpu_library, cuda_driver


def library() -> object:
    found = cpu_library.default_library()
    if found is None:
        pytest.skip("the C++ kernels are not built")
    return found


def test_a_thread_sets_its_own_number_of_threads_for_both() -> None:
    here = library()
    seen = []

    def other() -> None:
        cpu_library.set_num_threads(2)
        seen.append((here.mr_num_threads(), torch.get_num_threads()))  # type: ignore[attr-defined]

    before = torch.get_num_threads()
    try:
        cpu_library.set_num_threads(1)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert seen == [(2, 2)]
        assert here.mr_num_threads() == torch.get_num_threads() == 1  # type: ignore[attr-defined]
    finally:
        cpu_library.set_num_threads(before)


@pytest.mark.parametrize("first", ["torch", "library"])
@pytest.mark.slow
def test_one_openmp_runtime_whoever_comes_first(first: str) -> None:
    """Two runtimes would be two pools on the same cores."""
    library()
    program = f"""
from millrace.kernels import cpu_library
if {first == "torch"}:
    import torch
cpu_library.set_num_threads(2)
import torch
torch.zeros(1 << 20).exp()
with open("/proc/self/maps") as maps:
    print(len({{line.split()[-1] for line in maps if "libgomp" in line}}))
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("it looks into /proc")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("1", 0), done.stderr


def test_a_driver_is_there_where_its_library_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def missing(name: str) -> None:
        asked.append(name)
        raise OSError("not found")

    monkeypatch.setattr(cuda_driver.ctypes, "CDLL", missing)
    assert not cuda_driver.has_driver()
    monkeypatch.setattr(cuda_driver.ctypes, "CDLL", asked.append)
    assert cuda_driver.has_driver()
    assert len(asked) == 2 and "cuda" in asked[0]
