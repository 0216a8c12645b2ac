"""A value that must not be seen."""

from __future__ import annotations

from typing import ClassVar


class Secret:
    """A string whose `repr`, `str` and format hide it; `reveal` gives it to the one place that sends it."""

    __slots__ = ("_value",)

    HIDDEN: ClassVar[str] = "…"
    """What is shown in its place."""

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The string itself. Never log it, never put it into an error."""
        return self._value

    def __repr__(self) -> str:
        return f"Secret('{self.HIDDEN}')"

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)

    def __reduce__(self) -> str | tuple[object, ...]:
        raise TypeError("A secret was about to be pickled; reveal it only where it is sent.")
