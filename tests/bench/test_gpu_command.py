"""bench/gpu_check.py as a command, on a machine without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gpu_check
import pytest
import torch
from gpu.floors import Ceilings
from gpu.plan import BY_NAME, Outcome, Part, Row

ROOT = Path(__file__).resolve().parents[2]
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def command(*arguments: str, isolated: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not isolated or name == "PATH"}
    options = ["-S"] if isolated else []
    return subprocess.run(
        [sys.executable, *options, *arguments], capture_output=True, text=True, env=environment, cwd="/", check=False
    )


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--list"]) == 0
    assert [text.split()[0] for text in capsys.readouterr().out.splitlines()] == list(BY_NAME)


@without_gpu
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([]) == 2
    assert "no GPU to check: torch" in capsys.readouterr().err
    for arguments in (["--only", "nothing"], ["--minutes", "0"]):
        with pytest.raises(SystemExit) as ended:
            gpu_check.main(arguments)
        assert ended.value.code == 2


def test_without_torch() -> None:
    done = command(str(ROOT / "bench" / "gpu_check.py"), isolated=True)
    assert done.returncode == 2
    assert "no GPU to check: torch cannot be imported" in done.stderr


def test_the_whole_way_with_faked_parts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    properties = SimpleNamespace(
        name="None 1", major=9, minor=0, multi_processor_count=132, total_memory=1 << 36, L2_cache_size=50 << 20
    )
    given: list[tuple[str, Ceilings | None]] = []

    def run_child(part: Part, seconds: float, ceilings: Ceilings | None) -> tuple[Outcome, list[Row], dict[str, int]]:
        given.append((part.name, ceilings))
        if part.name == "ceilings":
            rows = [Row(part.name, "copy", 3000.0, "GB/s"), Row(part.name, "gemm", 800.0, "TFLOP/s")]
            return Outcome(part.name, "ok"), rows, {"clocks": 1}
        return Outcome(part.name, "failed", "the device is lost"), [], {}

    monkeypatch.setattr(gpu_check, "no_device", lambda: "")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(gpu_check, "run_child", run_child)
    monkeypatch.setattr("gpu.plan.importlib.util.find_spec", lambda name: name)
    file = tmp_path / "result.json"
    assert gpu_check.main(["--only", "attention", "--json", str(file)]) == 1
    assert given == [("ceilings", None), ("attention", Ceilings(3e12, 8e14))]
    data = json.loads(file.read_text())
    assert (data["device"], data["capability"], data["notes"]) == ("None 1", "9.0", {"ceilings.clocks": 1})
    assert [part["state"] for part in data["parts"]] == ["ok", "failed"]
    assert {"driver", "cuda", "versions", "revision", "date", "rows", "seconds", "smi_before"} <= data.keys()
    assert "attention failed: the device is lost" in capsys.readouterr().out
    assert gpu_check.main(["--only", "ceilings", "--json", str(file)]) == 0


@pytest.mark.slow
@without_gpu
def test_a_child_that_breaks_is_a_failed_part() -> None:
    outcome, rows, notes = gpu_check.run_child(BY_NAME["ceilings"], 60.0, None)
    assert (outcome.state, rows, notes) == ("failed", [], {})
    assert outcome.reason.startswith("no GPU to check")


def test_the_tree_is_imported_without_being_installed() -> None:
    """No site-packages at all: packages of the standard library and of the tree."""
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'bench')!r})\n"
        "from gpu.tree import use_tree; use_tree(); use_tree()\n"
        "import millrace.kernels, millrace.runtime, millrace.runtime.text, millrace.runtime.cuda\n"
        "print(millrace.runtime.cuda.__file__, *millrace.kernels.__path__)"
    )
    done = command("-c", program, isolated=True)
    assert done.stdout.split() == [str(ROOT / "runtime" / "cuda" / "__init__.py"), str(ROOT / "kernels")], done.stderr


def test_another_tree_is_refused(tmp_path: Path) -> None:
    from gpu.tree import TreeFinder, use_tree

    import millrace.kernels

    assert Path(millrace.kernels.__path__[0]).resolve() == ROOT / "kernels"
    use_tree()  # the same tree, imported already
    with pytest.raises(RuntimeError, match="imported from"):
        use_tree(tmp_path)
    finder = TreeFinder()
    assert finder.find_spec("millrace.nothing") is None
    assert finder.find_spec("json") is None
