"""What the parts of a gateway count, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

from prometheus_client.core import Metric

from sutazai.adapters.postgres.servers import ServersState, ServerState
from sutazai.adapters.rabbitmq.publishing import Outcome
from sutazai.bootstrap.tasks import BrokerSide, TaskQueue
from sutazai.core.node import Health
from sutazai.edge.server import Server
from sutazai.gateway.ledger import Ledger
from sutazai.gateway.pipeline import Pipeline
from sutazai.policy.breaker import Position
from sutazai.tasks.worker import Worker
from sutazai.telemetry.metrics import counter, gauge


def gauges(pipeline: Pipeline, server: Server, ledger: Ledger) -> Iterator[Metric]:
    """All of them, as of now."""
    yield from _nodes(pipeline)
    yield from _line(pipeline)
    yield from _stages(pipeline)
    yield from _cache(pipeline)
    yield gauge("sutazai_in_flight", "Inference requests not yet answered.", [((), len(server.in_flight))])
    yield gauge("sutazai_connections", "Open client connections.", [((), server.connections)])
    yield gauge("sutazai_buffered_bytes", "Request bodies in memory.", [((), server.buffered_bytes)])
    yield gauge("sutazai_usage_rows_waiting", "Usage not yet written to the database.", [((), ledger.waiting)])


def task_gauges(tasks: TaskQueue, worker: Worker | None) -> Iterator[Metric]:
    """What is known here of tasks."""
    waiting = (((name,), count) for name, count in tasks.depths.waiting.items())
    yield gauge("sutazai_tasks_waiting", "Tasks in the queue that may be started.", waiting, ("queue",))
    if worker is not None:
        yield gauge("sutazai_attempts_running", "Attempts of tasks under way here.", [((), worker.running)])
        ends = (((end,), count) for end, count in worker.ends.items())
        yield counter("sutazai_attempts", "Attempts that ended here, by what became of them.", ends, ("end",))
    refill = tasks.refill
    refilled = [((), refill.refilled)]
    yield counter("sutazai_tasks_refilled", "Tasks that this process put into their queue again.", refilled)
    given_up = [((), refill.given_up)]
    yield counter("sutazai_attempts_given_up", "Attempts of workers that were gone, given up from here.", given_up)
    if tasks.broker is not None:
        yield from _broker(tasks.broker)


def _broker(side: BrokerSide) -> Iterator[Metric]:
    figures = side.queue.figures
    yield gauge("sutazai_rabbitmq_connections", "Connections to RabbitMQ from here.", [((), side.queue.wires)])
    opened = [((), figures.wires_opened)]
    yield counter("sutazai_rabbitmq_connections_opened", "Times one was opened; many tell of trouble.", opened)
    published = [((outcome.name.lower(),), figures.outcomes[outcome.name.lower()]) for outcome in Outcome]
    text = "Messages published from here, by what became of them."
    yield counter("sutazai_rabbitmq_published", text, published, ("outcome",))
    replaced = [((), figures.replaced)]
    yield counter("sutazai_rabbitmq_publishers_replaced", "Channels given up after refusals, or broken.", replaced)
    letters = [((what,), count) for what, count in side.dead_letters.counts.items()]
    yield counter("sutazai_dead_letters", "What the broker gave up and this process saw.", letters, ("what",))
    label = ("source", "shard")
    behind = [((each.source.value, each.shard), each.behind) for each in side.broadcasts]
    text = "Positions not yet told on the stream, where this process tells them; else 0."
    yield gauge("sutazai_broadcast_behind", text, behind, label)
    behind_s = [((each.source.value, each.shard), each.behind_s) for each in side.broadcasts]
    yield gauge("sutazai_broadcast_behind_seconds", "For how long the oldest of them waits.", behind_s, label)
    carried = [((each.source.value, each.shard), each.carried) for each in side.broadcasts]
    yield counter("sutazai_broadcast_notices", "Events and messages told on the stream from here.", carried, label)


def database_gauges(states: Sequence[ServersState]) -> Iterator[Metric]:
    """What is known of the servers of databases that have several; a server may have several databases."""
    servers: dict[tuple[str], list[ServerState]] = {}
    for server in chain.from_iterable(state.servers for state in states):
        servers.setdefault((server.name,), []).append(server)
    label = ("server",)
    up = ((name, any(one.is_primary is not None for one in same)) for name, same in servers.items())
    yield gauge("sutazai_database_up", "Whether a server of the database answers.", up, label)
    primary = ((name, any(one.is_primary for one in same)) for name, same in servers.items())
    yield gauge("sutazai_database_primary", "Whether it is the server of the database that writes.", primary, label)
    late = {name: [one for one in same if one.lag_s is not None] for name, same in servers.items()}
    lag = ((name, max(one.lag_s or 0.0 for one in same)) for name, same in late.items() if same)
    yield gauge("sutazai_database_lag_seconds", "How late a replica of the database is.", lag, label)
    behind = ((name, max(one.behind_bytes or 0 for one in same)) for name, same in late.items() if same)
    yield gauge("sutazai_database_behind_bytes", "What a replica has not replayed of the log.", behind, label)
    reads = ((name, sum(one.reads for one in same)) for name, same in servers.items())
    yield counter(
        "sutazai_database_reads", "Reads of clients, by the server of the database that answered.", reads, label
    )
    misses = [((), sum(state.misses for state in states))]
    yield counter("sutazai_database_misses", "Reads that a replica gave up, to another server.", misses)
    changes = [((), sum(state.primary_changes for state in states))]
    yield counter("sutazai_database_primary_changes", "Times that another server became the primary.", changes)


def _nodes(pipeline: Pipeline) -> Iterator[Metric]:
    fleet = pipeline.routed.fleet
    named = [((state.node.name,), state) for state in fleet.states()]
    node = ("node",)
    in_flight = ((name, state.in_flight) for name, state in named)
    yield gauge("sutazai_node_in_flight", "Requests at the node from this gateway.", in_flight, node)
    yield gauge("sutazai_node_slots", "Requests it works on at once.", ((n, s.slots) for n, s in named), node)
    up = ((name, state.health is Health.UP) for name, state in named)
    yield gauge("sutazai_node_up", "Whether it takes requests.", up, node)
    open_ = (((view.node, view.model), view.position is not Position.CLOSED) for view in fleet.breakers())
    yield gauge("sutazai_breaker_open", "Whether a model on a node is left alone.", open_, ("node", "model"))
    breakers = fleet.experience.breakers
    yield counter("sutazai_breakers_opened", "Times a breaker opened.", [((), breakers.opened)])
    ejected = [((), breakers.ejected)]
    yield counter("sutazai_outliers_ejected", "Times a node was left alone for being far worse.", ejected)


def _line(pipeline: Pipeline) -> Iterator[Metric]:
    admitted = pipeline.admitted
    yield gauge("sutazai_waiting", "Requests in line for a slot.", [((), admitted.waiting)])
    ends = [
        (("served",), admitted.served),
        (("left",), admitted.left),
        (("expired",), admitted.expired),
        (("shed_greedy",), admitted.shed_greedy),
        (("shed_full",), admitted.shed_full),
        (("refused_late",), admitted.refused_late),
    ]
    yield counter("sutazai_line", "Requests that waited or were to wait, by what became of them.", ends, ("end",))
    by_model = (((model,), count) for model, count in admitted.waiting_by_model().items())
    yield gauge("sutazai_waiting_by_model", "Requests in line, by model.", by_model, ("model",))


def _stages(pipeline: Pipeline) -> Iterator[Metric]:
    typed, batched, hedged = pipeline.typed, pipeline.batched, pipeline.hedged
    chosen = (((kind.value,), count) for kind, count in typed.chosen.items())
    yield counter("sutazai_typed", "Requests whose model was chosen, by what was asked.", chosen, ("kind",))
    yield counter("sutazai_fallbacks", "Requests given to the next model of a chain.", [((), typed.fallbacks)])
    shared = [((), pipeline.coalesced.coalesced)]
    yield counter("sutazai_coalesced", "Requests that shared an answer under way.", shared)
    yield counter("sutazai_batches", "Calls that several requests shared.", [((), batched.batches)])
    yield counter("sutazai_batched_requests", "Requests in such calls.", [((), batched.batched_requests)])
    yield counter("sutazai_bisections", "Batches asked again in parts.", [((), batched.bisections)])
    yield counter("sutazai_hedged", "Embeddings asked of a second node.", [((), hedged.hedged)])
    yield counter("sutazai_hedges_won", "Of these, answered by the second first.", [((), hedged.won)])


def _cache(pipeline: Pipeline) -> Iterator[Metric]:
    cached, limited = pipeline.cached, pipeline.limited
    yield counter("sutazai_limits_refused", "Requests over a limit.", [((), limited.refused)])
    yield counter("sutazai_limits_alone", "Requests counted here because Redis was away.", [((), limited.alone)])
    if cached is None:
        return
    given = [(("l1",), cached.hits_l1), (("l2",), cached.hits_l2), (("stale",), cached.stale)]
    yield counter("sutazai_cache_hits", "Requests answered from a cache.", given, ("tier",))
    yield counter("sutazai_cache_misses", "Requests that might have been.", [((), cached.misses)])
    yield counter("sutazai_cache_refreshed", "Answers made anew before their time.", [((), cached.refreshed)])
    yield counter("sutazai_cache_store_errors", "Questions to Redis that came to nothing.", [((), cached.store_errors)])
    yield gauge("sutazai_cache_bytes", "Answers in this process, in bytes.", [((), cached.size_bytes)])
    yield gauge("sutazai_cache_entries", "Answers in this process.", [((), cached.entries)])
