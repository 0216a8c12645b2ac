"""
The whole comparison: `python -m bench.run [--quick] [--only json,streams] [--rounds N]`.

It starts every contestant on loopback, measures them in alternating rounds, and says which targets were met.
Whatever it started ends with it, after Ctrl-C too.
"""

from __future__ import annotations

import argparse
import platform
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from bench import report
from bench.arena import Arena, Sample, arena, closed_loop
from bench.machine import memory_of
from bench.payload import SMALL_BYTES
from bench.peers import (
    LITELLM,
    VLLM_ROUTER,
    Contestant,
    StartFailed,
    install_peers,
    recipes,
    require_tools,
    running,
    search_path,
)
from bench.sections import FULL, QUICK, Plan, Sections
from bench.verdict import rows

_ROOT = Path(__file__).resolve().parent.parent
_SECTIONS: Mapping[str, Callable[[Sections], Iterator[Sample]]] = {
    "json": Sections.json,
    "large": Sections.large,
    "streams": Sections.streams,
    "latency": Sections.latency,
    "memory": Sections.memory,
    "soak": Sections.soak,
}


def main() -> None:
    """Run what the command line asks for."""
    plan, chosen = _arguments()
    require_tools()
    install_peers()
    # Ends like Ctrl-C, so that every `finally` runs.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="sutazai-bench-") as name:
        folder = Path(name)
        # The embedded database runs as a user of its own and must reach its files.
        folder.chmod(0o755)
        with arena(folder) as place, ExitStack() as stack:
            contestants, left_out = _start_all(place, stack)
            rest_memory = {one.target.name: memory_of(one.main_pid()) for one in contestants}
            samples = list(_measure(Sections(place=place, contestants=contestants, plan=plan), chosen))
            left_out |= {
                one.target.name: f"ended on its way: {one.last_words()}" for one in contestants if not one.is_alive()
            }
    outcome = report.Report(
        measured_at=datetime.now(UTC),
        machine=report.machine_name(),
        versions=_versions(),
        left_out=left_out,
        rest_memory=rest_memory,
        rows=rows(samples, rest_memory),
        samples=samples,
    )
    report.print_tables(outcome)
    report.save(outcome)


def _arguments() -> tuple[Plan, list[str]]:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description="Measure the gateway beside its peers.")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds: less than four minutes")
    parser.add_argument("--only", default=",".join(_SECTIONS), help="some of %(default)s")
    parser.add_argument("--rounds", type=int, help="alternating rounds of each section")
    arguments = parser.parse_args()
    chosen = [name.strip() for name in arguments.only.split(",")]
    if unknown := [name for name in chosen if name not in _SECTIONS]:
        parser.error(f"--only knows {', '.join(_SECTIONS)}; not {', '.join(unknown)}")
    plan = QUICK if arguments.quick else FULL
    if arguments.rounds is not None and arguments.rounds < 1:
        parser.error("--rounds takes 1 or more")
    return replace(plan, rounds=arguments.rounds or plan.rounds), chosen


def _start_all(place: Arena, stack: ExitStack) -> tuple[list[Contestant], dict[str, str]]:
    contestants: list[Contestant] = []
    left_out: dict[str, str] = {}
    for recipe in recipes():
        print(f"starting {recipe.name} ...", flush=True)
        try:
            contestant = stack.enter_context(
                running(recipe, nodes=place.nodes, folder=place.folder / recipe.name, core=place.gateway_core)
            )
        except (StartFailed, OSError, subprocess.SubprocessError) as error:
            left_out[recipe.name] = str(error)
            print(f"  left out: {error}", flush=True)
            continue
        contestants.append(contestant)
    return contestants, left_out


def _measure(sections: Sections, chosen: list[str]) -> Iterator[Sample]:
    body = sections.place.body(SMALL_BYTES)
    for contestant in sections.contestants:
        # Connections to the nodes are opened and caches filled before anything counts.
        sections.place.measure(
            "warm up",
            contestant,
            closed_loop(contestant.target, connections=32, seconds=1, body=body),
            turn=0,
        )
    for name in chosen:
        print(f"measuring {name} ", end="", flush=True)
        try:
            for sample in _SECTIONS[name](sections):
                print(".", end="", flush=True)
                yield sample
        except (RuntimeError, OSError) as error:
            # The other sections may still do; this one's missing rounds show in the table.
            print(f" broke off: {error}", end="")
        print(flush=True)


def _versions() -> dict[str, str]:
    def output(*argv: str) -> str:
        env = {"PATH": search_path()}
        ended = subprocess.run(argv, cwd=_ROOT, env=env, capture_output=True, text=True, timeout=10, check=False)
        return (ended.stdout + ended.stderr).strip() if ended.returncode == 0 else "unknown"

    locked = dict(re.findall(r"^([\w-]+)==(\S+)", (_ROOT / "bench" / "requirements.lock").read_text(), re.MULTILINE))
    return {
        "sutazai": output("git", "describe", "--always", "--dirty"),
        "nginx": output("nginx", "-v").rpartition("/")[2],
        VLLM_ROUTER: locked[VLLM_ROUTER],
        LITELLM: locked[LITELLM],
        "Python": platform.python_version(),
    }


if __name__ == "__main__":
    main()
