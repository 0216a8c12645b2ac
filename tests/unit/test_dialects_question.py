"""What is asked, out of every form of request; and the same request for another model."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sutazai.core.errors import BadRequest
from sutazai.core.request import Endpoint, Question
from sutazai.dialects.question import question_of
from sutazai.dialects.reading import read
from sutazai.dialects.renamed import renamed


def body(**fields: Any) -> bytes:
    return msgspec.json.encode({"model": "auto", **fields})


def test_the_last_message_of_the_user_is_the_question() -> None:
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "answer"},
        {"role": "user", "content": "last"},
        {"role": "assistant", "content": "begun"},
    ]

    for endpoint in (Endpoint.OPENAI_CHAT, Endpoint.OLLAMA_CHAT):
        assert question_of(endpoint, body(messages=messages)) == Question(text="last", turns=5)


def test_the_texts_of_parts_are_joined_and_images_counted() -> None:
    parts = [
        {"type": "text", "text": "What is"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
        {"type": "text", "text": "this?"},
    ]

    asked = question_of(Endpoint.OPENAI_CHAT, body(messages=[{"role": "user", "content": parts}]))

    assert asked == Question(text="What is\nthis?", images=1)


def test_images_of_an_ollama_message_and_tools_are_counted() -> None:
    message = {"role": "user", "content": "look", "images": ["AAAA", "BBBB"]}
    tools = [{"type": "function", "function": {"name": "f"}}]

    asked = question_of(Endpoint.OLLAMA_CHAT, body(messages=[message], tools=tools))

    assert asked == Question(text="look", tools=1, images=2)


def test_a_chat_without_words_of_the_user_is_read_by_its_last_message() -> None:
    asked = question_of(Endpoint.OPENAI_CHAT, body(messages=[{"role": "system", "content": "Go on."}]))

    assert asked.text == "Go on."


def test_prompts_are_questions_and_lists_of_prompts_too() -> None:
    assert question_of(Endpoint.OPENAI_COMPLETION, body(prompt="a")).text == "a"
    assert question_of(Endpoint.OPENAI_COMPLETION, body(prompt=["a", "b"])).text == "a\nb"
    assert question_of(Endpoint.OPENAI_COMPLETION, body(prompt=[[1, 2]])).text == ""
    assert question_of(Endpoint.OLLAMA_GENERATE, body(prompt="a", images=["AAAA"])) == Question(text="a", images=1)


@pytest.mark.parametrize(
    ("endpoint", "field"),
    [(Endpoint.OPENAI_EMBEDDING, "input"), (Endpoint.OLLAMA_EMBED, "input"), (Endpoint.OLLAMA_EMBEDDINGS, "prompt")],
)
def test_a_model_for_embeddings_is_not_chosen(endpoint: Endpoint, field: str) -> None:
    with pytest.raises(BadRequest, match="embeddings"):
        question_of(endpoint, body(**{field: "x"}))


@given(
    st.dictionaries(
        st.text(max_size=8), st.integers() | st.text(max_size=8) | st.lists(st.floats(allow_nan=False)), max_size=6
    ),
    st.text(min_size=1, max_size=20),
)
def test_only_the_model_changes(fields: dict[str, Any], model: str) -> None:
    before = {"model": "auto", **fields}

    after = msgspec.json.decode(renamed(msgspec.json.encode(before), model))

    assert after == msgspec.json.decode(msgspec.json.encode({**before, "model": model}))


def test_numbers_keep_the_digits_they_were_sent_with() -> None:
    assert renamed(b'{"model": "auto", "temperature": 0.10}', "m") == b'{"model":"m","temperature":0.10}'


@pytest.mark.parametrize(
    ("endpoint", "asked"),
    [
        (Endpoint.OPENAI_COMPLETION, b'{"model":"auto","prompt":"\xff"}'),
        (Endpoint.OPENAI_CHAT, b'{"model":"auto","messages":[{"role":"user","content":"\xff"}]}'),
        (
            Endpoint.OPENAI_CHAT,
            b'{"model":"auto","messages":[{"role":"user","content":[{"type":"text","text":"\xff"}]}]}',
        ),
        (Endpoint.OLLAMA_GENERATE, b'{"model":"auto","prompt":"\xc0"}'),
    ],
)
def test_a_text_that_is_no_unicode_is_the_fault_of_its_client(endpoint: Endpoint, asked: bytes) -> None:
    read(endpoint, asked)  # the fast lane has not looked into it

    with pytest.raises(BadRequest, match="UTF-8"):
        question_of(endpoint, asked)
