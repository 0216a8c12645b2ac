"""Kinds of requests: what the classifier does on labelled prompts, and on anything at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sutazai.core.request import Question
from sutazai.policy.request_type import (
    HEAD_CHARACTERS,
    TAIL_CHARACTERS,
    TYPES,
    RequestType,
    Rule,
    classify,
    features,
    looked_at,
)
from sutazai.policy.request_type_weights import WEIGHTS
from sutazai.testing.prompts import confusion, labelled_prompts, matrix_lines

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = labelled_prompts(ROOT / "data" / "request_types")
UNSEEN = labelled_prompts(ROOT / "data" / "request_types" / "unseen")


def test_there_are_enough_labelled_prompts_of_each_kind_and_none_twice() -> None:
    texts = [one.text for one in [*PROMPTS, *UNSEEN]]

    assert len(PROMPTS) >= 600
    assert len(set(texts)) == len(texts)
    assert min(sum(one.kind is kind for one in PROMPTS) for kind in TYPES) >= 200


def test_nine_of_ten_prompts_that_were_not_tuned_on_are_told_right() -> None:
    held_back = [one for one in PROMPTS if one.is_for_test]

    counts = confusion(held_back)

    assert len(held_back) >= 150
    assert sum(counts[kind, kind] for kind in TYPES) / len(held_back) >= 0.9


def test_the_page_shows_the_confusion_matrices_as_they_are() -> None:
    page = (ROOT / "docs" / "explanation" / "request-types.md").read_text("utf-8")

    assert "\n".join(matrix_lines(confusion([one for one in PROMPTS if one.is_for_test]))) in page
    assert "\n".join(matrix_lines(confusion(UNSEEN))) in page


@given(st.text(max_size=3000), st.integers(0, 50), st.integers(0, 5), st.integers(0, 5))
def test_any_text_has_a_kind_with_reasons_and_shares_that_add_up(
    text: str, turns: int, tools: int, images: int
) -> None:
    classified = classify(Question(text=text, turns=turns, tools=tools, images=images))

    assert classified.reasons
    assert sum(classified.shares.values()) == pytest.approx(1.0)
    assert classified.shares[classified.kind] == max(classified.shares.values())


@given(st.text(max_size=5000))
def test_only_the_beginning_and_the_end_of_a_question_are_looked_at(text: str) -> None:
    shown = looked_at(text)

    assert len(shown) <= HEAD_CHARACTERS + TAIL_CHARACTERS + 1
    assert text.startswith(shown[:HEAD_CHARACTERS])


@given(st.text(max_size=2000))
def test_every_feature_is_above_zero_at_most_one_and_has_a_name_that_could_be_weighed(text: str) -> None:
    found = features(Question(text=text, turns=9, tools=1, images=1), text, text.lower())

    assert all(0 < value <= 1 for value in found.values())
    assert {"tools", "images", "long conversation"} <= found.keys() & WEIGHTS.keys()


def test_a_rule_of_the_operator_goes_first_and_is_the_reason() -> None:
    rules = [Rule(contains="Invoice", kind=RequestType.COMPLEX_ANALYSIS)]

    classified = classify(Question(text="write a python function for this INVOICE"), rules)

    assert classified.kind is RequestType.COMPLEX_ANALYSIS
    assert classified.reasons == ("rule: contains 'Invoice'",)
    assert classified.shares[RequestType.COMPLEX_ANALYSIS] == 1.0


def test_a_rule_of_the_operator_finds_its_word_anywhere_in_the_question() -> None:
    rules = [Rule(contains="invoice", kind=RequestType.COMPLEX_ANALYSIS)]
    text = f"{'word ' * 200}INVOICE {'word ' * 200}"

    assert classify(Question(text=text), rules).reasons == ("rule: contains 'invoice'",)


def test_the_first_of_several_rules_decides() -> None:
    rules = [
        Rule(contains="b", kind=RequestType.CODE_GENERATION),
        Rule(contains="a", kind=RequestType.SIMPLE_QUERIES),
    ]

    assert classify(Question(text="a b"), rules).kind is RequestType.CODE_GENERATION


@pytest.mark.parametrize(
    ("text", "kind", "reason"),
    [
        ("Hello!", RequestType.SIMPLE_QUERIES, "very short"),
        ("Compare the causes of both wars and weigh the evidence.", RequestType.COMPLEX_ANALYSIS, "words of analysis"),
        ("```python\nx = f(1)\n```\nwhat is wrong?", RequestType.CODE_GENERATION, "programming words"),
    ],
)
def test_the_reasons_name_what_spoke_for_the_kind(text: str, kind: RequestType, reason: str) -> None:
    classified = classify(Question(text=text))

    assert classified.kind is kind
    assert any(reason in one for one in classified.reasons) or "code" in " ".join(classified.reasons)
