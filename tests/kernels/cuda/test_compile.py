"""NVRTC without a GPU: every kernel compiles without spills and within its registers; and the cache of cubins."""

import ctypes
import dataclasses
import os
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from millrace.kernels import cuda_compile, cuda_elementwise
from millrace.kernels.cpu_build import BuildError
from millrace.kernels.cuda_catalog import all_kernels
from millrace.kernels.cuda_compile import Built, CudaCompiler, Kernel, Module, build_all, find_nvrtc, resolve

pytestmark = (
    pytest.mark.slow
)  # tests/runtime/cuda drives the same kernels within models, and `make test-fast` runs that

# One of each generation: A100, L4 and 4090, H100 and H200, B200, RTX 5090 and PRO 6000.
ARCHS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
EMBEDDING = next(kernel for kernel in cuda_elementwise.kernels() if kernel.source == "embedding.cu")


def assigned() -> dict[str, list[tuple[Kernel, str]]]:
    """By source, what is compiled here: each variant for one architecture, in turn, so that each kernel comes to all of
    them; one with few variants begins again. All variants for all architectures, which `millrace kernels build`
    compiles, would take ten minutes."""
    jobs: dict[str, list[tuple[Kernel, str]]] = defaultdict(list)
    variants: dict[str, list[Kernel]] = defaultdict(list)
    for kernel in all_kernels():
        variants[kernel.name].append(kernel)
    for kernels in variants.values():
        for i in range(max(len(kernels), len(ARCHS))):
            kernel = kernels[i % len(kernels)]
            jobs[kernel.source].append((kernel, ARCHS[i % len(ARCHS)]))
    return jobs


ASSIGNED = assigned()


@pytest.fixture(scope="session")
def nvrtc() -> Path:
    found = find_nvrtc()
    if found is None:
        pytest.skip("no NVRTC: pip install 'nvidia-cuda-nvrtc==13.0.*'")
    return found


@pytest.fixture(scope="session")
def cubin_cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kept in pytest's cache from run to run: what did not change is not compiled again."""
    cache = getattr(request.config, "cache", None)
    return Path(cache.mkdir("millrace-cubins")) if cache is not None else tmp_path_factory.mktemp("cubins")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("source", sorted(ASSIGNED))
def test_kernels_compile_within_their_budgets(nvrtc: Path, cubin_cache: Path, source: str) -> None:
    compiler = CudaCompiler(nvrtc, cubin_cache)

    def check(job: tuple[Kernel, str]) -> str | None:
        kernel, arch = job
        try:
            resources = compiler.module(kernel, arch).resources[kernel.name]
        except BuildError as error:
            return str(error)
        local = resources.stack_bytes + resources.spill_store_bytes + resources.spill_load_bytes
        if local or resources.registers > kernel.max_registers:
            return f"{kernel} for {arch}, of at most {kernel.max_registers} registers: {resources}"
        return None

    # Modules that several kernels share are compiled once: the first kernel of each, then the rest from the cache.
    jobs = ASSIGNED[source]
    modules = list({(kernel.defines, arch): (kernel, arch) for kernel, arch in jobs}.values())
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        found = [*pool.map(check, modules), *map(check, (job for job in jobs if job not in modules))]
    problems = [problem for problem in found if problem]
    assert not problems, "\n".join(problems)


def test_every_source_is_in_the_catalog() -> None:
    assert {path.name for path in cuda_compile.SOURCE_DIR.glob("*.cu")} == set(ASSIGNED)
    assert len({(kernel.source, kernel.name, kernel.defines) for kernel in all_kernels()}) == len(all_kernels())


# ---------------------------------------------------------------------------------------------------------------
# Includes


def sources(**texts: str) -> Callable[[str], str]:
    def read(name: str) -> str:
        try:
            return texts[name.replace(".", "_")]
        except KeyError:
            raise FileNotFoundError(name) from None

    return read


def test_includes_are_put_in_place_once_with_their_lines() -> None:
    read = sources(
        a_cu='#include "b.cuh"\nint a;\n#include "c.cuh"\n',
        b_cuh='#pragma once\n  # include "c.cuh"  // for c\nint b;\n',
        c_cuh="int c;\n",
    )
    lines = [line for line in resolve("a.cu", read).split("\n") if line.strip()]
    expected = [
        '#line 1 "a.cu"', '#line 1 "b.cuh"', '#line 1 "c.cuh"', "int c;", '#line 2 "b.cuh"', "int b;",
        '#line 1 "a.cu"', "int a;", '#line 3 "a.cu"',
    ]  # fmt: skip
    assert lines == expected


@pytest.mark.parametrize("name", ["missing.cuh", "../secret.h"])
def test_what_cannot_be_included_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        resolve("a.cu", sources(a_cu=f'#include "{name}"\n'))


def test_a_line_of_an_included_file_is_named_by_the_compiler(
    nvrtc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad.cu").write_text('#include "inner.cuh"\nextern "C" __global__ void k(int p) {}\n')
    (tmp_path / "inner.cuh").write_text("\n\nint x = unknown_name;\n")
    monkeypatch.setattr(cuda_compile, "SOURCE_DIR", tmp_path)
    with pytest.raises(
        BuildError, match=r"k for sm_90: nvrtcCompileProgram(.|\n)*inner.cuh\(3\): error(.|\n)*unknown_name"
    ):
        CudaCompiler(nvrtc, tmp_path / "cache").module(Kernel("bad.cu", "k"), "sm_90")
    assert not (tmp_path / "cache").exists()


# ---------------------------------------------------------------------------------------------------------------
# The cache


@pytest.fixture
def filled(nvrtc: Path, tmp_path: Path) -> tuple[CudaCompiler, Module]:
    compiler = CudaCompiler(nvrtc, tmp_path)
    return compiler, compiler.module(EMBEDDING, "sm_90")


def refuse_to_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> ctypes.CDLL:
        raise AssertionError("NVRTC was loaded")

    monkeypatch.setattr(cuda_compile, "_library", refuse)
    monkeypatch.setattr(ctypes, "CDLL", refuse)


def test_a_warm_cache_loads_no_compiler(filled: tuple[CudaCompiler, Module], monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, module = filled
    refuse_to_load(monkeypatch)
    assert compiler.module(EMBEDDING, "sm_90") == module and module.cubin.startswith(b"\x7fELF")
    # Nor is one needed where there is none.
    assert dataclasses.replace(compiler, nvrtc=None).module(EMBEDDING, "sm_90") == module
    assert build_all([EMBEDDING], ["sm_90"], compiler=compiler, workers=1) == 1


@pytest.mark.parametrize("damage", ["empty", "short", "flipped", "no head", "list", "old"])
def test_a_damaged_file_is_built_again(filled: tuple[CudaCompiler, Module], damage: str) -> None:
    compiler, module = filled
    (path,) = compiler.cache_dir.glob("*.cubin")
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-100] ^= 1
    damaged = {
        "empty": b"",
        "short": whole[:-7],
        "flipped": bytes(flipped),
        "no head": module.cubin,
        "list": b"[1, 2]\n" + module.cubin,
        "old": whole.replace(b'"registers"', b'"register_"'),
    }
    path.write_bytes(damaged[damage])
    assert compiler.find(EMBEDDING, "sm_90") is None
    with pytest.raises(BuildError, match="is not in the kernel cache"):
        dataclasses.replace(compiler, nvrtc=None).module(EMBEDDING, "sm_90")
    assert compiler.module(EMBEDDING, "sm_90") == module
    assert path.read_bytes() == whole
    assert [entry.name for entry in compiler.cache_dir.iterdir()] == [path.name]


def test_the_name_of_a_file_follows_everything_that_matters(
    filled: tuple[CudaCompiler, Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler, _ = filled
    assert compiler.find(EMBEDDING._replace(name="other", max_registers=1), "sm_90") is not None
    assert compiler.find(EMBEDDING._replace(defines=(("MR_T", "float"),)), "sm_90") is None
    assert compiler.find(EMBEDDING, "sm_100") is None
    newer = tmp_path / "newer" / "libnvrtc.so.13"
    newer.parent.mkdir()
    newer.write_bytes(b"another compiler")
    assert dataclasses.replace(compiler, nvrtc=newer).find(EMBEDDING, "sm_90") is None
    for change in ("FLAGS", "SOURCE_DIR"):
        with monkeypatch.context() as patch:
            cuda_compile._stem.cache_clear()
            if change == "FLAGS":
                patch.setattr(cuda_compile, "FLAGS", (*cuda_compile.FLAGS, "-lineinfo"))
            else:
                for path in cuda_compile.SOURCE_DIR.glob("*.cu*"):
                    text = path.read_text() + ("// changed\n" if path.name == "prelude.cuh" else "")
                    (tmp_path / path.name).write_text(text)
                patch.setattr(cuda_compile, "SOURCE_DIR", tmp_path)
            assert compiler.find(EMBEDDING, "sm_90") is None
    cuda_compile._stem.cache_clear()
    assert compiler.find(EMBEDDING, "sm_90") is not None


def test_without_a_compiler_an_earlier_architecture_of_the_same_major_version_serves(
    nvrtc: Path, tmp_path: Path
) -> None:
    CudaCompiler(nvrtc, tmp_path).module(EMBEDDING, "sm_80")
    alone = CudaCompiler(None, tmp_path)
    assert alone.module(EMBEDDING, "sm_89").arch == "sm_80" and alone.module(EMBEDDING, "sm_86").arch == "sm_80"
    for arch in ("sm_90", "sm_100"):
        with pytest.raises(BuildError, match=rf"pip install 'nvidia-cuda-nvrtc==13\.0\.\*'.*--arch {arch}"):
            alone.module(EMBEDDING, arch)


def test_build_all_builds_each_module_once_and_tells(nvrtc: Path, tmp_path: Path) -> None:
    norms = [kernel for kernel in cuda_elementwise.kernels() if kernel.defines == (("MR_T", "bf16"), ("MR_VECS", "1"))]
    assert {kernel.name for kernel in norms} == {"mr_rms_norm", "mr_layer_norm"}
    told: list[Built] = []
    compiler = CudaCompiler(nvrtc, tmp_path)
    for cached in (False, True):
        told.clear()
        assert build_all([*norms, EMBEDDING], ["sm_80", "sm_90"], told.append, compiler=compiler, workers=2) == 4
        assert [(built.done, built.total, built.cached) for built in told] == [(i, 4, cached) for i in range(1, 5)]
        assert [built.arch for built in told] == ["sm_80", "sm_80", "sm_90", "sm_90"]
    assert {kernel.name for kernel in norms} == set(compiler.module(norms[0], "sm_80").resources)


def test_wrong_requests_are_named(nvrtc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"'sm_75' is not an architecture .* sm_80, sm_86"):
        build_all([EMBEDDING], ["sm_75"], compiler=CudaCompiler(nvrtc, tmp_path))
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(BuildError, match=r"cannot write the kernel cache .*set XDG_CACHE_HOME"):
        CudaCompiler(nvrtc, blocked / "cache").module(EMBEDDING, "sm_90")
    broken = tmp_path / "libnvrtc.so.13"
    broken.write_text("not a library")
    with pytest.raises(BuildError, match="NVRTC cannot be loaded"):
        CudaCompiler(broken, tmp_path).module(EMBEDDING, "sm_90")


def test_nvrtc_is_looked_for_in_wheels_and_in_a_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_compile.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("CUDA_PATH", str(tmp_path))
    assert find_nvrtc() is None
    library = tmp_path / "lib64" / "libnvrtc.so.13"
    library.parent.mkdir()
    library.write_text("")
    assert find_nvrtc() == library
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert CudaCompiler().cache_dir == Path("/somewhere/millrace/kernels/cuda")
