"""
How many tokens an answer took, found in bytes that pass through untouched.

A stream has thousands of pieces and one of them tells; so each piece is only searched for the name of the
count, and what surrounds it is parsed when the name is there. Pieces may end anywhere: what could be the
beginning of something is carried over to the next, 8 KiB at most.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Final

import msgspec

from sutazai.core.request import Dialect, Endpoint, Usage

CARRY_BYTES: Final = 8 * 1024

_KEY: Final = b'"usage"'
_PLAIN_KEY: Final = b'"usage":{'
_BEFORE_BRACE: Final = len(_PLAIN_KEY) - 1
_AFTER_KEY: Final = len(_KEY) + 1
_NEWLINE: Final = ord("\n")
_BACKSLASH: Final = ord("\\")

# One level of nesting is what the details of a usage have.
_OBJECT = re.compile(rb'"usage"\s*:\s*(\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\})')
_UNFINISHED = re.compile(rb'"usage"\s*(?::\s*(?:\{[^{}]*(?:\{[^{}]*\}[^{}]*)*(?:\{[^{}]*)?)?)?\Z')
_COUNT = re.compile(rb'(?<=[^\\])"(prompt_eval_count|eval_count)"\s*:\s*(\d{1,18})(?=[^\d])')


_Count = Annotated[int, msgspec.Meta(ge=0)]
"""A negative one, from a node gone wrong, would be credit; it counts as not told."""


class OpenAIUsage(msgspec.Struct, frozen=True):
    """The `usage` of an OpenAI answer; embeddings have no second count."""

    prompt_tokens: _Count
    completion_tokens: _Count | None = None


class OllamaCounts(msgspec.Struct, frozen=True):
    """The counts in the last line of an Ollama answer."""

    prompt_eval_count: _Count | None = None
    eval_count: _Count | None = None


class UsageScan:
    """Watches one answer: `feed` every piece as it comes, then ask for the `result`."""

    __slots__ = ("feed", "result")

    feed: Callable[[bytes], None]
    """Look at the next piece of the body."""
    result: Callable[[], Usage | None]
    """What was told; None where nothing was. To be asked once the answer is complete."""

    def __init__(self, endpoint: Endpoint) -> None:
        # The methods themselves, so that a piece costs one call and no question which dialect it is.
        scan = _ScanOpenAI() if endpoint.dialect is Dialect.OPENAI else _ScanOllama()
        self.feed = scan.feed
        self.result = scan.result


class _OpenAIAnswer(msgspec.Struct, frozen=True):
    usage: OpenAIUsage | None = None


def usage_of_whole(endpoint: Endpoint, body: bytes) -> Usage | None:
    """What a complete answer that did not stream says of its tokens; None where it does not."""
    try:
        if endpoint.dialect is Dialect.OPENAI and (usage := _flat_usage(body)) is not None:
            return Usage(usage.prompt_tokens, usage.completion_tokens or 0)
        if endpoint.dialect is Dialect.OLLAMA:
            counts = _ollama_counts.decode(body)
            told = counts.prompt_eval_count is not None or counts.eval_count is not None
            return Usage(counts.prompt_eval_count or 0, counts.eval_count or 0) if told else None
        usage = _openai_answer.decode(body).usage
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return None if usage is None else Usage(usage.prompt_tokens, usage.completion_tokens or 0)


def _flat_usage(body: bytes) -> OpenAIUsage | None:
    """The usage at the end of an answer, without reading the answer: only where it stands in the plainest form."""
    at = body.rfind(_PLAIN_KEY)
    if at < 0:
        return None
    try:
        return _openai_usage.decode(body[at + _BEFORE_BRACE : body.find(b"}", at) + 1])
    except msgspec.DecodeError:
        return None  # it holds details, or is none: the whole will tell


class _ScanOpenAI:
    """
    The last complete `"usage": {...}`, wherever it is.

    Inside a JSON string the name would stand as `\\"usage\\"`, and after the end of a string there is no
    colon: so what the model wrote cannot be taken for it.
    """

    __slots__ = ("_carry", "_usage")

    def __init__(self) -> None:
        self._carry = b""
        self._usage: OpenAIUsage | None = None

    def feed(self, data: bytes) -> None:
        if self._carry:
            data = self._carry + data
            self._carry = b""
        at = data.rfind(_KEY)
        if at >= 0 and not (data.startswith(b":null", at + 7) and data.find(_KEY, 0, at) < 0):
            self._look(data, at)
        elif data and data[-1] != _NEWLINE:
            self._carry = data[-_AFTER_KEY:]

    def result(self) -> Usage | None:
        usage = self._usage
        return None if usage is None else Usage(usage.prompt_tokens, usage.completion_tokens or 0)

    def _look(self, data: bytes, at: int) -> None:
        """Go back from the last key to the last one that is complete; carry over a last one that is not."""
        if unfinished := _UNFINISHED.match(data, at):
            start = max(unfinished.start() - 1, 0)
            self._carry = data[start:] if len(data) - start <= CARRY_BYTES else b""
        if not self._carry and data[-1] != _NEWLINE:
            self._carry = data[-_AFTER_KEY:]
        while at >= 0 and not self._take(data, at):
            at = data.rfind(_KEY, 0, at)

    def _take(self, data: bytes, at: int) -> bool:
        found = _OBJECT.match(data, at, at + CARRY_BYTES - 1)
        if found is None or (at > 0 and data[at - 1] == _BACKSLASH):
            return False
        try:
            self._usage = _openai_usage.decode(found[1])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return False
        return True


class _ScanOllama:
    """
    The counts of the last line that has any.

    A line of up to 8 KiB is parsed, so a tool call with such names among its arguments cannot be taken for
    counts. Of a longer one (a whole answer, an embedding) the last counts that stand in it are taken.
    """

    __slots__ = ("_begun", "_counts", "_line", "_loose")

    def __init__(self) -> None:
        self._line = b""
        """The end of the line that has begun."""
        self._begun = 0
        """Bytes of that line so far."""
        self._loose: dict[bytes, int] = {}
        """Counts seen in it."""
        self._counts: OllamaCounts | None = None

    def feed(self, data: bytes) -> None:
        if not self._begun and data and data[-1] == _NEWLINE and b'eval_count"' not in data:
            return
        *complete, rest = data.split(b"\n")
        for line in complete:
            self._append(line)
            self._close()
        if rest:
            self._append(rest)

    def result(self) -> Usage | None:
        self._close()
        counts = self._counts
        return None if counts is None else Usage(counts.prompt_eval_count or 0, counts.eval_count or 0)

    def _append(self, data: bytes) -> None:
        self._begun += len(data)
        line = self._line + data
        if b'eval_count"' in line:
            self._loose.update((found[1], int(found[2])) for found in _COUNT.finditer(line))
        self._line = line[-CARRY_BYTES:]

    def _close(self) -> None:
        """The line is complete: take what it tells."""
        if self._begun <= CARRY_BYTES:
            counts = _counts_of(self._line) if b'eval_count"' in self._line else None
        else:
            counts = OllamaCounts(self._loose.get(b"prompt_eval_count"), self._loose.get(b"eval_count"))
        if counts is not None and counts != OllamaCounts():
            self._counts = counts
        self._line, self._begun, self._loose = b"", 0, {}


_openai_answer = msgspec.json.Decoder(_OpenAIAnswer)
_openai_usage = msgspec.json.Decoder(OpenAIUsage)
_ollama_counts = msgspec.json.Decoder(OllamaCounts)


def _counts_of(line: bytes) -> OllamaCounts | None:
    try:
        return _ollama_counts.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
