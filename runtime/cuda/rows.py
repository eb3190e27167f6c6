"""What both streams share of every row on the device: the last token, and who waits for whom before a row changes
hands."""

import threading
from collections.abc import Iterable
from typing import Any

from torch import Tensor


class DeviceRows:
    """The last token of every row, written by sampling and read by the next decode step.

    A row's first token is drawn on the prefill stream and read on the decode stream. The scheduler lets a sequence join
    only when its prefill step has reported, so that order is kept already; the event says it to the device as well, at
    the cost of nothing, and the lanes are right whatever the scheduler does.
    """

    def __init__(self, max_rows: int, last_tokens: Tensor) -> None:
        self.max_rows = max_rows
        self.last_tokens = last_tokens  # [max_rows + 1] int64, one more for padded places; sampling writes it
        self._events: dict[int, Any] = {}
        self._lock = threading.Lock()

    def hand_over(self, rows: Iterable[int], event: Any) -> None:
        """On the prefill lane: what these rows start from is there behind the event."""
        with self._lock:
            self._events.update(dict.fromkeys(rows, event))

    def claim(self, rows: Iterable[int]) -> list[Any]:
        """On the decode lane: events to wait for before these rows are read, each once."""
        with self._lock:
            events = [self._events.pop(row) for row in rows if row in self._events]
        return list({id(event): event for event in events}.values())
