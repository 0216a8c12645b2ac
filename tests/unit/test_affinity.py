"""What a gateway remembers of conversations and beginnings: a bounded guess, the same for all gateways."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from sutazai.core.request import Endpoint, Request
from sutazai.gateway.affinity import FIRST_BLOCK, LAST_BLOCK, Recent, beginnings_of, home_of

conversations = st.binary(min_size=1, max_size=20)
nodes = st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=8), unique=True, min_size=1, max_size=8)


def asked(body: bytes, *, tenant: str = "local", model: str = "m") -> Request:
    return Request("r", Endpoint.OPENAI_CHAT, model, False, body, tenant, "", 0.0)


@given(conversations, nodes, st.randoms())
def test_the_home_of_a_conversation_does_not_depend_on_the_order_of_nodes(
    conversation: bytes, names: list[str], shuffled: random.Random
) -> None:
    others = list(names)
    shuffled.shuffle(others)

    assert home_of(conversation, names) == home_of(conversation, others)


@given(conversations, nodes, st.data())
def test_only_the_conversations_of_a_node_that_leaves_move(
    conversation: bytes, names: list[str], data: st.DataObject
) -> None:
    leaving = data.draw(st.sampled_from(names))
    home = home_of(conversation, names)
    left = [name for name in names if name != leaving]

    assert home == leaving or home_of(conversation, left) == home


def test_conversations_are_spread_evenly() -> None:
    """Within five standard deviations of a quarter each."""
    homes = Counter(home_of(b"%d" % number, ["a", "b", "c", "d"]) for number in range(4000))

    assert all(abs(count - 1000) < 5 * (4000 * 3 / 16) ** 0.5 for count in homes.values())


def test_nobody_is_the_home_where_there_is_no_node() -> None:
    assert home_of(b"c", []) == ""


@given(st.binary(max_size=3 * LAST_BLOCK), st.binary(max_size=64), st.integers(0, 3 * LAST_BLOCK))
def test_two_requests_share_as_many_beginnings_as_they_begin_alike(body: bytes, other_end: bytes, cut: int) -> None:
    other = body[:cut] + other_end
    alike = next((at for at, (one, two) in enumerate(zip(body, other, strict=False)) if one != two), None)
    if alike is None:
        alike = min(len(body), len(other))
    ours, theirs = beginnings_of(asked(body)), beginnings_of(asked(other))
    shared = sum(one == two for one, two in zip(ours, theirs, strict=False))

    sizes = [FIRST_BLOCK << number for number in range(4)]
    assert sizes[-1] == LAST_BLOCK
    assert len(ours) == sum(size <= len(body) for size in sizes)
    assert shared == sum(size <= alike for size in sizes)


def test_beginnings_are_of_one_tenant_and_one_model() -> None:
    body = b"x" * 4000
    of_all = [
        *beginnings_of(asked(body)),
        *beginnings_of(asked(body, tenant="other")),
        *beginnings_of(asked(body, model="other")),
    ]

    assert len(set(of_all)) == len(of_all) == 6


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 30)), max_size=200), st.integers(2, 20))
def test_a_table_never_holds_more_than_it_may_and_never_tells_an_old_value(
    events: list[tuple[bool, int]], most: int
) -> None:
    table = Recent[int, int](most)
    truth: dict[int, int] = {}
    for number, (is_put, key) in enumerate(events):
        if is_put:
            table.put(key, number)
            truth[key] = number
            assert table.get(key) == number
        else:
            assert table.get(key) in {None, truth.get(key)}

        assert len(table) <= most


def test_what_is_used_stays_and_what_is_not_is_forgotten() -> None:
    table = Recent[int, str](10)
    table.put(-1, "used")
    table.put(-2, "left alone")
    for number in range(100):
        table.put(number, "passing")
        table.get(-1)

    assert table.get(-1) == "used"
    assert table.get(-2) is None
