"""Where the command line looks for its gateway, and what becomes of errors."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

import pytest

from sutazai.cli.client import GatewayClient, gateway_url, guarded
from sutazai.core.errors import (
    BadRequest,
    NodeRejected,
    NodeUnreachable,
    NoHealthyNode,
    SettingsError,
    SutazaiError,
    Unauthorized,
)
from sutazai.settings.secret import Secret
from sutazai.testing.node import FakeNode
from sutazai.testing.script import Fault


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("http://10.0.0.1:10010", "http://10.0.0.1:10010"),
        ("http://10.0.0.1:10010/v1/", "http://10.0.0.1:10010"),
        ("10.0.0.1:10010", "http://10.0.0.1:10010"),
        ("localhost:8080", "http://localhost:8080"),
        ("https://pool.example/base", "https://pool.example/base"),
    ],
)
def test_an_address_is_taken_as_people_type_it(given: str, url: str, tmp_path: Path) -> None:
    assert gateway_url(given, {}, tmp_path) == url


def test_the_option_wins_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "sutazai.toml").write_text("[server]\nport = 3")
    environ = {"SUTAZAI_URL": "http://b:2"}

    assert gateway_url("http://a:1", environ, tmp_path) == "http://a:1"
    assert gateway_url(None, environ, tmp_path) == "http://b:2"
    assert gateway_url(None, {}, tmp_path) == "http://127.0.0.1:3"


def test_a_settings_file_with_mistakes_does_not_matter_when_the_address_is_given(tmp_path: Path) -> None:
    (tmp_path / "sutazai.toml").write_text("no TOML at all")

    assert gateway_url("http://a:1", {}, tmp_path) == "http://a:1"
    with pytest.raises(SettingsError):
        gateway_url(None, {}, tmp_path)


async def test_the_newest_mark_goes_with_what_is_asked_next() -> None:
    events = b"id: 1\ndata: {}\n\n: x-sutazai-written 1-b\n\n"
    heads: list[bytes] = []
    answers = iter(
        [
            b"HTTP/1.1 202 Accepted\r\nx-sutazai-written: 1-a\r\ncontent-length: 2\r\n\r\n{}",
            b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(events), events),
            b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}",
        ]
    )

    async def answered(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                heads.append(head)
                writer.write(next(answers))
        writer.close()

    async with await asyncio.start_server(answered, "127.0.0.1", 0) as server:
        client = GatewayClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", None)
        try:
            await client.fetch("POST", "/v1/tasks")
            async for _ in client.lines("/v1/tasks/x/events", None, idle_s=5.0, method="GET"):
                pass
            await client.fetch("GET", "/v1/tasks/x")
        finally:
            client.close()

    assert [b"x-sutazai-written: 1-a" in head for head in heads] == [False, True, False]
    assert b"x-sutazai-written: 1-b" in heads[2]


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:10010"),
        ("::", "http://[::1]:10010"),
        ("::1", "http://[::1]:10010"),
        ("10.0.0.7", "http://10.0.0.7:10010"),
    ],
)
def test_an_address_that_means_all_is_reached_over_loopback(host: str, url: str, tmp_path: Path) -> None:
    assert gateway_url(None, {"SUTAZAI_SERVER_HOST": host}, tmp_path) == url


@pytest.mark.parametrize("text", ["ftp://a", "http://", "a b", "http://me:hunter2@a", "http://a:port"])
def test_an_address_that_makes_no_sense_is_told_without_repeating_it(text: str, tmp_path: Path) -> None:
    with pytest.raises(BadRequest) as refused:
        gateway_url(text, {}, tmp_path)

    assert refused.value.message.startswith("The gateway's address ")
    assert "hunter2" not in refused.value.message


def test_a_port_that_nobody_knows_needs_the_option(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="--url"):
        gateway_url(None, {"SUTAZAI_SERVER_PORT": "0"}, tmp_path)


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (SutazaiError("It broke."), 1, "It broke.\n"),
        (NoHealthyNode("All are down.", retry_after_s=5), 1, "All are down.\n"),
        (SettingsError(["One.", "Two."]), 2, "One.\nTwo.\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_become_sentences_and_exit_codes(
    error: BaseException, code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> int:
        raise error

    assert guarded(work) == code
    assert capsys.readouterr() == ("", told)


def test_mistakes_of_ours_are_not_hidden() -> None:
    def work() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        guarded(work)


async def test_a_gateway_that_keeps_silent_is_given_up() -> None:
    async with FakeNode() as silent:
        silent.freeze()
        client = GatewayClient(silent.url, None)

        with pytest.raises(NodeUnreachable, match=r"did not answer within 0\.05 s"):
            await client.fetch("GET", "/api/tags", within_s=0.05)

        client.close()


async def test_a_stream_that_falls_silent_is_given_up() -> None:
    async with FakeNode() as silent:
        silent.default = Fault.stall_mid_stream(1)
        client = GatewayClient(silent.url, None)
        lines = client.lines("/api/generate", {"model": "llama3", "prompt": "x"}, idle_s=0.05)
        first = await anext(lines)

        assert b"Hel" in first
        with pytest.raises(NodeUnreachable, match="broke off"):
            await anext(lines)
        client.close()


async def test_a_gateway_that_cuts_the_connection_is_told_from_one_that_is_away() -> None:
    async with FakeNode() as cutting:
        cutting.probe_fault = Fault.reset_before_head()
        client = GatewayClient(cutting.url, None)
        with pytest.raises(NodeUnreachable, match="broke off"):
            await client.fetch("GET", "/api/tags")
        await cutting.stop()
        with pytest.raises(NodeUnreachable, match="No gateway answered"):
            await client.fetch("GET", "/api/tags")

        client.close()


async def test_an_answer_of_another_shape_is_told() -> None:
    async with FakeNode() as other:
        client = GatewayClient(other.url, None)

        with pytest.raises(NodeRejected, match="not as a gateway does"):
            await client.ask("GET", "/api/tags", shape=list[str])

        client.close()


@pytest.mark.parametrize("key", ["a b", "a\nx-evil: 1", "schlüssel"])
async def test_a_key_that_cannot_stand_in_a_header_is_refused_without_repeating_it(key: str) -> None:
    with pytest.raises(Unauthorized) as refused:
        GatewayClient("http://127.0.0.1:1", Secret(key))

    assert key not in refused.value.message
