"""Events as they are kept: every kind comes back as it was, old forms are read, and what is not known is told."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sutazai.core.errors import StoreUnavailable
from sutazai.core.request import Priority
from sutazai.core.task import Completed, Event, Progressed, TaskDraft
from sutazai.ports.task_events import KINDS, Codec, KeptEvent, decode, encode

texts = st.text(st.characters(exclude_categories=["Cs"]))
st.register_type_strategy(
    datetime,
    st.datetimes(min_value=datetime(1971, 1, 1), max_value=datetime(2200, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001
)
st.register_type_strategy(str, texts)
drafts = st.builds(TaskDraft, priority=st.sampled_from(Priority), time_limit_s=st.floats(0, 1e6))
st.register_type_strategy(TaskDraft, drafts)


@given(st.sampled_from(sorted(KINDS)).flatmap(lambda kind: st.builds(KINDS[kind])))
def test_every_kind_comes_back_as_it_was(event: Event) -> None:
    assert decode(*encode(event)) == event


def test_every_event_has_a_kind_of_its_own() -> None:
    assert {made.__name__ for made in KINDS.values()} == {made.__name__ for made in Event.__subclasses__()}
    assert len(set(KINDS.values())) == len(KINDS)


def test_a_kept_event_gives_what_happened() -> None:
    event = Completed(3, '{"a": "\\u0000"}', tokens=7)
    kind, schema, data = encode(event)

    kept = KeptEvent(
        position=1, task="t", version=2, tenant="a", kind=kind, schema=schema, at=datetime.now(UTC), data=data
    )

    assert kept.event == event


@pytest.mark.parametrize(
    ("kind", "schema", "data"),
    [
        ("task.exploded", 1, "{}"),
        ("task.completed", 2, '{"fence":1,"result":"1"}'),
        ("task.completed", 0, '{"fence":1,"result":"1"}'),
        ("task.completed", 1, '{"fence":1}'),
        ("task.completed", 1, '{"fence":"one","result":"1"}'),
        ("task.completed", 1, "[]"),
        ("task.completed", 1, "{"),
        ("task.completed", 1, ""),
        ("task.failed", 1, '{"fence":1,"reason":"bad weather","error":""}'),
        ("task.retried", 1, '{"fence":1,"reason":"error","error":"","run_at":"yesterday"}'),
    ],
)
def test_what_is_not_known_is_told_and_never_guessed(kind: str, schema: int, data: str) -> None:
    with pytest.raises(StoreUnavailable, match=kind):
        decode(kind, schema, data)


def test_an_old_form_is_read_through_every_upcaster_in_turn() -> None:
    def with_number(fields: dict[str, Any]) -> dict[str, Any]:
        return {"number": fields["try"], "progress": fields["progress"]}

    def with_fence(fields: dict[str, Any]) -> dict[str, Any]:
        return {"fence": fields["number"], "progress": fields["progress"]}

    codec = Codec({("task.progressed", 1): with_number, ("task.progressed", 2): with_fence})
    newest = Progressed(4, "half")

    assert codec.encode(newest)[:2] == ("task.progressed", 3)
    assert codec.decode("task.progressed", 1, '{"try":4,"progress":"half"}') == newest
    assert codec.decode("task.progressed", 2, '{"number":4,"progress":"half"}') == newest
    assert codec.decode(*codec.encode(newest)) == newest


def test_an_old_event_that_an_upcaster_does_not_understand_is_told() -> None:
    codec = Codec({("task.progressed", 1): lambda fields: {"fence": fields["try"], "progress": ""}})

    with pytest.raises(StoreUnavailable, match=r"task\.progressed"):
        codec.decode("task.progressed", 1, '{"progress":"half"}')
    with pytest.raises(StoreUnavailable, match=r"task\.progressed"):
        codec.decode("task.progressed", 1, "[1]")


def test_fields_of_a_newer_program_are_passed_over_within_a_schema() -> None:
    data = msgspec.json.encode({"fence": 1, "progress": "half", "mood": "good"}).decode()

    assert decode("task.progressed", 1, data) == Progressed(1, "half")


def test_times_keep_their_microseconds() -> None:
    kind, schema, data = encode(KINDS["task.requeued"](datetime(2026, 1, 1, tzinfo=UTC) + timedelta(microseconds=1)))  # type: ignore[call-arg]

    assert "00.000001" in data
    assert encode(decode(kind, schema, data)) == (kind, schema, data)
