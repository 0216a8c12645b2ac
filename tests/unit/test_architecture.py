"""Rules of the house that no linter knows. (Import contracts are checked by import-linter in `make check`.)"""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

import sutazai
from sutazai.core import errors
from sutazai.core.request import Dialect
from sutazai.edge.errors import STATUSES, answer_to, status_of

ROOT = Path(sutazai.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))
KINDS = {
    name: kind
    for name, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, errors.SutazaiError) and not name.startswith("_")
}

every_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
every_error = pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))


def drawn_tree() -> dict[str, str]:
    """Each error in the drawing at the top of the module, and the one it hangs on."""
    parents: dict[str, str] = {}
    line_of: dict[int, str] = {}
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"(?P<branch>[│├└─ ]*)(?P<name>[A-Z]\w+)(\s{2,}|$)", line)
        if found is None:
            continue
        depth = len(found["branch"]) // 4
        line_of[depth] = found["name"]
        if depth:
            parents[found["name"]] = line_of[depth - 1]
    return parents


def test_the_source_was_found() -> None:
    assert len(MODULES) > 80
    assert len(KINDS) > 15


@every_module
def test_a_module_begins_with_its_charter(path: Path) -> None:
    charter = ast.get_docstring(ast.parse(path.read_text("utf-8")))

    assert charter
    assert charter.strip().endswith((".", "`", ")")) or "\n" in charter
    assert len(charter) > 15


@every_module
def test_nothing_is_printed_and_nothing_is_left_to_do(path: Path) -> None:
    text = path.read_text("utf-8")
    called = {
        node.func.id
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }

    assert not called & {"print", "breakpoint"}
    assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", text)


@every_module
def test_a_module_can_be_read_at_a_sitting(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= 600


def test_no_module_is_called_after_nothing() -> None:
    names = {part for path in MODULES for part in path.relative_to(ROOT).with_suffix("").parts}

    assert not names & {"utils", "util", "helpers", "helper", "common", "misc", "manager"}


def test_the_tree_of_errors_is_drawn_as_it_is() -> None:
    real = {name: kind.__bases__[0].__name__ for name, kind in KINDS.items() if kind is not errors.SutazaiError}

    assert drawn_tree() == real


def test_no_error_hangs_on_another_tree() -> None:
    """A package may refine an error; it then has the status of the one it refines. None begins anew."""
    elsewhere = [
        f"{path.relative_to(ROOT)}: {node.name}"
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ClassDef)
        and any(isinstance(base, ast.Name) and base.id in {"Exception", "BaseException"} for base in node.bases)
    ]

    assert elsewhere == ["core/errors.py: SutazaiError"]


@every_error
def test_an_error_has_a_status_a_kind_and_a_docstring(kind: type[errors.SutazaiError]) -> None:
    assert kind.__doc__
    nearest = next(base for base in kind.__mro__ if base in STATUSES)
    status, word = STATUSES[nearest]

    assert 400 <= status < 600
    assert word.isidentifier()
    assert nearest is not errors.SutazaiError or kind in {
        errors.SutazaiError,
        errors.SettingsError,
        errors.EngineFault,
    }, "only what no client can cause may fall through to 500"


@pytest.mark.parametrize("dialect", Dialect)
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.BadRequest("It was odd."), 400),
        (errors.UnknownModel("m", ["n"]), 404),
        (errors.WrongMethod("It was GET.", allowed="POST"), 405),
        (errors.TooLarge("It was large."), 413),
        (errors.Unauthorized("It had no key."), 401),
        (errors.Forbidden("It may not."), 403),
        (errors.NotFound("It is not."), 404),
        (errors.UnknownAgent("chta", ["chat"]), 404),
        (errors.Overloaded("It was full.", retry_after_s=0.2), 503),
        (errors.NoHealthyNode("All were down.", retry_after_s=5), 503),
        (errors.Cancelled("It was cancelled."), 499),
        (errors.ShuttingDown("It stopped."), 503),
        (errors.StoreUnavailable("It was away."), 503),
        (errors.NodeUnreachable("It was cut.", node="a"), 502),
        (errors.NodeTimeout("It was silent.", node="a"), 504),
        (errors.NodeRejected("It refused.", node="a", status=400), 400),
        (errors.NodeRejected("It knew it not.", node="a", status=404), 404),
        (errors.NodeRejected("It wanted a key.", node="a", status=401), 502),
        (errors.NodeRejected("It was busy.", node="a", status=429), 429),
        (errors.NodeRejected("It broke.", node="a", status=500), 502),
        (errors.NodeRejected("It cannot.", node="a", status=501), 400),
        (errors.NodeRejected("It moved.", node="a", status=302), 502),
        (errors.SutazaiError("We broke."), 500),
    ],
    ids=lambda value: f"{type(value).__name__}-{getattr(value, 'status', '')}" if isinstance(value, Exception) else "",
)
def test_a_client_gets_this_status_and_the_sentence(error: errors.SutazaiError, status: int, dialect: Dialect) -> None:
    answer = answer_to(error, dialect)

    assert answer.status == status == status_of(error)[0]
    assert error.message.encode() in answer.body
    assert (answer.retry_after_s is not None) == bool(getattr(error, "retry_after_s", 0))
    assert answer.retry_after_s is None or answer.retry_after_s >= 1
