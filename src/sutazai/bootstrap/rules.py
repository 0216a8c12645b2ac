"""From settings to the values that each part needs: the only place that knows both."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal
from urllib.parse import urlsplit

import msgspec

from sutazai.core.identity import Limits
from sutazai.core.node import Node, NodeKind
from sutazai.gateway.fleet import other_name
from sutazai.gateway.membership import DnsName, Rhythm, Sources, Wanted
from sutazai.gateway.pipeline import StageRules
from sutazai.gateway.routed import Patience
from sutazai.gateway.typed import TypeRules
from sutazai.policy.admission import AdmissionRules
from sutazai.policy.batching import BatchRules
from sutazai.policy.breaker import BreakerRules
from sutazai.policy.cacheability import CacheRules
from sutazai.policy.hedging import HedgeRules
from sutazai.policy.request_type import RequestType, Rule
from sutazai.policy.retry import RetryRules
from sutazai.policy.routing import RoutingRules
from sutazai.settings.model import ModelSettings, Settings
from sutazai.settings.secret import Secret
from sutazai.tasks.refill import RefillRhythm

DEFAULT_MODEL = ModelSettings()
HEARTBEATS = 6
"""A worker that missed so many is gone for everybody; the broker gives it up after two."""
TABLE_LOOK_S = 60.0


class Live:
    """The settings as of now, for the few who must see changes."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def model(self, name: str) -> ModelSettings:
        """Settings of one model, by whichever of its names: who could choose one would choose its price and options."""
        models = self.settings.models
        return models.get(name) or models.get(other_name(name), DEFAULT_MODEL)

    def price(self, name: str) -> tuple[float, float]:
        """Money for a million input and a million output tokens of a model."""
        model = self.model(name)
        return model.price_input, model.price_output


def routing_rules(settings: Settings) -> RoutingRules:
    """The group that routing needs."""
    breaker = settings.breaker
    return RoutingRules(
        head_start=settings.routing.head_start,
        slow_start_s=settings.routing.slow_start_s,
        failure_penalty_s=settings.routing.failure_penalty_s,
        affinity_weight=settings.routing.affinity_weight,
        prefix_weight=settings.routing.prefix_weight,
        breaker=BreakerRules(
            window_s=breaker.window_s,
            minimum_requests=breaker.minimum_requests,
            error_ratio=breaker.error_ratio,
            slow_s=breaker.slow_s,
            slow_ratio=breaker.slow_ratio,
            open_s=breaker.open_s,
            max_ejected_ratio=breaker.max_ejected_ratio,
        ),
    )


def retry_rules(settings: Settings) -> RetryRules:
    """The group that retries need."""
    retry = settings.retry
    return RetryRules(
        attempts=retry.attempts,
        budget_ratio=retry.budget_ratio,
        budget_minimum_per_s=retry.budget_minimum_per_s,
        backoff_s=retry.backoff_s,
        backoff_max_s=retry.backoff_max_s,
    )


def patience(settings: Settings) -> Patience:
    """The time limits of requests."""
    return Patience(
        first_token_s=settings.timeouts.first_token_s,
        idle_s=settings.timeouts.idle_s,
        total_s=settings.timeouts.total_s,
        max_wait_s=settings.queue.max_wait_s,
    )


def admission_rules(settings: Settings) -> AdmissionRules:
    """The group that waiting needs."""
    return AdmissionRules(**msgspec.structs.asdict(settings.queue))


def stage_rules(settings: Settings) -> StageRules:
    """What each stage needs."""
    cache = settings.cache
    return StageRules(
        types=type_rules(settings),
        cache=CacheRules(
            memory_ttl_s=cache.memory_ttl_s,
            chat_ttl_s=cache.chat_ttl_s,
            embedding_ttl_s=cache.embedding_ttl_s,
            max_answer_bytes=cache.max_answer_bytes,
            refresh_from_hits=cache.refresh_from_hits,
            stale_if_error_s=cache.stale_if_error_s,
        )
        if cache.enabled
        else None,
        cache_memory_bytes=cache.memory_bytes,
        cache_store_limit_s=settings.redis.timeout_s,
        batches=BatchRules(**msgspec.structs.asdict(settings.batching)),
        hedges=HedgeRules(**msgspec.structs.asdict(settings.hedging)),
        admission=admission_rules(settings),
    )


def type_rules(settings: Settings) -> TypeRules:
    """What choosing models by what is asked needs."""
    auto = settings.auto
    chains = {name: model.fallback for name, model in settings.models.items() if model.fallback}
    return TypeRules(
        name=auto.name,
        chains={
            RequestType.SIMPLE_QUERIES: auto.simple_queries,
            RequestType.COMPLEX_ANALYSIS: auto.complex_analysis,
            RequestType.CODE_GENERATION: auto.code_generation,
        },
        rules=tuple(Rule(contains=rule.contains, kind=RequestType(rule.kind)) for rule in auto.rules),
        fallbacks={other_name(name): chain for name, chain in chains.items()} | chains,
    )


def rhythm(settings: Settings) -> Rhythm:
    """How often nodes are probed and looked for."""
    return Rhythm(
        probe_s=settings.health.interval_s,
        probe_limit_s=settings.health.timeout_s,
        refresh_s=settings.discovery.refresh_s,
    )


def refill_rhythm(settings: Settings) -> RefillRhythm:
    """A table loses no word; what was at a broker that the settings do not name any more is found all the same."""
    usual = RefillRhythm()
    if settings.rabbitmq.url is None:
        return replace(usual, look_s=TABLE_LOOK_S)
    return replace(usual, lease_s=max(usual.lease_s, HEARTBEATS * settings.rabbitmq.heartbeat_s))


def sources(settings: Settings, environ: Mapping[str, str]) -> Sources:
    """Where nodes come from."""
    listed = [
        Wanted(
            node=Node(
                name=entry.name or urlsplit(entry.url).netloc,
                kind=NodeKind(entry.kind),
                url=entry.url,
                slots=entry.slots if isinstance(entry.slots, int) else None,
                is_adaptive=entry.slots == "adaptive",
                models=entry.models,
            ),
            api_key=_revealed(entry.api_key),
        )
        for entry in settings.nodes
    ]
    dns = [
        DnsName(
            name=entry.name,
            port=entry.port,
            kind=NodeKind(entry.kind),
            slots=entry.slots,
            api_key=_revealed(entry.api_key),
        )
        for entry in settings.discovery.dns
    ]
    return Sources(listed=listed, dns=dns, ollama=_ollama_url(environ) if settings.discovery.ollama else None)


def _revealed(secret: Secret | None) -> str | None:
    return None if secret is None else secret.reveal()


def _ollama_url(environ: Mapping[str, str]) -> str:
    """`OLLAMA_HOST` in the forms that Ollama itself understands: a host, a host and port, a URL."""
    host = environ.get("OLLAMA_HOST", "").strip() or "127.0.0.1:11434"
    url = urlsplit(host if "://" in host else f"http://{host}")
    name = url.hostname or "127.0.0.1"
    name = "127.0.0.1" if name in {"0.0.0.0", "::"} else name
    default_port = {"http": 11434, "https": 443}.get(url.scheme, 11434)
    shown = f"[{name}]" if ":" in name else name
    return f"{url.scheme}://{shown}:{url.port or default_port}{url.path.rstrip('/')}"


def default_limits(settings: Settings) -> Limits:
    """What a tenant may take that has no limits of its own."""
    return Limits(**msgspec.structs.asdict(settings.limits))


def log_form(settings: Settings) -> Literal["json", "text"]:
    """`json` or `text`, as the settings and the terminal say."""
    if settings.logs.format != "auto":
        return settings.logs.format
    return "text" if sys.stderr.isatty() else "json"
