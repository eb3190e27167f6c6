"""Builds kernels/cpu/*.cpp into a shared library, once per machine, and finds it again.

The library lies in `$XDG_CACHE_HOME/millrace/kernels/<key>/` (default `~/.cache`), where the key hashes the sources,
the flags, the CPU's features and torch's version; the file is named after the compiler. Loading needs no compiler.
The link is against the OpenMP runtime that torch brings: two thread pools on the same cores would fight.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

SOURCE_DIR = Path(__file__).parent / "cpu"
# Finite-math flags stay off: a NaN must come out as a NaN, so that the request at fault can be named.
FLAGS = (
    "-std=gnu++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
    "-fopenmp", "-fPIC", "-fvisibility=hidden",
)  # fmt: skip
_LIMIT_S = 120.0  # of one compiler run


class BuildError(RuntimeError):
    """The library could not be built; the message ends with what the compiler said."""


def find_compiler() -> Path | None:
    """The C++ compiler that $CXX names, else the first of c++, g++ and clang++ on the path."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    found = next((path for name in names if (path := shutil.which(name))), None)
    return Path(found) if found else None


def default_cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "millrace" / "kernels"


def torch_version() -> str:
    """Of the torch that is installed, without an import, which would take seconds; empty if there is none."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return ""


def openmp_runtime() -> Path | None:
    """The OpenMP runtime that torch brings, without an import; None where it brings none."""
    found = importlib.util.find_spec("torch")
    folder = Path(found.origin).parent / "lib" if found is not None and found.origin is not None else None
    return None if folder is None else min(folder.glob("libgomp*.so*"), default=None)


def cpu_features() -> str:
    """What `-march=native` depends on: the feature flags that the kernel reports, else the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    wanted = ("flags", "Features", "model name", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)})) or platform.processor()


@dataclass(frozen=True)
class Toolchain:
    """All that a build depends on.

    Attributes:
        compiler: None where there is none: a cached library can still be found.
        cache_dir: where libraries lie.
        flags: for each source.
    """

    compiler: Path | None = field(default_factory=find_compiler)
    cache_dir: Path = field(default_factory=default_cache_dir)
    flags: Sequence[str] = FLAGS

    def folder(self) -> Path:
        digest = hashlib.sha256()
        for part in ("\0".join(self.flags), platform.machine(), cpu_features(), torch_version()):
            digest.update(part.encode() + b"\0")
        for source in sorted(SOURCE_DIR.glob("*.[ch]*")):
            digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
        return self.cache_dir / digest.hexdigest()[:24]

    def library_name(self) -> str:
        """Named after the compiler's resolved path, size and date: asking for its version would start a process."""
        if self.compiler is None:
            raise BuildError("no C++ compiler: install g++ or clang++, or set CXX")
        resolved = self.compiler.resolve()
        stat = resolved.stat()
        identity = f"{resolved}\0{stat.st_size}\0{stat.st_mtime_ns}"
        return f"millrace_cpu_{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"


def find_library(toolchain: Toolchain) -> Path | None:
    """The cached library for these sources and this CPU: this compiler's, or with no compiler the newest of any."""
    folder = toolchain.folder()
    if toolchain.compiler is not None:
        path = folder / toolchain.library_name()
        return path if path.exists() else None
    return max(folder.glob("millrace_cpu_*.so"), key=lambda path: path.stat().st_mtime_ns, default=None)


def build_library(toolchain: Toolchain) -> Path:
    """Compiles and links into the cache, and returns the library; one that is there already is returned as it is.

    Builders at the same time each work in a folder of their own, and the last rename wins: all files are equal.

    Raises:
        BuildError: no compiler, or it failed.
    """
    name = toolchain.library_name()
    found = find_library(toolchain)
    if found is not None:
        return found
    folder = toolchain.folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = _compile(toolchain, Path(scratch))
            os.replace(built, folder / name)
    except OSError as error:
        raise BuildError(f"cannot write the kernel cache {folder}: {error}; set XDG_CACHE_HOME") from error
    return folder / name


def _compile(toolchain: Toolchain, scratch: Path) -> Path:
    sources = sorted(SOURCE_DIR.glob("*.cpp"))
    objects = [scratch / f"{source.stem}.o" for source in sources]
    compiler = str(toolchain.compiler)
    with ThreadPoolExecutor(max_workers=min(len(sources), os.cpu_count() or 1)) as pool:
        commands = [
            [compiler, *toolchain.flags, "-c", str(source), "-o", str(target)]
            for source, target in zip(sources, objects, strict=True)
        ]
        for _ in pool.map(_run, commands):
            pass
    library = scratch / "library.so"
    # Named as a file, torch's runtime replaces the -lgomp that -fopenmp would add.
    _run([compiler, "-shared", *map(str, objects), "-o", str(library), str(openmp_runtime() or "-fopenmp")])
    return library


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]}: {error}") from error
    if done.returncode:
        raise BuildError(f"{' '.join(command)} failed with status {done.returncode}: {done.stderr.strip()[-2000:]}")
