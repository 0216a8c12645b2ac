"""
The process that holds one model: llama.cpp's own server, from a wheel.

`python -m sutazai.adapters.llamacpp.engine` reads one line of JSON, an `Order`, from standard input, loads
the model, writes one line, a `Ready`, to standard output, and serves on a free port of 127.0.0.1. On SIGTERM
it ends when its requests are done. When standard input closes, its parent has died, and it ends at once.

A process of its own, because leaving the interpreter while llama.cpp generates crashes it, and because memory
that a server lost comes back only with the process.
"""

from __future__ import annotations

import asyncio
import importlib
import math
import os
import re
import signal
import sys
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from types import ModuleType

    from xllamacpp import CommonParams, Server

NO_WHEEL = 3
"""Exit status: the wheel is missing or could not be loaded."""

NO_MODEL = 4
"""Exit status: llama.cpp refused the model; its reasons are on standard error."""

PROMPT_CACHE_MIB = 256
"""For prompts seen before. llama.cpp would keep 8 GiB of them."""

POLL_S = 0.05

BUSY = re.compile(r"^llamacpp:requests_(?:processing|deferred) [1-9]", re.MULTILINE)


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What to serve. It comes by standard input, so that no process list shows the key."""

    model_path: str
    name: str
    slots: int
    context_tokens: int
    """Of one slot."""
    threads: int
    batch_tokens: int = 2048
    """Tokens computed at once, and with that the longest input of an embedding; no more than the context."""
    api_key: str
    drain_s: float
    """How long requests may take to finish after SIGTERM."""


class Ready(msgspec.Struct, frozen=True, kw_only=True):
    """The engine answers from now on."""

    url: str
    model: str
    pid: int


def main() -> int:
    """Serve until told to end; the result is the exit status."""
    # Ctrl-C reaches every process of the terminal; the parent ends us in its time.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    order = msgspec.json.decode(sys.stdin.buffer.readline(), type=Order)
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever llama.cpp prints goes to the log
    try:
        llamacpp = _load_wheel()
    except ImportError as error:
        sys.stderr.write(f"{error}\n")
        return NO_WHEEL
    try:
        server = llamacpp.Server(_params(llamacpp, order))
    except RuntimeError as error:
        sys.stderr.write(f"{error}\n")
        return NO_MODEL
    ready = Ready(url=server.listening_address, model=order.name, pid=os.getpid())
    os.write(answers, msgspec.json.encode(ready) + b"\n")
    if not asyncio.run(_serve(server, order.drain_s)):
        # To delete a busy server takes up to 30 s, and to leave the interpreter beside one crashes it.
        os._exit(0)
    del server
    return 0


def _load_wheel() -> ModuleType:
    # Threads of OpenMP that spin while they wait take nine tenths of the speed when a neighbour is busy.
    os.environ |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
    return importlib.import_module("xllamacpp")


def _params(llamacpp: ModuleType, order: Order) -> CommonParams:
    params = llamacpp.CommonParams()
    params.model.path = order.model_path
    params.model_alias = {order.name}
    params.n_parallel = order.slots
    params.n_ctx = order.slots * order.context_tokens
    # Apart, the caches of the slots make batches of embeddings that are cut, and their means wrong.
    params.kv_unified = True
    params.kv_unified_per_slot = order.context_tokens
    batch_tokens = min(order.context_tokens, order.batch_tokens)
    # What the slots do not divide makes llama.cpp abort (its issue 27175).
    params.n_batch = params.n_ubatch = math.ceil(batch_tokens / order.slots) * order.slots
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = order.threads
    params.cache_ram_mib = PROMPT_CACHE_MIB
    params.embedding = True  # with pooling set, one server answers chats and embeddings
    params.pooling_type = llamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    params.use_jinja = True
    _open_door(params, order.api_key)
    return params


def _open_door(params: CommonParams, api_key: str) -> None:
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.api_keys = [api_key]
    params.ui = False
    params.cors_origins = ""
    params.cors_origins_explicit = True
    params.endpoint_slots = params.endpoint_metrics = True
    params.verbosity = 1  # errors; more is several lines a request


async def _serve(server: Server, drain_s: float) -> bool:
    """Wait for the end, then for the requests under way; False when some are left."""
    told = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)
    async with asyncio.TaskGroup() as group:
        orphaned = group.create_task(_standard_input_closed(), name="watch the parent")
        orphaned.add_done_callback(lambda _: told.set())
        await told.wait()
        for _ in range(math.ceil(drain_s / POLL_S)):
            if orphaned.done() or not _is_busy(server):
                break
            await asyncio.sleep(POLL_S)
        orphaned.cancel()
    return not _is_busy(server)


async def _standard_input_closed() -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    await reader.read()


def _is_busy(server: Server) -> bool:
    return BUSY.search(server.handle_metrics()) is not None


if __name__ == "__main__":
    sys.exit(main())
