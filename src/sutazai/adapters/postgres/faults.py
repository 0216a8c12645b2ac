"""What goes wrong on the way to PostgreSQL, told as `StoreUnavailable` and without the password."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import asyncpg
from sqlalchemy.exc import DBAPIError

from sutazai.core.errors import StoreUnavailable

REMEDY = "Check that PostgreSQL runs, and `database.url` in the settings."

LOST = (
    OSError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.TooManyConnectionsError,
)
"""What a server raises that is away, ending or not ready yet, before a transaction has begun on it."""


class CommitUnknown(StoreUnavailable):
    """The connection broke during a commit: it may have taken place, or may yet."""


class SlotMoved(StoreUnavailable):
    """The data of a tenant is in another shard by now, or on its way. Nothing was read or written."""


NOT_HERE = "SU421"
"""What `sutazai_enter` raises."""


@contextmanager
def told_as_unavailable(timeout_s: float, also: Callable[[], str] = str) -> Iterator[None]:
    """
    Raise what the driver, the network or the clock raised as `StoreUnavailable`, without the password.

    `also` is asked then for what else is to be said, such as what became of a transaction.
    """
    try:
        yield
    except (TimeoutError, DBAPIError, asyncpg.PostgresError, *LOST) as error:
        if getattr(error, "sqlstate", None) == NOT_HERE:
            raise SlotMoved("The data was being moved to another shard. Nothing was done; try again.") from error
        raise StoreUnavailable(" ".join(filter(None, (_said(error, timeout_s), also(), REMEDY)))) from error


def _said(error: BaseException, timeout_s: float) -> str:
    match error:
        case TimeoutError():
            return f"The database did not answer within {timeout_s:g} s."
        case DBAPIError():
            return f"The database refused: {error.orig}."
        case asyncpg.PostgresError():
            return f"The database refused: {error.args[0]}."
        case OSError():
            return f"The database was not reached: {error.strerror or error}."
    return f"The connection to the database broke: {error}."


@contextmanager
def address_hidden() -> Iterator[None]:
    """A malformed address raises a `ValueError` that may quote the password: no text and no cause is kept."""
    try:
        yield
    except ValueError:
        raise StoreUnavailable(
            "The address of the database was not understood. Write `database.url` as"
            " `postgresql://user:password@host/name`, and `%40` for an `@` in the password."
        ) from None
