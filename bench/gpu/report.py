"""The table and the JSON of a run: what was measured, where, and with what."""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu.context import goal_text
from gpu.plan import Outcome, Row
from gpu.tree import ROOT

PACKAGES = ("torch", "cupy-cuda13x", "nvidia-cuda-nvrtc", "nvidia-cuda-runtime", "triton", "numpy", "transformers",
            "safetensors", "tokenizers", "flashinfer-python", "msgspec")  # fmt: skip
_SMI = ("name", "driver_version", "memory.total", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem",
        "power.limit", "temperature.gpu")  # fmt: skip


def output_of(*command: str) -> str:
    """What a command prints; empty if there is no such command or it fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def versions() -> dict[str, str]:
    """Of the packages that matter; those that are not installed are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def smi(query: Sequence[str] = _SMI, index: int = 0) -> dict[str, str]:
    """What nvidia-smi says of the device now, clocks and power included; empty without it."""
    text = output_of("nvidia-smi", f"--query-gpu={','.join(query)}", "--format=csv,noheader", f"--id={index}")
    values = [value.strip() for value in text.split(",")]
    return dict(zip(query, values, strict=True)) if len(values) == len(query) else {}


def revision() -> dict[str, Any]:
    """The revision of the tree and whether it has changes. A copy without .git takes it from $MILLRACE_REVISION."""
    commit = output_of("git", "rev-parse", "HEAD") or os.environ.get("MILLRACE_REVISION", "")
    return {"commit": commit or "unknown", "changed": bool(output_of("git", "status", "--porcelain"))}


def file_name(device: str, day: datetime.date) -> str:
    return f"gpu-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}-{day.isoformat()}.json"


def result(
    rows: Sequence[Row],
    outcomes: Sequence[Outcome],
    surroundings: Mapping[str, Any],
    notes: Mapping[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """The JSON of a run."""
    return {
        "bench": "gpu_check",
        **surroundings,
        "seconds": round(seconds, 1),
        "parts": [outcome._asdict() for outcome in outcomes],
        "rows": [row.as_json() for row in rows],
        "notes": dict(notes),
    }


def table(rows: Sequence[Row], outcomes: Sequence[Outcome]) -> str:
    """Rows with floors and goals, part by part, then what was skipped or failed, then what fell short."""
    header = ("what", "measured", "floor", "share", "goal", "")
    lines: list[tuple[str, ...]] = []
    for row in rows:
        verdict = "FAILED" if row.failed else {None: "", True: "met", False: "MISSED"}[row.met]
        lines.append(
            (
                f"{row.part}: {row.name}",
                f"{row.value:,.4g} {row.unit}",
                "" if row.floor is None else f"{row.floor:,.4g}",
                "" if row.share is None else f"{row.share:.0%}",
                goal_text(row),
                verdict,
            )
        )
    widths = [max(len(entry[column]) for entry in (header, *lines)) for column in range(len(header))]

    def show(entry: tuple[str, ...]) -> str:
        cells = [cell.ljust(width) if i in (0, 5) else cell.rjust(width)
                 for i, (cell, width) in enumerate(zip(entry, widths, strict=True))]  # fmt: skip
        return "  ".join(cells).rstrip()

    text = [show(header), *(show(entry) for entry in lines), ""]
    text += [f"{outcome.name} {outcome.state}: {outcome.reason}" for outcome in outcomes if outcome.state != "ok"]
    missed = [row for row in rows if row.met is False]
    goals = [row for row in rows if row.met is not None]
    if goals:
        text.append(f"{len(goals) - len(missed)} of {len(goals)} goals met")
    return "\n".join(text)


def write(file: Path, data: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
