"""When cron expressions are due."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sutazai.core.errors import BadRequest
from sutazai.policy.cron import check, last_due, next_due

CRONS = ("* * * * *", "*/7 3 * * *", "30 2 * * *", "0 0 1 * *", "15 12 * * MON-FRI")
ZONES = ("UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe")


@pytest.mark.parametrize(
    ("after", "due"),
    [
        ("2026-01-10T03:00:00+00:00", "2026-01-10T08:00:00+00:00"),
        ("2026-01-10T08:00:00+00:00", "2026-01-11T08:00:00+00:00"),
        ("2026-07-10T03:00:00+00:00", "2026-07-10T07:00:00+00:00"),
    ],
)
def test_a_time_is_meant_in_its_zone_in_summer_as_in_winter(after: str, due: str) -> None:
    found = next_due("0 9 * * *", "Europe/Berlin", after=datetime.fromisoformat(after))

    assert found == datetime.fromisoformat(due)


@given(
    cron=st.sampled_from(CRONS),
    zone=st.sampled_from(ZONES),
    now=st.datetimes(datetime(2024, 1, 1), datetime(2030, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001
)
def test_the_last_time_is_not_after_now_and_the_next_one_is(cron: str, zone: str, now: datetime) -> None:
    last, following = last_due(cron, zone, until=now), next_due(cron, zone, after=now)

    assert last <= now < following
    assert last_due(cron, zone, until=following) == following
    assert next_due(cron, zone, after=following - timedelta(seconds=1)) == following


@pytest.mark.parametrize(
    ("cron", "zone", "where"),
    [
        ("* * * *", "UTC", "cron"),
        ("* * * * * *", "UTC", "cron"),
        ("61 * * * *", "UTC", "cron"),
        ("0 0 30 2 *", "UTC", "cron"),
        ("", "UTC", "cron"),
        ("* * * * \N{ARABIC-INDIC DIGIT ONE}", "UTC", "cron"),
        ("* * * * *", "Mars/Olympus", "timezone"),
        ("* * * * *", "Europe", "timezone"),
        ("* * * * *", "../etc/passwd", "timezone"),
        ("* * * * *", "", "timezone"),
        ("* * * * *", "\0", "timezone"),
    ],
)
def test_what_is_no_time_is_refused_with_its_field(cron: str, zone: str, where: str) -> None:
    with pytest.raises(BadRequest) as refused:
        check(cron, zone)

    assert refused.value.where == where
