"""The slots of tenants and the shards of slots."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from sutazai.policy.sharding import SLOTS, rebalancing, slot_of

SLACK = 0.02
"""Of the slots, beyond one part in N: what the design allows to be moved."""

names = st.lists(st.text("abcdefgh", min_size=1, max_size=3), min_size=1, max_size=12, unique=True)


def test_the_slot_of_a_tenant_never_changes() -> None:
    """It is in the ids of tasks that are kept for years."""
    assert [slot_of(name) for name in ("default", "acme", "Ünïcode")] == [0x37A, 0x822, 0x00B]


def test_tenants_are_spread_over_all_slots() -> None:
    """A hash of many names leaves no slot out, and gives none far more than its part."""
    counts = Counter(slot_of(f"tenant-{number}") for number in range(20 * SLOTS))

    assert len(counts) == SLOTS
    assert max(counts.values()) < 60


def test_shards_that_are_added_one_by_one_take_no_more_than_their_part() -> None:
    """Up to twenty: each takes 1/N of the slots, from old ones alone, and all stay even."""
    owners = dict.fromkeys(range(SLOTS), "shard1")
    for count in range(2, 21):
        shards = [f"shard{number}" for number in range(1, count + 1)]

        moves = rebalancing(owners, shards)

        assert len(moves) <= SLOTS / count + SLACK * SLOTS
        assert {move.target for move in moves} == {shards[-1]}
        assert all(owners[move.slot] == move.source for move in moves)
        owners |= {move.slot: move.target for move in moves}
        counts = Counter(owners.values())
        assert max(counts.values()) - min(counts.values()) <= 1


@settings(max_examples=25, deadline=None)
@given(shards=names, dice=st.randoms(use_true_random=False))
def test_any_table_becomes_even_with_the_fewest_moves(shards: list[str], dice: object) -> None:
    """Whatever was moved by hand before: every slot is moved once at most, and none to a shard that has its part."""
    owners = {slot: dice.choice(shards) for slot in range(SLOTS)}  # type: ignore[attr-defined]
    before = Counter(owners.values())

    moves = rebalancing(owners, shards)

    assert len({move.slot for move in moves}) == len(moves)
    after = Counter((owners | {move.slot: move.target for move in moves}).values())
    assert max(after[shard] for shard in shards) - min(after[shard] for shard in shards) <= 1
    assert len(moves) == sum(max(0, before[shard] - after[shard]) for shard in shards)
    assert rebalancing(owners, list(reversed(shards))) == moves
