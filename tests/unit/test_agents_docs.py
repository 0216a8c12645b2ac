"""The example of `docs/howto/write-an-agent.md` is run as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest

from sutazai.agents import Registry, builtin
from sutazai.core.errors import BadRequest

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "write-an-agent.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def example() -> ModuleType:
    module = ModuleType("example")
    exec(compile("\n".join(EXAMPLES), str(PAGE), "exec", dont_inherit=True), vars(module))  # noqa: S102 - our own page
    return module


async def test_the_example_passes_its_own_test(example: ModuleType) -> None:
    assert len(EXAMPLES) == 2
    await example.test_after_a_crash_no_text_is_translated_again()


def test_the_example_is_an_agent_among_the_others(example: ModuleType) -> None:
    registry = Registry([*builtin(), example.translate])

    assert registry.get("translate").describes == "Translates texts, one after the other."
    with pytest.raises(BadRequest, match=r"input\.texts\[0\] must be a string"):
        registry.decode("translate", '{"texts": [3], "language": "German"}')
