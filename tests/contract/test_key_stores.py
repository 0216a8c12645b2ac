"""What every store of keys and usage does, run over the one in memory and the one in PostgreSQL."""

from __future__ import annotations

import asyncio
import hashlib
import random
import re
from collections import Counter
from contextlib import aclosing
from datetime import UTC, datetime, timedelta

import pytest

from sutazai.adapters.postgres.stores import Stores
from sutazai.core.errors import BadRequest
from sutazai.core.identity import ApiKey, Limits, Role, Scope
from sutazai.core.request import Priority
from sutazai.ports.keys import UsageRow

HOUR = datetime(2026, 3, 1, 12, tzinfo=UTC)
LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)
NOTICED_S = 5.0


async def make(stores: Stores, name: str, *, tenant: str = "acme", role: Role = Role.USER) -> ApiKey:
    record, _ = await stores.keys.create(name=name, tenant=tenant, role=role)
    return record


def row(key_id: str = "", model: str = "m", hour: datetime = HOUR, **counts: int) -> UsageRow:
    numbers = {"requests": 1, "errors": 0, "input_tokens": 0, "output_tokens": 0} | counts
    return UsageRow(key_id=key_id, tenant="acme", model=model, hour=hour, **numbers)


async def test_a_new_key_is_random_and_only_its_hash_is_kept(stores: Stores) -> None:
    record, key = await stores.keys.create(name="laptop", tenant="acme", role=Role.ADMIN)

    assert re.fullmatch(r"sk-sutazai-[A-Za-z0-9_-]{43}", key)
    assert re.fullmatch(r"[a-z2-7]{8}", record.id)
    assert record.digest == hashlib.sha256(key.encode()).digest()
    assert await stores.keys.all() == [record]
    assert (record.name, record.tenant, record.role) == ("laptop", "acme", Role.ADMIN)
    assert key not in repr(record)


async def test_a_key_keeps_what_it_may_do_and_take(stores: Stores) -> None:
    limits = Limits(requests_per_minute=60, tokens_per_month=10**12, money_per_month=0.5, burst_s=5.0)

    record, _ = await stores.keys.create(
        name="robot",
        tenant="acme",
        role=Role.USER,
        scopes=frozenset({Scope.INFERENCE}),
        priority=Priority.LOW,
        limits=limits,
    )

    assert await stores.keys.all() == [record]
    assert (record.scopes, record.priority, record.limits) == (frozenset({Scope.INFERENCE}), Priority.LOW, limits)


@pytest.mark.parametrize(
    ("role", "scopes"), [(Role.USER, {Scope.INFERENCE, Scope.TASKS}), (Role.ADMIN, set(Scope))], ids=["user", "admin"]
)
async def test_a_key_of_which_nothing_is_said_may_do_all_that_its_role_can(
    stores: Stores, role: Role, scopes: set[Scope]
) -> None:
    record = await make(stores, "laptop", role=role)

    assert record.scopes == scopes
    assert record.priority is None
    assert record.limits == Limits()


@pytest.mark.parametrize(
    ("scopes", "limits", "where"),
    [
        (frozenset(), Limits(), "scopes"),
        (frozenset({Scope.ADMIN}), Limits(), "scopes"),
        (None, Limits(requests_per_minute=-1), "limits.requests_per_minute"),
        (None, Limits(money_per_month=float("nan")), "limits.money_per_month"),
        (None, Limits(tokens_per_month=2**53 + 1), "limits.tokens_per_month"),
        (None, Limits(burst_s=0.0), "limits.burst_s"),
    ],
)
async def test_a_key_that_could_not_be_used_or_kept_is_refused(
    stores: Stores, scopes: frozenset[Scope] | None, limits: Limits, where: str
) -> None:
    with pytest.raises(BadRequest) as caught:
        await stores.keys.create(name="robot", tenant="acme", role=Role.USER, scopes=scopes, limits=limits)

    assert caught.value.where == where
    assert await stores.keys.all() == []


async def test_two_keys_share_nothing(stores: Stores) -> None:
    one, first = await stores.keys.create(name="one", tenant="acme", role=Role.USER)
    two, second = await stores.keys.create(name="two", tenant="acme", role=Role.USER)

    assert first != second
    assert one.id != two.id


async def test_a_new_key_says_when_it_was_made_and_that_nobody_used_it(stores: Stores) -> None:
    before = datetime.now(UTC) - timedelta(seconds=5)

    record = await make(stores, "laptop")

    assert before < record.created_at < datetime.now(UTC) + timedelta(seconds=5)
    assert record.last_used_at is None
    assert record.revoked_at is None


async def test_keys_are_listed_oldest_first_with_the_revoked_ones(stores: Stores) -> None:
    made = [await make(stores, name) for name in ("c", "a", "b")]
    revoked = await stores.keys.revoke(made[1].id)

    assert await stores.keys.all() == [made[0], revoked, made[2]]


async def test_a_second_live_key_of_one_name_is_refused(stores: Stores) -> None:
    await make(stores, "laptop")

    with pytest.raises(BadRequest, match="'laptop' was there already") as caught:
        await make(stores, "laptop")
    assert caught.value.where == "name"
    assert len(await stores.keys.all()) == 1


async def test_a_revoked_key_gives_its_name_back(stores: Stores) -> None:
    old = await make(stores, "laptop")
    await stores.keys.revoke("laptop")

    new = await make(stores, "laptop")

    assert [key.id for key in await stores.keys.all()] == [old.id, new.id]


@pytest.mark.parametrize("name", ["", " ", "a" * 65, "a\nb", "a\x00b", "\x1b[31m", "\ud800", "a\u202eb"])
async def test_a_name_that_cannot_be_shown_is_refused(stores: Stores, name: str) -> None:
    with pytest.raises(BadRequest, match="1 to 64 printable characters") as caught:
        await make(stores, name)
    assert caught.value.where == "name"
    assert await stores.keys.all() == []


async def test_a_tenant_that_cannot_be_shown_is_refused(stores: Stores) -> None:
    with pytest.raises(BadRequest) as caught:
        await make(stores, "laptop", tenant="a\tb")
    assert caught.value.where == "tenant"


@pytest.mark.parametrize("name", ["a", "é" * 64, "ключ от ноутбука", "🔑", 'it\'s "50%" -- \\'])
async def test_a_name_may_be_any_printable_text(stores: Stores, name: str) -> None:
    await make(stores, name)

    assert [key.name for key in await stores.keys.all()] == [name]


async def test_a_key_is_revoked_by_id_and_by_name(stores: Stores) -> None:
    one, two = await make(stores, "one"), await make(stores, "two")

    by_id, by_name = await stores.keys.revoke(one.id), await stores.keys.revoke("two")

    assert by_id is not None
    assert by_name is not None
    assert (by_id.id, by_name.id) == (one.id, two.id)
    assert by_id.revoked_at is not None
    assert await stores.keys.all() == [by_id, by_name]


async def test_an_id_goes_before_a_name_that_looks_like_it(stores: Stores) -> None:
    one = await make(stores, "one")
    await make(stores, one.id)

    revoked = await stores.keys.revoke(one.id)

    assert revoked is not None
    assert revoked.name == "one"


@pytest.mark.parametrize("unknown", ["nobody", "", "a\x00b", "\ud800", "'; DROP TABLE keys; --"])
async def test_revoking_what_is_not_there_changes_nothing(stores: Stores, unknown: str) -> None:
    made = await make(stores, "laptop")

    assert await stores.keys.revoke(unknown) is None
    assert await stores.keys.all() == [made]


async def test_a_key_is_revoked_only_once(stores: Stores) -> None:
    await make(stores, "laptop")
    revoked = await stores.keys.revoke("laptop")

    assert await stores.keys.revoke("laptop") is None
    assert await stores.keys.all() == [revoked]


async def test_listeners_hear_of_new_and_of_revoked_keys(stores: Stores) -> None:
    async with aclosing(stores.keys.changes()) as changes:  # type: ignore[type-var]
        async with asyncio.timeout(NOTICED_S):
            await anext(changes)
            await make(stores, "laptop")
            await anext(changes)
            await stores.keys.revoke("laptop")
            await anext(changes)


async def test_a_change_that_nobody_waited_for_is_heard_later(stores: Stores) -> None:
    async with aclosing(stores.keys.changes()) as changes:  # type: ignore[type-var]
        async with asyncio.timeout(NOTICED_S):
            await anext(changes)
            await make(stores, "one")
            await make(stores, "two")
            await anext(changes)

    assert len(await stores.keys.all()) == 2


async def test_usage_is_added_up_by_key_and_model(stores: Stores) -> None:
    await stores.usage.add([row("k1", "a", requests=2, errors=1, input_tokens=10, output_tokens=20)])
    await stores.usage.add([row("k1", "b", requests=1), row("k2", "a", requests=5)])
    await stores.usage.add([row("k1", "a", requests=1, input_tokens=7)])

    assert await stores.usage.total(since=HOUR) == [
        row("k1", "a", requests=3, errors=1, input_tokens=17, output_tokens=20),
        row("k1", "b", requests=1),
        row("k2", "a", requests=5),
    ]


async def test_one_write_may_hold_a_row_twice(stores: Stores) -> None:
    await stores.usage.add([row(requests=2), row(requests=3)])

    assert await stores.usage.total(since=HOUR) == [row(requests=5)]


async def test_a_sum_leaves_out_earlier_hours_and_names_its_newest(stores: Stores) -> None:
    hours = [HOUR + timedelta(hours=n) for n in range(3)]
    await stores.usage.add([row(hour=hour, requests=10**n) for n, hour in enumerate(hours)])

    assert await stores.usage.total(since=hours[1]) == [row(hour=hours[2], requests=110)]
    assert await stores.usage.total(since=hours[2] + timedelta(seconds=1)) == []


async def test_nothing_to_add_is_nothing_to_do(stores: Stores) -> None:
    await stores.usage.add([])

    assert await stores.usage.total(since=LONG_AGO) == []


async def test_sums_pass_the_size_of_small_integers(stores: Stores) -> None:
    for _ in range(3):
        await stores.usage.add([row(input_tokens=2**53)])

    (total,) = await stores.usage.total(since=LONG_AGO)
    assert total.input_tokens == 3 * 2**53


async def test_usage_tells_when_a_key_was_last_used(stores: Stores) -> None:
    used, unused = await make(stores, "used"), await make(stores, "unused")
    now = datetime.now(UTC)
    this_hour = now.replace(minute=0, second=0, microsecond=0)

    await stores.usage.add([row(used.id, hour=this_hour), row("", hour=this_hour)])

    after = {key.id: key.last_used_at for key in await stores.keys.all()}
    last_used_at = after[used.id]
    assert last_used_at is not None
    assert abs(last_used_at - now) < timedelta(seconds=NOTICED_S)
    assert after[unused.id] is None


async def test_late_usage_does_not_move_last_used_back_or_to_now(stores: Stores) -> None:
    key = await make(stores, "laptop")

    await stores.usage.add([row(key.id, hour=HOUR)])
    await stores.usage.add([row(key.id, hour=HOUR - timedelta(hours=5))])

    assert (await stores.keys.all())[0].last_used_at == HOUR + timedelta(hours=1)


async def test_many_writes_at_once_lose_nothing(stores: Stores) -> None:
    """Writers of the same rows in different orders neither block each other nor count wrong."""
    chance = random.Random(7)
    keys = [(await make(stores, f"key {n}")).id for n in range(5)]
    expected: Counter[tuple[str, str]] = Counter()
    batches = []
    for _ in range(20):
        batch = [row(chance.choice(keys), f"m{chance.randrange(4)}", requests=n) for n in range(30)]
        for item in batch:
            expected[item.key_id, item.model] += item.requests
        batches.append(batch)

    async with asyncio.TaskGroup() as group:
        for batch in batches:
            group.create_task(stores.usage.add(batch), name="add usage")

    totals = await stores.usage.total(since=LONG_AGO)
    assert {(total.key_id, total.model): total.requests for total in totals} == expected
