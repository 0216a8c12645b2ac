"""The first tier: within its bytes, and keeping what is asked for."""

from __future__ import annotations

import hashlib
import random
from collections import OrderedDict
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from sutazai.gateway.answers_in_memory import ENTRY_BYTES, AnswersInMemory, Kept
from sutazai.policy.frequency import MOST, Frequency
from sutazai.ports.cache import Answer, Forgotten

NOW = 1000.0
LIMIT_BYTES = 400_000


def kept_of(size_bytes: int = 100, *, fresh_s: float = 60.0, dead_s: float = 660.0, **more: object) -> Kept:
    known = {"node": "a", "model": "m", "tenant": "t", "tags": ()} | more
    answer = Answer(
        status=200,
        content_type=b"application/json",
        parts=(bytes(size_bytes),),
        is_stream=False,
        usage=None,
        made_at=0.0,
        fresh_s=fresh_s,
        **known,  # type: ignore[arg-type]
    )
    return Kept(answer, made_at=NOW, fresh_until=NOW + fresh_s, dead_at=NOW + dead_s, renew_at=NOW + fresh_s)


def key_of(name: object) -> bytes:
    return hashlib.sha256(repr(name).encode()).digest()


def ask(memory: AnswersInMemory, name: object, size_bytes: int = 100) -> bool:
    """Ask for an answer and keep it where it was missing; whether it was there."""
    key = key_of(name)
    if memory.get(key) is not None:
        return True
    memory.put(key, kept_of(size_bytes), NOW)
    return False


class Lru:
    """What the cache is compared with: the same bytes, and the oldest goes."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._sizes: OrderedDict[object, int] = OrderedDict()
        self._size_bytes = 0

    def ask(self, name: object, size_bytes: int) -> bool:
        if name in self._sizes:
            self._sizes.move_to_end(name)
            return True
        size_bytes = kept_of(size_bytes).size_bytes
        self._sizes[name] = size_bytes
        self._size_bytes += size_bytes
        while self._size_bytes > self._limit_bytes:
            self._size_bytes -= self._sizes.popitem(last=False)[1]
        return False


def zipf(chance: random.Random, names: int, exponent: float = 0.9) -> Iterator[int]:
    """Some names often, most of them seldom."""
    weights = [1 / (rank + 1) ** exponent for rank in range(names)]
    while True:
        yield from chance.choices(range(names), weights, k=1000)


def with_scans(chance: random.Random, requests: int) -> Iterator[object]:
    """What people ask, and between it jobs that ask thousands of things once."""
    people = zipf(chance, 5000)
    for number in range(requests):
        is_scan = (number // 2000) % 2 == 1
        yield ("scan", number) if is_scan and number % 5 else next(people)


def hit_ratios(names: Iterator[object]) -> tuple[float, float]:
    """Ours and an LRU's, over what people ask."""
    memory, lru = AnswersInMemory(LIMIT_BYTES), Lru(LIMIT_BYTES)
    ours = theirs = total = 0
    for name in names:
        size_bytes = 50 + int.from_bytes(key_of(name)[:2]) % 400
        one, other = ask(memory, name, size_bytes), lru.ask(name, size_bytes)
        if isinstance(name, int):
            ours, theirs, total = ours + one, theirs + other, total + 1
    assert memory.size_bytes <= LIMIT_BYTES
    return ours / total, theirs / total


def test_a_scan_does_not_push_out_what_people_ask_for() -> None:
    """One that asks for everything once empties an LRU."""
    ours, lru = hit_ratios(with_scans(random.Random(3), 40_000))

    assert ours > lru + 0.1, (ours, lru)
    assert ours > 0.4


def test_without_scans_it_is_no_worse_than_an_lru() -> None:
    people = zipf(random.Random(5), 5000)

    ours, lru = hit_ratios(next(people) for _ in range(20_000))

    assert ours > lru, (ours, lru)


def test_it_follows_when_people_ask_for_something_else() -> None:
    """What was asked for often once fades."""
    chance = random.Random(7)
    memory = AnswersInMemory(LIMIT_BYTES)
    names = [name for _, name in zip(range(30_000), zipf(chance, 2000), strict=False)]
    for name in names:
        ask(memory, ("old", name))
    later = [ask(memory, ("new", name)) for name in names]

    assert sum(later[-5000:]) > 0.4 * 5000


@examples(max_examples=60, deadline=None)
@given(
    st.integers(0, 20_000),
    st.lists(
        st.tuples(st.sampled_from(["put", "get", "drop", "sweep", "resize"]), st.integers(0, 12), st.integers(0, 6000)),
        max_size=80,
    ),
)
def test_it_never_takes_more_bytes_than_it_may_and_counts_them_right(
    limit_bytes: int, acts: list[tuple[str, int, int]]
) -> None:
    memory = AnswersInMemory(limit_bytes)
    for act, name, number in acts:
        key = key_of(name)
        if act == "put":
            memory.put(key, kept_of(number, dead_s=number), NOW)
        elif act == "get":
            found = memory.get(key)
            assert (found is None) == (memory.peek(key) is None)
        elif act == "drop":
            memory.forget(Forgotten(fingerprint=key))
            assert memory.peek(key) is None
        elif act == "sweep":
            memory.sweep(NOW + number)
        else:
            memory.resize(number * 3)

        entries = [kept for name in range(13) if (kept := memory.peek(key_of(name))) is not None]
        assert memory.size_bytes == sum(kept.size_bytes for kept in entries)
        assert memory.size_bytes <= memory.limit_bytes
        assert len(memory) == len(entries)


def test_what_fits_is_all_kept() -> None:
    memory = AnswersInMemory(100 * kept_of().size_bytes)
    for name in range(90):
        ask(memory, name)

    assert all(memory.peek(key_of(name)) is not None for name in range(90))


def test_one_that_is_too_large_is_not_kept_and_pushes_nothing_out() -> None:
    memory = AnswersInMemory(50_000)
    ask(memory, "small")
    for _ in range(10):
        ask(memory, "large", 60_000)

    assert memory.peek(key_of("large")) is None
    assert memory.peek(key_of("small")) is not None


def test_no_bytes_keep_nothing() -> None:
    memory = AnswersInMemory(0)
    ask(memory, "a")

    assert len(memory) == memory.size_bytes == 0


def test_one_large_answer_must_be_wanted_more_than_all_that_it_replaces() -> None:
    size_bytes = kept_of().size_bytes
    memory = AnswersInMemory(20 * size_bytes)
    for name in range(19):
        ask(memory, name)
        ask(memory, name)
    large = 9 * size_bytes - ENTRY_BYTES
    for _ in range(3):
        ask(memory, "large", large)
    assert memory.peek(key_of("large")) is None
    while not ask(memory, "large", large) and memory.get(key_of("large")) is None:
        pass

    assert memory.peek(key_of("large")) is not None


def test_what_is_past_its_time_makes_room_first() -> None:
    """It is there for bad days only, however often it was asked for."""
    memory = AnswersInMemory(20 * kept_of().size_bytes)
    for name in range(19):
        ask(memory, name)
        ask(memory, name)
    memory.put(key_of("new"), kept_of(), NOW + 61)

    assert memory.peek(key_of("new")) is not None


def test_an_answer_made_anew_keeps_its_standing_and_replaces_the_old() -> None:
    memory = AnswersInMemory(LIMIT_BYTES)
    ask(memory, "a")
    for _ in range(4):
        ask(memory, "a")
    again = kept_of(300)
    memory.put(key_of("a"), again, NOW)

    assert memory.peek(key_of("a")) is again
    assert again.asked == 5
    assert memory.size_bytes == again.size_bytes


@pytest.mark.parametrize(
    ("what", "left"),
    [
        (Forgotten(), ""),
        (Forgotten(tenant="t"), "c"),
        (Forgotten(model="n"), "ac"),
        (Forgotten(tag="node:x"), "bc"),
        (Forgotten(fingerprint=key_of("a")), "bc"),
        (Forgotten(tenant="t", model="n"), "ac"),
        (Forgotten(tenant="nobody"), "abc"),
    ],
    ids=str,
)
def test_only_what_matches_every_part_is_forgotten(what: Forgotten, left: str) -> None:
    memory = AnswersInMemory(LIMIT_BYTES)
    memory.put(key_of("a"), kept_of(tags=("node:x",)), NOW)
    memory.put(key_of("b"), kept_of(model="n"), NOW)
    memory.put(key_of("c"), kept_of(tenant=""), NOW)

    gone = memory.forget(what)

    assert gone == 3 - len(left)
    assert "".join(name for name in "abc" if memory.peek(key_of(name)) is not None) == left


def test_a_sweep_drops_what_is_of_no_use_any_more() -> None:
    memory = AnswersInMemory(LIMIT_BYTES)
    memory.put(key_of("short"), kept_of(dead_s=10), NOW)
    memory.put(key_of("long"), kept_of(dead_s=1000), NOW)
    memory.sweep(NOW + 11)

    assert memory.peek(key_of("short")) is None
    assert memory.peek(key_of("long")) is not None


@given(st.lists(st.integers(0, 200), max_size=300))
def test_a_count_is_never_too_low(names: list[int]) -> None:
    frequency = Frequency(64)
    for name in names:
        frequency.add(key_of(name))

    for name in set(names):
        assert frequency.of(key_of(name)) >= min(MOST, names.count(name))


def test_counts_fade_by_half_and_stop_at_their_most() -> None:
    frequency = Frequency(1024)
    for _ in range(100):
        frequency.add(key_of("often"))
    frequency.raise_to(key_of("seldom"), 3)
    assert (frequency.of(key_of("often")), frequency.of(key_of("seldom"))) == (MOST, 3)
    frequency.fade()

    assert (frequency.of(key_of("often")), frequency.of(key_of("seldom"))) == (MOST // 2, 1)


def test_few_counts_are_too_high() -> None:
    frequency = Frequency(4096)
    for name in range(2000):
        frequency.add(key_of(name))

    assert sum(frequency.of(key_of(name)) > 1 for name in range(2000)) < 40
    assert sum(frequency.of(key_of(("other", name))) > 0 for name in range(2000)) < 200
