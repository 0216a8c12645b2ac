"""
How often a key was asked for lately, about: a count-min sketch whose counts fade.

Keys are hashes already (fingerprints), so their own bytes say where their counts stand. A count is never too low,
seldom too high, at most 15: whether something is asked for often or very often makes no difference to a cache.

Source: Cormode and Muthukrishnan, "An improved data stream summary", 2005; the fading is TinyLFU's (Einziger,
Friedman and Manes, 2017).
"""

from __future__ import annotations

from struct import Struct
from typing import Final

MOST: Final = 15
ROWS: Final = 4
_ROW_NUMBERS = Struct(f"<{ROWS}I")
_HALVED = bytes(count >> 1 for count in range(256))


class Frequency:
    """Counts of keys of at least 16 random bytes."""

    def __init__(self, width: int) -> None:
        """Make it for about `width` keys, rounded up to a power of two; it takes four bytes for each."""
        self._mask = (1 << max(4, (width - 1).bit_length())) - 1
        self._counts = bytearray((self._mask + 1) * ROWS)

    def add(self, key: bytes) -> None:
        """It was asked for once more."""
        counts = self._counts
        places = self._places(key)
        least = min([counts[place] for place in places])
        if least < MOST:
            for place in places:
                if counts[place] == least:
                    counts[place] = least + 1

    def of(self, key: bytes) -> int:
        """How often it was asked for, 0 to 15."""
        counts = self._counts
        return min([counts[place] for place in self._places(key)])

    def raise_to(self, key: bytes, count: int) -> None:
        """It was asked for at least so often."""
        counts, count = self._counts, min(count, MOST)
        for place in self._places(key):
            counts[place] = max(counts[place], count)

    def fade(self) -> None:
        """Halve all counts."""
        self._counts = self._counts.translate(_HALVED)

    def _places(self, key: bytes) -> tuple[int, int, int, int]:
        one, two, three, four = _ROW_NUMBERS.unpack_from(key)
        mask = self._mask
        return (one & mask) * ROWS, (two & mask) * ROWS + 1, (three & mask) * ROWS + 2, (four & mask) * ROWS + 3
