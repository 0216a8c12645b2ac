"""
Usage, written behind: requests add to counters in memory, and every few seconds the sums go to the store.

While the store is away the counters keep counting. What was taken out for a failed write is put back, so that
nothing is counted twice. Past a bound on rows, further models of a key are counted together.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice

import structlog

from sutazai.core.errors import StoreUnavailable
from sutazai.ports.keys import UsageRow, UsageStore

log = structlog.get_logger("sutazai.ledger")

FLUSH_S = 5.0
MAX_ROWS = 10_000
"""About 5 MB."""
BATCH_ROWS = 1000
"""Rows of one write: a few milliseconds for the store."""
OTHER = "(other)"
"""The model under which rows past the bound are counted."""
MAX_COUNT = 2**53
"""Sums stop here: no key takes so many tokens between two writes, and a lying node must block nobody."""
HOUR_S = 3600

RowKey = tuple[int, str, str, str]
"""Start of the hour in Unix seconds, key id, tenant, model."""


@dataclass(slots=True)
class _Counts:
    requests: int = 0
    errors: int = 0
    input_tokens: int = 0
    output_tokens: int = 0

    def add(self, other: _Counts) -> None:
        self.requests += other.requests
        self.errors += other.errors
        self.input_tokens += other.input_tokens
        self.output_tokens += other.output_tokens


class Ledger:
    """Counts what keys take. `run` writes; `note` never waits."""

    def __init__(self, store: UsageStore, *, wall_s: Callable[[], float], flush_s: float = FLUSH_S) -> None:
        self._store = store
        self._wall_s = wall_s
        """Unix time in seconds: tells which hour a request belongs to."""
        self._flush_s = flush_s
        self._rows: dict[RowKey, _Counts] = {}
        self._hour_s = 0
        self._folding_from_s: int | None = None
        """The hour of all rows past the bound, so that a long outage does not add more and more of them."""
        self._writing = asyncio.Lock()
        self.last_error = ""
        """Why the last write failed; empty when it did not."""

    @property
    def waiting(self) -> int:
        """Rows that are not in the store yet."""
        return len(self._rows)

    def note(self, key_id: str, tenant: str, model: str, *, error: bool, input_tokens: int, output_tokens: int) -> None:
        """Count one request that ended. Below a microsecond, for every request pays it."""
        now_s = self._wall_s()
        if not 0 <= now_s - self._hour_s < HOUR_S:
            self._hour_s = int(now_s) // HOUR_S * HOUR_S
        key = (self._hour_s, key_id, tenant, model)
        counts = self._rows.get(key) or self._row(key)
        counts.requests += 1
        counts.errors += error
        counts.input_tokens += input_tokens
        counts.output_tokens += output_tokens

    async def run(self) -> None:
        """Write every few seconds until cancelled, and then once more."""
        try:
            while True:
                await asyncio.sleep(self._flush_s)
                await self._turn()
        finally:
            await self._turn()
            if self._rows:
                requests = sum(counts.requests for counts in self._rows.values())
                log.error("usage lost", rows=len(self._rows), requests=requests, reason=self.last_error)

    async def flush(self) -> None:
        """
        Write all that was counted. Raises `StoreUnavailable`; what was not written stays and is tried again.

        A cancellation waits for the write under way, which has its own time limit: cut off half way, nobody
        could tell whether it took place.
        """
        async with self._writing:
            taken, self._rows = self._rows, {}
            try:
                while taken:
                    await _uncut(self._write_some(taken))
                self._folding_from_s = None
            finally:
                self._put_back(taken)

    async def _turn(self) -> None:
        try:
            await self.flush()
        except Exception as error:
            if not self.last_error:
                unexpected = not isinstance(error, StoreUnavailable)
                log.warning("usage not written", rows=self.waiting, reason=str(error), exc_info=unexpected)
            self.last_error = str(error)
        else:
            if self.last_error:
                log.info("usage written again")
            self.last_error = ""

    async def _write_some(self, taken: dict[RowKey, _Counts]) -> None:
        batch = list(islice(taken, BATCH_ROWS))
        await self._store.add([_usage_row(key, taken[key]) for key in batch])
        for key in batch:
            del taken[key]

    def _put_back(self, taken: dict[RowKey, _Counts]) -> None:
        news, self._rows = self._rows, taken
        for key, counts in news.items():
            self._row(key).add(counts)

    def _row(self, key: RowKey) -> _Counts:
        """The row to count in: past the bound, one that is shared by all new models of the key."""
        if key not in self._rows and len(self._rows) >= MAX_ROWS:
            if self._folding_from_s is None:
                self._folding_from_s = key[0]
            key = (self._folding_from_s, key[1], key[2], OTHER)
        return self._rows.setdefault(key, _Counts())


def _usage_row(key: RowKey, counts: _Counts) -> UsageRow:
    hour_s, key_id, tenant, model = key
    return UsageRow(
        key_id=key_id,
        tenant=tenant,
        # Names come from clients and nodes, and a store takes neither NUL nor half a character.
        model=model.encode("utf-8", "replace").decode().replace("\0", "?"),
        hour=datetime.fromtimestamp(hour_s, UTC),
        requests=counts.requests,
        errors=counts.errors,
        input_tokens=min(counts.input_tokens, MAX_COUNT),
        output_tokens=min(counts.output_tokens, MAX_COUNT),
    )


async def _uncut(work: Coroutine[None, None, None]) -> None:
    """Await to the end, cancelled or not; a cancellation is raised after it."""
    task = asyncio.create_task(work, name="write usage")
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        task.exception()  # so that nobody complains it was never looked at
        raise cancelled
    task.result()
