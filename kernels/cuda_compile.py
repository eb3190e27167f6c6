"""Compiles kernels/cuda/*.cu to cubins with NVRTC, without a GPU, and keeps them in a cache by content.

A module is one source with one set of `-D` macros for one architecture; every kernel that the macros leave in the
source lies in it. Its cubin is in `$XDG_CACHE_HOME/millrace/kernels/cuda` (default `~/.cache`) under a name that hashes
the source with all that it includes, the macros, the flags, the architecture and the compiler. With a warm cache no
compiler is loaded; and one that is not there is not missed.

NVRTC is called through its C interface (NVRTC 13.0 documentation, chapter 3), found in the wheel `nvidia-cuda-nvrtc` or
in a CUDA toolkit; no header and no other part of a toolkit is used.
"""

import ctypes
import functools
import hashlib
import importlib.util
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from millrace.kernels.cpu_build import BuildError
from millrace.kernels.cpu_build import default_cache_dir as kernel_cache_dir

SOURCE_DIR = Path(__file__).parent / "cuda"
ARCHS = (
    "sm_80", "sm_86", "sm_87", "sm_88", "sm_89", "sm_90", "sm_100", "sm_103", "sm_110", "sm_120", "sm_121",
)  # fmt: skip
# IEEE arithmetic: no flush to zero and exact division and square roots; products and sums may be fused.
FLAGS = ("-std=c++17", "-ftz=false", "-prec-div=true", "-prec-sqrt=true", "-Xptxas=-v")

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+"([^"]+)"[^\n]*$', re.MULTILINE)
_PRAGMA_ONCE = re.compile(r"^[ \t]*#[ \t]*pragma[ \t]+once[ \t]*$", re.MULTILINE)


class Kernel(NamedTuple):
    """A variant of a kernel.

    Attributes:
        source: file in kernels/cuda.
        name: of the `extern "C" __global__` function.
        defines: macros, (name, value).
        max_registers: per thread; the tests refuse a variant that takes more, on any architecture.
    """

    source: str
    name: str
    defines: tuple[tuple[str, str], ...] = ()
    max_registers: int = 255

    def __str__(self) -> str:
        macros = ", ".join(f"{name}={value}" for name, value in self.defines)
        return f"{self.name}[{macros}]" if macros else self.name


def read_source(name: str) -> str:
    return (SOURCE_DIR / name).read_text()


def resolve(source: str, read: Callable[[str], str] = read_source) -> str:
    """The text of a source with every `#include "..."` put in its place, each file once, with #line directives.

    Raises:
        ValueError: an included file is not in kernels/cuda.
    """
    seen: set[str] = set()

    def expand(name: str) -> str:
        seen.add(name)
        try:
            if "/" in name:
                raise FileNotFoundError(name)
            text = _PRAGMA_ONCE.sub("", read(name))
        except FileNotFoundError as error:
            raise ValueError(f"{source}: {name} is not in kernels/cuda") from error
        parts, start = [f'#line 1 "{name}"\n'], 0
        for match in _INCLUDE.finditer(text):
            parts.append(text[start : match.start()])
            if match[1] not in seen:
                parts.append(expand(match[1]))
            line = text.count("\n", 0, match.end()) + 1
            parts.append(f'\n#line {line} "{name}"')
            start = match.end()
        parts.append(text[start:])
        return "".join(parts)

    return expand(source)


class Resources(NamedTuple):
    """What one kernel takes: registers and bytes per thread, static shared bytes per block, its argument record."""

    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    shared_bytes: int
    params_bytes: int


@dataclass(frozen=True)
class Module:
    """A compiled source. `resources` is by the name of the kernel; `log` is what the compiler said."""

    arch: str
    cubin: bytes
    resources: Mapping[str, Resources]
    log: str


def default_cache_dir() -> Path:
    return kernel_cache_dir() / "cuda"


def find_nvrtc() -> Path | None:
    """NVRTC's library: the newest in the wheels of this environment, else of a toolkit. It is not loaded."""
    spec = importlib.util.find_spec("nvidia")
    wheels = [Path(entry) for entry in (spec.submodule_search_locations or ())] if spec else []
    folders = [folder for wheel in wheels for folder in (*wheel.glob("cu1[0-9]/lib"), wheel / "cuda_nvrtc" / "lib")]
    toolkit = os.environ.get("CUDA_PATH") or os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    for group in (folders, [Path(toolkit) / "lib64"]):
        found = [path for folder in group for path in folder.glob("libnvrtc.so.1[0-9]")]
        if found:
            return max(found, key=lambda path: path.name)
    return None


@dataclass(frozen=True)
class CudaCompiler:
    """NVRTC with a cache in front of it.

    Attributes:
        nvrtc: its library; None where there is none: what is cached can still be used.
        cache_dir: where cubins lie.
    """

    nvrtc: Path | None = field(default_factory=find_nvrtc)
    cache_dir: Path = field(default_factory=default_cache_dir)

    def module(self, kernel: Kernel, arch: str) -> Module:
        """The module of a kernel for an architecture such as "sm_90": from the cache, else compiled into it.

        Without a compiler, a cubin of any compiler serves, and one for an earlier architecture of the same major
        version (CUDA C++ Programming Guide, "Binary Compatibility").

        Raises:
            BuildError: not cached and no compiler, the compiler refused the source, or the cache cannot be written.
        """
        found = self.find(kernel, arch)
        if found is not None:
            return found
        if self.nvrtc is None:
            raise BuildError(
                f"{kernel} for {arch} is not in the kernel cache {self.cache_dir}, and NVRTC, which compiles it, was"
                " not found: pip install 'nvidia-cuda-nvrtc==13.0.*', or build the cache elsewhere with"
                f" `millrace kernels build --arch {arch}` and copy it here"
            )
        module = compile_module(_library(self.nvrtc), kernel, arch)
        self._store(self._path(kernel, arch), module)
        return module

    def find(self, kernel: Kernel, arch: str) -> Module | None:
        """The cached module, or None; a file that is damaged counts as absent."""
        if self.nvrtc is not None:
            return _read_module(self._path(kernel, arch), arch)
        for other in _runs_on(arch):
            for path in sorted(self.cache_dir.glob(f"{_stem(kernel, other)}.*.cubin")):
                module = _read_module(path, other)
                if module is not None:
                    return module
        return None

    def _path(self, kernel: Kernel, arch: str) -> Path:
        assert self.nvrtc is not None
        return self.cache_dir / f"{_stem(kernel, arch)}.{_identity(self.nvrtc)}.cubin"

    def _store(self, path: Path, module: Module) -> None:
        """One line that describes the cubin, then the cubin; under its name by a rename, so that it is never half."""
        head = {
            "sha256": hashlib.sha256(module.cubin).hexdigest(),
            "resources": {name: resources._asdict() for name, resources in module.resources.items()},
            "log": module.log,
        }
        try:
            self.cache_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.cache_dir) as scratch:
                file = Path(scratch) / "module"
                file.write_bytes(json.dumps(head).encode() + b"\n" + module.cubin)
                os.replace(file, path)
        except OSError as error:
            raise BuildError(f"cannot write the kernel cache {self.cache_dir}: {error}; set XDG_CACHE_HOME") from error


def _read_module(path: Path, arch: str) -> Module | None:
    try:
        line, _, cubin = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    try:
        head = json.loads(line)
        if hashlib.sha256(cubin).hexdigest() != head["sha256"]:
            return None
        resources = {name: Resources(**values) for name, values in head["resources"].items()}
        return Module(arch, cubin, resources, head["log"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _runs_on(arch: str) -> Iterator[str]:
    """The architecture, then the earlier ones of its major version, the nearest first."""
    yield arch
    number = int(arch.removeprefix("sm_"))
    yield from (other for other in reversed(ARCHS) if number // 10 * 10 <= int(other.removeprefix("sm_")) < number)


@functools.lru_cache(maxsize=1024)
def _stem(kernel: Kernel, arch: str) -> str:
    """File name of a module, but for the compiler: the kernel's name and budget do not enter."""
    if arch not in ARCHS:
        raise ValueError(f"{arch!r} is not an architecture that the kernels are built for: {', '.join(ARCHS)}")
    macros = [f"{name}={value}" for name, value in kernel.defines]
    digest = hashlib.sha256("\0".join((resolve(kernel.source), arch, *FLAGS, "", *macros)).encode())
    return f"{Path(kernel.source).stem}-{arch}-{digest.hexdigest()[:24]}"


@functools.lru_cache(maxsize=8)
def _identity(nvrtc: Path) -> str:
    """Names the compiler without loading it: the files of its version, and its size."""
    names = sorted(path.name for path in nvrtc.parent.glob("libnvrtc-builtins.so*"))
    real = nvrtc.resolve()
    return hashlib.sha256("\0".join((*names, real.name, str(real.stat().st_size))).encode()).hexdigest()[:12]


class Built(NamedTuple):
    """One module of `build_all`: which, whether it was there already, and how many of how many are done."""

    kernel: Kernel
    arch: str
    cached: bool
    done: int
    total: int


def build_all(
    kernels: Iterable[Kernel],
    archs: Sequence[str],
    progress: Callable[[Built], None] = lambda built: None,
    *,
    compiler: CudaCompiler | None = None,
    workers: int | None = None,
) -> int:
    """Fills the cache with every module of the kernels for every architecture, and returns how many there are.

    Args:
        progress: called after each module, from this thread.
        workers: modules compiled at a time; None: one per processor. About 1 s and 150 MB each.

    Raises:
        BuildError: the first module that could not be built.
        ValueError: an unknown architecture.
    """
    chosen = compiler or CudaCompiler()
    modules = list({(kernel.source, kernel.defines): kernel for kernel in kernels}.values())
    jobs = [(kernel, arch) for arch in archs for kernel in modules]

    def build(job: tuple[Kernel, str]) -> tuple[Kernel, str, bool]:
        cached = chosen.find(*job) is not None
        if not cached:
            chosen.module(*job)
        return *job, cached

    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        try:
            for done, (kernel, arch, cached) in enumerate(pool.map(build, jobs), start=1):
                progress(Built(kernel, arch, cached, done, len(jobs)))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return len(jobs)


# ---------------------------------------------------------------------------------------------------------------
# NVRTC


@functools.lru_cache(maxsize=8)
def _library(path: Path) -> ctypes.CDLL:
    try:
        # NVRTC opens its companion by name alone, and the loader finds one that is loaded by its name.
        for companion in sorted(path.parent.glob("libnvrtc-builtins.so*")):
            ctypes.CDLL(str(companion))
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"NVRTC cannot be loaded: {error}; pip install 'nvidia-cuda-nvrtc==13.0.*'") from error
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return library


def compile_module(library: Any, kernel: Kernel, arch: str) -> Module:
    """Compiles the source of a kernel; no cache is asked.

    Raises:
        BuildError: with the compiler's log.
    """
    program = ctypes.c_void_p()
    source = resolve(kernel.source).encode()

    def call(name: str, *arguments: Any) -> None:
        status = getattr(library, name)(*arguments)
        if status:
            raise BuildError(f"{kernel} for {arch}: {name}: {library.nvrtcGetErrorString(status).decode()}")

    def read(what: str) -> bytes:
        size = ctypes.c_size_t()
        call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        data = ctypes.create_string_buffer(size.value)
        call(f"nvrtcGet{what}", program, data)
        return data.raw

    call("nvrtcCreateProgram", ctypes.byref(program), source, kernel.source.encode(), 0, None, None)
    try:
        options = [f"-arch={arch}", *FLAGS, *(f"-D{name}={value}" for name, value in kernel.defines)]
        encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        try:
            call("nvrtcCompileProgram", program, len(options), encoded)
        except BuildError as error:
            log = read("ProgramLog").rstrip(b"\0").decode(errors="replace")
            raise BuildError(f"{error}\n{log.strip()[-4000:]}") from None
        log = re.sub(r"(?m)^.*Compile time.*\n", "", read("ProgramLog").rstrip(b"\0").decode(errors="replace"))
        ptx = read("PTX").rstrip(b"\0").decode()
        return Module(arch, read("CUBIN"), parse_resources(log, ptx), log)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers[^\n]*")
_SHARED = re.compile(r"(\d+) bytes smem")
_RECORD = re.compile(r"\.entry\s+(\w+)\s*\(\s*\.param\s+\.align\s+\d+\s+\.b8\s+\w+\[(\d+)\]\s*\)")


def parse_resources(log: str, ptx: str) -> dict[str, Resources]:
    """Resources by kernel from what `ptxas -v` prints, and from the one record that each entry of the PTX takes."""
    records = {name: int(size) for name, size in _RECORD.findall(ptx)}
    marks = [*_ENTRY.finditer(log)]
    found = {}
    for mark, end in zip(marks, [*(mark.start() for mark in marks[1:]), len(log)], strict=True):
        text = log[mark.end() : end]
        frame, used = _FRAME.search(text), _USED.search(text)
        if frame is None or used is None:
            raise BuildError(f"no resources of {mark[1]} in the compiler's log: {text[:500]}")
        if mark[1] not in records:
            raise BuildError(f"{mark[1]} does not take one struct by value")
        shared = _SHARED.search(used[0])
        stack, stores, loads = (int(number) for number in frame.groups())
        taken = int(shared[1]) if shared else 0
        found[mark[1]] = Resources(int(used[1]), stack, stores, loads, taken, records[mark[1]])
    return found
