"""How commands print: tables for people, plain columns and JSON for programs, nothing that steers a terminal."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Sequence
from typing import TextIO

import msgspec
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

Cell = str | Text
GAP = "   "


def print_json(value: object) -> None:
    """Indented JSON on standard output."""
    body = value if isinstance(value, bytes) else msgspec.json.encode(value)
    sys.stdout.write(msgspec.json.format(body).decode() + "\n")


def print_table(heads: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
    """A table that fits the terminal, or elsewhere columns of which nothing is cut. Empty cells are `-`."""
    if sys.stdout.isatty():
        console().print(table(heads, rows))
    else:
        sys.stdout.write(columns(heads, rows))


def table(heads: Sequence[str], rows: Sequence[Sequence[Cell]]) -> Table:
    """The rows for a terminal; long cells go on in a second line."""
    made = Table(*heads, box=None, header_style="bold", pad_edge=False)
    for column in made.columns:
        column.overflow = "fold"
    for row in rows:
        made.add_row(*map(_shown, row))
    return made


def columns(heads: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """The rows as lines, each column as wide as its widest cell."""
    lines = [list(heads), *([str(_shown(cell)) for cell in row] for row in rows)]
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    return "".join(
        GAP.join(cell + " " * (width - cell_len(cell)) for cell, width in zip(line, widths, strict=True)).rstrip()
        + "\n"
        for line in lines
    )


def console(*, stderr: bool = False) -> Console:
    """A terminal that takes no text for markup."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def fitting(text: str, stream: TextIO) -> str:
    """
    The text as the stream can take it.

    A terminal gets no control characters but tabs and ends of lines: what models and nodes say could move its
    cursor, change its title or answer in the user's name.
    """
    if stream.isatty():
        text = "".join(
            character for character in text if character in "\n\t" or unicodedata.category(character) != "Cc"
        )
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def complain(sentence: str) -> None:
    """A line on standard error."""
    sys.stderr.write(fitting(sentence, sys.stderr) + "\n")


def size(size_bytes: int) -> str:
    """Bytes in the unit that people use for models: `4.7 GB`; empty for 0, which means that nobody knows."""
    if size_bytes <= 0:
        return ""
    amount, unit = float(size_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if amount < 999.5:
            break
        amount, unit = amount / 1000, larger
    return f"{amount:.1f} {unit}" if amount < 9.95 and unit != "B" else f"{amount:.0f} {unit}"


def _shown(cell: Cell) -> Cell:
    """The cell on one line and without control characters; `-` where it is empty, so that columns can be counted."""
    if isinstance(cell, Text):
        return cell
    clean = "".join(" " if unicodedata.category(character) == "Cc" else character for character in cell)
    return clean.encode(errors="replace").decode() or "-"
