"""Labelled prompts, and how well the classifier of request types does on them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sutazai.core.request import Question
from sutazai.policy.request_type import TYPES, RequestType, classify

TEST_SHARE = 0.3


@dataclass(frozen=True, slots=True)
class Labelled:
    """A prompt, and what it is."""

    text: str
    kind: RequestType

    @property
    def is_for_test(self) -> bool:
        """Never seen in tuning: chosen by the hash of the text, so that new prompts move no old ones."""
        return hashlib.sha256(self.text.encode()).digest()[0] < 256 * TEST_SHARE


def labelled_prompts(folder: Path) -> Sequence[Labelled]:
    r"""One file for each kind, a prompt on each line; `\n` stands for a line end."""
    return [
        Labelled(line.replace("\\n", "\n"), kind)
        for kind in TYPES
        for line in (folder / f"{kind.value}.txt").read_text("utf-8").splitlines()
    ]


def confusion(prompts: Sequence[Labelled]) -> Mapping[tuple[RequestType, RequestType], int]:
    """How many of a kind (first) were taken for which (second)."""
    counts = {(right, told): 0 for right in TYPES for told in TYPES}
    for one in prompts:
        counts[one.kind, classify(Question(text=one.text)).kind] += 1
    return counts


def matrix_lines(counts: Mapping[tuple[RequestType, RequestType], int]) -> Sequence[str]:
    """The matrix in Markdown, with the share that was right."""
    lines = ["| is | " + " | ".join(kind.value for kind in TYPES) + " | right |", "|---" * (len(TYPES) + 2) + "|"]
    for right in TYPES:
        row = [counts[right, told] for told in TYPES]
        share = counts[right, right] / max(1, sum(row))
        lines.append(f"| {right.value} | " + " | ".join(map(str, row)) + f" | {share:.1%} |")
    hits = sum(counts[kind, kind] for kind in TYPES)
    return [*lines, f"| all | | | | {hits / max(1, sum(counts.values())):.1%} of {sum(counts.values())} |"]
