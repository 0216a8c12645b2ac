"""How errors are written and read."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sutazai.core.request import Dialect
from sutazai.dialects.errors import error_body, error_message, keep_alive, stream_error

GENERAL = "The node sent an error without a message; its log may tell more."


def test_an_openai_error_has_its_four_fields() -> None:
    body = error_body(Dialect.OPENAI, 400, "It was wrong.", kind="invalid_request_error", where="messages[0]")

    assert json.loads(body) == {
        "error": {
            "message": "It was wrong.",
            "type": "invalid_request_error",
            "param": "messages[0]",
            "code": "400",
        }
    }


def test_an_openai_error_without_a_place_has_a_null_param() -> None:
    body = error_body(Dialect.OPENAI, 503, "It was down.", kind="server_error", where=None)

    assert json.loads(body)["error"]["param"] is None


def test_an_ollama_error_is_one_sentence() -> None:
    assert error_body(Dialect.OLLAMA, 404, "Not here.", kind="x", where="y") == b'{"error":"Not here."}'


def test_an_error_in_an_openai_stream_is_one_event() -> None:
    event = stream_error(Dialect.OPENAI, 502, "Cut\noff.", "node_error")

    assert event.startswith(b"data: {")
    assert event.endswith(b"}\n\n")
    assert event.count(b"\n") == 2
    assert json.loads(event[6:])["error"]["message"] == "Cut\noff."


def test_an_error_in_an_ollama_stream_is_one_line() -> None:
    assert stream_error(Dialect.OLLAMA, 502, "Cut off.", "node_error") == b'{"error":"Cut off."}\n'


def test_a_sign_of_life_is_a_comment_to_openai_and_white_space_to_ollama() -> None:
    assert keep_alive(Dialect.OPENAI) == b": waiting\n\n"
    assert keep_alive(Dialect.OLLAMA) == b" "


def test_an_ollama_line_after_a_sign_of_life_is_still_json() -> None:
    assert json.loads(keep_alive(Dialect.OLLAMA) * 3 + b'{"done":true}') == {"done": True}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error":"model \\"x\\" not found"}', 'model "x" not found'),
        (
            b'{"error":{"message":"Too long","type":"invalid_request_error","param":null,"code":null}}',
            "Too long",
        ),
        (
            b'{"error":{"code":400,"message":"the request exceeds","type":"exceed_context_size_error"}}',
            "the request exceeds",
        ),
        (
            b'{"object":"error","message":"This model is busy","type":"BadRequestError","code":400}',
            "This model is busy",
        ),
        (b'{"detail":"Not Found"}', "Not Found"),
        (b'{"detail":[{"loc":["body"],"msg":"field required"}]}', "field required"),
        (b'"plain"', "plain"),
        (b"upstream timed out\n", "upstream timed out"),
        ("Größe überschritten".encode(), "Größe überschritten"),
    ],
)
def test_the_sentence_is_found_in_every_form_of_error(body: bytes, message: str) -> None:
    assert error_message(body) == message


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"  ",
        b"{}",
        b"null",
        b"502",
        b'{"error":{}}',
        b'{"error":null}',
        b"<html><body>Bad Gateway</body></html>",
        b"\x00\x01\x02",
        b"\x89PNG\r\n\x1a\n\xff",
        b"[" * 100_000,
    ],
)
def test_what_holds_no_sentence_gets_a_general_one(body: bytes) -> None:
    assert error_message(body) == GENERAL


def test_a_long_sentence_is_cut() -> None:
    assert error_message(json.dumps({"error": "a" * 5000}).encode()) == "a" * 2000
    assert error_message(("ä" * 5000).encode()) == "ä" * 2000


@given(st.binary(max_size=200))
def test_any_error_of_a_node_can_be_told_in_both_dialects(body: bytes) -> None:
    message = error_message(body)

    assert 0 < len(message) <= 2000
    for dialect in Dialect:
        json.loads(error_body(dialect, 502, message, kind="node_error", where=None))


@given(st.text(st.characters(codec=None), max_size=20))
def test_any_text_can_be_a_message(message: str) -> None:
    for dialect in Dialect:
        json.loads(error_body(dialect, 400, message, kind="k", where=message))
