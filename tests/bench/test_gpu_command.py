"""bench/gpu_check.py as a command, on a machine without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import gpu_check
import pytest
import torch
from gpu.plan import BY_NAME

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
        "import millrace.kernels.cuda_compile as c\n"
        "print(millrace.runtime.cuda.__file__, c.resolve('norm.cu')[:5])"
    )
    done = command("-c", program, isolated=True)
    assert done.stdout.split() == [str(ROOT / "runtime" / "cuda" / "__init__.py"), "#line"], done.stderr


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
