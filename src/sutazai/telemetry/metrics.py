"""
What was served, counted.

On the request path these are integers in lists (under a microsecond a request; a client library's histograms would
cost six); prometheus-client gives them their form when somebody asks. Names follow OpenTelemetry's `gen_ai.*`.
Labels are bounded: models and nodes come from the fleet, and past `MAX_SERIES` everything is `(other)`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from sutazai import __version__

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
"""Bounds of time per output token: 1,000 to under one token a second."""
MAX_SERIES = 2000
OTHER = "(other)"


class Histogram:
    """Counts by bound; the last is everything above."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulative(self) -> list[tuple[str, float]]:
        """Buckets as Prometheus wants them: each holds those below."""
        sofar = 0
        buckets: list[tuple[str, float]] = []
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            sofar += count
            buckets.append((bound, sofar))
        return buckets


class Series:
    """One node and model."""

    __slots__ = ("duration", "input_tokens", "output_tokens", "per_token", "statuses", "ttft")

    def __init__(self) -> None:
        self.statuses: dict[int, int] = {}
        self.ttft = Histogram(SECONDS)
        self.per_token = Histogram(TOKEN_SECONDS)
        self.duration = Histogram(SECONDS)
        self.input_tokens = 0
        self.output_tokens = 0


class Metrics:
    """All counters of one gateway."""

    def __init__(self) -> None:
        self._series: dict[tuple[str, str], Series] = {}
        self._faults: dict[tuple[str, str], int] = {}
        self.registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        self.registry.register(_Requests(self._series, self._faults))

    def series(self, node: str, model: str) -> Series:
        """The counters of a node and model; both empty for requests that reached none."""
        series = self._series.get((node, model))
        if series is None:
            key = (node, model) if len(self._series) < MAX_SERIES else (OTHER, OTHER)
            series = self._series.setdefault(key, Series())
        return series

    def fault(self, node: str, kind: str) -> None:
        """An attempt at a node failed."""
        key = (node, kind) if len(self._faults) < MAX_SERIES else (OTHER, kind)
        self._faults[key] = self._faults.get(key, 0) + 1

    def gauges(self, read: Callable[[], Iterable[Metric]]) -> None:
        """Ask `read` for more whenever the page is asked for."""
        self.registry.register(_Read(read))

    def page(self) -> bytes:
        """The page for Prometheus."""
        return generate_latest(self.registry)


class _Read(Collector):
    def __init__(self, read: Callable[[], Iterable[Metric]]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        return self._read()


class _Requests(Collector):
    def __init__(self, series: dict[tuple[str, str], Series], faults: dict[tuple[str, str], int]) -> None:
        self._series = series
        self._faults = faults

    def collect(self) -> Iterable[Metric]:
        names = ["node", "gen_ai_request_model"]
        requests = CounterMetricFamily(
            "sutazai_requests",
            "Inference requests by the status that the client got.",
            labels=[*names, "status"],
        )
        tokens = CounterMetricFamily(
            "gen_ai_server_token_usage", "Tokens read and written.", labels=[*names, "gen_ai_token_type"]
        )
        ttft = HistogramMetricFamily(
            "gen_ai_server_time_to_first_token_seconds",
            "From the request to the first byte of its answer's body.",
            labels=names,
        )
        per_token = HistogramMetricFamily(
            "gen_ai_server_time_per_output_token_seconds",
            "Between tokens of a stream, after the first.",
            labels=names,
        )
        duration = HistogramMetricFamily(
            "gen_ai_server_request_duration_seconds",
            "From the request to the end of its answer.",
            labels=names,
        )
        for (node, model), series in list(self._series.items()):
            labels = [node, model]
            for status, count in series.statuses.items():
                requests.add_metric([*labels, str(status)], count)
            tokens.add_metric([*labels, "input"], series.input_tokens)
            tokens.add_metric([*labels, "output"], series.output_tokens)
            for family, histogram in (
                (ttft, series.ttft),
                (per_token, series.per_token),
                (duration, series.duration),
            ):
                family.add_metric(labels, histogram.cumulative(), histogram.total)
        faults = CounterMetricFamily("sutazai_node_faults", "Attempts that a node failed.", labels=["node", "kind"])
        for (node, kind), count in self._faults.items():
            faults.add_metric([node, kind], count)
        info = InfoMetricFamily("sutazai", "The program.", value={"version": __version__})
        return [requests, tokens, ttft, per_token, duration, faults, info]


def gauge(
    name: str, text: str, samples: Iterable[tuple[tuple[str, ...], float]], labels: tuple[str, ...] = ()
) -> Metric:
    """A gauge of the present moment."""
    family = GaugeMetricFamily(name, text, labels=labels)
    for values, value in samples:
        family.add_metric(list(values), value)
    return family


def counter(
    name: str, text: str, samples: Iterable[tuple[tuple[str, ...], float]], labels: tuple[str, ...] = ()
) -> Metric:
    """Something that only grows while the process lives; `_total` is added to its name."""
    family = CounterMetricFamily(name, text, labels=labels)
    for values, value in samples:
        family.add_metric(list(values), value)
    return family
