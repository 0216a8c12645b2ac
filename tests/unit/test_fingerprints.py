"""Fingerprints are equal for requests that may share an answer, and for no others."""

from __future__ import annotations

import random
import string

import msgspec
import pytest

from sutazai.core.request import Endpoint, Request
from sutazai.dialects.reading import read
from sutazai.gateway.fingerprints import REMEMBERED, Fingerprints

CHAT = Endpoint.OPENAI_CHAT
ASKED = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}


def private(_model: str) -> bool:
    return False


def request_of(body: object, *, endpoint: Endpoint = CHAT, tenant: str = "acme", model: str = "") -> Request:
    """A request as the edge reads it."""
    encoded = body if isinstance(body, bytes) else msgspec.json.encode(body)
    asked = read(endpoint, encoded)
    request = Request("r", endpoint, model or asked.model, asked.stream, encoded, tenant, "key", 0.0)
    request.is_deterministic, request.loads_only = asked.is_deterministic, asked.loads_only
    return request


def fingerprint(body: object, **more: object) -> bytes:
    return Fingerprints(private).of(request_of(body, **more))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "other",
    [
        {"temperature": 0.0, "messages": [{"content": "hi", "role": "user"}], "model": "m"},
        ASKED | {"user": "somebody"},
        ASKED | {"metadata": {"a": 1}},
        ASKED | {"stream": False},
        ASKED | {"stream": None},
    ],
)
def test_requests_that_ask_the_same_share(other: dict[str, object]) -> None:
    assert fingerprint(ASKED) == fingerprint(other)
    assert len(fingerprint(ASKED)) == 32


@pytest.mark.parametrize(
    "other",
    [
        ASKED | {"stream": True},
        ASKED | {"stream": True, "stream_options": {"include_usage": True}},
        ASKED | {"model": "n"},
        ASKED | {"seed": 1},
        ASKED | {"temperature": 0, "top_p": 0.5},
        ASKED | {"max_tokens": 5},
        ASKED | {"messages": [{"role": "user", "content": "hi "}]},
        ASKED | {"messages": [{"role": "system", "content": "hi"}]},
        ASKED | {"tools": [{"type": "function", "function": {"name": "f"}}]},
        ASKED | {"something_new": 1},
        ASKED | {"response_format": {"type": "json_object"}},
    ],
)
def test_requests_that_differ_in_anything_else_do_not(other: dict[str, object]) -> None:
    assert fingerprint(other)
    assert fingerprint(ASKED) != fingerprint(other)


def test_a_stream_with_its_usage_is_another_than_one_without() -> None:
    plain = fingerprint(ASKED | {"stream": True})

    assert plain != fingerprint(ASKED | {"stream": True, "stream_options": {"include_usage": True}})


def test_addresses_and_the_model_that_was_chosen_are_part_of_it() -> None:
    body = {"model": "m", "prompt": "p", "temperature": 0, "options": {"temperature": 0}, "stream": False}
    made = {
        fingerprint(body, endpoint=Endpoint.OPENAI_COMPLETION),
        fingerprint(body, endpoint=Endpoint.OLLAMA_GENERATE),
        fingerprint(body, endpoint=Endpoint.OPENAI_COMPLETION, model="chosen"),
    }

    assert len(made) == 3
    assert b"" not in made


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        (CHAT, ASKED | {"keep_alive": "5m"}),
        (CHAT, ASKED | {"store": True}),
        (CHAT, {**ASKED, "temperature": 1, "seed": -1}),
        (CHAT, b'{"model":"m","messages":[{"role":"user","content":"a"}],"temperature":0,"temperature":0}'),
        (CHAT, ASKED | {"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "https://example.org/cat.png"}}]}]}),
        (Endpoint.OLLAMA_GENERATE, {"model": "m", "prompt": "p", "context": [1], "options": {"temperature": 0}}),
        (Endpoint.OLLAMA_GENERATE, {"model": "m", "prompt": "p", "keep_alive": 0, "options": {"temperature": 0}}),
        (Endpoint.OLLAMA_CHAT, {"model": "m", "messages": [], "options": {"temperature": 0}}),
        (Endpoint.OLLAMA_GENERATE, {"model": "m", "prompt": "p", "temperature": 0, "options": {"seed": -1}}),
    ],
)  # fmt: skip
def test_what_may_not_be_shared_has_none(endpoint: Endpoint, body: object) -> None:
    assert fingerprint(body, endpoint=endpoint) == b""


def test_a_picture_in_the_body_may_be_shared_and_counts() -> None:
    def with_picture(data: str) -> dict[str, object]:
        return {"model": "m", "prompt": "p", "images": [data], "options": {"temperature": 0}}

    made = {fingerprint(with_picture(data), endpoint=Endpoint.OLLAMA_GENERATE) for data in ("AAAA", "AAAB")}

    assert len(made) == 2
    assert b"" not in made


def test_what_is_remembered_is_what_would_be_made_and_is_bounded() -> None:
    fingerprints = Fingerprints(private)
    bodies = [ASKED | {"seed": number} for number in range(REMEMBERED + 100)]
    first = [fingerprints.of(request_of(body)) for body in bodies]
    again = [fingerprints.of(request_of(body)) for body in reversed(bodies)]

    assert first == again[::-1]
    assert len(set(first)) == len(bodies)
    assert len(fingerprints._young) + len(fingerprints._old) <= REMEMBERED


def test_tenants_share_nothing_but_public_models() -> None:
    public = {"open"}
    fingerprints = Fingerprints(public.__contains__)

    def made(model: str, tenant: str) -> bytes:
        return fingerprints.of(request_of(ASKED | {"model": model}, tenant=tenant))

    assert made("m", "a") != made("m", "b")
    assert made("open", "a") == made("open", "b")
    public.clear()
    assert made("open", "a") != made("open", "b")
    public.add("m")
    assert made("m", "a") == made("m", "b")


def test_where_one_name_ends_and_the_next_begins_counts() -> None:
    """The model may have been chosen for the client, so the body does not tell it."""
    assert fingerprint(ASKED, tenant="a", model="bm") != fingerprint(ASKED, tenant="ab", model="m")
    assert fingerprint(ASKED, tenant="a", model="m") != fingerprint(ASKED, tenant="", model="am")


def test_ten_thousand_random_pairs_of_tenants_never_meet() -> None:
    """Equal questions of different tenants, with names made to be mistaken for each other."""
    chance = random.Random(11)
    alphabet = string.ascii_letters + '",\n\\[]{}\x00 é'
    fingerprints = Fingerprints(private)
    owner: dict[bytes, str] = {}
    for number in range(10_000):
        one = "".join(chance.choices(alphabet, k=chance.randrange(0, 4)))
        other = one + chance.choice(alphabet) if chance.random() < 0.5 else chance.choice(alphabet)
        body = ASKED | {"model": chance.choice(["m", 'm","x', "n"]), "seed": number % 7}
        for tenant in {one, other}:
            made = fingerprints.of(request_of(body, tenant=tenant))

            assert owner.setdefault(made, tenant) == tenant
