"""OpenAI's own Python client has a file of requests answered, through a gateway that also works."""

from __future__ import annotations

import asyncio
import uuid
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import msgspec
import openai
import pytest

from sutazai.adapters.postgres.stores import open_stores
from sutazai.core.identity import Role
from sutazai.core.node import NodeKind
from sutazai.settings.model import Auth, Database, Objects
from sutazai.testing import Answer, Fault

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from openai.types import Batch
    from tests.conftest import StartGateway, StartNode

    from sutazai.testing import FakeNode, Received

LOOK_S = 0.05
LINES = 200
WRONG = {7, 60, 199}
"""Lines that ask for a model that no node has."""
REFUSED = 100
"""The line that the node refuses."""


@pytest.fixture
async def node(fake_nodes: StartNode) -> FakeNode:
    return await fake_nodes(NodeKind.OPENAI, ("m",), slots=16)


@pytest.fixture
async def client(gateways: StartGateway, node: FakeNode, tmp_path: Path) -> AsyncIterator[openai.AsyncOpenAI]:
    gateway = await gateways(node, with_worker=True, objects=Objects(url=str(tmp_path)))
    url = f"http://127.0.0.1:{gateway.port}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=10.0) as opened:
        yield opened


def line(number: int, **changes: Any) -> bytes:
    form: dict[str, Any] = {
        "custom_id": f"request-{number}",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": "lost" if number in WRONG else "m",
            "messages": [{"role": "user", "content": f"line {number}"}],
        },
    }
    return msgspec.json.encode(form | changes)


def asked(received: Received) -> str:
    text: str = received.json["messages"][-1]["content"]
    return text


def answer(received: Received) -> Answer | Fault:
    if asked(received) == f"line {REFUSED}":
        return Fault.status(400, b'{"error":{"message":"too rude"}}')
    return Answer(tokens=("you said ", asked(received)))


async def begun(client: openai.AsyncOpenAI, *lines: bytes, endpoint: Any = "/v1/chat/completions") -> Batch:
    file = await client.files.create(file=("lines.jsonl", b"\n".join(lines)), purpose="batch")
    return await client.batches.create(
        input_file_id=file.id,
        endpoint=endpoint,
        completion_window="24h",
        metadata={"description": "nightly eval job"},
    )


async def until(client: openai.AsyncOpenAI, batch: Batch, is_so: Callable[[Batch], bool]) -> Batch:
    while not is_so(batch):
        await asyncio.sleep(LOOK_S)
        batch = await client.batches.retrieve(batch.id)
    return batch


def has_ended(batch: Batch) -> bool:
    return batch.status in {"completed", "failed", "expired", "cancelled"}


def completed_in(batch: Batch) -> int:
    assert batch.request_counts is not None
    return batch.request_counts.completed


async def told(client: openai.AsyncOpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    content = (await client.files.content(file_id)).content
    return [msgspec.json.decode(one) for one in content.splitlines()]


def parts_in(folder: Path) -> list[Path]:
    """What chunks wrote and nobody has deleted."""
    return [path for path in folder.rglob("*") if "batches" in path.parts and path.is_file()]


async def test_every_line_is_answered_in_order_and_those_that_fail_are_in_the_error_file(
    client: openai.AsyncOpenAI, node: FakeNode, tmp_path: Path
) -> None:
    node.default = answer
    batch = await begun(client, *(line(number) for number in range(LINES)))
    assert (batch.object, batch.status, batch.metadata) == ("batch", "validating", {"description": "nightly eval job"})

    batch = await until(client, batch, has_ended)

    assert (batch.status, batch.errors) == ("completed", None)
    failed = sorted({*WRONG, REFUSED})
    assert batch.request_counts is not None
    assert batch.request_counts.to_dict() == {"total": LINES, "completed": LINES - len(failed), "failed": len(failed)}
    assert batch.in_progress_at and batch.finalizing_at and batch.completed_at  # noqa: PT018 - one statement
    assert batch.usage is not None
    assert batch.usage.output_tokens == 2 * (LINES - len(failed))
    assert batch.usage.total_tokens == batch.usage.input_tokens + batch.usage.output_tokens
    assert batch.model is None  # several were asked for
    output = await told(client, batch.output_file_id)
    good = [number for number in range(LINES) if number not in failed]
    assert [one["custom_id"] for one in output] == [f"request-{number}" for number in good]
    assert len({one["id"] for one in output}) == len(good)
    for number, one in zip(good, output, strict=True):
        assert (one["error"], one["response"]["status_code"]) == (None, 200)
        body = one["response"]["body"]
        assert body["object"] == "chat.completion"
        assert body["choices"][0]["message"]["content"] == f"you said line {number}"
        assert body["usage"]["total_tokens"] > 0
    errors = await told(client, batch.error_file_id)
    assert [one["custom_id"] for one in errors] == [f"request-{number}" for number in failed]
    assert [one["response"]["status_code"] for one in errors] == [404, 404, 400, 404]
    assert "lost" in errors[0]["response"]["body"]["error"]["message"]
    assert sorted(map(asked, node.inferences)) == sorted(f"line {number}" for number in {*good, REFUSED})
    assert parts_in(tmp_path) == []
    kept = await client.files.retrieve(batch.output_file_id or "")
    assert (kept.purpose, kept.filename) == ("batch_output", f"{batch.id}_output.jsonl")


async def test_texts_are_embedded(client: openai.AsyncOpenAI, node: FakeNode) -> None:
    bodies: list[dict[str, Any]] = [
        {"model": "m", "input": "one"},
        {"model": "m", "input": ["two", "three"]},
        {"model": "m", "input": "four", "encoding_format": "base64"},
        {"model": "m"},
        {"model": "lost", "input": "five"},
    ]
    lines = [line(number, url="/v1/embeddings", body=body) for number, body in enumerate(bodies)]

    batch = await until(client, await begun(client, *lines, endpoint="/v1/embeddings"), has_ended)

    assert (batch.status, batch.endpoint) == ("completed", "/v1/embeddings")
    output = await told(client, batch.output_file_id)
    assert [one["custom_id"] for one in output] == ["request-0", "request-1", "request-2"]
    for body, one in zip(bodies, output, strict=False):
        at_once = await client.post("/embeddings", body=body, cast_to=object)
        assert one["response"]["body"]["data"] == at_once["data"]  # type: ignore[index]
    errors = await told(client, batch.error_file_id)
    assert [one["response"]["status_code"] for one in errors] == [400, 404]
    assert [one["response"]["body"]["error"]["param"] for one in errors] == ["input", "model"]


async def test_texts_are_completed(client: openai.AsyncOpenAI, node: FakeNode) -> None:
    node.default = Answer(tokens=("and ", "on"))
    body = {"model": "m", "prompt": "on", "max_tokens": 5, "stream": True}

    batch = await begun(client, line(1, url="/v1/completions", body=body), endpoint="/v1/completions")
    batch = await until(client, batch, has_ended)

    assert batch.model == "m"
    (one,) = await told(client, batch.output_file_id)
    assert one["response"]["body"]["object"] == "text_completion"
    assert one["response"]["body"]["choices"][0]["text"] == "and on"


async def test_an_input_with_mistakes_is_not_begun(client: openai.AsyncOpenAI, node: FakeNode) -> None:
    batch = await begun(client, line(1), line(1), line(2, url="/v1/embeddings"), b"{")

    batch = await until(client, batch, has_ended)

    assert (batch.status, batch.output_file_id, batch.error_file_id) == ("failed", None, None)
    assert batch.failed_at is not None
    assert batch.errors is not None
    assert [(one.code, one.line, one.param) for one in batch.errors.data or ()] == [
        ("duplicate_custom_id", 2, "custom_id"),
        ("invalid_url", 3, "url"),
        ("invalid_json_line", 4, None),
    ]
    assert not node.inferences


async def test_a_batch_job_under_way_is_cancelled(client: openai.AsyncOpenAI, node: FakeNode, tmp_path: Path) -> None:
    node.script.extend([Answer()] * 10)
    node.default = Fault.stall_before_head()
    batch = await begun(client, *(line(number) for number in range(200, 260)))
    batch = await until(client, batch, lambda one: completed_in(one) == 10 and node.active > 0)
    assert parts_in(tmp_path)

    cancelled = await client.batches.cancel(batch.id)

    assert (cancelled.status, cancelled.output_file_id) == ("cancelling", None)
    assert (await client.batches.list()).data[0].status in {"cancelling", "cancelled"}
    cancelled = await until(client, cancelled, has_ended)
    assert cancelled.status == "cancelled"
    assert cancelled.cancelling_at and cancelled.cancelled_at  # noqa: PT018 - one statement
    assert cancelled.request_counts is not None
    assert cancelled.request_counts.to_dict() == {"total": 60, "completed": 10, "failed": 50}
    output = await told(client, cancelled.output_file_id)
    assert {one["response"]["status_code"] for one in output} == {200}
    errors = await told(client, cancelled.error_file_id)
    assert {one["error"]["code"] for one in errors} == {"batch_cancelled"}
    assert sorted(one["custom_id"] for one in output + errors) == sorted(
        f"request-{number}" for number in range(200, 260)
    )
    async with asyncio.timeout(5.0):
        while node.active:
            await asyncio.sleep(LOOK_S)
    assert parts_in(tmp_path) == []
    assert await client.batches.cancel(batch.id) == cancelled


@pytest.mark.deadline(90)
async def test_a_batch_job_whose_day_is_over_has_files_of_what_was_answered(
    client: openai.AsyncOpenAI, node: FakeNode, data_dir: Path, tmp_path: Path
) -> None:
    """Eight chunks of fifty lines are taken, four end after four seconds; one that waits is found late within one."""
    node.default = Answer(first_token_s=0.3)
    batch = await begun(client, *(line(number) for number in range(200, 602)))
    batch = await until(client, batch, lambda one: completed_in(one) > 0)
    async with open_stores(Database(), data_dir) as stores, stores.databases[""].transaction() as connection:
        statement = "UPDATE tasks SET deadline = now() WHERE parent = $1::text::uuid"
        await connection.execute(statement, batch.id.removeprefix("batch_"))

    batch = await until(client, batch, has_ended)

    assert batch.status == "expired"
    assert batch.expired_at is not None
    assert batch.request_counts is not None
    assert batch.request_counts.to_dict() == {"total": 402, "completed": 400, "failed": 2}
    output = await told(client, batch.output_file_id)
    assert [one["custom_id"] for one in output] == [f"request-{number}" for number in range(200, 600)]
    errors = await told(client, batch.error_file_id)
    assert [one["custom_id"] for one in errors] == ["request-600", "request-601"]
    assert {(one["error"]["code"], one["response"]) for one in errors} == {("batch_expired", None)}
    assert parts_in(tmp_path) == []


async def test_what_has_ended_is_not_cancelled(client: openai.AsyncOpenAI) -> None:
    batch = await until(client, await begun(client, line(1)), has_ended)
    assert batch.status == "completed"

    with pytest.raises(openai.ConflictError, match="completed already"):
        await client.batches.cancel(batch.id)


async def test_a_batch_job_is_found_by_another_gateway_and_its_files_too(
    client: openai.AsyncOpenAI, gateways: StartGateway, node: FakeNode, tmp_path: Path
) -> None:
    batch = await until(client, await begun(client, line(1), line(7)), has_ended)
    other = await gateways(node, objects=Objects(url=str(tmp_path)))

    url = f"http://127.0.0.1:{other.port}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as there:
        assert await there.batches.retrieve(batch.id) == batch
        for file_id in (batch.input_file_id, batch.output_file_id, batch.error_file_id):
            assert file_id is not None
            here = (await client.files.content(file_id)).content
            assert (await there.files.content(file_id)).content == here
            kept = await there.files.retrieve(file_id)
            assert kept.bytes == len(here)


async def test_batch_jobs_are_listed_newest_first_in_pages(client: openai.AsyncOpenAI) -> None:
    made = [(await begun(client, line(number))).id for number in range(3)]

    page = await client.batches.list(limit=2)

    assert [one.id for one in page.data] == made[:0:-1]
    assert page.has_more
    assert (await page.get_next_page()).data[0].id == made[0]
    for one in made:
        await until(client, await client.batches.retrieve(one), has_ended)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"input_file_id": "file-" + "0" * 32}, "input_file_id"),
        ({"input_file_id": "../secret"}, "input_file_id"),
        ({"endpoint": "/v1/moderations"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"metadata": {"a": "b" * 513}}, "metadata"),
    ],
)
async def test_a_batch_job_that_cannot_be_is_refused(
    client: openai.AsyncOpenAI, changes: dict[str, Any], where: str
) -> None:
    file = await client.files.create(file=("lines.jsonl", line(1)), purpose="batch")
    wanted: dict[str, Any] = {
        "input_file_id": file.id,
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
    }

    with pytest.raises(openai.BadRequestError, match=where):
        await client.batches.create(**wanted | changes)


async def test_a_file_of_answers_is_no_input(client: openai.AsyncOpenAI) -> None:
    batch = await until(client, await begun(client, line(1)), has_ended)
    assert batch.output_file_id is not None

    with pytest.raises(openai.BadRequestError, match="purpose is `batch_output`"):
        await client.batches.create(
            input_file_id=batch.output_file_id, endpoint="/v1/chat/completions", completion_window="24h"
        )


async def test_a_chunk_cannot_be_submitted_by_clients(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="No agent 'batch_chunk'"):
        await client.post("/tasks", body={"agent": "batch_chunk"}, cast_to=object)
    agents: Any = await client.get("/agents", cast_to=object)
    assert "batch" in {one["name"] for one in agents["data"]}
    assert "batch_chunk" not in {one["name"] for one in agents["data"]}


async def test_another_tenant_finds_no_batch_job(
    gateways: StartGateway, node: FakeNode, data_dir: Path, tmp_path: Path
) -> None:
    async with AsyncExitStack() as stack:
        stores = await stack.enter_async_context(open_stores(Database(), data_dir))
        names = [f"{letter}-{uuid.uuid4().hex[:8]}" for letter in "ab"]
        keys = [(await stores.keys.create(name=name, tenant=name, role=Role.USER))[1] for name in names]
        gateway = await gateways(node, objects=Objects(url=str(tmp_path)), auth=Auth(required=True))
        url = f"http://127.0.0.1:{gateway.port}/v1"
        owner, other = [
            await stack.enter_async_context(openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0))
            for key in keys
        ]
        batch = await begun(owner, line(1))

        for call in (other.batches.retrieve, other.batches.cancel):
            with pytest.raises(openai.NotFoundError, match=batch.id):
                await call(batch.id)
        assert [one.id async for one in other.batches.list()] == []
        with pytest.raises(openai.BadRequestError, match="no file here"):
            await other.batches.create(
                input_file_id=batch.input_file_id, endpoint="/v1/chat/completions", completion_window="24h"
            )
        assert (await owner.batches.retrieve(batch.id)).status == "validating"
        assert (await owner.batches.cancel(batch.id)).status == "cancelled"


async def test_an_id_that_is_none_finds_nothing(client: openai.AsyncOpenAI) -> None:
    for wrong in ("batch_" + "0" * 32, "batch_1", "task_" + "0" * 32, "0" * 32):
        with pytest.raises(openai.NotFoundError):
            await client.batches.retrieve(wrong)
