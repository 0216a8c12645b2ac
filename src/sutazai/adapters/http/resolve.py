"""Names to addresses."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence

LIMIT_S = 5.0


async def resolve(name: str, port: int) -> Sequence[str]:
    """All addresses of a name, by the system's resolver. Raises `OSError`, within five seconds."""
    async with asyncio.timeout(LIMIT_S):
        found = await asyncio.get_running_loop().getaddrinfo(name, port, type=socket.SOCK_STREAM)
    return [str(address[4][0]) for address in found]
