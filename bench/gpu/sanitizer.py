"""compute-sanitizer over the small cases: memory errors, races in shared memory, wrong barriers."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from gpu.context import Context
from gpu.plan import Row
from gpu.tree import ROOT

TOOLS = ("memcheck", "synccheck", "racecheck")  # racecheck is the slowest
ERROR_STATUS = 86  # a status that Python has no meaning for
_SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) error)|(?:RACECHECK SUMMARY: (\d+) hazard)")


def find(environment: Mapping[str, str] = os.environ) -> Path | None:
    """compute-sanitizer on the PATH or in a CUDA toolkit."""
    found = shutil.which("compute-sanitizer", path=environment.get("PATH"))
    if found:
        return Path(found)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if environment.get(name):
            for folder in ("bin", "compute-sanitizer"):
                file = Path(environment[name]) / folder / "compute-sanitizer"
                if file.is_file():
                    return file
    default = sorted(Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))
    return default[-1] if default else None


def command(sanitizer: Path, tool: str, rows: Path, seconds: float) -> list[str]:
    check = ROOT / "bench" / "gpu_check.py"
    return [
        str(sanitizer), "--tool", tool, "--error-exitcode", str(ERROR_STATUS), "--target-processes", "application-only",
        sys.executable, str(check), "--child", "kernels", "--small", "--rows", str(rows), "--seconds", f"{seconds:.0f}",
    ]  # fmt: skip


def count(output: str) -> int | None:
    """Errors or hazards that a run's output names; None if it ended without a summary."""
    numbers = [int(a or b) for a, b in _SUMMARY.findall(output)]
    return max(numbers) if numbers else None


def run_group(words: list[str], seconds: float, environment: Mapping[str, str]) -> tuple[int, str]:
    """Status and output of a command, which is ended with all that it started when its time is up: the sanitizer's
    child would hold the device otherwise. Raises subprocess.TimeoutExpired then."""
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=seconds)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return process.returncode, output


def run(context: Context) -> None:
    sanitizer = find()
    if sanitizer is None:
        context.say("   compute-sanitizer is neither on the PATH nor in a CUDA toolkit; it is left out")
        context.note("skipped", "compute-sanitizer not found")
        return
    for tool in TOOLS:
        seconds = context.left / (len(TOOLS) - TOOLS.index(tool))
        if seconds < 8:
            context.say(f"   {tool}: no time left")
            continue
        rows = (context.file or Path("rows")).with_suffix(f".{tool}")
        # torch's caching allocator would put tensors side by side into one allocation, and hide what overruns them.
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        try:
            status, output = run_group(command(sanitizer, tool, rows, seconds - 5), seconds, environment)
        except subprocess.TimeoutExpired:
            context.say(f"   {tool}: not done within {seconds:.0f} s")
            continue
        errors = count(output)
        if errors is None:
            last = output.strip().splitlines()
            context.say(f"   {tool} cannot run here: {last[-1][:200] if last else f'status {status}'}")
            continue
        first = next(
            (text.strip(" =") for text in output.splitlines() if "=========     " in text or "Error:" in text), ""
        )
        context.row(
            Row(context.part.name, tool, errors, "errors", note=first[:200] if errors else "", failed=errors > 0)
        )
