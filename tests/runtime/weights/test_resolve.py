"""Finding a model: the embedded one, a folder, or the hub's cache."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from millrace.runtime.errors import CheckpointError
from millrace.runtime.weights.resolve import resolve_model


def test_a_folder_is_named_after_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my-model").mkdir()
    found = resolve_model(tmp_path / "my-model")
    assert (found.name, found.path) == ("my-model", tmp_path / "my-model")
    monkeypatch.chdir(tmp_path / "my-model")
    assert resolve_model(".").name == "my-model"


@pytest.mark.parametrize(
    ("model", "said"),
    [("./no-such", "no folder ./no-such"), ("/no/such", "no folder"), ("a/b/c", "not a hub id"), ("../x", "no folder")],
)
def test_a_path_that_is_not_there(model: str, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        resolve_model(model)


def test_a_file_is_not_a_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="is a file: give the folder"):
        resolve_model(file)


def test_the_hub_is_asked_for_what_is_used_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def fetch(repo_id: str, **options: Any) -> str:
        asked.update(options, repo_id=repo_id)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    found = resolve_model("owner/name-1.5B")
    assert (found.name, found.path, asked["repo_id"]) == ("owner/name-1.5B", tmp_path, "owner/name-1.5B")
    from huggingface_hub.utils import filter_repo_objects

    stored = [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "pytorch_model.bin",
        "consolidated.safetensors",
        "modeling_evil.py",
        "onnx/model.onnx",
        "original/consolidated.00.pth",
    ]
    assert list(filter_repo_objects(stored, allow_patterns=asked["allow_patterns"])) == stored[:8]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (errors.LocalEntryNotFoundError("no connection\nmore"), "not in the local cache.*no connection.*online"),
        (errors.OfflineModeIsEnabled("offline"), "not in the local cache"),
        (OSError("disk full"), "cannot be fetched from the hub: disk full"),
        (errors.HFValidationError("bad id"), "cannot be fetched from the hub: bad id"),
    ],
)
def test_failures_of_the_hub_say_what_to_do(error: Exception, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(repo_id: str, **options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=said) as caught:
        resolve_model("owner/name")
    assert caught.value.param == "model"
    assert "\n" not in str(caught.value)


def test_an_installation_without_the_embedded_model_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path)
    for name in (None, "", "grist"):
        with pytest.raises(CheckpointError, match="embedded model grist is not in this installation"):
            resolve_model(name)
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(None).name == resolve_model("grist").name == "grist"
