"""Which answers may be given to others, and what the client has to say about it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sutazai.core import errors
from sutazai.core.errors import NodeRejected, NodeTimeout, NodeUnreachable, NoHealthyNode, Overloaded, SutazaiError
from sutazai.core.request import Operation
from sutazai.policy.cacheability import (
    IDLE_FIELDS,
    RANDOM_SEEDS,
    STATEFUL_FIELDS,
    CacheRules,
    Directives,
    directives_in,
    may_be_replaced,
    why_not_shared,
)

PAGE = Path(__file__).parents[2] / "docs" / "explanation" / "caching.md"
RULES = CacheRules(
    memory_ttl_s=60.0,
    chat_ttl_s=300.0,
    embedding_ttl_s=3600.0,
    max_answer_bytes=1000,
    refresh_from_hits=8,
    stale_if_error_s=600.0,
)


@pytest.mark.parametrize(
    ("header", "meant"),
    [
        (b"", Directives()),
        (b"no-store", Directives(may_be_kept=False)),
        (b"no-cache", Directives(may_be_old=False, max_age_s=0.0)),
        (b"max-age=0", Directives(may_be_old=False, max_age_s=0.0)),
        (b"max-age=60", Directives(max_age_s=60.0)),
        (b'max-age="60"', Directives(max_age_s=60.0)),
        (b" max-age=60 , no-transform", Directives(max_age_s=60.0)),
        (b"max-age=60, max-age=5", Directives(max_age_s=5.0)),
        (b"no-cache, no-store", Directives(may_be_kept=False, may_be_old=False, max_age_s=0.0)),
        (b"max-age=soon", Directives(may_be_old=False, max_age_s=0.0)),
        (b"max-age", Directives(may_be_old=False, max_age_s=0.0)),
        (b"max-age=-5", Directives(may_be_old=False, max_age_s=0.0)),
        (b"only-if-cached, max-stale=5", Directives()),
    ],
)
def test_the_clients_header_means_what_http_says(header: bytes, meant: Directives) -> None:
    assert directives_in(header) == meant


@given(st.binary(max_size=100))
def test_any_header_at_all_is_understood_somehow(header: bytes) -> None:
    meant = directives_in(header)

    assert meant.max_age_s >= 0
    assert meant.may_be_old == (meant.max_age_s > 0)
    assert meant.may_be_shared <= meant.may_be_kept


@pytest.mark.parametrize("name", sorted(STATEFUL_FIELDS))
def test_a_request_that_is_more_than_a_question_is_not_shared(name: str) -> None:
    asked = {"model": "m", "prompt": "p", "temperature": 0}

    assert why_not_shared(asked | {name: "x"}, asked).startswith(f"{name}: ")
    assert why_not_shared(asked | {name: 0}, asked)  # `keep_alive: 0` drops the model
    assert why_not_shared(asked | {name: None}, asked) == ""
    assert why_not_shared(asked | {name: False}, asked) == ""


@pytest.mark.parametrize("seed", sorted(RANDOM_SEEDS))
def test_a_seed_that_means_another_each_time_is_none(seed: int) -> None:
    assert why_not_shared({}, {"seed": seed}).startswith("seed")
    assert why_not_shared({}, {"seed": float(seed), "temperature": 0.7}).startswith("seed")
    assert why_not_shared({}, {"seed": seed, "temperature": 0}) == ""
    assert why_not_shared({}, {"seed": 7}) == ""


def test_an_odd_seed_is_no_reason_to_fail() -> None:
    assert why_not_shared({}, {"seed": None}) == ""


@pytest.mark.parametrize(
    ("status", "size_bytes", "is_complete", "kept"),
    [
        (200, 1000, True, True),
        (200, 1001, True, False),
        (200, 1000, False, False),
        (201, 1000, True, False),
        (206, 1000, True, False),
        (400, 1000, True, False),
        (500, 1000, True, False),
    ],
)
def test_only_complete_good_answers_of_bearable_size_are_kept(
    status: int, size_bytes: int, is_complete: bool, kept: bool
) -> None:
    assert RULES.may_keep(status=status, size_bytes=size_bytes, is_complete=is_complete) is kept


def test_embeddings_are_kept_for_longer_than_chats() -> None:
    fresh_s = {operation: RULES.fresh_s(operation) for operation in Operation}

    assert fresh_s == {Operation.CHAT: 300.0, Operation.COMPLETION: 300.0, Operation.EMBEDDING: 3600.0}


@pytest.mark.parametrize(
    ("error", "replaced"),
    [
        (NodeUnreachable("It was reset.", node="a"), True),
        (NodeTimeout("It was silent.", node="a"), True),
        (NodeRejected("It broke.", node="a", status=500), True),
        (NodeRejected("It was busy.", node="a", status=429), True),
        (NodeRejected("It did not understand.", node="a", status=400), False),
        (NodeRejected("It has it no more.", node="a", status=404), False),
        (NoHealthyNode("All were down.", retry_after_s=5), True),
        (Overloaded("There was no room.", retry_after_s=5), True),
        (errors.Cancelled("An operator ended it."), False),
        (errors.UnknownModel("m", []), False),
        (errors.FellBehind("It was too slow."), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, SutazaiError) else str(value),
)
def test_an_old_answer_replaces_the_pools_faults_and_no_others(error: SutazaiError, replaced: bool) -> None:
    assert may_be_replaced(error) is replaced


def test_the_page_for_users_lists_the_same_fields() -> None:
    page = PAGE.read_text("utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|$", page, re.MULTILINE))
    idle = re.search(r"left out of the comparison: ([^.]+)\.", page.replace("\n", " "))

    assert rows == dict(STATEFUL_FIELDS)
    assert idle is not None
    assert set(re.findall(r"`(\w+)`", idle[1])) == IDLE_FIELDS
