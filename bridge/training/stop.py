"""Signals that end a run after the step that it is at, with a checkpoint: a scheduler's SIGTERM, Ctrl-C."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

AGAIN_SECONDS = 2.0  # torchrun sends on what the terminal has sent already
STOPPING = b"stopping after this step, with a checkpoint; Ctrl-C again ends at once\n"


@contextmanager
def asked_to_stop(numbers: Sequence[int]) -> Iterator[Callable[[], int]]:
    """Inside, a function says which of the signals has come, or 0. Those that are ignored stay so.

    Ctrl-C interrupts when it comes once more, after some seconds. SIGTERM does not: schedulers send it to torchrun and
    to its ranks, to which torchrun sends it too, and what must end at once they kill. Only in a process's main thread,
    unless there are no signals.
    """
    came: dict[int, float] = {}

    def note(number: int, frame: object) -> None:
        now = time.monotonic()
        first = came.setdefault(number, now)
        if number == signal.SIGINT and now - first > AGAIN_SECONDS:
            raise KeyboardInterrupt
        if first == now and sys.stderr.isatty():
            os.write(2, STOPPING)  # what prints may be what is interrupted

    handlers = {number: signal.getsignal(number) for number in numbers}
    before = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}
    try:
        for number in before:
            signal.signal(number, note)
        yield lambda: next(iter(came), 0)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
