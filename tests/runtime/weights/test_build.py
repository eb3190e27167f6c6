"""Builds: the same logits from matrices that lie ready, and what makes them unfit."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import PagedSequences, make_checkpoint, random_tokens

from millrace.kernels import ops
from millrace.kernels.arguments import PackedState
from millrace.kernels.cpu_backend import CpuBackend
from millrace.kernels.quantized import Float8Weight, QuantizedWeight
from millrace.runtime import cli
from millrace.runtime.config import load_config
from millrace.runtime.errors import ConfigError
from millrace.runtime.loading import load
from millrace.runtime.models.decoder import DecoderModel
from millrace.runtime.quant.rounding import Quantization
from millrace.runtime.weights.build import BuildWriter, identity, open_build
from millrace.runtime.weights.loader import load_model


@pytest.fixture(scope="module", autouse=True)
def _needs_kernels() -> None:
    ops.prepare()
    if ops.default_backends()[0].name == "torch":
        pytest.skip("NO C++ KERNELS HERE, SO BUILDS ARE NOT TESTED: install g++")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("qwen2", tmp_path_factory.mktemp("model"), dtype=torch.bfloat16)


def logits(model: DecoderModel) -> torch.Tensor:
    return PagedSequences(model, 1, 64).step({0: random_tokens(20, seed=1)})[0]


def built(model: Path, output: Path, **options: Any) -> torch.Tensor:
    writer = BuildWriter(output, identity(model, {}))
    made = logits(load_model(model, build=writer, **options))
    assert writer.finish() == (output / "weights.bin").stat().st_size
    return made


@pytest.mark.parametrize("method", ["none", "int8", "int4", "nf4", "fp8"])
def test_the_same_bits(method: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize = None if method == "none" else Quantization(method=method, group_size=16)
    made = built(model, tmp_path / "out", quantize=quantize)
    assert not (tmp_path / "out.partial").exists()
    ready = open_build(tmp_path / "out", identity(model, {}))
    assert ready is not None
    for name in ("pack_linear", "pack_quantized", "pack_float8"):
        monkeypatch.delattr(ops, name)  # nothing is packed again
    assert torch.equal(logits(load_model(model, build=ready, quantize=quantize)), made)


def test_an_untied_float32_model(tmp_path: Path) -> None:
    folder = make_checkpoint("llama-biases", tmp_path / "model")
    made = built(folder, tmp_path / "out")
    assert torch.equal(logits(load_model(folder, build=open_build(tmp_path / "out", identity(folder, {})))), made)


def rewrite(folder: Path, **values: Any) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | values))


@pytest.mark.parametrize(("change", "reason"), [
    (lambda folder, holds: holds.update({"options": "others"}), "made for other options"),
    (lambda folder, holds: holds.update({"kernels and processor": "others"}), "other kernels and processor"),
    (lambda folder, holds: (folder / "manifest.json").write_text("{}"), "it cannot be read"),
    (lambda folder, holds: (folder / "manifest.json").unlink(), "there is no .*manifest.json"),
    (lambda folder, holds: (folder / "weights.bin").write_bytes(b"short"), "weights.bin has 5 bytes instead of"),
    (lambda folder, holds: rewrite(folder, format=2), "its format is 2, and 1 is read"),
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


def test_matrices_of_other_sizes_are_packed_anew(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = built(model, tmp_path / "out")
    matrices = json.loads((tmp_path / "out" / "manifest.json").read_text())["matrices"]
    name = next(iter(matrices))
    matrices[name]["numbers"]["in_features"] += 1
    rewrite(tmp_path / "out", matrices=matrices)
    ready = open_build(tmp_path / "out", identity(model, {}))
    assert torch.equal(logits(load_model(model, build=ready)), made)
    (record,) = caplog.records
    assert f"{name} in the build" in record.getMessage()


def test_states_that_would_be_read_past_their_end_are_refused() -> None:
    backend = ops.default_backends()[0]
    assert isinstance(backend, CpuBackend)
    integers = QuantizedWeight(
        torch.zeros(40, 64, dtype=torch.uint8), torch.ones(40, 2).half(), torch.zeros(40, 2).half(), 4,
        torch.zeros(16, dtype=torch.int8), torch.arange(64),
    )  # fmt: skip
    codes = Float8Weight(torch.zeros(40, 64).to(torch.float8_e4m3fn), torch.ones(40, 2), 32)
    for linear in (ops.pack_linear(torch.zeros(40, 64)), ops.pack_float8(codes), ops.pack_quantized(integers)):
        state = linear.state()
        assert state is not None
        assert isinstance(backend.restore(state), ops.PackedLinear)
        for number in state.numbers:
            for value in (-1, 0, 3, 1 << 40):
                changed = state._replace(numbers={**state.numbers, number: value})
                if number != "group_bits" or "scales" in state.tensors:  # which others have no use for
                    assert not isinstance(backend.restore(changed), ops.PackedLinear), (number, value)
        for tensor in state.tensors:
            cut = {key: kept[:-1] if key == tensor else kept for key, kept in state.tensors.items()}
            assert not isinstance(backend.restore(state._replace(tensors=cut)), ops.PackedLinear), tensor
    assert not isinstance(backend.restore(PackedState("other", {}, {})), ops.PackedLinear)


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    assert cli.main(["build", "grist", str(output), "--quantize", "int8"]) == 0
    assert "MB in" in capsys.readouterr().out
    said = []
    for options in ([], ["--build", str(output)]):
        words = ["--quantize", "int8", "--prompt", "Once", "--temperature", "0", "--max-tokens", "8"]
        assert cli.main(["generate", *words, *options]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert cli.main(["build", "grist", str(output)]) == 2
    assert "exists" in capsys.readouterr().err
    assert cli.main(["build", "grist", str(tmp_path / "new"), "--build", str(output)]) == 2
    assert list(tmp_path.iterdir()) == [output]


def test_it_is_for_checkpoints_on_the_cpu() -> None:
    with pytest.raises(ConfigError, match=r"model\.build is somewhere, but it is for a checkpoint"):
        load(load_config(None, {"model.build": "somewhere", "model.random_weights": "tiny-6x256"}))
