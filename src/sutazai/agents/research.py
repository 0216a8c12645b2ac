"""
A question that one answer cannot hold: a plan, a child task for each part of it in parallel, then a synthesis.

The plan is kept in the checkpoint: the agent is started anew when its children have ended, and must then ask for the
same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from sutazai.agents.asking import NotAnswered, ask_for
from sutazai.agents.registry import agent
from sutazai.agents.texts import ModelName, system, user
from sutazai.core.task import Task, TaskStatus
from sutazai.ports.agent import AgentContext

PLAN = (
    "Split the user's question into at most {most} smaller questions that can be answered apart from each other and "
    'together answer it. Answer with JSON: {{"questions": [str]}}.'
)
PART = "Answer precisely and briefly. Say what you do not know."
SYNTHESIS = (
    "Answer the question from the partial answers alone, in connected prose. Say where they contradict each other or "
    "leave a gap."
)


class Topic(Struct, forbid_unknown_fields=True):
    """What to find out."""

    question: Annotated[str, Meta(min_length=3, max_length=20_000)]
    parts: Annotated[int, Meta(ge=1, le=16)] = 4
    """Smaller questions, at most."""
    agent: Annotated[str, Meta(min_length=1, max_length=100)] = "chat"
    """Which agent answers them: one with the input and output of `chat`."""
    model: ModelName = ""


class Part(Struct):
    """A smaller question and what came of it."""

    question: str
    answer: str
    """Empty where the child task failed."""
    task: str
    error: str = ""


class Report(Struct):
    """What was found out."""

    answer: str
    parts: list[Part]


class _Plan(Struct):
    questions: Annotated[list[Annotated[str, Meta(min_length=1, max_length=4000)]], Meta(min_length=1, max_length=64)]


@agent(capabilities={"children"}, time_limit_s=1800.0)
async def research(context: AgentContext, topic: Topic) -> Report:
    """Splits a question, has the parts answered in parallel and joins the answers."""
    plan = await _plan(context, topic)
    ids = [
        await context.spawn(topic.agent, _asked(topic, question), key=f"part-{number}")
        for number, question in enumerate(plan.questions)
    ]
    await context.progress({"stage": "waiting", "parts": len(ids)})
    tasks = await context.join(ids)
    parts = [_part(question, task) for question, task in zip(plan.questions, tasks, strict=True)]
    answered = [part for part in parts if part.answer]
    if not answered:
        raise NotAnswered(f"All {len(parts)} parts of the question failed; the first because: {parts[0].error}")
    await context.progress({"stage": "synthesis", "parts": len(parts), "answered": len(answered)})
    return Report(await _synthesis(context, topic, answered), parts)


async def _plan(context: AgentContext, topic: Topic) -> _Plan:
    kept = context.last_checkpoint
    if kept is not None:
        return msgspec.convert(kept, _Plan)
    asked = [system(PLAN.format(most=topic.parts)), user(topic.question)]
    plan = await ask_for(context, asked, _Plan, model=topic.model)
    plan = _Plan(list(dict.fromkeys(plan.questions))[: topic.parts])
    await context.checkpoint(msgspec.to_builtins(plan))
    return plan


def _asked(topic: Topic, question: str) -> dict[str, Any]:
    return {"messages": [system(PART), user(question)], "model": topic.model}


def _part(question: str, task: Task) -> Part:
    if task.status is not TaskStatus.COMPLETED:
        return Part(question, "", task.id, task.error or f"The task was {task.status.value}.")
    try:
        return Part(question, str(msgspec.json.decode(task.result)["text"]), task.id)
    except (msgspec.DecodeError, KeyError, TypeError):
        return Part(question, "", task.id, "The result held no text.")


async def _synthesis(context: AgentContext, topic: Topic, parts: Sequence[Part]) -> str:
    answers = "\n\n".join(f"## {part.question}\n{part.answer}" for part in parts)
    asked = [system(SYNTHESIS), user(f"Question: {topic.question}\n\n{answers}")]
    return (await context.chat(asked, model=topic.model)).text.strip()
