"""
Choosing a node: filter, score, pick.

Filter: healthy, staying, has the model (the caller gives only such), and room in its line. Score: warm before cold,
then the fewest requests relative to slots, less what a node is favoured for. Pick: the best, ties by random.

One load at a time: a node that loads a model takes nothing else that it would have to load, and what wants the model
that is being loaded waits for it, unless that node would be full by then.

Failures are load. A node that fails fast has few requests in flight and would draw all of them (the black hole of
least connections), so each failure counts as a request still in flight for a while, and a node that has such ghosts
loses its privilege of being warm. While the sound nodes are full, one that its ghosts fill too gets nothing: waiting
for a sound one is better than failing at once.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from sutazai.core.node import Health, NodeState
from sutazai.policy.breaker import BreakerRules

UP = Health.UP
FORGET = 0.01
"""A penalty below this is none."""
GENTLEST_RAMP = 0.1
"""A node that just came back counts with a tenth of its slots."""


class Room(enum.IntEnum):
    """What the pool could do for a model at this moment; more is better."""

    NONE = 0
    COLD = 1
    """A node has a free slot, but would have to load the model."""
    WARM = 2
    """A node has a free slot and the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingRules:
    """What the settings say about routing."""

    head_start: int
    """Requests a node may hold beyond its slots."""
    slow_start_s: float
    failure_penalty_s: float
    """Time in which a penalty falls to about a third (1/e would be exact for a continuous decay; we halve)."""
    affinity_weight: float = 0.2
    """Load that a node may have more than others and still get its conversations."""
    prefix_weight: float = 0.2
    """The same for requests that begin with what it was given lately, where all of it is the same."""
    breaker: BreakerRules = field(default_factory=BreakerRules)


def penalty_now(state: NodeState, now: float, rules: RoutingRules) -> float:
    """Failed requests that still count as in flight; halves every 0.7 of `failure_penalty_s`."""
    if state.penalty < FORGET:
        return 0.0
    age_s = now - state.penalty_at
    if rules.failure_penalty_s <= 0:
        return 0.0
    left: float = state.penalty * 0.5 ** (age_s / (0.7 * rules.failure_penalty_s))
    return left if left >= FORGET else 0.0


def ramp(state: NodeState, now: float, rules: RoutingRules) -> float:
    """Share of its slots that a node counts with, 0.1 to 1.0: slow start after it came back."""
    age_s = now - state.up_since
    if age_s >= rules.slow_start_s:
        return 1.0
    return max(GENTLEST_RAMP, age_s / rules.slow_start_s)


def load(state: NodeState, now: float, rules: RoutingRules) -> float:
    """
    Requests relative to slots; 1.0 is a full node.

    Requests of other clients, as the last probe saw them, count too: a pool is seldom ours alone.
    """
    busy: float = state.in_flight + state.foreign
    if state.penalty:
        busy += penalty_now(state, now, rules)
    slots = state.slots
    if state.up_since > now - rules.slow_start_s:
        return busy / (slots * ramp(state, now, rules))
    return busy / slots


def is_warm(state: NodeState, model: str) -> bool:
    """Whether the model is in the node's memory, as far as it tells."""
    return state.loaded is None or model in state.loaded


def has_room(state: NodeState, rules: RoutingRules) -> bool:
    """Whether one more request may be handed to the node, for a model that it has in memory."""
    # a node whose limit was found out by how soon it answers gets no head start: that would be found out too
    beyond = 0 if state.node.is_adaptive else rules.head_start
    return state.health is UP and not state.draining and state.in_flight < state.slots + beyond


def takes(state: NodeState, model: str, rules: RoutingRules) -> bool:
    """Whether one more request for this model may be handed to the node: it may be busy loading."""
    return has_room(state, rules) and (not state.loading or is_warm(state, model))


def pick(
    candidates: Sequence[NodeState],
    model: str,
    *,
    now: float,
    rules: RoutingRules,
    random: Callable[[], float],
    tried: Sequence[NodeState] = (),
    favour: Mapping[str, float] | None = None,
) -> NodeState | None:
    """
    The node for one request.

    Args:
        candidates: nodes that have the model, in any order.
        now: monotonic seconds.
        random: uniform in [0, 1).
        tried: nodes that failed this request already; chosen only when there is no sound one to wait for.
        favour: load that is taken off, by the name of the node.

    Returns:
        None when no candidate has room, or none but failing or cold ones while there is a better one to wait for.
    """
    best: NodeState | None = None
    best_tier, best_load = -1, 0.0
    ties = 0
    head_start = rules.head_start
    steady_since = now - rules.slow_start_s
    for state in candidates:
        # what `takes` and `load` say, written out: this loop runs for every request over every node
        slots, in_flight = state.slots, state.in_flight
        if (
            (in_flight >= slots and (in_flight >= slots + head_start or state.node.is_adaptive))
            or state.health is not UP
            or state.draining
            or (state.loading and not is_warm(state, model))
        ):
            continue
        if tried or state.penalty or state.up_since > steady_since:
            tier, busy = _tier(state, model, now, rules, tried), load(state, now, rules)
        else:
            tier = 0 if state.loaded is None or model in state.loaded else 1
            busy = (in_flight + state.foreign) / slots
        if favour:
            busy -= favour.get(state.node.name, 0.0)
        if best is None or tier < best_tier or (tier == best_tier and busy < best_load):
            best, best_tier, best_load, ties = state, tier, busy, 1
        elif tier == best_tier and busy == best_load:
            ties += 1
            if random() * ties < 1.0:
                best = state
    if (
        best is None
        or best_tier == _WARM
        or not _is_worth_waiting(best, best_tier, candidates, model, now, rules, tried)
    ):
        return best
    return None


_WARM, _COLD_OR_FAILING, _FULL_OF_GHOSTS, _TRIED = range(4)


def _tier(state: NodeState, model: str, now: float, rules: RoutingRules, tried: Sequence[NodeState]) -> int:
    """What comes before any load, of a node that has room."""
    if tried and state in tried:
        return _TRIED
    ghosts = penalty_now(state, now, rules)
    if state.in_flight + ghosts >= state.slots + rules.head_start:
        return _FULL_OF_GHOSTS
    return _WARM if ghosts < 1.0 and is_warm(state, model) else _COLD_OR_FAILING


def _is_worth_waiting(
    best: NodeState,
    tier: int,
    candidates: Sequence[NodeState],
    model: str,
    now: float,
    rules: RoutingRules,
    tried: Sequence[NodeState],
) -> bool:
    """Whether there is a better node than this failing or cold one, as soon as it has room or has loaded the model."""
    if tier >= _FULL_OF_GHOSTS:
        return any(_is_sound(state, now, rules, tried) for state in candidates)
    return not is_warm(best, model) and any(
        state.loading == model and state.in_flight < state.slots and _is_sound(state, now, rules, tried)
        for state in candidates
    )


def _is_sound(state: NodeState, now: float, rules: RoutingRules, tried: Sequence[NodeState]) -> bool:
    """Whether it will do, once it has room."""
    return state.health is UP and not state.draining and penalty_now(state, now, rules) < 1.0 and state not in tried
