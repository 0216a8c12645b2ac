"""What clients can ask for in their headers."""

from __future__ import annotations

import pytest

from sutazai.core.errors import BadRequest
from sutazai.core.request import Endpoint, Priority, Request
from sutazai.edge.wishes import Wishes, wishes_in


def request(priority: Priority = Priority.NORMAL) -> Request:
    made = Request("r", Endpoint.OPENAI_CHAT, "m", False, b"", "t", "", 100.0)
    made.priority = priority
    return made


def test_a_head_without_wishes_has_none() -> None:
    assert wishes_in({b"host": b"a", b"content-type": b"application/json"}) is None


def test_all_wishes_are_read() -> None:
    headers = {
        b"x-sutazai-priority": b" Low ",
        b"x-sutazai-deadline-s": b"2.5",
        b"x-sutazai-session": b"talk-1",
        b"cache-control": b"No-Cache",
    }

    assert wishes_in(headers) == Wishes(
        priority=Priority.LOW, deadline_s=2.5, conversation=b"talk-1", cache_control=b"no-cache"
    )


@pytest.mark.parametrize("value", [b"", b"urgent", b"0", b"high, low"])
def test_a_priority_that_is_none_is_refused(value: bytes) -> None:
    with pytest.raises(BadRequest, match="high, normal or low"):
        wishes_in({b"x-sutazai-priority": value})


@pytest.mark.parametrize("value", [b"", b"soon", b"0", b"-1", b"nan", b"inf", b"1e9"])
def test_a_deadline_that_is_none_is_refused(value: bytes) -> None:
    with pytest.raises(BadRequest, match="number of seconds"):
        wishes_in({b"x-sutazai-deadline-s": value})


def test_a_name_of_a_conversation_has_a_bound() -> None:
    with pytest.raises(BadRequest, match="256 bytes"):
        wishes_in({b"x-sutazai-session": b"x" * 257})


@pytest.mark.parametrize(
    ("has", "wished", "may_rise", "gets"),
    [
        (Priority.NORMAL, Priority.LOW, False, Priority.LOW),
        (Priority.NORMAL, Priority.HIGH, False, Priority.NORMAL),
        (Priority.NORMAL, Priority.HIGH, True, Priority.HIGH),
        (Priority.HIGH, Priority.NORMAL, False, Priority.NORMAL),
        (Priority.LOW, None, True, Priority.LOW),
    ],
)
def test_everybody_may_step_back_and_admins_may_step_forward(
    has: Priority, wished: Priority | None, may_rise: bool, gets: Priority
) -> None:
    asked = request(has)

    Wishes(priority=wished).apply(asked, may_rise=may_rise)

    assert asked.priority is gets


def test_a_deadline_counts_from_the_arrival() -> None:
    asked = request()

    Wishes(deadline_s=2.5).apply(asked, may_rise=False)

    assert asked.deadline_at == 102.5
