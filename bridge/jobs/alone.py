"""One process at a time in a folder: of one host, for on network file systems others may not see its lock."""

import errno
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SECONDS = 10.0  # that is waited for a process that was killed, or ends

WITHOUT_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Inside, no other process is; the folder is made. Processes that are forked inside belong to this one.

    Raises:
        ValueError: it is no folder, or another process is in it and stays.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise ValueError(f"{folder}: found a file, expected a folder or nothing; write elsewhere") from None
    handle = os.open(folder, os.O_RDONLY)  # its lock is released when the process dies
    try:
        _lock(handle, folder)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, folder: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno in WITHOUT_LOCKS:
                logging.getLogger(__name__).warning(
                    f"{folder}: its file system has no locks, so another process in it would not be found out"
                )
                return
            if error.errno != errno.EWOULDBLOCK:
                raise OSError(error.errno, error.strerror, str(folder)) from error
            if time.monotonic() > deadline:
                raise ValueError(
                    f"{folder}: another process is at work in it; wait until it ends, or write elsewhere"
                ) from None
            time.sleep(0.05)
