"""What holds for all settings: broken ones raise `SettingsError` alone, and no secret is ever seen."""

from __future__ import annotations

import datetime
import math
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec import inspect as shapes

from sutazai.core.errors import SettingsError
from sutazai.settings import model
from sutazai.settings.check import RANGES
from sutazai.settings.decode import SHAPE, Decoder
from sutazai.settings.load import CLIENT_NAMES, environment_names, load, parse, plain, show
from sutazai.settings.places import Places, lines_of
from sutazai.settings.secret import Secret

if TYPE_CHECKING:
    from collections.abc import Mapping


def told(text: str, environ: Mapping[str, str]) -> tuple[str, ...]:
    """The mistakes in these settings, none where they are fine."""
    try:
        parse(text, environ)
    except SettingsError as error:
        return error.mistakes or ("no mistake was told",)
    return ()


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def keys_of(shape: shapes.Type) -> set[str]:
    match shape:
        case shapes.StructType(fields=fields):
            return {field.name for field in fields}.union(*(keys_of(field.type) for field in fields))
        case shapes.VarTupleType(item_type=inner) | shapes.DictType(value_type=inner):
            return keys_of(inner)
    return set()


KEYS = st.sampled_from(sorted(keys_of(SHAPE)))
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**63, -(10**400)])
    | st.floats()
    | ANY_TEXT
    | st.sampled_from(["http://a:1", "http://[", "http://a:b", "auto", "ollama", "postgresql://[", "…", "\0"])
    | st.dates()
    | st.just(datetime.time(1, 2))
)
TREES = st.dictionaries(
    KEYS | ANY_TEXT,
    st.recursive(
        SCALARS,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | ANY_TEXT, inner, max_size=4),
        max_leaves=12,
    ),
    max_size=5,
)


def toml_lines() -> st.SearchStrategy[str]:
    """Lines that look like settings, right and wrong, in any order."""
    value = st.sampled_from(
        [
            "1",
            "-1",
            "0.5",
            "nan",
            "true",
            '"x"',
            '"http://a:1"',
            "[1, 2]",
            "[",
            '"""',
            "{ a = 1 }",
            "",
            "1979-01-01",
        ]
    )
    table = KEYS.map(lambda key: f"[{key}]") | KEYS.map(lambda key: f"[[{key}]]") | st.just('[models."a.b"]')
    line = st.builds(lambda key, text: f"{key} = {text}", KEYS, value) | table | ANY_TEXT
    return st.lists(line, max_size=8).map("\n".join)


@given(ANY_TEXT | toml_lines())
@example("[[[[")
@example("a.b.c = 1\n[a.b]")
@example('[["')
def test_no_text_raises_anything_but_a_settings_error(text: str) -> None:
    assert all(mistake.startswith("sutazai.toml") and mistake[-1] in ".?" for mistake in told(text, {}))


@given(st.binary(max_size=60))
@example("[server]".encode("utf-16"))
def test_no_bytes_raise_anything_but_a_settings_error(content: bytes) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder, "sutazai.toml")
        path.write_bytes(content)

        with suppress(SettingsError):
            load(path, {})


@given(TREES)
def test_no_tree_of_values_raises_and_each_mistake_is_one_line(tree: dict[str, object]) -> None:
    decoder = Decoder(Places("sutazai.toml", {}, {}))

    decoder.settings(tree)

    for mistake in decoder.mistakes:
        assert mistake.startswith("sutazai.toml: ")
        assert "\n" not in mistake


@given(
    st.dictionaries(
        st.sampled_from(sorted(environment_names())) | ANY_TEXT.map(lambda text: f"SUTAZAI_{text}"),
        ANY_TEXT | st.sampled_from(["http://a,http://a", "-1", "1e999", "9" * 5000, "\udcff"]),
        max_size=4,
    )
)
def test_no_environment_raises_anything_but_a_settings_error(environ: dict[str, str]) -> None:
    mistakes = told("[server]\nport = 1\n", environ)

    assert all(mistake.startswith("environment: ") for mistake in mistakes)


# --- Round trip ---


def values(shape: shapes.Type, group: type, field: str) -> st.SearchStrategy[object]:
    """Any right value of a field that needs no more than its type and its range."""
    limits = RANGES.get(group, {}).get(field)
    match shape:
        case shapes.UnionType(types=types):
            return st.one_of([values(one, group, field) for one in types])
        case shapes.NoneType():
            return st.none()
        case shapes.BoolType():
            return st.booleans()
        case shapes.LiteralType(values=choices):
            return st.sampled_from(choices)
        case shapes.IntType():
            assert limits is not None
            most = 2**62 if math.isinf(limits.most) else int(limits.most)
            return st.integers(int(limits.least), most)
        case shapes.FloatType():
            assert limits is not None
            return st.floats(limits.least, limits.most)
        case shapes.VarTupleType():
            return st.lists(ANY_TEXT, max_size=3).map(tuple)
    return ANY_TEXT


NAMES = ANY_TEXT.filter(lambda text: text != "" and text.isprintable())
CHAINS = st.lists(NAMES, max_size=3).map(tuple)
HOSTS = st.from_regex(r"[a-z][a-z0-9]{0,8}(\.[a-z][a-z0-9]{0,4})?", fullmatch=True)
SPECIAL: dict[tuple[str, str], st.SearchStrategy[object]] = {
    ("Server", "host"): HOSTS | st.ip_addresses().map(str),
    ("Server", "allowed_hosts"): st.lists(HOSTS, max_size=2).map(tuple),
    ("Server", "allowed_origins"): st.lists(HOSTS.map("https://{}".format), max_size=2).map(tuple),
    ("Server", "max_body_bytes"): st.integers(1024, 2**40),
    ("Server", "max_buffered_bytes"): st.integers(2**40, 2**62),
    ("Web", "allowed"): st.sampled_from([(), ("hooks.example:8443", "10.0.0.0/8"), ("::1",)]),
    ("Database", "url"): st.none(),
    ("Database", "replicas"): st.just(()),
    ("Database", "region"): st.just(""),  # that of a shard at least
    ("Shard", "name"): st.from_regex(r"[A-Za-z0-9._-]{1,9}", fullmatch=True),
    ("Shard", "url"): st.none(),
    ("Shard", "replicas"): st.just(()),
    ("Shard", "region"): st.just(""),
    ("Auto", "name"): ANY_TEXT.filter(str.isprintable),
    ("Auto", "simple_queries"): CHAINS,
    ("Auto", "complex_analysis"): CHAINS,
    ("Auto", "code_generation"): CHAINS,
    ("AutoRule", "contains"): ANY_TEXT.filter(bool),
    ("ModelSettings", "fallback"): CHAINS,
    ("Auto", "rules"): st.deferred(lambda: st.lists(groups(model.AutoRule), max_size=2).map(tuple)),
    ("Redis", "url"): st.none(),
    ("Webhooks", "secret"): st.none(),
    ("Redis", "prefix"): st.from_regex(r"[a-z.]{1,9}", fullmatch=True),
    ("Rabbitmq", "url"): st.none(),
    ("Rabbitmq", "management_url"): st.none(),
    ("Objects", "url"): st.sampled_from(["", "/srv/objects", "s3://bucket", "s3://bucket/some/prefix"]),
    ("Objects", "endpoint"): st.sampled_from(["", "http://minio:9000"]),
    ("Objects", "access_key_id"): st.none(),
    ("Objects", "secret_access_key"): st.none(),
    ("Rabbitmq", "prefix"): st.from_regex(r"[a-z.]{0,9}", fullmatch=True),
    ("NodeSettings", "url"): HOSTS.map("http://{}:11434".format),
    ("NodeSettings", "name"): st.from_regex(r"[!-~]{1,9}", fullmatch=True),
    ("NodeSettings", "api_key"): st.none(),
    ("DnsSource", "name"): HOSTS,
    ("DnsSource", "api_key"): st.none(),
    ("Tasks", "gateway_key"): st.none(),
    ("Discovery", "dns"): st.deferred(
        lambda: st.lists(groups(model.DnsSource), max_size=2, unique_by=lambda one: (one.name, one.port)).map(tuple)
    ),
    ("ModelSettings", "context_buckets"): st.sets(st.integers(1, 2**40), min_size=1, max_size=3).map(
        lambda buckets: tuple(sorted(buckets))
    ),
    ("ModelSettings", "load_options"): st.dictionaries(
        ANY_TEXT.filter(lambda name: name != "num_ctx"),
        st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False),
        max_size=3,
    ),
    ("Settings", "shards"): st.deferred(lambda: st.lists(groups(model.Shard), max_size=1).map(tuple)),
    ("Settings", "nodes"): st.deferred(
        lambda: st.lists(groups(model.NodeSettings), max_size=3, unique_by=lambda node: node.name).map(tuple)
    ),
    ("Settings", "models"): st.deferred(
        lambda: st.dictionaries(ANY_TEXT.filter(bool), groups(model.ModelSettings), max_size=2)
    ),
}


def groups(kind: type[msgspec.Struct]) -> st.SearchStrategy[Any]:
    """Any right group of that kind, with no secrets in it."""
    fields: dict[str, st.SearchStrategy[object]] = {}
    for field in cast("shapes.StructType", shapes.type_info(kind)).fields:
        special = SPECIAL.get((kind.__name__, field.name))
        if special is not None:
            fields[field.name] = special
        elif isinstance(field.type, shapes.StructType):
            # Half of the groups as they are by default: all at once are more than hypothesis likes to make.
            fields[field.name] = st.builds(field.type.cls) | groups(field.type.cls)
            # often as it is by itself: all groups at once are more than hypothesis draws in one go
            fields[field.name] = st.just(field.type.cls()) | groups(field.type.cls)
        else:
            fields[field.name] = values(field.type, kind, field.name)
    return st.builds(kind, **fields)


SETTINGS = groups(model.Settings)


@given(SETTINGS)
def test_settings_that_are_shown_are_read_back_equal(any_settings: model.Settings) -> None:
    assert parse(show(any_settings), {}) == any_settings


@given(SETTINGS)
def test_settings_are_told_with_the_lines_they_stand_on(any_settings: model.Settings) -> None:
    text = show(any_settings)

    lines = text.split("\n")

    for spot, number in lines_of(text).items():
        key = next(part for part in reversed(spot) if isinstance(part, str))
        assert key in lines[number - 1]


# --- Secrets ---

SECRETS = st.from_regex(r"[a-f0-9]{16}", fullmatch=True).map("pass-{}".format)


@given(SECRETS)
def test_a_secret_is_never_seen_in_settings_that_are_right(secret: str) -> None:
    shown = parse(
        f"""
        [database]
        url = "postgresql://joe:{secret}@host/name"
        [[nodes]]
        url = "http://a"
        api_key = "{secret}"
        [[discovery.dns]]
        name = "b"
        api_key = "{secret}"
        """,
        {},
    )

    seen = [repr(shown), str(shown), f"{shown}", show(shown), repr(plain(shown))]
    assert not [text for text in seen if secret in text]
    assert shown.nodes[0].api_key == Secret(secret)


WRONG_PLACES = (
    '[database]\nurl = "mysql://joe:{0}@host/name"',
    '[database]\nurl = "postgresql://joe:{0} @host/name"',
    '[database]\nurl = ["{0}"]',
    '[database]\nurl = {{ a = "{0}" }}',
    '[database]\nurl = "[{0}://["',
    '[[nodes]]\nurl = "http://joe:{0}@host"',
    '[[nodes]]\nurl = "{0}://host"',
    '[[nodes]]\nurl = "http://host?key={0}"',
    '[[nodes]]\nurl = "http://host/ {0}"',
    '[[nodes]]\nurl = "http://host:{0}"',
    '[[nodes]]\nurl = "http://a"\napi_key = "{0}\\n"',
    '[[nodes]]\nurl = "http://a"\napi_key = "ü{0}"',
    '[[nodes]]\nurl = "http://a"\napi_key = ["{0}"]',
    '[[nodes]]\nurl = "http://a"\nslots = "{0}"',
    'nodes = ["http://joe:{0}@host"]',
    '[[nodes]]\nurl = "http://a"\napi_key = {0}',
    '[[nodes]]\nurl = "http://a"\napi_key = "{0}',
)


@pytest.mark.parametrize("text", WRONG_PLACES)
@given(secret=SECRETS)
@settings(max_examples=10)
def test_a_secret_is_never_repeated_in_a_mistake(text: str, secret: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse(text.format(secret), {})

    assert secret not in str(caught.value)
    assert secret not in repr(caught.value)


@pytest.mark.parametrize("name", sorted(environment_names().keys() | CLIENT_NAMES | {"SUTAZAI_DATABASE_URI"}))
@given(secret=SECRETS)
@settings(max_examples=5)
def test_a_secret_in_a_wrong_name_of_the_environment_is_not_repeated(name: str, secret: str) -> None:
    """All but choices: there the wrong word is the message."""
    mistakes = told("", {name: f"http://joe:{secret}@host"})

    assert not [mistake for mistake in mistakes if secret in mistake and "give one of" not in mistake]
