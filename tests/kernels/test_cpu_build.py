"""Building the C++ library once, finding it again, and doing without."""

import os
import platform
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from millrace.kernels import cpu_build, cpu_library, ops
from millrace.kernels.cpu_backend import CpuBackend
from millrace.kernels.cpu_build import BuildError, Toolchain, build_library, find_library
from millrace.kernels.cpu_library import load_library
from millrace.kernels.torch_backend import TorchBackend

FAST = [flag if flag != "-O3" else "-O0" for flag in cpu_build.FLAGS]


@pytest.fixture
def fresh_defaults() -> Iterator[None]:
    cpu_library.default_library.cache_clear()
    yield
    cpu_library.default_library.cache_clear()


def counting_compiler(folder: Path) -> tuple[Path, Path]:
    """A compiler that notes each run in a file, and the file."""
    real = cpu_build.find_compiler()
    if real is None:
        pytest.skip("no C++ compiler")
    log, script = folder / "runs", folder / "c++"
    script.write_text(f'#!/bin/sh\necho run >> "{log}"\nexec "{real}" "$@"\n')
    script.chmod(0o755)
    return script, log


@pytest.mark.slow
def test_the_second_build_and_every_load_run_no_compiler(tmp_path: Path) -> None:
    compiler, log = counting_compiler(tmp_path)
    toolchain = Toolchain(compiler=compiler, cache_dir=tmp_path / "cache", flags=FAST)
    assert find_library(toolchain) is None
    path = build_library(toolchain)
    runs = log.read_text().count("run")
    assert runs == len(list(cpu_build.SOURCE_DIR.glob("*.cpp"))) + 1
    assert build_library(toolchain) == path == find_library(toolchain)
    assert log.read_text().count("run") == runs
    assert [entry.name for entry in path.parent.iterdir()] == [path.name], "nothing is left beside the library"

    without = Toolchain(compiler=None, cache_dir=tmp_path / "cache", flags=FAST)
    assert find_library(without) == path, "a cached library needs no compiler"
    x = torch.randn(2, 8)
    y = ops.silu_mul(x, backends=[CpuBackend(load_library(path))])
    assert torch.allclose(y, ops.silu_mul(x, backends=[TorchBackend()]), atol=1e-6)


def test_other_flags_are_another_library(tmp_path: Path) -> None:
    one, two = (Toolchain(compiler=None, cache_dir=tmp_path, flags=[flag]) for flag in ("-O1", "-O2"))
    assert one.folder() != two.folder()


@pytest.mark.slow
@pytest.mark.parametrize("target", ["x86-64", "ivybridge", "haswell", "knl", "skylake-avx512", "icelake-server"])
def test_every_combination_of_instructions_compiles(target: str) -> None:
    """Ivy Bridge has F16C without AVX2, Knights Landing AVX-512 without its byte instructions."""
    compiler = cpu_build.find_compiler()
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("no C++ compiler for x86-64")
    flags = [flag.replace("native", target) for flag in FAST]
    sources = [cpu_build.SOURCE_DIR / name for name in ("linear.cpp", "quantized.cpp", "sampling.cpp")]
    done = subprocess.run([compiler, *flags, "-fsyntax-only", *sources], capture_output=True, text=True)
    if "-march" in done.stderr:
        pytest.skip(f"this compiler does not know {target}")
    assert done.returncode == 0, done.stderr


def test_builders_at_the_same_time_agree(tmp_path: Path) -> None:
    script = tmp_path / "c++"  # writes its name and process into the file that follows -o
    script.write_text('#!/bin/sh\nwhile [ "$1" != "-o" ]; do shift; done\necho "built by $$" > "$2"\n')
    script.chmod(0o755)
    toolchain = Toolchain(compiler=script, cache_dir=tmp_path / "cache")
    paths: list[Path] = []
    builders = [threading.Thread(target=lambda: paths.append(build_library(toolchain))) for _ in range(8)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert paths == [find_library(toolchain)] * 8
    assert paths[0].read_text().startswith("built by")
    assert [entry.name for entry in paths[0].parent.iterdir()] == [paths[0].name]


def test_a_failing_compiler_is_reported_with_its_words(tmp_path: Path) -> None:
    script = tmp_path / "c++"
    script.write_text("#!/bin/sh\necho the disk is upside down >&2\nexit 3\n")
    script.chmod(0o755)
    with pytest.raises(BuildError, match="status 3: the disk is upside down"):
        build_library(Toolchain(compiler=script, cache_dir=tmp_path / "cache"))
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_a_cache_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    compiler, _ = counting_compiler(tmp_path)
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(BuildError, match="XDG_CACHE_HOME"):
        build_library(Toolchain(compiler=compiler, cache_dir=tmp_path / "cache"))


@pytest.mark.usefixtures("fresh_defaults")
def test_without_compiler_and_cache_torch_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    caplog.set_level("INFO")
    assert "install g++" in ops.prepare()
    assert [backend.name for backend in ops.default_backends()] == ["torch"]
    assert ops.rms_norm(torch.randn(2, 8), torch.ones(8), 1e-6).shape == (2, 8)
    assert caplog.text.count("CPU ops run in torch") == 2, "once by prepare, once by the default list, not per op"


@pytest.mark.usefixtures("fresh_defaults")
def test_prepare_puts_the_built_library_first(cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if cpu_build.find_compiler() is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "millrace").mkdir()
    os.symlink(cache_dir, tmp_path / "millrace" / "kernels")
    build_library(Toolchain(cache_dir=cache_dir))
    assert "cpu, then torch" in ops.prepare()
    assert [backend.name for backend in ops.default_backends()] == ["cpu", "torch"]


@pytest.mark.usefixtures("fresh_defaults")
def test_a_broken_library_leaves_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    toolchain = Toolchain(compiler=None)
    toolchain.folder().mkdir(parents=True)
    (toolchain.folder() / "millrace_cpu_0.so").write_bytes(b"not a library")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert [backend.name for backend in ops.default_backends()] == ["torch"]
