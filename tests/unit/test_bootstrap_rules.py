"""From settings to rules: a model has two names, and both mean the same."""

from __future__ import annotations

import pytest

from sutazai.bootstrap.rules import Live, refill_rhythm, type_rules
from sutazai.settings.model import ModelSettings, Rabbitmq, Settings
from sutazai.settings.secret import Secret

PRICED = ModelSettings(price_input=2.0, public=True, fallback=("small",))


@pytest.mark.parametrize("named", ["llama3", "llama3:latest"])
@pytest.mark.parametrize("asked", ["llama3", "llama3:latest"])
def test_a_models_settings_are_found_by_both_of_its_names(named: str, asked: str) -> None:
    settings = Settings(models={named: PRICED})

    assert Live(settings).price(asked) == (2.0, 0.0)
    assert Live(settings).model(asked).public
    assert type_rules(settings).fallbacks[asked] == ("small",)


def test_settings_of_the_very_name_go_first() -> None:
    tagged = ModelSettings(price_input=5.0, fallback=("other",))
    settings = Settings(models={"llama3": PRICED, "llama3:latest": tagged})

    assert Live(settings).price("llama3") == (2.0, 0.0)
    assert Live(settings).price("llama3:latest") == (5.0, 0.0)
    assert type_rules(settings).fallbacks["llama3:latest"] == ("other",)


def test_another_tag_is_another_model() -> None:
    assert Live(Settings(models={"llama3": PRICED})).price("llama3:70b") == (0.0, 0.0)


@pytest.mark.parametrize(("heartbeat_s", "lease_s"), [(1, 60.0), (10, 60.0), (60, 360.0)])
def test_a_worker_is_gone_after_its_broker_gave_it_up_and_never_between_its_own_beats(
    heartbeat_s: int, lease_s: float
) -> None:
    broker = Rabbitmq(url=Secret("amqp://127.0.0.1"), heartbeat_s=heartbeat_s)

    assert refill_rhythm(Settings(rabbitmq=broker)).lease_s == lease_s
