"""
The lines of a batch job: how the input is checked and cut into pieces, and how an answered line is written.

Nothing here waits for anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from sutazai.agents.batch_shapes import Complaint, Piece
from sutazai.core.errors import BadRequest
from sutazai.dialects.complaints import decoded, missing
from sutazai.ports.agent import EMBEDDING, Answer

MAX_LINES = 50_000
MAX_EMBEDDED = 50_000
"""Inputs of all lines for embeddings together."""
MAX_LINE_BYTES = 2**20
MAX_COMPLAINTS = 100
"""Further ones are not told."""
PIECE_LINES = 50
"""At most a thousandth of `MAX_LINES`, as a task may have so many children."""


class Line(Struct, frozen=True):
    """A line of the input, as it is checked."""

    custom_id: Annotated[str, Meta(min_length=1, max_length=512)]
    method: str
    url: str
    body: dict[str, Any]


class Answered(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What came of a line."""

    number: int
    """Of the line in the input file, from 1."""
    is_good: bool
    """It goes into the output file, not into that of errors."""
    line: msgspec.Raw
    """As the file will hold it."""
    input_tokens: int = 0
    output_tokens: int = 0


class _Named(Struct):
    id: Any = None


_line = msgspec.json.Decoder(Line)
_answered = msgspec.json.Decoder(Answered)
_encode = msgspec.json.Encoder().encode


class Scan:
    """Checks an input file that comes in parts of any size."""

    def __init__(self, endpoint: str) -> None:
        self.complaints: list[Complaint] = []
        self.pieces: list[Piece] = []
        self.total = 0
        """Lines that are not blank."""
        self.is_hopeless = False
        """Nothing that follows matters any more."""
        self._endpoint = endpoint
        self._embedded = 0
        self._models: set[str] = set()
        """Two of them at most."""
        self._seen: set[str] = set()
        self._rest = b""
        self._offset = 0
        self._number = 0

    @property
    def model(self) -> str | None:
        """That all lines name; None where they name several, or none."""
        (model,) = self._models if len(self._models) == 1 else ("",)
        return model or None

    def feed(self, data: bytes) -> None:
        """The next bytes of the file."""
        *whole, self._rest = (self._rest + data).split(b"\n")
        for raw in whole:
            self._take(raw, len(raw) + 1)
        if len(self._rest) > MAX_LINE_BYTES:
            self._take(self._rest, len(self._rest))
            self._rest, self.is_hopeless = b"", True

    def end(self) -> None:
        """There are no more bytes."""
        if self._rest:
            self._take(self._rest, len(self._rest))
        if not self.total:
            self._complain("empty_file", "The input file held no line. Write one request on each.", at_line=False)

    def _take(self, raw: bytes, size: int) -> None:
        self._number += 1
        start, self._offset = self._offset, self._offset + size
        if self.is_hopeless or not raw.strip():
            return
        self.total += 1
        if self.total > MAX_LINES:
            self.is_hopeless = True
            words = f"The input file had more than {MAX_LINES:,} lines. Make several batch jobs of it."
            self._complain("too_many_tasks", words, at_line=False)
            return
        self._check(raw)
        if self._embedded > MAX_EMBEDDED:
            self.is_hopeless = True
            words = f"The lines had more than {MAX_EMBEDDED:,} inputs to embed. Make several batch jobs of them."
            self._complain("too_many_tasks", words, at_line=False)
            return
        last = self.pieces[-1] if self.pieces else None
        if last is None or last.lines == PIECE_LINES:
            self.pieces.append(Piece(start=start, length=size, first_line=self._number, lines=1))
        else:
            self.pieces[-1] = Piece(
                start=last.start,
                length=self._offset - last.start,
                first_line=last.first_line,
                lines=last.lines + 1,
            )

    def _check(self, raw: bytes) -> None:
        if len(raw) > MAX_LINE_BYTES:
            self._complain("line_too_long", f"The line had more than {MAX_LINE_BYTES:,} bytes. Shorten it.")
            return
        try:
            line = decoded(_line, raw, under="line")
        except BadRequest as error:
            is_form = error.where not in {None, "line"}
            param = (error.where or "").removeprefix("line.") if is_form else None
            self._complain(_form_code(error) if is_form else "invalid_json_line", error.message, param=param)
            return
        if line.method != "POST":
            self._complain("invalid_method", "method must be `POST`.", param="method")
        if line.url != self._endpoint:
            self._complain("invalid_url", f"url must be {self._endpoint!r}, as the batch job's endpoint.", param="url")
        if line.custom_id in self._seen:
            words = f"The custom_id {line.custom_id[:64]!r} stood in an earlier line too. Give each line its own."
            self._complain("duplicate_custom_id", words, param="custom_id")
        self._seen.add(line.custom_id)
        if len(self._models) < 2:
            self._models.add(str(line.body.get("model") or ""))
        if self._endpoint == EMBEDDING:
            self._embedded += _count(line.body.get("input"))

    def _complain(self, code: str, message: str, *, param: str | None = None, at_line: bool = True) -> None:
        if len(self.complaints) < MAX_COMPLAINTS:
            number = self._number if at_line else None
            self.complaints.append(Complaint(code=code, message=message, line=number, param=param))


def lines_in(content: bytes, piece: Piece) -> Iterator[tuple[int, Line]]:
    """The lines of a piece that was checked, each with its number."""
    for number, raw in enumerate(content.split(b"\n"), piece.first_line):
        if raw.strip():
            yield number, decoded(_line, raw, under="line")


def answered(batch: str, number: int, line: Line, answer: Answer) -> Answered:
    """A line that has an answer."""
    done = refused(batch, number, line, 200, answer.body)
    return msgspec.structs.replace(
        done, is_good=True, input_tokens=answer.input_tokens, output_tokens=answer.output_tokens
    )


def refused(batch: str, number: int, line: Line, status: int, body: bytes) -> Answered:
    """A line that has an error with a status; `body` is JSON on one line."""
    named = msgspec.json.decode(body, type=_Named).id
    request_id = named if isinstance(named, str) and named else _id(batch, number)
    response = {"status_code": status, "request_id": request_id, "body": msgspec.Raw(body)}
    return _written(batch, number, line, response=response, error=None)


def given_up(batch: str, number: int, line: Line, code: str, message: str) -> Answered:
    """A line that was not answered at all."""
    return _written(batch, number, line, response=None, error={"code": code, "message": message})


def packed(lines: list[Answered]) -> bytes:
    """Answers as an object holds them."""
    return b"\n".join(map(_encode, lines))


def unpacked(content: bytes) -> list[Answered]:
    """Those answers again."""
    return [_answered.decode(one) for one in content.split(b"\n")]


def _written(batch: str, number: int, line: Line, **fields: object) -> Answered:
    told = {"id": _id(batch, number), "custom_id": line.custom_id, **fields}
    return Answered(number=number, is_good=False, line=msgspec.Raw(_encode(told)))


def _form_code(error: BadRequest) -> str:
    """OpenAI's code for a line that is JSON and no request."""
    is_missing = error.message == missing(error.where or "").message
    return "missing_required_parameter" if is_missing else "invalid_request"


def _count(embedded: object) -> int:
    """Inputs of one line: a text and a list of tokens are one, a list of those is several."""
    if isinstance(embedded, list) and embedded and not isinstance(embedded[0], int):
        return len(embedded)
    return 1


def _id(batch: str, number: int) -> str:
    return f"batch_req_{batch}{number:06d}"
