"""`sutazai tasks`, `dead-letters` and `schedules` as they are typed: processes of their own, over a real gateway."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import sutazai
from sutazai.adapters.postgres.stores import open_stores
from sutazai.core.task import Completed, Failed, FailureReason, Task, TaskStatus
from sutazai.ports.tasks import Change, Start, TaskFilter
from sutazai.settings.model import Database, Objects
from sutazai.testing.plain_agents import plain_agents

if TYPE_CHECKING:
    from tests.conftest import StartGateway

    from sutazai.adapters.postgres.stores import Stores

SOURCE = Path(sutazai.__file__).parents[1]
COMMAND_S = 20.0


@dataclass(frozen=True, slots=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str


class Shell:
    """Runs commands against one gateway."""

    def __init__(self, port: int) -> None:
        self._environ = {**os.environ, "PYTHONPATH": str(SOURCE), "SUTAZAI_URL": f"http://127.0.0.1:{port}"}

    async def start(self, *words: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "sutazai", *words),
            env=self._environ,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )

    async def run(self, *words: str, stdin: str = "") -> Done:
        process = await self.start(*words)
        async with asyncio.timeout(COMMAND_S):
            out, err = await process.communicate(stdin.encode())
        assert process.returncode is not None
        assert b"Traceback" not in err
        return Done(process.returncode, out.decode(), err.decode())


@pytest.fixture
async def stores(data_dir: Path) -> AsyncIterator[Stores]:
    async with open_stores(Database(), data_dir) as opened:
        yield opened


@pytest.fixture
async def shell(gateways: StartGateway) -> Shell:
    return Shell((await gateways(agents=plain_agents())).port)


async def begun(stores: Stores, task_id: str) -> Task:
    (task,) = await stores.tasks.begin([Start(task=task_id, may_take_over=False)], worker="w", delivery_limit=20)
    assert isinstance(task, Task)
    return task


async def failed(stores: Stores, task_id: str) -> None:
    await begun(stores, task_id)
    await stores.tasks.change([Change(task=task_id, event=Failed(1, FailureReason.ERROR, "It broke."))])


async def submitted(stores: Stores, key: str) -> str:
    """The id of the task with this idempotency key, once it is there."""
    async with asyncio.timeout(COMMAND_S):
        while True:
            for task in await stores.tasks.page("local", TaskFilter(), limit=20):
                if task.draft.idempotency_key == key:
                    return task.id
            await asyncio.sleep(0.05)


async def test_a_task_is_submitted_shown_listed_and_cancelled(shell: Shell) -> None:
    made = await shell.run("tasks", "submit", "echo", '{"text": "hi"}', "--priority", "low")
    task = made.out.strip()
    shown = json.loads((await shell.run("tasks", "show", task, "--json")).out)
    plain = await shell.run("tasks", "show", task)
    listed = await shell.run("tasks", "list", "--status", "pending", "--limit", "1")
    cancelled = await shell.run("tasks", "cancel", task)

    assert (made.code, shown["input"], shown["priority"]) == (0, {"text": "hi"}, "low")
    assert f"id               {task}\n" in plain.out
    assert listed.out.splitlines()[1].split()[:4] == [task, "echo", "pending", "0"]
    assert cancelled == Done(0, f"{task} is cancelled.\n", "")


async def test_the_input_can_come_from_standard_input(shell: Shell) -> None:
    made = await shell.run("tasks", "submit", "anything", "-", "--json", stdin="[1, 2]")

    assert json.loads(made.out)["input"] == [1, 2]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("submit", "ecko"), "Did you mean echo?"),
        (("submit", "echo", "{hi}"), "The input was no JSON"),
        (("submit", "echo", '{"text": 3}'), "input.text must be a string"),
        (("show", "../agents"), "Nothing is at"),
        (("cancel",), "Give the id of a task"),
        (("retry", "task_1"), "No task is"),
        (("tail", "task_1"), "No task is"),
        (("list", "--limit", "0"), "The limit was 0"),
    ],
    ids=lambda one: " ".join(one) if isinstance(one, tuple) else "",
)
async def test_mistakes_are_told_in_a_sentence(shell: Shell, words: tuple[str, ...], sentence: str) -> None:
    done = await shell.run("tasks", *words)

    assert (done.code, done.out) == (1, "")
    assert sentence in done.err


async def test_tail_and_wait_follow_a_task_to_its_end(shell: Shell, stores: Stores) -> None:
    task = (await shell.run("tasks", "submit", "echo")).out.strip()
    tail = await shell.start("tasks", "tail", task, "--json")
    waits = await shell.start("tasks", "submit", "anything", "7", "--wait", "--idempotency-key", f"wait {task}")
    assert tail.stdout is not None
    first = json.loads(await tail.stdout.readline())
    await begun(stores, task)
    await stores.tasks.change([Change(task=task, event=Completed(1, '{"text": "hi"}'))])
    rest = [json.loads(line) for line in (await tail.communicate())[0].splitlines()]
    waited = await submitted(stores, f"wait {task}")
    await begun(stores, waited)
    await stores.tasks.change([Change(task=waited, event=Completed(1, "[8]"))])
    out, _ = await waits.communicate()

    assert first["kind"] == "task.submitted"
    assert [event["kind"] for event in rest] == ["task.started", "task.completed"]
    assert tail.returncode == 0
    assert (waits.returncode, json.loads(out)) == (0, [8])


async def test_a_result_from_the_object_store_is_shown_and_waited_for(gateways: StartGateway, tmp_path: Path) -> None:
    gateway = await gateways(agents=plain_agents(), with_worker=True, objects=Objects(url=str(tmp_path)))
    shell = Shell(gateway.port)
    large = json.dumps("x" * 400_000)

    waited = await shell.run("tasks", "submit", "anything", "-", "--wait", "--json", stdin=large)
    task = json.loads(waited.out)
    shown = json.loads((await shell.run("tasks", "show", task["id"], "--json")).out)
    plain = await shell.run("tasks", "show", task["id"])

    assert (waited.code, task["result"], shown["result"]) == (0, json.loads(large), json.loads(large))
    assert shown["result_object"].startswith("t-local/results/")
    assert json.loads(large) in plain.out


async def test_tail_of_a_task_that_failed_says_so_by_its_exit_code(shell: Shell, stores: Stores) -> None:
    task = (await shell.run("tasks", "submit", "echo")).out.strip()
    await failed(stores, task)
    done = await shell.run("tasks", "tail", task)

    assert done.code == 1
    assert [line.split("   ")[1] for line in done.out.splitlines()] == ["task.submitted", "task.started", "task.failed"]
    assert "It broke." in done.out


async def test_dead_letters_are_listed_and_tried_again(shell: Shell, stores: Stores) -> None:
    tasks = [(await shell.run("tasks", "submit", "anything", "1")).out.strip() for _ in range(3)]
    for task in tasks:
        await failed(stores, task)
    listed = await shell.run("dead-letters", "list", "--agent", "anything", "--limit", "3")
    one = await shell.run("dead-letters", "requeue", tasks[0])
    rest = await shell.run("dead-letters", "requeue", "--all", "--agent", "anything")
    again = await shell.run("dead-letters", "requeue", tasks[0])
    nothing = await shell.run("dead-letters", "requeue")

    assert [line.split()[0] for line in listed.out.splitlines()[1:]] == tasks[::-1]
    assert "error: It broke." in listed.out
    assert one.out == "1 task is tried again.\n"
    assert rest.code == 0
    assert {task.status for task in await stores.tasks.several("local", tasks)} == {TaskStatus.PENDING}
    assert (again.code, again.err) == (1, f"{tasks[0]} is pending; only failed and cancelled tasks can be retried.\n")
    assert nothing.code == 1


async def test_schedules_are_added_listed_and_deleted(shell: Shell) -> None:
    added = await shell.run("schedules", "add", "0 0 1 1 *", "echo", '{"text": "hi"}', "--timezone", "Europe/Berlin")
    schedule = added.out.strip()
    listed = await shell.run("schedules", "list")
    deleted = await shell.run("schedules", "delete", schedule)
    again = await shell.run("schedules", "delete", schedule)
    wrong = await shell.run("schedules", "add", "never", "echo")

    assert "is due at" in added.err
    assert any(line.startswith(schedule) and "Europe/Berlin" in line for line in listed.out.splitlines())
    assert deleted == Done(0, f"{schedule} is deleted.\n", "")
    assert (again.code, wrong.code) == (1, 1)
    assert "five fields" in wrong.err
