"""The lowest of many items whose keys change all the time, without a look at all of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from heapq import heapify, heappop, heappush, heapreplace
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)
FEW = 64
"""Entries that are kept without a look whether they still mean anything."""


class Lowest(Generic[Item]):
    """
    A heap that is corrected where it is looked at.

    A key may rise without a word; the entry is put right when it comes to the top. A key that falls must be noted. An
    item whose key is None is gone, also without a word. All is amortised logarithmic time.
    """

    __slots__ = ("_heap", "_key", "_look_at", "_notes", "_serials")

    def __init__(self, key: Callable[[Item], tuple[float, int] | None]) -> None:
        self._key = key
        self._heap: list[tuple[tuple[float, int], int, Item]] = []
        self._serials: dict[Item, int] = {}
        """Which of its entries counts, by item; no two entries have one serial."""
        self._notes = 0
        self._look_at = FEW

    def note(self, item: Item) -> None:
        """It came, or its key fell."""
        key = self._key(item)
        if key is None:
            return
        self._notes += 1
        self._serials[item] = self._notes
        heappush(self._heap, (key, self._notes, item))
        if len(self._heap) > self._look_at:
            self._tidy()

    def first(self) -> Item | None:
        """The item with the lowest key; None where there is none."""
        heap = self._heap
        while heap:
            key, serial, item = heap[0]
            if self._serials.get(item) != serial:
                heappop(heap)
                continue
            key_now = self._key(item)
            if key_now is None:
                heappop(heap)
                del self._serials[item]
            elif key_now > key:
                heapreplace(heap, (key_now, serial, item))
            else:
                return item
        return None

    def _tidy(self) -> None:
        live = [(self._key(item), serial, item) for item, serial in self._serials.items()]
        self._heap = [(key, serial, item) for key, serial, item in live if key is not None]
        heapify(self._heap)
        self._serials = {item: serial for _, serial, item in self._heap}
        self._look_at = FEW + 2 * len(self._heap)
