"""`sutazai worker`: does the tasks of agents."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import sys
from pathlib import Path

import msgspec
import uvloop

from sutazai.bootstrap.rules import log_form
from sutazai.bootstrap.tasks import open_worker
from sutazai.cli.client import guarded, listening_url
from sutazai.cli.memory import settle_memory
from sutazai.cli.printing import complain
from sutazai.settings.load import data_dir, find, load
from sutazai.settings.model import Settings
from sutazai.tasks.worker import Worker
from sutazai.telemetry.logs import configure

LOOK_S = 1.0


def worker(*, agents: str = "", config: Path | None = None) -> int:
    """
    Do the tasks of agents, beside a gateway.

    Stops on SIGTERM: takes nothing new, lets attempts end, and after `tasks.drain_s` hands back what is left, so that
    another worker starts it again. Example: `sutazai worker --agents summarize,research`

    Parameters
    ----------
    agents
        Run only these, separated by commas. Left out: those of `tasks.agents`, or all that are installed. Give agents
        that only some workers run a queue of their own, or their tasks pass through workers that hand them on.
    config
        Settings file. Left out: $SUTAZAI_CONFIG, ./sutazai.toml, or the one of the user.
    """
    return guarded(lambda: _work(agents, config))


def _work(agents: str, config: Path | None) -> int:
    settings = load(config or find(os.environ, Path.cwd()), os.environ)
    if agents:
        named = tuple(name.strip() for name in agents.split(",") if name.strip())
        settings = msgspec.structs.replace(settings, tasks=msgspec.structs.replace(settings.tasks, agents=named))
    configure(form=log_form(settings), level=settings.logs.level)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        is_too_large = runner.run(_run(settings))
    if is_too_large:
        os.execv(sys.executable, [sys.executable, "-m", "sutazai", *sys.argv[1:]])  # noqa: S606 - this very program
    return 0


async def _run(settings: Settings) -> bool:
    """Work until SIGTERM or SIGINT, a second of which ends at once; whether it stopped because it grew too large."""
    folder = data_dir(settings, os.environ, is_root=os.geteuid() == 0)
    url = settings.tasks.gateway_url or listening_url(settings.server)
    async with open_worker(settings, data_dir=folder, gateway_url=url) as opened:
        settle_memory()
        stopping = asyncio.Event()

        def stop() -> None:
            if stopping.is_set():
                os._exit(130)
            stopping.set()
            opened.stop()

        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, stop)
        loop.add_signal_handler(signal.SIGINT, stop)
        complain(f"The worker takes tasks; its agents ask the gateway at {url}. Ctrl-C ends it.")
        is_too_large = False
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(_watch_size(opened, settings.tasks.max_rss_bytes), name="watch the size")
            await opened.run()
            is_too_large = watching.done()
            watching.cancel()
        return is_too_large and not stopping.is_set()


async def _watch_size(opened: Worker, max_rss_bytes: int) -> None:
    """Stop the worker, politely, when it has grown past the limit; with no limit wait for ever."""
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    while not max_rss_bytes or _rss_pages() * page_bytes <= max_rss_bytes:
        await asyncio.sleep(LOOK_S)
    opened.stop()


def _rss_pages() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1])
