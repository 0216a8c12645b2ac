"""How the input of a batch job is checked and cut, whatever the parts that it comes in."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sutazai.agents.batch_lines import MAX_EMBEDDED, MAX_LINE_BYTES, MAX_LINES, PIECE_LINES, Scan, lines_in
from sutazai.ports.agent import CHAT, EMBEDDING


def line(custom_id: str, /, **changes: object) -> bytes:
    form = {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": {"model": "m"}}
    return msgspec.json.encode(form | changes)


def scanned(content: bytes, *, part_bytes: int = 2**20, endpoint: str = CHAT) -> Scan:
    scan = Scan(endpoint)
    for start in range(0, len(content), part_bytes):
        scan.feed(content[start : start + part_bytes])
    scan.end()
    return scan


@pytest.mark.parametrize(
    ("content", "code", "number", "param"),
    [
        (b"", "empty_file", None, None),
        (b"\n \n", "empty_file", None, None),
        (line("a") + b"\n{", "invalid_json_line", 2, None),
        (b"[]", "invalid_json_line", 1, None),
        (b"\xff\n", "invalid_json_line", 1, None),
        (line("a") + b"\n\n" + line("a"), "duplicate_custom_id", 3, "custom_id"),
        (line(""), "invalid_request", 1, "custom_id"),
        (b'{"custom_id":"a","method":"POST","url":"/v1/chat/completions"}', "missing_required_parameter", 1, "body"),
        (line("a", custom_id=1), "invalid_request", 1, "custom_id"),
        (b'{"method":"POST"}', "missing_required_parameter", 1, "custom_id"),
        (line("a", method="GET"), "invalid_method", 1, "method"),
        (line("a", url="/v1/embeddings"), "invalid_url", 1, "url"),
        (line("a", body=[]), "invalid_request", 1, "body"),
        (line("a", body={"x": "y" * MAX_LINE_BYTES}), "line_too_long", 1, None),
    ],
)
def test_a_wrong_line_is_named(content: bytes, code: str, number: int | None, param: str | None) -> None:
    (complaint,) = scanned(content).complaints

    assert (complaint.code, complaint.line, complaint.param) == (code, number, param)
    assert complaint.message.endswith(".")


def test_all_wrong_lines_are_named_at_once() -> None:
    scan = scanned(b"\n".join([line("a"), b"{", line("b", method="GET"), line("a")]))

    assert [(one.code, one.line) for one in scan.complaints] == [
        ("invalid_json_line", 2),
        ("invalid_method", 3),
        ("duplicate_custom_id", 4),
    ]


def test_a_file_of_too_many_lines_is_refused() -> None:
    scan = scanned(b"\n".join(line(str(number)) for number in range(MAX_LINES + 1)))

    assert [one.code for one in scan.complaints] == ["too_many_tasks"]
    assert len(scan.pieces) == MAX_LINES / PIECE_LINES


@pytest.mark.parametrize(
    ("given", "counted"),
    [("text", 1), ([1, 2, 3], 1), (["a", "b"], 2), ([[1], [2], [3]], 3), ([], 1), (None, 1)],
)
def test_what_is_to_be_embedded_is_counted_over_all_lines(given: object, counted: int) -> None:
    full = {"url": EMBEDDING, "body": {"input": ["x"] * (MAX_EMBEDDED - counted)}}
    last = {"url": EMBEDDING, "body": {"input": given}}

    fits = scanned(line("a", **full) + b"\n" + line("b", **last), endpoint=EMBEDDING)
    one_more = {"url": EMBEDDING, "body": {"input": "x"}}
    exceeds = scanned(b"\n".join([line("a", **full), line("b", **last), line("c", **one_more)]), endpoint=EMBEDDING)

    assert not fits.complaints
    assert [one.code for one in exceeds.complaints] == ["too_many_tasks"]


@given(
    blanks=st.lists(st.integers(0, 2), max_size=130),
    part_bytes=st.integers(1, 300),
    is_ended=st.booleans(),
)
def test_the_pieces_hold_every_line_once_with_its_number(blanks: list[int], part_bytes: int, is_ended: bool) -> None:
    rows: list[bytes] = []
    for number, blank in enumerate(blanks):
        rows += [b""] * blank + [line(f"é{number}")]
    content = b"\r\n".join(rows) + (b"\n" if is_ended else b"")

    scan = scanned(content, part_bytes=part_bytes)

    found = [
        (number, one.custom_id)
        for piece in scan.pieces
        for number, one in lines_in(content[piece.start : piece.start + piece.length], piece)
    ]
    assert found == [(number, msgspec.json.decode(row)["custom_id"]) for number, row in enumerate(rows, 1) if row]
    assert all(piece.lines <= PIECE_LINES for piece in scan.pieces)
    assert sum(piece.lines for piece in scan.pieces) == scan.total == len(blanks)
