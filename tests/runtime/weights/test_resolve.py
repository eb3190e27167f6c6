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


def test_other_files_are_no_checkpoints(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    file.write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"is a file whose name does not end in \.gguf: give the folder"):
        resolve_model(file)
    with pytest.raises(
        CheckpointError, match=r"there is no file .*none\.gguf; one on the hub is owner/name/file\.gguf"
    ):
        resolve_model(tmp_path / "none.gguf")


def test_gguf_files_and_folders_with_one(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for number in (1, 2):
        (folder / f"big-0000{number}-of-00002.gguf").touch()
    first = folder / "big-00001-of-00002.gguf"
    for given in (first, folder / "big-00002-of-00002.gguf"):
        assert resolve_model(given).path == first
        assert resolve_model(given).name == "big-00001-of-00002"
    found = resolve_model(folder)
    assert (found.name, found.path) == ("model", first)
    (folder / "small.gguf").touch()
    assert resolve_model(folder / "small.gguf").name == "small"
    with pytest.raises(CheckpointError, match=rf"several GGUF models: name one of {first}, {folder / 'small.gguf'}"):
        resolve_model(folder)
    (folder / "config.json").write_text("{}")  # which many publish beside them
    with pytest.raises(CheckpointError, match="several GGUF models"):
        resolve_model(folder)
    (folder / "small.gguf").unlink()
    assert resolve_model(folder).path == first
    (folder / "model.safetensors").touch()
    assert resolve_model(folder).path == folder
    (folder / "config.json").unlink()  # an adapter's weights, say, but no checkpoint
    assert resolve_model(folder).path == first


@pytest.mark.parametrize("model", ["owner/name:sub/x-Q4_0.gguf", "owner/name/sub/x-Q4_0.gguf"])
def test_a_gguf_file_on_the_hub(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def fetch(repo_id: str, allow_patterns: list[str]) -> str:
        asked.append((repo_id, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with pytest.raises(CheckpointError, match=r"owner/name on the hub has no file sub/x-Q4_0\.gguf"):
        resolve_model(model)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x-Q4_0.gguf").touch()
    found = resolve_model(model)
    assert (found.name, found.path) == ("x-Q4_0", tmp_path / "sub" / "x-Q4_0.gguf")
    assert asked == [("owner/name", ["sub/x-Q4_0.gguf"])] * 2


def test_a_repository_of_gguf_files_is_asked_for_one_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def listed(repo_id: str) -> list[str]:
        assert repo_id == "owner/name"
        return ["README.md", "x-Q4_0.gguf", "big/x-00001-of-00002.gguf", "big/x-00002-of-00002.gguf"]

    def out_of_reach(repo_id: str) -> list[str]:
        raise OSError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo_id, allow_patterns: str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "list_repo_files", listed)
    said = r"name one of owner/name:big/x-00001-of-00002\.gguf, owner/name:x-Q4_0\.gguf$"
    with pytest.raises(CheckpointError, match=said):
        resolve_model("owner/name")
    monkeypatch.setattr(huggingface_hub, "list_repo_files", out_of_reach)
    assert resolve_model("owner/name").path == tmp_path
    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr(huggingface_hub, "list_repo_files", listed)
    assert resolve_model("owner/name").path == tmp_path


def test_all_parts_of_a_split_file_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = ["x-00001-of-00002.gguf", "x-00002-of-00002.gguf"]

    def fetch(repo_id: str, allow_patterns: list[str]) -> str:
        assert allow_patterns == parts
        for part in parts:
            (tmp_path / part).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert resolve_model(f"owner/name:{parts[1]}").path == tmp_path / parts[0]


def test_the_hub_is_asked_for_what_is_used_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def fetch(repo_id: str, **options: Any) -> str:
        asked.update(options, repo_id=repo_id)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    (tmp_path / "model.safetensors").touch()
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
