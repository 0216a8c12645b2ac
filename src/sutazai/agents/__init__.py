"""The registry of agents, and those that ship with SutazAI."""

from __future__ import annotations

from collections.abc import Sequence

from sutazai.agents.assistant import assistant, tools_with
from sutazai.agents.batch import batch_agents
from sutazai.agents.chat import chat
from sutazai.agents.code_review import code_review
from sutazai.agents.extract import extract
from sutazai.agents.registry import Registry, agent, with_entry_points
from sutazai.agents.research import research
from sutazai.agents.summarize import summarize
from sutazai.agents.tools import Tool
from sutazai.ports.agent import Agent

__all__ = ["Registry", "Tool", "agent", "assistant", "batch_agents", "builtin", "tools_with", "with_entry_points"]


def builtin(tools: Sequence[Tool] | None = None) -> tuple[Agent, ...]:
    """
    The agents that ship with SutazAI, but for those of batch jobs, which need stores (`batch_agents`).

    Args:
        tools: the assistant's; None = those that need nothing (`tools_with()`).
    """
    chosen = tools_with() if tools is None else tools
    return (chat, summarize, extract, code_review, research, assistant(chosen))
