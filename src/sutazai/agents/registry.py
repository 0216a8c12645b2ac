"""
Which agents there are: those of SutazAI, those that packages bring as entry points, and those made by hand.

A registry is a value; nothing registers itself by being imported. An entry point that cannot be loaded is named, in
the log and in `broken`, and takes no other along.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

import msgspec
import structlog

from sutazai.core.errors import SutazaiError, UnknownAgent
from sutazai.dialects.complaints import decoded
from sutazai.policy.nearest import nearest
from sutazai.ports.agent import LLM_INFERENCE, Agent, AgentContext

log = structlog.get_logger("sutazai.agents")

GROUP = "sutazai.agents"
"""The group of entry points that packages list their agents in."""

In = TypeVar("In")
Out = TypeVar("Out")


class NotAnAgent(SutazaiError):
    """Something was to be an agent and is none; told at the start."""


def agent(
    *,
    name: str = "",
    capabilities: Iterable[str] = (),
    queue: str = LLM_INFERENCE,
    concurrency: int = 8,
    time_limit_s: float = 600.0,
    max_attempts: int = 3,
    is_internal: bool = False,
    is_isolated: bool = False,
) -> Callable[[Callable[[AgentContext, In], Awaitable[Out]]], Agent]:
    """
    Make an `Agent` of an async function `(context, input) -> output`.

    Its annotations are the types of input and output, and the first line of its docstring tells what it does. What
    is left out is as in `Agent`.

    Args:
        name: left out, the name of the function.
    """

    def made(run: Callable[[AgentContext, In], Awaitable[Out]]) -> Agent:
        called = name or getattr(run, "__name__", "")
        input_type, output_type = _types(run, called)
        describes = (inspect.getdoc(run) or "").partition("\n")[0]
        if not describes:
            raise NotAnAgent(f"The agent {called} had no docstring. Say in one sentence what it does.")
        return Agent(
            name=called,
            run=run,
            input_type=input_type,
            output_type=output_type,
            describes=describes,
            capabilities=frozenset(capabilities),
            queue=queue,
            concurrency=concurrency,
            time_limit_s=time_limit_s,
            max_attempts=max_attempts,
            is_internal=is_internal,
            is_isolated=is_isolated,
        )

    return made


class Registry:
    """Agents by name."""

    def __init__(self, agents: Iterable[Agent], *, broken: Mapping[str, str] | None = None) -> None:
        """Raises `NotAnAgent` where two have the same name."""
        self._agents: dict[str, Agent] = {}
        for one in agents:
            if one.name in self._agents:
                raise NotAnAgent(f"Two agents were called {one.name}. Give one of them another name.")
            self._agents[one.name] = one
        self._decoders = {one.name: msgspec.json.Decoder(one.input_type) for one in self._agents.values()}
        self.broken: Mapping[str, str] = broken or {}
        """Entry points that could not be used, and why."""

    def __iter__(self) -> Iterator[Agent]:
        return iter(self._agents.values())

    def __contains__(self, name: object) -> bool:
        return name in self._agents

    @property
    def names(self) -> tuple[str, ...]:
        """All names, in order."""
        return tuple(sorted(self._agents))

    def get(self, name: str) -> Agent:
        """The agent of that name. Raises `UnknownAgent`, which names those most like it."""
        found = self._agents.get(name)
        if found is None:
            raise UnknownAgent(name, nearest(name, self._agents))
        return found

    def decode(self, name: str, text: str | bytes) -> Any:
        """The input of an agent out of JSON. Raises `UnknownAgent`, and `BadRequest` naming the field at fault."""
        found = self.get(name)
        body = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        return decoded(self._decoders[found.name], body, under="input")

    def described(self) -> list[dict[str, Any]]:
        """Every agent for `GET /v1/agents`: what it is, and the JSON schemas of its input and output."""
        return [_described(self._agents[name]) for name in self.names]


def with_entry_points(agents: Iterable[Agent], points: Iterable[EntryPoint] | None = None) -> Registry:
    """
    A registry of these agents and of all that installed packages bring; of one name the first counts.

    Args:
        points: None = those of the group `sutazai.agents`, by name.
    """
    found = {one.name: one for one in agents}
    broken: dict[str, str] = {}
    chosen = sorted(entry_points(group=GROUP), key=lambda point: point.name) if points is None else points
    for point in chosen:
        try:
            one = _loaded(point)
            if one.name in found:
                raise NotAnAgent(f"There was an agent {one.name} already. Give it another name.")
            found[one.name] = one
        except Exception as error:  # the border of somebody else's package
            broken[point.name] = f"{type(error).__name__}: {error}"
            log.error("agent not loaded", entry_point=point.name, value=point.value, why=broken[point.name])
    return Registry(found.values(), broken=broken)


def _loaded(point: EntryPoint) -> Agent:
    value = point.load()
    if not isinstance(value, Agent):
        raise NotAnAgent(f"{point.value} was a {type(value).__name__}, not an Agent. Decorate it with `@agent()`.")
    msgspec.json.Decoder(value.input_type)  # a type that cannot be decoded is found here, not by a task
    return value


def _types(run: Callable[..., Any], called: str) -> tuple[Any, Any]:
    """The types of the second parameter and of the result."""
    if not inspect.iscoroutinefunction(run):
        raise NotAnAgent(f"The agent {called} was no async function. Write `async def`.")
    try:
        signature = inspect.signature(run, eval_str=True)
    except NameError as error:
        raise NotAnAgent(
            f"An annotation of the agent {called} was not understood: {error}. Import what it names at the top of the "
            "module, not below TYPE_CHECKING."
        ) from error
    parameters = list(signature.parameters.values())
    empty = inspect.Parameter.empty
    if len(parameters) != 2 or empty in {parameters[1].annotation, signature.return_annotation}:
        raise NotAnAgent(f"The agent {called} must be `(context, input: In) -> Out` with both types annotated.")
    return parameters[1].annotation, signature.return_annotation


def _described(one: Agent) -> dict[str, Any]:
    return {
        "name": one.name,
        "description": one.describes,
        "capabilities": sorted(one.capabilities),
        "queue": one.queue,
        "time_limit_s": one.time_limit_s,
        "max_attempts": one.max_attempts,
        "input_schema": msgspec.json.schema(one.input_type),
        "output_schema": msgspec.json.schema(one.output_type),
    }
