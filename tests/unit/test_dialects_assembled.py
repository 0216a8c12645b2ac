"""A stream put together again is the whole answer, however it came."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion

from sutazai.core.request import Endpoint, Usage
from sutazai.dialects.assembled import Assembled, AssembledForOllama
from sutazai.dialects.framing import Untranslatable
from sutazai.dialects.from_openai import RepliesFromOpenAI

DONE = b"data: [DONE]\n\n"
ENVELOPE = {"created": 1795471296, "model": "m", "system_fingerprint": "b0-unknown", "id": "chatcmpl-pPd0"}
USAGE = {
    "completion_tokens": 6,
    "prompt_tokens": 18,
    "total_tokens": 24,
    "prompt_tokens_details": {"cached_tokens": 17},
}
TIMINGS = {"cache_n": 17, "prompt_n": 1, "prompt_ms": 0.149, "predicted_n": 6, "predicted_ms": 0.899}

TEXTS = st.text('aZ0"\\ \r\n\0é\u2028\U0001f600{}[],:', max_size=6)
PIECES = st.lists(TEXTS, max_size=4)
NAMES = st.text("abc_", min_size=1, max_size=4)
LIKELY = st.fixed_dictionaries({"token": TEXTS, "logprob": st.floats(-20, 0), "top_logprobs": st.just([])})
REASONS = st.sampled_from(["stop", "length", "tool_calls"])
SPLITS = st.lists(st.integers(0, 5000), max_size=8)


def event(**fields: object) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def chat_event(index: int, delta: object, reason: str | None = None, **more: Any) -> bytes:
    choice = {"finish_reason": reason, "index": index, "delta": delta, **more}
    return event(choices=[choice], **ENVELOPE, object="chat.completion.chunk")


def text_event(index: int, text: str, reason: str | None = None, logprobs: object = None) -> bytes:
    choice = {"text": text, "index": index, "logprobs": logprobs, "finish_reason": reason}
    return event(choices=[choice], **ENVELOPE, object="text_completion")


def last_event() -> bytes:
    return event(choices=[], **ENVELOPE, object="chat.completion.chunk", usage=USAGE, timings=TIMINGS)


def assembled(stream: bytes, at: list[int] | None = None, endpoint: Endpoint = Endpoint.OPENAI_CHAT) -> Any:
    answer = Assembled(endpoint)
    places = sorted(place % (len(stream) + 1) for place in at or [])
    for start, end in zip([0, *places], [*places, len(stream)], strict=True):
        assert answer.feed(stream[start:end]) == b""
    return json.loads(answer.finish())


Said = tuple[list[bytes], dict[str, Any]]
"""The events of one choice in their order, and the choice as a whole answer has it."""


@st.composite
def chat_choices(draw: st.DrawFn, index: int) -> Said:
    """What a llama.cpp server streams for one choice of a chat, and what it says where it does not stream."""
    thoughts, texts, reason = draw(PIECES), draw(PIECES), draw(REASONS)
    likely = draw(st.none() | st.lists(LIKELY, min_size=len(texts), max_size=len(texts)))
    events = [chat_event(index, {"role": "assistant", "content": None})]
    events += [chat_event(index, {"reasoning_content": thought}) for thought in thoughts]
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    for place, text in enumerate(texts):
        more: dict[str, Any] = {} if likely is None else {"logprobs": {"content": [likely[place]]}}
        events.append(chat_event(index, {"content": text}, **more))
    for number, (name, pieces) in enumerate(draw(st.lists(st.tuples(NAMES, PIECES), max_size=2))):
        first = {"index": number, "id": f"c{number}", "type": "function", "function": {"name": name, "arguments": ""}}
        rest = [{"index": number, "function": {"arguments": piece}} for piece in pieces]
        events += [chat_event(index, {"tool_calls": [call]}) for call in [first, *rest]]
        function = {"name": name, "arguments": "".join(pieces)}
        message.setdefault("tool_calls", []).append({"type": "function", "function": function, "id": f"c{number}"})
    events.append(chat_event(index, {}, reason))
    choice: dict[str, Any] = {"finish_reason": reason, "index": index, "message": message}
    return events, choice | ({"logprobs": {"content": likely}} if likely and texts else {})


@st.composite
def text_choices(draw: st.DrawFn, index: int) -> Said:
    """The same for a completion: the probabilities as llama.cpp has them, as OpenAI does, or none."""
    texts, reason = draw(PIECES), draw(REASONS)
    form = draw(st.sampled_from(["none", "llama.cpp", "openai"]))
    offsets = [sum(map(len, texts[:place])) for place in range(len(texts))]
    of_each: list[dict[str, list[Any]] | None]
    match form:
        case "llama.cpp":
            of_each = [{"content": [draw(LIKELY)]} for _ in texts]
        case "openai":
            of_each = [
                {"tokens": [text], "token_logprobs": [-0.5], "top_logprobs": [{text: -0.5}], "text_offset": [offset]}
                for text, offset in zip(texts, offsets, strict=True)
            ]
        case _:
            of_each = [None for _ in texts]
    events = [text_event(index, text, None, likely) for text, likely in zip(texts, of_each, strict=True)]
    joined: dict[str, list[Any]] = {}
    for likely in of_each:
        for name, entries in (likely or {}).items():
            joined.setdefault(name, []).extend(entries)
    choice = {"text": "".join(texts), "index": index, "logprobs": joined or None, "finish_reason": reason}
    return [*events, text_event(index, "", reason)], choice


@st.composite
def streams(draw: st.DrawFn, choices: list[Said]) -> bytes:
    """The events of all choices mixed, and between them what carries nothing."""
    order = draw(st.permutations([index for index, (events, _) in enumerate(choices) for _ in events]))
    left = [iter(events) for events, _ in choices]
    noise = st.sampled_from([b"", b": waiting\n\n", b"data: null\n\n", b"event: message\nid: 7\n\n", b"\n"])
    body = b"".join(draw(noise) + next(left[index]) for index in order) + last_event() + DONE
    return body.replace(b"\n", b"\r\n") if draw(st.booleans()) else body


@settings(deadline=None)
@given(st.data(), st.integers(1, 3), SPLITS)
def test_a_chat_is_the_same_whole_as_put_together_again(data: st.DataObject, count: int, at: list[int]) -> None:
    choices = [data.draw(chat_choices(index)) for index in range(count)]
    stream = data.draw(streams(choices))

    answer = assembled(stream, at)

    whole = {"choices": [choice for _, choice in choices], **ENVELOPE, "object": "chat.completion"}
    assert answer == whole | {"usage": USAGE, "timings": TIMINGS}


@settings(deadline=None)
@given(st.data(), st.integers(1, 3), SPLITS)
def test_a_completion_is_the_same_whole_as_put_together_again(data: st.DataObject, count: int, at: list[int]) -> None:
    choices = [data.draw(text_choices(index)) for index in range(count)]
    stream = data.draw(streams(choices))

    answer = assembled(stream, at, Endpoint.OPENAI_COMPLETION)

    whole = {"choices": [choice for _, choice in choices], **ENVELOPE, "object": "text_completion"}
    assert answer == whole | {"usage": USAGE, "timings": TIMINGS}


@settings(deadline=None)
@given(st.data(), SPLITS)
def test_a_stream_that_broke_off_anywhere_is_no_answer(data: st.DataObject, at: list[int]) -> None:
    choices = [data.draw(chat_choices(index)) for index in range(2)]
    stream = data.draw(streams(choices)).rstrip()
    end = data.draw(st.integers(0, len(stream) - 1))

    with pytest.raises(Untranslatable, match=r"broke off|no stream of events|could not be read"):
        assembled(stream[:end], at)


@settings(deadline=None)
@given(st.lists(st.sampled_from([b"data: ", b"\n\n", b"[DONE]", b"{}", b"null", b"[]", b"1", b'{"choices":', b"[{"])))
def test_whatever_comes_it_is_an_answer_or_untranslatable(bits: list[bytes]) -> None:
    with pytest.raises(Untranslatable):
        assembled(b"".join(bits))


# What the embedded engine (xllamacpp 2026.10) sent.

GOLDEN_CALL = {"index": 0, "id": "Dk", "type": "function", "function": {"name": "add", "arguments": "{"}}
GOLDEN_TOOLS = (
    chat_event(0, {"role": "assistant", "content": None})
    + chat_event(0, {"tool_calls": [GOLDEN_CALL]})
    + chat_event(0, {"tool_calls": [{"index": 0, "function": {"arguments": '"a":8}'}}]})
    + chat_event(0, {}, "tool_calls")
)
GOLDEN_PROMPTS = (
    b"data: null\n\n"
    + text_event(1, " GGUF")
    + text_event(0, " tiny")
    + text_event(1, "", "length")
    + text_event(0, "", "length")
)


def test_a_call_without_words_has_an_empty_content_as_llamacpp_says_it() -> None:
    answer = assembled(GOLDEN_TOOLS + last_event() + DONE)

    call = {"type": "function", "function": {"name": "add", "arguments": '{"a":8}'}, "id": "Dk"}
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    assert answer["choices"] == [{"finish_reason": "tool_calls", "index": 0, "message": message}]


def test_the_answers_to_a_list_of_prompts_stand_in_its_order() -> None:
    answer = assembled(GOLDEN_PROMPTS + last_event() + DONE, endpoint=Endpoint.OPENAI_COMPLETION)

    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [(0, " tiny"), (1, " GGUF")]


def test_tokens_that_were_counted_prompt_by_prompt_are_summed() -> None:
    """llama.cpp tells them with the last event of each prompt; the last of these is not the whole."""
    ended = [{"text": "", "index": index, "finish_reason": "stop"} for index in (1, 0)]
    counts = [
        {"prompt_tokens": 2, "completion_tokens": 5, "total_tokens": 7},
        {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4},
    ]
    stream = [event(choices=[choice], usage=usage) for choice, usage in zip(ended, counts, strict=True)]
    answer = Assembled(Endpoint.OPENAI_COMPLETION)
    answer.feed(b"".join([*stream, DONE]))

    whole = json.loads(answer.finish())

    assert whole["usage"] == {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11}
    assert answer.usage == Usage(5, 6)
    assert [choice["usage"] for choice in whole["choices"]] == [counts[1], counts[0]]


def test_a_refusal_and_nulls_are_said_as_openai_says_them() -> None:
    first = chat_event(0, {"role": "model", "content": "", "refusal": None}, logprobs=None)
    spoken = [chat_event(1, {"refusal": "No"}), chat_event(1, {"refusal": "."}, "stop")]

    answer = assembled(b"".join([first, chat_event(0, {"content": "Yes"}, "stop"), *spoken, DONE]))

    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "model", "content": "Yes", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        },
        {"index": 1, "message": {"role": "assistant", "content": "", "refusal": "No."}, "finish_reason": "stop"},
    ]


def test_the_name_of_a_tool_that_grew_is_its_last() -> None:
    pieces = [
        {"index": 0, "id": "x", "function": {"name": name, "arguments": "{}"[at]}} for at, name in enumerate("aA")
    ]

    answer = assembled(b"".join([chat_event(0, {"tool_calls": [piece]}) for piece in pieces]) + finished())

    assert answer["choices"][0]["message"]["tool_calls"][0]["function"] == {"name": "A", "arguments": "{}"}


def test_calls_without_an_index_stand_in_order() -> None:
    calls = [{"function": {"name": name, "arguments": "{}"}} for name in "ab"]

    answer = assembled(chat_event(0, {"tool_calls": calls}) + finished())

    called = answer["choices"][0]["message"]["tool_calls"]
    assert called == [{"type": "function", **call} for call in calls]


def test_calls_stand_in_the_order_of_their_index() -> None:
    pieces = [{"index": index, "function": {"name": f"f{index}", "arguments": "{}"}} for index in (1, 0)]

    answer = assembled(chat_event(0, {"tool_calls": pieces}) + finished())

    called = answer["choices"][0]["message"]["tool_calls"]
    assert [call["function"]["name"] for call in called] == ["f0", "f1"]


def test_the_end_needs_no_empty_line_and_nothing_counts_after_it() -> None:
    begun = chat_event(0, {"content": "Hi"}) + finished()

    endings = [begun.rstrip(), begun + chat_event(0, {"content": "!"}) + b"data: {no json\n\n"]

    assert {assembled(stream)["choices"][0]["message"]["content"] for stream in endings} == {"Hi"}


def finished() -> bytes:
    return chat_event(0, {}, "stop") + last_event() + DONE


def test_the_tokens_are_known_at_the_end_and_a_null_before_it_does_not_matter() -> None:
    answer = Assembled(Endpoint.OPENAI_CHAT)
    answer.feed(event(choices=[], usage=USAGE) + chat_event(0, {}, "stop") + event(choices=[], usage=None) + DONE)
    before = answer.usage

    assert json.loads(answer.finish())["usage"] == USAGE
    assert (before, answer.usage) == (None, Usage(18, 6))


def test_tokens_below_zero_are_none() -> None:
    answer = Assembled(Endpoint.OPENAI_CHAT)
    answer.feed(chat_event(0, {"content": "x"}, "stop"))
    answer.feed(event(choices=[], usage={"prompt_tokens": -7, "completion_tokens": 2}) + DONE)
    answer.finish()

    assert answer.usage == Usage(0, 2)


@pytest.mark.parametrize("usage", [None, 7, {"prompt_tokens": "many"}])
def test_without_tokens_an_answer_is_still_one(usage: object) -> None:
    answer = Assembled(Endpoint.OPENAI_CHAT)
    answer.feed(chat_event(0, {"content": "Hi"}, "stop") + event(choices=[], usage=usage) + DONE)

    assert json.loads(answer.finish())["choices"][0]["message"]["content"] == "Hi"
    assert answer.usage is None


@pytest.mark.parametrize(
    "failure",
    [
        b'data: {"error":{"code":500,"message":"Compute error.","type":"server_error"}}\n\n',
        b'error: {"code":500,"message":"Compute error."}\n\n',
        b'data: {"choices":[{"index":0,"delta":{}}],"error":"Compute error."}\n\n',
    ],
)
def test_an_error_among_the_events_is_told(failure: bytes) -> None:
    with pytest.raises(Untranslatable, match=r"^Compute error\.$"):
        assembled(chat_event(0, {"content": "Hi"}) + failure + DONE)


@pytest.mark.parametrize("body", [b"", b'{"choices":[]}', b"<html>\n\n", b": waiting\n\n"])
def test_what_is_no_stream_is_no_answer(body: bytes) -> None:
    with pytest.raises(Untranslatable, match="no stream of events"):
        assembled(body)


@pytest.mark.parametrize(
    "stream",
    [
        chat_event(0, {"content": "Hi"}, "stop"),
        chat_event(0, {"content": "Hi"}) + DONE,
        chat_event(0, {}, "stop") + chat_event(1, {"content": "Hi"}) + DONE,
    ],
)
def test_an_answer_ends_with_a_reason_for_each_choice_and_a_mark(stream: bytes) -> None:
    with pytest.raises(Untranslatable, match="broke off"):
        assembled(stream)


def test_an_answer_needs_a_choice() -> None:
    with pytest.raises(Untranslatable, match="no choices"):
        assembled(last_event() + DONE)


@pytest.mark.parametrize(
    "piece",
    [
        chat_event(0, {"content": "x" * 500}),
        chat_event(0, {"tool_calls": [{"index": 0, "function": {"arguments": "x" * 500}}]}),
        chat_event(0, {}, logprobs={"content": [{"token": "x", "logprob": -0.5}] * 4}),
    ],
)
def test_an_answer_fails_at_the_limit_and_not_before(piece: bytes) -> None:
    answer = Assembled(Endpoint.OPENAI_CHAT, limit_bytes=11_000)
    for _ in range(5):
        answer.feed(piece)

    with pytest.raises(Untranslatable, match="larger than 11000 bytes"):
        answer.feed(piece * 50)


@pytest.mark.parametrize(
    "pieces",
    [
        [chat_event(index, {}) for index in range(20)],
        [chat_event(0, {"tool_calls": [{"index": index}]}) for index in range(20)],
        [event(**{f"field{index}": index}) for index in range(20)],
    ],
    ids=["choices", "calls", "fields"],
)
def test_many_small_things_fail_at_the_limit_too(pieces: list[bytes]) -> None:
    answer = Assembled(Endpoint.OPENAI_CHAT, limit_bytes=20_000)
    answer.feed(b"".join(pieces[:10]))

    with pytest.raises(Untranslatable, match="larger than 20000 bytes"):
        answer.feed(b"".join(pieces))


def test_the_official_client_can_read_what_was_put_together() -> None:
    chat = assembled(GOLDEN_TOOLS + event(choices=[], **ENVELOPE, usage=USAGE) + DONE)
    prompts = GOLDEN_PROMPTS + event(choices=[], **ENVELOPE, usage=USAGE) + DONE
    completion = assembled(prompts, endpoint=Endpoint.OPENAI_COMPLETION)

    message = ChatCompletion.model_validate(chat).choices[0].message
    assert message.tool_calls is not None
    assert message.tool_calls[0].id == "Dk"
    assert Completion.model_validate(completion).choices[0].text == " tiny"


def test_a_stream_for_an_ollama_client_is_put_together_and_translated() -> None:
    replies = RepliesFromOpenAI(Endpoint.OLLAMA_CHAT, model="n", stream=False, now=lambda: 0.0, clock=lambda: "now")
    answer = AssembledForOllama(Endpoint.OPENAI_CHAT, replies)
    pieces = [answer.feed(chat_event(0, {"content": text})) for text in ("He", "llo")]

    whole = json.loads(answer.feed(finished()) + answer.finish())
    assert (whole["model"], whole["message"]["content"], whole["done"]) == ("n", "Hello", True)
    assert (whole["prompt_eval_count"], whole["eval_count"], whole["prompt_eval_duration"]) == (18, 6, 149_000)
    assert pieces == [b"", b""]
    assert answer.usage == Usage(18, 6)
    assert answer.content_type == b"application/json; charset=utf-8"
