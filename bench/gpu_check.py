"""Checks and measures Millrace on a CUDA machine, in one command and within a budget of time.

    python bench/gpu_check.py [--minutes 9] [--only PART ...] [--list] [--json FILE]

It runs from a checkout without installing anything, and needs the packages of a CUDA machine: torch, numpy and cupy for
the kernels; msgspec, structlog, prometheus_client, safetensors, tokenizers and jinja2 for whole models and the engine;
transformers beside them; compute-sanitizer where a toolkit has it. Where nothing can be installed, wheels brought along
do (`pip download` elsewhere, `pip install --target DIR`, PYTHONPATH=DIR). A part whose packages are missing is skipped,
and the report says so. Each part runs in a process of its own, since a kernel that faults takes the process's device
with it; what the part had reported until then is kept. Floors come from the ceilings that the same run measures.

Exit status: 0; 1 if a check failed or a part broke; 2 without a CUDA device or for wrong arguments.
"""

import argparse
import datetime
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gpu import report
from gpu.context import Context, read_rows
from gpu.floors import Ceilings
from gpu.plan import BY_NAME, PARTS, Outcome, Part, Row, choose, run_parts
from gpu.tree import ROOT, use_tree

RESERVE = 5.0  # seconds of the budget for the report
CHECKS_FAILED = 3  # status of a child that ran to its end and whose checks did not all hold


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="budget for everything (default: 9)")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="these parts (and the ceilings)")
    parser.add_argument("--list", action="store_true", help="print the parts and end")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: bench/results/gpu-<device>-<date>.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # one part, in this process
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    parser.add_argument("--ceilings", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--small", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.list:
        for part in PARTS:
            print(f"{part.name:<10} {part.limit:4.0f} s  {part.about}")
        return 0
    if args.minutes <= 0:
        parser.error(f"--minutes is {args.minutes}, but it must be positive")
    try:
        parts = choose(args.only)
    except ValueError as error:
        parser.error(str(error))
    reason = no_device()
    if reason:
        print(f"no GPU to check: {reason}", file=sys.stderr)
        return 2
    use_tree()
    return child(args) if args.child else check(parts, args.minutes * 60, args.json)


def no_device() -> str:
    """Why nothing can be measured here; empty if it can."""
    try:
        import torch  # only here, so that a machine without it is told so
    except ImportError as error:
        return f"torch cannot be imported ({error})"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    return "" if torch.cuda.is_available() else "torch finds no CUDA device"


def child(args: argparse.Namespace) -> int:
    """Runs one part in this process."""
    ceilings = Ceilings(*json.loads(args.ceilings)) if args.ceilings else None
    context = Context(BY_NAME[args.child], time.monotonic() + args.seconds, ceilings, args.rows, args.small)
    importlib.import_module(f"gpu.{context.part.module}").run(context)
    return CHECKS_FAILED if any(row.failed for row in context.rows) else 0


def check(parts: tuple[Part, ...], budget: float, file: Path | None) -> int:
    import torch  # it is there: no_device has looked

    properties = torch.cuda.get_device_properties(0)
    before = report.smi()
    surroundings = {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "driver": before.get("driver_version", "unknown"),
        "cuda": torch.version.cuda,
        "versions": report.versions(),
        "revision": report.revision(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "smi_before": before,
    }
    print(f"{properties.name}, driver {surroundings['driver']}, CUDA {torch.version.cuda}, torch {torch.__version__},"
          f" revision {surroundings['revision']['commit'][:12]}", flush=True)  # fmt: skip
    start, rows, notes = time.monotonic(), [], {}

    def run(part: Part, seconds: float) -> Outcome:
        rates = {row.name: row.value for row in rows if row.part == "ceilings"}
        ceilings = Ceilings(rates["copy"] * 1e9, rates["gemm"] * 1e12) if {"copy", "gemm"} <= rates.keys() else None
        outcome, new, said = run_child(part, seconds, ceilings)
        rows.extend(new)
        notes.update({f"{part.name}.{name}": value for name, value in said.items()})
        return outcome

    outcomes = run_parts(parts, budget - RESERVE, run, time.monotonic, lambda text: print(text, flush=True))
    surroundings["smi_after"] = report.smi()
    data = report.result(rows, outcomes, surroundings, notes, time.monotonic() - start)
    file = file or ROOT / "bench" / "results" / report.file_name(
        properties.name, datetime.datetime.now(datetime.UTC).date()
    )
    report.write(file, data)
    print(f"\n{report.table(rows, outcomes)}\n{file}", flush=True)
    broken = any(row.failed for row in rows) or any(outcome.state == "failed" for outcome in outcomes)
    return 1 if broken else 0


def run_child(part: Part, seconds: float, ceilings: Ceilings | None) -> tuple[Outcome, list[Row], dict[str, object]]:
    """Runs a part in a process of its own, which is ended with all that it started when its time is up."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows"
        command = [sys.executable, str(Path(__file__).resolve()), "--child", part.name, "--rows", str(file)]
        # The child stops in good order before it is ended.
        command += ["--seconds", f"{max(1.0, seconds - 3):.1f}"]
        if ceilings is not None:
            command += ["--ceilings", json.dumps(list(ceilings))]
        process = subprocess.Popen(
            command, stdout=None, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        try:
            _, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return Outcome(part.name, "failed", f"ended after its {seconds:.0f} s"), *read_rows(file)
        rows, notes = read_rows(file)
        failures = [row for row in rows if row.failed]
        if process.returncode == 0:
            return Outcome(part.name, "ok"), rows, notes
        if failures and process.returncode == CHECKS_FAILED:
            return Outcome(part.name, "failed", f"{len(failures)} checks, first {failures[0].name}"), rows, notes
        last = errors.strip().splitlines()
        reason = last[-1][:400] if last else f"status {process.returncode}"
        print("\n".join(last[-12:]), file=sys.stderr)
        return Outcome(part.name, "failed", reason), rows, notes


if __name__ == "__main__":
    sys.exit(main())
