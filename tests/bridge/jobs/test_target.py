"""Where an output may go: apart from what is read, however it is spelt, and only over what it replaces."""

import os
from pathlib import Path

import pytest
from support.folders import contents

from bridge.jobs.target import check_apart, check_target, real_path

RELATIONS = {
    "equal": ("a/b", "a/b"),
    "below": ("a/b/c/d", "a/b"),
    "above": ("a", "a/b"),
    "far above": (".", "a/b/c"),
}
SPELLINGS = ["plain", "dots", "relative", "through a link", "a link to it"]


def spelt(root: Path, path: str, spelling: str) -> Path:
    """A folder below `root` under another name for it."""
    match spelling:
        case "dots":
            return root / "a" / ".." / path / "x" / ".."
        case "relative":
            return Path(os.path.relpath(root / path))
        case "through a link":
            (root / "elsewhere").mkdir()
            (root / "elsewhere/link").symlink_to(root)
            return root / "elsewhere/link" / path
        case "a link to it":
            (root / "elsewhere").mkdir()
            (root / "elsewhere/link").symlink_to(root / path)
            return root / "elsewhere/link"
    return root / path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root/a/b/c/d").mkdir(parents=True)
    return tmp_path / "root"


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("which", ["output", "input"])
def test_an_output_is_apart_from_every_input(root: Path, relation: str, spelling: str, which: str) -> None:
    written, read = RELATIONS[relation]
    if which == "output":
        out, source = spelt(root, written, spelling), root / read
    else:
        out, source = root / written, spelt(root, read, spelling)
    with pytest.raises(ValueError, match="write elsewhere") as error:
        check_apart(out, [root.parent / "unrelated", source])
    assert str(out) in str(error.value)
    assert str(source) in str(error.value)


@pytest.mark.parametrize(("written", "read"), [("a/b", "a/bc"), ("a/bc", "a/b"), ("a/b/c", "a/b/d"), ("x", "a")])
def test_neighbours_with_a_common_beginning_are_apart(root: Path, written: str, read: str) -> None:
    check_apart(root / written, [root / read])


def test_one_place_has_one_path(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "link").symlink_to(root / "a")
    monkeypatch.chdir(root / "a")
    spellings = [root / "a/new", "new", "./new", "b/../new", root / "link/new", f"{root}/link/../link/new/"]
    assert {real_path(path) for path in spellings} == {root.resolve() / "a/new"}


LOST = ["thesis.tex", "src/main.py", "deep/er/notes", "empty folder/", "tensorboard/events", ".hidden"]


@pytest.mark.parametrize("lost", LOST)
def test_nothing_is_lost_that_the_new_output_has_not(tmp_path: Path, lost: str) -> None:
    out = tmp_path / "out"
    (out / "kept").mkdir(parents=True)
    (out / "kept/old").write_text("old")
    check_target(out, replaces={"kept/old"}.__contains__)
    if lost.endswith("/"):
        (out / lost).mkdir()
    else:
        (out / lost).parent.mkdir(parents=True, exist_ok=True)
        (out / lost).write_text("mine")
    with pytest.raises(ValueError, match="which the new checkpoint has not") as error:
        check_target(out, replaces={"kept/old"}.__contains__)
    assert lost.rstrip("/") in str(error.value)


def test_a_link_in_the_output_is_not_followed(tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    other.mkdir()
    (other / "kept").write_text("mine")
    out.mkdir()
    (out / "link").symlink_to(other)
    with pytest.raises(ValueError, match="holds link, which"):
        check_target(out, replaces={"link/kept"}.__contains__)
    assert contents(other) == {"kept": b"mine"}


def test_of_many_files_some_are_named_and_all_counted(tmp_path: Path) -> None:
    for number in range(7):
        (tmp_path / f"file-{number}").write_text("")
    with pytest.raises(ValueError, match=r"holds file-0, file-1, file-2 and 4 more, which"):
        check_target(tmp_path, replaces=lambda name: False)
