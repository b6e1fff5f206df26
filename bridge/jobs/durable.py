"""Small files that are on the disk, whole, once the call returns."""

import json
import os
from pathlib import Path
from typing import Any


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
    unnamed.write_bytes(data)
    sync(unnamed)
    unnamed.rename(path)


def json_bytes(value: Any) -> bytes:
    """For people to read."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
