"""What every audit log does, run over the one in memory and the one in PostgreSQL."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sutazai.core.errors import BadRequest
from sutazai.core.identity import Limits, Role, Tenant
from sutazai.ports.audit import GENESIS, UNNAMED, Action, Actor, AuditEntry, Deed, Outcome

if TYPE_CHECKING:
    from sutazai.adapters.postgres.stores import Stores

OPS = Actor(id="k1", request_id="r-7")
PULLED = Deed(action=Action.MODEL_PULLED, subject="llama3", detail={"insecure": False}, outcome=Outcome.BEGUN)

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)


async def newest(stores: Stores) -> AuditEntry:
    (entry,) = await stores.audit.newest(limit=1)
    return entry


async def test_an_entry_tells_who_did_what_to_what_and_when(stores: Stores) -> None:
    await stores.audit.add(PULLED, OPS)

    entry = await newest(stores)
    assert (entry.number, entry.actor, entry.request_id) == (1, "k1", "r-7")
    assert (entry.action, entry.subject, entry.outcome) == ("model.pulled", "llama3", "begun")
    assert msgspec.json.decode(entry.detail) == {"insecure": False}
    assert abs(entry.at - datetime.now(UTC)) < timedelta(seconds=10)


async def test_entries_are_numbered_and_each_is_sealed_with_the_one_before(stores: Stores) -> None:
    for number in range(3):
        await stores.audit.add(replace(PULLED, subject=f"m{number}"), OPS)

    third, second, first = await stores.audit.newest(limit=10)
    assert [first.number, second.number, third.number] == [1, 2, 3]
    assert [first.previous, second.previous, third.previous] == [GENESIS, first.digest, second.digest]
    assert all(entry.digest == entry.sealed() for entry in (first, second, third))


async def test_entries_are_read_in_pages_from_the_newest_on(stores: Stores) -> None:
    for number in range(5):
        await stores.audit.add(replace(PULLED, subject=f"m{number}"), OPS)

    first = await stores.audit.newest(limit=2)
    second = await stores.audit.newest(limit=2, before=first[-1].number)
    third = await stores.audit.newest(limit=2, before=second[-1].number)

    assert [[entry.number for entry in page] for page in (first, second, third)] == [[5, 4], [3, 2], [1]]
    assert await stores.audit.newest(limit=2, before=1) == []


async def test_a_whole_log_is_verified_up_to_its_newest_entry(stores: Stores) -> None:
    empty = await stores.audit.verify()
    for _ in range(3):
        await stores.audit.add(PULLED, OPS)
    full = await stores.audit.verify()

    assert (empty.entries, empty.head, empty.fault) == (0, GENESIS, "")
    assert (full.entries, full.head, full.fault) == (3, (await newest(stores)).digest, "")


async def test_entries_of_many_writers_at_once_are_one_chain(stores: Stores) -> None:
    async with asyncio.TaskGroup() as group:
        for number in range(12):
            group.create_task(stores.audit.add(replace(PULLED, subject=str(number)), OPS), name="add an entry")

    found = await stores.audit.verify()
    assert (found.entries, found.fault) == (12, "")


@pytest.mark.parametrize("subject", ["a\x00b", "\ud800", "x" * 100_000, "ключ", "'; DROP TABLE audit; --"])
async def test_no_name_keeps_an_action_from_being_written_down(stores: Stores, subject: str) -> None:
    await stores.audit.add(replace(PULLED, subject=subject, detail={subject: [subject]}), OPS)

    assert (await stores.audit.verify()).entries == 1


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(texts, texts, st.dictionaries(texts, st.none() | st.booleans() | st.integers(-(2**53), 2**53) | texts))
async def test_whatever_an_entry_holds_its_seal_fits(
    stores: Stores, actor: str, subject: str, detail: dict[str, object]
) -> None:
    await stores.audit.add(replace(PULLED, subject=subject, detail=detail), Actor(id=actor))

    entry = await newest(stores)
    assert entry.digest == entry.sealed()
    assert (entry.actor, entry.subject, msgspec.json.decode(entry.detail)) == (actor, subject, detail)


# what the stores write down themselves


async def test_a_key_is_written_down_when_it_is_made_without_its_secret(stores: Stores) -> None:
    record, key = await stores.keys.create(name="laptop", tenant="acme", role=Role.ADMIN, by=OPS)

    entry = await newest(stores)
    assert (entry.action, entry.subject, entry.actor, entry.outcome) == ("key.created", record.id, "k1", "done")
    assert msgspec.json.decode(entry.detail) == {
        "name": "laptop",
        "tenant": "acme",
        "role": "admin",
        "scopes": ["admin", "inference", "tasks"],
        "priority": None,
        "limits": {},
    }
    assert key not in str(entry)
    assert record.digest.hex() not in str(entry)


async def test_a_key_is_written_down_when_it_is_revoked(stores: Stores) -> None:
    record, _ = await stores.keys.create(name="laptop", tenant="acme", role=Role.USER)
    await stores.keys.revoke("laptop", by=OPS)

    entry = await newest(stores)
    assert (entry.number, entry.action, entry.subject, entry.actor) == (2, "key.revoked", record.id, "k1")
    assert msgspec.json.decode(entry.detail) == {"name": "laptop", "tenant": "acme"}


async def test_a_tenant_is_written_down_as_it_was_and_as_it_is(stores: Stores) -> None:
    await stores.tenants.set(Tenant(name="acme"), by=OPS)
    await stores.tenants.set(Tenant(name="acme", weight=2.0, limits=Limits(tokens_per_minute=9)), by=OPS)
    await stores.tenants.delete("acme", by=OPS)

    deleted, changed, made = await stores.audit.newest(limit=3)
    usual = {"weight": 1.0, "priority": "normal", "limits": {}}
    heavy = {"weight": 2.0, "priority": "normal", "limits": {"tokens_per_minute": 9}}
    assert msgspec.json.decode(made.detail) == {"before": None, "after": usual}
    assert msgspec.json.decode(changed.detail) == {"before": usual, "after": heavy}
    assert msgspec.json.decode(deleted.detail) == {"before": heavy}
    assert [entry.action for entry in (made, changed, deleted)] == ["tenant.set", "tenant.set", "tenant.deleted"]


async def test_a_program_that_does_not_say_who_it_is_is_written_down_too(stores: Stores) -> None:
    await stores.keys.create(name="laptop", tenant="acme", role=Role.USER)

    assert (await newest(stores)).actor == UNNAMED.id


async def test_what_did_not_take_place_is_not_written_down(stores: Stores) -> None:
    with pytest.raises(BadRequest):
        await stores.keys.create(name="", tenant="acme", role=Role.USER)
    with pytest.raises(BadRequest):
        await stores.tenants.set(Tenant(name="acme", weight=0.0))
    await stores.keys.revoke("nobody")
    await stores.tenants.delete("nobody")

    assert await stores.audit.newest(limit=1) == []
