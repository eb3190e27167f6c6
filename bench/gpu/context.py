"""What a part gets: where to report rows, how long it has, and the ceilings of this run."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu.floors import Ceilings
from gpu.plan import Part, Row


@dataclass
class Context:
    """A part's side of the child process.

    Attributes:
        part: its name; two parts may share a module.
        deadline: on `now`'s clock; a part looks at `left` between its cases and stops in good order.
        ceilings: None before they are measured.
        file: rows are appended to it as they come, so that a crash loses none that were there.
        small: the few small cases that run under compute-sanitizer.
        notes: what the report says of the part's surroundings, by name.
    """

    part: Part
    deadline: float
    ceilings: Ceilings | None = None
    file: Path | None = None
    small: bool = False
    now: Callable[[], float] = time.monotonic
    say: Callable[[str], None] = lambda text: print(text, flush=True)
    rows: list[Row] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def left(self) -> float:
        return self.deadline - self.now()

    def roof(self) -> Ceilings:
        if self.ceilings is None:
            raise RuntimeError("the ceilings were not measured, and floors come from them")
        return self.ceilings

    def row(self, row: Row) -> None:
        self.rows.append(row)
        self._write({"row": row.as_json()})
        self.say(f"   {line(row)}")

    def note(self, name: str, value: Any) -> None:
        """For the JSON, beside the rows."""
        self.notes[name] = value
        self._write({"note": [name, value]})

    def _write(self, data: dict[str, Any]) -> None:
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(data) + "\n")


def read_rows(file: Path) -> tuple[list[Row], dict[str, Any]]:
    """Rows and notes of a child; a last line that a crash cut off is dropped."""
    rows: list[Row] = []
    notes: dict[str, Any] = {}
    if file.exists():
        for text in file.read_text("utf-8").splitlines():
            try:
                data = json.loads(text)
            except ValueError:
                continue
            if "row" in data:
                rows.append(Row.from_json(data["row"]))
            else:
                name, value = data["note"]
                notes[name] = value
    return rows, notes


def line(row: Row) -> str:
    """A row as one line of text."""
    text = f"{row.name}: {row.value:,.4g} {row.unit}"
    if row.floor is not None and row.share is not None:
        text += f" (floor {row.floor:,.4g}, {row.share:.0%} of it)"
    if row.met is not None:
        text += f", goal {goal_text(row)}: {'met' if row.met else 'missed'}"
    if row.failed:
        text += " FAILED"
    return text + (f"  [{row.note}]" if row.note else "")


def goal_text(row: Row) -> str:
    if row.goal is None:
        return ""
    return f"{row.goal:.0%}" if row.goal_kind == "share" else f"{row.goal_kind} {row.goal:g}"
