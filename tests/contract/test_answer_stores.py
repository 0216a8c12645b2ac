"""What every shared store of answers does: the one in memory, and real Redis alone, with Sentinels, as a Cluster."""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, replace

import pytest
from tests.redis_servers import PATIENT_S, Servers

from sutazai.adapters.redis.answers import RedisAnswerStore
from sutazai.adapters.redis.link import open_redis
from sutazai.core.request import Usage
from sutazai.ports.cache import Answer, AnswerStore, Forgotten
from sutazai.testing.answers import MemoryAnswerStore, Shelf

SOON_S = 5.0
"""Within this things that are to happen have happened, on a busy machine too."""

WHOLE = Answer(
    status=200,
    content_type=b"application/json",
    parts=(b'{"text":"\x00\xff\xc3\xa9"}',),
    is_stream=False,
    node="a",
    model="llama3:latest",
    tenant="acme",
    usage=Usage(3, 4),
    made_at=1_700_000_000.25,
    fresh_s=300.0,
    tags=("node:a", "key:abc"),
)
STREAM = replace(WHOLE, parts=(b"data: 1\n\n", b"data: [DONE]\n\n"), is_stream=True, usage=None, tags=(), tenant="")


@dataclass(slots=True)
class Place:
    """A store, as many gateways as are wanted, and its time."""

    gateway: Callable[[], Awaitable[AnswerStore]]
    """One more gateway's end of the store."""
    pass_s: Callable[[float], Awaitable[None]]


@pytest.fixture(params=["memory", "alone", "sentinel", "cluster"])
async def place(request: pytest.FixtureRequest) -> AsyncIterator[Place]:
    """An empty store."""
    if request.param == "memory":
        yield _in_memory()
        return
    servers: Callable[[str], Servers] = request.getfixturevalue("well_redis")
    settings = servers(request.param).settings(timeout_s=PATIENT_S, prefix=uuid.uuid4().hex[:12])
    async with AsyncExitStack() as stack:

        async def gateway() -> AnswerStore:
            return RedisAnswerStore(await stack.enter_async_context(open_redis(settings)))

        yield Place(gateway, asyncio.sleep)


def _in_memory() -> Place:
    now = [1000.0]
    shelf = Shelf(clock=lambda: now[0])

    async def gateway() -> AnswerStore:
        return MemoryAnswerStore(shelf)

    async def pass_s(by_s: float) -> None:
        now[0] += by_s

    return Place(gateway, pass_s)


@pytest.fixture
async def one(place: Place) -> AnswerStore:
    """One gateway's end."""
    return await place.gateway()


@pytest.fixture
async def other(place: Place) -> AnswerStore:
    """Another gateway's end."""
    return await place.gateway()


def new() -> bytes:
    """A fingerprint that nobody used."""
    return os.urandom(32)


async def test_what_was_put_is_got_by_every_gateway(one: AnswerStore, other: AnswerStore) -> None:
    """Bytes, streams in their parts, and who gave them."""
    whole, stream = new(), new()
    await one.put(whole, WHOLE, keep_s=60)
    await one.put(stream, STREAM, keep_s=60)

    assert [await store.get(whole) for store in (one, other)] == [WHOLE, WHOLE]
    assert [await store.get(stream) for store in (one, other)] == [STREAM, STREAM]


async def test_what_nobody_put_is_not_there(one: AnswerStore) -> None:
    await one.put(new(), WHOLE, keep_s=60)

    assert await one.get(new()) is None


async def test_the_latest_answer_counts(one: AnswerStore, other: AnswerStore) -> None:
    key = new()
    await one.put(key, WHOLE, keep_s=60)
    await other.put(key, STREAM, keep_s=60)

    assert await one.get(key) == STREAM


async def test_an_answer_is_gone_after_its_time(place: Place, one: AnswerStore) -> None:
    short, long = new(), new()
    await one.put(short, WHOLE, keep_s=0.5)
    await one.put(long, WHOLE, keep_s=600)
    await place.pass_s(0.8)

    assert await one.get(short) is None
    assert await one.get(long) == WHOLE


async def test_an_answer_past_its_freshness_is_still_given(one: AnswerStore) -> None:
    """Whoever asks decides what it is worth."""
    key = new()
    old = replace(WHOLE, made_at=time.time() - 3600, fresh_s=1.0)
    await one.put(key, old, keep_s=60)

    assert await one.get(key) == old


@pytest.mark.parametrize(
    ("what", "left"),
    [
        (Forgotten(), ""),
        (Forgotten(tenant="acme"), "c"),
        (Forgotten(tenant=""), "abd"),
        (Forgotten(model="m2"), "acd"),
        (Forgotten(tag="node:x"), "bc"),
        (Forgotten(tenant="acme", model="m2"), "acd"),
        (Forgotten(tenant="acme", tag="node:y"), "acd"),
        (Forgotten(tenant="else"), "abcd"),
        (Forgotten(model="m1", tag="node:y"), "abcd"),
    ],
    ids=str,
)
async def test_only_what_matches_every_part_is_forgotten(
    what: Forgotten, left: str, one: AnswerStore, other: AnswerStore
) -> None:
    answers = {
        "a": replace(WHOLE, tenant="acme", model="m1", tags=("node:x",)),
        "b": replace(WHOLE, tenant="acme", model="m2", tags=("node:y",)),
        "c": replace(WHOLE, tenant="", model="m1", tags=()),
        "d": replace(WHOLE, tenant="acme", model="m1", tags=("node:x", "key:k")),
    }
    keys = {name: new() for name in answers}
    for name, answer in answers.items():
        await one.put(keys[name], answer, keep_s=60)

    gone = await one.forget(what)

    assert "".join([name for name in answers if await other.get(keys[name]) is not None]) == left
    assert gone == len(answers) - len(left) or what == Forgotten()


async def test_one_answer_is_forgotten_by_its_fingerprint(one: AnswerStore, other: AnswerStore) -> None:
    key, kept = new(), new()
    await one.put(key, WHOLE, keep_s=60)
    await one.put(kept, WHOLE, keep_s=60)

    await other.forget(Forgotten(fingerprint=key))

    assert await one.get(key) is None
    assert await one.get(kept) == WHOLE


async def test_every_gateway_hears_what_is_forgotten(one: AnswerStore, other: AnswerStore) -> None:
    """The one who said it too: it need not tell itself in another way."""
    what = Forgotten(tenant="acme", model="m", tag="t", fingerprint=b"\x00" * 32)
    queues: list[asyncio.Queue[Forgotten]] = [asyncio.Queue(), asyncio.Queue()]

    async def listen(store: AnswerStore, heard: asyncio.Queue[Forgotten]) -> None:
        async with aclosing(store.forgotten()) as words:  # type: ignore[type-var]
            async for word in words:
                heard.put_nowait(word)

    async with asyncio.timeout(SOON_S), asyncio.TaskGroup() as group:
        listeners = [group.create_task(listen(store, heard)) for store, heard in zip((one, other), queues, strict=True)]
        for heard in queues:
            while heard.empty():  # a word said before they listened is heard by nobody
                await one.forget(Forgotten(tag="first"))
                await asyncio.sleep(0.01)
        await other.forget(what)
        for heard in queues:
            while await heard.get() != what:
                pass
        for listener in listeners:
            listener.cancel()

    assert all(listener.cancelled() for listener in listeners)


async def test_one_gateway_leads_and_the_others_do_not(one: AnswerStore, other: AnswerStore) -> None:
    key = new()

    assert await one.lead(key, for_s=30)
    assert not await other.lead(key, for_s=30)
    assert not await one.lead(key, for_s=30)
    assert await other.lead(new(), for_s=30)


async def test_of_many_who_want_to_lead_at_once_one_does(place: Place) -> None:
    key = new()
    gateways = [await place.gateway() for _ in range(5)]
    for gateway in gateways:
        await gateway.get(key)  # connected, so that they really meet

    leads = await asyncio.gather(*[gateway.lead(key, for_s=30) for gateway in gateways])

    assert sum(leads) == 1


async def test_a_follower_gets_the_leaders_answer(one: AnswerStore, other: AnswerStore) -> None:
    key = new()
    await one.lead(key, for_s=30)
    async with asyncio.timeout(SOON_S), asyncio.TaskGroup() as group:
        following = group.create_task(other.follow(key, within_s=SOON_S))
        await asyncio.sleep(0.05)
        assert not following.done()
        await one.put(key, WHOLE, keep_s=60)

    assert following.result() == WHOLE
    assert await other.lead(key, for_s=30)


async def test_a_follower_hears_that_the_leader_gave_up_and_another_leads(one: AnswerStore, other: AnswerStore) -> None:
    key = new()
    await one.lead(key, for_s=30)
    async with asyncio.timeout(SOON_S), asyncio.TaskGroup() as group:
        following = group.create_task(other.follow(key, within_s=60))
        await asyncio.sleep(0.05)
        assert not following.done()
        await one.give_up(key)

    assert following.result() is None
    assert await other.lead(key, for_s=30)
    assert not await one.lead(key, for_s=30)


async def test_a_follower_waits_no_longer_than_it_wants_to(one: AnswerStore, other: AnswerStore) -> None:
    key = new()
    await one.lead(key, for_s=30)

    async with asyncio.timeout(SOON_S):
        assert await other.follow(key, within_s=0.05) is None


async def test_nobody_follows_where_nobody_leads(one: AnswerStore) -> None:
    """The leader may have answered, or given up, just before."""
    answered, nothing = new(), new()
    await one.put(answered, WHOLE, keep_s=60)

    async with asyncio.timeout(SOON_S):
        assert await one.follow(answered, within_s=60) == WHOLE
        assert await one.follow(nothing, within_s=60) is None


async def test_a_lead_ends_by_itself(place: Place, one: AnswerStore, other: AnswerStore) -> None:
    """Its gateway may have died; what it says afterwards does not count."""
    key = new()
    await one.lead(key, for_s=0.3)
    await place.pass_s(0.6)

    assert await other.lead(key, for_s=60)
    await one.give_up(key)
    assert not await one.lead(key, for_s=60)


async def test_giving_up_what_one_does_not_lead_changes_nothing(one: AnswerStore, other: AnswerStore) -> None:
    key = new()
    await one.lead(key, for_s=60)
    await other.give_up(key)

    assert not await other.lead(key, for_s=60)
