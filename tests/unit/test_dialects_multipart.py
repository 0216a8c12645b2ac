"""How a form is read, and what is refused."""

from __future__ import annotations

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sutazai.core.errors import BadRequest
from sutazai.dialects.multipart import MAX_PARTS, Part, form_of

KIND = "multipart/form-data; boundary=b0"
FIELD = b'--b0\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n'


def encoded(filename: str, content: bytes) -> tuple[str, bytes]:
    request = httpx.Request(
        "POST", "http://a", data={"purpose": "batch"}, files={"file": (filename, content, "text/plain")}
    )
    return request.headers["content-type"], request.read()


@given(st.binary(max_size=300))
def test_every_content_comes_out_as_it_went_in(content: bytes) -> None:
    form = form_of(*encoded("ключ.jsonl", content))

    assert form == {
        "purpose": Part(filename=None, content=b"batch"),
        "file": Part(filename="ключ.jsonl", content=content),
    }


def test_a_boundary_may_be_quoted_and_a_content_may_look_like_it() -> None:
    body = FIELD % (b"a", b"--b0 \r\n-b0") + b"--b0--\r\n"

    assert form_of('multipart/form-data; boundary="b0"', body)["a"].content == b"--b0 \r\n-b0"


@given(st.integers(0, 120))
def test_a_form_that_was_cut_off_is_refused(size: int) -> None:
    body = FIELD % (b"a", b"one") + FIELD % (b"b", b"two") + b"--b0--"
    with pytest.raises(BadRequest):
        form_of(KIND, body[: min(size, len(body) - 1)])


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("application/json", b"{}"),
        ("", FIELD % (b"a", b"x") + b"--b0--"),
        ("multipart/form-data", FIELD % (b"a", b"x") + b"--b0--"),
        ("multipart/form-data; boundary=other", FIELD % (b"a", b"x") + b"--b0--"),
        (KIND, b"preamble\r\n" + FIELD % (b"a", b"x") + b"--b0--"),
        (KIND, FIELD % (b"a", b"x") + b"--b0--\r\nepilogue"),
        (KIND, FIELD % (b"a", b"x") * 2 + b"--b0--"),
        (KIND, b"--b0\r\nContent-Type: text/plain\r\n\r\nx\r\n--b0--"),
        (KIND, FIELD % (b"\xff", b"x") + b"--b0--"),
        (KIND, b"--b0\r\n" + b"x" * 5000 + b"\r\n\r\nx\r\n--b0--"),
        (KIND, b"".join(FIELD % (b"%d" % number, b"x") for number in range(MAX_PARTS + 1)) + b"--b0--"),
    ],
)
def test_what_is_not_clearly_a_form_is_refused(kind: str, body: bytes) -> None:
    with pytest.raises(BadRequest):
        form_of(kind, body)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    try:
        form_of(KIND, b"--b0\r\n" + body)
    except BadRequest:
        return
