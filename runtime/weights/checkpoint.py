"""A checkpoint's folder: its config and its tensors in safetensors files, read by memory map and never by pickle."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec
from safetensors import SafetensorError, safe_open
from torch import Tensor

from millrace.kernels.quantized import AnyWeight
from millrace.runtime.errors import CheckpointError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_AUTOGPTQ = "gptq_model"  # what early releases of AutoGPTQ call the file, with bits and group size behind it
_READABLE = ("F32", "BF16", "F16")


class StoredTensor(msgspec.Struct, frozen=True):
    """Where a tensor lies, and its shape and safetensors type, from the file's header."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class CheckpointFiles(Protocol):
    """The stored tensors of a model, in safetensors or GGUF files."""

    @property
    def tensors(self) -> Mapping[str, StoredTensor]: ...

    def read(self, name: str) -> Tensor:
        """The tensor in a float type, valid until `release`."""

    def matrix(self, name: str) -> AnyWeight:
        """The same for a matrix, which may come as integers."""

    def read_any(self, name: str) -> Tensor:
        """The tensor as stored: parts of quantised matrices."""

    def release(self) -> None:
        """Unmaps the files."""


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, with eos_token_id and bos_token_id of generation_config.json where that names them.

    Chat models often end a turn with an id that only generation_config.json lists.
    """
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise CheckpointError(f"{folder} holds an adapter, not a model: give the folder of its base model")
        raise CheckpointError(f"{folder} has no config.json: give the folder of a checkpoint in Hugging Face layout")
    config = read_json(folder / "config.json")
    if (folder / "generation_config.json").is_file():
        generation = read_json(folder / "generation_config.json")
        ids = {key: generation[key] for key in ("eos_token_id", "bos_token_id") if generation.get(key) is not None}
        config.update(ids)
    return config


class Checkpoint:
    """The tensors of a folder by name; opening it reads headers only.

    Raises CheckpointError for a folder without safetensors files, or with damaged ones.
    """

    def __init__(self, folder: Path) -> None:
        self.tensors: dict[str, StoredTensor] = {}
        self._open: dict[Path, Any] = {}
        for file in _weight_files(folder):
            self._read_header(file)

    def read(self, name: str) -> Tensor:
        """The floats as stored, in the memory map: valid until `release`."""
        stored = self.tensors[name]
        if stored.dtype not in _READABLE:
            raise CheckpointError(
                f"{stored.file}: {name} is stored as {stored.dtype}, but supported are {', '.join(_READABLE)}"
            )
        return self.read_any(name)

    def read_any(self, name: str) -> Tensor:
        """The same for a tensor of any type: parts of quantised matrices."""
        stored = self.tensors[name]
        if stored.file not in self._open:
            self._open[stored.file] = safe_open(stored.file, framework="pt")
        tensor: Tensor = self._open[stored.file].get_tensor(name)
        return tensor

    def matrix(self, name: str) -> Tensor:
        return self.read(name)

    def release(self) -> None:
        """Unmaps the files, so that pages that were copied out do not stay resident beside the copies."""
        self._open.clear()

    def _read_header(self, file: Path) -> None:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing, though {_INDEX} names it: fetch the checkpoint again")
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    part = opened.get_slice(name)
                    self.tensors[name] = StoredTensor(file, tuple(part.get_shape()), part.get_dtype())
        except SafetensorError as error:
            size = file.stat().st_size
            raise CheckpointError(f"{file} ({size} bytes) is not a whole safetensors file: {error}") from None


def _weight_files(folder: Path) -> Iterable[Path]:
    if (folder / _SINGLE).is_file():  # before an index, which may be left from what the file was made of
        return [folder / _SINGLE]
    if (folder / _INDEX).is_file():
        weight_map = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{folder / _INDEX} has no weight_map: fetch the checkpoint again")
        names = sorted({str(name) for name in weight_map.values()})
        if any(Path(name).name != name for name in names):
            raise CheckpointError(f"{folder / _INDEX} names files outside its folder: {', '.join(names)}")
        return [folder / name for name in names]
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(found) == 1 and found[0].startswith(_AUTOGPTQ):
        return [folder / found[0]]
    if found:
        raise CheckpointError(
            f"{folder} has neither {_SINGLE} nor {_INDEX}, only {', '.join(found)}: name a single file {_SINGLE}, "
            f"or add the index"
        )
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled:
        raise CheckpointError(
            f"{folder} holds its weights only as pickle ({', '.join(pickled)}), which can run code when it is read. "
            'Convert it where you trust it: python -c "from transformers import AutoModelForCausalLM as M; '
            "M.from_pretrained('<folder>').save_pretrained('<folder>')\""
        )
    raise CheckpointError(
        f"{folder} has no {_SINGLE}: the download is incomplete, or the checkpoint holds its weights in another format"
    )


def read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds {type(values).__name__}, but it must hold an object")
    return values
