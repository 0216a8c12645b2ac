"""What was served, counted: exact, bounded, and in a form that Prometheus reads."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from sutazai.telemetry.metrics import MAX_SERIES, OTHER, SECONDS, Histogram, Metrics, gauge


def samples(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """The page, read back."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(metrics.page().decode())
        for sample in family.samples
    }


def sample(metrics: Metrics, name: str, **labels: str) -> float:
    return samples(metrics)[name, frozenset(labels.items())]


@given(st.lists(st.floats(0, 1000), max_size=50))
def test_a_histogram_counts_each_value_once_in_its_bucket(values: list[float]) -> None:
    histogram = Histogram(SECONDS)
    for value in values:
        histogram.observe(value)

    assert dict(histogram.cumulative()) == {
        str(bound): sum(value <= bound for value in values) for bound in SECONDS
    } | {"+Inf": len(values)}
    assert histogram.total == pytest.approx(math.fsum(values))


def test_the_page_tells_what_was_counted() -> None:
    metrics = Metrics()
    series = metrics.series("a", "llama3")
    series.statuses[200] = 3
    series.input_tokens, series.output_tokens = 10, 20
    series.ttft.observe(0.3)
    metrics.fault("a", "NodeTimeout")
    metrics.fault("a", "NodeTimeout")

    of = {"node": "a", "gen_ai_request_model": "llama3"}
    assert sample(metrics, "sutazai_requests_total", **of, status="200") == 3
    assert sample(metrics, "gen_ai_server_token_usage_total", **of, gen_ai_token_type="input") == 10
    assert sample(metrics, "gen_ai_server_token_usage_total", **of, gen_ai_token_type="output") == 20
    assert sample(metrics, "gen_ai_server_time_to_first_token_seconds_count", **of) == 1
    assert sample(metrics, "gen_ai_server_time_to_first_token_seconds_bucket", **of, le="0.25") == 0
    assert sample(metrics, "gen_ai_server_time_to_first_token_seconds_bucket", **of, le="0.5") == 1
    assert sample(metrics, "sutazai_node_faults_total", node="a", kind="NodeTimeout") == 2


def test_the_page_of_a_gateway_that_served_nothing_can_be_read() -> None:
    names = {name for name, _ in samples(Metrics())}

    assert {"sutazai_info", "process_open_fds", "python_info"} <= names


@given(st.text(), st.text())
def test_any_names_make_a_page_that_can_be_read(node: str, model: str) -> None:
    metrics = Metrics()
    metrics.series(node, model).statuses[200] = 1
    found = [labels for name, labels in samples(metrics) if name == "sutazai_requests_total"]

    assert len(found) == 1


def test_series_are_bounded_and_nothing_goes_uncounted() -> None:
    metrics = Metrics()
    for number in range(MAX_SERIES + 500):
        statuses = metrics.series("a", f"model-{number}").statuses
        statuses[200] = statuses.get(200, 0) + 1
    for number in range(MAX_SERIES + 500):
        metrics.fault(f"node-{number}", "NodeTimeout")
    lines = metrics.page().decode().splitlines()

    requests = [line for line in lines if line.startswith("sutazai_requests_total{")]
    faults = [line for line in lines if line.startswith("sutazai_node_faults_total{")]
    assert len(requests) == len(faults) == MAX_SERIES + 1
    assert sum(float(line.rsplit(" ", 1)[1]) for line in requests) == MAX_SERIES + 500
    assert [line.rsplit(" ", 1)[1] for line in faults if OTHER in line] == ["500.0"]


def test_gauges_are_read_when_the_page_is_asked_for() -> None:
    metrics = Metrics()
    now = [1.0]

    def read() -> Iterable[Metric]:
        return [gauge("sutazai_waiting", "In line.", [((), now[0])]), gauge("up", "Up.", [(("a",), True)], ("node",))]

    metrics.gauges(read)
    assert sample(metrics, "sutazai_waiting") == 1.0
    now[0] = 7.0

    assert sample(metrics, "sutazai_waiting") == 7.0
    assert sample(metrics, "up", node="a") == 1.0
