"""For agents that ask nobody."""

from __future__ import annotations

from typing import Any


class NoModels:
    """The `Models` that must not be asked."""

    async def chat(self, body: Any, **_: Any) -> Any:
        raise NotImplementedError

    async def ask(self, endpoint: str, body: Any, **_: Any) -> Any:
        raise NotImplementedError

    async def usual(self) -> str:
        raise NotImplementedError
