"""One streamed answer: asked for, read, printed as it comes, measured."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import msgspec

from sutazai.cli.client import GatewayClient
from sutazai.cli.printing import fitting
from sutazai.core.errors import NodeRejected, NodeUnreachable
from sutazai.dialects.errors import error_message

PATH = "/v1/chat/completions"
IDLE_S = 180.0
"""Well above the gateway's own limit between two parts, and its signs of life before the first."""
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which model, and how it is to answer; None leaves it to the model."""

    model: str
    temperature: float | None
    max_tokens: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """How an answer came."""

    first_token_s: float
    """From the question; thoughts count as tokens."""
    rest_s: float
    """From the first token to the last."""
    tokens: int
    """As the node counted them, else the parts of the stream."""


class Delta(msgspec.Struct, frozen=True):
    """What is new."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    """vLLM's newer word for it."""


class Choice(msgspec.Struct, frozen=True):
    """The one answer that was asked for."""

    delta: Delta = Delta()


class Counted(msgspec.Struct, frozen=True):
    """The node's count, in the last part."""

    completion_tokens: int = 0


class Part(msgspec.Struct, frozen=True):
    """One event of the stream."""

    choices: tuple[Choice, ...] = ()
    usage: Counted | None = None
    error: msgspec.Raw = msgspec.Raw(b"null")


_PART = msgspec.json.Decoder(Part)


async def answer(
    client: GatewayClient, wanted: Wanted, messages: Sequence[Mapping[str, str]], heard: list[str]
) -> Measured:
    """
    Ask, and print the answer on standard output as it comes.

    `heard` gets its parts at once, so that they are there when the answer is interrupted. Raises `SutazaiError`;
    cancelled, it drops the connection, and the gateway frees the node.
    """
    paper = _Paper(heard)
    asked_at = time.monotonic()
    is_complete = False
    try:
        async with aclosing(client.lines(PATH, _request(wanted, messages), idle_s=IDLE_S)) as lines:
            async for line in lines:
                event = line.removeprefix(b"data:").strip()
                if event == b"[DONE]":
                    is_complete = True  # read on to the end: leaving now would count as a client that left
                elif line.startswith(b"data:"):
                    paper.write(_part(event, client.url))
    finally:
        paper.end_line()
    if is_complete:
        return paper.measured(asked_at)
    raise NodeUnreachable(f"The gateway at {client.url} broke off. Ask again.", node=client.url)


def _request(wanted: Wanted, messages: Sequence[Mapping[str, str]]) -> dict[str, object]:
    request: dict[str, object] = {
        "model": wanted.model,
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if wanted.temperature is not None:
        request["temperature"] = wanted.temperature
    if wanted.max_tokens is not None:
        request["max_tokens"] = wanted.max_tokens
    return request


def _part(event: bytes, url: str) -> Part:
    """Raises `NodeRejected` for an error, with its sentence, and for what is no event at all."""
    try:
        part = _PART.decode(event)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise NodeRejected("The answer made no sense from here on. Ask again.", node=url, status=200) from error
    if bytes(part.error) != b"null":
        raise NodeRejected(error_message(event), node=url, status=200)
    return part


class _Paper:
    """What an answer is written on. Thoughts are shown in a terminal, dimmed; programs get the answer alone."""

    def __init__(self, heard: list[str]) -> None:
        self._heard = heard
        self._shows_thoughts = sys.stdout.isatty()
        self._thinks = False
        self._is_line_ended = True
        self._first_at = 0.0
        self._last_at = 0.0
        self._parts = 0
        self._counted = 0

    def write(self, part: Part) -> None:
        if part.usage is not None:
            self._counted = part.usage.completion_tokens
        for choice in part.choices:
            thought = choice.delta.reasoning_content or choice.delta.reasoning
            if thought:
                self._note_time()
                self._think(thought)
            if choice.delta.content:
                self._note_time()
                self._say(choice.delta.content)

    def measured(self, asked_at: float) -> Measured:
        """What came of it; `asked_at` is on the monotonic clock."""
        first_at = self._first_at or time.monotonic()
        return Measured(
            first_token_s=first_at - asked_at,
            rest_s=max(0.0, self._last_at - first_at),
            tokens=self._counted or self._parts,
        )

    def end_line(self) -> None:
        """Leave the terminal as it was before the answer."""
        if self._thinks:
            self._print(PLAIN)
        if not self._is_line_ended:
            self._print("\n")

    def _note_time(self) -> None:
        self._last_at = time.monotonic()
        self._parts += 1
        self._first_at = self._first_at or self._last_at

    def _think(self, text: str) -> None:
        if self._shows_thoughts:
            self._print(("" if self._thinks else DIM) + fitting(text, sys.stdout))
            self._thinks = True

    def _say(self, text: str) -> None:
        self._heard.append(text)
        self._print((f"{PLAIN}\n\n" if self._thinks else "") + fitting(text, sys.stdout))
        self._thinks = False

    def _print(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
        self._is_line_ended = text.endswith("\n")
