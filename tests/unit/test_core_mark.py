"""Marks as clients carry them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sutazai.core.errors import BadRequest
from sutazai.core.mark import BEGINNING, Mark, mark_of


@given(source=st.integers(0, 2**32 - 1), position=st.integers(0, 2**63 - 1))
def test_a_mark_comes_back_as_it_was_sent(source: int, position: int) -> None:
    mark = Mark(source, position)

    assert mark_of(str(mark)) == mark


@pytest.mark.parametrize(
    "text", ["", "-", "1", "1-", "-1", "1-2-3", "x-1", "1-g", "1 -2", "1-2\n", "A-1", "1-8000000000000000", "9" * 400]
)
def test_what_is_no_mark_is_refused_in_a_sentence(text: str) -> None:
    with pytest.raises(BadRequest, match=r"`x-sutazai-written` was no mark\. .*leave it out\.$"):
        mark_of(text)


def test_the_beginning_has_a_mark_too() -> None:
    assert mark_of(str(BEGINNING)) == BEGINNING
