"""`sutazai config` as it is typed: what is printed where, and the exit codes."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

from sutazai.cli.config import app
from sutazai.settings.load import parse
from sutazai.settings.model import Server
from sutazai.settings.reference import reference

if TYPE_CHECKING:
    from pathlib import Path


class Shell:
    """Runs the command in a folder of its own, with no settings around it."""

    def __init__(self, folder: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self._capture = capture

    def run(self, *words: str) -> tuple[int, str, str]:
        """Exit code, standard output and standard error."""
        with pytest.raises(SystemExit) as ended:
            app(words)
        output = self._capture.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, output.out, output.err


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in [name for name in os.environ if name.startswith("SUTAZAI_")]:
        monkeypatch.delenv(name)
    return Shell(tmp_path, capsys)


def test_show_prints_toml_that_can_be_read_back(shell: Shell) -> None:
    (shell.folder / "sutazai.toml").write_text("[server]\nport = 1\n")

    code, out, err = shell.run("show")

    assert (code, err) == (0, "")
    assert parse(out, {}).server == Server(port=1)


def test_show_hides_secrets_in_json_too(shell: Shell) -> None:
    (shell.folder / "sutazai.toml").write_text("[database]\nurl = 'postgresql://joe:hunter2@a/b'\n")

    code, out, _ = shell.run("show", "--json")

    assert code == 0
    assert json.loads(out)["database"]["url"] == "…"


@pytest.mark.parametrize("words", [("show",), ("show", "--json"), ("check",)])
def test_mistakes_go_to_standard_error_all_of_them(shell: Shell, words: tuple[str, ...]) -> None:
    (shell.folder / "sutazai.toml").write_text("[server]\nprot = 1\n[retry]\nattempts = 0\n")

    code, out, err = shell.run(*words)

    assert (code, out) == (2, "")
    assert err.splitlines() == [
        "sutazai.toml: server.prot (line 2) was not known; did you mean server.port?",
        "sutazai.toml: retry.attempts (line 4) was 0; give a number from 1 to 100.",
    ]


def test_check_says_that_the_file_is_fine(shell: Shell) -> None:
    path = shell.folder / "sutazai.toml"
    path.write_text("")

    assert shell.run("check") == (0, f"{path} is fine.\n", "")


def test_check_without_a_file_checks_the_environment(shell: Shell) -> None:
    assert shell.run("check") == (0, "The environment is fine.\n", "")


def test_check_takes_a_file_that_is_not_in_use(shell: Shell) -> None:
    (shell.folder / "sutazai.toml").write_text("")
    (shell.folder / "new.toml").write_text("x = 1")

    code, _, err = shell.run("check", "new.toml")

    assert (code, err) == (2, "new.toml: x (line 1) was not known; remove it.\n")


def test_check_of_a_file_that_is_not_there_says_so(shell: Shell) -> None:
    code, _, err = shell.run("check", "new.toml")

    assert code == 2
    assert "new.toml could not be read: No such file" in err


def test_path_prints_the_file_in_use(shell: Shell) -> None:
    path = shell.folder / "sutazai.toml"
    path.write_text("not even TOML")

    assert shell.run("path") == (0, f"{path}\n", "")


def test_path_without_a_file_exits_with_1(shell: Shell) -> None:
    code, out, err = shell.run("path")

    assert (code, out) == (1, "")
    assert "No settings file was found" in err


def test_reference_prints_the_page(shell: Shell) -> None:
    assert shell.run("reference") == (0, reference(), "")


def test_help_shows_examples(shell: Shell) -> None:
    code, out, _ = shell.run("check", "--help")

    assert code == 0
    assert "sutazai config check new.toml" in " ".join(out.split())
