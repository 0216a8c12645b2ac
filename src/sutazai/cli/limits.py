"""The options of limits, which keys and tenants share, and how limits are printed."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import cyclopts

from sutazai.core.identity import Limits

PriorityName = Literal["high", "normal", "low"]
CountOrNone = int | Literal["none"] | None


@cyclopts.Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class LimitOptions:
    """Limits as they are typed. What is left out stays as it is; `none` lifts a limit."""

    requests_per_minute: CountOrNone = None
    """Requests in a minute, or `none`."""
    tokens_per_minute: CountOrNone = None
    """Tokens in a minute, input and output together, or `none`."""
    bytes_per_minute: CountOrNone = None
    """Bytes of request bodies in a minute, or `none`."""
    concurrent_requests: CountOrNone = None
    """Requests at once, those that wait in line too, or `none`."""
    tokens_per_month: CountOrNone = None
    """Tokens in a calendar month (UTC), or `none`."""
    money_per_month: float | Literal["none"] | None = None
    """Money in a calendar month, in the currency of the models' prices, or `none`."""
    burst_s: float | None = None
    """How much of a limit per minute may be taken at once, in seconds of it."""

    def applied_to(self, limits: Limits) -> Limits:
        """Those limits with what was typed in their place."""
        changed: dict[str, Any] = {}
        for one in fields(self):
            typed = getattr(self, one.name)
            if typed is not None:
                changed[one.name] = None if typed == "none" else typed
        return replace(limits, **changed)


NO_OPTIONS = LimitOptions()


def told(limits: Limits) -> str:
    """Limits in one cell: those that are set, with the names of their options."""
    set_ = ((one.name, getattr(limits, one.name)) for one in fields(limits) if one.name != "burst_s")
    return ", ".join(f"{name.replace('_', '-')}={value}" for name, value in set_ if value is not None)
