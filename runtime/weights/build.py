"""Packed matrices of a model on disk, so that a start neither rounds nor packs: made by `millrace build`.

A build is a folder with `weights.bin` and `manifest.json`. It holds for one checkpoint, one set of options and one kind
of processor, and the manifest tells which; where one of them is another now, the model is loaded as if there were no
build. So it may be deleted at any time. Norms, tables that are only looked up in, and texts are read from the
checkpoint still.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import msgspec
import torch
from torch import Tensor

from millrace.kernels.arguments import PackedLinear, PackedState
from millrace.kernels.cpu_build import Toolchain
from millrace.kernels.dispatch import default_backends
from millrace.kernels.memory import empty_weight
from millrace.runtime.errors import CheckpointError, ConfigError

_log = logging.getLogger(__name__)

_FORMAT = 1
_ALIGNMENT = 4096
_PART = 16 << 20  # bytes that a thread reads at a time
_PROBE = 1 << 20  # bytes at either end of a file that tell whether it is the same one

Identity = Mapping[str, str]  # what a build holds for


class Build(Protocol):
    def packed(self, name: str, make: Callable[[], PackedLinear]) -> PackedLinear:
        """The packed matrix of that name."""


class _Stored(msgspec.Struct, frozen=True):
    """One tensor in weights.bin."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


class _Matrix(msgspec.Struct, frozen=True):
    kind: str
    numbers: dict[str, int]
    tensors: dict[str, _Stored]


class _Manifest(msgspec.Struct, frozen=True):
    format: int
    identity: dict[str, str]
    size: int  # of weights.bin
    matrices: dict[str, _Matrix]


def identity(path: Path, options: Mapping[str, Any]) -> Identity:
    """What a build of the checkpoint at `path` (a folder or a GGUF file) with these options depends on, by name."""
    files = sorted(path.glob("*.safetensors")) + sorted(path.glob("*.json")) if path.is_dir() else [path]
    return {
        "model files": hashlib.sha256("\n".join(f"{file.name} {_digest(file)}" for file in files).encode()).hexdigest(),
        "options": json.dumps(options, sort_keys=True),
        "kernels and processor": Toolchain().folder().name,
    }


def _digest(file: Path) -> str:
    """Of its size and both ends: a whole hash of gigabytes would take longer than the start that it is for."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as opened:
        digest.update(opened.read(_PROBE))
        opened.seek(max(0, size - _PROBE))
        digest.update(opened.read(_PROBE))
    return digest.hexdigest()


class BuildWriter:
    """Takes down every matrix that is packed; `finish` makes a build of them.

    Raises ConfigError where the output exists, or the C++ kernels, whose layout is kept, are not there.
    """

    def __init__(self, output: Path, holds_for: Identity) -> None:
        if output.exists():
            raise ConfigError(f"{output} exists: name a folder that does not, or delete it first", param="output")
        if default_backends()[0].name != "cpu":
            raise ConfigError("a build keeps matrices as the C++ kernels want them, which are not here: install g++")
        self._output, self._identity = output, dict(holds_for)
        self._scratch = output.with_name(output.name + ".partial")
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch.mkdir(parents=True)
        self._matrices: dict[str, _Matrix] = {}
        self._file: BinaryIO = (self._scratch / "weights.bin").open("wb")

    def packed(self, name: str, make: Callable[[], PackedLinear]) -> PackedLinear:
        linear = make()
        state = linear.state()
        if state is not None:  # what torch serves is packed at each start
            stored = {key: self._write(tensor) for key, tensor in state.tensors.items()}
            self._matrices[name] = _Matrix(state.kind, state.numbers, stored)
        return linear

    def finish(self) -> int:
        """Returns the build's size in bytes."""
        with self._file as file:
            size = file.tell()
        manifest = _Manifest(_FORMAT, self._identity, size, self._matrices)
        (self._scratch / "manifest.json").write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
        os.rename(self._scratch, self._output)
        return size

    def abandon(self) -> None:
        """Removes what was written."""
        self._file.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _write(self, tensor: Tensor) -> _Stored:
        offset = -(-self._file.tell() // _ALIGNMENT) * _ALIGNMENT
        self._file.seek(offset)
        self._file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        return _Stored(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), offset)


class ReadyWeights:
    """The matrices of a build: implements Build."""

    def __init__(self, file: Path, matrices: Mapping[str, _Matrix]) -> None:
        self._file, self._matrices = file, matrices

    def packed(self, name: str, make: Callable[[], PackedLinear]) -> PackedLinear:
        stored = self._matrices.get(name)
        if stored is None:
            return make()
        tensors = {key: _read(self._file, tensor) for key, tensor in stored.tensors.items()}
        linear = default_backends()[0].restore(PackedState(stored.kind, stored.numbers, tensors))
        if isinstance(linear, PackedLinear):
            return linear
        _log.warning("%s in the build %s is not used: %s", name, self._file.parent, linear.reason)
        return make()


def _read(file: Path, stored: _Stored) -> Tensor:
    tensor = empty_weight(stored.shape, getattr(torch, stored.dtype))
    space = tensor.flatten().view(torch.uint8).numpy().data
    # In parts, since one thread does not copy as fast as memory takes it: half of the time is spent on fresh pages.
    parts = range(0, len(space), _PART)
    with ThreadPoolExecutor(min(len(parts) or 1, torch.get_num_threads())) as pool:
        for _ in pool.map(lambda at: _fill(file, space[at : at + _PART], stored.offset + at), parts):
            pass
    return tensor


def _fill(file: Path, space: memoryview, offset: int) -> None:
    with file.open("rb", buffering=0) as opened:
        opened.seek(offset)
        while space:
            count = opened.readinto(space)
            if not count:
                raise CheckpointError(f"{file} ends in the middle of a matrix: delete the build, and make it again")
            space = space[count:]


def open_build(folder: Path, holds_for: Identity) -> ReadyWeights | None:
    """The build in `folder`; None, with a warning that says what differs, where it does not hold here and now."""
    reason = ""
    try:
        manifest = msgspec.json.decode((folder / "manifest.json").read_bytes(), type=_Manifest)
        size = (folder / "weights.bin").stat().st_size
    except FileNotFoundError as error:
        reason = f"there is no {error.filename}"
    except (OSError, msgspec.MsgspecError) as error:
        reason = f"it cannot be read: {error}"
    else:
        differing = [key for key, value in holds_for.items() if manifest.identity.get(key) != value]
        if manifest.format != _FORMAT:
            reason = f"its format is {manifest.format}, and {_FORMAT} is read"
        elif default_backends()[0].name != "cpu":
            reason = "the C++ kernels, which it is for, are not here"
        elif differing:
            reason = f"it was made for other {' and '.join(differing)}"
        elif size != manifest.size:
            reason = f"weights.bin has {size} bytes instead of {manifest.size}"
        else:
            return ReadyWeights(folder / "weights.bin", manifest.matrices)
    _log.warning("the build in %s is not used, so that weights are packed at this start: %s", folder, reason)
    return None
