"""A folder that appears whole or not at all, and a run that can be killed at any moment and taken up again.

Everything for `out` is written into a hidden folder beside it, `.{name}.partial`; one rename puts it in place. Beside
that lies `.{name}.journal`: what the run is made of (`inputs.json`: its sources and options), and a record for each
finished unit of work: its files with their sizes and SHA-256, and what came of it. The same command again reads the
journal, keeps every unit whose files still have these checksums and does the rest; a run with other inputs starts anew.
Units are cut by the inputs alone, so the result has the same bytes however often it was interrupted.

All processes of a run hold a lock on the journal (flock, released when they die). Another run on the same `out` waits a
little for it, then refuses.

Replacing a folder takes two renames, the old one aside to `.{name}.old` and the new one in. A machine that dies between
them leaves no `out`, and both folders complete beside it.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from bridge.jobs.durable import json_bytes, sync, write_bytes

LOCK_SECONDS = 10.0  # longer than a killed run's workers take to notice
INPUTS = "inputs.json"


class Staging:
    """`folder` becomes `out` when `publish` is called; until then `out` is untouched.

    `inputs` describes the work as JSON; None means that nothing can be taken up again: leftovers are deleted, and so is
    the folder when the `with` block is left by an error. `marker` is the file by which an existing `out` is known to be
    something that may be replaced. `published` says that a run with these inputs has put `out` in place and was killed
    before it forgot its journal: `folder` is `out` then, and only `forget` is left to do.

    Raises:
        ValueError: `out` is not fit (`check_target`), or another run is writing it; nothing has been written then.
    """

    def __init__(self, out: Path | str, *, inputs: dict[str, Any] | None, overwrite: bool = False, marker: str = ""):
        self.out = Path(os.path.abspath(out))
        self.folder, self._journal = _sibling(self.out, "partial"), _sibling(self.out, "journal")
        self._resumable, self._overwrite = inputs is not None, overwrite
        same = inputs is not None and self._read(INPUTS) == json.loads(json.dumps(inputs))
        self.published = same and not self.folder.exists() and self.out.exists()
        if not self.published:
            check_target(self.out, overwrite=overwrite, marker=marker)
        self._lock = _lock(self._journal, fcntl.LOCK_EX)
        if self.published:
            self.folder = self.out
        else:
            if not same:
                self._clear()
            self.folder.mkdir(parents=True, exist_ok=True)  # before the inputs: they are alone only after `publish`
            write_bytes(self._journal / INPUTS, json_bytes(inputs))
        fcntl.flock(self._lock, fcntl.LOCK_SH)  # from here on the run's workers may join

    @classmethod
    def join(cls, out: Path | str) -> Self:
        """The staging that another process of the same run has opened."""
        staging = cls.__new__(cls)
        staging.out = Path(os.path.abspath(out))
        staging.folder, staging._journal = _sibling(staging.out, "partial"), _sibling(staging.out, "journal")
        staging._resumable, staging._overwrite, staging.published = True, False, False
        staging._lock = _lock(staging._journal, fcntl.LOCK_SH)
        return staging

    def finished(self, unit: str) -> Any:
        """What `record` was given as `result`, if every file of the unit is there with its checksum; else None."""
        record = self._read(f"{unit}.json")
        if record is None or any(_describe(self.folder / file) != found for file, found in record["files"].items()):
            return None
        return record["result"]

    def record(self, unit: str, files: Iterable[str], result: Any) -> None:
        """The unit is done: its files are on the disk, `result` (JSON, not None) came of it."""
        described = {file: _describe(self.folder / file) for file in files}
        write_bytes(self._journal / f"{unit}.json", json_bytes({"files": described, "result": result}))

    def publish(self) -> None:
        """Put the folder in place, and forget the journal.

        Raises:
            ValueError: `out` was filled by someone else meanwhile.
        """
        for root, _, _ in self.folder.walk():
            sync(root)
        old = _sibling(self.out, "old")
        if self._overwrite and self.out.exists():
            if old.exists():  # a run died while it deleted this
                shutil.rmtree(old)
            self.out.rename(old)
            try:
                self.folder.rename(self.out)
            finally:
                if not self.out.exists():
                    old.rename(self.out)
        else:
            try:
                self.folder.rename(self.out)  # also onto an empty folder, never onto a full one
            except OSError as error:
                raise ValueError(
                    f"{self.out}: was empty when writing began and is not now ({error}); write elsewhere"
                ) from error
        sync(self.out.parent)
        self.forget()

    def forget(self) -> None:
        """Delete the journal, and the folder that was replaced."""
        old = _sibling(self.out, "old")
        if self._overwrite and old.exists():  # also if an earlier run died between the renames
            shutil.rmtree(old)
        (self._journal / INPUTS).unlink(missing_ok=True)
        shutil.rmtree(self._journal)

    def close(self) -> None:
        """Release the lock."""
        os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and not self._resumable:
            shutil.rmtree(self.folder, ignore_errors=True)
            shutil.rmtree(self._journal, ignore_errors=True)
        self.close()

    def _clear(self) -> None:
        (self._journal / INPUTS).unlink(missing_ok=True)
        for entry in self._journal.iterdir():
            entry.unlink()
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def _read(self, name: str) -> Any:
        with suppress(FileNotFoundError):
            return json.loads((self._journal / name).read_bytes())
        return None


def check_target(out: Path, *, overwrite: bool, marker: str) -> None:
    """A folder may be written to `out`.

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
    if not overwrite:
        raise ValueError(f"{out}: is not empty; give another folder, or overwrite to replace the checkpoint in it")
    if not (out / marker).is_file():
        raise ValueError(f"{out}: holds files and no {marker}, so is no checkpoint to overwrite; empty it by hand")


def _lock(journal: Path, mode: int) -> int:
    """A lock on the journal folder that is at this path now; one that was just deleted is no lock."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        journal.mkdir(parents=True, exist_ok=True)
        handle = os.open(journal, os.O_RDONLY)
        with suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(handle, mode | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), journal.stat()):
                return handle
        os.close(handle)
        if time.monotonic() > deadline:
            raise ValueError(f"{journal}: another run is writing to this folder; wait for it, or write elsewhere")
        time.sleep(0.05)


def _describe(path: Path) -> dict[str, Any] | None:
    """A file's size and checksum; None if it is not there."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    return None


def _sibling(out: Path, role: str) -> Path:
    return out.with_name(f".{out.name}.{role}")
