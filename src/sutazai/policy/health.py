"""What the outcome of a request or a probe says about a node."""

from __future__ import annotations

import enum

from sutazai.core.errors import NodeRejected, NodeTimeout, NodeUnreachable, SutazaiError
from sutazai.core.node import Health


class Outcome(enum.Enum):
    """How a request at a node ended, as far as the node is concerned."""

    GOOD = "good"
    """Answered, or the client's own mistake."""
    BUSY = "busy"
    """429 or 503: alive and full. Draws less for a while, is never taken out."""
    SICK = "sick"
    """Another 5xx. Draws less for a while; a request that breaks every node must not take all of them out."""
    GONE = "gone"
    """Unreachable, reset or silent: counts towards being down."""
    NEITHER = "neither"
    """The client left or an operator cancelled: says nothing."""


def outcome_of(error: SutazaiError) -> Outcome:
    """What an error of a node says about the node."""
    if isinstance(error, NodeRejected):
        if error.status in {429, 503}:
            return Outcome.BUSY
        return Outcome.SICK if error.status >= 500 and error.status != 501 else Outcome.GOOD
    if isinstance(error, NodeUnreachable | NodeTimeout):
        return Outcome.GONE
    return Outcome.NEITHER


def health_after(health: Health, failures: int, limit: int) -> Health:
    """The health of a node after so many consecutive failures; 0 is a success."""
    if failures == 0:
        return Health.UP
    if failures >= limit or health is Health.UNKNOWN:
        return Health.DOWN
    return health
