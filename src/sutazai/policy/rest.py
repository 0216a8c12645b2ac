"""
How long a worker does nothing after it has written a group of tasks, so that the next group is larger.

Work in groups gets cheaper by itself, the more there is of it, but only once it is late. A worker that begins and ends
tasks as soon as they come takes all that is left of a machine from a tenth of its load on, and whoever submits waits
for it. One that rests as long as it worked leaves half to others, also where everything takes longer than it should.
"""

from __future__ import annotations

LONGEST_S = 0.02
"""What a group loses at most where the store is slow for another reason than load."""


def rest_s(worked_s: float, *, free: int, slots: int) -> float:
    """After so much work; nothing where more than half of the places are taken, for then these are waited for."""
    return min(max(worked_s, 0.0), LONGEST_S) if 2 * free >= slots else 0.0
