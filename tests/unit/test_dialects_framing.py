"""Lines and events, whatever the pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sutazai.dialects.framing import Collected, Events, Lines, Untranslatable


def lines(*pieces: bytes) -> list[bytes]:
    frame = Lines()
    return [line for piece in pieces for line in frame.feed(piece)] + [frame.rest()]


def events(*pieces: bytes) -> list[bytes]:
    frame = Events()
    return [event for piece in pieces for event in frame.feed(piece)] + frame.rest()


def test_lines_end_with_a_line_feed_and_perhaps_a_carriage_return() -> None:
    assert lines(b"a\nb\r\n\nc") == [b"a", b"b", b"", b"c"]


@given(st.lists(st.sampled_from([b"a", b"bc", b"\n", b"\r\n", b"\r"]), max_size=12))
def test_lines_are_the_same_however_they_are_split(bits: list[bytes]) -> None:
    body = b"".join(bits)

    assert lines(*(body[at : at + 1] for at in range(len(body)))) == lines(body)


@pytest.mark.parametrize(
    ("stream", "found"),
    [
        (b"data: a\n\ndata: b\n\n", [b"a", b"b"]),
        (b"data:a\r\n\r\ndata:  b\r\n\r\n", [b"a", b" b"]),
        (b": waiting\n\ndata: a\n\n: more\n\n", [b"a"]),
        (b"event: message\nid: 7\nretry: 10\ndata: a\n\n", [b"a"]),
        (b"data: a\ndata: b\n\n", [b"a\nb"]),
        (b"data\n\n", [b""]),
        (b"\n\n\n", []),
        (b"data: a", [b"a"]),
        (b"data: a\n", [b"a"]),
        (b"error: {}\n\n", [b"{}"]),
        (b"database: a\n\n", []),
    ],
)
def test_events_are_what_their_data_says(stream: bytes, found: list[bytes]) -> None:
    assert events(stream) == found
    assert events(*(stream[at : at + 1] for at in range(len(stream)))) == found


def test_a_line_without_an_end_fails_at_the_limit() -> None:
    frame = Lines(limit_bytes=10)
    frame.feed(b"12345\n1234567890")

    with pytest.raises(Untranslatable, match="larger than 10 bytes"):
        frame.feed(b"1")


def test_an_event_without_an_end_fails_at_the_limit() -> None:
    frame = Events(limit_bytes=20)
    frame.feed(b"data: 12345\n" * 3)

    with pytest.raises(Untranslatable, match="larger than 20 bytes"):
        frame.feed(b"data: 12345\n")


def test_a_body_fails_at_the_limit_and_not_before() -> None:
    body = Collected(limit_bytes=4)
    body.add(b"12")
    body.add(b"34")

    with pytest.raises(Untranslatable, match="larger than 4 bytes"):
        body.add(b"5")
    assert body.take() == b"1234"
