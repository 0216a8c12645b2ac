"""
The first tier: answers in this process, within a bound of bytes, in the order in which W-TinyLFU lets them go.

A new answer comes into a small window. Pushed out of it, it stays only where it was asked for more often than those
that it would push out; so a scan of questions that nobody repeats cannot empty the cache, as it empties an LRU. Those
asked for again are protected from those that were not.

Source: Einziger, Friedman and Manes, "TinyLFU", 2017; that a large answer must be wanted more than all the small ones
it replaces: Einziger, Eytan, Friedman and Manes, "Lightweight Robust Size Aware Cache Management", 2022.

Written here because `theine` counts entries and not bytes (one embedding takes 400 bytes, a batch of them megabytes),
starts a thread with an event loop when it is imported, and takes three times as long for a hit.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeAlias

from sutazai.policy.frequency import MOST, Frequency
from sutazai.ports.cache import Answer, Forgotten

WINDOW_SHARE = 0.01
PROTECTED_SHARE = 0.8
"""Of what is not the window."""
ENTRY_BYTES = 450
"""What Python takes for an entry beside the body: measured."""
TYPICAL_BYTES = 2048
"""Sizes the sketch; answers of another size only make its counts more or less exact."""
FADE_AFTER = 10
"""Counts are halved after so many requests for each entry, as in the paper."""


class Kept:
    """One answer with what is known of its use. Times are monotonic seconds."""

    __slots__ = ("answer", "asked", "dead_at", "fresh_until", "hits", "home", "made_at", "renew_at", "size_bytes")

    def __init__(self, answer: Answer, *, made_at: float, fresh_until: float, dead_at: float, renew_at: float) -> None:
        """
        Describe an answer that is to be kept.

        Args:
            dead_at: from here on it is of no use even where no node answers.
            renew_at: from here on it is made anew if it is asked for often.
        """
        self.answer = answer
        self.made_at = made_at
        self.fresh_until = fresh_until
        self.dead_at = dead_at
        self.renew_at = renew_at
        self.hits = 0
        """How often it was given."""
        self.asked = 0
        """How often it was asked for lately, 0 to 15; fades."""
        self.size_bytes = answer.size_bytes + ENTRY_BYTES
        self.home: Segment | None = None


class Segment:
    """A part of the memory: entries from the one used longest ago to the latest."""

    __slots__ = ("entries", "size_bytes")

    def __init__(self) -> None:
        self.entries: Entries = OrderedDict()
        self.size_bytes = 0

    def add(self, key: bytes, kept: Kept) -> None:
        """Put it in as the latest."""
        self.entries[key] = kept
        self.size_bytes += kept.size_bytes
        kept.home = self

    def drop(self, key: bytes, kept: Kept) -> None:
        """Take it out."""
        del self.entries[key]
        self.size_bytes -= kept.size_bytes

    def pop_oldest(self) -> tuple[bytes, Kept]:
        """Take out the one used longest ago."""
        key, kept = self.entries.popitem(last=False)
        self.size_bytes -= kept.size_bytes
        return key, kept


Entries: TypeAlias = OrderedDict[bytes, Kept]


class AnswersInMemory:
    """Answers by fingerprint."""

    def __init__(self, limit_bytes: int) -> None:
        self._window = Segment()
        self._probation = Segment()
        self._protected = Segment()
        self._by_key: dict[bytes, Kept] = {}
        """All of them, in the order in which they were put."""
        self._requests = 0
        self.resize(limit_bytes)

    def resize(self, limit_bytes: int) -> None:
        """Keep within another bound from now on."""
        self.limit_bytes = limit_bytes
        self._window_limit = int(limit_bytes * WINDOW_SHARE)
        self._main_limit = limit_bytes - self._window_limit
        self._protected_limit = int(self._main_limit * PROTECTED_SHARE)
        self._frequency = Frequency(max(1024, min(limit_bytes // TYPICAL_BYTES, 2**20)))
        self._fit(0.0)

    @property
    def size_bytes(self) -> int:
        """What they take, about; never more than the limit."""
        return self._window.size_bytes + self._probation.size_bytes + self._protected.size_bytes

    def __len__(self) -> int:
        return len(self._by_key)

    def get(self, key: bytes) -> Kept | None:
        """The answer, fresh or not; counts as a request for it."""
        self._requests += 1
        kept = self._by_key.get(key)
        if kept is None:
            self._frequency.add(key)
            return None
        if kept.asked < MOST:
            kept.asked += 1
        home = kept.home
        if home is self._probation:
            self._protect(key, kept)
        elif home is not None:
            home.entries.move_to_end(key)
        return kept

    def peek(self, key: bytes) -> Kept | None:
        """The answer, without counting."""
        return self._by_key.get(key)

    def put(self, key: bytes, kept: Kept, now: float) -> None:
        """Keep it, in place of an older one of the same key; it may be let go again at once."""
        old = self._by_key.pop(key, None)
        home = self._window
        if old is not None and old.home is not None:
            home = old.home
            home.drop(key, old)
            kept.asked = old.asked
        else:
            kept.asked = self._frequency.of(key)
        self._by_key[key] = kept
        home.add(key, kept)
        self._fit(now)
        self._fade_sometimes()

    def forget(self, what: Forgotten) -> int:
        """Forget all that is meant; how many there were. Looks at every answer: a few milliseconds for 10,000."""
        meant = [(key, kept) for key, kept in self._by_key.items() if what.covers(key, kept.answer)]
        for key, kept in meant:
            self._remove(key, kept)
        return len(meant)

    def sweep(self, now: float) -> None:
        """Drop what is past all use; stops at the first that is not, for they lie in the order of their making."""
        while self._by_key:
            key, kept = next(iter(self._by_key.items()))
            if kept.dead_at > now:
                return
            self._remove(key, kept)

    # parts

    def _remove(self, key: bytes, kept: Kept) -> None:
        del self._by_key[key]
        if kept.home is not None:
            kept.home.drop(key, kept)

    def _protect(self, key: bytes, kept: Kept) -> None:
        """Asked for again: it is worth more than those that were not."""
        self._probation.drop(key, kept)
        self._protected.add(key, kept)
        while self._protected.size_bytes > self._protected_limit:
            self._probation.add(*self._protected.pop_oldest())

    def _fit(self, now: float) -> None:
        """Move what the window cannot hold on, and let go what there is no room for."""
        while self._window.size_bytes > self._window_limit:
            key, kept = self._window.pop_oldest()
            if self._make_room(kept, now):
                self._probation.add(key, kept)
            else:
                self._let_go(key, kept)
        while self._main_bytes > self._main_limit:
            self._let_go(*(self._probation if self._probation.entries else self._protected).pop_oldest())

    @property
    def _main_bytes(self) -> int:
        return self._probation.size_bytes + self._protected.size_bytes

    def _make_room(self, candidate: Kept, now: float) -> bool:
        """Let others go for this one, where it was asked for more often than all of them together."""
        missing = self._main_bytes + candidate.size_bytes - self._main_limit
        if candidate.size_bytes > self._main_limit:
            return False
        victims: list[bytes] = []
        wanted = 0
        for segment in (self._probation, self._protected):
            for key, kept in segment.entries.items():
                if missing <= 0:
                    break
                if kept.fresh_until > now:  # one past its time is there for bad days only
                    wanted += kept.asked
                if wanted and wanted >= candidate.asked:
                    return False
                victims.append(key)
                missing -= kept.size_bytes
        for key in victims:
            kept = self._by_key[key]
            if kept.home is not None:
                kept.home.drop(key, kept)
            self._let_go(key, kept)
        return True

    def _let_go(self, key: bytes, kept: Kept) -> None:
        del self._by_key[key]
        kept.home = None
        self._frequency.raise_to(key, kept.asked)

    def _fade_sometimes(self) -> None:
        if self._requests < FADE_AFTER * max(len(self._by_key), 1024):
            return
        self._requests = 0
        self._frequency.fade()
        for kept in self._by_key.values():
            kept.asked >>= 1
