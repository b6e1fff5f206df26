"""Which files of a checkpoint may be read: regular, readable ones that belong to it.

A checkpoint may come from anywhere, so what its folder holds is looked at before it is opened: opening a FIFO waits for
ever, a device is endless, and a link can name any file of the machine that reads it.
"""

import os
import stat
from pathlib import Path, PurePosixPath

from bridge.formats import unfinished_download

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def stays_inside(relative: str) -> bool:
    """Whether a relative path names something below the folder it starts from, by its text (hub caches hold links)."""
    path = PurePosixPath(relative)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def regular_file(path: Path, *, named_by: str = "") -> os.stat_result:
    """What the file system says of a readable regular file; links are followed, and nothing is opened.

    `named_by` is the file of the checkpoint that names this one, for the message.

    Raises:
        ValueError: it is not there, is a link to nothing, not a regular file, or may not be read.
    """
    said = f"{path}: {named_by} names this file and it is" if named_by else f"{path}: is"
    try:
        found = path.stat()
        readable = os.access(path, os.R_OK)
    except FileNotFoundError:
        if path.is_symlink():
            raise ValueError(
                f"{said} a link to {os.readlink(path)}, which is not there; copy the file itself"
            ) from None
        if partial := unfinished_download(path):
            raise ValueError(f"{said} not there, but {partial} is: its download was not finished; repeat it") from None
        raise ValueError(f"{said} not there; copy or download it again") from None
    except (OSError, ValueError) as error:  # a link to itself, a name that no file can have
        raise ValueError(f"{path}: cannot be looked at ({error}); expected a regular file") from error
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise ValueError(f"{said} {kind}, expected a regular file; remove it, or put the file in its place")
    if not readable:
        raise ValueError(f"{said} not readable by this user (mode {stat.filemode(found.st_mode)}); change its mode")
    if partial := unfinished_download(path):
        raise ValueError(f"{said} not whole: {partial} is beside it, so its download was not finished; repeat it")
    return found


def file_inside(folder: Path, relative: str | Path, *, named_by: str = "") -> os.stat_result:
    """`regular_file` for one of a checkpoint's folder; links may lead only to other files of the checkpoint.

    Those are files below `folder`, and, where it is a snapshot in a hub cache (`models--owner--name/snapshots/...`),
    the blobs of the same repository.

    Raises:
        ValueError: as `regular_file`, or it leads out of the checkpoint.
    """
    path = folder / relative
    try:
        root, real = folder.resolve(), Path(os.path.realpath(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be looked at ({error}); expected a regular file") from error
    if not any(real.is_relative_to(allowed) for allowed in (root, *_blobs(root))):
        raise ValueError(f"{path}: leads to {real}, outside the checkpoint; copy the file itself into {folder}")
    return regular_file(path, named_by=named_by)


def _blobs(root: Path) -> list[Path]:
    """The blobs of the hub cache's repository that `root` is a snapshot of; as a path, whatever lies there."""
    repositories = [folder.parent.parent for folder in (root, *root.parents) if folder.parent.name == "snapshots"]
    return [repository / "blobs" for repository in repositories if repository.name.startswith("models--")]
