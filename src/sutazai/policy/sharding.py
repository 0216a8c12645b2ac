"""
Which shard keeps the data of a tenant.

A tenant has one of `SLOTS` shard slots for ever, by its name. Which shard owns a slot is written in a table, and
changes when slots are moved. A new shard takes slots from the fullest ones, and none is moved between the others: of
a table that was even, one of N shards takes 1/N of the slots.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256

SLOTS = 4096
"""For ever: the slot of a tenant is in the ids of its tasks."""


@dataclass(frozen=True, slots=True)
class SlotMove:
    """A slot that is to go to another shard."""

    slot: int
    source: str
    target: str


@lru_cache(maxsize=1024)
def slot_of(tenant: str) -> int:
    """
    The slot of a tenant: the first 12 bits of SHA-256 of its name in UTF-8.

    The function `sutazai_slot` of the database is the same; a test compares them.
    """
    digest = sha256(tenant.encode()).digest()
    return digest[0] << 4 | digest[1] >> 4


def rebalancing(owners: Mapping[int, str], shards: Collection[str]) -> Sequence[SlotMove]:
    """
    The fewest moves after which no shard has more than one slot more than another; always the same ones.

    Args:
        owners: the shard of each slot, all of them in `shards`.
        shards: those that are to own slots, new ones too.
    """
    owned: dict[str, list[int]] = defaultdict(list)
    for slot, shard in sorted(owners.items()):
        owned[shard].append(slot)
    moves: dict[int, SlotMove] = {}
    while True:
        emptiest = min(sorted(shards), key=lambda shard: len(owned[shard]))
        fullest = max(sorted(shards), key=lambda shard: len(owned[shard]))
        if len(owned[fullest]) - len(owned[emptiest]) <= 1:
            return list(moves.values())
        slot = owned[fullest].pop()
        owned[emptiest].append(slot)
        moves[slot] = SlotMove(slot, owners[slot], emptiest)
