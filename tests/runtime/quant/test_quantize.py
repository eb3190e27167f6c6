"""Quantised checkpoints: what is written, read by transformers or by the formats' definitions; resuming; refusals."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import PagedSequences, load_reference, make_checkpoint, reference_logits
from safetensors.torch import load_file, save_file
from torch import Tensor
from word_texts import add_tokenizer

from millrace.kernels.torch_backend import TorchBackend
from millrace.runtime import cli, quantize_awq, quantize_fp8, quantize_gptq, quantize_int4, quantize_int8
from millrace.runtime.errors import CheckpointError, ConfigError, MillraceError
from millrace.runtime.models.declaration import Placement
from millrace.runtime.quant.calibration import TextSource, windows
from millrace.runtime.quant.evaluate import perplexity
from millrace.runtime.quant.job import Report
from millrace.runtime.quant.quantize import quantize
from millrace.runtime.weights.loader import load_model

SMALL: dict[str, Any] = {"samples": 8, "window": 32}
METHODS: dict[str, Callable[..., Report]] = {
    "awq": quantize_awq,
    "gptq": quantize_gptq,
    "int8": quantize_int8,
    "int4": quantize_int4,
    "fp8": quantize_fp8,
}


def stored(folder: Path) -> dict[str, Tensor]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(index["weight_map"].values())):
        tensors |= load_file(folder / shard)
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    return tensors


def nibbles(packed: Tensor, order: tuple[int, ...]) -> Tensor:
    """Words [rows, n] to values [rows, 8 n]; nibble i of a word, lowest first, is value order[i] of its eight."""
    values = torch.empty(*packed.shape, 8, dtype=torch.int64)
    for nibble, place in enumerate(order):
        values[:, :, place] = (packed.long() >> (4 * nibble)) & 15
    return values.flatten(1)


def widened(tensors: dict[str, Tensor], method: str) -> dict[str, Tensor]:
    """The checkpoint as one of float32, each matrix [out, in], from the formats' definitions."""
    wide: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        base, _, kind = name.rpartition(".")
        if kind == "weight_packed":
            q = nibbles(tensor, tuple(range(8))) - 8
            scales = tensors[f"{base}.weight_scale"].float()
            wide[f"{base}.weight"] = (q.view(*scales.shape, -1) * scales[:, :, None]).flatten(1)
        elif kind == "weight" and f"{base}.weight_scale" in tensors:
            wide[name] = tensor.float() * tensors[f"{base}.weight_scale"].float()
        elif kind not in ("qweight", "qzeros", "scales", "g_idx", "weight_scale", "weight_shape"):
            wide[name] = tensor.float()
        elif kind == "qweight":
            scales = tensors[f"{base}.scales"].float()
            if method == "awq":
                order = (0, 2, 4, 6, 1, 3, 5, 7)
                q, zeros = nibbles(tensor, order), nibbles(tensors[f"{base}.qzeros"], order)
                group = torch.arange(len(q)) // (len(q) // len(zeros))
            else:
                plain = tuple(range(8))
                q, zeros = nibbles(tensor.t(), plain).t(), nibbles(tensors[f"{base}.qzeros"], plain) + 1
                group = tensors[f"{base}.g_idx"].long()
            wide[f"{base}.weight"] = ((q - zeros[group]) * scales[group]).t().contiguous()
    return wide


def held_out(folder: Path, text: Path) -> Tensor:
    return windows(TextSource.load(folder).file(text), 32, 50)[0]


def reference_perplexity(reference: Any, rows: Tensor) -> float:
    total = 0.0
    for row in rows:
        logits = reference_logits(reference, row.tolist()).log_softmax(-1)
        total -= float(logits[:-1].gather(1, row[1:, None]).sum())
    return math.exp(total / (rows.numel() - len(rows)))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "method", "options"), [
    ("llama", "awq", {}),
    ("mistral", "awq", {}),
    ("qwen2", "gptq", {"sym": False}),
    ("qwen3", "gptq", {"desc_act": True}),
    ("llama-biases", "gptq", {}),
])  # fmt: skip
def test_reports_tell_what_transformers_makes_of_the_written_weights(
    kind: str, method: str, options: dict[str, Any], tmp_path: Path, text: Path
) -> None:
    sizes: dict[str, Any] = {"num_hidden_layers": 2, "intermediate_size": 128} | (
        {"head_dim": 16} if kind == "llama-biases" else {}
    )
    model = make_checkpoint(kind, tmp_path / "model", dtype=torch.bfloat16, **sizes)
    add_tokenizer(model)
    report = METHODS[method](model, tmp_path / "out", group_size=32, calibration=text, evaluation=text, **SMALL,
                             **options)  # fmt: skip
    tensors = stored(report.output)
    assert report.bytes_after == sum(tensor.nbytes for tensor in tensors.values()) < 0.7 * report.bytes_before
    rows = held_out(model, text)[:32]
    assert report.scored == 32 * 31
    reference = load_reference(model)
    assert report.before == pytest.approx(reference_perplexity(reference, rows), rel=1e-3)
    missing, unexpected = reference.load_state_dict(widened(tensors, method), strict=False)
    assert (set(missing), unexpected) == ({"lm_head.weight"} if kind == "qwen2" else set(), [])
    reference.tie_weights()
    assert report.after == pytest.approx(reference_perplexity(reference, rows), rel=1e-3)
    config = json.loads((report.output / "config.json").read_text())
    assert config["dtype"] == "float16"
    told = {"quant_method": method, "bits": 4, "group_size": 32}
    told |= (
        {"zero_point": True, "version": "gemm"}
        if method == "awq"
        else {"sym": True, "desc_act": False, "checkpoint_format": "gptq"} | options
    )
    assert config["quantization_config"] == told


# What is left between the two is the rounding of activations, which int4 has none of.
@pytest.mark.slow
@pytest.mark.parametrize(("method", "near"), [("int8", 0.03), ("int4", 1e-5), ("fp8", 0.12)])
def test_transformers_loads_compressed_tensors(
    method: str, near: float, checkpoint: Path, tmp_path: Path, text: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    report = METHODS[method](checkpoint, tmp_path / "out", calibration=text, **SMALL)
    given, loaded = load_reference(checkpoint), load_reference(report.output)
    rows = held_out(checkpoint, text)[:32]
    assert report.before == pytest.approx(reference_perplexity(given, rows), rel=1e-3)
    assert report.after == pytest.approx(reference_perplexity(loaded, rows), rel=0.01)
    given.load_state_dict(widened(stored(report.output), method), strict=False)
    want, got = (reference_logits(model, rows[0].tolist()) for model in (given, loaded))
    assert (got - want).norm() / want.norm() < near


@pytest.mark.slow
@pytest.mark.parametrize("method", list(METHODS))
def test_what_is_written_loads_here(method: str, checkpoint: Path, tmp_path: Path, text: Path) -> None:
    """Packed, and with the weights that were reported on: torch multiplies them without rounding activations."""
    report = METHODS[method](checkpoint, tmp_path / "out", calibration=text, **SMALL)
    model = load_model(report.output, placement=Placement(backends=(TorchBackend(),)))
    assert "packed" in model.spec.weights
    reference = load_reference(checkpoint)
    reference.load_state_dict(widened(stored(report.output), method), strict=False)
    row = held_out(checkpoint, text)[0].tolist()
    want, got = reference_logits(reference, row), PagedSequences(model, 1, 64).step({0: row})[0]
    assert (got - want).abs().max() < 2e-4 * want.abs().max()


def test_output_is_whole(checkpoint: Path, tmp_path: Path, text: Path) -> None:
    (checkpoint / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    (checkpoint / "additional_chat_templates").mkdir()
    (checkpoint / "additional_chat_templates" / "tool_use.jinja").write_text("x")
    (checkpoint / "LICENSE").write_text("free")
    (checkpoint / "notes.py").write_text("no")
    report = quantize_int8(str(checkpoint), str(tmp_path / "deep" / "out"), calibration=str(text), **SMALL)
    names = {str(path.relative_to(report.output)) for path in report.output.rglob("*") if path.is_file()}
    assert names == {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja", "LICENSE", "model.safetensors.index.json",
        *(f"model-0000{number}-of-00005.safetensors" for number in range(1, 6)),
    }  # fmt: skip
    assert [path.name for path in report.output.parent.iterdir()] == ["out"]
    written, given = (json.loads((folder / "config.json").read_text()) for folder in (report.output, checkpoint))
    assert written.pop("quantization_config")["format"] == "int-quantized"
    assert written == given
    lines = report.table().splitlines()
    assert lines[0].split() == ["int8", "8", "bits", "before", "after", "change"]
    assert f"{report.before:.4f}" in lines[1] and f"{report.after:.4f}" in lines[1]


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["awq", "gptq", "int8"])
def test_a_killed_run_goes_on_where_it_was(method: str, checkpoint: Path, tmp_path: Path, text: Path) -> None:
    options = {"calibration": text, **SMALL}
    at_once = METHODS[method](checkpoint, tmp_path / "whole", **options)

    def killed_after(last: int) -> Callable[[int, int], None]:
        def progress(done: int, total: int) -> None:
            assert total == 3
            if done == last:
                raise KeyboardInterrupt

        return progress

    seen: list[int] = []
    for last in (1, 2, 3):
        with pytest.raises(KeyboardInterrupt):
            METHODS[method](checkpoint, tmp_path / "out", progress=killed_after(last), **options)
        assert not (tmp_path / "out").exists()
    report = METHODS[method](checkpoint, tmp_path / "out", progress=lambda done, total: seen.append(done), **options)
    assert seen == [3]
    assert digest(report.output) == digest(at_once.output)
    assert (report.before, report.after) == (at_once.before, at_once.after)
    assert not (tmp_path / "out.partial").exists()


def test_unfinished_output_of_another_run_is_left_alone(checkpoint: Path, tmp_path: Path, text: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_gptq(checkpoint, tmp_path / "out", calibration=text, progress=stop, **SMALL)
    kept = digest(tmp_path / "out.partial" / "output")
    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[::-1].replace("w", "w1 "))
    for changes, message in (
        ({"bits": 8}, "bits was 4 and is 8"),
        ({"sym": False}, "sym was True and is False"),
        ({"window": 16}, "window was 32 and is 16"),
        ({"calibration": other}, "text differs"),
    ):
        with pytest.raises(ConfigError) as error:
            quantize_gptq(checkpoint, tmp_path / "out", **{"calibration": text, **SMALL, **changes})
        assert message in str(error.value)
        assert "remove the folder to start anew" in str(error.value)
    with pytest.raises(ConfigError, match="method was gptq and is int8"):
        quantize_int8(checkpoint, tmp_path / "out", calibration=text, **SMALL)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    with pytest.raises(ConfigError, match="model differs"):
        quantize_gptq(checkpoint, tmp_path / "out", calibration=text, **SMALL)
    assert digest(tmp_path / "out.partial" / "output") == kept


@pytest.mark.parametrize(
    "name", ["state-00001.safetensors", "manifest.json", "output/model-00002-of-00005.safetensors"]
)
def test_a_damaged_file_of_an_unfinished_run_says_what_to_delete(
    name: str, checkpoint: Path, tmp_path: Path, text: Path
) -> None:
    def stop(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_int8(checkpoint, tmp_path / "out", calibration=text, progress=stop, **SMALL)
    file = tmp_path / "out.partial" / name
    for left in (file.read_bytes()[:-20], b"null"):
        file.write_bytes(left)
        with pytest.raises(CheckpointError) as error:
            quantize_int8(checkpoint, tmp_path / "out", calibration=text, **SMALL)
        assert str(file) in str(error.value)
        assert f"delete {tmp_path / 'out.partial'}, and run again" in str(error.value)


@pytest.mark.parametrize("method", ["awq", "int8"])
def test_the_report_says_how_much_text_there_was(
    method: str, checkpoint: Path, tmp_path: Path, text: Path, caplog: pytest.LogCaptureFixture
) -> None:
    report = METHODS[method](checkpoint, tmp_path / "out", calibration=text, samples=100, window=64)
    if method == "int8":
        assert report.windows is None and "calibration" not in report.table() and not caplog.records
        return
    assert (report.windows, report.asked) == (22, 100)  # of 25; the others are held out
    assert "22 windows of 100 that were asked for: the text is too short" in report.table()
    assert "samples is 100, but" in caplog.text and "holds only 22 windows for it" in caplog.text


def test_nothing_is_overwritten(checkpoint: Path, tmp_path: Path, text: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="out exists already and is not overwritten"):
        quantize_int8(checkpoint, tmp_path / "out", calibration=text, **SMALL)
    (tmp_path / "new.partial").mkdir()
    with pytest.raises(ConfigError, match=r"new\.partial is in the way"):
        quantize_int8(checkpoint, tmp_path / "new", calibration=text, **SMALL)
    assert list((tmp_path / "new.partial").iterdir()) == []


@pytest.mark.parametrize(("options", "message"), [
    ({"method": "nf4"}, "method is nf4, but it must be one of awq, gptq, int8, int4, fp8"),
    ({"method": "awq", "bits": 8}, "bits is 8, but for awq it must be 4"),
    ({"method": "gptq", "bits": 5}, "bits is 5, but for gptq it must be 2 or 3 or 4 or 8"),
    ({"method": "int8", "group_size": 32}, "group_size is no setting of int8"),
    ({"method": "awq", "desc_act": True, "sym": True}, "desc_act, sym is no setting of awq"),
    ({"method": "awq", "group_size": 64}, "mlp.down_proj it must be a divisor of its 112 inputs, and at least 16: 16"),
    ({"method": "awq", "group_size": 0}, "group_size is 0, but for"),
    ({"method": "awq", "group_size": 8}, "its 64 inputs, and at least 16: 64, 32, 16"),
    ({"method": "gptq", "bits": 3}, "gate_proj is [112, 64], but gptq with 3 bits packs 32 together"),
    ({"method": "int8", "window": 300}, "window is 300, but it must be between 2 and 256"),
    ({"method": "int8", "samples": 0}, "samples is 0, but it must be at least 1"),
    ({"method": "awq", "window": 256, "calibration": "short"}, "holds 0 windows of 256 tokens"),
    ({"method": "int8", "evaluation": "short", "window": 256}, "the held-out text has 0 windows of 256 tokens"),
    ({"method": "int8", "calibration": "none"}, "there is no file"),
])  # fmt: skip
def test_settings_that_do_not_fit(
    options: dict[str, Any], message: str, checkpoint: Path, tmp_path: Path, text: Path
) -> None:
    (tmp_path / "short").write_text("w1 w2 w3")
    paths = {key: tmp_path / options[key] for key in ("calibration", "evaluation") if key in options}
    with pytest.raises(MillraceError) as error:
        quantize(
            model_path=checkpoint, output_path=tmp_path / "out", **{**SMALL, "calibration": text, **options, **paths}
        )
    assert message in str(error.value)
    assert not list(tmp_path.glob("out*"))


def test_checkpoints_that_cannot_be_quantised(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(folder: Path, message: str, method: str = "awq") -> None:
        with pytest.raises(CheckpointError) as error:
            quantize(method, folder, tmp_path / "out", calibration=text, **SMALL)
        assert message in str(error.value)
        assert not (tmp_path / "out").exists()

    refused(make_checkpoint("gpt2", tmp_path / "gpt2"), "GPT2LMHeadModel cannot be written quantised: it stores its")
    model = make_checkpoint("llama", tmp_path / "model")
    refused(model, "tokenizer.json")
    add_tokenizer(model)
    large = load_file(model / "model.safetensors")
    silent = model.with_name("silent")
    shutil.copytree(model, silent)
    norm = "model.layers.1.input_layernorm.weight"
    save_file(large | {norm: torch.zeros(64)}, silent / "model.safetensors", {"format": "pt"})
    refused(silent, "layers.1.self_attn.q_proj: the mean square of the inputs is 0.0: calibration saw no", "gptq")
    shutil.rmtree(tmp_path / "out.partial")
    for value, method, message in (
        (1e6, "gptq", "values beyond the range of float16"),
        (math.nan, "int8", "not finite"),
    ):
        broken = tmp_path / method
        shutil.copytree(model, broken)
        tensors = {name: tensor.clone() for name, tensor in large.items()}
        name = "model.layers.1.post_attention_layernorm.weight"
        tensors[name if method == "gptq" else "model.layers.1.mlp.up_proj.weight"].flatten()[3] = value
        save_file(tensors, broken / "model.safetensors", {"format": "pt"})
        refused(broken, message, method)
        shutil.rmtree(tmp_path / "out.partial")
    tied = make_checkpoint("qwen2", tmp_path / "tied")
    add_tokenizer(tied)
    tensors = {name: tensor.clone() for name, tensor in load_file(tied / "model.safetensors").items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, tied / "model.safetensors", {"format": "pt"})
    refused(tied, "lm_head.weight differs from model.embed_tokens.weight")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    refused(model, "GB, but")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    refused(model, "is quantised already")
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    refused(model, "model.layers.3.input_layernorm.weight is missing")


def test_command_line(checkpoint: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["quantize", str(checkpoint), str(tmp_path / "out"), "--method", "gptq", "--no-sym", "--calibration",
               str(text), "--eval", str(text), "--samples", "8", "--window", "32"]  # fmt: skip
    assert cli.main(command) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("gptq 4 bits g16")
    assert [line.split()[0] for line in out[1:]] == ["perplexity", "size", "calibration", "time"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["sym"] is False
    assert cli.main(command) == 2
    assert "exists already" in capsys.readouterr().err

    model = load_model(checkpoint)
    found = perplexity(model, TextSource.load(checkpoint).file(text), window=64, stride=16)
    measure = ["eval", "perplexity", str(checkpoint), str(text), "--window", "64", "--stride", "16", "--threads", "1"]
    assert cli.main(measure) == 0
    assert capsys.readouterr().out.startswith(f"perplexity {found.value:.3f}"[:-1])
    assert cli.main([*measure[:3], str(tmp_path / "none.txt")]) == 2
    assert "there is no file" in capsys.readouterr().err
