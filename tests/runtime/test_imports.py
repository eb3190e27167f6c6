"""What starting a process does not import."""

import subprocess
import sys

import pytest

NEVER = ("torch._dynamo", "cupy", "transformers")  # each takes seconds


@pytest.mark.slow
def test_starting_imports_no_more_than_it_needs() -> None:
    program = f"import sys, millrace.runtime.app; print(*[name for name in {NEVER!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("", 0), done.stderr
