"""An engine that is kept alive: started, restarted, recycled and stopped."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import sys
import urllib.request
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sutazai.adapters.llamacpp.process import launch
from sutazai.adapters.llamacpp.spec import TRIAL_MODEL, EngineSpec
from sutazai.adapters.llamacpp.supervisor import ENGINE, EngineSupervisor, is_bloated
from sutazai.core.errors import EngineFault
from sutazai.core.node import Node, NodeKind
from sutazai.settings.secret import Secret
from sutazai.testing.tiny_gguf import write_random

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

real = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None and "CI" not in os.environ,
    reason="the wheel xllamacpp is not installed",
)

LIMIT_S = 20.0
TRIAL = EngineSpec(
    model_path=TRIAL_MODEL,
    name="sutazai-trial",
    slots=2,
    context_tokens=1024,
    threads=1,
    max_rss_bytes=1 << 40,
)
READY = """
import json, os, signal, sys, time
order = json.loads(sys.stdin.readline())
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
print(json.dumps({"url": "http://127.0.0.1:9", "model": order["name"], "pid": os.getpid()}), flush=True)
"""


def _program(code: str) -> Sequence[str]:
    """A stand-in for the engine's program."""
    return sys.executable, "-c", code


def _children() -> set[int]:
    """The processes that this one started and that are not reaped; the kernel's own list of them may miss some."""
    return {int(folder.name) for folder in Path("/proc").glob("[0-9]*") if _parent_of(folder) == os.getpid()}


def _parent_of(folder: Path) -> int:
    try:
        return int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):  # it ended between the listing and now
        return 0


def _shown_by_the_system(pid: int) -> bytes:
    return b"".join((Path("/proc") / str(pid) / name).read_bytes() for name in ("cmdline", "environ"))


class Watched:
    """A supervisor, what it told, and an event for each thing it may tell."""

    def __init__(self, spec: EngineSpec = TRIAL, command: Sequence[str] = ENGINE, **limits: float) -> None:
        self.told: list[str] = []
        self.nodes: list[Node] = []
        self.keys: list[Secret] = []
        self.is_idle = True
        self.asked_for_idleness = asyncio.Event()
        self.supervisor = EngineSupervisor(
            spec,
            started=self._started,
            stopped=self._stopped,
            is_idle=self._is_idle,
            command=command,
            **limits,
        )
        self.changed = asyncio.Event()

    def _started(self, node: Node, api_key: Secret) -> None:
        self.told.append("started")
        self.nodes.append(node)
        self.keys.append(api_key)
        self.changed.set()

    def _stopped(self, node: str, why: str) -> None:
        self.told.append(f"{node} stopped: {why}")
        self.changed.set()

    def _is_idle(self) -> bool:
        self.asked_for_idleness.set()
        return self.is_idle

    async def told_times(self, times: int) -> None:
        """Return when that many things were told."""
        while len(self.told) < times:
            self.changed.clear()
            await self.changed.wait()


@asynccontextmanager
async def _running(watched: Watched) -> AsyncIterator[tuple[Node, Secret, int]]:
    """A started and watched engine with its process id; stopped at the end."""
    before = _children()
    node, api_key = await watched.supervisor.start()
    pid = next(iter(_children() - before), 0)  # 0 for a program that ended as soon as it was ready
    async with asyncio.TaskGroup() as group:
        group.create_task(watched.supervisor.run(), name="watch the engine")
        try:
            yield node, api_key, pid
        finally:
            await watched.supervisor.stop()


def _models(node: Node, api_key: Secret) -> Any:
    headers = {"Authorization": f"Bearer {api_key.reveal()}"}
    request = urllib.request.Request(f"{node.url}/v1/models", headers=headers)  # noqa: S310  our own server
    with urllib.request.urlopen(request, timeout=LIMIT_S) as reply:  # noqa: S310
        return [model["id"] for model in json.loads(reply.read())["data"]]


@real
async def test_a_started_engine_is_a_node_with_its_model_and_slots() -> None:
    async with _running(Watched()) as (node, api_key, _):
        models = await asyncio.to_thread(_models, node, api_key)

    assert models == ["sutazai-trial"]
    assert (node.name, node.kind, node.slots) == ("sutazai-trial", NodeKind.LLAMACPP, 2)
    assert node.source == "embedded"


@real
async def test_two_engines_run_side_by_side_with_keys_of_their_own() -> None:
    other = replace(TRIAL, name="other")

    async with _running(Watched()) as (one, one_key, _), _running(Watched(other)) as (two, two_key, _):
        models = [await asyncio.to_thread(_models, *pair) for pair in ((one, one_key), (two, two_key))]

    assert models == [["sutazai-trial"], ["other"]]
    assert one.url != two.url
    assert one_key != two_key


@real
async def test_a_killed_engine_is_back_with_its_name_and_key() -> None:
    watched = Watched()

    async with _running(watched) as (node, api_key, pid):
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(10):
            await watched.told_times(2)
        models = await asyncio.to_thread(_models, watched.nodes[0], api_key)

    assert models == ["sutazai-trial"]
    assert "killed, most likely because memory ran out" in watched.told[0]
    assert watched.told[1:] == ["started"]
    assert watched.nodes[0].name == node.name
    assert watched.keys == [api_key]


@real
async def test_stopping_leaves_no_process_and_tells_nothing() -> None:
    before = _children()
    watched = Watched()

    async with _running(watched):
        pass

    assert _children() == before
    assert watched.told == []


@real
async def test_a_cancelled_watch_leaves_no_process() -> None:
    before = _children()
    watched = Watched()
    await watched.supervisor.start()
    run = asyncio.create_task(watched.supervisor.run())
    await asyncio.sleep(0)
    run.cancel()

    with pytest.raises(asyncio.CancelledError):
        await run
    assert _children() == before


@real
async def test_a_broken_model_is_named_with_the_reason(tmp_path: Path) -> None:
    before = _children()
    whole = tmp_path / "whole.gguf"
    write_random(whole, layers=1, embd=64, heads=2, kv_heads=1, ffn=96)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(whole.read_bytes()[:-20_000])

    with pytest.raises(EngineFault, match=r"refused the model .*broken\.gguf.*not within the file bounds"):
        await Watched(replace(TRIAL, model_path=broken)).supervisor.start()
    assert _children() == before


async def test_a_model_that_is_gone_is_named() -> None:
    missing = replace(TRIAL, model_path=Path("/nowhere/gone.gguf"))

    with pytest.raises(EngineFault, match=r"gone\.gguf could not be read"):
        await Watched(missing).supervisor.start()


async def test_a_wheel_that_is_missing_is_told_with_the_remedy() -> None:
    command = _program("import sys; sys.stderr.write('No module named xllamacpp'); sys.exit(3)")

    with pytest.raises(EngineFault, match=r"pip install 'sutazai\[embedded\]'.*No module named xllamacpp"):
        await Watched(command=command).supervisor.start()


async def test_a_program_that_cannot_be_run_is_told() -> None:
    with pytest.raises(EngineFault, match="could not be run as /nowhere/python"):
        await Watched(command=("/nowhere/python",)).supervisor.start()


async def test_an_engine_that_is_never_ready_is_given_up_and_killed() -> None:
    before = _children()
    command = _program("import signal; signal.signal(15, signal.SIG_IGN); signal.pause()")

    with pytest.raises(EngineFault, match=r"not ready with .*sutazai-trial\.gguf within 0 s"):
        await Watched(command=command, start_s=0.3).supervisor.start()
    assert _children() == before


async def test_a_cancelled_start_leaves_no_process() -> None:
    before = _children()
    start = asyncio.create_task(Watched(command=_program("import signal; signal.pause()")).supervisor.start())
    while _children() == before:
        await asyncio.sleep(0)
    start.cancel()

    with pytest.raises(asyncio.CancelledError):
        await start
    assert _children() == before


async def test_only_the_end_of_a_flood_on_standard_error_is_kept() -> None:
    code = "import sys; [sys.stderr.write(f'line {n}\\n') for n in range(200_000)]; sys.exit(9)"
    process = await launch(_program(code))
    await process.ended.wait()

    assert process.last_words() == "line 199997; line 199998; line 199999"


async def test_restarts_that_fail_are_tried_again_after_longer_and_longer(tmp_path: Path) -> None:
    """It lives once, then fails: the pauses between the tries double."""
    watched = Watched(command=_program(f"open({str(tmp_path / 'ran')!r}, 'x')\n{READY}"))
    loop = asyncio.get_running_loop()
    times = []

    async with _running(watched):
        for count in (1, 2, 3):
            await watched.told_times(count)
            times.append(loop.time())

    assert times[1] - times[0] >= 0.5
    assert times[2] - times[1] >= 1.0
    assert all("ended with status" in told for told in watched.told)


async def test_an_engine_past_its_memory_is_restarted_once_it_is_idle() -> None:
    code = f"{READY}\nsignal.sigwait([signal.SIGUSR1]); hog = bytearray(100 << 20); signal.pause()"
    watched = Watched(replace(TRIAL, max_rss_bytes=50 << 20), _program(code))
    watched.is_idle = False

    async with _running(watched) as (_, _, pid):
        os.kill(pid, signal.SIGUSR1)
        await watched.asked_for_idleness.wait()
        told_while_busy = list(watched.told)
        watched.is_idle = True
        await watched.told_times(2)

    assert told_while_busy == []
    assert "more than max_rss_bytes" in watched.told[0]
    assert watched.told[1] == "started"


@pytest.mark.parametrize(
    ("rss", "at_start", "limit", "expected"),
    [
        (100, 20, 100, False),
        (101, 20, 100, True),
        (101, 90, 100, False),
        (150, 100, 50, False),
        (151, 100, 50, True),
        (0, 0, 100, False),
    ],
)
def test_only_memory_over_the_limit_that_also_grew_is_worth_a_restart(
    rss: int, at_start: int, limit: int, expected: bool
) -> None:
    assert is_bloated(rss, at_start, limit) == expected


async def test_an_engine_deaf_to_sigterm_is_killed_after_its_time() -> None:
    before = _children()
    code = f"{READY}\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: signal.pause()"

    async with asyncio.timeout(5):
        async with _running(Watched(command=_program(code), drain_s=0.1)):
            pass

    assert _children() == before


async def test_stop_ends_the_wait_between_two_tries() -> None:
    watched = Watched(command=_program(READY))

    async with asyncio.timeout(5):
        async with _running(watched):
            await watched.told_times(1)

    assert watched.told[0].endswith("ended with status 0. ")


async def test_the_key_is_neither_on_the_command_line_nor_in_the_environment() -> None:
    async with _running(Watched(command=_program(f"{READY}\nsignal.pause()"))) as (_, api_key, pid):
        seen = _shown_by_the_system(pid)

    assert api_key.reveal().encode() not in seen
