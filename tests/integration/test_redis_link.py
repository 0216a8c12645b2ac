"""Commands, scripts and messages on real servers: one alone, behind Sentinels, in a Cluster."""

from __future__ import annotations

import asyncio
import random
import subprocess
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.redis_servers import PASSWORD, QUOTED, Servers, eventually, free_port, one_redis

from sutazai.adapters.redis.address import parse
from sutazai.adapters.redis.link import RedisLink, Script, open_redis
from sutazai.adapters.redis.servers import Client, servers_at
from sutazai.core.errors import StoreUnavailable
from sutazai.settings.model import Redis
from sutazai.settings.secret import Secret

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

BOTH = Script(
    "redis.call('SET', KEYS[1], ARGV[1]); redis.call('SET', KEYS[2], ARGV[1]); return redis.call('GET', KEYS[2])"
)


async def test_commands_are_answered(any_redis: Redis) -> None:
    """In each arrangement; different keys are on different servers of the Cluster."""
    async with open_redis(any_redis) as link:
        keys = [link.key("n", slot=str(number)) for number in range(50)]
        for number, key in enumerate(keys):
            await set_to(link, key, str(number))

        assert [await get(link, key) for key in keys] == [str(number).encode() for number in range(50)]
        assert (link.is_up, link.failed, link.asked) == (True, 0, 100)


async def test_a_script_may_use_all_keys_of_a_slot(any_redis: Redis) -> None:
    """It is sent again to a server that forgot it."""
    async with open_redis(any_redis) as link:
        keys = [link.key("a", slot="x"), link.key("b", slot="x")]

        assert await link.run(BOTH, keys, ["1"]) == b"1"
        await link.ask(lambda client: client.script_flush())
        assert await link.run(BOTH, keys, ["2"]) == b"2"


async def test_a_message_reaches_all_who_subscribed(any_redis: Redis) -> None:
    """Whichever server of a Cluster each of them is connected to."""
    async with open_redis(any_redis) as one, open_redis(any_redis) as other:
        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            listeners = [group.create_task(first(link, 3)) for link in (one, one, other, other)]
            await eventually(lambda: subscribers(one, 4), 5)
            for word in (b"a", b"b", b"c"):
                await one.publish(one.channel("news"), word)

        assert [listener.result() for listener in listeners] == [[b"a", b"b", b"c"]] * 4


async def test_what_is_given_up_leaves_no_answer_for_others(any_redis: Redis) -> None:
    """Commands are cut by their limit at any moment; whoever asks next gets what is theirs."""
    chance = random.Random(1)
    async with open_redis(any_redis) as link:
        key, nothing = link.key("own", slot="x"), link.key("nothing", slot="x")
        await set_to(link, key, "mine")
        for _ in range(40):
            with suppress(StoreUnavailable):  # the server says so after a hundredth of a second
                limit_s = chance.uniform(0.001, 0.02)
                await link.ask(lambda client: client.execute_command("BLPOP", nothing, 0.01), within_s=limit_s)
            assert [await get(link, key) for _ in range(8)] == [b"mine"] * 8

        assert link.failed > 0


async def test_callers_who_are_cancelled_leave_no_answer_for_others(any_redis: Redis) -> None:
    """Clients hang up while Redis is asked; those who stay get what is theirs."""
    chance = random.Random(1)
    async with open_redis(any_redis) as link:
        keys = {f"{number}".encode(): link.key("own", slot=str(number)) for number in range(20)}
        for value, key in keys.items():
            await set_to(link, key, value)
        for _ in range(50):
            tasks = {asyncio.create_task(get(link, key)): value for value, key in keys.items()}
            for _ in range(chance.randrange(25)):
                await asyncio.sleep(0)
            hung_up = {task for task in chance.sample([*tasks], 10) if task.cancel()}
            await asyncio.wait(tasks)

            assert {task for task in tasks if task.cancelled()} == hung_up, "each hears of it, and nobody else"
            assert all(task.result() == value for task, value in tasks.items() if task not in hung_up)


async def test_more_callers_than_connections_wait_their_turn(redis_alone: Servers) -> None:
    """None is refused for that, and no more connections than that are made."""
    async with open_redis(redis_alone.settings(timeout_s=5.0)) as link:
        key = link.key("a", slot="x")
        await asyncio.gather(*(set_to(link, key, "1") for _ in range(500)))

        clients = await link.ask(lambda client: client.execute_command("CLIENT", "LIST"))
        assert link.failed == 0
        assert 1 < clients.count(b"\n") <= 50


async def test_sentinels_may_ask_for_a_password_too(redis_trio: Servers) -> None:
    """The same one as the servers."""
    for sentinel in redis_trio.sentinels:
        sentinel.cli("SENTINEL", "CONFIG", "SET", "sentinel-pass", PASSWORD, is_sentinel=True)
        sentinel.cli("CONFIG", "SET", "requirepass", PASSWORD, is_sentinel=True)
    async with open_redis(redis_trio.settings()) as link:
        assert link.is_up


async def test_a_server_with_tls_is_reached_when_its_certificate_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default of the system, and not otherwise."""
    port, certificate = free_port(), self_signed(tmp_path)
    options = ("--tls-port", str(port), "--tls-cert-file", f"{certificate}.crt", "--tls-key-file", f"{certificate}.key")
    with one_redis(tmp_path, *options, "--tls-auth-clients", "no"):
        settings = Redis(url=Secret(f"rediss://:{QUOTED}@127.0.0.1:{port}"), timeout_s=1.0)
        async with open_redis(settings) as link:
            assert not link.is_up

        monkeypatch.setenv("SSL_CERT_FILE", f"{certificate}.crt")
        async with open_redis(settings) as link:
            await set_to(link, link.key("a", slot="x"), "1")
            assert await get(link, link.key("a", slot="x")) == b"1"


def test_nothing_that_can_be_printed_holds_the_password() -> None:
    """Neither the link nor what it is made of."""
    settings = Redis(url=Secret("redis+sentinel://user:hunter2@host:1/main"))
    link = RedisLink(servers_at(parse(settings.url or Secret("")), patience_s=settings.timeout_s), settings, "host:1")

    shown = f"{link!r} {link} {link._servers.client!r} {settings!r}"
    assert "hunter2" not in shown


@given(slots=st.lists(st.text() | st.binary(), min_size=2, max_size=2), parts=st.lists(st.text(max_size=5), max_size=3))
def test_keys_of_one_slot_share_what_a_cluster_hashes(slots: Sequence[str | bytes], parts: Sequence[str]) -> None:
    """Whatever the slot is called."""
    link = RedisLink(servers_at(parse(Secret("redis://host")), patience_s=1.0), Redis(), "host")
    one, other = (link.key(*parts, slot=slots[0]), link.key("x", slot=slots[0]))

    assert hashed(one) == hashed(other) != b""
    assert (link.key("x", slot=slots[0]) == link.key("x", slot=slots[1])) == (as_bytes(slots[0]) == as_bytes(slots[1]))


async def test_an_account_with_few_rights_is_enough(redis_alone: Servers) -> None:
    """It may not ask for the role of the server, and is refused what it may not do, without Redis being away."""
    server = redis_alone.servers[0]
    server.cli(
        "ACL", "SETUSER", "gateway", "on", f">{PASSWORD}", "~sutazai:*", "&sutazai:*", "+@all", "-@admin", "-KEYS"
    )
    url = Secret(f"redis://gateway:{QUOTED}@{server.address}")
    async with open_redis(Redis(url=url, timeout_s=0.5)) as link:
        await set_to(link, link.key("a", slot="x"), "1")
        for _ in range(5):
            with pytest.raises(StoreUnavailable, match="refused"):
                await link.ask(lambda client: client.execute_command("KEYS", "*"))

        assert await get(link, link.key("a", slot="x")) == b"1"
        assert (link.is_up, link.refused, link.failed) == (True, 5, 0)


def self_signed(folder: Path) -> Path:
    """A key and a certificate for 127.0.0.1; the path of both, without their endings."""
    made = folder / "tls"
    curve = ["ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    names = ["-days", "2", "-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", *curve, *names, "-keyout", f"{made}.key", "-out", f"{made}.crt"]
    subprocess.run(command, check=True, capture_output=True, timeout=20)
    return made


def as_bytes(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text


def hashed(key: bytes) -> bytes:
    """The part of a key that a Cluster hashes: between the first brace and the next that closes."""
    return key.partition(b"{")[2].partition(b"}")[0]


async def set_to(link: RedisLink, key: bytes, value: str | bytes) -> None:
    await link.ask(lambda client: client.execute_command("SET", key, value))


async def get(link: RedisLink, key: bytes, within_s: float | None = None) -> bytes | None:
    async def command(client: Client) -> bytes | None:
        found: bytes | None = await client.execute_command("GET", key)
        return found

    return await link.ask(command, within_s=within_s)


async def first(link: RedisLink, count: int) -> list[bytes | None]:
    """The first messages of a channel."""
    heard: list[bytes | None] = []
    async with aclosing(link.subscribe(link.channel("news"))) as messages:
        async for message in messages:
            heard.append(message)
            if len(heard) == count:
                break
    return heard


async def subscribers(link: RedisLink, count: int) -> bool:
    """Whether so many listen, on all servers together."""

    async def command(client: Client) -> int:
        flags = {"target_nodes": "all"} if hasattr(client, "get_primaries") else {}
        found = await client.execute_command("PUBSUB", "NUMSUB", link.channel("news"), **flags)
        replies = found.values() if isinstance(found, dict) else [found]
        return sum(int(reply[0][1] if isinstance(reply[0], tuple) else reply[1]) for reply in replies)

    return await link.ask(command) == count
