"""
What a value must be beside its type: ranges, addresses, names that are used once.

Checks see one group at a time, already typed, and say what was wrong with it as a sentence without its
subject; where it was written is added by `decode`. Texts that might hold a password are never repeated.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, urlsplit

from sutazai.settings import model
from sutazai.settings.check_services import Mistake, mistakes_in_service, unusable
from sutazai.settings.places import Spot
from sutazai.settings.secret import Secret

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import msgspec


YEAR_S = 31_536_000.0
MAX_MODEL_CHARACTERS = 256


@dataclass(frozen=True, slots=True)
class Range:
    """Both ends belong to it."""

    least: float
    most: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.least <= value <= self.most

    def __str__(self) -> str:
        if math.isinf(self.most):
            return f"of at least {self.least:.15g}"
        return f"from {self.least:.15g} to {self.most:.15g}"


LIMIT_S = Range(0.001, YEAR_S)
"""A time limit: zero would end everything at once."""
PAUSE_S = Range(0, YEAR_S)
"""A time that may be none at all."""
COUNT = Range(1, 1_000_000)
PORT = Range(1, 65_535)
SIZE = Range(1024)
"""Bytes."""

RANGES: Mapping[type[msgspec.Struct], Mapping[str, Range]] = {
    model.Server: {
        "port": Range(0, 65_535),
        "max_connections": COUNT,
        "max_head_bytes": SIZE,
        "max_body_bytes": SIZE,
        "max_buffered_bytes": SIZE,
        "head_timeout_s": LIMIT_S,
        "body_timeout_s": LIMIT_S,
        "keep_alive_s": LIMIT_S,
        "write_timeout_s": LIMIT_S,
        "compress_from_bytes": Range(0),
        "unready_s": PAUSE_S,
        "drain_s": PAUSE_S,
    },
    model.Database: {
        "replica_max_lag_s": Range(0.1, 3600),
        "timeout_s": LIMIT_S,
        "pool_size": Range(1, 1000),
        "max_overflow": Range(0, 1000),
        "pool_recycle_s": LIMIT_S,
    },
    model.NodeSettings: {"slots": COUNT},
    model.DnsSource: {"port": PORT, "slots": COUNT},
    model.Discovery: {"refresh_s": Range(0.1, YEAR_S)},
    model.Routing: {
        "head_start": Range(0, 1000),
        "slow_start_s": PAUSE_S,
        "failure_penalty_s": PAUSE_S,
        "affinity_weight": Range(0, 10),
        "prefix_weight": Range(0, 10),
    },
    model.Queue: {
        "max_waiting": Range(0, 1_000_000),
        "max_waiting_bytes": Range(0),
        "max_wait_s": PAUSE_S,
        "output_weight": Range(0, 1000),
        "promote_after_s": LIMIT_S,
        "swap_patience_s": PAUSE_S,
    },
    model.ModelSettings: {"price_input": Range(0), "price_output": Range(0)},
    model.Batching: {"max_requests": Range(1, 1024), "max_wait_s": Range(0, 0.1)},
    model.Hedging: {"after_quantile": Range(0.5, 1)},
    model.Cache: {
        "memory_bytes": Range(0),
        "memory_ttl_s": LIMIT_S,
        "chat_ttl_s": LIMIT_S,
        "embedding_ttl_s": LIMIT_S,
        "max_answer_bytes": Range(0),
        "refresh_from_hits": Range(0),
        "stale_if_error_s": PAUSE_S,
    },
    model.Redis: {"timeout_s": LIMIT_S},
    model.Objects: {"timeout_s": LIMIT_S, "max_object_bytes": SIZE},
    model.Rabbitmq: {
        "publishers": Range(1, 1000),
        "consumers": Range(1, 1000),
        "connect_timeout_s": LIMIT_S,
        "confirm_timeout_s": LIMIT_S,
        "timeout_s": LIMIT_S,
        "heartbeat_s": Range(1, 3600),
        "prefetch_slow": Range(1, 10_000),
        "prefetch_fast": Range(1, 10_000),
        "max_length": Range(1),
        "delivery_limit": Range(1, 1_000_000),
        "replicas": Range(1, 99),
        "stream_days": Range(1, 3650),
    },
    model.LimitSettings: {
        "requests_per_minute": Range(0),
        "tokens_per_minute": Range(0),
        "bytes_per_minute": Range(0),
        "concurrent_requests": Range(0),
        "tokens_per_month": Range(0),
        "money_per_month": Range(0),
        "burst_s": Range(0.1, 3600),
    },
    model.Sessions: {
        "ttl_s": LIMIT_S,
        "max_messages": Range(2, 100_000),
        "max_bytes": SIZE,
        "max_per_tenant": COUNT,
    },
    model.Tasks: {
        "slots": Range(1, 10_000),
        "llm_slots": Range(1, 10_000),
        "max_length": COUNT,
        "max_waiting_per_tenant": COUNT,
        "promote_after_s": LIMIT_S,
        "delivery_limit": Range(1, 1000),
        "max_inline_bytes": Range(1024, 16 * 2**20),
        "statistics_s": Range(1, 30 * 86_400),
        "keep_months": Range(0, 1200),
        "drain_s": PAUSE_S,
        "max_rss_bytes": Range(0),
    },
    model.Web: {"timeout_s": LIMIT_S, "max_page_bytes": SIZE},
    model.Breaker: {
        "window_s": LIMIT_S,
        "minimum_requests": COUNT,
        "error_ratio": Range(0, 1),
        "slow_s": LIMIT_S,
        "slow_ratio": Range(0, 1),
        "open_s": LIMIT_S,
        "max_ejected_ratio": Range(0, 1),
    },
    model.HealthSettings: {
        "interval_s": Range(0.1, YEAR_S),
        "timeout_s": LIMIT_S,
        "failures": Range(1, 1000),
    },
    model.Retry: {
        "attempts": Range(1, 100),
        "budget_ratio": Range(0, 1),
        "budget_minimum_per_s": Range(0, 1000),
        "backoff_s": PAUSE_S,
        "backoff_max_s": PAUSE_S,
    },
    model.Timeouts: dict.fromkeys(("connect_s", "first_token_s", "idle_s", "total_s", "keep_alive_s"), LIMIT_S),
    model.Engine: {
        "slots": Range(0, 1024),
        "context_tokens": COUNT,
        "threads": Range(0, 4096),
        "batch_tokens": Range(0, 65_536),
        "max_rss_bytes": Range(0),
    },
}


def mistakes_in(group: model.Group) -> Iterator[Mistake]:
    """All that is wrong with the values of one group."""
    yield from _out_of_range(group)
    match group:
        case model.Server():
            yield from _server(group)
        case model.Database():
            yield from _database(group)
        case model.Shard():
            yield from _shard(group)
        case model.NodeSettings():
            yield from _node(group)
        case model.DnsSource():
            yield from _dns_source(group)
        case model.Discovery():
            yield from _repeated("dns", [f"{source.name}:{source.port}" for source in group.dns])
        case model.ModelSettings():
            yield from _model(group)
            yield from _model_names(group, "fallback")
        case model.Auto():
            yield from _auto(group)
        case model.AutoRule(contains=""):
            yield ("contains",), "was empty, and every question holds that; give a word"
        case model.Redis() | model.Rabbitmq() | model.Objects() | model.Web() | model.Webhooks():
            yield from mistakes_in_service(group)
        case model.Settings():
            yield from _whole(group)
        case _:
            pass


def node_address(url: str) -> tuple[str, str]:
    """
    A node's base address as it is used, and its `host:port`.

    A trailing slash and a trailing `/v1` are dropped. Raises `ValueError` with `was ...; give ...`, which
    never repeats the address: a password may stand in it.
    """
    parts = _split(url)
    host, port = parts.hostname, parts.port
    if parts.scheme not in {"http", "https"} or not host:
        raise ValueError("was not an http:// or https:// address with a host; give one such as http://10.0.0.5:11434")
    if parts.username is not None or parts.password is not None:
        raise ValueError("held a user name or a password; remove it and give the node's api_key")
    if "?" in url or "#" in url:
        raise ValueError("held a query or a fragment; give the address without it")
    if not _is_host(host) or port == 0:
        raise ValueError("had no usable host or port; give an address such as http://10.0.0.5:11434")
    shown = f"[{host}]" if ":" in host else host
    path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    netloc = shown if port is None else f"{shown}:{port}"
    return f"{parts.scheme}://{netloc}{path}", f"{shown}:{port or (443 if parts.scheme == 'https' else 80)}"


def node_name(node: model.NodeSettings) -> str:
    """What a node is called: its name, or else its host and port. Raises `ValueError` for a wrong address."""
    return node.name or node_address(node.url)[1]


def _split(url: str) -> SplitResult:
    """`urlsplit` without its surprises: it drops tabs, and looks at the port only when asked."""
    if not re.fullmatch(r"[!-~]{1,2000}", url):
        raise ValueError(
            "held a space, a character beyond ASCII, or nothing; give an address such as http://10.0.0.5:11434"
        )
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise ValueError("had a wrong host or port; give an address such as http://10.0.0.5:11434") from None
    return parts


def _is_host(text: str) -> bool:
    if re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9._-]{0,252})", text):
        return True
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _out_of_range(group: model.Group) -> Iterator[Mistake]:
    for field, limits in RANGES.get(type(group), {}).items():
        value = getattr(group, field)
        if value is not None and not isinstance(value, str) and value not in limits:
            yield (field,), f"was {value}; give a number {limits}"


def _server(server: model.Server) -> Iterator[Mistake]:
    if not _is_host(server.host):
        yield ("host",), "was no address; give one such as 127.0.0.1, or 0.0.0.0 for all"
    for index, name in enumerate(server.allowed_hosts):
        if not _is_host(name):
            yield ("allowed_hosts", index), "was no host name; give it without scheme, port and path"
    for index, origin in enumerate(server.allowed_origins):
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[!-.0->A-~]+", origin):
            yield (
                ("allowed_origins", index),
                "was no origin; give scheme, host and port alone, such as https://a.example",
            )
    if server.max_buffered_bytes < server.max_body_bytes:
        yield (
            ("max_buffered_bytes",),
            f"was {server.max_buffered_bytes}; give at least max_body_bytes, {server.max_body_bytes}",
        )


def _database(database: model.Database) -> Iterator[Mistake]:
    if database.url is not None:
        yield from _database_url(database.url, ("url",))
    elif database.replicas:
        yield ("replicas",), "stood without the url of a primary; give that too"
    for number, url in enumerate(database.replicas):
        yield from _database_url(url, ("replicas", number))
    yield from _region(database.region)


def _shard(shard: model.Shard) -> Iterator[Mistake]:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", shard.name):
        yield ("name",), "was not 1 to 64 letters, digits and . _ -; give a plain word"
    if shard.url is not None:
        yield from _database_url(shard.url, ("url",))
    elif shard.replicas:
        yield ("replicas",), "stood without a url; give those of `[database]` there"
    for number, url in enumerate(shard.replicas):
        yield from _database_url(url, ("replicas", number))
    yield from _region(shard.region)


def _region(region: str) -> Iterator[Mistake]:
    if not re.fullmatch(r"[A-Za-z0-9._-]{0,64}", region):
        yield ("region",), "was not at most 64 letters, digits and . _ -; give a plain word, or nothing"


def _database_url(url: Secret, where: Spot) -> Iterator[Mistake]:
    if (wrong := unusable(url)) is not None:
        yield where, wrong
        return
    try:
        scheme = urlsplit(url.reveal()).scheme
    except ValueError:
        scheme = ""
    if scheme not in {"postgresql", "postgres"}:
        yield (
            where,
            "was no PostgreSQL address; give postgresql://user:password@host/name (its value is hidden)",
        )


def _api_key(key: Secret | None) -> Iterator[Mistake]:
    if key is not None and (wrong := unusable(key)) is not None:
        yield ("api_key",), wrong


def _node(node: model.NodeSettings) -> Iterator[Mistake]:
    try:
        node_address(node.url)
    except ValueError as error:
        yield ("url",), str(error)
    # names stand in response headers and in labels of metrics
    if node.name and not re.fullmatch(r"[!-~]([ -~]{0,98}[!-~])?", node.name):
        yield ("name",), "was not of 1 to 100 ASCII characters; give a shorter or simpler name"
    yield from _api_key(node.api_key)


def _dns_source(source: model.DnsSource) -> Iterator[Mistake]:
    if not _is_host(source.name):
        yield ("name",), "was no host name; give it without scheme, port and path"
    yield from _api_key(source.api_key)


def _model(settings: model.ModelSettings) -> Iterator[Mistake]:
    buckets = settings.context_buckets
    if not buckets or min(buckets) < 1 or any(a >= b for a, b in pairwise(buckets)):
        yield ("context_buckets",), "were not ascending positive numbers; give them such as [4096, 8192]"
    for option, value in settings.load_options.items():
        if option == "num_ctx":
            yield ("load_options", option), "was set here; give context_buckets instead"
        elif not math.isfinite(value):
            yield ("load_options", option), f"was {value}; give a finite number"


def _auto(auto: model.Auto) -> Iterator[Mistake]:
    if not auto.name.isprintable():
        yield ("name",), "held control characters; give a plain name"
    yield from _model_names(auto, "simple_queries", "complex_analysis", "code_generation")


def _model_names(group: model.Group, *fields: str) -> Iterator[Mistake]:
    """They stand in response headers, and requests cannot name others."""
    for field in fields:
        for index, name in enumerate(getattr(group, field)):
            if not (name.isprintable() and 0 < len(name) <= MAX_MODEL_CHARACTERS):
                yield (
                    (field, index),
                    f"was not a name of 1 to {MAX_MODEL_CHARACTERS} printable characters; give a model's name",
                )


def _whole(settings: model.Settings) -> Iterator[Mistake]:
    names = []
    for node in settings.nodes:
        try:
            names.append(node_name(node))
        except ValueError:
            continue  # told already, with the node itself
    yield from _repeated("nodes", names)
    yield from _shards(settings)
    if "" in settings.models:
        yield ("models", ""), "had no name; give the model's name"


def _shards(settings: model.Settings) -> Iterator[Mistake]:
    region, shards = settings.database.region, settings.shards
    yield from _repeated("shards", [shard.name for shard in shards])
    if sum(shard.url is None for shard in shards) > 1:
        yield ("shards",), "left the url out more than once; only one shard can be `[database]` itself"
    if shards and all(shard.region != region for shard in shards):
        here = f"the region {region!r} of `[database]`" if region else "`[database]`, which names no region"
        yield ("shards",), f"had none for {here}; give one the same region"


def _repeated(field: str, names: list[str]) -> Iterator[Mistake]:
    for name, times in Counter(names).items():
        if times > 1:
            yield (field,), f"named {name} {times} times; give each a name of its own"
