"""Bodies that ask the same have one form, and no others have it; and only complete answers are taken for complete."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sutazai.core.request import Endpoint
from sutazai.dialects.canonical import canonical, fields_of, names_remote_file
from sutazai.dialects.completeness import is_complete

CHAT, GENERATE = Endpoint.OPENAI_CHAT, Endpoint.OLLAMA_GENERATE

numbers = st.one_of(st.integers(-(2**60), 2**60), st.floats(allow_nan=False, allow_infinity=False))
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=10,
)
objects = st.dictionaries(st.text(max_size=5), values, max_size=5)


def form(body: str | bytes) -> bytes | None:
    fields = fields_of(body.encode() if isinstance(body, str) else body)
    return None if fields is None else canonical(fields, without=())


def shuffled(value: object, draw: st.DataObject) -> object:
    """The same object with its keys in another order."""
    if isinstance(value, dict):
        names = draw.draw(st.permutations(sorted(value)))
        return {name: shuffled(value[name], draw) for name in names}
    return [shuffled(each, draw) for each in value] if isinstance(value, list) else value


@given(objects, st.data())
def test_order_of_keys_and_white_space_make_no_difference(value: dict[str, object], draw: st.DataObject) -> None:
    plain = json.dumps(value)
    other = json.dumps(shuffled(value, draw), indent=3, ensure_ascii=False)

    assert form(plain) == form(other) is not None


@given(objects, objects)
def test_what_differs_in_meaning_differs_in_form(one: dict[str, object], other: dict[str, object]) -> None:
    """The form is JSON and says the same, so two that are equal mean the same."""
    forms = form(json.dumps(one)), form(json.dumps(other))
    same = json.loads(forms[0] or b"") == json.loads(forms[1] or b"")

    assert json.loads(forms[0] or b"") == one
    assert (forms[0] == forms[1]) <= same


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ('{"t":0}', '{"t":0.0}'),
        ('{"t":0}', '{"t":-0.0}'),
        ('{"t":1}', '{"t":1e0}'),
        ('{"t":100}', '{"t":1E+2}'),
        ('{"t":0.1}', '{"t":1e-1}'),
        ('{"t":[1.0,{"u":2.0}]}', '{"t":[1,{"u":2}]}'),
        ('{"t":"\\u0041\\/"}', '{"t":"A/"}'),
    ],
)
def test_equal_numbers_and_texts_are_written_the_same(one: str, other: str) -> None:
    assert form(one) == form(other) is not None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ('{"t":true}', '{"t":1}'),
        ('{"t":false}', '{"t":0}'),
        ('{"t":null}', "{}"),
        ('{"t":"0"}', '{"t":0}'),
        ('{"t":[]}', '{"t":{}}'),
        ('{"t":9007199254740993}', '{"t":9007199254740992}'),
        ('{"t":[1,2]}', '{"t":[2,1]}'),
        ('{"t":"\\u00e9"}', '{"t":"e\\u0301"}'),
        ('{"a":{"b":1}}', '{"a":{},"b":1}'),
    ],
)
def test_what_looks_alike_is_not_taken_for_the_same(one: str, other: str) -> None:
    assert form(one) != form(other)


@pytest.mark.parametrize(
    "body",
    [
        '{"a":1,"a":2}',
        '{"a":1,"\\u0061":1}',
        '{"options":{"seed":1},"options":{"temperature":0}}',
        '{"deep":[{"x":{"y":1,"y":1}}]}',
        "[1]",
        "7",
        "",
        "{",
        '{"a":NaN}',
        '{"a":-Infinity}',
        '{"a":"\\ud800"}',
        '{"a":' + "9" * 5000 + "}",
        '{"a":' + "[" * 100_000 + "]" * 100_000 + "}",
        b'{"a":"\xff"}',
        b"\xef\xbb\xbf{}",
    ],
    ids=lambda body: str(body)[:30],
)
def test_what_could_be_read_in_two_ways_has_no_form(body: str | bytes) -> None:
    assert form(body) is None


@given(st.binary(max_size=60))
def test_any_bytes_at_all_have_a_form_or_none(body: bytes) -> None:
    made = form(body)

    assert made is None or isinstance(msgspec.json.decode(made), dict)


def test_fields_may_be_left_out_at_the_top_alone() -> None:
    fields = fields_of(b'{"user":"u","messages":[{"user":"v"}]}')
    assert fields is not None

    assert canonical(fields, without={"user"}) == b'{"messages":[{"user":"v"}]}'


def test_a_picture_elsewhere_is_noticed_and_one_in_the_body_is_not() -> None:
    def of(picture: object) -> bytes:
        return form(json.dumps({"messages": [{"content": [{"type": "image_url", "image_url": picture}]}]})) or b""

    assert names_remote_file(of({"url": "https://example.org/a.png"}))
    assert names_remote_file(of("http://example.org/a.png"))
    assert names_remote_file(of("HTTPS://example.org/a.png"))
    assert names_remote_file(of("ftp://example.org/a.png"))
    assert not names_remote_file(of({"url": "data:image/png;base64,AAAA"}))
    assert not names_remote_file(form(json.dumps({"content": 'the text "url":"http://x"'})) or b"")


@pytest.mark.parametrize(
    ("endpoint", "body", "is_stream", "complete"),
    [
        (CHAT, b'{"choices":[{"finish_reason":"stop"}]}', False, True),
        (CHAT, b"", False, False),
        (CHAT, b'{"error":{"message":"no"}}', False, False),
        (CHAT, b' {\n "error" : "no"}', False, False),
        (CHAT, b'{"choices":[{"finish_reason": "abort"}]}', False, False),
        (
            CHAT,
            b'{"choices":[{"message":{"content":"{\\"error\\":1}, \\"finish_reason\\":\\"error\\""}}]}',
            False,
            True,
        ),
        (CHAT, b"data: {}\n\ndata: [DONE]\n\n", True, True),
        (CHAT, b"data: {}\n\ndata: [DONE]", True, True),
        (CHAT, b"data: {}\n\n", True, False),
        (CHAT, b'data: {}\n\ndata: {"error":{"message":"no"}}\n\ndata: [DONE]\n\n', True, False),
        (CHAT, b"data: {}\n\nevent: error\ndata: {}\n\ndata: [DONE]\n\n", True, False),
        (CHAT, b'data: {"delta":"data: {\\"error\\":"}\n\ndata: [DONE]\n\n', True, True),
        (GENERATE, b'{"response":"a"}\n{"response":"","done":true}\n', True, True),
        (GENERATE, b'{"response":"a","done":false}\n', True, False),
        (GENERATE, b'{"response":"a"}\n{"error":"no"}\n', True, False),
        (GENERATE, b'{"response":"a"}\n{"done":true,"error":"no"}\n', True, False),
        (GENERATE, b'{"response":"a"}\n{"done":tr', True, False),
        (GENERATE, b'{"response":"\\"done\\":true"}\n', True, False),
        (GENERATE, b'{"response":"a","done":true}', False, True),
    ],
)
def test_only_an_answer_with_its_proper_end_is_complete(
    endpoint: Endpoint, body: bytes, is_stream: bool, complete: bool
) -> None:
    assert is_complete(endpoint, body, is_stream=is_stream) is complete
