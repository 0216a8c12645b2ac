"""The command line: one file a command, loaded when it is called."""

from __future__ import annotations

import sys

import cyclopts

from sutazai import __version__

UP = """Run everything on this machine.

Gateway, database, and a model if there is none. Example: `sutazai up`, then `curl http://127.0.0.1:10010/v1/models`
"""
GATEWAY = """Run the gateway alone, in front of your nodes.

As many as you like behind a load balancer. Example: `sutazai gateway --config /etc/sutazai/sutazai.toml`
"""

WORKER = """Do the tasks of agents, beside a gateway.

As many as you like. Example: `sutazai worker --agents summarize,research`
"""

app = cyclopts.App(
    name="sutazai",
    version=__version__,
    help="""Serve a pool of local models to OpenAI and Ollama clients.

Examples: `sutazai up`, `sutazai chat`, `sutazai nodes`, `sutazai models pull llama3.2`
""",
)
app.command("sutazai.cli.serve:up", name="up", help=UP)
app.command("sutazai.cli.serve:gateway", name="gateway", help=GATEWAY)
app.command("sutazai.cli.worker:worker", name="worker", help=WORKER)
app.command("sutazai.cli.nodes:app", name="nodes", help="Show the pool.\n\nExample: `sutazai nodes --watch`")
app.command(
    "sutazai.cli.models:app",
    name="models",
    help="List, pull and remove models on all nodes.\n\nExample: `sutazai models pull llama3.2`",
)
app.command(
    "sutazai.cli.chat:app",
    name="chat",
    help="Talk to a model in the terminal.\n\nExample: `sutazai chat`, `echo Why? | sutazai chat llama3.2`",
)
app.command(
    "sutazai.cli.tasks:app",
    name="tasks",
    help='Submit and watch the work of agents.\n\nExample: `sutazai tasks submit summarize \'{"text": "..."}\' --wait`',
)
app.command(
    "sutazai.cli.dead_letters:app",
    name="dead-letters",
    help="Show tasks that were given up, and try them again.\n\nExample: `sutazai dead-letters list`",
)
app.command(
    "sutazai.cli.queues:app",
    name="queues",
    help="Show the queues of tasks, and print them for a broker.\n\nExample: `sutazai queues list`",
)
app.command(
    "sutazai.cli.schedules:app",
    name="schedules",
    help="Submit tasks again and again.\n\nExample: `sutazai schedules list`",
)
app.command(
    "sutazai.cli.route:app",
    name="route",
    help="Say which model a question would go to, and why.\n\nExample: `sutazai route explain 'Who wrote Emma?'`",
)
app.command(
    "sutazai.cli.doctor:app",
    name="doctor",
    help="Say what is missing, and how to mend it.\n\nExample: `sutazai doctor --json`",
)
app.command(
    "sutazai.cli.keys:app",
    name="keys",
    help="Create, list and revoke API keys.\n\nExample: `sutazai keys create laptop`",
)
app.command(
    "sutazai.cli.tenants:app",
    name="tenants",
    help="Show and set what tenants may take.\n\nExample: `sutazai tenants set acme --weight 2`",
)
app.command(
    "sutazai.cli.audit:app",
    name="audit",
    help="Show and verify who changed what.\n\nExample: `sutazai audit list`",
)
app.command(
    "sutazai.cli.events:app",
    name="events",
    help="Follow, export, replay and verify the events of tasks.\n\nExample: `sutazai events verify`",
)
app.command(
    "sutazai.cli.cache:app",
    name="cache",
    help="Forget kept answers.\n\nExample: `sutazai cache forget --model llama3.2`",
)
app.command(
    "sutazai.cli.db:app",
    name="db",
    help="Bring the tables up to date, and find slow statements.\n\nExample: `sutazai db migrate --dry-run`",
)
app.command(
    "sutazai.cli.shards:app",
    name="shards",
    help="Spread tenants' data over databases.\n\nExample: `sutazai shards list`",
)
app.command(
    "sutazai.cli.config:app",
    name="config",
    help="Show and check the settings.\n\nExample: `sutazai config check sutazai.toml`",
)


def main() -> None:
    """Run the command that the arguments name."""
    sys.exit(app() or 0)
