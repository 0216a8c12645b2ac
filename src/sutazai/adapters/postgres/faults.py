"""What goes wrong on the way to PostgreSQL, told as `StoreUnavailable` and without the password."""

from __future__ import annotations

from collections.abc import Iterator
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


@contextmanager
def told_as_unavailable(timeout_s: float) -> Iterator[None]:
    """Raise what the driver, the network or the clock raised as `StoreUnavailable`, without the password."""
    try:
        yield
    except TimeoutError as error:
        raise StoreUnavailable(f"The database did not answer within {timeout_s:g} s. {REMEDY}") from error
    except DBAPIError as error:
        raise StoreUnavailable(f"The database refused: {error.orig}. {REMEDY}") from error
    except asyncpg.PostgresError as error:
        raise StoreUnavailable(f"The database refused: {error.args[0]}. {REMEDY}") from error
    except OSError as error:
        raise StoreUnavailable(f"The database was not reached: {error.strerror or error}. {REMEDY}") from error
    except (asyncpg.InterfaceError, asyncpg.InternalClientError) as error:
        raise StoreUnavailable(f"The connection to the database broke: {error}. {REMEDY}") from error


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
