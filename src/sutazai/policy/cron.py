"""When a cron expression is due, in a time zone with its summer and winter time."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError

from sutazai.core.errors import BadRequest

FIELDS = 5
MAX_CHARACTERS = 200


def check(cron: str, timezone: str) -> None:
    """Raises `BadRequest` for what is no cron expression, is never due, or is no time zone."""
    zone(timezone)
    if len(cron) > MAX_CHARACTERS or len(cron.split()) != FIELDS or not cron.isascii():
        raise BadRequest("cron was not five fields like `30 4 * * MON-FRI`.", where="cron")
    next_due(cron, timezone, after=datetime(2024, 1, 1, tzinfo=UTC))


def next_due(cron: str, timezone: str, *, after: datetime) -> datetime:
    """The first time after that one, in UTC. Raises as `check` does."""
    return _first(cron, after.astimezone(zone(timezone)), reverse=False)


def last_due(cron: str, timezone: str, *, until: datetime) -> datetime:
    """The last time up to and with that one, in UTC. Raises as `check` does."""
    # cronsim looks at whole minutes before the given one.
    minute = until.astimezone(UTC).replace(second=0, microsecond=0) + timedelta(minutes=1)
    return _first(cron, minute.astimezone(zone(timezone)), reverse=True)


def zone(timezone: str) -> ZoneInfo:
    """Raises `BadRequest` where there is none of that name."""
    try:
        return ZoneInfo(timezone)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise BadRequest("timezone was none that is known; give one like `Europe/Berlin`.", where="timezone") from error


def _first(cron: str, start: datetime, *, reverse: bool) -> datetime:
    try:
        found: datetime = next(CronSim(cron, start, reverse=reverse))
    except CronSimError as error:
        raise BadRequest(
            f"cron was not understood: {error}. Give five fields like `30 4 * * *`.", where="cron"
        ) from error
    except StopIteration as error:
        raise BadRequest("cron was a time that never comes.", where="cron") from error
    return found.astimezone(UTC)
