"""
With how many slots and threads and how large a batch a node is fastest, found by measuring few of all that there are.

From what the node has now the walk goes along one axis after the other: a step up, and on for as long as that pays;
where it does not, a step down. It ends when a round over the axes moved nothing. Medians of repeated samples are
compared, and a step pays when it gains more than samples of one and the same tuning differ. Of what is equally good,
the cheapest is taken.

Source: Hooke and Jeeves, "Direct search" (1961), its exploratory moves; on axes that are given, so it ends.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

REPEATS = 3
"""Samples of one tuning; the median of three survives one that a neighbour disturbed."""
GAIN = 0.03
"""Of the speed: a smaller difference is noise, whatever the samples say."""
TOO_NOISY = 0.15
"""Samples of one tuning that differ more say that somebody else uses the machine."""
HOPELESS = 0.3
"""A tuning whose first sample is so much slower than where we stand is not measured again."""
ROUNDS = 3
"""Over all axes: the best of one depends on the others, and seldom more than twice."""
GENERATED_SHARE = 0.7
"""What the speed of generation counts; the rest is the speed of reading prompts. People wait for both, and mostly
for the first."""


class Tuning(NamedTuple):
    """How a node is run. The order of the fields is the order in which they are walked along."""

    slots: int
    threads: int
    """0 = left to the node."""
    batch_tokens: int
    """Tokens of prompts that are computed at once; 0 = left to the node."""


class Grid(NamedTuple):
    """The values of each axis that may be tried, each ascending and not empty."""

    slots: tuple[int, ...]
    threads: tuple[int, ...]
    batch_tokens: tuple[int, ...]

    @property
    def most_samples(self) -> int:
        """More are never asked for."""
        points, steps = math.prod(map(len, self)), sum(len(axis) - 1 for axis in self)
        return REPEATS * min(points, 1 + ROUNDS * steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What one measurement gave, in tokens a second; zeros where the node could not be run like that."""

    tuning: Tuning
    generated_per_s: float
    """Of all answers together."""
    prompt_per_s: float

    @property
    def score(self) -> float:
        """The logarithm of the speed, so that differences are ratios and neither kind of token outweighs the other."""
        if self.generated_per_s <= 0 or self.prompt_per_s <= 0:
            return -math.inf
        generated, prompt = math.log(self.generated_per_s), math.log(self.prompt_per_s)
        return GENERATED_SHARE * generated + (1 - GENERATED_SHARE) * prompt


def search(grid: Grid, start: Tuning) -> Generator[Tuning, Sample, None]:
    """
    Give what to measure next, and take the sample of it; ends when nothing is left that may be better.

    The result is `choose` of all samples, at the end as well as at any time before. `start` is on the grid.
    """
    samples: list[Sample] = []
    yield from _measure(start, samples, -math.inf)
    here = start
    for _ in range(ROUNDS):
        before = here
        for axis in range(len(grid)):
            here = yield from _walk(grid, axis, here, samples)
        if here == before:
            return


def choose(samples: Sequence[Sample], start: Tuning) -> Tuning:
    """
    The fastest, or the cheapest of those that are as fast: with the fewest slots, then the fewest threads, then the
    batch nearest to that of `start`.

    What is to take the place of `start` must be faster by more than noise, or cheaper and as fast; the latter counts
    only where samples of one tuning are alike. So it is `start` where nothing was measured often enough.
    """
    believed = [tuning for tuning in _tunings(samples) if len(_scores(samples, tuning)) >= REPEATS]
    if start not in believed:
        return start
    is_quiet = noise(samples) <= TOO_NOISY
    eligible = [
        tuning
        for tuning in believed
        if tuning == start
        or _is_faster(samples, tuning, start)
        or (is_quiet and tuning.slots <= start.slots and tuning.threads <= start.threads)
    ]
    top = _score(samples, _top(samples, eligible))
    as_fast = [tuning for tuning in eligible if _score(samples, tuning) >= top - GAIN]
    return min(as_fast, key=lambda tuning: (*tuning[:2], abs(tuning.batch_tokens - start.batch_tokens)))


def noise(samples: Sequence[Sample]) -> float:
    """Half of how far apart samples of one tuning lie, in the median over all tunings: about one deviation, as a share
    of the speed."""
    repeated = [scores for tuning in _tunings(samples) if len(scores := _scores(samples, tuning)) > 1]
    widths = [max(scores) - min(scores) for scores in repeated if min(scores) > -math.inf]
    return median(widths) / 2 if widths else 0.0


def _walk(grid: Grid, axis: int, start: Tuning, samples: list[Sample]) -> Generator[Tuning, Sample, Tuning]:
    """Along one axis, up or else down; returns where that ended."""
    for step in (1, -1):
        here = start
        while (there := _neighbour(grid, axis, here, step)) is not None:
            yield from _measure(there, samples, _score(samples, here))
            if not _pays(samples, axis, step, here, there):
                break
            here = there
        if here != start:
            return here
    return start


def _pays(samples: Sequence[Sample], axis: int, step: int, here: Tuning, there: Tuning) -> bool:
    """Fewer slots or threads pay when nothing is lost, against the best there is: small losses would add up."""
    if step < 0 and axis != Tuning._fields.index("batch_tokens"):
        top = _top(samples, _tunings(samples))
        return _score(samples, there) >= _score(samples, top) - GAIN
    return _is_faster(samples, there, here)


def _is_faster(samples: Sequence[Sample], one: Tuning, other: Tuning) -> bool:
    """By more than noise."""
    return _score(samples, one) > _score(samples, other) + max(GAIN, noise(samples))


def _measure(tuning: Tuning, samples: list[Sample], standing: float) -> Generator[Tuning, Sample, None]:
    """Sample what was not sampled yet, once where that is hopeless beside the score that we stand at."""
    while len(scores := _scores(samples, tuning)) < REPEATS:
        if scores and scores[0] < standing - HOPELESS:
            return
        sample = yield tuning
        samples.append(sample)


def _neighbour(grid: Grid, axis: int, tuning: Tuning, step: int) -> Tuning | None:
    index = grid[axis].index(tuning[axis]) + step
    if not 0 <= index < len(grid[axis]):
        return None
    values = list(tuning)
    values[axis] = grid[axis][index]
    return Tuning(*values)


def _tunings(samples: Sequence[Sample]) -> Sequence[Tuning]:
    return list(dict.fromkeys(sample.tuning for sample in samples))


def _scores(samples: Sequence[Sample], tuning: Tuning) -> Sequence[float]:
    return [sample.score for sample in samples if sample.tuning == tuning]


def _score(samples: Sequence[Sample], tuning: Tuning) -> float:
    return median(_scores(samples, tuning))


def _top(samples: Sequence[Sample], tunings: Sequence[Tuning]) -> Tuning:
    return max(tunings, key=lambda tuning: _score(samples, tuning))
