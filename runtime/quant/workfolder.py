"""The folder beside the output in which an unfinished checkpoint grows, so that a killed run goes on where it was."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from millrace.runtime.errors import CheckpointError, ConfigError

_MANIFEST = "manifest.json"
_DIGESTS = ("model", "text")  # of the manifest


class WorkFolder:
    """`<output>.partial`: what the run was asked for, the shards that are done, and the activations behind the last.

    Attributes:
        output: the name that the folder gets in the end.
        shards: where what it will hold is written.
        layers_done: how many layers an earlier run finished with the same settings and inputs.
    """

    def __init__(self, output: Path, manifest: Mapping[str, Any]) -> None:
        """Opens the folder of an earlier run, or makes one.

        Raises ConfigError where the output exists, or where the folder belongs to another run; CheckpointError where
        what an earlier run left is damaged.
        """
        refuse_existing(output)
        self.output = output
        self._folder = _partial(output)
        self.shards = self._folder / "output"
        path = self._folder / _MANIFEST
        if path.is_file() and not self.shards.is_dir():
            shutil.rmtree(self._folder)  # of a run that was killed after it had given the output its name
        if path.is_file():
            self._compare(self._manifest(path), manifest)
        elif self._folder.exists():
            raise ConfigError(
                f"{self._folder} is in the way: unfinished output is kept there. Remove it or name another output"
            )
        else:
            self.shards.mkdir(parents=True)
            _replace_text(path, json.dumps(manifest, indent=2))
        for left in (*self._folder.glob("*.tmp*"), *self.shards.glob("*.tmp*"), *self.shards.glob(".tmp*")):
            left.unlink()  # of a run that was killed in the middle of a file
        states = [int(state.stem.removeprefix("state-")) for state in self._folder.glob("state-*.safetensors")]
        self.layers_done = max(states, default=0)

    def _manifest(self, path: Path) -> dict[str, Any]:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                raise ValueError("it is no JSON object")
        except ValueError as error:
            raise self._unreadable(path, error) from None
        return values

    def _unreadable(self, path: Path, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{path}, of an earlier run, cannot be read ({error}): delete {self._folder}, and run again to start anew"
        )

    def _compare(self, earlier: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
        changed = [
            f"{key} differs" if key in _DIGESTS else f"{key} was {earlier.get(key)} and is {manifest.get(key)}"
            for key in sorted({*earlier, *manifest})
            if earlier.get(key) != manifest.get(key)
        ]
        if changed:
            raise ConfigError(
                f"{self._folder} holds the unfinished output of another run: {'; '.join(changed)}. Run it with the "
                "same settings to go on, or remove the folder to start anew"
            )

    def state(self) -> dict[str, Tensor]:
        """The activations behind the last layer that is done."""
        return self.read(self._state(self.layers_done))

    def read(self, path: Path) -> dict[str, Tensor]:
        """The tensors of a finished file. Raises CheckpointError where it is damaged."""
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise self._unreadable(path, error) from None

    def finish_layer(self, shard: str, tensors: dict[str, Tensor], state: dict[str, Tensor]) -> None:
        """Keeps a layer's tensors, and the activations that the next one reads."""
        self.save(shard, tensors)
        # In this order: where a state is, the layers before it are.
        _replace_tensors(self._state(self.layers_done + 1), state)
        self._state(self.layers_done).unlink(missing_ok=True)
        self.layers_done += 1

    def save(self, shard: str, tensors: dict[str, Tensor]) -> None:
        _replace_tensors(self.shards / shard, tensors)

    def publish(self, config: Mapping[str, Any], index: Mapping[str, Any]) -> None:
        """Writes what is not a tensor, and gives the finished folder its name."""
        _replace_text(self.shards / "config.json", json.dumps(config, indent=2))
        _replace_text(self.shards / "model.safetensors.index.json", json.dumps(index, indent=2))
        refuse_existing(self.output)
        for path in (*self.shards.rglob("*"), self.shards):
            _sync(path)
        os.rename(self.shards, self.output)
        _sync(self.output.parent)
        shutil.rmtree(self._folder)

    def _state(self, layers: int) -> Path:
        return self._folder / f"state-{layers:05}.safetensors"


def refuse_existing(output: Path) -> None:
    if output.exists() or output.is_symlink():
        raise ConfigError(f"{output} exists already and is not overwritten: remove it or name another output")


def check_space(output: Path, needed: int) -> None:
    """Raises CheckpointError where `needed` bytes, less what an earlier run has written, do not fit onto the disk."""
    needed -= sum(path.stat().st_size for path in _partial(output).rglob("*") if path.is_file())
    folder = next(parent for parent in output.parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"the output and what is kept while it is made take {needed / 1e9:.2f} GB, but {folder} has "
            f"{free / 1e9:.2f} GB free"
        )


def _partial(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def _replace_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    written = path.with_name(path.name + ".tmp")
    save_file(tensors, written, {"format": "pt"})
    _rename(written, path)


def _replace_text(path: Path, text: str) -> None:
    written = path.with_name(path.name + ".tmp")
    written.write_text(text + "\n", encoding="utf-8")
    _rename(written, path)


def _rename(written: Path, path: Path) -> None:
    """With its bytes on the disk first: a name that came through a power cut stands for a whole file."""
    _sync(written)
    os.replace(written, path)


def _sync(path: Path) -> None:
    """Brings a file's bytes, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
