"""Which context length is asked of Ollama."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sutazai.policy.context import context_to_ask

BUCKETS = (4096, 8192, 16384)

lengths = st.integers(0, 300_000)
bucket_lists = st.lists(st.integers(1, 262_144), unique=True, max_size=6).map(sorted)


@given(lengths, lengths, lengths, bucket_lists)
def test_what_is_asked_is_nothing_a_bucket_what_is_loaded_or_what_is_wanted(
    wanted: int, loaded: int, default: int, buckets: list[int]
) -> None:
    asked = context_to_ask(wanted, loaded, default, buckets)

    assert asked is None or asked in buckets or asked == loaded or (asked == wanted and not buckets)


@given(lengths, lengths, lengths, bucket_lists)
def test_a_client_gets_what_it_wants_wherever_a_bucket_allows(
    wanted: int, loaded: int, default: int, buckets: list[int]
) -> None:
    asked = context_to_ask(wanted, loaded, default, buckets)

    if wanted and (not buckets or wanted <= buckets[-1]):
        assert asked is not None
        assert asked >= wanted


@given(lengths, lengths, lengths, bucket_lists)
def test_a_model_that_is_loaded_with_enough_is_not_loaded_anew(
    wanted: int, loaded: int, default: int, buckets: list[int]
) -> None:
    asked = context_to_ask(wanted, loaded, default, buckets)

    if loaded and loaded >= wanted:
        assert asked == loaded or (asked is None and loaded == default)


@given(lengths, st.integers(1, 300_000), lengths, bucket_lists)
def test_a_loaded_model_never_shrinks(wanted: int, loaded: int, default: int, buckets: list[int]) -> None:
    """A reload for less than there is would serve nobody."""
    asked = context_to_ask(wanted, loaded, default, buckets)

    assert asked is None or asked >= loaded


@pytest.mark.parametrize(
    ("wanted", "loaded", "default", "asked"),
    [
        (0, 0, 0, None),
        (0, 4096, 4096, None),
        (0, 8192, 4096, 8192),
        (0, 4096, 0, 4096),
        (2048, 8192, 0, 8192),
        (5000, 0, 0, 8192),
        (5000, 4096, 4096, 8192),
        (99_999, 4096, 4096, 16384),
        (99_999, 16384, 4096, 16384),
        (99_999, 32768, 32768, 32768),
    ],
)
def test_known_cases(wanted: int, loaded: int, default: int, asked: int | None) -> None:
    assert context_to_ask(wanted, loaded, default, BUCKETS) == asked


def test_without_buckets_a_client_gets_its_own_length() -> None:
    assert context_to_ask(5000, 4096, 4096, ()) == 5000
