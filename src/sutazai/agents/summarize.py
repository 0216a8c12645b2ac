"""
A long text in few words: each chunk is summed up, then the summaries, until one is left.

Every finished chunk is kept in the checkpoint, so that an attempt after a crash goes on with the next one.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from sutazai.agents.asking import NotAnswered
from sutazai.agents.registry import agent
from sutazai.agents.texts import ModelName, Text, chunks, system, user
from sutazai.ports.agent import AgentContext

PART = "Sum up this part of a longer text. Keep names, numbers and decisions. Write nothing else."
WHOLE = "Sum up this text in at most {words} words. Keep what matters most. Write nothing else."


class LongText(Struct, forbid_unknown_fields=True):
    """What to sum up."""

    text: Text
    words: Annotated[int, Meta(ge=5, le=5000)] = 150
    """Of the summary, at most."""
    chunk_characters: Annotated[int, Meta(ge=200, le=200_000)] = 8000
    """What the model sees at once."""
    focus: Annotated[str, Meta(max_length=1000)] = ""
    """What the reader wants to know; empty = all."""
    model: ModelName = ""


class Summary(Struct):
    """What it comes to."""

    summary: str
    chunks: int
    """Of the text."""
    levels: int
    """Rounds of summaries."""


class _Kept(Struct):
    """The checkpoint: what the level under way was made of, and what of it is done."""

    level: int
    pieces: list[str]
    """Empty at the first level, where they follow from the input."""
    done: list[str]


@agent(time_limit_s=3600.0)
async def summarize(context: AgentContext, text: LongText) -> Summary:
    """Sums up a text of any length."""
    first = chunks(text.text, text.chunk_characters) or [text.text]
    kept = _kept(context.last_checkpoint)
    level, done = kept.level, kept.done
    pieces = kept.pieces or first
    while len(pieces) > 1:
        done = await _summaries(context, text, _Kept(level, [] if level == 0 else pieces, done), pieces)
        shorter = chunks("\n\n".join(done), text.chunk_characters)
        if len(shorter) >= len(pieces):
            raise NotAnswered("The model's summaries were as long as the text. Try another model, or larger chunks.")
        pieces, done, level = shorter, [], level + 1
        await context.checkpoint(msgspec.to_builtins(_Kept(level, pieces, [])))
    summary = await _ask(context, text, WHOLE.format(words=text.words), "\n\n".join(pieces))
    return Summary(summary, len(first), level + 1)


async def _summaries(context: AgentContext, text: LongText, kept: _Kept, pieces: list[str]) -> list[str]:
    """One summary a piece; those that are done already are not made again."""
    for piece in pieces[len(kept.done) :]:
        kept.done.append(await _ask(context, text, PART, piece))
        await context.checkpoint(msgspec.to_builtins(kept))
        await context.progress({"level": kept.level + 1, "done": len(kept.done), "of": len(pieces)})
    return kept.done


async def _ask(context: AgentContext, text: LongText, what: str, piece: str) -> str:
    focus = f" The reader wants to know: {text.focus}" if text.focus else ""
    said = await context.chat([system(what + focus), user(piece)], model=text.model)
    return said.text.strip()


def _kept(checkpoint: Any) -> _Kept:
    """What an attempt before left; nothing where it left none, or another version did."""
    try:
        return msgspec.convert(checkpoint, _Kept)
    except msgspec.ValidationError:
        return _Kept(0, [], [])
