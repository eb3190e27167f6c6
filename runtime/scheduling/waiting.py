"""The queue: who waits for a row, in a fixed order, and who has given one up because its reader has stalled."""

import heapq
from collections.abc import Iterator
from itertools import chain

from millrace.runtime.scheduling.records import Request, Sequence


class WaitingQueue:
    """Sequences without a row."""

    def __init__(self) -> None:
        self._heap: list[Sequence] = []
        self._num_stale = 0  # of them have ended
        self._parked: list[Sequence] = []  # paused

    def __len__(self) -> int:
        return len(self._heap) - self._num_stale + len(self._parked)

    def __iter__(self) -> Iterator[Sequence]:
        """In no order, with some that have ended."""
        return chain(self._heap, self._parked)

    def push(self, sequence: Sequence) -> None:
        if sequence.request.paused:
            self._parked.append(sequence)
        else:
            heapq.heappush(self._heap, sequence)

    def head(self) -> Sequence | None:
        """The first who wants to run. Those who have ended while they waited, and those whose readers have stalled, are
        taken out when they come up."""
        while self._heap:
            first = self._heap[0]
            if first.ended:
                self._num_stale -= 1
            elif first.request.paused:
                self._parked.append(first)
            else:
                return first
            heapq.heappop(self._heap)
        return None

    def pop(self) -> None:
        """Takes out what `head` has returned."""
        heapq.heappop(self._heap)

    def resume(self, request: Request) -> None:
        """Its reader reads again: its sequences are in line as before."""
        for sequence in [s for s in self._parked if s.request is request]:
            self._parked.remove(sequence)
            heapq.heappush(self._heap, sequence)

    def remove(self, sequence: Sequence) -> None:
        """One that has just ended."""
        if sequence in self._parked:
            self._parked.remove(sequence)
            return
        self._num_stale += 1
        if 2 * self._num_stale > len(self._heap) + 64:
            self._heap = [waiting for waiting in self._heap if not waiting.ended]
            heapq.heapify(self._heap)
            self._num_stale = 0
