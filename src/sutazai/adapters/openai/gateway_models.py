"""The models for agents that run in a process of their own: the gateway, asked over HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec

from sutazai.core import errors
from sutazai.core.request import Priority
from sutazai.dialects.errors import error_message
from sutazai.dialects.framing import MAX_REPLY_BYTES
from sutazai.ports.agent import CHAT, Answer, Said
from sutazai.ports.said import answer_in, asked_in, said_in

TENANT = "x-sutazai-tenant"
USER = "x-sutazai-user"
PRIORITY = "x-sutazai-priority"
LIST_PATH = "/v1/models"
GATEWAY = "gateway"
"""What faults name as the node."""
CONNECT_S = 5.0
RETRY_AFTER_S = 1.0
"""Where the gateway did not say."""


class HttpModels:
    """`Models` over HTTP. Made by `open_models`."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url.rstrip("/")
        self._list_url = url.rstrip("/") + LIST_PATH

    async def usual(self) -> str:
        try:
            async with self._session.get(self._list_url) as answer:
                told = await _whole(answer.content)
        except TimeoutError as error:
            raise errors.NodeTimeout("The gateway did not list its models in time. Ask again.", node=GATEWAY) from error
        except aiohttp.ClientError as error:
            raise errors.NodeUnreachable(
                f"The gateway was not reached: {error}. See that it runs.", node=GATEWAY
            ) from error
        if answer.status != 200:
            raise _error(answer.status, told, answer.headers.get("retry-after", ""))
        return _usual(told)

    async def chat(self, body: Mapping[str, Any], *, tenant: str, user: str, priority: Priority) -> Said:
        return said_in(await self._answer(CHAT, body, tenant, user, priority), node=GATEWAY)

    async def ask(
        self, endpoint: str, body: Mapping[str, Any], *, tenant: str, user: str, priority: Priority
    ) -> Answer:
        return answer_in(await self._answer(endpoint, body, tenant, user, priority), node=GATEWAY)

    async def _answer(
        self, endpoint: str, body: Mapping[str, Any], tenant: str, user: str, priority: Priority
    ) -> bytes:
        headers = {TENANT: tenant, PRIORITY: priority.name.lower()} | ({USER: user} if user else {})
        asked = asked_in(endpoint, body)
        try:
            async with self._session.post(self._url + endpoint, data=asked, headers=headers) as answer:
                told = await _whole(answer.content)
        except TimeoutError as error:
            raise errors.NodeTimeout("The gateway did not answer in time. Ask again.", node=GATEWAY) from error
        except aiohttp.ClientError as error:
            raise errors.NodeUnreachable(
                f"The gateway was not reached: {error}. See that it runs.", node=GATEWAY
            ) from error
        if answer.status == 200:
            return told
        raise _error(answer.status, told, answer.headers.get("retry-after", ""))


@asynccontextmanager
async def open_models(
    url: str, *, key: str | None, limit_s: float = 600.0, connections: int = 64
) -> AsyncIterator[HttpModels]:
    """
    The models behind the gateway at `url`.

    Args:
        key: one that may speak for other tenants; None where the gateway asks for none.
        limit_s: of one question and its answer.
        connections: at once; further questions wait, which counts as well.
    """
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    timeout = aiohttp.ClientTimeout(total=limit_s, sock_connect=CONNECT_S)
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=connections), headers=headers, timeout=timeout
    ) as session:
        yield HttpModels(session, url)


async def _whole(content: aiohttp.StreamReader) -> bytes:
    body = bytearray()
    async for part in content.iter_any():
        body += part
        if len(body) > MAX_REPLY_BYTES:
            raise errors.NodeFault(f"The answer was larger than {MAX_REPLY_BYTES} bytes.", node=GATEWAY)
    return bytes(body)


class _Listed(msgspec.Struct):
    id: str
    owned_by: str = ""


class _List(msgspec.Struct):
    data: list[_Listed]


def _usual(body: bytes) -> str:
    """The model that is chosen by the question, which the list puts before all others; else the first."""
    try:
        listed = msgspec.json.decode(body, type=_List).data
    except msgspec.DecodeError as error:
        raise errors.NodeFault(
            "The gateway's list of models was not understood. Check its address.", node=GATEWAY
        ) from error
    return listed[0].id if listed else ""


def _error(status: int, body: bytes, retry_after: str) -> errors.SutazaiError:
    """The gateway's own error, as it raised it."""
    message, kind, where = error_message(body), *_fault(body)
    wait_s = float(retry_after) if retry_after.isdigit() else RETRY_AFTER_S
    if status == 404:
        return errors.NotFound(message)
    if status == 429:
        limited = errors.BudgetSpent if kind == "insufficient_quota" else errors.RateLimited
        return limited(message, retry_after_s=wait_s)
    if status == 503:
        return errors.Overloaded(message, retry_after_s=wait_s)
    if status == 504:
        return errors.NodeTimeout(message, node=GATEWAY)
    plain = _PLAIN.get(status)
    if plain is not None:
        return plain(message)
    if 400 <= status < 499:
        return errors.BadRequest(message, where=where)
    return errors.Cancelled(message) if status == 499 else errors.NodeFault(message, node=GATEWAY)


_PLAIN: Mapping[int, type[errors.SutazaiError]] = {
    401: errors.Unauthorized,
    403: errors.Forbidden,
    409: errors.Conflict,
    413: errors.TooLarge,
}


class _Fault(msgspec.Struct):
    type: str | None = None
    param: str | None = None


class _Told(msgspec.Struct):
    error: _Fault


def _fault(body: bytes) -> tuple[str, str | None]:
    """The type and the field of an error in OpenAI's form."""
    try:
        fault = msgspec.json.decode(body, type=_Told).error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return "", None
    return fault.type or "", fault.param
