"""Parts in order under one budget of time, and the rows that they report. No GPU is needed to plan."""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

GoalKind = Literal["share", "at most", "at least"]


@dataclass(frozen=True)
class Row:
    """One number.

    Attributes:
        floor: what no version can beat (a time, or a rate), in the same unit; from the ceilings of this run.
        share: of the floor that is reached, 1 is all of it.
        goal: to be compared with `share`, or with the value.
        note: what the floor counts, a tolerance, or the reason of a failure.
        failed: a check that did not hold; numbers alone never fail.
    """

    part: str
    name: str
    value: float
    unit: str
    floor: float | None = None
    share: float | None = None
    goal: float | None = None
    goal_kind: GoalKind = "share"
    note: str = ""
    failed: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None without one."""
        if self.goal is None:
            return None
        if self.goal_kind == "share":
            return self.share is not None and self.share >= self.goal
        return self.value <= self.goal if self.goal_kind == "at most" else self.value >= self.goal

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"met": self.met}

    @staticmethod
    def from_json(data: dict[str, Any]) -> "Row":
        return Row(**{name: value for name, value in data.items() if name != "met"})


def timed(part: str, name: str, value: float, unit: str, floor: float, **more: Any) -> Row:
    """A row of a time: its share is floor / value."""
    return Row(part, name, value, unit, floor, floor / value if value else None, **more)


def rated(part: str, name: str, value: float, unit: str, floor: float, **more: Any) -> Row:
    """A row of a rate, whose floor is a roof: its share is value / floor."""
    return Row(part, name, value, unit, floor, value / floor if floor else None, **more)


class Part(NamedTuple):
    """A topic that runs in a process of its own.

    Attributes:
        module: of bench/gpu, which has `run(context)`.
        limit: seconds after which it is ended; what earlier parts left over is not added.
        least: seconds without which it is not begun.
        packages: without which it is not begun; by the name that is imported.
    """

    name: str
    module: str
    about: str
    limit: float
    least: float
    packages: tuple[str, ...] = ()


ENGINE = ("msgspec", "structlog", "prometheus_client", "safetensors", "tokenizers", "jinja2")
PARTS = (
    Part("ceilings", "ceilings", "copy bandwidth, bf16 GEMM rate", 25, 5),
    Part("kernels", "cases", "every kernel against float64, and against the host shim", 70, 15, ("cupy",)),
    Part("parity", "parity", "whole models against transformers; overlap on = off", 50, 20,
         ("cupy", "transformers", *ENGINE)),
    Part("attention", "attention", "decode and prefill attention, cold L2, beside torch SDPA", 60, 20, ("cupy",)),
    Part("ops", "small", "the other kernels in percent of their floors; launch overhead", 35, 10, ("cupy",)),
    Part("steps-8b", "steps", "decode graph and prefill of Llama-3.1-8B, launches per layer", 50, 25,
         ("cupy", "msgspec", "safetensors")),
    Part("steps-7b", "steps", "decode graph and prefill of Llama-2-7B", 45, 25, ("cupy", "msgspec", "safetensors")),
    Part("steps-int", "steps", "the same of Llama-3.1-8B with int8, int4 and FP8 weights", 40, 20,
         ("cupy", "msgspec", "safetensors")),
    Part("engine", "engine", "the whole engine: tokens/s, first token, interference, GPU busy", 75, 35,
         ("cupy", *ENGINE)),
    Part("peer", "peer", "transformers' continuous batching under the engine's load", 50, 30,
         ("cupy", "transformers", *ENGINE)),
    Part("sanitizer", "sanitizer", "compute-sanitizer over small cases", 40, 20, ("cupy",)),
)  # fmt: skip
BY_NAME = {part.name: part for part in PARTS}


class Outcome(NamedTuple):
    """How a part ended.

    Attributes:
        state: "ok"; "failed" with a reason; "skipped" with a reason, before it began.
        seconds: that it took.
    """

    name: str
    state: Literal["ok", "failed", "skipped"]
    reason: str = ""
    seconds: float = 0.0


def choose(names: Sequence[str]) -> tuple[Part, ...]:
    """The named parts in their usual order, all if none is named; `ceilings` is always there: floors come from it.

    Raises:
        ValueError: an unknown name.
    """
    unknown = [name for name in names if name not in BY_NAME]
    if unknown:
        raise ValueError(f"there is no part {', '.join(unknown)}; there are {', '.join(BY_NAME)}")
    return tuple(part for part in PARTS if not names or part.name in names or part.name == "ceilings")


def missing(packages: Iterable[str]) -> list[str]:
    """Those that cannot be imported."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def run_parts(
    parts: Sequence[Part],
    budget: float,
    run: Callable[[Part, float], Outcome],
    now: Callable[[], float],
    tell: Callable[[str], None],
    lacking: Callable[[Iterable[str]], list[str]] = missing,
) -> list[Outcome]:
    """Runs one part after the other; one that fails does not stop the next.

    Args:
        budget: seconds for all.
        run: (part, seconds that it may take) -> how it ended. An exception of its own counts as a failure.
        tell: takes a line for people.
    """
    start, outcomes = now(), []
    for part in parts:
        left = budget - (now() - start)
        absent = lacking(part.packages)
        if absent:
            outcome = Outcome(part.name, "skipped", f"not installed: {', '.join(absent)}")
        elif left < part.least:
            outcome = Outcome(part.name, "skipped", f"it needs {part.least:.0f} s, and {max(0, left):.0f} s are left")
        else:
            tell(f"== {part.name}: {part.about} ({min(part.limit, left):.0f} s at most)")
            begin = now()
            try:
                outcome = run(part, min(part.limit, left))
            except Exception as error:
                outcome = Outcome(part.name, "failed", f"{type(error).__name__}: {error}")
            outcome = outcome._replace(seconds=now() - begin)
        if outcome.state != "ok":
            tell(f"== {part.name} {outcome.state}: {outcome.reason}")
        outcomes.append(outcome)
    return outcomes
