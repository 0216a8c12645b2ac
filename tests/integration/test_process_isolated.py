"""Agents in a process of their own."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest

from sutazai.adapters.process.isolated import isolated
from sutazai.core.errors import AgentCrashed, SutazaiError
from sutazai.core.task import Submitted, Task, TaskDraft, after, task_id
from sutazai.ports.agent import EMBEDDING, Agent, AgentContext, Answer, Said


async def _adds(context: AgentContext, numbers: list[int]) -> dict[str, Any]:
    await context.progress({"seen": len(numbers)})
    said = await context.chat([{"role": "user", "content": "plus"}])
    answer = await context.ask(EMBEDDING, {"input": ["a", "b"]})
    told = (answer.body.decode(), answer.input_tokens)
    return {"sum": sum(numbers), "said": said.text, "told": told, "pid": os.getpid()}


async def _dies(context: AgentContext, value: Any) -> None:
    os._exit(7)


async def _fails(context: AgentContext, value: Any) -> None:
    raise ValueError("not so")


async def _hangs(context: AgentContext, value: Any) -> None:
    await context.progress("began")
    while True:
        pass


def _made(name: str, run: Any) -> Agent:
    where = f"tests.integration.test_process_isolated:{name}"
    return Agent(name=name, run=run, input_type=Any, output_type=Any, describes="A test.", where=where)


adds = _made("adds", _adds)
dies = _made("dies", _dies)
fails = _made("fails", _fails)
hangs = _made("hangs", _hangs)


class Context:
    """What the parent offers."""

    def __init__(self) -> None:
        self.task: Task = after(
            None,
            Submitted(TaskDraft(tenant="t", agent="a")),
            id=task_id(1.0, 1),
            at=None,  # type: ignore[arg-type]
        )
        self.fence = 1
        self.told: list[object] = []
        self.was_told = asyncio.Event()

    async def progress(self, value: object) -> None:
        self.told.append(value)
        self.was_told.set()

    async def chat(self, messages: Any, **_: Any) -> Said:
        return Said(text=messages[0]["content"])

    async def ask(self, endpoint: str, body: Any) -> Answer:
        return Answer(body=f'{{"of":"{endpoint}"}}'.encode(), input_tokens=len(body["input"]))


async def test_an_isolated_agent_uses_its_context_and_gives_its_output() -> None:
    context = Context()

    output = await isolated(adds).run(context, [1, 2, 3])  # type: ignore[arg-type]

    assert (output["sum"], output["said"], context.told) == (6, "plus", [{"seen": 3}])
    assert output["told"] == ['{"of":"/v1/embeddings"}', 2]
    assert output["pid"] != os.getpid()


async def test_an_isolated_agent_that_crashes_is_an_error_of_its_attempt() -> None:
    with pytest.raises(AgentCrashed, match="ended with 7"):
        await isolated(dies).run(Context(), None)  # type: ignore[arg-type]


async def test_an_isolated_agent_that_fails_says_why() -> None:
    with pytest.raises(SutazaiError, match="ValueError: not so"):
        await isolated(fails).run(Context(), None)  # type: ignore[arg-type]


async def test_an_isolated_agent_in_an_endless_loop_is_killed_when_it_is_called_off() -> None:
    context = Context()
    run = asyncio.ensure_future(isolated(hangs).run(context, None))  # type: ignore[arg-type]
    await context.was_told.wait()

    run.cancel()
    await asyncio.wait([run])

    assert run.cancelled()
