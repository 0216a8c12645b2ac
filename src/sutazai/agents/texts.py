"""Texts that are cut, taken out of an answer, or written for a model: what several agents need."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated

from msgspec import Meta

MAX_TEXT_CHARACTERS = 4_000_000
MAX_PROMPT_CHARACTERS = 400_000

ModelName = Annotated[str, Meta(max_length=200)]
"""Empty leaves the choice to the gateway."""
Text = Annotated[str, Meta(min_length=1, max_length=MAX_TEXT_CHARACTERS)]
"""A long text."""
Prompt = Annotated[str, Meta(min_length=1, max_length=MAX_PROMPT_CHARACTERS)]
"""A text that goes to a model in one piece."""

_FENCED = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)
_BREAKS = ("\n\n", "\n", ". ", " ")


def system(text: str) -> Mapping[str, str]:
    """A message that tells the model what it is to do."""
    return {"role": "system", "content": text}


def user(text: str) -> Mapping[str, str]:
    """A message that holds what it is to do it with."""
    return {"role": "user", "content": text}


def chunks(text: str, size: int) -> list[str]:
    """The text in pieces of at most `size` characters, cut at the end of a paragraph, line, sentence or word."""
    pieces, begin = [], 0
    while len(text) - begin > size:
        end = _cut(text, begin, begin + size)
        pieces.append(text[begin:end])
        begin = end
    return [piece for piece in (*pieces, text[begin:]) if piece.strip()]


def json_in(answer: str) -> str:
    """The JSON in an answer: within a fence where there is one, else from the first brace to the last."""
    if fenced := _FENCED.search(answer):
        return fenced[1].strip()
    begin, end = answer.find("{"), answer.rfind("}")
    return answer[begin : end + 1] if 0 <= begin < end else answer.strip()


def _cut(text: str, begin: int, end: int) -> int:
    """Where to end a piece: behind the last break in its second half, else at its very end."""
    for mark in _BREAKS:
        found = text.rfind(mark, begin + (end - begin) // 2, end)
        if found >= 0:
            return found + len(mark)
    return end
