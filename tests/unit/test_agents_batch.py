"""A batch job whose steps are broken off and repeated: every line has one answer in the files."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from sutazai.agents.batch import Stores, batch_agents
from sutazai.agents.batch_chunk import LINES_AT_ONCE, TRIES, batch_chunk
from sutazai.agents.batch_shapes import BATCH_CHUNK, file_at
from sutazai.core.errors import (
    BadRequest,
    BudgetSpent,
    NodeFault,
    NodeRejected,
    NoHealthyNode,
    Overloaded,
    StoreUnavailable,
    SutazaiError,
)
from sutazai.core.task import FailureReason, TaskStatus
from sutazai.ports.agent import CHAT, ENDPOINTS, Pausing, Said
from sutazai.testing.agents import Asked, Child, FakeContext, run
from sutazai.testing.files import MemoryFiles
from sutazai.testing.objects import MemoryObjects

INPUT = "file-" + "a" * 32
DAY = datetime(2026, 1, 1, tzinfo=UTC)


def refusal(error: SutazaiError) -> tuple[int, bytes]:
    return 418, msgspec.json.encode({"error": {"message": error.message}})


def said(asked: Asked) -> Said:
    body = {"id": f"chat-{asked.text}", "object": "chat.completion", "echo": asked.text}
    return Said(text="", body=body, input_tokens=3, output_tokens=2)


async def at_once(_: float) -> None:
    """No pause."""


@dataclass
class Place:
    """A tenant's input, and everything that a batch job writes."""

    lines: int
    endpoint: str = CHAT
    objects: MemoryObjects = field(default_factory=MemoryObjects)
    files: MemoryFiles = field(default_factory=MemoryFiles)
    context: FakeContext = field(default_factory=FakeContext)
    chunks: dict[str, FakeContext] = field(default_factory=dict)
    """Each child's, by id; it outlives attempts."""
    now: datetime = DAY

    def __post_init__(self) -> None:
        forms = [
            {"custom_id": f"c{number}", "method": "POST", "url": self.endpoint, "body": body(number)}
            for number in range(self.lines)
        ]
        self.objects.objects[file_at("test", INPUT)] = b"\n".join(map(msgspec.json.encode, forms))

    async def job(self) -> Any:
        """One attempt at the batch job."""
        agent, _ = batch_agents(Stores(files=self.files, objects=self.objects), refusal)
        return await run(agent, {"input_file_id": INPUT, "endpoint": self.endpoint}, self.context)

    async def chunk(self, child: Child, **changes: Any) -> Any:
        """One attempt at a chunk."""
        context = self.chunks.setdefault(child.task.id, FakeContext(task=child.task, always=said))
        for name, value in changes.items():
            setattr(context, name, value)
        agent = batch_chunk(self.objects, refusal, wall=lambda: self.now, pause=at_once)
        return await run(agent, child.input, context)

    def end(self, child: Child, **changes: Any) -> None:
        """What the store would say of the chunk's task."""
        kept = self.chunks[child.task.id].last_checkpoint if child.task.id in self.chunks else None
        checkpoint = "" if kept is None else msgspec.json.encode(kept).decode()
        task = replace(child.task, **{"status": TaskStatus.COMPLETED, "checkpoint": checkpoint, **changes})
        self.context.children[task.id] = replace(child, task=task)

    @property
    def children(self) -> list[Child]:
        return list(self.context.children.values())

    async def told(self, file_id: str | None) -> list[Any]:
        assert file_id is not None
        file = await self.files.get("test", file_id)
        assert file is not None
        content = await self.objects.get(file_at("test", file_id))
        assert len(content) == file.size_bytes
        return [msgspec.json.decode(one) for one in content.splitlines()]


def body(number: int) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": str(number)}], "temperature": 0}


async def begun(lines: int) -> Place:
    """A place whose batch job waits for its chunks."""
    place = Place(lines)
    with pytest.raises(Pausing):
        await place.job()
    return place


async def done(place: Place) -> Any:
    for child in place.children:
        await place.chunk(child)
        place.end(child)
    return await place.job()


def ids(lines: list[Any]) -> list[str]:
    return [line["custom_id"] for line in lines]


async def test_the_lines_are_cut_into_children_that_may_begin_within_a_day() -> None:
    place = await begun(120)

    assert [child.agent for child in place.children] == [BATCH_CHUNK] * 3
    assert [child.input["piece"]["lines"] for child in place.children] == [50, 50, 20]
    for child in place.children:
        assert (child.draft["deadline"] - place.context.task.created_at).total_seconds() == 86_400
    assert [told["stage"] for told in place.context.told] == ["validating", "in_progress"]


async def test_the_files_hold_every_line_once_in_order_however_often_the_job_is_begun() -> None:
    place = await begun(120)
    with pytest.raises(Pausing):
        await place.job()
    assert len(place.children) == 3

    result = await done(place)

    assert await place.job() == result
    output = await place.told(result.output_file_id)
    assert ids(output) == [f"c{number}" for number in range(120)]
    assert [line["response"]["body"]["echo"] for line in output] == [str(number) for number in range(120)]
    assert (result.total, result.completed, result.failed, result.error_file_id) == (120, 120, 0, None)
    assert (result.input_tokens, result.output_tokens, result.model) == (360, 240, "m")
    assert len(await place.files.page("test", purpose="", after="", is_oldest_first=True, limit=10)) == 1
    assert not await place.objects.list("t-test/batches", limit=10)


class BreaksAt:
    """Objects or files that are away at one call, by its number."""

    def __init__(self, inner: Any, names: set[str], call: int) -> None:
        self._inner = inner
        self._names = names
        self._left = call

    def __getattr__(self, name: str) -> Any:
        if name not in self._names:
            return getattr(self._inner, name)
        self._left -= 1
        if self._left == 0:
            raise StoreUnavailable("Gone for a moment.")
        return getattr(self._inner, name)

    async def stream(self, name: str) -> AsyncIterator[bytes]:
        async for part in self._inner.stream(name):
            yield part


@pytest.mark.parametrize("call", range(1, 12))
async def test_a_job_that_breaks_off_while_it_writes_goes_on(call: int) -> None:
    place = await begun(60)
    for child in place.children:
        await place.chunk(child, always=said)
        place.end(child)
    objects, files = place.objects, place.files
    place.objects = BreaksAt(objects, {"get", "put_stream", "delete", "list", "get_range"}, call)  # type: ignore[assignment]
    place.files = BreaksAt(files, {"get", "add"}, call)  # type: ignore[assignment]

    attempts = 0
    result = None
    while result is None:
        attempts += 1
        try:
            result = await place.job()
        except StoreUnavailable:
            assert attempts < 4

    place.objects, place.files = objects, files
    assert ids(await place.told(result.output_file_id)) == [f"c{number}" for number in range(60)]
    assert result.completed == 60
    assert not await objects.list("t-test/batches", limit=10)


@pytest.mark.parametrize("call", range(1, 10))
async def test_a_chunk_that_breaks_off_asks_again_only_what_was_not_kept(call: int) -> None:
    place = await begun(20)
    (child,) = place.children
    objects = place.objects
    place.objects = BreaksAt(objects, {"get_range", "put"}, call)  # type: ignore[assignment]

    try:
        await place.chunk(child)
    except StoreUnavailable:
        place.objects = objects
        kept = kept_lines(place, child)
        before = len(place.chunks[child.task.id].asked)
        await place.chunk(child)
        again = place.chunks[child.task.id].asked[before:]
        assert len(again) == 20 - len(kept)
    place.objects = objects
    place.end(child)

    result = await place.job()
    assert ids(await place.told(result.output_file_id)) == [f"c{number}" for number in range(20)]


def kept_lines(place: Place, child: Child) -> set[int]:
    kept = place.chunks[child.task.id].last_checkpoint
    return set() if kept is None else {line for part in kept["parts"] for line in part["lines"]}


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (BadRequest("No."), 1),
        (NodeRejected("No.", node="n", status=400), 1),
        (BudgetSpent("No.", retry_after_s=9), 1),
        (NodeFault("Broken.", node="n"), TRIES),
        (NodeRejected("Broken.", node="n", status=500), TRIES),
    ],
)
async def test_a_line_that_fails_by_itself_goes_into_the_error_file(error: SutazaiError, asked: int) -> None:
    place = await begun(3)
    (child,) = place.children

    def answer(one: Asked) -> Said:
        if one.text == "1":
            raise error
        return said(one)

    await place.chunk(child, always=answer)
    place.end(child)
    result = await place.job()

    assert ids(await place.told(result.output_file_id)) == ["c0", "c2"]
    (line,) = await place.told(result.error_file_id)
    assert (line["custom_id"], line["error"], line["response"]["status_code"]) == ("c1", None, 418)
    assert line["response"]["body"] == {"error": {"message": error.message}}
    assert (result.completed, result.failed) == (2, 1)
    assert sum(one.text == "1" for one in place.chunks[child.task.id].asked) == asked


@pytest.mark.parametrize(
    "error", [NoHealthyNode("None.", retry_after_s=1), Overloaded("Full.", retry_after_s=1), StoreUnavailable("Gone.")]
)
async def test_lines_wait_while_the_pool_cannot_answer(error: SutazaiError) -> None:
    place = await begun(10)
    (child,) = place.children
    with pytest.raises(type(error)):
        await place.chunk(child, always=error)
    assert kept_lines(place, child) == set()

    await place.chunk(child, always=said)
    place.end(child)

    assert (await place.job()).completed == 10


@pytest.mark.parametrize(
    ("changes", "code", "is_expired"),
    [
        ({"status": TaskStatus.FAILED, "reason": FailureReason.DEADLINE}, "batch_expired", True),
        ({"status": TaskStatus.CANCELLED}, "batch_cancelled", False),
        ({"status": TaskStatus.FAILED, "reason": FailureReason.ERROR, "error": "Worn out."}, "request_failed", False),
    ],
)
async def test_what_a_chunk_left_is_told_as_an_error(changes: dict[str, Any], code: str, is_expired: bool) -> None:
    place = await begun(60)
    first, second = place.children
    await place.chunk(first)
    place.end(first)
    place.end(second, **changes)

    result = await place.job()

    assert ids(await place.told(result.output_file_id)) == [f"c{number}" for number in range(50)]
    errors = await place.told(result.error_file_id)
    assert ids(errors) == [f"c{number}" for number in range(50, 60)]
    assert {(line["error"]["code"], line["response"]) for line in errors} == {(code, None)}
    assert result.is_expired is is_expired


@pytest.mark.parametrize("endpoint", ENDPOINTS)
async def test_lines_are_asked_as_they_are_at_the_address_of_the_job(endpoint: str) -> None:
    place = Place(1, endpoint=endpoint)
    form = {"custom_id": "a", "method": "POST", "url": endpoint, "body": {"model": "m", "self": [1.50]}}
    place.objects.objects[file_at("test", INPUT)] = msgspec.json.encode(form)
    with pytest.raises(Pausing):
        await place.job()
    (child,) = place.children

    await place.chunk(child, always=Said(text="", body={"id": 7, "vector": [0.25]}))
    place.end(child)
    result = await place.job()

    (asked,) = place.chunks[child.task.id].asked
    assert (asked.endpoint, asked.model, asked.messages, asked.options) == (endpoint, "m", (), {"self": [1.5]})
    (line,) = await place.told(result.output_file_id)
    assert line["response"]["body"] == {"id": 7, "vector": [0.25]}
    assert line["response"]["request_id"] == line["id"]


async def test_a_chunk_whose_day_is_over_begins_no_further_line() -> None:
    place = await begun(60)
    first, second = place.children
    ends_at = DAY + timedelta(days=1)

    def last(asked: Asked) -> Said:
        if asked.text == "9":
            place.now = ends_at
        return said(asked)

    for child in (first, second):
        task = replace(child.task, draft=replace(child.task.draft, deadline=ends_at))
        await place.chunk(replace(child, task=task), always=last)
        place.end(child)
    result = await place.job()

    answered = ids(await place.told(result.output_file_id))
    assert answered == [f"c{number}" for number in range(len(answered))]
    assert 10 <= len(answered) <= 10 + LINES_AT_ONCE
    errors = await place.told(result.error_file_id)
    assert ids(errors) == [f"c{number}" for number in range(len(answered), 60)]
    assert {line["error"]["code"] for line in errors} == {"batch_expired"}
    assert result.is_expired


async def test_a_job_that_was_called_off_has_files_of_what_was_answered() -> None:
    place = await begun(120)
    first, second, third = place.children
    await place.chunk(first)
    place.end(first)
    place.end(second, status=TaskStatus.CANCELLED)
    word: dict[str, list[object]] = {
        place.context.task.id: [{"other": 1}, {"cancelling_at": 1_767_225_600}, {"cancelling_at": 1_767_225_700}]
    }
    place.context.sent = word
    await place.chunk(third, sent=word)
    place.end(third)

    result = await place.job()

    assert not place.chunks[third.task.id].asked
    assert ids(await place.told(result.output_file_id)) == [f"c{number}" for number in range(50)]
    errors = await place.told(result.error_file_id)
    assert ids(errors) == [f"c{number}" for number in range(50, 120)]
    assert {(line["error"]["code"], line["response"]) for line in errors} == {("batch_cancelled", None)}
    assert (result.cancelling_at, result.is_expired, result.failed) == (1_767_225_600, False, 70)
    assert not await place.objects.list("t-test/batches", limit=10)


async def test_an_input_that_was_deleted_is_told() -> None:
    place = Place(1)
    place.objects.objects.clear()

    (complaint,) = (await place.job()).errors

    assert (complaint.code, complaint.param) == ("file_not_found", "input_file_id")


async def test_an_input_that_is_deleted_meanwhile_is_told() -> None:
    place = await begun(1)
    place.objects.objects.clear()

    (complaint,) = (await done(place)).errors

    assert complaint.code == "file_not_found"
