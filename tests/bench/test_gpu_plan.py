"""Planning, floors and report of bench/gpu_check.py, which need no GPU."""

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from gpu import report
from gpu.context import Context, line, read_rows
from gpu.floors import GOAL_DECODE, Ceilings, Shape, attention_bytes, causal_flops
from gpu.plan import BY_NAME, PARTS, Outcome, Part, Row, choose, missing, rated, run_parts, timed

from millrace.runtime.weights.synthetic import preset

H100 = Ceilings(copy=3.0e12, gemm=798e12)


class Clock:
    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


def fake(name: str, limit: float, least: float, packages: tuple[str, ...] = ()) -> Part:
    return Part(name, "none", f"about {name}", limit, least, packages)


def test_parts_run_in_order_within_the_budget() -> None:
    clock, given, lines = Clock(), [], []
    takes = {"a": 20.0, "b": 50.0, "d": 15.0}

    def run(part: Part, seconds: float) -> Outcome:
        given.append((part.name, seconds))
        clock.time += takes[part.name]
        if part.name == "b":
            raise RuntimeError("the device is lost")
        return Outcome(part.name, "ok")

    parts = [fake("a", 30, 10), fake("x", 10, 1, ("no_such_package",)), fake("b", 60, 10), fake("c", 40, 35),
             fake("d", 40, 5), fake("e", 10, 6)]  # fmt: skip
    outcomes = run_parts(parts, 90, run, clock, lines.append)
    assert given == [("a", 30), ("b", 60), ("d", 20)]
    assert [(outcome.name, outcome.state) for outcome in outcomes] == [
        ("a", "ok"), ("x", "skipped"), ("b", "failed"), ("c", "skipped"), ("d", "ok"), ("e", "skipped"),
    ]  # fmt: skip
    assert outcomes[1].reason == "not installed: no_such_package"
    assert outcomes[2] == Outcome("b", "failed", "RuntimeError: the device is lost", 50.0)
    assert outcomes[3].reason == "it needs 35 s, and 20 s are left"
    assert any(text.startswith("== c skipped") for text in lines)


def test_the_parts_fit_into_the_default_budget() -> None:
    assert sum(part.limit for part in PARTS) <= 9 * 60
    assert all(0 < part.least <= part.limit for part in PARTS)
    assert PARTS[0].name == "ceilings"
    assert len(BY_NAME) == len(PARTS)


def test_choosing() -> None:
    assert choose([]) == PARTS
    assert [part.name for part in choose(["engine", "attention"])] == ["ceilings", "attention", "engine"]
    with pytest.raises(ValueError, match="there is no part attetion; there are ceilings"):
        choose(["attetion"])
    assert missing(["json", "no_such_package"]) == ["no_such_package"]


def test_rows() -> None:
    slow = timed("p", "t", 20.0, "us", 10.0, goal=0.8)
    assert (slow.share, slow.met) == (0.5, False)
    assert rated("p", "r", 90.0, "GB/s", 100.0, goal=0.8).met is True
    assert Row("p", "n", 10, "kernels", goal=10, goal_kind="at most").met is True
    assert Row("p", "n", 900, "tokens/s", goal=1000, goal_kind="at least").met is False
    assert Row("p", "n", 1, "x").met is None
    assert Row.from_json(slow.as_json()) == slow
    assert line(slow) == "t: 20 us (floor 10, 50% of it), goal 80%: missed"


@pytest.mark.parametrize(
    ("name", "batch", "milliseconds", "rate"),
    [("llama-2-7b", 1, 4.58, 218), ("llama-2-7b", 8, 5.8, 1371), ("llama-2-7b", 64, 15.9, 4036),
     ("llama-3.1-8b", 64, 7.9, 8136), ("llama-3.1-8b", 256, 16.5, 15556)],
)  # fmt: skip
def test_floors_of_decode(name: str, batch: int, milliseconds: float, rate: float) -> None:
    """At 1k on an H100; what was worked out by hand for the goals."""
    seconds = Shape.of(preset(name)).decode_floor(H100, batch, 1024)
    assert seconds * 1e3 == pytest.approx(milliseconds, rel=0.01)
    assert batch / seconds == pytest.approx(rate, rel=0.01)


def test_sizes_of_the_7b_model() -> None:
    shape = Shape.of(preset("llama-2-7b"))
    assert shape.parameters == pytest.approx(6.74e9, rel=1e-3)
    assert 2 * shape.streamed_weights == pytest.approx(13.2e9, rel=2e-3)
    assert shape.kv_bytes_per_token == 512 * 1024
    assert shape.decode_bytes(64, 1024) == pytest.approx(47.6e9, rel=5e-3)
    assert shape.decode_flops(64, 1024) / H100.gemm == pytest.approx(1.1e-3, rel=0.05)
    for tokens, milliseconds in ((1024, 17), (2048, 35), (8192, 158)):
        assert shape.prefill_floor(H100, tokens) * 1e3 == pytest.approx(milliseconds, rel=0.03)
    assert Shape.of(preset("llama-3.2-1b")).parameters == pytest.approx(1.236e9, rel=1e-2)  # tied
    large = Shape.of(preset("llama-3.1-8b"))
    assert large.rounded(8, 64).streamed_bytes == large.streamed_weights
    assert large.rounded(4, 64).decode_bytes(1, 0) == pytest.approx(0.5625 * 6.98e9 + 0.525e9, rel=5e-3)
    assert set(GOAL_DECODE) == {("llama-2-7b", 1), ("llama-2-7b", 64), ("llama-3.1-8b", 256)}


def test_floors_of_attention() -> None:
    for batch, context, kv_heads, micros in ((1, 1024, 8, 1.4), (64, 1024, 8, 89), (64, 4096, 32, 1430)):
        num_bytes = attention_bytes(batch, context, kv_heads, 128, 0)
        assert H100.seconds(num_bytes) * 1e6 == pytest.approx(micros, rel=0.02)
    assert causal_flops(3, 5, 2, 8) == 4 * 2 * 8 * (3 + 4 + 5)
    assert causal_flops(1, 100, 1, 1) == 400


def test_rows_survive_a_crash(tmp_path: Path) -> None:
    file, said = tmp_path / "rows", []
    context = Context(PARTS[0], 10.0, file=file, now=lambda: 4.0, say=said.append)
    assert context.left == 6.0
    with pytest.raises(RuntimeError, match="ceilings were not measured"):
        context.roof()
    context.row(rated("p", "r", 1.5, "GB/s", 3.0))
    context.note("n", {"a": 1})
    with file.open("a") as out:
        out.write('{"row": {"part": "p", "na')
    assert read_rows(file) == (context.rows, {"n": {"a": 1}})
    assert read_rows(tmp_path / "none") == ([], {})


def test_the_report(tmp_path: Path) -> None:
    rows = [
        rated("ceilings", "copy", 3000.0, "GB/s", 3350.0),
        timed("attention", "decode", 20.0, "us", 10.0, goal=0.8),
        Row("kernels", "norms", 0.5, "relative", failed=True),
    ]
    outcomes = [Outcome("ceilings", "ok", "", 3.0), Outcome("peer", "skipped", "not installed: transformers")]
    data: dict[str, Any] = report.result(rows, outcomes, {"device": "none"}, {"a.b": 1}, 12.34)
    report.write(tmp_path / "new" / "r.json", data)
    again = json.loads((tmp_path / "new" / "r.json").read_text())
    assert again["device"] == "none"
    assert again["seconds"] == 12.3
    assert again["parts"][1] == {
        "name": "peer",
        "state": "skipped",
        "reason": "not installed: transformers",
        "seconds": 0,
    }
    assert again["rows"][1] == {
        "part": "attention", "name": "decode", "value": 20.0, "unit": "us", "floor": 10.0, "share": 0.5, "goal": 0.8,
        "goal_kind": "share", "note": "", "failed": False, "met": False,
    }  # fmt: skip
    text = report.table(rows, outcomes)
    assert "MISSED" in text
    assert "FAILED" in text
    assert "peer skipped: not installed: transformers" in text
    assert text.endswith("0 of 1 goals met")
    assert report.file_name("NVIDIA H100 80GB HBM3", datetime.date(2026, 11, 21)) == (
        "gpu-nvidia-h100-80gb-hbm3-2026-11-21.json"
    )
    assert report.output_of("no-such-command") == ""
    assert "torch" in report.versions()
    assert set(report.revision()) == {"commit", "changed"}
