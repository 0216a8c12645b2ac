"""The documentation is true as far as a program can tell: links, generated pages, examples, forms."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from sutazai.settings.load import parse

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
UNKEPT = {"node_modules", "__pycache__", "dist"}
"""Folders that are made anew, beside those that begin with a dot."""
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
DECISIONS = sorted((DOCS / "adr").glob("*.md"))
GENERATED = ("api.md", "cli.md", "errors.md", "metrics.md")

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)
FRAGMENT = re.compile(r"[1-9]\d*\.(added|changed|fixed|removed|deprecated|security)\.md")


def named(path: Path) -> str:
    """What a parametrised test is called after."""
    return str(path.relative_to(ROOT))


def blocks(language: str) -> list[tuple[Path, str]]:
    """Every fenced block of that language, with its page."""
    found = ((page, *block) for page in PAGES for block in FENCE.findall(page.read_text("utf-8")))
    return [(page, text) for page, name, text in found if name == language]


def anchors(page: Path) -> set[str]:
    """The names of a page's headings, as hosts of repositories make them."""
    prose = FENCE.sub("", page.read_text("utf-8"))
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in HEADING.findall(prose))
    return {heading.strip().replace(" ", "-") for heading in kept}


def kept_files() -> Iterator[Path]:
    """Every text of the tree that is ours, without what tools leave behind."""
    for folder, inner, names in os.walk(ROOT):
        inner[:] = [name for name in inner if name not in UNKEPT and (name == ".ci" or not name.startswith("."))]
        for name in names:
            path = Path(folder, name)
            if b"\0" not in path.read_bytes()[:1024]:
                yield path


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_link_leads_somewhere(page: Path) -> None:
    broken = []
    for link in LINK.findall(FENCE.sub("", page.read_text("utf-8"))):
        path, _, anchor = link.partition("#")
        target = page if not path else (page.parent / path).resolve()
        is_far = link.startswith("https://")
        if not is_far and (not target.exists() or (anchor and anchor not in anchors(target))):
            broken.append(link)

    assert broken == []


def test_the_index_names_every_page() -> None:
    index = DOCS / "index.md"
    named_there = {(DOCS / link).resolve() for link in LINK.findall(index.read_text("utf-8"))}

    assert [named(page) for page in DOCS.rglob("*.md") if page != index and page not in named_there] == []


@pytest.fixture(scope="module")
def generated(data_dir: Path) -> Mapping[str, str]:
    """The pages as the code says now."""
    script = runpy.run_path(str(ROOT / "scripts" / "make_reference_pages.py"))
    pages: Mapping[str, str] = script["pages"](data_dir)
    return pages


@pytest.mark.parametrize("name", GENERATED)
def test_a_generated_page_says_what_the_code_says(name: str, generated: Mapping[str, str]) -> None:
    page = DOCS / "reference" / name

    assert page.read_text("utf-8") == generated[name], "run `PYTHONPATH=src python scripts/make_reference_pages.py`"


def test_every_generated_page_is_compared(generated: Mapping[str, str]) -> None:
    assert sorted(generated) == sorted(GENERATED)


@pytest.mark.parametrize("page", DECISIONS, ids=named)
def test_a_decision_has_its_four_parts(page: Path) -> None:
    headings = HEADING.findall(page.read_text("utf-8"))
    number = int(page.name[:4])

    assert headings[0].startswith(f"{number}. ")
    assert headings[1:] == ["Status", "Context", "Decision", "Consequences"]


def test_decisions_are_numbered_without_a_gap() -> None:
    assert [int(page.name[:4]) for page in DECISIONS] == list(range(1, len(DECISIONS) + 1))


def test_words_of_the_glossary_are_in_order_and_told_once() -> None:
    rows = re.findall(r"^\| ([^|]+) \|", (DOCS / "glossary.md").read_text("utf-8"), re.MULTILINE)
    words = [row.lower() for row in rows[1:]]

    assert len(words) > 20
    assert words == sorted(set(words))


@pytest.mark.parametrize("example", blocks("toml"), ids=lambda example: named(example[0]))
def test_settings_in_the_pages_are_right(example: tuple[Path, str]) -> None:
    parse(example[1], {})


def test_fragments_of_the_changelog_are_named_right() -> None:
    wrong = [path.name for path in (ROOT / "changes").iterdir() if not FRAGMENT.fullmatch(path.name)]

    assert wrong == []


def test_fragments_of_the_changelog_are_a_sentence_or_two() -> None:
    for path in (ROOT / "changes").iterdir():
        text = path.read_text("utf-8").strip()

        assert text.endswith(".")
        assert len(text) < 400, f"{path.name} is longer than a user will read"


def test_no_file_knows_the_machine_it_was_written_on() -> None:
    strange = ["/" + "work/", "/" + "root/", "file" + ":///", "registry.npmjs" + ".org", "python" + "hosted.org"]
    found = [
        f"{named(path)}: {word}"
        for path in kept_files()
        for word in strange
        if word in path.read_text("utf-8", errors="replace")
    ]

    assert found == []


def test_the_nginx_example_is_one_that_nginx_takes(tmp_path: Path) -> None:
    [(_, site)] = blocks("nginx")
    plain = re.sub(r"^\s*ssl_certificate.*\n", "", site, flags=re.MULTILINE).replace("443 ssl", "127.0.0.1:18443")
    config = tmp_path / "nginx.conf"
    config.write_text(f"pid {tmp_path}/pid;\nerror_log stderr;\nevents {{}}\nhttp {{\naccess_log off;\n{plain}}}\n")

    assert run(program("nginx"), "-t", "-e", "stderr", "-p", str(tmp_path), "-c", str(config)) == 0


def test_the_haproxy_example_is_one_that_haproxy_takes(tmp_path: Path) -> None:
    [(_, text)] = blocks("haproxy")
    config = tmp_path / "haproxy.cfg"
    config.write_text(re.sub(r" ssl crt \S+", "", text))

    assert run(program("haproxy"), "-c", "-f", str(config)) == 0


def program(name: str) -> str:
    """The path of a program that Debian may put where only root looks; skips where it is missing, in CI fails."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
    if found is None:
        if os.environ.get("CI") == "true":
            pytest.fail(f"{name} is missing")
        pytest.skip(f"needs {name}")
    return found


def run(*command: str) -> int:
    """The exit status; what the program said is shown where a test fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    print(done.stdout, done.stderr)  # noqa: T201
    return done.returncode
