"""What was tuned is kept, read back for the same file on the same machine, and passed over where it is broken."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from sutazai.adapters.llamacpp.machine import this_machine
from sutazai.adapters.llamacpp.spec import discover_models
from sutazai.adapters.llamacpp.tuned import MIB, MOST_ENTRIES, NAME, Tuned, keep_tuned, model_digest, read_tuned
from sutazai.core.errors import EngineFault
from sutazai.settings.model import Engine


def entry(path: Path, *, machine: str | None = None, slots: int = 8) -> Tuned:
    return Tuned(
        model=path.stem,
        model_digest=model_digest(path),
        machine=str(this_machine()) if machine is None else machine,
        slots=slots,
        threads=3,
        batch_tokens=512,
        measured_at="2026-11-30T08:00:00+00:00",
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF" + bytes(3 * MIB))
    return path


def test_the_engine_runs_as_it_was_tuned(tmp_path: Path, model: Path) -> None:
    keep_tuned(tmp_path, entry(model))

    (spec,) = discover_models(Engine(models=(str(model),)), read_tuned(tmp_path))

    assert (spec.slots, spec.threads, spec.batch_tokens) == (8, 3, 512)


def test_what_the_settings_say_goes_first(tmp_path: Path, model: Path) -> None:
    keep_tuned(tmp_path, entry(model))

    (spec,) = discover_models(Engine(models=(str(model),), slots=2, batch_tokens=1024), read_tuned(tmp_path))

    assert (spec.slots, spec.threads, spec.batch_tokens) == (2, 3, 1024)


def test_another_machine_or_another_file_is_not_tuned(tmp_path: Path, model: Path) -> None:
    other = tmp_path / "b.gguf"
    other.write_bytes(b"GGUF" + bytes(3 * MIB - 1) + b"b")
    keep_tuned(tmp_path, entry(model, machine="1 core"))
    keep_tuned(tmp_path, entry(other))

    (spec,) = discover_models(Engine(models=(str(model),)), read_tuned(tmp_path))

    assert spec.slots == 4


def test_a_second_tuning_takes_the_place_of_the_first(tmp_path: Path, model: Path) -> None:
    keep_tuned(tmp_path, entry(model, slots=2))
    keep_tuned(tmp_path, entry(model, machine="1 core"))
    keep_tuned(tmp_path, entry(model, slots=8))

    assert [(one.machine == "1 core", one.slots) for one in read_tuned(tmp_path)] == [(True, 8), (False, 8)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", NAME]


def test_only_the_newest_are_kept(tmp_path: Path, model: Path) -> None:
    for number in range(MOST_ENTRIES + 2):
        keep_tuned(tmp_path, entry(model, machine=str(number)))

    assert [one.machine for one in read_tuned(tmp_path)][::99] == ["2", "101"]


def test_without_a_file_nothing_is_tuned(tmp_path: Path) -> None:
    assert read_tuned(tmp_path) == ()


@pytest.mark.parametrize(
    "broken",
    [b"", b"{", b"\xff", b"[]", b'{"version":2,"engines":[]}', b'{"version":1,"engines":[{"model":"a"}]}'],
)
def test_a_broken_file_is_named_with_what_to_do_and_replaced_by_the_next(
    tmp_path: Path, model: Path, broken: bytes
) -> None:
    (tmp_path / NAME).write_bytes(broken)

    with pytest.raises(EngineFault, match=r"tuned\.json was not understood \(.*\)\. Remove it"):
        read_tuned(tmp_path)
    keep_tuned(tmp_path, entry(model))
    assert len(read_tuned(tmp_path)) == 1


@pytest.mark.parametrize("field", ["slots", "threads", "batch_tokens"])
def test_a_count_below_one_is_broken(tmp_path: Path, model: Path, field: str) -> None:
    plain = msgspec.to_builtins(entry(model)) | {field: 0}
    (tmp_path / NAME).write_bytes(msgspec.json.encode({"version": 1, "engines": [plain]}))

    with pytest.raises(EngineFault, match=field):
        read_tuned(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, model: Path) -> None:
    with pytest.raises(EngineFault, match=r"a\.gguf/tuned\.json could not be written .* `database\.data_dir`"):
        keep_tuned(model, entry(model))


def test_files_are_told_apart_by_their_size_and_both_their_ends(tmp_path: Path) -> None:
    contents = [bytes(4 * MIB), bytes(4 * MIB + 1), b"x" + bytes(4 * MIB - 1), bytes(4 * MIB - 1) + b"x", b"", b"x"]
    digests = set()
    for content in contents:
        (tmp_path / "model").write_bytes(content)
        digests.add(model_digest(tmp_path / "model"))

    assert len(digests) == len(contents)
