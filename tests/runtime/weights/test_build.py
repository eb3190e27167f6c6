"""Builds: the same logits from weights that lie ready, and what makes them unfit."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import PagedSequences, make_checkpoint, random_tokens

from millrace.kernels import cpu_library
from millrace.runtime import cli
from millrace.runtime.config import load_config
from millrace.runtime.errors import ConfigError
from millrace.runtime.loading import load
from millrace.runtime.models.cpu_model import CpuModel
from millrace.runtime.models.decoder import DecoderModel
from millrace.runtime.models.host import cpu_model, tensor_model
from millrace.runtime.quant.rounding import Quantization
from millrace.runtime.weights import build as build_module
from millrace.runtime.weights.build import identity, open_build, write_build
from millrace.runtime.weights.loader import load_model


@pytest.fixture(scope="module", autouse=True)
def _needs_kernels() -> None:
    cpu_library.prepare()
    if cpu_library.default_library() is None:
        pytest.skip("NO C++ KERNELS HERE, SO BUILDS ARE NOT TESTED: install g++")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("qwen2", tmp_path_factory.mktemp("model"), dtype=torch.bfloat16)


def logits(model: Any) -> torch.Tensor:
    return PagedSequences(model, 1, 64).step({0: random_tokens(20, seed=1)})[0]


def built(folder: Path, output: Path, **options: Any) -> DecoderModel:
    made = load_model(folder, **options)
    packed = cpu_model(made)
    assert packed is not None
    assert write_build(output, identity(folder, {}), packed) == (output / "weights.bin").stat().st_size
    return made


def read(output: Path, folder: Path, kv: str = "auto", max_model_len: int = 0) -> CpuModel | None:
    build = open_build(output, identity(folder, {}))
    assert build is not None
    with build:
        return build.model(kv, max_model_len)


@pytest.mark.parametrize("method", ["none", "int8", "int4", "nf4", "fp8"])
def test_the_same_bits(method: Any, model: Path, tmp_path: Path) -> None:
    quantize = None if method == "none" else Quantization(method=method, group_size=16)
    made = built(model, tmp_path / "out", quantize=quantize)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    ready = read(tmp_path / "out", model)
    assert ready is not None
    assert torch.equal(logits(tensor_model(ready)), logits(made))
    assert ready.spec == made.spec
    assert (ready.weight_bytes, ready.kv_bytes_per_token) == (made.weight_bytes, made.kv_bytes_per_token)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3", "mistral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_kind_of_model(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = make_checkpoint(architecture, tmp_path / "model", dtype=dtype)
    made = built(folder, tmp_path / "out")
    ready = read(tmp_path / "out", folder)
    assert ready is not None
    assert torch.equal(logits(tensor_model(ready)), logits(made))


def test_a_model_with_a_part_that_torch_computes_has_none(tmp_path: Path) -> None:
    assert cpu_model(load_model(make_checkpoint("llama-biases", tmp_path))) is None  # heads of 24


def test_types_and_lengths_are_of_the_start(model: Path, tmp_path: Path) -> None:
    made = built(model, tmp_path / "out", kv=None)
    narrow = read(tmp_path / "out", model, "int8", 50)
    assert narrow is not None
    assert (narrow.kv_dtype, narrow.spec.max_model_len) == ("int8", 50)
    usual = read(tmp_path / "out", model)
    assert usual is not None
    assert (usual.kv_dtype, usual.spec.max_model_len) == ("bfloat16", made.spec.max_model_len)
    with pytest.raises(ConfigError, match="max_model_len is 1073741824, but it must be between 1 and"):
        read(tmp_path / "out", model, max_model_len=1 << 30)


def rewrite(folder: Path, **values: Any) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | values))


@pytest.mark.parametrize(("change", "reason"), [
    (lambda folder, holds: holds.update({"options": "others"}), "made for other options"),
    (lambda folder, holds: holds.update({"kernels and processor": "others"}), "other kernels and processor"),
    (lambda folder, holds: (folder / "manifest.json").write_text("{}"), "it cannot be read"),
    (lambda folder, holds: (folder / "manifest.json").unlink(), "there is no .*manifest.json"),
    (lambda folder, holds: (folder / "weights.bin").write_bytes(b"short"), "weights.bin has 5 bytes instead of"),
    (lambda folder, holds: rewrite(folder, format=1), "its format is 1, and 2 is read"),
])  # fmt: skip
def test_a_build_that_does_not_fit_is_left(
    change: Any, reason: str, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    built(model, tmp_path / "out")
    holds_for = dict(identity(model, {}))
    change(tmp_path / "out", holds_for)
    assert open_build(tmp_path / "out", holds_for) is None
    (record,) = caplog.records
    assert re.search(reason, record.getMessage())


def test_another_model_or_option_is_another_identity(tmp_path: Path) -> None:
    folder = make_checkpoint("llama", tmp_path / "model")
    first = identity(folder, {"quantize": "none"})
    assert first == identity(folder, {"quantize": "none"})
    assert first != identity(folder, {"quantize": "int8"})
    weights = folder / "model.safetensors"
    stored = bytearray(weights.read_bytes())
    stored[-1] ^= 1
    weights.write_bytes(stored)
    assert first["model files"] != identity(folder, {"quantize": "none"})["model files"]


def numbers(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where whole numbers and sizes stand in a manifest."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [found for key, each in items for found in numbers(each, (*path, key))]
    return [path] if type(value) is int else []


@pytest.mark.parametrize("quantize", [None, Quantization(method="nf4", group_size=16)])
def test_no_manifest_makes_kernels_read_what_is_not_theirs(
    quantize: Quantization | None, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every size and place of the first layer and the ends, changed: the build is left, or the model still answers."""
    built(model, tmp_path / "out", quantize=quantize)
    whole = json.loads((tmp_path / "out" / "manifest.json").read_text())
    places = [path for path in numbers(whole["weights"]) if path[:2] != ("decoder", "layers") or path[2] == 0]
    assert len(places) > 40
    refused = 0
    for path in places:
        for value in (-1, 0, 3, 1 << 40):
            changed = json.loads(json.dumps(whole["weights"]))
            at = changed
            for key in path[:-1]:
                at = at[key]
            at[path[-1]] = value
            rewrite(tmp_path / "out", weights=changed)
            caplog.clear()
            ready = read(tmp_path / "out", model)
            if ready is None:
                refused += 1
                assert "it is damaged" in caplog.text
            else:
                logits(tensor_model(ready))
    assert refused > 3 * len(places)


def without_layers(manifest: dict[str, Any]) -> None:
    manifest["spec"]["num_layers"] = 0
    manifest["weights"]["decoder"]["layers"] = []


def with_learned_positions(manifest: dict[str, Any]) -> None:
    manifest["weights"]["learned"] = {"dtype": "float32", "shape": [400, 64], "offset": 0}


def with_a_window(manifest: dict[str, Any]) -> None:
    manifest["weights"]["decoder"]["layers"][0]["window"] = -1


def with_another_type(manifest: dict[str, Any]) -> None:
    manifest["weights"]["head"]["bias"]["dtype"] = "S0"


@pytest.mark.parametrize("change", [without_layers, with_learned_positions, with_a_window, with_another_type])
def test_no_manifest_describes_what_there_is_not(
    change: Any, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    built(model, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    change(manifest)
    rewrite(tmp_path / "out", **manifest)
    assert read(tmp_path / "out", model) is None
    assert "it is damaged" in caplog.text


def test_weights_that_end_too_soon_are_left(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    built(model, tmp_path / "out")
    holds_for = identity(model, {})
    fill = build_module._fill

    def cut_first(file: Path, space: memoryview, offset: int) -> None:
        file.write_bytes(b"cut while it is read")
        fill(file, space, offset)

    monkeypatch.setattr(build_module, "_fill", cut_first)
    build = open_build(tmp_path / "out", holds_for)
    assert build is not None
    with build:
        assert build.model("auto", 0) is None
    assert "ends too soon" in caplog.text


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    assert cli.main(["build", "grist", str(output), "--quantize", "int8"]) == 0
    assert "MB in" in capsys.readouterr().out
    said = []
    for options in ([], ["--build", str(output)]):
        words = [
            "--device-kind",
            "cpu",
            "--quantize",
            "int8",
            "--prompt",
            "Once",
            "--temperature",
            "0",
            "--max-tokens",
            "8",
        ]
        assert cli.main(["generate", *words, *options]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert cli.main(["build", "grist", str(output)]) == 2
    assert "exists" in capsys.readouterr().err
    assert cli.main(["build", "grist", str(tmp_path / "new"), "--build", str(output)]) == 2
    assert list(tmp_path.iterdir()) == [output]


def test_serving_from_a_build_imports_no_torch(tmp_path: Path) -> None:
    assert cli.main(["build", "grist", str(tmp_path / "out")]) == 0
    program = f"""
import asyncio, sys
from millrace.runtime import Runtime, SamplingParams
import millrace.server.app
async def main():
    async with Runtime(model__build={str(tmp_path / "out")!r}, device__kind="cpu") as runtime:
        for params in (
            SamplingParams(max_tokens=4, temperature=0.0, logprobs=2, prompt_logprobs=1),
            SamplingParams(max_tokens=4, seed=1, top_p=0.9, top_k=5, repetition_penalty=1.1, n=2),
        ):
            assert (await runtime.submit("Once upon a time", params)).choices[0].token_ids
asyncio.run(main())
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("False", 0), done.stderr


def test_it_is_for_checkpoints_on_the_cpu() -> None:
    with pytest.raises(ConfigError, match=r"model\.build is somewhere, but it is for a checkpoint"):
        load(load_config(None, {"model.build": "somewhere", "model.random_weights": "tiny-6x256"}))
