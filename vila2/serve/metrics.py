"""What Prometheus is told: requests by what became of them, tokens, waiting times, and the engine's own counters."""

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OUTCOMES = ("ok", "refused", "busy", "aborted", "failed")
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_ENGINE_COUNTERS = ("steps", "computed_tokens", "images_encoded", "images_shared", "loops_cut", "preemptions")
_STAGES = ("vision", "language", "sample")


class Metrics:
    """`engine` gives the captioner's counters and `inside` the number of requests in the server, when asked."""

    def __init__(self, engine: Callable[[], Mapping[str, float]], inside: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        requests = Counter(
            "vila2_requests", "Chat completions by outcome", ["outcome"], registry=self._registry
        )
        self._outcomes = {name: requests.labels(name) for name in OUTCOMES}
        self.prompt_tokens = Counter(
            "vila2_prompt_tokens", "Prompt tokens of answered requests", registry=self._registry
        )
        self.new_tokens = Counter("vila2_new_tokens", "Tokens written", registry=self._registry)
        self.seconds = Histogram(
            "vila2_request_seconds",
            "From a request's arrival to the end of its answer",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.first_seconds = Histogram(
            "vila2_first_piece_seconds",
            "From a request's arrival to the first piece of a streamed answer",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._registry.register(_Engine(engine, inside))

    def count(self, outcome: str) -> None:
        self._outcomes[outcome].inc()

    def render(self) -> bytes:
        return generate_latest(self._registry)


class _Engine(Collector):
    def __init__(self, engine: Callable[[], Mapping[str, float]], inside: Callable[[], int]) -> None:
        self._engine, self._inside = engine, inside

    def collect(self) -> Iterator[Metric]:
        stats = self._engine()
        for name in _ENGINE_COUNTERS:
            yield CounterMetricFamily(
                f"vila2_engine_{name}", f"The engine's {name.replace('_', ' ')}", stats[name]
            )
        seconds = CounterMetricFamily("vila2_engine_seconds", "The engine's time by stage", labels=["stage"])
        for stage in _STAGES:
            seconds.add_metric([stage], stats[f"{stage}_s"])
        yield seconds
        yield GaugeMetricFamily("vila2_requests_inside", "Requests in the server now", self._inside())
        yield GaugeMetricFamily("vila2_sequences_running", "Sequences being written now", stats["running"])
        yield GaugeMetricFamily(
            "vila2_sequences_queued", "Sequences in the engine's line now", stats["queued"]
        )
