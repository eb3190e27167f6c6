"""What starting a process does not import."""

import subprocess
import sys

import pytest

# torch._dynamo takes seconds, and CuPy belongs to processes with a GPU.
NEVER = ("torch._dynamo", "cupy", "transformers")


@pytest.mark.parametrize("module", ["millrace.runtime.app", "millrace.runtime.cli"])
def test_starting_imports_no_more_than_it_needs(module: str) -> None:
    program = f"import sys, {module}; print(*[name for name in {NEVER!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("", 0), done.stderr
