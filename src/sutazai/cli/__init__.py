"""The command line: one file a command, loaded when it is called."""

from __future__ import annotations

import sys

import cyclopts

from sutazai import __version__

app = cyclopts.App(
    name="sutazai",
    version=__version__,
    help="""Serve a pool of local models to OpenAI and Ollama clients.

Examples: `sutazai up`, `sutazai chat`, `sutazai nodes`, `sutazai models pull llama3.2`
""",
)
app.command("sutazai.cli.serve:up", name="up")
app.command("sutazai.cli.serve:gateway", name="gateway")
app.command("sutazai.cli.nodes:app", name="nodes")
app.command("sutazai.cli.models:app", name="models")
app.command("sutazai.cli.chat:app", name="chat")
app.command("sutazai.cli.doctor:app", name="doctor")
app.command("sutazai.cli.keys:app", name="keys")
app.command("sutazai.cli.config:app", name="config")


def main() -> None:
    """Run the command that the arguments name."""
    sys.exit(app() or 0)
