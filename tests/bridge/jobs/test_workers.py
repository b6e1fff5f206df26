"""Units over processes: every process opens what it needs once, and units come back in order."""

import os
from functools import partial
from pathlib import Path

import pytest

from bridge.jobs.workers import run_units


def open_log(folder: Path) -> Path:
    """Leaves a mark for each time that it is called, named after the process."""
    (folder / f"{os.getpid()}-{len(list(folder.iterdir()))}").touch()
    return folder


def square(folder: Path, unit: int) -> tuple[int, int]:
    if unit == 7:
        raise ValueError("unit 7 is bad")
    return os.getpid(), unit * unit


def opened_by(folder: Path) -> list[int]:
    return sorted(int(mark.name.split("-")[0]) for mark in folder.iterdir())


def test_a_worker_opens_once_for_all_its_units(tmp_path: Path) -> None:
    found = run_units(square, tmp_path, range(6), reopen=partial(open_log, tmp_path), workers=2)
    assert [value for _, value in found] == [0, 1, 4, 9, 16, 25]
    processes = {process for process, _ in found}
    assert os.getpid() not in processes
    assert opened_by(tmp_path) == sorted(processes), "each process that worked opened once"


def test_one_process_uses_what_is_open(tmp_path: Path) -> None:
    found = run_units(square, tmp_path, range(3), reopen=partial(open_log, tmp_path))
    assert found == [(os.getpid(), 0), (os.getpid(), 1), (os.getpid(), 4)]
    assert not opened_by(tmp_path)


def test_an_error_of_a_unit_is_raised_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unit 7 is bad"):
        run_units(square, tmp_path, range(9), reopen=partial(open_log, tmp_path), workers=2)


def test_an_error_of_opening_is_raised_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gone"):
        run_units(square, tmp_path, range(3), reopen=partial(open_log, tmp_path / "gone"), workers=2)
