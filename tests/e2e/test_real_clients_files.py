"""OpenAI's own Python client keeps files here."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import openai
import pytest

from sutazai.core.node import NodeKind
from sutazai.settings.model import Objects, Server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.conftest import StartGateway, StartNode

LINES = b'{"custom_id": "1"}\n' * 100_000


@pytest.fixture
async def client(gateways: StartGateway, fake_nodes: StartNode, tmp_path: Path) -> AsyncIterator[openai.AsyncOpenAI]:
    gateway = await gateways(
        await fake_nodes(NodeKind.OLLAMA, ("llama3",)),
        objects=Objects(url=str(tmp_path)),
        server=Server(max_body_bytes=3 * 2**20),
    )
    url = f"http://127.0.0.1:{gateway.port}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=10.0) as opened:
        yield opened


def kept(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("file-*")]


async def test_a_file_is_uploaded_listed_read_and_deleted(client: openai.AsyncOpenAI, tmp_path: Path) -> None:
    file = await client.files.create(file=("lines.jsonl", LINES), purpose="batch")
    assert re.fullmatch("file-[0-9a-f]{32}", file.id)
    assert (file.filename, file.bytes, file.purpose, file.status) == ("lines.jsonl", len(LINES), "batch", "processed")

    assert await client.files.retrieve(file.id) == file
    assert file.id in [one.id async for one in client.files.list(purpose="batch")]
    assert (await client.files.content(file.id)).content == LINES
    assert kept(tmp_path) == [file.id]

    deleted = await client.files.delete(file.id)
    assert deleted.deleted
    assert kept(tmp_path) == []
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError, match=file.id):
            await call(file.id)


async def test_files_are_listed_in_pages(client: openai.AsyncOpenAI) -> None:
    made = [(await client.files.create(file=(f"{number}", b"x"), purpose="batch")).id for number in range(3)]
    page = await client.files.list(limit=2, order="desc")
    newest = [one.id for one in page.data]
    assert page.has_more
    assert newest == made[:0:-1]
    assert next(iter((await page.get_next_page()).data)).id == made[0]


async def test_an_empty_file_stays_empty(client: openai.AsyncOpenAI) -> None:
    file = await client.files.create(file=("empty.jsonl", b""), purpose="batch")

    assert (await client.files.content(file.id)).content == b""


async def test_a_file_for_another_purpose_is_refused(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="purpose must be"):
        await client.files.create(file=("a", b"x"), purpose="fine-tune")


async def test_a_file_over_the_limit_of_a_body_is_refused(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        await client.files.create(file=("a", bytes(4 * 2**20)), purpose="batch")
    assert caught.value.status_code == 413
