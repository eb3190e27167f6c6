"""Slots of host memory for KV blocks of preempted sequences; one slot holds one block of all layers."""

from collections.abc import Iterable, Sequence


class HostSlots:
    """Only ids live here, 0 to num_slots - 1; the memory belongs to the swap lane."""

    def __init__(self, num_slots: int, block_seconds: float) -> None:
        """`block_seconds`: what it takes to copy one block to the host and back."""
        self.num_slots = num_slots
        self.block_seconds = block_seconds
        self._free = list(range(num_slots - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """At most `num_free`."""
        return [self._free.pop() for _ in range(count)]

    def give_back(self, slots: Sequence[int]) -> None:
        self._free.extend(reversed(slots))

    def check(self, holders: Iterable[Iterable[int]]) -> None:
        """Raises AssertionError unless every slot is free or has one holder."""
        held = [slot for slots in holders for slot in slots]
        assert sorted(held + self._free) == list(range(self.num_slots))
