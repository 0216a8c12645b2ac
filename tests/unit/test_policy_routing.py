"""Choosing a node: who may be chosen, who is preferred, and what failures cost."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sutazai.core.node import Health, LoadedModel, Node, NodeKind, NodeState
from sutazai.policy.routing import (
    FORGET,
    GENTLEST_RAMP,
    RoutingRules,
    is_warm,
    load,
    penalty_now,
    pick,
    ramp,
    takes,
)

MODEL = "llama3"
NOW = 1000.0
RULES = RoutingRules(head_start=1, slow_start_s=10.0, failure_penalty_s=10.0)

rules_of_any_kind = st.builds(
    RoutingRules,
    head_start=st.integers(0, 3),
    slow_start_s=st.floats(0, 60),
    failure_penalty_s=st.floats(0, 60),
)
seeds = st.integers(0, 2**32).map(random.Random)


@st.composite
def nodes(draw: st.DrawFn) -> NodeState:
    """A node in any state."""
    slots = draw(st.integers(1, 8))
    is_adaptive = draw(st.booleans()) and draw(st.booleans())
    return NodeState(
        node=Node(name=f"node-{draw(st.uuids())}", kind=NodeKind.OLLAMA, url="http://node", is_adaptive=is_adaptive),
        slots=slots,
        in_flight=draw(st.integers(0, slots + 3)),
        health=draw(st.sampled_from([Health.UP, Health.UP, Health.UP, Health.DOWN, Health.UNKNOWN])),
        up_since=NOW - draw(st.sampled_from([0.0, 1.0, 5.0, 30.0, math.inf])),
        penalty=draw(st.sampled_from([0.0, 0.0, 0.5, 1.0, 4.0])),
        penalty_at=NOW - draw(st.floats(0, 60)),
        loaded=draw(st.sampled_from([None, {}, {MODEL: LoadedModel(name=MODEL)}])),
        foreign=draw(st.integers(0, 4)),
        draining=draw(st.booleans()) and draw(st.booleans()),
        loading=draw(st.sampled_from(["", "", MODEL, "another"])),
    )


def node(name: str = "a", **fields: object) -> NodeState:
    """A node that is up, warm and idle but for these fields."""
    usual: dict[str, object] = {"slots": 4, "health": Health.UP, "up_since": -math.inf}
    return NodeState(
        node=Node(name=name, kind=NodeKind.OPENAI, url=f"http://{name}"),
        **(usual | fields),  # type: ignore[arg-type]
    )


def chosen(
    candidates: Sequence[NodeState], *, rules: RoutingRules = RULES, tried: Sequence[NodeState] = (), seed: int = 1
) -> NodeState | None:
    """What is picked now."""
    return pick(candidates, MODEL, now=NOW, rules=rules, random=random.Random(seed).random, tried=tried)


def tier(state: NodeState, rules: RoutingRules) -> int:
    """Warm and sound, then cold or failing, then so failing that its ghosts fill it."""
    ghosts = penalty_now(state, NOW, rules)
    if state.in_flight + ghosts >= state.slots + rules.head_start:
        return 2
    return 0 if is_warm(state, MODEL) and ghosts < 1.0 else 1


def is_sound(state: NodeState, rules: RoutingRules) -> bool:
    return state.health is Health.UP and not state.draining and penalty_now(state, NOW, rules) < 1.0


@given(st.lists(nodes(), max_size=8), rules_of_any_kind, seeds)
def test_a_node_is_chosen_exactly_when_one_has_room_and_there_is_no_better_one_to_wait_for(
    candidates: list[NodeState], rules: RoutingRules, seed: random.Random
) -> None:
    picked = pick(candidates, MODEL, now=NOW, rules=rules, random=seed.random)

    roomy = [state for state in candidates if takes(state, MODEL, rules)]
    waits = all(tier(state, rules) == 2 for state in roomy) and any(is_sound(state, rules) for state in candidates)
    if any(state.loading == MODEL and state.in_flight < state.slots and is_sound(state, rules) for state in candidates):
        if any(is_warm(state, MODEL) for state in roomy):
            return  # warm ones that fail may or may not be better than cold ones
        waits = True
    assert (picked is not None) == (roomy != [] and not waits)


@given(st.lists(nodes(), max_size=8), rules_of_any_kind, seeds)
def test_a_node_that_is_down_leaving_or_full_is_never_chosen(
    candidates: list[NodeState], rules: RoutingRules, seed: random.Random
) -> None:
    picked = pick(candidates, MODEL, now=NOW, rules=rules, random=seed.random, tried=candidates[:2])

    if picked is not None:
        beyond = 0 if picked.node.is_adaptive else rules.head_start
        assert picked.health is Health.UP
        assert not picked.draining
        assert picked.in_flight < picked.slots + beyond
        assert not picked.loading or is_warm(picked, MODEL)


@given(st.lists(nodes(), min_size=1, max_size=8), rules_of_any_kind, seeds)
def test_nobody_with_room_is_better_than_the_chosen_one(
    candidates: list[NodeState], rules: RoutingRules, seed: random.Random
) -> None:
    """Warm before cold, then the least load relative to slots: what the loop writes out is what the parts say."""
    picked = pick(candidates, MODEL, now=NOW, rules=rules, random=seed.random)

    if picked is not None:
        scores = [(tier(state, rules), load(state, NOW, rules)) for state in candidates if takes(state, MODEL, rules)]
        assert (tier(picked, rules), load(picked, NOW, rules)) == pytest.approx(min(scores))


@given(st.lists(nodes(), min_size=2, max_size=8), rules_of_any_kind, seeds, st.data())
def test_a_node_that_failed_this_request_comes_after_all_others(
    candidates: list[NodeState], rules: RoutingRules, seed: random.Random, data: st.DataObject
) -> None:
    tried = data.draw(st.lists(st.sampled_from(candidates), unique_by=id, min_size=1))
    picked = pick(candidates, MODEL, now=NOW, rules=rules, random=seed.random, tried=tried)

    untried = [state for state in candidates if takes(state, MODEL, rules) and state not in tried]
    assert not untried or picked is None or picked in untried


def test_a_request_waits_for_a_full_node_rather_than_go_back_to_the_one_that_failed_it() -> None:
    full, failed = node("full", in_flight=5), node("failed", penalty=1.0, penalty_at=NOW)

    assert chosen([full, failed], tried=[failed]) is None
    assert chosen([failed], tried=[failed]) is failed
    assert chosen([replace(full, health=Health.DOWN), failed], tried=[failed]) is failed


def test_a_flood_is_not_poured_into_a_node_that_fails() -> None:
    """Its failures take up its room as long as there is a sound node to wait for."""
    full, failing = node("full", in_flight=5), node("failing", penalty=5.0, penalty_at=NOW)

    assert chosen([full, failing]) is None
    assert chosen([full, replace(failing, penalty=4.0)]).node.name == "failing"  # type: ignore[union-attr]
    assert chosen([replace(full, penalty=1.0, penalty_at=NOW), failing]) is failing, "all fail: no reason to wait"


def test_a_warm_node_is_chosen_before_an_idle_cold_one() -> None:
    warm = node("warm", loaded={MODEL: LoadedModel(name=MODEL)}, in_flight=4)
    cold = node("cold", loaded={})

    assert chosen([cold, warm]) is warm
    assert chosen([cold, replace(warm, in_flight=5)]) is cold


def test_a_large_node_takes_more_than_a_small_one() -> None:
    small, large = node("small", slots=2, in_flight=1), node("large", slots=8, in_flight=3)

    assert chosen([small, large]) is large
    assert chosen([small, replace(large, in_flight=5)]) is small


def test_requests_of_other_clients_count_as_load() -> None:
    shared, ours = node("shared", foreign=2), node("ours", in_flight=1)

    assert chosen([shared, ours]) is ours


def test_ties_are_broken_evenly() -> None:
    """3,000 draws among three equals: each gets its third, within five standard deviations."""
    equals = [node(name) for name in "abc"]
    uniform = random.Random(7).random
    drawn = Counter(
        picked.node.name
        for _ in range(3000)
        if (picked := pick(equals, MODEL, now=NOW, rules=RULES, random=uniform)) is not None
    )

    assert sorted(drawn) == ["a", "b", "c"]
    assert all(abs(count - 1000) < 5 * math.sqrt(3000 * 2 / 9) for count in drawn.values())


def test_the_order_of_the_candidates_decides_nothing() -> None:
    idle, busy = node("idle"), node("busy", in_flight=1)

    assert chosen([idle, busy]) is chosen([busy, idle]) is idle


def test_a_node_that_failed_twice_loses_its_privilege_of_being_warm() -> None:
    failing = node("failing", loaded={MODEL: LoadedModel(name=MODEL)}, penalty=2.0, penalty_at=NOW)
    cold = node("cold", loaded={}, in_flight=1)

    assert chosen([failing, cold]) is cold


def test_a_failed_request_counts_like_one_in_flight() -> None:
    failed = node("failed", penalty=1.0, penalty_at=NOW)

    assert load(failed, NOW, RULES) == load(node(in_flight=1), NOW, RULES)
    assert chosen([failed, node("idle")]) is not failed


def test_a_node_that_came_back_draws_less_at_first() -> None:
    """With the same share of its slots in use it looks fuller, and ever less so."""
    back = node("back", in_flight=1, up_since=NOW - 2.0)

    assert load(back, NOW, RULES) == pytest.approx(load(node(in_flight=1), NOW, RULES) / 0.2)
    assert chosen([back, node("steady", in_flight=2)]) is not back
    assert load(back, NOW + 8.0, RULES) == load(node(in_flight=1), NOW, RULES)


@given(nodes(), rules_of_any_kind, st.floats(0, 1000), st.floats(0, 1000))
def test_a_penalty_only_ever_fades(state: NodeState, rules: RoutingRules, first_s: float, then_s: float) -> None:
    earlier = penalty_now(state, state.penalty_at + first_s, rules)
    later = penalty_now(state, state.penalty_at + first_s + then_s, rules)

    assert 0.0 <= later <= earlier <= state.penalty
    assert later == 0.0 or later >= FORGET


@given(st.floats(0.1, 100), st.floats(0.5, 60))
def test_a_penalty_halves_in_seven_tenths_of_its_time(penalty: float, penalty_s: float) -> None:
    rules = replace(RULES, failure_penalty_s=penalty_s)
    state = node(penalty=penalty, penalty_at=NOW)

    assert penalty_now(state, NOW + 0.7 * penalty_s, rules) == pytest.approx(penalty / 2)
    assert penalty_now(state, NOW + 20 * penalty_s, rules) == 0.0


def test_penalties_can_be_switched_off() -> None:
    state = node(penalty=5.0, penalty_at=NOW)

    assert penalty_now(state, NOW, replace(RULES, failure_penalty_s=0.0)) == 0.0


@given(st.floats(0, 1000), st.floats(0, 1000), st.floats(0, 60))
def test_the_slow_start_ramps_up_to_everything(age_s: float, later_s: float, slow_start_s: float) -> None:
    rules = replace(RULES, slow_start_s=slow_start_s)
    state = node(up_since=0.0)
    share = ramp(state, age_s, rules)

    assert GENTLEST_RAMP <= share <= ramp(state, age_s + later_s, rules) <= 1.0
    assert age_s < slow_start_s or share == 1.0


@given(nodes(), rules_of_any_kind)
def test_each_request_makes_a_node_look_fuller(state: NodeState, rules: RoutingRules) -> None:
    one_more = replace(state, in_flight=state.in_flight + 1)

    assert 0.0 <= load(state, NOW, rules) < load(one_more, NOW, rules)


def test_a_full_node_has_load_one() -> None:
    assert load(node(slots=4, in_flight=4), NOW, RULES) == 1.0


def test_a_node_without_a_notion_of_loading_is_always_warm() -> None:
    assert is_warm(node(loaded=None), MODEL)
    assert not is_warm(node(loaded={}), MODEL)


def test_a_node_that_loads_another_model_takes_only_what_is_warm() -> None:
    busy = node("busy", loaded={MODEL: LoadedModel(name=MODEL)}, loading="another")
    cold = node("cold", loaded={}, loading="another")

    assert chosen([busy]) is busy
    assert chosen([cold]) is None
    assert chosen([cold, node("idle", loaded={})]).node.name == "idle"  # type: ignore[union-attr]


def test_a_request_waits_for_a_load_under_way_rather_than_begin_a_second_one() -> None:
    loading, idle = node("loading", loaded={}, loading=MODEL, in_flight=1), node("idle", loaded={})
    warm = node("warm", in_flight=4, loaded={MODEL: LoadedModel(name=MODEL)})

    assert chosen([loading, idle]) is None
    assert chosen([loading, idle, warm]) is warm
    assert chosen([replace(loading, in_flight=4), idle]) is idle, "it will be full"
    assert chosen([replace(loading, penalty=1.0, penalty_at=NOW), idle]) is idle, "it fails"
    assert chosen([loading, idle], tried=[loading]) is idle
    assert chosen([replace(loading, health=Health.DOWN), idle]) is idle


def test_a_node_is_favoured_by_as_much_load_as_is_said() -> None:
    favoured, other = node("favoured", slots=10, in_flight=2), node("other", slots=10)

    def chosen_with(weight: float) -> NodeState | None:
        favour = {"favoured": weight}
        return pick([favoured, other], MODEL, now=NOW, rules=RULES, random=random.Random(1).random, favour=favour)

    assert chosen_with(0.3) is favoured
    assert chosen_with(0.1) is other


def test_no_favour_makes_up_for_a_cold_or_a_full_node() -> None:
    cold, full, warm = node("cold", loaded={}), node("full", in_flight=5), node("warm", in_flight=4)
    favour = {"cold": 100.0, "full": 100.0}

    assert pick([cold, full, warm], MODEL, now=NOW, rules=RULES, random=random.random, favour=favour) is warm


def test_a_node_whose_slots_are_found_out_gets_no_head_start() -> None:
    known = node("known", in_flight=4)
    adaptive = replace(known, node=replace(known.node, is_adaptive=True))

    assert chosen([known]) is known
    assert chosen([adaptive]) is None
    assert (takes(known, MODEL, RULES), takes(adaptive, MODEL, RULES)) == (True, False)
