"""Counts and times for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from hgrn2.serve.http.engine_thread import EngineState

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
# counts of the engine that only grow, and those that do not
_TOTALS = {
    "num_prompt_tokens": "Tokens of prompts read, without those whose state was reused.",
    "num_reused_tokens": "Tokens of prompts whose state came from the prefix cache.",
}
_GAUGES = {
    "num_running": "Continuations that are decoded.",
    "num_waiting": "Requests whose prompts are not read.",
    "num_free_rows": "Rows without a state.",
    "num_rows": "Rows of states.",
    "prefix_bytes": "Bytes of the prefix cache.",
}


class _EngineCounts(Collector):
    def __init__(self, state: Callable[[], EngineState]):
        self._state = state

    def collect(self) -> Iterator[Metric]:
        state = self._state()
        for name, text in _TOTALS.items():
            yield CounterMetricFamily(_label(name), text, getattr(state, name))
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(_label(name), text, getattr(state, name))


def _label(name: str) -> str:
    return f"hgrn2_{name.removeprefix('num_')}"


class Metrics:
    """Metrics of one server.

    Args:
        state: returns the counts of the engine.

    Attributes:
        mean_seconds: mean time of the last requests.
    """

    def __init__(self, state: Callable[[], EngineState]):
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "hgrn2_http_requests", "Requests by path and status.", ("path", "status"), registry=self.registry
        )
        self.written = Counter("hgrn2_completion_tokens", "Tokens written.", registry=self.registry)
        self.abandoned = Counter("hgrn2_abandoned_requests", "Requests whose client left.", registry=self.registry)
        self.first_token = self._times("hgrn2_time_to_first_token_seconds", "From arrival to the first token.")
        self.per_token = self._times("hgrn2_time_per_token_seconds", "Mean time between tokens of a request.")
        self.whole = self._times("hgrn2_request_seconds", "From arrival to the end.")
        self.mean_seconds = 1.0
        self.registry.register(_EngineCounts(state))

    def observe(self, seconds: float, first_seconds: float | None, num_tokens: int, num_choices: int) -> None:
        """Record a request that ended.

        Args:
            seconds: from its arrival to its end.
            first_seconds: from its arrival to its first token, if there was one.
            num_tokens: tokens written.
            num_choices: continuations, which are written side by side.
        """
        self.whole.observe(seconds)
        self.mean_seconds += 0.1 * (seconds - self.mean_seconds)
        self.written.inc(num_tokens)
        if first_seconds is not None:
            self.first_token.observe(first_seconds)
            if num_tokens > num_choices:
                self.per_token.observe((seconds - first_seconds) / (num_tokens / num_choices - 1))

    def text(self) -> bytes:
        """Return all of them in Prometheus' text format."""
        return generate_latest(self.registry)

    def _times(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, buckets=_SECONDS, registry=self.registry)
