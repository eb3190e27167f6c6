"""A model's packed weights on disk, made by `millrace build`: such a start neither rounds nor packs nor imports torch.

A build is a folder with `weights.bin` and `manifest.json`. It holds for one checkpoint, one set of options and one kind
of processor, and the manifest tells which; where one of them is another now, the model is loaded as if there were no
build. So it may be deleted at any time. Texts (tokenizer and chat template) are read from the checkpoint still.
"""

import ctypes
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
import numpy.typing as npt

from millrace.kernels.cpu_build import Toolchain
from millrace.kernels.cpu_library import default_library
from millrace.kernels.cpu_transformer import KV_KINDS, TransformerState
from millrace.kernels.memory import empty_weight
from millrace.runtime.errors import ConfigError
from millrace.runtime.models.base import ModelSpec
from millrace.runtime.models.cpu_model import CpuModel

_log = logging.getLogger(__name__)

_FORMAT = 2  # to be raised with whatever changes weights that were made before: rounding, rotations, readers
_DTYPES = ("uint8", "int64", "float32")
_ALIGNMENT = 64  # a cache line
_PART = 16 << 20  # bytes that a thread reads at a time
_PROBE = 1 << 20  # bytes at either end of a file that tell whether it is the same one

Identity = Mapping[str, str]  # what a build holds for
Array = npt.NDArray[Any]


class _Place(msgspec.Struct, frozen=True):
    """One array in weights.bin."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


class _Header(msgspec.Struct, frozen=True):
    """The part of a manifest that tells whether the rest can be read."""

    format: int
    identity: dict[str, str]
    size: int  # of weights.bin


class _Model(msgspec.Struct, frozen=True):
    """The rest of a manifest; arrays stand as their places."""

    spec: ModelSpec
    kv_dtype: str  # where nobody names one
    weights: TransformerState


def identity(path: Path, options: Mapping[str, Any]) -> Identity:
    """What a build of the checkpoint at `path` (a folder or a GGUF file) with these options depends on, by name."""
    files = sorted(path.glob("*.safetensors")) + sorted(path.glob("*.json")) if path.is_dir() else [path]
    return {
        "model files": hashlib.sha256("\n".join(f"{file.name} {_digest(file)}" for file in files).encode()).hexdigest(),
        "options": json.dumps(options, sort_keys=True),
        "kernels and processor": Toolchain().folder().name,
        "version of millrace": importlib.metadata.version("millrace"),
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


def check_output(output: Path) -> None:
    """Raises ConfigError where a build would replace something."""
    if output.exists():
        raise ConfigError(f"{output} exists: name a folder that does not, or delete it first", param="output")


def write_build(output: Path, holds_for: Identity, model: CpuModel) -> int:
    """Writes a build, all of it or nothing, and returns its size in bytes. Raises ConfigError where `output` exists."""
    check_output(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{output.name}.partial-", dir=output.parent))
    try:
        with (scratch / "weights.bin").open("wb") as file:
            described = _Model(model.spec, model.kv_dtype, model.transformer.state)
            rest = msgspec.to_builtins(described, enc_hook=lambda array: _write(file, array))
            header = _Header(_FORMAT, dict(holds_for), file.tell())
        manifest = msgspec.structs.asdict(header) | rest
        (scratch / "manifest.json").write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
        os.rename(scratch, output)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return header.size


def _write(file: BinaryIO, array: Array) -> dict[str, Any]:
    offset = -(-file.tell() // _ALIGNMENT) * _ALIGNMENT
    file.seek(offset)
    file.write(np.ascontiguousarray(array).data)
    return msgspec.structs.asdict(_Place(str(array.dtype), array.shape, offset))


class Build:
    """A build that holds, whose weights are being read in other threads until it is left as a context."""

    def __init__(self, folder: Path, size: int, library: ctypes.CDLL) -> None:
        self._folder, self._library = folder, library
        self._memory = empty_weight(size)
        self._pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="millrace-read")
        # In parts, since one thread does not copy as fast as memory takes it: half of the time is spent on fresh pages.
        self._parts: list[Future[None]] = [
            self._pool.submit(_fill, folder / "weights.bin", self._memory[start : start + _PART].data, start)
            for start in range(0, size, _PART)
        ]

    def __enter__(self) -> "Build":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def model(self, kv_dtype: str, max_model_len: int) -> CpuModel | None:
        """The model, once all is read, with keys and values of that type ("auto": what goes with its weights), and for
        that many positions; 0: for all. None, with a warning, where it cannot be read, or its manifest does not fit the
        weights. Raises ConfigError for more positions than there are."""
        try:
            for part in self._parts:
                part.result()
            content = (self._folder / "manifest.json").read_bytes()
            described = msgspec.json.decode(content, type=_Model, dec_hook=lambda _, place: self._array(place))
            spec = described.spec
            if max_model_len > spec.max_model_len:
                raise ConfigError(
                    f"max_model_len is {max_model_len}, but it must be between 1 and {spec.max_model_len}, which the "
                    "checkpoint was made for",
                    param="max_model_len",
                )
            if max_model_len:
                spec = msgspec.structs.replace(spec, max_model_len=max_model_len)
            wanted = described.kv_dtype if kv_dtype == "auto" else kv_dtype
            if wanted not in KV_KINDS:
                raise ValueError(f"kv_dtype is {wanted}")
            return CpuModel(self._library, described.weights, spec, wanted)
        except (OSError, msgspec.MsgspecError, ValueError, TypeError) as error:
            _unused(self._folder, f"it is damaged: {error}")
            return None

    def _array(self, stored: Any) -> Array:
        place = msgspec.convert(stored, _Place)
        if place.dtype not in _DTYPES:
            raise ValueError(f"there is an array of {place.dtype}")
        dtype = np.dtype(place.dtype)
        end = place.offset + dtype.itemsize * math.prod(place.shape)
        if (
            place.offset < 0
            or place.offset % dtype.itemsize
            or min(place.shape, default=0) < 0
            or end > len(self._memory)
        ):
            raise ValueError(f"an array of {list(place.shape)} does not lie at {place.offset}")
        return self._memory[place.offset : end].view(dtype).reshape(place.shape)


def _fill(file: Path, space: memoryview, offset: int) -> None:
    with file.open("rb", buffering=0) as opened:
        opened.seek(offset)
        while space:
            count = opened.readinto(space)
            if not count:
                raise OSError(f"{file} ends too soon")
            space = space[count:]


def open_build(folder: Path, holds_for: Identity) -> Build | None:
    """The build in `folder`; None, with a warning that says what differs, where it does not hold here and now."""
    library = default_library()
    reason = ""
    try:
        header = msgspec.json.decode((folder / "manifest.json").read_bytes(), type=_Header)
        size = (folder / "weights.bin").stat().st_size
    except FileNotFoundError as error:
        reason = f"there is no {error.filename}"
    except (OSError, msgspec.MsgspecError) as error:
        reason = f"it cannot be read: {error}"
    else:
        differing = [key for key, value in holds_for.items() if header.identity.get(key) != value]
        if header.format != _FORMAT:
            reason = f"its format is {header.format}, and {_FORMAT} is read"
        elif library is None:
            reason = "the C++ kernels, which it is for, are not here"
        elif differing:
            reason = f"it was made for other {' and '.join(differing)}"
        elif size != header.size:
            reason = f"weights.bin has {size} bytes instead of {header.size}"
        else:
            return Build(folder, size, library)
    _unused(folder, reason)
    return None


def _unused(folder: Path, reason: str) -> None:
    _log.warning("the build in %s is not used, so that weights are packed at this start: %s", folder, reason)
