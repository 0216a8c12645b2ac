"""Guesses of what a request will take: what the client named, found without decoding, or else the usual."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sutazai.core.request import Endpoint, Request
from sutazai.policy.token_estimate import LOOK_BYTES, MAX_INPUT_TOKENS, OUTPUT_TOKENS, estimated_tokens


def request(body: object, endpoint: Endpoint = Endpoint.OPENAI_CHAT, *, loads_only: bool = False) -> Request:
    encoded = body if isinstance(body, bytes) else msgspec.json.encode(body)
    return Request("r", endpoint, "m", False, encoded, "acme", "k1", 0.0, loads_only=loads_only)


@pytest.mark.parametrize(
    ("body", "output_tokens"),
    [
        ({"max_tokens": 17}, 17),
        ({"max_completion_tokens": 17}, 17),
        ({"options": {"num_predict": 17}}, 17),
        (b'{ "max_tokens" :\n 17 }', 17),
        ({"max_tokens": 0}, 0),
        ({"max_tokens": None}, OUTPUT_TOKENS),
        ({"options": {"num_predict": -1}}, OUTPUT_TOKENS),
        ({}, OUTPUT_TOKENS),
        ({"tools": [{"properties": {"max_tokens": {"type": "integer"}}}]}, OUTPUT_TOKENS),
        ({"messages": [{"content": '"max_tokens": 17'}]}, OUTPUT_TOKENS),
        ({"messages": [{"content": "a" * 9000}], "max_tokens": 17}, 17),
        ({"max_tokens": 17, "messages": [{"content": "a" * 9000}]}, 17),
    ],
)
def test_the_output_is_what_the_client_allows(body: object, output_tokens: int) -> None:
    assert estimated_tokens(request(body))[1] == output_tokens


@given(st.text())
def test_no_prompt_names_an_output(prompt: str) -> None:
    """Whatever it says of `max_tokens`, its quotes are escaped."""
    text = f'{prompt}"max_tokens": 17 "num_predict":17{prompt}'

    assert estimated_tokens(request({"messages": [{"content": text}]}))[1] == OUTPUT_TOKENS


def test_an_embedding_and_a_load_give_no_tokens() -> None:
    embedding = request({"input": "a"}, Endpoint.OPENAI_EMBEDDING)
    load = request({"model": "m"}, Endpoint.OLLAMA_GENERATE, loads_only=True)

    assert [estimated_tokens(one)[1] for one in (embedding, load)] == [0, 0]


def test_the_input_grows_with_the_body_up_to_what_a_model_reads() -> None:
    sizes = [estimated_tokens(request(b"a" * size))[0] for size in (0, 400, 10 * LOOK_BYTES, 2**22)]

    assert sizes == [1, 101, 10 * LOOK_BYTES // 4 + 1, MAX_INPUT_TOKENS]
