"""Where an output may be written: nothing that exists is destroyed, and nothing that is still to be read."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

MOST_NAMED = 3


def real_path(path: Path | str) -> Path:
    """The path by which every spelling of a place is known: absolute, without links in what stands above it."""
    path = Path(os.path.abspath(path))
    return Path(os.path.realpath(path.parent), path.name)


def check_apart(out: Path | str, inputs: Iterable[Path | str]) -> None:
    """An output is neither an input, nor inside one, nor around one, however they are spelt.

    Raises:
        ValueError: it is; names both.
    """
    written = Path(os.path.realpath(out))
    for path in inputs:
        read = Path(os.path.realpath(path))
        if written == read:
            raise ValueError(f"{out}: is {path}, which is read; write elsewhere")
        if written.is_relative_to(read):
            raise ValueError(f"{out}: lies inside {path}, which is read; write elsewhere")
        if read.is_relative_to(written):
            raise ValueError(f"{out}: holds {path}, which is read and would be replaced; write elsewhere")


def check_target(out: Path, *, replaces: Callable[[str], bool] | None = None) -> None:
    """A folder may be written to `out`: nothing is there, or an empty folder, or only what `replaces` accepts.

    `replaces` says of a file, by its path inside `out`, whether the new output takes its place; None: nothing may be
    there.

    Raises:
        ValueError: naming `out`, what is there and what to do.
    """
    if out.is_symlink() or out.is_mount():
        raise ValueError(f"{out}: is a link or a mount point, which one rename cannot replace; give a plain folder")
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"{out}: is a file, expected a folder or nothing; give another path")
    if not any(out.iterdir()):
        return
    if replaces is None:
        raise ValueError(f"{out}: is not empty; give another folder, or overwrite to replace the checkpoint in it")
    lost = [name for name in _entries(out) if not replaces(name)]
    if lost:
        more = f" and {len(lost) - MOST_NAMED} more" if len(lost) > MOST_NAMED else ""
        raise ValueError(
            f"{out}: holds {', '.join(lost[:MOST_NAMED])}{more}, which the new checkpoint has not and which would be "
            "lost; move it out of the folder, or write elsewhere"
        )


def _entries(out: Path) -> list[str]:
    """Every file and link below a folder, and every folder with nothing in it, sorted."""
    found = []
    for root, folders, files in out.walk():
        names = files + [name for name in folders if (root / name).is_symlink()]
        if not names and not folders and root != out:
            names = ["."]
        found += [(root / name).relative_to(out).as_posix() for name in names]
    return sorted(found)
