"""
Which context length an Ollama model is asked to have.

Ollama reloads a model, for everybody, whenever a request names another `num_ctx` than the one it was loaded with.
So clients' wishes are rounded up to a few buckets, and a model that is loaded with enough is left as it is.
"""

from __future__ import annotations

from collections.abc import Sequence


def context_to_ask(wanted: int, loaded: int, default: int, buckets: Sequence[int]) -> int | None:
    """
    The `num_ctx` to send, all in tokens.

    Args:
        wanted: what the client asked for; 0 = it did not.
        loaded: what the model is loaded with; 0 = not loaded, or the node does not say.
        default: what the node loads it with when nobody asks, as far as that was seen; 0 = not seen.
        buckets: allowed lengths, ascending; empty allows any.

    Returns:
        None to send none: the bytes of the client can pass untouched.
    """
    if loaded and loaded >= wanted:
        return None if loaded == default and not wanted else loaded
    if not wanted:
        return None
    if not buckets:
        return wanted
    # past the last bucket it gets that one, unless more is loaded already
    return next((bucket for bucket in buckets if bucket >= wanted), max(buckets[-1], loaded))
