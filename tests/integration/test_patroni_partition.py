"""The primary's host is cut off from all others: at no time do two servers acknowledge, and nothing is lost."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.patroni_servers import TTL_S, Host, Trio, cut_off, networked_trio
from tests.redis_servers import until

WRITER = Path(__file__).parents[1] / "row_writer.py"
LIMIT_S = 5.0
SLACK_S = 2.5
FIRST = {"everybody": 0, "cut off": 1_000_000}
ENOUGH = 20

pytestmark = [pytest.mark.alone, pytest.mark.deadline(200)]


@pytest.fixture
def trio() -> Iterator[Trio]:
    """Three hosts that can be cut off."""
    with networked_trio() as servers:
        yield servers


@dataclass(frozen=True, slots=True)
class Try:
    """One row."""

    number: int
    began: float
    ended: float
    server: str
    """Whose acknowledgement it had; `-` where it had none."""


@dataclass(slots=True)
class Client:
    """What a writer says."""

    log: Path
    tries: list[Try] = field(default_factory=list)

    def kept(self) -> Sequence[Try]:
        """Those that were acknowledged until now."""
        self.tries = []
        for line in self.log.read_text().splitlines(keepends=True):
            if line.startswith("row ") and line.endswith("\n"):
                _, number, began, ended, server = line.split()
                self.tries.append(Try(int(number), float(began), float(ended), server))
        return [one for one in self.tries if one.server != "-"]


@contextmanager
def writing(command: Sequence[str], log: Path, url: str, first: int) -> Iterator[Client]:
    """A writer that runs there as long as the context lasts."""
    with log.open("wb") as out:
        process = subprocess.Popen([*command, sys.executable, str(WRITER), url, str(first)], stdout=out, stderr=out)
    try:
        yield Client(log)
    finally:
        process.kill()
        process.wait()


def test_a_primary_that_is_cut_off_acknowledges_nothing_beside_the_next_one(trio: Trio, tmp_path: Path) -> None:
    before = trio.leader()
    asked(trio, before, "CREATE TABLE notes (number integer)")
    with ExitStack() as stack:
        url = trio.url.reveal()
        everybody = stack.enter_context(
            writing(trio.inside_client([]), tmp_path / "everybody", url, FIRST["everybody"])
        )
        cut = stack.enter_context(writing(before.inside([]), tmp_path / "cut", url, FIRST["cut off"]))
        goes_on(everybody)
        goes_on(cut)
        cut_off(before, is_cut=True)
        cut_at = time.monotonic()
        until(lambda: any(one.server != before.address for one in everybody.kept()), "another primary", within_s=60)
        goes_on(everybody)
        while time.monotonic() - cut_at < TTL_S + LIMIT_S:  # the old one must have had the time to notice
            time.sleep(0.1)
        cut_off(before, is_cut=False)
        healed_at = time.monotonic()
        trio.wait_until_well()
        goes_on(everybody)
        goes_on(cut)

    after = trio.leader()
    rows = [int(line) for line in asked(trio, after, "SELECT number FROM notes").split()]
    kept = [*everybody.kept(), *cut.kept()]
    lost = {one.number for one in kept} - set(rows)
    gap_s = max(
        later.ended - earlier.ended for earlier, later in zip(everybody.kept(), everybody.kept()[1:], strict=False)
    )
    print(  # noqa: T201
        f"\ncut off for {healed_at - cut_at:.1f} s: longest gap {gap_s:.2f} s, {len(lost)} of {len(kept)} acknowledged "
        "rows lost"
    )
    assert after is not before
    assert not lost
    assert len(rows) == len(set(rows))
    assert not overlapping(kept)
    assert not [one for one in cut.kept() if cut_at < one.began and one.ended < healed_at]
    assert max(one.ended - one.began for one in (*everybody.tries, *cut.tries)) < LIMIT_S + SLACK_S


def goes_on(client: Client) -> None:
    """Return when some more rows were acknowledged."""
    before = len(client.kept())
    until(lambda: len(client.kept()) >= before + ENOUGH, "a writer", within_s=60)


def overlapping(kept: Sequence[Try]) -> bool:
    """Whether a server acknowledged something between two acknowledgements of another one."""
    servers = [one.server for one in sorted(kept, key=lambda one: one.ended)]
    changes = [server for earlier, server in zip(["", *servers], servers, strict=False) if server != earlier]
    return len(changes) != len(set(changes))


def asked(trio: Trio, host: Host, statement: str) -> str:
    """What psql says, from where clients are."""
    url = f"postgresql://sutazai@{host.at('postgres')}/postgres"
    command = trio.inside_client(["psql", "-XAtqc", statement, url])
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout
