"""The models for agents that run in the gateway's own process: what goes through every stage, without a socket."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sutazai.core.errors import NodeFault
from sutazai.core.identity import Allowance
from sutazai.core.request import Endpoint, Priority, Request
from sutazai.dialects.framing import Collected, Untranslatable
from sutazai.dialects.reading import read
from sutazai.gateway.pulled import Pulled
from sutazai.ports.agent import CHAT, Answer, Said
from sutazai.ports.inference import Inference
from sutazai.ports.said import answer_in, asked_in, said_in

_ENDPOINTS: Mapping[str, Endpoint] = {one.path: one for one in Endpoint}


class GatewayModels:
    """`Models` over the stages of this gateway, whose time limits bound every wait."""

    def __init__(
        self,
        answers: Inference,
        *,
        next_id: Callable[[], str],
        clock: Callable[[], float],
        allowance: Callable[[str, str], Allowance | None],
        usual: Callable[[], str],
    ) -> None:
        """
        Make it.

        Args:
            clock: monotonic seconds.
            allowance: the limits of a tenant and one of its keys.
            usual: the model for those who name none; empty where there is none.
        """
        self._answers = answers
        self._next_id = next_id
        self._clock = clock
        self._allowance = allowance
        self._usual = usual

    async def chat(self, body: Mapping[str, Any], *, tenant: str, user: str, priority: Priority) -> Said:
        answer, node = await self._answer(CHAT, body, tenant, user, priority)
        return said_in(answer, node=node)

    async def ask(
        self, endpoint: str, body: Mapping[str, Any], *, tenant: str, user: str, priority: Priority
    ) -> Answer:
        answer, node = await self._answer(endpoint, body, tenant, user, priority)
        return answer_in(answer, node=node)

    async def usual(self) -> str:
        return self._usual()

    async def _answer(
        self, endpoint: str, body: Mapping[str, Any], tenant: str, user: str, priority: Priority
    ) -> tuple[bytes, str]:
        """The body of the answer, and the node that gave it."""
        request = self._request(_ENDPOINTS[endpoint], asked_in(endpoint, body), tenant, user, priority)
        pulled, whole = Pulled(), Collected()
        try:
            pulled.begin(self._answers, request)
            head = await pulled.until_head()
            while data := await pulled.part():
                whole.add(data)
        except Untranslatable as error:
            raise NodeFault(str(error), node=head.node) from error
        finally:
            pulled.cancel()  # of a call that ended already, nothing is left to cancel
        return whole.take(), head.node

    def _request(self, endpoint: Endpoint, body: bytes, tenant: str, user: str, priority: Priority) -> Request:
        asked = read(endpoint, body)
        return Request(
            self._next_id(),
            endpoint,
            asked.model,
            stream=False,
            body=body,
            tenant=tenant,
            key_id=user,
            arrived_at=self._clock(),
            is_deterministic=asked.is_deterministic,
            priority=priority,
            allowance=self._allowance(tenant, user),
        )
