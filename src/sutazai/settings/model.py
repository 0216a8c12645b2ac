"""
Every setting, its unit, its default and the reason for that default.

The groups are frozen and work untouched. Components get the group they need, never the whole. The reference page
(`docs/reference/settings.md`) is generated from this file, so a docstring here is what a user reads.
"""

from __future__ import annotations

from typing import Literal

from sutazai.settings.model_tasks import KIB as KIB
from sutazai.settings.model_tasks import MIB as MIB
from sutazai.settings.model_tasks import Agents as Agents
from sutazai.settings.model_tasks import Group as Group
from sutazai.settings.model_tasks import Objects as Objects
from sutazai.settings.model_tasks import Rabbitmq as Rabbitmq
from sutazai.settings.model_tasks import Tasks as Tasks
from sutazai.settings.model_tasks import Web as Web
from sutazai.settings.model_tasks import Webhooks as Webhooks
from sutazai.settings.secret import Secret


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

    compress_from_bytes: int = 4 * KIB
    """Complete answers of at least this size are compressed for clients that accept it; streams never are."""

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
    """`postgresql://user:password@host/name`. Left out, a PostgreSQL of our own runs below `data_dir`. Several hosts,
    as in `postgresql://user@a,b:5433/name`, are a primary and its replicas, in any order."""

    replicas: tuple[Secret, ...] = ()
    """Addresses of further servers. Which one is the primary is found out, and found out again when it is gone."""

    replica_max_lag_s: float = 1.0
    """A replica that is later than this is read from only while there is no primary."""

    data_dir: str = ""
    """Folder for the embedded PostgreSQL and run-time files. Empty: `/var/lib/sutazai` for root,
    `~/.local/share/sutazai` for others."""

    timeout_s: float = 5.0
    """Bound on each statement."""

    pool_size: int = 20
    """Connections that each process keeps to a server once it needed them."""

    max_overflow: int = 40
    """Connections beyond those, opened in a rush and closed after it. Further callers wait within `timeout_s`."""

    pool_recycle_s: float = 3600.0
    """A connection that is older is replaced before it is used again."""

    pool_pre_ping: bool = True
    """Whether a connection is tried before anything is sent over it. A dead one is replaced unnoticed."""

    region: str = ""
    """Where this process runs. With `[[shards]]` it opens those of its region alone, and keeps data only of tenants
    whose home it is (`sutazai tenants set NAME --region`). Empty: there are no regions. Without `[[shards]]` it means
    nothing."""


class Shard(Group, frozen=True):
    """
    One of the databases that tenants' data is spread over: a `[[shards]]` table.

    `[database]` then keeps what is left: keys, tenants, the audit log, usage, and which shard has whom. Every process
    needs the same tables here; `sutazai shards add` takes a shard into use. Without any, `[database]` keeps all.
    """

    name: str
    """What commands call it. It stays the same when its servers change."""

    url: Secret | None = None
    """As in `[database]`, with the limits given there. Left out, it is `[database]` itself."""

    replicas: tuple[Secret, ...] = ()
    """Addresses of further servers of this shard, as in `[database]`."""

    region: str = ""
    """Where it is. Empty: there are no regions."""


class NodeSettings(Group, frozen=True):
    """One model server: a `[[nodes]]` table."""

    url: str
    """Base address, such as `http://10.0.0.5:11434`; a trailing `/v1` is dropped."""

    kind: Literal["ollama", "openai", "llamacpp"] = "ollama"
    """`ollama`; `openai` for vLLM, LM Studio and other servers with that API; `llamacpp` for llama.cpp's own server."""

    name: str = ""
    """What replies and metrics call it. Empty: host and port."""

    slots: int | Literal["adaptive"] | None = None
    """Requests it works on at once. Left out, llama.cpp is asked, Ollama is taken to have 1 (the default of its
    `OLLAMA_NUM_PARALLEL`), and others 64. `"adaptive"` finds out: more while answers begin as fast as ever, fewer
    when they begin to wait."""

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

    public: bool = False
    """Its answers may be shared among tenants, in the cache and while they are made. Only for models that know
    nothing which one tenant may have and another not."""

    fallback: tuple[str, ...] = ()
    """Models to ask in its place, in this order, when it is missing, overloaded or broken."""

    price_input: float = 0.0
    """Money for a million input tokens, in your currency; for budgets."""

    price_output: float = 0.0
    """Money for a million output tokens."""


class Routing(Group, frozen=True):
    """How a node is chosen."""

    head_start: int = 1
    """Requests handed to a node beyond its slots, so that it never waits for us. They wait in the node's own line,
    where nothing can be reordered, so keep it small."""

    slow_start_s: float = 10.0
    """A node that came back gets its full share only after this long."""

    failure_penalty_s: float = 10.0
    """A failed request counts as if still in flight for about this long, so failing fast attracts nothing."""

    affinity_weight: float = 0.2
    """How much a node that has the conversation already is worth, in loads: 1.0 = an idle one against a full one.
    A conversation is what `x-sutazai-session` names."""

    prefix_weight: float = 0.2
    """How much a node that was given the same beginning lately is worth, in loads, where all of it is the same."""


class Queue(Group, frozen=True):
    """Requests that wait in the gateway for a free slot."""

    max_waiting: int = 1024
    """For one model. Past it whoever has most waiting is told to come back."""

    max_waiting_bytes: int = 256 * MIB
    """Bodies that wait for one model, together."""

    max_wait_s: float = 120.0
    """After that the client is told to come back; at once where it is plain that it would take longer."""

    output_weight: float = 2.0
    """What a token that is given counts for fairness, where one that is read counts 1: it takes more of a node."""

    promote_after_s: float = 30.0
    """A priority that had to let higher ones pass for so long sends its first request one up, so that low ones are
    served at last."""

    swap_patience_s: float = 10.0
    """How long requests for a model that would have to be loaded let others pass which need no load."""


class AutoRule(Group, frozen=True):
    """One rule of `[auto]`: an `[[auto.rules]]` table."""

    contains: str
    """What the question holds, in any case."""

    kind: Literal["simple_queries", "complex_analysis", "code_generation"]
    """What the question is then taken for."""


class Auto(Group, frozen=True):
    """`model: "auto"`: a model chosen by what is asked. The first of a list that is there and well is taken."""

    name: str = "auto"
    """What clients call it. Empty: nothing is chosen for them."""

    simple_queries: tuple[str, ...] = ("tinyllama", "llama2:7b", "mistral:7b")
    """For questions with short answers."""

    complex_analysis: tuple[str, ...] = ("llama2:7b", "mistral:7b", "tinyllama")
    """For what takes several steps of thought, or a long text."""

    code_generation: tuple[str, ...] = ("mistral:7b", "llama2:7b", "tinyllama")
    """For programs."""

    rules: tuple[AutoRule, ...] = ()
    """Looked at first, in this order."""


class Batching(Group, frozen=True):
    """Embeddings and completions that share one call to a node."""

    max_requests: int = 16
    """Inputs in one call; 1 = each request by itself."""

    max_wait_s: float = 0.1
    """How long one waits for others while the model is busy; an idle one lets nobody wait."""


class Hedging(Group, frozen=True):
    """Asking a second node when the first is slow."""

    embeddings: bool = False
    """For embeddings, which cost little; the first answer counts."""

    after_quantile: float = 0.95
    """Of recent times to an answer: who waits longer than so many others did is asked again elsewhere."""


class Cache(Group, frozen=True):
    """Answers kept for those who ask the same: deterministic ones alone (temperature 0, a seed, embeddings)."""

    enabled: bool = True
    """Keep any at all."""

    memory_bytes: int = 100 * MIB
    """In this process."""

    memory_ttl_s: float = 60.0
    """How long in this process."""

    chat_ttl_s: float = 300.0
    """How long in Redis: chats and completions."""

    embedding_ttl_s: float = 3600.0
    """How long in Redis: embeddings."""

    max_answer_bytes: int = MIB
    """Larger answers are not kept."""

    refresh_from_hits: int = 8
    """An answer that was asked for so often is made anew shortly before it grows old; 0 = never."""

    stale_if_error_s: float = 600.0
    """So long past its time an answer is still given when no node can give another."""


class Redis(Group, frozen=True):
    """Memory that several gateways share: answers, limits, sessions. Left out, each has its own."""

    url: Secret | None = None
    """`redis://:password@host:6379/0`; `redis+sentinel://:password@host:26379,host:26379/main`;
    `redis+cluster://:password@host:6379,host:6379`. `rediss` for TLS."""

    timeout_s: float = 0.02
    """Bound on what a request waits for Redis, all in all."""

    prefix: str = "sutazai"
    """Before the name of each key, so that others can use the same Redis."""


class LimitSettings(Group, frozen=True):
    """What each tenant may take, unless it has limits of its own (`sutazai tenants set`)."""

    requests_per_minute: int | None = None
    """None: as many as there is room for."""

    tokens_per_minute: int | None = None
    """Input and output together."""

    bytes_per_minute: int | None = None
    """Of request bodies."""

    concurrent_requests: int | None = None
    """At once, those that wait in line too."""

    tokens_per_month: int | None = None
    """Calendar months, UTC."""

    money_per_month: float | None = None
    """In the currency of `price_input` and `price_output`."""

    burst_s: float = 60.0
    """How much of a limit per minute may be taken at once, in seconds of it."""


class Sessions(Group, frozen=True):
    """Conversations that the platform keeps."""

    ttl_s: float = 86_400.0
    """Forgotten after so long without a turn."""

    max_messages: int = 1000
    """In one session; the oldest beyond it are dropped."""

    max_bytes: int = 8 * MIB
    """Of all messages of one session; the oldest beyond it are dropped."""

    max_per_tenant: int = 10_000
    """Sessions of one tenant at a time."""


class Breaker(Group, frozen=True):
    """When a model on a node is left alone for a while."""

    window_s: float = 10.0
    """Requests that are looked at: those that ended within this time."""

    minimum_requests: int = 5
    """Fewer tell nothing."""

    error_ratio: float = 0.5
    """Opens when so many of them failed."""

    slow_s: float = 30.0
    """A request whose answer began later was slow."""

    slow_ratio: float = 0.8
    """Opens when so many were slow."""

    open_s: float = 5.0
    """After that single requests are let through to see; doubles each time they fail, up to 16 times."""

    max_ejected_ratio: float = 0.5
    """Of the nodes with a model, so many at most are left alone at once; one always stays."""


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

    slots: int = 0
    """Requests worked on at once, in one batch. 0: as `sutazai nodes tune --save` found, else 4."""

    context_tokens: int = 4096
    """Context length of one slot."""

    threads: int = 0
    """0: as tuned, else one for each core, without hyperthreads and within the CPU quota of the container, but so that
    one CPU is left to the gateway."""

    batch_tokens: int = 0
    """Tokens of prompts that are computed at once, and the longest input of an embedding. 0: as tuned, else 2048; never
    more than `context_tokens`."""

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
    shards: tuple[Shard, ...] = ()
    nodes: tuple[NodeSettings, ...] = ()
    discovery: Discovery = Discovery()
    models: dict[str, ModelSettings] = {}
    routing: Routing = Routing()
    queue: Queue = Queue()
    auto: Auto = Auto()
    batching: Batching = Batching()
    hedging: Hedging = Hedging()
    cache: Cache = Cache()
    redis: Redis = Redis()
    rabbitmq: Rabbitmq = Rabbitmq()
    objects: Objects = Objects()
    limits: LimitSettings = LimitSettings()
    sessions: Sessions = Sessions()
    tasks: Tasks = Tasks()
    web: Web = Web()
    agents: Agents = Agents()
    breaker: Breaker = Breaker()
    health: HealthSettings = HealthSettings()
    retry: Retry = Retry()
    timeouts: Timeouts = Timeouts()
    engine: Engine = Engine()
    webhooks: Webhooks = Webhooks()
    logs: Logs = Logs()
