"""Tokens found in bytes that pass through."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sutazai.core.request import Endpoint, Usage
from sutazai.dialects.usage import CARRY_BYTES, UsageScan, usage_of_whole


def scanned(endpoint: Endpoint, *pieces: bytes) -> Usage | None:
    scan = UsageScan(endpoint)
    for piece in pieces:
        scan.feed(piece)
    return scan.result()


def split(body: bytes, at: list[int]) -> list[bytes]:
    places = sorted(place % (len(body) + 1) for place in at)
    return [body[start:end] for start, end in zip([0, *places], [*places, len(body)], strict=True)]


WHOLE_OPENAI = (
    b'{"id":"chatcmpl-1","object":"chat.completion","choices":[{"index":0,"message":{"role":"assistant",'
    b'"content":"The \\"usage\\": {\\"prompt_tokens\\": 99} of"},"finish_reason":"stop"}],'
    b'"usage":{"prompt_tokens":9,"total_tokens":21,"completion_tokens":12,"prompt_tokens_details":{"cached_tokens":4}},'
    b'"system_fingerprint":null}'
)
STREAM_OPENAI = (
    b'data: {"choices":[{"delta":{"content":"Hi \\"usage"}}],"usage":null}\n\n'
    b'data: {"choices":[{"delta":{"content":"usage"}}],"usage": null}\n\n'
    b'data: {"choices":[],"usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}}\n\n'
    b"data: [DONE]\n\n"
)
STREAM_OLLAMA = (
    b'{"model":"m","message":{"role":"assistant","content":"\\"eval_count\\": 77"},"done":false}\n'
    b'{"model":"m","message":{"role":"assistant","tool_calls":[{"function":{"name":"f","arguments":'
    b'{"eval_count":66,"prompt_eval_count":55}}}]},"done":false}\n'
    b'{"model":"m","message":{"role":"assistant","content":""},"done":true,"done_reason":"stop","total_duration":99,'
    b'"prompt_eval_count":26,"prompt_eval_duration":3,"eval_count":298,"eval_duration":4}\n'
)
LONG_OLLAMA = (
    b'{"model":"m","embeddings":[['
    + b"0.25," * 4000
    + b'1]],"total_duration":14,"load_duration":1,"prompt_eval_count":8}'
)
LONG_GENERATE = (
    b'{"model":"m","response":"Hi","done":true,"context":[' + b"12345," * 2000 + b"1],"
    b'"prompt_eval_count":26,"eval_count":290,"logprobs":[' + b"-1.5," * 2000 + b"-1]}"
)


@pytest.mark.parametrize(
    ("endpoint", "body", "usage"),
    [
        (Endpoint.OPENAI_CHAT, WHOLE_OPENAI, Usage(9, 12)),
        (Endpoint.OPENAI_CHAT, STREAM_OPENAI, Usage(5, 2)),
        (Endpoint.OPENAI_EMBEDDING, b'{"usage":{"prompt_tokens":8,"total_tokens":8},"data":[]}', Usage(8, 0)),
        (Endpoint.OPENAI_CHAT, b'{\n  "usage" : {\n    "prompt_tokens": 3\n  }\n}\n', Usage(3, 0)),
        (Endpoint.OLLAMA_CHAT, STREAM_OLLAMA, Usage(26, 298)),
        (Endpoint.OLLAMA_EMBED, LONG_OLLAMA, Usage(8, 0)),
        (Endpoint.OLLAMA_GENERATE, LONG_GENERATE, Usage(26, 290)),
    ],
)
def test_the_tokens_of_an_answer_are_found(endpoint: Endpoint, body: bytes, usage: Usage) -> None:
    assert scanned(endpoint, body) == usage


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        (Endpoint.OPENAI_CHAT, b""),
        (Endpoint.OPENAI_CHAT, b'data: {"usage":null}\n\n' * 3),
        (Endpoint.OPENAI_CHAT, b'{"usage":{}}'),
        (Endpoint.OPENAI_CHAT, b'{"usage":"none"}'),
        (Endpoint.OPENAI_CHAT, b'{"content":"a \\"usage":{"prompt_tokens":1}}'),
        (Endpoint.OPENAI_CHAT, b'{"usage":{"prompt_tokens":1'),
        (Endpoint.OLLAMA_CHAT, b""),
        (Endpoint.OLLAMA_CHAT, b'{"message":{"content":"prompt_eval_count"},"done":false}\n'),
        (Endpoint.OLLAMA_CHAT, b'{"message":{"tool_calls":[{"a":{"eval_count":6}}]},"done":false}\n'),
        (Endpoint.OLLAMA_CHAT, b'{"done":true,"eval_count":6'),
    ],
)
def test_where_nothing_is_told_nothing_is_found(endpoint: Endpoint, body: bytes) -> None:
    assert scanned(endpoint, body) is None


def test_of_several_usages_the_last_counts() -> None:
    chunk = 'data: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":%d}}\n\n'

    assert scanned(Endpoint.OPENAI_CHAT, *((chunk % n).encode() for n in range(1, 4))) == Usage(5, 3)
    assert scanned(Endpoint.OPENAI_CHAT, (chunk % 1 + chunk % 2).encode()) == Usage(5, 2)
    assert scanned(Endpoint.OPENAI_CHAT, (chunk % 7).encode() + b'data: {"usage":null}\n\n') == Usage(5, 7)


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        (Endpoint.OPENAI_CHAT, WHOLE_OPENAI),
        (Endpoint.OPENAI_CHAT, STREAM_OPENAI),
        (Endpoint.OLLAMA_CHAT, STREAM_OLLAMA),
    ],
)
def test_an_answer_split_at_any_byte_tells_the_same(endpoint: Endpoint, body: bytes) -> None:
    whole = scanned(endpoint, body)

    assert whole is not None
    assert all(scanned(endpoint, body[:at], body[at:]) == whole for at in range(len(body)))
    assert scanned(endpoint, *(body[at : at + 1] for at in range(len(body)))) == whole


OPENAI_BITS = st.sampled_from(
    [
        b'"usage"',
        b'"usage":{"prompt_tokens":1}',
        b'"usage": {"prompt_tokens":2,"completion_tokens":3,"d":{"e":4}}',
        b'"usage":null',
        b'\\"usage":{"prompt_tokens":4}',
        b'"usage":{',
        b'"usage":{"x":"' + b"y" * CARRY_BYTES + b'","prompt_tokens":5}',
        b"{",
        b"}",
        b'"',
        b"\\",
        b"\n\n",
        b"data: ",
        b" ",
    ]
)
OLLAMA_BITS = st.sampled_from(
    [
        b'{"prompt_eval_count":1,"eval_count":2}\n',
        b'"eval_count":3',
        b'"prompt_eval_count": 4}',
        b'\\"eval_count": 5,',
        b'{"a":{"eval_count":6}}',
        b"{",
        b"}",
        b"7",
        b"\n",
        b"z" * (CARRY_BYTES - 20),
        b"y" * 30,
    ]
)


@given(bits=st.lists(OPENAI_BITS, max_size=8), at=st.lists(st.integers(0, 20_000), max_size=6))
def test_any_bytes_of_openai_tell_the_same_however_they_are_split(bits: list[bytes], at: list[int]) -> None:
    body = b"".join(bits)

    assert scanned(Endpoint.OPENAI_CHAT, *split(body, at)) == scanned(Endpoint.OPENAI_CHAT, body)


@given(bits=st.lists(OLLAMA_BITS, max_size=8), at=st.lists(st.integers(0, 20_000), max_size=6))
def test_any_bytes_of_ollama_tell_the_same_however_they_are_split(bits: list[bytes], at: list[int]) -> None:
    body = b"".join(bits)

    assert scanned(Endpoint.OLLAMA_CHAT, *split(body, at)) == scanned(Endpoint.OLLAMA_CHAT, body)


@given(st.text())
def test_no_text_of_a_model_is_taken_for_usage(text: str) -> None:
    texts = [text, f'"usage":{{"prompt_tokens":1}}{text}', f'{text}"usage', f'{text}"eval_count": 5}}\n']
    for ascii_only in (True, False):
        body = json.dumps([{"content": text} for text in texts], ensure_ascii=ascii_only).encode()

        assert scanned(Endpoint.OPENAI_CHAT, body) is None
        assert scanned(Endpoint.OLLAMA_CHAT, body) is None


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        (Endpoint.OPENAI_CHAT, b'{"usage": {"prompt_tokens": -5, "completion_tokens": 3}}'),
        (Endpoint.OLLAMA_CHAT, b'{"prompt_eval_count": -5, "eval_count": 3}'),
    ],
)
def test_a_negative_count_is_no_count(endpoint: Endpoint, body: bytes) -> None:
    assert usage_of_whole(endpoint, body) is None
