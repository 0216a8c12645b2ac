"""Notices of the stream: how they are put into messages, and how a reader passes over doubles."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sutazai.ports.broadcasts import EventNotice, MessageNotice, Notice, Unseen, encode

AT = datetime(2026, 11, 30, tzinfo=UTC)


def event(position: int, data: str = "") -> EventNotice:
    raw = msgspec.Raw(msgspec.json.encode(data))
    return EventNotice(
        position=position, task="task_1", version=position, tenant="t", kind="k", schema=1, at=AT, data=raw
    )


def message(position: int) -> MessageNotice:
    return MessageNotice(
        position=position, number=position, tenant="t", to="b", sender="task_1", at=AT, body=msgspec.Raw(b"1")
    )


def read(messages: Sequence[bytes]) -> list[Notice]:
    unseen = Unseen()
    return [notice for each in messages for notice in unseen.notices_of(each)]


@given(st.lists(st.text(max_size=200), max_size=50), st.integers(1, 2000))
def test_lines_come_back_as_they_were_in_messages_of_a_bounded_size(texts: list[str], max_bytes: int) -> None:
    notices = [event(position, text) for position, text in enumerate(texts, 1)]
    messages = list(encode(notices, max_bytes=max_bytes))

    assert read(messages) == notices
    assert all(len(each) < max_bytes or b"\n" not in each for each in messages)


@given(st.data())
def test_carriers_that_each_go_on_from_where_it_was_left_are_read_once_and_in_order(data: st.DataObject) -> None:
    """Each begins at a place up to which all was told, and may stand still and wake at any time."""
    notices: list[Notice] = [event(position) for position in range(1, 31)]
    stream: list[bytes] = []
    told = 0
    carriers: list[int] = []
    for _ in range(data.draw(st.integers(0, 30))):
        if not carriers or data.draw(st.booleans()):
            carriers.append(data.draw(st.integers(0, told)))
        which = data.draw(st.integers(0, len(carriers) - 1))
        part = notices[carriers[which] :][: data.draw(st.integers(1, 10))]
        carriers[which] += len(part)
        stream += encode(part, max_bytes=300)
        told = max(told, carriers[which])

    assert read(stream) == notices[:told]


def test_events_and_messages_have_positions_of_their_own() -> None:
    notices: list[Notice] = [event(5), message(2), event(5), message(3), event(6)]

    assert read(list(encode(notices, max_bytes=10_000))) == [event(5), message(2), message(3), event(6)]


@pytest.mark.parametrize("body", [b"no JSON", b"{}", b'{"type":"event"}', b"[]"])
def test_what_is_no_line_is_an_error(body: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        Unseen().notices_of(body)
