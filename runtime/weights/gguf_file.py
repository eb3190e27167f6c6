"""The container of GGUF: a header of typed keys and of tensors' names, shapes and places, then the tensors' bytes.

Format: `docs/gguf.md` of ggml, versions 2 and 3, little-endian. The reader of the `gguf` package makes array objects
for every string, 10 seconds for a vocabulary of 150,000, and can be made to read for ever by a wrong length.
"""

import math
import mmap
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from millrace.runtime.errors import CheckpointError

# How many weights stand together, and in how many bytes.
LAYOUTS: Mapping[str, tuple[int, int]] = MappingProxyType({
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22),
    "Q5_1": (32, 24), "Q8_0": (32, 34), "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176),
    "Q6_K": (256, 210), "IQ4_NL": (32, 18), "IQ4_XS": (256, 136),
})  # fmt: skip
_TYPE_NAMES: Mapping[int, str] = MappingProxyType({
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
})  # fmt: skip
_STRING, _ARRAY = 8, 9
_SCALARS: Mapping[int, str] = MappingProxyType(
    {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
)
_MAX_DIMS = 4  # of ggml
_SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


class GgufTensor(msgspec.Struct, frozen=True):
    """Where a tensor lies: `shape` is in torch's order (the last dimension is contiguous), `start` in bytes."""

    file: Path
    kind: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class Gguf(msgspec.Struct, frozen=True):
    """The header of a file, or of all files of a split one.

    Attributes:
        path: the first file.
        metadata: strings, numbers, booleans, lists of strings and numpy arrays of numbers.
        tensors: by name.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


class GgufMaps:
    """The bytes of tensors, in memory maps that are opened when they are first needed."""

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}

    def rows(self, tensor: GgufTensor) -> npt.NDArray[np.uint8]:
        """[rows, bytes of a row] uint8 in the map, private to this process; one row for a vector."""
        if tensor.file not in self._maps:
            self._maps[tensor.file] = _map(tensor.file, mmap.ACCESS_COPY)
        count = math.prod(tensor.shape[:-1])
        data = np.frombuffer(self._maps[tensor.file], dtype=np.uint8, count=tensor.nbytes, offset=tensor.start)
        return data.reshape(count, -1)

    def release(self) -> None:
        """Unmaps what no array refers to any more."""
        self._maps.clear()


def is_gguf(path: Path) -> bool:
    return path.suffix == ".gguf" and path.is_file()


def split_parts(path: Path) -> list[Path]:
    """The files of the split model that `path` is one of, by their names; `path` itself where it is whole."""
    split = _SPLIT_NAME.fullmatch(path.name)
    count = 1 if split is None else int(split["count"])
    if split is None or count < 2:
        return [path]
    return [path.with_name(f"{split['stem']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]


def read_gguf(path: Path) -> Gguf:
    """Reads the header of `path`, and of the other files where it is one of a split model.

    Raises CheckpointError for a damaged or incomplete file, for another version or byte order, and for tensors of a
    type that is not supported.
    """
    paths = split_parts(path)
    count = len(paths)
    if count == 1:
        whole = _read_file(path)
        if (count := _count(whole, "split.count", 1)) > 1:
            raise CheckpointError(
                f"{path} is one of {count} files of a split model: give it its name back, which ends in "
                f"-00001-of-{count:05}.gguf, and put the other files beside it",
                param="model",
            )
        return whole
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        raise CheckpointError(
            f"{path} is one of {count} files; not beside it: {', '.join(missing[:8])}. Fetch the whole model",
            param="model",
        )
    parts = [_read_file(part) for part in paths]
    tensors: dict[str, GgufTensor] = {}
    for number, part in enumerate(parts):
        said = (_count(part, "split.no", 0), _count(part, "split.count", 1))
        if said != (number, count):
            raise CheckpointError(
                f"{part.path} says that it is part {said[0]} of {said[1]}, but by its name it is part {number} of "
                f"{count}, counted from 0"
            )
        if both := tensors.keys() & part.tensors.keys():
            raise CheckpointError(f"{part.path} holds {min(both)}, which a file before it holds too")
        tensors |= part.tensors
    expected = _count(parts[0], "split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise CheckpointError(f"{path.parent}: the files hold {len(tensors)} tensors, but {expected} were split")
    return Gguf(paths[0], parts[0].metadata, tensors)


def _count(part: Gguf, key: str, default: int) -> int:
    value = part.metadata.get(key, default)
    if not isinstance(value, int):
        raise CheckpointError(f"{part.path}: {key} is {value!r}, but it must be an integer")
    return value


def _map(path: Path, access: int) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=access)


def _read_file(path: Path) -> Gguf:
    size = path.stat().st_size
    if size < 24:
        raise CheckpointError(f"{path} ({size} bytes) is not a GGUF file: it is too short")
    with _map(path, mmap.ACCESS_READ) as data:
        return _Header(path, data).read()


class _Header:
    """Reads a header from its beginning; every length is checked against what is left of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._size = len(data)
        self._at = 0

    def read(self) -> Gguf:
        if self._data[:4] != b"GGUF":
            raise CheckpointError(f"{self._path} is not a GGUF file: it begins with {self._data[:4]!r}")
        self._at = 4
        version = self._number("<I")
        if version not in (2, 3):
            swapped = int.from_bytes(struct.pack("<I", version), "big")
            what = "big-endian" if swapped in (1, 2, 3) else f"GGUF version {version}"
            raise CheckpointError(f"{self._path} is {what}, but supported are versions 2 and 3, little-endian")
        num_tensors, num_keys = self._number("<Q"), self._number("<Q")
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._string("a key")
            if key in metadata:
                raise CheckpointError(f"{self._path}: the key {key} stands twice in the header")
            metadata[key] = self._value(key)
        found: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(num_tensors):
            name = self._string("a tensor's name")
            if name in found:
                raise CheckpointError(f"{self._path}: the tensor {name} stands twice in the header")
            found[name] = self._tensor(name)
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment % 8:
            raise CheckpointError(f"{self._path}: general.alignment is {alignment!r}, but it must be a multiple of 8")
        start = -(-self._at // alignment) * alignment
        return Gguf(
            self._path,
            metadata,
            {name: self._place(name, *place, start, alignment) for name, place in found.items()},
        )

    def _place(
        self, name: str, shape: tuple[int, ...], kind_id: int, offset: int, start: int, alignment: int
    ) -> GgufTensor:
        kind = _TYPE_NAMES.get(kind_id, f"number {kind_id}")
        if kind not in LAYOUTS:
            raise CheckpointError(
                f"{self._path}: the tensor {name} is of type {kind}, but supported are {', '.join(LAYOUTS)}"
            )
        weights, nbytes = LAYOUTS[kind]
        if shape[-1] % weights:
            raise CheckpointError(
                f"{self._path}: the tensor {name} has rows of {shape[-1]}, but {kind} has blocks of {weights}"
            )
        total = math.prod(shape) // weights * nbytes
        if offset % alignment or start + offset + total > self._size:
            raise CheckpointError(
                f"{self._path} ({self._size} bytes): the tensor {name} should lie at {start + offset}, {total} bytes "
                f"long, aligned to {alignment}; the file is cut short or damaged: fetch it again"
            )
        return GgufTensor(self._path, kind, shape, start + offset, total)

    def _tensor(self, name: str) -> tuple[tuple[int, ...], int, int]:
        """(shape in torch's order, type, offset)"""
        num_dims = self._number("<I")
        if not 1 <= num_dims <= _MAX_DIMS:
            raise CheckpointError(
                f"{self._path}: the tensor {name} has {num_dims} dimensions, but it must have 1 to {_MAX_DIMS}"
            )
        shape = tuple(self._number("<Q") for _ in range(num_dims))
        if 0 in shape:
            raise CheckpointError(f"{self._path}: the tensor {name} is empty: its dimensions are {list(shape)}")
        return shape[::-1], self._number("<I"), self._number("<Q")

    def _value(self, key: str) -> Any:
        kind = self._number("<I")
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._string(key)
        if kind != _ARRAY:
            raise CheckpointError(f"{self._path}: {key} is of type {kind}, which GGUF does not have")
        kind, count = self._number("<I"), self._number("<Q")
        if kind == _STRING:
            return self._strings(key, count)
        if kind not in _SCALARS:
            raise CheckpointError(f"{self._path}: {key} is an array of type {kind}, which is not supported")
        dtype = np.dtype(_SCALARS[kind])
        start = self._take(count * dtype.itemsize)
        return np.frombuffer(self._data[start : self._at], dtype)

    def _take(self, count: int) -> int:
        """Steps over `count` bytes and returns where they start."""
        start = self._at
        if count > self._size - start:
            raise CheckpointError(
                f"{self._path} ({self._size} bytes) is not a whole GGUF file: its header asks for {count} bytes at "
                f"{start}; fetch it again"
            )
        self._at = start + count
        return start

    def _number(self, form: str) -> Any:
        return struct.unpack_from(form, self._data, self._take(struct.calcsize(form)))[0]

    def _string(self, what: str) -> str:
        start = self._take(self._number("<Q"))
        return self._decoded(self._data[start : self._at], what)

    def _strings(self, key: str, count: int) -> list[str]:
        # The vocabulary and its merges: up to half a million strings, so without a call for each.
        data, at, size = self._data, self._at, self._size
        unpack: Callable[[mmap.mmap, int], tuple[int]] = struct.Struct("<Q").unpack_from
        strings = []
        try:
            for _ in range(count):
                (length,) = unpack(data, at)
                at += 8 + length
                if at > size:
                    break
                strings.append(data[at - length : at].decode())
        except (struct.error, UnicodeDecodeError) as error:
            raise CheckpointError(f"{self._path}: {key} is damaged in string {len(strings)}: {error}") from None
        self._take(at - self._at)
        return strings

    def _decoded(self, data: bytes, what: str) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self._path}: {what} is not UTF-8: {error}") from None
