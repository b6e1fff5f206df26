"""A process that may fail or hang, with all that it starts."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

LOOK = 1.0  # seconds
_running: set[subprocess.Popen[bytes]] = set()
_ended = threading.Event()


def end_all_when_ended() -> None:
    """Whoever ends this benchmark, with `timeout` say, ends what it runs: that would go on, on the GPU of the next."""
    signal.signal(signal.SIGTERM, _end_all)


def _end_all(*_: object) -> None:
    _ended.set()
    for child in list(_running):
        _end(child)
    _leave()


def _leave() -> None:
    raise SystemExit(128 + signal.SIGTERM)


def _end(child: "subprocess.Popen[bytes]") -> None:
    """It and its descendants: torchrun's ranks are in sessions of their own."""
    for pid in _family(child.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _family(pid: int) -> list[int]:
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for one in found:  # which grows
        found += [child for child, parent in parents.items() if parent == one]
    return found


def run(
    command: Sequence[str],
    log: Path,
    limit: float,
    *,
    hangs: Callable[[], bool] = lambda: False,
    **environment: str,
) -> int | None:
    """Its exit status; None if it was ended, after `limit` seconds or because it `hangs`.

    What it prints is added to `log`. It imports the checkout that this file is of.
    """
    if _ended.is_set():
        _leave()
    until = time.monotonic() + limit
    checkout = str(Path(__file__).parents[2])
    path = os.pathsep.join([checkout, *filter(None, [os.environ.get("PYTHONPATH")])])
    with log.open("ab") as file:
        child = subprocess.Popen(
            command,
            stdout=file,
            stderr=file,
            start_new_session=True,  # it is ended here, and not by the terminal
            env=os.environ | environment | {"PYTHONPATH": path},
        )
        _running.add(child)
        try:
            while (remaining := until - time.monotonic()) > 0 and not hangs():
                with suppress(subprocess.TimeoutExpired):
                    return child.wait(min(LOOK, remaining))
            return None
        finally:
            if child.poll() is None:
                _end(child)
                child.wait()
            _running.discard(child)


def last_words(log: Path, lines: int) -> list[str]:
    """The last lines that it printed."""
    return log.read_text(errors="replace").strip().splitlines()[-lines:] if log.exists() else []
