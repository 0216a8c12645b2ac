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
from sutazai.ports.agent import Said
from sutazai.ports.inference import Inference
from sutazai.ports.said import asked_in, said_in


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
        request = self._request(asked_in(body), tenant, user, priority)
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
        return said_in(whole.take(), node=head.node)

    async def usual(self) -> str:
        return self._usual()

    def _request(self, body: bytes, tenant: str, user: str, priority: Priority) -> Request:
        asked = read(Endpoint.OPENAI_CHAT, body)
        return Request(
            self._next_id(),
            Endpoint.OPENAI_CHAT,
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
