"""A staged folder is at its target whole or not at all, and a target that is not its to fill is refused."""

import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.folders import contents, snapshot

from bridge.jobs import staging
from bridge.jobs.staging import Staging
from bridge.jobs.target import check_target

MARKER = "done"
OURS = {"file", MARKER}  # what a new folder replaces


def write(out: Path, value: str, *, inputs: Any = None, overwrite: bool = False) -> None:
    with Staging(out, inputs=inputs, replaces=OURS.__contains__ if overwrite else None) as staged:
        (staged.folder / "file").write_text(value)
        (staged.folder / MARKER).write_text("")
        staged.publish()


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
    with suppress(error), Staging(folder / "out", inputs=None, replaces=OURS.__contains__ if old else None) as staged:
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
    with Staging(out, inputs=None, replaces=OURS.__contains__) as staged:
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
        (out / "thesis.tex").write_text("nothing that a new folder replaces, so not even overwrite may")
    elif kind == "file":
        out.write_text("x")
    else:
        write(tmp_path / "real", "x")
        out.symlink_to(tmp_path / ("real" if kind == "link" else "nothing"))
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=f"^{out}: "):
        Staging(out, inputs={}, replaces=OURS.__contains__ if overwrite else None)
    assert snapshot(tmp_path) == before


def test_a_mount_point_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^/proc: .*mount point"):
        check_target(Path("/proc"), replaces=lambda _: True)


def test_a_folder_is_replaced_only_when_asked(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "old")
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=f"^{out}: is not empty.*overwrite"):
        write(out, "new")
    assert snapshot(tmp_path) == before
    write(out, "new", overwrite=True)
    assert contents(out) == {MARKER: b"", "file": b"new"}
    assert os.listdir(tmp_path) == ["out"]


def test_a_run_that_ends_while_another_looks_for_its_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is gone between the moments at which it is made and opened: it is made again."""
    really, gone = os.open, []

    def opened(path: Any, *arguments: Any, **named: Any) -> int:
        if not gone and str(path).endswith(".journal"):
            gone.append(path)
            os.rmdir(path)
        return really(path, *arguments, **named)

    monkeypatch.setattr(staging.os, "open", opened)
    write(tmp_path / "out", "new")
    assert gone
    assert contents(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


def test_a_run_that_ends_while_another_makes_its_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there when it is to be made, and gone when that is looked at."""
    really, gone = os.mkdir, []

    def made(path: Any, *arguments: Any, **named: Any) -> None:
        if not gone and str(path).endswith(".journal"):
            gone.append(path)
            raise FileExistsError(path)
        really(path, *arguments, **named)

    monkeypatch.setattr(os, "mkdir", made)
    write(tmp_path / "out", "new")
    assert gone
    assert contents(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


def test_a_file_where_the_journal_should_be_is_named_and_kept(tmp_path: Path) -> None:
    (tmp_path / ".out.journal").write_text("mine")
    with pytest.raises(ValueError, match=r"\.out\.journal: found a file, expected a folder or nothing; move it away"):
        write(tmp_path / "out", "new")
    assert contents(tmp_path) == {".out.journal": b"mine"}
