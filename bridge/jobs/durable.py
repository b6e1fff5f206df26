"""Small files that are on the disk, whole, once the call returns."""

import json
import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

from bridge.jobs.os_errors import os_errors_of


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, data: bytes) -> None:
    """A small file, whole or not at all."""
    unnamed = path.with_name(f".{path.name}.tmp")
    try:
        with os_errors_of(path):
            unnamed.write_bytes(data)
            sync(unnamed)
            unnamed.rename(path)
    except OSError:
        with suppress(OSError):
            unnamed.unlink()
        raise


def copy_file(source: Path, target: Path) -> None:
    """Copy a regular file; the copy has no permission that the original lacks.

    Raises:
        ValueError: the source is not a regular file.
    """
    with open(os.open(source, os.O_RDONLY | os.O_NONBLOCK), "rb") as original:  # opening a FIFO must not wait
        found = os.fstat(original.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{source}: is not a regular file any more; copy it again and start anew")
        target.unlink(missing_ok=True)  # what an interrupted run left may not be writable
        handle = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, stat.S_IMODE(found.st_mode) & 0o777)
        with open(handle, "wb") as copy:
            shutil.copyfileobj(original, copy, 2**20)
            copy.flush()
            os.fsync(handle)


def footprint(*paths: Path) -> tuple[int, int]:
    """Bytes and number of files at and below some paths."""
    files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
    return sum(file.stat().st_size for file in files), len(files)


def json_bytes(value: Any) -> bytes:
    """For people to read."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
