"""
The targets, and whether each was met.

Figures that belong together were measured in the same round, so ratios and differences are taken round by
round; the median of the rounds is the answer. A round that somebody else disturbed is left out. Where too few
are left, or the rest varies too much, the figure is shown but not to be quoted.
"""

from __future__ import annotations

import operator
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from bench.arena import DIRECT, Sample, per_cpu_s
from bench.machine import Memory
from bench.peers import LITELLM, NGINX, OURS, VLLM_ROUTER
from bench.sections import CALM_STREAMS, CONNECTIONS, FIRST_EVENT_STREAMS, FLOOD_STREAMS, LARGE_CONNECTIONS

MIB = 1024 * 1024
_FOREIGN_LIMIT = 0.10
_STEAL_LIMIT = 0.05
_SPREAD_LIMIT = 0.30
"""Largest minus smallest round, as a share of the median or of the limit, whichever is larger."""
_KEPT_LIMIT = 0.6
"""Rounds that must be left, as a share of all."""
_COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


class Goal(msgspec.Struct, frozen=True):
    """What is asked of a figure."""

    text: str
    comparison: str
    """`>=`, `<=`, `>` or `<`."""
    limit: float
    unit: str


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One goal and what was measured."""

    goal: Goal
    median: float | None
    """None where nothing was measured."""
    values: Sequence[float]
    """One for each undisturbed round, or for all rounds where too few were."""
    rounds: int
    """All of them."""
    quiet_rounds: int
    verdict: str
    """`met`, `MISSED`, `too noisy to quote` or `not measured`."""


def is_disturbed(sample: Sample) -> bool:
    """Whether somebody else had a share of the cores that shows in the figures."""
    return sample.foreign_share > _FOREIGN_LIMIT or sample.steal_share > _STEAL_LIMIT


def rows(samples: Sequence[Sample], rest_memory: Mapping[str, Memory]) -> list[Row]:
    """Every goal, in the order of the table."""
    judge = _Judge(samples)
    return [*judge.json(), *judge.streams(), *judge.latency(), *judge.memory(rest_memory)]


def judged(goal: Goal, measured: Sequence[tuple[float, bool]], *, failed: int = 0) -> Row:
    """A row from each round's figure and whether it was quiet; `failed` counts requests without an answer."""
    quiet = [value for value, is_quiet in measured if is_quiet]
    is_noisy = len(quiet) < len(measured) * _KEPT_LIMIT
    values = [value for value, _ in measured] if is_noisy else quiet
    return Row(
        goal=goal,
        median=statistics.median(values) if values else None,
        values=values,
        rounds=len(measured),
        quiet_rounds=len(quiet),
        verdict=_verdict(goal, values, is_noisy=is_noisy, failed=failed),
    )


def _verdict(goal: Goal, values: Sequence[float], *, is_noisy: bool, failed: int) -> str:
    if not values:
        return "not measured"
    if failed:
        return f"MISSED: {failed} failed"
    median = statistics.median(values)
    if is_noisy or max(values) - min(values) > _SPREAD_LIMIT * max(abs(median), goal.limit):
        return "too noisy to quote"
    return "met" if _COMPARISONS[goal.comparison](median, goal.limit) else "MISSED"


@dataclass(frozen=True, slots=True)
class _Judge:
    samples: Sequence[Sample]

    def json(self) -> Iterator[Row]:
        for connections in CONNECTIONS:
            where = f"JSON chat, {connections} connection{'s' * (connections > 1)}: requests/CPU s"
            goals = {
                NGINX: Goal(f"{where}, share of nginx", ">=", 0.5, ""),
                VLLM_ROUTER: Goal(f"{where}, times vllm-router", ">", 1.0, "x"),
                LITELLM: Goal(f"{where}, times LiteLLM", ">=", 300.0, "x"),
            }
            for peer, goal in goals.items():
                yield self._row(goal, "json", connections, peer, _times_per_cpu_s)
        goal = Goal("64 KiB prompts, 32 connections: requests/CPU s, share of nginx", ">=", 0.5, "")
        yield self._row(goal, "large", LARGE_CONNECTIONS, NGINX, _times_per_cpu_s)

    def streams(self) -> Iterator[Row]:
        cpu = Goal("Streams: CPU per relayed event, times nginx", "<=", 1.3, "x")
        relayed = Goal("Streams: events relayed by one core", ">=", 50_000, "/s")
        first = Goal("Streams: added time to first event, p50", "<=", 0.5, "ms")
        calm = Goal("1,000 streams of 10 events/s: added delay, p99", "<", 20.0, "ms")
        yield self._row(cpu, "flood", FLOOD_STREAMS, NGINX, lambda ours, nginx: per_cpu_s(nginx) / per_cpu_s(ours))
        yield self._row(relayed, "flood", FLOOD_STREAMS, OURS, lambda ours, _: ours.rate_per_s)
        yield self._row(
            first,
            "first event",
            FIRST_EVENT_STREAMS,
            DIRECT,
            lambda ours, direct: ours.p50_ms - direct.p50_ms,
        )
        yield self._row(calm, "calm", CALM_STREAMS, DIRECT, lambda ours, direct: ours.p99_ms - direct.p99_ms)

    def latency(self) -> Iterator[Row]:
        p50 = Goal("Half load: added latency, p50", "<", 0.3, "ms")
        p99 = Goal("Half load: added latency, p99", "<", 2.0, "ms")
        yield self._row(p50, "latency", 64, DIRECT, lambda ours, direct: ours.p50_ms - direct.p50_ms)
        yield self._row(p99, "latency", 64, DIRECT, lambda ours, direct: ours.p99_ms - direct.p99_ms)

    def memory(self, rest_memory: Mapping[str, Memory]) -> Iterator[Row]:
        soak = list(self._of("soak", OURS))
        answered = sum(sample.count for sample in soak)
        figures = {
            Goal("Memory at rest", "<=", 64, "MiB"): [rest_memory[OURS].rss_bytes] if OURS in rest_memory else [],
            Goal("Memory with 1,000 open streams", "<", 150, "MiB"): [
                sample.rss_bytes for sample in self._of("memory", OURS)
            ],
            Goal(f"Memory growth over {answered:,} requests", "<=", 4, "MiB"): [
                last.rss_bytes - first.rss_bytes for first, last in zip(soak[:1], soak[-1:], strict=True)
            ],
        }
        for goal, sizes_bytes in figures.items():
            # Memory does not depend on who else is busy.
            yield judged(goal, [(size_bytes / MIB, True) for size_bytes in sizes_bytes])

    def _row(
        self,
        goal: Goal,
        section: str,
        connections: int,
        peer: str,
        value: Callable[[Sample, Sample], float],
    ) -> Row:
        pairs = [
            (ours, other)
            for ours in self._of(section, OURS)
            for other in self._of(section, peer)
            if ours.turn == other.turn and ours.connections == other.connections == connections
        ]
        measured = [
            (value(*pair), not any(map(is_disturbed, pair))) for pair in pairs if all(one.count for one in pair)
        ]
        return judged(goal, measured, failed=sum(ours.failed for ours, _ in pairs))

    def _of(self, section: str, contestant: str) -> Iterator[Sample]:
        return (one for one in self.samples if one.section == section and one.contestant == contestant)


def _times_per_cpu_s(ours: Sample, other: Sample) -> float:
    return per_cpu_s(ours) / per_cpu_s(other)
