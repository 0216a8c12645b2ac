"""Answers in real Redis servers: what they survive, how they are forgotten, and who makes them."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing, asynccontextmanager, suppress
from typing import TYPE_CHECKING

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.redis_servers import Servers, eventually

from sutazai.adapters.redis.answers import RedisAnswerStore
from sutazai.adapters.redis.link import RedisLink, open_redis
from sutazai.core.errors import StoreUnavailable
from sutazai.core.request import Usage
from sutazai.ports.cache import Answer, Forgotten

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sutazai.settings.model import Redis

TRIAL = Forgotten(tag="does anybody listen?")


async def test_what_one_gateway_kept_another_reads(any_redis: Redis) -> None:
    """Byte for byte, with all that is known of it."""
    async with open_redis(any_redis) as one, open_redis(any_redis) as other:
        kept = answer(parts=(b"data: {}\n\n", b"", bytes(range(256))), is_stream=True, tags=("a", "b"))
        await RedisAnswerStore(one).put(b"f", kept, keep_s=60)

        assert await RedisAnswerStore(other).get(b"f") == kept
        assert await RedisAnswerStore(other).get(b"g") is None


async def test_an_answer_is_gone_after_its_time(any_redis: Redis) -> None:
    """And its index does not stay for longer."""
    async with open_redis(any_redis) as link:
        store = RedisAnswerStore(link)
        await store.put(b"f", answer(), keep_s=0.05)
        await asyncio.sleep(0.1)

        assert await store.get(b"f") is None
        assert await store.forget(Forgotten(model="m")) == 0


async def test_only_what_matches_every_part_is_forgotten(any_redis: Redis) -> None:
    """And it is told how many answers these were."""
    async with open_redis(any_redis) as link:
        store = RedisAnswerStore(link)
        for name, tenant, model, tags in (
            (b"1", "red", "small", ("x",)),
            (b"2", "red", "large", ("x", "y")),
            (b"3", "blue", "small", ()),
            (b"4", "", "small", ("y",)),
        ):
            await store.put(name, answer(tenant=tenant, model=model, tags=tags), keep_s=60)

        assert await store.forget(Forgotten(tenant="red", tag="y")) == 1
        assert await there(store) == {b"1", b"3", b"4"}
        assert await store.forget(Forgotten(fingerprint=b"1", model="large")) == 0
        assert await store.forget(Forgotten(fingerprint=b"1", model="small")) == 1
        assert await store.forget(Forgotten(model="small")) == 2
        assert await there(store) == set()


async def test_thousands_of_answers_are_forgotten_at_once(redis_alone: Servers) -> None:
    """In batches."""
    async with open_redis(redis_alone.settings(timeout_s=2.0)) as link:
        store = RedisAnswerStore(link)
        for number in range(1500):
            await store.put(str(number).encode(), answer(), keep_s=60)

        assert await store.forget(Forgotten(model="m")) == 1500
        assert await link.ask(lambda client: client.keys("*:answer:*")) == []


async def test_everything_is_forgotten_by_all_at_once(any_redis: Redis) -> None:
    """Another gateway, which was told, finds nothing; what is kept afterwards stays."""
    async with open_redis(any_redis) as one, open_redis(any_redis) as other:
        here, away = RedisAnswerStore(one), RedisAnswerStore(other, clock=lambda: 0.0)
        await here.put(b"f", answer(), keep_s=60)
        async with hearing(away, one) as heard:
            assert await away.get(b"f") is not None
            await here.forget(Forgotten())
            await eventually(lambda: Forgotten() in heard)

        assert await away.get(b"f") is None
        assert await here.get(b"f") is None
        await away.put(b"f", answer(), keep_s=60)
        assert await here.get(b"f") is not None


async def test_what_is_forgotten_is_told_as_it_was_said(any_redis: Redis) -> None:
    """To every gateway, the one that forgets too."""
    async with open_redis(any_redis) as one, open_redis(any_redis) as other:
        here, away = RedisAnswerStore(one), RedisAnswerStore(other)
        words = [Forgotten(tenant="a"), Forgotten(model="b", tag="c"), Forgotten(fingerprint=b"\x00\xff")]
        async with hearing(away, one) as there_heard, hearing(here, one) as here_heard:
            for word in words:
                await here.forget(word)
            await eventually(lambda: len(there_heard) == len(here_heard) == len(words))

    assert there_heard == here_heard == words


async def test_a_gateway_that_was_not_told_learns_within_a_second_that_all_is_forgotten(redis_alone: Servers) -> None:
    """It asks again and again which generation counts."""
    async with open_redis(redis_alone.settings()) as one, open_redis(redis_alone.settings()) as other:
        now = 0.0
        here, deaf = RedisAnswerStore(one), RedisAnswerStore(other, clock=lambda: now)
        await deaf.put(b"f", answer(), keep_s=60)
        await here.forget(Forgotten())
        assert await deaf.get(b"f") is not None

        now = 1.0
        assert await deaf.get(b"f") is None


async def test_an_old_generation_does_not_come_back_when_redis_loses_the_new_one(redis_alone: Servers) -> None:
    """As it may in a failover, or when its memory is full."""
    async with open_redis(redis_alone.settings()) as link:
        await RedisAnswerStore(link).put(b"f", answer(), keep_s=60)
        await link.ask(lambda client: client.execute_command("DEL", link.key("now", slot="generation")))

        assert await RedisAnswerStore(link).get(b"f") is None


async def test_an_index_that_is_full_drops_what_would_expire_first_with_its_answer(any_redis: Redis) -> None:
    """So there is never an answer that could not be forgotten by its model."""
    async with open_redis(any_redis) as link:
        store = RedisAnswerStore(link, max_indexed=3)
        for number in range(6):
            await store.put(str(number).encode(), answer(tenant=str(number)), keep_s=100 - number)

        assert await there(store, 6) == {b"0", b"1", b"5"}
        assert await store.forget(Forgotten(model="m")) == 3


@pytest.mark.parametrize("kept", [b"", b"\x01", b"\x02\x80", b"\x01\x80", b"no answer of ours"])
async def test_an_entry_that_is_not_understood_is_a_miss_and_is_deleted(redis_alone: Servers, kept: bytes) -> None:
    """Half an answer, or that of another version."""
    async with open_redis(redis_alone.settings()) as link:
        store = RedisAnswerStore(link)
        await store.put(b"f", answer(), keep_s=60)
        (key,) = await link.ask(lambda client: client.keys("*:answer:*"))
        await link.ask(lambda client: client.set(key, kept))

        assert await store.get(b"f") is None
        assert store.unreadable == 1
        assert not await link.ask(lambda client: client.exists(key))


async def test_one_of_all_gateways_leads_and_the_others_get_its_answer(any_redis: Redis) -> None:
    """As soon as it is there."""
    async with open_redis(any_redis) as link, open_redis(any_redis) as other:
        stores = [RedisAnswerStore(each) for each in (link, link, other, other)]
        leads = [await store.lead(b"f", for_s=5) for store in stores]
        assert leads == [True, False, False, False]

        async with asyncio.TaskGroup() as group:
            followers = [group.create_task(store.follow(b"f", within_s=5)) for store in stores[1:]]
            await asyncio.sleep(0.3)
            began = time.monotonic()
            await stores[0].put(b"f", answer(), keep_s=60)
        assert [follower.result() for follower in followers] == [answer()] * 3
        assert time.monotonic() - began < 0.25
        assert await stores[1].lead(b"f", for_s=5)


async def test_an_answer_that_is_made_anew_is_waited_for_though_there_is_an_old_one(redis_alone: Servers) -> None:
    """Followers want the new one."""
    async with open_redis(redis_alone.settings()) as link:
        store = RedisAnswerStore(link)
        await store.put(b"f", answer(parts=(b"old",)), keep_s=60)
        assert await store.lead(b"f", for_s=5)
        follower = asyncio.create_task(RedisAnswerStore(link).follow(b"f", within_s=5))
        await asyncio.sleep(0.1)
        await store.put(b"f", answer(parts=(b"new",)), keep_s=60)

        assert await follower == answer(parts=(b"new",))


async def test_a_leader_that_gives_up_lets_another_lead(any_redis: Redis) -> None:
    """Who follows gets nothing, at once."""
    async with open_redis(any_redis) as link:
        one, other = RedisAnswerStore(link), RedisAnswerStore(link)
        assert await one.lead(b"f", for_s=60)
        follower = asyncio.create_task(other.follow(b"f", within_s=20))
        await one.give_up(b"f")

        assert await asyncio.wait_for(follower, 2) is None
        assert await other.lead(b"f", for_s=60)


async def test_who_lost_the_lead_does_not_end_that_of_another(redis_alone: Servers) -> None:
    """It took too long; neither giving up nor its answer counts against the new leader."""
    async with open_redis(redis_alone.settings()) as link:
        slow, quick = RedisAnswerStore(link), RedisAnswerStore(link)
        for gives_up in (True, False):
            assert await slow.lead(b"f", for_s=0.02)
            await asyncio.sleep(0.05)
            assert await quick.lead(b"f", for_s=60)
            await (slow.give_up(b"f") if gives_up else slow.put(b"f", answer(), keep_s=60))

            assert not await slow.lead(b"f", for_s=60)
            await quick.give_up(b"f")


async def test_a_leader_that_died_is_waited_for_no_longer_than_its_lead(redis_alone: Servers) -> None:
    """Nor longer than the follower wants."""
    async with open_redis(redis_alone.settings()) as link:
        store = RedisAnswerStore(link)
        await RedisAnswerStore(link).lead(b"f", for_s=0.3)
        began = time.monotonic()
        assert await store.follow(b"f", within_s=0.1) is None
        assert await store.follow(b"f", within_s=10) is None

    assert 0.2 < time.monotonic() - began < 2.0


async def test_a_store_that_is_away_is_told_by_every_method(redis_alone: Servers) -> None:
    """And by nothing but `StoreUnavailable`."""
    async with open_redis(redis_alone.settings(timeout_s=0.02)) as link:
        store = RedisAnswerStore(link)
        await store.lead(b"f", for_s=60)
        redis_alone.servers[0].stall()
        for call in (
            lambda: store.get(b"f"),
            lambda: store.put(b"g", answer(), keep_s=1),
            lambda: store.forget(Forgotten()),
            lambda: store.forget(Forgotten(model="m")),
            lambda: store.lead(b"g", for_s=1),
            lambda: store.follow(b"g", within_s=5),
            lambda: store.give_up(b"f"),
        ):
            began = time.monotonic()
            with pytest.raises(StoreUnavailable):
                await call()
            assert time.monotonic() - began < 0.1
        redis_alone.servers[0].resume()


async def test_a_server_that_came_back_empty_is_just_empty(redis_alone: Servers) -> None:
    """All is missed, and kept anew, scripts included."""
    async with open_redis(redis_alone.settings()) as link:
        store = RedisAnswerStore(link)
        await store.put(b"f", answer(), keep_s=60)
        redis_alone.servers[0].kill()
        redis_alone.servers[0].start()
        await eventually(lambda: missed(store))
        await store.put(b"f", answer(), keep_s=60)

        assert await store.get(b"f") == answer()


async def test_a_full_server_gives_what_it_has_and_keeps_no_more(redis_alone: Servers) -> None:
    """An answer that was not kept is no trouble of Redis."""
    async with open_redis(redis_alone.settings()) as link:
        store = RedisAnswerStore(link)
        await store.put(b"f", answer(), keep_s=60)
        redis_alone.servers[0].cli("CONFIG", "SET", "maxmemory", "100kb")
        for number in range(5):
            with pytest.raises(StoreUnavailable, match="used memory"):
                await store.put(str(number).encode(), answer(), keep_s=60)
            with pytest.raises(StoreUnavailable, match="used memory"):
                await store.lead(b"f", for_s=1)

        assert await store.get(b"f") == answer()
        assert link.is_up


async def test_words_that_are_not_understood_forget_everything(redis_alone: Servers) -> None:
    """A newer gateway may say more than this one knows."""
    async with open_redis(redis_alone.settings()) as link, hearing(RedisAnswerStore(link), link) as heard:
        await link.publish(link.channel("forgotten"), b"\xc1")
        await eventually(lambda: heard == [Forgotten()])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(st.text(max_size=20), min_size=2, max_size=2),
    fingerprints=st.lists(st.binary(min_size=1, max_size=40), min_size=2, max_size=2, unique=True),
)
async def test_names_are_never_taken_for_one_another(
    redis_alone: Servers, names: list[str], fingerprints: list[bytes]
) -> None:
    """Whatever characters they have, a tenant is no tag, and no model but itself is forgotten."""
    async with open_redis(redis_alone.settings()) as link:
        store = RedisAnswerStore(link)
        await store.forget(Forgotten())
        await store.put(fingerprints[0], answer(tenant=names[0], model=names[1]), keep_s=60)
        await store.put(fingerprints[1], answer(tenant=names[1], tags=(names[0],)), keep_s=60)

        assert await store.forget(Forgotten(model=names[1])) == (2 if names[1] == "m" else 1)
        assert await store.get(fingerprints[0]) is None


def answer(
    *,
    parts: tuple[bytes, ...] = (b"{}",),
    is_stream: bool = False,
    model: str = "m",
    tenant: str = "t",
    tags: tuple[str, ...] = (),
) -> Answer:
    """An answer; equal to any other that was made of the same."""
    return Answer(
        status=200,
        content_type=b"application/json",
        parts=parts,
        is_stream=is_stream,
        node="n",
        model=model,
        tenant=tenant,
        usage=Usage(input_tokens=3, output_tokens=5),
        made_at=1.7e9 + 0.25,
        fresh_s=300.0,
        tags=tags,
    )


async def there(store: RedisAnswerStore, count: int = 5) -> set[bytes]:
    """Which of the answers named by digits are there."""
    names = [str(number).encode() for number in range(count)]
    return {name for name in names if await store.get(name) is not None}


async def missed(store: RedisAnswerStore) -> bool:
    """Whether Redis answers, and has nothing."""
    with suppress(StoreUnavailable):
        return await store.get(b"f") is None
    return False


@asynccontextmanager
async def hearing(store: RedisAnswerStore, link: RedisLink) -> AsyncIterator[list[Forgotten]]:
    """What a store hears from now on."""
    heard: list[Forgotten] = []
    listens = False

    async def listen() -> None:
        nonlocal listens
        async with aclosing(store.forgotten()) as words:
            async for word in words:
                listens = True
                heard.extend([word] if word != TRIAL else [])

    async def is_heard() -> bool:
        await link.publish(link.channel("forgotten"), msgspec.msgpack.encode(TRIAL))
        await asyncio.sleep(0.02)
        return listens

    task = asyncio.create_task(listen(), name="listen")
    try:
        await eventually(is_heard, 10)
        yield heard
    finally:
        task.cancel()
        await asyncio.wait([task])
