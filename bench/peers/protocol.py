"""A worker's side of bench/peers_cpu.py: jobs come as JSON lines on stdin, answers go as JSON lines to stdout.

Standard library only, since it runs in every peer's environment. A job is {"prompts": [[id, ...], ...],
"new_tokens": n}; its answer has the keys of `Tally.answer`, or is {"error": text}. The first line that a worker writes
is {"ready": versions} once its model is loaded and warm.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any


class Tally:
    """Token ids as they come out, and when.

    Decoding is what happens once every sequence has its first token, whether an engine computes all prompts before
    or lets the first sequences decode beside the prompts of the last.
    """

    def __init__(self, sequences: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.ids: list[list[int]] = [[] for _ in range(sequences)]
        self._clock = clock
        self._silent = sequences
        self._begin = clock()
        self._started: tuple[float, int] | None = None

    def add(self, sequence: int, *ids: int) -> None:
        """Tokens of one sequence that have just come out; call it as soon as they have."""
        if not ids:
            return
        if not self.ids[sequence]:
            self._silent -= 1
        self.ids[sequence] += ids
        if self._silent == 0 and self._started is None:
            self._started = (self._clock() - self._begin, sum(map(len, self.ids)))

    def answer(self, new_tokens: int) -> dict[str, Any]:
        """Seconds to the end, seconds until every sequence had its first token, tokens out by then, all ids.

        Raises RuntimeError if a sequence has not exactly `new_tokens`.
        """
        seconds = self._clock() - self._begin
        lengths = [len(ids) for ids in self.ids]
        if self._started is None or lengths != [new_tokens] * len(lengths):
            raise RuntimeError(f"{new_tokens} tokens were asked for each sequence, but there are {lengths}")
        started, tokens = self._started
        return {"seconds": seconds, "started": started, "tokens_at_start": tokens, "ids": self.ids}


Generate = Callable[[list[list[int]], int, Tally], None]  # prompts, new tokens of each, what to report to


def serve(load: Callable[[], tuple[Generate, Mapping[str, str]]]) -> None:
    """Loads, runs a small job, says that it is ready, then does one job after another until stdin ends.

    What libraries print goes to stderr: the real stdout belongs to the protocol.
    """
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def reply(message: Mapping[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    def run(prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        tally = Tally(len(prompts))
        generate(prompts, new_tokens, tally)
        return tally.answer(new_tokens)

    try:
        generate, versions = load()
        run([list(range(1000, 1032)), list(range(2000, 2032))], 4)
    except Exception as error:
        reply({"error": f"{type(error).__name__}: {error}"})
        raise
    reply({"ready": dict(versions)})
    for line in sys.stdin:
        try:
            job = json.loads(line)
            reply(run(job["prompts"], job["new_tokens"]))
        except Exception as error:
            reply({"error": f"{type(error).__name__}: {error}"})
