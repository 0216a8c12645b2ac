"""`sutazai cache`: forget answers that were kept."""

from __future__ import annotations

import sys
from typing import Annotated

import cyclopts
import msgspec

from sutazai.cli.client import GatewayClient, Url, run
from sutazai.core.errors import BadRequest

app = cyclopts.App(
    name="cache",
    help="""Forget answers that were kept, in all gateways at once.

Example: `sutazai cache forget --model llama3.2`""",
)


class ForgottenAnswers(msgspec.Struct, frozen=True):
    """The answer of `/admin/cache/forget`."""

    forgotten: int


@app.command
def forget(
    *,
    model: str | None = None,
    tenant: str | None = None,
    tag: str | None = None,
    everything: Annotated[bool, cyclopts.Parameter(name="--all", negative="")] = False,
    url: Url = None,
) -> int:
    """
    Forget what matches all that is given.

    Needs an admin key where keys are needed. Examples: `sutazai cache forget --model llama3.2 --tenant acme`,
    `sutazai cache forget --all`

    Parameters
    ----------
    model
        Answers of this model.
    tenant
        Answers to this tenant.
    tag
        Answers with this tag: `node:NAME` of the node that gave them, `key:ID` of the key that asked.
    everything
        All answers of all models and tenants.
    """

    async def work(client: GatewayClient) -> int:
        given = {"model": model, "tenant": tenant, "tag": tag}
        parts = {name: value for name, value in given.items() if value is not None}
        if bool(parts) == everything:
            raise BadRequest("Give a model, a tenant or a tag whose answers are to be forgotten, or else `--all`.")
        found = await client.ask("POST", "/admin/cache/forget", parts, shape=ForgottenAnswers)
        one = found.forgotten == 1
        sys.stdout.write(f"{found.forgotten} {'answer was' if one else 'answers were'} forgotten.\n")
        return 0

    return run(work, url)
