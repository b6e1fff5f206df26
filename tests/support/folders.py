"""What a folder holds: of two to be compared, or of one before and after; and what a run has left beside it."""

import hashlib
import json
import os
import socket
from pathlib import Path


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def checksums(folder: Path) -> dict[str, str]:
    """Every file and folder, with the checksum of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def snapshot(folder: Path) -> dict[str, tuple[int, bytes | None]]:
    """With the times of the last changes: equal only if nothing was touched."""
    paths = [folder, *sorted(folder.rglob("*"))]
    return {str(p): (p.lstat().st_mtime_ns, p.read_bytes() if p.is_file() else None) for p in paths}


def siblings(out: Path) -> list[str]:
    """What lies beside `out`, itself included."""
    return sorted(path.name for path in out.parent.iterdir())


def finished_files(out: Path) -> list[Path]:
    """What an interrupted run has recorded as finished: one file a unit."""
    partial, journal = (out.with_name(f".{out.name}.{role}") for role in ("partial", "journal"))
    records = [json.loads(path.read_bytes()) for path in sorted(journal.glob("unit-*.json"))]
    return [partial / file for record in records for file in record["files"]]


def bind(path: Path) -> None:
    """A socket; its name may have about a hundred characters."""
    here = os.open(path.parent, os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(f"/proc/self/fd/{here}/{path.name}")
    finally:
        os.close(here)
