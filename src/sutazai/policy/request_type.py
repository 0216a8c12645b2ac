"""
What kind of request is this? A small linear model over features that have names, so that it can say why.

It looks at the last question alone, at its beginning and its end, and at a few facts beside it. The weights were
tuned on labelled prompts (`data/request_types`) by `scripts/tune_request_type.py`; `docs/explanation/request-types.md`
has its confusion matrix. Rules from the settings come first.
"""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sutazai.core.request import Question
from sutazai.policy.request_type_weights import WEIGHTS
from sutazai.policy.request_type_words import (
    ANALYSIS_PARTS,
    ANALYSIS_WORDS,
    CODE_PARTS,
    CODE_WORDS,
    FACT_PARTS,
    FACT_STARTS,
    FAULT_WORDS,
    GREETING_WORDS,
    MAKE_WORDS,
    OWN_WORDS,
    REASON_WORDS,
    WHY,
)

HEAD_CHARACTERS = 400
TAIL_CHARACTERS = 200
"""Of a long question only so much is looked at: what is wanted stands at its beginning or its end."""
RULE_CHARACTERS = 100_000
"""The operator's rules look at so much of a question, which takes less than a millisecond."""
REASONS = 3
_NOTHING = (0.0, 0.0, 0.0)
"""What a feature weighs that no labelled prompt had."""

_WORD = re.compile(r"[^\W_]+")
_CAMEL = re.compile(r"[a-z][A-Z]")
_SYMBOLS = ("{", "}", ";", "[", "=>", "->", "::", "==", "()", "</", " = ", '("', ").")
_SENTENCE_ENDS = (". ", "? ", "! ", ": ", "\n")


class RequestType(enum.Enum):
    """What a model has to be good at."""

    SIMPLE_QUERIES = "simple_queries"
    COMPLEX_ANALYSIS = "complex_analysis"
    CODE_GENERATION = "code_generation"


TYPES = tuple(RequestType)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Words of the operator that decide before anything is weighed."""

    contains: str
    """Looked for without regard to case."""
    kind: RequestType


@dataclass(frozen=True, slots=True, kw_only=True)
class Classified:
    """The kind and why."""

    kind: RequestType
    shares: Mapping[RequestType, float]
    """How sure it is of each; they add up to 1."""
    reasons: Sequence[str]
    """What weighed most, first the heaviest."""


def classify(question: Question, rules: Sequence[Rule] = ()) -> Classified:
    """The kind of a question; the same question always has the same."""
    rule = _first_that_fits(rules, question.text) if rules else None
    if rule is not None:
        shares = {kind: float(kind is rule.kind) for kind in TYPES}
        return Classified(kind=rule.kind, shares=shares, reasons=(f"rule: contains {rule.contains!r}",))
    text = looked_at(question.text)
    found = features(question, text, text.lower())
    scores = score(found, WEIGHTS)
    best = max(range(len(TYPES)), key=scores.__getitem__)
    return Classified(
        kind=TYPES[best], shares=dict(zip(TYPES, softmax(scores), strict=True)), reasons=_reasons(found, best)
    )


def _first_that_fits(rules: Sequence[Rule], text: str) -> Rule | None:
    lowered = text[:RULE_CHARACTERS].lower()
    return next((rule for rule in rules if rule.contains.lower() in lowered), None)


def looked_at(text: str) -> str:
    """The beginning and the end of a text."""
    if len(text) <= HEAD_CHARACTERS + TAIL_CHARACTERS:
        return text
    return f"{text[:HEAD_CHARACTERS]}\n{text[-TAIL_CHARACTERS:]}"


def features(question: Question, text: str, lowered: str) -> dict[str, float]:
    """What was seen, by name; each value is above 0 and at most 1, and what was not seen is left out."""
    words = _WORD.findall(lowered)
    known = set(words)
    length = _length(text, words)
    coding, reasoning = len(known & CODE_WORDS), len(known & REASON_WORDS)
    start, first = " ".join(words[:2]), words[0] if words else ""
    values = {
        "always": 1.0,
        "code block": float("```" in text),
        "code symbols": min(1.0, sum(map(text.count, _SYMBOLS)) / 4),
        "identifiers": float("_" in text or "`" in text or _CAMEL.search(text) is not None),
        "a programming word": float(coding > 0),
        "programming words": min(1.0, coding / 3),
        "words of making": float(not known.isdisjoint(MAKE_WORDS)),
        "words of analysis": min(1.0, len(known & ANALYSIS_WORDS) / 2),
        "a word of reasoning": float(reasoning > 0),
        "words of reasoning": min(1.0, reasoning / 3),
        "error messages": float(not known.isdisjoint(FAULT_WORDS)),
        "greeting": float(length <= 6 and not known.isdisjoint(GREETING_WORDS)),
        "asks for a fact": float(start in FACT_STARTS or first in FACT_STARTS),
        "asks how": float(first == "how" and length > 5),
        "asks why": float(first in WHY),
        "tells of itself": float(length > 12 and not known.isdisjoint(OWN_WORDS)),
        "makes a program": float(coding > 0 and not known.isdisjoint(MAKE_WORDS)),
        "very short": float(length <= 5),
        "short": float(5 < length <= 10),
        "long": float(length > 18),
        "very long": min(1.0, length / 200) if length > 40 else 0.0,
        "several sentences": min(1.0, sum(map(text.count, _SENTENCE_ENDS)) / 3),
        "long conversation": float(question.turns > 8),
        "tools": float(question.tools > 0),
        "images": float(question.images > 0),
    }
    if not text.isascii():
        values["programming words"] = max(values["programming words"], _share_of(CODE_PARTS, lowered))
        values["words of analysis"] = max(values["words of analysis"], _share_of(ANALYSIS_PARTS, lowered))
        values["asks for a fact"] = max(values["asks for a fact"], float(_share_of(FACT_PARTS, lowered) > 0))
    return {name: value for name, value in values.items() if value}


def score(found: Mapping[str, float], weights: Mapping[str, Sequence[float]]) -> list[float]:
    """The sum of the weights for each kind, in the order of `TYPES`."""
    simple = analysis = code = 0.0
    for name, value in found.items():
        for_simple, for_analysis, for_code = weights.get(name, _NOTHING)
        simple += for_simple * value
        analysis += for_analysis * value
        code += for_code * value
    return [simple, analysis, code]


def softmax(scores: Sequence[float]) -> list[float]:
    """Shares that add up to 1."""
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    return [weight / sum(weights) for weight in weights]


def _length(text: str, words: Sequence[str]) -> float:
    """In words; scripts without spaces count two characters as one."""
    if text.isascii():
        return len(words)
    wide = sum(character >= "\u2e80" for character in text)
    return len(words) + wide / 2


def _share_of(parts: Sequence[str], lowered: str) -> float:
    return min(1.0, sum(part in lowered for part in parts) / 2)


def _reasons(found: Mapping[str, float], best: int) -> tuple[str, ...]:
    """What spoke for the kind more than for the next, by weight."""
    pulls = []
    for name, value in found.items():
        weights = WEIGHTS.get(name, _NOTHING)
        rival = max(weight for index, weight in enumerate(weights) if index != best)
        pulls.append(((weights[best] - rival) * value, name))
    pulls.sort(reverse=True)
    return tuple(name for pull, name in pulls[:REASONS] if pull > 0 and name != "always") or ("nothing else",)
