"""The watch takes up what may change, tells what may not, and lets no bad file harm a running process."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import pytest

from sutazai.settings.load import load
from sutazai.settings.model import Queue, Server, Settings
from sutazai.settings.watch import LIVE, LOOK_EVERY_S, SettingsWatch

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from sutazai.core.errors import SettingsError


class Process:
    """What a watch calls back, written down."""

    def __init__(self, path: Path | None, settings: Settings | None = None) -> None:
        self.path = path
        self.applied: list[tuple[Settings, tuple[str, ...]]] = []
        self.needs_restart: list[list[str]] = []
        self.refused: list[SettingsError] = []
        self.settings = settings or load(path, {})

    @property
    def told(self) -> int:
        return len(self.applied) + len(self.needs_restart) + len(self.refused)

    def apply(self, settings: Settings, changed: tuple[str, ...]) -> None:
        self.applied.append((settings, changed))

    def watch(
        self,
        *,
        applied: Callable[[Settings, tuple[str, ...]], None] | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> SettingsWatch:
        return SettingsWatch(
            path=self.path,
            environ={},
            settings=self.settings,
            applied=applied or self.apply,
            needs_restart=self.needs_restart.append,
            refused=self.refused.append,
            sleep=sleep,
        )


def write(path: Path, text: str) -> None:
    """Into the file that is there."""
    path.write_text(text)


def delete(path: Path) -> None:
    path.unlink()


def replace(path: Path, text: str) -> None:
    """As editors do: a new file in the place of the old."""
    new = path.with_suffix(".new")
    new.write_text(text)
    os.replace(new, path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "sutazai.toml"
    path.write_text("[queue]\nmax_waiting = 1\n")
    return path


async def look(watch: SettingsWatch, times: int = 2) -> None:
    """A change is taken up at the second look, when the file stood still."""
    for _ in range(times):
        await watch.look()


async def test_a_file_that_did_not_change_is_not_told(path: Path) -> None:
    process = Process(path)
    watch = process.watch()

    await look(watch, times=5)

    assert process.told == 0


@pytest.mark.parametrize("in_place", [True, False])
async def test_a_changed_group_is_applied_once(path: Path, in_place: bool) -> None:
    process = Process(path)
    watch = process.watch()
    await look(watch)

    if in_place:
        write(path, "[queue]\nmax_waiting = 22\n")
    else:
        replace(path, "[queue]\nmax_waiting = 2\n")
    await look(watch, times=4)

    ((settings, changed),) = process.applied
    assert settings.queue.max_waiting in {2, 22}
    assert changed == ("queue",)
    assert watch.settings is settings


async def test_a_change_between_loading_and_the_first_look_is_not_missed(path: Path) -> None:
    process = Process(path)
    watch = process.watch()

    replace(path, "[queue]\nmax_waiting = 2\n")
    await look(watch)

    assert [changed for _, changed in process.applied] == [("queue",)]


async def test_a_file_is_not_read_while_it_is_being_written(path: Path) -> None:
    """Half of a file can be right TOML, with half of the nodes."""
    process = Process(path)
    watch = process.watch()
    await look(watch)

    text = "[queue]\nmax_waiting = 2\n[routing]\nhead_start = 3\n"
    for end in range(0, len(text), 7):
        write(path, text[:end])
        await watch.look()
    write(path, text)
    await look(watch)

    assert process.refused == []
    assert [changed for _, changed in process.applied] == [("routing", "queue")]


async def test_broken_toml_is_refused_once_and_the_repaired_file_is_applied(path: Path) -> None:
    process = Process(path)
    watch = process.watch()
    await look(watch)

    replace(path, "[queue\nmax_waiting = 2\n")
    await look(watch, times=4)

    assert "was not TOML" in str(*process.refused)
    assert watch.settings.queue == Queue(max_waiting=1)

    replace(path, "[queue]\nmax_waiting = 2\n")
    await look(watch)

    assert len(process.refused) == 1
    assert watch.settings.queue == Queue(max_waiting=2)


async def test_one_mistake_keeps_everything_as_it_was(path: Path) -> None:
    process = Process(path)
    watch = process.watch()

    replace(path, "[queue]\nmax_waiting = 2\n[retry]\nattempts = 0\n")
    await look(watch)

    assert process.applied == []
    assert "retry.attempts" in str(*process.refused)


async def test_a_deleted_file_is_told_once_and_applies_again_when_it_is_back(path: Path) -> None:
    process = Process(path)
    watch = process.watch()
    await look(watch)

    delete(path)
    await look(watch, times=5)

    assert "was not there any more; the old settings stay" in str(*process.refused)
    assert watch.settings.queue == Queue(max_waiting=1)

    write(path, "[queue]\nmax_waiting = 2\n")
    await look(watch)

    assert [changed for _, changed in process.applied] == [("queue",)]


async def test_a_file_that_is_replaced_at_once_is_never_missing(path: Path) -> None:
    process = Process(path)
    watch = process.watch()
    await look(watch)

    delete(path)
    await watch.look()
    write(path, "[queue]\nmax_waiting = 2\n")
    await look(watch)

    assert process.refused == []
    assert watch.settings.queue == Queue(max_waiting=2)


async def test_groups_that_need_a_restart_are_named_and_not_applied(path: Path) -> None:
    process = Process(path)
    watch = process.watch()

    replace(path, "[server]\nport = 1\n[logs]\naccess = false\n[queue]\nmax_waiting = 2\n")
    await look(watch)

    assert process.needs_restart == [["server", "logs"]]
    ((settings, changed),) = process.applied
    assert (settings.server, settings.queue, changed) == (Server(), Queue(max_waiting=2), ("queue",))


async def test_only_a_restart_is_told_where_nothing_can_be_applied(path: Path) -> None:
    process = Process(path)
    watch = process.watch()

    replace(path, "[server]\nport = 1\n[queue]\nmax_waiting = 1\n")
    await look(watch)

    assert (process.applied, process.needs_restart) == ([], [["server"]])


@pytest.mark.parametrize("name", sorted(Settings.__struct_fields__))
async def test_each_group_is_either_applied_or_needs_a_restart(tmp_path: Path, name: str) -> None:
    path = tmp_path / "sutazai.toml"
    write(path, "")
    process = Process(path)
    watch = process.watch()
    changes = {
        "server": "[server]\nport = 1",
        "auth": "[auth]\nrequired = true",
        "database": "[database]\ntimeout_s = 1",
        "nodes": "[[nodes]]\nurl = 'http://a'",
        "discovery": "[discovery]\nollama = false",
        "models": "[models.a]",
        "routing": "[routing]\nhead_start = 2",
        "queue": "[queue]\nmax_waiting = 2",
        "auto": "[auto]\nname = 'any'",
        "batching": "[batching]\nmax_requests = 2",
        "hedging": "[hedging]\nembeddings = true",
        "cache": "[cache]\nenabled = false",
        "shards": "[[shards]]\nname = 'a'",
        "redis": "[redis]\nprefix = 'a'",
        "rabbitmq": "[rabbitmq]\nprefix = 'a'",
        "objects": "[objects]\nregion = 'a'",
        "limits": "[limits]\nrequests_per_minute = 2",
        "sessions": "[sessions]\nmax_messages = 2",
        "web": "[web]\ntimeout_s = 2",
        "agents": "[agents]\nhttp_get = false",
        "breaker": "[breaker]\nopen_s = 2",
        "health": "[health]\nfailures = 2",
        "retry": "[retry]\nattempts = 2",
        "timeouts": "[timeouts]\nidle_s = 2",
        "engine": "[engine]\nslots = 2",
        "tasks": "[tasks]\nslots = 7",
        "webhooks": "[webhooks]\nsecret = '0123456789abcdef'",
        "logs": "[logs]\naccess = false",
    }

    replace(path, changes[name])
    await look(watch)

    assert [changed for _, changed in process.applied] == ([(name,)] if name in LIVE else [])
    assert process.needs_restart == ([] if name in LIVE else [[name]])


async def test_a_poke_loads_at_the_next_look_without_waiting(path: Path) -> None:
    process = Process(path)
    watch = process.watch()
    await look(watch)

    replace(path, "[queue]\nmax_waiting = 2\n")
    watch.poke()
    await watch.look()

    assert [changed for _, changed in process.applied] == [("queue",)]


async def test_a_poke_loads_once(path: Path) -> None:
    write(path, "broken")
    process = Process(path, Settings())
    watch = process.watch()

    watch.poke()
    await look(watch, times=4)

    assert len(process.refused) == 1


async def test_a_poke_without_a_change_tells_nothing(path: Path) -> None:
    process = Process(path)
    watch = process.watch()

    watch.poke()
    await look(watch)

    assert process.told == 0


async def test_without_a_file_only_a_poke_loads() -> None:
    process = Process(None, Settings(queue=Queue(max_waiting=7)))
    watch = process.watch()

    await look(watch, times=4)

    assert process.told == 0

    watch.poke()
    await watch.look()

    assert [changed for _, changed in process.applied] == [("queue",)]


async def test_settings_that_could_not_be_applied_are_refused_and_can_be_tried_again(path: Path) -> None:
    process = Process(path)
    failures = [RuntimeError("the fleet said no")]

    def fail_once(settings: Settings, changed: tuple[str, ...]) -> None:
        if failures:
            raise failures.pop()
        process.apply(settings, changed)

    watch = process.watch(applied=fail_once)
    replace(path, "[queue]\nmax_waiting = 2\n")
    await look(watch)

    (refusal,) = process.refused
    assert "could not be applied (RuntimeError)" in str(refusal)
    assert isinstance(refusal.__cause__, RuntimeError)
    assert watch.settings.queue == Queue(max_waiting=1)

    watch.poke()
    await watch.look()

    assert watch.settings.queue == Queue(max_waiting=2)


async def test_the_loop_looks_each_second_until_it_is_cancelled(path: Path) -> None:
    process = Process(path)
    slept_s: list[float] = []
    enough = asyncio.Event()

    async def sleep(duration_s: float) -> None:
        slept_s.append(duration_s)
        if process.applied:
            enough.set()
        await asyncio.sleep(0)

    watch = process.watch(sleep=sleep)
    task = asyncio.create_task(watch.run(), name="watch the settings")
    replace(path, "[queue]\nmax_waiting = 2\n")
    async with asyncio.timeout(10):
        await enough.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert set(slept_s) == {LOOK_EVERY_S}
    assert [changed for _, changed in process.applied] == [("queue",)]
