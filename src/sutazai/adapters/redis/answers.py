"""
Answers in Redis: kept until they expire, found by fingerprint, forgotten by tenant, model or tag.

What is kept, each name below `redis.prefix`, with the part in braces choosing the server in a Cluster:

    {generation}:now        which generation of answers counts; a new one forgets all there are
    {FINGERPRINT}:answer:G  an answer of generation G
    {FINGERPRINT}:lead      the token of the gateway that makes it now
    {model NAME}:index:G    the fingerprints of a model's answers by the time they expire; so too tenants and tags
    forgotten               the channel on which gateways tell each other what to forget

An answer is found only with its index entries: they are written first, and what falls out of a full index is deleted.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, suppress

import msgspec

from sutazai.adapters.redis.link import RedisLink, Script
from sutazai.adapters.redis.servers import Client
from sutazai.core.errors import StoreUnavailable
from sutazai.ports.cache import Answer, Forgotten

VERSION = b"\x01"
"""The first byte of an answer; another one for each form that this code could not read."""
GENERATION_S = 1.0
"""How long the generation is taken to be as it was; who heard that all is forgotten asks at once."""
MAX_INDEXED = 50_000
"""Answers of one model, tenant or tag; beyond it those go that would expire first."""
MAX_EVICTED = 16
"""Of these, in one go."""
BATCH = 500
"""Answers that are forgotten in one go."""
FORGET_S = 2.0
"""For one batch: an operator waits, not a request."""
POLL_MIN_S = 0.005
POLL_MAX_S = 0.25
POLL_RATIO = 0.1
"""A follower looks again after a tenth of the time that it waited already, so it is at most a tenth late."""
MAX_LEADS = 10_000
"""Tokens kept of leads that were neither answered nor given up; the oldest go first."""

KEEP = Script("""
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
if redis.call('GET', KEYS[2]) == ARGV[3] then redis.call('DEL', KEYS[2]) end
""")
"""Keep an answer, and end the lead of the one who made it."""

GIVE_UP = Script("""
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
""")
"""End a lead, if it is still that of the one who asks."""

INDEX = Script("""
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
local gone = {}
local over = math.min(redis.call('ZCARD', KEYS[1]) + 1 - ARGV[3], tonumber(ARGV[4]))
if over > 0 and not redis.call('ZSCORE', KEYS[1], ARGV[1]) then
  local popped = redis.call('ZPOPMIN', KEYS[1], over)
  for i = 1, #popped, 2 do gone[#gone + 1] = popped[i] end
end
redis.call('ZADD', KEYS[1], 'GT', now + ARGV[2], ARGV[1])
redis.call('PEXPIREAT', KEYS[1], redis.call('ZRANGE', KEYS[1], -1, -1, 'WITHSCORES')[2])
return gone
""")
"""Note a fingerprint in an index; returns those that had to make room for it."""

encode = msgspec.msgpack.Encoder().encode
decode_answer = msgspec.msgpack.Decoder(Answer).decode
decode_forgotten = msgspec.msgpack.Decoder(Forgotten).decode


class RedisAnswerStore:
    """`ports.cache.AnswerStore` in Redis."""

    def __init__(
        self, link: RedisLink, *, max_indexed: int = MAX_INDEXED, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._link = link
        self._max_indexed = max_indexed
        self._clock = clock
        self._channel = link.channel("forgotten")
        self._generation = b""
        self._generation_until = float("-inf")
        self._leads: dict[bytes, bytes] = {}
        self.unreadable = 0
        """Entries that were not understood, and deleted."""

    async def get(self, fingerprint: bytes) -> Answer | None:
        async def command(client: Client) -> bytes | None:
            generation = await self._current(client)
            found: bytes | None = await client.execute_command("GET", self._answer_key(fingerprint, generation))
            return found

        return await self._read(fingerprint, await self._link.ask(command))

    async def put(self, fingerprint: bytes, answer: Answer, *, keep_s: float) -> None:
        keep_ms = max(1, round(keep_s * 1000))
        kept = VERSION + encode(answer)
        token = self._leads.pop(fingerprint, b"")

        async def command(client: Client) -> None:
            generation = await self._current(client)
            # first, so that no answer is ever there that could not be found to be forgotten
            for index in self._indexes(answer, generation):
                gone = await INDEX.run(client, [index], [fingerprint, keep_ms, self._max_indexed, MAX_EVICTED])
                for each in gone:
                    await client.execute_command("UNLINK", self._answer_key(each, generation))
            keys = [self._answer_key(fingerprint, generation), self._lead_key(fingerprint)]
            await KEEP.run(client, keys, [kept, keep_ms, token])

        await self._link.ask(command)

    async def forget(self, what: Forgotten) -> int:
        if what == Forgotten():
            await self._link.ask(self._begin_generation)
            gone = 0
        else:
            gone = await self._forget_some(what)
        await self._link.publish(self._channel, encode(what))
        return gone

    async def forgotten(self) -> AsyncGenerator[Forgotten, None]:
        async with aclosing(self._link.subscribe(self._channel)) as messages:
            async for message in messages:
                what = _understood(message)
                if what == Forgotten():
                    self._generation = b""
                yield what

    async def lead(self, fingerprint: bytes, *, for_s: float) -> bool:
        token = secrets.token_bytes(16)
        for_ms = max(1, round(for_s * 1000))
        key = self._lead_key(fingerprint)
        leads = await self._link.ask(lambda client: client.execute_command("SET", key, token, "NX", "PX", for_ms))
        if leads:
            self._leads[fingerprint] = token
            if len(self._leads) > MAX_LEADS:
                del self._leads[next(iter(self._leads))]
        return bool(leads)

    async def follow(self, fingerprint: bytes, *, within_s: float) -> Answer | None:
        began = self._clock()

        async def command(client: Client) -> list[bytes | None]:
            generation = await self._current(client)
            keys = self._answer_key(fingerprint, generation), self._lead_key(fingerprint)
            found: list[bytes | None] = await client.execute_command("MGET", *keys)
            return found

        while True:
            kept, leader = await self._link.ask(command)
            if leader is None:
                return await self._read(fingerprint, kept)
            waited_s = self._clock() - began
            if waited_s >= within_s:
                return None
            pause_s = min(POLL_MAX_S, max(POLL_MIN_S, waited_s * POLL_RATIO)) * random.uniform(0.8, 1.2)  # noqa: S311
            await asyncio.sleep(min(pause_s, within_s - waited_s))

    async def give_up(self, fingerprint: bytes) -> None:
        token = self._leads.pop(fingerprint, None)
        if token is not None:
            await self._link.run(GIVE_UP, [self._lead_key(fingerprint)], [token])

    # parts

    async def _read(self, fingerprint: bytes, kept: bytes | None) -> Answer | None:
        if kept is None:
            return None
        try:
            if kept[:1] != VERSION:
                raise msgspec.DecodeError
            return decode_answer(kept[1:])
        except msgspec.DecodeError:
            self.unreadable += 1
        key = self._answer_key(fingerprint, self._generation)
        with suppress(StoreUnavailable):  # it will be met again
            await self._link.ask(lambda client: client.execute_command("UNLINK", key))
        return None

    async def _current(self, client: Client) -> bytes:
        """
        The generation of answers that counts.

        A word and not a number: where Redis lost it, a new one cannot be one that was there before.
        """
        now = self._clock()
        if not self._generation or now >= self._generation_until:
            key = self._generation_key()
            found = await client.execute_command("GET", key)
            if found is None:
                await client.execute_command("SET", key, secrets.token_hex(8), "NX")
                found = await client.execute_command("GET", key)
            self._generation, self._generation_until = found, now + GENERATION_S
        return self._generation

    async def _begin_generation(self, client: Client) -> None:
        await client.execute_command("SET", self._generation_key(), secrets.token_hex(8))
        self._generation = b""

    async def _forget_some(self, what: Forgotten) -> int:
        generation = await self._link.ask(self._current)
        named = (("tenant", what.tenant), ("model", what.model), ("tag", what.tag))
        indexes = [self._index_key(kind, name, generation) for kind, name in named if name is not None]
        if what.fingerprint is not None:
            return await self._forget_batch([what.fingerprint], indexes, generation)
        gone, cursor = 0, 0
        while True:
            cursor, batch = await self._scan(indexes[0], cursor)
            gone += await self._forget_batch(batch, indexes, generation)
            if cursor == 0:
                return gone

    async def _scan(self, index: bytes, cursor: int) -> tuple[int, list[bytes]]:
        """Part of an index, and where to go on. Whatever stays in it all the while is met, however it changes."""
        following, scored = await self._link.ask(
            lambda client: client.execute_command("ZSCAN", index, cursor, "COUNT", BATCH), within_s=FORGET_S
        )
        return int(following), [member for member, _ in scored]

    async def _forget_batch(self, batch: Sequence[bytes], indexes: Sequence[bytes], generation: bytes) -> int:
        async def command(client: Client) -> int:
            fingerprints = list(batch)
            for index in indexes:
                if fingerprints:
                    scores = await client.execute_command("ZMSCORE", index, *fingerprints)
                    fingerprints = [each for each, score in zip(fingerprints, scores, strict=True) if score is not None]
            if not fingerprints:
                return 0
            pipeline = client.pipeline(transaction=False)
            for each in fingerprints:
                pipeline.execute_command("UNLINK", self._answer_key(each, generation))
            gone: int = sum(await pipeline.execute())
            for index in indexes:
                await client.execute_command("ZREM", index, *fingerprints)
            return gone

        return await self._link.ask(command, within_s=FORGET_S)

    def _indexes(self, answer: Answer, generation: bytes) -> Iterator[bytes]:
        yield self._index_key("tenant", answer.tenant, generation)
        yield self._index_key("model", answer.model, generation)
        for tag in answer.tags:
            yield self._index_key("tag", tag, generation)

    def _generation_key(self) -> bytes:
        return self._link.key("now", slot="generation")

    def _answer_key(self, fingerprint: bytes, generation: bytes) -> bytes:
        return self._link.key("answer", generation, slot=fingerprint.hex())

    def _lead_key(self, fingerprint: bytes) -> bytes:
        return self._link.key("lead", slot=fingerprint.hex())

    def _index_key(self, kind: str, name: str, generation: bytes) -> bytes:
        return self._link.key("index", generation, slot=f"{kind} {name}")


def _understood(message: bytes | None) -> Forgotten:
    """What to forget; everything where that cannot be known."""
    if message is None:
        return Forgotten()
    try:
        return decode_forgotten(message)
    except msgspec.DecodeError:
        return Forgotten()
