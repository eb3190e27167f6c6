"""A GGUF file is a model: given to the runtime by its name, with nothing beside it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda_fakes import FakeDriver
from gguf_files import write_gguf

from millrace.runtime import ChatMessage, Runtime, SamplingParams
from millrace.runtime.cli import main
from millrace.runtime.config import load_config
from millrace.runtime.gpu import Gpu
from millrace.runtime.loading import load
from millrace.runtime.weights.gguf_file import Gguf, read_gguf
from millrace.runtime.weights.resolve import resolve_model


@pytest.fixture(scope="module")
def grist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model as the only thing in a folder."""
    path = tmp_path_factory.mktemp("models") / "grist-Q8_0.gguf"
    write_gguf(resolve_model().path, path, lambda name: "Q8_0", tokenizer=True)
    return path


@pytest.mark.parametrize("by_folder", [False, True])
async def test_it_answers(by_folder: bool, grist: Path) -> None:
    async with Runtime(model=grist.parent if by_folder else grist) as runtime:
        assert runtime.model_name == (grist.parent.name if by_folder else "grist-Q8_0")
        assert runtime.spec.eos_token_ids == runtime.tokenizer.eos_ids == (1,)
        assert runtime.spec.weights == "GGUF: 36 tensors Q8_0, packed; 11 tensors F32"
        done = await runtime.submit(
            [ChatMessage(role="user", content="What is the capital of France?")], SamplingParams(temperature=0.0)
        )
    assert "Paris" in done.text
    assert done.finish_reason == "stop"


async def test_random_weights_take_its_tokenizer(grist: Path) -> None:
    async with Runtime(model=grist, model__random_weights="tiny-6x256") as runtime:
        assert runtime.spec.weights == "random"
        done = await runtime.submit("Hello", SamplingParams(max_tokens=2, ignore_eos=True))
    assert done.usage.completion_tokens == 2


def test_inspect_says_how_it_is_stored(grist: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(grist)]) == 0
    assert "GGUF: 36 tensors Q8_0, packed; 11 tensors F32" in capsys.readouterr().err
    assert main(["inspect", str(grist), "--quantize", "int4"]) == 2
    assert "quantised already (GGUF)" in capsys.readouterr().err.replace("\n", " ")


def test_a_header_is_read_once(grist: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds for a large vocabulary; on a GPU its types are asked for before the model is loaded."""
    read: list[Path] = []

    def counted(path: Path) -> Gguf:
        read.append(path)
        return read_gguf(path)

    monkeypatch.setattr("millrace.runtime.weights.gguf.read_gguf", counted)
    launcher: Any = SimpleNamespace(device_type="cpu", sm_count=4, shared_bytes_per_sm=1 << 16)
    gpu = Gpu(FakeDriver(), launcher)
    loaded = load(load_config(None, {"model.path": str(grist)}), gpu=gpu)
    assert loaded.model.dtype == torch.bfloat16
    assert read == [grist]
