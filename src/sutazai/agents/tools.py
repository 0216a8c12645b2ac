"""
What an assistant can do beside talking: each tool with the schema that models are shown, and a run that is bounded.

A tool that fails tells the model why, in the words of the error; it never ends the agent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from sutazai.agents.calculator import calculated
from sutazai.agents.sandbox import Sandbox
from sutazai.core.errors import SutazaiError
from sutazai.dialects.complaints import decoded
from sutazai.ports.agent import AgentContext
from sutazai.ports.web import Web

MAX_RESULT_CHARACTERS = 20_000
MAX_ARGUMENTS_CHARACTERS = 1_200_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """Something that a model may call."""

    name: str
    describes: str
    arguments: type[Struct]
    run: Callable[[AgentContext, Any], Awaitable[str]]

    @property
    def form(self) -> Mapping[str, Any]:
        """As OpenAI's API is told of it."""
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.describes,
                "parameters": _flat(self.arguments),
            },
        }

    async def call(self, context: AgentContext, arguments: str) -> tuple[str, bool]:
        """What it says, and whether it worked."""
        if len(arguments) > MAX_ARGUMENTS_CHARACTERS:
            return "Error: the arguments were too long.", False
        try:
            given = decoded(
                msgspec.json.Decoder(self.arguments), (arguments or "{}").encode("utf-8", "replace"), under="arguments"
            )
            said = await self.run(context, given)
        except SutazaiError as error:
            return f"Error: {error.message}", False
        if len(said) > MAX_RESULT_CHARACTERS:
            said = f"{said[:MAX_RESULT_CHARACTERS]}\n[cut here: {len(said)} characters]"
        return said, True


class Expression(Struct):
    """What to work out."""

    expression: Annotated[str, Meta(max_length=1000)]


class Url(Struct):
    """What to read."""

    url: Annotated[str, Meta(max_length=4096)]


class FilePath(Struct):
    """A file of the folder."""

    path: Annotated[str, Meta(max_length=4096)]


class Folder(Struct):
    """A folder in the folder."""

    path: Annotated[str, Meta(max_length=4096)] = ""


class NewFile(Struct):
    """A file to write."""

    path: Annotated[str, Meta(max_length=4096)]
    text: str


def calculator() -> Tool:
    """Arithmetic."""

    async def run(_: AgentContext, given: Expression) -> str:
        value = await asyncio.to_thread(calculated, given.expression)
        return str(value)

    return Tool(
        name="calculator",
        describes="Works out arithmetic: + - * / // % **, sqrt, log, sin, round, min, max, factorial, pi, e.",
        arguments=Expression,
        run=run,
    )


def http_get(web: Web) -> Tool:
    """Pages of the public web."""

    async def run(_: AgentContext, given: Url) -> str:
        page = await web.get(given.url)
        cut = " (cut)" if page.is_cut else ""
        return f"{page.status} {page.content_type} {page.url}{cut}\n\n{page.text}"

    return Tool(name="http_get", describes="Reads a page of the public web.", arguments=Url, run=run)


def files(root: Path) -> tuple[Tool, ...]:
    """Reading, writing and listing files below `root`, where each tenant has a folder of its own."""

    async def read(context: AgentContext, given: FilePath) -> str:
        return await asyncio.to_thread(lambda: sandbox_of(root, context.task.draft.tenant).read(given.path))

    async def write(context: AgentContext, given: NewFile) -> str:
        size_bytes = await asyncio.to_thread(
            lambda: sandbox_of(root, context.task.draft.tenant).write(given.path, given.text)
        )
        return f"{size_bytes} bytes written."

    async def listed(context: AgentContext, given: Folder) -> str:
        names = await asyncio.to_thread(lambda: sandbox_of(root, context.task.draft.tenant).listed(given.path))
        return "\n".join(names) or "(empty)"

    return (
        Tool(name="read_file", describes="Reads a text file of your folder.", arguments=FilePath, run=read),
        Tool(name="write_file", describes="Writes a text file of your folder, whole.", arguments=NewFile, run=write),
        Tool(name="list_files", describes="Lists your folder, or one in it.", arguments=Folder, run=listed),
    )


def sandbox_of(root: Path, tenant: str) -> Sandbox:
    """A tenant's own folder; its name could be anything, so that of the folder is its hash."""
    return Sandbox(root / sha256(tenant.encode()).hexdigest()[:32])


def _flat(kind: type[Struct]) -> Mapping[str, Any]:
    """The schema without references, which some nodes do not follow."""
    whole = msgspec.json.schema(kind)
    found: Mapping[str, Any] = whole["$defs"][kind.__name__]
    return {name: value for name, value in found.items() if name not in {"title", "description"}}
