"""What starting a process does not import."""

import subprocess
import sys

import pytest

NEVER = {  # each takes a second or more, but numpy
    "millrace.runtime.app": ("torch._dynamo", "cupy", "transformers"),
    "millrace.runtime.sampling": ("torch",),  # on the host all of it is numpy and C++
    "millrace.runtime.cli": ("torch", "numpy", "aiohttp", "transformers"),  # `millrace --help`
}


@pytest.mark.slow
@pytest.mark.parametrize("module", NEVER)
def test_starting_imports_no_more_than_it_needs(module: str) -> None:
    program = f"import sys, {module}; print(*[name for name in {NEVER[module]!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("", 0), done.stderr
