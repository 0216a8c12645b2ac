"""`/admin/cache/forget`: kept answers that are not to be given again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from sutazai.core.errors import BadRequest
from sutazai.edge.admin_shapes import Body
from sutazai.edge.audited import audited
from sutazai.edge.pool import Pool, for_admins
from sutazai.edge.replies import Address, body_as, json_reply
from sutazai.gateway.fleet import other_name
from sutazai.ports.audit import Action
from sutazai.ports.cache import Forgotten

Name = Annotated[str, msgspec.Meta(max_length=512)]
"""What is written down for good is to have an end."""


class ForgetBody(Body, frozen=True):
    """What is to be forgotten: all that matches every part that is given. With no part, everything."""

    tenant: Name | None = None
    model: Name | None = None
    tag: Name | None = None
    fingerprint: Name | None = None
    """As hexadecimal digits."""

    def what(self) -> Sequence[Forgotten]:
        """
        As values of the port. Raises `BadRequest`.

        Answers are kept by the name that was asked for, so a model stands for both of its names.
        """
        try:
            fingerprint = None if self.fingerprint is None else bytes.fromhex(self.fingerprint)
        except ValueError as error:
            raise BadRequest("fingerprint must be hexadecimal digits.", where="fingerprint") from error
        models = (None,) if self.model is None else (self.model, other_name(self.model))
        return [Forgotten(tenant=self.tenant, model=model, tag=self.tag, fingerprint=fingerprint) for model in models]


_FORGET = msgspec.json.Decoder(ForgetBody)


def routes(pool: Pool) -> list[Address]:
    """Forgetting."""

    async def forget(http: HttpRequest) -> Response:
        for_admins(http)
        asked = await body_as(http, _FORGET)
        what = asked.what()
        parts = {name: value for name, value in msgspec.structs.asdict(asked).items() if value is not None}
        subject = ", ".join(parts.values()) if parts else "everything"
        async with audited(pool.audit, http, Action.CACHE_FORGOTTEN, subject, **parts):
            forgotten = sum([await pool.forget(one) for one in what])
        return json_reply({"forgotten": forgotten})

    return [Address("/admin/cache/forget", forget, methods=["POST"])]
