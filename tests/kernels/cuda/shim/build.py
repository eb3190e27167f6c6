"""Turns a .cu into C++ that g++ compiles against emu.h, builds it once per content, and loads it.

Three things differ between the text that NVRTC gets and the one that g++ gets: `extern __shared__` arrays become
pointers, `__shared__` variables become references into poisoned memory, and a launcher stands before each kernel. All
else is the same text, line for line.
"""

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from millrace.kernels.cuda_compile import Kernel, read_source, resolve

HERE = Path(__file__).parent
HEADERS = ("emu.h", "emu_warp.h", "emu_memory.h", "emu_fibers.h")
# -fno-gnu-unique and -Bsymbolic: every library has its own fibers and shared memory, though all use the same names.
FLAGS = (
    "-std=c++17", "-O1", "-w", "-fPIC", "-fno-strict-aliasing", "-fno-threadsafe-statics", "-fno-exceptions",
    "-fno-rtti", "-fno-gnu-unique", "-fno-stack-protector", "-fstack-clash-protection", "-U_FORTIFY_SOURCE",
)  # fmt: skip
LINK_FLAGS = ("-shared", "-Wl,-Bsymbolic")
_LIMIT_S = 120.0  # of one compiler run

_ALIGN = r"(?:(?:__align__|alignas)\s*\([^()]*\)\s*)*"
_DYNAMIC = re.compile(rf"\bextern\s+__shared__\s+{_ALIGN}([^;\[\]]+?)\s*\b(\w+)\s*\[\s*\]\s*;")
_STATIC = re.compile(rf"{_ALIGN}\b(?:static\s+)?__shared__\s+{_ALIGN}([^;]+?)\s*\b(\w+)\s*((?:\[[^\]]*\]\s*)*);")
_BOUNDS = r"(?:__launch_bounds__\s*\((?:[^()]|\([^()]*\))*\)\s*)?"
_KERNEL = re.compile(
    rf'\bextern\s+"C"\s+__global__\s+{_BOUNDS}void\s+{_BOUNDS}(\w+)\s*\(\s*'
    r"(?:const\s+)?(?:__grid_constant__\s+)?(?:const\s+)?(\w+)\s+(?:const\s+)?\w+\s*\)\s*\{"
)
_ANY_KERNEL = re.compile(r"\b__global__\b")
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)


class ShimBuildError(RuntimeError):
    """The source is not in the subset that the shim knows, or g++ refused it."""


def compiler() -> str | None:
    """g++, on Linux: the flags and the context switch are its and ELF's."""
    return shutil.which("g++") if sys.platform == "linux" else None


def rewrite(source: str, text: str) -> str:
    """C++ for the shim from the resolved text of a .cu, with the same number of lines."""
    text = _COMMENT.sub(lambda match: "\n" * match[0].count("\n"), text)
    num_kernels = len(_ANY_KERNEL.findall(text))
    text = _DYNAMIC.sub(r"auto* \2 = reinterpret_cast<\1*>(emu::dynamic_region.data);", text)

    def static(match: re.Match[str]) -> str:
        kind, name, sizes = match[1].strip(), match[2], match[3]
        if "," in re.sub(r"<[^<>]*>", "", kind):
            raise ShimBuildError(f"{source}: one variable per __shared__ declaration: {match[0]!r}")
        return (
            f"typedef {kind} mr_emu_type_{name}{sizes};"
            f' static emu::SharedVariable<mr_emu_type_{name}> mr_emu_{name}("{name}");'
            f" mr_emu_type_{name}& {name} = mr_emu_{name}.value();"
        )

    text = _STATIC.sub(static, text)
    text, found = _KERNEL.subn(lambda match: f"MR_EMU_KERNEL({match[1]}, {match[2]}) {match[0]}", text)
    if found != num_kernels:
        raise ShimBuildError(
            f'{source}: {found} of {num_kernels} kernels read `extern "C" __global__ void name(Params p) {{`'
        )
    return f'#include "emu.h"\n{text}\n'


def build(kernel: Kernel, cache_dir: Path, read: Callable[[str], str] = read_source) -> Path:
    """The shared library with the kernels of a variant's source, compiled unless it is there already."""
    gpp = compiler()
    if gpp is None:
        raise ShimBuildError("no g++ on the path, or not Linux")
    text = rewrite(kernel.source, resolve(kernel.source, read))
    flags = [*FLAGS, *LINK_FLAGS, *(f"-D{name}={value}" for name, value in kernel.defines)]
    digest = hashlib.sha256("\0".join([gpp, _headers(), *flags, text]).encode())
    library = cache_dir / f"{Path(kernel.source).stem}-{digest.hexdigest()[:20]}.so"
    if library.exists():
        return library
    # g++ takes the precompiled header only where flags and macros agree, and else the header itself.
    folders = ["-I", str(_precompiled(gpp, cache_dir)), "-I", str(HERE)]
    _compile([gpp, *flags, "-x", "c++", "-", *folders], library, str(kernel), text)
    return library


def _precompiled(gpp: str, cache_dir: Path) -> Path:
    """A folder with emu.h precompiled, which takes a quarter off every build."""
    folder = cache_dir / f"emu-{hashlib.sha256(chr(0).join([gpp, _headers(), *FLAGS]).encode()).hexdigest()[:20]}"
    header = folder / "emu.h.gch"
    if not header.exists():
        _compile([gpp, *FLAGS, "-x", "c++-header", str(HERE / "emu.h")], header, "emu.h")
    return folder


def _compile(command: list[str], target: Path, what: str, text: str = "") -> None:
    """Under its name by a rename, so that a file is never half and builders at the same time do not meet."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        built = Path(scratch) / "built"
        done = subprocess.run(
            [*command, "-o", str(built)], input=text, capture_output=True, text=True, timeout=_LIMIT_S, check=False
        )
        if done.returncode:
            raise ShimBuildError(f"{what}: g++ failed with status {done.returncode}: {done.stderr[:4000]}")
        os.replace(built, target)


@functools.cache
def _headers() -> str:
    return "\0".join((HERE / name).read_text() for name in HEADERS)


@functools.cache
def load(library: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(library))
