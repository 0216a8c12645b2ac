"""
The README, done as written: each block in order, in a copy of the repository, with the outputs that it shows.

Only the virtual environment is not made anew. `make run` is left running, as in a terminal of its own, until the last
block is done. A block of `text` shows what the block above it prints; ids, keys and numbers may be others.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PORT = 10010
START_S = 60.0
STEP_S = 60.0
STOP_S = 40.0

FENCE = re.compile(r"^```(sh|python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LEFT_OUT = shutil.ignore_patterns(".[!c]*", "node_modules", "__pycache__", "results")

pytestmark = [pytest.mark.alone, pytest.mark.deadline(300)]


class Terminal:
    """A terminal in which `make run` goes on, and what it shows."""

    def __init__(self, command: str, folder: Path, environ: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            ["bash", "-c", command],
            cwd=folder,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._lines: list[str] = []
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, name="make run", daemon=True)
        self._reader.start()

    @property
    def shown(self) -> str:
        """What it has printed so far."""
        return "".join(self._lines)

    def wait_until_it_listens(self) -> None:
        """Return when the gateway greets, or fail with what was said instead."""
        self._ready.wait(START_S)
        assert "SutazAI listens on" in self.shown, self.shown

    def interrupt(self) -> bool:
        """Ctrl-C, to all that runs there as a terminal does; whether everything ended by itself."""
        os.killpg(self._process.pid, signal.SIGINT)
        self._reader.join(STOP_S)  # the output ends with the last of them
        self._process.wait(STOP_S)
        return not self._reader.is_alive()

    def kill(self) -> None:
        """End everything that it started and that is still there."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(STOP_S)
        self._reader.join(STOP_S)
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.append(line)
            if line.startswith("Models:"):
                self._ready.set()
        self._ready.set()


@pytest.fixture
def clone() -> Iterator[Path]:
    """A copy of the repository whose virtual environment is ours, and as new as `make` wants it."""
    with tempfile.TemporaryDirectory(prefix="readme-") as name:
        folder = Path(name, "sutazai")
        shutil.copytree(ROOT, folder, ignore=LEFT_OUT)
        made = folder / ".venv"
        made.mkdir()
        for part in Path(sys.prefix).iterdir():
            if not part.name.endswith(".stamp"):
                (made / part.name).symlink_to(part)
        (made / "run.stamp").touch()
        yield folder


@pytest.fixture
def environ(clone: Path) -> Iterator[Mapping[str, str]]:
    """The environment of a newcomer: no settings, no Ollama, a folder for data that nobody else has."""
    with tempfile.TemporaryDirectory(prefix="sutazai-") as data_dir:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SUTAZAI_", "PYTEST_"))}
        yield kept | {
            "PYTHONPATH": str(clone / "src"),
            "PYTHONUNBUFFERED": "1",
            "SUTAZAI_DATABASE_DATA_DIR": data_dir,
            "OLLAMA_HOST": f"127.0.0.1:{closed_port()}",
        }


def test_the_readme_works_as_written(clone: Path, environ: Mapping[str, str]) -> None:
    refuse_a_taken_port()
    terminal: Terminal | None = None
    shown = ""
    compared = 0
    try:
        for language, text in FENCE.findall((clone / "README.md").read_text("utf-8")):
            if language == "text":
                assert_shows(text, shown)
                compared += 1
            elif "make run" in text:
                terminal = Terminal(text, clone, environ)
                terminal.wait_until_it_listens()
                shown = terminal.shown
            else:
                shown = printed(language, text, clone, environ)
        assert terminal is not None, "the README does not start anything"
        has_ended = terminal.interrupt()
    finally:
        if terminal is not None:
            terminal.kill()

    assert compared >= 5
    assert has_ended, terminal.shown
    assert "Stopping" in terminal.shown
    assert "Traceback" not in terminal.shown


def printed(language: str, text: str, folder: Path, environ: Mapping[str, str]) -> str:
    """What a block prints, both outputs together; it must succeed."""
    program = [".venv/bin/python", "-"] if language == "python" else ["bash", "-euo", "pipefail"]
    done = subprocess.run(
        program,
        input=text,
        cwd=folder,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=STEP_S,
        check=False,
    )
    assert done.returncode == 0, f"{text}\n{done.stdout}"
    return done.stdout


def assert_shows(expected: str, shown: str) -> None:
    """Each line that the README shows was printed, in that order; others may stand between them."""
    lines = iter(map(general, shown.splitlines()))
    for line in filter(None, map(general, expected.splitlines())):
        assert line in lines, f"The README shows\n{expected}\nbut this was printed:\n{shown}"


def general(line: str) -> str:
    """A line without what differs from run to run: keys, numbers, widths of columns."""
    line = re.sub(r"sk-sutazai-\S+", "KEY", line)
    return " ".join(re.sub(r"\d+(?:\.\d+)?", "N", line).split())


def refuse_a_taken_port() -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", PORT))
        except OSError:
            pytest.fail(f"Port {PORT} is taken, and the README needs it. Stop what listens there: `ss -ltnp`.")


def closed_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_lines_that_were_not_printed_are_found() -> None:
    with pytest.raises(AssertionError, match="but this was printed"):
        assert_shows("a 1\nb 2\n", "b 2\na 1\n")


def test_numbers_and_keys_may_differ() -> None:
    assert_shows("node   0/4  0.00\nsk-sutazai-abc\n", "noise\nnode 1/8 1.25\nsk-sutazai-xyz\n")
