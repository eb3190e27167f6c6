"""Prometheus metrics of one runtime, in a registry of its own so that two runtimes in one process stay apart.

What hears of every token is written on one loop and takes no lock.
Gauges are read from their owners when somebody scrapes.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric

from millrace.runtime.types import FinishReason

LATENCY_BUCKETS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    120.0,
    600.0,
)
TOKEN_BUCKETS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)


class StepHistogram:
    """A Prometheus histogram without labels, written on one loop; equal observations of a step are one call."""

    def __init__(self, name: str, documentation: str, bounds: Sequence[float], registry: CollectorRegistry) -> None:
        self._name = name
        self._documentation = documentation
        self._bounds = list(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        registry.register(self)

    def observe(self, value: float, count: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def collect(self) -> Iterable[Metric]:
        cumulated = accumulate(self._counts)
        names = [*(f"{bound:g}" for bound in self._bounds), "+Inf"]
        family = HistogramMetricFamily(self._name, self._documentation)
        family.add_metric([], buckets=list(zip(names, cumulated, strict=True)), sum_value=self._sum)
        yield family


class Tally:
    """A Prometheus counter written on one loop, so without the lock of `Counter`."""

    def __init__(self, name: str, documentation: str, registry: CollectorRegistry) -> None:
        self._count = 0
        registry.register(_ReadCounter(name, documentation, lambda: self._count))

    def inc(self, count: int) -> None:
        self._count += count


class _ReadCounter:
    def __init__(self, name: str, documentation: str, read: Callable[[], float]) -> None:
        self._name = name
        self._documentation = documentation
        self._read = read

    def collect(self) -> Iterable[Metric]:
        yield CounterMetricFamily(self._name, self._documentation, value=self._read())


class Metrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self.requests = Counter(
            "millrace_requests", "Requests by the way they ended", ["finish_reason"], registry=registry
        )
        self.tokens_generated = Tally("millrace_tokens_generated", "Tokens drawn", registry)
        self.prompt_tokens = Counter("millrace_prompt_tokens", "Prompt tokens of ended requests", registry=registry)
        self.time_to_first_token = self._histogram("time_to_first_token_seconds", "Admission to first token")
        self.inter_token = self._histogram("inter_token_latency_seconds", "Time between two tokens of one stream")
        self.request_latency = self._histogram("request_latency_seconds", "Admission to terminal event")
        self.queue_time = self._histogram("queue_time_seconds", "Admission to the first prefill step")
        self.prompt_lengths = self._histogram("prompt_length_tokens", "Length of prompts", TOKEN_BUCKETS)

    def finished(self, reason: FinishReason, seconds: float, prompt_tokens: int) -> None:
        """One request has ended."""
        self.requests.labels(reason.value).inc()
        self.request_latency.observe(seconds)
        self.prompt_tokens.inc(prompt_tokens)
        self.prompt_lengths.observe(prompt_tokens)

    def gauge(self, name: str, documentation: str, read: Callable[[], float]) -> None:
        """A value that its owner knows; read at every scrape."""
        Gauge(f"millrace_{name}", documentation, registry=self._registry).set_function(read)

    def counter(self, name: str, documentation: str, read: Callable[[], float]) -> None:
        """A count that its owner keeps; read at every scrape."""
        self._registry.register(_ReadCounter(f"millrace_{name}", documentation, read))

    def _histogram(self, name: str, documentation: str, bounds: Sequence[float] = LATENCY_BUCKETS) -> StepHistogram:
        return StepHistogram(f"millrace_{name}", documentation, bounds, self._registry)
