"""A diff in, findings out: each with the file and a line that the diff really has."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from msgspec import Meta, Struct

from sutazai.agents.asking import ask_for
from sutazai.agents.registry import agent
from sutazai.agents.texts import MAX_TEXT_CHARACTERS, ModelName, system, user
from sutazai.core.errors import BadRequest
from sutazai.ports.agent import AgentContext

TASK = (
    "You review a change to a program. Report only real faults of the added lines: bugs, security holes, races, leaks, "
    "missing checks. No praise, no style. Lines are numbered as in the new file. Answer with JSON: "
    '{"findings": [{"file": str, "line": int, "severity": "low"|"medium"|"high"|"critical", "message": str}]}. '
    "An empty list is a good answer."
)
MOST_FINDINGS = 200
ORDER = ("critical", "high", "medium", "low")

_HUNK = re.compile(r"@@ -\d+(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")

Severity = Literal["low", "medium", "high", "critical"]


class Change(Struct, forbid_unknown_fields=True):
    """What to look at."""

    diff: Annotated[str, Meta(min_length=1, max_length=MAX_TEXT_CHARACTERS)]
    """In the unified form, of one file or many."""
    context: Annotated[str, Meta(max_length=10_000)] = ""
    """What the change is for."""
    chunk_characters: Annotated[int, Meta(ge=1000, le=200_000)] = 12_000
    """What the model sees at once."""
    model: ModelName = ""


class Finding(Struct):
    """One fault."""

    file: str
    line: int
    """In the new file."""
    severity: Severity
    message: Annotated[str, Meta(max_length=4000)]


class Review(Struct):
    """What was found, the worst first."""

    findings: list[Finding]
    files: int
    """Looked at."""


class _Told(Struct):
    """What the model answers."""

    findings: Annotated[list[Finding], Meta(max_length=MOST_FINDINGS)] = []


class Hunk(Struct):
    """Lines of one file that belong together."""

    file: str
    first: int
    """Of its lines, in the new file."""
    last: int
    text: str
    """Numbered."""


@agent(time_limit_s=1800.0)
async def code_review(context: AgentContext, change: Change) -> Review:
    """Reviews a unified diff and reports faults with file, line and severity."""
    hunks = hunks_of(change.diff)
    if not hunks:
        raise BadRequest("diff held no hunk (`@@ -1,2 +1,3 @@`). Send the output of `git diff`.", where="diff")
    purpose = f"\n\nWhat the change is for: {change.context}" if change.context else ""
    findings: list[Finding] = []
    parts = _parts(hunks, change.chunk_characters)
    for number, part in enumerate(parts, 1):
        asked = [system(TASK + purpose), user("\n".join(hunk.text for hunk in part))]
        told = await ask_for(context, asked, _Told, model=change.model)
        findings += [finding for finding in told.findings if _is_real(finding, part)]
        await context.progress({"done": number, "of": len(parts), "findings": len(findings)})
    unique = {(one.file, one.line, one.message): one for one in findings}
    ordered = sorted(unique.values(), key=lambda one: (ORDER.index(one.severity), one.file, one.line))
    return Review(ordered[:MOST_FINDINGS], len({hunk.file for hunk in hunks}))


def hunks_of(diff: str) -> list[Hunk]:
    """The hunks of a diff; of deleted files there are none."""
    hunks: list[Hunk] = []
    file, line, old_left, new_left = "", 0, 0, 0
    for raw in diff.splitlines():
        if old_left <= 0 and new_left <= 0:
            if raw.startswith("+++ "):
                file = raw[4:].split("\t", 1)[0].removeprefix("b/").strip()
            elif (head := _HUNK.match(raw)) and file != "/dev/null":
                old_left, line, new_left = int(head[1] or 1), int(head[2]), int(head[3] or 1)
                hunks.append(Hunk(file, line, line + max(new_left - 1, 0), f"{file}\n{raw}\n"))
            continue
        mark = raw[:1]
        if mark == "\\":  # "No newline at end of file"
            continue
        if mark == "-":
            hunks[-1].text += f"      {raw}\n"
            old_left -= 1
            continue
        hunks[-1].text += f"{line:5} {raw}\n"
        line, new_left = line + 1, new_left - 1
        old_left -= mark != "+"
    return hunks


def _parts(hunks: list[Hunk], size: int) -> list[list[Hunk]]:
    """Hunks that the model sees at once; a larger one goes alone, cut."""
    parts: list[list[Hunk]] = [[]]
    room = size
    for hunk in hunks:
        hunk.text = hunk.text[:size]
        if len(hunk.text) > room and parts[-1]:
            parts.append([])
            room = size
        parts[-1].append(hunk)
        room -= len(hunk.text)
    return parts


def _is_real(finding: Finding, hunks: list[Hunk]) -> bool:
    """Whether the model was shown that line; models make them up."""
    return any(hunk.file == finding.file and hunk.first <= finding.line <= hunk.last for hunk in hunks)
