"""A folder that appears whole or not at all, and a run that can be killed at any moment and taken up again.

Everything for `out` is written into a hidden folder beside it, `.{name}.partial`; one rename puts it in place. Beside
that lies `.{name}.journal`: what the run is made of (`inputs.json`: its sources and options), and a record for each
finished unit of work: the same inputs, its files with their sizes and SHA-256, and what came of it. The same command
again reads the journal, keeps every unit that was made from the same inputs and whose files still have these checksums,
and does the rest. Units are cut by the inputs alone, so the result has the same bytes however often it was interrupted.

All processes of a run hold a lock on the journal (flock, released when they die), and nothing is looked at before it is
held. Another run on the same `out` waits a little for it, then refuses; if the run that it waited for had the same
inputs and has finished, there is nothing left to do.

Replacing a folder takes two renames, the old one aside to `.{name}.old` and the new one in. A machine that dies between
them leaves no `out`, and both folders complete beside it.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from bridge.jobs.durable import footprint, json_bytes, sync, write_bytes
from bridge.jobs.target import check_target, real_path

LOCK_SECONDS = 10.0  # longer than a killed run's workers take to notice
INPUTS = "inputs.json"


class Staging:
    """`folder` becomes `out` when `publish` is called; until then `out` is untouched.

    `inputs` describes the work as JSON; None means that nothing can be taken up again: leftovers are deleted, and so is
    the folder when the `with` block is left by an error. `replaces` says which files of an existing `out` may be
    replaced (`bridge.jobs.target.check_target`); None means that none may.

    `published` says that a run with these inputs has put `out` in place and was killed before it forgot its journal:
    `folder` is `out` then, and only `forget` is left to do. `finished_by_another` says that such a run ended while this
    one waited for it: nothing at all is left to do.

    Raises:
        ValueError: `out` is not fit (`check_target`), or another run is writing it; nothing has been written then.
    """

    def __init__(
        self, out: Path | str, *, inputs: dict[str, Any] | None, replaces: Callable[[str], bool] | None = None
    ):
        self._locate(out, inputs)
        self._replaces = replaces
        if not self._journal.exists():
            check_target(self.out, replaces=replaces)  # before anything is written; and again under the lock
        self._lock, waited_for = self._take_lock(fcntl.LOCK_EX)
        try:
            self._look(waited_for)
        except BaseException:
            self._leave_no_journal()
            raise

    @classmethod
    def join(cls, out: Path | str, inputs: dict[str, Any] | None) -> Self:
        """The staging that another process of the same run has opened.

        Raises:
            OSError: that run has ended.
        """
        staging = cls.__new__(cls)
        staging._locate(out, inputs)
        staging._replaces, staging.published, staging.finished_by_another = None, False, False
        staging._lock, _ = staging._take_lock(fcntl.LOCK_SH)
        if staging._read(INPUTS) != staging._inputs:
            staging._leave_no_journal()
            raise OSError(f"{out}: the run that this process belongs to has ended")
        return staging

    def _locate(self, out: Path | str, inputs: dict[str, Any] | None) -> None:
        self.out = real_path(out)
        self.folder, self._journal = _sibling(self.out, "partial"), _sibling(self.out, "journal")
        self._resumable, self._inputs = inputs is not None, json.loads(json.dumps(inputs))
        self._made_from = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()

    def _look(self, waited_for: Any) -> None:
        """What is there, now that nobody else writes to it."""
        found = self._read(INPUTS)
        same = self._resumable and found == self._inputs
        complete = self.out.exists() and not self.folder.exists()
        self.published = same and complete
        self.finished_by_another = self._resumable and found is None and waited_for == self._inputs and complete
        if self.finished_by_another:
            self._leave_no_journal()
            return
        if self.published:
            self.folder = self.out
        else:
            check_target(self.out, replaces=self._replaces)
            if not same:
                self._clear()
            self.folder.mkdir(parents=True, exist_ok=True)  # before the inputs: they are alone only after `publish`
            write_bytes(self._journal / INPUTS, json_bytes(self._inputs))
        assert self._lock is not None
        fcntl.flock(self._lock, fcntl.LOCK_SH)  # from here on the run's workers may join

    def finished(self, unit: str) -> Any:
        """What `record` was given as `result`, or None.

        None too if the unit was made from other inputs, or if one of its files has not the checksum it had.
        """
        record = self._read(f"{unit}.json")
        if not isinstance(record, dict) or record.get("made_from") != self._made_from:
            return None
        files = record.get("files")
        if not isinstance(files, dict) or any(_describe(self.folder / file) != found for file, found in files.items()):
            return None
        return record.get("result")

    def record(self, unit: str, files: Iterable[str], result: Any) -> None:
        """The unit is done: its files are on the disk, `result` (JSON, not None) came of it."""
        described = {file: _describe(self.folder / file) for file in files}
        record = {"made_from": self._made_from, "files": described, "result": result}
        write_bytes(self._journal / f"{unit}.json", json_bytes(record))

    @property
    def kept_bytes(self) -> int:
        """Bytes in `folder`: what a run that failed leaves for the next one."""
        nbytes, _ = footprint(self.folder)
        return nbytes

    def publish(self, then: Callable[[], None] = lambda: None) -> None:
        """Put the folder in place, do what comes `then`, and forget the journal.

        A run that is killed in between has only `then` and the forgetting left to do, so `then` may come twice.

        Raises:
            ValueError: `out` was filled by someone else meanwhile.
        """
        for root, _, _ in self.folder.walk():
            sync(root)
        if self._replaces is not None and self.out.exists():
            check_target(self.out, replaces=self._replaces)  # again: something may have come meanwhile
            self._swap()
        else:
            try:
                self.folder.rename(self.out)  # also onto an empty folder, never onto a full one
            except OSError as error:
                raise ValueError(
                    f"{self.out}: was empty when writing began and is not now ({error}); write elsewhere"
                ) from error
        sync(self.out.parent)
        then()
        self.forget()

    def _swap(self) -> None:
        old = _sibling(self.out, "old")
        if old.exists():  # a run died while it deleted this
            shutil.rmtree(old)
        self.out.rename(old)
        try:
            self.folder.rename(self.out)
        finally:
            if not self.out.exists():
                old.rename(self.out)

    def forget(self) -> None:
        """Delete the journal, and the folder that was replaced."""
        old = _sibling(self.out, "old")
        if self._replaces is not None and old.exists():  # also if an earlier run died between the renames
            shutil.rmtree(old)
        (self._journal / INPUTS).unlink(missing_ok=True)
        shutil.rmtree(self._journal)

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

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
        """A file of the journal; None if it is not there or is damaged."""
        with suppress(FileNotFoundError, ValueError):
            return json.loads((self._journal / name).read_bytes())
        return None

    def _take_lock(self, mode: int) -> tuple[int | None, Any]:
        """A lock on the journal folder that is at this path now, and the inputs of the run that was waited for.

        A lock on a folder that was deleted meanwhile is no lock.
        """
        deadline, waited_for = time.monotonic() + LOCK_SECONDS, None
        while True:
            try:
                self._journal.mkdir(parents=True, exist_ok=True)
                handle = os.open(self._journal, os.O_RDONLY)
            except FileNotFoundError:  # the other run was done between these two lines
                continue
            except FileExistsError:  # or in the first, which finds a folder, and then none
                if self._journal.is_file():
                    raise ValueError(
                        f"{self._journal}: found a file, expected a folder or nothing; move it away, or write elsewhere"
                    ) from None
                continue
            with suppress(BlockingIOError, FileNotFoundError):
                fcntl.flock(handle, mode | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(handle), self._journal.stat()):
                    return handle, waited_for
            os.close(handle)
            waited_for = self._read(INPUTS) or waited_for
            if time.monotonic() > deadline:
                raise ValueError(
                    f"{self._journal}: another run is writing to this folder; wait for it, or write elsewhere"
                )
            time.sleep(0.05)

    def _leave_no_journal(self) -> None:
        """Give the lock back, and the journal's folder with it if nothing is in it."""
        with suppress(OSError):
            self._journal.rmdir()
        self.close()


def unfinished(out: Path) -> bool:
    """Whether a run for `out` is at work, or was stopped and can be taken up again."""
    return _sibling(real_path(out), "journal").exists()


def _describe(path: Path) -> dict[str, Any] | None:
    """A file's size and checksum; None if it is not there."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    return None


def _sibling(out: Path, role: str) -> Path:
    return out.with_name(f".{out.name}.{role}")
