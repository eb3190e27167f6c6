"""The checkpoint that is quantised: what it declares, its tensors by declared name, and its other files."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from millrace.runtime.errors import CheckpointError
from millrace.runtime.models.registry import declare
from millrace.runtime.models.rotary import RotaryDecl, RotaryLayerDecl
from millrace.runtime.weights.checkpoint import Checkpoint, read_config

_COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates",
    "LICENSE*",
    "NOTICE*",
)


class Source:
    """A checkpoint of the Llama family in float32, bfloat16 or float16.

    Attributes:
        decl: its architecture.
        layers: the declared layers.
        stored_bytes: of all its tensors.
    """

    def __init__(self, folder: Path) -> None:
        """Checks names and shapes; reads no weight. Raises CheckpointError."""
        self.folder = folder
        config = read_config(folder)
        if config.get("quantization_config") is not None:
            raise CheckpointError(
                f"{folder} is quantised already (config.json has quantization_config): give the float32, bfloat16 or "
                "float16 checkpoint of the same model",
                param="quantization_config",
            )
        decl = declare(config)
        if not isinstance(decl, RotaryDecl):
            raise CheckpointError(
                f"{decl.spec.architecture} cannot be written quantised: it stores its matrices [in, out] (Conv1D), and "
                "these formats hold linear layers, [out, in]. `--quantize int8` rounds it as it is loaded",
                param="architectures",
            )
        self.decl: RotaryDecl = decl
        self.layers = tuple(layer for layer in decl.layers if isinstance(layer, RotaryLayerDecl))
        self._checkpoint = Checkpoint(folder)
        self._names = self._match()
        self.stored_bytes = sum(_bytes(stored.shape, stored.dtype) for stored in self._checkpoint.tensors.values())

    def read(self, name: str) -> Tensor:
        """A tensor by its declared name, as stored, in the memory map: valid until `release`."""
        return self._checkpoint.read(self._names[name])

    def release(self) -> None:
        self._checkpoint.release()

    def digest(self) -> str:
        """SHA-256 of all that the output depends on: config, tokenizer and weights."""
        files = sorted({stored.file for stored in self._checkpoint.tensors.values()})
        files += [path for path in self._others() if path.is_file()]
        whole = hashlib.sha256()
        for path in [self.folder / "config.json", *files]:
            with path.open("rb") as opened:
                whole.update(path.name.encode() + hashlib.file_digest(opened, "sha256").digest())
        return whole.hexdigest()

    def copy_others(self, folder: Path) -> None:
        """Copies tokenizer, chat template, generation config and licence."""
        for path in self._others():
            if path.is_dir():
                shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
            else:
                shutil.copyfile(path, folder / path.name)

    def written_config(self) -> dict[str, Any]:
        """config.json itself, without what generation_config.json adds."""
        values: dict[str, Any] = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        return values

    def _others(self) -> list[Path]:
        return sorted({path for pattern in _COPIED for path in self.folder.glob(pattern)})

    def _match(self) -> dict[str, str]:
        """Declared name -> stored name. Checkpoints of the bare base model leave the prefix out."""
        stored, prefix = self._checkpoint.tensors, self.decl.base_prefix
        bare = not any(name.startswith(prefix) for name in stored)
        names, faults = {}, []
        for tensor in self.decl.tensors():
            name = tensor.name.removeprefix(prefix) if bare else tensor.name
            names[tensor.name] = name
            if name not in stored:
                faults.append(f"{name} is missing")
            elif stored[name].shape != tensor.shape:
                faults.append(f"{name} is {list(stored[name].shape)}, expected {list(tensor.shape)}")
        known = {*names.values(), *(("lm_head.weight",) if self.decl.lm_head is None else ())}
        for name in stored:
            plain = name if bare else name.removeprefix(prefix)
            if name not in known and not any(pattern.fullmatch(plain) for pattern in self.decl.harmless):
                faults.append(f"{name} is unexpected")
        embedding = names[f"{self.decl.embedding.name}.weight"]
        if self.decl.lm_head is None and stored.keys() >= {"lm_head.weight", embedding}:
            # Some checkpoints store a tied output matrix a second time.
            if not torch.equal(self._checkpoint.read("lm_head.weight"), self._checkpoint.read(embedding)):
                faults.append(f"tie_word_embeddings is true, but lm_head.weight differs from {embedding}")
            self.release()
        if faults:
            raise CheckpointError(
                f"the weights in {self.folder} do not fit {self.decl.spec.architecture} as config.json describes it: "
                + "; ".join(faults[:12])
                + (f" and {len(faults) - 12} more" if len(faults) > 12 else "")
            )
        return names


def _bytes(shape: tuple[int, ...], dtype: str) -> int:
    count = {"F32": 4, "F64": 8, "BF16": 2, "F16": 2, "I64": 8, "I32": 4}.get(dtype, 1)
    for size in shape:
        count *= size
    return count
