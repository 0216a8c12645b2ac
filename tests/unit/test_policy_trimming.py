"""What is left of a conversation when it does not fit."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sutazai.core.session import Message
from sutazai.policy.trimming import INSTRUCTING, estimated_tokens, fitting, is_opening, room_for_history

LETTERS = {"s": "system", "d": "developer", "u": "user", "a": "assistant", "t": "tool"}


def talk(roles: str, *, tokens: int = 10) -> list[Message]:
    """A conversation, a letter for each message."""
    return [
        Message(number=number, role=LETTERS[letter], tokens=tokens, body=b"x" * tokens)
        for number, letter in enumerate(roles, 1)
    ]


def numbers(messages: object) -> list[int]:
    return [message.number for message in messages]  # type: ignore[attr-defined]


@st.composite
def talks(draw: st.DrawFn) -> list[Message]:
    roles = draw(st.text("sduat", max_size=30))
    return [
        Message(
            number=number, role=LETTERS[letter], tokens=draw(st.integers(0, 50)), body=b"x" * draw(st.integers(0, 9))
        )
        for number, letter in enumerate(roles, 1)
    ]


def test_what_fits_is_kept_whole() -> None:
    messages = talk("uauau")

    assert fitting(messages, tokens=50) == messages


def test_the_oldest_rounds_go_first() -> None:
    assert numbers(fitting(talk("uauau"), tokens=49)) == [3, 4, 5]
    assert numbers(fitting(talk("uauau"), tokens=29)) == [5]


def test_instructions_at_the_beginning_stay() -> None:
    assert numbers(fitting(talk("sduauau"), tokens=50)) == [1, 2, 5, 6, 7]


def test_instructions_in_between_go_with_the_question_after_them() -> None:
    assert numbers(fitting(talk("uasuau"), tokens=40)) == [3, 4, 5, 6]
    assert numbers(fitting(talk("uasuau"), tokens=39)) == [6]


@pytest.mark.parametrize("tokens", range(0, 110, 5))
def test_a_call_of_a_tool_is_never_parted_from_its_result(tokens: int) -> None:
    """The last question has two rounds of calls; either all of it is there or, of the older one, nothing."""
    kept = numbers(fitting(talk("uatauatatt"), tokens=tokens))

    assert kept in ([*range(5, 11)], [*range(1, 11)])


def test_the_last_round_stays_even_where_it_is_too_much() -> None:
    assert numbers(fitting(talk("uauat"), tokens=-5)) == [3, 4, 5]


def test_a_conversation_may_begin_with_an_answer() -> None:
    assert numbers(fitting(talk("auau"), tokens=40)) == [1, 2, 3, 4]
    assert numbers(fitting(talk("auau"), tokens=39)) == [2, 3, 4]


def test_counts_and_sizes_bound_too() -> None:
    assert numbers(fitting(talk("uauau"), tokens=1e9, count=4)) == [3, 4, 5]
    assert numbers(fitting(talk("uauau"), tokens=1e9, size_bytes=49)) == [3, 4, 5]


def test_nothing_stays_nothing() -> None:
    assert fitting([], tokens=0) == []
    assert numbers(fitting(talk("ss"), tokens=0)) == [1, 2]


@given(talks(), st.integers(-10, 1000), st.integers(0, 40))
def test_what_is_kept_is_the_beginning_and_an_end_that_fits(messages: list[Message], tokens: int, count: int) -> None:
    kept = fitting(messages, tokens=tokens, count=count)

    leading = next((n for n, one in enumerate(messages) if one.role not in INSTRUCTING), len(messages))
    tail = kept[leading:]
    assert kept[:leading] == messages[:leading]
    assert tail == messages[len(messages) - len(tail) :]
    if messages[leading:]:
        assert tail
    first = len(messages) - len(tail)
    assert not tail or first == leading or is_opening(messages, first)
    openings = [n for n in range(leading, len(messages)) if n == leading or is_opening(messages, n)]
    if openings and first != openings[-1]:
        assert sum(one.tokens for one in kept) <= tokens
        assert len(kept) <= count


@given(talks(), st.integers(0, 500))
def test_what_is_dropped_would_not_have_fitted(messages: list[Message], tokens: int) -> None:
    kept = fitting(messages, tokens=tokens)

    dropped = len(messages) - len(kept)
    leading = next((n for n, one in enumerate(messages) if one.role not in INSTRUCTING), len(messages))
    openings = [n for n in range(leading, leading + dropped) if n == leading or is_opening(messages, n)]
    if openings:
        more = messages[:leading] + messages[openings[-1] :]
        assert sum(one.tokens for one in more) > tokens


def test_four_bytes_are_a_token_and_each_message_costs_a_little() -> None:
    assert estimated_tokens(b"x" * 400) == 104
    assert estimated_tokens(b"") == 4


@pytest.mark.parametrize("slash", ["/", "\\/"])
def test_an_image_counts_as_one_whatever_its_size(slash: str) -> None:
    def body(size: int) -> bytes:
        data = base64.b64encode(b"\xff" * size).decode().replace("/", slash)
        return f'{{"role":"user","content":[{{"image_url":{{"url":"data:image{slash}png;base64,{data}"}}}}]}}'.encode()

    assert estimated_tokens(body(9)) == estimated_tokens(body(3_000_000))
    assert 1024 < estimated_tokens(body(9)) < 1100


def test_room_is_what_the_answer_and_the_instructions_leave() -> None:
    assert room_for_history(4096, answer_tokens=None, fixed_tokens=100) == 2972
    assert room_for_history(4096, answer_tokens=500, fixed_tokens=100) == 3496
    assert room_for_history(4096, answer_tokens=9000, fixed_tokens=0) < 0
