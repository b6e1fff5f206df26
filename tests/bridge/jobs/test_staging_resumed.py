"""A staged folder is taken up where an earlier run stopped, and never by two runs at once."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.checks import ROOT
from support.folders import contents, snapshot

from bridge.jobs import staging
from bridge.jobs.staging import Staging


def stop_after(out: Path, inputs: dict[str, Any], *units: str) -> None:
    """A run that finishes some units and then fails."""
    with suppress(KeyError), Staging(out, inputs=inputs) as staged:
        for unit in units:
            (staged.folder / unit).write_text(f"{inputs} {unit}")
            staged.record(unit, [unit], {"unit": unit})
        raise KeyError


def test_finished_units_are_kept(tmp_path: Path) -> None:
    out, inputs = tmp_path / "out", {"source": ["a", 1]}
    stop_after(out, inputs, "one", "two")
    before = snapshot(tmp_path / ".out.partial")
    with Staging(out, inputs={"source": ("a", 1)}) as staged:  # a tuple is a list in JSON
        assert [staged.finished(unit) for unit in ("one", "two", "three")] == [{"unit": "one"}, {"unit": "two"}, None]
        assert snapshot(staged.folder) == before
        staged.publish()
    assert contents(out) == {unit: f"{inputs} {unit}".encode() for unit in ("one", "two")}
    assert os.listdir(tmp_path) == ["out"]


def test_other_inputs_start_anew(tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop_after(out, {"dtype": "bf16"}, "one")
    stop_after(out, {"dtype": "fp32"})
    assert contents(tmp_path / ".out.partial") == {}
    stop_after(out, {"dtype": "bf16"}, "one")
    with Staging(out, inputs=None) as staged:
        assert staged.finished("one") is None
        assert contents(staged.folder) == {}


def test_a_run_that_cannot_be_taken_up_deletes_leftovers_of_its_own_kind(tmp_path: Path) -> None:
    with Staging(tmp_path / "out", inputs=None) as staged:
        (staged.folder / "one").write_text("x")
        staged.record("one", ["one"], 1)  # left without publishing, as a killed run is
    with Staging(tmp_path / "out", inputs=None) as staged:
        assert staged.finished("one") is None
        assert contents(staged.folder) == {}


@pytest.mark.parametrize("damage", ["a byte", "cut", "longer", "gone", "record gone"])
def test_a_unit_whose_files_are_not_what_they_were_is_done_again(tmp_path: Path, damage: str) -> None:
    out = tmp_path / "out"
    stop_after(out, {}, "one", "two")
    file = tmp_path / ".out.partial/one"
    data = file.read_bytes()
    match damage:
        case "a byte":
            file.write_bytes(bytes([data[0] ^ 1]) + data[1:])
        case "cut":
            file.write_bytes(data[:-1])
        case "longer":
            file.write_bytes(data + b" ")
        case "gone":
            file.unlink()
        case "record gone":
            (tmp_path / ".out.journal/one.json").unlink()
    with Staging(out, inputs={}) as staged:
        assert staged.finished("one") is None
        assert staged.finished("two") == {"unit": "two"}


def test_a_unit_of_several_files_needs_all_of_them(tmp_path: Path) -> None:
    with Staging(tmp_path / "out", inputs={}) as staged:
        (staged.folder / "sub").mkdir()
        files = ["a", "sub/b"]
        for file in files:
            (staged.folder / file).write_text(file)
        staged.record("unit", files, [1])
        assert staged.finished("unit") == [1]
        (staged.folder / "sub/b").write_text("c")
        assert staged.finished("unit") is None


# ------------------------------------------------------------------------------------------------------ one run at once


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "LOCK_SECONDS", 0.2)


@pytest.mark.usefixtures("impatient")
def test_a_second_run_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Staging(out, inputs={"a": 1}) as staged:
        (staged.folder / "file").write_text("x")
        before = snapshot(tmp_path)
        for inputs in ({"a": 1}, {"a": 2}, None):
            with pytest.raises(ValueError, match=r"\.out\.journal: another run is writing"):
                Staging(out, inputs=inputs)
        assert snapshot(tmp_path) == before
    with Staging(out, inputs={"a": 1}) as staged:
        assert contents(staged.folder) == {"file": b"x"}


@pytest.mark.usefixtures("impatient")
def test_workers_join_and_hold_the_lock_after_the_leader_is_gone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Staging(out, inputs={}) as leader:
        worker = Staging.join(out, {})
        assert worker.folder == leader.folder
    with worker, pytest.raises(ValueError, match="another run is writing"):
        Staging(out, inputs={})
    with Staging(out, inputs={}):
        pass


def test_another_process_waits_until_the_lock_is_free(tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = (
        "import sys; from bridge.jobs.staging import Staging; Staging(sys.argv[1], inputs={}).publish(); print('done')"
    )
    command = [sys.executable, "-c", code, str(out)]
    with Staging(out, inputs={}) as staged:
        (staged.folder / "file").write_text("x")
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
            with pytest.raises(subprocess.TimeoutExpired):
                other.wait(1)
            staged.close()
            assert other.communicate()[0] == "done\n"
    assert contents(out) == {"file": b"x"}
