"""
An agent in a process of its own: a crash, a leak or an endless loop there takes nothing else along.

Parent and child speak lines of JSON over a socket. The child asks for what its context offers, the parent answers, and
the last line is the output or the error. Cancelled, the parent kills the child with all that it started.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import msgspec

from sutazai.core.errors import AgentCrashed, SutazaiError
from sutazai.ports.agent import Agent, AgentContext

MAX_LINE_BYTES = 32 * 1024 * 1024
ENDS_S = 5.0
"""For the child to end by itself after its last line."""
CALLS = frozenset({"chat", "ask", "progress", "checkpoint", "spawn", "join", "send", "received"})


def isolated(agent: Agent) -> Agent:
    """The same agent, run in a process for each attempt. `agent.where` has to name it."""

    async def run(context: AgentContext, value: Any) -> Any:
        ours, theirs = socket.socketpair()
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "sutazai.adapters.process.child",
            str(theirs.fileno()),
            stdin=asyncio.subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        reader, writer = await asyncio.open_connection(sock=ours, limit=MAX_LINE_BYTES)
        try:
            writer.write(_line({"where": agent.where, "task": context.task, "input": value}))
            return await _serve(agent, context, reader, writer, child)
        finally:
            writer.close()
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            await child.wait()

    return replace(agent, run=run)


async def _serve(
    agent: Agent,
    context: AgentContext,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    child: asyncio.subprocess.Process,
) -> Any:
    """Answer the child until its last line. The attempt's own time limit bounds all of it."""
    while line := await reader.readline():
        said = msgspec.json.decode(line)
        if "output" in said:
            with suppress(TimeoutError):
                async with asyncio.timeout(ENDS_S):
                    await child.wait()
            return said["output"]
        if "error" in said:
            raise SutazaiError(said["error"])
        writer.write(_line(await _answer(context, said)))
        await writer.drain()
    code = await child.wait()
    raise AgentCrashed(f"The process of the agent {agent.name} ended with {code} before it had a result.")


async def _answer(context: AgentContext, said: Mapping[str, Any]) -> Mapping[str, Any]:
    """What one call of the child gives. `Pausing` and cancellations are the parent's: they end the child."""
    name = said["call"]
    if name not in CALLS:
        return {"failed": f"The agent called {name!r}, which its context does not have."}
    try:
        return {"gives": await getattr(context, name)(*said["positional"], **said["named"])}
    except SutazaiError as error:
        return {"failed": error.message}


def _line(value: Mapping[str, Any]) -> bytes:
    return msgspec.json.encode(value, enc_hook=_plain) + b"\n"


def _plain(value: object) -> object:
    return list(value) if isinstance(value, frozenset | set | tuple) else str(value)
