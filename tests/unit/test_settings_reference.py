"""The reference page is the model's own words, complete and up to date."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
from msgspec import inspect as shapes

from sutazai.settings import model
from sutazai.settings.load import environment_names, parse
from sutazai.settings.reference import attribute_docstrings, reference

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "settings.md"
GROUPS = [kind for kind in vars(model).values() if isinstance(kind, type) and issubclass(kind, model.Group)]


def test_the_page_in_the_docs_is_the_generated_one() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), (
        "run `sutazai config reference > docs/reference/settings.md`"
    )


@pytest.mark.parametrize("kind", [kind for kind in GROUPS if kind not in {model.Group, model.Settings}])
def test_every_setting_is_explained(kind: type[model.Group]) -> None:
    docstrings = attribute_docstrings()[kind.__name__]

    for field in cast("shapes.StructType", shapes.type_info(kind)).fields:
        if (kind, field.name) not in {(model.Discovery, "dns"), (model.Auto, "rules")}:
            assert f"**`{field.name}`**" in reference()
        assert docstrings[field.name]


def test_every_name_of_the_environment_is_on_the_page() -> None:
    page = reference()

    assert [name for name in environment_names() if f"`{name}`" not in page] == []


def test_each_entry_tells_type_range_default_and_name() -> None:
    assert (
        "- **`port`**: a whole number from 0 to 65535, default `10010`, `SUTAZAI_SERVER_PORT`\\\n"
        "  TCP port; 0 takes a free one.\n"
    ) in reference()


def test_sizes_are_told_in_round_units_too() -> None:
    assert "default `33554432` (32 MiB)" in reference()
    assert "default `32768` (32 KiB)" in reference()


def test_the_example_on_the_page_is_right() -> None:
    example = reference().split("```toml\n")[1].split("```")[0]

    assert len(parse(example, {}).nodes) == 2
