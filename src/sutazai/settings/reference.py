"""
The page `docs/reference/settings.md`, made from the model: its docstrings are what a user reads.

Attribute docstrings are not kept by Python, so they are read from the source of `model`.
"""

from __future__ import annotations

import ast
import inspect
from textwrap import indent
from typing import TYPE_CHECKING

import msgspec
from msgspec import inspect as shapes

from sutazai.settings import model, model_tasks
from sutazai.settings.check import RANGES
from sutazai.settings.decode import SHAPE, words
from sutazai.settings.load import environment_names, literal
from sutazai.settings.watch import LIVE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sutazai.settings.places import Spot

_HEAD = """\
# Settings

Generated from `src/sutazai/settings/model.py` by `sutazai config reference`; change it there.

SutazAI works without any settings. Those that you give come from a TOML file and from the environment, and
the environment wins. The file is the one named by `SUTAZAI_CONFIG`, else `sutazai.toml` in the working
directory, else `/etc/sutazai/sutazai.toml` for root and `~/.config/sutazai/sutazai.toml` for others.

```toml
[server]
host = "0.0.0.0"

[[nodes]]
url = "http://10.0.0.5:11434"

[[nodes]]
url = "http://10.0.0.6:8000"
kind = "openai"

[models."llama3.2:3b"]
context_buckets = [8192, 32768]
```

`sutazai config check` tells every mistake at once, and `sutazai config show` what is in force.

In the environment, lists of strings are separated by commas, `true`, `1` and `yes` are the same, and so are
`false`, `0` and `no`. `SUTAZAI_NODES` is a list of addresses, each with its kind in front where that is not
`ollama`:
`SUTAZAI_NODES=http://10.0.0.5:11434,openai+http://10.0.0.6:8000`.
"""


def reference() -> str:
    """The whole page, ready to be written to a file."""
    return "\n".join([_HEAD, _live(), *_groups(SHAPE, ())])


def _live() -> str:
    names = ", ".join(f"`{name}`" for name in LIVE)
    return (
        "A running gateway loads its file again when it changed, and on SIGHUP. It takes up changes of\n"
        f"{names}.\n"
        "Other changes wait for a restart. A file with mistakes changes nothing.\n"
    )


def _groups(shape: shapes.StructType, path: Spot) -> Iterator[str]:
    """A section for each table below that shape, in the order of the model."""
    for field in shape.fields:
        match field.type:
            case shapes.StructType() as inner:
                yield from _section(f"[{'.'.join(map(str, (*path, field.name)))}]", inner, (*path, field.name))
            case shapes.VarTupleType(item_type=shapes.StructType() as inner):
                yield from _section(f"[[{'.'.join(map(str, (*path, field.name)))}]]", inner, (*path, field.name))
            case shapes.DictType(value_type=shapes.StructType() as inner):
                yield from _section(f'[{field.name}."NAME"]', inner, (*path, field.name))


def _section(title: str, shape: shapes.StructType, path: Spot) -> Iterator[str]:
    docstrings = attribute_docstrings()[shape.cls.__name__]
    names = {spot: name for name, (spot, _) in environment_names().items()}
    yield f"## `{title}`\n\n{inspect.getdoc(shape.cls)}\n"
    if path in names:
        yield f"In the environment: `{names[path]}`.\n"
    for field in shape.fields:
        if not _is_section(field.type):
            facts = [_kind(shape, field), _default(field)]
            if name := names.get((*path, field.name)):
                facts.append(f"`{name}`")
            yield f"- **`{field.name}`**: {', '.join(facts)}\\\n{indent(docstrings[field.name], '  ')}"
    yield ""
    yield from _groups(shape, path)


def attribute_docstrings() -> Mapping[str, Mapping[str, str]]:
    """The docstring of each field, by class and field, as it stands in the model's source."""
    found: dict[str, dict[str, str]] = {}
    for node in (*ast.parse(inspect.getsource(model)).body, *ast.parse(inspect.getsource(model_tasks)).body):
        if not isinstance(node, ast.ClassDef):
            continue
        fields = found.setdefault(node.name, {})
        for before, after in zip(node.body, node.body[1:], strict=False):
            match before, after:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str() as text)),
                ):
                    fields[name] = inspect.cleandoc(text)
    return found


def _kind(shape: shapes.StructType, field: shapes.Field) -> str:
    limits = RANGES.get(shape.cls, {}).get(field.name)
    kind = words(field.type)
    return f"{kind} {limits}" if limits else kind


def _default(field: shapes.Field) -> str:
    if field.required:
        return "required"
    if field.default is None:
        return "left out by default"
    value = field.default if field.default is not msgspec.NODEFAULT else {}
    return f"default `{literal(value)}`" + _in_binary(value, field.name)


def _in_binary(value: object, name: str) -> str:
    """` (32 MiB)` behind sizes that are whole in it."""
    if name.endswith("_bytes") and isinstance(value, int) and value:
        for unit, size in (("MiB", model.MIB), ("KiB", model.KIB)):
            if value % size == 0:
                return f" ({value // size} {unit})"
    return ""


def _is_section(shape: shapes.Type) -> bool:
    """Whether the field is a table of its own, told in its own section."""
    match shape:
        case shapes.StructType() | shapes.VarTupleType(item_type=shapes.StructType()):
            return True
        case shapes.DictType(value_type=shapes.StructType()):
            return True
    return False
