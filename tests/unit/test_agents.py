"""The agents that ship with SutazAI, against models that say what a test wants."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from sutazai.agents.asking import NotAnswered
from sutazai.agents.chat import chat
from sutazai.agents.code_review import code_review, hunks_of
from sutazai.agents.extract import extract
from sutazai.agents.research import research
from sutazai.agents.schemas import check_schema, mistakes
from sutazai.agents.summarize import summarize
from sutazai.agents.texts import chunks, json_in
from sutazai.core.errors import BadRequest, NodeTimeout
from sutazai.ports.agent import Pausing
from sutazai.testing.agents import Asked, Child, FakeContext, run

PARAGRAPHS = "\n\n".join(f"Paragraph {number}. " + "It tells of many things. " * 10 for number in range(12))
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
DIFF = """\
diff --git a/app.py b/app.py
--- a/app.py
+++ b/app.py
@@ -10,3 +10,4 @@ def f():
 x = 1
-y = 2
+y = 0
+z = x / y
 return z
diff --git a/old.py b/old.py
--- a/old.py
+++ /dev/null
@@ -1,1 +0,0 @@
-gone
diff --git a/new.py b/new.py
--- /dev/null
+++ b/new.py
@@ -0,0 +1,2 @@
+--- no head, but a line
+eval(input())
"""


# chat


async def test_chat_answers_with_the_options_that_were_given() -> None:
    context = FakeContext(["Good day."])

    answer = await run(chat, {"messages": [{"role": "user", "content": "hi"}], "temperature": 0}, context)

    assert answer.text == "Good day."
    assert context.asked == [Asked([{"role": "user", "content": "hi"}], "", {"temperature": 0.0})]


async def test_what_a_model_fails_with_is_what_chat_fails_with() -> None:
    with pytest.raises(NodeTimeout):
        await run(
            chat, {"messages": [{"role": "user", "content": "hi"}]}, FakeContext([NodeTimeout("Silent.", node="a")])
        )


async def test_an_attempt_that_was_called_off_ends() -> None:
    with pytest.raises(asyncio.CancelledError):
        await run(chat, {"messages": [{"role": "user", "content": "hi"}]}, FakeContext(is_cancelled=True))


# summarize


async def test_a_short_text_is_summed_up_with_one_question() -> None:
    context = FakeContext(["  Short. "])

    summary = await run(summarize, {"text": "A text.", "words": 20}, context)

    assert (summary.summary, summary.chunks, summary.levels) == ("Short.", 1, 1)
    assert "20 words" in context.asked[0].messages[0]["content"]


async def test_a_long_text_is_summed_up_by_chunks_and_levels() -> None:
    context = FakeContext(always="It tells of many things, this part of it does as well.")

    summary = await run(summarize, {"text": PARAGRAPHS * 3, "chunk_characters": 400, "focus": "things"}, context)

    assert summary.chunks > 20
    assert summary.levels > 2
    assert all("things" in asked.messages[0]["content"] for asked in context.asked)
    assert context.told[-1]["done"] == context.told[-1]["of"]


async def test_after_a_crash_no_finished_chunk_is_summed_up_again() -> None:
    undisturbed = FakeContext(always=lambda asked: asked.text[:20])
    expected = await run(summarize, {"text": PARAGRAPHS, "chunk_characters": 400}, undisturbed)
    context = FakeContext(
        [*[(lambda asked: asked.text[:20])] * 5, NodeTimeout("Silent.", node="a")], always=lambda asked: asked.text[:20]
    )

    with pytest.raises(NodeTimeout):
        await run(summarize, {"text": PARAGRAPHS, "chunk_characters": 400}, context)
    summary = await run(summarize, {"text": PARAGRAPHS, "chunk_characters": 400}, context)

    assert summary == expected
    assert len(context.asked) == len(undisturbed.asked) + 1  # the one that failed


async def test_a_crash_between_levels_goes_on_with_the_level() -> None:
    context = FakeContext(always=lambda asked: asked.text[:20])
    await run(summarize, {"text": PARAGRAPHS, "chunk_characters": 400}, context)
    again = FakeContext(["The end."], checkpoints=[context.last_checkpoint])

    assert (await run(summarize, {"text": PARAGRAPHS, "chunk_characters": 400}, again)).summary == "The end."


async def test_a_model_that_makes_nothing_shorter_is_told_of() -> None:
    with pytest.raises(NotAnswered, match="as long as the text"):
        await run(
            summarize,
            {"text": PARAGRAPHS, "chunk_characters": 400},
            FakeContext(always=lambda asked: asked.text + " and more" * 20),
        )


# extract


async def test_data_is_extracted_as_the_schema_says() -> None:
    context = FakeContext(['Here:\n```json\n{"name": "Ada", "age": 36}\n```'])

    found = await run(extract, {"text": "Ada is 36.", "schema": PERSON}, context)

    assert found.data == {"name": "Ada", "age": 36}
    assert context.asked[0].options["response_format"]["json_schema"]["schema"] == PERSON


async def test_an_answer_that_does_not_fit_is_sent_back_with_the_complaint() -> None:
    context = FakeContext(['{"name": "Ada", "age": "old"}', "no JSON", '{"name": "Ada", "age": 36}'])

    found = await run(extract, {"text": "Ada is 36.", "schema": PERSON}, context)

    assert found.data["age"] == 36
    assert "answer.age must be of type integer" in context.asked[1].text
    assert "not JSON" in context.asked[2].text
    assert len(context.asked[2].messages) == 4, "only the last try goes along"


async def test_a_model_that_never_fits_is_given_up() -> None:
    context = FakeContext(always='{"name": 1}')

    with pytest.raises(NotAnswered, match="2 times"):
        await run(extract, {"text": "Ada", "schema": PERSON, "retries": 1}, context)
    assert len(context.asked) == 2


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "text"},
        {"type": {"a": 1}},
        {"$ref": "#/x"},
        {"properties": []},
        {"properties": {"a": 3}},
        {"required": [1]},
        {"minimum": "1"},
        {"enum": "ab"},
        {"anyOf": {}},
        {"items": []},
    ],
)
async def test_a_schema_that_is_none_is_refused_before_a_model_is_asked(schema: Any) -> None:
    with pytest.raises(BadRequest, match="schema"):
        await run(extract, {"text": "Ada", "schema": schema}, FakeContext())


def test_a_schema_that_is_nested_too_deeply_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(40):
        schema = {"items": schema}

    with pytest.raises(BadRequest, match="deep"):
        check_schema(schema)


@pytest.mark.parametrize(
    ("value", "schema", "fits"),
    [
        (1, {"type": "integer"}, True),
        (1.0, {"type": "integer"}, True),
        (True, {"type": "integer"}, False),
        (None, {"type": ["string", "null"]}, True),
        ("abc", {"maxLength": 2}, False),
        ([1, "a"], {"items": {"type": "number"}}, False),
        ([1, 2], {"minItems": 2, "maxItems": 2}, True),
        (1, {"enum": [True]}, False),
        (2, {"const": 2}, True),
        (2, {"exclusiveMaximum": 2}, False),
        ({"a": 1}, {"additionalProperties": False}, False),
        ({"a": 1}, {"additionalProperties": {"type": "integer"}}, True),
        (3, {"anyOf": [{"type": "string"}, {"minimum": 3}]}, True),
        (3, {"oneOf": [{"type": "number"}, {"minimum": 3}]}, False),
        (3, {"allOf": [{"type": "number"}, {"minimum": 4}]}, False),
        ({}, False, False),
    ],
)
def test_a_value_is_held_against_a_schema(value: Any, schema: Any, fits: bool) -> None:
    check_schema(schema)

    assert (mistakes(value, schema) == []) is fits


# code_review


async def test_findings_come_with_file_line_and_severity_the_worst_first() -> None:
    found = [
        {"file": "app.py", "line": 12, "severity": "medium", "message": "Divides by zero."},
        {"file": "new.py", "line": 2, "severity": "critical", "message": "Runs any input."},
    ]
    context = FakeContext([msgspec.json.encode({"findings": found}).decode()])

    review = await run(code_review, {"diff": DIFF, "context": "Adds z."}, context)

    assert [(one.file, one.line) for one in review.findings] == [("new.py", 2), ("app.py", 12)]
    assert review.files == 2
    assert "   12 +z = x / y" in context.asked[0].text


async def test_a_finding_in_a_line_that_is_not_there_is_left_out() -> None:
    found = [{"file": "app.py", "line": line, "severity": "low", "message": "Hm."} for line in (9, 10, 13, 14)]
    context = FakeContext([msgspec.json.encode({"findings": found}).decode()])

    assert [one.line for one in (await run(code_review, {"diff": DIFF}, context)).findings] == [10, 13]


async def test_a_large_diff_is_reviewed_in_parts() -> None:
    diff = "".join(f"--- a/f{n}\n+++ b/f{n}\n@@ -0,0 +1,20 @@\n" + "+some line of code here\n" * 20 for n in range(9))
    context = FakeContext(always='{"findings": []}')

    review = await run(code_review, {"diff": diff, "chunk_characters": 1500}, context)

    assert (review.findings, review.files) == ([], 9)
    assert len(context.asked) > 3
    assert sum(asked.text.count("+some line") for asked in context.asked) == 180


async def test_what_is_no_diff_is_refused() -> None:
    with pytest.raises(BadRequest, match="git diff"):
        await run(code_review, {"diff": "hello"}, FakeContext())


def test_lines_that_look_like_heads_stay_lines() -> None:
    last = hunks_of(DIFF)[-1]

    assert (last.file, last.first, last.last) == ("new.py", 1, 2)
    assert "+--- no head" in last.text


# research


def answered(child: Child) -> object:
    return {"text": f"About {child.input['messages'][-1]['content']}", "model": "m"}


PLAN = '{"questions": ["What?", "Why?", "What?"]}'


async def test_a_question_is_planned_answered_in_parallel_and_joined() -> None:
    context = FakeContext([PLAN, "All of it."], children_end=answered)

    report = await run(research, {"question": "What and why?"}, context)

    assert report.answer == "All of it."
    assert [part.question for part in report.parts] == ["What?", "Why?"]
    assert "About Why?" in context.asked[-1].text


async def test_research_leaves_while_its_children_work_and_finds_them_again() -> None:
    context = FakeContext([PLAN, "All of it."])

    with pytest.raises(Pausing):
        await run(research, {"question": "What and why?"}, context)
    for id_ in context.children:
        context.end(id_, {"text": "Because."})
    report = await run(research, {"question": "What and why?"}, context)

    assert report.answer == "All of it."
    assert len(context.children) == 2
    assert len(context.asked) == 2, "the plan is not made anew"


async def test_a_part_that_failed_is_told_and_the_others_are_joined() -> None:
    context = FakeContext(
        [PLAN, "Some of it."],
        children_end=lambda child: RuntimeError("It broke.") if child.key == "part-0" else answered(child),
    )

    report = await run(research, {"question": "What and why?"}, context)

    assert [part.error for part in report.parts] == ["It broke.", ""]


async def test_where_all_parts_failed_there_is_no_report() -> None:
    context = FakeContext([PLAN], children_end=lambda _: RuntimeError("It broke."))

    with pytest.raises(NotAnswered, match="It broke"):
        await run(research, {"question": "What and why?"}, context)


# texts


@pytest.mark.parametrize("size", [200, 333, 5000])
def test_chunks_hold_the_whole_text_and_none_is_too_long(size: int) -> None:
    pieces = chunks(PARAGRAPHS, size)

    assert "".join(pieces) == PARAGRAPHS
    assert max(map(len, pieces)) <= size


@pytest.mark.parametrize("answer", ['{"a": 1}', 'Sure: {"a": 1}.', '```\n{"a": 1}\n```', '```json\n{"a": 1}```'])
def test_json_is_found_in_an_answer(answer: str) -> None:
    assert msgspec.json.decode(json_in(answer)) == {"a": 1}
