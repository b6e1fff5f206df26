"""Signals that end a run after the step that it is at, with a checkpoint: a scheduler's SIGTERM, Ctrl-C."""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager


@contextmanager
def asked_to_stop(numbers: Sequence[int]) -> Iterator[Callable[[], int]]:
    """Inside, a function says which of the signals has come, or 0; the same one again does what it did before.

    Only in a process's main thread, unless there are no signals.
    """
    came = [0]

    def note(number: int, _: object) -> None:
        came[0] = number
        signal.signal(number, before[number])

    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, note)
    try:
        yield lambda: came[0]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
