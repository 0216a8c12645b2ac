"""What was measured beside its target, and the table of it."""

from __future__ import annotations

import operator
import statistics
from collections.abc import Sequence

import msgspec

_COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


class Finding(msgspec.Struct, frozen=True):
    """One figure, once for each round."""

    section: str
    what: str
    values: Sequence[float]
    unit: str = ""
    comparison: str = ""
    """`>=`, `<=`, `>`, `<`, or empty where nothing was promised."""
    limit: float = 0.0

    @property
    def verdict(self) -> str:
        """`met`, `MISSED`, or a dash where nothing was promised; by the median."""
        if not self.comparison:
            return "-"
        is_met = _COMPARISONS[self.comparison](statistics.median(self.values), self.limit)
        return "met" if is_met else "MISSED"


def print_findings(findings: Sequence[Finding]) -> None:
    """The table, in Markdown."""
    print("\n| section | what | target | median | range | verdict |\n|---|---|---|---|---|---|")
    for one in findings:
        target = f"{one.comparison} {one.limit:,g} {one.unit}".strip() if one.comparison else "-"
        spread = f"{_figure(min(one.values))} - {_figure(max(one.values))}"
        median = f"{_figure(statistics.median(one.values))} {one.unit}".strip()
        print(f"| {one.section} | {one.what} | {target} | {median} | {spread} | {one.verdict} |")


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
