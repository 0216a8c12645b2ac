"""What names, scopes, limits and tenants may be. Pure; whoever stores them asks here."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import fields

from sutazai.core.errors import BadRequest
from sutazai.core.identity import Limits, Role, Scope, Tenant

MAX_NAME_CHARACTERS = 64
MAX_COUNT = 2**53
"""Beyond it not every whole number survives the way through JSON and scripts."""
MAX_WEIGHT = 1000.0
BURST_S = (0.1, 3600.0)
USER_SCOPES = frozenset({Scope.INFERENCE, Scope.TASKS})


def check_label(label: str, *, where: str) -> None:
    """Names and tenants are 1 to 64 printable characters. Raises `BadRequest`."""
    if not (label.strip() and label.isprintable() and len(label) <= MAX_NAME_CHARACTERS):
        raise BadRequest(
            f"The {where} {label[:MAX_NAME_CHARACTERS]!r} was refused."
            f" Use 1 to {MAX_NAME_CHARACTERS} printable characters.",
            where=where,
        )


def scopes_for(role: Role, named: frozenset[Scope] | None) -> frozenset[Scope]:
    """The scopes of a new key: those named, else all that its role can use. Raises `BadRequest`."""
    if named is None:
        return frozenset(Scope) if role is Role.ADMIN else USER_SCOPES
    if not named:
        raise BadRequest("The key had no scope, so it could do nothing. Name one at least.", where="scopes")
    if Scope.ADMIN in named and role is not Role.ADMIN:
        raise BadRequest(
            "The scope `admin` was given to a key that is no admin's. Make it an admin key, or leave the scope out.",
            where="scopes",
        )
    return named


def check_limits(limits: Limits) -> None:
    """Limits are numbers from 0 on. Raises `BadRequest`."""
    for name, value in given(limits):
        if not 0 <= value <= MAX_COUNT:  # also refuses NaN
            raise BadRequest(f"The limit {name} was {value}. Give a number from 0 to 2^53.", where=f"limits.{name}")
    if not BURST_S[0] <= limits.burst_s <= BURST_S[1]:
        raise BadRequest(
            f"The burst was {limits.burst_s:g} s. Give a number from {BURST_S[0]:g} to {BURST_S[1]:g}.",
            where="limits.burst_s",
        )


def check_tenant(tenant: Tenant) -> None:
    """Whether there can be such a tenant. Raises `BadRequest`."""
    check_label(tenant.name, where="tenant")
    if not (0 < tenant.weight <= MAX_WEIGHT and math.isfinite(tenant.weight)):
        raise BadRequest(
            f"The weight was {tenant.weight}. Give a number above 0 and up to {MAX_WEIGHT:g}.", where="weight"
        )
    if not 0 <= (tenant.waiting_tasks or 0) <= MAX_COUNT:
        raise BadRequest(
            f"The waiting tasks were {tenant.waiting_tasks}. Give a number from 0 to 2^53.", where="waiting_tasks"
        )
    check_limits(tenant.limits)
    if not re.fullmatch(r"[A-Za-z0-9._-]{0,64}", tenant.region):
        raise BadRequest(
            f"The region {tenant.region[:64]!r} was refused. Use up to 64 letters, digits and . _ -.", where="region"
        )


def given(limits: Limits) -> Iterator[tuple[str, float]]:
    """The limits that are set, by name; the burst is none."""
    for one in fields(limits):
        value = getattr(limits, one.name)
        if one.name != "burst_s" and value is not None:
            yield one.name, value
