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


def _end_all(*_: object) -> None:
    """Whoever ends a benchmark, with `timeout` say, ends what it started: it would go on, on the GPU of the next."""
    _ended.set()
    for child in _running:
        os.killpg(child.pid, signal.SIGKILL)
    raise SystemExit(128 + signal.SIGTERM)


signal.signal(signal.SIGTERM, _end_all)


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
        raise SystemExit(128 + signal.SIGTERM)
    until = time.monotonic() + limit
    checkout = str(Path(__file__).parents[2])
    path = os.pathsep.join([checkout, *filter(None, [os.environ.get("PYTHONPATH")])])
    with log.open("ab") as file:
        child = subprocess.Popen(
            command,
            stdout=file,
            stderr=file,
            start_new_session=True,  # so that its ranks are ended with it
            env=os.environ | environment | {"PYTHONPATH": path},
        )
        _running.add(child)
        try:
            while (remaining := until - time.monotonic()) > 0 and not hangs():
                with suppress(subprocess.TimeoutExpired):
                    return child.wait(min(LOOK, remaining))
            return None
        finally:
            _running.discard(child)
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()


def last_words(log: Path, lines: int) -> list[str]:
    """The last lines that it printed."""
    return log.read_text(errors="replace").strip().splitlines()[-lines:] if log.exists() else []
