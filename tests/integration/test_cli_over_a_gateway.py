"""`sutazai nodes`, `models`, `chat` and `doctor` as they are typed: processes of their own, over a real gateway."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.postgres_servers import embedded

import sutazai
from sutazai.adapters.postgres.stores import open_stores
from sutazai.bootstrap import Gateway, open_gateway
from sutazai.core.identity import Role
from sutazai.core.node import NodeKind
from sutazai.settings.model import (
    Auth,
    Database,
    Discovery,
    HealthSettings,
    Logs,
    NodeSettings,
    Server,
    Settings,
)
from sutazai.testing.node import FakeNode
from sutazai.testing.script import Answer, Fault

SOURCE = Path(sutazai.__file__).parents[1]
COMMAND_S = 20.0


@pytest.fixture(scope="module")
def data_dir() -> Iterator[Path]:
    """A folder whose database runs, so that gateways need not start one."""
    with embedded() as (_, folder):
        yield folder


@asynccontextmanager
async def gateway(data_dir: Path, *nodes: FakeNode, keys: bool = False) -> AsyncIterator[Gateway]:
    """A gateway in front of the nodes, which looks at them ten times a second."""
    settings = Settings(
        server=Server(port=0, drain_s=0.1),
        auth=Auth(required=keys),
        discovery=Discovery(ollama=False),
        nodes=tuple(
            NodeSettings(url=node.url, kind=node.kind.value, name=f"n{number}") for number, node in enumerate(nodes, 1)
        ),
        health=HealthSettings(interval_s=0.1, failures=1),
        logs=Logs(access=False),
    )
    async with open_gateway(settings, data_dir=data_dir, settings_path=None, environ={}, with_engine=False) as opened:
        yield opened


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str


class Shell:
    """Runs commands in an empty folder, where they find nothing but what a test gives them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = ""
        self.environ: dict[str, str] = {}

    def at(self, opened: Gateway) -> Shell:
        """Talk to that gateway."""
        self.url = f"http://127.0.0.1:{opened.port}"
        return self

    async def start(self, *words: str, **files: Any) -> asyncio.subprocess.Process:
        """Begin a command; `files` as for a subprocess."""
        files = {"stdin": asyncio.subprocess.DEVNULL, "stdout": -1, "stderr": -1} | files
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-W",
            "error",
            "-m",
            "sutazai",
            *words,
            cwd=self.folder,
            env={
                "PYTHONPATH": str(SOURCE),
                "PATH": os.defpath,
                "HOME": str(self.folder),
                "TERM": "xterm",
                "COLUMNS": "120",
                **({"SUTAZAI_URL": self.url} if self.url else {}),
                **self.environ,
            },
            **files,
        )

    async def run(self, *words: str, stdin: str | None = None) -> Done:
        """A command from its beginning to its end."""
        files = {} if stdin is None else {"stdin": asyncio.subprocess.PIPE}
        return await ended(await self.start(*words, **files), stdin)

    @asynccontextmanager
    async def terminal(self, *words: str) -> AsyncIterator[Terminal]:
        """A command in a terminal; it is killed at the end where it still runs."""
        main, side = pty.openpty()
        process = await self.start(*words, stdin=side, stdout=side, stderr=side)
        os.close(side)
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(main, "rb", buffering=0)
        )
        try:
            yield Terminal(process, reader, main)
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()
            transport.close()


class Terminal:
    """What a user sees and types."""

    def __init__(self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, main: int) -> None:
        self.process = process
        self._reader = reader
        self._main = main
        self.seen = ""

    async def until(self, text: str) -> str:
        """Wait for a text after what was waited for before; all up to its end. Raises `TimeoutError`."""
        async with asyncio.timeout(COMMAND_S):
            while text not in self.seen:
                chunk = await self._reader.read(4096)
                assert chunk, f"The command ended before it wrote {text!r}; it wrote {self.seen!r}."
                self.seen += chunk.decode(errors="replace")
        before, _, self.seen = self.seen.partition(text)
        return before + text

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._main, text.encode())

    async def code(self) -> int:
        """The exit code, once it has ended."""
        async with asyncio.timeout(COMMAND_S):
            return await self.process.wait()


async def ended(process: asyncio.subprocess.Process, stdin: str | None = None) -> Done:
    async with asyncio.timeout(COMMAND_S):
        out, err = await process.communicate(None if stdin is None else stdin.encode())
    assert process.returncode is not None
    done = Done(process.returncode, (out or b"").decode(), (err or b"").decode())
    assert "Traceback" not in done.err
    return done


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def cells(table: str) -> list[list[str]]:
    """The cells of columns that are three spaces apart."""
    return [[cell.strip() for cell in line.split("   ") if cell.strip()] for line in table.splitlines()]


def words(count: int, between_s: float = 0.0) -> Answer:
    return Answer(tokens=tuple(f"w{number} " for number in range(count)), between_s=between_s)


# the way to the gateway


@pytest.mark.parametrize("command", [("nodes",), ("models", "list"), ("models", "pull", "m"), ("chat", "m", "hi")])
async def test_where_no_gateway_runs_one_sentence_says_how_to_start_one(command: Sequence[str], shell: Shell) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed_soon:
        port = closed_soon.getsockname()[1]

    done = await shell.run(*command, "--url", f"127.0.0.1:{port}")

    assert done.code == 1
    assert done.out == ""
    assert done.err == f"No gateway answered at http://127.0.0.1:{port}. Start one with `sutazai up`.\n"


async def test_something_else_at_the_address_is_not_taken_for_a_gateway(shell: Shell) -> None:
    async with FakeNode() as node:
        done = await shell.run("nodes", "--url", node.url)

    assert done.code == 1
    assert "not as a gateway does" in done.err


async def test_settings_with_mistakes_end_with_2(shell: Shell) -> None:
    (shell.folder / "sutazai.toml").write_text("[server]\nprot = 1")

    done = await shell.run("nodes")

    assert done.code == 2
    assert "server.prot" in done.err


async def test_keys_are_asked_for_and_never_shown(data_dir: Path, shell: Shell) -> None:
    async with open_stores(Database(), data_dir) as stores:
        _, user = await stores.keys.create(name="cli-user", tenant="t", role=Role.USER)
        _, admin = await stores.keys.create(name="cli-admin", tenant="t", role=Role.ADMIN)
    async with FakeNode() as node, gateway(data_dir, node, keys=True) as opened:
        shell.at(opened)
        without = await shell.run("nodes")
        shell.environ = {"SUTAZAI_KEY": "sk-sutazai-nobody-knows-this"}
        unknown = await shell.run("nodes")
        shell.environ = {"SUTAZAI_KEY": user}
        forbidden = await shell.run("nodes")
        listed = await shell.run("models", "list")
        asked = await shell.run("chat", "llama3", "hi")
        shell.environ = {"SUTAZAI_KEY": admin}
        allowed = await shell.run("nodes")

    assert [without.code, unknown.code, forbidden.code] == [1, 1, 1]
    assert "Set SUTAZAI_KEY" in without.err
    assert "did not know the key in SUTAZAI_KEY" in unknown.err
    assert "admin key" in forbidden.err
    assert cells(listed.out)[1][2:] == ["-", "-"]
    assert asked.out == "Hello\n"
    assert "n1" in allowed.out
    assert "nobody-knows" not in unknown.out + unknown.err


# nodes


async def test_nodes_show_health_load_and_models(data_dir: Path, shell: Shell) -> None:
    async with (
        FakeNode(models=("llama3", "phi"), slots=2) as one,
        FakeNode(NodeKind.OPENAI, ("vicuna",)) as two,
        FakeNode() as gone,
    ):
        one.load("phi")
        await gone.stop()
        async with gateway(data_dir, one, two, gone) as opened:
            table = await shell.at(opened).run("nodes", "--watch")
            told = json.loads((await shell.run("nodes", "--json")).out)

    head, *rows = cells(table.out)
    assert head == ["NODE", "KIND", "HEALTH", "IN FLIGHT", "LOAD", "MODELS (* LOADED)", "LAST ERROR"]
    assert rows[0] == ["n1", "ollama", "up", "0/1", "0.00", "llama3, phi*", "-"]
    assert rows[1] == ["n2", "openai", "up", "0/64", "0.00", "vicuna*", "-"]
    assert rows[2][:3] == ["n3", "ollama", "down"]
    assert "could not be reached" in rows[2][-1]
    assert [node["health"] for node in told["nodes"]] == ["up", "up", "down"]


async def test_a_watched_table_follows_the_pool_and_ends_with_ctrl_c(data_dir: Path, shell: Shell) -> None:
    async with (
        FakeNode() as node,
        gateway(data_dir, node) as opened,
        shell.at(opened).terminal("nodes", "--watch") as terminal,
    ):
        await terminal.until("up")
        node.add_model("newcomer")
        await terminal.until("newcomer")
        await node.stop()
        await terminal.until("down")
        terminal.process.send_signal(signal.SIGINT)

        assert await terminal.code() == 130


async def test_a_watched_table_stands_while_the_gateway_is_away(data_dir: Path, shell: Shell) -> None:
    async with FakeNode() as node, AsyncExitStack() as stack:
        opened = await stack.enter_async_context(gateway(data_dir, node))
        async with shell.at(opened).terminal("nodes", "--watch") as terminal:
            await terminal.until("llama3")
            await stack.aclose()
            seen = await terminal.until("No gateway answered")

    assert "llama3" in seen


# models


async def test_models_are_listed_with_their_nodes(data_dir: Path, shell: Shell) -> None:
    async with FakeNode(models=("llama3", "phi")) as one, FakeNode(models=("llama3",)) as two:
        two.load("llama3")
        async with gateway(data_dir, one, two) as opened:
            table = cells((await shell.at(opened).run("models", "list")).out)
            told = json.loads((await shell.run("models", "list", "--json")).out)
            loaded = cells((await shell.run("models", "ps")).out)

    assert table[0] == ["NAME", "SIZE", "NODES", "LOADED ON"]
    assert table[1][0] == "llama3:latest"
    assert table[1][2:] == ["n1, n2", "n2"]
    assert table[2][2:] == ["n1", "-"]
    assert told[0]["nodes"] == ["n1", "n2"]
    assert told[0]["size_bytes"] > 0
    assert loaded[1][:2] == ["llama3:latest", "n2"]


async def test_a_model_is_shown_as_facts_or_json(data_dir: Path, shell: Shell) -> None:
    async with FakeNode() as node, gateway(data_dir, node) as opened:
        table = await shell.at(opened).run("models", "show", "llama3")
        told = json.loads((await shell.run("models", "show", "llama3", "--json")).out)
        wrong = await shell.run("models", "show", "lama3")

    assert ["context length", "131072"] in cells(table.out)
    assert told["details"]["family"] == "llama"
    assert wrong.code == 1
    assert "Did you mean llama3" in wrong.err


async def test_a_model_is_pulled_to_every_node_and_removed_again(data_dir: Path, shell: Shell) -> None:
    async with FakeNode() as one, FakeNode() as two, gateway(data_dir, one, two) as opened:
        pulled = await shell.at(opened).run("models", "pull", "mistral")
        have = [node.models for node in (one, two)]
        for node in (one, two):
            await node.until(lambda: len(opened.fleet.candidates("mistral")) == 2)
        removed = await shell.run("models", "rm", "mistral", "llama3")

        assert (pulled.code, pulled.out) == (0, "mistral is on n1, n2.\n")
        assert {"n1: pulling manifest", "n2: pulling manifest", "n1: success"} <= set(pulled.err.splitlines())
        assert all("mistral:latest" in models for models in have)
        assert (removed.code, removed.out) == (0, "mistral was removed.\nllama3 was removed.\n")
        assert (one.models, two.models) == ((), ())


async def test_a_pull_that_fails_on_one_node_names_it(data_dir: Path, shell: Shell) -> None:
    async with FakeNode() as one, FakeNode(registry=()) as two, gateway(data_dir, one, two) as opened:
        done = await shell.at(opened).run("models", "pull", "mistral")

    assert done.code == 1
    assert done.out == ""
    assert "n2: pull model manifest: file does not exist" in done.err


async def test_a_pull_in_a_terminal_has_bars_and_a_line_for_each_node(data_dir: Path, shell: Shell) -> None:
    async with (
        FakeNode(pull_s=0.5) as one,
        FakeNode() as two,
        gateway(data_dir, one, two) as opened,
        shell.at(opened).terminal("models", "pull", "mistral") as terminal,
    ):
        seen = await terminal.until("mistral is on n1, n2.")

        assert await terminal.code() == 0

    assert "━" in seen
    assert "GB" in seen
    assert "n1" in seen
    assert "success" in seen


async def test_ctrl_c_stops_a_pull_on_the_nodes(data_dir: Path, shell: Shell) -> None:
    async with FakeNode(pull_s=60) as node, gateway(data_dir, node) as opened:
        process = await shell.at(opened).start("models", "pull", "mistral")
        await node.until(lambda: any(received.path == "/api/pull" for received in node.requests))
        (pull,) = [received for received in node.requests if received.path == "/api/pull"]
        process.send_signal(signal.SIGINT)
        done = await ended(process)
        await node.until(lambda: pull.aborted)

        assert done.code == 130
        assert node.models == ("llama3:latest",)


async def test_models_of_others_cannot_be_pulled(data_dir: Path, shell: Shell) -> None:
    async with FakeNode(NodeKind.OPENAI) as node, gateway(data_dir, node) as opened:
        done = await shell.at(opened).run("models", "pull", "mistral")

    assert done.code == 1
    assert "only Ollama nodes can fetch" in done.err


# chat, one answer


async def test_a_prompt_is_answered_and_its_options_reach_the_node(data_dir: Path, shell: Shell) -> None:
    async with FakeNode(NodeKind.OPENAI, ("m",)) as node, gateway(data_dir, node) as opened:
        done = await shell.at(opened).run(
            "chat", "m", "why", "-5", "degrees?", "--system", "Be brief.", "--temperature", "0.5", "--max-tokens", "7"
        )
        (received,) = node.inferences

    assert (done.code, done.out, done.err) == (0, "Hello\n", "")
    assert received.json["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "why -5 degrees?"},
    ]
    assert (received.json["temperature"], received.json["max_tokens"]) == (0.5, 7)


async def test_a_text_from_a_pipe_follows_the_prompt(data_dir: Path, shell: Shell) -> None:
    async with FakeNode(NodeKind.OPENAI, ("m",)) as node, gateway(data_dir, node) as opened:
        await shell.at(opened).run("chat", "m", "Explain:", stdin="a = 1\n")
        (received,) = node.inferences

    assert received.json["messages"] == [{"role": "user", "content": "Explain:\n\na = 1"}]


async def test_without_a_model_the_first_that_chats_is_asked(data_dir: Path, shell: Shell) -> None:
    async with FakeNode(models=("a-embed", "b")) as node, gateway(data_dir, node) as opened:
        done = await shell.at(opened).run("chat", "--stats", stdin="hi")

        assert node.inferences[0].json["model"] == "b:latest"

    assert done.out == "Hello\n"
    assert done.err.startswith("first token 0.")
    assert ", 2 tokens, " in done.err


async def test_nothing_to_ask_says_so(data_dir: Path, shell: Shell) -> None:
    done = await shell.run("chat", "m")

    assert (done.code, done.err) == (1, "There was nothing to ask. Give a prompt, or pipe a text in.\n")


async def test_an_answer_comes_as_it_is_made_and_ctrl_c_frees_the_node(data_dir: Path, shell: Shell) -> None:
    async with FakeNode() as node, gateway(data_dir, node) as opened:
        node.default = Fault.stall_mid_stream(2, words(5))
        process = await shell.at(opened).start("chat", "llama3", "hi")
        assert process.stdout is not None
        first = await process.stdout.readexactly(len("w0 w1 "))
        process.send_signal(signal.SIGINT)
        done = await ended(process)
        await node.wait_idle()

        assert first == b"w0 w1 "
        assert (done.code, done.out, done.err) == (130, "\n", "")
        assert node.inferences[0].aborted


async def test_a_reader_that_leaves_ends_the_answer_without_noise(data_dir: Path, shell: Shell) -> None:
    async with FakeNode() as node, gateway(data_dir, node) as opened:
        node.default = words(2000, between_s=0.01)
        ours, theirs = os.pipe()
        process = await shell.at(opened).start("chat", "llama3", "hi", stdout=theirs)
        os.close(theirs)
        await node.wait_for(1)
        os.close(ours)
        done = await ended(process)
        await node.wait_idle()

        assert (done.code, done.err) == (1, "")
        assert node.inferences[0].aborted


async def test_an_answer_that_breaks_off_ends_with_the_reason(data_dir: Path, shell: Shell) -> None:
    async with FakeNode() as node, gateway(data_dir, node) as opened:
        node.default = Fault.error_mid_stream(2, "the model broke down", words(5))
        done = await shell.at(opened).run("chat", "llama3", "hi")

    assert (done.code, done.out) == (1, "w0 w1 \n")
    assert "the model broke down" in done.err


async def test_a_model_that_is_nowhere_is_told_with_the_nearest(data_dir: Path, shell: Shell) -> None:
    async with FakeNode() as node, gateway(data_dir, node) as opened:
        done = await shell.at(opened).run("chat", "lama3", "hi")

    assert done.code == 1
    assert "Did you mean llama3" in done.err


async def test_thoughts_and_control_characters_are_for_those_who_can_show_them(data_dir: Path, shell: Shell) -> None:
    async with FakeNode() as node, gateway(data_dir, node) as opened:
        node.default = Answer(thinking=("hmm",), tokens=("\x1b]0;owned\x07", "fine"))
        piped = await shell.at(opened).run("chat", "llama3", "hi")
        async with shell.terminal("chat", "llama3", "hi") as terminal:
            seen = await terminal.until("fine")

            assert await terminal.code() == 0

    assert piped.out == "\x1b]0;owned\x07fine\n"
    assert "\x1b[2mhmm\x1b[0m" in seen
    assert "]0;owned" in seen
    assert "\x1b]" not in seen


# chat, a conversation


async def test_a_conversation_remembers_forgets_and_switches(data_dir: Path, shell: Shell) -> None:
    async with FakeNode(NodeKind.OPENAI, ("m1", "m2")) as node, gateway(data_dir, node) as opened:
        async with shell.at(opened).terminal("chat", "--system", "S") as terminal:
            for line, answer in (
                ("one\n", "Hello"),
                ("two\n", "Hello"),
                ("/model nope\n", "is on no node"),
                ("/model m2\n", "\n"),
                ("/what\n", "/what was not known"),
                ("/clear\n", "\n"),
                ('"""three\nfour"""\n', "Hello"),
            ):
                await terminal.until(">>> ")
                terminal.type(line)
                await terminal.until(answer)
            await terminal.until(">>> ")
            terminal.type("/bye\n")

            assert await terminal.code() == 0

        told = [[message["content"] for message in received.json["messages"]] for received in node.inferences]
        assert told == [["S", "one"], ["S", "one", "Hello", "two"], ["S", "three\nfour"]]
        assert [received.json["model"] for received in node.inferences] == ["m1", "m1", "m2"]


async def test_ctrl_c_stops_the_answer_and_the_next_one_leaves(data_dir: Path, shell: Shell) -> None:
    async with FakeNode() as node, gateway(data_dir, node) as opened:
        node.script.append(Fault.stall_mid_stream(2, words(5)))
        async with shell.at(opened).terminal("chat") as terminal:
            await terminal.until(">>> ")
            terminal.type("hi\n")
            await terminal.until("w1 ")
            terminal.process.send_signal(signal.SIGINT)
            await terminal.until(">>> ")
            await node.wait_idle()
            terminal.type("go on\n")
            await terminal.until("Hello")
            await terminal.until(">>> ")
            terminal.process.send_signal(signal.SIGINT)
            # Python's readline overlooks a signal that comes just before it waits for a key, until there is a line
            terminal.type("\n")

            assert await terminal.code() == 130

        contents = [message["content"] for message in node.inferences[1].json["messages"]]
        assert contents == ["hi", "w0 w1 ", "go on"]


async def test_ctrl_d_leaves(data_dir: Path, shell: Shell) -> None:
    async with FakeNode() as node, gateway(data_dir, node) as opened, shell.at(opened).terminal("chat") as terminal:
        await terminal.until(">>> ")
        terminal.type("\x04")

        assert await terminal.code() == 0


# doctor


def by_check(done: Done) -> dict[str, dict[str, str]]:
    return {finding["check"]: finding for finding in json.loads(done.out)}


def write_settings(shell: Shell, data_dir: Path, *tables: str, port: int = 0) -> None:
    head = f'[server]\nport = {port}\n[database]\ndata_dir = "{data_dir}"\n[engine]\nenabled = "never"\n'
    (shell.folder / "sutazai.toml").write_text(head + "\n".join(tables))


def table(node: FakeNode, kind: NodeKind | None = None, more: str = "") -> str:
    return f'[[nodes]]\nurl = "{node.url}"\nkind = "{(kind or node.kind).value}"\n{more}'


async def test_a_healthy_installation_has_nothing_to_mend(data_dir: Path, shell: Shell) -> None:
    async with FakeNode() as node, FakeNode(NodeKind.LLAMACPP) as other, gateway(data_dir, node) as opened:
        write_settings(shell, data_dir, table(node), table(other))
        text = await shell.at(opened).run("doctor")
        found = by_check(await shell.run("doctor", "--json"))

    assert text.code == 0
    assert "FAIL" not in text.out
    assert found["gateway"]["message"] == f"A gateway answers at {shell.url}."
    assert "OLLAMA_NUM_PARALLEL" in found[f"node 127.0.0.1:{node.port}"]["remedy"]
    assert "4 slots" in found[f"node 127.0.0.1:{other.port}"]["message"]
    assert {"python", "settings", "data folder", "database", "keys", "open files"} <= found.keys()


async def test_sick_nodes_fail_each_with_its_remedy(data_dir: Path, shell: Shell) -> None:
    async with (
        FakeNode() as gone,
        FakeNode(NodeKind.OPENAI) as mistaken,
        FakeNode(NodeKind.OPENAI, api_key="hunter2") as locked,
        FakeNode(models=()) as empty,
        FakeNode(NodeKind.LLAMACPP) as almost,
        FakeNode() as picky,
    ):
        await gone.stop()
        write_settings(
            shell,
            data_dir,
            table(gone),
            table(mistaken, NodeKind.OLLAMA),
            table(locked, more='api_key = "hunter3"'),
            table(empty),
            table(almost, NodeKind.OPENAI),
            table(picky, more='models = ["phi"]'),
        )
        done = await shell.run("doctor", "--json")
        nodes = [
            by_check(done)[f"node 127.0.0.1:{node.port}"] for node in (gone, mistaken, locked, empty, almost, picky)
        ]

    assert done.code == 1
    assert [node["level"] for node in nodes] == ["fail", "fail", "fail", "warn", "warn", "warn"]
    assert "could not be reached" in nodes[0]["message"]
    assert 'Set kind = "openai"' in nodes[1]["remedy"]
    assert "api_key" in nodes[2]["remedy"]
    assert "sutazai models pull" in nodes[3]["remedy"]
    assert 'Set kind = "llamacpp"' in nodes[4]["remedy"]
    assert "phi" in nodes[5]["message"]
    assert "hunter" not in done.out + done.err


async def test_a_node_that_keeps_silent_is_told_within_its_limit(data_dir: Path, shell: Shell) -> None:
    async with FakeNode() as node:
        node.freeze()
        write_settings(shell, data_dir, table(node), "[health]\ntimeout_s = 0.2")
        found = by_check(await shell.run("doctor", "--json"))[f"node 127.0.0.1:{node.port}"]

    assert found["level"] == "fail"
    assert "within 0.2 s" in found["message"]


async def test_a_port_that_another_program_has_fails(data_dir: Path, shell: Shell) -> None:
    async with FakeNode() as node:
        write_settings(shell, data_dir, port=node.port)
        found = by_check(await shell.run("doctor", "--json"))["gateway"]

    assert found["level"] == "fail"
    assert "it is no gateway" in found["message"]


async def test_a_gateway_that_was_named_and_is_away_fails(data_dir: Path, shell: Shell) -> None:
    write_settings(shell, data_dir)

    found = by_check(await shell.run("doctor", "--json", "--url", "http://127.0.0.1:1"))["gateway"]

    assert (found["level"], found["message"]) == ("fail", "No gateway answered at http://127.0.0.1:1.")


async def test_an_open_address_needs_a_key(tmp_path: Path, shell: Shell) -> None:
    write_settings(shell, tmp_path / "never-started")
    shell.environ = {"SUTAZAI_SERVER_HOST": "0.0.0.0", "SUTAZAI_DISCOVERY_OLLAMA": "no"}

    done = await shell.run("doctor", "--json")

    found = by_check(done)
    assert done.code == 1
    assert (found["keys"]["level"], found["nodes"]["level"]) == ("fail", "warn")
    assert "sutazai keys create" in found["keys"]["remedy"]
    assert not (tmp_path / "never-started").exists()


async def test_a_database_that_is_away_is_told_without_its_password(shell: Shell) -> None:
    shell.environ = {"SUTAZAI_DATABASE_URL": "postgresql://me:hunter2@127.0.0.1:1/x"}

    done = await shell.run("doctor")

    assert done.code == 1
    assert "FAIL  database" in done.out
    assert "hunter2" not in done.out + done.err


async def test_mistakes_in_the_settings_are_all_told(shell: Shell) -> None:
    (shell.folder / "sutazai.toml").write_text("[server]\nprot = 1\n[retry]\nattempts = 0\n")

    done = await shell.run("doctor", "--json")

    wrong = [finding for finding in json.loads(done.out) if finding["check"] == "settings"]
    assert done.code == 1
    assert [finding["level"] for finding in wrong] == ["fail", "fail"]
    assert "server.port" in wrong[0]["message"]


# cache


async def test_forgetting_names_what_is_to_be_forgotten(data_dir: Path, shell: Shell) -> None:
    async with FakeNode() as node, gateway(data_dir, node) as opened:
        shell.at(opened)
        forgot = await shell.run("cache", "forget", "--model", "llama3", "--tenant", "acme")
        everything = await shell.run("cache", "forget", "--all")
        nothing = await shell.run("cache", "forget")
        both = await shell.run("cache", "forget", "--all", "--model", "llama3")
    async with open_stores(Database(), data_dir) as stores:
        entries = [entry for entry in await stores.audit.newest(limit=4) if entry.outcome == "done"]

    assert [forgot.code, everything.code, nothing.code, both.code] == [0, 0, 1, 1]
    assert forgot.out.endswith(" forgotten.\n")
    assert "or else `--all`" in nothing.err
    assert [(entry.action, entry.subject) for entry in entries] == [
        ("cache.forgotten", "everything"),
        ("cache.forgotten", "acme, llama3"),
    ]


# route


async def test_route_explain_names_the_kind_the_reasons_and_what_is_there(data_dir: Path, shell: Shell) -> None:
    async with FakeNode(NodeKind.OPENAI, ("tinyllama",)) as node, gateway(data_dir, node) as opened:
        shell.at(opened)
        told = await shell.run("route", "explain", "Write a Python function that sorts words")
        plain = json.loads((await shell.run("route", "explain", "--json", stdin="What is entropy?\n")).out)

    assert told.out.startswith("code_generation, because of: ")
    assert ["mistral:7b", "no"] in cells(told.out)
    assert ["tinyllama", "yes"] in cells(told.out)
    assert "It would go to tinyllama" in told.out
    assert (plain["kind"], plain["model"]) == ("simple_queries", "tinyllama")
    assert sum(plain["shares"].values()) == pytest.approx(1.0, abs=0.01)


async def test_route_explain_works_without_a_gateway(shell: Shell) -> None:
    done = await shell.run("route", "explain", "Who wrote Emma?", "--url", "127.0.0.1:9")

    assert done.code == 0
    assert done.out.startswith("simple_queries")
    assert "sutazai up" in done.err


async def test_route_explain_tells_the_kind_where_the_gateway_asks_for_a_key_or_has_no_known_port(
    data_dir: Path, shell: Shell
) -> None:
    async with FakeNode() as node, gateway(data_dir, node, keys=True) as opened:
        keyless = await shell.at(opened).run("route", "explain", "Who wrote Emma?")
    shell.url = ""
    (shell.folder / "sutazai.toml").write_text("server.port = 0\n")
    portless = await shell.run("route", "explain", "Who wrote Emma?", "--json")

    assert [keyless.code, portless.code] == [0, 0]
    assert keyless.out.startswith("simple_queries")
    assert "SUTAZAI_KEY" in keyless.err
    assert json.loads(portless.out)["there"] is None
    assert "--url" in portless.err


async def test_route_explain_asks_for_a_question(shell: Shell) -> None:
    done = await shell.run("route", "explain", " ", "--url", "127.0.0.1:9")

    assert done.code == 1
    assert "empty" in done.err
