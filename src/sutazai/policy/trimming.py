"""
Which part of a conversation fits into a model's context.

Messages are kept or dropped by round: a question with all that follows it up to the next one, so that no call of
a tool is ever parted from its result. What was said last stays; instructions at the beginning always do.

Tokens are estimated, for counting them takes the model's own vocabulary: four bytes each, which is about right for
English and JSON, too many for most code and too few for few scripts. The reserve for the answer covers the error.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from sutazai.core.session import Message

BYTES_PER_TOKEN = 4
TOKENS_PER_MESSAGE = 4
"""Role, and the marks around a message."""
TOKENS_PER_IMAGE = 1024
"""Models cut images into 256 to 2048 tokens, whatever the size of the file."""
OPENING = frozenset({"user", "system", "developer"})
"""Roles that begin something new; assistants and tools go on with what was begun."""
INSTRUCTING = frozenset({"system", "developer"})

_INLINE = re.compile(rb'data:[\w.+-]+\\?/[\w.+-]+;base64,[^"]*')


def estimated_tokens(body: bytes) -> int:
    """About how many tokens a message (a JSON object), or a list of tools, takes."""
    images = 0
    if b";base64," in body:
        body, images = _INLINE.subn(b"", body)
    return TOKENS_PER_MESSAGE + len(body) // BYTES_PER_TOKEN + images * TOKENS_PER_IMAGE


def room_for_history(context_tokens: int, *, answer_tokens: int | None, fixed_tokens: int) -> int:
    """
    Tokens that the messages may take; 0 or less where there is room for none.

    Args:
        context_tokens: what the model sees at once, its answer included.
        answer_tokens: the longest answer that the client wants; None, and a quarter is reserved for it.
        fixed_tokens: what goes along whatever is dropped: instructions, tools.
    """
    reserve = context_tokens // 4 if answer_tokens is None else answer_tokens
    return context_tokens - reserve - fixed_tokens


def fitting(
    messages: Sequence[Message], *, tokens: float, count: float = float("inf"), size_bytes: float = float("inf")
) -> Sequence[Message]:
    """
    The newest rounds that fit, with the instructions at the very beginning.

    Args:
        messages: oldest first.
        tokens: what they may take together; `count` and `size_bytes` likewise.

    Returns:
        In order. The newest round is there even where it alone is too much.
    """
    leading = _leading(messages)
    first = messages[:leading]
    tokens -= sum(message.tokens for message in first)
    count -= len(first)
    size_bytes -= sum(len(message.body) for message in first)
    kept = len(messages)
    for index in range(len(messages) - 1, leading - 1, -1):
        message = messages[index]
        tokens -= message.tokens
        count -= 1
        size_bytes -= len(message.body)
        if kept != len(messages) and min(tokens, count, size_bytes) < 0:
            break
        if index == leading or is_opening(messages, index):
            kept = index
    return [*first, *messages[kept:]]


def is_opening(messages: Sequence[Message], index: int) -> bool:
    """Whether a round begins at this message: a question, with the instructions just before it."""
    role = messages[index].role
    before = messages[index - 1].role if index else ""
    return role in INSTRUCTING or (role in OPENING and before not in INSTRUCTING)


def _leading(messages: Sequence[Message]) -> int:
    """How many messages at the beginning are instructions."""
    return next((index for index, message in enumerate(messages) if message.role not in INSTRUCTING), len(messages))
