"""
Every setting, its unit, its default and the reason for that default.

The groups are frozen and work untouched. Components get the group they need, never the whole. The reference page
(`docs/reference/settings.md`) is generated from this file, so a docstring here is what a user reads.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from sutazai.settings.secret import Secret

KIB = 1024
MIB = 1024 * KIB


class Group(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the settings file."""


class Server(Group, frozen=True):
    """The address that clients use, and what one of them may cost."""

    host: str = "127.0.0.1"
    """Address to listen on. Anything but loopback needs a key: see `sutazai keys create`."""

    port: int = 10010
    """TCP port; 0 takes a free one."""

    allowed_hosts: tuple[str, ...] = ()
    """Further `Host` names to answer to while no key is needed. Loopback, addresses, names without a dot and
    `.local`, `.internal`, `.localhost` always are; others could be a web page that points its own name at you."""

    allowed_origins: tuple[str, ...] = ()
    """Web pages (`https://chat.example.org`, or `*`) whose scripts may call while no key is needed. None by default."""

    max_connections: int = 10_000
    """Open client connections; further ones are closed at once."""

    max_head_bytes: int = 32 * KIB
    """Request line and headers together."""

    max_body_bytes: int = 32 * MIB
    """One request body: several images in base64 fit."""

    max_buffered_bytes: int = 512 * MIB
    """All request bodies in memory together; past it new ones are told to come back."""

    head_timeout_s: float = 5.0
    """From the first byte of a request to the end of its headers."""

    body_timeout_s: float = 30.0
    """From the end of the headers to the end of the body."""

    keep_alive_s: float = 75.0
    """How long an idle connection stays open. Longer than the 60 s most load balancers use, so they close first."""

    write_timeout_s: float = 30.0
    """How long a client may read nothing of an answer before it is cut off."""

    unready_s: float = 0.0
    """On SIGTERM, seconds to answer `/readyz` with 503 and still accept, so that a load balancer looks elsewhere."""

    drain_s: float = 30.0
    """On SIGTERM, seconds for requests under way to finish."""


class Auth(Group, frozen=True):
    """Who may ask."""

    required: bool = False
    """Ask for a key on loopback too. Elsewhere one is always needed."""


class Database(Group, frozen=True):
    """Where keys and usage are kept."""

    url: Secret | None = None
    """`postgresql://user:password@host/name`. Left out, a PostgreSQL of our own runs below `data_dir`."""

    data_dir: str = ""
    """Folder for the embedded PostgreSQL and run-time files. Empty: `/var/lib/sutazai` for root,
    `~/.local/share/sutazai` for others."""

    timeout_s: float = 5.0
    """Bound on each statement."""


class NodeSettings(Group, frozen=True):
    """One model server: a `[[nodes]]` table."""

    url: str
    """Base address, such as `http://10.0.0.5:11434`; a trailing `/v1` is dropped."""

    kind: Literal["ollama", "openai", "llamacpp"] = "ollama"
    """`ollama`; `openai` for vLLM, LM Studio and other servers with that API; `llamacpp` for llama.cpp's own server."""

    name: str = ""
    """What replies and metrics call it. Empty: host and port."""

    slots: int | None = None
    """Requests it works on at once. Left out, llama.cpp is asked, Ollama is taken to have 1 (the default of its
    `OLLAMA_NUM_PARALLEL`), and others 64."""

    models: tuple[str, ...] = ()
    """Offer only these models from it. Empty: all."""

    api_key: Secret | None = None
    """Sent to the node as a bearer token."""


class DnsSource(Group, frozen=True):
    """A name whose addresses are nodes: Swarm's `tasks.NAME`, a Kubernetes headless service."""

    name: str
    """The host name; each address it resolves to is one node."""

    port: int = 11434
    """TCP port of the nodes."""

    kind: Literal["ollama", "openai", "llamacpp"] = "ollama"
    """As in `[[nodes]]`."""

    slots: int | None = None
    """As in `[[nodes]]`."""

    api_key: Secret | None = None
    """As in `[[nodes]]`."""


class Discovery(Group, frozen=True):
    """Nodes that nobody listed."""

    ollama: bool = True
    """Use an Ollama at `OLLAMA_HOST`, or else at 127.0.0.1:11434, when one answers there and `[[nodes]]` is empty."""

    dns: tuple[DnsSource, ...] = ()
    """Names to resolve again and again."""

    refresh_s: float = 5.0
    """How often."""


class ModelSettings(Group, frozen=True):
    """One model: a `[models."NAME"]` table."""

    context_buckets: tuple[int, ...] = (4096, 8192, 16384, 32768, 65536, 131072)
    """Context lengths (tokens) that Ollama may load it with. A client's `num_ctx` is raised to the next one, or to
    what is loaded already where that is enough: each other value would reload the model for everybody."""

    load_options: dict[str, int | float | bool] = {}
    """Other options that force a reload (`num_gpu`, `num_batch`, `num_thread`, ...), fixed for all; what clients send
    for them is dropped."""


class Routing(Group, frozen=True):
    """How a node is chosen."""

    head_start: int = 1
    """Requests handed to a node beyond its slots, so that it never waits for us. They wait in the node's own line,
    where nothing can be reordered, so keep it small."""

    slow_start_s: float = 10.0
    """A node that came back gets its full share only after this long."""

    failure_penalty_s: float = 10.0
    """A failed request counts as if still in flight for about this long, so failing fast attracts nothing."""


class Queue(Group, frozen=True):
    """Requests that wait in the gateway for a free slot."""

    max_waiting: int = 1024
    """For all models together; further ones are told to come back."""

    max_wait_s: float = 120.0
    """After that the client is told to come back."""


class HealthSettings(Group, frozen=True):
    """How nodes are probed."""

    interval_s: float = 5.0
    """Between two probes of a node."""

    timeout_s: float = 2.0
    """Bound on one probe."""

    failures: int = 3
    """Consecutive failures, of probes or requests, that take a node out."""


class Retry(Group, frozen=True):
    """Trying another node before the first byte was sent to the client."""

    attempts: int = 3
    """Nodes tried for one request at most."""

    budget_ratio: float = 0.2
    """Retries per request over the last ten seconds; past it failures are passed on, so that a sick pool is not
    given more work than a healthy one."""

    budget_minimum_per_s: float = 3.0
    """Retries always allowed, so that small pools can retry at all."""

    backoff_s: float = 0.025
    """Upper bound of the first random pause; doubles with each attempt."""

    backoff_max_s: float = 1.0
    """Upper bound of any pause."""


class Timeouts(Group, frozen=True):
    """How long a node may take."""

    connect_s: float = 2.0
    """To accept a connection."""

    first_token_s: float = 600.0
    """To begin to answer, and for an answer that does not stream, to give it whole. Loading a large model takes
    minutes; ten are also what OpenAI's own clients wait."""

    idle_s: float = 60.0
    """Between two parts of an answer."""

    total_s: float = 1800.0
    """For the whole answer."""

    keep_alive_s: float = 10.0
    """A stream that has no token yet gets a sign of life this often: load balancers cut silent connections."""


class Engine(Group, frozen=True):
    """llama.cpp inside `sutazai up`."""

    enabled: Literal["auto", "always", "never"] = "auto"
    """`auto` starts it when models are named below, or when no other node was found."""

    models: tuple[str, ...] = ()
    """GGUF files to serve, one process each. Empty: the small trial model that ships with SutazAI."""

    slots: int = 4
    """Requests worked on at once, in one batch."""

    context_tokens: int = 4096
    """Context length of one slot."""

    threads: int = 0
    """0: one fewer than the machine has cores, at least one, so that the gateway is not starved."""

    max_rss_bytes: int = 0
    """Restart the engine, when it is idle, past this much memory. 0: the model's size and 2 GiB."""


class Logs(Group, frozen=True):
    """What is written to standard error."""

    format: Literal["auto", "json", "text"] = "auto"
    """`auto`: text in a terminal, JSON lines elsewhere."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """The least that is written."""

    access: bool = True
    """One line for each request."""


class Settings(Group, frozen=True):
    """The whole file."""

    server: Server = Server()
    auth: Auth = Auth()
    database: Database = Database()
    nodes: tuple[NodeSettings, ...] = ()
    discovery: Discovery = Discovery()
    models: dict[str, ModelSettings] = {}
    routing: Routing = Routing()
    queue: Queue = Queue()
    health: HealthSettings = HealthSettings()
    retry: Retry = Retry()
    timeouts: Timeouts = Timeouts()
    engine: Engine = Engine()
    logs: Logs = Logs()
