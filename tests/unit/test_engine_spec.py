"""From the settings to what each engine serves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from sutazai.adapters.llamacpp.spec import GIB, TRIAL_MODEL, check_model, discover_models
from sutazai.core.errors import EngineFault
from sutazai.settings.model import Engine

if TYPE_CHECKING:
    from pathlib import Path


def _model(path: Path) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"GGUF and more")
    return str(path)


def test_without_a_model_in_the_settings_the_trial_model_is_served() -> None:
    (spec,) = discover_models(Engine())

    assert spec.name == "sutazai-trial"
    assert spec.model_path == TRIAL_MODEL
    assert (spec.slots, spec.batch_tokens) == (4, 2048)
    assert spec.context_tokens == Engine().context_tokens


def test_a_model_is_named_after_its_file_in_lower_case(tmp_path: Path) -> None:
    models = _model(tmp_path / "Qwen3-4B.Q4.gguf"), _model(tmp_path / "bge.gguf")

    specs = discover_models(Engine(models=models))

    assert [spec.name for spec in specs] == ["qwen3-4b.q4", "bge"]


def test_zero_threads_leave_a_core_to_the_gateway_and_zero_memory_follows_the_file(tmp_path: Path) -> None:
    (spec,) = discover_models(Engine(models=(_model(tmp_path / "a.gguf"),)))

    assert spec.threads >= 1
    assert spec.max_rss_bytes == len(b"GGUF and more") + 2 * GIB


def test_given_threads_and_memory_are_kept(tmp_path: Path) -> None:
    (spec,) = discover_models(Engine(models=(_model(tmp_path / "a.gguf"),), threads=3, max_rss_bytes=5))

    assert (spec.threads, spec.max_rss_bytes) == (3, 5)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineFault, match=r"gone\.gguf could not be read .* \[engine\] models"):
        discover_models(Engine(models=(str(tmp_path / "gone.gguf"),)))


def test_a_folder_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(EngineFault, match="could not be read"):
        discover_models(Engine(models=(str(tmp_path),)))


@pytest.mark.parametrize("content", [b"", b"GGU", b"PK\x03\x04 a zip"])
def test_a_file_of_another_format_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)

    with pytest.raises(EngineFault, match=r"model\.gguf was not in GGUF format"):
        check_model(path)


def test_two_models_of_one_name_are_refused(tmp_path: Path) -> None:
    twins = _model(tmp_path / "a" / "Same.gguf"), _model(tmp_path / "b" / "same.gguf")

    with pytest.raises(EngineFault, match="2 engine models were called 'same'"):
        discover_models(Engine(models=twins))
