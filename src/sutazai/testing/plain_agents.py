"""Agents for tests: plain ones that need no model."""

from __future__ import annotations

from typing import Any

import msgspec

from sutazai.ports.agent import LLM_INFERENCE, TASK_PROCESSING, Agent, AgentContext


class Echo(msgspec.Struct):
    """What `echo` takes and gives."""

    text: str = ""
    times: int = 1


async def _echo(_: AgentContext, said: Echo) -> Echo:
    return said


async def _anything(_: AgentContext, said: Any) -> Any:
    return said


def plain_agents() -> dict[str, Agent]:
    """`echo`, with typed input, and `anything`; each with a queue of its own."""
    echo = Agent(
        name="echo", run=_echo, input_type=Echo, output_type=Echo, describes="Says it again.", queue=LLM_INFERENCE
    )
    anything = Agent(
        name="anything", run=_anything, input_type=Any, output_type=Any, describes="Takes all.", queue=TASK_PROCESSING
    )
    return {agent.name: agent for agent in (echo, anything)}
