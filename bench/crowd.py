"""Clients that wait for each answer before they ask again: people, or a program that wants everything at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bench.payload import CHAT_PATH

_ANSWER_S = 60.0


@dataclass(frozen=True, slots=True)
class Answered:
    """One request as its client saw it."""

    status: int
    seconds: float
    head: str


@dataclass(slots=True, kw_only=True)
class Person:
    """Who asks, how often, and what came of it."""

    key: str
    body: Callable[[int], bytes]
    """The n-th request."""
    path: str = CHAT_PATH
    pause_s: float = 0.0
    """Between an answer and the next request."""
    answered: list[Answered] = field(default_factory=list)

    def waits_s(self) -> list[float]:
        """How long the answers took that came."""
        return [one.seconds for one in self.answered if one.status == 200]


async def ask(port: int, key: str, body: bytes, path: str = CHAT_PATH) -> Answered:
    """One request on a connection of its own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        return await _exchange(reader, writer, key, body, path)
    finally:
        writer.close()


async def crowd(port: int, people: Sequence[Person], seconds: float) -> None:
    """Let all of them ask until the time is over; who waits then still gets the answer."""
    until = time.monotonic() + seconds
    async with asyncio.TaskGroup() as group:
        for number, person in enumerate(people):
            group.create_task(_keep_asking(port, person, until), name=f"person {number}")


async def _keep_asking(port: int, person: Person, until: float) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        count = 0
        while time.monotonic() < until:
            body = person.body(count)
            person.answered.append(await _exchange(reader, writer, person.key, body, person.path))
            count += 1
            await asyncio.sleep(person.pause_s)
    finally:
        writer.close()


async def _exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: str, body: bytes, path: str
) -> Answered:
    head = (
        f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {key}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    began = time.monotonic()
    async with asyncio.timeout(_ANSWER_S):
        writer.write(head.encode() + body)
        answer = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        length = next(line for line in answer.split("\r\n") if line.lower().startswith("content-length:"))
        await reader.readexactly(int(length.split(":")[1]))
    return Answered(int(answer.split(" ", 2)[1]), time.monotonic() - began, answer)
