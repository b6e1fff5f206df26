"""What can befall a run: killed before any change to a file system, a full disk, no rights, a flipped bit.

A `Fault` is called in the process of the run, before it begins (`support.conversions.start`, `support.forks.fork`).
"""

import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bridge.jobs.staging import Staging

NOBODY = 65534

Fault = Callable[[], dict[str, Any]]
"""Returns further options of the run."""


def small_files(nbytes: int) -> dict[str, Any]:
    """No file may grow beyond `nbytes`."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))
    return {}


def nobody() -> dict[str, Any]:
    """Lose root's rights."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    return {}


def after_units(count: int, act: Callable[[], object]) -> dict[str, Any]:
    """Do something between two units."""

    def progress(units: Any, what: str, length: int) -> Iterator:
        for done, unit in enumerate(units):
            if done == count:
                act()
            yield unit

    return {"progress": progress}


def die_at(number: int, below: Path) -> dict[str, Any]:
    """Killed just before the file system below a folder is changed for the `number`-th time, counted from 0."""
    seen = 0

    def audit(event: str, arguments: tuple) -> None:
        nonlocal seen
        path = _changed(event, arguments)
        if path is None or not path.startswith(str(below)):
            return
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1

    sys.addaudithook(audit)
    return {}


def die_before_publishing() -> dict[str, Any]:
    """Everything is written, and nothing is in place."""
    Staging.publish = lambda self, then: os._exit(1)
    return {}


_EVENTS = {"os.rename": 2, "os.remove": 1, "os.mkdir": 2, "os.rmdir": 1}  # and where the folder's descriptor stands


def _changed(event: str, arguments: tuple) -> str | None:
    """The path that is about to be changed."""
    if event == "open":
        path, mode, flags = arguments
        writes = flags & (os.O_WRONLY | os.O_RDWR) or (isinstance(mode, str) and mode[:1] in "wxa")
        return str(path) if writes else None
    if event not in _EVENTS:
        return None
    folder = arguments[_EVENTS[event]]
    return str(arguments[0]) if folder == -1 else f"{os.readlink(f'/proc/self/fd/{folder}')}/{arguments[0]}"


def flip(path: Path, at: int, bit: int = 0) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)
