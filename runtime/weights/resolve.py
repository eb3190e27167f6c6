"""Where a model's files are: the embedded model, a folder, a GGUF file, or a repository of the Hugging Face hub."""

import importlib.resources
import re
from collections.abc import Sequence
from pathlib import Path

import msgspec

from millrace.runtime.errors import CheckpointError
from millrace.runtime.weights.gguf_file import is_gguf, split_parts

EMBEDDED = "grist"
_EMBEDDED_PACKAGE = "millrace.runtime.assets.grist"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_FILE = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)[:/](?P<file>(?:[\w.-]+/)*[\w.-]+\.gguf)")
_LISTED = 12  # names in one error message
# Anchored at the top of the repository: some hold the same weights again in other formats and folders.
_FETCHED = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    *("gptq_model*.safetensors", "quantize_config.json", "quant_config.json"),  # early releases of AutoGPTQ and AutoAWQ
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)


class ResolvedModel(msgspec.Struct, frozen=True):
    """A checkpoint on this machine.

    Attributes:
        name: what clients call it, unless told otherwise: "grist", the hub id, or the folder's or the file's name.
        path: the folder with config.json, weights and tokenizer, or the GGUF file, the first one of a split model.
    """

    name: str
    path: Path


def resolve_model(model: str | Path | None = None) -> ResolvedModel:
    """Finds a model's files; fetches them from the hub where they are not on this machine yet.

    Fetching shows huggingface_hub's progress bars on standard error and obeys its environment variables
    (HF_HOME, HF_TOKEN, HF_HUB_OFFLINE).

    Args:
        model: a folder, a GGUF file, or a hub id such as Qwen/Qwen2.5-0.5B-Instruct; with a GGUF file behind it
            (owner/name:file.gguf, owner/name/folder/file.gguf) that file. None or "" is the embedded model.
            A folder or file wins over a hub id of the same name. A folder without config.json or safetensors may hold
            one GGUF model.

    Raises:
        CheckpointError: there is no such folder or repository, or it cannot be fetched.
    """
    if not model or (model == EMBEDDED and not Path(model).is_dir()):
        return _embedded()
    path = Path(model).expanduser()
    if path.is_dir():
        return ResolvedModel(path.resolve().name, _gguf_in(path) or path)
    if is_gguf(path):
        return _gguf(path)
    if path.is_file():
        raise CheckpointError(
            f"{path} is a file whose name does not end in .gguf: give the folder of a checkpoint in Hugging Face "
            "layout, or a GGUF file",
            param="model",
        )
    name = str(model)
    if file := _HUB_FILE.fullmatch(name):
        return _gguf(_fetch_gguf(file["repo"], file["file"]))
    if name.endswith(".gguf"):
        raise CheckpointError(f"there is no file {name}; one on the hub is owner/name/file.gguf", param="model")
    if not _HUB_ID.fullmatch(name):
        raise CheckpointError(f"there is no folder {name}, and it is not a hub id such as owner/name", param="model")
    return ResolvedModel(name, _fetch(name))


def _gguf(path: Path) -> ResolvedModel:
    first = split_parts(path)[0]
    return ResolvedModel(first.resolve().stem, first)


def _gguf_in(folder: Path) -> Path | None:
    """The one GGUF model of a folder that holds no whole checkpoint in Hugging Face layout beside it."""
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        return None
    models = sorted({split_parts(path)[0] for path in folder.glob("*.gguf")})
    if len(models) > 1:
        raise CheckpointError(
            f"{folder} holds several GGUF models: name one of {', '.join(map(str, models))}", param="model"
        )
    return models[0] if models else None


def _embedded() -> ResolvedModel:
    path = Path(str(importlib.resources.files(_EMBEDDED_PACKAGE)))
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"the embedded model {EMBEDDED} is not in this installation ({path} has no config.json): "
            "install millrace again, or name another model",
            param="model",
        )
    return ResolvedModel(EMBEDDED, path)


def _fetch(name: str) -> Path:
    folder = _from_hub(name, _FETCHED)
    if not any(folder.glob("*.safetensors")) and (files := _gguf_on_hub(name)):
        more = f" and {len(files) - _LISTED} more" if len(files) > _LISTED else ""
        raise CheckpointError(
            f"{name} on the hub holds GGUF files and no safetensors: name one of {', '.join(files[:_LISTED])}{more}",
            param="model",
        )
    return folder


def _gguf_on_hub(name: str) -> list[str]:
    """What to write for each GGUF model of a repository, the first file of a split one."""
    import huggingface_hub

    try:
        files = huggingface_hub.list_repo_files(name)
    except Exception:  # of the network and of the hub: it is asked for the sake of a message
        return []
    return sorted({f"{name}:{split_parts(Path(file))[0].as_posix()}" for file in files if file.endswith(".gguf")})


def _fetch_gguf(name: str, file: str) -> Path:
    parts = [str(part) for part in split_parts(Path(file))]
    path = _from_hub(name, parts) / parts[0]
    if not path.is_file():
        raise CheckpointError(f"{name} on the hub has no file {parts[0]}", param="model")
    return path


def _from_hub(name: str, patterns: Sequence[str]) -> Path:
    # Imported here because it takes a good part of a second and a local model does not need it.
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(patterns)))
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{name} on the hub is gated: accept its terms on the hub, then set HF_TOKEN to a token of that account",
            param="model",
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"there is no folder {name}, and no repository of that name on the hub that you may read "
            "(set HF_TOKEN for a private one)",
            param="model",
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise CheckpointError(
            f"there is no folder {name}; as a hub id, {name} is not in the local cache and the hub cannot be "
            f"reached ({_first_line(error)}). Fetch it while online, or give the folder of a checkpoint",
            param="model",
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name} cannot be fetched from the hub: {_first_line(error)}", param="model") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
