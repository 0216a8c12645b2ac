"""
Fake model servers for tests, and for people who want a pool to play with.

In a test: `async with FakeNode(NodeKind.OLLAMA, ("llama3",)) as node`, then point a client at `node.url`.
In a shell: `python -m sutazai.testing.fake_node --kind ollama --port 11500 --models llama3 --tokens 20
--between 0.02`.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack

from sutazai.core.node import NodeKind
from sutazai.testing.node import FakeNode
from sutazai.testing.received import Received
from sutazai.testing.script import Answer, Fault, ToolCall

__all__ = ["Answer", "FakeNode", "Fault", "Received", "ToolCall", "main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until SIGINT or SIGTERM. Raises `SystemExit` where a port is taken."""
    try:
        asyncio.run(_serve(_parser().parse_args(arguments)))
    except OSError as error:
        sys.exit(f"The port was taken; choose another with --port. ({error})")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sutazai.testing.fake_node",
        description="Serve made-up answers on 127.0.0.1 as an Ollama, a vLLM or a llama.cpp server would.",
        epilog="Example, a pool of three: --kind ollama --count 3 --models llama3,nomic-embed-text",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--kind", choices=[kind.value for kind in NodeKind], default="ollama", help="the server to play")
    add("--port", type=int, default=11500, help="TCP port; 0 takes a free one")
    add("--count", type=int, default=1, help="how many servers, on ports that follow each other")
    add("--models", default="llama3", help="names of models, with commas between them")
    add("--slots", type=int, default=4, help="requests worked on at once; further ones wait in order")
    add("--tokens", type=int, default=20, help="length of each answer")
    add("--first-token", type=float, default=0.2, metavar="SECONDS", help="time to the first token")
    add("--between", type=float, default=0.02, metavar="SECONDS", help="time between two tokens")
    add("--load", type=float, default=1.0, metavar="SECONDS", help="time an Ollama takes to load a model")
    add("--api-key", help="ask for this key as a bearer token")
    return parser


async def _serve(chosen: argparse.Namespace) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with AsyncExitStack() as stack:
        for index in range(chosen.count):
            node = await stack.enter_async_context(_node(chosen, chosen.port + index if chosen.port else 0))
            sys.stdout.write(f"{node.url} plays {chosen.kind} with {', '.join(node.models)}\n")
        sys.stdout.flush()
        await stop.wait()


def _node(chosen: argparse.Namespace, port: int) -> FakeNode:
    node = FakeNode(
        NodeKind(chosen.kind),
        [model for model in chosen.models.split(",") if model],
        slots=chosen.slots,
        load_s=chosen.load,
        api_key=chosen.api_key,
        port=port,
    )
    node.default = Answer(
        tokens=tuple(f"word{number} " for number in range(1, chosen.tokens + 1)),
        first_token_s=chosen.first_token,
        between_s=chosen.between,
    )
    return node


if __name__ == "__main__":
    main()
