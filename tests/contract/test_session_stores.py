"""What every store of sessions does: in memory, in PostgreSQL, and in PostgreSQL with copies in Redis."""

from __future__ import annotations

import asyncio
import secrets
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from tests.redis_servers import PATIENT_S, Servers
from tests.shards import sharded_stores

from sutazai.adapters.postgres.stores import open_stores
from sutazai.adapters.redis.link import open_redis
from sutazai.adapters.redis.sessions import RedisSessionStore
from sutazai.core.errors import Conflict, NotFound
from sutazai.core.session import Message, Session
from sutazai.ports.sessions import SessionStore
from sutazai.settings.model import Database, Redis
from sutazai.settings.secret import Secret
from sutazai.testing.sessions import MemorySessions

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
MANY = 1000


@dataclass(frozen=True, slots=True)
class Place:
    """Where sessions are kept."""

    url: str | None
    """Of PostgreSQL; None = in memory."""
    redis: Redis | None
    shards: Sequence[str] = ()


@pytest.fixture(params=["memory", "postgres", "pgbouncer", "postgres and redis", "two shards"])
def place(request: pytest.FixtureRequest) -> Place:
    """Servers that run. A plain fixture: these start on an event loop of their own."""
    if request.param == "memory":
        return Place(None, None)
    if request.param == "two shards":
        return Place(None, None, tuple(request.getfixturevalue("two_databases")))
    url = str(request.getfixturevalue("pooled_server" if request.param == "pgbouncer" else "server"))
    return Place(url, _redis(request.getfixturevalue("well_redis")) if "redis" in request.param else None)


@pytest.fixture
async def store(place: Place) -> AsyncIterator[SessionStore]:
    """An empty store."""
    if place.shards:
        async with sharded_stores(place.shards) as sharded:
            yield sharded.sessions
        return
    if place.url is None:
        yield MemorySessions()
        return
    await _emptied(place.url)
    async with AsyncExitStack() as stack:
        stores = await stack.enter_async_context(open_stores(Database(url=Secret(place.url)), Path("/nowhere")))
        if place.redis is None:
            yield stores.sessions
        else:
            link = await stack.enter_async_context(open_redis(place.redis))
            yield RedisSessionStore(stores.sessions, link)


@pytest.fixture
async def truth(server: str) -> AsyncIterator[SessionStore]:
    """The store in PostgreSQL, empty, for others to keep copies of."""
    await _emptied(server)
    async with open_stores(Database(url=Secret(server)), Path("/nowhere")) as stores:
        yield stores.sessions


async def _emptied(url: str) -> None:
    connection: Any = await asyncpg.connect(url)
    await connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    await connection.close()


def _redis(well_redis: Callable[[str], Servers]) -> Redis:
    return well_redis("alone").settings(timeout_s=PATIENT_S, prefix=uuid.uuid4().hex[:12])


def session(number: int = 1, *, tenant: str = "acme", ttl_s: float = 60.0, **fields: Any) -> Session:
    """A new session; a higher number is a younger one."""
    usual: dict[str, Any] = {
        "id": f"sess_{number:012x}{secrets.token_hex(10)}",
        "tenant": tenant,
        "model": "llama3",
        "system": "Be brief.",
        "metadata": {"room": "kitchen"},
        "ttl_s": ttl_s,
        "created_at": NOW,
        "expires_at": NOW + timedelta(seconds=ttl_s),
    }
    return Session(**usual | fields)


def message(number: int, text: str = "hi", role: str = "user") -> Message:
    return Message(number=number, role=role, tokens=len(text), body=b'{"content":"%b"}' % text.encode())


async def made(store: SessionStore, number: int = 1, **fields: Any) -> Session:
    new = session(number, **fields)
    assert await store.create(new, at_most=MANY)
    return new


async def turned(store: SessionStore, before: Session, *news: Message, kept: int | None = None) -> Session:
    """The session after a turn that keeps the newest `kept` messages, or all."""
    history = list(await store.history(before))
    stays = history if kept is None else history[len(history) - kept :]
    after = replace(
        before,
        version=before.version + 1,
        messages=len(stays) + len(news),
        expires_at=before.expires_at + timedelta(seconds=1),
    )
    await store.append(after, stays, news)
    return after


async def test_a_new_session_is_there_as_it_was_made(store: SessionStore) -> None:
    new = await made(store, system="Sei kurz. 🙂", metadata={"a": "", "ключ": '"\\\n'})

    assert await store.get("acme", new.id) == new
    assert await store.history(new) == []


async def test_a_session_of_another_tenant_is_not_there(store: SessionStore) -> None:
    new = await made(store)

    assert await store.get("rival", new.id) is None
    assert not await store.delete("rival", new.id)
    assert await store.get("acme", new.id) == new
    with pytest.raises(NotFound):
        await store.append(replace(new, tenant="rival", version=1), [], [message(1)])


async def test_turns_are_kept_in_order_and_byte_for_byte(store: SessionStore) -> None:
    new = await made(store)
    odd = Message(number=2, role="assistant", tokens=3, body=b'{ "content":"\\u0000\xf0\x9f\x99\x82" ,"a":1}')
    first = await turned(store, new, message(1), odd)
    second = await turned(store, first, message(3))

    assert await store.history(second) == [message(1), odd, message(3)]
    assert await store.get("acme", new.id) == second


async def test_what_a_turn_does_not_keep_is_gone(store: SessionStore) -> None:
    new = await made(store)
    first = await turned(store, new, message(1), message(2), message(3))
    second = await turned(store, first, message(4), kept=1)

    assert await store.history(second) == [message(3), message(4)]


async def test_of_two_turns_at_once_one_counts(store: SessionStore) -> None:
    new = await made(store)
    after = replace(new, version=1, messages=1)

    results = await asyncio.gather(
        *(store.append(after, [], [message(1, text)]) for text in "abcd"), return_exceptions=True
    )

    assert sorted(map(type, results), key=str) == sorted([type(None), Conflict, Conflict, Conflict], key=str)
    [kept] = await store.history(after)
    assert results[["a", "b", "c", "d"].index(kept.body.decode()[-3])] is None


async def test_a_turn_on_an_older_version_is_a_conflict_and_changes_nothing(store: SessionStore) -> None:
    new = await made(store)
    after = await turned(store, new, message(1))

    with pytest.raises(Conflict):
        await store.append(replace(after, expires_at=NOW), [], [message(2)])
    assert await store.get("acme", new.id) == after
    assert await store.history(after) == [message(1)]


async def test_a_turn_of_a_deleted_session_is_refused(store: SessionStore) -> None:
    new = await made(store)
    after = await turned(store, new, message(1))
    assert await store.delete("acme", new.id)

    with pytest.raises(NotFound):
        await store.append(replace(after, version=2), [message(1)], [message(2)])
    assert await store.get("acme", new.id) is None
    assert not await store.delete("acme", new.id)


async def test_pages_are_newest_first_without_a_gap_or_a_double(store: SessionStore) -> None:
    all_of_them = [await made(store, number) for number in range(7)]
    await made(store, 3, tenant="rival")
    await made(store, 4, ttl_s=1.0)
    seen: list[Session] = []
    while page := await store.page("acme", now=NOW + timedelta(seconds=5), before=seen[-1].id if seen else "", limit=3):
        seen += page

    assert seen == all_of_them[::-1]


async def test_a_page_goes_on_after_a_session_that_was_deleted(store: SessionStore) -> None:
    one, two, three = [await made(store, number) for number in range(3)]
    await store.delete("acme", two.id)

    assert await store.page("acme", now=NOW, before=three.id, limit=9) == [one]
    assert await store.page("acme", now=NOW, before=two.id, limit=9) == [one]


async def test_a_tenant_has_no_more_sessions_than_it_may_however_many_ask_at_once(store: SessionStore) -> None:
    await made(store, 1, tenant="rival")
    results = await asyncio.gather(*(store.create(session(number), at_most=3) for number in range(8)))

    assert sum(results) == 3
    assert len(await store.page("acme", now=NOW, before="", limit=99)) == 3


async def test_a_session_past_its_time_makes_room_for_another(store: SessionStore) -> None:
    await made(store, 1, ttl_s=5.0)
    later = NOW + timedelta(seconds=5)

    assert await store.create(session(2, created_at=later, expires_at=later + timedelta(seconds=9)), at_most=1)


async def test_a_sweep_forgets_what_is_over_and_no_more_than_it_was_told(store: SessionStore) -> None:
    old = [await made(store, number, ttl_s=float(number)) for number in range(1, 6)]
    await turned(store, old[0], message(1))
    lives = await made(store, 9, ttl_s=1000.0)
    then = NOW + timedelta(seconds=100)

    assert [await store.sweep(then, limit=3), await store.sweep(then, limit=3)] == [3, 2]
    assert await store.sweep(then, limit=3) == 0
    assert [await store.get("acme", one.id) for one in old] == [None] * 5
    assert await store.get("acme", lives.id) == lives


async def test_sweeps_at_once_count_each_session_once(store: SessionStore) -> None:
    for number in range(1, 21):
        await made(store, number, ttl_s=1.0)

    counts = await asyncio.gather(*(store.sweep(NOW + timedelta(seconds=9), limit=10) for _ in range(4)))

    assert sum(counts) + await store.sweep(NOW + timedelta(seconds=9), limit=99) == 20


# copies in Redis


async def test_a_copy_saves_reading_and_is_never_older_than_the_session(
    truth: SessionStore, well_redis: Callable[[str], Servers]
) -> None:
    """A turn that one gateway could not write through is found by its version."""
    async with open_redis(_redis(well_redis)) as link:
        copies = RedisSessionStore(truth, link)
        first = await turned(copies, await made(copies), message(1))

        assert await copies.history(first) == [message(1)]
        assert (copies.hits, copies.misses) == (1, 0)

        second = await turned(truth, first, message(2))
        assert await copies.history(second) == [message(1), message(2)]
        assert (copies.hits, copies.misses) == (1, 1)
        assert await copies.history(second) == [message(1), message(2)]
        assert (copies.hits, copies.misses) == (2, 1)


@pytest.mark.parametrize("rubbish", [b"", b"\xc1", b"\x92\x01\x02", b"\x92\x01\x91\x94\x01\xa1\xff\x02\xc4\x01x"])
async def test_a_copy_that_is_none_is_read_anew(
    truth: SessionStore, well_redis: Callable[[str], Servers], rubbish: bytes
) -> None:
    async with open_redis(_redis(well_redis)) as link:
        copies = RedisSessionStore(truth, link)
        first = await turned(copies, await made(copies), message(1))
        key = link.key("session", "acme", slot=first.id)
        await link.ask(lambda client: client.execute_command("SET", key, rubbish))

        assert await copies.history(first) == [message(1)]


async def test_copies_fade_and_go_with_their_session(truth: SessionStore, well_redis: Callable[[str], Servers]) -> None:
    async with open_redis(_redis(well_redis)) as link:
        copies = RedisSessionStore(truth, link)
        short = await turned(copies, await made(copies, 1, ttl_s=60.0), message(1))
        long = await turned(copies, await made(copies, 2, ttl_s=1e6), message(1))
        keys = [link.key("session", "acme", slot=one.id) for one in (short, long)]

        left_s = await link.ask(lambda client: client.execute_command("TTL", keys[0]))
        longest_s = await link.ask(lambda client: client.execute_command("TTL", keys[1]))
        assert 50 <= left_s <= 60
        assert 3500 <= longest_s <= 3600
        await copies.delete("acme", short.id)
        assert await link.ask(lambda client: client.execute_command("EXISTS", keys[0])) == 0


@pytest.mark.parametrize("trouble", ["killed", "flushed"])
async def test_without_its_copies_everything_goes_on(truth: SessionStore, redis_alone: Servers, trouble: str) -> None:
    async with open_redis(redis_alone.settings()) as link:
        copies = RedisSessionStore(truth, link)
        first = await turned(copies, await made(copies), message(1))
        if trouble == "killed":
            redis_alone.servers[0].kill()
        else:
            redis_alone.servers[0].cli("FLUSHALL")
        second = await turned(copies, first, message(2))

        assert await copies.history(second) == [message(1), message(2)]
        assert await copies.get("acme", second.id) == second
        assert await copies.delete("acme", second.id)
