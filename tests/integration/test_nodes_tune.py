"""`sutazai nodes tune` as it is typed: over fake nodes, over a gateway that is busy, and over llama.cpp itself."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import sutazai
from sutazai.adapters.llamacpp.machine import GIB, this_machine
from sutazai.adapters.llamacpp.spec import TRIAL_MODEL, discover_models
from sutazai.adapters.llamacpp.tuned import NAME, Tuned, keep_tuned, model_digest, read_tuned
from sutazai.bootstrap import open_gateway
from sutazai.bootstrap.tuning import engine_target
from sutazai.core.errors import EngineFault
from sutazai.core.node import NodeKind
from sutazai.settings.load import parse
from sutazai.settings.model import Discovery, Engine, Server, Settings
from sutazai.testing.script import Answer

if TYPE_CHECKING:
    from tests.conftest import StartGateway, StartNode

    from sutazai.testing.node import FakeNode

real = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None and "CI" not in os.environ,
    reason="the wheel xllamacpp is not installed",
)

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "tune-a-node.md"
SOURCE = Path(sutazai.__file__).parents[1]
COMMAND_S = 60.0
FAST_S = 0.005
"""Between two tokens."""
WORDS = tuple(f"w{number} " for number in range(4))


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str


class Shell:
    """Runs `sutazai nodes tune` in an empty folder with the settings of a test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environ: dict[str, str] = {}

    def settings(self, *tables: str) -> None:
        head = f'[server]\nport = 0\n[database]\ndata_dir = "{self.folder}"\n[discovery]\nollama = false\n'
        (self.folder / "sutazai.toml").write_text(head + "\n".join(tables))

    def nodes(self, *nodes: FakeNode, slots: int | None = None) -> None:
        self.settings(
            "[engine]\nenabled = 'never'",
            *(
                f'[[nodes]]\nname = "n{n}"\nurl = "{node.url}"\nkind = "{node.kind.value}"\n'
                + (f"slots = {slots}" if slots else "")
                for n, node in enumerate(nodes, 1)
            ),
        )

    async def start(self, *words: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            *("-W", "error", "-m", "sutazai", "nodes", "tune", *words),
            cwd=self.folder,
            env={"PYTHONPATH": str(SOURCE), "PATH": os.defpath, "HOME": str(self.folder), **self.environ},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )

    async def run(self, *words: str) -> Done:
        process = await self.start(*words)
        try:
            async with asyncio.timeout(COMMAND_S):
                out, err = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode is not None
        assert b"Traceback" not in err, err.decode()
        return Done(process.returncode, out.decode(), err.decode())


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


# nodes of the pool


@pytest.mark.deadline(90)
async def test_an_ollama_is_tuned_by_its_load_options(shell: Shell, fake_nodes: StartNode) -> None:
    """Which of them wins on a busy machine is left to the tests with a clock of their own."""
    node = await fake_nodes(slots=2)
    node.default = Answer(tokens=WORDS, between_s=FAST_S)
    shell.nodes(node, slots=2)

    done = await shell.run("n1", "--cores", "4", "--budget-s", "30", "--json")

    found = json.loads(done.out)
    best, settings = found["best"], parse(found["settings"], {})
    asked = [received.json["options"] for received in node.inferences]
    tried = {(sample["threads"], sample["batch_tokens"]) for sample in found["samples"]}
    assert done.code == 0
    assert found["model"] == "llama3:latest"
    assert found["start"] == {"slots": 2, "threads": 4, "batch_tokens": 512}
    assert len(tried) > 1
    assert {(options["num_thread"], options["num_batch"]) for options in asked} >= tried
    assert node.loads >= len(tried), "each was measured with the model loaded like that"
    assert settings.models["llama3:latest"].load_options == {
        "num_thread": best["threads"],
        "num_batch": best["batch_tokens"],
    }
    assert (settings.nodes[0].url, settings.nodes[0].slots) == (node.url, best["slots"])
    assert "load llama3:latest again" in done.err


async def test_of_other_nodes_only_the_slots_are_found(shell: Shell, fake_nodes: StartNode) -> None:
    node = await fake_nodes(NodeKind.OPENAI, slots=4)
    node.default = Answer(tokens=WORDS, between_s=FAST_S)
    shell.nodes(node)

    done = await shell.run("n1", "--budget-s", "15")

    assert done.code == 0, done.err
    assert re.search(r'^name = "n1"\nslots = \d+$', done.out, re.MULTILINE)
    assert not any("options" in received.json for received in node.inferences)
    assert re.search(
        r"^1 of at most \d+, \d+ s left at most: 64 slots: \d+ tokens/s, prompts \d+$", done.err, re.MULTILINE
    )


async def test_a_dry_run_asks_nothing_of_the_model(shell: Shell, fake_nodes: StartNode) -> None:
    node = await fake_nodes()
    shell.nodes(node)

    done = await shell.run("n1", "--dry-run", "--cores", "4")

    assert done.code == 0
    assert "slots: 1, 2, 4, 8, 16\nthreads: 1, 2, 4\nbatch_tokens: 128, 256, 512, 1024, 2048\n" in done.out
    assert node.inferences == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("n3", "No node was called 'n3'."),
        ("n1", "n1 had 2 models. Choose with `--model`: llama3:latest, qwen3:latest"),
        ("n1 --model lama3", "The model 'lama3' is on no node. Did you mean llama3:latest?"),
        ("n2", "n2 had no model."),
        ("n1 --model qwen3 --save", "`--save` was for the embedded engine alone."),
        ("n1 --model qwen3 --budget-s nan", "A budget of nan s cannot be."),
        ("n1 --model qwen3 --cores 0", "0 cores cannot be."),
    ],
)
async def test_what_cannot_be_is_refused_in_a_sentence_before_anything_is_measured(
    shell: Shell, fake_nodes: StartNode, words: str, sentence: str
) -> None:
    node = await fake_nodes(models=("llama3", "qwen3"))
    shell.nodes(node, await fake_nodes(models=()))

    done = await shell.run(*words.split())

    assert done.code == 1
    assert sentence in done.err
    assert node.inferences == []


@pytest.mark.deadline(90)
async def test_a_node_that_others_use_is_left_alone_unless_forced(
    shell: Shell, fake_nodes: StartNode, gateways: StartGateway
) -> None:
    node = await fake_nodes()
    opened = await gateways(node)
    shell.nodes(node)
    shell.environ["SUTAZAI_URL"] = f"http://127.0.0.1:{opened.port}"
    opened.fleet.states()[0].in_flight = 2

    refused = await shell.run("n1")
    asked_before = len(node.inferences)
    forced = await shell.run("n1", "--force", "--budget-s", "5")

    opened.fleet.states()[0].in_flight = 0
    assert refused.code == 1
    assert "worked on 2 requests of others, which measuring would slow" in refused.err
    assert asked_before == 0
    assert forced.code == 0


# the embedded engine


@real
@pytest.mark.deadline(90)
async def test_the_engine_is_tuned_and_the_next_start_runs_as_was_found(shell: Shell) -> None:
    shell.settings("[engine]\nenabled = 'always'\ncontext_tokens = 256")

    done = await shell.run("sutazai-trial", "--budget-s", "25", "--save", "--json")

    found = json.loads(done.out)
    [kept] = read_tuned(shell.folder)
    assert done.code == 0
    assert found["kept_in"] == str(shell.folder / NAME)
    assert {name: getattr(kept, name) for name in found["best"]} == found["best"]
    assert (kept.model_digest, kept.machine) == (model_digest(TRIAL_MODEL), str(this_machine()))
    assert all(sample["generated_per_s"] > 0 for sample in found["samples"])


@real
@pytest.mark.deadline(120)
async def test_the_commands_of_the_page_do_what_it_shows(shell: Shell) -> None:
    """The time is cut short, and how many threads there are is the machine's."""
    blocks = re.findall(
        r"^```console\n\$ sutazai nodes tune (.+)\n((?:.+\n)*)```$", PAGE.read_text("utf-8"), re.MULTILINE
    )
    shell.settings()

    done = [await shell.run(*words.replace("--budget-s 60", "--budget-s 6").split()) for words, _ in blocks]

    assert [one.code for one in done] == [0, 0]
    assert _without_threads(done[0].out) == _without_threads(blocks[0][1])
    assert done[1].out.startswith("SLOTS   THREADS   BATCH   ANSWERS TOKENS/S   PROMPTS TOKENS/S   SPEED\n")
    assert str(shell.folder / NAME) in done[1].out


def _without_threads(text: str) -> str:
    return re.sub(r"\d+ threads?|at most \d+ times|threads: .*", "", text)


@real
async def test_an_interrupted_tuning_ends_its_engine_and_keeps_nothing(shell: Shell) -> None:
    shell.settings("[engine]\nenabled = 'always'")
    process = await shell.start("sutazai-trial", "--save")
    assert process.stderr is not None
    async with asyncio.timeout(20):
        line = await process.stderr.readline()
    engines = _children(process.pid)

    process.send_signal(signal.SIGINT)
    async with asyncio.timeout(20):
        await process.communicate()

    assert line.startswith(b"1 of at most ")
    assert len(engines) == 1
    assert process.returncode == 130
    assert not any((Path("/proc") / str(engine)).exists() for engine in engines)
    assert not (shell.folder / NAME).exists()


def _children(parent: int) -> list[int]:
    text = (Path("/proc") / str(parent) / "task" / str(parent) / "children").read_text()
    return [int(pid) for pid in text.split()]


@real
async def test_slots_that_memory_does_not_do_for_are_not_tried() -> None:
    settings = Settings(engine=Engine(slots=1, threads=1))
    [spec] = discover_models(settings.engine)
    free_bytes = [GIB, 0]

    async def nobody() -> None:
        """Nobody needs the node."""

    target = engine_target(spec, settings, this_machine(), free_bytes=lambda: free_bytes.pop(0), check=nobody)

    async with target.subject.opened(target.start) as node:
        assert (await node.probe()).slots == 1
    with pytest.raises(EngineFault, match="Memory did not do for 16 slots"):
        async with target.subject.opened(target.start._replace(slots=16)):
            pass


@real
@pytest.mark.parametrize(
    ("content", "slots"), [(None, 3), (b"{broken", 4)], ids=["as it was tuned", "untuned where the file is broken"]
)
async def test_the_engine_of_a_gateway_starts(data_dir: Path, content: bytes | None, slots: int) -> None:
    kept = keep_tuned(
        data_dir,
        Tuned(
            model="sutazai-trial",
            model_digest=model_digest(TRIAL_MODEL),
            machine=str(this_machine()),
            slots=3,
            threads=1,
            batch_tokens=256,
            measured_at="2026-11-30T08:00:00+00:00",
        ),
    )
    if content is not None:
        kept.write_bytes(content)
    settings = Settings(
        server=Server(port=0, drain_s=0.1), discovery=Discovery(ollama=False), engine=Engine(enabled="always")
    )

    try:
        async with open_gateway(
            settings, data_dir=data_dir, settings_path=None, environ={}, with_engine=True
        ) as opened:
            [state] = opened.fleet.states()
    finally:
        kept.unlink()

    assert state.slots == slots
