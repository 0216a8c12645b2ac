"""Names that a mistaken name may have meant."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sutazai.policy.nearest import nearest

KNOWN = ["llama3.2:latest", "llama3.2:70b", "Qwen3-8B", "nomic-embed-text"]


@given(st.text(max_size=300), st.lists(st.text(max_size=30), max_size=20), st.integers(1, 5))
def test_only_known_names_are_told_each_once_and_few(name: str, known: list[str], limit: int) -> None:
    found = nearest(name, known, limit=limit)

    assert set(found) <= set(known)
    assert len(found) == len(set(found)) <= limit


@given(st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=20))
def test_the_order_of_the_known_names_decides_nothing(known: list[str]) -> None:
    assert nearest(known[0], known) == nearest(known[0], reversed(known))


def test_a_beginning_finds_the_whole_names() -> None:
    assert nearest("llama3", KNOWN) == ["llama3.2:70b", "llama3.2:latest"]


def test_a_typing_error_is_found() -> None:
    assert nearest("nomic-embed-txet", KNOWN) == ["nomic-embed-text"]


def test_case_does_not_matter_and_names_are_told_as_they_are() -> None:
    assert nearest("qwen3-8b", KNOWN) == ["Qwen3-8B"]


def test_a_name_like_no_other_finds_none() -> None:
    assert nearest("zzzzzzzz", KNOWN) == []
