"""Bodies are merged only where that changes nothing, and everybody gets his own part of the answer."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sutazai.core.request import Endpoint, Usage
from sutazai.dialects.batches import Part, Share, merged, share_of, shares, split
from sutazai.dialects.framing import Untranslatable

EMBEDDING, EMBED, COMPLETION = Endpoint.OPENAI_EMBEDDING, Endpoint.OLLAMA_EMBED, Endpoint.OPENAI_COMPLETION


def _share(endpoint: Endpoint, **fields: object) -> Share | None:
    return share_of(endpoint, msgspec.json.encode({"model": "m", **fields}))


def _shares(endpoint: Endpoint, *inputs: object, name: str = "input") -> list[Share]:
    found = [_share(endpoint, **{name: one}) for one in inputs]
    assert None not in found
    return [one for one in found if one is not None]


def _vector(number: int) -> dict[str, object]:
    return {"object": "embedding", "index": number, "embedding": [number, 0.5]}


def _split(endpoint: Endpoint, answer: object, parts: list[Share]) -> list[Part]:
    return split(endpoint, msgspec.json.encode(answer), parts, [f"r{number}" for number in range(len(parts))])


def _read(part: Part) -> Any:
    return msgspec.json.decode(part.body)


# requests


def test_texts_and_lists_of_texts_become_one_list_with_the_other_fields_of_all() -> None:
    parts = [
        share_of(EMBEDDING, b'{"model":"m","input":"a \\u00e9","dimensions":8}'),
        share_of(EMBEDDING, b'{"dimensions":8,"input":["b","c"],"model":"m"}'),
    ]
    first, second = parts
    assert first is not None
    assert second is not None

    body = merged(EMBEDDING, [first, second])

    assert first.kind == second.kind
    assert body == b'{"model":"m","dimensions":8,"input":["a \\u00e9","b","c"]}'


def test_tokens_join_tokens_and_not_texts() -> None:
    one, several, text = _shares(EMBEDDING, [1, 2, 3], [[4], [5, 6]], "a")

    assert one.kind == several.kind != text.kind
    assert msgspec.json.decode(merged(EMBEDDING, [one, several]))["input"] == [[1, 2, 3], [4], [5, 6]]


def test_prompts_join() -> None:
    parts = _shares(COMPLETION, "a", "b", name="prompt")

    assert merged(COMPLETION, parts) == b'{"model":"m","prompt":["a","b"]}'


@pytest.mark.parametrize(
    "fields",
    [
        {"input": ""},
        {"input": []},
        {"input": ["a", ""]},
        {"input": ["a", [1]]},
        {"input": [[]]},
        {"input": None},
        {},
        {"input": "a", "late_chunking": True},
    ],
)
def test_embeddings_that_are_empty_mixed_or_have_unknown_fields_are_asked_alone(fields: dict[str, object]) -> None:
    """Some servers read all inputs of a request as one text if told so: the answer would depend on neighbours."""
    assert _share(EMBEDDING, **fields) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 2},
        {"echo": True},
        {"best_of": 3},
        {"logprobs": 0},
        {"suffix": "end"},
        {"prompt": ["a", "b"]},
        {"prompt": [1, 2]},
        {"prompt": ""},
        {"stream": True},
        {"id_slot": 1},
    ],
)
def test_completions_with_more_than_one_text_each_are_asked_alone(fields: dict[str, object]) -> None:
    assert _share(COMPLETION, **{"prompt": "a"} | fields) is None


def test_unset_fields_of_a_completion_do_not_matter() -> None:
    unset = {"n": 1, "echo": False, "best_of": None, "logprobs": None, "suffix": "", "stream": False}

    assert _share(COMPLETION, prompt="a", **unset) is not None


def test_chats_and_single_embeddings_of_ollama_are_never_merged() -> None:
    assert share_of(Endpoint.OPENAI_CHAT, b'{"model":"m","messages":[]}') is None
    assert share_of(Endpoint.OLLAMA_EMBEDDINGS, b'{"model":"m","prompt":"a"}') is None


@pytest.mark.parametrize("other", [{"dimensions": 9}, {"user": "u"}, {"options": {"b": 2, "a": 1}}, {"model": "n"}])
def test_another_value_in_any_field_is_another_kind(other: dict[str, object]) -> None:
    usual = {"dimensions": 8, "options": {"a": 1, "b": 1}}
    one, two = _share(EMBEDDING, input="a", **usual), _share(EMBEDDING, input="a", **usual | other)

    assert one is not None
    assert two is not None
    assert one.kind != two.kind


def test_the_order_of_fields_and_white_space_make_no_other_kind() -> None:
    one = share_of(EMBED, b'{"model":"m","input":"a","options":{"a":1,"b":[1, 2]}}')
    two = share_of(EMBED, b'{ "options" : { "b" : [1,2], "a" : 1 }, "input" : "b", "model" : "m" }')

    assert one is not None
    assert two is not None
    assert one.kind == two.kind


@pytest.mark.parametrize("options", [b"[" * 5000 + b"]" * 5000, b'{"a":1e999}', b'{"a":"\\ud800"}'])
def test_options_that_cannot_be_compared_are_asked_alone(options: bytes) -> None:
    assert share_of(EMBEDDING, b'{"model":"m","input":"a","options":%b}' % options) is None


# answers


def test_each_gets_his_own_vectors_numbered_from_0() -> None:
    parts = _shares(EMBEDDING, "a", ["b", "c"])
    data = [_vector(number) for number in (2, 0, 1)]
    answer = {"object": "list", "model": "m", "data": data, "usage": {"prompt_tokens": 3, "total_tokens": 3}}

    first, second = _split(EMBEDDING, answer, parts)

    assert _read(first) == {
        "object": "list",
        "model": "m",
        "data": [_vector(0)],
        "usage": {"prompt_tokens": 1, "total_tokens": 1},
    }
    assert [entry["embedding"][0] for entry in _read(second)["data"]] == [1, 2]
    assert [entry["index"] for entry in _read(second)["data"]] == [0, 1]


def test_vectors_are_copied_byte_for_byte() -> None:
    parts = _shares(EMBEDDING, "a", "b")
    body = b'{"data":[{"embedding":[0.10000000000000000001, -0.0,1E-3 ]},{"embedding":"AAAA/w=="}]}'

    first, second = split(EMBEDDING, body, parts, ["x", "y"])

    assert b"[0.10000000000000000001, -0.0,1E-3 ]" in first.body
    assert b'"AAAA/w=="' in second.body


def test_tokens_are_divided_by_the_length_of_the_texts() -> None:
    parts = _shares(EMBEDDING, "x" * 30, ["y" * 10, "z" * 20])
    answer = {"data": [_vector(number) for number in range(3)], "usage": {"prompt_tokens": 21, "total_tokens": 21}}

    usages = [part.usage for part in _split(EMBEDDING, answer, parts)]

    assert usages == [Usage(10, 0), Usage(11, 0)]


def test_tokens_below_zero_are_none() -> None:
    answer = {"data": [_vector(0), _vector(1)], "usage": {"prompt_tokens": -1000}}

    parts = _split(EMBEDDING, answer, _shares(EMBEDDING, "a", "b"))

    assert [part.usage for part in parts] == [Usage(0, 0)] * 2


def test_where_the_node_told_no_tokens_nobody_is_told_any() -> None:
    parts = _shares(EMBEDDING, "a", "b")

    for usage in ({}, {"usage": None}, {"usage": "many"}):
        found = _split(EMBEDDING, {"data": [_vector(0), _vector(1)], **usage}, parts)

        assert [part.usage for part in found] == [None, None]


def test_ollama_is_cut_alike_and_times_are_those_of_all() -> None:
    parts = _shares(EMBED, ["aa", "bb"], "cc")
    answer = {"model": "m", "embeddings": [[1], [2], [3]], "total_duration": 99, "prompt_eval_count": 6}

    first, second = _split(EMBED, answer, parts)

    assert _read(first) == {"model": "m", "embeddings": [[1], [2]], "total_duration": 99, "prompt_eval_count": 4}
    assert _read(second) == {"model": "m", "embeddings": [[3]], "total_duration": 99, "prompt_eval_count": 2}
    assert second.usage == Usage(2, 0)


def test_each_completion_is_an_answer_of_its_own() -> None:
    parts = _shares(COMPLETION, "aaaa", "bb", name="prompt")
    answer = {
        "id": "cmpl-of-the-node",
        "object": "text_completion",
        "choices": [
            {"index": 1, "text": "short", "finish_reason": "stop"},
            {"index": 0, "text": "longer one", "finish_reason": "length"},
        ],
        "usage": {"prompt_tokens": 6, "completion_tokens": 9, "total_tokens": 15},
        "timings": {"prompt_n": 2},
    }

    first, second = _split(COMPLETION, answer, parts)

    assert _read(first) == {
        "id": "cmpl-r0",
        "object": "text_completion",
        "choices": [{"index": 0, "text": "longer one", "finish_reason": "length"}],
        "usage": {"prompt_tokens": 4, "completion_tokens": 6, "total_tokens": 10},
    }
    assert _read(second)["choices"] == [{"index": 0, "text": "short", "finish_reason": "stop"}]
    assert second.usage == Usage(2, 3)


def test_counts_of_each_completion_are_used_where_the_node_gives_them() -> None:
    parts = _shares(COMPLETION, "a", "b", name="prompt")
    choices = [
        {"index": number, "text": "t", "usage": {"prompt_tokens": number + 1, "completion_tokens": number + 5}}
        for number in range(2)
    ]

    found = _split(COMPLETION, {"choices": choices, "usage": {"prompt_tokens": 3, "completion_tokens": 11}}, parts)

    assert [part.usage for part in found] == [Usage(1, 5), Usage(2, 6)]
    assert _read(found[1])["choices"] == [{"index": 0, "text": "t"}]


@pytest.mark.parametrize(
    "answer",
    [
        {"data": [_vector(0)]},
        {"data": [_vector(0), _vector(1), _vector(2)]},
        {"data": [_vector(0), _vector(0)]},
        {"data": [_vector(1), _vector(2)]},
        {"data": [_vector(0), {"index": 1}]},
        {"data": [_vector(0), {"index": 1, "embedding": None}]},
        {"data": [_vector(0), {"index": 1, "embedding": []}]},
        {"data": [_vector(0), {"embedding": [1]}]},
        {"data": {}},
        {"error": "no"},
        [],
    ],
)
def test_an_answer_without_exactly_one_vector_for_each_input_is_nobodys(answer: object) -> None:
    with pytest.raises(Untranslatable):
        _split(EMBEDDING, answer, _shares(EMBEDDING, "a", "b"))


@pytest.mark.parametrize("answer", [{"embeddings": [[1]]}, {"embeddings": [[1], []]}, {"embeddings": [[1], 2]}, {}])
def test_the_same_holds_for_ollama(answer: object) -> None:
    with pytest.raises(Untranslatable):
        _split(EMBED, answer, _shares(EMBED, "a", "b"))


@pytest.mark.parametrize("choices", [[{"index": 0, "text": "a"}], [{"text": "a"}, {"index": 0}], None])
def test_and_for_completions(choices: object) -> None:
    with pytest.raises(Untranslatable):
        _split(COMPLETION, {"choices": choices}, _shares(COMPLETION, "a", "b", name="prompt"))


@given(st.binary())
def test_no_bytes_break_the_cutting(body: bytes) -> None:
    with pytest.raises(Untranslatable):
        split(EMBEDDING, body, _shares(EMBEDDING, "a", "b"), ["x", "y"])


# shares


@given(st.integers(0, 10**6), st.lists(st.integers(0, 1000), min_size=1, max_size=20))
def test_shares_add_up_and_are_within_one_of_what_is_due(total: int, weights: list[int]) -> None:
    found = shares(total, weights)

    assert sum(found) == total
    whole = sum(weights) or len(weights)
    for share, weight in zip(found, weights if sum(weights) else [1] * len(weights), strict=True):
        assert abs(share - total * weight / whole) < 1


_inputs = st.one_of(
    st.text(min_size=1, alphabet=st.characters(exclude_categories=["Cs"])),
    st.lists(st.text(min_size=1, alphabet=st.characters(exclude_categories=["Cs"])), min_size=1, max_size=4),
)


@given(st.lists(_inputs, min_size=2, max_size=6), st.integers(0, 10_000))
def test_whatever_was_merged_comes_apart_again(inputs: list[str | list[str]], tokens: int) -> None:
    parts = _shares(EMBEDDING, *inputs)
    asked = msgspec.json.decode(merged(EMBEDDING, parts))["input"]
    data = [{"index": number, "embedding": [text]} for number, text in enumerate(asked)]

    found = _split(EMBEDDING, {"data": data, "usage": {"prompt_tokens": tokens}}, parts)

    told = [[entry["embedding"][0] for entry in _read(part)["data"]] for part in found]
    assert told == [[one] if isinstance(one, str) else one for one in inputs]
    assert sum(part.usage.input_tokens for part in found if part.usage is not None) == tokens
