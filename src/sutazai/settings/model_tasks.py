"""
Settings of the work that is done beside requests: tasks, their queues, and what agents may reach.

A part of `model`, where all groups are gathered.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from sutazai.settings.secret import Secret

KIB = 1024
MIB = 1024 * KIB


class Group(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the settings file."""


class Tasks(Group, frozen=True):
    """Durable work of agents."""

    worker: bool = True
    """Run a worker inside `sutazai up`. `sutazai worker` runs one by itself, `sutazai gateway` never does."""

    agents: tuple[str, ...] = ()
    """Run only these agents in workers. Empty: all that are installed."""

    slots: int = 32
    """Attempts that one worker has under way for the queue `task_processing`, and for each queue of its own."""

    llm_slots: int = 8
    """The same for `llm_inference`, whose tasks mostly wait for models."""

    model: str = ""
    """The model that agents ask where they name none. Empty: what `[auto]` chooses, or any model that is there."""

    max_length: int = 100_000
    """Tasks that may wait in one queue; past it submitters are told to come back, and nothing is dropped."""

    max_waiting_per_tenant: int = 10_000
    """Tasks of one tenant that may wait, unless it has a bound of its own (`sutazai tenants set`). Past it
    its clients are told to come back; tasks that agents make are counted and not refused."""

    promote_after_s: float = 60.0
    """Once tasks of a lower priority have waited for so long, one of ten that are started is of them, the longest
    waiting first, for as long as higher ones keep coming."""

    delivery_limit: int = 20
    """A task whose workers died so often is taken for the cause and becomes a dead letter."""

    max_inline_bytes: int = 256 * KIB
    """A result that is larger is kept in the object store, which gateways and workers must share; 16 MiB at most."""

    partition: Literal["month", "quarter"] = "month"
    """The time that one part of the tables of tasks and events holds. Parts that are there already stay as they are."""

    keep_months: int = 0
    """Parts older than this leave the database for the object store, below `archive`. 0: all stay."""

    statistics_s: float = 3600.0
    """Seconds between two counts of what each agent did on each day, which `sutazai db statistics` prints."""

    drain_s: float = 30.0
    """On SIGTERM, seconds for attempts to end; after that others start them again."""

    max_rss_bytes: int = 0
    """A worker past this much memory ends its attempts and begins anew. 0: never."""

    gateway_url: str = ""
    """Where `sutazai worker` finds a gateway for its agents. Empty: on this machine, as `[server]` says."""

    gateway_key: Secret | None = None
    """The admin key that it shows there, so that each task's own tenant pays."""


class Web(Group, frozen=True):
    """Requests of agents to the web, and webhooks: public addresses alone."""

    allowed: tuple[str, ...] = ()
    """Names, `name:port`, IP addresses and networks of your own that may be reached all the same."""

    timeout_s: float = 15.0
    """Of one request, from the name to the last byte."""

    max_page_bytes: int = MIB
    """Read of one page; the rest is left."""


class Agents(Group, frozen=True):
    """What the agents that ship may do."""

    http_get: bool = True
    """The assistant may read pages of the public web."""

    files_dir: str = ""
    """Where the assistant keeps files, a folder for each tenant; empty, it has none."""


class Webhooks(Group, frozen=True):
    """Telling the ends of tasks to the addresses that clients left."""

    secret: Secret | None = None
    """What the secret of each tenant is derived from, at least 16 characters; the same in all gateways. Left out, tasks
    with a webhook are refused."""


class Rabbitmq(Group, frozen=True):
    """Queues of tasks in a RabbitMQ. Left out, they are tables of the database."""

    url: Secret | None = None
    """`amqp://user:password@host:5672,host:5672/vhost`, the nodes of one cluster; `amqps` for TLS."""

    management_url: Secret | None = None
    """`http://user:password@host:15672` of the management plugin, which `sutazai doctor` alone asks: for majorities,
    alarms and partitions. Left out, it looks at what AMQP tells."""

    prefix: str = ""
    """Before the name of each queue and a dot, so that others can use the same virtual host. Empty: the names alone."""

    publishers: int = 10
    """Connections to publish on; a further one is opened only when those that are open are busy."""

    consumers: int = 40
    """Connections to read from, one for each consumer, so that a queue that is written to fast slows no reader."""

    connect_timeout_s: float = 3.0
    """For one node to accept a connection; then another is tried."""

    confirm_timeout_s: float = 3.0
    """For a node to confirm what was published; then it is published again through another node."""

    timeout_s: float = 10.0
    """Bound on one call, all nodes that it tries together. An election takes half a second; a node whose host
    vanished is given up by the others after `net_ticktime`, for which 10 seconds are advised as well."""

    heartbeat_s: int = 10
    """Between signs of life, in both directions. With 60 a host that vanished without a word was measured to stall its
    clients for two minutes; RabbitMQ's own advice is 5 to 20."""

    prefetch_slow: int = 1
    """Messages that a worker holds for each attempt that it may have under way, that one's own included, so 1 lets none
    wait. One that was fetched and never begun counts as delivered when its worker dies: with 10 of them and workers
    that kept crashing, 20 of 60 tasks were never run."""

    prefetch_fast: int = 10
    """The same for a queue whose tasks have all taken less than a tenth of a second for half a minute."""

    max_length: int = 100_000
    """Messages in one queue; past it they are refused, and whoever submits is told."""

    delivery_limit: int = 20
    """A message that was delivered more often without being acknowledged goes to `dead_letters`."""

    replicas: int = 3
    """Nodes that keep a copy of each queue: of three one may be lost, of five two."""

    llm_inference: Literal["quorum", "classic"] = "quorum"
    """Kind of the queue `llm_inference`. A classic one lives on one node, and is away for as long as that node is."""

    stream_days: int = 7
    """How long events stay in the stream `agent_coordination`."""


class Objects(Group, frozen=True):
    """Where files and the results of batches are kept."""

    url: str = ""
    """A folder, or `s3://bucket/prefix`. Empty: `objects` below `database.data_dir`. Gateways must share it."""
    endpoint: str = ""
    """Of a server with the API of S3, such as `http://minio:9000`. Empty: Amazon's."""
    access_key_id: Secret | None = None
    """For the bucket, with `secret_access_key`. Left out, the machine's own role is used."""
    secret_access_key: Secret | None = None
    """The secret of `access_key_id`."""
    region: str = "us-east-1"
    """Of the bucket."""
    timeout_s: float = 30.0
    """Bound on one call, or on one part of what is read in parts."""
    max_object_bytes: int = 256 * MIB
    """One object; larger ones are refused."""
