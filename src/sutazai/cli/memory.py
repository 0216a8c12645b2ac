"""How a process that serves looks after its memory."""

from __future__ import annotations

import gc


def settle_memory() -> None:
    """What was made at the start stays: the collector need not look at it again, nor look often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
