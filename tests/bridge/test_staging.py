"""A staged folder: whole or not at all, taken up where it stopped, never by two runs at once."""

import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from bridge import staging
from bridge.staging import Staging, check_target

ROOT = Path(__file__).parents[2]
MARKER = "done"


def snapshot(folder: Path) -> dict[str, tuple[int, bytes | None]]:
    paths = [folder, *sorted(folder.rglob("*"))]
    return {str(p): (p.lstat().st_mtime_ns, p.read_bytes() if p.is_file() else None) for p in paths}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write(out: Path, value: str, *, inputs: Any = None, overwrite: bool = False) -> None:
    with Staging(out, inputs=inputs, overwrite=overwrite, marker=MARKER) as staged:
        (staged.folder / "file").write_text(value)
        (staged.folder / MARKER).write_text("")
        staged.publish()


def stop_after(out: Path, inputs: dict[str, Any], *units: str) -> None:
    """A run that finishes some units and then fails."""
    with suppress(KeyError), Staging(out, inputs=inputs) as staged:
        for unit in units:
            (staged.folder / unit).write_text(f"{inputs} {unit}")
            staged.record(unit, [unit], {"unit": unit})
        raise KeyError


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "LOCK_SECONDS", 0.2)


# -------------------------------------------------------------------------------------------------- whole or not at all


def test_nothing_is_at_the_target_before_publish(tmp_path: Path) -> None:
    out = tmp_path / "a/b/out"
    with Staging(out, inputs={}) as staged:
        (staged.folder / "deep").mkdir()
        (staged.folder / "deep/file").write_text("x")
        assert not out.exists()
        staged.publish()
        assert contents(out) == {"deep/file": b"x"}
    assert os.listdir(out.parent) == ["out"], "nothing is left beside it"


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", "new")
    assert contents(tmp_path / "out") == {MARKER: b"", "file": b"new"}


def test_a_relative_target_is_where_it_was_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with Staging("../there/.", inputs={}) as staged:
        monkeypatch.chdir(tmp_path)
        (staged.folder / "file").write_text("x")
        staged.publish()
    assert contents(tmp_path / "there") == {"file": b"x"}


def test_the_folder_gets_the_rights_the_umask_allows(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        write(tmp_path / "out", "x")
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750


def test_every_folder_is_on_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, str]] = []
    rename, sync = Path.rename, staging.sync
    monkeypatch.setattr(Path, "rename", lambda old, new: (done.append(("rename", new.name)), rename(old, new))[1])
    monkeypatch.setattr(staging, "sync", lambda path: (done.append(("sync", path.name)), sync(path))[1])
    with Staging(tmp_path / "out", inputs={}) as staged:
        (staged.folder / "deep/deeper").mkdir(parents=True)
        done.clear()
        staged.publish()
    folders = [("sync", name) for name in (".out.partial", "deep", "deeper")]
    assert done == [*folders, ("rename", "out"), ("sync", tmp_path.name)]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("old", [False, True])
def test_a_run_that_cannot_be_taken_up_leaves_nothing(tmp_path: Path, error: type[BaseException], old: bool) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    if old:
        write(folder / "out", "old")
    before = snapshot(folder / "out") if old else None
    with suppress(error), Staging(folder / "out", inputs=None, overwrite=old, marker=MARKER) as staged:
        (staged.folder / "file").write_text("new")
        raise error
    assert os.listdir(folder) == (["out"] if old else [])
    assert before is None or snapshot(folder / "out") == before


def test_an_error_after_publishing_is_the_error_that_is_seen(tmp_path: Path) -> None:

    def publish_and_fail() -> None:
        with Staging(tmp_path / "out", inputs=None) as staged:
            (staged.folder / "file").write_text("x")
            staged.publish()
            raise KeyError

    with pytest.raises(KeyError):
        publish_and_fail()
    assert contents(tmp_path / "out") == {"file": b"x"}
    assert os.listdir(tmp_path) == ["out"]


def test_a_target_that_filled_up_meanwhile_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Staging(out, inputs={}) as staged:
        (staged.folder / "file").write_text("new")
        out.mkdir()
        (out / "thesis.tex").write_text("x")
        with pytest.raises(ValueError, match=f"^{out}: was empty when writing began"):
            staged.publish()
    assert contents(out) == {"thesis.tex": b"x"}


def test_the_old_folder_is_put_back_when_the_new_one_cannot_move_in(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "old")
    before = snapshot(out)
    with Staging(out, inputs=None, overwrite=True, marker=MARKER) as staged:
        staged.folder.rmdir()  # so the rename fails for real
        with pytest.raises(FileNotFoundError):
            staged.publish()
    assert snapshot(out) == before
    assert not list(tmp_path.glob(".out.old"))


def test_what_a_dead_replacement_left_does_not_stop_the_next_one(tmp_path: Path) -> None:
    """A run that died while it deleted the old folder leaves some of it."""
    out = tmp_path / "out"
    write(out, "one")
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old/half deleted").write_text("")
    write(out, "two", overwrite=True)
    assert contents(out)["file"] == b"two"
    assert os.listdir(tmp_path) == ["out"]


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["full", "file", "link", "dangling link"])
def test_a_refused_target_is_named_and_nothing_is_written(tmp_path: Path, kind: str, overwrite: bool) -> None:
    out = tmp_path / "out"
    if kind == "full":
        out.mkdir()
        (out / "thesis.tex").write_text("no marker, so not even overwrite may replace it")
    elif kind == "file":
        out.write_text("x")
    else:
        write(tmp_path / "real", "x")
        out.symlink_to(tmp_path / ("real" if kind == "link" else "nothing"))
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=f"^{out}: "):
        Staging(out, inputs={}, overwrite=overwrite, marker=MARKER)
    assert snapshot(tmp_path) == before


def test_a_mount_point_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^/proc: .*mount point"):
        check_target(Path("/proc"), overwrite=True, marker="version")


def test_a_folder_with_the_marker_is_replaced_only_when_asked(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "old")
    (out / "stale").write_text("x")
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=f"^{out}: is not empty.*overwrite"):
        write(out, "new")
    with pytest.raises(ValueError, match=f"^{out}: holds files and no config.json"):
        check_target(out, overwrite=True, marker="config.json")
    assert snapshot(tmp_path) == before
    write(out, "new", overwrite=True)
    assert contents(out) == {MARKER: b"", "file": b"new"}, "nothing of the old folder is mixed in"
    assert os.listdir(tmp_path) == ["out"]


# ------------------------------------------------------------------------------------------------------- taken up again


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
        worker = Staging.join(out)
        assert worker.folder == leader.folder
    with worker, pytest.raises(ValueError, match="another run is writing"):
        Staging(out, inputs={})
    with Staging(out, inputs={}):
        pass


def test_another_process_waits_until_the_lock_is_free(tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = "import sys; from bridge.staging import Staging; Staging(sys.argv[1], inputs={}).publish(); print('done')"
    command = [sys.executable, "-c", code, str(out)]
    with Staging(out, inputs={}) as staged:
        (staged.folder / "file").write_text("x")
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
            with pytest.raises(subprocess.TimeoutExpired):
                other.wait(1)
            staged.close()
            assert other.communicate()[0] == "done\n"
        staged._lock = os.open(tmp_path, os.O_RDONLY)  # what the block closes
    assert contents(out) == {"file": b"x"}


# Killed runs. A helper process forks a run for each line it reads; the run is killed with SIGKILL before its n-th
# change to the disk (sys.addaudithook reports each before it happens), or after some seconds.

HELPER = """
import json, os, signal, sys, time
from pathlib import Path
from bridge.staging import Staging

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}

def write(out, value, kill_before):
    changes = 0
    def hook(event, args):
        nonlocal changes
        if event in CHANGES or event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR):
            changes += 1
            if changes == kill_before:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    done = 0
    with Staging(out, inputs={"value": value}, overwrite=True, marker="done") as staged:
        if staged.published:
            staged.forget()
            return done
        for unit in range(4):
            with Staging.join(out) as joined:
                if joined.finished(f"unit-{unit}") is None:
                    (joined.folder / f"file-{unit}").write_text(f"{value} {unit}")
                    joined.record(f"unit-{unit}", [f"file-{unit}"], unit)
                    done += 1
        (staged.folder / "done").write_text(value)
        staged.publish()
    return done

for line in sys.stdin:
    job = json.loads(line)
    begin = time.monotonic()
    child = os.fork()
    if not child:
        os._exit(100 + write(job["out"], job["value"], job.get("kill_before")))
    if "kill_after" in job:
        time.sleep(job["kill_after"])
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    print(json.dumps({"code": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - begin}), flush=True)
"""
WHOLE = {
    value: {"done": value.encode()} | {f"file-{unit}": f"{value} {unit}".encode() for unit in range(4)}
    for value in ("old", "new")
}


@pytest.fixture(scope="module")
def helper() -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-c", HELPER]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.stdin.close()


def run(helper: subprocess.Popen, out: Path, value: str = "new", **job: Any) -> dict[str, Any]:
    helper.stdin.write(json.dumps({"out": str(out), "value": value, **job}) + "\n")
    helper.stdin.flush()
    return json.loads(helper.stdout.readline())


@pytest.fixture(scope="module")
def old_folder(helper: subprocess.Popen, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("old") / "out"
    assert run(helper, out, "old")["code"] == 104
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


def finish_after_kill(helper: subprocess.Popen, out: Path) -> int:
    """The same command again: the result is that of an undisturbed run. Returns how many units it had to do."""
    code = run(helper, out)["code"]
    assert contents(out) == WHOLE["new"]
    assert os.listdir(out.parent) == ["out"]
    return code - 100


@pytest.mark.parametrize("old", [False, True])
def test_killed_before_each_change_to_the_disk(
    helper: subprocess.Popen, old_folder: Path, tmp_path: Path, old: bool
) -> None:
    states, redone = [], []
    for number in count(1):
        out = tmp_path / str(number) / "out"
        out.parent.mkdir()
        if old:
            shutil.copytree(old_folder, out)
        code = run(helper, out, kill_before=number)["code"]
        states.append(state_after_kill(out, old))
        if code == 104:
            break
        assert code == -signal.SIGKILL
        redone.append(finish_after_kill(helper, out))
    met = ["old", "between the renames", "new"] if old else ["absent", "new"]
    assert list(dict.fromkeys(states)) == met, "each state was met, in this order"
    assert states.count(met[0]) > 15
    before_publishing = redone[: states.index(met[1])]
    assert sorted(before_publishing, reverse=True) == before_publishing, "the later it was killed, the less was redone"
    assert set(before_publishing) == {4, 3, 2, 1, 0}


def test_killed_at_random_moments(helper: subprocess.Popen, old_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    seconds = run(helper, tmp_path / "whole/out")["seconds"]
    moments = random.Random(0)
    killed = 0
    for number in range(200):
        out = tmp_path / str(number) / "out"
        out.parent.mkdir()
        old = number % 2 == 0
        if old:
            shutil.copytree(old_folder, out)
        answer = run(helper, out, kill_after=moments.uniform(0, seconds))
        state_after_kill(out, old)
        if answer["code"] == -signal.SIGKILL:
            killed += 1
            finish_after_kill(helper, out)
        if killed == 16:
            return
    pytest.fail(f"only {killed} of 200 runs were killed before they were done")
