"""Requests for llama.cpp: nothing is changed but what it needs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sutazai.core.errors import BadRequest
from sutazai.dialects.for_llamacpp import continues_a_turn, streamed, with_forced_tool

NAMES = st.text("abc_", min_size=1, max_size=4)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(-1e9, 1e9) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES, inner, max_size=2),
    max_leaves=4,
)
OBJECTS = st.dictionaries(NAMES, VALUES, max_size=4)


def tool(name: str, **more: object) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}, **more}


def choosing(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


@settings(deadline=None)
@given(OBJECTS, st.sampled_from([{}, {"stream": False}, {"stream": None}]))
def test_a_request_becomes_a_stream_that_tells_its_tokens_and_nothing_else_changes(
    fields: dict[str, Any], stream: dict[str, Any]
) -> None:
    asked = streamed(json.dumps(fields | stream).encode())

    assert asked is not None
    assert json.loads(asked) == fields | {"stream": True, "stream_options": {"include_usage": True}}


def test_values_are_copied_byte_for_byte() -> None:
    asked = streamed(b'{"seed": 1.0e+2, "prompt": "\\u0041 \\/", "stream" : false}')

    assert asked == b'{"seed":1.0e+2,"prompt":"\\u0041 \\/","stream":true,"stream_options":{"include_usage":true}}'


@pytest.mark.parametrize(
    ("options", "kept"),
    [("null", {}), ("{}", {}), ('{"include_usage":false,"include_obfuscation":true}', {"include_obfuscation": True})],
)
def test_options_of_a_stream_are_kept_beside_the_tokens(options: str, kept: dict[str, Any]) -> None:
    asked = streamed(b'{"stream_options":%b}' % options.encode())

    assert asked is not None
    assert json.loads(asked)["stream_options"] == kept | {"include_usage": True}


@pytest.mark.parametrize("body", [b"[]", b"{", b'{"stream_options":7}'])
def test_what_is_no_request_is_told(body: bytes) -> None:
    with pytest.raises(BadRequest):
        streamed(body)


@pytest.mark.parametrize(("logprobs", "may_stream"), [(True, False), (False, True), (None, True), (2, True)])
def test_a_chat_that_asks_how_likely_its_tokens_were_is_left_whole(logprobs: object, may_stream: bool) -> None:
    body = json.dumps({"logprobs": logprobs, "tools": [tool("add")]}).encode()

    assert (streamed(body) is not None) == may_stream


@pytest.mark.parametrize(
    ("messages", "continues"),
    [
        ([{"role": "user", "content": "Hi"}], False),
        ([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "He"}], True),
        ([{"role": "assistant", "content": "Hello"}, {"role": "user", "content": '"assistant"'}], False),
        ([{"role": "user", "content": "assistant"}], False),
    ],
)
def test_a_chat_that_ends_with_the_assistant_is_to_be_continued(messages: list[object], continues: bool) -> None:
    assert continues_a_turn(json.dumps({"messages": messages}).encode()) == continues


@settings(deadline=None)
@given(st.lists(NAMES, min_size=1, max_size=4), st.data(), OBJECTS)
def test_a_named_tool_is_the_only_one_and_required(
    names: list[str], data: st.DataObject, fields: dict[str, Any]
) -> None:
    name = data.draw(st.sampled_from(names))
    tools = [tool(each, place=place) for place, each in enumerate(names)]
    body = json.dumps(fields | {"tools": tools, "tool_choice": choosing(name)}).encode()

    forced = json.loads(with_forced_tool(body))

    named = [entry for entry in tools if entry["function"]["name"] == name]
    assert forced == fields | {"tools": named, "tool_choice": "required"}


@pytest.mark.parametrize("choice", ["auto", "none", "required", None, {"type": "allowed_tools", "allowed_tools": {}}])
def test_any_other_choice_is_given_back_as_it_is(choice: object) -> None:
    body = json.dumps({"tools": [tool("add")], "tool_choice": choice}, indent=1).encode()

    assert with_forced_tool(body) is body


def test_a_body_without_a_choice_is_not_even_read() -> None:
    body = b"not JSON"

    assert with_forced_tool(body) is body


@pytest.mark.parametrize("tools", [None, [], [tool("ping")], [{"type": "retrieval"}]])
def test_a_name_that_is_no_tool_is_told(tools: list[object] | None) -> None:
    body = json.dumps({"tools": tools, "tool_choice": choosing("add")}).encode()

    with pytest.raises(BadRequest, match="'add', which is not among the tools") as refused:
        with_forced_tool(body)
    assert refused.value.where == "tool_choice"


def test_a_choice_without_a_name_is_told() -> None:
    body = b'{"tools":[],"tool_choice":{"type":"function","function":{}}}'

    with pytest.raises(BadRequest, match=r"tool_choice\.function\.name is missing"):
        with_forced_tool(body)
