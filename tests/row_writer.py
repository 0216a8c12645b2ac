"""
A client in a network of its own, for tests that cut networks: `row_writer.py URL FIRST`.

Writes rows `FIRST`, `FIRST + 1` and so on, one after another, and prints a line for each: `row`, its number, when it
was begun and when that ended (seconds of the monotonic clock), and the address of the server that kept it, or `-`.
"""

from __future__ import annotations

import asyncio
import sys
import time
from itertools import count

from sutazai.adapters.postgres.database import open_database
from sutazai.core.errors import StoreUnavailable
from sutazai.settings.secret import Secret

LIMIT_S = 5.0
PAUSE_S = 0.02


async def main(url: str, first: int) -> None:
    """Until it is killed."""
    async with open_database(Secret(url), timeout_s=LIMIT_S) as database:
        for number in count(first):
            began = time.monotonic()
            try:
                async with database.transaction() as connection:
                    server = await connection.fetchval("SELECT host(inet_server_addr())")
                    await connection.execute("INSERT INTO notes VALUES ($1)", number)
            except StoreUnavailable:
                server = "-"
            sys.stdout.write(f"row {number} {began} {time.monotonic()} {server}\n")
            sys.stdout.flush()
            await asyncio.sleep(PAUSE_S)


asyncio.run(main(sys.argv[1], int(sys.argv[2])))
