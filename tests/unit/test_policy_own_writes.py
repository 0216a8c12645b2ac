"""How far a copy must have come before who wrote reads from it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sutazai.policy.own_writes import OwnWrites

TENANTS = [f"tenant-{number}" for number in range(6)]
KEPT = 3
"""Tenants that are told apart: fewer than there are."""


def test_who_wrote_nothing_reads_from_any_copy() -> None:
    assert OwnWrites().needed("a") == 0


def test_until_the_original_was_looked_at_only_it_will_do() -> None:
    writes = OwnWrites()
    writes.looked(1.0, 100)
    writes.note("a", 2.0)

    assert writes.needed("a") is None
    assert writes.needed("b") == 0

    writes.looked(1.9, 110)  # it may have been there before the write
    assert writes.needed("a") is None

    writes.looked(2.0, 120)
    assert writes.needed("a") == 120


def test_who_was_forgotten_is_held_to_have_written_the_last_that_any_such_one_did() -> None:
    writes = OwnWrites(at_most=2)
    for number, tenant in enumerate(TENANTS[:4]):
        writes.note(tenant, float(number))
        writes.looked(float(number), 10 * number)

    assert [writes.needed(tenant) for tenant in TENANTS[:5]] == [10, 10, 20, 30, 10]


def test_where_too_many_wrote_between_two_looks_nobody_reads_from_copies() -> None:
    writes = OwnWrites(at_most=2)
    for tenant in TENANTS[:3]:
        writes.note(tenant, 1.0)

    assert writes.needed("somebody else") is None

    writes.looked(1.0, 50)
    assert writes.needed("somebody else") == 50


@given(
    steps=st.lists(
        st.one_of(st.tuples(st.just("write"), st.sampled_from(TENANTS)), st.tuples(st.just("look"), st.integers(0, 5))),
        max_size=60,
    )
)
def test_no_copy_that_serves_lacks_a_write_of_its_reader(steps: list[tuple[str, str | int]]) -> None:
    """Whoever wrote and was forgotten, and however long looks took."""
    writes = OwnWrites(at_most=KEPT)
    positions = [0]
    written = dict.fromkeys(TENANTS, 0)
    for now, (_, what) in enumerate(steps, 1):
        positions.append(positions[-1])
        if isinstance(what, str):
            positions[now] += 10
            written[what] = positions[now]
            writes.note(what, float(now))
        else:
            began = max(now - what, 0)
            writes.looked(float(began), positions[began])
        for tenant in TENANTS:
            needed = writes.needed(tenant)
            assert needed is None or needed >= written[tenant]
