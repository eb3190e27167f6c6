"""The parts of bench/gpu_check.py: their host side, and their calls on the host shim in place of a device."""

import importlib
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_fakes import FakeDriver
from gpu import attention, engine, sanitizer, small, steps
from gpu.case_list import Case, Checked, Place, cases, error_of
from gpu.cases import check, kernels_of
from gpu.context import Context
from gpu.floors import Ceilings
from gpu.model_tools import decode_graph, placement, prompt_batch
from gpu.plan import BY_NAME, PARTS
from gpu.timing import num_rotated

from millrace.kernels.cuda_compile import Kernel
from millrace.runtime.gpu import wanted_kernels
from millrace.runtime.quant.rounding import Quantization
from millrace.runtime.weights.loader import random_model
from millrace.runtime.weights.synthetic import preset
from shim.build import compiler
from shim.isolation import run_isolated
from shim.launcher import ShimLauncher

CEILINGS = Ceilings(3e12, 798e12)


class CallOnce:
    """A timer that only calls."""

    def __init__(self, enqueue: Callable[[Callable[[], object]], object] = lambda work: work()) -> None:
        self.enqueue = enqueue

    def seconds(self, works: Sequence[Callable[[], object]], repeats: int = 20) -> float:
        for work in works:
            self.enqueue(work)
        return 1e-3


class NoLauncher:
    """A device on which every launch fails."""

    device_type, sm_count, shared_bytes_per_sm = "cpu", 4, 228 * 1024

    def launch(self, kernel: Kernel, *rest: Any, **more: Any) -> None:
        raise RuntimeError(f"{kernel.name} is broken")


def context(name: str) -> Context:
    return Context(BY_NAME[name], time.monotonic() + 1000, CEILINGS, say=lambda text: None)


@pytest.fixture(scope="session")
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Place:
    if compiler() is None:
        pytest.skip("no g++ or clang++: kernels are not executed")
    cache = getattr(request.config, "cache", None)
    folder = Path(cache.mkdir("millrace-shim")) if cache is not None else tmp_path_factory.mktemp("shim")
    return Place(ShimLauncher(cache_dir=folder), "cpu", 0)


def isolated(function: Callable[[], object]) -> None:
    """A crash of a kernel fails one test."""
    outcome = run_isolated(function)
    assert outcome.kind == "passed", f"{outcome.name}\n{outcome.text}"


@pytest.mark.parametrize("module", sorted({part.module for part in PARTS}))
def test_every_part_can_be_imported(module: str) -> None:
    assert callable(importlib.import_module(f"gpu.{module}").run)


# ---- cases ------------------------------------------------------------------------------------------------------


def test_errors() -> None:
    one, nan = torch.ones(4), torch.tensor([1.0, math.nan, 1.0, 1.0])
    assert error_of(one, one.double()) == 0
    assert error_of(one * 1.5, one.double()) == 0.5
    assert error_of(nan, one.double()) == math.inf
    assert error_of(one, nan.double()) == math.inf
    assert error_of(nan, nan.double()) == 0
    assert error_of(one[:3], one.double()) == math.inf
    infinite = torch.tensor([1.0, -math.inf])
    assert error_of(infinite, infinite.double()) == 0
    assert error_of(-infinite, infinite.double()) == math.inf


def test_cases_cover_every_front() -> None:
    listed = cases()
    assert len({(case.group, case.name) for case in listed}) == len(listed)
    small_groups = {case.group for case in listed if case.small}
    assert {"decode attention", "prefill attention", "norms", "rope and KV write", "filtered draws"} <= small_groups


@pytest.mark.slow
def test_cases_hold_on_the_shim(place: Place) -> None:
    """Every group that costs little, and itself as the second opinion."""

    def run() -> None:
        found = context("kernels")
        chosen = [case for case in cases() if case.small and case.group not in ("prefill attention", "greedy")]
        check(found, chosen, place, settle=lambda: None)
        check(found, chosen, place, place, settle=lambda: None)
        assert [row.name for row in found.rows if row.failed] == []
        assert len(found.rows) == 2 * len({case.group for case in chosen})

    isolated(run)


def test_kernels_are_known_before_they_are_compiled() -> None:
    place = Place(NoLauncher(), "cpu", 0)
    found = kernels_of([case for case in cases() if case.small], place)
    assert {"mr_attention_decode", "mr_plan_decode", "mr_attention_prefill", "mr_rms_norm", "mr_rope_kv",
            "mr_sample_scan", "mr_sample_draw", "mr_move_blocks", "mr_gemv",
            "mr_gemv_rows", "mr_round_rows"} <= {k.name for k in found}  # fmt: skip
    assert len(found) == len(set(found))


def test_wrong_results_and_exceptions_fail_their_group() -> None:
    def wrong(place: Place) -> Checked:
        return Checked([torch.ones(2) * 1.1], [torch.ones(2).double()], 0.05)

    def right(place: Place) -> Checked:
        return Checked([torch.ones(2)], [torch.ones(2).double()], 0.0)

    broken = next(case for case in cases() if case.group == "norms")
    chosen = [Case("a", "right", right), Case("a", "wrong", wrong), Case("b", "right", right), broken]
    found = context("kernels")
    place = Place(NoLauncher(), "cpu", 0)
    check(found, chosen, place, None, settle=lambda: None)
    assert [(row.name, row.failed) for row in found.rows] == [
        ("a vs reference", True), ("b vs reference", False), ("norms vs reference", True),
    ]  # fmt: skip
    assert "worst is wrong at 200%" in found.rows[0].note
    assert "mr_rms_norm is broken" in found.rows[2].note

    def lost() -> None:
        raise RuntimeError("the device is lost")

    with pytest.raises(RuntimeError, match="lost"):
        check(context("kernels"), [broken], place, None, settle=lost)


def test_a_group_ends_with_its_time() -> None:
    clock = [0.0]

    def slow(place: Place) -> Checked:
        clock[0] += 3.0
        return Checked([torch.ones(2)], [torch.ones(2).double()], 0.0)

    found = Context(BY_NAME["kernels"], 5.0, CEILINGS, now=lambda: clock[0], say=lambda text: None)
    check(found, [Case("a", str(i), slow) for i in range(5)], Place(NoLauncher(), "cpu", 0), settle=lambda: None)
    assert clock[0] == 6.0
    (row,) = found.rows
    assert not row.failed and row.note.startswith("2 of 5 cases, no time for more")


# ---- measurements -----------------------------------------------------------------------------------------------


def test_rotation() -> None:
    l2, free = 50_000_000, 80_000_000_000
    assert num_rotated(200_000_000, l2, free) == 1
    assert num_rotated(4_000_000, l2, free) * 4_000_000 > 2 * l2 + 4_000_000
    assert num_rotated(1000, l2, free) == 64
    assert num_rotated(60_000_000, l2, 100_000_000) == 1  # nothing more fits


def test_the_sweep_lists_all_loads() -> None:
    listed = attention.loads()
    assert len(listed) == len(set(listed)) == 4 * 3 * 3
    assert attention.Load(64, 1024, 1).kv_bytes == 64 * 1024 * 2 * 32 * 128 * 2
    assert attention.Load(1, 1024, 4).blocks == 64


def test_the_sweep_on_the_shim(place: Place) -> None:
    def run() -> None:
        found = context("attention")
        chosen = [attention.Load(1, 32, 4), attention.Load(2, 16, 4), attention.Load(10**6, 16384, 1)]
        attention.decode_sweep(found, place, CallOnce(), chosen, l2=200_000, free=1 << 28)
        names = [row.name for row in found.rows]
        assert [name.split(",")[0] for name in names] == ["decode", "torch SDPA"] * 2  # the last does not fit
        assert all(row.floor and row.share == pytest.approx(row.floor / 1000) for row in found.rows)
        assert [kernel.name for kernel in place.launcher.launches].count("mr_attention_decode") > 2
        attention.prefill_rows(found, place, CallOnce(), ((1, 20, 12),))
        assert [row.unit for row in found.rows[-2:]] == ["TFLOP/s"] * 2

    isolated(run)


@pytest.mark.slow
def test_the_other_kernels_on_the_shim(place: Place) -> None:
    def run() -> None:
        found = context("ops")
        small.elementwise(found, place, CallOnce(), 3, 512, 256, l2=1000, free=1 << 20)
        small.sampling(found, place, CallOnce(), 2, 300, l2=1000, free=1 << 20)
        small.products(found, place, CallOnce(), 32, 256, l2=1000, free=1 << 20)
        small.products_of_8_bits(found, place, CallOnce(), 32, 256, 20, l2=1000, free=1 << 20)
        small.copies(found, place, CallOnce(), 2, 32)
        small.launch_overhead(found, place, lambda: None, repeats=10)
        assert len(found.rows) == 3 + 4 + 7 + 9 + 1 + 2
        assert not any(row.failed for row in found.rows)

    isolated(run)


def tiny() -> dict[str, Any]:
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 512}
    return preset("tiny-6x256") | sizes


@pytest.mark.slow
def test_steps_on_the_shim(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode graphs whose contexts stay, prefill, and the launches of a layer."""

    def run() -> None:
        monkeypatch.setattr(steps, "preset", lambda name: tiny())
        driver = FakeDriver("at once")
        driver.use(driver.stream(0))
        launcher: Any = place.launcher
        found = context("steps-8b")

        def count(work: Callable[[], object]) -> int:
            launcher.launches.clear()
            work()
            return len(launcher.launches)

        with torch.inference_mode():
            steps.launches(found, place, driver, "tiny", count)
            model = random_model(tiny(), placement=placement(place, driver, 4), max_model_len=256)
            free = model.kv_bytes_per_token * 16 * 40
            load = steps.Load("tiny", (1, 3, 50))
            steps.decode_rows(found, driver, CallOnce(driver.enqueue), load, model, 40, free)
            steps.prefill_rows(found, CallOnce(driver.enqueue), load, model, (20,))
            load = steps.Load("tiny", (2,), Quantization(method="int4"))
            where = placement(place, driver, 4, quantize=load.quantize)
            model = random_model(tiny(), placement=where, max_model_len=256)
            launcher.launches.clear()
            steps.decode_rows(found, driver, CallOnce(driver.enqueue), load, model, 40, free)
            assert {"mr_gemv"} < {kernel.name for kernel in launcher.launches}
            assert set(launcher.launches) <= set(wanted_kernels(model))
        assert [row.name for row in found.rows] == [
            "tiny kernels per layer in the graph", "tiny decode step, batch 1 at 40", "tiny decode step, batch 3 at 40",
            "tiny prefill of 20", "tiny int4 decode step, batch 2 at 40",
        ]  # fmt: skip
        assert found.rows[0].value == 5  # two norms, rope and KV, attention, SiLU-mul; torch's products are not counted

    isolated(run)


def test_a_decode_graph_goes_on_where_a_prompt_ends(place: Place) -> None:
    """The last token of a context, fed again: the logits that a prefill of that context has."""

    def run() -> None:
        driver = FakeDriver("at once")
        driver.use(driver.stream(0))
        with torch.inference_mode():
            model = random_model(tiny(), placement=placement(place, driver, 2), max_model_len=64)
            kv = model.allocate_kv(3)
            tokens = [*range(5, 24), 0]  # a row's token is 0
            graphs, state = decode_graph(driver, model, kv, 3, 1, len(tokens), 64)
            state.tables[0, :2] = torch.tensor([1, 2], dtype=torch.int32)
            wanted: list[torch.Tensor] = []
            batch = prompt_batch(tokens, "cpu", all_logits=False)
            driver.enqueue(lambda: wanted.append(model.forward(batch, kv)))
            logits: list[torch.Tensor] = []
            for _ in range(2):
                driver.enqueue(lambda: logits.append(graphs.replay(1).clone()))
        assert torch.equal(logits[0], logits[1])
        assert error_of(logits[0], wanted[0].double()) < 0.02
        with pytest.raises(ValueError, match="need 3 blocks of 2"):
            decode_graph(driver, model, kv, 2, 1, 20, 64)

    isolated(run)


# ---- the engine's clients ---------------------------------------------------------------------------------------


def test_spans_and_gaps() -> None:
    a = engine.Run(0.0, [(1.0, 1), (2.0, 1), (4.0, 2), (5.0, 1)])
    b = engine.Run(0.0, [(2.5, 1), (3.0, 1), (4.5, 1)])
    assert engine.steady([a, b]) == (2.5, 4.5, 2 + 2)
    assert engine.gaps([a, b], 2.5, 4.5) == [0.5, 1.5]
    assert engine.percentile([3.0, 1.0, 2.0], 0.95) == 3.0
    assert engine.busy_share([(0.0, 1.0), (0.5, 2.0), (3.0, 4.0)]) == (0.75, 1.0)
    assert engine.busy_share([]) == (0.0, 0.0)
    assert engine.prompts(2, 3, 10, 1) == engine.prompts(2, 3, 10, 1) != engine.prompts(2, 3, 10, 2)


# ---- compute-sanitizer ------------------------------------------------------------------------------------------


def test_finding_the_sanitizer(tmp_path: Path) -> None:
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text("")
    assert sanitizer.find({"PATH": "", "CUDA_HOME": str(tmp_path)}) == tool
    tool.chmod(0o755)
    assert sanitizer.find({"PATH": str(tool.parent)}) == tool
    words = sanitizer.command(tool, "racecheck", tmp_path / "rows", 12.4)
    assert words[:3] == [str(tool), "--tool", "racecheck"]
    assert words[-6:] == ["kernels", "--small", "--rows", str(tmp_path / "rows"), "--seconds", "12"]


@pytest.mark.timeout(30)
def test_the_sanitizer_takes_its_children_along() -> None:
    """They hold the pipe that its output comes through, so that one left behind would be waited for."""
    program = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    with pytest.raises(subprocess.TimeoutExpired):
        sanitizer.run_group([sys.executable, "-c", program], 1.0, os.environ)
    assert sanitizer.run_group([sys.executable, "-c", "print(5); sys.exit(3)"], 60.0, os.environ)[0] == 1
    assert sanitizer.run_group([sys.executable, "-c", "print(5)"], 60.0, os.environ) == (0, "5\n")


def test_reading_the_sanitizer() -> None:
    assert sanitizer.count("========= ERROR SUMMARY: 0 errors\n") == 0
    assert sanitizer.count("========= ERROR SUMMARY: 3 errors\n") == 3
    hazards = "========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)\n"
    assert sanitizer.count(hazards) == 2
    assert sanitizer.count("Device not supported\n") is None
