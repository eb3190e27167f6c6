"""The plan of a run and the run itself: engines take turns at every load, so that a disturbance meets all of them."""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from peers.engines import Engine
from peers.worker import WorkerError


@dataclass(frozen=True)
class Load:
    """Prompts sent at once. `rate` is of decoding, or of the prompt where one token is asked for."""

    name: str
    sequences: int
    prompt: int
    new_tokens: int

    def prompts(self, seed: int) -> list[list[int]]:
        draw = random.Random(f"{self.name} {seed}")
        return [[draw.randrange(1000, 100_000) for _ in range(self.prompt)] for _ in range(self.sequences)]

    def rate(self, answer: dict[str, Any]) -> float:
        """Tokens per second: of decoding once every sequence has its first token; of the prompt for one new token."""
        if self.new_tokens == 1:
            return self.prompt * self.sequences / answer["started"]
        tokens = self.sequences * self.new_tokens - answer["tokens_at_start"]
        return tokens / (answer["seconds"] - answer["started"])


LOADS = (
    Load("batch 1", 1, 128, 64),
    Load("batch 8", 8, 128, 64),
    Load("batch 16", 16, 128, 64),
    Load("prefill 512", 1, 512, 1),
)


_WARMING = 4  # new tokens of a load's first, uncounted run


class Running(Protocol):
    """What peers.worker.Worker has."""

    versions: dict[str, str]

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> dict[str, Any]: ...

    def close(self) -> None: ...


@dataclass
class Samples:
    """Of one precision: answers[label][load], one for each round (None where a round gave none), and what failed.

    `read_rates` are the machine's, by load and round: bytes per second, before the round's first engine of a load.
    """

    answers: dict[str, dict[str, list[dict[str, Any] | None]]] = field(default_factory=dict)
    read_rates: dict[str, list[float]] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def rotated(engines: Sequence[Engine], by: int) -> list[Engine]:
    by %= max(1, len(engines))
    return [*engines[by:], *engines[:by]]


def measure(
    engines: Sequence[Engine],
    start: Callable[[Engine], Running],
    together: bool,
    rounds: int,
    deadline: float,
    told: Callable[[str], None],
    read_rate: Callable[[], float],
    loads: Sequence[Load] = LOADS,
    clock: Callable[[], float] = time.monotonic,
    into: Samples | None = None,
) -> Samples:
    """Every engine does every load once a round, in an order that moves on by one each time.

    Args:
        start: gives a loaded worker, or raises WorkerError.
        together: all engines stay loaded; else each is loaded for its turn, which then is a whole round.
        deadline: by `clock`; nothing new is begun after it.
        read_rate: asked before the engines' turns at a load, since a machine's rate drifts within a run.
        into: what is returned; given, it holds what there is when an interrupt ends the run.

    Every load is run once before its first round counts: engines meet a batch's shape, grow buffers and make contexts
    then. An engine that fails is out for the rest of the run, and `failed` says why.
    """
    samples = Samples() if into is None else into
    samples.answers = {e.label: {load.name: [] for load in loads} for e in engines}
    samples.read_rates = {load.name: [] for load in loads}
    running: dict[str, Running] = {}
    warm: set[tuple[str, str]] = set()  # labels and loads

    def job(engine: Engine, load: Load, number: int) -> None:
        answer = None
        if clock() > deadline:
            samples.failed.setdefault("time", f"ran out in round {number + 1} at {load.name}")
        elif engine.label not in samples.failed:
            try:
                if engine.label not in running:
                    running[engine.label] = start(engine)
                    samples.versions[engine.label] = running[engine.label].versions
                if (engine.label, load.name) not in warm:
                    warm.add((engine.label, load.name))
                    running[engine.label].run(load.prompts(-1), min(load.new_tokens, _WARMING))
                answer = running[engine.label].run(load.prompts(number), load.new_tokens)
                told(f"round {number + 1}, {load.name}: {engine.label}")
            except WorkerError as error:
                samples.failed[engine.label] = f"{load.name}: {error}"
                told(f"{engine.label} is out: {samples.failed[engine.label]}")
                close(engine.label)
        samples.answers[engine.label][load.name].append(answer)

    def close(label: str) -> None:
        warm.difference_update({pair for pair in warm if pair[0] == label})
        if label in running:
            running.pop(label).close()

    try:
        for number in range(rounds):
            for engine, load in turns(engines, loads, number, together):
                if len(samples.read_rates[load.name]) == number:
                    samples.read_rates[load.name].append(read_rate())
                job(engine, load, number)
                if not together and load is loads[-1]:
                    close(engine.label)
    finally:
        for label in list(running):
            close(label)
    return samples


def turns(
    engines: Sequence[Engine], loads: Sequence[Load], number: int, together: bool
) -> Iterator[tuple[Engine, Load]]:
    """The jobs of a round: load by load, or engine by engine where only one is in memory at a time."""
    if together:
        for place, load in enumerate(loads):
            for engine in rotated(engines, number + place):
                yield engine, load
    else:
        for engine in rotated(engines, number):
            for load in loads:
                yield engine, load


def fit_together(engines: Sequence[Engine], weights: int, available: int) -> bool:
    """Whether all of them fit into `available` bytes: their weights, 30 % on top, and 0.7 GB for each."""
    return sum(1.3 * e.bytes_per_weight * weights + 0.7e9 for e in engines) <= available
