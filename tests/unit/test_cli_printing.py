"""How commands print: columns for programs, text that cannot steer a terminal, sizes for people."""

from __future__ import annotations

import io
import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sutazai.cli.printing import GAP, columns, fitting, size


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


class Pipe(io.StringIO):
    """A stream of the encoding that it is given."""

    def __init__(self, encoding: str) -> None:
        super().__init__()
        self._encoding = encoding

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    text = columns(("NODE", "KIND"), [["a", "ollama"], ["a-long-name", "openai"]])

    assert text == "NODE          KIND\na             ollama\na-long-name   openai\n"


def test_empty_cells_are_dashes_so_that_columns_can_be_counted() -> None:
    lines = columns(("A", "B", "C"), [["1", "", "3"]]).splitlines()

    assert lines[1].split() == ["1", "-", "3"]


def test_wide_characters_take_two_columns() -> None:
    lines = columns(("A", "B"), [["模型", "x"], ["ab", "y"]]).splitlines()

    assert lines[1] == f"模型{GAP}x"
    assert lines[2] == f"ab  {GAP}y"


@given(st.lists(st.lists(st.text(max_size=20), min_size=2, max_size=2), max_size=5))
def test_every_row_is_one_line_whatever_the_cells_hold(rows: list[list[str]]) -> None:
    text = columns(("A", "B"), rows)

    assert text.count("\n") == 1 + len(rows)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)


@given(st.text())
def test_a_terminal_gets_no_control_characters(text: str) -> None:
    shown = fitting(text, Terminal())

    assert not {character for character in shown if unicodedata.category(character) == "Cc"} - {"\n", "\t"}


@given(st.text(alphabet=st.characters(exclude_categories=["Cc", "Cs"])))
def test_a_terminal_gets_all_other_text_as_it_is(text: str) -> None:
    assert fitting(text, Terminal()) == text


def test_a_pipe_gets_control_characters_too() -> None:
    assert fitting("\x1b[1mbold", Pipe("utf-8")) == "\x1b[1mbold"


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", "h? ?"), ("latin-1", "hé ?"), ("utf-8", "hé 模")])
def test_what_the_stream_cannot_encode_is_replaced(encoding: str, shown: str) -> None:
    assert fitting("hé 模", Pipe(encoding)) == shown


@pytest.mark.parametrize(
    ("size_bytes", "shown"),
    [
        (0, ""),
        (-1, ""),
        (1, "1 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (9_960, "10 kB"),
        (999_600, "1.0 MB"),
        (4_683_000_000, "4.7 GB"),
        (274_000_000, "274 MB"),
        (40_000_000_000_000, "40 TB"),
    ],
)
def test_sizes_have_two_or_three_digits(size_bytes: int, shown: str) -> None:
    assert size(size_bytes) == shown
