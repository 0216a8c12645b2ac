"""`sutazai route explain`: which kind of request a question is, why, and which models it would go to."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import cyclopts
import msgspec

from sutazai.bootstrap.rules import type_rules
from sutazai.cli.client import INTERRUPTED, GatewayClient, Url, guarded, run
from sutazai.cli.printing import Cell, complain, print_json, print_table
from sutazai.core.errors import BadRequest
from sutazai.core.request import Question
from sutazai.policy.request_type import Classified, classify
from sutazai.settings.load import find, load

app = cyclopts.App(name="route")

MAX_CHARACTERS = 1_000_000


class Listed(msgspec.Struct, frozen=True):
    """A model that the gateway has."""

    id: str


class Models(msgspec.Struct, frozen=True):
    """The answer of `/v1/models`."""

    data: tuple[Listed, ...]


@app.command
def explain(
    text: str | None = None,
    /,
    *,
    json: Annotated[bool, cyclopts.Parameter(negative="")] = False,
    url: Url = None,
) -> int:
    """
    Say what `model: "auto"` makes of a question.

    Works without a gateway; with one it also tells which models of the chain are there.

    Examples: `sutazai route explain "Write a function that sorts words"`, `sutazai route explain < question.txt`

    Parameters
    ----------
    text
        The question. Left out: read from standard input.
    json
        Print JSON.
    """

    def work() -> int:
        rules = type_rules(load(find(os.environ, Path.cwd()), os.environ))
        classified = classify(Question(text=_read(text)), rules.rules)
        chain = rules.chains[classified.kind]
        there = _there(url)
        if json:
            print_json(_plain(classified, chain, there))
        else:
            _print(classified, chain, there)
        return 0

    return guarded(work)


def _read(text: str | None) -> str:
    text = sys.stdin.read(MAX_CHARACTERS) if text is None else text
    if not text.strip():
        raise BadRequest('The question was empty; write it in quotes: sutazai route explain "What is entropy?"')
    return text


def _there(url: str | None) -> frozenset[str] | None:
    """The models of the gateway; None, once it was said why, where none tells: the kind is known without."""
    found: frozenset[str] | None = None

    async def ask(client: GatewayClient) -> int:
        nonlocal found
        models = await client.ask("GET", "/v1/models", shape=Models)
        found = frozenset(name for model in models.data for name in (model.id, model.id.removesuffix(":latest")))
        return 0

    if run(ask, url) == INTERRUPTED:
        raise KeyboardInterrupt
    return found


def _taken(chain: Sequence[str], there: frozenset[str] | None) -> str | None:
    return next((model for model in chain if there is not None and model in there), None)


def _plain(classified: Classified, chain: Sequence[str], there: frozenset[str] | None) -> dict[str, object]:
    return {
        "kind": classified.kind.value,
        "reasons": list(classified.reasons),
        "shares": {kind.value: round(share, 3) for kind, share in classified.shares.items()},
        "chain": list(chain),
        "there": None if there is None else [model for model in chain if model in there],
        "model": _taken(chain, there),
    }


def _print(classified: Classified, chain: Sequence[str], there: frozenset[str] | None) -> None:
    sys.stdout.write(f"{classified.kind.value}, because of: {', '.join(classified.reasons)}\n\n")
    rows: list[list[Cell]] = [
        [kind.value, f"{share:.0%}"] for kind, share in sorted(classified.shares.items(), key=lambda one: -one[1])
    ]
    print_table(("KIND", "SHARE"), rows)
    sys.stdout.write("\n")
    print_table(
        ("MODEL", "ON A NODE"),
        [[model, "unknown" if there is None else "yes" if model in there else "no"] for model in chain],
    )
    taken = _taken(chain, there)
    if taken is not None:
        sys.stdout.write(f"\nIt would go to {taken}, unless that is busy or broken and the next is not.\n")
    elif there is not None:
        complain("None of them is there. Pull one, or name yours under [auto] in the settings.")
