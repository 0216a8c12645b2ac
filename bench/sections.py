"""
The parts of a run: which loads, in which order, how often.

In each round every contestant has its turn with the same load (A B C D, A B C D, ...), so that a machine that
grows slower or faster in the meantime does so for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.arena import Arena, Load, Sample, at_rate, closed_loop, per_cpu_s, streaming
from bench.payload import LARGE_BYTES, SMALL_BYTES
from bench.peers import OURS, Contestant, Target
from bench.stream_client import StreamLoad

CONNECTIONS = (1, 32, 256)
LARGE_CONNECTIONS = 32
FLOOD_STREAMS = 272
"""With an event every 5 ms: 54,400 events/s offered, so that a relay of 50,000 shows."""
FIRST_EVENT_STREAMS = 4
CALM_STREAMS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much of everything."""

    rounds: int
    slow_rounds: int
    """For contestants that do a hundred requests a second."""
    seconds: float
    """Of one closed-loop load."""
    stream_seconds: float
    calm_rounds: int
    soak_requests: int


FULL = Plan(rounds=5, slow_rounds=2, seconds=3, stream_seconds=4, calm_rounds=3, soak_requests=1_000_000)
QUICK = Plan(rounds=3, slow_rounds=1, seconds=1, stream_seconds=2, calm_rounds=2, soak_requests=100_000)

_FLOOD_INTERVAL_MS = 5
_SLOW_FLOOD_STREAMS = 16
_CALM_INTERVAL_MS = 100
_MAX_RATE_PER_S = 20_000.0
_SLOW_SECONDS = 5.0
_MAX_SLICES = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Sections:
    """Everything that can be measured on who is there."""

    place: Arena
    contestants: Sequence[Contestant]
    plan: Plan

    def json(self) -> Iterator[Sample]:
        """Closed loop, small requests, few to many connections."""
        for connections in CONNECTIONS:
            yield from self._closed_loop("json", connections, self.place.body(SMALL_BYTES))

    def large(self) -> Iterator[Sample]:
        """Closed loop with prompts of 64 KiB."""
        yield from self._closed_loop("large", LARGE_CONNECTIONS, self.place.body(LARGE_BYTES))

    def streams(self) -> Iterator[Sample]:
        """As many events as a core relays, then the time to a first event, then a thousand calm streams."""
        for turn, contestant in self._turns():
            streams = _SLOW_FLOOD_STREAMS if contestant and contestant.is_slow else FLOOD_STREAMS
            load = self._streaming(contestant, streams=streams, events=1000, interval_ms=_FLOOD_INTERVAL_MS)
            yield self.place.measure("flood", contestant, load, turn=turn)
        for turn, contestant in self._turns():
            load = self._streaming(contestant, streams=FIRST_EVENT_STREAMS, events=3, interval_ms=5)
            yield self.place.measure("first event", contestant, load, turn=turn)
        for turn, contestant in self._turns():
            if turn < self.plan.calm_rounds and not (contestant and contestant.is_slow):
                yield self.place.measure("calm", contestant, self._calm(contestant), turn=turn)

    def latency(self) -> Iterator[Sample]:
        """Open loop at half of what each answers at most, and no more than half of what ours does."""
        rates = {
            contestant.target.name: self._half_load(contestant)
            for contestant in self.contestants
            if contestant.is_alive()
        }
        common = min(rates.get(OURS, _MAX_RATE_PER_S), _MAX_RATE_PER_S)
        for turn, contestant in self._turns():
            rate_per_s = min(common, rates[contestant.target.name]) if contestant else common
            load = at_rate(self._target(contestant), rate_per_s=rate_per_s, seconds=self.plan.stream_seconds)
            yield self.place.measure("latency", contestant, load, turn=turn)

    def memory(self) -> Iterator[Sample]:
        """What a thousand open streams hold in memory."""
        for contestant in self.contestants:
            if contestant.is_alive() and not contestant.is_slow:
                yield self.place.measure("memory", contestant, self._calm(contestant), turn=0)

    def soak(self) -> Iterator[Sample]:
        """Many requests to ours in slices, with the memory of each."""
        body = self.place.body(SMALL_BYTES)
        for contestant in (one for one in self.contestants if one.target.name == OURS):
            answered = 0
            while contestant.is_alive() and answered < self.plan.soak_requests:
                load = closed_loop(contestant.target, connections=64, seconds=self.plan.seconds, body=body)
                sample = self.place.measure("soak", contestant, load, turn=answered)
                yield sample
                # A gateway that answers nothing would go on for ever.
                answered += max(sample.count, self.plan.soak_requests // _MAX_SLICES)

    def _turns(self, *, direct_rounds: int | None = None) -> Iterator[tuple[int, Contestant | None]]:
        """Who is next; None is the stub alone, in all rounds or in the first few."""
        for turn in range(self.plan.rounds):
            if direct_rounds is None or turn < direct_rounds:
                yield turn, None
            for contestant in self.contestants:
                if contestant.is_alive() and (turn < self.plan.slow_rounds or not contestant.is_slow):
                    yield turn, contestant

    def _closed_loop(self, section: str, connections: int, body: Path) -> Iterator[Sample]:
        # One look at the stub alone shows that it is not what limits the others.
        for turn, contestant in self._turns(direct_rounds=1):
            target, seconds = self._target(contestant), self._seconds(contestant, connections)
            load = closed_loop(target, connections=connections, seconds=seconds, body=body)
            yield self.place.measure(section, contestant, load, turn=turn)

    def _target(self, contestant: Contestant | None) -> Target:
        return contestant.target if contestant else self.place.direct

    def _seconds(self, contestant: Contestant | None, connections: int) -> float:
        if contestant is None or not contestant.is_slow:
            return self.plan.seconds
        # At 30 requests/s, time for an answer on every connection.
        return max(_SLOW_SECONDS, connections / 30)

    def _half_load(self, contestant: Contestant) -> float:
        """Requests/s that keep its core half busy."""
        body = self.place.body(SMALL_BYTES)
        load = closed_loop(contestant.target, connections=32, seconds=self._seconds(contestant, 32), body=body)
        return per_cpu_s(self.place.measure("half load", contestant, load, turn=0)) / 2

    def _streaming(
        self,
        contestant: Contestant | None,
        *,
        streams: int,
        events: int,
        interval_ms: int,
        is_timing_events: bool = False,
    ) -> Load:
        target = self._target(contestant)
        load = StreamLoad(
            port=target.port,
            key=target.key,
            streams=streams,
            events=events,
            interval_ms=interval_ms,
            seconds=self.plan.stream_seconds,
            is_timing_events=is_timing_events,
        )
        return streaming(load)

    def _calm(self, contestant: Contestant | None) -> Load:
        return self._streaming(
            contestant,
            streams=CALM_STREAMS,
            events=1000,
            interval_ms=_CALM_INTERVAL_MS,
            is_timing_events=True,
        )
