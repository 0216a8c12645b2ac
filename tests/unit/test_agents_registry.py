"""Which agents there are, and what becomes of mistakes."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

import pytest
from msgspec import Struct

from sutazai.agents.chat import chat
from sutazai.agents.registry import GROUP, NotAnAgent, Registry, agent, with_entry_points
from sutazai.agents.summarize import summarize
from sutazai.core.errors import BadRequest, UnknownAgent
from sutazai.ports.agent import TASK_PROCESSING, Agent, AgentContext


class Name(Struct):
    name: str


class Greeting(Struct):
    text: str


@agent(name="greeter", capabilities={"polite"}, queue=TASK_PROCESSING, concurrency=2)
async def greets(_: AgentContext, who: Name) -> Greeting:
    """
    Greets somebody.

    More for those who read the code.
    """
    return Greeting(f"Hello {who.name}")


def point(name: str, value: str) -> EntryPoint:
    return EntryPoint(name, value, GROUP)


def test_a_decorated_function_is_an_agent_with_the_types_of_its_annotations() -> None:
    assert isinstance(greets, Agent)
    assert (greets.name, greets.describes) == ("greeter", "Greets somebody.")
    assert (greets.input_type, greets.output_type) == (Name, Greeting)
    assert (greets.queue, greets.concurrency, greets.capabilities) == (TASK_PROCESSING, 2, frozenset({"polite"}))


def no_types(_context, _input):  # type: ignore[no-untyped-def]
    """Has no types."""


async def no_result(_: AgentContext, _input: Name):  # type: ignore[no-untyped-def]
    """Has no type of its result."""


async def no_docstring(_: AgentContext, _input: Name) -> Greeting:
    return Greeting("")


async def no_input(_: AgentContext) -> Greeting:
    """Takes nothing."""
    return Greeting("")


async def unknown_type(_: AgentContext, _input: Nowhere) -> Greeting:  # type: ignore[name-defined]  # noqa: F821
    """Names what is not there."""
    return Greeting("")


@pytest.mark.parametrize("run", [no_types, no_result, no_docstring, no_input, unknown_type])
def test_a_function_that_is_no_agent_is_refused_with_its_name(run: Any) -> None:
    with pytest.raises(NotAnAgent, match=run.__name__):
        agent()(run)


def test_an_unknown_agent_is_told_with_the_nearest_names() -> None:
    registry = Registry([chat, summarize])

    assert registry.get("chat") is chat
    with pytest.raises(UnknownAgent, match="Did you mean summarize"):
        registry.get("sumarise")
    with pytest.raises(UnknownAgent, match="GET /v1/agents"):
        registry.get("zzz")


def test_two_agents_of_one_name_are_refused() -> None:
    with pytest.raises(NotAnAgent, match="greeter"):
        Registry([greets, greets])


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ('{"messages": [{"role": "user", "content": 3}]}', "input.messages[0].content"),
        ('{"messages": []}', "input.messages"),
        ("{}", "input.messages"),
        ('{"messages": [{"role": "user", "content": "a"}], "temperature": 3}', "input.temperature"),
        ("[]", "input"),
        ("{", "input"),
        ("\ud800", "input"),
        ("[" * 100_000, "input"),
    ],
)
def test_an_input_that_does_not_fit_is_refused_with_its_place(text: str, where: str) -> None:
    with pytest.raises(BadRequest) as caught:
        Registry([chat]).decode("chat", text)

    assert caught.value.where == where


def test_an_input_that_fits_is_decoded() -> None:
    assert Registry([greets]).decode("greeter", '{"name": "Ada"}') == Name("Ada")


def test_agents_are_described_with_their_schemas_in_order() -> None:
    first, second = Registry([summarize, greets]).described()

    assert (first["name"], second["name"]) == ("greeter", "summarize")
    assert first["input_schema"]["$defs"]["Name"]["required"] == ["name"]
    assert first["output_schema"]["$defs"]["Greeting"]["properties"] == {"text": {"type": "string"}}


def test_a_broken_entry_point_is_named_and_takes_no_other_along() -> None:
    registry = with_entry_points(
        [chat],
        [
            point("missing", "no.such.module:thing"),
            point("absent", "sutazai.agents.chat:nothing"),
            point("no-agent", "sutazai.agents.chat:Answer"),
            point("again", "sutazai.agents.chat:chat"),
            point("good", "sutazai.agents.summarize:summarize"),
        ],
    )

    assert registry.names == ("chat", "summarize")
    assert set(registry.broken) == {"missing", "absent", "no-agent", "again"}
    assert "no" in registry.broken["missing"]
    assert "There was an agent chat already" in registry.broken["again"]
