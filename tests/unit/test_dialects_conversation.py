"""Turns of a kept conversation: what a client sends, what a node gets, what is remembered of the answer."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sutazai.core.errors import BadRequest
from sutazai.dialects.conversation import Question, UpToDone, as_list, instructions, remembered
from sutazai.dialects.framing import Untranslatable

HI = {"role": "user", "content": "hi"}
DONE = b"data: [DONE]\n\n"


def question(body: dict[str, Any] | bytes) -> Question:
    return Question(body if isinstance(body, bytes) else msgspec.json.encode(body), "llama3")


def test_the_model_of_the_session_answers_where_none_is_named() -> None:
    assert question({"messages": [HI]}).model == "llama3"
    assert question({"messages": [HI], "model": "phi4"}).model == "phi4"


def test_the_request_has_all_that_was_sent_and_the_messages_that_are_given() -> None:
    asked = question(
        b'{"messages": [{"role": "user","content":"hi"}],  "temperature": 0.10, "stream":true,"x":{"a":[1]}}'
    )
    body = asked.among([instructions("Be brief."), b'{"role":"user","content":"old"}', asked.messages[0][1]])

    assert msgspec.json.decode(body) == {
        "model": "llama3",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "old"}, HI],
        "temperature": 0.1,
        "stream": True,
        "x": {"a": [1]},
    }
    assert b'{"role": "user","content":"hi"}' in body
    assert asked.stream
    assert asked.messages == [("user", b'{"role": "user","content":"hi"}')]


@pytest.mark.parametrize(
    ("fields", "longest"),
    [
        ({}, None),
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 7, "max_tokens": 5}, 7),
        ({"max_tokens": None}, None),
    ],
)
def test_the_longest_answer_is_what_the_client_says(fields: dict[str, int | None], longest: int | None) -> None:
    assert question({"messages": [HI]} | fields).answer_tokens == longest


@pytest.mark.parametrize(
    ("body", "where"),
    [
        (b"", None),
        (b"[]", None),
        (b'{"messages": []}', "messages"),
        (b'{"messages": [{"role":"user"}]}', "messages[0].content"),
        (b'{"messages": [{"role":"user","content":"a"},{"role":"nobody","content":"b"}]}', "messages[1].role"),
        (b'{"messages": [{"role":"user","content":"\xff"}]}', None),
        (b'{"messages": [{"role":"user","content":"a"}], "model": ""}', "model"),
        (b'{"messages": [{"role":"user","content":"a"}], "model": null}', "model"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_its_place_in_what_was_sent(body: bytes, where: str | None) -> None:
    with pytest.raises(BadRequest) as caught:
        question(body)
    if where is not None:
        assert caught.value.where == where


def test_of_a_field_that_comes_twice_the_one_that_is_sent_on_is_checked() -> None:
    with pytest.raises(BadRequest):
        question(b'{"messages": [{"role":"user","content":"a"}], "messages": [{"role":"user"}]}')


@given(st.binary(max_size=60))
def test_any_bytes_are_understood_or_refused(body: bytes) -> None:
    try:
        question(body)
    except BadRequest as error:
        assert error.message  # noqa: PT017 - whether it is raised at all depends on the bytes


@pytest.mark.parametrize(
    ("message", "kept"),
    [
        ({"role": "assistant", "content": "Hello"}, {"role": "assistant", "content": "Hello"}),
        ({"content": None}, {"role": "assistant", "content": ""}),
        ({"content": "x", "reasoning_content": "long"}, {"role": "assistant", "content": "x"}),
        (
            {"content": None, "tool_calls": [{"id": "c1", "function": {"name": "f", "arguments": "{}"}}]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "c1", "function": {"name": "f", "arguments": "{}"}}],
            },
        ),
        ({"content": None, "refusal": "No."}, {"role": "assistant", "content": None, "refusal": "No."}),
        ({"content": "x", "refusal": None, "tool_calls": None}, {"role": "assistant", "content": "x"}),
    ],
)
def test_what_is_said_and_called_is_remembered_and_what_is_thought_is_not(message: Any, kept: Any) -> None:
    answer = msgspec.json.encode({"choices": [{"message": message}, {"message": {"content": "other"}}], "id": "x"})

    assert msgspec.json.decode(remembered(answer)) == kept


@pytest.mark.parametrize("answer", [b"", b"{}", b'{"choices": []}', b'{"choices": [{"text": "x"}]}', b"\xff"])
def test_an_answer_without_a_message_is_not_remembered(answer: bytes) -> None:
    with pytest.raises(Untranslatable):
        remembered(answer)


def test_messages_are_listed_as_they_are() -> None:
    assert as_list([b'{"a": 1}', b'{"b":2}']) == b'{"object":"list","data":[{"a": 1},{"b":2}]}'
    assert as_list([]) == b'{"object":"list","data":[]}'


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    ends = sorted({place % (len(stream) + 1) for place in places} | {len(stream)})
    return [stream[start:end] for start, end in zip([0, *ends], ends, strict=False) if start < end]


@pytest.mark.parametrize("done", [DONE, b"data:[DONE]\r\n\r\n", b"data: [DONE]"])
@given(places=st.lists(st.integers(0, 300), max_size=20))
def test_the_end_is_held_back_wherever_the_stream_is_cut(done: bytes, places: list[int]) -> None:
    """Also where the model itself says how a stream ends."""
    sent = b'data: {"a":"data: [DONE]"}\n\n: waiting\n\ndata: {"b":1}\ndata: [DO\n\ndata: x [DONE]\n\n'
    tail = UpToDone()
    passed = b"".join(tail.pass_on(part) for part in cut(sent + done, places))

    assert passed == sent
    assert tail.rest == done


@given(st.lists(st.sampled_from([b'data: {"a":1}\n\n', b": waiting\n\n"])))
def test_a_whole_event_is_passed_on_at_once(events: list[bytes]) -> None:
    tail = UpToDone()

    assert [tail.pass_on(event) for event in events] == events
