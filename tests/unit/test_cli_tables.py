"""What stands in the cells of the commands' tables."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from sutazai.cli.answer import Measured
from sutazai.cli.chat import first_model, stats_line
from sutazai.cli.models import Details, Listed, Shown, Tags, facts, until
from sutazai.cli.nodes import NodeRow, Nodes, cells
from sutazai.core.errors import BadRequest

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def node(models: tuple[str, ...], loaded: tuple[str, ...] | None) -> NodeRow:
    return NodeRow(
        name="a:1",
        kind="ollama",
        health="up",
        in_flight=2,
        slots=4,
        load=0.5,
        last_error="",
        models=models,
        loaded=loaded,
    )


def test_a_node_is_one_row() -> None:
    (row,) = cells(Nodes((node(("llama3:latest", "phi:3b"), ("phi:3b",)),)))

    assert [str(cell) for cell in row] == ["a:1", "ollama", "up", "2/4", "0.50", "llama3, phi:3b*", ""]


def test_every_model_of_a_node_without_that_notion_is_marked_as_loaded() -> None:
    (row,) = cells(Nodes((node(("a", "b"), None),)))

    assert row[5] == "a*, b*"


@pytest.mark.parametrize(
    ("expires_at", "shown"),
    [
        ("", ""),
        ("soon", ""),
        ("0001-01-01T00:00:00Z", ""),
        ("2026-01-02T03:04:35Z", "30 s"),
        ("2026-01-02T03:04:00Z", "0 s"),
        ("2026-01-02T03:09:05.123456789+00:00", "5 min"),
        ("2026-01-02T04:09:05+01:00", "5 min"),
        ("2026-01-02T08:04:05Z", "5 h"),
        ("2318-01-01T00:00:00Z", "for good"),
        ("2026-01-02T03:09:05", ""),
    ],
)
def test_the_end_of_a_load_is_told_from_now(expires_at: str, shown: str) -> None:
    assert until(expires_at, NOW) == shown


def test_what_a_node_does_not_tell_of_a_model_has_no_row() -> None:
    body = b'{"details": {"family": "llama", "parameter_size": ""}, "model_info": {"llama.context_length": 8192}}'

    assert facts(msgspec.json.decode(body, type=Shown)) == [["family", "llama"], ["context length", "8192"]]


def test_each_option_of_a_model_has_a_row() -> None:
    shown = Shown(parameters='stop "<end>"\ntemperature 0.7', capabilities=("completion", "tools"))

    assert facts(shown) == [
        ["capabilities", "completion, tools"],
        ["option", 'stop "<end>"'],
        ["option", "temperature 0.7"],
    ]


def test_the_model_that_chats_by_default_is_no_embedding_model() -> None:
    tags = Tags(
        (
            Listed(name="all-minilm", details=Details(family="bert")),
            Listed(name="nomic-embed-text"),
            Listed(name="phi"),
            Listed(name="qwen"),
        )
    )

    assert first_model(tags) == "phi"


def test_an_embedding_model_alone_is_taken_all_the_same() -> None:
    assert first_model(Tags((Listed(name="nomic-embed-text"),))) == "nomic-embed-text"


def test_a_pool_without_models_says_how_to_get_one() -> None:
    with pytest.raises(BadRequest, match="sutazai models pull"):
        first_model(Tags(()))


def test_the_rate_is_that_of_the_tokens_after_the_first() -> None:
    measured = Measured(first_token_s=0.25, rest_s=2.0, tokens=21)

    assert stats_line(measured) == "first token 0.25 s, 21 tokens, 10.0 tokens/s"


def test_a_single_token_has_no_rate() -> None:
    assert stats_line(Measured(first_token_s=0.25, rest_s=0.0, tokens=1)) == "first token 0.25 s, 1 token"


def test_a_time_that_has_just_passed_is_not_taken_for_none() -> None:
    assert until((NOW - timedelta(hours=1)).isoformat(), NOW) == "0 s"
