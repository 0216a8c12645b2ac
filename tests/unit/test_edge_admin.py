"""What the admin API does between its steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest
from starlette.requests import Request as HttpRequest

from sutazai.core.errors import Conflict
from sutazai.edge import admin
from sutazai.edge.auth import ANONYMOUS
from sutazai.edge.pool import Pool
from sutazai.ports.audit import Actor, Deed
from sutazai.testing.audit import MemoryAuditLog


@dataclass(slots=True)
class Exchange:
    """A request in flight."""

    ended_by_operator: bool = False
    request: Any = field(default_factory=lambda: SimpleNamespace(tenant="t"))

    def end_by_operator(self) -> None:
        self.ended_by_operator = True


class SlowLog(MemoryAuditLog):
    """A log that takes time, in which something else happens."""

    def __init__(self, meanwhile: Callable[[], object]) -> None:
        super().__init__()
        self._meanwhile = meanwhile

    async def add(self, deed: Deed, by: Actor) -> None:
        await super().add(deed, by)
        self._meanwhile()


def cancelling(request_id: str) -> HttpRequest:
    state = {"caller": ANONYMOUS, "request_id": "r-admin"}
    return HttpRequest({"type": "http", "headers": [], "path_params": {"request_id": request_id}, "state": state})


async def test_a_request_that_ended_before_it_could_be_cancelled_is_not_called_cancelled() -> None:
    in_flight = {"r-1": Exchange()}
    exchange, log = in_flight["r-1"], SlowLog(in_flight.clear)
    pool = SimpleNamespace(fleet=SimpleNamespace(clock=time.monotonic), audit=log, in_flight=lambda: in_flight)
    (cancel,) = [one for one in admin.routes(cast("Pool", pool)) if one.path.endswith("{request_id}")]

    with pytest.raises(Conflict, match="ended by itself"):
        await cancel.endpoint(cancelling("r-1"))
    assert not exchange.ended_by_operator
    assert [entry.outcome for entry in log.entries] == ["begun", "failed"]
