"""
Limits that all gateways share: each request's are taken by one script, in one round trip, by the clock of Redis.

All keys of a tenant are in one slot, so that the script finds them together in a Cluster too. They expire when they
mean nothing any more.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from importlib.resources import files

from sutazai.adapters.redis.link import RedisLink, Script
from sutazai.core.identity import Allowance
from sutazai.policy.rate_limit import Amounts, Bounds, Verdict
from sutazai.ports.limits import Settlement, Spent

LEASE_S = 30.0
"""How long a request's place outlives the gateway that renews it."""
BACKGROUND_S = 1.0
"""For what no request waits for."""
TENANT, KEY = 1.0, 3.0
"""Where the script finds the levels of each."""

_NUMBERS = {count: struct.Struct(f"<{count}d") for count in range(1, 64)}


class RedisLimits:
    """A `LimitStore` in Redis."""

    def __init__(self, link: RedisLink, *, gateway: str, lease_s: float = LEASE_S) -> None:
        """
        Use a connected Redis.

        Args:
            gateway: a name that no other gateway has, by which the living are counted.
        """
        self._link = link
        self._gateway = gateway
        self._lease_s = lease_s
        self._script = Script(files("sutazai.adapters.redis").joinpath("limits.lua").read_text("utf-8"))

    async def take(self, bounds: Bounds, request_id: str, amounts: Amounts) -> Verdict:
        has_place = b"1" if bounds.is_settled else b"0"
        arguments = (b"take", _packed_bounds(bounds), _packed(amounts), self._lease_s, has_place, request_id)
        answer: bytes = await self._link.run(self._script, self._keys(bounds.allowance), arguments)
        admitted, month_left_s, *levels = _NUMBERS[len(answer) // 8].unpack(answer)
        return Verdict(bounds, levels, amounts, admitted=admitted == 1.0, month_left_s=month_left_s)

    async def settle(self, settlement: Settlement) -> None:
        bounds, estimated, true = settlement.bounds, settlement.estimated, settlement.true
        corrections = [after - before for after, before in zip(true, estimated, strict=True)]
        arguments = (
            b"settle",
            _packed_bounds(bounds),
            _packed(corrections),
            b"1" if settlement.was_taken else b"0",
            _packed(true),
            settlement.request_id,
        )
        await self._link.run(self._script, self._keys(bounds.allowance), arguments, within_s=BACKGROUND_S)

    async def renew(self, held: Sequence[tuple[Allowance, str]]) -> int:
        by_owner: dict[tuple[bytes, ...], list[str]] = {}
        for allowance, request_id in held:
            by_owner.setdefault(self._keys(allowance), []).append(request_id)
        for keys, request_ids in by_owner.items():
            fixed: tuple[bytes | float, ...] = (b"renew", b"", b"", self._lease_s, b"")
            await self._link.run(self._script, keys, (*fixed, *request_ids), within_s=BACKGROUND_S)
        gateways = [self._link.key("gateways", slot="gateways")]
        arguments = (b"count", b"", b"", self._lease_s, b"", self._gateway)
        return int(await self._link.run(self._script, gateways, arguments, within_s=BACKGROUND_S))

    async def seed(self, spent: Sequence[Spent], *, month: int) -> None:
        for one in spent:
            tenant = self._owned(one.tenant, "")
            keys = (*self._owned(one.tenant, one.key_id), *tenant) if one.key_id else (*tenant, *tenant)
            amounts = _packed((0.0, 0.0, 0.0, 0.0, one.tokens, one.money))
            await self._link.run(self._script, keys, (b"seed", b"", amounts, month), within_s=BACKGROUND_S)

    # parts

    def _keys(self, allowance: Allowance) -> tuple[bytes, ...]:
        tenant = allowance.tenant
        return *self._owned(tenant, ""), *self._owned(tenant, allowance.key_id or "-")

    def _owned(self, tenant: str, key_id: str) -> tuple[bytes, bytes]:
        """The levels and the places of one owner."""
        link = self._link
        owner = ("key", key_id) if key_id else ("tenant",)
        return link.key("limits", *owner, slot=tenant), link.key("places", *owner, slot=tenant)


def _packed(numbers: Sequence[float]) -> bytes:
    return _NUMBERS[len(numbers)].pack(*numbers)


def _packed_bounds(bounds: Bounds) -> bytes:
    numbers: list[float] = []
    for bound in bounds.all:
        numbers += (KEY if bound.is_of_key else TENANT, bound.kind, bound.capacity, bound.per_s)
    return _packed(numbers)
