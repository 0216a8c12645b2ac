"""`sutazai config`: what is in force, what is wrong, and what there is to set."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import cyclopts
import msgspec

from sutazai.core.errors import SettingsError
from sutazai.settings import load as settings
from sutazai.settings.reference import reference as reference_page

app = cyclopts.App(
    name="config",
    help="""Show and check the settings.

Example: `sutazai config check sutazai.toml`""",
)

_MISTAKES = 2
"""The exit code for settings that hold mistakes."""


@app.command
def show(*, json: bool = False) -> int:
    """
    Print all settings in force, defaults and environment included. Secrets are hidden.

    Examples: `sutazai config show`, `sutazai config show --json`

    Parameters
    ----------
    json
        Print JSON instead of TOML.
    """
    try:
        loaded = settings.load(settings.find(os.environ, Path.cwd()), os.environ)
    except SettingsError as error:
        return _complain(error)
    if json:
        text = msgspec.json.format(msgspec.json.encode(settings.plain(loaded))).decode() + "\n"
    else:
        text = settings.show(loaded)
    sys.stdout.write(text)
    return 0


@app.command
def check(path: Path | None = None, /) -> int:
    """
    Tell every mistake in the settings, or that they are fine.

    Exits with 0, or with 2 where there are mistakes.

    Examples: `sutazai config check`, `sutazai config check new.toml`

    Parameters
    ----------
    path
        The file to check. Left out, the one that `sutazai config path` names.
    """
    try:
        found = path or settings.find(os.environ, Path.cwd())
        settings.load(found, os.environ)
    except SettingsError as error:
        return _complain(error)
    sys.stdout.write(f"{found or 'The environment'} is fine.\n")
    return 0


@app.command
def reference() -> int:
    """
    Print the page with every setting, as Markdown.

    Example: `sutazai config reference | less`
    """
    sys.stdout.write(reference_page())
    return 0


@app.command
def path() -> int:
    """
    Print the path of the settings file in use.

    Exits with 1, and says so, where there is none. Example: `$EDITOR "$(sutazai config path)"`
    """
    try:
        found = settings.find(os.environ, Path.cwd())
    except SettingsError as error:
        return _complain(error)
    if found is None:
        sys.stderr.write("No settings file was found; the defaults and the environment are in force.\n")
        return 1
    sys.stdout.write(f"{found}\n")
    return 0


def _complain(error: SettingsError) -> int:
    sys.stderr.write("".join(f"{mistake}\n" for mistake in error.mistakes))
    return _MISTAKES
