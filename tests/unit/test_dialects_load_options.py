"""Ollama requests with our load options in place of the client's."""

from __future__ import annotations

import json

import pytest

from sutazai.core.errors import BadRequest
from sutazai.dialects.load_options import with_context
from sutazai.dialects.ollama_shapes import LOAD_OPTIONS


def options_of(body: bytes) -> dict[str, object]:
    options: dict[str, object] = json.loads(body)["options"]
    return options


def test_the_context_length_is_set() -> None:
    body = with_context(b'{"model":"m","options":{"num_ctx":1,"seed":7}}', num_ctx=8192, load_options={})

    assert options_of(body) == {"seed": 7, "num_ctx": 8192}


def test_load_options_of_the_client_are_dropped_and_ours_are_set() -> None:
    asked = json.dumps({"model": "m", "options": dict.fromkeys(LOAD_OPTIONS, 1) | {"temperature": 0.5}})

    body = with_context(asked.encode(), num_ctx=None, load_options={"num_gpu": 99, "use_mmap": False})

    assert options_of(body) == {"temperature": 0.5, "num_gpu": 99, "use_mmap": False}


@pytest.mark.parametrize("asked", [b'{"model":"m"}', b'{"model":"m","options":null}', b'{"model":"m","options":{}}'])
def test_options_are_made_where_there_are_none(asked: bytes) -> None:
    assert options_of(with_context(asked, num_ctx=4096, load_options={})) == {"num_ctx": 4096}


def test_options_that_become_empty_are_left_out() -> None:
    assert with_context(b'{"model":"m","options":{"num_ctx":5}}', num_ctx=None, load_options={}) == b'{"model":"m"}'


def test_all_else_keeps_its_bytes() -> None:
    kept = [
        b'"x":1.50e2',
        b'"y":123456789012345678901234567890',
        b'"z":{"num_ctx": 1}',
        b'"s":"\\u00e9 \xc3\xa9"',
    ]
    asked = b'{"model":"m",' + b",".join(kept) + b',"options":{"seed":1e0}}'

    body = with_context(asked, num_ctx=5, load_options={})

    assert all(value in body for value in [*kept, b'"seed":1e0', b'"num_ctx":5'])


@pytest.mark.parametrize("asked", [b"[]", b"", b'{"options":[]}', b'{"options":' + b"[" * 10_000])
def test_what_is_no_request_is_refused(asked: bytes) -> None:
    with pytest.raises(BadRequest):
        with_context(asked, num_ctx=1, load_options={})
