"""
The one place that reads the settings file and the environment, and that writes settings as text.

The environment wins over the file. All that was wrong is told at once: `SettingsError.mistakes` has a
sentence for each, with the place, what was wrong and what to do. Nobody else parses TOML or looks at
`SUTAZAI_` names.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

import msgspec
from msgspec import inspect as shapes

from sutazai.core.errors import SettingsError
from sutazai.settings.check import node_address, node_name
from sutazai.settings.decode import SHAPE, Decoder, words
from sutazai.settings.places import Places, Spot, lines_of
from sutazai.settings.secret import Secret

if TYPE_CHECKING:
    from sutazai.settings.model import Settings

CLIENT_NAMES = frozenset({"SUTAZAI_CONFIG", "SUTAZAI_URL", "SUTAZAI_KEY"})
"""Names that are no settings: the path of the file, and two for the command-line client."""

_LARGEST_FILE_BYTES = 1024 * 1024
_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def load(path: Path | None, environ: Mapping[str, str]) -> Settings:
    """
    The settings of a file and an environment; without a file, of the environment alone.

    Reads the file with blocking I/O. Node addresses come back without a trailing slash or `/v1`, and each
    node with a name. Raises `SettingsError` with all mistakes.
    """
    if path is None:
        return parse("", environ)
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise SettingsError([f"{path} could not be read: {reason}; check the path and who may read it."]) from error
    if len(content) > _LARGEST_FILE_BYTES:
        raise SettingsError([f"{path} was larger than 1 MiB; give a settings file."])
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise SettingsError([f"{path} was not UTF-8 in line {line}; save it as UTF-8."]) from error
    return parse(text, environ, file=path.name)


def parse(text: str, environ: Mapping[str, str], *, file: str = "sutazai.toml") -> Settings:
    """As `load`, for the text of a file; `file` is what mistakes call it."""
    mistakes: list[str] = []
    raw: dict[str, object] = {}
    try:
        raw = tomllib.loads(text)
    except ValueError as error:
        mistakes.append(f"{file} was not TOML: {str(error)[:200]}; correct it there.")
    except RecursionError:
        mistakes.append(f"{file} was nested too deeply; write it flat.")
    given, wrong = _from_environment(environ)
    names = {spot: name for spot, (name, _) in given.items()}
    decoder = Decoder(Places(file, lines_of(text), names))
    settings = decoder.settings(_overlaid(raw, {spot: value for spot, (_, value) in given.items()}))
    mistakes += decoder.mistakes + wrong
    if mistakes:
        raise SettingsError(mistakes)
    nodes = tuple(
        msgspec.structs.replace(node, url=node_address(node.url)[0], name=node_name(node)) for node in settings.nodes
    )
    return msgspec.structs.replace(settings, nodes=nodes)


def find(environ: Mapping[str, str], cwd: Path) -> Path | None:
    """
    The settings file to use, None where there is none.

    `SUTAZAI_CONFIG`, else `sutazai.toml` in `cwd`, else the file of this user. Raises `SettingsError` where
    `SUTAZAI_CONFIG` names a file that is not there.
    """
    if named := environ.get("SUTAZAI_CONFIG"):
        path = cwd / named
        if not path.exists():
            raise SettingsError([f"environment: SUTAZAI_CONFIG named {path}, which was not there; correct the path."])
        return path
    candidates = [cwd / "sutazai.toml", user_file(environ, is_root=os.geteuid() == 0)]
    return next((path for path in candidates if path and path.is_file()), None)


def user_file(environ: Mapping[str, str], *, is_root: bool) -> Path | None:
    """Where a user's own settings file belongs; None without a `HOME`."""
    if is_root:
        return Path("/etc/sutazai/sutazai.toml")
    home = environ.get("HOME")
    return Path(home, ".config/sutazai/sutazai.toml") if home else None


def data_dir(settings: Settings, environ: Mapping[str, str], is_root: bool) -> Path:
    """
    The folder for the embedded PostgreSQL and run-time files.

    Raises `SettingsError` where `HOME` is needed and not in `environ`.
    """
    folder = settings.database.data_dir or ("/var/lib/sutazai" if is_root else "~/.local/share/sutazai")
    if folder != "~" and not folder.startswith("~/"):
        return Path(folder)
    if not (home := environ.get("HOME")):
        raise SettingsError(["database.data_dir needed HOME, which was not set; give database.data_dir in full."])
    return Path(home, folder[2:])


def environment_names() -> Mapping[str, tuple[Spot, shapes.Type]]:
    """Every name of the environment that is a setting, with the spot it sets and the type there."""
    names: dict[str, tuple[Spot, shapes.Type]] = {}
    for group in SHAPE.fields:
        if group.name == "nodes":
            names["SUTAZAI_NODES"] = ((group.name,), group.type)
        elif isinstance(group.type, shapes.StructType):
            for field in group.type.fields:
                if not _holds_tables(field.type):
                    name = f"SUTAZAI_{group.name}_{field.name}".upper()
                    names[name] = ((group.name, field.name), field.type)
    return names


def plain(settings: Settings) -> dict[str, object]:
    """The settings as values that JSON knows, every secret replaced by `…`."""
    return cast("dict[str, object]", msgspec.to_builtins(settings, enc_hook=_hidden))


def show(settings: Settings) -> str:
    """
    The settings as TOML that `parse` reads back to equal settings.

    Secrets stand as `…`, which `parse` refuses by name: the text with hidden secrets can be read, not run.
    """
    return "\n".join(_tables(settings, ())).strip() + "\n"


def _from_environment(environ: Mapping[str, str]) -> tuple[dict[Spot, tuple[str, object]], list[str]]:
    """By spot, the name that set it and a value as TOML would have given it; then the mistakes."""
    names = environment_names()
    given: dict[Spot, tuple[str, object]] = {}
    mistakes: list[str] = []
    for name, text in sorted(environ.items()):
        if not name.startswith("SUTAZAI_") or name in CLIENT_NAMES:
            continue
        if name not in names:
            if not _is_of_a_service(name, text):
                mistakes.append(_unknown_name(name))
            continue
        spot, shape = names[name]
        try:
            text.encode()
            given[spot] = (name, _nodes(text) if spot == ("nodes",) else _read(shape, text))
        except UnicodeEncodeError:
            mistakes.append(f"environment: {name} was not UTF-8; give it as UTF-8.")
        except (ValueError, KeyError):
            mistakes.append(f"environment: {name} could not be read; give {words(shape)}.")
    return given, mistakes


def _is_of_a_service(name: str, text: str) -> bool:
    """Whether Kubernetes set it: a Service called `sutazai` leaves its addresses in all containers."""
    return bool(re.search(r"_SERVICE_(HOST|PORT)|_PORT_\d+_(TCP|UDP)", name)) or text.startswith(("tcp://", "udp://"))


def _unknown_name(name: str) -> str:
    shown = name[:100].encode("ascii", "backslashreplace").decode()
    nearest = difflib.get_close_matches(name, [*environment_names(), *sorted(CLIENT_NAMES)], n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else "`sutazai config reference` lists the names."
    return f"environment: {shown} was not known; {hint}"


def _read(shape: shapes.Type, text: str) -> object:
    """The text as that type. Raises `ValueError` or `KeyError`; choices and ranges are for the decoder."""
    match shape:
        case shapes.UnionType(types=types):
            kinds = [one for one in types if not isinstance(one, shapes.NoneType)]
            return _read(kinds[0], text) if text else None
        case shapes.IntType():
            return int(text)
        case shapes.FloatType():
            return float(text)
        case shapes.BoolType():
            return _TRUTH[text.lower()]
        case shapes.VarTupleType():
            return [part for part in map(str.strip, text.split(",")) if part]
    return text


def _nodes(text: str) -> list[object]:
    """`http://a:11434, openai+http://b:8000` as tables of nodes."""
    nodes: list[object] = []
    for part in filter(None, map(str.strip, text.split(","))):
        kind = re.match(r"([a-z]+)\+(?=https?://)", part)
        nodes.append({"url": part[kind.end() :], "kind": kind[1]} if kind else {"url": part})
    return nodes


def _overlaid(raw: Mapping[str, object], values: Mapping[Spot, object]) -> dict[str, object]:
    """The file's tables with the environment's values in them. A group that is no table stays as it is."""
    merged = dict(raw)
    for spot, value in values.items():
        match spot:
            case (str() as group, str() as field):
                table = merged.get(group, {})
                merged[group] = {**table, field: value} if isinstance(table, Mapping) else table
            case (str() as group,):
                merged[group] = value
    return merged


def _holds_tables(shape: shapes.Type) -> bool:
    return isinstance(shape, shapes.VarTupleType) and isinstance(shape.item_type, shapes.StructType)


def _hidden(value: object) -> str:
    if isinstance(value, Secret):
        return Secret.HIDDEN
    raise TypeError(
        f"Settings held a {type(value).__name__}, which has no plain form; give it one in settings/load.py."
    )


def _tables(group: msgspec.Struct, path: tuple[str, ...]) -> Iterator[str]:
    """The lines of a group: its own values first, then the tables below it, as TOML demands."""
    values = msgspec.structs.asdict(group)
    for key, value in values.items():
        if not _is_below(value) and value is not None:
            note = "  # hidden" if isinstance(value, Secret) else ""
            yield f"{key} = {literal(value)}{note}"
    for key, value in values.items():
        if not _is_below(value):
            continue
        inner = (*path, key)
        match value:
            case msgspec.Struct():
                yield from ("", f"[{'.'.join(inner)}]", *_tables(value, inner))
            case tuple():
                for item in value:
                    yield from ("", f"[[{'.'.join(inner)}]]", *_tables(item, inner))
            case dict():
                for name, item in value.items():
                    named = (*inner, literal(name))
                    yield from ("", f"[{'.'.join(named)}]", *_tables(item, named))


def _is_below(value: object) -> bool:
    """Whether the value is written as tables of its own."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,)
    return any(isinstance(item, msgspec.Struct) for item in items)


def literal(value: object) -> str:
    """A value of the model on the right of `=` in TOML."""
    match value:
        case bool():
            return "true" if value else "false"
        case tuple():
            return f"[{', '.join(map(literal, value))}]"
        case dict():
            return "{" + ", ".join(f"{literal(key)} = {literal(item)}" for key, item in value.items()) + "}"
        case Secret():
            return f'"{Secret.HIDDEN}"'
        case str():
            # JSON's strings are TOML's, but for DEL, which TOML wants escaped
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
