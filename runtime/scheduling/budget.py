"""The prefill budget: how long a prefill step may keep decoding streams waiting."""

import math


class PrefillBudget:
    """How many prompt tokens one prefill step may hold.

    While sequences decode, a prefill step delays their next token by its own duration, so the chunk is what the
    measured rate allows within the inter-token target. Nobody decoding: the full chunk.
    """

    SMALLEST = 32  # tokens; smaller steps cost more in overhead than they spare in delay

    def __init__(self, most: int, target_seconds: float) -> None:
        self._most = most
        self._target = target_seconds
        self._rate = 0.0  # tokens per second, smoothed

    @property
    def seconds_per_token(self) -> float:
        """What a prompt token costs; infinite until a step was measured."""
        return 1 / self._rate if self._rate else math.inf

    def observe(self, tokens: int, seconds: float) -> None:
        if tokens >= self.SMALLEST and seconds > 0:
            rate = tokens / seconds
            self._rate = rate if self._rate == 0.0 else 0.7 * self._rate + 0.3 * rate

    def tokens(self, *, decoding: bool) -> int:
        if not decoding or self._target == 0 or self._rate == 0:
            return self._most
        return max(self.SMALLEST, min(self._most, int(self._rate * self._target)))
