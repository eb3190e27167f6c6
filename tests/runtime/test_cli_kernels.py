"""`millrace kernels build`: the cache of compiled CUDA kernels, filled beforehand."""

from pathlib import Path

import pytest
import torch

from millrace.kernels import cuda_elementwise
from millrace.kernels.cpu_build import BuildError
from millrace.kernels.cuda_compile import CudaCompiler, Kernel, find_nvrtc
from millrace.runtime import cli_kernels
from millrace.runtime.cli import main

KERNEL = next(iter(cuda_elementwise.kernels()))
with_nvrtc = pytest.mark.skipif(find_nvrtc() is None, reason="NVRTC is not installed")


@pytest.fixture(autouse=True)
def one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_kernels, "all_kernels", lambda: (KERNEL,))


@with_nvrtc
def test_the_cache_is_filled_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["kernels", "build", "--arch", "sm_90", "sm_80", "sm_90", "--cache", str(tmp_path), "--jobs", "1"]
    for compiled in (2, 0):
        assert main(command) == 0
        out = capsys.readouterr()
        assert out.out == f"{tmp_path}\n"
        assert f"2 CUDA modules for sm_90, sm_80 ({compiled} compiled now)" in out.err
    assert CudaCompiler(cache_dir=tmp_path).find(KERNEL, "sm_80") is not None


def test_without_nvrtc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli_kernels, "CudaCompiler", lambda **more: CudaCompiler(nvrtc=None, **more))
    assert main(["kernels", "build", "--arch", "sm_90", "--cache", str(tmp_path)]) == 2
    assert "NVRTC, which compiles the kernels, was not found: pip install" in capsys.readouterr().err


def test_without_a_gpu_the_architecture_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["kernels", "build"]) == 2
    assert "name one with --arch (sm_80," in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["kernels", "build", "--arch", "sm_9"])


@with_nvrtc
def test_bad_jobs_and_a_kernel_that_does_not_compile(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["kernels", "build", "--arch", "sm_90", "--cache", str(tmp_path)]
    assert main([*command, "--jobs", "0"]) == 2
    assert "--jobs is 0, but it must be at least 1" in capsys.readouterr().err

    def fail(*args: object, **more: object) -> int:
        raise BuildError(f"{Kernel('norm.cu', 'mr_none')} was refused")

    monkeypatch.setattr(cli_kernels, "build_all", fail)
    assert main(command) == 1
    assert "error: mr_none was refused" in capsys.readouterr().err
