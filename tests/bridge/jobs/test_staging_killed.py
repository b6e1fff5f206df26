"""A staged folder whose run is killed: whole or absent at the target, and the same run again finishes it.

Every run is killed with SIGKILL, once before each of its changes to the disk. What lies between two changes is met by
the kills at random moments of `tests/bridge/convert/test_killed.py` and `tests/bridge/weights/test_save.py`.
"""

import os
import shutil
import signal
from functools import partial
from itertools import count
from pathlib import Path

import pytest
from support.faults import Fault, die_at
from support.folders import contents
from support.forks import call

from bridge.jobs.staging import Staging

UNITS = 4
WHOLE = {
    value: {"done": value.encode()} | {f"file-{unit}": f"{value} {unit}".encode() for unit in range(UNITS)}
    for value in ("old", "new")
}


def write(out: Path, value: str, resumable: bool, fault: Fault = dict) -> int:
    """A run of several units; how many of them it did."""
    fault()
    done = 0
    inputs = {"value": value} if resumable else None
    with Staging(out, inputs=inputs, replaces=lambda _: True) as staged:
        if staged.published:
            staged.forget()
            return done
        for unit in range(UNITS):
            if staged.finished(f"unit-{unit}") is None:
                (staged.folder / f"file-{unit}").write_text(f"{value} {unit}")
                staged.record(f"unit-{unit}", [f"file-{unit}"], unit)
                done += 1
        (staged.folder / "done").write_text(value)
        staged.publish()
    return done


@pytest.fixture(scope="module")
def old_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("old") / "out"
    assert write(out, "old", True) == UNITS
    return out


def state_after_kill(out: Path, old: bool) -> str:
    """Where things stand: nothing complete is lost, nothing is at the target that is not complete."""
    if out.exists():
        found = contents(out)
        assert found in WHOLE.values()
        return found["done"].decode()
    if not old:
        return "absent"
    assert contents(out.with_name(".out.old")) == WHOLE["old"]
    assert contents(out.with_name(".out.partial")) == WHOLE["new"]
    return "between the renames"


def finish_after_kill(out: Path, resumable: bool) -> int:
    """The same run again: the result is that of an undisturbed one. Returns how many units it had to do."""
    done = write(out, "new", resumable)
    assert contents(out) == WHOLE["new"]
    assert os.listdir(out.parent) == ["out"]
    return done


@pytest.mark.parametrize("resumable", [True, False], ids=["taken up", "made anew"])
@pytest.mark.parametrize("old", [False, True], ids=["nothing there", "replacing"])
def test_killed_before_each_change_to_the_disk(old_folder: Path, tmp_path: Path, old: bool, resumable: bool) -> None:
    states, redone = [], []
    for number in count():
        out = tmp_path / str(number) / "out"
        out.parent.mkdir()
        if old:
            shutil.copytree(old_folder, out)
        outcome = call(write, out, "new", resumable, partial(die_at, number, out.parent))
        states.append(state_after_kill(out, old))
        if outcome.exitcode == 0:
            assert outcome.get() == UNITS
            break
        assert outcome.exitcode == -signal.SIGKILL
        redone.append(finish_after_kill(out, resumable))
    met = ["old", "between the renames", "new"] if old else ["absent", "new"]
    assert list(dict.fromkeys(states)) == met, "each state was met, in this order"
    assert states.count(met[0]) > 15
    before_publishing = redone[: states.index(met[1])]
    assert sorted(before_publishing, reverse=True) == before_publishing, "the later it was killed, the less was redone"
    assert set(before_publishing) == ({4, 3, 2, 1, 0} if resumable else {4})
