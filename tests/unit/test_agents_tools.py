"""The assistant and its tools: bounded, within their folder, and never the end of the agent."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sutazai.agents import assistant, builtin, tools_with
from sutazai.agents.asking import NotAnswered
from sutazai.agents.calculator import calculated
from sutazai.agents.registry import Registry
from sutazai.agents.sandbox import Sandbox
from sutazai.agents.tools import sandbox_of
from sutazai.core.errors import BadRequest, Forbidden, NodeTimeout, NotFound, SutazaiError, TooLarge
from sutazai.ports.agent import Said
from sutazai.ports.web import Page
from sutazai.testing.agents import FakeContext, run


class OnePage:
    """A web of one page."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def get(self, url: str) -> Page:
        self.asked.append(url)
        if "own" in url:
            raise Forbidden("The address leads into a network that is not public.")
        return Page(url=url, status=200, content_type="text/html", text="x" * 50_000)

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> int:
        raise AssertionError("no tool posts")


def calls(*called: tuple[str, object]) -> Said:
    """What a model says that calls tools."""
    made: list[Mapping[str, Any]] = [
        {
            "id": f"call_{number}",
            "type": "function",
            "function": {"name": name, "arguments": given if isinstance(given, str) else dumped(given)},
        }
        for number, (name, given) in enumerate(called)
    ]
    return Said(text="", tool_calls=made, message={"role": "assistant", "content": None, "tool_calls": made})


def dumped(value: object) -> str:
    return msgspec.json.encode(value).decode()


def told(context: FakeContext) -> list[str]:
    """What the tools said, as the model saw it last."""
    return [message["content"] for message in context.asked[-1].messages if message["role"] == "tool"]


# the assistant


async def test_an_assistant_without_need_of_tools_answers_at_once() -> None:
    context = FakeContext(["Good day."])

    done = await run(assistant(tools_with()), {"prompt": "hi", "instructions": "Be kind."}, context)

    assert (done.answer, done.steps) == ("Good day.", [])
    assert "Be kind." in context.asked[0].messages[0]["content"]
    assert [tool["function"]["name"] for tool in context.asked[0].options["tools"]] == ["calculator"]


async def test_tools_are_called_and_what_they_say_goes_back(tmp_path: Path) -> None:
    web = OnePage()
    context = FakeContext(
        [
            calls(("calculator", {"expression": "6 * 7"}), ("http_get", {"url": "https://public.test/"})),
            calls(("write_file", {"path": "notes/a.md", "text": "42"})),
            calls(("list_files", {"path": "notes"}), ("read_file", {"path": "notes/a.md"})),
            "It is 42.",
        ]
    )

    done = await run(assistant(tools_with(web=web, folder=tmp_path)), {"prompt": "What is 6 * 7?"}, context)

    assert done.answer == "It is 42."
    assert all(step.is_done for step in done.steps)
    said = told(context)
    assert said[0] == "42"
    assert len(said[1]) < 21_000
    assert said[2:] == ["2 bytes written.", "a.md", "42"]
    assert [message.get("tool_call_id") for message in context.asked[1].messages[-2:]] == ["call_0", "call_1"]


@pytest.mark.parametrize(
    ("name", "arguments", "why"),
    [
        ("calculator", "{", "JSON"),
        ("calculator", {"expression": 3}, "must be a string"),
        ("calculator", {}, "missing"),
        ("calculator", {"expression": "9 ** 9 ** 9"}, "too large"),
        ("http_get", {"url": "http://own.test/"}, "not public"),
        ("read_file", {"path": "../secret"}, "led out"),
        ("read_file", {"path": "none"}, "No file"),
        ("launch", {}, "no tool"),
        ("calculator", "x" * 2_000_000, "too long"),
    ],
)
async def test_a_tool_that_fails_tells_the_model_and_ends_nothing(
    tmp_path: Path, name: str, arguments: object, why: str
) -> None:
    context = FakeContext([calls((name, arguments)), "I could not."])

    done = await run(assistant(tools_with(web=OnePage(), folder=tmp_path)), {"prompt": "Try."}, context)

    assert done.answer == "I could not."
    assert not done.steps[0].is_done
    assert told(context)[0].startswith("Error: ")
    assert why in told(context)[0]


async def test_a_tool_that_was_not_chosen_is_not_run() -> None:
    web = OnePage()
    context = FakeContext([calls(("http_get", {"url": "https://public.test/"})), "No."])

    await run(assistant(tools_with(web=web)), {"prompt": "Try.", "tools": ["calculator"]}, context)

    assert web.asked == []
    assert "no tool" in told(context)[0]


async def test_turns_and_calls_in_one_turn_are_bounded() -> None:
    many = calls(*[("calculator", {"expression": "1"})] * 30)
    context = FakeContext(always=many)

    with pytest.raises(NotAnswered, match="3 turns"):
        await run(assistant(tools_with()), {"prompt": "Loop.", "max_turns": 3}, context)

    assert len(context.asked) == 3
    assert "tools" not in context.asked[-1].options, "the last turn is for the answer"
    assert told(context).count("1") == 2 * 8
    assert len(told(context)) == 2 * 30, "every call is answered"


async def test_after_a_crash_no_tool_that_has_spoken_runs_again(tmp_path: Path) -> None:
    web = OnePage()
    context = FakeContext(
        [calls(("http_get", {"url": "https://public.test/"})), NodeTimeout("Silent.", node="a"), "Done."]
    )
    agent = assistant(tools_with(web=web))

    with pytest.raises(NodeTimeout):
        await run(agent, {"prompt": "Read."}, context)
    done = await run(agent, {"prompt": "Read."}, context)

    assert done.answer == "Done."
    assert len(web.asked) == 1


def test_the_built_in_agents_have_schemas_and_names() -> None:
    registry = Registry(builtin())

    assert registry.names == ("assistant", "chat", "code_review", "extract", "research", "summarize")
    assert all(one["description"].endswith(".") and one["input_schema"] for one in registry.described())


# the calculator


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1 + 2 * 3", 7),
        ("(1 + 2) * 3", 9),
        ("2 ** 10", 1024),
        ("2 ^ 10", 1024),
        ("7 // 2 + 7 % 2", 4),
        ("2 ** -1", 0.5),
        ("-3 + +4", 1),
        ("sqrt(2) ** 2", 2.0),
        ("round(pi, 2)", 3.14),
        ("max(1, min(5, 3))", 3),
        ("factorial(10)", 3_628_800),
        ("log(e)", 1.0),
        (" 1_000 ", 1000),
    ],
)
def test_expressions_have_values(expression: str, value: float) -> None:
    assert math.isclose(calculated(expression), value)


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "1 +",
        "1 / 0",
        "9 ** 9 ** 9",
        "9 ** 99999999999",
        "(10 ** 1000) ** 1000",
        "10 ** 1000 * 10 ** 1000",
        "10.0 ** 400",
        "factorial(100000)",
        "factorial(-1)",
        "factorial(1.5)",
        "(-1) ** 0.5",
        "1e999",
        "1j",
        "True",
        "'a' * 100000000",
        "[1] * 100000000",
        "__import__('os').system('id')",
        "().__class__.__bases__[0].__subclasses__()",
        "abs.__self__",
        "open('/etc/passwd')",
        "lambda: 1",
        "[x for x in (1, 2)]",
        "x := 1",
        "max(*[1])",
        "round(number=1.5)",
        "min()",
        "log(0)",
        "1 if 1 else 2",
        "1 << 100000",
        "f'{1}'",
        "(" * 300 + ")" * 300,
        "-" * 900 + "1",
        "1" * 1001,
        "1" * 5000,
        "+".join("1" * 300),
        "\0",
        "\ud800",
        "round(1.5, 99999999999999999999)",
        "round(1, -999999999)",
        "sin(10 ** 400)",
        "1" * 900 + "x",
        "gcd(1.5, 2)",
    ],
)
def test_what_is_no_arithmetic_or_too_large_is_refused(expression: str) -> None:
    with pytest.raises(BadRequest):
        calculated(expression)


# the folder


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    return secret


@pytest.fixture
def root(tmp_path: Path, outside: Path) -> Path:
    root = tmp_path / "root"
    (root / "in").mkdir(parents=True)
    (root / "in" / "plain.txt").write_text("plain")
    (root / "link").symlink_to(outside)
    (root / "up").symlink_to(outside.parent)
    (root / "in" / "relative").symlink_to("../../secret.txt")
    (root / "dangling").symlink_to(outside.parent / "new.txt")
    (root / "hard").hardlink_to(outside)
    os.mkfifo(root / "pipe")
    return root


@pytest.mark.parametrize(
    "path",
    [
        "../secret.txt",
        "in/../../secret.txt",
        "in/./../../secret.txt",
        "..",
        "in/..",
        "/etc/passwd",
        "//etc/passwd",
        "~/secret.txt",
        "link",
        "up/secret.txt",
        "up/new.txt",
        "in/relative",
        "dangling",
        "hard",
        "pipe",
        "in",
        "C:/x",
        "..\\secret.txt",
        "a\0b",
        "in/plain.txt/x",
        "",
        ".",
        "/",
        "a" * 300,
        "/".join("a" * 40),
        "new\nline",
        "\ud800",
    ],
)
def test_no_path_leads_out_of_the_folder(root: Path, outside: Path, path: str) -> None:
    sandbox = Sandbox(root)

    for use in (lambda: sandbox.read(path), lambda: sandbox.write(path, "overwritten")):
        with pytest.raises(SutazaiError):
            use()

    assert outside.read_text() == "secret"
    assert not (outside.parent / "new.txt").exists()


def test_a_link_to_a_folder_is_neither_listed_nor_entered(root: Path) -> None:
    sandbox = Sandbox(root)

    assert sandbox.listed() == ["hard", "in/"]
    assert sandbox.listed("in") == ["plain.txt"]
    for path in ("up", "..", "/etc", "none"):
        with pytest.raises((Forbidden, NotFound)):
            sandbox.listed(path)


def test_files_are_written_whole_and_read_back(root: Path) -> None:
    sandbox = Sandbox(root)

    assert sandbox.write("new/deep/file.txt", "grün") == 5
    sandbox.write("in/plain.txt", "x")

    assert sandbox.read("new/deep/file.txt") == "grün"
    assert sandbox.read("./in//plain.txt") == "x"


def test_sizes_are_bounded(tmp_path: Path) -> None:
    root = tmp_path / "fresh"
    sandbox = Sandbox(root, max_file_bytes=100, max_total_bytes=250)
    (root / "large").write_bytes(b"x" * 101)
    (root / "bytes").write_bytes(b"\xff\xfe")

    with pytest.raises(TooLarge):
        sandbox.read("large")
    with pytest.raises(BadRequest):
        sandbox.read("bytes")
    with pytest.raises(TooLarge):
        sandbox.write("a", "x" * 101)
    sandbox.write("a", "x" * 100)
    with pytest.raises(TooLarge, match="hold more"):
        sandbox.write("b", "x" * 100)


def test_tenants_do_not_see_each_others_files(tmp_path: Path) -> None:
    for tenant in ("acme", "../acme", "/etc", ""):
        sandbox_of(tmp_path, tenant).write("mine.txt", tenant)

    assert [sandbox_of(tmp_path, tenant).read("mine.txt") for tenant in ("acme", "../acme")] == ["acme", "../acme"]
    assert len(list(tmp_path.iterdir())) == 4
