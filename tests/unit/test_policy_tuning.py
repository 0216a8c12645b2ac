"""The search for the fastest tuning: it ends, it finds the top of a hill, and noise seldom misleads it."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from sutazai.policy.tuning import REPEATS, TOO_NOISY, Grid, Sample, Tuning, choose, noise, search

GRID = Grid(slots=(1, 2, 4, 8), threads=(1, 2, 3, 4, 6, 8), batch_tokens=(128, 256, 512, 1024, 2048))
START = Tuning(slots=4, threads=3, batch_tokens=2048)
STEP = 0.12
"""A step away from the top of a hill costs at least so much: more than is taken for noise."""

Speed = Callable[[Tuning], float]


def walked(speed: Speed, *, grid: Grid = GRID, start: Tuning = START) -> list[Sample]:
    """All samples of a search over a machine of that speed."""
    samples: list[Sample] = []
    walk = search(grid, start)
    wanted: Tuning | None = next(walk)
    while wanted is not None:
        found = speed(wanted)
        samples.append(Sample(tuning=wanted, generated_per_s=found, prompt_per_s=10 * found))
        try:
            wanted = walk.send(samples[-1])
        except StopIteration:
            wanted = None
    return samples


def chosen(speed: Speed, *, grid: Grid = GRID, start: Tuning = START) -> Tuning:
    return choose(walked(speed, grid=grid, start=start), start)


def hill(top: Tuning, steepness: tuple[float, float, float]) -> Speed:
    """A speed that falls with every step away from the top, on each axis by its own factor."""

    def speed(tuning: Tuning) -> float:
        away = (
            abs(values.index(here) - values.index(there)) for values, here, there in zip(GRID, tuning, top, strict=True)
        )
        return 100 * math.exp(-sum(steps * steep for steps, steep in zip(away, steepness, strict=True)))

    return speed


def noisy(speed: Speed, chance: random.Random) -> Speed:
    """A speed that is measured with a standard deviation of a tenth."""
    return lambda tuning: speed(tuning) * chance.gauss(1, 0.1)


tunings = st.builds(Tuning, *map(st.sampled_from, GRID))
steepnesses = st.tuples(*[st.floats(STEP, 1.0)] * 3)


@given(tunings, tunings, steepnesses)
def test_the_top_of_a_hill_is_found_from_everywhere(
    top: Tuning, start: Tuning, steepness: tuple[float, float, float]
) -> None:
    assert chosen(hill(top, steepness), start=start) == top


@given(tunings, st.randoms(use_true_random=False))
def test_it_ends_whatever_is_measured_and_measures_nothing_too_often(start: Tuning, any_speed: random.Random) -> None:
    samples = walked(lambda _: any_speed.choice([0.0, 1.0, 1.02, 5.0, 1e9]), start=start)

    assert len(samples) <= GRID.most_samples
    assert max(Counter(sample.tuning for sample in samples).values()) <= REPEATS
    assert all(value in values for sample in samples for value, values in zip(sample.tuning, GRID, strict=True))


@given(tunings, steepnesses)
def test_the_same_machine_gets_the_same_tuning(top: Tuning, steepness: tuple[float, float, float]) -> None:
    assert walked(hill(top, steepness)) == walked(hill(top, steepness))


def test_noise_of_a_tenth_seldom_costs_more_than_a_tenth() -> None:
    good, rounds = 0, 300
    for seed in range(rounds):
        chance = random.Random(seed)
        top = Tuning(*map(chance.choice, GRID))
        speed = hill(top, (0.35, 0.35, 0.25))

        found = chosen(noisy(speed, chance))

        good += speed(found) >= 0.9 * speed(top)

    assert good >= 0.85 * rounds


def test_noise_alone_does_not_move_a_flat_machine_to_more_slots_or_threads() -> None:
    grown, rounds = 0, 300
    for seed in range(rounds):
        found = chosen(noisy(lambda _: 100.0, random.Random(seed)))

        grown += found.slots > START.slots or found.threads > START.threads

    assert grown < 0.25 * rounds


def test_of_what_is_as_fast_the_cheapest_is_taken_and_the_batch_stays() -> None:
    found = chosen(lambda _: 100.0)

    assert found == Tuning(slots=1, threads=1, batch_tokens=START.batch_tokens)


def test_losses_too_small_to_notice_do_not_add_up_on_the_way_down() -> None:
    found = chosen(lambda tuning: 100 * 0.98 ** (8 - tuning.threads), start=Tuning(1, 8, 512))

    assert found.threads >= 6


def test_what_cannot_be_run_is_never_taken() -> None:
    found = chosen(lambda tuning: 0.0 if tuning.slots > 4 else 10.0 * tuning.slots)

    assert found.slots == 4


def test_a_machine_that_somebody_else_uses_keeps_what_it_has() -> None:
    speeds = itertools.cycle([100.0, 40.0, 70.0])

    samples = walked(lambda tuning: next(speeds) * (0.9 if tuning == START else 1.0))

    assert noise(samples) > TOO_NOISY
    assert choose(samples, START) == START


def test_a_hopeless_tuning_is_measured_once() -> None:
    samples = walked(lambda tuning: 100.0 if tuning == START else 1.0)

    counts = Counter(sample.tuning for sample in samples)
    assert counts.pop(START) == REPEATS
    assert set(counts.values()) == {1}


def test_without_enough_samples_all_stays_as_it_is() -> None:
    samples = walked(hill(Tuning(8, 4, 512), (0.3, 0.3, 0.3)))

    assert choose(samples[: REPEATS - 1], START) == START
    assert choose([], START) == START


def test_a_grid_of_one_point_is_measured_and_kept() -> None:
    grid, only = Grid((1,), (0,), (0,)), Tuning(1, 0, 0)

    assert chosen(lambda _: 5.0, grid=grid, start=only) == only
    assert len(walked(lambda _: 5.0, grid=grid, start=only)) == grid.most_samples == REPEATS
