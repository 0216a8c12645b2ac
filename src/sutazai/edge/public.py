"""
What anybody may see: the start page, and what it is made of.

The page is for people who open the gateway's address in a browser. Programs that ask the same address, Ollama's
clients among them, get the line of text that they look for. Nothing here depends on who asks, and nothing is secret.
"""

from __future__ import annotations

import hashlib
import html
import mimetypes
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files

from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response

from sutazai import __version__
from sutazai.core.errors import NotFound
from sutazai.edge.freshness import FOREVER, PUBLIC_VARY, public_reply
from sutazai.edge.replies import Address

ASSETS = ("start.css", "icon.svg")
PAGE = "start.html"
SECURITY = {
    "content-security-policy": (
        "default-src 'none'; style-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
USUAL_HOST = "localhost:10010"
"""Where a client did not say how it calls us, or in a way that cannot be shown."""

_HOST = re.compile(r"(?:[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::\d{1,5})?")


@dataclass(frozen=True, slots=True)
class Asset:
    """A file that a page needs."""

    body: bytes
    media_type: str


def routes() -> list[Address]:
    """The start page and its files; these are read here, once."""
    folder = files(__package__) / "assets"
    assets: dict[str, Asset] = {}
    links = {"version": __version__}
    for name in ASSETS:
        body = (folder / name).read_bytes()
        hashed = _hashed(name, body)
        assets[hashed] = Asset(body, mimetypes.guess_type(name)[0] or "application/octet-stream")
        links[name] = f"/assets/{hashed}"
    page = _filled((folder / PAGE).read_text("utf-8"), links)

    async def root(http: HttpRequest) -> Response:
        if "text/html" not in http.headers.get("accept", ""):
            return PlainTextResponse("Ollama is running, behind SutazAI\n")
        shown = _filled(page, {"address": html.escape(address_of(http.headers))})
        vary = f"{PUBLIC_VARY}, X-Forwarded-Proto"
        return public_reply(http, shown.encode(), "text/html", vary=vary, headers=SECURITY)

    async def asset(http: HttpRequest) -> Response:
        found = assets.get(http.path_params["name"])
        if found is None:
            raise NotFound("No such file is here; the start page, `/`, names those that are.")
        headers = {"x-content-type-options": "nosniff"}
        return public_reply(http, found.body, found.media_type, cache_control=FOREVER, headers=headers)

    return [Address("/", root), Address("/assets/{name}", asset)]


def address_of(headers: Mapping[str, str]) -> str:
    """How the client calls us, to be shown to it; a proxy that speaks TLS for us says so in `X-Forwarded-Proto`."""
    host = headers.get("host", "")
    scheme = "https" if headers.get("x-forwarded-proto", "").lower() == "https" else "http"
    return f"{scheme}://{host if _HOST.fullmatch(host) else USUAL_HOST}"


def _hashed(name: str, body: bytes) -> str:
    """A name that changes when the file does."""
    stem, _, ending = name.rpartition(".")
    return f"{stem}.{hashlib.blake2b(body, digest_size=6).hexdigest()}.{ending}"


def _filled(text: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        text = text.replace(f"{{{{{name}}}}}", value)
    return text
