"""What the gatekeeper makes of keys, tenants and limits: the caller that each key opens the door for."""

from __future__ import annotations

import hashlib
from dataclasses import fields, replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sutazai.core.errors import BadRequest, Forbidden, Unauthorized
from sutazai.core.identity import ApiKey, Limits, Role, Scope, Tenant
from sutazai.core.request import Priority
from sutazai.edge.auth import LOCAL, Caller, Gatekeeper, limits_of

NOW = datetime(2026, 1, 1, tzinfo=UTC)
SECRET = "sk-sutazai-x"
LOOPBACK = {b"host": b"localhost"}
SHOWN = {b"authorization": b"Bearer " + SECRET.encode()}

limits_strategy = st.builds(
    Limits,
    requests_per_minute=st.none() | st.integers(0, 100),
    tokens_per_minute=st.none() | st.integers(0, 100),
    concurrent_requests=st.none() | st.integers(0, 100),
    money_per_month=st.none() | st.floats(0, 100),
    burst_s=st.floats(0.1, 3600),
)


def key(**changes: Any) -> ApiKey:
    usual = ApiKey(
        id="k1",
        name="laptop",
        tenant="acme",
        role=Role.USER,
        digest=hashlib.sha256(SECRET.encode()).digest(),
        created_at=NOW,
    )
    return replace(usual, **changes)


@pytest.mark.parametrize(
    ("role", "scopes", "is_admin"),
    [
        (Role.ADMIN, frozenset(Scope), True),
        (Role.ADMIN, frozenset({Scope.INFERENCE}), False),
        (Role.USER, frozenset({Scope.INFERENCE}), False),
    ],
)
def test_an_admin_has_the_role_and_the_scope(role: Role, scopes: frozenset[Scope], is_admin: bool) -> None:
    assert caller(key(role=role, scopes=scopes)).is_admin is is_admin


def caller(*keys: ApiKey, tenants: tuple[Tenant, ...] = (), default: Limits | None = None) -> Caller:
    gatekeeper = Gatekeeper(required=True)
    gatekeeper.learn(keys, tenants, default or Limits())
    return gatekeeper.admit(SHOWN)


def test_a_key_carries_its_tenant_role_and_scopes() -> None:
    found = caller(key(scopes=frozenset({Scope.TASKS})))

    assert (found.key_id, found.tenant, found.role) == ("k1", "acme", Role.USER)
    assert found.scopes == {Scope.TASKS}


def spoken(gatekeeper: Gatekeeper, headers: dict[bytes, bytes]) -> Caller:
    """In whose name a model is asked."""
    return gatekeeper.asks_for(gatekeeper.admit(SHOWN | headers), headers)


def test_an_admin_speaks_for_a_tenant_within_its_limits_and_for_models_alone() -> None:
    boss = key(role=Role.ADMIN, tenant="platform")
    gatekeeper = Gatekeeper(required=True)
    gatekeeper.learn([boss], [Tenant(name="acme", priority=Priority.LOW, limits=Limits(requests_per_minute=3))])

    found = spoken(gatekeeper, {b"x-sutazai-tenant": b"acme"})

    assert (found.tenant, found.key_id, found.priority) == ("acme", "", Priority.LOW)
    assert not found.is_admin
    assert found.scopes == {Scope.INFERENCE}
    assert found.allowance is not None
    assert found.allowance.of_tenant.requests_per_minute == 3


def test_an_admin_speaks_for_a_key_of_that_tenant_and_no_other() -> None:
    theirs = key(id="k2", digest=b"2" * 32, limits=Limits(concurrent_requests=1))
    gatekeeper = Gatekeeper(required=True)
    gatekeeper.learn([key(role=Role.ADMIN, tenant="platform"), theirs])

    own = spoken(gatekeeper, {b"x-sutazai-tenant": b"acme", b"x-sutazai-user": b"k2"})
    foreign = spoken(gatekeeper, {b"x-sutazai-tenant": b"other", b"x-sutazai-user": b"k2"})

    assert (own.key_id, own.is_admin) == ("k2", False)
    assert foreign.key_id == ""


def test_a_user_speaks_for_nobody_else() -> None:
    gatekeeper = Gatekeeper(required=True)
    gatekeeper.learn([key()])

    assert spoken(gatekeeper, {b"x-sutazai-tenant": b"other"}).tenant == "acme"


@pytest.mark.parametrize("name", [b"", b" ", b"x" * 65, b"a"])
def test_a_tenant_that_cannot_be_is_not_spoken_for(name: bytes) -> None:
    gatekeeper = Gatekeeper(required=True)
    gatekeeper.learn([key(role=Role.ADMIN)])

    with pytest.raises(BadRequest, match="64 printable"):
        spoken(gatekeeper, {b"x-sutazai-tenant": name})


def test_a_revoked_key_opens_nothing() -> None:
    with pytest.raises(Unauthorized):
        caller(key(revoked_at=NOW))


@pytest.mark.parametrize(
    ("of_tenant", "of_key", "highest"),
    [
        (None, None, Priority.NORMAL),
        (None, Priority.LOW, Priority.LOW),
        (None, Priority.HIGH, Priority.NORMAL),
        (Priority.HIGH, None, Priority.HIGH),
        (Priority.HIGH, Priority.LOW, Priority.LOW),
        (Priority.LOW, Priority.HIGH, Priority.LOW),
    ],
)
def test_of_two_priorities_the_lower_one_is_the_highest(
    of_tenant: Priority | None, of_key: Priority | None, highest: Priority
) -> None:
    tenants = () if of_tenant is None else (Tenant(name="acme", priority=of_tenant),)

    assert caller(key(priority=of_key), tenants=tenants).priority is highest


def test_without_any_limit_there_is_no_allowance_to_look_at() -> None:
    assert caller(key(), tenants=(Tenant(name="acme", weight=2.0),)).allowance is None


def test_an_allowance_holds_the_limits_of_tenant_and_key() -> None:
    own, of_key = Limits(tokens_per_minute=5), Limits(concurrent_requests=1)

    allowance = caller(key(limits=of_key), tenants=(Tenant(name="acme", limits=own),)).allowance

    assert allowance is not None
    assert (allowance.tenant, allowance.key_id) == ("acme", "k1")
    assert (allowance.of_tenant, allowance.of_key) == (own, of_key)


def test_the_defaults_of_the_settings_count_where_a_tenant_has_no_limit_of_its_own() -> None:
    default = Limits(requests_per_minute=10, tokens_per_minute=100, burst_s=5.0)
    own = Limits(requests_per_minute=600, burst_s=30.0)

    of_unknown = caller(key(), default=default).allowance
    of_known = caller(key(), tenants=(Tenant(name="acme", limits=own),), default=default).allowance

    assert of_unknown is not None
    assert of_known is not None
    assert of_unknown.of_tenant == default
    assert of_known.of_tenant == Limits(requests_per_minute=600, tokens_per_minute=100, burst_s=30.0)


@given(own=limits_strategy, default=limits_strategy)
def test_no_limit_is_lost_when_a_tenants_and_the_default_ones_meet(own: Limits, default: Limits) -> None:
    met = limits_of(own, default)

    for one in fields(Limits):
        if one.name != "burst_s":
            value = getattr(own, one.name)
            assert getattr(met, one.name) == (getattr(default, one.name) if value is None else value)
    assert met.burst_s in {own.burst_s, default.burst_s}


def test_new_default_limits_count_at_once_and_known_heads_are_forgotten() -> None:
    gatekeeper = Gatekeeper(required=True)
    gatekeeper.learn([key()])
    before = gatekeeper.generation
    gatekeeper.limit_by(Limits(requests_per_minute=1))

    allowance = gatekeeper.admit(SHOWN).allowance
    assert allowance is not None
    assert allowance.of_tenant == Limits(requests_per_minute=1)
    assert gatekeeper.generation > before


def test_whoever_needs_no_key_is_an_admin_of_the_tenant_local() -> None:
    gatekeeper = Gatekeeper(required=False)
    gatekeeper.learn([])
    found = gatekeeper.admit(LOOPBACK)
    found.needs_admin()
    found.needs(Scope.INFERENCE)

    assert (found.key_id, found.tenant, found.priority, found.allowance) == ("", LOCAL, Priority.NORMAL, None)


def test_the_tenant_local_can_be_limited_like_any_other() -> None:
    gatekeeper = Gatekeeper(required=False)
    gatekeeper.learn([], [Tenant(name=LOCAL, priority=Priority.LOW, limits=Limits(concurrent_requests=2))])
    found = gatekeeper.admit(LOOPBACK)

    assert found.priority is Priority.LOW
    assert found.allowance is not None
    assert found.allowance.of_tenant == Limits(concurrent_requests=2)


@pytest.mark.parametrize(
    ("role", "scopes", "is_admin"),
    [
        (Role.ADMIN, set(Scope), True),
        (Role.ADMIN, {Scope.ADMIN}, True),
        (Role.ADMIN, {Scope.INFERENCE}, False),
        (Role.USER, set(Scope), False),
        (Role.USER, {Scope.ADMIN}, False),
    ],
)
def test_administration_needs_the_role_and_the_scope(role: Role, scopes: set[Scope], is_admin: bool) -> None:
    found = caller(key(role=role, scopes=frozenset(scopes)))

    if is_admin:
        found.needs_admin()
    else:
        with pytest.raises(Forbidden, match="scope `admin`"):
            found.needs_admin()


@given(scopes=st.frozensets(st.sampled_from(Scope)), needed=st.sampled_from(Scope))
def test_a_refusal_names_the_scope_that_is_missing_and_those_that_are_there(
    scopes: frozenset[Scope], needed: Scope
) -> None:
    found = caller(key(scopes=scopes))

    if needed in scopes:
        found.needs(needed)
    else:
        with pytest.raises(Forbidden) as caught:
            found.needs(needed)
        assert f"--scope {needed.value}" in caught.value.message
        assert all(scope.value in caught.value.message for scope in scopes)


def test_tenants_are_told_to_whoever_divides_the_pool() -> None:
    gatekeeper = Gatekeeper(required=True)
    gatekeeper.learn([], [Tenant(name="acme", weight=2.0)])

    assert gatekeeper.tenants["acme"].weight == 2.0
    assert "nobody" not in gatekeeper.tenants
