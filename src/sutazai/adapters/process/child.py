"""
The child's side of an isolated agent: `python -m sutazai.adapters.process.child FD`.

It imports the agent by the name that the parent gives, runs it, and speaks through the socket. What the agent prints
goes where the worker's own output goes.
"""

from __future__ import annotations

import asyncio
import importlib
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from sutazai.adapters.process.isolated import MAX_LINE_BYTES
from sutazai.core.errors import SutazaiError
from sutazai.core.task import Task
from sutazai.ports.agent import Agent, Answer, Said


class RemoteContext:
    """The `AgentContext` of a child: every call goes to the parent, one after another."""

    def __init__(self, task: Task, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.task = task
        self.fence = task.deliveries
        self._reader = reader
        self._writer = writer
        self._turn = asyncio.Lock()
        self._checkpoint: Any = msgspec.json.decode(task.checkpoint) if task.checkpoint else None

    async def chat(self, messages: Sequence[Mapping[str, Any]], *, model: str = "", **options: Any) -> Said:
        return msgspec.convert(await self._call("chat", messages, model=model, **options), Said)

    async def ask(self, endpoint: str, body: Mapping[str, Any]) -> Answer:
        return msgspec.convert(await self._call("ask", endpoint, body), Answer)

    async def progress(self, value: object) -> None:
        await self._call("progress", value)

    async def checkpoint(self, value: object) -> None:
        await self._call("checkpoint", value)
        self._checkpoint = value

    @property
    def last_checkpoint(self) -> Any:
        """What was kept last."""
        return self._checkpoint

    async def spawn(self, agent: str, input: object, *, key: str = "", **draft: Any) -> str:  # noqa: A002
        child: str = await self._call("spawn", agent, input, key=key, **draft)
        return child

    async def join(self, ids: Sequence[str]) -> Sequence[Task]:
        return msgspec.convert(await self._call("join", ids), list[Task])

    async def send(self, to: str, body: object) -> None:
        await self._call("send", to, body)

    async def received(self, name: str, *, after: int = 0) -> Sequence[tuple[int, object]]:
        return [(number, body) for number, body in await self._call("received", name, after=after)]

    async def _call(self, call: str, *positional: object, **named: object) -> Any:
        async with self._turn:
            self._writer.write(msgspec.json.encode({"call": call, "positional": positional, "named": named}) + b"\n")
            await self._writer.drain()
            line = await self._reader.readline()
        if not line:
            raise asyncio.CancelledError  # the parent called the attempt off
        answer = msgspec.json.decode(line)
        if "failed" in answer:
            raise SutazaiError(answer["failed"])
        return answer["gives"]


async def main(fd: int) -> None:
    """One attempt."""
    reader, writer = await asyncio.open_connection(sock=socket.socket(fileno=fd), limit=MAX_LINE_BYTES)
    asked = msgspec.json.decode(await reader.readline(), type=dict[str, msgspec.Raw])
    where = msgspec.json.decode(asked["where"], type=str)
    try:
        agent = _agent(where)
        context = RemoteContext(msgspec.json.decode(asked["task"], type=Task), reader, writer)
        output = await agent.run(context, msgspec.json.decode(asked["input"], type=agent.input_type))
        last = msgspec.json.encode({"output": output})
    except SutazaiError as error:
        last = msgspec.json.encode({"error": error.message})
    except Exception as error:  # the border of an attempt
        last = msgspec.json.encode({"error": f"{type(error).__name__}: {error}"})
    writer.write(last + b"\n")
    await writer.drain()
    writer.close()


def _agent(where: str) -> Agent:
    module, _, name = where.partition(":")
    agent: Agent = getattr(importlib.import_module(module), name)
    return agent


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
