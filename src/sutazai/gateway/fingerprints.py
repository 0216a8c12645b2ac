"""
Which requests may share an answer, as 32 bytes: equal for those that may.

Making one takes a decoding of the whole body, so what was made is remembered by the hash of the bytes: clients that
ask again mostly send the very same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import TypeAlias

import msgspec

from sutazai.core.request import Dialect, Request
from sutazai.dialects.canonical import canonical, fields_of, names_remote_file
from sutazai.policy.cacheability import IDLE_FIELDS, why_not_shared

REMEMBERED = 8192
"""Bodies, about 400 bytes each."""
LEFT_OUT = IDLE_FIELDS | {"stream"}
"""Whether it streams stands before the body, because clients of Ollama mean yes by saying nothing."""

Asked: TypeAlias = tuple[bytes, str, str | None, str]


class Fingerprints:
    """Makes fingerprints, and remembers the latest."""

    def __init__(self, is_public: Callable[[str], bool]) -> None:
        """Make it; `is_public` tells of a model whether all tenants may share its answers, as of now."""
        self._is_public = is_public
        # two generations: what was not asked for while one filled up is dropped with the older
        self._young: dict[Asked, bytes] = {}
        self._old: dict[Asked, bytes] = {}

    def of(self, request: Request) -> bytes:
        """
        The fingerprint of a deterministic request; empty where its answer may be given to nobody else.

        To be asked once `request.model` is the one that a node will be asked for.
        """
        model = request.model
        tenant = None if self._is_public(model) else request.tenant
        asked = (sha256(request.body).digest(), request.endpoint.path, tenant, model)
        found = self._young.get(asked)
        return found if found is not None else self._older(asked, request)

    def _older(self, asked: Asked, request: Request) -> bytes:
        found = self._old.get(asked)
        if found is None:
            found = _made(request, asked)
        if len(self._young) >= REMEMBERED // 2:
            self._old, self._young = self._young, {}
        self._young[asked] = found
        return found


def _made(request: Request, asked: Asked) -> bytes:
    fields = fields_of(request.body)
    if request.loads_only or fields is None or why_not_shared(fields, _sampling(request, fields)):
        return b""
    form = canonical(fields, without=LEFT_OUT)
    if form is None or names_remote_file(form):
        return b""
    # neither JSON has a line end in it, so one cannot pass for the other
    return sha256(msgspec.json.encode((*asked[1:], request.stream)) + b"\n" + form).digest()


def _sampling(request: Request, fields: Mapping[str, object]) -> Mapping[str, object]:
    if request.endpoint.dialect is Dialect.OPENAI:
        return fields
    options = fields.get("options")
    return options if isinstance(options, dict) else {}
