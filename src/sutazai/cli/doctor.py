"""`sutazai doctor`: looks at all that the gateway needs, and says how to mend what is wrong."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import cyclopts
import uvloop
from rich.text import Text

from sutazai.cli import checks, checks_broker, checks_pool
from sutazai.cli.checks import Finding, Level
from sutazai.cli.client import Url, gateway_url, guarded, listening_url
from sutazai.cli.printing import console, fitting, print_json
from sutazai.core.errors import SettingsError
from sutazai.settings.load import data_dir, find, load
from sutazai.settings.model import Settings
from sutazai.telemetry.logs import configure

app = cyclopts.App(name="doctor")

STYLES = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "bold red"}
LEVEL_CHARACTERS = 6


@app.default
def doctor(*, json: Annotated[bool, cyclopts.Parameter(negative="")] = False, url: Url = None) -> int:
    """
    Look at the settings, the database, RabbitMQ, the engine, the nodes and the machine.

    Exits with 1 where something has to be mended first. Examples: `sutazai doctor`, `sutazai doctor --json`

    Parameters
    ----------
    json
        Print JSON.
    """

    def work() -> int:
        configure(form="text", level="error")
        findings = examine(url)
        if json:
            print_json([_plain(finding) for finding in findings])
        else:
            _print(findings)
        return int(any(finding.level is Level.FAIL for finding in findings))

    return guarded(work)


def examine(url: str | None) -> list[Finding]:
    """All findings, in the order in which one would mend them; `url` names a gateway elsewhere."""
    here = [
        checks.python(sys.version_info[:2]),
        checks.machine(len(os.sched_getaffinity(0)), checks.available_bytes()),
        checks.files(resource.getrlimit(resource.RLIMIT_NOFILE)),
    ]
    try:
        path = find(os.environ, Path.cwd())
        settings = load(path, os.environ)
        folder = data_dir(settings, os.environ, os.geteuid() == 0)
    except SettingsError as error:
        remedy = "Correct that first; all else depends on it. `sutazai config reference` lists what there is."
        return [*here, *(Finding("settings", Level.FAIL, mistake, remedy) for mistake in error.mistakes)]
    here.append(Finding("settings", Level.OK, f"{path or 'No file; defaults and environment'} without mistakes"))
    if settings.database.url is None:
        here += [checks.data_dir(folder), checks.embedded_postgres(folder)]
    here.append(checks.engine(settings.engine))
    if (tuning := checks.tuning(settings.engine, folder)) is not None:
        here.append(tuning)
    return here + uvloop.run(_on_the_network(settings, folder, url))


async def _on_the_network(settings: Settings, folder: Path, url: str | None) -> list[Finding]:
    """Each check has a time limit of its own."""
    found = list(await checks_pool.databases(settings))
    if all(finding.level is not Level.FAIL for finding in found):
        found.append(await checks_pool.keys(settings, folder))
    found += await checks_broker.broker(settings.rabbitmq)
    found.append(await _gateway(settings, url))
    return found + await checks_pool.nodes(settings, os.environ)


async def _gateway(settings: Settings, url: str | None) -> Finding:
    server = settings.server
    named = url or os.environ.get("SUTAZAI_URL")
    if not named and server.port == 0:
        return Finding("gateway", Level.OK, "It takes any free port (`server.port` is 0).")
    there = gateway_url(named, os.environ, Path.cwd()) if named else listening_url(server)
    if (finding := await checks_pool.gateway(there)) is not None:
        return finding
    if named:
        return Finding(
            "gateway", Level.FAIL, f"No gateway answered at {there}.", "Start it there, or correct the address."
        )
    return checks_pool.address(server.host, server.port)


def _plain(finding: Finding) -> dict[str, str]:
    return {
        "check": finding.check,
        "level": finding.level.value.lower(),
        "message": finding.message,
        "remedy": finding.remedy,
    }


def _print(findings: Sequence[Finding]) -> None:
    """`level  check  message` for each, and its remedy on a line of its own below the message."""
    paper = console()
    width = max(len(finding.check) for finding in findings) + 2
    for finding in findings:
        level = finding.level.value.ljust(LEVEL_CHARACTERS)
        head = Text.assemble((level, STYLES[finding.level]), finding.check.ljust(width))
        paper.print(head + Text(fitting(finding.message, sys.stdout)), soft_wrap=True)
        if finding.remedy:
            indent = " " * (LEVEL_CHARACTERS + width)
            paper.print(Text(indent + fitting(finding.remedy, sys.stdout)), soft_wrap=True)
