"""
Write the pages of `docs/reference/` that are made from the code (PYTHONPATH=src).

`settings.md` is not among them: `sutazai config reference` prints it. `tests/unit/test_docs.py` proves that the pages
in the tree are those made here.
"""

from __future__ import annotations

import asyncio
import inspect
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from sutazai.adapters.http.address import parse_address
from sutazai.adapters.http.client import HttpClient
from sutazai.adapters.http.connection import ConnectionPool
from sutazai.bootstrap import open_gateway
from sutazai.cli import app
from sutazai.core import errors
from sutazai.core.node import NodeKind
from sutazai.core.request import Dialect
from sutazai.dialects.errors import error_body
from sutazai.edge.errors import STATUSES, status_of
from sutazai.edge.openapi import document
from sutazai.settings.model import Discovery, Logs, NodeSettings, Rabbitmq, Server, Settings
from sutazai.settings.secret import Secret
from sutazai.testing.fake_node import FakeNode, Fault

FOLDER = Path(__file__).parents[1] / "docs" / "reference"
ANSWER_S = 10.0
SCRAPED = ("python_", "process_")
"""Families that prometheus-client adds by itself, told in one sentence."""

SEEN_ELSEWHERE: Mapping[type[errors.SutazaiError], tuple[str, str]] = {
    errors.NodeRejected: ("see below", ""),
    errors.SettingsError: ("none: told at the start", ""),
    errors.AgentCrashed: ("none: told in the task", ""),
    errors.EngineFault: ("none: told at the start and in the log", ""),
}
"""Errors that have no status of their own."""

CLI = """\
# The command line

Generated from `src/sutazai/cli/` by `scripts/make_reference_pages.py`; change it there.

Commands that ask a running gateway find it by `--url`, else by the environment's `SUTAZAI_URL`, else by the address
in the settings. They show the key in `SUTAZAI_KEY`. `SUTAZAI_CONFIG` names the settings file. Exit codes: 0 done,
1 refused or failed (a sentence on standard error says why), 2 mistakes in the settings, 130 Ctrl-C.

"""

API = """\
# Addresses

Generated from `src/sutazai/edge/openapi.py` by `scripts/make_reference_pages.py`; change it there. The same as
OpenAPI 3.1: `GET /openapi.json`.

Keys go in `Authorization: Bearer KEY` or `X-Api-Key: KEY`; on loopback none is needed, see
[keys](../howto/keys.md). Addresses under `/admin`, and pulling, copying and deleting models, need an admin key.
`/healthz` and `/readyz` never ask for one. Fields in bold must be there; further ones are passed on or
translated, see [translation](../explanation/translation.md).

Answers to writes below `/v1/sessions`, `/v1/files`, `/v1/batches`, `/v1/tasks` and `/v1/schedules` may have the header
`x-sutazai-written`. Whoever sends it with their next request there is told nothing older, by whatever gateway:
[replicas](../howto/postgresql.md#who-wrote-sees-it).

"""

METRICS = """\
# Metrics

Generated from a running gateway's `GET /metrics` by `scripts/make_reference_pages.py`; change them in
`src/sutazai/telemetry/metrics.py` and `src/sutazai/bootstrap.py`.

Durations are in seconds. Labels are bounded: models and nodes come from the pool, not from clients, and past 2,000
pairs everything is counted under `(other)`. Requests that reached no node have an empty `node` and model. How to use
them: [watch a gateway](../howto/monitor.md).

"""

ERRORS = """\
# Errors

Generated from `src/sutazai/core/errors.py` and `src/sutazai/edge/errors.py` by `scripts/make_reference_pages.py`;
change them there.

A client of `/v1` gets an error in OpenAI's form, a client of `/api` in Ollama's:

"""

ERRORS_REST = """
Where it helps, `Retry-After` tells in how many seconds to come back, and `Allow` which methods are answered. In a
stream that has begun, the error is its last event (`data: {"error": ...}`) or its last line (`{"error": ...}`).

## Refusals of a node

Where node and client speak the same API, the node's own words are passed on. `NodeRejected` takes its status from
the node's:

| status of the node | status to the client | `type` |
|---|---|---|
"""


def pages(data_dir: Path) -> Mapping[str, str]:
    """Each page by the name of its file. Needs a folder for the database of a gateway that runs for a moment."""
    metrics = asyncio.run(_metrics_page(data_dir))
    return {"cli.md": cli(), "api.md": api(), "metrics.md": metrics_table(metrics), "errors.md": error_tables()}


def cli() -> str:
    """The help of every command."""
    text = app.generate_docs(output_format="markdown", heading_level=2)
    return CLI + text.rstrip() + "\n"


def api() -> str:
    """Every address of the API description."""
    described = document()
    rows = [
        (f"`{method.upper()} {path}`", _asked(operation), _answered(operation))
        for path, methods in described["paths"].items()
        for method, operation in methods.items()
    ]
    return API + _table(("address", "body", "answer"), rows)


def metrics_table(page: str) -> str:
    """Every family of a Prometheus page, with the labels of its samples."""
    rows = []
    for family in text_string_to_metric_families(page):
        if family.name.startswith(SCRAPED):
            continue
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = sorted({label for sample in family.samples for label in sample.labels} - {"le"})
        rows.append((f"`{name}`", family.type, ", ".join(f"`{label}`" for label in labels), family.documentation))
    others = (
        "\nBeside these there are `process_*` and `python_*`, as every Python program of prometheus-client has them.\n"
    )
    return METRICS + _table(("name", "type", "labels", "meaning"), sorted(rows)) + others


def error_tables() -> str:
    """Every error with what the client gets."""
    rows = []
    for kind in _tree(errors.SutazaiError):
        status, word = STATUSES[next(base for base in kind.__mro__ if base in STATUSES)]
        seen = SEEN_ELSEWHERE.get(kind) or (str(status), f"`{word}`")
        rows.append((f"`{kind.__name__}`", *seen, (inspect.getdoc(kind) or "").split("\n")[0]))
    refusals = [
        (said, *map(str, status_of(errors.NodeRejected("", node="", status=int(said)))))
        for said in ("400", "401", "403", "404", "422", "429", "500", "501", "502", "503", "504")
    ]
    return (
        ERRORS
        + _forms()
        + _table(("error", "status", "`type`", "meaning"), rows)
        + ERRORS_REST
        + _rows([(said, status, f"`{word}`") for said, status, word in refusals])
    )


def _forms() -> str:
    example = errors.UnknownModel("llama3.3", ["llama3.2"])
    status, word = status_of(example)
    forms = (
        error_body(dialect, status, example.message, kind=word, where=example.where).decode()
        for dialect in (Dialect.OPENAI, Dialect.OLLAMA)
    )
    return "".join(f"```json\n{form}\n```\n\n" for form in forms)


def _tree(kind: type[errors.SutazaiError]) -> list[type[errors.SutazaiError]]:
    """The errors of the vocabulary, each before those that are a kind of it."""
    below = [inner for sub in kind.__subclasses__() if sub.__module__ == errors.__name__ for inner in _tree(sub)]
    return [kind, *below]


def _asked(operation: Mapping[str, Any]) -> str:
    schema = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    required = schema.get("required", ())
    return ", ".join(f"**`{name}`**" if name in required else f"`{name}`" for name in schema.get("properties", {}))


def _answered(operation: Mapping[str, Any]) -> str:
    answer = next(answer for status, answer in operation["responses"].items() if status.startswith("2"))
    return ", ".join(f"`{form}`" for form in answer.get("content", {})) or "no body"


def _table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    return f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}\n{_rows(rows)}"


def _rows(rows: Sequence[tuple[str, ...]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


async def _metrics_page(data_dir: Path) -> str:
    """The page of a gateway that answered one request and failed another, so that every label is there."""
    async with FakeNode(NodeKind.OPENAI, ("a",)) as node:
        node.script.extend([Fault.status(500)])
        settings = Settings(
            server=Server(port=0),
            nodes=(NodeSettings(url=node.url, kind="openai"),),
            discovery=Discovery(ollama=False),
            logs=Logs(access=False),
            rabbitmq=Rabbitmq(url=Secret("amqp://127.0.0.1:1")),  # nobody is there, and the names are
        )
        async with open_gateway(
            settings, data_dir=data_dir, settings_path=None, environ={}, with_engine=False
        ) as gateway:
            url = f"http://127.0.0.1:{gateway.port}"
            pool = ConnectionPool(url, parse_address(url), connect_s=ANSWER_S)
            client = HttpClient(pool)
            body = msgspec.json.encode({"model": "a", "messages": [{"role": "user", "content": "hello"}]})
            async with asyncio.timeout(ANSWER_S):
                for _ in range(2):
                    await client.fetch("POST", "/v1/chat/completions", body)
                answer = await client.fetch("GET", "/metrics")
            pool.close()
            return answer.body.decode()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="sutazai-") as name:
        for page, text in pages(Path(name)).items():
            (FOLDER / page).write_text(text, encoding="utf-8")
            print(FOLDER.name, page)
